"""The token split of CGGRModel for nnx: exact losses, right gradients, nothing left over."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import truth
from flax import nnx
from tiny_nnx import Bigram
from tiny_nnx import Decoder as Mixer

from cggr.jax import CGGRModel, RoutingConfig, RowAttention, create_truncated_router
from cggr.jax.attention import RowMemory, at_positions, row_attentions
from cggr.race.decoder import DecoderShape
from cggr.race.jax_decoder import Decoder

SELECTIONS = ("topk", "stratified", "importance", "random", "sequence_aware")
FIXED = {"warmup_steps": 0, "dynamic_threshold": False, "min_tokens_ratio": 0.3, "seed": 5}
VOCABULARY, BATCH, LENGTH = 40, 5, 11


class Layer(nnx.Module):
    """Attention by nnx.MultiHeadAttention, and a feed-forward layer."""

    def __init__(self, rngs, causal, dropout, attention_fn):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2,
            16,
            dropout_rate=dropout,
            attention_fn=RowAttention() if attention_fn is None else attention_fn,
            decode=False,
            rngs=rngs,
        )
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.causal = causal

    def __call__(self, x, attention_mask):
        mask = None
        if self.causal == "mask":
            mask = nnx.make_causal_mask(x[..., 0])
        if attention_mask is not None:
            padding = attention_mask[:, None, None, :] > 0
            mask = padding if mask is None else nnx.combine_masks(mask, padding)
        x = x + self.attention(self.norm(x), mask=mask, is_causal=self.causal == "flag")
        return x + jnp.tanh(self.linear(x))


class Learned(nnx.Module):
    """Learned positions; causal by a mask, by a flag, or not at all."""

    def __init__(self, causal="mask", remat=False, dropout=0.0, attention_fn=None):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, 16, rngs=rngs)
        self.places = nnx.Embed(16, 16, rngs=rngs)
        self.layers = nnx.List([Layer(rngs, causal, dropout, attention_fn) for _ in range(2)])
        self.head = nnx.Linear(16, VOCABULARY, rngs=rngs)
        self.remat = remat

    def __call__(self, input_ids, *, positions=None, attention_mask=None):
        if positions is None:
            positions = jnp.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids) + self.places(positions)
        for layer in self.layers:
            if self.remat:
                x = nnx.remat(Layer.__call__)(layer, x, attention_mask)
            else:
                x = layer(x, attention_mask)
        return self.head(x)


class Placed(nnx.Module):
    """Attention by hand: a learned bias by distance, or a window, and grouped heads."""

    def __init__(self, kind):
        rngs = nnx.Rngs(1)
        self.embed = nnx.Embed(VOCABULARY, 16, rngs=rngs)
        self.bias = nnx.Param(jax.random.normal(rngs(), (4, 2 * LENGTH)) / 2)
        self.query, self.out = (nnx.List(_linear(16, 16, rngs) for _ in range(2)) for _ in "qo")
        self.key, self.value = (nnx.List(_linear(16, 8, rngs) for _ in range(2)) for _ in "kv")
        self.attend = nnx.List([RowAttention(jax.nn.dot_product_attention) for _ in range(2)])
        self.head = nnx.Linear(16, VOCABULARY, rngs=rngs)
        self.kind = kind

    def __call__(self, input_ids, *, positions=None, attention_mask=None):
        if positions is None:
            positions = jnp.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids) + jnp.sin(positions)[..., None]
        options = {"is_causal": True, "local_window_size": (3, 0)}
        if self.kind == "bias":
            distance = positions[:, :, None] - positions[:, None, :]
            options = {"bias": jnp.moveaxis(self.bias[...][:, distance + LENGTH], 0, 1)}
        for i in range(2):
            heads = [p[i](x).reshape(*x.shape[:2], -1, 4) for p in (self.query, self.key)]
            value = self.value[i](x).reshape(heads[1].shape)
            x = x + self.out[i](self.attend[i](*heads, value, **options).reshape(x.shape))
        return self.head(x)


def _linear(inputs, outputs, rngs):
    return nnx.Linear(inputs, outputs, rngs=rngs)


def rotary():
    shape = DecoderShape(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=4,
        positions=16,
    )
    return Decoder(shape, nnx.Rngs(3))


MODELS = {
    "learned, mask": Learned,
    "learned, flag": lambda: Learned("flag"),
    "learned, remat": lambda: Learned(remat=True),
    "bidirectional": lambda: Learned("none"),
    "rotary": rotary,
    "bias": lambda: Placed("bias"),
    "window": lambda: Placed("window"),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def takes_mask(model):
    return isinstance(model, Learned)


def batch_of(seed=0, *, padded=True):
    """Ids, labels with gaps and a row that has none, and a mask with both kinds of padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    labels = np.where(rng.random(ids.shape) < 0.15, -100, ids).astype(np.int32)
    labels[3] = -100
    mask = np.ones_like(ids)
    if padded:
        mask[0, 7:] = mask[1, 9:] = mask[2, :4] = 0
    return ids, labels, mask


def targets_of(labels, mask):
    """Position t learns label t + 1; padding neither learns nor is learned."""
    labels = np.where(mask == 1, labels, -100)
    targets = np.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    return np.where(mask == 1, targets, -100)


def inputs_for(model, mask):
    return {"attention_mask": mask} if takes_mask(model) else {}


def dense_nll(model, ids, targets, **inputs):
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        model(ids, **inputs), jnp.maximum(targets, 0)
    )


def expected_selection(model, ids, targets, options, draw=0, **inputs):
    """What the truth selects inside each sequence, from the dense model's logits."""
    logits = np.asarray(model(ids, **inputs))
    difficulty = truth.difficulty(truth.statistics(logits, targets), "combined")
    eligible = targets != -100
    difficulty = np.where(eligible, difficulty, 0).astype(np.float32)
    return truth.select(difficulty, options | {"scope": "sequence"}, eligible=eligible, draw=draw)


def reference(model, ids, targets, kept, *, importance, **inputs):
    """Loss and gradient of the dense model, keys and values of unselected tokens detached."""
    chosen = jnp.asarray(kept.mask)
    total = (targets != -100).sum() if importance else kept.mask.sum()
    weight = jnp.asarray(truth.token_weights(kept) / total, jnp.float32)
    model = nnx.clone(model)

    def detached(x):
        where = chosen[:, :, None, None]
        return jnp.where(where, x, jax.lax.stop_gradient(x))

    for layer in row_attentions(model):
        wrapped = layer.attention_fn

        def attention_fn(query, key, value, bias=None, mask=None, *, wrapped=wrapped, **options):
            if bias is not None:
                columns = chosen[:, None, None, :]
                bias = jnp.where(columns, bias, jax.lax.stop_gradient(bias))
                options["bias"] = bias
            return wrapped(query, detached(key), detached(value), mask=mask, **options)

        layer.attention_fn = attention_fn

    def loss(model):
        return jnp.sum(weight * dense_nll(model, ids, targets, **inputs))

    value, gradient = nnx.jit(nnx.value_and_grad(loss))(model)
    return value, nnx.to_pure_dict(gradient)


@nnx.jit
def forward(model, ids, labels, **named):
    return model(ids, labels=labels, **named)


@nnx.jit
def loss_and_gradient(model, ids, labels, **named):
    return nnx.value_and_grad(lambda model: model(ids, labels=labels, **named))(model)


def assert_near(gradient, expected, rel=1e-5):
    """Every parameter's gradient, relative to its largest entry (of a key's bias it is 0)."""
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert scale > 1e-3

    def near(path, a, b):
        tolerance = rel * max(np.abs(b).max(), 1e-2 * scale)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)

    jax.tree.map_with_path(near, nnx.to_pure_dict(gradient), expected)


@every_model
def test_outside_a_step_it_is_the_function_that_it_wraps(make):
    ids, _, mask = batch_of()
    model = make()
    plain = nnx.clone(model)
    for _, module in nnx.iter_graph(plain):
        if isinstance(module, nnx.MultiHeadAttention):
            del module.attention_fn
            module.attention_fn = nnx.dot_product_attention
        if isinstance(module, Placed):
            del module.attend
            module.attend = [jax.nn.dot_product_attention] * 2
    inputs = inputs_for(model, mask)
    np.testing.assert_allclose(model(ids, **inputs), plain(ids, **inputs), atol=1e-6)
    expected = [path for path, _ in nnx.to_flat_state(nnx.state(plain))]
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model))] == expected
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
    np.testing.assert_array_equal(
        RowAttention()(*x, mask=jnp.ones((1, 1, 5, 5)), dropout_rate=0.0, is_causal=True),
        nnx.dot_product_attention(*x, mask=jnp.ones((1, 1, 5, 5)), is_causal=True),
    )


@pytest.mark.parametrize(("ratio", "n_queries"), [(0.25, 4), (0.05, 2)])
@pytest.mark.parametrize("name", ["rotary", "bias"])
def test_cudnn_is_given_an_even_number_of_queries(name, ratio, n_queries):
    numbers = []

    def even(query, key, value, *, mask=None, bias=None, implementation=None, **options):
        assert implementation == "cudnn"
        if query.shape[1] != key.shape[1]:  # JAX refuses to differentiate an odd number of these
            numbers.append(query.shape[1])
        return jax.nn.dot_product_attention(query, key, value, mask=mask, bias=bias, **options)

    ids, labels, _ = batch_of(padded=False)
    found = []
    for attention_fn in (jax.nn.dot_product_attention, even):
        model = MODELS[name]()
        if attention_fn is even:
            for layer in row_attentions(model):
                layer.attention_fn = functools.partial(even, implementation="cudnn")
        routed = CGGRModel(model, split="token", **FIXED | {"min_tokens_ratio": ratio})
        found.append(loss_and_gradient(routed, ids, labels))
    assert set(numbers) == {n_queries}
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)
    assert_near(found[1][1], nnx.to_pure_dict(found[0][1]))


@pytest.mark.parametrize(
    ("make", "selection"),
    [(make, "topk") for make in MODELS.values()] + [(MODELS["rotary"], "importance")],
    ids=[*MODELS, "importance"],
)
def test_selected_tokens_have_their_dense_losses(make, selection):
    ids, labels, mask = batch_of()
    model = make()
    inputs = inputs_for(model, mask)
    mask = mask if inputs else np.ones_like(mask)
    targets = targets_of(labels, mask)
    options = FIXED | {"selection": selection}
    routed = CGGRModel(model, split="token", **options)
    kept = expected_selection(model, ids, targets, options, **inputs)
    nll = np.asarray(dense_nll(model, ids, targets, **inputs))
    seen = losses_of_slots(routed, ids, labels, **inputs)
    assert kept.mask.sum() == len(seen) > 0
    assert not kept.mask[3].any()
    np.testing.assert_allclose(np.sort(seen), np.sort(nll[kept.mask]), atol=1e-5, rtol=0)
    metrics = routed.get_metrics()
    assert metrics["tokens_selected"] == kept.mask.sum()
    assert metrics["tokens_total"] == (targets != -100).sum()


def losses_of_slots(routed, ids, labels, **inputs):
    """The losses of the second pass, by asking for the gradient with respect to each weight."""
    from cggr.jax import dispatch

    caught = []

    def watched(logits_RV, label_R, weight_R):
        used = np.asarray(weight_R) > 0
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits_RV, jnp.maximum(label_R, 0)
        )
        caught.extend(np.asarray(nll)[used].tolist())
        return jnp.sum(nll * weight_R)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "weighted_nll_sum", watched)
        routed(ids, labels=labels, **inputs)
    return np.array(caught)


@every_model
def test_at_ratio_one_loss_and_gradient_are_dense(make):
    ids, _, mask = batch_of()
    model = make()
    inputs = inputs_for(model, mask)
    # What learns nothing is constant in the gradient: here everything learns that anything sees.
    labels = np.where(mask == 1, ids, -100) if inputs else ids

    def dense(model):
        nll = dense_nll(model, ids, labels, **inputs)
        return jnp.sum(jnp.where(labels == -100, 0, nll)) / (labels != -100).sum()

    expected_value, expected = nnx.jit(nnx.value_and_grad(dense))(model)
    for selection in ("topk", "importance"):
        options = FIXED | {"selection": selection, "min_tokens_ratio": 1.0}
        routed = CGGRModel(model, split="token", shift_labels=False, **options)
        value, gradient = loss_and_gradient(routed, ids, labels, **inputs)
        assert value == pytest.approx(float(expected_value), rel=1e-5)
        assert_near(gradient["model"], nnx.to_pure_dict(expected))


def test_completions_have_slots_for_them_alone():
    ids, labels, mask = batch_of(padded=False)
    length = ids.shape[1]
    labels = np.where(np.arange(length) < length - 4, -100, labels)
    targets = targets_of(labels, mask)
    model = Learned()
    options = FIXED | {"selection": "random", "min_tokens_ratio": 1.0}
    routed = CGGRModel(model, split="token", max_eligible_ratio=4 / length, **options)
    value, gradient = loss_and_gradient(routed, ids, labels)
    kept = expected_selection(model, ids, targets, options)
    np.testing.assert_array_equal(kept.mask, targets != -100)
    expected = reference(model, ids, targets, kept, importance=False)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    assert_near(gradient["model"], expected[1])
    metrics = routed.get_metrics()
    assert metrics["tokens_selected"] == metrics["tokens_total"] == (targets != -100).sum() > 0
    assert routed.config.capacity(0, *ids.shape) == 4


def test_with_a_slot_for_every_token_fewer_may_be_selected():
    ids, labels, mask = batch_of()
    model, options = Learned(), FIXED | {"selection": "importance"}
    targets = targets_of(labels, mask)
    routed = CGGRModel(model, split="token", **options)
    routed.capacity_ratio = 2**14
    kept = expected_selection(model, ids, targets, options, attention_mask=mask)
    expected = reference(model, ids, targets, kept, importance=True, attention_mask=mask)
    value, gradient = loss_and_gradient(routed, ids, labels, attention_mask=mask)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    assert_near(gradient["model"], expected[1])


def infinitely_masked(query, key, value, *, mask=None, is_causal=False, local_window_size=None):
    """Attention whose row is NaN, and its gradient, where nothing is seen."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhw,bkhw->bhqk", query, key)
    distance = jnp.arange(scores.shape[2])[:, None] - jnp.arange(scores.shape[3])
    if mask is None:
        mask = jnp.ones_like(scores, bool)
    if is_causal:
        mask = mask & (distance >= 0)
    if local_window_size is not None:
        mask = mask & (distance <= local_window_size[0])
    scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhw->bqhw", jax.nn.softmax(scores), value)


def test_every_slot_sees_a_key():
    ids, labels, mask = batch_of(padded=False)
    model, options = Placed("window"), FIXED | {"selection": "importance"}
    for layer in row_attentions(model):
        layer.attention_fn = infinitely_masked
    targets = targets_of(labels, mask)
    kept = expected_selection(model, ids, targets, options)
    assert not kept.mask[3].any()  # a row of unused slots
    expected = reference(model, ids, targets, kept, importance=True)
    routed = CGGRModel(model, split="token", **options)
    value, gradient = loss_and_gradient(routed, ids, labels)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    assert_near(gradient["model"], expected[1])


RULES = [(name, "importance") for name in MODELS] + [
    ("rotary", selection) for selection in SELECTIONS if selection != "importance"
]


@pytest.mark.parametrize(("name", "selection"), RULES)
def test_the_gradient_is_that_of_the_dense_model_with_unselected_keys_detached(name, selection):
    ids, labels, mask = batch_of()
    model = MODELS[name]()
    inputs = inputs_for(model, mask)
    targets = targets_of(labels, mask if inputs else np.ones_like(mask))
    options = FIXED | {"selection": selection}
    routed = CGGRModel(model, split="token", **options)
    importance = selection == "importance"
    for draw in range(2):
        kept = expected_selection(model, ids, targets, options, draw, **inputs)
        expected = reference(model, ids, targets, kept, importance=importance, **inputs)
        value, gradient = loss_and_gradient(routed, ids, labels, **inputs)
        assert value == pytest.approx(float(expected[0]), rel=1e-5)
        assert_near(gradient["model"], expected[1])


def test_padding_and_gaps_count_as_the_labels_say():
    ids, labels, mask = batch_of()
    model = Learned("flag")
    options = FIXED | {"selection": "stratified"}
    targets = targets_of(labels, mask)
    by_mask = CGGRModel(model, split="token", **options)
    aligned = CGGRModel(model, split="token", shift_labels=False, **options)
    a, gradient_a = loss_and_gradient(by_mask, ids, labels, attention_mask=mask)
    b, gradient_b = loss_and_gradient(aligned, ids, targets, attention_mask=mask)
    assert float(a) == pytest.approx(float(b), rel=1e-6)
    assert_near(gradient_a["model"], nnx.to_pure_dict(gradient_b["model"]), rel=1e-6)


def test_nothing_eligible_is_a_zero_with_zero_gradients():
    ids, labels, _ = batch_of()
    for selection in SELECTIONS:
        routed = CGGRModel(rotary(), split="token", selection=selection, **FIXED)
        value, gradient = loss_and_gradient(routed, ids, np.full_like(labels, -100))
        assert float(value) == 0
        assert all(not x.any() for x in jax.tree.leaves(nnx.to_pure_dict(gradient["model"])))
        assert routed.get_metrics()["tokens_selected"] == 0


def head_gradients(selection, draws):
    """The head's gradient over many draws along one direction, and the dense one."""
    ids, labels, mask = batch_of()
    model = Learned()
    targets = targets_of(labels, mask)
    routed = CGGRModel(model, split="token", **(FIXED | {"selection": selection}))
    direction = np.random.default_rng(0).normal(size=(16, VOCABULARY))

    def dense(model):
        nll = dense_nll(model, ids, targets, attention_mask=mask)
        return jnp.sum(jnp.where(targets == -100, 0, nll)) / (targets != -100).sum()

    expected = nnx.grad(dense)(model)["head"]["kernel"][...]
    found = [
        loss_and_gradient(routed, ids, labels, attention_mask=mask)[1]["model"]["head"]["kernel"][
            ...
        ]
        for _ in range(draws)
    ]
    return np.array(found, np.float64), np.asarray(expected, np.float64), direction


@pytest.mark.slow
def test_with_importance_the_heads_gradient_is_unbiased():
    found, expected, direction = head_gradients("importance", 400)
    along = (found * direction).sum(axis=(1, 2))
    error = along.mean() - (expected * direction).sum()
    assert abs(error) < 4 * along.std(ddof=1) / np.sqrt(len(along))
    # And everywhere: the mean's distance is what 400 draws of that spread leave, no more.
    distance = np.square(found.mean(axis=0) - expected).sum()
    spread = found.var(axis=0, ddof=1).sum() / len(found)
    assert distance < 3 * spread


def test_without_weights_the_heads_gradient_is_biased():
    found, expected, _ = head_gradients("stratified", 100)
    distance = np.square(found.mean(axis=0) - expected).sum()
    assert distance > 6 * found.var(axis=0, ddof=1).sum() / len(found)


def make_train_step():
    @nnx.jit
    def train_step(model, optimizer, ids, labels):
        loss, gradient = nnx.value_and_grad(lambda model: model(ids, labels=labels))(model)
        optimizer.update(model, gradient)
        return loss

    return train_step


def live_bytes():
    return sum(x.nbytes for x in jax.live_arrays()), len(jax.live_arrays())


@pytest.mark.slow
@pytest.mark.parametrize("make", [Learned, lambda: Learned(remat=True), rotary])
def test_200_steps_learn_compile_once_send_nothing_and_leave_nothing(make, compilations):
    routed = CGGRModel(make(), split="token", selection="importance", warmup_steps=0)
    optimizer = nnx.Optimizer(routed, optax.adamw(1e-2), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 3, (4, 16, LENGTH))
    batches = [jax.device_put(jnp.asarray(x.cumsum(1) % VOCABULARY, jnp.int32)) for x in steps]
    step, losses, compiled, live = make_train_step(), [], [], []
    # On the CPU, transfer_guard sees no callback.
    assert "callback" not in step.lower(routed, optimizer, batches[0], batches[0]).as_text()
    for i in range(200):
        before = len(compilations)
        with jax.transfer_guard("disallow"):
            loss = step(routed, optimizer, batches[i % 4], batches[i % 4])
            routed.step()
        compiled.append(len(compilations) > before)
        losses.append(float(loss))
        del loss
        if i >= 100:
            live.append(live_bytes())
    assert set(np.flatnonzero(compiled)) <= {0}
    assert max(live) == live[0]  # what earlier tests left may go meanwhile
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 1
    routed.eval()
    assert routed(batches[0], labels=batches[0]) < losses[0] - 1


@pytest.mark.slow
def test_a_step_leaves_no_trace_in_the_model():
    ids, labels, _ = batch_of()
    routed = CGGRModel(rotary(), split="token", selection="importance", **FIXED)
    definition, state = nnx.split(routed)
    paths = jax.tree.structure(state)

    def check():
        assert all(layer.memory is None for layer in row_attentions(routed))
        after, state = nnx.split(routed)
        assert after == definition
        assert jax.tree.structure(state) == paths
        kinds = {type(variable) for _, variable in nnx.iter_graph(routed)}
        assert RowMemory not in kinds
        assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state))

    with jax.checking_leaks():
        loss_and_gradient(routed, ids, labels)
    check()
    routed(ids, labels=labels)  # outside jit and gradients
    check()
    nnx.value_and_grad(lambda model: model(ids, labels=labels))(routed)
    check()

    class Fails(Learned):
        def __call__(self, input_ids, *, positions=None):
            if input_ids.shape[1] < LENGTH:  # in the second pass
                super().__call__(input_ids, positions=positions)
                raise KeyError("a fault of the model")
            return super().__call__(input_ids, positions=positions)

    routed = CGGRModel(Fails(), split="token", selection="importance", **FIXED)
    definition, state = nnx.split(routed)
    paths = jax.tree.structure(state)
    with pytest.raises(KeyError, match="a fault"):
        routed(ids, labels=labels)
    check()


def test_during_the_second_pass_the_memory_is_no_parameter():
    seen = []

    class Watching(Learned):
        def __call__(self, input_ids, *, positions=None):
            states = nnx.state(self, nnx.Param), nnx.state(self, RowMemory)
            seen.append(jax.tree.map(lambda x: x, states))
            return super().__call__(input_ids, positions=positions)

    ids, labels, _ = batch_of()
    model = Watching()
    CGGRModel(model, split="token", selection="topk", **FIXED)(ids, labels=labels)
    (first, empty), (second, full) = seen
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert len(jax.tree.leaves(empty)) == 0
    assert len(jax.tree.leaves(full)) == 2 * 4  # key, value, mask, positions of two layers


@pytest.mark.parametrize("mode", [nnx.set_graph_mode, nnx.set_graph_updates])
@pytest.mark.parametrize("remat", [False, True])
def test_the_modes_of_nnx_agree(mode, remat):
    ids, labels, mask = batch_of()
    routed, other = (
        CGGRModel(Learned(remat=remat), split="token", selection="importance", **FIXED)
        for _ in range(2)
    )
    definition, parameters, rest = nnx.split(routed, nnx.Param, ...)
    expected = loss_and_gradient(other, ids, labels, attention_mask=mask)

    @jax.jit
    def step(parameters, rest):
        def loss(parameters):
            routed = nnx.merge(definition, parameters, rest, copy=True)
            return routed(ids, labels=labels, attention_mask=mask)

        return jax.value_and_grad(loss)(parameters)

    with mode(False), jax.checking_leaks():
        value, gradient = step(parameters, rest)
    assert value == pytest.approx(float(expected[0]), rel=1e-6)
    assert_near(gradient, nnx.to_pure_dict(expected[1]), rel=1e-6)


def test_remat_changes_no_gradient():
    ids, labels, mask = batch_of()
    found = []
    for remat in (False, True):
        routed = CGGRModel(Learned(remat=remat), split="token", selection="importance", **FIXED)
        found.append(loss_and_gradient(routed, ids, labels, attention_mask=mask))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-6)
    assert_near(found[1][1], nnx.to_pure_dict(found[0][1]), rel=1e-6)


def test_eval_is_dense_and_without_labels_the_output_comes_back():
    ids, labels, mask = batch_of()
    model = Learned()
    routed = CGGRModel(model, split="token", selection="importance", **FIXED)
    routed.eval()
    targets = targets_of(labels, mask)
    nll = np.asarray(dense_nll(model, ids, targets, attention_mask=mask))
    expected = nll[targets != -100].mean()
    value = routed(ids, labels=labels, attention_mask=mask)
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert routed.get_metrics() == {}
    np.testing.assert_array_equal(routed(ids), model(ids))


def test_a_router_scores_where_there_is_one():
    ids, labels, _ = batch_of()
    model, other = rotary(), Learned()
    targets = targets_of(labels, np.ones_like(labels))
    options = FIXED | {"selection": "topk"}
    for router, scorer in ((other, other), (create_truncated_router(model, 1), None)):
        if scorer is None:
            scorer = create_truncated_router(model, 1)
        routed = CGGRModel(model, router, split="token", **options)
        kept = expected_selection(scorer, ids, targets, options)
        nll = np.asarray(dense_nll(model, ids, targets))
        value = float(routed(ids, labels=labels))
        assert value == pytest.approx(float(nll[kept.mask].mean()), rel=1e-5)
        own = expected_selection(model, ids, targets, options)
        assert (own.mask != kept.mask).any()


def test_the_random_control_scores_nothing():
    ids, labels, _ = batch_of()
    routed = CGGRModel(
        rotary(), Bigram(np.zeros((3, 3))), split="token", selection="random", **FIXED
    )
    assert np.isfinite(routed(ids, labels=labels))
    assert "avg_entropy" not in routed.get_metrics()


def test_the_ratio_follows_the_schedule_and_the_confidence():
    ids, labels, _ = batch_of()
    model = rotary()
    targets = targets_of(labels, np.ones_like(labels))
    options = {
        "selection": "topk",
        "warmup_steps": 10,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.25,
    }
    routed = CGGRModel(model, split="token", **options)
    confidence = truth.statistics(np.asarray(model(ids)), targets)["confidence"]
    for step in (0, 4, 8, 10):
        routed.set_step(step)
        forward(routed, ids, labels)
        ratio = truth.token_ratio(options, step, confidence, targets != -100)
        count = sum(truth.token_count(n, ratio) for n in (targets != -100).sum(axis=1))
        assert routed.get_metrics()["tokens_selected"] == count


def test_micro_batches_add_up():
    ids, labels, _ = batch_of()
    model = rotary()
    items = int((labels[:, 1:] != -100).sum())
    for selection in ("importance", "stratified"):
        options = {"selection": selection, "min_tokens_ratio": 1.0}
        whole = forward(CGGRModel(model, split="token", **options), ids, labels)
        routed = CGGRModel(model, split="token", **options)
        parts = [
            forward(routed, ids[part], labels[part], num_items_in_batch=items)
            for part in (slice(0, 2), slice(2, 5))
        ]
        assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_bfloat16_is_as_exact_as_bfloat16_is():
    ids, labels, _ = batch_of()
    model = Learned()
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    for _, module in nnx.iter_graph(model):
        if hasattr(module, "param_dtype"):
            module.dtype = jnp.bfloat16
    routed = CGGRModel(model, split="token", selection="topk", **FIXED)
    targets = targets_of(labels, np.ones_like(labels))
    nll = np.asarray(dense_nll(model, ids, targets).astype(jnp.float32))
    value, gradient = loss_and_gradient(routed, ids, labels)
    options = FIXED | {"selection": "topk"}
    kept = expected_selection(lambda ids: model(ids).astype(jnp.float32), ids, targets, options)
    assert float(value) == pytest.approx(float(nll[kept.mask].mean()), rel=2e-2)
    assert {x.dtype for x in jax.tree.leaves(gradient["model"])} == {jnp.dtype("bfloat16")}


def test_dropout_draws_once_and_only_in_the_second_pass():
    ids, labels, _ = batch_of()
    routed = CGGRModel(Learned(dropout=0.5), split="token", selection="topk", **FIXED)
    routed.train()

    def drawn():
        return [int(layer.attention.rngs.count[...]) for layer in routed.model.layers]

    counts = drawn()
    first, _ = loss_and_gradient(routed, ids, labels)
    assert drawn() == [count + 1 for count in counts]
    difficulty = routed.get_metrics()["avg_difficulty"]
    second, _ = loss_and_gradient(routed, ids, labels)
    assert float(first) != float(second)
    assert routed.get_metrics()["avg_difficulty"] == difficulty
    assert not routed.model.layers[0].attention.deterministic


def test_the_models_inputs_follow_the_positions():
    seen = []

    class Watching(Learned):
        def __call__(self, input_ids, *, positions, kind, extra, mask, scale):
            seen.append((input_ids, positions, kind, extra["type"], mask, scale))
            return super().__call__(input_ids, positions=positions % LENGTH)

    ids, labels, _ = batch_of()
    positions = np.arange(ids.size).reshape(ids.shape)
    given = {
        "kind": np.arange(BATCH),
        "extra": {"type": np.arange(LENGTH)[None]},
        "mask": np.arange(BATCH * LENGTH**2).reshape(BATCH, 1, LENGTH, LENGTH),
        "scale": 2.0,
    }
    routed = CGGRModel(Watching(), split="token", selection="random", **FIXED)
    routed(ids, labels=labels, positions=positions, **given)
    ids_BC, position_BC, kind, type_BC, mask_B1CC, scale = seen[1]
    place_BC = np.asarray(position_BC) % LENGTH
    row_B1 = np.arange(BATCH)[:, None]
    np.testing.assert_array_equal(position_BC, positions[row_B1, place_BC])
    np.testing.assert_array_equal(ids_BC, ids[row_B1, place_BC])
    np.testing.assert_array_equal(type_BC, place_BC)
    expected = given["mask"][row_B1[..., None], 0, place_BC[:, :, None], place_BC[:, None, :]]
    np.testing.assert_array_equal(mask_B1CC[:, 0], expected)
    assert kind is given["kind"]
    assert scale == 2.0


def test_an_input_has_a_gradient_at_the_selected_positions_only():
    class Shifted(Learned):
        def __call__(self, input_ids, *, positions, shift):
            x = self.embed(input_ids) + self.places(positions) + shift
            for layer in self.layers:
                x = layer(x, None)
            return self.head(x)

    ids, labels, _ = batch_of()
    options = FIXED | {"selection": "topk"}
    model = Shifted()
    shift = jax.random.normal(jax.random.key(0), (*ids.shape, 16))
    targets = targets_of(labels, np.ones_like(labels))
    places = np.broadcast_to(np.arange(LENGTH), ids.shape)
    kept = expected_selection(model, ids, targets, options, positions=places, shift=shift)

    @nnx.jit
    def gradient(routed, shift):
        return nnx.grad(lambda shift, m: m(ids, labels=labels, shift=shift))(shift, routed)

    found = gradient(CGGRModel(model, split="token", **options), shift)
    np.testing.assert_array_equal(np.abs(found).max(axis=-1) > 0, kept.mask)


@pytest.mark.parametrize(
    ("shape", "dtype", "followed"),
    [
        ((3, 7), int, (3, 2)),
        ((1, 7), int, (3, 2)),
        ((3, 7, 5), float, (3, 2, 5)),
        ((1, 7, 5, 2), float, (3, 2, 5, 2)),
        ((3, 7, 7), bool, (3, 2, 2)),
        ((3, 1, 7, 7), float, (3, 1, 2, 2)),
        ((1, 4, 7, 7), float, (3, 4, 2, 2)),
        ((3, 1, 1, 7), bool, (3, 1, 1, 2)),
        ((3,), int, (3,)),
        ((), int, ()),
        ((3, 4), int, (3, 4)),
        ((9, 7), float, (9, 7)),
        ((7, 5), float, (7, 5)),
    ],
)
def test_what_follows_the_positions(shape, dtype, followed):
    index = jnp.array([[0, 6], [2, 7], [7, 8]])
    assert at_positions("x", jnp.ones(shape, dtype), index, 7).shape == followed


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((7,), int, r"x of shape \(7,\) could belong to the positions: give it two dimensions"),
        ((7, 7), bool, r"x of shape \(7, 7\) could be a mask of all sequences"),
        ((3, 7, 7), float, r"x of shape \(3, 7, 7\) could be a mask or belong to the positions"),
        ((3, 7, 7, 7), bool, "could be a mask or belong to the positions"),
        ((3, 7, 7, 4), float, "could be a mask or belong to the positions"),
    ],
)
def test_what_could_be_either_is_refused(shape, dtype, message):
    index = jnp.array([[0, 6], [2, 7], [7, 8]])
    with pytest.raises(ValueError, match=message):
        at_positions("x", jnp.ones(shape, dtype), index, 7)


class Without(Learned):
    """Takes no positions."""

    def __call__(self, input_ids):
        return super().__call__(input_ids)


class Scanned(nnx.Module):
    """Layers whose parameters are stacked."""

    def __init__(self):
        @nnx.vmap(in_axes=0)
        def make(rngs):
            return Layer(rngs, "flag", 0.0, None)

        self.embed = nnx.Embed(VOCABULARY, 16, rngs=nnx.Rngs(0))
        self.layers = make(nnx.Rngs(0).split(2))

    def __call__(self, input_ids, *, positions=None):
        return self.embed.attend(
            nnx.scan(lambda x, layer: layer(x, None), out_axes=nnx.Carry)(
                self.embed(input_ids), self.layers
            )
        )


class Convolved(Learned):
    """Mixes positions by a convolution too."""

    def __init__(self):
        super().__init__()
        self.conv = nnx.Conv(16, 16, (3,), rngs=nnx.Rngs(0))


REFUSED = {
    "positions": (Without, "Without.__call__ takes no positions= by keyword; it must"),
    "attention": (Mixer, "Decoder has no RowAttention; every layer must attend through one"),
    "plain": (
        lambda: Learned(attention_fn=nnx.dot_product_attention),
        r"an nnx.MultiHeadAttention without RowAttention; .* attention_fn=RowAttention\(\)",
    ),
    "scanned": (Scanned, "Scanned has scanned layers, whose .* is stacked; they must run in a Py"),
    "mixing": (Convolved, "Convolved has an nnx.Conv, which mixes positions; only attention may"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_split_is_refused_or_gets_the_other_split(make, message, caplog):
    with pytest.raises(ValueError, match=f"split='token' cannot be had: .*{message}"):
        CGGRModel(make(), split="token")
    with caplog.at_level(logging.INFO):
        assert CGGRModel(make(), split="auto").split == "sequence"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("split='auto': training on whole sequences")


def test_auto_is_the_token_split_where_it_can_be_had(caplog):
    with caplog.at_level(logging.INFO):
        assert CGGRModel(Learned()).split == CGGRModel(rotary(), split="auto").split == "token"
    assert caplog.messages[0] == "split='auto': training on selected tokens (split='token')."
    assert CGGRModel(Learned(), split="sequence").split == "sequence"
    assert CGGRModel(Learned(), scope="batch").split == "sequence"


def test_the_scope_is_the_sequence():
    assert CGGRModel(Learned(), split="token").config.scope == "sequence"
    assert CGGRModel(Learned(), config=RoutingConfig(), split="token").config.scope == "sequence"
    with pytest.raises(ValueError, match="cannot be had: scope='batch' ranks over the whole batch"):
        CGGRModel(Learned(), split="token", scope="batch")


def hidden_causal(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def windowed(query, key, value, mask=None, window=3):
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def named(query, key, value, mask=None, mask_type="causal"):
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def test_attention_that_cannot_be_asked_for_other_queries_is_refused():
    with pytest.raises(ValueError, match=r"attention_fn must take mask=.* hidden_causal"):
        RowAttention(hidden_causal)
    with pytest.raises(TypeError, match="attention_fn must be callable, got 'sdpa'"):
        RowAttention("sdpa")
    ids, labels, _ = batch_of()

    class Bound(Learned):
        def __init__(self, attention_fn):
            super().__init__("none")
            for layer in self.layers:
                layer.attention.attention_fn = Dropping(RowAttention(attention_fn))

    class Dropping(RowAttention):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, query, key, value, mask=None, **_):
            return self.inner(query, key, value, mask=mask)

    routed = CGGRModel(Bound(windowed), split="token", selection="topk", **FIXED)
    with pytest.raises(ValueError, match="cannot tell whether window=3 of the attention function"):
        routed(ids, labels=labels)
    routed = CGGRModel(Bound(named), split="token", selection="topk", **FIXED)
    with pytest.raises(ValueError, match="cannot tell whether mask_type='causal' of the attention"):
        routed(ids, labels=labels)
    # Bound arguments that it knows are understood.
    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    model = Bound(causal)
    routed = CGGRModel(model, split="token", selection="topk", **FIXED)
    targets = targets_of(labels, np.ones_like(labels))
    kept = expected_selection(model, ids, targets, FIXED | {"selection": "topk"})
    nll = np.asarray(dense_nll(model, ids, targets))[kept.mask].mean()
    assert float(routed(ids, labels=labels)) == pytest.approx(float(nll), rel=1e-5)


def test_layers_that_cannot_be_recorded_are_named():
    ids, labels, _ = batch_of()

    class Twice(Learned):
        def __call__(self, input_ids, *, positions=None):
            x = self.layers[0](self.embed(input_ids), None)
            return self.head(self.layers[0](x, None))

    class Hidden(Learned):
        def __call__(self, input_ids, *, positions=None):
            layer = jax.checkpoint(lambda x: self.layers[0](x, None))
            return self.head(layer(self.embed(input_ids)))

    class Late(Learned):
        def __call__(self, input_ids, *, positions=None):
            x = self.layers[0](self.embed(input_ids), None)
            return self.head(self.layers[1](x, None) if input_ids.shape[1] < LENGTH else x)

    class Lost(Learned):
        def __call__(self, input_ids, *, positions=None):
            definition, state = nnx.split(self.layers[0])

            @jax.checkpoint
            def layer(state, x):
                return nnx.merge(definition, state)(x, None)

            return self.head(layer(state, self.embed(input_ids)))

    class Crossed(Learned):
        def __call__(self, input_ids, *, positions=None):
            x = self.embed(input_ids)
            return self.head(self.layers[0].attention(x, x[:, :3]))

    for model, message in (
        (Twice, "needs a RowAttention for every layer, got one that runs twice"),
        (Hidden, "use nnx.remat instead of jax.checkpoint"),
        (Late, "needs both passes to run the same layers"),
        (Lost, "inside a transformation that does not know of the module"),
        (Crossed, r"needs self-attention over \(B, S, H, W\), got query"),
    ):
        routed = CGGRModel(model(), split="token", selection="topk", **FIXED)
        with pytest.raises(ValueError, match=message):
            routed(ids, labels=labels)
        assert all(layer.memory is None for layer in row_attentions(routed))


def test_wrong_labels_are_loud():
    ids, labels, _ = batch_of()
    labels = np.where(labels == -100, -100, 99)
    routed = CGGRModel(rotary(), split="token", selection="random", **FIXED)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"labels must be in \[0, 40\) or ignore_index=-100"):
            routed(ids, labels=labels)
    value, _ = loss_and_gradient(routed, ids, labels)
    assert np.isnan(value)


def test_a_model_can_be_tabulated():
    ids, labels, _ = batch_of()
    routed = CGGRModel(rotary(), split="token", selection="topk", **FIXED)
    routed.eval()
    assert "CGGRModel" in nnx.tabulate(routed, ids, labels)
