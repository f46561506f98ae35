from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.training.inputs import sequences, write_corpus
from valr_ops.data.batching import Collator
from valr_ops.data.sequences import Sequence, Sequences
from valr_ops.training.engine import Ranks
from valr_ops.training.windows import Windows

IMAGES = tiny.Images({tiny.digest(name): image for name, image in tiny.images().images.items()})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    """Ten ragged sequences for training."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), [replace(one, split="train") for one in sequences()])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    """Six sequences of one source, which an epoch visits twice, and fourteen of another, of which it visits half."""
    folder = tmp_path_factory.mktemp("mixture")
    made = [replace(one, source="often" if number < 6 else "seldom") for number, one in enumerate(sequences(22))]
    return write_corpus(folder, made, {"often": 2.0, "seldom": 0.5})


def windows(
    corpus: Sequences, micro_batch: int, accumulation: int, rank: int = 0, size: int = 1, stage: int = 2
) -> Windows:
    collate = Collator(IMAGES, tiny.processor(), tiny.recipe().latents if stage == 2 else None)
    ranks = Ranks(rank, size, torch.device("cpu"))
    return Windows(corpus, collate, {}, micro_batch=micro_batch, accumulation=accumulation, seed=3, ranks=ranks)


def names(made: Windows, update: int) -> list[str]:
    return [name for share in made.window(update).shares for name in share.batch.record_ids]


def test_every_record_is_read_once_an_epoch_and_windows_are_always_full(corpus: Sequences) -> None:
    made = windows(corpus, 2, 2)
    read = [place for update in range(5) for place in made.places(update)]
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10] != read[10:]


def test_a_window_has_the_same_records_however_it_is_divided(corpus: Sequences) -> None:
    whole = windows(corpus, 8, 1).window(1)
    parts = [windows(corpus, 2, 2, rank, size=2).window(1) for rank in (0, 1)]
    divided = [name for part in parts for share in part.shares for name in share.batch.record_ids]
    assert sorted(divided) == sorted(whole.shares[0].batch.record_ids)
    assert {part.token_ids for part in parts} == {whole.token_ids}
    assert [len(part.shares) for part in parts] == [2, 2]


@pytest.mark.parametrize("update", [0, 3, 11])
def test_the_ranks_together_read_the_same_records_whether_they_are_one_two_or_four(
    mixture: Sequences, update: int
) -> None:
    alone = windows(mixture, 8, 1)
    for size in (1, 2, 4):
        ranks = [windows(mixture, 1, 8 // size, rank, size) for rank in range(size)]
        assert Counter(name for made in ranks for name in names(made, update)) == Counter(names(alone, update))
        assert {made.window(update).token_ids for made in ranks} == {alone.window(update).token_ids}


def test_a_resumed_run_reads_from_its_next_update_on_what_it_would_have_read_without_replaying(
    mixture: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [windows(mixture, 2, 2).window(update).token_ids for update in range(9)]
    decoded: list[int] = []
    read = Sequences.__getitem__

    def counted(self: Sequences, place: int) -> Sequence:
        decoded.append(place)
        return read(self, place)

    monkeypatch.setattr(Sequences, "__getitem__", counted)
    resumed = windows(mixture, 2, 2)
    assert [window.token_ids for window, _ in resumed.ahead(7, 9)] == whole[7:]
    assert sorted(decoded) == sorted(place for update in (7, 8) for place in set(resumed.places(update)))


def test_an_epoch_visits_the_records_of_a_source_as_often_as_its_weight_says(mixture: Sequences) -> None:
    made = windows(mixture, 1, 1)
    for epoch in range(3):
        start = epoch * 19
        seen = Counter(mixture.id(place) for update in range(start, start + 19) for place in made.places(update))
        assert Counter(seen.values()) == {2: 6, 1: 7}
        assert {name for name, times in seen.items() if times == 2} == {f"tiny/{number:02d}" for number in range(6)}


def test_records_of_like_size_share_a_micro_batch(corpus: Sequences) -> None:
    numbers = [share.batch.slot_mask.any(1).sum().item() for share in windows(corpus, 5, 2).window(0).shares]
    segments = [len(share.batch.targets) for share in windows(corpus, 5, 2).window(0).shares]
    assert numbers == sorted(numbers) and segments == sorted(segments)


def test_micro_batches_are_planned_without_reading_a_record(corpus: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    made = windows(corpus, 2, 2)
    monkeypatch.setattr(made, "shares", lambda lists: planned.extend(map(len, lists)))
    read: list[int] = []
    monkeypatch.setattr(Sequences, "__getitem__", lambda self, place: read.append(place))
    assert len(list(made.heaviest(0, 5))) == 2
    assert planned == [2] * 4 and len(read) == 8, "all five windows were weighed, the heaviest two were read"


def test_windows_prepared_ahead_are_those_asked_for_one_by_one(corpus: Sequences) -> None:
    made = windows(corpus, 2, 2)
    for update, (window, waited) in zip(range(2, 5), made.ahead(2, 5), strict=True):
        assert window.token_ids == made.window(update).token_ids
        assert waited >= 0


def test_validation_reads_every_record_once_over_all_ranks_whatever_its_weight(mixture: Sequences) -> None:
    read = [
        name
        for rank in range(3)
        for shares in windows(mixture, 2, 2, rank, 3).every(mixture)
        for share in shares
        for name in share.batch.record_ids
    ]
    assert sorted(read) == [f"tiny/{number:02d}" for number in range(20)]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_heaviest_are_the_micro_batches_with_the_most_to_compute_of_all_ranks_and_windows(
    corpus: Sequences, stage: int
) -> None:
    ranks = [windows(corpus, 1, 2, rank, 2, stage) for rank in range(2)]
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
