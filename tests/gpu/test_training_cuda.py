"""Both stages on a GPU: the figures of the CPU, in either precision, and a run that goes on where it was ended."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.training.inputs import DyingAt, Listening, context, write_inputs
from valr_ops.data.batching import collate
from valr_ops.model.latents import forward
from valr_ops.model.qwen import load_model
from valr_ops.recipe.recipe import RecipeError, RuntimeRecipe
from valr_ops.store.artifacts import StageReport
from valr_ops.training import loop
from valr_ops.training.engine import Ranks, join_ranks
from valr_ops.training.loop import build_stage1, build_stage2
from valr_ops.training.passes import TrainingError
from valr_ops.training.peak import peak

pytestmark = pytest.mark.gpu

FIGURES = ("loss", "ce", "gradient_norm", "decoder_gradient_norm")
LATENT_FIGURES = (
    "alignment/dinov3",
    "control/dinov3",
    "latent_norm_ratio",
    "effective_rank",
    "projector_gradient_norm",
)
METHODS = pytest.mark.parametrize(
    ("method", "feedback"), [("two_pass", "hops:2"), ("two_pass", "full"), ("sequential", "full")]
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def stage2(
    inputs: dict[str, Path], root: Path, device: str, progress: Listening | None = None, **changes: Any
) -> tuple[StageReport, Listening]:
    progress = progress or Listening()
    few = {"stage2.max_updates": 3, "stage2.epochs": 9, "stage2.checkpoint_every": 2, "runtime.device": device}
    recipe = tiny.recipe(**{**few, **changes})
    return build_stage2(context("stage2_valr_s", recipe, inputs, root, progress)), progress


def rows(progress: Listening, names: tuple[str, ...]) -> list[float]:
    return [progress.logged[update][name] for update in sorted(progress.logged) for name in names]


@pytest.mark.parametrize(("precision", "rounding"), [("float32", 2e-3), ("bfloat16", 0.05)])
def test_stage_1_has_the_losses_of_the_cpu(
    inputs: dict[str, Path], tmp_path: Path, device: str, precision: str, rounding: float
) -> None:
    logged: list[list[Any]] = []
    for where, how in (("cpu", "float32"), (device, precision)):
        changes = {"stage1.max_updates": 3, "stage1.epochs": 9, "runtime.device": where, "stage1.precision": how}
        root, progress = tmp_path / str(len(logged)), Listening()
        report = build_stage1(context("stage1_sft", tiny.recipe(**changes), inputs, root, progress))
        logged.append([*rows(progress, FIGURES), report.summary["validation/ce"]])
    assert logged[1] == pytest.approx(logged[0], rel=rounding)
    weights = load_file(root / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, precision)}


@METHODS
@pytest.mark.parametrize(("precision", "rounding"), [("float32", 2e-3), ("bfloat16", 0.05)])
def test_stage_2_has_the_losses_and_the_health_of_the_cpu(
    inputs: dict[str, Path],
    tmp_path: Path,
    device: str,
    method: str,
    feedback: str,
    precision: str,
    rounding: float,
) -> None:
    how: dict[str, Any] = {"latents.method": method, "latents.feedback_gradient": feedback}
    wanted_report, wanted = stage2(inputs, tmp_path / "wanted", "cpu", **how)
    report, found = stage2(inputs, tmp_path / "found", device, **{**how, "stage2.precision": precision})
    names = (*FIGURES, *LATENT_FIGURES)
    # Cosines near 0 have no relative precision.
    assert rows(found, names) == pytest.approx(rows(wanted, names), rel=rounding, abs=rounding / 5)
    assert report.summary["token_digest"] == wanted_report.summary["token_digest"]
    assert report.summary["validation/ce"] == pytest.approx(wanted_report.summary["validation/ce"], rel=rounding)
    assert not [line for line in found.said if "rounding" in line], (
        "the roll-out is not what the training pass computes"
    )
    assert report.checks[0].passed
    weights = load_file(tmp_path / "found" / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, precision)}


@pytest.mark.parametrize(("precision", "rounding"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_a_run_that_died_goes_on_from_its_checkpoint(
    inputs: dict[str, Path], tmp_path: Path, device: str, precision: str, rounding: float
) -> None:
    """Not to the last bit: sums over a GPU's threads have no fixed order."""
    changes: dict[str, Any] = {"stage2.precision": precision, "stage2.max_updates": 4}
    whole_report, whole = stage2(inputs, tmp_path / "whole", device, **changes)
    with pytest.raises(MemoryError):
        stage2(inputs, tmp_path / "killed", device, DyingAt(4), **changes)
    report, resumed = stage2(inputs, tmp_path / "killed", device, **changes)
    assert min(resumed.logged) == 3
    assert report.summary["token_digest"] == whole_report.summary["token_digest"]
    assert resumed.logged[4]["loss"] == pytest.approx(whole.logged[4]["loss"], rel=rounding)
    for name in ("model.safetensors", "projectors.safetensors"):
        wanted, found = load_file(tmp_path / "whole" / "out" / name), load_file(tmp_path / "killed" / "out" / name)
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=rounding, atol=rounding)


def test_a_run_goes_on_on_the_other_device(inputs: dict[str, Path], tmp_path: Path, device: str) -> None:
    with pytest.raises(MemoryError):
        stage2(inputs, tmp_path, device, DyingAt(3))
    _, resumed = stage2(inputs, tmp_path, "cpu")
    assert min(resumed.logged) == 3
    _, whole = stage2(inputs, tmp_path / "whole", "cpu")
    assert resumed.logged[3]["loss"] == pytest.approx(whole.logged[3]["loss"], rel=2e-3)


@pytest.mark.parametrize(("precision", "rounding"), [("float32", 2e-3), ("bfloat16", 0.05)])
def test_deepspeed_has_the_losses_of_torch(
    inputs: dict[str, Path], tmp_path: Path, device: str, precision: str, rounding: float
) -> None:
    pytest.importorskip("deepspeed")
    how: dict[str, Any] = {"latents.method": "two_pass", "stage2.precision": precision}
    _, wanted = stage2(inputs, tmp_path / "torch", device, **how)
    _, found = stage2(inputs, tmp_path / "deepspeed", device, **{**how, "stage2.engine": "deepspeed"})
    names = (*FIGURES, *LATENT_FIGURES)
    assert rows(found, names) == pytest.approx(rows(wanted, names), rel=rounding, abs=rounding / 5)


def test_a_gpu_that_is_full_is_an_error_about_the_records_before_the_first_update(
    inputs: dict[str, Path], tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = loop.rehearse

    def in_no_room(*arguments: Any) -> None:
        torch.cuda.empty_cache()
        share = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            exact(*arguments)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    monkeypatch.setattr(loop, "rehearse", in_no_room)
    # Larger than what the allocator has left in its blocks.
    changes: dict[str, Any] = {"data.max_length": 4096, "alignment.projector_width": 4096}
    changes |= {"latents.slots": 64, "data.reserved_slots": 64}
    progress = Listening()
    with pytest.raises(TrainingError) as error:
        stage2(inputs, tmp_path, device, progress, **changes)
    message = str(error.value)
    assert message.startswith("stage 2 ran out of memory with records tiny/0"), message
    assert "The weights were not changed. Lower stage2.micro_batch=2" in message
    assert "OutOfMemoryError" in message
    assert not progress.logged and not list((tmp_path / "work").iterdir())
    monkeypatch.undo()
    # A checkpointed forward that fails leaves its hooks to torch until its frames are gone, which the error holds.
    del error
    gc.collect()
    _, afterwards = stage2(inputs, tmp_path / "afterwards", device)
    assert len(afterwards.logged) == 3


def test_a_gpu_that_is_not_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    there = torch.cuda.device_count()
    for name, value in (("RANK", there), ("LOCAL_RANK", there), ("WORLD_SIZE", there + 1)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RecipeError, match=rf"{there + 1} processes on this node, but {there} GPUs; set runtime\.proc"):
        join_ranks(RuntimeRecipe(device=device, processes=there + 1))  # type: ignore[arg-type]


def test_the_ranks_sums_are_exact_and_the_peak_is_the_data_sheets_or_left_out(device: str) -> None:
    ranks = join_ranks(RuntimeRecipe(device=device))  # type: ignore[arg-type]
    assert ranks == Ranks(0, 1, torch.device(device, 0))
    assert ranks.sum([2.0**53 - 1, 0.1]) == [2.0**53 - 1, 0.1] and ranks.largest(0.1) == 0.1
    for precision in ("float32", "bfloat16"):
        flops, words = peak(ranks, precision)
        assert torch.cuda.get_device_name() in words
        assert flops is None or flops > 1e12


def test_a_trained_model_is_loaded_onto_the_gpu_and_computes_there(
    inputs: dict[str, Path], tmp_path: Path, device: str
) -> None:
    changes: dict[str, Any] = {"stage2.max_updates": 1, "stage2.precision": "bfloat16"}
    stage2(inputs, tmp_path, device, **changes)
    recipe, losses = tiny.recipe(), []
    for where, precision in (("cpu", "float32"), (device, "bfloat16")):
        model: Any
        model, processor = load_model(tmp_path / "out", where, precision)
        given = collate(tiny.sequences(), tiny.images(), processor, latents=recipe.latents).to(model.device)
        with torch.no_grad():
            losses.append(forward(model, given).loss_sum.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
