"""Stage `scaling_curve`: VaLR-M at the lengths that it chooses, and at lengths that are imposed on it.

In: the scores of SFT and VaLR-M, VaLR-M itself, and the questions.
Out: what `valr_ops.evaluation.scaling.write_scaling` writes, for every benchmark with enough questions.
Always: observed lengths come from the scores, over all questions that could be shown; imposed budgets all meet the same
ones of these. Its seconds are measured, so the bytes of this artifact differ from run to run; nothing else in it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from valr_ops.evaluation.benchmarks import BenchmarkError, Item
from valr_ops.evaluation.interventions import Subject, open_subject
from valr_ops.evaluation.probes import spread
from valr_ops.evaluation.questions import Benchmark
from valr_ops.evaluation.run import Prediction, open_benchmarks, read_predictions, scored_rows
from valr_ops.evaluation.scaling import ImposedBudgets, imposed_budgets, observational_bins, write_scaling
from valr_ops.model.answering import generate_answers
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.store.progress import Progress

LEAST_ITEMS = 30
"""Of a benchmark; with fewer an interval is as wide as everything that there is to see."""
SEGMENTS, TOKENS = "max_segments", "max_reasoning_tokens"
_QUANTILES = (0.25, 0.5, 0.75)

Row = dict[str, Any]


def build_scaling_curve(context: StageContext) -> StageReport:
    """Stage `scaling_curve`.

    Raises:
        BenchmarkError: no benchmark has `LEAST_ITEMS` questions.
    """
    recipe, confidence = context.recipe, context.recipe.evaluation.confidence
    own, base = (read_predictions(context.inputs[name]) for name in ("scores_valr_m", "scores_sft"))
    least = min(LEAST_ITEMS, recipe.evaluation.limit or LEAST_ITEMS)
    shown = {(row["benchmark"], row["id"]) for row in own}
    asked = [
        (one, [item for item in one.items if (one.name, item.id) in shown])
        for one in open_benchmarks(context)
        if len(one.items) >= least
    ]
    if not asked:
        raise BenchmarkError(
            f"no benchmark has {least} questions, and fewer show nothing about lengths; add one to "
            "evaluation.benchmarks"
        )
    observed = [
        observational_bins(_of(own, one), _of(base, one), length, confidence=confidence)
        for one, _ in asked
        for length in ("text_tokens", "decode_steps")
    ]
    subject = open_subject(context.inputs["stage2_valr_m"], recipe)
    imposed: list[ImposedBudgets] = []
    seconds = 0.0
    for benchmark, items in asked:
        items = spread(items, recipe.evaluation.study_items)
        for control, budgets in _budgets(_of(own, benchmark)).items():
            runs = {
                float(budget): _ask(subject, benchmark, items, {control: budget}, context.progress)
                for budget in budgets
            }
            seconds += sum(row["seconds"] for rows in runs.values() for row in rows)
            imposed.append(imposed_budgets(runs, control, confidence))
    tables = write_scaling(context.out, observed, imposed)
    summary: dict[str, int | float | str] = {"benchmarks": len(asked), "studies": len(observed) + len(imposed)}
    for one in imposed:
        summary |= {
            f"best_{one.control}_{one.benchmark}": one.best,
            f"stop_{one.control}_{one.benchmark}": one.stop.budget,
        }
    timings = {"answer_seconds": seconds}
    return StageReport(summary=summary, tables=tables, plots=("scaling.png",), timings=timings)


def _of(rows: Sequence[Row], benchmark: Benchmark) -> list[Row]:
    return [row for row in rows if row["benchmark"] == benchmark.name]


def _budgets(rows: Sequence[Row]) -> dict[str, list[int]]:
    """By control, budgets from nothing to what the model took by itself; controls that leave no choice are left out."""
    most = max(row["segments"] for row in rows)
    segments = sorted({0, most, *(2**power for power in range(6) if 2**power < most)})
    lengths = [row["text_tokens"] for row in rows]
    tokens = sorted({1, max(lengths), *(int(length) for length in np.quantile(lengths, _QUANTILES))})
    return {control: budgets for control, budgets in ((SEGMENTS, segments), (TOKENS, tokens)) if len(budgets) > 1}


def _ask(
    subject: Subject, benchmark: Benchmark, items: Sequence[Item], bound: dict[str, int], progress: Progress
) -> list[Row]:
    limits, size = subject.limits, subject.limits.batch_size
    predictions: list[Prediction] = []
    said = ", ".join(f"{control} {budget}" for control, budget in bound.items())
    for start in progress.track(range(0, len(items), size), f"{benchmark.name}, {said}, batches"):
        batch = items[start : start + size]
        generations = generate_answers(
            subject.model,
            subject.processor,
            [benchmark.prompt(item) for item in batch],
            max_new_tokens=limits.max_new_tokens,
            max_segments=bound.get(SEGMENTS, limits.max_segments),
            max_reasoning_tokens=bound.get(TOKENS),
            # A budget of no segment goes before a segment that is forced.
            force_first_latent=limits.force_first_latent and bound.get(SEGMENTS) != 0,
            settle=limits.latent_settle,
        )
        predictions += [
            Prediction(
                benchmark=benchmark.name,
                id=item.id,
                output=one.text,
                segments=one.segments,
                text_tokens=one.text_tokens,
                latent_steps=one.latent_steps,
                finish_reason=one.finish_reason,
                seconds=one.seconds,
            )
            for item, one in zip(batch, generations, strict=True)
        ]
    rows = scored_rows([(benchmark, item) for item in items], predictions)
    return [row | {"seconds": one.seconds} for row, one in zip(rows, predictions, strict=True)]
