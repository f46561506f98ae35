"""Targets become the teacher's features whatever is in the way: damaged images, kills, other processes, a full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from tests.teachers.inputs import BOXES, boxes_corpus, computed, contents, corpus, damaged, image, teacher_recipe
from valr_ops.data.corpus import ImageStore
from valr_ops.data.sequences import Region
from valr_ops.teachers import extraction
from valr_ops.teachers.encoders import Teacher, load_teacher
from valr_ops.teachers.extraction import Extractor, ShardPlan, arranged, complete, extract, finished_path, plan
from valr_ops.teachers.stored import REJECTED, SOUND, FeatureError, Shard, is_whole

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return loaded("dinov3", tmp_path_factory.mktemp("dinov3"))


@pytest.fixture(scope="module")
def pi3(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return loaded("pi3", tmp_path_factory.mktemp("pi3"))


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore(boxes_corpus(tmp_path_factory.mktemp("boxes"))["cot_corpus"])


@pytest.fixture
def single(dinov3: Teacher, boxes: ImageStore) -> Iterator[tuple[Extractor, list[Region]]]:
    """48 targets, four an image, in batches of at most five."""
    with batches_of(dinov3, 5):
        yield (
            Extractor(dinov3, boxes, threads=2),
            arranged(Region(digest, box) for digest in boxes for box in BOXES),
        )


@pytest.fixture
def scenes(tmp_path: Path, pi3: Teacher) -> Iterator[tuple[Extractor, list[Region]]]:
    """Two scenes of three views, one of two, of which one view is no target, and one target that was cut out."""
    drawn = [image(seed, 56 + 8 * (seed % 2), 56) for seed in range(8)]
    digests = [one.digest for one in drawn]
    three, other, two = (tuple(sorted(digests[start:end])) for start, end in ((0, 3), (3, 6), (6, 8)))
    targets = [Region(view, None, views) for views in (three, other) for view in views]
    targets += [
        Region(two[1], None, two),
        Region(two[0], (8, 0, 40, 40)),
        Region(digests[0], (0, 0, 16, 16)),
    ]
    with batches_of(pi3, 7):
        yield (
            Extractor(pi3, ImageStore(corpus(tmp_path / "scenes", drawn, [])["cot_corpus"]), threads=2),
            arranged(targets),
        )


class batches_of:
    """A teacher that takes so many images at once, for a while."""

    def __init__(self, teacher: Teacher, images: int) -> None:
        self._teacher, self._images, self._before = teacher, images, teacher.batch_images

    def __enter__(self) -> None:
        self._teacher.batch_images = self._images

    def __exit__(self, *_: object) -> None:
        self._teacher.batch_images = self._before


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.calls = function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self._function(*arguments)


def loaded(name: str, folder: Path) -> Teacher:
    return load_teacher(name, teacher_recipe(name, folder), seed=0)


def loads(extractor: Extractor, target: Region) -> Any:
    return extractor._images.load(target.digest, target.box)


# ----------------------------------------------------------------------------------------------------- what is computed


def test_each_target_gets_the_features_of_its_own_crop_in_the_order_given(
    single: tuple[Extractor, list[Region]], dinov3: Teacher
) -> None:
    extractor, targets = single
    backwards = targets[::-1]
    batches = list(extractor.batches([backwards[:30], backwards[30:]]))
    assert [target for batch in batches for target in batch.targets] == backwards
    assert [len(batch.targets) for batch in batches] == [5, 5, 5, 5, 5, 5, 5, 5, 5, 3], "no batch crosses a group"
    assert not any(reason for batch in batches for reason in batch.rejected)
    values = torch.cat([batch.values for batch in batches])
    torch.testing.assert_close(values, dinov3([loads(extractor, one) for one in backwards]))
    shuffled = values[torch.randperm(len(values))]
    assert not torch.allclose(values, shuffled, atol=0.1), "features differ from target to target"


def test_targets_are_arranged_by_number_of_views_then_scene_then_image_and_box() -> None:
    wanted = [
        *(
            Region("a"),
            Region("a", (0, 0, 1, 1)),
            Region("a", (0, 0, 2, 1)),
            Region("b"),
        ),
        *(
            Region("c", None, ("b", "c")),
            Region("a", None, ("a", "b", "c")),
            Region("c", None, ("a", "b", "c")),
        ),
    ]
    assert arranged(wanted[::-1]) == wanted == arranged(wanted[3:] + wanted[:3])


def test_each_image_is_decoded_once_for_all_its_boxes(
    single: tuple[Extractor, list[Region]], monkeypatch: pytest.MonkeyPatch, dinov3: Teacher
) -> None:
    extractor, targets = single
    decoded = Counted(extraction.decode)
    monkeypatch.setattr(extraction, "decode", decoded)
    with batches_of(dinov3, 8):
        list(extractor.batches([targets]))
    assert decoded.calls == 12
    list(extractor.batches([targets]))
    assert decoded.calls == 12 + 12 + 7, "once more where a batch of five ends within an image"


def test_views_are_seen_together_and_what_was_cut_out_is_seen_alone(
    scenes: tuple[Extractor, list[Region]], pi3: Teacher
) -> None:
    extractor, targets = scenes
    (cut_out, of_two, of_three) = list(extractor.batches([targets]))
    assert [len(one.targets) for one in (cut_out, of_two, of_three)] == [2, 1, 6]
    torch.testing.assert_close(cut_out.values, pi3([loads(extractor, one) for one in cut_out.targets]))
    for batch in (of_two, of_three):
        for target, values in zip(batch.targets, batch.values, strict=True):
            views = pi3.squash([loads(extractor, Region(view)) for view in sorted(target.views)])
            together = pi3.joint(views[None])[0, target.views.index(target.digest)]
            torch.testing.assert_close(values, together)
            alone = pi3([loads(extractor, target)])[0]
            assert not torch.allclose(values, alone, rtol=1e-3, atol=1e-3), "a view alone has other features"


def test_the_features_of_a_scene_do_not_depend_on_the_order_of_its_images(
    scenes: tuple[Extractor, list[Region]],
) -> None:
    shown = scenes[1][-1].views
    assert Region.of(shown[1], None, shown) == Region.of(shown[1], None, [shown[2], shown[1], shown[0]])


@pytest.mark.parametrize(
    ("images", "expected"), [(5, [2, 1, 3, 3]), (6, [2, 1, 6]), (2, [2, 1, 3, 3]), (1, [1, 1, 1, 3, 3])]
)
def test_a_batch_holds_whole_scenes_of_one_size_and_no_more_images_than_the_teacher_takes(
    scenes: tuple[Extractor, list[Region]],
    pi3: Teacher,
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    expected: list[int],
) -> None:
    extractor, targets = scenes
    shapes: list[tuple[int, int]] = []
    joint = Teacher.joint

    def counted(self: Teacher, squashed: Tensor) -> Tensor:
        shapes.append((squashed.shape[0], squashed.shape[1]))
        return joint(self, squashed)

    monkeypatch.setattr(Teacher, "joint", counted)
    with batches_of(pi3, images):
        assert [len(batch.targets) for batch in extractor.batches([targets])] == expected
    assert all(count * views <= max(images, views) for count, views in shapes)
    assert sum(count for count, _ in shapes) == 3, "a scene is computed once for all its views, however large it is"


def test_only_a_few_batches_are_decoded_ahead(
    single: tuple[Extractor, list[Region]], monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, targets = single
    squashed = Counted(extraction.squash)
    monkeypatch.setattr(extraction, "squash", squashed)
    with contextlib.closing(extractor.batches([targets])) as coming:
        next(coming)
    assert 5 <= squashed.calls <= 4 * 5, "the batch that was given, and three that wait"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decoding")]


def test_a_box_outside_of_its_image_stops_the_run(single: tuple[Extractor, list[Region]]) -> None:
    extractor, targets = single
    wrong = targets[0]._replace(box=(0, 0, 65, 16))
    with pytest.raises(
        FeatureError, match=rf"box \[0, 0, 65, 16\] of image {wrong.digest[:12]} lies outside of 64 x 64"
    ):
        list(extractor.batches([[*targets[:20], wrong]]))


def test_running_out_of_memory_is_not_blamed_on_the_image(
    single: tuple[Extractor, list[Region]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(data: bytes) -> Any:
        raise MemoryError

    monkeypatch.setattr(extraction, "decode", starved)
    with pytest.raises(MemoryError):
        list(single[0].batches([single[1]]))


# ------------------------------------------------------------------------------------------------------ damaged images


def test_an_image_that_cannot_be_decoded_costs_its_own_targets_alone(tmp_path: Path, dinov3: Teacher) -> None:
    drawn = [image(0), damaged(1), image(2)]
    images = ImageStore(corpus(tmp_path, drawn, [])["cot_corpus"])
    targets = [Region(one.digest, box) for one in drawn for box in BOXES]
    (batch,) = list(Extractor(dinov3, images).batches([targets]))
    assert [reason is not None for reason in batch.rejected] == [False] * 4 + [True] * 4 + [False] * 4
    assert "truncated" in str(batch.rejected[5])
    sound = [*range(4), *range(8, 12)]
    torch.testing.assert_close(batch.values[sound], dinov3([images.load(*targets[row][:2]) for row in sound]))
    assert batch.values[4:8].eq(0).all()


def test_a_view_that_cannot_be_decoded_costs_all_targets_of_its_scene(tmp_path: Path, pi3: Teacher) -> None:
    drawn = [image(0), damaged(1), image(2), image(3)]
    good, bad = tuple(sorted(one.digest for one in drawn[2:])), tuple(sorted(one.digest for one in drawn[:2]))
    images = ImageStore(corpus(tmp_path, drawn, [])["cot_corpus"])
    targets = arranged([Region(view, None, views) for views in (good, bad) for view in views])
    (batch,) = list(Extractor(pi3, images).batches([targets]))
    of_bad = [target.views == bad for target in batch.targets]
    assert [reason is not None for reason in batch.rejected] == of_bad and sum(of_bad) == 2
    assert batch.values[of_bad].eq(0).all()
    scene = pi3.joint(pi3.squash([images.load(view) for view in good])[None])[0]
    torch.testing.assert_close(batch.values[[not one for one in of_bad]], scene)


def test_a_shard_with_a_damaged_image_is_completed(tmp_path: Path, dinov3: Teacher) -> None:
    drawn = [image(0), damaged(1), image(2)]
    images = ImageStore(corpus(tmp_path, drawn, [])["cot_corpus"])
    targets = arranged(Region(one.digest, box) for one in drawn for box in BOXES)
    shards = plan(targets, dinov3)
    assert sum(extract(Extractor(dinov3, images), shards, tmp_path)) == 12
    states = Shard(finished_path(tmp_path, shards[0]), "").states.tolist()
    assert states == [REJECTED if target.digest == drawn[1].digest else SOUND for target in targets]


# --------------------------------------------------------------------------------------------------------------- shards


def cut(monkeypatch: pytest.MonkeyPatch, targets: int) -> None:
    """Shards of about so many targets of the tiny DINOv3, of 512 bytes each."""
    monkeypatch.setattr(extraction, "SHARD_BYTES", targets * 512)


def test_shards_are_of_nearly_equal_size_and_hold_all_targets_in_order(
    single: tuple[Extractor, list[Region]], dinov3: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, 14)
    shards = plan(single[1], dinov3)
    assert [len(shard.targets) for shard in shards] == [12] * 4
    assert [target for shard in shards for target in shard.targets] == single[1]
    cut(monkeypatch, 7)
    assert [len(shard.targets) for shard in plan(single[1], dinov3)] == [7] * 6 + [6]
    cut(monkeypatch, 48)
    assert len(plan(single[1], dinov3)) == 1 == len(plan(single[1][:1], dinov3))


def test_a_shard_ends_where_a_scene_does(
    scenes: tuple[Extractor, list[Region]], pi3: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for targets, expected in ((5, [3, 6]), (1, [1, 1, 1, 3, 3]), (4, [3, 3, 3])):
        monkeypatch.setattr(extraction, "SHARD_BYTES", targets * 1024)
        assert [len(shard.targets) for shard in plan(scenes[1], pi3)] == expected


def test_a_compiled_teacher_gets_shards_of_whole_batches(
    single: tuple[Extractor, list[Region]], dinov3: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dinov3, "recipe", dinov3.recipe.model_copy(update={"compile": True}))
    for targets, expected in ((4, [5] * 9 + [3]), (11, [10] * 4 + [8]), (48, [48])):
        cut(monkeypatch, targets)
        assert [len(shard.targets) for shard in plan(single[1], dinov3)] == expected


@pytest.fixture
def shards(single: tuple[Extractor, list[Region]], dinov3: Teacher, monkeypatch: pytest.MonkeyPatch) -> list[ShardPlan]:
    """Four of twelve targets, each of three batches."""
    cut(monkeypatch, 12)
    return plan(single[1], dinov3)


@pytest.fixture
def whole(
    single: tuple[Extractor, list[Region]], shards: list[ShardPlan], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert list(complete(single[0], shards, folder)) == [5, 5, 2] * 4
    return made(folder)


def made(folder: Path) -> dict[str, bytes]:
    """What is in the folder beside its locks."""
    return {name: data for name, data in contents(folder).items() if not name.endswith(".lock")}


def locked(folder: Path) -> list[str]:
    """Names of the locks that somebody holds."""
    held = []
    for path in folder.glob("*.lock"):
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
            lock.release()
        except TimeoutError:
            held.append(path.name)
    return held


def test_nothing_is_computed_twice_and_finished_shards_are_left_alone(
    single: tuple[Extractor, list[Region]],
    shards: list[ShardPlan],
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    list(complete(single[0], shards, tmp_path))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    counts = computed(monkeypatch)
    assert list(complete(single[0], shards, tmp_path)) == [12] * 4 and list(extract(single[0], shards, tmp_path)) == []
    assert not counts
    finished_path(tmp_path, shards[2]).unlink()
    assert list(complete(single[0], shards, tmp_path)) == [5, 5, 2, 12, 12, 12]
    assert counts == [5, 5, 2] and made(tmp_path) == whole
    assert sum(path.stat().st_mtime_ns == time for path, time in times.items()) == 3


def test_a_shard_that_a_power_cut_left_half_written_is_made_again(
    single: tuple[Extractor, list[Region]], shards: list[ShardPlan], whole: dict[str, bytes], tmp_path: Path
) -> None:
    list(complete(single[0], shards, tmp_path))
    half = finished_path(tmp_path, shards[1])
    half.write_bytes(half.read_bytes()[:-100])
    assert list(complete(single[0], shards[1:2], tmp_path)) == [5, 5, 2]
    assert made(tmp_path) == whole


@pytest.mark.parametrize("batches", [1, 3, 4, 6, 8, 11, 12])
def test_an_interrupted_run_loses_no_more_than_a_shard_and_leaves_only_whole_ones(
    single: tuple[Extractor, list[Region]],
    shards: list[ShardPlan],
    whole: dict[str, bytes],
    tmp_path: Path,
    batches: int,
) -> None:
    with contextlib.closing(extract(single[0], shards, tmp_path)) as steps:
        done = sum(next(steps) for _ in range(batches))
    kept = 12 * sum(is_whole(finished_path(tmp_path, shard)) for shard in shards)
    assert done - kept <= 12 + 5, "the shard that is written and the batch behind it"
    assert set(made(tmp_path)) <= set(whole) and not locked(tmp_path)
    assert sum(extract(single[0], shards, tmp_path)) == 48 - kept
    assert made(tmp_path) == whole


def test_a_killed_process_loses_no_more_than_a_shard_and_what_it_left_vanishes(
    single: tuple[Extractor, list[Region]], shards: list[ShardPlan], whole: dict[str, bytes], tmp_path: Path
) -> None:
    def die_after(batches: int) -> None:
        for count, _ in enumerate(extract(single[0], shards, tmp_path), start=1):
            if count == batches:
                os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=die_after, args=(8,), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept = sum(is_whole(finished_path(tmp_path, shard)) for shard in shards)
    assert 1 <= kept <= 2 and list(tmp_path.glob("*.part")), "two and two thirds were computed"
    assert sum(extract(single[0], shards, tmp_path)) == 48 - 12 * kept
    assert made(tmp_path) == whole


def in_two_processes(work: Callable[[Callable[[], None]], int]) -> list[int]:
    """What `work` returns in each of two processes; it is given a function that waits for the other one."""
    barrier, results = FORK.Barrier(2), FORK.SimpleQueue()

    def one() -> None:
        waited: list[int] = []

        def meet() -> None:
            if not waited:
                waited.append(barrier.wait(timeout=60))

        results.put(work(meet))

    processes = [FORK.Process(target=one, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    return [results.get() for _ in processes]


def test_two_processes_on_one_folder_share_the_work_and_do_nothing_twice(
    single: tuple[Extractor, list[Region]], dinov3: Teacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cut(monkeypatch, 4)
    shards = plan(single[1], dinov3)
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    assert sum(complete(single[0], shards, tmp_path / "alone")) == 48

    def work(meet: Callable[[], None]) -> int:
        counts = computed(monkeypatch)
        assert sum(_met(complete(single[0], shards, tmp_path / "together"), meet)) == 48
        assert all(is_whole(finished_path(tmp_path / "together", shard)) for shard in shards), "each waits for all"
        return sum(counts)

    shares = in_two_processes(work)
    assert sum(shares) == 48 and min(shares) >= 4
    assert made(tmp_path / "together") == made(tmp_path / "alone")


def _met(steps: Iterator[int], meet: Callable[[], None]) -> Iterator[int]:
    """`steps`, of which the first waits for the other process to come as far."""
    for step in steps:
        meet()
        yield step


def test_what_a_dead_process_had_claimed_is_made_by_the_one_that_waits_for_it(
    single: tuple[Extractor, list[Region]], shards: list[ShardPlan], whole: dict[str, bytes], tmp_path: Path
) -> None:
    going = FORK.Event()

    def hang() -> None:
        for _ in extract(single[0], shards[1:2], tmp_path):
            going.set()
            threading.Event().wait(60)

    process = FORK.Process(target=hang, daemon=True)
    process.start()
    assert going.wait(60)
    steps = complete(single[0], shards, tmp_path)
    assert sum(next(steps) for _ in range(9)) == 36 and not finished_path(tmp_path, shards[1]).exists()
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    assert sum(steps) == 12
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and made(tmp_path) == whole


def test_a_shard_that_somebody_makes_is_passed_over_by_a_part(
    single: tuple[Extractor, list[Region]], shards: list[ShardPlan], tmp_path: Path
) -> None:
    theirs = extract(single[0], shards[:1], tmp_path)
    next(theirs)
    assert sum(extract(single[0], shards, tmp_path)) == 36
    assert sum(theirs) == 7
    assert all(is_whole(finished_path(tmp_path, shard)) for shard in shards)


class NearlyFull(io.FileIO):
    """A file on a disk with room for 14 targets."""

    left = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if NearlyFull.left < size:
            raise OSError(errno.ENOSPC, "No space left on device")
        NearlyFull.left -= size
        return super().write(data)


def test_a_full_disk_stops_the_run_with_what_is_finished_and_no_lock(
    single: tuple[Extractor, list[Region]],
    shards: list[ShardPlan],
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = len(next(iter(whole.values())))
    monkeypatch.setattr(NearlyFull, "left", size * 3 // 2)
    with monkeypatch.context() as patch, pytest.raises(FeatureError) as error:
        opened = Path.open

        def nearly_full(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.suffix == ".part":
                return io.BufferedWriter(NearlyFull(path, "wb"))
            return opened(path, *arguments, **options)

        patch.setattr(Path, "open", nearly_full)
        list(extract(single[0], shards, tmp_path))
    path = finished_path(tmp_path, shards[1])
    assert f"{path} can't be written: [Errno 28] No space left" in str(error.value) and "goes on" in str(error.value)
    assert list(made(tmp_path)) == [finished_path(tmp_path, shards[0]).name] and not locked(tmp_path)
    assert sum(extract(single[0], shards, tmp_path)) == 36
    assert made(tmp_path) == whole


def test_writing_is_behind_computing_by_a_few_batches_at_most(
    single: tuple[Extractor, list[Region]],
    shards: list[ShardPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, done = [0], [0]
    write = extraction.ShardWriter.write

    def slow(self: extraction.ShardWriter, features: Tensor, rejected: Sequence[bool]) -> None:
        threading.Event().wait(0.02)
        write(self, features, rejected)
        written[0] += 1

    monkeypatch.setattr(extraction.ShardWriter, "write", slow)
    for done[0], _ in enumerate(extract(single[0], shards, tmp_path), start=1):
        assert done[0] - written[0] <= 3
    assert written == done == [12]
