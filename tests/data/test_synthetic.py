from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from valr_ops.data import synthetic
from valr_ops.data.synthetic import MultiViewScene, Scene
from valr_ops.recipe.recipe import SyntheticRecipe


def test_what_is_said_about_a_row_is_what_is_drawn_there() -> None:
    size = SyntheticRecipe()
    pictures = [(scene.pixels, scene.colours) for scene in synthetic.scenes(0, "any", 20, size)]
    for seen in synthetic.multi_view_scenes(0, "any", 20, size):
        pictures += zip(seen.views, seen.colours, strict=True)
    for pixels, rows in pictures:
        for line, colours in enumerate(rows):
            for column, colour in enumerate(colours):
                cell = pixels[16 * line : 16 * (line + 1), 16 * column : 16 * (column + 1)].reshape(-1, 3)
                assert tuple(synthetic._RGB[colour]) in {tuple(pixel) for pixel in cell}
                others = {name for name in synthetic.COLOURS if name != colour}
                assert not {synthetic._RGB[name] for name in others} & {tuple(pixel) for pixel in cell}


def test_the_box_of_a_row_holds_that_row() -> None:
    (scene,) = synthetic.scenes(0, "any", 1, SyntheticRecipe(rows=3, columns=5, cell_pixels=12))
    assert [scene.box(row) for row in range(3)] == [(0, 0, 60, 12), (0, 12, 60, 24), (0, 24, 60, 36)]


def test_the_answer_is_the_last_word_of_the_last_step() -> None:
    drawn: list[Scene | MultiViewScene] = [
        *synthetic.scenes(0, "any", 100, SyntheticRecipe()),
        *synthetic.multi_view_scenes(0, "any", 100, SyntheticRecipe()),
    ]
    assert all(scene.sentences[-1].rstrip(".").split()[-1] == scene.answer for scene in drawn)


def test_questions_say_which_rows_to_read_and_which_one_is_asked_about() -> None:
    colours = (("red",), ("blue",), ("green",))
    pixels = np.zeros((24, 8, 3), np.uint8)
    assert Scene(pixels, colours, 1, 2).question == "Read rows 2 to 3. Which colour is the last in row 3?"
    assert Scene(pixels, colours, 2, 2).question == "Read row 3. Which colour is the last in row 3?"
    views = MultiViewScene(np.stack([pixels] * 3), (colours,) * 3, ((0, 1), (2, 0), (1, 2)))
    assert views.question == (
        "Read row 2 of view 1, row 1 of view 3 and row 3 of view 2. Which colour is the last in row 3 of view 2?"
    )
    assert views.sentences == ("View 1, row 2: blue.", "View 3, row 1: red.", "View 2, row 3: green.")
    assert views.answer == "green"


def test_every_number_of_rows_read_is_equally_frequent_with_every_answer() -> None:
    drawn = synthetic.scenes(0, "any", 512, SyntheticRecipe())
    counted = Counter((len(scene.rows_read), scene.answer) for scene in drawn)
    assert len(counted) == 16 and set(counted.values()) == {32}


def test_every_view_and_row_is_asked_about_equally_often_with_every_answer() -> None:
    # 2 views of 4 rows and 3 views of 4 rows, with 4 answers each: 80 kinds.
    drawn = synthetic.multi_view_scenes(0, "any", 480, SyntheticRecipe())
    counted = Counter((len(scene.views), scene.read[-1], scene.answer) for scene in drawn)
    assert len(counted) == 80 and set(counted.values()) == {6}
    few = synthetic.multi_view_scenes(0, "any", 16, SyntheticRecipe())
    assert set(Counter(scene.answer for scene in few).values()) == {4}


def test_the_views_and_rows_read_before_the_one_asked_about_are_no_favourites() -> None:
    drawn = [scene for scene in synthetic.multi_view_scenes(0, "any", 2000, SyntheticRecipe()) if len(scene.views) == 3]
    read = Counter(scene.read[0] for scene in drawn)
    chance, margin = len(drawn) / 12, 4 * (len(drawn) / 12 * 11 / 12) ** 0.5
    assert len(read) == 12 and all(abs(count - chance) < margin for count in read.values())


def test_each_view_is_read_once_and_no_row_twice() -> None:
    for scene in synthetic.multi_view_scenes(0, "any", 200, SyntheticRecipe()):
        views, rows = zip(*scene.read, strict=True)
        assert sorted(views) == list(range(len(scene.views))) and len(set(rows)) == len(rows)


def test_neighbouring_views_show_the_same_part_of_the_scene_half_a_view_apart() -> None:
    for scene in synthetic.multi_view_scenes(0, "any", 20, SyntheticRecipe()):
        for left, right in zip(scene.views, scene.views[1:], strict=False):
            assert np.array_equal(left[:, 32:], right[:, :32]) and not np.array_equal(left[:, :32], right[:, 32:])


def test_scenes_of_fewer_rows_than_are_wanted_and_of_one_column_can_be_drawn() -> None:
    size = SyntheticRecipe(rows=2, columns=1)
    assert {len(scene.rows_read) for scene in synthetic.scenes(0, "any", 8, size, fewest_rows=3)} == {2}
    views = synthetic.multi_view_scenes(0, "any", 40, size)
    assert {len(scene.read) for scene in views} == {2} and {len(scene.views) for scene in views} == {2, 3}
    assert all(view != other for scene in views for (view, _), (other, _) in [scene.read])
    with pytest.raises(ValidationError, match="rows"):
        SyntheticRecipe(rows=1)


def test_rows_can_not_be_told_from_the_rows_before_them() -> None:
    drawn = synthetic.scenes(0, "any", 2000, SyntheticRecipe())
    pairs = Counter((scene.colours[0][0], scene.colours[1][0]) for scene in drawn)
    assert max(pairs.values()) / 2000 < 0.09  # one in sixteen, and four standard deviations


def test_another_seed_or_name_draws_other_scenes_and_the_same_one_the_same() -> None:
    def pixels(seed: int, name: str) -> list[bytes]:
        size = SyntheticRecipe()
        plain = [scene.pixels.tobytes() for scene in synthetic.scenes(seed, name, 4, size)]
        return plain + [scene.views.tobytes() for scene in synthetic.multi_view_scenes(seed, name, 4, size)]

    once = pixels(0, "a/train")
    assert once == pixels(0, "a/train")
    assert not set(once) & {*pixels(1, "a/train"), *pixels(0, "a/test")}


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
