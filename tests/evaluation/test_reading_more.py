"""The other benchmarks and a user's own, drawn in their layouts and read again: questions, golds, pictures, errors."""

from __future__ import annotations

import importlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from valr_ops.evaluation.benchmarks import (
    BenchmarkError,
    Item,
    Picture,
    hr_bench,
    jsonl,
    math_vision,
    math_vista,
    mm_halu,
    realworldqa,
)
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.drawn import Drawing, write_benchmark
from valr_ops.evaluation.scoring import VLMEVALKIT, Case
from valr_ops.recipe.recipe import SyntheticRecipe

COUNT = 24
"""Questions of each drawn benchmark: whole rounds of all kinds of question."""
SIZES = SyntheticRecipe(rows=2, columns=3, cell_pixels=8)
Drawn = dict[str, tuple[Drawing, Folder, list[Item]]]
NAMES = ("math_vista", "math_vision", "mm_halu", "realworldqa", "hr_bench", "jsonl")

MM_HALU_TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")


def module(name: str) -> ModuleType:
    return importlib.import_module(f"valr_ops.evaluation.benchmarks.{name}")


def opened(root: Path, name: str) -> Folder:
    return Folder(root, f"my_{name}", module(name).SOURCE)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    found = {}
    for name in NAMES:
        root, drawing = tmp_path_factory.mktemp(name), Drawing(name, 3, COUNT, SIZES)
        write_benchmark(root, drawing)
        folder = opened(root, name)
        found[name] = (drawing, folder, module(name).read(folder))
    return found


def rescored(name: str, item: Item, output: str, profile: str) -> float:
    case = Case(item.id, item.gold, output, item.question_type, item.options)
    return module(name).PROFILES[profile](case).score


def tables(folder: Folder) -> list[dict[str, Any]]:
    """All rows of the parquet files as they were written."""
    return [row for path in sorted(folder.root.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("name", NAMES)
def test_every_drawn_question_is_read_once_and_in_order(name: str, drawn: Drawn) -> None:
    _, folder, items = drawn[name]
    assert len(items) == len({item.id for item in items}) == COUNT
    assert [int(item.id) for item in items] == sorted(int(item.id) for item in items)
    assert {item.benchmark for item in items} == {folder.benchmark}
    assert folder.tables


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_is_found_where_it_is_said_to_be_and_shows_what_was_drawn(name: str, drawn: Drawn) -> None:
    drawing, folder, items = drawn[name]
    scenes = drawing.scenes(count=6) * 4 if name == "hr_bench" else drawing.scenes()
    for item, scene in zip(items, scenes, strict=True):
        if item.video:
            assert folder.has(item.video)
            continue
        (picture,) = item.images
        assert isinstance(picture, Picture)
        shown = np.asarray(PIL.Image.open(io.BytesIO(folder.picture(picture))))
        assert np.array_equal(shown, scene.pixels)


@pytest.mark.parametrize("name", ["math_vista", "math_vision", "realworldqa", "hr_bench", "jsonl"])
def test_the_right_answer_scores_full_in_every_profile_and_wrong_ones_nothing(name: str, drawn: Drawn) -> None:
    _, _, items = drawn[name]
    for profile in module(name).PROFILES:
        for item in items:
            if profile == VLMEVALKIT and left_to_a_model(name, item):
                continue
            right = letter_of(item)
            wrong = [letter for letter in "ABCD" if letter != right] if right in "ABCD" else ["77", "[77]", "maybe"]
            assert rescored(name, item, right, profile) == 1, (profile, item)
            assert not any(rescored(name, item, one, profile) for one in wrong), (profile, item)


def letter_of(item: Item) -> str:
    """The gold, of a choice whose gold is the option's text its letter."""
    return "ABCD"[item.options.index(item.gold)] if item.gold in item.options else item.gold


def left_to_a_model(name: str, item: Item) -> bool:
    """What VLMEvalKit asks a model about: a 0 and every list of MathVista; RealWorldQA's open questions it has not."""
    if name == "realworldqa":
        return item.gold.isdigit()
    return name == "math_vista" and (item.question_type == "list" or item.gold in ("0", "0.0"))


def test_what_only_a_judge_can_score_stays_unresolved(
    drawn: Drawn,
) -> None:
    _, _, items = drawn["mm_halu"]
    case = Case(items[0].id, items[0].gold, items[0].gold, items[0].question_type)
    assert not mm_halu.PROFILES["official"](case).resolved


@pytest.mark.parametrize("name", ["math_vista", "math_vision", "realworldqa", "hr_bench", "jsonl"])
def test_no_letter_is_right_more_often_than_another(name: str, drawn: Drawn) -> None:
    _, _, items = drawn[name]
    frequency = Counter(letter for letter in map(letter_of, items) if letter in "ABCD")
    assert set(frequency) == set("ABCD")
    assert set(frequency.values()) == {frequency["A"]}


# Prompts, word for word.


def test_math_vista_asks_the_ready_query_and_has_the_text_of_the_option_as_gold(
    drawn: Drawn,
) -> None:
    drawing, folder, items = drawn["math_vista"]
    rows = tables(folder)
    assert [item.question for item in items] == [row["query"] for row in rows]
    scene, options = drawing.scenes()[0], items[0].options
    assert items[0].question == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        f"Question: {scene.question}\nChoices:\n"
        f"(A) {options[0]}\n(B) {options[1]}\n(C) {options[2]}\n(D) {options[3]}"
    )
    assert items[0].gold == scene.answer
    assert [item.question_type for item in items[:6]] == [
        *("multi_choice", "integer", "multi_choice", "float", "multi_choice", "list")
    ]
    assert all(item.options == () for item in items if item.question_type != "multi_choice")


def test_math_vision_is_worded_as_by_its_authors(drawn: Drawn) -> None:
    drawing, _, items = drawn["math_vision"]
    ask = (
        'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
        'question, only one letter is allowed in the "\\boxed{}".\n'
    )
    first, second = drawing.scenes()[:2]
    a, b, c, d = items[0].options
    assert items[0].question == f"{ask}{first.question}\n<image1>\n(A) {a}\n(B) {b}\n(C) {c}\n(D) {d}\n"
    assert items[1].question == f"{ask}How many {second.answer} shapes are there?\n<image1>\n"
    assert [item.question_type for item in items[:2]] == ["combinatorial geometry_level1", "counting_level2"]


def test_math_vision_does_not_repeat_options_that_are_only_their_letters(tmp_path: Path) -> None:
    write_benchmark(tmp_path, Drawing("math_vision", 0, 1, SIZES))
    changed(tmp_path / "data/test-00000-of-00001.parquet", options=list("ABCDE"))
    (item,) = math_vision.read(opened(tmp_path, "math_vision"))
    assert item.options == tuple("ABCDE")
    assert "(A)" not in item.question


def test_mm_halu_asks_the_bare_question_and_keeps_what_a_person_answered(
    drawn: Drawn,
) -> None:
    drawing, _, items = drawn["mm_halu"]
    for item, scene in zip(items, drawing.scenes(), strict=True):
        assert item.question == scene.question
        assert scene.answer in item.gold
    assert Counter(item.question_type for item in items).most_common() == [(kind, 3) for kind in MM_HALU_TYPES]


def test_mm_halu_finds_photographs_by_the_name_in_their_address_or_by_their_id(tmp_path: Path) -> None:
    write_benchmark(tmp_path, Drawing("mm_halu", 0, 1, SIZES))
    (image,) = (tmp_path / "images").iterdir()
    image.rename(image.with_name(f"{0:016x}.jpg"))
    (item,) = mm_halu.read(opened(tmp_path, "mm_halu"))
    assert item.images == (Picture(f"images/{0:016x}.jpg"),)
    (tmp_path / f"images/{0:016x}.jpg").unlink()
    with pytest.raises(BenchmarkError, match=rf"images are missing below .*images/{0:016x}_o.png.*IMAGE_ID\.jpg"):
        mm_halu.read(opened(tmp_path, "mm_halu"))


def test_realworldqa_adds_nothing_to_a_question_and_counts_on_over_its_parts(
    drawn: Drawn,
) -> None:
    _, folder, items = drawn["realworldqa"]
    rows = tables(folder)
    assert [item.question for item in items] == [row["question"] for row in rows]
    assert [item.gold for item in items] == [row["answer"] for row in rows]
    assert [item.id for item in items] == [str(number) for number in range(COUNT)]
    assert len(folder.tables) == 2


def test_hr_bench_lists_the_options_and_asks_for_the_letter(
    drawn: Drawn,
) -> None:
    drawing, _, items = drawn["hr_bench"]
    a, b, c, d = items[0].options
    question = drawing.scenes(count=6)[0].question
    assert items[0].question == f"{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer the option letter directly."
    assert Counter(item.question_type for item in items) == {"single": 12, "cross": 12}


def test_the_four_rotations_of_a_question_are_one_cluster_even_where_two_questions_read_the_same(
    tmp_path: Path, drawn: Drawn
) -> None:
    _, _, items = drawn["hr_bench"]
    assert [item.cluster for item in items] == [str(number) for number in range(6)] * 4
    write_benchmark(tmp_path, Drawing("hr_bench", 0, 12, SIZES))
    changed(tmp_path / "hr_bench_4k.parquet", question="Which?", A="w", B="x", C="y", D="z")
    assert [item.cluster for item in hr_bench.read(opened(tmp_path, "hr_bench"))] == ["0", "1", "2"] * 4


def test_the_two_sizes_of_hr_bench_are_not_mixed_into_one_score(tmp_path: Path) -> None:
    write_benchmark(tmp_path, Drawing("hr_bench", 0, 4, SIZES))
    (tmp_path / "hr_bench_8k.parquet").write_bytes((tmp_path / "hr_bench_4k.parquet").read_bytes())
    with pytest.raises(BenchmarkError, match=r"hr_bench_4k\.parquet and hr_bench_8k\.parquet: give each"):
        hr_bench.read(opened(tmp_path, "hr_bench"))


def test_math_vista_states_the_precision_of_a_decimal_whose_gold_has_other_digits(tmp_path: Path) -> None:
    write_benchmark(tmp_path, Drawing("math_vista", 0, 4, SIZES))
    changed(tmp_path / "data/testmini-00000-of-00001.parquet", precision=2.0)
    decimal = math_vista.read(opened(tmp_path, "math_vista"))[3]
    assert decimal.question_type == "float:2"
    assert rescored("math_vista", decimal, decimal.gold + "04", "official") == 1


def test_testmini_of_math_vision_is_not_taken_for_the_test_split(tmp_path: Path) -> None:
    write_benchmark(tmp_path, Drawing("math_vision", 0, 1, SIZES))
    (tmp_path / "data/test-00000-of-00001.parquet").rename(tmp_path / "data/testmini-00000-of-00001.parquet")
    with pytest.raises(BenchmarkError, match=r"holds no file test-\*\.parquet or data/test-\*\.parquet"):
        math_vision.read(opened(tmp_path, "math_vision"))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_says_which_file_is_missing_and_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=rf"my_{name}: .* holds no file .*; (get it with `hf|write one JSON)"):
        module(name).read(opened(tmp_path, name))


def changed(path: Path, drop: Sequence[str] = (), **values: Any) -> None:
    """Gives every row of a parquet file these values."""
    table = pq.read_table(path)
    rows = [row | values for row in table.to_pylist()]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema).drop_columns(list(drop)), path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("math_vista", {"query": None}, "row 0.*query is null"),
        ("math_vista", {"answer": "purple"}, "answer is 'purple', and not one of"),
        ("math_vista", {"choices": None}, "choices is null where a list of texts is expected"),
        ("math_vision", {"answer": "F"}, "answer is 'F', which is no letter of its 4 options"),
        ("math_vision", {"options": None}, "options is null where a list"),
        ("realworldqa", {"answer": ""}, "answer is '' where text is expected"),
        ("realworldqa", {"image": None}, "row 0.*no image"),
        ("hr_bench", {"answer": "E"}, "no letter of its 4 options"),
        ("hr_bench", {"C": None}, "C is null where text is expected"),
    ],
)
def test_a_row_of_the_wrong_kind_is_named_with_its_field(
    name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_benchmark(tmp_path, Drawing(name, 0, 4, SIZES))
    changed(next(tmp_path.rglob("*.parquet")), **values)
    with pytest.raises(BenchmarkError, match=message):
        module(name).read(opened(tmp_path, name))


def test_a_table_without_a_column_is_named_with_the_column(tmp_path: Path) -> None:
    write_benchmark(tmp_path, Drawing("math_vision", 0, 1, SIZES))
    changed(tmp_path / "data/test-00000-of-00001.parquet", drop=["options"])
    with pytest.raises(BenchmarkError, match="no column options"):
        math_vision.read(opened(tmp_path, "math_vision"))


def test_an_image_that_is_not_there_is_an_error_when_it_is_asked_for(tmp_path: Path) -> None:
    write_benchmark(tmp_path, Drawing("hr_bench", 0, 4, SIZES))
    changed(tmp_path / "hr_bench_4k.parquet", image="not base64!")
    folder = opened(tmp_path, "hr_bench")
    (picture,) = hr_bench.read(folder)[0].images
    assert isinstance(picture, Picture)
    with pytest.raises(BenchmarkError, match="image holds no image"):
        folder.picture(picture)


@pytest.mark.parametrize("content", ["{}", '["not an object"]', '[{"question": 1}]', "not JSON"])
def test_a_template_of_mm_halu_in_another_form_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "response_template.json").write_text(content, encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"response_template\.json"):
        mm_halu.read(opened(tmp_path, "mm_halu"))


def test_realworldqa_open_answers_are_right_as_texts(drawn: Drawn) -> None:
    _, _, items = drawn["realworldqa"]
    open_one = next(item for item in items if item.gold.isdigit())
    assert rescored("realworldqa", open_one, f" {open_one.gold}. ", next(iter(realworldqa.PROFILES))) == 1


# A user's own benchmark.


def mine(root: Path, *rows: dict[str, Any] | str, name: str = "mine.jsonl") -> list[Item]:
    """What is read of a folder with these lines, one image and one video."""
    (root / "images").mkdir(exist_ok=True)
    for media in ("images/1.png", "clip.mp4"):
        (root / media).write_bytes(b"-")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / name).write_text("\n".join(lines), encoding="utf-8")
    return jsonl.read(opened(root, "jsonl"))


def test_all_fields_of_a_users_line_reach_the_item(tmp_path: Path) -> None:
    everything = {
        "id": 7,
        "prompt": "  Which? (left/right) ",
        "answer": "(B)",
        "images": ["images/1.png", "images/1.png"],
        "video": "clip.mp4",
        "num_frames": 3,
        "choices": ["left", "right"],
        "answer_type": "choice",
        "group": "sides",
        "subgroup": "hands",
        "pair": 1,
        "meta": {"by": ["anyone"]},
    }
    assert mine(tmp_path, everything) == [
        Item(
            id="7",
            benchmark="my_jsonl",
            question="  Which? (left/right) ",
            gold="(B)",
            options=("left", "right"),
            question_type="choice",
            cluster="1",
            images=(Picture("images/1.png"), Picture("images/1.png")),
            video="clip.mp4",
            frames=3,
            group="sides",
            subgroup="hands",
        )
    ]


@pytest.mark.parametrize("choices", [["left", "right"], ["A. left", "B. right"], ["(A) left", "(B) right"]])
def test_a_question_is_asked_with_its_choices_lettered_once(choices: list[str], tmp_path: Path) -> None:
    (item,) = mine(tmp_path, {"id": 1, "question": "Which?", "choices": choices, "answer": "right"})
    letter = "Answer with the option's letter from the given choices directly."
    assert item.question == f"Which?\nA. left\nB. right\n{letter}"
    assert [rescored("jsonl", item, output, "official") for output in ("B", "right", "A")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("fields", "gold", "kind", "right", "wrong"),
    [
        ({"answer": "Blue"}, "Blue", "text", "blue.", "red"),
        ({"answer": ["grey", "gray"]}, '["grey", "gray"]', "text", "gray", "green"),
        ({"answer": "[1, 2]"}, '["[1, 2]"]', "text", "[1, 2]", "1"),
        ({"answer": 3, "answer_type": "number"}, "3", "number", "3.0", "4"),
        ({"answer": "1,200", "answer_type": "number"}, "1,200", "number", "1200", "1,20"),
        ({"answer": 8, "answer_type": "number", "scorer": "mra"}, "8", "number:mra", "8", "80"),
        ({"answer": 8, "answer_type": "number", "scorer": "abs_tol=0.5"}, "8", "number:abs_tol=0.5", "8.5", "8.6"),
        ({"answer": 20, "answer_type": "number", "scorer": "rel_tol=0.05"}, "20", "number:rel_tol=0.05", "21", "22"),
        ({"answer": ["red", 2], "answer_type": "list"}, '["red", 2]', "list", '["Red", 2]', '[2, "red"]'),
        ({"answer": "no", "answer_type": "yes_no"}, "no", "yes_no", "False", "yes"),
    ],
)
def test_an_answer_is_scored_by_its_type_and_scorer(
    fields: dict[str, Any], gold: str, kind: str, right: str, wrong: str, tmp_path: Path
) -> None:
    (item,) = mine(tmp_path, {"id": "a", "question": "What?", **fields})
    assert (item.gold, item.question_type) == (gold, kind)
    assert rescored("jsonl", item, right, "official") == 1
    assert rescored("jsonl", item, wrong, "official") == 0


def test_a_number_keeps_the_digits_that_its_tolerance_depends_on(tmp_path: Path) -> None:
    (item,) = mine(tmp_path, '{"id": 1, "question": "How long?", "answer_type": "number", "answer": 2.50}')
    assert item.gold == "2.50"
    assert [rescored("jsonl", item, output, "official") for output in ("2.504", "2.54")] == [1, 0]


def test_blank_lines_a_byte_order_mark_and_other_files_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("{", encoding="utf-8")
    items = mine(
        tmp_path,
        "\ufeff" + json.dumps({"id": 1, "question": "?", "answer": "a"}),
        "   ",
        {"id": "1a", "question": "?", "answer": "b", "pair": None},
        name="benchmark.jsonl",
    )
    assert [item.id for item in items] == ["1", "1a"]


def test_two_files_of_which_none_is_the_benchmark_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(BenchmarkError, match=r"holds mine\.jsonl, other\.jsonl; call the one .* benchmark\.jsonl"):
        mine(tmp_path, {"id": 1, "question": "?", "answer": "a"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 1}, "id '1' was already in line 1"),
        ({"answr": 1}, r"there is no field 'answr'; did you mean answer\?"),
        ({"licence": "x"}, "there is no field 'licence'; put it under meta"),
        ({"answer": None}, "answer is missing"),
        ({"id": 2.5}, "id is '2.5', where text is expected"),
        ({"id": ""}, "id is '', where text is expected"),
        ({"question": None}, "give either question or prompt"),
        ({"prompt": "??"}, "give either question or prompt"),
        ({"images": "images/1.png"}, "images is 'images/1.png', where a list of texts is expected"),
        ({"images": ["images/2.png"]}, "there is no file 'images/2.png'"),
        ({"images": ["images/../../secret.png"]}, "'images/../../secret.png' leads out of the folder"),
        ({"images": ["/etc/hostname"]}, "'/etc/hostname' leads out of the folder"),
        ({"images": ["images"]}, "there is no file 'images'"),
        ({"video": "gone.mp4"}, "there is no file 'gone.mp4'"),
        ({"num_frames": 4}, "num_frames is '4', where a whole number above 0, beside a video, is expected"),
        ({"video": "clip.mp4", "num_frames": 0}, "num_frames is '0'"),
        ({"choices": ["a"]}, "choices is .*, where a list of 2 to 26 different texts"),
        ({"choices": ["a", "A."]}, "choices is .*, where a list of 2 to 26 different texts"),
        ({"choices": ["left", "right"], "answer": "up"}, "gold 'up' is neither a letter nor the text"),
        ({"choices": ["left", "right"], "answer": "C"}, "gold 'C' is neither a letter nor the text"),
        ({"choices": ["a", "b"], "answer_type": "number", "answer": 1}, "answer_type number has no choices"),
        ({"choices": ["left", "right"], "answer": "A", "scorer": "mra"}, "'choice:mra' names no rule"),
        ({"answer_type": "essay"}, "answer_type is 'essay', where one of choice, yes_no, text, list, number"),
        ({"answer_type": "number", "answer": "four"}, "gold 'four' is no number"),
        ({"answer_type": "number", "answer": float("nan")}, "answer is 'NaN', where a text, a finite number"),
        ({"answer_type": "number", "answer": "inf"}, "gold 'inf' is no number"),
        (
            {"answer_type": "list", "answer": [1, float("inf")]},
            r"answer is .*Infinity.*, where a text, a finite number",
        ),
        ({"answer_type": "number", "answer": 0, "scorer": "mra"}, "gold '0' is 0, of which there is no relative error"),
        ({"answer_type": "number", "answer": 1, "scorer": "about"}, "write number, number:mra"),
        ({"answer_type": "number", "answer": [1, 2]}, "answer is .*, where one answer of type number is expected"),
        ({"answer": True}, "answer is 'True', where a text"),
        ({"answer": []}, "answer is .*, where a text"),
        ({"meta": "free"}, "meta is 'free', where an object"),
    ],
)
def test_a_line_that_cannot_be_asked_or_scored_is_named_with_file_and_line(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = {"question": "?", "answer": "a"}
    with pytest.raises(BenchmarkError, match=rf"my_jsonl: mine\.jsonl:3: .*{message}"):
        mine(tmp_path, {"id": 1} | good, "", {"id": 2} | good | fields)


@pytest.mark.parametrize("line", ["{", "[]", "[" * 100_000, '"text"', '{"id": 1, "question": "\\ud800"}'])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"mine\.jsonl:1 is no"):
        mine(tmp_path, line)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"-")
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "2.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BenchmarkError, match=r"mine\.jsonl:1: 'images/2\.png' leads out of the folder"):
        mine(tmp_path / "mine", {"id": 1, "question": "?", "answer": "a", "images": ["images/2.png"]})


def test_the_revision_changes_with_a_question_and_with_an_image(tmp_path: Path) -> None:
    def revision(question: str, image: bytes) -> str:
        mine(tmp_path, {"id": 1, "question": question, "answer": "a", "images": ["images/1.png"]})
        (tmp_path / "images/1.png").write_bytes(image)
        folder = opened(tmp_path, "jsonl")
        (item,) = jsonl.read(folder)
        return folder.digest(picture.file for picture in item.images if isinstance(picture, Picture))

    first = revision("Which?", b"-")
    assert revision("Which?", b"-") == first
    assert revision("What?", b"-") != first
    assert revision("Which?", b"--") != first
