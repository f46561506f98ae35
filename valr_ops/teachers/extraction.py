"""Making features: targets in, finished shards out, with decoding, the encoder and the disk side by side.

In: a teacher, the images of a corpus, and targets in the order of `arranged`. Out: patch features batch by batch
(`Extractor`), or the shards of a plan (`extract`).
Always: threads decode ahead of the encoder, a bounded number of images; a batch never crosses a shard, so that a run
that goes on after a kill computes the same bits; each shard is claimed by a lock, so that any number of processes on
one folder share the work, and what a dead one had claimed is free again; an image that can't be decoded costs its own
targets and no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
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
from valr_ops.data.sequences import Region
from valr_ops.teachers.encoders import Teacher, squash
from valr_ops.teachers.stored import SHARD_BYTES, FeatureError, ShardWriter, bytes_per_target, is_whole

_BATCHES_AHEAD = 3
"""Batches whose images are decoded, or being decoded, while the encoder works."""
_BATCHES_TO_WRITE = 2

_Regions = list[Tensor | str]
"""Pixels ``[1, side, side, 3]`` of the regions of an image, or why there are none."""
_Decoding = tuple[Future[_Regions], str, Sequence[Box | None]]
"""Of an image, its digest and the regions to cut out."""


def arranged(targets: Iterable[Region]) -> list[Region]:
    """`targets` in the order in which they are computed: scenes of like size together, then by image and box."""
    return sorted(targets, key=lambda one: (len(one.views), one.views, one.digest, one.box or ()))


@dataclass(frozen=True)
class Features:
    """The patch features of a batch of targets."""

    targets: tuple[Region, ...]
    values: Tensor
    """``[n, rows, columns, dim]`` on the teacher's device; zero where `rejected`."""
    rejected: tuple[str | None, ...]
    """Of each target why its image can't be decoded; None where it can."""


class Extractor:
    """A teacher that is given targets instead of pixels.

    Args:
        teacher: the encoder.
        images: where digests are looked up.
        threads: cores that it may use, those of this process where none is given; an encoder on the CPU takes as many
            of them as torch has threads, the others decode.
    """

    def __init__(self, teacher: Teacher, images: ImageStore, threads: int | None = None) -> None:
        self.teacher, self.joint = teacher, teacher.recipe.views == "joint"
        self._images, self._lock = images, threading.Lock()
        encoding = torch.get_num_threads() if teacher.device.type == "cpu" else 0
        self._decoders = max(1, (threads or len(os.sched_getaffinity(0))) - encoding)

    def batches(self, groups: Iterable[Sequence[Region]]) -> Generator[Features]:
        """The features of the targets of each group, in order; a batch is of one group.

        Raises:
            FeatureError: a box lies outside of its image. CorpusError, ShardError: an image is missing or damaged.
        """
        coming: deque[tuple[tuple[Region, ...], list[_Decoding]]] = deque()
        with ThreadPoolExecutor(self._decoders, thread_name_prefix="decoding") as pool:
            try:
                for group in groups:
                    for batch in self._divided(group):
                        decoding = [(pool.submit(self._decode, *part), *part) for part in _looked_at(batch)]
                        coming.append((batch, decoding))
                        if len(coming) > _BATCHES_AHEAD:
                            yield self._features(*coming.popleft())
                while coming:
                    yield self._features(*coming.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def pixels(self, targets: Sequence[Region]) -> Tensor:
        """What the encoder sees of each target itself, uint8 ``[n, side, side, 3]``."""
        side = self.teacher.image_pixels
        return torch.cat([squash([self._images.load(one.digest, one.box)], side) for one in targets])

    def _divided(self, targets: Sequence[Region]) -> Iterator[tuple[Region, ...]]:
        """Batches of at most as many images as the teacher takes at once; scenes stay whole and are of one size."""
        for views, group in groupby(targets, key=lambda one: len(one.views)):
            batch: list[Region] = []
            images = 0
            for target in group:
                # Targets of one scene cost no more than one of them.
                more = 0 if views and batch and target.views == batch[-1].views else max(1, views)
                if batch and more and images + more > self.teacher.batch_images:
                    yield tuple(batch)
                    batch, images = [], 0
                batch.append(target)
                images += more
            yield tuple(batch)

    def _decode(self, digest: str, boxes: Sequence[Box | None]) -> _Regions:
        with self._lock:
            data = self._images.get(digest)
        try:
            picture = decode(data)
        except MemoryError:
            # That says nothing about the image.
            raise
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

    def _decoded(self, future: Future[_Regions], digest: str, boxes: Sequence[Box | None]) -> _Regions:
        """What `future` gives; one that no thread has begun is decoded here, instead of waiting."""
        return self._decode(digest, boxes) if future.cancel() else future.result()

    def _features(self, targets: tuple[Region, ...], decoding: Sequence[_Decoding]) -> Features:
        # The threads come from the other end.
        regions = [self._decoded(*one) for one in reversed(decoding)]
        seen = [part for of_image in reversed(regions) for part in of_image]
        side, on_gpu = self.teacher.image_pixels, self.teacher.device.type == "cuda"
        blank = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        pixels = torch.empty(len(seen), side, side, 3, dtype=torch.uint8, pin_memory=on_gpu)
        torch.cat([blank if isinstance(part, str) else part for part in seen], out=pixels)
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


def _looked_at(batch: Sequence[Region]) -> Iterator[tuple[str, Sequence[Box | None]]]:
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

    targets: tuple[Region, ...]

    @cached_property
    def key(self) -> str:
        """Digest of the targets: names the finished file while the others are being made."""
        return hashlib.sha256(json.dumps(self.targets).encode()).hexdigest()


def plan(targets: Sequence[Region], teacher: Teacher) -> list[ShardPlan]:
    """Targets in order, as many in a shard as fit, the shards of nearly equal size and scenes whole."""
    size = bytes_per_target(teacher.grid, teacher.dim, teacher.recipe.storage)
    each = math.ceil(len(targets) / math.ceil(len(targets) * size / SHARD_BYTES))
    if teacher.recipe.compile:
        # A compiled encoder computes whole batches, however many images it is given.
        each = math.ceil(each / teacher.batch_images) * teacher.batch_images
    edges = {scene_start(targets, place) for place in (*range(0, len(targets), each), len(targets))}
    return [ShardPlan(tuple(targets[start:end])) for start, end in pairwise(sorted(edges))]


def scene_start(targets: Sequence[Region], place: int) -> int:
    """The first place of the scene that the target at `place` is of; `place` itself where it stands alone."""
    while 0 < place < len(targets) and targets[place].views and targets[place].views == targets[place - 1].views:
        place -= 1
    return place


def finished_path(finished: Path, shard: ShardPlan) -> Path:
    """Where a shard is when it is whole."""
    return finished / f"{shard.key}.safetensors"


def extract(
    extractor: Extractor, shards: Iterable[ShardPlan], finished: Path, made: set[ShardPlan] | None = None
) -> Generator[int]:
    """Make the shards that are not there yet and that no other process is making.

    Args:
        finished: the folder that processes share.
        made: gets those that were made here.

    Yields:
        After each batch the number of its targets.

    Raises:
        FeatureError: as `Extractor.batches`, and on a full disk. CorpusError, ShardError: as `Extractor.batches`.
    """
    unfinished: list[_Claim] = []
    writing: deque[tuple[_Claim, Future[bool]]] = deque()
    device = extractor.teacher.device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def claimed() -> Iterator[Sequence[Region]]:
        for shard in shards:
            claim = _claim(extractor.teacher, shard, finished)
            if claim is not None:
                unfinished.append(claim)
                yield shard.targets

    def written() -> None:
        claim, future = writing.popleft()
        if future.result():
            unfinished.remove(claim)
            if made is not None:
                made.add(claim.shard)

    with ThreadPoolExecutor(1, thread_name_prefix="writing") as pool:
        try:
            for batch in extractor.batches(claimed()):
                claim = next(one for one in unfinished if one.left)
                claim.left -= len(batch.targets)
                rejected = [reason is not None for reason in batch.rejected]
                computing = _Computing(batch.values, stream)
                writing.append((claim, pool.submit(claim.write, computing, rejected, last=claim.left == 0)))
                # A full disk shows here, and not when everything was computed.
                while writing and (len(writing) > _BATCHES_TO_WRITE or writing[0][1].done()):
                    written()
                yield len(batch.targets)
            while writing:
                written()
        finally:
            pool.shutdown(cancel_futures=True)
            for claim in unfinished:
                claim.abandon()


def complete(extractor: Extractor, shards: Sequence[ShardPlan], finished: Path) -> Generator[int]:
    """`extract`, then wait for what other processes are making, and make it where they died.

    Yields:
        Numbers of targets whose features are there now; they add up to those of `shards`.
    """
    made: set[ShardPlan] = set()
    yield from extract(extractor, shards, finished, made)
    for shard in shards:
        if shard in made:
            continue
        # One at a time and nothing else claimed: two that wait can't wait for each other.
        while not is_whole(finished_path(finished, shard)):
            with _lock(finished, shard):
                pass
            for _ in extract(extractor, [shard], finished):
                pass
        yield len(shard.targets)


class _Computing:
    """Features that a GPU may still be computing.

    Args:
        values: as `Features` has them.
        stream: of the GPU, where they are rounded and fetched, beside what the encoder is given next; None on a CPU.
    """

    def __init__(self, values: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._values, self._stream = values, stream
        self._computed = torch.cuda.current_stream(values.device).record_event() if stream is not None else None

    @contextlib.contextmanager
    def values(self) -> Iterator[Tensor]:
        """To be used within, on the stream. What follows must not return before it has read them."""
        if self._stream is None or self._computed is None:
            yield self._values
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._computed)
            yield self._values


class _Claim:
    """A shard that this process makes and no other."""

    def __init__(self, shard: ShardPlan, writer: ShardWriter, lock: FileLock) -> None:
        self.shard, self._writer, self._lock = shard, writer, lock
        self.left = len(shard.targets)
        """Targets to compute."""
        self._finished = False

    def write(self, features: _Computing, rejected: Sequence[bool], last: bool) -> bool:
        """The next features; whether they finished the shard. Raises `FeatureError` on a full disk."""
        try:
            with features.values() as values:
                self._writer.write(values, rejected)
            if last:
                self._writer.finish()
        except OSError as error:
            raise FeatureError(
                f"{self._writer.path} can't be written: {error}; free some space and give the same command again, "
                "which goes on from the shards that are finished, or compute the features online (features: online)"
            ) from error
        if last:
            self._lock.release()
            self._finished = True
        return self._finished

    def abandon(self) -> None:
        """Give it up, unless it was finished."""
        if not self._finished:
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
    try:
        if is_whole(path):
            lock.release()
            return None
        for left_over in finished.glob(f"{path.name}.*.part"):
            left_over.unlink()
        writer = ShardWriter(path, len(shard.targets), teacher.grid, teacher.dim, teacher.recipe.storage)
    except BaseException:
        lock.release()
        raise
    return _Claim(shard, writer, lock)


def _lock(finished: Path, shard: ShardPlan) -> FileLock:
    # The thread that writes releases what the main one took.
    return FileLock(finished_path(finished, shard).with_suffix(".lock"), thread_local=False)
