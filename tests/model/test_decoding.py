"""Generation in two modes against the training forward, a cache-free decode and the stock class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

from tests import tiny
from valr_ops.data.batching import IGNORED, Batch
from valr_ops.model.decoding import (
    DecodingError,
    Generation,
    SegmentRules,
    ValrForConditionalGeneration,
    _left_padded,
    fed_slots,
    generate_answers,
)
from valr_ops.model.latents import forward
from valr_ops.model.qwen import input_embeddings, load_model, rope_positions, save_model
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import GenerationConfig, LogitsProcessorList, Qwen2_5_VLForConditionalGeneration  # noqa: E402

SLOTS = 4
CONTROL = tiny.control()
END = tiny.processor().tokenizer.eos_token_id
PAD = tiny.processor().tokenizer.pad_token_id
Prompt = tuple[list[PIL.Image.Image], str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 artifact with random weights, large enough for varied text, that likes segments and ends."""
    model: Any = tiny.model(seed=1)
    width = model.lm_head.in_features
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.language_model"):
                parameter *= 5.0
        rows = 0.15 * torch.randn(3, width, generator=torch.Generator().manual_seed(1))
        model.lm_head.weight[[CONTROL.latent, CONTROL.latent_pad, END]] = rows
    path = tmp_path_factory.mktemp("stage2")
    save_model(model, tiny.processor(), path, {"slots": SLOTS, "control_tokens": "outside"})
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ValrForConditionalGeneration:
    return load_model(folder, "cpu", "float64", ValrForConditionalGeneration)[0]


def prompts(count: int) -> list[Prompt]:
    """Ragged prompts with no, one or two images of different sizes."""
    images = [[], [tiny.image(5)], [tiny.image(6, 96, 32)], [tiny.image(7), tiny.image(8, 32, 64)]]
    return [(images[row % 4], "What is in row " + "1, " * (row % 7) + f"column {row}?") for row in range(count)]


def answers(model: Any, rows: list[Prompt], **changes: Any) -> list[Generation]:
    arguments = {"max_new_tokens": 24, "max_segments": 3} | changes
    return generate_answers(model, tiny.processor(), rows, **arguments)


def record(generation: Generation) -> tuple[Any, ...]:
    """Everything but the seconds."""
    return tuple(value for name, value in vars(generation).items() if name != "seconds")


def batch_of(inputs: Any, ids: Tensor) -> Batch:
    """One row, `ids` [1, length] after the prompt in `inputs`, as training would see it."""
    slot_mask = ids == CONTROL.latent_pad
    starts = (ids[0] == CONTROL.latent).nonzero().flatten() + 1
    pixels = inputs.get("pixel_values")
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.full_like(ids, IGNORED),
        pixel_values=pixels,
        image_grid_thw=inputs.get("image_grid_thw"),
        mm_token_type_ids=(ids == tiny.processor().image_token_id).long(),
        slot_mask=slot_mask,
        segment_rows=torch.zeros_like(starts),
        segment_starts=starts,
        targets=[None] * len(starts),
        record_ids=["row"],
    )


@torch.inference_mode()
def decode_without_cache(model: Any, prompt: Prompt, max_new_tokens: int, max_segments: int) -> list[int]:
    """The definition of decoding: every step runs the stock decoder on everything so far."""
    inputs = _left_padded(tiny.processor(), [prompt])
    ids = inputs["input_ids"]
    new: list[int] = []
    fed: list[Tensor] = []
    waiting: list[int] = []
    while sum(token != CONTROL.latent_pad for token in new) < max_new_tokens:
        batch = batch_of(inputs, ids)
        embeddings = input_embeddings(model, batch)
        if fed:
            embeddings = embeddings.masked_scatter(batch.slot_mask[..., None], torch.stack(fed))
        hidden = model.model.language_model(
            inputs_embeds=embeddings, position_ids=rope_positions(model, batch), use_cache=False
        ).last_hidden_state[0, -1]
        scores = model.lm_head(hidden)
        scores[[CONTROL.latent_pad, CONTROL.latent_end]] = float("-inf")
        if new.count(CONTROL.latent) >= max_segments:
            scores[CONTROL.latent] = float("-inf")
        token = waiting.pop(0) if waiting else int(scores.argmax())
        if token == CONTROL.latent_pad:
            fed.append(hidden)
        if token == CONTROL.latent:
            waiting = [CONTROL.latent_pad] * SLOTS + [CONTROL.latent_end]
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == END:
            break
    return new


def test_batched_rows_equal_single_rows_and_the_cache_free_decode(model: ValrForConditionalGeneration) -> None:
    rows = prompts(32)
    together = answers(model, rows)
    assert {found.segments for found in together} >= {0, 1, 2, 3}
    assert len({found.decode_steps for found in together}) > 5
    for row, found in zip(rows, together, strict=True):
        assert record(answers(model, [row])[0]) == record(found)
        ids = decode_without_cache(model, row, 24, 3)
        assert tiny.processor().tokenizer.decode(ids) == found.text


def test_generation_feeds_what_training_feeds(model: ValrForConditionalGeneration) -> None:
    rows = prompts(16)
    inputs = _left_padded(tiny.processor(), rows)
    stepped: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, given, named: stepped.append(named["inputs_embeds"]), with_kwargs=True
    )
    try:
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    finally:
        hook.remove()
    prompt_length = inputs["input_ids"].shape[1]
    fed = torch.cat(stepped[1:], dim=1)
    compared = 0
    for row, prompt in enumerate(rows):
        ids = output[row, prompt_length:-1]
        closed = (ids == CONTROL.latent_end).nonzero().flatten()
        if not len(closed):
            continue
        ids = ids[: int(closed[-1]) + 1]
        alone = _left_padded(tiny.processor(), [prompt])
        with torch.no_grad():
            trained = forward(model, batch_of(alone, torch.cat([alone["input_ids"][0], ids])[None])).slot_inputs
        found = fed[row, : len(ids)][ids == CONTROL.latent_pad]
        torch.testing.assert_close(found, trained.flatten(0, 1), atol=1e-5, rtol=1e-5)
        compared += len(trained)
    assert compared > 16


@pytest.mark.parametrize("sampled", [{"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 2.0}])
def test_plain_generate_puts_slots_inside_segments_and_nowhere_else(
    model: ValrForConditionalGeneration, sampled: dict[str, Any]
) -> None:
    inputs = _left_padded(tiny.processor(), prompts(12))
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=60, repetition_penalty=1.3, no_repeat_ngram_size=2, **sampled)
    segments = 0
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        ids = ids[: ids.index(END)] if END in ids else ids
        while CONTROL.latent in ids:
            start = ids.index(CONTROL.latent)
            block = ids[start + 1 : start + SLOTS + 2]
            assert block == ([CONTROL.latent_pad] * SLOTS + [CONTROL.latent_end])[: len(block)]
            ids[start : start + SLOTS + 2] = []
            segments += 1
        assert not {CONTROL.latent_pad, CONTROL.latent_end} & set(ids)
    assert segments > 3


def test_without_latents_it_is_the_stock_class_token_for_token(folder: Path, tmp_path: Path) -> None:
    inputs = _left_padded(tiny.processor(), prompts(12))
    stock, processor = load_model(folder, "cpu", "float32", Qwen2_5_VLForConditionalGeneration)
    suppressed = [CONTROL.latent, CONTROL.latent_end, CONTROL.latent_pad]
    wanted = stock.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=suppressed)
    save_model(stock, processor, tmp_path, {})
    base = load_model(tmp_path, "cpu", "float32", ValrForConditionalGeneration)[0]
    assert fed_slots(base.config) == 0
    assert torch.equal(base.generate(**inputs, max_new_tokens=24, do_sample=False), wanted)
    reasoner = load_model(folder, "cpu", "float32", ValrForConditionalGeneration)[0]
    for model in (stock, base, reasoner):
        for row, found in zip(
            wanted[:, inputs["input_ids"].shape[1] :].tolist(), answers(model, prompts(12), latents=False)
        ):
            row = row[: row.index(END) + 1] if END in row else row
            assert found.text == processor.tokenizer.decode(row)
            assert found.segments == found.latent_steps == 0


def test_limits_are_kept_and_named(model: ValrForConditionalGeneration) -> None:
    found = answers(model, prompts(16), max_new_tokens=10, max_segments=2, force_first_latent=True)
    for one in found:
        assert one.text.startswith("<latent>" + "<|latent_pad|>" * SLOTS + "</latent>")
        assert 1 <= one.segments <= 2
        assert one.latent_steps == SLOTS * (one.segments - (one.finish_reason == "length_in_segment"))
        assert one.decode_steps - one.latent_steps <= 10
        assert (one.finish_reason == "stop") == one.text.endswith("<|im_end|>")
        assert one.finish_reason == "stop" or one.decode_steps - one.latent_steps == 10
        assert not any(mark in one.visible_text for mark in ("<latent>", "</latent>", "<|latent_pad|>", "<|im_end|>"))
        assert one.seconds > 0
    assert {one.finish_reason for one in found} >= {"stop", "length"}
    (cut,) = answers(model, prompts(1), max_new_tokens=1, force_first_latent=True)
    assert (cut.finish_reason, cut.segments, cut.latent_steps, cut.text_tokens) == ("length_in_segment", 1, 0, 0)
    assert answers(model, []) == []


def test_the_number_of_slots_follows_the_config_and_an_experiment_may_change_it(
    model: ValrForConditionalGeneration,
) -> None:
    (two,) = answers(model, prompts(1), slots=2, max_segments=1, force_first_latent=True)
    assert two.latent_steps == 2
    settings = model.config.valr
    try:
        model.config.valr = {**settings, "control_tokens": "inside"}
        assert fed_slots(model.config) == SLOTS - 2
    finally:
        model.config.valr = settings


def test_answers_are_greedy_whatever_the_checkpoints_generation_config_says(
    model: ValrForConditionalGeneration,
) -> None:
    wanted = [record(one) for one in answers(model, prompts(6))]
    kept = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=0.9,
            top_k=5,
            top_p=0.5,
            repetition_penalty=1.5,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        assert [record(one) for one in answers(model, prompts(6))] == wanted
    finally:
        model.generation_config = kept


def test_what_latents_cannot_go_with_is_refused(model: ValrForConditionalGeneration, folder: Path) -> None:
    inputs = _left_padded(tiny.processor(), prompts(2))
    with pytest.raises(DecodingError, match="set num_beams=1"):
        model.generate(**inputs, max_new_tokens=4, num_beams=2)
    with pytest.raises(DecodingError, match="use_cache=True"):
        model.generate(**inputs, max_new_tokens=4, use_cache=False)
    with pytest.raises(DecodingError, match="output_hidden_states"):
        model.generate(**inputs, max_new_tokens=4, output_hidden_states=[1], return_dict_in_generate=True)
    with pytest.raises(DecodingError, match="the prompt contains the slot id"):
        model.generate(input_ids=torch.tensor([[1, CONTROL.latent, CONTROL.latent_pad]]), max_new_tokens=4)
    stock = load_model(folder, "cpu", "float32", Qwen2_5_VLForConditionalGeneration)[0]
    assert type(stock) is Qwen2_5_VLForConditionalGeneration
    with pytest.raises(DecodingError, match="model_class=ValrForConditionalGeneration"):
        answers(stock, prompts(1))


def test_the_rules_depend_on_nothing_but_the_ids() -> None:
    rules = SegmentRules(CONTROL, slots=2)
    text, latent, slot, close = 7, CONTROL.latent, CONTROL.latent_pad, CONTROL.latent_end
    histories = [
        [text, text, text, latent],
        [text, text, latent, slot],
        [text, latent, slot, slot],
        [latent, slot, slot, close],
    ]
    scores = rules(torch.tensor(histories), torch.zeros(4, 448))
    assert scores[:3].argmax(1).tolist() == [slot, slot, close]
    assert torch.isfinite(scores).sum(1).tolist() == [1, 1, 1, 446]
    assert not torch.isfinite(scores[3, [slot, close]]).any()


def test_a_prompt_may_end_in_an_open_segment(model: ValrForConditionalGeneration) -> None:
    inputs = _left_padded(tiny.processor(), [([], "What is in row 1?")])
    width = inputs["input_ids"].shape[1]
    rules = SegmentRules(CONTROL, SLOTS, width, force_first_latent=True)
    wanted = model.generate(**inputs, max_new_tokens=16, do_sample=False, logits_processor=LogitsProcessorList([rules]))
    opened = model.generate(input_ids=wanted[:, : width + 1], max_new_tokens=15, do_sample=False)
    assert torch.equal(opened, wanted)


def test_saving_and_loading_keeps_weights_settings_and_answers(
    model: ValrForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    reasoner = ValrForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    for loaded in (reasoner, stock):
        assert loaded.config.valr == model.config.valr
        weights = loaded.state_dict()
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    again = [record(one) for one in answers(reasoner, prompts(4), force_first_latent=True)]
    assert again == [record(one) for one in answers(model, prompts(4), force_first_latent=True)]
