"""Thousands of damaged files: a reader ends with records, rejections or one clear error, and in time."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from valr_ops.data import sources
from valr_ops.data.layouts import write_layout
from valr_ops.data.records import REASONS, Record, Rejection, SourceError
from valr_ops.recipe.recipe import DataRecipe, SourceRecipe, SyntheticRecipe

FILES_A_FORMAT = 300
SECONDS_A_FILE = 10
ANNOTATIONS = (".jsonl", ".json", ".parquet", ".tar")
SPLINTERS = (b"\x00", b"\xff\xfe", b'"', b"{", b"}", b"\\", b"<latent>", b"../../", b"\r\n", b"\xed\xa0\x80")
NASTY = (*SPLINTERS, b"[" * 5000, b"9" * 5000)
SWAPS = ((b"0", b"-1"), (b'"image', b'"imege'), (b"row", b"\\ud800"), (b"[", b"[["), (b"png", b"gif"))


@contextmanager
def at_most(seconds: int, what: str) -> Iterator[None]:
    def late(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"{what} took longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes: bits, cuts, repeats, moved and hostile pieces."""
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(data) or 1))
        length = int(rng.integers(1, 1 + min(200, len(data) - at or 1)))
        kind = int(rng.integers(0, 7))
        if kind == 0:
            piece = bytearray(data)
            for place in rng.integers(0, len(data) or 1, 4).tolist():
                piece[place : place + 1] = bytes([int(rng.integers(0, 256))])
            data = bytes(piece)
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + length :]
        elif kind == 3:
            data = data[:at] + data[at : at + length] * int(rng.integers(2, 20)) + data[at + length :]
        elif kind == 4:
            data = data[:at] + NASTY[int(rng.integers(0, len(NASTY)))] + data[at:]
        elif kind == 5:
            data = data[at:] + data[:at]
        else:
            # Another value of the same kind, which most often leaves the container whole.
            for old, new in SWAPS:
                if rng.integers(0, 3) == 0:
                    data = data.replace(old, new, int(rng.integers(1, 5)))
    return data


@pytest.mark.parametrize("format_name", sorted(sources.FORMATS))
def test_damaged_files_end_in_records_rejections_or_one_error_in_time(format_name: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_layout(format_name, whole, "mine", 0, SyntheticRecipe(train_records=3, test_records=1))
    shutil.copytree(whole, broken)
    annotations = (path for path in whole.rglob("*") if path.suffix in ANNOTATIONS and "test" not in path.name)
    (name,) = {path.relative_to(whole) for path in annotations}
    data = (whole / name).read_bytes()
    settings = SourceRecipe(format=format_name, path=str(broken))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    ends: Counter[str] = Counter()
    for number in range(FILES_A_FORMAT):
        (broken / name).write_bytes(damaged(data, rng))
        with at_most(SECONDS_A_FILE, f"{format_name}, file {number}"):
            try:
                for one in sources.read(sources.located("mine", str(broken), DataRecipe(), settings)):
                    assert isinstance(one.item, Record | Rejection)
                    if isinstance(one.item, Rejection):
                        assert one.item.reason in REASONS
                        assert "\n" not in one.item.detail and len(one.item.detail) < 2000
                    ends[type(one.item).__name__] += 1
            except SourceError as error:
                ends["SourceError"] += 1
                assert "source 'mine'" in str(error)
    # Every way to end was met, so that the damage is neither too small nor too great.
    assert ends["Record"] > 20 and ends["SourceError"] + ends["Rejection"] > 20
    assert ends["Rejection"] or format_name in ("zebra_cot",), ends


def test_damaged_images_end_in_records_or_rejections_in_time(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_layout("jsonl", folder, "mine", 0, SyntheticRecipe(train_records=1, test_records=1))
    (path,) = (path for path in folder.rglob("*.png") if "train" in path.name)
    data = path.read_bytes()
    settings = SourceRecipe(format="jsonl", path=str(folder))
    rng = np.random.default_rng(0)
    reasons: Counter[str] = Counter()
    for number in range(2 * FILES_A_FORMAT):
        path.write_bytes(damaged(data, rng))
        with at_most(SECONDS_A_FILE, f"image {number}"):
            reading = sources.located("mine", str(folder), DataRecipe(), settings)
            (one,) = sources.read(dataclasses.replace(reading), splits=("train",))
            reasons[one.item.reason if isinstance(one.item, Rejection) else "kept"] += 1
    assert reasons["image_unreadable"] > 20
    of_images = {reason for reason in REASONS if reason.startswith("image_")}
    assert set(reasons) <= {"kept", "bbox_invalid", *of_images}
