"""The race itself: sharing the machine between the lanes and keeping their clocks.

Only a lane's own training steps count as its time: fetching the batch, scoring, forward, backward
and optimizer. Evaluation is free for every lane. The lanes take turns of about a second, so that a
machine that slows down slows all of them, and so that stopping early leaves comparable curves.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cggr.race.settings import Budget, RaceError, RaceSettings
from cggr.race.tokens import Batch, BatchFunction

TURN_SECONDS = 1.0
WARMUP = 0.05  # fraction of the budget over which the learning rate rises
ROUNDING = 1e-9  # 3 x 0.1 is not 0.3


class Lane(Protocol):
    """One way of training one model: what a backend gives to the race.

    A lane owns its model, its optimizer and the rule that turns a batch into a loss. It knows
    nothing of budgets, clocks or other lanes.
    """

    name: str

    def train_step(self, batch: Batch, learning_rate: float) -> None:
        """Updates the model on one batch; may return before it is done."""

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""

    def begin_turn(self) -> None:
        """Called before a turn's first step."""

    def end_turn(self) -> None:
        """Called after a turn's last step."""

    def tokens_trained(self) -> int:
        """How many tokens it has learned from since it was last asked."""

    def peak_memory(self) -> int | None:
        """Most device memory that the lane has needed, in bytes, where it can be measured."""

    def evaluate(self) -> float:
        """The mean loss over all held-out tokens, in nats per token."""

    def save(self, folder: Path) -> None:
        """Writes the model as it is now, for ``--model``; where the backend can."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A point of a learning curve: the loss after that much training."""

    seconds: float
    steps: int
    tokens_seen: int
    tokens_trained: int
    loss: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of text that went by in a second of training."""
        return self.tokens_seen / self.seconds if self.seconds else 0.0


@dataclasses.dataclass
class Run:
    """What one lane did with one seed."""

    lane: str
    seed: int
    learning_rate: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    tokens_seen: int = 0
    tokens_trained: int = 0
    peak_memory: int | None = None
    complete: bool = False
    curve: list[Evaluation] = dataclasses.field(default_factory=list)

    def now(self, loss: float) -> Evaluation:
        """Where the run stands, with a held-out loss."""
        return Evaluation(self.seconds, self.steps, self.tokens_seen, self.tokens_trained, loss)


class Watcher:
    """Is told how the race goes; this one does not listen."""

    def seed_started(self, runs: Sequence[Run]) -> None:
        """The lanes of one more seed stand at their start."""

    def turn_ended(self, run: Run) -> None:
        """A lane has trained for a turn."""

    def evaluated(self, run: Run) -> None:
        """A point was added to a lane's curve."""


def learning_rate(progress: float, peak: float) -> float:
    """A short linear warm-up, then a linear decay to zero at the end of the budget.

    Args:
        progress: Fraction of the budget that is spent.
        peak: The largest learning rate.

    Example:
        >>> [round(learning_rate(progress, 1.0), 3) for progress in (0, 0.05, 0.525, 1)]
        [0.1, 1.0, 0.5, 0.0]
    """
    if progress < WARMUP:
        return peak * (0.1 + 0.9 * progress / WARMUP)  # from zero the first step would be wasted
    return peak * max(0.0, (1 - progress) / (1 - WARMUP))


def best_rate(runs: Sequence[Run]) -> float:
    """The learning rate of the lowest final loss; of equal ones, or none finite, the lowest.

    Args:
        runs: A lane's, of one seed.
    """

    def rank(run: Run) -> tuple[float, float]:
        loss = run.curve[-1].loss
        # In results.json infinity is null as NaN is: they rank alike, before and after --resume.
        loss = loss if math.isfinite(loss) else math.inf
        return loss, run.learning_rate

    return min(runs, key=rank).learning_rate


def run_race(
    settings: RaceSettings,
    *,
    make_lane: Callable[[str, int], Lane],
    make_batches: Callable[[int, str], BatchFunction],
    watcher: Watcher | None = None,
    clock: Callable[[], float] = time.perf_counter,
    done: Sequence[Run] = (),
    finished: Callable[[Run, Lane, Sequence[Run]], None] = lambda run, lane, runs: None,
) -> list[Run]:
    """Races all lanes with all seeds.

    Args:
        settings: The race.
        make_lane: Builds the lane of a name and seed; lanes of one seed start from one model.
        make_batches: Gives the batches of a seed and a lane as a function of the step.
        watcher: Is told how it goes.
        clock: Seconds, from any origin.
        done: Runs of an earlier race with these settings, which need not be run again.
        finished: Is told of a run that has reached its end, with its lane and all runs so far.

    Returns:
        A run per lane and seed, and per learning rate with the first. After Ctrl-C: what was
        measured until then, with ``complete=False`` for the runs that were cut off.

    Raises:
        RaceError: A budget in seconds is shorter than one training step.
    """
    watcher = watcher or Watcher()
    runs = [run for run in done if run.complete]

    def race(names: Sequence[str], seed: int, rate: float) -> None:
        """Races some lanes, where they have not raced yet."""
        had = {(run.lane, run.seed, run.learning_rate) for run in runs}
        names = [name for name in names if (name, seed, rate) not in had]
        if not names:
            return
        batches = {name: make_batches(seed, name) for name in names}
        for name in names:
            _warm_up(make_lane(name, seed), batches[name](0), settings.budget, clock)
        lanes = {name: make_lane(name, seed) for name in names}
        racing = [Run(name, seed, rate) for name in names]
        loss = lanes[names[0]].evaluate()  # of the one model that all start from
        for run in racing:
            run.curve.append(run.now(loss))
        runs.extend(racing)  # only now: a run has at least the point that it starts from
        watcher.seed_started(racing)
        while unfinished := [run for run in racing if not run.complete]:
            run = min(unfinished, key=lambda run: _progress(run, settings.budget))
            _take_turn(run, lanes[run.lane], batches[run.lane], settings, clock)
            watcher.turn_ended(run)
            if _progress(run, settings.budget) >= _next_evaluation(run, settings):
                run.curve.append(run.now(lanes[run.lane].evaluate()))
                run.complete = _progress(run, settings.budget) >= 1
                watcher.evaluated(run)
                if run.complete:
                    finished(run, lanes[run.lane], runs)

    try:
        if not settings.one_by_one:
            for seed in range(settings.seeds):
                race(settings.lanes, seed, settings.peak_learning_rate)
        else:
            for name in settings.lanes:
                for rate in settings.rates:
                    race([name], 0, rate)
                first = [run for run in runs if (run.lane, run.seed) == (name, 0)]
                for seed in range(1, settings.seeds):
                    race([name], seed, best_rate(first))
    except KeyboardInterrupt:
        pass  # the runs say themselves that they are not complete
    return runs


def _progress(run: Run | Evaluation, budget: Budget) -> float:
    return budget.spent(run.seconds, run.steps)


def _next_evaluation(run: Run, settings: RaceSettings) -> float:
    """The fraction of the budget at which the next evaluation is due, at most 1."""
    interval = settings.eval_interval
    done = int(_progress(run.curve[-1], settings.budget) / interval + ROUNDING)
    due = interval * (done + 1) - ROUNDING
    # A last stretch that is shorter than half an interval joins the one before.
    return due if due < 1 - interval / 2 else 1.0


def _warm_up(lane: Lane, batch: Batch, budget: Budget, clock: Callable[[], float]) -> None:
    """Pays for what a process does only once, on a lane that is thrown away, untimed."""
    lane.train_step(batch, 0.0)
    lane.synchronize()
    if budget.unit == "seconds":
        start = clock()
        lane.train_step(batch, 0.0)
        lane.synchronize()
        needed = clock() - start
        if needed > budget.amount:
            raise RaceError(
                f"--budget {budget} ends before the first evaluation: one training step of lane "
                f"{lane.name} takes {needed:.2g} seconds"
            )


def _take_turn(
    run: Run,
    lane: Lane,
    batch: BatchFunction,
    settings: RaceSettings,
    clock: Callable[[], float],
) -> None:
    """Trains for a second, or until an evaluation is due, and charges the lane for it."""
    due = _next_evaluation(run, settings)
    progress = _progress(run, settings.budget)
    before = run.seconds
    lane.begin_turn()
    lane.synchronize()
    start = clock()
    while progress < due and run.seconds - before < TURN_SECONDS:
        given = batch(run.steps)
        lane.train_step(given, learning_rate(progress, run.learning_rate))
        run.steps += 1
        run.tokens_seen += given.ids.size
        run.seconds = before + clock() - start
        progress = _progress(run, settings.budget)
    lane.synchronize()
    run.seconds = before + clock() - start
    lane.end_turn()
    run.tokens_trained += lane.tokens_trained()
    run.peak_memory = lane.peak_memory()
