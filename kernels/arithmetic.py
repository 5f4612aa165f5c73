"""What the kernels share: exponents, soft-caps, the statistics that follow from sums of a row."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of anything below is 0 in float32; unlike -inf it can be multiplied by that 0.
LOWEST = tl.constexpr(-200.0)


class Launch(NamedTuple):
    """How to launch a kernel: the same from every framework, so that the results are the same."""

    grid: tuple[int, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1


@triton.jit
def clamped(exponent):
    """Not below LOWEST; NaN stays NaN."""
    return tl.maximum(exponent, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exponent_of(x, top):
    """``log2(e) (x - top)``, for a top that may be -inf."""
    return clamped((x - tl.where(top == -float("inf"), 0.0, top)) * LOG2_E)


@triton.jit
def capped_logits(z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """``c tanh(s z / c)``, or ``s z`` where SOFTCAP is 0, of a head's output in float32."""
    x = z
    if SCALE != 1.0:
        # As a fused operation, so that a compiler does not fuse the product with what follows: of
        # two equal logits one would be rounded, and huge ones would differ by huge numbers.
        x = tl.fma(x, tl.full(x.shape, SCALE, tl.float32), tl.zeros(x.shape, tl.float32))
    if SOFTCAP > 0.0:
        # tanh(a) = sign(a) (1 - f) / (1 + f) with f = exp(-2 |a|): right at both infinities. Where
        # 1 - f would lose digits, its series, whose next term is below 1e-9.
        a = x / SOFTCAP
        f = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E / SOFTCAP))
        tanh = (1.0 - f) / (1.0 + f)
        b = a * a
        small = 1.0 + b * (-1.0 / 3.0 + b * (2.0 / 15.0 + b * (-17.0 / 315.0 + b * 62.0 / 2835.0)))
        tanh = tl.where(a < 0.0, -SOFTCAP * tanh, SOFTCAP * tanh)
        x = tl.where(b < 0.04, x * small, tanh)
    return x


@triton.jit
def log1p(x):
    """Without the loss of small x against 1 (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def expm1(x):
    """Without the loss of small results against 1 (Kahan)."""
    u = tl.exp(x)
    slope = tl.where(u == 0.0, 1.0, x / tl.log(u))
    return tl.where(u == 1.0, x, (u - 1.0) * slope)


@triton.jit
def sum_of(s_a, t_a, q_a, s_b, t_b, q_b):
    """Three sums at once."""
    return s_a + s_b, t_a + t_b, q_a + q_b


@triton.jit
def store_statistics(
    out_ptr,
    n_rows,
    row,
    valid_row,
    top,
    second,
    rest,
    weighted,
    squares,
    label_logit,
    target,
    V: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
):
    """Statistics from sums of ``e = exp(x - top)`` over all classes but one largest.

    They are ``rest = Σ e``, ``weighted = Σ e log2(e)`` and ``squares = Σ e²``. `out_ptr` points at
    six rows of `n_rows`: entropy, margin, confidence, top, and with targets nll, error norm. The
    middle ones give a row's softmax and its gradient: ``p = confidence exp(x - top)``.
    """
    out_ptr += row
    stride = tl.cast(n_rows, tl.int64)
    rest += top - top  # NaN for a row without a finite maximum: a fault stays loud
    exp_sum = 1.0 + rest
    log_sum = log1p(rest)
    tl.store(out_ptr, log_sum - LN_2 * weighted / exp_sum, mask=valid_row)
    margin = (1.0 - tl.exp2(exponent_of(second, top))) / exp_sum
    tl.store(out_ptr + stride, margin, mask=valid_row)
    tl.store(out_ptr + 2 * stride, 1.0 / exp_sum, mask=valid_row)
    tl.store(out_ptr + 3 * stride, top, mask=valid_row)
    if HAS_TARGET:
        ignored = target == IGNORE_INDEX
        fault = tl.where((target >= 0) & (target < V), 0.0, float("nan"))
        nll = log_sum - (label_logit - top)
        tl.store(out_ptr + 4 * stride, tl.where(ignored, 0.0, nll + fault), mask=valid_row)
        # ||p - onehot||² (1 + rest)² = (Σ_{v≠y} e)² + Σ_{v≠y} e². Where y is a largest class, its
        # term is the 1 kept apart; elsewhere it is taken from sums that keep at least that 1.
        label_e = tl.exp2(exponent_of(label_logit, top))
        label_is_top = label_logit == top
        error = tl.where(label_is_top, rest, exp_sum - label_e)
        squares += tl.where(label_is_top, 0.0, 1.0 - label_e * label_e)
        norm = tl.sqrt(error * error + squares) / exp_sum
        tl.store(out_ptr + 5 * stride, tl.where(ignored, 0.0, norm + fault), mask=valid_row)


@triton.jit
def store_sums(out_ptr, n_rows, row, valid_row, top, second, rest, weighted, squares, label_logit):
    """What statistics are made of, for classes that are a part of all: six rows of `n_rows`.

    top, second, ``Σ e``, ``Σ e (x - top)``, ``Σ e²`` and the label's logit, over all of these
    classes but one largest.
    """
    out_ptr += row
    stride = tl.cast(n_rows, tl.int64)
    tl.store(out_ptr, top, mask=valid_row)
    tl.store(out_ptr + stride, second, mask=valid_row)
    tl.store(out_ptr + 2 * stride, rest, mask=valid_row)
    tl.store(out_ptr + 3 * stride, weighted * LN_2, mask=valid_row)
    tl.store(out_ptr + 4 * stride, squares, mask=valid_row)
    tl.store(out_ptr + 5 * stride, label_logit, mask=valid_row)
