"""The training of both stages: one loop, a straight line.

In: the rewritten corpus, a model to start from, and for stage 2 the features of the teachers. Out: a Hugging Face
folder of the trained model, with `projectors.safetensors`, `training_log.parquet` and `loss.png` beside it.
The vision encoder is frozen with its merger, which belongs to it (paper: "vision encoder"); blocks, embeddings and head
are trained. Each stage starts with a fresh optimizer (paper silent).
Always: the heaviest micro-batch to come is computed first and thrown away, so that memory runs out in the first minute
or not at all; a step that is not finite never reaches the weights; a run that was killed goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from valr_ops.data.batching import Collator
from valr_ops.data.corpus import ImageStore
from valr_ops.data.sequences import Sequences, order
from valr_ops.model import checkpoint
from valr_ops.model.alignment import Projectors
from valr_ops.model.qwen import check_block, load_model, save_model
from valr_ops.recipe import price, workload
from valr_ops.recipe.recipe import Recipe, RecipeError, TrainingRecipe
from valr_ops.store.artifacts import Check, StageContext, StageReport
from valr_ops.store.progress import Progress
from valr_ops.teachers.features import open_features, origins, rejected_records
from valr_ops.torchvision_guard import ensure_torchvision
from valr_ops.training import launch, log, schedule
from valr_ops.training.engine import Ranks, join_ranks, make_engine
from valr_ops.training.objective import Counts, Figures, Objective
from valr_ops.training.passes import Engine, TrainingError, check_finite, memory_errors_named, passes, rehearse
from valr_ops.training.peak import peak
from valr_ops.training.stop import StopSignals, TrainingInterrupted
from valr_ops.training.windows import Windows

ensure_torchvision()

from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402

_TOLERATED_DRIFT = {"float32": 1e-3, "bfloat16": 1e-1}
"""Relative; rounding gives about 1e-6 and 1e-2."""


def build_stage1(context: StageContext) -> StageReport:
    """The stage `stage1_sft`: chain-of-thought fine-tuning without latents, from the base model.

    Raises:
        TrainingError: no sequence to train on, a loss or a gradient is not finite, or the memory is too small.
        ShardError: the rewritten corpus is damaged, and where.
        TrainingInterrupted: a signal came; the same call goes on from the checkpoint in ``context.work``.
        CheckpointError: the checkpoint in ``context.work`` is damaged or of another run.
        RecipeError: a recipe that does not fit the model or the machine.
    """
    if launch.must_launch(context):
        return launch.run_ranks(context, f"{__name__}:build_stage1")
    return _build(context, stage=1, start="base_model")


def build_stage2(context: StageContext) -> StageReport:
    """A stage-2 model: latents between the steps, aligned to the recipe's teachers, from stage 1. Raises as stage 1."""
    if launch.must_launch(context):
        return launch.run_ranks(context, f"{__name__}:build_stage2")
    return _build(context, stage=2, start="stage1_sft")


@dataclass
class Done:
    """What a checkpoint holds beside the tensors."""

    updates: int = 0
    """Updates done."""
    token_digest: str = ""
    """SHA-256 over the ids of all records read, in the order in which they were drawn."""
    rows: list[log.Row] = field(default_factory=list)
    """The log so far."""


def train(
    engine: Engine,
    objective: Objective,
    windows: Windows,
    recipe: Recipe,
    stage: Literal[1, 2],
    updates: int,
    done: Done,
    save: Callable[[], None],
    clock: log.Clock,
    progress: Progress,
) -> None:
    """Do the updates that `done` lacks, writing into `done` and `clock`; `save` makes a checkpoint of it.

    Raises:
        TrainingError: no memory, or a loss or gradient that is not finite; the weights are those before the step.
        TrainingInterrupted: a signal came; the checkpoint is written.
    """
    ranks, training, drifted = engine.ranks, _training(recipe, stage), False
    with StopSignals() as stop:
        rehearse(engine, objective, windows, done.updates, updates, recipe, stage)
        clock.start()
        coming = windows.ahead(done.updates, updates)
        for window, waited in progress.track(coming, "updates", total=updates, done=done.updates):
            # Nothing here draws random numbers yet; a pure function of the update stays the same over a resume.
            torch.manual_seed(recipe.seed * 1_000_003 + done.updates)
            counts = Counts.of(window.shares, objective.shape, ranks)
            losses, figures = [], []
            with memory_errors_named(window.shares, recipe, stage):
                for loss, of_share in passes(engine, objective, window.shares, counts):
                    losses.append(loss.item())
                    figures.append(of_share)
                    engine.backward(loss, last=len(losses) == len(window.shares))
            norms = engine.gradient_norms()
            factor = schedule.learning_rate_factor(done.updates, updates, training)
            row = {
                "update": done.updates + 1,
                **objective.means(figures, ranks),
                "gradient_norm": math.hypot(*norms.values()),
                **{f"{part}_gradient_norm": norm for part, norm in norms.items()},
                **{f"{part}_learning_rate": factor * schedule.peak_rates(training)[part] for part in norms},
                "supervised_tokens": counts.supervised_tokens,
                "aligned_segments": counts.aligned_segments,
            }
            check_finite(row, losses, window.shares)
            engine.step(factor)
            done.updates += 1
            done.token_digest = hashlib.sha256(done.token_digest.encode() + window.token_ids).hexdigest()
            if done.updates % training.log_every == 0 or done.updates == updates:
                done.rows.append(row)
            progress.log(done.updates, row | clock.lap(counts.positions, windows.records, counts.flops, waited))
            if row["slot_drift"] > _TOLERATED_DRIFT[training.precision] and not drifted:
                drifted = True
                progress.say(
                    f"update {done.updates}: the states of the training pass differ from those rolled out by "
                    f"{row['slot_drift']:.1g}, more than rounding explains; compare with latents.method=sequential"
                )
            stopping = ranks.sum([stop.requested()])[0] > 0
            if stopping or done.updates % training.checkpoint_every == 0 or done.updates == updates:
                save()
            if stopping:
                raise TrainingInterrupted(
                    f"stopped by a signal after update {done.updates} of {updates}, with a checkpoint; "
                    "the same command goes on from there"
                )


def validate(engine: Engine, objective: Objective, windows: Windows, sequences: Sequences) -> dict[str, float]:
    """Loss and its parts over `sequences`, by ``validation/<name>``; nothing where there are none."""
    if not len(sequences):
        return {}
    figures: list[Figures] = []
    alone = Ranks(0, 1, engine.ranks.device)
    with torch.no_grad():
        for shares in windows.every(sequences):
            counts = Counts.of(shares, objective.shape, alone)
            figures += [of_share for _, of_share in passes(engine, objective, shares, counts)]
    means = objective.means(figures, engine.ranks)
    return {
        f"validation/{name}": value
        for name, value in means.items()
        if name.split("/")[0] in ("loss", "ce", "alignment", "control")
    }


def _training(recipe: Recipe, stage: Literal[1, 2]) -> TrainingRecipe:
    return recipe.stage1 if stage == 1 else recipe.stage2


def _build(context: StageContext, stage: Literal[1, 2], start: str) -> StageReport:
    recipe, inputs, training = context.recipe, context.inputs, _training(context.recipe, stage)
    ranks = join_ranks(recipe.runtime)
    if stage == 2 and ranks.size > 1 and recipe.latents.method != "two_pass":
        raise RecipeError(
            f"latents.method={recipe.latents.method} with runtime.processes={ranks.size}: gradients become ready in an "
            "order that depends on the records, and ZeRO-2 would add up those of different parameters; set "
            "latents.method to two_pass, or runtime.processes to 1"
        )
    progress = context.progress if ranks.first else Progress()
    torch.set_num_threads(recipe.runtime.threads)
    torch.manual_seed(recipe.seed)
    model: Qwen2_5_VLForConditionalGeneration
    model, processor = load_model(inputs[start], str(ranks.device), "float32")
    # Activations of a long record are the largest thing on a GPU after the optimizer's state.
    model.model.language_model.gradient_checkpointing = ranks.device.type == "cuda"
    aligned = stage == 2 and recipe.alignment.weight > 0
    if aligned:
        check_block(model.config, recipe.alignment.block)
    images = ImageStore(inputs["cot_corpus"])
    teachers = recipe.alignment.teachers if aligned else ()
    sources = open_features(replace(context, progress=progress), teachers, images, str(ranks.device))
    dimensions = {name: source.dim for name, source in sources.items()}
    width = model.lm_head.in_features
    projectors = Projectors(dimensions, width, recipe.alignment).to(ranks.device) if aligned else None
    objective = Objective(model, projectors, recipe)
    groups = schedule.parameter_groups(model.parameters(), projectors.parameters() if projectors else (), training)
    engine = make_engine(objective, groups, training, ranks)

    rejected = rejected_records(inputs, teachers)
    sequences = Sequences(inputs["latent_corpus"], "train").without(rejected)
    if rejected:
        progress.say(f"{len(rejected)} records are left out, because an image that a teacher needs can't be decoded")
    if not len(sequences):
        raise TrainingError(
            f"{inputs['latent_corpus']} has no sequence of the split train; look at rejects.jsonl there and in "
            "cot_corpus"
        )
    updates = schedule.updates(training, sequences.visits(recipe.seed).per_epoch, ranks.size)
    if training.records is not None:
        # Fewer records, seen more often in the same number of updates (figure 3).
        sequences = sequences.taken(order(len(sequences), recipe.seed, 0)[: training.records])
    windows = Windows(
        sequences,
        Collator(images, processor, recipe.latents if stage == 2 else None, max_length=recipe.data.max_length),
        sources,
        micro_batch=training.micro_batch,
        accumulation=training.accumulation,
        seed=recipe.seed,
        ranks=ranks,
    )
    run = _run_of(context, stage, training)
    done = _resume(engine, context.work, run, progress)
    peak_flops, peak_in_words = peak(ranks, training.precision)
    progress.say(
        f"{len(sequences)} sequences, {updates} updates of {windows.records}, {ranks.size} process(es), {engine.name}"
    )
    progress.say(
        "model_flops_utilisation counts forward and backward, causal attention by half, without roll-out, hops and "
        f"activations computed again; the peak is {peak_in_words}"
    )
    if stage == 2:
        progress.say(f"latents by {recipe.latents.method}, feedback gradient {recipe.latents.feedback_gradient}")
    clock, planned, before = log.Clock(peak_flops), _planned(context, stage, objective), done.updates
    train(
        engine,
        objective,
        windows,
        recipe,
        stage,
        updates,
        done,
        save=lambda: _save_checkpoint(engine, context.work, run, done, training.keep_checkpoints),
        clock=clock,
        progress=progress,
    )
    held_out = Sequences(inputs["latent_corpus"], "validation").without(rejected)
    if not len(held_out):
        progress.say("no sequence is held out, so there is no validation loss (data.validation_fraction)")
    validation = validate(engine, objective, windows, held_out)
    if ranks.first:
        # Tensors of their own in host memory: DeepSpeed's are views of one, which safetensors refuses.
        for parameter in model.parameters():
            parameter.data = parameter.data.to("cpu", getattr(torch, training.precision), copy=True)
        save_model(model, processor, context.out, _settings(recipe, stage, origins(inputs, teachers)))
        if projectors is not None:
            tensors = {name: tensor.float().cpu().contiguous() for name, tensor in projectors.state_dict().items()}
            save_file(tensors, context.out / "projectors.safetensors")
        log.write_log(done.rows, objective.teachers, context.out / "training_log.parquet")
        log.plot(done.rows, objective.teachers, context.out / "loss.png")
    ranks.wait()
    report = _report(done, validation, objective, windows, clock)
    peak_bytes = ranks.largest(torch.cuda.max_memory_allocated(ranks.device)) if ranks.device.type == "cuda" else None
    if planned is None or done.updates == before:
        return report
    # Of a run that went on, the seconds of an update stand for those before.
    seconds = report.timings["training_seconds"] * done.updates / (done.updates - before)
    return replace(report, timings={**report.timings, **price.against_plan(planned, seconds, peak_bytes)})


def _planned(context: StageContext, stage: Literal[1, 2], objective: Objective) -> price.Price | None:
    """What the stage was expected to cost; None where the corpora do not say how large they are."""
    corpus = workload.counted_corpus(context.recipe, context.inputs["cot_corpus"], context.inputs["latent_corpus"])
    if corpus is None:
        return None
    return price.training_price(context.recipe, stage, corpus, objective.shape, context.stage)


def _settings(recipe: Recipe, stage: int, teachers: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What generation must know about how the model was trained, and whoever publishes it about its teachers."""
    if stage == 1:
        return {"stage": 1}
    slots = {"slots": recipe.latents.slots, "control_tokens": recipe.latents.control_tokens}
    return {"stage": 2, "block": recipe.alignment.block, **slots, "teachers": teachers}


def _report(
    done: Done, validation: dict[str, float], objective: Objective, windows: Windows, clock: log.Clock
) -> StageReport:
    last, teachers = done.rows[-1], objective.teachers
    wrong = log.not_finite(done.rows, validation)
    detail = f"not finite: {', '.join(wrong[:5])}" if wrong else f"all losses of {done.updates} updates are finite"
    trained = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    return StageReport(
        summary={
            "updates": done.updates,
            "records_per_update": windows.records,
            "supervised_tokens_last_update": int(last["supervised_tokens"]),
            "trained_parameters": trained,
            "token_digest": done.token_digest,
            **{name: last[name] for name in last if name.split("/")[0] in ("loss", "ce", "alignment", "control")},
            **validation,
        },
        tables={"Training": log.table(last, validation, teachers)},
        plots=("loss.png",),
        checks=(Check("losses_are_finite", not wrong, detail, {"not_finite": wrong}),),
        timings=clock.totals(),
    )


# ------------------------------------------------------------------------------------------------------ checkpoints


def _save_checkpoint(engine: Engine, work: Path, run: Mapping[str, Any], done: Done, keep: int) -> None:
    """All ranks give their share of the state; the first one writes it."""
    tensors = engine.state()
    if engine.ranks.first:
        checkpoint.write(work, done.updates, tensors, {"run": run, "done": asdict(done)}, keep)
    else:
        for _ in tensors:
            pass
    engine.ranks.wait()


def _resume(engine: Engine, work: Path, run: Mapping[str, Any], progress: Progress) -> Done:
    found = checkpoint.newest(work, run)
    if found is None:
        return Done()
    done = Done(**found.state["done"])
    engine.load_state(found.tensors(), done.updates)
    progress.say(f"going on after update {done.updates}, from {found.folder.name}")
    return done


def _run_of(context: StageContext, stage: Literal[1, 2], training: TrainingRecipe) -> dict[str, Any]:
    """Equal for runs that go through the same states: recipe fields, inputs, and the records of each window.

    Left out is how a window is divided and how often a checkpoint is written, so that a run may go on with another
    number of processes, as long as micro_batch x accumulation x processes stays.
    """
    recipe, name = context.recipe, f"stage{stage}"
    divided = {"micro_batch", "accumulation", "checkpoint_every", "keep_checkpoints", "engine"}
    fields: dict[str, Any] = {"seed": recipe.seed, name: training.model_dump(mode="json", exclude=divided)}
    if stage == 2:
        fields |= {"latents": recipe.latents.model_dump(), "alignment": recipe.alignment.model_dump(mode="json")}
    return {
        "stage": context.stage,
        **fields,
        f"{name}.micro_batch x {name}.accumulation x runtime.processes": schedule.records_per_update(
            training, recipe.runtime.processes
        ),
        "input": {name: _likeness(path)[:12] for name, path in sorted(context.inputs.items())},
    }


def _likeness(artifact: Path, ends_bytes: int = 2**20) -> str:
    """A digest of an artifact's file names, sizes, and the first and last MiB of each file.

    The runner holds inputs against their full digests; this only has to notice that an input was made again between a
    kill and the resume, without reading a terabyte of features.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in artifact.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(artifact).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ends_bytes))
            file.seek(max(ends_bytes, size - ends_bytes))
            digest.update(file.read())
    return digest.hexdigest()
