"""Three studies inside a model, each a stage: `visual_decay`, `latent_check` and `alignment_maps`.

    visual_decay     how much attention each step gives to the image, and what an answer is worth that sees no image
                     after step i: does looking fade, and does it matter?
    latent_check     answers with other things in the latents' place: does the model use them?
    alignment_maps   cosine of the latents to each teacher's features, patch by patch and step by step, beside the same
                     to another image: is it this picture that they hold, or any?

In: model folders and questions; for the maps the held-out records and their features. Out: rows as parquet, a plot as
PNG and SVG, and `result.md`, the few sentences of `valr_ops.evaluation.findings` that follow from the rows.
Always: every condition asks the same items; equal inputs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from valr_ops.data.batching import Collator
from valr_ops.data.corpus import ImageStore
from valr_ops.data.records import BadRecord
from valr_ops.data.sequences import Sequence as LatentSequence
from valr_ops.data.sequences import Sequences
from valr_ops.evaluation.findings import (
    NEVER_HIDDEN,
    Row,
    check_sentences,
    condition_table,
    decay_sentences,
    draw_alignment_maps,
    draw_latent_check,
    draw_visual_decay,
    first_and_last,
    map_sentences,
    masking_table,
    mean,
    of_records,
    save_figure,
)
from valr_ops.evaluation.interventions import (
    CONDITIONS,
    LOOKED_AT,
    Answered,
    Attention,
    ProbeError,
    StudyItem,
    Subject,
    ask,
    attention,
    latent_intervention,
    open_subject,
)
from valr_ops.evaluation.run import Prediction, open_benchmarks, scored_rows
from valr_ops.model import latents
from valr_ops.model.alignment import Projector, Projectors, upsampling_matrix
from valr_ops.model.answering import Generation
from valr_ops.model.decoding import Intervention
from valr_ops.recipe.recipe import AlignmentRecipe
from valr_ops.store.artifacts import Check, StageContext, StageReport
from valr_ops.store.progress import Progress
from valr_ops.teachers.features import open_features, rejected_records

Value = TypeVar("Value")

_MOST_CUTS = 8
"""Each asks all items once more."""
_TOLERATED_SUM = 1e-4
_PICTURE_PIXELS = 128


# ----------------------------------------------------------------------------------------------------- visual decay


def build_visual_decay(context: StageContext) -> StageReport:
    """Stage `visual_decay`, of every model among the inputs.

    Raises:
        ProbeError: no item can be asked. Beside it what opening benchmarks and models raises.
    """
    items, confidence = study_items(context), context.recipe.evaluation.confidence
    looked: list[Row] = []
    masked: list[Row] = []
    for name in _models(context):
        # The model has no name here, so that it is gone before the next one is opened.
        looking, masking = visual_decay(
            name, open_subject(context.inputs[name], context.recipe), items, context.progress
        )
        looked += looking
        masked += masking
    sentences = decay_sentences(looked, masked, confidence)
    _write(context, "Visual decay", sentences, draw_visual_decay(looked, masked, confidence))
    _write_rows(context.out / "attention.parquet", looked)
    _write_rows(context.out / "masked.parquet", masked)
    summary: dict[str, int | float | str] = {"items": len(items)}
    for name in _models(context):
        first, last = first_and_last(looked, name)
        summary |= {f"image_attention_first_{name}": mean(first), f"image_attention_last_{name}": mean(last)}
        for cut in sorted({row["image_steps"] for row in masked if row["model"] == name}):
            right = [row["correct"] for row in masked if (row["model"], row["image_steps"]) == (name, cut)]
            summary[f"accuracy_{name}" + ("" if cut == NEVER_HIDDEN else f"_images_to_{cut}")] = mean(right)
    return StageReport(
        summary=summary,
        tables={"What follows": "\n\n".join(sentences), "Images hidden": masking_table(masked, confidence)},
        plots=("visual_decay.png",),
        checks=(_attention_adds_up(looked),),
    )


def visual_decay(
    name: str, subject: Subject, items: Sequence[StudyItem], progress: Progress | None = None
) -> tuple[list[Row], list[Row]]:
    """How the model called `name` looks at its images, and what it says when it can't any more.

    Returns:
        A row an item, step and kind of position (`text` or `segment`) with the shares of attention, means over
        positions, heads and blocks, and `even_image`, what the image would get if all that may be seen got the same.
        And a row an item and number of steps after which its images were hidden: 0, where the model never saw them,
        up to the lines of the median answer; `NEVER_HIDDEN` beside them.
    """
    normal = ask(subject, items, label=f"{name}, as it is", progress=progress)
    seen = attention(subject, items, normal)
    looked: list[Row] = [
        {"model": name, "item": item.id, **row}
        for item, one, of_item in zip(items, normal, seen, strict=True)
        for row in _looking(one, of_item)
    ]
    lines = int(np.median([one.steps[-1] for one in normal]))
    masked = _masking(name, items, NEVER_HIDDEN, normal, normal)
    for cut in sorted({round(float(at)) for at in np.linspace(0, lines - 1, min(lines, _MOST_CUTS))}):
        label = f"{name}, images to step {cut}"
        blind = ask(subject, items, Intervention(image_steps=cut), label=label, progress=progress)
        masked += _masking(name, items, cut, blind, normal)
    return looked, masked


def _looking(one: Answered, seen: Attention) -> Iterator[Row]:
    steps, shares = torch.tensor(one.steps[:-1]), seen.shares.double().mean(dim=0)
    for step in sorted(set(steps.tolist())):
        for positions, kind in (("segment", seen.in_segment), ("text", ~seen.in_segment)):
            here = (steps == step) & kind
            if here.any():
                yield {
                    "step": step,
                    "last_line": step == one.steps[-1],
                    "positions": positions,
                    "count": int(here.sum()),
                    **dict(zip(LOOKED_AT, shares[here].mean(dim=0).tolist(), strict=True)),
                    "even_image": float(seen.even[here, LOOKED_AT.index("image")].double().mean()),
                }


def _masking(
    name: str, items: Sequence[StudyItem], cut: int, said: Sequence[Answered], normal: Sequence[Answered]
) -> list[Row]:
    return [{"model": name, "image_steps": cut, **row} for row in _outcomes(items, said, normal)]


def _outcomes(items: Sequence[StudyItem], said: Sequence[Answered], normal: Sequence[Answered]) -> Iterator[Row]:
    for item, one, before in zip(items, said, normal, strict=True):
        yield {
            "item": item.id,
            "cluster": item.cluster,
            "correct": one.correct,
            "changed": one.generation.visible_text != before.generation.visible_text,
            "segments": one.generation.segments,
            "latent_steps": one.generation.latent_steps,
            "finish_reason": one.generation.finish_reason,
            "output": one.generation.text,
        }


def _attention_adds_up(looked: Sequence[Row]) -> Check:
    off = max((abs(1.0 - sum(row[kind] for kind in LOOKED_AT)) for row in looked), default=0.0)
    detail = f"the shares of {len(looked)} steps differ from 1 by {off:.1g} at most"
    if not looked:
        detail = "no answer has two ids, so there is no attention to speak of; look at masked.parquet"
    elif off > _TOLERATED_SUM:
        detail += "; a kind of position is missing in valr_ops.evaluation.interventions.LOOKED_AT"
    return Check("attention_adds_up", bool(looked) and off <= _TOLERATED_SUM, detail)


# ----------------------------------------------------------------------------------------------------- latent check


def build_latent_check(context: StageContext) -> StageReport:
    """Stage `latent_check`, of the one model among the inputs.

    Raises:
        ProbeError: no item can be asked, or the model has no latents. Beside it as `build_visual_decay`.
    """
    (name,) = _models(context)
    items, confidence = study_items(context), context.recipe.evaluation.confidence
    subject = open_subject(context.inputs[name], context.recipe)
    rows, left_out = latent_check(subject, items, context.recipe.seed, context.progress)
    sentences = check_sentences(name, rows, left_out, confidence)
    _write(context, "Are the latents used?", sentences, draw_latent_check(rows, confidence))
    _write_rows(context.out / "answers.parquet", rows)
    summary: dict[str, int | float | str] = {"items": len(items)}
    for condition in dict.fromkeys(row["condition"] for row in rows):
        of_condition = [row for row in rows if row["condition"] == condition]
        summary[f"accuracy_{condition}"] = mean([row["correct"] for row in of_condition])
        summary[f"changed_{condition}"] = mean([row["changed"] for row in of_condition])
        summary[f"latent_trigger_rate_{condition}"] = mean([row["segments"] > 0 for row in of_condition])
    return StageReport(
        summary=summary,
        tables={"What follows": "\n\n".join(sentences), "Conditions": condition_table(rows, confidence)},
        plots=("latent_check.png",),
    )


def latent_check(
    subject: Subject, items: Sequence[StudyItem], seed: int, progress: Progress | None = None
) -> tuple[list[Row], list[str]]:
    """What the model says with its latents as they are, and with other things in their place.

    Returns:
        A row an item and condition (`CONDITIONS`), and in words why a condition was left out. A model that opens no
        segment would say the same under all of them, so it is asked once.

    Raises:
        ProbeError: the model has no latents.
    """
    if not subject.has_latents:
        raise ProbeError(
            "this model has no latents (config.valr has no slots), so there is nothing to put in their place; give the "
            "artifact of a stage 2"
        )
    normal = ask(subject, items, label="normal", progress=progress)
    said, left_out = {"normal": normal}, []
    for condition in CONDITIONS[1:] if any(one.generation.segments for one in normal) else ():
        try:
            intervention = latent_intervention(condition, items, normal, seed)
        except ProbeError as reason:
            left_out.append(f"`{condition}` was left out: {reason}.")
        else:
            said[condition] = ask(subject, items, intervention, label=condition, progress=progress)
    rows: list[Row] = [
        {"condition": condition, **row}
        for condition, answers in said.items()
        for row in _outcomes(items, answers, normal)
    ]
    return rows, left_out


# --------------------------------------------------------------------------------------------------- alignment maps


def build_alignment_maps(context: StageContext) -> StageReport:
    """Stage `alignment_maps`: the held-out records with targets, teacher-forced through the one model among the inputs.

    Raises:
        ProbeError: no held-out record has a target, all targets are on one image, or the model has no projectors.
        Beside it what opening model, features and corpus raises.
    """
    recipe, inputs = context.recipe, context.inputs
    (name,) = _models(context)
    subject, images = open_subject(inputs[name], recipe), ImageStore(inputs["cot_corpus"])
    teachers = recipe.alignment.teachers
    sources = open_features(context, teachers, images, recipe.runtime.device)
    dimensions = {teacher: source.dim for teacher, source in sources.items()}
    projectors = load_projectors(inputs[name], dimensions, subject, recipe.alignment)
    held_out = Sequences(inputs["latent_corpus"], "validation").without(rejected_records(inputs, teachers))
    places = spread(np.flatnonzero(held_out.segments).tolist(), recipe.evaluation.study_items)
    sequences = [one for place in places if any((one := held_out[place]).targets)]
    if not sequences:
        raise ProbeError("no held-out record has a segment with a target; raise data.validation_fraction")
    collate = Collator(images, subject.processor, recipe.latents, max_length=recipe.data.max_length)
    size = recipe.stage2.micro_batch
    starts = context.progress.track(range(0, len(sequences), size), "records, batches")
    states = torch.cat([segment_states(subject, collate, sequences[start : start + size]) for start in starts])
    targets = [target for one in sequences for target in one.targets if target is not None]
    maps = [
        row
        for teacher, source in sources.items()
        for row in alignment_maps(
            teacher,
            projectors[teacher],  # type: ignore[arg-type]
            sequences,
            states,
            source.features(targets),
            recipe.alignment.upsample,
        )
    ]
    confidence = recipe.evaluation.confidence

    def picture(row: Row) -> PIL.Image.Image:
        side = (_PICTURE_PIXELS, _PICTURE_PIXELS)
        return images.load(row["digest"], row["box"]).resize(side, PIL.Image.Resampling.BICUBIC)

    sentences = map_sentences(name, maps, confidence)
    _write(context, "Alignment maps", sentences, draw_alignment_maps(maps, picture, confidence))
    _write_rows(context.out / "maps.parquet", maps)
    summary: dict[str, int | float | str] = {"records": len(sequences), "segments": len(targets)}
    for teacher in teachers:
        own, other = of_records(maps, teacher)
        summary |= {f"cosine_{teacher}": mean(own), f"cosine_other_image_{teacher}": mean(other)}
    return StageReport(
        summary=summary,
        tables={"What follows": "\n\n".join(sentences)},
        plots=("alignment_maps.png",),
        checks=(_maps_are_finite(maps),),
    )


def load_projectors(
    folder: Path, dimensions: Mapping[str, int], subject: Subject, recipe: AlignmentRecipe
) -> Projectors:
    """The projectors that the stage-2 model in `folder` was trained with, of the teachers in `dimensions`.

    Raises:
        ProbeError: it has none, or none of one of them.
    """
    path = folder / "projectors.safetensors"
    if not path.is_file():
        raise ProbeError(f"{folder.name} has no projectors.safetensors: it was trained without alignment; take another")
    tensors = load_file(path)
    missing = sorted(dimensions.keys() - {name.split(".")[0] for name in tensors})
    if missing:
        raise ProbeError(
            f"{folder.name} was trained without the teacher {', '.join(missing)}; set alignment.teachers to those that "
            "it was trained with"
        )
    projectors = Projectors(dimensions, subject.model.lm_head.in_features, recipe)
    projectors.load_state_dict({name: one for name, one in tensors.items() if name.split(".")[0] in dimensions})
    return projectors.to(subject.model.device)


@torch.no_grad()
def segment_states(subject: Subject, collate: Collator, sequences: list[LatentSequence]) -> Tensor:
    """[segments with a target, K, hidden]: outputs of the aligned block at the slots, in reading order."""
    batch = collate(sequences).to(subject.model.device)
    block = int(subject.model.config.valr["block"])
    states = latents.forward(subject.model, batch, method="two_pass", block=block).states
    assert states is not None, "records were chosen for their targets"
    return states[[place for place, target in enumerate(batch.targets) if target is not None]]


@torch.no_grad()
def alignment_maps(
    teacher: str,
    projector: Projector,
    sequences: Sequence[LatentSequence],
    states: Tensor,
    features: Sequence[Tensor],
    upsample: str,
) -> list[Row]:
    """A row for every segment with a target, in reading order; S of them. Maps are row-major lists.

    Args:
        states: [S, K, hidden].
        features: S of [h, w, D].
        upsample: how K slots become h x w patches (`AlignmentRecipe.upsample`).

    Raises:
        ProbeError: all targets are on one image.
    """
    aimed = [
        (one, number, target) for one in sequences for number, target in enumerate(one.targets) if target is not None
    ]
    steps = [(target.digest, one.segments[number].step) for one, number, target in aimed]
    rows: list[Row] = []
    for place, (foreign, (one, number, target)) in enumerate(zip(controls(steps), aimed, strict=True)):
        own, other = (_cosines(projector, states[place], features[at], upsample) for at in (place, foreign))
        height, width, _ = features[place].shape
        rows.append(
            {
                "record": one.id,
                "segment": number,
                "step": one.segments[number].step,
                "teacher": teacher,
                "digest": target.digest,
                "box": target.box,
                "rows": height,
                "columns": width,
                "cosine": own,
                "cosine_other_image": other,
                "other_digest": steps[foreign][0],
            }
        )
    return rows


def controls(targets: Sequence[tuple[str, int]]) -> list[int]:
    """For every target (digest of its image, step) the place of the next one on another image.

    One of the same step is preferred: it tends to look at the same part of its picture, so that the picture is all that
    differs.

    Raises:
        ProbeError: all are on one image.
    """
    found = []
    for place, (digest, step) in enumerate(targets):
        following = [*range(place + 1, len(targets)), *range(place)]
        elsewhere = [other for other in following if targets[other][0] != digest]
        if not elsewhere:
            raise ProbeError(
                f"all {len(targets)} targets are on one image, so there is no other one to compare with; raise "
                "data.validation_fraction or evaluation.study_items"
            )
        found.append(next((other for other in elsewhere if targets[other][1] == step), elsewhere[0]))
    return found


def _cosines(projector: Projector, slots: Tensor, features: Tensor, upsample: str) -> list[float]:
    """[h * w]: of the patches that `slots` [K, hidden] predict to `features` [h, w, D]."""
    height, width, _ = features.shape
    matrix = upsampling_matrix(len(slots), height, width, upsample).to(slots)
    predicted = projector(slots[None], matrix)[0]
    cosines: list[float] = F.cosine_similarity(predicted, features.flatten(0, 1).to(predicted), dim=-1).tolist()
    return cosines


def _maps_are_finite(maps: Sequence[Row]) -> Check:
    wrong = [row for row in maps if not np.isfinite([*row["cosine"], *row["cosine_other_image"]]).all()]
    detail = f"all {len(maps)} maps are finite"
    if wrong:
        detail = (
            f"{len(wrong)} of {len(maps)} maps are not finite, first {wrong[0]['record']} with {wrong[0]['teacher']}; "
            f"look at the loss of the model and at teacher_features_{wrong[0]['teacher']}"
        )
    return Check("maps_are_finite", not wrong, detail)


# ------------------------------------------------------------------------------------------------------- of all three


def study_items(context: StageContext) -> list[StudyItem]:
    """`evaluation.study_items` of all items of the benchmarks, at equal distances.

    Raises:
        ProbeError: no picture of any of them can be decoded.
        BenchmarkError: nothing to ask, or a benchmark that is not whole.
    """
    questions = [(benchmark, item) for benchmark in open_benchmarks(context) for item in benchmark.items]
    items = []
    for benchmark, item in spread(questions, context.recipe.evaluation.study_items):
        try:
            prompt = benchmark.prompt(item)
        except BadRecord as error:
            context.progress.say(f"{benchmark.name}/{item.id} is left out: {error.detail}")
            continue

        def is_right(said: Generation, benchmark: Any = benchmark, item: Any = item) -> bool:
            given = Prediction(item.benchmark, item.id, said.text, 0, 0, 0, said.finish_reason)
            return bool(scored_rows([(benchmark, item)], [given])[0]["correct"])

        cluster = f"{benchmark.name}/{item.cluster}" if item.cluster else ""
        items.append(StudyItem(f"{benchmark.name}/{item.id}", prompt, is_right, cluster))
    if not items:
        raise ProbeError(f"the pictures of all {len(questions)} items are damaged; look at the benchmarks")
    return items


def spread(values: Sequence[Value], count: int) -> list[Value]:
    """At most `count` of `values` in order, at equal distances."""
    count = min(count, len(values))
    return [values[place * len(values) // count] for place in range(count)]


def _models(context: StageContext) -> list[str]:
    return [name for name in context.inputs if name.startswith(("stage1_", "stage2_"))]


def _write(context: StageContext, title: str, sentences: Sequence[str], figure: Figure) -> None:
    """`result.md`, and the figure under the name of the stage."""
    (context.out / "result.md").write_text("\n\n".join([f"# {title}", *sentences]) + "\n", encoding="utf-8")
    save_figure(figure, context.out, context.stage)


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
