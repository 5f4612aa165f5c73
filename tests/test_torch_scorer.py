import re
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
import truth
from torch import nn

from cggr.torch import CGGRScorer, create_truncated_router

VOCAB = 13
OFF = {"warmup_steps": 0, "dynamic_threshold": False}


def exactly(message):
    return f"^{re.escape(message)}$"


def array(tensor):
    return tensor.detach().float().numpy().astype(np.float64)


class Table(nn.Module):
    """Logits looked up by id: a router whose output is known; `wrap` shapes what it returns."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(3 * torch.randn(VOCAB, VOCAB, generator=generator))
        self.wrap = wrap

    def forward(self, ids, attention_mask=None, **others):
        self.seen = {"attention_mask": attention_mask, **others}
        return self.wrap(self.weight[ids])


class TableForMaskedLM(Table):
    """Told apart by its name, as transformers names them."""


class TableForTokenClassification(Table):
    """Its labels are aligned too."""


class Seq2SeqTable(Table):
    """An encoder-decoder shifts its labels into the decoder's input itself."""

    config = SimpleNamespace(is_encoder_decoder=True)


def ids_of(batch=4, length=9, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def shifted(labels, attention_mask=None):
    """Label t + 1 at position t, written out; neither end of the pair may be padding."""
    batch, length = labels.shape
    targets = np.full((batch, length), -100)
    for b in range(batch):
        for t in range(length - 1):
            padding = attention_mask is not None and not (
                attention_mask[b, t] and attention_mask[b, t + 1]
            )
            if not padding:
                targets[b, t] = labels[b, t + 1]
    return targets


def expected(logits, targets, eligible, options, *, step=0, draw=0):
    statistics = truth.statistics(array(logits), targets)
    difficulty = truth.difficulty(statistics, truth.merged(options)["scoring"])
    difficulty = np.where(eligible, difficulty, 0.0)
    chosen = truth.select(
        difficulty,
        options,
        step=step,
        draw=draw,
        eligible=eligible,
        confidence=statistics["confidence"],
    )
    return difficulty, chosen, statistics


def test_the_usage_of_cggr_0_5_0():
    router = Table()
    scorer = CGGRScorer(router, min_tokens_ratio=0.5, **OFF)
    input_ids = ids_of()
    difficulty, mask, info = scorer(input_ids)
    want, chosen, statistics = expected(
        router.weight[input_ids], None, np.ones((4, 9), bool), {"min_tokens_ratio": 0.5, **OFF}
    )
    np.testing.assert_allclose(array(difficulty), want, rtol=5e-6)
    assert np.array_equal(mask.numpy(), chosen.mask)
    assert mask.dtype == torch.bool
    assert mask.sum().item() == 18
    np.testing.assert_allclose(array(info["confidence"]), statistics["confidence"], rtol=5e-6)
    np.testing.assert_allclose(array(info["entropy"]), statistics["entropy"], rtol=5e-6)
    assert info["current_ratio"] == 0.5
    expert_output = torch.ones(4, 9, 3) * mask.unsqueeze(-1)
    assert torch.equal(expert_output.sum(dim=(1, 2)), 3.0 * mask.sum(dim=1))


@pytest.mark.parametrize("selection", truth.SELECTIONS)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_labels_are_shifted_for_causal_models(selection, scope):
    options = {
        "selection": selection,
        "scope": scope,
        "warmup_steps": 10,
        "dynamic_threshold": True,
        "seed": 3,
    }
    router, labels = Table(), ids_of(seed=2)
    labels[1, :4] = -100
    scorer = CGGRScorer(router, **options)
    scorer.load_state_dict(
        {"step_count": torch.tensor(7), "draw_count": torch.tensor(2)}, strict=False
    )
    input_ids = ids_of()
    difficulty, mask, info = scorer(input_ids, labels)
    targets = shifted(labels)
    want, chosen, _ = expected(
        router.weight[input_ids], targets, targets != -100, options, step=7, draw=2
    )
    np.testing.assert_allclose(array(difficulty), want, rtol=5e-6)
    assert np.array_equal(mask.numpy(), chosen.mask)
    assert not mask[:, -1].any()  # the last position predicts nothing
    assert info["current_ratio"] == chosen.ratio / truth.ONE
    assert np.array_equal(info["selection"].indices.numpy(), chosen.indices)
    # The weights carry the rounding of the scores.
    np.testing.assert_allclose(array(info["selection"].weights), chosen.weights, rtol=1e-5)


@pytest.mark.parametrize(
    ("router", "shift_labels", "shifts"),
    [
        (Table(), "auto", True),
        (TableForMaskedLM(), "auto", False),
        (TableForTokenClassification(), "auto", False),
        (Seq2SeqTable(), "auto", False),
        (Table(), False, False),
        (TableForMaskedLM(), True, True),
    ],
)
def test_shift_labels(router, shift_labels, shifts):
    input_ids, labels = ids_of(), ids_of(seed=2)
    difficulty, _, _ = CGGRScorer(router, shift_labels=shift_labels, scoring="loss", **OFF)(
        input_ids, labels
    )
    targets = shifted(labels) if shifts else labels.numpy()
    want, _, _ = expected(
        router.weight[input_ids], targets, targets != -100, {"scoring": "loss", **OFF}
    )
    np.testing.assert_allclose(array(difficulty), want, rtol=5e-6)


def test_a_router_around_a_masked_model_does_not_shift():
    model = models.build("bert")
    router = create_truncated_router(model, num_layers=1)
    input_ids = models.token_ids()
    labels = models.labels_for("bert", input_ids)
    difficulty, _, _ = CGGRScorer(router, scoring="loss", **OFF)(input_ids, labels)
    want, _, _ = expected(
        router(input_ids), labels.numpy(), labels.numpy() != -100, {"scoring": "loss", **OFF}
    )
    np.testing.assert_allclose(array(difficulty), want, rtol=5e-6)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_selected(side, with_labels):
    mask = torch.ones(4, 9, dtype=torch.int64)
    for b in range(4):
        if side == "left":
            mask[b, :b] = 0
        elif b:
            mask[b, -b:] = 0
    router, input_ids, labels = Table(), ids_of(), ids_of(seed=2)
    options = {"min_tokens_ratio": 1.0, **OFF}
    difficulty, chosen, _ = CGGRScorer(router, **options)(
        input_ids, labels if with_labels else None, attention_mask=mask
    )
    targets = shifted(labels, mask) if with_labels else None
    eligible = targets != -100 if with_labels else mask.numpy() == 1
    assert np.array_equal(chosen.numpy(), eligible)
    want, _, _ = expected(router.weight[input_ids], targets, eligible, options)
    np.testing.assert_allclose(array(difficulty), want, rtol=5e-6)
    assert torch.equal(router.seen["attention_mask"], mask)


def test_an_attention_mask_of_another_rank_only_reaches_the_router():
    router, input_ids = Table(), ids_of()
    mask = torch.zeros(4, 1, 9, 9)
    _, chosen, _ = CGGRScorer(router, min_tokens_ratio=1.0, **OFF)(input_ids, attention_mask=mask)
    assert chosen.all()
    assert router.seen["attention_mask"] is mask


@pytest.mark.parametrize("scoring", ["loss", "error_norm", "excess_loss"])
def test_scores_that_need_labels_say_so(scoring):
    with pytest.raises(ValueError, match=exactly(f"scoring={scoring!r} needs targets, got none.")):
        CGGRScorer(Table(), scoring=scoring)(ids_of())


def test_excess_loss_takes_the_reference_of_the_predicting_position():
    router, input_ids, labels = Table(), ids_of(), ids_of(seed=2)
    reference = torch.rand(4, 9, generator=torch.Generator().manual_seed(1))
    scorer = CGGRScorer(router, scoring="excess_loss", **OFF)
    difficulty, _, _ = scorer(input_ids, labels, reference_nll=reference)
    targets = shifted(labels)
    nll = truth.statistics(array(router.weight[input_ids]), targets)["nll"]
    want = np.where(targets != -100, nll - array(reference), 0.0)
    np.testing.assert_allclose(array(difficulty), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: (logits, "hidden states"),
        lambda logits: logits.bfloat16(),
    ],
    ids=["object", "tuple", "bfloat16"],
)
def test_what_routers_return(wrap):
    router = Table(wrap)
    input_ids = ids_of()
    difficulty, mask, _ = CGGRScorer(router, min_tokens_ratio=0.5, **OFF)(input_ids)
    output = wrap(router.weight[input_ids])
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    want, chosen, _ = expected(
        logits, None, np.ones((4, 9), bool), {"min_tokens_ratio": 0.5, **OFF}
    )
    np.testing.assert_allclose(array(difficulty), want, rtol=5e-6)
    assert np.array_equal(mask.numpy(), chosen.mask)


def test_what_is_no_router():
    message = (
        "the model must return logits: a tensor, an output with .logits, or a tuple that starts "
        "with them; got dict."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        CGGRScorer(Table(lambda logits: {"scores": logits}))(ids_of())
    message = "router must return logits of shape (B, S, V), got (4, 13)."
    with pytest.raises(ValueError, match=exactly(message)):
        CGGRScorer(Table(lambda logits: logits[:, 0]))(ids_of())
    with pytest.raises(TypeError, match=exactly("logits must be floating, got torch.int64.")):
        CGGRScorer(Table(lambda logits: logits.long()))(ids_of())


def test_label_errors():
    scorer = CGGRScorer(Table())
    labels = ids_of()
    labels[2, 5] = VOCAB
    # Position 4 predicts label 5, which is the one that is named.
    message = (
        f"labels must be in [0, {VOCAB}) or ignore_index=-100, got {VOCAB} at position (2, 5)."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        scorer(ids_of(), labels)
    message = "targets must have the logits' leading shape (4, 9), got (4, 8)."
    with pytest.raises(ValueError, match=exactly(message)):
        scorer(ids_of(), ids_of()[:, :8])
    message = "shift_labels must be True, False or 'auto', got 'no'."
    with pytest.raises(ValueError, match=exactly(message)):
        CGGRScorer(Table(), shift_labels="no")


def test_scoring_takes_no_gradient():
    router = Table()
    difficulty, mask, info = CGGRScorer(router, selection="importance")(ids_of(), ids_of())
    tensors = [difficulty, mask, info["confidence"], info["entropy"], info["current_ratio"]]
    assert not any(x.requires_grad for x in (*tensors, info["selection"].weights))
    assert router.weight.grad is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gptj", "bert", "roberta", "mamba"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_the_chunked_head_scores_as_the_logits_do(chunks_of, name, with_labels):
    model = models.build(name)
    router = create_truncated_router(model, num_layers=2)
    input_ids = models.token_ids()
    labels = models.labels_for(name, input_ids) if with_labels else None
    logits = router(input_ids)
    chunks_of(7, models.VOCAB, 3)
    difficulty, mask, _ = CGGRScorer(router, **OFF)(input_ids, labels)
    targets, eligible = None, np.ones((4, models.LENGTH), bool)
    if with_labels:
        targets = labels.numpy() if name in models.MASKED else shifted(labels)
        eligible = targets != -100
    want, chosen, _ = expected(logits, targets, eligible, OFF)
    np.testing.assert_allclose(array(difficulty), want, rtol=1e-5, atol=1e-5)
    assert np.array_equal(mask.numpy(), chosen.mask)


def test_draws_advance_in_training_only():
    scorer = CGGRScorer(Table(), selection="random", **OFF)
    first, second = (scorer(ids_of())[1] for _ in range(2))
    assert not torch.equal(first, second)
    scorer.eval()
    third, fourth = (scorer(ids_of())[1] for _ in range(2))
    assert torch.equal(third, fourth)
    assert scorer.draw_count.item() == 2


def test_static_capacity_gives_the_same_masks():
    options = {"selection": "stratified", "warmup_steps": 6, "dynamic_threshold": True}
    exact, static = (CGGRScorer(Table(), **options, capacity=c) for c in ("exact", "static"))
    for step in range(8):
        input_ids = ids_of(seed=step)
        want, mask, _ = exact(input_ids, input_ids)
        got, static_mask, info = static(input_ids, input_ids)
        assert torch.equal(got, want)
        assert torch.equal(static_mask, mask)
        assert info["selection"].indices.shape == (truth.capacity(options, step, 4, 9),)
        exact.step()
        static.step()


def test_metrics_of_a_scorer():
    options = {"selection": "stratified", "warmup_steps": 0}
    router, input_ids = Table(), ids_of()
    scorer = CGGRScorer(router, **options)
    assert scorer.get_metrics() == {}
    scorer(input_ids, input_ids)
    targets = shifted(input_ids)
    eligible = targets != -100
    difficulty, chosen, statistics = expected(router.weight[input_ids], targets, eligible, options)
    assert scorer.metrics == {
        "step": 0,
        "token_ratio": chosen.ratio / truth.ONE,
        "tokens_selected": int(chosen.mask.sum()),
        "tokens_total": 32,
        "avg_confidence": pytest.approx(statistics["confidence"][eligible].mean(), rel=1e-5),
        "avg_entropy": pytest.approx(statistics["entropy"][eligible].mean(), rel=1e-5),
        "avg_difficulty": pytest.approx(difficulty[eligible].mean(), rel=1e-5),
        "selection": "stratified",
        "scoring": "combined",
    }
