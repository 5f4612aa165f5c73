"""Sines and cosines of rotary positions that a compiler makes once, not in every layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def made_once(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of one of transformers' rotary embeddings, with the same ``(cos, sin)``.

    Compiled, each layer would compute the sine and the cosine of every element anew, as they would
    become part of the rotation of its queries and keys: that took four times as long as the
    rotation does.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        angles = kind.forward(self, *args, **kwargs)
        return tuple(map(in_memory, angles)) if torch.compiler.is_compiling() else angles

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def is_rotary(module: nn.Module) -> bool:
    """Whether a module of transformers makes ``(cos, sin)`` for all layers."""
    return type(module).__name__.endswith("RotaryEmbedding")


@torch.library.custom_op("cggr::in_memory", mutates_args=(), schema="(Tensor x) -> Tensor")
def in_memory(x: Tensor) -> Tensor:
    """A copy, which no compiler computes again in place of reading it."""
    return x.clone()


@in_memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
