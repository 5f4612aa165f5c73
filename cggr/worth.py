"""What a draw of tokens is worth, before anybody trains by it.

Tokens that are drawn by importance and weighted make the same gradient in the mean, and a noisier
one, as that of a smaller batch is. How much smaller follows from the norms of the tokens' gradients
alone, which ``error_norm`` stands for.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["token", "backward"]


def effective_fraction(
    gradient_norm: npt.ArrayLike, ratio: float, *, importance: npt.ArrayLike | None = None
) -> float:
    """Part of a batch that would make a gradient as noisy as that of tokens drawn from all of it.

    With ``g`` the norms of the tokens' gradients and ``p = min(1, q / τ)`` the probabilities of
    being drawn by importance ``q``, where ``τ`` is such that ``Σ p = ratio N``::

        f = Σ g² / Σ (g² / p)

    A batch of N tokens, whose gradients are as good as independent, has a noise of ``Σ g²``; tokens
    that are drawn and weighted by ``1 / p`` have ``Σ g² / p``. Uniform draws are worth the ratio.
    Draws by ``q = g`` are worth ``ratio (1 + CV²)`` where no ``p`` is 1, CV the norms' standard
    deviation over their mean: much where the model knows most tokens, little where it knows none.

    Args:
        gradient_norm: Norm of every token's gradient, of any shape, not negative; such as
            ``error_norm`` of :func:`~cggr.spec.token_statistics`.
        ratio: Part of the tokens that is drawn, in (0, 1].
        importance: What they are drawn by, of the same shape and positive where `gradient_norm` is;
            `gradient_norm` itself if None.

    Returns:
        f in [0, 1]; 1 if no token has a gradient.

    Raises:
        ValueError: The arrays are empty, of different shapes, negative or not finite, or `ratio` is
            not in (0, 1].

    Example:
        >>> norms = np.array([0.0, 0.1, 0.1, 0.2, 1.4, 1.0, 0.1, 0.1])
        >>> [round(effective_fraction(norms, ratio), 2) for ratio in (0.25, 0.5)]
        [0.68, 0.97]

    References:
        Horvitz, Thompson, "A generalization of sampling without replacement from a finite
        universe", JASA 47, 1952; when importance sampling pays: Katharopoulos, Fleuret, "Not all
        samples are created equal", ICML 2018.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}.")
    importance = gradient_norm if importance is None else importance
    norm_N, q_N = _norms("gradient_norm", gradient_norm), _norms("importance", importance)
    if np.shape(importance) != np.shape(gradient_norm):
        raise ValueError(
            f"importance must have the gradient_norm's shape {np.shape(gradient_norm)}, got "
            f"{np.shape(importance)}."
        )
    squares_N, p_N = norm_N**2, inclusion_probabilities(q_N, ratio)
    has_gradient_N = squares_N > 0
    if not has_gradient_N.any():
        return 1.0
    with np.errstate(divide="ignore"):
        noise = np.sum(squares_N[has_gradient_N] / p_N[has_gradient_N])
    return float(squares_N.sum() / noise)


def inclusion_probabilities(importance_N: npt.ArrayLike, ratio: float) -> npt.NDArray[np.float64]:
    """``min(1, q / τ)`` ``(N,)``, of the sum ``ratio N`` or of as many tokens as have importance.

    Example:
        >>> inclusion_probabilities([4.0, 1.0, 1.0, 0.0], 0.5).tolist()
        [1.0, 0.5, 0.5, 0.0]
    """
    q_N = np.asarray(importance_N, dtype=np.float64)
    k = ratio * q_N.size
    if k >= np.count_nonzero(q_N):
        return (q_N > 0).astype(np.float64)
    order_N = np.argsort(-q_N, kind="stable")
    sorted_N = q_N[order_N]
    # If the m largest have probability 1, the others share k - m in proportion.
    m = np.arange(int(np.ceil(k)))
    tau = np.cumsum(sorted_N[::-1])[::-1][m] / (k - m)
    first = int(np.argmax(sorted_N[m] <= tau))
    return np.minimum(1.0, q_N / tau[first])


def operations(ratio: float, split: Split) -> float:
    """Operations of a step at this ratio, as a part of a dense one's: of the layers' products.

    - ``"backward"``: one forward pass, and two products for each of it that are of drawn rows:
      ``(1 + 2 ratio) / 3``.
    - ``"token"``: another forward pass of the drawn tokens beside them: ``(1 + 3 ratio) / 3``.

    Example:
        >>> round(operations(0.5, "backward"), 3), round(operations(0.5, "token"), 3)
        (0.667, 0.833)
    """
    return (1 + {"backward": 2, "token": 3}[split] * ratio) / 3


def _norms(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    norm_N = np.asarray(values, dtype=np.float64).ravel()
    if not norm_N.size:
        raise ValueError(f"{name} must have a token at least, got shape {np.shape(values)}.")
    if not (np.isfinite(norm_N).all() and (norm_N >= 0).all()):
        raise ValueError(f"{name} must be finite and not negative, got {norm_N.min()} at least.")
    return norm_N
