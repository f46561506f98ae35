"""What a training step costs: parameters, floating-point operations and bytes, from the shapes alone.

In: a recipe, or the shape of a Qwen2.5-VL. Out: numbers, all exact for the shapes given and none measured.
Conventions: a multiply-add is two FLOPs; only matrix products are counted (linear layers, attention scores and their
products with the values), not norms, activations, softmax or embedding look-ups; attention is causal in the decoder
and windowed in the vision tower; a backward pass costs twice its forward pass, and the frozen tower has none. A latent
slot is a position like any other: fed back one at a time it needs more time, not more operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from valr_ops.recipe.recipe import Recipe, TinyModelRecipe, TrainingRecipe

MERGE = 2
"""Patches on each side of the square that becomes one decoder position."""
TEMPORAL_PATCH = 2
"""Frames in a patch; a still image is shown twice."""


@dataclass(frozen=True)
class Shape:
    """The widths of a Qwen2.5-VL that decide what it costs."""

    hidden: int
    layers: int
    key_value_width: int
    """Key/value heads times head width."""
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether the head is the embedding table."""
    vision_hidden: int
    vision_layers: int
    vision_intermediate: int
    vision_patch: int
    """Pixels on each side of a patch."""
    vision_window: int
    """Patches on each side of a window."""
    vision_full_layers: int
    """Vision layers that see the whole image; the others see their window."""

    @property
    def _merged_width(self) -> int:
        return MERGE * MERGE * self.vision_hidden

    @property
    def _decoder_layer_weights(self) -> int:
        return self.hidden * (2 * self.hidden + 2 * self.key_value_width + 3 * self.intermediate)

    @property
    def _vision_layer_weights(self) -> int:
        return self.vision_hidden * (4 * self.vision_hidden + 3 * self.vision_intermediate)

    @property
    def _patch_weights(self) -> int:
        return 3 * TEMPORAL_PATCH * self.vision_patch**2 * self.vision_hidden

    @property
    def _merger_weights(self) -> int:
        return self._merged_width * (self._merged_width + self.hidden)

    @property
    def decoder_parameters(self) -> int:
        """Embedding table, blocks, final norm and head: what is trained."""
        biases_and_norms = self.hidden + 2 * self.key_value_width + 2 * self.hidden
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return tables + self.layers * (self._decoder_layer_weights + biases_and_norms) + self.hidden

    @property
    def vision_parameters(self) -> int:
        """Patch embedding, blocks and merger: what is frozen."""
        biases = 3 * self.vision_hidden + self.vision_hidden + 2 * self.vision_intermediate + self.vision_hidden
        norms = 2 * self.vision_hidden
        merger = self._merger_weights + self._merged_width + self.hidden + self.vision_hidden
        return self._patch_weights + self.vision_layers * (self._vision_layer_weights + biases + norms) + merger

    def decoder_flops(self, positions: int, labelled: int) -> int:
        """FLOPs of one forward pass over one row of `positions`, with logits at `labelled` of them."""
        linear = 2 * positions * self.layers * self._decoder_layer_weights
        attention = self.layers * 2 * self.hidden * positions * (positions + 1)
        return linear + attention + 2 * labelled * self.hidden * self.vocabulary

    def vision_flops(self, patches: int) -> int:
        """FLOPs of one forward pass of the tower and its merger over one image of `patches`."""
        linear = 2 * patches * (self._patch_weights + self.vision_layers * self._vision_layer_weights)
        seen = self.vision_full_layers * patches
        seen += (self.vision_layers - self.vision_full_layers) * min(patches, self.vision_window**2)
        merger = 2 * patches // MERGE**2 * self._merger_weights
        return linear + 4 * self.vision_hidden * patches * seen + merger


_QWEN_VISION = {
    "vision_hidden": 1280,
    "vision_layers": 32,
    "vision_intermediate": 3420,
    "vision_patch": 14,
    "vision_window": 8,
    "vision_full_layers": 4,
}
QWEN_3B = Shape(
    hidden=2048, layers=36, key_value_width=256, intermediate=11008, vocabulary=151936, tied=True, **_QWEN_VISION
)
QWEN_7B = Shape(
    hidden=3584, layers=28, key_value_width=512, intermediate=18944, vocabulary=152064, tied=False, **_QWEN_VISION
)
_PUBLISHED = {"Qwen/Qwen2.5-VL-3B-Instruct": QWEN_3B, "Qwen/Qwen2.5-VL-7B-Instruct": QWEN_7B}


def shape(recipe: Recipe) -> Shape | None:
    """The shape of the recipe's base model, or None where only its checkpoint (`base.path`) says what it is."""
    if recipe.base.from_scratch is not None:
        return _tiny_shape(recipe.base.from_scratch)
    return _PUBLISHED.get(recipe.base.hub_id or "")


def _tiny_shape(widths: TinyModelRecipe) -> Shape:
    return Shape(
        hidden=widths.hidden_size,
        layers=widths.layers,
        key_value_width=widths.key_value_heads * (widths.hidden_size // widths.attention_heads),
        intermediate=widths.intermediate_size,
        vocabulary=widths.vocabulary_size,
        tied=False,
        vision_hidden=widths.vision_hidden_size,
        vision_layers=widths.vision_layers,
        vision_intermediate=2 * widths.vision_hidden_size,
        vision_patch=widths.vision_patch_size,
        vision_window=7 * MERGE,
        vision_full_layers=1,
    )


def train_step_flops(model: Shape, *, records: int, positions: int, labelled: int, patches: int) -> int:
    """FLOPs of one optimizer update with a frozen vision tower, teachers and projectors not counted.

    Args:
        model: the shape of the model.
        records: records in the update.
        positions: decoder positions of a record, image positions and slots included.
        labelled: positions of a record whose next token is supervised.
        patches: vision patches of a record's image.
    """
    return records * (3 * model.decoder_flops(positions, labelled) + model.vision_flops(patches))


def training_bytes(model: Shape, training: TrainingRecipe, processes: int) -> int:
    """Bytes a process holds between two steps: weights, gradients and AdamW's state; activations are not counted.

    AdamW keeps two float32 moments, and a float32 copy of the weights where they are bfloat16. ZeRO-2 (`deepspeed`)
    splits gradients and state over the processes.
    """
    weight = 2 if training.precision == "bfloat16" else 4
    gradient_and_state = weight + 8 + (4 if weight == 2 else 0)
    shared = processes if training.engine == "deepspeed" else 1
    weights = weight * (model.decoder_parameters + model.vision_parameters)
    return weights + gradient_and_state * model.decoder_parameters // shared
