"""Drawn scenes: the questions of scale tiny, and pictures with dense labels for pretraining small vision encoders.

In: a seed and sizes. Out: arrays (`draw_scenes`, `draw_scattered`) or questions about pictures (`scenes`,
`multi_view_scenes`); `valr_ops.data.layouts` writes the questions in the public on-disk formats.
Always: the same arguments give the same pixels; nothing in a question or in an earlier step tells a cell of the next
step, every answer is equally frequent for every kind of question, and each step can only be written by looking at its
row. The answer stands in the last row described, so that reasoning which was read off the picture is enough to answer.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw

from valr_ops.data.records import Box
from valr_ops.recipe.recipe import SyntheticRecipe

COLOURS = ("red", "green", "blue", "yellow")
"""Colours of a cell; the answers."""
SHAPES = ("square", "circle", "triangle")
"""Shapes of a cell: they vary freely and no text names them."""
CELL_CLASSES = len(COLOURS) * len(SHAPES)
"""Labels of `draw_scenes` are 0 .. CELL_CLASSES - 1: colour index times the number of shapes plus shape index."""
SCATTERED_COLOURS = (*COLOURS, "black")
"""Colours of `draw_scattered`; its map holds the index plus one."""

_RGB = {
    "red": (214, 40, 40),
    "green": (42, 157, 80),
    "blue": (30, 96, 220),
    "yellow": (244, 200, 20),
    "black": (16, 16, 16),
}
_PAPER = (236, 236, 236)
_SPRITE_VARIANTS = 8

UInt8Array = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]


def draw_scenes(
    seed: int, count: int, rows: int = 4, columns: int = 4, cell_pixels: int = 16
) -> tuple[UInt8Array, npt.NDArray[np.int64]]:
    """Scenes of coloured shapes on a grid, one shape a cell, colour and shape uniform and independent.

    Args:
        seed: any non-negative number.
        count: number of scenes.
        rows, columns: cells.
        cell_pixels: side of a cell; the images are ``rows * cell_pixels`` high.

    Returns:
        images uint8 [count, height, width, 3] and labels int64 [count, rows, columns], see `CELL_CLASSES`.
    """
    labels = np.random.default_rng([seed, 0]).integers(0, CELL_CLASSES, (count, rows, columns))
    return _paint(labels, np.random.default_rng([seed, 1]), cell_pixels), labels


def _paint(labels: npt.NDArray[np.int64], rng: np.random.Generator, cell_pixels: int) -> UInt8Array:
    """Images uint8 [count, rows * cell_pixels, columns * cell_pixels, 3]; size and place in a cell vary by `rng`."""
    sprites = _sprites(cell_pixels)
    count, rows, columns = labels.shape
    cells = sprites[labels, rng.integers(0, _SPRITE_VARIANTS, labels.shape)]
    joined = cells.transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(joined.reshape(count, rows * cell_pixels, columns * cell_pixels, 3))


def _sprites(cell_pixels: int) -> UInt8Array:
    """Every cell that can occur: uint8 [CELL_CLASSES, _SPRITE_VARIANTS, cell_pixels, cell_pixels, 3]."""
    rng = np.random.default_rng([cell_pixels, 2])
    sprites = np.empty((CELL_CLASSES, _SPRITE_VARIANTS, cell_pixels, cell_pixels, 3), np.uint8)
    for label in range(CELL_CLASSES):
        colour, shape = divmod(label, len(SHAPES))
        for variant in range(_SPRITE_VARIANTS):
            cell = PIL.Image.new("RGB", (cell_pixels, cell_pixels), _PAPER)
            side = round(cell_pixels * rng.uniform(0.6, 0.85))
            x, y = (1 + int(rng.integers(0, cell_pixels - side)) for _ in range(2))
            draw = PIL.ImageDraw.Draw(cell)
            _draw_shape(draw, SHAPES[shape], (x, y, x + side - 2, y + side - 2), _RGB[COLOURS[colour]])
            sprites[label, variant] = np.asarray(cell)
    return sprites


def _draw_shape(draw: PIL.ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], fill: Any) -> None:
    x0, y0, x1, y1 = box
    if shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "circle":
        draw.ellipse(box, fill=fill)
    else:
        draw.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=fill)


def draw_scattered(
    seed: int, count: int, height: int = 64, width: int = 64, max_shapes: int = 12
) -> tuple[UInt8Array, Int8Array, Int8Array]:
    """Shapes of many sizes at free places on grey boxes, with what stands at every pixel.

    Args:
        seed: any non-negative number.
        count: number of images.
        height, width: pixels.
        max_shapes: at most so many shapes an image, at least one; later ones cover earlier ones.

    Returns:
        images uint8 [count, height, width, 3]; colour map int8 [count, height, width], 0 where there is no shape, else
        1 + index into `SCATTERED_COLOURS`; shape map int8 [count, height, width], 0 or 1 + index into `SHAPES`.
    """
    rng = np.random.default_rng([seed, 3])
    side = min(height, width)
    images = np.empty((count, height, width, 3), np.uint8)
    colour_map = np.empty((count, height, width), np.int8)
    shape_map = np.empty((count, height, width), np.int8)
    base = np.array([_RGB[name] for name in SCATTERED_COLOURS])
    for index in range(count):
        # One drawing of object numbers, then three table look-ups: three times fewer polygons than three drawings.
        boxes = int(rng.integers(0, 4))
        shapes = int(rng.integers(1, max_shapes + 1))
        colours = rng.integers(0, len(SCATTERED_COLOURS), shapes)
        kinds = rng.integers(0, len(SHAPES), shapes)
        sizes = (side * rng.uniform(0.08, 0.45, shapes)).astype(int).clip(3)
        lefts = rng.integers(-2, width - 3, shapes)
        tops = rng.integers(-2, height - 3, shapes)
        numbers = PIL.Image.new("L", (width, height), 0)
        draw = PIL.ImageDraw.Draw(numbers)
        for box in range(boxes):
            left = box * width // boxes
            right = (box + 1) * width // boxes - int(rng.integers(1, max(2, width // (3 * boxes))))
            draw.rectangle((left, 0, right, height), fill=1 + box)
        for shape in range(shapes):
            x, y, size = int(lefts[shape]), int(tops[shape]), int(sizes[shape])
            _draw_shape(draw, SHAPES[kinds[shape]], (x, y, x + size, y + size), 1 + boxes + shape)
        grey = rng.integers(110, 256, 1 + boxes)[:, None].repeat(3, axis=1)
        tint = base[colours] + rng.integers(-16, 17, (shapes, 3))
        # Blue is anything between navy and azure, so that an encoder learns the word and not one shade.
        tint[:, 1] += np.where(colours == SCATTERED_COLOURS.index("blue"), rng.integers(-40, 61, shapes), 0)
        palette = np.concatenate([grey, tint]).clip(0, 255).astype(np.uint8)
        none = np.zeros(1 + boxes, np.int8)
        drawn = np.asarray(numbers)
        images[index] = palette[drawn]
        colour_map[index] = np.concatenate([none, colours.astype(np.int8) + 1])[drawn]
        shape_map[index] = np.concatenate([none, kinds.astype(np.int8) + 1])[drawn]
    return images, colour_map, shape_map


MOST_VIEWS = 3
"""Views of a multi-view scene are 2 .. MOST_VIEWS."""


@dataclass(frozen=True)
class Scene:
    """One drawn question about one picture."""

    pixels: UInt8Array
    """[height, width, 3]"""
    colours: tuple[tuple[str, ...], ...]
    """Colour of every cell, by row."""
    first_row: int
    """First row of the reasoning, from 0."""
    last_row: int
    """Last row of the reasoning, from 0; the one that is asked about."""

    @property
    def asked(self) -> str:
        """The question itself, without which rows to read."""
        return f"Which colour is the last in row {self.last_row + 1}?"

    @property
    def question(self) -> str:
        """Which rows to read, and what is asked about the last of them."""
        named = f"rows {self.first_row + 1} to {self.last_row + 1}" if len(self.rows_read) > 1 else None
        return f"Read {named or f'row {self.last_row + 1}'}. {self.asked}"

    @property
    def answer(self) -> str:
        """The colour at the end of the last row read."""
        return self.colours[self.last_row][-1]

    @property
    def rows_read(self) -> range:
        """The rows that the reasoning goes through, from 0."""
        return range(self.first_row, self.last_row + 1)

    @property
    def sentences(self) -> tuple[str, ...]:
        """The text of every step."""
        return tuple(map(self.sentence, self.rows_read))

    def sentence(self, row: int) -> str:
        """What a step says about one row."""
        return f"Row {row + 1}: {' '.join(self.colours[row])}."

    def box(self, row: int) -> Box:
        """Where a row is in the picture."""
        height, width = self.pixels.shape[:2]
        cell = height // len(self.colours)
        return 0, row * cell, width, (row + 1) * cell


@dataclass(frozen=True)
class MultiViewScene:
    """One drawn question about several views of one scene, as a camera gives them that moves half a view to the right.

    No two steps read the same row: what one says would else be half of the other.
    """

    views: UInt8Array
    """[views, height, width, 3]"""
    colours: tuple[tuple[tuple[str, ...], ...], ...]
    """Colour of every cell, by view and row."""
    read: tuple[tuple[int, int], ...]
    """View and row of every step, from 0; the last one is asked about."""

    @property
    def question(self) -> str:
        """Which rows to read in which views, and what is asked about the last of them."""
        named = [f"row {row + 1} of view {view + 1}" for view, row in self.read]
        listed = " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))
        return f"Read {listed}. Which colour is the last in {named[-1]}?"

    @property
    def answer(self) -> str:
        """The colour at the end of the last row read."""
        view, row = self.read[-1]
        return self.colours[view][row][-1]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The text of every step."""
        return tuple(f"View {view + 1}, row {row + 1}: {' '.join(self.colours[view][row])}." for view, row in self.read)


def scenes(
    seed: int, name: str, count: int, recipe: SyntheticRecipe, fewest_rows: int = 1, most_rows: int | None = None
) -> list[Scene]:
    """Questions about drawn scenes; the same arguments give the same scenes.

    Every combination of number of rows read and answer is equally frequent, so that no answer can be guessed from the
    question better than by chance (one in four).

    Args:
        seed: the recipe's.
        name: of the source and split, so that no two draw the same scenes.
        count: number of scenes.
        recipe: sizes.
        fewest_rows: at least so many rows in the reasoning.
        most_rows: at most so many; None for all of them.
    """
    rng = _generator(seed, name)
    labels = rng.integers(0, CELL_CLASSES, (count, recipe.rows, recipe.columns))
    most, fewest = min(most_rows or recipe.rows, recipe.rows), min(fewest_rows, recipe.rows)
    combinations = rng.permutation(np.arange(count) % ((most - fewest + 1) * len(COLOURS)))
    rows_read, answers = fewest + combinations // len(COLOURS), combinations % len(COLOURS)
    first = rng.integers(0, recipe.rows - rows_read + 1)
    last = first + rows_read - 1
    asked = (np.arange(count), last, recipe.columns - 1)
    labels[asked] = answers * len(SHAPES) + labels[asked] % len(SHAPES)
    images = _paint(labels, rng, recipe.cell_pixels)
    return [
        Scene(pixels=images[i], colours=_colour_names(labels[i]), first_row=int(first[i]), last_row=int(last[i]))
        for i in range(count)
    ]


def multi_view_scenes(seed: int, name: str, count: int, recipe: SyntheticRecipe) -> list[MultiViewScene]:
    """Questions about 2 .. `MOST_VIEWS` views of a scene; the same arguments give the same scenes.

    Every view is read once, in any order, each in another row; with fewer rows than views, as many views as there are
    rows. Every combination of number of views, view and row asked about, and answer is equally frequent.

    Args:
        seed: the recipe's.
        name: of the source and split, so that no two draw the same scenes.
        count: number of scenes.
        recipe: sizes of one view.
    """
    rng = _generator(seed, name)
    shift = max(1, recipe.columns // 2)
    labels = rng.integers(0, CELL_CLASSES, (count, recipe.rows, recipe.columns + (MOST_VIEWS - 1) * shift))
    kinds = [
        (views, view, row) for views in range(2, MOST_VIEWS + 1) for view in range(views) for row in range(recipe.rows)
    ]
    # Answers take turns fastest, so that they are balanced for any number of scenes.
    turns = rng.permutation(count)
    order = rng.permutation(len(kinds))
    read = []
    for i, turn in enumerate(turns):
        views, asked_view, asked_row = kinds[order[turn // len(COLOURS) % len(kinds)]]
        before = min(views, recipe.rows) - 1
        other_views = rng.permutation([view for view in range(views) if view != asked_view])[:before]
        other_rows = rng.permutation([row for row in range(recipe.rows) if row != asked_row])[:before]
        pairs = zip(other_views.tolist(), other_rows.tolist(), strict=True)
        read.append((views, (*pairs, (asked_view, asked_row))))
        asked = (i, asked_row, asked_view * shift + recipe.columns - 1)
        labels[asked] = turn % len(COLOURS) * len(SHAPES) + labels[asked] % len(SHAPES)
    panoramas = _paint(labels, rng, recipe.cell_pixels)

    def windows(of: npt.NDArray[Any], views: int, cell: int) -> list[npt.NDArray[Any]]:
        return [of[:, view * shift * cell : (view * shift + recipe.columns) * cell] for view in range(views)]

    return [
        MultiViewScene(
            views=np.stack(windows(panoramas[i], views, recipe.cell_pixels)),
            colours=tuple(map(_colour_names, windows(labels[i], views, 1))),
            read=steps,
        )
        for i, (views, steps) in enumerate(read)
    ]


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _colour_names(labels: npt.NDArray[np.int64]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(COLOURS[cell // len(SHAPES)] for cell in row) for row in labels)
