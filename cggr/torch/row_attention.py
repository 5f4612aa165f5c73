"""Attention of some positions, in which query heads share keys and values without copies.

transformers repeats the keys and values of grouped heads wherever there is a mask, and the backward
pass keeps the copies of every layer. Here the heads of a group are further queries of the head that
they share.

Imported only where a model of transformers is trained.

Shapes: ``B`` sequences of ``S`` tokens, of which ``C`` are run; ``H`` query heads, of which ``G``
share each of the ``K`` heads of keys and values; ``W`` size of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

NAME = "cggr_rows"  # among transformers' attention functions


@contextlib.contextmanager
def grouped_heads(config: Any, masks: Any) -> Iterator[Any]:
    """A pass whose layers attend by :func:`grouped_attention`.

    Args:
        config: Of a model whose heads share keys and values.
        masks: ``(B, 1, C, S)``, or a dict of such; yielded again as ``(B, 1, G C, S)``, made once
            for all layers.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, grouped_attention)
    before = config._attn_implementation
    group = config.num_attention_heads // config.num_key_value_heads
    config._attn_implementation = NAME
    try:
        if isinstance(masks, dict):
            yield {kind: mask.repeat(1, 1, group, 1) for kind, mask in masks.items()}
        else:
            yield masks.repeat(1, 1, group, 1)
    finally:
        config._attn_implementation = before


def shares_heads(config: Any) -> bool:
    """Whether heads share keys and values and attend by PyTorch's function."""
    n_heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", n_heads) != n_heads
    return shared and config._attn_implementation == "sdpa"


def grouped_attention(
    module: nn.Module,
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """PyTorch's attention, called as transformers calls its attention functions.

    Args:
        module: Whose attention it is.
        query_BHCW: Of the positions that are run.
        key_BKSW: Of all positions.
        value_BKSW: Of all positions.
        attention_mask: ``(B, 1, G C, S)``.
        dropout: Share of the attention weights that is set to zero.
        scaling: Of the scores; ``1 / sqrt(W)`` if None.
        **kwargs: Not used.

    Returns:
        ``(B, C, H, W)``, and no attention weights.
    """
    batch, n_heads, n_rows, width = query_BHCW.shape
    mixed = nn.functional.scaled_dot_product_attention(
        query_BHCW.reshape(batch, key_BKSW.shape[1], -1, width),  # (B, K, G C, W)
        key_BKSW,
        value_BKSW,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    mixed_BHCW = mixed.reshape(batch, n_heads, n_rows, value_BKSW.shape[3])
    return mixed_BHCW.transpose(1, 2).contiguous(), None
