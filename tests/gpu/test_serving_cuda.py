"""Served answers on a GPU: those of the CPU in float32, whole ones in bfloat16, and what a lost GPU does."""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.reasoner import save_reasoner
from valr_ops.model.qwen import load_model
from valr_ops.serving import answer as opening
from valr_ops.serving.answer import open_model
from valr_ops.serving.batcher import Ask, Batcher, Event, Failure, Job
from valr_ops.serving.served import PromptLimits, ServedModel

pytestmark = pytest.mark.gpu

ROWS, PATIENCE = 5, 120.0
SCRIPT = """
import queue, sys
import torch
from valr_ops.serving.batcher import Ask, Batcher, Failure, Job

def generate(asks, on_text, on_end, stopped):
    table = torch.zeros(4, device="cuda")
    table[torch.tensor([9], device="cuda")].sum().item()

batcher, events = Batcher(generate, rows=1, wait_seconds=0.0, queue=2), queue.Queue()
for name in ("first", "second"):
    batcher.reserve()
    batcher.submit(Job(name, Ask((), 1, 1), events.put))
    event = events.get(timeout=60)
    print(name, event.reason, batcher.broken)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reasoner")
    save_reasoner(made)
    return made


def asks() -> Iterator[Ask]:
    for number in range(ROWS):
        question = {"type": "text", "text": f"What is in row {'1, ' * number}column {number}?"}
        yield Ask(
            ({"role": "user", "content": [question]},),
            prompt_tokens=20,
            max_new_tokens=8 + 4 * number,
            temperature=0.7 * (number % 2),
            seed=number,
        )


def served(model: ServedModel, rows: int) -> list[tuple[str, Any]]:
    """The text of all pieces and the outcome of each ask, in batches of `rows`, from the batcher's own thread."""
    batcher = Batcher(model.answer, rows=rows, wait_seconds=1.0 if rows > 1 else 0.0, queue=ROWS)
    events: list[queue.Queue[Event]] = []
    for number, ask in enumerate(asks()):
        events.append(queue.Queue())
        batcher.reserve()
        batcher.submit(Job(str(number), ask, events[-1].put))
    told = []
    for of_job in events:
        text = ""
        while isinstance(event := of_job.get(timeout=PATIENCE), str):
            text += event
        told.append((text, event))
    assert batcher.stop(PATIENCE)
    return told


def words(told: list[tuple[str, Any]]) -> list[tuple[str, str, int, int, str]]:
    """Without the seconds."""
    assert not [event for _, event in told if isinstance(event, Failure)], told
    return [(text, said.visible_text, said.latent_steps, said.decode_steps, said.finish_reason) for text, said in told]


def test_concurrent_questions_get_the_answers_of_the_cpu(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_float32(at: Path, where: str, precision: str, *rest: Any, **more: Any) -> Any:
        return load_model(at, where, "float32", *rest, **more)

    limits = PromptLimits(max_tokens=32, max_images=2)
    wanted = words(served(ServedModel(str(folder), limits, device="cpu"), rows=ROWS))
    assert any(latent_steps for _, _, latent_steps, _, _ in wanted)
    monkeypatch.setattr(opening, "load_model", in_float32)
    model = ServedModel(str(folder), limits, device=device)
    for rows in (ROWS, 1):
        assert words(served(model, rows)) == wanted


def test_the_gpu_is_taken_where_there_is_one_and_answers_in_bfloat16(folder: Path, device: str) -> None:
    model, _ = open_model(folder)
    assert model.device.type == device and model.dtype == torch.bfloat16
    told = words(served(ServedModel(str(folder), PromptLimits(max_tokens=32, max_images=2)), rows=ROWS))
    assert len(told) == ROWS
    for text, visible_text, _, decode_steps, finish_reason in told:
        assert text == visible_text and decode_steps > 0
        assert finish_reason in ("stop", "length", "length_in_segment")


def test_a_batch_that_does_not_fit_is_answered_row_by_row(device: str) -> None:
    class Said:
        visible_text = ""

    def hungry(asked: Any, on_text: Any, on_end: Any, stopped: Any) -> None:
        torch.empty((len(asked) - 1) * 2**50, dtype=torch.uint8, device=device)
        for row in range(len(asked)):
            on_end(row, Said())

    model: Any = type("Model", (), {"answer": staticmethod(hungry)})
    assert [type(event) for _, event in served(model, rows=ROWS)] == [Said] * ROWS


def test_a_lost_gpu_ends_the_serving(device: str) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ran.stdout.splitlines() == ["first error True", "second broken True"], ran.stderr[-2000:]
