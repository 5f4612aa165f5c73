"""Attention of selected positions by the Triton kernels, where each sees an interval of the keys.

Shapes: ``B`` sequences of ``S`` tokens, ``C`` slots of each for the selected ones; ``H`` heads and
``K`` heads of keys and values, of size ``W``. An unused slot holds a position of S or more.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from cggr.jax.dispatch import may_launch
from cggr.jax.triton_calls import DTYPES, call_kernel, import_kernels, vary_alike
from cggr.kernels.attention_sizes import MAX_WIDTH, is_fast

# What these compute is known, and so are their options, but for those that may be anything.
_KNOWN = (nnx.dot_product_attention, jax.nn.dot_product_attention)
_WITHOUT_EFFECT = frozenset(("broadcast_dropout", "deterministic", "dropout_rng", "implementation"))


class Interval(NamedTuple):
    """The keys that a query sees: from so many before it to so many after it; None for all."""

    before: int | None
    after: int | None


def interval_of(
    function: Callable[..., Array], options: dict[str, Any], dtype: Any
) -> Interval | None:
    """What queries see in an attention function with these options; None if the kernels cannot.

    Queries, keys and values have this dtype.
    """
    while isinstance(function, functools.partial):
        if function.args or function.keywords.get("bias") is not None:
            return None
        function = function.func
    if function not in _KNOWN:
        return None
    options = dict(options)
    if options.pop("dropout_rate", 0.0) and not options.get("deterministic", False):
        return None
    causal = options.pop("is_causal", False)
    before, after = None, 0 if causal else None
    if (window := options.pop("local_window_size", None)) is not None:
        pair = isinstance(window, (tuple, list))
        before, after = window if pair else (int(window), int(window))
        after = 0 if causal else after
    if not isinstance(options.pop("scale", None), (int, float, type(None))):
        return None
    if options.get("dtype") == dtype:
        del options["dtype"]
    parameters = inspect.signature(function).parameters
    for name, value in options.items():
        if name not in _WITHOUT_EFFECT and value is not parameters[name].default:
            return None
    return Interval(before, after)


def where_wanted(query_BCHW: Array, *keys_and_values: Array) -> str | None:
    """Where the kernels attend: ``"everywhere"``, ``"on CUDA"``, or None for nowhere.

    ``CGGR_IMPLEMENTATION`` says so. If it is not set: where they are faster than a mask.
    """
    dtype, (n_heads, width) = query_BCHW.dtype, query_BCHW.shape[2:]
    n_kv_heads = keys_and_values[0].shape[2]
    if n_heads % n_kv_heads or any(
        x.dtype != dtype or x.shape[2:] != (n_kv_heads, width) for x in keys_and_values
    ):
        return None
    if dtype not in DTYPES or width > MAX_WIDTH:
        return None
    named = os.environ.get("CGGR_IMPLEMENTATION")
    if named is None:
        return "on CUDA" if is_fast(width, dtype.itemsize) and may_launch() else None
    return "everywhere" if named == "triton" else None


def by_kernels(
    query_BCHW: Array,
    key_BCKW: Array,
    value_BCKW: Array,
    every_key_BSKW: Array,
    every_value_BSKW: Array,
    index_BC: Array,
    *,
    interval: Interval,
    scale: float | None,
) -> Array:
    """``softmax(scale q k^T) v`` over the keys that each query sees.

    Args:
        query_BCHW: Of the selected positions.
        key_BCKW: Of the selected positions: for the gradient alone.
        value_BCKW: Likewise.
        every_key_BSKW: Of all positions, the selected ones among them; without gradient.
        every_value_BSKW: Likewise.
        index_BC: int32, each position at most once in a sequence.
        interval: What queries see.
        scale: Of the scores; ``1 / sqrt(W)`` if None.

    Returns:
        ``(B, C, H, W)``, zeros in unused slots.
    """
    if scale is None:
        scale = float(query_BCHW.shape[-1]) ** -0.5
    length = every_key_BSKW.shape[1]
    low_BC, high_BC = jnp.zeros_like(index_BC), jnp.full_like(index_BC, length)
    if interval.before is not None:
        low_BC = jnp.maximum(index_BC - interval.before, 0)
    if interval.after is not None:
        high_BC = jnp.minimum(index_BC + 1 + interval.after, length)
    high_BC = jnp.where(index_BC < length, high_BC, 0)
    every = jax.lax.stop_gradient((every_key_BSKW, every_value_BSKW))
    rows = query_BCHW, key_BCKW, value_BCKW
    # What a device of its own has of them, such as of shared keys, is added up in the gradient.
    arrays = vary_alike(*rows, *every, low_BC, high_BC, index_BC)
    mixed: Array = _attend(scale, *arrays)
    return mixed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, *arrays: Array) -> Array:
    return _forward(scale, *arrays)[0]


def _forward(scale: float, *arrays: Array) -> tuple[Array, Any]:
    query, _, _, key, value, low, high, index = arrays
    kernels = import_kernels("cggr.kernels.selected_attention")
    batch, n_rows, n_heads, _ = query.shape
    out, lse = call_kernel(
        kernels.selected_attention_kernel,
        _launches(scale, query, key).forward,
        (query, key, value, low, high, low),
        _like(query),
        jax.ShapeDtypeStruct((batch, n_heads, n_rows), jnp.float32),
        **_sizes(query, key),
        **_strides(q=query, k=key, v=value, o=query),
    )
    return out, (query, key, value, low, high, index, out, lse)


def _backward(scale: float, saved: Any, grad: Array) -> tuple[Array | None, ...]:
    query, key, value, low, high, index, out, lse = saved
    kernels = import_kernels("cggr.kernels.selected_attention")
    launches = _launches(scale, query, key)
    sizes = _sizes(query, key)
    d_query, delta = call_kernel(
        kernels.query_gradient_kernel,
        launches.query_gradient,
        (query, key, value, low, high, low, out, lse, grad),
        _like(query),
        _like(lse),
        **sizes,
        **_strides(q=query, k=key, v=value, o=out, g=grad),
    )
    rows = jax.ShapeDtypeStruct((*query.shape[:2], *key.shape[2:]), key.dtype)
    d_key, d_value = call_kernel(
        kernels.key_gradient_kernel,
        launches.key_gradient,
        (query, key, value, low, high, low, index, lse, grad, delta),
        rows,
        rows,
        **sizes,
        **_strides(q=query, k=key, v=value, g=grad),
    )
    return d_query, d_key, d_value, *(None,) * 5


_attend.defvjp(_forward, _backward)


def _launches(scale: float, query: Array, key: Array) -> Any:
    kernels = import_kernels("cggr.kernels.selected_attention")
    batch, n_rows, n_heads, width = query.shape
    itemsize, n_kv_heads = query.dtype.itemsize, key.shape[2]
    return kernels.selected_attention_launches(
        batch, n_heads, n_kv_heads, n_rows, width, itemsize, scale, compact=True
    )


def _sizes(query: Array, key: Array) -> dict[str, int]:
    # No keys are masked: where their mask would lie is not read.
    return {"C": query.shape[1], "S": key.shape[1], "stride_keys": 0}


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _strides(**arrays: Array) -> dict[str, int]:
    """Of sequences, heads and rows of contiguous ``(B, C, H, W)``, as the kernels call them."""
    found = {}
    for name, x in arrays.items():
        _, n_rows, n_heads, width = x.shape
        found[f"stride_{name}b"] = n_rows * n_heads * width
        found[f"stride_{name}h"] = width
        found[f"stride_{name}"] = n_heads * width
    return found
