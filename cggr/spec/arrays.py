"""The two questions about arrays that the array API standard leaves to each library."""

from __future__ import annotations

from typing import Any


def device_of(x: Any) -> Any:
    """Device for arrays created beside `x`.

    None, the default, for a tracer of ``jax.jit`` and for an array of JAX that is spread over many
    devices, whose ``device`` is how it is spread.
    """
    device = getattr(x, "device", None)
    return None if hasattr(device, "device_set") else device


def index_dtype(xp: Any) -> Any:
    """Integer type for ``take_along_axis``: torch wants int64, JAX has only int32 by default."""
    return getattr(xp, "long", xp.int32)
