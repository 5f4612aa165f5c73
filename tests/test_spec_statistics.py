"""Statistics of rows of logits on every backend against float64 NumPy."""

import itertools

import array_api_compat.torch as xp_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import truth

from cggr.spec import TokenStatistics, token_difficulty, token_statistics
from cggr.spec.statistics import (
    VocabularySums,
    join_vocabulary_sums,
    statistics_of_sums,
    vocabulary_sums,
)

NAMES = TokenStatistics._fields
# Absolute: a float32 sum of V positive terms and one logarithm or division. Relative: the same.
TOLERANCE = {"rtol": 3e-6, "atol": 3e-6}


def on_numpy(logits, targets):
    with np.errstate(invalid="ignore"):  # NumPy warns where a row has no finite maximum
        return token_statistics(logits, targets)


def on_torch(logits, targets):
    result = token_statistics(torch.from_numpy(logits), torch.from_numpy(targets), xp=xp_torch)
    return [x.numpy() for x in result]


@jax.jit
def _jax(logits, targets):
    return token_statistics(logits, targets, xp=jnp)


def on_jax(logits, targets):
    return [np.asarray(x) for x in _jax(logits, targets.astype(np.int32))]


def on_torch_compiled(logits, targets):
    torch._dynamo.reset()  # one variant a shape: many shapes would meet the recompilation limit
    result = _compiled(torch.from_numpy(logits), torch.from_numpy(targets))
    return [x.numpy() for x in result]


@torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
def _compiled(logits, targets):
    return token_statistics(logits, targets, xp=xp_torch)


def _in_parts(logits, targets, xp):
    """The statistics from the sums of a third of the classes, of none but one, and of the rest."""
    n_classes = logits.shape[-1]
    bounds = sorted({0, n_classes // 3, min(n_classes // 3 + 1, n_classes), n_classes})
    parts = [
        vocabulary_sums(logits[..., first:last], targets - first, xp=xp)
        for first, last in itertools.pairwise(bounds)
    ]
    stacked = VocabularySums(*(xp.stack(x) for x in zip(*parts, strict=True)))
    joined = join_vocabulary_sums(stacked, xp=xp)
    return statistics_of_sums(joined, targets, n_classes=n_classes, xp=xp)


def on_numpy_in_parts(logits, targets):
    with np.errstate(invalid="ignore"):
        return _in_parts(logits, targets, np)


def on_torch_in_parts(logits, targets):
    return [x.numpy() for x in _in_parts(*map(torch.from_numpy, (logits, targets)), xp_torch)]


@jax.jit
def _jax_in_parts(logits, targets):
    return _in_parts(logits, targets, jnp)


def on_jax_in_parts(logits, targets):
    return [np.asarray(x) for x in _jax_in_parts(logits, targets.astype(np.int32))]


WHOLE = [on_numpy, on_torch, on_torch_compiled, on_jax]
BACKENDS = [*WHOLE, on_numpy_in_parts, on_torch_in_parts, on_jax_in_parts]
SHAPES = [(1, 1), (3, 2), (2, 5, 7), (4, 33), (64, 257), (8, 5000)]


def batch(shape, scale, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, shape).astype(np.float32)
    targets = rng.integers(0, shape[-1], shape[:-1])
    # Edges in some rows: -inf logits, ties of the top two, a certain row, a constant row.
    rows, labels = logits.reshape(-1, shape[-1]), targets.reshape(-1)
    for i, row in enumerate(rows):
        kind = rng.integers(0, 8)
        if kind == 0:
            row[rng.random(shape[-1]) < 0.5] = -np.inf
            row[labels[i]] = 1.0
        elif kind == 1 and shape[-1] > 1:
            row[np.argsort(row)[-2]] = row.max()
        elif kind == 2:
            row[:] = 0
            row[labels[i]] = 60
        elif kind == 3:
            row[:] = 2.5
        elif kind == 4:
            labels[i] = -100
    return logits, targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_statistics_are_those_of_the_truth(backend, shape, scale):
    logits, targets = batch(shape, scale, seed=int(scale * 10) + shape[-1])
    expected = truth.statistics(logits, targets)
    for name, value in zip(NAMES, backend(logits, targets), strict=True):
        assert value.dtype == np.float32
        assert value.shape == shape[:-1]
        np.testing.assert_allclose(value, expected[name], err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_of_the_top_two_has_margin_exactly_zero(backend):
    logits = np.array([[3.0, 3.0, 1.0], [5.0, 5.0, 5.0], [-np.inf, 2.0, 2.0]], dtype=np.float32)
    assert backend(logits, np.zeros(3, dtype=np.int64))[3].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_sure_model_leaves_to_other_classes_is_not_rounded_away(backend):
    # The other class has p = e = 1e-13: 1 - p is 1 in float32, and its logarithm 0.
    logits = np.array([[30.0, 0.0]], dtype=np.float32)
    e = np.exp(-30.0)
    nll, entropy, _, _, error_norm = backend(logits, np.array([0]))
    np.testing.assert_allclose(nll, np.log1p(e), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.log1p(e) + 30 * e / (1 + e), rtol=1e-6)
    np.testing.assert_allclose(error_norm, np.sqrt(2) * e / (1 + e), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fault_is_loud_and_stays_in_its_row(backend):
    logits = np.zeros((5, 4), dtype=np.float32)
    logits[0, 1], logits[1, 2], logits[2] = np.nan, np.inf, -np.inf
    targets = np.array([0, 2, 1, -100, 0])
    for name, value in zip(NAMES, backend(logits, targets), strict=True):
        assert np.isnan(value[:3]).all(), name
        assert np.isfinite(value[3:]).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_out_of_range_is_nan_and_an_ignored_one_zero(backend):
    logits = np.zeros((5, 4), dtype=np.float32)
    nll, entropy, _, _, error_norm = backend(logits, np.array([-1, 4, 2**31 - 1, -100, 3]))
    for value in (nll, error_norm):
        assert np.isnan(value[:3]).all()
        assert value[3] == 0
        assert value[4] > 0
    np.testing.assert_allclose(entropy, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("compute", [on_numpy, on_numpy_in_parts])
def test_float64_logits_stay_float64(compute):
    logits, targets = batch((16, 40), 3.0, seed=5)
    result = compute(logits.astype(np.float64), targets)
    expected = truth.statistics(logits, targets)
    for name, value in zip(NAMES, result, strict=True):
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("scoring", ["entropy", "margin", "loss", "combined", "error_norm"])
def test_difficulty_is_that_of_the_truth(scoring):
    logits, targets = batch((64, 257), 3.0, seed=1)
    expected = truth.difficulty(truth.statistics(logits, targets), scoring)
    result = token_difficulty(token_statistics(logits, targets), scoring)
    np.testing.assert_allclose(result, expected, **TOLERANCE)


def test_difficulty_without_targets():
    logits, _ = batch((64, 257), 3.0, seed=1)
    statistics = token_statistics(logits)
    expected = truth.difficulty(truth.statistics(logits), "combined")
    np.testing.assert_allclose(token_difficulty(statistics, "combined"), expected, **TOLERANCE)
    for scoring in ("loss", "error_norm", "excess_loss"):
        with pytest.raises(ValueError, match=f"scoring='{scoring}' needs targets, got none."):
            token_difficulty(statistics, scoring)


def test_excess_loss_needs_the_reference():
    logits, targets = batch((64, 257), 3.0, seed=1)
    statistics, reference = token_statistics(logits, targets), np.ones(64, dtype=np.float32)
    result = token_difficulty(statistics, "excess_loss", reference_nll=reference)
    np.testing.assert_array_equal(result, statistics.nll - 1)
    with pytest.raises(ValueError, match=r"scoring='excess_loss' needs reference_nll, got none\."):
        token_difficulty(statistics, "excess_loss")
    with pytest.raises(ValueError, match=r"reference_nll must have shape \(64,\), got \(3,\)."):
        token_difficulty(statistics, "excess_loss", reference_nll=reference[:3])


def test_a_callable_scores_in_any_framework():
    def surprise(statistics):
        return statistics.nll * (1 - statistics.confidence)

    logits, targets = batch((64, 257), 3.0, seed=1)
    expected = truth.statistics(logits, targets)
    expected = expected["nll"] * (1 - expected["confidence"])
    np.testing.assert_allclose(
        token_difficulty(token_statistics(logits, targets), surprise), expected, **TOLERANCE
    )
    on_device = token_statistics(torch.from_numpy(logits), torch.from_numpy(targets))
    np.testing.assert_allclose(token_difficulty(on_device, surprise), expected, **TOLERANCE)
    with pytest.raises(ValueError, match=r"scoring must return scores of shape \(64,\), got"):
        token_difficulty(on_device, lambda statistics: statistics.nll[:5])
