"""Selected rows of a batch, and what makes a mean of their loss.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``; ``G`` groups of ``M`` tokens (``1, N`` or
``B, S``) with ``C`` slots each; ``R`` rows, ``G C`` or all ``N``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cggr.spec import RoutingConfig, Selection


class SelectedRows(NamedTuple):
    """A selection as rows of the flattened batch.

    Attributes:
        index_GC: int32, rows to gather within each group; unused slots lie beyond M, each at a
            place of its own. None for all rows as they are.
        label_R: Integers; whatever in unused slots.
        weight_R: float32; 0 in unused slots and for rows that are not selected.
        n_selected: int32 scalar, selected tokens.
        weighted: Whether the weights make the sum an estimate over all eligible tokens.
    """

    index_GC: Array | None
    label_R: Array
    weight_R: Array
    n_selected: Array
    weighted: bool

    def take(self, rows: Array) -> Array:
        """The selected rows ``(R, X)`` of an array ``(..., X)``; unused slots are 0."""
        rows_NX = rows.reshape(-1, rows.shape[-1])
        return rows_NX if self.index_GC is None else take_rows(rows_NX, self.index_GC)


def selected_rows(selection: Selection, targets: Array, config: RoutingConfig) -> SelectedRows:
    """Rows, labels and weights of a selection over `targets`, ``(B, S)`` or ``(N,)``."""
    target_N = targets.reshape(-1)
    n_selected = jnp.sum(selection.count, dtype=jnp.int32)
    weighted = config.selection == "importance"
    size = targets.shape[-1] if config.scope == "sequence" else target_N.shape[0]
    index_GC = rows_of_slots(selection.indices, size)
    if index_GC.shape[1] == size:  # a slot for every row: no row needs to move
        weight_R = selection.mask.reshape(-1).astype(jnp.float32)
        if weighted:
            weight_R = put_rows(selection.weights.reshape(-1, 1), index_GC, len(target_N))[:, 0]
        return SelectedRows(None, target_N, weight_R, n_selected, weighted)
    label_R = take_rows(target_N[:, None], index_GC)[:, 0]
    return SelectedRows(index_GC, label_R, selection.weights.reshape(-1), n_selected, weighted)


def rows_of_slots(indices: Array, size: int) -> Array:
    """A selection's indices ``(G, C)`` into groups of `size`, those of unused slots beyond them.

    Beyond the group, so that nothing is read or written, and unique, so that the transpose, a
    scatter, needs no atomic additions.
    """
    index_GC = jnp.atleast_2d(indices)
    slot_C = jnp.arange(index_GC.shape[1], dtype=jnp.int32)
    return jnp.where(index_GC < size, index_GC, size + slot_C)


def every_row(targets: Array, ignore_index: int) -> SelectedRows:
    """All rows that are not ignored with weight 1: the dense loss."""
    eligible = targets.reshape(-1) != ignore_index
    count = jnp.sum(eligible, dtype=jnp.int32)
    weight_R = eligible.astype(jnp.float32)
    return SelectedRows(None, targets.reshape(-1), weight_R, count, weighted=False)


def take_rows(rows_NX: Array, index_GC: Array) -> Array:
    """Rows of each group ``(R, X)``; 0 where an index lies beyond it."""
    groups, capacity = index_GC.shape
    size, width = rows_NX.shape[0] // max(groups, 1), rows_NX.shape[1]
    rows_GMX = rows_NX.reshape(groups, size, width)
    take = jax.vmap(
        lambda rows, index: rows.at[index].get(mode="fill", fill_value=0, unique_indices=True)
    )
    return take(rows_GMX, index_GC).reshape(groups * capacity, width)


def put_rows(rows_RX: Array, index_GC: Array, n_rows: int) -> Array:
    """The rows in their places among `n_rows` ``(N, X)``, the others 0."""
    groups, capacity = index_GC.shape
    width = rows_RX.shape[1]
    zeros_MX = jnp.zeros_like(rows_RX, shape=(n_rows // max(groups, 1), width))
    put = jax.vmap(
        lambda index, rows: zeros_MX.at[index].set(rows, mode="drop", unique_indices=True)
    )
    return put(index_GC, rows_RX.reshape(groups, capacity, width)).reshape(n_rows, width)


def reduce_loss(
    weighted_sum: Array,
    rows: SelectedRows,
    n_eligible: Array,
    reduction: str,
    num_items: Any,
) -> tuple[Array, Array]:
    """Divide ``Σ w nll`` by what makes it a mean.

    Args:
        weighted_sum: Scalar.
        rows: With weights, the sum is an estimate over all eligible tokens and is divided by
            their number; without, by the number of selected tokens.
        n_eligible: Eligible tokens of the batch.
        reduction: ``"mean"``, or ``"sum"`` for no division.
        num_items: M of gradient accumulation: ``mean n_eligible / M``.

    Returns:
        The loss, and the number that makes a mean of the sum.
    """
    check_reduction(reduction)
    denominator = (n_eligible if rows.weighted else rows.n_selected).astype(weighted_sum.dtype)
    if reduction == "sum":
        if num_items is not None:
            raise ValueError("num_items_in_batch needs reduction='mean', got reduction='sum'.")
        return weighted_sum, denominator
    mean = weighted_sum / jnp.maximum(denominator, 1)
    if num_items is None:
        return mean, denominator
    if not isinstance(num_items, Array) and not num_items > 0:
        raise ValueError(f"num_items_in_batch must be positive, got {num_items}.")
    num_items = jnp.where(num_items == 0, 1, num_items)  # 0 where nothing is eligible: 0 / 1
    return mean * n_eligible.astype(mean.dtype) / num_items, denominator


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that is neither mean nor sum."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
