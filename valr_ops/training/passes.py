"""A window through the model: roll-out, micro-batch after micro-batch, and the rehearsal of the heaviest of them.

In: an engine, the objective and windows. Out: losses with graph and figures; errors that name the records.
Always: the slots of a whole window are decoded together, and each micro-batch is then one forward; the rehearsal leaves
no trace; a window that is not finite, does not fit into memory or is not kept apart by packing ends the run before the
weights change.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from valr_ops.model.latents import check_packing
from valr_ops.recipe.recipe import Recipe
from valr_ops.training.engine import DeepSpeedEngine, TorchEngine
from valr_ops.training.log import Row
from valr_ops.training.objective import Counts, Figures, Objective
from valr_ops.training.windows import Share, Windows

Engine = TorchEngine | DeepSpeedEngine

_NAMED_RECORDS = 8


class TrainingError(RuntimeError):
    """A step that is not finite or does not fit into memory: the message names the records and what to change."""


def passes(
    engine: Engine, objective: Objective, shares: Sequence[Share], counts: Counts
) -> Iterator[tuple[Tensor, Figures]]:
    """Loss and figures of one micro-batch of a window after the other.

    Args:
        shares: the window's micro-batches; their slots are rolled out together before the first.
        counts: what the whole window's sums are divided by.
    """
    batches = [share.batch.to(engine.ranks.device) for share in shares]
    with engine.precision():
        rollouts = objective.roll_out(batches)
    for share, batch, rollout in zip(shares, batches, rollouts, strict=True):
        yield engine(batch, share.features, counts, rollout)


def rehearse(
    engine: Engine, objective: Objective, windows: Windows, start: int, stop: int, recipe: Recipe, stage: int
) -> None:
    """Run the heaviest micro-batches of the updates `start` .. `stop` - 1 forward and backward, then forget them.

    Weights, optimizer and random numbers are as before. There are two micro-batches, and the second one finds the
    gradients of the first in memory, as every micro-batch of a window but the first does.

    Raises:
        TrainingError: the memory is too small for them.
        PackingError: packed into one row, their records see each other.
    """
    for shares in windows.heaviest(start, stop):
        with memory_errors_named(shares[:1], recipe, stage):
            counts = Counts.of(shares, objective.shape, engine.ranks)
            loss, _ = next(passes(engine, objective, shares, counts))
            engine.backward(loss, last=False)
            with engine.precision():
                check_packing(objective.model, shares[0].batch.to(engine.ranks.device))
    engine.forget()


@contextlib.contextmanager
def memory_errors_named(shares: Sequence[Share], recipe: Recipe, stage: int) -> Iterator[None]:
    """Inside, running out of memory is a `TrainingError` about the micro-batches `shares`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        training = recipe.stage1 if stage == 1 else recipe.stage2
        tokens = sum(share.positions for share in shares)
        segments = sum(len(share.batch.targets) for share in shares)
        settings = [f"data.max_length={recipe.data.max_length}"]
        if training.micro_batch > 1:
            kept = f"stage{stage}.micro_batch={training.micro_batch} (and raise stage{stage}.accumulation by as much)"
            settings.insert(0, kept)
        if stage == 2:
            settings.append(f"latents.slots={recipe.latents.slots}")
        if stage == 2 and recipe.latents.method == "two_pass":
            settings.append(f"stage2.accumulation={training.accumulation}, whose records are rolled out together")
        raise TrainingError(
            f"stage {stage} ran out of memory with {_records(shares)}: {tokens:,} tokens, {segments} segments. "
            f"The weights were not changed. Lower {', or '.join(settings)}. "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'})"
        ) from error


def check_finite(row: Row, losses: Sequence[float], shares: Sequence[Share]) -> None:
    """Raise `TrainingError` if the loss or the gradient of a window is not finite, on every rank alike."""
    wrong = [name for name in ("loss", "gradient_norm") if not math.isfinite(row[name])]
    if not wrong:
        return
    bad = [share for share, loss in zip(shares, losses, strict=True) if not math.isfinite(loss)]
    where = "" if bad else "a window whose losses are finite on this rank, with "
    raise TrainingError(
        f"update {row['update']:.0f}: {', '.join(f'{name} is {row[name]}' for name in wrong)} in {where}"
        f"{_records(bad or shares)}. "
        "The weights were not changed. Look at these records, or lower this stage's learning_rate"
    )


def _records(shares: Sequence[Share]) -> str:
    names = [name for share in shares for name in share.batch.record_ids]
    more = f" and {len(names) - _NAMED_RECORDS} more" if len(names) > _NAMED_RECORDS else ""
    return f"record{'s' * (len(names) > 1)} {', '.join(names[:_NAMED_RECORDS])}{more}"


def _is_about_memory(error: BaseException) -> bool:
    """PyTorch has an exception for CUDA only; the CPU's allocator and libraries say it in words."""
    signs = ("can't allocate memory", "out of memory", "alloc_failed")
    words = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in words for sign in signs)
