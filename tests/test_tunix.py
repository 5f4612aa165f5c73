"""Tunix's Llama 3 and Qwen 3, which nobody here wrote, learn with cggr.jax as they are.

Small, with random weights, on the CPU: `make test-tunix`, in an environment of its own.
"""

import functools
import importlib.util
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if importlib.util.find_spec("tunix") is None:  # a tunix that does not import fails, not skips
    pytest.skip(
        "the package google-tunix is missing; see `make test-tunix`", allow_module_level=True
    )

import optax
from flax import nnx

from cggr.jax import CGGRModel, cggr_linear_loss, cggr_loss, create_truncated_router
from cggr.spec import RoutingConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # tunix imports jax.experimental.shard_map
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

# Tunix uses names that jax and flax have deprecated; one of them warns from flax's own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix"),
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning:flax"),
]

VOCAB, LAYERS = 128, 2
BATCH, LENGTH, STEPS = 16, 32, 20
SIZES = {
    "num_layers": LAYERS,
    "vocab_size": VOCAB,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
    "rope_theta": 10_000,
    "norm_eps": 1e-6,
}
MODELS = {
    "llama3": (llama3, {}),
    "llama3-tied": (llama3, {"weight_tying": True}),
    "qwen3": (qwen3, {}),
    "qwen3-tied": (qwen3, {"use_tied_embedding": True}),
    "qwen3-bfloat16-remat": (
        qwen3,
        {
            "dtype": jnp.bfloat16,
            "param_dtype": jnp.bfloat16,
            "remat_config": qwen3.RematConfig.DECODER,
        },
    ),
}
FLOAT32 = ["llama3", "llama3-tied", "qwen3", "qwen3-tied"]
TRAINED = ["llama3", "qwen3-tied", "qwen3-bfloat16-remat"]

# Text with a rule: whatever comes first, every token has one successor.
SUCCESSOR = np.random.default_rng(0).permutation(VOCAB)
# A model that knows nothing has a loss of log(128) = 4.85 nats. Trained densely for 20 steps, these
# reach 0.1 to 0.2; half of the sequences or tokens must bring them below 1.5, over ALL tokens of
# text that they were not trained on.
LEARNED = 1.5


@functools.cache
def _built(name):
    architecture, options = MODELS[name]
    model_class = {llama3: llama3.Llama3, qwen3: qwen3.Qwen3}[architecture]
    model = model_class(architecture.ModelConfig(**SIZES, **options), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(
        lambda x: x + jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, parameters)
    return model


def build(name):
    """A model with random weights everywhere.

    Tunix starts all three kernels of the MLP at zero, where no gradient ever reaches them: it means
    a checkpoint to be loaded.
    """
    return nnx.clone(_built(name))


def text(seed, batch=BATCH):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (batch, 1))
    for _ in range(LENGTH - 1):
        tokens = np.concatenate([tokens, SUCCESSOR[tokens[:, -1:]]], axis=1)
    return jnp.asarray(tokens, jnp.int32)


def inputs_of(tokens, padding=None):
    """What tunix's own trainer gives to its models, made by tunix's own functions."""
    real = jnp.ones(tokens.shape, bool) if padding is None else ~padding
    return {
        "positions": build_positions_from_mask(real),
        "cache": None,
        "attention_mask": make_causal_attn_mask(real),
    }


def logits_of(output):
    return output[0] if isinstance(output, tuple) else output


@nnx.jit
def logits_on(model, tokens, inputs):
    return model(tokens, **inputs)[0]


def nll_by_hand(model, tokens, inputs=None):
    """The loss of every token but the first, ``(B, S - 1)`` float64, from the model's logits."""
    logits = logits_on(model, tokens, inputs_of(tokens) if inputs is None else inputs)
    logits = np.asarray(logits, np.float64)[:, :-1]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    targets = np.asarray(tokens)[:, 1:, None]
    return -np.take_along_axis(log_probability, targets, axis=-1)[..., 0]


def hidden_states(model, tokens, inputs):
    """The forward of both models, without the head."""
    hidden = model.embedder.encode(tokens)
    for layer in model.layers:
        _, hidden = layer(hidden, inputs["positions"], inputs["cache"], inputs["attention_mask"])
    return model.final_norm(hidden)


def head_weight(model):
    """``(V, D)``."""
    if hasattr(model, "lm_head"):
        return model.lm_head.w[...].T
    return model.embedder.input_embedding[...]


def optimizer_of(model):
    return nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def held_out_loss(model):
    return nll_by_hand(model, text(seed=10_000)).mean()


@pytest.mark.parametrize("selection", ["importance", "stratified"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_wrapped_model_learns_from_half_of_the_sequences(name, selection):
    model = build(name)
    cggr_model = CGGRModel(
        model,
        create_truncated_router(model, 1),
        selection=selection,
        min_tokens_ratio=0.5,
        dynamic_threshold=False,
        warmup_steps=1,
    )
    optimizer = optimizer_of(cggr_model)
    traces = []

    @nnx.jit
    def train_step(cggr_model, optimizer, tokens):
        traces.append(1)

        def loss_of(cggr_model):
            return cggr_model(tokens, labels=tokens, **inputs_of(tokens))

        loss, gradients = nnx.value_and_grad(loss_of)(cggr_model)
        optimizer.update(cggr_model, gradients)
        return loss

    before = held_out_loss(model)
    losses = []
    for step in range(STEPS):
        losses.append(train_step(cggr_model, optimizer, text(step)))
        metrics = cggr_model.get_metrics()
        cggr_model.step()
    after = held_out_loss(model)

    print(f"{name} {selection}: {before:.2f} -> {after:.2f}", np.round(np.float32(losses), 2))
    assert np.isfinite(losses).all()
    assert before > np.log(VOCAB) - 0.3
    assert after < LEARNED
    assert metrics["token_ratio"] == 0.5
    assert metrics["tokens_selected"] == BATCH // 2 * (LENGTH - 1)
    assert metrics["tokens_total"] == BATCH * (LENGTH - 1)
    assert len(traces) == 2  # of the dense first step, and of all others


@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_functional_losses_teach_it_from_half_of_the_tokens(name, kind):
    model = build(name)
    optimizer = optimizer_of(model)
    config = RoutingConfig(
        selection="importance", min_tokens_ratio=0.5, dynamic_threshold=False, warmup_steps=1
    )

    @nnx.jit(static_argnames="capacity")
    def train_step(model, optimizer, tokens, step, capacity):
        def loss_of(model):
            inputs, targets = inputs_of(tokens), tokens[:, 1:]
            options = {"step": step, "draw": step, "capacity": capacity}
            if kind == "logits":
                return cggr_loss(model(tokens, **inputs)[0][:, :-1], targets, config, **options)
            hidden = hidden_states(model, tokens, inputs)[:, :-1]
            return cggr_linear_loss(hidden, head_weight(model), targets, config, **options)

        (loss, metrics), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
        optimizer.update(model, gradients)
        return loss, metrics

    before = held_out_loss(model)
    losses = []
    for step in range(STEPS):
        capacity = config.capacity(step, BATCH, LENGTH - 1)
        loss, metrics = train_step(model, optimizer, text(step), jnp.int32(step), capacity=capacity)
        losses.append(loss)
    after = held_out_loss(model)

    print(f"{name} {kind}: {before:.2f} -> {after:.2f}", np.round(np.float32(losses), 2))
    assert np.isfinite(losses).all()
    assert before > np.log(VOCAB) - 0.3
    assert after < LEARNED
    assert metrics["token_ratio"] == 0.5
    assert metrics["tokens_selected"] == BATCH * (LENGTH - 1) // 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FLOAT32)
def test_at_ratio_one_the_loss_is_the_dense_loss(name, training):
    model, tokens = build(name), text(0)
    ignored = np.arange(tokens.size).reshape(tokens.shape) % 7 == 0
    labels = jnp.where(ignored, -100, tokens)
    cggr_model = CGGRModel(
        model, create_truncated_router(model, 1), min_tokens_ratio=1.0, warmup_steps=0
    )
    if not training:
        cggr_model.eval()
    loss = nnx.jit(lambda m: m(tokens, labels=labels, **inputs_of(tokens)))(cggr_model)
    expected = nll_by_hand(model, tokens)[~ignored[:, 1:]].mean()
    # The model's logits are the same; the loss is a float32 sum, and its truth a float64 one.
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("name", FLOAT32)
def test_at_ratio_one_the_functional_losses_are_the_dense_loss(name):
    model, tokens = build(name), text(0)
    inputs, targets = inputs_of(tokens), tokens[:, 1:]
    config = RoutingConfig(min_tokens_ratio=1.0, warmup_steps=0)

    @nnx.jit
    def losses(model):
        logits = model(tokens, **inputs)[0][:, :-1]
        hidden = hidden_states(model, tokens, inputs)[:, :-1]
        return (
            cggr_loss(logits, targets, config, step=0)[0],
            cggr_linear_loss(hidden, head_weight(model), targets, config, step=0)[0],
        )

    expected = nll_by_hand(model, tokens).mean()
    np.testing.assert_allclose(losses(model), [expected, expected], rtol=1e-6)


@pytest.mark.parametrize("name", FLOAT32)
def test_a_router_of_all_layers_is_the_model_and_of_fewer_is_the_model_cut(name):
    model, tokens = build(name), text(0)
    inputs = inputs_of(tokens)
    router = create_truncated_router(model, LAYERS)
    np.testing.assert_array_equal(
        logits_of(router(tokens, **inputs)), logits_of(model(tokens, **inputs))
    )

    router = create_truncated_router(model, 1)
    _, hidden = model.layers[0](
        model.embedder.encode(tokens), inputs["positions"], None, inputs["attention_mask"]
    )
    expected = model.final_norm(hidden) @ head_weight(model).T
    np.testing.assert_allclose(logits_of(router(tokens, **inputs)), expected, rtol=1e-5, atol=1e-5)
    assert len(model.layers) == LAYERS


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_masks_and_positions_follow_the_selected_sequences(name):
    # Padding on the left and strides of the positions that differ among the four sequences: whoever
    # mixes up masks or positions gets another loss. The loss of two must be that of one pair.
    model, tokens = build(name), text(0, batch=4)
    padding = jnp.arange(LENGTH)[None] < jnp.array([0, 5, 11, 16])[:, None]
    inputs, labels = inputs_of(tokens, padding), jnp.where(padding, -100, tokens)
    inputs["positions"] *= jnp.arange(1, 5)[:, None]
    counted = ~np.asarray(padding)[:, 1:]
    nll = nll_by_hand(model, tokens, inputs)
    pairs = [list(pair) for pair in itertools.combinations(range(4), 2)]
    expected = np.array([nll[pair][counted[pair]].mean() for pair in pairs])

    cggr_model = CGGRModel(
        model,
        create_truncated_router(model, 1),
        selection="random",
        min_tokens_ratio=0.5,
        dynamic_threshold=False,
        warmup_steps=0,
    )
    forward = nnx.jit(lambda m: m(tokens, labels=labels, **inputs))
    seen = set()
    for _ in range(8):
        error = np.abs(forward(cggr_model) / expected - 1)
        assert error.min() < 1e-6
        assert np.sort(error)[1] > 1e-4  # the pairs can be told apart
        seen.add(error.argmin())
    assert len(seen) > 1


def test_hidden_states_and_head_make_the_logits():
    """What the linear loss is given here is what the models compute."""
    for name in FLOAT32:
        model, tokens = build(name), text(0)
        inputs = inputs_of(tokens)
        np.testing.assert_allclose(
            hidden_states(model, tokens, inputs) @ head_weight(model).T,
            model(tokens, **inputs)[0],
            rtol=1e-5,
            atol=1e-5,
        )
