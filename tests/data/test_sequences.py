from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pytest

from tests import tiny
from valr_ops.data import corpus, shards
from valr_ops.data.corpus import CorpusRecord, ImageReference, ImageStore, Records, write_images, write_records
from valr_ops.data.records import Image, Step, Target
from valr_ops.data.sequences import (
    Region,
    Sequence,
    Sequences,
    Visits,
    batch_of,
    order,
    targets_of,
    write_sequences,
)
from valr_ops.data.shards import ShardError
from valr_ops.store.objects import Cache, Files, LocalFiles

REMOTE = "s3://bucket/corpus"


def made(count: int = 10) -> list[Sequence]:
    """The four of `tiny` over and over; every fifth is held out."""
    named = [dataclasses.replace(tiny.sequences()[number % 4], id=f"tiny/{number}") for number in range(count)]
    return [dataclasses.replace(one, split="validation") if n % 5 == 4 else one for n, one in enumerate(named)]


def write(folder: Path, sequences: list[Sequence], weights: dict[str, float] | None = None) -> Path:
    """Three sequences a block."""
    folder.mkdir(exist_ok=True)
    batches = (batch_of(sequences[start : start + 3]) for start in range(0, len(sequences), 3))
    write_sequences(folder, batches, weights or {})
    return folder


def assert_equal(one: Sequence, other: Sequence) -> None:
    assert one.input_ids.tolist() == other.input_ids.tolist() and one.input_ids.dtype == other.input_ids.dtype
    for field in dataclasses.fields(one):
        if field.name != "input_ids":
            assert getattr(one, field.name) == getattr(other, field.name)


# ---------------------------------------------------------------------------------------------------------- on disk


def test_sequences_survive_the_shards_and_equal_ones_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, made()) for name in ("one", "two"))
    read = Sequences(one)
    assert len(read) == 10
    for before, after in zip(made(), read, strict=True):
        assert_equal(before, after)
    assert sorted(path.name for path in one.iterdir()) == [
        *("outline-00000.arrow", "outline.index.arrow", "sequences-00000.arrow", "sequences.index.arrow")
    ]
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.iterdir())


def test_a_split_has_places_of_its_own_and_is_read_at_random(tmp_path: Path) -> None:
    read, every = Sequences(write(tmp_path, made()), "validation"), made()
    assert_equal(read[1], every[9])
    assert_equal(read[0], every[4])
    assert [read.id(place) for place in range(len(read))] == ["tiny/4", "tiny/9"]
    with pytest.raises(IndexError):
        read[2]
    assert len(Sequences(tmp_path, "test")) == 0 and list(Sequences(tmp_path, "test")) == []


def test_sizes_are_those_of_the_sequences_without_reading_one(tmp_path: Path) -> None:
    read = Sequences(write(tmp_path, made()), "train")
    (tmp_path / "sequences-00000.arrow").unlink()
    expected = [one for one in made() if one.split == "train"]
    assert read.lengths.tolist() == [len(one.input_ids) for one in expected]
    assert read.segments.tolist() == [len(one.segments) for one in expected]
    assert read.likeness(1) == (1, len(expected[1].input_ids), "tiny/1")


def test_some_may_be_taken_in_any_order(tmp_path: Path) -> None:
    read = Sequences(write(tmp_path, made()), "train")
    part = read.taken([5, 0])
    assert [one.id for one in part] == [read.id(5), read.id(0)] == [part.id(0), part.id(1)]
    assert part.lengths.tolist() == [read.lengths[5], read.lengths[0]] and len(read) == 8


def test_targets_are_streamed_in_reading_order_with_their_regions(tmp_path: Path) -> None:
    read = Sequences(write(tmp_path, made(4)))
    batches = list(read.batches())
    assert [target for batch in batches for _, target in targets_of(batch)] == [
        *(
            Region("a", (0, 0, 64, 16)),
            Region("a", (0, 32, 64, 48)),
            Region("wide", (0, 0, 100, 100)),
        ),
        *(Region("a", views=("a", "b")), Region("b", views=("a", "b"))),
    ]
    ids = [name for batch in batches for name in batch["id"].to_pylist()]
    by_id = {one.id: [target for target in one.targets if target is not None] for one in read}
    assert all(target in by_id[batch["id"].to_pylist()[row]] for batch in batches for row, target in targets_of(batch))
    assert len(ids) == 4


def test_an_image_is_a_view_only_whole_and_beside_other_images_that_are_shown() -> None:
    assert Region.of("a", None, ["b", "a", "a"]) == Region("a", None, ("a", "b"))
    assert Region.of("a", [0, 0, 8, 8], ["a", "b"]) == Region("a", (0, 0, 8, 8))
    assert Region.of("step", None, ["a", "b"]) == Region("step")
    assert Region.of("a", None, ["a"]) == Region("a")
    together = Region("a", None, ("a", "b"))
    assert together.seen(joint=True) == together and together.seen(joint=False) == Region("a")


def test_some_may_be_left_out_by_id(tmp_path: Path) -> None:
    read = Sequences(write(tmp_path, made()), "train")
    rest = read.without({read.id(0), "unknown"})
    assert [rest.id(place) for place in range(len(rest))] == [read.id(place) for place in range(1, len(read))]
    assert read.without(set()) is read


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_an_error_that_names_file_and_rows_while_other_blocks_are_read(tmp_path: Path) -> None:
    write(tmp_path, made())
    block = shards.Shards(tmp_path, "sequences", "")._index
    flip(tmp_path / "sequences-00000.arrow", int(block["offset"][1] + block["length"][1] // 2))
    read = Sequences(tmp_path)
    assert_equal(read[2], made()[2])
    assert_equal(read[6], made()[6])
    for _ in range(2):
        with pytest.raises(ShardError, match=r"sequences-00000\.arrow is damaged: rows 3 to 5 .*valr run latent_"):
            read[4]
    with pytest.raises(ShardError, match="rows 3 to 5"):
        list(read)
    with pytest.raises(ShardError, match="rows 3 to 5"):
        list(read.batches())


def test_a_flipped_byte_in_the_outline_is_found_at_once(tmp_path: Path) -> None:
    write(tmp_path, made())
    block = shards.Shards(tmp_path, "outline", "")._index
    flip(tmp_path / "outline-00000.arrow", int(block["offset"][0] + block["length"][0] // 2))
    with pytest.raises(ShardError, match=r"outline-00000\.arrow is damaged: rows 0 to 9"):
        Sequences(tmp_path)


def test_an_outline_of_another_run_is_refused(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", made(10)), write(tmp_path / "other", made(9))
    for file in one.glob("outline*"):
        file.write_bytes((other / file.name).read_bytes())
    with pytest.raises(ShardError, match=r"10 sequences but an outline of 9.*valr run latent_corpus"):
        Sequences(one)


def test_a_corpus_that_is_not_there_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"sequences\.index\.arrow does not exist; make the sequences with `valr run"):
        Sequences(tmp_path)


# ---------------------------------------------------------------------------------------------------------- from S3


class Bucket(LocalFiles):
    """A folder that says it is an S3 prefix, and counts what it gives."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.location = REMOTE
        self.given: Counter[str] = Counter()

    def open(self, name: str) -> BinaryIO:
        self.given[name] += 1
        return super().open(name)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A whole corpus, rewritten and not, behind ``s3://bucket/corpus``."""
    folder = write(tmp_path / "bucket", made())
    images = [Image(name.encode() * 9, tiny.digest(name), 8, 8, "input") for name in ("a", "b")]
    write_images(folder, images)
    shown = (ImageReference(images[0].digest, "input", 8, 8),)
    steps = (Step("look", Target(0, (0, 0, 4, 4))),)
    records = [
        CorpusRecord(f"tiny/{number}", "tiny", "CC0-1.0", "train", "single_view", "what?", "that", shown, steps)
        for number in range(3)
    ]
    write_records(folder, records)
    files = Bucket(folder)

    def remote(location: str | Path) -> Files:
        assert location == REMOTE
        return files

    monkeypatch.setattr(shards, "open_files", remote)
    monkeypatch.setattr(corpus, "open_files", remote)
    return files


def test_sequences_records_and_images_are_read_from_s3_and_fetched_once(bucket: Bucket, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2**30)
    for _ in range(2):
        read = Sequences(REMOTE, "validation", cache)
        assert_equal(read[1], made()[9])
        assert Records(REMOTE, cache)[2] == Records(bucket.root)[2]
        assert ImageStore(REMOTE, cache).get(tiny.digest("b")) == b"b" * 9
    shards_given = {name: times for name, times in bucket.given.items() if name.endswith("-00000.arrow")}
    assert shards_given == {f"{name}-00000.arrow": 1 for name in ("sequences", "outline", "records", "images")}


def test_a_cached_copy_that_goes_bad_is_fetched_again(bucket: Bucket, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2**30)
    Sequences(REMOTE, None, cache)[0]
    original = (bucket.root / "sequences-00000.arrow").read_bytes()
    (copied,) = (path for path in cache.folder.iterdir() if path.read_bytes() == original)
    block = shards.Shards(bucket.root, "sequences", "")._index
    flip(copied, int(block["offset"][2] + 40))
    assert_equal(Sequences(REMOTE, None, cache)[7], made()[7])
    assert bucket.given["sequences-00000.arrow"] == 2 and copied.read_bytes() == original


def test_a_damaged_object_is_named_and_never_skipped(bucket: Bucket, tmp_path: Path) -> None:
    flip(bucket.root / "sequences-00000.arrow", 600)
    read = Sequences(REMOTE, None, Cache(tmp_path / "cache", 2**30))
    with pytest.raises(ShardError, match=r"s3://bucket/corpus/sequences-00000\.arrow.*push the artifact again"):
        list(read)


def test_a_remote_corpus_needs_a_cache(bucket: Bucket) -> None:
    for opened in (Sequences, Records, ImageStore):
        with pytest.raises(ShardError, match="give a local cache"):
            opened(REMOTE)


# ------------------------------------------------------------------------------------------------------------- order


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    assert order(50, 3, 0) == order(50, 3, 0)
    assert sorted(order(50, 3, 0)) == list(range(50))
    assert len({tuple(order(50, *pair)) for pair in [(3, 0), (3, 1), (4, 0)]}) == 3


def visits(weights: dict[str, float], sizes: dict[str, int], seed: int = 3) -> Visits:
    """Sources whose places alternate as far as they go."""
    names = sorted((number, name) for name, size in sizes.items() for number in range(size))
    places = {name: np.array([at for at, (_, of) in enumerate(names) if of == name]) for name in sizes}
    return Visits(places, weights, seed)


def test_weights_of_one_give_the_epochs_orders_one_behind_the_other() -> None:
    made = visits({"a": 1.0, "b": 1.0}, {"a": 7, "b": 12})
    assert made.per_epoch == 19
    assert made.between(0, 57) == order(19, 3, 0) + order(19, 3, 1) + order(19, 3, 2)


def test_two_is_twice_an_epoch_and_a_half_is_every_other_epoch() -> None:
    made = visits({"a": 2.0, "b": 0.5}, {"a": 5, "b": 8})
    of_b = set(visits({"b": 1.0, "a": 1.0}, {"a": 5, "b": 8})._sources[1][0].tolist())
    for epoch in range(0, 6, 2):
        counts = [Counter(made.epoch(number)) for number in (epoch, epoch + 1)]
        assert all(times == (1 if place in of_b else 2) for count in counts for place, times in count.items())
        seen = [{place for place in count if place in of_b} for count in counts]
        assert seen[0] | seen[1] == of_b and not seen[0] & seen[1]
    assert {frozenset(place for place in made.epoch(number) if place in of_b) for number in (0, 2, 4)}.__len__() > 1


@pytest.mark.parametrize("weight", [0.1, 0.3, 1.0, 1.7, 2.5])
def test_no_record_is_starved_whatever_the_weight(weight: float) -> None:
    made = visits({"a": weight, "b": 1.0}, {"a": 13, "b": 4})
    of_a = made._sources[0][0].tolist()
    for epochs in range(1, 30):
        seen = Counter(place for epoch in range(epochs) for place in made.epoch(epoch))
        times = [seen[place] for place in of_a]
        assert max(times) - min(times) <= 1
        assert sum(times) == int(round(weight * 10) * 13 * epochs // 10)


def test_any_visit_is_found_without_those_before_it() -> None:
    made = visits({"a": 0.3, "b": 1.7, "c": 1.0}, {"a": 7, "b": 5, "c": 3})
    whole = [place for epoch in range(40) for place in made.epoch(epoch)]
    for start, stop in [(0, 1), (5, 30), (13, 14), (101, 220), (400, 403)]:
        assert made.between(start, stop) == whole[start:stop]


def test_an_epoch_may_be_empty_where_the_weight_is_smaller_than_one_record() -> None:
    made = visits({"a": 0.25}, {"a": 1})
    assert [made.epoch(epoch) for epoch in range(8)] == [[], [], [], [0], [], [], [], [0]]
    assert made.between(0, 3) == [0, 0, 0]


def test_the_visits_depend_on_the_seed_and_on_the_weights() -> None:
    sizes = {"a": 9, "b": 9}
    runs: list[Callable[[], Visits]] = [
        lambda: visits({"a": 1.0, "b": 1.0}, sizes),
        lambda: visits({"a": 1.0, "b": 1.0}, sizes, seed=4),
        lambda: visits({"a": 1.5, "b": 1.0}, sizes),
    ]
    assert len({tuple(run().between(0, 40)) for run in runs}) == 3
    assert all(run().between(0, 40) == run().between(0, 40) for run in runs)


def test_the_weight_of_a_source_is_written_with_its_sequences(tmp_path: Path) -> None:
    mixed = [dataclasses.replace(one, source="ab"[number % 2]) for number, one in enumerate(made(8))]
    read = Sequences(write(tmp_path, mixed, {"a": 2.0, "b": 0.5, "absent": 9.0}))
    assert read.visits(3).per_epoch == 4 * 2 + 4 * 0.5
    assert Sequences(write(tmp_path / "plain", mixed)).visits(3).per_epoch == 8


def test_a_batch_has_the_columns_of_the_contract_even_when_it_is_empty() -> None:
    empty = batch_of([])
    assert len(empty) == 0 and isinstance(empty, pa.RecordBatch)
