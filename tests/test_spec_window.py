"""Means over neighbouring tokens: against float64, and to the last bit on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import truth
from array_api_compat import torch as torch_xp
from test_spec_selection import FLAVOURS, difficulties

import cggr.jax as cj
import cggr.torch as ct
from cggr.spec import RoutingConfig, select_tokens
from cggr.spec.config import rule_of_sequences
from cggr.spec.window import window_mean

WIDTHS = (1, 3, 5, 17, 63, 1023)
SHAPE = (3, 70)


def case(width, flavour, ignored=0.3):
    rng = np.random.default_rng([width, FLAVOURS.index(flavour)])
    return difficulties(rng, SHAPE, flavour), rng.random(SHAPE) >= ignored


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_score_becomes_the_mean_of_those_around_it(width, flavour, ignored):
    score, eligible = case(width, flavour, ignored)
    with np.errstate(over="ignore"):  # of the largest scores that there are
        result = window_mean(score, eligible, width, xp=np)
    expected = truth.window_mean(score, eligible, width)
    left = ~eligible | ~np.isfinite(score)
    np.testing.assert_array_equal(result[left], score[left])
    terms = truth.window_mean(np.abs(score), eligible, width)
    fits = ~left & (terms * width < np.finfo(np.float32).max)
    error = np.abs(result[fits] - expected[fits])
    # Additions round once in every doubling and for every digit, the reciprocal and product once.
    assert (error <= 2.0**-24 * (2 * width.bit_length() + 2) * terms[fits]).all()


def test_bounds_of_rounding_can_fail():
    score, eligible = case(17, FLAVOURS[0])
    wider = window_mean(score, eligible, 19, xp=np)
    assert np.abs(wider - truth.window_mean(score, eligible, 17))[eligible].max() > 1e-3


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_backend_has_the_same_bits(width, flavour):
    score, eligible = case(width, flavour)
    with np.errstate(over="ignore"):
        expected = truth.window_mean_float32(score, eligible, width)
        by_numpy = window_mean(score, eligible, width, xp=np)
    tensors = torch.from_numpy(score), torch.from_numpy(eligible)
    by_jax = jax.jit(lambda *arrays: window_mean(*arrays, width, xp=jnp))(score, eligible)
    for result in (by_numpy, window_mean(*tensors, width, xp=torch_xp).numpy(), by_jax):
        # Bits, but for those of NaN.
        np.testing.assert_array_equal(np.asarray(result), expected)
        assert np.asarray(result).dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 1023])
def test_compiled_by_torch_it_has_the_same_bits(width):
    compiled = torch.compile(
        lambda *tensors: window_mean(*tensors, width, xp=torch_xp), fullgraph=True
    )
    for flavour in FLAVOURS:
        score, eligible = case(width, flavour)
        with np.errstate(over="ignore"):
            expected = truth.window_mean_float32(score, eligible, width)
        result = compiled(torch.from_numpy(score), torch.from_numpy(eligible))
        np.testing.assert_array_equal(result.numpy(), expected)


def test_runs_of_noise_are_left_out_where_single_tokens_tell_nothing():
    # Noise is 1 in the mean, text 0, both ± 3: alone a token says little, a run of 24 does.
    rng = np.random.default_rng(0)
    is_noise = np.repeat(rng.random((8, 25)) < 0.3, 24, axis=1)
    score = (rng.normal(0, 3, is_noise.shape) - is_noise).astype(np.float32)
    left_out = {}
    for width in (1, 17):
        config = RoutingConfig(
            selection="topk", min_tokens_ratio=0.7, warmup_steps=0, score_window=width
        )
        kept = select_tokens(score, config).mask
        left_out[width] = 1 - kept[is_noise].mean()
    assert left_out[1] < 0.45
    assert left_out[17] > 0.55


@pytest.mark.parametrize("scoring", ["excess_loss", "reference"])
def test_both_frontends_take_references_over_windows(scoring):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (2, 40, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 40)).astype(np.int32)
    targets[:, 30:] = -100
    reference = rng.gamma(2, 1.5, (2, 40)).astype(np.float32)
    options = {
        "scoring": scoring,
        "score_window": 5,
        "min_tokens_ratio": 0.4,
        "warmup_steps": 0,
    }
    nll = truth.statistics(logits, targets)["nll"]
    score = truth.difficulty({"nll": nll}, scoring, reference)
    kept = truth.select(score, options, eligible=targets != -100).mask
    expected = nll[kept].mean()
    assert abs(expected - nll[targets != -100].mean()) > 0.01

    tensors = [torch.from_numpy(x) for x in (logits, targets.astype(np.int64), reference)]
    by_torch = ct.CGGRLoss(**options)(*tensors[:2], reference_nll=tensors[2])
    np.testing.assert_allclose(by_torch.item(), expected, rtol=1e-6)
    by_jax = cj.CGGRLoss(**options)(logits, targets, reference_nll=reference)
    np.testing.assert_allclose(float(by_jax), expected, rtol=1e-6)


def test_whole_sequences_have_no_neighbours():
    config = RoutingConfig(score_window=17)
    assert rule_of_sequences(config).score_window == 1
