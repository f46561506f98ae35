"""The stages `scores_*`: ask a model every test question, and score what it said.

In: a model folder and the sources; every jsonl source is a benchmark.
Out: `predictions.jsonl` (one line an item, raw and isolated text side by side), `scores.json` (per benchmark accuracy
with its interval, the majority answer, what the latents did) with the budget it was reached under, and the images of
a few items for people to read.
Always: asking and judging are separate; an answer is on the disk before the next batch is asked, so a killed run goes
on where it stopped and no item is asked twice or lost; scores reached under different budgets can't be compared.
This module needs torch only where `open_answerer` is called, so that existing predictions can be judged without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import PIL.Image

from valr_ops.data.sources import read_source
from valr_ops.evaluation.answers import ISOLATION, examples, isolate
from valr_ops.evaluation.benchmarks import Benchmark, BenchmarkError, Item
from valr_ops.evaluation.benchmarks.jsonl import JsonlBenchmark
from valr_ops.evaluation.statistics import majority_answer, wilson_interval
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import Check, StageContext, StageReport, directory_digest
from valr_ops.store.progress import Progress

PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"
EXAMPLES = "examples.json"
_THUMBNAIL_PIXELS = 320

Prompt = tuple[list[PIL.Image.Image], str]
Question = tuple[Benchmark, Item]


class BudgetError(ValueError):
    """Scores reached under different budgets were to be compared: the message names the field that differs."""


class PredictionsError(ValueError):
    """A predictions file that does not hold exactly one line for every item: which ids, where, and what to do."""


class Generated(Protocol):
    """What is kept of one generated answer."""

    @property
    def text(self) -> str: ...
    @property
    def segments(self) -> int: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def latent_steps(self) -> int: ...
    @property
    def finish_reason(self) -> str: ...


@dataclass(frozen=True)
class Budget:
    """What a score was allowed; two scores are comparable only if these agree."""

    isolation: str
    """Rule that reads the answer out of the text."""
    prompt: str
    """Digest of the rendered prompt around an empty question."""
    engine: str
    """What generates."""
    precision: str
    decoding: str
    max_new_tokens: int
    """Text and control tokens; slots are not counted."""
    max_segments: int
    force_first_latent: bool
    min_pixels: int
    max_pixels: int
    """Bounds on an image's pixels."""
    seed: int
    slots: int
    """Slots fed in a segment, 0 for a model without latents. The one field in which models differ by design."""
    latent_settle: float | None = None
    """Cosine of successive latents from which a segment ended early; None where it always had all its slots."""

    def require_comparable(self, other: Budget, names: tuple[str, str]) -> None:
        """Raise `BudgetError` unless the two budgets agree in everything but `slots`."""
        first, second = asdict(self), asdict(other)
        different = [
            f"{field} is {first[field]!r} for {names[0]} and {second[field]!r} for {names[1]}"
            for field in first
            if field != "slots" and first[field] != second[field]
        ]
        if different:
            raise BudgetError(
                f"{names[0]} and {names[1]} were scored under different budgets: {'; '.join(different)}. "
                "Score both again with the same evaluation settings"
            )


@dataclass(frozen=True)
class Answerer:
    """A model ready to answer."""

    artifact: str
    """Name of the stage that made it."""
    generate: Callable[[list[Prompt]], Sequence[Generated]]
    """One answer a prompt, in order."""
    budget: Budget
    digest: str
    """Of the model's folder."""


@dataclass(frozen=True)
class Prediction:
    """What a model said to one item, not yet judged."""

    benchmark: str
    id: str
    output: str
    segments: int
    text_tokens: int
    latent_steps: int
    finish_reason: str


def build_scores(context: StageContext) -> StageReport:
    """Stage `scores_*`: the model is the input that is not `sources`.

    Raises:
        BenchmarkError: no source has test items.
        PredictionsError: the answers of an earlier, killed run do not belong to these items.
    """
    name, folder = next((name, folder) for name, folder in context.inputs.items() if name != "sources")
    benchmarks = open_benchmarks(context.recipe, context.inputs["sources"])
    context.progress.say(
        f"asking {name}: " + ", ".join(f"{len(one.items())} items of {one.name}" for one in benchmarks)
    )
    return score_model(context, benchmarks, open_answerer(name, folder, context.recipe))


def score_model(context: StageContext, benchmarks: Sequence[Benchmark], answerer: Answerer) -> StageReport:
    """Ask, judge and write the artifact; the part of the stage that is the same for every kind of model."""
    questions = [(benchmark, item) for benchmark in benchmarks for item in benchmark.items()]
    batch_size = context.recipe.evaluation.batch_size
    key = _digest([answerer.digest, asdict(answerer.budget), _items_digest(questions), batch_size])
    journal = context.work / f"answers-{key}.jsonl"

    done = answers_so_far(journal, questions, batch_size)
    started = time.monotonic()
    predictions = ask(questions, done, answerer, journal, batch_size, context.progress)
    seconds = time.monotonic() - started

    rows = judge(questions, predictions)
    confidence = context.recipe.evaluation.confidence
    scores: dict[str, Any] = {
        "budget": asdict(answerer.budget),
        "confidence": confidence,
        "model": {"artifact": answerer.artifact, "digest": answerer.digest},
        "benchmarks": {
            one.name: summarise(one, [row for row in rows if row["benchmark"] == one.name], confidence)
            for one in benchmarks
        },
    }
    _write_lines(context.out / PREDICTIONS, rows)
    _write_json(context.out / SCORES, scores)
    _write_examples(context.out, questions, rows)

    summary: dict[str, int | float | str] = {"items": len(rows), "unresolved": sum(not row["resolved"] for row in rows)}
    for name, score in scores["benchmarks"].items():
        summary |= {
            f"accuracy_{name}": score["accuracy"],
            f"accuracy_low_{name}": score["interval"][0],
            f"accuracy_high_{name}": score["interval"][1],
            f"majority_{name}": score["majority"]["accuracy"],
            f"latent_trigger_rate_{name}": score["latent_trigger_rate"],
        }
    timings = {"generation_seconds": seconds}
    if len(rows) > len(done):
        timings["items_per_second"] = (len(rows) - len(done)) / seconds
    return StageReport(
        summary=summary,
        tables={"scores": scores_markdown(scores), "items, worst first": items_markdown(examples(rows))},
        checks=(every_item_answered(context.out, questions),),
        timings=timings,
    )


def open_benchmarks(recipe: Recipe, sources: Path) -> list[Benchmark]:
    """A benchmark for every jsonl source that has a test split, in the order of the recipe.

    Raises:
        BenchmarkError: no source has a test split, or one has a test split without a usable record.
    """
    names = [name for name, source in recipe.data.sources.items() if source.format == "jsonl"]
    records = {name: list(read_source(name, recipe, sources, "test")) for name in names}
    limit = recipe.evaluation.limit
    benchmarks: list[Benchmark] = [JsonlBenchmark(name, found, limit) for name, found in records.items() if found]
    if not benchmarks:
        raise BenchmarkError(
            f"no source has test items: data.sources has {sorted(recipe.data.sources)}, in the format jsonl "
            f"{names or 'none'}. Put a test.jsonl beside train.jsonl, or add a source that has one: "
            "data.sources.mine.format=jsonl and data.sources.mine.path=FOLDER"
        )
    return benchmarks


def open_answerer(name: str, folder: Path, recipe: Recipe) -> Answerer:
    """The model in `folder`, made by the stage `name`, answering greedily.

    It uses latents exactly if its config says how many slots a segment has.
    """
    import torch

    from valr_ops.data.rewriting import prompt_messages
    from valr_ops.model.answering import generate_answers
    from valr_ops.model.decoding import ValrForConditionalGeneration, fed_slots
    from valr_ops.model.qwen import load_model

    torch.set_num_threads(recipe.runtime.threads)
    torch.manual_seed(recipe.seed)
    precision = "bfloat16" if recipe.runtime.device == "cuda" else "float32"
    model, processor = load_model(folder, recipe.runtime.device, precision, ValrForConditionalGeneration)
    slots = fed_slots(model.config)
    limits = recipe.evaluation
    prompt = processor.apply_chat_template(prompt_messages("", 1), add_generation_prompt=True, tokenize=False)
    size = processor.image_processor.size

    def generate(prompts: list[Prompt]) -> Sequence[Generated]:
        return generate_answers(
            model,
            processor,
            prompts,
            max_new_tokens=limits.max_new_tokens,
            max_segments=limits.max_segments,
            force_first_latent=limits.force_first_latent,
            settle=limits.latent_settle,
        )

    budget = Budget(
        isolation=ISOLATION,
        prompt=_digest(prompt),
        engine="valr_ops",
        precision=precision,
        decoding="greedy",
        max_new_tokens=limits.max_new_tokens,
        max_segments=limits.max_segments,
        force_first_latent=limits.force_first_latent,
        min_pixels=int(size["shortest_edge"]),
        max_pixels=int(size["longest_edge"]),
        seed=recipe.seed,
        slots=slots,
        latent_settle=limits.latent_settle,
    )
    return Answerer(name, generate, budget, directory_digest(folder))


def answers_so_far(journal: Path, questions: Sequence[Question], batch_size: int) -> list[Prediction]:
    """Answers that an earlier, killed run left in `journal`, whole batches only; the rest is cut off the file.

    Batches are always cut from the whole list of questions, so an item is answered beside the same neighbours whether
    or not a run was killed.

    Raises:
        PredictionsError: `journal` answers other questions.
    """
    if not journal.exists():
        return []
    lines = [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    count = len(lines) if len(lines) == len(questions) else len(lines) // batch_size * batch_size
    predictions = [Prediction(**json.loads(line)) for line in lines[:count]]
    if len(lines) > len(questions):
        raise PredictionsError(
            f"{journal.name} has {len(lines)} answers to {len(questions)} items; remove the file and run again"
        )
    for number, (prediction, (_, item)) in enumerate(zip(predictions, questions, strict=False), start=1):
        if (prediction.benchmark, prediction.id) != (item.benchmark, item.id):
            raise PredictionsError(
                f"{journal.name}, line {number} answers {prediction.id} of {prediction.benchmark}, but item {number} "
                f"is {item.id} of {item.benchmark}; remove the file and run again"
            )
    os.truncate(journal, sum(len(line) for line in lines[:count]))
    return predictions


def ask(
    questions: Sequence[Question],
    done: Sequence[Prediction],
    answerer: Answerer,
    journal: Path,
    batch_size: int,
    progress: Progress,
) -> list[Prediction]:
    """One prediction for every question, in order.

    `done` are the predictions of the first questions; the others are asked, and each batch is on the disk in
    `journal` before the next one begins.
    """

    def answered() -> Iterator[Prediction]:
        with journal.open("ab") as file:
            for start in range(len(done), len(questions), batch_size):
                batch = questions[start : start + batch_size]
                answers = answerer.generate([benchmark.prompt(item) for benchmark, item in batch])
                fresh = [_prediction(item, answer) for (_, item), answer in zip(batch, answers, strict=True)]
                file.write("".join(_line(asdict(one)) for one in fresh).encode())
                file.flush()
                os.fsync(file.fileno())
                yield from fresh

    return [*done, *progress.track(answered(), "answers", total=len(questions), done=len(done))]


def judge(questions: Sequence[Question], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """The rows of `predictions.jsonl`, in the order of `questions`; needs no model.

    An answer that the token limit cut off counts as wrong and unresolved: its last word may be half a word.

    Raises:
        PredictionsError: an item without a prediction, or with two, or a prediction for no item.
    """
    of_item = {(one.benchmark, one.id): one for one in predictions}
    asked = {(item.benchmark, item.id) for _, item in questions}
    if len(of_item) != len(predictions) or of_item.keys() != asked:
        twice = [key for key, count in Counter((one.benchmark, one.id) for one in predictions).items() if count > 1]
        raise PredictionsError(
            f"predictions do not match the {len(asked)} items: missing {_some(asked - of_item.keys())}, "
            f"for no item {_some(of_item.keys() - asked)}, twice {_some(twice)}; generate them again"
        )
    rows = []
    for benchmark, item in questions:
        prediction = of_item[item.benchmark, item.id]
        isolated = isolate(prediction.output)
        verdict = benchmark.score(item, isolated.text)
        whole = prediction.finish_reason == "stop"
        rows.append(
            asdict(prediction)
            | {
                "question": item.question,
                "gold": item.gold,
                "isolated": isolated.text,
                "isolation_rule": isolated.rule,
                "answer_found": isolated.answer_found,
                "unclosed_reasoning": isolated.unclosed_reasoning,
                "correct": verdict.correct and whole,
                "resolved": verdict.resolved and whole,
            }
        )
    return rows


def summarise(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    """The entry of one benchmark in `scores.json`; shares are in [0, 1], rounded to six digits."""
    n, correct = len(rows), sum(row["correct"] for row in rows)
    constant, share = majority_answer([benchmark.constant_answer(item) for item in benchmark.items()])
    # Shown in the words of the data: `true`, where the rules compare truth values.
    golds = [item.gold for item in benchmark.items() if benchmark.constant_answer(item) == constant]
    answer, _ = majority_answer(golds)
    return {
        "n": n,
        "correct": correct,
        "accuracy": round(correct / n, 6),
        "interval": [round(end, 6) for end in wilson_interval(correct, n, confidence)],
        "majority": {"answer": answer, "accuracy": round(share, 6)},
        "latent_trigger_rate": round(sum(row["segments"] > 0 for row in rows) / n, 6),
        "mean_segments": round(sum(row["segments"] for row in rows) / n, 6),
        "mean_text_tokens": round(sum(row["text_tokens"] for row in rows) / n, 6),
        "mean_latent_steps": round(sum(row["latent_steps"] for row in rows) / n, 6),
        "unresolved": sum(not row["resolved"] for row in rows),
        "cut_off": sum(row["finish_reason"] != "stop" for row in rows),
        "rejected": dict(sorted(Counter(one.reason for one in benchmark.rejections).items())),
        "items": _items_digest([(benchmark, item) for item in benchmark.items()]),
    }


def read_scores(folder: Path) -> dict[str, Any]:
    """`scores.json` of a scores artifact."""
    return json.loads((folder / SCORES).read_text(encoding="utf-8"))


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The rows of a scores artifact.

    Raises:
        PredictionsError: a row twice, or more or fewer rows than `scores.json` counts.
    """
    rows = _read_lines(folder / PREDICTIONS)
    counted = {name: score["n"] for name, score in read_scores(folder)["benchmarks"].items()}
    distinct = Counter(name for name, _ in {(row["benchmark"], row["id"]) for row in rows})
    if distinct != counted or len(rows) != sum(counted.values()):
        raise PredictionsError(
            f"{folder.name}/{PREDICTIONS} has {len(rows)} rows for {sum(distinct.values())} items, but {SCORES} counts "
            f"{counted}; run the stage {folder.name} again"
        )
    return rows


def every_item_answered(folder: Path, questions: Sequence[Question]) -> Check:
    """Blocking expectation: the written file has one row for every item and no other."""
    asked = Counter((item.benchmark, item.id) for _, item in questions)
    rows = _read_lines(folder / PREDICTIONS)
    written = Counter((row["benchmark"], row["id"]) for row in rows)
    missing, foreign = asked - written, written - asked
    detail = f"{len(rows)} answers to {len(questions)} items"
    if missing or foreign:
        detail += f"; missing: {_some(missing)}, twice or foreign: {_some(foreign)}. Run the stage again"
    counts = {"items": len(questions), "answers": len(rows)}
    return Check("every_item_answered", not missing and not foreign, detail, counts)


def scores_markdown(scores: Mapping[str, Any]) -> str:
    """One line a benchmark."""
    lines = ["| benchmark | n | accuracy | interval | majority | unresolved | latents | rejected |"]
    lines.append("| --- | ---: | ---: | --- | --- | ---: | ---: | ---: |")
    for name, score in scores["benchmarks"].items():
        low, high = score["interval"]
        lines.append(
            f"| {name} | {score['n']} | {score['accuracy']:.1%} | {low:.1%} to {high:.1%} "
            f"| {score['majority']['accuracy']:.1%} ({_cell(score['majority']['answer'])}) | {score['unresolved']} "
            f"| {score['latent_trigger_rate']:.1%} | {sum(score['rejected'].values())} |"
        )
    return "\n".join(lines)


def items_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line an item."""
    lines = ["| item | question | gold | answer | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        verdict = "right" if row["correct"] else "wrong" if row["resolved"] else "unresolved"
        cells = [_cell(row[column]) for column in ("id", "question", "gold", "isolated")]
        lines.append(f"| {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def _prediction(item: Item, answer: Generated) -> Prediction:
    return Prediction(
        benchmark=item.benchmark,
        id=item.id,
        output=answer.text,
        segments=answer.segments,
        text_tokens=answer.text_tokens,
        latent_steps=answer.latent_steps,
        finish_reason=answer.finish_reason,
    )


def _write_examples(out: Path, questions: Sequence[Question], rows: Sequence[Mapping[str, Any]]) -> None:
    """`examples.json` and small copies of the images of a few items of each benchmark, worst first."""
    chosen: list[dict[str, Any]] = []
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in questions):
        items = {item.id: item for item in benchmark.items()}
        for row in examples([row for row in rows if row["benchmark"] == benchmark.name]):
            files: list[str] = []
            for image in benchmark.prompt(items[row["id"]])[0]:
                image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
                files.append(f"examples/{len(chosen):02d}-{len(files)}.png")
                (out / "examples").mkdir(exist_ok=True)
                image.save(out / files[-1], optimize=True)
            chosen.append({"benchmark": benchmark.name, "id": row["id"], "images": files})
    _write_json(out / EXAMPLES, chosen)


def _items_digest(questions: Sequence[Question]) -> str:
    return _digest(
        [[item.benchmark, item.id, item.question, item.gold, [i.digest for i in item.images]] for _, item in questions]
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n"


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(map(_line, rows)), encoding="utf-8")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    # Not str.splitlines: it also splits at line separators that stand inside a JSON string.
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _cell(text: str, longest: int = 160) -> str:
    shown = " ".join(text.split()).replace("|", "\\|")
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _some(keys: Iterable[tuple[str, str]]) -> str:
    named = [f"{at} of {benchmark}" for benchmark, at in sorted(keys)]
    return (", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")) or "none"
