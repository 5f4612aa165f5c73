"""Work on rows, a bounded number of logits at a time.

Shapes: ``N`` rows, cut into chunks of ``R`` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

MAX_LOGITS = 1 << 24  # of a chunk; its float32 temporaries take 64 MiB each


def scan_row_chunks(
    function: Callable[[Any, Any], tuple[Any, Any]], start: Any, rows_N: Any, n_classes: int
) -> tuple[Any, Any]:
    """``function(start, rows_N)``, computed in chunks of rows that hand on what is accumulated.

    Chunk c takes the rows c, c + chunks, c + 2 chunks...: rows that are sharded over devices stay
    there, and every device has its part of every chunk.

    Args:
        function: ``(accumulated, rows_R) -> (accumulated, result_R)``: of the result, each row
            depends on its own row alone. R is any number; rows of zeros may follow the last one,
            and must add nothing.
        start: What is accumulated over no rows.
        rows_N: A pytree of arrays ``(N, ...)``.
        n_classes: V, the logits that the function makes of a row.

    Returns:
        What was accumulated over all rows, and the result for every row.
    """
    n_rows = jax.tree.leaves(rows_N)[0].shape[0]
    chunks = _n_chunks(n_rows, n_classes)
    if chunks == 1:
        return function(start, rows_N)

    def split(x: Array) -> Array:
        missing = -n_rows % chunks
        if missing:
            x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(-1, chunks, *x.shape[1:])

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:n_rows]

    rows_RC = jax.tree.map(split, rows_N)

    def step(accumulated: Any, chunk: Array) -> tuple[Any, Any]:
        # Sliced one by one: as the loop's own input, the rows would be transposed, a copy.
        rows_R = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, chunk, axis=1, keepdims=False), rows_RC
        )
        return function(accumulated, rows_R)

    accumulated, result = jax.lax.scan(step, start, jnp.arange(chunks))
    return accumulated, jax.tree.map(join, result)


def map_row_chunks(function: Callable[[Any], Any], rows_N: Any, n_classes: int) -> Any:
    """``function(rows_N)``, a function of each row on its own, computed in chunks of rows."""
    return scan_row_chunks(lambda start, rows: (start, function(rows)), None, rows_N, n_classes)[1]


def _n_chunks(n_rows: int, n_classes: int) -> int:
    # As few as keep each within the limit, but a divisor of the rows if one is near: else all of
    # the rows are copied to pad them.
    needed = min(max(-(-n_rows * n_classes // MAX_LOGITS), 1), max(n_rows, 1))
    near = range(needed, min(4 * needed, n_rows) + 1)
    return next((chunks for chunks in near if n_rows % chunks == 0), needed)
