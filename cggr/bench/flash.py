"""Training steps by each attention that transformers has: eager, sdpa, flash attention.

Dense, by whole sequences, and by tokens; the last attends by its own ways, whatever is set. Forward
and backward in eager mode, as in ``step``. The package flash-attn has to be installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.step import CASES, DENSE, Step, StepCase, Way, run_ways, ways
from cggr.bench.timing import Progress, add_ratio
from cggr.torch import enable_flash_attention

BACKENDS = ("eager", "sdpa", "flash_attention_2")
WAYS = (DENSE, "sequence, ratio 0.25", "token, 2 layers score, ratio 0.25")
BASELINE = f"{DENSE}, sdpa"


def _attending(backend: str, make: Callable[[Any, Tensor], Step], model: Any, ids: Tensor) -> Step:
    """The step, attending so; all contestants share the model, and each sets what it needs."""
    enable_flash_attention(model, backend)
    loss_of = make(model, ids)

    def step() -> Tensor:
        model.set_attn_implementation(backend)
        return loss_of()

    return step


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    if not isinstance(case, StepCase):
        raise TypeError(f"case must be a StepCase, got {case!r}.")
    by_name = {way.name: way for way in ways(settings)}
    # Eager attention needs memory for every pair of tokens, and the package may be missing.
    found = [
        Way(
            f"{name}, {backend}",
            functools.partial(_attending, backend, by_name[name].make),
            may_fail=by_name[name].may_fail or backend != "sdpa",
        )
        for name in WAYS
        for backend in BACKENDS
    ]
    rows = run_ways(case, settings, progress, found)
    add_ratio(rows, "to_sdpa", "ms", BASELINE)
    return rows


BENCHMARK = Benchmark(
    cases=(CASES[0], CASES[3], CASES[4].of_batch(1)),
    measure=run,
    columns=(
        *TIMES,
        Column("of dense by sdpa", number("to_sdpa", ".2f")),
        Column("peak GiB", number("peak_bytes", ".1f", 2**30)),
        Column("loss", number("loss", ".3f")),
    ),
)
