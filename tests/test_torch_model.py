import functools
import re
import types

import models
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
import truth
from token_steps import of_peft
from torch import nn

import cggr.torch
from cggr.torch import CGGRScorer, RoutingConfig, create_truncated_router
from cggr.torch.token_split import TokenSplit

# The token split has tests of its own: test_torch_token_split.py.
CGGRModel = functools.partial(cggr.torch.CGGRModel, split="sequence")
OFF = {"warmup_steps": 0, "dynamic_threshold": False}
SELECTIONS = truth.SELECTIONS


def exactly(message):
    return f"^{re.escape(message)}$"


def array(tensor):
    return tensor.detach().float().numpy().astype(np.float64)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def trained_batches(model):
    """The ids of every forward with gradient, in a list that fills as the model runs."""
    batches = []

    def note(module, args, kwargs):
        if torch.is_grad_enabled():
            batches.append(args[0] if args else kwargs["input_ids"])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return batches


def aligned(labels, attention_mask=None, *, shift=True):
    """What every position is trained on, written out: label t + 1, or label t if not `shift`."""
    batch, length = labels.shape
    targets = np.full((batch, length), -100)
    kept = np.ones((batch, length)) if attention_mask is None else attention_mask.numpy()
    for b in range(batch):
        for t in range(length):
            source = t + 1 if shift else t
            if source < length and kept[b, t] and kept[b, source]:
                targets[b, t] = labels[b, source]
    return targets


def chosen_sequences(router_logits, targets, options, *, step=0, draw=0):
    """The rule applied to the mean difficulty of each sequence: (truth.Truth, ratio)."""
    cfg = truth.merged(options)
    statistics = truth.statistics(array(router_logits), targets)
    difficulty = truth.difficulty(statistics, cfg["scoring"])
    eligible = targets != -100
    mean = np.where(eligible, difficulty, 0.0).sum(axis=1) / np.maximum(eligible.sum(axis=1), 1)
    ratio = truth.token_ratio(options, step, statistics["confidence"], eligible)
    # The ratio follows the tokens; the rule then ranks B sequences as if they were one of B tokens.
    at_ratio = {
        **options,
        "min_tokens_ratio": ratio / truth.ONE,
        "warmup_steps": 0,
        "dynamic_threshold": False,
    }
    chosen = truth.select(
        mean.astype(np.float32)[None],
        at_ratio,
        draw=draw,
        eligible=eligible.any(axis=1)[None],
    )
    return chosen._replace(ratio=ratio)


def sequence_loss(logits, targets, chosen, *, importance=False, num_items=None):
    """Σ w nll over the tokens of the chosen sequences, divided as the equations say."""
    nll = truth.statistics(array(logits), targets)["nll"]
    eligible = targets != -100
    weights = truth.token_weights(chosen)[0][:, None] * eligible
    total = (weights * np.where(eligible, nll, 0.0)).sum()
    n = eligible.sum() if importance else (eligible & (weights > 0)).sum()
    return total / n if num_items is None else total / n * eligible.sum() / num_items


class Recorder(nn.Module):
    """Logits looked up by id; keeps what it was called with."""

    def __init__(self, vocab=models.VOCAB):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(2 * torch.randn(vocab, vocab, generator=generator))
        self.calls = []

    def forward(self, ids=None, **inputs):
        self.calls.append({"ids": ids, "grad": torch.is_grad_enabled(), **inputs})
        if ids is None:
            return inputs["inputs_embeds"] @ self.table
        return self.table[ids]


def recorded_step(selection="stratified", batch=6, **inputs):
    """A training step on half the sequences: the recorder, all ids, and the trained call."""
    model = Recorder()
    ids = models.token_ids(batch)
    wrapped = CGGRModel(model, Recorder(), min_tokens_ratio=0.5, selection=selection, **OFF)
    wrapped(ids, labels=ids, **inputs).backward()
    (call,) = model.calls
    rows = [(ids == row).all(dim=1).nonzero().item() for row in call["ids"]]
    assert len(rows) == batch // 2
    return wrapped, rows, call


# Every architecture


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_training_step(name):
    model = models.build(name)
    input_ids = models.token_ids()
    labels = models.labels_for(name, input_ids)
    model(input_ids=input_ids, labels=labels).loss.backward()
    dense = {key: g is not None and bool((g != 0).any()) for key, g in gradients(model).items()}
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
        routed = create_truncated_router(model, num_layers=1)(input_ids)
    model.zero_grad()
    options = {"selection": "topk", "min_tokens_ratio": 0.5, **OFF}
    wrapped = CGGRModel(model, create_truncated_router(model, num_layers=1), **options)
    batches = trained_batches(model)
    loss = wrapped(input_ids, labels=labels)
    loss.backward()
    targets = aligned(labels, shift=name not in models.MASKED)
    chosen = chosen_sequences(routed, targets, options)
    (batch,) = batches
    assert torch.equal(batch, input_ids[torch.from_numpy(chosen.mask[0])])
    assert batch.shape[0] == 2
    assert loss.item() == pytest.approx(sequence_loss(logits, targets, chosen), rel=1e-5)
    # Embedding rows aside, what a dense step reaches is reached.
    reached = {key: g is not None and bool((g != 0).any()) for key, g in gradients(model).items()}
    assert reached == dense
    assert sum(reached.values()) > 10


@pytest.mark.parametrize("name", models.ARCHITECTURES)
@pytest.mark.parametrize("selection", ["stratified", "importance"])
def test_ratio_one_is_the_models_own_loss_exactly(name, selection):
    model = models.build(name)
    input_ids = models.token_ids()
    labels = models.labels_for(name, input_ids)
    if name not in models.MASKED:
        labels[1, :4] = -100
    dense = model(input_ids=input_ids, labels=labels, **models.no_cache(name)).loss
    dense.backward()
    want = gradients(model)
    model.zero_grad()
    wrapped = CGGRModel(
        model,
        create_truncated_router(model, num_layers=1),
        min_tokens_ratio=1.0,
        selection=selection,
    )
    loss = wrapped(input_ids, labels=labels)
    loss.backward()
    assert torch.equal(loss, dense)
    for key, got in gradients(model).items():
        assert (got is None) == (want[key] is None), key
        assert got is None or torch.equal(got, want[key]), key


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_saved_once_and_loaded_again(name, tmp_path):
    model = models.build(name)
    wrapped = CGGRModel(model, create_truncated_router(model, num_layers=1), warmup_steps=9)
    input_ids = models.token_ids()
    labels = models.labels_for(name, input_ids)
    wrapped(input_ids, labels=labels)
    wrapped.step()
    counters = {"scorer.step_count", "scorer.draw_count"}
    assert set(wrapped.state_dict()) == {f"model.{key}" for key in model.state_dict()} | counters
    parameters = list(wrapped.parameters())
    assert len({id(p) for p in parameters}) == len(parameters) == len(list(model.parameters()))
    safetensors.torch.save_model(wrapped, tmp_path / "model.safetensors")
    other = models.build(name, seed=9)
    restored = CGGRModel(other, create_truncated_router(other, num_layers=1), warmup_steps=9)
    missing, unexpected = safetensors.torch.load_model(restored, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    with torch.no_grad():
        assert torch.equal(restored(input_ids, labels=labels), wrapped(input_ids, labels=labels))
    assert restored.get_metrics() == wrapped.get_metrics()
    assert restored.get_metrics()["step"] == 1


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_eval_mode_is_the_models_own_loss(name):
    model = models.build(name)
    input_ids = models.token_ids()
    labels = models.labels_for(name, input_ids)
    wrapped = CGGRModel(model, create_truncated_router(model, num_layers=1), **OFF).eval()
    assert torch.equal(
        wrapped(input_ids, labels=labels), model(input_ids=input_ids, labels=labels).loss
    )
    assert wrapped.get_metrics() == {}


# Selection


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_rule_ranks_the_sequences(selection, scope, capacity):
    options = {
        "selection": selection,
        "scope": scope,
        "min_tokens_ratio": 0.3,
        "warmup_steps": 10,
        "seed": 5,
    }
    model = models.build("llama")
    router = create_truncated_router(model, num_layers=1)
    input_ids = models.token_ids(9)
    labels = input_ids.clone()
    labels[3, 2:7] = -100
    labels[5] = -100  # nothing to learn here
    with torch.no_grad():
        logits, routed = model(input_ids=input_ids).logits, router(input_ids)
    wrapped = CGGRModel(model, router, **options, capacity=capacity)
    counters = {"scorer.step_count": torch.tensor(8), "scorer.draw_count": torch.tensor(3)}
    wrapped.load_state_dict(counters, strict=False)
    targets = aligned(labels)
    chosen = chosen_sequences(routed, targets, options, step=8, draw=3)
    importance = selection == "importance"
    for num_items in (None, 150):
        wrapped.scorer.draw_count.fill_(3)
        loss = wrapped(input_ids, labels=labels, num_items_in_batch=num_items)
        want = sequence_loss(logits, targets, chosen, importance=importance, num_items=num_items)
        assert loss.item() == pytest.approx(want, rel=1e-5)
    kept = chosen.mask[0]
    assert 2 <= kept.sum() < 8
    assert not kept[5]
    metrics = wrapped.get_metrics()
    assert metrics["step"] == 8
    assert metrics["token_ratio"] == chosen.ratio / truth.ONE
    assert metrics["tokens_selected"] == (targets[kept] != -100).sum()
    assert metrics["tokens_total"] == (targets != -100).sum()


def test_metrics_are_those_of_the_tokens():
    model = models.build("llama")
    router = create_truncated_router(model, num_layers=1)
    wrapped = CGGRModel(model, router, warmup_steps=0)
    assert wrapped.get_metrics() == {}
    input_ids = models.token_ids()
    wrapped(input_ids, labels=input_ids)
    targets = aligned(input_ids)
    eligible = targets != -100
    statistics = truth.statistics(array(router(input_ids)), targets)
    difficulty = truth.difficulty(statistics, "combined")
    metrics = wrapped.metrics
    assert metrics == wrapped.get_metrics()
    assert list(metrics) == [
        "step",
        "token_ratio",
        "tokens_selected",
        "tokens_total",
        "avg_confidence",
        "avg_entropy",
        "avg_difficulty",
        "selection",
        "scoring",
    ]
    assert metrics["avg_confidence"] == pytest.approx(
        statistics["confidence"][eligible].mean(), rel=1e-5
    )
    assert metrics["avg_entropy"] == pytest.approx(statistics["entropy"][eligible].mean(), rel=1e-5)
    assert metrics["avg_difficulty"] == pytest.approx(difficulty[eligible].mean(), rel=1e-5)


def test_importance_is_unbiased():
    model = Recorder()
    ids = models.token_ids(12)
    dense = F.cross_entropy(
        model.table[ids][:, :-1].reshape(-1, models.VOCAB), ids[:, 1:].reshape(-1)
    ).item()
    wrapped = CGGRModel(
        model, Recorder(), selection="importance", min_tokens_ratio=0.5, scoring="loss", **OFF
    )
    losses = [wrapped(ids, labels=ids).item() for _ in range(300)]
    error = np.std(losses, ddof=1) / np.sqrt(300)
    assert 0 < 4 * error < 0.1 * dense
    assert abs(np.mean(losses) - dense) < 4 * error


def test_excess_loss_takes_the_reference_of_the_predicting_position():
    model, ids = Recorder(), models.token_ids(6)
    batches = trained_batches(model)
    nll = truth.statistics(array(model.table[ids]), aligned(ids))["nll"]
    reference = torch.from_numpy(nll.astype(np.float32))
    reference[4] -= 5  # only this sequence is harder than the reference says
    reference[:, -1] = -1e6  # where nothing is predicted
    wrapped = CGGRModel(model, scoring="excess_loss", min_tokens_ratio=0.1, **OFF)
    wrapped(ids, labels=ids, reference_nll=reference)
    assert torch.equal(batches[-1], ids[4:5])


def test_the_random_control_pays_for_no_score():
    ids = models.token_ids(8)
    router = Recorder()
    wrapped = CGGRModel(Recorder(), router, selection="random", min_tokens_ratio=0.25, **OFF)
    kept = []
    for draw in range(4):
        wrapped(ids, labels=ids).backward()
        call = wrapped.model.calls[-1]
        kept.append(call["ids"])
        bits = truth.uniform_bits_array(0, draw, 0, np.arange(8))
        assert torch.equal(call["ids"], ids[np.sort(np.argsort(bits)[:2])])
    assert router.calls == []
    assert not torch.equal(kept[0], kept[1])
    metrics = wrapped.get_metrics()
    assert metrics["tokens_selected"] == 18
    assert "avg_difficulty" not in metrics  # nothing was scored
    adaptive = CGGRModel(
        Recorder(), router, selection="random", warmup_steps=0, dynamic_threshold=True
    )
    adaptive(ids, labels=ids)
    assert len(router.calls) == 1  # the dynamic threshold needs the confidence


# Capacity and schedule


@pytest.mark.parametrize("selection", ["topk", "stratified", "importance"])
def test_static_capacity_equals_exact_capacity_in_at_most_four_sizes(selection):
    options = {"selection": selection, "min_tokens_ratio": 0.2, "warmup_steps": 12}
    options["dynamic_threshold"] = True
    losses, sizes, grads = {}, {}, {}
    for capacity in ("exact", "static"):
        model = models.build("llama")
        router = create_truncated_router(model, num_layers=1)
        wrapped = CGGRModel(model, router, **options, capacity=capacity)
        batches = trained_batches(model)
        losses[capacity], grads[capacity] = [], []
        for step in range(15):
            model.zero_grad()
            ids = models.token_ids(16, seed=step)
            loss = wrapped(ids, labels=ids)
            loss.backward()
            losses[capacity].append(loss.item())
            grads[capacity].append(torch.cat([g.ravel() for g in gradients(model).values()]))
            wrapped.step()
        sizes[capacity] = [batch.shape[0] for batch in batches]
    assert sizes["static"] == [truth.capacity(options, step, 1, 16) for step in range(15)]
    assert 2 < len(set(sizes["static"])) <= 4
    assert len(set(sizes["exact"])) > 4
    assert losses["static"] == pytest.approx(losses["exact"], rel=1e-6)
    for static, exact in zip(grads["static"], grads["exact"], strict=True):
        assert (static - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("capacity", ["exact", "static"])
def test_a_resumed_run_repeats_its_sequences(capacity):
    options = {"selection": "importance", "warmup_steps": 6, "capacity": capacity}

    def run(wrapped, batches, steps):
        for step in steps:
            ids = models.token_ids(8, seed=step)
            wrapped(ids, labels=ids)
            wrapped.step()
        return batches

    model = Recorder()
    wrapped = CGGRModel(model, Recorder(), **options)
    batches = trained_batches(model)
    run(wrapped, batches, range(4))
    saved = {name: value.clone() for name, value in wrapped.state_dict().items()}
    batches.clear()
    want = list(run(wrapped, batches, range(4, 9)))
    resumed = CGGRModel(Recorder(), Recorder(), **options)
    resumed.load_state_dict(saved)
    batches = trained_batches(resumed.model)
    got = run(resumed, batches, range(4, 9))
    assert len(got) == 5
    assert all(map(torch.equal, got, want))


# Edges


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_all_labels_ignored(selection, capacity):
    model = models.build("llama")
    router = create_truncated_router(model, num_layers=1)
    input_ids = models.token_ids()
    for wrapped in (
        CGGRModel(model, router, selection=selection, capacity=capacity, **OFF),
        CGGRModel(model, router, selection=selection, capacity=capacity).eval(),
    ):
        model.zero_grad()
        loss = wrapped(input_ids, labels=torch.full_like(input_ids, -100))
        assert loss.item() == 0.0
        loss.backward()
        for key, gradient in gradients(model).items():
            assert torch.equal(gradient, torch.zeros_like(gradient)), key
        if wrapped.training:
            assert wrapped.metrics["tokens_selected"] == 0
            assert wrapped.metrics["tokens_total"] == 0


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("length", [2, 10])
def test_batch_of_one(selection, length):
    model = models.build("gpt2")
    input_ids = models.token_ids(1, length)
    wrapped = CGGRModel(model, create_truncated_router(model), selection=selection, **OFF)
    dense = model(input_ids=input_ids, labels=input_ids).loss
    loss = wrapped(input_ids, labels=input_ids)
    if selection == "importance":  # weights, all of them 1, are summed in another order
        torch.testing.assert_close(loss, dense, rtol=1e-6, atol=0)
    else:
        assert torch.equal(loss, dense)
    assert wrapped.metrics["tokens_selected"] == length - 1


def test_sequences_of_one_token_have_nothing_to_predict():
    model = models.build("llama")
    loss = CGGRModel(model)(models.token_ids(3, 1), labels=models.token_ids(3, 1))
    assert loss.item() == 0.0
    loss.backward()
    assert all((g == 0).all() for g in gradients(model).values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mamba"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    model = models.build(name)
    router = create_truncated_router(model, num_layers=1)
    input_ids = models.token_ids(6)
    mask = torch.ones_like(input_ids)
    for b in range(6):
        if side == "left":
            mask[b, :b] = 0
        elif b:
            mask[b, -b:] = 0
    labels = input_ids.clone()  # of padding too: the mask alone says what it is
    options = {"min_tokens_ratio": 0.5, "selection": "stratified", **OFF}
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        routed = router(input_ids, attention_mask=mask)
    targets = aligned(labels, mask, shift=name not in models.MASKED)
    chosen = chosen_sequences(routed, targets, options)
    wrapped = CGGRModel(model, router, **options)
    loss = wrapped(input_ids, labels=labels, attention_mask=mask)
    assert loss.item() == pytest.approx(sequence_loss(logits, targets, chosen), rel=1e-5)
    assert wrapped.metrics["tokens_total"] == (targets != -100).sum()
    everything = wrapped.eval()(input_ids, labels=labels, attention_mask=mask)
    nll = truth.statistics(array(logits), targets)["nll"]
    assert everything.item() == pytest.approx(nll[targets != -100].mean(), rel=1e-5)


def test_right_padding_is_the_models_own_loss_on_masked_labels():
    model = models.build("llama")
    input_ids = models.token_ids()
    mask = torch.ones_like(input_ids)
    mask[2:, 6:] = 0
    dense = model(
        input_ids=input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100)
    ).loss
    wrapped = CGGRModel(model, create_truncated_router(model), min_tokens_ratio=1.0)
    assert torch.equal(wrapped(input_ids, labels=input_ids, attention_mask=mask), dense)


# Ways to run a model on whole sequences


@pytest.fixture
def passes(monkeypatch):
    """One entry for every dense pass over a model's parts, with gradient."""
    passes = []
    hidden = TokenSplit.hidden
    monkeypatch.setattr(
        TokenSplit, "hidden", lambda *args, **kw: passes.append(1) or hidden(*args, **kw)
    )
    return passes


WAYS = {
    "plain": {},
    "left padding": {"side": "left"},
    "right padding": {"side": "right"},
    "packed": {"packed": True},
    "its own router": {"routed": False},
    "importance": {"selection": "importance"},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in models.ARCHITECTURES
        for way in (WAYS if name in ("llama", "gemma3", "bert") else ["right padding"])
        if name != "mamba"
    ],
)
def test_without_a_hook_to_call_a_step_is_that_of_the_model_itself(name, way, passes):
    given = dict(WAYS[way])
    side, packed = given.pop("side", None), given.pop("packed", False)
    routed = given.pop("routed", True)
    ids, inputs = models.token_ids(6), {}
    if side is not None:
        inputs["attention_mask"] = torch.ones_like(ids)
        for b in range(1, 6):
            inputs["attention_mask"][b, slice(b) if side == "left" else slice(-b, None)] = 0
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(4), torch.arange(6)]).expand(6, 10)
    labels = models.labels_for(name, ids)
    found = []
    for hooked in (False, True):
        model = models.build(name)
        calls = []
        if hooked:
            model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        router = create_truncated_router(model, num_layers=1) if routed else None
        wrapped = CGGRModel(model, router, capacity="static", min_tokens_ratio=0.5, **OFF, **given)
        loss = wrapped(ids, labels=labels, **inputs)
        loss.backward()
        assert (len(passes), len(calls)) == ((1, 0) if not hooked else (1, 1))
        metrics = wrapped.get_metrics()
        numbers = {key: x for key, x in metrics.items() if not isinstance(x, str)}
        found.append((loss.item(), gradients(model), numbers))
    (loss, grads, metrics), (want, want_grads, want_metrics) = found
    assert loss == pytest.approx(want, rel=1e-6)
    assert metrics == pytest.approx(want_metrics, rel=1e-6)
    for key, gradient in want_grads.items():
        error = (grads[key] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max() + 1e-8, key


@of_peft
def test_what_only_the_model_itself_can_run(passes):
    ids = models.token_ids()

    def used(model, wrap=None, capacity="static", **inputs):
        passes.clear()
        options = {"selection": "random", "min_tokens_ratio": 0.5, **OFF}
        wrapped = CGGRModel(model, capacity=capacity, **options)
        if wrap is not None:
            wrap(wrapped)
        wrapped(ids, labels=ids, **inputs).backward()
        return bool(passes)

    assert used(models.build("llama"))
    assert used(torch.compile(models.build("llama"), backend="eager"), capacity="exact")
    assert not used(models.build("llama"), capacity="exact")  # which costs the host less
    assert used(models.build("llama"), output_hidden_states=False)
    assert not used(models.build("llama"), logits_to_keep=0)
    assert not used(models.build("llama"), cache_position=torch.arange(10))
    for part, hook in (
        ("", "forward_pre"),
        ("lm_head", "full_backward"),
        ("lm_head", "full_backward_pre"),
        ("model.layers.1.mlp", "forward"),
    ):
        model = models.build("llama")
        register = getattr(model.get_submodule(part), f"register_{hook}_hook")
        register(lambda *_: None)
        assert not used(model), (part, hook)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not used(models.build("llama"))
    handle.remove()
    model = models.build("llama")
    plain = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: plain(*args, **kwargs)
    assert not used(model)
    model = models.build("llama")
    model.model.layers[0].mlp.forward = model.model.layers[1].mlp.forward
    assert not used(model)
    model = models.build("llama")
    model.forward = model.forward
    assert not used(model)
    model = models.build("llama")
    model.gradient_checkpointing_enable()
    assert not used(model)
    model = models.build("llama")
    model.model.layers[0].compile(backend="eager")  # by a compiler of its own
    assert not used(model)
    # What it is when it is called counts, not what it was.
    assert not used(
        models.build("llama"), lambda wrapped: setattr(wrapped, "model", models.build("mamba"))
    )
    assert used(
        models.build("mamba"), lambda wrapped: setattr(wrapped, "model", models.build("llama"))
    )


class TripledForCausalLM(transformers.LlamaForCausalLM):
    @functools.wraps(transformers.LlamaForCausalLM.forward)
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return type(output)(logits=3 * output.logits)


@of_peft
def test_a_forward_of_a_class_or_a_wrapper_is_called():
    ids = models.token_ids()
    model = models.build("llama")
    tripled = TripledForCausalLM(model.config)
    tripled.load_state_dict(model.state_dict())
    adapted = peft.get_peft_model(
        models.build("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=True)
    )
    plain = adapted.forward
    adapted.forward = lambda *args, **kwargs: types.SimpleNamespace(
        logits=3 * plain(*args, **kwargs).logits
    )
    want = F.cross_entropy(
        3 * model(ids).logits[:, :-1].reshape(-1, models.VOCAB), ids[:, 1:].reshape(-1)
    )
    for given in (tripled, adapted):
        loss = CGGRModel(given, capacity="static", min_tokens_ratio=1.0)(ids, labels=ids)
        torch.testing.assert_close(loss, want)
        with pytest.raises(ValueError, match=r"forward (of its own|was replaced)"):
            CGGRModel(given, split="token")


class Careful(nn.Linear):
    def __new__(cls, needed):
        return super().__new__(cls)

    def __init__(self, needed):
        super().__init__(needed, needed, bias=False)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("split", ["token", "sequence"])
def test_modules_that_are_made_in_other_ways(split):
    ids = models.token_ids()
    options = {"selection": "random", "capacity": "static", "split": split, **OFF}
    for change in (
        lambda linear: Careful(linear.in_features),
        lambda linear: torch.jit.script(linear),
        lambda linear: torch.fx.symbolic_trace(linear),
    ):
        losses = []
        for changes in (False, True):
            model = models.build("gemma3", num_key_value_heads=4)
            attention = model.model.layers[0].self_attn
            if changes:
                other = change(attention.q_proj)
                other.load_state_dict(attention.q_proj.state_dict())
                attention.q_proj = other
            loss = cggr.torch.CGGRModel(model, **options)(ids, labels=ids)
            loss.backward()
            losses.append((loss.item(), attention.q_proj.weight.grad))
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
        torch.testing.assert_close(losses[1][1], losses[0][1])


@pytest.mark.parametrize("split", ["token", "sequence"])
def test_a_model_that_returns_its_hidden_states_keeps_as_many(split):
    model, ids = models.build("llama", output_hidden_states=True), models.token_ids()
    wrapped = cggr.torch.CGGRModel(model, split=split, capacity="static", **OFF)
    for _ in range(3):
        wrapped(ids, labels=ids)
    assert not any(module._forward_hooks for module in model.modules())
    assert len(model(ids).hidden_states) == models.LAYERS + 1


def test_with_fewer_layers_than_the_router_had():
    model, ids = models.build("llama"), models.token_ids()
    router = create_truncated_router(model, num_layers=2)
    wrapped = CGGRModel(model, router, capacity="static", min_tokens_ratio=1.0)
    del model.model.layers[1:]
    want = model(ids, labels=ids).loss
    assert wrapped(ids, labels=ids).item() == pytest.approx(want.item(), rel=1e-6)


def test_a_replaced_model_scores_itself():
    ids = models.token_ids(6)
    options = {"min_tokens_ratio": 0.3, **OFF}
    for hooked in (False, True):
        other = models.build("llama", seed=4)
        if hooked:
            other.register_forward_hook(lambda *_: None)
        wrapped = CGGRModel(models.build("llama"), capacity="static", **options)
        wrapped.model = other
        want = CGGRModel(models.build("llama", seed=4), **options)(ids, labels=ids)
        torch.testing.assert_close(wrapped(ids, labels=ids), want)


# Inputs follow the selection


def test_tensors_of_the_sequences_follow_the_selection():
    mask = torch.ones(6, models.LENGTH, dtype=torch.int64)
    mask[torch.arange(6), torch.arange(6) + 4] = 0
    positions = torch.arange(60).reshape(6, 10)
    three = torch.stack([positions, positions + 100, positions + 200])
    types = (torch.arange(60) % 7).reshape(6, 10)
    four = torch.arange(6 * 4).reshape(6, 1, 2, 2)
    for name, value, kept in (
        ("attention_mask", mask, lambda rows: mask[rows]),
        ("attention_mask", four, lambda rows: four[rows]),
        ("attention_mask", four[:1], lambda rows: four[:1]),
        ("position_ids", positions, lambda rows: positions[rows]),
        ("position_ids", positions[:1], lambda rows: positions[:1]),
        ("position_ids", three, lambda rows: three[:, rows]),
        ("token_type_ids", types, lambda rows: types[rows]),
        ("anything", types, lambda rows: types[rows]),
        ("anything", torch.arange(6), lambda rows: torch.arange(6)[rows]),
        ("anything", torch.arange(5), lambda rows: torch.arange(5)),
    ):
        _, rows, call = recorded_step(**{name: value})
        assert torch.equal(call[name], kept(rows)), name
    _, _, call = recorded_step(cache_position=torch.arange(6))
    assert torch.equal(call["cache_position"], torch.arange(6))
    out = {}
    _, _, call = recorded_step(out=out)
    assert call["out"] is out
    _, rows, call = recorded_step(masks={"full": mask, "parts": [types, None]})
    assert torch.equal(call["masks"]["full"], mask[rows])
    assert torch.equal(call["masks"]["parts"][0], types[rows])


def test_an_input_that_could_be_of_sequences_or_positions_is_refused():
    ids = models.token_ids(4)[:, :4]
    wrapped = CGGRModel(Recorder(), Recorder(), min_tokens_ratio=0.3, **OFF)
    with pytest.raises(ValueError, match=r"kind of shape \(4,\) could belong to the 4 sequences"):
        wrapped(ids, labels=ids, kind=torch.arange(4))


def test_three_sequences_of_three_position_rows():
    # (3, B, S) with B = 3 must not be taken for a batch of three.
    positions = torch.arange(3 * 3 * 10).reshape(3, 3, 10)
    model, ids = Recorder(), models.token_ids(3)
    wrapped = CGGRModel(model, Recorder(), min_tokens_ratio=0.3, **OFF)
    wrapped(ids, labels=ids, position_ids=positions)
    (call,) = model.calls
    row = (ids == call["ids"]).all(dim=1).nonzero().item()
    assert torch.equal(call["position_ids"], positions[:, row : row + 1])


def test_other_inputs_pass_unchanged_and_absent_ones_are_not_passed():
    _, _, call = recorded_step(flag="yes", attention_mask=None)
    assert call["flag"] == "yes"
    assert set(call) == {"ids", "grad", "flag"}


def test_position_ids_of_a_real_model():
    model = models.build("llama")
    input_ids = models.token_ids()
    positions = torch.arange(10) + torch.tensor([0, 5, 11, 30])[:, None]
    positions[:, 5:] += 3
    for given in (positions, positions[2:3]):
        with torch.no_grad():
            inputs = {"position_ids": given, "attention_mask": torch.ones_like(input_ids)}
            logits = model(input_ids=input_ids, **inputs).logits
            router = create_truncated_router(model, num_layers=1)
            routed = router(input_ids, **inputs)
            options = {"min_tokens_ratio": 0.5, "selection": "topk", **OFF}
            loss = CGGRModel(model, router, **options)(input_ids, labels=input_ids, **inputs)
        targets = aligned(input_ids)
        chosen = chosen_sequences(routed, targets, options)
        assert loss.item() == pytest.approx(sequence_loss(logits, targets, chosen), rel=1e-5)


def test_token_type_ids_of_a_real_model():
    model = models.build("bert")
    input_ids = models.token_ids()
    types = torch.randint(0, 2, input_ids.shape, generator=torch.Generator().manual_seed(0))
    labels = models.labels_for("bert", input_ids)
    router = create_truncated_router(model, num_layers=1)
    with torch.no_grad():
        logits = model(input_ids=input_ids, token_type_ids=types).logits
        options = {"min_tokens_ratio": 0.5, "selection": "topk", **OFF}
        loss = CGGRModel(model, router, **options)(input_ids, labels, token_type_ids=types)
        chosen = chosen_sequences(router(input_ids, token_type_ids=types), labels.numpy(), options)
    want = sequence_loss(logits, labels.numpy(), chosen)
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_inputs_embeds_in_place_of_ids():
    model = models.build("llama")
    router = create_truncated_router(model, num_layers=1)
    input_ids = models.token_ids()
    options = {"min_tokens_ratio": 0.5, "selection": "stratified", **OFF}
    want = CGGRModel(model, router, **options)(input_ids, labels=input_ids)
    embeds = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    loss = CGGRModel(model, router, **options)(inputs_embeds=embeds, labels=input_ids)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    loss.backward()
    assert (embeds.grad != 0).any(dim=-1).any(dim=-1).sum() == 2


# Routers


def test_without_a_router_the_model_scores():
    model = models.build("llama")
    input_ids = models.token_ids(6)
    options = {"min_tokens_ratio": 0.5, "selection": "topk", **OFF}
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
        loss = CGGRModel(model, **options)(input_ids, labels=input_ids)
        explicit = CGGRModel(model, model, **options)
        assert torch.equal(explicit(input_ids, labels=input_ids), loss)
    targets = aligned(input_ids)
    chosen = chosen_sequences(logits, targets, options)
    assert loss.item() == pytest.approx(sequence_loss(logits, targets, chosen), rel=1e-5)
    # Registered once, whichever way it scores itself.
    assert set(explicit.state_dict()) == set(CGGRModel(model).state_dict())


def test_a_router_that_shares_a_parameter_is_not_registered():
    class Probe(nn.Module):
        def __init__(self, embedding, head):
            super().__init__()
            self.embedding = embedding
            self.head = head

        def forward(self, ids):
            return self.head(self.embedding(ids))

    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    wrapped = CGGRModel(model, Probe(*model))
    names = [name for name, _ in wrapped.named_parameters()]
    assert names == ["model.0.weight", "model.1.weight", "model.1.bias"]
    independent = CGGRModel(model, Probe(nn.Embedding(11, 8), nn.Linear(8, 11)))
    names = [name for name, _ in independent.named_parameters()]
    assert names[3:] == [
        "scorer.router.embedding.weight",
        "scorer.router.head.weight",
        "scorer.router.head.bias",
    ]
    ids = torch.arange(10).reshape(2, 5)
    independent(ids, labels=ids).backward()
    assert independent.scorer.router.head.weight.grad is None  # the router is not trained


def test_scoring_takes_no_gradient_and_training_takes_one_forward():
    model = models.build("llama")
    runs = []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    input_ids = models.token_ids()
    wrapped = CGGRModel(model, create_truncated_router(model, num_layers=1), **OFF)
    wrapped(input_ids, labels=input_ids)
    assert runs == [False, True]


# Call and construction


def test_the_positional_call_of_cggr_0_5_0():
    model = Recorder()
    ids = models.token_ids()
    wrapped = CGGRModel(model, Recorder(), **OFF)
    assert torch.equal(wrapped(ids, ids), CGGRModel(model, Recorder(), **OFF)(ids, labels=ids))


def test_without_labels_the_models_output():
    model = models.build("llama")
    input_ids = models.token_ids()
    for wrapped in (CGGRModel(model), CGGRModel(model).eval()):
        output = wrapped(input_ids, attention_mask=torch.ones_like(input_ids))
        want = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        assert type(output) is type(want)
        assert torch.equal(output.logits, want.logits)
        assert wrapped.scorer.draw_count.item() == 0
    assert torch.equal(
        model.eval().generate(input_ids, max_new_tokens=2, pad_token_id=0)[:, :10], input_ids
    )


def test_a_masked_model_is_not_shifted_and_shift_labels_overrides():
    model = models.build("roberta")
    input_ids = models.token_ids()
    labels = models.labels_for("roberta", input_ids)
    logits = model(input_ids=input_ids).logits.detach()
    for shift_labels, shift in (("auto", False), (False, False), (True, True)):
        wrapped = CGGRModel(model, min_tokens_ratio=1.0, shift_labels=shift_labels)
        targets = aligned(labels, shift=shift)
        nll = truth.statistics(array(logits), targets)["nll"][targets != -100]
        assert wrapped(input_ids, labels).item() == pytest.approx(nll.mean(), rel=1e-5)


def test_a_split_has_a_name():
    message = "split must be one of 'auto', 'token', 'backward', 'sequence', got 'row'."
    with pytest.raises(ValueError, match=exactly(message)):
        CGGRModel(Recorder(), split="row")


@pytest.mark.parametrize("training", [True, False])
def test_label_errors(training):
    model = models.build("llama")
    wrapped = CGGRModel(model, create_truncated_router(model), warmup_steps=5).train(training)
    input_ids = models.token_ids()
    labels = input_ids.clone()
    labels[2, 5] = models.VOCAB
    message = (
        f"labels must be in [0, {models.VOCAB}) or ignore_index=-100, "
        f"got {models.VOCAB} at position (2, 5)."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        wrapped(input_ids, labels=labels)
    with pytest.raises(
        ValueError, match=exactly("labels must have shape (B, S) with B >= 1, got (10,).")
    ):
        wrapped(input_ids, labels=labels[0])
    message = "targets must have the logits' leading shape (4, 10), got (4, 7)."
    with pytest.raises(ValueError, match=exactly(message)):
        wrapped(input_ids, labels=input_ids[:, :7])
    with pytest.raises(
        TypeError, match=r"^(labels|targets) must be integers, got torch\.float32\.$"
    ):
        wrapped(input_ids, labels=input_ids.float())
    with pytest.raises(ValueError, match=exactly("num_items_in_batch must be positive, got -1.")):
        wrapped(input_ids, labels=input_ids, num_items_in_batch=-1)


def test_construction_errors():
    model = Recorder()
    with pytest.raises(TypeError, match=r"^unknown option 'ratio'; the options are dynamic_thr"):
        CGGRModel(model, ratio=0.5)
    message = "give either config or options as keywords, got config and seed."
    with pytest.raises(TypeError, match=exactly(message)):
        CGGRModel(model, config=RoutingConfig(), seed=3)
    message = "shift_labels must be True, False or 'auto', got 'maybe'."
    with pytest.raises(ValueError, match=exactly(message)):
        CGGRModel(model, shift_labels="maybe")


def test_an_excess_score_without_a_reference():
    wrapped = CGGRModel(Recorder(), scoring="excess_loss")
    ids = models.token_ids()
    with pytest.raises(
        ValueError, match=exactly("scoring='excess_loss' needs reference_nll, got none.")
    ):
        wrapped(ids, labels=ids)


def test_a_model_that_returns_no_logits():
    class Silent(nn.Module):
        def forward(self, ids):
            return {"loss": torch.tensor(0.0)}

    ids = models.token_ids()
    message = (
        "the model must return logits: a tensor, an output with .logits, or a tuple that starts "
        "with them; got dict."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        CGGRModel(Silent(), Recorder(), **OFF)(ids, labels=ids)


def test_the_scorer_is_a_scorer():
    wrapped = CGGRModel(Recorder(), seed=3, warmup_steps=7)
    assert isinstance(wrapped.scorer, CGGRScorer)
    assert wrapped.config == RoutingConfig(seed=3, warmup_steps=7)
    wrapped.step()
    assert wrapped.scorer.step_count.item() == 1


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert", "mamba"])
def test_activation_checkpointing_changes_nothing(name):
    input_ids = models.token_ids()
    labels = models.labels_for(name, input_ids)
    results = []
    for checkpointing in (False, True):
        model = models.build(name)
        if checkpointing:
            # transformers renamed it between 5.17 and 5.23
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
        wrapped = CGGRModel(
            model, create_truncated_router(model, num_layers=1), selection="stratified", **OFF
        )
        loss = wrapped(input_ids, labels=labels)
        loss.backward()
        results.append((loss, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1].values(), results[1][1].values()))


def test_whole_sequences_are_selected_whatever_part_of_them_has_labels():
    # Which is a bound on tokens: of a quarter of the tokens, half of the sequences may have some.
    model = models.build("mamba")
    options = {"min_tokens_ratio": 1.0, "warmup_steps": 0, "dynamic_threshold": False}
    ids = models.token_ids(4, 8)
    labels = ids.masked_fill(torch.arange(8) < 6, -100)
    for capacity in ("exact", "static"):
        wrapped = CGGRModel(
            model, split="sequence", capacity=capacity, max_eligible_ratio=0.25, **options
        )
        wrapped(ids, labels=labels)
        assert wrapped.get_metrics()["tokens_selected"] == 8
