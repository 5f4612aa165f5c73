"""How hard a token is: TokenStatistics -> difficulty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace

from cggr.spec.config import SCORINGS
from cggr.spec.statistics import TokenStatistics


def token_difficulty(
    statistics: TokenStatistics,
    scoring: str | Callable[[TokenStatistics], Any] = "combined",
    *,
    reference_nll: Any = None,
    xp: Any = None,
) -> Any:
    """Difficulty of every token; higher is harder.

    | scoring | difficulty |
    | --- | --- |
    | ``"entropy"`` | entropy |
    | ``"margin"`` | 1 - margin |
    | ``"loss"`` | nll |
    | ``"combined"`` | entropy + (1 - margin) + nll, without nll if there are no targets |
    | ``"error_norm"`` | error_norm |
    | ``"excess_loss"`` | nll - reference_nll |
    | a callable | its result |

    Args:
        statistics: From :func:`~cggr.spec.statistics.token_statistics`.
        scoring: A name of the table, or a callable ``TokenStatistics -> scores`` written in the
            array API, which then works in every frontend.
        reference_nll: Loss of a reference model on the same tokens, of the statistics' shape;
            needed by ``"excess_loss"`` alone.
        xp: Array namespace of the arrays; found from the statistics when None.

    Returns:
        Scores of the statistics' shape and dtype.

    Raises:
        ValueError: The score needs targets or `reference_nll` and they are missing, or `scoring`
            is unknown, or a callable returned another shape.

    Example:
        >>> import numpy as np
        >>> from cggr.spec import token_statistics
        >>> statistics = token_statistics(np.log([[0.5, 0.25, 0.25]]))
        >>> token_difficulty(statistics, "margin").round(4).tolist()
        [0.75]

    References:
        excess_loss: Lin et al., "Rho-1: Not All Tokens Are What You Need", NeurIPS 2024.
    """
    if callable(scoring):
        scores = scoring(statistics)
        if getattr(scores, "shape", None) != statistics.entropy.shape:
            raise ValueError(
                f"scoring must return scores of shape {tuple(statistics.entropy.shape)}, "
                f"got {tuple(getattr(scores, 'shape', ())) or type(scores).__name__}."
            )
        return scores
    if scoring not in SCORINGS:
        raise ValueError(
            f"scoring must be one of {', '.join(map(repr, SCORINGS))} or a callable, "
            f"got {scoring!r}."
        )
    if scoring == "entropy":
        return statistics.entropy
    if scoring == "margin":
        return 1 - statistics.margin
    if scoring == "combined":
        unsure = statistics.entropy + (1 - statistics.margin)
        return unsure if statistics.nll is None else unsure + statistics.nll
    if statistics.nll is None:
        raise ValueError(f"scoring={scoring!r} needs targets, got none.")
    if scoring == "loss":
        return statistics.nll
    if scoring == "error_norm":
        return statistics.error_norm
    if reference_nll is None:
        raise ValueError("scoring='excess_loss' needs reference_nll, got none.")
    if tuple(reference_nll.shape) != tuple(statistics.nll.shape):
        raise ValueError(
            f"reference_nll must have shape {tuple(statistics.nll.shape)}, "
            f"got {tuple(reference_nll.shape)}."
        )
    xp = array_namespace(statistics.nll) if xp is None else xp
    return statistics.nll - xp.astype(reference_nll, statistics.nll.dtype)
