"""What positions of a batch see of each other, and the masks that tell a model's layers so.

Shapes: ``B`` sequences of ``S`` tokens; ``C`` slots in each; ``H`` heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cggr.torch import selected_attention
from cggr.torch.functional import autocast_dtype
from cggr.torch.refusal import BIDIRECTIONAL
from cggr.torch.row_inputs import any_of

# Their sliding layers take a mask of their own.
_MASK_PER_LAYER_TYPE = ("gemma2", "gemma3_text", "qwen2", "qwen3")
_WINDOW_IN_EVERY_LAYER = ("mistral", "phi3")
# In transformers, packed sequences see each other in these.
_NEVER_PACKED = ("falcon", *BIDIRECTIONAL)


class Visible(NamedTuple):
    """What the tokens of a batch see of each other, causality and windows aside.

    Attributes:
        length: S.
        key_BS: Which tokens can be attended to; None if all can.
        segment_BS: Number of the packed sequence that a token belongs to; None if there is one.
        own_BHSS: The caller's mask, which says it all; None if there is none.
        dtype: Precision of queries and keys.
        by_kernels: Whether attention that needs a mask is by our kernels.
        synchronise: Whether the host may ask the device if there is padding between tokens, and not
            at the ends alone.
    """

    length: int
    key_BS: Tensor | None
    segment_BS: Tensor | None
    own_BHSS: Tensor | None
    dtype: torch.dtype
    by_kernels: bool
    synchronise: bool


class RowMasks:
    """The masks of a model's layers.

    Args:
        source: The model, one of transformers'.
        compiled: Whether its layers are.
    """

    def __init__(self, source: Any, *, compiled: bool) -> None:
        self._source = source
        self._compiled = compiled
        self._configs: list[Any] = []
        self._group = 0

    def follow(self, configs: list[Any], group: int) -> None:
        """Takes over the layers' configurations, and what `take_over` returned for them."""
        self._configs, self._group = configs, group

    def visible(
        self, inputs: dict[str, Tensor], shape: torch.Size, *, synchronise: bool
    ) -> Visible:
        """What tokens see.

        Args:
            inputs: Of the model, those that a sequence or a position has.
            shape: ``(B, S)``.
            synchronise: Whether the host may ask the device if there are packed sequences, or gaps
                between tokens.
        """
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        key_BS = own_BHSS = segment_BS = None
        if mask is not None:
            key_BS, own_BHSS = (mask.bool(), None) if mask.dim() == 2 else (None, mask)
        elif positions is not None and self._source.config.model_type not in _NEVER_PACKED:
            segment_BS = _segments(positions.expand(shape))
            if synchronise and not segment_BS[:, -1].any():
                segment_BS = None
        dtype = self._dtype(inputs)
        by_kernels = own_BHSS is None and self._has_kernels(any_of(inputs), dtype)
        return Visible(shape[1], key_BS, segment_BS, own_BHSS, dtype, by_kernels, synchronise)

    def of_all(
        self, inputs: dict[str, Tensor], visible: Visible, *, synchronise: bool
    ) -> dict[str, Tensor]:
        """Inputs of a pass over everything, with a mask that the model need not look into.

        Where none is needed, sdpa is faster than our kernels.
        """
        key_BS, segment_BS, like = visible.key_BS, visible.segment_BS, any_of(inputs)
        needs_none = segment_BS is None and (
            synchronise or (key_BS is None and not self._needs_mask)
        )
        if visible.own_BHSS is not None:
            return inputs
        if needs_none and not (visible.by_kernels and self._is_capped):
            return inputs
        every_BS = torch.arange(visible.length, device=like.device).expand(like.shape[:2])
        make = self._intervals if visible.by_kernels else self._masks
        return inputs | {"attention_mask": make(every_BS, visible)}

    def of_rows(self, visible: Visible, index_BC: Tensor) -> Any:
        """What the layers get as masks where these positions are run."""
        from cggr.torch.row_attention import for_groups

        if visible.by_kernels:
            return self._intervals(index_BC, visible)
        if (own_BHSS := visible.own_BHSS) is None:
            masks = self._masks(index_BC, visible)
        else:
            n_heads, length = own_BHSS.shape[1], own_BHSS.shape[3]
            rows_BHSS = own_BHSS.expand(index_BC.shape[0], *own_BHSS.shape[1:])
            masks = rows_BHSS.gather(2, index_BC[:, None, :, None].expand(-1, n_heads, -1, length))
        return for_groups(masks, self._group) if self._group > 1 else masks

    @property
    def _causal(self) -> bool:
        config = self._source.config
        return config.model_type not in BIDIRECTIONAL or bool(getattr(config, "is_decoder", False))

    @property
    def _is_capped(self) -> bool:
        """Whether attention has a soft-cap, without which sdpa is the fastest in a dense pass."""
        from cggr.torch.row_attention import CAPPED

        return any(config._attn_implementation == CAPPED for config in self._configs)

    @property
    def _needs_mask(self) -> bool:
        """Whether attention takes its causality from a mask, which transformers fills by hand."""
        from cggr.torch.row_attention import ROWS, SDPA

        return any(config._attn_implementation not in (SDPA, ROWS) for config in self._configs)

    def _dtype(self, inputs: dict[str, Tensor]) -> torch.dtype:
        """Precision of queries and keys, so that nobody converts the mask again in every layer."""
        embeddings = inputs.get("inputs_embeds", self._source.get_input_embeddings().weight)
        return autocast_dtype(embeddings) or embeddings.dtype

    def _has_kernels(self, like: Tensor, dtype: torch.dtype) -> bool:
        if not self._group:
            return False
        config = self._source.config
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        least = selected_attention.least_length(
            dtype,
            width,
            on_nvidia=like.is_cuda and torch.version.hip is None,
            compiled=self._compiled or torch.compiler.is_compiling(),
        )
        # Where it is 0, a compiler is not to look at the length, which may be a symbol.
        return least is not None and (least == 0 or like.shape[1] >= least)

    def _for_layers(self, make: Callable[[int | None], Any]) -> Any:
        """What this makes for a window, or for none: for every layer, or one for each type."""
        config = self._source.config
        window = getattr(config, "sliding_window", None)
        if config.model_type in _MASK_PER_LAYER_TYPE:
            return {
                kind: make(window if kind == "sliding_attention" else None)
                for kind in sorted(set(config.layer_types))
            }
        return make(window if config.model_type in _WINDOW_IN_EVERY_LAYER else None)

    def _intervals(self, index_BC: Tensor, visible: Visible) -> Any:
        """What the kernels take in place of masks, for every layer."""
        from cggr.torch.row_attention import as_mask

        make = functools.partial(_interval, index_BC, visible, causal=self._causal)
        keys_BS = visible.key_BS
        if keys_BS is not None and visible.synchronise and _without_gaps(keys_BS):
            keys_BS = None
        return self._for_layers(lambda window: as_mask(*make(window=window), index_BC, keys_BS))

    def _masks(self, index_BC: Tensor, visible: Visible) -> Any:
        """Masks ``(B, 1, C, S)`` of these positions, to be added to the scores, for every layer."""
        make = functools.partial(_mask, index_BC, visible, causal=self._causal)
        return self._for_layers(lambda window: make(window=window))


def _interval(
    index_BC: Tensor, visible: Visible, *, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """The first key that a position attends to, and the first one behind: see :func:`_mask`."""
    length, key_BS, segment_BS = visible.length, visible.key_BS, visible.segment_BS
    low_BC = torch.zeros_like(index_BC)
    high_BC = index_BC + 1 if causal else torch.full_like(index_BC, length)
    if window is not None:
        low_BC = (index_BC + 1 - window).clamp(min=0)
    place_S = torch.arange(length, device=index_BC.device)
    if segment_BS is not None:
        begins_BS = segment_BS != nn.functional.pad(segment_BS[:, :-1], (1, 0), value=-1)
        first_BS = torch.where(begins_BS, place_S, 0).cummax(dim=1).values
        low_BC = torch.maximum(low_BC, first_BS.gather(1, index_BC))
    if key_BS is not None:
        low_BC = torch.maximum(low_BC, torch.where(key_BS, place_S, length).amin(1)[:, None])
        high_BC = torch.minimum(high_BC, torch.where(key_BS, place_S + 1, 0).amax(1)[:, None])
    return low_BC, high_BC


def _mask(index_BC: Tensor, visible: Visible, *, causal: bool, window: int | None) -> Tensor:
    """0 where a position attends, the lowest number elsewhere: what both attentions take."""
    length, key_BS, segment_BS = visible.length, visible.key_BS, visible.segment_BS
    query_BC1 = index_BC[:, :, None]
    key_S = torch.arange(length, device=index_BC.device)
    seen_BCS = key_S <= query_BC1 if causal else torch.ones_like(key_S <= query_BC1)
    if window is not None:
        seen_BCS = seen_BCS & (key_S > query_BC1 - window)
    if segment_BS is not None:
        seen_BCS = seen_BCS & (segment_BS.gather(1, index_BC)[:, :, None] == segment_BS[:, None])
    if key_BS is not None:
        # Padding attends to itself: a row without any key would be NaN.
        seen_BCS = (seen_BCS & key_BS[:, None]) | (key_S == query_BC1)
    hidden_BCS = torch.zeros(seen_BCS.shape, dtype=visible.dtype, device=index_BC.device)
    return hidden_BCS.masked_fill_(~seen_BCS, torch.finfo(visible.dtype).min)[:, None]


def _without_gaps(key_BS: Tensor) -> bool:
    begins_BS = key_BS & ~nn.functional.pad(key_BS[:, :-1], (1, 0))
    return bool((begins_BS.sum(dim=1) <= 1).all())


def _segments(positions_BS: Tensor) -> Tensor:
    """Packed sequences, as transformers finds them: one begins where positions do not go on."""
    new_BS = positions_BS.diff(dim=1, prepend=positions_BS[:, :1] - 1) != 1
    return new_BS.cumsum(dim=1)
