"""The mathematics of one decoder block, for the loops that stock transformers doesn't have.

In: a Qwen2.5-VL decoder layer and hidden states. Out: queries, keys and values, attention, the rest of the block.
Always: the layer's own modules do the work, so weights, biases and precision are those of the stock forward; shapes are
[rows, heads, width, head width] inside attention and [rows, width, hidden] outside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLRMSNorm,
    rotate_half,
)

Turn = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary embedding, [rows, width, head width] each, M-RoPE sections merged."""


def normed(norm: nn.Module, hidden: Tensor) -> Tensor:
    """`hidden` through one of the decoder's RMS norms, in its type.

    The class computes it in six steps; on a GPU it is one, which saves most of the launches of a small step, and rounds
    once instead of twice.
    """
    if isinstance(norm, Qwen2_5_VLRMSNorm) and hidden.is_cuda and hidden.dtype == norm.weight.dtype:
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    result: Tensor = norm(hidden)
    return result


def heads(layer: Qwen2_5_VLDecoderLayer, projected: Tensor) -> Tensor:
    """[rows, width, heads * head width] as [rows, heads, width, head width]."""
    return projected.view(*projected.shape[:2], -1, layer.self_attn.head_dim).transpose(1, 2)


def turned(split: Tensor, turn: Turn) -> Tensor:
    """Queries or keys [rows, heads, width, head width] with their rotary embedding."""
    cosine, sine = (part.unsqueeze(1) for part in turn)
    rotated: Tensor = split * cosine + rotate_half(split) * sine
    return rotated


def query(layer: Qwen2_5_VLDecoderLayer, inputs: Tensor, turn: Turn) -> Tensor:
    """[rows, heads, width, head width], rotated; `inputs` have passed the layer's input norm."""
    return turned(heads(layer, layer.self_attn.q_proj(inputs)), turn)


def key_value(layer: Qwen2_5_VLDecoderLayer, inputs: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values, [rows, key/value heads, width, head width] each; `inputs` as for `query`."""
    key, value = (heads(layer, projection(inputs)) for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj))
    return turned(key, turn), value


def attend(
    layer: Qwen2_5_VLDecoderLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention of each position to itself and those before it, [rows, width, heads * head width].

    Args:
        mask: [rows or 1, 1, width, keys] bool, True where a position is seen; None for plain causality.
    """
    groups = layer.self_attn.num_key_value_groups
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=layer.self_attn.scaling
    )
    return attended.transpose(1, 2).flatten(2)


def attend_one(layer: Qwen2_5_VLDecoderLayer, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of a single position, [rows, 1, heads * head width].

    The query heads of a group are the rows of one product, so keys are never repeated.

    Args:
        query: [rows, heads, 1, head width].
        bias: [rows, 1, 1, keys], 0 where a position is seen and minus infinity elsewhere.
    """
    rows, count, _, width = query.shape
    grouped = query.view(rows, key.shape[1], -1, width)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=layer.self_attn.scaling)
    return attended.reshape(rows, 1, count * width)


def finish(layer: Qwen2_5_VLDecoderLayer, hidden: Tensor, attended: Tensor) -> Tensor:
    """The rest of the block after attention, [rows, width, hidden]."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(normed(layer.post_attention_layernorm, hidden))


def causal_mask(past: Tensor, own: Tensor) -> Tensor:
    """[rows, 1, width, past + width] bool: what each of `width` new positions sees.

    Args:
        past: [rows, past] bool, the positions before that may be seen.
        own: [rows, width] bool, likewise for the new ones; a position always sees itself, so no row of it is empty.
    """
    width = own.shape[1]
    before = torch.ones(width, width, dtype=torch.bool, device=own.device).tril(-1)
    itself = torch.eye(width, dtype=torch.bool, device=own.device)
    return torch.cat([past[:, None].expand(-1, width, -1), (own[:, None] & before) | itself], dim=2)[:, None]
