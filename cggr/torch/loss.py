"""Losses whose backward pass sees the selected tokens only.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``; ``R`` selected rows (slots in use or not);
``D`` hidden size, ``V`` classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cggr.spec import RoutingConfig, Selection, TokenStatistics
from cggr.torch.functional import (
    check_linear,
    check_logits,
    check_targets,
    linear_logits,
    linear_token_statistics,
    row_chunks,
    select_tokens,
    token_difficulty,
    token_statistics,
)
from cggr.torch.routing import RoutedModule, process_rank


class SelectedRows(NamedTuple):
    """A selection as rows of the flattened batch.

    Attributes:
        index_R: int64, rows to gather; unused slots repeat the first used one, so that they read
            nothing that is not read anyway.
        label_R: int64 targets; `ignore_index` in unused slots and where the target is invalid.
        weight_R: float32, 0 in unused slots.
        fault: scalar, 0, or NaN if a selected target is out of range.
    """

    index_R: Tensor
    label_R: Tensor
    weight_R: Tensor
    fault: Tensor


class _SelectiveLoss(RoutedModule):
    """Scoring, selection and reduction; subclasses know where the logits come from."""

    def __init__(
        self,
        config: RoutingConfig | None = None,
        *,
        capacity: str = "exact",
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(config, capacity, **options)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
        self.reduction = reduction

    def _select(
        self, statistics: TokenStatistics, targets: Tensor, reference_nll: Tensor | None
    ) -> Selection:
        eligible = targets != self.config.ignore_index
        difficulty = token_difficulty(
            statistics, self.config.scoring, reference_nll=reference_nll
        ).detach()
        batch, length = targets.shape if targets.dim() == 2 else (1, targets.shape[0])
        selection = select_tokens(
            difficulty,
            self.config,
            step=self.step_count,
            draw=self.next_draw(),
            rank=process_rank(),
            eligible=eligible,
            confidence=statistics.confidence,
            capacity=self.slots(batch, length),
        )
        self.record(
            ratio=selection.ratio,
            tokens_selected=selection.count.sum(dtype=torch.int32),
            eligible=eligible,
            confidence=statistics.confidence,
            entropy=statistics.entropy,
            difficulty=difficulty,
        )
        return selection

    def _reduce(
        self, weighted_sum: Tensor, count: Tensor, eligible: Tensor, num_items: int | Tensor | None
    ) -> Tensor:
        weighted = self.training and self.config.selection == "importance"
        return reduce_loss(weighted_sum, count, eligible.sum(), weighted, self.reduction, num_items)


class CGGRLoss(_SelectiveLoss):
    """Cross-entropy of the selected tokens.

    ``mean nll over the selected tokens``; with ``selection="importance"``
    ``Σ w nll / n_eligible``, an unbiased estimate of the mean over all. In eval mode, the mean
    over all. Logits and targets are aligned: row t is scored against target t.

    Top-k selection, the default of cggr 0.5.0 and still the default here, lost to random
    selection when measured; prefer ``selection="importance"`` or ``"stratified"``.

    Args:
        config: The routing options; or give the fields of :class:`RoutingConfig` as keywords.
        capacity: ``"exact"`` or ``"static"``; see :class:`~cggr.torch.routing.RoutedModule`.
        reduction: ``"mean"`` as above, or ``"sum"`` for its numerator.
        base_loss: A loss ``(rows, targets) -> (R,)`` in place of cross-entropy, which must give
            0 for `ignore_index`, such as ``nn.CrossEntropyLoss(reduction="none")``.
        **options: Fields of :class:`RoutingConfig`.

    Example:
        >>> criterion = CGGRLoss(selection="stratified", min_tokens_ratio=0.25, warmup_steps=0)
        >>> logits = torch.zeros(2, 8, 100, requires_grad=True)
        >>> loss = criterion(logits, torch.zeros(2, 8, dtype=torch.long))
        >>> loss.backward()
        >>> round(loss.item(), 4), int((logits.grad != 0).any(dim=-1).sum())
        (4.6052, 6)
        >>> criterion.step()  # after optimizer.step()
    """

    def __init__(
        self,
        config: RoutingConfig | None = None,
        *,
        capacity: str = "exact",
        reduction: str = "mean",
        base_loss: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, capacity=capacity, reduction=reduction, **options)
        self.base_loss = base_loss

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        reference_nll: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """Loss of the tokens worth learning from.

        Args:
            logits: ``(B, S, V)`` or ``(N, V)``, floating.
            targets: ``(B, S)`` or ``(N,)``, integers in ``[0, V)`` or `ignore_index`.
            reference_nll: Losses of a reference model, of targets' shape, for
                ``scoring="excess_loss"``.
            num_items_in_batch: Eligible tokens M of all micro-batches of this optimizer step: the
                loss becomes ``mean n_eligible / M``, so that micro-batches add up.

        Returns:
            Scalar, float32 (float64 for float64 logits); a zero connected to the graph when
            nothing is eligible.

        Raises:
            TypeError: A dtype is wrong.
            ValueError: Shapes disagree, or, on the CPU in eager mode, a target is out of range
                (elsewhere such a target makes the loss NaN).
        """
        check_logits(logits)
        if logits.dim() not in (2, 3):
            raise ValueError(
                f"logits must have shape (B, S, V) or (N, V), got {tuple(logits.shape)}."
            )
        n_classes, ignore_index = logits.shape[-1], self.config.ignore_index
        check_targets(targets, logits.shape[:-1], n_classes, ignore_index)
        logits_NV = logits.reshape(-1, n_classes)
        eligible = targets != ignore_index
        if self.training:
            statistics = token_statistics(logits, targets, ignore_index=ignore_index)
            selection = self._select(statistics, targets, reference_nll)
            rows = selected_rows(selection, targets, n_classes, ignore_index)
            logits_RV, count = logits_NV.index_select(0, rows.index_R), selection.count.sum()
        else:
            rows = every_row(targets, n_classes, ignore_index)
            logits_RV, count = logits_NV, eligible.sum()
        total = self._weighted_sum(logits_RV, rows) + rows.fault
        return self._reduce(total, count, eligible, num_items_in_batch)

    def _weighted_sum(self, logits_RV: Tensor, rows: SelectedRows) -> Tensor:
        if logits_RV.dtype != torch.float64:
            logits_RV = logits_RV.float()
        if self.base_loss is None:
            return weighted_cross_entropy(
                logits_RV,
                rows,
                self.config.ignore_index,
                weighted=self.training and self.config.selection == "importance",
            )
        loss_R = self.base_loss(logits_RV, rows.label_R)
        if loss_R.shape != rows.label_R.shape:
            raise ValueError(
                f"base_loss must return one loss per token, shape {tuple(rows.label_R.shape)}, "
                f"got {tuple(loss_R.shape)}; use reduction='none'."
            )
        return (loss_R * rows.weight_R.to(loss_R.dtype)).sum()


class CGGRLinearLoss(_SelectiveLoss):
    """:class:`CGGRLoss` of a linear head, without logits in memory.

    ``CGGRLoss(softcap tanh(logit_scale (hidden weight^T + bias) / softcap), targets)``

    All rows are scored in chunks without gradient; only the selected rows enter the head's forward
    with gradient and its backward. Neither pass holds more than one chunk of logits.

    Args:
        config: The routing options; or give the fields of :class:`RoutingConfig` as keywords.
        capacity: ``"exact"`` or ``"static"``; see :class:`~cggr.torch.routing.RoutedModule`.
        reduction: ``"mean"`` or ``"sum"``, as in :class:`CGGRLoss`.
        logit_scale: Factor of the logits, before the soft-cap.
        softcap: Soft-cap of the logits, > 0; none when None.
        **options: Fields of :class:`RoutingConfig`.

    Example:
        >>> criterion = CGGRLinearLoss(selection="stratified", warmup_steps=0)
        >>> hidden = torch.zeros(2, 8, 16, requires_grad=True)
        >>> weight = torch.zeros(100, 16, requires_grad=True)
        >>> loss = criterion(hidden, weight, torch.zeros(2, 8, dtype=torch.long))
        >>> loss.backward()
        >>> round(loss.item(), 3), tuple(weight.grad.shape)
        (4.605, (100, 16))
    """

    def __init__(
        self,
        config: RoutingConfig | None = None,
        *,
        capacity: str = "exact",
        reduction: str = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, capacity=capacity, reduction=reduction, **options)
        self.logit_scale = logit_scale
        self.softcap = softcap

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        reference_nll: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """Loss of the tokens worth learning from.

        Args:
            hidden: ``(B, S, D)`` or ``(N, D)``, floating.
            weight: ``(V, D)``.
            targets: ``(B, S)`` or ``(N,)``, integers in ``[0, V)`` or `ignore_index`.
            bias: ``(V,)``.
            reference_nll: As in :meth:`CGGRLoss.forward`.
            num_items_in_batch: As in :meth:`CGGRLoss.forward`.

        Returns:
            Scalar, float32 (float64 for float64 inputs). Its gradient can be taken once: the
            backward pass is not itself differentiable.

        Raises:
            TypeError: A dtype is wrong.
            ValueError: Shapes disagree, or, on the CPU in eager mode, a target is out of range.
        """
        check_linear(hidden, weight, bias, self.softcap)
        if hidden.dim() not in (2, 3):
            raise ValueError(
                f"hidden must have shape (B, S, D) or (N, D), got {tuple(hidden.shape)}."
            )
        n_classes, ignore_index = weight.shape[0], self.config.ignore_index
        check_targets(targets, hidden.shape[:-1], n_classes, ignore_index)
        # Inside autocast the head computes in the low precision, as torch's own linear does.
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        eligible = targets != ignore_index
        with torch.autocast(hidden.device.type, enabled=False):
            if self.training:
                statistics = linear_token_statistics(
                    hidden,
                    weight.detach(),
                    targets,
                    bias=None if bias is None else bias.detach(),
                    logit_scale=self.logit_scale,
                    softcap=self.softcap,
                    ignore_index=ignore_index,
                )
                selection = self._select(statistics, targets, reference_nll)
                rows = selected_rows(selection, targets, n_classes, ignore_index)
                hidden_RD, count = hidden_ND.index_select(0, rows.index_R), selection.count.sum()
            else:
                rows = every_row(targets, n_classes, ignore_index)
                hidden_RD, count = hidden_ND, eligible.sum()
            total = _LinearCrossEntropy.apply(
                hidden_RD,
                weight,
                bias,
                rows.label_R,
                rows.weight_R,
                ignore_index,
                self.logit_scale,
                self.softcap,
            )
            return self._reduce(total + rows.fault, count, eligible, num_items_in_batch)


class _LinearCrossEntropy(torch.autograd.Function):
    """``Σ_r w_r nll_r`` of a linear head; the gradient is computed chunk by chunk beside it.

    With ``z = h W^T + b``, ``x = c tanh(s z / c)`` and ``g = w (softmax(x) - onehot(y))``:
    ``dz = g s (1 - (x / c)²)``, ``dh = dz W``, ``dW = dz^T h``, ``db = Σ dz``. Computed in the
    forward pass, where the chunk's logits are at hand, so the backward pass only scales it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        label_R: Tensor,
        weight_R: Tensor,
        ignore_index: int,
        logit_scale: float,
        softcap: float | None,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        accumulate = torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32
        device = hidden_RD.device
        total = torch.zeros((), dtype=accumulate, device=device)
        d_hidden = torch.empty_like(hidden_RD) if need_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=accumulate) if need_weight else None
        d_bias = (
            torch.zeros_like(bias_V, dtype=accumulate) if bias_V is not None and need_bias else None
        )
        for part in row_chunks(hidden_RD.shape[0], weight_VD.shape[0], device):
            hidden, label = hidden_RD[part], label_R[part]
            counted = label != ignore_index
            weight = torch.where(counted, weight_R[part].to(accumulate), 0)
            index = torch.where(counted, label, 0)[:, None]
            logits = linear_logits(hidden, weight_VD, bias_V, logit_scale, softcap).to(accumulate)
            log_p = torch.log_softmax(logits, dim=-1)
            # where, not a product with weight 0: an unused row must not add 0 * inf.
            nll = torch.where(counted, -log_p.gather(1, index)[:, 0], 0)
            total += (weight * nll).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            d_logits = log_p.exp_()
            d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -1.0))
            d_logits *= logit_scale * weight[:, None]
            if softcap is not None:
                d_logits *= 1 - (logits / softcap) ** 2
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(weight_VD.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight_VD
            if d_weight is not None:
                d_weight += d_logits.T @ hidden
        ctx.save_for_backward(
            d_hidden,
            None if d_weight is None else d_weight.to(weight_VD.dtype),
            None if d_bias is None or bias_V is None else d_bias.to(bias_V.dtype),
        )
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def selected_rows(
    selection: Selection, targets: Tensor, n_classes: int, ignore_index: int
) -> SelectedRows:
    """Rows, labels and weights of a selection over ``(B, S)`` or ``(N,)`` targets."""
    index, target_N = selection.indices.long(), targets.reshape(-1)
    if index.dim() == 2:  # positions within each sequence
        length = targets.shape[1]
        used = index < length
        start = torch.arange(index.shape[0], device=index.device)[:, None] * length
        index_R, used_R = (index + start).reshape(-1), used.reshape(-1)
    else:
        index_R, used_R = index, index < target_N.shape[0]
    if index_R.shape[0]:
        spare = torch.where(used_R, index_R, target_N.shape[0] - 1).amin()
        index_R = torch.where(used_R, index_R, spare)
    target_R = target_N.index_select(0, index_R).long()
    return _labelled(
        index_R, target_R, used_R, selection.weights.reshape(-1), n_classes, ignore_index
    )


def every_row(targets: Tensor, n_classes: int, ignore_index: int) -> SelectedRows:
    """All rows with weight 1: the dense loss in the terms of :func:`selected_rows`."""
    target_N = targets.reshape(-1).long()
    index_N = torch.arange(target_N.shape[0], device=targets.device)
    one_N = torch.ones_like(target_N, dtype=torch.float32)
    return _labelled(index_N, target_N, target_N == target_N, one_N, n_classes, ignore_index)


def _labelled(
    index_R: Tensor,
    target_R: Tensor,
    used_R: Tensor,
    weight_R: Tensor,
    n_classes: int,
    ignore_index: int,
) -> SelectedRows:
    known_R = (target_R >= 0) & (target_R < n_classes) & (target_R != ignore_index)
    wrong_R = used_R & ~known_R & (target_R != ignore_index)
    label_R = torch.where(used_R & known_R, target_R, ignore_index)
    # A label out of range would be read out of bounds; it is ignored, and the loss is NaN instead.
    fault = torch.where(wrong_R, torch.nan, 0.0).sum()
    return SelectedRows(index_R, label_R, torch.where(used_R, weight_R, 0.0), fault)


def weighted_cross_entropy(
    logits_RV: Tensor, rows: SelectedRows, ignore_index: int, *, weighted: bool
) -> Tensor:
    """``Σ w nll`` over rows, where `weighted` says whether any w of a used row differs from 1."""
    if not weighted:
        # torch's own sum: at ratio 1 the result is the dense loss to the last bit.
        return F.cross_entropy(logits_RV, rows.label_R, ignore_index=ignore_index, reduction="sum")
    nll_R = F.cross_entropy(logits_RV, rows.label_R, ignore_index=ignore_index, reduction="none")
    return (rows.weight_R.to(nll_R.dtype) * nll_R).sum()


def reduce_loss(
    weighted_sum: Tensor,
    count: Tensor,
    n_eligible: Tensor,
    weighted: bool,
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor:
    """Divide ``Σ w nll`` by what makes it a mean.

    Args:
        weighted_sum: Scalar.
        count: Selected tokens.
        n_eligible: Eligible tokens of the batch.
        weighted: The weights make the sum an estimate over all eligible tokens.
        reduction: ``"sum"`` leaves it; ``"mean"`` divides by `n_eligible` if weighted, else by
            `count`.
        num_items: M of gradient accumulation: ``mean n_eligible / M``.
    """
    if num_items is not None:
        if reduction == "sum":
            raise ValueError("num_items_in_batch needs reduction='mean', got reduction='sum'.")
        if not isinstance(num_items, Tensor) and not num_items > 0:
            raise ValueError(f"num_items_in_batch must be positive, got {num_items}.")
        if weighted:
            return weighted_sum / num_items
        share = n_eligible.to(weighted_sum.dtype) / count.clamp(min=1).to(weighted_sum.dtype)
        return weighted_sum * share / num_items
    if reduction == "sum":
        return weighted_sum
    return weighted_sum / (n_eligible if weighted else count).clamp(min=1).to(weighted_sum.dtype)
