"""``Σ w nll`` of rows of logits, or of a linear head's rows without their logits in memory.

A row of weight 0 counts for nothing, whatever it holds. A label that is no class gives NaN.

Shapes: ``R`` rows, ``D`` hidden size, ``V`` classes; inside a loop ``R`` are the rows of a chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cggr.jax.chunks import scan_row_chunks


@jax.custom_vjp
def weighted_nll_sum(logits_RV: Array, label_R: Array, weight_R: Array) -> Array:
    """``Σ_r w_r nll_r``, whose backward pass keeps the logits and no other ``(R, V)`` array.

    The gradient is ``w (softmax(x) - onehot(y))``.

    Args:
        logits_RV: Floating; the arithmetic is float32 (float64 for float64).
        label_R: Integers.
        weight_R: Floating; no gradient flows to it.

    Returns:
        Scalar, float32 (float64).
    """
    return _forward(logits_RV, label_R, weight_R)[0]


def _forward(logits_RV: Array, label_R: Array, weight_R: Array) -> tuple[Array, Any]:
    x_RV = _accurate(logits_RV)
    top_R = jnp.max(x_RV, axis=-1)
    log_sum_R = jnp.log(jnp.sum(jnp.exp(x_RV - top_R[:, None]), axis=-1))
    valid_R = (label_R >= 0) & (label_R < logits_RV.shape[-1])
    class_R1 = jnp.where(valid_R, label_R, 0)[:, None]
    label_logit_R = jnp.take_along_axis(logits_RV, class_R1, axis=-1)[:, 0].astype(top_R.dtype)
    nll_R = log_sum_R - (label_logit_R - top_R)
    # An invalid label is loud, in the loss and in the gradient of its row.
    weight_R = jnp.where(weight_R == 0, 0, jnp.where(valid_R, weight_R, jnp.nan))
    total = jnp.sum(jnp.where(weight_R == 0, 0, weight_R.astype(nll_R.dtype) * nll_R))
    return total, (logits_RV, label_R, weight_R, top_R, log_sum_R)


def _backward(saved: Any, grad: Array) -> tuple[Array, None, None]:
    return _d_logits(saved, grad).astype(saved[0].dtype), None, None


def _d_logits(saved: Any, grad: Array) -> Array:
    logits_RV, label_R, weight_R, top_R, log_sum_R = saved
    probability_RV = jnp.exp(_accurate(logits_RV) - top_R[:, None] - log_sum_R[:, None])
    class_V = jax.lax.broadcasted_iota(label_R.dtype, logits_RV.shape, 1)
    difference_RV = probability_RV - (class_V == label_R[:, None])
    weight_R1 = weight_R[:, None]
    return jnp.where(weight_R1 == 0, 0, grad * weight_R1 * difference_RV)


weighted_nll_sum.defvjp(_forward, _backward)


def linear_weighted_nll_sum(
    hidden_RD: Array,
    weight_VD: Array,
    bias_V: Array | None,
    label_R: Array,
    weight_R: Array,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    """:func:`weighted_nll_sum` of a linear head, one chunk of logits in memory at a time.

    With ``z = h W^T + b``, ``x = c tanh(s z / c)`` and ``g = w (softmax(x) - onehot(y))``, the
    gradient is ``dz = g s (1 - (x / c)²)``, ``dh = dz W``, ``dW = dz^T h``, ``db = Σ dz``. The
    backward pass computes the logits again, chunk by chunk.
    """
    return _linear((logit_scale, softcap), *alike(hidden_RD, weight_VD, bias_V, label_R, weight_R))


def linear_logits(
    hidden: Array,
    weight: Array,
    bias: Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Array:
    """``softcap tanh(logit_scale (hidden weight^T + bias) / softcap)``, ``(..., V)``."""
    # In float32 until the end, so that a low precision rounds once.
    dtype = _accurate_dtype(hidden)
    logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=dtype)
    if bias is not None:
        logits = logits + bias
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return logits.astype(hidden.dtype)


_Head = tuple[float, float | None]  # logit_scale and softcap, static


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(head: _Head, *arrays: Any) -> Array:
    return _linear_forward(head, *arrays)[0]


def _linear_forward(head: _Head, *arrays: Any) -> tuple[Array, Any]:
    hidden_RD, weight_VD, bias_V, label_R, weight_R = arrays

    def add(total: Array, rows: Any) -> tuple[Array, None]:
        hidden, label, weight = rows
        logits = linear_logits(hidden, weight_VD, bias_V, *head)
        return total + _forward(logits, label, weight)[0], None

    zero = jnp.zeros_like(hidden_RD, shape=(), dtype=_accurate_dtype(hidden_RD))
    rows = (hidden_RD, label_R, weight_R)
    return scan_row_chunks(add, zero, rows, weight_VD.shape[0])[0], arrays


def _linear_backward(head: _Head, arrays: Any, grad: Array) -> tuple[Any, ...]:
    hidden_RD, weight_VD, bias_V, label_R, weight_R = arrays
    logit_scale, softcap = head

    def add(total: Any, rows: Any) -> tuple[Any, Array]:
        hidden, label, weight = rows
        logits = linear_logits(hidden, weight_VD, bias_V, *head)
        d_logits = logit_scale * _d_logits(_forward(logits, label, weight)[1], grad)
        if softcap is not None:
            slope = 1 - (_accurate(logits) / softcap) ** 2
            d_logits = jnp.where(weight[:, None] == 0, 0, d_logits * slope)  # 0 times NaN
        d_weight, d_bias = total
        if d_bias is not None:
            d_bias = d_bias + jnp.sum(d_logits, axis=0)
        d_logits = d_logits.astype(hidden.dtype)
        hidden = jnp.where(weight[:, None] == 0, 0, hidden)  # it may hold NaN too
        d_weight = d_weight + jnp.einsum(
            "rv,rd->vd", d_logits, hidden, preferred_element_type=d_weight.dtype
        )
        return (d_weight, d_bias), jnp.einsum("rv,vd->rd", d_logits, weight_VD)

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_accurate_dtype(x)), (weight_VD, bias_V))
    rows = (hidden_RD, label_R, weight_R)
    (d_weight, d_bias), d_hidden = scan_row_chunks(add, zeros, rows, weight_VD.shape[0])
    d_bias = None if bias_V is None else d_bias.astype(bias_V.dtype)
    return d_hidden, d_weight.astype(weight_VD.dtype), d_bias, None, None


_linear.defvjp(_linear_forward, _linear_backward)


def alike(*arrays: Any) -> list[Any]:
    """The arrays, varying over the same axes of an enclosing shard_map, as a scan needs them.

    Adding a zero that varies does it; outside shard_map the compiler drops it. Its transpose sums
    the gradient of a weight that is the same on every shard.
    """
    leaves, tree = jax.tree.flatten(arrays)
    zero = jnp.zeros((), jnp.int8)
    for x in leaves:
        zero = zero + jnp.zeros_like(x, shape=(), dtype=jnp.int8)
    return jax.tree.unflatten(tree, [x + zero.astype(x.dtype) for x in leaves])


def _accurate(x: Array) -> Array:
    return x.astype(_accurate_dtype(x))


def _accurate_dtype(x: Array) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32
