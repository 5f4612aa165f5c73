"""The largest batch whose training step fits into the memory of a small card.

Forward and backward of a Llama of random weights in bfloat16, without an optimizer. The limit is
that of PyTorch's allocator: weights and gradients are in it, the CUDA context is not.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import gc
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cggr.bench.main import Benchmark
from cggr.bench.report import Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.step import CASES, DENSE, Step, StepCase, make_ids, make_model, ways
from cggr.bench.timing import Failure, Progress, add_ratio, reported, rows_of

LIMIT_BYTES = 12 * 2**30
MAX_BATCH = 1024


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    if not isinstance(case, StepCase):
        raise TypeError(f"case must be a StepCase, got {case!r}.")
    rows: list[dict[str, Any]] = []
    failures: dict[str, Failure] = {}
    for way in ways(settings):
        if way.mode != "eager" or not settings.wants(way.name):
            continue  # what is compiled or captured would be so for every batch
        progress(way.name)
        with reported(way.name, failures, may_fail=way.may_fail):
            batch = in_own_process(largest_batch, way.name, case, settings)
            rows.append({"contestant": way.name, "batch": batch})
    add_ratio(rows, "to_dense", "batch", DENSE)
    return rows + rows_of(failures)


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result, or what it raises.

    After an illegal access to memory, a process cannot use the device any more.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(function, *args).result()


def largest_batch(name: str, case: StepCase, settings: BenchSettings) -> int:
    """How many sequences this way can train on; limits the memory of the process."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(LIMIT_BYTES / total)
    make = {way.name: way.make for way in ways(settings)}[name]
    model = make_model(case, settings.seed)
    ids = make_ids(case.of_batch(MAX_BATCH), settings.seed, model.device)
    return largest(lambda batch: step_fits(make, model, ids[:batch]), MAX_BATCH)


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
    return bisect.bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))


BENCHMARK = Benchmark(
    cases=(CASES[0].of_batch(1),),
    measure=run,
    columns=(
        Column("sequences", number("batch", ".0f")),
        Column("of dense", number("to_dense", ".2f")),
    ),
)
