"""The public layouts of the benchmarks, written from drawn scenes, so that scale tiny reads what scale paper reads.

In: a folder, the name of a benchmark, a seed, the number of questions and the sizes of a scene.
Out: the files of one benchmark as its authors publish them, with drawn pictures in the place of theirs.
Always: the same arguments give the same bytes; every option is the right one equally often, so that no letter does
better than chance; what is asked can be read off the picture.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from valr_ops.data.synthetic import COLOURS, Scene, UInt8Array, scenes
from valr_ops.recipe.recipe import SyntheticRecipe

_WRITERS = {
    "vsi_bench": "drawn_main",
    "blink": "drawn_main",
    "mmvp": "drawn_main",
    "mmstar": "drawn_main",
    "vstar": "drawn_main",
    "cv_bench": "drawn_main",
    "math_vista": "drawn_more",
    "math_vision": "drawn_more",
    "mm_halu": "drawn_more",
    "realworldqa": "drawn_more",
    "hr_bench": "drawn_more",
    "jsonl": "drawn_more",
}
"""Module with the function ``write_NAME(folder, drawing)`` of each benchmark."""


@dataclass(frozen=True)
class Drawing:
    """What a writer draws from."""

    name: str
    seed: int
    count: int
    """Number of questions; a writer may write a few more where its layout asks for pairs or rotations."""
    sizes: SyntheticRecipe

    def scenes(self, part: str = "", count: int | None = None) -> list[Scene]:
        """Scenes of which no two parts or benchmarks show the same; each asks for a colour."""
        return scenes(self.seed, f"benchmark/{self.name}/{part}", self.count if count is None else count, self.sizes)

    def choices(self, scene: Scene, number: int, options: int = 4) -> tuple[list[str], int]:
        """`options` colours in an order of their own for question `number`, and the index of the right one.

        The right one takes every place in turn.
        """
        rng = np.random.default_rng([self.seed, number, 7])
        wrong = [colour for colour in COLOURS if colour != scene.answer]
        chosen = [str(colour) for colour in rng.permutation(wrong)[: options - 1]]
        place = number % options
        return [*chosen[:place], scene.answer, *chosen[place:]], place


def write_benchmark(folder: Path, drawing: Drawing) -> None:
    """Write a benchmark into `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"valr_ops.evaluation.{_WRITERS[drawing.name]}")
    write: Callable[[Path, Drawing], None] = getattr(module, f"write_{drawing.name}")
    write(folder, drawing)


def lettered(options: Sequence[str], form: str = "{letter}. {text}") -> list[str]:
    """Options with their letters."""
    return [form.format(letter=letter, text=text) for letter, text in zip("ABCDEFGHIJ", options)]


def turn(number: int, kinds: int) -> int:
    """A number for `Drawing.choices`, where `kinds` of question take turns and this one is question `number`.

    From one question to the next, and from one of a kind to the next of that kind, the right option of 2, 3 or 4 moves
    on by one place: neither all questions nor those of one kind have theirs in some places only.
    """
    return 12 * number + (number // kinds + number % kinds) % 12


def png(pixels: UInt8Array) -> bytes:
    """Encoded pixels [height, width, 3]."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def jpeg(pixels: UInt8Array) -> bytes:
    """Encoded pixels [height, width, 3], nearly as they are."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="JPEG", quality=95, subsampling=0)
    return file.getvalue()


def save(folder: Path, name: str, data: bytes) -> str:
    """Writes a file below `folder`, with the folders on the way, and gives its name back."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


def save_parquet(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Rows as a parquet file; images are structs of `IMAGE`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=64)


def save_lines(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as JSON lines."""
    save(folder, name, "".join(json.dumps(row) + "\n" for row in rows).encode())


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""Type of an image column, as `datasets` writes it."""


def cell(pixels: UInt8Array, path: str | None = None) -> dict[str, Any]:
    """A value of an image column."""
    return {"bytes": png(pixels), "path": path}
