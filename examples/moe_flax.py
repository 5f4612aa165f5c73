"""Mixture of experts with null routing in Flax: what a cheap exit finds easy, no expert sees.

A CGGRScorer judges every token by the embeddings and the head alone, before any layer has run. Its
mask goes to the mixture-of-experts layers, in which tokens outside it take the null route: the
residual stream passes them by, and no expert spends a forward or a backward on them. Nothing of the
batch is left out of the loss. The score is the entropy, which knows no label: routing by the loss
would tell the layers what they are to predict.

    python examples/moe_flax.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from cggr.jax import CGGRScorer

# B sequences of S tokens, N = B S; D hidden size, E experts, V classes; C slots for tokens.
V, D, E, LAYERS = 64, 64, 4, 2


class NullRoutedExperts(nnx.Module):
    """One expert for each selected token, by a learned gate; nothing for the others."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.gate = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        self.up = nnx.Param(jax.random.normal(rngs.params(), (E, D, 4 * D)) * D**-0.5)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (E, 4 * D, D)) * (4 * D) ** -0.5)

    def __call__(self, x_BSD: Array, index_C: Array) -> Array:
        x_ND = x_BSD.reshape(-1, D)
        # A slot without a token has index N: it reads zeros, and what it writes is dropped.
        chosen_CD = x_ND.at[index_C].get(mode="fill", fill_value=0)
        gate_CE = jax.nn.softmax(self.gate(chosen_CD))
        weight_C, expert_C = gate_CE.max(axis=1), gate_CE.argmax(axis=1)
        out_CD = jnp.zeros_like(chosen_CD)
        for expert in range(E):
            mine_C = (expert_C == expert)[:, None]
            hidden = jax.nn.silu(jnp.where(mine_C, chosen_CD, 0) @ self.up[expert])
            out_CD = jnp.where(mine_C, hidden @ self.down[expert], out_CD)
        return x_ND.at[index_C].add(out_CD * weight_C[:, None], mode="drop").reshape(x_BSD.shape)


class Exit(nnx.Module):
    """Embeddings and head: the cheapest model of the text."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, ids_BS: Array) -> Array:
        return self.head(self.norm(self.embed(ids_BS)))


class Decoder(nnx.Module):
    """Causal attention and experts, in turn."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.exit = Exit(rngs)
        self.attention = nnx.List(
            [nnx.MultiHeadAttention(4, D, decode=False, rngs=rngs) for _ in range(LAYERS)]
        )
        self.experts = nnx.List([NullRoutedExperts(rngs) for _ in range(LAYERS)])

    def __call__(self, ids_BS: Array, index_C: Array) -> Array:
        x_BSD = self.exit.embed(ids_BS)
        causal = nnx.make_causal_mask(ids_BS)
        for attention, experts in zip(self.attention, self.experts, strict=True):
            x_BSD = x_BSD + attention(jax.nn.standardize(x_BSD), mask=causal)
            x_BSD = experts(x_BSD, index_C)
        return self.exit.head(self.exit.norm(x_BSD))


def text(n: int, length: int, key: Array) -> Array:
    """Sequences in which every second token follows from the one before, and the others do not."""
    free_NS = jax.random.randint(key, (n, length), 0, V)
    return free_NS.at[:, 1::2].set((5 * free_NS[:, 0:-1:2] + 3) % V)


def cross_entropy(logits_BSV: Array, ids_BS: Array) -> Array:
    """Mean loss of the next tokens, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BSV[:, :-1], ids_BS[:, 1:]).mean()


@nnx.jit
def train_step(
    model: Decoder, scorer: CGGRScorer, optimizer: nnx.Optimizer, ids_BS: Array
) -> Array:
    """One step; returns the loss."""
    _, _, info = scorer(ids_BS)

    def loss_of(model: Decoder) -> tuple[Array, Array]:
        loss = cross_entropy(model(ids_BS, info["selection"].indices), ids_BS)
        # The exit learns too, or its scores would mean nothing.
        return loss + 0.1 * cross_entropy(model.exit(ids_BS), ids_BS), loss

    (_, loss), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss


def train(steps: int = 300, *, ratio: float = 0.5, seed: int = 0) -> list[float]:
    """Losses of a run, in nats a token; half of the tokens nobody can predict: 2.0 is the least."""
    model = Decoder(nnx.Rngs(seed))
    scorer = CGGRScorer(
        model.exit, scoring="entropy", selection="topk", min_tokens_ratio=ratio, warmup_steps=0,
        dynamic_threshold=False,
    )  # fmt: skip
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses = []
    for step in range(steps):
        ids_BS = text(16, 32, jax.random.key(seed + step))
        losses.append(float(train_step(model, scorer, optimizer, ids_BS)))
        scorer.step()
        if step % 50 == 0 or step == steps - 1:
            seen = scorer.get_metrics()["tokens_selected"] / ids_BS.size
            print(f"step {step:4}  loss {losses[-1]:.3f}  tokens through experts {seen:.0%}")
    return losses


if __name__ == "__main__":
    train()
