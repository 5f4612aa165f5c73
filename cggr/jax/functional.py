"""The spec on JAX arrays: statistics, difficulty, selection.

Every function traces under ``jax.jit``. Shapes: ``B`` sequences of ``S`` tokens, ``N`` tokens (any
leading shape ``...``, flattened row-major), ``D`` hidden size, ``V`` classes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from cggr import spec
from cggr.jax import dispatch
from cggr.spec import RoutingConfig, Selection, TokenStatistics, schedule, selection
from cggr.spec.config import check_head


def token_statistics(
    logits: ArrayLike, targets: ArrayLike | None = None, *, ignore_index: int = -100
) -> TokenStatistics:
    """Loss, entropy, confidence, margin and error norm of every token, without gradient.

    The equations are those of :func:`cggr.spec.statistics.token_statistics`.

    Args:
        logits: ``(..., V)``, any floating dtype; the arithmetic is float32 (float64 for float64).
        targets: ``(...)``, integers in ``[0, V)`` or `ignore_index`, aligned with the logits.
        ignore_index: Target whose nll and error_norm are 0.

    Returns:
        :class:`TokenStatistics` of float32 (float64) arrays ``(...)``; nll and error_norm are None
        without targets.

    Raises:
        TypeError: `logits` is not floating or `targets` is not integer.
        ValueError: The shapes disagree, or, on the CPU outside jit, a target is out of range.
            Elsewhere, where a check would synchronise, its nll and error_norm are NaN.

    Example:
        >>> statistics = token_statistics(jnp.array([[2.0, 2.0, -jnp.inf]]), jnp.array([0]))
        >>> statistics.nll.item() == statistics.entropy.item() == jnp.log(2.0).item()
        True
        >>> statistics.margin.item()
        0.0
    """
    logits = checked_logits(logits)
    if targets is not None:
        targets = checked_targets(targets, logits.shape[:-1], logits.shape[-1], ignore_index)
    ignored = operator.index(ignore_index)
    return dispatch.token_statistics(jax.lax.stop_gradient(logits), targets, ignored)


def linear_token_statistics(
    hidden: ArrayLike,
    weight: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStatistics:
    """:func:`token_statistics` of a linear head's logits, which are never all in memory.

    ``logits = softcap tanh(logit_scale (hidden weight^T + bias) / softcap)``

    Args:
        hidden: ``(..., D)``, floating.
        weight: ``(V, D)``, of hidden's dtype: the transpose of an ``nnx.Linear`` kernel.
        targets: ``(...)``, integers in ``[0, V)`` or `ignore_index`.
        bias: ``(V,)``.
        logit_scale: Factor of the logits, before the soft-cap.
        softcap: Soft-cap of the logits, > 0; none when None.
        ignore_index: Target whose nll and error_norm are 0.

    Returns:
        :class:`TokenStatistics` of float32 (float64) arrays ``(...)``.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes disagree, or, on the CPU outside jit, a target is out of range.

    Example:
        >>> hidden, weight = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> direct = token_statistics(hidden @ weight.T)
        >>> bool((linear_token_statistics(hidden, weight).entropy == direct.entropy).all())
        True
    """
    hidden, weight, bias = checked_linear(hidden, weight, bias, logit_scale, softcap)
    if targets is not None:
        targets = checked_targets(targets, hidden.shape[:-1], weight.shape[0], ignore_index)
    hidden, weight, bias = jax.lax.stop_gradient((hidden, weight, bias))
    ignored = operator.index(ignore_index)
    return dispatch.linear_token_statistics(
        hidden, weight, bias, targets, ignored, logit_scale, softcap
    )


def token_difficulty(
    statistics: TokenStatistics,
    scoring: str | Callable[[TokenStatistics], Array] = "combined",
    *,
    reference_nll: ArrayLike | None = None,
) -> Array:
    """Difficulty of every token, higher is harder: :func:`cggr.spec.scoring.token_difficulty`.

    Example:
        >>> statistics = token_statistics(jnp.array([[0.0, 0.0]]))
        >>> token_difficulty(statistics, "margin").tolist()
        [1.0]
    """
    if reference_nll is not None:
        reference_nll = jnp.asarray(reference_nll)
    return spec.token_difficulty(statistics, scoring, reference_nll=reference_nll, xp=jnp)


def select_tokens(
    difficulty: ArrayLike,
    config: RoutingConfig,
    *,
    step: int | Array = 0,
    draw: int | Array | None = None,
    rank: int | Array = 0,
    eligible: ArrayLike | None = None,
    confidence: ArrayLike | None = None,
    capacity: int | None = None,
) -> Selection:
    """The tokens to learn from: :func:`cggr.spec.selection.select_tokens`.

    The shape of the result is static: it has `capacity` slots, whatever is selected.

    Args:
        difficulty: As in the spec, like all arguments that are not listed here.
        config: The routing options.
        step: Optimizer step, a Python int or an int32 array.
        draw: Number of the training forward, for the sampling rules, of which another number is
            another sample; like `step`, which it is when None.
        rank: Number of the shard, such as ``jax.lax.axis_index("data")`` inside shard_map, so that
            shards draw independently; like `step`.
        eligible: Bool, of the difficulty's shape.
        confidence: Top probabilities, of the difficulty's shape.
        capacity: Slots, a Python int from :meth:`RoutingConfig.capacity`. None takes it from
            `step`, which then must be a Python int.

    Raises:
        TypeError: `capacity` is None and `step` is an array, or a dtype is wrong.
        ValueError: Shapes disagree or `capacity` is out of range.

    Example:
        >>> options = {"min_tokens_ratio": 0.5, "warmup_steps": 0, "dynamic_threshold": False}
        >>> config = RoutingConfig(selection="topk", **options)
        >>> select_tokens(jnp.array([[0.5, 3.0, 1.0, 2.0]]), config).indices.tolist()
        [1, 3]
    """
    difficulty = jax.lax.stop_gradient(jnp.asarray(difficulty))
    if isinstance(step, numbers.Integral) and step < 0:
        raise ValueError(f"step must not be negative, got {step}.")
    return _select_tokens(
        difficulty,
        selection_options(config),
        step=_word("step", step),
        draw=None if draw is None else _word("draw", draw),
        rank=_word("rank", rank),
        eligible=None if eligible is None else jnp.asarray(eligible),
        confidence=None if confidence is None else jnp.asarray(confidence),
        capacity=static_capacity(capacity, config, step, difficulty.shape),
    )


# Compiled, also where the caller is not: one program instead of a hundred operations, and arrays
# that are spread over devices stay so. A caller that is compiled takes them up into its program.
_STATIC = ("config", "capacity")


def selection_options(config: RoutingConfig) -> RoutingConfig:
    """The options without the score, which a selection does not read: a key for compilations."""
    return dataclasses.replace(config, scoring="combined")


_select_tokens = jax.jit(
    functools.partial(spec.select_tokens, xp=jnp), static_argnames=_STATIC, inline=True
)
select_at_ratio = jax.jit(
    functools.partial(selection.select_at_ratio, xp=jnp), static_argnames=_STATIC, inline=True
)
token_ratio = jax.jit(
    functools.partial(schedule.token_ratio, xp=jnp), static_argnums=0, inline=True
)


def _word(name: str, value: Any) -> Any:
    """A counter: a Python int of 32 bits, or an integer array of one element."""
    if isinstance(value, (jax.Array, np.ndarray)):
        if value.size != 1 or not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(
                f"{name} must be an integer or an integer array of one element, "
                f"got {value.dtype}{list(value.shape)}."
            )
        return value
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    number = int(value)
    if name != "step":  # a word of the hash
        return (number + 2**31) % 2**32 - 2**31
    if not number < 2**31:
        raise ValueError(f"{name} must be within 32 bits, got {number}.")
    return number


def static_capacity(
    capacity: int | None, config: RoutingConfig, step: Any, shape: tuple[int, ...]
) -> int:
    """The capacity that was given, or that of a step the host knows."""
    wanted = "a Python int, config.capacity(step, batch, length) of the step that the host knows"
    if capacity is not None:
        if not isinstance(capacity, numbers.Integral):
            raise TypeError(
                f"capacity must be {wanted}, and a static argument of jit; got {capacity!r}."
            )
        return int(capacity)
    if not isinstance(step, numbers.Integral):
        raise TypeError(f"capacity must be given where step is an array: {wanted}.")
    batch, length = shape if len(shape) == 2 else (1, math.prod(shape))
    return config.capacity(int(step), batch, length)


def aligned_targets(
    labels: ArrayLike, attention_mask: Any, *, shift: bool, ignore_index: int
) -> Array:
    """Target of every position, `ignore_index` where there is none.

    Args:
        labels: ``(B, S)``, Hugging Face style.
        attention_mask: ``(B, S)``, 0 on padding; a mask of another rank says nothing about
            padding and is not used here.
        shift: Position t is trained on label t + 1 (causal models) instead of label t.
        ignore_index: Label of positions that are not trained on.

    Returns:
        Integers ``(B, S)``. With `shift` the last position has no target. Neither a padding
        position nor a padding label is trained on.
    """
    given, labels = labels, _as_integers("labels", labels)
    if isinstance(given, np.ndarray) and (given.astype(labels.dtype) != given).any():
        raise ValueError(f"labels must be within 32 bits, got {given.min()} to {given.max()}.")
    if labels.ndim != 2 or labels.shape[0] == 0:
        raise ValueError(f"labels must have shape (B, S) with B >= 1, got {labels.shape}.")
    padding = padding_of(attention_mask, labels.shape)
    if padding is not None:
        labels = jnp.where(padding, ignore_index, labels)
    if shift:
        labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=ignore_index)
    return labels if padding is None else jnp.where(padding, ignore_index, labels)


def padding_of(attention_mask: Any, shape: tuple[int, ...]) -> Array | None:
    """Where a ``(B, S)`` attention mask has padding; None for a mask of another kind."""
    if getattr(attention_mask, "ndim", None) != 2:
        return None
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask must have shape {shape}, got {attention_mask.shape}.")
    return jnp.asarray(attention_mask) == 0


def checked_logits(logits: ArrayLike) -> Array:
    """Logits as an array; refused if they are not ``(..., V)`` floating with V of at least 1."""
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating, got {logits.dtype}.")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., V) with V >= 1, got {logits.shape}.")
    return logits


def checked_linear(
    hidden: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Array, Array, Array | None]:
    """The arrays of a linear head; refused if they make none."""
    hidden, weight = jnp.asarray(hidden), jnp.asarray(weight)
    bias = None if bias is None else jnp.asarray(bias)
    for name, array in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if array is None:
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {array.dtype}.")
        if array.dtype != hidden.dtype:
            raise TypeError(f"{name} must have hidden's dtype {hidden.dtype}, got {array.dtype}.")
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden must have shape (..., D) and weight (V, D), "
            f"got {hidden.shape} and {weight.shape}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {bias.shape}.")
    check_head(logit_scale, softcap)
    return hidden, weight, bias


def checked_targets(
    targets: ArrayLike,
    shape: tuple[int, ...],
    n_classes: int,
    ignore_index: int,
    *,
    name: str = "targets",
    shifted: bool = False,
) -> Array:
    """Targets as integers; refused if of another shape or kind, or, where looking is free, range.

    `name` is what the user calls them, and `shifted` says that target t was label t + 1.
    """
    array = _as_integers("targets", targets)
    if array.shape != shape:
        raise ValueError(f"{name} must have the logits' leading shape {shape}, got {array.shape}.")
    if _on_host(targets):
        values = np.asarray(targets)  # before JAX narrows 64 bits to 32
        wrong = ((values < 0) | (values >= n_classes)) & (values != ignore_index)
        if wrong.any():
            where = np.argwhere(wrong)[0].tolist()
            value = values[tuple(where)]
            where[-1] += shifted
            raise ValueError(
                f"{name} must be in [0, {n_classes}) or ignore_index={ignore_index}, "
                f"got {value} at position {tuple(where)}."
            )
    return array


def _as_integers(name: str, x: ArrayLike) -> Array:
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}.")
    # Comparisons with ignore_index would wrap around in a narrow or an unsigned type.
    wide = jnp.int64 if array.dtype.itemsize == 8 else jnp.int32
    return array.astype(wide)


def _on_host(x: Any) -> bool:
    """Whether the values can be looked at without waiting for an accelerator or a compiler."""
    if isinstance(x, jax.core.Tracer):
        return False
    if isinstance(x, jax.Array):
        return x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())
    return True
