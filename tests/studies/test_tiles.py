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
from valr_ops.studies.tiles import CELL_PIXELS, CLASSES, CORNERS, SIGN, Layout, along_trail, draw, told_without_signs


@functools.cache
def layout() -> Layout:
    model = StudyRecipe().model
    return Layout(make_processor(train_tokenizer(["a"], model.vocabulary_size), BaseModelRecipe(from_scratch=model)))


def test_equal_seeds_draw_equal_pictures_and_others_do_not() -> None:
    first, again, other = draw((1, 2), 8, 2, 3), draw((1, 2), 8, 2, 3), draw((1, 3), 8, 2, 3)
    assert all((getattr(first, name) == getattr(again, name)).all() for name in vars(first))
    assert (first.shown != other.shown).any() and (first.pixels != other.pixels).any()


@pytest.mark.parametrize(("side", "steps"), [(2, 4), (3, 5)])
def test_the_pixels_of_a_cell_show_its_class_and_nothing_else(side: int, steps: int) -> None:
    pictures = draw((3,), 64, side, steps)
    cells = torch.from_numpy(pictures.pixels).unflatten(1, (-1, CELL_PIXELS)).unflatten(3, (-1, CELL_PIXELS))
    cells = cells.transpose(2, 3).flatten(3)  # [n, rows, columns, pixels]
    shown = along_trail(cells, pictures).view(64, steps, CORNERS, CELL_PIXELS, CELL_PIXELS, 3).numpy()
    paint = np.where((shown != 236).any(-1, keepdims=True), shown, 0).max((3, 4))  # one colour a cell, or black
    empty = pictures.met == CLASSES - 1
    assert (paint.any(-1) == ~empty).all()
    for colour in range(4):
        (found,) = np.unique(paint[~empty & (pictures.met // 3 == colour)], axis=0)
        assert found.any()


def test_what_is_known_of_a_place_is_what_its_cell_shows() -> None:
    pictures = draw((4,), 16, 3, 4)
    known = along_trail(torch.from_numpy(pictures.known), pictures).view(16, 4, CORNERS, 3)
    met = torch.from_numpy(pictures.met)
    empty = met == CLASSES - 1
    assert (known[..., 2] == empty).all()
    assert (known[..., 0] == torch.where(empty, 4, met // 3)).all()
    assert (known[..., 1] == torch.where(empty, 3, met % 3)).all()


def test_the_sign_of_a_tile_names_the_next_one_of_its_trail_and_none_is_visited_twice() -> None:
    pictures = draw((5,), 256, 3, 9)
    assert (pictures.met[:, :-1, SIGN] == pictures.trail[:, 1:]).all()
    assert (np.sort(pictures.trail, axis=1) == np.arange(9)).all()
    assert (pictures.shown[:, :, SIGN] < 9).all() and (pictures.corner != SIGN).all()


def test_nothing_but_the_picture_tells_an_answer() -> None:
    pictures = draw((5,), 8192, 2, 4)
    answers = pictures.answers
    counts = np.bincount(answers.ravel(), minlength=CLASSES) / answers.size
    assert np.abs(counts - 1 / CLASSES).max() < 0.01
    # The step before says nothing more: within four and a half standard errors of independence.
    together = np.histogram2d(answers[:, 0], answers[:, 1], bins=[np.arange(CLASSES + 1)] * 2)[0] / len(answers)
    assert np.abs(together - np.outer(counts, counts)).max() < 4.5 * np.sqrt(1 / CLASSES**2 / len(answers))


@pytest.mark.parametrize(("side", "steps"), [(2, 4), (3, 1), (3, 5), (3, 9)])
def test_what_is_told_without_a_sign_is_what_the_tiles_left_have_most(side: int, steps: int) -> None:
    pictures = draw((7,), 8192, side, steps)
    words = pictures.shown[np.arange(len(pictures)), :, pictures.corner]
    guessed = np.empty((len(pictures), steps))
    for step in range(steps):
        counts = np.zeros((len(pictures), CLASSES))
        for tile in range(side * side):
            left = tile == pictures.trail[:, 0] if step == 0 else (tile != pictures.trail[:, :step]).all(1)
            counts[np.arange(len(pictures)), words[:, tile]] += left
        guessed[:, step] = counts.argmax(1) == pictures.answers[:, step]
    # Within four and a half standard errors.
    assert guessed.mean(0) == pytest.approx(told_without_signs(side * side, steps), abs=4.5 * 0.5 / 8192**0.5)


@pytest.mark.parametrize(("slots", "before"), [(None, None), (0, None), (4, None), (4, [2, 0, 1, 3])])
def test_a_batch_says_what_was_asked_and_lays_its_segments_out(slots: int | None, before: list[int] | None) -> None:
    pictures = draw((6,), 5, 2, 4)
    batch = layout().batch(pictures, slots, before)
    segments = sum(before or [1] * 4) if slots else 0
    assert len(batch.segment_rows) == len(batch.targets) == 5 * segments
    if slots:
        columns = slot_columns(batch)
        rows = batch.segment_rows[:, None].expand_as(columns)
        assert batch.slot_mask[rows, columns].all() and int(batch.slot_mask.sum()) == columns.numel()
        looked_at = [int(target.box[0]) for target in batch.targets if target is not None and target.box is not None]
        there = [step for step, count in enumerate(before or [1] * 4) for _ in range(count)]
        assert looked_at == pictures.trail[:, there].ravel().tolist()
    writing = layout().writing(batch)
    assert (writing.sum(1) == 4).all()
    said = batch.input_ids[:, 1:][writing[:, :-1]].view(5, 4)
    words = said - said.min()  # letters follow one another in the vocabulary
    assert (words.numpy() == pictures.answers - pictures.answers.min()).all()
    assert (batch.labels[batch.slot_mask] == IGNORED).all()
    supervised = batch.labels != IGNORED
    assert (batch.labels[supervised] == batch.input_ids[supervised]).all()
    assert int(supervised.sum()) == 5 * (4 * 2 + 1 + 2 * (sum(before or [1] * 4) if slots is not None else 0))
    assert not supervised[:, : int(batch.mm_token_type_ids[0].sum()) + 4].any(), "the question is given"
