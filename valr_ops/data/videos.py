"""Videos of records: from untrusted bytes to a few checked frames at equal distances.

In: the bytes of an MP4, Matroska, WebM or AVI file, and how many frames are wanted.
Out: frame ``floor((i + 0.5) * count / n)`` for i in 0 .. n - 1 of the `count` frames that the decoder shows (or, by
the rule of VSI-Bench's authors, ``floor(i * (count - 1) / (n - 1))``, first and last included), each as a PNG `Image`
that passed the same checks as any other image; all frames of a video that has fewer.
Always: every frame is decoded, by one thread and from the first one on, and counted. Nothing is sought: a seek lands
where the container's index says, and an index that is wrong or absent would change which frame is called the tenth.
The same bytes give the same images. A file that breaks off is refused, never read as a shorter one. Bytes, frames and
pixels are bounded before they are decoded; only the formats and codecs named here are opened, and no further file, for
playlists are a way to read what lies beside a video or behind a firewall.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image

from valr_ops.data.images import ImageLimits, check_image
from valr_ops.data.records import BadRecord, Image, shortened

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_BYTES = 256 * 2**20
"""Of one video, which is held in memory: ten minutes at 3.5 Mbit/s."""

MAX_FRAMES = 36_000
"""Of one video: twenty minutes at 30 a second."""

MAX_DECODED_PIXELS = 80_000_000_000
"""Of all frames of one video together: twenty minutes of 1920x1080 at 30 a second, minutes of work for one core."""

FORMATS = ("mov", "matroska", "avi")
"""Demuxers, by FFmpeg's names: ``mov`` reads MP4 and its relatives, ``matroska`` WebM too."""

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg")
"""Decoders, by FFmpeg's names."""

_LEAST_PART = 0.9
"""Of the duration that a Matroska file declares, which its packets have to cover."""


Rule = Literal["middles", "ends"]


def read_frames(
    data: bytes, at_most: int, limits: ImageLimits, where: str, rule: Rule = "middles"
) -> tuple[Image, ...]:
    """Frames at equal distances, see the module: all of one size, role `input`, turned as the file asks.

    Args:
        data: the whole file.
        at_most: n, the number of frames wanted; a video that has fewer gives all it has.
        limits: bounds in pixels on each frame.
        where: name of the video for the message.
        rule: the middles of equal parts, or equal distances from the first frame to the last.

    Raises:
        BadRecord: `video_unreadable` (no video, a format or codec that is not opened, a decode error or a corrupt frame
            anywhere, no frame, cut short), `video_too_large` (`MAX_BYTES`, `MAX_FRAMES`, `MAX_DECODED_PIXELS`),
            `frames_unequal` (the size changes), and as `valr_ops.data.images.check_image`.
    """
    if len(data) > MAX_BYTES:
        raise BadRecord("video_too_large", f"{where}: {len(data)} bytes, at most {MAX_BYTES} are read")
    try:
        # Packets are counted without decoding. They are nearly always as many as frames; where they are not, the
        # frames have been counted by then and are decoded once more.
        expected = _packets(data, limits, where)
        count, chosen = _decoded(data, _positions(expected, at_most, rule), limits, where)
        if count != expected:
            count, chosen = _decoded(data, _positions(count, at_most, rule), limits, where)
    except BadRecord:
        raise
    except Exception as error:
        # Hostile bytes lead decoders to any error: av.FFmpegError, ValueError, UnicodeDecodeError, MemoryError ...
        raise BadRecord("video_unreadable", f"{where}: {type(error).__name__}: {shortened(str(error))}") from None
    if not chosen:
        raise BadRecord("video_unreadable", f"{where}: no frame")
    return tuple(check_image(png, "input", limits, f"{where}, frame at {time} s") for time, png in chosen)


def _positions(count: int, at_most: int, rule: Rule) -> Container[int]:
    if count <= at_most:
        return range(count)
    if rule == "ends":
        # In float64 and cut, as the benchmark's authors do: a whole number may come out as one less.
        return set(np.linspace(0, count - 1, at_most, dtype=int).tolist())
    return {(2 * i + 1) * count // (2 * at_most) for i in range(at_most)}


@contextmanager
def _opened(data: bytes, limits: ImageLimits, where: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, ready to be decoded by one thread."""
    import av

    bounds = {"max_pixels": str(limits.max_pixels), "codec_whitelist": ",".join(CODECS)}
    with av.open(
        io.BytesIO(data),
        mode="r",
        options={"format_whitelist": ",".join(FORMATS), **bounds},
        metadata_errors="replace",
        io_open=_refuse_further_files,
    ) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None or stream.codec_context.name not in CODECS:
            found = ", ".join(one.codec_context.name for one in container.streams if one.codec_context) or "nothing"
            raise BadRecord("video_unreadable", f"{where}: found {found}, but no video in {', '.join(CODECS)}")
        coded: Any = stream.codec_context
        size = f"{coded.width}x{coded.height}"
        if coded.width * coded.height > limits.max_pixels:
            raise BadRecord(
                "image_too_large", f"{where}: {size} has more than {limits.max_pixels} pixels (data.max_image_pixels)"
            )
        coded.thread_count, coded.thread_type = 1, "NONE"
        # The bit-exact ways of decoders are the ones that do not depend on the processor.
        coded.options = {"max_pixels": bounds["max_pixels"], "flags": "+bitexact"}
        yield container, stream  # type: ignore[misc]


def _refuse_further_files(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError(f"the video asks for another file, {shortened(url)}")


def _packets(data: bytes, limits: ImageLimits, where: str) -> int:
    """Number of packets of the video stream. Raises `BadRecord` for a file that is cut short or has too many."""
    count, seconds = 0, 0.0
    with _opened(data, limits, where) as (container, stream):
        for packet in container.demux():
            if packet.is_corrupt:
                raise BadRecord("video_unreadable", f"{where}: the file breaks off, or is damaged, at frame {count}")
            if packet.pts is not None and packet.time_base is not None:
                seconds = max(seconds, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is stream and packet.size:
                count += 1
                _refuse_too_much(count, stream.codec_context.width * stream.codec_context.height, where)
        declared = (container.duration or 0) / 1e6
        # The other formats say beforehand where every packet is; a Matroska file that breaks off just ends.
        if "matroska" in container.format.name and seconds < _LEAST_PART * declared:
            raise BadRecord("video_unreadable", f"{where}: ends after {seconds:.2f} of {declared:.2f} seconds")
    return count


def _decoded(
    data: bytes, positions: Container[int], limits: ImageLimits, where: str
) -> tuple[int, list[tuple[float | None, bytes]]]:
    """The number of frames, and of those at `positions` the time in seconds and the PNG."""
    count = 0
    first: tuple[int, int, int] | None = None
    start: float | None = None
    chosen: list[tuple[float | None, bytes]] = []
    with _opened(data, limits, where) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise BadRecord("video_unreadable", f"{where}: frame {count} is damaged")
            shape = (frame.width, frame.height, frame.rotation)
            if first is None:
                first, start = shape, frame.time
            if shape != first:
                raise BadRecord(
                    "frames_unequal",
                    f"{where}: frame {count} has {shape[0]}x{shape[1]} pixels, turned by {shape[2]} degrees, and the "
                    f"first one {first[0]}x{first[1]}, turned by {first[2]}",
                )
            if count in positions:
                time = None if frame.time is None or start is None else round(frame.time - start, 6)
                chosen.append((time, _png(frame)))
            count += 1
            _refuse_too_much(count, frame.width * frame.height, where)
    return count, chosen


def _refuse_too_much(frames: int, pixels: int, where: str) -> None:
    if frames > MAX_FRAMES or frames * pixels > MAX_DECODED_PIXELS:
        raise BadRecord(
            "video_too_large",
            f"{where}: more than {frames - 1} frames of {pixels} pixels; at most {MAX_FRAMES} frames and "
            f"{MAX_DECODED_PIXELS} pixels in all are decoded",
        )


def _png(frame: VideoFrame) -> bytes:
    """The frame in RGB, turned as the file asks, in the same bytes on every processor."""
    from av.video.reformatter import ColorRange, Interpolation

    exact = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    colours = frame.reformat(format="rgb24", interpolation=exact, dst_color_range=ColorRange.JPEG, threads=1)
    pixels = np.rot90(colours.to_ndarray(), round(frame.rotation / 90))
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
    return file.getvalue()


def write_video(frames: np.ndarray, frames_per_second: int = 8) -> bytes:
    """An MP4 of frames uint8 [count, height, width, 3]; the same frames give the same bytes on one machine."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("mpeg4", rate=frames_per_second)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        # A fixed quantiser: shapes keep their colours.
        stream.codec_context.options = {"qmin": "2", "qmax": "2"}
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()
