"""The Triton kernels from JAX on an NVIDIA GPU: the bits of PyTorch's launches, and the truth.

Shapes: ``R`` rows, ``D`` hidden size, ``V`` classes.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_jax_dispatch import (
    CAPPED,
    assert_near,
    assert_statistics,
    rows,
    true_head,
    true_linear_loss,
    true_loss,
)
from test_jax_selected_attention import CAUSAL, EVERY, WINDOW
from test_jax_selected_attention import expected as expected_attention
from test_jax_selected_attention import problem as attention_problem
from test_jax_token_split import MODELS, batch_of

import cggr.jax
from cggr.jax import CGGRLinearLoss, CGGRLoss, RoutingConfig, attention, dispatch, triton_calls
from cggr.jax.selected_attention import by_kernels
from cggr.kernels import chunks

torch = pytest.importorskip("torch", reason="PyTorch is not installed", exc_type=ImportError)

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX has no GPU"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed"
    ),
]
LAUNCH = "triton_kernel_call"  # how a program of XLA calls a kernel

# Every pair is a kernel to compile: few, but of each kind. Odd rows begin at no multiple of 16
# bytes.
KINDS = (
    (2, "float32"),
    (7, "bfloat16"),
    (31, "float16"),
    (513, "float32"),
    (1000, "bfloat16"),
    (1025, "float16"),
    (4096, "bfloat16"),
    (32_000, "bfloat16"),
    (50_257, "float32"),
    (50_257, "bfloat16"),
    (128_256, "float16"),
    (151_936, "bfloat16"),
)
SHAPES = ((3, 37), (4, 64))
RULES = ("topk", "stratified", "sequence_aware", "importance", "random")
BATCHES = 1000


@pytest.fixture(autouse=True)
def by_default(monkeypatch):
    """The default, whatever the shell says, and however many GPUs the machine has."""
    monkeypatch.delenv("CGGR_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def random_batch(shape, classes, dtype, seed):
    """Logits and targets on the device, by PyTorch, with rows and labels of every odd kind."""
    generator = torch.Generator("cuda").manual_seed(seed)
    n_rows = shape[0] * shape[1]
    spread = 10.0 ** (seed % 5 - 2)
    x = torch.randn(n_rows, classes, generator=generator, device="cuda") * spread
    x = x.to(getattr(torch, dtype))
    limits, infinity = torch.finfo(x.dtype), float("inf")
    place = torch.randperm(n_rows, generator=generator, device="cuda").tolist()
    x[place[0]] = 1.0
    x[place[1], :2] = 50.0
    x[place[2], ::3] = -infinity
    x[place[3]] = -infinity
    x[place[4], -1] = float("nan")
    x[place[5], 0] = infinity
    x[place[6]] = limits.min
    x[place[7], 0] = limits.max
    targets = torch.randint(0, classes, (n_rows,), generator=generator, device="cuda")
    for i, wrong in enumerate((-100, -100, -1, classes, 2**31 - 1)):
        targets[place[8 + i]] = wrong
    return x.reshape(*shape, classes), targets.reshape(shape)


def bits(array):
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    assert array.dtype == np.float32
    return array.view(np.uint32)


def differs(found, expected):
    return any(
        (bits(a) != bits(b)).any()
        for a, b in zip(found, expected, strict=True)
        if not (a is None and b is None)
    )


@pytest.mark.slow
def test_statistics_and_masks_are_those_of_pytorch_to_the_last_bit(capsys):
    import cggr.torch

    batches, wrong_statistics, wrong_masks = 0, [], []
    for seed in range(BATCHES):
        kind = seed % len(KINDS)
        (classes, dtype), shape = KINDS[kind], SHAPES[seed // len(KINDS) % len(SHAPES)]
        x, y = random_batch(shape, classes, dtype, seed)
        if seed // (len(KINDS) * len(SHAPES)) % 4 == 3:
            y = None
        config = RoutingConfig(selection=RULES[kind % len(RULES)], warmup_steps=0)
        capacity = config.capacity(0, *shape)
        masks, statistics = [], []
        for frontend, logits, targets in (
            (cggr.torch, x, y),
            (cggr.jax, jnp.from_dlpack(x), None if y is None else jnp.from_dlpack(y.int())),
        ):
            scored = frontend.token_statistics(logits, targets)
            selection = frontend.select_tokens(
                frontend.token_difficulty(scored, "combined"),
                config,
                draw=seed,
                eligible=None if targets is None else targets != -100,
                confidence=scored.confidence,
                capacity=capacity,
            )
            statistics.append(scored)
            masks.append(selection.mask)
        batches += 1
        if differs(statistics[1], statistics[0]):
            wrong_statistics.append(seed)
        if (np.asarray(masks[1]) != masks[0].cpu().numpy()).any():
            wrong_masks.append(seed)
        assert masks[0].any()
    with capsys.disabled():
        print(
            f"\n{batches} batches: {len(wrong_statistics)} with other statistics, "
            f"{len(wrong_masks)} with other masks"
        )
    assert batches == BATCHES
    assert wrong_statistics == []
    assert wrong_masks == []


def test_the_comparison_above_can_fail():
    x, y = random_batch((3, 37), 1000, "bfloat16", 0)
    first = dispatch.token_statistics(jnp.from_dlpack(x), jnp.from_dlpack(y.int()), -100)
    assert not differs(first, first)
    x[..., 0] += 1
    second = dispatch.token_statistics(jnp.from_dlpack(x), jnp.from_dlpack(y.int()), -100)
    assert differs(second, first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_default_launches_the_kernels(dtype):
    logits = jnp.zeros((4, 100), dtype)
    assert LAUNCH in jax.jit(cggr.jax.token_statistics).lower(logits).as_text()


def test_what_is_compiled_for_the_cpu_is_xla(monkeypatch):
    cpu = jax.devices("cpu")[0]
    hidden, weight, bias, label, row_weight = jax.device_put(rows("float32"), cpu)

    def everything(hidden, weight):
        def total(hidden, weight):
            logits = hidden @ weight.T
            linear = dispatch.linear_weighted_nll_sum(
                hidden, weight, bias, label, row_weight, *CAPPED
            )
            statistics = cggr.jax.token_statistics(logits, label)
            return linear + dispatch.weighted_nll_sum(logits, label, row_weight), statistics

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, weight)

    found = jax.jit(everything)(hidden, weight)
    assert LAUNCH not in jax.jit(everything).lower(hidden, weight).as_text()
    alone = cggr.jax.token_statistics(hidden)
    assert alone.entropy.devices() == {cpu}
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "xla")
    expected = jax.jit(lambda *arrays: everything(*arrays))(hidden, weight)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, alone, cggr.jax.token_statistics(hidden))


def test_pytorch_still_compiles_kernels_after_jax():
    import cggr.torch

    before = os.environ.get("TRITON_CACHE_DIR")
    cggr.jax.token_statistics(jnp.zeros((3, 77)))
    assert os.environ.get("TRITON_CACHE_DIR") == before
    x = np.random.default_rng(0).normal(size=(3, 79)).astype(np.float32)
    found = cggr.torch.token_statistics(torch.from_numpy(x).cuda())
    assert_statistics(jax.tree.map(lambda v: v.cpu().numpy(), found), x, None)


# Numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("classes", [2, 1025, 50_257])
def test_statistics(classes, dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (40, classes)), dtype)
    targets = rng.integers(0, classes, 40)
    targets[3] = -100
    found = cggr.jax.token_statistics(logits, targets)
    assert_statistics(found, logits, targets, 2e-5)


@pytest.mark.parametrize("head", [(1.0, None), CAPPED])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [("float32", 128), ("bfloat16", 128), ("bfloat16", 100), ("float16", 64), ("bfloat16", 2304)],
)
def test_statistics_of_a_linear_head(monkeypatch, dtype, width, with_bias, head):
    hidden, weight, bias, label, _ = rows(dtype, 700, width, 3000)
    monkeypatch.setattr(chunks, "MAX_LOGITS", 256 * 3000)
    label, bias = label.at[0].set(-100), bias if with_bias else None
    scale, softcap = head
    found = jax.jit(
        lambda *arrays: cggr.jax.linear_token_statistics(
            *arrays, bias=bias, logit_scale=scale, softcap=softcap
        )
    )(hidden, weight, label)
    x, _ = true_head(hidden, weight, bias, *head)
    assert_statistics(found, x, np.asarray(label), 5e-5)


def eagerly(function):
    return function


@pytest.mark.parametrize("run", [eagerly, jax.jit])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loss_of_logits(dtype, run):
    hidden, weight, _, label, row_weight = rows(dtype, 300, classes=5001)
    logits = (hidden @ weight.T).at[1].set(jnp.nan)
    expected, gradient = true_loss(logits, label, row_weight)
    value, found = run(jax.value_and_grad(dispatch.weighted_nll_sum))(logits, label, row_weight)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert found.dtype == logits.dtype
    assert_near(found, gradient, {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}[dtype])
    np.testing.assert_array_equal(found[1], 0)


@pytest.mark.parametrize("run", [eagerly, jax.jit])
@pytest.mark.parametrize("head", [(1.0, None), CAPPED])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loss_of_a_linear_head(monkeypatch, dtype, with_bias, head, run):
    # Chunks of 256 rows in the forward, in the backward pass of 1024 classes and one of 905.
    monkeypatch.setattr(chunks, "MAX_LOGITS", 256 * 5001)
    monkeypatch.setattr(triton_calls, "_MAX_LOGITS_BACKWARD", 1024 * 300)
    hidden, weight, bias, label, row_weight = rows(dtype, 300, classes=5001)
    shift = bias if with_bias else jnp.zeros_like(bias)
    expected, gradients = true_linear_loss(hidden, weight, shift, label, row_weight, *head)
    hidden = hidden.at[1].set(jnp.nan)

    def total(arrays):
        return dispatch.linear_weighted_nll_sum(*arrays, label, row_weight, *head)

    value, found = run(jax.value_and_grad(total))((hidden, weight, bias if with_bias else None))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(found, gradients, strict=True):
        if got is None:
            assert not with_bias
            continue
        assert got.dtype == hidden.dtype
        assert_near(got, want, {"float32": 3e-5, "bfloat16": 2e-2, "float16": 3e-3}[dtype])
    np.testing.assert_array_equal(found[0][1], 0)


@pytest.mark.parametrize("wrong", [-1, -100, 5001, 2**31 - 1])
def test_a_label_that_is_no_class_is_loud_where_it_counts(wrong):
    hidden, weight, _, label, row_weight = rows("bfloat16", 300, classes=5001)

    @jax.jit
    def run(label):
        logits = functools.partial(dispatch.weighted_nll_sum, label_R=label, weight_R=row_weight)

        def linear(hidden):
            return dispatch.linear_weighted_nll_sum(
                hidden, weight, None, label, row_weight, 1.0, None
            )

        return jax.value_and_grad(logits)(hidden @ weight.T), jax.value_and_grad(linear)(hidden)

    silent = label.at[1].set(wrong)  # of weight 0
    for value, gradient in run(silent):
        assert np.isfinite(value)
        assert np.isfinite(gradient.astype(jnp.float32)).all()
    for value, gradient in run(silent.at[3].set(wrong)):
        is_nan = np.isnan(gradient.astype(jnp.float32))
        assert np.isnan(value)
        assert is_nan[3].all()
        assert is_nan.sum() == is_nan[3].size


def test_more_logits_than_32_bits_count():
    block = jax.random.normal(jax.random.key(0), (2000, 131_072), jnp.bfloat16) * 3
    label = jax.random.randint(jax.random.key(1), (2000,), 0, 131_072)
    logits = jnp.tile(block, (10, 1))
    assert logits.size > 2**31
    found = cggr.jax.token_statistics(logits, jnp.tile(label, 10))
    expected = cggr.jax.token_statistics(block, label)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(bits(got), np.tile(bits(want), 10))


# Under transformations


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_modules_train_under_nnx_jit(monkeypatch, dtype):
    rng = np.random.default_rng(0)
    targets = jnp.asarray(np.where(rng.random((4, 64)) < 0.2, -100, rng.integers(0, 999, (4, 64))))
    hidden = jnp.asarray(rng.normal(0, 1, (4, 64, 32)), dtype)

    def gradients():
        head = nnx.Linear(32, 999, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        # Which tokens are selected does not depend on the last bits of a score.
        options = {"selection": "random", "min_tokens_ratio": 0.5, "warmup_steps": 0}
        criteria = nnx.List([CGGRLoss(**options), CGGRLinearLoss(**options)])

        @nnx.jit
        def step(head, criteria):
            def loss(head, criteria):
                first = criteria[0](head(hidden), targets)
                return first + criteria[1](hidden, head.kernel[...].T, targets)

            return nnx.value_and_grad(loss)(head, criteria)

        value, gradient = step(head, criteria)
        return value, gradient["kernel"][...]

    found = gradients()
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "xla")
    expected = gradients()
    tolerance = 1e-5 if dtype == "float32" else 4e-2  # XLA's logits are in bfloat16
    jax.tree.map(lambda got, want: assert_near(got, want, tolerance), found, expected)


@pytest.mark.parametrize("checked", [False, True])
def test_inside_shard_map(checked):
    arrays = rows("bfloat16", 300, classes=5001)
    on = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def local(hidden, weight, bias, label, row_weight):
        total = dispatch.linear_weighted_nll_sum(hidden, weight, bias, label, row_weight, *CAPPED)
        total += dispatch.weighted_nll_sum(hidden @ weight.T, label, row_weight)
        statistics = (
            cggr.jax.token_statistics(hidden @ weight.T, label),
            cggr.jax.linear_token_statistics(hidden, weight, label, bias=bias),
        )
        return total, statistics

    def summed(*arrays):
        total, statistics = local(*arrays)
        return jax.lax.psum(total, "data"), statistics

    sharded = jax.shard_map(
        summed,
        mesh=on,
        in_specs=(P("data"), P(), P(), P("data"), P("data")),
        out_specs=(P(), P("data")),
        check_vma=checked,
    )
    run = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2), has_aux=True))
    assert LAUNCH in run.lower(*arrays).as_text()
    expected = jax.jit(jax.value_and_grad(local, argnums=(0, 1, 2), has_aux=True))(*arrays)
    # Another program may have other products: near, not equal.
    jax.tree.map(lambda got, want: assert_near(got, want, 2e-2), run(*arrays), expected)


def test_vmap_is_a_loop():
    cases = [rows("bfloat16", 20, classes=500, seed=seed) for seed in range(3)]

    def run(hidden, weight, bias, label, row_weight):
        def total(hidden, weight, bias):
            linear = (hidden, weight, bias, label, row_weight, *CAPPED)
            return dispatch.linear_weighted_nll_sum(*linear)

        return jax.value_and_grad(total, argnums=(0, 1, 2))(hidden, weight, bias)

    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *cases)
    found, single = jax.jit(jax.vmap(run))(*stacked), jax.jit(run)
    for i, case in enumerate(cases):
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(single(*case)), strict=True):
            assert_near(got[i], want, 2e-2)


@pytest.mark.parametrize("interval", [CAUSAL, EVERY, WINDOW], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_selected_positions(interval, dtype):
    arrays, grad = attention_problem(4, 2, dtype)

    @jax.jit
    def run(query, key, value, *others):
        attend = functools.partial(by_kernels, interval=interval, scale=0.3)
        out, pull = jax.vjp(lambda *rows: attend(*rows, *others), query, key, value)
        return out, *pull(grad)

    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    found = run(*arrays)
    for a, b in zip(found, expected_attention(arrays, grad, interval, 0.3), strict=True):
        atol = tolerance * max(np.abs(b).max(), 1.0)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol)


def test_a_token_split_attends_by_kernels(monkeypatch):
    ids, labels, _ = batch_of(padded=False)
    options = {"selection": "importance", "warmup_steps": 0, "min_tokens_ratio": 0.4}
    found, attended = [], []

    def counted(*arrays, **given):
        attended.append(arrays)
        return by_kernels(*arrays, **given)

    monkeypatch.setattr(attention, "by_kernels", counted)
    for named in ("triton", "xla"):
        monkeypatch.setenv("CGGR_IMPLEMENTATION", named)
        routed = cggr.jax.CGGRModel(MODELS["rotary"](), split="token", **options)
        definition, state = nnx.split(routed)

        @jax.jit
        def step(state, definition=definition):
            model = nnx.merge(definition, state)
            return nnx.value_and_grad(lambda model: model(ids, labels=labels))(model)

        attended.clear()
        loss, gradient = step(state)
        assert bool(attended) == (named == "triton")
        found.append((float(loss), jax.tree.map(np.asarray, jax.tree.leaves(gradient))))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    scale = max(np.abs(x).max() for x in found[1][1])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(b).max(), 0.05 * scale))
