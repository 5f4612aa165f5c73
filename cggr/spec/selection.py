"""Which tokens are worth learning from: difficulty -> Selection.

Shapes: ``B`` sequences of ``S`` tokens; ``R`` groups of ``M`` tokens that are ranked against each
other (``1, B S`` with ``scope="batch"``, ``B, S`` with ``scope="sequence"``); ``L`` strata; ``C``
slots. Ranks, counts and indices are int32. No data-dependent control flow, no in-place writes: the
same lines run under jit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from cggr.spec import schedule
from cggr.spec.arrays import device_of, index_dtype
from cggr.spec.config import RoutingConfig
from cggr.spec.division import quotient
from cggr.spec.hashing import inverse_uniform, uniform_bits

MAX_TOKENS = 1 << 29  # so that every sum of a token count and a capacity stays within int32
_LARGEST_IMPORTANCE = 2.0**100  # times any 1/u stays finite in float32


class Selection(NamedTuple):
    """The tokens to learn from.

    Attributes:
        mask: bool, of the difficulty's shape.
        indices: int32 ``(C,)``, ascending flat indices; unused slots hold ``B S``, one past the
            last token. With ``scope="sequence"`` ``(B, C)`` positions in the row, unused: ``S``.
        weights: float32, of the indices' shape: 1, or the weight that makes a sum over the
            selection an unbiased estimate of the sum over all; 0 in unused slots.
        count: int32, selected tokens: a scalar, or ``(B,)`` with ``scope="sequence"``.
        ratio: int32 ``(1,)``, the ratio asked for, in units of ``2**-14``.
    """

    mask: Any
    indices: Any
    weights: Any
    count: Any
    ratio: Any


def select_tokens(
    difficulty: Any,
    config: RoutingConfig,
    *,
    step: Any = 0,
    draw: Any = None,
    rank: Any = 0,
    eligible: Any = None,
    confidence: Any = None,
    capacity: int | None = None,
    xp: Any = None,
) -> Selection:
    """Select about ``ratio`` of the eligible tokens by the rule ``config.selection``.

    ``k = ceil(n_eligible ratio)``, at least 1 if anything is eligible. Ties go to the lower flat
    index, NaN ranks as the hardest, -0.0 equals 0.0; the result is bit-identical on every backend.

    - ``topk``, ``fixed_quota``: the k hardest.
    - ``stratified``: the ranking is cut into `num_strata` equal parts; harder parts get
      proportionally larger quotas (4 : 3 : 2 : 1); inside a part the sample is uniform.
    - ``sequence_aware``: first the `min_tokens_per_sequence` hardest of every sequence, then the
      globally hardest until k; k rises only if the floors alone exceed it.
    - ``importance``: priority sampling. With ``q = max(difficulty, 0) + importance_floor`` and u
      uniform, the k largest ``q / u`` are kept with weight ``max(1, τ / q)``, τ the (k+1)-th: the
      weighted sum over the selection is an unbiased estimate of the sum over all.
    - ``random``: a uniform sample, the control that every claim needs.

    Args:
        difficulty: Scores, higher is harder, floating ``(B, S)`` or ``(S,)`` for one sequence;
            ranked in float32.
        config: The routing options.
        step: Optimizer step, for the ratio's warm-up: a Python int or an int32 array of one
            element.
        draw: Number of the training forward, for the sampling rules, of which another number is
            another sample; like `step`, which it is when None.
        rank: Rank of the process, so that ranks draw independently; like `step`.
        eligible: Which tokens may be selected, bool of the difficulty's shape; all when None.
        confidence: Top probability of every token, of the difficulty's shape; without it the
            ratio does not follow the batch's confidence, whatever `dynamic_threshold` says.
        capacity: Slots C per group, a static Python int from :meth:`RoutingConfig.capacity`; k is
            at most C. None takes C = k, which reads the count on the host: it synchronises, and
            cannot be traced by jit.
        xp: Array namespace of the arrays; found from `difficulty` when None.

    Returns:
        :class:`Selection`.

    Raises:
        TypeError: `difficulty` is not floating or `eligible` not bool.
        ValueError: Shapes disagree, `step` is a negative int, `capacity` is not within 0 and the
            group's size, or it is None and more is eligible than the options say that there may be.

    Example:
        >>> import numpy as np
        >>> difficulty = np.array([[0.1, 3.0, 2.0, 0.2]], dtype=np.float32)
        >>> config = RoutingConfig(selection="topk", min_tokens_ratio=0.5, warmup_steps=0)
        >>> select_tokens(difficulty, config).indices.tolist()
        [1, 2]

    References:
        Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary subset sums",
        J. ACM 54(6), 2007.
    """
    xp = array_namespace(difficulty) if xp is None else xp
    difficulty, eligible = _checked(difficulty, eligible, confidence, xp)
    if isinstance(step, int) and step < 0:
        raise ValueError(f"step must not be negative, got {step}.")
    if capacity is None:
        check_eligible(eligible, config, xp=xp)
    step = _as_word(step, difficulty, xp)
    ratio = schedule.token_ratio(config, step, confidence, eligible, xp=xp)
    return select_at_ratio(
        difficulty,
        config,
        ratio,
        draw=step if draw is None else draw,
        rank=rank,
        eligible=eligible,
        capacity=capacity,
        xp=xp,
    )


def select_at_ratio(
    difficulty: Any,
    config: RoutingConfig,
    ratio: Any,
    *,
    draw: Any = 0,
    rank: Any = 0,
    eligible: Any = None,
    capacity: int | None = None,
    xp: Any = None,
) -> Selection:
    """:func:`select_tokens` at a given ratio, an int32 array ``(1,)`` in units of ``2**-14``."""
    xp = array_namespace(difficulty) if xp is None else xp
    difficulty, eligible = _checked(difficulty, eligible, None, xp)
    shape = difficulty.shape
    n_sequences, length = shape if len(shape) == 2 else (1, shape[0])
    groups, size = (1, n_sequences * length) if config.scope == "batch" else (n_sequences, length)
    if capacity is not None and not 0 <= capacity <= size:
        raise ValueError(f"capacity must be in [0, {size}] for {size} tokens, got {capacity}.")

    key_RM = xp.reshape(xp.astype(difficulty, xp.float32), (groups, size))
    key_RM = xp.where(xp.isnan(key_RM), float("inf"), key_RM)
    key_RM = xp.where(key_RM == 0, 0.0, key_RM)  # -0.0 becomes 0.0
    ineligible_RM = xp.reshape(xp.astype(~eligible, xp.int32), (groups, size))
    n_R = size - _sum(ineligible_RM, xp)
    k_R = _capped(schedule.token_count(n_R, ratio, xp=xp), capacity, xp)

    weights_RM = xp.ones_like(key_RM)
    if config.selection in ("topk", "fixed_quota"):
        rank_RM = _ranks((ineligible_RM, -key_RM), xp)
    elif config.selection == "sequence_aware":
        beyond_RM = _beyond_floor(key_RM, ineligible_RM, n_sequences, config, xp)
        k_R = _capped(xp.maximum(k_R, size - _sum(beyond_RM, xp)), capacity, xp)
        rank_RM = _ranks((ineligible_RM, beyond_RM, -key_RM), xp)
    else:
        index_RM = xp.reshape(
            xp.arange(groups * size, dtype=xp.int32, device=device_of(difficulty)), (groups, size)
        )
        bits_RM = uniform_bits(config.seed, draw, rank, index_RM, xp=xp)
        if config.selection == "random":
            rank_RM = _ranks((ineligible_RM, bits_RM), xp)
        elif config.selection == "stratified":
            unsampled_RM = _outside_strata(key_RM, ineligible_RM, bits_RM, n_R, k_R, config, xp)
            rank_RM = _ranks((ineligible_RM, unsampled_RM), xp)
        else:
            rank_RM, weights_RM = _priority_sample(key_RM, ineligible_RM, bits_RM, k_R, config, xp)

    mask_RM = rank_RM < k_R[:, None]
    if capacity is None:
        capacity = int(xp.max(k_R)) if groups else 0
    indices_RC, weights_RC = _slots(mask_RM, weights_RM, k_R, capacity, xp)
    mask = xp.reshape(mask_RM, shape)
    if config.scope == "sequence" and len(shape) == 2:
        return Selection(mask, indices_RC, weights_RC, k_R, ratio)
    return Selection(mask, indices_RC[0, :], weights_RC[0, :], k_R[0, ...], ratio)


def check_eligible(eligible: Any, config: RoutingConfig, *, xp: Any) -> None:
    """Refuse more eligible tokens than the options say that there may be; synchronises then."""
    n_tokens = math.prod(eligible.shape)
    if config.max_eligible_ratio == 1 or not n_tokens:
        return
    is_row = config.scope == "sequence" and len(eligible.shape) == 2
    groups = eligible.shape[0] if is_row else 1
    size = n_tokens // groups
    of_group_RM = xp.reshape(xp.astype(eligible, xp.int32), (groups, size))
    n_eligible = int(xp.max(_sum(of_group_RM, xp)))
    if n_eligible > config.most_eligible(size):
        where = "batch" if config.scope == "batch" else "sequence"
        raise ValueError(
            f"max_eligible_ratio must be the largest part of a {where}'s tokens that are eligible, "
            f"got {config.max_eligible_ratio}, where {n_eligible} of {size} are; without labels, "
            f"all are."
        )


def _checked(difficulty: Any, eligible: Any, confidence: Any, xp: Any) -> tuple[Any, Any]:
    if len(difficulty.shape) not in (1, 2):
        raise ValueError(
            f"difficulty must have shape (B, S) or (S,), got {tuple(difficulty.shape)}."
        )
    if not xp.isdtype(difficulty.dtype, "real floating"):
        raise TypeError(f"difficulty must be floating, got {difficulty.dtype}.")
    size = math.prod(difficulty.shape)
    if size > MAX_TOKENS:
        raise ValueError(f"difficulty must have at most {MAX_TOKENS} tokens, got {size}.")
    if eligible is None:
        eligible = xp.ones_like(difficulty, dtype=xp.bool)
    for name, array in (("eligible", eligible), ("confidence", confidence)):
        if array is not None and array.shape != difficulty.shape:
            raise ValueError(
                f"{name} must have the difficulty's shape {tuple(difficulty.shape)}, "
                f"got {tuple(array.shape)}."
            )
    if eligible.dtype != xp.bool:
        raise TypeError(f"eligible must be bool, got {eligible.dtype}.")
    return difficulty, eligible


def _as_word(value: Any, like: Any, xp: Any) -> Any:
    if isinstance(value, int):
        return xp.full((1,), value, dtype=xp.int32, device=device_of(like))
    return xp.astype(xp.reshape(value, (1,)), xp.int32)


def _sum(x: Any, xp: Any) -> Any:
    return xp.sum(x, axis=-1, dtype=xp.int32)


def _capped(k_R: Any, capacity: int | None, xp: Any) -> Any:
    return k_R if capacity is None else xp.minimum(k_R, xp.full_like(k_R, capacity))


def _argsort(keys: Sequence[Any], xp: Any) -> Any:
    """Order of the last axis by the first key, its ties by the second and so on, then by index."""
    order = xp.argsort(keys[-1], axis=-1, stable=True)
    for key in reversed(keys[:-1]):
        inner = xp.argsort(xp.take_along_axis(key, order, axis=-1), axis=-1, stable=True)
        order = xp.take_along_axis(order, inner, axis=-1)
    return order


def _ranks(keys: Sequence[Any], xp: Any) -> Any:
    """Place of every element in that order; the inverse permutation, without a scatter."""
    return xp.astype(xp.argsort(_argsort(keys, xp), axis=-1, stable=True), xp.int32)


def _slots(mask_RM: Any, weights_RM: Any, k_R: Any, capacity: int, xp: Any) -> tuple[Any, Any]:
    size = mask_RM.shape[-1]
    selected_first = xp.argsort(xp.astype(~mask_RM, xp.int32), axis=-1, stable=True)
    order_RC = selected_first[:, :capacity]
    slot_C = xp.arange(capacity, dtype=xp.int32, device=device_of(mask_RM))
    used_RC = slot_C[None, :] < k_R[:, None]
    indices_RC = xp.astype(order_RC, xp.int32)
    indices_RC = xp.where(used_RC, indices_RC, size)
    weights_RC = xp.take_along_axis(weights_RM, order_RC, axis=-1)
    return indices_RC, xp.where(used_RC, weights_RC, 0.0)


def _beyond_floor(
    key_RM: Any, ineligible_RM: Any, n_sequences: int, config: RoutingConfig, xp: Any
) -> Any:
    """0 for the tokens that every sequence keeps whatever the ranking says; 1 for others."""
    groups, size = key_RM.shape
    length = groups * size // n_sequences if n_sequences else 0
    key_BS, ineligible_BS = (xp.reshape(x, (n_sequences, length)) for x in (key_RM, ineligible_RM))
    rank_BS = _ranks((ineligible_BS, -key_BS), xp)
    floor = min(config.min_tokens_per_sequence, length)
    beyond_BS = xp.astype((ineligible_BS > 0) | (rank_BS >= floor), xp.int32)
    return xp.reshape(beyond_BS, (groups, size))


def _outside_strata(
    key_RM: Any,
    ineligible_RM: Any,
    bits_RM: Any,
    n_R: Any,
    k_R: Any,
    config: RoutingConfig,
    xp: Any,
) -> Any:
    """0 for the tokens sampled from the strata, exactly k of them; 1 for others."""
    n_strata = config.num_strata
    rank_RM = _ranks((ineligible_RM, -key_RM), xp)
    # Strata are runs of the ranking, hardest first; the first n % L are one token longer.
    shorter_R = n_R // n_strata
    longer_R = n_R - shorter_R * n_strata
    border_RM = (longer_R * (shorter_R + 1))[:, None]
    shorter_RM = xp.maximum(shorter_R, xp.ones_like(shorter_R))[:, None]
    stratum_RM = xp.where(
        rank_RM < border_RM,
        rank_RM // (shorter_R + 1)[:, None],
        longer_R[:, None] + (rank_RM - border_RM) // shorter_RM,
    )
    # Ineligible tokens lie beyond the last stratum; the clip only keeps the index in range.
    stratum_RM = xp.minimum(stratum_RM, xp.full_like(stratum_RM, n_strata - 1))

    stratum_L = xp.arange(n_strata, dtype=xp.int32, device=device_of(key_RM))
    size_RL = shorter_R[:, None] + xp.astype(stratum_L[None, :] < longer_R[:, None], xp.int32)
    start_RL = stratum_L[None, :] * shorter_R[:, None] + xp.minimum(
        stratum_L[None, :], longer_R[:, None]
    )
    quota_RL = _stratum_quotas(size_RL, k_R, xp)

    # Place in the order (eligible first, stratum, random) minus the stratum's start.
    place_RM = _ranks((ineligible_RM, stratum_RM, bits_RM), xp)
    start_RM, quota_RM = (
        xp.take_along_axis(x, xp.astype(stratum_RM, index_dtype(xp)), axis=-1)
        for x in (start_RL, quota_RL)
    )
    return xp.astype(place_RM - start_RM >= quota_RM, xp.int32)


def _stratum_quotas(size_RL: Any, k_R: Any, xp: Any) -> Any:
    """How many of the k tokens each stratum gives: proportional to L, L - 1, ..., 1.

    Largest remainder; capped by the stratum's size, the overflow passed to the next easier one.
    Overflow comes before room: quotas q do not grow with i and sizes s differ by at most one, so
    room in h and overflow in a later i would mean ``q_h < s_h <= s_i + 1 <= q_i``. Hence the first
    i strata together give ``min(q_1 + ... + q_i, s_1 + ... + s_i)``, and all give k.
    """
    n_strata = size_RL.shape[-1]
    stratum_L = xp.arange(n_strata, dtype=xp.int32, device=device_of(size_RL))
    share_L = n_strata - stratum_L
    shares = n_strata * (n_strata + 1) // 2
    k_R1 = k_R[:, None]
    scaled_RL = (k_R1 % shares) * share_L[None, :]  # k share_L, without its multiples of `shares`
    quota_RL = (k_R1 // shares) * share_L[None, :] + scaled_RL // shares
    left_R1 = k_R1 - _sum(quota_RL, xp)[:, None]
    quota_RL = quota_RL + xp.astype(_ranks((-(scaled_RL % shares),), xp) < left_R1, xp.int32)

    up_to_LL = stratum_L[None, :] <= stratum_L[:, None]
    given_RL = xp.minimum(_running_sum(quota_RL, up_to_LL, xp), _running_sum(size_RL, up_to_LL, xp))
    before_RL = xp.concat((xp.zeros_like(given_RL[:, :1]), given_RL[:, :-1]), axis=-1)
    return given_RL - before_RL


def _running_sum(x_RL: Any, up_to_LL: Any, xp: Any) -> Any:
    x_RLL = xp.where(up_to_LL[None, :, :], x_RL[:, None, :], 0)
    return _sum(x_RLL, xp)


def _priority_sample(
    key_RM: Any, ineligible_RM: Any, bits_RM: Any, k_R: Any, config: RoutingConfig, xp: Any
) -> tuple[Any, Any]:
    """Ranks by priority q / u, and the weight max(1, τ / q) of every token."""
    certain_RM = key_RM == float("inf")  # a numerical fault: always kept, with weight 1
    q_RM = xp.where(key_RM > 0, key_RM, 0.0) + config.importance_floor
    q_RM = xp.minimum(q_RM, xp.full_like(q_RM, _LARGEST_IMPORTANCE))
    priority_RM = q_RM * inverse_uniform(bits_RM, xp=xp)
    order_RM = xp.where(certain_RM, -float("inf"), -priority_RM)
    rank_RM = _ranks((ineligible_RM, order_RM), xp)
    is_next_RM = (rank_RM == k_R[:, None]) & (ineligible_RM == 0) & ~certain_RM
    # A sum of one term and zeros, which any order of addition gives exactly.
    tau_R = xp.sum(xp.where(is_next_RM, priority_RM, 0.0), axis=-1)
    # Of what is selected τ / q is at most 1 / u; of the rest the weight is not asked.
    weight_RM = quotient(tau_R[:, None], q_RM, xp=xp)
    return rank_RM, xp.where(certain_RM | (weight_RM < 1), 1.0, weight_RM)
