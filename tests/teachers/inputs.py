"""Narrow teachers of the real classes with weights in a file, and a corpus of images with targets in them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from valr_ops.data.corpus import write_images
from valr_ops.data.records import Box, Image
from valr_ops.data.sequences import Segment, Sequence, batch_of, write_sequences
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe, TeacherRecipe, override
from valr_ops.store.artifacts import StageContext
from valr_ops.store.progress import Progress
from valr_ops.teachers.encoders import Teacher, _build

WIDTHS = {"embed_dim": 16, "depth": 1, "num_heads": 2}
CLASSES: dict[str, dict[str, Any]] = {
    "dinov3": {
        "architecture": "timm",
        "model": "vit_small_patch16_dinov3",
        "image_pixels": 64,
        "arguments": {**WIDTHS, "img_size": 64, "init_values": 1.0},
    },
    "pi3": {
        "architecture": "pi3",
        "model": "vit_large_patch14_reg4_dinov2",
        "image_pixels": 56,
        "arguments": {**WIDTHS, "img_size": 56, "init_values": 1.0, "decoder_depth": 2},
        "views": "joint",
    },
}

BOXES: tuple[Box | None, ...] = (None, (0, 0, 64, 16), (0, 16, 64, 32), (16, 0, 32, 64))


def teacher_recipe(name: str, folder: Path, seed: int = 0, **changes: Any) -> TeacherRecipe:
    """A teacher whose random weights are written to ``folder/teacher.safetensors``."""
    recipe = TeacherRecipe.model_validate({**CLASSES[name], "features": "stored", **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = _build(name, recipe, folder=None)
        # With the usual small weights, features would hardly depend on the image, and not on other views.
        for parameter in encoder.model.parameters():
            torch.nn.init.normal_(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    Teacher(name, recipe.model_copy(update={"precision": "float32"}), encoder).save(folder)
    return recipe.model_copy(update={"weights": str(folder / "teacher.safetensors")})


def recipe_with(name: str, teacher: TeacherRecipe, **changes: Any) -> Recipe:
    """The recipe of scale tiny with this teacher and dotted `changes`."""
    recipe = recipes.tiny()
    return override(recipe.model_copy(update={"teachers": {**recipe.teachers, name: teacher}}), changes)


def image(seed: int, width: int = 64, height: int = 64) -> Image:
    """Noise in blocks of 8 x 8 pixels, another one for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.NEAREST).save(stream, "PNG")
    return _stored(stream.getvalue(), width, height)


def damaged(seed: int) -> Image:
    """An image whose file was cut short."""
    return _stored(image(seed).data[:-60], 64, 64)


def _stored(data: bytes, width: int, height: int) -> Image:
    return Image(data, hashlib.sha256(data).hexdigest(), width, height, "input")


Row = tuple[tuple[str, ...], list[tuple[str, Box | None] | None]]
"""Digests of the images that a record shows, and what each of its segments looks at."""


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """A `latent_corpus` of such records, five a block, ids ``scenes/0`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        Sequence(
            id=f"scenes/{number}",
            source="scenes",
            split="train",
            kind="single_view",
            input_ids=np.arange(8, dtype=np.int32),
            prompt_length=2,
            segments=tuple(
                Segment(3, target[0] if target else None, target[1] if target else None, step)
                for step, target in enumerate(targets)
            ),
            image_digests=shown,
            image_grids=((1, 4, 4),) * len(shown),
            question="What is there?",
            answer="nothing",
        )
        for number, (shown, targets) in enumerate(rows)
    ]
    write_sequences(folder, (batch_of(made[start : start + 5]) for start in range(0, len(made), 5)), {})


def corpus(root: Path, images: Iterable[Image], rows: Iterable[Row]) -> dict[str, Path]:
    """The inputs of a stage that makes features, below `root`."""
    folders = {name: root / name for name in ("cot_corpus", "latent_corpus")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    write_images(folders["cot_corpus"], images)
    write_rows(folders["latent_corpus"], rows)
    return folders


def boxes_corpus(root: Path, images: int = 12) -> dict[str, Path]:
    """Images with four targets each; every target is named twice, and one segment and one record have none."""
    drawn = [image(seed) for seed in range(images)]
    rows: list[Row] = [((one.digest,), [(one.digest, box) for box in BOXES]) for one in drawn]
    return corpus(root, drawn, [*rows, *rows, ((drawn[0].digest,), [None]), ((drawn[0].digest,), [])])


def stage_context(
    inputs: dict[str, Path], place: Path, recipe: Recipe, teacher: str = "dinov3", progress: Progress | None = None
) -> StageContext:
    """Of ``teacher_features_<teacher>``; `out` and `work` lie below `place`."""
    for folder in ("out", "work"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    stage = f"teacher_features_{teacher}"
    return StageContext(stage, recipe, inputs, place / "out", place / "work", progress or Progress())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of images whenever features are computed from now on."""
    counts: list[int] = []
    honest = Teacher.features

    def counted(self: Teacher, squashed: Tensor) -> Tensor:
        counts.append(len(squashed))
        return honest(self, squashed)

    monkeypatch.setattr(Teacher, "features", counted)
    return counts
