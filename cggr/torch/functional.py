"""The spec on tensors: statistics in row chunks, difficulty, selection.

Shapes: ``N`` tokens (any leading shape ``...``, flattened row-major), ``D`` hidden size, ``V``
classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from cggr import spec
from cggr.spec import RoutingConfig, Selection, TokenStatistics

# How many logits are worked on at a time. A head's product wants many rows; on the CPU, what
# follows it wants them to stay in the cache. An accelerator wants few launches.
_CPU_PRODUCT, _CPU_CACHE = 1 << 20, 1 << 18
_ACCELERATOR = 1 << 26


def token_statistics(
    logits: Tensor, targets: Tensor | None = None, *, ignore_index: int = -100
) -> TokenStatistics:
    """Loss, entropy, confidence, margin and error norm of every token, without gradient.

    The equations are those of :func:`cggr.spec.statistics.token_statistics`. Temporary memory is
    bounded: rows are processed in chunks.

    Args:
        logits: ``(..., V)``, any floating dtype; the arithmetic is float32 (float64 for float64).
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
    check_logits(logits)
    if targets is not None:
        targets = checked_targets(targets, logits.shape[:-1], logits.shape[-1], ignore_index)
    return chunked_statistics(logits, lambda rows: rows, logits.shape[-1], targets, ignore_index)


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
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
    check_linear(hidden, weight, bias, softcap)
    n_classes = weight.shape[0]
    if targets is not None:
        targets = checked_targets(targets, hidden.shape[:-1], n_classes, ignore_index)

    def project(rows: Tensor) -> Tensor:
        return linear_logits(rows, weight, bias, logit_scale, softcap)

    return chunked_statistics(hidden, project, n_classes, targets, ignore_index)


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
    draw: int | Tensor = 0,
    rank: int | Tensor = 0,
    eligible: Tensor | None = None,
    confidence: Tensor | None = None,
    capacity: int | None = None,
) -> Selection:
    """The tokens to learn from: :func:`cggr.spec.selection.select_tokens`.

    With ``capacity=None`` the host reads the number of selected tokens: one synchronisation. With
    a capacity nothing synchronises, and the call traces under ``torch.compile(fullgraph=True)``.

    Example:
        >>> config = RoutingConfig(min_tokens_ratio=0.5, warmup_steps=0, dynamic_threshold=False)
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
) -> TokenStatistics:
    """Statistics of ``project(rows)``, computed for a bounded number of rows at a time.

    Args:
        rows: ``(..., D)``.
        project: ``(n, D) -> (n, V)`` logits.
        n_classes: V.
        targets: ``(...)`` or None.
        ignore_index: Target that is not scored.
    """
    shape = rows.shape[:-1]
    rows_ND = rows.detach().reshape(-1, rows.shape[-1])
    targets_N = None if targets is None else targets.reshape(-1)
    n_rows = rows_ND.shape[0]
    columns: list[Tensor | None] = []
    with torch.no_grad():
        for part in row_chunks(n_rows, n_classes, rows.device):
            logits = project(rows_ND[part])
            for inner in row_chunks(logits.shape[0], n_classes, rows.device, cached=True):
                some = slice(part.start + inner.start, part.start + inner.stop)
                chunk = spec.token_statistics(
                    logits[inner],
                    None if targets_N is None else targets_N[some],
                    ignore_index=ignore_index,
                    xp=xp,
                )
                # One allocation up front: small results kept between large temporaries would
                # fragment the CPU's heap to many times its need.
                columns = columns or [None if x is None else x.new_empty(n_rows) for x in chunk]
                for column, value in zip(columns, chunk, strict=True):
                    if column is not None:
                        column[some] = value
    return TokenStatistics(*(None if x is None else x.reshape(shape) for x in columns))


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


def check_logits(logits: Tensor) -> None:
    """Refuse logits that are not ``(..., V)`` floating with V of at least 1."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, got {logits.dtype}.")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}.")


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    """Refuse a hidden state, weight, bias or soft-cap that make no linear head."""
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
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite or None, got {softcap}.")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision that autocast gives a product of `x`, None where it leaves it alone."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


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
