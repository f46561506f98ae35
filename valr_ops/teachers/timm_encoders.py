"""Encoders of timm: vision transformers and their patch tokens, convolutional networks and a stage's feature map.

In: the recipe's class, arguments and layer, and a folder's config.json in timm's own layout where there is one. Out: a
`VisionTransformer` or a `FeatureMap` with random weights, whose `model` is timm's module.
Always: mean and standard deviation are those of the model's configuration; prefix tokens are dropped.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from valr_ops.recipe.recipe import TeacherRecipe
from valr_ops.teachers.weights import TeacherError
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402

_CELL_PIXELS = 16
"""Stride of the stage at which a convolutional network is read unless the recipe names one."""


class VisionTransformer:
    """Patch tokens of a timm transformer, after the final norm or, with `layer`, as that block hands them on.

    Args:
        model: with class token, registers or none; its rotary table, where it has one, is replaced by a fixed one.
        layer: zero-based, negative from the end.
        image_pixels: side of the images that it will see.
        configuration: timm's, with ``mean`` and ``std``, and the ``arguments`` that the model was made with.

    Raises:
        ValueError: no such layer.
    """

    autocast = False

    def __init__(self, model: Any, layer: int | None, image_pixels: int, configuration: dict[str, Any]) -> None:
        self.model = model
        self.layer = _index(layer, len(self.model.blocks), "blocks")
        self.settings = {"layer": self.layer, "arguments": configuration["arguments"]}
        """What changes the features beside the weights, JSON values."""
        self.patch_size = int(self.model.patch_embed.patch_size[0])
        self.mean, self.std = tuple(configuration["mean"]), tuple(configuration["std"])
        if hasattr(getattr(self.model, "rope", None), "get_embed") and not getattr(self.model, "rope_mixed", False):
            side = max(1, image_pixels // self.patch_size)
            self.model.rope = _FixedRotary(self.model.rope.get_embed(shape=[side, side]))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features ``[N, rows, columns, dim]`` of normalised `pixels` ``[N, 3, height, width]``."""
        grid = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        if self.layer is None:
            tokens = self.model.forward_features(pixels)[:, self.model.num_prefix_tokens :]
        else:
            (tokens,) = self.model.forward_intermediates(
                pixels, indices=[self.layer], output_fmt="NLC", stop_early=True, intermediates_only=True
            )
        return tokens.unflatten(1, grid)


class FeatureMap:
    """The output of one stage of a timm network, for those without patch tokens.

    Args:
        model: offers ``feature_info`` and ``forward_intermediates``.
        layer: which of its stages, negative from the end; None takes the deepest one of stride 16.
        configuration: timm's, with ``mean`` and ``std``, and the ``arguments`` that the model was made with.

    Raises:
        ValueError: no such stage.
    """

    autocast = False

    def __init__(self, model: Any, layer: int | None, configuration: dict[str, Any]) -> None:
        self.model = model
        strides = [int(stage["reduction"]) for stage in model.feature_info]
        if layer is None and _CELL_PIXELS not in strides:
            raise ValueError(f"no stage has stride {_CELL_PIXELS}; choose one by layer, they have strides {strides}")
        deepest = len(strides) - 1 - strides[::-1].index(_CELL_PIXELS) if layer is None else layer
        self.layer = _index(deepest, len(strides), "stages")
        self.settings = {"layer": self.layer, "arguments": configuration["arguments"]}
        """What changes the features beside the weights, JSON values."""
        self.patch_size = strides[deepest]
        self.mean, self.std = tuple(configuration["mean"]), tuple(configuration["std"])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features ``[N, rows, columns, dim]`` of normalised `pixels` ``[N, 3, height, width]``."""
        (features,) = self.model.forward_intermediates(
            pixels, indices=[self.layer], output_fmt="NCHW", stop_early=True, intermediates_only=True
        )
        return features.permute(0, 2, 3, 1)


class _FixedRotary(nn.Module):
    """A rotary table for one grid in place of timm's, which builds it on the CPU at every call.

    It stays float32 when weights are cast, as timm's does: timm's is computed anew after a cast.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.table = self.table.to(function(self.table[:0]).device)
        return super()._apply(function, recurse)

    def get_embed(self, shape: list[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Sines and cosines ``[rows * columns, 2 * head width]``; the grid is the one that the teacher has."""
        return self.table if dtype is None else self.table.to(dtype)


def build_timm(name: str, recipe: TeacherRecipe, folder: Path | None) -> VisionTransformer | FeatureMap:
    """The encoder with random weights.

    Args:
        name: the teacher's, for messages.
        recipe: class, arguments and layer.
        folder: where its weights lie, if that's a folder; a config.json of timm in it gives mean, standard deviation
            and arguments that the recipe doesn't.

    Raises:
        TeacherError: an unknown model, argument or layer, a size that it can't take, or a folder of another model.
    """
    described = _described(name, recipe, folder)
    known_model(name, recipe)
    arguments = described.get("model_args", {}) | recipe.arguments
    try:
        model: Any = timm.create_model(recipe.model, pretrained=False, **arguments | {"num_classes": 0})
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise unbuildable(name, recipe, error) from error
    configuration = model.pretrained_cfg | described.get("pretrained_cfg", {}) | {"arguments": arguments}
    has_patch_tokens = hasattr(model, "num_prefix_tokens") and hasattr(model, "patch_embed")
    if has_patch_tokens:
        _check_size(name, recipe, model)
    try:
        if has_patch_tokens:
            return VisionTransformer(model, recipe.layer, recipe.image_pixels, configuration)
        return FeatureMap(model, recipe.layer, configuration)
    except ValueError as error:
        raise TeacherError(f"teachers.{name}.layer={recipe.layer} of {recipe.model}: {error}") from error


def classifier_prefixes(model: Any) -> tuple[str, ...]:
    """Names of parameters of a timm checkpoint that are not built: the classifier's."""
    classifiers = model.pretrained_cfg["classifier"]
    return tuple(f"{part}." for part in ([classifiers] if isinstance(classifiers, str) else classifiers or []))


def known_model(name: str, recipe: TeacherRecipe) -> None:
    """Raise `TeacherError` where timm has no class of the recipe's name."""
    if not timm.is_model(recipe.model):
        close = difflib.get_close_matches(recipe.model.split(".")[0], timm.list_models(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; timm.list_models() shows the names"
        raise TeacherError(f"teachers.{name}.model={recipe.model!r} is no model of timm{hint}")


def unbuildable(name: str, recipe: TeacherRecipe, error: Exception) -> TeacherError:
    """What to say when a class does not take the recipe's arguments."""
    from timm.models import vision_transformer

    accepted = inspect.signature(vision_transformer.VisionTransformer.__init__).parameters
    known = [*(["decoder_depth"] if recipe.architecture == "pi3" else []), *accepted]
    wrong = [argument for argument in recipe.arguments if argument not in known]
    close = [match for argument in wrong for match in difflib.get_close_matches(argument, known, n=1)]
    hint = f"did you mean {', '.join(close)}?" if close else "such as embed_dim, depth, num_heads, img_size, patch_size"
    return TeacherError(f"teachers.{name}.arguments={recipe.arguments} can't build {recipe.model}: {error}; {hint}")


def _check_size(name: str, recipe: TeacherRecipe, model: Any) -> None:
    native = model.patch_embed.img_size
    if not getattr(model, "dynamic_img_size", False) and native != (recipe.image_pixels, recipe.image_pixels):
        raise TeacherError(
            f"teachers.{name}.image_pixels={recipe.image_pixels}, but {recipe.model} takes {native[0]} px only; "
            f"set it to {native[0]}, or set arguments.img_size for weights of that size"
        )


def _described(name: str, recipe: TeacherRecipe, folder: Path | None) -> dict[str, Any]:
    """A folder's config.json in timm's layout, checked against the recipe; empty where there is none."""
    path = folder / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        architecture = described.get("architecture")
        tag = described.get("pretrained_cfg", {}).get("tag", "")
    except (ValueError, AttributeError) as error:
        raise TeacherError(f"teachers.{name}: {path} can't be read: {error!r}; copy the checkpoint again") from error
    if architecture is None:
        kind = described.get("model_type")
        fix = f"set architecture=transformers and model={kind}" if kind else "give the folder of a timm model"
        raise TeacherError(f"teachers.{name}: {path} names no architecture of timm; {fix}")
    wanted, _, wanted_tag = recipe.model.partition(".")
    if architecture != wanted or (tag and wanted_tag and tag != wanted_tag):
        found = f"{architecture}.{tag}" if tag else architecture
        raise TeacherError(f"teachers.{name}.model={recipe.model!r}, but {path} describes {found}; set model to that")
    return described


def _index(layer: int | None, count: int, kind: str) -> int | None:
    if layer is None:
        return None
    if not -count <= layer < count:
        raise ValueError(f"it has {count} {kind}, so a layer between {-count} and {count - 1}")
    return layer % count
