"""Token and backward split of both frontends: the same masks, losses and gradients."""

import numpy as np
import pytest
import torch
import transformers
import truth

import cggr.torch.model

jax = pytest.importorskip("jax", reason="JAX is not installed")
pytest.importorskip("flax", reason="Flax is not installed")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import cggr.jax.model  # noqa: E402
from cggr.race.decoder import DecoderShape, initial_weights  # noqa: E402
from cggr.race.jax_decoder import load_decoder  # noqa: E402
from cggr.race.torch_lanes import llama_config  # noqa: E402

SHAPE = DecoderShape(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    layers=3,
    heads=4,
    kv_heads=2,
    head_size=16,
    positions=32,
    rope_theta=10_000.0,
    norm_epsilon=1e-6,
    tied=False,
)
BATCH, LENGTH = 3, 19


def make_both(split, options):
    """A model of PyTorch and one of Flax, of equal weights."""
    weights = {name: 3 * w if w.ndim == 2 else w for name, w in initial_weights(SHAPE, 0).items()}
    model = transformers.LlamaForCausalLM(llama_config(SHAPE, None))
    model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    decoder = load_decoder(SHAPE, weights, jax.devices()[0])
    return (
        cggr.torch.model.CGGRModel(model, split=split, **options),
        cggr.jax.model.CGGRModel(decoder, split=split, **options),
    )


@pytest.fixture
def masks(monkeypatch):
    """Masks that either frontend selects, by its name."""
    made = {}
    for name, module in (("torch", cggr.torch.model), ("jax", cggr.jax.model)):

        def spy(*args, _select=module.select_at_ratio, _name=name, **kwargs):
            selection = _select(*args, **kwargs)
            made[_name] = np.asarray(selection.mask)
            return selection

        monkeypatch.setattr(module, "select_at_ratio", spy)
    return made


@jax.default_matmul_precision("float32")  # not a GPU's own default
@pytest.mark.parametrize("split", ["token", "backward"])
@pytest.mark.parametrize(
    ("rule", "scoring"), [*((rule, "combined") for rule in truth.SELECTIONS), ("topk", "loss")]
)
def test_masks_losses_and_gradients_agree(rule, scoring, split, masks):
    options = {
        "selection": rule,
        "scoring": scoring,
        "min_tokens_ratio": 0.3,
        "warmup_steps": 4,
        "dynamic_threshold": True,
        "seed": 7,
    }
    ours, theirs = make_both(split, options)
    for step in (1, 9):
        ours.set_step(step)
        theirs.set_step(step)
        rng = np.random.default_rng(step)
        ids = rng.integers(0, SHAPE.vocab_size, (BATCH, LENGTH))
        labels = ids.copy()
        labels[0, 11:] = -100
        labels[2, :4] = -100
        ours.zero_grad()
        loss = ours(torch.from_numpy(ids), labels=torch.from_numpy(labels))
        loss.backward()

        def loss_fn(module, ids=ids, labels=labels):
            return module(jnp.asarray(ids, jnp.int32), labels=jnp.asarray(labels, jnp.int32))

        other, gradients = nnx.value_and_grad(loss_fn)(theirs)
        np.testing.assert_array_equal(masks["torch"], masks["jax"])
        assert masks["torch"].any()
        assert loss.item() == pytest.approx(float(other), rel=1e-5)
        assert ours.get_metrics()["tokens_selected"] == theirs.get_metrics()["tokens_selected"]
        assert_same_gradients(ours.model, gradients["model"])


def assert_same_gradients(model, gradients):
    """Relative to the largest of each parameter; a kernel of Flax is a weight transposed."""
    compared = 0
    for path, variable in nnx.to_flat_state(gradients):
        *names, kind = map(str, path)
        name = ".".join(names)
        prefix = "" if name.startswith("lm_head") else "model."
        want = model.get_parameter(f"{prefix}{name}.weight").grad.numpy()
        got = np.asarray(variable[...] if hasattr(variable, "shape") else variable)
        got = got.T if kind == "kernel" else got
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error <= 1e-4, f"{name}: {error:.1e}"
        compared += 1
    assert compared == len(list(model.parameters()))
