"""Small sources and recipes made on the spot."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image

from valr_ops.recipe.recipe import Recipe, read
from valr_ops.store.artifacts import StageContext
from valr_ops.store.progress import Progress

ALL_FORMATS = {
    "zebra_cot": {"format": "zebra_cot"},
    "visual_cot": {"format": "visual_cot"},
    "scenes": {"format": "jsonl"},
}


def recipe(sources: Mapping[str, Any] = ALL_FORMATS, **data: Any) -> Recipe:
    """A recipe at scale tiny with these sources; `data` replaces fields of its data part."""
    synthetic = {"train_records": 32, "test_records": 16}
    return read(
        {
            "scale": "tiny",
            "data": {"sources": dict(sources), "synthetic": synthetic, **data},
            "base": {"from_scratch": {}},
            "alignment": {"block": 1},
            "teachers": {"dinov3": {"architecture": "timm", "model": "vit_small_patch16_dinov3"}},
            "stage1": {"learning_rate": 1e-5},
            "stage2": {"learning_rate": 2e-6},
        }
    )


def context(folder: Path, stage: str, recipe: Recipe, **inputs: Path) -> StageContext:
    """A context whose output is ``folder/stage``."""
    for part in (stage, f"{stage}.work"):
        (folder / part).mkdir(parents=True)
    return StageContext(stage, recipe, inputs, folder / stage, folder / f"{stage}.work", Progress())


def png(width: int = 40, height: int = 30, colour: Any = (200, 30, 30), mode: str = "RGB") -> bytes:
    """A plain picture."""
    file = io.BytesIO()
    PIL.Image.new(mode, (width, height), colour).save(file, format="PNG")
    return file.getvalue()


def video(
    levels: Sequence[int],
    width: int = 64,
    height: int = 48,
    codec: str = "libx264",
    container: str = "mp4",
    frames_per_second: int = 10,
    degrees: int = 0,
) -> bytes:
    """A video whose frames are plain grey of these levels; players turn it counter-clockwise by `degrees`."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=frames_per_second)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if degrees:
            stream.set_display_rotation(degrees)
        frames = [np.full((height, width, 3), level, np.uint8) for level in levels]
        for frame in (*(av.VideoFrame.from_ndarray(pixels, "rgb24") for pixels in frames), None):
            output.mux(stream.encode(frame))
    return file.getvalue()


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A good JSONL record about ``images/{number}.png``."""
    return {
        "id": f"r{number}",
        "license": "CC0-1.0",
        "images": [f"images/{number}.png"],
        "question": "What is shown?",
        "steps": [{"text": "A red wall.", "image": 0, "box": [0, 0, 20, 20]}],
        "answer": "a wall",
        **changes,
    }


def jsonl_source(folder: Path, **splits: list[Any]) -> Path:
    """A source with one file a split; rows are dictionaries or raw bytes; ten different images lie beside them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(10):
        (folder / "images" / f"{number}.png").write_bytes(png(colour=(20 * number, 30, 30)))
    for split, rows in splits.items():
        lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
        (folder / f"{split}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """MD5 of every file below `folder`, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
