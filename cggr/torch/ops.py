"""The Triton kernels as operators ``torch.ops.cggr.*``: torch.compile takes them as they are.

Nothing here waits for the device or depends on values, so that a CUDA graph can record it. Triton
and the kernels are imported at the first launch.

Shapes: ``N`` tokens, of which ``R`` rows are selected; ``D`` hidden size, ``V`` classes. Statistics
are ``(6, N)`` float32: entropy, margin, confidence, the largest logit, nll, error norm; ``(4, N)``
without targets. Those of :data:`SOFTMAX` are what a gradient needs. Where the classes are a part of
all, `sums` asks for the ``(6, N)`` of :class:`~cggr.spec.statistics.VocabularySums` instead.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from cggr.kernels.chunks import class_chunk, fuses, row_chunk

SOFTMAX = slice(2, 5)  # confidence, the largest logit, nll


def launch_kernel(kernel: Any, launch: Any, *arguments: Any) -> None:
    """Runs a Triton kernel on the device of its first argument."""
    device = arguments[0].device
    elsewhere = [x.device for x in arguments if isinstance(x, Tensor) and x.device != device]
    if elsewhere:
        raise ValueError(f"all tensors must be on {device}, got one on {elsewhere[0]}.")
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[launch.grid](
            *arguments,
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


def _empty_statistics(x_NX: Tensor, targets: Tensor | None, sums: bool) -> Tensor:
    n_statistics = 4 if targets is None and not sums else 6
    return x_NX.new_empty(n_statistics, x_NX.shape[0], dtype=torch.float32)


def _with_rows(logits_NV: Tensor) -> Tensor:
    """Logits whose rows are contiguous, at any distance of each other."""
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


def _like_rows(logits_NV: Tensor) -> Tensor:
    """New memory for rows like these: at the same distance, where that wastes less than a half."""
    n_rows, n_classes = logits_NV.shape
    distance, within = logits_NV.stride()
    padded = within == 1 and n_classes <= distance < 2 * n_classes
    return logits_NV.new_empty_strided((n_rows, n_classes), (distance if padded else n_classes, 1))


def _aligned(logits_NV: Tensor) -> tuple[Tensor, int]:
    """A view that begins at a multiple of 16 bytes, and the elements from there to the logits."""
    offset = logits_NV.data_ptr() % 16 // logits_NV.element_size()
    first = logits_NV.storage_offset() - offset
    if first < 0:  # memory that torch did not allocate
        copy = logits_NV.new_empty_strided(logits_NV.shape, logits_NV.stride())
        return copy.copy_(logits_NV), 0
    return logits_NV.as_strided(logits_NV.shape, logits_NV.stride(), first), offset


@torch.library.custom_op(
    "cggr::token_statistics",
    mutates_args=(),
    schema="(Tensor logits, Tensor? targets, int ignore_index, float logit_scale=1.0, "
    "float? softcap=None, bool sums=False) -> Tensor",
)
def token_statistics(
    logits: Tensor,
    targets: Tensor | None,
    ignore_index: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sums: bool = False,
) -> Tensor:
    """Statistics of logits ``(N, V)``."""
    from cggr.kernels.token_statistics import token_statistics_kernel, token_statistics_launch

    logits = _with_rows(logits)
    n_rows, n_classes = logits.shape
    out = _empty_statistics(logits, targets, sums)
    if n_rows:
        aligned, offset = _aligned(logits)
        launch = token_statistics_launch(
            n_rows,
            n_classes,
            logits.stride(0),
            logits.element_size(),
            has_target=targets is not None,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            offset=offset,
            sums=sums,
        )
        target_N = logits if targets is None else targets.contiguous()
        launch_kernel(token_statistics_kernel, launch, aligned, target_N, out)
    return out


@token_statistics.register_fake
def _(
    logits: Tensor,
    targets: Any,
    ignore_index: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sums: bool = False,
) -> Tensor:
    return _empty_statistics(logits, targets, sums)


@torch.library.custom_op(
    "cggr::cross_entropy_gradient",
    mutates_args=(),
    schema="(Tensor logits, Tensor softmax, Tensor label, Tensor row_grad) -> Tensor",
)
def cross_entropy_gradient(
    logits: Tensor, softmax: Tensor, label: Tensor, row_grad: Tensor
) -> Tensor:
    """Gradient of ``Σ row_grad nll`` to logits ``(N, V)``; rows of gradient 0 cost their zeros."""
    gradient = _like_rows(logits)
    if logits.stride() != gradient.stride():  # the kernel has one for both
        logits = logits.contiguous()
    first_class = torch.zeros(1, dtype=torch.int32, device=logits.device)
    _fill_gradient(logits, softmax, label, row_grad, first_class, gradient, 1.0, None)
    return gradient


@cross_entropy_gradient.register_fake
def _(logits: Tensor, softmax: Tensor, label: Tensor, row_grad: Tensor) -> Tensor:
    return _like_rows(logits)


def _fill_gradient(
    logits: Tensor,
    softmax: Tensor,
    label: Tensor,
    row_grad: Tensor,
    first_class: Tensor,
    gradient: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> None:
    from cggr.kernels.selected_cross_entropy import (
        cross_entropy_gradient_kernel,
        cross_entropy_gradient_launch,
    )

    n_rows, n_classes = logits.shape
    if n_rows:
        launch = cross_entropy_gradient_launch(
            n_rows,
            n_classes,
            logits.stride(0),
            logits.element_size(),
            logit_scale=logit_scale,
            softcap=softcap,
        )
        arguments = (logits, softmax.contiguous(), label.contiguous(), row_grad.contiguous())
        launch_kernel(cross_entropy_gradient_kernel, launch, *arguments, first_class, gradient)


@torch.library.custom_op(
    "cggr::linear_token_statistics",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? targets, int ignore_index, "
    "float logit_scale=1.0, float? softcap=None, bool sums=False) -> Tensor",
)
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    ignore_index: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sums: bool = False,
) -> Tensor:
    """Statistics of ``softcap tanh(logit_scale (hidden weight^T + bias) / softcap)``.

    By whichever of the two ways below is faster for these shapes.
    """
    # In the interpreter, on the CPU, it runs as on the device that it is written for.
    capability = torch.cuda.get_device_capability(hidden.device)[0] if hidden.is_cuda else 9
    fused = fuses(hidden.shape[1], hidden.element_size(), capability)
    way = linear_statistics_fused if fused else linear_statistics_chunked
    return way(hidden, weight, bias, targets, ignore_index, logit_scale, softcap, sums)


@linear_token_statistics.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    targets: Any,
    ignore_index: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sums: bool = False,
) -> Tensor:
    return _empty_statistics(hidden, targets, sums)


def linear_statistics_fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    ignore_index: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sums: bool = False,
) -> Tensor:
    """Statistics from products that never leave the multiprocessors; 2-byte dtypes."""
    from cggr.kernels.linear_token_statistics import (
        join_sums_kernel,
        linear_sums_kernel,
        linear_token_statistics_launch,
    )

    hidden, weight = hidden.contiguous(), weight.contiguous()
    (n_rows, hidden_size), n_classes = hidden.shape, weight.shape[0]
    out = _empty_statistics(hidden, targets, sums)
    if n_rows:
        sums_launch, join_launch, splits, split_classes = linear_token_statistics_launch(
            n_rows,
            n_classes,
            hidden_size,
            has_target=targets is not None,
            has_bias=bias is not None,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            sums=sums,
        )
        parts = torch.empty(splits, 6, n_rows, dtype=torch.float32, device=hidden.device)
        bias_V = weight if bias is None else bias.contiguous()
        target_N = hidden if targets is None else targets.contiguous()
        arguments = (hidden, weight, bias_V, target_N, parts, n_rows, split_classes)
        launch_kernel(linear_sums_kernel, sums_launch, *arguments)
        launch_kernel(join_sums_kernel, join_launch, parts, target_N, out, n_rows, splits)
    return out


def linear_statistics_chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    ignore_index: int,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sums: bool = False,
) -> Tensor:
    """Statistics from cuBLAS's products of a chunk of rows at a time."""
    n_rows, n_classes = hidden.shape[0], weight.shape[0]
    size = row_chunk(n_rows, n_classes)
    buffer = hidden.new_empty(min(size, n_rows), n_classes)
    parts = []
    for first in range(0, n_rows, size):
        part = slice(first, first + size)
        logits = _product(hidden[part], weight, bias, buffer)
        targets_part = None if targets is None else targets[part]
        head = (logit_scale, softcap)
        parts.append(token_statistics(logits, targets_part, ignore_index, *head, sums))
    return torch.cat(parts, dim=1) if parts else _empty_statistics(hidden, targets, sums)


@torch.library.custom_op(
    "cggr::linear_cross_entropy_gradient",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor softmax, Tensor label, "
    "Tensor row_grad, float logit_scale, float? softcap, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def linear_cross_entropy_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softmax: Tensor,
    label: Tensor,
    row_grad: Tensor,
    logit_scale: float,
    softcap: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``Σ row_grad nll`` to hidden ``(R, D)``, weight ``(V, D)`` and bias ``(V,)``.

    A chunk of classes at a time: since the softmax is known, no row is needed as a whole, and
    the weight's gradient is written once where a chunk of rows would have to be added to the others
    in float32. A gradient that is not needed is empty. Hidden rows of gradient 0 must be finite.
    """
    need_hidden, need_weight, need_bias = needs
    n_rows, n_classes = hidden.shape[0], weight.shape[0]
    d_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=torch.float32)
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    d_bias = weight.new_empty(n_classes if need_bias else 0)
    if n_rows == 0:
        return d_hidden.to(hidden.dtype), d_weight.zero_(), d_bias.zero_()
    size = class_chunk(n_rows)
    buffer = hidden.new_empty(min(size, n_classes) * n_rows)
    first_classes = torch.arange(0, n_classes, size, dtype=torch.int32, device=hidden.device)
    for chunk, first in enumerate(range(0, n_classes, size)):
        part = slice(first, min(first + size, n_classes))
        d_logits = buffer[: n_rows * (part.stop - first)].view(n_rows, -1)
        _product(hidden, weight[part], None if bias is None else bias[part], d_logits)
        first_class = first_classes[chunk : chunk + 1]
        _fill_gradient(
            d_logits, softmax, label, row_grad, first_class, d_logits, logit_scale, softcap
        )
        if need_weight:
            torch.mm(d_logits.T, hidden, out=d_weight[part])
        if need_hidden:
            d_hidden += d_logits @ weight[part]
        if need_bias:
            d_bias[part] = d_logits.sum(dim=0, dtype=torch.float32)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


@linear_cross_entropy_gradient.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = arguments[-1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    out = out[: rows.shape[0]]
    if bias is None:
        return torch.mm(rows, weight.T, out=out)
    return torch.addmm(bias, rows, weight.T, out=out)
