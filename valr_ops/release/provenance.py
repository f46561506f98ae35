"""What a model was made from, as the documents of its release: data, teachers, cost.

In: the lineage of the model, its recipe and its scores. Out: JSON values with every source, corpus and encoder on the
way by digest and licence, and the planned and measured cost of every stage.
Always: what nobody stated stands there as unknown; no address, person or clock is among it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from valr_ops.recipe.price import PriceError, price
from valr_ops.recipe.recipe import QWEN_TOWER, Recipe, TeacherRecipe
from valr_ops.stages import ordered
from valr_ops.store import tree

UNKNOWN = "unknown"


def data_of(lineage: tree.Lineage, recipe: Recipe, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Every source, corpus and benchmark on the way, and the model at its beginning, with digests and licences."""
    found = {version.stage: version for version in (lineage.version, *lineage.upstream)}
    run = lineage.version.run
    return {
        "sources": {
            name: {
                "format": source.format,
                "origin": "drawn by the project's generator" if source.drawn else "given",
                "files": source.files,
                "bytes": source.bytes,
                "md5": source.digest,
                "records": sum(source.licenses.values()) if source.licenses else None,
                "licenses": _licenses(source.licenses),
            }
            for name, source in sorted(lineage.sources.items())
        },
        "corpora": {
            name: {"digest": found[name].digest, "counts": dict(found[name].summary or {})}
            for name in ("cot_corpus", "latent_corpus")
            if name in found
        },
        "base_model": _base(recipe, found.get("base_model")),
        "benchmarks": {
            name: {key: entry[key] for key in ("format", "profile", "revision", "drawn", "n")}
            for name, entry in sorted(scores["benchmarks"].items())
        },
        "code": {
            "package": f"valr-ops {importlib.metadata.version('valr-ops')}",
            "digest": lineage.version.code_digest,
            "git_commit": run.git_commit if run else "",
        },
        "artifacts": {name: version.digest for name, version in sorted(found.items())},
    }


def _licenses(counted: Mapping[str, int] | None) -> dict[str, int] | str:
    """Records by licence; the word `unknown` where nothing tells."""
    if not counted:
        return UNKNOWN
    return {name.strip() or UNKNOWN: n for name, n in sorted(counted.items())}


def _base(recipe: Recipe, version: tree.Version | None) -> dict[str, Any]:
    base = recipe.base
    if base.from_scratch:
        begun = f"around the language model in the package {base.language_model}" if base.language_model else ""
        origin, terms = f"made from scratch by this project, {begun or 'with random weights'}", "Apache-2.0"
    else:
        origin = f"{base.hub_id}@{base.revision}" if base.hub_id else "a checkpoint that the user gave"
        # The recipe states the licence of a checkpoint where it also teaches by its vision tower.
        towers = [one.license for one in recipe.teachers.values() if one.model == QWEN_TOWER and one.weights is None]
        terms = towers[0] if towers else UNKNOWN
    return {
        "origin": origin,
        "hub_id": base.hub_id,
        "revision": base.revision,
        "license": terms,
        "digest": version.digest if version else None,
        "parameters": (version.summary or {}).get("parameters") if version else None,
    }


def teachers_of(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The encoders that the latents were aligned to, as the weights themselves remember them."""
    aligned = (config.get("valr") or {}).get("teachers") or {}
    found = {}
    for name, told in sorted(aligned.items()):
        teacher = recipe.teachers[name]
        found[name] = {
            "model": told["model"],
            "origin": _origin(teacher),
            "hub_id": teacher.hub_id,
            "revision": teacher.revision,
            "license": told["license"] or UNKNOWN,
            "fingerprint": told["fingerprint"],
        }
    return found


def _origin(teacher: TeacherRecipe) -> str:
    if teacher.hub_id:
        return f"{teacher.hub_id}@{teacher.revision}"
    if teacher.package:
        return f"the Python package {teacher.package}"
    if teacher.weights:
        return f"weights that the user gave ({teacher.weights})"
    if teacher.model == QWEN_TOWER:
        return "the vision tower of the base model"
    return f"made by this project, trained for {teacher.pretraining_steps} steps on drawn scenes"


def cost_of(root: Path, recipe: Recipe, lineage: tree.Lineage) -> dict[str, Any]:
    """Planned hours and dollars of every stage on the way, and what it took where that was measured."""
    stages: dict[str, Any] = {}
    assumed: dict[str, Any] = {}
    versions = {version.stage: version for version in (lineage.version, *lineage.upstream)}
    for version in (versions[row.name] for row in ordered(versions)):
        timings = version.run.timings if version.run else {}
        row: dict[str, Any] = {"planned": None, "not_planned": "", "actual_seconds": timings.get("seconds")}
        try:
            planned = price(recipe, version.stage, root).document()
        except PriceError as error:
            row["not_planned"] = str(error)
        else:
            assumed |= planned.pop("assumptions")
            row["planned"] = planned
        stages[version.stage] = row
    priced = [row["planned"] for row in stages.values() if row["planned"]]
    actual = [row["actual_seconds"] for row in stages.values() if row["actual_seconds"] is not None]

    def both(values: Sequence[Sequence[float]]) -> list[float]:
        return [sum(low for low, _ in values), sum(high for _, high in values)]

    return {
        "stages": stages,
        "total": {
            "planned_hours": both([one["hours"]["total"] for one in priced]),
            "planned_dollars": both([one["dollars"] for one in priced]),
            "actual_seconds": sum(actual) if actual else None,
            "stages_measured": len(actual),
        },
        "assumptions": assumed,
    }
