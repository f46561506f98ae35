from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.training.inputs import (
    DIMENSION,
    GRID,
    DyingAt,
    Listening,
    SignalledAt,
    content,
    context,
    sequences,
    store_features,
    write_corpus,
    write_inputs,
)
from valr_ops.data.batching import Batch, Collator
from valr_ops.data.sequences import Sequence
from valr_ops.exits import EXIT_AT_CHECKPOINT
from valr_ops.model import latents
from valr_ops.model.alignment import Projectors
from valr_ops.model.checkpoint import CheckpointError
from valr_ops.recipe.recipe import Recipe, RecipeError
from valr_ops.store.artifacts import StageReport
from valr_ops.teachers.stored import FeatureError, FeatureStore
from valr_ops.training import log, loop
from valr_ops.training.engine import Ranks
from valr_ops.training.loop import build_stage1, build_stage2
from valr_ops.training.objective import Counts, Objective
from valr_ops.training.passes import TrainingError
from valr_ops.training.stop import TrainingInterrupted
from valr_ops.training.windows import Share

LEARNING = {
    "stage2.max_updates": 30,
    "stage2.epochs": 20.5,
    "stage2.schedule": "constant",
    "stage2.learning_rate": 1e-2,
    "stage2.projector_learning_rate": 1e-2,
    "alignment.projector_width": 64,
}
FIVE_UPDATES = {"stage2.max_updates": 5, "stage2.epochs": 9, "stage2.checkpoint_every": 2}
METHODS = pytest.mark.parametrize("method", ["two_pass", "sequential"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def stage2(
    inputs: dict[str, Path], root: Path, progress: Listening | None = None, **changes: object
) -> tuple[StageReport, Listening]:
    progress = progress or Listening()
    recipe = tiny.recipe(**{**FIVE_UPDATES, **changes})
    return build_stage2(context("stage2_valr_s", recipe, inputs, root, progress)), progress


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[StageReport, dict[str, bytes]]:
    """Report and files of a run that nothing interrupted."""
    root = tmp_path_factory.mktemp("uninterrupted")
    report, _ = stage2(inputs, root)
    return report, content(root / "out")


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors of two model folders that differ."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert set(old) == set(new)
    return {name for name in old if not torch.equal(old[name], new[name])}


# ----------------------------------------------------------------------------------------------------- the two stages


def test_stage_1_trains_the_decoder_without_latents_and_leaves_the_tower_alone(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tiny.recipe(**{"stage1.epochs": 6, "stage1.schedule": "constant"})
    progress = Listening()
    report = build_stage1(context("stage1_sft", recipe, inputs, tmp_path, progress))
    losses = [progress.logged[update]["ce"] for update in sorted(progress.logged)]
    assert len(losses) == report.summary["updates"] == 12
    assert losses[-1] < 0.8 * losses[0]
    assert report.summary["validation/ce"] < losses[0]  # type: ignore[operator]
    moved = changed(inputs["base_model"], tmp_path / "out")
    assert not any("visual" in name for name in moved)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= moved
    assert all(row["latent_norm_ratio"] == 0 == row["aligned_segments"] for row in progress.logged.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["valr"]["stage"] == 1
    assert not (tmp_path / "out" / "projectors.safetensors").exists()


def test_stage_2_aligns_latents_to_their_own_image_more_than_to_another(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    report, progress = stage2(inputs, tmp_path, **LEARNING)
    first, last = progress.logged[1], progress.logged[30]
    assert last["alignment/dinov3"] > first["alignment/dinov3"] + 0.2
    assert last["alignment/dinov3"] > last["control/dinov3"] + 0.1
    assert last["loss"] == pytest.approx(last["ce"] - 0.5 * last["alignment/dinov3"])
    assert report.checks[0].name == "losses_are_finite" and report.checks[0].passed
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["valr"]
    assert {"stage": 2, "slots": 4, "block": 1, "control_tokens": "outside"}.items() <= settings.items()
    assert settings["teachers"] == {"dinov3": {"model": "made up", "license": "none", "fingerprint": "0"}}
    projectors = load_file(tmp_path / "out" / "projectors.safetensors")
    assert all(name.startswith("dinov3.") for name in projectors)
    assert not any("projector" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_the_log_of_the_artifact_has_a_row_an_update_and_no_clock(
    whole: tuple[StageReport, dict[str, bytes]], tmp_path: Path
) -> None:
    _, files = whole
    (tmp_path / "log.parquet").write_bytes(files["training_log.parquet"])
    table = pq.read_table(tmp_path / "log.parquet")
    assert table["update"].to_pylist() == [1, 2, 3, 4, 5]
    assert table.column_names == [
        *("update", "loss", "ce", "alignment/dinov3", "control/dinov3"),
        *("latent_norm_ratio", "effective_rank", "feedback_residual", "slot_drift"),
        *("gradient_norm", "decoder_gradient_norm", "projector_gradient_norm"),
        *("decoder_learning_rate", "projector_learning_rate", "supervised_tokens", "aligned_segments"),
    ]
    assert files["loss.png"].startswith(b"\x89PNG") and b"Software" not in files["loss.png"]


def test_people_see_the_rates_as_well_and_the_health_of_the_latents(inputs: dict[str, Path], tmp_path: Path) -> None:
    changes = {"latents.method": "two_pass", "latents.feedback_gradient": "hops:2", "stage2.max_updates": 2}
    report, progress = stage2(inputs, tmp_path, **changes)
    assert any("measured" in line and "model_flops_utilisation" in line for line in progress.said)
    rates = {"tokens_per_second", "samples_per_second", "data_wait_share", "model_flops_utilisation"}
    assert rates | {"training_seconds"} == set(report.timings)
    for row in progress.logged.values():
        assert rates <= set(row) and row["model_flops_utilisation"] > 0
        assert 1 <= row["effective_rank"] <= 4
        assert 0 < row["feedback_residual"] < 1
        assert 0 <= row["slot_drift"] < 1e-4
        assert row["gradient_norm"] == math.hypot(row["decoder_gradient_norm"], row["projector_gradient_norm"])
        assert row["decoder_learning_rate"] == row["projector_learning_rate"] > 0
    assert not [line for line in progress.said if "rounding" in line]


def test_a_training_pass_that_is_not_the_roll_outs_is_said_once(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = latents.roll_out

    def wrong(model: torch.nn.Module, batches: list[Batch]) -> list[latents.Rollout]:
        return [replace(rollout, slot_inputs=1.1 * rollout.slot_inputs) for rollout in exact(model, batches)]  # type: ignore[arg-type]

    monkeypatch.setattr(latents, "roll_out", wrong)
    _, progress = stage2(inputs, tmp_path, **{"latents.method": "two_pass", "stage2.max_updates": 2})
    assert len([line for line in progress.said if "more than rounding explains" in line]) == 1
    assert all(row["slot_drift"] > 0.01 for row in progress.logged.values())


def test_lambda_0_keeps_the_latents_and_needs_no_teacher(inputs: dict[str, Path], tmp_path: Path) -> None:
    without = {name: path for name, path in inputs.items() if not name.startswith("teacher")}
    report, progress = stage2(without, tmp_path, **{"alignment.weight": 0.0, "stage2.max_updates": 1})
    row = progress.logged[1]
    assert row["loss"] == row["ce"] and row["latent_norm_ratio"] > 0
    assert not [name for name in row if name.startswith(("alignment", "control"))]
    assert not (tmp_path / "out" / "projectors.safetensors").exists()
    assert report.summary["updates"] == 1


def test_several_teachers_weigh_the_same(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs", teachers=("dinov3", "siglip2"))
    teacher = {"architecture": "timm", "model": "vit_base_patch16_siglip_256", "image_pixels": 64}
    changes = {"teachers.siglip2": teacher, "alignment.teachers": ["dinov3", "siglip2"], "stage2.max_updates": 1}
    _, progress = stage2(inputs, tmp_path, **changes)
    row = progress.logged[1]
    mean = (row["alignment/dinov3"] + row["alignment/siglip2"]) / 2
    assert row["loss"] == pytest.approx(row["ce"] - 0.5 * mean)


def test_a_cosine_that_was_not_measured_is_no_number_anywhere(inputs: dict[str, Path], tmp_path: Path) -> None:
    one_by_one = {"stage2.micro_batch": 1, "stage2.accumulation": 1, "stage2.max_updates": 8, "stage2.epochs": 1}
    report, progress = stage2(inputs, tmp_path, **one_by_one)
    # Of the eight records two look at two images and two at none; the two that are held out look at one each.
    columns = pq.read_table(tmp_path / "out" / "training_log.parquet")
    assert columns["alignment/dinov3"].null_count == 2 and columns["control/dinov3"].null_count == 6
    for update, row in progress.logged.items():
        for name in ("alignment/dinov3", "control/dinov3"):
            assert columns[name][update - 1].as_py() == row.get(name)
    assert report.checks[0].passed and (tmp_path / "out" / "loss.png").is_file()
    assert report.summary["validation/alignment/dinov3"] != 0 and "validation/control/dinov3" not in report.summary
    last, shown = progress.logged[8], report.tables["Training"].splitlines()[-1]
    assert report.summary.get("control/dinov3") == last.get("control/dinov3")
    control = f"{last['control/dinov3']:.4f}" if "control/dinov3" in last else "none"
    assert shown == f"| control/dinov3 | {control} | none |"


def test_a_column_that_no_row_has_is_there_and_empty(tmp_path: Path) -> None:
    log.write_log([{"update": 1, "loss": 2.0, "ce": 2.0}], ["dinov3"], tmp_path / "log.parquet")
    control = pq.read_table(tmp_path / "log.parquet").column("control/dinov3")
    assert control.type == "double" and control.to_pylist() == [None]
    log.plot([{"update": 1, "loss": 2.0, "ce": 2.0}], ["dinov3"], tmp_path / "loss.png")


# ------------------------------------------------------------------------------------------------------ normalisation


def gradient(recipe: Recipe, sizes: tuple[int, ...]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one window of eight records cut into micro-batches of `sizes`, in float64."""
    model = tiny.model(dtype=torch.float64)
    torch.manual_seed(1)
    projectors = Projectors({"dinov3": DIMENSION}, model.lm_head.in_features, recipe.alignment).double()
    objective = Objective(model, projectors, recipe)
    collate = Collator(tiny.images(), tiny.processor(), recipe.latents)
    generator = torch.Generator().manual_seed(2)
    features = {name: torch.randn(*GRID, DIMENSION, generator=generator).double() for name in ("a", "b", "wide")}
    shares, start = [], 0
    for size in sizes:
        batch = collate(sequences()[start : start + size])
        start += size
        of_targets = [None if target is None else features[target[0]] for target in batch.targets]
        shares.append(Share(batch, {"dinov3": of_targets}))
    counts = Counts.of(shares, objective.shape, Ranks(0, 1, torch.device("cpu")))
    total = 0.0
    for share, rollout in zip(shares, objective.roll_out([share.batch for share in shares]), strict=True):
        loss, _ = objective(share.batch, share.features, counts, rollout)
        loss.backward()
        total += loss.item()
    gradients = [parameter.grad.flatten() for parameter in objective.parameters() if parameter.grad is not None]
    return total, torch.cat(gradients)


@METHODS
def test_one_batch_of_eight_gives_the_gradient_of_four_of_two_and_of_ragged_ones(method: str) -> None:
    loss, whole = gradient(tiny.recipe(), (8,))
    recipe = tiny.recipe(**{"latents.method": method})
    for sizes in ((8,), (2, 2, 2, 2), (1, 5, 2)):
        other_loss, parts = gradient(recipe, sizes)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert torch.linalg.vector_norm(parts - whole) < 1e-6 * torch.linalg.vector_norm(whole)


@METHODS
def test_each_parameter_gets_its_gradient_of_a_micro_batch_in_one_piece(method: str) -> None:
    """So one reduction a parameter and micro-batch, also with feedback hops and with latents one by one."""
    hops = {"latents.feedback_gradient": "hops:3"} if method == "two_pass" else {}
    ready = order_of_gradients(tiny.sequences(), tiny.recipe(**{"latents.method": method, **hops}))
    assert len(ready) > 10 and len(set(ready)) == len(ready)


def test_gradients_become_ready_in_the_same_order_whatever_the_records_are() -> None:
    """ZeRO-2 adds up what the ranks have ready at the same place in this order, without looking at its name."""
    recipe = tiny.recipe(**{"latents.method": "two_pass"})
    three, one, two, none = tiny.sequences()
    orders = [order_of_gradients(records, recipe) for records in ([none], [one, none], [two, three])]
    assert orders[0] == orders[1] == orders[2]


def order_of_gradients(records: list[Sequence], recipe: Recipe) -> list[str]:
    """Names of the parameters in the order in which a micro-batch's gradients become ready."""
    model = tiny.model()
    objective = Objective(model, Projectors({"dinov3": DIMENSION}, model.lm_head.in_features, recipe.alignment), recipe)
    ready: list[str] = []
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: ready.append(name))  # type: ignore[misc]
    batch = Collator(tiny.images(), tiny.processor(), recipe.latents)(records)
    share = Share(
        batch, {"dinov3": [None if target is None else torch.ones(*GRID, DIMENSION) for target in batch.targets]}
    )
    counts = Counts.of([share], objective.shape, Ranks(0, 1, torch.device("cpu")))
    objective(share.batch, share.features, counts, None)[0].backward()
    return ready


@METHODS
def test_a_run_with_one_batch_of_eight_has_the_losses_of_four_of_two(
    method: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    rows = []
    for micro_batch, accumulation in ((8, 1), (2, 4)):
        sizes = {"stage2.micro_batch": micro_batch, "stage2.accumulation": accumulation, "stage2.max_updates": 3}
        sizes["latents.method"] = method  # type: ignore[assignment]
        report, progress = stage2(inputs, tmp_path / str(micro_batch), **sizes)
        names = ("loss", "ce", "alignment/dinov3", "gradient_norm", "supervised_tokens", "aligned_segments")
        rows.append([progress.logged[update][name] for update in (1, 2, 3) for name in names])
        rows[-1].append(report.summary["validation/loss"])  # type: ignore[arg-type]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------------- bad numbers


def test_records_with_an_image_that_a_teacher_could_not_see_are_left_out(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    folder = inputs["teacher_features_dinov3"]
    store = FeatureStore(folder)
    seen = {target: store.get(target).clone() for target in store if target.digest != tiny.digest("wide")}
    store_features(folder, "dinov3", seen)
    with pytest.raises(FeatureError, match=f"has no features of {tiny.digest('wide')[:12]}"):
        stage2(inputs, tmp_path / "unnamed", **{"stage2.max_updates": 2})
    about_wide = [one.id for one in sequences() if "wide" in one.image_digests]
    (folder / "rejects.jsonl").write_text("".join(json.dumps({"id": name}) + "\n" for name in about_wide * 2))
    report, progress = stage2(inputs, tmp_path / "named", **{"stage2.max_updates": 2})
    assert len(about_wide) == 3 and any("3 records are left out" in said for said in progress.said)
    assert report.summary["updates"] == 2 and report.checks[0].passed


def test_a_step_that_is_not_finite_names_its_records_and_publishes_nothing(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    folder = inputs["teacher_features_dinov3"]
    store = FeatureStore(folder)
    features = {target: store.get(target).clone() for target in store}
    poisoned = next(target for target in features if target.digest == tiny.digest("wide"))
    features[poisoned].fill_(float("nan"))
    store_features(folder, "dinov3", features)
    with pytest.raises(TrainingError, match=r"update 1: loss is nan.*The weights were not changed") as error:
        stage2(inputs, tmp_path, **{"stage2.micro_batch": 1, "stage2.accumulation": 8})
    about_wide = {one.id for one in sequences()[:8] if "wide" in one.image_digests}
    named = {one.id for one in sequences() if one.id in str(error.value)}
    assert named == about_wide
    assert not list((tmp_path / "out").iterdir())


def test_bfloat16_on_the_cpu_is_refused_with_the_fix(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="set precision to float32"):
        stage2(inputs, tmp_path, **{"stage2.precision": "bfloat16"})


def test_a_corpus_without_held_out_records_has_no_validation_loss(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    all_for_training = [replace(sequence, split="train") for sequence in sequences()]
    write_corpus(inputs["latent_corpus"], all_for_training)
    report, progress = stage2(inputs, tmp_path, **{"stage2.max_updates": 1})
    assert not [name for name in report.summary if name.startswith("validation")]
    assert any("no sequence is held out" in line for line in progress.said)


# --------------------------------------------------------------------------------------------------------- rehearsal


def test_the_rehearsal_leaves_no_trace(
    inputs: dict[str, Path],
    tmp_path: Path,
    whole: tuple[StageReport, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "rehearse", lambda *_: None)
    report, _ = stage2(inputs, tmp_path)
    assert (report.summary, content(tmp_path / "out")) == (whole[0].summary, whole[1])


def test_the_heaviest_micro_batch_is_computed_before_the_first_update_and_after_a_resume(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[list[str]] = []
    exact = Objective.forward

    def listening(objective: Objective, batch: Batch, *rest: object) -> object:
        computed.append(batch.record_ids)
        return exact(objective, batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "forward", listening)
    changes = {"stage2.micro_batch": 1, "stage2.accumulation": 8, "stage2.max_updates": 2}
    with pytest.raises(MemoryError):
        stage2(inputs, tmp_path, DyingAt(2), **{**changes, "stage2.checkpoint_every": 1})
    most_segments, most_tokens = (["tiny/00"], ["tiny/04"]), (["tiny/01"], ["tiny/05"])
    assert computed[0] in most_segments and computed[1] in most_tokens
    assert len(computed) == 2 + 2 * 8
    computed.clear()
    stage2(inputs, tmp_path, **changes)
    assert computed[0] in most_segments and computed[1] in most_tokens


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_running_out_of_memory_shows_first_and_names_the_records_and_the_settings(
    micro_batch: int, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*_: object, **__: object) -> object:
        return torch.empty(2**50)

    monkeypatch.setattr(latents, "forward", hungry)
    changes = {"latents.method": "two_pass", "stage2.micro_batch": micro_batch}
    with pytest.raises(TrainingError) as error:
        stage2(inputs, tmp_path, progress := Listening(), **changes)
    message = str(error.value)
    assert re.search(
        rf"stage 2 ran out of memory with records? tiny/0.*: \d+ tokens, {3 * micro_batch} segments", message
    )
    assert "data.max_length=512" in message and "latents.slots=4" in message
    assert "can't allocate memory" in message
    assert ("Lower stage2.micro_batch=2 (and raise stage2.accumulation by as much)" in message) == (micro_batch == 2)
    assert not progress.logged and not list((tmp_path / "out").iterdir()) and not list((tmp_path / "work").iterdir())


def test_other_errors_of_a_forward_stay_what_they_are(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "forward", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        stage2(inputs, tmp_path)


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_died_goes_on_to_the_same_bytes(
    step: int, inputs: dict[str, Path], tmp_path: Path, whole: tuple[StageReport, dict[str, bytes]]
) -> None:
    with pytest.raises(MemoryError):
        stage2(inputs, tmp_path, DyingAt(step))
    assert not list((tmp_path / "out").iterdir())
    report, progress = stage2(inputs, tmp_path)
    assert min(progress.logged) == {1: 1, 5: 5}[step]
    assert (report.summary, content(tmp_path / "out")) == (whole[0].summary, whole[1])
    assert len(str(report.summary["token_digest"])) == 64


def test_sigterm_ends_the_update_writes_a_checkpoint_and_asks_for_a_resume(
    inputs: dict[str, Path], tmp_path: Path, whole: tuple[StageReport, dict[str, bytes]]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="after update 3 of 5") as interrupted:
        stage2(inputs, tmp_path, SignalledAt(3))
    assert interrupted.value.exit_status == EXIT_AT_CHECKPOINT == 75
    assert signal.getsignal(signal.SIGTERM) is before
    report, progress = stage2(inputs, tmp_path)
    assert min(progress.logged) == 4
    assert (report.summary, content(tmp_path / "out")) == (whole[0].summary, whole[1])


def test_two_passes_go_on_to_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    changes = {"latents.method": "two_pass"}
    with pytest.raises(MemoryError):
        stage2(inputs, tmp_path / "killed", DyingAt(4), **changes)
    report, progress = stage2(inputs, tmp_path / "killed", **changes)
    assert min(progress.logged) == 3
    uninterrupted, _ = stage2(inputs, tmp_path / "whole", **changes)
    assert report.summary == uninterrupted.summary
    assert content(tmp_path / "killed" / "out") == content(tmp_path / "whole" / "out")


def test_a_checkpoint_of_another_recipe_or_other_inputs_is_refused_and_kept(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        stage2(inputs, tmp_path, DyingAt(4))
    before = content(tmp_path / "work")
    with pytest.raises(CheckpointError, match=r"stage2\.learning_rate was 0\.003 and is 0\.0001"):
        stage2(inputs, tmp_path, **{"stage2.learning_rate": 1e-4})
    with pytest.raises(CheckpointError, match=r"micro_batch x .* x runtime\.processes was 4 and is 6"):
        stage2(inputs, tmp_path, **{"stage2.accumulation": 3})
    elsewhere = {**inputs, "stage1_sft": tmp_path / "another_model"}
    elsewhere["stage1_sft"].mkdir()
    for name, data in content(inputs["base_model"]).items():
        (elsewhere["stage1_sft"] / name).write_bytes(data)
    weights = load_file(elsewhere["stage1_sft"] / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, elsewhere["stage1_sft"] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"input\.stage1_sft was .*delete .*work to begin anew"):
        stage2(elsewhere, tmp_path)
    assert content(tmp_path / "work") == before


def test_as_many_checkpoints_stay_as_the_recipe_says(inputs: dict[str, Path], tmp_path: Path) -> None:
    stage2(inputs, tmp_path, **{"stage2.checkpoint_every": 1, "stage2.keep_checkpoints": 3})
    assert [path.name[-1] for path in sorted((tmp_path / "work").iterdir())] == ["3", "4", "5"]


def test_a_run_goes_on_with_the_window_divided_in_another_way(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        stage2(inputs, tmp_path, DyingAt(4))
    _, progress = stage2(inputs, tmp_path, **{"stage2.micro_batch": 1, "stage2.accumulation": 4})
    assert min(progress.logged) == 3


@pytest.mark.slow
def test_kill_9_at_any_moment_and_running_again_gives_the_same_bytes(
    inputs: dict[str, Path], tmp_path: Path, whole: tuple[StageReport, dict[str, bytes]]
) -> None:
    script = (
        "import sys, json; from pathlib import Path; from tests import tiny; from tests.training.inputs import context;"
        "from valr_ops.training.loop import build_stage2;"
        "inputs = {name: Path(path) for name, path in json.loads(sys.argv[1]).items()};"
        f"recipe = tiny.recipe(**{FIVE_UPDATES!r}); root = Path(sys.argv[2]);"
        "build_stage2(context('stage2_valr_s', recipe, inputs, root))"
    )
    given = json.dumps({name: str(path) for name, path in inputs.items()})
    command = [sys.executable, "-c", script, given, str(tmp_path)]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not list((tmp_path / "work").glob("checkpoint-*")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    subprocess.run(command, check=True)
    assert content(tmp_path / "out") == whole[1]
