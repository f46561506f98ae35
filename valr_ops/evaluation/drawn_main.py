"""The main benchmarks of the paper, drawn; see `valr_ops.evaluation.drawn`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from valr_ops.data.videos import write_video
from valr_ops.evaluation.benchmarks import vsi_bench
from valr_ops.evaluation.drawn import Drawing, lettered, save, save_lines


def write_vsi_bench(folder: Path, drawing: Drawing) -> None:
    """``test.jsonl`` and ``scannet/SCENE.mp4``; a camera moves over the scene, and every type of question is asked."""
    rows = []
    types = list(vsi_bench.COUNTS)
    for number, scene in enumerate(drawing.scenes()):
        kind = types[number % len(types)]
        name = f"scene{number:04d}_00"
        save(folder, f"scannet/{name}.mp4", write_video(np.stack([scene.pixels] * 8)))
        row = {"id": number, "dataset": "scannet", "scene_name": name, "question_type": kind}
        if kind in vsi_bench.NUMERIC:
            # Of a colour that is there: there is no relative error of 0.
            count = sum(colour == scene.answer for line in scene.colours for colour in line)
            row |= {
                "question": f"How many {scene.answer} shapes are in this room?",
                "ground_truth": str(count),
                "options": None,
            }
        else:
            options, right = drawing.choices(scene, number)
            row |= {"question": scene.question, "ground_truth": "ABCD"[right], "options": lettered(options)}
        rows.append(row)
    save_lines(folder, "test.jsonl", rows)
