"""How a race looks while it runs: a live table on a terminal, lines of a log elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from cggr.race.engine import Run, Watcher
from cggr.race.settings import RaceSettings


class Log(Watcher):
    """A line per evaluation."""

    def __init__(self, console: Console, settings: RaceSettings) -> None:
        self.console = console
        self.settings = settings

    def seed_started(self, runs: Sequence[Run]) -> None:
        """Prints the loss that all lanes start from."""
        self._print(
            f"seed {runs[0].seed + 1} of {self.settings.seeds}: "
            f"held-out loss {runs[0].curve[0].loss:.3f} before training"
        )

    def evaluated(self, run: Run) -> None:
        """Prints the newest point of the curve."""
        point = run.curve[-1]
        self._print(
            f"{run.lane:<6}  step {point.steps:>6}  {point.seconds:7.1f} s  "
            f"held-out loss {point.loss:.3f}  {point.tokens_per_second:,.0f} tokens/s"
        )

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class LiveTable(Watcher):
    """A table that is redrawn after every turn."""

    def __init__(self, live: Live, settings: RaceSettings) -> None:
        self.live = live
        self.settings = settings
        self.runs: Sequence[Run] = ()

    def seed_started(self, runs: Sequence[Run]) -> None:
        """Starts the bars over."""
        self.runs = runs
        self._draw()

    def turn_ended(self, run: Run) -> None:
        """Moves a bar."""
        self._draw()

    def evaluated(self, run: Run) -> None:
        """Shows a new loss."""
        self._draw()

    def _draw(self) -> None:
        seed = f"seed {self.runs[0].seed + 1} of {self.settings.seeds}"
        table = Table(title=f"{self.settings.budget.words} per lane, {seed}", expand=False)
        table.add_column("lane")
        table.add_column("progress", width=24)
        for name in ("step", "held-out loss", "tokens/s", "training time"):
            table.add_column(name, justify="right", min_width=8)
        for run in self.runs:
            spent = min(1.0, self.settings.budget.spent(run.seconds, run.steps))
            speed = run.tokens_seen / run.seconds if run.seconds else 0.0
            table.add_row(
                escape(run.lane),
                ProgressBar(total=1.0, completed=spent, width=24),
                f"{run.steps:,}",
                f"{run.curve[-1].loss:.3f}",
                f"{speed:,.0f}",
                f"{run.seconds:.1f} s",
            )
        self.live.update(table, refresh=True)


@contextmanager
def watch(console: Console, settings: RaceSettings) -> Iterator[Watcher]:
    """Shows a race on a console while the context lasts."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            yield LiveTable(live, settings)
    else:
        yield Log(console, settings)
