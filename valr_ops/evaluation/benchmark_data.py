"""Stage `benchmarks`: drawn benchmarks in their public layouts, and a count of those in the user's folders.

In: the recipe's benchmarks, each drawn or in a folder that the user filled.
Out: a folder for each drawn one, `benchmarks.json` (format, profile, revision and number of questions of each type) and
`preview.png`.
Always: a given benchmark is read where it is and never copied (most licences forbid it); one that is not whole is
refused here, before a model is trained for it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image

from valr_ops.data.records import BadRecord
from valr_ops.evaluation.benchmarks import BenchmarkError
from valr_ops.evaluation.drawn import Drawing, write_benchmark
from valr_ops.evaluation.questions import Benchmark, Showing, benchmark_of_recipe
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import StageContext, StageReport

BENCHMARKS = "benchmarks.json"
_TILE_PIXELS = 160


def build_benchmarks(context: StageContext) -> StageReport:
    """Stage `benchmarks`.

    Raises:
        BenchmarkError: a folder that is missing, not whole or not in its layout.
    """
    recipe = context.recipe
    opened: list[Benchmark] = []
    for name, asked in recipe.evaluation.benchmarks.items():
        if asked.path is None:
            drawing = Drawing(asked.format or name, recipe.seed, asked.drawn, recipe.data.synthetic)
            write_benchmark(context.out / name, drawing)
        opened.append(benchmark_of_recipe(name, recipe, context.out, Showing.of(context)))
        context.progress.say(f"benchmark {name}: {len(opened[-1].items)} questions")
    listed = {one.name: _listed(one, recipe) for one in opened}
    (context.out / BENCHMARKS).write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if opened:
        _contact_sheet(opened).save(context.out / "preview.png")
    lines = ["| benchmark | origin | profile | questions | types |", "| --- | --- | --- | ---: | ---: |"]
    for name, entry in listed.items():
        origin = "drawn" if entry["drawn"] else "given"
        lines.append(f"| {name} | {origin} | {entry['profile']} | {entry['questions']} | {len(entry['types'])} |")
    return StageReport(
        summary={"benchmarks": len(listed), "questions": sum(entry["questions"] for entry in listed.values())},
        tables={"Benchmarks": "\n".join(lines), "First question of each": _first_questions(opened)},
        plots=("preview.png",) if opened else (),
    )


def changed_benchmarks(recipe: Recipe, artifact: Path) -> str | None:
    """What changed in the given benchmarks since `artifact` listed them, as half a sentence, or None."""
    listed = json.loads((artifact / BENCHMARKS).read_text(encoding="utf-8"))
    # Nothing is decoded here.
    unseen = Showing.of_recipe(recipe, artifact)
    for name, asked in recipe.evaluation.benchmarks.items():
        if asked.path is None:
            continue
        try:
            revision = benchmark_of_recipe(name, recipe, artifact, unseen).revision
        except BenchmarkError as error:
            return f"benchmark {name} can't be read any more ({error})"
        if revision != listed.get(name, {}).get("revision"):
            return f"the files of benchmark {name} changed"
    return None


def _listed(benchmark: Benchmark, recipe: Recipe) -> dict[str, Any]:
    return {
        "format": benchmark.format,
        "profile": benchmark.profile,
        "revision": benchmark.revision,
        "drawn": recipe.evaluation.benchmarks[benchmark.name].path is None,
        "questions": len(benchmark.items),
        "types": dict(sorted(Counter(item.question_type for item in benchmark.items).items())),
    }


def _first_questions(opened: list[Benchmark]) -> str:
    lines = ["| benchmark | question | gold |", "| --- | --- | --- |"]
    for benchmark in opened:
        item = benchmark.items[0]
        asked = item.question.replace("|", "\\|").replace("\n", "<br>")
        lines.append(f"| {benchmark.name} | {asked} | {item.gold} |")
    return "\n".join(lines)


def _contact_sheet(opened: list[Benchmark], gap: int = 4) -> PIL.Image.Image:
    """The first picture of each benchmark, side by side; an empty place where it is damaged."""
    sheet = PIL.Image.new("RGB", (gap + len(opened) * (_TILE_PIXELS + gap), _TILE_PIXELS + 2 * gap), "white")
    for number, benchmark in enumerate(opened):
        try:
            pictures, _ = benchmark.prompt(benchmark.items[0])
        except BadRecord:
            continue
        if pictures:
            tile = pictures[0]
            scale = _TILE_PIXELS / max(tile.size)
            shown = tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))))
            sheet.paste(shown, (gap + number * (_TILE_PIXELS + gap), gap))
    return sheet
