"""Gradient of ``Σ_r g_r nll_r`` to rows of logits, from what their statistics left.

With ``x = c tanh(s z / c)`` (or ``x = s z`` without soft-cap) of the head's output ``z``::

    dz_v = g s (1 - (x_v / c)²) (p_v - [v = y]),    p_v = confidence exp(x_v - top)

Large logits lose nothing by it, as they would in ``exp(x_v - logsumexp)``. Of the label,
``p_y - 1`` is ``expm1(-nll)``: the logits may be rounded otherwise than those that were scored, and
the difference would push a token that is learned.

A program takes a block of a row. A row with ``g = 0`` is not read: it costs its zeros. Rows may
begin anywhere: blocks begin at a multiple of 16 bytes, and only those at the ends are masked.
"""

import triton
import triton.language as tl

from .arithmetic import LOG2_E, Launch, capped_logits, expm1


def cross_entropy_gradient_launch(
    n_rows: int,
    n_classes: int,
    stride: int,
    itemsize: int,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Launch:
    """Launch of :func:`cross_entropy_gradient_kernel`.

    The arguments are those of :func:`~.token_statistics.token_statistics_launch`.
    """
    vector = 16 // itemsize
    block = min(2048, max(32, triton.next_power_of_2(n_classes)))
    before = 0 if stride % vector == 0 else vector - 1
    constants = {
        "V": n_classes,
        "STRIDE": stride,
        "SCALE": float(logit_scale),
        "SOFTCAP": float(softcap or 0.0),
        "E": vector,
        "BLOCK": block,
    }
    grid = (n_rows, triton.cdiv(n_classes + before, block))
    return Launch(grid, constants, num_warps=4 if block >= 1024 else 1)


@triton.jit
def _gradient(
    z, is_label, confidence, top, of_label, row_grad, SCALE: tl.constexpr, SOFTCAP: tl.constexpr
):
    x = capped_logits(z.to(tl.float32), SCALE, SOFTCAP)
    gradient = tl.where(is_label, of_label, confidence * tl.exp2((x - top) * LOG2_E))
    if SOFTCAP > 0.0:
        gradient *= 1.0 - (x / SOFTCAP) * (x / SOFTCAP)
    return gradient * (row_grad * SCALE)


@triton.jit
def cross_entropy_gradient_kernel(
    logits_ptr,
    softmax_ptr,
    label_ptr,
    row_grad_ptr,
    first_class_ptr,
    gradient_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = gradient`` of logits ``(R, V)``, into an array of the same strides, or the same one.

    `softmax_ptr` points at three rows: confidence, top and nll. `first_class_ptr` points at the
    class of the first column, where the columns are a part of all.
    """
    row = tl.program_id(0).to(tl.int64)
    start = row * STRIDE
    aligned = start // E * E
    before = (start - aligned).to(tl.int32)
    first = tl.program_id(1) * BLOCK
    column = first - before + tl.arange(0, BLOCK)
    source_ptr = logits_ptr + aligned + first + tl.arange(0, BLOCK)
    target_ptr = gradient_ptr + aligned + first + tl.arange(0, BLOCK)
    row_grad = tl.load(row_grad_ptr + row).to(tl.float32)
    valid = (column >= 0) & (column < V)
    is_inner = (first >= before) & (first - before + BLOCK <= V)
    if row_grad == 0.0:
        zeros = tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty)
        if is_inner:
            tl.store(target_ptr, zeros)
        else:
            tl.store(target_ptr, zeros, mask=valid)
    else:
        n_rows = tl.num_programs(0).to(tl.int64)
        confidence = tl.load(softmax_ptr + row)
        top = tl.load(softmax_ptr + n_rows + row)
        of_label = expm1(-tl.load(softmax_ptr + 2 * n_rows + row))
        is_label = column == tl.load(label_ptr + row).to(tl.int32) - tl.load(first_class_ptr)
        if is_inner:
            z = tl.load(source_ptr)
            gradient = _gradient(z, is_label, confidence, top, of_label, row_grad, SCALE, SOFTCAP)
            tl.store(target_ptr, gradient.to(gradient_ptr.dtype.element_ty))
        else:
            z = tl.load(source_ptr, mask=valid, other=0.0)
            gradient = _gradient(z, is_label, confidence, top, of_label, row_grad, SCALE, SOFTCAP)
            tl.store(target_ptr, gradient.to(gradient_ptr.dtype.element_ty), mask=valid)
