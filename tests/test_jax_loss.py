"""The losses of cggr.jax and their modules, against the truth and against the dense loss.

Shapes: ``B`` sequences of ``S`` tokens, ``D`` hidden size, ``V`` classes.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
import truth
from flax import nnx

from cggr.jax import (
    CGGRLinearLoss,
    CGGRLoss,
    RoutingConfig,
    cggr_linear_loss,
    cggr_loss,
    chunks,
)
from cggr.jax.cross_entropy import linear_logits, linear_weighted_nll_sum, weighted_nll_sum

SHAPE, CLASSES, WIDTH = (4, 19), 17, 6
SELECTIONS = truth.SELECTIONS
SCOPES = ("batch", "sequence")
# float32 against float64: rounding of the statistics and of the sum of the losses; gradients
# relative to the largest entry, since single ones are differences of larger numbers.
VALUE, GRADIENT = 3e-6, 1e-5


def exactly(message):
    return rf"^{re.escape(message)}(\n-+\nFor simplicity, JAX has removed .*)?$"  # JAX's note


class Near:
    """Equal within a relative tolerance; pytest's own does not compare JAX scalars."""

    def __init__(self, want, rel):
        self.want, self.rel = float(want), rel

    def __eq__(self, got):
        return abs(float(got) - self.want) <= self.rel * abs(self.want)

    def __repr__(self):
        return f"{self.want} +- {self.rel}"

    __hash__ = None


def approx(want, rel):
    return Near(want, rel)


def batch(shape=SHAPE, classes=CLASSES, seed=0, ignored=0.2):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (*shape, classes)).astype(np.float32)
    targets = rng.integers(0, classes, shape).astype(np.int32)
    targets[rng.random(shape) < ignored] = -100
    return jnp.asarray(logits), targets


def head(shape=SHAPE, classes=CLASSES, seed=0, ignored=0.2, dtype="float32"):
    rng = np.random.default_rng(seed)
    arrays = (rng.normal(0, 1, size) for size in ((*shape, WIDTH), (classes, WIDTH), (classes,)))
    targets = rng.integers(0, classes, shape).astype(np.int32)
    targets[rng.random(shape) < ignored] = -100
    return *(jnp.asarray(x.astype(np.float32)).astype(dtype) for x in arrays), targets


def config_of(**options):
    return RoutingConfig(
        **{"warmup_steps": 0, "dynamic_threshold": True, "min_tokens_ratio": 0.3, "seed": 11}
        | options
    )


def true_selection(logits, targets, config, *, step=0, draw=0, reference_nll=None):
    options = {name: getattr(config, name) for name in truth.DEFAULTS}
    x, y = np.asarray(logits), np.asarray(targets)
    if y.ndim == 1:
        x, y = x[None], y[None]
    statistics = truth.statistics(x, y, config.ignore_index)
    difficulty = truth.difficulty(statistics, config.scoring, reference_nll)
    chosen = truth.select(
        difficulty,
        options,
        step=step,
        draw=draw,
        eligible=y != config.ignore_index,
        confidence=statistics["confidence"],
    )
    return chosen, statistics, difficulty, options


def dense(logits, targets):
    """Optax's cross-entropy, the mean over what is not ignored."""
    eligible = targets != -100
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(eligible, targets, 0)
    )
    return jnp.sum(jnp.where(eligible, nll, 0)) / jnp.maximum(jnp.sum(eligible), 1)


def assert_close(got, want, tolerance=GRADIENT):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@functools.partial(jax.jit, static_argnames=("config", "capacity", "reduction", "items"))
def value_and_grad(
    logits, targets, config, step, draw, capacity, reduction="mean", items=None, reference=None
):
    def loss(x):
        return cggr_loss(
            x,
            targets,
            config,
            step=step,
            draw=draw,
            capacity=capacity,
            reduction=reduction,
            num_items_in_batch=items,
            reference_nll=reference,
        )

    return jax.value_and_grad(loss, has_aux=True)(logits)


# Value, gradient and metrics


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_value_gradient_and_metrics(selection, scope):
    config = config_of(selection=selection, scope=scope, warmup_steps=1000)
    logits, targets = batch()
    capacity = config.capacity(800, *SHAPE)
    (loss, metrics), gradient = value_and_grad(logits, targets, config, 800, 5, capacity)
    chosen, statistics, difficulty, options = true_selection(
        logits, targets, config, step=800, draw=5
    )
    eligible = targets != -100
    assert 0 < chosen.mask.sum() < eligible.sum()
    assert loss == approx(truth.loss(logits, targets, chosen, options), rel=VALUE)
    assert_close(gradient, truth.loss_gradient(logits, targets, chosen, options))
    np.testing.assert_array_equal((gradient != 0).any(axis=-1), chosen.mask)
    n_rows = eligible.sum() if selection == "importance" else chosen.mask.sum()
    assert {name: value.item() for name, value in metrics.items()} == {
        "step": 800,
        "token_ratio": chosen.ratio / truth.ONE,
        "tokens_selected": chosen.mask.sum(),
        "tokens_total": eligible.sum(),
        "avg_confidence": approx(statistics["confidence"][eligible].mean(), rel=1e-5),
        "avg_entropy": approx(statistics["entropy"][eligible].mean(), rel=1e-5),
        "avg_difficulty": approx(difficulty[eligible].mean(), rel=1e-5),
        "loss_sum": approx(truth.loss(logits, targets, chosen, options, "sum"), rel=VALUE),
        "denominator": n_rows,
    }
    assert metrics["loss_sum"] / metrics["denominator"] == approx(loss, rel=1e-6)
    assert all(value.shape == () for value in metrics.values())


@pytest.mark.parametrize("selection", ["stratified", "importance"])
def test_reductions_and_micro_batches_add_up(selection):
    config = config_of(selection=selection)
    n_items = sum(int((batch(seed=seed)[1] != -100).sum()) for seed in (0, 1))
    total, parts, sums = 0.0, [], []
    for seed in (0, 1):
        logits, targets = batch(seed=seed)
        capacity = config.capacity(0, *SHAPE)
        arguments = (logits, targets, config, 0, 3, capacity)
        (mean, _), mean_gradient = value_and_grad(*arguments)
        (share, metrics), gradient = value_and_grad(*arguments, items=n_items)
        (summed, _), sum_gradient = value_and_grad(*arguments, reduction="sum")
        eligible = (targets != -100).sum()
        assert share == approx(mean * eligible / n_items, rel=1e-6)
        assert_close(gradient, mean_gradient * eligible / n_items, 1e-6)
        assert summed == metrics["loss_sum"]
        assert_close(sum_gradient, mean_gradient * metrics["denominator"], 1e-6)
        chosen, _, _, options = true_selection(logits, targets, config, draw=3)
        want = truth.loss(logits, targets, chosen, options, "mean", n_items)
        assert share == approx(want, rel=VALUE)
        total += share
        parts.append(mean * eligible)
        sums.append(metrics["loss_sum"])
    assert total == approx(sum(parts) / n_items, rel=1e-6)
    if selection == "importance":  # then the numerators themselves add up
        assert total == approx(sum(sums) / n_items, rel=1e-6)


def test_an_array_of_items_is_as_good_as_a_number():
    config = config_of()
    logits, targets = batch()
    want, _ = cggr_loss(logits, targets, config, step=0, num_items_in_batch=90)
    got, _ = cggr_loss(logits, targets, config, step=0, num_items_in_batch=jnp.int32(90))
    assert got == approx(want, rel=1e-6)


def test_an_optimizer_step_without_targets_is_zero_and_so_is_its_gradient():
    logits = jnp.ones((2, 3, 5))
    targets = jnp.full((2, 3), -100)
    config = RoutingConfig(selection="importance")

    def loss(x):
        return cggr_loss(x, targets, config, step=0, num_items_in_batch=jnp.int32(0))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert value == 0
    assert not gradient.any()


def test_tokens_without_batch_are_one_sequence():
    config = config_of(selection="stratified", scope="sequence")
    logits, targets = batch()
    flat, labels = logits.reshape(-1, CLASSES), targets.reshape(-1)
    loss, _ = cggr_loss(flat, labels, config, step=0)
    chosen, _, _, options = true_selection(flat, labels, config)
    want = truth.loss(np.asarray(flat)[None], labels[None], chosen, options)
    assert loss == approx(want, rel=VALUE)


def test_excess_loss_is_measured_against_the_reference():
    config = config_of(scoring="excess_loss", dynamic_threshold=False)
    logits, targets = batch(seed=2)
    reference = np.random.default_rng(9).random(SHAPE).astype(np.float32) * 6
    capacity = config.capacity(0, *SHAPE)
    (_, metrics), gradient = value_and_grad(
        logits, targets, config, 0, 0, capacity, reference=reference
    )
    chosen, _, difficulty, _ = true_selection(logits, targets, config, reference_nll=reference)
    by_loss = true_selection(logits, targets, config_of(scoring="loss", dynamic_threshold=False))[0]
    touched = np.asarray((gradient != 0).any(axis=-1))
    np.testing.assert_array_equal(touched, chosen.mask)
    assert not np.array_equal(by_loss.mask, chosen.mask)  # the reference matters here
    want = difficulty[targets != -100].mean()
    assert metrics["avg_difficulty"] == approx(want, rel=1e-5)
    # The head's loss hands it over too; an identity head makes the same logits.
    value, _ = cggr_linear_loss(
        logits, jnp.eye(CLASSES), targets, config, step=0, reference_nll=reference
    )
    want, _ = cggr_loss(logits, targets, config, step=0, reference_nll=reference)
    assert value == approx(want, rel=1e-6)


def easy(statistics):
    return -statistics.nll


def test_a_callable_score_selects():
    config = config_of(
        scoring=easy, selection="topk", dynamic_threshold=False, min_tokens_ratio=0.1
    )
    logits, targets = batch(ignored=0)
    capacity = config.capacity(0, *SHAPE)
    _, gradient = value_and_grad(logits, targets, config, 0, 0, capacity)
    nll = truth.statistics(logits, targets)["nll"].ravel()
    k = math.ceil(nll.size * round(0.1 * 2**14) / 2**14)
    easiest = np.isin(np.arange(nll.size), np.argsort(nll)[:k])
    np.testing.assert_array_equal((gradient != 0).any(axis=-1).ravel(), easiest)


# Ratio 1: the dense loss


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize(("selection", "scope"), [*zip(SELECTIONS, SCOPES * 3, strict=True)])
def test_ratio_one_is_the_dense_loss(selection, scope, ignored):
    config = config_of(selection=selection, scope=scope, min_tokens_ratio=1.0)
    logits, targets = batch(ignored=ignored)
    want, want_gradient = jax.value_and_grad(dense)(logits, targets)
    size = SHAPE[1] if scope == "sequence" else math.prod(SHAPE)
    (loss, _), gradient = value_and_grad(logits, targets, config, 0, 0, size)
    assert loss == approx(want, rel=1e-6)
    assert_close(gradient, want_gradient, 1e-6)


def test_the_first_step_of_the_warm_up_is_dense():
    logits, targets = batch()
    config = config_of(selection="importance", warmup_steps=7)
    loss, metrics = cggr_loss(logits, targets, config, step=0)
    assert loss == approx(dense(logits, targets), rel=1e-6)
    assert metrics["token_ratio"] == 1.0


@pytest.mark.parametrize("bias", [False, True])
def test_ratio_one_of_a_linear_head_is_the_dense_loss(bias):
    hidden, weight, bias_V, targets = head()
    bias_V = bias_V if bias else None
    config = config_of(min_tokens_ratio=1.0)

    def loss(arrays):
        return cggr_linear_loss(*arrays[:2], targets, config, step=0, bias=arrays[2])[0]

    def want(arrays):
        logits = arrays[0] @ arrays[1].T
        return dense(logits if arrays[2] is None else logits + arrays[2], targets)

    value, gradients = jax.value_and_grad(loss)((hidden, weight, bias_V))
    expected, expected_gradients = jax.value_and_grad(want)((hidden, weight, bias_V))
    assert value == approx(expected, rel=1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    for got, true in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert_close(got, true)


# Slots


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", ["sequence_aware", "importance"])
def test_any_capacity_gives_the_same_loss(selection, scope):
    config = config_of(selection=selection, scope=scope)
    logits, targets = batch(ignored=0.5)  # many slots stay empty
    least = config.capacity(0, *SHAPE)
    size = SHAPE[1] if scope == "sequence" else math.prod(SHAPE)
    want = None
    for capacity in (least, least + 1, size):  # the last one moves no row
        (loss, metrics), gradient = value_and_grad(logits, targets, config, 0, 4, capacity)
        want = want or (loss, metrics, gradient)
        assert loss == approx(want[0], rel=1e-6)
        assert (
            metrics["tokens_selected"]
            == want[1]["tokens_selected"]
            < least * (1 if scope == "batch" else SHAPE[0])
        )
        np.testing.assert_allclose(gradient, want[2], rtol=1e-6, atol=1e-9)
    by_step, _ = cggr_loss(logits, targets, config, step=0, draw=4)  # takes it from the step
    assert by_step == approx(want[0], rel=1e-6)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("full", [False, True])
def test_rows_that_are_not_selected_get_exactly_no_gradient(fault, full):
    config = config_of(selection="random", dynamic_threshold=False)
    logits, targets = batch()
    capacity = math.prod(SHAPE) if full else config.capacity(0, *SHAPE)
    chosen = true_selection(logits, targets, config)[0].mask
    want, want_gradient = value_and_grad(logits, targets, config, 0, 0, capacity)
    bad = jnp.where(chosen[..., None], logits, fault)
    (loss, _), gradient = value_and_grad(bad, targets, config, 0, 0, capacity)
    assert loss == want[0]
    np.testing.assert_array_equal(gradient, want_gradient)
    assert not gradient[~chosen].any()


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("full", [False, True])  # if full, no row is moved
def test_faulty_rows_of_a_head_that_are_not_selected_count_for_nothing(fault, full):
    config = config_of(selection="random", dynamic_threshold=False)
    hidden, weight, bias, targets = head()
    capacity = math.prod(SHAPE) if full else config.capacity(0, *SHAPE)
    chosen = true_selection(jnp.zeros((*SHAPE, CLASSES)), targets, config)[0].mask
    bad = jnp.where(chosen[..., None], hidden, fault)

    def loss_of(hidden, weight, bias):
        return cggr_linear_loss(
            hidden, weight, targets, config, step=0, capacity=capacity, bias=bias, softcap=3.0
        )[0]

    run = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1, 2)))
    for got, true in zip(
        jax.tree.leaves(run(bad, weight, bias)),
        jax.tree.leaves(run(hidden, weight, bias)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, true)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_eligible_is_a_loss_and_gradients_of_zero(selection):
    config = config_of(selection=selection, scope="sequence")
    logits, targets = batch(ignored=1.0)
    assert (targets == -100).all()
    capacity = config.capacity(0, *SHAPE)
    for x in (logits, logits.at[1, 2].set(jnp.nan)):
        (loss, metrics), gradient = value_and_grad(x, targets, config, 0, 0, capacity)
        assert loss == 0.0
        np.testing.assert_array_equal(gradient, np.zeros_like(logits))
        assert metrics["tokens_selected"] == metrics["tokens_total"] == metrics["denominator"] == 0
        for name in ("avg_confidence", "avg_entropy", "avg_difficulty"):
            assert metrics[name] == 0.0


def test_nothing_eligible_in_a_linear_head():
    hidden, weight, bias, targets = head(ignored=1.0)
    hidden = hidden.at[0, 0].set(jnp.nan)

    def loss(hidden, weight, bias):
        return cggr_linear_loss(hidden, weight, targets, config_of(), step=0, bias=bias)[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, weight, bias)
    assert value == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_a_selected_target_out_of_range_is_loud_under_jit():
    config = config_of(min_tokens_ratio=1.0)
    logits, targets = batch(ignored=0)
    for wrong in (CLASSES, -1, 2**31 - 1):
        labels = targets.copy()
        labels[1, 3] = wrong
        capacity = math.prod(SHAPE)
        (loss, _), gradient = value_and_grad(logits, labels, config, 0, 0, capacity)
        assert jnp.isnan(loss)
        assert jnp.isnan(gradient[1, 3]).all()
        assert jnp.isfinite(gradient.at[1, 3].set(0)).all()
        # One that is not selected counts for nothing.
        weight_N = jnp.ones(labels.size).at[SHAPE[1] + 3].set(0)
        flat = logits.reshape(-1, CLASSES), labels.reshape(-1), weight_N
        assert jnp.isfinite(jax.jit(weighted_nll_sum)(*flat))
    message = f"targets must be in [0, {CLASSES}) or ignore_index=-100, got {2**31 - 1} at "
    with pytest.raises(ValueError, match=re.escape(message + "position (1, 3).")):
        cggr_loss(logits, labels, config, step=0)


def test_a_fault_that_can_be_selected_is_selected_and_loud():
    config = config_of(min_tokens_ratio=0.02)
    logits, targets = batch(ignored=0)
    logits = logits.at[2, 7].set(jnp.nan)
    capacity = config.capacity(0, *SHAPE)
    (loss, _), gradient = value_and_grad(logits, targets, config, 0, 0, capacity)
    assert jnp.isnan(loss)
    assert jnp.isnan(gradient[2, 7]).all()
    assert jnp.isfinite(gradient.at[2, 7].set(0)).all()


# Numeric gradients, in float64; the selection must not move with what is perturbed


def constant_scores(statistics):
    scores = jnp.arange(statistics.entropy.size, dtype=statistics.entropy.dtype)
    return (scores % 5).reshape(statistics.entropy.shape)


@pytest.mark.parametrize(
    ("selection", "scope"), [("stratified", "batch"), ("importance", "sequence")]
)
def test_the_gradient_of_logits_is_the_numeric_one(selection, scope):
    config = config_of(
        selection=selection, scope=scope, scoring=constant_scores, dynamic_threshold=False
    )
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits = jnp.asarray(rng.normal(0, 1, (2, 5, 4)))
        targets = np.array([[0, 1, -100, 3, 2], [1, 1, 0, -100, 3]])

        @jax.jit
        def loss(x):
            return cggr_loss(x, targets, config, step=0)[0]

        assert loss(logits).dtype == jnp.float64
        jax.test_util.check_grads(loss, (logits,), 1, ["rev"], atol=1e-7, rtol=1e-7)
        assert jnp.abs(jax.grad(loss)(logits)).max() > 0.01


@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"logit_scale": 1.3}, {"softcap": 2.0, "logit_scale": 0.7}]
)
def test_the_gradient_of_a_linear_head_is_the_numeric_one(options, rows, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_LOGITS", rows * 5)
    config = config_of(
        selection="importance",
        scoring=constant_scores,
        dynamic_threshold=False,
        min_tokens_ratio=0.7,
    )
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        arrays = tuple(jnp.asarray(rng.normal(0, 1, s)) for s in ((2, 5, 3), (5, 3), (5,)))
        targets = np.array([[0, 1, -100, 3, 2], [1, 4, 0, -100, 3]])

        @jax.jit
        def loss(hidden, weight, bias):
            return cggr_linear_loss(hidden, weight, targets, config, step=0, bias=bias, **options)[
                0
            ]

        assert loss(*arrays).dtype == jnp.float64
        jax.test_util.check_grads(loss, arrays, 1, ["rev"], atol=1e-7, rtol=1e-7)


# The sums themselves


@pytest.mark.parametrize("rows", [1, 3, 5, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
def test_chunks_change_nothing_but_rounding(rows, has_bias, monkeypatch):
    hidden, weight, bias, targets = head(shape=(23,), ignored=0)
    bias = bias if has_bias else None
    weights = jnp.asarray(np.random.default_rng(0).random(23).astype(np.float32)).at[4].set(0)

    def chunked(hidden, weight, bias):
        return linear_weighted_nll_sum(hidden, weight, bias, targets, weights, 0.8, 4.0)

    def whole(hidden, weight, bias):
        logits = linear_logits(hidden, weight, bias, 0.8, 4.0)
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(weights * nll)

    monkeypatch.setattr(chunks, "MAX_LOGITS", rows * CLASSES)
    arguments = (0, 1, 2) if has_bias else (0, 1)
    value, gradients = jax.jit(jax.value_and_grad(chunked, arguments))(hidden, weight, bias)
    want, expected = jax.value_and_grad(whole, arguments)(hidden, weight, bias)
    assert value == approx(want, rel=1e-6)
    for got, true in zip(gradients, expected, strict=True):
        assert_close(got, true, 2e-6)


@pytest.mark.parametrize("offset", [100.0, 10_000.0])
def test_a_common_offset_of_the_logits_costs_no_precision(offset):
    # exp(logits - logsumexp) would lose as many digits as the offset has.
    logits, targets = batch(ignored=0)
    flat = jnp.round(logits.reshape(-1, CLASSES) * 64) / 64  # so that the sum is exact
    labels, weights = targets.reshape(-1), jnp.ones(targets.size)
    run = jax.value_and_grad(weighted_nll_sum)
    want, want_gradient = run(flat, labels, weights)
    value, gradient = run(flat + offset, labels, weights)
    assert value == approx(want, rel=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=1e-6)


def test_the_incoming_gradient_scales_the_gradient():
    hidden, weight, _, targets = head(ignored=0)
    config = config_of(selection="random")

    def loss(weight, factor):
        return factor * cggr_linear_loss(hidden, weight, targets, config, step=0)[0]

    once, thrice = (jax.grad(loss)(weight, factor) for factor in (1.0, 3.0))
    assert_close(thrice, 3 * once, 1e-6)
    logits, targets = batch()
    once, thrice = (
        jax.grad(lambda x, f=f: f * cggr_loss(x, targets, config, step=0)[0])(logits)
        for f in (1.0, 3.0)
    )
    assert_close(thrice, 3 * once, 1e-6)


def test_the_linear_loss_is_the_loss_of_its_logits():
    hidden, weight, bias, targets = head()
    config = config_of(selection="importance", warmup_steps=10)
    options = {"logit_scale": 0.7, "softcap": 2.0}
    state = {"step": 8, "draw": 3, "rank": 2, "num_items_in_batch": 90}
    want, want_metrics = cggr_loss(
        linear_logits(hidden, weight, bias, **options), targets, config, **state
    )
    loss, metrics = cggr_linear_loss(hidden, weight, targets, config, bias=bias, **options, **state)
    assert loss == approx(want, rel=1e-6)
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        assert value == approx(want_metrics[name], rel=1e-5), name
    for other in ({"draw": 4}, {"rank": 3}, {"step": 2}):  # each is handed over, and matters
        arguments = state | other
        changed, _ = cggr_linear_loss(
            hidden, weight, targets, config, bias=bias, **options, **arguments
        )
        logits = linear_logits(hidden, weight, bias, **options)
        same, _ = cggr_loss(logits, targets, config, **arguments)
        assert changed == approx(same, rel=1e-6)
        assert abs(changed - loss) > 1e-5


# Precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gets_half_precision_gradients(dtype):
    config = config_of(selection="stratified")
    logits, targets = batch()
    capacity = config.capacity(0, *SHAPE)
    (loss, _), gradient = value_and_grad(logits.astype(dtype), targets, config, 0, 0, capacity)
    exact = logits.astype(dtype).astype(jnp.float32)
    (want, _), want_gradient = value_and_grad(exact, targets, config, 0, 0, capacity)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == dtype
    assert loss == approx(want, rel=1e-6)
    # One rounding of the float32 gradient to the logits' type.
    rounded = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), want_gradient, rtol=1.01 * rounded, atol=1e-7
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_head_gets_half_precision_gradients(dtype):
    hidden, weight, bias, targets = head(dtype=dtype)
    config = config_of(selection="random", dynamic_threshold=False)

    def loss(arrays):
        return cggr_linear_loss(*arrays[:2], targets, config, step=0, bias=arrays[2])[0]

    run = jax.jit(jax.value_and_grad(loss))
    arrays = (hidden, weight, bias)
    value, gradients = run(arrays)
    want, expected = run(jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    assert value.dtype == jnp.float32
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert value == approx(want, rel=2 * rounding)  # that of the logits
    for got, true in zip(gradients, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, true, 8 * rounding)


def test_a_weight_gradient_of_many_chunks_is_summed_in_float32(monkeypatch):
    # 512 chunks of one row each: summed in bfloat16, it would stop growing.
    monkeypatch.setattr(chunks, "MAX_LOGITS", 2)
    hidden = jnp.ones((512, 1), jnp.bfloat16)
    weight = jnp.zeros((2, 1), jnp.bfloat16)
    targets, weights = jnp.zeros(512, jnp.int32), jnp.ones(512)

    def total(weight, bias):
        return linear_weighted_nll_sum(hidden, weight, bias, targets, weights)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(weight, jnp.zeros(2, jnp.bfloat16))
    assert gradients[0].ravel().tolist() == [-256.0, 256.0]
    assert gradients[1].tolist() == [-256.0, 256.0]


def test_the_weight_gradient_of_a_chunk_is_not_rounded_before_it_is_added():
    # Seen in the program: on the CPU, XLA computes such a product in float32 whatever is asked.
    hidden, weight, bias, targets = head(shape=(6,), ignored=0, dtype="bfloat16")
    run = jax.grad(linear_weighted_nll_sum, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(run)(hidden, weight, bias, targets, jnp.ones(6))
    products = re.findall(r"(\w+)\[([\d,]+)\] = dot_general", str(jaxpr))
    shapes = {shape: dtype for dtype, shape in products}
    assert shapes[f"{CLASSES},{WIDTH}"] == "f32"  # of the weight
    assert shapes[f"6,{CLASSES}"] == "f32"  # of the logits, which are rounded once, at the end
    assert shapes[f"6,{WIDTH}"] == "bf16"  # of the hidden states, each of one chunk only


# Transformations


def test_vmap_over_batches_is_a_loop_over_them():
    config = config_of(selection="importance", scope="sequence")
    pairs = [batch(seed=seed) for seed in range(3)]
    logits = jnp.stack([x for x, _ in pairs])
    targets = np.stack([y for _, y in pairs])
    capacity = config.capacity(0, *SHAPE)

    def loss(x, y, draw):
        value, metrics = cggr_loss(x, y, config, step=0, draw=draw, capacity=capacity)
        return value, metrics["tokens_selected"]

    def run(x, y, draw):
        return jax.value_and_grad(loss, has_aux=True)(x, y, draw)

    (values, counts), gradients = jax.jit(jax.vmap(run))(logits, targets, jnp.arange(3))
    for i, (x, y) in enumerate(pairs):
        (value, count), gradient = jax.jit(run)(x, y, i)
        assert values[i] == approx(value, rel=1e-6)
        assert counts[i] == count
        assert_close(gradients[i], gradient, 1e-6)


def test_vmap_over_linear_heads_is_a_loop_over_them(monkeypatch):
    monkeypatch.setattr(chunks, "MAX_LOGITS", 10 * CLASSES)
    config = config_of(selection="stratified")
    cases = [head(seed=seed) for seed in range(2)]
    stacked = [jnp.stack(x) for x in zip(*cases, strict=True)]

    def loss(arrays):
        return cggr_linear_loss(*arrays[:2], arrays[3], config, step=0, bias=arrays[2])[0]

    def run(hidden, weight, bias, targets):
        return jax.grad(lambda x: loss((*x, targets)))((hidden, weight, bias))

    vmapped, single = jax.jit(jax.vmap(run)), jax.jit(run)
    for got, *want in zip(vmapped(*stacked), *(single(*case) for case in cases), strict=True):
        for one, other in zip(got, want, strict=True):
            assert_close(one, other, 2e-6)


def test_rematerialisation_changes_nothing():
    hidden, weight, _, targets = head()
    config = config_of(selection="importance")

    def loss(hidden, weight):
        direct = cggr_loss(hidden @ weight.T, targets, config, step=0, draw=1)[0]
        linear = cggr_linear_loss(hidden, weight, targets, config, step=0, draw=2)[0]
        return direct + linear

    want = jax.jit(jax.grad(loss, (0, 1)))(hidden, weight)
    got = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(hidden, weight)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, 1e-6)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"logits": jnp.zeros(5), "targets": np.int32(0)},
            ValueError,
            "logits must have shape (B, S, V) or (N, V), got (5,).",
        ),
        (
            {"logits": jnp.zeros((2, 2, 2, 5))},
            ValueError,
            "logits must have shape (B, S, V) or (N, V), got (2, 2, 2, 5).",
        ),
        ({"logits": jnp.zeros((2, 5), int)}, TypeError, "logits must be floating, got int32."),
        (
            {"targets": np.zeros(6, int)},
            ValueError,
            "targets must have the logits' leading shape (2, 3), got (6,).",
        ),
        ({"targets": np.zeros((2, 3), "f4")}, TypeError, "targets must be integers, got float32."),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'."),
        (
            {"reduction": "sum", "num_items_in_batch": 5},
            ValueError,
            "num_items_in_batch needs reduction='mean', got reduction='sum'.",
        ),
        ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch must be positive, got 0."),
        (
            {"config": RoutingConfig(scoring="excess_loss")},
            ValueError,
            "scoring='excess_loss' needs reference_nll, got none.",
        ),
        ({"capacity": 7}, ValueError, "capacity must be in [0, 6] for 6 tokens, got 7."),
        (
            {"config": "topk"},
            TypeError,
            "config must be a RoutingConfig, got 'topk'; options are given by keyword.",
        ),
        (
            {"step": jnp.int32(0)},
            TypeError,
            (
                "capacity must be given where step is an array: a Python int, "
                "config.capacity(step, batch, length) of the step that the host knows."
            ),
        ),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    arguments = {
        "logits": jnp.zeros((2, 3, 5)),
        "targets": np.zeros((2, 3), int),
        "config": RoutingConfig(),
        "step": 0,
    } | arguments
    with pytest.raises(error, match=exactly(message)):
        cggr_loss(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"hidden": jnp.zeros(4)},
            ValueError,
            "hidden must have shape (B, S, D) or (N, D), got (4,).",
        ),
        (
            {"weight": jnp.zeros((5, 3))},
            ValueError,
            "hidden must have shape (..., D) and weight (V, D), got (2, 3, 4) and (5, 3).",
        ),
        ({"bias": jnp.zeros(4)}, ValueError, "bias must have shape (5,), got (4,)."),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite or None, got 0.0."),
        (
            {"config": {}},
            TypeError,
            "config must be a RoutingConfig, got {}; options are given by keyword.",
        ),
        (
            {"targets": np.full((2, 3), 5)},
            ValueError,
            "targets must be in [0, 5) or ignore_index=-100, got 5 at position (0, 0).",
        ),
    ],
)
def test_bad_heads_are_named(arguments, error, message):
    arguments = {
        "hidden": jnp.zeros((2, 3, 4)),
        "weight": jnp.zeros((5, 4)),
        "targets": np.zeros((2, 3), int),
        "config": RoutingConfig(),
        "step": 0,
    } | arguments
    with pytest.raises(error, match=exactly(message)):
        cggr_linear_loss(**arguments)


# Modules


@nnx.jit
def forward(criterion, *arrays, **options):
    return criterion(*arrays, **options)


def test_the_module_is_the_function_with_its_counters():
    options = {"selection": "importance", "warmup_steps": 4, "min_tokens_ratio": 0.2}
    criterion = CGGRLoss(**options)
    config = RoutingConfig(**options)
    logits, targets = batch()
    assert criterion.get_metrics() == criterion.metrics == {}
    draw = 0
    for step in range(6):
        for _ in range(2):  # micro-batches
            loss = forward(criterion, logits, targets)
            want, metrics = cggr_loss(logits, targets, config, step=step, draw=draw)
            assert loss == approx(want, rel=1e-6)
            draw += 1
            names = ("step", "token_ratio", "tokens_selected", "tokens_total")
            averages = ("avg_confidence", "avg_entropy", "avg_difficulty")
            assert criterion.get_metrics() == {
                **{name: metrics[name].item() for name in names},
                **{name: approx(metrics[name].item(), rel=1e-6) for name in averages},
                "selection": "importance",
                "scoring": "combined",
            }
            assert criterion.draw_count[...] == draw
        assert criterion._slots(SHAPE) == config.capacity(step, *SHAPE)
        criterion.step()
        assert criterion.step_count[...] == step + 1
        assert criterion._slots(SHAPE) == config.capacity(step + 1, *SHAPE)  # no device was asked
    assert criterion.metrics["token_ratio"] < 0.3


def test_the_linear_module_is_the_function_with_its_counters():
    options = {"selection": "stratified", "warmup_steps": 2, "scope": "sequence"}
    criterion = CGGRLinearLoss(**options, logit_scale=0.5, softcap=2.0, reduction="sum")
    config = RoutingConfig(**options)
    hidden, weight, bias, targets = head()
    for step in range(3):
        loss = forward(criterion, hidden, weight, targets, bias=bias, rank=3)
        want, metrics = cggr_linear_loss(
            hidden,
            weight,
            targets,
            config,
            step=step,
            draw=step,
            rank=3,
            bias=bias,
            logit_scale=0.5,
            softcap=2.0,
            reduction="sum",
        )
        assert loss == approx(want, rel=1e-6)
        assert criterion.get_metrics()["tokens_selected"] == metrics["tokens_selected"]
        criterion.step()
    assert criterion.draw_count[...] == 3
    assert metrics["tokens_selected"] < (targets != -100).sum()


@pytest.mark.parametrize("argument", ["rank", "reference_nll", "num_items_in_batch"])
@pytest.mark.parametrize("linear", [False, True])
def test_modules_hand_every_argument_over(argument, linear):
    options = {"selection": "random", "warmup_steps": 0}
    value = {"rank": 3, "num_items_in_batch": 300, "reference_nll": None}[argument]
    if argument == "reference_nll":
        options |= {"scoring": "excess_loss", "selection": "topk"}
        value = np.random.default_rng(3).random(SHAPE).astype(np.float32) * 9
    logits, targets = batch()
    if linear:
        arrays = (logits, jnp.eye(CLASSES), targets)
        criterion, function = CGGRLinearLoss(**options), cggr_linear_loss
    else:
        arrays = (logits, targets)
        criterion, function = CGGRLoss(**options), cggr_loss
    want, _ = function(*arrays, RoutingConfig(**options), step=0, **{argument: value})
    assert criterion(*arrays, **{argument: value}) == approx(want, rel=1e-6)
    other = np.zeros(SHAPE, "f4") if argument == "reference_nll" else 1
    changed, _ = function(*arrays, RoutingConfig(**options), step=0, **{argument: other})
    assert abs(changed - want) > 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_after_eval_the_loss_is_dense_and_no_draw_is_counted(reduction):
    logits, targets = batch()
    hidden, weight, bias, _ = head()
    n_rows = (targets != -100).sum() if reduction == "sum" else 1
    criterion = CGGRLoss(warmup_steps=0, selection="random", reduction=reduction)
    linear = CGGRLinearLoss(
        warmup_steps=0, selection="random", reduction=reduction, logit_scale=0.5, softcap=2.0
    )
    for module, arrays, options, dense_logits in (
        (criterion, (logits, targets), {}, logits),
        (
            linear,
            (hidden, weight, targets),
            {"bias": bias},
            linear_logits(hidden, weight, bias, 0.5, 2.0),
        ),
    ):
        module.eval()
        want = dense(dense_logits, targets) * n_rows
        assert module(*arrays, **options) == approx(want, rel=1e-6)
        assert module.draw_count[...] == 0
        assert module.metrics == {}
        if reduction == "mean":
            items = module(*arrays, **options, num_items_in_batch=1000)
            assert items == approx(want * (targets != -100).sum() / 1000, rel=1e-6)
        module.train()
        trained = module(*arrays, **options)
        assert abs(trained - want) > 1e-4 * n_rows
        assert module.draw_count[...] == 1
        assert module.metrics["tokens_selected"] < (targets != -100).sum()


def test_after_eval_bad_input_is_named_too():
    criterion, linear = CGGRLoss(), CGGRLinearLoss()
    criterion.eval()
    linear.eval()
    with pytest.raises(ValueError, match=r"^logits must have shape \(B, S, V\) or \(N, V\)"):
        criterion(jnp.zeros(5), np.int32(0))
    with pytest.raises(ValueError, match=r"^hidden must have shape \(B, S, D\) or \(N, D\)"):
        linear(jnp.zeros(4), jnp.zeros((5, 4)), np.int32(0))
    logits, targets = batch(ignored=1.0)
    assert criterion(logits, targets) == 0.0


def test_faulty_hidden_states_that_are_ignored_reach_no_gradient_of_the_dense_loss():
    hidden, weight, _, targets = head()
    linear = CGGRLinearLoss()
    linear.eval()
    bad = jnp.where((targets != -100)[..., None], hidden, jnp.nan)
    run = jax.grad(lambda weight, hidden: linear(hidden, weight, targets))
    np.testing.assert_array_equal(run(weight, bad), run(weight, hidden))


def test_set_step_moves_the_schedule_and_its_slots():
    criterion = CGGRLoss(warmup_steps=100)
    criterion.set_step(100)
    logits, targets = batch()
    criterion(logits, targets)
    config = RoutingConfig(warmup_steps=100)
    assert criterion.metrics["step"] == 100
    assert criterion._slots(SHAPE) == config.capacity(100, *SHAPE) < math.prod(SHAPE)
    criterion.step_count[...] = jnp.int32(0)  # a checkpoint is restored
    criterion.set_step()
    assert criterion._slots(SHAPE) == math.prod(SHAPE)
    for step, error, message in (
        (-1, ValueError, "step must be in [0, 2**31), got -1."),
        (2**31, ValueError, f"step must be in [0, 2**31), got {2**31}."),
    ):
        with pytest.raises(error, match=exactly(message)):
            criterion.set_step(step)
    with pytest.raises(TypeError):
        criterion.set_step(1.5)


def test_step_inside_jit_is_refused():
    message = r"^step\(\) chooses the capacity of the next compiled step on the host: call it "
    with pytest.raises(RuntimeError, match=message):
        nnx.jit(lambda criterion: criterion.step())(CGGRLoss())


def test_options_of_modules_are_checked():
    message = r"^unknown option 'min_token_ratio'; the options are dynamic_threshold, .*\.$"
    for kind in (CGGRLoss, CGGRLinearLoss):
        with pytest.raises(TypeError, match=message):
            kind(min_token_ratio=0.5)
        message_ = "reduction must be 'mean' or 'sum', got 'none'."
        with pytest.raises(ValueError, match=exactly(message_)):
            kind(reduction="none")
        config = RoutingConfig(seed=3)
        assert kind(config).config == kind(seed=3).config == config
        with pytest.raises(TypeError, match=r"^give either config or options as keywords"):
            kind(config, seed=1)


def test_importance_is_unbiased_in_loss_and_gradient():
    logits, targets = batch((4, 16))
    want, direction = jax.value_and_grad(dense)(logits, targets)
    config = config_of(selection="importance", min_tokens_ratio=0.25, dynamic_threshold=False)
    capacity = config.capacity(0, 4, 16)

    @jax.jit
    @jax.vmap
    def run(draw):
        (loss, _), gradient = jax.value_and_grad(
            lambda x: cggr_loss(x, targets, config, step=0, draw=draw, capacity=capacity),
            has_aux=True,
        )(logits)
        return loss, jnp.sum(gradient * direction)

    for samples, expected in zip(run(jnp.arange(400)), (want, jnp.sum(direction**2)), strict=True):
        error = np.std(samples, ddof=1) / math.sqrt(samples.size)
        assert 0 < 4 * error < 0.1 * expected  # sharp enough to see a bias of a tenth
        assert abs(np.mean(samples) - expected) < 4 * error
