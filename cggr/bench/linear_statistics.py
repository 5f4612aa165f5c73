"""Statistics of a linear head: as users call them, and both ways that they can be computed.

An error is the largest absolute one of the first 64 rows, against float64 of the same hidden
states and weight: the rounding of logits to bfloat16 counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cggr.bench.linear import CASES, make_head, peak_memory
from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.statistics import CHECKED_ROWS, largest_error, largest_errors, plain_statistics
from cggr.bench.timing import Call, Contestant, Progress, measure, rows_of
from cggr.spec import TokenStatistics
from cggr.torch import linear_token_statistics, ops

NO_TARGET = -100
# What the rows of the operators' (6, N) are.
FIELDS = ("entropy", "margin", "confidence", "top", "nll", "error_norm")
FORCED = {"fused": ops.linear_statistics_fused, "chunked": ops.linear_statistics_chunked}


def compare(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    """Adds the products' speed and every time's ratio to that of the faster forced way."""
    if case.hidden_size is None:
        raise ValueError(f"a linear head needs a hidden_size, got {case}.")
    operations = 2 * case.n_rows * case.hidden_size * case.n_classes
    measured = [row for row in rows if "ms" in row]
    fastest = min((row["ms"] for row in measured if row["contestant"] in FORCED), default=None)
    for row in measured:
        row["tflop_per_s"] = operations / row["ms"] / 1e9
        row["to_faster_way"] = None if fastest is None else row["ms"] / fastest


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    hidden, weight, targets = make_head(case, settings.seed)
    logits = hidden[:CHECKED_ROWS].double() @ weight.double().T
    truth = plain_statistics(logits, targets[:CHECKED_ROWS])._asdict()
    del logits

    def observe(call: Call) -> dict[str, Any]:
        peak, values = peak_memory(call)
        if isinstance(values, TokenStatistics):
            named = values._asdict()
        else:
            named = dict(zip(FIELDS, values, strict=True))
            del named["top"]  # which is no statistic
        return {"peak_bytes": peak, "errors": largest_errors(named, truth)}

    def users() -> Call:
        return lambda: linear_token_statistics(hidden, weight, targets)

    def forced(way: Callable[..., Tensor]) -> Call:
        return lambda: way(hidden, weight, None, targets, NO_TARGET, 1.0, None)

    contestants = (
        Contestant("cggr", users, observe),
        # The tiles of the fused kernel do not fit every card.
        *(
            Contestant(name, functools.partial(forced, way), observe, may_fail=True)
            for name, way in FORCED.items()
        ),
    )
    with torch.no_grad():
        rows = rows_of(measure(contestants, settings, progress))
    compare(case, rows)
    return rows


BENCHMARK = Benchmark(
    cases=CASES,
    measure=run,
    columns=(
        *TIMES,
        Column("TFLOP/s", number("tflop_per_s", ".0f")),
        Column("of faster", number("to_faster_way", ".3f")),
        Column("peak MiB", number("peak_bytes", ",.0f", 2**20)),
        Column("error", largest_error),
    ),
)
