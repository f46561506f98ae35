"""What the updates read: windows of micro-batches with their teacher features, prepared one ahead in a thread.

In: the sequences of the rewritten corpus, a collator, and where teacher features come from. Out: for every update the
micro-batches of this rank.
Always: the records of update u are the visits u * n .. (u + 1) * n of a run (`valr_ops.data.sequences.Visits`), so
windows are full, a resumed run needs only the number of the update, and the same records stand in a window for every
micro-batch size and number of ranks. Within a window, records of like size share a micro-batch; sizes are known without
reading a record, and a record is read when its window is made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from valr_ops.data.batching import IGNORED, Batch, Collator
from valr_ops.data.sequences import Sequence, Sequences
from valr_ops.recipe.cost import Shape, batch_flops
from valr_ops.teachers.online import FeatureSource
from valr_ops.training.engine import Ranks

Features = Mapping[str, list[Tensor | None]]
"""By teacher, one [h, w, D] a segment of the batch, None for a segment without a target."""


@dataclass(frozen=True)
class Share:
    """One micro-batch."""

    batch: Batch
    features: Features

    @property
    def supervised_tokens(self) -> int:
        """Number of labels that the forward's shift leaves."""
        return int((self.batch.labels[:, 1:] != IGNORED).sum())

    @property
    def aligned_segments(self) -> int:
        """Number of segments with a target."""
        return sum(target is not None for target in self.batch.targets)

    @property
    def positions(self) -> int:
        """Number of tokens and slots, without padding."""
        return int(self.batch.attention_mask.sum())

    def flops(self, model: Shape) -> int:
        """Model FLOPs of forward and backward, by the conventions of `recipe.cost`."""
        batch = self.batch
        labelled = (batch.labels[:, 1:] != IGNORED).sum(1)
        grids = [grid for grid in (batch.image_grid_thw, batch.video_grid_thw) if grid is not None]
        frames = [height * width for grid in grids for time, height, width in grid.tolist() for _ in range(time)]
        return batch_flops(model, zip(batch.attention_mask.sum(1).tolist(), labelled.tolist(), strict=True), frames)


@dataclass(frozen=True)
class Window:
    """What this rank computes between two optimizer updates."""

    shares: list[Share]
    token_ids: bytes
    """SHA-256 over the ids of all ranks' records in reading order."""


class Windows:
    """The training data of one rank."""

    def __init__(
        self,
        sequences: Sequences,
        collate: Collator,
        sources: Mapping[str, FeatureSource],
        *,
        micro_batch: int,
        accumulation: int,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._sequences, self._collate, self._sources = sequences, collate, sources
        self._micro_batch, self._ranks = micro_batch, ranks
        self.records = micro_batch * accumulation * ranks.size
        """Number of records in the global window."""
        self._visits = sequences.visits(seed)

    def places(self, update: int) -> list[int]:
        """Places among the sequences of the records of one update, in the order in which they are drawn."""
        return self._visits.between(update * self.records, (update + 1) * self.records)

    def window(self, update: int) -> Window:
        """The micro-batches of `update` that this rank computes; ranks take them in turn.

        Raises:
            ShardError: a record of the window, of whatever rank, is damaged. BatchingError: as the collator.
        """
        drawn = self.places(update)
        # In the order of the shards, so that neighbours are decoded together.
        read = {place: self._sequences[place] for place in sorted(set(drawn))}
        digest = hashlib.sha256()
        for place in drawn:
            digest.update(np.ascontiguousarray(read[place].input_ids, dtype=np.int32).tobytes())
        mine = self._micro_batches(update)[self._ranks.rank :: self._ranks.size]
        return Window(self.shares([[read[place] for place in places] for places in mine]), digest.digest())

    def heaviest(self, start: int, stop: int) -> Iterator[list[Share]]:
        """The worst that a rank computes in the updates `start` .. `stop` - 1, the same on every rank.

        Yields the micro-batches of a rank's window twice, the heaviest of all windows in front: first by tokens x
        segments, then by tokens, because either may need more memory.
        """
        sizes = {
            (update, number): self._size(places)
            for update in range(start, stop)
            for number, places in enumerate(self._micro_batches(update))
        }
        by_work = {place: tokens * (1 + segments) for place, (tokens, segments) in sizes.items()}
        by_tokens = {place: tokens for place, (tokens, _) in sizes.items()}
        for weights in (by_work, by_tokens) if sizes else ():
            update, heaviest = max(weights, key=weights.__getitem__)
            turn, rank = divmod(heaviest, self._ranks.size)
            window = self._micro_batches(update)[rank :: self._ranks.size]
            window.insert(0, window.pop(turn))
            yield self.shares([[self._sequences[place] for place in places] for places in window])

    def shares(self, micro_batches: list[list[Sequence]]) -> list[Share]:
        """A micro-batch of each list of sequences; each teacher is asked once for what all of them look at."""
        batches = [self._collate(sequences) for sequences in micro_batches]
        targets = [target for batch in batches for target in batch.targets if target is not None]
        coming = {teacher: iter(source.features(targets)) for teacher, source in self._sources.items()}
        return [
            Share(
                batch,
                {
                    teacher: [None if target is None else next(features) for target in batch.targets]
                    for teacher, features in coming.items()
                },
            )
            for batch in batches
        ]

    def every(self, sequences: Sequences) -> Iterator[list[Share]]:
        """This rank's micro-batches of one pass over `sequences`, of like sizes, a window's worth at a time."""
        near = sorted(range(len(sequences)), key=sequences.likeness)
        step = self._ranks.size * self._micro_batch
        starts = range(self._ranks.rank * self._micro_batch, len(near), step)
        per_window = self.records // step
        for first in range(0, len(starts), per_window):
            of_window = starts[first : first + per_window]
            yield self.shares([[sequences[place] for place in near[at : at + self._micro_batch]] for at in of_window])

    def ahead(self, start: int, stop: int) -> Iterator[tuple[Window, float]]:
        """Windows `start` .. `stop` - 1 in order, each with the seconds that were spent waiting for it."""
        with ThreadPoolExecutor(1, thread_name_prefix="windows") as pool:
            coming = pool.submit(self.window, start) if start < stop else None
            for update in range(start, stop):
                assert coming is not None
                asked = time.monotonic()
                window = coming.result()
                waited = time.monotonic() - asked
                coming = pool.submit(self.window, update + 1) if update + 1 < stop else None
                yield window, waited

    def _micro_batches(self, update: int) -> list[list[int]]:
        """Places of all micro-batches of `update`, whoever computes them."""
        drawn = sorted(self.places(update), key=self._sequences.likeness)
        return [drawn[start : start + self._micro_batch] for start in range(0, self.records, self._micro_batch)]

    def _size(self, places: list[int]) -> tuple[int, int]:
        """Tokens, slots included, and segments of a micro-batch; stage 1 leaves out the two markers of each segment."""
        latents = self._collate.latents
        segments = int(self._sequences.segments[places].sum())
        tokens = int(self._sequences.lengths[places].sum())
        return (tokens + segments * latents.fed_slots, segments) if latents else (tokens - 2 * segments, 0)
