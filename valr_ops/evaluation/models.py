"""Who answers: a model of ours, any local vision-language model, or an endpoint, behind one function.

In: a batch of prompts, images and words. Out: one `Said` a prompt, in order.
Always: what an answer is allowed, its `Budget`, is known before the first question is asked; everyone is asked in the
same words; no code that comes with a checkpoint is run, and nothing but safetensors is loaded.
Torch is needed only where a model is opened, so that existing answers can be scored without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from valr_ops.evaluation.answers import ISOLATION
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import directory_digest

Prompt = tuple[list[PIL.Image.Image], str]

OURS, TRANSFORMERS, ENDPOINT = "valr_ops", "transformers", "endpoint"
"""Engines."""


class BudgetError(ValueError):
    """Scores reached under different budgets were to be compared: the message names the field that differs."""


class AnswererError(ValueError):
    """A model that can't be asked: which, why, and what to give instead."""


@dataclass(frozen=True)
class Said:
    """One generated answer, or the reason why there is none."""

    text: str
    """Everything generated, control tokens included; empty where `error` is not."""
    text_tokens: int
    """Tokens outside latent segments."""
    finish_reason: str
    """`stop`, `length`, `length_in_segment`, or `error`."""
    segments: int = 0
    latent_steps: int = 0
    """Slots fed."""
    seconds: float = 0.0
    """From the question to the end of the answer; answers of a batch share them."""
    error: str = ""
    """Why nothing was said; such an item is asked again by the next run and never counts as answered."""


Generate = Callable[[list[Prompt]], Sequence[Said]]
"""One answer a prompt, in order."""


@dataclass(frozen=True)
class Budget:
    """What a score was allowed; two scores are comparable only if these agree."""

    isolation: str
    """Rule that reads the answer out of the text."""
    prompt: str
    """Digest of the words around an empty question, as the model's chat template renders them."""
    engine: str
    """What generates."""
    precision: str
    decoding: str
    max_new_tokens: int
    """Text and control tokens; slots are not counted."""
    max_segments: int
    force_first_latent: bool
    min_pixels: int | None
    max_pixels: int | None
    """Bounds on an image's pixels; None where the model's own processor or endpoint decides."""
    frames: int
    """Of a video."""
    seed: int
    slots: int
    """Slots fed in a segment, 0 for a model without latents. The one field in which models differ by design."""
    latent_settle: float | None = None
    """Cosine of successive latents from which a segment ended early; None where it always had all its slots."""

    def differences(self, other: Budget, names: tuple[str, str]) -> dict[str, str]:
        """By field that differs, `slots` aside, half a sentence with both values."""
        first, second = asdict(self), asdict(other)
        return {
            field: f"{field} is {first[field]!r} for {names[0]} and {second[field]!r} for {names[1]}"
            for field in first
            if field != "slots" and first[field] != second[field]
        }

    def require_comparable(self, other: Budget, names: tuple[str, str], allowed: Sequence[str] = ()) -> None:
        """Raise `BudgetError` unless the two budgets agree in everything but `slots` and the fields `allowed`."""
        different = [said for field, said in self.differences(other, names).items() if field not in allowed]
        if different:
            raise BudgetError(
                f"{names[0]} and {names[1]} were scored under different budgets: {'; '.join(different)}. "
                "Score both again with the same evaluation settings"
            )


@dataclass(frozen=True)
class Answerer:
    """A model ready to answer."""

    name: str
    """As it stands in scores: the stage that made it, or what the user calls it."""
    generate: Generate
    budget: Budget
    digest: str
    """Of the model's folder; of an endpoint, its address and the model's name."""
    apart: bool = False
    """Whether every prompt is answered by itself, so that one of a batch may be asked again without the others."""


def open_answerer(name: str, folder: Path, recipe: Recipe, engine: str | None = None) -> Answerer:
    """The model in a local folder, answering greedily.

    A Qwen2.5-VL is decoded by this package, with latents exactly if its config says how many slots a segment has;
    any other vision-language model, or with the engine `transformers` this one too, by its own class of transformers.

    Raises:
        AnswererError: no model that transformers knows, or one that needs code of its own.
        ModelError: a Qwen2.5-VL that is not whole.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AnswererError(
            f"{folder} holds no model ({error}); give a folder with config.json and safetensors"
        ) from None
    ours = config.get("model_type") == "qwen2_5_vl" and engine != TRANSFORMERS
    opened = _open_ours if ours else _open_auto
    return opened(name, folder, recipe)


def open_endpoint_model(name: str, url: str, model: str, recipe: Recipe) -> Answerer:
    """A model behind an OpenAI-compatible endpoint, such as ``https://api.openai.com/v1`` or our own ``valr serve``."""
    from valr_ops.evaluation.endpoint import open_endpoint

    ask = open_endpoint(url, model, recipe.evaluation.max_new_tokens)
    budget = _budget(recipe, ENDPOINT, precision="as served", prompt=_words(""), pixels=(None, None), slots=0)
    return Answerer(name, lambda prompts: ask(_worded(prompts)), budget, digest([url, model]), apart=True)


def _open_ours(name: str, folder: Path, recipe: Recipe) -> Answerer:
    import torch

    from valr_ops.data.rewriting import prompt_messages
    from valr_ops.model.answering import generate_answers
    from valr_ops.model.decoding import ValrForConditionalGeneration, fed_slots
    from valr_ops.model.qwen import load_model

    torch.set_num_threads(recipe.runtime.threads)
    torch.manual_seed(recipe.seed)
    precision = _precision(recipe)
    model, processor = load_model(folder, recipe.runtime.device, precision, ValrForConditionalGeneration, plain=True)
    slots = fed_slots(model.config)
    limits = recipe.evaluation
    prompt = processor.apply_chat_template(prompt_messages("", 1), add_generation_prompt=True, tokenize=False)
    size = processor.image_processor.size

    def generate(prompts: list[Prompt]) -> Sequence[Said]:
        return [
            Said(one.text, one.text_tokens, one.finish_reason, one.segments, one.latent_steps, one.seconds)
            for one in generate_answers(
                model,
                processor,
                prompts,
                max_new_tokens=limits.max_new_tokens,
                max_segments=limits.max_segments,
                force_first_latent=limits.force_first_latent and slots > 0,
                settle=limits.latent_settle,
            )
        ]

    pixels = int(size["shortest_edge"]), int(size["longest_edge"])
    budget = _budget(recipe, OURS, precision, prompt, pixels, slots)
    return Answerer(name, generate, budget, directory_digest(folder))


def _open_auto(name: str, folder: Path, recipe: Recipe) -> Answerer:
    import time

    import torch

    from valr_ops.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(recipe.runtime.threads)
    torch.manual_seed(recipe.seed)
    precision = _precision(recipe)
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=getattr(torch, precision)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AnswererError(
            f"{folder} can't be opened as a vision-language model of transformers ({str(error).splitlines()[0]}); give "
            "a folder with config.json, processor and safetensors of an architecture that needs no code of its own"
        ) from None
    model = model.to(recipe.runtime.device).eval()
    processor.tokenizer.padding_side = "left"

    def messages(images: list[PIL.Image.Image], words: str) -> list[dict[str, Any]]:
        shown = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": words}]}]

    @torch.inference_mode()
    def generate(prompts: list[Prompt]) -> Sequence[Said]:
        started = time.perf_counter()
        inputs = processor.apply_chat_template(
            [messages(images, words) for images, words in _worded(prompts)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(model.device, dtype=model.dtype)
        limit = recipe.evaluation.max_new_tokens
        written = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), processor.tokenizer.eos_token_id}
        return [_said(processor.tokenizer, row, ends, time.perf_counter() - started) for row in written.tolist()]

    prompt = processor.apply_chat_template(messages([], _words("")), add_generation_prompt=True, tokenize=False)
    budget = _budget(recipe, TRANSFORMERS, precision, prompt, (None, None), slots=0)
    return Answerer(name, generate, budget, directory_digest(folder))


def _said(tokenizer: Any, ids: list[int], ends: set[int], seconds: float) -> Said:
    """The answer in a row of ids, which are padded after its end."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[: end + 1]
    text = tokenizer.decode(kept, skip_special_tokens=False)
    return Said(text, len(kept), "length" if end is None else "stop", seconds=seconds)


def _worded(prompts: list[Prompt]) -> list[Prompt]:
    return [(images, _words(question)) for images, question in prompts]


def _words(question: str) -> str:
    """A question as our own models are asked it."""
    from valr_ops.data.rewriting import prompt_messages

    return str(prompt_messages(question, 0)[0]["content"][-1]["text"])


def _precision(recipe: Recipe) -> str:
    return "bfloat16" if recipe.runtime.device == "cuda" else "float32"


def _budget(
    recipe: Recipe, engine: str, precision: str, prompt: str, pixels: tuple[int | None, int | None], slots: int
) -> Budget:
    limits = recipe.evaluation
    return Budget(
        isolation=ISOLATION,
        prompt=digest(prompt),
        engine=engine,
        precision=precision,
        decoding="greedy",
        max_new_tokens=limits.max_new_tokens,
        max_segments=limits.max_segments,
        force_first_latent=limits.force_first_latent,
        min_pixels=pixels[0],
        max_pixels=pixels[1],
        frames=limits.frames,
        seed=recipe.seed,
        slots=slots,
        latent_settle=limits.latent_settle,
    )


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
