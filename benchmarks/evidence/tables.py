"""Prints results of the study as docs/evidence.md has them.

    python benchmarks/evidence/tables.py completions noise

takes benchmarks/results/evidence/NAME.json, which is the results.json of a race, or a path to one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cggr.race.engine import Evaluation, Run, best_rate

COLUMNS = (
    "lane",
    "ms a step",
    "steps",
    "GiB",
    "peak rate",
    "held-out loss",
    "of each seed",
    "other rates",
)
FOLDER = Path(__file__).parents[1] / "results" / "evidence"


def results_of(name: str) -> dict[str, Any]:
    """What a race left, by its name here or its path."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def runs_of(results: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Runs that came to their end, by lane."""
    lanes: dict[str, list[Run]] = {}
    for entry in results["runs"]:
        curve = [
            Evaluation(**{key: value for key, value in point.items() if key != "bits_per_byte"})
            for point in entry["curve"]
        ]
        run = Run(
            entry["lane"],
            entry["seed"],
            entry["learning_rate"],
            peak_memory=entry["peak_memory"],
            complete=entry["complete"],
            curve=curve,
        )
        if run.complete:
            lanes.setdefault(run.lane, []).append(run)
    return lanes


def at_best_rate(runs: Sequence[Run]) -> list[Run]:
    """A lane's runs of all seeds, at the rate that was best of the first."""
    rate = best_rate([run for run in runs if run.seed == 0])
    return [run for run in runs if run.learning_rate == rate]


def mean_loss(runs: Sequence[Run]) -> float:
    """Of the final losses."""
    return sum(run.curve[-1].loss for run in runs) / len(runs)


def table(results: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown, the lane of the lowest loss first."""
    lanes = runs_of(results)
    order = sorted(lanes, key=lambda name: mean_loss(at_best_rate(lanes[name])))
    line = "| " + " | ".join(["---"] * len(COLUMNS)) + " |"
    return [f"| {' | '.join(COLUMNS)} |", line, *(_row(name, lanes[name]) for name in order)]


def _row(name: str, runs: Sequence[Run]) -> str:
    best = at_best_rate(runs)
    ends = [run.curve[-1] for run in best]
    steps = round(sum(end.steps for end in ends) / len(ends))
    milliseconds = 1000 * sum(end.seconds for end in ends) / sum(end.steps for end in ends)
    others = [run for run in runs if run not in best]
    cells = (
        name,
        f"{milliseconds:.1f}",
        f"{steps:,}",
        f"{max(run.peak_memory or 0 for run in best) / 2**30:.1f}",
        f"{best[0].learning_rate:g}",
        f"{mean_loss(best):.3f}",
        " ".join(f"{end.loss:.3f}" for end in ends),
        " ".join(f"{run.learning_rate:g}: {run.curve[-1].loss:.3f}" for run in others),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the tables that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    for name in parser.parse_args().names:
        print(f"{name}:\n", *table(results_of(name)), "", sep="\n")


if __name__ == "__main__":
    main()
