"""The tape and the deferred layers against plain autograd in float64, alone and under the whole latent forward."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from valr_ops.data.batching import Batch, collate
from valr_ops.model import latents
from valr_ops.model.deferred import DeferredLinears
from valr_ops.model.latents import LatentOutput, forward
from valr_ops.model.qwen import tiny_model
from valr_ops.model.tape import Tape
from valr_ops.recipe.recipe import LatentRecipe

ROWS, WIDTH, SCALE = 2, 4, 0.5
PLAN = (3, 1, 1, 2, 1, 4)
"""Widths of what is appended in turn; a 1 is a single position that attends through the tape."""
VISIBLE = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 0]]).bool()


def leaves(heads: int, groups: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys and values of all columns, [rows, heads, 12, width]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(ROWS, count, 12, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
        for count in (heads * groups, heads, heads)
    )


def attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """[rows, 1, heads * width]: one position's attention, written out."""
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for one in (key, value))
    weights = (query @ key.transpose(2, 3) * SCALE + bias[:, None, None]).softmax(dim=3)
    return (weights @ value).transpose(1, 2).flatten(2)


def walk(given: tuple[Tensor, ...], tape: Tape | None) -> list[Tensor]:
    """What the parts of `PLAN` see: for a run the keys and values before it, for a position its attention.

    Each output goes into the keys that follow, so that the order of the backward pass matters.
    """
    query, key, value = given
    bias = torch.zeros(VISIBLE.shape, dtype=torch.float64).masked_fill(~VISIBLE, float("-inf"))
    keys, values, carry, begin = key[:, :, :0], value[:, :, :0], torch.zeros((), dtype=torch.float64), 0
    seen: list[Tensor] = []
    for width in PLAN:
        now = slice(begin, begin + width)
        mine, content = key[:, :, now] + carry, value[:, :, now] * (1 + carry)
        if width == 1:
            own = bias[:, : now.stop].clone()
            own[:, -1] = 0.0
            if tape is None:
                keys, values = torch.cat([keys, mine], dim=2), torch.cat([values, content], dim=2)
                seen.append(attended(query[:, :, now], keys, values, own))
            else:
                seen.append(tape.attend(query[:, :, now], mine, content, own, SCALE))
        else:
            if begin:
                past = (keys, values) if tape is None else tape.read()
                seen.append(torch.cat(past, dim=3).sin())
            if tape is None:
                keys, values = torch.cat([keys, mine], dim=2), torch.cat([values, content], dim=2)
            else:
                tape.write(mine, content)
        carry = seen[-1].square().mean() if seen else carry
        begin += width
    return seen


def new_tape(heads: int) -> Tape:
    return Tape(12, torch.zeros(ROWS, heads, 1, WIDTH, dtype=torch.float64))


def total(parts: list[Tensor]) -> Tensor:
    return torch.stack([(part * (1 + index)).sin().sum() for index, part in enumerate(parts)]).sum()


def equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_a_tape_has_the_values_and_gradients_of_concatenated_keys(heads: int, groups: int) -> None:
    given = leaves(heads, groups)
    found, wanted = walk(given, new_tape(heads)), walk(given, None)
    assert equal(tuple(found), tuple(wanted))
    assert equal(torch.autograd.grad(total(found), given), torch.autograd.grad(total(wanted), given))


def test_a_loss_on_part_of_a_tape_has_its_gradient_too() -> None:
    given = leaves(2, 2)
    for part in range(5):
        found, wanted = (walk(given, tape)[part].sin().sum() for tape in (new_tape(2), None))
        grads = (torch.autograd.grad(one, given, allow_unused=True, materialize_grads=True) for one in (found, wanted))
        assert equal(*grads)


def test_two_tapes_alive_at_once_and_one_used_twice_keep_their_gradients_apart() -> None:
    first, second = leaves(2, 2, seed=1), leaves(2, 2, seed=2)
    wanted = [torch.autograd.grad(total(walk(given, None)), given) for given in (first, second)]
    losses = [total(walk(given, new_tape(2))) for given in (first, second)]
    for _ in range(2):
        assert equal(torch.autograd.grad(losses[0], first, retain_graph=True), wanted[0])
        assert equal(torch.autograd.grad(losses[1], second, retain_graph=True), wanted[1])
    losses = [total(walk(given, new_tape(2))) for given in (first, second)]
    together = torch.autograd.grad(losses[0] + losses[1], (*first, *second))
    assert equal(together, (*wanted[0], *wanted[1]))


def test_queries_alone_may_need_a_gradient() -> None:
    query, key, value = leaves(2, 2)
    key, value = key.detach(), value.detach()
    wanted, found = (total(walk((query, key, value), tape)) for tape in (None, new_tape(2)))
    assert equal(torch.autograd.grad(found, query), torch.autograd.grad(wanted, query))


def linears(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(3, 4, bias=bias).double(), nn.Linear(3, 2, bias=False).double()


def applied_in_turn(layers: tuple[nn.Linear, ...], deferred: bool) -> Tensor:
    """Five applications, each on what the one before returned."""
    together = DeferredLinears(*layers) if deferred else lambda given: tuple(layer(given) for layer in layers)
    given, losses = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 1, 3).requires_grad_(), []
    for _ in range(5):
        outputs = together(given)
        losses.append(torch.cat([one.sin().flatten() for one in outputs]).sum())
        given = given + outputs[0][..., :3].cos()
    return torch.stack(losses).sum()


@pytest.mark.parametrize("frozen", [(), ("0.weight",), ("0.bias",), ("0.weight", "0.bias"), ("1.weight",)])
def test_deferred_layers_have_the_gradients_of_the_plain_ones(frozen: tuple[str, ...]) -> None:
    layers = linears()
    named = {f"{at}.{name}": one for at, layer in enumerate(layers) for name, one in layer.named_parameters()}
    for name in frozen:
        named[name].requires_grad_(False)
    trained = [one for one in named.values() if one.requires_grad]
    found, wanted = (applied_in_turn(layers, deferred) for deferred in (True, False))
    assert torch.allclose(found, wanted, atol=1e-12)
    assert equal(torch.autograd.grad(found, trained), torch.autograd.grad(wanted, trained))


def test_layers_without_any_trained_weight_pass_the_gradient_on() -> None:
    layer = linears()[0].requires_grad_(False)
    given = torch.ones(2, 1, 3, dtype=torch.float64, requires_grad=True)
    found, wanted = DeferredLinears(layer)(given)[0].sin().sum(), layer(given).sin().sum()
    assert equal(torch.autograd.grad(found, given), torch.autograd.grad(wanted, given))


def test_a_backward_pass_without_the_weights_leaves_nothing_to_the_next() -> None:
    layer, given = linears()[0], torch.ones(2, 1, 3, dtype=torch.float64, requires_grad=True)
    loss = DeferredLinears(layer)(given)[0].sin().sum()
    torch.autograd.grad(loss, given, retain_graph=True)
    wanted = torch.autograd.grad(layer(given).sin().sum(), layer.weight)
    assert equal(torch.autograd.grad(loss, layer.weight), wanted)


def test_a_weight_is_handed_one_gradient_however_often_it_was_applied() -> None:
    layers = linears()
    times: list[str] = []
    layers[0].weight.register_hook(lambda _: times.append("weight"))
    loss = applied_in_turn(layers, deferred=True)
    loss.backward()
    assert times == ["weight"]
    wanted = torch.autograd.grad(applied_in_turn(layers, deferred=False), [layer.weight for layer in layers])
    assert equal(tuple(layer.weight.grad for layer in layers if layer.weight.grad is not None), wanted)


# ------------------------------------------------------------------------------------------ under the latent forward


def make_batch(pick: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    made = tiny.sequences()
    return collate([made[index] for index in pick], tiny.images(), tiny.processor(), latents=LatentRecipe(slots=3))


def make_model(**changes: Any) -> Any:
    widths = tiny.recipe(**{f"base.from_scratch.{name}": value for name, value in changes.items()}).base.from_scratch
    assert widths is not None
    return tiny_model(widths, tiny.processor(), seed=1).double()


def loss_of(output: LatentOutput) -> Tensor:
    assert output.states is not None
    return output.feedback(output.loss_sum + output.states.square().sum())[0]


def gradients(model: Any, batch: Batch, method: str) -> Tensor:
    model.zero_grad()
    loss_of(forward(model, batch, method=method, block=1)).backward()
    grads = [one.grad for one in model.parameters() if one.requires_grad]
    assert grads and all(one is not None for one in grads)
    return torch.cat([one.flatten() for one in grads])


def tie(model: Any) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight


def freeze(*parts: str) -> Callable[[Any], None]:
    """What freezes the parameters whose name holds one of `parts`."""

    def apply(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.requires_grad_(False)

    return apply


CHANGES = {
    "tied embeddings": tie,
    "embeddings and first block frozen": freeze("embed_tokens", "layers.0."),
    "a block in the middle frozen": freeze("layers.1."),
    "last block, norm and head frozen": freeze("layers.2.", "language_model.norm", "lm_head"),
    "keys and values frozen": freeze("k_proj", "v_proj"),
    "all weights but those of the values frozen": lambda model: [
        parameter.requires_grad_("v_proj" in name) for name, parameter in model.named_parameters()
    ],
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", ["sequential", "two_pass"])
@pytest.mark.parametrize("change", CHANGES)
def test_tied_and_frozen_weights_leave_the_others_their_gradient(method: str, change: str, checkpointing: bool) -> None:
    model, batch = make_model(), make_batch()
    CHANGES[change](model)
    wanted = gradients(model, batch, "reference")
    if checkpointing:
        model.activation_checkpointing_enable()
    assert float((gradients(model, batch, method) - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("method", ["sequential", "two_pass"])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_any_number_of_key_value_heads_has_the_gradient_of_the_definition(method: str, key_value_heads: int) -> None:
    model, batch = make_model(attention_heads=4, key_value_heads=key_value_heads), make_batch(pick=(1, 2))
    wanted = gradients(model, batch, "reference")
    assert float((gradients(model, batch, method) - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("method", ["sequential", "two_pass"])
def test_two_forwards_before_their_backward_add_up(method: str) -> None:
    model, picks = make_model(), ((0, 3), (2, 1))
    batches = [make_batch(pick) for pick in picks]
    wanted = torch.stack([gradients(model, batch, method) for batch in batches]).sum(0)
    outputs = [forward(model, batch, method=method, block=1) for batch in batches]
    model.zero_grad()
    for output in outputs:
        loss_of(output).backward()
    found = torch.cat([one.grad.flatten() for one in model.parameters() if one.requires_grad])
    assert torch.allclose(found, wanted, atol=1e-10)


def test_a_roll_out_serves_any_number_of_forwards() -> None:
    model, batch = make_model(), make_batch()
    (rollout,) = latents.roll_out(model, [batch])
    kept = rollout.slot_inputs.clone()
    wanted = gradients(model, batch, "two_pass")
    for _ in range(2):
        model.zero_grad()
        loss_of(forward(model, batch, method="two_pass", block=1, rollout=rollout)).backward()
        found = torch.cat([one.grad.flatten() for one in model.parameters() if one.requires_grad])
        assert torch.allclose(found, wanted, atol=1e-10)
    assert torch.equal(rollout.slot_inputs, kept) and not rollout.slot_inputs.requires_grad


@pytest.mark.parametrize("method", ["sequential", "two_pass"])
def test_half_precision_has_the_loss_and_roughly_the_gradient_of_the_full(method: str) -> None:
    exact, batch = make_model(), make_batch()
    wanted = gradients(exact, batch, method)
    half = make_model().bfloat16()
    output = forward(half, batch, method=method, block=1)
    assert output.loss_sum.dtype == torch.float32
    assert output.loss_sum.item() == pytest.approx(forward(exact, batch, method=method).loss_sum.item(), rel=2e-3)
    found = gradients(half, batch, method).double()
    assert float((found - wanted).norm() / wanted.norm()) < 0.2


def tensors_alive() -> int:
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("backward", [True, False], ids=["after backward", "without backward"])
def test_a_forward_leaves_nothing_behind(backward: bool, checkpointing: bool) -> None:
    """Freed at once, not when the garbage collector comes by: until then memory of a GPU would be lost."""
    model, batch = make_model(), make_batch()
    alive: list[int] = []
    if checkpointing:
        model.activation_checkpointing_enable()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            output = forward(model, batch, method="sequential", block=1)
            if backward:
                loss_of(output).backward()
            del output
            model.zero_grad()
            alive.append(tensors_alive())
    finally:
        gc.enable()
    assert alive[0] == alive[1]
