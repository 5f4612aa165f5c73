"""CGGRLinearLoss, forward and backward, against dense losses of a linear head.

All begin with hidden states, weight and targets, and end with the gradients of the first two.
``peak_bytes`` is the most memory in use during such a step, without the inputs and the gradients.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cggr.bench.linear import CASES, make_head, peak_memory
from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.timing import Call, Contestant, Progress, measure, rows_of
from cggr.torch import CGGRLinearLoss

RATIOS = (0.10, 0.25, 1.0)

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets)


def _compiled() -> LinearLoss:
    return torch.compile(_plain_loss, dynamic=False)


def _liger() -> LinearLoss:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def _cut_cross_entropy() -> LinearLoss:
    loss: LinearLoss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return loss


def _torch_chunked() -> LinearLoss:
    from torch.nn import LinearCrossEntropyOptions  # of torch 2.13; without options, not in chunks
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: linear_cross_entropy(
        hidden, weight, targets, options=options
    )


# Their losses, made when they are measured: what is not installed is reported.
DENSE: dict[str, Callable[[], LinearLoss]] = {
    "Liger": _liger,
    "cut-cross-entropy": _cut_cross_entropy,
    "torch, chunked": _torch_chunked,
    "torch.compile": _compiled,
}


def _cggr(ratio: float, compiled: bool) -> LinearLoss:
    criterion = CGGRLinearLoss(
        selection="topk",
        capacity="static",
        min_tokens_ratio=ratio,
        warmup_steps=0,
        dynamic_threshold=False,
    ).cuda()
    # What it compiles is the selection: some 200 short kernels.
    return torch.compile(criterion, fullgraph=True, dynamic=False) if compiled else criterion


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Adds every time's ratio to that of the fastest dense loss to the rows.

    Args:
        rows: Those of dense losses have the ratio None.
    """
    measured = [row for row in rows if "ms" in row]
    fastest = min((row["ms"] for row in measured if row["ratio"] is None), default=None)
    for row in measured:
        row["to_fastest_dense"] = None if fastest is None else row["ms"] / fastest


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    hidden, weight, targets = make_head(case, settings.seed)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def contestant(
        name: str, make: Callable[[], LinearLoss], ratio: float | None = None
    ) -> Contestant:
        def prepare() -> Call:
            loss_of = make()

            def step() -> Tensor:
                hidden.grad = weight.grad = None
                loss = loss_of(hidden, weight, targets)
                loss.backward()
                return loss.detach()

            return step

        def observe(step: Call) -> dict[str, Any]:
            hidden.grad = weight.grad = None
            peak, loss = peak_memory(step)
            gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
            return {
                "ratio": ratio,
                "peak_bytes": peak - gradients,
                "loss": float(loss),
            }

        return Contestant(name, prepare, observe, may_fail=ratio is None)

    torch._dynamo.reset()  # each case is compiled for its own shape
    contestants = (
        *(
            contestant(
                f"cggr, ratio {ratio:g}{', compiled' if compiled else ''}",
                functools.partial(_cggr, ratio, compiled),
                ratio,
            )
            for compiled in (False, True)
            for ratio in RATIOS
        ),
        *(contestant(name, make) for name, make in DENSE.items()),
    )
    rows = rows_of(measure(contestants, settings, progress))
    hidden.grad = weight.grad = None
    compare(rows)
    return rows


BENCHMARK = Benchmark(
    cases=CASES,
    measure=run,
    columns=(
        *TIMES,
        Column("of dense", number("to_fastest_dense", ".3f")),
        Column("peak MiB", number("peak_bytes", ",.0f", 2**20)),
        Column("loss", number("loss", ".3f")),
    ),
)
