"""How large each artifact is, and whether a teacher's features are one: what stages write, and fetch from each other.

In: a recipe, what is known of its corpus, the shape of its model. Out: bytes by the name of the stage. Always: of the
few artifacts that fill a disk; lists, scores, studies and pages are megabytes and count as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from valr_ops.recipe import cost
from valr_ops.recipe.cost import Shape
from valr_ops.recipe.cost_sheet import peak_flops
from valr_ops.recipe.recipe import Recipe
from valr_ops.recipe.workload import Corpus

_BYTES_A_TOKEN = 4
"""Of text, as characters or as an id."""
FEATURES = "teacher_features_"


@dataclass(frozen=True)
class Teacher:
    """A teacher as training meets it."""

    encoder: cost.Encoder
    weight_bytes: int
    target_bytes: int
    """Of the stored features of one target."""
    mode: Literal["stored", "online"]


def teacher(recipe: Recipe, name: str, corpus: Corpus, model: Shape) -> Teacher | None:
    """The teacher called `name`, or None where its class is none whose cost is known."""
    one = recipe.teachers[name]
    encoder = cost.encoder(one, model, corpus.images if one.views == "joint" else 1.0)
    if encoder is None:
        return None
    element, scale = (1, 4) if one.storage == "int8" else (2, 0)
    target_bytes = encoder.patches * (encoder.width * element + scale)
    choice = cost.choose_features(
        wish=one.features,
        images_per_second=peak_flops(recipe) * math.sqrt(math.prod(recipe.price.utilisation)) / encoder.flops,
        image_bytes=target_bytes,
        images=round(corpus.targets),
        visits=corpus.train * corpus.segments * corpus.aimed * recipe.stage2.epochs * one.trainings,
        bytes_per_second=recipe.runtime.feature_bytes_per_second,
        largest_bytes=recipe.runtime.feature_bytes,
    )
    weight_bytes = encoder.parameters * (2 if one.precision == "bfloat16" else 4)
    return Teacher(encoder, weight_bytes, target_bytes, choice.mode)


def artifact_bytes(recipe: Recipe, name: str, corpus: Corpus, model: Shape) -> int:
    """Bytes of the artifact of the stage `name`.

    Args:
        recipe: with the variant applied.
        corpus: the counted or the expected one.
        model: the shape of the base model.
    """
    text = corpus.records * recipe.price.text_tokens * _BYTES_A_TOKEN
    pictures = corpus.records * corpus.images * recipe.price.image_bytes
    match name.partition("@")[0]:
        case "sources":
            # What the user gave is listed where it is, not copied.
            drawn = [one for one in recipe.data.sources.values() if one.path is None]
            return round((pictures + text) * len(drawn) / len(recipe.data.sources)) if drawn else 0
        case "cot_corpus":
            return round(pictures + text)
        case "latent_corpus":
            return round(corpus.records * corpus.positions * _BYTES_A_TOKEN)
        case "base_model":
            return weight_bytes(model, 4 if recipe.base.from_scratch else 2)
        case "stage1_sft":
            return weight_bytes(model, 2 if recipe.stage1.precision == "bfloat16" else 4)
        case stage if stage.startswith("stage2_"):
            return weight_bytes(model, 2 if recipe.stage2.precision == "bfloat16" else 4)
        case stage if stage.startswith(FEATURES) and stage.removeprefix(FEATURES) in recipe.teachers:
            one = teacher(recipe, stage.removeprefix(FEATURES), corpus, model)
            return round(corpus.targets * one.target_bytes) if one and one.mode == "stored" else 0
    return 0


def weight_bytes(model: Shape, element: int) -> int:
    """Bytes of all weights, decoder and tower, of `element` bytes each."""
    return element * (model.decoder_parameters + model.vision_parameters)


def input_bytes(recipe: Recipe, inputs: Iterable[str], corpus: Corpus, model: Shape) -> dict[str, int]:
    """`artifact_bytes` of those of the artifacts called `inputs` that fill a disk."""
    sizes = {name: artifact_bytes(recipe, name, corpus, model) for name in inputs}
    return {name: size for name, size in sizes.items() if size}
