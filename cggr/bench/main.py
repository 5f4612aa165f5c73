"""Benchmarks from their settings to their results."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cggr.bench import report
from cggr.bench.report import Column
from cggr.bench.settings import BENCHMARKS, BenchError, BenchSettings, Shape
from cggr.race import machine


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One thing that is measured.

    Args:
        cases: Shapes, the most important one first.
        measure: ``(case, settings, progress)`` to a row per contestant.
        columns: What a table shows of the rows.
        missing: What this machine lacks for it, None if nothing.
        draw: ``(cases with their contestants, path of an image)``, of all that was measured; None
            where there is nothing to see.
    """

    cases: tuple[Shape, ...]
    measure: Callable[[Any, BenchSettings, Callable[[str], None]], list[dict[str, Any]]]
    columns: tuple[Column, ...]
    missing: Callable[[], str | None] = lambda: None
    draw: Callable[[Sequence[dict[str, Any]], Path], None] | None = None


def check_machine() -> None:
    """Refuses a machine on which nothing can be measured.

    Raises:
        BenchError: PyTorch, Triton or an NVIDIA device is missing.
    """
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise BenchError(f"cggr bench needs {package}: pip install 'cggr[benchmark]'")
    import torch

    if torch.version.hip is not None:
        raise BenchError(f"cggr bench needs a CUDA device: torch {torch.__version__} is for ROCm")
    if not torch.cuda.is_available():
        raise BenchError(f"cggr bench needs a CUDA device: torch {torch.__version__} sees none")


def runtime() -> machine.Runtime:
    """What the benchmarks run on."""
    import torch

    packages = (
        "torch",
        "triton",
        "transformers",
        "liger-kernel",
        "cut-cross-entropy",
        "jax",
        "jax-triton",
        "flax",
    )
    return machine.Runtime(
        versions={
            **{name: machine.package_version(name) for name in packages},
            "cuda": torch.version.cuda,
        },
        device="cuda",
        gpu=torch.cuda.get_device_name(),
        threads=torch.get_num_threads(),
    )


def run_benchmarks(
    names: Sequence[str], settings: BenchSettings, folder: Path, console: Console
) -> None:
    """Runs benchmarks, shows a table for each case, and writes ``NAME.json`` for each benchmark.

    Args:
        names: Out of :data:`BENCHMARKS`; all that this machine can run when empty.
        settings: How to measure.
        folder: Folder of the results, which is made if it is missing.
        console: Where the results are shown.

    Raises:
        BenchError: Something is missing.
    """
    check_machine()
    here = runtime()
    versions = ", ".join(f"{name} {here.versions[name]}" for name in ("torch", "triton", "cuda"))
    console.print(
        f"{here.gpu}, {versions}; medians of {settings.rounds} rounds\n",
        highlight=False,
        soft_wrap=True,
    )
    for name in names or BENCHMARKS:
        benchmark: Benchmark = importlib.import_module(f"cggr.bench.{name}").BENCHMARK
        missing = benchmark.missing()
        if missing is None:
            run_benchmark(name, benchmark, settings, folder / f"{name}.json", here, console)
        elif names:
            raise BenchError(f"cggr bench {name}: {missing}")
        else:
            console.print(f"{name}: skipped: {missing}\n", highlight=False, soft_wrap=True)


def run_benchmark(
    name: str,
    benchmark: Benchmark,
    settings: BenchSettings,
    path: Path,
    here: machine.Runtime,
    console: Console,
) -> None:
    """Runs one benchmark; the file is written after every case, for all that was measured."""
    import torch

    cases = settings.chosen(benchmark.cases)
    found: list[dict[str, Any]] = []
    for number, case in enumerate(cases, start=1):
        title = f"{name} {number} of {len(cases)}: {case.title}"
        gc.collect()  # models and their graphs, which refer to each other
        torch.cuda.empty_cache()  # what PyTorch keeps from earlier cases, JAX would miss
        rows = _measure(benchmark, case, settings, title, console)
        report.print_case(console, title, rows, benchmark.columns)
        found.append({"case": dataclasses.asdict(case), "contestants": rows})
        results = {
            "benchmark": name,
            "claim": BENCHMARKS[name],
            "complete": len(found) == len(cases),
            "settings": settings.to_json(),
            **machine.environment(here),
            "cases": found,
        }
        report.write(path, results)
    if benchmark.draw is not None:
        benchmark.draw(found, path.with_suffix(".png"))
    console.print(f"Results: {path}\n", highlight=False, soft_wrap=True)


def _measure(
    benchmark: Benchmark, case: Shape, settings: BenchSettings, title: str, console: Console
) -> list[dict[str, Any]]:
    with console.status(title) as status:
        return benchmark.measure(case, settings, lambda what: status.update(f"{title}: {what}"))
