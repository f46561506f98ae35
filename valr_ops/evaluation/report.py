"""The stage `report`: one page for people, of models, the paper's cells, the studies and what models wrote.

In: the ablation table, the scores behind it and the studies; or any scores folders (`valr report`).
Out: `report.html`, one file that needs no network, no script and no other file.
Always: what a model wrote is text and never markup; images are inside the page; the items shown are the worst ones,
spread over the benchmarks.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image
from markdown_it import MarkdownIt
from markupsafe import Markup

from valr_ops.evaluation.ablation import (
    CELLS,
    FEW,
    REFERENCE,
    TABLE,
    TITLES,
    ComparisonError,
    baselines,
    cells_sentence,
    compare,
    comparisons,
    difference_words,
    interval_words,
    label,
    model_name,
    p_words,
    percent,
    points,
    read_models,
)
from valr_ops.evaluation.answers import LATENT_SEGMENT, LATENT_SLOT, without_control_tokens, worst_first
from valr_ops.evaluation.models import Budget, BudgetError
from valr_ops.evaluation.paper_cells import (
    Answers,
    PaperCell,
    number_words,
    paper_cells,
    table_name,
    verdict_counts,
)
from valr_ops.evaluation.run import EXAMPLES, read_scores
from valr_ops.recipe.recipes import paper_tables
from valr_ops.store.artifacts import StageContext, StageReport

STUDIES = ("scaling_curve", "visual_decay", "alignment_maps", "latent_check")
"""Stages whose `result.md` and plots are sections of the page, in this order."""
RESULT = "result.md"
SHOWN_ITEMS = 10
_SHOWN_MODEL = "valr_m"
_SMALL_BYTES = 20_000
_WIDEST_PIXELS = 1600
_PIXELS_OF_ITEM = 1280
"""Width that the pictures of an item share."""


def build_report(context: StageContext) -> StageReport:
    """Stage `report`.

    Raises:
        PredictionsError: a scores artifact does not hold one prediction for every item.
    """
    artifact = context.inputs["ablation_table"]
    table = json.loads((artifact / TABLE).read_text(encoding="utf-8"))
    cells = [PaperCell(**cell) for cell in json.loads((artifact / CELLS).read_text(encoding="utf-8"))]
    folders = {model_name(stage): folder for stage, folder in context.inputs.items() if stage.startswith("scores_")}
    items = cards(folders, read_models(folders))
    found = [study(context.inputs[name]) for name in STUDIES if name in context.inputs]
    (context.out / "report.html").write_text(page(table, cells, items, found), encoding="utf-8")
    summary: dict[str, int | float | str] = {
        "models": len(table["models"]),
        "benchmarks": len(table["benchmarks"]),
        "studies": len(found),
        "items": len(items),
    }
    return StageReport(summary=summary, report="report.html")


def write_page(
    folders: Sequence[Path], out: Path, reference: str | None = None, allowed: Sequence[str] = ()
) -> dict[str, Any]:
    """The same page for any scores folders, each called by its model's name; where that is not unique, by its own.

    Args:
        folders: what `valr evaluate` filled, or artifacts of stages `scores_*`.
        out: the page.
        reference: name of the model that the others are compared with; SFT, else the first one, without it.
        allowed: fields in which models may differ, which the page then says.

    Returns:
        Where the page is, the models on it, the reference and the verdicts on the paper's cells.

    Raises:
        BudgetError: different budgets.
        ComparisonError: different items or profiles, or no such reference.
        PredictionsError: a folder without scores.
    """
    called = [model_name(read_scores(folder)["model"]["artifact"]) for folder in folders]
    own = {
        folder.resolve().name if called.count(name) > 1 else name: folder
        for name, folder in zip(called, folders, strict=True)
    }
    if len(own) != len(folders):
        raise ComparisonError(f"two of the {len(folders)} folders have one name; rename one: {', '.join(own)}")
    models = read_models(own)
    chosen = reference or (REFERENCE if REFERENCE in models else next(iter(own)))
    chosen = chosen if chosen in models else model_name(chosen)
    confidence = models[chosen][0]["confidence"] if chosen in models else 0.95
    try:
        table = compare(models, chosen, confidence, allowed=allowed)
    except BudgetError as error:
        raise BudgetError(f"{error}, or allow it: --allow-different FIELD") from None
    cells = paper_cells(models, confidence)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(table, cells, cards(own, models), ()), encoding="utf-8")
    return {"out": str(out), "models": list(models), "reference": chosen, "paper_cells": verdict_counts(cells)}


def cards(folders: Mapping[str, Path], models: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """Ten examples of VaLR-M, or of the last model: question, images as data URIs, reasoning, everyone's answer."""
    shown = _SHOWN_MODEL if _SHOWN_MODEL in models else list(models)[-1]
    rows = {name: {(row["benchmark"], row["id"]): row for row in answers[1]} for name, answers in models.items()}
    listed = json.loads((folders[shown] / EXAMPLES).read_text(encoding="utf-8"))
    files = {(example["benchmark"], example["id"]): example["images"] for example in listed}
    slots = models[shown][0]["budget"]["slots"]
    result = []
    for row in spread([rows[shown][key] for key in files]):
        key = (row["benchmark"], row["id"])
        result.append(
            dict(row)
            | {
                "model": label(shown),
                "title": TITLES.get(row["benchmark"], row["benchmark"]),
                "images": [data_uri(folders[shown] / file, _PIXELS_OF_ITEM // len(files[key])) for file in files[key]],
                "reasoning": reasoning(row["output"], slots),
                "answers": [{"label": label(name), **of_key[key]} for name, of_key in rows.items() if key in of_key],
            }
        )
    return result


def spread(rows: Sequence[Mapping[str, Any]], count: int = SHOWN_ITEMS) -> list[Mapping[str, Any]]:
    """Up to `count` rows, worst first, taken from all benchmarks in turn: of each the first, then the second, ..."""
    of_benchmark: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_benchmark.setdefault(row["benchmark"], []).append(row)
    rounds = itertools.zip_longest(*of_benchmark.values())
    in_turn = [row for heads in rounds for row in worst_first([row for row in heads if row is not None])]
    return worst_first(in_turn[:count])


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


def study(folder: Path) -> dict[str, Any]:
    """Title and body of a study: its sentences, and its plots that these don't show, by name.

    Of Markdown, headings, lists, tables and images of the folder are kept; HTML and links stay as they are written.
    """
    environment: dict[str, Any] = {"shown": set()}

    def image(renderer: Any, tokens: Any, index: int, options: Any, env: dict[str, Any]) -> str:
        file = folder / Path(tokens[index].attrs["src"]).name
        if not file.is_file() or file.suffix != ".png":
            return ""
        env["shown"].add(file.name)
        return Markup('<img class="plot" src="{}" alt="{}">').format(data_uri(file), tokens[index].content)

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink"])
    markdown.add_render_rule("image", image)
    tokens = markdown.parse((folder / RESULT).read_text(encoding="utf-8"), environment)
    title = folder.name.replace("_", " ")
    if tokens and tokens[0].type == "heading_open":
        title, tokens = tokens[1].content, tokens[3:]
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
    # Autoescaping is off for what the renderer escaped itself.
    body = markdown.renderer.render(tokens, markdown.options, environment)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    plots = [file for file in sorted(folder.glob("*.png")) if file.name not in environment["shown"]]
    return {"title": title, "body": Markup(body), "plots": [(file.stem, data_uri(file)) for file in plots]}


def page(
    table: Mapping[str, Any],
    cells: Sequence[PaperCell],
    item_cards: Sequence[Mapping[str, Any]],
    studies: Sequence[Mapping[str, Any]],
) -> str:
    """One HTML page without scripts and without references to anything outside it."""
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
        "interval": interval_words,
        "difference": difference_words,
        "p_value": p_words,
        "number_words": number_words,
        "total": _total,
        "unbroken": lambda text: text.replace(" %", "\u00a0%"),
    }
    return environment.get_template("report.html.j2").render(
        table=table,
        reference=label(table["reference"]),
        few=FEW,
        cards=item_cards,
        studies=studies,
        headlines=_headlines(table),
        baselines=baselines(table["benchmarks"].values()),
        comparisons=comparisons(table),
        paper_sentence=cells_sentence(cells),
        paper_groups=_paper_groups(cells),
        inconsistencies=_inconsistencies(),
        budget=_budget_rows(table),
    )


def data_uri(image: Path, widest: int = _WIDEST_PIXELS) -> str:
    """A PNG file as a data URI; a large or wide one as WebP, so that a page with a hundred pictures can be mailed."""
    data, kind = image.read_bytes(), "png"
    with PIL.Image.open(io.BytesIO(data)) as opened:
        if len(data) > _SMALL_BYTES or opened.width > widest:
            opened.thumbnail((widest, 4 * widest))
            packed = io.BytesIO()
            opened.convert("RGB").save(packed, "WEBP", quality=82)
            if packed.tell() < len(data):
                data, kind = packed.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _headlines(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A sentence for each benchmark of enough items and one for the others together."""
    said = []
    for benchmark in table["benchmarks"].values():
        if benchmark["n"] >= FEW:
            best = _best(benchmark)
            beside = {"above": "above", "below": "below", "within noise": "within noise of"}[best["against_majority"]]
            majority = percent(benchmark["majority"]["accuracy"])
            words = (
                f"{best['label']} is best with {percent(best['accuracy'])}, {beside} the majority answer's {majority}"
            )
            said.append((f"{benchmark['title']}, {benchmark['n']:,} items", words + _against(best, table)))
    if table["pooled"]:
        pooled = table["pooled"]
        best = _best(pooled)
        words = f"{best['label']} is best with {percent(best['accuracy'])} of the {pooled['n']:,} items"
        names = [table["benchmarks"][name]["title"] for name in pooled["benchmarks"]]
        title = f"{', '.join(names)}, fewer than {FEW} items{' each' if len(names) > 1 else ''}"
        said.append((title, words + _against(best, table)))
    return said


def _best(compared: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the models that answered all items."""
    whole = [row for row in compared["rows"] if row["n"] == compared["n"]]
    return max(whole or compared["rows"], key=lambda row: row["accuracy"])


def _against(row: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    against = row["against_reference"]
    if not against:
        return "."
    low, high = points(against["low"]), points(against["high"])
    difference = f"{points(against['difference'])} points ({low} to {high}), {against['verdict']}"
    return f"; against {label(table['reference'])} {difference}."


def _paper_groups(cells: Sequence[PaperCell]) -> list[dict[str, Any]]:
    """The paper's tables as rows and columns of cells."""
    titles = {number: table["what"] for number, table in paper_tables()["tables"].items()}
    groups = []
    for number in dict.fromkeys(cell.table for cell in cells):
        of_table = [cell for cell in cells if cell.table == number]
        at = {(cell.row, cell.column): cell for cell in of_table}
        columns = list(dict.fromkeys(cell.column for cell in of_table))
        counts = verdict_counts(of_table)
        groups.append(
            {
                "name": table_name(number),
                "title": titles[number],
                "columns": [TITLES.get(column, column.replace("_", " ")) for column in columns],
                "rows": [
                    (row, at[row, columns[0]].model, [at[row, column] for column in columns])
                    for row in dict.fromkeys(cell.row for cell in of_table)
                ],
                "counts": ", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
                "notes": list(dict.fromkeys(note for cell in of_table for note in cell.notes)),
            }
        )
    return groups


def _inconsistencies() -> list[str]:
    return [
        f"Tables {', '.join(one['where'])}: {one['about']}; printed {', '.join(map(str, one['printed']))}."
        for one in paper_tables()["known_inconsistencies"]
    ]


def _budget_rows(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each field with its value, or, where models differ, with everyone's."""
    rows = []
    for name in (field.name for field in fields(Budget)):
        values = {label(model): budget[name] for model, budget in table["budgets"].items()}
        if len(Counter(map(str, values.values()))) == 1:
            shown = str(next(iter(values.values())))
        else:
            shown = ", ".join(f"{model} {value}" for model, value in values.items())
        rows.append((name.replace("_", " "), shown))
    return rows


def _total(value: Any) -> str:
    """A total as its profile prints it."""
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "a part is missing" if value is None else str(value)
