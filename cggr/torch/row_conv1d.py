"""GPT-2's linear layers, whose weights lie the other way round, with a backward pass of some rows.

Imported only where a model of transformers is trained.
"""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from cggr.torch.backward_rows import BackwardRows, selected_backward
from cggr.torch.functional import in_autocast_dtype


class RowConv1D(Conv1D):
    """Like :class:`~cggr.torch.row_linear.RowLinear`, of one pass."""

    backward_rows: BackwardRows | None = None

    def forget(self) -> None:
        """The state between steps."""
        self.backward_rows = None

    def forward(self, x: Tensor) -> Tensor:
        """``x weight + bias``: ``(B, S, D)`` to ``(B, S, F)``."""
        rows = self.backward_rows
        if rows is None or not rows.fit(x):
            plain: Tensor = super().forward(x)
            return plain
        return selected_backward(*in_autocast_dtype(x, self.weight.T, self.bias), rows)
