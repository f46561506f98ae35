"""Speed of scoring: rules, reading a benchmark, answers in a batch, and the report page.

Answers to be scored are of the kinds that models give: letters in words, numbers with units, boxed results. The batch
is measured on the tiny model of the tests, with latent segments, because what it shows is the cost of a step and not of
a matrix; one thread.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from perf.rows import Row, row
from tests import tiny
from tests.evaluation.scenes import answerer, benchmark, context, truthful
from valr_ops.evaluation import report
from valr_ops.evaluation.benchmarks import vsi_bench
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.run import score_model
from valr_ops.evaluation.scoring import Case, rules_of, score
from valr_ops.model.answering import generate_answers
from valr_ops.model.decoding import ValrForConditionalGeneration
from valr_ops.model.qwen import load_model, save_model

ANSWERS = 100_000
_OPTIONS = ("a red chair", "a blue table", "the lamp", "none of these")
_OUTPUTS = (
    "The answer is (B).",
    "B",
    "I count two chairs and a table, so 3.",
    "\\boxed{\\frac{1}{2}}",
    "About 2.5 metres",
    "The lamp is nearer to the camera than the table, which is why option C is right.",
    "<answer>A</answer>",
    "none of these",
)
_GOLDS = {"math_vision": "1/2", "math_vista": _OPTIONS[1], "vsi_bench": "B"}
_TYPES = {"vsi_bench": "route_planning", "cv_bench": "ade", "math_vista": "multi_choice"}
_CHOICE = ("vsi_bench", "blink", "mmvp", "mmstar", "vstar", "cv_bench", "math_vista", "realworldqa", "hr_bench")


def scoring() -> Iterator[Row]:
    """Every benchmark by its default profile, and the totals."""
    chosen = random.Random(0)
    for name in (*_CHOICE, "math_vision"):
        profile = next(iter(rules_of(name).PROFILES))
        cases = [
            Case(
                id=str(number),
                gold=_GOLDS.get(name, "(B)"),
                output=chosen.choice(_OUTPUTS),
                question_type=_TYPES.get(name, ""),
                options=() if name == "math_vision" else _OPTIONS[:2] if name == "mmvp" else _OPTIONS,
            )
            for number in range(ANSWERS)
        ]
        seconds = []
        for _ in range(5):
            started = time.process_time()
            score(cases, name, profile)
            seconds.append(time.process_time() - started)
        what = f"{ANSWERS:,} answers to {name} by {profile}, one core"
        yield row(f"score_{name}", seconds, "s", 10.0, what)


def reading() -> Iterator[Row]:
    """VSI-Bench's table, with as many rows as the published one and a file for each of its 288 videos."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        types = [kind for kind, count in vsi_bench.COUNTS.items() for _ in range(count)]
        (root / "scannet").mkdir()
        lines = []
        for number, kind in enumerate(types):
            scene = f"scene{number % 288:04d}_00"
            (root / "scannet" / f"{scene}.mp4").touch()
            numeric = kind in vsi_bench.NUMERIC
            options = None if numeric else [f"{letter}. {text}" for letter, text in zip("ABCD", _OPTIONS)]
            entry = {"id": number, "dataset": "scannet", "scene_name": scene, "question_type": kind}
            entry |= {"question": "How far apart are the lamp and the table, in metres?", "options": options}
            lines.append(json.dumps(entry | {"ground_truth": "2.5" if numeric else "C"}) + "\n")
        (root / "test.jsonl").write_text("".join(lines))
        seconds = []
        for _ in range(5):
            started = time.monotonic()
            items = vsi_bench.read(Folder(root, "vsi_bench", vsi_bench.SOURCE))
            seconds.append(time.monotonic() - started)
        yield row("read_vsi_bench", seconds, "s", 1.0, f"the {len(items):,} items of VSI-Bench, from its JSON lines")


def batches() -> Iterator[Row]:
    """Answers an hour, sixteen at a time over one at a time, in turn."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        save_model(tiny.model(), tiny.processor(), Path(place) / "model", {"slots": 4, "control_tokens": "outside"})
        model, processor = load_model(Path(place) / "model", "cpu", "float32", ValrForConditionalGeneration)
        prompts = [([tiny.image(number % 2)], tiny.QUESTION) for number in range(16)]

        def seconds(batch: int) -> float:
            started = time.monotonic()
            for start in range(0, len(prompts), batch):
                asked = prompts[start : start + batch]
                generate_answers(model, processor, asked, max_new_tokens=48, max_segments=3, force_first_latent=True)
            return time.monotonic() - started

        seconds(16)
        ratios = [seconds(1) / seconds(16) for _ in range(5)]
        yield row("answers_batch", ratios, "ratio", 3.0, "items a minute at batch 16 over batch 1", better="higher")


def page() -> Iterator[Row]:
    """The report of four models on 1,000 items."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folders = []
        for name in ("scores_base", "scores_sft", "scores_valr_s", "scores_valr_m"):
            at = context(name, root, batch_size=64)
            score_model(at, [benchmark(1000)], replace(answerer(truthful), name=name))
            folders.append(at.out)
        seconds = []
        for _ in range(5):
            started = time.monotonic()
            report.write_page(folders, root / "page.html")
            seconds.append(time.monotonic() - started)
        yield row("report_page", seconds, "s", 3.0, "the report page of four models on 1,000 items")
