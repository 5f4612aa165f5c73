"""The token split of CGGRModel: exact losses, and the gradient that it promises."""

import collections
import functools

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import truth
from token_steps import (
    CASES,
    OFF,
    CGGRModel,
    Detaching,
    array,
    assert_same_gradients,
    build,
    check_step,
    gradients,
    reference,
    shifted,
    token_losses,
    weights_of,
)
from transformers.cache_utils import Cache

from cggr.torch import CGGRScorer as RoutedScorer
from cggr.torch import create_truncated_router
from cggr.torch.token_split import TokenSplit


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
    options = {
        "selection": selection,
        "min_tokens_ratio": 0.3,
        "warmup_steps": 0,
        "dynamic_threshold": True,
    }
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


@pytest.mark.parametrize("capacity", ["exact", "static"])
def test_completions_have_slots_for_them_alone(capacity, selections):
    model = build("llama")
    options = {"min_tokens_ratio": 1.0, "max_eligible_ratio": 1 / 3}
    wrapped = CGGRModel(model, capacity=capacity, **options, **OFF)
    ids = models.token_ids(4, 12)
    labels = ids.clone()
    labels[:, :8] = -100
    selection = check_step(wrapped, model, "llama", selections, labels, input_ids=ids)
    assert selection.indices.shape == (4, 4)
    assert torch.equal(selection.mask, shifted("llama", labels) != -100)


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
                layer_class_to_replicate=functools.partial(Detaching, mask[b : b + 1, part])
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


def test_eval_is_the_dense_loss_and_no_labels_the_models_output():
    model = build("llama")
    wrapped = CGGRModel(model, **OFF)
    ids = models.token_ids(2, 9)
    assert torch.equal(wrapped(ids).logits, model(ids).logits)
    wrapped.eval()
    expected = model(ids, labels=ids).loss.item()
    assert wrapped(ids, labels=ids).item() == pytest.approx(expected, rel=1e-6)


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
