"""Stage `sources`: the drawn sources, and a list of the files in those that the user gave.

In: the recipe's sources, each drawn or at a local folder, a local ``.jsonl`` file or an ``s3://`` prefix.
Out: a folder for each drawn source, ``inventory.json``, ``benchmarks.json`` and ``preview.png``.
Always: a given source is listed and never copied; a local file is listed with size and MD5, an object with size and
entity tag; a ``.jsonl`` file with the images that it names; what the readers refuse to follow is not listed. Files are
read in blocks, several at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from valr_ops.data import sources
from valr_ops.data.layouts import write_layout
from valr_ops.data.records import BadRecord
from valr_ops.data.sources.jsonl import image_names
from valr_ops.data.sources.reading import Reading, json_lines
from valr_ops.data.synthetic import MultiViewScene, Scene
from valr_ops.recipe.recipe import Recipe, SyntheticRecipe
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.store.objects import EscapeError, Files, MissingError, StorageError, is_remote, open_files

Listing = dict[str, dict[str, int | str]]
"""``size`` in bytes, and ``md5`` or ``etag``, by name."""

_BLOCK = 1 << 20
_NAMES_AT_A_TIME = 64
_FILES_AT_A_TIME = 8


def build_sources(context: StageContext) -> StageReport:
    """Stage `sources`: draw the sources without a path in their public layouts, list the files of those with one.

    Writes ``NAME/...`` for each drawn source, ``inventory.json`` (format, size and digest of every file),
    ``benchmarks.json`` (the same of the benchmarks that no record may show) and ``preview.png``.

    Raises:
        SourceError: the recipe has no source, or a location that is missing, empty, or not in its format.
    """
    recipe = context.recipe
    if not recipe.data.sources:
        raise sources.SourceError(
            "data.sources is empty; name at least one source, e.g. data.sources.mine = {format: jsonl, path: ../mine}"
        )
    inventory: dict[str, Any] = {}
    drawn: dict[str, list[Scene] | list[MultiViewScene]] = {}
    for name, source in recipe.data.sources.items():
        if source.path is None:
            sizes = _drawn_sizes(recipe.data.synthetic, source.limit)
            drawn[name] = write_layout(source.format, context.out / name, name, recipe.seed, sizes)
        else:
            sources.probe(name, recipe, context.out)
        listed = listing(sources.opened(name, recipe, context.out))
        inventory[name] = {"format": source.format, "generated": source.path is None, "files": listed}
        context.progress.say(f"source {name}: {len(listed)} files")
    benchmarks = {name: listed_benchmark(name, recipe) for name in recipe.data.benchmarks}
    (context.out / "inventory.json").write_text(json.dumps(inventory, indent=1, sort_keys=True) + "\n")
    (context.out / "benchmarks.json").write_text(json.dumps(benchmarks, indent=1, sort_keys=True) + "\n")
    examples = {name: scenes[0] for name, scenes in drawn.items()}
    if examples:
        _contact_sheet(list(examples.values())).save(context.out / "preview.png")
    return _report(inventory, examples)


def _drawn_sizes(sizes: SyntheticRecipe, limit: int | None) -> SyntheticRecipe:
    """What will not be read is not drawn."""
    if limit is None:
        return sizes
    counts = {name: min(limit, getattr(sizes, name)) for name in ("train_records", "test_records")}
    return sizes.model_copy(update=counts)


def changed_sources(recipe: Recipe, artifact: Path) -> str | None:
    """What changed in the given sources and benchmarks since `artifact` listed them, as half a sentence, or None."""
    inventory = json.loads((artifact / "inventory.json").read_text(encoding="utf-8"))
    benchmarks = json.loads((artifact / "benchmarks.json").read_text(encoding="utf-8"))
    given = [name for name, source in recipe.data.sources.items() if source.path is not None]
    looked_at = [
        *(
            (
                f"source {name}",
                inventory.get(name, {}).get("files", {}),
                partial(_listed_source, name, recipe, artifact),
            )
            for name in given
        ),
        *(
            (f"benchmark {name}", benchmarks.get(name, {}), partial(listed_benchmark, name, recipe))
            for name in recipe.data.benchmarks
        ),
    ]
    for what, before, look in looked_at:
        try:
            now = look()
        except sources.SourceError as error:
            return f"{what} can't be read any more ({error})"
        changed = sorted(path for path in {*before, *now} if before.get(path) != now.get(path))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return f"{what} changed: {', '.join(changed[:3])}{more}"
    return None


def _listed_source(name: str, recipe: Recipe, artifact: Path) -> Listing:
    return listing(sources.opened(name, recipe, artifact))


def listed_benchmark(name: str, recipe: Recipe) -> Listing:
    """Size and digest of every file below a benchmark's location. Raises `SourceError`."""
    path = recipe.data.benchmarks[name].path
    try:
        files = open_files(path)
        return _listed(files, files.names())
    except StorageError as error:
        raise sources.SourceError(f"benchmark {name!r}: {error}; correct data.benchmarks.{name}.path") from None


def listing(reading: Reading) -> Listing:
    """Size and digest of every file of a source, by name.

    Raises:
        SourceError: the location can't be listed, or a file can't be read.
    """
    try:
        names = reading.files.names() if reading.only is None else _named_in(reading.only, reading)
        return _listed(reading.files, names)
    except StorageError as error:
        raise sources.SourceError(
            f"source {reading.source!r}: {error}; {reading.mend}, or run the same command again if something was "
            "writing there"
        ) from None


def _listed(files: Files, names: list[str]) -> Listing:
    parts = [names[at : at + _NAMES_AT_A_TIME] for at in range(0, len(names), _NAMES_AT_A_TIME)]
    with ThreadPoolExecutor(max_workers=_FILES_AT_A_TIME) as threads:
        return {name: entry for part in threads.map(partial(_measured, files), parts) for name, entry in part.items()}


def _named_in(file: str, reading: Reading) -> list[str]:
    """A file and, if it is JSON lines, the images that it names."""
    names = {file}
    if reading.settings.format == "jsonl":
        for _, parsed in json_lines(reading, file):
            try:
                names.update(image_names(parsed()))
            except BadRecord:
                # The reader rejects the line with its reason.
                continue
    return sorted(names)


def _measured(files: Files, names: Iterable[str]) -> Listing:
    measure = _entity_tag if is_remote(files.location) else _md5
    found: Listing = {}
    for name in names:
        try:
            found[name] = measure(files, name)
        except (MissingError, EscapeError):
            # Named by a record, which the reader rejects.
            continue
    return found


def _md5(files: Files, name: str) -> dict[str, int | str]:
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with files.open(name) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"size": size, "md5": digest.hexdigest()}


def _entity_tag(files: Files, name: str) -> dict[str, int | str]:
    stamp = files.stamp(name)
    return {"size": stamp.size, "etag": stamp.version.strip('"')}


def _report(inventory: dict[str, Any], examples: dict[str, Scene | MultiViewScene]) -> StageReport:
    sizes = {name: sum(file["size"] for file in entry["files"].values()) for name, entry in inventory.items()}
    lines = ["| source | format | origin | files | megabytes |", "| --- | --- | --- | ---: | ---: |"]
    for name, entry in inventory.items():
        origin = "drawn" if entry["generated"] else "given"
        lines.append(f"| {name} | {entry['format']} | {origin} | {len(entry['files'])} | {sizes[name] / 1e6:.2f} |")
    tables = {"Sources": "\n".join(lines)}
    if examples:
        shown = ["| source | question | reasoning | answer |", "| --- | --- | --- | --- |"]
        for name, scene in examples.items():
            shown.append(f"| {name} | {scene.question} | {'<br>'.join(scene.sentences)} | {scene.answer} |")
        tables["First drawn scene of each source"] = "\n".join(shown)
    return StageReport(
        summary={
            "sources": len(inventory),
            "files": sum(len(entry["files"]) for entry in inventory.values()),
            "bytes": sum(sizes.values()),
        },
        tables=tables,
        plots=("preview.png",) if examples else (),
    )


def _contact_sheet(drawn: list[Scene | MultiViewScene], gap: int = 4, scale: int = 2) -> PIL.Image.Image:
    """The pictures of these scenes side by side; views of one scene touch."""
    tiles = [
        np.concatenate(list(scene.views) if isinstance(scene, MultiViewScene) else [scene.pixels], axis=1)
        .repeat(scale, axis=0)
        .repeat(scale, axis=1)
        for scene in drawn
    ]
    height, width = tiles[0].shape[0], sum(tile.shape[1] + gap for tile in tiles)
    sheet = np.full((height + 2 * gap, width + gap, 3), 255, np.uint8)
    left = gap
    for tile in tiles:
        sheet[gap : gap + height, left : left + tile.shape[1]] = tile
        left += tile.shape[1] + gap
    return PIL.Image.fromarray(sheet)
