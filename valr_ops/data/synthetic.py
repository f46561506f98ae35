"""Drawn scenes: the sources of scale tiny, and pictures with dense labels for pretraining small vision encoders.

In: a seed and a size. Out: either arrays (`draw_scenes`, `draw_scattered`), or folders in the public on-disk formats,
so that scale tiny runs the same readers as scale paper (`build_sources`, also the inventory of a user's folders).
Always: the same seed gives the same bytes; nothing in a question tells a cell, every answer is equally frequent for
every kind of question, and each step can only be written by looking at its row. The answer stands in the last row
described, so that reasoning which was read off the picture is enough to answer.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
import pyarrow as pa
import pyarrow.parquet as pq

from valr_ops.data import sources
from valr_ops.recipe.recipe import Recipe, SyntheticRecipe
from valr_ops.store.artifacts import StageContext, StageReport

COLOURS = ("red", "green", "blue", "yellow")
"""Colours of a cell; the answers."""
SHAPES = ("square", "circle", "triangle")
"""Shapes of a cell: they vary freely and no text names them."""
CELL_CLASSES = len(COLOURS) * len(SHAPES)
"""Labels of `draw_scenes` are 0 .. CELL_CLASSES - 1: colour index times the number of shapes plus shape index."""
SCATTERED_COLOURS = (*COLOURS, "black")
"""Colours of `draw_scattered`; its map holds the index plus one."""

_RGB = {
    "red": (214, 40, 40),
    "green": (42, 157, 80),
    "blue": (30, 96, 220),
    "yellow": (244, 200, 20),
    "black": (16, 16, 16),
}
_PAPER = (236, 236, 236)
_SPRITE_VARIANTS = 8

UInt8Array = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]


def draw_scenes(
    seed: int, count: int, rows: int = 4, columns: int = 4, cell_pixels: int = 16
) -> tuple[UInt8Array, npt.NDArray[np.int64]]:
    """Scenes of coloured shapes on a grid, one shape a cell, colour and shape uniform and independent.

    Args:
        seed: any non-negative number.
        count: number of scenes.
        rows, columns: cells.
        cell_pixels: side of a cell; the images are ``rows * cell_pixels`` high.

    Returns:
        images uint8 [count, height, width, 3] and labels int64 [count, rows, columns], see `CELL_CLASSES`.
    """
    labels = np.random.default_rng([seed, 0]).integers(0, CELL_CLASSES, (count, rows, columns))
    return _paint(labels, np.random.default_rng([seed, 1]), cell_pixels), labels


def _paint(labels: npt.NDArray[np.int64], rng: np.random.Generator, cell_pixels: int) -> UInt8Array:
    """Images uint8 [count, rows * cell_pixels, columns * cell_pixels, 3]; size and place in a cell vary by `rng`."""
    sprites = _sprites(cell_pixels)
    count, rows, columns = labels.shape
    cells = sprites[labels, rng.integers(0, _SPRITE_VARIANTS, labels.shape)]
    joined = cells.transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(joined.reshape(count, rows * cell_pixels, columns * cell_pixels, 3))


def _sprites(cell_pixels: int) -> UInt8Array:
    """Every cell that can occur: uint8 [CELL_CLASSES, _SPRITE_VARIANTS, cell_pixels, cell_pixels, 3]."""
    rng = np.random.default_rng([cell_pixels, 2])
    sprites = np.empty((CELL_CLASSES, _SPRITE_VARIANTS, cell_pixels, cell_pixels, 3), np.uint8)
    for label in range(CELL_CLASSES):
        colour, shape = divmod(label, len(SHAPES))
        for variant in range(_SPRITE_VARIANTS):
            cell = PIL.Image.new("RGB", (cell_pixels, cell_pixels), _PAPER)
            side = round(cell_pixels * rng.uniform(0.6, 0.85))
            x, y = (1 + int(rng.integers(0, cell_pixels - side)) for _ in range(2))
            draw = PIL.ImageDraw.Draw(cell)
            _draw_shape(draw, SHAPES[shape], (x, y, x + side - 2, y + side - 2), _RGB[COLOURS[colour]])
            sprites[label, variant] = np.asarray(cell)
    return sprites


def _draw_shape(draw: PIL.ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], fill: Any) -> None:
    x0, y0, x1, y1 = box
    if shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "circle":
        draw.ellipse(box, fill=fill)
    else:
        draw.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=fill)


def draw_scattered(
    seed: int, count: int, height: int = 64, width: int = 64, max_shapes: int = 12
) -> tuple[UInt8Array, Int8Array, Int8Array]:
    """Shapes of many sizes at free places on grey boxes, with what stands at every pixel.

    Args:
        seed: any non-negative number.
        count: number of images.
        height, width: pixels.
        max_shapes: at most so many shapes an image, at least one; later ones cover earlier ones.

    Returns:
        images uint8 [count, height, width, 3]; colour map int8 [count, height, width], 0 where there is no shape, else
        1 + index into `SCATTERED_COLOURS`; shape map int8 [count, height, width], 0 or 1 + index into `SHAPES`.
    """
    rng = np.random.default_rng([seed, 3])
    side = min(height, width)
    images = np.empty((count, height, width, 3), np.uint8)
    colour_map = np.empty((count, height, width), np.int8)
    shape_map = np.empty((count, height, width), np.int8)
    base = np.array([_RGB[name] for name in SCATTERED_COLOURS])
    for index in range(count):
        # One drawing of object numbers, then three table look-ups: three times fewer polygons than three drawings.
        boxes = int(rng.integers(0, 4))
        shapes = int(rng.integers(1, max_shapes + 1))
        colours = rng.integers(0, len(SCATTERED_COLOURS), shapes)
        kinds = rng.integers(0, len(SHAPES), shapes)
        sizes = (side * rng.uniform(0.08, 0.45, shapes)).astype(int).clip(3)
        lefts = rng.integers(-2, width - 3, shapes)
        tops = rng.integers(-2, height - 3, shapes)
        numbers = PIL.Image.new("L", (width, height), 0)
        draw = PIL.ImageDraw.Draw(numbers)
        for box in range(boxes):
            left = box * width // boxes
            right = (box + 1) * width // boxes - int(rng.integers(1, max(2, width // (3 * boxes))))
            draw.rectangle((left, 0, right, height), fill=1 + box)
        for shape in range(shapes):
            x, y, size = int(lefts[shape]), int(tops[shape]), int(sizes[shape])
            _draw_shape(draw, SHAPES[kinds[shape]], (x, y, x + size, y + size), 1 + boxes + shape)
        grey = rng.integers(110, 256, 1 + boxes)[:, None].repeat(3, axis=1)
        tint = base[colours] + rng.integers(-16, 17, (shapes, 3))
        # Blue is anything between navy and azure, so that an encoder learns the word and not one shade.
        tint[:, 1] += np.where(colours == SCATTERED_COLOURS.index("blue"), rng.integers(-40, 61, shapes), 0)
        palette = np.concatenate([grey, tint]).clip(0, 255).astype(np.uint8)
        none = np.zeros(1 + boxes, np.int8)
        drawn = np.asarray(numbers)
        images[index] = palette[drawn]
        colour_map[index] = np.concatenate([none, colours.astype(np.int8) + 1])[drawn]
        shape_map[index] = np.concatenate([none, kinds.astype(np.int8) + 1])[drawn]
    return images, colour_map, shape_map


@dataclass(frozen=True)
class Scene:
    """One drawn question."""

    pixels: UInt8Array
    """[height, width, 3]"""
    colours: tuple[tuple[str, ...], ...]
    """Colour of every cell, by row."""
    first_row: int
    """First row of the reasoning, from 0."""
    last_row: int
    """Last row of the reasoning, from 0; the one that is asked about."""

    @property
    def answer(self) -> str:
        """The colour at the end of the last row read."""
        return self.colours[self.last_row][-1]

    @property
    def rows_read(self) -> range:
        """The rows that the reasoning goes through, from 0."""
        return range(self.first_row, self.last_row + 1)

    def sentence(self, row: int) -> str:
        """What a step says about one row."""
        return f"Row {row + 1}: {' '.join(self.colours[row])}."

    def rows_in_words(self) -> str:
        """``row 2`` or ``rows 2 to 4``."""
        if self.first_row == self.last_row:
            return f"row {self.last_row + 1}"
        return f"rows {self.first_row + 1} to {self.last_row + 1}"


def scenes(
    seed: int, name: str, count: int, recipe: SyntheticRecipe, fewest_rows: int = 1, most_rows: int | None = None
) -> list[Scene]:
    """Questions about drawn scenes; the same arguments give the same scenes.

    Every combination of number of rows read and answer is equally frequent, so that no answer can be guessed from the
    question better than by chance (one in four).

    Args:
        seed: the recipe's.
        name: of the source and split, so that no two draw the same scenes.
        count: number of scenes.
        recipe: sizes.
        fewest_rows: at least so many rows in the reasoning.
        most_rows: at most so many; None for all of them.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    labels = rng.integers(0, CELL_CLASSES, (count, recipe.rows, recipe.columns))
    most, fewest = min(most_rows or recipe.rows, recipe.rows), min(fewest_rows, recipe.rows)
    combinations = rng.permutation(np.arange(count) % ((most - fewest + 1) * len(COLOURS)))
    rows_read, answers = fewest + combinations // len(COLOURS), combinations % len(COLOURS)
    first = rng.integers(0, recipe.rows - rows_read + 1)
    last = first + rows_read - 1
    asked = (np.arange(count), last, recipe.columns - 1)
    labels[asked] = answers * len(SHAPES) + labels[asked] % len(SHAPES)
    images = _paint(labels, rng, recipe.cell_pixels)
    return [
        Scene(
            pixels=images[i],
            colours=tuple(tuple(COLOURS[cell // len(SHAPES)] for cell in row) for row in labels[i]),
            first_row=int(first[i]),
            last_row=int(last[i]),
        )
        for i in range(count)
    ]


def build_sources(context: StageContext) -> StageReport:
    """Stage `sources`: draw the sources without a path in their public layouts, list the files of those with one.

    Writes ``NAME/...`` for each drawn source, ``inventory.json`` (format, size and MD5 of every file) and
    ``preview.png``.

    Raises:
        SourceError: the recipe has no source, or a folder that is missing, empty, or not in its format.
    """
    recipe = context.recipe
    if not recipe.data.sources:
        raise sources.SourceError(
            "data.sources is empty; name at least one source, e.g. data.sources.mine = {format: jsonl, path: ../mine}"
        )
    inventory: dict[str, Any] = {}
    drawn: list[Scene] = []
    for name, source in sorted(recipe.data.sources.items()):
        folder = sources.folder(name, recipe, context.out)
        if source.path is None:
            drawn += _WRITERS[source.format](folder, name, recipe.seed, recipe.data.synthetic)
        else:
            sources.probe(name, recipe, context.out)
        listed = _listed(folder, source.format)
        inventory[name] = {"format": source.format, "generated": source.path is None, "files": listed}
        context.progress.say(f"source {name}: {len(listed)} files")
    (context.out / "inventory.json").write_text(json.dumps(inventory, indent=1, sort_keys=True) + "\n")
    if drawn:
        _contact_sheet(drawn).save(context.out / "preview.png")
    return _report(inventory, drawn)


def changed_sources(recipe: Recipe, artifact: Path) -> str | None:
    """What changed in the given folders since `artifact` listed them, as half a sentence; None if nothing did."""
    inventory = json.loads((artifact / "inventory.json").read_text(encoding="utf-8"))
    for name, source in sorted(recipe.data.sources.items()):
        if source.path is None:
            continue
        before = inventory.get(name, {}).get("files", {})
        now = _listed(sources.folder(name, recipe, artifact), source.format)
        changed = sorted(path for path in {*before, *now} if before.get(path) != now.get(path))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            return f"source {name} changed: {', '.join(changed[:3])}{more}"
    return None


def _listed(folder: Path, format_name: str) -> dict[str, dict[str, int | str]]:
    return _measured(folder.parent if folder.is_file() else folder, _files(folder, format_name))


def _report(inventory: dict[str, Any], drawn: list[Scene]) -> StageReport:
    sizes = {name: sum(file["size"] for file in entry["files"].values()) for name, entry in inventory.items()}
    lines = ["| source | format | origin | files | megabytes |", "| --- | --- | --- | ---: | ---: |"]
    for name, entry in inventory.items():
        origin = "drawn" if entry["generated"] else "given"
        lines.append(f"| {name} | {entry['format']} | {origin} | {len(entry['files'])} | {sizes[name] / 1e6:.2f} |")
    tables = {"Sources": "\n".join(lines)}
    if drawn:
        examples = ["| question | reasoning | answer |", "| --- | --- | --- |"]
        for scene in drawn[:4]:
            steps = "<br>".join(scene.sentence(row) for row in scene.rows_read)
            examples.append(f"| {_question(scene)} | {steps} | {scene.answer} |")
        tables["First drawn scenes"] = "\n".join(examples)
    return StageReport(
        summary={
            "sources": len(inventory),
            "files": sum(len(entry["files"]) for entry in inventory.values()),
            "bytes": sum(sizes.values()),
        },
        tables=tables,
        plots=("preview.png",) if drawn else (),
    )


def _question(scene: Scene) -> str:
    return f"Read {scene.rows_in_words()}. Which colour is the last in row {scene.last_row + 1}?"


def _write_jsonl(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """``train.jsonl`` and ``test.jsonl``; every step looks at its row's box."""
    (folder / "images").mkdir(parents=True)
    all_scenes = []
    for split, count in (("train", recipe.train_records), ("test", recipe.test_records)):
        lines = []
        for number, scene in enumerate(scenes(seed, f"{name}/{split}", count, recipe)):
            path = f"images/{split}-{number:05d}.png"
            (folder / path).write_bytes(_png(scene.pixels))
            row = {
                "id": f"{name}/{split}/{number:05d}",
                "license": sources.DRAWN_LICENSE,
                "images": [path],
                "question": _question(scene),
                "steps": [
                    {"text": scene.sentence(row), "image": 0, "box": _row_box(scene, row, recipe)}
                    for row in scene.rows_read
                ],
                "answer": scene.answer,
            }
            lines.append(json.dumps(row) + "\n")
            all_scenes.append(scene)
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return all_scenes


def _write_zebra_cot(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """One parquet file; the crop of each row stands in the reasoning before the sentence about it."""
    # All rows: supervision is densest where every cell has to be read.
    all_scenes = scenes(seed, f"{name}/train", recipe.train_records, recipe, fewest_rows=recipe.rows)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    crops = [f"reasoning_image_{number + 1}" for number in range(recipe.rows)]
    rows = []
    for scene in all_scenes:
        thoughts = []
        row: dict[str, Any] = {"problem_image_1": {"bytes": _png(scene.pixels), "path": None}}
        for number, read in enumerate(scene.rows_read):
            x0, y0, x1, y1 = _row_box(scene, read, recipe)
            row[crops[number]] = {"bytes": _png(scene.pixels[y0:y1, x0:x1]), "path": None}
            thoughts.append(f"THOUGHT {number}: <image_start>[{crops[number]}]<image_end> {scene.sentence(read)}")
        row["Question"] = (
            f"<image_start>[problem_image_1]<image_end> Look at {scene.rows_in_words()}. "
            f"Which colour is the last in row {scene.last_row + 1}?"
        )
        row["Text Reasoning Trace"] = "\n".join(thoughts)
        row["Final Answer"] = scene.answer
        rows.append(row)
    schema = pa.schema(
        [(column, pa.string()) for column in ("Question", "Text Reasoning Trace", "Final Answer")]
        + [(column, image) for column in ("problem_image_1", *crops)]
    )
    path = folder / "grid_scenes" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=64)
    return all_scenes


def _write_visual_cot(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """One JSON array; the box holds two rows, of which the lower one is asked about."""
    (folder / "cot" / "scenes").mkdir(parents=True)
    all_scenes = scenes(seed, f"{name}/train", recipe.train_records, recipe, fewest_rows=2, most_rows=2)
    rows = []
    for number, scene in enumerate(all_scenes):
        path = f"cot/scenes/{number:05d}.png"
        (folder / path).write_bytes(_png(scene.pixels))
        height, width = scene.pixels.shape[:2]
        box = [*_row_box(scene, scene.first_row, recipe)[:2], *_row_box(scene, scene.last_row, recipe)[2:]]
        side = max(width, height)
        padding = ((side - width) / 2, (side - height) / 2) * 2
        normalised = ", ".join(f"{(value + pad) / side:.3f}" for value, pad in zip(box, padding, strict=True))
        request = "Please provide the bounding box coordinate of the region that can help you answer the question."
        rows.append(
            {
                "question_id": number,
                "dataset": "scenes",
                "split": "train",
                "width": width,
                "height": height,
                "image": [path, f"{path}###{box}"],
                "conversations": [
                    {
                        "from": "human",
                        "value": f"<image>\nWhich colour is the last in row {scene.last_row + 1}? {request}",
                    },
                    {"from": "gpt", "value": f"[{normalised}]"},
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": scene.answer},
                ],
                "cot_with_detailed_reasoning_steps": " ".join(scene.sentence(row) for row in scene.rows_read),
            }
        )
    (folder / "visual_cot.json").write_text(json.dumps(rows, indent=0) + "\n")
    return all_scenes


_WRITERS = {"jsonl": _write_jsonl, "zebra_cot": _write_zebra_cot, "visual_cot": _write_visual_cot}


def _row_box(scene: Scene, row: int, recipe: SyntheticRecipe) -> list[int]:
    return [0, row * recipe.cell_pixels, scene.pixels.shape[1], (row + 1) * recipe.cell_pixels]


def _png(pixels: UInt8Array) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _contact_sheet(drawn: list[Scene], columns: int = 8, gap: int = 4, scale: int = 2) -> PIL.Image.Image:
    """The first scenes side by side."""
    tiles = [scene.pixels.repeat(scale, axis=0).repeat(scale, axis=1) for scene in drawn[:columns]]
    height, width = tiles[0].shape[:2]
    sheet = np.full((height + 2 * gap, len(tiles) * (width + gap) + gap, 3), 255, np.uint8)
    for place, tile in enumerate(tiles):
        left = gap + place * (width + gap)
        sheet[gap : gap + height, left : left + width] = tile
    return PIL.Image.fromarray(sheet)


def _files(folder: Path, format_name: str) -> Iterator[Path]:
    """The files of a source: all below a folder that are not hidden, or a file and the images it names."""
    if folder.is_file():
        yield folder
        if format_name == "jsonl":
            yield from sources.jsonl.image_paths(folder)
        return
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        # What the readers refuse to follow is not listed either.
        if not hidden and path.is_file() and path.resolve().is_relative_to(root):
            yield path


def _measured(root: Path, files: Iterator[Path]) -> dict[str, dict[str, int | str]]:
    """Size in bytes and MD5 by relative path, several files at a time."""

    def measure(path: Path) -> tuple[str, dict[str, int | str]]:
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return path.relative_to(root).as_posix(), {"size": path.stat().st_size, "md5": digest.hexdigest()}

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return dict(sorted(threads.map(measure, files)))
