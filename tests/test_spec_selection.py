"""Selections against the truth, bit for bit, on NumPy, torch eager, torch compiled and JAX jit.

Run with ``-s`` to see how many cases were compared.
"""

import functools
import math
import shutil

import array_api_compat.torch as xp_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cggr.spec import RoutingConfig, Selection, select_tokens

RULES = truth.SELECTIONS
SCOPES = ("batch", "sequence")
FLAVOURS = ("normal", "ties", "faults", "zeros", "wide")


def difficulties(rng, shape, flavour):
    """Scores of a kind that breaks careless ranking."""
    x = rng.normal(0, 2, shape).astype(np.float32)
    if flavour == "ties":
        x = np.round(x)
    elif flavour == "faults":
        faults = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, -np.nan], dtype=np.float32)
        x = np.where(rng.random(shape) < 0.3, rng.choice(faults, shape), x)
    elif flavour == "zeros":
        x = rng.choice(np.array([0.0, -0.0], dtype=np.float32), shape)
    elif flavour == "wide":
        x = np.exp(rng.uniform(-80, 88, shape)).astype(np.float32)
    return x


def confidences(rng, shape):
    x = rng.random(shape).astype(np.float32)
    return np.where(rng.random(shape) < 0.05, np.float32(np.nan), x)


def assert_identical(result, expected, what):
    """Mask, indices, weights, count and ratio, to the last bit."""
    for name in Selection._fields:
        value, true = np.asarray(getattr(result, name)), np.asarray(getattr(expected, name))
        if name == "ratio":
            value = value[0]
        np.testing.assert_array_equal(value, true, err_msg=f"{name} of {what}")
    assert np.asarray(result.mask).dtype == bool
    for name in ("indices", "count", "ratio"):
        assert np.asarray(getattr(result, name)).dtype == np.int32, name
    assert np.asarray(result.weights).dtype == np.float32


@st.composite
def cases(draw):
    batch = draw(st.integers(1, 8))
    length = draw(st.integers(0, 40) | st.integers(0, 5000 // batch))
    n = max(batch * length, 1)
    ratio = draw(st.sampled_from([1 / n, 1.0]) | st.floats(1 / n, 1.0))
    options = {
        "selection": draw(st.sampled_from(RULES)),
        "scope": draw(st.sampled_from(SCOPES)),
        "min_tokens_ratio": max(ratio, 1e-9),
        "warmup_steps": draw(st.sampled_from([0, 1, 1000, 2**31 - 1])),
        "dynamic_threshold": draw(st.booleans()),
        "threshold_sensitivity": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "num_strata": draw(st.integers(1, 9) | st.just(256)),
        "min_tokens_per_sequence": draw(st.integers(0, 5) | st.just(10_000)),
        "importance_floor": draw(st.sampled_from([0.05, 1e-30, 1e30])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }
    state = {
        "step": draw(st.sampled_from([0, 1, 500, 1000, 2**30])),
        "draw": draw(st.integers(0, 2**31 - 1)),
        "rank": draw(st.integers(0, 63)),
    }
    return (
        (batch, length),
        options,
        state,
        draw(st.sampled_from(FLAVOURS)),
        draw(st.sampled_from([0.0, 0.5, 1.0])),  # share of ignored tokens
        draw(st.sampled_from(["exact", "config", "tight"])),
        draw(st.integers(0, 2**32 - 1)),  # seed of the arrays
    )


def capacity_of(kind, options, state, shape):
    config = RoutingConfig(**options)
    if kind == "exact":
        return None
    slots = config.capacity(state["step"], *shape)
    return slots if kind == "config" else slots // 2


compared = 0


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def check_numpy_and_torch(case):
    shape, options, state, flavour, ignored, kind, seed = case
    rng = np.random.default_rng(seed)
    difficulty = difficulties(rng, shape, flavour)
    confidence = confidences(rng, shape)
    eligible = rng.random(shape) >= ignored
    capacity = capacity_of(kind, options, state, shape)
    config = RoutingConfig(**options)
    expected = truth.select(
        difficulty, options, eligible=eligible, confidence=confidence, capacity=capacity, **state
    )
    if kind == "config":  # a capacity from the configuration holds whatever is selected
        exact = truth.select(difficulty, options, eligible=eligible, confidence=confidence, **state)
        np.testing.assert_array_equal(expected.mask, exact.mask)
    result = select_tokens(
        difficulty,
        config,
        eligible=eligible,
        confidence=confidence,
        capacity=capacity,
        **state,
    )
    assert_identical(result, expected, "NumPy")
    result = select_tokens(
        torch.from_numpy(difficulty),
        config,
        eligible=torch.from_numpy(eligible),
        confidence=torch.from_numpy(confidence),
        capacity=capacity,
        **state,
    )
    assert_identical(result, expected, "torch")
    global compared
    compared += 2


def test_numpy_and_torch_select_as_the_truth_does():
    check_numpy_and_torch()
    print(f"\nselection, NumPy and torch eager against the truth: {compared} cases, 0 mismatches")
    assert compared >= 1200


# Compiled backends: shapes and options are static, everything else is drawn. How many tokens
# there are is varied by what is eligible.
STATIC = [
    ((1, 1), {"min_tokens_ratio": 1.0, "warmup_steps": 0}),
    ((4, 33), {"min_tokens_ratio": 0.3, "warmup_steps": 100, "min_tokens_per_sequence": 3}),
    ((5, 1000), {"min_tokens_ratio": 1 / 5000, "warmup_steps": 100_000_000, "num_strata": 7}),
]
CASES_PER_PROGRAM = 34


def program(backend, shape, options, capacity):
    """A compiled ``(difficulty, eligible, confidence, step, draw, rank) -> Selection``."""
    config = RoutingConfig(**options)

    def select(xp, difficulty, eligible, confidence, step, draw, rank):
        return select_tokens(
            difficulty,
            config,
            step=step,
            draw=draw,
            rank=rank,
            eligible=eligible,
            confidence=confidence,
            capacity=capacity,
            xp=xp,
        )

    if backend == "jax":
        return jax.jit(functools.partial(select, jnp))
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(select, xp_torch),
        fullgraph=True,
        dynamic=False,
        backend=backend.removeprefix("torch-"),
    )
    return lambda *arrays: compiled(*(torch.from_numpy(np.asarray(a)) for a in arrays))


def compare(backend, rule, scope, shape, options):
    options = {**options, "selection": rule, "scope": scope, "seed": 11}
    capacity = RoutingConfig(**options).capacity(0, *shape)
    run = program(backend, shape, options, capacity)
    rng = np.random.default_rng(0)
    for i in range(CASES_PER_PROGRAM):
        difficulty = difficulties(rng, shape, FLAVOURS[i % len(FLAVOURS)])
        confidence = confidences(rng, shape)
        eligible = rng.random(shape) >= rng.choice([0.0, 0.3, 0.99, 1.0])
        state = {
            "step": int(rng.choice([0, 37, 99, 2**28])),
            "draw": int(rng.integers(0, 2**31)),
            "rank": int(rng.integers(0, 64)),
        }
        expected = truth.select(
            difficulty,
            options,
            eligible=eligible,
            confidence=confidence,
            capacity=capacity,
            **state,
        )
        words = (np.array([value], dtype=np.int32) for value in state.values())
        result = run(difficulty, eligible, confidence, *words)
        assert_identical(result, expected, f"{backend} {rule} {scope} {shape} case {i}")
    print(
        f"\nselection, {backend}, {rule}, {scope}, {shape}: {CASES_PER_PROGRAM} cases, 0 mismatches"
    )


@pytest.mark.parametrize("backend", ["jax", "torch-aot_eager"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("shape", "options"), STATIC)
def test_compiled_backends_select_as_the_truth_does(backend, rule, scope, shape, options):
    compare(backend, rule, scope, shape, options)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for torch's inductor")
@pytest.mark.parametrize(
    ("rule", "scope"),
    [
        *((rule, "batch") for rule in RULES if rule != "fixed_quota"),
        ("stratified", "sequence"),
        ("importance", "sequence"),
    ],
)
def test_inductor_selects_as_the_truth_does(rule, scope):
    compare("torch-inductor", rule, scope, *STATIC[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_batch_selects_nothing(rule, scope, shape):
    result = select_tokens(
        np.zeros(shape, dtype=np.float32), RoutingConfig(selection=rule, scope=scope)
    )
    assert result.mask.shape == shape
    assert result.indices.size == 0
    assert not result.count.any()


def test_without_a_draw_the_step_is_it():
    difficulty = np.random.default_rng(0).random((4, 16)).astype(np.float32)
    config = RoutingConfig(selection="random", warmup_steps=0)
    masks = [select_tokens(difficulty, config, step=7, **draw).mask for draw in ({}, {"draw": 7})]
    assert np.array_equal(*masks)
    assert not np.array_equal(masks[0], select_tokens(difficulty, config, step=7, draw=0).mask)


def test_importances_that_lie_far_apart_make_no_overflow():
    options = {"selection": "importance", "importance_floor": 1e-30, "min_tokens_ratio": 1 / 3}
    options |= {"warmup_steps": 0, "dynamic_threshold": False}
    difficulty = np.array([[2.9e-34, 3.9e24, 7.1e31]], dtype=np.float32)
    result = select_tokens(difficulty, RoutingConfig(**options))  # a warning would be an error
    assert_identical(result, truth.select(difficulty, options), "NumPy")


def test_a_step_below_zero_is_refused_or_the_first():
    x = np.linspace(0, 1, 10, dtype=np.float32)
    with pytest.raises(ValueError, match=r"step must not be negative, got -3\."):
        select_tokens(x, RoutingConfig(), step=-3)
    eligible = np.arange(10) < 5
    result = select_tokens(
        x, RoutingConfig(), step=np.array([-3], dtype=np.int32), eligible=eligible
    )
    np.testing.assert_array_equal(result.mask, eligible)


def test_one_sequence_may_be_given_flat():
    x = np.array([0.3, 2.0, 1.0], dtype=np.float32)
    for scope in SCOPES:
        config = RoutingConfig(min_tokens_ratio=0.5, warmup_steps=0, scope=scope)
        result = select_tokens(x, config)
        assert result.mask.tolist() == [False, True, True]
        assert result.indices.tolist() == [1, 2]
        assert result.count == 2


@pytest.mark.parametrize("rule", ["importance", "stratified", "random"])
def test_a_seed_a_draw_and_a_rank_each_change_the_sample(rule):
    x = np.linspace(0, 1, 400, dtype=np.float32).reshape(4, 100)
    base = {"selection": rule, "warmup_steps": 0}

    def mask(seed=0, **state):
        return select_tokens(x, RoutingConfig(**base, seed=seed), **state).mask

    first = mask()
    np.testing.assert_array_equal(mask(), first)
    for other in (mask(seed=1), mask(draw=1), mask(rank=1)):
        assert (other != first).sum() > 20


def test_importance_sampling_is_unbiased_and_can_draw_every_token():
    # 20,000 seeds. The dense sum is of values that are not the difficulty, some negative.
    n_tokens, n_seeds, sequences = 40, 20_000, 500
    rng = np.random.default_rng(0)
    values = rng.normal(1, 2, n_tokens)
    difficulty = rng.gamma(0.3, 2, n_tokens).astype(np.float32)
    difficulty[:4] = [-np.inf, -3, 0, 50]
    eligible = np.arange(n_tokens) != 7
    tiled = np.tile(difficulty, (sequences, 1))
    estimates, drawn = [], np.zeros(n_tokens, dtype=int)
    for seed in range(n_seeds // sequences):
        # Every row of a batch draws on its own: rows x seeds independent samples.
        config = RoutingConfig(
            selection="importance",
            scope="sequence",
            min_tokens_ratio=0.25,
            warmup_steps=0,
            seed=seed,
        )
        result = select_tokens(tiled, config, eligible=np.tile(eligible, (sequences, 1)))
        padded = np.append(values, 0.0)
        estimates.append((padded[result.indices] * result.weights).sum(axis=1))
        drawn += result.mask.sum(axis=0)
    estimates = np.concatenate(estimates)
    assert estimates.size == n_seeds
    error = estimates.mean() - values[eligible].sum()
    standard_error = estimates.std(ddof=1) / math.sqrt(n_seeds)
    print(f"\nimportance: error {error:.4f} = {error / standard_error:.2f} standard errors")
    assert abs(error) < 4 * standard_error
    assert (drawn[eligible] > 0).all()
    assert drawn[7] == 0


def test_importance_sampling_is_unbiased_over_seeds():
    n_tokens, n_seeds = 24, 20_000
    rng = np.random.default_rng(1)
    values, difficulty = rng.normal(size=n_tokens), rng.gamma(0.5, 1, n_tokens)
    difficulty = torch.from_numpy(difficulty.astype(np.float32))
    estimates = np.empty(n_seeds)
    for seed in range(n_seeds):
        config = RoutingConfig(selection="importance", warmup_steps=0, seed=seed)
        result = select_tokens(difficulty, config, capacity=6, xp=xp_torch)
        estimates[seed] = values[result.indices.numpy()] @ result.weights.numpy().astype(float)
    error = estimates.mean() - values.sum()
    standard_error = estimates.std(ddof=1) / math.sqrt(n_seeds)
    print(f"\nimportance, seeds: error {error:.4f} = {error / standard_error:.2f} standard errors")
    assert abs(error) < 4 * standard_error


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"difficulty": np.zeros((2, 2, 2), "f4")}, ValueError, r"difficulty must have shape"),
        (
            {"difficulty": np.zeros((2, 3), "i4")},
            TypeError,
            "difficulty must be floating, got int32",
        ),
        (
            {"eligible": np.ones((2, 2), bool)},
            ValueError,
            r"eligible must have the difficulty's shape \(2, 3\), got \(2, 2\).",
        ),
        ({"eligible": np.ones((2, 3), "i4")}, TypeError, "eligible must be bool, got int32."),
        (
            {"confidence": np.ones(3, "f4")},
            ValueError,
            r"confidence must have the difficulty's shape \(2, 3\), got \(3,\).",
        ),
        ({"capacity": 7}, ValueError, r"capacity must be in \[0, 6\] for 6 tokens, got 7."),
        ({"capacity": -1}, ValueError, r"capacity must be in \[0, 6\] for 6 tokens, got -1."),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    arguments = {"difficulty": np.zeros((2, 3), "f4"), **arguments}
    with pytest.raises(error, match=message):
        select_tokens(arguments.pop("difficulty"), RoutingConfig(), **arguments)
