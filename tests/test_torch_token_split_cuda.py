"""The splits by tokens on a CUDA device: no synchronisation, CUDA graphs, compiled steps."""

import contextlib

import models
import pytest
import torch
from test_torch_cuda import no_synchronisation

from cggr.torch import CapturedStep, CGGRModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OFF = {"warmup_steps": 0, "dynamic_threshold": False}
STATIC = {"selection": "importance", "capacity": "static"}
SPLITS = ("token", "backward")


def of_splits(*cases):
    """Each case with each split."""
    return [(split, *case) for split in SPLITS for case in cases]


def build(name, **options):
    return models.build(name, **options).cuda()


def labels_for(name, ids):
    return models.labels_for(name, ids.cpu()).cuda()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inputs", ["ids", "padding", "packed"])
@pytest.mark.parametrize(
    ("split", "name"),
    # Not falcon, whose own forward indexes with lists, which are copied from the host.
    of_splits(*((x,) for x in ("llama", "mistral", "gemma2", "gemma3", "gpt2", "gptj", "phi3"))),
)
def test_a_static_step_never_synchronises(split, name, inputs):
    model = build(name)
    wrapped = CGGRModel(model, split=split, warmup_steps=3, **STATIC).cuda()
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


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # are not wanted here
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", ["", "model", "whole"])
@pytest.mark.parametrize(
    ("split", "name", "inputs"),
    of_splits(
        ("llama", "ids"),
        ("gemma3", "ids"),
        ("gpt2", "ids"),
        ("bert", "ids"),
        ("llama", "padding"),
        ("bert", "padding"),
        ("gemma3", "packed"),
        ("llama", "checkpointed"),
    ),
)
def test_a_captured_step_is_that_of_eager_without_a_wait(
    split, name, inputs, compiled, monkeypatch
):
    if compiled == "whole" and (split, inputs) == ("backward", "checkpointed"):
        pytest.skip("checkpointed layers are compiled one by one")
    torch._dynamo.reset()
    others = {}
    if inputs == "padding":
        others["attention_mask"] = (torch.arange(16) < 10 + torch.arange(4)[:, None]).long().cuda()
    elif inputs == "packed":
        others["position_ids"] = (torch.arange(16) % 6).expand(4, 16).contiguous().cuda()

    def make(compiled=""):
        model = build(name)
        if inputs == "checkpointed":
            # The state of a generator cannot be asked for in a capture.
            kwargs = {"use_reentrant": False, "preserve_rng_state": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        inner = torch.compile(model, dynamic=False) if compiled == "model" else model
        wrapped = CGGRModel(inner, split=split, min_tokens_ratio=0.4, **OFF, **STATIC).cuda()
        if compiled == "whole":
            wrapped.compile(dynamic=False)
        return wrapped

    replayed, eager = make(compiled), make()
    step = CapturedStep(replayed)
    for seed in range(4):
        ids = models.token_ids(4, 16, seed=seed + 1).cuda()
        labels = labels_for(name, ids)
        with monkeypatch.context() as patch:
            if inputs in ("padding", "packed"):  # by our kernels, which the other has not
                patch.setenv("CGGR_IMPLEMENTATION", "triton")
            # After one graph that sets gradients, and one that adds to them.
            with no_synchronisation() if seed > 1 else contextlib.nullcontext():
                loss = step(ids, labels, **others)
        with monkeypatch.context() as patch:
            patch.setenv("CGGR_IMPLEMENTATION", "eager")
            expected = eager(ids, labels=labels, **others)
            expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
        want = gradients(eager.model)
        # A bias of keys has none: what is there is rounding, of sums in another order.
        largest = max(float(x.abs().max()) for x in want.values())
        for key, gradient in gradients(replayed.model).items():
            key = key.removeprefix("_orig_mod.")
            least = 1e-3 * largest if key.endswith("key.bias") else 1e-6
            scale = want[key].abs().max().clamp(min=least)
            assert (gradient - want[key]).abs().max() / scale < (1e-3 if compiled else 2e-4), key
        if seed % 2:
            replayed.zero_grad()
            eager.zero_grad()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_compiled_steps_are_those_of_eager(split, whole):
    torch._dynamo.reset()
    model = build("llama")

    def losses(compiled):
        inner = model if whole or not compiled else torch.compile(model, dynamic=False)
        wrapped = CGGRModel(inner, split=split, min_tokens_ratio=0.4, **OFF, **STATIC).cuda()
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
