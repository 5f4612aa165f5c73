"""The kernels on some of the classes: what the parts give, joined, is the statistics of all."""

import itertools

import array_api_compat.torch as xp
import kernels_on
import numpy as np
import pytest
import torch

from cggr.spec.statistics import VocabularySums, join_vocabulary_sums, statistics_of_sums
from cggr.torch import ops

HALF = torch.float16 if kernels_on.INTERPRETED else torch.bfloat16  # which it does not round to
HEADS = ({}, {"logit_scale": -0.7}, {"logit_scale": 1.5, "softcap": 5.0})
LINEAR = (ops.linear_statistics_fused, ops.linear_statistics_chunked)
IGNORED = -100


def joined(sums_of, bounds, targets):
    """Statistics by name, of parts that end at `bounds`."""
    parts = [
        sums_of(slice(first, last), None if targets is None else targets - first)
        for first, last in itertools.pairwise((0, *bounds))
    ]
    sums = VocabularySums(*torch.stack(parts, dim=1).unbind())
    whole = join_vocabulary_sums(sums, xp=xp)
    found = statistics_of_sums(
        whole, targets, n_classes=bounds[-1], ignore_index=IGNORED, xp=xp
    )._asdict()
    found = {name: value.cpu().numpy() for name, value in found.items() if value is not None}
    return found | {"top": whole.top.cpu().numpy()}


def check_logits(logits, targets, bounds, **head):
    on_device = torch.from_numpy(logits).to(kernels_on.DEVICE)
    target_N = None if targets is None else torch.from_numpy(targets).to(kernels_on.DEVICE)

    def sums_of(part, local_N):
        options = (head.get("logit_scale", 1.0), head.get("softcap"))
        return ops.token_statistics(on_device[:, part], local_N, IGNORED, *options, sums=True)

    found = joined(sums_of, bounds, target_N)
    expected = kernels_on.expected_statistics(logits, targets, head=head)
    kernels_on.assert_statistics(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("bounds", [(50,), (17, 50), (1, 2, 40, 50), (13, 26, 39, 50)], ids=str)
def test_logits(bounds, head, with_targets):
    rng = np.random.default_rng(len(bounds))
    logits = rng.normal(0, 3, (20, 50)).astype(np.float32)
    logits[3, 7] = logits[3, 41] = 12.0  # a tie, over two parts
    logits[4] = 1.0
    targets = rng.integers(0, 50, 20)
    targets[5] = IGNORED
    check_logits(logits, targets if with_targets else None, bounds, **head)


def test_a_part_without_a_class_above_minus_infinity():
    logits = np.random.default_rng(1).normal(0, 3, (6, 48)).astype(np.float32)
    logits[0, :16] = logits[1, 16:32] = logits[2, 16:] = -np.inf
    check_logits(logits, np.array([20, 40, 3, 0, 16, 47]), (16, 32, 48))


def test_a_fault_is_loud_and_stays_in_its_row():
    logits = np.zeros((5, 48), dtype=np.float32)
    logits[0, 20], logits[1, 40], logits[2] = np.nan, np.inf, -np.inf
    targets = np.zeros(5, dtype=np.int64)
    check_logits(logits, targets, (16, 32, 48))


@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("way", LINEAR, ids=lambda way: way.__name__)
def test_a_linear_head(way, head, with_targets):
    rng, (n_rows, hidden_size, n_classes) = np.random.default_rng(2), (37, 24, 700)
    hidden = kernels_on.coarse(rng.normal(0, 1, (n_rows, hidden_size)), HALF)
    weight = kernels_on.coarse(rng.normal(0, 0.5, (n_classes, hidden_size)), HALF)
    weight[650] = weight[20]
    bias = torch.zeros(n_classes, dtype=HALF)
    bias[300:600] = -torch.inf  # a part that cannot be
    # Those of the last part lie within the tiles of the one before, beyond its classes.
    targets = torch.from_numpy(rng.choice(np.r_[0:300, 600:700], n_rows))
    targets[3] = IGNORED
    tensors = [x.to(kernels_on.DEVICE) for x in (hidden, weight, bias, targets)]
    on_device, target_N = tensors[:3], tensors[3] if with_targets else None

    def sums_of(part, local_N):
        rows, some, some_bias = on_device[0], on_device[1][part], on_device[2][part]
        options = (head.get("logit_scale", 1.0), head.get("softcap"))
        return way(rows, some, some_bias, local_N, IGNORED, *options, sums=True)

    if head:  # a negative scale would make the impossible certain, a soft-cap possible
        on_device[2] = torch.zeros_like(bias).to(kernels_on.DEVICE)
        bias = torch.zeros_like(bias)
    found = joined(sums_of, (300, 600, 700), target_N)
    expected = kernels_on.expected_statistics(
        kernels_on.rounded_logits(hidden, weight, bias),
        targets.numpy() if with_targets else None,
        head=head,
    )
    kernels_on.assert_statistics(found, expected, rtol=2e-5, atol=2e-5)
