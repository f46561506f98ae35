"""The latent forward against its definition, in float64 on ragged records (3, 1, 2 and 0 segments)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from valr_ops.data.batching import IGNORED, Batch, collate
from valr_ops.model import latents, packing
from valr_ops.model.blocks import attend
from valr_ops.model.deferred import DeferredError
from valr_ops.model.latents import LatentOutput, check_packing, forward, roll_out
from valr_ops.model.layout import SlotLayoutError
from valr_ops.model.packing import Pack, PackingError
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
    loss, _ = output.feedback(output.loss_sum + (0.0 if output.states is None else output.states.square().sum()))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = torch.autograd.grad(loss, parameters)
    assert all(bool(torch.isfinite(part).all()) for part in parts)
    return torch.cat([part.flatten() for part in parts])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def loss_of_row(model: Any, batch: Batch, row: int, method: str) -> float:
    only = torch.arange(len(batch.labels))[:, None] == row
    with torch.no_grad():
        return forward(model, replace(batch, labels=batch.labels.where(only, IGNORED)), method=method).loss_sum.item()


LAYOUTS = {
    "one slot": LatentRecipe(slots=1),
    "outside": OUTSIDE,
    "inside": LatentRecipe(slots=4, control_tokens="inside"),
    "64 slots": LatentRecipe(slots=64),
}


@pytest.mark.parametrize("feedback", ["full", "cut"])
@pytest.mark.parametrize("method", ["sequential", "two_pass"])
@pytest.mark.parametrize(("layout", "block"), [("one slot", 1), ("outside", 0), ("inside", 2)])
def test_losses_states_and_gradients_are_those_of_the_growing_prefix(
    model: Any, method: str, feedback: str, layout: str, block: int
) -> None:
    batch = make_batch(LAYOUTS[layout])
    wanted = forward(model, batch, method="reference", feedback=feedback, block=block)
    found = forward(model, batch, method=method, feedback=feedback, block=block)
    assert found.token_count == wanted.token_count == int((batch.labels != IGNORED).sum())
    assert abs((found.loss_sum - wanted.loss_sum).item()) < 1e-10
    assert wanted.states is not None and found.states is not None
    assert found.states.shape == (6, LAYOUTS[layout].fed_slots, 32)
    assert torch.allclose(found.states, wanted.states, atol=1e-10)
    assert torch.allclose(found.slot_inputs, wanted.slot_inputs, atol=1e-10)
    assert found.effective_rank == pytest.approx(wanted.effective_rank, rel=1e-4)
    assert relative(gradient(model, found), gradient(model, wanted)) < 1e-6


@pytest.mark.parametrize("method", ["sequential", "two_pass"])
def test_segments_of_64_slots_have_the_loss_of_the_growing_prefix(model: Any, method: str) -> None:
    batch = make_batch(LAYOUTS["64 slots"], pick=(1,))
    with torch.no_grad():
        wanted = forward(model, batch, method="reference").loss_sum
        assert abs((forward(model, batch, method=method).loss_sum - wanted).item()) < 1e-10


@pytest.mark.parametrize("method", ["sequential", "two_pass"])
def test_images_videos_and_text_stand_in_one_batch(model: Any, method: str) -> None:
    batch = tiny.video_batch()
    wanted = forward(model, batch, method="reference", block=1)
    found = forward(model, batch, method=method, block=1)
    assert abs((found.loss_sum - wanted.loss_sum).item()) < 1e-10
    assert relative(gradient(model, found), gradient(model, wanted)) < 1e-6


def test_the_gradients_error_falls_with_every_hop_to_nothing_at_all_slots(model: Any) -> None:
    batch = make_batch()
    wanted = gradient(model, forward(model, batch, method="reference", block=1))
    loss = forward(model, batch, method="reference").loss_sum.item()
    errors, residuals = [], []
    for hops in (0, 1, 2, 4, 8, 12):
        feedback = f"hops:{hops}" if hops else "cut"
        output = forward(model, batch, method="two_pass", feedback=feedback, block=1)
        assert output.states is not None
        total = output.loss_sum + output.states.square().sum()
        minimised, figures = output.feedback(total)
        assert minimised.item() == total.item()
        assert abs(output.loss_sum.item() - loss) < 1e-10
        assert figures.hops == hops
        errors.append(relative(gradient(model, output), wanted))
        residuals.append(figures.residual)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[3] < 0.1 and errors[-1] < 1e-6
    assert residuals[1] == 1.0 and residuals[1:] == sorted(residuals[1:], reverse=True)


def test_a_window_is_rolled_out_as_its_batches_are_one_by_one(model: Any) -> None:
    picks = ((0, 1), (3,), (2, 3, 1), (0,))
    batches = [make_batch(pick=pick) for pick in picks]
    for batch, rollout in zip(batches, roll_out(model, batches), strict=True):
        alone = forward(model, batch, method="reference")
        assert len(rollout.slot_inputs) == len(alone.slot_inputs)
        assert torch.allclose(rollout.slot_inputs.flatten(), alone.slot_inputs.flatten(), atol=1e-10)
        together = forward(model, batch, method="two_pass", rollout=rollout)
        assert abs((together.loss_sum - alone.loss_sum).item()) < 1e-10
        assert together.drift < 1e-10


def test_a_window_of_unequal_slots_is_refused(model: Any) -> None:
    with pytest.raises(SlotLayoutError, match=r"\[1, 4\] slots"):
        roll_out(model, [make_batch(), make_batch(LAYOUTS["one slot"])])


def test_a_stale_roll_out_shows_as_drift(model: Any) -> None:
    batch = make_batch()
    (rollout,) = roll_out(model, [batch])
    stale = replace(rollout, slot_inputs=rollout.slot_inputs * 1.01)
    assert forward(model, batch, method="two_pass", rollout=stale).drift > 1e-4


def test_a_second_backward_through_the_same_graph_adds_nothing_of_the_first(model: Any) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output = forward(model, make_batch(), method="sequential")
    first, second = (torch.autograd.grad(output.loss_sum, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_packed_records_do_not_see_each_other_and_a_leak_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch()
    check_packing(model, batch)

    def attend_to_everyone(self: Pack, layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(layer, query, key, value)

    monkeypatch.setattr(Pack, "attend_heads", attend_to_everyone)
    with pytest.raises(PackingError, match="tiny/three, tiny/one, tiny/two, tiny/none"):
        check_packing(model, batch)


def test_float32_agrees_with_float64(model: Any) -> None:
    batch = make_batch()
    found = forward(tiny.model(seed=1), batch).loss_sum
    assert found.item() == pytest.approx(forward(model, batch).loss_sum.item(), rel=1e-5)


def test_a_leak_between_later_records_is_found_as_well(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = packing.pack

    def one_boundary_forgotten(attention_mask: Tensor, slot_mask: Tensor) -> Pack:
        packed = exact(attention_mask, slot_mask)
        first, second, third, *rest = packed.heads
        return replace(packed, heads=[first, second + third, *rest], tails=[0] * (len(rest) + 2))

    monkeypatch.setattr(latents, "pack", one_boundary_forgotten)
    with pytest.raises(PackingError):
        check_packing(model, make_batch(latents=None))


def test_states_that_are_not_finite_reach_the_loss_instead_of_breaking_a_figure() -> None:
    broken = tiny.model(seed=1)
    with torch.no_grad():
        broken.model.language_model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    output = forward(broken, make_batch(), method="two_pass")
    loss, figures = output.feedback(output.loss_sum)
    assert loss.isnan() and figures.hops == 1
    assert math.isnan(output.effective_rank)


def test_the_effective_rank_is_that_of_float32_under_autocast() -> None:
    single, batch = tiny.model(seed=1), make_batch()
    (rollout,) = latents.roll_out(single, [batch])
    wanted = forward(single, batch, method="two_pass", rollout=rollout).effective_rank
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(single, batch, method="two_pass", rollout=rollout).effective_rank == pytest.approx(wanted)


def test_dropout_in_attention_and_adapters_in_single_slots_are_refused(model: Any) -> None:
    trained, batch = tiny.model(seed=1).train(), make_batch()
    config = trained.model.language_model.config
    config.attention_dropout = 0.1
    with pytest.raises(RecipeError, match=r"attention_dropout=0\.1"):
        forward(trained, batch)
    config.attention_dropout = 0.0

    class Adapted(torch.nn.Linear):
        pass

    layer = trained.model.language_model.layers[1]
    adapted = Adapted(32, 48, bias=False)
    layer.mlp.up_proj = adapted
    with pytest.raises(DeferredError, match=r"Adapted.*set latents\.method to two_pass"):
        forward(trained, batch, method="sequential")
    assert forward(trained, batch, method="two_pass").loss_sum.isfinite()


@pytest.mark.parametrize("method", ["sequential", "two_pass"])
def test_neighbours_order_and_padding_do_not_change_a_records_loss(model: Any, method: str) -> None:
    together = make_batch()
    alone = [loss_of_row(model, make_batch(pick=(row,)), 0, method) for row in range(4)]
    assert [loss_of_row(model, together, row, method) for row in range(4)] == pytest.approx(alone, abs=1e-10)
    assert loss_of_row(model, make_batch(pick=(3, 0, 2)), 1, method) == pytest.approx(alone[0], abs=1e-10)
    wide = replace(together, slot_mask=torch.nn.functional.pad(together.slot_mask, (0, 9)))
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED), ("mm_token_type_ids", 0)):
        wide = replace(wide, **{name: torch.nn.functional.pad(getattr(together, name), (0, 9), value=value)})
    assert loss_of_row(model, wide, 2, method) == pytest.approx(alone[2], abs=1e-10)


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


@pytest.mark.parametrize("method", ["sequential", "two_pass"])
def test_checkpointing_changes_nothing(model: Any, method: str) -> None:
    batch = make_batch()
    plain = forward(model, batch, method=method, block=1)
    wanted = gradient(model, plain)
    model.activation_checkpointing_enable()
    try:
        assert model.model.language_model.gradient_checkpointing
        checkpointed = forward(model, batch, method=method, block=1)
        assert checkpointed.loss_sum.item() == plain.loss_sum.item()
        assert relative(gradient(model, checkpointed), wanted) < 1e-12
    finally:
        model.activation_checkpointing_disable()


def test_an_unknown_method_feedback_or_block_is_refused_by_the_recipes_field_name(model: Any) -> None:
    batch = make_batch(pick=(1,))
    with pytest.raises(RecipeError, match=r"latents\.method='parallel'"):
        forward(model, batch, method="parallel")
    with pytest.raises(RecipeError, match=r"latents\.feedback_gradient='hops:3' is not available.*'two_pass'"):
        forward(model, batch, method="sequential", feedback="hops:3")
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
