"""What a training step costs: parameters, floating-point operations and bytes, from the shapes alone.

In: a recipe, or the shape of a Qwen2.5-VL. Out: numbers, all exact for the shapes given and none measured.
Conventions: a multiply-add is two FLOPs; only matrix products are counted (linear layers, attention scores and their
products with the values), not norms, activations, softmax or embedding look-ups; attention is causal in the decoder,
so half of the square counts, and windowed in the vision tower; a backward pass costs twice its forward pass, and the
frozen tower has none. These are model FLOPs: a latent slot is a position like any other, and what an implementation
does beside (roll-out, feedback hops, activations computed again) makes utilisation lower, not the count higher.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from valr_ops.recipe.recipe import Recipe, TeacherRecipe, TinyModelRecipe, TrainingRecipe

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

    @property
    def block_parameters(self) -> int:
        """Matrices of all decoder blocks: what a single position reads from memory."""
        return self.layers * self._decoder_layer_weights

    @property
    def cached_per_position(self) -> int:
        """Numbers that a key/value cache holds of one position."""
        return 2 * self.layers * self.key_value_width

    def kept_for_backward(self, positions: int, checkpointed: bool) -> int:
        """Numbers that the decoder keeps of `positions` until their backward pass.

        Of a block: two norms, queries, attention and two sums as wide as the hidden state, keys and values, and four
        of the MLP's width. Checkpointed blocks keep their input, and one block at a time is computed again.
        """
        inside = 6 * self.hidden + 2 * self.key_value_width + 4 * self.intermediate
        return positions * (self.layers * self.hidden + inside if checkpointed else self.layers * inside)

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


_VIT_WIDTHS = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24), "so400m": (1152, 27)}
"""Width and blocks of timm's vision transformers, by the word in their names."""
_PREFIX_TOKENS = 5
"""Class and register tokens of DINOv2, DINOv3 and pi3; the encoders without them cost 2 % less."""


@dataclass(frozen=True)
class Encoder:
    """What a teacher costs, counted as `Shape` counts; an MLP is four times as wide as its block."""

    parameters: int
    patches: int
    """Of one image."""
    width: int
    """Of a patch feature."""
    flops: int
    """FLOPs of one view, of `encoder`'s number of them seen together."""


def encoder(teacher: TeacherRecipe, model: Shape, views: float) -> Encoder | None:
    """What a teacher costs, or None where its class is none of those that the paper's teachers are of.

    Args:
        teacher: its recipe.
        model: whose vision tower a teacher may be.
        views: how many images pi3 sees together; global attention grows with them.
    """
    if teacher.architecture == "qwen2_5_vl":
        patches = (teacher.image_pixels // model.vision_patch) ** 2
        merged = patches // MERGE**2
        return Encoder(model.vision_parameters, merged, model.hidden, model.vision_flops(patches))
    named = re.match(r"vit_([a-z0-9]+)_patch(\d+)_", teacher.model)
    if named is None or named[1] not in _VIT_WIDTHS:
        return None
    width, blocks = _VIT_WIDTHS[named[1]]
    width, blocks = teacher.arguments.get("embed_dim", width), teacher.arguments.get("depth", blocks)
    patches = (teacher.image_pixels // int(named[2])) ** 2
    tokens = patches + _PREFIX_TOKENS
    frame_blocks, global_blocks = blocks, 0
    if teacher.architecture == "pi3":
        global_blocks = teacher.arguments.get("decoder_depth", 36) // 2
        frame_blocks += global_blocks
    linear = (frame_blocks + global_blocks) * 24 * tokens * width**2
    attention = 4 * tokens**2 * width * (frame_blocks + global_blocks * views)
    return Encoder(
        parameters=12 * width**2 * (frame_blocks + global_blocks),
        patches=patches,
        # The last two blocks of pi3 side by side.
        width=2 * width if global_blocks else width,
        flops=round(linear + attention),
    )


def shape(recipe: Recipe) -> Shape | None:
    """The shape of the recipe's base model, or None where only its checkpoint (`base.path`) says what it is."""
    if recipe.base.from_scratch is not None:
        return _tiny_shape(recipe.base.from_scratch, tied=recipe.base.language_model is not None)
    return _PUBLISHED.get(recipe.base.hub_id or "")


def _tiny_shape(widths: TinyModelRecipe, tied: bool) -> Shape:
    return Shape(
        hidden=widths.hidden_size,
        layers=widths.layers,
        key_value_width=widths.key_value_heads * (widths.hidden_size // widths.attention_heads),
        intermediate=widths.intermediate_size,
        vocabulary=widths.vocabulary_size,
        tied=tied,
        vision_hidden=widths.vision_hidden_size,
        vision_layers=widths.vision_layers,
        vision_intermediate=2 * widths.vision_hidden_size,
        vision_patch=widths.vision_patch_size,
        vision_window=7 * MERGE,
        vision_full_layers=1,
    )


def shape_of(config: Any) -> Shape:
    """The shape of a loaded model, from its transformers `Qwen2_5_VLConfig`."""
    text, vision = config.get_text_config(), config.vision_config
    return Shape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        key_value_width=text.num_key_value_heads * (text.hidden_size // text.num_attention_heads),
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        vision_hidden=vision.hidden_size,
        vision_layers=vision.depth,
        vision_intermediate=vision.intermediate_size,
        vision_patch=vision.patch_size,
        vision_window=vision.window_size // vision.patch_size,
        vision_full_layers=len(vision.fullatt_block_indexes),
    )


def batch_flops(model: Shape, rows: Iterable[tuple[int, int]], frames: Iterable[int]) -> int:
    """FLOPs of a forward and backward pass with a frozen vision tower, teachers and projectors not counted.

    Args:
        model: the shape of the model.
        rows: of every record the decoder positions, image positions and slots included, and how many of them have a
            supervised next token.
        frames: patches of every image or pair of video frames; the tower sees each by itself.
    """
    decoder = sum(model.decoder_flops(positions, labelled) for positions, labelled in rows)
    return 3 * decoder + sum(model.vision_flops(patches) for patches in frames)


def train_step_flops(model: Shape, *, records: int, positions: int, labelled: int, patches: int) -> int:
    """`batch_flops` of one optimizer update of like records with one image each.

    Args:
        model: the shape of the model.
        records: records in the update.
        positions: decoder positions of a record, image positions and slots included.
        labelled: positions of a record whose next token is supervised.
        patches: vision patches of a record's image.
    """
    return records * batch_flops(model, [(positions, labelled)], [patches])


_PEAK_TFLOPS: Mapping[str, tuple[float, float]] = {
    "A100": (19.5, 312),
    "H100 PCIe": (51, 756),
    "H100 NVL": (60, 835),
    "H100": (67, 989),
    "H200 NVL": (60, 836),
    "H200": (67, 989),
    "GH200": (67, 989),
    "B200": (75, 2250),
    "A40": (37.4, 149.7),
    "RTX A6000": (38.7, 154.8),
    "L4": (30.3, 121),
    "L40S": (91.6, 362),
    "RTX 3090": (35.6, 71),
    "RTX 4090": (82.6, 165.2),
}
"""By words of a device's name: float32 without and bfloat16 with tensor cores, dense, from the maker's data sheets."""


def peak_flops(device: str, precision: Literal["float32", "bfloat16"]) -> float | None:
    """FLOPs a second that a GPU can do at most, or None for one that is not in the table or only a part of one.

    Args:
        device: its name, as `torch.cuda.get_device_name` gives it, e.g. "NVIDIA A100-SXM4-80GB".
        precision: of the products.
    """
    words = set(re.split(r"[\s-]+", device))
    if "MIG" in words:
        return None
    for name, (float32, bfloat16) in _PEAK_TFLOPS.items():
        if words.issuperset(name.split()):
            return 1e12 * (bfloat16 if precision == "bfloat16" else float32)
    return None


def training_memory(model: Shape, training: TrainingRecipe, processes: int, projectors: int = 0) -> dict[str, int]:
    """Bytes that a process holds between two steps, by what they are; activations are not counted.

    ZeRO-2 (`deepspeed`, and always where there are several processes) keeps the weights in the precision of the
    products and splits float32 gradients, AdamW's two moments and a float32 copy of the weights over the processes.
    Plain torch keeps float32 weights, of which a forward pass makes copies in bfloat16.

    Args:
        model: the shape of the model.
        training: of the stage.
        processes: GPUs that train together.
        projectors: parameters of the projectors, trained beside the decoder.
    """
    element = 2 if training.precision == "bfloat16" else 4
    trained = model.decoder_parameters + projectors
    every = trained + model.vision_parameters
    if training.engine == "deepspeed" or processes > 1:
        return {
            "weights": element * every,
            "gradients": 4 * trained // processes,
            "float32 copy of the weights": 4 * trained // processes,
            "moments": 8 * trained // processes,
        }
    copies = {"bfloat16 copy of the weights": 2 * trained} if element == 2 else {}
    return {"weights": 4 * every, **copies, "gradients": 4 * trained, "moments": 8 * trained}


def training_bytes(model: Shape, training: TrainingRecipe, processes: int) -> int:
    """The sum of `training_memory`, without projectors."""
    return sum(training_memory(model, training, processes).values())


def projector_parameters(model: Shape, feature_width: int, width: int) -> int:
    """Parameters of one projector: three linear layers from the decoder's width to the teacher's."""
    return (model.hidden + 1) * width + (width + 1) * width + (width + 1) * feature_width


@dataclass(frozen=True)
class FeatureChoice:
    """Whether training reads a teacher's features from disk or computes them, and why."""

    mode: Literal["stored", "online"]
    reason: str
    """One sentence with the numbers."""
    seconds: Mapping[str, float]
    """``online_seconds`` and ``stored_seconds``, where a speed was given."""


def choose_features(
    *,
    wish: Literal["auto", "online", "stored"],
    images_per_second: float | None,
    image_bytes: int,
    images: int,
    visits: float,
    bytes_per_second: float,
    largest_bytes: float,
) -> FeatureChoice:
    """The cheaper of two ways: computing features at every visit, or once, then writing them and reading them.

    Args:
        wish: what the recipe says; only `auto` weighs.
        images_per_second: of the encoder, measured, decoding included; needed for `auto`.
        image_bytes: of one image's stored features.
        images: distinct ones.
        visits: how often training asks for one, over all epochs and trainings.
        bytes_per_second: of the disk.
        largest_bytes: a larger store is refused.
    """
    store = images * image_bytes
    size = f"{images:,} images, {store / 1e9:,.3g} GB stored"
    if wish != "auto":
        return FeatureChoice(wish, f"features are {wish}, as the recipe says; {size}", {})
    assert images_per_second is not None
    online = visits / images_per_second
    stored = images / images_per_second + (store + visits * image_bytes) / bytes_per_second
    seconds = {"online_seconds": online, "stored_seconds": stored}
    numbers = (
        f"{images_per_second:,.4g} images/s, {visits:,.0f} visits to {size}: online {online:,.4g} s, "
        f"stored {stored:,.4g} s with a disk of {bytes_per_second / 1e9:g} GB/s"
    )
    if store > largest_bytes:
        bound = f"the store would be larger than runtime.feature_bytes={largest_bytes:g}"
        return FeatureChoice("online", f"features are online, because {bound}; {numbers}", seconds)
    mode: Literal["stored", "online"] = "stored" if stored < online else "online"
    return FeatureChoice(mode, f"features are {mode}, the cheaper way; {numbers}", seconds)
