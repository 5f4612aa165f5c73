"""Token statistics of logits, against a loop that only reads them, PyTorch, and cggr 0.5.0.

The logits are N(0, 3²). An error is the largest absolute one of the first 64 rows, against float64.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cggr.bench.main import Benchmark
from cggr.bench.read_loop import BLOCKS, ROW, WARPS, read_loop_kernel
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.timing import Call, Contestant, Progress, measure, rows_of
from cggr.spec import TokenStatistics
from cggr.torch import token_statistics

CASES = (
    Case(16384, 49152),
    Case(16384, 32000),
    Case(16384, 50257),
    Case(8192, 128256),
    Case(8192, 151936),
    Case(4096, 262144),
    Case(8192, 49152, dtype="float32"),
)
CHECKED_ROWS = 64
OLD = "cggr 0.5.0"


def make_logits(case: Case, seed: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """Logits ``(N, V)`` and targets ``(N,)``."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, dtype = (case.n_rows, case.n_classes), getattr(torch, case.dtype)
    logits = torch.empty(shape, dtype=dtype, device=device).normal_(0, 3, generator=generator)
    targets = torch.randint(case.n_classes, shape[:1], device=device, generator=generator)
    return logits, targets


def plain_statistics(logits: Tensor, targets: Tensor) -> TokenStatistics:
    """The statistics as one would write them; float32, or float64 of float64 logits."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(x, dim=-1)
    p = log_p.exp()
    confidence, most_likely = p.max(dim=-1)
    classes = torch.arange(x.shape[-1], device=x.device)
    second = p.masked_fill(classes == most_likely[:, None], 0).amax(dim=-1)
    is_target = classes == targets[:, None]
    return TokenStatistics(
        nll=-log_p.gather(-1, targets[:, None])[:, 0],
        entropy=-(p * log_p).sum(dim=-1),
        confidence=confidence,
        margin=confidence - second,
        error_norm=torch.where(is_target, p - 1, p).square().sum(dim=-1).sqrt(),
    )


def largest_errors(
    values: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None]
) -> dict[str, float]:
    """Largest absolute error of every statistic that `values` has.

    Args:
        values: Each ``(N,)``, of at least as many rows as the truth.
        truth: Each ``(n,)``, float64.
    """
    errors = {}
    for name, value in values.items():
        exact = truth[name]
        if value is not None and exact is not None:
            errors[name] = (value[: len(exact)].double() - exact).abs().max().item()
    return errors


def largest_error(row: dict[str, Any]) -> str | None:
    """The largest error of any statistic of a row, for its table."""
    return f"{max(row['errors'].values()):.1e}" if row.get("errors") else None


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Adds bandwidth, its share of the read loop's, and the speed-up over cggr 0.5.0 to the rows.

    Args:
        rows: Those of the read loops have no ``errors``.
    """
    measured = [row for row in rows if "ms" in row]
    for row in measured:
        row["gb_per_s"] = row["bytes"] / row["ms"] / 1e6
    ceiling = max(row["gb_per_s"] for row in measured if "errors" not in row)
    old = next((row["ms"] for row in measured if row["contestant"] == OLD), None)
    for row in measured:
        row["share_of_ceiling"] = row["gb_per_s"] / ceiling
        row["speedup_over_050"] = None if old is None or "errors" not in row else old / row["ms"]


def _read_loop(logits: Tensor, block: int) -> Contestant:
    n_rows = logits.numel() // ROW  # what is left over is at most 128 KiB of gigabytes
    out = torch.empty(n_rows, dtype=torch.float32, device=logits.device)

    def call() -> None:
        read_loop_kernel[(n_rows,)](logits, out, ROW=ROW, BLOCK=block, num_warps=WARPS)

    n_bytes = n_rows * ROW * logits.element_size()
    return Contestant(f"read loop, {block}", lambda: call, lambda _: {"bytes": n_bytes})


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    before = os.environ.get("CGGR_IMPLEMENTATION")
    os.environ["CGGR_IMPLEMENTATION"] = "eager"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CGGR_IMPLEMENTATION"]
        else:
            os.environ["CGGR_IMPLEMENTATION"] = before


def load_050(folder: Path | None, name: str = "triton_kernels") -> Any:
    """A module of cggr 0.5.0, whose package is named like ours; its kernels unless named.

    Raises:
        ImportError: There is no such folder, or its module cannot be imported.
    """
    if folder is None:
        raise ImportError("give the folder of its modules with --cggr-050")
    path = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location("cggr_050", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))  # for what it imports from beside itself
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    logits, targets = make_logits(case, settings.seed)
    truth = plain_statistics(logits[:CHECKED_ROWS].double(), targets[:CHECKED_ROWS])._asdict()

    def observe(call: Call) -> dict[str, Any]:
        values = call()
        if isinstance(values, TokenStatistics):
            values = values._asdict()
        else:  # of cggr 0.5.0: its difficulty is another one
            values = dict(zip(("confidence", "entropy"), values[1:], strict=True))
        return {"bytes": logits.nbytes, "errors": largest_errors(values, truth)}

    def eager() -> TokenStatistics:
        with _eager():
            return token_statistics(logits, targets)

    def compiled() -> Call:
        function = torch.compile(plain_statistics, dynamic=False)
        return lambda: function(logits, targets)

    def old() -> Call:
        module = load_050(settings.cggr_050)
        return lambda: module._triton_difficulty_score(logits, targets)

    torch._dynamo.reset()  # each case is compiled for its own shape
    contestants = (
        *(_read_loop(logits, block) for block in BLOCKS),
        Contestant("cggr", lambda: lambda: token_statistics(logits, targets), observe),
        Contestant("cggr, eager", lambda: eager, observe),
        Contestant("torch.compile", compiled, observe, may_fail=True),
        Contestant(OLD, old, observe, may_fail=True),
    )
    rows = rows_of(measure(contestants, settings, progress))
    compare(rows)
    return rows


BENCHMARK = Benchmark(
    cases=CASES,
    measure=run,
    columns=(
        *TIMES,
        Column("GB/s", number("gb_per_s", ",.0f")),
        Column("of reading", number("share_of_ceiling", ".1%")),
        Column("x 0.5.0", number("speedup_over_050", ".2f")),
        Column("error", largest_error),
    ),
)
