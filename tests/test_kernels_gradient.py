"""kernels/selected_cross_entropy.py: the gradient is that of the float64 equations."""

import kernels_on
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr.kernels.selected_cross_entropy import cross_entropy_gradient_launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = (
    {},
    {"logit_scale": 0.5},
    {"softcap": 30.0},
    {"logit_scale": -1.5, "softcap": 5.0},
)
INF, NAN = np.inf, np.nan


def expected_gradient(logits, labels, row_grad, head):
    """``g s (1 - (x / c)²) (p - onehot)`` in float64, and what the statistics leave for it."""
    scale, softcap = head.get("logit_scale", 1.0), head.get("softcap")
    with np.errstate(all="ignore"):
        x = kernels_on.head_logits(logits, **head)
        softmax = kernels_on.expected_softmax(x, labels)
        p = np.exp(x - softmax[1][:, None]) * softmax[0][:, None]
        slope = 1.0 if softcap is None else 1.0 - (x / softcap) ** 2
        g = row_grad[:, None].astype(np.float64) * scale
        gradient = g * slope * (p - (labels[:, None] == np.arange(x.shape[1])))
    return np.where(row_grad[:, None] == 0.0, 0.0, gradient), softmax.astype(np.float32)


def assert_gradient(found, expected, row_grad, head):
    """An ulp of the result's precision, and of the terms that it is a difference or product of."""
    rtol = {torch.float32: 3e-6}.get(found.dtype, torch.finfo(found.dtype).eps)
    # p - 1 and 1 - (x/c)², where they are small; the latter is as wrong as tanh, 4 ulps of 1.
    scale = np.abs(row_grad).max() * abs(head.get("logit_scale", 1.0))
    atol = scale * (1e-6 if "softcap" in head else 2.4e-7)
    if found.dtype == torch.float16:
        atol += 6e-8  # its smallest step
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=rtol, atol=atol)


def check(logits, labels, row_grad, *, head=None, **options):
    head = head or {}
    values = logits.double().numpy()
    expected, softmax = expected_gradient(values, labels, row_grad, head)
    found = kernels_on.cross_entropy_gradient(
        logits,
        torch.from_numpy(softmax),
        torch.from_numpy(labels),
        torch.from_numpy(row_grad),
        head=head,
        **options,
    )
    assert found.dtype == logits.dtype
    assert_gradient(found, expected, row_grad, head)
    return found


def batch(rows, classes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (rows, classes))).to(dtype)
    row_grad = rng.normal(0, 1, rows).astype(np.float32)
    row_grad[rows // 2] = 0.0
    return logits, rng.integers(0, classes, rows), row_grad


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_equation_is_that_of_autograd(head):
    logits, labels, row_grad = batch(5, 23, torch.float64)
    x = logits.clone().requires_grad_()
    z = x * head.get("logit_scale", 1.0)
    if "softcap" in head:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    nll = torch.nn.functional.cross_entropy(z, torch.from_numpy(labels), reduction="none")
    nll.backward(torch.from_numpy(row_grad).double())
    expected, _ = expected_gradient(logits.numpy(), labels, row_grad, head)
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 8, 31, 32, 33, 1000, 2040, 2041, 2048, 2049, 4096, 5003])
def test_every_width(classes, dtype, in_place):
    data = batch(5, classes, dtype, seed=classes)
    for gap in (0, 8, 5):
        check(*data, gap=gap, in_place=in_place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_heads(head, dtype):
    check(*batch(6, 2500, dtype), head=head, gap=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_the_first_row_may_begin_anywhere(offset, dtype):
    for gap in (0, 3):
        check(*batch(3, 2100, dtype), gap=gap, offset=offset)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_labels_of_either_kind(kind):
    logits, labels, row_grad = batch(6, 300, torch.float32)
    labels[:2] = 0, 299
    found = check(logits, labels.astype(kind), row_grad)
    own = found.numpy()[range(6), labels] * row_grad
    assert (own[[0, 1, 2, 4, 5]] < 0).all()  # towards the label


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_gradient_is_zeros_whatever_it_holds(dtype, in_place):
    logits, labels, _ = batch(6, 2300, dtype)
    logits[0] = NAN
    logits[1, 5], logits[2, 7] = INF, -INF
    row_grad = np.array([0.0, 0.0, -0.0, 0.0, 2.0, 0.0], dtype=np.float32)
    expected, softmax = expected_gradient(logits.double().numpy(), labels, row_grad, {})
    softmax[:, 3], labels[5] = NAN, -100
    found = kernels_on.cross_entropy_gradient(
        logits,
        *(torch.from_numpy(x) for x in (softmax, labels, row_grad)),
        in_place=in_place,
        gap=1,
    )
    assert (found[[0, 1, 2, 3, 5]] == 0).all()
    assert_gradient(found[4:5], expected[4:5], row_grad[4:5], {})


@pytest.mark.parametrize("head", HEADS[::3], ids=str)
def test_infinite_logits(head):
    logits, labels, _ = batch(4, 70, torch.float32)
    row_grad = np.array([0.5, -2.0, 1.0, 3.0], dtype=np.float32)
    logits[0, 3:50] = -INF
    logits[1, labels[1]] = -INF
    logits[2, 69] = torch.finfo(torch.float32).min
    logits[3, 1] = NAN  # a fault stays loud
    found = check(logits, labels, row_grad, head=head)
    assert found[3].isnan().all()


@pytest.mark.parametrize("shift", [1e3, -1e4, 1e6, 1e8])
def test_large_logits_lose_nothing(shift):
    # exp(x - logsumexp) would lose as many digits as the logits are large.
    logits, labels, row_grad = batch(8, 2100, torch.float32)
    check(logits + shift, labels, row_grad)


def test_a_learned_token_is_not_pushed_by_a_rounding():
    # A product in other chunks may round the label's logit up: p would be more than 1.
    logits = torch.zeros(1, 50)
    logits[0, 7] = 25.0
    labels, row_grad = np.array([7]), np.ones(1, dtype=np.float32)
    _, softmax = expected_gradient(logits.double().numpy(), labels, row_grad, {})
    rounded = logits.clone()
    rounded[0, 7] += 0.125
    found = kernels_on.cross_entropy_gradient(
        rounded, *(torch.from_numpy(x) for x in (softmax, labels, row_grad))
    )
    np.testing.assert_allclose(found[0, 7].item(), np.expm1(-softmax[2, 0]), rtol=1e-5)
    assert -1e-9 < found[0, 7].item() < 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("head", HEADS[::3], ids=str)
def test_chunks_of_classes_make_the_whole(head, dtype):
    logits, labels, row_grad = batch(6, 2500, dtype)
    labels[:3] = 0, 899, 900  # at the ends of chunks
    expected, softmax = expected_gradient(logits.double().numpy(), labels, row_grad, head)
    others = [torch.from_numpy(x) for x in (softmax, labels, row_grad)]
    chunks = [
        kernels_on.cross_entropy_gradient(
            logits[:, first:last], *others, first_class=first, head=head, in_place=first > 0
        )
        for first, last in ((0, 900), (900, 901), (901, 2500))
    ]
    assert_gradient(torch.cat(chunks, dim=1), expected, row_grad, head)


@settings(max_examples=25)
@given(st.data())
def test_any_batch(data):
    classes, dtype = data.draw(st.integers(2, 5000)), data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 2**32 - 1))
    check(
        *batch(3, classes, dtype, seed),
        gap=data.draw(st.integers(0, 20)),
        in_place=data.draw(st.booleans()),
        head=data.draw(st.sampled_from(HEADS)),
    )


@pytest.mark.parametrize("itemsize", [2, 4])
def test_launches_are_consistent(itemsize):
    vector = 16 // itemsize
    for classes in (*range(2, 5000), 50_257, 128_256, 262_144, 300_000):
        for stride in (classes, -(-classes // vector) * vector):
            launch = cross_entropy_gradient_launch(7, classes, stride, itemsize)
            constants, (rows, blocks) = launch.constants, launch.grid
            block = constants["BLOCK"]
            assert rows == 7
            assert block & (block - 1) == 0
            assert block % constants["E"] == 0
            assert constants["E"] == vector
            assert (constants["V"], constants["STRIDE"]) == (classes, stride)
            assert (constants["SCALE"], constants["SOFTCAP"]) == (1.0, 0.0)
            # Wherever a row begins after a multiple of 16 bytes, its blocks reach its end, and
            # where all begin alike, none is for nothing.
            beginnings = {row * stride % vector for row in range(vector)}
            assert blocks * block >= max(beginnings) + classes
            assert (blocks - 1) * block < max(beginnings) + classes or len(beginnings) > 1
