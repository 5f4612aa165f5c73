"""What a row of logits says about its token: loss, entropy, confidence, margin, error norm.

Shapes: leading dimensions of any number (``...``), ``V`` classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from cggr.spec.arrays import device_of, index_dtype


class TokenStatistics(NamedTuple):
    """Statistics of every token, each of the logits' leading shape, float32 (float64 for float64).

    Attributes:
        nll: Negative log-likelihood of the target in nats; 0 where ignored, None without targets.
        entropy: Entropy of the prediction in nats.
        confidence: Largest probability.
        margin: Largest minus second largest probability.
        error_norm: Euclidean norm of (probabilities - one-hot target), the EL2N score; 0 where
            ignored, None without targets.
    """

    nll: Any
    entropy: Any
    confidence: Any
    margin: Any
    error_norm: Any


def token_statistics(
    logits: Any, targets: Any = None, *, ignore_index: int = -100, xp: Any = None
) -> TokenStatistics:
    """All five statistics of every row of logits.

    With ``p = softmax(x)`` and target ``y``::

        nll        = logsumexp(x) - x_y         entropy = logsumexp(x) - Σ p x   (0 log 0 = 0)
        confidence = p_(1)                      margin  = p_(1) - p_(2)
        error_norm = sqrt(Σ (p - onehot(y))²)

    Args:
        logits: ``(..., V)``, floating; computed in float32, or in float64 if given in float64.
        targets: ``(...)``, integers in ``[0, V)`` or `ignore_index`. A target out of range gives
            NaN and is never used as an index.
        ignore_index: Target whose nll and error_norm are 0.
        xp: Array namespace of the arrays; found from `logits` when None.

    Returns:
        :class:`TokenStatistics` of shape ``(...)``.

    Example:
        >>> import numpy as np
        >>> statistics = token_statistics(np.log([[0.5, 0.25, 0.25]]), np.array([1]))
        >>> [round(float(statistics.nll[0]), 4), round(float(statistics.margin[0]), 4)]
        [1.3863, 0.25]

    References:
        EL2N: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021.
    """
    xp = array_namespace(logits) if xp is None else xp
    if logits.dtype != xp.float64:
        logits = xp.astype(logits, xp.float32)
    # exp(x - max) of every class but the largest, whose own term is 1. Kept apart, what a sure
    # model gives to the other classes is not lost against that 1: log1p and error_norm need it.
    top = xp.max(logits, axis=-1, keepdims=True)
    is_top = logits == top
    shifted = xp.where(is_top, -float("inf"), logits) - top
    exp = xp.exp(shifted)
    ties = xp.sum(is_top, axis=-1, dtype=xp.int32)
    top = xp.squeeze(top, axis=-1)
    # top - top is 0, or NaN for a row without a finite maximum: a fault stays loud.
    tied = xp.astype(ties, logits.dtype) - 1 + (top - top)
    rest = xp.sum(exp, axis=-1) + tied
    exp_sum = 1 + rest
    log_sum = xp.log1p(rest)
    # 0 log 0 = 0: exp is 0 long before -1000, which unlike -inf it can be multiplied with.
    lowest = xp.full((1,), -1000.0, dtype=logits.dtype, device=device_of(logits))
    entropy = log_sum - xp.sum(exp * xp.maximum(shifted, lowest), axis=-1) / exp_sum
    confidence = 1 / exp_sum
    second = xp.where(ties > 1, 1.0, xp.max(exp, axis=-1))
    margin = (1 - second) / exp_sum
    if targets is None:
        return TokenStatistics(None, entropy, confidence, margin, None)

    ignored = targets == ignore_index
    valid = (targets >= 0) & (targets < logits.shape[-1]) & ~ignored
    label = xp.where(valid, targets, 0)
    label = xp.astype(label, index_dtype(xp))[..., None]
    label_logit = xp.squeeze(xp.take_along_axis(logits, label, axis=-1), axis=-1)
    nll = log_sum - (label_logit - top)
    # ||p - onehot||² exp_sum² = (Σ_{v≠y} e_v)² + Σ_{v≠y} e_v². Where y is the largest class, its
    # term is the 1 kept apart; elsewhere it is taken from a sum that keeps at least that 1.
    label_exp = xp.exp(label_logit - top)
    label_is_top = label_logit == top
    error = xp.where(label_is_top, rest, exp_sum - label_exp)
    squares = xp.sum(exp * exp, axis=-1) + tied
    squares = xp.where(label_is_top, squares, squares + (1 - label_exp * label_exp))
    error_norm = xp.sqrt(error * error + squares) / exp_sum

    nan = float("nan")
    nll, error_norm = (
        xp.where(ignored, 0.0, xp.where(valid, value, nan)) for value in (nll, error_norm)
    )
    return TokenStatistics(nll, entropy, confidence, margin, error_norm)
