"""Making features: targets in, finished shards out, with decoding, the encoder and the disk side by side.

In: a teacher, the images of a corpus, and targets in the order of `arranged`. Out: patch features batch by batch
(`Extractor`), or the shards of a plan (`extract`).
Always: threads decode ahead of the encoder, a bounded number of images; a batch never crosses a shard, so that a run
that goes on after a kill computes the same bits; each shard is claimed by a lock, so that any number of processes on
one folder share the work, and what a dead one had claimed is free again; an image that can't be decoded costs its own
targets and no other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from valr_ops.data.corpus import ImageStore
from valr_ops.data.images import decode
from valr_ops.data.records import Box
from valr_ops.data.sequences import Target
from valr_ops.teachers.encoders import Teacher, squash
from valr_ops.teachers.stored import SHARD_BYTES, FeatureError, ShardWriter, bytes_per_target, is_whole

_BATCHES_AHEAD = 3
"""Batches whose images are decoded, or being decoded, while the encoder works."""
_BATCHES_TO_WRITE = 2


def arranged(targets: Iterable[Target]) -> list[Target]:
    """`targets` in the order in which they are computed: scenes of like size together, then by image and box."""
    return sorted(targets, key=lambda one: (len(one.views), one.views, one.digest, one.box or ()))


@dataclass(frozen=True)
class Features:
    """The patch features of a batch of targets."""

    targets: tuple[Target, ...]
    values: Tensor
    """``[n, rows, columns, dim]`` on the teacher's device; zero where `rejected`."""
    rejected: tuple[str | None, ...]
    """Of each target why its image can't be decoded; None where it can."""


class Extractor:
    """A teacher that is given targets instead of pixels.

    Args:
        teacher: the encoder.
        images: where digests are looked up.
        threads: that decode; as many as this process may use cores where none is given.
    """

    def __init__(self, teacher: Teacher, images: ImageStore, threads: int | None = None) -> None:
        self.teacher, self.joint = teacher, teacher.recipe.views == "joint"
        self._images, self._lock = images, threading.Lock()
        self._threads = threads or len(os.sched_getaffinity(0))

    def batches(self, groups: Iterable[Sequence[Target]]) -> Iterator[Features]:
        """The features of the targets of each group, in order; a batch is of one group.

        Raises:
            FeatureError: a box lies outside of its image. CorpusError, ShardError: an image is missing or damaged.
        """
        coming: deque[tuple[tuple[Target, ...], list[Future[list[Tensor | str]]]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decoding") as pool:
            try:
                for group in groups:
                    for batch in self._divided(group):
                        coming.append((batch, [pool.submit(self._decode, *part) for part in _looked_at(batch)]))
                        if len(coming) > _BATCHES_AHEAD:
                            yield self._features(*coming.popleft())
                while coming:
                    yield self._features(*coming.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def pixels(self, targets: Sequence[Target]) -> Tensor:
        """What the encoder sees of each target itself, uint8 ``[n, side, side, 3]``."""
        side = self.teacher.image_pixels
        return torch.cat([squash([self._images.load(one.digest, one.box)], side) for one in targets])

    def _divided(self, targets: Sequence[Target]) -> Iterator[tuple[Target, ...]]:
        """Batches of at most as many images as the teacher takes at once; scenes stay whole and are of one size."""
        for views, group in groupby(targets, key=lambda one: len(one.views)):
            batch: list[Target] = []
            scenes: set[tuple[str, ...]] = set()
            for target in group:
                whole = len(batch) if not views else len(scenes | {target.views}) * views
                if batch and whole > self.teacher.batch_images - (not views):
                    yield tuple(batch)
                    batch, scenes = [], set()
                batch.append(target)
                scenes.add(target.views)
            yield tuple(batch)

    def _decode(self, digest: str, boxes: Sequence[Box | None]) -> list[Tensor | str]:
        """The squashed pixels ``[1, side, side, 3]`` of the regions of an image, or why there are none."""
        with self._lock:
            data = self._images.get(digest)
        try:
            picture = decode(data)
            picture.load()
        except Exception as error:
            # Decoders raise whatever damaged bytes lead them to: OSError, SyntaxError, struct.error, ValueError ...
            return [f"{type(error).__name__}: {error}"] * len(boxes)
        for box in boxes:
            if box and not (0 <= box[0] < box[2] <= picture.width and 0 <= box[1] < box[3] <= picture.height):
                raise FeatureError(
                    f"box {list(box)} of image {digest[:12]} lies outside of {picture.width} x {picture.height} px; "
                    "latent_corpus and cot_corpus are of different runs: make both again"
                )
        return [squash([picture.crop(box) if box else picture], self.teacher.image_pixels) for box in boxes]

    def _features(self, targets: tuple[Target, ...], decoding: Sequence[Future[list[Tensor | str]]]) -> Features:
        seen = [part for future in decoding for part in future.result()]
        blank = torch.zeros(1, self.teacher.image_pixels, self.teacher.image_pixels, 3, dtype=torch.uint8)
        pixels = torch.cat([blank if isinstance(part, str) else part for part in seen])
        reasons = [part if isinstance(part, str) else None for part in seen]
        with torch.no_grad():
            if not targets[0].views:
                values = self.teacher.features(pixels)
            else:
                views = len(targets[0].views)
                of_scenes = self.teacher.joint(pixels.unflatten(0, (-1, views)))
                scenes = list(dict.fromkeys(one.views for one in targets))
                places = [(scenes.index(one.views), one.views.index(one.digest)) for one in targets]
                # A view that is missing changes what is computed for all others of its scene.
                reasons = [_first(reasons[scene * views : (scene + 1) * views]) for scene, _ in places]
                values = of_scenes[[scene for scene, _ in places], [view for _, view in places]]
        if any(reasons):
            values[[reason is not None for reason in reasons]] = 0
        return Features(targets, values, tuple(reasons))


def _looked_at(batch: Sequence[Target]) -> Iterator[tuple[str, list[Box | None]]]:
    """Images that a batch needs with their regions, in the order in which the encoder is given them."""
    if batch[0].views:
        for scene in dict.fromkeys(one.views for one in batch):
            for view in scene:
                yield view, [None]
    else:
        for digest, group in groupby(batch, key=lambda one: one.digest):
            yield digest, [one.box for one in group]


def _first(reasons: Iterable[str | None]) -> str | None:
    return next(filter(None, reasons), None)


# ----------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class ShardPlan:
    """What one shard will hold."""

    targets: tuple[Target, ...]

    @cached_property
    def key(self) -> str:
        """Digest of the targets: names the finished file while the others are being made."""
        return hashlib.sha256(json.dumps(self.targets).encode()).hexdigest()


def plan(targets: Sequence[Target], teacher: Teacher) -> list[ShardPlan]:
    """Targets in order, as many in a shard as fit, the shards of nearly equal size."""
    size = bytes_per_target(teacher.grid, teacher.dim, teacher.recipe.storage)
    count = math.ceil(len(targets) * size / SHARD_BYTES)
    edges = [len(targets) * part // count for part in range(count + 1)]
    return [ShardPlan(tuple(targets[start:end])) for start, end in pairwise(edges)]


def finished_path(finished: Path, shard: ShardPlan) -> Path:
    """Where a shard is when it is whole."""
    return finished / f"{shard.key}.safetensors"


def extract(
    extractor: Extractor, shards: Iterable[ShardPlan], finished: Path, made: set[ShardPlan] | None = None
) -> Iterator[int]:
    """Make the shards that are not there yet and that no other process is making.

    Args:
        finished: the folder that processes share.
        made: gets those that were made here.

    Yields:
        After each batch the number of its targets.

    Raises:
        FeatureError, CorpusError, ShardError: as `Extractor.batches`. OSError: a full disk.
    """
    taken: list[_Claim] = []
    computing: deque[_Claim] = deque()
    writing: deque[Future[None]] = deque()

    def claimed() -> Iterator[Sequence[Target]]:
        for shard in shards:
            claim = _claim(extractor.teacher, shard, finished)
            if claim is not None:
                taken.append(claim)
                computing.append(claim)
                yield shard.targets

    with ThreadPoolExecutor(1, thread_name_prefix="writing") as pool:
        try:
            for batch in extractor.batches(claimed()):
                claim = computing[0]
                claim.left -= len(batch.targets)
                rejected = [reason is not None for reason in batch.rejected]
                writing.append(pool.submit(claim.write, batch.values.cpu(), rejected, last=claim.left == 0))
                # A full disk shows here, and not when everything was computed.
                while writing and (len(writing) > _BATCHES_TO_WRITE or writing[0].done()):
                    writing.popleft().result()
                if claim.left == 0:
                    computing.popleft()
                    if made is not None:
                        made.add(claim.shard)
                yield len(batch.targets)
            for future in writing:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            for claim in taken:
                claim.abandon()


def complete(extractor: Extractor, shards: Sequence[ShardPlan], finished: Path) -> Iterator[int]:
    """`extract`, then wait for what other processes are making, and make it where they died.

    Yields:
        Numbers of targets whose features are there now; they add up to those that were missing.
    """
    missing = [shard for shard in shards if not is_whole(finished_path(finished, shard))]
    made: set[ShardPlan] = set()
    yield from extract(extractor, missing, finished, made)
    for shard in missing:
        if shard in made:
            continue
        # One at a time and nothing else claimed: two that wait can't wait for each other.
        while not is_whole(finished_path(finished, shard)):
            with _lock(finished, shard):
                pass
            for _ in extract(extractor, [shard], finished):
                pass
        yield len(shard.targets)


class _Claim:
    """A shard that this process makes and no other."""

    def __init__(self, shard: ShardPlan, writer: ShardWriter, lock: FileLock) -> None:
        self.shard, self._writer, self._lock = shard, writer, lock
        self.left = len(shard.targets)
        """Targets to compute."""

    def write(self, values: Tensor, rejected: Sequence[bool], last: bool) -> None:
        """The next features; the last ones finish the shard."""
        self._writer.write(values, rejected)
        if last:
            self._writer.finish()
            self._lock.release()

    def abandon(self) -> None:
        """Give it up, unless it was finished."""
        if self._lock.is_locked:
            self._writer.abandon()
            self._lock.release()


def _claim(teacher: Teacher, shard: ShardPlan, finished: Path) -> _Claim | None:
    """None where the shard is whole or another process makes it."""
    path, lock = finished_path(finished, shard), _lock(finished, shard)
    if is_whole(path):
        return None
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    if is_whole(path):
        lock.release()
        return None
    for left_over in finished.glob(f"{path.name}.*.part"):
        left_over.unlink(missing_ok=True)
    writer = ShardWriter(path, len(shard.targets), teacher.grid, teacher.dim, teacher.recipe.storage)
    return _Claim(shard, writer, lock)


def _lock(finished: Path, shard: ShardPlan) -> FileLock:
    # The thread that writes releases what the main one took.
    return FileLock(finished_path(finished, shard).with_suffix(".lock"), thread_local=False)
