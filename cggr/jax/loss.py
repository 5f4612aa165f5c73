"""Losses whose backward pass sees the selected tokens only.

Pure functions in the manner of optax, for any JAX code, and nnx modules that keep the counters.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``; ``D`` hidden size, ``V`` classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cggr.jax import dispatch
from cggr.jax.functional import (
    checked_linear,
    checked_logits,
    checked_targets,
    linear_token_statistics,
    select_tokens,
    token_difficulty,
    token_statistics,
)
from cggr.jax.routing import RoutedModule, selection_metrics
from cggr.jax.selected import (
    SelectedRows,
    check_reduction,
    every_row,
    reduce_loss,
    selected_rows,
)
from cggr.spec import RoutingConfig, TokenStatistics
from cggr.spec.config import check_config, check_head


def cggr_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    config: RoutingConfig,
    *,
    step: int | Array,
    draw: int | Array | None = None,
    rank: int | Array = 0,
    capacity: int | None = None,
    reference_nll: ArrayLike | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the selected tokens, and what was selected.

    ``mean nll over the selected tokens``; with ``selection="importance"``
    ``Σ w nll / n_eligible``, an unbiased estimate of the mean over all. Row t of the logits is
    scored against target t.

    Under jit, `config` and `capacity` are static. The capacity comes from the step that the host
    knows and takes at most four values over a run, so a training step compiles at most four times::

        train_step(state, batch, capacity=config.capacity(step, batch_size, length))

    Args:
        logits: ``(B, S, V)`` or ``(N, V)``, floating.
        targets: ``(B, S)`` or ``(N,)``, integers in ``[0, V)`` or ``config.ignore_index``.
        config: The routing options.
        step: Optimizer step, an int32 array, or a Python int outside jit.
        draw: Number of the training forward, for the sampling rules, of which another number is
            another sample: to be given where a step has several micro-batches. `step` when None.
        rank: Number of the shard inside shard_map, ``jax.lax.axis_index("data")``.
        capacity: Slots of the selection, a Python int. None takes it from `step`, which then must
            be a Python int.
        reference_nll: Losses of a reference model, of targets' shape, for
            ``scoring="excess_loss"``.
        reduction: ``"mean"`` as above, or ``"sum"`` for its numerator.
        num_items_in_batch: Eligible tokens M of all micro-batches of this optimizer step: the
            loss becomes ``mean n_eligible / M``, so that micro-batches add up.

    Returns:
        The loss, a scalar, float32 (float64 for float64 logits); and metrics, scalars on the
        device: step, token_ratio (asked for), tokens_selected, tokens_total (eligible tokens),
        avg_confidence, avg_entropy, avg_difficulty (means over eligible tokens), loss_sum and
        denominator, of which losses over shards or micro-batches are made: ``Σ loss_sum / Σ
        denominator``.

    Raises:
        TypeError: A dtype is wrong, or `capacity` is None and `step` an array.
        ValueError: Shapes disagree, or, on the CPU outside jit, a target is out of range
            (elsewhere such a target makes the loss NaN, if it is selected).

    Example:
        >>> config = RoutingConfig(selection="stratified", min_tokens_ratio=0.25, warmup_steps=0)
        >>> logits, targets = jnp.zeros((2, 8, 100)), jnp.zeros((2, 8), jnp.int32)
        >>> loss, metrics = cggr_loss(logits, targets, config, step=0)
        >>> round(loss.item(), 4), metrics["tokens_selected"].item()
        (4.6052, 4)
    """
    logits, targets = _checked(logits, targets, config)
    statistics = token_statistics(logits, targets, ignore_index=config.ignore_index)
    rows, metrics = _select(statistics, targets, config, step, draw, rank, capacity, reference_nll)
    return _reduced(_logits_sum(logits, rows), rows, metrics, reduction, num_items_in_batch)


def cggr_linear_loss(
    hidden: ArrayLike,
    weight: ArrayLike,
    targets: ArrayLike,
    config: RoutingConfig,
    *,
    step: int | Array,
    draw: int | Array | None = None,
    rank: int | Array = 0,
    capacity: int | None = None,
    bias: ArrayLike | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reference_nll: ArrayLike | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """:func:`cggr_loss` of a linear head, without logits in memory.

    ``cggr_loss(softcap tanh(logit_scale (hidden weight^T + bias) / softcap), targets, ...)``

    All rows are scored in chunks without gradient; only the selected rows enter the head's forward
    with gradient and its backward. Neither pass holds more than one chunk of logits.

    Args:
        hidden: ``(B, S, D)`` or ``(N, D)``, floating.
        weight: ``(V, D)``, of hidden's dtype: an embedding that is tied to the head as it is, the
            transpose of an ``nnx.Linear`` kernel.
        targets: ``(B, S)`` or ``(N,)``, integers in ``[0, V)`` or ``config.ignore_index``.
        config: The routing options.
        step: As in :func:`cggr_loss`, like all arguments that are not listed here.
        draw: As in :func:`cggr_loss`.
        rank: As in :func:`cggr_loss`.
        capacity: As in :func:`cggr_loss`.
        bias: ``(V,)``.
        logit_scale: Factor of the logits, before the soft-cap; a Python number.
        softcap: Soft-cap of the logits, > 0, a Python number; none when None.
        reference_nll: As in :func:`cggr_loss`.
        reduction: As in :func:`cggr_loss`.
        num_items_in_batch: As in :func:`cggr_loss`.

    Returns:
        Loss and metrics, as :func:`cggr_loss` does. Only reverse-mode differentiation is defined.

    Raises:
        TypeError: A dtype is wrong, or `capacity` is None and `step` an array.
        ValueError: Shapes disagree, or, on the CPU outside jit, a target is out of range.

    Example:
        >>> config = RoutingConfig(selection="stratified", warmup_steps=0)
        >>> hidden, weight = jnp.zeros((2, 8, 16)), jnp.zeros((100, 16))
        >>> targets = jnp.zeros((2, 8), jnp.int32)
        >>> def loss(weight):
        ...     return cggr_linear_loss(hidden, weight, targets, config, step=0)
        >>> (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(weight)
        >>> round(value.item(), 4), gradient.shape
        (4.6052, (100, 16))
    """
    hidden, weight, bias, targets = _checked_head(
        hidden, weight, bias, targets, config, logit_scale, softcap
    )
    statistics = linear_token_statistics(
        hidden,
        weight,
        targets,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=config.ignore_index,
    )
    rows, metrics = _select(statistics, targets, config, step, draw, rank, capacity, reference_nll)
    total = _linear_sum(hidden, weight, bias, rows, logit_scale, softcap)
    return _reduced(total, rows, metrics, reduction, num_items_in_batch)


class _SelectiveLoss(RoutedModule):
    """What both losses share: the reduction."""

    def __init__(
        self, config: RoutingConfig | None = None, *, reduction: str = "mean", **options: Any
    ) -> None:
        super().__init__(config, **options)
        check_reduction(reduction)
        self.reduction = reduction


class CGGRLoss(_SelectiveLoss):
    """:func:`cggr_loss` as an nnx module, which counts steps and draws and knows its capacity.

    After ``eval()``, the mean over all tokens.

    ``selection="topk"``, the default of cggr 0.5.0, trains on another gradient than the dense
    loss's, and lost to random selection by the default score.

    Args:
        config: The routing options; or give the fields of :class:`RoutingConfig` as keywords.
        reduction: ``"mean"``, or ``"sum"`` for its numerator.
        **options: Fields of :class:`RoutingConfig`.

    Example:
        >>> from flax import nnx
        >>> criterion = CGGRLoss(selection="stratified", min_tokens_ratio=0.25, warmup_steps=0)
        >>> head = nnx.Linear(16, 100, rngs=nnx.Rngs(0))
        >>> hidden, targets = jnp.ones((2, 8, 16)), jnp.zeros((2, 8), jnp.int32)
        >>> def loss_fn(head, criterion):  # an argument, since it counts the draw
        ...     return criterion(head(hidden), targets)
        >>> loss, gradient = nnx.value_and_grad(loss_fn)(head, criterion)
        >>> criterion.step()  # after optimizer.update(), outside jit
        >>> criterion.get_metrics()["tokens_selected"]
        4
    """

    def __call__(
        self,
        logits: ArrayLike,
        targets: ArrayLike,
        *,
        rank: int | Array = 0,
        reference_nll: ArrayLike | None = None,
        num_items_in_batch: int | Array | None = None,
    ) -> Array:
        """Loss of the tokens worth learning from.

        Args:
            logits: ``(B, S, V)`` or ``(N, V)``, floating.
            targets: ``(B, S)`` or ``(N,)``, integers in ``[0, V)`` or `ignore_index`.
            rank: As in :func:`cggr_loss`, like the following.
            reference_nll: As in :func:`cggr_loss`.
            num_items_in_batch: As in :func:`cggr_loss`.

        Returns:
            Scalar, float32 (float64 for float64 logits).
        """
        if self.deterministic:
            logits, targets = _checked(logits, targets, self.config)
            rows = every_row(targets, self.config.ignore_index)
            total = _logits_sum(logits, rows)
            return reduce_loss(total, rows, rows.n_selected, self.reduction, num_items_in_batch)[0]
        loss, metrics = cggr_loss(
            logits,
            targets,
            self.config,
            step=self.step_count[...],
            draw=self._next_draw(),
            rank=rank,
            capacity=self._slots(jnp.shape(targets)),
            reference_nll=reference_nll,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
        )
        self._record(metrics)
        return loss


class CGGRLinearLoss(_SelectiveLoss):
    """:func:`cggr_linear_loss` as an nnx module: :class:`CGGRLoss` without logits in memory.

    Args:
        config: The routing options; or give the fields of :class:`RoutingConfig` as keywords.
        reduction: ``"mean"``, or ``"sum"`` for its numerator.
        logit_scale: Factor of the logits, before the soft-cap.
        softcap: Soft-cap of the logits, > 0; none when None.
        **options: Fields of :class:`RoutingConfig`.

    Example:
        >>> from flax import nnx
        >>> criterion = CGGRLinearLoss(selection="stratified", warmup_steps=0)
        >>> head = nnx.Linear(16, 100, use_bias=False, rngs=nnx.Rngs(0))
        >>> hidden, targets = jnp.ones((2, 8, 16)), jnp.zeros((2, 8), jnp.int32)
        >>> def loss_fn(head, criterion):
        ...     return criterion(hidden, head.kernel.T, targets)
        >>> loss, gradient = nnx.value_and_grad(loss_fn)(head, criterion)
        >>> gradient["kernel"].shape
        (16, 100)
    """

    def __init__(
        self,
        config: RoutingConfig | None = None,
        *,
        reduction: str = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, reduction=reduction, **options)
        check_head(logit_scale, softcap)
        self.logit_scale = logit_scale
        self.softcap = softcap

    def __call__(
        self,
        hidden: ArrayLike,
        weight: ArrayLike,
        targets: ArrayLike,
        *,
        bias: ArrayLike | None = None,
        rank: int | Array = 0,
        reference_nll: ArrayLike | None = None,
        num_items_in_batch: int | Array | None = None,
    ) -> Array:
        """Loss of the tokens worth learning from.

        Args:
            hidden: ``(B, S, D)`` or ``(N, D)``, floating.
            weight: ``(V, D)``.
            targets: ``(B, S)`` or ``(N,)``, integers in ``[0, V)`` or `ignore_index`.
            bias: ``(V,)``.
            rank: As in :func:`cggr_loss`, like the following.
            reference_nll: As in :func:`cggr_loss`.
            num_items_in_batch: As in :func:`cggr_loss`.

        Returns:
            Scalar, float32 (float64 for float64 inputs).
        """
        if self.deterministic:
            hidden, weight, bias, targets = _checked_head(
                hidden, weight, bias, targets, self.config, self.logit_scale, self.softcap
            )
            rows = every_row(targets, self.config.ignore_index)
            total = _linear_sum(hidden, weight, bias, rows, self.logit_scale, self.softcap)
            return reduce_loss(total, rows, rows.n_selected, self.reduction, num_items_in_batch)[0]
        loss, metrics = cggr_linear_loss(
            hidden,
            weight,
            targets,
            self.config,
            step=self.step_count[...],
            draw=self._next_draw(),
            rank=rank,
            capacity=self._slots(jnp.shape(targets)),
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            reference_nll=reference_nll,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
        )
        self._record(metrics)
        return loss


def _checked(logits: ArrayLike, targets: ArrayLike, config: RoutingConfig) -> tuple[Array, Array]:
    check_config(config)
    logits = checked_logits(logits)
    if logits.ndim not in (2, 3):
        raise ValueError(f"logits must have shape (B, S, V) or (N, V), got {logits.shape}.")
    shape, n_classes = logits.shape[:-1], logits.shape[-1]
    return logits, checked_targets(targets, shape, n_classes, config.ignore_index)


def _checked_head(
    hidden: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    targets: ArrayLike,
    config: RoutingConfig,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Array, Array, Array | None, Array]:
    check_config(config)
    hidden, weight, bias = checked_linear(hidden, weight, bias, logit_scale, softcap)
    if hidden.ndim not in (2, 3):
        raise ValueError(f"hidden must have shape (B, S, D) or (N, D), got {hidden.shape}.")
    shape, n_classes = hidden.shape[:-1], weight.shape[0]
    return hidden, weight, bias, checked_targets(targets, shape, n_classes, config.ignore_index)


def _select(
    statistics: TokenStatistics,
    targets: Array,
    config: RoutingConfig,
    step: int | Array,
    draw: int | Array | None,
    rank: int | Array,
    capacity: int | None,
    reference_nll: ArrayLike | None,
) -> tuple[SelectedRows, dict[str, Array]]:
    """The rows to train on, and the metrics of the selection."""
    eligible = targets != config.ignore_index
    difficulty = token_difficulty(statistics, config.scoring, reference_nll=reference_nll)
    difficulty = jax.lax.stop_gradient(difficulty)
    selection = select_tokens(
        difficulty,
        config,
        step=step,
        draw=draw,
        rank=rank,
        eligible=eligible,
        confidence=statistics.confidence,
        capacity=capacity,
    )
    rows = selected_rows(selection, targets, config)
    metrics = selection_metrics(
        step=step,
        ratio=selection.ratio,
        tokens_selected=rows.n_selected,
        eligible=eligible,
        confidence=statistics.confidence,
        entropy=statistics.entropy,
        difficulty=difficulty,
    )
    return rows, metrics


def _logits_sum(logits: Array, rows: SelectedRows) -> Array:
    return dispatch.weighted_nll_sum(rows.take(logits), rows.label_R, rows.weight_R)


def _linear_sum(
    hidden: Array,
    weight: Array,
    bias: Array | None,
    rows: SelectedRows,
    logit_scale: float,
    softcap: float | None,
) -> Array:
    return dispatch.linear_weighted_nll_sum(
        rows.take(hidden), weight, bias, rows.label_R, rows.weight_R, logit_scale, softcap
    )


def _reduced(
    total: Array,
    rows: SelectedRows,
    metrics: dict[str, Array],
    reduction: str,
    num_items: int | Array | None,
) -> tuple[Array, dict[str, Array]]:
    n_eligible = metrics["tokens_total"]
    loss, denominator = reduce_loss(total, rows, n_eligible, reduction, num_items)
    loss_sum = jax.lax.stop_gradient(total)
    return loss, metrics | {"loss_sum": loss_sum, "denominator": denominator}
