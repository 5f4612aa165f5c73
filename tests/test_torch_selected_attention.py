"""cggr.torch.selected_attention: kernels and plain PyTorch, against float64."""

import kernels_on
import numpy as np
import pytest
import torch
from test_kernels_attention import TOLERANCE, VIEWS, expected, problem

from cggr.torch import selected_attention as attention

HALF = torch.float16 if kernels_on.INTERPRETED else torch.bfloat16
DEVICE = kernels_on.DEVICE
WAYS = ("fused", "eager")


def on_device(query, key, value, low, high, index, grad):
    """Tensors as a model has them, heads beside each other, and those that get gradients."""
    query, key, value, grad = (
        x.transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2) for x in (query, key, value, grad)
    )
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    rows = [torch.from_numpy(np.ascontiguousarray(x)).int().to(DEVICE) for x in (low, high, index)]
    return leaves, rows, grad


def gradients(way, leaves, rows, grad, scale=0.25, **options):
    out = way(*leaves, *rows, scale, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(way, *given, keys=None):
    query, key, value, low, high, index, grad = given
    mask = None if keys is None else torch.from_numpy(keys).int().to(DEVICE)
    found = gradients(way, *on_device(*given), keys_BS=mask)
    arrays = [x.double().numpy() for x in (query, key, value)]
    want = expected(*arrays, low, high, index, grad.double().numpy(), 0.25, keys=keys)
    selected = torch.from_numpy(index)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    found = [x.double().cpu() for x in found]
    for full in found[2:]:
        assert not full.scatter(2, selected, 0).any()  # nothing for what was not selected
    found[2:] = [full.gather(2, selected) for full in found[2:]]
    for a, b in zip(found, want, strict=True):
        tolerance = TOLERANCE[query.dtype] * max(np.abs(b).max(), 1.0)
        np.testing.assert_allclose(a.numpy(), b, rtol=0, atol=tolerance)


@pytest.mark.float64  # the truth
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("way", WAYS)
def test_output_and_gradients(way, view, dtype):
    check(getattr(attention, way), *problem(2, 4, 2, 70, 21, 16, dtype, view))


@pytest.mark.float64
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("way", WAYS)
def test_keys_that_none_sees(way, view):
    keys = np.random.default_rng(5).random((2, 70)) < 0.5
    keys[1] = False
    check(getattr(attention, way), *problem(2, 4, 2, 70, 21, 16, torch.float32, view), keys=keys)


@pytest.mark.float64
@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way):
    leaves, rows, grad = on_device(*problem(2, 2, 1, 9, 0, 16, torch.float32))
    out, dq, dk, dv = gradients(getattr(attention, way), leaves, rows, grad)
    assert out.shape == dq.shape == (2, 2, 0, 16)
    assert not dk.any()
    assert not dv.any()


@pytest.mark.float64
def test_memory_of_any_order():
    leaves, rows, grad = on_device(*problem(2, 2, 2, 30, 12, 16, torch.float32))
    want = gradients(attention.fused, leaves, rows, grad)
    leaves = [
        x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in leaves
    ]
    keys = torch.ones(30, 2, dtype=torch.int32, device=DEVICE).T
    got = gradients(attention.fused, leaves, rows, grad.expand(2, 2, 12, 16), keys_BS=keys)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.float64
def test_compiled_it_is_the_same():
    torch._dynamo.reset()
    leaves, rows, grad = on_device(*problem(2, 4, 2, 30, 12, 16, torch.float32))
    compiled = torch.compile(attention.fused, fullgraph=True, backend="aot_eager")
    got = gradients(compiled, leaves, rows, grad)
    for a, b in zip(got, gradients(attention.fused, leaves, rows, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.float64
def test_the_operators_are_what_they_say():
    (query, key, value), (low, high, index), grad = on_device(
        *problem(1, 2, 1, 20, 7, 16, torch.float32)
    )
    query, key, value = (x.detach() for x in (query, key, value))
    out, lse = attention.selected_attention(query, key, value, low, high, None, 0.25, 0.0)
    assert out.transpose(1, 2).is_contiguous()  # as a model goes on with it
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.cggr.selected_attention
    backward = torch.ops.cggr.selected_attention_gradient
    for keys in (None, torch.ones(1, 20, dtype=torch.int32, device=DEVICE)):
        inputs = (query, key, value, low, high, keys)
        torch.library.opcheck(forward, (*inputs, 0.25, 0.0), test_utils=checks)
        inputs = (*inputs, index, out, lse, grad, 0.25, 0.0)
        torch.library.opcheck(backward, inputs, test_utils=checks)


@pytest.mark.float64
def test_a_second_derivative_is_refused():
    (query, key, value), rows, _ = on_device(*problem(1, 1, 1, 9, 3, 16, torch.float32))
    out = attention.fused(query, key, value, *rows, 0.25)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(out.sum(), query, create_graph=True)
