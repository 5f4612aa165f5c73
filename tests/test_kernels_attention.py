"""kernels/selected_attention.py: output and gradients are those of float64 over the same keys."""

import itertools

import kernels_on
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# The interpreter does not round to bfloat16, it truncates.
HALF = torch.float16 if kernels_on.INTERPRETED else torch.bfloat16
# Relative to the largest entry. Products are rounded to the dtype before they are multiplied again.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
VIEWS = ("causal", "window", "packed", "bidirectional", "left padding")


def attention(query, key, value, low, high, scale, softcap=None, keys=None):
    """Mixed values and probabilities by NumPy, zeros where a query sees nothing."""
    group = query.shape[1] // key.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (key, value))
    scores = scale * np.einsum("bhcw,bhsw->bhcs", query, k)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    place = np.arange(key.shape[2])
    sees = (place >= low[..., None]) & (place < high[..., None])
    sees = sees if keys is None else sees & keys[:, None]
    scores = np.where(sees[:, None], scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    e = np.where(sees[:, None], np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    total = e.sum(axis=-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    return np.einsum("bhcs,bhsw->bhcw", p, v), p


def expected(query, key, value, low, high, index, grad, scale, softcap=None, keys=None):
    """Output, and gradients of queries and of the keys and values at `index`."""
    batch, kv_heads, _, width = key.shape
    group = query.shape[1] // kv_heads
    out, p = attention(query, key, value, low, high, scale, softcap, keys)
    v = np.repeat(value, group, axis=1)
    ds = p * (np.einsum("bhcw,bhsw->bhcs", grad, v) - (grad * out).sum(axis=-1, keepdims=True))
    if softcap is not None:
        products = np.einsum("bhcw,bhsw->bhcs", query, np.repeat(key, group, axis=1))
        ds *= 1 - np.tanh(scale * products / softcap) ** 2
    dq = scale * np.einsum("bhcs,bhsw->bhcw", ds, np.repeat(key, group, axis=1))
    dk = scale * np.einsum("bhcs,bhcw->bhsw", ds, query)
    dv = np.einsum("bhcs,bhcw->bhsw", p, grad)
    length = key.shape[2]
    rows = np.arange(batch)[:, None], slice(None), np.minimum(index, length - 1)
    dk, dv = (x.reshape(batch, kv_heads, group, -1, width).sum(axis=2)[rows] for x in (dk, dv))
    inside = (index < length)[:, :, None, None]
    dk, dv = (np.where(inside, x, 0).swapaxes(1, 2) for x in (dk, dv))
    return out, dq, dk, dv


def problem(batch, heads, kv_heads, length, n_rows, width, dtype, view="causal", seed=0):
    """Query, key, value, low, high, index and a gradient."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: torch.from_numpy(rng.normal(size=shape)).to(dtype)  # noqa: E731
    query, grad = (normal(batch, heads, n_rows, width) for _ in range(2))
    key, value = (normal(batch, kv_heads, length, width) for _ in range(2))
    index = np.stack([np.sort(rng.permutation(length)[:n_rows]) for _ in range(batch)])
    low, high = np.zeros_like(index), index + 1
    if view == "window":
        low = np.maximum(high - max(1, length // 5), 0)
    elif view == "packed":
        low = index // 7 * 7
    elif view == "bidirectional":
        high = np.full_like(index, length)
    elif view == "left padding":  # its own queries see nothing
        low = low + np.minimum(np.arange(batch) * 3, length - 1)[:, None]
    return query, key, value, low, high, index, grad


def check(
    query, key, value, low, high, index, grad, *, scale=0.3, softcap=None, keys=None,
    tolerance=None, **options,
):  # fmt: skip
    found = kernels_on.selected_attention(
        query, key, value, low, high, index, grad, scale, softcap, keys, **options
    )
    arrays = [x.double().numpy() for x in (query, key, value)]
    want = expected(*arrays, low, high, index, grad.double().numpy(), scale, softcap, keys)
    tolerance = tolerance or TOLERANCE[query.dtype]
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, want, strict=True):
        assert np.isfinite(a).all(), name
        # What cancels to nothing is sums of numbers about 1.
        atol = tolerance * max(np.abs(b).max(), 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
    return found


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_expected_gradients_are_those_of_differences(softcap):
    query, key, value, low, high, index, grad = problem(2, 4, 2, 9, 5, 3, torch.float64, "window")
    arrays = [x.numpy() for x in (query, key, value)]
    _, *gradients = expected(*arrays, low, high, index, grad.numpy(), 0.3, softcap)
    rng, step = np.random.default_rng(1), 1e-6
    for which, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        change = np.zeros_like(arrays[which])
        if which == 0:
            change = direction
        else:
            rows = np.arange(2)[:, None], slice(None), index
            change[rows] = direction.swapaxes(1, 2)
        outs = []
        for sign in (1, -1):
            moved = [x + sign * step * change if i == which else x for i, x in enumerate(arrays)]
            outs.append(attention(*moved, low, high, 0.3, softcap)[0])
        numeric = ((outs[0] - outs[1]) * grad.numpy()).sum() / (2 * step)
        assert numeric == pytest.approx((gradient * direction).sum(), rel=1e-6)


@pytest.mark.parametrize("tiles", [None, (16, 16), (16, 32)], ids=str)
@pytest.mark.parametrize(("view", "dtype"), [*itertools.product(VIEWS, (torch.float32, HALF))])
def test_what_queries_see(view, dtype, tiles):
    check(*problem(2, 4, 2, 75, 29, 16, dtype, view), tiles=tiles)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("tiles", [None, (16, 16)], ids=str)
@pytest.mark.parametrize(("view", "dtype"), [*itertools.product(VIEWS, (torch.float32, HALF))])
def test_keys_that_none_sees(view, dtype, tiles, softcap):
    rng = np.random.default_rng(3)
    keys = rng.random((3, 75)) < 0.6
    keys[1, 20:60] = False  # more than a tile of them
    keys[2] = False
    given = problem(3, 4, 2, 75, 29, 16, dtype, view)
    check(*given, tiles=tiles, keys=keys, softcap=softcap, compact=softcap is not None)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "n_rows", "width"),
    [
        (1, 1, 1, 1, 16),
        (3, 3, 65, 64, 24),
        (6, 2, 130, 33, 64),
        (9, 3, 200, 129, 40),
        (2, 1, 140, 70, 128),
        (2, 2, 40, 40, 80),
        (2, 1, 33, 7, 256),
    ],
)
def test_every_shape(heads, kv_heads, length, n_rows, width, dtype):
    check(*problem(2, heads, kv_heads, length, n_rows, width, dtype), scale=width**-0.5)


@settings(max_examples=15)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    st.integers(1, 50),
    st.floats(0.0, 1.0),
    st.sampled_from(VIEWS),
    st.integers(0, 10),
)
def test_any_selection(batch, heads, length, share, view, gap):
    n_rows = max(1, round(share * length))
    check(*problem(batch, *heads, length, n_rows, 16, torch.float32, view), gap=gap, tiles=(16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("softcap", [0.7, 30.0])
def test_soft_cap(softcap, dtype):
    check(*problem(2, 4, 2, 75, 29, 16, dtype, "window"), softcap=softcap, tiles=(16, 32))


@pytest.mark.parametrize("compact", [False, True])
def test_slots_of_no_position(compact):
    query, key, value, low, high, index, grad = problem(2, 4, 2, 70, 30, 16, torch.float32)
    index[0, 27:], index[1, 10:] = 70 + np.arange(3), 70 + np.arange(20)
    high = np.where(index < 70, high, 0)
    given = query, key, value, low, high, index, grad
    out, dq, dk, dv = check(*given, tiles=(16, 16), compact=compact)
    for x in (out, dq, dk, dv):
        assert not x[0, :, 27:].any()
        assert not x[1, :, 10:].any()


@pytest.mark.parametrize("view", VIEWS)
def test_compact_gradients(view):
    check(*problem(2, 4, 2, 75, 29, 16, torch.float32, view), compact=True)


def test_rows_in_any_order():
    query, key, value, low, high, index, grad = problem(2, 2, 1, 60, 25, 16, torch.float32)
    order = np.random.default_rng(0).permutation(25)
    low, high, index = (x[:, order] for x in (low, high, index))
    check(query, key, value, low, high, index, grad, tiles=(16, 16))


def test_scores_of_any_size():
    query, *others = problem(2, 2, 2, 40, 20, 16, torch.float32)
    # Of thousands, whose last digit in float32 is 2e-4 of an exponent.
    check(1000 * query, *others, tiles=(16, 16), tolerance=1e-3)
    check(0 * query, *others, tiles=(16, 16))


def test_a_fault_is_loud():
    query, key, value, low, high, index, grad = problem(1, 1, 1, 40, 20, 16, torch.float32)
    query[0, 0, 3, 5] = np.nan
    out = kernels_on.selected_attention(query, key, value, low, high, index, grad, 0.3)[0]
    assert np.isnan(out[0, 0, 3]).all()
    assert np.isfinite(np.delete(out, 3, axis=2)).all()
