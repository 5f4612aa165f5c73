"""Attention of the token split: the kernels, masks, and whom it is left to."""

import functools

import models
import pytest
import torch
import transformers
from token_steps import (
    CASES,
    DEVICE,
    OFF,
    CGGRModel,
    assert_same_gradients,
    build,
    check_step,
    enable_checkpointing,
    exactly,
    gradients,
)

from cggr.torch import row_attention, selected_attention
from cggr.torch.token_split import TokenSplit


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


LAYERS = 2  # Gemma 2's are one of either kind; in the interpreter they take their time
shallow = functools.partial(build, layers=LAYERS)


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
    return LAYERS * (2 if name == "gemma2" else 1)


@pytest.mark.parametrize("name", INTERFACED)
def test_selected_attention_by_kernels(name, selections, kernel_calls):
    model = shallow(name).to(DEVICE)
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
        shallow(name).to(DEVICE), ids, models.labels_for(name, ids), monkeypatch, given, **options
    )
    assert len(kernel_calls) == passes * LAYERS


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
    model = shallow(name).to(DEVICE)
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
    model = shallow("llama").to(DEVICE)
    enable_checkpointing(model, reentrant)
    ids = models.token_ids(3, 12).to(DEVICE)
    check_kernels(model, ids, ids, monkeypatch, {}, selection="importance", min_tokens_ratio=0.3)
    assert len(kernel_calls) == 2 * LAYERS  # forward, and again


def test_a_dense_step_with_a_soft_cap_is_by_kernels(kernel_calls, monkeypatch):
    ids = models.token_ids(3, 12).to(DEVICE)
    model = shallow("gemma2").to(DEVICE)
    check_kernels(model, ids, ids, monkeypatch, {}, min_tokens_ratio=1.0)
    assert len(kernel_calls) == LAYERS
    assert model.config._attn_implementation == "eager"


def test_soft_capped_attention_of_another_file(kernel_calls, monkeypatch):
    import transformers.models.gemma2.modeling_gemma2 as gemma2

    model = shallow("gemma2").to(DEVICE)
    mine = type("MyAttention", (gemma2.Gemma2Attention,), {"__module__": __name__})
    for layer in model.model.layers:
        layer.self_attn.__class__ = mine
    ids = models.token_ids(2, 8).to(DEVICE)
    check_kernels(model, ids, ids, monkeypatch, {}, min_tokens_ratio=0.4)
    assert len(kernel_calls) == calls_of("gemma2")


def test_dropout_with_a_soft_cap(kernel_calls, monkeypatch):
    ids = models.token_ids(3, 12).to(DEVICE)
    model = shallow("gemma2", attention_dropout=0.5).to(DEVICE)
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
    model = shallow("llama", attention_dropout=0.5).to(DEVICE)
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
        assert len(kernel_calls) == LAYERS
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
