"""Selected rows of a batch, and what makes a mean of their loss.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``; ``R`` rows (slots in use or not); ``V``
classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cggr.spec import Selection, TokenStatistics


class Scored(NamedTuple):
    """What a scoring pass leaves to the loss.

    Attributes:
        statistics: Of every token.
        softmax: ``(3, N)``, the largest probability, the logit it belongs to, and the nll of every
            token, where the implementation's loss needs them.
    """

    statistics: TokenStatistics
    softmax: Tensor | None


class SelectedRows(NamedTuple):
    """A selection as rows of the flattened batch.

    Attributes:
        index_R: int64, rows to gather; None for all rows as they are.
        label_R: int64 targets; `ignore_index` in unused slots and where the target is invalid.
        weight_R: float32 weights, 0 in unused slots; None if all are 1.
        unused_R: bool, unused slots; None if there are none.
        n_selected: Scalar, selected tokens.
        fault: Scalar, 0, or NaN if a selected target is out of range.
    """

    index_R: Tensor | None
    label_R: Tensor
    weight_R: Tensor | None
    unused_R: Tensor | None
    n_selected: Tensor
    fault: Tensor

    def take(self, rows_NX: Tensor) -> Tensor:
        """The selected rows; unused slots are 0, since NaN times their weight 0 would be NaN."""
        if self.index_R is None:
            return rows_NX
        rows_RX = rows_NX.index_select(0, self.index_R)
        return rows_RX if self.unused_R is None else rows_RX.masked_fill(self.unused_R[:, None], 0)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that is not itself differentiable, and says so where one would need it.

    ``once_differentiable`` alone raises only if nothing else of the sum can be differentiated: a
    gradient penalty beside the loss would lose its part in silence.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: the gradient of this loss cannot be differentiated again. "
                "That of CGGRLoss can where CGGR_IMPLEMENTATION=eager."
            )
        return once(ctx, *gradients)

    return checked


def selected_rows(
    selection: Selection,
    targets: Tensor,
    n_classes: int,
    ignore_index: int,
    *,
    weighted: bool,
    padded: bool,
) -> SelectedRows:
    """Rows, labels and weights of a selection.

    Args:
        selection: Over `targets`.
        targets: int64, ``(B, S)`` or ``(N,)``.
        n_classes: V.
        ignore_index: Label of what is not trained on.
        weighted: Whether weights other than 1 can occur.
        padded: Whether unused slots can occur.
    """
    target_N = targets.reshape(-1)
    index = selection.indices.long()
    if index.dim() == 2:  # positions within each sequence
        length = targets.shape[1]
        unused_R = (index == length).reshape(-1)
        start = torch.arange(index.shape[0], device=index.device)[:, None] * length
        index_R = (index + start).reshape(-1)
    else:
        unused_R, index_R = index == target_N.shape[0], index
    index_R = fill_unused(index_R, unused_R, target_N.shape[0])
    target_R = target_N.index_select(0, index_R).masked_fill(unused_R, ignore_index)
    label_R, fault = _labels(target_R, n_classes, ignore_index)
    weight_R = selection.weights.reshape(-1) if weighted else None
    return SelectedRows(
        index_R,
        label_R,
        weight_R,
        unused_R if padded else None,
        selection.count.sum(dtype=torch.int32),
        fault,
    )


def every_row(targets: Tensor, n_classes: int, ignore_index: int) -> SelectedRows:
    """All rows with weight 1: the dense loss in the terms of :func:`selected_rows`."""
    label_N, fault = _labels(targets.reshape(-1), n_classes, ignore_index)
    count = (targets != ignore_index).sum(dtype=torch.int32)
    return SelectedRows(None, label_N, None, None, count, fault)


def fill_unused(index: Tensor, unused: Tensor, size: int) -> Tensor:
    """Indices in ``[0, size)``: unused slots repeat the first used one, or the last index of all.

    A used one is read anyway, so nothing else is touched.
    """
    if index.shape[0] == 0:
        return index
    return torch.where(unused, index.masked_fill(unused, size - 1).amin(), index)


def _labels(target_R: Tensor, n_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    # A label out of range would be read out of bounds; it is ignored, and the loss is NaN instead.
    ignored = target_R == ignore_index
    wrong = ((target_R < 0) | (target_R >= n_classes)) & ~ignored
    fault = torch.zeros(wrong.shape, dtype=torch.float32, device=wrong.device)
    return target_R.masked_fill(wrong, ignore_index), fault.masked_fill(wrong, torch.nan).sum()


def reduce_loss(
    weighted_sum: Tensor,
    rows: SelectedRows,
    n_eligible: Tensor,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor:
    """Divide ``Σ w nll`` by what makes it a mean.

    Args:
        weighted_sum: Scalar.
        rows: With weights, the sum is an estimate over all eligible tokens and is divided by
            their number; without, by the number of selected tokens.
        n_eligible: Eligible tokens of the batch.
        reduction: ``"mean"``, or ``"sum"`` for no division.
        num_items: M of gradient accumulation: ``mean n_eligible / M``.
    """
    if num_items is not None:
        if reduction == "sum":
            raise ValueError("num_items_in_batch needs reduction='mean', got reduction='sum'.")
        if not isinstance(num_items, Tensor) and not num_items > 0:
            raise ValueError(f"num_items_in_batch must be positive, got {num_items}.")
        if isinstance(num_items, Tensor):  # 0 where nothing is eligible, and then the sum is 0
            num_items = num_items.masked_fill(num_items == 0, 1)
        if rows.weight_R is not None:
            return weighted_sum / num_items
        share = n_eligible.to(weighted_sum.dtype) / rows.n_selected.clamp(min=1).to(
            weighted_sum.dtype
        )
        return weighted_sum * share / num_items
    if reduction == "sum":
        return weighted_sum
    total = rows.n_selected if rows.weight_R is None else n_eligible
    return weighted_sum / total.clamp(min=1).to(weighted_sum.dtype)
