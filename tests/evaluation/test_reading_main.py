"""The main benchmarks are read as their authors publish them, and drawn ones can be answered by looking."""

from __future__ import annotations

import functools
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valr_ops.data.images import ImageLimits
from valr_ops.data.videos import read_frames
from valr_ops.evaluation.benchmarks import (
    BenchmarkError,
    Item,
    Picture,
    blink,
    cv_bench,
    mmstar,
    mmvp,
    vsi_bench,
    vstar,
)
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.drawn import IMAGE, Drawing, write_benchmark
from valr_ops.evaluation.scoring import OFFICIAL, VLMEVALKIT, Case
from valr_ops.recipe.recipe import SyntheticRecipe

MODULES: dict[str, Any] = {
    "vsi_bench": vsi_bench,
    "blink": blink,
    "mmvp": mmvp,
    "mmstar": mmstar,
    "vstar": vstar,
    "cv_bench": cv_bench,
}
NAMES = list(MODULES)
KINDS = {"vsi_bench": 10, "blink": 14, "mmvp": 2, "mmstar": 18, "vstar": 2, "cv_bench": 6}
NUMBERS = vsi_bench.NUMERIC
CELL = SyntheticRecipe().cell_pixels
COLOURS = {"red": (214, 40, 40), "green": (42, 157, 80), "blue": (30, 96, 220), "yellow": (244, 200, 20)}
Drawn = Callable[[str], tuple[Folder, list[Item]]]
LETTER_ASKED = "Answer with the option's letter from the given choices directly."


def drawing(name: str, count: int, seed: int = 0) -> Drawing:
    return Drawing(name, seed, count, SyntheticRecipe())


def opened(name: str, root: Path) -> Folder:
    return Folder(root, name, MODULES[name].SOURCE)


def read(name: str, root: Path) -> list[Item]:
    items: list[Item] = MODULES[name].read(opened(name, root))
    return items


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """By name a benchmark with twelve questions of each kind, so that 2, 3 or 4 options can be right equally often."""
    root = tmp_path_factory.mktemp("drawn")

    @functools.cache
    def of(name: str) -> tuple[Folder, list[Item]]:
        write_benchmark(root / name, drawing(name, 12 * KINDS[name]))
        return opened(name, root / name), read(name, root / name)

    return of


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def scored(name: str, profile: str, item: Item, said: str) -> float:
    case = Case(item.id, item.gold, said, item.question_type, item.options)
    score: float = MODULES[name].PROFILES[profile](case).score
    return score


def texts_of_options(item: Item) -> list[str]:
    """Without letters; the options of MMVP are one text, those of VSI-Bench have their letters before them."""
    return re.findall("|".join(COLOURS), " ".join(item.options))


def gold_index(item: Item) -> int:
    return "ABCD".index(item.gold.strip("()").upper())


def frames(folder: Folder, item: Item) -> list[np.ndarray]:
    """Pixels of all images, and of all frames of a video, of an item."""
    if item.video:
        limits = ImageLimits(max_pixels=1 << 20, min_side=1)
        encoded = [one.data for one in read_frames(folder.bytes(item.video, table=False), 32, limits, item.video)]
    else:
        encoded = [folder.picture(image) for image in item.images if isinstance(image, Picture)]
    return [np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded]


def seen(pixels: np.ndarray) -> list[list[str]]:
    """The colours of the shapes in a picture, row by row; empty cells are passed over."""
    rows = []
    for top in range(0, pixels.shape[0], CELL):
        cells = [pixels[top : top + CELL, left : left + CELL] for left in range(0, pixels.shape[1], CELL)]
        rows.append([colour for colour in map(colour_of, cells) if colour])
    return rows


def colour_of(cell: np.ndarray) -> str:
    pixels = cell.reshape(-1, 3).astype(int)
    vivid = pixels[np.ptp(pixels, axis=1) > 80]
    if len(vivid) < 10:
        return ""
    mean = vivid.mean(axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))


def looked_up(item: Item, shown: Sequence[list[list[str]]]) -> str:
    """The answer of one who looks: the colour that ends a row, or how many there are of one."""
    if counted := re.search(r"How many (\w+) shapes", item.question):
        return str(sum(colour == counted[1] for row in shown[0] for colour in row))
    asked = re.search(r"Look at the (\w+) image", item.question)
    picture = shown[["first", "second", "third", "fourth"].index(asked[1])] if asked else shown[0]
    row = re.search(r"last in row (\d+)", item.question)
    assert row
    return picture[int(row[1]) - 1][-1]


@pytest.mark.parametrize("name", NAMES)
def test_all_kinds_of_question_are_drawn_and_read_with_ids_of_their_own(name: str, drawn: Drawn) -> None:
    _, items = drawn(name)
    types = Counter(item.question_type for item in items)
    assert len({item.id for item in items}) == len(items) == 12 * KINDS[name]
    assert {item.benchmark for item in items} == {name}
    sub_categories = [part for parts in mmstar.CATEGORIES.values() for part in parts]
    assert types.keys() == set(sub_categories if name == "mmstar" else MODULES[name].COUNTS)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_right_equally_often_in_each_kind_of_question(name: str, drawn: Drawn) -> None:
    _, items = drawn(name)
    places: defaultdict[tuple[str, int], Counter[int]] = defaultdict(Counter)
    for item in items:
        if item.question_type not in NUMBERS:
            places[item.question_type, len(texts_of_options(item))][gold_index(item)] += 1
    assert places
    for (_, options), counted in places.items():
        assert set(counted) == set(range(options))
        assert len(set(counted.values())) == 1


@pytest.mark.parametrize("name", NAMES)
def test_who_looks_at_the_pictures_answers_every_question(name: str, drawn: Drawn) -> None:
    folder, items = drawn(name)
    for item in items[:42]:
        shown = [seen(pixels) for pixels in frames(folder, item)]
        for moment in shown if item.video else [shown[0]]:
            answer = looked_up(item, [moment] if item.video else shown)
            assert answer == (item.gold if item.question_type in NUMBERS else texts_of_options(item)[gold_index(item)])


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        (name, profile)
        for name, module in MODULES.items()
        for profile in module.PROFILES
        if (name, profile) != ("mmvp", OFFICIAL)
    ],
)
def test_the_right_answer_scores_one_and_every_other_option_nothing(name: str, profile: str, drawn: Drawn) -> None:
    for item in drawn(name)[1][:42]:
        assert scored(name, profile, item, item.gold.upper()) == 1
        if item.question_type in NUMBERS:
            wrong = [str(3 * int(item.gold)), "0"]
        else:
            letters = "ABCD"[: len(texts_of_options(item))]
            bare = item.gold.strip("()").upper()
            wrong = [item.gold.upper().replace(bare, letter) for letter in letters if letter != bare]
        assert [scored(name, profile, item, one) for one in wrong] == [0] * len(wrong)


@pytest.mark.parametrize("name", ["blink", "mmvp", "mmstar", "vstar", "cv_bench"])
def test_vlmevalkit_reads_the_text_of_the_right_option(name: str, drawn: Drawn) -> None:
    for item in drawn(name)[1][:28]:
        texts = texts_of_options(item)
        for place, text in enumerate(texts):
            assert scored(name, VLMEVALKIT, item, f"It is {text}") == (place == gold_index(item))


@pytest.mark.parametrize("name", ["blink", "mmstar", "cv_bench", "vstar"])
def test_pictures_decode_to_what_was_drawn(name: str, drawn: Drawn) -> None:
    folder, items = drawn(name)
    scenes = drawing(name, 12 * KINDS[name]).scenes()
    # JPEG blurs the borders of shapes.
    most = 6 if name == "vstar" else 0
    for item in items[::7]:
        question = item.question.splitlines()[0].split("image. ")[-1]
        of_question = [scene.pixels.astype(int) for scene in scenes if scene.question == question]
        assert any(np.abs(one - pixels).mean() <= most for one in frames(folder, item) for pixels in of_question)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    for part, seed in (("once", 0), ("again", 0), ("other", 1)):
        write_benchmark(tmp_path / part, drawing(name, 6, seed))
    assert files(tmp_path / "once") == files(tmp_path / "again") != files(tmp_path / "other")


def test_the_camera_moves_over_the_room(drawn: Drawn) -> None:
    folder, items = drawn("vsi_bench")
    shown = frames(folder, items[0])
    assert len(shown) == 8
    assert seen(shown[0]) == seen(shown[-1])
    assert np.abs(shown[0].astype(int) - shown[-1]).mean() > 10


def test_the_pictures_of_a_pair_differ_only_where_the_answer_is(drawn: Drawn) -> None:
    folder, items = drawn("mmvp")
    assert [item.id for item in items] == [str(index) for index in range(1, 25)]
    for first, second in zip(items[::2], items[1::2], strict=True):
        assert (first.question, first.cluster) == (second.question, second.cluster)
        assert {first.gold, second.gold} == {"(a)", "(b)"}
        ones, others = (seen(frames(folder, item)[0]) for item in (first, second))
        assert sum(a != b for line in zip(ones, others) for a, b in zip(*line)) == 1
    assert len({item.cluster for item in items}) == 12


# Layouts by hand, in invented words.

SEEN = {"bytes": b"an image", "path": None}


def write_lines(root: Path, name: str, *rows: dict[str, Any]) -> None:
    root.mkdir(exist_ok=True)
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(root: Path, name: str, rows: Sequence[dict[str, Any]], **types: pa.DataType) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows))
    for column, kind in types.items():
        values = pa.array([row.get(column) for row in rows], kind)
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, values) if place >= 0 else table.append_column(column, values)
    pq.write_table(table, path)


def room(**changed: Any) -> dict[str, Any]:
    row = {"id": 7, "dataset": "scannet", "scene_name": "scene0001_00", "question_type": "route_planning"}
    row |= {"question": "You stand at the door. Where next?", "ground_truth": "B", "options": ["A. Left", "B. Right"]}
    return row | changed


def write_rooms(root: Path, *rows: dict[str, Any]) -> None:
    write_lines(root, "test.jsonl", *rows)
    (root / "scannet").mkdir()
    (root / "scannet/scene0001_00.mp4").write_bytes(b"a video")


def write_tasks(root: Path, **changed: Any) -> None:
    """A question of each sub-task of BLINK with two images; that of Counting is changed."""
    for task in blink.SUB_TASKS:
        row: dict[str, Any] = {
            "idx": f"val_{task}_1",
            "sub_task": task,
            "choices": ["one", "two"],
            "answer": "(B)",
            "prompt": "How many?",
        }
        row |= {"image_1": SEEN, "image_2": SEEN, "image_3": None, "image_4": None}
        row |= changed if task == "Counting" else {}
        images = {f"image_{number}": IMAGE for number in range(1, 5)}
        write_table(root, f"{task}/val-00000-of-00001.parquet", [row], **images)


def write_pairs(root: Path, heading: str = "Index", rows: Sequence[str] = ("1", "2")) -> None:
    lines = [f"{heading},Question,Options,Correct Answer"]
    lines += [f'{index},"Is the door, here, open?",(a) Open (b) Shut,({"ba"[int(index) % 2]})' for index in rows]
    (root / "MMVP Images").mkdir(parents=True)
    (root / "Questions.csv").write_text("\ufeff" + "\r\n".join(lines), newline="")
    for index in rows:
        (root / f"MMVP Images/{index}.jpg").write_bytes(b"an image")


def star(**changed: Any) -> dict[str, Any]:
    row = {"index": 0, "question": "What is it?\nOptions: A: a cup, B: a dog, and a cat, C: nan, D: nan", "answer": "B"}
    return row | {"image": b"an image", "category": "math", "l2_category": "geometry"} | changed


def small_thing(**changed: Any) -> dict[str, Any]:
    text = f"Is the dog left of the cat?\n(A) left\n(B) right\n{LETTER_ASKED}"
    row = {"image": "relative_position/sa_1.jpg", "text": text, "category": "relative_position", "label": "B"}
    return row | {"question_id": "3"} | changed


def write_small_things(root: Path, *rows: dict[str, Any]) -> None:
    write_lines(root, "test_questions.jsonl", *rows)
    (root / "relative_position").mkdir()
    (root / "relative_position/sa_1.jpg").write_bytes(b"an image")


def write_dimensions(root: Path, **changed: Any) -> None:
    row = {"idx": 5, "task": "Count", "prompt": "How many?\n(A) 1\n(B) 2", "choices": ["1", "2"], "answer": "(B)"}
    for name, sort, source in (("test_2d", "2D", "COCO"), ("test_3d", "3D", "Omni3D")):
        rows = [row | {"type": sort, "source": source, "image": SEEN} | changed]
        write_table(root, f"{name}.parquet", rows, image=IMAGE)


def test_vsi_bench_asks_in_the_words_of_its_authors(tmp_path: Path) -> None:
    size = room(id=8, question_type="object_size_estimation", question="How long is it in cm?", ground_truth="12.5")
    write_rooms(tmp_path, room(), size | {"options": None})
    letter, number = read("vsi_bench", tmp_path)
    assert letter == Item(
        id="7",
        benchmark="vsi_bench",
        question="These are frames of a video.\nYou stand at the door. Where next?\nOptions:\nA. Left\nB. Right\n"
        "Answer with the option's letter from the given choices directly.",
        gold="B",
        options=("A. Left", "B. Right"),
        question_type="route_planning",
        cluster="scannet/scene0001_00",
        video="scannet/scene0001_00.mp4",
    )
    assert number.question == (
        "These are frames of a video.\nHow long is it in cm?\nPlease answer the question using a single word or phrase."
    )
    assert (number.gold, number.options) == ("12.5", ())


def test_vsi_bench_reads_its_whole_table_in_either_form_and_no_pruned_one(tmp_path: Path) -> None:
    write_rooms(tmp_path / "lines", room())
    write_rooms(tmp_path / "parquet", room(id=9))
    write_table(tmp_path / "parquet", "test-00000-of-00001.parquet", [room()])
    for form in ("lines", "parquet"):
        write_table(tmp_path / form, "test_debiased.parquet", [room(id=10)])
        assert [item.id for item in read("vsi_bench", tmp_path / form)] == ["7"]


def test_blink_asks_its_prompt_as_it_is_and_shows_only_the_images_that_there_are(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    items = read("blink", tmp_path)
    assert [item.question_type for item in items] == list(blink.SUB_TASKS)
    name = "Jigsaw/val-00000-of-00001.parquet"
    assert items[5] == Item(
        id="val_Jigsaw_1",
        benchmark="blink",
        question="How many?",
        gold="(B)",
        options=("one", "two"),
        question_type="Jigsaw",
        images=(Picture(name, "image_1", 0), Picture(name, "image_2", 0)),
    )


@pytest.mark.parametrize("heading", ["Index", "lndex"])
def test_mmvp_joins_its_table_with_the_images_by_index(heading: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, heading, rows=("4", "1", "3", "2"))
    items = read("mmvp", tmp_path)
    assert [(item.id, item.cluster) for item in items] == [
        ("4", "pair 2"),
        ("1", "pair 1"),
        ("3", "pair 2"),
        ("2", "pair 1"),
    ]
    assert items[1] == Item(
        id="1",
        benchmark="mmvp",
        question="Is the door, here, open? (a) Open (b) Shut",
        gold="(a)",
        options=("(a) Open (b) Shut",),
        cluster="pair 1",
        images=(Picture("MMVP Images/1.jpg"),),
    )


def test_mmvp_as_one_parquet_file_gives_the_same_questions(tmp_path: Path) -> None:
    write_pairs(tmp_path / "csv")
    row = {"Question": "Is the door, here, open?", "Options": "(a) Open (b) Shut"}
    rows = [row | {"Index": 1, "Correct Answer": "(a)"}, row | {"Index": 2, "Correct Answer": "(b)"}]
    rows = [row | {"image": SEEN} for row in rows]
    write_table(tmp_path / "one", "data/train-00000-of-00001.parquet", rows, Index=pa.int32(), image=IMAGE)
    items = read("mmvp", tmp_path / "one")
    assert [(item.id, item.question, item.gold, item.options, item.cluster) for item in items] == [
        (item.id, item.question, item.gold, item.options, item.cluster) for item in read("mmvp", tmp_path / "csv")
    ]
    assert opened("mmvp", tmp_path / "one").picture(items[1].images[0]) == b"an image"  # type: ignore[arg-type]


def test_mmstar_asks_its_question_and_the_instruction_of_lmms_eval(tmp_path: Path) -> None:
    write_table(tmp_path, "mmstar.parquet", [star()])
    (item,) = read("mmstar", tmp_path)
    assert item == Item(
        id="0",
        benchmark="mmstar",
        question="What is it?\nOptions: A: a cup, B: a dog, and a cat, C: nan, D: nan\n"
        "Answer with the option's letter from the given choices directly",
        gold="B",
        options=("a cup", "a dog, and a cat"),
        question_type="geometry",
        images=(Picture("mmstar.parquet", "image", 0),),
    )
    assert opened("mmstar", tmp_path).picture(Picture("mmstar.parquet", "image", 0)) == b"an image"


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Hint: say A, B.\nQuestion: How far?\nChoices:\n(A) 135°\n(B) 140°\n(C) 1:2", ("135°", "140°", "1:2")),
        ("Options: which?\nOptions: A: yes., B: no.", ("yes.", "no.")),
        ("Which?\nOptions: B: yes, A: no", ()),
        ("Which?", ()),
    ],
)
def test_options_of_mmstar_are_read_out_of_both_forms_of_its_questions(question: str, options: tuple[str, ...]) -> None:
    assert mmstar.stated_options(question) == options


def test_vstar_asks_the_text_of_its_authors(tmp_path: Path) -> None:
    write_small_things(tmp_path, small_thing())
    (item,) = read("vstar", tmp_path)
    assert item == Item(
        id="relative_position/3",
        benchmark="vstar",
        question="Is the dog left of the cat?\n(A) left\n(B) right\n"
        "Answer with the option's letter from the given choices directly.",
        gold="B",
        options=("left", "right"),
        question_type="relative_position",
        images=(Picture("relative_position/sa_1.jpg"),),
    )


def test_cv_bench_asks_its_prompt_with_the_instruction_of_its_authors(tmp_path: Path) -> None:
    write_dimensions(tmp_path)
    flat, deep = read("cv_bench", tmp_path)
    assert flat == Item(
        id="2D/5",
        benchmark="cv_bench",
        question="How many?\n(A) 1\n(B) 2\nAnswer with the option's letter from the given choices directly.",
        gold="(B)",
        options=("1", "2"),
        question_type="coco",
        images=(Picture("test_2d.parquet", "image", 0),),
    )
    assert (deep.id, deep.question_type) == ("3D/5", "omni")


@pytest.mark.parametrize(
    ("module", "total"),
    [(vsi_bench, 5130), (blink, 1901), (mmvp, 300), (mmstar, 1500), (vstar, 191), (cv_bench, 2638)],
)
def test_the_counts_of_the_whole_data_sets_add_up(module: ModuleType, total: int) -> None:
    assert sum(module.COUNTS.values()) == total


# What is missing or wrong is named, with how to get the files.

BAD: dict[str, tuple[str, list[Callable[[Path], object]], str]] = {
    "no table": ("vsi_bench", [], r"holds no file test-\*.parquet or"),
    "no video": (
        "vsi_bench",
        [lambda root: write_lines(root, "test.jsonl", room())],
        "videos are missing.*0001_00.mp4",
    ),
    "a video elsewhere": (
        "vsi_bench",
        [lambda root: write_lines(root, "test.jsonl", room(scene_name="../../rooms/1"))],
        r"'scannet/../../rooms/1.mp4' leads out of",
    ),
    "no JSON": (
        "vsi_bench",
        [lambda root: (root / "test.jsonl").write_text("\n{")],
        "test.jsonl:2 is not JSON",
    ),
    "no question": ("vsi_bench", [lambda root: write_rooms(root, room(question=None))], "row 0 .*question is null"),
    "another type": (
        "vsi_bench",
        [lambda root: write_rooms(root, room(), room(question_type="counting"))],
        "test.jsonl, row 1 .*question_type is 'counting', and not one of object_counting",
    ),
    "a letter beyond the options": (
        "vsi_bench",
        [lambda root: write_rooms(root, room(ground_truth="C"))],
        "ground_truth is 'C', which is no letter of its 2 options",
    ),
    "a gold of 0": (
        "vsi_bench",
        [lambda root: write_rooms(root, room(question_type="object_counting", ground_truth="0"))],
        "ground_truth is '0', from which no relative error",
    ),
    "options in one text": (
        "vsi_bench",
        [lambda root: write_rooms(root, room(options="A. Left"))],
        "options is 'A. Left' where a list of texts is expected",
    ),
    "the test split": (
        "blink",
        [lambda root: write_tasks(root, answer="hidden")],
        "Counting.*row 0.*answer is 'hidden'",
    ),
    "no image in a row": (
        "blink",
        [lambda root: write_tasks(root, image_1=None, image_2=None)],
        "row 0 .*has no image",
    ),
    "a missing sub-task": (
        "blink",
        [write_tasks, lambda root: (root / "Jigsaw/val-00000-of-00001.parquet").unlink()],
        r"holds no file Jigsaw/val-\*.parquet",
    ),
    "a missing image": (
        "mmvp",
        [write_pairs, lambda root: (root / "MMVP Images/2.jpg").unlink()],
        "images are missing.*MMVP Images/2.jpg",
    ),
    "an Index that is none": ("mmvp", [lambda root: write_pairs(root, rows=("01",))], "Index is '01'"),
    "a column by another name": (
        "mmvp",
        [lambda root: write_pairs(root, heading="Number")],
        "Questions.csv, row 0 .*no column Index, but Number, Question",
    ),
    "a table that is cut off": (
        "mmvp",
        [lambda root: (root / "Questions.csv").write_bytes(b'Index,Question\n1,"Is')],
        "Questions.csv is damaged",
    ),
    "damaged parquet": (
        "mmstar",
        [lambda root: (root / "mmstar.parquet").write_bytes(b"PAR1 and no more")],
        "mmstar.parquet is no parquet file",
    ),
    "no column of answers": (
        "mmstar",
        [lambda root: write_table(root, "mmstar.parquet", [{"index": 0, "question": "What?", "image": b"an image"}])],
        "mmstar.parquet, row 0 .*no column answer, but index, question",
    ),
    "another sub-category": (
        "mmstar",
        [lambda root: write_table(root, "mmstar.parquet", [star(l2_category="algebra")])],
        "l2_category is 'algebra'",
    ),
    "no options in the text": (
        "vstar",
        [lambda root: write_small_things(root, small_thing(text="What is it?"))],
        "label is 'B', which is no letter of its 0 options",
    ),
    "an image outside": (
        "vstar",
        [lambda root: write_small_things(root, small_thing(image="../secret.jpg"))],
        "'../secret.jpg' leads out of",
    ),
    "a link that leads out": (
        "vstar",
        [
            lambda root: write_small_things(root, small_thing(image="relative_position/link.jpg")),
            lambda root: (root / "relative_position/link.jpg").symlink_to("/dev/null"),
        ],
        "'relative_position/link.jpg' leads out of",
    ),
    "another source": ("cv_bench", [lambda root: write_dimensions(root, source="ADE")], "test_2d.*source is 'ADE'"),
    "only 2D": (
        "cv_bench",
        [write_dimensions, lambda root: (root / "test_3d.parquet").unlink()],
        "holds no file test_3d.parquet",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_missing_or_wrong_is_named_with_how_to_get_it(case: str, tmp_path: Path) -> None:
    name, steps, message = BAD[case]
    for step in steps:
        step(tmp_path)
    with pytest.raises(BenchmarkError, match=message) as caught:
        read(name, tmp_path)
    assert f"benchmark {name}: " in str(caught.value)
    assert MODULES[name].SOURCE in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"elsewhere is no folder; get it with `hf download BLINK-Benchmark/BLINK"):
        read("blink", tmp_path / "elsewhere")


def test_reading_questions_does_not_read_their_images(tmp_path: Path) -> None:
    write_dimensions(tmp_path)
    damage(tmp_path / "test_2d.parquet", "image.bytes")
    folder = opened("cv_bench", tmp_path)
    flat, deep = cv_bench.read(folder)
    assert folder.picture(deep.images[0]) == b"an image"  # type: ignore[arg-type]
    with pytest.raises(BenchmarkError, match=r"test_2d.parquet is damaged .*; get it with"):
        folder.picture(flat.images[0])  # type: ignore[arg-type]


def damage(path: Path, column: str) -> None:
    """Overwrite the pages of one column of a parquet file."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = map(group.column, range(group.num_columns))
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


def test_a_cell_without_an_image_and_a_row_that_is_not_there_are_named(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    folder = opened("blink", tmp_path)
    name = "Counting/val-00000-of-00001.parquet"
    with pytest.raises(BenchmarkError, match=r"Counting/.*row 0 .*image_3 holds no image"):
        folder.picture(Picture(name, "image_3", 0))
    with pytest.raises(BenchmarkError, match="has no row 1"):
        folder.picture(Picture(name, "image_1", 1))


def test_the_revision_follows_the_content_of_tables_and_the_sizes_of_media(tmp_path: Path) -> None:
    def revision() -> str:
        folder = opened("vsi_bench", tmp_path)
        return folder.digest([item.video for item in vsi_bench.read(folder)])

    write_rooms(tmp_path, room())
    first = revision()
    assert revision() == first
    (tmp_path / "scannet/scene0001_00.mp4").write_bytes(b"a longer video")
    second = revision()
    write_lines(tmp_path, "test.jsonl", room(ground_truth="A"))
    assert len({first, second, revision()}) == 3
