"""Where slots stand, and rows rearranged so that their n-th segments meet: on rows of every awkward shape."""

from __future__ import annotations

import pytest
import torch

from valr_ops.data.batching import IGNORED, Batch
from valr_ops.model.layout import Aligned, SlotLayoutError, align, slot_columns

Rows = list[list[int]]
"""For each row the widths of its texts; a segment stands between each two of them."""


def make_batch(rows: Rows, slots: int, padding: int = 0) -> Batch:
    lengths = [sum(texts) + slots * (len(texts) - 1) for texts in rows]
    shape = len(rows), max(lengths) + padding
    slot_mask, starts = torch.zeros(shape, dtype=torch.bool), []
    for row, texts in enumerate(rows):
        column = 0
        for text in texts[:-1]:
            starts.append((row, column + text))
            column += text + slots
            slot_mask[row, column - slots : column] = True
    attention_mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    at = torch.tensor(starts, dtype=torch.int64).reshape(-1, 2)
    return Batch(
        input_ids=torch.ones(shape, dtype=torch.int64),
        attention_mask=attention_mask,
        labels=torch.full(shape, IGNORED),
        pixel_values=None,
        image_grid_thw=None,
        mm_token_type_ids=torch.zeros(shape, dtype=torch.int64),
        slot_mask=slot_mask,
        segment_rows=at[:, 0],
        segment_starts=at[:, 1],
        targets=[None] * len(starts),
        record_ids=[f"row {row}" for row in range(len(rows))],
    )


AWKWARD: dict[str, tuple[Rows, int]] = {
    "one row": ([[5, 5]], 4),
    "one slot": ([[4, 2, 2, 1], [1, 1, 1, 1], [20, 1], [1]], 1),
    "slots from column 1": ([[1, 2], [1, 1, 1]], 3),
    "one text position between segments": ([[4, 1, 1, 1], [9, 1, 5]], 3),
    "segments at the very end": ([[4, 2, 0], [3, 0], [1, 5]], 3),
    "segments at the very end of all": ([[4, 2, 0], [3, 1, 0]], 3),
    "a very short row without segments": ([[9, 4], [1], [3, 3, 3]], 3),
    "a very long row without segments": ([[3, 4], [60], [3, 3, 3]], 3),
    "all rows with another number": ([[2, 2, 2, 2, 2], [3, 1, 1, 3], [1, 1, 9], [7, 1], [4]], 2),
    "an empty row": ([[5, 5], [0], [2, 2, 2]], 2),
    "no segments": ([[5], [7]], 0),
}


@pytest.fixture(params=AWKWARD)
def case(request: pytest.FixtureRequest) -> tuple[Rows, int]:
    return AWKWARD[request.param]


def assert_each_position_once(layout: Aligned, batches: list[Batch]) -> None:
    lengths = [int(length) for batch in batches for length in batch.attention_mask.sum(1)]
    for row, length in enumerate(lengths):
        assert layout.columns[row, layout.visible[row]].tolist() == list(range(length))
        assert layout.columns[row, layout.places[row, :length]].tolist() == list(range(length))
        assert bool(layout.visible[row, layout.places[row, :length]].all())


def test_slot_columns_are_those_of_the_mask(case: tuple[Rows, int]) -> None:
    rows, slots = case
    batch = make_batch(rows, slots, padding=2)
    found = slot_columns(batch)
    assert found.shape == (len(batch.segment_rows), slots)
    again = torch.zeros_like(batch.slot_mask)
    again[batch.segment_rows[:, None], found] = True
    assert torch.equal(again, batch.slot_mask)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([[0, 2], [1, 1]], r"begin at \[\[0, 0\]"), ([[3, 0, 2]], r"runs of \[8\] slots")],
    ids=["nothing before the first slot", "no text between two segments"],
)
def test_slots_without_a_source_of_their_own_are_refused(rows: Rows, message: str) -> None:
    with pytest.raises(SlotLayoutError, match=message):
        slot_columns(make_batch(rows, 4))


def test_every_position_stands_in_the_layout_once_and_in_order(case: tuple[Rows, int]) -> None:
    rows, slots = case
    batch = make_batch(rows, slots, padding=3)
    assert_each_position_once(align([batch], slots), [batch])


def test_the_nth_segments_of_all_rows_stand_at_the_same_columns(case: tuple[Rows, int]) -> None:
    rows, slots = case
    batch = make_batch(rows, slots)
    layout = align([batch], slots)
    places = layout.places[batch.segment_rows[:, None], slot_columns(batch)]
    numbers = [number for texts in rows for number in range(len(texts) - 1)]
    serial = [run for run in layout.runs if run.source is not None]
    assert len(serial) == max(len(texts) for texts in rows) - 1
    for segment, number in enumerate(numbers):
        assert places[segment].tolist() == list(range(serial[number].end, serial[number].end + slots))
        source = serial[number].source
        assert source is not None
        row, start = int(batch.segment_rows[segment]), int(batch.segment_starts[segment])
        assert layout.columns[row, serial[number].begin + source[row]] == start - 1


def test_runs_and_the_slots_between_them_fill_the_layout(case: tuple[Rows, int]) -> None:
    rows, slots = case
    layout = align([make_batch(rows, slots)], slots)
    assert layout.runs[0].begin == 0 and layout.runs[-1].source is None
    assert layout.runs[-1].end == layout.columns.shape[1]
    for run, following in zip(layout.runs, layout.runs[1:], strict=False):
        # The last slot of a segment is the first column of the next run.
        assert run.end + slots - 1 == following.begin
        assert run.begin < run.end


def test_no_row_has_a_gap_before_text_in_its_first_run(case: tuple[Rows, int]) -> None:
    layout = align([make_batch(*case)], case[1])
    first = layout.visible[:, : layout.runs[0].end]
    assert not bool((first[:, 1:] & ~first[:, :-1]).any())


def test_the_batches_of_a_window_stand_one_below_the_other(case: tuple[Rows, int]) -> None:
    rows, slots = case
    batches = [make_batch(rows, slots), make_batch([[30], [2]], slots), make_batch(rows[::-1], slots, padding=5)]
    layout, together = align(batches, slots), align([make_batch([*rows, [30], [2], *rows[::-1]], slots)], slots)
    assert_each_position_once(layout, batches)
    assert torch.equal(layout.columns, together.columns) and torch.equal(layout.visible, together.visible)
    assert [(run.begin, run.end) for run in layout.runs] == [(run.begin, run.end) for run in together.runs]
