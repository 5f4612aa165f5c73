"""The language model that is raced, a Llama: its shape and first weights, for all backends.

Shapes: ``V`` tokens of the vocabulary, ``D`` hidden size, ``F`` width of the feed-forward layers,
``H`` heads and ``K`` heads of keys and values, of size ``W``.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from cggr.race.settings import RaceSettings

Weights = dict[str, npt.NDArray[np.float32]]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What a Llama is made of, apart from its weights.

    Args:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        layers: Number of blocks.
        heads: H.
        kv_heads: K, which divides H; each serves H / K heads.
        head_size: W.
        positions: Longest sequence.
        rope_theta: Base of the rotary embedding's wavelengths.
        norm_epsilon: Added to the mean square that a norm divides by.
        tied: The head is the embedding, transposed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    positions: int
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    tied: bool = True

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all parameters, as Hugging Face has them: ``(out, in)``."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        width, inner = self.hidden_size, self.intermediate_size
        block = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        embedding = (self.vocab_size, width)
        return {
            EMBEDDING: embedding,
            **{
                f"model.layers.{layer}.{name}.weight": shape
                for layer in range(self.layers)
                for name, shape in block.items()
            },
            "model.norm.weight": (width,),
            **({} if self.tied else {HEAD: embedding}),
        }

    @property
    def size(self) -> int:
        """Number of trained values."""
        return sum(math.prod(shape) for shape in self.parameters().values())


def new_decoder(settings: RaceSettings, vocab_size: int) -> DecoderShape:
    """The shape of the small model that the settings ask for."""
    heads = settings.hidden_size // settings.head_size
    return DecoderShape(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=64 * round(settings.hidden_size * 8 / 3 / 64),
        layers=settings.layers,
        heads=heads,
        kv_heads=settings.kv_heads or heads,
        head_size=settings.head_size,
        positions=settings.sequence_length,
    )


def initial_weights(shape: DecoderShape, seed: int) -> Weights:
    """Draws the weights that every lane of a seed starts from, with any backend.

    Norms are one, matrices normal with standard deviation ``D ** -0.5``: as wide as the fan-in asks
    for; at 0.02, the usual, this small a model learns much more slowly.

    Args:
        shape: The model.
        seed: Another seed gives other weights.

    Returns:
        Float32 arrays by the names of :meth:`DecoderShape.parameters`.
    """
    random = np.random.default_rng(seed)
    deviation = np.float32(shape.hidden_size**-0.5)
    return {
        name: random.standard_normal(dims, dtype=np.float32) * deviation
        if len(dims) == 2
        else np.ones(dims, dtype=np.float32)
        for name, dims in shape.parameters().items()
    }


def check_weights(shape: DecoderShape, weights: Weights) -> None:
    """Refuses weights that are not those of a decoder.

    Args:
        shape: The decoder.
        weights: Arrays by name.

    Raises:
        ValueError: A weight is missing, unknown, or of another shape.
    """
    wanted = shape.parameters()
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ValueError(f"the weights lack {missing[0]}{_and_more(missing)}")
    if unknown := sorted(weights.keys() - wanted.keys()):
        raise ValueError(f"the weights hold {unknown[0]}{_and_more(unknown)}, which no Llama has")
    for name, dims in wanted.items():
        if weights[name].shape != dims:
            raise ValueError(f"{name} must have the shape {dims}, got {weights[name].shape}")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
