"""Linear layers that are applied to one position at a time, with one weight gradient for all of those positions.

In: a module's weight and the inputs of its many applications. Out: the same outputs and gradients as the module's own.
A product of one row with a weight is bound by reading the weight; backward would do it twice, and add a whole weight
gradient each time. Here the inputs and output gradients are kept, and the weight gradient is one product at the end.
Always: the weight gets one gradient from all applications, so there is one accumulation and one reduction of it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DeferredError(TypeError):
    """A layer whose weight gradient can't be deferred."""


class DeferredLinears:
    """Several `nn.Linear` that share their input, e.g. those of query, key and value."""

    def __init__(self, *layers: nn.Module) -> None:
        """The weights must not change before backward.

        Raises:
            DeferredError: a layer is something else, an adapter for example, whose own forward would be passed by.
        """
        for layer in layers:
            if type(layer) is not nn.Linear:
                raise DeferredError(
                    f"slots can't be computed one by one with a {type(layer).__name__} in place of a linear layer; "
                    "set latents.method to two_pass, which calls the layers as they are"
                )
        self._pairs = _Pairs(cast(list[nn.Linear], list(layers)))
        self._token: Tensor | None = None

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """One output a layer, [..., width of the layer]."""
        if self._token is None:
            # Made at the first application: backward delivers before it turns to what was computed earlier.
            weights = [layer.weight for layer in self._pairs.layers]
            biases = [layer.bias for layer in self._pairs.layers if layer.bias is not None]
            self._token = _Deliver.apply(self._pairs, *weights, *biases)
        outputs: tuple[Tensor, ...] = _Apply.apply(self._pairs, inputs, self._token)
        return outputs


class _Pairs:
    """The inputs and output gradients of a backward pass so far."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = layers
        self._kept: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        self._pass: int | None = None

    def keep(self, inputs: Tensor, gradients: tuple[Tensor, ...]) -> None:
        """Remember one application until the weights' gradients are due."""
        now = torch._C._current_graph_task_id()
        if self._pass != now:
            self._kept, self._pass = [], now
        self._kept.append((inputs, gradients))

    def collected(self) -> tuple[Tensor, list[Tensor]]:
        """All inputs, [applications, width], and the output gradients a layer; they are forgotten here."""
        kept, self._kept = self._kept, []
        inputs = torch.cat([inputs.flatten(0, -2) for inputs, _ in kept])
        return inputs, [torch.cat([one.flatten(0, -2) for one in each]) for each in zip(*(given for _, given in kept))]


class _Deliver(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx: Any, pairs: _Pairs, *parameters: Tensor) -> Tensor:
        ctx.pairs = pairs
        return parameters[0].new_zeros(())

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor | None, ...]:
        inputs, gradients = ctx.pairs.collected()
        weights = [given.T @ inputs for given in gradients]
        biases = [
            given.sum(0) for layer, given in zip(ctx.pairs.layers, gradients, strict=True) if layer.bias is not None
        ]
        return None, *weights, *biases


class _Apply(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx: Any, pairs: _Pairs, inputs: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        ctx.pairs = pairs
        ctx.save_for_backward(inputs)
        return tuple(F.linear(inputs, layer.weight, layer.bias) for layer in pairs.layers)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            ctx.pairs.keep(inputs, gradients)
        of_inputs = sum(given @ layer.weight for given, layer in zip(gradients, ctx.pairs.layers, strict=True))
        assert isinstance(of_inputs, Tensor)
        return None, of_inputs, None
