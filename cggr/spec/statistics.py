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
    sums = vocabulary_sums(logits, targets, xp=xp)
    return statistics_of_sums(
        sums, targets, n_classes=logits.shape[-1], ignore_index=ignore_index, xp=xp
    )


class VocabularySums(NamedTuple):
    """What a part of the classes adds to a row's statistics; parts are joined without loss.

    One largest class is kept apart: what a sure model gives to the other classes would be lost
    against its ``exp(0) = 1``, and log1p and error_norm need it. With ``e = exp(x - top)``:

    Attributes:
        top: The largest logit.
        second: The second largest; `top` itself if two are equal.
        rest: ``Σ e`` over all classes of the part but the one kept apart.
        weighted: ``Σ e (x - top)`` over the same.
        squares: ``Σ e²`` over the same.
        label_logit: The target's logit; 0 where the target is none of these classes.
    """

    top: Any
    second: Any
    rest: Any
    weighted: Any
    squares: Any
    label_logit: Any


def vocabulary_sums(logits: Any, targets: Any = None, *, xp: Any = None) -> VocabularySums:
    """The sums of every row of logits, which may be some of the classes only.

    Args:
        logits: ``(..., V)`` with V of at least 1, floating.
        targets: ``(...)``, integers; as class numbers of these logits, so that a target of another
            part is out of ``[0, V)``.
        xp: Array namespace of the arrays; found from `logits` when None.

    Returns:
        :class:`VocabularySums` of shape ``(...)``, float32 (float64 for float64).

    Example:
        >>> import numpy as np
        >>> sums = vocabulary_sums(np.asarray([[0.0, 3.0, 3.0]]), np.asarray([0]))
        >>> [float(x[0]) for x in sums][:2], round(float(sums.rest[0]), 4)
        ([3.0, 3.0], 1.0498)
    """
    xp = array_namespace(logits) if xp is None else xp
    if logits.dtype != xp.float64:
        logits = xp.astype(logits, xp.float32)
    top = xp.max(logits, axis=-1, keepdims=True)
    is_top = logits == top
    lower = xp.where(is_top, -float("inf"), logits)
    shifted = lower - _finite(top, xp)
    exp = xp.exp(shifted)
    ties = xp.sum(is_top, axis=-1, dtype=xp.int32)
    top = xp.squeeze(top, axis=-1)
    tied = (xp.astype(ties, logits.dtype) - 1) * _is_above_lowest(top, xp)
    second = xp.where(ties > 1, top, xp.max(lower, axis=-1))
    label_logit = xp.zeros_like(top)
    if targets is not None:
        valid = (targets >= 0) & (targets < logits.shape[-1])
        label = xp.astype(xp.where(valid, targets, 0), index_dtype(xp))[..., None]
        label_logit = xp.squeeze(xp.take_along_axis(logits, label, axis=-1), axis=-1)
        label_logit = xp.where(valid, label_logit, 0.0)
    return VocabularySums(
        top,
        second,
        xp.sum(exp, axis=-1) + tied,
        xp.sum(exp * xp.maximum(shifted, _lowest(top, xp)), axis=-1),
        xp.sum(exp * exp, axis=-1) + tied,
        label_logit,
    )


def join_vocabulary_sums(parts: VocabularySums, *, xp: Any = None) -> VocabularySums:
    """The sums of all classes, from those of ``W`` parts.

    Args:
        parts: Of shape ``(W, ...)`` each.
        xp: Array namespace of the arrays; found from them when None.

    Returns:
        :class:`VocabularySums` of shape ``(...)``.

    Example:
        >>> import numpy as np
        >>> logits = np.asarray([[0.0, 3.0, 1.0, 2.0]])
        >>> halves = zip(vocabulary_sums(logits[:, :2]), vocabulary_sums(logits[:, 2:]))
        >>> joined = join_vocabulary_sums(VocabularySums(*map(np.stack, halves)))
        >>> bool(np.allclose(joined.rest, vocabulary_sums(logits).rest))
        True
    """
    xp = array_namespace(parts.top) if xp is None else xp
    top = xp.max(parts.top, axis=0)
    is_top = parts.top == top
    ties = xp.sum(is_top, axis=0, dtype=xp.int32)
    # Of every part the class kept apart joins the rest, but for one of the largest of them. A part
    # whose logits are all -inf adds nothing; NaN times 0 stays NaN.
    counts = _is_above_lowest(parts.top, xp)
    shift = xp.maximum(parts.top - _finite(top, xp), _lowest(top, xp))
    exp = xp.exp(shift) * counts
    own = xp.where(is_top, 0.0, counts)
    tied = (xp.astype(ties, top.dtype) - 1) * _is_above_lowest(top, xp)
    runner_up = xp.max(xp.where(is_top, -float("inf"), parts.top), axis=0)
    second = xp.where(ties > 1, top, xp.maximum(runner_up, xp.max(parts.second, axis=0)))
    rest, squares = parts.rest + own, parts.squares + own
    return VocabularySums(
        top,
        second,
        xp.sum(exp * rest, axis=0) + tied,
        xp.sum(exp * (parts.weighted + shift * rest), axis=0),
        xp.sum(exp * exp * squares, axis=0) + tied,
        xp.sum(parts.label_logit, axis=0),
    )


def statistics_of_sums(
    sums: VocabularySums,
    targets: Any = None,
    *,
    n_classes: int,
    ignore_index: int = -100,
    xp: Any = None,
) -> TokenStatistics:
    """:class:`TokenStatistics` from the sums over all ``V = n_classes`` classes.

    Args:
        sums: Of shape ``(...)`` each.
        targets: ``(...)``, as in :func:`token_statistics`.
        n_classes: V.
        ignore_index: Target whose nll and error_norm are 0.
        xp: Array namespace of the arrays; found from them when None.

    Example:
        >>> import numpy as np
        >>> sums = vocabulary_sums(np.zeros((1, 4)))
        >>> bool(np.allclose(statistics_of_sums(sums, n_classes=4).entropy, np.log(4)))
        True
    """
    xp = array_namespace(sums.top) if xp is None else xp
    top, label_logit = sums.top, sums.label_logit
    # top - top is 0, or NaN for a row without a finite maximum: a fault stays loud.
    rest = sums.rest + (top - top)
    exp_sum = 1 + rest
    log_sum = xp.log1p(rest)
    entropy = log_sum - sums.weighted / exp_sum
    confidence = 1 / exp_sum
    margin = (1 - xp.exp(sums.second - top)) / exp_sum
    if targets is None:
        return TokenStatistics(None, entropy, confidence, margin, None)

    ignored = targets == ignore_index
    valid = (targets >= 0) & (targets < n_classes) & ~ignored
    nll = log_sum - (label_logit - top)
    # ||p - onehot||² exp_sum² = (Σ_{v≠y} e_v)² + Σ_{v≠y} e_v². Where y is the largest class, its
    # term is the 1 kept apart; elsewhere it is taken from a sum that keeps at least that 1.
    label_exp = xp.exp(label_logit - top)
    label_is_top = label_logit == top
    error = xp.where(label_is_top, rest, exp_sum - label_exp)
    squares = xp.where(label_is_top, sums.squares, sums.squares + (1 - label_exp * label_exp))
    error_norm = xp.sqrt(error * error + squares) / exp_sum

    nan = float("nan")
    nll, error_norm = (
        xp.where(ignored, 0.0, xp.where(valid, value, nan)) for value in (nll, error_norm)
    )
    return TokenStatistics(nll, entropy, confidence, margin, error_norm)


def _finite(top: Any, xp: Any) -> Any:
    """What logits are taken relative to; a maximum of -inf would make NaN of them all."""
    return xp.where(top == -float("inf"), 0.0, top)


def _is_above_lowest(top: Any, xp: Any) -> Any:
    """1 where there is a class above -inf, else 0; NaN counts as above."""
    return xp.where(top == -float("inf"), xp.zeros_like(top), 1.0)


def _lowest(top: Any, xp: Any) -> Any:
    """0 log 0 = 0: exp is 0 long before -1000, which unlike -inf it can be multiplied with."""
    return xp.full((1,), -1000.0, dtype=top.dtype, device=device_of(top))
