"""Prints results of the study as docs/evidence.md and README.md have them.

    python benchmarks/evidence/tables.py runs/completions/results.json
    python benchmarks/evidence/tables.py completions noise
    python benchmarks/evidence/tables.py completions-16s --against completions:dense
    python benchmarks/evidence/tables.py selections-10 selections-25 --beside "token random"
    python benchmarks/evidence/tables.py --summary

A name is that of a file in benchmarks/results/evidence, the results.json of a race; the summary is
of those files. Differences are means over the seeds, with their standard errors: a seed's batches,
and the weights that it begins with, are those of all lanes of a race, and its batches of all races
of one text.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cggr.race.engine import Run, best_rate
from cggr.race.report import complete_runs
from cggr.race.summary import LaneSummary, rank, summarize

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
        "(b) fine-tuning on summaries of functions, 368 M parameters, 20 s",
        Way("summaries", "dense with prompts", "of functions too"),
        Way("summaries", "backward completions", '`split="backward"`, all summaries'),
    ),
    Setting(
        "the same, of the 20 s the first 6 densely on functions too",
        Way("summaries", "dense with prompts", "of functions too, all the time"),
        Way("summaries_adapted", "backward completions", '`split="backward"`, all summaries'),
    ),
    Setting(
        "on the last quarter of sequences of code, 368 M, 20 s",
        Way("completions-prompts", "dense with prompts", "of all quarters"),
        Way("completions", "backward completions", '`split="backward"`, the last quarter'),
    ),
    Setting(
        "(d) the same in 12 GiB, 20 s, the last quarter alone",
        Way("completions", "dense", "of a batch of 16, in {gib:.1f} GiB"),
        Way("memory", "token completions in 2 parts", '`split="token"`, of 32, in {gib:.1f} GiB'),
    ),
    Setting(
        "(c) from scratch, 30 % noise, 97 M, 20 s, by a reference of the same text without",
        Way("noise-window", "dense"),
        Way("noise", "backward excess top-k 0.70", "0.7 of the tokens, `excess_loss`"),
        Way("noise", "backward random 0.70"),
    ),
    Setting(
        "by a reference of other packages",
        Way("noise_apart", "dense"),
        Way("noise_apart", "backward excess top-k 0.70", "0.7 of the tokens, `excess_loss`"),
        Way("noise_apart", "backward random 0.70"),
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
        Way("original-tokens", "dense"),
        Way("original-tokens", "token importance 0.25", "a quarter of the tokens, `importance`"),
        Way("original-tokens", "token random 0.25"),
    ),
)


def results_of(name: str) -> dict[str, Any]:
    """What a race left, by its name here or its path."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


class Raced(NamedTuple):
    """A lane's runs that came to their end.

    Attributes:
        best: Those at the rate that was best of the first seed.
        rate: It.
        others: At other rates.
    """

    best: LaneSummary
    rate: float
    others: list[Run]


def lanes_of(results: Mapping[str, Any]) -> dict[str, Raced]:
    """Lanes whose first seed came to its end, each with the seeds that it has."""
    found = {}
    runs = complete_runs(results)
    for lane in dict.fromkeys(run.lane for run in runs):
        own = [run for run in runs if run.lane == lane]
        if first := [run for run in own if run.seed == 0]:
            rate = best_rate(first)
            (best,) = summarize([run for run in own if run.learning_rate == rate])
            found[lane] = Raced(best, rate, [run for run in own if run.learning_rate != rate])
    return found


def table(raced: Mapping[str, Raced]) -> list[str]:
    """Lines of Markdown, the lane of the lowest loss first."""
    lanes = sorted(raced.values(), key=lambda each: rank(each.best))
    line = "| " + " | ".join(["---"] * len(COLUMNS)) + " |"
    return [f"| {' | '.join(COLUMNS)} |", line, *map(_row, lanes)]


def _row(raced: Raced) -> str:
    best = raced.best
    steps = best.final("steps")
    cells = (
        best.lane,
        f"{1000 * best.final('seconds').sum() / steps.sum():.1f}",
        f"{steps.mean():,.0f}",
        f"{_gib(best):.1f}",
        f"{raced.rate:g}",
        f"{best.loss:.3f}",
        " ".join(f"{loss:.3f}" for loss in best.final("loss")),
        " ".join(f"{run.learning_rate:g}: {run.curve[-1].loss:.3f}" for run in raced.others),
    )
    return f"| {' | '.join(cells)} |"


def difference(lane: LaneSummary, other: LaneSummary) -> tuple[float, float]:
    """By how much a lane's held-out loss is below another's: mean over seeds, and its error."""
    ahead = _ahead(lane, other)
    return float(ahead.mean()), float(ahead.std(ddof=1) / math.sqrt(len(ahead)))


def _have_difference(lane: LaneSummary, other: LaneSummary) -> bool:
    """Whether they are two lanes of as many seeds, and of more than one."""
    return lane != other and len(lane.final("loss")) == len(other.final("loss")) > 1


def _ahead(lane: LaneSummary, other: LaneSummary) -> npt.NDArray[np.float64]:
    return other.final("loss") - lane.final("loss")


def differences(raced: Mapping[str, Raced], other: LaneSummary) -> list[str]:
    """Lines of Markdown: lanes with as many seeds as the other, the lowest loss first."""
    lines = []
    for lane in sorted((each.best for each in raced.values()), key=rank):
        if _have_difference(lane, other):
            mean, error = difference(lane, other)
            seeds = " ".join(f"{ahead:.3f}" for ahead in _ahead(lane, other))
            lines.append(f"| {lane.lane} | {mean:.3f} ± {error:.3f} | {seeds} |")
    return [f"| lane | ahead of {other.lane} by | of each seed |", "| --- | --- | --- |", *lines]


def beside(races: Mapping[str, Mapping[str, Raced]], name: str) -> list[str]:
    """Lines of Markdown: by how much each lane is ahead of this one, a column for every race.

    A cell is empty where a race has no difference.
    """

    def cell(lanes: Mapping[str, Raced], lane: str) -> str:
        if lane not in lanes or not _have_difference(lanes[lane].best, lanes[name].best):
            return ""
        mean, error = difference(lanes[lane].best, lanes[name].best)
        return f"{mean:.3f} ± {error:.3f}"

    lanes = dict.fromkeys(lane for raced in races.values() for lane in raced if lane != name)
    rows = ([lane, *(cell(raced, lane) for raced in races.values())] for lane in lanes)
    return [
        f"| ahead of {name} by | {' | '.join(races)} |",
        "| " + " | ".join(["---"] * (1 + len(races))) + " |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _gib(lane: LaneSummary) -> float:
    return (lane.peak_memory or 0) / 2**30


def summary() -> list[str]:
    """Lines of Markdown: what each setting came to, bold what was ahead in every seed."""
    head = "| setting | dense | CGGR | random selection |"
    return [head, "| --- | --- | --- | --- |", *map(_summary_row, SUMMARY)]


def _summary_row(setting: Setting) -> str:
    dense, cggr = _best(setting.dense), _best(setting.cggr)
    ahead = _ahead(cggr, dense)
    cells = [
        setting.words,
        _summary_cell(setting.dense, dense, bold=bool((ahead < 0).all())),
        _summary_cell(setting.cggr, cggr, bold=bool((ahead > 0).all())),
        "" if setting.random is None else _summary_cell(setting.random, _best(setting.random)),
    ]
    return f"| {' | '.join(cells)} |"


def _best(way: Way) -> LaneSummary:
    return lanes_of(results_of(way.race))[way.lane].best


def _summary_cell(way: Way, lane: LaneSummary, *, bold: bool = False) -> str:
    mean, losses = f"{lane.loss:.3f}", lane.final("loss")
    spread = f"({losses.min():.2f} to {losses.max():.2f})" if len(losses) > 1 else "(one seed)"
    words = way.words.format(gib=_gib(lane))
    return " ".join(filter(None, (f"**{mean}**" if bold else mean, spread, words)))


def main() -> None:
    """Prints the tables that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of results, or paths to a results.json")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--summary", action="store_true", help="print that of all settings")
    instead.add_argument(
        "--against", metavar="[NAME:]LANE", help="print differences from this lane instead"
    )
    instead.add_argument(
        "--beside", metavar="LANE", help="print differences from this lane in one table instead"
    )
    options = parser.parse_args()
    if options.summary == bool(options.names):
        parser.error("name results, or --summary")
    if options.summary:
        print(*summary(), sep="\n")
        return
    race, _, lane = (options.against or "").rpartition(":")
    lane = options.beside or lane
    try:
        results = {name: results_of(name) for name in options.names}
        other = lanes_of(results_of(race)) if race else {}
    except FileNotFoundError as error:
        parser.error(f"there are no results {error.filename}")
    raced = {
        name if results[name]["complete"] else f"{name} (not complete)": lanes_of(results[name])
        for name in options.names
    }
    for name, lanes in raced.items() if lane else ():
        if lane not in (other or lanes):
            option = "--against" if options.beside is None else "--beside"
            parser.error(
                f"{option}: {race or name} has no lane {lane!r}, but {[*(other or lanes)]}"
            )
    if options.beside is not None:
        print(*beside(raced, lane), sep="\n")
        return
    for name, lanes in raced.items():
        best = (other or lanes)[lane].best if lane else None
        lines = table(lanes) if best is None else differences(lanes, best)
        print(f"{name}:\n", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
