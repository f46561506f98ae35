"""The latent forward against its definition, in float64 on ragged records (3, 1, 2 and 0 segments)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from valr_ops.data.batching import IGNORED, Batch, collate
from valr_ops.model.latents import LatentOutput, SlotLayoutError, forward
from valr_ops.model.qwen import ModelError, freeze_tower, input_embeddings, rope_positions
from valr_ops.recipe.recipe import LatentRecipe, RecipeError

OUTSIDE = LatentRecipe(slots=4)


def make_batch(latents: LatentRecipe | None = OUTSIDE, pick: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    sequences = tiny.sequences()
    return collate([sequences[index] for index in pick], tiny.images(), tiny.processor(), latents=latents)


@pytest.fixture(scope="module")
def model() -> Any:
    return freeze_tower(tiny.model(seed=1, dtype=torch.float64))


def gradient(model: Any, output: LatentOutput) -> Tensor:
    """One vector: the gradient of cross-entropy plus something that depends on the block states."""
    loss = output.loss_sum + (0.0 if output.states is None else output.states.square().sum())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = torch.autograd.grad(loss, parameters)
    assert all(bool(torch.isfinite(part).all()) for part in parts)
    return torch.cat([part.flatten() for part in parts])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def loss_of_row(model: Any, batch: Batch, row: int) -> float:
    only = torch.arange(len(batch.labels))[:, None] == row
    with torch.no_grad():
        return forward(model, replace(batch, labels=batch.labels.where(only, IGNORED))).loss_sum.item()


@pytest.mark.parametrize("feedback", ["full", "cut"])
@pytest.mark.parametrize(("slots", "block"), [(OUTSIDE, 0), (LatentRecipe(slots=4, control_tokens="inside"), 2)])
def test_sequential_has_the_loss_states_and_gradients_of_the_growing_prefix(
    model: Any, feedback: str, slots: LatentRecipe, block: int
) -> None:
    batch = make_batch(slots)
    wanted = forward(model, batch, method="reference", feedback=feedback, block=block)
    found = forward(model, batch, method="sequential", feedback=feedback, block=block)
    assert found.token_count == wanted.token_count == int((batch.labels != IGNORED).sum())
    assert abs((found.loss_sum - wanted.loss_sum).item()) < 1e-10
    assert wanted.states is not None and found.states is not None
    assert found.states.shape == (6, slots.fed_slots, 32)
    assert torch.allclose(found.states, wanted.states, atol=1e-10)
    assert torch.allclose(found.slot_inputs, wanted.slot_inputs, atol=1e-10)
    assert relative(gradient(model, found), gradient(model, wanted)) < 1e-6


def test_float32_agrees_with_float64(model: Any) -> None:
    batch = make_batch()
    found = forward(tiny.model(seed=1), batch).loss_sum
    assert found.item() == pytest.approx(forward(model, batch).loss_sum.item(), rel=1e-5)


def test_neighbours_order_and_padding_do_not_change_a_records_loss(model: Any) -> None:
    together = make_batch()
    alone = [loss_of_row(model, make_batch(pick=(row,)), 0) for row in range(4)]
    assert [loss_of_row(model, together, row) for row in range(4)] == pytest.approx(alone, abs=1e-10)
    assert loss_of_row(model, make_batch(pick=(3, 0, 2)), 1) == pytest.approx(alone[0], abs=1e-10)
    wide = replace(together, slot_mask=torch.nn.functional.pad(together.slot_mask, (0, 9)))
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED), ("mm_token_type_ids", 0)):
        wide = replace(wide, **{name: torch.nn.functional.pad(getattr(together, name), (0, 9), value=value)})
    assert loss_of_row(model, wide, 2) == pytest.approx(alone[2], abs=1e-10)


def test_cut_is_one_parallel_pass_with_the_latents_as_constants(model: Any) -> None:
    batch = make_batch()
    cut = forward(model, batch, feedback="cut")
    inputs = input_embeddings(model, batch)
    inputs = inputs.masked_scatter(batch.slot_mask[..., None], cut.slot_inputs)
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=batch.attention_mask,
        position_ids=rope_positions(model, batch),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")
    assert abs((loss - cut.loss_sum).item()) < 1e-10
    two_pass = replace(cut, loss_sum=loss)
    found = gradient(model, cut)
    assert relative(found, gradient(model, two_pass)) < 1e-10
    assert relative(found, gradient(model, forward(model, batch, feedback="full"))) > 0.01


def test_without_slots_it_is_the_stock_model(model: Any) -> None:
    batch = make_batch(latents=None)
    stock = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        pixel_values=batch.pixel_values.double() if batch.pixel_values is not None else None,
        image_grid_thw=batch.image_grid_thw,
        mm_token_type_ids=batch.mm_token_type_ids,
    )
    output = forward(model, batch, block=1)
    assert output.loss_sum.item() / output.token_count == pytest.approx(stock.loss.item(), rel=1e-6)
    assert output.states is None
    assert output.slot_inputs.shape == (0, 0, 32)
    assert output.norm_ratio == 0.0


def test_every_trainable_parameter_gets_a_finite_gradient_and_the_tower_none(model: Any) -> None:
    model.zero_grad()
    output = forward(model, make_batch(), block=1)
    output.loss_sum.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("model.visual"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
            assert bool(parameter.grad.any()), name
    model.zero_grad()
    assert output.norm_ratio > 0.0


def test_the_slot_tokens_own_embedding_is_never_used(model: Any) -> None:
    batch = make_batch()
    before = forward(model, batch).loss_sum
    table = model.get_input_embeddings().weight
    kept = table.detach().clone()
    with torch.no_grad():
        table[tiny.control().latent_pad] += 100.0
        after = forward(model, batch).loss_sum
        table.copy_(kept)
    assert after.item() == before.item()


def test_checkpointing_the_text_changes_nothing(model: Any) -> None:
    batch = make_batch()
    plain = forward(model, batch, block=1)
    wanted = gradient(model, plain)
    model.activation_checkpointing_enable()
    try:
        assert model.model.language_model.gradient_checkpointing
        checkpointed = forward(model, batch, block=1)
        assert checkpointed.loss_sum.item() == plain.loss_sum.item()
        assert relative(gradient(model, checkpointed), wanted) < 1e-12
    finally:
        model.activation_checkpointing_disable()


def test_an_unknown_method_feedback_or_block_is_refused_by_the_recipes_field_name(model: Any) -> None:
    batch = make_batch(pick=(1,))
    with pytest.raises(RecipeError, match=r"latents\.method='parallel'"):
        forward(model, batch, method="parallel")
    with pytest.raises(RecipeError, match=r"latents\.feedback_gradient='hops:3'"):
        forward(model, batch, feedback="hops:3")
    with pytest.raises(ModelError, match=r"alignment\.block=3 but this model has blocks 0\.\.2"):
        forward(model, batch, block=3)


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: {"segment_starts": batch.segment_starts + 1},
        lambda batch: {"segment_rows": batch.segment_rows[:-1], "segment_starts": batch.segment_starts[:-1]},
        lambda batch: {"slot_mask": batch.slot_mask & (batch.slot_mask.cumsum(1) != 3)},
    ],
    ids=["shifted", "forgotten", "shortened"],
)
def test_slots_that_are_no_equal_segments_are_refused(model: Any, change: Any) -> None:
    batch = make_batch()
    with pytest.raises(SlotLayoutError, match="build the batch with collate"):
        forward(model, replace(batch, **change(batch)))
