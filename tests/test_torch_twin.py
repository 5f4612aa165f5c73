"""The second tree of a model's modules: the same parameters, attributes that follow."""

import copy
import pickle
import types

import models
import pytest
import torch
from torch import nn

from cggr.torch import CGGRModel
from cggr.torch.twin import Relayered, Twin

IDS = models.token_ids(2, 8)


def logits(base):
    return base(input_ids=IDS, use_cache=False)[0]


def tree():
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Sequential(nn.Dropout(0.5), shared), nn.BatchNorm1d(3))


def test_it_computes_the_same_from_the_same_parameters():
    model = models.build("llama")
    twin = Twin(model.model)
    torch.testing.assert_close(logits(twin.root), logits(model.model), rtol=0, atol=0)
    ours, theirs = dict(twin.root.named_parameters()), dict(model.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    logits(twin.root).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_modules_that_occur_twice_do_so_again():
    root = tree()
    twin = Twin(root).root
    assert twin[0] is twin[1][1]
    assert twin[0] is not root[0]


def test_what_is_set_on_it_is_not_set_on_the_original():
    model = models.build("llama")
    twin = Twin(model.model)
    twin.configs[0].num_attention_heads = 99
    twin.root.layers[0].anything = 1
    assert len(twin.configs) == 1
    assert twin.root.layers[0].self_attn.config.num_attention_heads == 99
    assert model.config.num_attention_heads == 4
    assert not hasattr(model.model.layers[0], "anything")
    twin.refresh()
    assert not hasattr(twin.root.layers[0], "anything")
    assert twin.configs[0].num_attention_heads == 4


def test_it_follows_the_original():
    root = tree()
    twin = Twin(root)
    root.eval()
    root[1][0].p = 0.25
    root[2].running_mean.fill_(3)
    root.bfloat16()
    twin.refresh()
    assert not twin.root[1].training
    assert twin.root[1][0].p == 0.25
    assert (twin.root[2].running_mean == 3).all()
    assert twin.root[0].weight.dtype == torch.bfloat16
    before = twin.root
    twin.refresh()
    assert twin.root is before  # a compiler's work is of use again
    root[1][1] = nn.Linear(3, 2)
    twin.refresh()
    assert twin.root[1][1].weight is root[1][1].weight


def test_an_order_that_changed_is_followed():
    root = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    twin, x = Twin(root), torch.ones(1, 3)
    root._modules["0"] = root._modules.pop("0")  # now the last
    twin.refresh()
    torch.testing.assert_close(twin.root(x), root(x), rtol=0, atol=0)


def test_a_configuration_that_was_replaced_is_dropped():
    model = models.build("llama")
    twin = Twin(model.model)
    config = copy.copy(model.config)
    for module in model.model.modules():
        if hasattr(module, "config"):
            module.config = config
    twin.refresh()
    twin.refresh()
    assert len(twin.configs) == 1
    assert twin.root.config is twin.configs[0] is not config


def test_another_list_of_layers():
    model = models.build("llama")
    relayered = Relayered(model.model, "layers", list(model.model.layers[:1]))
    first = models.build("llama", layers=1)
    first.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(logits(relayered.root), logits(first.model))
    plain = type(model.model).forward
    model.model.forward = types.MethodType(  # bound to the model with all of its layers
        lambda self, *args, **kwargs: plain(self, *args, **kwargs), model.model
    )
    model.model.norm.anything = model.model.anything = 1
    relayered.refresh()
    torch.testing.assert_close(logits(relayered.root), logits(first.model))
    assert relayered.root.anything == relayered.root.norm.anything == 1


def test_a_forward_of_an_instance_is_bound_to_the_copy():
    root = tree()
    root.forward = types.MethodType(lambda self, x: self, root)
    assert Twin(root).root(1) is not root
    root[0].forward = lambda x: x + 1  # bound to nothing
    assert Twin(root).root[0](1) == 2


@pytest.mark.float64  # nothing is compiled under the guard
def test_what_is_compiled_is_compiled_again():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    root = nn.Sequential(torch.compile(nn.Linear(3, 3), backend=backend), nn.Tanh())
    twin = Twin(root).root
    x = torch.ones(1, 3)
    torch.testing.assert_close(twin(x), root(x))
    assert twin[0]._orig_mod is not root[0]._orig_mod
    assert seen
    root = nn.Sequential(nn.Linear(3, 3))
    root[0].compile(backend=backend)
    twin = Twin(root).root
    assert twin[0]._compiled_call_impl is not None
    assert twin[0]._compiled_call_impl is not root[0]._compiled_call_impl
    torch._dynamo.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_the_wrapper_trains_its_own_model(copied):
    wrapped = CGGRModel(models.build("llama"), split="token", min_tokens_ratio=0.4, warmup_steps=0)
    other = copied(wrapped)
    assert other(IDS, labels=IDS).item() == wrapped(IDS, labels=IDS).item()
    other(IDS, labels=IDS).backward()
    assert all(p.grad is None for p in wrapped.parameters())
    assert all(p.grad is not None for p in other.model.model.layers.parameters())


def test_modes_are_followed_outside_of_steps():
    wrapped = CGGRModel(models.build("gpt2"), split="token")
    wrapped.eval()
    assert not any(module.training for module in wrapped._token_split._twin.root.modules())
    wrapped.train()
    assert all(module.training for module in wrapped._token_split._twin.root.modules())
