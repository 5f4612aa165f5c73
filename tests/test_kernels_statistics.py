"""kernels/token_statistics.py: every statistic of every row is that of the float64 truth."""

import itertools

import kernels_on
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr.kernels.token_statistics import token_statistics_launch

WIDTHS = (2, 3, 7, 8, 9, 31, 64, 511, 512, 513, 1000, 1023, 1024, 1025, 2053, 4096, 9003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = (
    {"logit_scale": 0.5},
    {"logit_scale": -0.7},
    {"softcap": 30.0},
    {"logit_scale": -1.5, "softcap": 5.0},
)
INF, NAN = np.inf, np.nan

# The interpreter walks over lanes one by one: every row here costs it some 50 ms.


def rounded(values, dtype):
    """float64 values in `dtype`."""
    return torch.from_numpy(np.asarray(values)).to(dtype)


def check(logits, targets, *, head=None, ignore_index=-100, atol=3e-6, **options):
    found = kernels_on.token_statistics(
        logits,
        None if targets is None else torch.from_numpy(targets),
        head=head,
        ignore_index=ignore_index,
        **options,
    )
    expected = kernels_on.expected_statistics(
        logits.double().numpy(), targets, head=head, ignore_index=ignore_index
    )
    # tanh has two ulps of error at 1, hence this much for a logit.
    atol += 2.4e-7 * ((head or {}).get("softcap") or 0.0)
    kernels_on.assert_statistics(found, expected, atol=atol)


def ordinary_rows(classes, rng):
    """Logits and targets: normal, the two largest equal, -inf in a third, NaN somewhere."""
    x = rng.normal(0, 3, (5, classes))
    y = rng.integers(0, classes, 5)
    y[0] = x[0].argmax()
    x[2, rng.permutation(classes)[:2]] = 11.0
    x[3, rng.permutation(classes)[: classes // 3]] = -INF
    x[4, rng.integers(classes)] = NAN
    return x, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", WIDTHS)
def test_every_width(classes, dtype):
    logits, targets = ordinary_rows(classes, np.random.default_rng(classes))
    check(rounded(logits, dtype), targets)
    # Rows that begin anywhere, at even places, or at multiples of 16 bytes.
    gap = {0: 5, 1: 6, 2: 8}[classes % 3]
    check(rounded(logits, dtype), targets, gap=gap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_row(dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 100_003))
    logits[1, -1] = 20.0
    check(rounded(logits, dtype), np.array([7, 100_002]))


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [*((torch.float32, k) for k in (1, 2, 3)), *itertools.product(DTYPES[1:], (1, 2, 3, 4, 7))],
    ids=str,
)
def test_the_first_row_may_begin_anywhere(dtype, offset):
    rng = np.random.default_rng(offset)
    logits = rounded(rng.normal(0, 3, (2, 2200)), dtype)  # more than a tile, less than two
    for gap in (0, 5):
        check(logits, rng.integers(0, 2200, 2), gap=gap, offset=offset)


def edge_rows(classes, dtype, rng):
    """Logits and targets with everything that a float can be, at places where it matters."""
    info = torch.finfo(dtype)
    first, last = 0, classes - 1
    some = rng.permutation(classes)[: max(1, classes // 3)]
    rows = []

    def row(fill=None, label=None):
        x = rng.normal(0, 3, classes) if fill is None else np.full(classes, float(fill))
        rows.append((x, rng.integers(classes) if label is None else label))
        return x

    x = row()
    x[first] = x[last] = 12.0  # the two largest, as far apart as can be
    x = row(label=some[0])
    x[some] = 9.0
    row(fill=0.0)
    row(fill=-3.25)
    x = row(label=last)
    x[some] = -INF
    x = row(label=some[0])  # a label that cannot be: infinite loss
    x[some] = -INF
    x = row(fill=-INF, label=last)
    x[last] = -2.0
    x = row(fill=-INF, label=first)
    x[last] = 5.0
    row(fill=-INF)
    x = row()
    x[some[0]] = INF
    row(fill=INF)
    x = row(label=last)
    x[first] = NAN
    x = row(label=first)
    x[last] = NAN
    row(fill=NAN)
    row(fill=info.min)
    row(fill=info.max)
    x = row(label=first)
    x[last] = info.max
    x = row(label=last)
    x[last] = info.min
    x = row(fill=info.min, label=first)
    x[some] = info.max
    x = row(fill=info.min, label=last)
    x[last] = -INF
    x = row(label=some[0])
    x[some] = 60.0
    x = row(label=first)
    x[last] = 60.0
    return np.array([x for x, _ in rows]), np.array([y for _, y in rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "gap"), [(3, 0), (520, 8), (2053, 0)])
def test_edge_rows(classes, gap, dtype):
    logits, targets = edge_rows(classes, dtype, np.random.default_rng(classes))
    check(rounded(logits, dtype), targets, gap=gap)


@pytest.mark.parametrize(
    ("head", "dtype"), [*itertools.product(HEADS, DTYPES[:2]), (HEADS[-1], torch.float16)], ids=str
)
def test_edge_rows_of_heads_with_scale_and_softcap(head, dtype):
    logits, targets = edge_rows(521, dtype, np.random.default_rng(0))
    check(rounded(logits, dtype), targets, head=head)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_targets(kind):
    logits = rounded(np.random.default_rng(0).normal(0, 3, (8, 70)), torch.float32)
    logits[7] = NAN
    outside = (70, -1, 2**31 - 1, -(2**31)) if kind is np.int32 else (70, -1, 2**32 + 5, -(2**40))
    targets = np.array([0, 69, -100, *outside, -100], dtype=kind)
    check(logits, targets)
    found = kernels_on.token_statistics(logits, torch.from_numpy(targets))
    for name in ("nll", "error_norm"):
        assert np.isnan(found[name]).tolist() == [False] * 3 + [True] * 4 + [False]
        assert found[name][2] == found[name][7] == 0.0  # ignored, even in a row that is a fault
    check(logits, targets, ignore_index=69)  # a class may be the one to ignore


def test_without_targets():
    logits = rounded(np.random.default_rng(0).normal(0, 3, (3, 517)), torch.bfloat16)
    check(logits, None)
    check(logits, None, head=HEADS[-1], gap=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [50, 2053])
def test_what_a_sure_model_gives_to_others_keeps_its_relative_precision(classes, dtype):
    distances = np.array([1.0, 4.0, 8.0, 11.0, 14.0, 16.0, 18.0, 25.0, 40.0, 60.0])
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (len(distances), classes))
    top = rng.integers(0, classes, len(distances))
    x[np.arange(len(x)), top] = x.max(axis=-1) + distances
    logits = rounded(x, dtype)
    found = kernels_on.token_statistics(logits, torch.from_numpy(top))
    # From the others alone: against 1, float64 would lose what is smaller than 1e-16 too.
    x = logits.double().numpy()
    others = np.delete(x - x.max(axis=-1, keepdims=True), 0, axis=-1)
    for i, label in enumerate(top):
        others[i] = np.delete(x[i] - x[i, label], label)
    e = np.exp(others)
    rest = e.sum(axis=-1)
    expected = {
        "nll": np.log1p(rest),
        "entropy": np.log1p(rest) - (e * others).sum(axis=-1) / (1 + rest),
        "error_norm": np.sqrt(rest**2 + (e**2).sum(axis=-1)) / (1 + rest),
    }
    # Of exp(-60), half an ulp of 60 log2(e) is 4e-6. The square of the norm must be a float, too.
    for name, value in expected.items():
        least = 1.1e-19 if name == "error_norm" else 0.0
        above = value > least
        np.testing.assert_allclose(found[name][above], value[above], rtol=1e-5, err_msg=name)
        assert (found[name] <= np.maximum(2 * value, least)).all()


def test_large_logits_lose_nothing():
    rng = np.random.default_rng(0)
    for shift in (1e4, -1e4):
        logits = rounded(rng.normal(0, 3, (2, 9003)) + shift, torch.float32)
        check(logits, rng.integers(0, 9003, 2), gap=1)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_huge_logits(dtype):
    # log2(e) times these is rounded by up to 1, 62, -59, -118, 248 and many.
    rows = []
    for size in (1e7, 754974720.0, 1065353216.0, 2130706432.0, 3019898880.0, 1e20):
        constant, sure, masked = np.full(600, size), np.full(600, -size), np.full(600, -size)
        sure[599] = -0.75 * size
        masked[[3, 7, 500]] = (1.0, 2.0, 2.0)
        rows += [constant, sure, masked]
    check(rounded(np.array(rows), dtype), np.full(len(rows), 7))


def test_rows_do_not_depend_on_each_other():
    logits, targets = edge_rows(200, torch.bfloat16, np.random.default_rng(0))
    logits, targets = rounded(logits, torch.bfloat16), torch.from_numpy(targets)
    together = kernels_on.token_statistics(logits, targets)
    alone = kernels_on.token_statistics(logits[5:8], targets[5:8])
    for name, value in together.items():
        np.testing.assert_array_equal(value[5:8], alone[name], err_msg=name)


# Properties


@st.composite
def batches(draw, dtypes=DTYPES):
    """Logits, targets, gap and offset: of any width, with few values (ties) or many."""
    classes, dtype = draw(st.integers(2, 3000)), draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(0, draw(st.sampled_from((0.1, 3.0, 15.0))), (2, classes))
    x = np.round(x, draw(st.sampled_from((0, 6))))
    x[rng.random(x.shape) < draw(st.sampled_from((0.0, 0.3)))] = -INF
    x[:, rng.integers(classes)] = 1.0  # not all of them -inf
    gap = draw(st.integers(0, 20))
    return rounded(x, dtype), rng.integers(0, classes, 2), gap, rng


@pytest.mark.parametrize("softcap", [1e3, 1e5, 1e7])
def test_a_distant_softcap_costs_small_logits_no_digits(softcap):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (6, 1000)).astype(np.float32))
    targets, head = rng.integers(0, 1000, 6), {"softcap": softcap}
    found = kernels_on.token_statistics(logits, torch.from_numpy(targets), head=head)
    expected = kernels_on.expected_statistics(logits.double().numpy(), targets, head=head)
    kernels_on.assert_statistics(found, expected)


@settings(max_examples=25)
@given(batches())
def test_any_batch(batch):
    logits, targets, gap, _ = batch
    check(logits, targets, gap=gap)


@settings(max_examples=15)
@given(batches(dtypes=(torch.float32,)), st.integers(-1000, 1000))
def test_a_constant_added_to_a_row_changes_only_its_top(batch, constant):
    logits, targets, gap, _ = batch
    logits = torch.round(logits, decimals=2) * 2.0**-4  # exact at either place
    logits = (logits * 2**10).round() * 2.0**-10
    targets = torch.from_numpy(targets)
    plain = kernels_on.token_statistics(logits, targets, gap=gap)
    shifted = kernels_on.token_statistics(logits + constant, targets, gap=gap)
    plain["top"] += np.float32(constant)
    kernels_on.assert_statistics(shifted, plain)


@settings(max_examples=15)
@given(batches())
def test_the_order_of_classes_does_not_matter(batch):
    logits, targets, gap, rng = batch
    order = rng.permutation(logits.shape[1])
    places = np.argsort(order)[targets]
    plain = kernels_on.token_statistics(logits, torch.from_numpy(targets), gap=gap)
    permuted = kernels_on.token_statistics(logits[:, order], torch.from_numpy(places), gap=gap)
    kernels_on.assert_statistics(permuted, plain)


# The launch


@pytest.mark.parametrize("itemsize", [2, 4])
def test_launches_are_consistent(itemsize):
    for classes in (*range(2, 3000), 50_257, 99_999, 100_000, 128_256, 262_144, 300_000):
        launch = token_statistics_launch(
            5, classes, classes + 3, itemsize, has_target=True, ignore_index=-7
        )
        constants = launch.constants
        assert launch.grid == (5,)
        assert constants["E"] * itemsize == 16
        assert (constants["V"], constants["STRIDE"]) == (classes, classes + 3)
        assert (constants["SCALE"], constants["SOFTCAP"]) == (1.0, 0.0)
        assert (constants["HAS_TARGET"], constants["IGNORE_INDEX"]) == (True, -7)
        # A lane of the row is a thread of the program: nothing is exchanged before the end.
        assert launch.num_warps * 32 == constants["L"]
