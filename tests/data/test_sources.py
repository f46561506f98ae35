from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.made import jsonl_source, png, recipe, row
from valr_ops.data import sources
from valr_ops.data.images import decode
from valr_ops.data.records import REASONS, Record, Rejection, Target
from valr_ops.data.sources import SourceError, jsonl, visual_cot, zebra_cot

DATA = recipe().data
NLVR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "nlvr"


def read_one(folder: Path, one: Any, **data: Any) -> Record | Rejection:
    limits = recipe(**data).data
    items = list(jsonl.read(jsonl_source(folder, train=[one]), "mine", limits))
    assert len(items) == 1
    return items[0]


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
    ("reserved_token_in_text", row(question="now <latent> then")),
    ("reserved_token_in_text", row(answer="yes<|im_end|>")),
    ("reserved_token_in_text", row(steps=[{"text": "<|IMAGE_PAD|>", "image": 0}])),
    ("no_images", row(images=[], steps=[{"text": "a"}])),
    ("no_steps", row(steps=[])),
    ("too_many_steps", row(steps=[TINY_STEP] * 65)),
    ("uncited_image", row(images=["images/0.png", {"path": "images/1.png", "role": "step"}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [0, 0, 41, 20]}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [20, 0, 0, 20]}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [0, 0, float("nan"), 20]}])),
    ("bbox_invalid", row(steps=[{**TINY_STEP, "box": [0, 0, 20]}])),
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


def test_every_reason_that_a_reader_gives_is_in_the_table_of_reasons(tmp_path: Path) -> None:
    given = {reason for reason, _ in BAD_LINES} | {reason for reason, _ in BAD_IMAGES}
    elsewhere = {
        *("benchmark_image", "duplicate_content", "duplicate_id"),
        *("bbox_disagrees", "crop_is_whole_image", "placeholder_count", "unbalanced_tags"),
    }
    assert given | elsewhere == set(REASONS)


def test_a_bad_line_does_not_stop_the_lines_after_it(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path, train=[row(0), b"{", b"", row(1)])
    items = list(jsonl.read(folder, "mine", DATA))
    assert [type(item) for item in items] == [Record, Rejection, Record]


def test_splits_are_files_and_a_single_file_is_a_source_too(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path, train=[row(0)], test=[row(1, steps=[])], other=[row(2)])
    assert [item.id for item in jsonl.read(folder, "m", DATA, "test")] == ["m/r1"]
    assert [item.id for item in jsonl.read(folder, "m", DATA)] == ["m/r0", "m/r1"]
    assert [item.id for item in jsonl.read(folder / "other.jsonl", "m", DATA, "train")] == ["m/r2"]
    assert list(jsonl.read(folder / "test.jsonl", "m", DATA, "train")) == []


@pytest.mark.parametrize("make", ["nothing", "empty", "wrong"])
@pytest.mark.parametrize("format_name", ["jsonl", "zebra_cot", "visual_cot"])
def test_a_folder_without_anything_to_read_is_one_error_that_names_it(
    tmp_path: Path, make: str, format_name: str
) -> None:
    folder = tmp_path / "source"
    if make != "nothing":
        folder.mkdir()
    if make == "wrong":
        (folder / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"source.*data\.sources\.mine\.path"):
        list(sources.read(folder, "mine", format_name, DATA))


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
    (record,) = zebra_cot.read(zebra(tmp_path, [zebra_row()]), "zebra", DATA)
    assert isinstance(record, Record)
    assert record.id == "zebra/config/train-00000/0"
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
    (record,) = zebra_cot.read(zebra(tmp_path, [both]), "zebra", DATA)
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
    ("reserved_token_in_text", zebra_row(**{"Text Reasoning Trace": f"THOUGHT 0: {ONE} a </latent>"})),
]


@pytest.mark.parametrize(("reason", "bad"), BAD_ZEBRAS)
def test_a_bad_zebra_cot_row_is_rejected_and_the_next_one_read(
    tmp_path: Path, reason: str, bad: dict[str, Any]
) -> None:
    rejected, good = zebra_cot.read(zebra(tmp_path, [bad, zebra_row()]), "zebra", DATA)
    assert isinstance(rejected, Rejection) and rejected.reason == reason
    assert "row 0" in rejected.detail
    assert isinstance(good, Record)


def test_a_broken_parquet_file_or_other_columns_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(SourceError, match=r"a\.parquet.*bad_parquet"):
        list(zebra_cot.read(tmp_path, "zebra", DATA))
    pq.write_table(pa.table({"question": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="no column 'Question'"):
        list(zebra_cot.read(tmp_path, "zebra", DATA))


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
    templated, given = visual_cot.read(visual(tmp_path, [visual_row(), told]), "vis", DATA)
    assert isinstance(templated, Record) and isinstance(given, Record)
    assert templated.id == "vis/textvqa/7"
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
    ("split_not_train", visual_row(split="val")),
    ("schema_mismatch", visual_row(split="dev")),
    ("schema_mismatch", visual_row(image=["a.png"])),
    ("schema_mismatch", visual_row(image=["a.png", "b.png###[20, 10, 60, 50]"])),
    ("schema_mismatch", visual_row(conversations=[])),
    ("schema_mismatch", 3),
    ("path_escape", visual_row(image=["../a.png", "../a.png###[20, 10, 60, 50]"])),
]


@pytest.mark.parametrize(("reason", "bad"), BAD_VISUALS)
def test_a_bad_visual_cot_element_is_rejected_and_the_next_one_read(tmp_path: Path, reason: str, bad: Any) -> None:
    rejected, good = visual_cot.read(visual(tmp_path, [bad, visual_row()]), "vis", DATA, "train")
    assert isinstance(rejected, Rejection) and rejected.reason == reason
    assert "viscot.json element 0" in rejected.detail
    assert isinstance(good, Record)


def test_visual_cot_reads_an_array_longer_than_its_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visual_cot, "_CHUNK", 16)
    folder = visual(tmp_path, [visual_row(question_id=number) for number in range(5)])
    assert [item.id for item in visual_cot.read(folder, "v", DATA)] == [f"v/textvqa/{n}" for n in range(5)]


@pytest.mark.parametrize("text", ["", "{}", '[{"a": 1}', '[{"a": 1} {"b": 2}]', "[" * 100_000, '[{"a": 1}, {"b": ]'])
def test_a_visual_cot_file_that_is_no_array_stops_the_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "viscot.json").write_text(text)
    with pytest.raises(SourceError, match=r"viscot\.json.*not_json"):
        list(visual_cot.read(tmp_path, "vis", DATA))


def test_check_counts_by_reason_what_the_corpus_would_not_take(tmp_path: Path) -> None:
    rows = [row(0), row(0), row(1, id="again", images=["images/0.png"]), row(3), row(4), b"{"]
    found = sources.check(jsonl_source(tmp_path, train=rows, test=[row(3)]), DATA)
    assert (found.format, found.read, found.kept) == ("jsonl", 7, 3)
    assert found.splits == {"train": 2, "test": 1}
    assert found.reasons == {"duplicate_id": 1, "duplicate_content": 1, "benchmark_image": 1, "not_json": 1}
    assert [record.split for record in found.first] == ["train", "train"]
    assert "line 6" in found.examples["not_json"]


def test_check_data_ends_with_counts_and_status_three_for_a_rejection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closing: list[dict[str, Any]] = []

    def last_line(**values: Any) -> None:
        closing.append(values)

    bad = jsonl_source(tmp_path / "bad", train=[row(0, question="[red]what[/red]?"), b"{"])
    good = jsonl_source(tmp_path / "good", train=[row(0)])
    assert sources.check_and_show(bad, recipe(), last_line) == 3
    assert sources.check_and_show(good, recipe(), last_line) == 0
    assert closing[0]["rejected"] == {"not_json": 1} and closing[1]["rejected"] == {}
    assert "[red]what[/red]?" in capsys.readouterr().out


@pytest.mark.skipif(not NLVR.is_dir(), reason="shared/data/nlvr is not here")
def test_every_nlvr_record_is_readable() -> None:
    items = list(jsonl.read(NLVR, "nlvr", DATA))
    assert len(items) == 2968
    assert [item for item in items if isinstance(item, Rejection)] == []
