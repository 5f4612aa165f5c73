"""The operations by the Triton kernels: float32, bfloat16 and float16.

The scoring pass leaves what gives every row's softmax: the loss of the selected rows costs nothing
more, and their gradient no second reduction.

Shapes: ``N`` tokens, of which ``R`` rows are selected; ``D`` hidden size, ``V`` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cggr.kernels.chunks import row_chunk
from cggr.spec import TokenStatistics
from cggr.torch import ops
from cggr.torch.selected import Scored, SelectedRows, differentiable_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NONE_IGNORED = 0  # of sums, which know no ignored target


def token_statistics(logits: Tensor, targets: Tensor | None, ignore_index: int) -> Scored:
    """Statistics of every row of logits ``(..., V)``."""
    logits, shape = logits.detach(), logits.shape[:-1]
    one_stride = (
        logits.dim() != 3 or shape[1] == 1 or logits.stride(0) == shape[1] * logits.stride(1)
    )
    if not one_stride and shape[0]:
        # Such as logits[:, :-1], whose rows no single stride reaches: each sequence on its own.
        parts = [
            ops.token_statistics(
                logits[row], None if targets is None else targets[row], ignore_index
            )
            for row in range(shape[0])
        ]
        columns = torch.cat(parts, dim=1)
    else:
        target_N = None if targets is None else targets.reshape(-1)
        columns = ops.token_statistics(logits.reshape(-1, logits.shape[-1]), target_N, ignore_index)
    return _scored(columns, shape, targets is not None)


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> Scored:
    """Statistics of a linear head's logits."""
    columns = ops.linear_token_statistics(
        hidden.detach().reshape(-1, hidden.shape[-1]),
        weight.detach(),
        None if bias is None else bias.detach(),
        None if targets is None else targets.reshape(-1),
        ignore_index,
        logit_scale,
        softcap,
    )
    return _scored(columns, hidden.shape[:-1], targets is not None)


def chunked_statistics(
    rows: Tensor,
    project: Callable[[Tensor], Tensor],
    n_classes: int,
    targets: Tensor | None,
    ignore_index: int,
) -> Scored:
    """Statistics of ``project(rows)``, whose logits are in memory a chunk of rows at a time."""
    rows_ND = rows.detach().reshape(-1, rows.shape[-1])
    target_N = None if targets is None else targets.reshape(-1)
    size = row_chunk(rows_ND.shape[0], n_classes)
    with torch.no_grad():
        parts = [
            ops.token_statistics(
                project(rows_ND[first : first + size]),
                None if target_N is None else target_N[first : first + size],
                ignore_index,
            )
            for first in range(0, max(rows_ND.shape[0], 1), size)
        ]
    return _scored(torch.cat(parts, dim=1), rows.shape[:-1], targets is not None)


def _scored(columns: Tensor, shape: Any, has_targets: bool) -> Scored:
    entropy, margin, confidence, _, *of_targets = columns.reshape(columns.shape[0], *shape).unbind()
    nll, error_norm = of_targets if has_targets else (None, None)
    statistics = TokenStatistics(nll, entropy, confidence, margin, error_norm)
    return Scored(statistics, columns[ops.SOFTMAX] if has_targets else None)


def cross_entropy_sum(
    logits_NV: Tensor, rows: SelectedRows, ignore_index: int, scored: Scored | None
) -> Tensor:
    """``Σ w nll`` of the selected rows of logits."""
    if scored is None:
        logits_NV, rows = rows.take(logits_NV), rows._replace(index_R=None, unused_R=None)
        scored = token_statistics(logits_NV, rows.label_R, ignore_index)
    weight_R = _row_weights(rows, ignore_index)
    if rows.index_R is None:
        label_N, weight_N = rows.label_R, weight_R
    else:
        # Unused slots write behind the last row.
        n_rows = logits_NV.shape[0]
        slot_R = rows.index_R
        if rows.unused_R is not None:
            slot_R = slot_R.masked_fill(rows.unused_R, n_rows)
        label_N = rows.label_R.new_zeros(n_rows + 1).scatter(0, slot_R, rows.label_R)[:n_rows]
        weight_N = weight_R.new_zeros(n_rows + 1).scatter(0, slot_R, weight_R)[:n_rows]
    total = _CrossEntropySum.apply(logits_NV, scored.softmax, label_N, weight_N)
    return total + rows.fault


def linear_cross_entropy_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: SelectedRows,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    scored: Scored | None,
) -> Tensor:
    """:func:`cross_entropy_sum` of a linear head, without its logits in memory."""
    hidden_RD, weight_R = rows.take(hidden_ND), _row_weights(rows, ignore_index)
    if scored is None:
        head = (weight_VD, bias_V, rows.label_R, ignore_index, logit_scale, softcap)
        scored = linear_token_statistics(hidden_RD, *head)
        softmax_3R = scored.softmax
    elif rows.index_R is None or scored.softmax is None:
        softmax_3R = scored.softmax
    else:
        softmax_3R = scored.softmax.index_select(1, rows.index_R)
    total = _LinearCrossEntropySum.apply(
        hidden_RD,
        weight_VD,
        bias_V,
        softmax_3R,
        rows.label_R,
        weight_R,
        logit_scale,
        softcap,
    )
    return total + rows.fault


def vocabulary_sums(logits: Tensor, targets: Tensor | None) -> Tensor:
    """``(6, N)`` :class:`VocabularySums` of logits ``(..., V)`` that are some of the classes."""
    logits_NV = logits.detach().reshape(-1, logits.shape[-1])
    target_N = None if targets is None else targets.reshape(-1)
    return ops.token_statistics(logits_NV, target_N, _NONE_IGNORED, sums=True)


def linear_vocabulary_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """:func:`vocabulary_sums` of a linear head's logits."""
    return ops.linear_token_statistics(
        hidden.detach().reshape(-1, hidden.shape[-1]),
        weight.detach(),
        None if bias is None else bias.detach(),
        None if targets is None else targets.reshape(-1),
        _NONE_IGNORED,
        logit_scale,
        softcap,
        sums=True,
    )


def part_cross_entropy_sum(
    logits_RV: Tensor, softmax_3R: Tensor, label_R: Tensor, weight_R: Tensor
) -> Tensor:
    """``Σ w nll`` of rows of logits of some of the classes, whose softmax over all is known."""
    return _CrossEntropySum.apply(logits_RV, softmax_3R, label_R, weight_R)


def part_linear_cross_entropy_sum(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    softmax_3R: Tensor,
    label_R: Tensor,
    weight_R: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """:func:`part_cross_entropy_sum` of a linear head; hidden's gradient is that of the part."""
    return _LinearCrossEntropySum.apply(
        hidden_RD, weight_VD, bias_V, softmax_3R, label_R, weight_R, logit_scale, softcap
    )


def _row_weights(rows: SelectedRows, ignore_index: int) -> Tensor:
    weight_R = (rows.label_R != ignore_index).float()
    return weight_R if rows.weight_R is None else weight_R * rows.weight_R


def _weighted_sum(weight_R: Tensor, nll_R: Tensor) -> Tensor:
    return torch.where(weight_R == 0, 0, weight_R * nll_R).sum()  # 0 times NaN


def _row_gradients(weight_R: Tensor, grad: Tensor) -> Tensor:
    return torch.where(weight_R == 0, 0, weight_R * grad)  # 0 times infinity


class _CrossEntropySum(torch.autograd.Function):
    """``Σ w nll`` of rows whose softmax is known; gradient ``w (softmax - onehot)``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        softmax_3N: Tensor,
        label_N: Tensor,
        weight_N: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(logits_NV, softmax_3N, label_N, weight_N)
        return _weighted_sum(weight_N, softmax_3N[2])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, softmax_3N, label_N, weight_N = ctx.saved_tensors
        row_grad_N = _row_gradients(weight_N, grad)
        gradient = ops.cross_entropy_gradient(logits_NV, softmax_3N, label_N, row_grad_N)
        return gradient, None, None, None


class _LinearCrossEntropySum(torch.autograd.Function):
    """:class:`_CrossEntropySum` of a linear head; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        softmax_3R: Tensor,
        label_R: Tensor,
        weight_R: Tensor,
        logit_scale: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, softmax_3R, label_R, weight_R)
        ctx.head = logit_scale, softcap
        return _weighted_sum(weight_R, softmax_3R[2])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, bias_V, softmax_3R, label_R, weight_R = ctx.saved_tensors
        row_grad_R = _row_gradients(weight_R, grad)
        # What gets no gradient may hold anything, and 0 times NaN is NaN.
        hidden_RD = hidden_RD.masked_fill((row_grad_R == 0)[:, None], 0)
        needs = ctx.needs_input_grad[:3]
        gradients = ops.linear_cross_entropy_gradient(
            hidden_RD,
            weight_VD,
            bias_V,
            softmax_3R,
            label_R,
            row_grad_R,
            *ctx.head,
            list(needs),
        )
        wanted = (x if need else None for x, need in zip(gradients, needs, strict=True))
        return *wanted, *(None,) * 5
