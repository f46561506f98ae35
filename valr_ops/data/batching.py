"""From sequences to padded batches of tensors.

In: sequences (marker pairs without slots), the corpus's images, the base model's processor. Out: `Batch`, right-padded,
with K slots inserted into every segment, or with the marker pairs removed for stage 1.
Always: labels are at their own positions (the forward shifts them); prompts, slots and padding carry -100.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from valr_ops.data.corpus import CorpusError
from valr_ops.data.records import Box
from valr_ops.data.rewriting import ControlTokens
from valr_ops.data.sequences import Region, Sequence
from valr_ops.data.shards import ShardError
from valr_ops.recipe.recipe import LatentRecipe
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLProcessor  # noqa: E402

IGNORED = -100
"""Label of a position that is not supervised."""


class BatchingError(ValueError):
    """Sequences that can't become a batch: the message says which record and which artifact to build again."""


class Images(Protocol):
    """What a collator needs of `valr_ops.data.corpus.ImageStore`."""

    def load(self, digest: str, box: Box | None = None) -> PIL.Image.Image:
        """RGB pixels.

        Raises:
            CorpusError: an unknown digest. ShardError: its shard is damaged. Whatever a decoder raises for bad bytes.
        """


@dataclass(frozen=True)
class Batch:
    """Padded records; B rows, L columns, S segments in reading order (row by row, left to right)."""

    input_ids: Tensor
    """[B, L] int64; slots hold the id of ``<|latent_pad|>``, padding the tokenizer's pad id."""
    attention_mask: Tensor
    """[B, L] int64; 1 at real positions, 0 at the padding on the right."""
    labels: Tensor
    """[B, L] int64; the id at each supervised position, -100 elsewhere. Not shifted."""
    pixel_values: Tensor | None
    """[patches, values] float32 of all images, row by row; None without images."""
    image_grid_thw: Tensor | None
    """[images, 3] int64, patches; None without images."""
    mm_token_type_ids: Tensor
    """[B, L] int64; 1 at image positions, 2 at video positions, 0 elsewhere, slots included."""
    slot_mask: Tensor
    """[B, L] bool; True where the input is a fed-back hidden state."""
    segment_rows: Tensor
    """[S] int64; row of each segment."""
    segment_starts: Tensor
    """[S] int64; column of each segment's first slot."""
    targets: list[Region | None]
    """Length S; what each segment looks at, or None."""
    record_ids: list[str]
    """Length B."""
    pixel_values_videos: Tensor | None = None
    """[patches, values] float32 of all videos, row by row; None without videos."""
    video_grid_thw: Tensor | None = None
    """[videos, 3] int64, patches; None without videos."""
    second_per_grid_ts: Tensor | None = None
    """[videos] float32, seconds between two temporal patches of a video; None is one second."""

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on `device`."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


class Collator:
    """Makes batches, and keeps processed pixels of recent images up to `cache_bytes`.

    Args:
        images: where image digests are looked up.
        processor: the base model's processor.
        latents: how segments are laid out; None removes the marker pairs (stage 1).
        cache_bytes: bound on the pixels kept, in bytes.
        max_length: bound on the positions of a row, slots included; None for none.
    """

    def __init__(
        self,
        images: Images,
        processor: Qwen2_5_VLProcessor,
        latents: LatentRecipe | None,
        cache_bytes: int = 256 * 1024**2,
        max_length: int | None = None,
    ) -> None:
        self.images = images
        self.processor = processor
        self.latents = latents
        self.max_length = max_length
        self.control = ControlTokens.of(processor.tokenizer)
        self._cache: OrderedDict[str, tuple[Tensor, tuple[int, int, int]]] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0

    def __call__(self, sequences: list[Sequence]) -> Batch:
        """The batch of `sequences`, one row each.

        Raises:
            BatchingError: no sequences; one that is longer than `max_length`; an image that is missing, can't be
                decoded, or has another grid than its sequence was written for.
        """
        if not sequences:
            raise BatchingError("a batch needs at least one sequence")
        rows = [self._lay_out(sequence) for sequence in sequences]
        shape = len(rows), max(len(ids) for ids, _, _ in rows)
        input_ids = np.full(shape, self.processor.tokenizer.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        slot_mask = np.zeros(shape, dtype=bool)
        for row, (ids, row_labels, starts) in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            labels[row, : len(ids)] = row_labels
            attention_mask[row, : len(ids)] = 1
            for start in starts:
                slot_mask[row, start : start + self._slots] = True
        pixels = [
            self._pixels(sequence, index) for sequence in sequences for index in range(len(sequence.image_digests))
        ]
        grids = [grid for sequence in sequences for grid in sequence.image_grids]
        segments = [(row, start) for row, (_, _, starts) in enumerate(rows) for start in starts]
        targets = [target for sequence in sequences for target in sequence.targets] if self.latents else []
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            labels=torch.from_numpy(labels),
            pixel_values=torch.cat(pixels) if pixels else None,
            image_grid_thw=torch.tensor(grids, dtype=torch.int64) if grids else None,
            mm_token_type_ids=torch.from_numpy((input_ids == self.processor.image_token_id).astype(np.int64)),
            slot_mask=torch.from_numpy(slot_mask),
            segment_rows=torch.tensor([row for row, _ in segments], dtype=torch.int64),
            segment_starts=torch.tensor([start for _, start in segments], dtype=torch.int64),
            targets=targets,
            record_ids=[sequence.id for sequence in sequences],
        )

    @property
    def _slots(self) -> int:
        return self.latents.fed_slots if self.latents else 0

    def _lay_out(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Ids and labels of one row, both [length] int64, and the columns of the first slots.

        Raises:
            BatchingError: the row is longer than `max_length`.
        """
        ids, labels, starts = [], [], []
        done = length = 0
        opening = [self.control.latent, *[self.control.latent_pad] * self._slots, self.control.latent_end]
        close = self.control.latent_end if self.latents and self.latents.supervise_close else IGNORED
        opening_labels = [self.control.latent, *[IGNORED] * self._slots, close]
        for position in [*(segment.position for segment in sequence.segments), len(sequence.input_ids)]:
            piece = sequence.input_ids[done:position].astype(np.int64)
            ids.append(piece)
            labels.append(np.where(np.arange(done, position) < sequence.prompt_length, IGNORED, piece))
            length += len(piece)
            if self.latents and position < len(sequence.input_ids):
                ids.append(np.array(opening))
                labels.append(np.array(opening_labels))
                starts.append(length + 1)
                length += len(opening)
            done = position + 2
        if self.max_length is not None and length > self.max_length:
            slots = f" with {len(starts)} segments of {self._slots} slots" if self.latents else ""
            fewer = f" or lower latents.slots={self.latents.slots}" if self.latents else ""
            raise BatchingError(
                f"record {sequence.id} has {length} positions{slots}, more than data.max_length={self.max_length}; "
                f"raise data.max_length{fewer}"
            )
        return np.concatenate(ids), np.concatenate(labels), starts

    def _pixels(self, sequence: Sequence, index: int) -> Tensor:
        """[patches, values] of one input image, from the cache if it is there."""
        digest, expected = sequence.image_digests[index], sequence.image_grids[index]
        if digest in self._cache:
            self._cache.move_to_end(digest)
        else:
            picture = self._picture(sequence.id, digest)
            made = self.processor.image_processor(images=[picture], return_tensors="pt")
            grid = tuple(made["image_grid_thw"][0].tolist())
            self._cache[digest] = made["pixel_values"], grid
            self._cached_bytes += made["pixel_values"].nbytes
        pixels, grid = self._cache[digest]
        if grid != expected:
            raise BatchingError(
                f"record {sequence.id}: image {digest[:12]} gives a grid of {grid} patches, but latent_corpus was "
                f"written for {expected}; the processor has changed, build the stage latent_corpus again"
            )
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1][0].nbytes
        return pixels

    def _picture(self, record_id: str, digest: str) -> PIL.Image.Image:
        try:
            return self.images.load(digest)
        except (CorpusError, ShardError) as error:
            raise BatchingError(f"record {record_id}: {error}") from None
        except Exception as error:
            # Decoders raise whatever damaged bytes lead them to: OSError, SyntaxError, struct.error, ValueError ...
            raise BatchingError(
                f"record {record_id}: image {digest[:12]} can't be decoded ({type(error).__name__}: {error}); "
                "build the stage cot_corpus again, which checks every image"
            ) from error


def collate(
    sequences: list[Sequence], images: Images, processor: Qwen2_5_VLProcessor, *, latents: LatentRecipe | None
) -> Batch:
    """One batch of `sequences`; a loop over many batches keeps a `Collator`, which remembers pixels.

    Raises:
        BatchingError: as `Collator.__call__`.
    """
    return Collator(images, processor, latents)(sequences)
