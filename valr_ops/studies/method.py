"""Three studies of the method on drawn tiles, each a stage: `method_check`, `gradient_check` and `encoder_check`.

    method_check     latents with and without alignment against everything that could explain a gain away; whether the
                     model needs what its latents hold; where they hold it; what happens from step to step
    gradient_check   the gradient through the fed-back states: cut, chains of 1, 2 and 4, full
    encoder_check    teachers of different knowledge, alone and together

In: the recipe's `study` section. Out: rows as parquet, plots, and `result.md`, the tables and what follows from them.
Always: every arm is tried at the same learning rates with the search seed, and trained with every seed at the one that
was best; no seed is left out; equal inputs give equal bytes, and seconds stand in the timings only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from valr_ops.evaluation.findings import save_figure
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.studies.arms import ARMS
from valr_ops.studies.courses import Course, Taken, take
from valr_ops.studies.telling import Findings, draw_curves, draw_inside, tables

METHOD = ("sft", "markers", "latents", "aligned", "untrained", "another", "pads", "sft_image", "sft_step")
GRADIENT = ("cut", "hops_1", "hops_2", "hops_4", "full")
ENCODERS = ("colour", "form", "colour_form", "three", "aligned")
_QUICK = {"method_check": ("sft", "latents", "aligned"), "gradient_check": ("cut", "full")}
_QUICK_SEEDS = 2


def build_method_check(context: StageContext) -> StageReport:
    """Stage `method_check`."""
    return _build(context, METHOD, against=("sft", "latents"))


def build_gradient_check(context: StageContext) -> StageReport:
    """Stage `gradient_check`."""
    return _build(context, GRADIENT, against=("full",))


def build_encoder_check(context: StageContext) -> StageReport:
    """Stage `encoder_check`."""
    return _build(context, ENCODERS, against=("colour", "aligned"))


def _build(context: StageContext, arms: Sequence[str], *, against: Sequence[str]) -> StageReport:
    recipe = context.recipe
    if recipe.study.quick:
        arms = _QUICK.get(context.stage, arms)
    searched = _search(context, arms)
    taken: dict[str, list[Taken]] = {}
    seeds = recipe.study.seeds[:_QUICK_SEEDS] if recipe.study.quick else recipe.study.seeds
    rates = {arm: best.learning_rate for arm, best in searched.items()}
    courses = [Course(arm, seed, rates[arm]) for arm in arms for seed in seeds]
    for course, one in take(recipe, courses, context.work, context.progress, "courses").items():
        taken.setdefault(course.arm, []).append(one)
    found = Findings(taken, recipe.study, recipe.evaluation.confidence, tuple(against))
    written = tables(found)
    text = "\n\n".join([f"# {context.stage}", *(f"## {title}\n\n{table}" for title, table in written.items())])
    (context.out / "result.md").write_text(text + "\n", encoding="utf-8")
    plots = {"curves": draw_curves(found), "inside": draw_inside(found)}
    for name, figure in plots.items():
        save_figure(figure, context.out, name)
    _write_rows(context, "curves", _curves(taken))
    _write_rows(context, "readings", _readings(taken))
    summary: dict[str, int | float | str] = {"seeds": len(seeds)}
    for arm in arms:
        right = found.right(arm)
        summary |= {f"right_{arm}": right.value, f"right_{arm}_low": right.low, f"right_{arm}_high": right.high}
        summary[f"learning_rate_{arm}"] = rates[arm]
    seconds = {f"cpu_seconds_{arm}": found.seconds(arm) for arm in arms}
    return StageReport(summary=summary, tables=written, plots=tuple(f"{name}.png" for name in plots), timings=seconds)


def _search(context: StageContext, arms: Sequence[str]) -> Mapping[str, Course]:
    """Of every arm the course of the search seed after which most steps are right; the lower rate where they tie."""
    study = context.recipe.study
    if study.quick:
        return {arm: Course(arm, study.search_seed, study.stage1_learning_rate) for arm in arms}
    courses = [Course(arm, study.search_seed, rate) for arm in arms for rate in sorted(study.learning_rates)]
    found = take(context.recipe, courses, context.work, context.progress, "learning rates")
    _write_rows(context, "search", _curves({arm: [found[one] for one in courses if one.arm == arm] for arm in arms}))
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
