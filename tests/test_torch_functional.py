import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import truth

from cggr.torch import (
    RoutingConfig,
    eager,
    linear_token_statistics,
    select_tokens,
    token_difficulty,
    token_statistics,
)

# The logits are the same numbers in truth and code, also in half precision: only the arithmetic
# (float32, or float64 for float64) differs.
TOLERANCE = {
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.bfloat16: {"rtol": 3e-6, "atol": 3e-6},
    torch.float16: {"rtol": 3e-6, "atol": 3e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
}
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    pytest.param(torch.float64, marks=pytest.mark.float64),
]
FIELDS = ("nll", "entropy", "confidence", "margin", "error_norm")


def exactly(message):
    return f"^{re.escape(message)}$"


def array(tensor):
    """The tensor in float64 NumPy; half precision has no NumPy type of its own."""
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.numpy().astype(np.float64) if tensor.is_floating_point() else tensor.numpy()


def random_logits(*shape, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def random_targets(*shape, classes, seed=1, ignored=0.2, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, shape, generator=generator)
    return targets.masked_fill(torch.rand(shape, generator=generator) < ignored, -100).to(dtype)


def assert_statistics(statistics, expected, *, rtol, atol):
    for field in FIELDS:
        want = expected[field]
        got = getattr(statistics, field)
        if want is None:
            assert got is None, field
        else:
            np.testing.assert_allclose(array(got), want, rtol=rtol, atol=atol, err_msg=field)


def test_the_guard_raises_on_float64_also_in_a_backward_pass():
    with pytest.raises(AssertionError, match="made a float64 tensor"):
        torch.ones(2).double()

    class Upcast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.double().float()

    with pytest.raises(AssertionError, match="made a float64 tensor"):
        Upcast.apply(torch.ones(2, requires_grad=True)).sum().backward()


@pytest.mark.float64
def test_the_guard_lets_marked_tests_use_float64():
    assert torch.ones(2, dtype=torch.float64).sum().item() == 2.0


# token_statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(37,), (3, 11), (2, 3, 5), ()])
def test_token_statistics_match_the_equations(dtype, leading):
    logits = random_logits(*leading, 23, dtype=dtype)
    targets = random_targets(*leading, classes=23)
    statistics = token_statistics(logits, targets)
    expected = truth.statistics(array(logits), targets.numpy())
    assert_statistics(statistics, expected, **TOLERANCE[dtype])
    want_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in statistics} == {want_dtype}
    assert {value.shape for value in statistics} == {torch.Size(leading)}


def test_without_targets_there_is_no_nll_and_no_error_norm():
    logits = random_logits(5, 9)
    statistics = token_statistics(logits)
    assert statistics.nll is None
    assert statistics.error_norm is None
    assert_statistics(statistics, truth.statistics(array(logits)), **TOLERANCE[torch.float32])


def test_a_sure_model_keeps_its_relative_precision():
    # At 20 nats, 1 - confidence is 4e-9: lost if it is computed as a difference from 1.
    logits = torch.zeros(3, 4)
    logits[:, 1] = torch.tensor([5.0, 12.0, 20.0])
    targets = torch.tensor([1, 1, 1])
    statistics = token_statistics(logits, targets)
    for row, gap in enumerate((5.0, 12.0, 20.0)):
        rest = 3 * math.exp(-gap)
        p_rest = math.exp(-gap) / (1 + rest)
        assert statistics.nll[row].item() == pytest.approx(math.log1p(rest), rel=2e-6)
        entropy = math.log1p(rest) + 3 * p_rest * gap
        assert statistics.entropy[row].item() == pytest.approx(entropy, rel=2e-6)
        error = math.sqrt((3 * p_rest) ** 2 + 3 * p_rest**2)
        assert statistics.error_norm[row].item() == pytest.approx(error, rel=2e-6)


def test_large_logits_do_not_overflow():
    logits = random_logits(6, 7) + torch.tensor([1e4, -1e4, 3e4, -3e4, 0, 1e3])[:, None]
    targets = torch.arange(6)
    expected = truth.statistics(array(logits), targets.numpy())
    assert_statistics(token_statistics(logits, targets), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded", "strided_targets"])
def test_non_contiguous_inputs(view):
    logits, targets = random_logits(6, 8, 11), random_targets(6, 8, classes=11)
    if view == "transposed":
        logits, targets = logits.transpose(0, 1), targets.T
    elif view == "sliced":
        logits, targets = logits[:, ::2, 1:], targets[:, ::2].clamp(max=9)
    elif view == "expanded":
        logits, targets = logits[:1].expand(6, 8, 11), targets
    else:
        logits, targets = logits[:, :4], targets[:, ::2]
    assert not (logits.is_contiguous() and targets.is_contiguous())
    expected = truth.statistics(array(logits), targets.numpy())
    assert_statistics(token_statistics(logits, targets), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("rows", "cached_rows"), [(1, 1), (2, 1), (7, 7), (7, 3), (100, 5), (3, 9)]
)
def test_chunk_boundaries_change_no_bit(chunks_of, rows, cached_rows):
    logits, targets = random_logits(4, 9, 13), random_targets(4, 9, classes=13)
    whole = token_statistics(logits, targets)
    chunks_of(rows, 13, cached_rows)
    chunked = token_statistics(logits, targets)
    for field in FIELDS:
        assert torch.equal(getattr(chunked, field), getattr(whole, field)), field


def test_each_row_is_read_once_whatever_the_chunk(chunks_of):
    chunks_of(5, 13)
    slices = list(eager.row_chunks(23, 13, torch.device("cpu")))
    assert [(part.start, part.stop) for part in slices] == [
        (0, 5),
        (5, 10),
        (10, 15),
        (15, 20),
        (20, 23),
    ]
    # A row wider than the budget still has a chunk of its own.
    assert len(list(eager.row_chunks(3, 10_000, torch.device("cpu")))) == 3


def test_logits_of_minus_infinity_are_classes_that_cannot_be():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf], [2.0, 2.0, -torch.inf, -torch.inf]])
    targets = torch.tensor([2, 0])
    statistics = token_statistics(logits, targets)
    finite = token_statistics(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    for field in FIELDS:
        value = getattr(statistics, field)[0].item()
        assert value == pytest.approx(getattr(finite, field)[0].item(), rel=1e-6), field
    log_2 = torch.tensor(2.0).log().item()
    assert statistics.entropy[1].item() == log_2
    assert statistics.nll[1].item() == log_2
    # A target that cannot be: infinitely hard, and not NaN.
    impossible = token_statistics(logits[:1], torch.tensor([1]))
    assert impossible.nll.item() == math.inf
    assert impossible.error_norm.item() == pytest.approx(
        truth.statistics(array(logits[:1]), np.array([1]))["error_norm"].item(), rel=1e-6
    )


def test_a_tie_of_the_top_two_has_margin_exactly_zero():
    logits = random_logits(50, 12)
    top, index = logits.max(dim=1)
    other = (index + 1) % 12
    logits.scatter_(1, other[:, None], top[:, None])
    statistics = token_statistics(logits)
    assert torch.equal(statistics.margin, torch.zeros(50))
    expected = truth.statistics(array(logits))
    np.testing.assert_allclose(array(statistics.confidence), expected["confidence"], rtol=3e-6)


def test_one_class_is_certain():
    statistics = token_statistics(random_logits(4, 1), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(statistics.nll, torch.zeros(4))
    assert torch.equal(statistics.entropy, torch.zeros(4))
    assert torch.equal(statistics.confidence, torch.ones(4))
    assert torch.equal(statistics.margin, torch.ones(4))
    assert torch.equal(statistics.error_norm, torch.zeros(4))


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)])
def test_no_rows_give_statistics_of_no_rows(shape):
    targets = torch.zeros(shape[:-1], dtype=torch.int64)
    for statistics in (
        token_statistics(torch.zeros(shape), targets),
        linear_token_statistics(torch.zeros(*shape[:-1], 4), torch.zeros(5, 4), targets),
    ):
        assert [tuple(value.shape) for value in statistics] == [shape[:-1]] * 5


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_faulty_logit_is_loud_in_its_row_only(fault):
    logits, targets = random_logits(5, 8), torch.arange(5)
    clean = token_statistics(logits, targets)
    logits[2, 6] = fault
    statistics = token_statistics(logits, targets)
    others = [0, 1, 3, 4]
    for field in FIELDS:
        value = getattr(statistics, field)
        assert value[2].isnan().item(), field
        assert torch.equal(value[others], getattr(clean, field)[others]), field


def test_a_row_of_minus_infinity_is_a_fault():
    logits = torch.full((1, 4), -torch.inf)
    statistics = token_statistics(logits, torch.tensor([0]))
    assert all(value.isnan().all().item() for value in statistics)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ignored_targets_have_loss_and_error_zero(dtype):
    logits = random_logits(6, 9)
    targets = torch.tensor([-100, 3, -100, 0, 8, -100], dtype=dtype)
    statistics = token_statistics(logits, targets)
    for value in (statistics.nll, statistics.error_norm):
        assert torch.equal(value == 0, targets == -100)
    expected = truth.statistics(array(logits), targets.numpy())
    assert_statistics(statistics, expected, **TOLERANCE[torch.float32])


def test_another_ignore_index_may_be_a_class():
    logits = random_logits(4, 9)
    targets = torch.tensor([0, 3, 0, 5])
    statistics = token_statistics(logits, targets, ignore_index=0)
    expected = truth.statistics(array(logits), targets.numpy(), ignore_index=0)
    assert_statistics(statistics, expected, **TOLERANCE[torch.float32])
    assert torch.equal(statistics.nll == 0, targets == 0)


@pytest.mark.parametrize(
    ("dtype", "targets"),
    [
        # In uint8, -100 is 156 and 256 is 0: a comparison in that type reads another number.
        (torch.uint8, [156, 0, 255]),
        (torch.int8, [-100, 100, 127]),
        (torch.int16, [-100, 255, 156]),
    ],
)
def test_narrow_integer_targets_mean_their_value(dtype, targets):
    logits = random_logits(3, 256)
    narrow = torch.tensor(targets, dtype=dtype)
    expected = truth.statistics(array(logits), np.array(targets))
    assert_statistics(token_statistics(logits, narrow), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[0, 1], [2, 9]], "got 9 at position (1, 1)."),
        ([[0, -1], [2, 9]], "got -1 at position (0, 1)."),
        ([[-100, 1], [-101, 0]], "got -101 at position (1, 0)."),
    ],
)
def test_a_target_out_of_range_is_named(targets, message):
    prefix = "targets must be in [0, 9) or ignore_index=-100, "
    logits, hidden = random_logits(2, 2, 9), random_logits(2, 2, 4)
    with pytest.raises(ValueError, match=exactly(prefix + message)):
        token_statistics(logits, torch.tensor(targets))
    with pytest.raises(ValueError, match=exactly(prefix + message)):
        linear_token_statistics(hidden, random_logits(9, 4), torch.tensor(targets))


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.int64),
            None,
            TypeError,
            "logits must be floating, got torch.int64.",
        ),
        (
            torch.tensor(1.0),
            None,
            ValueError,
            "logits must have shape (..., V) with V >= 1, got ().",
        ),
        (
            torch.zeros(4, 0),
            None,
            ValueError,
            "logits must have shape (..., V) with V >= 1, got (4, 0).",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2),
            TypeError,
            "targets must be integers, got torch.float32.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.bool),
            TypeError,
            "targets must be integers, got torch.bool.",
        ),
        (
            torch.zeros(2, 4, 3),
            torch.zeros(8, dtype=torch.int64),
            ValueError,
            "targets must have the logits' leading shape (2, 4), got (8,).",
        ),
        (
            torch.zeros(2, 4, 3),
            torch.zeros(2, 4, 1, dtype=torch.int64),
            ValueError,
            "targets must have the logits' leading shape (2, 4), got (2, 4, 1).",
        ),
    ],
)
def test_wrong_ranks_and_dtypes(logits, targets, error, message):
    with pytest.raises(error, match=exactly(message)):
        token_statistics(logits, targets)


def test_statistics_take_no_gradient():
    logits = random_logits(3, 5).requires_grad_()
    assert not any(value.requires_grad for value in token_statistics(logits, torch.arange(3)))
    weight = random_logits(5, 4).requires_grad_()
    hidden = random_logits(3, 4).requires_grad_()
    statistics = linear_token_statistics(hidden, weight, torch.arange(3))
    assert not any(value.requires_grad for value in statistics)


# linear_token_statistics


def linear_truth(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    logits = array(hidden) @ array(weight).T
    if bias is not None:
        logits = logits + array(bias)
    logits = logits * logit_scale
    return logits if softcap is None else softcap * np.tanh(logits / softcap)


HEADS = [
    {},
    {"bias": True},
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"bias": True, "logit_scale": 1.7, "softcap": 3.0},
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.float64)]
)
@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize(("rows", "cached_rows"), [(3, 2), (7, 1), (1000, 1000)])
def test_linear_token_statistics_match_the_equations(chunks_of, dtype, options, rows, cached_rows):
    chunks_of(rows, 19, cached_rows)
    hidden, weight = random_logits(4, 5, 8, scale=1.0), random_logits(19, 8, seed=3, scale=1.0)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    options = dict(options)
    if "bias" in options:
        options["bias"] = random_logits(19, seed=5).to(dtype)
    targets = random_targets(4, 5, classes=19)
    statistics = linear_token_statistics(hidden, weight, targets, **options)
    expected = truth.statistics(linear_truth(hidden, weight, **options), targets.numpy())
    # float32: the matrix product adds its own rounding to that of the statistics.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else TOLERANCE[dtype]
    assert_statistics(statistics, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_token_statistics_in_half_precision_are_those_of_the_rounded_logits(dtype):
    hidden = random_logits(12, 8, dtype=dtype, scale=1.0)
    weight = random_logits(19, 8, dtype=dtype, seed=3, scale=1.0)
    logits = hidden @ weight.T
    targets = random_targets(12, classes=19)
    expected = truth.statistics(array(logits), targets.numpy())
    statistics = linear_token_statistics(hidden, weight, targets)
    assert_statistics(statistics, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"hidden": torch.zeros(3, 4, dtype=torch.int32)},
            TypeError,
            "hidden must be floating, got torch.int32.",
        ),
        (
            {"weight": torch.zeros(5, 4, dtype=torch.int64)},
            TypeError,
            "weight must be floating, got torch.int64.",
        ),
        (
            {"bias": torch.zeros(5, dtype=torch.int64)},
            TypeError,
            "bias must be floating, got torch.int64.",
        ),
        (
            {"weight": torch.zeros(5, 3)},
            ValueError,
            "hidden must have shape (..., D) and weight (V, D), got (3, 4) and (5, 3).",
        ),
        (
            {"weight": torch.zeros(4)},
            ValueError,
            "hidden must have shape (..., D) and weight (V, D), got (3, 4) and (4,).",
        ),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape (5,), got (4,)."),
        (
            {"softcap": 0.0},
            ValueError,
            "softcap must be positive and finite or None, got 0.0.",
        ),
        (
            {"softcap": math.inf},
            ValueError,
            "softcap must be positive and finite or None, got inf.",
        ),
    ],
)
def test_wrong_linear_heads(arguments, error, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4)} | arguments
    with pytest.raises(error, match=exactly(message)):
        linear_token_statistics(**arguments)


def test_linear_token_statistics_never_hold_the_logits():
    """N=8192, V=50000: the logits would be 1.6 GB; the peak may rise by 300 MB at most."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status here, from which the peak of a new process is read")
    # VmHWM starts afresh at exec; ru_maxrss would be inherited from pytest, and hide the growth.
    program = """
        import torch
        from cggr.torch import linear_token_statistics

        def peak_mb():
            with open("/proc/self/status") as status:
                line = next(line for line in status if line.startswith("VmHWM:"))
            return int(line.split()[1]) / 1024

        torch.manual_seed(0)
        hidden, weight = torch.randn(8192, 64), torch.randn(50_000, 64)
        targets = torch.randint(0, 50_000, (8192,))
        linear_token_statistics(hidden[:8], weight, targets[:8])
        before = peak_mb()
        statistics = linear_token_statistics(hidden, weight, targets)
        after = peak_mb()
        row = torch.nn.functional.cross_entropy(hidden[-1:] @ weight.T, targets[-1:])
        assert abs(row.item() - statistics.nll[-1].item()) < 1e-4
        torch.ones(100_000_000)
        print(after - before, peak_mb() - after)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    added, control = (float(word) for word in result.stdout.split())
    print(
        f"linear_token_statistics added {added:.0f} MB to the peak; a 400 MB tensor {control:.0f}"
    )
    assert added < 300
    assert control > 300 - added  # the measurement sees memory


# token_difficulty


@pytest.mark.parametrize("scoring", ["entropy", "margin", "loss", "combined", "error_norm"])
def test_difficulty_matches_its_equation(scoring):
    logits, targets = random_logits(3, 7, 11), random_targets(3, 7, classes=11, ignored=0)
    got = token_difficulty(token_statistics(logits, targets), scoring)
    want = truth.difficulty(truth.statistics(array(logits), targets.numpy()), scoring)
    np.testing.assert_allclose(array(got), want, rtol=5e-6, atol=5e-6)
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.float64)]
)
def test_excess_loss_subtracts_the_reference(dtype):
    logits, targets = random_logits(3, 7, 11), random_targets(3, 7, classes=11, ignored=0)
    reference = random_logits(3, 7, seed=4, scale=1.0).abs().to(dtype)
    statistics = token_statistics(logits, targets)
    got = token_difficulty(statistics, "excess_loss", reference_nll=reference)
    want = truth.statistics(array(logits), targets.numpy())["nll"] - array(reference)
    np.testing.assert_allclose(array(got), want, rtol=5e-6, atol=5e-6)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("scoring", ["entropy", "margin", "combined"])
def test_scores_that_need_no_targets(scoring):
    logits = random_logits(9, 11)
    got = token_difficulty(token_statistics(logits), scoring)
    want = truth.difficulty(truth.statistics(array(logits)), scoring)
    np.testing.assert_allclose(array(got), want, rtol=5e-6, atol=5e-6)


def test_a_callable_score_gets_the_statistics():
    logits, targets = random_logits(9, 11), random_targets(9, classes=11)
    statistics = token_statistics(logits, targets)
    got = token_difficulty(statistics, lambda s: s.nll * s.confidence)
    expected = truth.statistics(array(logits), targets.numpy())
    np.testing.assert_allclose(
        array(got), expected["nll"] * expected["confidence"], rtol=5e-6, atol=5e-6
    )


@pytest.mark.parametrize("scoring", ["loss", "error_norm", "excess_loss"])
def test_scores_that_need_targets_say_so(scoring):
    with pytest.raises(ValueError, match=exactly(f"scoring={scoring!r} needs targets, got none.")):
        token_difficulty(token_statistics(random_logits(3, 4)), scoring)


def test_difficulty_errors():
    statistics = token_statistics(random_logits(3, 4), torch.arange(3))
    with pytest.raises(
        ValueError, match=exactly("scoring='excess_loss' needs reference_nll, got none.")
    ):
        token_difficulty(statistics, "excess_loss")
    with pytest.raises(
        ValueError, match=exactly("reference_nll must have shape (3,), got (3, 1).")
    ):
        token_difficulty(statistics, "excess_loss", reference_nll=torch.zeros(3, 1))
    with pytest.raises(
        ValueError, match=r"^scoring must be one of 'entropy', .* got 'surprise'\.$"
    ):
        token_difficulty(statistics, "surprise")
    with pytest.raises(
        ValueError, match=exactly("scoring must return scores of shape (3,), got (3, 2).")
    ):
        token_difficulty(statistics, lambda s: torch.zeros(3, 2))


# select_tokens: the rules are tested in test_spec_*; here, that torch hands everything over.


@pytest.mark.parametrize("selection", truth.SELECTIONS)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_select_tokens_hands_every_argument_over(selection, scope):
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.rand(4, 25, generator=generator)
    eligible = torch.rand(4, 25, generator=generator) < 0.8
    confidence = torch.rand(4, 25, generator=generator)
    options = {"selection": selection, "scope": scope, "min_tokens_ratio": 0.3, "seed": 7}
    config = RoutingConfig(**options)
    got = select_tokens(
        difficulty,
        config,
        step=torch.tensor(600),
        draw=5,
        rank=3,
        eligible=eligible,
        confidence=confidence,
        capacity=config.capacity(600, 4, 25),
    )
    want = truth.select(
        difficulty.numpy(),
        options,
        step=600,
        draw=5,
        rank=3,
        eligible=eligible.numpy(),
        confidence=confidence.numpy(),
        capacity=truth.capacity(options, 600, 4, 25),
    )
    assert np.array_equal(got.mask.numpy(), want.mask)
    assert np.array_equal(got.indices.numpy(), want.indices)
    assert np.array_equal(got.weights.numpy(), want.weights)
    assert got.count.tolist() == np.asarray(want.count).tolist()
    assert got.ratio.item() == want.ratio
    assert got.indices.dtype == torch.int32


def test_selection_carries_no_gradient():
    difficulty = torch.rand(2, 9, requires_grad=True)
    selection = select_tokens(difficulty, RoutingConfig(selection="importance", warmup_steps=0))
    assert not selection.weights.requires_grad
