"""What the rows of the three studies inside a model say: sentences, tables and plots.

In: rows as `valr_ops.evaluation.probes` writes them to parquet. Out: Markdown and matplotlib figures.
Always: every figure in a sentence stands beside its number of items and its interval; conditions are compared item by
item; a sentence claims no more than its interval; nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from valr_ops.evaluation.statistics import (
    Interval,
    PairedBootstrap,
    PairedDifference,
    StatisticsError,
    bootstrap_interval,
    paired_comparison,
    percent,
    points,
    score_interval,
)

Row = Mapping[str, Any]
"""By column."""
NEVER_HIDDEN = -1
"""In the column `image_steps`: the images were not hidden."""
FED = {
    "normal": "as they are",
    "zeroed": "zeros",
    "noised": "noise of the same norm",
    "other": "another item's latents",
    "markers": "no slots, the markers alone",
}
"""What the latent slots are fed, by condition, in words."""

_SHOWN_STEPS = 4
_GREEN, _GREY, _DARK = "#0f766e", "#94a3b8", "#1f2937"


# ----------------------------------------------------------------------------------------------------- visual decay


def decay_sentences(looked: Sequence[Row], masked: Sequence[Row], confidence: float) -> list[str]:
    """A paragraph a model, of rows as `probes.visual_decay` returns them."""
    return [
        " ".join([*_attention_sentences(name, looked, confidence), *_masking_sentences(name, masked, confidence)])
        for name in _distinct(masked, "model")
    ]


def first_and_last(looked: Iterable[Row], model: str, column: str = "image") -> tuple[list[float], list[float]]:
    """Of each answer with two steps or more, `column` at the text of its first and of its last step."""
    of_item: dict[str, dict[int, float]] = {}
    for row in looked:
        if (row["model"], row["positions"], row["last_line"]) == (model, "text", False):
            of_item.setdefault(row["item"], {})[row["step"]] = row[column]
    several = [steps for steps in of_item.values() if len(steps) > 1]
    return [steps[min(steps)] for steps in several], [steps[max(steps)] for steps in several]


def _attention_sentences(name: str, looked: Sequence[Row], confidence: float) -> Iterable[str]:
    first, last = first_and_last(looked, name)
    if not first:
        yield f"**{name}**: no answer has two steps before its last line, so nothing can fade."
        return
    change = _interval(np.subtract(last, first), confidence)
    even_first, even_last = first_and_last(looked, name, "even_image")
    even = mean(even_last) - mean(even_first)
    yield (
        f"**{name}**: a position of text gives {percent(mean(first))} of its attention to the image in the first step "
        f"and {percent(mean(last))} in the last one, a change of {points(change.value)} points "
        f"({_ends(change, points)}, n = {len(first)} answers with two steps or more; means over heads, blocks and "
        f"positions). Attention spread evenly would change by {points(even)} points, because the answer grows."
    )
    if change.high < 0.0:
        alone = "the growing length alone would make it"
        if change.low <= even <= change.high:
            yield f"Attention to the image fades; whether by more or less than {alone} is not shown."
        else:
            yield f"Attention to the image fades, {'more' if change.high < even else 'less'} than {alone}."
    elif change.low > 0.0:
        yield "Attention to the image rises with the steps."
    else:
        yield "Whether attention to the image fades can't be told from these answers."


def _masking_sentences(name: str, masked: Sequence[Row], confidence: float) -> Iterable[str]:
    right, changed = (_by(masked, "image_steps", column, model=name) for column in ("correct", "changed"))
    seen = right[NEVER_HIDDEN]
    yield f"With its images it has {percent(mean(seen))} of {len(seen)} items right."
    for cut in sorted(right.keys() - {NEVER_HIDDEN}):
        when = f"with the images hidden after step {cut}" if cut else "without ever seeing them"
        found = paired_comparison(right[cut], seen, _clusters(masked, image_steps=cut, model=name), confidence)
        yield f"{when.capitalize()}: {_difference(found)}; {percent(mean(changed[cut]))} of the answers change."


def masking_table(masked: Sequence[Row], confidence: float) -> str:
    """Markdown, a line a model and step after which the images are hidden."""
    lines = ["| model | images are hidden | n | accuracy | minus never hidden | answers changed |"]
    lines.append("| --- | --- | ---: | ---: | --- | ---: |")
    for name in _distinct(masked, "model"):
        right, changed = (_by(masked, "image_steps", column, model=name) for column in ("correct", "changed"))
        for cut in sorted(right):
            when = {NEVER_HIDDEN: "never", 0: "always"}.get(cut, f"after step {cut}")
            cells = [name, when, str(len(right[cut])), percent(mean(right[cut])), "", ""]
            if cut != NEVER_HIDDEN:
                clusters = _clusters(masked, image_steps=cut, model=name)
                found = paired_comparison(right[cut], right[NEVER_HIDDEN], clusters, confidence)
                cells[4:] = [_difference(found), percent(mean(changed[cut]))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_visual_decay(looked: Sequence[Row], masked: Sequence[Row], confidence: float) -> Figure:
    """Attention to the image over the steps, and accuracy over the step after which it is hidden; a colour a model."""
    figure = Figure(figsize=(10, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(_distinct(masked, "model")):
        colour = f"C{number}"
        for positions, style, marker in (("text", "-", "o"), ("segment", ":", "s")):
            over = _means(_by(looked, "step", "image", model=name, positions=positions, last_line=False), confidence)
            if over:
                what = "text" if positions == "text" else "latents"
                _line(left, over, f"{name}, {what}", colour, style, marker, in_percent=True)
        even = _means(_by(looked, "step", "even_image", model=name, positions="text", last_line=False), confidence)
        left.plot([*even], [100 * one.value for one in even.values()], color=colour, linestyle="--", alpha=0.5)
        found = {
            cut: score_interval(
                np.array(rows, dtype=float), _clusters(masked, image_steps=cut, model=name), confidence=confidence
            )
            for cut, rows in sorted(_by(masked, "image_steps", "correct", model=name).items())
        }
        right.axhline(100 * found.pop(NEVER_HIDDEN).value, color=colour, linestyle="--", alpha=0.7)
        _line(right, found, name, colour, "-", "o", in_percent=True)
    left.set(xlabel="step", ylabel="attention to the image, %", ylim=(0, None))
    left.set_title("dashed: attention spread evenly", fontsize="medium", loc="left")
    right.set(xlabel="images are hidden after step (0: never seen)", ylabel="accuracy, %", ylim=(0, 100))
    title = f"n = {len(_distinct(masked, 'item'))}; dashed: images never hidden"
    right.set_title(title, fontsize="medium", loc="left")
    _finish(left)
    _finish(right, loc="lower right")
    return figure


# ----------------------------------------------------------------------------------------------------- latent check


def check_sentences(name: str, rows: Sequence[Row], left_out: Sequence[str], confidence: float) -> list[str]:
    """What the conditions of `probes.latent_check` say about the model called `name`."""
    right, changed = (_by(rows, "condition", column) for column in ("correct", "changed"))
    normal = right.pop("normal")
    opened = mean([row["segments"] > 0 for row in rows if row["condition"] == "normal"])
    said = f"**{name}** has {percent(mean(normal))} of {len(normal)} items right and opens a segment in "
    said += f"{percent(opened)} of its answers."
    if not opened:
        return [f"{said} It never enters latent mode, so nothing can be put in the latents' place.", *left_out]
    found = {
        condition: paired_comparison(answers, normal, _clusters(rows, condition=condition), confidence)
        for condition, answers in right.items()
    }
    lines = [
        f"- {FED[condition]}: {_difference(one)}; {percent(mean(changed[condition]))} of the answers change"
        for condition, one in found.items()
    ]
    compared = f"{len(found)} comparisons with normal, each with an interval of its own:"
    return [f"{said} {_verdict(found)}", "\n".join([compared, "", *lines]), *left_out]


def _verdict(found: Mapping[str, PairedDifference | PairedBootstrap]) -> str:
    worse = {condition for condition, one in found.items() if one.verdict == "differs" and one.difference < 0}
    if "other" in worse:
        needed = (
            "" if "markers" in worse else " That the model needs them is not shown: without any slot it is not worse."
        )
        return f"The answers depend on what the latents hold: with another item's latents they are worse.{needed}"
    if worse & {"zeroed", "noised"}:
        return (
            f"Foreign states in the slots do harm ({', '.join(sorted(worse - {'markers'}))}), but that another item's "
            "latents do is not shown: the model needs states of this kind, whether it reads this picture from them is "
            "open."
        )
    if worse:
        return "The slots are needed, but that it matters what they hold is not shown: they may be no more than room."
    return (
        "That the model uses its latents is not shown: no condition is worse than normal beyond noise. The intervals "
        f"allow a loss of up to {points(min(one.low for one in found.values()))} points."
    )


def condition_table(rows: Sequence[Row], confidence: float) -> str:
    """Markdown, a line a condition."""
    right, changed = (_by(rows, "condition", column) for column in ("correct", "changed"))
    lines = ["| slots are fed | n | accuracy | minus normal | answers changed |", "| --- | ---: | ---: | --- | ---: |"]
    for condition, answers in right.items():
        cells = [f"{condition}: {FED[condition]}", str(len(answers)), percent(mean(answers)), "", ""]
        if condition != "normal":
            clusters = _clusters(rows, condition=condition)
            found = paired_comparison(answers, right["normal"], clusters, confidence)
            cells[3:] = [_difference(found), percent(mean(changed[condition]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_latent_check(rows: Sequence[Row], confidence: float) -> Figure:
    """A bar of accuracy with its interval for every condition, and beside it how many answers changed."""
    right, changed = (_by(rows, "condition", column) for column in ("correct", "changed"))
    found = [
        score_interval(np.array(answers, dtype=float), _clusters(rows, condition=condition), confidence=confidence)
        for condition, answers in right.items()
    ]
    figure = Figure(figsize=(8.4, 1.1 + 0.48 * len(found)), layout="constrained")
    panel = figure.subplots()
    names = [
        f"{condition}: {FED[condition]}"
        + ("" if condition == "normal" else f"\n{percent(mean(share))} of answers change")
        for condition, share in changed.items()
    ]
    reach = [[100 * (one.value - one.low) for one in found], [100 * (one.high - one.value) for one in found]]
    colours = [_GREEN if condition == "normal" else _GREY for condition in right]
    panel.barh(
        names, [100 * one.value for one in found], xerr=reach, color=colours, ecolor=_DARK, capsize=3, height=0.62
    )
    panel.axvline(100 * found[0].value, color=_GREEN, linestyle="--", linewidth=1.0)
    panel.invert_yaxis()
    panel.set(xlim=(0, 100), xlabel="accuracy, %")
    panel.set_title(f"what the latent slots are fed, n = {len(right['normal'])}", fontsize="medium", loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    return figure


# --------------------------------------------------------------------------------------------------- alignment maps


def map_sentences(name: str, maps: Sequence[Row], confidence: float) -> list[str]:
    """A paragraph a teacher, of rows as `probes.alignment_maps` returns them."""
    said = []
    for teacher in _distinct(maps, "teacher"):
        own, other = of_records(maps, teacher)
        found = _interval(np.subtract(own, other), confidence)
        said.append(
            f"**{name}, {teacher}**: the cosine is {mean(own):.3f} to the features of the own image and "
            f"{mean(other):.3f} to those of another one at the same step, a difference of {found.value:+.3f} "
            f"({_ends(found, '{:+.3f}'.format)}, n = {len(own)} held-out records). "
            + ("The latents hold" if found.low > 0 else "It is not shown that the latents hold")
            + " something of their own picture that others do not have."
        )
    return said


def of_records(maps: Sequence[Row], teacher: str) -> tuple[list[float], list[float]]:
    """By record the mean cosine over its segments and patches, to the own and to the other image."""
    own, other = (
        [mean([mean(values) for values in found]) for found in _by(maps, "record", column, teacher=teacher).values()]
        for column in ("cosine", "cosine_other_image")
    )
    return own, other


def draw_alignment_maps(maps: Sequence[Row], picture: Callable[[Row], PIL.Image.Image], confidence: float) -> Figure:
    """Maps of the record with the most targets, own image beside another one, and means of all records by step.

    Args:
        picture: what a row's target looks like.
    """
    teachers = _distinct(maps, "teacher")
    of_record = _by([{**row, "row": row} for row in maps], "record", "row", teacher=teachers[0])
    record = max(of_record, key=lambda name: len(of_record[name]))
    shown = [row for row in maps if row["record"] == record]
    steps = of_record[record][:_SHOWN_STEPS]
    figure = Figure(figsize=(2.2 + 2.4 * len(teachers), 1.25 * len(steps) + 3.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.25 * len(steps) + 0.6, 2.8])
    top, bottom = halves
    grid = top.subplots(len(steps), 1 + 2 * len(teachers), squeeze=False)
    columns = [(teacher, side) for teacher in teachers for side in ("cosine", "cosine_other_image")]
    largest = max(max(map(abs, row[side])) for row in shown for side in ("cosine", "cosine_other_image"))
    for line, step in zip(grid, steps, strict=True):
        line[0].imshow(np.asarray(picture(step)))
        line[0].set_ylabel(f"step {step['step'] + 1}", fontsize="small")
        for panel, (teacher, side) in zip(line[1:], columns, strict=True):
            (row,) = (one for one in shown if (one["teacher"], one["segment"]) == (teacher, step["segment"]))
            values = np.reshape(row[side], (row["rows"], row["columns"]))
            drawn = panel.imshow(values, vmin=-largest, vmax=largest, cmap="RdBu_r")
    for panel in grid.flat:
        panel.set(xticks=[], yticks=[])
    sides = {"cosine": "own image", "cosine_other_image": "another image"}
    titles = ["target", *(f"{teacher}\n{sides[side]}" for teacher, side in columns)]
    for panel, title in zip(grid[0], titles, strict=True):
        panel.set_title(title, fontsize="small")
    top.colorbar(drawn, ax=grid, shrink=0.8, label="cosine")

    panel = bottom.subplots()
    for number, teacher in enumerate(teachers):
        for side, style, marker in (("cosine", "-", "o"), ("cosine_other_image", "--", "x")):
            by_step = _by([{**row, "mean": mean(row[side])} for row in maps], "step", "mean", teacher=teacher)
            over = {step + 1: one for step, one in _means(by_step, confidence).items()}
            _line(panel, over, f"{teacher}, {sides[side]}", f"C{number}", style, marker)
    panel.set(xlabel="step", ylabel="mean cosine")
    panel.set_title(f"{len(of_record)} held-out records", fontsize="medium", loc="left")
    _finish(panel, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


# -------------------------------------------------------------------------------------------------------- of all rows


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """`figure` as NAME.png and NAME.svg in `folder`, the same bytes for the same figure."""
    figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    # Ids inside the drawing are random otherwise.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def mean(values: Sequence[float] | np.ndarray) -> float:
    """0 of nothing."""
    return math.fsum(values) / len(values) if len(values) else 0.0


def _distinct(rows: Iterable[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _by(rows: Iterable[Row], key: str, column: str, **where: Any) -> dict[Any, list[Any]]:
    """`column` of the rows that are as `where` says, by their value of `key`, in order."""
    found: dict[Any, list[Any]] = {}
    for row in rows:
        if all(row[name] == value for name, value in where.items()):
            found.setdefault(row[key], []).append(row[column])
    return found


def _clusters(rows: Iterable[Row], **where: Any) -> list[str]:
    (key,) = list(where)[:1]
    return next(iter(_by(rows, key, "cluster", **where).values()))


def _interval(values: Sequence[float] | np.ndarray, confidence: float) -> Interval:
    """Of a mean; of no width where the values have no spread, which `_ends` says."""
    try:
        return bootstrap_interval(values, confidence=confidence)
    except StatisticsError:
        return Interval(mean(values), mean(values), mean(values), confidence, "no spread")


def _means(values: Mapping[int, Sequence[float]], confidence: float) -> dict[int, Interval]:
    return {at: _interval(values[at], confidence) for at in sorted(values)}


def _ends(found: Interval, shown: Callable[[float], str]) -> str:
    if found.method == "no spread":
        return "too few values for an interval"
    return f"{found.confidence:.0%}: {shown(found.low)} to {shown(found.high)}"


def _difference(found: PairedDifference | PairedBootstrap) -> str:
    return (
        f"{points(found.difference)} points ({found.confidence:.0%}: {points(found.low)} to {points(found.high)}, "
        f"p = {found.p_value:.2g}, n = {found.n}), {found.verdict}"
    )


def _line(
    panel: Axes,
    found: Mapping[int, Interval],
    label: str,
    colour: str,
    style: str,
    marker: str,
    in_percent: bool = False,
) -> None:
    """Means with their intervals."""
    factor = 100.0 if in_percent else 1.0
    values = [factor * one.value for one in found.values()]
    reach = [
        [factor * (one.value - one.low) for one in found.values()],
        [factor * (one.high - one.value) for one in found.values()],
    ]
    look: dict[str, Any] = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4, "capsize": 2}
    panel.errorbar([*found], values, yerr=reach, label=label, **look)


def _finish(panel: Axes, **legend: Any) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize="small", **legend)
