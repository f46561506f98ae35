"""OneThinker: conversations about images and videos become records, and what is wrong with them a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.made import png, recipe, video
from valr_ops.data import sources
from valr_ops.data.images import decode
from valr_ops.data.records import Record, Rejection, SourceError, Step, Target
from valr_ops.data.sources.onethinker import in_coordinates

LEVELS = list(range(10, 250, 20))
"""Greys of the twelve frames of ``vid/0.mp4``."""
THOUGHTS = "<think>First the left.\n\nThen the right.</think><answer>5</answer>"


def element(asked: str = "<image>How many cups?", replied: str = THOUGHTS, **more: Any) -> dict[str, Any]:
    """A good element about ``img/0.png``; `more` replaces or adds keys."""
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
    return {"messages": turns, "images": ["img/0.png"], **more}


def clip(asked: str = "<video>What happens?", replied: str = THOUGHTS, **more: Any) -> dict[str, Any]:
    """A good element about ``vid/0.mp4``."""
    return element(asked, replied, **{"images": [], "videos": ["vid/0.mp4"], **more})


def read(folder: Path, *elements: Any, name: str = "onethinker_sft_image.json", **data: Any) -> list[Any]:
    """What becomes of a file with these elements, in a folder with three images and three videos."""
    for part in ("img", "vid"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (folder / f"img/{number}.png").write_bytes(png(colour=(50 * number, 30, 30)))
    (folder / "vid/0.mp4").write_bytes(video(LEVELS))
    (folder / "vid/1.mp4").write_bytes(video(LEVELS[:2]))
    (folder / "vid/broken.mp4").write_bytes(video(LEVELS)[:900])
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(elements), encoding="utf-8")
    made = recipe({"thinker": {"format": "onethinker", "path": str(folder)}}, **data)
    return [one.item for one in sources.read(sources.opened("thinker", made, folder))]


def one_record(folder: Path, *elements: Any, **data: Any) -> Record:
    (item,) = read(folder, *elements, **data)
    assert isinstance(item, Record), item
    return item


def one_reason(folder: Path, given: Any, **data: Any) -> str:
    (item,) = read(folder, given, **data)
    assert isinstance(item, Rejection), item
    return item.reason


def test_an_image_with_thoughts_becomes_a_single_view_record_with_a_step_a_paragraph(tmp_path: Path) -> None:
    record = one_record(tmp_path, element())
    look = Target(0, None, "only_image")
    assert record.steps == (Step("First the left.", look), Step("Then the right.", look))
    assert (record.id, record.source, record.license) == ("thinker/onethinker_sft_image/0", "thinker", "unknown")
    assert (record.question, record.answer, record.kind, record.split) == (
        "How many cups?",
        "5",
        "single_view",
        "train",
    )
    assert [(image.width, image.height, image.role) for image in record.images] == [(40, 30, "input")]


@pytest.mark.parametrize(
    ("thoughts", "steps"),
    [
        ("One line.", ["One line."]),
        ("  One\nparagraph.\n", ["One\nparagraph."]),
        ("A.\r\n\r\nB.\n \t\n\n\nC.", ["A.", "B.", "C."]),
    ],
)
def test_steps_are_parted_by_blank_lines_only(thoughts: str, steps: list[str], tmp_path: Path) -> None:
    record = one_record(tmp_path, element(replied=f"<think>{thoughts}</think>\n<answer> 5 </answer>\n"))
    assert [step.text for step in record.steps] == steps


def test_several_images_are_numbered_where_they_stood_and_the_steps_wait_for_a_match(tmp_path: Path) -> None:
    paths = ["img/2.png", "img/0.png", "img/1.png"]
    record = one_record(tmp_path, element("<image><image>\nIs it in <image>?", images=paths))
    assert record.question.split() == ["(image", "1)", "(image", "2)", "Is", "it", "in", "(image", "3)?"]
    assert record.kind == "multi_view"
    assert [step.target for step in record.steps] == [None, None]
    assert [np.asarray(decode(image.data))[0, 0, 0] for image in record.images] == [100, 0, 50]


def test_a_video_becomes_its_frames_at_equal_distances(tmp_path: Path) -> None:
    record = one_record(tmp_path, clip(), name="onethinker_sft_video.json", video_frames=4)
    assert (record.kind, record.question) == ("multi_view", "What happens?")
    assert [step.target for step in record.steps] == [None, None]
    levels = [np.asarray(decode(image.data)).mean() for image in record.images]
    assert [int(np.abs(np.array(LEVELS) - level).argmin()) for level in levels] == [1, 4, 7, 10]


def test_several_videos_are_numbered_by_their_images(tmp_path: Path) -> None:
    given = clip("Is <video> before <video>?", videos=["vid/1.mp4", "vid/0.mp4"])
    record = one_record(tmp_path, given, video_frames=3)
    assert record.question == "Is (images 1 to 2) before (images 3 to 5)?"
    assert len(record.images) == 5


def test_the_one_frame_of_a_video_is_the_only_image_there_is(tmp_path: Path) -> None:
    record = one_record(tmp_path, clip(), video_frames=1)
    assert (record.kind, record.steps[0].target) == ("single_view", Target(0, None, "only_image"))


def test_a_video_is_read_the_same_way_twice(tmp_path: Path) -> None:
    first, second = read(tmp_path, clip(), clip(), video_frames=4)
    assert [image.digest for image in first.images] == [image.digest for image in second.images]


def test_a_video_is_rejected_by_choice_while_the_recipe_names_no_number_of_frames(tmp_path: Path) -> None:
    assert one_reason(tmp_path, clip()) == "video_not_allowed"
    assert one_reason(tmp_path, clip(videos=["vid/broken.mp4"])) == "video_not_allowed"


@pytest.mark.parametrize(
    ("replied", "reason"),
    [
        ("First the left. <answer>5</answer>", "unbalanced_tags"),
        ("<think>First the left.", "unbalanced_tags"),
        ("<think>First the left.</think>", "unbalanced_tags"),
        ("<think>First the left.</think><answer>5", "unbalanced_tags"),
        ("<think>A.</think><think>B.</think><answer>5</answer>", "unbalanced_tags"),
        ("<think>A.</think><answer>5</answer><answer>6</answer>", "unbalanced_tags"),
        ("<think>A. <answer>5</answer></think>", "unbalanced_tags"),
        ("<think>A. <think>B.</think></think><answer>5</answer>", "unbalanced_tags"),
        ("<answer>5</answer><think>A.</think>", "unbalanced_tags"),
        ("", "unbalanced_tags"),
        ("<think>A.</think>So it is <answer>5</answer>", "schema_mismatch"),
        ("<think>A.</think><answer>5</answer> Done.", "schema_mismatch"),
        ("<think> \n\n </think><answer>5</answer>", "empty_reasoning"),
        ("<think>A.</think><answer>\n</answer>", "empty_answer"),
        ("<think>In <image> it is.</think><answer>5</answer>", "reserved_token_in_text"),
        ("<think>A.\x00</think><answer>5</answer>", "control_character"),
    ],
)
def test_a_reply_that_does_not_have_its_tags_once_and_in_order_is_rejected(
    replied: str, reason: str, tmp_path: Path
) -> None:
    assert one_reason(tmp_path, element(replied=replied)) == reason


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (element("How many cups?"), "placeholder_count"),
        (element("<image><image>How many?"), "placeholder_count"),
        (element(images=["img/0.png", "img/1.png"]), "placeholder_count"),
        (element("<image><video>How many?"), "placeholder_count"),
        (element(images=None), "placeholder_count"),
        (element("How many cups?", images=[]), "no_images"),
        (element("<image> \n"), "empty_question"),
        (element("<image><Image>How many?"), "reserved_token_in_text"),
        (element("<image><video>How many?", videos=["vid/0.mp4"]), "schema_mismatch"),
        (element(images="img/0.png"), "schema_mismatch"),
        (element(images=[{"path": "img/0.png"}]), "schema_mismatch"),
        (element(messages=[]), "schema_mismatch"),
        (element(messages=element()["messages"][::-1]), "schema_mismatch"),
        (element(messages=[{"role": "user"}, {"role": "assistant"}]), "schema_mismatch"),
        ({"images": ["img/0.png"]}, "schema_mismatch"),
        (element(id=1.5), "schema_mismatch"),
        (element(id=None), "schema_mismatch"),
        (["no object"], "schema_mismatch"),
        (element(images=["img/9.png"]), "image_missing"),
        (element(images=["../img/0.png"]), "path_escape"),
        (element(images=["/etc/hostname"]), "path_escape"),
        (element(images=["onethinker_sft_image.json"]), "image_unreadable"),
        (clip(videos=["vid/9.mp4"]), "image_missing"),
        (clip(videos=["../0.mp4"]), "path_escape"),
        (clip(videos=["vid/broken.mp4"]), "video_unreadable"),
        (clip(videos=["img/0.png"]), "video_unreadable"),
        (clip("What happens?"), "placeholder_count"),
        (clip("<video> "), "empty_question"),
    ],
)
def test_an_element_that_does_not_fit_the_format_is_rejected_with_its_reason(
    given: Any, reason: str, tmp_path: Path
) -> None:
    assert one_reason(tmp_path, given, video_frames=4) == reason


def test_a_video_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("valr_ops.data.sources.onethinker.MAX_BYTES", 1000)
    assert one_reason(tmp_path, clip(), video_frames=4) == "video_too_large"


def test_too_many_paragraphs_are_rejected(tmp_path: Path) -> None:
    replied = "<think>" + 10_000 * "Step.\n\n" + "</think><answer>5</answer>"
    assert one_reason(tmp_path, element(replied=replied)) == "too_many_steps"


@pytest.mark.parametrize(
    "answer",
    [
        '{"boxes": [12, 40, 300, 220]}',
        '{"boxes": {"1": [1, 2, 3, 4], "2": [5, 6, 7, 8]}}',
        '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]',
        '{"positive_points": [[1, 2]], "negative_points": []}',
        '{"masks": {"size": [480, 640], "counts": "abc"}}',
        '{"Time": [3.5, 7.25]}',
        '{"3": [1, 2, 3, 4]}',
        "[0.1, 0.2, 0.3, 0.4]",
        "[[1, 2, 3, 4], [5, 6, 7, 8]]",
        "[12, 40]",
        '```json\n{"points": [[1, 2]]}\n```',
    ],
)
def test_an_answer_in_coordinates_is_left_out_or_kept_as_the_recipe_says(answer: str, tmp_path: Path) -> None:
    assert in_coordinates(answer)
    given = element(replied=f"<think>A.</think><answer>{answer}</answer>")
    assert one_reason(tmp_path, given) == "answer_not_allowed"
    assert one_record(tmp_path, given, coordinate_answers="keep").answer == answer


@pytest.mark.parametrize(
    "answer",
    [
        "5",
        "2.4",
        "B",
        "two boxes",
        "(3, 4)",
        "[1, 2, 3]",
        "[]",
        "{}",
        '{"count": 2}',
        '{"time": "noon"}',
        "[" * 5000,
        f"[{400 * '9'}, 1]",
    ],
)
def test_an_answer_without_coordinates_is_kept(answer: str, tmp_path: Path) -> None:
    assert not in_coordinates(answer)
    assert one_record(tmp_path, element(replied=f"<think>A.</think><answer>{answer}</answer>")).answer == answer


def test_an_id_of_its_own_stands_behind_the_file_and_elements_without_one_are_counted(tmp_path: Path) -> None:
    items = read(tmp_path, element(id="x7"), element(problem_id=12), element(), name="sub/onethinker_sft_image.json")
    assert [item.id for item in items] == [
        "thinker/sub/onethinker_sft_image/x7",
        "thinker/sub/onethinker_sft_image/12",
        "thinker/sub/onethinker_sft_image/2",
    ]


@pytest.mark.timeout(60)
def test_a_run_of_white_space_costs_no_more_than_its_length(tmp_path: Path) -> None:
    blanks = 900_000 * " "
    replied = f"<think>First the left.\n{blanks}\nThen the right.</think><answer>```{blanks}```</answer>"
    assert len(one_record(tmp_path, element(f"<image>How{blanks}many?", replied)).steps) == 2


def test_every_file_of_the_format_is_read_at_any_depth_and_no_other(tmp_path: Path) -> None:
    read(tmp_path, element(), name="a/onethinker_rl_image.json")
    (tmp_path / "config.json").write_text("{}")
    items = read(tmp_path, clip(), name="onethinker_sft_video.json")
    assert [item.id for item in items] == ["thinker/a/onethinker_rl_image/0", "thinker/onethinker_sft_video/0"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("onethinker_sft_image.json", "train"),
        ("onethinker_sft_image_test.json", "test"),
        ("onethinker_sft_video_val.json", "validation"),
    ],
)
def test_a_file_says_its_split(name: str, split: str, tmp_path: Path) -> None:
    assert one_record(tmp_path, element(), name=name).split == split


def test_a_file_that_is_named_itself_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir(parents=True, exist_ok=True)
    (tmp_path / "img/0.png").write_bytes(png())
    (tmp_path / "mine.json").write_text(json.dumps([element()]))
    made = recipe({"thinker": {"format": "onethinker", "path": str(tmp_path / "mine.json")}})
    (one,) = sources.read(sources.opened("thinker", made, tmp_path))
    assert one.item.id == "thinker/mine/0"


def test_a_folder_without_a_file_of_the_format_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    made = recipe({"thinker": {"format": "onethinker", "path": str(tmp_path)}})
    with pytest.raises(SourceError, match=r"no onethinker\*\.json file.*data\.sources\.thinker"):
        list(sources.read(sources.opened("thinker", made, tmp_path)))


def test_a_truncated_array_stops_the_run(tmp_path: Path) -> None:
    read(tmp_path, element(), element())
    file = tmp_path / "onethinker_sft_image.json"
    file.write_text(file.read_text()[:-40])
    made = recipe({"thinker": {"format": "onethinker", "path": str(tmp_path)}})
    with pytest.raises(SourceError, match=r"onethinker_sft_image\.json, element 1.*not_json"):
        list(sources.read(sources.opened("thinker", made, tmp_path)))


def test_mutated_files_give_records_rejections_or_one_clear_error(tmp_path: Path) -> None:
    elements = [element(), clip(), element("<image><image>Which?", images=["img/0.png", "img/1.png"])]
    read(tmp_path, *elements)
    file = tmp_path / "onethinker_sft_image.json"
    whole, random = file.read_bytes(), np.random.default_rng(0)
    made = recipe({"thinker": {"format": "onethinker", "path": str(tmp_path)}}, video_frames=2)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 3):
            data[at] = random.integers(0, 256)
        file.write_bytes(data[: random.integers(1, 4 * len(data))])
        try:
            outcomes |= {type(one.item) for one in sources.read(sources.opened("thinker", made, tmp_path))}
        except SourceError:
            outcomes.add(SourceError)
    assert outcomes == {Record, Rejection, SourceError}
