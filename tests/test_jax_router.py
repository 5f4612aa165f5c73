"""Truncated routers of nnx models: the model's first blocks, and nothing of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_nnx import Block, Decoder, token_batch

from cggr.jax import CGGRModel, TruncatedRouter, create_truncated_router


class Nested(nnx.Module):
    """A decoder inside another module, its blocks in nnx.Sequential."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.backbone = nnx.Sequential(*(nnx.Linear(8, 8, rngs=rngs) for _ in range(4)))
        self.extra = nnx.List([nnx.Linear(8, 8, rngs=rngs)])

    def __call__(self, x):
        return self.extra[0](self.backbone(x))


class Twins(nnx.Module):
    """Two lists of equal length."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.decoder = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in (*self.encoder, *self.decoder):
            x = layer(x)
        return x


class Experts(nnx.Module):
    """A block with more parts than the model has blocks."""

    def __init__(self, rngs):
        self.experts = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(9)])

    def __call__(self, x):
        return sum(expert(x) for expert in self.experts)


def variables(module):
    return {
        id(variable) for _, variable in nnx.iter_graph(module) if isinstance(variable, nnx.Param)
    }


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_router_is_the_model_without_its_later_blocks(depth):
    model, ids = Decoder(), token_batch()
    x = model.embed(ids)
    for layer in list(model.layers)[:depth]:
        x = layer(x)
    router = create_truncated_router(model, depth)
    np.testing.assert_array_equal(router(ids), model.embed.attend(x))
    if depth == 3:
        np.testing.assert_array_equal(router(ids), model(ids))
    assert len(model.layers) == 3


def test_a_router_shares_every_variable_and_adds_none():
    model = Decoder()
    router = create_truncated_router(model, 1)
    assert variables(router) == variables(model)
    assert len(variables(router.truncation(model))) == 3  # embedding, kernel and bias
    routed = CGGRModel(model, router)
    assert variables(routed) == variables(model)
    state = nnx.split((model, router, routed), nnx.Param, ...)[1]
    assert len(jax.tree.leaves(state)) == len(variables(model))


def test_what_changes_in_the_model_changes_in_the_router():
    model, ids = Decoder(), token_batch()
    router = create_truncated_router(model, 1)
    before = router(ids)
    model.layers[0] = Block(16, nnx.Rngs(9), 0.0)  # as adapters do
    after = router(ids)
    assert np.abs(after - before).max() > 0.01
    model.layers[0].linear.kernel[...] *= 0
    assert np.abs(router(ids) - after).max() > 0.01


def test_blocks_are_found_where_they_are():
    x = jnp.ones((2, 8))
    model = Nested()
    router = create_truncated_router(model, 2)
    assert router.truncation.layers == "backbone.layers"
    expected = model.extra[0](model.backbone.layers[1](model.backbone.layers[0](x)))
    np.testing.assert_array_equal(router(x), expected)
    router = create_truncated_router(Twins(), 1, layers="decoder")
    assert router(x).shape == (2, 8)
    blocks = nnx.Sequential(*(Experts(nnx.Rngs(i)) for i in range(3)))
    assert create_truncated_router(blocks, 1).truncation.layers == "layers"


def test_a_router_traces():
    model, ids = Decoder(), token_batch()
    router = create_truncated_router(model, 2)
    compiled = nnx.jit(lambda router, ids: router(ids))(router, ids)
    np.testing.assert_allclose(compiled, router(ids), rtol=1e-5, atol=1e-6)
    graphdef, state = nnx.split(router)
    merged = nnx.merge(graphdef, state)
    np.testing.assert_array_equal(merged(ids), router(ids))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (
            Decoder,
            {"num_layers": 0},
            r"num_layers must be in \[1, 3\] for a model of 3 blocks, got 0",
        ),
        (
            Decoder,
            {"num_layers": 4},
            r"num_layers must be in \[1, 3\] for a model of 3 blocks, got 4",
        ),
        (
            Decoder,
            {"layers": "blocks"},
            "layers must be the attribute path of a list of blocks of ",
        ),
        (
            Decoder,
            {"layers": "embed.embedding"},
            "list of blocks of Decoder, got 'embed.embedding'",
        ),
        (
            Twins,
            {},
            "Twins has several lists of 2 blocks: give layers= one of 'decoder', 'encoder'",
        ),
        (lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {}, "Linear has no list of blocks"),
    ],
)
def test_what_cannot_be_cut_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        TruncatedRouter(make(), **arguments)
