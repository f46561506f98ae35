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
    """The keys and values of one block for a batch of rows, in lock step.

    Args:
        columns: how many positions will be written.
    """

    def __init__(self, columns: int, like: Tensor) -> None:
        """An empty tape for keys [rows, key/value heads, *, head width] like `like`."""
        rows, heads, _, width = like.shape
        self.keys, self.values = (like.new_zeros(rows * heads, columns, width) for _ in range(2))
        self.heads, self.length = heads, 0
        self.token = torch.zeros((), device=like.device)
        self._gradients: tuple[Tensor, Tensor] | None = None
        self._pass: int | None = None

    def write(self, key: Tensor, value: Tensor) -> None:
        """Append a run, [rows, key/value heads, width, head width] each."""
        self.token = _Write.apply(self, key, value, self.token)

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values so far, [rows, key/value heads, length, head width]: the buffers, not copies of them."""
        keys, values, self.token = _Read.apply(self, self.token)
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
        attended, self.token = _Attend.apply(self, query, key, value, bias, scale, self.token)
        return attended

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
    def forward(ctx: Any, tape: Tape, key: Tensor, value: Tensor, token: Tensor) -> Tensor:
        ctx.tape, ctx.columns = tape, slice(tape.length, tape.length + key.shape[2])
        tape.length = ctx.columns.stop
        # .data: what stands in other columns is saved for backward and must not count as changed.
        tape.keys.data[:, ctx.columns] = key.flatten(0, 1)
        tape.values.data[:, ctx.columns] = value.flatten(0, 1)
        return token.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        key, value = (ctx.tape.by_head(one[:, ctx.columns]) for one in ctx.tape.gradients())
        return None, key, value, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.tape, ctx.length = tape, tape.length
        keys, values = (tape.by_head(one.data[:, : tape.length]) for one in (tape.keys, tape.values))
        return keys, values, token.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for collected, given in zip(ctx.tape.gradients(), gradients[:2], strict=True):
            collected[:, : ctx.length] += given.flatten(0, 1)
        return None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tape: Tape, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, token: Tensor
    ) -> tuple[Tensor, Tensor]:
        column = tape.length
        tape.length += 1
        tape.keys.data[:, column] = key.flatten(0, 1)[:, 0]
        tape.values.data[:, column] = value.flatten(0, 1)[:, 0]
        asked = query.reshape(len(tape.keys), -1, query.shape[3]) * scale
        with torch.autocast(query.device.type, enabled=False):
            scores = asked @ tape.keys.data[:, : tape.length].transpose(1, 2)
            scores = tape.by_head(scores) + bias[:, None, None]
            wide = torch.promote_types(scores.dtype, torch.float32)
            weights = scores.softmax(dim=3, dtype=wide).to(scores.dtype).flatten(0, 1)
            attended = weights @ tape.values.data[:, : tape.length]
        ctx.tape, ctx.column, ctx.scale, ctx.shape = tape, column, scale, query.shape
        ctx.save_for_backward(asked, weights)
        return attended.reshape(len(query), 1, -1), token.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        asked, weights = ctx.saved_tensors
        seen = slice(0, ctx.column + 1)
        keys, values = (one.data[:, seen] for one in (ctx.tape.keys, ctx.tape.values))
        of_keys, of_values = (one[:, seen] for one in ctx.tape.gradients())
        given = gradients[0].reshape(asked.shape).to(asked.dtype)
        of_values.baddbmm_(weights.transpose(1, 2), given)
        of_weights = given @ values.transpose(1, 2)
        of_scores = weights * (of_weights - (of_weights * weights).sum(2, keepdim=True))
        of_keys.baddbmm_(of_scores.transpose(1, 2), asked)
        of_query = (of_scores @ keys * ctx.scale).view(ctx.shape)
        key, value = (ctx.tape.by_head(one[:, -1:]) for one in (of_keys, of_values))
        return None, of_query, key, value, None, None, None
