"""Launches the kernels on torch tensors: on a CUDA device, without one in Triton's interpreter.

Every launch here also shows that the kernel keeps to what is its own. Logits lie in a wider array
full of NaN, which would show in the results if they were read, and must be there afterwards.
Outputs lie between canaries. In the interpreter, every address is looked at as well.
"""

import numpy as np
import pytest
import torch
import truth

triton = pytest.importorskip(
    "triton",
    reason="Triton is not installed, which has wheels for Linux only",
    exc_type=ImportError,
)

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from cggr.kernels.linear_token_statistics import (  # noqa: E402
    join_sums_kernel,
    linear_sums_kernel,
    linear_token_statistics_launch,
)
from cggr.kernels.selected_attention import (  # noqa: E402
    key_gradient_kernel,
    query_gradient_kernel,
    selected_attention_kernel,
    selected_attention_launches,
)
from cggr.kernels.selected_cross_entropy import (  # noqa: E402
    cross_entropy_gradient_kernel,
    cross_entropy_gradient_launch,
)
from cggr.kernels.token_statistics import (  # noqa: E402
    token_statistics_kernel,
    token_statistics_launch,
)

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = ("entropy", "margin", "confidence", "top", "nll", "error_norm")
CANARY = -7.25
_MARGIN = 64  # elements before and after an array

_allowed = []  # the tensors of a launch by `run`; other launches are not looked at


class _FaithfulBuilder(interpreter.InterpreterBuilder):
    """What a GPU does and Triton's interpreter does not."""

    def create_fma(self, x, y, z):
        # One rounding. A product of two float32 is exact in float64.
        with np.errstate(all="ignore"):
            exact = x.data.astype(np.float64) * y.data + z.data
            return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def create_dot(self, a, b, d, *options):
        # The interpreter would multiply the bits of bfloat16, which NumPy does not have.
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return super().create_dot(a, b, d, *options)

    def create_masked_load(self, ptrs, mask, *options):
        if _allowed:
            _check_addresses(ptrs, mask)
        return super().create_masked_load(ptrs, mask, *options)

    def create_masked_store(self, ptrs, value, mask, *options):
        if _allowed:
            _check_addresses(ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *options)


if INTERPRETED:
    interpreter.interpreter_builder.__class__ = _FaithfulBuilder


def _check_addresses(ptrs, mask):
    """All of them multiples of what is read there, and inside a row of one of the tensors."""
    width = ptrs.get_element_ty().primitive_bitwidth // 8
    valid = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
    address = ptrs.data[valid].astype(np.int64)
    assert (address % width == 0).all(), f"{width} bytes at an address that is no multiple of them"
    inside = np.zeros(address.shape, dtype=bool)
    for tensor in _allowed:
        row_bytes = tensor.shape[-1] * tensor.element_size()
        stride_bytes = tensor.stride(0) * tensor.element_size() if tensor.ndim > 1 else row_bytes
        row, byte = np.divmod(address - tensor.data_ptr(), max(stride_bytes, 1))
        rows = tensor.shape[0] if tensor.ndim > 1 else 1
        inside |= (row >= 0) & (row < rows) & (byte + width <= row_bytes)
    assert inside.all(), f"{(~inside).sum()} addresses outside the rows of every tensor"


def _as_rows(x):
    """One or two dimensions: what is contiguous is one long row."""
    if x.is_contiguous():
        return x.reshape(-1)
    if x.ndim <= 2:
        return x
    # Of heads side by side, that lie in as many rows as there are heads at all.
    assert x.stride(-1) == 1
    dimensions = zip(x.shape[:-1], x.stride(), strict=False)
    distance = min((stride for size, stride in dimensions if size > 1), default=x.shape[-1])
    return x.as_strided((x.shape[:-1].numel(), x.shape[-1]), (distance, 1))


def run(kernel, launch, *arguments, rows=None, **overrides):
    """Launch a kernel on tensors and scalars, with some of its constants overridden.

    `rows` is what may be read of the first tensor, where that only says from where to count.
    """
    unknown = set(overrides) - set(launch.constants)
    assert not unknown, f"{kernel.__name__} has no constants {sorted(unknown)}"
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    tensors[0] = tensors[0] if rows is None else rows
    _allowed[:] = [_as_rows(x) for x in tensors]
    try:
        kernel[launch.grid](
            *arguments,
            **launch.constants | overrides,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    finally:
        _allowed.clear()


def rows_of(values, *, gap=0, offset=0, fill=torch.nan):
    """`values` (N, V) in rows of V + gap elements, the first `offset` elements after 16 bytes' end.

    Returns:
        The whole memory and the view of it that holds the values.
    """
    rows, classes = values.shape
    stride = classes + gap
    memory = torch.full((2 * _MARGIN + offset + rows * stride,), fill, dtype=values.dtype)
    memory = memory.to(DEVICE)
    view = memory.as_strided((rows, classes), (stride, 1), _MARGIN + offset)
    view.copy_(values)
    return memory, view


class Untouched:
    """Asserts that of a memory nothing but a view was written, on leaving a `with`."""

    def __init__(self, memory, view):
        others = torch.ones(memory.shape, dtype=torch.bool, device=memory.device)
        others.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        self.memory, self.others = memory, others
        self.before = self._bits()

    def _bits(self):
        integer = torch.int32 if self.memory.element_size() == 4 else torch.int16
        return self.memory.view(integer)[self.others]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            assert torch.equal(self._bits(), self.before), "written outside of the rows"


def _output(rows, columns):
    return rows_of(torch.full((rows, columns), CANARY), fill=CANARY)


def _on_device(x):
    return None if x is None else torch.as_tensor(x).to(DEVICE)


def _statistics(out, has_target):
    found = dict(zip(NAMES, out.cpu().numpy(), strict=True))
    if not has_target:
        for name in ("nll", "error_norm"):
            assert (found.pop(name) == CANARY).all(), f"{name} was written without targets"
    return found


def token_statistics(
    logits, targets=None, *, gap=0, offset=0, ignore_index=-100, head=None, **overrides
):
    """Statistics by name of logits (N, V); `head` holds logit_scale and softcap."""
    memory, view = rows_of(logits, gap=gap, offset=offset)
    out_memory, out = _output(len(NAMES), len(logits))
    launch = token_statistics_launch(
        *view.shape,
        view.stride(0),
        view.element_size(),
        has_target=targets is not None,
        ignore_index=ignore_index,
        offset=offset,
        **head or {},
    )
    targets_or_any = view if targets is None else _on_device(targets)
    aligned = memory[_MARGIN:]
    with Untouched(memory, view[:0]), Untouched(out_memory, out):
        run(token_statistics_kernel, launch, aligned, targets_or_any, out, rows=view, **overrides)
    return _statistics(out, targets is not None)


def cross_entropy_gradient(
    logits,
    softmax,
    labels,
    row_grad,
    *,
    gap=0,
    offset=0,
    first_class=0,
    in_place=False,
    head=None,
    **overrides,
):
    """Gradient (R, V) in the precision of the logits."""
    memory, view = rows_of(logits, gap=gap, offset=offset)
    out_memory, out = (
        (memory, view)
        if in_place
        else rows_of(torch.full_like(logits, CANARY), gap=gap, offset=offset)
    )
    launch = cross_entropy_gradient_launch(
        *view.shape, view.stride(0), view.element_size(), **head or {}
    )
    first = torch.tensor([first_class], dtype=torch.int32)
    rows = (_on_device(x) for x in (softmax, labels, row_grad, first))
    with Untouched(out_memory, out), Untouched(memory, view if in_place else view[:0]):
        run(cross_entropy_gradient_kernel, launch, view, *rows, out, **overrides)
    return out.cpu()


def coarse(values, dtype):
    """Values of so few bits that every sum of their products is one of float32, in any order.

    Then there is one rounding of a logit, that of its dtype, and no order decides which way.
    """
    return torch.from_numpy(np.round(values * 32) / 32).to(dtype)


def rounded_logits(hidden, weight, bias=None):
    """A head's logits, rounded to its dtype as they are where they are written, in float64."""
    with np.errstate(all="ignore"):
        z = hidden.double().cpu().numpy() @ weight.double().cpu().numpy().T
        z = z if bias is None else z + bias.double().cpu().numpy()
    return torch.from_numpy(z).to(hidden.dtype).double().numpy()


def linear_token_statistics(
    hidden,
    weight,
    bias=None,
    targets=None,
    *,
    ignore_index=-100,
    head=None,
    split_tiles=None,
    **overrides,
):
    """Statistics by name of hidden (N, D) and weight (V, D); `split_tiles` tiles to a split."""
    assert split_tiles is not None or not overrides, "other tiles need another grid"
    (n_rows, hidden_size), n_classes = hidden.shape, len(weight)
    sums_launch, join_launch, splits, split_classes = linear_token_statistics_launch(
        n_rows,
        n_classes,
        hidden_size,
        has_target=targets is not None,
        has_bias=bias is not None,
        ignore_index=ignore_index,
        **head or {},
    )
    if split_tiles is not None:
        constants = sums_launch.constants | overrides
        split_classes = split_tiles * constants["C"]
        splits = triton.cdiv(n_classes, split_classes)
        sums_launch = sums_launch._replace(grid=(triton.cdiv(n_rows, constants["M"]), splits))
    (_, hidden), (_, weight) = rows_of(hidden), rows_of(weight)
    bias, targets = _on_device(bias), _on_device(targets)
    bias_or_any = hidden if bias is None else bias
    targets_or_any = hidden if targets is None else targets
    sums_memory, sums = _output(splits * 6, n_rows)
    sums.fill_(torch.nan)  # what the first kernel leaves out spoils the second's results
    out_memory, out = _output(len(NAMES), n_rows)
    with Untouched(sums_memory, sums), Untouched(out_memory, out):
        run(
            linear_sums_kernel,
            sums_launch,
            hidden,
            weight,
            bias_or_any,
            targets_or_any,
            sums,
            n_rows,
            split_classes,
            **overrides,
        )
        run(join_sums_kernel, join_launch, sums, targets_or_any, out, n_rows, splits)
    return _statistics(out, targets is not None)


def heads_of(values, gap):
    """Values (B, H, C, W) that lie as (B, C, H, W + gap), the gap and all around full of NaN.

    Returns:
        The whole memory and the view of it that holds the values.
    """
    batch, heads, rows, width = values.shape
    memory, view = rows_of(values.transpose(1, 2).reshape(-1, width), gap=gap)
    return memory, view.unflatten(0, (batch, rows, heads)).transpose(1, 2)


def selected_attention(
    query, key, value, low, high, index, grad, scale, softcap=None, keys=None, *, gap=8,
    tiles=None, compact=False,
):  # fmt: skip
    """Output and gradients of query, key and value, as float64; `tiles` are M and T of all.

    `keys` (B, S) is False where no query sees the key.
    """
    (batch, heads, n_rows, width), (kv_heads, length) = query.shape, key.shape[1:3]
    launches = selected_attention_launches(
        batch, heads, kv_heads, n_rows, width, query.element_size(), scale, softcap,
        masked_keys=keys is not None, compact=compact,
    )  # fmt: skip
    if tiles is not None:
        own, other = tiles
        by_rows = (triton.cdiv(n_rows, own), batch * heads)
        by_keys = (triton.cdiv(n_rows, other), batch * kv_heads)
        launches = [
            launch._replace(grid=grid, constants=launch.constants | {"M": own, "T": other})
            for launch, grid in zip(launches, (by_rows, by_rows, by_keys), strict=True)
        ]
    forward, of_query, of_key = launches
    q, k, v, g = (heads_of(x, gap)[1] for x in (query, key, value, grad))
    low, high, index = (_on_device(np.ascontiguousarray(x, np.int32)) for x in (low, high, index))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    # A row's end is followed by keys that are seen, if it is overrun.
    seen = low if keys is None else rows_of(torch.as_tensor(keys).int() * 7, gap=gap, fill=1)[1]
    sizes = n_rows, length, seen.stride(0)

    def empty(*shape, dtype=query.dtype):
        memory, view = rows_of(
            torch.full((1, int(np.prod(shape))), CANARY, dtype=dtype), fill=CANARY
        )
        return memory, view.reshape(shape)

    lse_memory, lse = empty(batch, heads, n_rows, dtype=torch.float32)
    delta_memory, delta = empty(batch, heads, n_rows, dtype=torch.float32)
    # The gradient of queries has the strides of the output.
    (out_memory, out), (dq_memory, dq) = (
        heads_of(torch.full(query.shape, CANARY, dtype=query.dtype), gap) for _ in range(2)
    )
    (dk_memory, dk), (dv_memory, dv) = (
        empty(batch, n_rows if compact else length, kv_heads, width) for _ in range(2)
    )
    with Untouched(out_memory, out), Untouched(lse_memory, lse):
        run(
            selected_attention_kernel, forward, q, k, v, low, high, seen, out, lse, *sizes,
            *strides, *out.stride()[:3],
        )  # fmt: skip
    with Untouched(dq_memory, dq), Untouched(delta_memory, delta), Untouched(out_memory, out[:0]):
        run(
            query_gradient_kernel, of_query, q, k, v, low, high, seen, out, lse, g, dq, delta,
            *sizes, *strides, *out.stride()[:3], *g.stride()[:3],
        )  # fmt: skip
    with Untouched(dk_memory, dk), Untouched(dv_memory, dv):
        run(
            key_gradient_kernel, of_key, q, k, v, low, high, seen, index, lse, g, delta, dk, dv,
            *sizes, *strides, *g.stride()[:3],
        )  # fmt: skip
    inside = index < length
    if not compact:
        others = torch.ones(batch, length + 1, dtype=torch.bool).to(DEVICE)
        others = others.scatter_(1, index.clamp(max=length).long(), False)[:, :length]
        for x in (dk, dv):
            assert (x[others] == CANARY).all(), "a key without a query was written"
        rows = index.clamp(max=length - 1).long()[:, :, None, None].expand(-1, -1, kv_heads, width)
        dk, dv = (x.gather(1, rows).where(inside[:, :, None, None], 0) for x in (dk, dv))
    found = (out, dq, dk.transpose(1, 2), dv.transpose(1, 2))
    return [x.double().cpu().numpy() for x in found]


def head_logits(logits, logit_scale=1.0, softcap=None):
    """``c tanh(s z / c)``, or ``s z``, in float64; ``s z`` beyond float32 is infinite, as there."""
    with np.errstate(all="ignore"):
        x = np.asarray(logits, dtype=np.float64) * logit_scale
        x = np.where(np.abs(x) > np.finfo(np.float32).max, np.sign(x) * np.inf, x)
        return x if softcap is None else softcap * np.tanh(x / softcap)


def expected_statistics(logits, targets=None, *, ignore_index=-100, head=None):
    """The truth, by name, for float64 logits of the head's output."""
    x = head_logits(logits, **head or {})
    statistics = truth.statistics(x, targets, ignore_index)
    expected = {name: value for name, value in statistics.items() if value is not None}
    with np.errstate(all="ignore"):
        expected["top"] = x.max(axis=-1)
    return expected


def expected_softmax(x, labels):
    """Confidence, largest logit and nll ``(3, R)`` of a head's logits, in float64."""
    with np.errstate(all="ignore"):
        top = x.max(axis=-1)
        log_sum = np.log(np.exp(x - top[:, None]).sum(axis=-1))
        of_label = np.take_along_axis(x, np.maximum(labels, 0)[:, None], axis=-1)[:, 0]
        return np.stack([np.exp(-log_sum), top, log_sum - (of_label - top)])


def assert_statistics(found, expected, *, rtol=5e-6, atol=3e-6):
    assert found.keys() == expected.keys()
    # Which of its logits is largest is not said of a row with a fault.
    found, sound = dict(found), ~np.isnan(expected["confidence"])
    top, want = found.pop("top")[sound], expected["top"][sound].astype("f4")
    np.testing.assert_allclose(top, want, rtol=1e-6, atol=atol, err_msg="top")
    for name, value in found.items():
        with np.errstate(over="ignore"):  # a loss may be larger than float32 goes
            want = expected[name].astype(np.float32)
        np.testing.assert_allclose(value, want, rtol=rtol, atol=atol, err_msg=name)
