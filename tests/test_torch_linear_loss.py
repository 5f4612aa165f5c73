import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import truth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cggr.torch import CGGRLinearLoss, CGGRLoss

CLASSES, WIDTH = 23, 8
SELECTIONS = truth.SELECTIONS
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"logit_scale": 0.4},
    "all": {"bias": True, "softcap": 2.0, "logit_scale": 1.7},
}


def exactly(message):
    return f"^{re.escape(message)}$"


def inputs(batch_size=3, length=13, bias=False, seed=0, ignored=0.2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch_size, length, WIDTH, generator=generator)
    weight = torch.randn(CLASSES, WIDTH, generator=generator)
    bias_V = torch.randn(CLASSES, generator=generator) if bias else None
    targets = torch.randint(0, CLASSES, (batch_size, length), generator=generator)
    drop = torch.rand(batch_size, length, generator=generator) < ignored
    leaves = [x if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, bias_V)]
    return *leaves, targets.masked_fill(drop, -100)


def copies(*leaves):
    return [None if x is None else x.detach().clone().requires_grad_() for x in leaves]


def head(hidden, weight, bias, logit_scale=1.0, softcap=None):
    """The logits that CGGRLinearLoss promises not to make."""
    logits = logit_scale * F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Trace(TorchDispatchMode):
    """Largest tensor made, and the rows of every matrix product."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.products.append((*left.shape, right.shape[1]))
        return out


# Against CGGRLoss on the same logits, whose value and gradient are tested against the truth


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rows_per_chunk", [4, 1000])
def test_equals_the_loss_of_the_logits(chunks_of, selection, head_name, scope, rows_per_chunk):
    chunks_of(rows_per_chunk, CLASSES)
    head_options = dict(HEADS[head_name])
    hidden, weight, bias, targets = inputs(bias=head_options.pop("bias", False))
    options = {
        "selection": selection,
        "scope": scope,
        "warmup_steps": 0,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.3,
    }
    other = copies(hidden, weight, bias)
    want = CGGRLoss(**options)(head(*other, **head_options), targets)
    want.backward()
    criterion = CGGRLinearLoss(**options, **head_options)
    loss = criterion(hidden, weight, targets, bias=bias)
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    for got, expected in zip((hidden, weight, bias), other, strict=True):
        if got is not None:
            # Relative to the largest gradient: single entries are differences of larger numbers.
            error = (got.grad - expected.grad).abs().max() / expected.grad.abs().max()
            assert error < 1e-6
            assert expected.grad.abs().max() > 1e-3
    unselected = (other[0].grad == 0).all(dim=-1)
    assert torch.equal((hidden.grad == 0).all(dim=-1), unselected)
    assert 0 < unselected.sum() < targets.numel()


@pytest.mark.parametrize("offset", [100.0, 10_000.0])
def test_a_common_offset_of_the_logits_costs_no_precision(offset):
    # exp(logits - logsumexp) would lose as many digits as the offset has.
    hidden, weight, _, targets = inputs()
    bias = torch.full((CLASSES,), offset)
    options = {"selection": "random", "warmup_steps": 0, "dynamic_threshold": False}
    other = copies(hidden, weight)
    CGGRLoss(**options)(head(*other, bias), targets).backward()
    CGGRLinearLoss(**options)(hidden, weight, targets, bias=bias).backward()
    for got, want in zip((hidden, weight), other, strict=True):
        assert (got.grad - want.grad).abs().max() < 1e-6 * want.grad.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("selection", ["topk", "importance"])
def test_value_against_the_equations(selection, reduction):
    hidden, weight, bias, targets = inputs(bias=True)
    options = {"selection": selection, "warmup_steps": 0}
    loss = CGGRLinearLoss(**options, reduction=reduction, softcap=3.0, logit_scale=0.5)(
        hidden, weight, targets, bias=bias
    )
    x, w, b = (value.detach().numpy().astype(np.float64) for value in (hidden, weight, bias))
    logits = 3.0 * np.tanh(0.5 * (x @ w.T + b) / 3.0)
    statistics = truth.statistics(logits, targets.numpy())
    chosen = truth.select(
        truth.difficulty(statistics, "combined"),
        options,
        eligible=targets.numpy() != -100,
        confidence=statistics["confidence"],
    )
    want = truth.loss(logits, targets.numpy(), chosen, options, reduction)
    assert loss.item() == pytest.approx(want, rel=3e-6)


def test_num_items_reference_and_flat_rows_as_in_cggr_loss():
    hidden, weight, _, targets = inputs()
    reference = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) * 5
    options = {"scoring": "excess_loss", "selection": "stratified", "warmup_steps": 0}
    want = CGGRLoss(**options)(
        head(hidden, weight, None), targets, reference_nll=reference, num_items_in_batch=90
    )
    got = CGGRLinearLoss(**options)(
        hidden, weight, targets, reference_nll=reference, num_items_in_batch=90
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    flat = CGGRLinearLoss(**options)(
        hidden.reshape(-1, WIDTH),
        weight,
        targets.reshape(-1),
        reference_nll=reference.reshape(-1),
        num_items_in_batch=90,
    )
    torch.testing.assert_close(flat, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_ratio_one_and_eval_mode_are_the_dense_loss(selection, ignored):
    for criterion in (
        CGGRLinearLoss(selection=selection, min_tokens_ratio=1.0),
        CGGRLinearLoss(selection=selection, warmup_steps=0).eval(),
    ):
        hidden, weight, bias, targets = inputs(bias=True, ignored=ignored)
        other = copies(hidden, weight, bias)
        logits = head(*other).reshape(-1, CLASSES)
        dense = F.cross_entropy(logits, targets.reshape(-1))
        dense.backward()
        loss = criterion(hidden, weight, targets, bias=bias)
        loss.backward()
        torch.testing.assert_close(loss, dense, rtol=1e-6, atol=0)
        for got, want in zip((hidden, weight, bias), other, strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-8)


def test_eval_mode_spends_no_draw_and_leaves_no_metrics():
    hidden, weight, _, targets = inputs()
    criterion = CGGRLinearLoss().eval()
    criterion(hidden, weight, targets)
    assert criterion.draw_count.item() == 0
    assert criterion.metrics == {}


def test_metrics_and_masks_are_those_of_cggr_loss():
    hidden, weight, _, targets = inputs()
    options = {"selection": "importance", "warmup_steps": 5}
    direct, linear = CGGRLoss(**options), CGGRLinearLoss(**options)
    for _ in range(7):
        hidden.grad = None
        linear(hidden, weight, targets).backward()
        (other,) = copies(hidden)
        direct(head(other, weight.detach(), None), targets).backward()
        assert torch.equal(hidden.grad != 0, other.grad != 0)
        want = direct.metrics
        for name in ("avg_confidence", "avg_entropy", "avg_difficulty"):
            want[name] = pytest.approx(want[name], rel=1e-5)
        assert linear.metrics == want
        direct.step()
        linear.step()


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_static_capacity_equals_exact_capacity_over_the_warm_up(selection, scope):
    options = {
        "selection": selection,
        "scope": scope,
        "warmup_steps": 5,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.2,
    }
    exact, static = CGGRLinearLoss(**options), CGGRLinearLoss(**options, capacity="static")
    for step in range(7):
        hidden, weight, bias, targets = inputs(bias=True, seed=step)
        other = copies(hidden, weight, bias)
        want = exact(hidden, weight, targets, bias=bias)
        want.backward()
        loss = static(*other[:2], targets, bias=other[2])
        loss.backward()
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        for got, expected in zip(other, (hidden, weight, bias), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-7)
        assert static.metrics == exact.metrics
        exact.step()
        static.step()


# Gradient checks


def constant_scores(statistics):
    scores = torch.arange(statistics.entropy.numel(), dtype=statistics.entropy.dtype)
    return scores.remainder(5).reshape(statistics.entropy.shape)


@pytest.mark.float64
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("selection", ["stratified", "importance"])
@pytest.mark.parametrize("needed", range(1, 8))
def test_gradcheck_of_every_subset_of_inputs(chunks_of, needed, selection, softcap):
    chunks_of(2, 5)
    criterion = CGGRLinearLoss(
        scoring=constant_scores,
        selection=selection,
        warmup_steps=0,
        min_tokens_ratio=0.5,
        dynamic_threshold=False,
        logit_scale=1.3,
        softcap=softcap,
    )
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 5, 3), (5, 3), (5,))
    ]
    for position, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(needed >> position & 1))
    targets = torch.tensor([[0, 1, -100, 3, 2], [1, 4, 0, -100, 3]])

    def loss(hidden, weight, bias):
        criterion.draw_count.zero_()
        return criterion(hidden, weight, targets, bias=bias)

    assert torch.autograd.gradcheck(loss, leaves)
    loss(*leaves).backward()
    assert [leaf.grad is not None for leaf in leaves] == [leaf.requires_grad for leaf in leaves]


def test_a_second_derivative_is_refused_not_wrong():
    hidden, weight, _, targets = inputs()
    loss = CGGRLinearLoss()(hidden, weight, targets).square()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, hidden, create_graph=True)


# What is not computed


def test_no_tensor_is_as_large_as_the_logits(chunks_of):
    batch_size, length, classes = 4, 50, 500
    chunks_of(10, classes)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch_size, length, 4, generator=generator, requires_grad=True)
    weight = torch.randn(classes, 4, generator=generator, requires_grad=True)
    targets = torch.randint(0, classes, (batch_size, length), generator=generator)
    for criterion in (
        CGGRLinearLoss(selection="stratified", warmup_steps=0),
        CGGRLinearLoss(min_tokens_ratio=1.0, capacity="static"),
        CGGRLinearLoss().eval(),
    ):
        with Trace() as trace:
            criterion(hidden, weight, targets).backward()
        assert trace.largest <= 10 * classes < batch_size * length * classes
    with Trace() as trace:
        CGGRLoss()(head(hidden, weight, None), targets)
    assert trace.largest >= batch_size * length * classes  # the trace does see logits


def test_only_selected_rows_enter_the_backward_of_the_head():
    hidden, weight, _, targets = inputs(4, 25, ignored=0)
    criterion = CGGRLinearLoss(warmup_steps=0, dynamic_threshold=False, min_tokens_ratio=0.1)
    with Trace() as trace:
        criterion(hidden, weight, targets).backward()
    assert criterion.metrics["tokens_selected"] == 10
    assert sorted(trace.products) == sorted(
        [
            (100, WIDTH, CLASSES),  # all rows are scored
            (10, WIDTH, CLASSES),  # logits of the selected rows, forward
            (10, WIDTH, CLASSES),  # and again, backward
            (10, CLASSES, WIDTH),  # gradient of their hidden states
            (CLASSES, 10, WIDTH),  # gradient of the weight
        ]
    )


def test_gradients_nobody_asks_for_are_not_computed():
    hidden, weight, _, targets = inputs(4, 25, ignored=0)
    criterion = CGGRLinearLoss(warmup_steps=0, dynamic_threshold=False, min_tokens_ratio=0.1)
    with Trace() as trace:
        criterion(hidden.detach(), weight, targets).backward()
    assert (10, CLASSES, WIDTH) not in trace.products
    assert (CLASSES, 10, WIDTH) in trace.products
    with torch.no_grad(), Trace() as trace:
        loss = criterion(hidden, weight, targets)
    assert not loss.requires_grad
    assert len(trace.products) == 2


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    hidden, weight, bias, targets = inputs(bias=True, dtype=dtype)
    options = {"selection": "stratified", "warmup_steps": 0}
    loss = CGGRLinearLoss(**options)(hidden, weight, targets, bias=bias)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {x.grad.dtype for x in (hidden, weight, bias)} == {dtype}
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    # The same selection; the loss then differs by the rounding of the logits only.
    want = CGGRLinearLoss(**options)(*exact[:2], targets, bias=exact[2])
    want.backward()
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert loss.item() == pytest.approx(want.item(), rel=2 * unit)
    for got, expected in zip((hidden, weight, bias), exact, strict=True):
        error = (got.grad.float() - expected.grad).abs().max() / expected.grad.abs().max()
        assert error < 8 * unit


def test_a_loss_scale_beyond_float16_does_not_overflow_the_gradient():
    # GradScaler starts at 65536, above the largest float16, 65504.
    hidden, weight, _, _ = inputs(1, 1, dtype=torch.float16)
    hidden, weight = (0.1 * x.detach() for x in (hidden, weight))
    targets = torch.tensor([[3]])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = CGGRLinearLoss(reduction="sum", min_tokens_ratio=1.0)(*leaves, targets)
    (loss * 65536).backward()
    other = copies(*leaves)
    (F.cross_entropy(head(*other, None)[0].float(), targets[0], reduction="sum") * 65536).backward()
    for got, want in zip(leaves, other, strict=True):
        assert want.grad.isfinite().all()
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-2, atol=30.0)


def test_the_incoming_gradient_is_not_rounded_to_bfloat16():
    # 1/3 in bfloat16 is off by 2e-3: the same factor in every entry, so it does not average out.
    hidden, weight, _, targets = inputs(1, 3, ignored=0, dtype=torch.bfloat16)
    once, thrice = copies(hidden, hidden)
    criterion = CGGRLinearLoss(min_tokens_ratio=1.0, reduction="sum")
    criterion(once, weight, targets).backward()
    (criterion(thrice, weight, targets) / 3).backward()
    ratio = (thrice.grad.float().abs().sum() / once.grad.float().abs().sum()).item()
    assert ratio == pytest.approx(1 / 3, rel=5e-4)


def test_autocast_computes_the_head_in_bfloat16():
    hidden, weight, bias, targets = inputs(bias=True)
    options = {"selection": "stratified", "warmup_steps": 0}
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    want = CGGRLinearLoss(**options)(*rounded[:2], targets, bias=rounded[2])
    want.backward()
    criterion = CGGRLinearLoss(**options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(hidden, weight, targets, bias=bias)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want)
    for got, expected in zip((hidden, weight, bias), rounded, strict=True):
        assert got.grad.dtype == torch.float32
        assert torch.equal(got.grad, expected.grad.float())


# Edges


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_all_labels_ignored(selection, scope, capacity):
    hidden, weight, bias, targets = inputs(bias=True)
    criterion = CGGRLinearLoss(selection=selection, scope=scope, capacity=capacity)
    loss = criterion(hidden, weight, torch.full_like(targets, -100), bias=bias)
    assert loss.item() == 0.0
    loss.backward()
    for leaf in (hidden, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert criterion.metrics["tokens_selected"] == 0


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("ratio", [0.25, 1.0])  # at 1 no row is moved
@pytest.mark.parametrize("capacity", ["exact", "static"])
def test_garbage_at_ignored_tokens_does_not_reach_the_weights(capacity, ratio, fault):
    hidden, weight, _, targets = inputs(2, 6, ignored=0)
    targets[1] = -100
    for labels in (targets, torch.full_like(targets, -100)):
        x = hidden.detach().clone()
        x[1] = fault
        x.requires_grad_()
        weight.grad = None
        options = {"min_tokens_ratio": ratio, "warmup_steps": 0, "dynamic_threshold": False}
        criterion = CGGRLinearLoss(capacity=capacity, **options)
        loss = criterion(x, weight, labels)
        loss.backward()
        assert loss.isfinite()
        assert weight.grad.isfinite().all()
        assert torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))


def test_one_token():
    hidden, weight, bias, _ = inputs(1, 1, bias=True)
    targets = torch.tensor([[5]])
    loss = CGGRLinearLoss(warmup_steps=0)(hidden, weight, targets, bias=bias)
    want = F.cross_entropy(head(hidden, weight, bias)[0], targets[0])
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)


def test_nan_in_a_hidden_state_is_selected_and_loud():
    hidden, weight, _, targets = inputs(ignored=0)
    x = hidden.detach().clone()
    x[1, 4, 2] = math.nan
    x.requires_grad_()
    loss = CGGRLinearLoss(min_tokens_ratio=0.02, warmup_steps=0)(x, weight, targets)
    assert loss.isnan()
    loss.backward()
    assert x.grad[1, 4].isnan().all()


def test_a_tied_embedding_gets_both_gradients():
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Embedding(CLASSES, WIDTH)
    nn.init.normal_(embedding.weight, generator=generator)
    ids = torch.randint(0, CLASSES, (2, 7), generator=generator)
    options = {"selection": "stratified", "warmup_steps": 0}
    CGGRLoss(**options)(head(embedding(ids), embedding.weight, None), ids).backward()
    want = embedding.weight.grad
    embedding.weight.grad = None
    CGGRLinearLoss(**options)(embedding(ids), embedding.weight, ids).backward()
    assert (embedding.weight.grad - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"hidden": torch.zeros(4)},
            ValueError,
            "hidden must have shape (B, S, D) or (N, D), got (4,).",
        ),
        (
            {"hidden": torch.zeros(1, 2, 3, 4)},
            ValueError,
            "hidden must have shape (B, S, D) or (N, D), got (1, 2, 3, 4).",
        ),
        (
            {"weight": torch.zeros(5, 3)},
            ValueError,
            "hidden must have shape (..., D) and weight (V, D), got (2, 3, 4) and (5, 3).",
        ),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape (5,), got (4,)."),
        (
            {"hidden": torch.zeros(2, 3, 4, dtype=torch.int64)},
            TypeError,
            "hidden must be floating, got torch.int64.",
        ),
        (
            {"targets": torch.zeros(6, dtype=torch.int64)},
            ValueError,
            "targets must have the logits' leading shape (2, 3), got (6,).",
        ),
        (
            {"targets": torch.zeros(2, 3)},
            TypeError,
            "targets must be integers, got torch.float32.",
        ),
        (
            {"targets": torch.full((2, 3), 5)},
            ValueError,
            "targets must be in [0, 5) or ignore_index=-100, got 5 at position (0, 0).",
        ),
    ],
)
def test_wrong_ranks_and_dtypes(arguments, error, message):
    arguments = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.zeros(2, 3, dtype=torch.int64),
    } | arguments
    with pytest.raises(error, match=exactly(message)):
        CGGRLinearLoss()(**arguments)


@pytest.mark.parametrize("softcap", [0.0, -1.0, math.inf, math.nan])
def test_a_softcap_that_is_none(softcap):
    with pytest.raises(
        ValueError, match=exactly(f"softcap must be positive and finite or None, got {softcap}.")
    ):
        CGGRLinearLoss(softcap=softcap)(
            torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
        )
