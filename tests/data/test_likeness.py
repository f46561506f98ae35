from __future__ import annotations

import io

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from valr_ops.data.likeness import alike, as_looks, distance, look, look_of, pairs_alike
from valr_ops.data.synthetic import draw_scattered, draw_scenes


def pictures(count: int = 60) -> list[PIL.Image.Image]:
    scenes, _ = draw_scenes(0, count)
    scattered, _, _ = draw_scattered(0, count)
    return [PIL.Image.fromarray(one) for one in (*scenes, *scattered)]


def jpeg(picture: PIL.Image.Image) -> PIL.Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return PIL.Image.open(file).convert("RGB")


def looks_of(drawn: list[PIL.Image.Image]) -> np.ndarray:
    return as_looks(b"".join(look(one) or b"" for one in drawn))


@pytest.mark.parametrize(
    "changed",
    [
        jpeg,
        lambda picture: picture.resize((picture.width * 2, picture.height * 2), PIL.Image.Resampling.LANCZOS),
        lambda picture: picture.filter(PIL.ImageFilter.GaussianBlur(1)),
    ],
    ids=["re-encoded", "enlarged", "blurred"],
)
def test_a_picture_stored_in_another_way_is_recognised(changed: object) -> None:
    drawn = pictures()
    near = alike(looks_of([changed(one) for one in drawn]), looks_of(drawn), 8)  # type: ignore[operator]
    assert (near == np.arange(len(drawn))).mean() > 0.95
    assert all(near[number] in (number, -1) for number in range(len(drawn)))


def test_different_drawings_are_far_apart() -> None:
    drawn = looks_of(pictures())
    nearest = min(distance(drawn[i], drawn[j]) for i in range(len(drawn)) for j in range(i))
    assert nearest > 16


def test_a_picture_without_structure_resembles_nothing() -> None:
    assert look(PIL.Image.new("RGB", (64, 64), (200, 30, 30))) is None
    flat = as_looks(bytes(24))
    assert alike(flat, flat, 8).tolist() == [-1]
    assert list(pairs_alike(np.zeros(2, dtype=np.int64), np.concatenate([flat, flat]), 8)) == []


def flipped(hash_: bytes, bits: list[int]) -> bytes:
    number = int.from_bytes(hash_, "little")
    for bit in bits:
        number ^= 1 << bit
    return number.to_bytes(24, "little")


@pytest.mark.parametrize("bits", [0, 1, 3, 8, 16])
def test_every_hash_within_the_bound_is_found_and_none_beyond(bits: int) -> None:
    rng = np.random.default_rng(bits)
    known = [rng.bytes(24) for _ in range(40)]
    for differing in range(bits + 4):
        asked = [flipped(one, rng.choice(192, differing, replace=False).tolist()) for one in known]
        found = alike(as_looks(b"".join(asked)), as_looks(b"".join(known)), bits)
        assert found.tolist() == [number if differing <= bits else -1 for number in range(40)]


def test_pairs_are_those_of_one_group_within_the_bound() -> None:
    rng = np.random.default_rng(0)
    looks, groups = [], []
    for number in range(30):
        base = rng.bytes(24)
        for differing in (0, 5, 40):
            looks.append(flipped(base, rng.choice(192, differing, replace=False).tolist()))
            groups.append(number % 3)
    # The same pictures once more in another group.
    array, of = as_looks(b"".join(looks + looks)), np.array([*groups, *(group + 3 for group in groups)])
    expected = {
        (i, j) for j in range(len(array)) for i in range(j) if of[i] == of[j] and distance(array[i], array[j]) <= 8
    }
    assert {(min(pair), max(pair)) for pair in pairs_alike(of, array, 8)} == expected


def test_a_large_jpeg_that_is_decoded_small_looks_as_it_does_whole() -> None:
    for picture in pictures(20):
        large = picture.resize((1024, 1024), PIL.Image.Resampling.BICUBIC)
        file = io.BytesIO()
        large.save(file, "JPEG", quality=90)
        small, whole = look_of(file.getvalue()), look(large)
        assert small is not None and whole is not None
        assert distance(as_looks(small)[0], as_looks(whole)[0]) <= 8
