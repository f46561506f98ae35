"""What a trained model says, and what can be read inside it, while its latents are as they are or something else.

In: a model of one arm, pictures, and what its slots are fed. Out: which steps are right, the attention that steps give
to the picture, and what linear probes read from each block.
Steps are teacher-forced: earlier steps stand as they should have been said. A chain is right where every step is, and
greedy decoding then says exactly that chain.
Always: no gradient; pictures are those of the caller, in his order; a probe is fitted on half of them and scored on
the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from valr_ops.data.batching import Batch
from valr_ops.model.latents import roll_out
from valr_ops.model.qwen import input_embeddings, rope_positions, vision_embeddings
from valr_ops.studies.arms import Arm, pad_rollout
from valr_ops.studies.tiles import CLASSES, CORNERS, Layout, Pictures
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402

Condition = Literal["normal", "zeroed", "noised", "other", "first", "markers"]
CONDITIONS: tuple[Condition, ...] = ("normal", "zeroed", "noised", "other", "first", "markers")
"""What slots are fed: the model's own states; zeros; noise of the same norms; the states of the picture before; of each
segment the first state at every slot. At `markers` there are no slots, the control tokens stand alone."""

_AT_ONCE = 128
_RIDGE = 1e-2


@dataclass(frozen=True)
class Subject:
    """A trained model, and how its arm writes."""

    model: Qwen2_5_VLForConditionalGeneration
    layout: Layout
    arm: Arm

    def __post_init__(self) -> None:
        # Only the plain implementation shows its attention; the others agree with it within rounding.
        self.model.set_attn_implementation("eager")


@dataclass(frozen=True)
class Seen:
    """One pass over n pictures with trails of T steps."""

    right: npt.NDArray[np.bool_]
    """[n, T]: whether a step says what stands in the asked cell."""
    image_attention: npt.NDArray[np.float64]
    """[n, T]: share of its attention that the position which writes a step's word gives to the picture; mean over
    blocks and heads."""
    at_step: Tensor
    """[n, T, blocks + 1, hidden]: states at that position; the first of the blocks is the embedding."""
    at_slots: Tensor | None
    """[n, T, K, blocks + 1, hidden]: states at the slots; None without."""


def look(
    subject: Subject,
    pictures: Pictures,
    condition: Condition = "normal",
    *,
    before: Sequence[int] | None = None,
    seed: int = 0,
) -> Seen:
    """The model's pass over `pictures`.

    Args:
        before: how many segments stand before each step; as many as in training by default.
        seed: of the noise.
    """
    parts = []
    for start in range(0, len(pictures), _AT_ONCE):
        parts.append(_look(subject, pictures[start : start + _AT_ONCE], condition, before, (seed, start)))
    slots = [part.at_slots for part in parts if part.at_slots is not None]
    return Seen(
        np.concatenate([part.right for part in parts]),
        np.concatenate([part.image_attention for part in parts]),
        torch.cat([part.at_step for part in parts]),
        torch.cat(slots) if slots else None,
    )


@torch.no_grad()
def _look(
    subject: Subject, pictures: Pictures, condition: Condition, before: Sequence[int] | None, seed: Sequence[int]
) -> Seen:
    model, layout, arm = subject.model, subject.layout, subject.arm
    slots = 0 if condition == "markers" and arm.slots else arm.slots
    batch = layout.batch(pictures, slots, before).to(model.device)
    vision = vision_embeddings(model, batch)
    inputs = input_embeddings(model, batch, vision)
    if slots and len(batch.segment_rows):
        rollout = roll_out(model, [batch])[0] if arm.fed == "states" else pad_rollout(model, batch)
        inputs[batch.slot_mask] = _fed(rollout.slot_inputs, batch, condition, seed).flatten(0, 1)
    seen = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=batch.attention_mask,
        position_ids=rope_positions(model, batch),
        use_cache=False,
        output_hidden_states=True,
        output_attentions=True,
    )
    count, steps = pictures.answers.shape
    writing = layout.writing(batch)
    said = model.lm_head(seen.last_hidden_state[writing]).argmax(-1).cpu()
    asked = batch.input_ids.cpu()[:, 1:][writing.cpu()[:, :-1]]
    image = batch.mm_token_type_ids == 1
    looked = sum((weights.mean(1) * image[:, None]).sum(-1) for weights in seen.attentions) / len(seen.attentions)
    states = torch.stack(seen.hidden_states, dim=2)
    at_slots = None
    if slots and len(batch.segment_rows) == count * steps:
        at_slots = states[batch.slot_mask].unflatten(0, (count, steps, slots)).cpu()
    return Seen(
        (said == asked).view(count, steps).numpy(),
        looked[writing].view(count, steps).double().cpu().numpy(),
        states[writing].unflatten(0, (count, steps)).cpu(),
        at_slots,
    )


def _fed(states: Tensor, batch: Batch, condition: Condition, seed: Sequence[int]) -> Tensor:
    """[S, K, hidden]: what the slots are fed under `condition`, where the model by itself has `states`."""
    match condition:
        case "zeroed":
            return torch.zeros_like(states)
        case "noised":
            noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(states.shape)).to(states)
            return noise * (states.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        case "other":
            return states.roll(len(states) // len(batch.input_ids), 0)
        case "first":
            return states[:, :1].expand_as(states)
        case _:
            return states


def step_probe(seen: Seen, pictures: Pictures) -> list[float]:
    """By block, the share of held-out steps whose asked class a linear map reads at the position that writes it."""
    return [
        _read(states.flatten(0, 1), torch.from_numpy(pictures.answers).flatten()) for states in seen.at_step.unbind(2)
    ]


def slot_probe(seen: Seen, pictures: Pictures) -> list[float]:
    """By block, the share of cells of the steps' tiles whose class a linear map reads from all K slots before the step.

    The mean over the four cells of a tile, each with a map of its own.
    """
    assert seen.at_slots is not None, "the arm has no slots"
    shown = torch.from_numpy(pictures.met).flatten(0, 1)
    return [
        float(np.mean([_read(states.flatten(0, 1).flatten(1), shown[:, corner]) for corner in range(CORNERS)]))
        for states in seen.at_slots.unbind(3)
    ]


def _read(states: Tensor, classes: Tensor) -> float:
    """Ridge regression onto the classes, fitted on the first half of the rows, scored on the second."""
    half = len(states) // 2
    states = states.double()
    mean, spread = states[:half].mean(0), states[:half].std(0).clamp(min=1e-6)
    inputs = torch.cat([(states - mean) / spread, states.new_ones(len(states), 1)], dim=1)
    wanted = torch.nn.functional.one_hot(classes[:half], CLASSES).to(inputs)
    gram = inputs[:half].T @ inputs[:half]
    weights = torch.linalg.solve(
        gram + _RIDGE * half * torch.eye(len(gram), dtype=gram.dtype), inputs[:half].T @ wanted
    )
    return float(((inputs[half:] @ weights).argmax(1) == classes[half:]).double().mean())
