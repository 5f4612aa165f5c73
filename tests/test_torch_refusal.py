"""What the token split refuses, and how it says so."""

import logging

import models
import pytest
import torch
import transformers
from token_steps import (
    OFF,
    CGGRModel,
    build,
    exactly,
    lora,
    of_peft,
)
from torch import nn

from cggr.torch import CGGRModel as RoutedModel
from cggr.torch import RoutingConfig, create_truncated_router
from cggr.torch.refusal import _ADAPTERS, refusal


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
    "flash in classes of its own": (
        lambda: _with("falcon", _attn_implementation_internal="flash_attention_2"),
        "FalconForCausalLM uses 'flash_attention_2' attention",
    ),
    "flex": (
        lambda: _with("llama", _attn_implementation_internal="flex_attention"),
        "LlamaForCausalLM uses 'flex_attention' attention",
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
    with pytest.raises(
        ValueError, match=f"^split='token' or 'backward' cannot be had, 'sequence' can: {reason}"
    ):
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
                "with split='token' or 'backward', where the labels make B = 2 and S = 8, "
                "got (2, 3, 8)."
            ),
        ),
        (
            {"position_ids": torch.zeros(3, 2, 8, dtype=torch.long)},
            (
                "position_ids must have shape (B, S) or (1, S) with split='token' or 'backward', "
                "where the labels make B = 2 and S = 8, got (3, 2, 8)."
            ),
        ),
        (
            {"pixel_values": torch.zeros(2, 5)},
            (
                "split='token' or 'backward' cannot tell which part of pixel_values (2, 5) belongs "
                "to a position: it takes input_ids, inputs_embeds, attention_mask, position_ids, "
                "token_type_ids; split='sequence' takes it."
            ),
        ),
        (
            {"attention_mask": {"full_attention": torch.ones(2, 1, 8, 8)}},
            (
                "attention_mask must be a tensor with split='token' or 'backward', got dict; "
                "split='sequence' takes it."
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
    with pytest.raises(
        ValueError, match=r"^adapter_names cannot be given with split='token' or 'b"
    ):
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
        (
            {"past_key_values": object()},
            "past_key_values cannot be given with split='token' or 'backward'",
        ),
        ({"logits_to_keep": 2}, "logits_to_keep cannot be given with split='token' or 'backward'"),
        ({"is_causal": False}, "is_causal cannot be given with split='token' or 'backward'"),
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


def test_a_router_deeper_than_the_model():
    model = build("llama")
    wrapped = CGGRModel(model, create_truncated_router(model, num_layers=2), **OFF)
    model.model.layers = model.model.layers[:1]
    message = r"the router has 2 of the model's layers, which are 1: make it anew by .*\.$"
    with pytest.raises(ValueError, match=message):
        wrapped(models.token_ids(2, 8), labels=models.token_ids(2, 8))
