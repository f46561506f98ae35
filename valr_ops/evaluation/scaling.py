"""The length study: do longer answers score better, or are long answers only given to other questions?

In: rows of `predictions.jsonl`, of one run for the observed lengths, and of one run a budget for the imposed ones.
Out: accuracy by length with intervals, as `scaling.parquet`, one figure, and plain sentences in `result.md`.
Always: the two protocols are never mixed. A groups items by the length that the model chose, so it shows association; B
has every item answered at every budget, so it shows effect. Every item is counted, no bin is dropped, and what was cut
off or could not be read stands beside every accuracy. Length is three numbers, because an axis of text tokens alone
hides what latents cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from valr_ops.evaluation.statistics import (
    Interval,
    PairedBootstrap,
    PairedDifference,
    StatisticsError,
    Trend,
    page_trend,
    paired_comparison,
    percent,
    points,
    score_interval,
    spearman,
)

OBSERVED, IMPOSED = "observational-bins", "interventional-budget"
"""The protocols A and B."""
LENGTHS = {"text_tokens": "text tokens", "decode_steps": "decode steps", "seconds": "seconds"}
"""What an answer's length is measured in. Text tokens are those outside latent segments, the answer and the end of turn
included; decode steps count the slots and two control tokens a segment besides; seconds are what its asker waits."""
_CONTROL_TOKENS = 2
_FIELDS = (
    *("id", "benchmark", "score", "resolved", "answer_found", "finish_reason"),
    *("text_tokens", "latent_steps", "segments"),
)
_OURS, _BASE = "#0f766e", "#94a3b8"

Row = Mapping[str, Any]
Comparison = PairedDifference | PairedBootstrap


class ScalingError(ValueError):
    """Answers that no length study can be made of: the message says which, where and what to give."""


@dataclass(frozen=True)
class Answers:
    """What a group of answers came to; shares are in [0, 1]."""

    n: int
    accuracy: Interval | None
    """Mean score; None without items."""
    mean_lengths: Mapping[str, float]
    """By the names of `LENGTHS`; empty without items."""
    truncated: float
    """Share that a limit cut off."""
    unread: float
    """Share that ended by itself but whose answer could not be found or read: no loss of vision either."""


@dataclass(frozen=True)
class Bin:
    """The items whose answers were so long: ``low <= length < high``."""

    low: float
    high: float | None
    """None for the last bin, which has no end."""
    answers: Answers
    base: Interval | None
    """Accuracy of the base model on the same items."""


@dataclass(frozen=True)
class ObservedLengths:
    """Protocol A: accuracy given the length that the model chose."""

    benchmark: str
    length: str
    """One of `LENGTHS`."""
    bins: tuple[Bin, ...]
    correlation: Interval | None
    """Spearman's, of length and score; None where it is undefined: a constant, or fewer than four clusters."""
    base_correlation: Interval | None
    """The same of the base model's scores with these lengths, which it knows nothing of: what the items explain."""


@dataclass(frozen=True)
class BudgetPoint:
    """All items under one imposed budget."""

    budget: float
    """As it was imposed."""
    answers: Answers
    gain: Comparison | None
    """Against the smallest budget; None for that one."""


@dataclass(frozen=True)
class Stop:
    """The smallest budget that no longer one is better than, beyond noise."""

    budget: float
    last: bool
    """It is the longest budget there is, so nothing says where the gain ends."""
    detectable: float
    """Gains below this would have been missed with a probability of 0.2 or more; 0 where it is the last."""


@dataclass(frozen=True)
class ImposedBudgets:
    """Protocol B: accuracy of all items at every budget."""

    benchmark: str
    control: str
    """What was imposed, such as ``max_segments``."""
    points: tuple[BudgetPoint, ...]
    """By rising budget, two or more."""
    best: float
    """Budget of the highest accuracy, the smallest of equals."""
    best_gain: Comparison | None
    """Against the smallest budget, at a confidence raised by Bonferroni because the best was chosen after the fact;
    None where the smallest is the best."""
    trend: Trend
    """Page's test that scores rise with the budget."""
    stop: Stop


def observational_bins(
    rows: Sequence[Row],
    base: Sequence[Row],
    length: str = "decode_steps",
    edges: Sequence[float] | None = None,
    count: int = 4,
    confidence: float = 0.95,
) -> ObservedLengths:
    """Protocol A for one benchmark: `rows` binned by `length`.

    Args:
        rows: one run's rows; ``cluster`` is read where a row has it.
        base: the base model's rows of the same items.
        length: one of `LENGTHS`.
        edges: inner edges of the bins, rising; the first bin begins at 0 and the last has no end. Without them `count`
            bins hold equal numbers of items, as far as equal lengths allow.
        confidence: of every interval.

    Raises:
        ScalingError: unusable rows, different items, an unknown length, or edges that don't rise.
    """
    if length not in LENGTHS:
        raise ScalingError(f"length={length!r} is not measured; choose one of {', '.join(LENGTHS)}")
    run = _run(rows, "the observed run")
    base_run = _same_items(_run(base, "the base model"), run, "the base model")
    if length not in run.lengths:
        raise ScalingError(f"length={length!r}: the answers were not timed; choose {' or '.join(run.lengths)}")
    observed = run.lengths[length]
    inner = _inner_edges(observed, count) if edges is None else [float(edge) for edge in edges]
    if any(low >= high for low, high in zip([0.0, *inner], inner, strict=False)):
        raise ScalingError(f"edges={inner} don't rise from above 0; give inner edges such as 100, 200, 300")
    number = np.searchsorted(inner, observed, side="right")
    bins = [
        Bin(
            low=low,
            high=high,
            answers=_measured(run, number == at, confidence),
            base=_accuracy(base_run, number == at, confidence),
        )
        for at, (low, high) in enumerate(zip([0.0, *inner], [*inner, None], strict=True))
    ]
    return ObservedLengths(
        benchmark=run.benchmark,
        length=length,
        bins=tuple(bins),
        correlation=_correlation(observed, run.scores, run.clusters, confidence),
        base_correlation=_correlation(observed, base_run.scores, run.clusters, confidence),
    )


def imposed_budgets(runs: Mapping[float, Sequence[Row]], control: str, confidence: float = 0.95) -> ImposedBudgets:
    """Protocol B for one benchmark: the same items under two budgets or more.

    Args:
        runs: by budget, the rows of all items.
        control: what was imposed; names the axis.
        confidence: of every interval; of the best budget's it is higher.

    Raises:
        ScalingError: unusable rows, fewer than two budgets, or budgets with different items.
    """
    budgets = sorted(runs)
    if len(budgets) < 2:
        raise ScalingError(f"{control} has {len(budgets)} budgets; a comparison needs two or more")
    first, *others = (_run(runs[budget], f"{control}={budget:g}") for budget in budgets)
    same = [first, *(_same_items(run, first, f"{control}={budget:g}") for run, budget in zip(others, budgets[1:]))]
    everything = np.ones(len(first.ids), dtype=bool)
    gains = [paired_comparison(run.scores, first.scores, first.clusters, confidence) for run in same[1:]]
    scores = np.stack([run.scores for run in same], axis=1)
    # Means of equal scores in another order may differ in the last bit.
    best = int(np.argmax(scores.mean(axis=0).round(12)))
    raised = 1 - (1 - confidence) / (len(budgets) - 1)
    return ImposedBudgets(
        benchmark=first.benchmark,
        control=control,
        points=tuple(
            BudgetPoint(budget, _measured(run, everything, confidence), gain)
            for budget, run, gain in zip(budgets, same, [None, *gains], strict=True)
        ),
        best=budgets[best],
        best_gain=paired_comparison(scores[:, best], first.scores, first.clusters, raised) if best else None,
        trend=page_trend(scores, first.clusters),
        stop=when_to_stop(budgets, scores, first.clusters, confidence),
    )


def when_to_stop(
    budgets: Sequence[float], scores: np.ndarray, clusters: Sequence[str] | None = None, confidence: float = 0.95
) -> Stop:
    """The smallest of the rising `budgets` from which the gain to no longer one is above zero, by its interval.

    Args:
        scores: [items, budgets] in [0, 1].
        clusters: [items] labels.
        confidence: of each interval; nothing is corrected for their number, which errs towards going on.
    """
    for at, budget in enumerate(budgets[:-1]):
        gains = [
            paired_comparison(scores[:, longer], scores[:, at], clusters, confidence)
            for longer in range(at + 1, len(budgets))
        ]
        if all(gain.low <= 0.0 for gain in gains):
            return Stop(budget, last=False, detectable=max(gain.detectable for gain in gains))
    return Stop(budgets[-1], last=True, detectable=0.0)


def write_scaling(out: Path, observed: Sequence[ObservedLengths], imposed: Sequence[ImposedBudgets]) -> dict[str, str]:
    """Write `scaling.parquet`, `scaling.png`, `scaling.svg` and `result.md` into `out`; equal studies give equal bytes.

    Returns:
        The tables in Markdown by title, with the sentences of the result as the first.

    Raises:
        ScalingError: no study at all.
    """
    if not observed and not imposed:
        raise ScalingError("there is no length study to write; give observed lengths, imposed budgets or both")
    rows = [*observed_rows(observed), *imposed_rows(imposed)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out / "scaling.parquet")
    with matplotlib.rc_context({"svg.hashsalt": "scaling"}):
        figure = draw(observed, imposed)
        figure.savefig(out / "scaling.png", dpi=130, metadata={"Software": None})
        figure.savefig(out / "scaling.svg", metadata={"Date": None, "Creator": None})
    tables = {"what the lengths say": "\n".join(f"- {sentence}" for sentence in sentences(observed, imposed))}
    if observed:
        tables["A: accuracy given the observed length"] = _observed_table(observed)
    if imposed:
        tables["B: accuracy at imposed budgets"] = _imposed_table(imposed)
    parts = "\n\n".join(f"## {title}\n\n{table}" for title, table in tables.items())
    text = f"# Accuracy against length\n\n{parts}\n\n![Accuracy against length](scaling.png)\n"
    (out / "result.md").write_text(text, encoding="utf-8")
    return tables


_NUMBERS = (
    *("budget", "bin_low", "bin_high", "accuracy", "low", "high", "base_accuracy", "base_low", "base_high"),
    *("gain", "gain_low", "gain_high", "gain_p_value", "truncated", "unread"),
    *(f"mean_{name}" for name in LENGTHS),
)
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("protocol", "benchmark", "length", "control", "method", "test")]
    + [("n", pa.int64())]
    + [(name, pa.float64()) for name in _NUMBERS]
)
"""Columns of `scaling.parquet`, one row a bin or budget; null where a column belongs to the other protocol, where a bin
is empty, and for the open end of the last bin."""


def observed_rows(observed: Sequence[ObservedLengths]) -> list[dict[str, Any]]:
    """A row of `SCHEMA` for every bin."""
    return [
        {"protocol": OBSERVED, "benchmark": one.benchmark, "length": one.length}
        | {"bin_low": each.low, "bin_high": each.high}
        | _answer_columns(each.answers)
        | _interval_columns("base_accuracy", "base_low", "base_high", each.base)
        for one in observed
        for each in one.bins
    ]


def imposed_rows(imposed: Sequence[ImposedBudgets]) -> list[dict[str, Any]]:
    """A row of `SCHEMA` for every budget."""
    rows = []
    for one in imposed:
        for point in one.points:
            row = {"protocol": IMPOSED, "benchmark": one.benchmark, "control": one.control, "budget": point.budget}
            row |= _answer_columns(point.answers)
            if point.gain is not None:
                row |= {"gain": point.gain.difference, "gain_low": point.gain.low, "gain_high": point.gain.high}
                row |= {"gain_p_value": point.gain.p_value, "test": point.gain.test}
            rows.append(row)
    return rows


def sentences(observed: Sequence[ObservedLengths], imposed: Sequence[ImposedBudgets]) -> list[str]:
    """What the numbers say, one sentence or a few for every study."""
    return [*map(_observed_sentence, observed), *map(_imposed_sentence, imposed)]


def draw(observed: Sequence[ObservedLengths], imposed: Sequence[ImposedBudgets]) -> Figure:
    """Accuracy against length, a row a benchmark and protocol; bars are intervals."""
    names = dict.fromkeys([*(one.benchmark for one in observed), *(one.benchmark for one in imposed)])
    lines: list[tuple[str, list[ObservedLengths] | ImposedBudgets]] = []
    for name in names:
        of_benchmark = [one for one in observed if one.benchmark == name]
        lines += [(name, of_benchmark)] if of_benchmark else []
        lines += [(name, one) for one in imposed if one.benchmark == name]
    figure = Figure(figsize=(11, 3.1 * len(lines)), layout="constrained")
    for part, (name, line) in zip(figure.subfigures(len(lines), squeeze=False)[:, 0], lines, strict=True):
        if isinstance(line, ImposedBudgets):
            title = f"{name}, B: all {line.points[0].answers.n:,} items at every {line.control}"
            measured = line.points[0].answers.mean_lengths
            panels = part.subplots(1, len(measured), sharey=True)
            for panel, length in zip(panels, measured, strict=True):
                _draw_imposed(panel, line, length)
        else:
            title = f"{name}, A: by the length the model chose (association only: long answers go to other items)"
            panels = part.subplots(1, len(line), sharey=True, squeeze=False)[0]
            for panel, one in zip(panels, line, strict=True):
                _draw_observed(panel, one)
        part.suptitle(title, x=0.01, ha="left", fontsize="medium", weight="bold")
        panels[0].set_ylabel("accuracy, %")
        panels[0].legend(frameon=False, fontsize="small", loc="best")
    return figure


@dataclass(frozen=True)
class _Run:
    """The rows of one run as columns."""

    benchmark: str
    ids: list[str]
    scores: np.ndarray
    clusters: list[str]
    lengths: Mapping[str, np.ndarray]
    truncated: np.ndarray
    unread: np.ndarray


def _run(rows: Sequence[Row], what: str) -> _Run:
    if not rows:
        raise ScalingError(f"{what} has no rows; give the rows of predictions.jsonl, one an item")
    for row in rows:
        missing = [name for name in _FIELDS if row.get(name) is None]
        if missing:
            raise ScalingError(f"{what}: item {row.get('id')!r} lacks {', '.join(missing)}; score the model again")
    benchmarks = sorted({row["benchmark"] for row in rows})
    if len(benchmarks) > 1:
        raise ScalingError(f"{what} mixes {', '.join(benchmarks)}; make one study a benchmark")
    ids = [row["id"] for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ScalingError(f"{what} answers item {twice!r} more than once; give one row an item")
    # Answers that were not timed, as those in an artifact, have two lengths.
    timed = ["seconds"] if any(row.get("seconds") is not None for row in rows) else []
    try:
        numbers = {
            name: np.array([float(row[name]) for row in rows])
            for name in ("score", "text_tokens", "latent_steps", "segments", *timed)
        }
    except (KeyError, TypeError):
        lacking = next(row["id"] for row in rows if row.get("seconds") is None)
        raise ScalingError(f"{what}: item {lacking!r} lacks seconds, and others have them; time all or none") from None
    for name, column in numbers.items():
        top = 1.0 if name == "score" else math.inf
        wrong = np.flatnonzero(~(np.isfinite(column) & (column >= 0) & (column <= top)))
        if wrong.size:
            allowed = "in [0, 1]" if name == "score" else "finite and 0 or more"
            raise ScalingError(
                f"{what}: {name} of item {ids[wrong[0]]!r} is {column[wrong[0]]:g}; it must be {allowed}"
            )
    truncated = np.array([row["finish_reason"] != "stop" for row in rows])
    read = np.array([bool(row["resolved"] and row["answer_found"]) for row in rows])
    steps = numbers["text_tokens"] + numbers["latent_steps"] + _CONTROL_TOKENS * numbers["segments"]
    return _Run(
        benchmark=benchmarks[0],
        ids=ids,
        scores=numbers["score"],
        clusters=[row.get("cluster", "") for row in rows],
        lengths={
            "text_tokens": numbers["text_tokens"],
            "decode_steps": steps,
            **{name: numbers[name] for name in timed},
        },
        truncated=truncated,
        unread=~truncated & ~read,
    )


def _same_items(run: _Run, reference: _Run, what: str) -> _Run:
    """`run` in the order of `reference`; its clusters are not asked for."""
    place = {name: at for at, name in enumerate(run.ids)}
    if run.benchmark != reference.benchmark or place.keys() != set(reference.ids):
        different = sorted(place.keys() ^ set(reference.ids))
        raise ScalingError(
            f"{what} answered {len(run.ids)} items of {run.benchmark}, not the {len(reference.ids)} of "
            f"{reference.benchmark}; {len(different)} are in one of the two only, such as {different[:3]}. Score both "
            "on the same sources"
        )
    order = [place[name] for name in reference.ids]
    return replace(
        run,
        ids=reference.ids,
        scores=run.scores[order],
        clusters=reference.clusters,
        lengths={name: column[order] for name, column in run.lengths.items()},
        truncated=run.truncated[order],
        unread=run.unread[order],
    )


def _inner_edges(lengths: np.ndarray, count: int) -> list[float]:
    """Edges that cut `lengths` into `count` bins of equal numbers; fewer where equal lengths leave no place to cut."""
    if count < 1:
        raise ScalingError(f"count={count} makes no bins; give 1 or more")
    cuts = np.quantile(lengths, np.arange(1, count) / count)
    if np.array_equal(lengths, lengths.round()):
        # The same bins, in whole steps.
        cuts = np.ceil(cuts)
    return [float(cut) for cut in np.unique(cuts) if cut > lengths.min()]


def _measured(run: _Run, chosen: np.ndarray, confidence: float) -> Answers:
    n = int(chosen.sum())
    return Answers(
        n=n,
        accuracy=_accuracy(run, chosen, confidence),
        mean_lengths={name: float(column[chosen].mean()) for name, column in run.lengths.items()} if n else {},
        truncated=float(run.truncated[chosen].mean()) if n else 0.0,
        unread=float(run.unread[chosen].mean()) if n else 0.0,
    )


def _accuracy(run: _Run, chosen: np.ndarray, confidence: float) -> Interval | None:
    if not chosen.any():
        return None
    clusters = [label for label, taken in zip(run.clusters, chosen, strict=True) if taken]
    return score_interval(run.scores[chosen], clusters, confidence=confidence)


def _correlation(
    lengths: np.ndarray, scores: np.ndarray, clusters: Sequence[str], confidence: float
) -> Interval | None:
    try:
        return spearman(lengths, scores, clusters, confidence)
    except StatisticsError:
        return None


def _answer_columns(answers: Answers) -> dict[str, Any]:
    columns: dict[str, Any] = {"n": answers.n}
    if answers.accuracy is not None:
        columns |= _interval_columns("accuracy", "low", "high", answers.accuracy)
        columns |= {"method": answers.accuracy.method, "truncated": answers.truncated, "unread": answers.unread}
    return columns | {f"mean_{name}": mean for name, mean in answers.mean_lengths.items()}


def _interval_columns(value: str, low: str, high: str, interval: Interval | None) -> dict[str, float]:
    return {} if interval is None else {value: interval.value, low: interval.low, high: interval.high}


def _observed_sentence(one: ObservedLengths) -> str:
    filled = [each for each in one.bins if each.answers.accuracy is not None]
    shortest, longest = filled[0], filled[-1]
    assert shortest.answers.accuracy and longest.answers.accuracy and shortest.base and longest.base
    said = f"**{one.benchmark}, observed {LENGTHS[one.length]}**: "
    if len(filled) == 1:
        return f"{said}all answers fall into one bin ({_range(shortest)}), so length explains nothing here."
    said += (
        f"accuracy is {percent(shortest.answers.accuracy.value)} for answers {_range(shortest)} and "
        f"{percent(longest.answers.accuracy.value)} for those {_range(longest)}; "
        f"the base model has {percent(shortest.base.value)} and {percent(longest.base.value)} on the same items. "
    )
    if one.correlation is None:
        return f"{said}A rank correlation is undefined: lengths or scores are all equal, or there are too few clusters."
    said += f"Rank correlation of length and score {_signed(one.correlation)}, "
    if one.base_correlation is None:
        said += "undefined for the base model's scores. "
    else:
        said += f"of the same lengths and the base model's scores {_signed(one.base_correlation)}. "
    return said + _read_association(_sign(one.correlation), _sign(one.base_correlation))


def _read_association(ours: int, base: int) -> str:
    if ours == 0:
        return "No association beyond noise."
    towards = "higher" if ours > 0 else "lower"
    if base == ours:
        return (
            f"Longer answers score {towards}, but so does the base model on these items, which knows nothing of the "
            "length: the items differ, and no effect of length follows."
        )
    return (
        f"Longer answers score {towards}, and the base model's scores don't follow these lengths in the same way; "
        "still the model chose the lengths, so this is association and no effect."
    )


def _imposed_sentence(one: ImposedBudgets) -> str:
    smallest, largest = one.points[0], one.points[-1]
    assert smallest.answers.accuracy and largest.answers.accuracy and largest.gain
    said = (
        f"**{one.benchmark}, imposed {one.control}**: {percent(smallest.answers.accuracy.value)} at "
        f"{smallest.budget:g} and {percent(largest.answers.accuracy.value)} at {largest.budget:g}, "
        f"{_gain(largest.gain)}, by {largest.gain.test}. "
    )
    steps = [point.answers.mean_lengths["decode_steps"] for point in (smallest, largest)]
    if steps[1] <= steps[0]:
        said += f"The budget did not make answers longer (mean decode steps {steps[0]:.1f} and {steps[1]:.1f}). "
    if one.best_gain is None:
        said += f"The smallest budget, {one.best:g}, is the best. "
    elif one.best != largest.budget:
        said += f"The best, chosen after the fact, is {one.best:g}: {_gain(one.best_gain)}. "
    rising = one.trend.p_value <= 1 - largest.gain.confidence
    said += f"Over all budgets scores {'rise' if rising else 'show no rise beyond noise'} (Page's test, one-sided, p = "
    said += f"{one.trend.p_value:.2g}). "
    if one.stop.last:
        said += f"Every budget below {one.stop.budget:g} is beaten by a longer one, so where the gain ends is unknown. "
    else:
        said += (
            f"Stop at {one.stop.budget:g}: no longer budget is better beyond noise, though a gain below "
            f"{100 * one.stop.detectable:.1f} points could be missed. "
        )
    return said + (
        f"From the smallest to the largest, the answers cut off go from {percent(smallest.answers.truncated)} to "
        f"{percent(largest.answers.truncated)} and those that can't be read from {percent(smallest.answers.unread)} to "
        f"{percent(largest.answers.unread)}."
    )


def _gain(gain: Comparison) -> str:
    interval = f"{points(gain.low)} to {points(gain.high)} at {100 * gain.confidence:.3g} %"
    return f"{points(gain.difference)} points ({interval}), {gain.verdict}"


def _signed(interval: Interval) -> str:
    said = f"{interval.value:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"
    return said.replace("-", "−")


def _sign(interval: Interval | None) -> int:
    """Of a correlation beyond noise; 0 within it."""
    return 0 if interval is None else int(interval.low > 0) - int(interval.high < 0)


def _range(one: Bin) -> str:
    if one.high is None:
        return f"of {one.low:.4g} and more"
    return f"below {one.high:.4g}" if one.low == 0 else f"of {one.low:.4g} to below {one.high:.4g}"


def _observed_table(observed: Sequence[ObservedLengths]) -> str:
    lines = ["| benchmark | length | bin | n | accuracy | interval | base, same items | cut off | unread |"]
    lines.append("| --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for one in observed:
        for each in one.bins:
            end = "∞" if each.high is None else f"{each.high:.4g}"
            base = "" if each.base is None else percent(each.base.value)
            cells = [one.benchmark, LENGTHS[one.length], f"[{each.low:.4g}, {end})", str(each.answers.n)]
            cells += [*_accuracy_cells(each.answers), base, *_lost_cells(each.answers)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _imposed_table(imposed: Sequence[ImposedBudgets]) -> str:
    lengths = [f"mean {name}" for name in LENGTHS.values()]
    heads = ["benchmark", "control", "budget", "n", "accuracy", "interval", "minus smallest", *lengths]
    lines = [f"| {' | '.join([*heads, 'cut off', 'unread'])} |"]
    lines.append("| --- | --- | ---: | ---: | ---: | --- | --- |" + " ---: |" * (len(lengths) + 2))
    for one in imposed:
        for point in one.points:
            gain = point.gain
            against = "" if gain is None else f"{points(gain.difference)} ({points(gain.low)} to {points(gain.high)})"
            cells = [one.benchmark, one.control, f"{point.budget:g}", str(point.answers.n)]
            cells += [*_accuracy_cells(point.answers), against]
            means = point.answers.mean_lengths
            cells += [f"{means[name]:.4g}" if name in means else "" for name in LENGTHS]
            lines.append(f"| {' | '.join([*cells, *_lost_cells(point.answers)])} |")
    return "\n".join(lines)


def _accuracy_cells(answers: Answers) -> list[str]:
    accuracy = answers.accuracy
    if accuracy is None:
        return ["", ""]
    return [percent(accuracy.value), f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"]


def _lost_cells(answers: Answers) -> list[str]:
    return [percent(answers.truncated), percent(answers.unread)] if answers.n else ["", ""]


def _draw_observed(panel: Axes, one: ObservedLengths) -> None:
    filled = [each for each in one.bins if each.answers.accuracy is not None]
    at = [each.answers.mean_lengths[one.length] for each in filled]
    aside = [x + 0.015 * max(at) for x in at]
    _draw_line(panel, aside, [each.base for each in filled], _BASE, "base model, same items", "s--")
    _draw_line(panel, at, [each.answers.accuracy for each in filled], _OURS, "model", "o-")
    panel.set_xlabel(f"{LENGTHS[one.length]}, mean of the bin")
    for each, x in zip(filled, at, strict=True):
        panel.annotate(
            f"n={each.answers.n}", (x, 0.02), xycoords=("data", "axes fraction"), fontsize="x-small", ha="center"
        )
    _tidy(panel)


def _draw_imposed(panel: Axes, one: ImposedBudgets, length: str) -> None:
    at = [point.answers.mean_lengths[length] for point in one.points]
    accuracies = [point.answers.accuracy for point in one.points]
    _draw_line(panel, at, accuracies, _OURS, f"beside a point: {one.control}", "o-")
    for point, x in zip(one.points, at, strict=True):
        assert point.answers.accuracy
        where = (x, 100 * point.answers.accuracy.value)
        panel.annotate(f"{point.budget:g}", where, (6, -11), textcoords="offset points", fontsize="small")
    panel.set_xlabel(f"{LENGTHS[length]}, mean realised")
    _tidy(panel)


def _draw_line(
    panel: Axes, at: Sequence[float], intervals: Sequence[Interval | None], colour: str, label: str, style: str
) -> None:
    known = [interval for interval in intervals if interval is not None]
    shares = [100 * one.value for one in known]
    reach = [[100 * (one.value - one.low) for one in known], [100 * (one.high - one.value) for one in known]]
    panel.errorbar(at, shares, yerr=reach, fmt=style, color=colour, capsize=3, markersize=5, label=label)


def _tidy(panel: Axes) -> None:
    # From 0, so that lengths which hardly differ look like it.
    panel.set_xlim(0, 1.08 * max(panel.dataLim.x1, 1e-9))
    panel.margins(y=0.12)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    panel.set_axisbelow(True)
