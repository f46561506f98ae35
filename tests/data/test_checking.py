from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.data.made import context, jsonl_source, png, recipe, row
from valr_ops.__main__ import _parser, main
from valr_ops.data import sources
from valr_ops.data.checking import check
from valr_ops.data.curation import build_cot_corpus
from valr_ops.data.inventory import build_sources
from valr_ops.data.layouts import write_layout
from valr_ops.data.records import SourceError
from valr_ops.data.showing import COLOURS, with_targets
from valr_ops.recipe.recipe import DataRecipe, SyntheticRecipe
from valr_ops.store.objects import LocalFiles
from valr_ops.store.progress import Progress

DATA = DataRecipe()


def checked(
    path: Path | str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any], str, str]:
    """Exit status, last line, what was printed, and the errors."""
    # The verb goes to the project's folder; this brings the tests back.
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setenv("COLUMNS", "100")
    status = main(["check-data", str(path), *more])
    said = capsys.readouterr()
    *shown, last = said.out.rstrip("\n").split("\n")
    return status, json.loads(last), "\n".join(line.rstrip() for line in shown), said.err


def mixed(folder: Path) -> Path:
    """Ten training rows of which five are usable, and a test row."""
    rows = [
        row(0),
        row(0, id="same as r0"),
        row(1),
        row(1, id="r0", question="Another question?"),
        row(2),
        b"{torn",
        row(3, steps=[{"text": "A wall.", "image": 0, "box": [0, 0, 900, 900]}]),
        row(4, images=["../4.png"]),
        row(5),
        row(6),
    ]
    return jsonl_source(folder, train=rows, test=[row(2, id="t"), row(7, id="u")])


def test_a_folder_of_usable_records_ends_with_0_and_shows_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(n) for n in range(5)], test=[row(7)], validation=[row(8)])
    status, last, shown, _ = checked(folder, monkeypatch, capsys)
    assert status == 0
    assert last == {
        "path": str(folder),
        "format": "jsonl",
        "read": 7,
        "kept": 7,
        "splits": {"test": 1, "train": 5, "validation": 1},
        "rejected": {},
    }
    assert [f"mine/r{number}" in shown for number in range(5)] == [True, True, True, False, False]
    assert "→ image 0, box [0, 0, 20, 20] (stated by the data)" in shown and "40 x 30" in shown


def test_what_is_unusable_ends_with_3_and_is_counted_by_reason_with_its_first_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, last, shown, _ = checked(mixed(tmp_path / "mine"), monkeypatch, capsys)
    assert (status, last["read"], last["kept"], last["splits"]) == (3, 12, 6, {"test": 2, "train": 4})
    assert last["rejected"] == {
        "bbox_invalid": 1,
        "benchmark_image": 1,
        "duplicate_content": 1,
        "duplicate_id": 1,
        "not_json": 1,
        "path_escape": 1,
    }
    assert "train.jsonl line 7" in shown and "train.jsonl line 5, image 0 is an image of the test record" in shown


def test_what_is_counted_as_kept_is_what_the_corpus_keeps(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "mine")
    made = recipe({"mine": {"format": "jsonl", "path": str(folder)}}, min_kept_fraction=0.1)
    build_sources(context(tmp_path, "sources", made))
    build_cot_corpus(context(tmp_path, "cot_corpus", made, sources=tmp_path / "sources"))
    report = json.loads((tmp_path / "cot_corpus" / "report.json").read_text())
    found = check(str(folder), made.data)
    assert (found.kept.total() - found.kept["test"], found.kept["test"]) == (report["records"], report["test"])
    assert dict(found.reasons) == report["sources"]["mine"]["rejected"]


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("missing", "does not exist"),
        ("empty folder", "holds no .jsonl"),
        ("only images", "holds no .jsonl"),
        ("empty file", "no record in them"),
        ("another name", "train.jsonl"),
        ("torn parquet", "bad_parquet"),
        ("torn array", "not_json"),
        ("a file of a strange kind", "holds no .jsonl"),
    ],
)
def test_where_nothing_can_be_read_it_ends_with_2_and_says_what_to_do(
    tmp_path: Path, what: str, names: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    match what:
        case "missing":
            path = path / "nowhere"
        case "only images":
            (path / "a.png").write_bytes(png())
        case "empty file":
            (path / "train.jsonl").touch()
        case "another name":
            (path / "records.jsonl").write_text(json.dumps(row()))
        case "torn parquet":
            (path / "a.parquet").write_bytes(b"PAR1 and then nothing")
        case "torn array":
            (path / "a.json").write_text('[{"question_id": ')
        case "a file of a strange kind":
            path = path / "records.csv"
            path.write_text("id,question\n")
    status, last, _, errors = checked(path, monkeypatch, capsys)
    assert (status, last["read"], last["kept"], last["rejected"]) == (2, 0, 0, {})
    assert names in errors and errors.count("valr:") == 1


def test_binary_garbage_is_no_record_and_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    garbage = np.random.default_rng(0).bytes(4096)
    (tmp_path / "train.jsonl").write_bytes(garbage)
    status, last, shown, _ = checked(tmp_path, monkeypatch, capsys)
    assert (status, last["kept"]) == (2, 0) and set(last["rejected"]) <= {"not_utf8", "not_json"}
    assert all(character.isprintable() for character in shown.replace("\n", ""))


def test_a_folder_without_permission_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row()])

    def denied(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    # Nothing is forbidden to root, as whom tests may run.
    monkeypatch.setattr(Path, "iterdir", denied)
    status, last, _, errors = checked(folder, monkeypatch, capsys)
    assert (status, last["read"]) == (2, 0) and f"{folder} can't be read: Permission denied" in errors


@pytest.mark.parametrize("format_name", sorted(sources.FORMATS))
def test_every_format_is_recognised_by_its_files_and_read(tmp_path: Path, format_name: Any) -> None:
    folder = tmp_path / format_name
    write_layout(format_name, folder, format_name, 0, SyntheticRecipe(train_records=6, test_records=4))
    found = check(str(folder), DATA)
    assert found.format == format_name
    assert (found.kept["train"], found.kept.total(), found.reasons) == (6, found.read.total(), {})
    assert len(found.first) == 3 and all(record.images and record.steps for record in found.first)


def test_the_format_can_be_named_and_the_command_line_knows_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_layout("gcot", tmp_path / "g", "g", 0, SyntheticRecipe(train_records=4, test_records=2))
    (file,) = (tmp_path / "g").glob("*.json")
    file.rename(file.with_name("records.json"))
    assert checked(tmp_path / "g", monkeypatch, capsys)[1]["format"] == "visual_cot"
    status, last, _, _ = checked(tmp_path / "g", monkeypatch, capsys, "--format", "gcot")
    assert (status, last["format"], last["kept"]) == (0, "gcot", last["read"])
    verbs = next(iter(_parser()._subparsers._group_actions)).choices  # type: ignore[union-attr]
    action = next(one for one in verbs["check-data"]._actions if one.dest == "format")  # type: ignore[index]
    assert sorted(action.choices) == sorted(sources.FORMATS)


def test_a_source_of_the_recipe_is_read_with_its_settings(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row(number).items() if key != "license"} for number in range(4)]
    folder = jsonl_source(tmp_path / "mine", train=rows)
    settings = {"format": "jsonl", "path": str(folder), "license": "CC-BY-NC-4.0", "limit": 3}
    found = check(f"{folder}/", recipe({"shop": settings}).data)
    assert (found.source, found.read["train"]) == ("shop", 3)
    assert {(record.id.split("/")[0], record.license) for record in found.first} == {("shop", "CC-BY-NC-4.0")}
    blocked = check(str(folder), recipe({"shop": settings}, license_policy="commercial").data)
    assert blocked.reasons == {"licence_blocked": 3}


def test_steps_without_an_image_are_rejected_where_the_recipe_says_so(tmp_path: Path) -> None:
    steps = [{"text": "I see.", "image": 0}, {"text": "I think."}]
    folder = jsonl_source(tmp_path / "mine", train=[row(0, images=["images/0.png", "images/1.png"], steps=steps)])
    assert check(str(folder), DATA).reasons == {}
    rejecting = DataRecipe.model_validate({"matching": {"unmatched": "reject"}})
    assert check(str(folder), rejecting).reasons == {"step_match_missing": 1}


def test_a_file_is_checked_with_its_images_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl_source(tmp_path / "mine", train=[row(0)])
    (tmp_path / "mine" / "more.jsonl").write_text(json.dumps(row(1)))
    # What is typed is relative to where it is typed, not to the project.
    monkeypatch.chdir(tmp_path)
    status, last, shown, _ = checked("mine/more.jsonl", monkeypatch, capsys)
    assert (status, last["path"], last["splits"]) == (0, "mine/more.jsonl", {"train": 1}) and "mine/r1" in shown


def test_a_prefix_in_a_bucket_is_checked_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = LocalFiles(jsonl_source(tmp_path, train=[row(0), row(1), row(2, images=["no.png"])]))
    asked = []

    def opened(location: str) -> LocalFiles:
        asked.append(location)
        return bucket

    monkeypatch.setattr("valr_ops.data.sources.reading.open_files", opened)
    status, last, shown, _ = checked("s3://bucket/shop/", monkeypatch, capsys)
    assert (status, last["path"], last["kept"]) == (3, "s3://bucket/shop/", 2) and "shop/r0" in shown
    assert set(asked) == {"s3://bucket/shop/"}


def test_text_of_a_record_is_never_read_as_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = jsonl_source(tmp_path, train=[row(0, question="Is [bold]this[/bold] :smile: [/] red?")])
    status, _, shown, _ = checked(folder, monkeypatch, capsys)
    assert status == 0 and "Is [bold]this[/bold] :smile: [/] red?" in shown


def test_pictures_of_the_first_records_are_written_where_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(n) for n in range(5)])
    monkeypatch.chdir(tmp_path)
    _, last, _, _ = checked(folder, monkeypatch, capsys, "--pictures", "seen")
    written = sorted((tmp_path / "seen").iterdir())
    assert [str(file) for file in written] == last["pictures"]
    assert [file.name for file in written] == [f"record_{number}_image_0.png" for number in (1, 2, 3)]
    assert max(PIL.Image.open(written[0]).size) >= 600


def test_a_box_is_outlined_in_its_steps_colour_and_a_whole_image_is_framed() -> None:
    picture = PIL.Image.new("RGB", (60, 40), "black")
    drawn = with_targets(picture, {1: ((30, 20, 60, 40), "a corner"), 2: (None, "all of it")})
    colours = {colour for _, colour in drawn.getcolors(1 << 24) or []}
    first, second = (tuple(bytes.fromhex(colour[1:])) for colour in COLOURS[:2])
    assert {first, second} <= colours
    pixels = np.asarray(drawn)
    rows, columns = np.nonzero((pixels == first).all(axis=2))
    # Ten times as large, behind a margin of 17 pixels: the box's corner stands at (317, 217).
    assert (columns[rows < 430].min(), rows.min()) == (317, 217)
    # Elsewhere the picture is as it was.
    assert tuple(pixels[100, 100]) == (0, 0, 0)


def test_ctrl_c_ends_it_with_130_and_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(n) for n in range(3)])
    closed = []

    class Interrupted(Progress):
        def __init__(self, stage: str) -> None:
            pass

        def track(self, items: Any, description: str, total: int | None = None, done: int = 0) -> Any:
            try:
                yield next(items)
                raise KeyboardInterrupt
            finally:
                closed.append(description)

    monkeypatch.setattr("valr_ops.data.checking.ShowingProgress", Interrupted)
    monkeypatch.chdir(Path.cwd())
    assert main(["check-data", str(folder)]) == 130
    said = capsys.readouterr()
    assert "interrupted" in said.err and "Traceback" not in said.err and closed == ["reading mine"]


def test_a_hundred_thousand_bad_lines_are_counted_and_one_of_them_is_shown(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(json.dumps(row(0, images=["no.png"])).encode() + b"\n" + b"{\n" * 100_000)
    found = check(str(tmp_path), DATA)
    assert found.reasons == {"not_json": 100_000, "image_missing": 1} and len(found.examples) == 2


def test_a_location_that_holds_another_format_is_named() -> None:
    with pytest.raises(SourceError, match="does not exist"):
        check("/nowhere/at/all", DATA, "monet")
