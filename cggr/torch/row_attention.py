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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from transformers import AttentionInterface, AttentionMaskInterface

SDPA = "sdpa"
NAME = "cggr_rows"  # among transformers' attention functions


def can_share(model: nn.Module, masks: Any) -> bool:
    """Whether :func:`shared_heads` can run a pass of this model under these masks.

    Args:
        model: A model of transformers without its head.
        masks: ``(B, 1 or H, C, S)``, or a dict of such.
    """
    config: Any = model.config
    n_heads = config.num_attention_heads
    if getattr(config, "num_key_value_heads", n_heads) == n_heads:
        return False
    if config._attn_implementation not in (SDPA, NAME):
        return False
    if isinstance(masks, Tensor) and masks.shape[1] != 1:  # the caller's own
        return False
    # Layers are told by their config, and must find what they were told when they run again.
    return all(
        getattr(module, "config", config) is config and not isinstance(module, ActivationWrapper)
        for module in model.modules()
    )


@contextlib.contextmanager
def shared_heads(config: Any, masks: Any) -> Iterator[Any]:
    """A pass whose layers attend by :func:`grouped_attention`.

    Args:
        config: That of all layers.
        masks: ``(B, 1, C, S)``, or a dict of such; yielded again as ``(B, 1, G C, S)``, made once
            for all layers.
    """
    # Whoever else reads the config meanwhile gets transformers' own masks and attention.
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()[SDPA])
    AttentionInterface.register(NAME, grouped_attention)
    group = config.num_attention_heads // config.num_key_value_heads
    config._attn_implementation = NAME
    try:
        if isinstance(masks, dict):
            yield {kind: mask.repeat(1, 1, group, 1) for kind, mask in masks.items()}
        else:
            yield masks.repeat(1, 1, group, 1)
    finally:
        config._attn_implementation = SDPA


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
