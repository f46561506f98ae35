"""The decoder over a static key/value cache, without gradient: rows in lock step, a run of columns or one at a time.

In: input embeddings and their M-RoPE positions. Out: post-norm hidden states, which the latent slots are fed.
The training roll-out and generation both run on it, so that what is fed at generation is what was fed in training.
Always: a column that is not visible is seen by no later one; nothing is kept of a run but its keys and values. On CUDA
the single-column step is captured in a graph once and replayed, because launching its kernels costs more than they do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from valr_ops.model.blocks import Turn, attend, attend_one, causal_mask, finish, key_value, normed, query
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLTextModel,
)

_GROWTH_COLUMNS = 256


class CachedDecoder:
    """The decoder's blocks over a static key/value cache, without gradient."""

    def __init__(self, decoder: Qwen2_5_VLTextModel, rows: int, capacity: int) -> None:
        """An empty cache.

        Args:
            decoder: the language model; its weights must not change while this is in use.
            rows: R, sequences in lock step.
            capacity: columns to make room for at once; more are made as they are needed.
        """
        self.decoder = decoder
        self.layers = cast(list[Qwen2_5_VLDecoderLayer], list(decoder.layers))
        self.length = 0
        """Columns so far."""
        weight = decoder.norm.weight
        self._visible = torch.zeros(rows, max(capacity, 1), dtype=torch.bool, device=weight.device)
        self._bias = torch.full_like(self._visible, float("-inf"), dtype=weight.dtype)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._warm = False
        self._captured: _Captured | None = None

    @property
    def capacity(self) -> int:
        """Columns there is room for."""
        return self._visible.shape[1]

    @torch.no_grad()
    def extend(self, inputs: Tensor, positions: Tensor, visible: Tensor, at: Tensor | None = None) -> Tensor:
        """Append a run of W columns in one parallel step.

        Args:
            inputs: [R, W, hidden], input embeddings.
            positions: [3, R, W] int64, M-RoPE positions.
            visible: [R, W] bool; False where nothing stands, at the left, at the right or in between.
            at: [R] int64, the only columns of this run whose states are wanted.

        Returns:
            Post-norm hidden states, [R, W, hidden], or [R, hidden] at `at`.
        """
        width = inputs.shape[1]
        self._reserve(width)
        past = self._visible[:, : self.length]
        # Where nothing visible stands behind a gap, causality hides the gaps by itself.
        gap_before = visible[:, 1:] & ~visible[:, :-1]
        mask = causal_mask(past, visible) if self.length or bool(gap_before.any()) else None
        turn = self.decoder.rotary_emb(inputs, positions)
        columns = slice(self.length, self.length + width)
        self._show(columns, visible)
        self.length += width
        hidden = inputs
        for index, layer in enumerate(self.layers):
            entering = normed(layer.input_layernorm, hidden)
            key, value = key_value(layer, entering, turn)
            keys, values = self._store(index, key, value)
            keys[:, :, columns], values[:, :, columns] = key, value
            keys, values = keys[:, :, : self.length], values[:, :, : self.length]
            if at is not None and index == len(self.layers) - 1:
                return self._last_block(layer, hidden, entering, turn, at, keys, values)
            hidden = finish(layer, hidden, attend(layer, query(layer, entering, turn), keys, values, mask))
        return normed(self.decoder.norm, hidden)

    @torch.no_grad()
    def step(self, inputs: Tensor, positions: Tensor, visible: Tensor | None = None) -> Tensor:
        """Append one column, behind at least one run.

        Args:
            inputs: [R, hidden], input embeddings; for a latent slot the state that the last call returned.
            positions: [3, R] int64, M-RoPE positions.
            visible: [R] bool; None where all are.

        Returns:
            Post-norm hidden states, [R, hidden].
        """
        self._reserve(1)
        cosine, sine = self.decoder.rotary_emb(inputs[:, None], positions[:, :, None])
        # Filled there: a tensor copied from the CPU would wait until the GPU has done all steps so far.
        column = torch.full((1,), self.length, device=inputs.device)
        self._show(slice(self.length, self.length + 1), True if visible is None else visible[:, None])
        self.length += 1
        if inputs.device.type == "cuda":
            return self._replayed(inputs, cosine, sine, column)
        return self._blocks(self.length, inputs, cosine, sine, column)

    def hide(self, columns: Tensor) -> None:
        """Let no later column see `columns`, [R, any of the first] bool; what was computed so far stays as it is."""
        first = slice(0, columns.shape[1])
        self._show(first, self._visible[:, first] & ~columns)

    def select(self, rows: Tensor) -> None:
        """Keep only `rows`, int64 indices, in that order."""
        self._keys = [keys.index_select(0, rows) for keys in self._keys]
        self._values = [values.index_select(0, rows) for values in self._values]
        self._visible = self._visible.index_select(0, rows)
        self._bias = self._bias.index_select(0, rows)
        self._captured = None

    def _blocks(self, width: int, inputs: Tensor, cosine: Tensor, sine: Tensor, column: Tensor) -> Tensor:
        """One column through all blocks; it reads no number back from the device, so that it can be captured.

        Args:
            width: how many columns of the cache it looks at.
            column: [1] int64, where its keys and values go.
        """
        bias = self._bias[:, None, None, :width]
        hidden = inputs[:, None]
        for layer, keys, values in zip(self.layers, self._keys, self._values, strict=True):
            entering = normed(layer.input_layernorm, hidden)
            key, value = key_value(layer, entering, (cosine, sine))
            keys.index_copy_(2, column, key)
            values.index_copy_(2, column, value)
            asked = query(layer, entering, (cosine, sine))
            hidden = finish(layer, hidden, attend_one(layer, asked, keys[:, :, :width], values[:, :, :width], bias))
        state: Tensor = normed(self.decoder.norm, hidden)[:, 0]
        return state

    def _replayed(self, *inputs: Tensor) -> Tensor:
        """`_blocks` over the whole capacity: the first call warms up, the second is captured, all others replay it."""
        if not self._warm:
            self._warm = True
            return self._blocks(self.capacity, *inputs)
        if self._captured is None:
            self._captured = _Captured(functools.partial(self._blocks, self.capacity), inputs)
        return self._captured(inputs)

    def _last_block(
        self,
        layer: Qwen2_5_VLDecoderLayer,
        hidden: Tensor,
        entering: Tensor,
        turn: Turn,
        at: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """The last block only for the wanted columns: nothing reads the others any more."""
        rows = torch.arange(len(at), device=at.device)
        cosine, sine = (part[rows, at][:, None] for part in turn)
        wanted = self.length - hidden.shape[1] + at
        seen = self._visible[:, : self.length] & (torch.arange(self.length, device=at.device) <= wanted[:, None])
        bias = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, float("-inf"))[:, None, None]
        asked = query(layer, entering[rows, at][:, None], (cosine, sine))
        done = finish(layer, hidden[rows, at][:, None], attend_one(layer, asked, keys, values, bias))
        state: Tensor = normed(self.decoder.norm, done)[:, 0]
        return state

    def _store(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a block, made when the precision of its keys is known."""
        if index == len(self._keys):
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self._keys.append(key.new_zeros(shape))
            self._values.append(value.new_zeros(shape))
        return self._keys[index], self._values[index]

    def _show(self, columns: slice, visible: Tensor | bool) -> None:
        self._visible[:, columns] = visible
        self._bias[:, columns] = torch.where(self._visible[:, columns], 0.0, float("-inf")).to(self._bias.dtype)

    def _reserve(self, columns: int) -> None:
        missing = self.length + columns - self.capacity
        if missing <= 0:
            return
        more = -(-missing // _GROWTH_COLUMNS) * _GROWTH_COLUMNS
        self._keys = [F.pad(keys, (0, 0, 0, more)) for keys in self._keys]
        self._values = [F.pad(values, (0, 0, 0, more)) for values in self._values]
        self._visible = F.pad(self._visible, (0, more))
        self._bias = F.pad(self._bias, (0, more), value=float("-inf"))
        self._captured = None


class _Captured:
    """A function of tensors as a CUDA graph: its arguments are copied to where they were when it was captured."""

    def __init__(self, function: Callable[..., Tensor], arguments: Sequence[Tensor]) -> None:
        self._arguments = [argument.clone() for argument in arguments]
        self._graph = torch.cuda.CUDAGraph()
        # By default an allocation in another thread, such as that of online teachers, ends the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = function(*self._arguments)

    def __call__(self, arguments: Sequence[Tensor]) -> Tensor:
        for mine, given in zip(self._arguments, arguments, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._result.clone()
