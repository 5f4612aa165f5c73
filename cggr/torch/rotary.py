"""Sines and cosines of rotary positions that a compiler makes once, not in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class InMemory(nn.Module):
    """One of transformers' rotary embeddings, whose ``(cos, sin)`` are read by every layer.

    Compiled, each layer would compute the sine and the cosine of every element anew, as a part of
    the rotation of its queries and keys, which then took four times as long.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the embedding makes of its arguments."""
        angles = self.rotary(*args, **kwargs)
        return tuple(map(in_memory, angles)) if torch.compiler.is_compiling() else angles


def keep_angles(root: nn.Module) -> None:
    """Puts an :class:`InMemory` around every rotary embedding below a module."""
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is not None and type(child).__name__.endswith("RotaryEmbedding"):
                module._modules[name] = InMemory(child)


@torch.library.custom_op("cggr::in_memory", mutates_args=(), schema="(Tensor x) -> Tensor")
def in_memory(x: Tensor) -> Tensor:
    """A copy, which no compiler computes again in place of reading it."""
    return x.clone()


@in_memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
