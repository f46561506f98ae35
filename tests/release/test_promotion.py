"""`valr release promote`, `rollback` and `show`, and the asset `promotion`, on a registry of their own.

The project has scores of five models on sixty questions: one without latents (half right), two equal ones (four fifths
right), a better one (all right), and the better one's twin.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dvc.repo import Repo

from assets.promotion import promotion
from tests.evaluation import scenes
from tests.project import CHECKOUT
from valr_ops.__main__ import main
from valr_ops.exits import EXIT_CONFIGURATION, EXIT_INTERRUPTED, EXIT_REFUSED
from valr_ops.store import lineage
from valr_ops.store.artifacts import Ledger, directory_digest

BETTER, TWIN, EQUAL = "scores_better", "scores_twin", "scores_equal"
RIGHT = {
    "scores_sft": lambda number: number % 2 == 0,
    "scores_valr_m": lambda number: number % 10 not in (1, 3),
    EQUAL: lambda number: number % 10 not in (1, 3),
    BETTER: lambda number: True,
    TWIN: lambda number: True,
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with scores in DVC's cache and an empty registry."""
    root = tmp_path_factory.mktemp("template")
    (root / "params.yaml").write_text("scale: tiny\nrelease.target: mine\n")
    (root / "dvc.yaml").write_text("stages: {}\n")
    Repo.init(str(root), no_scm=True).close()
    for name, right in RIGHT.items():
        folder, _ = scenes.scored(root / "artifacts", name, right, slots=0 if name == "scores_sft" else 4)
        scores = json.loads((folder / "scores.json").read_text())
        scores["model"] = {"artifact": name.replace("scores", "model"), "digest": f"weights-of-{name}"}
        (folder / "scores.json").write_text(json.dumps(scores))
    shutil.rmtree(root / "artifacts" / "work")
    with Repo(str(root)) as repo:
        repo.add([str(root / "artifacts" / name) for name in RIGHT])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        lineage.registered(root)
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for one test, which is where the test stands."""
    root = tmp_path / "project"
    shutil.copytree(template, root)
    for name in ("MLFLOW_TRACKING_URI", "VALR_SET", "VALR_DAGSTER_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


def release(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, last line of standard output, and all that was printed, of ``valr release WORDS``."""
    capsys.readouterr()
    status = main(["release", *words])
    printed = capsys.readouterr()
    lines = printed.out.strip().splitlines()
    return status, json.loads(lines[-1]) if lines else {}, printed.out + printed.err


def champion(root: Path) -> str | None:
    return lineage.registered(root).champion_digest


def test_the_first_challenger_meets_the_baseline_and_the_next_one_the_champion_found_by_its_digest(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, page = release(capsys, "promote")
    assert (status, said["moved"], said["version"]) == (0, True, "1")
    assert "There is no champion to compare with; the baseline model_sft takes its place." in page
    # Only the cache knows the champion's scores from here on.
    shutil.rmtree(project / "artifacts" / "scores_valr_m")
    status, said, page = release(capsys, "promote", BETTER)
    assert (status, said["moved"], said["version"]) == (0, True, "2")
    assert "model_better against model_valr_m" in page
    assert champion(project) == f"weights-of-{BETTER}"
    kept = Path(said["decision"])
    assert kept.parent == project / ".valr" / "decisions" and kept.name == f"2-{directory_digest(kept)[:12]}"

    run = lineage.find_runs(project, "output.digest", [directory_digest(kept)])[directory_digest(kept)]
    assert [one.url for one in run] == [said["url"]]
    with lineage._asking(project) as (client, _):
        run_id = said["url"].partition("/runs/")[2].partition("?")[0]
        assert {file.path for file in client.list_artifacts(run_id)} >= {"decision.json", "decision.md"}
        tags = client.get_run(run_id).data.tags
        assert tags["release.version"] == "2" and tags["release.champion"] == "weights-of-scores_valr_m"
        assert "The gate lets the challenger through" in str(client.get_model_version(lineage.MODEL, "2").description)


def test_a_refusal_leaves_a_challenger_and_the_same_again_is_the_same_version_folder_and_run(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release(capsys, "promote")
    first, again = release(capsys, "promote", EQUAL), release(capsys, "promote", EQUAL)
    assert first[0] == again[0] == EXIT_REFUSED
    assert first[1] == again[1]
    assert "mine has to rise, but zero is not excluded" in first[1]["reasons"][0]
    known = lineage.registered(project)
    assert (known.aliases, len(known.digests), len(known.history)) == ({"champion": "1", "challenger": "2"}, 2, 1)
    # The champion itself is no challenger.
    status, said, printed = release(capsys, "promote")
    assert (status, said["version"], said["moved"]) == (0, "1", False) and "champion already" in printed


def test_a_person_overrules_and_the_reason_is_shown(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release(capsys, "promote")
    status, said, _ = release(capsys, "promote", EQUAL, "--overrule", "the licence of the other one ended")
    assert (status, said["moved"]) == (0, True)
    status, shown, printed = release(capsys, "show")
    assert status == 0 and shown["aliases"] == {"champion": "2"}
    assert "overruled, by" in printed and "the licence of the other one ended" in printed
    assert shown["history"][-1]["evidence"] == directory_digest(Path(said["decision"]))


def test_proposing_decides_and_moves_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = release(capsys, "promote", "--propose")
    assert (status, said["promotes"], said["moved"]) == (0, True, False)
    assert lineage.registered(project).aliases == {"challenger": "1"}
    assert release(capsys, "promote")[1]["moved"]
    assert lineage.registered(project).aliases == {"champion": "1"}


def test_without_a_baseline_the_first_champion_is_a_persons_choice(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = ("--set", "release.baseline=null")
    status, said, _ = release(capsys, "promote", *nothing)
    assert status == EXIT_REFUSED and "no champion to compare with" in said["reasons"][0]
    assert champion(project) is None
    status, said, page = release(capsys, "promote", *nothing, "--overrule", "someone has to be the first")
    assert (status, said["moved"]) == (0, True) and "no champion to compare with" in page
    assert lineage.registered(project).history[0].how == "overruled"


def test_scores_of_someone_else_are_no_champions(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release(capsys, "promote")
    status, _, printed = release(capsys, "promote", BETTER, "--champion", "scores_sft")
    assert status == EXIT_CONFIGURATION
    assert "weights-of-scores_sft" in printed and "the champion is weights-of-scores_valr_m" in printed
    assert lineage.registered(project).aliases == {"champion": "1"}


def test_scores_that_were_made_elsewhere_are_known_from_then_on(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release(capsys, "promote")
    again = tmp_path / "asked_again"
    (project / "artifacts" / "scores_valr_m").rename(again)
    (again / "notes.txt").write_text("on new questions")
    shutil.rmtree(project / ".dvc" / "cache")
    assert release(capsys, "promote", EQUAL)[0] == EXIT_CONFIGURATION
    assert release(capsys, "promote", EQUAL, "--champion", str(again), "--out", "here")[0] == EXIT_REFUSED
    assert (project / "here" / "decision.md").is_file()
    known = lineage.registered(project)
    assert known.scores["1"] == {"asked_again": directory_digest(again)} and known.champion == "1"
    shutil.rmtree(again)
    assert release(capsys, "promote", BETTER)[1]["moved"]


def test_going_back_moves_the_alias_only_and_what_was_taken_back_needs_a_person_to_return(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert release(capsys, "rollback")[0] == EXIT_CONFIGURATION
    release(capsys, "promote")
    release(capsys, "promote", BETTER)
    release(capsys, "promote", TWIN, "--overrule", "try it")
    before = lineage.registered(project)
    assert [release(capsys, "rollback", "--reason", "too slow")[1]["version"] for _ in range(2)] == ["2", "1"]
    after = lineage.registered(project)
    assert (after.digests, after.scores, after.aliases) == (before.digests, before.scores, {"champion": "1"})
    status, _, printed = release(capsys, "rollback")
    assert status == EXIT_CONFIGURATION and "no version was champion before the present one" in printed
    # What people took back does not come back by itself.
    status, said, _ = release(capsys, "promote", BETTER)
    assert (status, said["moved"]) == (EXIT_REFUSED, False)
    assert said["reasons"] == ["This model was champion and was rolled back (too slow); only a person brings it back."]
    assert release(capsys, "promote", BETTER, "--overrule", "it is faster now")[1]["moved"]
    assert set(lineage.registered(project).withdrawn) == {"3"}


def test_a_registry_that_is_away_is_one_sentence_and_worth_another_try(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for words in (("promote",), ("rollback",), ("show",)):
        status, _, printed = release(capsys, *words)
        assert status == 1 and printed.startswith("valr: the registry at http://127.0.0.1:9 can't be asked")
        assert len(printed.strip().splitlines()) == 1


def test_one_that_was_interrupted_between_registering_and_promoting_is_given_again(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lineage, "promote", cut)
        assert release(capsys, "promote")[0] == EXIT_INTERRUPTED
    assert lineage.registered(project).aliases == {"challenger": "1"}
    status, said, _ = release(capsys, "promote")
    assert (status, said["version"], said["moved"]) == (0, "1", True)


def test_scores_that_left_the_cache_come_from_dvcs_remote_or_are_asked_for(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Repo(str(project)) as repo, repo.config.edit() as config:
        config["remote"]["store"] = {"url": str(tmp_path / "remote")}
        config["core"]["remote"] = "store"
    with Repo(str(project)) as repo:
        repo.push()
    release(capsys, "promote")
    shutil.rmtree(project / ".dvc" / "cache")
    status, _, page = release(capsys, "promote", BETTER)
    assert status == 0 and "against model_valr_m" in page, page
    shutil.rmtree(project / ".dvc" / "cache")
    shutil.rmtree(tmp_path / "remote")
    status, _, printed = release(capsys, "promote", TWIN)
    assert status == EXIT_CONFIGURATION and "--champion" in printed
    assert Ledger(project).has_remote() and champion(project) == f"weights-of-{BETTER}"


def test_a_champion_of_another_machine_is_seen_before_the_alias_moves_or_named_after_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow has no compare-and-set: what can be had is that nobody is overwritten unnoticed."""
    versions = [lineage.register(project, "model", digest, {}) for digest in ("a", "b", "c")]
    seen = lineage.registered(project)
    lineage.promote(project, versions[0], "gate", seen=seen)
    with pytest.raises(lineage.ChampionChangedError, match="the champion was nobody, and now it is version 1") as told:
        lineage.promote(project, versions[1], "gate", seen=seen)
    assert told.value.exit_status == 1 and champion(project) == "a"

    from mlflow import MlflowClient

    move = MlflowClient.set_registered_model_alias

    def both(self: MlflowClient, *words: str) -> None:
        monkeypatch.undo()
        lineage.promote(project, versions[2], "gate")
        move(self, *words)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", both)
    with pytest.raises(lineage.LineageError, match=r"version 2 was made .* version 3 by .* is now version 2\."):
        lineage.promote(project, versions[1], "gate", seen=lineage.registered(project))
    after = lineage.registered(project)
    assert [one.version for one in after.history] == ["1", "3", "2"] and after.before == "3"


@pytest.mark.slow
def test_of_two_promotions_at_once_the_second_meets_the_champion_that_the_first_made(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release(capsys, "promote")
    words = [sys.executable, "-m", "valr_ops", "release", "promote"]
    how: dict[str, Any] = {"cwd": project, "env": {**os.environ, "PYTHONPATH": str(CHECKOUT)}, "text": True}
    started = [subprocess.Popen([*words, name], stdout=subprocess.PIPE, **how) for name in (BETTER, TWIN)]
    printed = [process.communicate()[0] for process in started]
    # The two models are equally good: whoever comes second is measured against the other and refused.
    assert sorted(process.returncode for process in started) == [0, EXIT_REFUSED]
    known = lineage.registered(project)
    assert [move.version for move in known.history] == ["1", known.champion]
    (late,) = [page for page, process in zip(printed, started, strict=True) if process.returncode]
    assert "model_better" in late and "model_twin" in late and "valr_m" not in late


@pytest.mark.slow
def test_the_asset_proposes_and_promotes_only_where_the_recipe_lets_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))

    def shown() -> dict[str, Any]:
        (event,) = dg.materialize([promotion]).asset_materializations_for_node("promotion")
        return {name: value.value for name, value in event.metadata.items()}

    first = shown()
    assert (first["version"], first["promotes"], first["moved"]) == ("1", True, False)
    assert first["decision"].startswith("# model_valr_m against model_sft") and first["MLflow"].startswith("http")
    (project / "params.yaml").write_text("scale: tiny\nrelease: {target: mine, automatic: true}\n")
    assert shown()["moved"] and champion(project) == "weights-of-scores_valr_m"


def test_the_job_that_makes_everything_ends_at_the_gate() -> None:
    from pipelines.definitions import defs

    made = {key.to_user_string() for key in defs.resolve_job_def("everything").asset_layer.executable_asset_keys}
    assert {"scores_valr_m", "report", "promotion"} <= made


def test_an_asset_that_can_not_decide_fails_with_the_verbs_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, EXIT_CONFIGURATION, "", "a warning\nvalr: target=blink, but\nmore\n"
        )

    monkeypatch.setattr(subprocess, "run", refused)
    done = dg.materialize([promotion], raise_on_error=False)
    (event,) = [event for event in done.all_node_events if event.is_step_failure]
    said = event.step_failure_data.user_failure_data
    assert said and said.description == "target=blink, but\nmore"
    assert said.metadata["exit_status"].value == EXIT_CONFIGURATION
