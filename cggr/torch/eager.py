"""The operations in plain PyTorch: everywhere, in any floating dtype, a chunk of rows at a time.

Shapes: ``N`` tokens, of which ``R`` rows are selected; ``D`` hidden size, ``V`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat.torch as xp
import torch
import torch.nn.functional as F
from torch import Tensor

from cggr import spec
from cggr.spec import TokenStatistics
from cggr.spec.statistics import vocabulary_sums as sums_of_rows
from cggr.torch.selected import Scored, SelectedRows, differentiable_once

# How many logits are worked on at a time. A head's product wants many rows; on the CPU, what
# follows it wants them to stay in the cache. An accelerator wants few launches.
_CPU_PRODUCT, _CPU_CACHE = 1 << 20, 1 << 18
_ACCELERATOR = 1 << 26


def token_statistics(logits: Tensor, targets: Tensor | None, ignore_index: int) -> Scored:
    """Statistics of every row of logits ``(..., V)``."""
    return chunked_statistics(logits, lambda rows: rows, logits.shape[-1], targets, ignore_index)


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

    def project(rows: Tensor) -> Tensor:
        return linear_logits(rows, weight, bias, logit_scale, softcap)

    return chunked_statistics(hidden, project, weight.shape[0], targets, ignore_index)


def linear_logits(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``softcap tanh(logit_scale (rows weight^T + bias) / softcap)``."""
    logits = torch.nn.functional.linear(rows, weight, bias)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chunked_statistics(
    rows: Tensor,
    project: Callable[[Tensor], Tensor],
    n_classes: int,
    targets: Tensor | None,
    ignore_index: int,
) -> Scored:
    """Statistics of ``project(rows)``, computed for a bounded number of rows at a time.

    Args:
        rows: ``(..., D)``.
        project: ``(n, D) -> (n, V)`` logits.
        n_classes: V.
        targets: ``(...)`` or None.
        ignore_index: Target that is not scored.
    """
    columns = _by_chunks(
        rows,
        project,
        n_classes,
        targets,
        lambda logits, part: spec.token_statistics(logits, part, ignore_index=ignore_index, xp=xp),
    )
    shape = rows.shape[:-1]
    statistics = (None if x is None else x.reshape(shape) for x in columns)
    return Scored(TokenStatistics(*statistics), None)


def vocabulary_sums(logits: Tensor, targets: Tensor | None) -> Tensor:
    """``(6, N)`` :class:`VocabularySums` of logits ``(..., V)`` that are some of the classes."""
    return _sums(logits, lambda rows: rows, logits.shape[-1], targets)


def linear_vocabulary_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """:func:`vocabulary_sums` of a linear head's logits."""

    def project(rows: Tensor) -> Tensor:
        return linear_logits(rows, weight, bias, logit_scale, softcap)

    return _sums(hidden, project, weight.shape[0], targets)


def _sums(
    rows: Tensor, project: Callable[[Tensor], Tensor], n_classes: int, targets: Tensor | None
) -> Tensor:
    columns = _by_chunks(
        rows,
        project,
        n_classes,
        targets,
        lambda logits, part: sums_of_rows(logits, part, xp=xp),
    )
    return torch.stack(columns)


def _by_chunks(
    rows: Tensor,
    project: Callable[[Tensor], Tensor],
    n_classes: int,
    targets: Tensor | None,
    compute: Callable[[Tensor, Tensor | None], tuple[Tensor | None, ...]],
) -> list[Any]:
    """``compute(project(rows), targets)``, columns ``(N,)``, for a few rows at a time."""
    rows_ND = rows.detach().reshape(-1, rows.shape[-1])
    targets_N = None if targets is None else targets.reshape(-1)
    n_rows = rows_ND.shape[0]
    columns: list[Any] = []
    with torch.no_grad():
        for part in row_chunks(n_rows, n_classes, rows.device):
            logits = project(rows_ND[part])
            for inner in row_chunks(logits.shape[0], n_classes, rows.device, cached=True):
                some = slice(part.start + inner.start, part.start + inner.stop)
                chunk = compute(logits[inner], None if targets_N is None else targets_N[some])
                # One allocation up front: small results kept between large temporaries would
                # fragment the CPU's heap to many times its need.
                columns = columns or [None if x is None else x.new_empty(n_rows) for x in chunk]
                for column, value in zip(columns, chunk, strict=True):
                    if column is not None:
                        column[some] = value
    return columns


def row_chunks(
    n_rows: int, n_classes: int, device: torch.device, *, cached: bool = False
) -> Iterator[slice]:
    """Slices of rows whose logits fit the budget; one empty slice when there are no rows."""
    budget = _ACCELERATOR
    # A compiler unrolls the loop: it gets few large chunks on the CPU too.
    if device.type == "cpu" and not torch.compiler.is_compiling():
        budget = _CPU_CACHE if cached else _CPU_PRODUCT
    size = max(1, budget // max(n_classes, 1))
    for start in range(0, max(n_rows, 1), size):
        yield slice(start, min(start + size, n_rows))


def cross_entropy_sum(
    logits_NV: Tensor, rows: SelectedRows, ignore_index: int, scored: Scored | None
) -> Tensor:
    """``Σ w nll`` of the selected rows of logits, in float32 (float64 for float64)."""
    logits_RV = rows.take(logits_NV)
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


def part_cross_entropy_sum(
    logits_RV: Tensor, softmax_3R: Tensor, label_R: Tensor, weight_R: Tensor
) -> Tensor:
    """``Σ w nll`` of rows of logits of some of the classes, whose softmax over all is known.

    Args:
        logits_RV: The part.
        softmax_3R: As in :class:`Scored`.
        label_R: Target as a class of this part, -1 where it is of another.
        weight_R: Weights; where 0, a row is not looked at.
    """
    return _PartCrossEntropy.apply(logits_RV, softmax_3R, label_R, weight_R)


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
    return _LinearCrossEntropy.apply(
        hidden_RD, weight_VD, bias_V, label_R, weight_R, -1, logit_scale, softcap, softmax_3R
    )


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
    """:func:`cross_entropy_sum` of a linear head, one chunk of logits in memory at a time."""
    total = _LinearCrossEntropy.apply(
        rows.take(hidden_ND),
        weight_VD,
        bias_V,
        rows.label_R,
        rows.weight_R,
        ignore_index,
        logit_scale,
        softcap,
        None,
    )
    return total + rows.fault


class _LinearCrossEntropy(torch.autograd.Function):
    """``Σ_r w_r nll_r`` of a linear head, which may be that of some of the classes.

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
        softmax_3R: Tensor | None,
    ) -> Tensor:
        dtype = _accumulator(hidden_RD)
        if softmax_3R is not None:
            row_weight_R = weight_R.to(dtype)  # type: ignore[union-attr]
            total = _weighted_sum(row_weight_R, softmax_3R[2])
        else:
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
        class_R = label_R.masked_fill(label_R == ignore_index, -1)
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, class_R, row_weight_R, softmax_3R)
        ctx.logit_scale, ctx.softcap = logit_scale, softcap
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, bias_V, class_R, row_weight_R, softmax_3R = ctx.saved_tensors
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
            softmax = None if softmax_3R is None else softmax_3R[:, part]
            d_logits = _error(logits, class_R[part], softmax)
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
            *(None,) * 6,
        )


class _PartCrossEntropy(torch.autograd.Function):
    """``Σ w nll`` of rows whose softmax is known; gradient ``w (softmax - onehot)``."""

    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, softmax_3R: Tensor, label_R: Tensor, weight_R: Tensor
    ) -> Tensor:
        ctx.save_for_backward(logits_RV, softmax_3R, label_R, weight_R)
        return _weighted_sum(weight_R, softmax_3R[2])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits_RV, softmax_3R, label_R, weight_R = ctx.saved_tensors
        gradient = _error(logits_RV.to(_accumulator(logits_RV)), label_R, softmax_3R)
        gradient *= (weight_R * grad)[:, None]
        gradient.masked_fill_((weight_R == 0)[:, None], 0)
        return gradient.to(logits_RV.dtype), None, None, None


def _weighted_sum(weight_R: Tensor, nll_R: Tensor) -> Tensor:
    return torch.where(weight_R == 0, 0, weight_R * nll_R).sum()  # 0 times NaN


def _error(logits_RV: Tensor, class_R: Tensor, softmax_3R: Tensor | None) -> Tensor:
    """``softmax - onehot``; a class of -1 is none of these."""
    if softmax_3R is None:
        error_RV = torch.softmax(logits_RV, dim=-1)
    else:
        confidence_R, top_R, _ = softmax_3R
        error_RV = confidence_R[:, None] * torch.exp(logits_RV - top_R[:, None])
    is_here_R = (class_R >= 0).to(error_RV.dtype)
    return error_RV.scatter_add_(1, class_R.clamp(min=0)[:, None], -is_here_R[:, None])


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
