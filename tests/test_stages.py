"""The table of stages, dvc.yaml and the asset graph say the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import CHECKOUT
from valr_ops.stages import ABLATION, STAGES, UnknownStageError, dvc_yaml, stage, upstream


def test_dvc_yaml_is_what_the_table_generates():
    assert (CHECKOUT / "dvc.yaml").read_text(encoding="utf-8") == dvc_yaml(), "run: valr stages --write"


def test_the_asset_graph_is_the_table():
    from pipelines.definitions import defs

    graph = defs.resolve_asset_graph()
    seen = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys} - {"recipe"}
        for key in graph.get_all_asset_keys()
    }
    # At scale tiny two cells can be made; at others their asset reads the features of more encoders.
    cells = [stage(f"{ABLATION}@{cell}") for cell in ("valr_no_va", "valr_qwen_encoder")]
    assert seen.pop(ABLATION) == {name for row in cells for name in row.inputs}
    # Not in the table: what it decides depends on the registry.
    assert seen.pop("promotion") == {"scores_valr_m", "scores_sft"}
    assert seen == {row.name: set(row.inputs) for row in STAGES}
    checks = {(key.asset_key.to_user_string(), key.name) for key in graph.asset_check_keys}
    assert checks == {(row.name, check) for row in STAGES for check in row.checks} | {(ABLATION, "losses_are_finite")}


def test_the_graph_changes_only_when_the_snapshot_does():
    """A rename or a new arrow is a reviewed diff; write the new one with tests/test_stages.py."""
    snapshot = CHECKOUT / "tests" / "graph.json"
    assert json.loads(snapshot.read_text(encoding="utf-8")) == _graph()


def test_string_selections_work():
    """dagster-io/dagster#27487: an old ANTLR runtime, pulled in through DVC, breaks every string selection."""
    import dagster as dg

    from pipelines.definitions import defs

    chosen = dg.AssetSelection.from_string("+key:stage2_valr_m").resolve(defs.resolve_asset_graph())
    assert {key.to_user_string() for key in chosen} >= {"stage1_sft", "teacher_features_pi3", "stage2_valr_m"}


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int]:
    """What heavy packages the definitions import, and how many modules opening the instance imports after that."""
    script = (
        "import importlib, sys, pipelines.definitions;"
        "print(*(m for m in ('torch', 'transformers', 'mlflow', 'great_expectations', 'timm') if m in sys.modules));"
        "import dagster as dg, dagster._core.executor.multiprocess;"
        "[importlib.import_module(name) for name in pipelines.definitions.PRELOADED];"
        "before = set(sys.modules);"
        "dg.DagsterInstance.from_config(sys.argv[1]).dispose();"
        "print(len(set(sys.modules) - before))"
    )
    home = tmp_path_factory.mktemp("dagster")
    shutil.copyfile(CHECKOUT / "infra" / "local" / "dagster.yaml", home / "dagster.yaml")
    words = [sys.executable, "-c", script, str(home)]
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    heavy, count = done.stdout.splitlines()
    return heavy.split(), int(count)


def test_loading_the_definitions_imports_nothing_heavy(fresh_process: tuple[list[str], int]):
    assert fresh_process[0] == []


def test_a_forked_step_imports_nothing_more_to_open_the_instance(fresh_process: tuple[list[str], int]):
    assert fresh_process[1] < 40, "without preloading 500 modules are imported, for a second, in each of the steps"


def test_every_stage_function_exists_and_its_code_is_found():
    for row in STAGES:
        assert callable(row.load())
        module = row.function.split(":")[0].replace(".", "/") + ".py"
        assert module in row.code and all((CHECKOUT / path).is_file() for path in row.code)


def test_code_digest_changes_with_any_imported_module(tmp_path: Path):
    row = stage("stage2_valr_s")
    assert {"valr_ops/model/latents.py", "valr_ops/teachers/features.py", "valr_ops/data/batching.py"} <= set(row.code)
    for name in row.code:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((CHECKOUT / name).read_bytes())
    before = row.code_digest(tmp_path)
    with (tmp_path / "valr_ops/model/alignment.py").open("a") as file:
        file.write("# changed\n")
    assert row.code_digest(tmp_path) != before


def test_upstream_is_ordered_and_complete():
    order = [row.name for row in upstream(["ablation_table"])]
    for row in map(stage, order):
        assert all(order.index(needed) < order.index(row.name) for needed in row.inputs)
    assert {"sources", "teacher_features_siglip2", "stage2_valr_m", "scores_base"} <= set(order)


def test_an_unknown_stage_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownStageError, match="did you mean 'stage2_valr_m'"):
        stage("stage2_valrm")


def _graph() -> dict[str, list[str]]:
    return {row.name: sorted(row.inputs) for row in STAGES}


if __name__ == "__main__":
    (CHECKOUT / "tests" / "graph.json").write_text(json.dumps(_graph(), indent=1) + "\n", encoding="utf-8")
