"""The products of selected positions are made once, where both passes make the same."""

import contextlib
import types

import models
import pytest
import torch
import torch.nn.functional as F
from token_steps import (
    OFF,
    CGGRModel,
    assert_same_gradients,
    build,
    enable_checkpointing,
    gradients,
    lora,
    of_peft,
)

from cggr.torch import create_truncated_router
from cggr.torch.token_split import TokenSplit


@of_peft
@pytest.mark.parametrize("inputs", ["left padding", "packed", "LoRA", "bfloat16", "bias"])
def test_the_products_of_selected_positions_are_made_once(inputs, monkeypatch):
    name = "gpt_neox" if inputs == "bias" else "llama"
    model = build(name)
    others = {}
    if inputs == "left padding":
        others["attention_mask"] = (torch.arange(12) >= torch.arange(3)[:, None]).long()
    if inputs == "packed":
        others["position_ids"] = (torch.arange(12) % 5).expand(3, 12).contiguous()
    trained = lora(model, target_modules="all-linear") if inputs == "LoRA" else model
    ids = models.token_ids(3, 12)
    found = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(TokenSplit, "_repeats_itself", lambda self: False)
        wrapped = CGGRModel(trained, selection="random", min_tokens_ratio=0.4, **OFF)
        lowered = torch.autocast("cpu", torch.bfloat16, enabled=inputs == "bfloat16")
        with count_products() as products, lowered:
            loss = wrapped(ids, labels=ids, **others)
        loss.backward()
        found.append((loss.item(), gradients(trained), products))
        trained.zero_grad()
    (loss, gradient, products), (expected, want, twice) = found
    tolerance = 2e-2 if inputs == "bfloat16" else 1e-6
    assert loss == pytest.approx(expected, rel=tolerance)
    assert_same_gradients(gradient, want, tolerance)
    assert 2 * len(products) == len(twice) > 0
    assert {shape[1] for shape in products} == {12}


@contextlib.contextmanager
def count_products():
    """Shapes of what a model's linear layers are given, the head's not."""
    linear, shapes = F.linear, []

    def spy(x, weight, bias=None):
        if weight.shape[0] != models.VOCAB and x.dim() == 3:
            shapes.append(tuple(x.shape))
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", spy)
        yield shapes


@pytest.mark.parametrize("reason", ["dropout", "checkpointing", "hook", "attention"])
def test_passes_that_differ_make_their_own_products(reason):
    model = build("gpt_neox", hidden_dropout=0.5 if reason == "dropout" else 0.0)
    if reason == "hook":  # such as NEFTune's
        model.get_input_embeddings().register_forward_hook(lambda _, __, x: x + torch.rand_like(x))
    if reason == "attention":
        model.gpt_neox.layers[1].attention.attention_dropout = 0.5
    if reason == "checkpointing":
        enable_checkpointing(model, False)
    wrapped = CGGRModel(model, selection="random", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 12)
    with count_products() as products:
        loss = wrapped(ids, labels=ids)
    assert {shape[1] for shape in products} == {12, 5}
    loss.backward()


def _shares_an_mlp(model):
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


def _dora(model):
    return lora(model, target_modules=["q_proj", "v_proj"], use_dora=True)


def _adalora(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def _flat(model):
    """A layer whose linear layers are given all sequences in one."""
    mlp, forward = model.model.layers[1].mlp, type(model.model.layers[1].mlp).forward

    def flat(self, x):
        return forward(self, x.reshape(1, -1, x.shape[2])).view(x.shape)

    mlp.forward = types.MethodType(flat, mlp)
    return model


def _replaced_forward(model):
    layer = model.model.layers[1]
    old = layer.forward
    layer.forward = lambda *args, **kwargs: old(*args, **kwargs)
    return model


def _own_config(model):
    model.model.layers[0].mlp.config = {"a": 1}
    return model


@of_peft
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "change", [_shares_an_mlp, _dora, _adalora, _flat, _replaced_forward, _own_config]
)
def test_products_that_are_kept_change_nothing(change, depth, monkeypatch):
    model = build("llama", "sdpa")
    trained = change(model)
    router = create_truncated_router(model, 1) if depth else None
    rule = "stratified" if depth else "random"
    ids, found = models.token_ids(3, 12), []
    for anew in (False, True):
        if anew:
            monkeypatch.setattr(TokenSplit, "_repeats_itself", lambda self: False)
        wrapped = CGGRModel(trained, router, selection=rule, min_tokens_ratio=0.4, **OFF)
        loss = wrapped(ids, labels=ids)
        loss.backward()
        found.append((loss.item(), gradients(trained)))
        trained.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_same_gradients(found[0][1], found[1][1], 1e-5)


def test_a_step_that_failed_leaves_no_products():
    model = build("llama")
    wrapped = CGGRModel(model, selection="random", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 12)
    wrapped(ids, labels=ids)
    linears = wrapped._token_split._row_linears(0)
    assert linears
    for linear in linears:
        linear.kept = (torch.full((3, 5, linear.out_features), torch.nan),)
    wrapped._token_split.follow()
    recorded = wrapped._token_split.record({"input_ids": ids}, ids.shape, synchronise=True, depth=0)
    index = torch.arange(5).expand(3, 5).contiguous()
    wrapped._token_split.finish(recorded, 0, index)
    assert all(len(linear.kept) == 1 and linear.kept[0].isfinite().all() for linear in linears)
