"""Which code computes the operations on logits: plain PyTorch, or the Triton kernels.

The kernels run on NVIDIA's devices, everything else is eager. ``CGGR_IMPLEMENTATION`` names one of
the two, which then runs or raises: there is no silent fallback. What torch.compile has traced keeps
the one that it was traced with.

Shapes: ``N`` tokens, ``D`` hidden size, ``V`` classes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cggr.torch import eager, fused
from cggr.torch.selected import Scored


class Implementation(NamedTuple):
    """The operations, each documented in :mod:`cggr.torch.eager`.

    Attributes:
        token_statistics: Of logits ``(..., V)``.
        linear_token_statistics: Of a linear head's logits.
        chunked_statistics: Of the logits that any function makes of rows.
        cross_entropy_sum: ``Σ w nll`` of selected rows of logits ``(N, V)``, differentiable.
        linear_cross_entropy_sum: The same of a linear head.
        vocabulary_sums: What logits of some of the classes add to the statistics.
        linear_vocabulary_sums: The same of a linear head.
        part_cross_entropy_sum: ``Σ w nll`` of such logits, whose softmax over all is known.
        part_linear_cross_entropy_sum: The same of a linear head.
    """

    token_statistics: Callable[..., Scored]
    linear_token_statistics: Callable[..., Scored]
    chunked_statistics: Callable[..., Scored]
    cross_entropy_sum: Callable[..., Tensor]
    linear_cross_entropy_sum: Callable[..., Tensor]
    vocabulary_sums: Callable[..., Tensor]
    linear_vocabulary_sums: Callable[..., Tensor]
    part_cross_entropy_sum: Callable[..., Tensor]
    part_linear_cross_entropy_sum: Callable[..., Tensor]


IMPLEMENTATIONS = {
    name: Implementation(*(getattr(module, operation) for operation in Implementation._fields))
    for name, module in (("eager", eager), ("triton", fused))
}


def implementation(x: Tensor) -> Implementation:
    """The implementation for logits, or hidden states, like `x`.

    Raises:
        ValueError: ``CGGR_IMPLEMENTATION`` names none.
        TypeError: It is ``"triton"`` and there is no kernel for the dtype.
        ImportError: It is the kernels' turn and Triton is not installed.
    """
    return IMPLEMENTATIONS[_name(x.is_cuda and torch.version.hip is None, x.dtype)]


@torch.compiler.assume_constant_result
def _name(on_nvidia: bool, dtype: torch.dtype) -> str:
    name = os.environ.get("CGGR_IMPLEMENTATION")
    if name is None:
        name = "triton" if on_nvidia and dtype in fused.DTYPES else "eager"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"CGGR_IMPLEMENTATION must be one of {', '.join(map(repr, IMPLEMENTATIONS))} "
            f"in cggr.torch, got {name!r}."
        )
    if name == "triton" and dtype not in fused.DTYPES:
        raise TypeError(
            f"CGGR_IMPLEMENTATION='triton' needs float32, bfloat16 or float16, got {dtype}."
        )
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ImportError(
            "The CUDA kernels need Triton: pip install 'cggr[cuda]', or set "
            "CGGR_IMPLEMENTATION=eager to do without them."
        )
    return name
