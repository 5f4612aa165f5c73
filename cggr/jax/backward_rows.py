"""A backward pass of some rows, which are chosen when the forward pass has ended.

Shapes: ``N`` rows, in ``G`` groups of ``M`` with ``C`` slots each, ``R = G C``; ``D`` inputs and
``F`` outputs of a linear layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from cggr.jax.selected import put_rows, rows_of_slots, take_rows

# Linear layers of attention: those that have no part in the keys and values, which all tokens read,
# and those that make them, alone or together with queries.
_OF_QUERIES = {"q_proj", "query", "q", "wq", "o_proj", "out_proj", "out", "o", "wo"}
_OF_QUERIES |= {"dense", "c_proj"}
_OF_KEYS = {"k_proj", "v_proj", "key", "value", "k", "v", "wk", "wv", "kv_proj", "kv"}
_OF_KEYS |= {"qkv_proj", "qkv", "wqkv", "c_attn", "query_key_value", "in_proj"}
_LINEAR = (nnx.Linear, nnx.LinearGeneral)
_ROWWISE = (nnx.Embed, nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


class BackwardRows(NamedTuple):
    """Which rows the backward pass is of, known only when the forward pass has ended.

    Attributes:
        index_GC: int32, rows of each group; unused slots lie beyond M, each at a place of its own.
        fault: float32 scalar, NaN until the rows are chosen, then 0: a backward pass that was not
            told of them makes NaN of all gradients.
    """

    index_GC: Array
    fault: Array

    @classmethod
    def waiting(cls, groups: int, capacity: int) -> BackwardRows:
        """Before they are chosen."""
        return cls(jnp.zeros((groups, capacity), jnp.int32), jnp.array(jnp.nan, jnp.float32))

    @classmethod
    def chosen(cls, indices: Array, size: int) -> BackwardRows:
        """Those of a selection's indices, of which unused ones are M or more."""
        return cls(rows_of_slots(indices, size), jnp.zeros((), jnp.float32))


def loss_of_chosen(
    run: Callable[[Any, Any, BackwardRows], tuple[Array, Any]],
    choose: Callable[[Any, Any, Array], tuple[BackwardRows, Callable[[Array], Array], Any]],
    state: Any,
    arrays: Any,
    given: Any,
    slots: tuple[int, int],
) -> tuple[Array, Any, Any]:
    """A loss whose backward pass is of rows that the forward pass's result chooses.

    The rows are an argument of the forward pass, which keeps it for the backward pass. Between the
    two, what was kept of it is replaced by the rows that were chosen: the saved arguments of a VJP
    object may be edited.

    Args:
        run: ``(state, arrays, rows) -> logits (..., V), whatever else it makes``.
        choose: ``(arrays, given, logits) -> rows, a function from logits to the loss, whatever
            else it makes``, which has no gradient.
        state: Of the model: what has a gradient, and what has none.
        arrays: Inputs of the model, which have a gradient too.
        given: Arrays that have none. Like the others they come by argument, since a function that
            has its own derivative must not capture what a transformation traces.
        slots: G and C.

    Returns:
        The loss, and what `run` and `choose` made beside.

    References:
        https://docs.jax.dev/en/latest/301/vjp-objects.html
    """

    def forward(state: Any, arrays: Any, given: Any) -> tuple[Any, Any]:
        waiting = BackwardRows.waiting(*slots)
        pull: Any  # a VJP object, of which its type says nothing yet
        (logits, of_run), pull = jax.vjp(run, state, arrays, waiting)
        rows, loss, of_choice = choose(arrays, given, logits)
        pull.args_res[2] = rows
        total, pull_loss = jax.vjp(loss, logits)
        return (total, of_run, of_choice), (pull, pull_loss)

    @jax.custom_vjp
    def result(state: Any, arrays: Any, given: Any) -> Any:
        return forward(state, arrays, given)[0]

    def backward(pulls: Any, cotangents: Any) -> Any:
        pull, pull_loss = pulls
        d_total, d_of_run, _ = cotangents
        d_state, d_arrays, _ = pull((*pull_loss(d_total), d_of_run))
        return d_state, d_arrays, None

    result.defvjp(forward, backward)
    found: tuple[Array, Any, Any] = result(state, arrays, given)
    return found


def linears_of_rows(model: nnx.Module) -> tuple[list[Any], str | None]:
    """Linear layers through which a token's gradient comes from that token's output alone.

    All but those of keys and values, or of what is made together with them. An attention is a
    module whose class, or a base of it, has it in its name, or which has a linear layer that is
    called as those of keys and values are.

    Returns:
        Those layers, and what stands against having them: a module with other weights, which would
        pass the gradient of all tokens, or no attention that is known; None if nothing does.
    """
    modules = {path: x for path, x in nnx.iter_graph(model) if isinstance(x, nnx.Module)}
    linears = {path: x for path, x in modules.items() if type(x) in _LINEAR}
    named = {path for path, x in modules.items() if _is_named_attention(x)}
    named = {a for a in named if any(_is_in(path, a) for path in linears)}
    attention = named | {path[:-1] for path in linears if path[-1] in _OF_KEYS}
    # The innermost: a model may be called after its attention.
    attention = {a for a in attention if not any(_is_in(b, a) for b in attention)}

    def is_inside(path: tuple[Any, ...]) -> bool:
        return any(_is_in(path, a) for a in attention)

    found = [x for path, x in linears.items() if not is_inside(path) or path[-1] in _OF_QUERIES]
    for path, x in nnx.iter_graph(model):
        if isinstance(x, nnx.Param) and x.ndim > 1 and not is_inside(path):
            owner = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in modules)
            kind = type(modules[owner])
            if kind not in _LINEAR and not issubclass(kind, _ROWWISE):
                name = ".".join(map(str, owner)) or "the model"
                return found, (
                    f"{name} of class {kind.__name__} has weights and is no nnx.Linear or "
                    f"nnx.LinearGeneral"
                )
    if not found:
        return found, f"{type(model).__name__} has no nnx.Linear or nnx.LinearGeneral"
    if not attention:
        return found, (
            "no attention was found, whose keys and values have the gradient of all tokens: its "
            "class must have Attention in its name, or its layers be called k_proj and v_proj, or "
            "key and value"
        )
    return found, None


def _is_in(path: tuple[Any, ...], outer: tuple[Any, ...]) -> bool:
    return path[: len(outer)] == outer != path


def _is_named_attention(module: nnx.Module) -> bool:
    return any("Attention" in kind.__name__ for kind in type(module).__mro__)


def set_backward_rows(
    model: nnx.Module, rows: BackwardRows, shape: tuple[int, int]
) -> Callable[[], bool]:
    """Makes the backward passes of a model's linear layers of these rows, for good.

    Args:
        model: The model, whose layers are changed.
        rows: The rows.
        shape: B and S: a layer has the batch's rows if it is given ``(B, S, ...)`` or ``(N, ...)``.

    Returns:
        A function that tells whether any layer has had them.
    """
    seen: list[bool] = []
    for linear in linears_of_rows(model)[0]:
        dot_general = linear.dot_general
        if getattr(linear, "dot_general_cls", None) is not None:  # which goes before the other
            dot_general, linear.dot_general_cls = linear.dot_general_cls(), None
        linear.dot_general = functools.partial(
            _dot_general_of_rows, dot_general or jax.lax.dot_general, rows, shape, seen
        )
    return lambda: bool(seen)


def _dot_general_of_rows(
    dot_general: Callable[..., Array],
    rows: BackwardRows,
    shape: tuple[int, int],
    seen: list[bool],
    x: Array,
    kernel: Array,
    dimensions: Any,
    **options: Any,
) -> Array:
    """A linear layer's product, with gradients of the chosen rows."""
    (of_x, of_kernel), (batch, _) = dimensions
    n_axes = len(of_x)
    leading = x.shape[: x.ndim - n_axes]
    in_order = tuple(axis % x.ndim for axis in of_x) == tuple(range(len(leading), x.ndim))
    if batch or not in_order or tuple(of_kernel) != tuple(range(n_axes)):
        raise ValueError(
            f"split='backward' takes linear layers over the last axes alone, got {dimensions}."
        )
    n_rows = math.prod(shape)
    if leading not in (shape, (n_rows,)):  # such as the rows that were sent to an expert
        return dot_general(x, kernel, dimensions, **options)
    seen.append(True)

    def multiply(x_ND: Array, kernel_DF: Array) -> Array:
        return dot_general(x_ND, kernel_DF, (((1,), (0,)), ((), ())), **options)

    x_ND = x.reshape(n_rows, -1)
    kernel_DF = kernel.reshape(x_ND.shape[1], -1)
    output_NF = _selected_product(multiply, x_ND, kernel_DF, rows)
    return output_NF.reshape(*leading, *kernel.shape[n_axes:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected_product(
    multiply: Callable[[Array, Array], Array], x_ND: Array, kernel_DF: Array, rows: BackwardRows
) -> Array:
    return multiply(x_ND, kernel_DF)


def _forward(
    multiply: Callable[[Array, Array], Array], x_ND: Array, kernel_DF: Array, rows: BackwardRows
) -> tuple[Array, Any]:
    return multiply(x_ND, kernel_DF), (x_ND, kernel_DF, rows)


def _backward(
    multiply: Callable[[Array, Array], Array], residuals: Any, gradient_NF: Array
) -> tuple[Array, Array, None]:
    x_ND, kernel_DF, (index_GC, fault) = residuals
    gradient_RF = take_rows(gradient_NF, index_GC) + fault.astype(gradient_NF.dtype)
    _, pull = jax.vjp(multiply, take_rows(x_ND, index_GC), kernel_DF)
    d_x_RD, d_kernel = pull(gradient_RF)
    return put_rows(d_x_RD, index_GC, len(x_ND)), d_kernel, None


_selected_product.defvjp(_forward, _backward)
