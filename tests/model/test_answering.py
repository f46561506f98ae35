"""Batches of answers against a cache-free decode, rows against their neighbours, and what is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import tiny
from tests.model.reasoner import (
    CONTROL,
    END,
    PAD,
    SLOTS,
    VOCABULARY,
    Question,
    answers,
    batch_of,
    encoded,
    prompts,
    record,
    save_reasoner,
)
from valr_ops.data.rewriting import prompt_messages
from valr_ops.model.answering import Generation, Sampling
from valr_ops.model.decoding import DecodingError, LatentSegment, ValrForConditionalGeneration
from valr_ops.model.latents import forward
from valr_ops.model.qwen import input_embeddings, load_model, rope_positions
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import GenerationConfig  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ValrForConditionalGeneration:
    folder = tmp_path_factory.mktemp("stage2")
    save_reasoner(folder)
    return load_model(folder, "cpu", "float64", ValrForConditionalGeneration)[0]


@contextmanager
def head(model: Any, scores: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`model` with another head: from states [rows, hidden] to `scores` [rows, vocabulary]."""

    class Head(torch.nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return scores(states)

    kept, model.lm_head = model.lm_head, Head()
    try:
        yield
    finally:
        model.lm_head = kept


@torch.inference_mode()
def decode_without_cache(
    model: Any, rows: list[Question], max_new_tokens: int, max_segments: int, settle: float = 2.0
) -> list[list[int]]:
    """The definition of decoding: every step runs the stock decoder on everything so far."""
    inputs = encoded(rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    # What follows is text, whichever ids it has: its positions are known from the start.
    most = max_new_tokens + SLOTS * max_segments
    mask = F.pad(mask, (0, most), value=1)
    positions = rope_positions(model, batch_of(inputs, F.pad(ids, (0, most)), mask))
    embedded = input_embeddings(model, batch_of(inputs, ids, mask[:, : ids.shape[1]]))
    new: list[list[int]] = [[] for _ in rows]
    used = [-1 for _ in rows]
    last_fed = torch.zeros(len(rows), embedded.shape[-1], dtype=embedded.dtype)
    live = list(range(len(rows)))
    while live:
        length = embedded.shape[1]
        states = model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=mask[live, :length],
            position_ids=positions[:, live, :length],
            use_cache=False,
        ).last_hidden_state[:, -1]
        scores = model.lm_head(states)
        scores[:, [CONTROL.latent_pad, CONTROL.latent_end]] = float("-inf")
        fed, going_on = [], []
        for place, (row, state) in enumerate(zip(live, states, strict=True)):
            if new[row].count(CONTROL.latent) >= max_segments:
                scores[place, CONTROL.latent] = float("-inf")
            settled = used[row] > 0 and float(F.cosine_similarity(state, last_fed[row], dim=0)) >= settle
            if used[row] == SLOTS or settled:
                token, used[row] = CONTROL.latent_end, -1
            elif used[row] >= 0:
                token, used[row], last_fed[row] = CONTROL.latent_pad, used[row] + 1, state
            else:
                token = int(scores[place].argmax())
                used[row] = 0 if token == CONTROL.latent else -1
            new[row].append(token)
            if token != END and sum(one != CONTROL.latent_pad for one in new[row]) < max_new_tokens:
                fed.append(state if token == CONTROL.latent_pad else model.get_input_embeddings().weight[token])
                going_on.append(place)
        if fed:
            embedded = torch.cat([embedded[going_on], torch.stack(fed)[:, None]], dim=1)
        live = [live[place] for place in going_on]
    return new


def test_a_hundred_ragged_rows_equal_the_cache_free_decode(model: ValrForConditionalGeneration) -> None:
    rows = prompts(100)
    together = answers(model, rows, max_new_tokens=12)
    wanted = [tiny.processor().tokenizer.decode(ids) for ids in decode_without_cache(model, rows, 12, 3)]
    assert [found.text for found in together] == wanted
    assert {found.segments for found in together} >= {0, 1, 2, 3}
    assert {found.finish_reason for found in together} >= {"stop", "length"}
    assert len({found.decode_steps for found in together}) > 5


def test_batched_rows_equal_single_rows(model: ValrForConditionalGeneration) -> None:
    rows = prompts(16)
    sampling = [Sampling(temperature=1.5 * (row % 2), top_p=0.9, seed=row) for row in range(16)]
    limits = [8 + row for row in range(16)]
    together = answers(model, rows, sampling=sampling, max_new_tokens=limits)
    for row, found in enumerate(together):
        (alone,) = answers(model, rows[row : row + 1], sampling=sampling[row], max_new_tokens=limits[row])
        assert record(alone) == record(found)
        for mine, theirs in zip(alone.latents, found.latents, strict=True):
            assert mine.norm == pytest.approx(theirs.norm)
            assert mine.moved == pytest.approx(theirs.moved, abs=1e-6)


def test_limits_are_kept_and_named(model: ValrForConditionalGeneration) -> None:
    found = answers(model, prompts(16), max_new_tokens=10, max_segments=2, force_first_latent=True)
    for one in found:
        assert one.text.startswith("<latent>" + "<|latent_pad|>" * SLOTS + "</latent>")
        assert 1 <= one.segments <= 2
        assert [segment.slots for segment in one.latents if segment.slots] == [SLOTS] * (
            one.segments - (one.finish_reason == "length_in_segment")
        )
        assert one.decode_steps - one.latent_steps <= 10
        assert (one.finish_reason == "stop") == one.text.endswith("<|im_end|>")
        assert one.finish_reason == "stop" or one.decode_steps - one.latent_steps == 10
        assert not any(mark in one.visible_text for mark in ("<latent>", "</latent>", "<|latent_pad|>", "<|im_end|>"))
        assert one.seconds > 0
    assert {one.finish_reason for one in found} >= {"stop", "length"}
    (cut,) = answers(model, prompts(1), max_new_tokens=1, force_first_latent=True)
    assert (cut.finish_reason, cut.segments, cut.latent_steps, cut.text_tokens) == ("length_in_segment", 1, 0, 0)
    assert answers(model, []) == []
    with pytest.raises(DecodingError, match="max_new_tokens=0"):
        answers(model, prompts(2), max_new_tokens=[3, 0])


def test_a_row_ends_at_the_models_last_position_and_a_longer_prompt_is_refused(
    model: ValrForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = answers(model, prompts(1), force_first_latent=True)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", whole.prompt_tokens + 3)
    (cut,) = answers(model, prompts(1), force_first_latent=True)
    assert (cut.finish_reason, cut.decode_steps) == ("length_in_segment", 3)
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", whole.prompt_tokens)
    with pytest.raises(DecodingError, match=f"a prompt has {whole.prompt_tokens} tokens"):
        answers(model, prompts(1))


def test_a_segment_ends_early_when_its_states_have_settled(model: ValrForConditionalGeneration) -> None:
    rows = prompts(24)
    plain = answers(model, rows, force_first_latent=True)
    assert answers(model, rows, force_first_latent=True, settle=None, max_new_tokens=1)[0].latent_steps == 0
    never = answers(model, rows, force_first_latent=True, settle=1.0)
    assert [record(one) for one in never] == [record(one) for one in plain]
    at_once = answers(model, rows, force_first_latent=True, settle=-1.0)
    used = [segment.slots for one in at_once for segment in one.latents]
    assert set(used) <= {0, 1} and used.count(1) >= len(rows)
    moves = sorted(1.0 - moved for one in plain for segment in one.latents for moved in segment.moved)
    middle = sum(moves[len(moves) // 2 :][:2]) / 2
    found = answers(model, rows, max_new_tokens=10, settle=middle)
    wanted = decode_without_cache(model, rows, 10, 3, settle=middle)
    assert [one.text for one in found] == [tiny.processor().tokenizer.decode(ids) for ids in wanted]
    assert len({segment.slots for one in found for segment in one.latents}) > 1


def test_figures_of_a_segment_are_those_of_the_states_that_were_fed(model: ValrForConditionalGeneration) -> None:
    row = prompts(2)[1:]
    (found,) = answers(model, row, force_first_latent=True, max_new_tokens=2)
    inputs = encoded(row)
    ids = torch.cat(
        [inputs["input_ids"], torch.tensor([[CONTROL.latent, *[CONTROL.latent_pad] * SLOTS, CONTROL.latent_end]])], 1
    )
    with torch.no_grad():
        batch = batch_of(inputs, ids, torch.ones_like(ids))
        states = forward(model, batch).slot_inputs[0]
        text = input_embeddings(model, batch)[0][: inputs["input_ids"].shape[1]]
    text = text[batch.mm_token_type_ids[0, : len(text)] == 0]
    (segment,) = found.latents
    assert segment.slots == SLOTS
    assert segment.norm == pytest.approx(float(states.norm(dim=-1).mean() / text.norm(dim=-1).mean()))
    moved = [1.0 - float(F.cosine_similarity(states[n + 1], states[n], dim=0)) for n in range(SLOTS - 1)]
    assert segment.moved == pytest.approx(moved, abs=1e-6)


def test_answers_are_greedy_whatever_the_checkpoints_generation_config_says(
    model: ValrForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [record(one) for one in answers(model, prompts(6))]
    sampled = GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_k=5,
        top_p=0.5,
        repetition_penalty=1.5,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    monkeypatch.setattr(model, "generation_config", sampled)
    assert [record(one) for one in answers(model, prompts(6))] == wanted


def test_sampling_follows_its_seed_its_temperature_and_its_nucleus(model: ValrForConditionalGeneration) -> None:
    rows = prompts(1) * 24
    seeds = [Sampling(temperature=1.0, seed=seed) for seed in range(24)]
    drawn = [one.text for one in answers(model, rows, sampling=seeds, force_first_latent=True)]
    assert [one.text for one in answers(model, rows, sampling=seeds, force_first_latent=True)] == drawn
    assert len(set(drawn)) > 12
    opening = "<latent>" + "<|latent_pad|>" * SLOTS + "</latent>"
    assert all(text.startswith(opening) and "<|latent_pad|>" not in text.replace(opening, "") for text in drawn)
    pieces: list[str] = []
    with head(model, lambda states: torch.zeros(len(states), VOCABULARY)):
        answers(model, prompts(1), sampling=Sampling(seed=5), on_text=lambda row, piece: pieces.append(piece))
    assert len(set(pieces)) > 6
    greedy = answers(model, prompts(1))[0].text
    for nearly_greedy in (Sampling(temperature=0.0), Sampling(temperature=1e-6), Sampling(top_p=1e-9, seed=3)):
        assert answers(model, prompts(1), sampling=nearly_greedy)[0].text == greedy


def test_the_shares_of_sampled_ids_are_the_models(model: ValrForConditionalGeneration) -> None:
    with torch.no_grad():
        logits = model(**encoded(prompts(1))).logits[0, -1]
    logits[[CONTROL.latent, CONTROL.latent_end, CONTROL.latent_pad]] = float("-inf")
    shares, order = logits.div(0.7).softmax(0).sort(descending=True)
    nucleus = int((shares.cumsum(0) - shares < 0.5).sum())
    wanted = shares[:nucleus] / shares[:nucleus].sum()
    samplings = [Sampling(temperature=0.7, top_p=0.5, seed=seed) for seed in range(400)]
    found = answers(model, prompts(1) * 400, sampling=samplings, max_new_tokens=1, latents=False)
    texts = [one.text for one in found]
    likeliest = [tiny.processor().tokenizer.decode([int(token)]) for token in order[:nucleus]]
    assert set(texts) <= set(likeliest)
    assert nucleus > 1
    assert texts.count(likeliest[0]) / 400 == pytest.approx(float(wanted[0]), abs=0.1)


def test_text_streams_in_whole_characters_and_adds_up(model: ValrForConditionalGeneration) -> None:
    rows = prompts(12)
    pieces: list[list[str]] = [[] for _ in rows]
    segments: list[list[LatentSegment]] = [[] for _ in rows]
    found = answers(
        model,
        rows,
        force_first_latent=True,
        sampling=Sampling(temperature=3.0, seed=2),
        on_text=lambda row, piece: pieces[row].append(piece),
        on_segment=lambda row, segment: segments[row].append(segment),
    )
    assert ["".join(row) for row in pieces] == [one.visible_text for one in found]
    assert [tuple(row) for row in segments] == [one.latents for one in found]
    assert max(map(len, pieces)) > 3


def test_no_piece_of_streamed_text_ends_inside_a_character(model: ValrForConditionalGeneration) -> None:
    tokenizer = tiny.processor().tokenizer
    ids = tokenizer.encode("é 漢 🙂")
    assert len(ids) > 6
    dictated = iter(ids)

    pieces: list[str] = []
    with head(model, lambda states: F.one_hot(torch.tensor([next(dictated)]), VOCABULARY)):
        (found,) = answers(model, prompts(1), max_new_tokens=len(ids), on_text=lambda row, piece: pieces.append(piece))
    assert "".join(pieces) == found.visible_text == "é 漢 🙂"
    assert {"é", "漢", "🙂"} <= {piece.strip() for piece in pieces}


def test_a_cancelled_row_ends_and_its_neighbours_go_on(model: ValrForConditionalGeneration) -> None:
    rows = prompts(6)
    wanted = [record(one) for one in answers(model, rows, force_first_latent=True)]
    steps = 0

    def stopped(row: int) -> bool:
        nonlocal steps
        steps += row == 2
        return row == 2 and steps == 3

    found = [record(one) for one in answers(model, rows, force_first_latent=True, stopped=stopped)]
    cancelled = found.pop(2)
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.text == "<latent>" + "<|latent_pad|>" * 2
    assert cancelled.latents == (LatentSegment(2, 0.0, ()),)
    del wanted[2]
    assert found == wanted
    all_cancelled = answers(model, rows, stopped=lambda row: True)
    assert {one.decode_steps for one in all_cancelled} == {1}


def test_prompts_may_be_chat_messages(model: ValrForConditionalGeneration) -> None:
    images, question = prompts(2)[1]
    (turn,) = prompt_messages(question, 1)
    for part in turn["content"]:
        if part["type"] == "image":
            part["image"] = images[0]
    chat = [{"role": "system", "content": "Be brief."}, turn]
    plain, longer = answers(model, [[turn], chat])
    assert record(plain) == record(answers(model, [(images, question)])[0])
    assert longer.prompt_tokens > plain.prompt_tokens


def test_sampling_out_of_range_is_refused() -> None:
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}):
        with pytest.raises(DecodingError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_a_row_that_ends_is_told_at_once_and_only_once(model: ValrForConditionalGeneration) -> None:
    rows = prompts(8)
    limits = [4, 30, 5, 30, 4, 30, 6, 3]
    told: list[tuple[int, Any]] = []
    found = answers(
        model,
        rows,
        max_new_tokens=limits,
        force_first_latent=True,
        on_text=lambda row, piece: told.append((row, piece)),
        on_end=lambda row, answer: told.append((row, answer)),
        stopped=lambda row: row == 5,
    )
    ends = {row: (place, said) for place, (row, said) in enumerate(told) if isinstance(said, Generation)}
    assert [ends[row][1] for row in range(8)] == found
    assert sum(isinstance(said, Generation) for _, said in told) == 8
    order = sorted(ends, key=lambda row: ends[row][0])
    assert [found[row].decode_steps for row in order] == sorted(one.decode_steps for one in found)
    assert found[5].finish_reason == "cancelled"
    assert max(place for place, (row, _) in enumerate(told) if row == 0) == ends[0][0], "nothing follows a row's end"
    assert [found[row].seconds for row in order] == sorted(one.seconds for one in found)
    longest = order[-1]
    said_after = [row for row, said in told[ends[order[0]][0] :] if isinstance(said, str)]
    assert longest in said_after, "the first end is told while others go on"
