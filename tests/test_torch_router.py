import copy
import re
import warnings

import models
import pytest
import torch
import transformers
from torch import nn

from cggr.torch import CGGRModel, TruncatedRouter, create_truncated_router

LAYOUTS = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gemma2": "llama",
    "gemma3": "llama",
    "phi3": "llama",
    "cohere": "llama",
    "granite": "llama",
    "gpt2": "gpt",
    "gptj": "gpt",
    "falcon": "gpt",
    "gpt_neox": "gpt_neox",
    "bert": "bert",
    "roberta": "roberta",
    "mamba": "mamba",
}
KNOWN = "'llama', 'gpt', 'gpt_neox', 'bert', 'roberta', 'mamba'"


def exactly(message):
    return f"^{re.escape(message)}$"


def test_every_architecture_has_its_layout():
    assert set(LAYOUTS) == set(models.ARCHITECTURES)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_logits_are_those_of_the_truncated_model_exactly(name):
    model = models.build(name)
    input_ids = models.token_ids()
    with torch.no_grad():
        output = model(input_ids=input_ids, output_hidden_states=True, **models.no_cache(name))
        states = output.hidden_states
        # After k layers; Mamba collects its states after each block, without the embeddings.
        after = (lambda k: states[k - 1]) if name == "mamba" else (lambda k: states[k])
        for k in range(1, models.LAYERS):
            router = create_truncated_router(model, num_layers=k)
            want = models.head(model, models.final_norm(model)(after(k)))
            assert torch.equal(router(input_ids), want)
            assert not torch.equal(want, output.logits)
        full = create_truncated_router(model, num_layers=models.LAYERS)
        assert torch.equal(full(input_ids), output.logits)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_router_owns_nothing_and_follows_the_model(name):
    model = models.build(name)
    router = create_truncated_router(model, num_layers=1)
    assert router.architecture == LAYOUTS[name]
    assert list(router.parameters()) == []
    assert list(router.buffers()) == []
    assert router.state_dict() == {}
    assert router.source is model
    input_ids = models.token_ids()
    with torch.no_grad():
        before = router(input_ids)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        after = router(input_ids)
        assert not torch.equal(after, before)
        assert torch.equal(after, create_truncated_router(model, num_layers=1)(input_ids))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_only_the_first_layers_run(name):
    model = models.build(name)
    router = create_truncated_router(model, num_layers=2)
    ran = []
    (layers,) = (
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == models.LAYERS
    )
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    router(models.token_ids())
    assert ran == [0, 1]
    ran.clear()
    model(input_ids=models.token_ids())
    assert ran == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "attribute", "other"),
    [
        ("gemma2", "final_logit_softcapping", 0.25),
        ("gemma3", "final_logit_softcapping", 0.25),
        ("cohere", "logit_scale", 0.5),
        ("granite", "logits_scaling", 4.0),
    ],
)
def test_what_the_configuration_does_to_logits_is_honoured(name, attribute, other):
    input_ids = models.token_ids()
    outputs = []
    for value in (models.ARCHITECTURES[name][2][attribute], other):
        model = models.build(name, **{attribute: value})
        router = create_truncated_router(model, num_layers=models.LAYERS)
        with torch.no_grad():
            outputs.append(router(input_ids))
            assert torch.equal(outputs[-1], model(input_ids=input_ids).logits)
    assert not torch.allclose(*outputs)


def test_a_head_bias_is_honoured():
    model = models.build("gptj")
    with torch.no_grad():
        model.lm_head.bias.copy_(10.0 * torch.arange(models.VOCAB))
        router = create_truncated_router(model, num_layers=models.LAYERS)
        dense = model(models.token_ids(), **models.no_cache("gptj")).logits
        assert torch.equal(router(models.token_ids()), dense)
        assert (router(models.token_ids()).argmax(dim=-1) == models.VOCAB - 1).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_inputs_reach_the_model(name):
    model = models.build(name)
    router = create_truncated_router(model, num_layers=models.LAYERS)
    input_ids = models.token_ids()
    mask = torch.ones_like(input_ids)
    mask[:, -3:] = 0
    inputs = {"attention_mask": mask, "position_ids": torch.arange(20, 30)[None]}
    if name != "llama":
        inputs["token_type_ids"] = (input_ids % 2).long()
    with torch.no_grad():
        want = model(input_ids=input_ids, **inputs).logits
        assert torch.equal(router(input_ids, **inputs), want)
        assert not torch.equal(router(input_ids), want)
        embeds = model.get_input_embeddings()(input_ids)
        want = model(inputs_embeds=embeds, attention_mask=mask).logits
        assert torch.equal(router(inputs_embeds=embeds, attention_mask=mask), want)


# Architectures


def test_an_unknown_model_is_its_own_router_with_a_warning():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 11)

        def forward(self, ids):
            return self.embedding(ids)

    model = Plain()
    message = (
        f"Plain follows no known layout of a model with a head: the whole model is its own "
        f"router, which scores at the price of a full forward. architecture= one of {KNOWN} "
        f"forces a layout, architecture='passthrough' silences this."
    )
    with pytest.warns(UserWarning, match=exactly(message)) as caught:
        router = create_truncated_router(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the caller
    assert router.architecture == "passthrough"
    assert list(router.parameters()) == []
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(router(ids), model(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(
            create_truncated_router(model, architecture="passthrough")(ids), model(ids)
        )


def test_a_base_model_without_a_head_is_no_router():
    base = models.build("llama").model
    with pytest.warns(UserWarning, match="^LlamaModel follows no known layout"):
        assert create_truncated_router(base).architecture == "passthrough"


def test_a_known_type_with_another_head_is_not_taken_for_the_layout():
    # BertForPreTraining's `cls` wants two arguments: it is no map from hidden states to logits.
    options = models.ARCHITECTURES["bert"][2]
    model = transformers.BertForPreTraining(transformers.BertConfig(**options))
    with pytest.warns(UserWarning, match="^BertForPreTraining follows no known layout"):
        assert create_truncated_router(model).architecture == "passthrough"


def test_a_layout_can_be_forced():
    # Stable LM keeps its parts where Llama does, but is not among the known types.
    config = transformers.StableLmConfig(**models.ARCHITECTURES["llama"][2])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.StableLmForCausalLM(config)
    ids = models.token_ids()
    router = create_truncated_router(model, num_layers=2, architecture="llama")
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert torch.equal(router(ids), model.lm_head(model.model.norm(states[2])))
    with pytest.warns(UserWarning, match="^StableLmForCausalLM follows no known layout"):
        create_truncated_router(model, num_layers=2)


def test_architecture_errors():
    model = models.build("llama")
    message = f"architecture must be 'auto' or one of {KNOWN}, 'passthrough', got 'mlp'."
    with pytest.raises(ValueError, match=exactly(message)):
        create_truncated_router(model, architecture="mlp")
    message = (
        "architecture='gpt' needs LlamaForCausalLM.transformer.h, which the model does not have; "
        "architecture='passthrough' uses the whole model."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        create_truncated_router(model, architecture="gpt")


@pytest.mark.parametrize("num_layers", [0, -1, 4])
def test_num_layers_out_of_range(num_layers):
    message = f"num_layers must be in [1, 3] for a model of 3 layers, got {num_layers}."
    with pytest.raises(ValueError, match=exactly(message)):
        create_truncated_router(models.build("gpt2"), num_layers=num_layers)


def test_the_default_is_two_layers():
    router = create_truncated_router(models.build("llama"))
    assert isinstance(router, TruncatedRouter)
    assert repr(router) == "TruncatedRouter(architecture='llama', num_layers=2)"


# Sharing


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_deep_copy_shares_within_itself(name):
    model = models.build(name)
    wrapped = CGGRModel(model, create_truncated_router(model, num_layers=1))
    twin = copy.deepcopy(wrapped)
    ids = models.token_ids()
    with torch.no_grad():
        original = wrapped.scorer.router(ids)
        assert torch.equal(twin.scorer.router(ids), original)
        for parameter in twin.model.parameters():
            parameter.mul_(2)
        assert torch.equal(wrapped.scorer.router(ids), original)
        want = create_truncated_router(twin.model, num_layers=1)(ids)
        assert torch.equal(twin.scorer.router(ids), want)
        assert not torch.equal(want, original)
    assert twin.scorer.router.source is twin.model


def test_a_forward_patched_onto_the_base_is_not_inherited():
    model = models.build("llama")
    ids = models.token_ids()
    with torch.no_grad():
        want = create_truncated_router(model, num_layers=1)(ids)
        original = model.model.forward
        # As accelerate and others do: bound to the model with all its layers.
        model.model.forward = lambda *args, **kwargs: original(*args, **kwargs)
        assert torch.equal(create_truncated_router(model, num_layers=1)(ids), want)


def test_conversions_and_loaded_weights_reach_the_router():
    model = models.build("llama")
    router = create_truncated_router(model, num_layers=1)
    ids = models.token_ids()
    other = models.build("llama", seed=5)
    with torch.no_grad():
        for assign in (False, True):
            model.load_state_dict(
                {k: v.clone() for k, v in other.state_dict().items()}, assign=assign
            )
            assert torch.equal(router(ids), create_truncated_router(other, num_layers=1)(ids))
        model.to(torch.bfloat16)
        assert router(ids).dtype == torch.bfloat16


def test_a_head_that_is_replaced_later_is_used():
    model = models.build("llama")
    router = create_truncated_router(model, num_layers=models.LAYERS)
    model.resize_token_embeddings(models.VOCAB + 9, mean_resizing=False)
    ids = models.token_ids()
    with torch.no_grad():
        assert torch.equal(router(ids), model(input_ids=ids).logits)
    loss = CGGRModel(model, router)(ids + 6, labels=ids + 6)  # ids beyond the old vocabulary
    assert loss.isfinite()


@pytest.mark.parametrize("part", ["norm", "layer", "embedding"])
def test_a_part_of_the_base_that_is_replaced_later_is_used(part):
    model, other = models.build("llama"), models.build("llama", seed=5)
    router = create_truncated_router(model, num_layers=2)
    ids = models.token_ids()
    with torch.no_grad():
        before = router(ids)
        if part == "norm":
            model.model.norm = other.model.norm
        elif part == "layer":  # as LoRA on a whole layer, or an offloading wrapper
            model.model.layers[1] = other.model.layers[1]
        else:
            model.set_input_embeddings(other.get_input_embeddings())
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        want = model.lm_head(model.model.norm(states[2]))
        assert torch.equal(router(ids), want)
        assert not torch.equal(want, before)


def test_tied_embeddings_are_not_doubled():
    model = models.build("llama", tie_word_embeddings=True)
    wrapped = CGGRModel(model, create_truncated_router(model, num_layers=1), warmup_steps=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = models.token_ids()
    wrapped(ids, labels=ids).backward()
    assert len(list(wrapped.parameters())) == len(list(model.parameters()))
