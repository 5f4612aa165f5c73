"""Which of a model's inputs belong to the sequences of a batch, whatever the framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def map_parts(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of every part of nested dicts, lists and tuples; the same object if none changes.

    Exact types: a cache, an output, a module or a named tuple is the model's own and stays whole.
    """
    if type(value) is dict:
        parts = {key: map_parts(function, part) for key, part in value.items()}
        return parts if any(parts[key] is not value[key] for key in parts) else value
    if type(value) in (list, tuple):
        mapped = [map_parts(function, part) for part in value]
        changed = any(new is not old for new, old in zip(mapped, value, strict=True))
        return type(value)(mapped) if changed else value
    return function(value)


def follows_sequences(name: str, shape: tuple[int, ...], batch: int, length: int) -> bool:
    """Whether an array of a model's input `name` belongs to the sequences of a ``(B, S)`` batch.

    Raises:
        ValueError: It has one dimension, which could be that of sequences or of positions.
    """
    if not shape or shape[0] != batch:
        return False
    if len(shape) == 1 and batch == length:
        raise ValueError(
            f"{name} of shape ({batch},) could belong to the {batch} sequences or to their "
            f"{length} positions: give it two dimensions, (B, 1) or (1, S)."
        )
    return True
