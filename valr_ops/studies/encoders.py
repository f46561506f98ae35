"""What the studies' models know of a picture before they are trained: a vision tower, and teachers of known knowledge.

In: a from-scratch Qwen2.5-VL, or the names of questions (`valr_ops.studies.tiles.QUESTIONS`). Out: its tower, trained
until one linear map tells everything about a cell and where it stands; or a convolutional encoder whose features tell
the answers to those questions, and an encoder that was never trained. Both are frozen.
Always: the same seed gives the same weights; pictures are none of those that models are trained or scored on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valr_ops.studies.tiles import CELL_PIXELS, QUESTIONS, Layout, Pictures, draw
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402

BATCH, LEARNING_RATE = 32, 3e-3
_PATCH_PIXELS = 8
_TRAINED, _HELD_OUT = 100, 101
"""Of pictures; other parts of a seed's pictures are for training and scoring models."""


class Encoder(nn.Module):
    """A small convolutional encoder: [n, side, side, 3] pixels to [n, rows, columns, `dim`] features of patches."""

    dim = 48

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 64, _PATCH_PIXELS, _PATCH_PIXELS), nn.GELU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.GELU()),
            nn.Conv2d(64, self.dim, 3, padding=1),
        )

    def forward(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        device = next(self.parameters()).device
        scaled = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        features: Tensor = self.body(scaled).permute(0, 2, 3, 1)
        return features


def train_teacher(knows: Sequence[str], side: int, updates: int, seed: int) -> tuple[Encoder, float]:
    """An encoder whose features tell the answers to the questions `knows`, and how often they do on other pictures.

    Args:
        knows: keys of `QUESTIONS`; none leaves the encoder as it was drawn, with a share of 0.
        side: tiles on each side of the pictures.
    """
    sizes = [QUESTIONS[name] for name in knows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder()
        if not sizes:
            return encoder.eval().requires_grad_(False), 0.0
        # Features are compared by their direction, so what they tell must not hide in their length.
        heads = nn.Sequential(nn.LayerNorm(encoder.dim), nn.Linear(encoder.dim, sum(sizes)))
    patches = CELL_PIXELS // _PATCH_PIXELS
    places = [list(QUESTIONS).index(name) for name in knows]

    def answers(pictures: Pictures) -> tuple[Tensor, Tensor]:
        known = torch.from_numpy(pictures.known[..., places])
        known = known.repeat_interleave(patches, 1).repeat_interleave(patches, 2)
        return heads(encoder(pictures.pixels)).flatten(0, 2), known.flatten(0, 2)

    right = _train_densely(answers, sizes, [*encoder.parameters(), *heads.parameters()], side, updates, seed)
    return encoder.eval().requires_grad_(False), right


def train_tower(model: Qwen2_5_VLForConditionalGeneration, layout: Layout, side: int, updates: int, seed: int) -> float:
    """Train the vision tower and merger of `model` in place; the share of held-out answers that are right.

    It stands in for Qwen's pretrained tower: without it nothing is learned from images.
    """
    tower, cells = model.model.visual.requires_grad_(True).train(), 2 * side
    sizes = [*QUESTIONS.values(), cells, cells]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.Linear(model.config.get_text_config().hidden_size, sum(sizes))

    def answers(pictures: Pictures) -> tuple[Tensor, Tensor]:
        batch = layout.batch(pictures, None)
        merged = tower(batch.pixel_values, grid_thw=batch.image_grid_thw).pooler_output
        place = np.broadcast_to(np.moveaxis(np.indices((cells, cells)), 0, -1), (len(pictures), cells, cells, 2))
        known = torch.from_numpy(np.concatenate([pictures.known, place], axis=-1))
        return heads(merged), known.flatten(0, 2)

    right = _train_densely(answers, sizes, [*tower.parameters(), *heads.parameters()], side, updates, seed)
    tower.requires_grad_(False).eval()
    return right


def _train_densely(
    answers: Callable[[Pictures], tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    parameters: Sequence[nn.Parameter],
    side: int,
    updates: int,
    seed: int,
) -> float:
    """Train `answers` (scores of all questions, and the true ones [places, questions]); the share that is right."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=updates, pct_start=0.1)

    def asked(part: int, number: int, count: int) -> list[tuple[Tensor, Tensor]]:
        scores, known = answers(draw((seed, part, number), count, side, 1))
        return list(zip(scores.split(list(sizes), dim=-1), known.unbind(-1), strict=True))

    for update in range(updates):
        losses = [F.cross_entropy(scores, known) for scores, known in asked(_TRAINED, update, BATCH)]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = [(scores.argmax(-1) == known).double().mean() for scores, known in asked(_HELD_OUT, 0, 2 * BATCH)]
    return float(torch.stack(found).mean())
