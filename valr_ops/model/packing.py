"""Records of a batch one behind the other in a single row, without padding, each attending to itself only.

In: a padded batch's mask, and where each record's first slot stands. Out: a `Pack` that gathers [batch, length, ...]
tensors into [1, T, ...] and finds positions again, and attention over such a row. Padding then costs nothing, however
unequal the records are. The row has all heads first, then all tails: a record's head is what stands before its first
slot. Nothing there depends on a slot, so the gradient through the feedback need not go there.
Always: a record's states and gradients don't depend on its neighbours; `leak` measures that on a real batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
    heads: list[int]
    """Positions of each record's head."""
    tails: list[int]
    """Positions of each record's tail; 0 for a record without slots."""
    places: Tensor
    """[batch, length] int64: the inverse; 0 at padding."""

    def gather(self, padded: Tensor) -> tuple[Tensor, Tensor]:
        """The heads [1, H, ...] and the tails [1, T - H, ...] of [batch, length, ...]."""
        head, tail = padded[self.rows, self.columns][None].split([sum(self.heads), sum(self.tails)], dim=1)
        return head, tail

    def attend_heads(self, layer: Qwen2_5_VLDecoderLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention inside each head, [1, H, heads * head width], of [1, heads, H, head width] each."""
        scale = layer.self_attn.scaling
        if (precision := _fused_precision(query)) is not None:
            return _attend_fused(query, key, value, self._runs_of_heads, self._runs_of_heads, precision, scale)
        query, key, value = _equal_heads(layer, query, key, value)
        parts = zip(query.split(self.heads, 2), key.split(self.heads, 2), value.split(self.heads, 2), strict=True)
        attended = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale) for part in parts]
        return torch.cat(attended, dim=2).transpose(1, 2).flatten(2)

    def attend_tails(self, layer: Qwen2_5_VLDecoderLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of each tail to its record, [1, T - H, heads * head width].

        Args:
            query: [1, heads, T - H, head width].
            key, value: [1, key/value heads, T, head width].
        """
        scale = layer.self_attn.scaling
        key, value = key[:, :, self._by_record], value[:, :, self._by_record]
        if (precision := _fused_precision(query)) is not None:
            return _attend_fused(query, key, value, *self._runs_of_tails, precision, scale)
        tails = [tail for tail in self.tails if tail]
        lengths = [head + tail for head, tail in zip(self.heads, self.tails, strict=True) if tail]
        query, key, value = _equal_heads(layer, query, key, value)
        parts = zip(query.split(tails, 2), key.split(lengths, 2), value.split(lengths, 2), self._masks, strict=True)
        attended = [F.scaled_dot_product_attention(*part, scale=scale) for part in parts]
        return torch.cat(attended, dim=2).transpose(1, 2).flatten(2)

    @cached_property
    def _by_record(self) -> Tensor:
        """Positions of the packed row, record by record, of the records with a tail."""
        heads = torch.arange(sum(self.heads)).split(self.heads)
        tails = torch.arange(sum(self.heads), len(self.rows)).split(self.tails)
        whole = [torch.cat(both) for both in zip(heads, tails, strict=True) if len(both[1])]
        return torch.cat(whole).to(self.rows.device)

    @cached_property
    def _runs_of_heads(self) -> _Runs:
        return _Runs.of(self.heads, self.rows.device)

    @cached_property
    def _runs_of_tails(self) -> tuple[_Runs, _Runs]:
        """The tails, and the whole records that they are the ends of."""
        pairs = [(tail, head + tail) for head, tail in zip(self.heads, self.tails, strict=True) if tail]
        tails, lengths = ([pair[part] for pair in pairs] for part in (0, 1))
        return _Runs.of(tails, self.rows.device), _Runs.of(lengths, self.rows.device)

    @cached_property
    def _masks(self) -> list[Tensor]:
        """[tail, head + tail] bool a record with a tail: what its positions see."""
        return [
            torch.ones(tail, head + tail, dtype=torch.bool, device=self.rows.device).tril(head)
            for head, tail in zip(self.heads, self.tails, strict=True)
            if tail
        ]


@dataclass(frozen=True)
class _Runs:
    """Lengths of runs that stand one behind the other, as FlashAttention takes them."""

    ends: Tensor
    """[runs + 1] int32, the first of them 0; made once, because a copy to the GPU waits for all that runs there."""
    longest: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> _Runs:
        return cls(torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32), max(lengths))


def pack(attention_mask: Tensor, slot_mask: Tensor) -> Pack:
    """The packing of a padded batch, both masks [batch, length]; rows without any position are left out."""
    there = attention_mask.bool()
    in_tail = there & (slot_mask.cumsum(1) > 0)
    (head_rows, head_columns), (tail_rows, tail_columns) = ((there & ~in_tail).nonzero().T, in_tail.nonzero().T)
    rows, columns = torch.cat([head_rows, tail_rows]), torch.cat([head_columns, tail_columns])
    places = torch.zeros_like(attention_mask, dtype=torch.int64)
    places[rows, columns] = torch.arange(len(rows), device=rows.device)
    lengths, tails = there.sum(1).tolist(), in_tail.sum(1).tolist()
    sizes = [(length - tail, tail) for length, tail in zip(lengths, tails, strict=True) if length]
    return Pack(rows, columns, [head for head, _ in sizes], [tail for _, tail in sizes], places)


def _equal_heads(layer: Qwen2_5_VLDecoderLayer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    groups = layer.self_attn.num_key_value_groups
    return query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _fused_precision(query: Tensor) -> torch.dtype | None:
    """What FlashAttention over rows of unequal length would compute in; None where there is none."""
    if query.device.type != "cuda":
        return None
    precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return precision if precision in (torch.bfloat16, torch.float16) else None


def _attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asking: _Runs,
    seen: _Runs,
    precision: torch.dtype,
    scale: float,
) -> Tensor:
    """Attention of the last `asking` positions of each record to its `seen` ones, [1, sum of asking, width]."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (one[0].transpose(0, 1).to(precision).contiguous() for one in (query, key, value))
    # Where it has no such flag (torch 2.11), it takes fewer key/value heads without being told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    # With a window of nothing to the right, the last query sees the last key: causal from the end.
    attended = varlen_attn(
        query,
        key,
        value,
        asking.ends,
        seen.ends,
        asking.longest,
        seen.longest,
        window_size=(-1, 0),
        scale=scale,
        **grouped,
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
