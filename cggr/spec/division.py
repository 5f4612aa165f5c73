"""Division that every compiler rounds alike.

XLA and Triton divide floats on CUDA to within two units of the last place. Integers they divide
exactly, so the quotients of which selections are made are built by long division, digit by digit.
"""

from __future__ import annotations

from typing import Any

_DIGIT = 64  # a remainder below 2**24 times this stays below 2**31


def long_division(numerator: Any, divisor: Any, *, digits: int, xp: Any) -> tuple[Any, Any, Any]:
    """Whole part and fraction of ``numerator / divisor``, in digits of base 64.

    Args:
        numerator: int32, not negative.
        divisor: int32 in ``[1, 2**24]``.
        digits: Digits of the fraction, at most 5.
        xp: Array namespace of the arrays.

    Returns:
        The whole part, the fraction in units of ``64**-digits``, and what remains of the numerator
        in those units, below `divisor`; all int32.

    Example:
        >>> import numpy as np
        >>> long_division(np.int32([7]), np.int32([4]), digits=1, xp=np)
        (array([1], dtype=int32), array([48], dtype=int32), array([0], dtype=int32))
    """
    whole = numerator // divisor
    remainder = numerator - whole * divisor
    fraction = xp.zeros_like(remainder)
    for _ in range(digits):
        remainder = remainder * _DIGIT
        digit = remainder // divisor
        remainder = remainder - digit * divisor
        fraction = fraction * _DIGIT + digit
    return whole, fraction, remainder


def quotient(numerator: Any, divisor: Any, *, xp: Any) -> Any:
    """``numerator / divisor`` in float32, rounded to nearest, where it is in ``[1, 2**25]``.

    Args:
        numerator: float32, normal and positive, or 0.
        divisor: float32, normal and positive.
        xp: Array namespace of the arrays.

    Returns:
        float32: the quotient, something below 1 where it is below 1, and something above 1 where
        it is above ``2**25``.

    Example:
        >>> import numpy as np
        >>> quotient(np.float32([10.0]), np.float32([3.0]), xp=np) == np.float32(10) / np.float32(3)
        array([ True])
    """
    mantissa, exponent = _parts(numerator, xp)
    divisor_mantissa, divisor_exponent = _parts(divisor, xp)
    # The mantissas' quotient is in (1/2, 2), and 24 bits of it are wanted: the fraction's, or the
    # whole and 23 of them. The bit after those rounds: no quotient of floats ends halfway.
    whole, fraction, remainder = long_division(mantissa, divisor_mantissa, digits=4, xp=xp)
    below_one = fraction + xp.astype(2 * remainder >= divisor_mantissa, xp.int32)
    above_one = (((1 << 24) + fraction + 1) >> 1) * 2
    significand = xp.where(whole > 0, above_one, below_one)
    shift = exponent - divisor_exponent
    scale = xp.minimum(xp.maximum(shift, xp.zeros_like(shift)), xp.full_like(shift, 25))
    power = xp.astype(xp.ones_like(scale) << scale, xp.float32)
    return xp.where(shift < 0, 0.0, xp.astype(significand, xp.float32) * 2.0**-24 * power)


def _parts(x: Any, xp: Any) -> tuple[Any, Any]:
    """Mantissa in ``[2**23, 2**24)`` and biased exponent; int32."""
    bits = x.view(xp.int32)  # which NumPy, torch and JAX share, though the standard has it not
    return (bits & 0x7FFFFF) | 0x800000, bits >> 23
