"""Loss, entropy, confidence, margin and error norm of every row of logits, in one pass over them.

With ``M = max x``, ``e_v = exp(x_v - M)`` and ``rest = Σ e_v`` over all classes but one largest::

    nll        = log1p(rest) - (x_y - M)            confidence = 1 / (1 + rest)
    entropy    = log1p(rest) - Σ e (x - M) / (1 + rest)
    margin     = (1 - e_(2)) / (1 + rest)
    error_norm = sqrt((Σ_{v≠y} e)² + Σ_{v≠y} e²) / (1 + rest)

1. A program takes a row. Its threads (*lanes*) walk over it in steps of a tile, each with its own
   running maximum: nothing is exchanged between them before the end of the row.
2. A lane's part of a tile is a *group*: the lane's sums are rescaled once a group, and a logit
   costs one multiply-add and one exponential. The sums of the group that holds the lane's maximum
   are kept apart from those of its other groups.
3. At the end the lanes are joined. The one group that holds the row's maximum is read again and
   summed without that maximum: what a sure model gives to the other classes would be lost if it
   were added to the maximum's own 1.
4. A row with logits of -inf, which the quick arithmetic turns into NaN, or beyond half a million,
   where it loses precision, is read a second time with a careful one.

Rows may begin anywhere: tiles begin at a multiple of 16 bytes, and what is left of the row before
and after them is one narrower, masked tile.

Legend: ``L`` lanes, ``U`` vectors of ``E`` elements that a lane holds of a tile, ``G = U E``.
"""

import triton
import triton.language as tl

from .arithmetic import (
    LOG2_E,
    Launch,
    capped_logits,
    clamped,
    exponent_of,
    store_statistics,
    store_sums,
    sum_of,
)

# Of a row's maximum: beyond it, its product with log2(e) is rounded by more than a 16th.
FUSED_LIMIT = tl.constexpr(2.0**19)


def token_statistics_launch(
    n_rows: int,
    n_classes: int,
    stride: int,
    itemsize: int,
    *,
    has_target: bool,
    ignore_index: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    offset: int = 0,
    sums: bool = False,
) -> Launch:
    """Launch of :func:`token_statistics_kernel`.

    Args:
        n_rows: N.
        n_classes: V.
        stride: Elements from a row of logits to the next.
        itemsize: Bytes of a logit.
        has_target: Whether there are targets; without, nll and error norm are not written.
        ignore_index: Target whose nll and error norm are 0.
        logit_scale: Factor of the logits, before the soft-cap.
        softcap: Soft-cap of the logits; none when None.
        offset: Elements from the kernel's pointer, a multiple of 16 bytes, to the first row.
        sums: Store what :func:`store_sums` says instead of statistics.
    """
    # Few lanes cost the least at the end of a row; many keep the sums of a long one short.
    lanes = 32 if n_classes < 1024 else 64 if n_classes < 100_000 else 128
    constants = {
        "V": n_classes,
        "STRIDE": stride,
        "OFFSET": offset,
        "HAS_TARGET": has_target,
        "IGNORE_INDEX": ignore_index,
        "SCALE": float(logit_scale),
        "SOFTCAP": float(softcap or 0.0),
        "SUMS": sums,
        "E": 16 // itemsize,
        "L": lanes,
        "U": 4,
    }
    return Launch((n_rows,), constants, num_warps=lanes // 32)


@triton.jit
def _load_vectors(ptr, n_elements, L: tl.constexpr, E: tl.constexpr, MASKED: tl.constexpr):
    """A vector a lane, from a multiple of 16 bytes, as they lie in memory; bfloat16 in pairs."""
    if ptr.dtype.element_ty == tl.bfloat16:
        ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        W: tl.constexpr = E // 2
        NOTHING: tl.constexpr = -8323200  # -inf twice
    else:
        W: tl.constexpr = E
        NOTHING: tl.constexpr = -float("inf")
    lane_L = tl.arange(0, L)
    ptr_LW = ptr + lane_L[:, None] * W + tl.arange(0, W)[None, :]
    if MASKED:
        return tl.load(ptr_LW, mask=lane_L[:, None] * E < n_elements, other=NOTHING)
    else:
        return tl.load(ptr_LW)


@triton.jit
def _load_tile(ptr, L: tl.constexpr, U: tl.constexpr, E: tl.constexpr):
    """`U` vectors a lane, joined so that a lane's lie side by side: (L, group)."""
    tl.static_assert(U == 1 or U == 2 or U == 4)
    if U == 1:
        return _load_vectors(ptr, 0, L, E, False)
    else:
        HALF: tl.constexpr = U // 2
        first = _load_tile(ptr, L, HALF, E)
        return _beside(first, _load_tile(ptr + HALF * L * E, L, HALF, E))


@triton.jit
def _beside(first_LX, second_LX):
    return tl.reshape(tl.join(first_LX, second_LX), [first_LX.shape[0], 2 * first_LX.shape[1]])


@triton.jit
def _widened(x_LX):
    """float32 of what was loaded: one instruction an element, where a cast of bfloat16 is two."""
    if x_LX.dtype == tl.int32:
        low = (x_LX << 16).to(tl.float32, bitcast=True)
        return _beside(low, (x_LX & -65536).to(tl.float32, bitcast=True))
    else:
        return x_LX.to(tl.float32)


@triton.jit
def _better_of(top_a, second_a, place_a, top_b, second_b, place_b):
    """Of two sets of groups: the largest maximum, the second largest, the place of the largest."""
    first = (top_a > top_b) | ((top_a == top_b) & (place_a < place_b))
    second = tl.maximum(tl.maximum(second_a, second_b), tl.minimum(top_a, top_b))
    return tl.maximum(top_a, top_b), second, tl.where(first, place_a, place_b)


@triton.jit
def _no_lanes(L: tl.constexpr):
    nothing = tl.zeros((L,), tl.float32)
    top = tl.full((L,), -float("inf"), tl.float32)
    # Finite and below any other: the difference to another times a sum of 0 is 0.
    reference = tl.full((L,), -3.4028234663852886e38, tl.float32)
    best = tl.zeros((L,), tl.int32)
    return top, top, best, reference, nothing, nothing, nothing, nothing, nothing, nothing


@triton.jit
def _log2_e(like):
    return tl.full(like.shape, LOG2_E, tl.float32)


@triton.jit
def _reference(top, CAREFUL: tl.constexpr):
    """``log2(e) top``, or the maximum itself where that product's rounding would be felt."""
    if CAREFUL:
        return top
    else:
        # As a fused operation: a compiler may not fuse it with what subtracts the reference, which
        # must be the same number for all.
        return tl.fma(top, _log2_e(top), tl.zeros(top.shape, tl.float32))


@triton.jit
def _absorb(lanes, x_LG, tile, CLAMP: tl.constexpr, CAREFUL: tl.constexpr):
    """Take a tile into the lanes.

    Of a lane: its maximum `top`; the largest maximum `second` of its groups but the best; the tile
    `best` of the best group; the `reference` to which its exponents are relative (see
    :func:`_reference`); the sums of ``e``, ``e log2(e)`` and ``e²`` over its groups but the best,
    and over the best.
    """
    top, second, best, reference, s, t, q, best_s, best_t, best_q = lanes
    group_top = tl.max(x_LG, axis=1)
    better = group_top > top
    second = tl.maximum(second, tl.minimum(top, group_top))
    top = tl.maximum(top, group_top)
    before = reference
    reference = _reference(top, CAREFUL)
    if CLAMP:
        reference = tl.where(top == -float("inf"), before, reference)
    if CAREFUL:
        exponent, shift = (x_LG - reference[:, None]) * LOG2_E, (before - reference) * LOG2_E
    else:
        exponent = tl.fma(x_LG, _log2_e(x_LG), -reference[:, None])
        shift = before - reference
    if CLAMP:
        exponent, shift = clamped(exponent), clamped(shift)
    e = tl.exp2(exponent)
    group_s = tl.sum(e, axis=1)
    group_t = tl.sum(e * exponent, axis=1)
    group_q = tl.sum(e * e, axis=1)
    # Where the group is better, what was best until now joins the others and all of them shrink.
    # Elsewhere it is the group itself that joins them, with a shift of 0 and a scale of 1.
    scale = tl.exp2(shift)
    s += tl.where(better, best_s, group_s)
    t = scale * (t + tl.where(better, best_t, group_t) + shift * s)
    q = scale * scale * (q + tl.where(better, best_q, group_q))
    s *= scale
    best_s = tl.where(better, group_s, best_s)
    best_t = tl.where(better, group_t, best_t)
    best_q = tl.where(better, group_q, best_q)
    best = tl.where(better, tile, best)
    return top, second, best, reference, s, t, q, best_s, best_t, best_q


@triton.jit
def _edge_column(position, head, INNER: tl.constexpr):
    """Column of a position beyond the inner tiles: the row's head, then what follows them."""
    return tl.where(position < INNER + head, position - INNER, position)


@triton.jit
def _row_sums(
    row_ptr,
    aligned_ptr,
    head,
    V: tl.constexpr,
    INNER: tl.constexpr,
    IN_VECTORS: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    U: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAREFUL: tl.constexpr,
):
    """Maximum of the row, where its group is, largest of the other groups' maxima, their sums."""
    TILE: tl.constexpr = U * L * E
    lane_L = tl.arange(0, L)
    lanes = _no_lanes(L)
    if INNER > 0:
        following = _load_tile(aligned_ptr, L, U, E)
        for tile in range(0, INNER - TILE, TILE):
            x_LG = capped_logits(_widened(following), SCALE, SOFTCAP)
            following = _load_tile(aligned_ptr + (tile + TILE), L, U, E)
            lanes = _absorb(lanes, x_LG, tile, CAREFUL, CAREFUL)
        x_LG = capped_logits(_widened(following), SCALE, SOFTCAP)
        lanes = _absorb(lanes, x_LG, INNER - TILE, CAREFUL, CAREFUL)
    for tile in range(INNER, V, L * E):
        position = tile + lane_L[:, None] * E + tl.arange(0, E)[None, :]
        if IN_VECTORS:
            x_LE = _widened(_load_vectors(aligned_ptr + tile, V - tile, L, E, True))
        else:
            column = _edge_column(position, head, INNER)
            x_LE = tl.load(row_ptr + column, mask=position < V, other=-float("inf")).to(tl.float32)
        if SCALE != 1.0 or SOFTCAP > 0.0:
            x_LE = tl.where(position < V, capped_logits(x_LE, SCALE, SOFTCAP), -float("inf"))
        lanes = _absorb(lanes, x_LE, tile, True, CAREFUL)

    top, second, best, reference, s, t, q, best_s, best_t, best_q = lanes
    # NaN is left to the sums: with it, no order would be one.
    row_top, second, place = tl.reduce((top, second, best // E + lane_L), 0, _better_of)
    is_best = best // E + lane_L == place
    if CAREFUL:
        # A row of -inf alone may be a part of one that is not: its sums are 0, and stay it.
        origin = tl.where(row_top == -float("inf"), reference, row_top)
        shift = clamped((reference - origin) * LOG2_E)
    else:
        # Relative to the row's own maximum, of which the reference is a rounding.
        row_reference = _reference(row_top, False)
        rounding = tl.fma(row_top, _log2_e(row_top), -row_reference)
        shift = clamped(reference - row_reference - rounding)
    scale = tl.exp2(shift)
    s += tl.where(is_best, 0.0, best_s)
    t += tl.where(is_best, 0.0, best_t)
    q += tl.where(is_best, 0.0, best_q)
    rest, weighted, squares = tl.reduce(
        (scale * s, scale * (t + shift * s), scale * scale * q), 0, sum_of
    )
    return row_top, place, second, rest, weighted, squares


@triton.jit
def token_statistics_kernel(
    logits_ptr,
    target_ptr,
    out_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUMS: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    U: tl.constexpr,
):
    """Statistics, or sums, of logits ``(N, V)`` and targets ``(N,)``.

    As :func:`store_statistics` and :func:`store_sums` say.
    """
    row = tl.program_id(0).to(tl.int64)
    start = row * STRIDE + OFFSET
    row_ptr = logits_ptr + start
    target, label_logit = tl.full((), 0, tl.int64), 0.0
    if HAS_TARGET:
        target = tl.load(target_ptr + row).to(tl.int64)
        in_range = (target >= 0) & (target < V)
        label = tl.load(row_ptr + target, mask=in_range, other=0.0).to(tl.float32)
        label_logit = capped_logits(label, SCALE, SOFTCAP)
    TILE: tl.constexpr = U * L * E
    if STRIDE % E == 0 and OFFSET % E == 0:
        aligned = start
        INNER: tl.constexpr = V // TILE * TILE
    else:
        aligned = (start + (E - 1)) // E * E
        INNER: tl.constexpr = max(V - E + 1, 0) // TILE * TILE
    aligned_ptr = logits_ptr + aligned
    head = (aligned - start).to(tl.int32)
    IN_VECTORS: tl.constexpr = (STRIDE % E == 0) and (OFFSET % E == 0) and (V % E == 0)

    top, place, second, rest, weighted, squares = _row_sums(
        row_ptr, aligned_ptr, head, V, INNER, IN_VECTORS, E, L, U, SCALE, SOFTCAP, CAREFUL=False
    )
    if not ((tl.abs(weighted) + squares < float("inf")) & (tl.abs(top) < FUSED_LIMIT)):
        top, place, second, rest, weighted, squares = _row_sums(
            row_ptr, aligned_ptr, head, V, INNER, IN_VECTORS, E, L, U, SCALE, SOFTCAP, CAREFUL=True
        )

    # The best group again, without its maximum.
    j = tl.arange(0, U * E)
    first = place // L * (L * E) + place % L * E
    is_inner = first < INNER
    position = first + j // E * (L * E) + j % E
    column = tl.where(is_inner, position + head, _edge_column(position, head, INNER))
    valid = is_inner | ((j < E) & (position < V))
    x = tl.load(row_ptr + column, mask=valid, other=0.0).to(tl.float32)
    x = tl.where(valid, capped_logits(x, SCALE, SOFTCAP), -float("inf"))
    x = tl.where(j == tl.min(tl.where(x == top, j, U * E), axis=0), -float("inf"), x)
    second = tl.maximum(second, tl.max(x, axis=0))
    exponent = exponent_of(x, top)
    e = tl.exp2(exponent)
    group_s, group_t, group_q = tl.reduce((e, e * exponent, e * e), 0, sum_of)
    rest, weighted, squares = rest + group_s, weighted + group_t, squares + group_q
    n_rows = tl.num_programs(0)
    if SUMS:
        store_sums(out_ptr, n_rows, row, True, top, second, rest, weighted, squares, label_logit)
    else:
        store_statistics(
            out_ptr,
            n_rows,
            row,
            True,
            top,
            second,
            rest,
            weighted,
            squares,
            label_logit,
            target,
            V,
            HAS_TARGET,
            IGNORE_INDEX,
        )
