"""A short dense training on drawn scenes: what stands in for a pretrained encoder at scale tiny.

In: a teacher with random weights. Out: the same teacher, trained so that one linear map per patch tells what lies under
the patch's centre (class of a grid cell; colour and shape of a scattered object), and how often it does on scenes not
trained on. Crops are cut at random (whole images, rows, runs of cells, any box) and squashed as every target is.
Always: the same seed gives the same weights, bit for bit, on one machine and thread count. The drawn scenes are the
teacher's own: no record of a corpus is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from valr_ops.data.synthetic import draw_scattered, draw_scenes
from valr_ops.store.progress import Progress

if TYPE_CHECKING:
    from valr_ops.teachers.encoders import Teacher

_TRAIN_SCENES, _HELD_OUT_SCENES = 384, 64
_ROWS = _COLUMNS = 4
_CELL_PIXELS = 16
_BATCH = 64
_LEARNING_RATE = 3e-3
_IGNORED = -100


@dataclass(frozen=True)
class _Scenes:
    """Drawn images with what is seen at every pixel."""

    images: list[PIL.Image.Image]
    maps: NDArray[np.int8]
    """``[N, questions, height, width]``: cell class, colour, shape; -100 where a question is not asked."""


def pretrain(teacher: Teacher, steps: int, seed: int, progress: Progress) -> float:
    """Train `teacher` in place and freeze it again.

    Args:
        steps: optimizer steps of 64 crops each.
        seed: of the scenes and crops; weights were seeded when they were made.
        progress: counts the steps.

    Returns:
        Fraction of patches of held-out crops whose content the linear heads name, averaged over the questions.
    """
    random = np.random.default_rng(seed)
    train = _draw(seed=int(random.integers(2**31)), count=_TRAIN_SCENES)
    held_out = _draw(seed=int(random.integers(2**31)), count=_HELD_OUT_SCENES)
    classes = [int(max(part.maps[:, question].max() for part in (train, held_out))) + 1 for question in range(3)]
    # Features are compared by their direction later on, so the heads read them normalised: what they tell must not
    # hide in the length.
    heads = nn.Sequential(nn.LayerNorm(teacher.dim), nn.Linear(teacher.dim, sum(classes))).to(teacher.device)
    teacher.model.train().requires_grad_(True)
    parameters = [*teacher.model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in progress.track(range(steps), f"training {teacher.name} on drawn scenes", total=steps):
        squashed, labels = _crops(train, teacher, random, _BATCH)
        logits = heads(teacher.features(squashed)).split(classes, dim=-1)
        loss = sum(
            (
                F.cross_entropy(part.flatten(0, 2), labels[:, question].flatten(), ignore_index=_IGNORED)
                for question, part in enumerate(logits)
            ),
            start=torch.zeros(()),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    teacher.model.eval().requires_grad_(False)
    with torch.no_grad():
        squashed, labels = _crops(held_out, teacher, random, 4 * _BATCH)
        logits = heads(teacher.features(squashed)).split(classes, dim=-1)
    return float(np.mean([_accuracy(part, labels[:, question]) for question, part in enumerate(logits)]))


def _draw(seed: int, count: int) -> _Scenes:
    """Half grids of cells, half scattered objects, of one image size."""
    grids, cells = draw_scenes(seed, count, _ROWS, _COLUMNS, _CELL_PIXELS)
    scattered, colours, shapes = draw_scattered(seed, count, _ROWS * _CELL_PIXELS, _COLUMNS * _CELL_PIXELS)
    maps = np.full((2 * count, 3, *grids.shape[1:3]), _IGNORED, dtype=np.int8)
    maps[:count, 0] = cells.repeat(_CELL_PIXELS, axis=1).repeat(_CELL_PIXELS, axis=2)
    maps[count:, 1], maps[count:, 2] = colours, shapes
    return _Scenes([PIL.Image.fromarray(pixels) for pixels in (*grids, *scattered)], maps)


def _crops(scenes: _Scenes, teacher: Teacher, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Random crops as the teacher sees them, and labels ``[count, questions, rows, columns]`` at the patch centres."""
    numbers = random.integers(len(scenes.images), size=count)
    boxes = [_box(random) for _ in numbers]
    images = [scenes.images[number].crop(box) for number, box in zip(numbers, boxes, strict=True)]
    x0, y0, x1, y1 = np.array(boxes).T[:, :, None]
    rows, columns = teacher.grid
    y = y0 + ((np.arange(rows) + 0.5) * (y1 - y0) / rows).astype(int)
    x = x0 + ((np.arange(columns) + 0.5) * (x1 - x0) / columns).astype(int)
    labels = scenes.maps[numbers[:, None, None], :, y[:, :, None], x[:, None, :]]  # [count, rows, columns, questions]
    # In memory with channels outermost: the gradient of a convolution takes half as long with them.
    squashed = teacher.squash(images).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    return squashed, torch.from_numpy(labels).to(teacher.device, torch.int64).permute(0, 3, 1, 2)


def _box(random: np.random.Generator) -> tuple[int, int, int, int]:
    """A row of a scene (half of the time: what most targets are), a whole scene, a run of cells, or any box."""
    height, width = _ROWS * _CELL_PIXELS, _COLUMNS * _CELL_PIXELS
    match random.integers(6):
        case 0 | 1 | 2:
            row = int(random.integers(_ROWS)) * _CELL_PIXELS
            return 0, row, width, row + _CELL_PIXELS
        case 3:
            return 0, 0, width, height
        case 4:
            x0, x1 = sorted(int(edge) for edge in random.choice(_COLUMNS + 1, size=2, replace=False))
            y0, y1 = sorted(int(edge) for edge in random.choice(_ROWS + 1, size=2, replace=False))
            return x0 * _CELL_PIXELS, y0 * _CELL_PIXELS, x1 * _CELL_PIXELS, y1 * _CELL_PIXELS
        case _:
            box_width = int(random.integers(_CELL_PIXELS, width + 1))
            box_height = int(random.integers(_CELL_PIXELS, height + 1))
            x0, y0 = int(random.integers(width - box_width + 1)), int(random.integers(height - box_height + 1))
            return x0, y0, x0 + box_width, y0 + box_height


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    asked = labels != _IGNORED
    return (logits.argmax(dim=-1)[asked] == labels[asked]).double().mean().item()
