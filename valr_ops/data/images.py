"""Images of records: from untrusted bytes or a path below a root to a checked `Image`, and to pixels.

In: encoded bytes, or a root folder and a relative path from an annotation file.
Out: an `Image` whose bytes were decoded to the last row, or RGB pixels with the EXIF orientation applied and
transparency composited on white.
Always: a path can't leave its root, not even through a link; nothing larger than the bound is decoded; every problem
is a `BadRecord` with its reason code.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageOps

from valr_ops.data.records import BadRecord, Box, Image, shortened

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Raster formats that are opened; others (EPS starts an interpreter, PSD and friends are rarely attacked and fixed)."""

_MAX_ASPECT = 200
_EXIF_ORIENTATION = 0x0112
_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True)
class ImageLimits:
    """Bounds on decoded images, from the recipe."""

    min_side: int
    """Pixels."""
    max_pixels: int
    """Width times height."""


def check_image(data: bytes, role: Literal["input", "step"], limits: ImageLimits, where: str) -> Image:
    """An `Image` from encoded bytes, decoded once to the last row.

    Args:
        data: PNG, JPEG, WebP, BMP, GIF or TIFF.
        role: see `Image.role`.
        limits: bounds in pixels.
        where: name of the image for the message.

    Raises:
        BadRecord: `image_missing` (no bytes), `image_unreadable`, `image_too_large`, `image_too_small`, `image_aspect`.
    """
    if not data:
        raise BadRecord("image_missing", f"{where}: zero bytes")
    try:
        # The header is read before any pixel: a bomb is refused by its declared size.
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            if width * height > limits.max_pixels:
                raise BadRecord(
                    "image_too_large",
                    f"{where}: {width}x{height} has more than {limits.max_pixels} pixels (data.max_image_pixels)",
                )
            picture.load()
            if picture.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
    except BadRecord:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise BadRecord("image_too_large", f"{where}: a decompression bomb by Pillow's bound") from None
    except Exception as error:
        # Decoders raise whatever hostile bytes lead them to: OSError, SyntaxError, struct.error, ValueError ...
        raise BadRecord("image_unreadable", f"{where}: {type(error).__name__}") from None
    if min(width, height) < limits.min_side:
        raise BadRecord(
            "image_too_small", f"{where}: {width}x{height}, a side below {limits.min_side} px (data.min_image_side)"
        )
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise BadRecord("image_aspect", f"{where}: {width}x{height} is longer than {_MAX_ASPECT} times its short side")
    return Image(data=data, digest=hashlib.sha256(data).hexdigest(), width=width, height=height, role=role)


def resolve(root: Path, relative: object, where: str) -> Path:
    """The file that an annotation calls `relative`, below `root`.

    Raises:
        BadRecord: `schema_mismatch` (no path), `path_escape` (absolute, a drive, ``..``, or a link out of the root),
            `image_missing` (no such regular file).
    """
    if not isinstance(relative, str) or not relative.strip():
        raise BadRecord("schema_mismatch", f"{where}: expected a relative path, found {shortened(relative)!r}")
    shown = f"{where}: {shortened(relative)!r}"
    path = PurePosixPath(relative.replace("\\", "/"))
    if path.is_absolute() or _DRIVE.match(relative) or ".." in path.parts or "\0" in relative:
        raise BadRecord("path_escape", f"{shown} must be relative to the source's folder and stay in it")
    try:
        found = (root / path).resolve(strict=True)
        inside = found.is_relative_to(root.resolve())
        regular = found.is_file()
    except (OSError, RuntimeError, ValueError):
        raise BadRecord("image_missing", f"{shown} does not exist") from None
    if not inside:
        raise BadRecord("path_escape", f"{shown} is a link that leaves the source's folder")
    if not regular:
        raise BadRecord("image_missing", f"{shown} is no regular file")
    return found


def read_image(root: Path, relative: object, role: Literal["input", "step"], limits: ImageLimits, where: str) -> Image:
    """`check_image` of a file below `root`; see `resolve` for the rules of the path.

    Raises:
        BadRecord: as `resolve` and `check_image`.
    """
    path = resolve(root, relative, where)
    shown = f"{where}: {shortened(relative)}"
    try:
        # No encoding of an allowed image needs eight bytes a pixel, so a larger file is not even read.
        if path.stat().st_size > 8 * limits.max_pixels + 2**20:
            raise BadRecord("image_too_large", f"{shown} has {path.stat().st_size} bytes (data.max_image_pixels)")
        data = path.read_bytes()
    except OSError as error:
        raise BadRecord("image_unreadable", f"{shown}: {error.strerror}") from None
    return check_image(data, role, limits, shown)


def decode(data: bytes, box: Box | None = None) -> PIL.Image.Image:
    """RGB pixels of an image that `check_image` accepted.

    The EXIF orientation is applied, transparency is composited on white, of an animation the first frame is taken.

    Args:
        data: encoded bytes.
        box: crop in pixels of the oriented image, x1 and y1 exclusive; None for all of it.
    """
    with warnings.catch_warnings():
        # check_image already bounded the pixels; the recipe's bound, not Pillow's warning level, decides.
        warnings.simplefilter("ignore")
        picture: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        picture = PIL.ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16") or picture.mode == "I":
            # Pillow clips 16-bit greys at 255 when converting; the high byte is what a viewer shows.
            picture = PIL.Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            coloured = picture.convert("RGBA")
            white = PIL.Image.new("RGBA", coloured.size, (255, 255, 255, 255))
            picture = PIL.Image.alpha_composite(white, coloured)
        picture = picture.convert("RGB")
    return picture.crop(box) if box is not None else picture
