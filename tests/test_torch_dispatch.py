"""The Triton path of cggr.torch: on a CUDA device, else in Triton's interpreter."""

import re

import pytest
import torch
import truth

from cggr.kernels import chunks
from cggr.torch import (
    CGGRLinearLoss,
    CGGRLoss,
    CGGRScorer,
    dispatch,
    eager,
    fused,
    linear_token_statistics,
    ops,
    token_statistics,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 as if it were an integer.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
CLASSES, WIDTH = 77, 24
FIXED = {"warmup_steps": 0, "dynamic_threshold": False}
# Relative to the largest: of the logits' own rounding, which eager float64 does not have.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "triton")


def batch(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    logits = 3 * normal(3, 10, CLASSES)
    hidden, weight, bias = normal(3, 10, WIDTH), normal(CLASSES, WIDTH), normal(CLASSES)
    targets = torch.randint(0, CLASSES, (3, 10), generator=generator).to(DEVICE)
    targets[0, :4] = -100
    return logits, hidden, weight, bias, targets


def assert_close(actual, expected, tolerance):
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-3), error


@pytest.mark.float64
def test_the_default_is_triton_on_nvidia_alone(monkeypatch):
    monkeypatch.delenv("CGGR_IMPLEMENTATION", raising=False)
    both = dispatch.IMPLEMENTATIONS
    assert dispatch.implementation(torch.zeros(1)) is both["eager"]
    assert dispatch.implementation(torch.zeros(1, device="meta")) is both["eager"]
    expected = "triton" if DEVICE == "cuda" else "eager"
    assert dispatch.implementation(torch.zeros(1, device=DEVICE)) is both[expected]
    double = torch.zeros(1, device=DEVICE, dtype=torch.float64)
    assert dispatch.implementation(double) is both["eager"]


def test_a_name_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "cuda")
    message = "CGGR_IMPLEMENTATION must be one of 'eager', 'triton' in cggr.torch, got 'cuda'."
    with pytest.raises(ValueError, match=re.escape(message)):
        token_statistics(torch.zeros(1, 2))


@pytest.mark.float64
def test_a_dtype_without_a_kernel_is_refused(triton):
    with pytest.raises(TypeError, match=r"needs float32, bfloat16 or float16, got torch\.float64"):
        token_statistics(torch.zeros(1, 2, dtype=torch.float64))


def test_without_triton_the_error_says_what_to_install(triton, monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'cggr\[cuda\]'"):
        token_statistics(torch.zeros(1, 2))


@pytest.mark.float64
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("selection", truth.SELECTIONS)
def test_loss_and_gradient_are_those_of_eager_float64(
    selection, scope, capacity, dtype, monkeypatch
):
    logits, _, _, _, targets = batch(dtype)
    logits[0, 1] = torch.nan  # an ignored row may hold anything

    def run(implementation, logits):
        monkeypatch.setenv("CGGR_IMPLEMENTATION", implementation)
        criterion = CGGRLoss(selection=selection, scope=scope, capacity=capacity, **FIXED)
        logits = logits.clone().requires_grad_()
        loss = criterion.to(DEVICE)(logits, targets)
        loss.backward()
        return loss.detach(), logits.grad

    loss, gradient = run("triton", logits)
    expected_loss, expected_gradient = run("eager", logits.double())
    assert gradient.dtype == dtype
    assert torch.equal(gradient.any(dim=-1), expected_gradient.any(dim=-1))
    assert_close(loss, expected_loss, 2e-6)
    assert_close(gradient, expected_gradient, TOLERANCE[dtype])


@pytest.mark.float64
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("head", ["plain", "bias", "softcap and scale"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("selection", ["random", "importance"])
def test_linear_loss_and_gradients_are_those_of_eager_float64(
    selection, chunked, dtype, head, training, monkeypatch
):
    _, hidden, weight, bias, targets = batch(dtype)
    hidden[0, 1] = torch.nan
    options = {"softcap": 6.0, "logit_scale": 0.7} if head == "softcap and scale" else {}
    if chunked:  # of every product: several chunks of rows, and of classes
        monkeypatch.setattr(chunks, "MAX_FUSED_HIDDEN", 0)
        monkeypatch.setattr(chunks, "MAX_LOGITS", 300)
        monkeypatch.setattr(chunks, "PRODUCT_TILE", 8)

    def run(implementation, *tensors):
        monkeypatch.setenv("CGGR_IMPLEMENTATION", implementation)
        # Neither rule can be moved by a rounding of the scores: sure, they select alike.
        criterion = CGGRLinearLoss(selection=selection, min_tokens_ratio=0.5, **FIXED, **options)
        hidden, weight, bias = (x.clone().requires_grad_() for x in tensors)
        criterion.train(training).to(DEVICE)
        arguments = {"bias": bias} if head == "bias" else {}
        loss = criterion(hidden, weight, targets, **arguments)
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad, bias.grad

    loss, *gradients = run("triton", hidden, weight, bias)
    expected_loss, *expected = run("eager", hidden.double(), weight.double(), bias.double())
    assert_close(loss, expected_loss, 2e-6 if dtype == torch.float32 else TOLERANCE[dtype])
    for actual, wanted in zip(gradients, expected, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            assert actual.dtype == dtype
            assert_close(actual, wanted, TOLERANCE[dtype])


def test_only_the_gradients_that_are_needed_are_made(triton):
    _, hidden, weight, bias, targets = batch()
    criterion = CGGRLinearLoss(selection="random", **FIXED).to(DEVICE)
    criterion(hidden, weight, targets, bias=bias.requires_grad_()).backward()
    assert bias.grad.any()
    assert hidden.grad is weight.grad is None


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_a_label_out_of_range_makes_the_loss_nan(kind, triton, monkeypatch):
    if DEVICE == "cpu":  # where such a label is refused before any kernel runs
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    logits, hidden, weight, _, targets = batch()
    targets[1, 2] = CLASSES
    if kind == "logits":
        loss = CGGRLoss(**FIXED).to(DEVICE)(logits, targets)
    else:
        loss = CGGRLinearLoss(**FIXED).to(DEVICE)(hidden, weight, targets)
    assert loss.isnan()


@pytest.mark.float64
@pytest.mark.parametrize("part", ["all", "all but the last token", "padded classes", "columns"])
@pytest.mark.parametrize("with_targets", [True, False])
def test_statistics_of_logits_in_any_layout(part, with_targets, triton):
    logits, _, _, _, targets = batch()
    if part == "all but the last token":
        logits, targets = logits[:, :-1], targets[:, :-1]
    elif part == "padded classes":
        logits, targets = logits[..., :61], targets.clamp(max=60)
    elif part == "columns":
        logits = logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    result = token_statistics(logits, targets if with_targets else None)
    expected = truth.statistics(
        logits.cpu().numpy(), targets.cpu().numpy() if with_targets else None
    )
    for name in result._fields:
        value = getattr(result, name)
        assert (value is None) == (expected.get(name) is None)
        if value is not None:
            assert value.shape == logits.shape[:-1]
            assert_close(value.cpu(), torch.as_tensor(expected[name]), 2e-6)


def test_no_tokens_at_all(triton):
    logits = torch.zeros(0, CLASSES, device=DEVICE, requires_grad=True)
    hidden = torch.zeros(0, WIDTH, device=DEVICE, requires_grad=True)
    weight = torch.ones(CLASSES, WIDTH, device=DEVICE, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert token_statistics(logits, targets).nll.shape == (0,)
    assert linear_token_statistics(hidden, weight, targets).nll.shape == (0,)
    loss = CGGRLoss(**FIXED).to(DEVICE)(logits, targets)
    loss = loss + CGGRLinearLoss(**FIXED).to(DEVICE)(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


@pytest.mark.float64
def test_a_scorer_scores_a_chunk_at_a_time(triton, monkeypatch):
    from models import build, token_ids

    from cggr.torch import create_truncated_router

    model = build("llama").to(DEVICE)
    ids = token_ids().to(DEVICE)
    scorer = CGGRScorer(create_truncated_router(model, 1), **FIXED).to(DEVICE)
    whole = scorer(ids, labels=ids)[0]
    monkeypatch.setattr(chunks, "MAX_LOGITS", 300)
    monkeypatch.setattr(chunks, "PRODUCT_TILE", 4)
    chunked = scorer(ids, labels=ids)[0]
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "eager")
    assert_close(chunked, whole, 1e-6)
    assert_close(whole, scorer(ids, labels=ids)[0], 1e-5)


def softmax_of(logits, target):
    return ops.token_statistics(logits.float(), target, -100)[ops.SOFTMAX]


OPERATORS = {
    "token_statistics": lambda logits, hidden, weight, bias, target: (
        ops.token_statistics,
        (logits, target, -100),
    ),
    "token_statistics without targets": lambda logits, hidden, weight, bias, target: (
        ops.token_statistics,
        (logits, None, -100, 0.5, 3.0),
    ),
    "cross_entropy_gradient": lambda logits, hidden, weight, bias, target: (
        ops.cross_entropy_gradient,
        (logits, softmax_of(logits, target), target, torch.ones_like(logits[:, 0])),
    ),
    "cross_entropy_gradient of a slice": lambda logits, hidden, weight, bias, target: (
        ops.cross_entropy_gradient,
        (
            logits[:, :50],
            softmax_of(logits[:, :50], target),
            target,
            torch.ones_like(logits[:, 0]),
        ),
    ),
    "linear_token_statistics": lambda logits, hidden, weight, bias, target: (
        ops.linear_token_statistics,
        (hidden, weight, bias, target, -100),
    ),
    "linear_cross_entropy_gradient": lambda logits, hidden, weight, bias, target: (
        ops.linear_cross_entropy_gradient,
        (
            hidden,
            weight,
            bias,
            softmax_of(hidden @ weight.T + bias, target),
            target,
            torch.ones_like(logits[:, 0]),
            1.0,
            None,
            [True, True, False],
        ),
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_are_what_their_schemas_and_fakes_say(operator):
    logits, hidden, weight, bias, targets = batch()
    rows = logits.reshape(-1, CLASSES), hidden.reshape(-1, WIDTH)
    function, arguments = OPERATORS[operator](*rows, weight, bias, targets.reshape(-1))
    torch.library.opcheck(function, arguments)


@pytest.mark.float64
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("selection", truth.SELECTIONS)
def test_losses_compile_without_a_graph_break(selection, triton):
    torch._dynamo.reset()
    logits, hidden, weight, _, targets = batch()
    options = {"selection": selection, "capacity": "static", **FIXED}
    criterion, linear = CGGRLoss(**options).to(DEVICE), CGGRLinearLoss(**options).to(DEVICE)

    def run(logits, hidden, weight):
        return criterion(logits, targets) + linear(hidden, weight, targets)

    def gradients(function):
        for module in (criterion, linear):
            module.draw_count.zero_()
        leaves = [x.clone().requires_grad_() for x in (logits, hidden, weight)]
        loss = function(*leaves)
        loss.backward()
        return loss.detach(), *(x.grad for x in leaves)

    compiled = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, gradients(run), strict=True):
        assert_close(actual, expected, 1e-6)
    torch._dynamo.reset()


def test_both_implementations_offer_the_same_operations():
    for name in dispatch.Implementation._fields:
        assert getattr(eager, name) is getattr(dispatch.IMPLEMENTATIONS["eager"], name)
        assert getattr(fused, name) is getattr(dispatch.IMPLEMENTATIONS["triton"], name)


@pytest.mark.float64
@pytest.mark.parametrize("chunked", [False, True])
def test_a_learned_token_pushes_no_more(chunked, triton, monkeypatch):
    # Of a logit of 20 to 30, the rounding is as large as what is left of its gradient, and far
    # larger: the probability must be that of the very logits that were scored.
    _, hidden, weight, _, _ = batch(HALF)
    hidden, targets = hidden[0], torch.arange(10, device=DEVICE)
    weight[:10] = 25 * hidden / hidden.square().sum(dim=-1, keepdim=True) + 0.3 * weight[:10]
    if chunked:
        monkeypatch.setattr(chunks, "MAX_FUSED_HIDDEN", 0)

    def gradient(implementation, hidden):
        monkeypatch.setenv("CGGR_IMPLEMENTATION", implementation)
        hidden = hidden.clone().requires_grad_()
        CGGRLinearLoss(min_tokens_ratio=1.0, **FIXED).to(DEVICE)(
            hidden, weight.to(hidden.dtype), targets
        ).backward()
        return hidden.grad

    actual, expected = gradient("triton", hidden), gradient("eager", hidden)
    exact = gradient("eager", hidden.double())
    error = (actual.double() - exact).abs().max()
    assert error <= 3 * (expected.double() - exact).abs().max() + 1e-5


@pytest.mark.parametrize("layout", ["expanded", "overlapping", "strided", "far apart"])
def test_gradients_of_rows_in_any_layout(layout, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(6, device=DEVICE)

    def gradient(implementation):
        monkeypatch.setenv("CGGR_IMPLEMENTATION", implementation)
        base = torch.randn(6, 1000, generator=generator.manual_seed(0)).to(DEVICE)
        base.requires_grad_()
        logits = {
            "expanded": lambda: base[:1, :77].expand(6, 77),
            "overlapping": lambda: base.reshape(-1)[:82].unfold(0, 77, 1),
            "strided": lambda: base[:, :77],
            "far apart": lambda: base[:, ::10],
        }[layout]()
        CGGRLoss(min_tokens_ratio=1.0, **FIXED).to(DEVICE)(logits, targets).backward()
        return base.grad

    torch.testing.assert_close(gradient("triton"), gradient("eager"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_what_cannot_be_differentiated_twice_says_so(kind, triton):
    logits, hidden, weight, _, targets = batch()
    x = (logits if kind == "logits" else hidden).requires_grad_()
    criterion = (CGGRLoss if kind == "logits" else CGGRLinearLoss)(**FIXED).to(DEVICE)
    loss = criterion(x, targets) if kind == "logits" else criterion(x, weight, targets)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_an_infinite_gradient_leaves_the_others_alone(triton):
    logits, _, _, _, targets = batch()
    loss = CGGRLoss(selection="random", **FIXED).to(DEVICE)(logits.requires_grad_(), targets)
    (loss * torch.inf).backward()
    assert 0 < (logits.grad != 0).any(dim=-1).sum() < 10


@pytest.mark.parametrize("dtypes", [("half", "float"), ("float", "half"), ("float", "float")])
def test_autocast_gives_a_head_its_precision(dtypes, triton):
    _, hidden, weight, _, targets = batch()
    kinds = {"half": HALF, "float": torch.float32}
    with torch.autocast(DEVICE, dtype=HALF):
        result = linear_token_statistics(
            hidden.to(kinds[dtypes[0]]), weight.to(kinds[dtypes[1]]), targets
        )
    expected = linear_token_statistics(hidden.to(HALF), weight.to(HALF), targets)
    assert torch.equal(result.nll, expected.nll)


def test_memory_of_others_may_begin_anywhere(triton):
    if DEVICE == "cuda":
        pytest.skip("NumPy's memory is on the CPU; PyTorch's begins where the kernel wants it")
    import numpy as np

    memory = np.random.default_rng(0).normal(0, 3, 6 * 100 + 8).astype(np.float32)
    odd = next(i for i in range(1, 5) if memory[i:].ctypes.data % 16)
    logits = torch.from_numpy(memory[odd : odd + 600].reshape(6, 100)[:, :77])
    assert logits.storage_offset() == 0
    targets = torch.arange(6)
    expected = truth.statistics(logits.numpy(), targets.numpy())
    np.testing.assert_allclose(
        token_statistics(logits, targets).nll, expected["nll"], rtol=5e-6, atol=3e-6
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_of_a_transposed_weight():
    _, hidden, weight, bias, targets = batch()
    hidden, target = hidden.reshape(-1, WIDTH), targets.reshape(-1).clamp(min=0)
    weight = weight.T.contiguous().T
    softmax = softmax_of(hidden @ weight.T, target)
    arguments = (softmax, target, torch.ones_like(softmax[0]), 1.0, None, [True, True, False])
    torch.library.opcheck(ops.linear_cross_entropy_gradient, (hidden, weight, bias, *arguments))
    torch.library.opcheck(ops.linear_token_statistics, (hidden, weight, bias, target, -100))


def test_a_slice_of_every_sequence_is_scored_in_one_launch(triton, monkeypatch):
    logits, _, _, _, targets = batch()
    launched = []
    monkeypatch.setattr(ops, "launch_kernel", lambda kernel, *_: launched.append(kernel.__name__))
    CGGRLoss(**FIXED).to(DEVICE)(logits[:, :-1], targets[:, :-1])
    assert launched == ["token_statistics_kernel"]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_row_without_gradient_may_hold_anything(indexed, triton):
    _, hidden, weight, _, targets = batch()
    hidden[0, 0, 0] = torch.inf
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    options = FIXED | {"min_tokens_ratio": 0.9 if indexed else 1.0}
    loss = CGGRLinearLoss(**options).to(DEVICE)(*leaves, targets)
    (loss * 0).backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), torch.ones(()), "2"], ids=str)
def test_a_scale_is_a_finite_number(scale):
    _, hidden, weight, _, targets = batch()
    with pytest.raises(ValueError, match="logit_scale must be a finite Python number, got"):
        CGGRLinearLoss(logit_scale=scale)(hidden, weight, targets)


def test_the_default_dtype_is_not_asked():
    logits, _, _, _, targets = batch()
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert CGGRLoss(**FIXED).to(DEVICE)(logits, targets).dtype == torch.float32
    finally:
        torch.set_default_dtype(kept)
