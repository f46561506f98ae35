"""The lineage of an artifact: every way back and onwards, by version, with what is not known named."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from valr_ops.stages import UnknownStageError
from valr_ops.store import tree
from valr_ops.store.artifacts import ArtifactError, directory_digest
from valr_ops.store.lineage import LineageError, RecordedRun

CODE = "valr_ops/training/loop.py"

ARTIFACTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sources": (
        (),
        {
            "inventory.json": {
                "cogcom": {"format": "cogcom", "generated": True, "files": {"a.tar": {"md5": "a" * 32, "size": 7}}},
                "mine": {"format": "jsonl", "generated": False, "files": {"t.jsonl": {"md5": "b" * 32, "size": 5}}},
            }
        },
    ),
    "cot_corpus": (
        ("sources",),
        {"report.json": {"sources": {"cogcom": {"licenses": {"Apache-2.0": 9}}, "mine": {"licenses": {"MIT": 3}}}}},
    ),
    "base_model": (("cot_corpus",), {}),
    "teacher_features_dinov3": (
        ("cot_corpus",),
        {
            "teacher.json": {
                "name": "dinov3",
                "fingerprint": "f" * 64,
                "recipe": {"model": "vit_large", "hub_id": None, "revision": None, "license": "DINOv3 License"},
            }
        },
    ),
    "stage2_valr_s": (("cot_corpus", "base_model", "teacher_features_dinov3"), {}),
    "scores_valr_s": (("sources", "stage2_valr_s"), {}),
    "ablation_table": (("scores_valr_s",), {}),
}
SUMMARIES: dict[str, dict[str, Any]] = {
    "cot_corpus": {"records": 12},
    "scores_valr_s": {
        "accuracy_blink": 0.5,
        "accuracy_low_blink": 0.25,
        "accuracy_high_blink": 0.75,
        "majority_blink": 0.375,
    },
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded project, small and whole; MLflow knows nothing."""
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True)
    (tmp_path / "params.yaml").write_text("scale: tiny\n")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / CODE).parent.mkdir(parents=True)
    (tmp_path / CODE).write_text("the code\n")
    write_lock(tmp_path, {name: write_artifact(tmp_path, name) for name in ARTIFACTS})
    tracked(monkeypatch)
    return tmp_path


def write_artifact(root: Path, name: str) -> str:
    """Put it where DVC keeps it, in its folder and in the cache; return its digest."""
    folder = root / "artifacts" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in ARTIFACTS[name][1].items():
        (folder / file).write_text(json.dumps(content))
    (folder / "manifest.json").write_text(json.dumps({"stage": name, "summary": SUMMARIES.get(name, {})}))
    listed = [{"md5": keep(root, file.read_bytes()), "relpath": file.name} for file in folder.iterdir()]
    digest = directory_digest(folder)
    keep(root, json.dumps(listed).encode(), digest)
    return digest


def keep(root: Path, content: bytes, digest: str = "") -> str:
    """Put it into DVC's cache; return its digest."""
    md5 = digest or hashlib.md5(content).hexdigest()
    path = root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5


def write_lock(root: Path, digests: Mapping[str, str]) -> None:
    def entry(name: str) -> dict[str, Any]:
        deps = [{"path": f"artifacts/{needed}", "md5": digests[needed]} for needed in ARTIFACTS[name][0]]
        deps.append({"path": CODE, "md5": hashlib.md5(b"the code\n").hexdigest()})
        fields = {"seed": 3, "base": {"path": None, "hub_id": "Qwen/Q", "revision": "d" * 40}}
        outs = [{"path": f"artifacts/{name}", "md5": digests[name]}]
        return {"deps": deps, "params": {"artifacts/recipe/recipe.yaml": fields}, "outs": outs}

    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {name: entry(name) for name in digests}}))


def a_run(stage: str, digest: str, **changes: Any) -> RecordedRun:
    values: dict[str, Any] = {
        "stage": stage,
        "output_digest": digest,
        "input_digests": {},
        "recipe_fingerprint": "0123456789ab",
        "git_commit": "c" * 40,
        "code_digest": "d" * 12,
        "parameters": {},
        "command": "valr materialize +report --set seed=3",
        "person": "alice",
        "dagster_run_id": "",
        "ended": 1_700_000_000.0,
        "url": "http://127.0.0.1:5000/#/experiments/1/runs/r",
    }
    return RecordedRun(**(values | changes))


def tracked(monkeypatch: pytest.MonkeyPatch, *runs: RecordedRun) -> None:
    """MLflow knows these runs."""

    def find(root: Path, tag: str, values: Iterable[str]) -> dict[str, list[RecordedRun]]:
        def is_it(run: RecordedRun, value: str) -> bool:
            if tag == "output.digest":
                return run.output_digest == value
            return run.input_digests.get(tag.removeprefix("input.")) == value

        return {value: [run for run in runs if is_it(run, value)] for value in values}

    monkeypatch.setattr(tree, "find_runs", find)


def printed(lineage: tree.Lineage) -> str:
    console = Console(file=io.StringIO(), width=100)
    tree.show(lineage, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def digest_of(root: Path, name: str) -> str:
    return str(yaml.safe_load((root / "dvc.lock").read_text())["stages"][name]["outs"][0]["md5"])


def test_a_model_leads_back_to_every_source_with_its_licence_and_onwards_to_its_scores(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked(monkeypatch, a_run("stage2_valr_s", digest_of(project, "stage2_valr_s"), dagster_run_id="dagster-7"))
    lineage = tree.trace(project, "stage2_valr_s")
    said = tree.document(lineage)
    assert {row["stage"] for row in said["made_from"]} == {
        "cot_corpus",
        "base_model",
        "teacher_features_dinov3",
        "sources",
    }
    assert [row["stage"] for row in said["made_from_it"]] == ["scores_valr_s", "ablation_table"]
    assert said["digest"] == digest_of(project, "stage2_valr_s")
    assert said["inputs"]["cot_corpus"] == digest_of(project, "cot_corpus")
    assert {name: source["licenses"] for name, source in said["sources"].items()} == {
        "cogcom": {"Apache-2.0": 9},
        "mine": {"MIT": 3},
    }
    assert said["sources"]["mine"]["digest"] != said["sources"]["cogcom"]["digest"]
    assert said["teachers"]["dinov3"]["license"] == "DINOv3 License"
    assert said["recipe"] == {"fingerprint": "0123456789ab", "fields": lineage.version.fields}
    assert (said["git_commit"], said["code_digest"]) == ("c" * 40, "d" * 12)
    assert said["command"] == "valr materialize +report --set seed=3" and said["run"]["person"] == "alice"
    json.dumps(said)

    text = printed(lineage)
    for words in (
        "valr materialize +report --set seed=3  (alice, 2023-11-14 22:13 UTC)",
        "Dagster run dagster-7",
        "Qwen/Q@dddddddddd",
        "vit_large · DINOv3 License · weights ffffffffff",
        "Apache-2.0 · cogcom, drawn, 1 files",
        "MIT · jsonl, given, 1 files",
        "blink 0.500 [0.250, 0.750, majority 0.375]",
        "12 records",
        "see above",
    ):
        assert words in text


def test_a_source_leads_onwards_to_everything_that_was_made_from_it(project: Path) -> None:
    made = tree.document(tree.trace(project, "sources"))["made_from_it"]
    assert {row["stage"] for row in made} == set(ARTIFACTS) - {"sources"}
    assert "no other artifact" in printed(tree.trace(project, "sources"))


def test_what_was_made_from_another_version_does_not_belong_to_this_one(project: Path) -> None:
    digests = {name: digest_of(project, name) for name in ARTIFACTS}
    write_lock(project, digests)
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    lock["stages"]["stage2_valr_s"]["outs"][0]["md5"] = "9" * 32 + ".dir"
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    lineage = tree.trace(project, "stage2_valr_s")
    assert lineage.downstream == () and "nothing yet" in printed(lineage)
    assert any("it is not on this machine; fetch it with: dvc pull stage2_valr_s" in line for line in lineage.missing)


def test_a_version_that_the_lock_has_forgotten_is_followed_through_mlflow(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_corpus, old_source = "1" * 32 + ".dir", "2" * 32 + ".dir"
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    lock["stages"]["stage2_valr_s"]["deps"][0]["md5"] = old_corpus
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    tracked(monkeypatch, a_run("cot_corpus", old_corpus, input_digests={"sources": old_source}))
    lineage = tree.trace(project, "stage2_valr_s")
    versions = {(one.stage, one.digest): one for one in lineage.upstream}
    assert versions["cot_corpus", old_corpus].inputs == {"sources": old_source}
    assert versions["cot_corpus", old_corpus].summary is None, "what lies in the folder is another version"
    assert any(line.startswith("how sources@2222222222 was made") for line in lineage.missing)
    (line,) = (line for line in lineage.missing if line.startswith("what is in cot_corpus@1111111111"))
    assert f"first check out the commit of dvc.lock that brought it (git log --reverse -S{old_corpus}" in line
    assert line.endswith("dvc fetch cot_corpus")


def test_what_is_made_on_request_is_fetched_by_the_name_that_dvc_knows(project: Path) -> None:
    lock = yaml.safe_load((project / "dvc.lock").read_text())
    lock["stages"]["stage2_ablation@a"] = {"outs": [{"path": "x", "md5": "9" * 32 + ".dir"}]}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    missing = tree.trace(project, "stage2_ablation@a").missing
    assert any(line.endswith("dvc pull ablation/dvc.yaml:stage2_ablation@a") for line in missing)


def test_what_lies_in_the_folder_now_changes_nothing(project: Path) -> None:
    for file in (project / "artifacts" / "cot_corpus").iterdir():
        file.write_text("{}")
    lineage = tree.trace(project, "cot_corpus")
    assert lineage.version.summary == {"records": 12} and lineage.sources["mine"].licenses == {"MIT": 3}


def test_changed_code_is_named_and_gives_no_digest_that_it_did_not_have(project: Path) -> None:
    (project / CODE).write_text("other code\n")
    version = tree.trace(project, "stage2_valr_s").version
    assert version.changed_code == (CODE,) and version.code_digest == ""
    assert f"changed since: {CODE}" in printed(tree.trace(project, "stage2_valr_s"))


def test_an_mlflow_that_is_away_is_named_once_and_the_rest_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise LineageError("MLflow at https://mlflow.example.com can't be asked (ConnectionError)")

    monkeypatch.setattr(tree, "find_runs", away)
    lineage = tree.trace(project, "stage2_valr_s")
    assert len(lineage.upstream) == 4
    assert [line for line in lineage.missing if "MLflow" in line] == [
        "who made all this, when and by which command: MLflow at https://mlflow.example.com can't be asked "
        "(ConnectionError)"
    ]


def test_the_commit_comes_from_the_history_of_the_lock_where_no_run_names_it(project: Path) -> None:
    for words in (
        ["init", "-q"],
        ["add", "dvc.lock"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *words], cwd=project, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True)
    assert tree.trace(project, "stage2_valr_s").git_commit == head.stdout.strip()


def test_a_stage_that_was_never_made_or_does_not_exist_is_said_with_the_way_on(project: Path) -> None:
    with pytest.raises(ArtifactError, match=r"make it with: valr materialize \+report"):
        tree.trace(project, "report")
    with pytest.raises(UnknownStageError, match="did you mean 'stage2_valr_s'"):
        tree.trace(project, "stage2_valr_z")


def test_the_verb_prints_the_tree_and_ends_with_one_line_of_json(project: Path) -> None:
    words = [sys.executable, "-m", "valr_ops", "report", "--lineage", "cot_corpus"]
    environment = {"MLFLOW_TRACKING_URI": "", "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("cot_corpus  "), done.stderr
    assert json.loads(lines[-1])["sources"]["mine"]["licenses"] == {"MIT": 3}
    assert not (project / ".valr" / "mlflow.db").exists(), "looking makes no database"
    wrong = subprocess.run(words[:-2], cwd=project, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and "--lineage STAGE" in wrong.stderr
