"""A shard gives back what was written, without a copy, and notices whatever was done to it in between."""

from __future__ import annotations

import errno
import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from valr_ops.data.sequences import Region
from valr_ops.teachers import stored
from valr_ops.teachers.stored import (
    CONSTANT,
    NOT_FINITE,
    REJECTED,
    SOUND,
    FeatureError,
    FeatureStore,
    Shard,
    ShardWriter,
    Storage,
    bytes_per_target,
    is_whole,
    key_of,
    shard_name,
    write_index,
    write_targets,
)

GRID, DIM = (3, 2), 40
STORAGES: list[Storage] = ["bfloat16", "float16", "int8"]


def drawn(rows: int = 5, seed: int = 0) -> torch.Tensor:
    """Features whose patches differ in scale by a factor of 1000."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 2, rows * GRID[0] * GRID[1]).view(rows, *GRID, 1)
    return torch.randn(rows, *GRID, DIM, generator=generator) * scales


def write(
    path: Path, features: torch.Tensor, storage: Storage, rejected: list[bool] | None = None, at_once: int = 2
) -> Shard:
    rejected = rejected or [False] * len(features)
    writer = ShardWriter(path, len(features), (features.shape[1], features.shape[2]), features.shape[3], storage)
    for start in range(0, len(features), at_once):
        writer.write(features[start : start + at_once], rejected[start : start + at_once])
    assert not path.exists(), "a shard has no name before it is whole"
    writer.finish()
    return Shard(path, "make it again")


def store(folder: Path, storage: Storage = "bfloat16", views: str = "single") -> tuple[FeatureStore, list[Region]]:
    """Two shards of three targets each."""
    targets = [Region(f"{number:064x}", (0, 0, number, 4) if number % 2 else None) for number in range(6)]
    shards = [write(folder / shard_name(number), drawn(3, number), storage) for number in range(2)]
    write_targets(folder, [(targets[3 * number : 3 * number + 3], one.states) for number, one in enumerate(shards)])
    head = {
        "teacher": "mine",
        "mode": "stored",
        "model": "vit",
        "license": "none",
        "fingerprint": "f",
        "weights_sample": None,
        "views": views,
        "grid": GRID,
        "dim": DIM,
        "storage": storage,
        "shards": [{"file": one.path.name} for one in shards],
    }
    write_index(folder, head)
    return FeatureStore(folder), targets


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


def places(path: Path, name: str) -> range:
    """Where the bytes of a tensor stand in the file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    start, end = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    return range(8 + size + start, 8 + size + end)


# ------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_read_points_where_what_was_written_does(tmp_path: Path, storage: Storage) -> None:
    exact = drawn()
    shard = write(tmp_path / "shard", exact, storage)
    read = torch.stack([shard[row] for row in range(5)]).float()
    cosine = F.cosine_similarity(read, exact, dim=-1)
    assert cosine.min() >= 0.999
    assert shard.facts.min_cosine == pytest.approx(cosine.min().item(), abs=1e-6) and shard.facts.min_cosine < 1
    assert (read.norm(dim=-1) / exact.norm(dim=-1) - 1).abs().max() < 5e-3, "lengths are kept as well"


def test_features_that_are_bfloat16_already_are_kept_bit_by_bit(tmp_path: Path) -> None:
    exact = drawn().bfloat16()
    shard = write(tmp_path / "shard", exact, "bfloat16")
    assert all(torch.equal(shard[row], exact[row]) for row in range(5)) and shard.facts.min_cosine == 1


def test_int8_has_a_step_of_a_127th_of_the_largest_channel_of_each_patch(tmp_path: Path) -> None:
    exact = drawn()
    shard, on_disk = write(tmp_path / "shard", exact, "int8"), load_file(tmp_path / "shard")
    scales = exact.abs().amax(-1) / 127
    torch.testing.assert_close(on_disk["scales"], scales)
    assert on_disk["features"].abs().amax(-1).eq(127).all()
    assert (on_disk["features"] * scales[..., None] - exact).abs().le(scales[..., None] * 0.5001).all()
    expected = (on_disk["features"].float() * on_disk["scales"][..., None]).bfloat16()
    assert torch.equal(torch.stack([shard[row] for row in range(5)]), expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_patch_of_zeros_is_kept_and_no_loss(tmp_path: Path, storage: Storage) -> None:
    exact = drawn()
    exact[2, 1, 1] = 0
    shard = write(tmp_path / "shard", exact, storage)
    assert shard[2][1, 1].eq(0).all() and shard.facts.min_cosine > 0.999 and shard.states[2] == SOUND


def test_any_reader_of_safetensors_can_read_a_shard(tmp_path: Path) -> None:
    exact = drawn().bfloat16()
    write(tmp_path / "shard", exact, "bfloat16", rejected=[False, False, False, True, False])
    read = load_file(tmp_path / "shard")
    assert set(read) == {"features", "scales", "checksums", "states", "energy"}
    sound = [0, 1, 2, 4]
    assert torch.equal(read["features"][sound], exact[sound]) and read["features"][3].eq(0).all()
    assert read["states"].tolist() == [SOUND] * 3 + [REJECTED, SOUND]
    energy = exact[sound].double().square().sum((0, 1, 2))
    torch.testing.assert_close(read["energy"], energy, rtol=1e-6, atol=0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_a_row_is_a_view_of_the_mapped_file(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "shard"
    rows = write(path, drawn(), storage)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ((start, end),) = (words[0].split("-") for words in maps)
    starts = [rows[row].data_ptr() - int(start, 16) for row in range(5)]
    begin = places(path, "features")[0]
    assert starts == [begin + row * rows[0].nbytes for row in range(5)]
    assert int(start, 16) + begin + 5 * rows[0].nbytes <= int(end, 16)


@pytest.mark.parametrize(("storage", "share"), [("bfloat16", 0.5), ("float16", 0.5), ("int8", 0.25 + 1 / 1024)])
def test_bytes_on_disk_beside_float32(tmp_path: Path, storage: Storage, share: float) -> None:
    features = torch.randn(4, 8, 8, 1024)
    write(tmp_path / "shard", features, storage, at_once=4)
    assert bytes_per_target((8, 8), 1024, storage) == share * features[0].nbytes
    beside = 4096 + 8 * 1024 + 4 * (8 + 1)  # header, energy, and of each row a checksum and a state
    assert (tmp_path / "shard").stat().st_size == 4 * share * features[0].nbytes + beside


@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, storage: Storage) -> None:
    write(tmp_path / "one", drawn(), storage)
    write(tmp_path / "two", drawn(), storage)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_the_longest_header_fits_its_place(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    writer = ShardWriter(path, 1, (1, 1), 1, "bfloat16")
    large = 10**12
    writer._shape = (1, large, large, large)
    writer._facts = replace(writer._facts, min_cosine=-1.2345678901234567e-300, other_cosine=-1.2345678901234567e-300)
    writer._states = torch.zeros(1, dtype=torch.uint8)
    writer._at = 1
    writer.finish()
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = file.read(size)
    assert 8 + size == 4096 and json.loads(header) and len(header.rstrip()) < size / 3


# ------------------------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("storage", STORAGES)
def test_each_row_says_whether_it_can_be_used(tmp_path: Path, storage: Storage) -> None:
    exact = drawn(6)
    exact[1, 0, 0, 0] = float("nan")
    exact[2, 1, 1, 3] = float("inf")
    exact[3] = exact[3, :1, :1]
    exact[4] = float("nan")
    shard = write(tmp_path / "shard", exact, storage, rejected=[False] * 4 + [True, False])
    assert shard.states.tolist() == [SOUND, NOT_FINITE, NOT_FINITE, CONSTANT, REJECTED, SOUND]
    assert shard.facts.rows == 2, "figures are of sound rows alone"
    torch.testing.assert_close(shard.energy, exact[[0, 5]].double().square().sum((0, 1, 2)), rtol=1e-6, atol=0)
    assert load_file(tmp_path / "shard")["features"][4].eq(0).all()


def test_what_float16_cannot_hold_is_not_finite(tmp_path: Path) -> None:
    exact = drawn(3)
    exact[1, 0, 0, 0] = 1e5
    assert write(tmp_path / "shard", exact, "float16").states.tolist() == [SOUND, NOT_FINITE, SOUND]
    assert write(tmp_path / "wide", exact, "bfloat16").states.tolist() == [SOUND] * 3


def test_the_cosine_to_another_row_tells_features_that_are_all_alike(tmp_path: Path) -> None:
    alike = drawn(1).expand(4, -1, -1, -1) + 0.01 * drawn(4)
    for name, features, expected in (("alike", alike, 1.0), ("different", drawn(4), 0.0)):
        facts = write(tmp_path / name, features, "bfloat16", at_once=4).facts
        assert facts.other_cosine / facts.rows == pytest.approx(expected, abs=0.15)


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("storage", "tensor"),
    [(storage, tensor) for storage in STORAGES for tensor in ("features", "checksums")] + [("int8", "scales")],
)
def test_a_flipped_bit_is_an_error_that_names_the_file_and_the_row(
    tmp_path: Path, storage: Storage, tensor: str
) -> None:
    _, targets = store(tmp_path, storage)
    path = tmp_path / shard_name(1)
    where = places(path, tensor)
    each = len(where) // 3
    for row in range(3):
        for place in (where[row * each], where[row * each + each // 2], where[(row + 1) * each - 1]):
            flip(path, place)
            opened = FeatureStore(tmp_path)
            with pytest.raises(
                FeatureError,
                match=rf"{path} is damaged: row {row} has not the checksum.*; make it again with `valr run ",
            ):
                opened.get(targets[3 + row])
            opened.features([targets[3 + other] for other in {0, 1, 2} - {row}])
            flip(path, place)
    FeatureStore(tmp_path).features(targets)


@pytest.mark.parametrize("keep", [0, 7, 100, 4096, 5000, -1])
def test_a_shard_that_was_cut_short_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    opened, targets = store(tmp_path)
    path = tmp_path / shard_name(1)
    path.write_bytes(path.read_bytes()[:keep])
    assert not is_whole(path) and is_whole(tmp_path / shard_name(0))
    opened.get(targets[0])
    with pytest.raises(
        FeatureError, match=rf"{path} can't be read: .*; make it again with `valr run {tmp_path.name} --f"
    ):
        opened.get(targets[4])


def test_a_missing_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    opened, targets = store(tmp_path)
    (tmp_path / shard_name(0)).unlink()
    assert not is_whole(tmp_path / shard_name(0))
    with pytest.raises(FeatureError, match=rf"{shard_name(0)} can't be read: .*No such file.*; make it again with"):
        opened.get(targets[0])
    with pytest.raises(FeatureError, match="No such file"):
        list(opened.shards())


@pytest.mark.parametrize("begin", [8, 40, 300])
def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path: Path, begin: int) -> None:
    opened, targets = store(tmp_path)
    flip(tmp_path / shard_name(0), begin)
    with pytest.raises(FeatureError, match=rf"{shard_name(0)} can't be read: "):
        opened.get(targets[0])


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", r"index.json can't be read: .*; make it again with `valr run "),
        ("[]", r"index.json can't be read: "),
        (
            '{"teacher": "mine", "targets": []}',
            r"index.json is of another version, it lacks dim, .*; make it again with",
        ),
        (b"\xff", r"index.json can't be read: "),
    ],
)
def test_an_index_of_another_version_is_refused(tmp_path: Path, written: str | bytes, message: str) -> None:
    store(tmp_path)
    (tmp_path / "index.json").write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(FeatureError, match=message):
        FeatureStore(tmp_path)


def test_what_says_where_targets_stand_must_be_whole(tmp_path: Path) -> None:
    store(tmp_path)
    path = tmp_path / "targets.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FeatureError, match=r"targets.parquet can't be read: .*; make it again with `valr run "):
        FeatureStore(tmp_path)
    path.unlink()
    with pytest.raises(FeatureError, match=r"targets.parquet can't be read: "):
        FeatureStore(tmp_path)


# ------------------------------------------------------------------------------------------------------- full disk


class Full(io.FileIO):
    """A file on a disk with room for so many bytes."""

    room = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.tell() + size > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 6000])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(Full, "room", room)
    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedWriter(Full(path, mode)))
    features = drawn(5)
    writer = ShardWriter(tmp_path / "shard", 5, GRID, DIM, "bfloat16")
    with pytest.raises(OSError, match="No space left"):
        writer.write(features, [False] * 5)
        writer.finish()
    writer.abandon()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ lookup


def test_targets_are_found_by_what_they_are(tmp_path: Path) -> None:
    opened, targets = store(tmp_path)
    assert len(opened) == 6 and list(opened) == targets and not opened.rejected
    for number, target in enumerate(targets):
        expected = drawn(3, number // 3)[number % 3].bfloat16()
        assert target in opened and torch.equal(opened.get(target), expected)
    unknown = targets[1]._replace(box=(0, 0, 1, 5))
    assert unknown not in opened
    with pytest.raises(FeatureError, match=r" has no features of 0{12}\[0, 0, 1, 5\], because .*; make it again with"):
        opened.get(unknown)


def test_a_view_is_another_target_only_where_views_are_seen_together(tmp_path: Path) -> None:
    for views in ("single", "joint"):
        (tmp_path / views).mkdir()
    (alone, targets), (together, _) = (store(tmp_path / views, views=views) for views in ("single", "joint"))
    of_scene = targets[0]._replace(views=(targets[0].digest, "f" * 64))
    assert of_scene in alone and of_scene not in together
    with pytest.raises(FeatureError, match=r"no features of 0{12} beside 1 other view,"):
        together.get(of_scene)


def test_a_key_that_ends_in_zeros_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = {3: b"\0" * 16, 4: b"\0" * 15 + b"\1", 5: b"\1" + b"\0" * 15}

    def key(target: Region) -> bytes:
        return padded.get(int(target.digest, 16), key_of(target))

    monkeypatch.setattr(stored, "key_of", key)
    opened, targets = store(tmp_path)
    for number, target in enumerate(targets):
        assert torch.equal(opened.get(target), drawn(3, number // 3)[number % 3].bfloat16())
    assert Region(f"{7:064x}") not in opened


def test_rejected_targets_are_listed_and_have_no_features(tmp_path: Path) -> None:
    _, targets = store(tmp_path)
    states = torch.tensor([SOUND, REJECTED, CONSTANT], dtype=torch.uint8)
    write_targets(tmp_path, [(targets[:3], states), (targets[3:], torch.zeros(3, dtype=torch.uint8))])
    opened = FeatureStore(tmp_path)
    assert opened.rejected == [targets[1]] and list(opened) == [targets[0], *targets[2:]] and len(opened) == 5
    assert targets[1] not in opened and targets[2] in opened
    assert torch.equal(opened.get(targets[2]), drawn(3)[2].bfloat16()), "places are not counted anew"
    with pytest.raises(FeatureError, match=r"its image could not be decoded, see .*/rejects.jsonl") as refused:
        opened.get(targets[1])
    assert "--force" not in str(refused.value), "which takes hours and changes nothing"
    with pytest.raises(FeatureError, match=r"belongs to another latent_corpus; make it again .*--force"):
        opened.get(Region(f"{7:064x}"))
