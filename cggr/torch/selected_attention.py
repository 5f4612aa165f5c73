"""Attention of selected positions, with gradients for selected keys and values only.

Shapes: ``B`` sequences of ``S`` tokens, of which ``C`` are selected; ``H`` query heads, ``K`` heads
of keys and values; ``W`` size of a head.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cggr.torch.ops import launch_kernel
from cggr.torch.selected import differentiable_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256
# Where the kernels were faster than a mask; float32 they multiply without tensor cores.
_FAST_DTYPES, _FAST_WIDTH = (torch.bfloat16, torch.float16), 128
# Keys from which on they were so in eager mode, too, where shorter attention waits for the host.
_LONG = 4096


@torch.compiler.assume_constant_result
def wanted(dtype: torch.dtype, width: int, length: int, *, on_nvidia: bool, compiled: bool) -> bool:
    """Whether :func:`fused` is to be used where it can be: if ``CGGR_IMPLEMENTATION`` names it.

    If that is not set: on NVIDIA's devices, where it is faster than a mask.
    """
    named = os.environ.get("CGGR_IMPLEMENTATION")
    if named is None:
        long = compiled or length >= _LONG
        return on_nvidia and long and dtype in _FAST_DTYPES and width <= _FAST_WIDTH
    return named == "triton" and dtype in DTYPES and width <= MAX_WIDTH


def fused(
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    low_BC: Tensor,
    high_BC: Tensor,
    index_BC: Tensor,
    scale: float,
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

    Returns:
        ``(B, H, C, W)``, zeros where a query sees no key.
    """
    mixed: Tensor = _SelectedAttention.apply(
        query_BHCW, key_BKSW, value_BKSW, low_BC, high_BC, index_BC, scale
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
) -> Tensor:
    """The same as :func:`fused` in plain PyTorch."""
    place_S = torch.arange(key_BKSW.shape[2], device=query_BHCW.device)
    sees_BCS = (place_S >= low_BC[..., None]) & (place_S < high_BC[..., None])
    selected_BS = sees_BCS.new_zeros(sees_BCS.shape[0], sees_BCS.shape[2])
    selected_B1S1 = selected_BS.scatter(1, index_BC.long(), True)[:, None, :, None]
    key, value = (torch.where(selected_B1S1, x, x.detach()) for x in (key_BKSW, value_BKSW))
    grouped = query_BHCW.shape[1] != key_BKSW.shape[1]
    mixed = F.scaled_dot_product_attention(
        query_BHCW, key, value, attn_mask=sees_BCS[:, None], scale=scale, enable_gqa=grouped
    )
    return torch.where((low_BC < high_BC)[:, None, :, None], mixed, 0)


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHCW: Tensor,
        key_BKSW: Tensor,
        value_BKSW: Tensor,
        low_BC: Tensor,
        high_BC: Tensor,
        index_BC: Tensor,
        scale: float,
    ) -> Tensor:
        out_BHCW, lse_BHC = selected_attention(
            query_BHCW, key_BKSW, value_BKSW, low_BC, high_BC, scale
        )
        ctx.save_for_backward(
            query_BHCW, key_BKSW, value_BKSW, low_BC, high_BC, index_BC, out_BHCW, lse_BHC
        )
        ctx.scale = scale
        return out_BHCW

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = selected_attention_gradient(*ctx.saved_tensors, grad, ctx.scale)
        return *gradients, *(None,) * 4


def _strides(*tensors: Tensor) -> list[int]:
    """Of sequences, heads and rows ``(B, H, C, W)``."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _launches(query: Tensor, key: Tensor, scale: float) -> Any:
    from cggr.kernels.selected_attention import selected_attention_launches

    (batch, n_heads, n_rows, width), n_kv_heads = query.shape, key.shape[1]
    itemsize = query.element_size()
    return selected_attention_launches(batch, n_heads, n_kv_heads, n_rows, width, itemsize, scale)


@torch.library.custom_op(
    "cggr::selected_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor low, Tensor high, float scale) "
    "-> (Tensor, Tensor)",
)
def selected_attention(
    query: Tensor, key: Tensor, value: Tensor, low: Tensor, high: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Mixed values ``(B, H, C, W)``, in memory ``(B, C, H, W)``, and ``log2 Σ exp(score)``."""
    from cggr.kernels.selected_attention import selected_attention_kernel

    query, key, value = _with_heads(query), _with_heads(key), _with_heads(value)
    out, lse = _empty_attention(query)
    if out.numel():
        launch_kernel(
            selected_attention_kernel,
            _launches(query, key, scale).forward,
            *(query, key, value, low.contiguous(), high.contiguous(), out, lse),
            *(query.shape[2], key.shape[2]),
            *_strides(query, key, value, out),
        )
    return out, lse


@selected_attention.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _empty_attention(query)


def _empty_attention(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, n_heads, n_rows, width = query.shape
    out = query.new_empty(batch, n_rows, n_heads, width).transpose(1, 2)
    return out, query.new_empty(batch, n_heads, n_rows, dtype=torch.float32)


def _with_heads(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


@torch.library.custom_op(
    "cggr::selected_attention_gradient",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor low, Tensor high, Tensor index, "
    "Tensor out, Tensor lse, Tensor grad, float scale) -> (Tensor, Tensor, Tensor)",
)
def selected_attention_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    low: Tensor,
    high: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query ``(B, H, C, W)``, key and value ``(B, K, S, W)``; 0 outside of index."""
    from cggr.kernels.selected_attention import key_gradient_kernel, query_gradient_kernel

    query, key, value, grad = (_with_heads(x) for x in (query, key, value, grad))
    low, high, index = (x.to(torch.int32).contiguous() for x in (low, high, index))
    d_query, d_key, d_value = _empty_attention_gradients(query, key, value)
    d_key.zero_()
    d_value.zero_()
    if out.numel():
        launches, delta = _launches(query, key, scale), torch.empty_like(lse)
        sizes = query.shape[2], key.shape[2]
        launch_kernel(
            query_gradient_kernel,
            launches.query_gradient,
            *(query, key, value, low, high, out, lse, grad, d_query, delta, *sizes),
            *_strides(query, key, value, out, grad),
        )
        launch_kernel(
            key_gradient_kernel,
            launches.key_gradient,
            *(query, key, value, low, high, index, lse, grad, delta, d_key, d_value, *sizes),
            *_strides(query, key, value, grad),
        )
    return d_query, d_key, d_value


@selected_attention_gradient.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_attention_gradients(query, key, value)


def _empty_attention_gradients(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (x.new_empty(x.shape) for x in tensors)
    return query, key, value
