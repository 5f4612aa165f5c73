"""What only a CUDA device can show: no synchronisation, no fault, the same selections."""

import contextlib
import functools
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import truth
from models import build, token_ids
from torch import nn

from cggr.bench.timing import captured
from cggr.spec import RoutingConfig
from cggr.torch import (
    CGGRLinearLoss,
    CGGRLoss,
    CGGRModel,
    create_truncated_router,
    select_tokens,
    token_statistics,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

RULES = ("topk", "stratified", "sequence_aware", "importance", "random")


@contextlib.contextmanager
def no_synchronisation():
    """Any wait of the host for the device is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("rule", RULES)
def test_selections_are_those_of_the_truth(rule, scope, compiled):
    options = {"selection": rule, "scope": scope, "warmup_steps": 0}
    config, shape = RoutingConfig(**options), (8, 513)
    capacity = config.capacity(0, *shape)

    def run(difficulty, eligible, confidence, draw):
        return select_tokens(
            difficulty,
            config,
            draw=draw,
            eligible=eligible,
            confidence=confidence,
            capacity=capacity,
        )

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, dynamic=False)
    rng = np.random.default_rng(0)
    for draw in range(20):
        difficulty = np.round(rng.normal(0, 2, shape), rng.integers(0, 7)).astype(np.float32)
        difficulty[rng.random(shape) < 0.01] = np.nan
        eligible, confidence = rng.random(shape) < 0.8, rng.random(shape).astype(np.float32)
        expected = truth.select(
            difficulty, options, draw=draw, eligible=eligible, confidence=confidence
        )
        arrays = (torch.from_numpy(x).cuda() for x in (difficulty, eligible, confidence))
        result = run(*arrays, torch.tensor([draw], dtype=torch.int32, device="cuda"))
        np.testing.assert_array_equal(result.mask.cpu().numpy(), expected.mask)
        weights = result.weights.cpu().numpy()[..., : expected.weights.shape[-1]]
        # A compiler may divide with one ulp of error; what is selected may not depend on it.
        np.testing.assert_allclose(weights, expected.weights, rtol=3e-7 if compiled else 0)


def test_statistics_are_those_of_the_truth():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (64, 5000)).astype(np.float32)
    targets = rng.integers(0, 5000, 64)
    expected = truth.statistics(logits, targets)
    result = token_statistics(torch.from_numpy(logits).cuda(), torch.from_numpy(targets).cuda())
    for name in result._fields:
        value = getattr(result, name).cpu().numpy()
        np.testing.assert_allclose(value, expected[name], rtol=5e-6, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_a_static_loss_never_synchronises(rule):
    logits = torch.randn(4, 64, 100, device="cuda", requires_grad=True)
    hidden = torch.randn(4, 64, 16, device="cuda", requires_grad=True)
    weight = torch.randn(100, 16, device="cuda", requires_grad=True)
    targets = torch.zeros(4, 64, dtype=torch.long, device="cuda")
    options = {
        "selection": rule,
        "warmup_steps": 3,
        "dynamic_threshold": True,
        "capacity": "static",
    }
    criterion, linear = CGGRLoss(**options).cuda(), CGGRLinearLoss(**options).cuda()
    with no_synchronisation():
        for _ in range(5):
            criterion(logits, targets).backward()
            linear(hidden, weight, targets).backward()
            criterion.step()
            linear.step()


@pytest.mark.parametrize("rule", RULES)
def test_a_static_model_never_synchronises(rule):
    # Not one of transformers: those look at their position ids on the host.
    model = nn.Sequential(nn.Embedding(60, 16), nn.Linear(16, 60))
    options = {
        "selection": rule,
        "warmup_steps": 3,
        "dynamic_threshold": True,
        "capacity": "static",
    }
    cggr_model = CGGRModel(model, **options).cuda()
    ids = torch.randint(0, 60, (8, 32), device="cuda")
    with no_synchronisation():
        for _ in range(5):
            cggr_model(ids, labels=ids).backward()
            cggr_model.step()


def test_the_check_above_can_fail():
    criterion = CGGRLoss(capacity="exact", min_tokens_ratio=0.5, warmup_steps=0).cuda()
    logits = torch.randn(4, 64, 100, device="cuda")
    targets = torch.zeros(4, 64, dtype=torch.long, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation():
        criterion(logits, targets)


def test_nothing_but_the_data_need_be_moved_to_the_device():
    logits = torch.randn(4, 8, 10, device="cuda", requires_grad=True)
    ids = torch.randint(0, 10, (4, 8), device="cuda")
    criterion, model = CGGRLoss(warmup_steps=2), nn.Embedding(10, 10).cuda()
    cggr_model = CGGRModel(model, warmup_steps=2)
    for _ in range(3):
        criterion(logits, ids).backward()
        criterion.step()
        cggr_model(ids, labels=ids).backward()
        cggr_model.step()
    assert criterion.get_metrics()["step"] == cggr_model.get_metrics()["step"] == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_model_trains_on_the_device(architecture):
    model = build(architecture).cuda()
    cggr_model = CGGRModel(
        model,
        create_truncated_router(model, 1),
        selection="importance",
        warmup_steps=2,
        capacity="static",
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = token_ids(batch=8).cuda()
    cggr_model.eval()
    before = cggr_model(ids, labels=ids).item()
    cggr_model.train()
    for _ in range(30):
        cggr_model(ids, labels=ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        cggr_model.step()
    cggr_model.eval()
    assert cggr_model(ids, labels=ids).item() < before - 1


@pytest.mark.parametrize("wrong", [-1, 100, 2**40])
def test_a_label_out_of_range_makes_the_loss_nan_and_reads_nothing(wrong):
    hidden, weight = torch.randn(4, 64, 16, device="cuda"), torch.randn(100, 16, device="cuda")
    targets = torch.zeros(4, 64, dtype=torch.long, device="cuda")
    targets[1, 3] = wrong
    for capacity in ("exact", "static"):
        options = {"min_tokens_ratio": 0.5, "warmup_steps": 0, "capacity": capacity}
        # A NaN score ranks first, so the faulty token is selected.
        assert CGGRLoss(**options).cuda()(hidden @ weight.T, targets).isnan()
        assert CGGRLinearLoss(**options).cuda()(hidden, weight, targets).isnan()
    torch.cuda.synchronize()


@pytest.mark.parametrize("rule", RULES)
def test_a_captured_loss_replays_with_new_inputs(rule):
    options = {"selection": rule, "warmup_steps": 0, "capacity": "static"}
    logits = torch.randn(4, 64, 100, device="cuda", requires_grad=True)
    targets = torch.zeros(4, 64, dtype=torch.long, device="cuda")
    criterion = CGGRLoss(**options).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            criterion(logits, targets).backward()
    torch.cuda.synchronize()
    logits.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(logits, targets)
        loss.backward()
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            logits.normal_(generator=generator)
        eager = CGGRLoss(**options).cuda()
        eager.draw_count.copy_(criterion.draw_count)
        graph.replay()
        copy = logits.detach().clone().requires_grad_()
        expected = eager(copy, targets)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(logits.grad, copy.grad)


@pytest.mark.parametrize("kind", ["logits", "linear"])
@pytest.mark.parametrize("rule", RULES)
def test_a_cuda_graph_replays_with_other_inputs(rule, kind):
    length, classes, width = 256, 5003, 64
    options = {"selection": rule, "warmup_steps": 0, "capacity": "static"}

    def inputs(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        shape = (4, length, classes if kind == "logits" else width)
        rows = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        weight = torch.randn(classes, width, generator=generator, device="cuda").bfloat16()
        targets = torch.randint(0, classes, (4, length), generator=generator, device="cuda")
        targets[:, ::7] = -100
        return rows, weight, targets

    def step(criterion, rows, weight, targets):
        leaves = (rows,) if kind == "logits" else (rows, weight)
        loss = criterion(*leaves, targets)
        loss.backward()
        return loss

    criterion = (CGGRLoss if kind == "logits" else CGGRLinearLoss)(**options).cuda()
    rows, weight, targets = inputs(0)
    leaves = [rows.requires_grad_(), weight.requires_grad_()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(criterion, rows, weight, targets)
    torch.cuda.current_stream().wait_stream(side)
    for leaf in leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(criterion, rows, weight, targets)
    for seed in (1, 2, 3):
        with torch.no_grad():
            for static, fresh in zip((*leaves, targets), inputs(seed), strict=True):
                static.copy_(fresh)
        draw = criterion.draw_count.clone()
        graph.replay()
        eager = (CGGRLoss if kind == "logits" else CGGRLinearLoss)(**options).cuda()
        eager.draw_count.copy_(draw)
        fresh, fresh_weight, fresh_targets = inputs(seed)
        fresh.requires_grad_(), fresh_weight.requires_grad_()
        expected = step(eager, fresh, fresh_weight, fresh_targets)
        # The draw goes on from replay to replay, and so do the samples.
        assert (criterion.draw_count - draw).item() == 1
        assert torch.equal(loss, expected)
        for leaf, other in zip(leaves, (fresh, fresh_weight), strict=True):
            assert (leaf.grad is None) == (other.grad is None)
            # A chunk's products may be made by another of cuBLAS's kernels under capture.
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, other.grad, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_compiled_losses_are_the_eager_ones(rule):
    torch._dynamo.reset()
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(2, 300, 64, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(5003, 64, generator=generator, device="cuda").bfloat16()
    targets = torch.randint(0, 5003, (2, 300), generator=generator, device="cuda")
    options = {"selection": rule, "warmup_steps": 0, "capacity": "static"}

    def gradients(compiled):
        linear, criterion = CGGRLinearLoss(**options).cuda(), CGGRLoss(**options).cuda()

        def both(hidden, weight):
            return linear(hidden, weight, targets) + criterion(hidden @ weight.T, targets)

        run = torch.compile(both, fullgraph=True) if compiled else both
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = run(*leaves)
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    loss, *grads = gradients(True)
    expected_loss, *expected = gradients(False)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for grad, other in zip(grads, expected, strict=True):
        assert (grad - other).float().norm() <= 1e-2 * other.float().norm()


def test_a_captured_call_keeps_what_it_reads():
    x = torch.ones(8, device="cuda")
    alive = weakref.ref(x)
    replay = captured(functools.partial(torch.mul, x, 2))
    del x
    gc.collect()
    assert alive() is not None
    assert replay().tolist() == 8 * [2.0]
