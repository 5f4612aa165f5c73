"""cggr.torch and cggr.jax compute the same losses and gradients, those of the float64 truth.

Run with ``-s`` for the largest differences.

Shapes: ``B`` sequences of ``S`` tokens, ``D`` hidden size, ``V`` classes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
import truth

import cggr.jax as cj
import cggr.torch as ct
from cggr.spec import RoutingConfig

SELECTIONS = truth.SELECTIONS
SCOPES = ("batch", "sequence")
SHAPE, CLASSES, WIDTH = (4, 19), 17, 8
STEP, DRAW, ITEMS = 800, 5, 200
# name: reduction, num_items_in_batch
REDUCTIONS = {"mean": ("mean", None), "accumulated": ("mean", ITEMS), "sum": ("sum", None)}
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.4},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": True},
    "all": {"bias": True, "softcap": 3.0, "logit_scale": 1.7},
}
# The issue's: a sum of some 20 losses of float32, each good to an ulp or two of 2**-24 = 6e-8.
LOSS_TOLERANCE = 1e-6
# Relative to the largest entry: single entries are differences of larger numbers.
GRADIENT_TOLERANCE = 1e-5
LOW = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


class Head(NamedTuple):
    """Arrays of a linear head and its batch, float32."""

    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    targets: np.ndarray


@pytest.fixture(scope="module")
def largest():
    """Largest relative differences, printed at the end."""
    seen = {}
    yield seen
    print()
    for name, value in sorted(seen.items()):
        print(f"largest difference, {name}: {value:.1e}")


def note(largest, name, value):
    largest[name] = max(largest.get(name, 0.0), float(value))
    return value


def random_targets(rng, ignored=0.2):
    targets = rng.integers(0, CLASSES, SHAPE).astype(np.int32)
    targets[rng.random(SHAPE) < ignored] = -100
    return targets


def random_logits(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, (*SHAPE, CLASSES)).astype(np.float32), random_targets(rng)


def random_head(seed, bias):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(0, 1, (*SHAPE, WIDTH)).astype(np.float32)
    weight = rng.normal(0, 1, (CLASSES, WIDTH)).astype(np.float32)
    bias_V = rng.normal(0, 1, CLASSES).astype(np.float32) if bias else None
    return Head(hidden, weight, bias_V, random_targets(rng))


def options_of(selection, scope):
    return {
        "selection": selection,
        "scope": scope,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.3,
        "seed": 11,
    }


def true_selection(logits, targets, options):
    statistics = truth.statistics(logits, targets)
    chosen = truth.select(
        truth.difficulty(statistics, "combined"),
        options,
        step=STEP,
        draw=DRAW,
        eligible=targets != -100,
        confidence=statistics["confidence"],
    )
    assert 0 < chosen.mask.sum() < (targets != -100).sum()
    return chosen


def loss_of_torch(criterion, *arguments, **options):
    criterion.load_state_dict({"step_count": torch.tensor(STEP), "draw_count": torch.tensor(DRAW)})
    return criterion(*arguments, **options)


def relative(got, want):
    """Largest difference, relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def leaf(x):
    return None if x is None else torch.from_numpy(x).requires_grad_()


def assert_agree(largest, name, by_jax, by_torch, expected):
    """Losses and gradients of both frontends against each other and against the truth."""
    losses = {"jax": float(by_jax[0]), "torch": by_torch[0].item(), "truth": expected[0]}
    gradients = {
        "jax": [np.asarray(x) for x in by_jax[1]],
        "torch": [x.numpy() for x in by_torch[1]],
        "truth": expected[1],
    }
    for one, other in (("jax", "torch"), ("jax", "truth"), ("torch", "truth")):
        off = note(largest, f"{name} loss, {one} {other}", relative(losses[one], losses[other]))
        assert off <= LOSS_TOLERANCE, f"{one} {losses[one]}, {other} {losses[other]}"
        for got, want in zip(gradients[one], gradients[other], strict=True):
            off = note(largest, f"{name} gradient, {one} {other}", relative(got, want))
            assert off <= GRADIENT_TOLERANCE, f"{one} {other}"


# CGGRLoss


@functools.cache
def logits_program(selection, scope):
    """Losses and gradients of every reduction; the compiler shares the selection."""
    config = RoutingConfig(**options_of(selection, scope))
    capacity = config.capacity(STEP, *SHAPE)

    @jax.jit
    def program(logits, targets):
        results = {}
        for name, (reduction, items) in REDUCTIONS.items():

            def loss(x, reduction=reduction, items=items):
                return cj.cggr_loss(
                    x,
                    targets,
                    config,
                    step=STEP,
                    draw=DRAW,
                    capacity=capacity,
                    reduction=reduction,
                    num_items_in_batch=items,
                )

            (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
            results[name] = value, (gradient,)
        return results

    return program


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_losses_and_gradients_of_logits(selection, scope, largest):
    options = options_of(selection, scope)
    for seed in range(4):
        logits, targets = random_logits(seed)
        chosen = true_selection(logits, targets, options)
        results = logits_program(selection, scope)(logits, targets)
        for name, (reduction, items) in REDUCTIONS.items():
            for capacity in ("exact", "static"):
                x = leaf(logits)
                criterion = ct.CGGRLoss(**options, reduction=reduction, capacity=capacity)
                loss = loss_of_torch(
                    criterion, x, torch.from_numpy(targets), num_items_in_batch=items
                )
                loss.backward()
                expected = (
                    truth.loss(logits, targets, chosen, options, reduction, items),
                    [truth.loss_gradient(logits, targets, chosen, options, reduction, items)],
                )
                by_torch = (loss.detach(), [x.grad])
                assert_agree(largest, "logits", results[name], by_torch, expected)
                for gradient in (results[name][1][0], x.grad):  # the same tokens
                    touched = (np.asarray(gradient) != 0).any(axis=-1)
                    np.testing.assert_array_equal(touched, chosen.mask)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("selection", ["stratified", "importance"])
def test_losses_of_low_precision_logits_are_those_of_the_same_numbers(selection, dtype, largest):
    options = options_of(selection, "batch")
    logits, targets = random_logits(7)
    low = logits.astype(LOW[dtype])
    exact = low.astype(np.float32)
    chosen = true_selection(exact, targets, options)
    x = torch.from_numpy(exact).to(dtype).requires_grad_()
    loss = loss_of_torch(ct.CGGRLoss(**options), x, torch.from_numpy(targets))
    loss.backward()
    value, (gradient,) = logits_program(selection, "batch")(low, targets)["mean"]
    assert gradient.dtype == low.dtype
    assert value.dtype == jnp.float32
    want = truth.loss(exact, targets, chosen, options)
    for got in (float(value), loss.item()):
        assert note(largest, f"{dtype} logits loss", relative(got, want)) <= LOSS_TOLERANCE
    true_gradient = truth.loss_gradient(exact, targets, chosen, options)
    # One rounding of the float32 gradient to the logits' type; below its smallest normal number,
    # 2**-14 in float16, the rounding is absolute.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    absolute = GRADIENT_TOLERANCE * np.abs(true_gradient).max() + 2.0**-25
    for got in (np.asarray(gradient, np.float32), x.grad.float().numpy()):
        np.testing.assert_allclose(got, true_gradient, rtol=rounding, atol=absolute)
    np.testing.assert_array_equal((np.asarray(gradient) != 0).any(axis=-1), chosen.mask)


# CGGRLinearLoss


def float64(x):
    return None if x is None else x.astype(np.float64)


def true_linear(head, options, reduction, items, *, logit_scale=1.0, softcap=None, chosen=None):
    """Loss and gradients to hidden, weight and bias by the chain rule in float64."""
    hidden, weight, bias = (float64(x) for x in head[:3])
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    slope = np.full_like(logits, logit_scale)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
        slope = slope * (1 - (logits / softcap) ** 2)
    if chosen is None:
        chosen = true_selection(logits, head.targets, options)
    loss = truth.loss(logits, head.targets, chosen, options, reduction, items)
    d_logits = truth.loss_gradient(logits, head.targets, chosen, options, reduction, items)
    d_head = (d_logits * slope).reshape(-1, logits.shape[-1])
    d_hidden = (d_head @ weight).reshape(hidden.shape)
    gradients = [d_hidden, d_head.T @ hidden.reshape(-1, hidden.shape[-1])]
    if bias is not None:
        gradients.append(d_head.sum(axis=0))
    return loss, gradients, chosen


@functools.cache
def linear_program(selection, scope, reductions, head_options):
    config = RoutingConfig(**options_of(selection, scope))
    capacity = config.capacity(STEP, *SHAPE)

    @jax.jit
    def program(leaves, targets):
        results = {}
        for name in reductions:
            reduction, items = REDUCTIONS[name]

            def loss(leaves, reduction=reduction, items=items):
                hidden, weight, *bias = leaves
                return cj.cggr_linear_loss(
                    hidden,
                    weight,
                    targets,
                    config,
                    step=STEP,
                    draw=DRAW,
                    capacity=capacity,
                    bias=bias[0] if bias else None,
                    reduction=reduction,
                    num_items_in_batch=items,
                    **dict(head_options),
                )

            (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(leaves)
            results[name] = value, gradients
        return results

    return program


def linear_by_torch(head, options, reduction, items, **head_options):
    leaves = [leaf(x) for x in head[:3]]
    criterion = ct.CGGRLinearLoss(**options, **head_options, reduction=reduction)
    loss = loss_of_torch(
        criterion,
        *leaves[:2],
        torch.from_numpy(head.targets),
        bias=leaves[2],
        num_items_in_batch=items,
    )
    loss.backward()
    return loss.detach(), [x.grad for x in leaves if x is not None]


def compare_linear(largest, selection, scope, reductions, head_name, seeds):
    head_options = dict(HEADS[head_name])
    has_bias = head_options.pop("bias", False)
    options = options_of(selection, scope)
    program = linear_program(selection, scope, reductions, tuple(head_options.items()))
    for seed in seeds:
        head = random_head(seed, has_bias)
        leaves = [x for x in head[:3] if x is not None]
        results = program(leaves, head.targets)
        for name in reductions:
            by_torch = linear_by_torch(head, options, *REDUCTIONS[name], **head_options)
            *expected, chosen = true_linear(head, options, *REDUCTIONS[name], **head_options)
            assert_agree(largest, "linear head", results[name], by_torch, expected)
            touched = (np.asarray(results[name][1][0]) != 0).any(axis=-1)
            np.testing.assert_array_equal(touched, chosen.mask)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_losses_and_gradients_of_a_linear_head(selection, scope, largest):
    compare_linear(largest, selection, scope, ("mean",), "all", range(4))


@pytest.mark.parametrize("head_name", HEADS)
def test_losses_and_gradients_of_every_head(head_name, largest):
    compare_linear(largest, "importance", "batch", ("mean",), head_name, range(2))


@pytest.mark.parametrize("selection", ["stratified", "importance"])
def test_losses_and_gradients_of_a_linear_head_in_every_reduction(selection, largest):
    compare_linear(largest, selection, "sequence", tuple(REDUCTIONS), "all", range(2))


def low_precision_by_torch_itself(head, chosen, dtype, softcap):
    """The expression that a user of torch would write in this precision, on the chosen tokens."""
    leaves = [torch.from_numpy(x).to(dtype).requires_grad_() for x in head[:3]]
    logits = 1.7 * F.linear(*leaves)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    rows = torch.from_numpy(chosen.mask)
    loss = F.cross_entropy(logits[rows], torch.from_numpy(head.targets)[rows].long())
    loss.backward()
    return loss.item(), [x.grad.float().numpy() for x in leaves]


@functools.partial(jax.jit, static_argnums=3)
def low_precision_by_jax_itself(leaves, targets, mask, softcap):
    """The same of JAX, where no product takes its bias along: one rounding more."""

    def loss(leaves):
        hidden, weight, bias = leaves
        logits = 1.7 * (hidden @ weight.T + bias)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        labels = jnp.where(mask, targets, 0)
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(nll, where=mask) / jnp.sum(mask)

    return jax.value_and_grad(loss)(leaves)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", LOW)
def test_a_low_precision_head_is_as_good_as_what_a_user_would_write(dtype, softcap):
    # Random selection without the dynamic ratio: the same tokens, however the logits round.
    options = options_of("random", "batch") | {"dynamic_threshold": False}
    config = RoutingConfig(**options)
    head_options = {"softcap": softcap, "logit_scale": 1.7}

    @jax.jit
    def program(leaves, targets):
        def loss(leaves):
            hidden, weight, bias = leaves
            return cj.cggr_linear_loss(
                hidden,
                weight,
                targets,
                config,
                step=STEP,
                draw=DRAW,
                capacity=config.capacity(STEP, *SHAPE),
                bias=bias,
                **head_options,
            )

        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(leaves)
        return value, gradients

    off = {"loss": [], "hidden": [], "weight": [], "bias": []}
    for seed in range(40):
        head = random_head(seed, bias=True)
        low = [x.astype(LOW[dtype]) for x in head[:3]]
        exact = Head(*(x.astype(np.float32) for x in low), head.targets)
        value, gradients = program(low, head.targets)
        assert value.dtype == jnp.float32
        assert all(x.dtype == low[0].dtype for x in gradients)
        want, true_gradients, chosen = true_linear(exact, options, "mean", None, **head_options)
        all_three = (
            (value, gradients),
            low_precision_by_jax_itself(low, head.targets, chosen.mask, softcap),
            low_precision_by_torch_itself(exact, chosen, dtype, softcap),
        )
        for name, errors in off.items():
            errors.append([])
            for loss, others in all_three:
                got = dict(zip(off, (loss, *others), strict=True))[name]
                true = dict(zip(off, (want, *true_gradients), strict=True))[name]
                errors[-1].append(relative(np.asarray(got, np.float32), true))
    for name, errors in off.items():
        # Over forty batches: in a single one any may be lucky. The rounding of the logits makes
        # most of the error, and here they are rounded once.
        mine, *others = np.sqrt(np.mean(np.square(errors), axis=0))
        print(f"\n{dtype}, soft-cap {softcap}, {name}: {mine:.1e}, JAX {others[0]:.1e}", end="")
        print(f", torch {others[1]:.1e}")
        tolerance = LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE
        assert mine <= min(others) + tolerance, name
