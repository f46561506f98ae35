"""Every cell that the paper prints about scores, beside the same number of ours.

In: the paper's tables, and the scores and predictions of any number of models.
Out: a `PaperCell` for each printed number: ours with its interval, the difference with its own, and a verdict or the
reason why there is none.
Always: like is compared with like (the aggregate that was printed, on the whole published data set); a printed number
has the error of its items; a cell on which the paper disagrees with itself says so.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from valr_ops.evaluation.benchmarks import blink, cv_bench, mmstar, mmvp, vsi_bench, vstar
from valr_ops.evaluation.benchmarks.vsi_bench import DIRECTION, DIRECTIONS, TASKS
from valr_ops.evaluation.statistics import Interval, against_printed, score_interval
from valr_ops.recipe.recipes import paper, paper_tables

Rows = Sequence[Mapping[str, Any]]
Answers = tuple[Mapping[str, Any], Rows]
"""Of one model: `scores.json`, and the rows of `predictions.jsonl`."""

WITHIN_NOISE, DIFFERS = "within noise", "differs"
NOT_RUN, DRAWN, UNKNOWN_BIN = "not run", "drawn questions", "bin not printed"
"""Why there is no verdict; beside these, ``n of N asked``."""

_TABLES = ("1", "2", "3", "4", "5", "6", "9", "11", "12")
_ALSO_CALLED = {"base": ("qwen2.5-vl-7b", "qwen2.5-vl-7b-instruct"), "sft": ("vanilla_sft",)}
_COUNTS = {
    "vsi_bench": vsi_bench.COUNTS,
    "blink": blink.COUNTS,
    "mmvp": mmvp.COUNTS,
    "mmstar": mmstar.COUNTS,
    "vstar": vstar.COUNTS,
    "cv_bench": cv_bench.COUNTS,
}
_FRAMES = 32
_TASK_SHARES = {task: 1 / len(TASKS) for task in TASKS if task != DIRECTION} | {
    level: 1 / len(TASKS) / len(DIRECTIONS) for level in DIRECTIONS
}
_LEVEL_SHARES = {level: 1 / len(DIRECTIONS) for level in DIRECTIONS}
_SOURCE_SHARES = {"ade": 0.25, "coco": 0.25, "omni": 0.5}
_BIN_TOKENS = 50
"""On either side of a length that figure 2 names, whose bins are not printed."""


@dataclass(frozen=True)
class PaperCell:
    """One printed number and ours: scores in percent; differences in points, ours minus the paper's."""

    table: str
    """Number of the table, or `fig2`."""
    row: str
    column: str
    paper: float
    model: str
    """Ours that the row is about, by its name in scores."""
    items: int
    """Questions of the printed number; 0 where that is unknown."""
    compared: str
    """Which number of ours."""
    verdict: str
    """`within noise`, `differs`, or why there is none."""
    notes: tuple[str, ...]
    """What else has to be known: where the paper disagrees with itself, other frames than the paper's."""
    profile: str = ""
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    macro: float | None = None
    """VSI-Bench's official average of ours, where the cell is about an average."""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


@dataclass(frozen=True)
class _Printed:
    """A number as it stands in the paper."""

    table: str
    row: str
    column: str
    score: float
    model: str
    frames: int = _FRAMES
    macro: bool = False
    """Whether it is VSI-Bench's average and the mean of its eight tasks."""
    tokens: int | None = None
    """Length of the answers that it is about; None for answers of any length."""

    @property
    def benchmark(self) -> str:
        return "vsi_bench" if self.table == "1" else self.column

    @property
    def average(self) -> bool:
        """Whether it is an average of all of VSI-Bench."""
        return self.column in ("avg", "vsi_bench")

    @property
    def published(self) -> dict[str, int]:
        """Questions of each type that it is about."""
        counts = _COUNTS[self.benchmark]
        if self.benchmark != "vsi_bench" or self.average:
            return counts
        return {name: counts[name] for name in _types(self.column)}

    @property
    def shares(self) -> Mapping[str, float] | None:
        """Weights of question types in the number; None for a plain mean over questions."""
        if self.macro:
            return _TASK_SHARES
        return _LEVEL_SHARES if self.column == DIRECTION else _SOURCE_SHARES if self.column == "cv_bench" else None

    @property
    def compared(self) -> str:
        if self.tokens is not None:
            return f"mean of answers of {self.tokens} ± {_BIN_TOKENS} tokens"
        if self.column == "cv_bench":
            return "1/4 ade + 1/4 coco + 1/2 omni"
        if self.macro:
            return "macro"
        if self.table == "1" and not self.average:
            return "mean of three levels" if self.column == DIRECTION else "mean of the type"
        return "single" if self.column == "mmvp" else "micro"


@dataclass
class _Model:
    """What one of our models reached, each number measured once."""

    answers: Answers
    confidence: float
    known: dict[tuple[Any, ...], tuple[Interval | None, int]] = field(default_factory=dict)

    def scored(self, benchmark: str) -> tuple[str, Mapping[str, Any]] | None:
        """Name and entry of the benchmark in `scores.json`, if the model was asked it."""
        entries = self.answers[0]["benchmarks"]
        named = sorted((name != benchmark, name) for name, score in entries.items() if score["format"] == benchmark)
        return (named[0][1], entries[named[0][1]]) if named else None

    def measured(self, printed: _Printed, name: str, shares: Mapping[str, float] | None) -> tuple[Interval | None, int]:
        """The number and of how many answers; None where a question type that it is made of is missing."""
        part = printed.table == "1" and not printed.average
        key = (name, printed.column if part else "", bool(shares), printed.tokens)
        if key not in self.known:
            rows = [
                row
                for row in self.answers[1]
                if row["benchmark"] == name
                and (not part or row["question_type"] in printed.published)
                and (printed.tokens is None or abs(row["text_tokens"] - printed.tokens) <= _BIN_TOKENS)
            ]
            types = [row["question_type"] for row in rows]
            interval = None
            if rows and (shares is None or set(types) == set(shares)):
                scores, clusters = [row["score"] for row in rows], [row["cluster"] for row in rows]
                interval = score_interval(scores, clusters, types if shares else None, shares, self.confidence)
            self.known[key] = interval, len(rows)
        return self.known[key]


def paper_cells(models: Mapping[str, Answers], confidence: float) -> list[PaperCell]:
    """All cells of tables 1 to 6, 9, 11 and 12 and the known points of figure 2, in the paper's order.

    Args:
        models: by name: `base`, `sft`, a variant of the recipe such as `valr_m`, or the paper's name of another model;
            letter case does not matter.
        confidence: level of every interval.
    """
    ours = {name.lower(): _Model(answers, confidence) for name, answers in models.items()}
    for name, others in _ALSO_CALLED.items():
        for other in others:
            if other in ours:
                ours.setdefault(name, ours[other])
    tables = paper_tables()
    return [
        _cell(printed, ours.get(printed.model), _inconsistencies(printed, tables["known_inconsistencies"]))
        for printed in _printed_numbers(tables["tables"])
    ]


def _cell(printed: _Printed, model: _Model | None, inconsistencies: Sequence[str]) -> PaperCell:
    total = 0 if printed.tokens is not None else sum(printed.published.values())
    found = model.scored(printed.benchmark) if model else None
    notes = [*inconsistencies]
    verdict = NOT_RUN
    values: dict[str, Any] = {}
    if model and found:
        name, score = found
        interval, asked = model.measured(printed, name, printed.shares)
        values["profile"] = score["profile"]
        if printed.average:
            macro, _ = model.measured(printed, name, _TASK_SHARES)
            values["macro"] = _percent(macro.value) if macro else None
        if interval:
            values |= {"ours": interval.value, "low": interval.low, "high": interval.high}
        if score["drawn"]:
            verdict = DRAWN
        elif printed.tokens is not None:
            verdict = UNKNOWN_BIN
        elif asked != total or interval is None:
            verdict = f"{asked:,} of {total:,} asked"
        else:
            difference = against_printed(interval, printed.score, total)
            verdict = difference.verdict
            values |= {
                "difference": difference.difference,
                "difference_low": difference.low,
                "difference_high": difference.high,
            }
        frames = model.answers[0]["budget"]["frames"]
        if printed.benchmark == "vsi_bench" and frames != printed.frames:
            notes.append(f"{frames} frames, the paper {printed.frames}")
    shares = {name: _percent(value) for name, value in values.items() if isinstance(value, float) and name != "macro"}
    return PaperCell(
        table=printed.table,
        row=printed.row,
        column=printed.column,
        paper=printed.score,
        model=printed.model,
        items=total,
        compared=printed.compared,
        verdict=verdict,
        notes=tuple(notes),
        **(values | shares),
    )


def _printed_numbers(tables: Mapping[str, Any]) -> Iterator[_Printed]:
    trained = _trained()
    for table in _TABLES:
        for row in tables[table]["rows"]:
            label, model = _row(row, trained)
            scores: Mapping[str, float] = row["scores"]
            macro = table == "1" and _printed_macro(scores)
            for column, score in scores.items():
                yield _Printed(
                    table, label, column, score, model, row.get("frames", _FRAMES), macro and column == "avg"
                )
    for curve in tables["fig2"]["known_points"]:
        for point in curve["points"]:
            label = f"{curve['model']}, {point['tokens']} tokens"
            yield _Printed("fig2", label, curve["benchmark"], point["accuracy"], curve["model"], tokens=point["tokens"])


def _printed_macro(scores: Mapping[str, float]) -> bool:
    """Whether a printed average of VSI-Bench is the mean of its tasks; most are the mean over questions."""
    of_task = {task: sum(vsi_bench.COUNTS[name] for name in _types(task)) for task in TASKS}
    macro = math.fsum(scores[task] for task in TASKS) / len(TASKS)
    micro = math.fsum(scores[task] * n for task, n in of_task.items()) / sum(of_task.values())
    # Sub-tasks are printed with one decimal. The base model's average is neither of the two.
    return abs(macro - scores["avg"]) < 0.1 < abs(micro - scores["avg"])


def _types(task: str) -> tuple[str, ...]:
    """Question types of one of VSI-Bench's eight tasks."""
    return DIRECTIONS if task == DIRECTION else (task,)


_Settings = tuple[frozenset[str], float, int, int]
"""Teachers, weight, block, slots."""


def _trained() -> dict[_Settings, str]:
    """Names of the recipe's variants by what they are trained with."""
    recipe = paper()
    found: dict[_Settings, str] = {}
    for name, variant in recipe.variants.items():
        if variant.records is None and variant.stage1_records is None:
            teachers = recipe.alignment.teachers if variant.teachers is None else variant.teachers
            weight = recipe.alignment.weight if variant.weight is None else variant.weight
            block = recipe.alignment.block if variant.block is None else variant.block
            found.setdefault(_settings(teachers, weight, block, variant.slots or recipe.latents.slots), name)
    return found


def _settings(teachers: Sequence[str], weight: float, block: int, slots: int) -> _Settings:
    # Without a weight no teacher counts.
    return (frozenset(teachers if weight else ()), weight, block, slots)


def _row(row: Mapping[str, Any], trained: Mapping[_Settings, str]) -> tuple[str, str]:
    """What the row is called, and our model of it."""
    if "model" in row:
        ours = {printed: name for name, others in _ALSO_CALLED.items() for printed in others}
        return row["model"], ours.get(row["model"], row["model"])
    varied, value = next((name, value) for name, value in row.items() if name != "scores")
    if value in ([], None, "qwen2.5-vl-7b"):
        return "qwen2.5-vl-7b", "base"
    recipe = paper()
    teachers = value if varied == "teachers" else [value] if varied == "teacher" else recipe.alignment.teachers
    settings = _settings(
        teachers,
        row.get("alignment_weight", recipe.alignment.weight),
        row.get("layer", recipe.alignment.block),
        row.get("latent_tokens", recipe.latents.slots),
    )
    words = {"teachers": " + ".join(teachers), "teacher": value, "layer": f"block {value}"}
    words |= {"alignment_weight": f"weight {value}", "latent_tokens": f"K = {value}"}
    return words[varied], trained[settings]


def _inconsistencies(printed: _Printed, known: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"the paper disagrees with itself: {one['about']}"
        for one in known
        if printed.table in one["where"] and printed.column in one["about"] and printed.score in one["printed"]
    ]


def cells_csv(cells: Sequence[PaperCell]) -> str:
    """A line a cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [one.name for one in fields(PaperCell)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(cell) | {"notes": "; ".join(cell.notes)} for cell in cells)
    return out.getvalue()


def cells_markdown(cells: Sequence[PaperCell]) -> str:
    """A section a table of the paper, a line a cell."""
    titles = {number: table["what"] for number, table in paper_tables()["tables"].items()}
    sections = []
    for table in dict.fromkeys(cell.table for cell in cells):
        lines = [f"### {table_name(table)}: {titles[table]}", ""]
        lines.append("| row | column | paper | ours | interval | difference | its interval | verdict | notes |")
        lines.append("| --- | --- | ---: | ---: | --- | ---: | --- | --- | --- |")
        for cell in (one for one in cells if one.table == table):
            shown = [
                cell.row,
                cell.column,
                f"{cell.paper:.1f}",
                *number_words(cell),
                cell.verdict,
                "; ".join(cell.notes),
            ]
            lines.append(f"| {' | '.join(shown)} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def number_words(cell: PaperCell) -> list[str]:
    """Ours, its interval, the difference and its interval; empty where there is none."""
    if cell.ours is None:
        return ["", "", "", ""]
    words = [f"{cell.ours:.1f}", f"{cell.low:.1f} to {cell.high:.1f}"]
    if cell.difference is None:
        return [*words, "", ""]
    low, high = signed(cell.difference_low or 0.0), signed(cell.difference_high or 0.0)
    return [*words, signed(cell.difference), f"{low} to {high}"]


def signed(points: float) -> str:
    """A difference in points with its sign; what rounds to zero is +0.0."""
    return f"{round(points, 1) + 0.0:+.1f}".replace("-", "−")


def table_name(table: str) -> str:
    """`Table 4`, `Figure 2`."""
    return f"Figure {table.removeprefix('fig')}" if table.startswith("fig") else f"Table {table}"


def verdict_counts(cells: Sequence[PaperCell]) -> dict[str, int]:
    """How many cells have which verdict; those that were asked in part are counted together."""
    counted = Counter("asked in part" if cell.verdict.endswith(" asked") else cell.verdict for cell in cells)
    order = (WITHIN_NOISE, DIFFERS, "asked in part", DRAWN, UNKNOWN_BIN, NOT_RUN)
    return {verdict: counted[verdict] for verdict in order if counted[verdict]}


def _percent(share: float) -> float:
    return round(100 * share, 4)
