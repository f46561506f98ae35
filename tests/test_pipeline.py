"""Every stage by all three ways, at the smallest scale: the same work, the same digest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.project import command, copy_project, digests, environment, last_line, valr, valr_here
from valr_ops.stages import upstream
from valr_ops.store import lineage
from valr_ops.workspace import environment as activated

ENDS = ("report", "teacher_features_qwen")
MADE = ["recipe", *(row.name for row in upstream(ENDS))]
"""All but the features of three encoders that no model here is aligned to; another of their kind is made."""
BY_OTHERS = ["recipe", *(row.name for row in upstream(["scores_valr_s"]))]
"""One of each kind that leaves the same bytes: DVC and Dagster start a process a stage."""

ALL_IN_ONE_PROCESS = f"from valr_ops import runner\nfor name in {MADE}: runner.run(name)"


@pytest.fixture(scope="session")
def by_verb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose artifacts were all made by ``runner.run``, the function behind ``valr run``."""
    root = copy_project(tmp_path_factory.mktemp("verb") / "project")
    command(root, sys.executable, "-c", ALL_IN_ONE_PROCESS, timeout=590)
    return root


@pytest.fixture(scope="session")
def by_dvc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, made by ``dvc repro``, which starts a process a stage."""
    root = copy_project(tmp_path_factory.mktemp("dvc") / "project")
    _made_by(root, environment(root), "dvc", "repro", "-q", "recipe", "scores_valr_s")
    return root


@pytest.fixture(scope="session")
def by_dagster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, made by ``dagster asset materialize``, which starts a process a stage as well."""
    root = copy_project(tmp_path_factory.mktemp("dagster") / "project")
    valr_here(root, "env")
    words = ("dagster", "asset", "materialize", "--select", ",".join(BY_OTHERS))
    _made_by(root, environment(root) | activated(root), *words)
    return root


def _made_by(root: Path, shell: dict[str, str], *words: str) -> None:
    # As in `valr materialize`: one process imports mlflow, and no stage does.
    with patch.dict(os.environ, shell, clear=True), lineage.courier(root):
        done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_our_digest_of_a_folder_is_dvcs(by_verb: Path):
    from valr_ops.store.artifacts import directory_digest, folder

    assert {name: directory_digest(folder(by_verb, name)) for name in MADE} == digests(by_verb)


@pytest.mark.parametrize("way", ["by_dvc", "by_dagster"])
def test_verb_dvc_and_dagster_leave_the_same_digests(by_verb: Path, request: pytest.FixtureRequest, way: str) -> None:
    expected = digests(by_verb)
    assert set(expected) == set(MADE)
    assert digests(request.getfixturevalue(way)) == {name: expected[name] for name in BY_OTHERS}


def test_nothing_is_made_twice(by_verb: Path):
    before = (by_verb / "dvc.lock").read_bytes()
    assert last_line(valr_here(by_verb, "run", "stage2_valr_m"))["how"] == "hit"
    assert last_line(valr_here(by_verb, "materialize", "+report"))["made"] == []
    assert (by_verb / "dvc.lock").read_bytes() == before


def test_a_materialization_carries_version_counts_plots_and_checks(by_dagster: Path):
    import dagster as dg

    with dg.DagsterInstance.from_config(str(by_dagster / ".valr" / "dagster")) as instance:
        for stage, digest in digests(by_dagster).items():
            event = instance.get_latest_materialization_event(dg.AssetKey(stage))
            assert event is not None and event.asset_materialization is not None, stage
            assert event.asset_materialization.tags["dagster/data_version"] == digest
        trained = instance.get_latest_materialization_event(dg.AssetKey("stage2_valr_s")).asset_materialization.metadata
    assert "data:image/png;base64," in "".join(str(value.value) for value in trained.values())
    assert any("mlflow" in name.lower() for name in trained)


def test_a_miss_says_what_changed_and_a_reverted_value_is_brought_back(by_verb: Path):
    before = digests(by_verb)["teacher_features_pi3"]
    manifest = (by_verb / "artifacts" / "teacher_features_pi3" / "manifest.json").read_bytes()
    changed = ["run", "teacher_features_pi3", "--set", "teachers.pi3.pretraining_steps=3"]
    made = last_line(valr_here(by_verb, *changed))
    assert made["how"] == "made" and made["digest"] != before
    assert made["reasons"] == ["recipe field teachers.pi3.pretraining_steps: 2 -> 3"]
    # As a kill leaves it that comes when DVC remembers the run, and has not recorded it.
    left = [by_verb / ".valr" / state / "teacher_features_pi3" for state in ("work", "trash")]
    for folder in left:
        folder.mkdir(parents=True, exist_ok=True)
    (by_verb / ".valr" / "work" / "teacher_features_pi3.made").write_bytes(manifest)
    reverted = last_line(valr_here(by_verb, "run", "teacher_features_pi3"))
    assert (reverted["how"], reverted["digest"]) == ("restored", before)
    assert not any(folder.exists() for folder in left)


def test_an_input_that_is_out_of_date_is_refused(by_verb: Path):
    done = valr_here(by_verb, "run", "stage2_valr_s", "--set", "teachers.dinov3.pretraining_steps=3", check=False)
    assert done.returncode == 42
    assert "teacher_features_dinov3, which is out of date" in done.stderr
    assert "valr materialize +stage2_valr_s" in done.stderr
    assert last_line(valr_here(by_verb, "run", "stage2_valr_s"))["how"] == "hit"


def test_a_missing_input_stops_at_once_and_names_the_command(tmp_path: Path):
    root = copy_project(tmp_path / "project")
    for way, words in ((valr, ["run", "stage2_valr_m"]), (valr_here, ["materialize", "stage2_valr_m"])):
        done = way(root, *words, check=False)
        assert done.returncode == 42 and "valr materialize +stage2_valr_m" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (root / "artifacts" / "sources").exists()


def test_an_edited_artifact_is_refused_with_the_way_back(by_verb: Path):
    corpus = by_verb / "artifacts" / "cot_corpus" / "report.json"
    whole = corpus.read_bytes()
    corpus.chmod(0o644)
    corpus.write_bytes(whole + b" ")
    done = valr_here(by_verb, "run", "latent_corpus", check=False)
    assert done.returncode == 42 and "dvc checkout cot_corpus" in done.stderr
    command(by_verb, "dvc", "checkout", "-q", "-f", "cot_corpus")
    assert corpus.read_bytes() == whole
    assert last_line(valr_here(by_verb, "run", "latent_corpus"))["how"] == "hit"


def test_a_killed_stage_leaves_the_old_artifact_and_the_next_run_goes_on(by_verb: Path):
    before = digests(by_verb)["latent_corpus"]
    words = [sys.executable, "-m", "valr_ops", "run", "latent_corpus", "--force"]
    running = subprocess.Popen(words, cwd=by_verb, env=environment(by_verb), stdout=subprocess.PIPE)
    staging = by_verb / ".valr" / "staging" / "latent_corpus"
    while not staging.exists() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert last_line(valr_here(by_verb, "run", "latent_corpus"))["digest"] == before
    assert last_line(valr_here(by_verb, "run", "latent_corpus", "--force"))["digest"] == before
