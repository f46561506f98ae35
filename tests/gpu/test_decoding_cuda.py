"""Generation with latents on a GPU, over its captured step, gives the tokens of the CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.model.reasoner import SLOTS, answers, encoded, prompts, record, save_reasoner
from valr_ops.evaluation.run import open_answerer
from valr_ops.model import cached, decoding
from valr_ops.model.answering import Sampling
from valr_ops.model.decoding import ValrForConditionalGeneration
from valr_ops.model.qwen import load_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reasoner")
    save_reasoner(made)
    return made


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> Any:
    return load_model(folder, "cpu", "float32", ValrForConditionalGeneration)[0]


@pytest.fixture(scope="module")
def on_device(folder: Path, device: str) -> Any:
    return load_model(folder, device, "float32", ValrForConditionalGeneration)[0]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for every replay of a captured step."""
    counted: list[int] = []
    plain = cached._Captured.__call__

    def counting(captured: Any, arguments: Any) -> Any:
        counted.append(1)
        return plain(captured, arguments)

    monkeypatch.setattr(cached._Captured, "__call__", counting)
    return counted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"force_first_latent": True},
        {"latents": False},
        {"settle": 0.9, "force_first_latent": True},
        {"sampling": [Sampling(0.8, 0.9, seed) for seed in range(7)]},
    ],
    ids=["plain", "forced", "without latents", "settling", "sampled"],
)
def test_a_batch_of_ragged_prompts_gets_the_answers_of_the_cpu(
    on_cpu: Any, on_device: Any, replays: list[int], changes: dict[str, Any]
) -> None:
    wanted = answers(on_cpu, prompts(7), **changes)
    assert len({answer.decode_steps for answer in wanted}) > 1, "no row ends before another, so none is dropped"
    assert not replays
    found = answers(on_device, prompts(7), **changes)
    assert [record(answer) for answer in found] == [record(answer) for answer in wanted]
    assert replays
    for one, other in zip(found, wanted, strict=True):
        for segment, expected in zip(one.latents, other.latents, strict=True):
            assert segment.norm == pytest.approx(expected.norm, rel=1e-3)
            assert segment.moved == pytest.approx(expected.moved, abs=1e-3)


def test_a_single_prompt_gets_the_answer_that_it_has_in_a_batch(on_device: Any) -> None:
    together = answers(on_device, prompts(5))
    alone = [answers(on_device, [prompt])[0] for prompt in prompts(5)]
    assert [record(answer) for answer in alone] == [record(answer) for answer in together]


def test_an_answer_longer_than_the_cache_is_the_one_of_a_large_cache(
    on_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = answers(on_device, prompts(3), force_first_latent=True)
    monkeypatch.setattr(decoding, "_COLUMNS_AT_FIRST", 3)
    monkeypatch.setattr(cached, "_GROWTH_COLUMNS", 5)
    found = answers(on_device, prompts(3), force_first_latent=True)
    assert [record(answer) for answer in found] == [record(answer) for answer in wanted]


def test_a_step_is_captured_while_another_thread_allocates(
    on_device: Any, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As online teachers do for the window to come; a cache that grows at every other column is captured often."""
    monkeypatch.setattr(decoding, "_COLUMNS_AT_FIRST", 3)
    monkeypatch.setattr(cached, "_GROWTH_COLUMNS", 2)
    wanted = answers(on_device, prompts(3), force_first_latent=True)
    done = threading.Event()

    def allocate() -> int:
        kept = []
        while not done.is_set():
            # Kept, so that none is served from what the allocator has.
            kept.append(torch.empty(4096, dtype=torch.uint8, pin_memory=True))
        return len(kept)

    with ThreadPoolExecutor(1) as pool:
        allocating = pool.submit(allocate)
        try:
            found = answers(on_device, prompts(3), force_first_latent=True)
        finally:
            done.set()
    assert allocating.result() and replays
    assert [record(answer) for answer in found] == [record(answer) for answer in wanted]


def test_generate_gives_the_ids_of_the_cpu(on_cpu: Any, on_device: Any) -> None:
    given = {"max_new_tokens": 40, "do_sample": False, "force_first_latent": True}
    inputs = encoded(prompts(3))
    wanted = on_cpu.generate(**inputs, **given)
    found = on_device.generate(**inputs.to(on_device.device), **given)
    assert found.device.type == on_device.device.type
    assert torch.equal(found.cpu(), wanted)


def test_the_evaluation_answers_in_bfloat16_and_says_so(folder: Path, device: str) -> None:
    recipe = tiny.recipe(**{"runtime.device": device, "evaluation.max_new_tokens": 12})
    answerer = open_answerer("stage2_valr_s", folder, recipe)
    assert answerer.budget.precision == "bfloat16" and answerer.budget.slots == SLOTS
    generated = answerer.generate([(images, question) for images, question in prompts(4)])
    assert len(generated) == 4
    for one in generated:
        assert one.text_tokens > 0 and one.finish_reason in ("stop", "length", "length_in_segment")
