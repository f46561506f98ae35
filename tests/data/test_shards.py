from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pytest

from tests.data.made import digests
from valr_ops.data.shards import ShardError, Shards, ShardWriter
from valr_ops.store.objects import Cache, LocalFiles

SCHEMA = pa.schema([("number", pa.int64()), ("text", pa.string())])


def written(folder: Path, rows: int = 1000, block: int = 100, shard_bytes: int = 1 << 11, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, "rows", SCHEMA, shard_bytes=shard_bytes, **options) as writer:
        for first in range(0, rows, block):
            numbers = list(range(first, min(first + block, rows)))
            texts = [f"text of row {number}" * 5 for number in numbers]
            writer.write(pa.RecordBatch.from_arrays([pa.array(numbers), pa.array(texts)], schema=SCHEMA))
    return folder


def opened(location: Path | str, cache: Cache | None = None) -> Shards:
    return Shards(location, "rows", "mend it", cache)


@pytest.mark.parametrize("compression", ["zstd", None])
def test_every_row_comes_back_by_its_number_and_in_order(tmp_path: Path, compression: str | None) -> None:
    shards = opened(written(tmp_path, compression=compression))
    assert len(shards) == 1000
    for number in (0, 99, 100, 555, 999):
        assert shards.row(number).to_pylist() == [{"number": number, "text": f"text of row {number}" * 5}]
    assert [number for batch in shards.batches() for number in batch["number"].to_pylist()] == list(range(1000))
    for number in (-1, 1000):
        with pytest.raises(IndexError):
            shards.row(number)


def test_shards_are_few_and_each_is_an_arrow_file_by_itself(tmp_path: Path) -> None:
    folder = written(tmp_path)
    shards = opened(folder)
    assert 1 < len(shards.shards) < 10
    tables = [pa.ipc.open_file(folder / one.file).read_all() for one in shards.shards]
    assert pa.concat_tables(tables)["number"].to_pylist() == list(range(1000))


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    assert digests(written(tmp_path / "a")) == digests(written(tmp_path / "b"))


def test_nothing_at_all_can_be_written_and_read(tmp_path: Path) -> None:
    shards = opened(written(tmp_path, rows=0))
    assert len(shards) == 0 and list(shards.batches()) == []


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_named_and_nothing_of_its_block_is_given(tmp_path: Path) -> None:
    folder = written(tmp_path, shard_bytes=1 << 30, compression=None)
    path = folder / "rows-00000.arrow"
    flip(path, path.stat().st_size // 2)
    shards = opened(folder)
    good = 0
    for number in range(0, 1000, 100):
        try:
            good += len(shards.block(number // 100))
        except ShardError as error:
            assert "rows-00000.arrow is damaged: rows" in str(error) and "mend it" in str(error)
    assert good == 900


def test_a_shard_cut_short_and_a_missing_one_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path, shard_bytes=1 << 30)
    path = folder / "rows-00000.arrow"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ShardError, match=r"rows-00000.arrow is damaged: rows \d+ to 999"):
        opened(folder).row(999)
    path.unlink()
    with pytest.raises(ShardError, match=r"rows-00000.arrow can't be read.*mend it"):
        opened(folder).row(0)
    (folder / "rows.index.arrow").unlink()
    with pytest.raises(ShardError, match=r"rows.index.arrow does not exist; mend it"):
        opened(folder)


class Counting(LocalFiles):
    """A folder that stands for a store, and counts what is fetched from it."""

    fetched: list[str] = []  # noqa: RUF012

    def open(self, name: str) -> Any:
        self.fetched.append(name)
        return super().open(name)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    folder = written(tmp_path / "store")
    monkeypatch.setattr("valr_ops.data.shards.open_files", lambda location: Counting(folder))
    monkeypatch.setattr(Counting, "fetched", [])
    return folder, Counting.fetched


def test_a_remote_shard_is_fetched_once_into_a_bounded_cache(tmp_path: Path, store: tuple[Path, list[str]]) -> None:
    folder, fetched = store
    largest = max(path.stat().st_size for path in folder.glob("*.arrow"))
    cache = Cache(tmp_path / "cache", max_bytes=2 * largest)
    shards = opened("s3://bucket/prefix", cache)
    numbers = [row for batch in shards.batches() for row in batch["number"].to_pylist()]
    assert numbers == list(range(1000))
    assert len(shards.shards) > 2
    assert sorted(fetched) == [*(one.file for one in shards.shards), "rows.index.arrow"]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 2 * largest
    with pytest.raises(ShardError, match="give a local cache"):
        opened("s3://bucket/prefix")


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, store: tuple[Path, list[str]]) -> None:
    _, fetched = store
    cache = Cache(tmp_path / "cache", max_bytes=1 << 30)
    opened("s3://bucket/prefix", cache).row(0)
    copy = next((tmp_path / "cache").iterdir())
    flip(copy, 700)
    fetched.clear()
    shards = opened("s3://bucket/prefix", cache)
    assert [shards.row(number)["number"][0].as_py() for number in range(200)] == list(range(200))
    assert "rows-00000.arrow" in fetched


def test_an_object_altered_behind_our_back_is_refused(tmp_path: Path, store: tuple[Path, list[str]]) -> None:
    folder, _ = store
    flip(folder / "rows-00000.arrow", 700)
    with pytest.raises(ShardError, match=r"rows-00000.arrow.*damaged or was replaced"):
        opened("s3://bucket/prefix", Cache(tmp_path / "cache", 1 << 30)).row(0)
    assert list((tmp_path / "cache").iterdir()) == []
