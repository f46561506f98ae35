from __future__ import annotations

import ast
import importlib
import io
import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import valr_ops.data
from tests.data.made import jsonl_source, png, recipe, row
from valr_ops.data import sources
from valr_ops.data.images import decode
from valr_ops.data.records import REASONS, Record, Rejection, SourceError, Split, Target
from valr_ops.data.sources import Read, Share, visual_cot
from valr_ops.recipe.recipe import DataRecipe, SourceRecipe

DATA = recipe().data
NLVR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "nlvr"


def rows_of(
    folder: Path,
    form: str,
    splits: tuple[Split, ...] = sources.SPLITS,
    data: DataRecipe = DATA,
    share: Share = Share(),  # noqa: B008
    **settings: Any,
) -> list[Read]:
    """What became of every row of a folder or file in that format, as a source called ``mine``."""
    opened = sources.located("mine", str(folder), data, SourceRecipe(format=form, **settings))  # type: ignore[arg-type]
    return list(sources.read(opened, share, splits))


def items(folder: Path, form: str, *splits: Split) -> list[Record | Rejection]:
    return [one.item for one in rows_of(folder, form, splits or sources.SPLITS)]


def read_one(folder: Path, one: Any, **data: Any) -> Record | Rejection:
    (read,) = rows_of(jsonl_source(folder, train=[one]), "jsonl", data=recipe(**data).data)
    return read.item


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that declares huge sides."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_a_good_line_becomes_a_record_with_its_target(tmp_path: Path) -> None:
    record = read_one(tmp_path, row(3))
    assert isinstance(record, Record)
    assert (record.id, record.source, record.license, record.split) == ("mine/r3", "mine", "CC0-1.0", "train")
    assert record.kind == "single_view"
    assert (record.images[0].width, record.images[0].height) == (40, 30)
    assert record.steps[0].target == Target(0, (0, 0, 20, 20), "dataset")


def test_a_step_without_an_image_looks_at_the_only_one_unless_it_says_null(tmp_path: Path) -> None:
    record = read_one(tmp_path, row(steps=[{"text": "a"}, {"text": "b", "image": None}]))
    assert isinstance(record, Record)
    assert [step.target for step in record.steps] == [Target(0, None, "only_image"), None]


def test_step_images_make_an_interleaved_record_and_two_inputs_a_multi_view_one(tmp_path: Path) -> None:
    images = ["images/0.png", {"path": "images/1.png", "role": "step"}]
    interleaved = read_one(tmp_path / "a", row(images=images, steps=[{"text": "a", "image": 1}]))
    several = read_one(tmp_path / "b", row(images=["images/0.png", "images/1.png"], steps=[{"text": "a", "image": 1}]))
    assert isinstance(interleaved, Record) and interleaved.kind == "interleaved"
    assert [image.role for image in interleaved.images] == ["input", "step"]
    assert isinstance(several, Record) and several.kind == "multi_view"


TINY_STEP = {"text": "a", "image": 0}
BAD_LINES: list[tuple[str, Any]] = [
    ("not_json", b'{"id": "x", '),
    ("not_json", b"[1, 2]"),
    ("not_json", b"[" * 100_000),
    ("not_json", b'{"id": ' + b"9" * 5000 + b"}"),
    ("not_utf8", b'{"id": "\xff"}'),
    ("not_utf8", row(question="half a pair \ud800")),
    ("schema_mismatch", {"id": "x"}),
    ("schema_mismatch", row(anwser="typo")),
    ("schema_mismatch", row(question=7)),
    ("schema_mismatch", row(images="images/0.png")),
    ("schema_mismatch", row(steps=["text"])),
    ("schema_mismatch", row(steps=[{"text": "a", "image": 1}])),
    ("schema_mismatch", row(steps=[{"text": "a", "image": True}])),
    ("schema_mismatch", row(steps=[{"text": "a", "image": 0, "bbox": [0, 0, 9, 9]}])),
    ("schema_mismatch", row(steps=[{"text": "a", "image": None, "box": [0, 0, 9, 9]}])),
    ("schema_mismatch", row(images=[{"path": "images/0.png", "role": "output"}])),
    ("split_not_train", row(split="test")),
    ("empty_question", row(question="  \n")),
    ("empty_answer", row(answer="")),
    ("empty_reasoning", row(steps=[{"text": " ", "image": 0}])),
    ("reserved_token_in_text", row(question="now <lvr> then")),
    ("reserved_token_in_text", row(answer="yes</ABS_VIS_TOKEN>")),
    ("reserved_token_in_text", row(steps=[{"text": "<image> shows", "image": 0}])),
    ("control_character", row(question="a\0b")),
    ("control_character", row(answer="a\x1bb")),
    ("control_character", row(steps=[{"text": "a\u202eb", "image": 0}])),
    ("too_long", row(question="a" * 1_000_001)),
    ("no_images", row(images=[], steps=[{"text": "a"}])),
    ("no_steps", row(steps=[])),
    ("too_many_steps", row(steps=[TINY_STEP] * 65)),
    ("uncited_image", row(images=["images/0.png", {"path": "images/1.png", "role": "step"}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [0, 0, 41, 20]}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [20, 0, 0, 20]}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [0, 0, float("nan"), 20]}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [0, 0, 20]}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [0, 0, 10**400, 20]}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": "__import__('os')"}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [0, 0, 4, 20]}])),
    ("image_missing", row(images=["images/none.png"])),
    ("image_missing", row(images=["images"])),
    ("image_missing", row(images=["images/" + "x" * 5000])),
    ("path_escape", row(images=["../secret.png"])),
    ("path_escape", row(images=["images/../../secret.png"])),
    ("path_escape", row(images=["/etc/passwd"])),
    ("path_escape", row(images=["C:\\secret.png"])),
    ("path_escape", row(images=["images\\..\\..\\secret.png"])),
    ("path_escape", row(images=["images/\0.png"])),
]


@pytest.mark.parametrize(("reason", "line"), BAD_LINES)
def test_a_bad_line_is_rejected_with_its_reason_and_place(tmp_path: Path, reason: str, line: Any) -> None:
    item = read_one(tmp_path, line)
    assert isinstance(item, Rejection)
    assert item.reason == reason
    assert "train.jsonl line 1" in item.detail and len(item.detail) < 400


BAD_IMAGES: list[tuple[str, bytes]] = [
    ("image_missing", b""),
    ("image_unreadable", b"no picture"),
    ("image_unreadable", png()[:-30]),
    ("image_unreadable", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ("image_too_small", png(40, 7)),
    ("image_too_small", png(1, 1)),
    ("image_too_large", png(400, 300)),
    ("image_too_large", bomb(60_000, 60_000)),
    ("image_too_large", bomb(10_000, 10_000)),
    ("image_aspect", png(9 * 201, 8)),
]


@pytest.mark.parametrize(("reason", "data"), BAD_IMAGES)
def test_a_bad_image_is_rejected_with_its_reason(tmp_path: Path, reason: str, data: bytes) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(data)
    item = read_one(tmp_path, row(images=["images/bad.png"], steps=[{"text": "a"}]), max_image_pixels=50_000)
    assert isinstance(item, Rejection)
    assert item.reason == reason


def test_a_link_that_leaves_the_folder_is_refused_and_one_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    root = jsonl_source(tmp_path / "source")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "images" / "0.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    outside, inside, loop = (read_one(root, row(images=[f"{name}.png"])) for name in ("out", "in", "loop"))
    assert isinstance(outside, Rejection) and outside.reason == "path_escape"
    assert isinstance(inside, Record)
    assert isinstance(loop, Rejection) and loop.reason == "image_missing"


@pytest.mark.parametrize("linked", ["config/train-1.parquet", "config"])
def test_a_linked_file_or_folder_that_would_be_left_out_stops_the_run(tmp_path: Path, linked: str) -> None:
    zebra(tmp_path / "elsewhere", [zebra_row()], "config/train-1.parquet")
    root = zebra(tmp_path / "source", [zebra_row()], "train-0.parquet")
    (root / linked).parent.mkdir(exist_ok=True)
    (root / linked).symlink_to(tmp_path / "elsewhere" / linked)
    with pytest.raises(SourceError, match=rf"'mine': {linked}/? is a link.*cp -rL.*data\.sources\.mine\.path"):
        items(root, "zebra_cot")
    assert sources.format_of(str(root)) == "zebra_cot"


def test_of_a_jsonl_source_only_a_linked_annotation_file_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train.jsonl").write_text("{}")
    root = jsonl_source(tmp_path / "source", test=[row(0)])
    (root / "other").symlink_to(tmp_path / "elsewhere")
    (root / "other.jsonl").symlink_to(tmp_path / "elsewhere" / "train.jsonl")
    assert len(items(root, "jsonl")) == 1
    (root / "train.jsonl").symlink_to(tmp_path / "elsewhere" / "train.jsonl")
    with pytest.raises(SourceError, match=r"train\.jsonl is a link"):
        items(root, "jsonl")


def test_a_folder_of_links_alone_still_tells_its_format(tmp_path: Path) -> None:
    zebra(tmp_path / "blobs", [zebra_row()], "0123")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train-0.parquet").symlink_to(tmp_path / "blobs" / "0123")
    assert sources.format_of(str(tmp_path / "snapshot")) == "zebra_cot"
    with pytest.raises(SourceError, match=r"train-0\.parquet is a link"):
        items(tmp_path / "snapshot", "zebra_cot")
    # Where the files lie in the same folder, as in a hub's cache, links to them are followed.
    assert [type(item) for item in items(tmp_path, "zebra_cot")] == [Record]


def test_control_tokens_in_a_text_are_escaped_so_that_no_record_opens_a_segment(tmp_path: Path) -> None:
    steps = [{"text": "<|IMAGE_PAD|> and </latent>", "image": 0}]
    record = read_one(tmp_path, row(question="now <latent> then", answer="a < b<|im_end|>", steps=steps))
    assert isinstance(record, Record)
    assert record.question == "now &lt;latent> then"
    assert record.steps[0].text == "&lt;|IMAGE_PAD|> and &lt;/latent>"
    assert record.answer == "a < b&lt;|im_end|>"


def calls(function: str) -> Iterable[ast.Call]:
    """Calls of a function of this name anywhere in the package that reads data."""
    for path in sorted(Path(valr_ops.data.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                yield node


def test_every_reason_that_a_reader_gives_is_in_the_table_of_reasons() -> None:
    reasons = [call.args[0] for call in calls("BadRecord")] + [call.args[2] for call in calls("check_text")]
    given = {reason.value for reason in reasons if isinstance(reason, ast.Constant)}
    assert len(given) > 20
    assert given <= set(REASONS)
    assert {reason for reason, _ in (*BAD_LINES, *BAD_IMAGES, *BAD_ZEBRAS, *BAD_VISUALS)} <= given


def test_a_bad_line_does_not_stop_the_lines_after_it(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path, train=[row(0), b"{", b"", row(1)])
    assert [type(item) for item in items(folder, "jsonl")] == [Record, Rejection, Record]


def test_splits_are_files_and_a_single_file_is_a_source_too(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path, train=[row(0)], test=[row(1, steps=[])], other=[row(2)])
    assert [item.id for item in items(folder, "jsonl", "test")] == ["mine/r1"]
    assert [item.id for item in items(folder, "jsonl")] == ["mine/r1", "mine/r0"]
    assert [item.id for item in items(folder / "other.jsonl", "jsonl", "train")] == ["mine/r2"]
    assert items(folder / "test.jsonl", "jsonl", "train") == []


@pytest.mark.parametrize("make", ["nothing", "empty", "wrong"])
@pytest.mark.parametrize("form", sorted(sources.FORMATS))
def test_a_folder_without_anything_to_read_is_one_error_that_names_it(tmp_path: Path, make: str, form: str) -> None:
    folder = tmp_path / "source"
    if make != "nothing":
        folder.mkdir()
    if make == "wrong":
        (folder / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"source.*data\.sources\.mine\.path"):
        rows_of(folder, form)


def test_pixels_follow_the_exif_orientation_and_transparency_lies_on_white(tmp_path: Path) -> None:
    picture = PIL.Image.new("RGB", (20, 10), "black")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, format="JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(file.getvalue())
    record = read_one(tmp_path, row(images=["turned.jpg"], steps=[{"text": "a", "box": [0, 10, 10, 20]}]))
    assert isinstance(record, Record)
    assert (record.images[0].width, record.images[0].height) == (10, 20)
    assert decode(record.images[0].data).size == (10, 20)
    assert decode(record.images[0].data, (0, 10, 10, 20)).size == (10, 10)
    assert decode(png(8, 8, (255, 0, 0, 0), "RGBA")).getpixel((0, 0)) == (255, 255, 255)
    assert decode(png(8, 8, 40_000, "I;16")).getpixel((0, 0)) == (156, 156, 156)


def test_of_an_animation_the_first_frame_counts_and_cmyk_becomes_rgb(tmp_path: Path) -> None:
    frames = [PIL.Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    PIL.Image.new("CMYK", (20, 10), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    for name in ("moving.gif", "print.jpg"):
        record = read_one(tmp_path, row(images=[name], steps=[{"text": "a"}]))
        assert isinstance(record, Record) and len(record.images) == 1
        red, green, blue = decode(record.images[0].data).getpixel((5, 5))  # type: ignore[misc]
        assert red > 240 and green < 15 and blue < 15


def test_a_record_of_ten_thousand_steps_is_rejected(tmp_path: Path) -> None:
    item = read_one(tmp_path, row(steps=[{"text": f"step {number}"} for number in range(10_000)]))
    assert isinstance(item, Rejection) and item.reason == "too_many_steps"


def test_damaged_metadata_of_a_turned_image_does_not_stop_what_shows_its_pixels(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    file = io.BytesIO()
    PIL.Image.new("RGB", (20, 10), "black").save(file, format="JPEG", exif=exif)
    of_no_type = file.getvalue().replace(b"\x01\x0e\x00\x02", b"\x01\x0e\x00\x00")
    assert of_no_type != file.getvalue()
    (tmp_path / "damaged.jpg").write_bytes(of_no_type)
    record = read_one(tmp_path, row(images=["damaged.jpg"], steps=[{"text": "a"}]))
    assert isinstance(record, Record)
    assert decode(record.images[0].data).size == (10, 20)


def test_two_shares_together_read_what_one_share_reads(tmp_path: Path) -> None:
    lines = [row(number % 10, id=number, question="?" * (number % 7)) for number in range(700)]
    mixed = jsonl_source(tmp_path, train=lines[:400], test=[row(3), b"{"], validation=lines[400:])
    for limit in (None, 300):
        whole = rows_of(mixed, "jsonl", limit=limit)
        first, second = (rows_of(mixed, "jsonl", share=Share(index, 2), limit=limit) for index in (0, 1))
        assert len(first) > 100 and len(second) > 100
        assert sorted(first + second, key=lambda one: one.number) == whole
    assert len(whole) == 2 + 300 + 300
    assert [one.split for one in whole[:3]] == ["test", "test", "train"]


def test_two_shares_of_a_parquet_source_together_read_what_one_share_reads(tmp_path: Path) -> None:
    without_image = {name: cell for name, cell in zebra_row().items() if not name.startswith("reasoning_image")}
    for name in ("a/train-0.parquet", "b/train-0.parquet"):
        zebra(tmp_path, [without_image] * 270 + [zebra_row()], name)
    whole = rows_of(tmp_path, "zebra_cot")
    first, second = (rows_of(tmp_path, "zebra_cot", share=Share(index, 2)) for index in (0, 1))
    assert [len(one) for one in (whole, first, second)] == [542, 256 + 30, 256]
    assert sorted(first + second, key=lambda one: one.number) == whole
    assert {type(one.item) for one in first} == {type(one.item) for one in second} == {Record, Rejection}


@pytest.mark.parametrize("form", ["jsonl", "zebra_cot", "visual_cot"])
def test_a_file_that_changes_while_it_is_read_stops_the_run(tmp_path: Path, form: str) -> None:
    made = {
        "jsonl": lambda: jsonl_source(tmp_path, train=[row(0), row(1)]) / "train.jsonl",
        "zebra_cot": lambda: zebra(tmp_path, [zebra_row()] * 2) / "config" / "train-00000.parquet",
        "visual_cot": lambda: visual(tmp_path, [visual_row()] * 2) / "viscot.json",
    }
    path = made[form]()
    opened = sources.located("mine", str(tmp_path), DATA, SourceRecipe(format=form))  # type: ignore[arg-type]
    going = sources.read(opened)
    next(going)
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(SourceError, match=rf"{path.name} changed while it was read"):
        list(going)


def zebra(folder: Path, rows: list[dict[str, Any]], name: str = "config/train-00000.parquet") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    texts = ["Final Answer", "Text Reasoning Trace", "Question"]
    images = ["reasoning_image_2", "reasoning_image_1", "problem_image_1", "problem_image_2"]
    schema = pa.schema([(column, pa.string()) for column in texts] + [(column, image) for column in images])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return folder


def zebra_row(**changes: Any) -> dict[str, Any]:
    return {
        "Question": "Which box? <image_start>[problem_image_1]<image_end>",
        "Text Reasoning Trace": "THOUGHT 0: I look left. <image_start>[reasoning_image_1]<image_end>\n"
        "THOUGHT 1: The ring is in the blue box.",
        "Final Answer": "blue",
        "problem_image_1": {"bytes": png(), "path": None},
        "reasoning_image_1": {"bytes": png(20, 20), "path": None},
        **changes,
    }


def test_zebra_cot_makes_an_image_the_target_of_the_text_after_it(tmp_path: Path) -> None:
    (record,) = items(zebra(tmp_path, [zebra_row()]), "zebra_cot")
    assert isinstance(record, Record)
    assert record.id == "mine/config/train-00000/0"
    assert (record.kind, record.license) == ("interleaved", "CC-BY-NC-4.0")
    assert (record.question, record.answer) == ("Which box?", "blue")
    assert [(step.text, step.target) for step in record.steps] == [
        ("I look left.", None),
        ("The ring is in the blue box.", Target(1, None, "dataset")),
    ]
    assert [image.role for image in record.images] == ["input", "step"]


def test_zebra_cot_numbers_several_problem_images_where_they_stood(tmp_path: Path) -> None:
    both = zebra_row(
        Question="Is <image_start>[problem_image_2]<image_end> like <image_start>[problem_image_1]<image_end>?",
        problem_image_2={"bytes": png(50, 50), "path": None},
    )
    (record,) = items(zebra(tmp_path, [both]), "zebra_cot")
    assert isinstance(record, Record)
    assert record.question == "Is (image 1) like (image 2)?"
    assert [image.width for image in record.images] == [50, 40, 20]


ONE = "<image_start>[reasoning_image_1]<image_end>"
BAD_ZEBRAS: list[tuple[str, dict[str, Any]]] = [
    ("image_missing", zebra_row(reasoning_image_1=None)),
    ("image_missing", zebra_row(reasoning_image_1={"bytes": None, "path": None})),
    ("path_escape", zebra_row(reasoning_image_1={"bytes": None, "path": "/etc/passwd"})),
    ("image_unreadable", zebra_row(reasoning_image_1={"bytes": png()[:40], "path": None})),
    ("uncited_image", zebra_row(reasoning_image_2={"bytes": png(), "path": None})),
    ("empty_answer", zebra_row(**{"Final Answer": None})),
    ("no_steps", zebra_row(**{"Text Reasoning Trace": f"Just text. {ONE} More."})),
    ("placeholder_count", zebra_row(**{"Text Reasoning Trace": f"THOUGHT 0: a {ONE} THOUGHT 1: {ONE} b"})),
    ("placeholder_count", zebra_row(**{"Text Reasoning Trace": f"THOUGHT 0: a {ONE}"})),
    ("unbalanced_tags", zebra_row(**{"Text Reasoning Trace": f"THOUGHT 0: {ONE} a <image_start>[x]"})),
    ("reserved_token_in_text", zebra_row(**{"Text Reasoning Trace": f"THOUGHT 0: {ONE} a <lvr>"})),
]


@pytest.mark.parametrize(("reason", "bad"), BAD_ZEBRAS)
def test_a_bad_zebra_cot_row_is_rejected_and_the_next_one_read(
    tmp_path: Path, reason: str, bad: dict[str, Any]
) -> None:
    rejected, good = items(zebra(tmp_path, [bad, zebra_row()]), "zebra_cot")
    assert isinstance(rejected, Rejection) and rejected.reason == reason
    assert "row 0" in rejected.detail
    assert isinstance(good, Record)


def test_a_broken_parquet_file_or_other_columns_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(SourceError, match=r"a\.parquet.*bad_parquet"):
        items(tmp_path, "zebra_cot")
    whole = (zebra(tmp_path / "whole", [zebra_row()] * 50) / "config" / "train-00000.parquet").read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 10):
        (tmp_path / "a.parquet").write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"a\.parquet.*bad_parquet"):
            items(tmp_path, "zebra_cot")
    pq.write_table(pa.table({"question": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="no column 'Question'"):
        items(tmp_path, "zebra_cot")


def visual(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(png(200, 100))
    (folder / "viscot.json").write_text(json.dumps(rows))
    return folder


def visual_row(box: str = "[20, 10, 60, 50]", normalised: str = "[0.1, 0.3, 0.3, 0.5]", **changes: Any) -> Any:
    request = "Please provide the bounding box coordinate of the region that can help you."
    return {
        "question_id": 7,
        "dataset": "textvqa",
        "split": "train",
        "width": 200,
        "height": 100,
        "image": ["a.png", f"a.png###{box}"],
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is the brand? {request}"},
            {"from": "gpt", "value": normalised},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "Acme"},
        ],
        **changes,
    }


def test_visual_cot_strips_the_request_and_looks_at_the_box(tmp_path: Path) -> None:
    told = visual_row(cot_with_detailed_reasoning_steps=["The sign is left.", "It says Acme."], question_id=8)
    templated, given = items(visual(tmp_path, [visual_row(), told]), "visual_cot")
    assert isinstance(templated, Record) and isinstance(given, Record)
    assert templated.id == "mine/textvqa/7"
    assert (templated.question, templated.answer) == ("What is the brand?", "Acme")
    assert templated.steps[0].text == visual_cot.TEMPLATE_STEP
    assert given.steps[0].text == "The sign is left. It says Acme."
    assert templated.steps[0].target == Target(0, (20, 10, 60, 50), "crop")


BAD_VISUALS: list[tuple[str, Any]] = [
    ("bbox_disagrees", visual_row(normalised="[0.1, 0.1, 0.3, 0.5]")),
    ("bbox_disagrees", visual_row(width=400)),
    ("bbox_invalid", visual_row(box="[20, 10, 60]")),
    ("bbox_invalid", visual_row(box="[20, 10, 60, 2**9]")),
    ("bbox_invalid", visual_row(normalised="__import__('os').getcwd()")),
    ("bbox_invalid", visual_row(box="[60, 10, 20, 50]")),
    ("crop_is_whole_image", visual_row(box="[0, 0, 200, 100]", normalised="[0, 0.25, 1.0, 0.75]")),
    ("schema_mismatch", visual_row(split="dev")),
    ("schema_mismatch", visual_row(image=["a.png"])),
    ("schema_mismatch", visual_row(image=["a.png", "b.png###[20, 10, 60, 50]"])),
    ("schema_mismatch", visual_row(conversations=[])),
    ("schema_mismatch", 3),
    ("path_escape", visual_row(image=["../a.png", "../a.png###[20, 10, 60, 50]"])),
]


@pytest.mark.parametrize(("reason", "bad"), BAD_VISUALS)
def test_a_bad_visual_cot_element_is_rejected_and_the_next_one_read(tmp_path: Path, reason: str, bad: Any) -> None:
    rejected, good = items(visual(tmp_path, [bad, visual_row()]), "visual_cot", "train")
    assert isinstance(rejected, Rejection) and rejected.reason == reason
    assert "viscot.json element 0" in rejected.detail
    assert isinstance(good, Record)


def test_visual_cot_reads_each_element_into_the_split_that_it_names(tmp_path: Path) -> None:
    names = ["test", "val", "train", "validation"]
    folder = visual(tmp_path, [visual_row(question_id=number, split=name) for number, name in enumerate(names)])
    assert [one.split for one in rows_of(folder, "visual_cot")] == ["test", "validation", "train", "validation"]
    assert [item.id for item in items(folder, "visual_cot", "validation")] == ["mine/textvqa/1", "mine/textvqa/3"]


def lvr_row(
    told: str = "<lvr>\n<answer> Acme </answer>", boxes: Any = ((0.1, 0.1, 0.3, 0.5),), **changes: Any
) -> dict[str, Any]:
    asked = {"from": "human", "value": "<image>\nWhat is the brand?"}
    return {
        "question_id": 7,
        "dataset": "textvqa",
        "split": "train",
        "image": ["a.png"],
        "bboxes": boxes,
        "conversations": [asked, {"from": "gpt", "value": told}],
        **changes,
    }


def test_the_form_with_lvr_looks_at_boxes_of_the_image_as_it_is(tmp_path: Path) -> None:
    told = "I search. <lvr> A sign. <lvr><answer>Acme</answer>"
    two = lvr_row(told, [[0.1, 0.1, 0.3, 0.5], [0.29, 0.57, 1.0, 0.99]], question_id=8)
    one, several = items(visual(tmp_path, [lvr_row(), two]), "visual_cot")
    assert isinstance(one, Record) and isinstance(several, Record)
    assert (one.id, one.question, one.answer) == ("mine/textvqa/7", "What is the brand?", "Acme")
    assert [(step.text, step.target) for step in one.steps] == [
        (visual_cot.TEMPLATE_STEP, Target(0, (20, 10, 60, 50), "crop"))
    ]
    assert [(step.text, step.target) for step in several.steps] == [
        ("I search.", None),
        ("A sign.", Target(0, (20, 10, 60, 50), "crop")),
        (visual_cot.TEMPLATE_STEP, Target(0, (58, 57, 200, 99), "crop")),
    ]


BAD_LVR: list[tuple[str, Any]] = [
    ("unbalanced_tags", lvr_row("<lvr> Acme")),
    ("unbalanced_tags", lvr_row("<lvr> <answer>a</answer> <answer>b</answer>")),
    ("placeholder_count", lvr_row("<answer>Acme</answer>")),
    ("placeholder_count", lvr_row("<lvr><lvr><answer>Acme</answer>")),
    (
        "placeholder_count",
        lvr_row(conversations=[{"from": who, "value": "<image><image>"} for who in ("human", "gpt")]),
    ),
    ("empty_answer", lvr_row("<lvr><answer> </answer>")),
    ("no_steps", lvr_row("<answer>Acme</answer>", [])),
    ("bbox_invalid", lvr_row(boxes=[[0.1, 0.1, 0.3, 1.1]])),
    ("bbox_invalid", lvr_row(boxes=[[0.3, 0.1, 0.1, 0.5]])),
    ("bbox_invalid", lvr_row(boxes=[[0.1, 0.1, 0.3, "0.5"]])),
    ("bbox_invalid", lvr_row(boxes=[[0.1, 0.1, 0.3, 10**400]])),
    ("bbox_invalid", lvr_row(boxes=[[0.1, 0.1, 0.3, 1e308]])),
    ("bbox_invalid", lvr_row(boxes=[0.1, 0.1, 0.3, 0.5][:1])),
    ("crop_is_whole_image", lvr_row(boxes=[[0, 0, 1, 1]])),
    ("schema_mismatch", lvr_row(boxes="[0.1, 0.1, 0.3, 0.5]")),
    ("schema_mismatch", lvr_row(image=["a.png", "a.png"])),
    ("schema_mismatch", lvr_row(conversations=visual_row()["conversations"])),
    ("path_escape", lvr_row(image=["/a.png"])),
]


@pytest.mark.parametrize(("reason", "bad"), BAD_LVR)
def test_a_bad_element_of_the_form_with_lvr_is_rejected(tmp_path: Path, reason: str, bad: Any) -> None:
    rejected, good = items(visual(tmp_path, [bad, lvr_row()]), "visual_cot", "train")
    assert isinstance(rejected, Rejection) and rejected.reason == reason
    assert isinstance(good, Record)


def test_visual_cot_reads_an_array_longer_than_its_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("valr_ops.data.sources.reading"), "_CHUNK", 16)
    folder = visual(tmp_path, [visual_row(question_id=number) for number in range(5)])
    assert [item.id for item in items(folder, "visual_cot")] == [f"mine/textvqa/{n}" for n in range(5)]


NO_ARRAYS = [
    ("", 0),
    ("{}", 0),
    ('[{"a": 1}', 1),
    ('[{"a": 1}, ]', 1),
    ('[{"a": 1}, ', 1),
    ('[{"a": 1} {"b": 2}]', 1),
    ("[" * 100_000, 0),
    ('[{"a": 1}, {"b": ]', 1),
    ('[{"a": 1}, {"b": 2}, {"c": "tru', 2),
    ('[{"a": 1}] [{"b": 2}]', 1),
]


@pytest.mark.parametrize(("text", "element"), NO_ARRAYS)
def test_a_file_that_is_no_array_stops_the_run_and_is_named_with_the_element(
    tmp_path: Path, text: str, element: int
) -> None:
    (tmp_path / "viscot.json").write_text(text)
    with pytest.raises(SourceError, match=rf"viscot\.json, element {element}: .*not_json"):
        items(tmp_path, "visual_cot")


@pytest.mark.skipif(not NLVR.is_dir(), reason="shared/data/nlvr is not here")
def test_every_nlvr_record_is_readable() -> None:
    found = items(NLVR, "jsonl")
    assert len(found) == 2968
    assert [item for item in found if isinstance(item, Rejection)] == []
