"""Quotients that are rounded as IEEE 754 wants, on every backend and whatever its compiler does."""

import array_api_compat.torch as xp_torch
import jax
import jax.numpy as jnp
import numpy as np
import torch

from cggr.spec.division import long_division, quotient


def pairs():
    """Numerators and divisors of every magnitude, mantissas that round hard among them."""
    rng = np.random.default_rng(0)
    near = np.concatenate([np.arange(40), 2**23 - 1 - np.arange(40), rng.integers(0, 2**23, 300)])
    mantissas = (1 + near / 2**23).astype(np.float32)
    a, b = (x.ravel() for x in np.meshgrid(mantissas, mantissas))
    scale = rng.integers(-90, 95, a.size)
    divisor = np.ldexp(b, scale).astype(np.float32)
    numerator = np.ldexp(a, scale + rng.integers(0, 25, a.size)).astype(np.float32)
    return numerator, divisor


def on_every_backend(numerator, divisor):
    yield quotient(numerator, divisor, xp=np)
    yield quotient(torch.from_numpy(numerator), torch.from_numpy(divisor), xp=xp_torch).numpy()
    yield np.asarray(jax.jit(lambda a, b: quotient(a, b, xp=jnp))(numerator, divisor))


def test_a_quotient_is_rounded_to_nearest():
    numerator, divisor = pairs()
    expected = numerator / divisor  # NumPy's division is that of IEEE 754
    kept = expected >= 1
    assert kept.mean() > 0.9
    for result in on_every_backend(numerator, divisor):
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result[kept], expected[kept])
        assert (result[~kept] < 1).all()


def test_what_is_out_of_range_stays_on_its_side():
    numerator = np.array([0, 1e-30, 1, 1, 2.0**124, 2.0**60], np.float32)
    divisor = np.array([1e-30, 2.0**100, 2, 1.0000001, 1e-30, 1.5], np.float32)
    for result in on_every_backend(numerator, divisor):
        assert (result[:4] < 1).all()
        assert (result[4:] > 1).all()
        assert np.isfinite(result).all()


def test_long_division_is_exact():
    rng = np.random.default_rng(1)
    numerator = rng.integers(0, 2**25, 5000).astype(np.int32)
    divisor = rng.integers(1, 2**24, 5000).astype(np.int32)
    whole, fraction, remainder = long_division(numerator, divisor, digits=4, xp=np)
    for n, d, w, f, r in zip(
        *map(np.ndarray.tolist, (numerator, divisor, whole, fraction, remainder)), strict=True
    ):
        assert n * 2**24 == (w * 2**24 + f) * d + r
        assert 0 <= r < d
