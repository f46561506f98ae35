"""Speed of the data path: from raw rows to a written corpus, images, and random access to it.

In: rows that are generated here, images by reference. Out: rows for perf/results.json.
The baseline is what one types first: `datasets.load_dataset`, `map`, `filter` and `to_parquet`, with this project's own
reader as the function that is mapped, so that both check the same things.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from perf.commands import peak_memory
from perf.rows import CHECKOUT, Row, row

SIZES = (10_000, 50_000, 450_000)
_IMAGES = 2_000
_PHOTOS = 6_000
_WORDS = ("the", "red", "green", "cup", "table", "left", "right", "behind", "near", "chair", "lamp", "window", "door")


def corpus() -> Iterator[Row]:
    """Raw JSON to a written corpus, for three sizes; the largest against `datasets` in the same run."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images(root / "images")
        rates = {}
        for size in SIZES:
            source = root / f"source{size}"
            generate(source, size, root / "images")
            runs = 5 if size < SIZES[-1] else 2
            seconds, gibibytes = [], []
            for _ in range(runs):
                with peak_memory(0.2) as peak:
                    seconds.append(_build(source, root / "built"))
                gibibytes.append(peak[0] / 2**30)
            rates[size] = [size / one for one in seconds]
            goal = 120.0 if size == SIZES[-1] else None
            what = f"cot_corpus over {size:,} rows of JSON with images by reference, checks and report included"
            yield row(f"corpus_{size}_seconds", seconds, "s", goal, what)
            goal = 1.5 if size == SIZES[-1] else None
            yield row(f"corpus_{size}_gibibytes", gibibytes, "GiB", goal, "its largest memory, all processes (PSS)")
        first, last = (sum(rates[size]) / len(rates[size]) for size in (SIZES[1], SIZES[-1]))
        what = f"rows a second at {SIZES[-1]:,} rows over those at {SIZES[1]:,}: 1 is linear"
        yield row("corpus_linearity", [last / first], "ratio", 0.8, what, better="higher")
        yield from _against_datasets(root, SIZES[-1])
        yield from _access(root / "built" / "cot_corpus")


def decoding() -> Iterator[Row]:
    """Reading, decoding and hashing images by one process and by as many as there are cores."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = root / "source"
        (source / "images").mkdir(parents=True)
        photos = _photos()
        lines = []
        for number in range(_PHOTOS):
            # Other bytes behind the end of the picture make it another file, which has to be decoded anew.
            photo = photos[number % len(photos)] + number.to_bytes(4, "little")
            (source / "images" / f"{number}.jpg").write_bytes(photo)
            lines.append(json.dumps({**_record(number, random.Random(number)), "images": [f"images/{number}.jpg"]}))
        (source / "train.jsonl").write_text("\n".join(lines) + "\n")
        cores = os.cpu_count() or 1
        rates: dict[int, list[float]] = {1: [], cores: []}
        for _ in range(5):
            for processes in rates:
                rates[processes].append(_PHOTOS / _draft(source, root / "drafts", processes))
        yield row("images_per_second", rates[cores], "1/s", None, f"640x480 JPEG, {cores} processes", better="higher")
        ratios = [many / one for one, many in zip(rates[1], rates[cores], strict=True)]
        what = f"images a second with {cores} processes over one, start of the processes included"
        yield row("images_scaling", ratios, "ratio", 0.8 * cores, what, better="higher")


def _photos() -> list[bytes]:
    """JPEGs of 640 x 480 pixels with structure everywhere."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(200):
        noise = PIL.Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.resize((640, 480), PIL.Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        encoded.append(file.getvalue())
    return encoded


def images(folder: Path) -> None:
    """Small pictures that rows refer to."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(_IMAGES):
        cells = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(cells).resize((64, 64), PIL.Image.Resampling.NEAREST).save(folder / f"{number}.png")


def generate(folder: Path, count: int, pictures: Path) -> None:
    """A source in our JSONL format: one row in a hundred a duplicate, one in two hundred broken."""
    folder.mkdir()
    shutil.copytree(pictures, folder / "images", copy_function=os.link)
    rng = random.Random(0)
    before: dict[str, Any] = {}
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            one = _record(number, rng)
            if number % 100 == 7:
                one = {**before, "id": one["id"]}
            if number % 200 == 9:
                one["answer"] = ""
            file.write(json.dumps(one) + "\n")
            before = one


def _record(number: int, rng: random.Random) -> dict[str, Any]:
    def words(count: int) -> str:
        return " ".join(rng.choices(_WORDS, k=count))

    steps = [
        {"text": f"{words(15)}.", "image": 0, "box": [0, 0, rng.randint(16, 64), rng.randint(16, 64)]}
        for _ in range(rng.randint(1, 4))
    ]
    return {
        "id": f"r{number}",
        "license": "CC-BY-4.0",
        "images": [f"images/{rng.randrange(_IMAGES)}.png"],
        "question": f"{words(12)}?",
        "steps": steps,
        "answer": rng.choice(_WORDS),
    }


def _build(source: Path, root: Path) -> float:
    """Seconds of the stage in a process of its own, imports included, as `valr run` has them."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    return _timed("build", source, root)


def _draft(source: Path, root: Path, processes: int) -> float:
    shutil.rmtree(root, ignore_errors=True)
    return _timed("draft", source, root, str(processes))


def _timed(*words: str | Path) -> float:
    started = time.monotonic()
    command = [sys.executable, "-m", "perf.data_job", *map(str, words)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"perf: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return time.monotonic() - started


def _against_datasets(root: Path, size: int) -> Iterator[Row]:
    source = root / f"source{size}"
    seconds: dict[str, list[float]] = {"stage": [], "write": [], "plain": [], "parallel": []}
    for _ in range(3):
        seconds["stage"].append(_build(source, root / "built"))
        shutil.rmtree(root / "written", ignore_errors=True)
        seconds["write"].append(_timed("write", source, root / "written"))
        for name, processes in (("plain", 1), ("parallel", os.cpu_count() or 1)):
            shutil.rmtree(root / "theirs", ignore_errors=True)
            seconds[name].append(_timed("datasets", source, root / "theirs", str(processes)))
    work = f"{size:,} rows read, checked, deduplicated and written"

    def over(theirs: str, ours: str) -> list[float]:
        return [other / own for own, other in zip(seconds[ours], seconds[theirs], strict=True)]

    what = f"seconds of a plain datasets pipeline over ours, {work}"
    yield row("corpus_over_datasets", over("plain", "write"), "ratio", 4.0, what, better="higher")
    what = f"the same against its num_proc={os.cpu_count()}"
    yield row("corpus_over_datasets_parallel", over("parallel", "write"), "ratio", None, what, better="higher")
    what = "the plain pipeline over our whole stage, which also finds near duplicates, checks expectations and reports"
    yield row("corpus_stage_over_datasets", over("plain", "stage"), "ratio", None, what, better="higher")


def _access(corpus: Path) -> Iterator[Row]:
    """Opening the corpus and reading one record, in a new process each time, imports left out."""
    milliseconds = []
    for number in range(20):
        command = [sys.executable, "-m", "perf.data_job", "access", str(corpus), str(number)]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        milliseconds.append(float(done.stdout))
    what = "opening the corpus and reading one record at a random place, a new process each time"
    yield row("record_cold_milliseconds", milliseconds, "ms", 5.0, what)
