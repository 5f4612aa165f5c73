"""split="backward": one forward pass, and a backward pass of the selected tokens' rows."""

import collections
import contextlib
import functools
import itertools
import re

import models
import pytest
import token_steps
import torch
from token_steps import (
    CASES,
    OFF,
    assert_same_gradients,
    build,
    enable_checkpointing,
    gradients,
    lora,
    of_peft,
    shifted,
    token_losses,
    weights_of,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cggr.torch import CGGRModel as RoutedModel
from cggr.torch import create_truncated_router
from cggr.torch.backward_rows import BackwardRows, selected_backward

CGGRModel = functools.partial(RoutedModel, split="backward")
# What a layer adds to the residual stream, before any norm of it.
ADDED = re.compile(
    r"(self_attn\.o_proj|mlp\.down_proj|attn\.out_proj|mlp\.fc_out|self_attention\.dense"
    r"|attn\.c_proj|mlp\.c_proj|mlp\.dense_4h_to_h|attention\.dense|attention\.output\.dense|\d\.output\.dense)$"
)
# Falcon's linear layers are of a class of their own.
CASES = [(name, attention) for name, attention in CASES if name != "falcon"]


def compiling(test):
    """Of torch's own deprecations; and Dynamo does not run under the guard against float64."""
    for message in (
        "ignore:The .grad attribute of a Tensor that is not a leaf",
        "ignore:.*Function'> should not be instantiated:DeprecationWarning",
    ):
        test = pytest.mark.filterwarnings(message)(test)
    return pytest.mark.float64(test)


def counting(backend, graphs):
    """A backend that counts what it compiles."""
    compile_by = torch._dynamo.lookup_backend(backend)

    def counted(graph, inputs):
        graphs["compiled"] += 1
        return compile_by(graph, inputs)

    return counted


def reference(model, mask, weight, targets, **inputs):
    """Loss and gradients of a dense forward in which unselected tokens' additions are constants."""
    mask_BS1 = mask[..., None]
    hooks = [
        module.register_forward_hook(
            lambda _, __, x: torch.where(mask_BS1, x, x.detach()), always_call=True
        )
        for name, module in model.named_modules()
        if ADDED.search(name)
    ]
    assert len(hooks) == 2 * models.LAYERS
    model.zero_grad()
    try:
        nll = token_losses(model, targets, **inputs)
        loss = (torch.where(mask, weight, 0) * nll).sum()
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    found = gradients(model)
    model.zero_grad()
    return loss.detach(), found


check_step = functools.partial(token_steps.check_step, against=reference)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_loss_and_gradients_of_a_step(name, attention, selections):
    model = build(name, attention)
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 12)
    for _ in range(2):
        selection = check_step(
            wrapped, model, name, selections, models.labels_for(name, ids), input_ids=ids
        )
        assert 0 < selection.mask.sum() < selection.mask.numel() / 2


@of_peft
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_layers_that_run_again_run_for_the_selected_tokens(name, attention, selections):
    model = build(name, attention)
    enable_checkpointing(model, reentrant=False)
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 12)
    labels = models.labels_for(name, ids)
    selections.clear()
    losses = [wrapped(ids, labels=labels) for _ in range(2)]  # of which each has its own rows
    sum(losses).backward()
    actual = gradients(model)
    targets = shifted(name, labels)
    expected = dict.fromkeys(actual, 0.0)
    for selection in list(selections):
        weight = weights_of(selection, wrapped.config, (targets != -100).sum())
        _, found = reference(model, selection.mask, weight, targets, input_ids=ids)
        expected = {name: g + found[name] for name, g in expected.items()}
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize(
    "selection", ["topk", "stratified", "importance", "random", "sequence_aware"]
)
def test_every_selection(selection, scope, capacity, selections):
    if selection == "sequence_aware" and scope == "sequence":
        scope = "batch"  # which its floor is for
    model = models.build("llama")
    wrapped = CGGRModel(
        model,
        selection=selection,
        scope=scope,
        capacity=capacity,
        min_tokens_ratio=0.3,
        warmup_steps=8,
        dynamic_threshold=True,
    )
    wrapped.set_step(5)  # where there are more slots than are used
    ids, mask = models.token_ids(4, 11), torch.ones(4, 11, dtype=torch.long)
    mask[0, 6:] = 0
    mask[2, :] = 0
    labels = ids.masked_fill(ids == 5, -100)
    check_step(wrapped, model, "llama", selections, labels, input_ids=ids, attention_mask=mask)


def test_nothing_to_learn_from(selections):
    model = models.build("llama")
    wrapped = CGGRModel(model, selection="importance", **OFF)
    ids = models.token_ids(2, 8)
    loss = wrapped(ids, labels=torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters())


def test_all_tokens_give_the_dense_gradient():
    model = models.build("llama")
    ids = models.token_ids(3, 9)
    token_losses(model, shifted("llama", ids), input_ids=ids).sum().div(24).backward()
    expected = gradients(model)
    for options in ({"min_tokens_ratio": 1.0, **OFF}, {"warmup_steps": 9}):
        model.zero_grad()
        loss = CGGRModel(model, selection="stratified", **options)(ids, labels=ids)
        loss.backward()
        assert_same_gradients(gradients(model), expected)


def completions(ids, *, n_prompt):
    """Labels of what follows a prompt in each sequence."""
    labels = ids.clone()
    labels[:, :n_prompt] = -100
    return labels


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_completions_have_their_dense_loss_in_slots_for_them_alone(scope, capacity, selections):
    model = models.build("llama")
    options = {"min_tokens_ratio": 1.0, "max_eligible_ratio": 1 / 3, "scope": scope}
    wrapped = CGGRModel(model, capacity=capacity, **options, **OFF)
    ids = models.token_ids(4, 12)
    labels = completions(ids, n_prompt=8)
    selection = check_step(wrapped, model, "llama", selections, labels, input_ids=ids)
    assert selection.indices.shape == ((16,) if scope == "batch" else (4, 4))
    assert torch.equal(selection.mask, shifted("llama", labels) != -100)
    targets = shifted("llama", labels)
    dense = token_losses(model, targets, input_ids=ids).sum() / 16
    assert wrapped(ids, labels=labels).item() == pytest.approx(dense.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("split", "scope", "found"),
    [
        ("backward", "batch", ("batch", "13 of 48")),
        ("backward", "sequence", ("sequence", "4 of 12")),
        ("token", "sequence", ("sequence", "4 of 12")),
    ],
)
def test_more_completions_than_the_options_say_are_refused(split, scope, found):
    options = {"min_tokens_ratio": 0.5, "max_eligible_ratio": 0.25, "scope": scope}
    model = models.build("llama")
    wrapped, twin = (RoutedModel(model, split=split, **options, **OFF) for _ in range(2))
    ids = models.token_ids(4, 12)
    labels = completions(ids, n_prompt=9)
    too_many = labels.clone()
    too_many[2, 8] = ids[2, 8]  # one completion is longer
    message = (
        f"max_eligible_ratio must be the largest part of a {found[0]}'s tokens that are eligible, "
        f"got 0.25, where {found[1]} are; without labels, all are."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        wrapped(ids, labels=too_many)
    assert torch.equal(wrapped(ids, labels=labels), twin(ids, labels=labels))  # nothing was drawn


def test_more_completions_than_there_are_slots_for_are_drawn(selections):
    model = models.build("llama")
    options = {"min_tokens_ratio": 1.0, "max_eligible_ratio": 1 / 4}
    wrapped = CGGRModel(model, capacity="static", **options, **OFF)
    ids = models.token_ids(4, 12)
    labels = completions(ids, n_prompt=6)
    selection = check_step(wrapped, model, "llama", selections, labels, input_ids=ids)
    assert selection.count == 12
    assert selection.weights.max() > 1


def test_gradients_are_closer_to_the_dense_ones_than_the_token_splits():
    model = models.build("llama")
    ids = models.token_ids(8, 16)
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    targets = shifted("llama", ids)
    nll = token_losses(model, targets, input_ids=ids)
    (nll * mask).sum().backward()
    through_all = gradients(model)
    _, carried = reference(model, mask, mask.float(), targets, input_ids=ids)
    _, split = token_steps.reference(model, mask, mask.float(), targets, input_ids=ids)

    def distance(found, layer):
        names = [name for name in found if f"layers.{layer}" in name]
        return sum((found[name] - through_all[name]).norm() for name in names)

    for layer in range(models.LAYERS - 1):
        assert distance(carried, layer) < 0.9 * distance(split, layer)
    # Nothing came to the last layer's output but from the selected tokens.
    last = models.LAYERS - 1
    assert distance(carried, last) < 1e-4
    assert distance(split, last) > 1


def test_losses_that_are_added_before_one_backward_pass(selections):
    model = models.build("llama")
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.3, **OFF)
    batches = [models.token_ids(2, 9, seed=seed) for seed in (1, 2)]
    sum(wrapped(ids, labels=ids) for ids in batches).backward()
    together = gradients(model)
    masks = [selection.mask for selection in selections]
    assert not torch.equal(*masks)
    expected = []
    for ids, selection in zip(batches, list(selections), strict=True):
        weight = weights_of(selection, wrapped.config, 16)
        targets = shifted("llama", ids)
        expected.append(reference(model, selection.mask, weight, targets, input_ids=ids)[1])
    assert_same_gradients(together, {name: sum(g[name] for g in expected) for name in together})


@compiling
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "aot_eager"),
        ("llama", "aot_eager_decomp_partition"),
        ("gpt2", "aot_eager_decomp_partition"),
        ("llama", "inductor"),
    ],
)
def test_compiled(name, backend, selections):
    torch.compiler.reset()
    model = models.build(name)
    inner = torch.compile(model, backend=backend, dynamic=False)
    wrapped = CGGRModel(
        inner, selection="importance", min_tokens_ratio=0.3, capacity="static", **OFF
    )
    for seed in range(3):  # each has rows of its own
        ids = models.token_ids(3, 12, seed=seed)
        check_step(wrapped, model, name, selections, ids, input_ids=ids)


@of_peft
@compiling
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "aot_eager"),
        ("gpt2", "aot_eager_decomp_partition"),
        ("gemma2", "aot_eager_decomp_partition"),
        ("gptj", "aot_eager"),  # whose layers return tuples
        ("qwen3", "inductor"),
    ],
)
def test_compiled_layers_that_run_again(name, backend, selections):
    torch.compiler.reset()
    model = models.build(name)
    enable_checkpointing(model, reentrant=False)
    graphs = collections.Counter()
    inner = torch.compile(model, backend=counting(backend, graphs), dynamic=False)
    wrapped = CGGRModel(
        inner, selection="importance", min_tokens_ratio=0.3, capacity="static", **OFF
    )
    for seed in range(3):
        ids = models.token_ids(3, 12, seed=seed)
        check_step(wrapped, model, name, selections, ids, input_ids=ids)
    # One of the pass without gradient and one of that with it; GPT-2's layers know their numbers.
    assert graphs["compiled"] == (2 * models.LAYERS if name == "gpt2" else 2)


@of_peft
@compiling
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", ["checkpointing", "mode"])
def test_some_layers_run_again(change, compiled, selections):
    torch.compiler.reset()
    model = models.build("llama")
    enable_checkpointing(model, reentrant=False)
    inner = torch.compile(model, backend="aot_eager", dynamic=False) if compiled else model
    wrapped = CGGRModel(inner, selection="importance", min_tokens_ratio=0.3, **OFF)
    if change == "mode":
        model.model.layers[1].eval()
    else:
        model.model.layers[1].gradient_checkpointing = False
    ids = models.token_ids(3, 12)
    check_step(wrapped, model, "llama", selections, ids, input_ids=ids)


@of_peft
@compiling
@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_backward_pass(compiled):
    torch.compiler.reset()
    model = models.build("llama")
    enable_checkpointing(model, reentrant=False)
    inner = torch.compile(model, backend="eager", dynamic=False) if compiled else model
    wrapped = CGGRModel(inner, selection="importance", min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 12)
    loss = wrapped(ids, labels=ids)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_same_gradients(gradients(model), {name: 2 * g for name, g in once.items()})


@of_peft
@compiling
def test_compiled_layers_that_are_frozen():
    torch.compiler.reset()
    model = models.build("llama")
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    ids = models.token_ids(3, 12)
    embeds = model.model.embed_tokens(ids).detach()
    found = []
    enable_checkpointing(model, reentrant=False)
    for inner in (torch.compile(model, backend="eager"), model):
        model.zero_grad()
        wrapped = CGGRModel(inner, selection="topk", min_tokens_ratio=0.3, **OFF)
        wrapped(inputs_embeds=embeds, labels=ids).backward()
        found.append(gradients(model))
    assert found[0]["model.layers.2.self_attn.q_proj.weight"].any()
    assert_same_gradients(*found)


@of_peft
@compiling
def test_compiled_layers_take_no_other_gradient():
    model = build("llama", "eager")
    enable_checkpointing(model, reentrant=False)
    wrapped = CGGRModel(torch.compile(model, backend="eager"), **OFF)
    ids = models.token_ids(3, 12)
    mask = torch.ones(3, 1, 12, 12, requires_grad=True).exp()
    with pytest.raises(ValueError, match="takes no other input than hidden states that was comp"):
        wrapped(ids, labels=ids, attention_mask=mask)


@of_peft
@compiling
def test_compiled_layers_without_a_gradient_before_them(selections):
    torch.compiler.reset()
    model = models.build("llama")
    model.model.embed_tokens.requires_grad_(False)
    enable_checkpointing(model, reentrant=False)
    inner = torch.compile(model, backend="aot_eager", dynamic=False)
    wrapped = CGGRModel(inner, selection="importance", min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        wrapped(ids, labels=ids).backward()
    actual = gradients(model)
    assert actual["model.layers.0.self_attn.q_proj.weight"].any()
    model.zero_grad()
    wrapped.scorer.draw_count.zero_()
    plain = CGGRModel(model, selection="importance", min_tokens_ratio=0.3, **OFF)
    with torch.autocast("cpu", torch.bfloat16):
        plain(ids, labels=ids).backward()
    assert_same_gradients(actual, gradients(model), tolerance=0.03)


@of_peft
def test_compiled_layers_that_cannot_run_again():
    for options, message in (
        ({"resid_pdrop": 0.1}, "is compiled, and has dropout"),
        ({}, "is compiled, and has hooks at its layers"),
    ):
        model = models.build("gpt2", **options)
        enable_checkpointing(model, reentrant=False)
        if not options:
            model.transformer.h[1].register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=message):
            CGGRModel(torch.compile(model), **OFF)


@compiling
def test_compiled_as_a_whole(selections):
    torch.compiler.reset()
    model = models.build("llama")
    wrapped = CGGRModel(
        model, selection="importance", min_tokens_ratio=0.3, capacity="static", **OFF
    )
    train = torch.compile(wrapped, fullgraph=True, backend="aot_eager_decomp_partition")
    eager = CGGRModel(model, selection="importance", min_tokens_ratio=0.3, **OFF)
    for seed in range(2):
        ids = models.token_ids(3, 12, seed=seed)
        found = []
        for call in (train, eager):
            model.zero_grad()
            call(ids, labels=ids).backward()
            found.append(gradients(model))
        assert_same_gradients(*found)


@of_peft
@pytest.mark.parametrize("checkpointed", [False, True])
def test_its_products_are_of_the_selected_rows(checkpointed):
    model = models.build("llama", num_key_value_heads=1)
    if checkpointed:
        enable_checkpointing(model, reentrant=False)
    wrapped = CGGRModel(model, selection="random", min_tokens_ratio=0.25, **OFF)
    ids = models.token_ids(4, 16)
    with FlopCounterMode(display=False) as forward:
        loss = wrapped(ids, labels=ids)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    layers = [
        m for name, m in model.named_modules() if "layers" in name and isinstance(m, nn.Linear)
    ]
    keys = [m for m in layers if m.out_features == 8]  # and values
    per_row = 2 * sum(m.weight.numel() for m in layers if m not in keys)
    of_keys = 2 * sum(m.weight.numel() for m in keys)

    def products(counter):
        of_weights = (torch.ops.aten.mm, torch.ops.aten.addmm)
        return sum(counter.get_flop_counts()["Global"].get(op, 0) for op in of_weights)

    head = 2 * model.lm_head.weight.numel()  # whose logits are made again to go back from
    assert products(forward) == 64 * (per_row + of_keys) + 16 * head
    made_again = 16 * per_row + 64 * of_keys if checkpointed else 0
    assert products(backward) == made_again + 2 * (16 * per_row + 64 * of_keys) + 3 * 16 * head


@of_peft
def test_adapters(selections):
    model = lora(models.build("llama"), target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 10)
    inner = model.base_model.model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(3))
    wrapped(ids, labels=ids).backward()
    actual = gradients(model)
    weight = weights_of(selections[0], wrapped.config, 27)
    targets = shifted("llama", ids)
    _, expected = reference(inner, selections[0].mask, weight, targets, input_ids=ids)
    assert_same_gradients(actual, {f"base_model.model.{name}": g for name, g in expected.items()})


def test_autocast():
    model = models.build("llama")
    wrapped = CGGRModel(model, selection="importance", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 10)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        wrapped.scorer.draw_count.zero_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = wrapped(ids, labels=ids)
        loss.backward()
        found.append(gradients(model))
    for exact, rounded in zip(*(each.values() for each in found), strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_router_scores_in_its_place(selections):
    model = models.build("llama")
    router = create_truncated_router(model, 1)
    wrapped = CGGRModel(model, router, selection="topk", min_tokens_ratio=0.3, **OFF)
    ids = models.token_ids(3, 12)
    routed = check_step(wrapped, model, "llama", selections, ids, input_ids=ids)
    own = CGGRModel(model, selection="topk", min_tokens_ratio=0.3, **OFF)
    alone = check_step(own, model, "llama", selections, ids, input_ids=ids)
    assert not torch.equal(routed.mask, alone.mask)


def test_evaluation_is_dense():
    model = models.build("llama")
    wrapped = CGGRModel(model, selection="importance", **OFF).eval()
    ids = models.token_ids(3, 9)
    expected = token_losses(model, shifted("llama", ids), input_ids=ids).sum() / 24
    assert wrapped(ids, labels=ids).item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_are_written_in_ascending_order():
    rows = BackwardRows.of_size(4, 6, torch.device("cpu"))
    rows.choose(torch.tensor([False, True, False, True, True, False]))
    assert rows.row_R.tolist() == [1, 3, 4, 0]
    assert rows.used_R1[:, 0].tolist() == [True, True, True, False]
    assert rows.slot_N.tolist() == [4, 0, 4, 1, 2, 4]


@pytest.mark.float64
def test_the_gradient_of_a_linear_layer_by_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 3, 4), (5, 4), (5,))
    )
    mask = torch.tensor([True, False, True, True, False, False])
    rows = BackwardRows.of_size(4, 6, torch.device("cpu"))
    rows.choose(mask)
    outer = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)

    def of_selected(*inputs):
        return (nn.functional.linear(*inputs) * outer).flatten(0, 1)[mask].sum()

    expected = torch.autograd.grad(of_selected(x, weight, bias), (x, weight, bias))
    (selected_backward(x, weight, bias, rows) * outer).sum().backward()
    for found, want in zip((x, weight, bias), expected, strict=True):
        torch.testing.assert_close(found.grad, want, rtol=1e-12, atol=1e-12)


def replace_forward(model):
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def replace_class(model):
    class Linear4bit(nn.Linear):
        pass

    model.model.layers[1].self_attn.o_proj.__class__ = Linear4bit


def checkpoint_by_own_context(model):
    enable_checkpointing(model, reentrant=False)
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = functools.partial(
            layer._gradient_checkpointing_func, context_fn=lambda: None
        )


def adapt(kind, **options):
    def change(model):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = getattr(peft, f"{kind}Config")(target_modules=["o_proj"], **options)
        peft.get_peft_model(model, config)  # in place

    return change


@of_peft
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_forward, "own forward, which was replaced on a LlamaDecoderLayer of Llama"),
        (replace_class, r"got self_attn\.o_proj of class Linear4bit in layer 1 of Llama"),
        (
            lambda model: nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj),
            r"got mlp\.up_proj\.parametrizations\.weight of class Param",
        ),
        (adapt("LoHa"), r"got self_attn\.o_proj of class Linear in layer 0 of Llama"),
        (adapt("Lora", use_dora=True), r"got self_attn\.o_proj of class Linear in layer 0 of"),
        (checkpoint_by_own_context, "Llama.* has a context_fn of its own: change that"),
        (
            functools.partial(enable_checkpointing, reentrant=True),
            "use_reentrant=False, and LlamaForCausalLM has another",
        ),
    ],
)
def test_what_would_pass_the_gradient_of_all_tokens_is_refused(change, message):
    model = models.build("llama")
    wrapped = CGGRModel(model, **OFF)
    ids = models.token_ids(2, 8)
    change(model)
    with pytest.raises(ValueError, match=message):
        CGGRModel(model, **OFF)
    with pytest.raises(ValueError, match=message):
        wrapped(ids, labels=ids)
    assert wrapped.eval()(ids, labels=ids) > 0  # which is a dense forward


def test_what_it_refuses():
    with pytest.raises(
        ValueError, match=r"layers of class nn.Linear, or transformers' Conv1D, and"
    ):
        CGGRModel(models.build("falcon"))
    with pytest.raises(ValueError, match="'exact' with split='backward', got 'float8'"):
        CGGRModel(models.build("llama"), first_pass="float8")
    with pytest.raises(ValueError, match="'token' or 'backward' cannot be had, 'sequence' can"):
        CGGRModel(nn.Embedding(8, 8))
    with pytest.raises(ValueError, match="split must be one of 'auto', 'token', 'backward', 'sequ"):
        CGGRModel(models.build("llama"), split="rows")


def clones():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)


def test_hooks_that_copy_what_is_saved(selections):
    model = models.build("llama")
    wrapped = CGGRModel(model, selection="topk", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 10)
    found = []
    for context in (contextlib.nullcontext(), clones()):
        model.zero_grad()
        with context:
            loss = wrapped(ids, labels=ids)
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(*found)


@compiling
def test_hooks_that_copy_what_a_compiled_model_saves_are_loud():
    torch.compiler.reset()
    model = models.build("llama")
    inner = torch.compile(model, backend="aot_eager")
    wrapped = CGGRModel(inner, selection="topk", min_tokens_ratio=0.4, **OFF)
    ids = models.token_ids(3, 10)
    with clones():
        loss = wrapped(ids, labels=ids)
    loss.backward()
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj):
            assert linear.weight.grad.isnan().all()


@of_peft
@pytest.mark.parametrize("adapter", ["default", "query", "dense"])
def test_adapters_of_keys_have_gradients_of_all_tokens(adapter):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = models.build("llama")
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "o_proj"])
    peft.get_peft_model(model, config, adapter_name=adapter)
    split = CGGRModel(model, **OFF)._token_split
    of_rows = list(itertools.chain(*split._linears_of_rows[0]))
    assert len(of_rows) == models.LAYERS * 7  # with two of the adapter
    twin = split._twin.root.layers[0].self_attn
    for name in ("base_layer", f"lora_A.{adapter}", f"lora_B.{adapter}"):
        assert twin.o_proj.get_submodule(name) in of_rows
        assert twin.k_proj.get_submodule(name) not in of_rows


def test_its_gradient_has_none_itself():
    model = models.build("llama")
    wrapped = CGGRModel(model, selection="random", min_tokens_ratio=0.5, **OFF)
    ids = models.token_ids(2, 8)
    loss = wrapped(ids, labels=ids)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
