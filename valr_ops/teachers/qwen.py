"""Qwen2.5-VL's own vision tower as a teacher (tables 3 and 9): images in, the merged features its decoder reads out.

In: the folder of a checkpoint, of which the ``visual.`` part is read. Out: a `QwenTower` over normalised pixels.
Paper silent on which of the tower's tensors is the target; we choose the features after the merger, one for every
2 x 2 patches: they are what the encoder hands on. Before the merger, tokens stand in the order of attention windows.
Always: features stand row by row from the top left, and equal those that the whole model computes of the same pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from valr_ops.teachers.weights import TeacherError, load_strictly, read_weights
from valr_ops.torchvision_guard import ensure_torchvision


class QwenTower:
    """The tower and its merger.

    Args:
        config: a Qwen2_5_VLVisionConfig, the tower's part of a checkpoint's config.json.
        mean: of the checkpoint's image processor, one a channel, for pixels in [0, 1].
        std: likewise, the standard deviation.
    """

    autocast = False

    def __init__(self, config: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        ensure_torchvision()
        # Imported here because the other teachers need nothing of transformers, and it takes seconds.
        from transformers import Qwen2_5_VisionTransformerPretrainedModel

        self.mean, self.std = mean, std
        self.patch_size = config.patch_size * config.spatial_merge_size
        """Pixels on each side of a merged patch."""
        self.model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, dtype=torch.float32)

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the features beside the weights and their shapes, JSON values."""
        config = self.model.config
        names = (
            "num_heads",
            "hidden_act",
            "rope_parameters",
            "window_size",
            "spatial_merge_size",
            "temporal_patch_size",
        )
        return {name: getattr(config, name) for name in names} | {"full_blocks": list(config.fullatt_block_indexes)}

    def __call__(self, pixels: Tensor) -> Tensor:
        """Merged patch features ``[N, rows, columns, dim]`` of normalised `pixels` ``[N, 3, height, width]``."""
        config, (count, _, height, width) = self.model.config, pixels.shape
        merge, patch = config.spatial_merge_size, config.patch_size
        rows, columns = height // self.patch_size, width // self.patch_size
        # The tower takes the four patches of a merged one together, and a still image as a clip of equal frames.
        patches = pixels.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [N, rows, columns, merge, merge, 3, 1, p, p]
        frames = patches.expand(*patches.shape[:6], config.temporal_patch_size, patch, patch)
        grids = torch.tensor([[1, rows * merge, columns * merge]] * count, device=pixels.device)
        features = self.model(frames.flatten(5).flatten(0, 4), grid_thw=grids, return_dict=True).pooler_output
        return features.view(count, rows, columns, -1)


def read_tower(folder: Path, where: str) -> QwenTower:
    """The vision tower of a Qwen2.5-VL checkpoint, float32, on the CPU; of its weights, nothing else is read.

    Args:
        folder: of the checkpoint.
        where: the field and its value, for messages.

    Raises:
        TeacherError: it is no whole checkpoint, or one of another model.
    """
    if not (folder / "config.json").is_file():
        raise TeacherError(f"{where} has no config.json; give the folder of a Qwen2.5-VL checkpoint")
    ensure_torchvision()
    # Imported here because the other teachers need nothing of transformers, and it takes seconds.
    from transformers import AutoConfig, AutoImageProcessor, Qwen2_5_VLConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TeacherError(f"{where} is no whole checkpoint: {error}; copy it again") from error
    if not isinstance(config, Qwen2_5_VLConfig):
        raise TeacherError(
            f"{where} holds a model of type {config.model_type!r}; architecture qwen2_5_vl takes the tower of a "
            "Qwen2.5-VL checkpoint"
        )
    encoder = QwenTower(config.vision_config, tuple(processor.image_mean), tuple(processor.image_std))
    # Checkpoints call the tower visual., transformers since 4.52 in memory model.visual.
    load_strictly(encoder.model, read_weights(folder, where, below=r"(?:model\.)?visual\."), where=where)
    return encoder
