"""Static capacity under torch.compile(fullgraph=True): eager's numbers, few compilations."""

import shutil
import tempfile

import models
import pytest
import torch
import truth
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from cggr.torch import (
    CGGRLinearLoss,
    CGGRLoss,
    CGGRModel,
    RoutingConfig,
    create_truncated_router,
    select_tokens,
)

CLASSES, WIDTH = 17, 8

# Dynamo looks at the .grad of every input, logits that a model made included, and makes an instance
# of every autograd.Function that it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def checked_graph(graph, inputs):
    """Runs a forward or backward graph as it is, once nothing in it is float64."""
    for node in graph.graph.nodes:
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor):
                assert value.dtype != torch.float64, f"{node} is float64, which MPS does not have."
    return make_boxed_func(graph)


# Dynamo refuses to run under the dispatch mode of conftest; the graphs tell the same.
aot_eager = aot_autograd(fw_compiler=checked_graph, bw_compiler=checked_graph)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 13, WIDTH, generator=generator)
    weight = torch.randn(CLASSES, WIDTH, generator=generator)
    bias = torch.randn(CLASSES, generator=generator)
    targets = torch.randint(0, CLASSES, (3, 13), generator=generator)
    targets[0, :3] = -100
    return hidden, weight, bias, targets


def loss_and_gradients(kind, criterion, seed):
    hidden, weight, bias, targets = batch(seed)
    leaves = hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    if kind == "logits":
        loss = criterion(torch.nn.functional.linear(*leaves), targets)
    else:
        loss = criterion(hidden, weight, targets, bias=bias)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def compilations():
    return counters["stats"]["unique_graphs"]


def levels(options, steps, batch_size, length):
    """How many programs the schedule needs: one per capacity, and one while the ratio is 1."""
    capacities = [truth.capacity(options, step, batch_size, length) for step in steps]
    dense = [truth.token_ratio(options, step) == truth.ONE for step in steps]
    return len(set(zip(capacities, dense, strict=True)))


def test_the_check_of_graphs_finds_float64():
    compiled = torch.compile(lambda x: x.double().sum().float(), backend=aot_eager)
    with pytest.raises(Exception, match="which MPS does not have"):
        compiled(torch.ones(3))


@pytest.mark.parametrize("kind", ["logits", "linear"])
@pytest.mark.parametrize(
    ("selection", "scope"),
    [
        ("topk", "batch"),
        ("stratified", "batch"),
        ("sequence_aware", "batch"),
        ("importance", "sequence"),
        ("random", "sequence"),
    ],
)
def test_losses_are_those_of_eager(kind, selection, scope):
    loss_class = CGGRLoss if kind == "logits" else CGGRLinearLoss
    options = {
        "selection": selection,
        "scope": scope,
        "warmup_steps": 4,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.2,
    }
    eager, module = (loss_class(**options, capacity="static") for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, backend=aot_eager)
    steps = range(3, 7)
    for criterion in (eager, module):
        criterion.load_state_dict({"step_count": torch.tensor(3), "draw_count": torch.tensor(4)})
    for step in steps:
        want = loss_and_gradients(kind, eager, seed=step)
        got = loss_and_gradients(kind, compiled, seed=step)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert module.get_metrics() == {
            name: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            for name, value in eager.get_metrics().items()
        }
        eager.step()
        module.step()
    assert module.draw_count.item() == 4 + len(steps)
    assert levels(options, steps, 3, 13) == 2
    assert compilations() <= levels(options, steps, 3, 13)


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_no_recompilation_within_a_level(kind):
    loss_class = CGGRLoss if kind == "logits" else CGGRLinearLoss
    options = {"selection": "stratified", "warmup_steps": 1000, "dynamic_threshold": True}
    module = loss_class(**options, capacity="static")
    module.load_state_dict({"step_count": torch.tensor(10), "draw_count": torch.tensor(0)})
    compiled = torch.compile(module, fullgraph=True, backend=aot_eager)
    assert levels(options, range(10, 15), 3, 13) == 1
    losses = []
    for step in range(5):
        losses.append(loss_and_gradients(kind, compiled, seed=step)[0].item())
        module.step()
        assert compilations() == 1
    assert len(set(losses)) == 5


def test_a_target_out_of_range_makes_the_compiled_loss_nan():
    # Eager raises; a compiled program does not look at values, but must not hide it either.
    hidden, weight, _, targets = batch()
    targets[1, 4] = CLASSES
    direct = torch.compile(
        CGGRLoss(capacity="static", warmup_steps=0), fullgraph=True, backend=aot_eager
    )
    assert direct(hidden @ weight.T, targets).isnan()
    linear = torch.compile(
        CGGRLinearLoss(capacity="static", warmup_steps=0), fullgraph=True, backend=aot_eager
    )
    assert linear(hidden, weight, targets).isnan()


@pytest.mark.parametrize("selection", ["topk", "importance"])
def test_select_tokens(selection):
    config = RoutingConfig(selection=selection, warmup_steps=0)
    difficulty = batch()[0][..., 0]
    difficulty[1, 3] = torch.nan
    capacity = config.capacity(0, 3, 13)

    def select(x, step, draw):
        return select_tokens(x, config, step=step, draw=draw, capacity=capacity)

    compiled = torch.compile(select, fullgraph=True, backend=aot_eager)
    for draw in range(3):
        want = select(difficulty, torch.tensor(draw), torch.tensor(draw))
        got = compiled(difficulty, torch.tensor(draw), torch.tensor(draw))
        assert all(map(torch.equal, got, want))
    assert compilations() == 1


@pytest.mark.slow
def test_a_model_is_that_of_eager():
    options = {
        "selection": "importance",
        "warmup_steps": 6,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.2,
    }
    steps = range(2, 9)
    results = []
    for compile_it in (False, True):
        model = models.build("llama", layers=2)
        module = CGGRModel(
            model, create_truncated_router(model, num_layers=1), **options, capacity="static"
        )
        module.load_state_dict(
            {"scorer.step_count": torch.tensor(2), "scorer.draw_count": torch.tensor(0)},
            strict=False,
        )
        train = torch.compile(module, fullgraph=True, backend=aot_eager) if compile_it else module
        rows = []
        for step in steps:
            model.zero_grad()
            ids = models.token_ids(6, seed=step)
            loss = train(ids, labels=ids)
            loss.backward()
            rows.append([loss.detach(), *(p.grad for p in model.parameters())])
            module.step()
        results.append(rows)
    for want, got in zip(*results, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert compilations() <= levels(options, steps, 1, 6)


def test_a_compiled_model_takes_other_lengths():
    model = models.build("llama", layers=1)
    module = CGGRModel(
        model, split="token", capacity="static", min_tokens_ratio=0.4, warmup_steps=0
    )
    train = torch.compile(module, fullgraph=True, backend="eager")
    for length in (8, 10, 11):
        ids = models.token_ids(2, length)
        draw = module.scorer.draw_count.clone()
        loss = train(ids, labels=ids)
        module.scorer.draw_count.copy_(draw)
        torch.testing.assert_close(loss, module(ids, labels=ids), rtol=1e-5, atol=0)


@pytest.mark.parametrize("changed", ["hook", "model"])
def test_a_model_that_something_watches_is_called_in_a_graph_too(changed):
    options = {"split": "sequence", "capacity": "static", "min_tokens_ratio": 1.0}
    model, ids = models.build("llama", layers=1), models.token_ids()
    if changed == "hook":

        def triple(module, args, output):
            output.logits = 3 * output.logits
            return output

        model.register_forward_hook(triple)
    module = CGGRModel(model, **options)
    train = torch.compile(module, fullgraph=True, backend="eager")
    first = train(ids, labels=ids)
    torch.testing.assert_close(first, module(ids, labels=ids), rtol=1e-5, atol=0)
    if changed == "model":
        module.model = models.build("llama", layers=1, seed=5)
        torch.testing.assert_close(
            train(ids, labels=ids),
            module.model(ids, labels=ids, use_cache=False).loss,
            rtol=1e-5,
            atol=0,
        )


@pytest.mark.parametrize("split", ["token", "sequence"])
def test_all_passes_at_all_capacities_are_compiled(split):
    model = models.build("llama", layers=2)
    inner = torch.compile(model, dynamic=False, backend="eager")
    options = {
        "capacity": "static",
        "min_tokens_ratio": 0.2,
        "warmup_steps": 8,
        "dynamic_threshold": True,
    }
    module = CGGRModel(inner, create_truncated_router(model, 1), split=split, **options)
    found = set()
    # Of one function, which is that of all models of transformers.
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(9):
            ids = models.token_ids(8, 8)
            module(ids, labels=ids)
            found.add(module.scorer.level[1])
            module.step()
        module.eval()
        for batch in (1, 2, 3):
            module(models.token_ids(batch, 8))
    assert len(found) == 4


@pytest.mark.slow
def test_inductor_gives_the_numbers_of_eager(monkeypatch, tmp_path):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler (g++ or clang++) on this machine, which inductor needs")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = {"selection": "importance", "warmup_steps": 0, "capacity": "static"}
    eager, module = CGGRLoss(**options), CGGRLoss(**options)
    compiled = torch.compile(module, fullgraph=True)
    for seed in range(2):
        want = loss_and_gradients("logits", eager, seed)
        got = loss_and_gradients("logits", compiled, seed)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    assert compilations() == 1
