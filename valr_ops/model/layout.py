"""Where the slots of a batch stand, and its columns rearranged so that all rows reach their segments together.

In: a batch's masks and segment starts. Out: column numbers, and an `Aligned` layout in which the n-th segments of all
rows stand at the same columns, so that one serial step serves every row.
Always: every position of every row stands in the layout exactly once, in its own order; what stands nowhere is a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from valr_ops.data.batching import Batch


class SlotLayoutError(ValueError):
    """The slots of a batch don't form segments of equal length: the message says which promise is broken."""


def slot_columns(batch: Batch) -> Tensor:
    """Columns of the slots, [S, K] int64.

    Raises:
        SlotLayoutError: the slots are not S runs of K positions, each behind a text position.
    """
    mask = batch.slot_mask
    first = (mask & ~F.pad(mask, (1, 0))[:, :-1]).nonzero()
    last = (mask & ~F.pad(mask, (0, 1))[:, 1:]).nonzero()
    lengths = last[:, 1] - first[:, 1] + 1
    per_segment = int(lengths[0]) if len(lengths) else 0
    given = torch.stack([batch.segment_rows, batch.segment_starts], dim=1)
    if not torch.equal(first, given) or bool((lengths != per_segment).any()) or bool((given[:, 1] < 1).any()):
        raise SlotLayoutError(
            f"slot_mask has runs of {lengths.tolist()} slots at (row, column) {first.tolist()}, segments begin at "
            f"{given.tolist()}: they must be the same, of one length, each behind a token, in right-padded rows; "
            "build the batch with collate"
        )
    return batch.segment_starts[:, None] + torch.arange(per_segment, device=mask.device)


@dataclass(frozen=True)
class Run:
    """Aligned columns whose inputs are all known when it begins: they are computed in one parallel step.

    A run behind a segment begins with the segment's last slot; the other slots stand between the runs.
    """

    begin: int
    end: int
    source: Tensor | None
    """[rows] int64: where in this run the position before the first slot stands; None where no slots follow."""


@dataclass(frozen=True)
class Aligned:
    """Rows with their n-th segments at the same columns: text, K slots, text, K slots, ... text."""

    columns: Tensor
    """[rows, aligned] int64: which column of the row stands here; 0 where nothing does."""
    visible: Tensor
    """[rows, aligned] bool: whether anything stands here."""
    places: Tensor
    """[rows, length] int64: the inverse of `columns`; 0 at the batch's padding."""
    runs: list[Run]


def align(batches: Sequence[Batch], slots: int) -> Aligned:
    """The rows of all `batches`, one batch below the other, with `slots` slots a segment.

    Rows wait for each other before every segment; a row without further segments fills the gaps with its text.
    """
    lengths = [length for batch in batches for length in batch.attention_mask.sum(1).tolist()]
    starts = [row for batch in batches for row in _starts(batch)]
    aligned: list[list[int]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    bounds: list[tuple[int, int, list[int] | None]] = []
    for segment in range(max(map(len, starts)) + 1):
        opening = {row: start[segment] for row, start in enumerate(starts) if segment < len(start)}
        waiting = opening or dict(enumerate(lengths))
        width = max(end - done[row] for row, end in waiting.items())
        begin = len(aligned[0])
        for row, columns in enumerate(aligned):
            end = opening.get(row, min(lengths[row], done[row] + width))
            columns += [*range(done[row], end), *[-1] * (width - end + done[row])]
            done[row] = end
            if opening:
                columns += range(end, end + slots) if row in opening else [-1] * slots
                done[row] += slots if row in opening else 0
        # The last slot of the segment before is known by then; it begins this run instead of taking a step of its own.
        begin -= 1 if segment else 0
        source = [opening[row] - 1 - aligned[row][begin] if row in opening else 0 for row in range(len(aligned))]
        bounds.append((begin, len(aligned[0]) - (slots if opening else 0), source if opening else None))
    return _as_tensors(aligned, bounds, max(batch.input_ids.shape[1] for batch in batches), batches[0].input_ids.device)


def _starts(batch: Batch) -> list[list[int]]:
    starts: list[list[int]] = [[] for _ in range(len(batch.input_ids))]
    for row, start in zip(batch.segment_rows.tolist(), batch.segment_starts.tolist(), strict=True):
        starts[row].append(start)
    return starts


def _as_tensors(
    aligned: list[list[int]], bounds: list[tuple[int, int, list[int] | None]], length: int, device: torch.device
) -> Aligned:
    column_of = torch.tensor(aligned)
    visible = column_of >= 0
    places = torch.zeros(len(aligned), length, dtype=torch.int64)
    row_of, place_of = visible.nonzero(as_tuple=True)
    places[row_of, column_of[row_of, place_of]] = place_of
    runs = [Run(begin, end, None if at is None else torch.tensor(at, device=device)) for begin, end, at in bounds]
    return Aligned(column_of.clamp(min=0).to(device), visible.to(device), places.to(device), runs)
