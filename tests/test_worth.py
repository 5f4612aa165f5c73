"""What draws are worth: against the noise of real draws, and against equations solved otherwise."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cggr.spec import RoutingConfig, select_tokens
from cggr.worth import effective_fraction, operations

POSITIVE = arrays(np.float64, st.integers(1, 40), elements=st.floats(1e-3, 1e3))
RATIOS = st.floats(0.01, 1.0)


def probabilities(q_N, ratio):
    """The equations Σ min(1, q / τ) = ratio N by bisection."""
    low, high = 0.0, q_N.sum() / (ratio * q_N.size) + q_N.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.minimum(1, q_N / tau).sum() > ratio * q_N.size else (low, tau)
    return np.minimum(1, q_N / high)


@given(POSITIVE, RATIOS)
def test_worth_is_the_noise_of_all_over_that_of_the_drawn(norm_N, ratio):
    importance_N = norm_N + 0.05
    noise = (norm_N**2 / probabilities(importance_N, ratio)).sum()
    found = effective_fraction(norm_N, ratio, importance=importance_N)
    assert found == pytest.approx((norm_N**2).sum() / noise, rel=1e-6)


@given(POSITIVE, RATIOS)
def test_a_batch_is_worth_its_ratio_at_least_and_itself_at_most(norm_N, ratio):
    assert ratio * (1 - 1e-9) <= effective_fraction(norm_N, ratio) <= 1 + 1e-12
    assert effective_fraction(100 * norm_N, ratio) == pytest.approx(
        effective_fraction(norm_N, ratio)
    )


def test_no_draw_is_worth_more_than_one_by_the_norms():
    random = np.random.default_rng(0)
    norm_N = random.lognormal(size=1000)
    best = effective_fraction(norm_N, 0.3)
    for power in (0, 0.5, 0.9, 1.1, 2):
        assert effective_fraction(norm_N, 0.3, importance=norm_N**power) < best


def test_uniform_draws_are_worth_their_ratio():
    norm_N = np.random.default_rng(0).lognormal(size=100)
    found = [effective_fraction(norm_N, ratio, importance=np.ones(100)) for ratio in (0.25, 0.8, 1)]
    assert found == pytest.approx([0.25, 0.8, 1.0])


def test_norms_of_some_spread_are_worth_that_much_more():
    norm_N = np.random.default_rng(0).uniform(0.9, 1.1, size=(20, 50))
    spread = norm_N.var() / norm_N.mean() ** 2
    assert effective_fraction(norm_N, 0.25) == pytest.approx(0.25 * (1 + spread), rel=1e-12)


def test_every_row_draws_its_part():
    random = np.random.default_rng(0)
    norm_BS = random.lognormal(size=(6, 40))
    noise = sum((norm_S**2 / probabilities(norm_S, 0.25)).sum() for norm_S in norm_BS)
    found = effective_fraction(norm_BS, 0.25, scope="sequence")
    assert found == pytest.approx((norm_BS**2).sum() / noise)
    assert found < effective_fraction(norm_BS, 0.25)
    assert effective_fraction(norm_BS[:1], 0.25, scope="sequence") == pytest.approx(
        effective_fraction(norm_BS[0], 0.25)
    )


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_the_size_of_the_numbers_is_nothing(size):
    expected = effective_fraction([1.0, 2.0, 4.0], 0.5, importance=[1.0, 1.0, 2.0])
    norms, importance = size * np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0]) / size
    assert effective_fraction(norms, 0.5, importance=importance) == pytest.approx(expected)


def test_tokens_without_gradient_count_for_nothing():
    assert effective_fraction([3.0, 0.0, 0.0, 0.0], 0.25) == 1.0
    assert effective_fraction([0.0, 0.0], 0.5) == 1.0
    # A token that is never drawn, and has a gradient.
    assert effective_fraction([1.0, 1.0], 0.5, importance=[1.0, 0.0]) == 0.0


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_it_is_the_noise_of_what_the_library_draws(ratio):
    random = np.random.default_rng(1)
    n_tokens, n_draws, floor = 400, 4000, 0.05
    difficulty = random.lognormal(sigma=1.2, size=(1, n_tokens)).astype(np.float32)
    direction_ND = random.normal(size=(n_tokens, 50))
    direction_ND /= np.linalg.norm(direction_ND, axis=1, keepdims=True)
    gradient_ND = direction_ND * difficulty[0][:, None]
    config = RoutingConfig(
        selection="importance",
        importance_floor=floor,
        min_tokens_ratio=ratio,
        warmup_steps=0,
        dynamic_threshold=False,
    )
    noise = 0.0
    for draw in range(n_draws):
        drawn = select_tokens(difficulty, config, draw=draw)
        used = drawn.indices < n_tokens
        estimate_D = drawn.weights[used] @ gradient_ND[drawn.indices[used]]
        noise += np.sum((estimate_D - gradient_ND.sum(0)) ** 2) / n_draws
    of_all = np.sum(gradient_ND**2)
    worth = effective_fraction(difficulty, ratio, importance=difficulty + floor)
    # Draws add to the batch's own noise. Those of one size are a little more even than independent.
    assert of_all / (of_all + noise) == pytest.approx(worth, rel=0.05)


@pytest.mark.parametrize(
    ("split", "products"),
    # Of a linear layer: all rows forward, and drawn ones twice; or again forward with those.
    [("backward", lambda n, k: n + 2 * k), ("token", lambda n, k: n + k + 2 * k)],
)
def test_operations_are_the_products_over_those_of_a_dense_step(split, products):
    for k in (1, 10, 100):
        assert operations(k / 100, split) == pytest.approx(products(100, k) / (3 * 100))
        unscored = operations(k / 100, split, scored=False)
        assert unscored == pytest.approx((100 + 2 * k) / 300)  # products are made once


def test_what_has_a_gradient_of_all_tokens_saves_nothing():
    dense, drawn = 3 * 100, 100 + 2 * 10  # of a layer
    for n_layers in (0, 1, 4):  # of five, whose backward pass is of all rows
        expected = (n_layers * dense + (5 - n_layers) * drawn) / (5 * dense)
        found = operations(0.1, "backward", of_all=n_layers / 5)
        assert found == pytest.approx(expected)
        assert operations(0.1, "token", of_all=n_layers / 5) == operations(0.1, "token")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0.0), "ratio must be in (0, 1], got 0.0."),
        (([1.0], 1.5), "ratio must be in (0, 1], got 1.5."),
        (([1.0], float("nan")), "ratio must be in (0, 1], got nan."),
        (([], 0.5), "gradient_norm must have a token at least, got shape (0,)."),
        (([1.0, -1.0], 0.5), "gradient_norm must be finite and not negative, got -1.0."),
        (([np.inf, 1.0], 0.5), "gradient_norm must be finite and not negative, got inf."),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        effective_fraction(*arguments)


def test_bad_importance_is_refused():
    with pytest.raises(ValueError, match=r"importance must have the gradient_norm's shape \(2,\)"):
        effective_fraction([1.0, 2.0], 0.5, importance=[[1.0, 2.0]])
    with pytest.raises(ValueError, match="importance must be finite and not negative, got nan"):
        effective_fraction([1.0, 2.0], 0.5, importance=[1.0, np.nan])
    with pytest.raises(ValueError, match="scope must be 'batch' or 'sequence', got 'row'"):
        effective_fraction([1.0, 2.0], 0.5, scope="row")
    with pytest.raises(
        ValueError, match=r"gradient_norm must have shape \(B, S\), got shape \(2,\)"
    ):
        effective_fraction([1.0, 2.0], 0.5, scope="sequence")


def test_bad_splits_and_ratios_are_refused():
    with pytest.raises(ValueError, match="split must be 'backward' or 'token', got 'sequence'"):
        operations(0.5, "sequence")
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 2"):
        operations(2, "token")
    with pytest.raises(ValueError, match=r"of_all must be in \[0, 1\), got 1"):
        operations(0.5, "backward", of_all=1)
