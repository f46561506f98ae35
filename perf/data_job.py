"""What `perf.data` times, each in a process of its own: ``python -m perf.data_job JOB ...``."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from valr_ops.recipe.recipe import DataRecipe, Recipe, SourceRecipe, override
from valr_ops.recipe.recipes import tiny
from valr_ops.store.artifacts import StageContext
from valr_ops.store.progress import Progress


def _recipe(source: Path) -> Recipe:
    mine: dict[str, Any] = {"mine": {"format": "jsonl", "path": str(source)}}
    return override(tiny(), {"data": {"sources": mine}})


def build(source: Path, root: Path) -> None:
    """The stage `cot_corpus` over a source."""
    from valr_ops.data.curation import build_cot_corpus

    assert all(check.passed for check in build_cot_corpus(_context(source, root)).checks)


def _context(source: Path, root: Path) -> StageContext:
    folders = {name: root / name for name in ("sources", "cot_corpus", "work")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    size = (source / "train.jsonl").stat().st_size
    inventory = {"mine": {"format": "jsonl", "files": {"train.jsonl": {"size": size}}}}
    (folders["sources"] / "inventory.json").write_text(json.dumps(inventory))
    inputs = {"sources": folders["sources"]}
    return StageContext("cot_corpus", _recipe(source), inputs, folders["cot_corpus"], folders["work"], Progress())


def write(source: Path, root: Path) -> None:
    """The part of the stage that a pipeline of `datasets` has as well: read, check, leave out duplicates, write."""
    from valr_ops.data import curation
    from valr_ops.data.screening import decide

    context = _context(source, root)
    rows = curation._read(context, context.work / "drafts")
    rows.reasons = decide(rows.keys, context.recipe.data)
    curation._split(rows, context.recipe.data.validation_fraction, context.recipe.seed)
    curation._write(rows, context.out, context.progress)


def draft(source: Path, root: Path, processes: str) -> None:
    """Only the reading, with a number of processes."""
    from valr_ops.data import drafting, sources

    reading = sources.located("mine", str(source), DataRecipe(), SourceRecipe(format="jsonl", path=str(source)))
    rows = sum(drafting.draft([reading], root, None, int(processes)))
    assert rows


def datasets(source: Path, root: Path, processes: str) -> None:
    """The plain pipeline: read JSON, check every row, leave out duplicates, write."""
    from datasets import disable_progress_bars, load_dataset

    from valr_ops.data.records import BadRecord
    from valr_ops.data.screening import record_key
    from valr_ops.data.sources import jsonl
    from valr_ops.data.sources.reading import Reading, Row

    disable_progress_bars()
    reading = Reading.of("mine", str(source), DataRecipe(), SourceRecipe(format="jsonl", path=str(source)))

    names = ("id", "source", "license", "split", "kind", "question", "answer")
    nothing = dict.fromkeys((*names, "images", "steps"))

    def checked(raw: dict[str, Any], number: int) -> dict[str, Any]:
        at = Row(number, f"train.jsonl line {number}", "train", dict)
        try:
            record = jsonl.record(raw, at, jsonl.identity(raw, at, reading), reading)
        except BadRecord as bad:
            return {**nothing, "reason": bad.reason, "content": None}
        return {
            **{name: getattr(record, name) for name in names},
            "images": [
                {"digest": one.digest, "role": one.role, "width": one.width, "height": one.height}
                for one in record.images
            ],
            "steps": [
                {"text": one.text, "image": one.target and one.target.image, "box": one.target and one.target.box}
                for one in record.steps
            ],
            "reason": "",
            "content": record_key(record).content.hex(),
        }

    rows = load_dataset("json", data_files=str(source / "train.jsonl"), split="train", cache_dir=str(root / "cache"))
    count = int(processes) if int(processes) > 1 else None
    rows = rows.map(checked, with_indices=True, num_proc=count, remove_columns=rows.column_names)
    seen: set[str] = set()

    def is_new(content: str, reason: str) -> bool:
        if reason or content in seen:
            return False
        seen.add(content)
        return True

    rows.filter(is_new, input_columns=["content", "reason"]).to_parquet(str(root / "records.parquet"))


def access(corpus: Path, seed: str) -> None:
    """Print the milliseconds of opening the corpus and reading one record."""
    from valr_ops.data.corpus import Records

    started = time.perf_counter()
    records = Records(corpus)
    records[random.Random(int(seed)).randrange(len(records))]
    print((time.perf_counter() - started) * 1000)


if __name__ == "__main__":
    job, first, *rest = sys.argv[1:]
    jobs = {"build": build, "write": write, "datasets": datasets, "draft": draft}
    if job in jobs:
        jobs[job](Path(first), Path(rest[0]), *rest[1:])
    else:
        access(Path(first), *rest)
