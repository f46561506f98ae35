"""Vision transformers of transformers, for checkpoints in its layout: DINOv2, DINOv3, SigLIP and CLIP vision models.

In: a folder with config.json, preprocessor_config.json and safetensors, of the vision model alone or of the pair with
its text model. Out: a `HuggingFaceVision` with these weights.
Always: no code of the folder is run; every tensor of the vision model is used; features are those of the last block
after the model's final norm, CLIP's too, whose class applies it to the class token only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from valr_ops.recipe.recipe import TeacherRecipe
from valr_ops.teachers.weights import TeacherError, refuse_unfit, weight_files
from valr_ops.torchvision_guard import ensure_torchvision

FINAL_NORM = {
    "dinov2": None,
    "dinov2_with_registers": None,
    "dinov3_vit": None,
    "siglip_vision_model": None,
    "clip_vision_model": "post_layernorm",
}
"""Model types that can be teachers, and the norm that is still to be applied to their last hidden state."""
_TEXT_MODEL = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_PREFIX_TOKENS = ("cls_token", "class_embedding", "register_tokens")
_OF_NO_EFFECT = {"transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"}


class HuggingFaceVision:
    """Patch tokens of a vision model of transformers.

    Args:
        model: of one of the types of `FINAL_NORM`.
        mean: of the checkpoint's image processor, one a channel, for pixels in [0, 1].
        std: likewise, the standard deviation.
    """

    autocast = False

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.model, self.mean, self.std = model, mean, std
        self.patch_size = int(model.config.patch_size)
        self.prefix_tokens = sum(
            parameter.numel() // model.config.hidden_size
            for name, parameter in model.named_parameters()
            if name.endswith(_PREFIX_TOKENS)
        )
        """Class token and registers: those that the model has parameters for."""

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the features beside the weights, JSON values."""
        described = self.model.config.to_diff_dict()
        return {key: value for key, value in described.items() if key not in _OF_NO_EFFECT}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features ``[N, rows, columns, dim]`` of normalised `pixels` ``[N, 3, height, width]``."""
        config, (height, width) = self.model.config, pixels.shape[2:]
        rows, columns = height // self.patch_size, width // self.patch_size
        # DINOs take any size by themselves.
        foreign = config.model_type not in ("dinov2", "dinov2_with_registers", "dinov3_vit") and (
            (height, width) != (config.image_size, config.image_size)
        )
        tokens = self.model(pixels, **({"interpolate_pos_encoding": True} if foreign else {})).last_hidden_state
        if tokens.shape[1] != self.prefix_tokens + rows * columns:
            raise TeacherError(
                f"{config.model_type} gave {tokens.shape[1]} tokens for {rows} x {columns} patches and "
                f"{self.prefix_tokens} class and register tokens; it can't be a teacher"
            )
        norm = FINAL_NORM[config.model_type]
        patches = tokens[:, self.prefix_tokens :]
        return (patches if norm is None else getattr(self.model, norm)(patches)).unflatten(1, (rows, columns))


def read_vision_model(name: str, recipe: TeacherRecipe, folder: Path, where: str) -> HuggingFaceVision:
    """The vision model in `folder`, float32, on the CPU.

    Args:
        name: the teacher's, for messages.
        recipe: its `model` is the model type.
        folder: a checkpoint in the layout of transformers.
        where: the field and its value, for messages.

    Raises:
        TeacherError: an unknown type, a folder of another one, a file that isn't there, or weights that don't fit.
    """
    if recipe.model not in FINAL_NORM:
        raise TeacherError(
            f"teachers.{name}.model={recipe.model!r} is no vision model of transformers that can be a teacher; choose "
            f"{', '.join(FINAL_NORM)}, or a class of timm with architecture=timm"
        )
    if not (folder / "config.json").is_file():
        raise TeacherError(f"{where} has no config.json; give the folder of a checkpoint in the layout of transformers")
    weight_files(folder, where)
    ensure_torchvision()
    # Imported here because the other teachers need nothing of transformers, and it takes seconds.
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    mean, std = _normalisation(folder, where)
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # Its bar says nothing about a local file, and what does not fit is an error here: no table of it in the log.
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True)
        config = getattr(whole, "vision_config", whole)
        if config.model_type != recipe.model:
            raise TeacherError(f"{where} holds {config.model_type!r}; set teachers.{name}.model to that if it is meant")
        model, found = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except TeacherError:
        raise
    except Exception as error:  # transformers has no exception of its own for a damaged checkpoint
        raise TeacherError(f"{where} is no whole checkpoint: {error}; copy it again") from error
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
    misshapen = [f"{key} {list(given)} instead of {list(wanted)}" for key, given, wanted in found["mismatched_keys"]]
    unexpected = [key for key in found["unexpected_keys"] if not key.startswith(_TEXT_MODEL)]
    refuse_unfit(where, sorted(found["missing_keys"]), sorted(unexpected), sorted(misshapen))
    return HuggingFaceVision(model, mean, std)


def _normalisation(folder: Path, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the folder's image processor, for pixels in [0, 1]. Raises `TeacherError`."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise TeacherError(f"{where} has no {path.name}, which holds mean and standard deviation; copy it from the hub")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (tuple(map(float, described[key])) for key in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError) as error:
        raise TeacherError(
            f"{where}: {path.name} gives no image_mean and image_std: {error!r}; copy it again"
        ) from error
    return mean, std
