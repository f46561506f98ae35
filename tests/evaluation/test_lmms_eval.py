"""lmms-eval's requests put to a tiny model: what its scorers are told, under which budget, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.model.reasoner import END, SLOTS, VOCABULARY, answers, prompts, save_reasoner
from tests.project import CHECKOUT
from valr_ops.data.images import decode
from valr_ops.data.rewriting import LATENT
from valr_ops.data.videos import read_frames, write_video
from valr_ops.evaluation.answers import answer_text
from valr_ops.evaluation.lmms_eval import (
    IMAGE_LIMITS,
    Answered,
    LmmsEvalError,
    Request,
    Respondent,
    Settings,
    open_respondent,
    read_settings,
)
from valr_ops.model.answering import Generation
from valr_ops.model.qwen import save_model

ENVIRONMENT = CHECKOUT / ".venv-lmms-eval"
INJECTED: dict[str, Any] = {"until": ["\n\n"], "do_sample": False}
"""generation_kwargs of a task that says nothing about them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage2")
    save_reasoner(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return open_respondent(Settings(pretrained=folder, device="cpu")).model


@pytest.fixture
def respondent(folder: Path, model: Any) -> Callable[..., Respondent]:
    """The model under other settings than those of `reasoner.answers`."""

    def made(**settings: Any) -> Respondent:
        limits: dict[str, Any] = {"max_new_tokens": 24, "max_segments": 3, "device": "cpu", **settings}
        return Respondent(model, tiny.processor(), Settings(pretrained=folder, **limits))

    return made


def asked(*contents: Any, **generation: Any) -> tuple[list[Request], dict[str, Any]]:
    """Requests of one task, a document for each of `contents`, and the documents."""

    def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": document["content"]}]

    wanted = {**INJECTED, **generation}
    requests: list[Request] = [("", messages, wanted, number, "task", "test") for number in range(len(contents))]
    return requests, {"task": {"test": [{"content": list(content)} for content in contents]}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(source: Any) -> dict[str, Any]:
    return {"type": "image", "url": source}


def video(source: Any) -> dict[str, Any]:
    return {"type": "video", "url": source}


def told(generation: Generation) -> str:
    """What is known of an answer: nothing, if it was cut off."""
    return answer_text(generation.text) if generation.finish_reason == "stop" else ""


@contextmanager
def saying(model: Any, words: str) -> Iterator[None]:
    """`model`, which chooses the tokens of `words` and ends; a segment has its slots as always."""
    chosen = iter([*tiny.processor().tokenizer.encode(words), END])

    class Script(torch.nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            scores = torch.zeros(len(states), VOCABULARY)
            scores[:, next(chosen)] = 1.0
            return scores

    kept, model.lm_head = model.lm_head, Script()
    try:
        yield
    finally:
        model.lm_head = kept


def answer_to_one(respondent: Respondent, words: str, **generation: Any) -> Answered:
    with saying(respondent.model, words):
        (one,) = respondent.respond(*asked([text("What is it?")], **generation))
    return one


def test_a_task_hears_what_our_own_evaluation_hears_in_the_order_of_its_requests(
    respondent: Callable[..., Respondent], model: Any
) -> None:
    questions = prompts(7)
    requests, documents = asked(*([*map(image, images), text(words)] for images, words in questions))
    said = respondent(batch_size=3, force_first_latent=True).respond(requests, documents)
    own = answers(model, questions, force_first_latent=True)
    assert [one.text for one in said] == list(map(told, own))
    assert len({one.text for one in said}) > 3
    assert [(one.input_tokens, one.output_tokens) for one in said] == [(g.prompt_tokens, g.decode_steps) for g in own]


def test_reasoning_goes_on_after_a_blank_line_and_only_the_answer_is_scored(
    respondent: Callable[..., Respondent],
) -> None:
    said = answer_to_one(respondent(max_new_tokens=200), f"{LATENT}row 1: red star.\n\nrow 2: no.\nAnswer: blue square")
    assert said.text == "blue square"


def test_every_position_that_is_not_the_answer_counts_as_reasoning(respondent: Callable[..., Respondent]) -> None:
    said = answer_to_one(respondent(max_new_tokens=200), f"{LATENT}red star.\nAnswer: blue square")
    before = len(tiny.processor().tokenizer.encode(f"{LATENT}red star.\nAnswer: blue square")) + SLOTS + 1
    spoken = len(tiny.processor().tokenizer.encode("blue square"))
    assert (said.output_tokens, said.reasoning_tokens) == (before + 1, before - spoken)


def test_other_stop_strings_of_a_task_end_the_answer_and_not_the_reasoning(
    respondent: Callable[..., Respondent],
) -> None:
    words = "row 1: red. blue.\nAnswer: blue. square"
    assert answer_to_one(respondent(max_new_tokens=200), words, until=[".", "\n"]).text == "blue"
    assert answer_to_one(respondent(max_new_tokens=200), words, until="\n").text == "blue. square"


def test_an_answer_that_is_cut_off_is_empty_and_said_to_be(
    respondent: Callable[..., Respondent], caplog: pytest.LogCaptureFixture
) -> None:
    words = "The answer is no, as the answer is yes"
    assert answer_to_one(respondent(max_new_tokens=200), words).text == "yes"
    assert answer_to_one(respondent(max_new_tokens=8), words).text == ""
    assert "1 of 1 answers are empty" in caplog.text and "max_new_tokens=8" in caplog.text


def test_the_budget_is_that_of_the_model_and_a_task_that_wants_another_is_told_once(
    respondent: Callable[..., Respondent], model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    questions = prompts(4)
    contents = [[*map(image, images), text(words)] for images, words in questions]
    said = respondent(force_first_latent=True).respond(*asked(*contents, max_new_tokens=2, image_aspect_ratio="pad"))
    assert [one.text for one in said] == list(map(told, answers(model, questions, force_first_latent=True)))
    assert caplog.text.count("task: max_new_tokens=2 has no effect; max_new_tokens in --model_args counts, 24") == 1
    assert caplog.text.count("image_aspect_ratio=pad has no effect") == 1


def test_slots_segments_and_settling_are_settings(respondent: Callable[..., Respondent]) -> None:
    question = asked([text("What is in row 1?")])
    limits = {"max_new_tokens": 4, "max_segments": 1, "force_first_latent": True}

    def steps(**settings: Any) -> int:
        (said,) = respondent(**limits, **settings).respond(*question)
        return said.output_tokens

    assert steps(slots=9) - steps() == 9 - SLOTS
    assert steps() - steps(latent_settle=-1.0) == SLOTS - 1


def test_a_video_is_asked_about_as_frames_of_its_file(respondent: Callable[..., Respondent], tmp_path: Path) -> None:
    data = write_video(np.stack([np.asarray(tiny.image(number, 48, 32)) for number in range(9)]))
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    frames = [decode(frame.data) for frame in read_frames(data, 3, IMAGE_LIMITS, "a video")]
    made = respondent(frames=3, force_first_latent=True)
    by_path, by_frames = made.respond(
        *asked([video(str(path)), text("What is it?")], [*map(image, frames), text("What is it?")])
    )
    assert by_path == by_frames


def test_pictures_of_any_kind_are_seen_as_training_would_see_them(
    respondent: Callable[..., Respondent], tmp_path: Path
) -> None:
    plain = tiny.image(3)
    plain.save(tmp_path / "a.png")
    on_white = PIL.Image.new("RGB", plain.size, "white")
    kinds = [plain, str(tmp_path / "a.png"), plain.convert("CMYK"), PIL.Image.new("RGBA", plain.size), on_white]
    prompt = respondent()._prompt([{"role": "user", "content": [*map(image, kinds), text("?")]}], "here")
    seen = [np.asarray(part["image"]) for part in prompt[0]["content"][:-1]]
    assert all(picture.shape == (64, 64, 3) for picture in seen)
    for same, other in [(0, 1), (0, 2), (3, 4)]:
        np.testing.assert_array_equal(seen[same], seen[other])


def test_fewer_pixels_are_fewer_tokens(folder: Path) -> None:
    def tokens(**settings: Any) -> int:
        made = open_respondent(Settings(pretrained=folder, device="cpu", **settings))
        (said,) = made.respond(*asked([image(tiny.image(2, 256, 256)), text("What is it?")]))
        return said.input_tokens

    patches = 256 // 16
    assert tokens() - tokens(max_pixels=128 * 128) == patches**2 - (patches // 2) ** 2


def test_what_cannot_be_asked_stops_the_run_and_names_the_document(respondent: Callable[..., Respondent]) -> None:
    made, words = respondent(), text("What is it?")
    for content, problem in [
        ([{"type": "audio", "url": "a.wav"}, words], "audio"),
        ([video({"url": "a.mp4", "video_start": 3}), words], "whole files"),
        ([video("nowhere.mp4"), words], "nowhere.mp4 can't be read"),
        ([image("https://example.org/a.png"), words], "only local ones are opened"),
    ]:
        with pytest.raises(LmmsEvalError, match=f"task, document 0 of test.*{problem}"):
            made.respond(*asked(content))
    with pytest.raises(LmmsEvalError, match=r"num_beams=5.*--gen_kwargs num_beams=1"):
        made.respond(*asked([words], num_beams=5))


def test_repeats_of_a_sampled_question_differ_and_a_second_run_repeats_them(
    respondent: Callable[..., Respondent],
) -> None:
    requests, documents = asked([text("What is in row 1?")], do_sample=True, temperature=1.0, top_p=0.9)
    first = respondent(batch_size=2).respond(requests * 4, documents)
    assert len({one.text for one in first} | {str(one.output_tokens) for one in first}) > 2
    assert respondent().respond(requests * 4, documents) == first
    greedy = asked([text("What is in row 1?")], temperature=0.0, top_p=0.0)
    assert respondent(seed=1).respond(*greedy) == respondent(seed=2).respond(*greedy)


def test_a_task_of_several_rounds_words_each_when_it_has_seen_the_one_before(
    respondent: Callable[..., Respondent], model: Any
) -> None:
    heard = []

    def messages(document: dict[str, Any], round_idx: int | None = None, **before: Any) -> Any:
        question = [{"role": "user", "content": [text(f"{document['question']} {round_idx or 0}?")]}]
        if round_idx is None:
            return question
        heard.append((round_idx, before["previous_round_info"]))
        return question, round_idx == document["rounds"], before["previous_output"], f"note {round_idx}"

    documents = {"task": {"test": [{"question": f"column {n}", "rounds": n + 1} for n in range(3)]}}
    requests = [("", messages, INJECTED, number, "task", "test") for number in range(3)]
    said = respondent(batch_size=2, force_first_latent=True).respond_in_rounds(requests, documents)
    own = [
        answers(model, [([], f"column {n} {turn}?") for turn in range(n + 1)], force_first_latent=True)
        for n in range(3)
    ]
    assert [one.text for one in said] == [list(map(told, turns)) for turns in own]
    assert [one.output_tokens for one in said] == [sum(turn.decode_steps for turn in turns) for turns in own]
    assert sorted(set(heard)) == [(1, None), (2, "note 1"), (3, "note 2")]


def test_the_transcript_keeps_what_was_said_beside_what_was_scored(
    respondent: Callable[..., Respondent], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "said.jsonl"
    made = respondent(max_new_tokens=200, transcript=path)
    for words in ("yes", f"{LATENT}red star.\nAnswer: no"):
        answer_to_one(made, words)
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["answer"], first["isolation_rule"], first["latent_steps"]) == ("yes", "none", 0)
    assert (second["answer"], second["isolation_rule"], second["latent_steps"]) == ("no", "phrase", SLOTS)
    assert "red star." in second["output"] and second["doc_id"] == 0


def test_settings_come_as_text_and_unknown_ones_are_refused_by_name(folder: Path) -> None:
    settings = read_settings({"pretrained": str(folder), "batch_size": "4", "slots": 8, "force_first_latent": True})
    assert (settings.batch_size, settings.slots, settings.force_first_latent) == (4, 8, True)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"pretrained": str(folder), "slotz": 8}, "slotz=8: no such setting; there are .*slots"),
        ({"pretrained": str(folder), "batch_size": "auto"}, "--batch_size auto: .*integer"),
        ({"pretrained": str(folder), "frames": 0}, "frames=0: .*greater than 0"),
        ({"slots": 8}, "--model_args pretrained=FOLDER"),
    ]
    for args, problem in refused:
        with pytest.raises(LmmsEvalError, match=problem):
            read_settings(args)


def test_settings_of_latents_are_refused_for_a_model_without(tmp_path: Path) -> None:
    save_model(tiny.model(), tiny.processor(), tmp_path, {"stage": 1})
    with pytest.raises(LmmsEvalError, match=r"latent_settle.*has no latents"):
        open_respondent(Settings(pretrained=tmp_path, device="cpu", latent_settle=0.9))
    assert open_respondent(Settings(pretrained=tmp_path, device="cpu", max_new_tokens=2)).respond(
        *asked([text("What is it?")])
    )


TASK = """
task: columns
dataset_path: parquet
dataset_kwargs: {data_files: {test: TABLE}}
test_split: test
output_type: generate_until
doc_to_visual: !function scoring.pictures
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function scoring.score
generation_kwargs: {max_new_tokens: 1, temperature: 0, do_sample: false}
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 0}
"""
SCORING = """
import io
import PIL.Image

def pictures(doc):
    return [PIL.Image.open(io.BytesIO(doc["png"]))]

def score(doc, results):
    return {"acc": float(results[0] == doc["answer"])}
"""
TWICE = """
import json, sys
from valr_ops.torchvision_guard import ensure_torchvision
ensure_torchvision()
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from valr_ops.evaluation.lmms_eval import Valr

model, tasks = Valr(**json.loads(sys.argv[1])), TaskManager(include_path=sys.argv[2], model_name="valr")
for _ in range(2):
    found = simple_evaluate(model, tasks=["columns"], task_manager=tasks)
    print(json.dumps([found["results"]["columns"]["acc,none"], found["samples"]["columns"][0]["token_counts"]]))
"""


def in_environment(at: Path, *arguments: str) -> str:
    """What lmms-eval's interpreter prints in the folder `at`, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(at / "hf"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(
        [ENVIRONMENT / "bin" / "python", *arguments], cwd=at, env=offline, capture_output=True, text=True, timeout=500
    )
    return ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (ENVIRONMENT / "bin").is_dir(), reason="lmms-eval has an environment of its own: make lmms")
def test_lmms_eval_scores_a_local_task_by_our_answers(folder: Path, model: Any, tmp_path: Path) -> None:
    questions = [([tiny.image(number)], f"What is in column {number}?") for number in range(6)]
    own = answers(model, questions, force_first_latent=True)
    golds = [told(one) if number % 2 else "none of them" for number, one in enumerate(own)]
    for number, ((images, _), _) in enumerate(zip(questions, golds, strict=True)):
        images[0].save(tmp_path / f"{number}.png")
    table = {
        "png": [(tmp_path / f"{number}.png").read_bytes() for number in range(6)],
        "question": [words for _, words in questions],
        "answer": golds,
    }
    task = tmp_path / "tasks"
    task.mkdir()
    pq.write_table(pa.table(table), tmp_path / "test.parquet")
    (task / "columns.yaml").write_text(TASK.replace("TABLE", str(tmp_path / "test.parquet")))
    (task / "scoring.py").write_text(SCORING)
    args = {"pretrained": str(folder), "max_new_tokens": 24, "max_segments": 3, "force_first_latent": True}

    def run(**changes: Any) -> str:
        model_args = ",".join(f"{name}={value}" for name, value in (args | changes).items())
        options = f"--tasks columns --include_path {task} --batch_size 4 --device cpu --log_samples --output_path out"
        return in_environment(
            tmp_path,
            *("-m", "valr_ops.evaluation.lmms_eval", "eval", "--model", "valr", "--model_args", model_args),
            *options.split(),
        )

    printed = run()
    results = [json.loads(path.read_text()) for path in tmp_path.glob("out/*/*_results.json")]
    assert [one["results"]["columns"]["acc,none"] for one in results] == [0.5], printed
    (samples,) = tmp_path.glob("out/*/*_samples_columns.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["filtered_resps"] for row in rows] == list(map(told, own))
    assert [row["token_counts"][0]["output_tokens"] for row in rows] == [one.decode_steps for one in own]
    assert all(row["token_counts"][0]["reasoning_tokens"] >= SLOTS + 2 for row in rows)

    assert "slotz=8: no such setting" in run(slotz=8)

    twice = in_environment(tmp_path, "-c", TWICE, json.dumps(args), str(task)).splitlines()
    found = [json.loads(line) for line in twice if line.startswith("[0")]
    assert found == [[0.5, rows[0]["token_counts"]]] * 2, twice
