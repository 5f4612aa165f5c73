"""Ways to train by the token split: checkpointing, autocast, adapters, compilers, wrappers."""

import copy
import functools
import types

import models
import pytest
import torch
import torch.nn.functional as F
from token_steps import (
    NAMES,
    OFF,
    CGGRModel,
    Detaching,
    assert_same_gradients,
    build,
    check_step,
    enable_checkpointing,
    gradients,
    lora,
    of_peft,
    reference,
    shifted,
    token_losses,
    weights_of,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from transformers.cache_utils import Cache

from cggr.torch import create_truncated_router


@pytest.mark.parametrize(
    ("reentrant", "routed"), [(False, False), (True, False), (False, True)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name, reentrant, routed):
    model = build(name)
    router = create_truncated_router(model, num_layers=1) if routed else None
    options = {"router": router, "selection": "importance", "min_tokens_ratio": 0.3, **OFF}
    ids = models.token_ids(3, 11)
    labels = models.labels_for(name, ids)
    plain = CGGRModel(model, **options)
    plain(ids, labels=labels).backward()
    expected = gradients(model)
    model.zero_grad()
    enable_checkpointing(model, reentrant)
    ran = []
    layers = [m for m in model.modules() if hasattr(type(m), "_can_checkpoint_with_cache")]
    loss = CGGRModel(model, **options)(ids, labels=labels)
    handle = next(layers[0].children()).register_forward_hook(lambda *_: ran.append(name))
    loss.backward()
    handle.remove()
    assert ran == [name]  # once more
    # With a router, products that are made once meet others, made twice.
    assert_same_gradients(gradients(model), expected, 1e-5 if routed else 1e-6)
    assert _flags(model) == {True}


def _flags(model):
    """The state of checkpointing that a step must leave as it was."""
    layers = [m for m in model.modules() if hasattr(type(m), "_can_checkpoint_with_cache")]
    assert not any("_can_checkpoint_with_cache" in vars(m) for m in layers)
    return {m.gradient_checkpointing for m in layers}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_autocast(name, dtype, selections):
    model = build(name)
    ids = models.token_ids(3, 11)
    wrapped = CGGRModel(model, selection="stratified", min_tokens_ratio=0.4, **OFF)
    with torch.autocast("cpu", dtype=dtype):
        loss = wrapped(ids, labels=models.labels_for(name, ids))
    loss.backward()
    actual = gradients(model)
    assert all((g != 0).any() for key, g in actual.items() if key.endswith("weight"))
    targets = shifted(name, models.labels_for(name, ids))
    mask = selections[0].mask
    want, expected = reference(model, mask, mask / mask.sum(), targets, input_ids=ids)
    eps = torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(want.item(), rel=8 * eps)
    for key, g in expected.items():
        cosine = F.cosine_similarity(actual[key].flatten(), g.flatten(), dim=0)
        assert cosine > 1 - 100 * eps**2 - 16 * eps * 0.1 or g.norm() < 1e-4, key


@of_peft
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_lora(name, options, reentrant, selections):
    model = build(name)
    adapted = lora(model, **options, init_lora_weights=False, task_type="CAUSAL_LM")
    if reentrant is not None:
        enable_checkpointing(model, reentrant)
        model.enable_input_require_grads()
    wrapped = CGGRModel(adapted, selection="importance", min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 11)
    selections.clear()
    loss = wrapped(ids, labels=ids)
    loss.backward()
    actual = {key: p.grad.clone() for key, p in adapted.named_parameters() if p.requires_grad}
    assert actual
    assert all("lora" in key for key in actual)
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
    if reentrant is not None:
        model.gradient_checkpointing_disable()
    for p in adapted.parameters():
        p.grad = None
    targets = shifted(name, ids)
    mask = selections[0].mask
    weight = weights_of(selections[0], wrapped.config, (targets != -100).sum())
    cache = Cache(layer_class_to_replicate=functools.partial(Detaching, mask))
    nll = token_losses(adapted, targets, past_key_values=cache, input_ids=ids)
    want = (torch.where(mask, weight, 0) * nll).sum()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    expected = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    assert_same_gradients(actual, expected)


@of_peft
def test_lora_of_the_head_and_its_tokens():
    # A head with an adapter is no plain linear layer: the logits of the selected rows are made.
    model = build("llama")
    adapted = lora(model, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = CGGRModel(adapted, min_tokens_ratio=1.0, **OFF)
    ids = models.token_ids(3, 11)
    loss = wrapped(ids, labels=ids)
    assert loss.item() == pytest.approx(adapted(ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("change", ["wrapper", "own config"])
def test_layers_wrapped_or_copied_by_others(change, selections):
    model = build("llama", "sdpa")
    plain = CGGRModel(model, selection="random", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 11)
    expected = plain(ids, labels=ids)
    expected.backward()
    want = gradients(model)
    model.zero_grad()
    layers = model.model.layers
    if change == "wrapper":  # runs the layer again, as FSDP's users do it
        layers[1] = checkpoint_wrapper(layers[1], CheckpointImpl.NO_REENTRANT)
    else:
        layers[1] = copy.deepcopy(layers[1])
    loss = CGGRModel(model, selection="random", min_tokens_ratio=0.4, **OFF)(ids, labels=ids)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    renamed = {k.replace("_checkpoint_wrapped_module.", ""): g for k, g in gradients(model).items()}
    assert_same_gradients(renamed, want)  # whose products were made once


def test_a_model_that_is_replaced():
    wrapped = CGGRModel(build("llama"), min_tokens_ratio=0.4, **OFF)
    wrapped.model = build("llama", seed=1)
    ids = models.token_ids(2, 8)
    wrapped(ids, labels=ids).backward()
    assert all(p.grad is not None for p in wrapped.model.parameters())


def test_a_model_compiled_in_place_is_run_compiled(monkeypatch):
    model = build("llama")
    model.compile(backend="eager")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    wrapped = CGGRModel(model, min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(2, 8)
    wrapped(ids, labels=ids)
    assert len(compiled) == 1
    assert type(compiled[0]) is type(model.model)


@pytest.mark.slow
@pytest.mark.float64  # nothing is compiled under the guard
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_a_compiled_model_is_run_compiled(name, selections):
    torch._dynamo.reset()
    model = build(name)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    wrapped = CGGRModel(compiled, selection="importance", min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 12)
    labels = models.labels_for(name, ids)
    check_step(wrapped, model, name, selections, labels, input_ids=ids)
    assert len(graphs) >= 2  # of either pass
    torch._dynamo.reset()


@pytest.mark.float64  # dynamo refuses to run under the guard
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("split", ["token", "sequence"])
@pytest.mark.parametrize(
    ("name", "given", "masked"),
    [
        ("llama", None, False),
        ("bert", None, False),
        ("mistral", None, True),  # its window is shorter than the sequence
        ("llama", "position_ids", True),  # which may be packed
        ("llama", "attention_mask", True),
    ],
)
def test_a_compiled_dense_pass_has_a_mask_where_it_needs_one(name, given, masked, split):
    torch._dynamo.reset()
    passes, angles = [], []

    def keep(graph, inputs):
        found = [n for n in graph.graph.nodes if "scaled_dot_product" in str(n.target)]
        if found:  # no head
            passes.append(found)
            angles.append(sum("in_memory" in str(n.target) for n in graph.graph.nodes))
        return graph

    model, ids = build(name), models.token_ids(2, 8)
    others = {}
    if given == "position_ids":
        others[given] = torch.arange(8).expand(2, 8).contiguous()
    elif given is not None:
        others[given] = torch.ones_like(ids)
    labels = models.labels_for(name, ids)
    losses = []
    for inner in (model, torch.compile(model, backend=keep, fullgraph=True)):
        wrapped = CGGRModel(inner, selection="random", capacity="static", split=split, **OFF)
        with torch.no_grad():
            losses.append(wrapped(ids, labels=labels, **others).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    first = passes[0]
    assert len(first) == models.LAYERS
    for node in first:
        assert (node.kwargs["attn_mask"] is not None) == masked
        assert node.kwargs["is_causal"] == (not masked and name != "bert")
    # Of rotary positions, a sine and a cosine that all layers read.
    assert set(angles) == {0 if name == "bert" else 2}
    torch._dynamo.reset()


@pytest.mark.parametrize("bound", [True, False])
def test_a_forward_of_the_base_runs_in_every_pass(bound, selections):
    model = build("llama")
    plain = type(model.model).forward

    def scaled(self, input_ids=None, inputs_embeds=None, **options):
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return plain(self, inputs_embeds=3 * embeds, **options)

    model.model.forward = (
        types.MethodType(scaled, model.model)
        if bound
        else lambda *args, **options: scaled(model.model, *args, **options)
    )
    router = create_truncated_router(model, num_layers=1)
    wrapped = CGGRModel(model, router, selection="stratified", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 12)
    check_step(wrapped, model, "llama", selections, ids, input_ids=ids)
