"""The statistics of a linear head's logits, which are never in memory.

1. A program multiplies a block of rows with one tile of classes after another, a *split* of all
   classes, and takes each tile of logits into its rows' sums: the maximum and the second largest,
   ``Σ e``, ``Σ e log2(e)`` and ``Σ e²`` over all classes but one largest, and the label's logit.
2. A second kernel joins the splits and makes statistics of the sums.

Reads hidden and weight, writes 24 bytes a row and split: the logits' traffic is saved, the products
are those of ``hidden weight^T``.

Legend: ``M`` rows of a block, ``C`` classes of a tile, ``K`` of the hidden size at a time.
"""

import triton
import triton.language as tl

from .arithmetic import LOG2_E, Launch, capped_logits, exponent_of, store_statistics, store_sums

_PROGRAMS = 132  # multiprocessors of an H100 or H200, one program on each
# Stands for -inf and all below: its differences and their products with an exponential of 0 are
# numbers. A row without a logit above it is NaN.
FLOOR = tl.constexpr(-1e30)


def linear_token_statistics_launch(
    n_rows: int,
    n_classes: int,
    hidden_size: int,
    *,
    has_target: bool,
    has_bias: bool,
    ignore_index: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sums: bool = False,
) -> tuple[Launch, Launch, int, int]:
    """Launches of :func:`linear_sums_kernel` and :func:`join_sums_kernel`.

    Args:
        n_rows: N.
        n_classes: V.
        hidden_size: D.
        has_target: Whether there are targets.
        has_bias: Whether there is a bias.
        ignore_index: Target whose nll and error norm are 0.
        logit_scale: Factor of the logits, before the soft-cap.
        softcap: Soft-cap of the logits; none when None.
        sums: Store what :func:`store_sums` says instead of statistics.

    Returns:
        Both launches, the number of splits, and the classes of a split.
    """
    rows, tile = 128, 256
    blocks, tiles = triton.cdiv(n_rows, rows), triton.cdiv(n_classes, tile)

    def idle(splits: int) -> float:  # share of the multiprocessors' time, and a little for joining
        programs = blocks * splits
        return 1 - programs / (triton.cdiv(programs, _PROGRAMS) * _PROGRAMS) + 0.01 * splits

    splits = min(range(1, min(tiles, 16) + 1), key=idle)
    split_classes = triton.cdiv(tiles, splits) * tile
    splits = triton.cdiv(n_classes, split_classes)
    common = {"V": n_classes, "HAS_TARGET": has_target}
    sum_up = Launch(
        (blocks, splits),
        common
        | {
            "D": hidden_size,
            "HAS_BIAS": has_bias,
            "SCALE": float(logit_scale),
            "SOFTCAP": float(softcap or 0.0),
            "M": rows,
            "C": tile,
            "K": 64,
        },
        num_warps=8,
        num_stages=3,
    )
    join = Launch(
        (triton.cdiv(n_rows, 128),),
        common | {"IGNORE_INDEX": ignore_index, "SUMS": sums, "M": 128},
        num_warps=4,
    )
    return sum_up, join, splits, split_classes


@triton.jit
def linear_sums_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    sums_ptr,
    n_rows,
    split_classes,
    V: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """Sums ``(splits, 6, N)`` of hidden ``(N, D)`` and weight ``(V, D)``."""
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    split = tl.program_id(1)
    # Rows and classes beyond the last are read as the last, and left out later.
    read_M = tl.minimum(row_M, n_rows - 1).to(tl.int64)
    k_K = tl.arange(0, K)
    hidden_MK = hidden_ptr + read_M[:, None] * D + k_K[None, :]
    target_M = tl.zeros((M,), tl.int32)
    if HAS_TARGET:
        target_M = tl.load(target_ptr + read_M).to(tl.int32)
        # A label among the classes of another part must not be found beyond the last of these.
        target_M = tl.where(target_M < V, target_M, -1)
    top_M = tl.full((M,), FLOOR, tl.float32)
    second_M = top_M
    rest_M = tl.zeros((M,), tl.float32)
    weighted_M, squares_M, label_M = rest_M, rest_M, rest_M
    first = split * split_classes
    for tile in range(first, min(first + split_classes, V), C):
        class_C = tile + tl.arange(0, C)
        read_C = tl.minimum(class_C, V - 1).to(tl.int64) if V % C != 0 else class_C.to(tl.int64)
        weight_CK = weight_ptr + read_C[:, None] * D + k_K[None, :]
        x_MC = tl.zeros((M, C), tl.float32)
        for k in range(0, D, K):
            if D % K == 0:
                h_MK, w_CK = tl.load(hidden_MK + k), tl.load(weight_CK + k)
            else:
                valid = (k + k_K < D)[None, :]
                h_MK = tl.load(hidden_MK + k, mask=valid, other=0.0)
                w_CK = tl.load(weight_CK + k, mask=valid, other=0.0)
            x_MC = tl.dot(h_MK, tl.trans(w_CK), x_MC)
        if HAS_BIAS:
            x_MC += tl.load(bias_ptr + read_C).to(tl.float32)[None, :]
        # Rounded as the same head's logits are where they are written: the probabilities that the
        # backward pass makes of them are then those that belong to this maximum.
        x_MC = x_MC.to(hidden_ptr.dtype.element_ty).to(tl.float32)
        x_MC = capped_logits(x_MC, SCALE, SOFTCAP)
        if V % C != 0:
            x_MC = tl.where((class_C < V)[None, :], x_MC, FLOOR)
        if HAS_TARGET:
            label_M += tl.sum(tl.where(class_C[None, :] == target_M[:, None], x_MC, 0.0), axis=1)

        x_MC = tl.maximum(x_MC, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        tile_top = tl.max(x_MC, axis=1)
        is_top = x_MC == tile_top[:, None]
        ties = tl.sum(is_top.to(tl.float32), axis=1) - 1.0
        x_MC = tl.where(is_top, FLOOR, x_MC)
        tile_second = tl.where(ties > 0.0, tile_top, tl.max(x_MC, axis=1))
        better = tile_top > top_M
        second_M = tl.maximum(second_M, tl.maximum(tile_second, tl.minimum(top_M, tile_top)))
        new_top = tl.maximum(top_M, tile_top)
        exponent = (x_MC - new_top[:, None]) * LOG2_E
        e = tl.exp2(exponent)
        top_exponent = exponent_of(tile_top, new_top)
        top_e = tl.exp2(top_exponent)
        # Of the two maxima, one stays apart; the lesser one and the tile's ties join the rest.
        joining = tl.where(tile_top == FLOOR, 0.0, ties + tl.where(better, 0.0, 1.0))
        top_M, rest_M, weighted_M, squares_M = _joined(
            top_M,
            rest_M,
            weighted_M,
            squares_M,
            new_top,
            tl.sum(e, axis=1) + joining * top_e,
            tl.sum(e * exponent, axis=1) + joining * top_e * top_exponent,
            tl.sum(e * e, axis=1) + joining * top_e * top_e,
        )

    sums_MS = sums_ptr + tl.cast(split * 6, tl.int64) * n_rows + row_M
    valid_M = row_M < n_rows
    tl.store(sums_MS, top_M, mask=valid_M)
    tl.store(sums_MS + n_rows, second_M, mask=valid_M)
    tl.store(sums_MS + 2 * n_rows, rest_M, mask=valid_M)
    tl.store(sums_MS + 3 * n_rows, weighted_M, mask=valid_M)
    tl.store(sums_MS + 4 * n_rows, squares_M, mask=valid_M)
    tl.store(sums_MS + 5 * n_rows, label_M, mask=valid_M)


@triton.jit
def _joined(top, rest, weighted, squares, new_top, more_rest, more_weighted, more_squares):
    """Sums relative to a new maximum, and more of them that already are.

    Where the maximum grew, the old one is no longer apart: it joins the rest.
    """
    own = tl.where((new_top > top) & (top > FLOOR), 1.0, 0.0)
    shift = exponent_of(top, new_top)
    scale = tl.exp2(shift)
    weighted = scale * (weighted + shift * (rest + own)) + more_weighted
    squares = scale * scale * (squares + own) + more_squares
    return new_top, scale * (rest + own) + more_rest, weighted, squares


@triton.jit
def join_sums_kernel(
    sums_ptr,
    target_ptr,
    out_ptr,
    n_rows,
    n_splits,
    V: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    SUMS: tl.constexpr,
    M: tl.constexpr,
):
    """Statistics, or sums, of the sums of all splits.

    As :func:`store_statistics` and :func:`store_sums` say.
    """
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    valid_M = row_M < n_rows
    top_M = tl.full((M,), FLOOR, tl.float32)
    second_M = top_M
    rest_M = tl.zeros((M,), tl.float32)
    weighted_M, squares_M, label_M = rest_M, rest_M, rest_M
    for split in range(n_splits):
        sums_MS = sums_ptr + tl.cast(split * 6, tl.int64) * n_rows + row_M
        other_top = tl.load(sums_MS, mask=valid_M, other=0.0)
        other_second = tl.load(sums_MS + n_rows, mask=valid_M, other=0.0)
        other_rest = tl.load(sums_MS + 2 * n_rows, mask=valid_M, other=0.0)
        other_weighted = tl.load(sums_MS + 3 * n_rows, mask=valid_M, other=0.0)
        other_squares = tl.load(sums_MS + 4 * n_rows, mask=valid_M, other=0.0)
        label_M += tl.load(sums_MS + 5 * n_rows, mask=valid_M, other=0.0)
        second_M = tl.maximum(tl.maximum(second_M, other_second), tl.minimum(top_M, other_top))
        new_top = tl.maximum(top_M, other_top)
        # Of two equal maxima the first stays apart.
        own = tl.where((other_top <= top_M) & (other_top > FLOOR), 1.0, 0.0)
        shift = exponent_of(other_top, new_top)
        scale = tl.exp2(shift)
        top_M, rest_M, weighted_M, squares_M = _joined(
            top_M,
            rest_M,
            weighted_M,
            squares_M,
            new_top,
            scale * (other_rest + own),
            scale * (other_weighted + shift * (other_rest + own)),
            scale * scale * (other_squares + own),
        )
    top_M = tl.where(top_M == FLOOR, -float("inf"), top_M)
    if SUMS:
        store_sums(
            out_ptr,
            n_rows,
            row_M,
            valid_M,
            top_M,
            second_M,
            rest_M,
            weighted_M,
            squares_M,
            label_M,
        )
    else:
        target_M = tl.zeros((M,), tl.int32)
        if HAS_TARGET:
            target_M = tl.load(target_ptr + row_M, mask=valid_M, other=0)
        store_statistics(
            out_ptr,
            n_rows,
            row_M,
            valid_M,
            top_M,
            second_M,
            rest_M,
            weighted_M,
            squares_M,
            label_M,
            target_M,
            V,
            HAS_TARGET,
            IGNORE_INDEX,
        )
