"""Which code computes the operations on logits: XLA, or the Triton kernels.

XLA runs everywhere. The kernels are the default in what is compiled for NVIDIA's GPUs, where
jax-triton is installed. ``CGGR_IMPLEMENTATION`` names one of the two, which then runs or raises:
there is no silent fallback. It is read when a function is traced.

Shapes: leading dimensions ``...``; ``R`` rows, ``D`` hidden size, ``V`` classes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cggr import spec
from cggr.jax import cross_entropy, triton_calls
from cggr.jax.chunks import map_row_chunks
from cggr.spec import TokenStatistics


class Implementation(NamedTuple):
    """The operations, each with its gradient where it has one.

    Attributes:
        token_statistics: ``(logits (..., V), targets (...) or None, ignore_index)``, no gradient.
        linear_token_statistics: ``(hidden (..., D), weight (V, D), bias (V,) or None, targets (...)
            or None, ignore_index, logit_scale, softcap)``, no gradient.
        weighted_nll_sum: ``(logits (R, V), labels (R,), weights (R,))`` to a scalar,
            differentiable in the logits.
        linear_weighted_nll_sum: ``(hidden (R, D), weight (V, D), bias (V,) or None, labels (R,),
            weights (R,), logit_scale, softcap)`` to a scalar, differentiable in the first three.
    """

    token_statistics: Callable[..., TokenStatistics]
    linear_token_statistics: Callable[..., TokenStatistics]
    weighted_nll_sum: Callable[..., Array]
    linear_weighted_nll_sum: Callable[..., Array]


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _xla_token_statistics(
    logits: Array, targets: Array | None, ignore_index: int
) -> TokenStatistics:
    def statistics(rows: tuple[Array, Array | None]) -> TokenStatistics:
        logits_RV, targets_R = rows
        return spec.token_statistics(logits_RV, targets_R, ignore_index=ignore_index, xp=jnp)

    # XLA keeps several float32 arrays of the logits' shape: never for all rows at once.
    n_classes = logits.shape[-1]
    rows_N = (logits.reshape(-1, n_classes), None if targets is None else targets.reshape(-1))
    columns_N = map_row_chunks(statistics, rows_N, n_classes)
    return jax.tree.map(lambda x: x.reshape(logits.shape[:-1]), columns_N)


def _xla_linear_token_statistics(
    hidden: Array,
    weight: Array,
    bias: Array | None,
    targets: Array | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> TokenStatistics:
    def statistics(rows: tuple[Array, Array | None]) -> TokenStatistics:
        hidden_RD, targets_R = rows
        logits_RV = cross_entropy.linear_logits(hidden_RD, weight, bias, logit_scale, softcap)
        return _xla_token_statistics(logits_RV, targets_R, ignore_index)

    rows_N = (
        hidden.reshape(-1, hidden.shape[-1]),
        None if targets is None else targets.reshape(-1),
    )
    columns_N = map_row_chunks(statistics, rows_N, weight.shape[0])
    return jax.tree.map(lambda x: x.reshape(hidden.shape[:-1]), columns_N)


IMPLEMENTATIONS = {
    "xla": Implementation(
        _xla_token_statistics,
        _xla_linear_token_statistics,
        cross_entropy.weighted_nll_sum,
        cross_entropy.linear_weighted_nll_sum,
    ),
    "triton": Implementation(
        triton_calls.token_statistics,
        triton_calls.linear_token_statistics,
        triton_calls.weighted_nll_sum,
        triton_calls.linear_weighted_nll_sum,
    ),
}


def token_statistics(logits: Array, targets: Array | None, ignore_index: int) -> TokenStatistics:
    """Statistics of every row, without gradient."""
    return _run("token_statistics", (logits, targets), (ignore_index,))


def linear_token_statistics(
    hidden: Array,
    weight: Array,
    bias: Array | None,
    targets: Array | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
) -> TokenStatistics:
    """Statistics of every row of a linear head's logits, without gradient."""
    static = (ignore_index, logit_scale, softcap)
    return _run("linear_token_statistics", (hidden, weight, bias, targets), static)


def weighted_nll_sum(logits_RV: Array, label_R: Array, weight_R: Array) -> Array:
    """``Σ w nll`` of the rows, with its gradient to the logits."""
    return _run("weighted_nll_sum", (logits_RV, label_R, weight_R), ())


def linear_weighted_nll_sum(
    hidden_RD: Array,
    weight_VD: Array,
    bias_V: Array | None,
    label_R: Array,
    weight_R: Array,
    logit_scale: float,
    softcap: float | None,
) -> Array:
    """``Σ w nll`` of a linear head's rows, with its gradient to hidden, weight and bias."""
    arrays = (hidden_RD, weight_VD, bias_V, label_R, weight_R)
    return _run("linear_weighted_nll_sum", arrays, (logit_scale, softcap))


def _run(operation: str, arrays: tuple[Array | None, ...], static: tuple[Any, ...]) -> Any:
    """By the implementation that ``CGGR_IMPLEMENTATION`` names, else by the default.

    Raises:
        ValueError: There is none of that name.
        TypeError: It is ``"triton"``, and there is no kernel for the dtype.
        ImportError: It is the kernels' turn, and jax-triton is not installed.
    """
    dtype = arrays[0].dtype  # type: ignore[union-attr]  # only targets and bias may be missing
    has_kernel = dtype in triton_calls.DTYPES
    name = os.environ.get("CGGR_IMPLEMENTATION")
    if name is None:
        if has_kernel and may_launch():
            return _by_platform(operation, static, *arrays)
        name = "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"CGGR_IMPLEMENTATION must be one of {', '.join(map(repr, IMPLEMENTATIONS))} "
            f"in cggr.jax, got {name!r}."
        )
    if name == "triton" and not has_kernel:
        raise TypeError(
            f"CGGR_IMPLEMENTATION='triton' needs float32, bfloat16 or float16, got {dtype}: "
            f"CGGR_IMPLEMENTATION=xla computes it."
        )
    return getattr(IMPLEMENTATIONS[name], operation)(*arrays, *static)


def may_launch() -> bool:
    """Whether the kernels are the default, should the code be compiled for an NVIDIA GPU."""
    if importlib.util.find_spec("jax_triton") is None or jax.default_backend() != "gpu":
        return False
    # JAX divides what XLA computes among devices, but not a kernel's launch: arrays that are spread
    # would be gathered on every device. Inside shard_map each device has its own.
    return jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _by_platform(operation: str, static: tuple[Any, ...], *arrays: Array | None) -> Any:
    """By the kernels where this is compiled for CUDA, by XLA elsewhere.

    Compiled always, since only a compiler knows the platform: a process with a GPU may compute on
    the CPU.
    """

    def by(name: str) -> Callable[..., Any]:
        return lambda *arrays: getattr(IMPLEMENTATIONS[name], operation)(*arrays, *static)

    return jax.lax.platform_dependent(*arrays, cuda=by("triton"), default=by("xla"))
