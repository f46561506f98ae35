"""The main benchmarks of the paper, drawn; see `valr_ops.evaluation.drawn`.

In: the folder and what to draw. Out: the files in the layout that each benchmark's authors publish.
Always: the kinds of question of a benchmark take turns, and within each kind as well as over all of them the right
option has every place equally often.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from valr_ops.data.synthetic import Scene, UInt8Array
from valr_ops.data.videos import write_video
from valr_ops.evaluation.benchmarks import blink, mmstar, vsi_bench, vstar
from valr_ops.evaluation.drawn import IMAGE, Drawing, cell, jpeg, lettered, png, save, save_lines, save_parquet, turn

_ORDINALS = ("first", "second", "third", "fourth")
_TEXT = pa.string()


def write_vsi_bench(folder: Path, drawing: Drawing) -> None:
    """``test.jsonl`` and ``scannet/SCENE.mp4``: a camera moves over the scene, and every type of question is asked."""
    rows = []
    types = list(vsi_bench.COUNTS)
    for number, scene in enumerate(drawing.scenes()):
        kind = types[number % len(types)]
        name = f"scene{number:04d}_00"
        save(folder, f"scannet/{name}.mp4", write_video(_panned(scene)))
        row = {"id": number, "dataset": "scannet", "scene_name": name, "question_type": kind}
        if kind in vsi_bench.NUMERIC:
            # Of a colour that is there: there is no error relative to 0.
            shapes = sum(colour == scene.answer for line in scene.colours for colour in line)
            row |= {
                "question": f"How many {scene.answer} shapes are in this room?",
                "ground_truth": str(shapes),
                "options": None,
            }
        else:
            options, right = drawing.choices(scene, turn(number, len(types)))
            row |= {"question": scene.question, "ground_truth": "ABCD"[right], "options": lettered(options)}
        rows.append(row)
    save_lines(folder, "test.jsonl", rows)


def _panned(scene: Scene, frames: int = 8) -> UInt8Array:
    """Frames [frames, height, width + cell, 3] that show all of the scene; half way the camera moves on by a cell."""
    side = scene.pixels.shape[0] // len(scene.colours)
    # A shape does not touch the border of its cell: what is repeated beyond the scene is empty paper.
    canvas = np.pad(scene.pixels, ((0, 0), (side, side), (0, 0)), mode="edge")
    starts = [side * (2 * frame // frames) for frame in range(frames)]
    return np.stack([canvas[:, start : start + scene.pixels.shape[1] + side] for start in starts])


def write_blink(folder: Path, drawing: Drawing) -> None:
    """``SUB_TASK/val-00000-of-00001.parquet`` for all 14: one to four images, of which one is asked about."""
    tasks = blink.SUB_TASKS
    images = [f"image_{number}" for number in range(1, 5)]
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    others = iter(drawing.scenes("others", 3 * drawing.count))
    for number, scene in enumerate(drawing.scenes()):
        kind = number % len(tasks)
        task, shown = tasks[kind], 1 + kind % 4
        asked = number // len(tasks) % shown
        options, right = drawing.choices(scene, turn(number, len(tasks)), options=2 + kind % 3)
        question = f"Look at the {_ORDINALS[asked]} image. {scene.question}"
        pixels = [scene.pixels if place == asked else next(others).pixels for place in range(shown)]
        rows[task].append(
            {
                "idx": f"val_{task}_{len(rows[task]) + 1}",
                "question": question,
                "sub_task": task,
                **dict.fromkeys(images),
                **dict(zip(images, map(cell, pixels))),
                "choices": options,
                "answer": f"({'ABCD'[right]})",
                "prompt": _selected(question, options),
            }
        )
    texts = [(name, _TEXT) for name in ("idx", "question", "sub_task")]
    end = [("choices", pa.list_(_TEXT)), ("answer", _TEXT), ("prompt", _TEXT)]
    schema = pa.schema([*texts, *((image, IMAGE) for image in images), *end])
    for task in tasks:
        save_parquet(folder, f"{task}/val-00000-of-00001.parquet", rows[task], schema)


def write_mmvp(folder: Path, drawing: Drawing) -> None:
    """``Questions.csv`` and ``MMVP Images/INDEX.jpg``: the images of a pair differ only in the cell asked about."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("Index", "Question", "Options", "Correct Answer"))
    others = (scene for part in count() for scene in drawing.scenes(f"other {part}", 64))
    for pair, scene in enumerate(drawing.scenes(count=(drawing.count + 1) // 2)):
        other = next(one for one in others if one.answer != scene.answer)
        changed = scene.pixels.copy()
        _asked(scene, changed)[:] = _asked(other, other.pixels)
        answers = [scene.answer, other.answer][:: 1 if pair % 2 else -1]
        for index, answer, pixels in ((1, scene.answer, scene.pixels), (2, other.answer, changed)):
            save(folder, f"MMVP Images/{2 * pair + index}.jpg", jpeg(pixels))
            stated = f"(a) {answers[0]} (b) {answers[1]}"
            writer.writerow((2 * pair + index, scene.question, stated, f"({'ab'[answers.index(answer)]})"))
    save(folder, "Questions.csv", table.getvalue().encode())


def _asked(scene: Scene, pixels: UInt8Array) -> UInt8Array:
    """The cell of a picture that the scene asks about: a view [cell, cell, 3] of its pixels."""
    _, top, right, bottom = scene.box(scene.last_row)
    return pixels[top:bottom, right - (bottom - top) : right]


def write_mmstar(folder: Path, drawing: Drawing) -> None:
    """``mmstar.parquet``: the options stand in the question, all 18 sub-categories take turns."""
    parts = [(category, part) for category, parts in mmstar.CATEGORIES.items() for part in parts]
    rows = []
    for number, scene in enumerate(drawing.scenes()):
        category, part = parts[number % len(parts)]
        options, right = drawing.choices(scene, turn(number, len(parts)))
        rows.append(
            {
                "index": number,
                "question": f"{scene.question}\nOptions: {', '.join(lettered(options, '{letter}: {text}'))}",
                "image": png(scene.pixels),
                "answer": "ABCD"[right],
                "category": category,
                "l2_category": part,
                "meta_info": {"source": "drawn", "split": "val", "image_path": f"images/{number}.png"},
            }
        )
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("question", _TEXT),
            ("image", pa.binary()),
            *((name, _TEXT) for name in ("answer", "category", "l2_category")),
            ("meta_info", pa.struct([(name, _TEXT) for name in ("source", "split", "image_path")])),
        ]
    )
    save_parquet(folder, "mmstar.parquet", rows, schema)


def write_vstar(folder: Path, drawing: Drawing) -> None:
    """``test_questions.jsonl`` and ``CATEGORY/NAME.jpg``: four options, and two of a relative position."""
    rows = []
    for number, scene in enumerate(drawing.scenes()):
        kind = number % 2
        category = vstar.CATEGORIES[kind]
        options, right = drawing.choices(scene, turn(number, 2), options=(4, 2)[kind])
        asked = [scene.question, *lettered(options, "({letter}) {text}")]
        rows.append(
            {
                "image": save(folder, f"{category}/drawn_{number}.jpg", jpeg(scene.pixels)),
                "text": "\n".join([*asked, "Answer with the option's letter from the given choices directly."]),
                "category": category,
                "label": "ABCD"[right],
                "question_id": number,
            }
        )
    save_lines(folder, "test_questions.jsonl", rows)


def write_cv_bench(folder: Path, drawing: Drawing) -> None:
    """``test_2d.parquet`` and ``test_3d.parquet``: two tasks each, and three sources."""
    kinds = [("2D", task, source) for source in ("ADE20K", "COCO") for task in ("Count", "Relation")]
    kinds += [("3D", task, "Omni3D") for task in ("Depth", "Distance")]
    rows: dict[str, list[dict[str, Any]]] = {"2D": [], "3D": []}
    for number, scene in enumerate(drawing.scenes()):
        sort, task, source = kinds[number % len(kinds)]
        options, right = drawing.choices(scene, turn(number, len(kinds)), options=4 if task == "Count" else 2)
        name = f"{sort.lower()}/{number}.png"
        rows[sort].append(
            {
                "idx": number,
                "type": sort,
                "task": task,
                "image": cell(scene.pixels, name),
                "question": scene.question,
                "choices": options,
                "answer": f"({'ABCD'[right]})",
                "prompt": _selected(scene.question, options),
                "filename": f"img/{name}",
                "source": source,
            }
        )
    texts = ("question", "choices", "answer", "prompt", "filename", "source")
    schema = pa.schema(
        [
            ("idx", pa.int32()),
            ("type", _TEXT),
            ("task", _TEXT),
            ("image", IMAGE),
            *((name, pa.list_(_TEXT) if name == "choices" else _TEXT) for name in texts),
        ]
    )
    for sort, found in rows.items():
        save_parquet(folder, f"test_{sort.lower()}.parquet", found, schema)


def _selected(question: str, options: Sequence[str]) -> str:
    """The prompt that BLINK and CV-Bench make of a question."""
    return "\n".join([question, "Select from the following choices.", *lettered(options, "({letter}) {text}")])
