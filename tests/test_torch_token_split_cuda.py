"""The token split on a CUDA device: no synchronisation, CUDA graphs, compiled steps."""

import models
import pytest
import torch
from test_torch_cuda import no_synchronisation

from cggr.torch import CGGRModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OFF = {"warmup_steps": 0, "dynamic_threshold": False}
STATIC = {"split": "token", "selection": "importance", "capacity": "static"}


def build(name, **options):
    return models.build(name, **options).cuda()


def labels_for(name, ids):
    return models.labels_for(name, ids.cpu()).cuda()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inputs", ["ids", "padding", "packed"])
# Not falcon, whose own forward indexes with lists, which are copied from the host.
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gptj", "phi3"])
def test_a_static_step_never_synchronises(name, inputs):
    model = build(name)
    wrapped = CGGRModel(model, warmup_steps=3, **STATIC).cuda()
    ids = models.token_ids(4, 16).cuda()
    others = {}
    if inputs == "padding":
        others["attention_mask"] = (torch.arange(16) >= torch.arange(4)[:, None]).long().cuda()
    if inputs == "packed":
        others["position_ids"] = (torch.arange(16) % 6).expand(4, 16).contiguous().cuda()
    wrapped(ids, labels=ids, **others).backward()  # tables that a model makes once
    with no_synchronisation():
        for _ in range(5):
            wrapped(ids, labels=ids, **others).backward()
            wrapped.step()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_a_cuda_graph_replays_the_step(name):
    def make():
        return CGGRModel(build(name), min_tokens_ratio=0.4, **OFF, **STATIC).cuda()

    captured, eager = make(), make()
    ids = models.token_ids(4, 16).cuda()
    labels = labels_for(name, ids)

    def step():
        captured.zero_grad()
        loss = captured(ids, labels=labels)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured(ids, labels=labels)
        loss.backward()
    captured.scorer.draw_count.zero_()
    for seed in range(3):
        new = models.token_ids(4, 16, seed=seed + 1).cuda()
        ids.copy_(new)
        labels.copy_(labels_for(name, new))
        for p in captured.parameters():
            p.grad.zero_()
        graph.replay()
        eager.zero_grad()
        expected = eager(new, labels=labels)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for key, want in gradients(eager).items():
            scale = want.abs().max().clamp(min=1e-6)
            error = (dict(captured.named_parameters())[key].grad - want).abs().max() / scale
            assert error < 2e-4, key


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_steps_are_those_of_eager(whole):
    torch._dynamo.reset()
    model = build("llama")

    def losses(compiled):
        inner = model if whole or not compiled else torch.compile(model, dynamic=False)
        wrapped = CGGRModel(inner, min_tokens_ratio=0.4, **OFF, **STATIC).cuda()
        step = (
            torch.compile(wrapped, fullgraph=True, dynamic=False) if whole and compiled else wrapped
        )
        found = []
        for seed in range(2):
            model.zero_grad()
            batch = models.token_ids(4, 16, seed=seed).cuda()
            loss = step(batch, labels=batch)
            loss.backward()
            found.append((loss.detach(), gradients(model)))
        return found

    for (loss, grads), (want, expected) in zip(losses(True), losses(False), strict=True):
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for key, value in expected.items():
            error = (grads[key] - value).abs().max() / value.abs().max().clamp(min=1e-6)
            assert error < 1e-3, key
