"""Keys and values of a transformers model, recorded in one pass and updated in the next.

Imported only where a model of transformers is trained.

Shapes: ``B`` sequences of ``S`` tokens, of which ``C`` are run; ``H`` heads of keys and values, of
size ``W``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class RowCache(Cache):
    """Takes the place of transformers' own caches.

    A first pass over all positions fills it. After :meth:`select`, a pass over some positions finds
    the keys and values of all in it: its own at these positions, with their gradient, and the
    recorded ones, which are constants, elsewhere.

    Args:
        records: False for a dense pass, which needs none of this: a model that is given a cache
            does not ask the device whether its positions are those of packed sequences.
    """

    def __init__(self, *, records: bool = True) -> None:
        super().__init__(layer_class_to_replicate=_RowLayer if records else _NoLayer)

    def select(self, index_BC: Tensor, unused_BC: Tensor | None) -> None:
        """The next pass runs these positions, each at most once in a sequence.

        Args:
            index_BC: int64 positions in ``[0, S)``.
            unused_BC: Slots that get no gradient; None if all do.
        """
        for layer in self.layers:
            layer.index_BC, layer.unused_BC = index_BC, unused_BC


class _NoLayer(CacheLayerMixin):
    is_sliding = False  # a window is the mask's business: nothing that is recorded is dropped

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to do: what is recorded is the model's own."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length if self.keys is None else self.keys.shape[-2], 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20


class _RowLayer(_NoLayer):
    index_BC: Tensor | None = None
    unused_BC: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.index_BC is None:
            self.keys, self.values = _on_its_own(key_states), _on_its_own(value_states)
            self.is_initialized = True
            return self.keys, self.values
        return self._written(self.keys, key_states), self._written(self.values, value_states)

    def _written(self, recorded_BHSW: Tensor, rows_BHCW: Tensor) -> Tensor:
        """The recorded ones with these in their places.

        In the same memory, where they replace what the first pass computed from the same inputs.
        Gradient checkpointing writes them a second time.
        """
        assert self.index_BC is not None
        if self.unused_BC is not None:
            unused_BC = self.unused_BC.to(rows_BHCW.device)[:, None, :, None]
            rows_BHCW = torch.where(unused_BC, rows_BHCW.detach(), rows_BHCW)
        index_BC = self.index_BC.to(rows_BHCW.device)[:, None, :, None]
        index_BHCW = index_BC.expand_as(rows_BHCW)
        if torch.compiler.is_compiling():  # the compiler decides what is written where
            return recorded_BHSW.scatter(2, index_BHCW, rows_BHCW)
        # Detached anew each time: the memory is shared, the history of a former write is not.
        return recorded_BHSW.detach().scatter_(2, index_BHCW, rows_BHCW)


def _on_its_own(x: Tensor) -> Tensor:
    """A copy of what would keep larger memory alive, such as that of queries, keys and values.

    And of what has less memory than elements, such as heads that share theirs.
    """
    if torch.compiler.is_compiling():  # the compiler decides what stays in memory
        return x
    return x.clone() if x.untyped_storage().nbytes() != x.nbytes else x
