"""The public on-disk formats, written from drawn scenes, so that scale tiny reads what scale paper reads.

In: a folder, the name of a source, a seed and sizes. Out: the files of one format, and the scenes in them.
Always: the same arguments give the same bytes (no clock, owner or path in an archive). Every row read has its target in
the format's own way: a box (jsonl, visual_cot), a step of a tree with a box (cogcom), a crop inside the reasoning
(zebra_cot, monet), an edited picture (refocus), a view (gcot), or the only picture there is (onethinker).
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from valr_ops.data.sources import DRAWN_LICENSE
from valr_ops.data.synthetic import MultiViewScene, Scene, UInt8Array, multi_view_scenes, scenes
from valr_ops.recipe.recipe import SyntheticRecipe

RECORDS_PER_TAR = 256
"""Public tars hold some thousands; fewer make several shards, which are read in the order of their names."""

_OUTLINE = np.array((216, 27, 96), np.uint8)
_MARKER = "<abs_vis_token></abs_vis_token>"


def write_layout(
    format_name: str, folder: Path, name: str, seed: int, recipe: SyntheticRecipe
) -> list[Scene] | list[MultiViewScene]:
    """Draw the scenes of a source and write them in a format.

    Args:
        format_name: a key of `valr_ops.data.sources.FORMATS`.
        folder: made if it is not there.
        name: of the source; two sources of one format show different scenes.
        seed: the recipe's.
        recipe: numbers of records and sizes.

    Returns:
        The scenes in the order of the files, the test split last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _WRITERS[format_name](folder, name, seed, recipe)


def _write_jsonl(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """``train.jsonl`` and ``test.jsonl``; every step looks at its row's box."""
    all_scenes = []
    for split, count in (("train", recipe.train_records), ("test", recipe.test_records)):
        drawn = scenes(seed, f"{name}/{split}", count, recipe)
        lines = []
        for number, scene in enumerate(drawn):
            row = {
                "id": f"{name}/{split}/{number:05d}",
                "license": DRAWN_LICENSE,
                "images": [_save(folder, f"images/{split}-{number:05d}.png", scene.pixels)],
                "question": scene.question,
                "steps": [
                    {"text": scene.sentence(row), "image": 0, "box": list(scene.box(row))} for row in scene.rows_read
                ],
                "answer": scene.answer,
            }
            lines.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
        all_scenes += drawn
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
            row[crops[number]] = {"bytes": _png(_crop(scene, read)), "path": None}
            thoughts.append(f"THOUGHT {number}: <image_start>[{crops[number]}]<image_end> {scene.sentence(read)}")
        row["Question"] = f"<image_start>[problem_image_1]<image_end> {scene.question}"
        row["Text Reasoning Trace"] = "\n".join(thoughts)
        row["Final Answer"] = scene.answer
        rows.append(row)
    schema = pa.schema(
        [(column, pa.string()) for column in ("Question", "Text Reasoning Trace", "Final Answer")]
        + [(column, image) for column in ("problem_image_1", *crops)]
    )
    path = folder / "grid_scenes" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=64)
    return all_scenes


def _write_monet(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """``grid_scenes/train.json``; the crop of each row follows a marker, and what is seen in it follows the crop."""
    all_scenes = scenes(seed, f"{name}/train", recipe.train_records, recipe, fewest_rows=recipe.rows)
    subset = "grid_scenes"
    rows = []
    for number, scene in enumerate(all_scenes):
        path = f"{subset}/images/{number:06d}"
        assistant = [_text(_MARKER)]
        for step, read in enumerate(scene.rows_read):
            crop = _save(folder, f"{path}_{step + 1}.png", _crop(scene, read))
            seen = f"<observation>{scene.sentence(read)}</observation>"
            after = _MARKER if read != scene.last_row else f"\\boxed{{{scene.answer}}}"
            assistant += [{"type": "image", "image": crop}, _text(f"{seen} {after}")]
        question = f"{scene.question}\nPut your final answer within \\boxed{{}}."
        user = [{"type": "image", "image": _save(folder, f"{path}_0.png", scene.pixels)}, _text(question)]
        turns = {"system": [_text("You are a helpful assistant.")], "user": user, "assistant": assistant}
        rows.append(
            {
                "metadata": {"dataset_name": subset, "sample_id": number},
                "data": [{"role": role, "content": content} for role, content in turns.items()],
            }
        )
    _write_array(folder / subset / "train.json", rows)
    return all_scenes


def _write_cogcom(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """Tars of a picture and a pickle a record; the found path grounds the rows, a shorter one leads nowhere."""
    # The format's readers cut at most three regions out of a picture.
    all_scenes = scenes(seed, f"{name}/train", recipe.train_records, recipe, most_rows=3)
    for first in range(0, len(all_scenes), RECORDS_PER_TAR):
        path = folder / f"train-{first // RECORDS_PER_TAR:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, scene in enumerate(all_scenes[first : first + RECORDS_PER_TAR], start=first):
                for ending, data in (("png", _png(scene.pixels)), ("pyd", pickled(_manipulations(scene)))):
                    # Its time is 0 and it has no owner unless they are set.
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return all_scenes


def _manipulations(scene: Scene) -> dict[str, Any]:
    """The metadata of one record: a tree of manipulations, from parent to child."""
    edges: dict[str, dict[str, Any]] = {}
    for step, row in enumerate(scene.rows_read):
        region = f"bbx_{step + 1}"
        edges[f"{step},0--{step + 1},0"] = {
            "func": "GROUNDING",
            "param": f"row {row + 1}",
            "variables": {region: list(scene.box(row))},
            "onbox": None,
            "return": region,
            "desc": scene.sentence(row),
            "found": True,
        }
    edges["0,0--1,1"] = {
        "func": "OCR",
        "param": "text",
        "variables": {"txt_1": None},
        "onbox": None,
        "return": "txt_1",
        "desc": "No text is found.",
        "found": False,
    }
    return {
        "question": scene.question,
        "answer": scene.answer,
        "final_com": edges,
        "com_founds": [True, False],
        "cropped": False,
    }


def _write_refocus(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """``refocus.json``; each edited picture shades all but one row and outlines that."""
    all_scenes = scenes(seed, f"{name}/train", recipe.train_records, recipe, fewest_rows=2)
    rows = []
    for number, scene in enumerate(all_scenes):
        path = f"images/{number:06d}"
        edits = [
            {"thought": scene.sentence(row), "edited_image": _save(folder, f"{path}_e{step}.png", _focused(scene, row))}
            for step, row in enumerate(scene.rows_read, start=1)
        ]
        rows.append(
            {
                "id": f"scene_{number:06d}",
                "question": scene.question,
                "image": _save(folder, f"{path}.png", scene.pixels),
                "edits": edits,
                "answer": scene.answer,
            }
        )
    _write_array(folder / "refocus.json", rows)
    return all_scenes


def _write_visual_cot(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """One JSON array; the box holds two rows, of which the lower one is asked about."""
    # A box around the whole picture would show nothing new.
    rows_read = min(2, recipe.rows - 1)
    all_scenes = scenes(seed, f"{name}/train", recipe.train_records, recipe, rows_read, rows_read)
    rows = []
    for number, scene in enumerate(all_scenes):
        path = _save(folder, f"cot/scenes/{number:05d}.png", scene.pixels)
        height, width = scene.pixels.shape[:2]
        box = [*scene.box(scene.first_row)[:2], *scene.box(scene.last_row)[2:]]
        side = max(width, height)
        padding = ((side - width) / 2, (side - height) / 2) * 2
        normalised = ", ".join(f"{(value + pad) / side:.3f}" for value, pad in zip(box, padding, strict=True))
        request = "Please provide the bounding box coordinate of the region that can help you answer the question."
        turns = [
            ("human", f"<image>\n{scene.asked} {request}"),
            ("gpt", f"[{normalised}]"),
            ("human", "<image>"),
            ("gpt", scene.answer),
        ]
        rows.append(
            {
                "question_id": number,
                "dataset": "scenes",
                "split": "train",
                "width": width,
                "height": height,
                "image": [path, f"{path}###{box}"],
                "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
                "cot_with_detailed_reasoning_steps": " ".join(scene.sentences),
            }
        )
    _write_array(folder / "visual_cot.json", rows)
    return all_scenes


def _write_gcot(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[MultiViewScene]:
    """``gcot.json``; each step says which of the frames it looks at."""
    all_scenes = multi_view_scenes(seed, f"{name}/train", recipe.train_records, recipe)
    rows = []
    for number, scene in enumerate(all_scenes):
        place = f"drawn/scene{number:04d}_00"
        rows.append(
            {
                "id": f"gcot_{number}",
                "scene": place,
                "frames": [
                    _save(folder, f"{place}/{20 * view}.png", pixels) for view, pixels in enumerate(scene.views)
                ],
                "question": scene.question,
                "reasoning": "\n\n".join(scene.sentences),
                "targets": [view for view, _ in scene.read],
                "answer": scene.answer,
            }
        )
    _write_array(folder / "gcot.json", rows)
    return all_scenes


def _write_onethinker(folder: Path, name: str, seed: int, recipe: SyntheticRecipe) -> list[Scene]:
    """``onethinker_sft_image.json``; a paragraph of the thoughts a row."""
    all_scenes = scenes(seed, f"{name}/train", recipe.train_records, recipe)
    rows = []
    for number, scene in enumerate(all_scenes):
        thoughts = "\n\n".join(scene.sentences)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"<image>{scene.question}"},
                    {"role": "assistant", "content": f"<think>{thoughts}</think><answer>{scene.answer}</answer>"},
                ],
                "images": [_save(folder, f"img/{number:06d}.png", scene.pixels)],
            }
        )
    _write_array(folder / "onethinker_sft_image.json", rows)
    return all_scenes


_WRITERS: Mapping[str, Callable[[Path, str, int, SyntheticRecipe], list[Scene] | list[MultiViewScene]]] = {
    "cogcom": _write_cogcom,
    "gcot": _write_gcot,
    "jsonl": _write_jsonl,
    "monet": _write_monet,
    "onethinker": _write_onethinker,
    "refocus": _write_refocus,
    "visual_cot": _write_visual_cot,
    "zebra_cot": _write_zebra_cot,
}


def _crop(scene: Scene, row: int) -> UInt8Array:
    x0, y0, x1, y1 = scene.box(row)
    return scene.pixels[y0:y1, x0:x1]


def _focused(scene: Scene, row: int) -> UInt8Array:
    """The picture with all other rows shaded and this one outlined."""
    x0, y0, x1, y1 = scene.box(row)
    edited = scene.pixels // 4
    edited[y0:y1, x0:x1] = _OUTLINE
    # One pixel wide: no shape touches the edge of its cell.
    edited[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = scene.pixels[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1]
    return edited


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _write_array(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=0) + "\n")


def _save(folder: Path, name: str, pixels: UInt8Array) -> str:
    """Writes a PNG below `folder` and gives its name back."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_png(pixels))
    return name


def _png(pixels: UInt8Array) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def pickled(value: Any) -> bytes:
    """Plain values (None, bool, int, float, str, list, tuple, dict) as a pickle of protocol 2.

    Only the few opcodes that such values need: the module that could write all of them could also read what runs code.

    Raises:
        TypeError: any other type. struct.error: an integer beyond 32 bits.
    """
    return b"\x80\x02" + b"".join(_opcodes(value)) + b"."


def _opcodes(value: Any) -> Iterator[bytes]:
    match value:
        case None:
            yield b"N"
        case bool():
            yield b"\x88" if value else b"\x89"
        case int():
            yield b"J" + struct.pack("<i", value)
        case float():
            yield b"G" + struct.pack(">d", value)
        case str():
            encoded = value.encode()
            yield b"X" + struct.pack("<I", len(encoded)) + encoded
        case list():
            yield b"]("
            for entry in value:
                yield from _opcodes(entry)
            yield b"e"
        case tuple():
            yield b"("
            for entry in value:
                yield from _opcodes(entry)
            yield b"t"
        case dict():
            yield b"}("
            for key, entry in value.items():
                yield from _opcodes(key)
                yield from _opcodes(entry)
            yield b"u"
        case _:
            raise TypeError(f"{type(value).__name__} is no plain value; use None, bool, int, float, str or containers")
