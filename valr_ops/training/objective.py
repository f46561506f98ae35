"""What is minimised: the cross-entropy of the text, and minus the cosine of the latents to the teachers' features.

In: a micro-batch with its teacher features, and the counts of the window that it is a part of. Out: its share of

    loss of a window = sum CE / supervised tokens  -  weight * mean over teachers (sum cosine / aligned segments)

and the sums behind it. Always: counts are those of the whole window on all ranks, so that micro-batch, accumulation and
number of processes change nothing (the paper, section 3.3, gives the sum and is silent on its normalisation).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from valr_ops.data.batching import Batch
from valr_ops.model import latents
from valr_ops.model.alignment import Projectors, alignment_loss
from valr_ops.recipe.cost import Shape, shape_of
from valr_ops.recipe.recipe import Recipe
from valr_ops.torchvision_guard import ensure_torchvision
from valr_ops.training.engine import Ranks
from valr_ops.training.log import Row
from valr_ops.training.windows import Features, Share

ensure_torchvision()

from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402

Sums = dict[str, tuple[float, int]]
"""By column of the log: a sum over tokens or segments of a micro-batch, and their number."""

_HEALTH = ("latent_norm_ratio", "effective_rank", "feedback_residual")


@dataclass(frozen=True)
class Figures:
    """What a micro-batch adds to the row of its update."""

    sums: Sums
    slot_drift: float
    """Largest difference between a rolled-out state and what the forward computes there, over the largest state."""


@dataclass(frozen=True)
class Counts:
    """What a window's sums are divided by, all ranks together."""

    supervised_tokens: float
    aligned_segments: float
    positions: float
    """Tokens and slots that the decoder reads, padding not counted."""
    flops: float
    """Model FLOPs of forward and backward, by the conventions of `recipe.cost`."""

    @classmethod
    def of(cls, shares: Iterable[Share], model: Shape, ranks: Ranks) -> Counts:
        """The counts of all ranks' `shares`."""
        rows = [
            (share.supervised_tokens, share.aligned_segments, share.positions, share.flops(model)) for share in shares
        ]
        return cls(*ranks.sum([sum(column) for column in zip((0, 0, 0, 0), *rows)]))


class Objective(nn.Module):
    """What is minimised: the trained model, the projectors, and the loss of a micro-batch.

    Args:
        projectors: one a teacher; None trains on cross-entropy alone (lambda 0, or stage 1).
    """

    def __init__(
        self, model: Qwen2_5_VLForConditionalGeneration, projectors: Projectors | None, recipe: Recipe
    ) -> None:
        super().__init__()
        self.model, self.projectors = model, projectors
        self._latents, self._alignment = recipe.latents, recipe.alignment
        self.teachers = [] if projectors is None else list(projectors)
        self.shape = shape_of(model.config)
        """What the model's FLOPs are computed from."""

    def roll_out(self, batches: Sequence[Batch]) -> list[latents.Rollout] | list[None]:
        """What `forward` needs beside each of a window's `batches`: their slots, decoded together without gradient."""
        if self._latents.method != "two_pass" or not any(batch.targets for batch in batches):
            return [None] * len(batches)
        return latents.roll_out(self.model, batches)

    def forward(
        self, batch: Batch, features: Features, counts: Counts, rollout: latents.Rollout | None
    ) -> tuple[Tensor, Figures]:
        """A micro-batch's share of the window's loss, a scalar with graph, and the figures behind it."""
        output = latents.forward(
            self.model,
            batch,
            method=self._latents.method,
            feedback=self._latents.feedback_gradient,
            block=None if self.projectors is None else self._alignment.block,
            rollout=rollout,
        )
        loss = output.loss_sum / max(counts.supervised_tokens, 1)
        segments = len(batch.targets)
        sums: Sums = {"ce": (output.loss_sum.item(), output.token_count)}
        if self.projectors is not None:
            aligned = alignment_loss(
                self.projectors, output.states, features, batch.targets, upsample=self._alignment.upsample
            )
            in_window = dict.fromkeys(self.teachers, max(int(counts.aligned_segments), 1))
            loss = loss + self._alignment.weight * aligned.loss(in_window)
            for teacher, part in aligned.teachers.items():
                sums[f"alignment/{teacher}"] = (-part.loss_sum.item(), part.segments)
                sums[f"control/{teacher}"] = (part.control_sum, part.control_segments)
        loss, feedback = output.feedback(loss)
        for name, value in zip(_HEALTH, (output.norm_ratio, output.effective_rank, feedback.residual), strict=True):
            sums[name] = (value * segments, segments)
        largest = float(output.slot_inputs.abs().max()) if segments else 0.0
        return loss, Figures(sums, output.drift / largest if largest else 0.0)

    def means(self, figures: Sequence[Figures], ranks: Ranks) -> Row:
        """The loss and the sums over micro-batches and ranks divided by their counts; 0 where nothing was counted.

        A cosine that was not measured is left out, as 0 would look like a finding: a control needs another image in its
        micro-batch.
        """
        names = ["ce", *(f"{kind}/{t}" for t in self.teachers for kind in ("alignment", "control")), *_HEALTH]
        totals = ranks.sum([sum(one.sums[name][part] for one in figures) for name in names for part in (0, 1)])
        row = {
            name: total / max(count, 1)
            for name, total, count in zip(names, totals[::2], totals[1::2], strict=True)
            if count or "/" not in name
        }
        aligned = [row.get(f"alignment/{teacher}", 0.0) for teacher in self.teachers]
        loss = row["ce"] - self._alignment.weight * sum(aligned) / max(len(aligned), 1)
        drift = ranks.largest(max((one.slot_drift for one in figures), default=0.0))
        return {"loss": loss, **row, "slot_drift": drift}
