"""A recipe whose studies take seconds, and a model of it in float64."""

from __future__ import annotations

from typing import Any

import torch

from valr_ops.model.qwen import make_processor, tiny_model, train_tokenizer
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import BaseModelRecipe, Recipe, override
from valr_ops.studies.arms import TEACHERS
from valr_ops.studies.encoders import Encoder
from valr_ops.studies.tiles import Layout
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402

SMALL = {
    "study.model.hidden_size": 32,
    "study.model.layers": 3,
    "study.model.attention_heads": 2,
    "study.model.key_value_heads": 1,
    "study.model.intermediate_size": 48,
    "study.model.vision_hidden_size": 16,
    "study.model.tower_pretraining_steps": 20,
    "study.teacher_updates": 20,
    "study.block": 1,
    "study.side": 2,
    "study.seeds": [1, 2],
    "study.stage1_updates": 3,
    "study.updates": 3,
    "study.score_every": 2,
    "study.batch": 4,
    "study.pictures": 8,
    "alignment.projector_width": 16,
}


def recipe(**changes: Any) -> Recipe:
    """At scale tiny, with the smallest studies; dotted `changes` apply."""
    small = override(recipes.tiny(), SMALL | changes)
    return override(small, {"alignment.block": small.study.block})


def model(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Layout]:
    """In float64, of random weights."""
    widths = recipe().study.model
    processor = make_processor(train_tokenizer(["a"], widths.vocabulary_size), BaseModelRecipe(from_scratch=widths))
    return tiny_model(widths, processor, seed).double(), Layout(processor)


def teachers() -> dict[str, Encoder]:
    """Untrained, each another one."""
    made = {}
    for number, name in enumerate(TEACHERS):
        torch.manual_seed(number)
        made[name] = Encoder().eval().requires_grad_(False)
    return made
