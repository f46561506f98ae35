"""Records of a batch one behind the other in a single row, without padding, each attending to itself only.

In: a padded batch's mask. Out: a `Pack` that gathers [batch, length, ...] tensors into [1, T, ...] and finds positions
again, and attention over such a row. Padding then costs nothing, however unequal the records are.
Always: a record's states and gradients don't depend on its neighbours; `leak` measures that on a real batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer  # noqa: E402


class PackingError(RuntimeError):
    """A record of a packed row saw another one: results would be wrong, so nothing is trained."""


@dataclass(frozen=True)
class Pack:
    """Where the positions of a padded batch stand in the packed row of T positions."""

    rows: Tensor
    """[T] int64, row in the batch."""
    columns: Tensor
    """[T] int64, column in the batch."""
    lengths: list[int]
    """Positions of each record."""
    places: Tensor
    """[batch, length] int64: the inverse; 0 at padding."""

    def gather(self, padded: Tensor) -> Tensor:
        """[1, T, ...] of [batch, length, ...]."""
        return padded[self.rows, self.columns][None]

    def attend(self, layer: Qwen2_5_VLDecoderLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention inside each record, [1, T, heads * head width], of [1, heads, T, head width] each."""
        attention = layer.self_attn
        if query.device.type == "cuda":
            precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
            if precision in (torch.bfloat16, torch.float16):
                query, key, value = (tensor.to(precision) for tensor in (query, key, value))
                return _attend_fused(query, key, value, self.lengths, attention.scaling)
        groups = attention.num_key_value_groups
        parts = [
            F.scaled_dot_product_attention(*part, None, 0.0, True, scale=attention.scaling)
            for part in zip(
                query.split(self.lengths, dim=2),
                key.repeat_interleave(groups, dim=1).split(self.lengths, dim=2),
                value.repeat_interleave(groups, dim=1).split(self.lengths, dim=2),
                strict=True,
            )
        ]
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


def pack(attention_mask: Tensor) -> Pack:
    """The packing of a padded batch, `attention_mask` [batch, length]; rows without any position are left out."""
    rows, columns = attention_mask.nonzero(as_tuple=True)
    places = torch.zeros_like(attention_mask, dtype=torch.int64)
    places[rows, columns] = torch.arange(len(rows), device=rows.device)
    return Pack(rows, columns, [length for length in attention_mask.sum(1).tolist() if length], places)


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """The same by FlashAttention over rows of unequal length."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    longest = max(lengths)
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    attended = varlen_attn(
        query, key, value, ends, ends, longest, longest, window_size=(-1, 0), scale=scale, enable_gqa=True
    )
    assert isinstance(attended, Tensor)
    return attended.flatten(1)[None]


def leak(states: Callable[[Tensor], Tensor], packed: Pack, inputs: Tensor) -> float:
    """How much neighbouring records of a packed row see of each other; exactly 0 where they are kept apart.

    Args:
        states: the forward to be checked, from input embeddings [batch, length, hidden] to packed states [T, hidden].
        packed: how the row is packed, at least two records.
        inputs: [batch, length, hidden], the input embeddings.

    Returns:
        The largest change of a state when the inputs of every second other record are turned around, or the largest
        gradient of it with respect to these inputs, whichever is larger; NaN if a state is.
    """
    places = packed.rows.unique(return_inverse=True)[1]
    found = []
    for turned in (0, 1):
        changed_rows = packed.rows[places % 2 == turned].unique()
        others = places % 2 != turned
        given = inputs.detach().requires_grad_()
        before = states(given)[others]
        (gradient,) = torch.autograd.grad(before.square().sum(), given)
        changed = inputs.detach().clone()
        changed[changed_rows] = -changed[changed_rows]
        with torch.no_grad():
            found.append((states(changed)[others] - before).abs().max())
        found.append(gradient[changed_rows].abs().max())
    return float(torch.stack(found).max())
