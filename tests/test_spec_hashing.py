"""Counter-based numbers: the same bits everywhere, and random enough."""

import array_api_compat.torch as xp_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

from cggr.spec.hashing import inverse_uniform, uniform_bits

WORDS = st.integers(0, 2**31 - 1)
INDEX = np.concatenate([np.arange(300), 2**29 - np.arange(1, 50)]).astype(np.int32)


@jax.jit
def jax_bits(draw, rank, index):
    return uniform_bits(2**32 - 5, draw, rank, index, xp=jnp)


@given(st.integers(0, 2**32 - 1), WORDS, WORDS)
def test_bits_are_those_of_the_truth_on_numpy_and_torch(seed, draw, rank):
    expected = truth.uniform_bits_array(seed, draw, rank, INDEX)
    on_numpy = uniform_bits(seed, draw, rank, INDEX, xp=np)
    on_torch = uniform_bits(seed, draw, rank, torch.from_numpy(INDEX), xp=xp_torch)
    assert on_numpy.dtype == np.int32
    assert on_torch.dtype == torch.int32
    np.testing.assert_array_equal(on_numpy, expected)
    np.testing.assert_array_equal(on_torch.numpy(), expected)


@given(WORDS, WORDS)
def test_bits_are_those_of_the_truth_under_jit(draw, rank):
    expected = truth.uniform_bits_array(2**32 - 5, draw, rank, INDEX)
    bits = jax_bits(np.int32(draw), np.int32(rank), INDEX)
    np.testing.assert_array_equal(np.asarray(bits), expected)


def test_inverse_of_a_uniform_number_is_exact_on_every_backend():
    rng = np.random.default_rng(0)
    ends = np.array([0, 1, 255, 256, 257, 2**31 - 1, 2**31 - 257], dtype=np.int32)
    bits = np.concatenate([ends, rng.integers(0, 2**31, 3000, dtype=np.int32)])
    bits = np.concatenate([bits, rng.integers(0, 2**12, 500, dtype=np.int32)])
    expected = np.array([truth.inverse_uniform(b) for b in bits], dtype=np.float32)
    np.testing.assert_array_equal(inverse_uniform(bits, xp=np), expected)
    np.testing.assert_array_equal(
        inverse_uniform(torch.from_numpy(bits), xp=xp_torch).numpy(), expected
    )
    np.testing.assert_array_equal(
        np.asarray(jax.jit(lambda b: inverse_uniform(b, xp=jnp))(bits)), expected
    )
    u = (2 * (bits.astype(np.int64) >> 8) + 1) / 2.0**24
    np.testing.assert_allclose(expected * u, 1, rtol=4e-6)


@pytest.mark.parametrize("varied", ["seed", "draw", "rank", "index"])
def test_numbers_are_uniform_and_uncorrelated_along_every_counter(varied):
    # 65,536 numbers per counter: mean, variance, lag-one correlation and a 64-cell chi-square,
    # each within five standard errors.
    n = 1 << 16
    if varied == "index":
        bits = uniform_bits(3, 1, 0, np.arange(n, dtype=np.int32), xp=np)
    else:
        index = np.array([7], dtype=np.int32)
        values = range(n // 16)
        bits = np.concatenate(
            [
                uniform_bits(xp=np, index=index, **{"seed": 3, "draw": 1, "rank": 0, varied: value})
                for value in values
            ]
        )
    n = bits.size
    u = bits / 2.0**31
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / np.sqrt(n)
    cells = np.bincount((u * 64).astype(int), minlength=64)
    chi_square = ((cells - n / 64) ** 2 / (n / 64)).sum()
    assert abs(chi_square - 63) < 5 * np.sqrt(2 * 63)
