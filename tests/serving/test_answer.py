"""The verb `generate`, from its options to what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from valr_ops.__main__ import main
from valr_ops.evaluation.answers import answer_text
from valr_ops.model.decoding import LatentSegment
from valr_ops.model.qwen import save_model
from valr_ops.serving.answer import segment_line
from valr_ops.store.artifacts import ArtifactError, model_folder

SLOTS = 4


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 artifact that likes segments, below a project folder."""
    model: Any = tiny.model(seed=1)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        model.lm_head.weight[tiny.control().latent] = 0.3 * torch.randn(model.lm_head.in_features, generator=noise)
    project = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml"):
        (project / name).touch()
    path = project / "artifacts" / "stage2_valr_m"
    save_model(model, tiny.processor(), path, {"slots": SLOTS, "control_tokens": "outside"})
    return path


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage1")
    save_model(tiny.model(seed=2), tiny.processor(), path, {"stage": 1})
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    tiny.image(0).save(path)
    return path


def generate(*options: object) -> int:
    return main(["generate", "--device", "cpu", "--max-new-tokens", "24", *map(str, options)])


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """Everything before the last line of standard output, and the last line."""
    text, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return text, json.loads(last)


def test_the_answer_is_printed_with_its_reasoning_and_the_last_line_is_json(
    reasoner: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = ("--model", reasoner, "--image", picture, "--image", picture, "--question", tiny.QUESTION)
    assert generate(*question, "--force-latent") == 0
    text, last = printed(capsys)
    assert text == last["text"]
    assert "latent" not in text
    assert last["latents"][0]["slots"] == SLOTS
    assert last["latent_steps"] == sum(segment["slots"] for segment in last["latents"])
    assert last["answer"] == answer_text(text)
    assert last["prompt_tokens"] > 2 * 16

    assert generate(*question, "--force-latent", "--show-latents") == 0
    shown, again = printed(capsys)
    assert again["text"] == last["text"]
    lines = [
        segment_line(number, LatentSegment(one["slots"], one["norm"], tuple(one["moved"])))
        for number, one in enumerate(again["latents"], start=1)
    ]
    assert shown.startswith(lines[0])
    assert [line for line in shown.split("\n") if line.startswith("‹")] == lines
    assert "".join(line for line in shown.split("\n") if line not in lines) == text.replace("\n", "")


def test_options_reach_the_decoder(reasoner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ("--model", reasoner, "--question", tiny.QUESTION, "--force-latent")
    slots = []
    for options in ((), ("--slots", 7), ("--settle", -1)):
        assert generate(*question, *options) == 0
        slots.append(printed(capsys)[1]["latents"][0]["slots"])
    assert slots == [SLOTS, 7, 1]
    drawn = set()
    for seed in (1, 1, 2, 3):
        assert generate(*question, "--temperature", 2, "--top-p", 0.95, "--seed", seed) == 0
        drawn.add(printed(capsys)[1]["text"])
    assert len(drawn) == 3
    assert generate(*question[:-1], "--no-latents") == 0
    assert printed(capsys)[1]["latents"] == []


def test_models_without_latents_run_through_the_same_verb(
    stage1: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--model", stage1, "--image", picture, "--question", tiny.QUESTION) == 0
    without = printed(capsys)[1]
    assert without["latents"] == []
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in stage1.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    del config["valr"]
    (plain / "config.json").write_text(json.dumps(config))
    assert generate("--model", plain, "--image", picture, "--question", tiny.QUESTION) == 0
    assert printed(capsys)[1]["prompt_tokens"] == without["prompt_tokens"]


def test_another_kind_of_model_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert generate("--model", tmp_path, "--question", tiny.QUESTION) == 42
    complaint = capsys.readouterr().err
    assert "a model of type 'llama'" in complaint and "Traceback" not in complaint


def test_a_model_is_found_by_its_folder_or_its_stage(reasoner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_folder(str(reasoner)) == reasoner
    monkeypatch.chdir(reasoner.parents[1])
    assert model_folder("stage2_valr_m").samefile(reasoner)
    with pytest.raises(ArtifactError, match="nor a stage whose artifact is a model"):
        model_folder("stage1_sft")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--image", "nowhere.png"), "nowhere.png: no such file"),
        (("--image", __file__), "image_unreadable"),
        (("--question", "  "), "empty_question"),
        (("--question", "<lvr>"), "reserved_token_in_text"),
        (("--model", "nothing"), "--model nothing"),
        (("--slots", 7, "--no-latents"), "--slots goes with latent segments, which --no-latents rules out"),
        (("--slots", 0), "slots=0 leaves no position"),
        (("--temperature", -1), "temperature=-1.0"),
        (("--max-new-tokens", 0), "max_new_tokens=0"),
        (("--question", "1, " * 50000), "max_position_embeddings"),
    ],
)
def test_bad_input_is_one_clear_error(
    reasoner: Path, options: tuple[object, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--model", reasoner, "--question", tiny.QUESTION, *options) == 42
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert "Traceback" not in printed.err and not printed.out


def test_options_about_latents_need_a_model_with_latents(stage1: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (("--slots", 4), ("--force-latent",), ("--settle", 0.9)):
        assert generate("--model", stage1, "--question", tiny.QUESTION, *option) == 42
        assert f"{option[0]}: {stage1} has no latents" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(["generate", "--model", str(stage1)])
    assert usage.value.code == 2


def test_figures_of_a_segment_are_put_in_words() -> None:
    assert segment_line(2, LatentSegment(3, 1.018, (0.134, 0.0123))) == (
        "‹latent 2: 3 slots, norm 1.02, moved 0.13 → 0.012›"
    )
    assert segment_line(1, LatentSegment(1, 0.5, ())) == "‹latent 1: 1 slot, norm 0.50›"
    assert segment_line(1, LatentSegment(0, 0.0, ())) == "‹latent 1: 0 slots›"
