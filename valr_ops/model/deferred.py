"""Linear layers that are applied to one position at a time, with one weight gradient for all of those positions.

In: a module's weight and the inputs of its many applications. Out: the same outputs and gradients as the module's own.
A product of one row with a weight is bound by reading the weight; backward would do it twice, and add a whole weight
gradient each time. Here the inputs and output gradients are kept, and the weight gradient is one product at the end.
Always: the weight gets one gradient from all applications, so there is one accumulation and one reduction of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DeferredLinears:
    """Several `nn.Linear` that share their input, e.g. those of query, key and value."""

    def __init__(self, *layers: nn.Module) -> None:
        """Applications are counted from now on; the weights must not change before backward."""
        self.layers = [layer for layer in layers if isinstance(layer, nn.Linear)]
        assert len(self.layers) == len(layers), "only plain linear layers can be deferred"
        self._pairs: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        self._pass: int | None = None
        weights = [layer.weight for layer in self.layers]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self._token = _Deliver.apply(self, *weights, *biases)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """One output a layer, [..., width of the layer]."""
        outputs: tuple[Tensor, ...] = _Apply.apply(self, inputs, self._token)
        return outputs

    def keep(self, inputs: Tensor, gradients: tuple[Tensor, ...]) -> None:
        """Remember an application's inputs and output gradients until the weights' gradients are due."""
        now = torch._C._current_graph_task_id()
        if self._pass != now:
            self._pairs, self._pass = [], now
        self._pairs.append((inputs, gradients))

    def collected(self) -> tuple[Tensor, list[Tensor]]:
        """All inputs, [applications, width], and the output gradients a layer; they are forgotten here."""
        pairs, self._pairs = self._pairs, []
        inputs = torch.cat([inputs.flatten(0, -2) for inputs, _ in pairs])
        return inputs, [torch.cat([one.flatten(0, -2) for one in each]) for each in zip(*(given for _, given in pairs))]


class _Deliver(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx: Any, linears: DeferredLinears, *parameters: Tensor) -> Tensor:
        ctx.linears = linears
        return parameters[0].new_zeros(())

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.linears.collected()
        layers = ctx.linears.layers
        weights = [given.T @ inputs for given in gradients]
        biases = [given.sum(0) for layer, given in zip(layers, gradients, strict=True) if layer.bias is not None]
        return None, *weights, *biases


class _Apply(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx: Any, linears: DeferredLinears, inputs: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        ctx.linears = linears
        ctx.save_for_backward(inputs)
        return tuple(F.linear(inputs, layer.weight, layer.bias) for layer in linears.layers)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        ctx.linears.keep(inputs, gradients)
        of_inputs = sum(given @ layer.weight for given, layer in zip(gradients, ctx.linears.layers, strict=True))
        assert isinstance(of_inputs, Tensor)
        return None, of_inputs, None
