"""Llama in Flax: what transformers' ``LlamaForCausalLM`` computes, with the same names for weights.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``; ``V`` tokens of the vocabulary, ``D`` hidden
size, ``H`` heads and ``K`` heads of keys and values, of size ``W``. Hidden states are ``(N, D)``:
XLA on the CPU needs twice as long for the weights' gradients from ``(B, S, D)``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from cggr.jax import RowAttention
from cggr.race.decoder import DecoderShape, Weights, check_weights

Rotation = tuple[Array, Array]


class Attention(nnx.Module):
    """Causal self-attention, in which groups of heads share their keys and values."""

    def __init__(self, shape: DecoderShape, rngs: nnx.Rngs) -> None:
        width, size = shape.hidden_size, shape.head_size
        self.head_size = size
        self.q_proj = nnx.Linear(width, shape.heads * size, use_bias=False, rngs=rngs)
        self.k_proj = nnx.Linear(width, shape.kv_heads * size, use_bias=False, rngs=rngs)
        self.v_proj = nnx.Linear(width, shape.kv_heads * size, use_bias=False, rngs=rngs)
        self.o_proj = nnx.Linear(shape.heads * size, width, use_bias=False, rngs=rngs)
        self.attend = RowAttention(jax.nn.dot_product_attention)

    def __call__(self, hidden_ND: Array, rotation: Rotation) -> Array:
        """From and to ``(N, D)``."""
        length = rotation[0].shape[1]

        def heads(projected: Array) -> Array:
            return projected.reshape(
                -1, length, projected.shape[1] // self.head_size, self.head_size
            )

        attended_BSHW = self.attend(
            _rotate(heads(self.q_proj(hidden_ND)), rotation),
            _rotate(heads(self.k_proj(hidden_ND)), rotation),
            heads(self.v_proj(hidden_ND)),
            is_causal=True,
        )
        return self.o_proj(attended_BSHW.reshape(len(hidden_ND), -1))


class FeedForward(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) up(x))``."""

    def __init__(self, shape: DecoderShape, rngs: nnx.Rngs) -> None:
        width, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nnx.Linear(width, inner, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(width, inner, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, hidden_ND: Array) -> Array:
        """From and to ``(N, D)``."""
        return self.down_proj(jax.nn.silu(self.gate_proj(hidden_ND)) * self.up_proj(hidden_ND))


class Block(nnx.Module):
    """Attention, then the feed-forward layers, each normalised before and added to its input."""

    def __init__(self, shape: DecoderShape, rngs: nnx.Rngs) -> None:
        self.input_layernorm = _norm(shape, rngs)
        self.self_attn = Attention(shape, rngs)
        self.post_attention_layernorm = _norm(shape, rngs)
        self.mlp = FeedForward(shape, rngs)

    def __call__(self, hidden_ND: Array, rotation: Rotation) -> Array:
        """From and to ``(N, D)``."""
        hidden_ND += self.self_attn(self.input_layernorm(hidden_ND), rotation)
        return hidden_ND + self.mlp(self.post_attention_layernorm(hidden_ND))


class Decoder(nnx.Module):
    """A Llama: token ids to logits.

    Args:
        shape: What it is made of.
        rngs: Where Flax draws weights from; :func:`load_decoder` needs none.
    """

    def __init__(self, shape: DecoderShape, rngs: nnx.Rngs) -> None:
        self.head_size, self.rope_theta = shape.head_size, shape.rope_theta
        self.embed_tokens = nnx.Embed(shape.vocab_size, shape.hidden_size, rngs=rngs)
        self.layers = nnx.List([Block(shape, rngs) for _ in range(shape.layers)])
        self.norm = _norm(shape, rngs)
        self.lm_head = (
            None
            if shape.tied
            else nnx.Linear(shape.hidden_size, shape.vocab_size, use_bias=False, rngs=rngs)
        )

    def __call__(self, input_ids: Array, *, positions: Array | None = None) -> Array:
        """Logits of the next token.

        Args:
            input_ids: ``(B, S)``, integers.
            positions: ``(B, S)`` or ``(1, S)``, where the tokens stand in their text; 0, 1, ... if
                None. A token attends to those before it in the row, wherever they stand.

        Returns:
            ``(B, S, V)``, float32.
        """
        if positions is None:
            positions = jnp.arange(input_ids.shape[1])[None]
        rotation = _rotation(positions, self.head_size, self.rope_theta)
        hidden_ND = self.embed_tokens(input_ids.reshape(-1))
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, rotation)
        head = self.embed_tokens.attend if self.lm_head is None else self.lm_head
        return head(self.norm(hidden_ND)).reshape(*input_ids.shape, -1)


def load_decoder(shape: DecoderShape, weights: Weights, device: jax.Device) -> Decoder:
    """Makes a decoder of these weights, which it copies.

    Args:
        shape: What it is made of.
        weights: Float32, by the names of :meth:`DecoderShape.parameters`.
        device: Where it is to live.

    Raises:
        ValueError: A weight is missing, unknown, or of another shape.

    Example:
        >>> from cggr.race.decoder import initial_weights
        >>> shape = DecoderShape(vocab_size=50, hidden_size=8, intermediate_size=16, layers=1,
        ...                      heads=2, kv_heads=1, head_size=4, positions=5)
        >>> decoder = load_decoder(shape, initial_weights(shape, seed=0), jax.devices("cpu")[0])
        >>> decoder(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 50)
    """
    check_weights(shape, weights)

    def load(path: tuple[str | int, ...], parameter: nnx.Variable) -> nnx.Variable:
        weight = weights[huggingface_name(path)]
        if path[-1] == "kernel":  # (in, out) in Flax, (out, in) there
            weight = weight.T
        return parameter.replace(jax.device_put(weight, device, may_alias=False))

    # Made abstractly: no weights are drawn that would be replaced at once.
    definition, state = nnx.split(nnx.eval_shape(lambda: Decoder(shape, nnx.Rngs(0))))
    return nnx.merge(definition, nnx.map_state(load, state))


def huggingface_name(path: tuple[str | int, ...]) -> str:
    """Name of a decoder's parameter in Hugging Face's state dict.

    Example:
        >>> huggingface_name(("layers", 0, "mlp", "up_proj", "kernel"))
        'model.layers.0.mlp.up_proj.weight'
    """
    module = ".".join(map(str, path[:-1]))
    return f"{module if module == 'lm_head' else f'model.{module}'}.weight"


def _norm(shape: DecoderShape, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(shape.hidden_size, epsilon=shape.norm_epsilon, rngs=rngs)


def _rotation(positions: Array, size: int, theta: float) -> Rotation:
    """Cosine and sine of every position's angles, ``(B, S, 1, W/2)``."""
    frequencies = 1.0 / theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(heads: Array, rotation: Rotation) -> Array:
    """Turns the pairs of entries i and i + W/2 of every head, ``(B, S, H, W)``."""
    cosine, sine = (x.astype(heads.dtype) for x in rotation)
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
