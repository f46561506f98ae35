"""The studies' task: what a picture shows is what its question asks and what the batch says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from valr_ops.data.batching import IGNORED
from valr_ops.model.layout import slot_columns
from valr_ops.model.qwen import make_processor, train_tokenizer
from valr_ops.recipe.recipe import BaseModelRecipe, StudyRecipe
from valr_ops.studies.tiles import CELL_PIXELS, CLASSES, CORNERS, Layout, by_tile, draw


@functools.cache
def layout() -> Layout:
    model = StudyRecipe().model
    return Layout(make_processor(train_tokenizer(["a"], model.vocabulary_size), BaseModelRecipe(from_scratch=model)))


def test_equal_seeds_draw_equal_pictures_and_others_do_not() -> None:
    first, again, other = draw((1, 2), 8, 2), draw((1, 2), 8, 2), draw((1, 3), 8, 2)
    assert all((getattr(first, name) == getattr(again, name)).all() for name in ("pixels", "shown", "corner"))
    assert (first.shown != other.shown).any() and (first.pixels != other.pixels).any()


@pytest.mark.parametrize("side", [2, 3])
def test_the_pixels_of_a_cell_show_its_class_and_nothing_else(side: int) -> None:
    pictures = draw((3,), 64, side)
    cells = torch.from_numpy(pictures.pixels).unflatten(1, (-1, CELL_PIXELS)).unflatten(3, (-1, CELL_PIXELS))
    cells = cells.transpose(2, 3).flatten(3)  # [n, rows, columns, pixels]
    shown = by_tile(cells, side * side).view(64, side * side, CORNERS, CELL_PIXELS, CELL_PIXELS, 3).numpy()
    paint = np.where((shown != 236).any(-1, keepdims=True), shown, 0).max((3, 4))  # one colour a cell, or black
    empty = pictures.shown == CLASSES - 1
    assert (paint.any(-1) == ~empty).all()
    for colour in range(4):
        (found,) = np.unique(paint[~empty & (pictures.shown // 3 == colour)], axis=0)
        assert found.any()


def test_what_is_known_of_a_place_is_what_its_cell_shows() -> None:
    pictures = draw((4,), 16, 3)
    known = by_tile(torch.from_numpy(pictures.known), 9).view(16, 9, CORNERS, 3)
    shown = torch.from_numpy(pictures.shown)
    empty = shown == CLASSES - 1
    assert (known[..., 2] == empty).all()
    assert (known[..., 0] == torch.where(empty, 4, shown // 3)).all()
    assert (known[..., 1] == torch.where(empty, 3, shown % 3)).all()


def test_nothing_but_the_picture_tells_an_answer() -> None:
    pictures = draw((5,), 8192, 2)
    answers = pictures.answers
    counts = np.bincount(answers.ravel(), minlength=CLASSES) / answers.size
    assert np.abs(counts - 1 / CLASSES).max() < 0.01
    # Neither the step before nor the corner says more: within three standard errors of independence.
    together = np.histogram2d(answers[:, 0], answers[:, 1], bins=[np.arange(CLASSES + 1)] * 2)[0] / len(answers)
    assert np.abs(together - np.outer(counts, counts)).max() < 3.5 * np.sqrt(1 / CLASSES**2 / len(answers))


@pytest.mark.parametrize(("slots", "before"), [(None, None), (0, None), (4, None), (4, [2, 0, 1, 3])])
def test_a_batch_says_what_was_asked_and_lays_its_segments_out(slots: int | None, before: list[int] | None) -> None:
    pictures = draw((6,), 5, 2)
    batch = layout().batch(pictures, slots, before)
    segments = sum(before or [1] * 4) if slots else 0
    assert len(batch.segment_rows) == len(batch.targets) == 5 * segments
    if slots:
        columns = slot_columns(batch)
        rows = batch.segment_rows[:, None].expand_as(columns)
        assert batch.slot_mask[rows, columns].all() and int(batch.slot_mask.sum()) == columns.numel()
        looked_at = [int(target.box[0]) for target in batch.targets if target is not None and target.box is not None]
        assert looked_at == 5 * [tile for tile, count in enumerate(before or [1] * 4) for _ in range(count)]
    writing = layout().says_which_tile(batch)
    assert (writing.sum(1) == 4).all()
    said = batch.input_ids[:, 1:][writing[:, :-1]].view(5, 4)
    words = said - said.min()  # letters follow one another in the vocabulary
    assert (words.numpy() == pictures.answers - pictures.answers.min()).all()
    assert (batch.labels[batch.slot_mask] == IGNORED).all()
    supervised = batch.labels != IGNORED
    assert (batch.labels[supervised] == batch.input_ids[supervised]).all()
    assert int(supervised.sum()) == 5 * (4 * 2 + 1 + 2 * (sum(before or [1] * 4) if slots is not None else 0))
    assert not supervised[:, : int(batch.mm_token_type_ids[0].sum()) + 3].any(), "the question is given"
