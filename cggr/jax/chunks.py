"""Work on rows, a bounded number of logits at a time.

Shapes: ``N`` rows, cut into chunks of ``R`` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

MAX_LOGITS = 1 << 24  # a chunk's logits in float32: 64 MiB


def n_chunks(n_rows: int, n_classes: int) -> int:
    """How many chunks keep each below ``MAX_LOGITS`` logits: a power of two, at most `n_rows`."""
    needed = -(-n_rows * n_classes // MAX_LOGITS)
    return min(1 << max(needed - 1, 0).bit_length(), max(n_rows, 1))


def split_rows(rows_N: Any, chunks: int) -> Any:
    """Arrays ``(N, ...)`` to ``(chunks, R, ...)``, zeros after the last row.

    Chunk c takes the rows c, c + chunks, c + 2 chunks...: rows that are sharded over devices stay
    there, and every device has its part of every chunk.
    """

    def split(x: Array) -> Array:
        missing = -x.shape[0] % chunks
        x = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        return jnp.moveaxis(x.reshape(-1, chunks, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, rows_N)


def join_rows(rows_CR: Any, n_rows: int) -> Any:
    """The inverse of :func:`split_rows`."""

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:n_rows]

    return jax.tree.map(join, rows_CR)


def map_row_chunks(function: Callable[[Any], Any], rows_N: Any, n_classes: int) -> Any:
    """``function(rows_N)``, a function of each row on its own, computed in chunks.

    Args:
        function: Arrays ``(R, ...)`` to arrays ``(R, ...)``, R any number.
        rows_N: A pytree of arrays ``(N, ...)``.
        n_classes: V, the logits that the function makes of a row.
    """
    n_rows = jax.tree.leaves(rows_N)[0].shape[0]
    chunks = n_chunks(n_rows, n_classes)
    if chunks == 1:
        return function(rows_N)
    return join_rows(jax.lax.map(function, split_rows(rows_N, chunks)), n_rows)
