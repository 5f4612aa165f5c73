"""CGGRModel(split="backward") in Flax: against a dense model whose other rows are constants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_nnx import Bigram, token_batch

from cggr.jax import (
    CGGRModel,
    create_truncated_router,
    select_tokens,
    token_difficulty,
    token_statistics,
)
from cggr.jax.backward_rows import BackwardRows
from cggr.race.decoder import DecoderShape
from cggr.race.jax_decoder import Decoder

B, S, V = 6, 12, 64
SHAPE = DecoderShape(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=4,
    positions=S,
)
OPTIONS = {"min_tokens_ratio": 0.3, "warmup_steps": 0, "dynamic_threshold": False}


class Encoder(nnx.Module):
    """With flax's own attention, whose projections have kernels of three dimensions."""

    def __init__(self, rngs, dropout=0.0):
        self.embed = nnx.Embed(V, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(16, V, rngs=rngs)

    def __call__(self, input_ids):
        x = self.embed(input_ids)
        x = x + self.dropout(self.attention(self.norm(x), is_causal=True))
        x = x + self.down(jax.nn.gelu(self.up(x)))
        return self.head(x)


class Rematerialized(Encoder):
    """Whose feed-forward runs again in the backward pass."""

    def __call__(self, input_ids):
        x = self.embed(input_ids)
        x = x + self.attention(self.norm(x), is_causal=True)
        inner = nnx.remat(lambda self, x: self.down(jax.nn.gelu(self.up(x))))
        return self.head(x + inner(self, x))


MODELS = {
    "llama": lambda: Decoder(SHAPE, nnx.Rngs(0)),
    "tied llama": lambda: Decoder(dataclasses.replace(SHAPE, tied=True), nnx.Rngs(0)),
    "flax": lambda: Encoder(nnx.Rngs(0)),
    "rematerialized": lambda: Rematerialized(nnx.Rngs(0)),
}
OF_KEYS = {"k_proj", "v_proj", "key", "value"}


def labels_of(ids):
    """With padding, and a sequence with nothing to learn."""
    labels = np.array(ids)
    labels[0, S // 2 :] = -100
    labels[1] = -100
    return jnp.asarray(labels)


class Masked:
    """A dot_general whose output is constant where rows are not selected."""

    def __init__(self, mask_N):
        self.mask_N = mask_N

    def __call__(self, x, kernel, dimensions, **options):
        y = jax.lax.dot_general(x, kernel, dimensions, **options)
        mask = self.mask_N.reshape(*x.shape[: x.ndim - len(dimensions[0][0])], 1)
        mask = mask.reshape(*mask.shape[:-1], *(1,) * (y.ndim - mask.ndim + 1))
        return jnp.where(mask, y, jax.lax.stop_gradient(y))


def masked(model, mask_BS, whole=()):
    """A copy whose unselected rows are constants but for keys, values and layers that are whole."""
    model = nnx.clone(model)
    names = []
    for path, module in nnx.iter_graph(model):
        is_linear = isinstance(module, nnx.Linear | nnx.LinearGeneral)
        if is_linear and path[-1] not in OF_KEYS and path[-1] not in whole:
            module.dot_general = Masked(mask_BS)
            names.append(path[-1])
    assert len(names) >= 4
    return model


def reference(model, ids, labels, mask_BS, weight_BS, denominator, whole=()):
    """Loss and gradient of a model whose unselected rows are constants but for keys and values."""
    model = masked(model, mask_BS, whole)

    def loss(model):
        log_p = jax.nn.log_softmax(model(ids).astype(jnp.float32))
        nll = -jnp.take_along_axis(log_p[:, :-1], jnp.maximum(labels[:, 1:, None], 0), axis=-1)
        return jnp.sum(nll[..., 0] * (weight_BS * mask_BS)[:, :-1]) / denominator

    return nnx.value_and_grad(loss)(model)


def selected(routed, scorer, ids, labels, reference_nll):
    """Mask and weights of its first draw, by the scores of a model, and what is eligible."""
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    statistics = token_statistics(scorer(ids), targets)
    difficulty = token_difficulty(statistics, routed.config.scoring, reference_nll=reference_nll)
    selection = select_tokens(
        difficulty, routed.config, eligible=targets != -100, confidence=statistics.confidence
    )
    weight_N = np.zeros(B * S)
    indices, size = np.atleast_2d(selection.indices), selection.mask.size
    size //= len(indices)
    for row, (index_C, weight_C) in enumerate(
        zip(indices, np.atleast_2d(selection.weights), strict=True)
    ):
        used = index_C < size
        weight_N[row * size + index_C[used]] = weight_C[used]
    return selection.mask, jnp.asarray(weight_N.reshape(B, S), jnp.float32), targets != -100


def check(routed, ids, labels, gradient, scorer=None, reference_nll=None):
    """A step's loss and gradient."""
    plain = nnx.clone(routed.model)
    scorer = nnx.clone(plain) if scorer is None else scorer  # whose draws are the model's too
    mask, weight, eligible = selected(routed, scorer, ids, labels, reference_nll)
    importance = routed.config.selection == "importance"
    denominator = jnp.sum(eligible if importance else mask)
    expected = reference(plain, ids, labels, mask, weight, denominator)
    loss, found = gradient(routed, ids, labels, reference_nll)
    np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
    assert_same(found["model"], expected[1])
    metrics = routed.get_metrics()
    assert metrics["tokens_selected"] == mask.sum()
    assert metrics["tokens_total"] == eligible.sum()


def assert_same(found, expected):
    pairs = jax.tree.leaves_with_path(expected), jax.tree.leaves_with_path(found)
    assert len(pairs[0]) == len(pairs[1]) > 5
    for (path, wanted), (_, got) in zip(*pairs, strict=True):
        scale = max(1e-2, float(jnp.abs(wanted).max()))
        error = float(jnp.abs(got - wanted).max())
        assert error < 2e-5 * scale, jax.tree_util.keystr(path)


def loss_of(routed, ids, labels, reference_nll=None):
    return routed(ids, labels=labels, reference_nll=reference_nll)


def gradient_of(*arguments):
    return nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.Param))(*arguments)


@nnx.jit
def compiled_gradient(*arguments):
    return gradient_of(*arguments)


def gradient_of_compiled(*arguments):
    """Where the loss is compiled and then differentiated."""
    loss = nnx.jit(loss_of)
    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.Param))(*arguments)


CASES = [
    *(("llama", rule, "batch") for rule in ("importance", "topk", "random", "stratified")),
    *((model, "topk", "batch") for model in MODELS if model != "llama"),
    *((model, "importance", "sequence") for model in MODELS),
]


@pytest.mark.parametrize(("model", "selection", "scope"), CASES)
def test_gradients_are_those_of_selected_rows(model, selection, scope):
    routed = CGGRModel(
        MODELS[model](), split="backward", selection=selection, scope=scope, **OPTIONS
    )
    ids = token_batch(B, S, V)
    check(routed, ids, labels_of(ids), compiled_gradient)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_completions_have_slots_for_them_alone(scope):
    options = OPTIONS | {"min_tokens_ratio": 1.0, "max_eligible_ratio": 1 / 3, "scope": scope}
    routed = CGGRModel(MODELS["llama"](), split="backward", **options)
    ids = token_batch(B, S, V)
    n_prompt = S - S // 3
    labels = jnp.where(jnp.arange(S) < n_prompt, -100, labels_of(ids))
    check(routed, ids, labels, compiled_gradient)
    assert routed.get_metrics()["tokens_selected"] == routed.get_metrics()["tokens_total"]
    assert routed.config.capacity(0, B, S) < B * S / 2


@pytest.mark.parametrize("gradient", [gradient_of, gradient_of_compiled])
@pytest.mark.parametrize("model", ["llama", "rematerialized"])
def test_in_eager_mode_and_around_jit(model, gradient):
    routed = CGGRModel(MODELS[model](), split="backward", selection="importance", **OPTIONS)
    ids = token_batch(B, S, V)
    check(routed, ids, labels_of(ids), gradient)


def routed_model(model="llama", **options):
    options = {"selection": "importance"} | OPTIONS | options
    return CGGRModel(MODELS[model](), split="backward", **options)


def test_dropout_is_that_of_one_forward_pass_and_moves_on():
    model = Encoder(nnx.Rngs(0, dropout=1), dropout=0.5)
    routed = CGGRModel(model, split="backward", selection="importance", **OPTIONS)
    ids = token_batch(B, S, V)
    check(routed, ids, labels_of(ids), compiled_gradient)
    count = [x for path, x in nnx.to_flat_state(nnx.state(model)) if path[-1] == "count"]
    assert [int(x[...]) for x in count if int(x[...])] == [1]
    check(routed_copy(routed), ids, labels_of(ids), compiled_gradient)


def routed_copy(routed):
    """The same, whose next draw is the first again."""
    copy = nnx.clone(routed)
    copy.draw_count[...] = jnp.zeros((), jnp.int32)
    return copy


def test_first_layers_may_score():
    model = MODELS["llama"]()
    router = create_truncated_router(model, 1)
    routed = CGGRModel(model, router, split="backward", selection="importance", **OPTIONS)
    ids = token_batch(B, S, V)
    scorer = create_truncated_router(nnx.clone(model), 1)
    check(routed, ids, labels_of(ids), compiled_gradient, scorer=scorer)


def test_scores_of_a_reference():
    routed = routed_model(scoring="excess_loss", selection="topk")
    ids = token_batch(B, S, V)
    reference_nll = jnp.asarray(np.random.default_rng(0).uniform(2, 6, (B, S)), jnp.float32)
    check(routed, ids, labels_of(ids), compiled_gradient, reference_nll=reference_nll)


def test_draws_differ_from_step_to_step():
    routed = routed_model(selection="random")
    ids = token_batch(B, S, V)
    first, second = (float(compiled_gradient(routed, ids, ids)[0]) for _ in range(2))
    again = float(compiled_gradient(routed_copy(routed), ids, ids)[0])
    assert first == again
    assert first != second


@pytest.mark.parametrize("options", [{"min_tokens_ratio": 1.0}, {"warmup_steps": 9}])
def test_all_tokens_are_the_dense_loss_and_gradient(options):
    routed = routed_model(**options)
    ids = token_batch(B, S, V)
    labels = labels_of(ids)
    everything = jnp.ones((B, S), bool)
    eligible = jnp.pad(labels[:, 1:] != -100, ((0, 0), (0, 1)))
    expected = reference(routed.model, ids, labels, everything, eligible, jnp.sum(eligible))
    loss, found = compiled_gradient(routed, ids, labels)
    np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
    assert_same(found["model"], expected[1])


def test_evaluated_it_is_the_dense_loss():
    routed = routed_model()
    ids = token_batch(B, S, V)
    dense = routed_model(min_tokens_ratio=1.0)
    routed.eval()
    np.testing.assert_allclose(routed(ids, labels=ids), dense(ids, labels=ids), rtol=2e-6)
    assert routed.get_metrics() == {}


def test_nothing_to_learn_is_a_loss_and_gradient_of_zero():
    ids = token_batch(B, S, V)
    loss, found = compiled_gradient(routed_model(), ids, jnp.full_like(ids, -100))
    assert loss == 0
    assert all(bool((x == 0).all()) for x in jax.tree.leaves(found))


def test_micro_batches_add_up_to_their_batch():
    ids = token_batch(B, S, V)
    labels = labels_of(ids)
    n_items = int(jnp.sum(labels[:, 1:] != -100))
    loss, _ = compiled_gradient(routed_model(), ids, labels)
    part = routed_model()(ids, labels=labels, num_items_in_batch=2 * n_items)
    np.testing.assert_allclose(2 * part, loss, rtol=1e-6)


class Expert(Encoder):
    """Half of the tokens go through a layer of their own, and all of them in another order."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.inner, self.turned = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, input_ids):
        x = self.embed(input_ids)
        x = x + self.attention(self.norm(x), is_causal=True)
        x = x.at[:, ::2].add(self.inner(x[:, ::2]))
        x = x + self.turned(x.swapaxes(0, 1)).swapaxes(0, 1)
        return self.head(x)


def test_rows_that_are_not_the_batchs_have_their_whole_gradient():
    ids = token_batch(B, S, V)
    routed = CGGRModel(Expert(nnx.Rngs(0)), split="backward", selection="topk", **OPTIONS)
    plain = nnx.clone(routed.model)
    mask, weight, _ = selected(routed, nnx.clone(plain), ids, ids, None)
    whole = {"inner", "turned"}
    expected = reference(plain, ids, ids, mask, weight, jnp.sum(mask), whole)
    loss, found = compiled_gradient(routed, ids, ids)
    np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
    assert_same(found["model"], expected[1])


class Balanced(Encoder):
    """With a loss of its own beside the logits, and a trained Variable that is no Param."""

    class Balance(nnx.Variable):
        pass

    class Scale(nnx.Variable):
        pass

    def __init__(self, rngs):
        super().__init__(rngs)
        self.balance = self.Balance(jnp.zeros(()))
        self.scale = self.Scale(jnp.ones(16))

    def __call__(self, input_ids):
        x = self.embed(input_ids) * self.scale[...]
        x = x + self.attention(self.norm(x), is_causal=True)
        hidden = jax.nn.gelu(self.up(x))
        self.balance[...] = jnp.mean(hidden**2)
        return self.head(x + self.down(hidden))


def test_what_a_model_leaves_in_variables_has_gradients_too():
    ids = token_batch(B, S, V)
    routed = CGGRModel(Balanced(nnx.Rngs(0)), split="backward", **OPTIONS)

    def balance(routed):
        return 0 * routed(ids, labels=ids) + routed.model.balance[...]

    def plain_balance(model):
        model(ids)
        return model.balance[...]

    found = nnx.grad(balance, argnums=nnx.DiffState(0, nnx.Param))(routed)["model"]
    mask, *_ = selected(routed_copy(routed), nnx.clone(routed.model), ids, ids, None)
    plain = masked(routed.model, mask)
    assert_same(found, nnx.grad(plain_balance, argnums=nnx.DiffState(0, nnx.Param))(plain))


def test_a_variable_that_is_no_parameter_is_trained_by_all_micro_batches():
    first, second = token_batch(B, S, V), token_batch(B, S, V, seed=1)
    of_scale = nnx.DiffState(0, Balanced.Scale)

    def gradient(*batches):
        routed = CGGRModel(Balanced(nnx.Rngs(0)), split="backward", selection="topk", **OPTIONS)

        def loss(routed):
            return sum(routed(ids, labels=ids) for ids in batches)

        return nnx.grad(loss, argnums=of_scale)(routed)["model"]["scale"][...]

    np.testing.assert_allclose(
        gradient(first, second), gradient(first) + gradient(second), rtol=1e-4, atol=1e-6
    )


class MyAttention(nnx.MultiHeadAttention):
    """By inheritance."""


class Mixer(nnx.MultiHeadAttention):
    """Called otherwise."""


@pytest.mark.parametrize("kind", [MyAttention, Mixer])
def test_attention_is_known_by_its_base_or_its_layers(kind):
    model = Encoder(nnx.Rngs(0))
    model.attention = kind(4, 16, decode=False, rngs=nnx.Rngs(1))
    routed = CGGRModel(model, split="backward", selection="importance", **OPTIONS)
    ids = token_batch(B, S, V)
    check(routed, ids, labels_of(ids), compiled_gradient)


class AttentionModel(Encoder):
    """Which is no attention, but has one."""


def test_a_model_called_after_its_attention_is_none():
    routed = CGGRModel(
        AttentionModel(nnx.Rngs(0)), split="backward", selection="importance", **OPTIONS
    )
    ids = token_batch(B, S, V)
    check(routed, ids, labels_of(ids), compiled_gradient)


def test_a_product_of_ones_own_is_called_as_flax_calls_it():
    def product(a, b, dims, precision=None, **options):
        return jax.lax.dot_general(a, b, dims, precision=precision)

    model = Encoder(nnx.Rngs(0))
    model.up.dot_general = product
    routed = CGGRModel(model, split="backward", selection="importance", **OPTIONS)
    ids = token_batch(B, S, V)
    check(routed, ids, labels_of(ids), compiled_gradient)


def test_inputs_have_gradients():
    class Moved(Encoder):
        def __call__(self, input_ids, shift):
            return super().__call__(input_ids) + shift

    ids = token_batch(B, S, V)
    shift = jnp.zeros((B, S, V))
    routed = CGGRModel(Moved(nnx.Rngs(0)), split="backward", selection="topk", **OPTIONS)
    found = jax.grad(lambda shift: routed_copy(routed)(ids, labels=ids, shift=shift))(shift)
    mask, *_ = selected(routed, lambda ids: routed.model(ids, shift), ids, ids, None)
    assert bool(((jnp.abs(found).max(-1) > 0) == mask).all())
    p = jax.nn.softmax(routed.model(ids, shift))
    targets = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
    expected = (p - jax.nn.one_hot(targets, V)) * mask[..., None] / jnp.sum(mask)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_a_backward_pass_that_is_not_told_of_the_rows_makes_nan(monkeypatch):
    ids = token_batch(B, S, V)
    unknown = lambda indices, size: BackwardRows.waiting(*jnp.atleast_2d(indices).shape)  # noqa: E731
    monkeypatch.setattr(BackwardRows, "chosen", unknown)
    _, found = gradient_of(routed_model(), ids, ids)
    weights = nnx.to_pure_dict(found["model"])["layers"][0]["mlp"]["down_proj"]["kernel"]
    assert bool(jnp.isnan(weights).all())


def test_a_step_multiplies_selected_rows_alone_in_its_backward_pass():
    class Wide(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(V, 256, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 256, 4, decode=False, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(256, 256, rngs=rngs) for _ in range(6)])
            self.head = nnx.Linear(256, V, rngs=rngs)

        def __call__(self, input_ids):
            x = self.embed(input_ids)
            x = x + self.attention(x, is_causal=True)
            for layer in self.layers:
                x = x + jnp.tanh(layer(x))
            return self.head(x)

    ids = token_batch(16, 32, V)

    def operations(ratio):
        options = OPTIONS | {"min_tokens_ratio": ratio}
        routed = CGGRModel(Wide(), split="backward", selection="topk", **options)
        definition, state = nnx.split(routed)

        def step(state, ids):
            return gradient_of(nnx.merge(definition, state), ids, ids)

        # Before it is compiled: of a GPU's calls of libraries XLA does not count the operations.
        return jax.jit(step).lower(state, ids).cost_analysis()["flops"]

    dense = operations(1.0)
    for ratio in (0.25, 0.5):
        assert operations(ratio) / dense == pytest.approx((1 + 2 * ratio) / 3, abs=0.05)


class Convolved(nnx.Module):
    def __init__(self):
        self.mix = nnx.Conv(V, V, (3,), rngs=nnx.Rngs(0))

    def __call__(self, input_ids):
        return self.mix(jax.nn.one_hot(input_ids, V))


class Rowwise(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(V, 16, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(16, V, rngs=nnx.Rngs(0))

    def __call__(self, input_ids):
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Convolved, "mix of class Conv has weights and is no nnx.Linear or nnx.LinearGeneral"),
        (lambda: Bigram(jnp.zeros((V, V))), "the model of class Bigram has weights"),
        (lambda: nnx.Embed(V, V, rngs=nnx.Rngs(0)), "Embed has no nnx.Linear"),
        (Rowwise, "no attention was found, whose keys and values have the gradient of all tokens"),
    ],
)
def test_what_it_cannot_run_is_refused(model, message):
    with pytest.raises(ValueError, match="split='backward' cannot be had: ") as refused:
        CGGRModel(model(), split="backward", **OPTIONS)
    assert message in str(refused.value)


class Contracted(Encoder):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.first = nnx.LinearGeneral(S, S, axis=1, rngs=rngs)

    def __call__(self, input_ids):
        return self.first(super().__call__(input_ids))


class Mapped(Encoder):
    def __call__(self, input_ids):
        return jax.vmap(super().__call__)(input_ids[:, None])[:, 0]


class Random(Encoder):
    def __call__(self, input_ids, rngs):
        return super().__call__(input_ids)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Contracted, {}, "takes linear layers over the last axes alone"),
        (Mapped, {}, r"no linear layer of the model is given the batch's rows, \(6, 12, ...\)"),
        (Random, {"rngs": nnx.Rngs(0)}, "takes arrays as inputs, and rngs holds an nnx.Variable"),
    ],
)
def test_a_step_that_it_cannot_run_is_refused(model, inputs, message):
    ids = token_batch(B, S, V)
    routed = CGGRModel(model(nnx.Rngs(0)), split="backward", **OPTIONS)
    with pytest.raises(ValueError, match=message):
        routed(ids, labels=ids, **inputs)


def test_labels_out_of_range_are_refused():
    ids = token_batch(B, S, V)
    labels = ids.at[0, 3].set(V)
    if jax.default_backend() != "cpu":  # to look at them would wait for the device
        assert jnp.isnan(routed_model()(ids, labels=labels))
        return
    with pytest.raises(ValueError, match="labels"):
        routed_model()(ids, labels=labels)
