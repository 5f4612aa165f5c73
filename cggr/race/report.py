"""What a race leaves behind: table.txt, results.json and report.png."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cggr.race import figure, summary
from cggr.race.engine import Evaluation, Run, best_rate
from cggr.race.settings import RaceError, RaceSettings
from cggr.race.summary import LaneSummary
from cggr.race.tokens import Corpus

SCHEMA = 2
RESULTS = "results.json"
# What may differ in a race that goes on: who else races, and how often.
_MAY_DIFFER = ("lanes", "tables", "seeds", "learning_rates", "save", "text", "device")


def results_table(
    summaries: Sequence[LaneSummary], settings: RaceSettings, corpus: Corpus
) -> Table:
    """The lanes side by side, as means over the seeds, in 80 columns."""
    by_lane = {item.lane: item for item in summaries}
    cells: dict[str, Callable[[LaneSummary], str]] = {
        "held-out\nloss": lambda item: f"{item.loss:.3f}{_deviation(item.final('loss'))}",
        "bits/\nbyte": lambda item: f"{corpus.bits_per_byte(item.loss):.3f}",
        "vs\ndense": lambda item: f"{item.loss - by_lane['dense'].loss:+.3f}",
        "\nsteps": lambda item: f"{item.final('steps').mean():,.0f}",
        "tokens\nseen": lambda item: _short(item.final("tokens_seen").mean()),
        "tokens\nkept": lambda item: _short(item.final("tokens_trained").mean()),
        "train\ntime": lambda item: f"{item.final('seconds').mean():.1f} s",
        "tokens\n/s": lambda item: _short(item.final("tokens_per_second").mean()),
        "peak\nGiB": lambda item: f"{(item.peak_memory or 0) / 2**30:.2f}",
    }
    if "dense" not in by_lane:
        del cells["vs\ndense"]
    if not any(item.peak_memory for item in summaries):
        del cells["peak\nGiB"]

    title = f"cggr race, {summary.budget_in_words(summaries, settings)}"
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("\nlane", no_wrap=True)
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    best = min(summaries, key=summary.rank)
    for item in summaries:
        values = (cell(item) for cell in cells.values())
        table.add_row(escape(item.lane), *values, style="bold" if item is best else "")
    return table


def _deviation(values: npt.NDArray[np.float64]) -> str:
    """The sample's standard deviation, if there is more than one seed to show it."""
    return f" ±{values.std(ddof=1):.3f}" if len(values) > 1 else ""


def _short(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k"


def results(
    runs: Sequence[Run],
    settings: RaceSettings,
    corpus: Corpus,
    *,
    text: dict[str, object],
    models: dict[str, str],
    environment: dict[str, object],
) -> dict[str, object]:
    """Everything that was measured, as plain values for JSON; a loss that is not finite is null."""
    described = []
    for run in runs:
        curve = []
        for point in run.curve:
            finite = math.isfinite(point.loss)
            curve.append(
                dataclasses.asdict(point)
                | {
                    "loss": point.loss if finite else None,
                    "bits_per_byte": corpus.bits_per_byte(point.loss) if finite else None,
                }
            )
        described.append(
            {
                "lane": run.lane,
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "complete": run.complete,
                "tokens_per_second": run.curve[-1].tokens_per_second,
                "peak_memory": run.peak_memory,
                "curve": curve,
            }
        )
    return {
        "schema": SCHEMA,
        "complete": all(run.complete for run in runs)
        and all(_has_raced(lane, runs, settings) for lane in settings.lanes),
        "settings": settings.to_json(),
        "text": {
            **text,
            "training_tokens": len(corpus.training),
            "heldout_tokens": len(corpus.heldout),
            "heldout_bytes": corpus.heldout_bytes,
            "vocab_size": corpus.vocab_size,
        },
        "models_sha256": models,
        **environment,
        "runs": described,
    }


def _has_raced(lane: str, runs: Sequence[Run], settings: RaceSettings) -> bool:
    """Whether a lane has raced at all rates and, at the best, with all seeds."""
    had = {(run.seed, run.learning_rate) for run in runs if run.lane == lane}
    first = [run for run in runs if (run.lane, run.seed) == (lane, 0)]
    is_tuned = first and settings.one_by_one
    rate = best_rate(first) if is_tuned else settings.peak_learning_rate
    wanted = {(seed, rate) for seed in range(1, settings.seeds)}
    return wanted | {(0, rate) for rate in settings.rates} <= had


def write_results(file: Path, found: dict[str, object]) -> None:
    """Writes what :func:`results` returned; a reader never finds half of it."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    partial.replace(file)


def earlier_runs(
    file: Path,
    settings: RaceSettings,
    digest: str,
    models: dict[str, str],
    environment: dict[str, Any],
) -> list[Run]:
    """Complete runs of an earlier race that this one need not run again; none without a file.

    Args:
        file: Its results.json.
        settings: Of this race.
        digest: Of the text.
        models: Digests of the models that it begins with.
        environment: Of this race.

    Raises:
        RaceError: It was another race: on another text or device, from another model, by other
            versions or settings, or with lanes or learning rates that this one lacks; or the file
            is damaged, or the model to save was trained without being saved.
    """
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise RaceError(f"--resume: {file} is damaged: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RaceError(f"--resume: {file} holds no results of schema {SCHEMA}")
    before: dict[str, Any] = found["settings"]
    now: dict[str, Any] = settings.to_json()
    had = {run["lane"] for run in found["runs"] if run["complete"]}
    for name in settings.lanes:  # one without a table is out of LANES
        table, here = (values.get("tables", {}).get(name, "no table") for values in (before, now))
        if name in had and table != here:
            raise RaceError(f"--resume: lane {name} was {table}, not {here}")
    if missing := sorted(had - set(settings.lanes)):
        raise RaceError(f"--resume: lane {missing[0]} has raced, whose results would be lost")
    if missing := sorted(set(before.get("learning_rates", ())) - set(settings.learning_rates)):
        raise RaceError(f"--resume: the learning rate {missing[0]:g} has raced and is left out now")
    if settings.save in had and settings.save != before["save"]:
        raise RaceError(f"--resume: lane {settings.save} has raced without --save {settings.save}")
    for option in _MAY_DIFFER:
        before.pop(option, None), now.pop(option, None)
    before |= {"text": found["text"]["sha256"], "weights of": found.get("models_sha256") or {}}
    now |= {"text": digest, "weights of": models}
    for values, of in ((before, found), (now, environment)):
        values |= {"gpu": of["machine"]["gpu"], "versions": of["versions"]}
    defaults = RaceSettings(budget=settings.budget).to_json()  # of options that it had not yet
    for option, value in now.items():
        if before.setdefault(option, defaults.get(option)) != value:
            raise RaceError(
                f"--resume: {file} is of a race with {option} {before.get(option)!r}, not {value!r}"
            )
    return complete_runs(found)


def complete_runs(found: Mapping[str, Any]) -> list[Run]:
    """The runs of a results.json that came to their end; a loss that is null is not a number."""
    return [
        Run(
            lane=run["lane"],
            seed=run["seed"],
            learning_rate=run["learning_rate"],
            peak_memory=run["peak_memory"],
            complete=True,
            curve=(curve := [_point(values) for values in run["curve"]]),
            seconds=curve[-1].seconds,
            steps=curve[-1].steps,
            tokens_seen=curve[-1].tokens_seen,
            tokens_trained=curve[-1].tokens_trained,
        )
        for run in found["runs"]
        if run["complete"]
    ]


def _point(values: dict[str, Any]) -> Evaluation:
    fields = {field.name: values[field.name] for field in dataclasses.fields(Evaluation)}
    return Evaluation(**fields | {"loss": math.nan if values["loss"] is None else values["loss"]})


def write_report(
    folder: Path,
    runs: Sequence[Run],
    settings: RaceSettings,
    corpus: Corpus,
    subtitle: str,
    console: Console,
) -> None:
    """Writes table.txt and report.png, and prints the table and the verdict.

    Args:
        folder: An existing folder.
        runs: The runs, at least one seed's.
        settings: The race.
        corpus: Its tokens.
        subtitle: What was raced on what, in a line.
        console: Where to print.
    """
    summaries = summary.summarize(runs)
    table = results_table(summaries, settings, corpus)
    lines = [subtitle, *summary.verdict(summaries, settings)]
    with (folder / "table.txt").open("w") as file:
        for target in (console, Console(file=file, width=140)):
            target.print(table)
            for line in lines:
                target.print(line, highlight=False, markup=False, soft_wrap=True)
    figure.draw(summaries, settings, subtitle, folder / "report.png")
