"""Selected rows of a batch, their cross-entropy, and what makes a mean of it.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``; ``R`` rows (slots in use or not); ``D`` hidden
size, ``V`` classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cggr.spec import Selection
from cggr.torch.functional import linear_logits, row_chunks


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
    return target_R.masked_fill(wrong, ignore_index), torch.where(wrong, torch.nan, 0.0).sum()


def cross_entropy_sum(logits_RV: Tensor, rows: SelectedRows, ignore_index: int) -> Tensor:
    """``Σ w nll`` of the rows' logits, in float32 (float64 for float64)."""
    if logits_RV.dtype != torch.float64:
        logits_RV = logits_RV.float()
    if rows.weight_R is None:
        # torch's own sum, so that over all rows it is torch's dense loss to the last bit.
        total = F.cross_entropy(logits_RV, rows.label_R, ignore_index=ignore_index, reduction="sum")
    else:
        nll_R = F.cross_entropy(
            logits_RV, rows.label_R, ignore_index=ignore_index, reduction="none"
        )
        total = (rows.weight_R.to(nll_R.dtype) * nll_R).sum()
    return total + rows.fault


def linear_cross_entropy_sum(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: SelectedRows,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """:func:`cross_entropy_sum` of a linear head, one chunk of logits in memory at a time."""
    total = _LinearCrossEntropy.apply(
        hidden_RD,
        weight_VD,
        bias_V,
        rows.label_R,
        rows.weight_R,
        ignore_index,
        logit_scale,
        softcap,
    )
    return total + rows.fault


class _LinearCrossEntropy(torch.autograd.Function):
    """``Σ_r w_r nll_r`` of a linear head.

    With ``z = h W^T + b``, ``x = c tanh(s z / c)`` and ``g = w (softmax(x) - onehot(y))``, the
    gradient is ``dz = g s (1 - (x / c)²)``, ``dh = dz W``, ``dW = dz^T h``, ``db = Σ dz``. The
    backward pass computes the logits again, chunk by chunk. (Gradients computed beside the forward
    pass would save that product; in float16 they would underflow, since the gradient scaler's
    factor is not known yet.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        label_R: Tensor,
        weight_R: Tensor | None,
        ignore_index: int,
        logit_scale: float,
        softcap: float | None,
    ) -> Tensor:
        dtype = _accumulator(hidden_RD)
        row_weight_R = (label_R != ignore_index).to(dtype)
        if weight_R is not None:
            row_weight_R = row_weight_R * weight_R.to(dtype)
        total = torch.zeros((), dtype=dtype, device=hidden_RD.device)
        for part in row_chunks(hidden_RD.shape[0], weight_VD.shape[0], hidden_RD.device):
            logits = linear_logits(hidden_RD[part], weight_VD, bias_V, logit_scale, softcap)
            nll = F.cross_entropy(
                logits.to(dtype), label_R[part], ignore_index=ignore_index, reduction="none"
            )
            # Not in place: torch 2.11's compiler then loses the gradient of this function.
            total = total + (row_weight_R[part] * nll).sum()
        # A row that is ignored has weight 0 and may name no class: class 0 stands in for it.
        class_R = label_R.masked_fill(label_R == ignore_index, 0)
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, class_R, row_weight_R)
        ctx.logit_scale, ctx.softcap = logit_scale, softcap
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, bias_V, class_R, row_weight_R = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = _accumulator(hidden_RD)
        d_hidden = torch.empty_like(hidden_RD) if need_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        d_bias = torch.zeros_like(bias_V, dtype=dtype) if need_bias else None
        row_grad_R1 = (row_weight_R * grad)[:, None]
        for part in row_chunks(hidden_RD.shape[0], weight_VD.shape[0], hidden_RD.device):
            hidden, row_grad = hidden_RD[part], row_grad_R1[part]
            logits = linear_logits(hidden, weight_VD, bias_V, ctx.logit_scale, ctx.softcap)
            logits = logits.to(dtype)
            d_logits = torch.softmax(logits, dim=-1)
            d_logits.scatter_add_(1, class_R[part, None], torch.full_like(row_grad, -1.0))
            d_logits *= row_grad * ctx.logit_scale
            if ctx.softcap is not None:
                d_logits *= 1 - (logits / ctx.softcap) ** 2
            d_logits.masked_fill_(row_grad == 0, 0)  # an ignored row may hold anything: 0 * NaN
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight_VD
            if d_weight is not None:
                d_weight += d_logits.T @ hidden.masked_fill(row_grad == 0, 0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight_VD.dtype),
            None if d_bias is None else d_bias.to(bias_V.dtype),
            *(None,) * 5,
        )


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
