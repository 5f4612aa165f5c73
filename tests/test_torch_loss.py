import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import truth
from torch import nn

from cggr.torch import CGGRLoss, RoutingConfig

CLASSES = 17
SELECTIONS = truth.SELECTIONS
SCOPES = ("batch", "sequence")
# float32 against float64: rounding of the statistics and of the sum of the losses.
VALUE = {"rtol": 3e-6, "atol": 1e-7}
GRADIENT = {"rtol": 1e-5, "atol": 1e-7}


def exactly(message):
    return f"^{re.escape(message)}$"


def array(tensor):
    tensor = tensor.detach()
    return tensor.float().numpy().astype(np.float64)


def batch(batch_size=4, length=19, classes=CLASSES, seed=0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, length, classes, generator=generator) * 2
    targets = torch.randint(0, classes, (batch_size, length), generator=generator)
    drop = torch.rand(batch_size, length, generator=generator) < ignored
    return logits.requires_grad_(), targets.masked_fill(drop, -100)


def set_counters(criterion, step, draw):
    state = {"step_count": torch.tensor(step), "draw_count": torch.tensor(draw)}
    criterion.load_state_dict(state)


def true_selection(logits, targets, options, *, step=0, draw=0, reference_nll=None):
    """The selection that the equations give for these logits, in float64."""
    cfg = truth.merged(options)
    x, y = array(logits), targets.numpy()
    if y.ndim == 1:
        x, y = x[None], y[None]
    statistics = truth.statistics(x, y, cfg["ignore_index"])
    difficulty = truth.difficulty(statistics, cfg["scoring"], reference_nll)
    selection = truth.select(
        difficulty,
        options,
        step=step,
        draw=draw,
        eligible=y != cfg["ignore_index"],
        confidence=statistics["confidence"],
    )
    return selection, statistics, difficulty


def selected_mask(gradient):
    return (gradient != 0).any(dim=-1).numpy()


# Value and gradient


@pytest.mark.parametrize(("reduction", "num_items"), [("mean", None), ("mean", 200), ("sum", None)])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_value_and_gradient(selection, scope, reduction, num_items):
    options = {"selection": selection, "scope": scope, "min_tokens_ratio": 0.3, "seed": 11}
    logits, targets = batch()
    criterion = CGGRLoss(**options, reduction=reduction)
    set_counters(criterion, step=800, draw=5)
    loss = criterion(logits, targets, num_items_in_batch=num_items)
    loss.backward()
    chosen, _, _ = true_selection(logits, targets, options, step=800, draw=5)
    assert 0 < chosen.mask.sum() < (targets != -100).sum()
    x, y = array(logits), targets.numpy()
    want = truth.loss(x, y, chosen, options, reduction, num_items)
    assert loss.item() == pytest.approx(want, rel=3e-6)
    gradient = truth.loss_gradient(x, y, chosen, options, reduction, num_items)
    np.testing.assert_allclose(array(logits.grad), gradient, **GRADIENT)
    assert np.array_equal(selected_mask(logits.grad), chosen.mask)


@pytest.mark.parametrize("scoring", ["entropy", "margin", "loss", "combined", "error_norm"])
def test_every_score_selects_what_the_equations_say(scoring):
    options = {"scoring": scoring, "warmup_steps": 0, "dynamic_threshold": True}
    logits, targets = batch(seed=3)
    criterion = CGGRLoss(**options)
    criterion(logits, targets).backward()
    chosen, _, _ = true_selection(logits, targets, options)
    assert np.array_equal(selected_mask(logits.grad), chosen.mask)


def test_tokens_without_batch_are_one_sequence():
    options = {
        "selection": "stratified",
        "warmup_steps": 0,
        "dynamic_threshold": True,
        "scope": "sequence",
    }
    logits, targets = batch()
    flat_logits = logits.detach().reshape(-1, CLASSES).requires_grad_()
    flat_targets = targets.reshape(-1)
    loss = CGGRLoss(**options)(flat_logits, flat_targets)
    loss.backward()
    chosen, _, _ = true_selection(flat_logits, flat_targets, options)
    x, y = array(flat_logits)[None], flat_targets.numpy()[None]
    assert loss.item() == pytest.approx(truth.loss(x, y, chosen, options), rel=3e-6)
    assert np.array_equal(selected_mask(flat_logits.grad)[None], chosen.mask)


def test_excess_loss_is_measured_against_the_reference():
    options = {"scoring": "excess_loss", "warmup_steps": 0, "dynamic_threshold": False}
    logits, targets = batch(seed=2)
    reference = torch.rand(targets.shape, generator=torch.Generator().manual_seed(9)) * 6
    criterion = CGGRLoss(**options)
    criterion(logits, targets, reference_nll=reference).backward()
    chosen, _, difficulty = true_selection(logits, targets, options, reference_nll=array(reference))
    assert np.array_equal(selected_mask(logits.grad), chosen.mask)
    by_loss, _, _ = true_selection(logits, targets, {**options, "scoring": "loss"})
    assert not np.array_equal(chosen.mask, by_loss.mask)  # the reference matters here
    eligible = targets.numpy() != -100
    assert criterion.metrics["avg_difficulty"] == pytest.approx(
        difficulty[eligible].mean(), rel=1e-5
    )


def test_a_callable_score_selects():
    options = {"warmup_steps": 0, "dynamic_threshold": False, "min_tokens_ratio": 0.1}
    logits, targets = batch(ignored=0)
    criterion = CGGRLoss(scoring=lambda statistics: -statistics.nll, selection="topk", **options)
    criterion(logits, targets).backward()
    nll = truth.statistics(array(logits), targets.numpy())["nll"]
    k = math.ceil(nll.size * round(0.1 * 2**14) / 2**14)
    easiest = np.zeros(nll.size, dtype=bool)
    easiest[np.argsort(nll.ravel())[:k]] = True
    assert np.array_equal(selected_mask(logits.grad).ravel(), easiest)
    assert criterion.metrics["scoring"] == "<lambda>"


@pytest.mark.parametrize("selection", SELECTIONS)
def test_unselected_rows_get_exactly_no_gradient(selection):
    logits, targets = batch()
    criterion = CGGRLoss(selection=selection, warmup_steps=0)
    criterion(logits, targets).backward()
    touched = (logits.grad != 0).any(dim=-1)
    assert touched.sum().item() == criterion.metrics["tokens_selected"]
    assert torch.equal(logits.grad[~touched], torch.zeros_like(logits.grad[~touched]))
    assert not touched[targets == -100].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_get_half_precision_gradients(dtype):
    options = {"selection": "stratified", "warmup_steps": 0}
    logits, targets = batch()
    half = logits.detach().to(dtype).requires_grad_()
    loss = CGGRLoss(**options)(half, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad.dtype == dtype
    chosen, _, _ = true_selection(half, targets, options)
    x, y = array(half), targets.numpy()
    assert loss.item() == pytest.approx(truth.loss(x, y, chosen, options), rel=3e-6)
    # One rounding of the float32 gradient to the logits' type.
    want = torch.from_numpy(truth.loss_gradient(x, y, chosen, options).astype(np.float32))
    bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    torch.testing.assert_close(half.grad.float(), want, rtol=2.0**-bits, atol=1e-7)


# Ratio 1 and eval mode: the dense loss


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_ratio_one_is_the_dense_loss(selection, scope, capacity, ignored):
    for seed in range(5):
        logits, targets = batch(4, 37, 91, seed=seed, ignored=ignored)
        dense_logits = logits.detach().clone().requires_grad_()
        dense = F.cross_entropy(dense_logits.reshape(-1, 91), targets.reshape(-1))
        dense.backward()
        criterion = CGGRLoss(
            selection=selection, scope=scope, capacity=capacity, min_tokens_ratio=1.0
        )
        loss = criterion(logits, targets)
        loss.backward()
        assert torch.equal(logits.grad, dense_logits.grad)
        assert torch.equal(loss, dense)


def test_the_first_step_of_the_warm_up_is_dense():
    logits, targets = batch()
    loss = CGGRLoss(selection="stratified", min_tokens_ratio=0.1, warmup_steps=7)(logits, targets)
    dense = F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1))
    torch.testing.assert_close(loss, dense, rtol=1e-6, atol=0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_eval_mode_is_the_dense_loss(selection):
    logits, targets = batch()
    criterion = CGGRLoss(selection=selection, warmup_steps=0).eval()
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    loss = criterion(logits, targets)
    dense = F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1))
    assert torch.equal(loss, dense)
    assert criterion.metrics == {}
    after = criterion.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # no draw is spent


def test_eval_mode_honours_reduction_and_num_items():
    logits, targets = batch()
    dense = F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1), reduction="sum")
    assert torch.equal(CGGRLoss(reduction="sum").eval()(logits, targets), dense)
    loss = CGGRLoss().eval()(logits, targets, num_items_in_batch=1000)
    assert loss.item() == pytest.approx(dense.item() / 1000, rel=1e-6)


# Gradient checks: the selection must not move with the perturbed logits


def constant_scores(statistics):
    scores = torch.arange(statistics.entropy.numel(), dtype=statistics.entropy.dtype)
    return scores.remainder(5).reshape(statistics.entropy.shape)


@pytest.mark.float64
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("base_loss", [None, "smoothed"])
def test_gradcheck(selection, scope, base_loss):
    if base_loss is not None:
        base_loss = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    criterion = CGGRLoss(
        scoring=constant_scores,
        selection=selection,
        scope=scope,
        warmup_steps=0,
        min_tokens_ratio=0.4,
        dynamic_threshold=False,
        base_loss=base_loss,
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 1, -100, 3, 2], [1, 1, 0, -100, 3]])

    def loss(x):
        criterion.draw_count.zero_()
        return criterion(x, targets)

    assert loss(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


# Edges


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_all_labels_ignored(selection, scope, capacity):
    logits, _ = batch()
    targets = torch.full((4, 19), -100)
    criterion = CGGRLoss(selection=selection, scope=scope, capacity=capacity, warmup_steps=0)
    loss = criterion(logits, targets)
    assert loss.item() == 0.0
    assert loss.requires_grad
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    metrics = criterion.get_metrics()
    assert metrics["tokens_selected"] == 0
    assert metrics["tokens_total"] == 0
    assert metrics["avg_difficulty"] == 0.0
    logits.grad = None
    criterion.eval()(logits, targets).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("capacity", ["exact", "static"])
def test_garbage_at_ignored_tokens_does_not_reach_the_gradient(capacity):
    logits, targets = batch(2, 6, ignored=0)
    targets[1] = -100
    for fault in (math.nan, math.inf):
        for labels in (targets, torch.full_like(targets, -100)):
            x = logits.detach().clone()
            x[1] = fault
            x.requires_grad_()
            criterion = CGGRLoss(capacity=capacity, warmup_steps=0, dynamic_threshold=False)
            loss = criterion(x, labels)
            loss.backward()
            assert loss.isfinite()
            assert torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))
            assert x.grad.isfinite().all()


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (1, 7), (5, 1)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_token_one_sequence(selection, shape, capacity):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, CLASSES, generator=generator, requires_grad=True)
    targets = torch.randint(0, CLASSES, shape, generator=generator)
    options = {"selection": selection, "warmup_steps": 0, "dynamic_threshold": True}
    loss = CGGRLoss(**options, capacity=capacity)(logits, targets)
    loss.backward()
    chosen, _, _ = true_selection(logits, targets, options)
    two_dimensional = (1, 1) if shape == (1,) else shape
    x = array(logits).reshape(*two_dimensional, CLASSES)
    y = targets.numpy().reshape(two_dimensional)
    assert loss.item() == pytest.approx(truth.loss(x, y, chosen, options), rel=3e-6)
    np.testing.assert_allclose(
        array(logits.grad).reshape(x.shape), truth.loss_gradient(x, y, chosen, options), **GRADIENT
    )


@pytest.mark.parametrize("capacity", ["exact", "static"])
def test_k_larger_than_eligible(capacity):
    # 6 tokens per sequence are asked for, but only one of the first sequence is eligible.
    logits, targets = batch(3, 8, ignored=0)
    targets[0, 1:] = -100
    criterion = CGGRLoss(
        selection="sequence_aware",
        min_tokens_per_sequence=6,
        min_tokens_ratio=0.1,
        warmup_steps=0,
        capacity=capacity,
    )
    loss = criterion(logits, targets)
    loss.backward()
    assert (logits.grad != 0).any(dim=-1).sum(dim=1).tolist() == [1, 6, 6]
    assert criterion.metrics["tokens_selected"] == 13
    # And with one eligible token in all, a ratio of 0.9 gives that one.
    targets[:] = -100
    targets[2, 3] = 4
    logits.grad = None
    criterion = CGGRLoss(min_tokens_ratio=0.9, warmup_steps=0, capacity=capacity)
    loss = criterion(logits, targets)
    loss.backward()
    assert torch.equal(loss, F.cross_entropy(logits[2, 3][None], targets[2, 3][None]))
    assert (logits.grad != 0).any(dim=-1).nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("selection", ["topk", "fixed_quota", "sequence_aware", "importance"])
def test_nan_logits_are_selected_and_make_the_loss_nan(selection, capacity):
    logits, targets = batch(ignored=0)
    x = logits.detach().clone()
    x[2, 7] = math.nan
    x.requires_grad_()
    criterion = CGGRLoss(
        selection=selection, min_tokens_ratio=0.02, warmup_steps=0, capacity=capacity
    )
    loss = criterion(x, targets)
    assert loss.isnan()
    loss.backward()
    assert x.grad[2, 7].isnan().all()
    finite = torch.ones(4, 19, dtype=torch.bool)
    finite[2, 7] = False
    assert x.grad[finite].isfinite().all()


def test_a_label_out_of_range_is_named():
    logits, targets = batch()
    targets[1, 4] = CLASSES
    message = (
        f"targets must be in [0, {CLASSES}) or ignore_index=-100, got {CLASSES} at position (1, 4)."
    )
    for criterion in (CGGRLoss(), CGGRLoss().eval()):
        with pytest.raises(ValueError, match=exactly(message)):
            criterion(logits, targets)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (
            torch.zeros(5),
            torch.tensor(0),
            ValueError,
            "logits must have shape (B, S, V) or (N, V), got (5,).",
        ),
        (
            torch.zeros(2, 2, 2, 5),
            torch.zeros(2, 2, 2, dtype=torch.int64),
            ValueError,
            "logits must have shape (B, S, V) or (N, V), got (2, 2, 2, 5).",
        ),
        (
            torch.zeros(2, 5, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int64),
            TypeError,
            "logits must be floating, got torch.int32.",
        ),
        (
            torch.zeros(2, 3, 5),
            torch.zeros(6, dtype=torch.int64),
            ValueError,
            "targets must have the logits' leading shape (2, 3), got (6,).",
        ),
        (
            torch.zeros(2, 3, 5),
            torch.zeros(2, 3),
            TypeError,
            "targets must be integers, got torch.float32.",
        ),
    ],
)
def test_wrong_ranks_and_dtypes(logits, targets, error, message):
    with pytest.raises(error, match=exactly(message)):
        CGGRLoss()(logits, targets)


@pytest.mark.parametrize("scoring", ["excess_loss"])
def test_a_missing_reference_is_named(scoring):
    logits, targets = batch()
    criterion = CGGRLoss(scoring=scoring)
    with pytest.raises(
        ValueError, match=exactly("scoring='excess_loss' needs reference_nll, got none.")
    ):
        criterion(logits, targets)
    with pytest.raises(
        ValueError, match=exactly("reference_nll must have shape (4, 19), got (76,).")
    ):
        criterion(logits, targets, reference_nll=torch.zeros(76))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types_of_targets_agree(dtype):
    logits, targets = batch()
    want = CGGRLoss(warmup_steps=0)(logits, targets)
    assert torch.equal(CGGRLoss(warmup_steps=0)(logits, targets.to(dtype)), want)


def test_another_ignore_index():
    logits, targets = batch(ignored=0.3)
    other = targets.masked_fill(targets == -100, CLASSES + 5)
    options = {"selection": "stratified", "warmup_steps": 0}
    want = CGGRLoss(**options)(logits, targets)
    assert torch.equal(CGGRLoss(**options, ignore_index=CLASSES + 5)(logits, other), want)
    # An ignore_index that is also a class: padding id 0, never trained on.
    padded = targets.clamp(min=0)
    criterion = CGGRLoss(**options, ignore_index=0, min_tokens_ratio=1.0, capacity="static")
    loss = criterion(logits, padded)
    want = F.cross_entropy(logits.reshape(-1, CLASSES), padded.reshape(-1), ignore_index=0)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)


# base_loss


@pytest.mark.parametrize("selection", ["stratified", "importance"])
def test_base_loss_replaces_cross_entropy(selection):
    options = {"selection": selection, "warmup_steps": 0}
    logits, targets = batch()
    smoothed = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    loss = CGGRLoss(**options, base_loss=smoothed)(logits, targets)
    chosen, statistics, _ = true_selection(logits, targets, options)
    log_p = np.log(np.exp(array(logits)) / np.exp(array(logits)).sum(-1, keepdims=True))
    per_token = 0.9 * statistics["nll"] - 0.1 * log_p.mean(axis=-1)
    weights = truth.token_weights(chosen)
    n = (targets != -100).sum().item() if selection == "importance" else chosen.mask.sum()
    assert loss.item() == pytest.approx((weights * per_token)[chosen.mask].sum() / n, rel=5e-6)
    logits.grad = None
    loss.backward()
    assert np.array_equal(selected_mask(logits.grad), chosen.mask)


def test_base_loss_over_all_tokens():
    logits, targets = batch()
    smoothed = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    dense = F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1), label_smoothing=0.1)
    for criterion in (
        CGGRLoss(min_tokens_ratio=1.0, base_loss=smoothed),
        CGGRLoss(min_tokens_ratio=1.0, base_loss=smoothed, selection="importance"),
        CGGRLoss(base_loss=smoothed).eval(),
    ):
        torch.testing.assert_close(criterion(logits, targets), dense, rtol=1e-6, atol=0)


def test_base_loss_that_reduces_is_an_error():
    logits, targets = batch(2, 3, ignored=0)
    criterion = CGGRLoss(min_tokens_ratio=1.0, base_loss=nn.CrossEntropyLoss())
    message = "base_loss must return one loss per token, shape (6,), got (); use reduction='none'."
    with pytest.raises(ValueError, match=exactly(message)):
        criterion(logits, targets)


# Capacity


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_static_capacity_equals_exact_capacity_over_the_warm_up(selection, scope):
    options = {
        "selection": selection,
        "scope": scope,
        "min_tokens_ratio": 0.2,
        "warmup_steps": 6,
        "dynamic_threshold": True,
        "min_tokens_per_sequence": 3,
    }
    exact, static = CGGRLoss(**options), CGGRLoss(**options, capacity="static")
    ratios = set()
    for step in range(9):
        logits, targets = batch(seed=step)
        other = logits.detach().clone().requires_grad_()
        exact_loss, static_loss = exact(logits, targets), static(other, targets)
        exact_loss.backward()
        static_loss.backward()
        torch.testing.assert_close(static_loss, exact_loss, rtol=1e-6, atol=0)
        assert torch.equal(other.grad, logits.grad)
        assert static.metrics == exact.metrics
        ratios.add(exact.metrics["token_ratio"])
        exact.step()
        static.step()
    assert len(ratios) > 5  # the schedule moved


def test_static_capacity_takes_at_most_four_sizes_and_follows_the_truth():
    options = {"selection": "stratified", "warmup_steps": 40, "dynamic_threshold": True}
    criterion = CGGRLoss(**options, capacity="static")
    sizes = []
    for step in range(60):
        sizes.append(criterion.slots(4, 19))
        assert sizes[-1] == truth.capacity(options, step, 4, 19)
        criterion.step()
    assert sizes == sorted(sizes, reverse=True)
    assert 1 < len(set(sizes)) <= 4
    criterion.load_state_dict(CGGRLoss(**options).state_dict())
    assert criterion.slots(4, 19) == sizes[0]  # the host's mirror follows a restored step


# Schedule, draws, state


@pytest.mark.parametrize("selection", ["topk", "fixed_quota"])
def test_step_lowers_the_ratio_as_the_schedule_says(selection):
    options = {
        "selection": selection,
        "warmup_steps": 12,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.2,
    }
    criterion = CGGRLoss(**options)
    for step in range(15):
        logits, targets = batch(seed=step)
        criterion(logits, targets)
        chosen, _, _ = true_selection(logits, targets, options, step=step)
        metrics = criterion.get_metrics()
        assert metrics["step"] == step
        assert metrics["token_ratio"] == chosen.ratio / truth.ONE
        assert metrics["tokens_selected"] == chosen.count
        criterion.step()
    assert chosen.ratio < 0.4 * truth.ONE


@pytest.mark.parametrize("selection", ["stratified", "importance", "random"])
def test_forwards_draw_anew_and_ranks_of_seeds_differ(selection):
    logits, targets = batch()

    def mask_of(criterion):
        logits.grad = None
        criterion(logits, targets).backward()
        return selected_mask(logits.grad)

    criterion = CGGRLoss(selection=selection, warmup_steps=0)
    masks = [mask_of(criterion) for _ in range(3)]
    assert not np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[1], masks[2])
    again = CGGRLoss(selection=selection, warmup_steps=0)
    assert np.array_equal(mask_of(again), masks[0])
    other = CGGRLoss(selection=selection, warmup_steps=0, seed=1)
    assert not np.array_equal(mask_of(other), masks[0])


@pytest.mark.parametrize("capacity", ["exact", "static"])
def test_a_resumed_run_repeats_its_masks(capacity):
    fields = {"selection": "importance", "warmup_steps": 10, "dynamic_threshold": True}
    options = fields | {"capacity": capacity}

    def run(criterion, steps):
        losses, gradients = [], []
        for step in steps:
            for micro_batch in range(2):
                logits, targets = batch(seed=2 * step + micro_batch)
                loss = criterion(logits, targets)
                loss.backward()
                losses.append(loss.item())
                gradients.append(logits.grad)
            criterion.step()
        return losses, gradients

    criterion = CGGRLoss(**options)
    run(criterion, range(5))
    saved = {name: value.clone() for name, value in criterion.state_dict().items()}
    assert saved == {"step_count": torch.tensor(5), "draw_count": torch.tensor(10)}
    losses, gradients = run(criterion, range(5, 11))
    resumed = CGGRLoss(**options)
    resumed.load_state_dict(saved)
    assert resumed.slots(4, 19) == (
        None if capacity == "exact" else truth.capacity(fields, 5, 4, 19)
    )
    resumed_losses, resumed_gradients = run(resumed, range(5, 11))
    assert resumed_losses == losses
    assert all(map(torch.equal, resumed_gradients, gradients))
    assert resumed.metrics == criterion.metrics


def test_the_state_is_two_integer_counters():
    criterion = CGGRLoss()
    logits, targets = batch()
    criterion(logits, targets)
    criterion(logits, targets)
    criterion.step()
    state = criterion.state_dict()
    assert list(state) == ["step_count", "draw_count"]
    assert state["step_count"].item() == 1
    assert state["draw_count"].item() == 2
    assert {value.dtype for value in criterion.half().state_dict().values()} == {torch.int32}
    assert list(criterion.parameters()) == []


# Metrics


@pytest.mark.parametrize("selection", SELECTIONS)
def test_metrics(selection):
    options = {
        "selection": selection,
        "scoring": "combined",
        "warmup_steps": 50,
        "dynamic_threshold": True,
    }
    logits, targets = batch()
    criterion = CGGRLoss(**options)
    assert criterion.get_metrics() == {}
    assert criterion.metrics == {}
    set_counters(criterion, step=40, draw=0)
    criterion(logits, targets)
    chosen, statistics, difficulty = true_selection(logits, targets, options, step=40)
    eligible = targets.numpy() != -100
    metrics = criterion.get_metrics()
    assert metrics == criterion.metrics
    assert metrics == {
        "step": 40,
        "token_ratio": chosen.ratio / truth.ONE,
        "tokens_selected": int(chosen.mask.sum()),
        "tokens_total": int(eligible.sum()),
        "avg_confidence": pytest.approx(statistics["confidence"][eligible].mean(), rel=1e-5),
        "avg_entropy": pytest.approx(statistics["entropy"][eligible].mean(), rel=1e-5),
        "avg_difficulty": pytest.approx(difficulty[eligible].mean(), rel=1e-5),
        "selection": selection,
        "scoring": "combined",
    }


def test_metrics_are_those_of_the_last_forward_not_of_the_last_step():
    logits, targets = batch()
    criterion = CGGRLoss(warmup_steps=4)
    criterion(logits, targets)
    first = criterion.get_metrics()
    criterion.step()
    assert criterion.get_metrics() == first
    assert first["step"] == 0


# Options


def test_unknown_and_doubled_options():
    message = r"^unknown option 'min_token_ratio'; the options are dynamic_threshold, .*\.$"
    with pytest.raises(TypeError, match=message):
        CGGRLoss(min_token_ratio=0.5)
    message = "give either config or options as keywords, got config and scoring, seed."
    with pytest.raises(TypeError, match=exactly(message)):
        CGGRLoss(RoutingConfig(), scoring="loss", seed=1)
    message = "config must be a RoutingConfig, got {'seed': 1}; options are given by keyword."
    with pytest.raises(TypeError, match=exactly(message)):
        CGGRLoss(config={"seed": 1})
    with pytest.raises(ValueError, match=exactly("min_tokens_ratio must be in (0, 1], got 0.0.")):
        CGGRLoss(min_tokens_ratio=0.0)
    with pytest.raises(
        ValueError, match=exactly("capacity must be 'exact' or 'static', got 'dynamic'.")
    ):
        CGGRLoss(capacity="dynamic")
    with pytest.raises(ValueError, match=exactly("reduction must be 'mean' or 'sum', got 'none'.")):
        CGGRLoss(reduction="none")


def test_config_and_keywords_are_the_same_options():
    logits, targets = batch()
    config = RoutingConfig(selection="stratified", warmup_steps=0, seed=4)
    by_config, by_name = CGGRLoss(config), CGGRLoss(selection="stratified", warmup_steps=0, seed=4)
    assert by_config.config == by_name.config
    assert torch.equal(by_config(logits, targets), by_name(logits, targets))
    assert repr(by_name) == "CGGRLoss(selection='stratified', warmup_steps=0, seed=4)"


# Gradient accumulation


@pytest.mark.parametrize("selection", SELECTIONS)
def test_micro_batches_add_up_to_the_dense_loss_at_ratio_one(selection):
    logits, targets = batch(6, 19)
    targets[0, 4:] = -100  # micro-batches of different sizes
    dense = F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1))
    dense.backward()
    micro = logits.detach().clone().requires_grad_()
    items = (targets != -100).sum()
    criterion = CGGRLoss(selection=selection, min_tokens_ratio=1.0)
    total = 0.0
    for part, count in ((slice(0, 2), items), (slice(2, 6), items.item())):
        loss = criterion(micro[part], targets[part], num_items_in_batch=count)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(dense.item(), rel=2e-6)
    torch.testing.assert_close(micro.grad, logits.grad, rtol=2e-6, atol=1e-8)


def test_num_items_errors():
    logits, targets = batch()
    with pytest.raises(
        ValueError, match=exactly("num_items_in_batch needs reduction='mean', got reduction='sum'.")
    ):
        CGGRLoss(reduction="sum")(logits, targets, num_items_in_batch=5)
    with pytest.raises(ValueError, match=exactly("num_items_in_batch must be positive, got 0.")):
        CGGRLoss()(logits, targets, num_items_in_batch=0)


# Importance


@pytest.mark.parametrize("scope", SCOPES)
def test_importance_is_unbiased_in_loss_and_gradient(scope):
    logits, targets = batch(4, 16)
    dense_logits = logits.detach().clone().requires_grad_()
    dense = F.cross_entropy(dense_logits.reshape(-1, CLASSES), targets.reshape(-1))
    dense.backward()
    direction = dense_logits.grad
    criterion = CGGRLoss(
        selection="importance",
        scope=scope,
        warmup_steps=0,
        min_tokens_ratio=0.25,
        dynamic_threshold=False,
    )
    losses, projections = [], []
    for _ in range(300):
        logits.grad = None
        loss = criterion(logits, targets)
        loss.backward()
        losses.append(loss.item())
        projections.append((logits.grad * direction).sum().item())
    for samples, want in ((losses, dense.item()), (projections, direction.square().sum().item())):
        error = np.std(samples, ddof=1) / math.sqrt(len(samples))
        assert 0 < 4 * error < 0.1 * want  # sharp enough to see a bias of a tenth
        assert abs(np.mean(samples) - want) < 4 * error


@pytest.mark.parametrize("selection", ["importance", "topk"])
def test_an_optimizer_step_without_targets_is_zero_and_so_is_its_gradient(selection):
    logits = torch.ones(2, 3, 5, requires_grad=True)
    targets = torch.full((2, 3), -100)
    loss = CGGRLoss(selection=selection)(logits, targets, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("capacity", ["exact", "static"])
def test_slots_for_what_has_targets_alone(capacity):
    options = {"min_tokens_ratio": 1.0, "max_eligible_ratio": 0.25, "selection": "random"}
    criterion = CGGRLoss(capacity=capacity, warmup_steps=0, dynamic_threshold=False, **options)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 8, 11, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (4, 8), generator=generator)
    targets[:, :6] = -100
    loss = criterion(logits, targets)
    loss.backward()
    twin = logits.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(twin.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, twin.grad)
    targets[0, 5] = 3  # one more than was said
    if capacity == "exact":
        with pytest.raises(ValueError, match=r"got 0\.25, where 9 of 32 are;"):
            criterion(logits, targets)
    else:
        criterion(logits, targets)
        assert criterion.get_metrics()["tokens_selected"] == 8
        assert criterion.get_metrics()["tokens_total"] == 9
