"""The operations by the Triton kernels, through jax-triton: float32, bfloat16 and float16.

jax-triton and the kernels are imported at the first launch. Under ``jax.vmap`` one launch follows
another. JAX does not divide a launch over devices: inside ``jax.shard_map`` each has its own,
elsewhere arrays that are spread are gathered first.

Shapes: ``N`` tokens, of which ``R`` rows are selected; ``D`` hidden size, ``V`` classes, of which
``C`` are in a chunk. Statistics are ``(6, N)`` float32: entropy, margin, confidence, top logit, and
with targets nll, error norm.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cggr.jax.cross_entropy import alike
from cggr.kernels.chunks import class_chunk, fuses, row_chunk
from cggr.spec import TokenStatistics

DTYPES = tuple(jnp.dtype(name) for name in ("float32", "bfloat16", "float16"))

# Of the backward pass, which has their gradient beside the logits.
_MAX_LOGITS_BACKWARD = 1 << 25

# The usual one, so that a loss needs no other kernel than the statistics. What has this label is a
# fault in a row that counts: see _loud.
_IGNORE_INDEX = -100
_SOFTMAX = slice(2, 5)  # of the statistics: what a gradient needs

_Head = tuple[float, float | None]  # logit_scale and softcap, static
_LOGITS: _Head = (1.0, None)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def token_statistics(logits: Array, targets: Array | None, ignore_index: int) -> TokenStatistics:
    """Statistics of every row of logits ``(..., V)``, without gradient."""
    logits_NV = logits.reshape(-1, logits.shape[-1])
    target_N = None if targets is None else targets.reshape(-1)
    out_6N = _statistics(logits_NV, target_N, ignore_index, _LOGITS)
    return _columns(out_6N, logits.shape[:-1], targets is not None)


@functools.partial(jax.jit, static_argnums=(4, 5, 6), inline=True)
def linear_token_statistics(
    hidden: Array,
    weight_VD: Array,
    bias_V: Array | None,
    targets: Array | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> TokenStatistics:
    """Statistics of a linear head's logits, of hidden ``(..., D)``, without gradient."""
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    target_N = None if targets is None else targets.reshape(-1)
    hidden_ND, weight_VD, bias_V, target_N = vary_alike(hidden_ND, weight_VD, bias_V, target_N)
    head = (logit_scale, softcap)
    out_6N = _linear_statistics(hidden_ND, weight_VD, bias_V, target_N, ignore_index, head)
    return _columns(out_6N, hidden.shape[:-1], targets is not None)


@functools.partial(jax.jit, inline=True)
def weighted_nll_sum(logits_RV: Array, label_R: Array, weight_R: Array) -> Array:
    """:func:`cggr.jax.cross_entropy.weighted_nll_sum`."""
    return _nll_sum(*vary_alike(logits_RV, label_R, weight_R))


@functools.partial(jax.jit, static_argnums=(5, 6), inline=True)
def linear_weighted_nll_sum(
    hidden_RD: Array,
    weight_VD: Array,
    bias_V: Array | None,
    label_R: Array,
    weight_R: Array,
    logit_scale: float,
    softcap: float | None,
) -> Array:
    """:func:`cggr.jax.cross_entropy.linear_weighted_nll_sum`.

    The backward pass takes a chunk of classes at a time: since the softmax is known, no row is
    needed as a whole, and the weight's gradient is written once where chunks of rows would have to
    be added up in float32.
    """
    arrays = vary_alike(hidden_RD, weight_VD, bias_V, label_R, weight_R)
    return _linear_nll_sum((logit_scale, softcap), *arrays)


# Losses with their gradients


@jax.custom_vjp
def _nll_sum(logits_RV: Array, label_R: Array, weight_R: Array) -> Array:
    return _forward(logits_RV, label_R, weight_R)[0]


def _forward(logits_RV: Array, label_R: Array, weight_R: Array) -> tuple[Array, Any]:
    out_6R = _statistics(logits_RV, label_R, _IGNORE_INDEX, _LOGITS)
    weight_R = _loud(weight_R, label_R, logits_RV.shape[1])
    return _weighted_sum(out_6R, weight_R), (logits_RV, out_6R[_SOFTMAX], label_R, weight_R)


def _backward(saved: Any, grad: Array) -> tuple[Array, None, None]:
    logits_RV, softmax_3R, label_R, weight_R = saved
    first_class = jnp.zeros(1, jnp.int32)
    row_grad_R = _row_grad(weight_R, grad)
    return _gradient(logits_RV, softmax_3R, label_R, row_grad_R, first_class, _LOGITS), None, None


_nll_sum.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_nll_sum(head: _Head, *arrays: Any) -> Array:
    return _linear_forward(head, *arrays)[0]


def _linear_forward(head: _Head, *arrays: Any) -> tuple[Array, Any]:
    hidden_RD, weight_VD, bias_V, label_R, weight_R = arrays
    out_6R = _linear_statistics(hidden_RD, weight_VD, bias_V, label_R, _IGNORE_INDEX, head)
    weight_R = _loud(weight_R, label_R, weight_VD.shape[0])
    saved = (hidden_RD, weight_VD, bias_V, out_6R[_SOFTMAX], label_R, weight_R)
    return _weighted_sum(out_6R, weight_R), saved


def _linear_backward(head: _Head, saved: Any, grad: Array) -> tuple[Any, ...]:
    hidden_RD, weight_VD, bias_V, softmax_3R, label_R, weight_R = saved
    row_grad_R = _row_grad(weight_R, grad)
    hidden_RD = jnp.where(row_grad_R[:, None] == 0, 0, hidden_RD)  # 0 times NaN

    def add(total: Any, first: Any, classes: int) -> Any:
        d_hidden, d_weight, d_bias = total
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=classes
        )
        weight_CD = part(weight_VD)
        logits_RC = _product(hidden_RD, weight_CD, None if bias_V is None else part(bias_V))
        first_class = jnp.full(1, first, jnp.int32)
        d_RC = _gradient(logits_RC, softmax_3R, label_R, row_grad_R, first_class, head)
        d_hidden = d_hidden + jnp.einsum(
            "rc,cd->rd", d_RC, weight_CD, preferred_element_type=jnp.float32
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        d_weight = put(d_weight, jnp.einsum("rc,rd->cd", d_RC, hidden_RD))
        if d_bias is not None:
            d_bias = put(d_bias, jnp.sum(d_RC, axis=0, dtype=jnp.float32).astype(d_bias.dtype))
        return d_hidden, d_weight, d_bias

    n_rows, n_classes = hidden_RD.shape[0], weight_VD.shape[0]
    size = min(n_classes, class_chunk(n_rows, _MAX_LOGITS_BACKWARD))
    whole, left = divmod(n_classes, size)
    zeros = (
        jnp.zeros_like(hidden_RD, dtype=jnp.float32),
        jnp.zeros_like(weight_VD),
        None if bias_V is None else jnp.zeros_like(bias_V),
    )
    first_classes = jnp.arange(whole) * size
    total, _ = jax.lax.scan(lambda at, first: (add(at, first, size), None), zeros, first_classes)
    d_hidden, d_weight, d_bias = add(total, whole * size, left) if left else total
    return d_hidden.astype(hidden_RD.dtype), d_weight, d_bias, None, None


_linear_nll_sum.defvjp(_linear_forward, _linear_backward)


def _loud(weight_R: Array, label_R: Array, n_classes: int) -> Array:
    """The weights, NaN where a row that counts has a label that is no class."""
    valid_R = (label_R >= 0) & (label_R < n_classes)
    weight_R = weight_R.astype(jnp.float32)
    return jnp.where((weight_R == 0) | valid_R, weight_R, jnp.nan)


def _weighted_sum(out_6R: Array, weight_R: Array) -> Array:
    return jnp.sum(jnp.where(weight_R == 0, 0, weight_R * out_6R[4]))


def _row_grad(weight_R: Array, grad: Array) -> Array:
    return jnp.where(weight_R == 0, 0, weight_R * grad)


# Statistics


def _columns(out_6N: Array, shape: tuple[int, ...], has_targets: bool) -> TokenStatistics:
    entropy, margin, confidence, _, nll, error_norm = out_6N.reshape(6, *shape)
    if not has_targets:
        return TokenStatistics(None, entropy, confidence, margin, None)
    return TokenStatistics(nll, entropy, confidence, margin, error_norm)


def _statistics(logits_NV: Array, target_N: Array | None, ignore_index: int, head: _Head) -> Array:
    source = import_kernels("cggr.kernels.token_statistics")
    n_rows, n_classes = logits_NV.shape
    logit_scale, softcap = head
    launch = source.token_statistics_launch(
        n_rows,
        n_classes,
        n_classes,
        logits_NV.dtype.itemsize,
        has_target=target_N is not None,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    inputs = (logits_NV, logits_NV if target_N is None else target_N)
    return _call(source.token_statistics_kernel, launch, inputs, (6, n_rows))


def _linear_statistics(
    hidden_ND: Array,
    weight_VD: Array,
    bias_V: Array | None,
    target_N: Array | None,
    ignore_index: int,
    head: _Head,
) -> Array:
    """By whichever of the two ways below is faster for these shapes."""
    # Elsewhere than on a GPU, where nothing is launched, as on the device that it is written for.
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    major = int(capability.split(".")[0])
    fused = fuses(hidden_ND.shape[1], hidden_ND.dtype.itemsize, major)
    way = _fused_statistics if fused else _chunked_statistics
    return way(hidden_ND, weight_VD, bias_V, target_N, ignore_index, head)


def _fused_statistics(
    hidden_ND: Array,
    weight_VD: Array,
    bias_V: Array | None,
    target_N: Array | None,
    ignore_index: int,
    head: _Head,
) -> Array:
    """Statistics from products that never leave the multiprocessors; 2-byte dtypes."""
    source = import_kernels("cggr.kernels.linear_token_statistics")
    n_rows, hidden_size = hidden_ND.shape
    logit_scale, softcap = head
    sums_launch, join_launch, splits, split_classes = source.linear_token_statistics_launch(
        n_rows,
        weight_VD.shape[0],
        hidden_size,
        has_target=target_N is not None,
        has_bias=bias_V is not None,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    if target_N is None:
        target_N = hidden_ND
    inputs = (hidden_ND, weight_VD, weight_VD if bias_V is None else bias_V, target_N)
    sums = _call(
        source.linear_sums_kernel,
        sums_launch,
        inputs,
        (splits, 6, n_rows),
        n_rows=n_rows,
        split_classes=split_classes,
    )
    return _call(
        source.join_sums_kernel,
        join_launch,
        (sums, target_N),
        (6, n_rows),
        n_rows=n_rows,
        n_splits=splits,
    )


def _chunked_statistics(
    hidden_ND: Array,
    weight_VD: Array,
    bias_V: Array | None,
    target_N: Array | None,
    ignore_index: int,
    head: _Head,
) -> Array:
    """Statistics from cuBLAS's products of a chunk of rows at a time."""

    def statistics(hidden: Array, target: Array | None) -> Array:
        return _statistics(_product(hidden, weight_VD, bias_V), target, ignore_index, head)

    n_rows = hidden_ND.shape[0]
    size = min(n_rows, row_chunk(n_rows, weight_VD.shape[0]))
    if size == n_rows:
        return statistics(hidden_ND, target_N)

    def step(out_6N: Array, first: Array) -> tuple[Array, None]:
        hidden, target = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), (hidden_ND, target_N)
        )
        out = statistics(hidden, target)
        return jax.lax.dynamic_update_slice_in_dim(out_6N, out, first, axis=1), None

    # A slice that would go beyond the last row ends there instead, in reading and in writing: some
    # rows are computed twice, to the same result.
    firsts = jnp.arange(0, n_rows, size)
    zeros = jnp.zeros_like(hidden_ND, shape=(6, n_rows), dtype=jnp.float32)
    return jax.lax.scan(step, zeros, firsts)[0]


def _product(hidden: Array, weight: Array, bias: Array | None) -> Array:
    if bias is None:
        return jnp.einsum("rd,cd->rc", hidden, weight)
    product = jnp.einsum("rd,cd->rc", hidden, weight, preferred_element_type=jnp.float32)
    return (product + bias).astype(hidden.dtype)  # rounded once


# Launches


def _gradient(
    logits_RC: Array,
    softmax_3R: Array,
    label_R: Array,
    row_grad_R: Array,
    first_class: Array,
    head: _Head,
) -> Array:
    """Gradient of ``Σ row_grad nll`` to a head's output; the columns begin at `first_class`."""
    source = import_kernels("cggr.kernels.selected_cross_entropy")
    n_rows, n_classes = logits_RC.shape
    logit_scale, softcap = head
    launch = source.cross_entropy_gradient_launch(
        n_rows,
        n_classes,
        n_classes,
        logits_RC.dtype.itemsize,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    inputs = (logits_RC, softmax_3R, label_R, row_grad_R, first_class)
    kernel = source.cross_entropy_gradient_kernel
    return _call(kernel, launch, inputs, logits_RC.shape, logits_RC.dtype)


def call_kernel(
    kernel: Any,
    launch: Any,
    inputs: tuple[Array, ...],
    *outputs: jax.ShapeDtypeStruct,
    **sizes: int,
) -> tuple[Array, ...]:
    """Launch a kernel on its input pointers; `sizes` are its integers behind the output pointers.

    By name, for jax-triton 0.3 they are constants, as it puts outputs behind all that is
    positional, and for 0.4 arguments.
    """
    if 0 in outputs[0].shape:
        return tuple(jnp.zeros_like(inputs[0], shape=x.shape, dtype=x.dtype) for x in outputs)
    jax_triton = import_kernels("jax_triton")
    name = "out_shape" if jax_triton.__version_info__ < (0, 4) else "out_type"

    @jax.custom_batching.sequential_vmap  # jax-triton has no rule for vmap
    def start(*inputs: Array) -> tuple[Array, ...]:
        results = jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            grid=launch.grid,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **{name: outputs},
            **launch.constants,
            **sizes,
        )
        return tuple(results)

    results: tuple[Array, ...] = vary_alike(*inputs, *start(*inputs))[len(inputs) :]
    return results


def _call(
    kernel: Any,
    launch: Any,
    inputs: tuple[Array, ...],
    shape: tuple[int, ...],
    dtype: Any = jnp.float32,
    **sizes: int,
) -> Array:
    """The same for one output."""
    (result,) = call_kernel(kernel, launch, inputs, jax.ShapeDtypeStruct(shape, dtype), **sizes)
    return result


def vary_alike(*arrays: Any) -> Any:
    """Inside shard_map, where a launch does not tell JAX over which axes its result varies."""
    return alike(*arrays) if jax.sharding.get_abstract_mesh().manual_axes else arrays


def import_kernels(module: str) -> Any:
    """A module that needs jax-triton, or the Triton that comes with it."""
    # Importing jax-triton 0.3 sets this variable to "", with which PyTorch's kernels do not
    # compile, and 0.4 deletes it.
    kept = os.environ.get("TRITON_CACHE_DIR")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'The CUDA kernels need jax-triton: pip install "cggr[jax-cuda]", or set '
            f"CGGR_IMPLEMENTATION=xla to do without them. ({error})"
        ) from error
    finally:
        if kept is None:
            os.environ.pop("TRITON_CACHE_DIR", None)
        else:
            os.environ["TRITON_CACHE_DIR"] = kept
