from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.made import png, recipe
from valr_ops.data import sources
from valr_ops.data.records import REASONS, Record, Rejection, SourceError, Target
from valr_ops.data.sources import Share, cogcom
from valr_ops.data.sources.reading import Reading
from valr_ops.recipe.recipe import SourceRecipe

DATA = recipe().data
SETTINGS = SourceRecipe(format="cogcom", path="given")


def step(desc: str = "Look.", **changes: Any) -> dict[str, Any]:
    """A step that names nothing."""
    plain = {"func": None, "param": None, "variables": None, "onbox": None, "return": None, "found": True}
    return {**plain, "desc": desc, **changes}


def grounding(box: Any = (2, 3, 22, 23), name: str = "bbx_1", **changes: Any) -> dict[str, Any]:
    box = list(box) if isinstance(box, tuple) else box
    made = {"func": "GROUNDING", "param": "the bus", "variables": {name: box}, "return": name, "desc": "Find the bus."}
    return step(**{**made, **changes})


def metadata(**changes: Any) -> dict[str, Any]:
    """A good question: ground, cut out, read."""
    crop = {"func": "CROP_AND_ZOOMIN", "param": ["bbx_1", 2], "variables": {"img_1": None}, "onbox": "bbx_1"}
    ocr = {"func": "OCR", "param": "number", "variables": {"txt_1": "42"}, "onbox": None, "return": "txt_1"}
    tree = {
        "0,0--1,0": grounding(),
        "1,0--2,0": step("Zoom in.", **crop, **{"return": "img_1"}),
        "2,0--3,0": step("Read the number.", **ocr),
    }
    whole = {"question": "Which number?", "answer": "42", "com_founds": [True], "cropped": True, "final_com": tree}
    return {**whole, **changes}


def chain(*steps: dict[str, Any]) -> dict[str, Any]:
    """A question whose tree is one path."""
    return metadata(final_com={f"{level},0--{level + 1},0": one for level, one in enumerate(steps)})


def write(path: Path, members: Iterable[tuple[str, bytes | str]], mode: str = "w") -> Path:
    """A tar; a member given as text is a link to that."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def shard(path: Path, *questions: Any, mode: str = "w") -> Path:
    """A good tar with these as its metadata; bytes are taken as they are."""
    members = []
    for number, one in enumerate(questions):
        members.append((f"{number:06d}.png", png(colour=(number, 9, 9))))
        members.append((f"{number:06d}.pyd", one if isinstance(one, bytes) else pickle.dumps(one)))
    return write(path, members, mode)


def items(folder: Path, share: Share = Share(), **data: Any) -> list[Record | Rejection]:  # noqa: B008
    reading = sources.located("com", str(folder), DATA.model_copy(update=data), SETTINGS)
    return [one.item for one in sources.read(reading, share)]


def only(folder: Path, question: Any, **data: Any) -> Record | Rejection:
    shard(folder / "train.tar", question)
    (item,) = items(folder, **data)
    return item


def record_of(folder: Path, question: Any) -> Record:
    item = only(folder, question)
    assert isinstance(item, Record), item
    return item


def reason(folder: Path, question: Any, **data: Any) -> str:
    item = only(folder, question, **data)
    assert isinstance(item, Rejection)
    assert item.reason in REASONS
    return item.reason


def test_a_found_path_becomes_steps_with_the_regions_they_look_at(tmp_path: Path) -> None:
    record = record_of(tmp_path, metadata())
    assert (record.id, record.license, record.kind, record.split) == (
        "com/train/000000",
        "unknown",
        "interleaved",
        "train",
    )
    assert (record.question, record.answer) == ("Which number?", "42")
    assert [one.text for one in record.steps] == ["Find the bus.", "Zoom in.", "Read the number."]
    region = Target(0, (2, 3, 22, 23), "crop")
    assert [one.target for one in record.steps] == [region, region, None]
    assert [(image.width, image.height, image.role) for image in record.images] == [(40, 30, "input")]


def test_the_layout_of_the_public_generator_is_read(tmp_path: Path) -> None:
    """A list of questions, a root above level 0, any node as a parent, values in place of names."""
    ground = grounding([[2, 3, 22, 23], [0, 0, 10, 30]], desc="Find `bbx_1`.", found=False)
    ground = {**ground, "func": "grounding_1", "return": [[2, 3, 22, 23], [0, 0, 10, 30]]}
    ocr = {"func": "OCR_1", "param": "number on", "onbox": [0, 0, 10, 30], "return": "42"}
    ocr["variables"] = {"txt_1": "42", "bbx_1": [0, 0, 10, 30]}
    tree = {
        "-1,*--0,0": ground,
        "0,0--1,0": step("Nothing there.", found=False),
        "0,0--1,1": step("Read `txt_1`.", **{**ocr, "found": False}),
        "1,*--2,0": step("So it is `txt_1`."),
    }
    first = metadata(final_com=tree, com_founds=["1,*--2,0"], unique_id="x", steps=["a"], cropped=False)
    members = [("0_0_0.jpg", png()), ("0_0_0.metadata.pyd", pickle.dumps([first, chain(step(""))]))]
    write(tmp_path / "com-gqa-000000.tar", members)
    good, bad = items(tmp_path)
    # The shortest path leads over 1,0, which comes first and has not read the number.
    assert isinstance(bad, Rejection) and (bad.id, bad.reason) == ("com/com-gqa-000000/0_0_0/1", "empty_reasoning")
    assert isinstance(good, Rejection) and (good.id, good.reason) == (
        "com/com-gqa-000000/0_0_0/0",
        "undefined_variable",
    )

    del tree["0,0--1,0"]
    write(tmp_path / "com-gqa-000000.tar", [members[0], ("0_0_0.metadata.pyd", pickle.dumps([first]))])
    (record,) = items(tmp_path)
    assert isinstance(record, Record)
    assert [one.text for one in record.steps] == ["Find `bbx_1`.", "Read 42.", "So it is 42."]
    around, read = Target(0, (0, 0, 22, 30), "crop"), Target(0, (0, 0, 10, 30), "crop")
    assert [one.target for one in record.steps] == [around, read, None]


def test_the_shortest_found_path_is_taken_and_of_equals_the_first_by_its_edges(tmp_path: Path) -> None:
    tree = {
        "0,0--1,2": step("late", found=False),
        "1,2--2,1": step("last of equals"),
        "0,0--1,1": step("first", found=False),
        "1,1--2,3": step("leads nowhere", found=False),
        "1,1--2,2": step("chosen"),
        "0,0--1,0": step("a mid step that is found"),
        "1,0--2,0": step("long"),
        "2,0--3,0": step("longer"),
    }
    for order in (list(tree), list(reversed(tree))):
        record = record_of(tmp_path, metadata(final_com={edge: tree[edge] for edge in order}))
        assert [one.text for one in record.steps] == ["first", "chosen"]


@pytest.mark.parametrize(
    "tree",
    [
        {"0,0--1,0": step(), "1,0--0,0": step()},
        {"0,0--1,0": step(), "2,0--2,1": step()},
        {"0,0--1,0": step(), "2,0--3,0": step()},
        {"0,0--1,0": step(), "2,*--3,0": step()},
        {"0,0--1,0": step(), "0,1--1,1": step()},
        {"0,0--1,0": step(), "0,0--1,1": step(), "1,1--2,0": step(), "1,0--2,0": step()},
        {"1,0--2,0": step()},
        {"-1,0--0,1": step(), "0,0--1,0": step()},
        {"0,0-1,0": step()},
        {"0,0--1": step()},
        {"0,0--1,x": step()},
        {"0,0--1,²": step()},
        {"0,0--1,0\n": step()},
        {"0,0--1,*": step()},
        {7: step()},
    ],
)
def test_what_is_no_tree_is_rejected(tmp_path: Path, tree: Any) -> None:
    assert reason(tmp_path, metadata(final_com=tree)) == "step_tree_invalid"


def test_a_path_is_found_only_if_its_leaf_found_the_answer(tmp_path: Path) -> None:
    assert reason(tmp_path, chain(step(), step(found=False))) == "no_found_path"


@pytest.mark.parametrize(
    "second",
    [
        step(onbox="bbx_2"),
        step(param=["bbx_2", 2]),
        step(param="`bbx_2`, 2"),
        step("See `txt_1`."),
        step(onbox="img_1", variables={"img_1": None}),
    ],
)
def test_a_variable_that_no_earlier_step_made_is_rejected(tmp_path: Path, second: Any) -> None:
    assert reason(tmp_path, chain(grounding(), second)) == "undefined_variable"


def test_a_step_on_a_crop_looks_at_the_region_that_was_cut_out(tmp_path: Path) -> None:
    crop = step("Zoom.", param=["bbx_1", 2], variables={"img_1": None})
    read = step("Read.", param="img_1", variables={"txt_1": "42"})
    think = step("Add.", param="txt_1")
    record = record_of(tmp_path, chain(grounding(), crop, read, think))
    region = Target(0, (2, 3, 22, 23), "crop")
    assert [one.target for one in record.steps] == [region, region, region, None]


def test_the_second_region_of_a_chain_is_its_own(tmp_path: Path) -> None:
    record = record_of(tmp_path, chain(grounding(), grounding((0.5, 0, 12.2, 9), "bbx_2"), step("On.", onbox="bbx_1")))
    assert [one.target.box for one in record.steps if one.target] == [(2, 3, 22, 23), (0, 0, 13, 9), (2, 3, 22, 23)]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([2, 3, 41, 23], "bbox_invalid"),
        ([-1, 3, 22, 23], "bbox_invalid"),
        ([22, 3, 2, 23], "bbox_invalid"),
        ([2, 3, 2, 23], "bbox_invalid"),
        ([2, 3, 6, 7], "bbox_invalid"),
        ([2, 3, 22], "bbox_invalid"),
        ([2, 3, 22, None], "bbox_invalid"),
        ([2, 3, 22, True], "bbox_invalid"),
        ([2, 3, 22, float("nan")], "bbox_invalid"),
        ([2, 3, 22, float("inf")], "bbox_invalid"),
        ([2, 3, 22, 2**64 - 1], "bbox_invalid"),
        ([[2, 3, 22, 23], [2, 3, 41, 23]], "bbox_invalid"),
        ([0.1, 0.2, 0.5, 1], "bbox_invalid"),
        ([0, 0, 40, 30], "crop_is_whole_image"),
        ([[0, 0, 40, 10], [0, 10, 40, 30]], "crop_is_whole_image"),
        ("120,40", "schema_mismatch"),
        (["2", "3", "22", "23"], "schema_mismatch"),
        ([[2, 3, 22, 23], 4], "schema_mismatch"),
        ({"x": 1}, "schema_mismatch"),
        (7, "schema_mismatch"),
    ],
)
def test_a_box_that_is_no_region_of_the_image_is_rejected_with_its_reason(
    tmp_path: Path, box: Any, expected: str
) -> None:
    assert reason(tmp_path, chain(grounding(box))) == expected
    assert reason(tmp_path, chain(step(onbox=box))) == expected


def test_fractions_instead_of_pixels_are_named(tmp_path: Path) -> None:
    item = only(tmp_path, chain(grounding([0.1, 0.2, 0.5, 0.9])))
    assert isinstance(item, Rejection) and "fractions of the sides, expected pixels" in item.detail


def test_a_step_that_grounds_nothing_looks_at_nothing(tmp_path: Path) -> None:
    for nothing in (None, [], "bbx_1"):
        record = record_of(tmp_path, chain(grounding(nothing)))
        assert record.steps[0].target is None


NO_DESC = {key: value for key, value in step().items() if key != "desc"}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (metadata(question="  "), "empty_question"),
        (metadata(answer=""), "empty_answer"),
        (metadata(answer=42), "schema_mismatch"),
        (metadata(question="<image> what?"), "reserved_token_in_text"),
        (metadata(question="a\x00b"), "control_character"),
        (metadata(question="\ud800"), "not_utf8"),
        (chain(step(" ")), "empty_reasoning"),
        (chain(step(desc=7)), "schema_mismatch"),  # type: ignore[arg-type]
        (chain(NO_DESC), "schema_mismatch"),
        (chain(step(found=1)), "schema_mismatch"),
        (chain(step(found="yes")), "schema_mismatch"),
        (chain(step(variables=["bbx_1"])), "schema_mismatch"),
        (chain(step(variables={1: "a"})), "schema_mismatch"),
        (chain(step(param={"a": 1})), "schema_mismatch"),
        (chain(step(param=[{"a": 1}])), "schema_mismatch"),
        (chain(step(onbox="the bus")), "schema_mismatch"),
        (chain(*[step()] * 65), "too_many_steps"),
        (metadata(final_com={}), "schema_mismatch"),
        (metadata(final_com=[step()]), "schema_mismatch"),
        (metadata(final_com={"0,0--1,0": "look"}), "schema_mismatch"),
        ({"question": "?", "answer": "a"}, "schema_mismatch"),
        ([], "schema_mismatch"),
        ([metadata()] * 65, "schema_mismatch"),
        (["text"], "schema_mismatch"),
        ("text", "schema_mismatch"),
        (None, "schema_mismatch"),
        (b"", "schema_mismatch"),
        (b"no pickle at all", "schema_mismatch"),
        (pickle.dumps(metadata())[:-9], "schema_mismatch"),
        (b"N" * (2**20 + 1), "schema_mismatch"),
        (np.float64(1.0), "unsafe_pickle"),
        (metadata(final_com={"0,0--1,0": grounding(np.array([2, 3, 22, 23]))}), "unsafe_pickle"),
        (metadata(question=b"bytes"), "unsafe_pickle"),
        (metadata(com_founds={1, 2}), "unsafe_pickle"),
    ],
)
def test_a_bad_question_is_rejected_with_its_reason(tmp_path: Path, question: Any, expected: str) -> None:
    assert reason(tmp_path, question) == expected


class Runs:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.made,)


def test_metadata_that_would_run_code_is_rejected_and_does_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "source").mkdir()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        item = only(tmp_path / "source", pickle.dumps(metadata(extra=Runs(made)), protocol))
        assert isinstance(item, Rejection) and item.reason == "unsafe_pickle" and "GLOBAL" in item.detail
        assert item.id == "com/train/000000"
    assert not made.exists()


GOOD = pickle.dumps(metadata())


def test_the_members_of_a_key_may_come_in_any_order(tmp_path: Path) -> None:
    write(
        tmp_path / "train.tar",
        [
            ("b.pyd", GOOD),
            ("b.JPG", png()),
            ("folder/a.png", png()),
            ("folder/a.txt", b"passed over"),
            ("folder/a.pyd", GOOD),
        ],
    )
    assert [one.id for one in items(tmp_path) if isinstance(one, Record)] == ["com/train/b", "com/train/folder/a"]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.pyd", GOOD)], ["image_missing"]),
        ([("a.pyd", GOOD), ("a.png", b"")], ["image_missing"]),
        ([("a.png", png())], ["schema_mismatch"]),
        ([("a.png", png()), ("b.pyd", GOOD)], ["schema_mismatch", "image_missing"]),
        (
            [("a.png", png()), ("b.png", png()), ("a.pyd", GOOD)],
            ["schema_mismatch", "schema_mismatch", "image_missing"],
        ),
        ([("a.png", png()), ("a.jpg", png()), ("a.pyd", GOOD)], ["schema_mismatch"]),
        ([("a.png", png()), ("a.pyd", GOOD), ("a.pyd", GOOD)], ["schema_mismatch"]),
        ([("a.png", png()[:60]), ("a.pyd", GOOD)], ["image_unreadable"]),
        ([("a.png", png(4, 4)), ("a.pyd", GOOD)], ["image_too_small"]),
        ([("../a.png", png()), ("../a.pyd", GOOD)], ["path_escape"]),
        ([("/a.png", png()), ("/a.pyd", GOOD)], ["path_escape"]),
        ([("C:/a.png", png()), ("C:/a.pyd", GOOD)], ["path_escape"]),
        ([("a.png", "/etc/passwd"), ("a.pyd", GOOD)], ["path_escape"]),
        ([("a.png", png()), ("a.pyd", "b.pyd")], ["path_escape"]),
    ],
)
def test_a_key_with_a_bad_member_is_rejected_with_its_reason(
    tmp_path: Path, members: list[tuple[str, bytes | str]], expected: list[str]
) -> None:
    write(tmp_path / "train.tar", [*members, ("z.png", png()), ("z.pyd", GOOD)])
    *bad, good = items(tmp_path)
    assert [one.reason for one in bad if isinstance(one, Rejection)] == expected
    assert isinstance(good, Record)


def test_a_member_beyond_any_image_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "train.tar", [("a.png", bytes(2**21)), ("a.pyd", GOOD)])
    (item,) = items(tmp_path, max_image_pixels=64)
    assert isinstance(item, Rejection) and item.reason == "image_too_large" and "2097152 bytes" in item.detail


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("left", [0.2, 0.5, 0.9])
def test_a_truncated_tar_stops_the_run_and_names_the_member(tmp_path: Path, left: float, mode: str) -> None:
    path = shard(tmp_path / ("train.tar.gz" if mode == "w:gz" else "train.tar"), *[metadata()] * 20, mode=mode)
    if mode == "w:gz":
        size = path.stat().st_size
    else:
        # Zeros fill the last block of a tar up to 10 KiB.
        size = len(path.read_bytes().rstrip(b"\0"))
    os.truncate(path, int(size * left))
    with pytest.raises(SourceError, match=r"train\.tar(\.gz)?, member (0000|its first).*\(bad_tar\)"):
        items(tmp_path)


def test_a_tar_cut_between_two_members_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    path = shard(tmp_path / "train.tar", metadata(), metadata())
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    os.truncate(path, third)
    with pytest.raises(SourceError, match=r"member 000000.pyd: .*no end mark"):
        items(tmp_path)


def test_a_damaged_header_and_a_second_archive_behind_the_first_stop_the_run(tmp_path: Path) -> None:
    path = shard(tmp_path / "train.tar", metadata(), metadata())
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(whole[: third + 5] + b"damaged" + whole[third + 12 :])
    with pytest.raises(SourceError, match=r"member 000000\.pyd: bad checksum"):
        items(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(SourceError, match="data after the end of the archive"):
        items(tmp_path)


@pytest.mark.parametrize("data", [b"", b"no tar", bytes(5), b"\x1f\x8b" + bytes(40)])
def test_what_is_no_tar_stops_the_run(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "train.tar").write_bytes(data)
    with pytest.raises(SourceError, match="bad_tar"):
        items(tmp_path)


def test_compressed_tars_and_the_splits_of_their_names_are_read(tmp_path: Path) -> None:
    shard(tmp_path / "test-0.tar.gz", metadata(), mode="w:gz")
    shard(tmp_path / "train-0.tgz", metadata(), mode="w:gz")
    shard(tmp_path / "val-0.tar", metadata())
    found = [(one.id, one.split) for one in items(tmp_path) if isinstance(one, Record)]
    assert found == [("com/test-0/000000", "test"), ("com/train-0/000000", "train"), ("com/val-0/000000", "validation")]


def test_shares_together_read_what_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_ROWS", 4)
    questions = [[metadata()] * (number % 5 + 1) for number in range(12)]
    shard(tmp_path / "a.tar", *questions[:7], b"broken")
    shard(tmp_path / "b.tar", *questions[7:])
    reading = sources.located("com", str(tmp_path), DATA, SETTINGS)
    whole = list(sources.read(reading))
    assert [one.number for one in whole] == list(range(len(whole)))
    parts = [one for index in range(3) for one in sources.read(reading, Share(index, 3))]
    assert sorted(parts, key=lambda one: one.number) == whole
    assert sum(isinstance(one.item, Rejection) for one in whole) == 1


def test_the_image_of_several_questions_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    embedded = Reading.embedded
    monkeypatch.setattr(Reading, "embedded", lambda *given: decoded.append(given) or embedded(*given))
    shard(tmp_path / "train.tar", [metadata(), chain(step())])
    first, second = items(tmp_path)
    assert isinstance(first, Record) and isinstance(second, Record)
    assert first.images[0] is second.images[0] and len(decoded) == 1


def test_images_of_keys_that_another_process_reads_are_not_read(tmp_path: Path) -> None:
    shard(tmp_path / "train.tar", *[metadata()] * 3)
    reading = sources.located("com", str(tmp_path), DATA, SETTINGS)
    for row in cogcom.rows(reading, lambda number: False):
        assert row.load()["image"].reason == "image_missing"


@pytest.mark.timeout(120)
def test_mutated_tars_end_in_records_rejections_or_one_error(tmp_path: Path) -> None:
    chance = random.Random(3)
    whole = shard(tmp_path / "train.tar", metadata(), [chain(step()), metadata()]).read_bytes().rstrip(b"\0") + bytes(
        1024
    )
    outcomes = {"read": 0, "stopped": 0}
    for turn in range(1000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 5)):
            # Half of the changes hit the first header.
            at = chance.randrange(512 if turn % 2 else len(data))
            data[at : at + chance.randrange(1, 9)] = bytes(chance.randrange(256) for _ in range(chance.randrange(9)))
        if turn % 2:
            # A header with a right checksum reaches the code behind the check.
            header = data[:148] + b" " * 8 + data[156:512]
            data[148:156] = f"{sum(header):06o}\0 ".encode()
        if turn % 5 == 0:
            del data[chance.randrange(len(data)) :]
        (tmp_path / "train.tar").write_bytes(data)
        try:
            for item in items(tmp_path):
                assert isinstance(item, Record) or item.reason in REASONS
            outcomes["read"] += 1
        except SourceError:
            outcomes["stopped"] += 1
    assert all(outcomes.values()), outcomes
