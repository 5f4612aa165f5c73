"""CGGRModel's step on four times the sequences, against the dense step on one batch of them.

cggr 0.5.0 promised that the larger batch costs no time. The step is forward and backward, in eager
mode and in one CUDA graph, also of a compiled model.
"""

from __future__ import annotations

from typing import Any

import torch

from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings
from cggr.bench.step import CASES as STEP_CASES
from cggr.bench.step import (
    DENSE,
    UNMASKED,
    StepCase,
    contestant_of,
    make_ids,
    make_model,
    ways,
)
from cggr.bench.timing import Contestant, Progress, add_ratio, measure, rows_of
from cggr.torch.router import room_for_graphs

TIMES_BATCH = 4
# Of each mode, the dense step without what transformers has to be slower in it.
DENSE_WAYS = {
    "": DENSE,
    ", graph": f"{UNMASKED}, graph",
    ", compiled graph": f"{UNMASKED}, compiled graph",
}
ROUTED = ("sequence, ratio 0.25", "token, ratio 0.25", "token, 2 layers score, ratio 0.25")


def run(case: StepCase, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case: its batch for the dense step, four times as much for the others."""
    by_name = {way.name: way for way in ways(settings)}
    model = make_model(case, settings.seed)
    larger = make_ids(case.of_batch(TIMES_BATCH * case.batch), settings.seed, model.device)
    pool = torch.cuda.graph_pool_handle()
    contestants: list[Contestant] = []
    references: dict[str, str] = {}
    for mode, name in DENSE_WAYS.items():
        dense = by_name[name]
        group = [contestant_of(dense, model, larger[: case.batch], pool)]
        for way in (dense, *(by_name[routed + mode] for routed in ROUTED)):
            title = f"{way.name}, {TIMES_BATCH} times the batch"
            group.append(contestant_of(way, model, larger, pool, title))
        references |= {one.name: dense.name for one in group}
        contestants += group
    with room_for_graphs():
        rows = rows_of(measure(contestants, settings, progress))
    for reference in DENSE_WAYS.values():
        group_rows = [row for row in rows if references[row["contestant"]] == reference]
        add_ratio(group_rows, "to_dense", "ms", reference)
    return rows


BENCHMARK = Benchmark(
    cases=(STEP_CASES[0].of_batch(1), STEP_CASES[1].of_batch(1)),
    measure=run,
    columns=(*TIMES, Column("of one batch, dense", number("to_dense", ".3f"))),
)
