"""The first pass in float8: products against float64, and that only the first pass has them."""

import types

import models
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cggr.torch import CGGRModel, create_truncated_router, row_linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OFF = {"warmup_steps": 0, "dynamic_threshold": False}


def _multiplies():
    if CUDA:
        return torch.cuda.get_device_capability() >= (8, 9)
    return torch.__version__ >= "2.13"


multiplies = pytest.mark.skipif(
    not _multiplies(),
    reason="no float8 products: they need a GPU of capability 8.9, or PyTorch 2.13 on the CPU",
)


def in_float8(x):
    """Rows as float8 gives them back, with a scale each, and what they may be off by.

    The nearest of e4m3's numbers, which have 4 bits from 2^-6 on and are multiples of 2^-9 below.
    Of what lies between two of them, a scale that was rounded to float32 may choose either.
    """
    scale = np.abs(x).max(-1, keepdims=True) / 448
    x = x / np.where(scale == 0, 1, scale)
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6))) - 3)
    nearest = np.rint(x / step)
    between = np.abs(np.abs(x / step - nearest) - 0.5) < 1e-5
    return nearest * step * scale, between * step * scale


@multiplies
@pytest.mark.float64
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(dtype, biased):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 48, generator=generator).to(dtype)
    x[0, 3] = 0
    x[1] *= 2.0**-20  # rows of their own scale
    weight = torch.randn(32, 48, generator=generator).to(dtype)
    bias = torch.randn(32, generator=generator).to(dtype) if biased else None
    given = (None if a is None else a.to(DEVICE) for a in (x, weight, bias))
    found = row_linear.float8_product(*given)
    assert found.dtype == dtype
    (x8, x_off), (w8, w_off) = (in_float8(a.double().numpy()) for a in (x, weight))
    want = x8 @ w8.T
    off = x_off @ np.abs(w8).T + np.abs(x8) @ w_off.T
    scale = np.abs(want).max(-1, keepdims=True)
    if biased:
        want += bias.double().numpy()
    error = np.abs(found.cpu().double().numpy() - want)
    # Of bfloat16 outputs, in a sum with the bias once more; NVIDIA's tensor cores sum in 14 bits.
    assert (error <= 2.0**-8 * (scale + np.abs(want)) + off).all()
    assert (off == 0).mean() > 0.5
    exact = x.double().numpy() @ weight.double().numpy().T
    assert np.abs(want - exact)[0].max() > 1e-2 * np.abs(exact).max()  # what float8 rounds away


@pytest.fixture
def products(monkeypatch):
    """The input of every product in float8."""
    seen, multiply = [], row_linear.float8_product

    def spy(x, weight, bias):
        assert not torch.is_grad_enabled()
        seen.append(x)
        return multiply(x, weight, bias)

    monkeypatch.setattr(row_linear, "float8_product", spy)
    return seen


def step_of(model, first_pass, router=None, **options):
    """Loss, gradients and mask of a step on the same selected tokens, whatever is computed."""
    model.zero_grad()
    options = {"selection": "random", "min_tokens_ratio": 0.4, **OFF, **options}
    wrapped = CGGRModel(model, router, split="token", first_pass=first_pass, **options)
    ids = models.token_ids(3, 16).to(DEVICE)
    loss = wrapped(ids, labels=ids)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def difference(actual, expected):
    """Norm of the difference of all gradients, relative to theirs."""
    squares = [((actual[k] - g).square().sum(), g.square().sum()) for k, g in expected.items()]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()


@multiplies
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_only_the_first_pass_is_rounded(name, products):
    model = models.build(name).to(DEVICE)
    exact_loss, exact = step_of(model, "exact")
    assert not products
    loss, gradients = step_of(model, "float8")
    linears = sum(type(m) is torch.nn.Linear for m in models.base_of(model).modules())
    assert len(products) == linears
    assert {x.shape[:2] for x in products} == {(3, 16)}
    assert loss != exact_loss
    assert loss == pytest.approx(exact_loss, rel=2e-2)
    assert 1e-4 < difference(gradients, exact) < 0.2
    assert not any(getattr(m, "in_float8", False) for m in model.modules())


@multiplies
def test_a_pass_of_every_token_is_exact(products):
    model = models.build("llama").to(DEVICE)
    exact_loss, exact = step_of(model, "exact", min_tokens_ratio=1.0)
    loss, gradients = step_of(model, "float8", min_tokens_ratio=1.0)
    assert loss == exact_loss
    assert difference(gradients, exact) == 0
    wrapped = CGGRModel(model, first_pass="float8").eval()
    ids = models.token_ids(2, 8).to(DEVICE)
    wrapped(ids, labels=ids)
    assert not products


@multiplies
def test_with_a_router_products_are_not_kept(products):
    model = models.build("llama").to(DEVICE)
    router = create_truncated_router(model, num_layers=1)
    exact_loss, exact = step_of(model, "exact", router, selection="importance")
    loss, gradients = step_of(model, "float8", router, selection="importance")
    assert len(products) == 7 * models.LAYERS
    assert loss == pytest.approx(exact_loss, rel=5e-2)
    assert 1e-4 < difference(gradients, exact) < 0.2


@multiplies
@pytest.mark.float64  # dynamo refuses to run under the guard
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_it_is_compiled_in_one_graph():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append([n for n in graph.graph.nodes if "float8_matmul" in str(n.target)])
        return graph

    model = models.build("llama").to(DEVICE)
    loss, gradients = step_of(model, "float8")
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    compiled_loss, compiled_gradients = step_of(compiled, "float8")
    assert [len(products) for products in graphs] == [7 * models.LAYERS, 0]
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[f"_orig_mod.{name}"], gradient)
    torch._dynamo.reset()


def test_sizes_that_do_not_fit():
    model = models.build("llama", hidden_size=24, intermediate_size=40, head_dim=8)
    with pytest.raises(ValueError, match="sizes that 16 divides, of which LlamaForCausalLM has no"):
        CGGRModel(model, split="token", first_pass="float8")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"first_pass": "fp8"}, "^first_pass must be 'exact' or 'float8', got 'fp8'"),
        (
            "llama",
            {"first_pass": "float8", "split": "sequence"},
            "^first_pass must be 'exact' with split='sequence', got 'float8'",
        ),
        ("mamba", {"first_pass": "float8"}, "^first_pass must be 'exact' with split='sequence'"),
        ("gpt2", {"first_pass": "float8"}, r"linear layers \(nn.Linear\).*GPT2LMHeadModel has no"),
    ],
)
def test_what_cannot_be_had(name, options, message):
    with pytest.raises(ValueError, match=message):
        CGGRModel(models.build(name), **options)


def test_versions_and_devices_without_it(monkeypatch):
    model = models.build("llama")
    with monkeypatch.context() as without:
        without.delattr(F, "scaled_mm")
        with pytest.raises(ValueError, match=r"needs PyTorch 2.10, got"):
            CGGRModel(model, first_pass="float8")
    ids = models.token_ids(2, 8)
    wrapped = CGGRModel(model, first_pass="float8", min_tokens_ratio=0.5, **OFF)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
    with pytest.raises(ValueError, match=r"capability \(8, 9\), .* got cpu with PyTorch 2.12.1"):
        wrapped(ids, labels=ids)
    parameter = types.SimpleNamespace(device=torch.device("cuda"))
    split = wrapped._token_split
    monkeypatch.setattr(split.model, "parameters", lambda: iter([parameter]))
    monkeypatch.setattr(torch.version, "hip", None)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, found=capability: found
        )
        if capability == (9, 0):
            split._check_float8()
        else:
            with pytest.raises(ValueError, match=r"capability \(8, 9\), .* got \(8, 0\)"):
                split._check_float8()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match=r"an NVIDIA GPU .* got cuda with"):
        split._check_float8()
