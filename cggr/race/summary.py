"""What the runs of a race say when they are put side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cggr.race.engine import Evaluation, Run, best_rate
from cggr.race.settings import RaceSettings


@dataclasses.dataclass(frozen=True)
class LaneSummary:
    """One lane over its seeds.

    Args:
        lane: Its name.
        curves: A learning curve per seed, all with as many points.
        peak_memory: Most device memory of any seed, None where it is not measured.
    """

    lane: str
    curves: tuple[tuple[Evaluation, ...], ...]
    peak_memory: int | None

    def points(self, field: str) -> npt.NDArray[np.float64]:
        """A field of every evaluation, (seeds, evaluations)."""
        return np.array([[getattr(point, field) for point in curve] for curve in self.curves])

    def final(self, field: str) -> npt.NDArray[np.float64]:
        """A field of the last evaluation, (seeds,)."""
        return self.points(field)[:, -1]

    @property
    def loss(self) -> float:
        """Final held-out loss, the mean over the seeds."""
        return float(self.final("loss").mean())


def rank(summary: LaneSummary) -> tuple[bool, float]:
    """Sort key from the lowest loss to the highest, a loss that is not a number last."""
    return math.isnan(summary.loss), summary.loss


def summarize(runs: Sequence[Run]) -> list[LaneSummary]:
    """Puts the lanes side by side at equal budgets, each at its best learning rate.

    Seeds that not all lanes have completed are left out where a complete one exists; otherwise the
    curves of the first seed end at the last evaluation that all its lanes have reached.

    Args:
        runs: At least one seed's runs.

    Returns:
        A summary per lane, in the order of the lanes.
    """
    rates: dict[str, float] = {}
    for lane in dict.fromkeys(run.lane for run in runs):
        first = [run for run in runs if run.lane == lane and run.seed == runs[0].seed]
        rates[lane] = best_rate(first or [run for run in runs if run.lane == lane])
    runs = [run for run in runs if run.learning_rate == rates[run.lane]]
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    groups = list(by_seed.values())
    complete = [
        group for group in groups if len(group) == len(rates) and all(run.complete for run in group)
    ]
    chosen = complete or groups[:1]
    # The shortest counts: a slow machine can step over an evaluation and has fewer of them.
    length = min(len(run.curve) for group in chosen for run in group)
    curves: dict[str, list[tuple[Evaluation, ...]]] = {}
    for run in (run for group in chosen for run in group):
        last = run.curve[-1] if complete else run.curve[length - 1]
        curves.setdefault(run.lane, []).append((*run.curve[: length - 1], last))
    peaks = {
        lane: max((run.peak_memory or 0 for run in runs if run.lane == lane), default=0)
        for lane in curves
    }
    return [LaneSummary(lane, tuple(found), peaks[lane] or None) for lane, found in curves.items()]


def budget_in_words(summaries: Sequence[LaneSummary], settings: RaceSettings) -> str:
    """The budget that the compared losses belong to, such as ``40 s per lane, 3 seeds``."""
    seeds = len(summaries[0].curves)
    field = settings.budget.unit
    spent = np.mean([summary.final(field).mean() for summary in summaries])
    # After Ctrl-C the curves end early; the budget that was asked for would be wrong then.
    whole = settings.budget.spent(float(spent), round(float(spent))) > 0.999
    amount = settings.budget.words if whole else f"{spent:.0f} of {settings.budget.words}"
    return f"{amount} per lane, {seeds} seed{'s' if seeds > 1 else ''}"


def verdict(summaries: Sequence[LaneSummary], settings: RaceSettings) -> list[str]:
    """Says which lane learned fastest, and says it as plainly when that is not cggr."""
    ranking = sorted(summaries, key=rank)
    losses = ", ".join(f"{summary.lane} {summary.loss:.3f}" for summary in ranking)
    unit = "time" if settings.budget.unit == "seconds" else "steps"
    lines = [f"Held-out loss at equal {unit} ({budget_in_words(summaries, settings)}): {losses}."]
    by_name = {summary.lane: summary for summary in summaries}
    cggr = by_name.pop("cggr", None)
    if cggr is not None and by_name:
        lines.append("; ".join(_compare(cggr, other) for other in by_name.values()) + ".")
    if len(summaries[0].curves) == 1:
        lines.append("One seed does not show how much of this is chance: --seeds 3 does.")
    return lines


def _compare(cggr: LaneSummary, other: LaneSummary) -> str:
    margin = other.final("loss") - cggr.final("loss")  # by seed: same batches, same start
    mean, seeds = float(margin.mean()), len(margin)
    if not np.isfinite(mean):
        return f"cggr against {other.lane}: a loss is not finite"
    if mean == 0:
        return f"cggr ties with {other.lane}"
    wins = int((margin > 0).sum())
    result, count = ("beats", wins) if mean > 0 else ("loses to", int((margin < 0).sum()))
    text = f"cggr {result} {other.lane} by {abs(mean):.3f}"
    return text if seeds == 1 else f"{text} (in {count} of {seeds} seeds)"
