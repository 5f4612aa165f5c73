"""Counter-based uniform numbers: bit for bit the same on every backend, at any time, in any order.

A number depends only on (seed, rank, draw, token index), never on a hidden state: a run that is
resumed repeats its draws, and torch and JAX draw the same tokens. All arithmetic is int32 with
wrap-around, which NumPy arrays, torch and XLA share.

Source of the mixing function: the "lowbias32" constants found by C. Wellons' hash prospector, 2018.
"""

from __future__ import annotations

from typing import Any

from cggr.spec.arrays import device_of
from cggr.spec.division import long_division

_WORD = 1 << 32
_INCREMENT = 0x9E3779B9  # 2**32 / golden ratio: keeps an all-zero key from mixing to zero


def _signed(value: int) -> int:
    """The int32 with the same bits; torch refuses constants of 2**31 and above."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _mix(x: Any) -> Any:
    # >> is arithmetic on int32; the mask after it makes it logical.
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def uniform_bits(seed: int, draw: Any, rank: Any, index: Any, *, xp: Any) -> Any:
    """31 uniform random bits for every token.

    Args:
        seed: Seed of the run, a Python int.
        draw: Number of the training forward, a Python int or an int32 array of one element.
        rank: Rank of the process, a Python int or an int32 array of one element.
        index: Token indices, int32, any shape.
        xp: Array namespace of `index`.

    Returns:
        int32 of `index`'s shape, in ``[0, 2**31)``.

    Example:
        >>> import numpy as np
        >>> uniform_bits(0, draw=1, rank=0, index=np.arange(3, dtype=np.int32), xp=np).tolist()
        [1862893511, 416542184, 2057867565]
    """
    flat = xp.reshape(index, (-1,))
    key = _mix(xp.full((1,), _signed(seed + _INCREMENT), dtype=xp.int32, device=device_of(flat)))
    for part in (rank, draw):
        word = _signed(part) if isinstance(part, int) else xp.reshape(part, (1,))
        key = _mix((key ^ word) + _signed(_INCREMENT))
    return xp.reshape(_mix(_mix(flat + key) ^ key) & 0x7FFFFFFF, index.shape)


def inverse_uniform(bits: Any, *, xp: Any) -> Any:
    """``1 / u`` for ``u = (2 (bits >> 8) + 1) / 2**24``, exact to 18 binary places, in float32.

    By integer long division, since compilers round a division of floats differently.

    Args:
        bits: int32 in ``[0, 2**31)``, from :func:`uniform_bits`.
        xp: Array namespace of `bits`.

    Returns:
        float32 of `bits`' shape, in ``(1, 2**24]``.
    """
    divisor = 2 * (bits >> 8) + 1
    numerator = xp.full_like(divisor, 1 << 24)
    whole, fraction, _ = long_division(numerator, divisor, digits=3, xp=xp)
    return xp.astype(whole, xp.float32) + xp.astype(fraction, xp.float32) * 2.0**-18
