"""cggr.jax.selected_attention: the kernels' side of the token split, in Triton's interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_jax_dispatch import (
    EITHER_VERSION,
    installed,
    interpreted,
    two_devices,
    without_jax_triton,
)
from test_jax_token_split import MODELS, batch_of, inputs_for, loss_and_gradient

from cggr.jax import CGGRModel, attention, selected_attention
from cggr.jax.selected_attention import Interval, by_kernels, interval_of

__all__ = ["installed", "interpreted", "without_jax_triton"]  # fixtures

CAUSAL, EVERY, WINDOW = Interval(None, 0), Interval(None, None), Interval(4, 2)
BATCH, LENGTH, SLOTS, WIDTH = 2, 40, 17, 16
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


def problem(heads, kv_heads, dtype):
    """Rows of queries, keys and values, all keys and values, positions, a gradient."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    query, grad = (normal(BATCH, SLOTS, heads, WIDTH) for _ in range(2))
    every_key, every_value = (normal(BATCH, LENGTH, kv_heads, WIDTH) for _ in range(2))
    index = np.stack([rng.permutation(LENGTH)[:SLOTS] for _ in range(BATCH)]).astype(np.int32)
    index[1, 12:] = LENGTH + np.arange(SLOTS - 12)  # unused
    rows = np.minimum(index, LENGTH - 1)[:, :, None, None]
    key, value = (jnp.take_along_axis(x, rows, axis=1) for x in (every_key, every_value))
    return (query, key, value, every_key, every_value, jnp.asarray(index)), grad


def expected(arrays, grad, interval, scale):
    """By NumPy, in float64."""
    from test_kernels_attention import expected

    query, _, _, key, value, index = (np.asarray(x) for x in arrays)
    low = (
        np.zeros_like(index) if interval.before is None else np.maximum(index - interval.before, 0)
    )
    high = np.full_like(index, LENGTH)
    if interval.after is not None:
        high = np.minimum(index + interval.after + 1, LENGTH)
    high[index >= LENGTH] = 0
    heads_first = (np.swapaxes(x, 1, 2).astype(np.float64) for x in (query, key, value))
    grad = np.swapaxes(np.asarray(grad), 1, 2).astype(np.float64)
    found = expected(*heads_first, low, high, index, grad, scale)
    return [np.swapaxes(x, 1, 2) for x in found]


@EITHER_VERSION
@pytest.mark.parametrize("interval", [CAUSAL, EVERY, WINDOW], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"), [(2, 2, "float32"), (4, 2, "float32"), (4, 1, "float16")]
)
def test_output_and_gradients(interpreted, interval, heads, kv_heads, dtype):
    arrays, grad = problem(heads, kv_heads, dtype)
    rows, others = arrays[:3], arrays[3:]
    attend = functools.partial(by_kernels, interval=interval, scale=0.3)

    @jax.jit
    def run(rows, others, grad):
        out, pull = jax.vjp(lambda *rows: attend(*rows, *others), *rows)
        return out, *pull(grad)

    found = run(rows, others, grad)
    for name, a, b in zip(
        ("out", "dq", "dk", "dv"), found, expected(arrays, grad, interval, 0.3), strict=True
    ):
        assert a.dtype == dtype
        a = np.asarray(a, np.float64)
        atol = TOLERANCE[dtype] * max(np.abs(b).max(), 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
        assert not a[1, 12:].any()


def test_the_scale_is_that_of_the_width(interpreted):
    arrays, _ = problem(2, 2, "float32")
    found = by_kernels(*arrays, interval=CAUSAL, scale=None)
    expected = by_kernels(*arrays, interval=CAUSAL, scale=WIDTH**-0.5)
    np.testing.assert_array_equal(found, expected)


def test_recorded_keys_have_no_gradient(interpreted):
    arrays, _ = problem(2, 2, "float32")

    def total(every_key):
        given = (*arrays[:3], every_key, *arrays[4:])
        return by_kernels(*given, interval=CAUSAL, scale=0.3).sum()

    assert not jax.grad(total)(arrays[3]).any()


@pytest.fixture
def calls(monkeypatch):
    """Intervals of what the kernels were asked for while a function was traced."""
    seen, fused = [], attention.by_kernels

    def counted(*arrays, interval, scale):
        seen.append(interval)
        return fused(*arrays, interval=interval, scale=scale)

    monkeypatch.setattr(attention, "by_kernels", counted)
    return seen


@pytest.mark.parametrize(
    ("name", "interval"),
    [
        ("learned, flag", CAUSAL),
        ("bidirectional", EVERY),
        ("rotary", CAUSAL),
        ("window", Interval(3, 0)),
        ("learned, mask", None),
        ("bias", None),
    ],
)
def test_a_step_is_that_of_masks(interpreted, name, interval, calls, monkeypatch):
    ids, labels, mask = batch_of(padded=False)
    model = MODELS[name]()
    inputs = {} if name in ("learned, flag", "bidirectional") else inputs_for(model, mask)
    found = []
    for named in ("triton", "xla"):
        monkeypatch.setenv("CGGR_IMPLEMENTATION", named)
        jax.clear_caches()
        routed = CGGRModel(
            model, split="token", selection="importance", warmup_steps=0, min_tokens_ratio=0.3
        )
        loss, gradient = loss_and_gradient(routed, ids, labels, **inputs)
        found.append((float(loss), nnx.to_pure_dict(gradient)))
    assert set(calls) == (set() if interval is None else {interval})
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(found[1][1]))
    for a, b in zip(*(jax.tree.leaves(gradient) for _, gradient in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 0.01 * scale))


@pytest.mark.parametrize(
    ("function", "options", "interval"),
    [
        (nnx.dot_product_attention, {}, EVERY),
        (nnx.dot_product_attention, {"is_causal": True, "dtype": jnp.float32}, CAUSAL),
        (jax.nn.dot_product_attention, {"is_causal": True, "scale": 0.5}, CAUSAL),
        (jax.nn.dot_product_attention, {"local_window_size": 3}, Interval(3, 3)),
        (
            jax.nn.dot_product_attention,
            {"local_window_size": (3, 1), "is_causal": True},
            Interval(3, 0),
        ),
        (
            functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
            {"implementation": "cudnn"},
            EVERY,
        ),
        (nnx.dot_product_attention, {"dropout_rate": 0.1, "deterministic": True}, EVERY),
        (nnx.dot_product_attention, {"dropout_rate": 0.1}, None),
        (nnx.dot_product_attention, {"precision": "highest"}, None),
        (nnx.dot_product_attention, {"dtype": jnp.bfloat16}, None),
        (jax.nn.dot_product_attention, {"key_value_seq_lengths": jnp.ones(2)}, None),
        (jax.nn.dot_product_attention, {"scale": jnp.ones(())}, None),
        (lambda query, key, value, mask: query, {}, None),
        (functools.partial(nnx.dot_product_attention, bias=jnp.ones((1, 1, 1, 5))), {}, None),
        (nnx.dot_product_attention, {"promote_dtype": lambda x, dtype=None: x}, None),
    ],
)
def test_what_queries_see_by_options(function, options, interval):
    assert interval_of(function, options, jnp.float32) == interval


def test_where_the_kernels_are_wanted(monkeypatch):
    half, single = (jnp.ones((1, 2, 2, 64), dtype) for dtype in ("bfloat16", "float32"))
    wide = jnp.ones((1, 2, 2, 192), "bfloat16")
    monkeypatch.delenv("CGGR_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(selected_attention, "may_launch", lambda: True)
    assert selected_attention.where_wanted(half, half, half) == "on CUDA"
    assert selected_attention.where_wanted(single, single, single) is None
    assert selected_attention.where_wanted(wide, wide, wide) is None
    monkeypatch.setattr(selected_attention, "may_launch", lambda: False)
    assert selected_attention.where_wanted(half, half, half) is None
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")
    for x in (half, single, wide):
        assert selected_attention.where_wanted(x, x, x) == "everywhere"
    assert selected_attention.where_wanted(half, half, single) is None
    assert selected_attention.where_wanted(half, half, half[..., :32]) is None
    assert selected_attention.where_wanted(half, jnp.ones((1, 2, 3, 64), "bfloat16")) is None
    assert selected_attention.where_wanted(*3 * [jnp.ones((1, 2, 2, 320))]) is None
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "xla")
    assert selected_attention.where_wanted(half, half, half) is None


def test_by_default_a_compiler_chooses(monkeypatch, calls):
    # A process with a GPU that computes on the CPU, where the kernels cannot run.
    monkeypatch.delenv("CGGR_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(attention, "by_kernels", lambda query, *others, **options: query * jnp.nan)
    losses = []
    for where in ("on CUDA", None):
        monkeypatch.setattr(attention, "where_wanted", lambda *arrays, where=where: where)
        with jax.default_device(jax.devices("cpu")[0]):
            ids, labels, _ = batch_of(padded=False)
            model = MODELS["rotary"]()
            routed = CGGRModel(model, split="token", warmup_steps=0, min_tokens_ratio=0.3)
            loss, gradient = loss_and_gradient(routed, ids, labels)
        losses.append((float(loss), nnx.to_pure_dict(gradient)))
    assert losses[0][0] == losses[1][0]
    jax.tree.map(np.testing.assert_array_equal, losses[0][1], losses[1][1])


def test_heads_on_devices_that_share_keys(interpreted):
    # Queries of every device attend to the same keys, whose gradient is the sum of theirs.
    mesh = two_devices()
    arrays, grad = problem(4, 1, "float32")
    heads = P(None, None, "data")

    def total(query, key, value, *others):
        out = by_kernels(query, key, value, *others[:-1], interval=CAUSAL, scale=0.3)
        return jax.lax.psum((out * others[-1]).sum(), "data")

    sharded = jax.shard_map(
        total, mesh=mesh, in_specs=(heads, P(), P(), P(), P(), P(), heads), out_specs=P()
    )
    found = jax.jit(jax.grad(sharded, argnums=(0, 1, 2)))(*arrays, grad)
    for a, b in zip(found, expected(arrays, grad, CAUSAL, 0.3)[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1.0))
