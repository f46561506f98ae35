from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.data.made import png, recipe
from valr_ops.data import sources
from valr_ops.data.records import REASONS, Record, Rejection, SourceError, Target
from valr_ops.recipe.recipe import SourceRecipe

DATA = recipe().data
SCENE = "scannet/scene0011_00"
FRAMES = 6


def row(**changes: Any) -> dict[str, Any]:
    plain = {
        "id": "gcot_1",
        "scene": SCENE,
        "frames": [f"{number}.png" for number in range(3)],
        "question": "How far is the sofa from the door?",
        "reasoning": "Locate the sofa at [0.51, 1.2, -3.0].\n\nLocate the door. It is left.\n \n\nMeasure.",
        "answer": "2.4 m",
    }
    return {**plain, **changes}


def source(folder: Path, *rows: Any, name: str = "gcot.json", raw: bytes | None = None) -> Path:
    """Annotations and one scene of six frames, each of its own colour."""
    (folder / SCENE).mkdir(parents=True, exist_ok=True)
    for number in range(FRAMES):
        (folder / SCENE / f"{number}.png").write_bytes(png(colour=(number, 9, 9)))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    lines = name.endswith(".jsonl")
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(list(rows))
    (folder / name).write_bytes(text.encode() if raw is None else raw)
    return folder


def items(folder: Path, mapping: Mapping[str, str] = {}, **data: Any) -> list[Record | Rejection]:
    settings = SourceRecipe(format="gcot", path="given", mapping=dict(mapping))
    reading = sources.located("gcot", str(folder), DATA.model_copy(update=data), settings)
    return [one.item for one in sources.read(reading)]


def record_of(folder: Path, one: Any, **data: Any) -> Record:
    (item,) = items(source(folder, one), **data)
    assert isinstance(item, Record), item
    return item


def reason(folder: Path, one: Any, **data: Any) -> str:
    # A good row beside it: where no row has the names, the file is refused.
    item, good = items(source(folder, one, row()), **data)
    assert isinstance(item, Rejection) and item.reason in REASONS
    assert isinstance(good, Record)
    return item.reason


def colours(record: Record) -> list[int]:
    """Which frames the images are."""
    return [PIL.Image.open(io.BytesIO(image.data)).getpixel((0, 0))[0] for image in record.images]  # type: ignore[index]


def test_a_row_becomes_a_multi_view_record_of_its_scene(tmp_path: Path) -> None:
    record = record_of(tmp_path, row())
    assert (record.id, record.license, record.split) == ("gcot/gcot_1", "CC-BY-NC-4.0", "train")
    assert (record.kind, record.scene, record.answer) == ("multi_view", SCENE, "2.4 m")
    texts = ["Locate the sofa at [0.51, 1.2, -3.0].", "Locate the door. It is left.", "Measure."]
    assert [step.text for step in record.steps] == texts
    assert colours(record) == [0, 1, 2]
    assert all(image.role == "input" for image in record.images)


def test_nobody_says_what_a_step_looks_at_unless_the_row_does(tmp_path: Path) -> None:
    assert [step.target for step in record_of(tmp_path, row()).steps] == [None] * 3
    assert [step.target for step in record_of(tmp_path, row(targets=None)).steps] == [None] * 3
    stated = [Target(2, None, "dataset"), None, Target(0, None, "dataset")]
    assert [step.target for step in record_of(tmp_path, row(targets=[2, None, 0])).steps] == stated


def test_a_single_frame_is_what_every_step_looks_at(tmp_path: Path) -> None:
    record = record_of(tmp_path, row(frames=["4.png"]))
    assert record.kind == "single_view"
    assert [step.target for step in record.steps] == [Target(0, None, "only_image")] * 3
    stated = record_of(tmp_path, row(frames=["4.png"], targets=[None, 0, None]))
    assert [step.target for step in stated.steps] == [None, Target(0, None, "dataset"), None]


@pytest.mark.parametrize(
    ("reasoning", "steps"),
    [
        ("One step only", ["One step only"]),
        ("The sofa is at 2.4 m. The door, e.g. the left one, is near! Is it? Yes.", 4),
        ("Boxes: [0.5, 1. 2.] and <box>. Then measure.", ["Boxes: [0.5, 1. 2.] and <box>.", "Then measure."]),
        ('He says "Go." (The sofa is left.) Done.', ['He says "Go."', "(The sofa is left.)", "Done."]),
        ("1. Find the sofa. 2. Find the door.", ["1. Find the sofa.", "2. Find the door."]),
        ("Steps: 1. Find it. It is here.", ["Steps: 1. Find it.", "It is here."]),
        ("A line.\nAnother line. And more.", ["A line.", "Another line.", "And more."]),
        ("A paragraph. Two sentences.\r\n\r\nAnother.", ["A paragraph. Two sentences.", "Another."]),
    ],
)
def test_steps_are_paragraphs_or_the_sentences_of_a_single_one(tmp_path: Path, reasoning: str, steps: Any) -> None:
    texts = [step.text for step in record_of(tmp_path, row(reasoning=reasoning)).steps]
    assert (len(texts) if isinstance(steps, int) else texts) == steps


def test_frames_are_found_below_the_source_or_below_their_scene(tmp_path: Path) -> None:
    assert colours(record_of(tmp_path, row(frames=[f"{SCENE}/3.png", f"{SCENE}/1.png"]))) == [3, 1]
    assert colours(record_of(tmp_path, row(frames=["3.png", "1.png"]))) == [3, 1]
    # One folder for all of a record's frames: a frame that lies elsewhere is missing.
    (tmp_path / "3.png").write_bytes(png(colour=(77, 9, 9)))
    assert colours(record_of(tmp_path, row(frames=["3.png"]))) == [77]
    assert reason(tmp_path, row(frames=["3.png", "1.png"])) == "image_missing"


def test_of_more_frames_than_wanted_those_at_equal_distances_are_taken(tmp_path: Path) -> None:
    frames = [f"{number}.png" for number in range(FRAMES)]
    assert colours(record_of(tmp_path, row(frames=frames))) == [0, 1, 2, 3, 4, 5]
    assert colours(record_of(tmp_path, row(frames=frames), video_frames=6)) == [0, 1, 2, 3, 4, 5]
    assert colours(record_of(tmp_path, row(frames=frames), video_frames=3)) == [1, 3, 5]
    assert colours(record_of(tmp_path, row(frames=frames), video_frames=1)) == [3]


def test_a_frame_that_a_step_looks_at_is_kept(tmp_path: Path) -> None:
    frames = [f"{number}.png" for number in range(FRAMES)]
    record = record_of(tmp_path, row(frames=frames, targets=[0, None, 5]), video_frames=3)
    assert colours(record) == [0, 3, 5]
    assert [step.target.image for step in record.steps if step.target] == [0, 2]
    assert reason(tmp_path, row(frames=frames, targets=[0, 3, 5]), video_frames=2) == "step_match_invalid"


def test_the_recipe_maps_other_names(tmp_path: Path) -> None:
    mapping = {"id": "uid", "question": "prompt", "frames": "views", "targets": "looks_at"}
    one = {mapping.get(name, name): value for name, value in row(targets=[0, 1, 2]).items()}
    (item,) = items(source(tmp_path, one), mapping)
    assert isinstance(item, Record)
    assert [step.target.image for step in item.steps if step.target] == [0, 1, 2]
    # What the mapping names has to be there.
    del one["looks_at"]
    (item,) = items(source(tmp_path, one), mapping)
    assert isinstance(item, Rejection) and item.reason == "schema_mismatch" and "looks_at: missing" in item.detail


def test_another_layout_is_refused_with_the_keys_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"element 0 has no answer .*conversations.*schema_mismatch"):
        items(source(tmp_path, {"conversations": [], "video": "scene"}))
    with pytest.raises(SourceError, match=r"mapping names 'frame', but gcot knows id, scene, frames"):
        items(source(tmp_path, row()), {"frame": "views"})


def test_arrays_and_lines_at_any_depth_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    source(tmp_path, row(id=1), row(id=2), name="part/a.json")
    source(tmp_path, row(id=3), name="part/b.jsonl")
    source(tmp_path, row(id=4), name="val_c.json")
    source(tmp_path, row(id=5), name="test.jsonl")
    found = [(item.id, item.split) for item in items(tmp_path) if isinstance(item, Record)]
    assert found == [
        *(("gcot/1", "train"), ("gcot/2", "train"), ("gcot/3", "train")),
        *(("gcot/5", "test"), ("gcot/4", "validation")),
    ]


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in row().items() if name != key}


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        *((without(key), "schema_mismatch") for key in row()),
        ([1, 2], "schema_mismatch"),
        ("text", "schema_mismatch"),
        (row(id=1.5), "schema_mismatch"),
        (row(scene=7), "schema_mismatch"),
        (row(scene=" "), "schema_mismatch"),
        (row(frames="0.png"), "schema_mismatch"),
        (row(frames=[0, 1]), "schema_mismatch"),
        (row(frames=[""]), "schema_mismatch"),
        (row(reasoning=["a", "b"]), "schema_mismatch"),
        (row(answer=None), "schema_mismatch"),
        (row(answer=True), "schema_mismatch"),
        (row(targets=[0, True, 1]), "schema_mismatch"),
        (row(targets={"0": 1}), "schema_mismatch"),
        (row(targets=[0, 1]), "step_match_invalid"),
        (row(targets=[0, 1, 3]), "step_match_invalid"),
        (row(targets=[0, 1, -1]), "step_match_invalid"),
        (row(question=" \n"), "empty_question"),
        (row(answer=""), "empty_answer"),
        (row(reasoning="\n\n"), "empty_reasoning"),
        (row(reasoning="\n\n".join("step" for _ in range(65))), "too_many_steps"),
        (row(reasoning="Look. " * 10_000), "too_many_steps"),
        (row(frames=[]), "no_images"),
        (row(frames=["0.png"] * 9000), "too_long"),
        (row(frames=["9.png"]), "image_missing"),
        (row(scene="scannet/other"), "image_missing"),
        (row(frames=["../0.png"]), "path_escape"),
        (row(frames=["/etc/passwd"]), "path_escape"),
        (row(scene="../.."), "path_escape"),
        (row(question="<image>\nHow far?"), "reserved_token_in_text"),
        (row(reasoning="See\x00"), "control_character"),
        (row(answer="\ud800"), "not_utf8"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason(tmp_path: Path, one: Any, expected: str) -> None:
    assert reason(tmp_path, one) == expected


def test_a_missing_frame_names_both_places(tmp_path: Path) -> None:
    item, _ = items(source(tmp_path, row(frames=["9.png"]), row()))
    assert isinstance(item, Rejection)
    assert f"'{SCENE}/9.png' does not exist" in item.detail and "'9.png' does not exist" in item.detail


def test_frames_of_unequal_size_are_rejected(tmp_path: Path) -> None:
    source(tmp_path)
    (tmp_path / SCENE / "turned.png").write_bytes(png(30, 40))
    assert reason(tmp_path, row(frames=["0.png", "turned.png"])) == "frames_unequal"


def test_a_broken_frame_and_a_depth_map_are_rejected(tmp_path: Path) -> None:
    source(tmp_path)
    (tmp_path / SCENE / "cut.png").write_bytes(png()[:60])
    (tmp_path / SCENE / "empty.png").write_bytes(b"")
    PIL.Image.fromarray(np.full((30, 40), 1500, np.uint16)).save(tmp_path / SCENE / "depth.png")
    assert reason(tmp_path, row(frames=["0.png", "cut.png"])) == "image_unreadable"
    assert reason(tmp_path, row(frames=["0.png", "empty.png"])) == "image_missing"
    assert reason(tmp_path, row(frames=["0.png", "depth.png"])) == "schema_mismatch"


def test_a_link_out_of_the_source_is_not_followed(tmp_path: Path) -> None:
    source(tmp_path / "in")
    (tmp_path / "out.png").write_bytes(png())
    (tmp_path / "in" / SCENE / "link.png").symlink_to(tmp_path / "out.png")
    assert reason(tmp_path / "in", row(frames=["link.png"])) == "path_escape"


def test_answers_stay_as_written_and_numbers_become_text(tmp_path: Path) -> None:
    for answer, text in (("about 2.40 m", "about 2.40 m"), (3, "3"), (2.5, "2.5")):
        assert record_of(tmp_path, row(answer=answer)).answer == text


def test_control_tokens_in_the_reasoning_are_escaped(tmp_path: Path) -> None:
    record = record_of(tmp_path, row(reasoning="See <latent> there."))
    assert record.steps[0].text == "See &lt;latent> there."


def test_a_truncated_array_stops_the_run(tmp_path: Path) -> None:
    whole = json.dumps([row(), row(id="b")]).encode()
    with pytest.raises(SourceError, match="not_json"):
        items(source(tmp_path, raw=whole[:-20]))


@pytest.mark.timeout(120)
def test_mutated_files_end_in_records_rejections_or_one_error(tmp_path: Path) -> None:
    chance = random.Random(5)
    outcomes = {"records": 0, "rejected": 0, "stopped": 0}
    for name in ("gcot.json", "gcot.jsonl"):
        folder = source(tmp_path / name, row(), row(id=2, targets=[0, None, 2]), row(id=3, frames=["5.png"]), name=name)
        whole = (folder / name).read_bytes()
        for turn in range(500):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(len(data))
                put = chance.choice((b"null", b"-1", b"[", b'"', b"1e999", bytes([chance.randrange(256)]), b""))
                data[at : at + chance.randrange(4)] = put
            if turn % 5 == 0:
                del data[chance.randrange(len(data)) :]
            (folder / name).write_bytes(data)
            try:
                for item in items(folder):
                    outcomes["records" if isinstance(item, Record) else "rejected"] += 1
                    assert isinstance(item, Record) or item.reason in REASONS
            except SourceError:
                outcomes["stopped"] += 1
    assert all(outcomes.values()), outcomes
