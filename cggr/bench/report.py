"""What a benchmark leaves behind: a table for each case, and a file of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from cggr.bench.settings import BenchError

SCHEMA = 1


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        header: Its title.
        show: A row's text in it; None for nothing.
    """

    header: str
    show: Callable[[dict[str, Any]], str | None]


def number(key: str, form: str, unit: float = 1.0) -> Callable[[dict[str, Any]], str | None]:
    """Shows a field of a row.

    Args:
        key: The field; nothing is shown where it is missing or None.
        form: Its format.
        unit: What it is divided by.
    """

    def show(row: dict[str, Any]) -> str | None:
        return None if row.get(key) is None else format(row[key] / unit, form)

    return show


TIMES = (
    Column("ms", number("ms", ".3f")),
    Column("min - max", lambda row: f"{row['ms_min']:.3f} - {row['ms_max']:.3f}"),
)


def print_case(
    console: Console, title: str, rows: Sequence[dict[str, Any]], columns: Sequence[Column]
) -> None:
    """Prints the contestants that were measured as a table, and why the others were not."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for row in rows:
        if "error" not in row:
            table.add_row(row["contestant"], *(column.show(row) or "-" for column in columns))
    console.print(table)
    for row in rows:
        if "error" in row:
            line = f"{row['contestant']}: not measured: {row['error']}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()


def write(path: Path, found: dict[str, Any]) -> None:
    """Writes results as JSON; a number that is not finite is null.

    Raises:
        BenchError: The folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    content = {"schema": SCHEMA, **found}
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
