"""kernels/linear_token_statistics.py: the statistics are those of the head's rounded logits."""

import itertools

import kernels_on
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr.kernels.linear_token_statistics import linear_token_statistics_launch

# The interpreter does not round to bfloat16, it truncates.
DTYPES = (torch.float16,) if kernels_on.INTERPRETED else (torch.bfloat16, torch.float16)
HEADS = (
    {},
    {"logit_scale": 0.5},
    {"logit_scale": -0.7},
    {"softcap": 30.0},
    {"logit_scale": 1.5, "softcap": 5.0},
)
# Tiles so small that few rows and classes make many of them.
SMALL = {"M": 16, "C": 32, "K": 16}
INF, NAN = np.inf, np.nan


def problem(rows, hidden_size, classes, dtype, *, with_bias=False, seed=0):
    """Hidden, weight, bias or None, and targets; logits have a standard deviation of 3."""
    rng = np.random.default_rng(seed)
    hidden = kernels_on.coarse(rng.normal(0, 1, (rows, hidden_size)), dtype)
    weight = kernels_on.coarse(rng.normal(0, 3 / hidden_size**0.5, (classes, hidden_size)), dtype)
    bias = kernels_on.coarse(rng.normal(0, 1, classes), dtype) if with_bias else None
    return hidden, weight, bias, torch.from_numpy(rng.integers(0, classes, rows))


def check(hidden, weight, bias=None, targets=None, *, ignore_index=-100, head=None, **options):
    found = kernels_on.linear_token_statistics(
        hidden, weight, bias, targets, ignore_index=ignore_index, head=head, **options
    )
    expected = kernels_on.expected_statistics(
        kernels_on.rounded_logits(hidden, weight, bias),
        None if targets is None else targets.numpy(),
        ignore_index=ignore_index,
        head=head,
    )
    # tanh has two ulps of error at 1.
    atol = 1e-5 + 2.4e-7 * ((head or {}).get("softcap") or 0.0)
    kernels_on.assert_statistics(found, expected, rtol=2e-5, atol=atol)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "hidden_size", "classes", "with_bias"),
    [
        (1, 1, 2, False),
        (9, 8, 3, True),
        (5, 16, 300, False),
        (127, 63, 255, True),
        (128, 64, 256, False),
        (129, 65, 257, True),
        (130, 70, 513, True),
        (3, 128, 1024, False),
        (2, 200, 5003, True),
    ],
)
def test_every_shape(rows, hidden_size, classes, with_bias, dtype):
    check(*problem(rows, hidden_size, classes, dtype, with_bias=with_bias))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("head", "dtype"), [*itertools.product(HEADS, DTYPES)], ids=str)
def test_heads(head, dtype, with_bias):
    check(*problem(20, 40, 700, dtype, with_bias=with_bias), head=head)


@pytest.mark.parametrize("split_tiles", [1, 2, 3, 5, 100])
def test_any_number_of_splits(split_tiles):
    hidden, weight, bias, targets = problem(37, 50, 301, torch.float16, with_bias=True)
    hidden[3] = 0.0
    weight[[0, 31, 32, 64, 300]] = 2 * weight[5]  # largest in some rows, in several splits
    bias[[0, 31, 32, 64, 300]] = 1.0
    targets[:8] = torch.tensor([0, 31, 32, 64, 300, 5, -100, 301])
    check(hidden, weight, bias, targets, split_tiles=split_tiles, **SMALL)
    check(hidden, weight, split_tiles=split_tiles, **SMALL)


def head_of(logits):
    """Hidden and weight of which these float16 numbers are exactly the logits."""
    return torch.eye(len(logits), dtype=torch.float16), torch.from_numpy(logits.T).half()


@pytest.mark.parametrize("options", [{}, {"split_tiles": 1, **SMALL}], ids=["as launched", "small"])
def test_ties(options):
    logits = np.random.default_rng(0).normal(0, 3, (18, 290))
    largest = [[3, 4], [0, 289], [31, 32], list(range(40, 70)), list(range(290)), [7]]
    for i, classes in enumerate(largest):
        logits[3 * i : 3 * i + 3, classes] = 15.0
    targets = torch.tensor([[c[0], c[-1], 100] for c in largest]).reshape(-1)
    found = check(*head_of(logits), targets=targets, **options)
    assert (found["margin"] == 0).tolist() == [True] * 15 + [False] * 3


def test_extreme_logits():
    largest = np.finfo(np.float16).max
    logits = np.full((6, 290), largest)
    logits[1] = logits[4] = -largest
    logits[2, 5:280] = logits[3, [0, 289]] = -largest
    logits[4, [31, 288]] = largest
    logits[5, 5:] = 0.0
    check(*head_of(logits), targets=torch.tensor([0, 289, 5, 5, 31, 0]))


@pytest.mark.parametrize("options", [{}, {"split_tiles": 2, **SMALL}], ids=["as launched", "small"])
def test_a_bias_of_minus_infinity_excludes_a_class(options):
    hidden, weight, bias, targets = problem(6, 20, 300, torch.float16, with_bias=True)
    bias[1::2] = -INF
    bias[:70] = -INF  # the whole of the first tiles
    bias[260:] = -INF
    targets[:4] = torch.tensor([0, 70, 71, -100])
    check(hidden, weight, bias, targets, **options)
    check(hidden, weight, bias, targets, head=HEADS[-1], **options)
    bias[:] = -INF
    bias[299] = 1.0
    check(hidden, weight, bias, targets, **options)
    bias[:] = -INF
    check(hidden, weight, bias, targets, **options)  # no class is left: NaN


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_fault_in_hidden_stays_in_its_row(with_bias):
    hidden, weight, bias, targets = problem(140, 70, 600, torch.float16, with_bias=with_bias)
    hidden[2, 69], hidden[5, 0], hidden[139] = NAN, INF, NAN
    targets[5] = -100
    found = check(hidden, weight, bias, targets)
    assert np.flatnonzero(np.isnan(found["entropy"])).tolist() == [2, 5, 139]


def test_a_fault_in_weight_spoils_every_row():
    hidden, weight, _, targets = problem(5, 30, 600, torch.float16)
    weight[599, 29] = NAN
    found = check(hidden, weight, targets=targets)
    assert np.isnan(found["confidence"]).all()


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_targets(kind):
    hidden, weight, _, _ = problem(7, 30, 300, torch.float16)
    outside = [300, -1, 2**31 - 1] if kind is torch.int32 else [300, -1, 2**32 + 5]
    targets = torch.tensor([0, 299, -100, *outside, 256], dtype=kind)
    found = check(hidden, weight, targets=targets)
    assert np.isnan(found["nll"]).tolist() == [False] * 3 + [True] * 3 + [False]
    assert np.isnan(found["error_norm"]).tolist() == [False] * 3 + [True] * 3 + [False]
    found = check(hidden, weight, targets=targets, ignore_index=299)
    assert found["nll"][1] == 0.0


def test_without_targets():
    hidden, weight, bias, _ = problem(7, 30, 600, DTYPES[0], with_bias=True)
    check(hidden, weight, bias)


@pytest.mark.parametrize("options", [{}, {"split_tiles": 3, **SMALL}], ids=["as launched", "small"])
def test_what_a_sure_model_gives_to_others_keeps_its_relative_precision(options):
    distances = [1.0, 4.0, 8.0, 12.0, 16.0, 25.0, 40.0, 60.0]
    logits = np.random.default_rng(0).normal(0, 1, (len(distances), 290))
    top = np.array([0, 289, 31, 32, 255, 256, 100, 7])
    logits[range(len(top)), top] = logits.max(axis=-1) + distances
    hidden, weight = head_of(logits)
    targets = torch.from_numpy(top)
    found = kernels_on.linear_token_statistics(hidden, weight, None, targets, **options)
    x = kernels_on.rounded_logits(hidden, weight)
    others = np.stack([np.delete(row - row[i], i) for row, i in zip(x, top, strict=True)])
    rest = np.exp(others).sum(axis=-1)
    # exp(-60) itself: half an ulp of 60 log2(e), once for its tile and again in joining, is 8e-6.
    np.testing.assert_allclose(found["nll"], np.log1p(rest), rtol=2e-5)
    entropy = np.log1p(rest) - (np.exp(others) * others).sum(axis=-1) / (1 + rest)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=2e-5)


@settings(max_examples=25)
@given(st.data())
def test_any_problem(data):
    rows, hidden_size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    classes = data.draw(st.integers(2, 400))
    inputs = problem(
        rows,
        hidden_size,
        classes,
        data.draw(st.sampled_from(DTYPES)),
        with_bias=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**32 - 1)),
    )
    check(
        *inputs,
        head=data.draw(st.sampled_from(HEADS)),
        split_tiles=data.draw(st.integers(1, 8)),
        **SMALL,
    )


def test_launches_are_consistent():
    for rows, classes in itertools.product(
        (1, 127, 128, 129, 5000, 16_384, 32_768), (2, 255, 256, 257, 5000, 50_257, 128_256, 300_000)
    ):
        sums, join, splits, split_classes = linear_token_statistics_launch(
            rows, classes, 100, has_target=True, has_bias=False, ignore_index=-7
        )
        tile, block = sums.constants["C"], sums.constants["M"]
        assert sums.grid == (-(-rows // block), splits)
        assert join.grid == (-(-rows // join.constants["M"]),)
        assert split_classes % tile == 0
        # All classes, and no split without any: it would have no maximum.
        assert (splits - 1) * split_classes < classes <= splits * split_classes
        assert sums.constants["V"] == join.constants["V"] == classes
        assert sums.constants["D"] == 100
        assert join.constants["IGNORE_INDEX"] == -7
        assert sums.constants["HAS_TARGET"] is join.constants["HAS_TARGET"] is True
        assert sums.constants["HAS_BIAS"] is False
