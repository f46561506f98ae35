"""How an image looks, in 192 bits: the perceptual hash by which near duplicates and benchmark images are found.

In: the pixels of a decoded image. Out: 24 bytes, the signs of the lowest frequencies of luminance and of both colour
differences, 64 each: the DCT hash of Zauner ("Implementation and benchmarking of perceptual image hash functions",
2010) for three channels, so that two drawings that differ in a colour differ here.
Always: re-encoding or resizing an image moves a bit or two, another picture of the same kind moves a dozen or more;
an image without any structure, such as a plain wall, has no hash, for it would resemble every other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import PIL.Image
from scipy.fft import dctn

from valr_ops.data.images import decode

BITS = 192
_SIDE = 32
_LOWEST = 8
_LEAST_ENERGY = 2.0
"""Grey levels (root mean square of the kept frequencies) below which a channel counts as flat."""


def look_of(data: bytes) -> bytes | None:
    """`look` of an encoded image that `check_image` accepted; a large JPEG is decoded small."""
    return look(decode(data, least_side=4 * _SIDE))


def look(picture: PIL.Image.Image) -> bytes | None:
    """24 bytes, or None for a picture without structure.

    Args:
        picture: RGB, of any size; reduced to 32 x 32 first.
    """
    small = picture.resize((_SIDE, _SIDE), PIL.Image.Resampling.BOX, reducing_gap=2.0).convert("YCbCr")
    frequencies = dctn(np.asarray(small, dtype=np.float32), axes=(0, 1), norm="ortho")[:_LOWEST, :_LOWEST]
    # The constant part says how bright the picture is, not what is on it.
    frequencies[0, 0] = 0.0
    flat = np.sqrt((frequencies**2).mean(axis=(0, 1))) < _LEAST_ENERGY
    if flat.all():
        return None
    signs = frequencies > np.median(frequencies, axis=(0, 1))
    signs[:, :, flat] = False
    return np.packbits(signs.transpose(2, 0, 1)).tobytes()


Looks = npt.NDArray[np.uint64]
"""[pictures, 3]: the bits of `look`, 64 to a number; all zero where a picture has none."""

NO_LOOK = bytes(BITS // 8)
"""Stands for a picture without structure."""


def as_looks(hashes: bytes) -> Looks:
    """Hashes one behind the other, as an array."""
    return np.frombuffer(hashes, dtype=np.uint64).reshape(-1, BITS // 64)


def alike(looks: Looks, known: Looks, bits: int) -> npt.NDArray[np.int64]:
    """For each of `looks` the first of `known` that differs in at most `bits` bits, or -1.

    Two hashes that differ in at most `bits` bits agree in one of ``bits + 1`` bands, so only those are compared.
    """
    found = np.full(len(looks), -1, dtype=np.int64)
    has_look = looks.any(axis=1)
    known_rows = np.flatnonzero(known.any(axis=1))
    for band, known_band in zip(_bands(looks, bits), _bands(known, bits), strict=True):
        by_value: dict[int, list[int]] = defaultdict(list)
        for row in known_rows:
            by_value[int(known_band[row])].append(int(row))
        candidates = np.flatnonzero(has_look & np.isin(band, known_band[known_rows]))
        for row in candidates:
            near = [other for other in by_value[int(band[row])] if distance(looks[row], known[other]) <= bits]
            if near and (found[row] < 0 or near[0] < found[row]):
                found[row] = near[0]
    return found


def pairs_alike(groups: npt.NDArray[np.int64], looks: Looks, bits: int) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of rows of one group whose hashes differ in at most `bits` bits; each pair once or more.

    Of rows with the very same hash only the first is compared with others.
    """
    first: dict[tuple[int, bytes], int] = {}
    distinct = []
    for row in np.flatnonzero(looks.any(axis=1)).tolist():
        earlier = first.setdefault((int(groups[row]), looks[row].tobytes()), row)
        if earlier != row:
            yield earlier, row
        else:
            distinct.append(row)
    rows = np.array(distinct, dtype=np.int64)
    for band in _bands(looks, bits):
        keys = band[rows] ^ (groups[rows].astype(np.uint64) << np.uint64(40))
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
        for start, end in zip(starts, np.r_[starts[1:], len(order)], strict=True):
            members = rows[order[start:end]]
            for place in range(1, len(members)):
                differing = np.bitwise_count(looks[members[:place]] ^ looks[members[place]]).sum(axis=1)
                same_group = groups[members[:place]] == groups[members[place]]
                for other in members[:place][same_group & (differing <= bits)]:
                    yield int(other), int(members[place])


def distance(one: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64]) -> int:
    """Number of differing bits of two hashes ``[3]``."""
    return int(np.bitwise_count(one ^ other).sum())


def _bands(looks: Looks, bits: int) -> Iterator[npt.NDArray[np.uint64]]:
    """The hashes cut into ``bits + 1`` bands of like width, a number each, one band after the other."""
    unpacked = np.unpackbits(looks.view(np.uint8).reshape(len(looks), -1), axis=1)
    for columns in np.array_split(np.arange(BITS), bits + 1):
        weights = np.uint64(1) << np.arange(min(len(columns), 40), dtype=np.uint64)
        yield unpacked[:, columns[:40]].astype(np.uint64) @ weights
