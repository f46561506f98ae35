"""The two modes of decoding and transformers' `generate`, against the training forward and the stock class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny
from tests.model.reasoner import (
    CONTROL,
    END,
    PAD,
    SLOTS,
    answers,
    batch_of,
    encoded,
    prompts,
    record,
    save_reasoner,
)
from valr_ops.data.rewriting import ControlTokens
from valr_ops.model.answering import generate_answers
from valr_ops.model.cached import CachedDecoder
from valr_ops.model.decoding import DecodingError, Grammar, SegmentRules, ValrForConditionalGeneration, fed_slots
from valr_ops.model.latents import forward
from valr_ops.model.qwen import load_model, save_model
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import (  # noqa: E402
    Qwen2_5_VLForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage2")
    save_reasoner(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ValrForConditionalGeneration:
    return load_model(folder, "cpu", "float64", ValrForConditionalGeneration)[0]


def test_generation_feeds_what_training_feeds(
    model: ValrForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = prompts(12)
    inputs = encoded(rows)
    stepped: list[Tensor] = []
    step = CachedDecoder.step

    def recorded(decoder: CachedDecoder, fed: Tensor, *others: Tensor) -> Tensor:
        stepped.append(fed)
        return step(decoder, fed, *others)

    monkeypatch.setattr(CachedDecoder, "step", recorded)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, force_first_latent=True)
    monkeypatch.undo()
    fed = torch.stack(stepped, dim=1)
    compared = 0
    for row, prompt in enumerate(rows):
        ids = output[row, inputs["input_ids"].shape[1] :]
        closed = (ids == CONTROL.latent_end).nonzero().flatten()
        ids = ids[: int(closed[-1]) + 1]
        alone = encoded([prompt])
        whole = torch.cat([alone["input_ids"][0], ids])[None]
        with torch.no_grad():
            trained = forward(model, batch_of(alone, whole, torch.ones_like(whole))).slot_inputs
        found = fed[row, (ids == CONTROL.latent_pad).nonzero().flatten()]
        torch.testing.assert_close(found, trained.flatten(0, 1), atol=1e-9, rtol=1e-9)
        compared += len(trained)
    assert compared >= len(rows)


@pytest.mark.parametrize("sampled", [{"do_sample": False}, {"do_sample": True, "top_k": 20, "temperature": 2.0}])
def test_plain_generate_puts_slots_inside_segments_and_nowhere_else(
    model: ValrForConditionalGeneration, sampled: dict[str, Any]
) -> None:
    inputs = encoded(prompts(12))
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


def test_no_processor_of_scores_brings_back_what_the_grammar_rules_out(model: ValrForConditionalGeneration) -> None:
    def insistent(ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.zeros_like(scores)
        scores[:, CONTROL.latent_pad] = 100.0
        scores[:, CONTROL.latent] = 50.0
        return scores

    inputs = encoded(prompts(2))
    output = model.generate(**inputs, max_new_tokens=9, do_sample=False, max_segments=1, logits_processor=[insistent])
    segment = [CONTROL.latent, *[CONTROL.latent_pad] * SLOTS, CONTROL.latent_end]
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        assert row[: len(segment)] == segment
        assert not set(segment) & set(row[len(segment) :])


def test_without_latents_it_is_the_stock_class_token_for_token(folder: Path, tmp_path: Path) -> None:
    inputs = encoded(prompts(12))
    stock, processor = load_model(folder, "cpu", "float32", Qwen2_5_VLForConditionalGeneration)
    suppressed = [CONTROL.latent, CONTROL.latent_end, CONTROL.latent_pad]
    wanted = stock.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=suppressed)
    save_model(stock, processor, tmp_path, {})
    stage1 = load_model(tmp_path, "cpu", "float32", ValrForConditionalGeneration)[0]
    assert fed_slots(stage1.config) == 0
    assert torch.equal(stage1.generate(**inputs, max_new_tokens=24, do_sample=False), wanted)
    reasoner = load_model(folder, "cpu", "float32", ValrForConditionalGeneration)[0]
    assert torch.equal(reasoner.generate(**inputs, max_new_tokens=24, do_sample=False, latents=False), wanted)
    for model in (stock, stage1, reasoner):
        for row, found in zip(
            wanted[:, inputs["input_ids"].shape[1] :].tolist(),
            answers(model, prompts(12), latents=False),
            strict=True,
        ):
            row = row[: row.index(END) + 1] if END in row else row
            assert found.text == processor.tokenizer.decode(row)
            assert found.segments == found.latent_steps == 0


def test_a_prompt_with_a_video_is_generated_from_as_the_stock_class_does(folder: Path) -> None:
    made = tiny.processor()
    clip = np.stack([np.asarray(tiny.image(frame, 96, 32)) for frame in range(12)])
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What moves?"}]}
    inputs = made(
        text=[made.apply_chat_template([turn], add_generation_prompt=True)],
        images=[tiny.image(3)],
        videos=[clip],
        do_sample_frames=False,
        return_tensors="pt",
    )
    stock, _ = load_model(folder, "cpu", "float32", Qwen2_5_VLForConditionalGeneration)
    suppressed = [CONTROL.latent, CONTROL.latent_end, CONTROL.latent_pad]
    wanted = stock.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=suppressed)
    reasoner = load_model(folder, "cpu", "float32", ValrForConditionalGeneration)[0]
    assert torch.equal(reasoner.generate(**inputs, max_new_tokens=24, do_sample=False, latents=False), wanted)
    assert inputs["video_grid_thw"][0, 0] > 1


def test_a_plain_checkpoint_without_control_tokens_generates_as_the_stock_class(folder: Path, tmp_path: Path) -> None:
    inputs = encoded(prompts(8))
    stock, processor = load_model(folder, "cpu", "float32", Qwen2_5_VLForConditionalGeneration)
    del stock.config.valr
    wanted = stock.generate(**inputs, max_new_tokens=20, do_sample=False)
    stock.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    base = ValrForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(base.generate(**inputs, max_new_tokens=20, do_sample=False), wanted)
    # With its own token ids all of the vocabulary is open, whatever the last row of the table is.
    assert [one.segments for one in answers(base, prompts(2))] == [0, 0]


def test_the_number_of_slots_follows_the_config_and_an_experiment_may_change_it(
    model: ValrForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    (two,) = answers(model, prompts(1), slots=2, max_segments=1, force_first_latent=True)
    assert two.latent_steps == 2
    monkeypatch.setattr(model.config, "valr", {**model.config.valr, "control_tokens": "inside"})
    assert fed_slots(model.config) == SLOTS - 2
    with pytest.raises(DecodingError, match="set it to 3 or more"):
        fed_slots(model.config, 2)
    monkeypatch.setattr(model.config, "valr", {"stage": 1})
    with pytest.raises(DecodingError, match="this model has no latents"):
        fed_slots(model.config, 2)


def test_a_streamer_of_transformers_gets_the_text_and_no_slots(model: ValrForConditionalGeneration) -> None:
    class Ids(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    inputs = encoded(prompts(2)[1:])
    streamer = Ids()
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False, force_first_latent=True, streamer=streamer)[
        0
    ].tolist()
    assert streamer.seen == [token for token in output if token != CONTROL.latent_pad]
    assert streamer.ended and CONTROL.latent_pad in output
    words = TextIteratorStreamer(tiny.processor().tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=30, do_sample=False, force_first_latent=True, streamer=words)
    new = output[inputs["input_ids"].shape[1] :]
    assert "".join(words) == tiny.processor().tokenizer.decode(new, skip_special_tokens=True)
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(**encoded(prompts(2)), max_new_tokens=2, streamer=words)


def test_stop_strings_and_several_returns_work_as_in_transformers(model: ValrForConditionalGeneration) -> None:
    inputs = encoded(prompts(4))
    plain = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    width = inputs["input_ids"].shape[1]
    word = tiny.processor().tokenizer.decode(plain[1, width + 2 : width + 3])
    stopped = model.generate(
        **inputs, max_new_tokens=16, do_sample=False, stop_strings=[word], tokenizer=tiny.processor().tokenizer
    )
    assert word in tiny.processor().tokenizer.decode(stopped[1, width : width + 3])
    assert (stopped[1, width + 3 :] == PAD).all()
    # Without a seed of its own a draw differs; at no temperature all returns of a prompt are the same.
    twice = model.generate(**inputs, max_new_tokens=16, do_sample=True, temperature=1e-6, num_return_sequences=2)
    assert torch.equal(twice[0::2], twice[1::2])
    assert torch.equal(twice[0::2, : plain.shape[1]], plain[:, : twice.shape[1]])


def test_what_this_class_cannot_do_is_refused(model: ValrForConditionalGeneration) -> None:
    inputs = encoded(prompts(2))
    for refused, fix in (
        ({"num_beams": 2}, "set num_beams=1"),
        ({"prompt_lookup_num_tokens": 2}, "leave assistant models out"),
        ({"use_cache": False}, "use_cache=True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"past_key_values": object()}, "past_key_values"),
    ):
        with pytest.raises(DecodingError, match=fix):
            model.generate(**inputs, max_new_tokens=4, **refused)
    with pytest.raises(DecodingError, match="a prompt contains the slot id"):
        model.generate(input_ids=torch.tensor([[1, CONTROL.latent, CONTROL.latent_pad]]), max_new_tokens=4)
    returned = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(returned.sequences, model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_a_row_follows_the_grammar_whatever_its_neighbours_do() -> None:
    control = ControlTokens(latent=1, latent_end=2, latent_pad=3)
    grammar = Grammar(SegmentRules(slots=2, max_segments=1), control, torch.tensor([7, 1, 7]), pad=0)
    free = -1
    assert grammar.forced().tolist() == [free, 3, free]
    for ids, forced in (
        ([1, 3, 7], [3, 3, free]),
        ([3, 3, 7], [3, 2, free]),
        ([3, 2, 1], [2, free, 3]),
        ([2, 7, 3], [free, free, 3]),
    ):
        grammar.advance(torch.tensor(ids))
        assert grammar.forced().tolist() == forced
    scores = grammar.rule_out(torch.zeros(3, 8))
    assert [torch.isfinite(row).nonzero().flatten().tolist() for row in scores] == [[0, 4, 5, 6, 7]] * 3
    grammar.finished[2] = True
    assert grammar.forced().tolist() == [free, free, 0]
    grammar.keep(torch.tensor([2, 0]))
    grammar.advance(torch.tensor([1, 7]))
    assert grammar.forced().tolist() == [0, free]


def test_a_prompt_may_end_in_an_open_segment(model: ValrForConditionalGeneration) -> None:
    inputs = encoded([([], "What is in row 1?")])
    width = inputs["input_ids"].shape[1]
    wanted = model.generate(**inputs, max_new_tokens=16, do_sample=False, force_first_latent=True)
    opened = model.generate(input_ids=wanted[:, : width + 1], max_new_tokens=15, do_sample=False)
    assert torch.equal(opened, wanted)


def test_saving_and_loading_keeps_weights_settings_and_answers(folder: Path, tmp_path: Path) -> None:
    model = ValrForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    (tmp_path / "first").mkdir()
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second", processor=tiny.processor())
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert {"chat_template.jinja", "config.json", "model.safetensors", "processor_config.json"} <= set(names)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["valr"] == model.config.valr
    reasoner, processor = load_model(tmp_path / "first", "cpu", "float64", ValrForConditionalGeneration)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "first", dtype=torch.float64)
    for loaded in (reasoner, stock):
        weights = loaded.state_dict()
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    again = generate_answers(reasoner, processor, prompts(4), max_new_tokens=24, max_segments=3)
    assert [record(one) for one in again] == [record(one) for one in answers(model, prompts(4))]


def test_a_model_that_was_made_in_memory_is_saved_with_a_processor_only(tmp_path: Path) -> None:
    made = ValrForConditionalGeneration(tiny.model().config)
    with pytest.raises(DecodingError, match="processor="):
        made.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_tied_tables_are_written_once_and_are_tied_again_when_loaded(tmp_path: Path) -> None:
    config = tiny.model().config
    config.tie_word_embeddings = True
    made = ValrForConditionalGeneration(config)
    made.save_pretrained(tmp_path, processor=tiny.processor(), max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert not [name for shard in shards for name in load_file(shard) if name.startswith("lm_head")]
    loaded = ValrForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in made.state_dict().items())


def test_an_export_is_used_and_saved_again_without_the_training_extras(folder: Path, tmp_path: Path) -> None:
    code = f"""
import sys, torch
from valr_ops.model.decoding import ValrForConditionalGeneration
model = ValrForConditionalGeneration.from_pretrained({str(folder)!r})
print(model.generate(torch.tensor([[5, 6, {CONTROL.latent}]]), max_new_tokens={SLOTS + 1}, do_sample=False).tolist())
model.save_pretrained({str(tmp_path)!r})
print(sorted({{"deepspeed", "mlflow", "dagster", "timm", "great_expectations"}} & set(sys.modules)))
"""
    checkout = Path(__file__).resolve().parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    ids, extras = ran.stdout.splitlines()
    assert json.loads(ids)[0][2:] == [CONTROL.latent, *[CONTROL.latent_pad] * SLOTS, CONTROL.latent_end]
    assert extras == "[]"
    (tmp_path / "projectors.safetensors").touch()
    again = ValrForConditionalGeneration.from_pretrained(tmp_path)
    assert not [name for name in again.state_dict() if "projector" in name]
