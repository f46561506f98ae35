"""Imposed lengths: the bound on the reasoning is kept, and every budget meets the same questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests import tiny
from tests.evaluation.scenes import context
from tests.evaluation.test_run import users_folder
from valr_ops.data.rewriting import ANSWER_CUE, ControlTokens
from valr_ops.evaluation.benchmarks import BenchmarkError
from valr_ops.evaluation.drawn import Drawing, write_benchmark
from valr_ops.evaluation.length_study import build_scaling_curve
from valr_ops.evaluation.run import build_scores
from valr_ops.model.answering import generate_answers
from valr_ops.model.decoding import Grammar, SegmentRules, ValrForConditionalGeneration
from valr_ops.model.qwen import load_model, save_model
from valr_ops.recipe.recipe import SyntheticRecipe
from valr_ops.store.artifacts import StageContext


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with latents, as stage 2 and as the model before it."""
    root = tmp_path_factory.mktemp("models")
    save_model(tiny.model(), tiny.processor(), root / "stage2_valr_m", {"slots": 4, "control_tokens": "outside"})
    save_model(tiny.model(1), tiny.processor(), root / "stage1_sft", {})
    return root


def test_the_answer_begins_where_the_reasoning_has_to_end(folder: Path) -> None:
    model, processor = load_model(folder / "stage2_valr_m", "cpu", "float32", ValrForConditionalGeneration)
    prompts = [([tiny.image(0)], tiny.QUESTION), ([tiny.image(1)], tiny.QUESTION)]

    def said(bound: int | None) -> list[str]:
        answers = generate_answers(
            model, processor, prompts, max_new_tokens=24, max_segments=2, max_reasoning_tokens=bound
        )
        return [answer.visible_text for answer in answers]

    free = said(None)
    assert said(24) == free, "a bound that is never met changes nothing"
    cue = len(processor.tokenizer.encode(f"\n{ANSWER_CUE}", add_special_tokens=False))
    for whole, bounded in zip(free, said(5), strict=True):
        assert ANSWER_CUE not in whole
        before, _, after = bounded.partition(ANSWER_CUE)
        assert whole.startswith(before.removesuffix("\n"))
        assert len(processor.tokenizer.encode(before, add_special_tokens=False)) <= 5 + cue
        assert after


def test_no_segment_begins_once_the_answer_has_to() -> None:
    control = ControlTokens(latent=5, latent_end=6, latent_pad=7)
    grammar = Grammar(SegmentRules(4, None), control, torch.zeros(2, dtype=torch.long), pad=0)
    grammar.closed[1] = True
    scores = grammar.rule_out(torch.zeros(2, 9))
    assert scores[:, 5].tolist() == [0.0, float("-inf")]
    grammar.keep(torch.tensor([1]))
    assert grammar.rule_out(torch.zeros(1, 9))[0, 5] == float("-inf")


def study(folder: Path, tmp_path: Path, **changes: object) -> StageContext:
    mine = {"format": "jsonl", "path": str(users_folder(tmp_path / "mine"))}
    limits = {"evaluation.max_new_tokens": 12, "evaluation.limit": 3, "evaluation.study_items": 3}
    recipe = tiny.recipe(**{"data.sources.mine": mine, **limits, **changes})
    inputs = {"sources": tmp_path, "benchmarks": tmp_path}
    for scores, model in (("scores_sft", "stage1_sft"), ("scores_valr_m", "stage2_valr_m")):
        build_scores(replace(context(scores, tmp_path, inputs | {model: folder / model}), recipe=recipe))
    made = {scores: tmp_path / scores for scores in ("scores_sft", "scores_valr_m")}
    inputs |= made | {"stage2_valr_m": folder / "stage2_valr_m"}
    return replace(context("scaling_curve", tmp_path, inputs), recipe=recipe)


def test_every_budget_meets_the_same_questions(folder: Path, tmp_path: Path) -> None:
    at = study(folder, tmp_path)
    report = build_scaling_curve(at)
    rows = pq.read_table(at.out / "scaling.parquet").to_pylist()
    imposed = [row for row in rows if row["protocol"] == "interventional-budget"]
    assert {row["n"] for row in imposed} == {3}
    assert {row["control"] for row in imposed} >= {"max_reasoning_tokens"}
    bounds = [row["budget"] for row in imposed if row["control"] == "max_reasoning_tokens"]
    assert bounds == sorted(bounds)
    assert bounds[0] == 1
    observed = [row for row in rows if row["protocol"] == "observational-bins"]
    assert {row["length"] for row in observed} == {"text_tokens", "decode_steps"}
    assert {path.name for path in at.out.iterdir()} == {"scaling.parquet", "scaling.png", "scaling.svg", "result.md"}
    assert report.summary["benchmarks"] == 1
    assert json.dumps(dict(report.summary))


def test_a_damaged_picture_is_left_out_and_a_forced_segment_yields_to_a_budget_of_none(
    folder: Path, tmp_path: Path
) -> None:
    given = tmp_path / "vstar"
    write_benchmark(given, Drawing("vstar", 0, 4, SyntheticRecipe()))
    damaged = next(given.rglob("*.jpg"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    asked = {"evaluation.benchmarks": {"vstar": {"path": str(given), "limit": 4}}, "evaluation.limit": 4}
    at = study(folder, tmp_path, **asked, **{"evaluation.force_first_latent": True, "evaluation.study_items": 4})
    build_scaling_curve(at)
    rows = [row for row in pq.read_table(at.out / "scaling.parquet").to_pylist() if row["benchmark"] == "vstar"]
    assert {row["n"] for row in rows if row["control"]} == {3}
    free = {row["budget"]: row for row in rows if row["control"] == "max_segments"}
    assert free[0]["mean_decode_steps"] == free[0]["mean_text_tokens"], "no latent where the budget is none"
    assert free[1]["mean_decode_steps"] > free[1]["mean_text_tokens"]


def test_too_few_questions_are_no_study(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no benchmark has 30 questions"):
        build_scaling_curve(study(folder, tmp_path, **{"evaluation.limit": None}))
