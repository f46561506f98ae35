from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.data.made import png, recipe
from valr_ops.data import sources
from valr_ops.data.records import Record, Rejection, SourceError, Target
from valr_ops.recipe.recipe import SourceRecipe


def edit(thought: Any = "Focus on the bars after 2010.", image: Any = "c/e1.png") -> dict[str, Any]:
    return {"thought": thought, "edited_image": image}


def chart(*edits: Any, **changes: Any) -> dict[str, Any]:
    return {
        "id": "chart_003",
        "question": "Which year is highest?",
        "image": "c/0.png",
        "answer": "2014",
        "edits": list(edits) or [edit()],
        **changes,
    }


def folder_with(folder: Path, rows: list[Any], name: str = "task/train.json") -> Path:
    (folder / "c").mkdir(parents=True, exist_ok=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows))
    for image, colour in {"0": 40, "e1": 90, "e2": 140}.items():
        (folder / "c" / f"{image}.png").write_bytes(png(40, 30, (colour, 30, 30)))
    (folder / "c" / "small.png").write_bytes(png(20, 30))
    same = io.BytesIO()
    PIL.Image.open(folder / "c" / "0.png").save(same, format="BMP")
    (folder / "c" / "same.bmp").write_bytes(same.getvalue())
    return folder


def reading(folder: Path, mapping: Mapping[str, str] = {}) -> Any:
    return sources.located("r", str(folder), recipe().data, SourceRecipe(format="refocus", mapping=dict(mapping)))


def items(folder: Path, mapping: Mapping[str, str] = {}) -> list[Record | Rejection]:
    return [one.item for one in sources.read(reading(folder, mapping))]


def test_an_edited_image_is_the_target_of_its_thought(tmp_path: Path) -> None:
    two = chart(edit(), edit("The fourth is highest.", "c/e2.png"))
    (record,) = items(folder_with(tmp_path, [two]))
    assert isinstance(record, Record)
    assert (record.id, record.kind, record.license) == ("r/chart_003", "interleaved", "unknown")
    assert (record.question, record.answer) == ("Which year is highest?", "2014")
    assert [(step.text, step.target) for step in record.steps] == [
        ("Focus on the bars after 2010.", Target(1, None, "dataset")),
        ("The fourth is highest.", Target(2, None, "dataset")),
    ]
    assert [image.role for image in record.images] == ["input", "step", "step"]


def test_arrays_and_lines_are_read_at_any_depth_and_their_names_say_the_split(tmp_path: Path) -> None:
    folder_with(tmp_path, [chart(id=1), chart(id=2)], "a/b/train.json")
    folder_with(tmp_path, [chart(id=3), chart(id=4)], "test.jsonl")
    folder_with(tmp_path, [chart(id=5)], "val_chart.jsonl")
    found = list(sources.read(reading(tmp_path)))
    assert [(one.where, one.split, one.item.id) for one in found] == [
        ("a/b/train.json element 0", "train", "r/1"),
        ("a/b/train.json element 1", "train", "r/2"),
        ("test.jsonl line 1", "test", "r/3"),
        ("test.jsonl line 2", "test", "r/4"),
        ("val_chart.jsonl line 1", "validation", "r/5"),
    ]
    assert [one.number for one in found] == list(range(5))


def test_the_recipe_maps_our_names_to_theirs(tmp_path: Path) -> None:
    theirs = {
        "uid": 7,
        "prompt": "Which year?",
        "figure": "c/0.png",
        "label": "2014",
        "turns": [{"text": "Look right.", "path": "c/e1.png"}],
    }
    ours = {"id": "uid", "question": "prompt", "image": "figure", "answer": "label", "edits": "turns"}
    mapping = {**ours, "thought": "text", "edited_image": "path"}
    (record,) = items(folder_with(tmp_path, [theirs]), mapping)
    assert isinstance(record, Record)
    assert (record.id, record.question, record.steps[0].text) == ("r/7", "Which year?", "Look right.")


def test_a_file_with_other_names_is_refused_with_the_names_that_are_there(tmp_path: Path) -> None:
    theirs = [
        {"uid": number, "prompt": "Which?", "image": "c/0.png", "edits": [], "answer": "a"} for number in range(9)
    ]
    folder = folder_with(tmp_path, theirs)
    with pytest.raises(SourceError, match=r"element 0 has no id and no question; its keys are.*prompt, uid.*mapping"):
        items(folder)
    with pytest.raises(SourceError, match=r"has no q;.*data\.sources\.r\.mapping.*schema_mismatch"):
        items(folder, {"id": "uid", "question": "q"})


def test_a_number_is_as_good_an_answer_as_its_text(tmp_path: Path) -> None:
    found = items(folder_with(tmp_path, [chart(answer=2014), chart(answer=0.57), chart(answer="0.570")]))
    assert [one.answer for one in found if isinstance(one, Record)] == ["2014", "0.57", "0.570"]


def test_a_mapping_of_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.sources\.r\.mapping names 'qustion'.*question"):
        items(folder_with(tmp_path, [chart()]), {"qustion": "prompt"})


BAD: list[tuple[str, Any]] = [
    ("schema_mismatch", {"id": 1}),
    ("schema_mismatch", chart(edits="none")),
    ("schema_mismatch", chart("focus")),
    ("schema_mismatch", chart({"thought": "a"})),
    ("schema_mismatch", chart({"edited_image": "c/e1.png"})),
    ("schema_mismatch", chart(edit(image=None))),
    ("schema_mismatch", chart(edit(image="img = focus_on_bars(image, ['2014'])"))),
    ("schema_mismatch", chart(edit(image="import os\nos.remove('a')"))),
    ("schema_mismatch", chart(edit(thought="I call focus_on_columns_with_mask to see it."))),
    ("schema_mismatch", chart(edit(thought="```python\ndisplay(image)\n```"))),
    ("schema_mismatch", chart(edit(thought="ACTION 0: look"))),
    ("schema_mismatch", chart(id=1.5)),
    ("schema_mismatch", chart(answer=["2014"])),
    ("schema_mismatch", chart(answer=float("nan"))),
    ("schema_mismatch", [chart()]),
    ("empty_question", chart(question=" ")),
    ("empty_answer", chart(answer="\n")),
    ("empty_reasoning", chart(edit(thought=" "))),
    ("no_steps", chart(edits=[])),
    ("too_many_steps", chart(*[edit()] * 65)),
    ("edit_is_identity", chart(edit(image="c/0.png"))),
    ("edit_is_identity", chart(edit(), edit(image="c/same.bmp"))),
    ("bbox_disagrees", chart(edit(image="c/small.png"))),
    ("image_missing", chart(edit(image="c/none.png"))),
    ("image_missing", chart(image="c/none.png")),
    ("path_escape", chart(edit(image="../e1.png"))),
    ("path_escape", chart(image="/etc/passwd")),
    ("reserved_token_in_text", chart(edit(thought="now <abs_vis_token> then"))),
    ("control_character", chart(question="Which\u202e year?")),
]


@pytest.mark.parametrize(("reason", "bad"), BAD)
def test_a_bad_row_is_rejected_with_its_reason_and_the_next_one_read(tmp_path: Path, reason: str, bad: Any) -> None:
    rejected, good = items(folder_with(tmp_path, [bad, chart()]))
    assert isinstance(rejected, Rejection) and rejected.reason == reason
    assert "task/train.json element 0" in rejected.detail and len(rejected.detail) < 400
    assert isinstance(good, Record)


def test_a_file_called_after_a_tool_is_an_image_and_no_call(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, [chart(edit(image="c/focus_on_bars (1).png"))])
    (folder / "c" / "focus_on_bars (1).png").write_bytes(png())
    assert isinstance(items(folder)[0], Record)


def test_a_bad_line_does_not_stop_the_lines_after_it(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, [chart(id=1), chart(id=2)], "train.jsonl")
    path = folder / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b'\n{"id": \n\xff\n'))
    found = items(folder)
    assert [one.reason if isinstance(one, Rejection) else one.id for one in found] == [
        *("r/1", "not_json", "not_utf8", "r/2")
    ]


def test_a_truncated_array_stops_the_run_and_names_file_and_element(tmp_path: Path) -> None:
    path = folder_with(tmp_path, [chart(), chart()]) / "task" / "train.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(SourceError, match=r"task/train\.json, element 1.*not_json"):
        items(tmp_path)


def test_a_file_that_changes_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, [chart(), chart()])
    going = sources.read(reading(folder))
    next(going)
    with (folder / "task" / "train.json").open("a") as file:
        file.write(" ")
    with pytest.raises(SourceError, match=r"task/train\.json changed while it was read"):
        list(going)
