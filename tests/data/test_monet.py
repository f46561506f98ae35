from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.made import png, recipe
from valr_ops.data import sources
from valr_ops.data.records import Record, Rejection, SourceError, Target
from valr_ops.recipe.recipe import SourceRecipe

MARKER = "<abs_vis_token></abs_vis_token>"


def text(value: Any) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(number: int | str) -> dict[str, Any]:
    return {"type": "image", "image": f"CogCoM/images/{number}.png" if isinstance(number, int) else number}


ASKED = [image(0), text("What does the sign say?\nPut your final answer within \\boxed{}.")]
TOLD = [
    text(f"I zoom in on the sign. {MARKER}"),
    image(1),
    text("<observation>It reads OPEN.</observation> \\boxed{OPEN}"),
]


def element(
    told: list[Any] = TOLD, asked: list[Any] = ASKED, name: Any = "CogCoM", number: Any = 17, **changes: Any
) -> dict[str, Any]:
    turns = [("system", [text("You are a helpful assistant.")]), ("user", asked), ("assistant", told)]
    return {
        "metadata": {"dataset_name": name, "sample_id": number},
        "data": [{"role": role, "content": content} for role, content in turns],
        **changes,
    }


def boxed(value: str) -> dict[str, Any]:
    return element([*TOLD[:2], text(f"So {value}")])


def root(folder: Path, **subsets: list[Any]) -> Path:
    for subset, elements in subsets.items():
        (folder / subset).mkdir(parents=True)
        (folder / subset / "train.json").write_text(json.dumps(elements))
    (folder / "CogCoM" / "images").mkdir(parents=True, exist_ok=True)
    for number in range(4):
        (folder / "CogCoM" / "images" / f"{number}.png").write_bytes(png(40, 30, (60 * number, 30, 30)))
    return folder


def reading(folder: Path) -> Any:
    return sources.located("m", str(folder), recipe().data, SourceRecipe(format="monet"))


def items(folder: Path) -> list[Record | Rejection]:
    return [one.item for one in sources.read(reading(folder))]


def read_one(folder: Path, one: Any) -> Any:
    (item,) = items(root(folder, CogCoM=[one]))
    return item


def test_marker_and_image_become_the_target_of_the_text_after_them(tmp_path: Path) -> None:
    record = read_one(tmp_path, element())
    assert (record.id, record.kind, record.split, record.license) == ("m/CogCoM/17", "interleaved", "train", "unknown")
    assert (record.question, record.answer) == ("What does the sign say?", "OPEN")
    assert [(step.text, step.target) for step in record.steps] == [
        ("I zoom in on the sign.", None),
        ("It reads OPEN. \\boxed{OPEN}", Target(1, None, "dataset")),
    ]
    assert [one.role for one in record.images] == ["input", "step"]


def test_text_without_words_before_the_first_image_is_no_step(tmp_path: Path) -> None:
    told = [text(MARKER), image(1), text(f" Left. {MARKER}\n"), image(2), text("Right."), text(" \\boxed{2}")]
    record = read_one(tmp_path, element(told))
    assert [(step.text, step.target and step.target.image) for step in record.steps] == [
        ("Left.", 1),
        ("Right. \\boxed{2}", 2),
    ]


def test_an_image_that_the_user_showed_is_looked_at_and_not_held_twice(tmp_path: Path) -> None:
    record = read_one(tmp_path, element([text(MARKER), image(0), text("It is \\boxed{red}")]))
    assert [one.role for one in record.images] == ["input"]
    assert record.steps[0].target == Target(0, None, "dataset")


@pytest.mark.parametrize(
    "asked",
    [
        [text("Is"), image(2), text("like"), image(0), text("?")],
        [text(f"Is {MARKER}"), image(2), text(f"like {MARKER}"), image(0), text("?")],
        [image(2), image(0), text(f"Is {MARKER} like {MARKER}?")],
    ],
)
def test_a_place_of_a_question_image_is_numbered_and_opens_no_segment(tmp_path: Path, asked: list[Any]) -> None:
    record = read_one(tmp_path, element(asked=asked))
    assert record.question == "Is (image 1) like (image 2)?"
    assert [one.role for one in record.images] == ["input", "input", "step"]
    assert [step.target and step.target.image for step in record.steps] == [None, 2]


def test_the_request_for_a_box_is_removed_but_no_question_is(tmp_path: Path) -> None:
    def question(value: str) -> str:
        record = read_one(tmp_path / str(len(value)), element(asked=[image(0), text(value)]))
        assert isinstance(record, Record)
        return record.question

    assert question("How many? Please put your final answer in \\boxed{}. Options: 1, 2") == "How many? Options: 1, 2"
    assert question("Which answer stands in \\boxed{} here?") == "Which answer stands in \\boxed{} here?"


def test_images_that_follow_each_other_are_numbered_with_one_blank_between(tmp_path: Path) -> None:
    record = read_one(tmp_path, element(asked=[image(0), image(2), text("What differs? ")]))
    assert record.question == "(image 1) (image 2) What differs?"


@pytest.mark.parametrize(
    ("told", "answer"),
    [
        ("\\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{a \\} b}", "a \\} b"),
        ("\\boxed{ <latent> }", "&lt;latent>"),
    ],
)
def test_the_answer_is_what_the_last_box_holds(tmp_path: Path, told: str, answer: str) -> None:
    assert read_one(tmp_path, boxed(told)).answer == answer


def test_subsets_come_by_name_each_with_the_licence_of_its_data_set(tmp_path: Path) -> None:
    names = ["Zebra_CoT_geometry", "Visual_CoT", "CogCoM", "Zebra_CoT_count", "Own"]
    folder = root(tmp_path, **{name: [element(name=name), element(name=name, number="b")] for name in names})
    found = [(one.id, one.license) for one in items(folder) if isinstance(one, Record)]
    assert found[::2] == [
        ("m/CogCoM/17", "unknown"),
        ("m/Own/17", "unknown"),
        ("m/Visual_CoT/17", "Apache-2.0"),
        ("m/Zebra_CoT_count/17", "CC-BY-NC-4.0"),
        ("m/Zebra_CoT_geometry/17", "CC-BY-NC-4.0"),
    ]
    assert len(found) == 10 and found[1][0] == "m/CogCoM/b"


def test_a_data_set_may_have_a_name_of_its_own_but_not_another_subsets(tmp_path: Path) -> None:
    own, others = items(root(tmp_path, CogCoM=[element(name="CoM"), element(name="Visual_CoT")]))
    assert own.id == "m/CoM/17" and isinstance(own, Record)
    assert isinstance(others, Rejection) and others.reason == "schema_mismatch" and "Visual_CoT" in others.detail


BAD: list[tuple[str, Any]] = [
    ("marker_without_image", element([text(f"a {MARKER}"), text("b \\boxed{1}")])),
    ("marker_without_image", element([*TOLD[:2], text(f"b \\boxed{{1}} {MARKER}")])),
    ("marker_without_image", element([text(f"a {MARKER} b"), *TOLD[1:]])),
    ("marker_without_image", element([text(f"a {MARKER}{MARKER}"), *TOLD[1:]])),
    ("image_without_marker", element([text("a"), *TOLD[1:]])),
    ("image_without_marker", element(TOLD[1:])),
    ("image_without_marker", element([*TOLD[:2], image(2), TOLD[2]])),
    ("unbalanced_tags", element([*TOLD[:2], text("<observation>a \\boxed{1}")])),
    ("unbalanced_tags", element([*TOLD[:2], text("</observation>a<observation> \\boxed{1}")])),
    ("unbalanced_tags", element([text(f"<observation>a {MARKER}"), image(1), text("b</observation> \\boxed{1}")])),
    ("unbalanced_tags", element([text("a <abs_vis_token>"), *TOLD[1:]])),
    ("unbalanced_tags", element(asked=[image(0), text("Is </abs_vis_token> it?")])),
    ("placeholder_count", element(TOLD[:2])),
    ("placeholder_count", element([*TOLD[:2], text(f" {MARKER}"), image(2), TOLD[2]])),
    ("placeholder_count", element([*TOLD[:2], text("<observation> </observation>")])),
    ("placeholder_count", element(asked=[image(0), image(2), text(f"Is {MARKER} it?")])),
    ("no_steps", element([text("It reads OPEN. \\boxed{OPEN}")])),
    ("no_steps", element([])),
    ("too_many_steps", element([*(text(MARKER), image(1), text("a")) * 65, text("\\boxed{1}")])),
    ("empty_answer", boxed("no box")),
    ("empty_answer", boxed("\\boxed{ }")),
    ("empty_answer", boxed("\\boxed{1} \\boxed{2")),
    ("empty_question", element(asked=[image(0), text("Put your final answer within \\boxed{}.")])),
    ("no_images", element(asked=[text("What?")])),
    ("reserved_token_in_text", element(asked=[image(0), text("What is <image>?")])),
    ("control_character", element([*TOLD[:2], text("a\0 \\boxed{1}")])),
    ("not_utf8", boxed("\ud800 \\boxed{1}")),
    ("image_missing", element([TOLD[0], image("CogCoM/images/none.png"), TOLD[2]])),
    ("path_escape", element([TOLD[0], image("../1.png"), TOLD[2]])),
    ("path_escape", element(asked=[image("/etc/passwd"), ASKED[1]])),
    ("schema_mismatch", element(asked=[image(""), ASKED[1]])),
    ("schema_mismatch", element(data=element()["data"][1:])),
    ("schema_mismatch", element(data=element()["data"] + element()["data"][1:])),
    ("schema_mismatch", element(data=element()["data"][::-1])),
    ("schema_mismatch", element(data=7)),
    ("schema_mismatch", element(data=["a", "b", "c"])),
    ("schema_mismatch", element(metadata=None)),
    ("schema_mismatch", element(metadata={"dataset_name": "CogCoM"})),
    ("schema_mismatch", element(number=True)),
    ("schema_mismatch", element(name="")),
    ("schema_mismatch", element(asked=[image(0), {"type": "video", "video": "a.mp4"}])),
    ("schema_mismatch", element(asked=[image(0), "What?"])),
    ("schema_mismatch", element([TOLD[0], {"type": "image"}, TOLD[2]])),
    ("schema_mismatch", element([TOLD[0], {"type": "image", "image": ["a.png"]}, TOLD[2]])),
    ("schema_mismatch", element(asked=[image(0), text(None)])),
    ("schema_mismatch", [element()]),
]


@pytest.mark.parametrize(("reason", "bad"), BAD)
def test_a_bad_element_is_rejected_with_its_reason_and_the_next_one_read(tmp_path: Path, reason: str, bad: Any) -> None:
    rejected, good = items(root(tmp_path, CogCoM=[bad, element(number=18)]))
    assert isinstance(rejected, Rejection) and rejected.reason == reason
    assert "CogCoM/train.json element 0" in rejected.detail and len(rejected.detail) < 400
    assert isinstance(good, Record) and good.id == "m/CogCoM/18"


def test_a_truncated_array_stops_the_run_and_names_file_and_element(tmp_path: Path) -> None:
    path = root(tmp_path, CogCoM=[element(), element()]) / "CogCoM" / "train.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(SourceError, match=r"CogCoM/train\.json, element 1.*not_json"):
        items(tmp_path)


def test_a_file_that_changes_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    folder = root(tmp_path, CogCoM=[element(), element()])
    going = sources.read(reading(folder))
    next(going)
    with (folder / "CogCoM" / "train.json").open("a") as file:
        file.write(" ")
    with pytest.raises(SourceError, match=r"CogCoM/train\.json changed while it was read"):
        list(going)


def test_only_the_folder_that_holds_the_subsets_is_read(tmp_path: Path) -> None:
    root(tmp_path / "data", CogCoM=[element()])
    with pytest.raises(SourceError, match=r"data/CogCoM/train\.json lies too deep.*data\.sources\.m\.path"):
        items(tmp_path)
    for place in ("data/CogCoM", "data/CogCoM/train.json"):
        with pytest.raises(SourceError, match=r"no /train\.json file.*data\.sources\.m\.path"):
            items(tmp_path / place)
