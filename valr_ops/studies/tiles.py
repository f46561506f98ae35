"""The studies' task: pictures of tiles, and questions whose every step can only be written by looking at its tile.

A picture has T x T tiles of 2 x 2 cells; a cell is empty or shows a shape of one of 4 colours and 3 forms. A question
names a corner, i to l: the cell of every tile that is asked about. Step i says tile i's number and what stands in its
asked cell, one of 13 words. So the text tells one of the four things that a tile shows, and a teacher's features tell
all four.

    in    a seed and sizes
    out   `Pictures` as arrays, and the `Batch` of them in the layout of training
    always the same arguments give the same pictures; every cell is uniform and independent of the others, so nothing
          but its own look tells it, and what was said before does not help
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

_NUMBERS, _CORNERS, _WORDS = "0123456789abcdef", "ijkl", "ABCDEFGHIJKLM"
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
    corner: npt.NDArray[np.int64]
    """[n]: the cell of every tile that is asked about."""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def tiles(self) -> int:
        return self.shown.shape[1]

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """[n, tiles]: the class that each step has to say."""
        return self.shown[np.arange(len(self)), :, self.corner]

    @property
    def known(self) -> npt.NDArray[np.int64]:
        """[n, rows, columns, 3]: the answers to `QUESTIONS` for the cell at each place of the picture."""
        shown = _laid_out(self.shown)
        empty = shown == _EMPTY
        return np.stack([np.where(empty, COLOURS, shown // FORMS), np.where(empty, FORMS, shown % FORMS), empty], -1)


def draw(seed: Sequence[int], count: int, side: int) -> Pictures:
    """`count` pictures of `side` x `side` tiles with a question each."""
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, CLASSES, (count, side * side, CORNERS))
    cells = _laid_out(_cells()[shown, rng.integers(0, _LOOKS, shown.shape)])
    rows, columns = cells.shape[1:3]
    pixels = cells.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * CELL_PIXELS, columns * CELL_PIXELS, 3)
    return Pictures(np.ascontiguousarray(pixels), shown, rng.integers(0, CORNERS, count))


def _laid_out(by_tile: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """[n, tiles, corners, ...] to [n, rows of cells, columns of cells, ...]."""
    count, tiles, _, *rest = by_tile.shape
    side = math.isqrt(tiles)
    laid = np.moveaxis(by_tile.reshape(count, side, side, 2, 2, *rest), 3, 2)
    return laid.reshape(count, 2 * side, 2 * side, *rest)


def by_tile(grid: Tensor, tiles: int) -> Tensor:
    """[n, rows, columns, D] over a whole picture to [n * tiles, rows of a tile, columns of a tile, D]."""
    side = math.isqrt(tiles)
    count, rows, columns, width = grid.shape
    cut = grid.view(count, side, rows // side, side, columns // side, width)
    return cut.transpose(2, 3).reshape(count * tiles, rows // side, columns // side, width)


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

        self._numbers, self._corners, self._words = ids(_NUMBERS), ids(_CORNERS), ids(_WORDS)
        special = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>")
        self._begin, self._image, self._end, self._stop = ids(special)

    def batch(self, pictures: Pictures, slots: int | None, before: Sequence[int] | None = None) -> Batch:
        """All `pictures` in one batch, which needs no padding.

        Args:
            slots: K; 0 leaves the two control tokens alone, None leaves them out as well.
            before: how many segments stand before each step; one each by default.
        """
        count, tiles = pictures.answers.shape
        before = [0 if slots is None else 1] * tiles if before is None else before
        image = np.array([self._begin, *[self._image] * (CORNERS * tiles), self._end])
        segment = np.array([self._control.latent, *[self._control.latent_pad] * (slots or 0), self._control.latent_end])
        words = self._words[pictures.answers]
        columns = [np.tile(image, (count, 1)), self._corners[pictures.corner][:, None]]
        prompt = length = len(image) + 1
        starts: list[int] = []
        looked_at: list[int] = []
        for tile in range(tiles):
            for _ in range(before[tile]):
                columns.append(np.tile(segment, (count, 1)))
                starts.append(length + 1)
                looked_at.append(tile)
                length += len(segment)
            columns += [np.full((count, 1), self._numbers[tile]), words[:, tile, None]]
            length += 2
        ids = torch.from_numpy(np.concatenate([*columns, np.full((count, 1), self._stop)], axis=1))
        slot_mask = ids == self._control.latent_pad
        labels = ids.masked_fill(slot_mask, IGNORED)
        labels[:, :prompt] = IGNORED
        seen = self._processor.image_processor(images=list(pictures.pixels), return_tensors="pt")
        segments = len(starts) if slots else 0
        targets: list[Region | None] = []
        if segments:
            targets += [Region(str(row), (tile, 0, tile + 1, 1)) for row in range(count) for tile in looked_at]
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

    def says_which_tile(self, batch: Batch) -> Tensor:
        """[n, length] bool: the positions of the steps' numbers, from which the asked word is written."""
        numbers: Tensor = torch.isin(batch.input_ids, torch.from_numpy(self._numbers).to(batch.input_ids.device))
        return numbers & (batch.labels != IGNORED)
