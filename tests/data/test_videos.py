"""Videos: which frames become images, that they are always the same, and every way in which a file can be wrong."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

from tests.data.made import png, video
from valr_ops.data import videos
from valr_ops.data.images import ImageLimits, decode
from valr_ops.data.records import BadRecord, Image
from valr_ops.data.videos import read_frames

LIMITS = ImageLimits(min_side=8, max_pixels=100_000)
LEVELS = list(range(10, 250, 20))
"""Greys of twelve frames, far enough apart to survive any codec."""


def read(data: bytes, at_most: int = 4) -> tuple[Image, ...]:
    return read_frames(data, at_most, LIMITS, "v.mp4")


def refusal(data: bytes, at_most: int = 4) -> str:
    with pytest.raises(BadRecord) as caught:
        read(data, at_most)
    assert "v.mp4" in caught.value.detail
    return caught.value.reason


def shown(frames: tuple[Image, ...]) -> list[int]:
    """Positions of the frames of `LEVELS` that the images show."""
    levels = [np.asarray(decode(image.data)).mean() for image in frames]
    return [int(np.abs(np.array(LEVELS) - level).argmin()) for level in levels]


def noise(container: str, codec: str, path: Path, options: dict[str, str] | None = None) -> bytes:
    """Twenty frames that can't be compressed, so that every part of the file holds some of them."""
    random = np.random.default_rng(0)
    with av.open(path, "w", format=container, options=options or {}) as output:
        stream: Any = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 64, "yuv420p", 5
        for _ in range(20):
            pixels = random.integers(0, 255, (64, 96, 3), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        output.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("codec", "container"),
    [("libx264", "mp4"), ("mpeg4", "mp4"), ("mpeg4", "avi"), ("libx264", "matroska"), ("libvpx-vp9", "webm")],
)
def test_the_frames_in_the_middle_of_equal_parts_come_out_of_every_container(codec: str, container: str) -> None:
    frames = read(video(LEVELS, codec=codec, container=container))
    assert shown(frames) == [1, 4, 7, 10]
    assert {(image.width, image.height, image.role) for image in frames} == {(64, 48, "input")}


@pytest.mark.parametrize(("at_most", "positions"), [(1, [6]), (5, [1, 3, 6, 8, 10]), (2, [3, 9])])
def test_the_frame_of_a_part_is_the_one_at_i_plus_a_half_of_n(at_most: int, positions: list[int]) -> None:
    assert shown(read(video(LEVELS), at_most)) == positions


@pytest.mark.parametrize(("at_most", "positions"), [(1, [0]), (2, [0, 11]), (4, [0, 3, 7, 11]), (5, [0, 2, 5, 8, 11])])
def test_the_rule_of_the_benchmarks_authors_takes_the_first_and_the_last_frame(
    at_most: int, positions: list[int]
) -> None:
    assert shown(read_frames(video(LEVELS), at_most, LIMITS, "v.mp4", rule="ends")) == positions


@pytest.mark.parametrize("at_most", [12, 13, 500])
def test_a_video_with_no_more_frames_than_wanted_gives_each_of_them_once(at_most: int) -> None:
    assert shown(read(video(LEVELS), at_most)) == list(range(12))


def test_two_readings_of_a_video_give_the_same_bytes_and_different_frames_different_ones() -> None:
    data = video(LEVELS)
    first, second = read(data), read(data)
    assert [image.digest for image in first] == [image.digest for image in second]
    assert len({image.digest for image in first}) == 4


def test_a_frame_is_a_png_of_the_pixels_that_the_codec_holds() -> None:
    image = read(video([0, 255]), 2)[1]
    assert PIL.Image.open(io.BytesIO(image.data)).format == "PNG"
    assert np.asarray(decode(image.data)).min() >= 253


def test_a_frame_is_turned_as_the_file_asks() -> None:
    def frames(degrees: int) -> Image:
        return read(video(LEVELS, degrees=degrees))[0]

    assert [(frames(turn).width, frames(turn).height) for turn in (0, 90, 180, -90)] == [
        *((64, 48), (48, 64), (64, 48), (48, 64))
    ]


def test_a_quarter_turn_is_counter_clockwise() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:24, 32:] = 255  # top right
        output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        output.mux(stream.encode(None))
    turned = np.asarray(decode(read(file.getvalue())[0].data))
    assert turned[:32, :24].mean() > 200 and turned[32:].mean() < 20  # top left


def test_the_frames_are_counted_and_not_taken_from_what_the_container_says(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = videos._packets
    monkeypatch.setattr(videos, "_packets", lambda *arguments: counted(*arguments) // 2)
    assert shown(read(video(LEVELS))) == [1, 4, 7, 10]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no video at all",
        png(),
        video([]),
        video(LEVELS)[:600],
        video(LEVELS, container="mpegts"),
    ],
    ids=["empty", "text", "an image", "no frames", "truncated", "another container"],
)
def test_what_is_no_readable_video_is_unreadable(data: bytes) -> None:
    assert refusal(data) == "video_unreadable"


def test_a_codec_that_is_not_listed_is_not_opened() -> None:
    assert refusal(video(LEVELS, codec="ffv1", container="matroska")) == "video_unreadable"


def test_a_file_with_sound_alone_is_no_video() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        output.mux(stream.encode(silence))
        output.mux(stream.encode(None))
    assert refusal(file.getvalue()) == "video_unreadable"


@pytest.mark.parametrize("part", [0.3, 0.6, 0.85])
@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"movflags": "faststart"}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("avi", "mpeg4", {}),
        ("matroska", "libx264", {}),
        ("webm", "libvpx-vp9", {}),
    ],
)
def test_a_file_that_breaks_off_is_never_read_as_a_shorter_one(
    container: str, codec: str, options: dict[str, str], part: float, tmp_path: Path
) -> None:
    data = noise(container, codec, tmp_path / "whole", options)
    assert len(read(data)) == 4
    assert refusal(data[: int(part * len(data))]) == "video_unreadable"


def test_frames_that_change_their_size_are_refused() -> None:
    # Each picture of a motion JPEG carries its own size.
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        stream: Any = output.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, width in enumerate((64, 64, 80)):
            packet = av.Packet(_jpeg(width, 48))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 10)
            output.mux(packet)
    assert refusal(file.getvalue()) == "frames_unequal"


def _jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (90, 90, 90)).save(file, format="JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("bound", "value"), [("MAX_BYTES", 500), ("MAX_FRAMES", 11), ("MAX_DECODED_PIXELS", 12 * 64 * 48 - 1)]
)
def test_a_video_beyond_a_bound_is_refused_before_it_is_decoded(
    bound: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = video(LEVELS)
    monkeypatch.setattr(videos, bound, {"MAX_BYTES": len(data)}.get(bound, value + 1))
    assert len(read(data)) == 4
    monkeypatch.setattr(videos, bound, value)
    monkeypatch.setattr(videos, "_decoded", lambda *_: pytest.fail("a frame was decoded"))
    assert refusal(data) == "video_too_large"


def test_a_frame_with_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "_decoded", lambda *_: pytest.fail("a frame was decoded"))
    assert refusal(video(LEVELS[:1], width=400, height=260)) == "image_too_large"


def test_a_frame_too_small_to_show_anything_is_refused_as_an_image_is() -> None:
    with pytest.raises(BadRecord, match="image_too_small"):
        read_frames(video(LEVELS), 4, ImageLimits(min_side=49, max_pixels=100_000), "v.mp4")


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{url}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["hls", "concat", "sdp"],
)
def test_a_playlist_never_opens_another_file(playlist: str, tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(video(LEVELS))
    assert refusal(playlist.format(url=tmp_path / "secret.mp4").encode()) == "video_unreadable"


def test_mutated_videos_give_frames_or_a_reason_and_nothing_else() -> None:
    whole = video(LEVELS)
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 8):
            data[at] = random.integers(0, 256)
        try:
            outcomes.add(len(read(bytes(data[: random.integers(1, 2 * len(data))]))) > 0)
        except BadRecord as bad:
            outcomes.add(bad.reason)
    assert {True, "video_unreadable"} <= outcomes
