"""CGGRScorer for nnx: difficulties and masks for routing inside a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from flax import nnx
from tiny_nnx import Bigram

from cggr.jax import CGGRScorer

RNG = np.random.default_rng(0)
TABLE = RNG.normal(0, 2, (30, 30)).astype(np.float32)
IDS = RNG.integers(0, 30, (4, 10)).astype(np.int32)
LABELS = np.where(RNG.random(IDS.shape) < 0.2, -100, IDS).astype(np.int32)


def shifted(labels):
    targets = np.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    return targets


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("selection", truth.SELECTIONS)
def test_difficulty_and_mask_are_the_truths(selection, scope):
    options = {
        "selection": selection,
        "scope": scope,
        "warmup_steps": 4,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.3,
    }
    scorer = CGGRScorer(Bigram(TABLE), **options)
    scorer.set_step(3)
    targets = shifted(LABELS)
    statistics = truth.statistics(TABLE[IDS], targets)
    true = np.where(targets == -100, 0, truth.difficulty(statistics, "combined"))
    run = nnx.jit(lambda scorer: scorer(IDS, LABELS))
    for draw in range(3):
        difficulty, mask, info = run(scorer)
        np.testing.assert_allclose(difficulty, true, rtol=3e-6, atol=3e-6)
        expected = truth.select(
            np.asarray(difficulty),
            options,
            step=3,
            draw=draw,
            eligible=targets != -100,
            confidence=np.asarray(info["confidence"]),
        )
        np.testing.assert_array_equal(mask, expected.mask)
        assert float(info["current_ratio"]) == expected.ratio / 2**14
        np.testing.assert_array_equal(info["selection"].mask, mask)
    np.testing.assert_allclose(info["entropy"], statistics["entropy"], rtol=3e-6, atol=3e-6)
    assert int(scorer.draw_count[...]) == 3


def test_without_labels_all_but_padding_is_eligible():
    class Masked(Bigram):
        def __call__(self, input_ids, attention_mask):
            return super().__call__(input_ids)

    mask = np.ones_like(IDS)
    mask[:, 7:] = 0
    scorer = CGGRScorer(Masked(TABLE), selection="topk", min_tokens_ratio=1.0)
    difficulty, selected, _ = scorer(IDS, attention_mask=mask)
    np.testing.assert_array_equal(selected, mask == 1)
    assert not np.asarray(difficulty)[:, 7:].any()
    statistics = truth.statistics(TABLE[IDS])
    true = truth.difficulty(statistics, "combined")
    np.testing.assert_allclose(difficulty[:, :7], true[:, :7], rtol=3e-6, atol=3e-6)
    with pytest.raises(ValueError, match="scoring='loss' needs targets, got none"):
        CGGRScorer(Bigram(TABLE), scoring="loss")(IDS)


def test_excess_loss_needs_and_uses_a_reference():
    reference = RNG.normal(0, 1, IDS.shape).astype(np.float32)
    scorer = CGGRScorer(Bigram(TABLE), scoring="excess_loss")
    with pytest.raises(ValueError, match="scoring='excess_loss' needs reference_nll"):
        scorer(IDS, LABELS)
    difficulty, _, _ = scorer(IDS, LABELS, reference_nll=reference)
    nll = truth.statistics(TABLE[IDS], shifted(LABELS))["nll"]
    true = np.where(shifted(LABELS) == -100, 0, nll - reference)
    np.testing.assert_allclose(difficulty, true, rtol=3e-6, atol=3e-6)


def test_eval_repeats_the_draw_that_comes_next():
    scorer = CGGRScorer(Bigram(TABLE), selection="random", warmup_steps=0)
    scorer.eval()
    first, second = scorer(IDS)[1], scorer(IDS)[1]
    np.testing.assert_array_equal(first, second)
    scorer.train()
    np.testing.assert_array_equal(scorer(IDS)[1], first)
    assert (np.asarray(scorer(IDS)[1]) != np.asarray(first)).any()


def test_no_gradient_flows_to_the_router():
    scorer = CGGRScorer(Bigram(TABLE))

    def total(scorer):
        difficulty, _, info = scorer(IDS, LABELS)
        return jnp.sum(difficulty) + jnp.sum(info["entropy"])

    gradient = nnx.grad(total)(scorer)
    assert not np.asarray(gradient["router"]["table"][...]).any()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="labels are looked at on the CPU alone")
def test_wrong_labels_are_named_where_the_user_put_them():
    labels = IDS.copy()
    labels[1, 4] = 30
    with pytest.raises(
        ValueError, match=r"labels must be in \[0, 30\) .*, got 30 at position \(1, 4\)"
    ):
        CGGRScorer(Bigram(TABLE))(IDS, labels)
