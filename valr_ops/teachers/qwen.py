"""Qwen2.5-VL's own vision tower as a teacher (tables 3 and 9): images in, the merged features its decoder reads out.

In: the tower's configuration, mean and standard deviation of its image processor. Out: `QwenTower`, a module over
normalised pixels; weights are loaded into it like into any other teacher, from the ``visual.`` part of a checkpoint.
Paper silent on which of the tower's tensors is the target; we choose the features after the merger, one for every
2 x 2 patches: they are what the encoder hands on. Before the merger, tokens stand in the order of attention windows.
Always: features stand row by row from the top left, and equal those that the whole model computes of the same pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from valr_ops.torchvision_guard import ensure_torchvision


class QwenTower(nn.Module):
    """The tower and its merger.

    Args:
        config: a Qwen2_5_VLVisionConfig, the tower's part of a checkpoint's config.json.
        mean: of the checkpoint's image processor, one a channel, for pixels in [0, 1].
        std: likewise, the standard deviation.
    """

    def __init__(self, config: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        ensure_torchvision()
        # Imported here because the other teachers need nothing of transformers, and it takes seconds.
        from transformers import Qwen2_5_VisionTransformerPretrainedModel

        self.mean, self.std = mean, std
        self.patch_size = config.patch_size * config.spatial_merge_size
        """Pixels on each side of a merged patch."""
        self.tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, dtype=torch.float32)

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the features beside the weights and their shapes, JSON values."""
        config = self.tower.config
        names = (
            "num_heads",
            "hidden_act",
            "rope_parameters",
            "window_size",
            "spatial_merge_size",
            "temporal_patch_size",
        )
        return {name: getattr(config, name) for name in names} | {"full_blocks": list(config.fullatt_block_indexes)}

    def forward(self, pixels: Tensor) -> Tensor:
        """Merged patch features ``[N, rows, columns, dim]`` of normalised `pixels` ``[N, 3, height, width]``."""
        config, (count, _, height, width) = self.tower.config, pixels.shape
        merge, patch = config.spatial_merge_size, config.patch_size
        rows, columns = height // self.patch_size, width // self.patch_size
        # The tower takes the four patches of a merged one together, and a still image as a clip of equal frames.
        patches = pixels.unflatten(3, (columns, merge, patch)).unflatten(2, (rows, merge, patch))
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [N, rows, columns, merge, merge, 3, 1, p, p]
        frames = patches.expand(*patches.shape[:6], config.temporal_patch_size, patch, patch)
        grids = torch.tensor([[1, rows * merge, columns * merge]] * count, device=pixels.device)
        features = self.tower(frames.flatten(5).flatten(0, 4), grid_thw=grids, return_dict=True).pooler_output
        return features.view(count, rows, columns, -1)
