"""When and how fast: the number of updates, the learning rate of each, and AdamW's parameter groups.

In: a stage's `TrainingRecipe` and the number of sequences in an epoch. Out: plain numbers and parameter groups.
Always: everything is a pure function of the update's number, so that a resumed run needs no state from here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from valr_ops.recipe.recipe import TrainingRecipe


def updates(recipe: TrainingRecipe, sequences: float, processes: int) -> int:
    """Number of optimizer updates: `epochs` passes rounded up to whole windows, at most `max_updates`.

    A pass visits `sequences`, which is a fraction where the weights of the sources leave one.

    The paper's 450,000 records in windows of 2 x 16 x 4 are 3,516 updates (facts: 3,515.6).
    """
    wanted = math.ceil(recipe.epochs * sequences / records_per_update(recipe, processes))
    return wanted if recipe.max_updates is None else min(wanted, recipe.max_updates)


def records_per_update(recipe: TrainingRecipe, processes: int) -> int:
    """Size of the global window: micro-batch x accumulation x processes (paper, table 7: 2 x 16 x 4)."""
    return recipe.micro_batch * recipe.accumulation * processes


def learning_rate_factor(update: int, total: int, recipe: TrainingRecipe) -> float:
    """What the peak learning rates are multiplied by in update `update` of 0..`total` - 1.

    Rises linearly over the first `warmup_fraction` of the updates to 1 and then falls to almost 0 along half a cosine
    or a line, or stays. The first update is not wasted on a rate of 0 and neither is the last.
    """
    warmup = round(recipe.warmup_fraction * total)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(total - warmup, 1)
    match recipe.schedule:
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return 1.0 - progress
        case "constant":
            return 1.0


def peak_rates(recipe: TrainingRecipe) -> dict[str, float]:
    """The peak learning rate of each part of what is trained (paper, table 7)."""
    return {"decoder": recipe.learning_rate, "projector": recipe.projector_learning_rate}


def parameter_groups(
    decoder: Iterable[Tensor], projectors: Iterable[Tensor], recipe: TrainingRecipe
) -> list[dict[str, Any]]:
    """AdamW's groups: two learning rates (paper, table 7), each with and without weight decay; empty groups left out.

    Norms and biases, the parameters with fewer than two axes, are not decayed: the paper is silent, the usual choice.
    `peak_lr` is what `learning_rate_factor` multiplies, `part` is a key of `peak_rates`.
    """
    groups = []
    for (part, rate), parameters in zip(peak_rates(recipe).items(), (decoder, projectors), strict=True):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for decayed in (True, False):
            members = [parameter for parameter in trained if (parameter.ndim >= 2) == decayed]
            decay = recipe.weight_decay if decayed else 0.0
            if members:
                groups.append({"params": members, "part": part, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    return groups
