"""Which code computes the two operations on rows of logits that are worth a kernel.

XLA runs everywhere. ``CGGR_IMPLEMENTATION`` names an implementation, which then runs or raises:
there is no silent fallback. It is read when a function is traced.

Shapes: leading dimensions ``...``; ``R`` rows, ``V`` classes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cggr import spec
from cggr.jax import cross_entropy
from cggr.jax.chunks import map_row_chunks
from cggr.spec import TokenStatistics


class Implementation(NamedTuple):
    """The operations, each with its gradient where it has one.

    Attributes:
        token_statistics: ``(logits (..., V), targets (...) or None, ignore_index)``, no gradient.
        weighted_nll_sum: ``(logits (R, V), labels (R,), weights (R,))`` to a scalar,
            differentiable in the logits.
    """

    token_statistics: Callable[[Array, Array | None, int], TokenStatistics]
    weighted_nll_sum: Callable[[Array, Array, Array], Array]


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _xla_token_statistics(
    logits: Array, targets: Array | None, ignore_index: int
) -> TokenStatistics:
    def statistics(rows: tuple[Array, Array | None]) -> TokenStatistics:
        logits_RV, targets_R = rows
        return spec.token_statistics(logits_RV, targets_R, ignore_index=ignore_index, xp=jnp)

    # XLA keeps several float32 arrays of the logits' shape: never for all rows at once.
    n_classes = logits.shape[-1]
    rows_N = (logits.reshape(-1, n_classes), None if targets is None else targets.reshape(-1))
    columns_N = map_row_chunks(statistics, rows_N, n_classes)
    return jax.tree.map(lambda x: x.reshape(logits.shape[:-1]), columns_N)


IMPLEMENTATIONS = {
    "xla": Implementation(_xla_token_statistics, cross_entropy.weighted_nll_sum),
}


def implementation() -> Implementation:
    """The implementation that ``CGGR_IMPLEMENTATION`` names, else the default.

    Raises:
        ValueError: There is none of that name.
    """
    name = os.environ.get("CGGR_IMPLEMENTATION", "xla")
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"CGGR_IMPLEMENTATION must be one of {', '.join(map(repr, IMPLEMENTATIONS))} "
            f"in cggr.jax, got {name!r}."
        )
    return IMPLEMENTATIONS[name]


def token_statistics(logits: Array, targets: Array | None, ignore_index: int) -> TokenStatistics:
    """Statistics of every row, without gradient."""
    return implementation().token_statistics(logits, targets, ignore_index)


def weighted_nll_sum(logits_RV: Array, label_R: Array, weight_R: Array) -> Array:
    """``Σ w nll`` of the rows, with its gradient to the logits."""
    return implementation().weighted_nll_sum(logits_RV, label_R, weight_R)
