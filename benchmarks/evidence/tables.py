"""Prints results of the study as docs/evidence.md and README.md have them.

    python benchmarks/evidence/tables.py runs/completions/results.json
    python benchmarks/evidence/tables.py completions noise
    python benchmarks/evidence/tables.py --summary

A name is that of a file in benchmarks/results/evidence, the results.json of a race; the summary is
of those files.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
TOKENS = ("tokens_seen", "tokens_trained")
FOLDER = Path(__file__).parents[1] / "results" / "evidence"


class Way(NamedTuple):
    """A lane of a race, and what the summary says of it."""

    race: str
    lane: str
    words: str = ""


class Setting(NamedTuple):
    """A row of the summary."""

    words: str
    dense: Way
    cggr: Way
    random: Way | None = None


SUMMARY = (
    Setting(
        "(b) fine-tuning on completions, 368 M parameters, 20 s",
        Way("completions", "dense"),
        Way("completions", "backward completions", '`split="backward"`, all completions'),
    ),
    Setting(
        "",
        Way("completions", "dense"),
        Way("completions", "backward importance 0.50", "half of their tokens, `importance`"),
        Way("completions", "backward random 0.50"),
    ),
    Setting(
        "the same, CGGR in 16 s",
        Way("completions", "dense"),
        Way("completions-16s", "backward completions", "all completions"),
    ),
    Setting(
        "(d) the same in 12 GiB, 20 s",
        Way("completions", "dense", "of a batch of 16, in {gib:.1f} GiB"),
        Way("memory", "token completions in 2 parts", '`split="token"`, of 32, in {gib:.1f} GiB'),
    ),
    Setting(
        "(c) from scratch, 30 % of the lines noise, 97 M, 20 s",
        Way("noise", "dense half batch", "half of the batch"),
        Way("noise", "backward excess top-k 0.70", "0.7 of the tokens, `excess_loss`"),
        Way("noise", "backward random 0.70"),
    ),
    Setting(
        "fine-tuning on a text that it soon knows, 368 M, 20 s",
        Way("clients_wide", "dense"),
        Way("clients_wide", "backward importance 0.50", "half of the tokens, `importance`"),
    ),
    Setting(
        "(a) from scratch, 97 M, 20 s",
        Way("scratch", "dense"),
        Way("scratch", "backward importance 0.70", "0.7 of the tokens, `importance`"),
        Way("scratch", "backward random 0.70"),
    ),
    Setting(
        "fine-tuning on another language, 91 M, 12 s",
        Way("finetune-one-seed", "dense"),
        Way("finetune-one-seed", "token importance 0.50", "half of the tokens, `importance`"),
        Way("finetune-one-seed", "token random 0.50"),
    ),
    Setting(
        "(e) the race of cggr 0.5.0, 368 M, 12 s",
        Way("original", "dense"),
        Way("original", "sequence top-k combined 0.25", "a quarter of the sequences, `topk`"),
        Way("original", "sequence random 0.25"),
    ),
)


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
            Evaluation(**{key: point[key] for key in ("seconds", "steps", *TOKENS)}, loss=loss)
            for point in entry["curve"]
            for loss in [math.nan if point["loss"] is None else point["loss"]]
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
    # The rate is chosen by the first seed.
    return {name: runs for name, runs in lanes.items() if any(run.seed == 0 for run in runs)}


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


def summary() -> list[str]:
    """Lines of Markdown: what each setting came to, bold what was ahead in every seed."""
    head = "| setting | dense | CGGR | random selection |"
    return [head, "| --- | --- | --- | --- |", *map(_summary_row, SUMMARY)]


def _summary_row(setting: Setting) -> str:
    ends = {way: _ends(way) for way in setting[1:] if way is not None}
    dense, cggr = ends[setting.dense], ends[setting.cggr]
    cells = [setting.words]
    for way in setting[1:]:
        other = cggr if way == setting.dense else dense
        is_ahead = way in (setting.dense, setting.cggr) and all(
            own < loss for own, loss in zip(ends[way], other, strict=True)
        )
        if way is None:
            cells.append("")
        else:
            gib = max(run.peak_memory or 0 for run in _best(way)) / 2**30
            words = way.words.format(gib=gib)
            cells.append(_summary_cell(words, ends[way], bold=is_ahead))
    return f"| {' | '.join(cells)} |"


def _ends(way: Way) -> list[float]:
    """Final losses of all seeds."""
    return [run.curve[-1].loss for run in _best(way)]


def _best(way: Way) -> list[Run]:
    """Its runs, in the order of seeds."""
    runs = at_best_rate(runs_of(results_of(way.race))[way.lane])
    return sorted(runs, key=lambda run: run.seed)


def _summary_cell(words: str, losses: Sequence[float], *, bold: bool) -> str:
    mean = f"{sum(losses) / len(losses):.3f}"
    spread = f"({min(losses):.2f} to {max(losses):.2f})" if len(losses) > 1 else "(one seed)"
    return " ".join(filter(None, (f"**{mean}**" if bold else mean, spread, words)))


def main() -> None:
    """Prints the tables that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of results, or paths to a results.json")
    parser.add_argument("--summary", action="store_true", help="of all settings")
    options = parser.parse_args()
    if not options.names and not options.summary:
        parser.error("name results, or --summary")
    for name in options.names:
        try:
            results = results_of(name)
        except FileNotFoundError as error:
            parser.error(f"there are no results {name}: {error.filename}")
        unfinished = "" if results["complete"] else " (not complete)"
        print(f"{name}{unfinished}:\n", *table(results), "", sep="\n")
    if options.summary:
        print(*summary(), sep="\n")


if __name__ == "__main__":
    main()
