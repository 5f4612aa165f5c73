"""How many tokens to keep: step and batch confidence -> ratio -> k, in integers only.

A ratio is an int32 in units of ``2**-14``, so that NumPy, torch and JAX agree on every k. Floats
would not do: a product that lands next to an integer is rounded differently by different compilers.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cggr.spec.config import RoutingConfig

RATIO_BITS = 14
ONE = 1 << RATIO_BITS
# Products of a ratio and a step stay below 2**31 when the step is below 2**17.
STEP_BITS = 17


def base_ratio(config: RoutingConfig, step: Any, *, xp: Any = None) -> Any:
    """Ratio of the curriculum: linear from 1 at step 0 to `min_tokens_ratio` after the warm-up.

    ``ONE - (ONE - target) min(step, warmup) // warmup``, with
    ``target = max(1, round(min_tokens_ratio ONE))``

    Args:
        config: The routing options.
        step: Optimizer step: a Python int, or an int32 array, for which `xp` is its namespace.
        xp: Array namespace of `step`.

    Returns:
        The ratio in units of ``2**-14``, a Python int or an int32 array like `step`.
    """
    target = max(1, round(config.min_tokens_ratio * ONE))
    shift = max(0, config.warmup_steps.bit_length() - STEP_BITS)
    warmup = config.warmup_steps >> shift
    if warmup == 0:
        return target if xp is None else xp.full_like(step, target)
    step = step >> shift
    if xp is None:
        step = max(0, min(step, warmup))
    else:
        step = xp.minimum(step, xp.full_like(step, warmup))
        step = xp.maximum(step, xp.zeros_like(step))
    return ONE - (ONE - target) * step // warmup


def ratio_bound(config: RoutingConfig, step: int) -> int:
    """Largest ratio that any batch can get at `step`: that of a model with no confidence at all."""
    base = base_ratio(config, step)
    if not config.adaptive:
        return base
    return min(ONE, base + (base * round(config.threshold_sensitivity * ONE) >> RATIO_BITS))


def token_ratio(
    config: RoutingConfig, step: Any, confidence: Any, eligible: Any, *, xp: Any
) -> Any:
    """Ratio for this step and batch: an unsure model trains on more tokens.

    ``min(1, base (1 + sensitivity (1 - mean confidence)))`` with the mean over eligible tokens.
    The mean is a sum of integers, whose order no backend can round differently.

    Args:
        config: The routing options.
        step: Optimizer step, an int32 array of shape ``(1,)``.
        confidence: Top probability of every token, float ``(B, S)``, or None for no adaptation.
        eligible: Which tokens count, bool ``(B, S)``.
        xp: Array namespace of the arrays.

    Returns:
        The ratio in units of ``2**-14``, int32 ``(1,)``.
    """
    base = base_ratio(config, step, xp=xp)
    if confidence is None or not config.adaptive:
        return base
    n_tokens = math.prod(confidence.shape)
    bits = min(16, 30 - math.ceil(math.log2(max(n_tokens, 1))))  # the sum stays within 2**30
    # A confidence that is NaN counts as none. The comparisons are false for it.
    confidence = xp.astype(confidence, xp.float32)
    known = eligible & (confidence >= 0)
    confidence = xp.where(known, confidence, 0.0)
    confidence = xp.where(confidence > 1, 1.0, confidence)
    units = xp.astype(xp.floor(confidence * 2.0**bits), xp.int32)
    total = xp.reshape(xp.sum(units, dtype=xp.int32), (1,))
    n_eligible = xp.reshape(xp.sum(xp.astype(eligible, xp.int32), dtype=xp.int32), (1,))
    mean = total // xp.maximum(n_eligible, xp.ones_like(n_eligible))
    sensitivity = round(config.threshold_sensitivity * ONE)
    ratio = base + ((base * sensitivity >> RATIO_BITS) * ((1 << bits) - mean) >> bits)
    return xp.minimum(ratio, xp.full_like(ratio, ONE))


def ceil_share(n: Any, ratio: Any) -> Any:
    """``ceil(n ratio / 2**14)`` without a product above 2**31; Python ints or int32 arrays."""
    return (n >> RATIO_BITS) * ratio + (((n & (ONE - 1)) * ratio + ONE - 1) >> RATIO_BITS)


def token_count(n_eligible: Any, ratio: Any, *, xp: Any) -> Any:
    """Number of tokens to keep: ``ceil(n ratio)``, at least 1 when anything is eligible.

    Args:
        n_eligible: Eligible tokens of each group, int32 ``(R,)``.
        ratio: int32 ``(1,)`` in units of ``2**-14``.
        xp: Array namespace of the arrays.

    Returns:
        k, int32 ``(R,)``.
    """
    k = ceil_share(n_eligible, ratio)
    # min(n, 1) is the lower bound: one if there is any.
    return xp.maximum(k, xp.minimum(n_eligible, xp.ones_like(n_eligible)))
