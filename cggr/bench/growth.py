"""How time and memory of a step grow with the length, the batch and the vocabulary.

Llamas of SmolLM-135M's shape, forward and backward, in one CUDA graph, which no host delays; memory
is of the same step before it is captured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings
from cggr.bench.step import CASES as STEP_CASES
from cggr.bench.step import UNMASKED, StepCase, run_ways, ways
from cggr.bench.timing import Progress, add_ratio

DENSE_GRAPH = f"{UNMASKED}, graph"
LINES = {
    DENSE_GRAPH: "tab:gray",
    "token, ratio 0.25, graph": "tab:blue",
    "token, ratio 0.1, graph": "tab:green",
}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32)
VOCABULARIES = (32000, 49152, 128256, 256000)


def cases() -> tuple[StepCase, ...]:
    """Lengths of one sequence, sequences of 1,024 tokens, vocabularies of eight of them."""
    base = STEP_CASES[0].of_batch(1)
    return (
        *(dataclasses.replace(base, n_rows=length) for length in LENGTHS),
        *(base.of_batch(batch) for batch in BATCHES[1:]),
        *(dataclasses.replace(base.of_batch(8), n_classes=classes) for classes in VOCABULARIES),
    )


def run(case: StepCase, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    chosen = [way for way in ways(settings) if way.name in LINES]
    rows = run_ways(case, settings, progress, chosen)
    add_ratio(rows, "to_dense", "ms", DENSE_GRAPH)
    return rows


def draw(entries: Iterable[dict[str, Any]], path: Path) -> None:
    """Draws what was measured.

    Args:
        entries: A ``case`` and its ``contestants`` each, as the file of results has them.
        path: The image, in any format of matplotlib's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    found = list(entries)
    base = STEP_CASES[0]
    panels = (
        ("tokens of one sequence", "length", lambda c: c["batch"] == 1),
        ("sequences of 1,024 tokens", "batch", lambda c: c["length"] == base.length),
        ("classes, 8 sequences of 1,024", "n_classes", lambda c: c["batch"] == 8),
    )
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(panels), sharex="col")
    for column, (title, key, belongs) in enumerate(panels):
        shapes = [entry["case"] | {"rows": entry["contestants"]} for entry in found]
        for shape in shapes:
            shape["length"] = shape["n_rows"] // shape["batch"]
        if key == "batch":
            shapes = [shape for shape in shapes if shape["n_classes"] == base.n_classes]
        shapes = sorted(filter(belongs, shapes), key=lambda shape: shape[key])
        for name, color in LINES.items():
            label = name.removesuffix(", graph")
            for row, (field, unit) in enumerate((("ms", 1.0), ("peak_bytes", 2**30))):
                points = [
                    (shape[key], measured[field] / unit)
                    for shape in shapes
                    for measured in shape["rows"]
                    if measured["contestant"] == name and measured.get(field) is not None
                ]
                axes[row][column].plot(*zip(*points, strict=True) if points else ((), ()),
                                       marker="o", color=color, label=label)  # fmt: skip
        axes[0][column].set_title(title)
        for row, label in enumerate(("ms a step", "GiB")):
            panel = axes[row][column]
            panel.set(xscale="log", yscale="log", ylabel=label if column == 0 else None)
            panel.set_xticks(sorted({shape[key] for shape in shapes}))
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
                axis.set_minor_locator(NullLocator())
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


BENCHMARK = Benchmark(
    cases=cases(),
    measure=run,
    columns=(
        *TIMES,
        Column("of dense", number("to_dense", ".3f")),
        Column("peak GiB", number("peak_bytes", ".2f", 2**30)),
    ),
    draw=draw,
)
