"""Images of records: from untrusted bytes or a path below a root to a checked `Image`, and to pixels.

In: encoded bytes, or the files of a source and a relative path from an annotation file.
Out: an `Image` whose bytes were decoded to the last row, or RGB pixels with the EXIF orientation applied and
transparency composited on white.
Always: a path can't leave its root, not even through a link; nothing larger than the bound is decoded; every problem
is a `BadRecord` with its reason code.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageOps

from valr_ops.data.records import BadRecord, Box, Image, shortened
from valr_ops.store.objects import EscapeError, Files, MissingError, StorageError, TooLargeError, is_remote

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Raster formats that are opened; others (EPS starts an interpreter, PSD and friends are rarely attacked and fixed)."""

_MAX_ASPECT = 200
_EXIF_ORIENTATION = 0x0112


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


def read_image(files: Files, name: object, role: Literal["input", "step"], limits: ImageLimits, where: str) -> Image:
    """`check_image` of a file that an annotation calls `name`.

    Raises:
        BadRecord: as `read_bytes` and `check_image`.
    """
    # No encoding of an allowed image needs eight bytes a pixel, so a larger file is not even read.
    data = read_bytes(files, name, 8 * limits.max_pixels + 2**20, where)
    return check_image(data, role, limits, f"{where}: {shortened(name)}")


def read_bytes(files: Files, name: object, at_most: int, where: str) -> bytes:
    """A file that an annotation names.

    Raises:
        BadRecord: `schema_mismatch` (no path), `path_escape` (absolute, a drive, ``..``, or a link out of the root),
            `image_missing` (no such regular file), `image_too_large`, `image_unreadable`.
    """
    if not isinstance(name, str) or not name.strip():
        raise BadRecord("schema_mismatch", f"{where}: expected a relative path, found {shortened(name)!r}")
    shown = f"{where}: {shortened(name)!r}"
    try:
        return files.read(name, at_most)
    except EscapeError:
        raise BadRecord("path_escape", f"{shown} must be relative to the source's folder and stay in it") from None
    except MissingError:
        raise BadRecord("image_missing", f"{shown} does not exist") from None
    except TooLargeError:
        raise BadRecord("image_too_large", f"{shown} has more than {at_most} bytes (data.max_image_pixels)") from None
    except StorageError as error:
        if is_remote(files.location):
            # A store that is away says nothing about the record.
            raise
        raise BadRecord("image_unreadable", f"{shown}: {error}") from None


def decode(data: bytes, box: Box | None = None, least_side: int | None = None) -> PIL.Image.Image:
    """RGB pixels of an image that `check_image` accepted.

    The EXIF orientation is applied, transparency is composited on white, of an animation the first frame is taken.

    Args:
        data: encoded bytes.
        box: crop in pixels of the oriented image, x1 and y1 exclusive; None for all of it.
        least_side: a JPEG may be decoded smaller, to sides of at least so many pixels, which is much faster; None for
            its own size.
    """
    with warnings.catch_warnings():
        # check_image already bounded the pixels; the recipe's bound, not Pillow's warning level, decides.
        warnings.simplefilter("ignore")
        picture: PIL.Image.Image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        picture.getexif()
        # Pillow would write the turned picture's metadata anew, and raises where it is damaged; the tag is read by now.
        picture.info = {key: value for key, value in picture.info.items() if "exif" not in key and "xmp" not in key}
        if least_side is not None:
            picture.draft("RGB", (least_side, least_side))
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
