"""The stage `ablation_table`: all models side by side, as data, as a plot and as one page for people.

In: the scores artifacts of the base model, SFT, VaLR-S and VaLR-M.
Out: `table.json`, `table.csv`, `table.md`, `accuracy.png` and `report.html`, which needs no network and no other file.
Always: models are compared item by item with SFT and only under one budget; every accuracy stands beside its interval
and the majority answer; the paper's numbers are marked as what they are, another model on other benchmarks.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from valr_ops.evaluation.answers import LATENT_SEGMENT, LATENT_SLOT, without_control_tokens
from valr_ops.evaluation.run import EXAMPLES, Budget, BudgetError, read_predictions, read_scores
from valr_ops.evaluation.statistics import PairedDifference, paired_difference, smallest_detectable_difference
from valr_ops.recipe.recipes import paper_tables
from valr_ops.store.artifacts import StageContext, StageReport

LABELS = {"scores_base": "base", "scores_sft": "SFT", "scores_valr_s": "VaLR-S", "scores_valr_m": "VaLR-M"}
"""Rows of the table, in order, by the stage that made the scores."""
REFERENCE = "scores_sft"
"""The row that the others are compared with."""
SHOWN = "scores_valr_m"
"""The row whose items are shown."""
_PAPER_ROWS = {"qwen2.5-vl-7b": "base", "vanilla_sft": "SFT", "valr_s": "VaLR-S", "valr_m": "VaLR-M"}
_PAPER_BENCHMARKS = {"blink": "BLINK", "mmvp": "MMVP", "mmstar": "MMStar", "vstar": "V*", "cv_bench": "CV-Bench"}


def build_ablation_table(context: StageContext) -> StageReport:
    """Stage `ablation_table`.

    Raises:
        BudgetError: the scores were reached under different budgets or on different items.
        PredictionsError: a scores artifact does not hold one prediction for every item.
    """
    table = compare(context.inputs, context.recipe.evaluation.confidence, context.recipe.scale)
    (context.out / "table.json").write_text(
        json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (context.out / "table.csv").write_text(_csv(table), encoding="utf-8")
    preview = markdown(table)
    (context.out / "table.md").write_text(preview + "\n", encoding="utf-8")
    draw(table).savefig(context.out / "accuracy.png", dpi=110, metadata={"Software": None})
    (context.out / "report.html").write_text(page(table, cards(context.inputs)), encoding="utf-8")

    summary: dict[str, int | float | str] = {}
    for name, benchmark in table["benchmarks"].items():
        summary[f"majority_{name}"] = benchmark["majority"]["accuracy"]
        for row in benchmark["rows"]:
            model = row["model"].removeprefix("scores_")
            summary[f"accuracy_{name}_{model}"] = row["accuracy"]
            if row["against_reference"]:
                summary[f"verdict_{name}_{model}"] = row["against_reference"]["verdict"]
    return StageReport(
        summary=summary, tables={"models side by side": preview}, plots=("accuracy.png",), report="report.html"
    )


def compare(folders: Mapping[str, Path], confidence: float, scale: str) -> dict[str, Any]:
    """The table as data: per benchmark one row a model, with its paired difference to SFT; shares in [0, 1].

    Args:
        folders: scores artifacts by stage name; SFT's is among them.
        confidence: level of every interval.
        scale: scale of the recipe, for the heading.

    Raises:
        BudgetError: different budgets or items.
        PredictionsError: an incomplete scores artifact.
    """
    names = [name for name in LABELS if name in folders]
    scores = {name: read_scores(folders[name]) for name in names}
    for name in names:
        _require_comparable(scores, REFERENCE, name)
    right: dict[str, dict[tuple[str, str], bool]] = {
        name: {(row["benchmark"], row["id"]): row["correct"] for row in read_predictions(folders[name])}
        for name in names
    }
    benchmarks = {}
    for benchmark, of_reference in scores[REFERENCE]["benchmarks"].items():
        items = [key for key in right[REFERENCE] if key[0] == benchmark]
        differences = {
            name: paired_difference(
                [right[name][key] for key in items], [right[REFERENCE][key] for key in items], confidence
            )
            for name in names
            if name != REFERENCE
        }
        benchmarks[benchmark] = {
            "n": of_reference["n"],
            "majority": of_reference["majority"],
            "rejected": of_reference["rejected"],
            "rows": [_row(name, scores[name], benchmark, differences.get(name)) for name in names],
        }
    return {
        "scale": scale,
        "confidence": confidence,
        "budget": scores[REFERENCE]["budget"] | {"slots": {name: scores[name]["budget"]["slots"] for name in names}},
        "benchmarks": benchmarks,
        "paper": paper_rows(),
    }


def paper_rows() -> dict[str, Any]:
    """The paper's rows of the same four models: scores in percent, another base model and other benchmarks."""
    tables = paper_tables()["tables"]
    video = {row["model"]: row["scores"]["avg"] for row in tables["1"]["rows"]}
    images = {row["model"]: row["scores"] for row in tables["2"]["rows"]}
    return {
        "benchmarks": ["VSI-Bench", *_PAPER_BENCHMARKS.values()],
        "rows": [
            {
                "label": label,
                "model": model,
                "scores": [video[model], *(images[model][key] for key in _PAPER_BENCHMARKS)],
            }
            for model, label in _PAPER_ROWS.items()
        ],
        "inconsistencies": list(paper_tables()["known_inconsistencies"]),
    }


def cards(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """VaLR-M's examples in their order: question, images as data URIs, reasoning, everyone's answer."""
    names = [name for name in LABELS if name in folders]
    shown = SHOWN if SHOWN in names else names[-1]
    rows = {name: {(row["benchmark"], row["id"]): row for row in read_predictions(folders[name])} for name in names}
    slots = read_scores(folders[shown])["budget"]["slots"]
    result = []
    for example in json.loads((folders[shown] / EXAMPLES).read_text(encoding="utf-8")):
        key = (example["benchmark"], example["id"])
        row = rows[shown][key]
        result.append(
            dict(row)
            | {
                "model": LABELS[shown],
                "images": [_data_uri(folders[shown] / file) for file in example["images"]],
                "reasoning": reasoning(row["output"], slots),
                "answers": [{"label": LABELS[name], **rows[name][key]} for name in names],
            }
        )
    return result


def reasoning(output: str, slots: int) -> list[dict[str, Any]]:
    """`output` cut at its latent segments: ``{"slots": 16}`` for a segment, ``{"text": ...}`` for what stands between.

    A segment whose slots are not written out in the text counts as `slots`.
    """
    parts: list[dict[str, Any]] = []
    at = 0
    for segment in LATENT_SEGMENT.finditer(output):
        parts.append({"text": without_control_tokens(output[at : segment.start()]).strip()})
        parts.append({"slots": segment[1].count(LATENT_SLOT) or slots})
        at = segment.end()
    parts.append({"text": without_control_tokens(output[at:]).strip()})
    return [part for part in parts if part.get("text") != ""]


def markdown(table: Mapping[str, Any]) -> str:
    """The table in Markdown, one section a benchmark, and the paper's rows below it."""
    sections = []
    for name, benchmark in table["benchmarks"].items():
        lines = [f"### {name}: {_majority_sentence(benchmark)}", ""]
        lines.append(f"| model | n | accuracy | {table['confidence']:.0%} interval | minus SFT | |")
        lines.append("| --- | ---: | ---: | --- | --- | --- |")
        for row in benchmark["rows"]:
            lines.append("| " + " | ".join([row["label"], str(row["n"]), *_cells(row)]) + " |")
        sections.append("\n".join(lines))
    paper = table["paper"]
    lines = ["### The paper: Qwen2.5-VL-7B on other benchmarks, not comparable with the rows above", ""]
    lines.append("| model | " + " | ".join(paper["benchmarks"]) + " |")
    lines.append("| --- |" + " ---: |" * len(paper["benchmarks"]))
    for row in paper["rows"]:
        lines.append(f"| {row['label']} | " + " | ".join(f"{score:.1f}" for score in row["scores"]) + " |")
    return "\n\n".join([*sections, "\n".join(lines)])


def terminal_table(folder: Path) -> Group:
    """The table of an `ablation_table` artifact for the terminal; print it with rich."""
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    shown: list[Table] = []
    for name, benchmark in table["benchmarks"].items():
        drawn = Table(title=f"{escape(name)}, {benchmark['n']} items", title_justify="left", title_style="bold")
        drawn.add_column("model")
        for heading in ("accuracy", f"{table['confidence']:.0%} interval", "minus SFT", ""):
            drawn.add_column(heading, justify="left" if not heading else "right")
        majority = benchmark["majority"]
        drawn.add_row(escape(f"always {majority['answer']!r}"), percent(majority["accuracy"]), style="dim")
        for row in benchmark["rows"]:
            drawn.add_row(row["label"], *_cells(row), style="bold" if row["label"].startswith("VaLR") else "")
        shown.append(drawn)
    paper = table["paper"]
    drawn = Table(
        title="The paper: Qwen2.5-VL-7B, other benchmarks", title_justify="left", title_style="dim", style="dim"
    )
    drawn.add_column("model")
    for benchmark in paper["benchmarks"]:
        drawn.add_column(benchmark, justify="right")
    for row in paper["rows"]:
        drawn.add_row(row["label"], *(f"{score:.1f}" for score in row["scores"]), style="dim")
    return Group(*shown, drawn)


def draw(table: Mapping[str, Any]) -> Figure:
    """Bars with intervals against the majority line, one panel a benchmark."""
    benchmarks = table["benchmarks"]
    figure = Figure(figsize=(6.4, 0.7 + 2.0 * len(benchmarks)), layout="constrained")
    panels = figure.subplots(len(benchmarks), squeeze=False)[:, 0]
    for panel, (name, benchmark) in zip(panels, benchmarks.items(), strict=True):
        rows = benchmark["rows"]
        shares = [100 * row["accuracy"] for row in rows]
        reach = [
            [100 * (row["accuracy"] - row["low"]) for row in rows],
            [100 * (row["high"] - row["accuracy"]) for row in rows],
        ]
        colours = ["#0f766e" if row["label"].startswith("VaLR") else "#94a3b8" for row in rows]
        labels = [row["label"] for row in rows]
        panel.barh(labels, shares, xerr=reach, color=colours, ecolor="#1f2937", capsize=3, height=0.62)
        majority = 100 * benchmark["majority"]["accuracy"]
        panel.axvline(majority, color="#b45309", linestyle="--", linewidth=1.2)
        panel.invert_yaxis()
        title = f"{name}, n = {benchmark['n']}; dashed: majority answer, {majority:.1f} %"
        panel.set(xlim=(0, 100), xlabel="accuracy, %")
        panel.set_title(title, fontsize="medium", loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def page(table: Mapping[str, Any], item_cards: Sequence[Mapping[str, Any]]) -> str:
    """The report: one HTML page without scripts and without references to anything outside it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("valr_ops.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A number never parts from its sign of percent at the end of a line.
    environment.filters |= {
        "percent": percent,
        "points": points,
        "unbroken": lambda text: text.replace(" %", "\u00a0%"),
    }
    benchmarks = table["benchmarks"]
    return environment.get_template("report.html.j2").render(
        table=table,
        cards=item_cards,
        headlines={name: _headline(benchmark) for name, benchmark in benchmarks.items()},
        sentences={name: _majority_sentence(benchmark) for name, benchmark in benchmarks.items()},
    )


def percent(share: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _require_comparable(scores: Mapping[str, Mapping[str, Any]], first: str, second: str) -> None:
    one, other = scores[first], scores[second]
    Budget(**one["budget"]).require_comparable(Budget(**other["budget"]), (first, second))
    items = [{name: score["items"] for name, score in each["benchmarks"].items()} for each in (one, other)]
    if items[0] != items[1]:
        different = sorted(
            name for name in items[0].keys() | items[1].keys() if items[0].get(name) != items[1].get(name)
        )
        raise BudgetError(
            f"{first} and {second} answered different items of {', '.join(different)}. "
            "Score both again on the same sources"
        )


def _row(name: str, scores: Mapping[str, Any], benchmark: str, difference: PairedDifference | None) -> dict[str, Any]:
    score = scores["benchmarks"][benchmark]
    low, high = score["interval"]
    majority = score["majority"]["accuracy"]
    against = None
    if difference is not None:
        discordant = (difference.gained + difference.lost) / difference.n
        against = {
            "difference": round(difference.difference, 6),
            "low": round(difference.low, 6),
            "high": round(difference.high, 6),
            "p_value": round(difference.p_value, 6),
            "gained": difference.gained,
            "lost": difference.lost,
            "verdict": difference.verdict,
            "detectable": round(smallest_detectable_difference(difference.n, discordant, difference.confidence), 6),
        }
    return {
        "model": name,
        "label": LABELS[name],
        "n": score["n"],
        "correct": score["correct"],
        "accuracy": score["accuracy"],
        "low": low,
        "high": high,
        "against_majority": "above" if low > majority else "below" if high < majority else "within noise",
        "against_reference": against,
        "latent_trigger_rate": score["latent_trigger_rate"],
        "mean_segments": score["mean_segments"],
        "mean_text_tokens": score["mean_text_tokens"],
        "mean_latent_steps": score["mean_latent_steps"],
        "unresolved": score["unresolved"],
        "cut_off": score["cut_off"],
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Accuracy, interval, difference to SFT, verdict."""
    against = row["against_reference"]
    difference = (
        f"{points(against['difference'])} ({points(against['low'])} to {points(against['high'])})" if against else ""
    )
    interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
    return [percent(row["accuracy"]), interval, difference, against["verdict"] if against else ""]


def _majority_sentence(benchmark: Mapping[str, Any]) -> str:
    majority = benchmark["majority"]
    return f"always answering {majority['answer']!r} gives {percent(majority['accuracy'])}"


def _headline(benchmark: Mapping[str, Any]) -> str:
    best = max(benchmark["rows"], key=lambda row: row["accuracy"])
    against = best["against_reference"]
    beside_majority = {"above": "above", "below": "below", "within noise": "within noise of"}[best["against_majority"]]
    said = f"{best['label']} is best with {percent(best['accuracy'])}, {beside_majority} the majority answer's "
    said += percent(benchmark["majority"]["accuracy"])
    if against:
        low, high = points(against["low"]), points(against["high"])
        said += f"; against SFT {points(against['difference'])} points ({low} to {high}), {against['verdict']}"
    return said + "."


def _csv(table: Mapping[str, Any]) -> str:
    compared = ("difference", "low", "high", "p_value", "gained", "lost", "verdict")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    plain = [
        *("label", "n", "correct", "accuracy", "low", "high", "against_majority", "latent_trigger_rate"),
        *("mean_segments", "mean_text_tokens", "mean_latent_steps", "unresolved", "cut_off"),
    ]
    writer.writerow(["benchmark", "majority", *plain, *(f"minus_sft_{name}" for name in compared)])
    for name, benchmark in table["benchmarks"].items():
        for row in benchmark["rows"]:
            against = row["against_reference"] or dict.fromkeys(compared, "")
            cells = [row[column] for column in plain] + [against[column] for column in compared]
            writer.writerow([name, benchmark["majority"]["accuracy"], *cells])
    return out.getvalue()


def _data_uri(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
