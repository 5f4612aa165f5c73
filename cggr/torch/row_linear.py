"""Linear layers for some of the tokens.

Their products are made once for two passes, or in float8 in the first; or they are made of all
tokens, and the backward pass is of some.

Shapes: ``B`` sequences of ``S`` tokens, of which ``C`` are selected; ``D`` inputs, ``F`` outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cggr.torch.backward_rows import BackwardRows, selected_backward
from cggr.torch.functional import in_autocast_dtype

_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = torch.finfo(_FLOAT8).max
_FLOAT8_MULTIPLE = 16  # of the sizes that the products take


class RowLinear(nn.Linear):
    """Does for some positions what a linear layer does for all.

    *Two passes*: it keeps its outputs at some positions in one pass, and gives them out in the
    next, which computes the selected positions with gradient: the product is there already, and
    its backward pass is the usual one. *One pass*: its backward pass is of some rows.

    It shares the parameters of a linear layer, whose place it takes in a
    :class:`~cggr.torch.twin.Twin`.

    Attributes:
        index_BC: Positions to keep outputs of; None outside of the first pass.
        length: S of the first pass.
        kept: Outputs ``(B, C, F)`` in the order of the calls; None of what has no positions.
        in_float8: Whether it multiplies by :func:`float8_product`.
        backward_rows: What the backward pass is of; None for all.
    """

    index_BC: Tensor | None
    length: int
    kept: tuple[Tensor | None, ...]
    in_float8: bool
    backward_rows: BackwardRows | None = None

    def forget(self) -> None:
        """The state between steps, also of a layer that was not made by its constructor."""
        # Faster than one by one.
        vars(self).update(index_BC=None, length=0, kept=(), in_float8=False, backward_rows=None)

    def fits_float8(self) -> bool:
        """Whether its sizes are such that it can multiply in float8."""
        return not any(size % _FLOAT8_MULTIPLE for size in self.weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        """``input weight^T + bias``: ``(B, S, D)`` to ``(B, S, F)``, or ``C`` in place of ``S``."""
        if self.in_float8:
            return float8_product(*in_autocast_dtype(input, self.weight, self.bias))
        rows = self.backward_rows
        if rows is not None and rows.fit(input):
            return selected_backward(*in_autocast_dtype(input, self.weight, self.bias), rows)
        if self.index_BC is None and self.kept:
            output_BCF, *others = self.kept
            self.kept = tuple(others)
            if output_BCF is not None and output_BCF.shape[:-1] == input.shape[:-1]:
                x_BCD, weight_FD, bias_F = in_autocast_dtype(input, self.weight, self.bias)
                known: Tensor = _KnownProduct.apply(x_BCD, weight_FD, bias_F, output_BCF)
                return known
        output = super().forward(input)
        if (index_BC := self.index_BC) is not None:
            output_BCF = None
            if output.dim() == 3 and output.shape[:2] == (index_BC.shape[0], self.length):
                output_BCF = output.gather(1, index_BC[:, :, None].expand(-1, -1, output.shape[2]))
            self.kept = (*self.kept, output_BCF)
        return output


def float8_product(x_BSD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """``x weight^T + bias`` of float8 numbers, which have 3 bits of mantissa; without gradient.

    Every row of both has a scale of its own, so that its largest entry is float8's largest.
    """
    x_RD, x_scale_R1 = _in_float8(x_BSD.flatten(0, -2))
    w_FD, w_scale_F1 = _in_float8(weight_FD)
    output_RF = float8_matmul(x_RD, w_FD, x_scale_R1, w_scale_F1)
    output_BSF = output_RF.unflatten(0, x_BSD.shape[:-1]).to(x_BSD.dtype)
    return output_BSF if bias_F is None else output_BSF + bias_F


def _in_float8(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 numbers, and the scale of each row ``(R, 1)`` float32 that gives the values back."""
    largest_R1 = x_RD.abs().amax(dim=1, keepdim=True).float()
    scale_R1 = largest_R1.clamp(min=1e-30) / _FLOAT8_MAX  # not 0, which rows of zeros would be over
    return (x_RD.float() / scale_R1).to(_FLOAT8), scale_R1


# A custom operation, as dynamo breaks its graph at scaled_mm in PyTorch 2.11.
@torch.library.custom_op(
    "cggr::float8_matmul",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale) -> Tensor",
)
def float8_matmul(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """``(x_scale x) (weight_scale weight)^T`` ``(R, F)`` bfloat16 of float8 numbers."""
    return F.scaled_mm(
        x.contiguous(),
        weight.contiguous().T,
        x_scale,
        F.ScalingType.RowWise,
        weight_scale.T,
        F.ScalingType.RowWise,
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


@float8_matmul.register_fake
def _(x: Tensor, weight: Tensor, *scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)


class _KnownProduct(torch.autograd.Function):
    """``x weight^T + bias`` that is there already, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_BCD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, output_BCF: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_BCD, weight_FD)
        return output_BCF.clone()  # no view: it may be written to

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BCF,) = gradients
        x_BCD, weight_FD = ctx.saved_tensors
        gradient_RF = gradient_BCF.flatten(0, -2)
        return (
            gradient_BCF @ weight_FD if ctx.needs_input_grad[0] else None,
            gradient_RF.T @ x_BCD.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            gradient_RF.sum(dim=0) if ctx.needs_input_grad[2] else None,
            None,
        )
