"""What the updates read: windows of micro-batches with their teacher features, prepared one ahead in a thread.

In: sequences in memory, a collator, the feature stores. Out: for every update the micro-batches of this rank.
Always: the records of update u are places u * n .. (u + 1) * n of the epochs' orders one behind the other, so windows
are full, a resumed run needs only the number of the update, and the same records stand in a window for every
micro-batch size and number of ranks. Within a window, records of like size share a micro-batch.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from valr_ops.data.batching import IGNORED, Batch, Collator, order
from valr_ops.data.rewriting import Sequence
from valr_ops.teachers.features import FeatureStore
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
        sequences: list[Sequence],
        collate: Collator,
        stores: Mapping[str, FeatureStore],
        *,
        micro_batch: int,
        accumulation: int,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._sequences, self._collate, self._stores = sequences, collate, stores
        self._micro_batch, self._ranks = micro_batch, ranks
        self.records = micro_batch * accumulation * ranks.size
        """Number of records in the global window."""
        self._order = functools.lru_cache(2)(functools.partial(order, len(sequences), seed))

    def indices(self, update: int) -> list[int]:
        """Places in the list of sequences of the records of one update, in the order in which they are drawn."""
        places = range(update * self.records, (update + 1) * self.records)
        return [self._order(place // len(self._sequences))[place % len(self._sequences)] for place in places]

    def window(self, update: int) -> Window:
        """The micro-batches of `update` that this rank computes; ranks take them in turn."""
        drawn = [self._sequences[index] for index in self.indices(update)]
        digest = hashlib.sha256()
        for sequence in drawn:
            digest.update(np.ascontiguousarray(sequence.input_ids, dtype=np.int32).tobytes())
        drawn.sort(key=lambda sequence: (len(sequence.segments), len(sequence.input_ids), sequence.id))
        starts = range(self._ranks.rank * self._micro_batch, self.records, self._ranks.size * self._micro_batch)
        return Window([self.share(drawn[start : start + self._micro_batch]) for start in starts], digest.digest())

    def share(self, sequences: list[Sequence]) -> Share:
        """One micro-batch of `sequences`."""
        batch = self._collate(sequences)
        features = {
            teacher: [None if target is None else store.get(*target) for target in batch.targets]
            for teacher, store in self._stores.items()
        }
        return Share(batch, features)

    def every(self, sequences: list[Sequence]) -> Iterator[Share]:
        """This rank's micro-batches of one pass over `sequences`, of like sizes, for validation."""
        near = sorted(sequences, key=lambda sequence: (len(sequence.segments), len(sequence.input_ids), sequence.id))
        step = self._ranks.size * self._micro_batch
        for start in range(self._ranks.rank * self._micro_batch, len(near), step):
            yield self.share(near[start : start + self._micro_batch])

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
