"""The largest batch whose training step fits into the memory of a small card.

Forward and backward of a Llama of random weights in bfloat16, without an optimizer. The limit is
that of PyTorch's allocator: weights and gradients are in it, the CUDA context is not.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cggr.bench.main import Benchmark
from cggr.bench.report import Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.step import CASES, DENSE, Step, StepCase, make_ids, make_model, ways
from cggr.bench.timing import Failure, Progress, reported, rows_of

LIMIT_BYTES = 12 * 2**30
MAX_BATCH = 256


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    if not isinstance(case, StepCase):
        raise TypeError(f"case must be a StepCase, got {case!r}.")
    model = make_model(case, settings.seed)
    ids = make_ids(case.of_batch(MAX_BATCH), settings.seed, model.device)
    rows: list[dict[str, Any]] = []
    failures: dict[str, Failure] = {}
    with limited_memory(LIMIT_BYTES):
        for way in ways(settings):
            if way.mode != "eager":  # it would compile, or be captured, for every batch
                continue

            def fits(batch: int, name: str = way.name, make: Any = way.make) -> bool:
                progress(f"{name}, {batch} sequences")
                return step_fits(make, model, ids[:batch])

            ours = way.name.startswith("token")
            with reported(way.name, failures, may_fail=not ours):
                rows.append({"contestant": way.name, "batch": largest(fits, MAX_BATCH)})
    compare(rows)
    return rows + rows_of(failures)


@contextlib.contextmanager
def limited_memory(n_bytes: int) -> Iterator[None]:
    """PyTorch allocates no more than this on the device meanwhile."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        n_bytes / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def step_fits(make: Callable[[Any, Tensor], Step], model: Any, ids: Tensor) -> bool:
    """Whether forward and backward of this batch find the memory that they need."""
    try:
        make(model, ids)().backward()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    return True


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number in ``[0, limit]`` that fits, if all below one that fits do too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds the batch relative to the dense one."""
    by_name = {row["contestant"]: row for row in rows}
    for row in rows:
        if DENSE in by_name:
            row["to_dense"] = row["batch"] / by_name[DENSE]["batch"]


BENCHMARK = Benchmark(
    cases=CASES[:1],
    measure=run,
    columns=(
        Column("sequences", number("batch", "d")),
        Column("of dense", number("to_dense", ".2f")),
    ),
)
