"""Dense pretraining of a tiny vision tower on drawn scenes: a stand-in for the pretrained tower of a real Qwen2.5-VL.

In: a from-scratch model, its processor, a number of steps. Out: the same model with its tower and merger trained, and
how well held-out scenes are read. Grids of shapes (which cell, which row, which column is under each merged position)
alternate with scattered shapes of many sizes at several aspect ratios (how much of each colour and shape is under it).
Always: images take the processor's real path; the same seed gives the same weights; the heads are thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from valr_ops.data.synthetic import CELL_CLASSES, SCATTERED_COLOURS, SHAPES, draw_scattered, draw_scenes
from valr_ops.recipe.recipe import SyntheticRecipe
from valr_ops.store.progress import Progress

LEARNING_RATE = 3e-3
GRIDS_PER_BATCH = 32
SCATTERED_BATCHES = ((64, 64, 24), (100, 400, 4), (96, 48, 16), (80, 128, 12))
"""Height, width and number of images of the batches with scattered shapes, taken in turn."""
HELD_OUT = 64


@dataclass(frozen=True)
class TowerTraining:
    """What the pretraining showed."""

    losses: list[float]
    """Mean cross-entropy of each step, in nats."""
    accuracy: dict[str, float]
    """Fraction of merged positions of held-out images read correctly, by question."""


class _Heads(nn.ModuleDict):
    def __init__(self, hidden: int, synthetic: SyntheticRecipe) -> None:
        classes = {
            "cell": CELL_CLASSES,
            "row": synthetic.rows,
            "column": synthetic.columns,
            "colour": 1 + len(SCATTERED_COLOURS),
            "shape": 1 + len(SHAPES),
        }
        super().__init__({name: nn.Linear(hidden, count) for name, count in classes.items()})


def pretrain_tower(
    model: Any, processor: Any, synthetic: SyntheticRecipe, *, steps: int, seed: int, progress: Progress
) -> TowerTraining:
    """Train ``model.model.visual`` in place for `steps` optimizer steps and freeze it again.

    Args:
        model: a Qwen2_5_VLForConditionalGeneration in float32.
        processor: its Qwen2_5_VLProcessor.
        synthetic: rows, columns and cell size of the grids.
    """
    tower = model.model.visual.requires_grad_(True).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = _Heads(model.config.get_text_config().hidden_size, synthetic)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses: list[float] = []
    for step in progress.track(range(steps), "vision tower", total=steps):
        images, targets = _batch(step, seed, synthetic)
        features, grid = _features(tower, processor, images)
        loss = torch.stack(
            [F.cross_entropy(heads[name](features), _under_positions(target, grid)) for name, target in targets.items()]
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.log(step, {"tower_loss": losses[-1]})
    tower.requires_grad_(False).eval()
    return TowerTraining(losses, _accuracy(tower, heads, processor, synthetic, seed))


def _rate(step: int, steps: int) -> float:
    """Warm-up over the first tenth, then a linear decay to a tenth."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, 1.0 - 0.9 * max(0, step - warm_up) / max(1, steps - warm_up))


def _batch(step: int, seed: int, synthetic: SyntheticRecipe) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Images uint8 [n, h, w, 3], and per question what is where as shares: float32 [n, classes, rows, columns]."""
    turn, scattered = divmod(step, 2)
    draw = 1_000_003 * seed + step
    if scattered:
        height, width, count = SCATTERED_BATCHES[turn % len(SCATTERED_BATCHES)]
        return _scattered(draw, count, height, width)
    return _grids(draw, GRIDS_PER_BATCH, synthetic)


def _grids(draw: int, count: int, synthetic: SyntheticRecipe) -> tuple[np.ndarray, dict[str, Tensor]]:
    rows, columns = synthetic.rows, synthetic.columns
    images, labels = draw_scenes(draw, count, rows, columns, synthetic.cell_pixels)
    row = np.broadcast_to(np.arange(rows)[:, None], labels.shape)
    column = np.broadcast_to(np.arange(columns), labels.shape)
    return images, {
        "cell": _shares(labels, CELL_CLASSES),
        "row": _shares(row, rows),
        "column": _shares(column, columns),
    }


def _scattered(draw: int, count: int, height: int, width: int) -> tuple[np.ndarray, dict[str, Tensor]]:
    images, colours, shapes = draw_scattered(draw, count, height, width)
    return images, {
        "colour": _shares(colours, 1 + len(SCATTERED_COLOURS)),
        "shape": _shares(shapes, 1 + len(SHAPES)),
    }


def _shares(labels: np.ndarray, classes: int) -> Tensor:
    """[n, rows, columns] labels as [n, classes, rows, columns] zeros and ones."""
    return F.one_hot(torch.from_numpy(labels.astype(np.int64)), classes).permute(0, 3, 1, 2).float()


def _features(tower: Any, processor: Any, images: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """Merged features [n * height * width, hidden] of images of one size, and (height, width) in merged positions."""
    made = processor.image_processor(images=list(images), return_tensors="pt")
    merge = processor.image_processor.merge_size
    _, height, width = made["image_grid_thw"][0].tolist()
    features = tower(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
    return features, (height // merge, width // merge)


def _under_positions(shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """Shares of the classes under each merged position: [n * height * width, classes], each row summing to one."""
    pooled = F.adaptive_avg_pool2d(shares, grid)
    return pooled.permute(0, 2, 3, 1).reshape(-1, shares.shape[1])


@torch.no_grad()
def _accuracy(tower: Any, heads: _Heads, processor: Any, synthetic: SyntheticRecipe, seed: int) -> dict[str, float]:
    """Accuracy on images that no training step drew; for scattered shapes, of the class with the largest share."""
    draw = 1_000_003 * seed + 999_983
    accuracy = {}
    for images, targets in (_grids(draw, HELD_OUT, synthetic), _scattered(draw, HELD_OUT // 8, 100, 400)):
        features, grid = _features(tower, processor, images)
        for name, target in targets.items():
            right = heads[name](features).argmax(1) == _under_positions(target, grid).argmax(1)
            accuracy[name] = round(right.float().mean().item(), 4)
    return accuracy
