"""The spec on tensors: statistics, difficulty, selection.

Shapes: ``N`` tokens (any leading shape ``...``, flattened row-major), ``D`` hidden size, ``V``
classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from cggr import spec
from cggr.spec import RoutingConfig, Selection, TokenStatistics
from cggr.spec.config import check_head
from cggr.torch import dispatch
from cggr.torch.vocabulary import local_head, local_logits, on_shard


def token_statistics(
    logits: Tensor, targets: Tensor | None = None, *, ignore_index: int = -100
) -> TokenStatistics:
    """Loss, entropy, confidence, margin and error norm of every token, without gradient.

    The equations are those of :func:`cggr.spec.statistics.token_statistics`. Temporary memory is
    bounded: rows are processed in chunks.

    Args:
        logits: ``(..., V)``, any floating dtype; the arithmetic is float32 (float64 for float64). A
            DTensor that is sharded over its classes stays so, and every process has the result.
        targets: ``(...)``, integers in ``[0, V)`` or `ignore_index`, aligned with the logits.
        ignore_index: Target whose nll and error_norm are 0.

    Returns:
        :class:`TokenStatistics` of float32 (float64) tensors ``(...)``; nll and error_norm are
        None without targets.

    Raises:
        TypeError: `logits` is not floating or `targets` is not integer.
        ValueError: The shapes disagree, or, on the CPU in eager mode, a target is out of range.
            Elsewhere, where a check would synchronise, its nll and error_norm are NaN.

    Example:
        >>> statistics = token_statistics(torch.tensor([[2.0, 2.0, -torch.inf]]), torch.tensor([0]))
        >>> statistics.nll.item() == statistics.entropy.item() == torch.tensor(2.0).log().item()
        True
        >>> statistics.margin.item()
        0.0
    """
    logits, shard = local_logits(logits)
    check_logits(logits)
    if targets is not None:
        n_classes = logits.shape[-1] if shard is None else shard.n_classes
        targets = checked_targets(targets, logits.shape[:-1], n_classes, ignore_index)
    operations = on_shard(dispatch.implementation(logits), shard)
    return operations.token_statistics(logits, targets, ignore_index).statistics


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    vocab_parallel: str | int | None = None,
) -> TokenStatistics:
    """:func:`token_statistics` of a linear head's logits, which are never all in memory.

    ``logits = softcap tanh(logit_scale (hidden weight^T + bias) / softcap)``

    Args:
        hidden: ``(..., D)``, floating.
        weight: ``(V, D)``, of hidden's dtype.
        targets: ``(...)``, integers in ``[0, V)`` or `ignore_index`.
        bias: ``(V,)``.
        logit_scale: Factor of the logits, before the soft-cap.
        softcap: Soft-cap of the logits, > 0; none when None.
        ignore_index: Target whose nll and error_norm are 0.
        vocab_parallel: As in :class:`~cggr.torch.CGGRLinearLoss`, of a weight that is a DTensor.

    Returns:
        :class:`TokenStatistics` of float32 (float64) tensors ``(...)``.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes disagree, or, on the CPU in eager mode, a target is out of range.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> direct = token_statistics(hidden @ weight.T)
        >>> torch.equal(linear_token_statistics(hidden, weight).entropy, direct.entropy)
        True
    """
    hidden, weight, bias, shard = local_head(hidden, weight, bias, vocab_parallel)
    check_linear(hidden, weight, bias, logit_scale, softcap)
    if targets is not None:
        n_classes = weight.shape[0] if shard is None else shard.n_classes
        targets = checked_targets(targets, hidden.shape[:-1], n_classes, ignore_index)
    hidden, weight, bias = in_autocast_dtype(hidden, weight, bias)
    scored = on_shard(dispatch.implementation(hidden), shard).linear_token_statistics(
        hidden, weight, bias, targets, ignore_index, logit_scale, softcap
    )
    return scored.statistics


def token_difficulty(
    statistics: TokenStatistics,
    scoring: str | Callable[[TokenStatistics], Tensor] = "combined",
    *,
    reference_nll: Tensor | None = None,
) -> Tensor:
    """Difficulty of every token, higher is harder: :func:`cggr.spec.scoring.token_difficulty`.

    Example:
        >>> statistics = token_statistics(torch.tensor([[0.0, 0.0]]))
        >>> token_difficulty(statistics, "margin")
        tensor([1.])
    """
    return spec.token_difficulty(statistics, scoring, reference_nll=reference_nll, xp=xp)


def select_tokens(
    difficulty: Tensor,
    config: RoutingConfig,
    *,
    step: int | Tensor = 0,
    draw: int | Tensor | None = None,
    rank: int | Tensor = 0,
    eligible: Tensor | None = None,
    confidence: Tensor | None = None,
    capacity: int | None = None,
) -> Selection:
    """The tokens to learn from: :func:`cggr.spec.selection.select_tokens`.

    With ``capacity=None`` the host reads the number of selected tokens: one synchronisation. With
    a capacity nothing synchronises, and the call traces under ``torch.compile(fullgraph=True)``.

    Example:
        >>> options = {"min_tokens_ratio": 0.5, "warmup_steps": 0, "dynamic_threshold": False}
        >>> config = RoutingConfig(selection="topk", **options)
        >>> select_tokens(torch.tensor([[0.5, 3.0, 1.0, 2.0]]), config).mask
        tensor([[False,  True, False,  True]])
    """
    with torch.no_grad():
        return spec.select_tokens(
            difficulty,
            config,
            step=step,
            draw=draw,
            rank=rank,
            eligible=eligible,
            confidence=confidence,
            capacity=capacity,
            xp=xp,
        )


def aligned_targets(
    labels: Tensor, attention_mask: Tensor | None, *, shift: bool, ignore_index: int
) -> Tensor:
    """Target of every position, `ignore_index` where there is none.

    Args:
        labels: ``(B, S)``, Hugging Face style.
        attention_mask: ``(B, S)``, 0 on padding; a mask of another rank says nothing about
            padding and is not used here.
        shift: Position t is trained on label t + 1 (causal models) instead of label t.
        ignore_index: Label of positions that are not trained on.

    Returns:
        int64 ``(B, S)``. With `shift` the last position has no target. Neither a
        padding position nor a padding label is trained on.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}.")
    if labels.dim() != 2 or labels.shape[0] == 0:
        raise ValueError(f"labels must have shape (B, S) with B >= 1, got {tuple(labels.shape)}.")
    labels = _as_int64("labels", labels)
    padding = padding_of(attention_mask, labels.shape)
    if padding is not None:
        labels = labels.masked_fill(padding, ignore_index)
    if shift:
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    return labels if padding is None else labels.masked_fill(padding, ignore_index)


def padding_of(attention_mask: Any, shape: Any) -> Tensor | None:
    """Where a ``(B, S)`` attention mask has padding; None for a mask of another kind."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have shape {tuple(shape)}, got {tuple(attention_mask.shape)}."
        )
    return attention_mask == 0


def check_logits(logits: Tensor) -> None:
    """Refuse logits that are not ``(..., V)`` floating with V of at least 1."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, got {logits.dtype}.")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}.")


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Refuse what makes no linear head."""
    check_head(logit_scale, softcap)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}.")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden must have shape (..., D) and weight (V, D), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if autocast_dtype(hidden) is None:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise TypeError(
                    f"{name} must have hidden's dtype {hidden.dtype}, got {tensor.dtype}."
                )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}.")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision that autocast gives a product of `x`, None where it leaves it alone."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def in_autocast_dtype(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A head in the precision that autocast, where it is on, gives torch's own linear."""
    dtype = autocast_dtype(hidden)
    if dtype is None:
        return hidden, weight, bias
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def checked_targets(
    targets: Tensor,
    shape: Any,
    n_classes: int,
    ignore_index: int,
    *,
    name: str = "targets",
    shifted: bool = False,
) -> Tensor:
    """Targets as int64; refused if of another shape or kind, or, where looking is free, range.

    `name` is what the user calls them, and `shifted` says that target t was label t + 1.
    """
    targets = _as_int64("targets", targets)
    if targets.shape != shape:
        raise ValueError(
            f"targets must have the logits' leading shape {tuple(shape)}, "
            f"got {tuple(targets.shape)}."
        )
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((targets < 0) | (targets >= n_classes)) & (targets != ignore_index)
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            value = targets[tuple(where)].item()
            where[-1] += shifted
            raise ValueError(
                f"{name} must be in [0, {n_classes}) or ignore_index={ignore_index}, "
                f"got {value} at position {tuple(where)}."
            )
    return targets


def _as_int64(name: str, x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}.")
    return x.long()  # comparisons with ignore_index would wrap around in a narrow type
