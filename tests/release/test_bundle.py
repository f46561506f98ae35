"""A release: what a stranger gets, that it is whole, and that it answers as its scores say."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml

from tests import tiny
from valr_ops.__main__ import main
from valr_ops.evaluation.asking import Asked, ask_run, score_run
from valr_ops.evaluation.drawn import Drawing, write_benchmark
from valr_ops.evaluation.models import open_answerer
from valr_ops.evaluation.run import build_scores
from valr_ops.model.qwen import save_model
from valr_ops.recipe.recipe import Recipe
from valr_ops.release import bundle, verifying
from valr_ops.release.bundle import BundleError, build, choose
from valr_ops.release.verifying import verify
from valr_ops.store.artifacts import StageContext, directory_digest
from valr_ops.store.progress import Progress

TEACHER = {"model": "vit_small_patch16_dinov3", "license": "DINOv3", "fingerprint": "f" * 64}
SETTINGS = {"slots": 4, "control_tokens": "outside", "block": 1, "stage": 2, "teachers": {"dinov3": TEACHER}}
INPUTS = {
    "sources": (),
    "cot_corpus": ("sources",),
    "base_model": ("cot_corpus",),
    "latent_corpus": ("cot_corpus", "base_model"),
    "stage2_valr_s": ("cot_corpus", "base_model", "latent_corpus"),
    "scores_valr_s": ("sources", "benchmarks", "stage2_valr_s"),
    "benchmarks": (),
}
JSON_FILES = {
    "sources": {
        "inventory.json": {
            "cogcom": {"format": "cogcom", "generated": True, "files": {"a.tar": {"md5": "a" * 32, "size": 7}}},
            "mine": {"format": "monet", "generated": False, "files": {"t.json": {"md5": "b" * 32, "size": 5}}},
        }
    },
    "cot_corpus": {
        "report.json": {"sources": {"cogcom": {"licenses": {"Apache-2.0": 9}}, "mine": {"licenses": {"unknown": 3}}}}
    },
}


def recipe() -> Recipe:
    return tiny.recipe(
        **{
            "data.sources": {"mine": {"format": "monet", "path": "/home/somebody/mine"}},
            "evaluation.benchmarks": {"blink": {"drawn": 6}, "vsi_bench": {"drawn": 4}},
            "evaluation.batch_size": 4,
            "evaluation.frames": 2,
            "evaluation.max_new_tokens": 6,
            "latents.slots": 4,
        }
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a tiny model that nobody trained, its real scores, and the lineage of a trained one."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("project")
    Repo.init(str(root), no_scm=True)
    values = recipe().model_dump(mode="json")
    artifacts = root / "artifacts"
    for name in (*INPUTS, "recipe"):
        (artifacts / name).mkdir(parents=True)
        told = JSON_FILES.get(name, {}) | {"manifest.json": {"stage": name, "summary": {"records": 12}}}
        for file, content in told.items():
            (artifacts / name / file).write_text(json.dumps(content))
    (artifacts / "recipe" / "recipe.yaml").write_text(yaml.safe_dump(values))
    (root / "params.yaml").write_text("scale: tiny\n")
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "constraints.txt").write_text(f"# a lock\nnumpy==0.1\npillow=={importlib.metadata.version('pillow')}\n")
    for name in ("blink", "vsi_bench"):
        drawn = recipe().evaluation.benchmarks[name].drawn
        write_benchmark(artifacts / "benchmarks" / name, Drawing(name, 0, drawn, recipe().data.synthetic))
    save_model(tiny.model(), tiny.processor(), artifacts / "stage2_valr_s", SETTINGS)
    inputs = {name: artifacts / name for name in INPUTS["scores_valr_s"]}
    work = root / ".valr" / "work" / "scores_valr_s"
    work.mkdir(parents=True)
    build_scores(StageContext("scores_valr_s", recipe(), inputs, artifacts / "scores_valr_s", work, Progress()))
    record(root, values)
    return root


def record(root: Path, values: Mapping[str, Any]) -> None:
    """dvc.lock, and the files that a lineage reads, in DVC's cache."""

    def keep(content: bytes, digest: str) -> None:
        path = root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    entries, digests = {}, {}
    for name, needed in sorted(INPUTS.items(), key=lambda one: len(one[1])):
        folder = root / "artifacts" / name
        digests[name] = directory_digest(folder)
        listed = [
            {"md5": hashlib.md5((folder / file).read_bytes()).hexdigest(), "relpath": file}
            for file in ("manifest.json", *JSON_FILES.get(name, ()))
        ]
        for one in listed:
            keep((folder / one["relpath"]).read_bytes(), one["md5"])
        keep(json.dumps(listed).encode(), digests[name])
        entries[name] = needed
    lock = {
        name: {
            "deps": [{"path": f"artifacts/{one}", "md5": digests[one]} for one in needed]
            + [{"path": "valr_ops/training/loop.py", "md5": "0" * 32}],
            "params": {"artifacts/recipe/recipe.yaml": {"latents": values["latents"], "seed": values["seed"]}},
            "outs": [{"path": f"artifacts/{name}", "md5": digests[name]}],
        }
        for name, needed in entries.items()
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}))


@pytest.fixture(scope="module")
def released(project: Path) -> Path:
    return build(project, project / "artifacts" / "scores_valr_s").folder


@pytest.fixture
def copied(released: Path, tmp_path: Path) -> Path:
    """A bundle to break."""
    return Path(shutil.copytree(released, tmp_path / "bundle"))


def remade(folder: Path) -> None:
    """The manifest of whoever changed a file and covers it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file() and path != folder / "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_stranger_without_the_project_finds_it_whole_and_answering_as_scored(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(released, "here")
    assert main(["release", "verify", "here"]) == 0
    shown = capsys.readouterr().out
    told = json.loads(shown.splitlines()[-1])
    assert (told["asked"], told["agreed"], told["problems"], told["passes"]) == (10, 10, [], True)
    assert "10 of 10 questions" in shown and "not promised" in shown
    assert {path.name for path in released.iterdir()} == {
        *("README.md", "assumptions.json", "constraints.txt", "cost.json", "data.json", "manifest.json"),
        *("model", "questions", "recipe.yaml", "scores", "teachers.json"),
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "here"], "nothing is left behind"


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda at: flip(at / "model" / "model.safetensors"), "model/model.safetensors was altered"),
        (lambda at: (at / "recipe.yaml").unlink(), "recipe.yaml is missing"),
        (lambda at: (at / "model" / "more.json").write_text("{}"), "model/more.json does not belong"),
        (
            lambda at: PIL.Image.new("RGB", (24, 24)).save(at / "questions" / "00-000.png"),
            "questions/00-000.png has",
        ),
        (lambda at: listed(at, "../outside.json"), "'../outside.json' leads out of the bundle"),
        (lambda at: linked(at / "questions"), "questions is a link"),
        (
            lambda at: pickled(at / "model" / "pytorch_model.bin"),
            "pytorch_model.bin is of a kind that a bundle may not",
        ),
    ],
)
def test_a_file_that_is_not_what_it_was_is_named_and_nothing_is_opened(
    harm: Any, complaint: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "open_answerer", None)
    harm(copied)
    verdict = verify(copied)
    assert not verdict.passes and verdict.asked == 0
    assert any(complaint in one for one in verdict.problems), verdict.problems


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def listed(at: Path, name: str) -> None:
    (at.parent / "outside.json").write_text("{}")
    manifest = json.loads((at / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (at / "manifest.json").write_text(json.dumps(manifest))


def linked(path: Path) -> None:
    elsewhere = path.parent.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def pickled(path: Path) -> None:
    path.write_bytes(b"\x80\x04.")
    remade(path.parent.parent)


def test_another_model_behind_remade_digests_is_found_by_its_answers(copied: Path) -> None:
    save_model(tiny.model(seed=1), tiny.processor(), copied / "model", SETTINGS)
    remade(copied)
    assert "but model is" in verify(copied).problems[0], "scores name the digest of their model"
    scores = json.loads((copied / "scores" / "scores.json").read_text())
    scores["model"]["digest"] = directory_digest(copied / "model")
    (copied / "scores" / "scores.json").write_text(json.dumps(scores))
    remade(copied)
    verdict = verify(copied)
    assert not verdict.passes and not verdict.problems
    assert len(verdict.differing) > 5
    told = list(verifying.lines(verdict))
    assert told[-1].startswith("VaLR-S fails") and any(verdict.differing[0].id in line for line in told)


def test_one_answer_in_twenty_five_may_be_another_one() -> None:
    def found(asked: int, differing: int) -> bool:
        others = tuple(verifying.Difference("b", str(number), "a", "b") for number in range(differing))
        return verifying.Verdict("m", 1, (), asked=asked, differing=others).passes

    assert [found(50, n) for n in (0, 2, 3)] == [True, True, False]
    assert [found(24, n) for n in (0, 1)] == [True, False]
    assert not found(0, 0)


def test_scores_that_are_not_the_mean_of_their_answers_are_named(copied: Path) -> None:
    scores = json.loads((copied / "scores" / "scores.json").read_text())
    scores["benchmarks"]["blink"]["accuracy"] = 0.9
    (copied / "scores" / "scores.json").write_text(json.dumps(scores))
    remade(copied)
    assert "gives 0.9 for blink" in verify(copied).problems[0]


@pytest.mark.parametrize(
    ("pictures", "complaint"),
    [(["../scores/examples/00-0.png"], "is no file beside it"), (["none.png"], "No such file")],
)
def test_a_question_shows_only_what_lies_beside_it(pictures: list[str], complaint: str, copied: Path) -> None:
    first, *others = (copied / "questions" / "questions.jsonl").read_text().splitlines()
    changed = json.dumps(json.loads(first) | {"pictures": pictures})
    (copied / "questions" / "questions.jsonl").write_text("\n".join([changed, *others]) + "\n")
    remade(copied)
    with pytest.raises(BundleError, match=complaint):
        verify(copied)


def test_questions_are_those_that_were_scored(copied: Path) -> None:
    first, *others = (copied / "questions" / "questions.jsonl").read_text().splitlines()
    for change, complaint in (({"gold": "(Z)"}, "scored with other words"), ({"id": "new"}, "is no question")):
        changed = json.dumps(json.loads(first) | change)
        (copied / "questions" / "questions.jsonl").write_text("\n".join([changed, *others]) + "\n")
        remade(copied)
        with pytest.raises(BundleError, match=complaint):
            verify(copied)


def test_a_recipe_that_grows_when_it_is_read_is_not_read(copied: Path) -> None:
    (copied / "recipe.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    remade(copied)
    with pytest.raises(BundleError, match="has aliases"):
        verify(copied)


def test_what_is_no_bundle_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is no release bundle: its manifest\.json can't be read"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="is no release bundle"):
        verify(tmp_path)


def test_the_same_inputs_give_the_same_bytes_and_the_same_bundle_is_made_once(
    project: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert main(["release", "build", "scores_valr_s", "--out", str(tmp_path / "again")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] is True

    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert content(tmp_path / "again") == content(released)
    assert main(["release", "build", "scores_valr_s"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["made"] is False
    flip(tmp_path / "again" / "README.md")
    assert main(["release", "build", "scores_valr_s", "--out", str(tmp_path / "again")]) == 42
    assert "README.md was altered" in capsys.readouterr().err


def test_something_else_in_its_place_is_left_alone(project: Path, copied: Path, tmp_path: Path) -> None:
    scores = project / "artifacts" / "scores_valr_s"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(BundleError, match="is no release bundle"):
        build(project, scores, tmp_path / "notes")
    for changed, complaint in (("digest", "another model"), ("stage", "another model")):
        manifest = json.loads((copied / "manifest.json").read_text())
        manifest["model"][changed] = "other"
        (copied / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match=complaint):
            build(project, scores, copied)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_a_build_that_is_killed_leaves_no_bundle_and_the_next_one_is_whole(project: Path, tmp_path: Path) -> None:
    scores, out = project / "artifacts" / "scores_valr_s", tmp_path / "release"
    child = os.fork()
    if child == 0:
        try:
            bundle.write_card = lambda *_: os._exit(9)  # type: ignore[assignment]
            build(project, scores, out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.name for path in tmp_path.iterdir()] == [".release.partial"]
    assert build(project, scores, out).made
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_scores_of_another_model_than_the_one_that_is_there_are_refused(project: Path, tmp_path: Path) -> None:
    scores = Path(shutil.copytree(project / "artifacts" / "scores_valr_s", tmp_path / "scores_valr_s"))
    told = json.loads((scores / "scores.json").read_text())
    for change, complaint in (
        ({"model": told["model"] | {"digest": "other"}}, r"scores of stage2_valr_s other, but dvc\.lock records"),
        ({"model": {"artifact": "theirs", "digest": "other"}}, "no stage of this project makes"),
        ({"budget": told["budget"] | {"engine": "endpoint"}}, "behind an endpoint"),
    ):
        (scores / "scores.json").write_text(json.dumps(told | change))
        with pytest.raises(BundleError, match=complaint):
            build(project, scores, tmp_path / "release")
    extra = project / "artifacts" / "stage2_valr_s" / "extra.json"
    extra.write_text("{}")
    try:
        with pytest.raises(BundleError, match="it was edited, or made again"):
            build(project, project / "artifacts" / "scores_valr_s", tmp_path / "release")
    finally:
        extra.unlink()
    assert not (tmp_path / "release").exists() and not (tmp_path / ".release.partial").exists()


def test_a_recipe_that_the_model_was_not_made_with_is_refused(project: Path, tmp_path: Path) -> None:
    path = project / "artifacts" / "recipe" / "recipe.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"seed": 7}))
    try:
        with pytest.raises(
            BundleError, match=r"another recipe than artifacts/recipe/recipe.yaml has now \(seed differs"
        ):
            build(project, project / "artifacts" / "scores_valr_s", tmp_path / "release")
    finally:
        path.write_text(before)


def test_scores_of_a_run_folder_are_released_without_what_is_the_machines_own(project: Path, tmp_path: Path) -> None:
    model = open_answerer("stage2_valr_s", project / "artifacts" / "stage2_valr_s", recipe())
    asked = [Asked("mine", "blink", str(project / "artifacts" / "benchmarks" / "blink"), whole=False, limit=2)]
    ask_run(model, asked, tmp_path / "run", recipe(), tmp_path / "frames", Progress())
    score_run(tmp_path / "run", recipe(), tmp_path / "frames")
    made = build(project, tmp_path / "run", tmp_path / "release").folder
    assert {path.name for path in (made / "scores").iterdir()} == {
        *("scores.json", "predictions.jsonl", "examples.json", "examples")
    }
    assert verify(made).passes


def test_a_decision_about_this_model_goes_with_it_and_another_one_does_not(project: Path, tmp_path: Path) -> None:
    scores = project / "artifacts" / "scores_valr_s"
    digest = directory_digest(project / "artifacts" / "stage2_valr_s")
    told = {"challenger": {"digest": digest}, "promotes": True, "passes": False, "overruled": "it has to be shown"}
    (tmp_path / "decision.json").write_text(json.dumps(told))
    (tmp_path / "decision.md").write_text("# why\n")
    made = build(project, scores, tmp_path / "release", tmp_path).folder
    assert (made / "decision" / "decision.md").read_text() == "# why\n"
    assert (
        "The promotion gate refused it. A person overruled that: it has to be shown."
        in (made / "README.md").read_text()
    )
    (tmp_path / "decision.json").write_text(json.dumps(told | {"challenger": {"digest": "other"}}))
    with pytest.raises(BundleError, match="is about the model other"):
        build(project, scores, tmp_path / "other", tmp_path)


def test_the_card_says_what_is_unknown_and_names_no_place_of_this_machine(project: Path, released: Path) -> None:
    card = (released / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    told = yaml.safe_load(front)
    assert (told["license"], told["pipeline_tag"]) == ("other", "image-text-to-text")
    (result,) = told["model-index"]
    assert [one["dataset"]["name"] for one in result["results"]] == [
        "BLINK, drawn questions",
        "VSI-Bench, drawn questions",
    ]
    assert "**UNKNOWN LICENCE.** The licence of the source mine is unknown" in body
    assert "| mine (monet) | 3 | **UNKNOWN** | given |" in body
    assert "none of them is needed to use it" in body and "DINOv3 (the teacher dinov3)" in body
    everything = "".join(
        path.read_text() for path in released.rglob("*") if path.suffix in (".md", ".json", ".jsonl", ".yaml", ".txt")
    )
    assert str(project) not in everything and "/home/somebody" not in everything
    assert json.loads((released / "data.json").read_text())["sources"]["mine"]["licenses"] == {"unknown": 3}


def test_the_lock_has_what_is_installed_and_says_where_another_environment_differs(copied: Path) -> None:
    lines = (copied / "constraints.txt").read_text().splitlines()
    assert f"numpy=={importlib.metadata.version('numpy')}" in lines
    (copied / "constraints.txt").write_text("numpy==0.1\nno-such-package==3\n")
    assert verifying._differing_packages(copied / "constraints.txt") == {
        "numpy": ("0.1", importlib.metadata.version("numpy"))
    }


def test_questions_are_drawn_evenly_over_benchmarks_and_within_each() -> None:
    rows = [{"benchmark": name, "id": number} for name, n in (("a", 100), ("b", 3), ("c", 40)) for number in range(n)]
    chosen = choose(rows, 21)
    assert {name: sum(row["benchmark"] == name for row in chosen) for name in "abc"} == {"a": 9, "b": 3, "c": 9}
    assert [row["id"] for row in chosen if row["benchmark"] == "a"] == [0, 11, 22, 33, 44, 55, 66, 77, 88]
    assert choose(rows[:4], 50) == rows[:4]
