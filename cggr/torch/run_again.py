"""Layers under gradient checkpointing, which run again in the backward pass for some rows.

Where the model is compiled each layer is, by itself: torch.utils.checkpoint wants a layer to save
the same tensors when it runs again, and what is compiled for some rows saves others than what was
compiled for all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cggr.torch.router import room_for_graphs
from cggr.torch.selected import differentiable_once

_CACHES = ("past_key_values", "layer_past")  # of no use to one layer, and different for each


class Repeated:
    """A context that can be entered again when it has been left.

    Args:
        make: Makes one for each time.
    """

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)


def layer_of(call: functools.partial[Any]) -> nn.Module:
    """The layer whose call transformers has checkpointed."""
    # Before transformers 5.20 it was that of the bound method.
    layer: nn.Module = call.args[0] if call.args else call.func.__self__  # type: ignore[attr-defined]
    return layer


class RunAgain:
    """Checkpoints compiled layers.

    Args:
        compiler: What compiles a function.
    """

    def __init__(self, compiler: Callable[[Any], Any]) -> None:
        self._compiler = compiler
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, call: functools.partial[Any], hidden: Tensor, *others: Any, again: Repeated
    ) -> Any:
        """A layer's output, of which the layer keeps nothing but its input.

        Args:
            call: Of the layer, without positional inputs.
            hidden: Its input.
            *others: Further ones.
            again: The context in which it runs again.

        Raises:
            ValueError: Another input was computed with gradient.
        """
        layer: Any = layer_of(call)
        forward = call.func if call.args else type(layer).forward
        if forward not in self._compiled:
            self._compiled[forward] = self._compiler(forward)
        compiled = self._compiled[forward]
        keywords = call.keywords | {name: None for name in _CACHES if name in call.keywords}
        leaves = tree_leaves((others, keywords))
        if any(isinstance(x, Tensor) and x.grad_fn is not None for x in leaves):
            raise ValueError(
                "a compiled layer under gradient checkpointing takes no other input than hidden "
                "states that was computed with gradient: detach the mask, or do not compile."
            )

        def run(hidden: Tensor) -> Any:
            with room_for_graphs():
                return compiled(layer, hidden, *others, **keywords)

        # The output has a gradient wherever the layer has, whatever its input has.
        has_gradient = hidden.requires_grad or any(p.requires_grad for p in layer.parameters())
        anchor = torch.zeros((), device=hidden.device, requires_grad=has_gradient)
        return _RunAgain.apply(run, again, hidden, anchor)


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, again: Repeated, hidden: Tensor, anchor: Tensor) -> Any:
        ctx.run, ctx.again, ctx.has_gradient = run, again, hidden.requires_grad
        kind = hidden.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.autocast = functools.partial(torch.autocast, kind, dtype, enabled)
        ctx.save_for_backward(hidden)
        return run(hidden)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        with torch.enable_grad(), ctx.autocast(), ctx.again:
            given = hidden.detach().requires_grad_(ctx.has_gradient)
            output = ctx.run(given)
        outputs = output if isinstance(output, tuple) else (output,)
        pairs = [
            (x, gradient)
            for x, gradient in zip(outputs, gradients, strict=True)
            if isinstance(x, Tensor) and x.requires_grad
        ]
        torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])
        return None, None, given.grad, None


def has_hooks(layers: list[nn.Module]) -> bool:
    """Whether modules have hooks, which a layer's own forward would not call."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
