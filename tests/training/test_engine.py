from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.training.inputs import Listening, SignalledAt, content, context, write_inputs
from valr_ops.recipe.recipe import RecipeError, RuntimeRecipe, TrainingRecipe
from valr_ops.store.artifacts import StageReport
from valr_ops.training.engine import DeepSpeedEngine, Ranks, TorchEngine, join_ranks, make_engine
from valr_ops.training.launch import RankError
from valr_ops.training.loop import build_stage2
from valr_ops.training.schedule import parameter_groups
from valr_ops.training.stop import TrainingInterrupted

UPDATES, SHARES = 4, 3


class Regression(nn.Module):
    """Two layers, one that no loss reaches, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(2, 2).requires_grad_(False)

    def forward(self, inputs: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, float]]:
        loss = (self.second(torch.tanh(self.first(inputs))) - wanted).square().sum() / 6
        return loss, {"loss": loss.item()}


def engine_of(name: str) -> tuple[Regression, TorchEngine | DeepSpeedEngine]:
    recipe = TrainingRecipe(learning_rate=1e-2, weight_decay=0.1, engine=name)  # type: ignore[arg-type]
    module = Regression()
    decoder = [*module.first.parameters(), *module.unused.parameters(), *module.frozen.parameters()]
    groups = parameter_groups(decoder, module.second.parameters(), recipe)
    return module, make_engine(module, groups, recipe, join_ranks(RuntimeRecipe()))


def run(name: str, resume_with: str | None = None, rehearsed: bool = False) -> tuple[list[float], Tensor]:
    """Losses and gradient norms of a few updates, and the weights; half way another engine may take over."""
    module, engine = engine_of(name)
    for number in range(2 if rehearsed else 0):
        engine.backward(engine(torch.full((2, 5), 3.0 + number), torch.zeros(2, 3))[0], last=False)
        engine.forget()
    generator = torch.Generator().manual_seed(1)
    figures = []
    for update in range(UPDATES):
        if resume_with is not None and update == UPDATES // 2:
            state = [(key, tensor.clone()) for key, tensor in engine.state()]
            module, engine = engine_of(resume_with)
            engine.load_state(iter(state), update)
        for number in range(1, SHARES + 1):
            inputs, wanted = torch.randn(2, 5, generator=generator), torch.randn(2, 3, generator=generator)
            loss, _ = engine(inputs, wanted)
            engine.backward(loss, last=number == SHARES)
            figures.append(loss.item())
        figures += engine.gradient_norms().values()
        engine.step(1 - update / UPDATES)
    return figures, torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_torch_goes_on_from_its_state_to_the_bit() -> None:
    figures, weights = run("torch")
    resumed_figures, resumed_weights = run("torch", resume_with="torch")
    assert resumed_figures == figures and torch.equal(resumed_weights, weights)


def test_a_forgotten_backward_leaves_no_trace() -> None:
    figures, weights = run("torch")
    other_figures, other_weights = run("torch", rehearsed=True)
    assert other_figures == figures and torch.equal(other_weights, weights)


def test_the_gradient_norms_of_the_parts_are_those_of_their_parameters() -> None:
    module, engine = engine_of("torch")
    engine.backward(engine(torch.ones(2, 5), torch.zeros(2, 3))[0], last=True)
    norms = engine.gradient_norms()
    for part, layer in (("decoder", module.first), ("projector", module.second)):
        gradient = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
        assert norms[part] == pytest.approx(float(gradient.norm()))


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    _, engine = engine_of("torch")
    loss, _ = engine(torch.full((2, 5), float("inf")), torch.zeros(2, 3))
    engine.backward(loss * float("nan"), last=True)
    assert not engine.gradient_norms()["decoder"] < float("inf")


def test_another_number_of_processes_than_the_recipes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"runtime\.processes=3 but 1 are running"):
        join_ranks(RuntimeRecipe(processes=3))


@pytest.mark.slow
def test_deepspeed_gives_the_losses_of_torch_and_each_resumes_from_the_other() -> None:
    figures, weights = run("torch")
    for first, second in (("deepspeed", None), ("deepspeed", "torch"), ("torch", "deepspeed")):
        other_figures, other_weights = run(first, second)
        assert other_figures == pytest.approx(figures, rel=1e-5)
        torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-6)
    deepspeed_figures, deepspeed_weights = run("deepspeed")
    for changes in ({"resume_with": "deepspeed"}, {"rehearsed": True}):
        other_figures, other_weights = run("deepspeed", **changes)  # type: ignore[arg-type]
        assert other_figures == deepspeed_figures and torch.equal(other_weights, deepspeed_weights)
    _, engine = engine_of("deepspeed")
    loss, _ = engine(torch.full((2, 5), float("inf")), torch.zeros(2, 3))
    engine.backward(loss * float("nan"), last=True)
    assert not engine.gradient_norms()["decoder"] < float("inf")


class Weighted(nn.Module):
    """A loss whose gradient is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(64))

    def forward(self, given: Tensor) -> tuple[Tensor, dict[str, float]]:
        return (self.weights * given).sum(), {}


@pytest.mark.slow
def test_deepspeed_adds_gradients_in_bfloat16_up_in_float32() -> None:
    module = Weighted()
    optimizer = torch.optim.AdamW([{"params": [module.weights], "part": "decoder", "peak_lr": 1e-2}], betas=(0.9, 0.95))
    # Made directly, because a recipe has bfloat16 on CUDA only.
    engine = DeepSpeedEngine(module, optimizer, 1.0, True, Ranks(0, 1, torch.device("cpu")))
    given = torch.rand(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = given.float().sum(0)
    engine.backward(engine(given[0])[0], last=False)
    engine.forget()
    for number, one in enumerate(given, start=1):
        engine.backward(engine(one)[0], last=number == len(given))
    assert engine.gradient_norms()["decoder"] == pytest.approx(float(wanted.norm()), rel=1e-5)
    engine.step(1.0)
    clipped = dict(engine.state())["exp_avg/weights"] / (1 - 0.9)
    torch.testing.assert_close(clipped, wanted / wanted.norm(), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_gloo_ranks_have_the_losses_of_one_process_with_the_same_window(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    logged = []
    for processes, accumulation in ((1, 4), (2, 2)):
        changes = {"stage2.max_updates": 3, "stage2.epochs": 9, "stage2.accumulation": accumulation}
        recipe = tiny.recipe(**{**changes, "runtime.processes": processes, "latents.method": "two_pass"})
        progress = Listening()
        report = build_stage2(context("stage2_valr_s", recipe, inputs, tmp_path / str(processes), progress))
        names = (
            "loss",
            "ce",
            "alignment/dinov3",
            "control/dinov3",
            "gradient_norm",
            "projector_gradient_norm",
            "decoder_learning_rate",
        )
        logged.append([progress.logged[update][name] for update in (1, 2, 3) for name in names])
        logged[-1] += [float(report.summary[f"validation/{name}"]) for name in names[:4]]
        assert sorted(content(tmp_path / str(processes) / "out"))[-2:] == [
            "tokenizer_config.json",
            "training_log.parquet",
        ]
    assert logged[1] == pytest.approx(logged[0], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_sigterm_reaches_all_launched_ranks_and_they_go_on_together(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    changes = {"stage2.max_updates": 40, "stage2.epochs": 99, "stage2.accumulation": 1}
    changes |= {"runtime.processes": 2, "latents.method": "two_pass"}

    def train(name: str, progress: Listening) -> StageReport:
        return build_stage2(context("stage2_valr_s", tiny.recipe(**changes), inputs, tmp_path / name, progress))

    with pytest.raises(TrainingInterrupted, match="the same command goes on from there"):
        train("stopped", SignalledAt(3))
    report = train("stopped", resumed := Listening())
    assert 3 < min(resumed.logged) < 40
    whole = train("whole", Listening())
    assert report.summary == whole.summary
    assert content(tmp_path / "stopped" / "out") == content(tmp_path / "whole" / "out")


@pytest.mark.slow
def test_what_a_launched_rank_raises_arrives_in_its_own_words(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    recipe = tiny.recipe(**{"runtime.processes": 2, "latents.method": "sequential"})
    with pytest.raises(RankError, match=r"set latents\.method to two_pass, or runtime\.processes to 1") as error:
        build_stage2(context("stage2_valr_s", recipe, inputs, tmp_path))
    assert error.value.exit_status == 42
