"""Tiny nnx models for the tests of cggr.jax."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


class Block(nnx.Module):
    """Mixes a token with those before it."""

    def __init__(self, width, rngs, dropout):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        context = jnp.cumsum(x, axis=1) / (1 + jnp.arange(x.shape[1])[:, None])
        return x + self.dropout(jnp.tanh(self.linear(context)))


class Decoder(nnx.Module):
    """Embedding, blocks, a head tied to the embedding."""

    def __init__(self, vocabulary=64, width=16, n_layers=3, dropout=0.0, seed=0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List([Block(width, rngs, dropout) for _ in range(n_layers)])

    def __call__(self, input_ids, *, positions=None):
        x = self.embed(input_ids)
        if positions is not None:
            x = x + positions[..., None] / 100
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(x)


class Bigram(nnx.Module):
    """A table of logits: what it says of a token depends on that token alone."""

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table))

    def __call__(self, input_ids):
        return self.table[...][input_ids]


def token_batch(batch=16, length=12, vocabulary=64, seed=0):
    """Ids (B, S) with a rule in them: each token is the one before plus a small step."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 4, (batch, length)).cumsum(axis=1) % vocabulary)
