"""CGGRModel for nnx: what it selects, what it trains on, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import truth
from flax import nnx
from tiny_nnx import Bigram, Decoder, token_batch

from cggr.jax import CGGRModel, CGGRScorer, RoutingConfig, create_truncated_router

SELECTIONS = ("topk", "stratified", "sequence_aware", "importance", "random")
FIXED = {"warmup_steps": 0, "dynamic_threshold": False}


def table(vocabulary=40, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (vocabulary, vocabulary)).astype(np.float32)


def labelled_batch(batch=12, length=9, vocabulary=40, seed=0):
    """Ids and labels, with ignored labels and one sequence that has nothing else."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)
    labels = np.where(rng.random(ids.shape) < 0.2, -100, ids).astype(np.int32)
    labels[3] = -100
    return ids, labels


def dense_loss(logits, labels):
    """Mean over the shifted labels, by optax."""
    targets = jnp.asarray(labels)[:, 1:]
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], jnp.maximum(targets, 0)
    )
    return jnp.sum(jnp.where(targets == -100, 0, nll)) / jnp.sum(targets != -100)


@nnx.jit
def forward(model, ids, labels, **named):
    return model(ids, labels=labels, **named)


@nnx.jit
def loss_and_gradient(model, ids, labels, **named):
    return nnx.value_and_grad(lambda model: model(ids, labels=labels, **named))(model)


def expected_sequences(ids, labels, weights, options, draw):
    """The truth: kept sequences, their weights, loss and gradient of the table."""
    targets = np.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    logits = weights[ids]
    statistics = truth.statistics(logits, targets)
    difficulty = truth.difficulty(statistics, options.get("scoring", "combined"))
    eligible = targets != -100
    count = np.maximum(eligible.sum(axis=1), 1)
    mean = (np.where(eligible, difficulty, 0).sum(axis=1) / count).astype(np.float32)
    rule = options | ({"selection": "topk"} if options["selection"] == "sequence_aware" else {})
    kept = truth.select(mean[None], rule, eligible=eligible.any(axis=1)[None], draw=draw)
    weight = truth.token_weights(kept)[0]
    nll = np.where(eligible, statistics["nll"], 0).sum(axis=1)
    chosen = kept.mask[0]
    total = eligible.sum() if options["selection"] == "importance" else eligible[chosen].sum()
    return chosen, (weight * nll).sum() / total


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("ratio", [0.25, 0.7, 1.0])
def test_the_loss_is_that_of_the_sequences_the_truth_selects(selection, ratio):
    options = FIXED | {"selection": selection, "min_tokens_ratio": ratio, "seed": 5}
    weights, (ids, labels) = table(), labelled_batch()
    model = CGGRModel(Bigram(weights), **options)
    for draw in range(3):
        chosen, loss = expected_sequences(ids, labels, weights, options, draw)
        value, gradient = loss_and_gradient(model, ids, labels)
        assert value == pytest.approx(loss, rel=1e-6)
        rows = np.unique(ids[chosen][:, :-1][labels[chosen][:, 1:] != -100])
        touched = np.flatnonzero(np.abs(np.asarray(gradient["model"]["table"][...])).sum(axis=1))
        np.testing.assert_array_equal(touched, rows)
        assert model.get_metrics()["tokens_selected"] == (labels[chosen][:, 1:] != -100).sum()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_at_ratio_one_loss_and_gradient_are_dense(selection):
    ids, labels = labelled_batch(vocabulary=64)
    decoder = Decoder()
    dense, expected = nnx.value_and_grad(lambda model: dense_loss(model(ids), labels))(decoder)
    model = CGGRModel(decoder, selection=selection, min_tokens_ratio=1.0)
    value, gradient = loss_and_gradient(model, ids, labels)
    assert value == pytest.approx(float(dense), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        nnx.to_pure_dict(gradient["model"]),
        nnx.to_pure_dict(expected),
    )


def test_importance_is_unbiased():
    weights, (ids, labels) = table(), labelled_batch()
    config = RoutingConfig(selection="importance", min_tokens_ratio=0.3, **FIXED)
    model = CGGRModel(Bigram(weights), config=config)
    dense = float(dense_loss(Bigram(weights)(ids), labels))

    values = np.array([forward(model, ids, labels) for _ in range(2000)], dtype=np.float64)
    error = values.mean() - dense
    standard_error = values.std(ddof=1) / np.sqrt(values.size)
    assert abs(error) < 4 * standard_error


def test_a_whole_step_compiles_once_a_bucket_and_sends_nothing(compilations):
    steps, decoder = 60, Decoder()
    model = CGGRModel(
        decoder,
        create_truncated_router(decoder, 1),
        selection="importance",
        warmup_steps=40,
        dynamic_threshold=True,
    )
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, ids):
        loss, gradient = nnx.value_and_grad(lambda model: model(ids, labels=ids))(model)
        optimizer.update(model, gradient)
        return loss

    batches = [jax.device_put(token_batch(seed=seed)) for seed in range(4)]
    losses, compiled = [], []
    for step in range(steps):
        before = len(compilations)
        with jax.transfer_guard("disallow"):
            losses.append(train_step(model, optimizer, batches[step % 4]))
            model.step()
        compiled.append(len(compilations) > before)
    ratios = [model.config.capacity_ratio(step) for step in range(steps)]
    changes = [0, *(step for step in range(1, steps) if ratios[step] != ratios[step - 1])]
    assert len(changes) == 4
    assert np.flatnonzero(compiled).tolist() == changes
    assert losses[-1] < losses[0] - 0.5
    metrics = model.get_metrics()
    assert metrics["step"] == steps - 1
    assert int(model.step_count[...]) == int(model.draw_count[...]) == steps
    assert metrics["tokens_total"] == 16 * 11


def test_at_most_four_capacities_over_a_thousand_warm_up_steps():
    model = CGGRModel(Bigram(table()), warmup_steps=1000, dynamic_threshold=True)
    traced = []

    @nnx.jit
    def forward(model, ids):
        traced.append(model.capacity_ratio)
        return model(ids, labels=ids)

    ids = labelled_batch()[0]
    for step in range(0, 1400, 50):
        model.set_step(step)
        forward(model, ids)
    assert [ratio / 2**14 for ratio in traced] == [1.0, 0.75, 0.5, 0.375]


def test_eval_is_dense_and_train_selects_again():
    weights, (ids, labels) = table(), labelled_batch()
    model = CGGRModel(Bigram(weights), selection="importance", **FIXED)
    model.eval()
    dense = float(dense_loss(Bigram(weights)(ids), labels))
    assert forward(model, ids, labels) == pytest.approx(dense, rel=1e-6)
    assert int(model.draw_count[...]) == 0
    assert model.get_metrics() == {}
    model.train()
    assert forward(model, ids, labels) != pytest.approx(dense, rel=1e-6)
    assert int(model.draw_count[...]) == 1


def test_without_labels_the_models_own_output_comes_back():
    weights, (ids, _) = table(), labelled_batch()
    model = CGGRModel(Bigram(weights))
    np.testing.assert_array_equal(model(ids), weights[ids])


def test_padding_is_neither_scored_nor_trained_on():
    class Masked(Bigram):
        def __call__(self, input_ids, attention_mask):
            assert attention_mask.shape == input_ids.shape
            return super().__call__(input_ids)

    weights, (ids, _) = table(), labelled_batch()
    mask = np.ones_like(ids)
    mask[:6, 5:] = 0  # right padding
    mask[6:8, :4] = 0  # left padding
    labels = np.where(mask == 1, ids, -100)
    labels[6:8, 4] = -100  # the first token after left padding is predicted by padding
    options = FIXED | {"selection": "stratified", "min_tokens_ratio": 0.5}
    by_mask = CGGRModel(Masked(weights), **options)
    by_labels = CGGRModel(Bigram(weights), **options)
    a, grad_a = loss_and_gradient(by_mask, ids, ids, attention_mask=mask)
    b, grad_b = loss_and_gradient(by_labels, ids, labels)
    assert float(a) == float(b)
    np.testing.assert_array_equal(grad_a["model"]["table"][...], grad_b["model"]["table"][...])


def test_inputs_of_the_sequences_follow_them():
    seen = {}

    class Watching(Bigram):
        def __call__(self, input_ids, positions, cache, scale):
            seen.update(ids=input_ids, positions=positions, cache=cache, scale=scale)
            return super().__call__(input_ids) * scale, cache

    ids, labels = labelled_batch()
    positions = np.arange(ids.size).reshape(ids.shape)
    model = CGGRModel(Watching(table()), selection="random", min_tokens_ratio=0.25, **FIXED)
    model(ids, labels=labels, positions=positions, cache=None, scale=jnp.ones((1,)))
    assert seen["ids"].shape == (3, 9)
    assert seen["cache"] is None
    assert seen["scale"].shape == (1,)
    rows = np.asarray(seen["positions"])[:, 0] // 9
    np.testing.assert_array_equal(seen["ids"], ids[rows])
    np.testing.assert_array_equal(seen["positions"], positions[rows])


def test_a_whole_forward_scores_where_there_is_no_router():
    weights, (ids, labels) = table(), labelled_batch()
    options = FIXED | {"selection": "topk", "scoring": "loss"}
    own = CGGRModel(Bigram(weights), **options)
    other = CGGRModel(Bigram(weights), Bigram(weights), **options)
    wrong = CGGRModel(Bigram(weights), Bigram(-weights), **options)
    value = float(forward(own, ids, labels))
    assert float(forward(other, ids, labels)) == value
    assert float(forward(wrong, ids, labels)) != value


def test_the_router_gets_no_gradient():
    ids, labels = labelled_batch()
    model = CGGRModel(Bigram(table()), Bigram(table(seed=1)), selection="importance", **FIXED)
    _, gradient = loss_and_gradient(model, ids, labels)
    assert np.abs(gradient["model"]["table"][...]).max() > 0
    assert np.abs(gradient["router"]["table"][...]).max() == 0


def test_scoring_leaves_no_trace_in_the_model():
    decoder = Decoder(dropout=0.5)
    router = create_truncated_router(decoder, 1)
    model = CGGRModel(decoder, router, selection="importance", **FIXED)
    counts = [int(layer.dropout.rngs.count[...]) for layer in decoder.layers]
    ids = token_batch()
    forward(model, ids, ids)
    # Each layer drew once, for training; the router drew nothing, and is deterministic.
    drawn = [int(layer.dropout.rngs.count[...]) for layer in decoder.layers]
    assert drawn == [count + 1 for count in counts]
    assert not decoder.layers[0].dropout.deterministic
    scorer = CGGRScorer(router, selection="importance", **FIXED)
    score = nnx.jit(lambda scorer: scorer(ids, ids)[0])
    first, second = score(scorer), score(scorer)
    np.testing.assert_array_equal(first, second)


def test_the_random_control_scores_nothing():
    class Refusing(Bigram):
        def __call__(self, input_ids):
            raise AssertionError("the router ran")

    ids, labels = labelled_batch()
    model = CGGRModel(Bigram(table()), Refusing(table()), selection="random", **FIXED)
    assert np.isfinite(forward(model, ids, labels))
    assert "avg_entropy" not in model.get_metrics()
    options = {"selection": "random", "dynamic_threshold": True}
    adaptive = CGGRModel(Bigram(table()), Refusing(table()), **options)
    with pytest.raises(AssertionError, match="the router ran"):
        adaptive(ids, labels=labels)


def test_nothing_eligible_is_a_zero_with_zero_gradients():
    ids, labels = labelled_batch()
    for selection in SELECTIONS:
        model = CGGRModel(Bigram(table()), selection=selection, **FIXED)
        value, gradient = loss_and_gradient(model, ids, np.full_like(labels, -100))
        assert float(value) == 0
        assert not np.asarray(gradient["model"]["table"][...]).any()


def test_micro_batches_add_up():
    weights, (ids, labels) = table(), labelled_batch()
    items = int((labels[:, 1:] != -100).sum())
    for selection in ("importance", "stratified"):
        options = {"selection": selection, "min_tokens_ratio": 1.0}
        whole = forward(CGGRModel(Bigram(weights), **options), ids, labels)
        model = CGGRModel(Bigram(weights), **options)
        parts = [
            forward(model, ids[part], labels[part], num_items_in_batch=items)
            for part in (slice(0, 6), slice(6, 12))
        ]
        assert sum(parts) == pytest.approx(float(whole), rel=1e-6)


def test_labels_may_be_aligned():
    weights, (ids, labels) = table(), labelled_batch()
    model = CGGRModel(Bigram(weights), shift_labels=False, min_tokens_ratio=1.0)
    nll = truth.statistics(weights[ids], labels)["nll"]
    assert forward(model, ids, labels) == pytest.approx(
        nll.sum() / (labels != -100).sum(), rel=1e-6
    )


def test_wrong_labels_are_loud():
    ids, labels = labelled_batch()
    labels = np.where(labels == -100, -100, 99)
    model = CGGRModel(Bigram(table()), selection="random", **FIXED)
    if jax.default_backend() == "cpu":  # elsewhere a look would wait for the device
        message = r"labels of the selected sequences must be in \[0, 40\)"
        with pytest.raises(ValueError, match=message):
            model(ids, labels=labels)
    assert np.isnan(forward(model, ids, labels))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "token"}, ValueError, "split='token' cannot be had: Bigram.__call__ takes no"),
        (
            {"split": "rows"},
            ValueError,
            "split must be one of 'auto', 'token', 'backward', 'sequence', got 'rows'",
        ),
        ({"shift_labels": "auto"}, TypeError, "shift_labels must be True or False, got 'auto'"),
        ({"router": len}, TypeError, "router must be a flax.nnx module, got builtin_function"),
        ({"model": len}, TypeError, "model must be a flax.nnx module, got builtin_function"),
        ({"ratio": 0.5}, TypeError, "unknown option 'ratio'; the options are"),
        ({"config": {}}, TypeError, "config must be a RoutingConfig"),
        ({"min_tokens_ratio": 2}, ValueError, r"min_tokens_ratio must be in \(0, 1\], got 2.0"),
    ],
)
def test_bad_options_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        CGGRModel(**({"model": Bigram(table())} | arguments))


def test_bad_inputs_are_named():
    ids, labels = labelled_batch()
    model = CGGRModel(Bigram(table()))
    with pytest.raises(ValueError, match=r"labels must have shape \(B, S\) with B >= 1, got"):
        model(ids, labels=labels[0])
    with pytest.raises(TypeError, match="labels must be integers, got float32"):
        model(ids, labels=labels.astype(np.float32))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(12, 9\), got \(3, 9\)"):
        model(ids, labels=labels, attention_mask=np.ones((3, 9)))
    with pytest.raises(ValueError, match="router must return logits of shape"):
        CGGRModel(Bigram(table()[0]))(ids, labels=labels)


def test_a_model_that_returns_no_logits_is_refused():
    class Wordy(Bigram):
        def __call__(self, input_ids):
            return {"answer": super().__call__(input_ids)}

    ids, labels = labelled_batch()
    with pytest.raises(TypeError, match=r"the model must return logits: an array, .*; got dict"):
        CGGRModel(Wordy(table()))(ids, labels=labels)


def test_every_input_of_the_sequences_follows_them_whatever_its_shape():
    class Conditional(Bigram):
        def __call__(self, input_ids, kind, extra):
            shift = 3 * kind[:, None] + extra["shift"]
            return super().__call__(input_ids) + shift[..., None] * jnp.arange(40) / 40

    weights, (ids, labels) = table(), labelled_batch(length=9)
    rng = np.random.default_rng(1)
    kind = rng.normal(size=12).astype(np.float32)
    extra = {"shift": rng.normal(size=(12, 9)).astype(np.float32)}
    targets = np.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    shift = 3 * kind[:, None] + extra["shift"]
    logits = weights[ids] + shift[..., None] * np.arange(40, dtype=np.float32) / 40
    nll = truth.statistics(logits, targets)["nll"]
    eligible = targets != -100
    mean = np.where(eligible, nll, 0).sum(1) / np.maximum(eligible.sum(1), 1)
    model = CGGRModel(Conditional(weights), selection="topk", scoring="loss", warmup_steps=100)
    for step in (45, 100):  # with a slot for every sequence, and with fewer
        model.set_step(step)
        value = float(forward(model, ids, labels, kind=kind, extra=extra))
        ratio = model.get_metrics()["token_ratio"]
        k = int(np.ceil(eligible.any(1).sum() * ratio))
        chosen = np.argsort(np.where(eligible.any(1), -mean, np.inf), kind="stable")[:k]
        assert k < eligible.any(1).sum()
        assert value == pytest.approx(nll[chosen].sum() / eligible[chosen].sum(), rel=1e-5)


def test_an_input_that_could_be_of_sequences_or_positions_is_refused():
    ids, labels = labelled_batch(batch=9, length=9)
    model = CGGRModel(Bigram(table()), selection="random", **FIXED)
    with pytest.raises(ValueError, match=r"kind of shape \(9,\) could belong to the 9 sequences"):
        model(ids, labels=labels, kind=np.zeros(9))


def test_a_router_that_shares_a_part_of_the_model_is_refused():
    class Part(nnx.Module):
        def __init__(self, decoder):
            self.embed = decoder.embed
            self.head = nnx.Linear(16, 64, rngs=nnx.Rngs(0))

        def __call__(self, ids):
            return self.head(self.embed(ids))

    decoder = Decoder()
    message = "router must share all of its parameters .* Part, which shares 1 of 3"
    with pytest.raises(ValueError, match=message):
        CGGRModel(decoder, Part(decoder))


def test_the_optimizer_can_leave_a_foreign_router_alone():
    ids = token_batch()
    model = CGGRModel(Decoder(), Decoder(seed=5), selection="importance", **FIXED)
    wrt = nnx.All(nnx.Param, nnx.PathContains("model"))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.5), wrt=wrt)

    @nnx.jit
    def train_step(model, optimizer):
        def loss(model):
            return model(ids, labels=ids)

        gradient = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradient)

    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    train_step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before["router"], after["router"])
    assert (before["model"]["embed"]["embedding"] != after["model"]["embed"]["embedding"]).all()


def test_a_model_can_be_tabulated():
    ids = token_batch()
    assert "CGGRModel" in nnx.tabulate(CGGRModel(Decoder()), ids, ids)


def test_wide_labels_are_not_narrowed_in_silence():
    ids, _ = labelled_batch()
    labels = ids.astype(np.int64)
    labels[0, 0] = 2**32 + 1
    with pytest.raises(ValueError, match="labels must be within 32 bits, got 0 to 4294967297"):
        CGGRModel(Bigram(table()))(ids, labels=labels)


def test_what_is_the_models_own_stays_whole():
    class Counting(Bigram):
        def __call__(self, input_ids, count, key, out):
            count[...] += 1
            out["key"] = key
            return super().__call__(input_ids)

    ids = token_batch(batch=2, length=9, vocabulary=40)
    model = CGGRModel(Counting(table()), selection="random", min_tokens_ratio=0.5, **FIXED)
    count, out = nnx.Variable(jnp.int32(0)), {}
    key = jnp.array([0, 7], jnp.uint32)  # of two words, for two sequences
    for _ in range(2):
        model(ids, labels=ids, count=count, key=key, out=out)
    assert int(count[...]) == 2
    np.testing.assert_array_equal(out["key"], key)


def test_a_score_need_not_be_hashable():
    @dataclasses.dataclass
    class Score:
        factor: float

        def __call__(self, statistics):
            return statistics.nll * self.factor

    ids, labels = labelled_batch()
    options = FIXED | {"selection": "topk"}
    model = CGGRModel(Bigram(table()), scoring=Score(2.0), **options)
    plain = CGGRModel(Bigram(table()), scoring="loss", **options)
    assert float(model(ids, labels=labels)) == float(plain(ids, labels=labels))
