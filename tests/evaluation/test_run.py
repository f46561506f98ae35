"""Asking and judging: nothing is lost or asked twice, and what is written says how it was reached."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.evaluation.scenes import BUDGET, answerer, benchmark, context, recipe, said, truthful
from valr_ops.evaluation.benchmarks import BenchmarkError
from valr_ops.evaluation.models import BudgetError, Prompt, Said
from valr_ops.evaluation.run import (
    Prediction,
    PredictionsError,
    UnansweredError,
    build_scores,
    open_benchmarks,
    read_predictions,
    score_model,
    scored_rows,
)
from valr_ops.model.qwen import save_model
from valr_ops.recipe.recipe import override
from valr_ops.store.artifacts import StageContext


class Killed(BaseException):
    """As a signal would end the process."""


class DyingModel:
    """Answers truthfully, remembers what it was asked, and dies before the batch with number `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.asked: list[str] = []

    def __call__(self, prompts: list[Prompt]) -> Sequence[Said]:
        if self.dies_at is not None and len(self.asked) >= 4 * self.dies_at:
            raise Killed
        self.asked += [question for _, question in prompts]
        return truthful(prompts)


def files(at: StageContext) -> dict[str, bytes]:
    return {path.relative_to(at.out).as_posix(): path.read_bytes() for path in at.out.rglob("*") if path.is_file()}


def test_scores_count_what_the_model_said(tmp_path: Path) -> None:
    at = context("scores_sft", tmp_path)

    def half_blind(prompts: list[Prompt]) -> list[Said]:
        answers = [replace(one, segments=2, latent_steps=8) for one in truthful(prompts)]
        answers[0] = said("Answer: perhaps")
        answers[1] = replace(answers[1], finish_reason="length")
        return answers

    report = score_model(at, [benchmark(8)], answerer(half_blind, slots=4))
    score = json.loads((at.out / "scores.json").read_text())["benchmarks"]["mine"]
    assert (score["n"], score["correct"], score["accuracy"]) == (8, 4, 0.5)
    assert score["interval"] == pytest.approx([0.2152, 0.7848], abs=5e-5)
    assert score["majority"] == {"answer": "true", "accuracy": 0.75}
    assert (score["unresolved"], score["cut_off"]) == (4, 2)
    assert (score["latent_trigger_rate"], score["mean_segments"], score["mean_latent_steps"]) == (0.75, 1.5, 6.0)
    assert score["rejected"] == {"image_unreadable": 1}
    assert report.summary["accuracy_mine"] == 0.5
    assert [check.passed for check in report.checks] == [True]
    assert "items_per_second" in report.timings


def test_predictions_keep_the_raw_and_the_isolated_text_in_the_order_of_the_items(tmp_path: Path) -> None:
    at = context("scores_sft", tmp_path)
    score_model(at, [benchmark(10), benchmark(3, "other")], answerer())
    rows = read_predictions(at.out)
    expected = [f"mine/{number}" for number in range(10)] + [f"other/{number}" for number in range(3)]
    assert [row["id"] for row in rows] == expected
    assert rows[2]["output"] == "Answer: false<|im_end|>"
    assert (rows[2]["isolated"], rows[2]["gold"], rows[2]["correct"]) == ("false", "false", True)


@pytest.mark.parametrize("torn", [b"", b'{"benchmark": "mi', b"all of the last line"])
def test_a_killed_run_goes_on_without_repeating_or_losing_an_item(tmp_path: Path, torn: bytes) -> None:
    uninterrupted = context("whole", tmp_path)
    score_model(uninterrupted, [benchmark(10)], answerer())

    at = context("killed", tmp_path)
    first = DyingModel(dies_at=2)
    with pytest.raises(Killed):
        score_model(at, [benchmark(10)], answerer(first))
    assert not (at.out / "scores.json").exists()
    (journal,) = at.work.iterdir()
    if torn == b"all of the last line":
        journal.write_bytes(journal.read_bytes() + journal.read_bytes().splitlines(keepends=True)[-1])
    else:
        journal.write_bytes(journal.read_bytes() + torn)

    second = DyingModel()
    score_model(at, [benchmark(10)], answerer(second))
    questions = [item.question for item in benchmark(10).items]
    assert first.asked == questions[:8]
    assert second.asked == questions[8:]
    assert files(at) == files(uninterrupted)


@pytest.mark.parametrize("whole_lines", [4, 6, 7])
def test_a_batch_that_was_half_written_is_asked_again_as_a_whole(tmp_path: Path, whole_lines: int) -> None:
    at = context("killed", tmp_path)
    with pytest.raises(Killed):
        score_model(at, [benchmark(10)], answerer(DyingModel(dies_at=2)))
    (journal,) = at.work.iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:whole_lines]) + lines[whole_lines][:30])
    second = DyingModel()
    score_model(at, [benchmark(10)], answerer(second))
    assert second.asked == [item.question for item in benchmark(10).items][4:]
    assert len(read_predictions(at.out)) == 10


def test_a_finished_journal_needs_no_model(tmp_path: Path) -> None:
    at = context("killed", tmp_path)
    score_model(at, [benchmark(10)], answerer())
    second = DyingModel()
    score_model(at, [benchmark(10)], answerer(second))
    assert second.asked == []


def test_answers_of_another_model_or_budget_are_not_taken_over(tmp_path: Path) -> None:
    at = context("killed", tmp_path)
    score_model(at, [benchmark(10)], answerer())
    for other in (answerer(DyingModel(), max_new_tokens=32), replace(answerer(DyingModel()), digest="other")):
        score_model(at, [benchmark(10)], other)
        assert isinstance(other.generate, DyingModel)
        assert len(other.generate.asked) == 10


def test_a_journal_with_foreign_answers_is_refused(tmp_path: Path) -> None:
    at = context("killed", tmp_path)
    score_model(at, [benchmark(8)], answerer())
    (journal,) = at.work.iterdir()
    whole = journal.read_bytes()
    for line, complaint in (
        (
            json.dumps({**json.loads(whole.splitlines()[0]), "id": "mine/8"}),
            "line 9 answers mine/8 of mine, which is none",
        ),
        ('{"benchmark": "mine"}', "line 9 is no answer"),
        ("not JSON", "line 9 is no answer"),
    ):
        journal.write_bytes(whole + line.encode() + b"\n")
        with pytest.raises(PredictionsError, match=complaint):
            score_model(at, [benchmark(8)], answerer())


def test_an_endpoint_that_fails_leaves_items_unanswered_and_the_next_run_asks_only_those_batches(
    tmp_path: Path,
) -> None:
    at = context("scores_gpt", tmp_path)
    asked: list[str] = []

    def failing(prompts: list[Prompt]) -> list[Said]:
        asked.extend(question for _, question in prompts)
        return [
            Said("", 0, "error", error="503 after 5 attempts") if "image 5 " in question else one
            for (_, question), one in zip(prompts, truthful(prompts), strict=True)
        ]

    with pytest.raises(
        UnansweredError, match="1 of 10 items got no answer \\(1 x 503 after 5 attempts\\); the others are"
    ):
        score_model(at, [benchmark(10)], answerer(failing))
    assert not (at.out / "scores.json").exists()
    second = DyingModel()
    score_model(at, [benchmark(10)], answerer(second))
    questions = [item.question for item in benchmark(10).items]
    assert asked == questions
    assert second.asked == questions[4:8]
    assert {row["status"] for row in read_predictions(at.out)} == {"ok"}


def test_equal_answers_give_equal_bytes_and_no_clock(tmp_path: Path) -> None:
    one, other = context("one", tmp_path), context("other", tmp_path)
    for at in (one, other):
        score_model(at, [benchmark(10)], answerer())
    assert files(one) == files(other)
    assert {"predictions.jsonl", "scores.json", "examples.json", "examples/00-0.png"} <= files(one).keys()
    assert b"seconds" not in b"".join(content for name, content in files(one).items() if not name.endswith(".png"))


def test_a_real_model_with_latents_is_asked_and_scored(tmp_path: Path) -> None:
    sources = {"mine": users_folder(tmp_path / "mine")}
    save_model(tiny.model(), tiny.processor(), tmp_path / "stage2_valr_s", {"slots": 4, "control_tokens": "outside"})
    changes = {f"data.sources.{name}": {"format": "jsonl", "path": str(path)} for name, path in sources.items()}
    limits = {"evaluation.max_new_tokens": 12, "evaluation.force_first_latent": True, "evaluation.batch_size": 2}
    at = replace(
        context("scores_valr_s", tmp_path, {"sources": tmp_path, "stage2_valr_s": tmp_path / "stage2_valr_s"}),
        recipe=tiny.recipe(**changes, **limits),
    )
    report = build_scores(at)
    scores = json.loads((at.out / "scores.json").read_text())
    assert (scores["budget"]["slots"], scores["model"]["artifact"]) == (4, "stage2_valr_s")
    assert scores["benchmarks"]["mine"]["latent_trigger_rate"] == 1.0
    assert [row["latent_steps"] % 4 for row in read_predictions(at.out)] == [0, 0, 0]
    assert report.checks[0].passed


def predictions(count: int) -> list[Prediction]:
    return [Prediction("mine", f"mine/{number}", "Answer: true", 0, 3, 0, "stop") for number in range(count)]


def test_judging_needs_exactly_one_prediction_for_every_item() -> None:
    tested = benchmark(4)
    questions = [(tested, item) for item in tested.items]
    shuffled = predictions(4)
    random.Random(0).shuffle(shuffled)
    assert [row["id"] for row in scored_rows(questions, shuffled)] == [item.id for item in tested.items]
    with pytest.raises(PredictionsError, match="missing mine/3 of mine, for no item none"):
        scored_rows(questions, predictions(3))
    with pytest.raises(PredictionsError, match="missing none, for no item mine/4"):
        scored_rows(questions, predictions(5))
    with pytest.raises(PredictionsError, match="twice mine/0"):
        scored_rows(questions, [*predictions(4), predictions(1)[0]])


def test_a_predictions_file_with_a_missing_or_doubled_row_is_refused(tmp_path: Path) -> None:
    at = context("scores_sft", tmp_path)
    score_model(at, [benchmark(6)], answerer())
    lines = (at.out / "predictions.jsonl").read_text().splitlines(keepends=True)
    for broken in (lines[:5], [*lines[:5], lines[0]], [*lines, lines[0]]):
        (at.out / "predictions.jsonl").write_text("".join(broken))
        with pytest.raises(PredictionsError, match="run the stage scores_sft again"):
            read_predictions(at.out)


def test_an_output_with_unusual_line_ends_stays_one_row(tmp_path: Path) -> None:
    at = context("scores_sft", tmp_path)
    score_model(at, [benchmark(3)], answerer(lambda prompts: [said("a\u2028b\x85c\rAnswer: true\n") for _ in prompts]))
    assert [row["output"] for row in read_predictions(at.out)] == ["a\u2028b\x85c\rAnswer: true\n"] * 3


def test_budgets_that_differ_in_anything_but_slots_are_not_compared() -> None:
    BUDGET.require_comparable(replace(BUDGET, slots=16), ("a", "b"))
    with pytest.raises(BudgetError, match="max_new_tokens is 64 for a and 128 for b"):
        BUDGET.require_comparable(replace(BUDGET, max_new_tokens=128), ("a", "b"))


def test_a_recipe_without_test_items_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"data\.sources has \['zebra_cot'\]"):
        open_benchmarks(asking(tmp_path, zebra_cot={"format": "zebra_cot"}))


def asking(folder: Path, **sources: Any) -> StageContext:
    """A context of a stage `scores_*` with only these sources."""
    changed = override(recipe(), {"data.sources": sources})
    return replace(context("scores_sft", folder, {"sources": folder}), recipe=changed)


def users_folder(folder: Path) -> Path:
    """Three good records and two bad ones, as a user might have them."""
    (folder / "images").mkdir(parents=True)
    tiny.image(0).save(folder / "images" / "red.png")
    good = {"license": "CC-BY-4.0", "images": ["images/red.png"], "answer": "true"}
    good["steps"] = [{"text": "It is red.", "image": 0}]
    lines = [
        json.dumps({"id": "a", "question": "Is it red?", **good}),
        "{broken",
        json.dumps({"id": "b", "question": "Is it red?", **good, "images": ["images/none.png"]}),
        json.dumps({"id": "c", "question": "Is it really red?", **good}),
        json.dumps({"id": "d", "question": "Is it not blue?", **good}),
    ]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_source_with_training_data_only_is_no_benchmark(tmp_path: Path) -> None:
    folders = {name: users_folder(tmp_path / name) for name in ("both", "training")}
    (folders["training"] / "test.jsonl").rename(folders["training"] / "train.jsonl")
    sources = {name: {"format": "jsonl", "path": str(path)} for name, path in folders.items()}
    assert [one.name for one in open_benchmarks(asking(tmp_path, **sources))] == ["both"]
    del sources["both"]
    with pytest.raises(BenchmarkError, match="Put a test"):
        open_benchmarks(asking(tmp_path, **sources))


def test_a_users_folder_is_read_up_to_its_broken_lines(tmp_path: Path) -> None:
    mine = {"format": "jsonl", "path": str(users_folder(tmp_path / "mine"))}
    (opened,) = open_benchmarks(asking(tmp_path, mine=mine))
    assert [item.id for item in opened.items] == ["mine/a", "mine/c", "mine/d"]
    assert sorted(one.reason for one in opened.rejections) == ["image_missing", "not_json"]


def test_the_settling_of_segments_reaches_generation_and_the_budget(tmp_path: Path) -> None:
    sources = {"data.sources.mine": {"format": "jsonl", "path": str(users_folder(tmp_path / "mine"))}}
    save_model(tiny.model(), tiny.processor(), tmp_path / "stage2_valr_s", {"slots": 4, "control_tokens": "outside"})
    limits = {"evaluation.max_new_tokens": 6, "evaluation.max_segments": 1, "evaluation.force_first_latent": True}
    steps, budgets = [], []
    for settle in (None, -1.0):
        at = context("scores_valr_s", tmp_path, {"sources": tmp_path, "stage2_valr_s": tmp_path / "stage2_valr_s"})
        at = replace(at, recipe=tiny.recipe(**sources, **limits, **{"evaluation.latent_settle": settle}))
        build_scores(at)
        steps.append({row["latent_steps"] for row in read_predictions(at.out)})
        budgets.append(json.loads((at.out / "scores.json").read_text())["budget"]["latent_settle"])
    assert steps == [{4}, {1}], "a cosine of -1 is always reached, so a segment ends after its first slot"
    assert budgets == [None, -1.0]
