"""Attention of selected positions, with gradients for selected keys and values only.

Shapes: ``B`` sequences of ``S`` tokens, of which ``C`` are selected; ``H`` query heads, ``K`` heads
of keys and values; ``W`` size of a head.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cggr.kernels.attention_sizes import MAX_WIDTH, is_fast
from cggr.torch.ops import launch_kernel
from cggr.torch.selected import differentiable_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Keys from which on the kernels are faster in eager mode, where shorter attention waits for the
# host.
_LONG = 4096


@torch.compiler.assume_constant_result
def least_length(dtype: torch.dtype, width: int, *, on_nvidia: bool, compiled: bool) -> int | None:
    """Keys from which on :func:`fused` is to be used where it can be; None if never.

    ``CGGR_IMPLEMENTATION`` says whether. If it is not set: on NVIDIA's devices, where the kernels
    are faster than a mask.
    """
    if dtype not in DTYPES or width > MAX_WIDTH:
        return None
    named = os.environ.get("CGGR_IMPLEMENTATION")
    if named is None:
        fast = is_fast(width, dtype.itemsize)
        here = on_nvidia and importlib.util.find_spec("triton") is not None
        return (0 if compiled else _LONG) if fast and here else None
    return 0 if named == "triton" else None


def fused(
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    low_BC: Tensor,
    high_BC: Tensor,
    index_BC: Tensor,
    scale: float,
    softcap: float | None = None,
    keys_BS: Tensor | None = None,
) -> Tensor:
    """``softmax(scale q k^T) v`` over the keys that each query sees, by the Triton kernels.

    Args:
        query_BHCW: Of the selected positions; float32, bfloat16 or float16.
        key_BKSW: Of all positions; W at most 256.
        value_BKSW: Of all positions.
        low_BC: int32; the first key that a query sees.
        high_BC: int32; the first key behind those that it sees, at most S.
        index_BC: The positions of the queries, each at most once in a sequence. Keys and values
            have gradients there, and zeros elsewhere.
        scale: Of the scores.
        softcap: Scores are ``softcap tanh(scale q k^T / softcap)``; without if None.
        keys_BS: int32, 0 for keys that no query sees; None if there are none.

    Returns:
        ``(B, H, C, W)``, zeros where a query sees no key.
    """
    mixed: Tensor = _SelectedAttention.apply(
        query_BHCW, key_BKSW, value_BKSW, low_BC, high_BC, keys_BS, index_BC, scale, softcap or 0.0
    )
    return mixed


def eager(
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    low_BC: Tensor,
    high_BC: Tensor,
    index_BC: Tensor,
    scale: float,
    softcap: float | None = None,
    keys_BS: Tensor | None = None,
) -> Tensor:
    """The same as :func:`fused` in plain PyTorch."""
    sees_BCS = visible(low_BC, high_BC, keys_BS, key_BKSW.shape[2])
    selected_BS = sees_BCS.new_zeros(sees_BCS.shape[0], sees_BCS.shape[2])
    selected_B1S1 = selected_BS.scatter(1, index_BC.long(), True)[:, None, :, None]
    key, value = (torch.where(selected_B1S1, x, x.detach()) for x in (key_BKSW, value_BKSW))
    grouped = query_BHCW.shape[1] != key_BKSW.shape[1]
    sees_B1CS = sees_BCS[:, None]
    if softcap is None:
        mixed = F.scaled_dot_product_attention(
            query_BHCW, key, value, attn_mask=sees_B1CS, scale=scale, enable_gqa=grouped
        )
    else:
        mixed = capped_attention(query_BHCW, key, value, sees_B1CS, scale, softcap)
    return torch.where(sees_BCS.any(-1)[:, None, :, None], mixed, 0)


def visible(low_BC: Tensor, high_BC: Tensor, keys_BS: Tensor | None, length: int) -> Tensor:
    """Which keys a query sees ``(B, C, S)``, of the arguments of :func:`fused`."""
    place_S = torch.arange(length, device=low_BC.device)
    sees_BCS = (place_S >= low_BC[..., None]) & (place_S < high_BC[..., None])
    return sees_BCS if keys_BS is None else sees_BCS & keys_BS.bool()[:, None]


def capped_attention(
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    mask_BHCS: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with a soft-cap, which sdpa has not, as transformers' ``eager`` computes it.

    All scores are in memory. The mask is True where a query sees a key, or added to the scores.
    """
    group = query_BHCW.shape[1] // key_BKSW.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key_BKSW, value_BKSW))
    score_BHCS = (query_BHCW @ key.transpose(2, 3) * scale / softcap).tanh() * softcap
    if mask_BHCS is not None and mask_BHCS.dtype == torch.bool:
        score_BHCS = score_BHCS.masked_fill(~mask_BHCS, torch.finfo(score_BHCS.dtype).min)
    elif mask_BHCS is not None:
        score_BHCS = score_BHCS + mask_BHCS
    p_BHCS = score_BHCS.softmax(dim=-1, dtype=torch.float32).to(query_BHCW.dtype)
    return F.dropout(p_BHCS, dropout) @ value


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHCW: Tensor,
        key_BKSW: Tensor,
        value_BKSW: Tensor,
        low_BC: Tensor,
        high_BC: Tensor,
        keys_BS: Tensor | None,
        index_BC: Tensor,
        scale: float,
        softcap: float,
    ) -> Tensor:
        given = query_BHCW, key_BKSW, value_BKSW, low_BC, high_BC, keys_BS
        out_BHCW, lse_BHC = selected_attention(*given, scale, softcap)
        ctx.save_for_backward(*given, index_BC, out_BHCW, lse_BHC)
        ctx.scale, ctx.softcap = scale, softcap
        return out_BHCW

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores = ctx.scale, ctx.softcap
        gradients = selected_attention_gradient(*ctx.saved_tensors, grad, *scores)
        return *gradients, *(None,) * 6


def _strides(*tensors: Tensor) -> list[int]:
    """Of sequences, heads and rows ``(B, H, C, W)``."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _launches(query: Tensor, key: Tensor, keys: Tensor | None, scale: float, softcap: float) -> Any:
    from cggr.kernels.selected_attention import selected_attention_launches

    (batch, n_heads, n_rows, width), n_kv_heads = query.shape, key.shape[1]
    return selected_attention_launches(
        batch,
        n_heads,
        n_kv_heads,
        n_rows,
        width,
        query.element_size(),
        scale,
        softcap,
        masked_keys=keys is not None,
    )


def _mask_or_any(keys: Tensor | None, low: Tensor) -> Tensor:
    """What the kernels take, and do not read if there is no mask."""
    return low if keys is None else keys if keys.stride(1) == 1 else keys.contiguous()


@torch.library.custom_op(
    "cggr::selected_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor low, Tensor high, Tensor? keys, "
    "float scale, float softcap) -> (Tensor, Tensor)",
)
def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    low: Tensor,
    high: Tensor,
    keys: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Mixed values ``(B, H, C, W)``, in memory ``(B, C, H, W)``, and ``log2 Σ exp(score)``.

    Without a soft-cap where it is 0, which the schema can have no None for.
    """
    from cggr.kernels.selected_attention import selected_attention_kernel

    query, key, value = _with_heads(query), _with_heads(key), _with_heads(value)
    out, lse = _empty_attention(query)
    if out.numel():
        low, high = low.contiguous(), high.contiguous()
        mask = _mask_or_any(keys, low)
        launch_kernel(
            selected_attention_kernel,
            _launches(query, key, keys, scale, softcap).forward,
            *(query, key, value, low, high, mask, out, lse),
            *(query.shape[2], key.shape[2], mask.stride(0)),
            *_strides(query, key, value, out),
        )
    return out, lse


@selected_attention.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_attention(query)


def _empty_attention(query: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_heads(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _empty_heads(x: Tensor) -> Tensor:
    """``(B, H, C, W)``, in memory ``(B, C, H, W)``, as a model has it."""
    batch, n_heads, n_rows, width = x.shape
    return x.new_empty(batch, n_rows, n_heads, width).transpose(1, 2)


def _with_heads(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


@torch.library.custom_op(
    "cggr::selected_attention_gradient",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor low, Tensor high, Tensor? keys, "
    "Tensor index, Tensor out, Tensor lse, Tensor grad, float scale, float softcap) "
    "-> (Tensor, Tensor, Tensor)",
)
def selected_attention_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    low: Tensor,
    high: Tensor,
    keys: Tensor | None,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query ``(B, H, C, W)``, key and value ``(B, K, S, W)``; 0 outside of index.

    Heads are beside each other in memory.
    """
    from cggr.kernels.selected_attention import key_gradient_kernel, query_gradient_kernel

    query, key, value, grad = (_with_heads(x) for x in (query, key, value, grad))
    low, high, index = (x.to(torch.int32).contiguous() for x in (low, high, index))
    d_query, d_key, d_value = _empty_attention_gradients(query, key, value)
    d_key.zero_()
    d_value.zero_()
    if out.numel():
        launches, delta = _launches(query, key, keys, scale, softcap), torch.empty_like(lse)
        mask = _mask_or_any(keys, low)
        sizes = query.shape[2], key.shape[2], mask.stride(0)
        launch_kernel(
            query_gradient_kernel,
            launches.query_gradient,
            *(query, key, value, low, high, mask, out, lse, grad, d_query, delta, *sizes),
            *_strides(query, key, value, out, grad),
        )
        launch_kernel(
            key_gradient_kernel,
            launches.key_gradient,
            *(query, key, value, low, high, mask, index, lse, grad, delta, d_key, d_value, *sizes),
            *_strides(query, key, value, grad),
        )
    return d_query, d_key, d_value


@selected_attention_gradient.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_attention_gradients(query, key, value)


def _empty_attention_gradients(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = map(_empty_heads, tensors)
    return query, key, value
