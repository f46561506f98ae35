"""The other benchmarks and a user's own, drawn; see `valr_ops.evaluation.drawn`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from valr_ops.data.synthetic import COLOURS, Scene
from valr_ops.data.videos import write_video
from valr_ops.evaluation.drawn import IMAGE, Drawing, cell, lettered, png, save, save_lines, save_parquet

_TEXTS = pa.list_(pa.string())
_METADATA = pa.struct(
    [
        *((name, pa.string()) for name in ("category", "context", "grade")),
        *((name, pa.int64()) for name in ("img_height", "img_width")),
        *((name, type_) for name, type_ in (("language", pa.string()), ("skills", _TEXTS))),
        *((name, pa.string()) for name in ("source", "split", "task")),
    ]
)


def _taking_turns(drawing: Drawing, kinds: tuple[str, ...], part: str = "") -> Iterator[tuple[int, str, int, Scene]]:
    """Number, kind, number among those of its kind, and scene of every question."""
    asked = dict.fromkeys(kinds, 0)
    for number, scene in enumerate(drawing.scenes(part)):
        kind = kinds[number % len(kinds)]
        yield number, kind, asked[kind], scene
        asked[kind] += 1


def _count(scene: Scene, colour: str) -> int:
    return sum(one == colour for row in scene.colours for one in row)


def write_math_vista(folder: Path, drawing: Drawing) -> None:
    """``data/testmini-00000-of-00001.parquet``: colours to choose, and counts as integer, decimal and list."""
    kinds = ("text", "integer", "text", "float", "text", "list")
    rows: list[dict[str, Any]] = []
    for number, kind, nth, scene in _taking_turns(drawing, kinds):
        choices: list[str] | None = None
        unit = precision = None
        height, width = scene.pixels.shape[:2]
        if kind == "text":
            choices, _ = drawing.choices(scene, nth)
            question, answer = scene.question, scene.answer
            hint = "and provide the correct option letter, e.g., A, B, C, D, at the end."
        elif kind == "integer":
            question, answer = f"How many {scene.answer} shapes are there?", str(_count(scene, scene.answer))
            hint = "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end."
        elif kind == "float":
            share = _count(scene, scene.answer) / sum(map(len, scene.colours))
            question, unit, precision = f"Which share of the shapes is {scene.answer}?", "of all", 1.0
            answer = str(round(share, 1))
            hint = (
                "requiring a floating-point number with one decimal place and provide the final value, "
                "e.g., 1.2, 1.3, 1.4, at the end."
            )
        else:
            question = f"How many shapes are {COLOURS[0]}, and how many {COLOURS[1]}?"
            answer = str([_count(scene, colour) for colour in COLOURS[:2]])
            hint = "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], at the end."
        shown = f"{question} (Unit: {unit})" if unit else question
        options = "\n".join(["", "Choices:", *lettered(choices, "({letter}) {text}")]) if choices else ""
        rows.append(
            {
                "pid": str(number + 1),
                "question": question,
                "image": f"images/{number + 1}.jpg",
                "decoded_image": cell(scene.pixels),
                "choices": choices,
                "unit": unit,
                "precision": precision,
                "answer": answer,
                "question_type": "multi_choice" if choices else "free_form",
                "answer_type": kind,
                "metadata": {
                    "category": "math-targeted-vqa",
                    "context": "synthetic scene",
                    "grade": "elementary school",
                    "img_height": height,
                    "img_width": width,
                    "language": "english",
                    "skills": ["arithmetic reasoning"],
                    "source": "drawn",
                    "split": "testmini",
                    "task": "figure question answering",
                },
                "query": f"Hint: Please answer the question {hint}\nQuestion: {shown}{options}",
            }
        )
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("pid", "question", "image")),
            ("decoded_image", IMAGE),
            ("choices", _TEXTS),
            ("unit", pa.string()),
            ("precision", pa.float64()),
            *((name, pa.string()) for name in ("answer", "question_type", "answer_type")),
            ("metadata", _METADATA),
            ("query", pa.string()),
        ]
    )
    save_parquet(folder, "data/testmini-00000-of-00001.parquet", rows, schema)


def write_math_vision(folder: Path, drawing: Drawing) -> None:
    """``data/test-00000-of-00001.parquet``: colours to choose, and counts without options."""
    subjects = {"options": "combinatorial geometry", "free": "counting"}
    rows: list[dict[str, Any]] = []
    for number, kind, nth, scene in _taking_turns(drawing, tuple(subjects)):
        options: list[str] = []
        if kind == "options":
            options, right = drawing.choices(scene, nth)
            question, answer = scene.question, "ABCD"[right]
        else:
            question, answer = f"How many {scene.answer} shapes are there?", str(_count(scene, scene.answer))
        rows.append(
            {
                "id": str(number + 1),
                "question": f"{question}\n<image1>",
                "options": options,
                "image": f"images/{number + 1}.jpg",
                "decoded_image": cell(scene.pixels),
                "answer": answer,
                "solution": None,
                "level": number % 5 + 1,
                "subject": subjects[kind],
            }
        )
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("id", "question")),
            ("options", _TEXTS),
            ("image", pa.string()),
            ("decoded_image", IMAGE),
            *((name, pa.string()) for name in ("answer", "solution")),
            ("level", pa.int64()),
            ("subject", pa.string()),
        ]
    )
    save_parquet(folder, "data/test-00000-of-00001.parquet", rows, schema)


def write_mm_halu(folder: Path, drawing: Drawing) -> None:
    """``response_template.json`` and ``images/``; the eight types in turn, as in the data set."""
    types = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
    rows = []
    for number, kind, _, scene in _taking_turns(drawing, types):
        name = f"{number:016x}"
        save(folder, f"images/{name}_o.png", png(scene.pixels))
        rows.append(
            {
                "question_type": kind,
                "question_topic": "drawn shapes",
                "image_id": name,
                "image_src": f"https://example.org/drawn/{name}_o.png",
                "image_content": sorted({colour for row in scene.colours for colour in row}),
                "question": scene.question,
                "gt_answer": f"The last shape in the row is {scene.answer}.",
                "model_answer": "",
            }
        )
    save(folder, "response_template.json", json.dumps(rows, indent=4).encode())


def write_realworldqa(folder: Path, drawing: Drawing) -> None:
    """``data/test-0000N-of-00002.parquet``: letters, and numbers as open answers."""
    rows = []
    for _, kind, nth, scene in _taking_turns(drawing, ("letter", "open")):
        if kind == "letter":
            options, right = drawing.choices(scene, nth)
            asked = [scene.question, *lettered(options)]
            asked += ["Please answer directly with only the letter of the correct option and nothing else."]
            question, answer = "\n".join(asked), "ABCD"[right]
        else:
            question = f"How many {scene.answer} shapes are there? Please answer directly with a single word or number."
            answer = str(_count(scene, scene.answer))
        rows.append({"image": cell(scene.pixels), "question": question, "answer": answer})
    schema = pa.schema([("image", IMAGE), ("question", pa.string()), ("answer", pa.string())])
    half = (len(rows) + 1) // 2
    save_parquet(folder, "data/test-00000-of-00002.parquet", rows[:half], schema)
    save_parquet(folder, "data/test-00001-of-00002.parquet", rows[half:], schema)


def write_hr_bench(folder: Path, drawing: Drawing) -> None:
    """``hr_bench_4k.parquet``: every question four times, each option the right one once."""
    scenes = drawing.scenes(count=(drawing.count + 3) // 4)
    rows: list[dict[str, Any]] = []
    for cycle in range(4):
        for number, scene in enumerate(scenes):
            options, right = drawing.choices(scene, number)
            rotated = options[cycle:] + options[:cycle]
            rows.append(
                {
                    "index": len(rows),
                    "question": scene.question,
                    "answer": "ABCD"[(right - cycle) % 4],
                    "category": ("single", "cross")[number % 2],
                    **dict(zip("ABCD", rotated, strict=True)),
                    "cycle_category": str(cycle),
                    "image": base64.b64encode(png(scene.pixels)).decode(),
                }
            )
    texts = ("question", "answer", "category", "A", "B", "C", "D", "cycle_category", "image")
    schema = pa.schema([("index", pa.int64()), *((name, pa.string()) for name in texts)])
    save_parquet(folder, "hr_bench_4k.parquet", rows, schema)


def write_jsonl(folder: Path, drawing: Drawing) -> None:
    """``benchmark.jsonl``, ``images/`` and ``videos/``: every type of answer, and pairs of yes and no."""
    kinds = ("choice", "number", "text", "list", "yes_no", "yes_no")
    rows: list[dict[str, Any]] = []
    for number, kind, nth, scene in _taking_turns(drawing, kinds):
        row: dict[str, Any] = {"id": number, "answer_type": kind, "group": kind}
        if kind == "text":
            save(folder, f"videos/{number:04d}.mp4", write_video(np.stack([scene.pixels] * 8)))
            row |= {"video": f"videos/{number:04d}.mp4", "num_frames": 2}
        else:
            row["images"] = [save(folder, f"images/{number:04d}.png", png(scene.pixels))]
        if kind == "choice":
            choices, right = drawing.choices(scene, nth)
            row |= {"question": scene.question, "choices": choices, "answer": "ABCD"[right]}
        elif kind == "number":
            question = f"How many {scene.answer} shapes are there?"
            row |= {"question": question, "answer": _count(scene, scene.answer), "scorer": "mra"}
        elif kind == "text":
            row |= {"prompt": scene.question, "answer": scene.answer}
        elif kind == "list":
            row |= {"question": f"Read row {scene.last_row + 1}.", "answer": list(scene.colours[scene.last_row])}
        else:
            # Neighbours: the same form of question with opposite answers.
            colour = scene.answer if nth % 2 else next(one for one in COLOURS if one != scene.answer)
            question = f"Is the last shape in row {scene.last_row + 1} {colour}?"
            row |= {"question": question, "answer": "yes" if nth % 2 else "no", "pair": nth // 2}
        rows.append(row)
    save_lines(folder, "benchmark.jsonl", rows)
