"""A small benchmark and a model that is a plain function, for tests of asking, scoring and reporting."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image

from valr_ops.data.images import ImageLimits
from valr_ops.data.records import Image, Record, Rejection
from valr_ops.evaluation.models import Answerer, Budget, Prompt, Said
from valr_ops.evaluation.questions import Benchmark, Showing, benchmark_of_records
from valr_ops.evaluation.run import score_model
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe, override
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.store.progress import Progress

BUDGET = Budget(
    isolation="iso-1",
    prompt="0" * 16,
    engine="transformers",
    precision="float32",
    decoding="greedy",
    max_new_tokens=64,
    max_segments=8,
    force_first_latent=False,
    min_pixels=256,
    max_pixels=4096,
    frames=4,
    seed=0,
    slots=0,
)


SHOWING = Showing(ImageLimits(8, 1_000_000), 4, Path("no frames are kept"))


def said(
    text: str, segments: int = 0, text_tokens: int = 6, latent_steps: int = 0, finish_reason: str = "stop"
) -> Said:
    """One answer of the function that stands for a model."""
    return Said(text, text_tokens, finish_reason, segments, latent_steps)


def picture(colour: str, role: Any = "input") -> Image:
    """An encoded square of 24 pixels a side."""
    encoded = io.BytesIO()
    PIL.Image.new("RGB", (24, 24), colour).save(encoded, "PNG")
    data = encoded.getvalue()
    return Image(data, hashlib.sha256(data).hexdigest(), 24, 24, role)


def record(number: int, gold: str = "true", question: str = "Is it red?", **changes: Any) -> Record:
    """A test record of the source `mine`."""
    values = {
        "id": f"mine/{number}",
        "source": "mine",
        "license": "CC-BY-4.0",
        "split": "test",
        "kind": "single_view",
        "question": question,
        "images": (picture("red"),),
        "steps": (),
        "answer": gold,
    }
    return Record(**(values | changes))


def benchmark(count: int = 10, name: str = "mine") -> Benchmark:
    """Questions with two red images of three, so that the majority answer is true, and one rejected record."""
    colours = ["red", "red", "blue"]
    records = [
        record(
            number,
            "true" if colours[number % 3] == "red" else "false",
            question=f"Is image {number} red?",
            id=f"{name}/{number}",
            images=(picture(colours[number % 3]),),
        )
        for number in range(count)
    ]
    rejected = Rejection(f"{name}/x", name, "image_unreadable", "test.jsonl line 99")
    return benchmark_of_records(name, [*records, rejected], SHOWING)


def recipe(batch_size: int = 4) -> Recipe:
    """Scale tiny with small batches and no benchmark but the test records of sources."""
    return override(recipes.tiny(), {"evaluation.batch_size": batch_size, "evaluation.benchmarks": {}})


def context(stage: str, folder: Path, inputs: dict[str, Path] | None = None, batch_size: int = 4) -> StageContext:
    """A context whose artifact is `folder`/stage; the work folder survives between calls."""
    out, work = folder / stage, folder / "work" / stage
    for made in (out, work):
        made.mkdir(parents=True, exist_ok=True)
    return StageContext(stage, recipe(batch_size), inputs or {}, out, work, Progress())


def truthful(prompts: list[Prompt]) -> list[Said]:
    """A model that sees the colour."""
    return [
        said(f"Answer: {str(images[0].getpixel((0, 0)) == (255, 0, 0)).lower()}<|im_end|>") for images, _ in prompts
    ]


def answerer(generate: Callable[[list[Prompt]], Sequence[Said]] = truthful, **budget: object) -> Answerer:
    """A model for `score_model`."""
    return Answerer("stage", generate, replace(BUDGET, **budget), "digest")  # type: ignore[arg-type]


def scored(
    folder: Path, stage: str, right: Callable[[int], bool], slots: int = 0, count: int = 60, **budget: object
) -> tuple[Path, StageReport]:
    """A scores artifact of a model that is right on the items `right` picks, and the stage's report."""

    def generate(prompts: list[Prompt]) -> list[Said]:
        answers = []
        for (_, question), honest in zip(prompts, truthful(prompts), strict=True):
            truth = "true" if "true" in honest.text else "false"
            answer = truth if right(int(question.split()[2])) else {"true": "false", "false": "true"}[truth]
            segment = f"<latent>{'<|latent_pad|>' * slots}</latent>" if slots else ""
            text = f"{segment}the image is <b>seen</b>.\nAnswer: {answer}<|im_end|>"
            answers.append(said(text, segments=int(slots > 0), latent_steps=slots))
        return answers

    at = context(stage, folder, batch_size=16)
    report = score_model(at, [benchmark(count)], answerer(generate, slots=slots, **budget))
    return at.out, report
