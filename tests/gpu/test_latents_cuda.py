"""The latent forward on a GPU is the one on the CPU, whichever of its implementations and kernels computes it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from valr_ops.data.batching import Batch, collate
from valr_ops.model.cached import CachedDecoder
from valr_ops.model.latents import check_packing, forward, roll_out
from valr_ops.model.qwen import freeze_tower
from valr_ops.recipe.recipe import LatentRecipe

pytestmark = pytest.mark.gpu

EDGES = [
    *((method, feedback) for method in ("reference", "sequential", "two_pass") for feedback in ("full", "cut")),
    ("two_pass", "hops:2"),
]


@dataclass(frozen=True)
class Found:
    """A forward and backward, on the CPU in float64."""

    loss: float
    states: Tensor
    slot_inputs: Tensor
    gradient: dict[str, Tensor]


def batch() -> Batch:
    """Ragged records of 3, 1, 2 and 0 segments, with images."""
    return collate(tiny.sequences(), tiny.images(), tiny.processor(), latents=LatentRecipe(slots=4))


@pytest.fixture(scope="module")
def model() -> Any:
    """In float32, and never changed."""
    return freeze_tower(tiny.model(seed=1))


def there(model: Any, device: str, dtype: torch.dtype = torch.float32, checkpointed: bool = False) -> Any:
    moved = copy.deepcopy(model).to(device, dtype)
    moved.model.language_model.gradient_checkpointing = checkpointed
    return moved


def run(model: Any, given: Batch, method: str, feedback: str, autocast: bool = False) -> Found:
    """Cross-entropy plus something that depends on the block states, through every step that training takes."""
    given = given.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        rollouts: Any = roll_out(model, [given]) if method == "two_pass" else [None]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        output = forward(model, given, method=method, feedback=feedback, block=1, rollout=rollouts[0])
        assert output.states is not None
        loss, _ = output.feedback(output.loss_sum + output.states.square().sum())
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradient = {name: parameter.grad.double().cpu() for name, parameter in trained.items()}
    model.zero_grad(set_to_none=True)
    return Found(output.loss_sum.item(), output.states.detach().cpu(), output.slot_inputs.cpu(), gradient)


def difference(found: Found, wanted: Found) -> float:
    """Of the gradients, relative."""
    assert found.gradient.keys() == wanted.gradient.keys()
    changes = torch.cat([(found.gradient[name] - one).flatten() for name, one in wanted.gradient.items()])
    return float(changes.norm() / torch.cat([one.flatten() for one in wanted.gradient.values()]).norm())


@pytest.mark.parametrize(("method", "feedback"), EDGES)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_losses_states_and_gradients_are_those_of_the_definition_on_the_cpu(
    model: Any, device: str, method: str, feedback: str, dtype: torch.dtype, rounding: float
) -> None:
    definition = "two_pass" if feedback.startswith("hops") else "reference"
    wanted = run(there(model, "cpu", torch.float64), batch(), definition, feedback)
    found = run(there(model, device, dtype), batch(), method, feedback)
    assert found.loss == pytest.approx(wanted.loss, rel=rounding)
    assert found.states.dtype == dtype
    torch.testing.assert_close(found.states.double(), wanted.states, rtol=10 * rounding, atol=rounding)
    torch.testing.assert_close(found.slot_inputs.double(), wanted.slot_inputs, rtol=10 * rounding, atol=10 * rounding)
    # RMSNorm computes in float32 whatever it is given.
    assert difference(found, wanted) < 10 * rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["sequential", "two_pass"])
def test_activation_checkpointing_changes_nothing(model: Any, device: str, method: str, dtype: torch.dtype) -> None:
    feedback = "hops:2" if method == "two_pass" else "full"
    wanted = run(there(model, device, dtype), batch(), method, feedback)
    found = run(there(model, device, dtype, checkpointed=True), batch(), method, feedback)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert difference(found, wanted) < 1e-5


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("method", "feedback"), [("sequential", "full"), ("two_pass", "full"), ("two_pass", "hops:2")])
def test_bfloat16_products_give_every_parameter_nearly_the_gradient_of_float32(
    model: Any, device: str, method: str, feedback: str, checkpointed: bool
) -> None:
    """A weight that autocast remembers from a part without gradient gets none: its cosine would be that of a part."""
    wanted = run(there(model, "cpu"), batch(), method, feedback)
    found = run(there(model, device, checkpointed=checkpointed), batch(), method, feedback, autocast=True)
    assert found.loss == pytest.approx(wanted.loss, rel=0.02)
    torch.testing.assert_close(found.slot_inputs.float(), wanted.slot_inputs, rtol=0.1, atol=0.1)
    # The softmax is blind to what all keys have in common: the gradient of their bias is rounding alone.
    names = [name for name in wanted.gradient if not name.endswith("k_proj.bias")]
    cosines = {
        name: float(torch.cosine_similarity(found.gradient[name].flatten(), wanted.gradient[name].flatten(), dim=0))
        for name in names
    }
    assert min(cosines.values()) > 0.97, sorted(cosines.items(), key=lambda item: item[1])[:5]
    sizes = {name: float(found.gradient[name].norm() / wanted.gradient[name].norm()) for name in names}
    assert all(0.9 < size < 1.1 for size in sizes.values()), sizes


def test_bfloat16_weights_take_the_fused_attention_to_the_same_loss(model: Any, device: str) -> None:
    wanted = run(there(model, "cpu"), batch(), "two_pass", "hops:2")
    for method, feedback in (("two_pass", "hops:2"), ("sequential", "full")):
        found = run(there(model, device, torch.bfloat16, checkpointed=True), batch(), method, feedback)
        assert found.states.dtype == torch.bfloat16
        assert found.loss == pytest.approx(wanted.loss, rel=0.03)


def test_videos_and_images_stand_in_one_batch(model: Any, device: str) -> None:
    wanted = run(there(model, "cpu", torch.float64), tiny.video_batch(), "reference", "full")
    for method in ("sequential", "two_pass"):
        found = run(there(model, device, torch.float64), tiny.video_batch(), method, "full")
        assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert difference(found, wanted) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_packed_into_one_row_do_not_see_each_other(
    model: Any, device: str, dtype: torch.dtype, autocast: bool
) -> None:
    moved = there(model, device, dtype)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        check_packing(moved, batch().to(moved.device))


def test_a_record_alone_has_the_loss_that_it_has_beside_others_in_bfloat16(model: Any, device: str) -> None:
    moved, together = there(model, device, torch.bfloat16), batch()
    alone = 0.0
    for one in tiny.sequences():
        single = collate([one], tiny.images(), tiny.processor(), latents=LatentRecipe(slots=4)).to(moved.device)
        with torch.no_grad():
            alone += forward(moved, single, method="two_pass").loss_sum.item()
    with torch.no_grad():
        whole = forward(moved, together.to(moved.device), method="two_pass").loss_sum.item()
    assert whole == pytest.approx(alone, rel=0.01)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_captured_step_computes_what_the_plain_one_does(
    model: Any, device: str, dtype: torch.dtype, rounding: float
) -> None:
    """Over growth of the cache and a change of rows, either of which makes the graph invalid."""
    generator = torch.Generator().manual_seed(0)
    prompt, steps = (torch.randn(3, width, 32, generator=generator) for width in (7, 12))
    visible = torch.ones(3, 7, dtype=torch.bool)
    visible[1, :3] = False
    found = {}
    for where, precision in (("cpu", torch.float32), (device, dtype)):
        moved = there(model, where, precision)
        cached = CachedDecoder(moved.model.language_model, rows=3, capacity=10)
        given, inputs = prompt.to(moved.device, precision), steps.to(moved.device, precision)
        positions = torch.arange(19, device=moved.device).expand(3, 3, -1)
        states = [cached.extend(given, positions[:, :, :7], visible.to(moved.device))[:, -1]]
        for step in range(6):
            states.append(cached.step(inputs[:, step], positions[:, :, 7 + step]))
        cached._reserve(300)  # as a longer answer does
        for step in range(6, 9):
            states.append(cached.step(inputs[:, step], positions[:, :, 7 + step]))
        kept = torch.tensor([2, 0], device=moved.device)
        cached.select(kept)
        for step in range(9, 12):
            states.append(cached.step(inputs[kept, step], positions[:, kept, 7 + step]))
        found[where] = [state.float().cpu() for state in states]
        if where == "cuda":
            assert cached._captured is not None
    for plain, captured in zip(found["cpu"], found[device], strict=True):
        torch.testing.assert_close(captured, plain, rtol=rounding, atol=rounding)


def test_a_window_of_two_batches_rolls_out_to_the_states_of_the_cpu(model: Any, device: str) -> None:
    """Rows wait for each other there, so the captured step also runs where a row has nothing."""
    wanted = roll_out(there(model, "cpu"), [batch(), tiny.video_batch()])
    found = roll_out(there(model, device), [batch().to(device), tiny.video_batch().to(device)])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.slot_inputs.cpu(), other.slot_inputs, rtol=1e-4, atol=1e-4)
