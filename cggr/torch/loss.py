"""Losses whose backward pass sees the selected tokens only.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``; ``R`` selected rows; ``D`` hidden size, ``V``
classes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from cggr.spec import RoutingConfig, TokenStatistics
from cggr.spec.schedule import ONE
from cggr.torch.dispatch import implementation
from cggr.torch.functional import (
    check_linear,
    check_logits,
    checked_targets,
    in_autocast_dtype,
    select_tokens,
    token_difficulty,
)
from cggr.torch.routing import RoutedModule, process_rank
from cggr.torch.selected import SelectedRows, every_row, reduce_loss, selected_rows
from cggr.torch.vocabulary import (
    VocabularyShard,
    local_head,
    local_logits,
    on_shard,
)


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
        self,
        statistics: TokenStatistics,
        targets: Tensor,
        reference_nll: Tensor | None,
        n_classes: int,
        shard: VocabularyShard | None,
    ) -> SelectedRows:
        config = self.config
        self.follow(targets.device)
        eligible = targets != config.ignore_index
        difficulty = token_difficulty(statistics, config.scoring, reference_nll=reference_nll)
        difficulty = difficulty.detach()
        draw = self.next_draw()
        if self.selects_all:
            ratio = torch.full((1,), ONE, dtype=torch.int32, device=targets.device)
            rows = every_row(targets, n_classes, config.ignore_index)
        else:
            batch, length = targets.shape if targets.dim() == 2 else (1, targets.shape[0])
            selection = select_tokens(
                difficulty,
                config,
                step=self.step_count,
                draw=draw,
                rank=process_rank(None if shard is None else shard.group),
                eligible=eligible,
                confidence=statistics.confidence,
                capacity=self.slots(batch, length),
            )
            ratio = selection.ratio
            rows = selected_rows(
                selection,
                targets,
                n_classes,
                config.ignore_index,
                weighted=config.selection == "importance",
                padded=self.capacity == "static" or config.scope == "sequence",
            )
        self.record(
            ratio=ratio,
            tokens_selected=rows.n_selected,
            eligible=eligible,
            confidence=statistics.confidence,
            entropy=statistics.entropy,
            difficulty=difficulty,
        )
        return rows


def _without_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    if device == "meta":  # which has no autocast to switch off
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


class CGGRLoss(_SelectiveLoss):
    """Cross-entropy of the selected tokens.

    ``mean nll over the selected tokens``; with ``selection="importance"``
    ``Σ w nll / n_eligible``, an unbiased estimate of the mean over all. In eval mode, the mean
    over all. Logits and targets are aligned: row t is scored against target t.

    ``selection="topk"``, the default of cggr 0.5.0, trains on another gradient than the dense
    loss's, and lost to random selection by the default score.

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
        (4.6052, 4)
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
            logits: ``(B, S, V)`` or ``(N, V)``, floating. A DTensor that is sharded over its
                classes (as of tensor parallelism's ``ColwiseParallel``) stays so: the processes
                must have the same tokens, and have the same loss.
            targets: ``(B, S)`` or ``(N,)``, integers in ``[0, V)`` or `ignore_index`.
            reference_nll: Losses of a reference model, of targets' shape, for
                ``scoring="excess_loss"``.
            num_items_in_batch: Eligible tokens M of all micro-batches of this optimizer step: the
                loss becomes ``mean n_eligible / M``, so that micro-batches add up.

        Returns:
            Scalar, float32 (float64 for float64 logits); a zero connected to the graph when
            nothing is eligible. By the Triton kernels its gradient can be taken once, and not by
            ``torch.func``.

        Raises:
            TypeError: A dtype is wrong.
            ValueError: Shapes disagree, or, on the CPU in eager mode, a target is out of range
                (elsewhere such a target makes the loss NaN).
        """
        logits, shard = local_logits(logits)
        check_logits(logits)
        if shard is not None and self.base_loss is not None:
            raise ValueError("base_loss needs logits of all classes, got a DTensor of a part.")
        if logits.dim() not in (2, 3):
            raise ValueError(
                f"logits must have shape (B, S, V) or (N, V), got {tuple(logits.shape)}."
            )
        ignore_index = self.config.ignore_index
        n_classes = logits.shape[-1] if shard is None else shard.n_classes
        targets = checked_targets(targets, logits.shape[:-1], n_classes, ignore_index)
        logits_NV = logits.reshape(-1, logits.shape[-1])
        logits = logits_NV.reshape(logits.shape)  # of a slice, the copy that the gradient needs
        operations, scored = on_shard(implementation(logits), shard), None
        if self.training:
            scored = operations.token_statistics(logits, targets, ignore_index)
            rows = self._select(scored.statistics, targets, reference_nll, n_classes, shard)
        else:
            rows = every_row(targets, n_classes, ignore_index)
        if self.base_loss is None:
            total = operations.cross_entropy_sum(logits_NV, rows, ignore_index, scored)
        else:
            total = self._base_loss_sum(rows.take(logits_NV), rows)
        n_eligible = (targets != ignore_index).sum()
        return reduce_loss(total, rows, n_eligible, self.reduction, num_items_in_batch)

    def _base_loss_sum(self, logits_RV: Tensor, rows: SelectedRows) -> Tensor:
        loss_R = self.base_loss(logits_RV, rows.label_R)  # type: ignore[misc]
        if loss_R.shape != rows.label_R.shape:
            raise ValueError(
                f"base_loss must return one loss per token, shape {tuple(rows.label_R.shape)}, "
                f"got {tuple(loss_R.shape)}; use reduction='none'."
            )
        if rows.weight_R is not None:
            loss_R = loss_R * rows.weight_R.to(loss_R.dtype)
        return loss_R.sum() + rows.fault


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
        vocab_parallel: Of a weight that is a DTensor, the mesh dimension, by name or number, over
            which its classes are sharded while the tokens are the same: each process computes its
            classes, all have the same loss, and hidden's gradient is summed over them. Without,
            each process has tokens of its own: the weight is gathered in hidden's dtype, and its
            gradient averaged over the processes, as FSDP does.
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
        vocab_parallel: str | int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, capacity=capacity, reduction=reduction, **options)
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.vocab_parallel = vocab_parallel

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
            weight: ``(V, D)``; a DTensor is taken as `vocab_parallel` says.
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
        hidden, weight, bias, shard = local_head(hidden, weight, bias, self.vocab_parallel)
        check_linear(hidden, weight, bias, self.logit_scale, self.softcap)
        if hidden.dim() not in (2, 3):
            raise ValueError(
                f"hidden must have shape (B, S, D) or (N, D), got {tuple(hidden.shape)}."
            )
        ignore_index = self.config.ignore_index
        n_classes = weight.shape[0] if shard is None else shard.n_classes
        targets = checked_targets(targets, hidden.shape[:-1], n_classes, ignore_index)
        hidden, weight, bias = in_autocast_dtype(hidden, weight, bias)
        with _without_autocast(hidden.device.type):
            operations, scored = on_shard(implementation(hidden), shard), None
            head = (self.logit_scale, self.softcap)
            if self.training:
                scored = operations.linear_token_statistics(
                    hidden, weight, bias, targets, ignore_index, *head
                )
                rows = self._select(scored.statistics, targets, reference_nll, n_classes, shard)
            else:
                rows = every_row(targets, n_classes, ignore_index)
            hidden_ND = hidden.reshape(-1, hidden.shape[-1])
            total = operations.linear_cross_entropy_sum(
                hidden_ND, weight, bias, rows, ignore_index, *head, scored
            )
            n_eligible = (targets != ignore_index).sum()
            return reduce_loss(total, rows, n_eligible, self.reduction, num_items_in_batch)
