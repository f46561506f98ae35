"""Asking outside of the graph: run folders that go on, and are scored without a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from tests import tiny
from tests.data.endpoint import Says, completion, error, saying, serving
from tests.evaluation.scenes import answerer, context, said
from valr_ops.__main__ import main
from valr_ops.data.records import BadRecord
from valr_ops.evaluation import asking
from valr_ops.evaluation.asking import Asked, ask_run, open_model, score_run
from valr_ops.evaluation.benchmarks import BenchmarkError
from valr_ops.evaluation.drawn import Drawing, write_benchmark
from valr_ops.evaluation.judge import open_judge
from valr_ops.evaluation.models import Answerer, AnswererError, Prompt, Said, open_answerer
from valr_ops.evaluation.questions import Showing, open_benchmark
from valr_ops.evaluation.run import PredictionsError, UnansweredError, open_benchmarks
from valr_ops.model.qwen import save_model
from valr_ops.recipe.recipe import Recipe, SyntheticRecipe, override
from valr_ops.store.progress import Progress

SIZES = SyntheticRecipe()


@pytest.fixture(scope="module")
def vsi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about ten drawn videos, one of each type."""
    folder = tmp_path_factory.mktemp("vsi")
    write_benchmark(folder, Drawing("vsi_bench", 0, 10, SIZES))
    return folder


def recipe(**changes: object) -> Recipe:
    return tiny.recipe(**{"evaluation.batch_size": 4, "evaluation.frames": 2, "evaluation.max_new_tokens": 8} | changes)


def knowing(folder: Path, name: str = "all-knowing") -> Answerer:
    """A model that has seen the answers."""
    opened = Asked("vsi_bench", "vsi_bench", str(folder), whole=False).open(recipe(), folder / "frames")
    known = {}
    for item in opened.items:
        with contextlib.suppress(BadRecord):
            (first, *_), question = opened.prompt(item)
            known[question, first.tobytes()] = item.gold

    def generate(prompts: list[Prompt]) -> Sequence[Said]:
        answers = [known[question, images[0].tobytes()] for images, question in prompts]
        return [
            said(f"<think>{len(images)} frames</think>Answer: {answer}")
            for (images, _), answer in zip(prompts, answers)
        ]

    return replace(answerer(), name=name, generate=generate)


def ask(model: Answerer, folder: Path, out: Path, **changes: object) -> dict[str, object]:
    asked = [Asked("vsi_bench", "vsi_bench", str(folder), whole=False)]
    return ask_run(model, asked, out, recipe(**changes), out.parent / "frames", Progress())


def test_a_model_is_asked_once_and_scored_by_as_many_profiles_as_wanted(vsi: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ask(knowing(vsi), vsi, run)["asked"] == 10
    assert ask(knowing(vsi), vsi, run)["asked"] == 0
    for profile in (None, "lmms-eval@0.7.3", "vlmevalkit@e8e78f0"):
        scores, table = score_run(run, recipe(), tmp_path / "frames", profile)
        (entry,) = scores["benchmarks"].values()
        assert (entry["profile"], entry["accuracy"], entry["n"]) == (profile or "official", 1.0, 10)
        assert scores["model"]["artifact"] == "all-knowing"
        assert entry["profile"] in table
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert {row["isolation_rule"] for row in rows} == {"phrase"}
    assert all(row["output"].startswith("<think>2 frames") for row in rows)


def test_test_records_of_a_source_are_asked_and_scored_as_in_the_graph(tmp_path: Path) -> None:
    records, run = tmp_path / "records", tmp_path / "run"
    records.mkdir()
    for split, colours in (("test", ("red", "blue", "red")), ("train", ("blue",))):
        lines = []
        for number, colour in enumerate(colours):
            PIL.Image.new("RGB", (16, 16), colour).save(records / f"{split}{number}.png")
            record = {"id": number, "images": [f"{split}{number}.png"], "question": "Is it red?"}
            lines.append(json.dumps(record | {"steps": [{"text": "I look."}], "answer": str(colour == "red").lower()}))
        (records / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    always = replace(answerer(lambda prompts: [said("Answer: True") for _ in prompts]), name="always")
    asked = [Asked.parse(f"mine:records={records}", limit=None, whole=True)]
    assert ask_run(always, asked, run, recipe(), tmp_path, Progress())["items"] == 3
    scores, _ = score_run(run, recipe(), tmp_path)
    in_graph = context("scores", tmp_path, {"sources": tmp_path})
    sources = {"mine": {"format": "jsonl", "path": str(records)}}
    in_graph = replace(in_graph, recipe=override(in_graph.recipe, {"data.sources": sources}))
    (benchmark,) = open_benchmarks(in_graph)
    entry = scores["benchmarks"]["mine"]
    assert (entry["n"], entry["accuracy"], entry["revision"]) == (3, 0.666667, benchmark.revision)
    (records / "test.jsonl").unlink()
    with pytest.raises(BenchmarkError, match=r"there is no test\.jsonl"):
        asked[0].open(recipe(), tmp_path)


def test_frames_are_decoded_once_for_all_models(vsi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(knowing(vsi), vsi, tmp_path / "one")
    kept = sorted((tmp_path / "frames").iterdir())
    assert len(kept) == 10
    monkeypatch.setattr("valr_ops.evaluation.questions.read_frames", None)
    ask(knowing(vsi, "another"), vsi, tmp_path / "other")
    assert sorted((tmp_path / "frames").iterdir()) == kept


def test_a_run_folder_takes_no_answers_of_another_model_budget_or_benchmark(vsi: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ask(knowing(vsi), vsi, run)
    before = {path: path.read_bytes() for path in run.iterdir()}
    for other, complaint in (
        (replace(knowing(vsi), digest="other"), "model: 'digest', now 'other'"),
        (replace(knowing(vsi), budget=replace(answerer().budget, max_new_tokens=9)), "max_new_tokens 64, now 9"),
    ):
        with pytest.raises(PredictionsError, match=complaint):
            ask(other, vsi, run)
    with pytest.raises(PredictionsError, match="batch_size: 4, now 5"):
        ask(knowing(vsi), vsi, run, **{"evaluation.batch_size": 5})
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_answers_are_not_scored_against_other_data(vsi: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vsi"
    write_benchmark(folder, Drawing("vsi_bench", 1, 10, SIZES))
    ask(knowing(folder), folder, tmp_path / "run")
    write_benchmark(folder, Drawing("vsi_bench", 2, 10, SIZES))
    with pytest.raises(PredictionsError, match="are not those that were asked"):
        score_run(tmp_path / "run", recipe(), tmp_path / "frames")
    with pytest.raises(PredictionsError, match="holds no run"):
        score_run(tmp_path, recipe(), tmp_path / "frames")


def test_a_data_set_that_is_not_whole_is_refused_with_its_counts(vsi: Path, tmp_path: Path) -> None:
    showing = Showing.of_recipe(recipe(), tmp_path)
    with pytest.raises(BenchmarkError, match=r"is not the whole data set .*object_abs_distance: 1 instead of 834"):
        open_benchmark("vsi_bench", vsi, showing)
    assert len(open_benchmark("vsi_bench", vsi, showing, limit=3).items) == 3
    with pytest.raises(BenchmarkError, match="benchmark mine: there is no benchmark 'mine'"):
        open_benchmark("mine", vsi, showing)
    with pytest.raises(BenchmarkError, match="no profile 'official@2'; choose one of official"):
        open_benchmark("vsi_bench", vsi, showing, profile="official@2")


def test_a_question_opens_no_latent_segment_by_its_words(tmp_path: Path) -> None:
    line = {"id": 1, "prompt": "What is <latent><|im_end|>?", "answer": "a tag"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    opened = open_benchmark("mine", tmp_path, Showing.of_recipe(recipe(), tmp_path), "jsonl")
    assert opened.prompt(opened.items[0]) == ([], "What is &lt;latent>&lt;|im_end|>?")


def test_a_damaged_video_is_counted_and_never_scored(vsi: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vsi"
    write_benchmark(folder, Drawing("vsi_bench", 0, 10, SIZES))
    video = folder / "scannet" / "scene0003_00.mp4"
    video.write_bytes(video.read_bytes()[:900])
    ask(knowing(vsi), folder, tmp_path / "run")
    scores, _ = score_run(tmp_path / "run", recipe(), tmp_path / "frames")
    entry = scores["benchmarks"]["vsi_bench"]
    assert (entry["n"], entry["accuracy"], entry["rejected"]) == (9, 1.0, {"video_unreadable": 1})
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows].count("rejected") == 1
    assert "scene0003_00.mp4" in next(row["error"] for row in rows if row["status"] == "rejected")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL without latents, saved as transformers saves one."""
    folder = tmp_path_factory.mktemp("models") / "stock"
    save_model(tiny.model(), tiny.processor(), folder, {})
    return folder


def test_a_model_of_ours_and_the_same_one_by_its_auto_class_say_the_same(
    stock: Path, vsi: Path, tmp_path: Path
) -> None:
    opened = Asked("vsi_bench", "vsi_bench", str(vsi), whole=False).open(recipe(), tmp_path)
    prompts = [opened.prompt(item) for item in opened.items[:3]]
    config = json.loads((stock / "config.json").read_text())
    ours = open_answerer("ours", stock, recipe())
    assert (ours.budget.engine, ours.budget.slots) == ("valr_ops", 0)
    auto = asking.open_model(str(stock), recipe(), engine="transformers")
    assert auto.budget.engine == "transformers"
    assert [one.text for one in auto.generate(prompts)] == [one.text for one in ours.generate(prompts)]
    assert [one.text_tokens for one in auto.generate(prompts)] == [one.text_tokens for one in ours.generate(prompts)]
    assert config["model_type"] == "qwen2_5_vl"


def test_an_endpoint_is_asked_what_it_did_not_answer_and_a_judge_settles_the_run(vsi: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mm_halu"
    write_benchmark(folder, Drawing("mm_halu", 0, 3, SIZES))
    asked = [Asked("mm_halu", "mm_halu", str(folder), whole=False)]
    broken = {"requests": 0}

    def answer(request: object) -> Says:
        broken["requests"] += 1
        return error(400, "no") if broken["requests"] == 2 else completion("A grid of shapes.", finish_reason="stop")

    with serving(answer) as endpoint:
        model = open_model(endpoint.url, recipe(), served_as="vision-1", name="theirs")
        with pytest.raises(UnansweredError, match="1 of 3 items got no answer"):
            ask_run(model, asked, tmp_path / "run", recipe(), tmp_path / "frames", Progress())
        assert ask_run(model, asked, tmp_path / "run", recipe(), tmp_path / "frames", Progress())["items"] == 3
        assert broken["requests"] == 4, "only the one without an answer is asked again"
    with saying(completion("Fine. Rating: 6")) as endpoint:
        judge = open_judge("judge-1", endpoint.url, tmp_path / "run", lambda line: None, price=(0.0, 0.0))
        scores, _ = score_run(tmp_path / "run", recipe(), tmp_path / "frames", judge=judge)
    entry = scores["benchmarks"]["mm_halu"]
    assert entry["profile"] == "official+judge:judge-1"
    assert (entry["accuracy"], entry["unresolved"], entry["n"]) == (1.0, 0, 3)
    assert scores["budget"]["engine"] == "endpoint"
    scores, _ = score_run(tmp_path / "run", recipe(), tmp_path / "frames")
    entry = scores["benchmarks"]["mm_halu"]
    assert (entry["accuracy"], entry["unresolved"]) == (0.0, 3), "without a judge nothing is guessed"


def test_a_judge_hears_of_whole_answers_only_and_a_cut_one_counts_as_wrong(tmp_path: Path) -> None:
    folder, run = tmp_path / "mm_halu", tmp_path / "run"
    write_benchmark(folder, Drawing("mm_halu", 0, 3, SIZES))
    asked = [Asked("mm_halu", "mm_halu", str(folder), whole=False)]
    damaged, *_ = sorted((folder / "images").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:40])
    finish = iter(("stop", "length"))
    model = replace(
        answerer(lambda prompts: [replace(said("A bus."), finish_reason=next(finish)) for _ in prompts]), name="model"
    )
    ask_run(model, asked, run, recipe(), tmp_path / "frames", Progress())
    with saying(completion("Fine. Rating: 6")) as endpoint:
        judge = open_judge("judge-1", endpoint.url, run, lambda line: None, price=(0.0, 0.0))
        scores, _ = score_run(run, recipe(), tmp_path / "frames", judge=judge)
    (entry,) = scores["benchmarks"].values()
    assert judge.report()["cases"] == 1
    assert (entry["n"], entry["cut_off"], entry["unresolved"]) == (2, 1, 1)
    assert entry["rejected"] == {"image_unreadable": 1}
    assert (entry["totals"]["hallucination_rate"], entry["totals"]["mean_rating"]) == (0.5, 3.0)


def test_a_model_that_can_not_be_asked_is_named(tmp_path: Path) -> None:
    for model, complaint in (
        ("https://api.example.com/v1", "add --served-as"),
        ("hub:Qwen/Qwen2.5-VL-7B-Instruct", "pin a revision"),
    ):
        with pytest.raises(AnswererError, match=complaint):
            open_model(model, recipe())
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(AnswererError, match="can't be opened as a vision-language model"):
        open_model(str(tmp_path), recipe())


def test_the_verbs_ask_and_evaluate(stock: Path, vsi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "ask",
        "--model",
        str(stock),
        "--benchmark",
        f"rooms:vsi_bench={vsi}",
        "--partial",
        "--out",
        str(tmp_path / "run"),
    ]
    limits = ["--set", "evaluation.max_new_tokens=4", "--set", "evaluation.frames=2"]
    assert main([*arguments, *limits]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["asked"] == 10
    assert main([*arguments, *limits]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["asked"] == 0
    assert main([*arguments, "--set", "evaluation.max_new_tokens=5"]) == 42
    assert "max_new_tokens 4, now 5" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "| rooms | official | 10 |" in shown
    assert json.loads(shown.splitlines()[-1])["benchmarks"]["rooms"]["format"] == "vsi_bench"
