"""What a draw of tokens is worth, before anybody trains by it.

Tokens that are drawn by importance and weighted make the same gradient in the mean as all tokens
do, and a noisier one, as a smaller batch does. How much smaller follows from the norms of the
tokens' gradients alone, which ``error_norm`` stands for.

Shapes: ``R`` groups of ``M`` tokens, each of which draws its part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float64]
_SPLITS = ("backward", "token")


def effective_fraction(
    gradient_norm: npt.ArrayLike,
    ratio: float,
    *,
    importance: npt.ArrayLike | None = None,
    scope: str = "batch",
) -> float:
    """How large a part of a batch would make a gradient as noisy as the drawn tokens' one.

    With ``g`` the norms of the tokens' gradients and ``p = min(1, q / τ)`` the probabilities of
    being drawn by importance ``q``, where ``τ`` is such that ``Σ p = ratio N``::

        f = Σ g² / Σ (g² / p)

    If tokens' gradients are independent, a batch's has a noise of ``Σ g²``, and that of tokens
    drawn and weighted by ``1 / p`` one of ``Σ g² / p``. Uniform draws are worth the ratio. Draws by
    ``q = g`` are worth ``ratio (1 + CV²)`` where no ``p`` is 1, with CV the norms' standard
    deviation over their mean: a model that knows most tokens has much to gain, one that knows none
    has nothing. It is a prediction: tokens of a sequence are not independent, which makes draws
    worth more; and what a split leaves out of the gradient makes them worth less.

    Args:
        gradient_norm: Norm of every token's gradient, not negative, such as ``error_norm`` of
            :func:`~cggr.spec.token_statistics`: of any shape, ``(B, S)`` with ``"sequence"``.
        ratio: Part of the tokens that is drawn, in (0, 1].
        importance: What they are drawn by, of the same shape and not negative; `gradient_norm`
            itself if None. Of the selection ``"importance"`` it is the difficulty and
            `importance_floor`.
        scope: ``"batch"`` draws of all tokens together, ``"sequence"`` the same part of every row.

    Returns:
        f in [0, 1]; 1 if no token has a gradient.

    Raises:
        ValueError: The arrays are empty, of different shapes, negative or not finite; `ratio` or
            `scope` is out of range.

    Example:
        >>> norms = np.array([0.0, 0.1, 0.1, 0.2, 1.4, 1.0, 0.1, 0.1])
        >>> [round(effective_fraction(norms, ratio), 2) for ratio in (0.25, 0.5)]
        [0.68, 0.97]

    References:
        Horvitz, Thompson, "A generalization of sampling without replacement from a finite
        universe", JASA 47, 1952; when importance sampling pays: Katharopoulos, Fleuret, "Not all
        samples are created equal", ICML 2018.
    """
    _check_ratio(ratio)
    if scope not in ("batch", "sequence"):
        raise ValueError(f"scope must be 'batch' or 'sequence', got {scope!r}.")
    importance = gradient_norm if importance is None else importance
    norm_RM = _groups("gradient_norm", gradient_norm, scope)
    q_RM = _groups("importance", importance, scope)
    if np.shape(importance) != np.shape(gradient_norm):
        raise ValueError(
            f"importance must have the gradient_norm's shape {np.shape(gradient_norm)}, got "
            f"{np.shape(importance)}."
        )
    square_RM = norm_RM**2
    p_RM = np.stack([_inclusion_probabilities(q_M, ratio) for q_M in q_RM])
    has_gradient_RM = square_RM > 0
    if not has_gradient_RM.any():
        return 1.0
    with np.errstate(divide="ignore"):
        noise = np.sum(square_RM[has_gradient_RM] / p_RM[has_gradient_RM])
    return float(square_RM.sum() / noise)


def operations(ratio: float, split: str, *, of_all: float = 0.0, scored: bool = True) -> float:
    """Operations of a step at this ratio, as a part of a dense one's.

    Where all weights are trained and nothing runs again, a backward pass has twice the operations
    of a forward pass. With ``a`` the part of them that `of_all` says:

    - ``"backward"``: ``(1 + 2 (a + (1 - a) ratio)) / 3``, one forward pass, and a backward pass of
      the drawn tokens but for what has a gradient of all.
    - ``"token"``: ``(1 + 3 ratio) / 3``, another forward pass of the drawn tokens, and their
      backward pass; ``(1 + 2 ratio) / 3`` if nothing is scored, as the products of drawn tokens are
      made once then.

    Args:
        ratio: Part of the tokens that is drawn, in (0, 1]; of all, with labels or without.
        split: ``"backward"`` or ``"token"``.
        of_all: Part of a forward pass's operations whose backward pass is of all tokens by
            ``"backward"``, in [0, 1): the products of keys and values, and attention. ``cggr
            advise`` finds it for a model; of Llama-2-7B it is 0.23 at 4,096 tokens. By
            ``"token"`` nothing is.
        scored: Whether tokens are drawn by the model's own scores, and not at random, nor all that
            have labels. By ``"backward"``, whose forward pass scores, it takes as many.

    Returns:
        The part.

    Raises:
        ValueError: `ratio`, `split` or `of_all` is out of range.

    Example:
        >>> round(operations(0.5, "backward"), 3), round(operations(0.5, "token"), 3)
        (0.667, 0.833)
        >>> round(operations(0.5, "backward", of_all=0.2), 3)
        0.733
    """
    _check_ratio(ratio)
    if split not in _SPLITS:
        raise ValueError(f"split must be 'backward' or 'token', got {split!r}.")
    if not 0 <= of_all < 1:
        raise ValueError(f"of_all must be in [0, 1), got {of_all}.")
    if split == "token":
        return (1 + (3 if scored else 2) * ratio) / 3
    return (1 + 2 * (of_all + (1 - of_all) * ratio)) / 3


def _inclusion_probabilities(q_M: _Array, ratio: float) -> _Array:
    """``min(1, q / τ)``, of the sum ``ratio M`` or of as many tokens as have importance."""
    k = ratio * q_M.size
    if k >= np.count_nonzero(q_M):
        return (q_M > 0).astype(np.float64)
    sorted_M = -np.sort(-q_M)
    # If the m largest have probability 1, the others share k - m in proportion.
    m = np.arange(int(np.ceil(k)))
    tau = np.cumsum(sorted_M[::-1])[::-1][m] / (k - m)
    return np.minimum(1.0, q_M / tau[np.argmax(sorted_M[m] <= tau)])


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}.")


def _groups(name: str, values: Any, scope: str) -> _Array:
    """``(R, M)``, the largest of them 1: squares of what is very small or large are not lost."""
    found = np.asarray(values, dtype=np.float64)
    if not found.size or (scope == "sequence" and found.ndim != 2):
        shape = "shape (B, S)" if scope == "sequence" else "a token at least"
        raise ValueError(f"{name} must have {shape}, got shape {np.shape(values)}.")
    wrong = found[~(np.isfinite(found) & (found >= 0))]
    if wrong.size:
        raise ValueError(f"{name} must be finite and not negative, got {wrong.flat[0]}.")
    found = found / (found.max() or 1.0)
    return found if scope == "sequence" else found.reshape(1, -1)
