"""The picture of a race: held-out loss against training time and against steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cggr.race.settings import RaceSettings
from cggr.race.summary import LaneSummary, budget_in_words

# Okabe and Ito's colours, which people with colour-blindness can tell apart, and a marker each.
STYLES = {
    "dense": ("#444444", "s"),
    "random": ("#E69F00", "^"),
    "cggr": ("#0072B2", "o"),
    "random-sequences": ("#CC79A7", "v"),
    "cggr-sequences": ("#009E73", "D"),
}


def draw(
    summaries: Sequence[LaneSummary], settings: RaceSettings, subtitle: str, path: Path
) -> None:
    """Writes the picture.

    The lines are means over the seeds, the bands reach from the lowest to the highest seed.

    Args:
        summaries: The lanes.
        settings: The race.
        subtitle: What was raced on what, in a line.
        path: File to write.
    """
    # Not pyplot: it would choose a backend for the whole process.
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    styles = _styles([summary.lane for summary in summaries])
    for axes, field, label in (
        (left, "seconds", "training time in seconds, scoring included"),
        (right, "steps", "optimizer steps"),
    ):
        for summary in summaries:
            _draw_lane(axes, summary, field, styles[summary.lane])
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _zoom(left, summaries)
    left.set_ylabel("held-out loss in nats per token")
    left.set_title("by training time", loc="left", fontsize=11)
    right.set_title("by step", loc="left", fontsize=11)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = left.get_legend_handles_labels()
    right.legend(
        handles,
        labels,
        title="final held-out loss",
        loc="upper right",
        edgecolor="none",
        framealpha=0.9,
    )
    figure.suptitle(
        f"cggr race: {budget_in_words(summaries, settings)}\n",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    figure.text(0.01, 0.925, subtitle, ha="left", va="center", fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)


def _styles(lanes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each lane; those of a configuration take what the others leave."""
    free = [style for name, style in STYLES.items() if name not in lanes]
    free += [
        (to_hex(color), marker) for marker in "ovsD" for color in colormaps["tab10"](range(10))
    ]
    return {lane: STYLES[lane] if lane in STYLES else free.pop(0) for lane in lanes}


def _draw_lane(axes: Axes, summary: LaneSummary, field: str, style: tuple[str, str]) -> None:
    color, marker = style
    losses = summary.points("loss")
    x, mean = summary.points(field).mean(0), losses.mean(0)
    label = f"{summary.lane}  {summary.loss:.3f}"
    if len(losses) > 1:
        final = summary.final("loss")
        label += f"  [{final.min():.3f}, {final.max():.3f}]"
        axes.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=color, marker=marker, markersize=4, linewidth=1.8, label=label)


def _zoom(axes: Axes, summaries: Sequence[LaneSummary]) -> None:
    """Leaves the untrained model out of sight, whose loss would flatten all that follows."""
    later = np.concatenate([summary.points("loss")[:, 1:].ravel() for summary in summaries])
    later = later[np.isfinite(later)]
    if later.size:
        low, high = later.min(), later.max()
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
