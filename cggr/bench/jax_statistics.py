"""Token statistics from JAX against those from PyTorch: the same arrays, in the same process.

Both enqueue 20 calls and wait once, by the host's clock: what a single call costs the host is
hidden behind the device's work, as it is in a training step under jit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.statistics import CASES, make_logits
from cggr.bench.timing import Call, Contestant, Progress, measure, rows_of, wall_clock
from cggr.race.machine import share_memory
from cggr.torch import token_statistics

CALLS = 20


def missing() -> str | None:
    """What of JAX, its GPU and jax-triton is missing."""
    for module, package in (("jax", "jax"), ("flax", "flax"), ("jax_triton", "jax-triton")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    share_memory()
    import jax

    try:
        jax.devices("gpu")
    except RuntimeError as error:
        return f"JAX has no GPU: {str(error).splitlines()[0]}"
    return None


def compare(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    """Adds bandwidth and the ratio to PyTorch's time to the rows.

    Args:
        case: What was measured.
        rows: That of PyTorch is the first.
    """
    n_bytes = case.n_rows * case.n_classes * getattr(torch, case.dtype).itemsize
    for row in rows:
        row["gb_per_s"] = n_bytes / row["ms"] / 1e6
        row["to_torch"] = row["ms"] / rows[0]["ms"]


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    import jax
    import jax.numpy as jnp

    from cggr.jax import token_statistics as jax_token_statistics

    logits, targets = make_logits(case, settings.seed)
    targets = targets.int()  # the integers of JAX
    expected = token_statistics(logits, targets)
    jax_arrays = jnp.from_dlpack(logits), jnp.from_dlpack(targets)
    jitted = jax.jit(jax_token_statistics)

    def observe(call: Call) -> dict[str, Any]:
        values = jax.block_until_ready(call())
        pairs = zip(values, expected, strict=True)
        count = sum(differing(torch.from_dlpack(x), y) for x, y in pairs if y is not None)
        return {"values_that_differ": count}

    contestants = (
        Contestant(
            "torch",
            lambda: lambda: token_statistics(logits, targets),
            clock=wall_clock(lambda _: torch.cuda.synchronize()),
            calls=CALLS,
        ),
        Contestant(
            "jax",
            lambda: lambda: jitted(*jax_arrays),
            observe,
            clock=wall_clock(jax.block_until_ready),
            calls=CALLS,
        ),
    )
    rows = rows_of(measure(contestants, settings, progress))
    compare(case, rows)
    return rows


def differing(x: Tensor, y: Tensor) -> int:
    """How many float32 differ in their bits."""
    return int((x.view(torch.int32) != y.view(torch.int32)).sum())


BENCHMARK = Benchmark(
    cases=CASES,
    measure=run,
    missing=missing,
    columns=(
        *TIMES,
        Column("GB/s", number("gb_per_s", ",.0f")),
        Column("of torch", number("to_torch", ".3f")),
        Column("differing", number("values_that_differ", ",.0f")),
    ),
)
