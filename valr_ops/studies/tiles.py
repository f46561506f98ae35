"""The studies' task: pictures of tiles, and trails through them that only looking finds.

A picture has T x T tiles of 2 x 2 cells. The first cell of a tile is a sign: what it shows names another tile. Each of
the other cells is empty or shows a shape of one of 4 colours and 3 forms. A question names a tile to start from and one
of the three other corners. A step says what the asked corner of the present tile shows, one of 13 words, and then goes
on to the tile that the sign names, which is never said. So the text tells little of what has to be seen, step n can
only be written after n looks one after another, and a record's target is the tile that a step is about.

    in    a seed and sizes
    out   `Pictures` as arrays, and the `Batch` of them in the layout of training
    always the same arguments give the same pictures; a trail visits no tile twice, and the cells that are asked about
          are uniform and independent, so nothing but the picture tells a step. What was said before helps in one way:
          it leaves fewer tiles (`told_without_signs`), and of a trail through all of them the last is told by that
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from valr_ops.data.batching import IGNORED, Batch
from valr_ops.data.rewriting import ControlTokens
from valr_ops.data.sequences import Region
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLProcessor  # noqa: E402

COLOURS, FORMS, CORNERS = 4, 3, 4
CLASSES = COLOURS * FORMS + 1
"""What a cell can show: a coloured form, or, the last one, nothing."""
CELL_PIXELS = 16
QUESTIONS = {"colour": COLOURS + 1, "form": FORMS + 1, "layout": 2}
"""What a teacher may know of a cell, with the number of answers: its colour or none, its form or none, whether
anything stands there."""
SIGN = 0
"""The corner that names the next tile."""

_NUMBERS, _CORNERS, _WORDS, _STEP = "0123456789ab", "ijkl", "ABCDEFGHIJKLM", ";"
_EMPTY = CLASSES - 1
_PAINTS = ((214, 40, 40), (42, 157, 80), (30, 96, 220), (244, 200, 20))
_PAPER = 236
_LOOKS = 16
"""Sizes and places in which a form is drawn."""


@dataclass(frozen=True)
class Pictures:
    """n pictures with one question each."""

    pixels: npt.NDArray[np.uint8]
    """[n, side, side, 3]"""
    shown: npt.NDArray[np.int64]
    """[n, tiles, corners]: class of every cell, tiles and the cells of a tile in reading order."""
    trail: npt.NDArray[np.int64]
    """[n, steps]: the tile that each step is about."""
    corner: npt.NDArray[np.int64]
    """[n]: the cell of every tile that is asked about."""

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, which: slice | npt.NDArray[np.int64]) -> Pictures:
        return Pictures(self.pixels[which], self.shown[which], self.trail[which], self.corner[which])

    @property
    def steps(self) -> int:
        return self.trail.shape[1]

    @property
    def met(self) -> npt.NDArray[np.int64]:
        """[n, steps, corners]: what the tiles of the trail show."""
        return np.take_along_axis(self.shown, self.trail[:, :, None], axis=1)

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """[n, steps]: the class that each step has to say."""
        return self.met[np.arange(len(self)), :, self.corner]

    @property
    def known(self) -> npt.NDArray[np.int64]:
        """[n, rows, columns, 3]: the answers to `QUESTIONS` for the cell at each place of the picture."""
        shown = _laid_out(self.shown)
        empty = shown == _EMPTY
        return np.stack([np.where(empty, COLOURS, shown // FORMS), np.where(empty, FORMS, shown % FORMS), empty], -1)


def draw(seed: Sequence[int], count: int, side: int, steps: int) -> Pictures:
    """`count` pictures of `side` x `side` tiles with a question and its trail each."""
    rng = np.random.default_rng(seed)
    tiles = side * side
    shown = rng.integers(0, CLASSES, (count, tiles, CORNERS))
    shown[:, :, SIGN] = rng.integers(0, tiles, (count, tiles))
    trail = rng.permuted(np.tile(np.arange(tiles), (count, 1)), axis=1)[:, :steps]
    np.put_along_axis(shown[:, :, SIGN], trail[:, :-1], trail[:, 1:], axis=1)
    cells = _laid_out(_cells()[shown, rng.integers(0, _LOOKS, shown.shape)])
    rows, columns = cells.shape[1:3]
    pixels = cells.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * CELL_PIXELS, columns * CELL_PIXELS, 3)
    return Pictures(np.ascontiguousarray(pixels), shown, trail, rng.integers(SIGN + 1, CORNERS, count))


def told_without_signs(tiles: int, steps: int) -> list[float]:
    """By step, the chance of whoever follows no sign and says the word that most of the tiles not yet visited have.

    The question names the first tile; what was said before leaves `tiles` - n for step n + 1.
    """
    chances = [1.0]
    for left in range(tiles - 1, tiles - steps, -1):
        # The expected number of tiles that have the most common of `left` words, from the coefficients of exponential
        # generating functions: in how many ways no word stands in more than `most` of them.
        inverse = [1 / math.factorial(count) for count in range(left)]
        ways = [(Polynomial(inverse[: most + 1]) ** CLASSES).coef[left] for most in range(1, left)]
        chances.append(1 - float(sum(ways)) * math.factorial(left) / CLASSES**left / left)
    return chances


def _laid_out(by_tile: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """[n, tiles, corners, ...] to [n, rows of cells, columns of cells, ...]."""
    count, tiles, _, *rest = by_tile.shape
    side = math.isqrt(tiles)
    laid = np.moveaxis(by_tile.reshape(count, side, side, 2, 2, *rest), 3, 2)
    return laid.reshape(count, 2 * side, 2 * side, *rest)


def along_trail(grid: Tensor, pictures: Pictures) -> Tensor:
    """[n, rows, columns, D] over whole pictures to [n * steps, rows of a tile, columns of a tile, D], step by step."""
    count, tiles = pictures.shown.shape[:2]
    side = math.isqrt(tiles)
    _, rows, columns, width = grid.shape
    cut = grid.reshape(count, side, rows // side, side, columns // side, width).transpose(2, 3)
    by_tile = cut.reshape(count, tiles, rows // side, columns // side, width)
    return by_tile[torch.arange(count)[:, None], torch.from_numpy(pictures.trail)].flatten(0, 1)


@functools.cache
def _cells() -> npt.NDArray[np.uint8]:
    """[classes, looks, pixels, pixels, 3]: everything that a cell can show."""
    rng = np.random.default_rng(7)
    cells = np.full((CLASSES, _LOOKS, CELL_PIXELS, CELL_PIXELS, 3), _PAPER, np.uint8)
    for kind, look in np.ndindex(_EMPTY, _LOOKS):
        side = int(rng.integers(7, 12))
        left, top = (int(rng.integers(0, CELL_PIXELS - side + 1)) for _ in range(2))
        right, bottom = left + side - 1, top + side - 1
        picture = PIL.Image.fromarray(cells[kind, look])
        canvas, paint = PIL.ImageDraw.Draw(picture), _PAINTS[kind // FORMS]
        match kind % FORMS:
            case 0:
                canvas.rectangle((left, top, right, bottom), fill=paint)
            case 1:
                canvas.ellipse((left, top, right, bottom), fill=paint)
            case _:
                canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=paint)
        cells[kind, look] = np.asarray(picture)
    return cells


class Layout:
    """Pictures as batches: the ids of picture, question, steps and segments.

    Args:
        processor: of the model; every letter is one id of its tokenizer.
    """

    def __init__(self, processor: Qwen2_5_VLProcessor) -> None:
        tokenizer = processor.tokenizer
        self._processor, self._control = processor, ControlTokens.of(tokenizer)

        def ids(tokens: Sequence[str]) -> npt.NDArray[np.int64]:
            return np.array([tokenizer.convert_tokens_to_ids(token) for token in tokens])

        self._numbers, self._corners, self._words, (self._step,) = map(ids, (_NUMBERS, _CORNERS, _WORDS, _STEP))
        special = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>")
        self._begin, self._image, self._end, self._stop = ids(special)

    def batch(self, pictures: Pictures, slots: int | None, before: Sequence[int] | None = None) -> Batch:
        """All `pictures` in one batch, which needs no padding.

        Args:
            slots: K; 0 leaves the two control tokens alone, None leaves them out as well.
            before: how many segments stand before each step; one each by default.
        """
        count, steps = pictures.answers.shape
        before = [0 if slots is None else 1] * steps if before is None else before
        cells = pictures.shown[0].size
        image = np.array([self._begin, *[self._image] * cells, self._end])
        segment = np.array([self._control.latent, *[self._control.latent_pad] * (slots or 0), self._control.latent_end])
        words = self._words[pictures.answers]
        question = np.stack([self._numbers[pictures.trail[:, 0]], self._corners[pictures.corner]], axis=1)
        columns = [np.tile(image, (count, 1)), question]
        prompt = length = len(image) + 2
        starts: list[int] = []
        looked_at: list[int] = []
        for step in range(steps):
            for _ in range(before[step]):
                columns.append(np.tile(segment, (count, 1)))
                starts.append(length + 1)
                looked_at.append(step)
                length += len(segment)
            columns += [np.full((count, 1), self._step), words[:, step, None]]
            length += 2
        ids = torch.from_numpy(np.concatenate([*columns, np.full((count, 1), self._stop)], axis=1))
        slot_mask = ids == self._control.latent_pad
        labels = ids.masked_fill(slot_mask, IGNORED)
        labels[:, :prompt] = IGNORED
        seen = self._processor.image_processor(images=list(pictures.pixels), return_tensors="pt")
        segments = len(starts) if slots else 0
        targets: list[Region | None] = []
        trails = pictures.trail.tolist()
        if segments:
            targets += [Region(str(row), _box(tiles[step])) for row, tiles in enumerate(trails) for step in looked_at]
        return Batch(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=labels,
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
            mm_token_type_ids=(ids == self._image).long(),
            slot_mask=slot_mask,
            segment_rows=torch.arange(count).repeat_interleave(segments),
            segment_starts=torch.tensor((starts * count)[: segments * count], dtype=torch.int64),
            targets=targets,
            record_ids=[str(row) for row in range(count)],
        )

    def writing(self, batch: Batch) -> Tensor:
        """[n, length] bool: the positions from which the steps' words are written."""
        return (batch.input_ids == self._step) & (batch.labels != IGNORED)


def _box(tile: int) -> tuple[int, int, int, int]:
    """A name for the target, which nothing is cut out by: features come from whole pictures."""
    return tile, 0, tile + 1, 1
