"""Statistics, difficulty and selection on JAX arrays, against the float64 truth.

Shapes: ``B`` sequences of ``S`` tokens, ``N`` tokens, ``D`` hidden size, ``V`` classes.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth

from cggr.jax import (
    RoutingConfig,
    cggr_linear_loss,
    cggr_loss,
    chunks,
    linear_token_statistics,
    select_tokens,
    token_difficulty,
    token_statistics,
)
from cggr.jax.functional import aligned_targets, padding_of

# The logits are the same numbers in truth and code, also in half precision: only the arithmetic
# (float32, or float64 for float64) differs, by a few ulps.
TOLERANCE = {"rtol": 3e-6, "atol": 3e-6}
TOLERANCE_64 = {"rtol": 1e-12, "atol": 1e-13}
DTYPES = ["float32", "bfloat16", "float16"]
FIELDS = ("nll", "entropy", "confidence", "margin", "error_norm")


def exactly(message):
    return rf"^{re.escape(message)}(\n-+\nFor simplicity, JAX has removed .*)?$"  # JAX's note


def array(x):
    return np.asarray(x).astype(np.float64)


def random_logits(*shape, dtype="float32", seed=0, scale=3.0):
    x = np.random.default_rng(seed).normal(0, scale, shape)
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


def random_targets(*shape, classes, seed=1, ignored=0.2, dtype=np.int32):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, shape)
    return np.where(rng.random(shape) < ignored, -100, targets).astype(dtype)


def assert_statistics(statistics, expected, rtol=3e-6, atol=3e-6):
    for field in FIELDS:
        want, got = expected[field], getattr(statistics, field)
        if want is None:
            assert got is None, field
        else:
            np.testing.assert_allclose(array(got), want, rtol=rtol, atol=atol, err_msg=field)


@pytest.fixture
def rows_at_a_time(monkeypatch):
    """Makes statistics work on so many rows at a time: many chunks on small inputs."""

    def set_rows(rows, classes):
        monkeypatch.setattr(chunks, "MAX_LOGITS", rows * classes)

    return set_rows


# token_statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(37,), (3, 11), (2, 3, 5), ()])
def test_token_statistics_match_the_equations(dtype, leading):
    logits = random_logits(*leading, 23, dtype=dtype)
    targets = random_targets(*leading, classes=23)
    for statistics in (
        token_statistics(logits, targets),
        jax.jit(token_statistics)(logits, targets),
    ):
        assert_statistics(statistics, truth.statistics(logits, targets))
        assert {value.dtype for value in statistics} == {jnp.dtype("float32")}
        assert {value.shape for value in statistics} == {leading}


def test_float64_stays_float64_where_it_is_enabled():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(0, 3, (4, 9, 23))
        targets = random_targets(4, 9, classes=23, dtype=np.int64)
        statistics = token_statistics(x, targets)
        assert {value.dtype for value in statistics} == {jnp.dtype("float64")}
        assert_statistics(statistics, truth.statistics(x, targets), **TOLERANCE_64)
        linear = linear_token_statistics(x, np.eye(23), targets)
        assert {value.dtype for value in linear} == {jnp.dtype("float64")}
        assert_statistics(linear, truth.statistics(x, targets), **TOLERANCE_64)


def dtypes_of(jaxpr):
    """Every dtype of a jaxpr and of those inside it, but for Python's numbers, which adapt."""
    found = set()
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            if variable.aval.shape or not variable.aval.weak_type:
                found.add(str(variable.aval.dtype))
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found |= dtypes_of(inner)
    return found


@pytest.mark.parametrize("selection", truth.SELECTIONS)
def test_float32_makes_no_float64_where_it_is_enabled(selection, rows_at_a_time):
    rows_at_a_time(5, 7)
    config = RoutingConfig(selection=selection, scope="sequence", warmup_steps=10)
    hidden, weight = random_logits(2, 8, 4), random_logits(7, 4)
    targets = random_targets(2, 8, classes=7)

    def loss(hidden, weight, step):
        return cggr_linear_loss(
            hidden, weight, targets, config, step=step, capacity=6, bias=weight[:, 0], softcap=2.0
        )

    def control(x):
        return jax.lax.scan(lambda c, row: (c + row.astype(jnp.float64), 0), 0.0, x)

    with jax.enable_x64(True):
        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        jaxpr = jax.make_jaxpr(gradient)(hidden, weight, jnp.int32(3))
        found = dtypes_of(jaxpr.jaxpr)
        assert "float32" in found
        assert "float64" not in found
        assert "float64" in dtypes_of(jax.make_jaxpr(control)(np.zeros(3, "f4")).jaxpr)


def test_without_targets_there_is_no_nll_and_no_error_norm():
    logits = random_logits(5, 9)
    statistics = token_statistics(logits)
    assert statistics.nll is None
    assert statistics.error_norm is None
    assert_statistics(statistics, truth.statistics(logits))
    linear = linear_token_statistics(logits, jnp.eye(9))
    assert linear.nll is None
    assert_statistics(linear, truth.statistics(logits))


def test_a_sure_model_keeps_its_relative_precision():
    # At 20 nats, 1 - confidence is 4e-9: lost if it is computed as a difference from 1.
    gaps = np.array([5.0, 12.0, 20.0])
    logits = np.zeros((3, 4), np.float32)
    logits[:, 1] = gaps
    statistics = jax.jit(token_statistics)(logits, np.array([1, 1, 1]))
    rest = 3 * np.exp(-gaps)
    p_rest = np.exp(-gaps) / (1 + rest)
    np.testing.assert_allclose(statistics.nll, np.log1p(rest), rtol=2e-6)
    np.testing.assert_allclose(statistics.entropy, np.log1p(rest) + 3 * p_rest * gaps, rtol=2e-6)
    np.testing.assert_allclose(
        statistics.error_norm, np.sqrt((3 * p_rest) ** 2 + 3 * p_rest**2), rtol=2e-6
    )


def test_large_logits_do_not_overflow():
    offset = np.array([1e4, -1e4, 3e4, -3e4, 0, 1e3], np.float32)[:, None]
    logits = random_logits(6, 7) + offset
    targets = np.arange(6)
    assert_statistics(token_statistics(logits, targets), truth.statistics(logits, targets))
    spread = random_logits(6, 7, scale=1e4)
    expected = truth.statistics(spread, targets)
    assert_statistics(token_statistics(spread, targets), expected)
    assert np.isfinite(expected["nll"]).all()


def test_logits_of_minus_infinity_are_classes_that_cannot_be():
    inf = jnp.inf
    logits = jnp.array([[0.0, -inf, 1.0, -inf], [2.0, 2.0, -inf, -inf], [-inf, -inf, -inf, 3.0]])
    statistics = token_statistics(logits, jnp.array([2, 0, 3]))
    finite = token_statistics(jnp.array([[0.0, 1.0]]), jnp.array([1]))
    for field in FIELDS:
        value = getattr(statistics, field)[0].item()
        assert value == pytest.approx(getattr(finite, field)[0].item(), rel=1e-6), field
    assert statistics.entropy[1] == statistics.nll[1] == jnp.log(2.0)
    assert [getattr(statistics, field)[2].item() for field in FIELDS] == [0.0, 0.0, 1.0, 1.0, 0.0]
    # A target that cannot be: infinitely hard, and not NaN.
    impossible = token_statistics(logits[:1], jnp.array([1]))
    assert impossible.nll.item() == math.inf
    want = truth.statistics(logits[:1], np.array([1]))["error_norm"].item()
    assert impossible.error_norm.item() == pytest.approx(want, rel=1e-6)


def test_a_tie_of_the_top_two_has_margin_exactly_zero():
    logits = np.asarray(random_logits(50, 12)).copy()
    top = logits.argmax(axis=1)
    logits[np.arange(50), (top + 1) % 12] = logits.max(axis=1)
    statistics = token_statistics(logits)
    np.testing.assert_array_equal(statistics.margin, np.zeros(50))
    want = truth.statistics(logits)["confidence"]
    np.testing.assert_allclose(statistics.confidence, want, rtol=3e-6)


def test_one_class_is_certain():
    statistics = token_statistics(random_logits(4, 1), jnp.zeros(4, jnp.int32))
    for field, value in zip(FIELDS, (0, 0, 1, 1, 0), strict=True):
        np.testing.assert_array_equal(getattr(statistics, field), np.full(4, value), err_msg=field)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)])
def test_no_rows_give_statistics_of_no_rows(shape):
    targets = jnp.zeros(shape[:-1], jnp.int32)
    for statistics in (
        token_statistics(jnp.zeros(shape), targets),
        linear_token_statistics(jnp.zeros((*shape[:-1], 4)), jnp.zeros((5, 4)), targets),
    ):
        assert [value.shape for value in statistics] == [shape[:-1]] * 5


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_faulty_logit_is_loud_in_its_row_only(fault):
    logits, targets = random_logits(5, 8), np.arange(5)
    clean = token_statistics(logits, targets)
    statistics = token_statistics(logits.at[2, 6].set(fault), targets)
    others = np.array([0, 1, 3, 4])
    for field in FIELDS:
        value = getattr(statistics, field)
        assert jnp.isnan(value[2]), field
        np.testing.assert_array_equal(value[others], getattr(clean, field)[others])


def test_a_row_of_minus_infinity_is_a_fault():
    statistics = token_statistics(jnp.full((1, 4), -jnp.inf), jnp.array([0]))
    assert all(jnp.isnan(value).all() for value in statistics)


def test_another_ignore_index_may_be_a_class():
    logits, targets = random_logits(4, 9), np.array([0, 3, 0, 5])
    expected = truth.statistics(logits, targets, ignore_index=0)
    for statistics in (
        token_statistics(logits, targets, ignore_index=0),
        linear_token_statistics(logits, jnp.eye(9), targets, ignore_index=0),
    ):
        assert_statistics(statistics, expected)
        np.testing.assert_array_equal(statistics.nll == 0, targets == 0)


@pytest.mark.parametrize(
    ("dtype", "targets"),
    [
        # In uint8, -100 is 156 and 256 is 0: a comparison in that type reads another number.
        (np.uint8, [156, 0, 255]),
        (np.int8, [-100, 100, 127]),
        (np.int16, [-100, 255, 156]),
        (np.int64, [-100, 255, 156]),
        (np.uint32, [1, 255, 156]),
    ],
)
@pytest.mark.parametrize("convert", [np.asarray, list], ids=["numpy", "list"])
def test_targets_of_any_integer_type_mean_their_value(dtype, targets, convert):
    logits = random_logits(3, 256)
    given = np.array(targets, dtype=dtype)
    expected = truth.statistics(logits, np.array(targets))
    if convert is list:
        given = jnp.asarray(given)
    assert_statistics(token_statistics(np.asarray(logits), given), expected)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[0, 1], [2, 9]], "got 9 at position (1, 1)."),
        ([[0, -1], [2, 9]], "got -1 at position (0, 1)."),
        ([[-100, 1], [-101, 0]], "got -101 at position (1, 0)."),
        # JAX would narrow it to 3.
        ([[0, 1], [2**32 + 3, 0]], "got 4294967299 at position (1, 0)."),
    ],
)
def test_a_target_out_of_range_is_named(targets, message):
    message = exactly("targets must be in [0, 9) or ignore_index=-100, " + message)
    logits, hidden, weight = random_logits(2, 2, 9), random_logits(2, 2, 4), random_logits(9, 4)
    kinds = [np.array(targets)]
    # An array on an accelerator is not looked at.
    if max(map(max, targets)) < 2**31 and jax.default_backend() == "cpu":
        kinds.append(jnp.array(targets))
    for given in kinds:
        with pytest.raises(ValueError, match=message):
            token_statistics(logits, given)
        with pytest.raises(ValueError, match=message):
            linear_token_statistics(hidden, weight, given)


def test_a_target_out_of_range_is_nan_under_jit():
    logits, hidden, weight = random_logits(3, 9), random_logits(3, 4), random_logits(9, 4)
    targets = jnp.array([9, -1, 8])
    direct = jax.jit(token_statistics)(logits, targets)
    linear = jax.jit(linear_token_statistics)(hidden, weight, targets)
    for statistics in (direct, linear):
        for value in (statistics.nll, statistics.error_norm):
            assert jnp.isnan(value).tolist() == [True, True, False]
        assert jnp.isfinite(statistics.entropy).all()


def test_no_target_is_read_out_of_bounds():
    # Under jit, JAX clamps or fills what is out of bounds: the value would be a class's own.
    logits = jnp.full((4, 3), 2.0).at[:, 2].set(50.0).at[:, 0].set(-50.0)
    for wrong in (3, -1, 2**31 - 1, -(2**31)):
        targets = jnp.array([wrong, 1, 0, 2])
        statistics = jax.jit(token_statistics)(logits, targets)
        right = token_statistics(logits[1:], targets[1:])
        assert jnp.isnan(statistics.nll[0])
        np.testing.assert_allclose(statistics.nll[1:], right.nll, rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (jnp.zeros((2, 3), int), None, TypeError, "logits must be floating, got int32."),
        (jnp.zeros((2, 3), bool), None, TypeError, "logits must be floating, got bool."),
        (
            jnp.float32(1.0),
            None,
            ValueError,
            "logits must have shape (..., V) with V >= 1, got ().",
        ),
        (
            jnp.zeros((4, 0)),
            None,
            ValueError,
            "logits must have shape (..., V) with V >= 1, got (4, 0).",
        ),
        (jnp.zeros((2, 3)), jnp.zeros(2), TypeError, "targets must be integers, got float32."),
        (jnp.zeros((2, 3)), jnp.zeros(2, bool), TypeError, "targets must be integers, got bool."),
        (
            jnp.zeros((2, 4, 3)),
            jnp.zeros(8, int),
            ValueError,
            "targets must have the logits' leading shape (2, 4), got (8,).",
        ),
        (
            jnp.zeros((2, 4, 3)),
            jnp.zeros((2, 4, 1), int),
            ValueError,
            "targets must have the logits' leading shape (2, 4), got (2, 4, 1).",
        ),
    ],
)
def test_wrong_ranks_and_dtypes(logits, targets, error, message):
    with pytest.raises(error, match=exactly(message)):
        token_statistics(logits, targets)


def test_statistics_take_no_gradient():
    def total(logits):
        return sum(jnp.sum(value) for value in token_statistics(logits, jnp.arange(3)))

    def linear(arrays):
        statistics = linear_token_statistics(*arrays[:2], jnp.arange(3), bias=arrays[2])
        return sum(jnp.sum(value) for value in statistics)

    assert not jax.grad(total)(random_logits(3, 5)).any()
    arrays = random_logits(3, 4), random_logits(5, 4), random_logits(5)
    assert not any(gradient.any() for gradient in jax.grad(linear)(arrays))


# Chunks


@pytest.mark.parametrize(("n_rows", "rows"), [(1, 1), (7, 1), (23, 5), (24, 5), (37, 24)])
def test_chunks_change_rounding_at_most(rows_at_a_time, n_rows, rows):
    logits, targets = random_logits(n_rows, 13), random_targets(n_rows, classes=13)
    whole = token_statistics(logits, targets)
    rows_at_a_time(rows, 13)
    # A loop is compiled where the whole is not: another order of sums, two ulps.
    for field, value, want in zip(FIELDS, token_statistics(logits, targets), whole, strict=True):
        np.testing.assert_allclose(value, want, rtol=3e-7, atol=3e-7, err_msg=field)


@pytest.mark.parametrize(
    ("n_rows", "rows", "expected"),
    # A prime has no divisor near, and is padded; 24 rows in chunks of 5 are 6 chunks of 4.
    [(23, 5, 5), (24, 5, 6), (24, 24, 1), (24, 100, 1), (1, 1, 1), (7, 1, 7), (0, 1, 1)],
)
def test_a_chunk_is_within_the_limit(rows_at_a_time, n_rows, rows, expected):
    rows_at_a_time(rows, 13)
    sizes = []

    def function(total, part):
        sizes.append(part.shape[0])
        return total + jnp.sum(part), part * 2

    x = jnp.arange(1.0, n_rows + 1)
    total, doubled = chunks.scan_row_chunks(function, jnp.zeros(()), x, 13)
    np.testing.assert_array_equal(doubled, 2 * x)
    assert total == x.sum()
    assert sizes[0] == -(-n_rows // expected)
    assert sizes[0] <= rows


def test_a_row_wider_than_the_limit_has_a_chunk_of_its_own(rows_at_a_time):
    rows_at_a_time(1, 2)
    logits = random_logits(5, 9)
    assert_statistics(token_statistics(logits), truth.statistics(logits))


# linear_token_statistics


def linear_truth(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    logits = array(hidden) @ array(weight).T
    if bias is not None:
        logits = logits + array(bias)
    logits = logits * logit_scale
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


HEADS = [
    {},
    {"bias": True},
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"bias": True, "logit_scale": 1.7, "softcap": 3.0},
]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_linear_token_statistics_match_the_equations(rows_at_a_time, options, rows):
    rows_at_a_time(rows, 19)
    hidden, weight = random_logits(4, 5, 8, scale=1.0), random_logits(19, 8, seed=3, scale=1.0)
    options = dict(options)
    if "bias" in options:
        options["bias"] = random_logits(19, seed=5)
    targets = random_targets(4, 5, classes=19)
    statistics = linear_token_statistics(hidden, weight, targets, **options)
    expected = truth.statistics(linear_truth(hidden, weight, **options), targets)
    # The matrix product adds its own rounding to that of the statistics.
    assert_statistics(statistics, expected, rtol=1e-5, atol=1e-5)
    assert {value.shape for value in statistics} == {(4, 5)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_linear_token_statistics_in_half_precision_are_those_of_the_rounded_logits(dtype):
    hidden = random_logits(12, 8, dtype=dtype, scale=1.0)
    weight = random_logits(19, 8, dtype=dtype, seed=3, scale=1.0)
    targets = random_targets(12, classes=19)
    logits = hidden @ weight.T
    assert logits.dtype == dtype
    statistics = linear_token_statistics(hidden, weight, targets)
    assert_statistics(statistics, truth.statistics(logits, targets))
    assert {value.dtype for value in statistics} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": jnp.zeros((3, 4), int)}, TypeError, "hidden must be floating, got int32."),
        ({"weight": jnp.zeros((5, 4), int)}, TypeError, "weight must be floating, got int32."),
        ({"bias": jnp.zeros(5, int)}, TypeError, "bias must be floating, got int32."),
        (
            {"weight": jnp.zeros((5, 4), jnp.bfloat16)},
            TypeError,
            "weight must have hidden's dtype float32, got bfloat16.",
        ),
        (
            {"bias": jnp.zeros(5, jnp.float16)},
            TypeError,
            "bias must have hidden's dtype float32, got float16.",
        ),
        (
            {"weight": jnp.zeros((5, 3))},
            ValueError,
            "hidden must have shape (..., D) and weight (V, D), got (3, 4) and (5, 3).",
        ),
        (
            {"weight": jnp.zeros(4)},
            ValueError,
            "hidden must have shape (..., D) and weight (V, D), got (3, 4) and (4,).",
        ),
        (
            {"hidden": jnp.float32(0)},
            ValueError,
            "hidden must have shape (..., D) and weight (V, D), got () and (5, 4).",
        ),
        ({"bias": jnp.zeros(4)}, ValueError, "bias must have shape (5,), got (4,)."),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite or None, got 0.0."),
        ({"softcap": -1.0}, ValueError, "softcap must be positive and finite or None, got -1.0."),
        (
            {"softcap": math.inf},
            ValueError,
            "softcap must be positive and finite or None, got inf.",
        ),
        (
            {"softcap": math.nan},
            ValueError,
            "softcap must be positive and finite or None, got nan.",
        ),
        (
            {"targets": jnp.zeros((3, 1), int)},
            ValueError,
            "targets must have the logits' leading shape (3,), got (3, 1).",
        ),
    ],
)
def test_wrong_linear_heads(arguments, error, message):
    arguments = {"hidden": jnp.zeros((3, 4)), "weight": jnp.zeros((5, 4))} | arguments
    with pytest.raises(error, match=exactly(message)):
        linear_token_statistics(**arguments)


def temporary_mb(function, *arguments):
    """Memory that the compiled function needs beside its inputs and outputs."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def test_no_array_is_as_large_as_the_logits():
    """N=8192, V=50000: the logits would be 1.6 GB; 300 MB are allowed."""
    shapes = ((8192, 64), (50_000, 64)), (8192,)
    hidden, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[0])
    targets = jax.ShapeDtypeStruct(shapes[1], jnp.int32)
    config = RoutingConfig(selection="stratified", warmup_steps=0)
    capacity = config.capacity(0, 1, 8192)

    def loss(hidden, weight, targets):
        return cggr_linear_loss(hidden, weight, targets, config, step=0, capacity=capacity)

    def gradient(hidden, weight, targets):
        function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return function(hidden, weight, targets)

    def control(hidden, weight, targets):
        logits = hidden @ weight.T
        return token_statistics(logits, targets), logits.sum(axis=0)

    forward = temporary_mb(linear_token_statistics, hidden, weight, targets)
    backward = temporary_mb(gradient, hidden, weight, targets)
    dense = temporary_mb(control, hidden, weight, targets)
    print(f"\ntemporaries: {forward:.0f} MB, with gradient {backward:.0f} MB, dense {dense:.0f} MB")
    assert forward < 300
    assert backward < 300
    assert dense > 1600  # the measurement sees logits


# token_difficulty


@pytest.mark.parametrize("scoring", ["entropy", "margin", "loss", "combined", "error_norm"])
def test_difficulty_matches_its_equation(scoring):
    logits, targets = random_logits(3, 7, 11), random_targets(3, 7, classes=11, ignored=0)
    got = token_difficulty(token_statistics(logits, targets), scoring)
    want = truth.difficulty(truth.statistics(logits, targets), scoring)
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=5e-6)
    assert got.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "list"])
def test_excess_loss_subtracts_the_reference(dtype):
    logits, targets = random_logits(3, 7, 11), random_targets(3, 7, classes=11, ignored=0)
    reference = jnp.abs(random_logits(3, 7, seed=4, scale=1.0))
    reference = np.asarray(reference) if dtype == "list" else reference.astype(dtype)
    statistics = token_statistics(logits, targets)
    got = token_difficulty(statistics, "excess_loss", reference_nll=reference)
    want = truth.statistics(logits, targets)["nll"] - array(reference)
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=5e-6)
    assert got.dtype == jnp.float32


def test_a_callable_score_gets_the_statistics():
    logits, targets = random_logits(9, 11), random_targets(9, classes=11)
    got = token_difficulty(token_statistics(logits, targets), lambda s: s.nll * s.confidence)
    expected = truth.statistics(logits, targets)
    np.testing.assert_allclose(got, expected["nll"] * expected["confidence"], rtol=5e-6, atol=5e-6)


def test_difficulty_errors():
    with pytest.raises(ValueError, match=exactly("scoring='loss' needs targets, got none.")):
        token_difficulty(token_statistics(random_logits(3, 4)), "loss")
    statistics = token_statistics(random_logits(3, 4), jnp.arange(3))
    for scoring, reference, message in (
        ("excess_loss", None, "scoring='excess_loss' needs reference_nll, got none."),
        ("excess_loss", jnp.zeros((3, 1)), "reference_nll must have shape (3,), got (3, 1)."),
        (
            lambda s: jnp.zeros((3, 2)),
            None,
            "scoring must return scores of shape (3,), got (3, 2).",
        ),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            token_difficulty(statistics, scoring, reference_nll=reference)
    with pytest.raises(ValueError, match=r"^scoring must be one of 'entropy', .* got 'surprise'"):
        token_difficulty(statistics, "surprise")


# select_tokens: the rules are tested in test_spec_* and test_parity_*; here, that every argument
# is handed over.


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("selection", ["importance", "stratified"])
def test_select_tokens_hands_every_argument_over(selection, scope):
    rng = np.random.default_rng(0)
    difficulty, confidence = rng.random((2, 4, 25)).astype(np.float32)
    eligible = rng.random((4, 25)) < 0.8
    options = {"selection": selection, "scope": scope, "min_tokens_ratio": 0.3, "seed": 7}
    config = RoutingConfig(**options)
    state = {"step": 600, "draw": 5, "rank": 3}
    capacity = truth.capacity(options, 600, 4, 25)
    want = truth.select(
        difficulty, options, eligible=eligible, confidence=confidence, capacity=capacity, **state
    )

    @jax.jit
    def compiled(difficulty, eligible, confidence, state):
        return select_tokens(
            difficulty, config, eligible=eligible, confidence=confidence, capacity=capacity, **state
        )

    arrays = {name: jnp.int32(value) for name, value in state.items()}
    for got in (
        compiled(difficulty, eligible, confidence, arrays),
        select_tokens(difficulty, config, eligible=eligible, confidence=confidence, **state),
        select_tokens(
            jnp.asarray(difficulty),
            config,
            eligible=jnp.asarray(eligible),
            confidence=jnp.asarray(confidence),
            capacity=capacity,
            **arrays,
        ),
    ):
        for name in ("mask", "indices", "weights", "count"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        assert got.ratio.tolist() == [want.ratio]
        assert got.indices.dtype == jnp.int32
    for name in state:  # each of them matters here
        other = dict(state) | {name: 0}
        changed = truth.select(
            difficulty,
            options,
            eligible=eligible,
            confidence=confidence,
            capacity=capacity,
            **other,
        )
        assert not np.array_equal(changed.mask, want.mask), name


def test_without_a_draw_the_step_is_it():
    config = RoutingConfig(selection="random", warmup_steps=0)
    difficulty = jnp.zeros((4, 16))
    masks = [select_tokens(difficulty, config, step=7, **draw).mask for draw in ({}, {"draw": 7})]
    assert np.array_equal(*masks)
    assert not np.array_equal(masks[0], select_tokens(difficulty, config, step=7, draw=0).mask)


def test_the_capacity_of_a_step_the_host_knows_is_found():
    for scope in ("batch", "sequence"):
        config = RoutingConfig(warmup_steps=100, scope=scope)
        for step in (0, 60, 100):
            selection = select_tokens(jnp.zeros(60), config, step=step)
            assert selection.indices.shape == (config.capacity(step, 1, 60),)
            slots = select_tokens(jnp.zeros((3, 20)), config, step=step).indices.shape[-1]
            assert slots == config.capacity(step, 3, 20)


@pytest.mark.parametrize("step", [jnp.int32(0), np.zeros(1, np.int32)])
def test_a_step_the_host_does_not_know_needs_a_capacity(step):
    message = (
        "capacity must be given where step is an array: a Python int, "
        "config.capacity(step, batch, length) of the step that the host knows."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        select_tokens(jnp.zeros((2, 3)), RoutingConfig(), step=step)
    assert select_tokens(jnp.zeros((2, 3)), RoutingConfig(), step=step, capacity=6).count == 6
    assert select_tokens(jnp.zeros((2, 3)), RoutingConfig(), step=np.int32(0)).count == 6


@pytest.mark.parametrize("capacity", [jnp.int32(6), 6.0, np.zeros(1, np.int32)])
def test_a_capacity_that_is_no_number_of_the_host_is_refused(capacity):
    message = (
        "capacity must be a Python int, config.capacity(step, batch, length) of the step that the "
        f"host knows, and a static argument of jit; got {capacity!r}."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        select_tokens(jnp.zeros((2, 3)), RoutingConfig(), capacity=capacity)
    assert select_tokens(jnp.zeros((2, 3)), RoutingConfig(), capacity=np.int64(6)).count == 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"difficulty": jnp.zeros((2, 2, 2))},
            ValueError,
            "difficulty must have shape (B, S) or (S,), got (2, 2, 2).",
        ),
        (
            {"difficulty": jnp.zeros((2, 3), int)},
            TypeError,
            "difficulty must be floating, got int32.",
        ),
        (
            {"eligible": jnp.ones((2, 2), bool)},
            ValueError,
            "eligible must have the difficulty's shape (2, 3), got (2, 2).",
        ),
        ({"eligible": np.ones((2, 3))}, TypeError, "eligible must be bool, got float32."),
        (
            {"confidence": np.ones(3, "f4")},
            ValueError,
            "confidence must have the difficulty's shape (2, 3), got (3,).",
        ),
        ({"capacity": 7}, ValueError, "capacity must be in [0, 6] for 6 tokens, got 7."),
        ({"step": -1}, ValueError, "step must not be negative, got -1."),
    ],
)
def test_bad_selections_are_named(arguments, error, message):
    arguments = {"difficulty": jnp.zeros((2, 3)), "config": RoutingConfig()} | arguments
    with pytest.raises(error, match=exactly(message)):
        select_tokens(**arguments)


def test_selection_carries_no_gradient():
    config = RoutingConfig(selection="importance", warmup_steps=0)
    difficulty = jnp.abs(random_logits(2, 9))
    weights = select_tokens(difficulty, config).weights
    assert (weights > 1).any()
    gradient = jax.grad(lambda x: select_tokens(x, config).weights.sum())(difficulty)
    assert not gradient.any()


# aligned_targets


def test_labels_are_shifted_and_padding_has_no_target():
    labels = np.array([[5, 6, 7, 8], [1, 2, 3, 4]], np.uint8)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0]])
    aligned = aligned_targets(labels, None, shift=False, ignore_index=-100)
    assert aligned.tolist() == labels.tolist()
    shifted = aligned_targets(labels, None, shift=True, ignore_index=-100)
    assert shifted.tolist() == [[6, 7, 8, -100], [2, 3, 4, -100]]
    padded = aligned_targets(labels, mask, shift=True, ignore_index=-1)
    # The padding in front is not trained on, nor is what comes after the last word.
    assert padded.tolist() == [[6, 7, 8, -1], [-1, 3, -1, -1]]
    unshifted = aligned_targets(labels, mask, shift=False, ignore_index=-1)
    assert unshifted.tolist() == [[5, 6, 7, 8], [-1, 2, 3, -1]]
    assert padding_of(np.ones((2, 1, 4, 4)), (2, 4)) is None
    assert padding_of(None, (2, 4)) is None


def test_bad_labels_are_named():
    for labels, mask, error, message in (
        (
            jnp.zeros(4, int),
            None,
            ValueError,
            "labels must have shape (B, S) with B >= 1, got (4,).",
        ),
        (
            jnp.zeros((0, 4), int),
            None,
            ValueError,
            "labels must have shape (B, S) with B >= 1, got (0, 4).",
        ),
        (jnp.zeros((1, 4)), None, TypeError, "labels must be integers, got float32."),
        (
            jnp.zeros((1, 4), int),
            jnp.ones((1, 3)),
            ValueError,
            "attention_mask must have shape (1, 4), got (1, 3).",
        ),
    ):
        with pytest.raises(error, match=exactly(message)):
            aligned_targets(labels, mask, shift=True, ignore_index=-100)


# The implementation that computes it


def test_an_implementation_is_named_or_refused(monkeypatch):
    logits = random_logits(3, 4)
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "xla")
    assert_statistics(token_statistics(logits), truth.statistics(logits))
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "numpy")
    message = r"^CGGR_IMPLEMENTATION must be one of 'xla'.* in cggr\.jax, got 'numpy'\.$"
    with pytest.raises(ValueError, match=message):
        token_statistics(logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": 1.5}, TypeError, "step must be an integer, got 1.5."),
        ({"step": np.int64(-5)}, ValueError, "step must not be negative, got -5."),
        ({"step": 2**31}, ValueError, "step must be within 32 bits, got 2147483648."),
        ({"draw": 0.5}, TypeError, "draw must be an integer, got 0.5."),
        (
            {"rank": jnp.arange(3)},
            TypeError,
            "rank must be an integer or an integer array of one element, got int32[3].",
        ),
    ],
)
def test_counters_are_integers_of_32_bits(arguments, error, message):
    with pytest.raises(error, match=exactly(message)):
        select_tokens(jnp.zeros((2, 3)), RoutingConfig(), **({"capacity": 6} | arguments))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_batch_has_no_loss(shape, scope):
    config = RoutingConfig(selection="importance", scope=scope)
    hidden, targets = jnp.zeros((*shape, 4)), jnp.zeros(shape, jnp.int32)
    assert float(cggr_loss(hidden, targets, config, step=0)[0]) == 0
    assert float(cggr_linear_loss(hidden, jnp.zeros((9, 4)), targets, config, step=0)[0]) == 0


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2"])
def test_a_scale_is_a_finite_number(scale):
    with pytest.raises(
        ValueError, match=f"logit_scale must be a finite Python number, got {scale}"
    ):
        linear_token_statistics(jnp.zeros((2, 4)), jnp.zeros((9, 4)), logit_scale=scale)
