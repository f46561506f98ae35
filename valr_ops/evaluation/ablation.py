"""The stage `ablation_table`: models side by side on every benchmark, as data, as words and as a plot.

In: scores folders, one a model and any number of them; one model is the reference that the others are compared with.
Out: `table.json`, `table.csv`, `table.md` and `accuracy.png`; and the paper's cells beside ours, `paper_cells.json`,
`.csv` and `.md`.
Always: models are compared item by item on equal questions, by one profile and under one budget, unless the user allows
a difference by name, which then stands in the table; every score stands beside its interval and the majority answer.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from valr_ops.evaluation.models import Budget
from valr_ops.evaluation.paper_cells import (
    Answers,
    PaperCell,
    cells_csv,
    cells_markdown,
    paper_cells,
    signed,
    verdict_counts,
)
from valr_ops.evaluation.run import read_predictions, read_scores
from valr_ops.evaluation.statistics import (
    PairedBootstrap,
    paired_comparison,
    score_interval,
    smallest_detectable_difference,
)
from valr_ops.store.artifacts import StageContext, StageReport

LABELS = {"base": "base", "sft": "SFT", "valr_s": "VaLR-S", "valr_m": "VaLR-M"}
"""How models are called in tables, in their order; any other one is called by its name and comes after them."""
REFERENCE = "sft"
TITLES = {
    "vsi_bench": "VSI-Bench",
    "blink": "BLINK",
    "mmvp": "MMVP",
    "mmstar": "MMStar",
    "vstar": "V*",
    "cv_bench": "CV-Bench",
    "math_vista": "MathVista",
    "math_vision": "MathVision",
    "mm_halu": "MMHalu",
    "realworldqa": "RealWorldQA",
    "hr_bench": "HR-Bench",
}
"""How benchmarks are called in tables; any other one by its name."""
FEW = 100
"""Benchmarks of fewer items are compared together: alone they show hardly any difference."""
TABLE, CELLS = "table.json", "paper_cells.json"
_NAMES = {"base_model": "base", "stage1_sft": "sft"}
_DATA_FIELDS = ("profile", "revision", "items")
_Keyed = Mapping[tuple[str, str], Mapping[str, Any]]
"""Rows of a model by benchmark and id."""
_COMPARED = ("difference", "low", "high", "p_value", "gained", "lost", "verdict", "test", "detectable")


class ComparisonError(ValueError):
    """Models that can't be put side by side: which, what differs, and what to do."""


def build_ablation_table(context: StageContext) -> StageReport:
    """Stage `ablation_table`.

    Raises:
        BudgetError: the scores were reached under different budgets.
        ComparisonError: on different items, or by different profiles.
        PredictionsError: a scores artifact does not hold one prediction for every item.
    """
    confidence = context.recipe.evaluation.confidence
    models = read_models({model_name(stage): folder for stage, folder in context.inputs.items()})
    table = compare(models, REFERENCE, confidence, context.recipe.scale)
    cells = paper_cells(models, confidence)
    preview = markdown(table)
    for name, text in (
        (TABLE, _json(table)),
        ("table.csv", table_csv(table)),
        ("table.md", preview + "\n"),
        (CELLS, _json([asdict(cell) for cell in cells])),
        ("paper_cells.csv", cells_csv(cells)),
        ("paper_cells.md", cells_markdown(cells) + "\n"),
    ):
        (context.out / name).write_text(text, encoding="utf-8")
    draw(table).savefig(context.out / "accuracy.png", dpi=110, metadata={"Software": None})

    summary: dict[str, int | float | str] = {}
    for name, benchmark in table["benchmarks"].items():
        summary[f"majority_{name}"] = benchmark["majority"]["accuracy"]
        for row in benchmark["rows"]:
            summary[f"accuracy_{name}_{row['model']}"] = row["accuracy"]
            if row["against_reference"]:
                summary[f"verdict_{name}_{row['model']}"] = row["against_reference"]["verdict"]
    return StageReport(
        summary=summary,
        tables={"models side by side": preview, "the paper's cells": cells_sentence(cells)},
        plots=("accuracy.png",),
    )


def model_name(name: str) -> str:
    """The model's name in tables, by the stage that made it or its scores: `sft` for `stage1_sft` and `scores_sft`."""
    return _NAMES.get(name, name).removeprefix("scores_").removeprefix("stage2_")


def read_models(folders: Mapping[str, Path]) -> dict[str, Answers]:
    """Scores and predictions by model, in the order of `LABELS`, others behind as they are given.

    Raises:
        PredictionsError: a folder without scores, or without one prediction for every item.
    """
    names = [*(name for name in LABELS if name in folders), *(name for name in folders if name not in LABELS)]
    return {name: (read_scores(folders[name]), read_predictions(folders[name])) for name in names}


def compare(
    models: Mapping[str, Answers], reference: str, confidence: float, scale: str = "", allowed: Sequence[str] = ()
) -> dict[str, Any]:
    """The table as data: per benchmark one row a model, with its paired difference to `reference`; shares in [0, 1].

    Args:
        models: by name, in the order of the rows; not all need to have been asked every benchmark.
        reference: name of the model that the others are compared with.
        confidence: level of every interval of a difference.
        scale: of the recipe, for the heading; empty for scores from outside of the graph.
        allowed: fields in which models may differ: those of `Budget`, `profile`, `revision` and `items`.

    Raises:
        BudgetError: different budgets.
        ComparisonError: different items or profiles, no such reference, or no such field.
    """
    if reference not in models:
        raise ComparisonError(f"there are no scores of the reference {reference!r}; choose one of {', '.join(models)}")
    rows = {
        name: {(row["benchmark"], row["id"]): row for row in predictions} for name, (_, predictions) in models.items()
    }
    different = _allowed_differences(models, rows, reference, allowed)
    first = models[reference][0]["benchmarks"]
    names = list(dict.fromkeys([*first, *(name for scores, _ in models.values() for name in scores["benchmarks"])]))
    benchmarks = {}
    for benchmark in names:
        entries = {name: scores["benchmarks"].get(benchmark) for name, (scores, _) in models.items()}
        entry = entries[reference] or next(one for one in entries.values() if one)
        benchmarks[benchmark] = {
            "title": TITLES.get(benchmark, benchmark),
            **{name: entry[name] for name in ("format", "profile", "revision", "drawn", "n", "majority", "rejected")},
            "baselines": {name: entry["totals"][name] for name in ("always_a", "random") if name in entry["totals"]},
            "rows": [
                _row(name, one, _difference(rows, name, reference, [benchmark], confidence))
                for name, one in entries.items()
                if one
            ],
        }
    return {
        "scale": scale,
        "confidence": confidence,
        "reference": reference,
        "models": {name: label(name) for name in models},
        "budgets": {name: asdict(Budget(**scores["budget"])) for name, (scores, _) in models.items()},
        "different": different,
        "benchmarks": benchmarks,
        "pooled": _pooled(models, rows, reference, confidence),
    }


def label(model: str) -> str:
    """How the model is called in tables."""
    return LABELS.get(model, model)


def _allowed_differences(
    models: Mapping[str, Answers],
    rows: Mapping[str, _Keyed],
    reference: str,
    allowed: Sequence[str],
) -> list[str]:
    """In words, what differs and may; everything else is refused."""
    known = [*(field.name for field in fields(Budget) if field.name != "slots"), *_DATA_FIELDS]
    unknown = [field for field in allowed if field not in known]
    if unknown:
        raise ComparisonError(f"no field {unknown[0]!r} can be allowed to differ; there are {', '.join(known)}")
    found: list[str] = []
    budgets = {name: Budget(**scores["budget"]) for name, (scores, _) in models.items()}
    for name, budget in budgets.items():
        pair = (label(reference), label(name))
        budgets[reference].require_comparable(budget, pair, allowed)
        found += budgets[reference].differences(budget, pair).values()
    for benchmark in dict.fromkeys(name for scores, _ in models.values() for name in scores["benchmarks"]):
        asked = [name for name, (scores, _) in models.items() if benchmark in scores["benchmarks"]]
        first = reference if reference in asked else asked[0]
        for name in asked:
            said = _data_differences(models, rows, benchmark, first, name)
            refused = {field: words for field, words in said.items() if field not in allowed}
            if refused:
                words = "; ".join(refused.values())
                allow = " ".join(f"--allow-different {field}" for field in refused)
                raise ComparisonError(
                    f"{label(first)} and {label(name)} can't be compared on {benchmark}: {words}. "
                    f"Score both on the same files by the same profile; `valr report {allow}` compares nevertheless"
                )
            found += [f"{benchmark}: {words}" for words in said.values()]
    return list(dict.fromkeys(found))


def _data_differences(
    models: Mapping[str, Answers], rows: Mapping[str, _Keyed], benchmark: str, one: str, other: str
) -> dict[str, str]:
    """By field that differs, half a sentence with both values."""
    first, second = (models[name][0]["benchmarks"][benchmark] for name in (one, other))
    said = {
        field: f"{field} is {first[field]!r} for {label(one)} and {second[field]!r} for {label(other)}"
        for field in ("profile", "revision")
        if first[field] != second[field]
    }
    asked, other_asked = (
        {(key[1], row["question"], row["gold"]) for key, row in rows[name].items() if key[0] == benchmark}
        for name in (one, other)
    )
    if asked != other_asked:
        some = sorted(asked ^ other_asked)[0][0]
        said["items"] = f"they answered different items ({len(asked)} and {len(other_asked)}, such as {some!r})"
    return said


def _difference(
    rows: Mapping[str, _Keyed],
    name: str,
    reference: str,
    benchmarks: Sequence[str],
    confidence: float,
) -> dict[str, Any] | None:
    """`name` minus `reference` on the items that both answered; None without any, and for the reference."""
    ours, theirs = rows[name], rows[reference]
    keys = [key for key in theirs if key[0] in benchmarks and key in ours]
    if name == reference or not keys:
        return None
    first, second = [ours[key]["score"] for key in keys], [theirs[key]["score"] for key in keys]
    clusters = [f"{key[0]}/{theirs[key]['cluster']}" if theirs[key]["cluster"] else "" for key in keys]
    found = paired_comparison(first, second, clusters, confidence)
    gained = sum(one > two for one, two in zip(first, second, strict=True))
    lost = sum(one < two for one, two in zip(first, second, strict=True))
    if isinstance(found, PairedBootstrap):
        detectable = found.detectable
    else:
        detectable = smallest_detectable_difference(found.n, (gained + lost) / found.n, confidence)
    return {
        "n": found.n,
        "difference": round(found.difference, 6),
        "low": round(found.low, 6),
        "high": round(found.high, 6),
        "p_value": round(found.p_value, 6),
        "gained": gained,
        "lost": lost,
        "verdict": found.verdict,
        "test": found.test,
        "detectable": round(detectable, 6),
    }


def _pooled(
    models: Mapping[str, Answers],
    rows: Mapping[str, _Keyed],
    reference: str,
    confidence: float,
) -> dict[str, Any] | None:
    """Benchmarks of few items as if they were one; of each model those that the reference was asked too."""
    few = [name for name, score in models[reference][0]["benchmarks"].items() if score["n"] < FEW]
    if not few:
        return None
    pooled = []
    for name in models:
        keys = [key for key in rows[name] if key[0] in few]
        if not keys:
            continue
        clusters = [f"{key[0]}/{rows[name][key]['cluster']}" if rows[name][key]["cluster"] else "" for key in keys]
        interval = score_interval([rows[name][key]["score"] for key in keys], clusters, confidence=confidence)
        pooled.append(
            {
                "model": name,
                "label": label(name),
                "n": len(keys),
                "accuracy": round(interval.value, 6),
                "low": round(interval.low, 6),
                "high": round(interval.high, 6),
                "against_reference": _difference(rows, name, reference, few, confidence),
            }
        )
    return {"benchmarks": few, "n": sum(models[reference][0]["benchmarks"][name]["n"] for name in few), "rows": pooled}


def _row(name: str, score: Mapping[str, Any], against: dict[str, Any] | None) -> dict[str, Any]:
    low, high = score["interval"]
    majority = score["majority"]["accuracy"]
    copied = (
        *("n", "correct", "accuracy", "interval_method", "totals", "latent_trigger_rate", "mean_segments"),
        *("mean_text_tokens", "mean_latent_steps", "unresolved", "cut_off", "format_misses"),
    )
    return {
        "model": name,
        "label": label(name),
        **{field: score[field] for field in copied},
        "low": low,
        "high": high,
        "against_majority": "above" if low > majority else "below" if high < majority else "within noise",
        "against_reference": against,
    }


def comparisons(table: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """What is said about differences: title and compared rows of each benchmark of enough items, then of the others."""
    blocks = [(one["title"], one["n"], one["rows"]) for one in table["benchmarks"].values() if one["n"] >= FEW]
    if table["pooled"]:
        names = table["pooled"]["benchmarks"]
        alone = table["benchmarks"][names[0]]["title"]
        title = alone if len(names) == 1 else f"{len(names)} benchmarks of fewer than {FEW} items"
        blocks.append((title, table["pooled"]["n"], table["pooled"]["rows"]))
    compared = [
        (f"{title}, {n:,} items", [row for row in rows if row["against_reference"]]) for title, n, rows in blocks
    ]
    return [(title, rows) for title, rows in compared if rows]


def markdown(table: Mapping[str, Any]) -> str:
    """The table in Markdown: scores, differences, and what could not be read."""
    benchmarks = list(table["benchmarks"].values())
    head = "| model | " + " | ".join(_cell(f"{one['title']} ({one['n']:,})") for one in benchmarks) + " |"
    rule = "| --- |" + " ---: |" * len(benchmarks)

    def matrix(fill: Any) -> list[str]:
        lines = []
        for name, called in table["models"].items():
            found = [next((row for row in one["rows"] if row["model"] == name), None) for one in benchmarks]
            lines.append(f"| {_cell(called)} | " + " | ".join(fill(row) if row else "" for row in found) + " |")
        return lines

    constant = [
        f"| {title} | " + " | ".join("" if share is None else f"{100 * share:.1f}" for share in shares) + " |"
        for title, shares in baselines(benchmarks)
    ]
    scores = matrix(lambda row: f"{100 * row['accuracy']:.1f} ({interval_words(row)})")
    reference = label(table["reference"])
    lines = [f"### Mean score in %, with its {table['confidence']:.0%} interval", "", head, rule, *constant, *scores]
    lines += ["", f"### Minus {reference}, in points", ""]
    lines += ["| on | model | difference | | p | could show |", "| --- | --- | --- | --- | ---: | ---: |"]
    for title, rows in comparisons(table):
        for row in rows:
            against = row["against_reference"]
            cells = [title, row["label"], difference_words(against), against["verdict"], p_words(against["p_value"])]
            lines.append(f"| {' | '.join(map(_cell, cells))} | {100 * against['detectable']:.1f} |")
    lines += ["", "### Answers that could not be read / that only a lenient reader reads, in %", "", head, rule]
    lines += matrix(
        lambda row: f"{100 * row['unresolved'] / row['n']:.1f} / {100 * row['format_misses'] / row['n']:.1f}"
    )
    if table["different"]:
        lines += ["", "### Compared although different", "", *(f"- {_cell(one)}" for one in table["different"])]
    return "\n".join(lines)


def terminal_table(folder: Path) -> Group:
    """The table of an `ablation_table` artifact for the terminal, in about 80 columns; print it with rich."""
    table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    cells = [PaperCell(**cell) for cell in json.loads((folder / CELLS).read_text(encoding="utf-8"))]
    benchmarks = list(table["benchmarks"].values())
    heading = f"mean score in %, below it the {table['confidence']:.0%} interval"
    drawn = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=heading, title_justify="left")
    drawn.add_column("model", vertical="bottom")
    for one in benchmarks:
        # A title may break where a new word begins.
        title = re.sub(r"(?<=[a-z-])(?=[A-Z])|(?<=_)", "\n", one["title"])
        drawn.add_column(f"{escape(title)}\nn={one['n']:,}", justify="right", vertical="bottom", overflow="fold")
    for title, shares in baselines(benchmarks):
        drawn.add_row(title, *("" if share is None else f"{100 * share:.1f}" for share in shares), style="dim")
    for name, called in table["models"].items():
        found = [next((row for row in one["rows"] if row["model"] == name), None) for one in benchmarks]
        shown = [
            Text(f"{100 * row['accuracy']:.1f}").append(f"\n{100 * row['low']:.0f}–{100 * row['high']:.0f}", "dim")
            if row
            else Text("")
            for row in found
        ]
        drawn.add_row(escape(called), *shown, style="bold" if called.startswith("VaLR") else "")
    differences = Table(box=None, pad_edge=False, title=f"\nminus {label(table['reference'])}", title_justify="left")
    for heading in ("on", "model", "points", ""):
        differences.add_column(heading)
    for title, rows in comparisons(table):
        for place, row in enumerate(rows):
            against = row["against_reference"]
            words = [title if not place else "", row["label"], difference_words(against), against["verdict"]]
            differences.add_row(*map(escape, words))
    return Group(drawn, differences, Text(f"\n{cells_sentence(cells)}"))


def cells_sentence(cells: Sequence[PaperCell]) -> str:
    """How many cells of the paper ours were held against, and with what outcome."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdict_counts(cells).items())
    return f"The paper's {len(cells)} cells beside ours: {counts}."


def draw(table: Mapping[str, Any]) -> Figure:
    """Bars with intervals against the majority line, one panel a benchmark."""
    benchmarks = list(table["benchmarks"].values())
    across = min(3, len(benchmarks))
    down = -(-len(benchmarks) // across)
    height = 0.85 + 0.27 * len(table["models"])
    figure = Figure(figsize=(6.4 if across == 1 else 3.6 * across, 0.3 + height * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel, benchmark in zip(panels, benchmarks, strict=False):
        rows = benchmark["rows"]
        shares = [100 * row["accuracy"] for row in rows]
        reach = [
            [max(0.0, 100 * (row["accuracy"] - row["low"])) for row in rows],
            [max(0.0, 100 * (row["high"] - row["accuracy"])) for row in rows],
        ]
        colours = ["#0f766e" if row["label"].startswith("VaLR") else "#94a3b8" for row in rows]
        places = range(len(rows))
        panel.barh(places, shares, xerr=reach, color=colours, ecolor="#1f2937", capsize=3, height=0.62)
        panel.set_yticks(places, [row["label"] for row in rows], parse_math=False)
        majority = 100 * benchmark["majority"]["accuracy"]
        panel.axvline(majority, color="#b45309", linestyle="--", linewidth=1.2)
        panel.invert_yaxis()
        panel.set(xlim=(0, 100))
        panel.set_title(
            f"{benchmark['title']}, n = {benchmark['n']:,}", fontsize="medium", loc="left", parse_math=False
        )
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(benchmarks) :]:
        panel.set_axis_off()
    figure.supxlabel("mean score, %; dashed: the majority answer", fontsize="medium")
    return figure


def table_csv(table: Mapping[str, Any]) -> str:
    """A line a benchmark and model."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    plain = [
        *(
            "label",
            "n",
            "correct",
            "accuracy",
            "low",
            "high",
            "interval_method",
            "against_majority",
            "latent_trigger_rate",
        ),
        *("mean_segments", "mean_text_tokens", "mean_latent_steps", "unresolved", "cut_off", "format_misses"),
    ]
    of_benchmark = ("profile", "revision", "drawn")
    minus = [f"minus_{table['reference']}_{name}" for name in _COMPARED]
    writer.writerow(["benchmark", *of_benchmark, "majority", *plain, *minus, "totals"])
    for name, benchmark in table["benchmarks"].items():
        for row in benchmark["rows"]:
            against = row["against_reference"] or dict.fromkeys(_COMPARED, "")
            cells = [benchmark[field] for field in of_benchmark] + [benchmark["majority"]["accuracy"]]
            cells += [row[column] for column in plain] + [against[column] for column in _COMPARED]
            writer.writerow([name, *cells, json.dumps(row["totals"], ensure_ascii=False)])
    return out.getvalue()


def percent(share: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed."""
    return signed(100 * difference)


def interval_words(row: Mapping[str, Any]) -> str:
    """The ends of a score's interval, in percent."""
    return f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"


def difference_words(against: Mapping[str, Any]) -> str:
    """A difference with its interval, in points."""
    return f"{points(against['difference'])} ({points(against['low'])} to {points(against['high'])})"


def p_words(p_value: float) -> str:
    """A p-value with four digits."""
    return f"{p_value:.4f}" if p_value >= 0.0001 else "< 0.0001"


def baselines(benchmarks: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[float | None]]]:
    """What is reached without a model, by name, a share a benchmark; only those that there are."""
    listed = list(benchmarks)
    found: list[tuple[str, list[float | None]]] = [("majority", [one["majority"]["accuracy"] for one in listed])]
    for title, name in (("always A", "always_a"), ("random", "random")):
        shares = [one["baselines"].get(name) for one in listed]
        if any(share is not None for share in shares):
            found.append((title, shares))
    return found


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
