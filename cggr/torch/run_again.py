"""Compiled layers under gradient checkpointing, which run again in the backward pass for some rows.

torch.utils.checkpoint wants a layer to save the same tensors when it runs again. What is compiled
for some rows saves others than what was compiled for all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cggr.torch.router import room_for_graphs
from cggr.torch.selected import differentiable_once

_CACHES = ("past_key_values", "layer_past")  # of no use to one layer, and different for each


class RunAgain:
    """Takes the place of the function by which transformers checkpoints layers.

    Args:
        compiler: What compiles a function.
    """

    def __init__(self, compiler: Callable[[Any], Any]) -> None:
        self._compiler = compiler
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        again: Callable[[], contextlib.AbstractContextManager[None]],
        layer: functools.partial[Any],
        hidden: Tensor,
        *others: Any,
    ) -> Any:
        """A layer's output, of which the layer keeps nothing but its input.

        Args:
            again: The context in which it runs again.
            layer: Its call, without positional inputs.
            hidden: Its input.
            *others: Further ones, without gradient.
        """
        module: Any = layer.args[0] if layer.args else layer.func.__self__  # type: ignore[attr-defined]
        # Before transformers 5.20 it was the module's call that was checkpointed.
        forward = layer.func if layer.args else type(module).forward
        if forward not in self._compiled:
            self._compiled[forward] = self._compiler(forward)
        keywords = layer.keywords | {name: None for name in _CACHES if name in layer.keywords}
        compiled = self._compiled[forward]

        def call(hidden: Tensor) -> Any:
            with room_for_graphs():
                return compiled(module, hidden, *others, **keywords)

        # It has a gradient wherever the layer has, whatever its input has.
        anchor = torch.zeros((), device=hidden.device, requires_grad=True)
        return _RunAgain.apply(call, again, hidden, anchor)


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Any, again: Any, hidden: Tensor, anchor: Tensor) -> Any:
        ctx.call, ctx.again, ctx.is_leaf = call, again, not hidden.requires_grad
        kind = hidden.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.autocast = functools.partial(torch.autocast, kind, dtype, enabled)
        ctx.save_for_backward(hidden)
        return call(hidden)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        with torch.enable_grad(), ctx.autocast(), ctx.again():
            given = hidden.detach().requires_grad_(not ctx.is_leaf)
            output = ctx.call(given)
        torch.autograd.backward(output, gradient)
        return None, None, given.grad, None


def has_hooks(layers: list[nn.Module]) -> bool:
    """Whether modules have hooks, which a layer's own forward would not call."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
