"""The structure of the code: imports go one way, every heavy package has one owner, and loading stays light."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
ORDER = ("recipe", "store", "data", "teachers", "model", "training", "evaluation", "studies", "serving", "release")
"""Folders of valr_ops in the order in which a record travels."""
OWNERS = {
    "mlflow": ("valr_ops/store/lineage.py",),
    "av": ("valr_ops/data/videos.py",),
    "boto3": ("valr_ops/store/objects.py",),
    "great_expectations": ("valr_ops/data/expectations.py",),
    "deepspeed": ("valr_ops/training/engine.py",),
    "timm": ("valr_ops/teachers/",),
    "lmms_eval": ("valr_ops/evaluation/lmms_eval.py",),
    "fastapi": ("valr_ops/serving/",),
    "uvicorn": ("valr_ops/serving/",),
    "kubernetes": ("valr_ops/release/dispatch.py", "assets/"),
    "dagster": ("assets/", "pipelines/"),
}
"""Who may import a heavy package; everyone else asks the owner."""
VAGUE = {"utils", "helpers", "common", "base", "manager", "misc", "registry"}

FILES = sorted(
    path.relative_to(CHECKOUT)
    for folder in ("valr_ops", "assets", "pipelines")
    for path in (CHECKOUT / folder).rglob("*.py")
)


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse((CHECKOUT / path).read_text(encoding="utf-8"))))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, wherever in it, with their lines."""
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} write the whole name of the module"
            yield node.module or "", node.lineno
            # `from valr_ops import store` imports a folder too.
            yield from ((f"{node.module}.{name.name}", node.lineno) for name in node.names if node.module == "valr_ops")


def test_a_folder_imports_only_folders_above_it() -> None:
    climbing = []
    for path in FILES:
        here = path.parts[1] if path.parts[0] == "valr_ops" else ""
        for module, line in _imports(path):
            parts = module.split(".")
            if here not in ORDER or parts[0] != "valr_ops" or len(parts) < 2 or parts[1] not in ORDER:
                continue
            if ORDER.index(parts[1]) > ORDER.index(here):
                climbing.append(f"{path}:{line} imports {module}")
    assert climbing == []


def test_the_library_knows_neither_the_assets_nor_the_pipelines() -> None:
    assert [
        f"{path}:{line} imports {module}"
        for path in FILES
        if path.parts[0] == "valr_ops"
        for module, line in _imports(path)
        if module.split(".")[0] in ("assets", "pipelines")
    ] == []


def test_every_heavy_package_is_imported_by_its_owner_only() -> None:
    assert [
        f"{path}:{line} imports {module}, which belongs to {' and '.join(OWNERS[module.split('.')[0]])}"
        for path in FILES
        for module, line in _imports(path)
        if not path.as_posix().startswith(OWNERS.get(module.split(".")[0], ("",)))
    ] == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [path for path in FILES if VAGUE & {path.stem, *path.parts[:-1]}] == []


def test_the_folder_of_mlflow_settings_does_not_hide_the_package() -> None:
    assert not (CHECKOUT / "mlflow" / "__init__.py").exists()


def test_no_checkpoint_code_is_run_and_no_pickle_is_loaded() -> None:
    dangerous = {"pickle", "cPickle", "dill", "joblib", "cloudpickle"}
    found = [f"{path}:{line}" for path in FILES for module, line in _imports(path) if module.split(".")[0] in dangerous]
    for path in FILES:
        for node in _nodes(path):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                found.append(f"{path}:{node.value.lineno}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                only_tensors = any(
                    one.arg == "weights_only" and ast.unparse(one.value) == "True" for one in node.keywords
                )
                # Weights that come with a package, after their digest was compared with the one that is known.
                if path.name != "weights.py" or path.parent.name != "teachers" or not only_tensors:
                    found.append(f"{path}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        (
            "valr_ops.__main__",
            {"torch", "transformers", "mlflow", "great_expectations", "dagster", "dvc", "pandas", "rich"},
        ),
        ("valr_ops.stages", {"torch", "transformers", "mlflow", "great_expectations", "dagster", "dvc", "pandas"}),
        ("valr_ops.doctor", {"torch", "transformers", "mlflow", "great_expectations", "dagster", "dvc", "pandas"}),
        ("valr_ops.data.records", {"torch", "transformers", "mlflow", "great_expectations", "dagster", "dvc"}),
        ("valr_ops.evaluation.statistics", {"torch", "transformers", "mlflow", "great_expectations", "dagster", "dvc"}),
    ],
)
def test_what_everyone_loads_stays_light(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
