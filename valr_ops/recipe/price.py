"""What stages cost before they run: hours, dollars, bytes, and the limit above which a stage does not run.

In: a recipe and the name of a stage; what corpora and weights say about themselves where they are made already, else
the recipe's caps and the means that it assumes. Out: a `Price` whose hours and dollars are ranges, with every
assumption behind it by value and origin; afterwards, what the run took beside what was planned.
The formulas are in `cost_training`, `cost_answers` and `cost_preparation`, one for each kind of stage.
Always: nothing is measured, nothing heavy is imported, and rows count with their mean length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from valr_ops.recipe import cost
from valr_ops.recipe.cost import Shape
from valr_ops.recipe.cost_answers import scores_price, study_price
from valr_ops.recipe.cost_preparation import NoPriceError, base_model_price, cpu_price, features_price
from valr_ops.recipe.cost_sheet import Price, Span, add, scaled, shown, too_large_for_scratch
from valr_ops.recipe.cost_training import training_price
from valr_ops.recipe.recipe import Recipe, RecipeError, override
from valr_ops.recipe.workload import Corpus, PriceError, assumed_corpus, made_corpus
from valr_ops.stages import ABLATION, STAGES, ablation_cells, stage

_ALTERNATIVES = (
    ("latents.feedback_gradient", "hops:1"),
    ("latents.feedback_gradient", "hops:2"),
    ("latents.feedback_gradient", "hops:4"),
    ("latents.feedback_gradient", "cut"),
    ("latents.method", "sequential"),
)
"""What may train in fewer hours than many hops; the last one keeps the whole gradient, on another way."""


class PriceRefusedError(PriceError):
    """A stage whose price is above the recipe's limit: the message says by how much, what costs most, and the fix."""


def price(recipe: Recipe, name: str, project: Path | None = None) -> Price:
    """What the stage `name` of a whole recipe costs.

    Args:
        recipe: of the project; the stage's own variant is applied here.
        name: a stage, or a cell of the ablation.
        project: folder with dvc.lock and artifacts/, whose corpora and base model are counted instead of assumed, if
            they were made from this recipe's data and base model.

    Raises:
        NoPriceError: a teacher of a class that has no formula.
        PriceError: a model or a number of records that is not known yet.
        RecipeError, UnknownStageError: no such stage or variant.
    """
    return _priced(recipe, name, *_workload(recipe, project))


def cell_prices(recipe: Recipe, project: Path | None = None) -> dict[str, Price]:
    """What each cell of the ablation costs that the recipe has a variant for, by its name; arguments as of `price`."""
    return _cell_prices(recipe, *_workload(recipe, project))


def _cell_prices(recipe: Recipe, corpus: Corpus, model: Shape) -> dict[str, Price]:
    cells = (cell for cell in ablation_cells() if cell in recipe.variants)
    return {cell: _priced(recipe, ablation_cells()[cell].name, corpus, model) for cell in cells}


def together(several: Iterable[Price]) -> tuple[Span, Span]:
    """Hours of all GPUs, and dollars, of several stages."""
    every = list(several)
    return add(scaled(one.total_hours, one.gpus) for one in every), add(one.dollars for one in every)


@dataclass(frozen=True)
class Overview:
    """What all stages of a recipe cost."""

    stages: Mapping[str, Price]
    """By name, in the order of the table of stages."""
    cells: Mapping[str, Price]
    """Those of the ablation, by name."""
    unpriced: Mapping[str, str]
    """By stage, why its price is not known."""
    refused: tuple[str, ...]
    """Stages and cells that would not be dispatched."""

    def rows(self) -> Iterable[tuple[str, ...]]:
        """What a person reads: (stage, where it runs, hours, dollars, GB written, GB read), with sums at the end."""

        def gigabytes(size: int) -> str:
            return f"{size / 1e9:,.1f}" if size >= 5e7 else ""

        def amount(span: Span) -> str:
            return shown(span, "{:,.2f}") if span[1] < 10 else shown(span)

        def total(name: str, several: Iterable[Price]) -> tuple[str, ...]:
            gpu_hours, dollars = together(several)
            return name, "all GPUs", amount(gpu_hours), amount(dollars), "", ""

        for name, one in self.stages.items():
            on = f"{one.gpus} GPU{'s' * (one.gpus > 1)}" if one.gpus else "CPU"
            sizes = one.written_bytes, sum(one.reads.values())
            yield name, on, amount(one.total_hours), amount(one.dollars), *map(gigabytes, sizes)
        yield total(f"{len(self.stages)} together", self.stages.values())
        if self.cells:
            yield total(f"{ABLATION}, {len(self.cells)} cells", self.cells.values())
            yield total("everything", self._all)

    def remarks(self) -> Iterable[str]:
        """What is not in the table, and what would not run."""
        for name, reason in self.unpriced.items():
            yield f"{name} is not among them: {reason.removeprefix(f'{name} ')}"
        if self.refused:
            stages = [name for name in self.refused if name in self.stages]
            cells = f"{len(self.refused) - len(stages)} cells" if len(self.refused) > len(stages) else ""
            first = stages[0] if stages else self.refused[0]
            yield (
                f"Not dispatched as they are: {', '.join(filter(None, [*stages, cells]))}; `valr plan --stage {first}` "
                "says why, and what costs less"
            )

    def document(self) -> dict[str, Any]:
        """The overview as plain JSON values."""

        def brief(one: Price) -> dict[str, Any]:
            found = one.document()
            kept = ("gpus", "dollars", "written_bytes", "disk_bytes", "remarks")
            return {"hours": one.total_hours, **{name: found[name] for name in kept}}

        gpu_hours, dollars = together(self._all)
        return {
            "stages": {name: brief(one) for name, one in self.stages.items()},
            "cells": {name: brief(one) for name, one in self.cells.items()},
            "unpriced": dict(self.unpriced),
            "refused": list(self.refused),
            "gpu_hours": gpu_hours,
            "dollars": dollars,
        }

    @property
    def _all(self) -> list[Price]:
        return [*self.stages.values(), *self.cells.values()]


def overview(recipe: Recipe, project: Path | None = None) -> Overview:
    """What every stage and every cell costs; arguments as of `price`.

    Raises:
        PriceError: a model or a number of records that is not known yet.
    """
    known = _workload(recipe, project)
    stages, unpriced = _stage_prices(recipe, *known)
    try:
        cells = _cell_prices(recipe, *known)
    except (PriceError, RecipeError) as reason:
        cells, unpriced[ABLATION] = {}, str(reason)
    refused = tuple(one.stage for one in (*stages.values(), *cells.values()) if any(_objections(recipe, one)))
    return Overview(stages, cells, unpriced, refused)


def stage_prices(recipe: Recipe, project: Path | None = None) -> dict[str, Price]:
    """What every stage costs whose price is known; arguments and errors as of `overview`."""
    return _stage_prices(recipe, *_workload(recipe, project))[0]


def _stage_prices(recipe: Recipe, corpus: Corpus, model: Shape) -> tuple[dict[str, Price], dict[str, str]]:
    stages, unpriced = {}, {}
    for row in STAGES:
        try:
            stages[row.name] = _priced(recipe, row.name, corpus, model)
        except (PriceError, RecipeError) as reason:
            unpriced[row.name] = str(reason)
    return stages, unpriced


def _workload(recipe: Recipe, project: Path | None) -> tuple[Corpus, Shape]:
    model = _model(recipe, project)
    return made_corpus(recipe, project) or assumed_corpus(recipe, model), model


def _priced(recipe: Recipe, name: str, corpus: Corpus, model: Shape) -> Price:
    row = stage(name)
    if row.group == "studies":
        raise PriceError(f"{name} trains many models of a million parameters, two to five hours of two CPU cores")
    if row.variant is not None:
        recipe = recipe.for_variant(row.variant)
    match row.function.rpartition(":")[2]:
        case "build_stage1":
            return training_price(recipe, 1, corpus, model, name)
        case "build_stage2":
            return training_price(recipe, 2, corpus, model, name)
        case "build_teacher_features":
            return features_price(recipe, row, corpus, model)
        case "build_base_model":
            return base_model_price(recipe, row, corpus, model)
        case "build_scores":
            return scores_price(recipe, row, corpus, model)
    return (study_price if row.resources == "gpu" else cpu_price)(recipe, row, corpus, model)


def _model(recipe: Recipe, project: Path | None) -> Shape:
    known = cost.shape(recipe)
    if known is not None:
        return known
    config = None if project is None else project / "artifacts" / "base_model" / "config.json"
    if config is None or not config.is_file():
        raise PriceError(
            f"only the checkpoint base.path={recipe.base.path} or base.hub_id={recipe.base.hub_id} says how large the "
            "model is; make base_model first: valr materialize +base_model"
        )
    values = json.loads(config.read_text("utf-8"))
    text, vision = SimpleNamespace(**values["text_config"]), SimpleNamespace(**values["vision_config"])
    tied = values["tie_word_embeddings"]
    return cost.shape_of(SimpleNamespace(get_text_config=lambda: text, vision_config=vision, tie_word_embeddings=tied))


# ------------------------------------------------------------------------------------------------ the limit, afterwards


def refuse(recipe: Recipe, name: str, project: Path | None = None) -> Price | None:
    """The price of a stage that is about to be dispatched; None for a stage that has none.

    Args: as of `price`.

    Raises:
        PriceRefusedError: the price may be above ``price.max_dollars`` or ``price.max_hours``, or the node's disk would
            be full.
        PriceError: the price of a stage that should have one is not known.
    """
    try:
        priced = price(recipe, name, project)
    except NoPriceError:
        return None
    told = refusal(recipe, priced, project)
    if told:
        raise PriceRefusedError(told)
    return priced


def refusal(recipe: Recipe, priced: Price, project: Path | None = None) -> str | None:
    """Why a stage of that price is not dispatched, or None where it is; `recipe` and `project` as `price` got them."""
    above, fill = _objections(recipe, priced)
    if not above:
        return f"{priced.stage} is not dispatched: {fill}" if fill else None
    told = [f"{priced.stage} is not dispatched: it may {above}"]
    if priced.flops:
        part, span = max(priced.flops.items(), key=lambda one: one[1][1])
        told.append(f"{span[1] / add(priced.flops.values())[1]:.0%} of its FLOPs at most: {part}")
        if part == "feedback hops":
            told += _cheaper(recipe, priced, project)
    if fill:
        told.append(f"Besides, {fill}")
    limits = {"max_dollars": priced.dollars[1], "max_hours": priced.total_hours[1]}
    more = (f"--set price.{name}={_above(most)}" for name, most in limits.items() if most > getattr(recipe.price, name))
    told.append(f"To run it all the same: {' '.join(more)}")
    return f"{'. '.join(told)}; `valr plan --stage {priced.stage}` shows where the figures come from"


def _objections(recipe: Recipe, priced: Price) -> tuple[str, str]:
    """By how much it is above the limit, and what does not fit on the node; empty where nothing is wrong."""
    limits, hours, dollars = recipe.price, priced.total_hours, priced.dollars
    above = []
    if dollars[1] > limits.max_dollars:
        above.append(f"cost {shown(dollars)} dollars, more than price.max_dollars={limits.max_dollars:,g}")
    if hours[1] > limits.max_hours:
        above.append(f"take {shown(hours)} hours, more than price.max_hours={limits.max_hours:,g}")
    fill = too_large_for_scratch(recipe, priced) if recipe.cluster.dispatch == "kubernetes" else None
    return " and ".join(above), fill or ""


def _above(value: float) -> str:
    """Two digits, rounded up."""
    digits = 10 ** max(math.floor(math.log10(value)) - 1, 0)
    return f"{math.ceil(value / digits) * digits:.0f}"


def _cheaper(recipe: Recipe, priced: Price, project: Path | None) -> Iterable[str]:
    """The settings that cost less than `priced`, each as it is typed and with its price."""
    now, offered = recipe.latents.feedback_gradient, []
    for field, value in _ALTERNATIVES:
        # Only the full gradient can be had on the other way.
        if field == "latents.method" and now != "full":
            continue
        other = price(override(recipe, {field: value}), priced.stage, project)
        if other.total_hours[1] >= priced.total_hours[1]:
            continue
        said = f"{shown(other.total_hours)} hours, {shown(other.dollars)} dollars"
        if field == "latents.method":
            said += ", the whole gradient as well"
        if _objections(recipe, other)[0]:
            said += ", still above the limit"
        offered.append(f"--set {field}={value} ({said})")
    yield f"latents.feedback_gradient={now} goes back through a row once a hop, up to once for each slot of a record"
    yield f"Instead: {', or '.join(offered)}; EVIDENCE.md says what each gave"


def against_plan(planned: Price, seconds: float, peak_bytes: float | None = None) -> dict[str, float]:
    """What a run took beside what was planned: figures for its timings.

    Args:
        planned: its price.
        seconds: of all its updates or batches, checkpoints included, without fetching and storing.
        peak_bytes: the most memory that tensors took on one GPU, None where that was not measured.

    Returns:
        ``planned_seconds_low`` and ``planned_seconds_high``, ``actual_seconds``, ``seconds_over_plan`` (1 is the
        geometric mean of the plan), and where memory was measured ``planned_peak_bytes``, ``peak_bytes`` and
        ``peak_bytes_over_plan``.
    """
    low, high = planned.working_seconds
    found = {
        "planned_seconds_low": low,
        "planned_seconds_high": high,
        "actual_seconds": seconds,
        "seconds_over_plan": seconds / math.sqrt(low * high),
    }
    if peak_bytes is not None:
        found |= {
            "planned_peak_bytes": float(planned.peak_bytes),
            "peak_bytes": peak_bytes,
            "peak_bytes_over_plan": peak_bytes / planned.peak_bytes,
        }
    return found


# --------------------------------------------------------------------------------------------------------------- shown


def sum_rows(several: Mapping[str, Price]) -> Iterable[tuple[str, str, str, str]]:
    """What a person reads of several stages: (name, hours, hours of all GPUs, dollars), with their sum at the end."""
    for name, one in several.items():
        gpu_hours, dollars = together([one])
        yield name, shown(one.total_hours), shown(gpu_hours), shown(dollars)
    gpu_hours, dollars = together(several.values())
    yield f"{len(several)} together", "", shown(gpu_hours), shown(dollars)


def rows(priced: Price) -> Iterable[tuple[str, str, str]]:
    """What a person reads: (section, part, figure)."""
    for part, span in priced.flops.items():
        yield "FLOPs", part, shown(span, "{:.3g}")
    if priced.flops:
        yield "FLOPs", "all", shown(add(priced.flops.values()), "{:.3g}")
    for part, size in priced.memory.items():
        yield "memory of a process", part, f"{size / 1e9:,.3g} GB"
    if priced.peak_bytes:
        yield "memory of a process", "most at a time", f"{priced.peak_bytes / 1e9:,.3g} GB"
    for part, size in priced.reads.items():
        yield "read", part, f"{size / 1e9:,.4g} GB"
    for part, size in priced.stores.items():
        yield "stored", part, f"{size / 1e9:,.4g} GB"
    yield "disk of a node", "written", f"{priced.written_bytes / 1e9:,.4g} GB"
    yield "disk of a node", "with what is read", f"{priced.disk_bytes / 1e9:,.4g} GB"
    for part, span in priced.checkpoint.items():
        yield "checkpoint", part, f"{shown(span)} s"
    for part, span in priced.hours.items():
        yield "hours", part, shown(span)
    yield "hours", "all", shown(priced.total_hours)
    on = f"{priced.gpus} GPU{'s' * (priced.gpus != 1)}" if priced.gpus else "CPU, where the orchestrator runs"
    yield "money", on, f"{shown(priced.dollars)} dollars"
