"""Keys and values of one block in one buffer, with the graph kept: what `sequential` has instead of a list of copies.

In: a run's keys and values, or one position's. Out: the keys and values so far, or the attention of one position to
them. Appending to a tensor would keep a copy of the whole past for every slot until backward; here all positions share
one buffer, and their gradients one of the same size.
Always: forward writes a column once and never changes it. Operations on a tape are chained by a token without value, so
backward visits them in reverse, and a column's gradient is complete when the operation that wrote it asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Tape:
    """The keys and values of one block for a batch of rows, in lock step."""

    def __init__(self, columns: int, like: Tensor) -> None:
        """An empty tape.

        Args:
            columns: how many positions will be written.
            like: keys [rows, key/value heads, *, head width], of any length.
        """
        self._reel = _Reel(columns, like)
        self._token = torch.zeros((), device=like.device)

    def write(self, key: Tensor, value: Tensor) -> None:
        """Append a run, [rows, key/value heads, width, head width] each."""
        self._token = _Write.apply(self._reel, key, value, self._token)

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values so far, [rows, key/value heads, length, head width]: the buffers, not copies of them."""
        keys, values, self._token = _Read.apply(self._reel, self._token)
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        """Append one position and attend from it to all so far.

        Args:
            query: [rows, heads, 1, head width].
            key, value: [rows, key/value heads, 1, head width].
            bias: [rows, length + 1], 0 where a position is seen and minus infinity elsewhere.

        Returns:
            [rows, 1, heads * head width].
        """
        attended, self._token = _Attend.apply(self._reel, query, key, value, bias, scale, self._token)
        return attended


class _Reel:
    """The buffers of a tape. The graph refers to them and the tape to the graph, so that neither keeps itself alive."""

    def __init__(self, columns: int, like: Tensor) -> None:
        rows, heads, _, width = like.shape
        self.keys, self.values = (like.new_zeros(rows * heads, columns, width) for _ in range(2))
        self.heads, self.length = heads, 0
        self._gradients: tuple[Tensor, Tensor] | None = None
        self._pass: int | None = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of keys and values collected so far in this backward pass."""
        now = torch._C._current_graph_task_id()
        if self._gradients is None or self._pass != now:
            self._gradients, self._pass = (torch.zeros_like(self.keys), torch.zeros_like(self.values)), now
        return self._gradients

    def by_head(self, flat: Tensor) -> Tensor:
        """[rows * heads, columns, width] as [rows, heads, columns, width]."""
        return flat.view(-1, self.heads, *flat.shape[1:])


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reel: _Reel, key: Tensor, value: Tensor, token: Tensor) -> Tensor:
        ctx.reel, ctx.columns = reel, slice(reel.length, reel.length + key.shape[2])
        reel.length = ctx.columns.stop
        # .data: what stands in other columns is saved for backward and must not count as changed.
        reel.keys.data[:, ctx.columns] = key.flatten(0, 1)
        reel.values.data[:, ctx.columns] = value.flatten(0, 1)
        return token.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        key, value = (ctx.reel.by_head(one[:, ctx.columns]) for one in ctx.reel.gradients())
        return None, key, value, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reel: _Reel, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.reel, ctx.length = reel, reel.length
        keys, values = (reel.by_head(one.data[:, : reel.length]) for one in (reel.keys, reel.values))
        return keys, values, token.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for collected, given in zip(ctx.reel.gradients(), gradients[:2], strict=True):
            collected[:, : ctx.length] += given.flatten(0, 1)
        return None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, reel: _Reel, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, token: Tensor
    ) -> tuple[Tensor, Tensor]:
        column = reel.length
        reel.length += 1
        reel.keys.data[:, column] = key.flatten(0, 1)[:, 0]
        reel.values.data[:, column] = value.flatten(0, 1)[:, 0]
        asked = query.reshape(len(reel.keys), -1, query.shape[3]) * scale
        with torch.autocast(query.device.type, enabled=False):
            attended = _weights(reel, asked, bias) @ reel.values.data[:, : reel.length]
        ctx.reel, ctx.scale, ctx.shape = reel, scale, query.shape
        ctx.save_for_backward(asked, bias)
        return attended.reshape(len(query), 1, -1), token.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        asked, bias = ctx.saved_tensors
        # The weights are the largest tensor of a slot; making them again is cheaper than keeping them.
        weights = _weights(ctx.reel, asked, bias)
        seen = slice(0, bias.shape[1])
        keys, values = (one.data[:, seen] for one in (ctx.reel.keys, ctx.reel.values))
        of_keys, of_values = (one[:, seen] for one in ctx.reel.gradients())
        given = gradients[0].reshape(asked.shape).to(asked.dtype)
        of_values.baddbmm_(weights.transpose(1, 2), given)
        of_weights = given @ values.transpose(1, 2)
        of_scores = weights * (of_weights - (of_weights * weights).sum(2, keepdim=True))
        of_keys.baddbmm_(of_scores.transpose(1, 2), asked)
        of_query = (of_scores @ keys * ctx.scale).view(ctx.shape)
        key, value = (ctx.reel.by_head(one[:, -1:]) for one in (of_keys, of_values))
        return None, of_query, key, value, None, None, None


def _weights(reel: _Reel, asked: Tensor, bias: Tensor) -> Tensor:
    """Attention weights, [rows * key/value heads, heads of a group, columns], of scaled queries."""
    scores = asked @ reel.keys.data[:, : bias.shape[1]].transpose(1, 2)
    scores = reel.by_head(scores) + bias[:, None, None]
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=3, dtype=wide).to(scores.dtype).flatten(0, 1)
