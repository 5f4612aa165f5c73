"""Attention of some positions, in which query heads share keys and values without copies.

transformers repeats the keys and values of grouped heads wherever there is a mask, and the backward
pass keeps the copies of every layer. Here the heads of a group are further queries of the head that
they share.

Imported only where a model of transformers is trained.

Shapes: ``B`` sequences of ``S`` tokens, of which ``C`` are run; ``H`` query heads, of which ``G``
share each of the ``K`` heads of keys and values; ``W`` size of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

SDPA = "sdpa"
NAME = "cggr_rows"  # among transformers' attention functions


def share_heads(configs: list[Any]) -> int:
    """Makes the layers of these configurations attend by :func:`grouped_attention`, if it helps.

    Returns:
        G, by which :func:`for_groups` makes their masks; 1 if they attend as before.
    """
    groups = {_group(config) for config in configs}
    group = groups.pop()
    if group == 1 or groups:
        return 1
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()[SDPA])
    AttentionInterface.register(NAME, grouped_attention)
    for config in configs:
        config._attn_implementation = NAME
    return group


def _group(config: Any) -> int:
    """How many heads share one of keys and values, where they attend by sdpa."""
    if config._attn_implementation != SDPA:
        return 1
    n_heads: int = config.num_attention_heads
    return n_heads // (getattr(config, "num_key_value_heads", None) or n_heads)


def for_groups(masks: Any, group: int) -> Any:
    """Masks ``(B, 1, C, S)``, or a dict of such, as ``(B, 1, G C, S)``: once for all layers."""
    if isinstance(masks, dict):
        return {kind: for_groups(mask, group) for kind, mask in masks.items()}
    if masks.shape[1] != 1:  # the caller's own, of every head: sdpa takes it as it is
        return masks
    return masks.repeat(1, 1, group, 1)


def grouped_attention(
    module: nn.Module,
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    attention_mask: Tensor | None,
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
        attention_mask: ``(B, 1, G C, S)``; with any other, this is transformers' ``sdpa``.
        dropout: Share of the attention weights that is set to zero.
        scaling: Of the scores; ``1 / sqrt(W)`` if None.
        **kwargs: For transformers.

    Returns:
        ``(B, C, H, W)``, and no attention weights.
    """
    batch, n_heads, n_rows, width = query_BHCW.shape
    group = n_heads // key_BKSW.shape[1]
    if attention_mask is None or group == 1 or attention_mask.shape[2] != group * n_rows:
        attend: Any = AttentionInterface()[SDPA]
        attended: tuple[Tensor, None] = attend(
            module,
            query_BHCW,
            key_BKSW,
            value_BKSW,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
        return attended
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
