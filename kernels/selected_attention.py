"""Attention of queries at selected positions, with gradients for selected keys and values only.

Every query sees an interval of the keys, which says all of causality, windows and packed sequences;
of these, a mask may leave out keys that are padding.

1. Forward: a program multiplies a block of queries with one tile of keys after another, and keeps a
   running maximum and sum of a row (Milakov and Gimelshein 2018; Dao 2023), so that no scores are
   in memory. Tiles that no query of the block sees are left out; those that all of them see in full
   are not masked.
2. The gradient of queries goes the same way over keys again.
3. The gradient of keys and values is made for the positions that have queries: a program takes a
   tile of these, and one block after another of the queries that see any of them. What was not
   selected costs nothing.

Legend: ``B`` sequences of ``S`` tokens, of which ``C`` are run; ``H`` query heads, of which ``G``
share each of the ``K`` heads of keys and values; ``W`` size of a head, ``P`` the power of two above
it. ``M`` queries of a block, ``T`` keys of a tile. ``low``, ``high`` and ``index``, all ``(B, C)``
int32, are the first key that a query sees, the first behind the last, and the query's own position;
``keys`` ``(B, S)`` int32 is 0 for those that none sees, and not read unless MASKED_KEYS.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import LOG2_E, Launch, capped_logits

# Stands for -inf: its differences are numbers.
_FLOOR = tl.constexpr(-1e30)
_BEYOND = tl.constexpr(2147483647)


class AttentionLaunches(NamedTuple):
    """Launches of the three kernels.

    Attributes:
        forward: Of :func:`selected_attention_kernel`.
        query_gradient: Of :func:`query_gradient_kernel`.
        key_gradient: Of :func:`key_gradient_kernel`.
    """

    forward: Launch
    query_gradient: Launch
    key_gradient: Launch


def selected_attention_launches(
    batch: int,
    n_heads: int,
    n_kv_heads: int,
    n_rows: int,
    width: int,
    itemsize: int,
    scale: float,
    softcap: float | None = None,
    *,
    masked_keys: bool = False,
    compact: bool = False,
) -> AttentionLaunches:
    """How to launch the kernels.

    Args:
        batch: B.
        n_heads: H.
        n_kv_heads: K.
        n_rows: C.
        width: W, at most 256.
        itemsize: Bytes of an element of queries, keys and values.
        scale: Factor of the scores.
        softcap: Scores are ``softcap tanh(scale q k / softcap)``; without if None.
        masked_keys: Whether there are keys that no query sees.
        compact: Whether gradients of keys and values are those of the C positions alone.
    """
    padded = max(16, triton.next_power_of_2(width))
    common = {
        "H": n_heads,
        "K": n_kv_heads,
        "W": width,
        "P": padded,
        "SCALE": float(scale),
        "SOFTCAP": float(softcap or 0.0),
        "MASKED_KEYS": masked_keys,
        # float32 is multiplied as such, not as tf32.
        "PRECISION": "ieee" if itemsize == 4 else "tf32",
    }

    def launch(
        own: int, other: int, n_heads: int, names: str, warps: int, stages: int, **others: bool
    ) -> Launch:
        grid = (triton.cdiv(n_rows, own), batch * n_heads)
        tiles = dict(zip(names, (own, other), strict=True))
        return Launch(grid, common | others | tiles, warps, stages)

    if itemsize == 4 or padded > 128:
        return AttentionLaunches(
            launch(32, 32, n_heads, "MT", 4, 1),
            launch(32, 32, n_heads, "MT", 4, 1),
            launch(32, 32, n_kv_heads, "TM", 4, 1, COMPACT=compact),
        )
    # Within 5 % of the fastest of 12 to 24 on an H200, in bfloat16, whatever the shape.
    return AttentionLaunches(
        launch(64, 64, n_heads, "MT", 4, 3),
        launch(64, 32, n_heads, "MT", 4, 3),
        launch(64, 32, n_kv_heads, "TM", 4, 2, COMPACT=compact),
    )


@triton.jit
def _rows(ptr, row_M, stride, valid, MASKED: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Rows of one head ``(M, P)``, zeros beyond the head's size and, if MASKED, where not valid."""
    w_P = tl.arange(0, P)
    address = ptr + row_M[:, None].to(tl.int64) * stride + w_P[None, :]
    if MASKED and W != P:
        return tl.load(address, mask=valid[:, None] & (w_P < W)[None, :], other=0.0)
    elif MASKED:
        return tl.load(address, mask=valid[:, None], other=0.0)
    elif W != P:
        return tl.load(address, mask=(w_P < W)[None, :], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def _store_rows(ptr, row_M, stride, valid, x_MP, W: tl.constexpr, P: tl.constexpr):
    w_P = tl.arange(0, P)
    address = ptr + row_M[:, None].to(tl.int64) * stride + w_P[None, :]
    mask = valid[:, None]
    if W != P:
        mask = mask & (w_P < W)[None, :]
    tl.store(address, x_MP.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bounds(low_ptr, high_ptr, row_M, valid):
    """What each query of a block sees, and what any of them sees: its begin and its end."""
    low_M = tl.load(low_ptr + row_M, mask=valid, other=_BEYOND)
    high_M = tl.load(high_ptr + row_M, mask=valid, other=0)
    return low_M, high_M, tl.min(low_M, 0), tl.max(high_M, 0)


@triton.jit
def _unmasked(low_M, high_M, first, end, valid, MASKED_KEYS: tl.constexpr, T: tl.constexpr):
    """First and last border of the tiles between `first` and `end` that need no mask."""
    if MASKED_KEYS:
        return end, end
    else:
        low = tl.max(tl.where(valid, low_M, 0), 0)
        high = tl.min(tl.where(valid, high_M, _BEYOND), 0)
        from_ = tl.maximum(tl.minimum((low + T - 1) // T * T, end), first)
        return from_, tl.maximum(tl.minimum(high, end) // T * T, from_)


@triton.jit
def _part(part: tl.constexpr, first, from_, to, end):
    """Where the tiles before those that need no mask begin and end, these, and those behind."""
    if part == 0:
        return first, from_
    elif part == 1:
        return from_, to
    else:
        return to, end


@triton.jit
def _sees(low_M, high_M, key_T, keys_ptr, inside_T, MASKED_KEYS: tl.constexpr):
    """Which keys of a tile each query sees ``(M, T)``."""
    sees_MT = (key_T[None, :] >= low_M[:, None]) & (key_T[None, :] < high_M[:, None])
    if MASKED_KEYS:
        sees_MT &= (tl.load(keys_ptr + key_T, mask=inside_T, other=0) != 0)[None, :]
    return sees_MT


@triton.jit
def _scores(a_MP, b_TP, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of every row of one with every row of the other, times log2(e)."""
    s_MT = tl.dot(a_MP, tl.trans(b_TP), input_precision=PRECISION)
    if SOFTCAP > 0.0:
        return capped_logits(s_MT, SCALE, SOFTCAP) * LOG2_E
    else:
        return s_MT * (SCALE * LOG2_E)


@triton.jit
def _uncapped(ds, s, SOFTCAP: tl.constexpr):
    """The gradient of scores as that of products times SCALE."""
    if SOFTCAP > 0.0:
        share = s * (1.0 / (SOFTCAP * LOG2_E))
        ds *= 1.0 - share * share
    return ds


@triton.jit
def _forward_tile(
    q_MP, k_ptr, v_ptr, keys_ptr, start, low_M, high_M, top_M, sum_M, out_MP, stride_k, stride_v, S,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, MASKED_KEYS: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_T = start + tl.arange(0, T)
    inside_T = key_T < S  # always, without a mask
    k_TP = _rows(k_ptr, key_T, stride_k, inside_T, MASKED, W, P)
    s_MT = _scores(q_MP, k_TP, SCALE, SOFTCAP, PRECISION)
    if MASKED:
        sees_MT = _sees(low_M, high_M, key_T, keys_ptr, inside_T, MASKED_KEYS)
        s_MT = tl.where(sees_MT, s_MT, _FLOOR)
    new_M = tl.maximum(top_M, tl.max(s_MT, 1))
    p_MT = tl.exp2(s_MT - new_M[:, None])
    if MASKED:  # of a row that has seen nothing yet, the maximum is the floor itself
        p_MT = tl.where(sees_MT, p_MT, 0.0)
    shrink_M = tl.exp2(top_M - new_M)
    sum_M = sum_M * shrink_M + tl.sum(p_MT, 1)
    v_TP = _rows(v_ptr, key_T, stride_v, inside_T, MASKED, W, P)
    out_MP = tl.dot(
        p_MT.to(v_TP.dtype), v_TP, out_MP * shrink_M[:, None], input_precision=PRECISION
    )
    return new_M, sum_M, out_MP


@triton.jit
def selected_attention_kernel(
    q_ptr, k_ptr, v_ptr, low_ptr, high_ptr, keys_ptr, out_ptr, lse_ptr, C, S, stride_keys,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_ob, stride_oh, stride_o,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED_KEYS: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Mixed values ``(B, H, C, W)`` and ``log2 Σ exp(score)`` ``(B, H, C)``; zeros of no keys."""
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    kv = h // (H // K)
    # The last positions see the most: they begin first.
    row_M = (tl.num_programs(0) - 1 - tl.program_id(0)) * M + tl.arange(0, M)
    valid_M = row_M < C
    low_M, high_M, low, end = _bounds(low_ptr + b * C, high_ptr + b * C, row_M, valid_M)
    q_MP = _rows(q_ptr + b * stride_qb + h * stride_qh, row_M, stride_q, valid_M, True, W, P)
    k_ptr += b * stride_kb + kv * stride_kh
    v_ptr += b * stride_vb + kv * stride_vh
    keys_ptr += b * stride_keys
    top_M = tl.full((M,), _FLOOR, tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    out_MP = tl.zeros((M, P), tl.float32)
    first = tl.minimum(low, end) // T * T
    from_, to = _unmasked(low_M, high_M, first, end, valid_M, MASKED_KEYS, T)
    for part in tl.static_range(3):
        begin, stop = _part(part, first, from_, to, end)
        for start in range(begin, stop, T):
            top_M, sum_M, out_MP = _forward_tile(
                q_MP, k_ptr, v_ptr, keys_ptr, start, low_M, high_M, top_M, sum_M, out_MP, stride_k,
                stride_v, S, SCALE, SOFTCAP, part != 1, MASKED_KEYS, T, W, P, PRECISION,
            )  # fmt: skip
    seen_M = sum_M != 0.0
    sum_M = tl.where(seen_M, sum_M, 1.0)
    out_MP = out_MP / sum_M[:, None]
    _store_rows(out_ptr + b * stride_ob + h * stride_oh, row_M, stride_o, valid_M, out_MP, W, P)
    lse_M = tl.where(seen_M, top_M + tl.log2(sum_M), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * C + row_M, lse_M, mask=valid_M)


@triton.jit
def _query_gradient_tile(
    q_MP, g_MP, k_ptr, v_ptr, keys_ptr, start, low_M, high_M, lse_M, delta_M, dq_MP, stride_k,
    stride_v, S,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, MASKED_KEYS: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_T = start + tl.arange(0, T)
    inside_T = key_T < S
    k_TP = _rows(k_ptr, key_T, stride_k, inside_T, MASKED, W, P)
    v_TP = _rows(v_ptr, key_T, stride_v, inside_T, MASKED, W, P)
    s_MT = _scores(q_MP, k_TP, SCALE, SOFTCAP, PRECISION)
    p_MT = tl.exp2(s_MT - lse_M[:, None])
    if MASKED:
        sees_MT = _sees(low_M, high_M, key_T, keys_ptr, inside_T, MASKED_KEYS)
        p_MT = tl.where(sees_MT, p_MT, 0.0)
    dp_MT = tl.dot(g_MP, tl.trans(v_TP), input_precision=PRECISION)
    ds_MT = _uncapped(p_MT * (dp_MT - delta_M[:, None]), s_MT, SOFTCAP)
    return tl.dot(ds_MT.to(k_TP.dtype), k_TP, dq_MP, input_precision=PRECISION)


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, low_ptr, high_ptr, keys_ptr, out_ptr, lse_ptr, g_ptr, dq_ptr, delta_ptr,
    C, S, stride_keys,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_ob, stride_oh, stride_o, stride_gb, stride_gh, stride_g,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED_KEYS: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, in memory as the output, and ``Σ out g`` ``(B, H, C)``."""
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    kv = h // (H // K)
    row_M = (tl.num_programs(0) - 1 - tl.program_id(0)) * M + tl.arange(0, M)
    valid_M = row_M < C
    low_M, high_M, low, end = _bounds(low_ptr + b * C, high_ptr + b * C, row_M, valid_M)
    q_MP = _rows(q_ptr + b * stride_qb + h * stride_qh, row_M, stride_q, valid_M, True, W, P)
    g_MP = _rows(g_ptr + b * stride_gb + h * stride_gh, row_M, stride_g, valid_M, True, W, P)
    o_MP = _rows(out_ptr + b * stride_ob + h * stride_oh, row_M, stride_o, valid_M, True, W, P)
    # As a fused operation, so that a compiler does not fuse the product with the sum: threads that
    # hold the same row would differ in its last digit, and it would be chance whose is written.
    zero_MP = tl.zeros((M, P), tl.float32)
    delta_M = tl.sum(tl.fma(o_MP.to(tl.float32), g_MP.to(tl.float32), zero_MP), 1)
    rows = head.to(tl.int64) * C
    tl.store(delta_ptr + rows + row_M, delta_M, mask=valid_M)
    lse_M = tl.load(lse_ptr + rows + row_M, mask=valid_M, other=0.0)
    k_ptr += b * stride_kb + kv * stride_kh
    v_ptr += b * stride_vb + kv * stride_vh
    keys_ptr += b * stride_keys
    dq_MP = tl.zeros((M, P), tl.float32)
    first = tl.minimum(low, end) // T * T
    from_, to = _unmasked(low_M, high_M, first, end, valid_M, MASKED_KEYS, T)
    for part in tl.static_range(3):
        begin, stop = _part(part, first, from_, to, end)
        for start in range(begin, stop, T):
            dq_MP = _query_gradient_tile(
                q_MP, g_MP, k_ptr, v_ptr, keys_ptr, start, low_M, high_M, lse_M, delta_M, dq_MP,
                stride_k, stride_v, S, SCALE, SOFTCAP, part != 1, MASKED_KEYS, T, W, P, PRECISION,
            )  # fmt: skip
    dq_ptr += b * stride_ob + h * stride_oh
    _store_rows(dq_ptr, row_M, stride_o, valid_M, dq_MP * SCALE, W, P)


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, low_ptr, high_ptr, keys_ptr, index_ptr, lse_ptr, g_ptr, delta_ptr, dk_ptr,
    dv_ptr, C, S, stride_keys,
    stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k, stride_vb, stride_vh, stride_v,
    stride_gb, stride_gh, stride_g,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    COMPACT: tl.constexpr, T: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values ``(B, S, K, W)``, contiguous, at the positions of queries.

    With COMPACT ``(B, C, K, W)``. A position of S or more is nowhere, and has gradients of zero.
    """
    kv_head = tl.program_id(1)
    b, kv = (kv_head // K).to(tl.int64), kv_head % K
    slot_T = tl.program_id(0) * T + tl.arange(0, T)
    valid_T = slot_T < C
    low_ptr, high_ptr, index_ptr = low_ptr + b * C, high_ptr + b * C, index_ptr + b * C
    key_T = tl.load(index_ptr + slot_T, mask=valid_T, other=_BEYOND)
    used_T = key_T < S
    seen_T = used_T
    if MASKED_KEYS:
        seen_T = tl.load(keys_ptr + b * stride_keys + key_T, mask=used_T, other=0) != 0
    first_key, last_key = tl.min(key_T, 0), tl.max(tl.where(used_T, key_T, -1), 0)
    k_TP = _rows(k_ptr + b * stride_kb + kv * stride_kh, key_T, stride_k, used_T, True, W, P)
    v_TP = _rows(v_ptr + b * stride_vb + kv * stride_vh, key_T, stride_v, used_T, True, W, P)
    dk_TP = tl.zeros((T, P), tl.float32)
    dv_TP = tl.zeros((T, P), tl.float32)
    for start in range(0, C, M):
        row_M = start + tl.arange(0, M)
        valid_M = row_M < C
        low_M, high_M, low, end = _bounds(low_ptr, high_ptr, row_M, valid_M)
        if (low <= last_key) & (end > first_key):
            for h in range(kv * (H // K), (kv + 1) * (H // K)):
                rows = (b * H + h) * C
                q_MP = _rows(
                    q_ptr + b * stride_qb + h * stride_qh, row_M, stride_q, valid_M, True, W, P
                )
                g_MP = _rows(
                    g_ptr + b * stride_gb + h * stride_gh, row_M, stride_g, valid_M, True, W, P
                )
                lse_M = tl.load(lse_ptr + rows + row_M, mask=valid_M, other=0.0)
                delta_M = tl.load(delta_ptr + rows + row_M, mask=valid_M, other=0.0)
                s_TM = _scores(k_TP, q_MP, SCALE, SOFTCAP, PRECISION)
                p_TM = tl.exp2(s_TM - lse_M[None, :])
                sees_TM = (key_T[:, None] >= low_M[None, :]) & (key_T[:, None] < high_M[None, :])
                if MASKED_KEYS:
                    sees_TM &= seen_T[:, None]
                p_TM = tl.where(sees_TM, p_TM, 0.0)
                dv_TP = tl.dot(p_TM.to(g_MP.dtype), g_MP, dv_TP, input_precision=PRECISION)
                dp_TM = tl.dot(v_TP, tl.trans(g_MP), input_precision=PRECISION)
                ds_TM = _uncapped(p_TM * (dp_TM - delta_M[None, :]), s_TM, SOFTCAP)
                dk_TP = tl.dot(ds_TM.to(q_MP.dtype), q_MP, dk_TP, input_precision=PRECISION)
    if COMPACT:
        first, row_T, written_T = b * C, slot_T, valid_T
    else:
        first, row_T, written_T = b * S, key_T, used_T
    head = (first * K + kv) * W
    _store_rows(dk_ptr + head, row_T, K * W, written_T, dk_TP * SCALE, W, P)
    _store_rows(dv_ptr + head, row_T, K * W, written_T, dv_TP, W, P)
