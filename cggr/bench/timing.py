"""Contestants take turns on the device, so that a drift of its clocks meets all of them alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from triton.errors import TritonError

from cggr.bench.settings import BenchSettings

Call = Callable[[], Any]
Progress = Callable[[str], None]
Clock = Callable[[Call, int], float]

WARM_UP_CALLS = 3
TURN_MS, MAX_CALLS = 25.0, 50  # of a turn: many calls of what is short, one of what is long
MAX_ERROR = 300  # characters

# What the code of others may raise, from its import to its launch: a compiler's errors among them.
FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    subprocess.SubprocessError,
    TritonError,
)


def cuda_clock(call: Call, calls: int) -> float:
    """Milliseconds of a call among others, by the device's clock."""
    call()  # not counted: the device is at work when the clock starts, the host ahead of it
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def captured(call: Call, pool: Any = None) -> Call:
    """The same as one CUDA graph: no host delays it, and what it returns stays where it is.

    Args:
        call: What is captured.
        pool: Memory shared with other graphs, of which each overwrites what another returned.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # allocates and compiles what a capture must not
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()

    return functools.partial(_replay, graph, result, call)


def _replay(graph: torch.cuda.CUDAGraph, result: Any, _: Call) -> Any:
    """What the captured call returned; the call itself holds what the graph reads and writes."""
    graph.replay()
    return result


def wall_clock(wait: Callable[[Any], object]) -> Clock:
    """Milliseconds of a call among others, by the host's clock.

    Args:
        wait: Waits until a result of the call, and all before it, is there.
    """

    def clock(call: Call, calls: int) -> float:
        wait(call())
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        wait(call())
        return (time.perf_counter() - start) / calls * 1e3

    return clock


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to compute something.

    Args:
        name: As the report calls it.
        prepare: Imports what is needed and returns what is timed.
        observe: What else there is to say of the call, as fields of its row in the report.
        may_fail: An error is reported and the others go on. False for what must work.
        clock: Milliseconds of a call, given the call and a number of them; by the device
            if None.
        calls: Of a turn; as many as fill `TURN_MS` when None.
    """

    name: str
    prepare: Callable[[], Call]
    observe: Callable[[Call], dict[str, Any]] | None = None
    may_fail: bool = False
    clock: Clock | None = None
    calls: int | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds a call in every round, and what was observed besides."""

    rounds: tuple[float, ...]
    observed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a contestant has no time."""

    error: str


class _Racer:
    """A contestant that is warm, and its times."""

    def __init__(self, contestant: Contestant) -> None:
        self.clock = contestant.clock or cuda_clock
        self.call = contestant.prepare()
        for _ in range(WARM_UP_CALLS):  # compiles, tunes
            self.call()
        self.observed = {} if contestant.observe is None else contestant.observe(self.call)
        estimate = self.clock(self.call, contestant.calls or 1)
        self.calls = contestant.calls or min(MAX_CALLS, math.ceil(TURN_MS / estimate))
        self.rounds: list[float] = []

    def take_turn(self) -> None:
        self.rounds.append(self.clock(self.call, self.calls))


def measure(
    contestants: Sequence[Contestant], settings: BenchSettings, progress: Progress
) -> dict[str, Timing | Failure]:
    """Times of all contestants, by name and in their order.

    Args:
        contestants: Of different names.
        settings: Says how many rounds.
        progress: Is told what happens.
    """
    contestants = [one for one in contestants if settings.wants(one.name)]
    racers: dict[str, _Racer] = {}
    failures: dict[str, Failure] = {}
    for contestant in contestants:
        progress(f"warming up {contestant.name}")
        with reported(contestant.name, failures, may_fail=contestant.may_fail):
            racers[contestant.name] = _Racer(contestant)
    for number in range(settings.rounds):
        # Each round begins with another one, so that nobody always follows the same.
        first = number % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            if contestant.name not in failures:
                progress(f"round {number + 1} of {settings.rounds}, {contestant.name}")
                with reported(contestant.name, failures, may_fail=contestant.may_fail):
                    racers[contestant.name].take_turn()
    return {
        contestant.name: failures.get(contestant.name)
        or Timing(tuple(racers[contestant.name].rounds), racers[contestant.name].observed)
        for contestant in contestants
    }


@contextlib.contextmanager
def reported(name: str, failures: dict[str, Failure], *, may_fail: bool) -> Iterator[None]:
    """Notes under a contestant's name why it failed, if it may."""
    try:
        yield
    except FAULTS as error:
        if not may_fail:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        failures[name] = Failure(text[:MAX_ERROR])


def add_ratio(rows: Sequence[dict[str, Any]], name: str, of: str, to: str) -> None:
    """Adds a field `name` to all rows that have a number `of`: its ratio to a contestant's.

    Nothing where the contestant `to` is not among them, or has no such number.
    """
    reference = next((row[of] for row in rows if row["contestant"] == to and of in row), None)
    for row in rows if reference is not None else ():
        if of in row:
            row[name] = row[of] / reference


def rows_of(outcomes: Mapping[str, Timing | Failure]) -> list[dict[str, Any]]:
    """A row of the report for every contestant: its times or its error."""
    rows: list[dict[str, Any]] = []
    for name, outcome in outcomes.items():
        if isinstance(outcome, Failure):
            rows.append({"contestant": name, "error": outcome.error})
        else:
            rows.append(
                {
                    "contestant": name,
                    "ms": statistics.median(outcome.rounds),
                    "ms_min": min(outcome.rounds),
                    "ms_max": max(outcome.rounds),
                    "ms_rounds": list(outcome.rounds),
                    **outcome.observed,
                }
            )
    return rows
