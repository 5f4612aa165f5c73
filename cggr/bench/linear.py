"""Inputs of the benchmarks of linear heads, and the memory that a call needs."""

from __future__ import annotations

import gc
import math
from typing import Any

import torch
from torch import Tensor

from cggr.bench.settings import Case
from cggr.bench.timing import Call

CASES = (
    Case(16384, 49152, hidden_size=2048),
    Case(8192, 128256, hidden_size=4096),
    Case(32768, 49152, hidden_size=576),
)
_SAMPLED_ROWS = 1024  # at a time


def make_head(case: Case, seed: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Hidden ``(N, D)``, weight ``(V, D)`` and targets ``(N,)``.

    The logits are about N(0, 3²), and the targets are drawn from their softmax: the loss is the
    entropy, as in a model that has learned something.
    """
    if case.hidden_size is None:
        raise ValueError(f"a linear head needs a hidden_size, got {case}.")
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    hidden = normal(case.n_rows, case.hidden_size)
    weight = normal(case.n_classes, case.hidden_size) * (3 / math.sqrt(case.hidden_size))
    targets = []
    for rows in hidden.split(_SAMPLED_ROWS):
        logits = (rows @ weight.T).float()
        # The largest of logits with Gumbel noise, which is -log of exponential noise.
        logits -= torch.empty_like(logits).exponential_(generator=generator).log_()
        targets.append(logits.argmax(dim=-1))
    return hidden, weight, torch.cat(targets)


def peak_memory(call: Call) -> tuple[int, Any]:
    """Most bytes that a call had allocated above what was before, and its result."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result
