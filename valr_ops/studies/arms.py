"""The arms of the studies: what a model may write before a step, and what it is told about the picture in training.

In: an arm, a model, pictures and frozen encoders. Out: the loss of these pictures, through the objective that stage 2
trains with (`valr_ops.training.objective`), and the figures behind it. Arms without latents that get the teacher's
features all the same have them read from other positions of the same block, by the same projector and loss.
Always: arms differ in nothing but what their row in `ARMS` says; pictures, their order and the weights that training
starts from are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valr_ops.data.batching import IGNORED, Batch
from valr_ops.model.alignment import Projectors, upsampling_matrix
from valr_ops.model.latents import Rollout
from valr_ops.model.qwen import input_embeddings, rope_positions, vision_embeddings
from valr_ops.recipe.recipe import Recipe, override
from valr_ops.studies.encoders import Encoder
from valr_ops.studies.tiles import CORNERS, QUESTIONS, Layout, Pictures, along_trail
from valr_ops.torchvision_guard import ensure_torchvision
from valr_ops.training.engine import Ranks
from valr_ops.training.log import Row
from valr_ops.training.objective import Counts, Objective
from valr_ops.training.windows import Share

ensure_torchvision()

from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402

SLOTS = 4
"""K; on the 2 x 2 grid one slot for each cell of a tile."""
_PATCHES = 16
"""Features of a tile, 4 x 4."""

TEACHERS: dict[str, tuple[str, ...]] = {
    "all": tuple(QUESTIONS),
    "colour": ("colour",),
    "form": ("form",),
    "layout": ("layout",),
    "untrained": (),
}
"""What each encoder was taught about cells."""


@dataclass(frozen=True)
class Arm:
    """One way of training on the same pictures."""

    summary: str
    """In words, for tables."""
    slots: int | None = None
    """K; 0 leaves the two control tokens alone, None leaves them out as well."""
    teachers: tuple[str, ...] = ()
    """Whose features are predicted; keys of `TEACHERS`."""
    reads: Literal["slots", "image", "step"] = "slots"
    """Where they are predicted from: the slots before a step, the image positions of its tile, or the position from
    which its word is written."""
    of_another: bool = False
    """The features are those of another picture."""
    fed: Literal["states", "pads"] = "states"
    """What slots are fed: the hidden state before, or the embedding of the pad token."""
    feedback: str = "full"
    """The gradient through fed states, as `LatentRecipe.feedback_gradient` has it; none without feedback."""
    times: int = 1
    """How many times longer than the others it is trained: the cheap arm until it has cost what the dearest did."""


ARMS: dict[str, Arm] = {
    "sft": Arm("text alone", times=2),
    "markers": Arm("control tokens without slots", slots=0),
    "latents": Arm("latents, aligned to nothing", slots=SLOTS),
    "aligned": Arm("latents, aligned", slots=SLOTS, teachers=("all",)),
    "untrained": Arm("latents, aligned to an untrained teacher", slots=SLOTS, teachers=("untrained",)),
    "another": Arm("latents, aligned to another picture", slots=SLOTS, teachers=("all",), of_another=True),
    "pads": Arm("pad tokens in place of latents, aligned", slots=SLOTS, teachers=("all",), fed="pads"),
    "sft_image": Arm("text, features read at the image", teachers=("all",), reads="image"),
    "sft_step": Arm("text, features read at the step", teachers=("all",), reads="step"),
    "colour": Arm("aligned to colour", slots=SLOTS, teachers=("colour",)),
    "form": Arm("aligned to form", slots=SLOTS, teachers=("form",)),
    "colour_form": Arm("aligned to colour and form", slots=SLOTS, teachers=("colour", "form")),
    "three": Arm("aligned to colour, form and layout", slots=SLOTS, teachers=("colour", "form", "layout")),
    "cut": Arm("aligned, feedback gradient cut", slots=SLOTS, teachers=("all",), feedback="cut"),
    "hops_1": Arm("aligned, 1 hop", slots=SLOTS, teachers=("all",), feedback="hops:1"),
    "hops_2": Arm("aligned, 2 hops", slots=SLOTS, teachers=("all",), feedback="hops:2"),
    "hops_4": Arm("aligned, 4 hops", slots=SLOTS, teachers=("all",), feedback="hops:4"),
}


class ArmLoss(nn.Module):
    """An arm's loss on a model, with the projectors that it trains beside it.

    Args:
        recipe: whose `alignment` gives block, weight and upsample.
    """

    def __init__(
        self,
        arm: Arm,
        model: Qwen2_5_VLForConditionalGeneration,
        teachers: Mapping[str, Encoder],
        layout: Layout,
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self._arm, self._model, self._layout, self._recipe = arm, model, layout, _recipe_of(arm, recipe)
        self._encoders = {name: teachers[name] for name in arm.teachers}
        self.projectors = None
        if arm.teachers:
            at_once = _PATCHES if arm.reads == "step" else 1
            widths = {name: at_once * encoder.dim for name, encoder in self._encoders.items()}
            self.projectors = Projectors(widths, model.lm_head.in_features, self._recipe.alignment)
        through_slots = self.projectors if arm.reads == "slots" else None
        self._objective = Objective(model, through_slots, self._recipe)

    def forward(self, pictures: Pictures) -> tuple[Tensor, Row]:
        """The mean loss of `pictures`, a scalar with graph, and what it is made of."""
        batch = self._layout.batch(pictures, self._arm.slots).to(self._model.device)
        targets = self._targets(pictures)
        if self._arm.reads != "slots":
            return self._read_elsewhere(batch, targets, pictures)
        share = Share(batch, {name: list(features) for name, features in targets.items()})
        alone = Ranks(0, 1, torch.device("cpu"))
        counts = Counts.of([share], self._objective.shape, alone)
        loss, figures = self._objective(batch, share.features, counts, self._rollout(batch))
        return loss, self._objective.means([figures], alone)

    @torch.no_grad()
    def _targets(self, pictures: Pictures) -> dict[str, Tensor]:
        """By teacher, [n * steps, 4, 4, D]: the features of the tile that each step is about."""
        found = {}
        for name, encoder in self._encoders.items():
            found[name] = along_trail(encoder(pictures.pixels), pictures)
            if self._arm.of_another:
                found[name] = found[name].roll(pictures.steps, 0)
        return found

    def _rollout(self, batch: Batch) -> Rollout | None:
        if self._arm.fed == "states":
            return self._objective.roll_out([batch])[0] if self._arm.slots else None
        return pad_rollout(self._model, batch)

    def _read_elsewhere(self, batch: Batch, targets: Mapping[str, Tensor], pictures: Pictures) -> tuple[Tensor, Row]:
        """The loss of an arm without latents whose projector reads other positions."""
        assert self.projectors is not None
        seen = self._model.model.language_model(
            inputs_embeds=input_embeddings(self._model, batch),
            attention_mask=batch.attention_mask,
            position_ids=rope_positions(self._model, batch),
            use_cache=False,
            output_hidden_states=True,
        )
        supervised = batch.labels[:, 1:] != IGNORED
        ce = F.cross_entropy(
            self._model.lm_head(seen.last_hidden_state[:, :-1][supervised]), batch.labels[:, 1:][supervised]
        )
        hidden, rows = seen.hidden_states[self._recipe.alignment.block + 1], len(batch.input_ids)
        if self._arm.reads == "image":
            side = math.isqrt(pictures.shown[0].size)
            seen_there = hidden[batch.mm_token_type_ids == 1].view(rows, side, side, -1)
            read = along_trail(seen_there, pictures).flatten(1, 2)
            spread = upsampling_matrix(CORNERS, 4, 4, self._recipe.alignment.upsample).to(read)
        else:
            read, spread = hidden[self._layout.writing(batch)][:, None], hidden.new_ones(1, 1)
        loss, row = ce, {"ce": ce.item()}
        for name, features in targets.items():
            target = features.flatten(1, 2)
            predicted = self.projectors[name](read, spread).view_as(target)
            cosine = F.cosine_similarity(predicted, target, dim=-1).mean()
            loss = loss - self._recipe.alignment.weight * cosine / len(targets)
            other = target.roll(pictures.steps, 0)
            row[f"alignment/{name}"] = cosine.item()
            row[f"control/{name}"] = F.cosine_similarity(predicted.detach(), other, dim=-1).mean().item()
        return loss, {"loss": loss.item(), **row}


def pad_rollout(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Rollout:
    """Slots that are fed what text would be: the pad token's embedding, the same everywhere."""
    vision = vision_embeddings(model, batch)
    fed = input_embeddings(model, batch, vision)[batch.slot_mask]
    return Rollout(vision, rope_positions(model, batch), fed.detach().view(len(batch.segment_rows), -1, fed.shape[-1]))


def _recipe_of(arm: Arm, recipe: Recipe) -> Recipe:
    feedback = "cut" if arm.fed == "pads" else arm.feedback
    values: dict[str, Any] = {
        "latents.slots": arm.slots or SLOTS,
        "latents.control_tokens": "outside",
        "latents.feedback_gradient": feedback,
        # The full gradient is cheapest with the graph of every slot kept.
        "latents.method": "sequential" if feedback == "full" else "two_pass",
    }
    return override(recipe, values)
