"""What the courses of a study say: tables, plots and the sentences that follow from them.

In: the finished courses by arm. Out: markdown and figures.
Always: a figure is a mean over seeds with Student's interval, a difference is paired by seed (same pictures, same
first weights), and every seed stands in the table; a claim is called shown only where its interval leaves out zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from valr_ops.evaluation.statistics import Interval, percent, points, t_interval
from valr_ops.recipe.recipe import StudyRecipe
from valr_ops.studies.arms import ARMS
from valr_ops.studies.courses import Taken
from valr_ops.studies.tiles import told_without_signs

_CONDITIONS = {
    "normal": "their own states",
    "zeroed": "zeros",
    "noised": "noise of the same norms",
    "other": "the states of another picture",
    "first": "the segment's first state, repeated",
    "markers": "nothing: no slots, control tokens alone",
}
_FIGURES = {
    "alignment/": "cosine to the features",
    "control/": "to another picture's",
    "latent_norm_ratio": "norm of a fed state over a word's",
    "effective_rank": "effective rank of a segment's states",
    "feedback_residual": "change by the last hop, 0 without hops",
}
"""Of a row of the training log (`valr_ops.training.log`): its entries for the teachers, and what it says of slots."""


_WITHOUT_SIGNS = "what is left, without any sign"
"""Calculated, not trained."""
LEARNED = 0.9
"""Share of right steps by which arms are told apart that all end near 1: the sooner the better."""


@dataclass(frozen=True)
class Findings:
    """The courses of a study; of every arm one a seed, seeds in one order."""

    taken: Mapping[str, Sequence[Taken]]
    study: StudyRecipe
    confidence: float
    against: tuple[str, ...]
    """The arms that every other is compared with."""

    def right(self, arm: str) -> Interval:
        """Share of the steps that are right after `study.updates` updates."""
        return self.mean(self.shares(arm))

    def chains(self, arm: str) -> Interval:
        """Share of the chains of which every step is right."""
        return self.mean([row["chains"] for row in self.last(arm)])

    def last(self, arm: str) -> list[dict[str, float]]:
        """The rows of the curves after `study.updates` updates, by seed."""
        return [one.at(self.study.updates) for one in self.taken[arm]]

    def minus(self, arm: str, other: str) -> Interval:
        """Of the shares of right steps, at equal updates, paired by seed."""
        return self.mean(np.subtract(self.shares(arm), self.shares(other)))

    def minus_at_equal_compute(self, arm: str, other: str) -> Interval | None:
        """As `minus`, where `other` was trained until it had cost as much; None where it was not trained so long."""
        update = self.study.updates * self.taken[arm][0].flops / self.taken[other][0].flops
        if update > self.taken[other][0].curve[-1]["update"]:
            return None
        long = [one.at(round(update))["accuracy"] for one in self.taken[other]]
        return self.mean(np.subtract(self.shares(arm), long))

    def learned(self, arm: str) -> list[float]:
        """By seed the first scored update after which `LEARNED` of the steps are right; nan where none is."""
        reached = [[row["update"] for row in one.curve if row["accuracy"] >= LEARNED] for one in self.taken[arm]]
        return [min(updates, default=math.nan) for updates in reached]

    def mean(self, by_seed: Sequence[float] | npt.NDArray[np.float64]) -> Interval:
        """Over seeds; of one seed alone without ends."""
        if len(by_seed) == 1:
            return Interval(float(by_seed[0]), math.nan, math.nan, self.confidence, "one run, which has no interval")
        return t_interval(by_seed, self.confidence)

    def flops(self, arm: str) -> float:
        """Of one update, over that of the cheapest arm."""
        return self.taken[arm][0].flops / min(one[0].flops for one in self.taken.values())

    def seconds(self, arm: str) -> float:
        """CPU seconds of one update, the median of the courses."""
        return float(np.median([one.seconds / one.curve[-1]["update"] for one in self.taken[arm]]))

    def reading(self, arm: str, reading: str, at: str | int) -> list[float]:
        """By seed."""
        return [one.readings[reading][at] for one in self.taken[arm]]

    def having(self, reading: str) -> list[str]:
        """The arms whose models have such a reading."""
        return [arm for arm, courses in self.taken.items() if reading in courses[0].readings]

    def without_signs(self) -> list[float]:
        """By step, what is right without looking at a sign; calculated."""
        return told_without_signs(self.study.side**2, self.study.steps)

    def shares(self, arm: str) -> list[float]:
        """Of the steps that are right after `study.updates` updates, by seed."""
        return [row["accuracy"] for row in self.last(arm)]


# --------------------------------------------------------------------------------------------------------- tables


def tables(found: Findings) -> dict[str, str]:
    """Markdown by title."""
    written = {"What follows": "\n".join(f"- {one}" for one in sentences(found)), "Arms": _arms(found)}
    written[f"Updates until {LEARNED:.0%} of the steps are right"] = speed(found)
    if found.having("conditions"):
        written["What the slots are fed"] = _conditions(found)
        written["Segments imposed before every step"] = _segments(found)
    if trained := _training(found):
        written["What training ended with"] = trained
    written["What a linear probe reads, by block"] = _probes(found)
    written["From step to step"] = _steps(found)
    return written


def sentences(found: Findings) -> list[str]:
    """Every comparison that the study was made for, each with its interval."""
    said = [
        f"Seeds {_seeds(found)}; differences of shares in points, paired by seed, {found.confidence:.0%} intervals."
    ]
    for other in found.against:
        for arm in found.taken:
            if arm == other or arm in found.against[: found.against.index(other)]:
                continue
            difference = found.minus(arm, other)
            said.append(
                f"**{ARMS[arm].summary}** against **{ARMS[other].summary}**: {_difference(difference)}, "
                f"{_verdict(difference)}."
            )
    return said


def _seeds(found: Findings) -> str:
    return ", ".join(str(one.course.seed) for one in next(iter(found.taken.values())))


def _verdict(difference: Interval) -> str:
    if math.isnan(difference.low):
        return "of one seed, which alone shows nothing"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "no difference shown"


def _arms(found: Findings) -> str:
    head = ["arm", "what", "learning rate", "steps right", "by seed", "chains right"]
    head += [f"minus {other}" for other in found.against]
    head += [f"minus {found.against[0]} at equal compute", "FLOPs of an update"]
    rows = []
    for arm, courses in found.taken.items():
        seeds = ", ".join(f"{share:.3f}" for share in found.shares(arm))
        row = [arm, ARMS[arm].summary, f"{courses[0].course.learning_rate:g}", _share(found.right(arm)), seeds]
        row.append(_share(found.chains(arm)))
        row += ["" if arm == other else _difference(found.minus(arm, other)) for other in found.against]
        equal = None if arm == found.against[0] else found.minus_at_equal_compute(arm, found.against[0])
        rows.append([*row, "" if equal is None else _difference(equal), f"{found.flops(arm):.2f} x"])
    return _table(head, rows)


def speed(found: Findings) -> str:
    """Of every arm `Findings.learned`; means and differences of those whose every seed got there."""
    rows = []
    for arm in found.taken:
        updates = found.learned(arm)
        row = [arm, ", ".join("never" if math.isnan(update) else f"{update:.0f}" for update in updates)]
        row.append("" if np.isnan(updates).any() else f"{np.mean(updates):.0f}")
        for other in found.against:
            later = np.subtract(updates, found.learned(other))
            row.append("" if arm == other or np.isnan(later).any() else _updates(found.mean(later)))
        rows.append(row)
    return _table(["arm", "by seed", "mean", *(f"minus {other}" for other in found.against)], rows)


def _conditions(found: Findings) -> str:
    arms = found.having("conditions")
    rows = []
    for condition, fed in _CONDITIONS.items():
        row = [f"{condition}: {fed}"]
        for arm in arms:
            now = found.reading(arm, "conditions", condition)
            loss = found.mean(np.subtract(now, found.reading(arm, "conditions", "normal")))
            row.append(percent(float(np.mean(now))) + ("" if condition == "normal" else f"; {_difference(loss)}"))
        rows.append(row)
    return _table(["slots are fed", *arms], rows)


def _segments(found: Findings) -> str:
    arms = found.having("segments")
    counts = list(found.taken[arms[0]][0].readings["segments"])
    return _table(
        ["segments before a step", *arms],
        [[count, *(_share(found.mean(found.reading(arm, "segments", count))) for arm in arms)] for count in counts],
    )


def _training(found: Findings) -> str:
    """Means over seeds and teachers, of the arms that have any; empty where none has."""
    rows = []
    for arm in found.taken:
        row = []
        for figure in _FIGURES:
            values = [value for last in found.last(arm) for name, value in last.items() if name.startswith(figure)]
            row.append(f"{np.mean(values):.3f}" if values and ("/" in figure or ARMS[arm].slots) else "")
        if any(row):
            rows.append([arm, *row])
    return _table(["arm", *_FIGURES.values()], rows) if rows else ""


def _probes(found: Findings) -> str:
    """Class of the asked cell at the position that writes it; class of each cell of the tile from its slots."""
    rows = []
    for reading, where in (("step_probe", "asked cell, at the step"), ("slot_probe", "every cell, at the slots")):
        for arm in found.having(reading):
            blocks = range(len(found.taken[arm][0].readings[reading]))
            rows.append([arm, where, *(percent(float(np.mean(found.reading(arm, reading, at)))) for at in blocks)])
    deepest = max(len(row) for row in rows) - 2
    return _table(["arm", "what is read", "embedding", *(f"block {at}" for at in range(deepest - 1))], rows)


def _steps(found: Findings) -> str:
    steps = range(found.study.steps)
    rows = [[_WITHOUT_SIGNS, "right", *map(percent, found.without_signs())]]
    for arm in found.taken:
        for reading, what in (("right", "right"), ("image_attention", "attention on the picture")):
            means = [percent(float(np.mean(found.reading(arm, reading, step)))) for step in steps]
            rows.append([arm, what, *means])
    return _table(["arm", "", *(f"step {step + 1}" for step in steps)], rows)


def chain_tables(by_length: Mapping[int, Findings]) -> dict[str, str]:
    """What becomes of every arm as chains grow: markdown by title."""
    first = next(iter(by_length.values()))
    head = ["steps", "arm", "steps right", "by seed", "chains right", *(f"minus {other}" for other in first.against)]
    rows = []
    for length, found in by_length.items():
        without = percent(float(np.mean(found.without_signs())))
        rows.append([str(length), _WITHOUT_SIGNS, without, *[""] * (len(head) - 3)])
        for arm in found.taken:
            seeds = ", ".join(f"{share:.3f}" for share in found.shares(arm))
            row = [str(length), arm, _share(found.right(arm)), seeds, _share(found.chains(arm))]
            row += ["" if arm == other else _difference(found.minus(arm, other)) for other in found.against]
            rows.append(row)
    written = {"Chains of growing length": _table(head, rows)}
    for length, found in by_length.items():
        written[f"From step to step, chains of {length}"] = _steps(found)
    return written


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(found: Interval) -> str:
    if math.isnan(found.low):
        return percent(found.value)
    return f"{percent(found.value)} ({100 * max(found.low, 0):.1f} to {100 * min(found.high, 1):.1f})"


def _difference(found: Interval) -> str:
    if math.isnan(found.low):
        return points(found.value)
    return f"{points(found.value)} ({points(found.low)} to {points(found.high)})"


def _updates(found: Interval) -> str:
    value, low, high = (f"{number:+.0f}".replace("-", "−") for number in (found.value, found.low, found.high))
    return value if math.isnan(found.low) else f"{value} ({low} to {high})"


# ---------------------------------------------------------------------------------------------------------- plots


def draw_curves(found: Findings) -> Figure:
    """Right steps over updates and over compute; thin lines are seeds, thick ones their means."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, (arm, courses) in enumerate(found.taken.items()):
        updates = np.array([row["update"] for row in courses[0].curve])
        right = 100 * np.array([[row["accuracy"] for row in one.curve] for one in courses])
        look = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for panel, across in zip(panels, (updates, updates * courses[0].flops / 1e9), strict=True):
            panel.plot(across, right.T, linewidth=0.6, alpha=0.4, **look)
            panel.plot(across, right.mean(0), linewidth=2, label=f"{arm}: {ARMS[arm].summary}", **look)
    panels[0].set(xlabel="updates", ylabel="steps right, %", ylim=(0, 100))
    panels[1].set(xlabel="compute, GFLOPs (forward, backward, roll-out)")
    _finish(panels[0])
    _finish(panels[1])
    panels[1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_inside(found: Findings) -> Figure:
    """What slots are fed, what probes read by block, and attention on the picture by step."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    conditions, probes, attention = figure.subplots(1, 3)
    arms = list(found.taken)
    fed = found.having("conditions")
    for place, arm in enumerate(fed):
        values = 100 * np.array([found.reading(arm, "conditions", condition) for condition in _CONDITIONS])
        across = np.arange(len(_CONDITIONS)) + (place - (len(fed) - 1) / 2) * 0.8 / len(fed)
        colour = f"C{arms.index(arm) % 10}"
        conditions.bar(across, values.mean(1), 0.8 / len(fed), color=colour, alpha=0.6)
        conditions.plot(across, values, ".", color=colour, markersize=3)
    conditions.set_xticks(range(len(_CONDITIONS)), list(_CONDITIONS), rotation=30)
    conditions.set(ylabel="steps right, %", ylim=(0, 100))
    conditions.set_title("what the slots are fed", fontsize="small")
    for arm in arms:
        colour = f"C{arms.index(arm) % 10}"
        for reading, style in (("step_probe", "--"), ("slot_probe", "-")):
            if arm in found.having(reading):
                means = 100 * np.mean([one.readings[reading] for one in found.taken[arm]], axis=0)
                probes.plot(range(len(means)), means, style, color=colour, marker="o", markersize=3)
        means = 100 * np.mean([one.readings["image_attention"] for one in found.taken[arm]], axis=0)
        attention.plot(range(1, len(means) + 1), means, color=colour, marker="o", markersize=3, label=arm)
    probes.set(xlabel="states, from the embedding on", ylabel="read by a linear probe, %", ylim=(0, 100))
    probes.set_title("solid: every cell, at the slots\ndashed: asked cell, at the step", fontsize="small")
    attention.set(xlabel="step", ylabel="attention on the picture, %", ylim=(0, None))
    for panel in (conditions, probes, attention):
        _finish(panel)
    for panel in (probes, attention):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    attention.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_chains(by_length: Mapping[int, Findings]) -> Figure:
    """A column of panels for each length: right steps above, attention on the picture below, by step."""
    figure = Figure(figsize=(2 + 3 * len(by_length), 5.6), layout="constrained")
    panels = figure.subplots(2, len(by_length), sharey="row", squeeze=False)
    for column, (length, found) in enumerate(by_length.items()):
        steps = range(1, length + 1)
        for number, arm in enumerate(found.taken):
            for row, reading in enumerate(("right", "image_attention")):
                values = 100 * np.array([one.readings[reading] for one in found.taken[arm]])
                panels[row, column].plot(steps, values.T, color=f"C{number}", linewidth=0.6, alpha=0.4)
                panels[row, column].plot(steps, values.mean(0), color=f"C{number}", marker="o", markersize=3, label=arm)
        without = 100 * np.array(found.without_signs())
        panels[0, column].plot(steps, without, ":", color="0.4", label=_WITHOUT_SIGNS)
        panels[0, column].set_title(f"chains of {length}", fontsize="small")
        panels[1, column].set_xlabel("step")
    panels[0, 0].set(ylabel="right, %", ylim=(0, 102))
    panels[1, 0].set(ylabel="attention on the picture, %", ylim=(0, None))
    for panel in panels.flat:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(panel)
    panels[0, -1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _finish(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
