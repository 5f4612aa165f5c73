"""Attention that can run on the selected positions of a batch: what the token split stands on.

Shapes: ``B`` sequences of ``S`` tokens, ``C`` slots of each for the selected ones; ``H`` heads and
``K`` heads of keys and values, of size ``W``. An unused slot holds a position of S or more.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from jax import Array

from cggr.jax.router import frozen
from cggr.jax.selected_attention import Interval, by_kernels, interval_of, where_wanted

# What may be passed on to attention over other queries: none of it depends on where they stand.
_PLACELESS = frozenset(
    (
        "broadcast_dropout",
        "deterministic",
        "dropout_rate",
        "dropout_rng",
        "dtype",
        "implementation",
        "key_value_seq_lengths",
        "module",
        "precision",
        "promote_dtype",
        "scale",
    )
)
_QUERY_SIDE = ("query", "key", "value", "bias", "mask", "is_causal", "local_window_size")


class Record(NamedTuple):
    """What a layer's attention was given in the first pass, and the positions of the second.

    Attributes:
        key: ``(B, S, K, W)``; None before the first pass.
        value: ``(B, S, K, W)``.
        mask: Four dimensions that broadcast to ``(B, H, S, S)``, or None.
        bias: Likewise.
        selected: Positions of the second pass, int32 ``(B, C)``; None in the first.
    """

    key: Array | None = None
    value: Array | None = None
    mask: Array | None = None
    bias: Array | None = None
    selected: Array | None = None


class RowMemory(nnx.Variable):
    """A layer's :class:`Record`; there is one during a training step of CGGRModel only."""


class RowAttention(nnx.Module):
    """Attention that CGGRModel may run on selected positions, for ``split="token"``.

    Anywhere else it is the function that it wraps. Give every layer its own, as the
    ``attention_fn`` of ``nnx.MultiHeadAttention`` or in place of the function in an attention of
    your own. It holds no parameters and, between steps, no state.

    In the first pass of a training step it computes what the function computes and keeps keys,
    values, mask and bias. In the second, queries, keys and values come for the C selected positions
    only: it puts them in their places among the kept ones, which are constants, and attends from
    the C queries to all S keys, under their rows of the kept mask and bias. The mask that the model
    makes for C positions is not used. Of a bias the selected rows and columns have a gradient.

    Args:
        attention_fn: ``(query, key, value, *, mask, ...) -> attended`` for queries
            ``(B, T, H, W)``, keys and values ``(B, S, K, W)`` and a bool mask ``(B, 1 or H, T, S)``
            (or one that broadcasts to it), such as ``nnx.dot_product_attention`` and
            ``jax.nn.dot_product_attention``. What a query sees may depend on its place through
            `mask`, `bias`, `is_causal` and `local_window_size` alone.

    Raises:
        TypeError: `attention_fn` is not callable.
        ValueError: `attention_fn` takes no mask.

    Example:
        >>> layer = nnx.MultiHeadAttention(2, 8, attention_fn=RowAttention(), decode=False,
        ...                                rngs=nnx.Rngs(0))
        >>> plain = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (1, 5, 8))
        >>> bool((layer(x, is_causal=True) == plain(x, is_causal=True)).all())
        True
    """

    def __init__(self, attention_fn: Callable[..., Array] = nnx.dot_product_attention) -> None:
        if not callable(attention_fn):
            raise TypeError(f"attention_fn must be callable, got {attention_fn!r}.")
        if not _takes(attention_fn, "mask"):
            raise ValueError(
                f"attention_fn must take mask= by keyword, a bool array (B, 1, T, S) of what each "
                f"of T queries sees of S keys, as nnx.dot_product_attention does; got "
                f"{attention_fn!r}."
            )
        self.attention_fn = attention_fn
        # None between steps: no Variable that a checkpoint, a filter or nnx.split would meet.
        self.memory: RowMemory | None = nnx.data(None)

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        **options: Any,
    ) -> Array:
        """What `attention_fn` makes of its arguments.

        Args:
            query: ``(B, S, H, W)``; in the second pass of a step ``(B, C, H, W)``.
            key: ``(B, S, K, W)``, or ``(B, C, K, W)``.
            value: ``(B, S, K, W)``, or ``(B, C, K, W)``.
            bias: Broadcasts to ``(B, H, S, S)``.
            mask: Broadcasts to ``(B, H, S, S)``.
            **options: Passed on.

        Returns:
            ``(B, S, H, W)``, or ``(B, C, H, W)``.

        Raises:
            ValueError: In a step of CGGRModel: this is no self-attention over ``(B, S, H, W)``, the
                layer runs twice, or an option may depend on where the queries stand.
        """
        if self.memory is not None:
            record = self.memory.get_value()
            if record.selected is not None:
                return self._attend_from_rows(query, key, value, bias, record, options)
            self._keep(self.memory, query, key, value, bias, mask)
        if bias is not None:
            options["bias"] = bias
        return self.attention_fn(query, key, value, mask=mask, **options)

    def _keep(
        self,
        memory: RowMemory,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        mask: Array | None,
    ) -> None:
        if query.ndim != 4 or key.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"split='token' needs self-attention over (B, S, H, W), got query {query.shape} "
                f"and key {key.shape}."
            )
        if memory.get_value().key is not None:
            raise ValueError(
                "split='token' needs a RowAttention for every layer, got one that runs twice in a "
                "forward."
            )
        batch, length = query.shape[:2]
        record = Record(
            key,
            value,
            None if mask is None else _four_dimensions("mask", mask, batch, length),
            None if bias is None else _four_dimensions("bias", bias, batch, length),
        )
        try:
            memory.set_value(record)
        except errors.TraceContextError as error:
            raise ValueError(
                "split='token' cannot look into a transformation that does not know of the "
                "module: use nnx.remat instead of jax.checkpoint, and give it the layer as an "
                "argument."
            ) from error

    def _attend_from_rows(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None,
        record: Record,
        options: dict[str, Any],
    ) -> Array:
        if record.selected is None or record.key is None or record.value is None:
            raise ValueError(
                "split='token' needs both passes to run the same layers, got one of which there is "
                "no record: it did not run in the first pass, or inside a transformation that does "
                "not know of the module; use those of nnx, and give them the layer as an argument."
            )
        index_BC, length = record.selected, record.key.shape[1]
        for name, array in (("query", query), ("key", key), ("value", value)):
            if array.shape[:2] != index_BC.shape:
                raise ValueError(
                    f"split='token' called the model on {index_BC.shape} positions (B, C), and "
                    f"{name} came with shape {array.shape}."
                )
        # Unique, so that the scatter's transpose needs no atomic additions.
        slot_C = jnp.arange(index_BC.shape[1], dtype=index_BC.dtype)
        index_BC = jnp.where(index_BC < length, index_BC, length + slot_C)
        options = _defaults(self.attention_fn) | options
        attend = functools.partial(self._by_mask, bias, options)
        interval = None
        if record.mask is None and record.bias is None:
            interval = interval_of(self.attention_fn, options, query.dtype)
        if (
            interval is None
            or (where := where_wanted(query, key, value, record.key, record.value)) is None
        ):
            return attend(query, key, value, record, index_BC)
        fused = functools.partial(_by_kernels, interval, options.get("scale"))
        if where == "everywhere":
            return fused(query, key, value, record, index_BC)
        mixed: Array = jax.lax.platform_dependent(
            query, key, value, record, index_BC, cuda=fused, default=attend
        )
        return mixed

    def _by_mask(
        self,
        bias: Array | None,
        options: dict[str, Any],
        query: Array,
        key: Array,
        value: Array,
        record: Record,
        index_BC: Array,
    ) -> Array:
        key, value = _placed(record, key, value, index_BC)
        options = dict(options)  # it may be traced again
        sees = _sees(index_BC, key.shape[1], options)
        _check_options(self.attention_fn, options)
        mask = _rows(record.mask, index_BC)
        if mask is None:
            mask = sees
        elif sees is not None:
            mask = mask.astype(bool) & sees
        if record.bias is not None:
            options["bias"] = _biased(record.bias, bias, index_BC)
        n_rows = query.shape[1]
        # Where cuDNN is asked for: it differentiates no odd number of queries under a mask.
        if options.get("implementation") == "cudnn" and n_rows % 2:
            query = _with_last_again(query, 1)
            if mask is not None and mask.shape[2] > 1:  # one row is that of all
                mask = _with_last_again(mask, 2)
            if "bias" in options and options["bias"].shape[2] > 1:
                options["bias"] = _with_last_again(options["bias"], 2)
        return self.attention_fn(query, key, value, mask=mask, **options)[:, :n_rows]


def _by_kernels(
    interval: Interval,
    scale: float | None,
    query: Array,
    key: Array,
    value: Array,
    record: Record,
    index_BC: Array,
) -> Array:
    every = _placed(record, key, value, index_BC)
    return by_kernels(query, key, value, *every, index_BC, interval=interval, scale=scale)


def _with_last_again(x: Array, axis: int) -> Array:
    return jnp.concatenate([x, jax.lax.slice_in_dim(x, -1, None, axis=axis)], axis=axis)


def _placed(record: Record, key: Array, value: Array, index_BC: Array) -> tuple[Array, Array]:
    """Recorded keys and values, with the selected ones in their places."""
    assert record.key is not None
    assert record.value is not None
    return _put(record.key, key, index_BC), _put(record.value, value, index_BC)


def record_pass(model: nnx.Module, *inputs: Any, **model_inputs: Any) -> tuple[Any, list[Record]]:
    """The model's output without gradient and dropout, and what each of its layers attended to."""
    copy = frozen(model)
    layers = row_attentions(copy)
    for layer in layers:
        layer.memory = RowMemory(Record())
    output = copy(*inputs, **model_inputs)
    records = [layer.memory.get_value() for layer in layers if layer.memory is not None]
    return output, jax.lax.stop_gradient(records)


@contextlib.contextmanager
def row_pass(model: nnx.Module, records: list[Record], index_BC: Array) -> Iterator[None]:
    """In this context, the model computes the positions `index_BC` of what was recorded."""
    layers = row_attentions(model)
    try:
        for layer, record in zip(layers, records, strict=True):
            layer.memory = RowMemory(record._replace(selected=index_BC))
        yield
    finally:
        for layer in layers:
            layer.memory = None


def row_attentions(model: nnx.Module) -> list[RowAttention]:
    """Every :class:`RowAttention` of a model, in an order that is that of its copies too."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, RowAttention)]


def missing_for_rows(model: nnx.Module) -> str | None:
    """What keeps a model from being run on selected positions, and what would be right."""
    name = type(model).__name__
    if not _takes(type(model).__call__, "positions", named=True):
        return f"{name}.__call__ takes no positions= by keyword; it must, (B, S) integers"
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    for node in nodes:
        if isinstance(node, nnx.MultiHeadAttention) and not isinstance(
            node.attention_fn, RowAttention
        ):
            return (
                f"{name} has an nnx.MultiHeadAttention without RowAttention; it must be made with "
                f"attention_fn=RowAttention()"
            )
    if not any(isinstance(node, RowAttention) for node in nodes):
        return (
            f"{name} has no RowAttention; every layer must attend through one of its own, such as "
            f"attention_fn=RowAttention()"
        )
    for node in nodes:
        if isinstance(node, _MIXING):
            return (
                f"{name} has an nnx.{type(node).__name__}, which mixes positions; only attention "
                f"may, through RowAttention"
            )
        if _is_stacked(node):
            return (
                f"{name} has scanned layers, whose {type(node).__name__} is stacked; they must run "
                f"in a Python loop, each with a RowAttention of its own"
            )
    return None


_MIXING = (nnx.BatchNorm, nnx.Conv, nnx.ConvTranspose, nnx.RNN, nnx.Bidirectional)
# Dimensions of a parameter that is not stacked.
_DIMENSIONS: tuple[tuple[type, str, int], ...] = (
    (nnx.Linear, "kernel", 2),
    (nnx.Embed, "embedding", 2),
    (nnx.RMSNorm, "scale", 1),
    (nnx.LayerNorm, "scale", 1),
)


def _is_stacked(module: nnx.Module) -> bool:
    if isinstance(module, nnx.MultiHeadAttention):
        return module.query.kernel.ndim != 3
    for kind, name, ndim in _DIMENSIONS:
        if isinstance(module, kind):
            parameter = getattr(module, name)
            return parameter is not None and parameter.ndim > ndim
    return False


def at_positions(name: str, x: Any, index_BC: Array, length: int) -> Any:
    """A part of a model's inputs for the positions ``(B, C)`` of its ``(B, S)`` tokens.

    ``(B, S, ...)`` and ``(1, S, ...)`` become ``(B, C, ...)``; masks ``(B, 1, S, S)`` and
    ``(B, S, S)`` become ``(B, 1, C, C)`` and ``(B, C, C)``. All else is whole: numbers, raw PRNG
    keys, arrays of the sequences.

    Raises:
        ValueError: The array may or may not belong to the positions.
    """
    if not isinstance(x, (Array, np.ndarray)) or (x.ndim == 1 and x.dtype == jnp.uint32):
        return x
    batch, shape = index_BC.shape[0], x.shape
    if len(shape) == 1 and shape[0] == length:
        raise ValueError(
            f"{name} of shape ({length},) could belong to the positions: give it two dimensions, "
            f"(1, S), or (B, 1) if it belongs to the sequences."
        )
    if shape == (length, length) and batch != length:
        raise ValueError(
            f"{name} of shape {shape} could be a mask of all sequences: give it as (1, 1, S, S)."
        )
    if len(shape) < 2 or shape[0] not in (1, batch) or length == 1:
        return x
    # Queries and keys of a mask (B, H, S, S); either may be 1.
    is_mask = len(shape) in (3, 4) and shape[-1] == length and shape[-2] in (1, length)
    follows = shape[1] == length
    if follows and (
        (is_mask and (len(shape) == 4 or jnp.issubdtype(x.dtype, jnp.floating)))
        or (len(shape) > 3 and shape[2] == length)
    ):
        raise ValueError(
            f"{name} of shape {shape} could be a mask or belong to the positions: give a mask as "
            f"(B, 1, S, S), and what belongs to the positions as (B, S, D) with D other than S."
        )
    if is_mask:
        x = _rows(x, index_BC)
        return _columns(x, index_BC)
    return _by_sequence(_take, x, index_BC, 0) if follows else x


def _takes(function: Callable[..., Any], name: str, *, named: bool = False) -> bool:
    """Whether a function takes a keyword; with `named`, by that very name."""
    parameters = inspect.signature(function).parameters
    if name in parameters:
        return parameters[name].kind in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        )
    anything = (p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return not named and any(anything)


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """What the function takes when nothing is said, bound keywords of a partial included."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
        and name not in ("bias", "mask")
    }


def _sees(index_BC: Array, length: int, options: dict[str, Any]) -> Array | None:
    """The mask ``(B, 1, C, S)`` that the options stand for, which are switched off."""
    position_S = jnp.arange(length, dtype=index_BC.dtype)
    # An unused slot sees what the last position sees: a row without any key would be NaN.
    index = jnp.minimum(index_BC, length - 1)[:, None, :, None]
    masks = []
    if options.get("is_causal"):
        options["is_causal"] = False
        masks.append(position_S <= index)
    window = options.get("local_window_size")
    if window is not None:
        options["local_window_size"] = None
        pair = isinstance(window, (tuple, list))
        before, after = window if pair else (int(window), int(window))
        masks.append((position_S >= index - before) & (position_S <= index + after))
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]


def _check_options(function: Callable[..., Any], options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _PLACELESS or name in _QUERY_SIDE or value is None or value is False:
            continue
        if not isinstance(value, float):  # such as a soft-cap
            raise ValueError(
                f"split='token' cannot tell whether {name}={value!r} of the attention function "
                f"{getattr(function, '__name__', function)} depends on where the queries stand: "
                f"say what does in mask= or bias=, and bind the rest in a function of your own."
            )


def _four_dimensions(name: str, x: Any, batch: int, length: int) -> Array:
    x = jnp.asarray(x)
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    if x.ndim != 4 or x.shape[0] not in (1, batch) or not {*x.shape[2:]} <= {1, length}:
        raise ValueError(
            f"split='token' needs a {name} that broadcasts to (B, H, S, S), with B = {batch} and "
            f"S = {length}, got shape {x.shape}."
        )
    return x


def _by_sequence(function: Callable[..., Array], x: Any, index_BC: Array, axis: int) -> Array:
    """A function of every sequence's part of x, which may be one part for all."""
    x = jnp.asarray(x)
    if x.shape[0] == 1:
        return jax.vmap(lambda index_C: function(x[0], index_C, axis))(index_BC)
    return jax.vmap(lambda x, index_C: function(x, index_C, axis))(x, index_BC)


def _take(x: Array, index_C: Array, axis: int) -> Array:
    return jnp.take(x, index_C, axis=axis, mode="clip")


def _rows(x: Any, index_BC: Array) -> Any:
    """The selected rows ``(..., C, S)`` of a mask or bias ``(..., S, S)``."""
    if x is None or x.shape[-2] == 1:
        return x
    return _by_sequence(_take, x, index_BC, x.ndim - 3)


def _columns(x: Array, index_BC: Array) -> Array:
    return x if x.shape[-1] == 1 else _by_sequence(_take, x, index_BC, x.ndim - 2)


def _put(constant: Array, selected: Array, index_BC: Array) -> Array:
    """``(B, S, ...)`` with the selected ``(B, C, ...)`` in their places; beyond S is nowhere."""
    put = jax.vmap(
        lambda constant, index_C, selected: constant.at[index_C].set(
            selected.astype(constant.dtype), mode="drop", unique_indices=True
        )
    )
    return put(constant, index_BC, selected)


def _biased(recorded: Array, bias: Array | None, index_BC: Array) -> Array:
    """The selected rows of the recorded bias, with the gradient of the selected columns."""
    rows = _rows(recorded, index_BC)
    if bias is None:
        return rows
    batch, capacity = index_BC.shape
    given = _four_dimensions("bias", bias, batch, capacity)
    # 0, with a gradient; -inf - -inf would be no 0.
    zero = jnp.where(jnp.isfinite(given), given - jax.lax.stop_gradient(given), 0)
    if recorded.shape[-1] == 1:
        return rows + zero
    zero = jnp.broadcast_to(zero, (batch, zero.shape[1], zero.shape[2], capacity))
    put = jax.vmap(
        lambda zeros, index_C, zero: zeros.at[..., index_C].set(
            zero, mode="drop", unique_indices=True
        )
    )
    zeros = jnp.zeros_like(zero, shape=(*zero.shape[:-1], recorded.shape[-1]))
    return rows + put(zeros, index_BC, zero)
