"""The stages `scores_*`: ask a model every question, and score what it said.

In: a model, and benchmarks: drawn or in the user's folders, and the test records of every jsonl source.
Out: `predictions.jsonl` (one line an item, raw and isolated text side by side), `scores.json` (per benchmark the score
with its interval, the totals of its profile, the majority answer, what the latents did) with the budget it was reached
under, and the images of a few items for people to read.
Always: asking and scoring are separate; an answer is on the disk before the next batch is asked, so a killed run goes
on where it stopped and no item is asked twice or lost; an item that was not answered is never scored as if it were.
This module needs torch only where a model is opened, so that existing answers can be scored without it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from valr_ops.data.records import BadRecord
from valr_ops.data.sources import read_source
from valr_ops.evaluation.answers import Isolated, examples, isolate
from valr_ops.evaluation.benchmarks import BenchmarkError, Item
from valr_ops.evaluation.choices import read_leniently
from valr_ops.evaluation.models import Answerer, Said, digest, open_answerer
from valr_ops.evaluation.questions import Benchmark, Showing, benchmark_of_recipe, benchmark_of_records
from valr_ops.evaluation.scoring import JUDGED_BY, Case, Judge, Scored, score
from valr_ops.evaluation.statistics import majority_answer, score_interval
from valr_ops.store.artifacts import Check, StageContext, StageReport
from valr_ops.store.progress import Progress

PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"
EXAMPLES = "examples.json"
_THUMBNAIL_PIXELS = 320
_MOST_PICTURES = 8
"""Of an item, in the examples."""

Question = tuple[Benchmark, Item]


class PredictionsError(ValueError):
    """Answers that do not belong to the items, one for each: which ids, where, and what to do."""


class UnansweredError(RuntimeError):
    """Items that got no answer; those that did are on the disk, and the same command asks the others again."""

    exit_status = 75


@dataclass(frozen=True)
class Prediction:
    """What a model said to one item, not yet scored: a line of a journal."""

    benchmark: str
    id: str
    output: str
    segments: int
    text_tokens: int
    latent_steps: int
    finish_reason: str
    seconds: float = 0.0
    error: str = ""
    """Why there is no answer."""
    shown: bool = True
    """False where the item could not be shown: its picture is damaged, and asking again does not help."""

    @property
    def answered(self) -> bool:
        """Whether there is nothing left to ask."""
        return not self.error or not self.shown


def build_scores(context: StageContext) -> StageReport:
    """Stage `scores_*`: the model is the input that is neither `sources` nor `benchmarks`.

    Raises:
        BenchmarkError: nothing to ask, or a benchmark that is not whole.
        PredictionsError: the answers of an earlier, killed run do not belong to these items.
        UnansweredError: an endpoint left items unanswered.
    """
    name, folder = next((name, at) for name, at in context.inputs.items() if name not in ("sources", "benchmarks"))
    benchmarks = open_benchmarks(context)
    context.progress.say(f"asking {name}: " + ", ".join(f"{len(one.items)} items of {one.name}" for one in benchmarks))
    return score_model(context, benchmarks, open_answerer(name, folder, context.recipe))


def score_model(context: StageContext, benchmarks: Sequence[Benchmark], answerer: Answerer) -> StageReport:
    """Ask, score and write the artifact; the part of the stage that is the same for every kind of model."""
    questions = [(benchmark, item) for benchmark in benchmarks for item in benchmark.items]
    batch_size = context.recipe.evaluation.batch_size
    revisions = [(one.name, one.revision, len(one.items)) for one in benchmarks]
    key = digest([answerer.digest, asdict(answerer.budget), revisions, batch_size])
    journal = context.work / f"answers-{key}.jsonl"

    done = answers_so_far(journal, questions)
    started = time.monotonic()
    predictions = ask(questions, done, answerer, journal, batch_size, context.progress)
    seconds = time.monotonic() - started
    require_answers(predictions)
    report = write_scores(context.out, benchmarks, predictions, answerer, context.recipe.evaluation.confidence)
    timings = {"generation_seconds": seconds}
    if len(predictions) > len(done):
        timings["items_per_second"] = (len(predictions) - len(done)) / seconds
    return StageReport(
        summary=report.summary,
        tables=report.tables,
        checks=(every_item_answered(context.out, questions),),
        timings=timings,
    )


def write_scores(
    out: Path,
    benchmarks: Sequence[Benchmark],
    predictions: Sequence[Prediction],
    answerer: Answerer,
    confidence: float,
    judge: Judge | None = None,
) -> StageReport:
    """Score `predictions` and write the files of a scores artifact into `out`; the model is not needed."""
    questions = [(benchmark, item) for benchmark in benchmarks for item in benchmark.items]
    rows = scored_rows(questions, predictions, judge)
    of_benchmark = {one.name: [row for row in rows if row["benchmark"] == one.name] for one in benchmarks}
    scores: dict[str, Any] = {
        "budget": asdict(answerer.budget),
        "confidence": confidence,
        "model": {"artifact": answerer.name, "digest": answerer.digest},
        "benchmarks": {one.name: summarise(one, of_benchmark[one.name], confidence) for one in benchmarks},
    }
    if judge:
        for found in scores["benchmarks"].values():
            found["profile"] += f"{JUDGED_BY}{judge.model}"
    _write_lines(out / PREDICTIONS, rows)
    _write_json(out / SCORES, scores)
    _write_examples(out, questions, rows)

    asked = [row for row in rows if row["status"] != "rejected"]
    summary: dict[str, int | float | str] = {
        "items": len(asked),
        "unresolved": sum(not row["resolved"] for row in asked),
    }
    for name, found in scores["benchmarks"].items():
        summary |= {
            f"accuracy_{name}": found["accuracy"],
            f"accuracy_low_{name}": found["interval"][0],
            f"accuracy_high_{name}": found["interval"][1],
            f"majority_{name}": found["majority"]["accuracy"],
            f"latent_trigger_rate_{name}": found["latent_trigger_rate"],
            f"format_misses_{name}": found["format_misses"],
        }
    tables = {"scores": scores_markdown(scores), "items, worst first": items_markdown(examples(asked))}
    return StageReport(summary=summary, tables=tables)


def open_benchmarks(context: StageContext) -> list[Benchmark]:
    """A benchmark for every jsonl source that has a test split, and those of the recipe, in the order of the recipe.

    Raises:
        BenchmarkError: nothing to ask, or a benchmark that is not whole.
    """
    recipe = context.recipe
    showing = Showing.of(context)
    sources = [name for name, source in recipe.data.sources.items() if source.format == "jsonl"]
    found: list[Benchmark] = []
    for name in sources:
        records = list(read_source(name, recipe, context.inputs["sources"], "test"))
        if records:
            drawn = recipe.data.sources[name].path is None
            found.append(benchmark_of_records(name, records, showing, recipe.evaluation.limit, drawn))
    found += [
        benchmark_of_recipe(name, recipe, context.inputs["benchmarks"], showing, recipe.evaluation.limit)
        for name in recipe.evaluation.benchmarks
    ]
    if not found:
        raise BenchmarkError(
            f"nothing to ask: data.sources has {sorted(recipe.data.sources)}, in the format jsonl "
            f"{sources or 'none'} and without test items, and evaluation.benchmarks is empty. Put a test.jsonl beside "
            "train.jsonl, or name a benchmark: evaluation.benchmarks.vsi_bench.path=FOLDER"
        )
    twice = [name for name, count in Counter(one.name for one in found).items() if count > 1]
    if twice:
        raise BenchmarkError(f"evaluation.benchmarks.{twice[0]} has the name of a source; give it another one")
    return found


def answers_so_far(journal: Path, questions: Sequence[Question]) -> dict[tuple[str, str], Prediction]:
    """Answers that an earlier run left in `journal`, the last one of each item; a torn last line is cut off the file.

    Raises:
        PredictionsError: `journal` answers other questions.
    """
    if not journal.exists():
        return {}
    lines = [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    asked = {(item.benchmark, item.id) for _, item in questions}
    found: dict[tuple[str, str], Prediction] = {}
    for number, line in enumerate(lines, start=1):
        try:
            prediction = Prediction(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise PredictionsError(
                f"{journal.name}, line {number} is no answer ({error}); remove the line, or the file, and run again"
            ) from None
        if (prediction.benchmark, prediction.id) not in asked:
            raise PredictionsError(
                f"{journal.name}, line {number} answers {prediction.id} of {prediction.benchmark}, which is none of "
                f"the {len(questions)} items; remove the file and run again"
            )
        if prediction.answered:
            found[prediction.benchmark, prediction.id] = prediction
    os.truncate(journal, sum(len(line) for line in lines))
    return found


def ask(
    questions: Sequence[Question],
    done: Mapping[tuple[str, str], Prediction],
    answerer: Answerer,
    journal: Path,
    batch_size: int,
    progress: Progress,
) -> list[Prediction]:
    """One prediction for every question, in order.

    Batches are cut from the whole list of questions, and one with an item that is not in `done` is asked again as a
    whole, unless the model answers every item apart: so an item is answered beside the same neighbours whether or not a
    run was killed. Each batch is on the disk in `journal` before the next one begins.
    """

    def answered() -> Iterator[Prediction]:
        with journal.open("ab") as file:
            for start in range(0, len(questions), batch_size):
                batch = questions[start : start + batch_size]
                missing = [one for one in batch if (one[1].benchmark, one[1].id) not in done]
                if not missing:
                    continue
                fresh = _ask_batch(missing if answerer.apart else batch, answerer)
                file.write("".join(_line(asdict(one)) for one in fresh).encode())
                file.flush()
                os.fsync(file.fileno())
                yield from (one for one in fresh if (one.benchmark, one.id) not in done)

    fresh = {
        (one.benchmark, one.id): one
        for one in progress.track(answered(), "answers", total=len(questions), done=len(done))
    }
    # An answer that is in both is the same one.
    return [(dict(done) | fresh)[item.benchmark, item.id] for _, item in questions]


def _ask_batch(batch: Sequence[Question], answerer: Answerer) -> list[Prediction]:
    prompts, damaged = [], {}
    for number, (benchmark, item) in enumerate(batch):
        try:
            prompts.append(benchmark.prompt(item))
        except BadRecord as error:
            damaged[number] = f"{error.reason}: {error.detail}"
    said = iter(answerer.generate(prompts) if prompts else ())
    return [
        _prediction(item, Said("", 0, "error", error=damaged[number]), shown=False)
        if number in damaged
        else _prediction(item, next(said))
        for number, (_, item) in enumerate(batch)
    ]


def require_answers(predictions: Sequence[Prediction]) -> None:
    """Raise `UnansweredError` if an item was shown and not answered."""
    missing = [one for one in predictions if not one.answered]
    if missing:
        reasons = ", ".join(f"{n} x {why}" for why, n in Counter(one.error for one in missing).most_common(3))
        raise UnansweredError(
            f"{len(missing)} of {len(predictions)} items got no answer ({reasons}); "
            "the others are kept, run the same command again to ask these"
        )


def scored_rows(
    questions: Sequence[Question], predictions: Sequence[Prediction], judge: Judge | None = None
) -> list[dict[str, Any]]:
    """The rows of `predictions.jsonl`, in the order of `questions`; needs no model.

    `status` is `ok`; `unresolved` where the profile could not read an answer; `cut` where the token limit came first,
    which counts as wrong because the last word may be half a word; `rejected` where the item could not be shown, which
    counts as nothing.

    Args:
        judge: a language model that settles what the profile would ask one.

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
    isolated = [isolate(of_item[item.benchmark, item.id].output) for _, item in questions]
    cases = [benchmark.case(item, one.text) for (benchmark, item), one in zip(questions, isolated, strict=True)]
    whole = [of_item[item.benchmark, item.id].finish_reason == "stop" for _, item in questions]
    return [
        _row(benchmark, item, of_item[item.benchmark, item.id], read, case, scored)
        for (benchmark, item), read, case, scored in zip(
            questions, isolated, cases, _scored(questions, cases, whole, judge), strict=True
        )
    ]


def _scored(
    questions: Sequence[Question], cases: Sequence[Case], whole: Sequence[bool], judge: Judge | None
) -> Iterator[Scored]:
    """Scores in order; neighbours of one benchmark are scored together, and a judge hears of `whole` answers only."""
    start = 0
    for benchmark, together in itertools.groupby(benchmark for benchmark, _ in questions):
        end = start + sum(1 for _ in together)
        scores = score(cases[start:end], benchmark.format, benchmark.profile)
        if judge:
            judged = [number for number in range(start, end) if whole[number]]
            settled = score([cases[number] for number in judged], benchmark.format, benchmark.profile, judge)
            for number, scored in zip(judged, settled, strict=True):
                scores[number - start] = scored
        yield from scores
        start = end


def _row(
    benchmark: Benchmark, item: Item, prediction: Prediction, isolated: Isolated, case: Case, scored: Scored
) -> dict[str, Any]:
    whole = prediction.finish_reason == "stop"
    if not whole:
        scored = Scored(0.0, scored.extracted, resolved=False)
    status = "rejected" if not prediction.shown else "cut" if not whole else "ok" if scored.resolved else "unresolved"
    share = scored.score / benchmark.full_score
    said = {name: value for name, value in asdict(prediction).items() if name not in ("seconds", "shown")}
    return said | {
        "question": item.question,
        "question_type": item.question_type,
        "cluster": item.cluster,
        "gold": item.gold,
        "options": list(item.options),
        "isolated": isolated.text,
        "isolation_rule": isolated.rule,
        "answer_found": isolated.answer_found,
        "unclosed_reasoning": isolated.unclosed_reasoning,
        "extracted": scored.extracted,
        "score": share,
        "correct": share >= 0.5,
        "resolved": scored.resolved,
        "problem": scored.problem,
        "status": status,
        "format_miss": whole and not scored.score and read_leniently(case),
        "decode_steps": prediction.text_tokens + prediction.latent_steps + 2 * prediction.segments,
    }


def summarise(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    """The entry of one benchmark in `scores.json`; shares are in [0, 1], rounded to six digits.

    `accuracy` is the mean score over items (micro), whatever the profile calls its overall figure; that one is among
    the `totals`. The interval is Wilson's where every score is 0 or 1 and every item stands by itself, else from a
    bootstrap over clusters.
    """
    asked = [row for row in rows if row["status"] != "rejected"]
    items = {item.id: item for item in benchmark.items}
    n = len(asked)
    if not n:
        raise BenchmarkError(f"benchmark {benchmark.name}: not one of its {len(rows)} items could be shown")
    values = [row["score"] for row in asked]
    clusters = [row["cluster"] for row in asked]
    interval = score_interval(values, clusters, confidence=confidence)
    comparable = [benchmark.comparable(items[row["id"]]) for row in asked]
    constant, share = majority_answer(comparable)
    # Shown in the words of the data: `true`, where the rules compare truth values.
    answer, _ = majority_answer([row["gold"] for row, one in zip(asked, comparable, strict=True) if one == constant])
    # A cut answer is unresolved for who counts answers that could not be read, and decided as wrong for the totals.
    scores = [
        Scored(row["score"] * benchmark.full_score, row["extracted"], row["resolved"] or row["status"] == "cut")
        for row in asked
    ]
    cases = [benchmark.case(items[row["id"]], row["isolated"]) for row in asked]
    rejected = Counter(rejection.reason for rejection in benchmark.rejections)
    rejected.update(row["error"].partition(":")[0] for row in rows if row["status"] == "rejected")

    def mean(field: str) -> float:
        return round(sum(row[field] for row in asked) / n, 6)

    return {
        "format": benchmark.format,
        "profile": benchmark.profile,
        "revision": benchmark.revision,
        "drawn": benchmark.drawn,
        "n": n,
        "correct": sum(row["correct"] for row in asked),
        "accuracy": mean("score"),
        "interval": [round(interval.low, 6), round(interval.high, 6)],
        "interval_method": interval.method,
        "totals": dict(benchmark.totals([items[row["id"]] for row in asked], cases, scores)),
        "majority": {"answer": answer, "accuracy": round(share, 6)},
        "latent_trigger_rate": round(sum(row["segments"] > 0 for row in asked) / n, 6),
        "mean_segments": mean("segments"),
        "mean_text_tokens": mean("text_tokens"),
        "mean_latent_steps": mean("latent_steps"),
        "unresolved": sum(not row["resolved"] for row in asked),
        "cut_off": sum(row["status"] == "cut" for row in asked),
        "format_misses": sum(row["format_miss"] for row in asked),
        "rejected": dict(sorted(rejected.items())),
        "items": _items_digest(benchmark),
    }


def read_scores(folder: Path) -> dict[str, Any]:
    """`scores.json` of a scores artifact. Raises `PredictionsError` if there is none."""
    try:
        return json.loads((folder / SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PredictionsError(f"{folder} holds no scores ({error}); give the folder of a stage scores_*") from None


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The rows of a scores artifact whose items were asked.

    Raises:
        PredictionsError: a row twice, or more or fewer rows than `scores.json` counts.
    """
    rows = [row for row in _read_lines(folder / PREDICTIONS) if row["status"] != "rejected"]
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
    rejected = sum(row["status"] == "rejected" for row in rows)
    if rejected:
        detail += f"; {rejected} of them could not be shown and count as nothing"
    counts = {"items": len(questions), "answers": len(rows) - rejected, "rejected": rejected}
    return Check("every_item_answered", not missing and not foreign, detail, counts)


def scores_markdown(scores: Mapping[str, Any]) -> str:
    """One line a benchmark."""
    lines = [
        "| benchmark | profile | n | score | interval | majority | unresolved | format misses | latents | rejected |"
    ]
    lines.append("| --- | --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |")
    for name, found in scores["benchmarks"].items():
        low, high = found["interval"]
        lines.append(
            f"| {name} | {found['profile']} | {found['n']} | {found['accuracy']:.1%} | {low:.1%} to {high:.1%} "
            f"| {found['majority']['accuracy']:.1%} ({_cell(found['majority']['answer'])}) | {found['unresolved']} "
            f"| {found['format_misses']} | {found['latent_trigger_rate']:.1%} | {sum(found['rejected'].values())} |"
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


def _prediction(item: Item, said: Said, shown: bool = True) -> Prediction:
    kept = {one.name: getattr(said, one.name) for one in fields(Said) if one.name != "text"}
    return Prediction(benchmark=item.benchmark, id=item.id, output=said.text, shown=shown, **kept)


def _write_examples(out: Path, questions: Sequence[Question], rows: Sequence[Mapping[str, Any]]) -> None:
    """`examples.json` and small copies of the images of a few items of each benchmark, worst first."""
    chosen: list[dict[str, Any]] = []
    for benchmark in {benchmark.name: benchmark for benchmark, _ in questions}.values():
        items = {item.id: item for item in benchmark.items}
        asked = [row for row in rows if row["benchmark"] == benchmark.name and row["status"] != "rejected"]
        for row in examples(asked):
            files: list[str] = []
            images = benchmark.prompt(items[row["id"]])[0]
            # Of a video, a few frames at equal distances.
            for image in images[:: math.ceil(len(images) / _MOST_PICTURES) or 1]:
                image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
                files.append(f"examples/{len(chosen):02d}-{len(files)}.png")
                (out / "examples").mkdir(exist_ok=True)
                image.save(out / files[-1], optimize=True)
            chosen.append({"benchmark": benchmark.name, "id": row["id"], "images": files})
    _write_json(out / EXAMPLES, chosen)


def _items_digest(benchmark: Benchmark) -> str:
    return digest([benchmark.revision, [[item.id, item.question, item.gold] for item in benchmark.items]])


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
