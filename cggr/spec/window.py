"""Scores averaged over neighbouring tokens, in one order of additions on every backend.

Shapes: ``B`` sequences of ``S`` tokens.
"""

from __future__ import annotations

from typing import Any

from cggr.spec.arrays import device_of
from cggr.spec.division import quotient

_SCALE = 2.0**20  # over as many tokens as a window has at most, what `quotient` rounds to nearest


def window_mean(score_BS: Any, eligible_BS: Any, width: int, *, xp: Any) -> Any:
    """Mean score of the eligible tokens among the `width` around each one, itself included.

    ``mean_i = Σ_j score_j / n_i`` over the `n_i` tokens `j` of the same sequence that are eligible,
    finite, and at most ``(width - 1) / 2`` places from `i`.

    Args:
        score_BS: float32 ``(B, S)``.
        eligible_BS: Which tokens count, bool ``(B, S)``.
        width: An odd Python int in [1, 1023].
        xp: Array namespace of the arrays.

    Returns:
        float32 ``(B, S)``, bit-identical on every backend; an ineligible token's score, and one
        that is not finite, is left as it is.

    Example:
        >>> import numpy as np
        >>> score_BS = np.array([[0.0, 6.0, 0.0, 9.0]], dtype=np.float32)
        >>> eligible_BS = np.array([[True, True, True, False]])
        >>> window_mean(score_BS, eligible_BS, 3, xp=np)
        array([[3., 2., 3., 9.]], dtype=float32)
    """
    counts_BS = eligible_BS & xp.isfinite(score_BS)
    pair_2BS = xp.stack((xp.where(counts_BS, score_BS, 0.0), xp.astype(counts_BS, xp.float32)))
    shape = (2, score_BS.shape[0], width // 2)
    beyond = xp.zeros(shape, dtype=xp.float32, device=device_of(score_BS))
    sum_2BS = _sums_of_runs(xp.concat((beyond, pair_2BS, beyond), axis=-1), width)
    n_BS = xp.where(counts_BS, sum_2BS[1, :, :], 1.0)
    # By a reciprocal: compilers divide floats on CUDA to within two units of the last place.
    one_over_n_BS = quotient(xp.full_like(n_BS, _SCALE), n_BS, xp=xp) * (1 / _SCALE)
    return xp.where(counts_BS, sum_2BS[0, :, :] * one_over_n_BS, score_BS)


def _sums_of_runs(x: Any, width: int) -> Any:
    """Sums of every `width` neighbours along the last axis, which becomes ``width - 1`` shorter.

    Of runs of 1, 2, 4, ... tokens, each of two of the last, as the width's binary digits say: an
    order of additions that compilers keep, and few of them.
    """
    n_runs = x.shape[-1] - width + 1
    total, start, run = None, 0, 1
    while True:
        if width & run:
            part = x[..., start : start + n_runs]
            total = part if total is None else total + part
            start += run
        if 2 * run > width:
            return total
        x = x[..., :-run] + x[..., run:]
        run *= 2
