"""What reaches the tracking server, what never does, and what happens while it is away."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import PIL.Image
import pytest
import yaml
from pydantic import BaseModel

from valr_ops import runner
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe
from valr_ops.stages import stage
from valr_ops.store import lineage
from valr_ops.store.lineage import (
    LineageError,
    RunRecord,
    courier,
    deliver,
    find_runs,
    record,
    recorded_url,
    spool,
    steps,
)

DELIVER = (
    "import sys; from pathlib import Path; from valr_ops.store.lineage import deliver; "
    "print(len(deliver(Path(sys.argv[1]), warn=lambda line: sys.exit(line))))"
)
SERVE = (
    "import sys; from pathlib import Path; from valr_ops.store.lineage import server_command; "
    "print(server_command(Path(sys.argv[1]))[2])"
)


@dataclass(frozen=True)
class Beginning:
    """A project whose database was made by two processes at once: one delivered two runs, one was to start a server."""

    root: Path
    said: list[str]
    complained: list[str]
    statuses: list[int]


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Beginning:
    root = tmp_path_factory.mktemp("project")
    for _ in range(2):
        spool(a_run(root), root)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "VALR_"))}
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(root)], env=environment, stdout=-1, stderr=-1, text=True)
        for code in (DELIVER, SERVE)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    return Beginning(
        root, [out.strip() for out, _ in ended], [err for _, err in ended], [process.returncode for process in started]
    )


@pytest.fixture(scope="module")
def root(beginning: Beginning) -> Path:
    """One project for all tests: making a database takes seconds."""
    return beginning.root


@pytest.fixture(autouse=True)
def own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "VALR_MLFLOW_PAGES", "VALR_DAGSTER_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def warnings() -> list[str]:
    return []


def a_run(root: Path, **changes: Any) -> RunRecord:
    """A training run with a curve, a plot and a table; its output digest is the name of the asking test."""
    artifact = root / "artifacts" / "stage2_valr_m"
    artifact.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (30, 20), (9, 99, 9)).save(artifact / "loss.png")
    values: dict[str, Any] = {
        "stage": "stage2_valr_m",
        "group": "training",
        "output_digest": f"{time.time_ns():032x}.dir",
        "input_digests": {"cot_corpus": "c" * 32 + ".dir", "base_model": "b" * 32 + ".dir"},
        "datasets": ("cot_corpus",),
        "recipe_fingerprint": "0123456789ab",
        "git_commit": "f" * 40,
        "code_digest": "d" * 12,
        "parameters": {"seed": 3, "stage2": {"learning_rate": 2e-6, "betas": [0.9, 0.999]}},
        "summary": {"accuracy": 0.75, "records": 12, "teacher": "dinov3"},
        "timings": {"seconds": 12.5},
        "artifact": artifact,
        "plots": ("loss.png",),
        "tables": {"First rows": "| a |\n|---|\n| 1 |"},
        "tags": {"variant": "valr_m", "teachers": "dinov3+siglip2+pi3", "ablation.group": "table 3"},
    }
    return RunRecord(**(values | changes))


def runs(root: Path, run: RunRecord) -> list[Any]:
    """The MLflow runs that were made from `run`."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=lineage.tracking_uri(root))
    experiment = client.get_experiment_by_name("valr_ops")
    return client.search_runs([experiment.experiment_id], f"tags.`output.digest` = '{run.output_digest}'")


def spooled(root: Path) -> list[str]:
    return sorted(entry.name for entry in (root / ".valr" / "spool").iterdir())


@pytest.fixture
def closed_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_run_carries_its_figures_its_origin_and_its_pictures(root: Path, warnings: list[str]):
    run = a_run(root, dagster_run_id="dagster-1")
    url = record(root, run, warn=warnings.append)
    assert warnings == []
    (found,) = runs(root, run)
    assert url == f"http://127.0.0.1:5000/#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}" + (
        "?workflowType=machine_learning"
    )
    assert recorded_url(root, run.stage, run.output_digest) == url
    assert found.info.run_name == f"stage2_valr_m@{run.output_digest[:10]}"
    assert found.info.status == "FINISHED" and found.info.end_time - found.info.start_time == 12_500
    assert found.data.params == {
        "seed": "3",
        "stage2.learning_rate": "2e-06",
        "stage2.betas": "[0.9, 0.999]",
    }
    assert found.data.metrics == {"accuracy": 0.75, "records": 12.0, "timings/seconds": 12.5}
    expected = {
        "stage": "stage2_valr_m",
        "group": "training",
        "variant": "valr_m",
        "teachers": "dinov3+siglip2+pi3",
        "ablation.group": "table 3",
        "summary.teacher": "dinov3",
        "output.digest": run.output_digest,
        "input.cot_corpus": "c" * 32 + ".dir",
        "input.base_model": "b" * 32 + ".dir",
        "code.digest": "d" * 12,
        "recipe.fingerprint": "0123456789ab",
        "mlflow.source.git.commit": "f" * 40,
        "dagster.run_id": "dagster-1",
        "dagster.asset_key": "stage2_valr_m",
    }
    assert expected.items() <= found.data.tags.items()
    assert "mlflow.parentRunId" not in found.data.tags, "nested runs are hidden from MLflow's charts"
    assert [(row.dataset.name, row.dataset.digest) for row in found.inputs.dataset_inputs] == [
        ("cot_corpus", "c" * 32 + ".dir")
    ]
    files = Path(found.info.artifact_uri.removeprefix("file://"))
    assert sorted(str(path.relative_to(files)) for path in files.rglob("*.*")) == ["plots/loss.png", "table.md"]
    assert "| 1 |" in (files / "table.md").read_text()


def test_the_curve_of_a_resumed_training_arrives_step_by_step_and_once(root: Path, tmp_path: Path):
    file = tmp_path / "metrics.jsonl"

    def line(step: int, loss: float) -> str:
        return json.dumps({"step": step, "time": 1_700_000_000.0 + step, "metrics": {"loss": loss}})

    # Killed in the middle of step 4's line; the checkpoint was at step 2.
    lost, kept = [line(1, 0.9), line(2, 0.8), line(3, 99.0), '{"step": 4, "ti'], [line(3, 0.7), line(4, 0.6)]
    file.write_text("\n".join([*lost, *kept]) + "\n")
    run = a_run(root, metrics_file=file)
    record(root, run)
    import mlflow

    (found,) = runs(root, run)
    client = mlflow.MlflowClient(tracking_uri=lineage.tracking_uri(root))
    history = client.get_metric_history(found.info.run_id, "steps/loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6)]
    assert history[0].timestamp == 1_700_000_001_000


def test_a_training_that_started_again_leaves_nothing_of_its_first_attempt(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    rows = [(1, "loss", 9.0), (2, "loss", 8.0), (3, "loss", 7.0), (1, "tower", 5.0), (1, "loss", 1.0)]
    file.write_text(
        "".join(json.dumps({"step": step, "time": 0.0, "metrics": {name: value}}) + "\n" for step, name, value in rows)
    )
    assert [row[:3] for row in steps(file)] == [(1, "loss", 1.0), (1, "tower", 5.0)]


def test_a_server_that_is_away_costs_one_line_and_its_runs_arrive_later_exactly_once(
    root: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
):
    run = a_run(root)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{closed_port}")
        assert record(root, run, warn=warnings.append) is None
    assert len(warnings) == 1 and "\n" not in warnings[0]
    assert f"http://127.0.0.1:{closed_port} is away" in warnings[0] and "hunter2" not in warnings[0]
    assert spooled(root) == [run.id]
    # The artifact may be replaced before the server is back; the spool has its own copies.
    (run.artifact / "loss.png").unlink()
    (delivered,) = deliver(root)
    assert delivered[0] == run.id and spooled(root) == []
    assert deliver(root) == []
    (found,) = runs(root, run)
    assert (Path(found.info.artifact_uri.removeprefix("file://")) / "plots" / "loss.png").is_file()


def test_a_delivery_that_breaks_off_at_any_point_is_completed_by_the_next_and_makes_one_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], tmp_path: Path
):
    import mlflow

    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1, "time": 5.0, "metrics": {"loss": 0.5}}) + "\n")
    run = a_run(root, metrics_file=file)
    spool(run, root)

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("the line went dead")

    for step in ("log_batch", "log_inputs", "log_artifact", "log_text", "set_terminated"):
        with monkeypatch.context() as fault:
            fault.setattr(mlflow.MlflowClient, step, broken)
            assert deliver(root, warn=warnings.append) == []
    assert len(warnings) == 5 and all("the line went dead" in warning for warning in warnings)
    assert [delivered[0] for delivered in deliver(root)] == [run.id]
    (found,) = runs(root, run)
    client = mlflow.MlflowClient(tracking_uri=lineage.tracking_uri(root))
    assert len(client.get_metric_history(found.info.run_id, "steps/loss")) == 1
    assert len(found.inputs.dataset_inputs) == 1
    # Killed after the server had everything and before the spool was emptied.
    spool(run, root)
    assert [delivered[0] for delivered in deliver(root)] == [run.id]
    assert len(runs(root, run)) == 1


def test_a_broken_record_is_named_and_holds_up_no_other(root: Path, warnings: list[str]):
    broken = root / ".valr" / "spool" / "broken"
    broken.mkdir()
    (broken / "record.json").write_text('{"stage": ')
    run = a_run(root)
    os.utime(broken, (time.time() + 60, time.time() + 60))
    assert record(root, run, warn=warnings.append) is not None
    assert len(warnings) == 1 and ".valr/spool/broken" in warnings[0]
    (broken / "record.json").unlink()
    broken.rmdir()


def test_only_fields_of_the_allow_list_leave_the_process(root: Path):
    run = a_run(
        root,
        parameters={
            "data.sources": {"own": {"format": "jsonl", "path": "../customer-name/data"}},
            "base": {"path": "/models/hunter2", "min_pixels": 256},
            "evaluation": {"api_key": "hunter2", "judge": {"password": "hunter2"}, "hub_token": "hunter2"},
            "evaluation.max_new_tokens": 12,
            "latents": {"control_tokens": "outside"},
            "unheard_of": "hunter2",
        },
        summary={"accuracy": 0.5, "db_password": "hunter2"},
        tags={"variant": "valr_m", "hostname": "hunter2"},
    )
    entry = spool(run, root)
    kept = (entry / "record.json").read_text()
    assert "hunter2" not in kept and "customer-name" not in kept, "not even the spool has it"
    deliver(root)
    (found,) = runs(root, run)
    assert found.data.params == {
        "data.sources.own.format": "jsonl",
        "base.min_pixels": "256",
        "evaluation.max_new_tokens": "12",
        "latents.control_tokens": "outside",
    }
    assert "hunter2" not in str(found.to_dictionary())


def test_a_field_that_left_the_list_after_it_was_spooled_is_not_delivered(root: Path, tmp_path: Path):
    run = a_run(root)
    spool(run, root)
    lists = yaml.safe_load(lineage.FIELDS.read_text())
    stricter = tmp_path / "fields.yaml"
    stricter.write_text(yaml.safe_dump(lists | {"parameters": ["seed"], "metrics": ["accuracy"]}))
    deliver(root, fields=stricter)
    (found,) = runs(root, run)
    assert found.data.params == {"seed": "3"} and found.data.metrics == {"accuracy": 0.75}


def test_without_an_allow_list_nothing_is_logged_and_the_stage_goes_on(root: Path, tmp_path: Path, warnings: list[str]):
    run = a_run(root)
    spool(run, root)
    assert deliver(root, fields=tmp_path / "fields.yaml", warn=warnings.append) == []
    assert len(warnings) == 1 and "git checkout mlflow/fields.yaml" in warnings[0]
    assert runs(root, run) == []
    assert [delivered[0] for delivered in deliver(root)] == [run.id]


def test_every_line_of_the_allow_list_names_a_field_of_the_recipe_and_none_a_place_on_this_machine():
    fields = set(_recipe_fields(Recipe))
    for line in yaml.safe_load(lineage.FIELDS.read_text())["parameters"]:
        passed = [name for name in fields if fnmatchcase(name, line)]
        assert passed, f"{line} matches no field of the recipe"
        assert not {name.rpartition(".")[2] for name in passed} & {"path", "weights"}, line


def _recipe_fields(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield from _fields_of_type(field.annotation, f"{prefix}{name}")


def _fields_of_type(kind: Any, name: str) -> Iterator[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from _recipe_fields(kind, f"{name}.")
    elif get_origin(kind) is dict:
        yield from _fields_of_type(get_args(kind)[1], f"{name}.NAME")
    elif get_origin(kind) in (Union, UnionType):
        for option in get_args(kind):
            yield from _fields_of_type(option, name)
    else:
        yield name


def test_cells_of_an_ablation_are_flat_runs_with_their_own_values_and_tags_to_group_them_by(root: Path):
    import mlflow

    recipe = recipes.paper()
    for cell in ("table6_block4", "table11_w0_25", "table12_k9"):
        row, own = stage(f"stage2_ablation@{cell}"), recipe.for_variant(cell)
        tags, parameters = runner._tags(own, row), runner._parameters(own, row)
        record(root, a_run(root, stage=row.name, tags=tags, parameters=parameters))
    client = mlflow.MlflowClient(tracking_uri=lineage.tracking_uri(root))
    experiment = client.get_experiment_by_name("valr_ops").experiment_id
    found = client.search_runs([experiment], "tags.`dagster.asset_key` = 'stage2_ablation'")
    assert not any("mlflow.parentRunId" in run.data.tags for run in found)
    seen = {
        run.data.tags["ablation.group"]: [
            run.data.tags[name] for name in ("teachers", "alignment.block", "alignment.weight", "latents.slots")
        ]
        for run in found
    }
    assert seen == {
        "table6": ["dinov3", "4", "0.5", "16"],
        "table11": ["dinov3", "12", "0.25", "16"],
        "table12": ["dinov3", "12", "0.5", "9"],
    }
    for run in found:
        assert [run.data.params[name] for name in ("alignment.block", "alignment.weight", "latents.slots")] == [
            run.data.tags[name] for name in ("alignment.block", "alignment.weight", "latents.slots")
        ], "a chart over parameters shows the same"


def test_what_made_an_artifact_and_what_was_made_from_it_are_found_again(root: Path):
    corpus = f"{time.time_ns():032x}.dir"
    run = a_run(root, command="valr materialize +report --set seed=3", person="alice", dagster_run_id="d")
    inputs = {"stage2_valr_m": run.output_digest, "sources": corpus}
    later = a_run(root, stage="scores_valr_m", input_digests=inputs, datasets=("sources",))
    assert record(root, run) is not None and record(root, later) is not None
    (found,) = find_runs(root, "output.digest", [run.output_digest])[run.output_digest]
    assert (found.stage, found.command, found.person) == (run.stage, run.command, "alice")
    assert (found.input_digests, found.git_commit, found.code_digest) == (
        run.input_digests,
        run.git_commit,
        run.code_digest,
    )
    assert found.url == recorded_url(root, run.stage, run.output_digest) and found.parameters["seed"] == "3"
    (next_one,) = find_runs(root, "input.stage2_valr_m", [run.output_digest])[run.output_digest]
    assert (next_one.stage, next_one.output_digest) == ("scores_valr_m", later.output_digest)
    assert find_runs(root, "output.digest", ["unknown"]) == {"unknown": []}


def test_a_server_that_is_away_is_said_by_whoever_asks_it_and_an_empty_project_asks_none(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
):
    assert find_runs(tmp_path, "stage", ["sources"]) == {} and not (tmp_path / ".valr").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{closed_port}")
    with pytest.raises(LineageError, match=f"http://127.0.0.1:{closed_port} can't be asked") as refused:
        find_runs(tmp_path, "stage", ["sources"])
    assert "hunter2" not in str(refused.value)


def test_links_go_to_the_team_server_without_its_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:hunter2@mlflow.example.com/tracking/")
    page = "#/experiments/7/runs/r?workflowType=machine_learning"
    assert lineage.run_url(tmp_path, "r", "7") == f"https://mlflow.example.com/tracking/{page}"
    monkeypatch.setenv("VALR_MLFLOW_PAGES", "https://people.example.com")
    assert lineage.run_url(tmp_path, "r", "7") == f"https://people.example.com/{page}"


def test_two_processes_that_make_the_database_at_once_both_succeed(beginning: Beginning):
    assert beginning.statuses == [0, 0] and beginning.said == ["2", "mlflow"]
    assert beginning.complained == ["", ""], "the migrations of the database are nobody's business"
    state = beginning.root / ".valr"
    with closing(sqlite3.connect(state / "mlflow.db")) as database:
        (count,) = database.execute("SELECT count(*) FROM experiments WHERE name = 'valr_ops'").fetchone()
    assert count == 1 and not (state / "mlflow.partial").exists()


def test_two_processes_that_deliver_the_same_records_make_one_run_of_each(root: Path):
    mine = [a_run(root) for _ in range(3)]
    for run in mine:
        spool(run, root)
    started = [subprocess.Popen([sys.executable, "-c", DELIVER, str(root)], stdout=-1, text=True) for _ in range(2)]
    delivered = [int(process.communicate(timeout=60)[0]) for process in started]
    assert sum(delivered) == 3
    assert [len(runs(root, run)) for run in mine] == [1, 1, 1]


def test_a_record_that_another_process_delivers_in_between_is_passed_over(tmp_path: Path):
    run = a_run(tmp_path)
    entry = spool(run, tmp_path)
    # Listed, but no longer there when it is looked at.
    (entry.parent / "gone").symlink_to(tmp_path / "nothing")
    assert lineage._spooled(tmp_path) == [entry]


def test_mlflow_is_not_imported_before_there_is_something_to_deliver(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from valr_ops.store import lineage; "
        "lineage.deliver(Path(sys.argv[1])); lineage.recorded_url(Path(sys.argv[1]), 'a', 'b'); "
        "print([m for m in ('mlflow', 'dagster', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


RECORD = (
    "import sys; from pathlib import Path; from tests.store.test_lineage import a_run; "
    "from valr_ops.store.lineage import record; root = Path(sys.argv[1]); "
    "print(record(root, a_run(root, output_digest=sys.argv[2]), warn=sys.exit), 'mlflow' in sys.modules)"
)


def elsewhere(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call it as another process would: outside of the context in which this one has its courier."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments, **options).result(timeout=60)


def test_a_courier_delivers_for_other_processes_which_get_the_address_and_import_no_mlflow(root: Path):
    digest = "a" * 32 + ".dir"
    with courier(root):
        words = [sys.executable, "-c", RECORD, str(root), digest]
        done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    url, imported = done.stdout.split()
    assert url == recorded_url(root, "stage2_valr_m", digest) and imported == "False", done.stderr
    assert len(runs(root, a_run(root, output_digest=digest))) == 1


def test_the_process_of_the_courier_waits_for_nothing_until_the_end(root: Path):
    mine = [a_run(root) for _ in range(3)]
    with courier(root):
        assert [record(root, run) for run in mine] == [None] * 3
        # Whoever is told later that the artifact is up to date gets the address all the same.
        assert elsewhere(recorded_url, root, mine[2].stage, mine[2].output_digest) is not None
    assert spooled(root) == [] and [len(runs(root, run)) for run in mine] == [1] * 3


def test_a_courier_that_cannot_deliver_leaves_it_and_the_warning_to_each_process(
    root: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
):
    run, later = a_run(root), a_run(root)
    with courier(root):
        with monkeypatch.context() as away:
            away.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
            assert elsewhere(record, root, run, warn=warnings.append) is None
        assert len(warnings) == 1 and "is away" in warnings[0]
        assert elsewhere(record, root, later, warn=warnings.append) is not None
    assert len(warnings) == 1 and spooled(root) == []
    assert [len(runs(root, one)) for one in (run, later)] == [1, 1]


def test_of_two_couriers_one_delivers_and_the_other_is_not_needed(root: Path):
    mine = [a_run(root), a_run(root)]
    with courier(root):
        elsewhere(_with_courier, root, mine[0])
        assert elsewhere(record, root, mine[1]) is not None
    assert [len(runs(root, run)) for run in mine] == [1, 1]


def _with_courier(root: Path, run: RunRecord) -> None:
    with courier(root):
        record(root, run)


def test_a_courier_that_finds_nothing_new_imports_nothing_and_leaves_what_stayed_from_before(tmp_path: Path):
    spool(a_run(tmp_path), tmp_path)
    code = (
        "import sys; from pathlib import Path; from valr_ops.store.lineage import courier\n"
        "with courier(Path(sys.argv[1])): pass\n"
        "print('mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert len(spooled(tmp_path)) == 1


@pytest.mark.services
def test_a_real_server_that_comes_back_gets_what_was_measured_while_it_was_away(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    run = a_run(tmp_path)
    assert record(tmp_path, run, warn=warnings.append) is None and "is away" in warnings[0]
    server = subprocess.Popen(
        lineage.server_command(tmp_path, port=closed_port),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 90
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{closed_port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        later = replace(run, id="later", output_digest="e" * 32 + ".dir")
        assert record(tmp_path, later, warn=warnings.append) is not None
        assert len(warnings) == 1 and spooled(tmp_path) == []
        assert len(runs(tmp_path, run)) == len(runs(tmp_path, later)) == 1
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
