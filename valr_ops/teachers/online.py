"""Features computed while training goes on, each once for a window, in a thread beside the updates.

In: a teacher and the images of the corpus. Out: what `FeatureStore` gives, on the teacher's device.
Always: the same targets give what a store of the same teacher holds, before it was rounded; on a GPU the encoder has a
stream of its own, so that the update in front does not wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from valr_ops.data.sequences import Region
from valr_ops.teachers.extraction import Extractor, arranged
from valr_ops.teachers.stored import FeatureError, shown


class FeatureSource(Protocol):
    """Where training gets features from: a `FeatureStore`, or a teacher at work."""

    dim: int
    """Width of a patch feature."""

    def features(self, targets: Sequence[Region]) -> list[Tensor]:
        """``[rows, columns, dim]`` of each of `targets`, which may repeat. Raises `FeatureError`."""


class OnlineFeatures:
    """Computes features where they are asked for."""

    def __init__(self, extractor: Extractor) -> None:
        self._extractor, self.dim = extractor, extractor.teacher.dim
        device = extractor.teacher.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def features(self, targets: Sequence[Region]) -> list[Tensor]:
        """``[rows, columns, dim]`` of each of `targets`; every distinct one is computed once.

        Raises:
            FeatureError: an image can't be decoded, or a box lies outside of it.
            CorpusError, ShardError: an image is missing or damaged.
        """
        joint = self._extractor.joint
        distinct = arranged({target.seen(joint=joint) for target in targets})
        found: dict[Region, Tensor] = {}
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            for batch in self._extractor.batches([distinct]):
                for target, why in zip(batch.targets, batch.rejected, strict=True):
                    if why is not None:
                        raise FeatureError(
                            f"the image of {shown(target)} can't be decoded ({why}); build the stage cot_corpus again, "
                            "which checks every image"
                        )
                found |= zip(batch.targets, batch.values, strict=True)
                if self._stream:
                    # The updates read on another stream: the memory must not be given away before they did.
                    batch.values.record_stream(torch.cuda.default_stream(batch.values.device))
        if self._stream:
            self._stream.synchronize()
        return [found[target.seen(joint=joint)] for target in targets]
