from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.data.made import ALL_FORMATS, context, digests, jsonl_source, recipe, row
from valr_ops.data import sources, synthetic
from valr_ops.data.images import decode
from valr_ops.data.records import Record
from valr_ops.data.sources import SourceError
from valr_ops.recipe.recipe import Recipe, SyntheticRecipe


def built(folder: Path, made: Recipe) -> Path:
    synthetic.build_sources(context(folder, "sources", made))
    return folder / "sources"


def records(name: str, made: Recipe, artifact: Path, split: str = "train") -> list[Record]:
    items = list(sources.read_source(name, made, artifact, split))  # type: ignore[arg-type]
    assert all(isinstance(item, Record) for item in items)
    return items  # type: ignore[return-value]


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    once, again = built(tmp_path / "a", recipe()), built(tmp_path / "b", recipe())
    other = built(tmp_path / "c", recipe().model_copy(update={"seed": 1}))
    assert digests(once) == digests(again)
    assert digests(once) != digests(other)


@pytest.mark.parametrize(("name", "split"), [("scenes", "train"), ("scenes", "test"), ("zebra_cot", "train")])
def test_a_round_trip_through_files_and_reader_gives_the_scenes_back(tmp_path: Path, name: str, split: str) -> None:
    made = recipe()
    size = made.data.synthetic
    count, fewest = size.train_records if split == "train" else 16, size.rows if name == "zebra_cot" else 1
    drawn = synthetic.scenes(0, f"{name}/{split}", count, size, fewest_rows=fewest)
    read = records(name, made, built(tmp_path, made), split)
    assert len(read) == len(drawn)
    for record, scene in zip(read, drawn, strict=True):
        assert np.array_equal(np.asarray(decode(record.images[0].data)), scene.pixels)
        assert [step.text for step in record.steps] == [scene.sentence(line) for line in scene.rows_read]
        assert record.answer == scene.answer
        for step, line in zip(record.steps, scene.rows_read, strict=True):
            assert step.target is not None
            looked_at = decode(record.images[step.target.image].data, step.target.box)
            assert np.array_equal(np.asarray(looked_at), scene.pixels[16 * line : 16 * (line + 1)])


def test_visual_cot_scenes_come_back_with_the_rows_read_as_their_box(tmp_path: Path) -> None:
    made = recipe(synthetic={"train_records": 32, "test_records": 16, "rows": 3, "columns": 5, "cell_pixels": 12})
    drawn = synthetic.scenes(0, "visual_cot/train", 32, made.data.synthetic, fewest_rows=2, most_rows=2)
    read = records("visual_cot", made, built(tmp_path, made))
    for record, scene in zip(read, drawn, strict=True):
        (step,) = record.steps
        assert step.target is not None and step.target.box == (0, 12 * scene.first_row, 60, 12 * (scene.last_row + 1))
        assert step.text == " ".join(scene.sentence(row) for row in scene.rows_read)
        assert record.answer == scene.answer
        assert record.images[0].width == 60 and record.images[0].height == 36


def test_what_is_said_about_a_row_is_what_is_drawn_there() -> None:
    size = SyntheticRecipe()
    for scene in synthetic.scenes(0, "any", 20, size):
        for line, colours in enumerate(scene.colours):
            for column, colour in enumerate(colours):
                cell = scene.pixels[16 * line : 16 * (line + 1), 16 * column : 16 * (column + 1)].reshape(-1, 3)
                assert tuple(synthetic._RGB[colour]) in {tuple(pixel) for pixel in cell}
                others = {name for name in synthetic.COLOURS if name != colour}
                assert not {synthetic._RGB[name] for name in others} & {tuple(pixel) for pixel in cell}


def test_the_answer_is_the_last_word_of_the_last_step_and_steps_vary_from_one_to_all_rows() -> None:
    drawn = synthetic.scenes(0, "any", 512, SyntheticRecipe())
    assert Counter(len(scene.rows_read) for scene in drawn) == {1: 128, 2: 128, 3: 128, 4: 128}
    assert all(scene.sentence(scene.last_row).rstrip(".").split()[-1] == scene.answer for scene in drawn)


def test_guessing_from_the_question_alone_does_no_better_than_chance(tmp_path: Path) -> None:
    made = recipe({"scenes": ALL_FORMATS["scenes"]}, synthetic={"train_records": 512, "test_records": 256})
    artifact = built(tmp_path, made)
    train, test = records("scenes", made, artifact), records("scenes", made, artifact, "test")
    assert max(Counter(record.answer for record in test).values()) == len(test) // 4
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for record in train:
        seen[record.question][record.answer] += 1
    right = sum(seen[record.question].most_common(1)[0][0] == record.answer for record in test)
    assert right / len(test) < 0.33
    assert not any(colour in record.question for record in test for colour in synthetic.COLOURS)


def test_rows_can_not_be_told_from_the_rows_before_them() -> None:
    drawn = synthetic.scenes(0, "any", 2000, SyntheticRecipe())
    pairs = Counter((scene.colours[0][0], scene.colours[1][0]) for scene in drawn)
    assert max(pairs.values()) / 2000 < 0.09  # one in sixteen, and four standard deviations


def test_no_scene_of_the_test_split_is_in_a_training_split(tmp_path: Path) -> None:
    made = recipe()
    artifact = built(tmp_path, made)
    train = {
        image.digest for name in ALL_FORMATS for record in records(name, made, artifact) for image in record.images
    }
    test = {record.images[0].digest for record in records("scenes", made, artifact, "test")}
    assert len(test) == 16 and not train & test


def test_drawn_scenes_have_the_license_of_the_project_in_every_format(tmp_path: Path) -> None:
    made = recipe()
    artifact = built(tmp_path, made)
    assert {record.license for name in ALL_FORMATS for record in records(name, made, artifact)} == {"Apache-2.0"}


def test_scene_labels_name_the_colour_and_the_shape_of_every_cell() -> None:
    images, labels = synthetic.draw_scenes(5, 300, rows=2, columns=3, cell_pixels=16)
    assert images.shape == (300, 32, 48, 3) and images.dtype == np.uint8
    assert labels.shape == (300, 2, 3) and set(np.unique(labels)) == set(range(synthetic.CELL_CLASSES))
    squares = labels % len(synthetic.SHAPES) == synthetic.SHAPES.index("square")
    cells = images.reshape(300, 2, 16, 3, 16, 3).transpose(0, 1, 3, 2, 4, 5)
    for name_index, name in enumerate(synthetic.COLOURS):
        coloured = (cells == synthetic._RGB[name]).all(-1).sum((-1, -2))
        of_colour = labels // len(synthetic.SHAPES) == name_index
        assert (coloured[of_colour] > 20).all() and (coloured[~of_colour] == 0).all()
        assert coloured[of_colour & squares].mean() > 1.2 * coloured[of_colour & ~squares].mean()
    again, _ = synthetic.draw_scenes(5, 300, rows=2, columns=3, cell_pixels=16)
    assert np.array_equal(images, again)


def test_scattered_maps_name_the_colour_and_shape_at_every_pixel() -> None:
    images, colours, shapes = synthetic.draw_scattered(1, 60, 48, 80)
    assert images.shape == (60, 48, 80, 3) and colours.shape == shapes.shape == (60, 48, 80)
    assert set(np.unique(colours)) == set(range(len(synthetic.SCATTERED_COLOURS) + 1))
    assert set(np.unique(shapes)) == set(range(len(synthetic.SHAPES) + 1))
    assert np.array_equal(colours == 0, shapes == 0)
    paper = images[colours == 0].astype(int)
    assert (paper.max(1) == paper.min(1)).all()
    red, green, blue = (
        images[colours == 1 + synthetic.SCATTERED_COLOURS.index(name)] for name in ("red", "green", "blue")
    )
    assert (red.argmax(1) == 0).all() and (green.argmax(1) == 1).all() and (blue.argmax(1) == 2).all()
    assert np.array_equal(images, synthetic.draw_scattered(1, 60, 48, 80)[0])


def test_the_inventory_lists_size_and_digest_of_every_file(tmp_path: Path) -> None:
    artifact = built(tmp_path, recipe())
    inventory = json.loads((artifact / "inventory.json").read_text())
    for name, entry in inventory.items():
        assert entry["generated"] is True
        assert {path: file["md5"] for path, file in entry["files"].items()} == digests(artifact / name)
    PIL.Image.open(io.BytesIO((artifact / "preview.png").read_bytes())).verify()


def test_a_given_folder_is_listed_and_not_copied(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = jsonl_source(tmp_path / "mine", train=[row(0), row(1, images=["../secret.png"])])
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / ".hidden").write_text("x")
    artifact = built(tmp_path / "a", recipe({"mine": {"format": "jsonl", "path": str(folder)}}))
    assert [path.name for path in artifact.iterdir()] == ["inventory.json"]
    entry = json.loads((artifact / "inventory.json").read_text())["mine"]
    assert sorted(entry["files"]) == sorted(["train.jsonl", *(f"images/{number}.png" for number in range(10))])
    assert str(tmp_path) not in (artifact / "inventory.json").read_text()

    file = built(tmp_path / "b", recipe({"mine": {"format": "jsonl", "path": str(folder / "train.jsonl")}}))
    assert sorted(json.loads((file / "inventory.json").read_text())["mine"]["files"]) == ["images/0.png", "train.jsonl"]


@pytest.mark.parametrize("state", ["missing", "empty", "without records", "no sources"])
def test_nothing_to_list_stops_the_stage(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "mine"
    if state != "missing":
        folder.mkdir()
    if state == "without records":
        (folder / "train.jsonl").write_text("\n")
    given = {} if state == "no sources" else {"mine": {"format": "jsonl", "path": str(folder)}}
    with pytest.raises(SourceError, match=r"data\.sources|no record"):
        built(tmp_path / "a", recipe(given))


def test_a_given_folder_that_changed_is_named_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(0)])
    made = recipe({"mine": {"format": "jsonl", "path": str(folder)}, "scenes": ALL_FORMATS["scenes"]})
    artifact = built(tmp_path / "a", made)
    assert synthetic.changed_sources(made, artifact) is None
    (folder / "images" / "3.png").write_bytes(b"other")
    (folder / "images" / "4.png").unlink()
    assert synthetic.changed_sources(made, artifact) == "source mine changed: images/3.png, images/4.png"
