"""The kernels at the sizes they are for, on a CUDA device.

What is small runs there too: tests/test_kernels_*.py use the device where there is one. Under
compute-sanitizer, run all of them with ``-m "not large"``.
"""

import kernels_on
import numpy as np
import pytest
import torch
from test_kernels_attention import check, problem

from cggr.kernels.selected_cross_entropy import (
    cross_entropy_gradient_kernel,
    cross_entropy_gradient_launch,
)
from cggr.kernels.token_statistics import token_statistics_kernel, token_statistics_launch
from cggr.torch import selected_attention as attention

pytestmark = pytest.mark.skipif(
    kernels_on.INTERPRETED, reason="no CUDA device, or TRITON_INTERPRET=1"
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 64
NAN = np.nan


def normal(*shape, dtype, seed=0, scale=3.0):
    """Normal numbers on the device."""
    generator = torch.Generator(kernels_on.DEVICE).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=kernels_on.DEVICE)
    return (scale * x).to(dtype)


def classes_of(rows, classes, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, classes, rows))


def as_float64(x):
    return x.double().cpu().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [32_000, 50_257, 128_256, 151_936, 262_144])
def test_statistics_of_a_vocabulary(classes, dtype):
    logits, targets = normal(ROWS, classes, dtype=dtype), classes_of(ROWS, classes)
    targets[0] = -100
    logits[1, 5] = logits[1, -1] = 20.0  # two largest
    logits[2, :100] = -torch.inf
    logits[3, 7] = NAN
    logits[4, 11], targets[4] = 40.0, 11  # sure
    found = kernels_on.token_statistics(logits, targets)
    expected = kernels_on.expected_statistics(as_float64(logits), targets.numpy())
    kernels_on.assert_statistics(found, expected, rtol=1e-6, atol=5e-5)
    again = kernels_on.token_statistics(logits, targets)
    for name, value in found.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


@pytest.mark.parametrize("classes", [50_257, 262_144])
def test_statistics_of_large_logits(classes):
    # A row of many tiles: what is lost at one would be lost at each.
    logits, targets = normal(8, classes, dtype=torch.float32), classes_of(8, classes)
    logits += torch.tensor([0.0, 100.0, -100.0, 1e3, -1e3, 1e4, -1e4, 3e4], device="cuda")[:, None]
    found = kernels_on.token_statistics(logits, targets)
    expected = kernels_on.expected_statistics(as_float64(logits), targets.numpy())
    kernels_on.assert_statistics(found, expected, rtol=1e-6, atol=5e-5)


@pytest.mark.parametrize("head", [{"logit_scale": 0.5}, {"softcap": 30.0}], ids=str)
def test_statistics_of_heads(head):
    logits, targets = normal(ROWS, 128_256, dtype=torch.bfloat16), classes_of(ROWS, 128_256)
    found = kernels_on.token_statistics(logits, targets, head=head)
    expected = kernels_on.expected_statistics(as_float64(logits), targets.numpy(), head=head)
    kernels_on.assert_statistics(found, expected, rtol=1e-6, atol=5e-5)


def expected_gradient(logits, label, row_grad):
    """``g (p - onehot)`` of float64 logits (R, V), and what the statistics leave for it."""
    softmax = kernels_on.expected_softmax(logits, label)
    p = np.exp(logits - softmax[1][:, None]) * softmax[0][:, None]
    p[np.arange(len(p)), label] -= 1.0
    return row_grad[:, None] * p, softmax


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [50_257, 128_256])
def test_gradient_of_a_vocabulary(classes, dtype, in_place):
    logits, label = normal(ROWS, classes, dtype=dtype), classes_of(ROWS, classes)
    row_grad = np.random.default_rng(0).normal(0, 1, ROWS).astype(np.float32)
    row_grad[::4] = 0.0
    expected, softmax = expected_gradient(as_float64(logits), label.numpy(), row_grad)
    arguments = (
        logits,
        torch.from_numpy(softmax).float(),
        label,
        torch.from_numpy(row_grad),
    )
    found = kernels_on.cross_entropy_gradient(*arguments, in_place=in_place)
    rtol = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    # float16 has no more than 6e-8 between two numbers.
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=rtol, atol=2.4e-7)
    assert torch.equal(found, kernels_on.cross_entropy_gradient(*arguments, in_place=in_place))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "hidden_size", "classes"),
    [(300, 576, 50_257), pytest.param(256, 4096, 32_000, marks=pytest.mark.large)],
)
def test_linear_statistics(rows, hidden_size, classes, with_bias, dtype):
    rng = np.random.default_rng(0)
    hidden = kernels_on.coarse(rng.normal(0, 1, (rows, hidden_size)), dtype).cuda()
    weight = rng.normal(0, 3 / hidden_size**0.5, (classes, hidden_size))
    weight = kernels_on.coarse(weight, dtype).cuda()
    bias = kernels_on.coarse(rng.normal(0, 1, classes), dtype).cuda() if with_bias else None
    targets = classes_of(rows, classes)
    hidden[1, 3], targets[0] = NAN, -100
    logits = kernels_on.rounded_logits(hidden, weight, bias)
    expected = kernels_on.expected_statistics(logits, targets.numpy())
    found = kernels_on.linear_token_statistics(hidden, weight, bias, targets)
    kernels_on.assert_statistics(found, expected, rtol=1e-6, atol=5e-5)
    again = kernels_on.linear_token_statistics(hidden, weight, bias, targets)
    for name, value in found.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


@pytest.mark.large
def test_more_logits_than_32_bits_can_count():
    rows, classes = 20_000, 131_072
    needed = 12 * 2**30
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"the CUDA device has {free >> 30} GiB free, of {needed >> 30} needed")
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    for part in logits.split(1000):
        part.normal_(0.0, 3.0)
    targets = classes_of(rows, classes)
    # The first and the last, and those about the places 2^31 - 1 of logits and of bytes.
    looked_at = [0, 1, 8191, 8192, 8193, 16_383, 16_384, 16_385, rows - 2, rows - 1]
    chosen = as_float64(logits[looked_at])

    out = torch.full((6, rows), NAN, device="cuda")
    launch = token_statistics_launch(rows, classes, classes, 2, has_target=True, ignore_index=-100)
    kernels_on.run(token_statistics_kernel, launch, logits, targets.cuda(), out)
    found = dict(zip(kernels_on.NAMES, out.cpu().numpy(), strict=True))
    assert all(np.isfinite(value).all() for value in found.values())
    expected = kernels_on.expected_statistics(chosen, targets.numpy()[looked_at])
    found = {name: x[looked_at] for name, x in found.items()}
    kernels_on.assert_statistics(found, expected, rtol=1e-6, atol=5e-5)

    row_grad = torch.zeros(rows)
    row_grad[looked_at[::2]] = 0.5
    launch = cross_entropy_gradient_launch(rows, classes, classes, 2)
    first_class = torch.zeros(1, dtype=torch.int32, device="cuda")
    of_rows = (out[2:5], targets.cuda(), row_grad.cuda(), first_class)
    kernels_on.run(cross_entropy_gradient_kernel, launch, logits, *of_rows, logits)
    gradient, _ = expected_gradient(chosen, targets.numpy()[looked_at], row_grad.numpy()[looked_at])
    found = as_float64(logits[looked_at])
    np.testing.assert_allclose(found, gradient, rtol=2**-7, atol=2.4e-7)
    nonzero = torch.cat([part.count_nonzero(dim=1) for part in logits.split(1000)]).cpu()
    assert nonzero.nonzero()[:, 0].tolist() == looked_at[::2]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 64), (3, 1, 128), (2, 2, 96)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype, heads, kv_heads, width, softcap):
    given = problem(2, heads, kv_heads, 700, 200, width, dtype, "window")
    check(*given, scale=width**-0.5, softcap=softcap, compact=softcap is None)


@pytest.mark.large
def test_attention_beyond_2_31_numbers():
    heads, length, width, window = 64, 270_000, 128, 100
    assert heads * length * width > 2**31
    key, value = (
        normal(1, length, heads, width, dtype=torch.bfloat16, seed=seed, scale=1.0).transpose(1, 2)
        for seed in range(2)
    )
    index = torch.arange(length - 40, length, 3, device=key.device, dtype=torch.int32)[None]
    query = normal(1, index.shape[1], heads, width, dtype=torch.bfloat16, scale=1.0).transpose(1, 2)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    rows = (index - window, index + 1, index)
    out = attention.fused(*leaves, *rows, width**-0.5)
    found = [out, *torch.autograd.grad(out.sum(), leaves)]
    begin = length - 40 - window  # of what any query sees
    part = [x.detach()[:, -1:, begin:].requires_grad_() for x in (key, value)]
    q = query.detach()[:, -1:].requires_grad_()
    rows = (x - begin for x in rows)
    want = attention.eager(q, *part, *rows, width**-0.5)
    want = [want, *torch.autograd.grad(want.sum(), (q, *part))]
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, want, strict=True):
        a, b = a.detach(), b.detach()
        a = a[:, -1:, begin:] if name in ("dk", "dv") else a[:, -1:]
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()), msg=name)
    for full in found[2:]:
        assert not full[:, :, : length - 40].any()
