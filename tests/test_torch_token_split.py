"""The token split of CGGRModel: exact losses, the gradient that it promises, what it refuses."""

import collections
import contextlib
import copy
import functools
import logging
import re
import types

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import truth
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from transformers.cache_utils import Cache, CacheLayerMixin

import cggr.torch.model
from cggr.torch import CGGRModel as RoutedModel
from cggr.torch import CGGRScorer as RoutedScorer
from cggr.torch import RoutingConfig, create_truncated_router, row_attention, selected_attention
from cggr.torch.refusal import _ADAPTERS, refusal
from cggr.torch.token_split import TokenSplit

OFF = {"warmup_steps": 0, "dynamic_threshold": False}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels; all else is on the CPU
NAMES = [name for name in models.ARCHITECTURES if name != "mamba"]
CGGRModel = functools.partial(RoutedModel, split="token")
of_peft = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def attention_of(name):
    """The attention implementations that this model can be given."""
    model = models.build(name)
    if not model._can_set_attn_implementation():
        return [model.config._attn_implementation]
    return ["eager"] if name == "gemma2" else ["eager", "sdpa"]


CASES = [(name, attention) for name in NAMES for attention in attention_of(name)]


def build(name, attention=None, **options):
    model = models.build(name, **options)
    if attention is not None and attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    return model


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def exactly(message):
    return f"^{re.escape(message)}$"


def shifted(name, labels, mask=None):
    """Targets, written out: the next label of causal models, the label itself of masked ones."""
    targets = torch.full_like(labels, -100)
    for b, t in np.ndindex(*labels.shape):
        source = t if name in models.MASKED else t + 1
        if source < labels.shape[1] and (mask is None or (mask[b, t] and mask[b, source])):
            targets[b, t] = labels[b, source]
    return targets


def token_losses(model, targets, **inputs):
    """Loss of every token of a dense forward ``(B, S)``, 0 where there is no target."""
    logits = model(**inputs).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
        targets
    )


def gradients(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_same_gradients(actual, expected, tolerance=1e-5):
    """Relative to the largest gradient of the parameter, or of any if that one has none."""
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, want in expected.items():
        scale = max(want.abs().max(), 1e-3 * largest)
        error = (actual[name] - want).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.2e}"


class _Detaching(CacheLayerMixin):
    """Keys and values of a dense forward, of which those of unselected tokens are constants."""

    is_sliding = False

    def __init__(self, mask):
        super().__init__()
        self.mask = mask[:, None, :, None]

    def update(self, keys, values, *args, **kwargs):
        return tuple(torch.where(self.mask, x, x.detach()) for x in (keys, values))

    def lazy_initialization(self, *args):
        pass

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_seq_length(self):
        return 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length


def reference(model, mask, weight, targets, **inputs):
    """Loss and gradients of a dense forward with constant keys and values of unselected tokens.

    ``Σ weight nll`` over the mask.
    """
    cache = Cache(layer_class_to_replicate=functools.partial(_Detaching, mask))
    model.zero_grad()
    nll = token_losses(model, targets, past_key_values=cache, **inputs)
    loss = (torch.where(mask, weight, 0) * nll).sum()
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.detach(), found


@pytest.fixture
def selections(monkeypatch):
    """Every selection that a model makes."""
    made = []
    select = cggr.torch.model.select_at_ratio

    def spy(*args, **kwargs):
        made.append(select(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(cggr.torch.model, "select_at_ratio", spy)
    return made


def weights_of(selection, config, n_eligible):
    """Weight of every token in the loss ``(B, S)``."""
    mask = selection.mask
    if config.selection != "importance":
        return mask / mask.sum()
    weight = torch.zeros(mask.shape[0], mask.shape[1] + 1, device=mask.device)
    weight.scatter_(1, selection.indices.long(), selection.weights)
    return weight[:, :-1] / n_eligible


def check_step(wrapped, model, name, selections, labels, tolerance=1e-5, **inputs):
    """A training step's loss and gradients against the reference; returns the selection."""
    selections.clear()
    model.zero_grad()
    loss = wrapped(labels=labels, **inputs)
    loss.backward()
    actual = gradients(model)
    (selection,) = selections
    mask2d = inputs.get("attention_mask")
    targets = shifted(name, labels, mask2d)
    n_eligible = (targets != -100).sum()
    weight = weights_of(selection, wrapped.config, n_eligible)
    expected_loss, expected = reference(model, selection.mask, weight, targets, **inputs)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    assert_same_gradients(actual, expected, tolerance)
    return selection


# The two passes


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_the_losses_of_selected_tokens_are_those_of_a_dense_forward(
    name, attention, record_property
):
    model = build(name, attention)
    ids = models.token_ids(3, 12)
    targets = shifted(name, models.labels_for(name, ids))
    with torch.no_grad():
        dense = token_losses(model, targets, input_ids=ids)
        split = TokenSplit(model)
        recorded = split.record({"input_ids": ids}, ids.shape, synchronise=True)
        index = torch.stack([torch.randperm(12)[:5] for _ in range(3)])
        hidden = split.rows(recorded, index, None)
        logits = split.router.project(hidden).float()
    rows = F.cross_entropy(
        logits.flatten(0, 1), targets.gather(1, index).flatten(), reduction="none"
    )
    difference = (rows.view_as(index) - dense.gather(1, index)).abs().max().item()
    record_property("difference", difference)
    print(f"{name} {attention}: {difference:.1e}")
    assert difference <= 1e-5


def test_another_context_gives_other_losses():
    # That the test above can fail: without what is recorded, losses differ.
    model = build("llama", "sdpa")
    ids = models.token_ids(3, 12)
    split = TokenSplit(model)
    index = torch.tensor([[7, 2, 11]]).expand(3, -1)
    with torch.no_grad():
        recorded = split.record({"input_ids": ids}, ids.shape, synchronise=True)
        right = split.rows(recorded, index, None)
        for layer in recorded.cache.layers:
            layer.values.mul_(0.5)
        assert (split.rows(recorded, index, None) - right).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_all_positions_give_the_dense_loss_and_gradients(name, attention):
    model = build(name, attention)
    ids = models.token_ids(3, 9)
    labels = models.labels_for(name, ids)
    targets = shifted(name, labels)
    every = torch.ones_like(ids, dtype=torch.bool)
    loss, expected = reference(
        model, every, every / (targets != -100).sum(), targets, input_ids=ids
    )

    wrapped = CGGRModel(model, min_tokens_ratio=1.0, **OFF)  # one dense pass
    wrapped(ids, labels=labels).backward()
    assert_same_gradients(gradients(model), expected)

    model.zero_grad()  # the two passes, in an order of their own
    split = TokenSplit(model)
    recorded = split.record({"input_ids": ids}, ids.shape, synchronise=True)
    index = torch.stack([torch.randperm(9) for _ in range(3)])
    logits = split.router.project(split.rows(recorded, index, None)).float()
    twice = F.cross_entropy(logits.flatten(0, 1), targets.gather(1, index).flatten())
    twice.backward()
    assert twice.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_the_gradient_is_that_of_constant_unselected_keys_and_values(name, attention, selections):
    model = build(name, attention)
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 12)
    check_step(wrapped, model, name, selections, models.labels_for(name, ids), input_ids=ids)


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("selection", truth.SELECTIONS)
def test_every_rule_selects_inside_the_sequences(selection, capacity, selections):
    model = build("llama")
    options = {"selection": selection, "min_tokens_ratio": 0.3, "warmup_steps": 0}
    wrapped = CGGRModel(model, capacity=capacity, **options)
    for seed in range(2):
        ids = models.token_ids(3, 13, seed=seed)
        labels = ids.clone()
        labels[0, 5:] = -100  # fewer in one sequence: unused slots
        labels[1] = -100  # and none in another
        found = check_step(wrapped, model, "llama", selections, labels, input_ids=ids)
        targets = shifted("llama", labels)
        n_eligible = (targets != -100).sum(dim=1)
        ratio = wrapped.get_metrics()["token_ratio"]
        expected = [max(int(np.ceil(n * ratio - 1e-9)), int(n > 0)) for n in n_eligible.tolist()]
        assert found.mask.sum(dim=1).tolist() == expected
        assert not (found.mask & (targets == -100)).any()
        assert wrapped.get_metrics()["tokens_selected"] == sum(expected)
        assert wrapped.get_metrics()["tokens_total"] == int(n_eligible.sum())


def test_the_mask_is_that_of_the_dense_scores(selections):
    model = build("llama")
    options = {"selection": "stratified", "scoring": "loss", "min_tokens_ratio": 0.4}
    wrapped = CGGRModel(model, **options, **OFF)
    ids = models.token_ids(4, 11)
    wrapped(ids, labels=ids)
    targets = shifted("llama", ids).numpy()
    statistics = truth.statistics(array(model(ids).logits), targets)
    expected = truth.select(
        statistics["nll"], {**options, **OFF, "scope": "sequence"}, eligible=targets != -100
    )
    np.testing.assert_array_equal(selections[0].mask.numpy(), expected.mask)


# What a batch may hold


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma3", "gpt2", "falcon", "bert", "roberta"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, name, capacity, selections):
    model = build(name)
    ids = models.token_ids(3, 11)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 6) if side == "left" else slice(5, 11)] = 0
    ids = ids.masked_fill(mask == 0, 0)
    wrapped = CGGRModel(
        model, selection="stratified", min_tokens_ratio=0.3, capacity=capacity, **OFF
    )
    labels = models.labels_for(name, ids)
    check_step(wrapped, model, name, selections, labels, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2"])
def test_packed_sequences_do_not_see_each_other(name, capacity, selections):
    model = build(name)
    ids = models.token_ids(2, 12)
    lengths = [(5, 7), (12,)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in parts]) for parts in lengths])
    wrapped = CGGRModel(
        model, selection="stratified", min_tokens_ratio=0.4, capacity=capacity, **OFF
    )
    loss = wrapped(ids, labels=ids, position_ids=positions)
    loss.backward()
    actual = gradients(model)
    model.zero_grad()
    mask = selections[0].mask
    total = 0
    for b, parts in enumerate(lengths):
        start = 0
        for n in parts:  # each on its own
            part = slice(start, start + n)
            targets = shifted("llama", ids)[b : b + 1, part]
            cache = Cache(
                layer_class_to_replicate=functools.partial(_Detaching, mask[b : b + 1, part])
            )
            nll = token_losses(
                model, targets, input_ids=ids[b : b + 1, part], past_key_values=cache
            )
            total = total + torch.where(mask[b : b + 1, part], nll, 0).sum()
            start += n
    (total / mask.sum()).backward()
    assert loss.item() == pytest.approx((total / mask.sum()).item(), rel=1e-5)
    assert_same_gradients(actual, gradients(model))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_ones_own(kind, selections):
    model = build("llama", "sdpa" if kind == "bool" else "eager")
    ids = models.token_ids(3, 10)
    seen = torch.rand(3, 1, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.7
    seen = (seen & torch.ones(10, 10, dtype=torch.bool).tril()) | torch.eye(10, dtype=torch.bool)
    mask = seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.3, **OFF)
    selections.clear()
    loss = wrapped(ids, labels=ids, attention_mask=mask)
    loss.backward()
    actual = gradients(model)
    targets = shifted("llama", ids)
    weight = weights_of(selections[0], wrapped.config, (targets != -100).sum())
    want, expected = reference(
        model, selections[0].mask, weight, targets, input_ids=ids, attention_mask=mask
    )
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(actual, expected)


def test_positions_of_ones_own_and_types(selections):
    model = build("bert")
    ids = models.token_ids(3, 10)
    inputs = {
        "input_ids": ids,
        "token_type_ids": (torch.arange(10) > 4).long().expand(3, 10).contiguous(),
        "position_ids": torch.arange(10).flip(0)[None],
    }
    wrapped = CGGRModel(model, selection="topk", min_tokens_ratio=0.5, **OFF)
    labels = models.labels_for("bert", ids)
    check_step(wrapped, model, "bert", selections, labels, **inputs)


@pytest.mark.parametrize("name", ["llama", "roberta"])
def test_embeddings_in_place_of_ids(name, selections):
    model = build(name)
    ids = models.token_ids(3, 10)
    labels = models.labels_for(name, ids)
    wrapped = CGGRModel(model, selection="topk", min_tokens_ratio=0.5, **OFF)
    want = wrapped(ids, labels=labels)
    embeds = model.get_input_embeddings()(ids)
    assert wrapped(inputs_embeds=embeds, labels=labels).item() == pytest.approx(
        want.item(), rel=1e-6
    )


def test_nothing_eligible_is_a_connected_zero():
    model = build("llama")
    for capacity in ("exact", "static"):
        wrapped = CGGRModel(model, capacity=capacity, **OFF)
        ids = models.token_ids(2, 8)
        loss = wrapped(ids, labels=torch.full_like(ids, -100))
        loss.backward()
        assert loss.item() == 0
        assert all((g == 0).all() for g in gradients(model).values())


# Ways to train


def enable_checkpointing(model, reentrant):
    # Its name before transformers 5.20.
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": reentrant})


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


def test_a_router_scores_in_the_models_place(selections):
    model = build("llama")
    router = create_truncated_router(model, num_layers=1)
    wrapped = CGGRModel(model, router, selection="topk", min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 12)
    found = check_step(wrapped, model, "llama", selections, ids, input_ids=ids)
    logits = array(router(ids))
    targets = shifted("llama", ids).numpy()
    options = {"selection": "topk", "min_tokens_ratio": 0.3, "scope": "sequence", **OFF}
    difficulty = truth.difficulty(truth.statistics(logits, targets), "combined")
    expected = truth.select(difficulty, options, eligible=targets != -100)
    np.testing.assert_array_equal(found.mask.numpy(), expected.mask)


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_router_of_first_layers_is_the_beginning_of_the_first_pass(
    name, attention, capacity, selections
):
    model = build(name, attention)
    router = create_truncated_router(model, num_layers=1)
    wrapped = CGGRModel(
        model, router, selection="stratified", min_tokens_ratio=0.4, capacity=capacity, **OFF
    )
    ids = models.token_ids(3, 12)
    labels = models.labels_for(name, ids)
    check_step(wrapped, model, name, selections, labels, input_ids=ids)
    ran = collections.Counter()  # by hooks, with which every pass makes its own products
    for i, layer in enumerate(models.base_of(model).modules()):
        if type(layer).__name__.endswith(("Layer", "Block")):
            hook = functools.partial(lambda i, *_: ran.update([i]), i)
            layer.register_forward_hook(hook)
    check_step(wrapped, model, name, selections, labels, input_ids=ids)
    # Twice in the step, by either pass, and once in the reference.
    assert set(ran.values()) == {3}
    scores = RoutedScorer(router, shift_labels=name not in models.MASKED).score(
        shifted(name, labels), input_ids=ids
    )
    hardest = torch.where(selections[0].mask, scores.difficulty, 0).sum()
    assert wrapped.get_metrics()["avg_difficulty"] == pytest.approx(
        (scores.difficulty.sum() / scores.eligible.sum()).item(), rel=1e-5
    )
    assert hardest > 0


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


def test_a_router_deeper_than_the_model():
    model = build("llama")
    wrapped = CGGRModel(model, create_truncated_router(model, num_layers=2), **OFF)
    model.model.layers = model.model.layers[:1]
    message = r"the router has 2 of the model's layers, which are 1: make it anew by .*\.$"
    with pytest.raises(ValueError, match=message):
        wrapped(models.token_ids(2, 8), labels=models.token_ids(2, 8))


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
    recorded = wrapped._token_split.record({"input_ids": ids}, ids.shape, synchronise=True, depth=0)
    index = torch.arange(5).expand(3, 5).contiguous()
    wrapped._token_split.finish(recorded, 0, index)
    assert all(len(linear.kept) == 1 and linear.kept[0].isfinite().all() for linear in linears)


@pytest.mark.parametrize("selection", ["stratified", "importance"])
def test_accumulated_micro_batches_are_one_batch(selection, selections):
    model = build("llama")
    ids = models.token_ids(4, 10)
    labels = ids.clone()
    labels[0, 4:] = -100
    items = (shifted("llama", labels) != -100).sum()
    total = 0
    for part in (slice(0, 1), slice(1, 4)):
        wrapped = CGGRModel(model, selection=selection, min_tokens_ratio=0.3, **OFF)
        loss = wrapped(ids[part], labels=labels[part], num_items_in_batch=items)
        targets = shifted("llama", labels[part])
        n_eligible = (targets != -100).sum()
        nll = token_losses(model, targets, input_ids=ids[part]).detach()
        weight = weights_of(selections[-1], wrapped.config, n_eligible)
        want = (weight * nll).sum() * n_eligible / items
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        total = total + loss
    total.backward()


def test_importance_weights_make_the_heads_gradient_unbiased():
    model = build("llama", layers=1)
    ids = models.token_ids(4, 12)
    labels = ids.clone()
    model.zero_grad()
    targets = shifted("llama", ids)
    (token_losses(model, targets, input_ids=ids).sum() / (targets != -100).sum()).backward()
    dense = model.lm_head.weight.grad.clone()
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.25, **OFF)
    draws = []
    for _ in range(400):
        model.zero_grad()
        wrapped(ids, labels=labels).backward()
        draws.append(model.lm_head.weight.grad.clone())
    draws = torch.stack(draws)
    error = (draws.mean(0) - dense).norm()
    # The mean of n draws is off by their spread / sqrt(n); a biased one stays off.
    spread = (draws - draws.mean(0)).square().sum(dim=(1, 2)).mean().sqrt() / len(draws) ** 0.5
    assert error < 1.5 * spread
    assert spread < 0.1 * dense.norm()


def test_nothing_of_a_step_stays():
    model = build("llama")
    wrapped = CGGRModel(model, **OFF)
    before = set(wrapped.state_dict())
    ids = models.token_ids(2, 8)
    loss = wrapped(ids, labels=ids)
    loss.backward()
    assert set(wrapped.state_dict()) == before
    assert {name.removeprefix("model.") for name in before if name.startswith("model.")} == set(
        model.state_dict()
    )


def test_two_losses_before_a_backward_pass():
    model = build("llama")
    wrapped = CGGRModel(model, selection="random", min_tokens_ratio=0.3, **OFF)
    batches = [models.token_ids(2, 9, seed=seed) for seed in range(2)]

    def run(together):
        wrapped.scorer.draw_count.zero_()
        model.zero_grad()
        losses = []
        for ids in batches:
            loss = wrapped(ids, labels=ids)
            losses.append(loss) if together else loss.backward()
        if together:
            sum(losses).backward()
        return gradients(model)

    assert_same_gradients(run(True), run(False), 1e-6)


# What cannot be had


def test_eval_is_the_dense_loss_and_no_labels_the_models_output():
    model = build("llama")
    wrapped = CGGRModel(model, **OFF)
    ids = models.token_ids(2, 9)
    assert torch.equal(wrapped(ids).logits, model(ids).logits)
    wrapped.eval()
    expected = model(ids, labels=ids).loss.item()
    assert wrapped(ids, labels=ids).item() == pytest.approx(expected, rel=1e-6)


def _with(name, **changes):
    model = models.build(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model


class Plain(nn.Module):
    def forward(self, input_ids):
        return input_ids


class ScaledForCausalLM(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def _replaced(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


REFUSALS = {
    "mamba": (lambda: models.build("mamba"), "MambaForCausalLM is a mamba model: its layers scan"),
    "alibi": (lambda: _with("falcon", alibi=True), "FalconForCausalLM has alibi=True: ALiBi"),
    "dynamic rope": (
        lambda: _with("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "LlamaForCausalLM has dynamic rotary positions",
    ),
    "long rope": (
        lambda: _with("phi3", rope_parameters={"rope_type": "longrope"}),
        "Phi3ForCausalLM has longrope rotary positions",
    ),
    "flash": (
        lambda: _with("llama", _attn_implementation_internal="flash_attention_2"),
        "LlamaForCausalLM uses 'flash_attention_2' attention",
    ),
    "bidirectional gemma": (
        lambda: _with("gemma3", use_bidirectional_attention=True),
        "Gemma3ForCausalLM has use_bidirectional_attention=True",
    ),
    "cross-attention": (
        lambda: _with("gpt2", add_cross_attention=True),
        "GPT2LMHeadModel has add_cross_attention=True",
    ),
    "no causality": (
        lambda: _with("llama", is_causal=False),
        "LlamaForCausalLM has is_causal=False",
    ),
    "replaced forward": (
        lambda: _replaced(models.build("llama")),
        "LlamaForCausalLM.forward was replaced on this model",
    ),
    "own forward": (
        lambda: ScaledForCausalLM(models.build("llama").config),
        "ScaledForCausalLM has a forward of its own",
    ),
    "data parallel": (
        lambda: nn.DataParallel(models.build("llama")),
        "DataParallel would not see the passes of the model inside it",
    ),
    "unknown": (Plain, "Plain is not of a kind known to run on selected positions"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals(kind, caplog):
    make, reason = REFUSALS[kind]
    model = make()
    assert refusal(model).startswith(reason)
    with pytest.raises(ValueError, match=f"^split='token' cannot be had, 'sequence' can: {reason}"):
        CGGRModel(model)
    with caplog.at_level(logging.INFO, logger="cggr.torch.model"):
        assert RoutedModel(model).split == "sequence"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"split='auto': training on whole sequences (split='sequence'): {reason}"
    )


def test_auto_takes_tokens_where_it_can(caplog):
    with caplog.at_level(logging.INFO, logger="cggr.torch.model"):
        assert RoutedModel(models.build("llama")).split == "token"
        assert RoutedModel(models.build("llama"), scope="batch").split == "sequence"
    first, second = [record.getMessage() for record in caplog.records]
    assert first == "split='auto': training on tokens (split='token')."
    assert "scope='batch'" in second


def test_a_batch_wide_ranking_is_refused():
    message = (
        "scope must be 'sequence' with split='token', which gives every sequence as many slots; "
        "got 'batch'."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        CGGRModel(models.build("llama"), scope="batch")
    assert CGGRModel(models.build("llama"), scope="sequence").split == "token"
    assert CGGRModel(models.build("llama"), config=RoutingConfig()).split == "token"


def test_an_attention_changed_later_is_refused_at_the_step():
    model = build("llama")
    wrapped = CGGRModel(model, **OFF)
    model.config._attn_implementation_internal = "flex_attention"
    ids = models.token_ids(2, 8)
    with pytest.raises(ValueError, match="uses 'flex_attention' attention"):
        wrapped(ids, labels=ids)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 3, 8)},
            (
                "attention_mask must have shape (B, S), or four dimensions (B or 1, H or 1, S, S) "
                "with split='token', where the labels make B = 2 and S = 8, got (2, 3, 8)."
            ),
        ),
        (
            {"position_ids": torch.zeros(3, 2, 8, dtype=torch.long)},
            (
                "position_ids must have shape (B, S) or (1, S) with split='token', where the "
                "labels make B = 2 and S = 8, got (3, 2, 8)."
            ),
        ),
        (
            {"pixel_values": torch.zeros(2, 5)},
            (
                "split='token' cannot tell which part of pixel_values (2, 5) belongs to a "
                "position: it takes input_ids, inputs_embeds, attention_mask, position_ids, "
                "token_type_ids; split='sequence' takes it."
            ),
        ),
        (
            {"attention_mask": {"full_attention": torch.ones(2, 1, 8, 8)}},
            (
                "attention_mask must be a tensor with split='token', got dict; split='sequence' "
                "takes it."
            ),
        ),
        (
            {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.int32)},
            (
                "attention_mask of four dimensions must be bool, or floating where it is added to "
                "the scores, got torch.int32."
            ),
        ),
    ],
    ids=["mask", "positions", "else", "dict", "integers"],
)
def test_inputs_that_do_not_fit(inputs, message):
    wrapped = CGGRModel(build("llama"), **OFF)
    ids = models.token_ids(2, 8)
    with pytest.raises(ValueError, match=exactly(message)):
        wrapped(ids, labels=ids, **inputs)


# Adapters and compilers


# Of transformers' own names, which peft still uses.


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.0, **options))


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
    cache = Cache(layer_class_to_replicate=functools.partial(_Detaching, mask))
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


@of_peft
def test_learned_positions_before_the_sequence_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(models.build("llama"), config)
    with pytest.raises(ValueError, match="puts learned positions before the sequence"):
        CGGRModel(adapted)


@of_peft
def test_what_peft_does_itself_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    adapted = peft.get_peft_model(models.build("llama"), config)
    for model in (adapted, nn.DataParallel(adapted)):
        with pytest.raises(ValueError, match=r"alora_invocation_tokens|DataParallel"):
            CGGRModel(model)
    wrapped = CGGRModel(lora(models.build("llama"), target_modules=["q_proj"]), **OFF)
    ids = models.token_ids(2, 8)
    with pytest.raises(ValueError, match=r"^adapter_names cannot be given with split='token'"):
        wrapped(ids, labels=ids, adapter_names=["default", "default"])


@of_peft
def test_adapters_that_mix_positions_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LilyConfig(target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(models.build("llama"), config)
    with pytest.raises(ValueError, match="has an adapter of kind LILY, which is not known to"):
        CGGRModel(adapted)
    assert RoutedModel(adapted).split == "sequence"


@of_peft
def test_every_adapter_that_is_taken_exists():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    assert set(_ADAPTERS) <= {kind.value for kind in peft.PeftType}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"past_key_values": object()}, "past_key_values cannot be given with split='token'"),
        ({"logits_to_keep": 2}, "logits_to_keep cannot be given with split='token'"),
        ({"is_causal": False}, "is_causal cannot be given with split='token'"),
    ],
    ids=["cache", "logits", "is_causal"],
)
def test_inputs_that_the_passes_would_drop(inputs, message):
    wrapped = CGGRModel(build("llama"), **OFF)
    ids = models.token_ids(2, 8)
    with pytest.raises(ValueError, match=f"^{message}"):
        wrapped(ids, labels=ids, **inputs)


def test_neither_ids_nor_embeddings():
    with pytest.raises(ValueError, match=r"^input_ids or inputs_embeds must be given, got neither"):
        CGGRModel(build("llama"), **OFF)(labels=models.token_ids(2, 8))


def test_a_wrong_label_is_named_where_nothing_is_scored():
    wrapped = CGGRModel(build("llama"), selection="random", **OFF)
    ids = models.token_ids(2, 8)
    labels = ids.clone()
    labels[1, 3] = 999
    with pytest.raises(ValueError, match=r"labels must be in \[0, 67\) .*, got 999 at position"):
        wrapped(ids, labels=labels)


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


def check_packed(model, selections):
    """A step on packed sequences against the losses of transformers' own forward."""
    ids = models.token_ids(2, 12)
    positions = (torch.arange(12) % 6).expand(2, 12)
    wrapped = CGGRModel(model, selection="random", min_tokens_ratio=0.4, **OFF)
    loss = wrapped(ids, labels=ids, position_ids=positions)
    with torch.no_grad():  # without a cache, as its users train it
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        nll = token_losses(model, shifted("llama", ids), **inputs)
    assert loss.item() == pytest.approx(nll[selections[0].mask].mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["falcon", "bert"])
def test_models_that_do_not_separate_packed_sequences_do_not_here(name, selections):
    if name == "falcon":
        model = build(name)
    else:
        config = transformers.BertConfig(
            vocab_size=models.VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            is_decoder=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = transformers.BertLMHeadModel(config).train()
    check_packed(model, selections)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox"]
)
def test_packed_losses_are_those_of_transformers(name, selections):
    check_packed(build(name), selections)


def test_heads_that_share_their_values():
    config = transformers.FalconConfig(
        vocab_size=models.VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=1,
        new_decoder_architecture=True,
        alibi=False,
    )
    model = transformers.FalconForCausalLM(config).train()
    wrapped = CGGRModel(model, min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(2, 8)
    wrapped(ids, labels=ids).backward()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_keys_that_heads_share_are_not_copied(name, checkpointed, monkeypatch):
    model = build(name, "sdpa")
    if checkpointed:
        enable_checkpointing(model, False)
    wrapped = CGGRModel(model, min_tokens_ratio=0.4, **OFF)
    attend, key_heads = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, *args, **kwargs):
        key_heads.append(key.shape[1])
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ids = models.token_ids(2, 8)
    loss = wrapped(ids, labels=ids)
    n_layers = model.config.num_hidden_layers
    second = key_heads[n_layers:]
    assert second == n_layers * [2]
    assert model.config._attn_implementation == "sdpa"
    loss.backward()


@pytest.fixture
def kernel_calls(monkeypatch):
    """Calls of the attention kernels, which are asked for."""
    pytest.importorskip("triton", reason="Triton is not installed, which has wheels for Linux only")
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")
    calls, fused = [], selected_attention.fused

    def counted(*args):
        calls.append(args)
        return fused(*args)

    monkeypatch.setattr(selected_attention, "fused", counted)
    return calls


INTERFACED = [name for name, attention in CASES if attention == "sdpa" and name != "falcon"]
INTERFACED.append("gemma2")


def calls_of(name):
    """In a step: those of the second pass; with a soft-cap of the first too."""
    return models.LAYERS * (2 if name == "gemma2" else 1)


@pytest.mark.parametrize("name", INTERFACED)
def test_selected_attention_by_kernels(name, selections, kernel_calls):
    model = build(name).to(DEVICE)
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 12).to(DEVICE)
    check_step(wrapped, model, name, selections, models.labels_for(name, ids), input_ids=ids)
    assert len(kernel_calls) == calls_of(name)


@pytest.mark.parametrize(
    ("name", "inputs", "capacity", "passes"),
    [
        # A first pass without a mask, or with one that transformers may look into, is by sdpa.
        ("mistral", "left padding", "exact", 1),
        ("bert", "right padding", "exact", 1),
        ("gemma3", "gaps", "exact", 1),
        ("mistral", "left padding", "static", 2),
        ("bert", "gaps", "static", 2),
        ("gemma3", "packed", "static", 2),
        ("mistral", "packed", "exact", 2),
        ("gemma2", "packed", "static", 2),
        ("gemma2", "left padding", "exact", 2),
        ("gemma2", "gaps", "exact", 2),
        *(
            (name, "own, " + kind, capacity, 0)
            for name in ("llama", "gemma2")
            for kind in ("bool", "added")
            for capacity in ("exact", "static")
            if (name, kind) != ("gemma2", "bool")  # which adds it
        ),
    ],
)
def test_what_the_kernels_can_see(name, inputs, capacity, passes, kernel_calls, monkeypatch):
    ids = models.token_ids(3, 12).to(DEVICE)
    mask = torch.ones_like(ids)
    given = {"attention_mask": mask}
    if inputs == "packed":
        given = {"position_ids": (torch.arange(12) % 5).expand(3, 12).contiguous().to(DEVICE)}
    elif inputs == "left padding":
        mask[0, :5] = mask[1, :1] = 0
    elif inputs == "right padding":
        mask[0, 7:] = mask[1, 10:] = 0
    elif inputs.startswith("own"):
        place = torch.arange(12, device=DEVICE)
        seen = (place[:, None] >= place) & (place[:, None] % 4 >= place % 4)  # no interval
        added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        given = {"attention_mask": (seen if inputs == "own, bool" else added)[None, None]}
    else:
        mask[0, 3:5] = 0
    options = {"selection": "topk", "min_tokens_ratio": 0.4, "capacity": capacity}
    check_kernels(
        build(name).to(DEVICE), ids, models.labels_for(name, ids), monkeypatch, given, **options
    )
    assert len(kernel_calls) == passes * models.LAYERS


def check_kernels(model, ids, labels, monkeypatch, given, **options):
    """A step by kernels against the same with masks."""
    found = []
    for named in ("triton", "eager"):
        monkeypatch.setenv("CGGR_IMPLEMENTATION", named)
        model.zero_grad()
        loss = CGGRModel(model, **options, **OFF)(ids, labels=labels, **given)
        loss.backward()
        found.append((loss.item(), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_same_gradients(found[0][1], found[1][1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "bert"])
def test_kernels_under_autocast(name, kernel_calls):
    model = build(name).to(DEVICE)
    ids = models.token_ids(3, 12).to(DEVICE)
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.3, **OFF)
    # Not bfloat16, which the interpreter cannot multiply.
    with torch.autocast(DEVICE, dtype=torch.float16):
        loss = wrapped(ids, labels=models.labels_for(name, ids))
    loss.backward()
    assert {x.dtype for args in kernel_calls for x in args[:3]} == {torch.float16}
    assert len(kernel_calls) == calls_of(name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_kernels_under_checkpointing(reentrant, kernel_calls, monkeypatch):
    model = build("llama").to(DEVICE)
    enable_checkpointing(model, reentrant)
    ids = models.token_ids(3, 12).to(DEVICE)
    check_kernels(model, ids, ids, monkeypatch, {}, selection="importance", min_tokens_ratio=0.3)
    assert len(kernel_calls) == 2 * models.LAYERS  # forward, and again


def test_a_dense_step_with_a_soft_cap_is_by_kernels(kernel_calls, monkeypatch):
    ids = models.token_ids(3, 12).to(DEVICE)
    model = build("gemma2").to(DEVICE)
    check_kernels(model, ids, ids, monkeypatch, {}, min_tokens_ratio=1.0)
    assert len(kernel_calls) == models.LAYERS
    assert model.config._attn_implementation == "eager"


def test_soft_capped_attention_of_another_file(kernel_calls, monkeypatch):
    import transformers.models.gemma2.modeling_gemma2 as gemma2

    model = build("gemma2").to(DEVICE)
    mine = type("MyAttention", (gemma2.Gemma2Attention,), {"__module__": __name__})
    for layer in model.model.layers:
        layer.self_attn.__class__ = mine
    ids = models.token_ids(2, 8).to(DEVICE)
    check_kernels(model, ids, ids, monkeypatch, {}, min_tokens_ratio=0.4)
    assert len(kernel_calls) == calls_of("gemma2")


def test_dropout_with_a_soft_cap(kernel_calls, monkeypatch):
    ids = models.token_ids(3, 12).to(DEVICE)
    model = build("gemma2", attention_dropout=0.5).to(DEVICE)
    wrapped = CGGRModel(model, min_tokens_ratio=0.3, **OFF)
    wrapped(ids, labels=ids).backward()
    assert not kernel_calls
    model.zero_grad()
    dense = CGGRModel(model, min_tokens_ratio=1.0, **OFF)  # masks of intervals, written out
    torch.manual_seed(0)
    loss = dense(ids, labels=ids)
    torch.manual_seed(0)
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "eager")
    torch.testing.assert_close(loss, dense(ids, labels=ids))


def test_dropout_of_attention_masks_as_before(kernel_calls):
    model = build("llama", attention_dropout=0.5).to(DEVICE)
    wrapped = CGGRModel(model, min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 12).to(DEVICE)
    wrapped(ids, labels=ids).backward()
    assert not kernel_calls
    model.eval()  # no dropout: the same as without
    split = TokenSplit(model)
    index = torch.tensor([[0, 5, 11]], device=DEVICE).expand(3, -1)
    with torch.no_grad():
        recorded = split.record({"input_ids": ids}, ids.shape, synchronise=True)
        by_kernels = split.rows(recorded, index, None)
        assert len(kernel_calls) == models.LAYERS
        visible = recorded.visible._replace(by_kernels=False)
        recorded = recorded._replace(visible=visible)
        torch.testing.assert_close(split.rows(recorded, index, None), by_kernels)
    rows = [torch.tensor([row]) for row in ([0, 1], [3, 6], [2, 5])]
    expanded = row_attention._expanded(row_attention.as_mask(*rows), 2, 7)
    assert expanded.int().tolist() == [[[[1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0]]]]
    keys = torch.tensor([[True, False, True, True, True, False, True]])
    expanded = row_attention._expanded(row_attention.as_mask(*rows, keys), 2, 7)
    assert expanded.int().tolist() == [[[[1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]]]


def test_another_forward_in_the_middle_of_a_pass_is_its_own():
    model = build("llama", "sdpa")
    other = transformers.LlamaForCausalLM(model.config)  # the same configuration
    ids, mask = models.token_ids(2, 8), (torch.arange(8) > torch.tensor([[0], [3]])).long()
    with torch.no_grad():
        expected = other(ids, attention_mask=mask, use_cache=False).logits
    found = []

    def run_other(module, args, kwargs):
        if torch.is_grad_enabled():
            with torch.no_grad():
                found.append(other(ids, attention_mask=mask, use_cache=False).logits)

    with model.model.layers[1].register_forward_pre_hook(run_other, with_kwargs=True):
        CGGRModel(model, min_tokens_ratio=0.4, **OFF)(ids, labels=ids).backward()
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


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
    assert_same_gradients(renamed, want, 1e-6)


def test_a_pass_that_fails_leaves_the_attention_as_it_was():
    model = build("llama", "sdpa")
    wrapped = CGGRModel(model, min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(2, 8)

    def fail(module, args, kwargs, output):
        if torch.is_grad_enabled():
            raise RuntimeError("out of memory")

    failing = model.model.layers[1].register_forward_hook(fail, with_kwargs=True)
    with failing, pytest.raises(RuntimeError, match=exactly("out of memory")):
        wrapped(ids, labels=ids)
    assert model.config._attn_implementation == "sdpa"
    wrapped(ids, labels=ids).backward()


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
def test_a_compiled_first_pass_has_a_mask_where_it_needs_one(name, given, masked):
    torch._dynamo.reset()
    passes, angles = [], []

    def keep(graph, inputs):
        passes.append([n for n in graph.graph.nodes if "scaled_dot_product" in str(n.target)])
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
        wrapped = CGGRModel(inner, selection="random", capacity="static", split="token", **OFF)
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
