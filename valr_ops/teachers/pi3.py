"""π³: permutation-equivariant visual geometry, the part of it that makes features.

In: views of one scene, ``[batch, views, 3, height, width]``, normalised by the checkpoint's own mean and standard
deviation. Out: patch features ``[batch, views, rows, columns, 2 x width]``, the outputs of the decoder's last two
blocks side by side.
Always: no view is the reference (permuting the views permutes the features), a scene may have a single view, and the
names and shapes of parameters are those of the public checkpoint ``yyfz233/Pi3``, without its geometry heads.

Written from the description of the architecture in the paper (arXiv 2507.13347); blocks are timm's where they agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402
from timm.layers import Mlp, resample_abs_pos_embed  # noqa: E402
from timm.models.vision_transformer import LayerScale  # noqa: E402

HEAD_PREFIXES = ("point_decoder.", "point_head.", "conf_decoder.", "conf_head.", "camera_decoder.", "camera_head.")
"""Parameters of the public checkpoint that turn features into geometry: not built, ignored when weights are read."""

REGISTER_TOKENS = 5
ROPE_BASE = 100.0


class Pi3(nn.Module):
    """Image encoder (DINOv2 with registers) and decoder (alternating frame and global attention) of π³.

    Args:
        encoder: timm's name of the image encoder; width, heads and patch size of the decoder are the encoder's.
        decoder_depth: number of decoder blocks, 36 in the public checkpoint. Even blocks attend within a view, odd ones
            across all views of a scene.
        **encoder_arguments: passed to timm, e.g. ``embed_dim`` or ``img_size`` (of the learned position table).

    Raises:
        ValueError: a decoder depth that is odd or zero, heads that 2-D rotary positions can't split in four, or an
            image encoder without class and register tokens.
    """

    def __init__(
        self, encoder: str = "vit_large_patch14_reg4_dinov2", decoder_depth: int = 36, **encoder_arguments: Any
    ) -> None:
        super().__init__()
        if decoder_depth < 2 or decoder_depth % 2:
            raise ValueError(f"decoder_depth={decoder_depth} must be even and at least 2: blocks alternate in pairs")
        self._arguments = {"decoder_depth": decoder_depth, **encoder_arguments}
        self.encoder = Encoder(encoder, **encoder_arguments)
        width, heads = self.encoder.width, self.encoder.heads
        if width % (4 * heads):
            raise ValueError(f"embed_dim={width} with num_heads={heads}: the width of a head must be a multiple of 4")
        self.register_token = nn.Parameter(torch.randn(1, 1, REGISTER_TOKENS, width) * 1e-6)
        self.decoder = nn.ModuleList(Block(width, heads) for _ in range(decoder_depth))
        self.register_buffer("image_mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.image_mean: Tensor
        self.image_std: Tensor

    autocast = True
    """In bfloat16 the residual stream stays float32, as in the authors' own use; a cast of the weights would not."""

    @property
    def model(self) -> Pi3:
        """The module whose parameters carry the names of the checkpoint."""
        return self

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.encoder.patch_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the checkpoint, one a channel, for pixels in [0, 1]."""
        return tuple(self.image_mean.flatten().tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise, the standard deviation."""
        return tuple(self.image_std.flatten().tolist())

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the features beside the weights, JSON values."""
        return {"arguments": self._arguments}

    def forward(self, pixels: Tensor) -> Tensor:
        """Features ``[N, rows, columns, dim]`` of normalised images ``[N, 3, height, width]``, each seen alone."""
        return self.joint(pixels[:, None])[:, 0]

    def joint(self, images: Tensor) -> Tensor:
        """Features of all views of each scene, seen together.

        Args:
            images: normalised, ``[batch, views, 3, height, width]``; sides are multiples of `patch_size`.

        Returns:
            ``[batch, views, rows, columns, dim]``: channels of the last frame block, then of the last global block.
            They are neither normalised nor centred. Features of a view alone and beside others differ.
        """
        batch, views, _, height, width = images.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        tokens = self.encoder(images.flatten(0, 1))
        tokens = torch.cat([self.register_token[0].expand(batch * views, -1, -1), tokens], dim=1)
        length = tokens.shape[1]
        cos, sin = rotary_table(rows, columns, tokens.shape[2] // self.encoder.heads, tokens.dtype, tokens.device)
        joint_cos, joint_sin = cos.repeat(views, 1), sin.repeat(views, 1)
        last_two = []
        for index, block in enumerate(self.decoder):
            if index % 2 == 0:
                tokens = block(tokens.reshape(batch * views, length, -1), cos, sin)
            else:
                tokens = block(tokens.reshape(batch, views * length, -1), joint_cos, joint_sin)
            if index >= len(self.decoder) - 2:
                last_two.append(tokens.reshape(batch, views, length, -1))
        features = torch.cat(last_two, dim=-1)[:, :, REGISTER_TOKENS:]
        return features.unflatten(2, (rows, columns))


class Encoder(nn.Module):
    """DINOv2 with registers: timm's patch embedding, blocks and norm, with π³'s own position table.

    timm folds the class token's position into the token; the public checkpoint keeps a row of the table for it, so the
    table is built here. Class and register tokens are dropped from the output.
    """

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__()
        vit: Any = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **arguments)
        if getattr(vit, "cls_token", None) is None or getattr(vit, "reg_token", None) is None:
            raise ValueError(
                f"{name} has no class or register tokens; the image encoder is vit_large_patch14_reg4_dinov2"
            )
        self.width: int = vit.embed_dim
        self.heads: int = vit.blocks[0].attn.num_heads
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.cls_token: nn.Parameter = vit.cls_token
        self.register_tokens: nn.Parameter = vit.reg_token
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + vit.patch_embed.num_patches, self.width) * 0.02)
        self.patch_embed: Any = vit.patch_embed
        self.blocks: nn.Module = vit.blocks
        self.norm: nn.Module = vit.norm

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[N, 3, height, width]`` to patch tokens ``[N, rows * columns, width]``."""
        count, _, height, width = images.shape
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(count, -1, -1), patches], dim=1)
        grid = [height // self.patch_size, width // self.patch_size]
        tokens = tokens + resample_abs_pos_embed(self.pos_embed, grid, num_prefix_tokens=1)
        # Registers carry no position: they come in after the table was added.
        registers = self.register_tokens.expand(count, -1, -1)
        tokens = self.norm(self.blocks(torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)))
        return tokens[:, 1 + registers.shape[1] :]


class Block(nn.Module):
    """Pre-norm transformer block with rotary attention and layer scale, ``[N, length, width]`` to the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = RotaryAttention(width, heads)
        self.ls1 = LayerScale(width, init_values=0.01)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.ls2 = LayerScale(width, init_values=0.01)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens), cos, sin))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class RotaryAttention(nn.Module):
    """Attention with a LayerNorm over each head's queries and keys, then 2-D rotary positions on both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads)
        self.k_norm = nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [N, heads, L, d]
        q = rotate(self.q_norm(q).to(v.dtype), cos, sin)
        k = rotate(self.k_norm(k).to(v.dtype), cos, sin)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotary_table(
    rows: int, columns: int, head_width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of one view's tokens, each ``[registers + rows * columns, head_width]``, row-major.

    The first half of a head turns with the row, the second with the column, both counted from one; registers stand at
    (0, 0) and do not turn. Angles are at least float32: the authors' bfloat16 path rounds them (compare in float32).
    """
    precise = torch.promote_types(dtype, torch.float32)
    grid = torch.cartesian_prod(torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device))
    positions = torch.cat([grid.new_zeros(REGISTER_TOKENS, 2), grid]).to(precise)
    pairs = head_width // 4
    frequencies = ROPE_BASE ** (-torch.arange(pairs, dtype=precise, device=device) / pairs)
    angles = (positions[:, :, None] * frequencies).repeat_interleave(2, dim=1).flatten(1)  # row, row, column, column
    return angles.cos(), angles.sin()


def rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (j, j + quarter) of a half of the head by its angle; ``[N, heads, length, head_width]``."""
    first, second = tokens.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return (tokens * cos + turned * sin).to(tokens.dtype)
