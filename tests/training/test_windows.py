from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.training.inputs import sequences
from valr_ops.data.batching import Collator
from valr_ops.training.engine import Ranks
from valr_ops.training.windows import Windows


def windows(micro_batch: int, accumulation: int, rank: int = 0, size: int = 1, stage: int = 2) -> Windows:
    collate = Collator(tiny.images(), tiny.processor(), tiny.recipe().latents if stage == 2 else None)
    ranks = Ranks(rank, size, torch.device("cpu"))
    return Windows(sequences(), collate, {}, micro_batch=micro_batch, accumulation=accumulation, seed=3, ranks=ranks)


def test_every_record_is_read_once_an_epoch_and_windows_are_always_full() -> None:
    made = windows(2, 2)
    read = [index for update in range(5) for index in made.indices(update)]
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10] != read[10:]


def test_a_window_has_the_same_records_however_it_is_divided() -> None:
    whole = windows(8, 1).window(1)
    parts = [windows(2, 2, rank, size=2).window(1) for rank in (0, 1)]
    divided = [name for part in parts for share in part.shares for name in share.batch.record_ids]
    assert sorted(divided) == sorted(whole.shares[0].batch.record_ids)
    assert {part.token_ids for part in parts} == {whole.token_ids}
    assert [len(part.shares) for part in parts] == [2, 2]


def test_records_of_like_size_share_a_micro_batch() -> None:
    numbers = [share.batch.slot_mask.any(1).sum().item() for share in windows(5, 2).window(0).shares]
    segments = [len(share.batch.targets) for share in windows(5, 2).window(0).shares]
    assert numbers == sorted(numbers) and segments == sorted(segments)


def test_windows_prepared_ahead_are_those_asked_for_one_by_one() -> None:
    made = windows(2, 2)
    for update, (window, waited) in zip(range(2, 5), made.ahead(2, 5), strict=True):
        assert window.token_ids == made.window(update).token_ids
        assert waited >= 0


def test_validation_reads_every_record_once_over_all_ranks() -> None:
    read = [
        name
        for rank in range(3)
        for shares in windows(2, 2, rank, 3).every(sequences())
        for share in shares
        for name in share.batch.record_ids
    ]
    assert sorted(read) == [sequence.id for sequence in sequences()]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_heaviest_are_the_micro_batches_with_the_most_to_compute_of_all_ranks_and_windows(stage: int) -> None:
    ranks = [windows(1, 2, rank, 2, stage) for rank in range(2)]
    planned = [share for made in ranks for update in (1, 2) for share in made.window(update).shares]
    for made in ranks:
        by_work, by_tokens = made.heaviest(1, 3)
        assert by_work[0].positions * (1 + len(by_work[0].batch.targets)) == max(
            share.positions * (1 + len(share.batch.targets)) for share in planned
        )
        assert by_tokens[0].positions == max(share.positions for share in planned)
        assert by_work[0].batch.record_ids != by_tokens[0].batch.record_ids or stage == 1
        assert [len(shares) for shares in (by_work, by_tokens)] == [2, 2]
    assert list(ranks[0].heaviest(3, 3)) == []
