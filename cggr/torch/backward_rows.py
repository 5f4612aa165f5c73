"""A backward pass of some rows, which are chosen when the forward pass has ended.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S`` in all, of which ``R`` rows are selected; ``D``
inputs, ``F`` outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cggr.torch.selected import differentiable_once

# Linear layers of attention that have no part in the keys and values, which all tokens read.
_OF_QUERIES = {"q_proj", "query", "o_proj", "out_proj", "dense", "c_proj"}


class BackwardRows(NamedTuple):
    """Which rows the backward pass is of, known only when the forward pass has ended.

    A forward pass is given this memory, and :meth:`choose` writes it before the backward pass. A
    backward pass that reads a copy of what it was before makes NaN of all gradients: such as
    ``torch.autograd.graph.save_on_cpu`` around a compiled model makes.

    Attributes:
        row_R: int64, the rows of N; 0 in unused slots.
        used_R1: bool, False in unused slots.
        slot_N: int64, where a row is among the R; R for all others.
        fault: float32 scalar, NaN until the rows are chosen, then 0.
        again: Whether layers run again, in the backward pass, for these rows alone: the outputs of
            others are zeros.
    """

    row_R: Tensor
    used_R1: Tensor
    slot_N: Tensor
    fault: Tensor
    again: bool = False

    @classmethod
    def of_size(cls, n_slots: int, n_rows: int, device: torch.device) -> BackwardRows:
        """R slots for some of N rows."""
        return cls(
            torch.zeros(n_slots, dtype=torch.int64, device=device),
            torch.zeros(n_slots, 1, dtype=torch.bool, device=device),
            torch.full((n_rows,), n_slots, dtype=torch.int64, device=device),
            torch.full((), torch.nan, device=device),
        )

    def fit(self, x: Tensor) -> bool:
        """Whether `x` has the batch's rows, and not such as were sent to an expert."""
        return x.shape[:-1].numel() == self.slot_N.shape[0]

    def choose(self, mask_N: Tensor) -> None:
        """The rows where the mask is True, at most R of them, in ascending order."""
        n_slots, n_rows = self.row_R.shape[0], mask_N.shape[0]
        count_N = mask_N.cumsum(dim=0)
        slot_N = torch.where(mask_N, count_N - 1, n_slots)
        place_N = torch.arange(n_rows, device=mask_N.device)
        row_R = place_N.new_zeros(n_slots + 1).scatter(0, slot_N, place_N)[:n_slots]
        used_R = torch.arange(n_slots, device=mask_N.device) < count_N[-1]
        # By way of `data`, which leaves the versions alone: to write what a backward pass is to
        # read is what this is for.
        self.row_R.data.copy_(torch.where(used_R, row_R, 0))
        self.used_R1.data.copy_(used_R[:, None])
        self.slot_N.data.copy_(slot_N)
        self.fault.data.zero_()


def selected_backward(
    x_BSD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, rows: BackwardRows
) -> Tensor:
    """``x weight^T + bias`` of all rows; gradients take the chosen rows of the output's alone."""
    output: Tensor = _SelectedBackward.apply(x_BSD, weight_FD, bias_F, *rows)
    return output


# The rows are chosen between forward and backward pass. A compiler finds that what depends on them
# and not on a gradient, such as these rows of a layer's inputs, could be had in the forward pass.
@torch.library.custom_op(
    "cggr::when_chosen", mutates_args=(), schema="(Tensor row, Tensor gradient) -> Tensor"
)
def _when_chosen(row: Tensor, gradient: Tensor) -> Tensor:
    return row.clone()


@_when_chosen.register_fake
def _(row: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(row)


def _in_their_places(rows_RX: Tensor, slot_N: Tensor) -> Tensor:
    """Rows ``(N, X)``, where those that are not chosen take the zeros behind the last slot."""
    return F.pad(rows_RX, (0, 0, 0, 1)).index_select(0, slot_N)


class _SelectedBackward(torch.autograd.Function):
    """``x weight^T + bias``, with gradients of some rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor | None,
        row_R: Tensor,
        used_R1: Tensor,
        slot_N: Tensor,
        fault: Tensor,
        again: bool,
    ) -> Tensor:
        rows = row_R, used_R1, slot_N, fault
        if torch.compiler.is_compiling():
            ctx.save_for_backward(x_BSD, weight_FD, *rows)
        else:  # where hooks of saved tensors, which may copy them, do not get hold of the rows
            ctx.save_for_backward(x_BSD, weight_FD)
            ctx.rows = rows
        if not again:
            return F.linear(x_BSD, weight_FD, bias_F)
        x_RD = x_BSD.flatten(0, -2).index_select(0, row_R)
        output_RF = F.linear(x_RD, weight_FD, bias_F)
        return _in_their_places(output_RF, slot_N).view(*x_BSD.shape[:-1], -1)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient_BSF: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, weight_FD, *rows = ctx.saved_tensors
        if not rows:  # those of a layer on another device
            rows = [x.to(gradient_BSF.device) for x in ctx.rows]
        row_R, used_R1, slot_N, fault = rows
        gradient_RF = gradient_BSF.flatten(0, -2).index_select(0, row_R)
        gradient_RF = torch.where(used_R1, gradient_RF, fault)
        d_x, d_weight, d_bias = None, None, None
        if ctx.needs_input_grad[0]:
            d_x = _in_their_places(gradient_RF @ weight_FD, slot_N).view(x_BSD.shape)
        if ctx.needs_input_grad[1]:
            row_R = _when_chosen(row_R, gradient_RF)
            d_weight = gradient_RF.T @ x_BSD.flatten(0, -2).index_select(0, row_R)
        if ctx.needs_input_grad[2]:
            d_bias = gradient_RF.sum(dim=0)
        return d_x, d_weight, d_bias, None, None, None, None, None


@contextlib.contextmanager
def backward_of(rows: BackwardRows | None, linears: Sequence[Any]) -> Iterator[None]:
    """Meanwhile the backward passes of these layers are of these rows."""
    before = [linear.backward_rows for linear in linears]
    try:
        for linear in linears:
            linear.backward_rows = rows
        yield
    finally:
        for linear, old in zip(linears, before, strict=True):
            linear.backward_rows = old


def linears_of_rows(
    layers: Iterable[nn.Module], kinds: tuple[type[nn.Module], ...]
) -> tuple[list[list[Any]], str | None]:
    """Linear layers through which a token's gradient comes from that token's output alone.

    All but those of keys and values, or of what is made together with them.

    Args:
        layers: Of a model of transformers.
        kinds: Classes of linear layers whose backward pass can be of some rows.

    Returns:
        Those of each layer, and which other module has such weights, and so would pass the gradient
        of all tokens; None if there is none.
    """
    found: list[list[Any]] = []
    other = None
    for i, layer in enumerate(layers):
        found.append([])
        for name, module in _beside_keys(layer):
            if isinstance(module, kinds):
                found[-1].append(module)
            elif other is None and _has_weights(module):
                other = f"{name} of class {type(module).__name__} in layer {i}"
    return found, other


def _beside_keys(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A layer's modules but those of keys and values."""
    modules: dict[str, nn.Module] = dict(layer.named_modules())
    attention = tuple(f"{name}." for name, x in modules.items() if "Attention" in type(x).__name__)
    adapted: dict[str, str] = {}  # by what is in it, the projection that an adapter is for
    for name, module in modules.items():
        projection = adapted.get(name.rpartition(".")[0], name)
        if projection != name or "base_layer" in module._modules:
            adapted[name] = projection
        has_weights = bool(module._parameters) or name in adapted
        is_of_queries = projection.rpartition(".")[2] in _OF_QUERIES
        if is_of_queries or not (has_weights and projection.startswith(attention)):
            yield name, module


def _has_weights(module: nn.Module) -> bool:
    """Whether it mixes what a token has, by weights of its own or as an adapter other than LoRA."""
    kind = type(module).__module__
    if kind.startswith("peft.tuners."):
        is_lora = kind.startswith("peft.tuners.lora.")
        return not is_lora or bool(module._modules.get("lora_magnitude_vector"))
    return any(x is not None and x.dim() > 1 for x in module._parameters.values())
