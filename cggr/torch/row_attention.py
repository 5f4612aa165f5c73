"""Attention of some positions: by our kernels, or by sdpa without copies of shared heads.

transformers repeats the keys and values of grouped heads wherever there is a mask, and the backward
pass keeps the copies of every layer. Here the heads of a group are further queries of the head that
they share, or, where each query sees an interval of the keys, less padding, kernels attend without
a mask of every pair. A soft-cap of the scores, which sdpa has not, they have.

Imported only where a model of transformers is trained.

Shapes: ``B`` sequences of ``S`` tokens, of which ``C`` are run; ``H`` query heads, of which ``G``
share each of the ``K`` heads of keys and values; ``W`` size of a head; ``X`` entries of
:func:`as_mask`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from cggr.torch import selected_attention
from cggr.torch.functional import autocast_dtype
from cggr.torch.refusal import is_flash

SDPA, EAGER = "sdpa", "eager"
ROWS, CAPPED = "cggr_rows", "cggr_capped_rows"  # among transformers' attention functions


def take_over(configs: list[Any]) -> int:
    """Makes the layers of these configurations attend by the functions below, if they can.

    Returns:
        By what :func:`for_groups` is to repeat masks: G, or 1 with a soft-cap; 0 if the layers
        attend as before.
    """
    if all(_is_capped(config) for config in configs):
        AttentionMaskInterface.register(CAPPED, AttentionMaskInterface()[EAGER])
        AttentionInterface.register(CAPPED, capped_row_attention)
        for config in configs:
            config._attn_implementation = CAPPED
        return 1
    groups = {_group(config) for config in configs}
    group = groups.pop()
    if group == 0 or groups:
        return 0
    AttentionMaskInterface.register(ROWS, needed_mask)
    AttentionInterface.register(ROWS, row_attention)
    for config in configs:
        config._attn_implementation = ROWS
    return group


def without_flash(configs: list[Any]) -> None:
    """What attends by flash attention, which takes no positions, attends by what does."""
    for config in configs:
        if is_flash(config._attn_implementation):
            config._attn_implementation = EAGER if _caps(config) else SDPA


def _is_capped(config: Any) -> bool:
    return _caps(config) and config._attn_implementation == EAGER


def _caps(config: Any) -> bool:
    return getattr(config, "attn_logit_softcapping", None) is not None


def needed_mask(**arguments: Any) -> Tensor | None:
    """The mask of transformers' ``sdpa``; None where causal or full attention needs none.

    There transformers 5.17 makes one nevertheless in compiled and captured steps (later ones with a
    PyTorch before 2.14), from which sdpa cannot tell that it is causal: attention took three times
    as long.
    """
    length, window = arguments["kv_length"], arguments.get("local_size")
    every = arguments.get("attention_mask") is None and (window is None or length <= window)
    causal = arguments.get("allow_is_causal_skip", True) and arguments.get("q_length") == length
    if every and (causal or arguments.get("allow_is_bidirectional_skip", False)):
        return None
    mask: Tensor | None = AttentionMaskInterface()[SDPA](**arguments)
    return mask


def _group(config: Any) -> int:
    """How many heads share one of keys and values, where they attend by sdpa; 0 elsewhere."""
    if config._attn_implementation != SDPA:
        return 0
    n_heads: int = config.num_attention_heads
    return n_heads // (getattr(config, "num_key_value_heads", None) or n_heads)


def for_groups(masks: Any, group: int) -> Any:
    """Masks ``(B, 1, C, S)``, or a dict of such, as ``(B, 1, G C, S)``: once for all layers."""
    if isinstance(masks, dict):
        return {kind: for_groups(mask, group) for kind, mask in masks.items()}
    if masks.shape[1] != 1:  # the caller's own, of every head: sdpa takes it as it is
        return masks
    return masks.repeat(1, 1, group, 1)


def as_mask(
    low_BC: Tensor, high_BC: Tensor, index_BC: Tensor, keys_BS: Tensor | None = None
) -> Tensor:
    """What these functions take in place of a mask: int32 ``(B, 1, 1, X)``, X = 3 C or 3 C + S.

    It says which interval of the keys each query sees, less those that none sees. Masks of four
    dimensions transformers hands on as they are.

    Args:
        low_BC: The first key that a query sees.
        high_BC: The first key behind those that it sees.
        index_BC: The positions of the queries.
        keys_BS: False for keys that no query sees; None if there are none.
    """
    rows = (low_BC, high_BC, index_BC) if keys_BS is None else (low_BC, high_BC, index_BC, keys_BS)
    return torch.cat(rows, dim=1).to(torch.int32)[:, None, None]


class _Seen(NamedTuple):
    """The parts of :func:`as_mask`."""

    low_BC: Tensor
    high_BC: Tensor
    index_BC: Tensor
    keys_BS: Tensor | None


def _parts(mask_B11X: Tensor, n_rows: int) -> _Seen:
    mask_BX = mask_B11X[:, 0, 0]
    low_BC, high_BC, index_BC = mask_BX[:, : 3 * n_rows].tensor_split(3, dim=1)
    keys_BS = mask_BX[:, 3 * n_rows :] if mask_BX.shape[1] > 3 * n_rows else None
    return _Seen(low_BC, high_BC, index_BC, keys_BS)


def _expanded(mask_B11X: Tensor, n_rows: int, length: int) -> Tensor:
    low_BC, high_BC, index_BC, keys_BS = _parts(mask_B11X, n_rows)
    sees_BCS = selected_attention.visible(low_BC, high_BC, keys_BS, length)
    # Padding attends to itself: a row without any key would be NaN.
    own_BCS = torch.arange(length, device=index_BC.device) == index_BC[..., None]
    return (sees_BCS | own_BCS)[:, None]


def row_attention(
    module: nn.Module,
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that is called as transformers calls its attention functions.

    Args:
        module: Whose attention it is.
        query_BHCW: Of the positions that are run.
        key_BKSW: Of all positions.
        value_BKSW: Of all positions.
        attention_mask: By :func:`for_groups` or :func:`as_mask`; with any other, this is
            transformers' ``sdpa``.
        dropout: Share of the attention weights that is set to zero.
        scaling: Of the scores; ``1 / sqrt(W)`` if None.
        **kwargs: For transformers.

    Returns:
        ``(B, C, H, W)``, and no attention weights.
    """
    if _is_ours(attention_mask):
        if dropout == 0.0:
            scale = _scale(query_BHCW, scaling)
            return _by_kernels(query_BHCW, key_BKSW, value_BKSW, attention_mask, scale), None
        attention_mask = _expanded(attention_mask, query_BHCW.shape[2], key_BKSW.shape[2])
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


def capped_row_attention(
    module: nn.Module,
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same for scores with a soft-cap; where the kernels cannot, with all scores in memory.

    The arguments are those of :func:`row_attention`.
    """
    scale = _scale(query_BHCW, scaling)
    if _is_ours(attention_mask):
        if dropout == 0.0:
            given = query_BHCW, key_BKSW, value_BKSW, attention_mask, scale, softcap
            return _by_kernels(*given), None
        attention_mask = _expanded(attention_mask, query_BHCW.shape[2], key_BKSW.shape[2])
    assert softcap is not None
    mixed_BHCW = selected_attention.capped_attention(
        query_BHCW, key_BKSW, value_BKSW, attention_mask, scale, softcap, dropout
    )
    return mixed_BHCW.transpose(1, 2).contiguous(), None


def _scale(query_BHCW: Tensor, scaling: float | None) -> float:
    return query_BHCW.shape[-1] ** -0.5 if scaling is None else scaling


def _is_ours(mask: Tensor | None) -> TypeGuard[Tensor]:
    return mask is not None and mask.dtype == torch.int32


def _by_kernels(
    query_BHCW: Tensor,
    key_BKSW: Tensor,
    value_BKSW: Tensor,
    mask_B11X: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    low_BC, high_BC, index_BC, keys_BS = _parts(mask_B11X, query_BHCW.shape[2])
    # Rotary positions make float32 of what autocast multiplied in less, as for sdpa.
    dtype = autocast_dtype(value_BKSW) or value_BKSW.dtype
    query, key, value = (x.to(dtype) for x in (query_BHCW, key_BKSW, value_BKSW))
    mixed_BHCW = selected_attention.fused(
        query, key, value, low_BC, high_BC, index_BC, scale, softcap, keys_BS
    )
    return mixed_BHCW.transpose(1, 2)
