"""Four studies of the method on drawn tiles, each a stage.

    method_check     latents with and without alignment against everything that could explain a gain away; whether the
                     model needs what its latents hold; where they hold it; what happens from step to step
    gradient_check   the gradient through the fed-back states: cut, chains of 1, 2 and 4, full (in all other studies)
    encoder_check    teachers of different knowledge, alone and together
    chain_check      chains of growing length: what is right, and how much of the attention is on the picture, by step

In: the recipe's `study` section. Out: rows as parquet, plots, and `result.md`, the tables and what follows from them.
Always: every arm is tried at the same learning rates with the search seed, and trained with every seed at the one that
was best; no seed is left out; equal inputs give equal bytes, and seconds stand in the timings only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from valr_ops.evaluation.findings import save_figure
from valr_ops.recipe.recipe import override
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.studies.arms import ARMS
from valr_ops.studies.courses import Course, Taken, take
from valr_ops.studies.telling import Findings, chain_tables, draw_chains, draw_curves, draw_inside, tables

METHOD = ("sft", "markers", "latents", "aligned", "untrained", "another", "pads", "sft_image", "sft_step")
GRADIENT = ("cut", "hops_1", "hops_2", "hops_4", "aligned")
ENCODERS = ("colour", "form", "colour_form", "three", "aligned")
CHAINS = ("sft", "latents", "aligned")
_QUICK = {
    "method_check": ("sft", "aligned"),
    "gradient_check": ("cut", "aligned"),
    "encoder_check": ("colour", "colour_form"),
    "chain_check": ("sft", "aligned"),
}
_QUICK_BOUNDS = {"updates": 275, "pictures": 256}
"""With its seed and rate the aligned arm has just learned the task after so many updates."""


def build_method_check(context: StageContext) -> StageReport:
    """Stage `method_check`."""
    return _build(context, METHOD, against=("sft", "latents", "aligned"))


def build_gradient_check(context: StageContext) -> StageReport:
    """Stage `gradient_check`."""
    return _build(context, GRADIENT, against=("aligned",))


def build_encoder_check(context: StageContext) -> StageReport:
    """Stage `encoder_check`."""
    return _build(context, ENCODERS, against=("colour", "aligned"))


def build_chain_check(context: StageContext) -> StageReport:
    """Stage `chain_check`."""
    found = {}
    for steps in context.recipe.study.chain_steps:
        of_length = replace(context, recipe=override(context.recipe, {"study.steps": steps}))
        found[steps] = _take(of_length, CHAINS, ("sft", "latents"))
    written = chain_tables(found)
    rows = [{"steps": steps, **row} for steps, one in found.items() for row in _curves(one.taken)]
    readings = [{"steps": steps, **row} for steps, one in found.items() for row in _readings(one.taken)]
    summary: dict[str, int | float | str] = {}
    seconds: dict[str, float] = {}
    for steps, one in found.items():
        summary |= {f"{key}_{steps}_steps": value for key, value in _summary(one).items()}
        seconds |= {f"cpu_seconds_{arm}_{steps}_steps": one.seconds(arm) for arm in one.taken}
    return _report(context, written, {"chains": draw_chains(found)}, rows, readings, summary, seconds)


def _build(context: StageContext, arms: Sequence[str], *, against: Sequence[str]) -> StageReport:
    found = _take(context, arms, against)
    plots = {"curves": draw_curves(found), "inside": draw_inside(found)}
    seconds = {f"cpu_seconds_{arm}": found.seconds(arm) for arm in found.taken}
    rows, readings = _curves(found.taken), _readings(found.taken)
    return _report(context, tables(found), plots, rows, readings, _summary(found), seconds)


def _take(context: StageContext, arms: Sequence[str], against: Sequence[str]) -> Findings:
    """The courses of `arms`, or of those of the quick form."""
    if context.recipe.study.quick:
        arms = _QUICK[context.stage]
        fewer = {
            f"study.{field}": min(bound, getattr(context.recipe.study, field)) for field, bound in _QUICK_BOUNDS.items()
        }
        context = replace(context, recipe=override(context.recipe, fewer))
    study = context.recipe.study
    best = _search(context, arms)
    seeds = study.seeds[:1] if study.quick else study.seeds
    courses = [Course(arm, seed, best[arm].learning_rate) for arm in arms for seed in seeds]
    taken: dict[str, list[Taken]] = {}
    for course, one in take(context.recipe, courses, _kept(context), context.progress, "courses").items():
        taken.setdefault(course.arm, []).append(one)
    return Findings(taken, study, context.recipe.evaluation.confidence, tuple(arm for arm in against if arm in arms))


def _kept(context: StageContext) -> Path:
    """Where courses are: one folder for all studies."""
    return (context.cache or context.work).parent / "courses"


def _report(
    context: StageContext,
    written: Mapping[str, str],
    plots: Mapping[str, Figure],
    curves: Sequence[Mapping[str, object]],
    readings: Sequence[Mapping[str, object]],
    summary: Mapping[str, int | float | str],
    seconds: Mapping[str, float],
) -> StageReport:
    text = "\n\n".join([f"# {context.stage}", *(f"## {title}\n\n{table}" for title, table in written.items())])
    (context.out / "result.md").write_text(text + "\n", encoding="utf-8")
    for name, figure in plots.items():
        save_figure(figure, context.out, name)
    _write_rows(context, "curves", curves)
    _write_rows(context, "readings", readings)
    return StageReport(summary=summary, tables=written, plots=tuple(f"{name}.png" for name in plots), timings=seconds)


def _summary(found: Findings) -> dict[str, int | float | str]:
    summary: dict[str, int | float | str] = {}
    for arm, courses in found.taken.items():
        right = found.right(arm)
        summary |= {"seeds": len(courses), f"right_{arm}": right.value}
        if not math.isnan(right.low):
            summary |= {f"right_{arm}_low": right.low, f"right_{arm}_high": right.high}
        summary[f"learning_rate_{arm}"] = courses[0].course.learning_rate
    return summary


def _search(context: StageContext, arms: Sequence[str]) -> Mapping[str, Course]:
    """Of every arm the course of the search seed after which most steps are right; the lower rate where they tie."""
    study = context.recipe.study
    if study.quick:
        return {arm: Course(arm, study.search_seed, study.stage1_learning_rate) for arm in arms}
    courses = [Course(arm, study.search_seed, rate) for arm in arms for rate in sorted(study.learning_rates)]
    found = take(context.recipe, courses, _kept(context), context.progress, "learning rates")
    searched = _curves({arm: [found[one] for one in courses if one.arm == arm] for arm in arms})
    _write_rows(context, f"search_{study.steps}_steps", searched)
    return {
        arm: max((one for one in courses if one.arm == arm), key=lambda one: found[one].curve[-1]["accuracy"])
        for arm in arms
    }


def _curves(taken: Mapping[str, Sequence[Taken]]) -> list[dict[str, object]]:
    return [
        {
            "arm": arm,
            "what": ARMS[arm].summary,
            "seed": one.course.seed,
            "learning_rate": one.course.learning_rate,
            "flops": int(row["update"]) * one.flops,
            **row,
        }
        for arm, courses in taken.items()
        for one in courses
        for row in one.curve
    ]


def _readings(taken: Mapping[str, Sequence[Taken]]) -> list[dict[str, object]]:
    """A row for every number that was read inside a model: by step, block, condition or count of segments."""
    return [
        {"arm": arm, "seed": one.course.seed, "reading": reading, "at": str(at), "value": value}
        for arm, courses in taken.items()
        for one in courses
        for reading, values in one.readings.items()
        for at, value in (values.items() if isinstance(values, dict) else enumerate(values))
    ]


def _write_rows(context: StageContext, name: str, rows: Sequence[Mapping[str, object]]) -> None:
    columns = dict.fromkeys(key for row in rows for key in row)
    table = pa.table({key: pa.array([row.get(key) for row in rows]) for key in columns})
    pq.write_table(table, context.out / f"{name}.parquet")
