"""Routers: a model's own first blocks as a cheap judge of difficulty.

A router shares the model's Variables and owns none: nothing is saved or optimised twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Truncation:
    """How to cut a model: the attribute path of its list of blocks, and how many to keep."""

    layers: str
    num_layers: int

    def __call__(self, model: M) -> M:
        """The model cut short: the same Variables, and new modules along the path alone."""
        return _truncated(model, self.layers.split("."), self.num_layers)


class TruncatedRouter(nnx.Module):
    """The model's embeddings, first blocks, final norm and head, sharing its Variables.

    Whatever the model computes from its list of blocks, computed from the first of them. The model
    must run through that list in a Python loop.

    Args:
        model: An nnx model with a list of blocks, ``nnx.List`` or ``nnx.Sequential``.
        num_layers: Blocks to run, at least 1.
        layers: Attribute path of the list, such as ``"decoder.layers"``; ``"auto"`` takes the
            longest list of modules of one type.

    Raises:
        ValueError: There is no such list, or no longest one, or `num_layers` is out of range.
    """

    def __init__(self, model: nnx.Module, num_layers: int = 2, layers: str = "auto") -> None:
        if layers == "auto":
            layers = find_layers(model)
        blocks = _blocks(model, layers)
        if not 1 <= num_layers <= len(blocks):
            raise ValueError(
                f"num_layers must be in [1, {len(blocks)}] for a model of {len(blocks)} blocks, "
                f"got {num_layers}."
            )
        self.source = model
        self.truncation = Truncation(layers, num_layers)

    def __call__(self, *inputs: Any, **model_inputs: Any) -> Any:
        """What the model returns, after its first blocks."""
        return self.truncation(self.source)(*inputs, **model_inputs)


def create_truncated_router(
    model: nnx.Module, num_layers: int = 2, layers: str = "auto"
) -> TruncatedRouter:
    """A router of the model's first blocks, sharing its Variables: :class:`TruncatedRouter`.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(*(nnx.Linear(4, 4, rngs=rngs) for _ in range(3)))
        >>> router = create_truncated_router(model, num_layers=1)
        >>> x = jax.numpy.ones((2, 4))
        >>> bool((router(x) == model.layers[0](x)).all())
        True
    """
    return TruncatedRouter(model, num_layers, layers)


def find_layers(model: nnx.Module) -> str:
    """Attribute path of the model's list of blocks: the longest list of modules of one type."""
    found = [
        (len(value), ".".join(map(str, path)))
        for path, value in nnx.iter_graph(model)
        # Not the lists inside a block, whose paths hold the block's number.
        if _is_list_of_blocks(value) and all(isinstance(name, str) for name in path)
    ]
    longest = max((length for length, _ in found), default=0)
    paths = sorted(path for length, path in found if length == longest)
    if not paths:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks (scanned layers are none): give "
            f"layers=, the attribute path of the list, or use the whole model as the router."
        )
    if len(paths) > 1:
        raise ValueError(
            f"{type(model).__name__} has several lists of {longest} blocks: give layers= one of "
            f"{', '.join(map(repr, paths))}."
        )
    return paths[0]


def frozen(module: M) -> M:
    """A copy to score with: no gradient, no dropout, and no trace of it in the module's state."""
    graphdef, state = nnx.split(module)
    copy = nnx.merge(graphdef, jax.lax.stop_gradient(state))
    copy.eval()
    return copy


def logits_of(output: Any) -> Array:
    """The logits in what a model returned: an array, an output with ``.logits``, or a tuple."""
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) else output
    if not isinstance(logits, jax.Array):
        raise TypeError(
            f"the model must return logits: an array, an output with .logits, or a tuple that "
            f"starts with them; got {type(output).__name__}."
        )
    return logits


def _is_list_of_blocks(value: Any) -> bool:
    if not isinstance(value, (nnx.List, list, tuple)):
        return False
    blocks = list(value)
    return (
        len(blocks) > 0
        and isinstance(blocks[0], nnx.Module)
        and all(type(block) is type(blocks[0]) for block in blocks)
    )


def _blocks(model: nnx.Module, path: str) -> Any:
    blocks: Any = model
    for name in path.split("."):
        blocks = getattr(blocks, name, None)
    if not _is_list_of_blocks(blocks):
        raise ValueError(
            f"layers must be the attribute path of a list of blocks of {type(model).__name__}, "
            f"got {path!r}."
        )
    return blocks


def _truncated(module: M, path: list[str], num_layers: int) -> M:
    copy = object.__new__(type(module))
    vars(copy).update(vars(module))
    name, *rest = path
    child = getattr(module, name)
    if rest:
        vars(copy)[name] = _truncated(child, rest, num_layers)
    else:
        vars(copy)[name] = type(child)(list(child)[:num_layers])
    return copy
