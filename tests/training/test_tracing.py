from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from tests import tiny
from tests.data.made import jsonl_source, png, recipe, row
from tests.training.inputs import store_features
from valr_ops import runner
from valr_ops.__main__ import main
from valr_ops.data.curation import build_cot_corpus
from valr_ops.data.inventory import build_sources
from valr_ops.data.rewriting import build_latent_corpus
from valr_ops.data.sequences import Sequence, Sequences
from valr_ops.model.qwen import build_base_model
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import StageContext, folder, write_manifest
from valr_ops.store.progress import Progress
from valr_ops.teachers.stored import REJECTED, SOUND, write_targets

STAGES = {
    "sources": (build_sources, ()),
    "cot_corpus": (build_cot_corpus, ("sources",)),
    "base_model": (build_base_model, ("cot_corpus",)),
    "latent_corpus": (build_latent_corpus, ("cot_corpus", "base_model")),
}
TELLING = {
    "question": "Which of the [bold]two[/bold] is red?",
    "steps": [
        {"text": "The left one is red.", "image": 0, "box": [0, 0, 16, 32]},
        {"text": "I think about it."},
        {"text": "The other one is blue.", "image": 1},
    ],
    "images": ["images/left.png", "images/right.png"],
    "answer": "the left one",
}


def project(root: Path, made: Recipe) -> Path:
    """A project whose artifacts are there as far as a trace needs them."""
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).touch()
    folder(root, "recipe").mkdir(parents=True)
    (root / runner.RECIPE_FILE).write_text(yaml.safe_dump(made.model_dump(mode="json")))
    for name, (build, inputs) in STAGES.items():
        out, work = folder(root, name), root / "work" / name
        out.mkdir(parents=True)
        work.mkdir(parents=True)
        context = StageContext(name, made, {one: folder(root, one) for one in inputs}, out, work, Progress())
        write_manifest(out, name, build(context))
    return root


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One source with a record for each way that a journey can end."""
    root = tmp_path_factory.mktemp("project")
    source = root / "mine"
    rows = [
        row(0, id="telling", **TELLING),
        row(1, id="outside", steps=[{"text": "A wall.", "image": 0, "box": [0, 0, 900, 900]}]),
        b'{"id": "torn", ',
        row(2, id="first"),
        row(2, id="second"),
        row(3, id="long", steps=[{"text": f"Step {number} of a long story."} for number in range(40)]),
        *(row(number) for number in range(4, 10)),
    ]
    jsonl_source(source, train=rows)
    PIL.Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(source / "images" / "left.png")
    (source / "images" / "right.png").write_bytes(png(48, 32, (20, 30, 200)))
    base = tiny.recipe().model_dump(exclude_unset=True)["base"]
    made = recipe({"mine": {"format": "jsonl", "path": str(source)}}, max_length=400, min_kept_fraction=0.1)
    changed = {**made.model_dump(exclude_unset=True), "base": base, "latents": {"slots": 4}}
    return project(root, Recipe.model_validate(changed))


def traced(
    root: Path, identity: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any], str, str]:
    """Exit status, last line, what was printed, and the errors."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "100")
    status = main(["trace", identity, *more])
    said = capsys.readouterr()
    *shown, last = said.out.rstrip("\n").split("\n") if said.out else ["{}"]
    return status, json.loads(last), "\n".join(line.rstrip() for line in shown), said.err


def test_the_whole_journey_of_a_record_is_shown(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, last, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
    assert (status, last["reached"], last["rejected"], last["segments"]) == (0, "tensors", [], 3)
    stations = re.findall(r"^([1-5])  (.+?) ─", shown, re.MULTILINE)
    assert [number for number, _ in stations] == ["1", "2", "3", "4", "5"]
    assert "train.jsonl line 1" in shown and '"answer": "the left one"' in shown
    assert "[bold]two[/bold]" in shown
    assert "the corpus holds the same" in shown or "moved it to the split validation" in shown
    assert "→ image 0, box [0, 0, 16, 32] (stated by the data)" in shown
    assert len(re.findall(r"<latent> \[4 slots\] </latent>", shown)) == 3
    assert "→ image 1, all of it" in shown and "→ no target, so cross-entropy only" in shown


def test_the_lengths_are_those_of_the_tensors(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, last, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
    # Three segments of four slots; stage 1 has not even the two markers of each.
    assert last["positions_stage2"] - last["positions_stage1"] == 3 * (4 + 2)
    assert last["supervised_stage2"] - last["supervised_stage1"] == 3
    assert f"input_ids          [1, {last['positions_stage1']}]" in shown
    assert f"{last['ids'] + 3 * 25} with data.reserved_slots=25 a segment, of data.max_length=400 (40%)" in shown


def test_the_table_around_a_segment_has_no_label_on_slots_and_one_on_its_opening(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
    lines = shown.split("Around the segments")[1].split("M-RoPE ids")[0].splitlines()
    opening = [line.split() for line in lines if "opens" in line]
    assert len(opening) == 3 and all(line[1:3] == ["<latent>", "<latent>"] for line in opening)
    slots = [line.split() for line in lines if "▪" in line]
    assert len(slots) == 6 and all(line[2:4] == ["·", "▪"] for line in slots)
    closing = [line.split() for line in lines if "forced" in line]
    assert len(closing) == 3 and all(line[1:3] == ["</latent>", "·"] for line in closing)
    first = next(place for place, line in enumerate(lines) if "opens" in line)
    assert int(lines[first + 1].split()[0]) == int(lines[first].split()[0]) + 1


def test_the_position_ids_of_an_image_span_its_grid_and_slots_count_like_text(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
    runs = {
        line.split()[0] + line.split()[1]: line.split()
        for line in shown.splitlines()
        if " .. " not in line and re.match(r"(image|slots) \d", line)
    }
    # 48 x 32 pixels in merged patches of 16 pixels: two rows of three.
    t, h, w = runs["image1"][3:6]
    assert t.isdigit()
    assert [int(end) - int(start) for start, end in (h.split(".."), w.split(".."))] == [1, 2]
    t, h, w = runs["slots1"][3:6]
    assert t == h == w and int(t.split("..")[1]) - int(t.split("..")[0]) == 3


def test_the_pictures_show_each_target_and_what_the_teachers_see(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, last, _, _ = traced(mine, "mine/telling", monkeypatch, capsys)
    there = mine / ".valr" / "trace" / "mine" / "telling"
    side = recipe().teachers["dinov3"].image_pixels
    assert sorted(Path(file).name for file in last["files"]) == sorted(file.name for file in there.iterdir())
    assert {file.name for file in there.iterdir()} == {
        "image_0.png",
        "image_1.png",
        f"step_1_{side}px.png",
        f"step_3_{side}px.png",
    }
    seen = PIL.Image.open(there / f"step_1_{side}px.png")
    left = PIL.Image.open(mine / "mine" / "images" / "left.png").crop((0, 0, 16, 32))
    expected = left.resize((side, side), PIL.Image.Resampling.BICUBIC)
    assert seen.size == (side, side) and seen.tobytes() == expected.tobytes()


def test_another_folder_for_the_pictures_can_be_named(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, last, _, _ = traced(mine, "mine/telling", monkeypatch, capsys, "--out", str(tmp_path / "here"))
    assert last["files"] and {Path(file).parent for file in last["files"]} == {tmp_path / "here"}


@pytest.mark.parametrize(
    ("identity", "reached", "rejected", "words"),
    [
        ("mine/outside", "rejected", "cot_corpus: bbox_invalid", ["train.jsonl line 2", "900"]),
        ("mine/train.jsonl line 3", "rejected", "cot_corpus: not_json", ["train.jsonl line 3", "no element"]),
        ("mine/second", "rejected", "cot_corpus: duplicate_content", ["train.jsonl line 5", "as mine/first"]),
        ("mine/long", "corpus", "latent_corpus: too_long", ["train.jsonl line 6", "it was rejected, see above"]),
    ],
)
def test_a_rejected_record_is_followed_to_where_it_was_rejected(
    mine: Path,
    identity: str,
    reached: str,
    rejected: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, last, shown, _ = traced(mine, identity, monkeypatch, capsys)
    assert (status, last["reached"], last["rejected"]) == (0, reached, [rejected])
    assert all(word in shown for word in words), shown
    assert f"rejected by {rejected}" in shown


def test_what_a_teacher_could_not_see_is_among_the_rejections(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = {one.id: one for split in ("train", "validation") for one in _sequences(mine, split)}
    targets = [target.seen(joint=False) for target in records["mine/telling"].targets if target is not None]
    there = folder(mine, "teacher_features_dinov3")
    there.mkdir()
    try:
        store_features(there, "dinov3", dict.fromkeys(targets, torch.ones(2, 2, 4)))
        write_targets(there, [(targets, torch.tensor([SOUND, REJECTED], dtype=torch.uint8))])
        named = {"id": "mine/telling", "source": "mine", "reason": "image_unreadable", "detail": "OSError: truncated"}
        # As features.py writes them.
        lines = [json.dumps(one, ensure_ascii=False) for one in (named, {**named, "id": "mine/größer"})]
        (there / "rejects.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _, last, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
        _, beyond_ascii, _, _ = traced(mine, "mine/größer", monkeypatch, capsys)
    finally:
        shutil.rmtree(there)
    assert (last["reached"], last["rejected"]) == ("tensors", ["teacher_features_dinov3: image_unreadable"])
    assert beyond_ascii["rejected"] == last["rejected"]
    assert "rejected by teacher_features_dinov3: image_unreadable" in shown and "OSError: truncated" in shown
    assert "its image could not be decoded" in shown.replace("\n", " ") and "--force" not in shown


def _sequences(root: Path, split: str) -> Iterator[Sequence]:
    stored = Sequences(folder(root, "latent_corpus"), split)
    return (stored[place] for place in range(len(stored)))


def test_an_unknown_id_is_an_error_that_names_the_nearest_ones(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, last, _, errors = traced(mine, "mine/tellnig", monkeypatch, capsys)
    assert (status, last["reached"], last["nearest"][0]) == (42, None, "mine/telling")
    assert "did you mean 'mine/telling'" in errors and "rejects.jsonl" in errors
    _, last, _, _ = traced(mine, "telling", monkeypatch, capsys)
    assert last["nearest"][0] == "mine/telling"


def test_a_source_that_changed_since_is_said_and_the_rest_is_shown(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (mine / "mine" / "train.jsonl").read_bytes()
    try:
        (mine / "mine" / "train.jsonl").write_bytes(lines.replace(b"the left one", b"the right one"))
        _, last, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
        assert "answer differ from the corpus: the source has changed" in shown and last["reached"] == "tensors"
        (mine / "mine" / "train.jsonl").write_bytes(b"\n".join(reversed(lines.splitlines())))
        _, last, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
        assert "The row now has the id" in shown
        (mine / "mine" / "train.jsonl").unlink()
        _, last, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
        assert "can't be read again" in shown and last["reached"] == "tensors"
    finally:
        (mine / "mine" / "train.jsonl").write_bytes(lines)


def test_without_a_corpus_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    status, _, _, errors = traced(tmp_path, "mine/telling", monkeypatch, capsys)
    assert status == 42 and "valr materialize +latent_corpus" in errors and "check-data" in errors


def test_without_a_latent_corpus_the_journey_ends_at_the_corpus(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = folder(mine, "latent_corpus")
    there.rename(there.with_name("away"))
    try:
        _, last, shown, _ = traced(mine, "mine/telling", monkeypatch, capsys)
    finally:
        there.with_name("away").rename(there)
    assert last["reached"] == "corpus" and "artifacts/latent_corpus is not there" in shown
    assert len(last["files"]) == 4


def test_an_id_can_not_lead_the_pictures_out_of_the_project() -> None:
    from valr_ops.training.tracing import _picture_folder

    for identity in ("../../etc/x", "a/../../..", "/abs", "a\\b", "x" * 500, "a\nb", ".", ""):
        inside = (Path.cwd() / _picture_folder(Path.cwd(), identity)).resolve()
        assert inside.is_relative_to(Path.cwd() / ".valr" / "trace"), identity
        assert inside != Path.cwd() / ".valr" / "trace" or identity == ""
        assert all(len(part) < 100 for part in inside.parts)
