"""The examples learn, and their experts see the selected tokens only."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

FOLDER = Path(__file__).resolve().parent.parent / "examples"
B, S = 2, 6
INDEX = [1, 4, 7, 11, B * S]  # the last slot is empty


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["moe_torch", "moe_flax"])
def test_it_learns(name, capsys):
    losses = load(name).train(60)
    assert np.mean(losses[-5:]) < 3.2 < 4.0 < losses[0]
    assert "tokens through experts 50%" in capsys.readouterr().out


def expected(x_ND, gate_DE, up, down):
    """A token at a time, in float64."""
    out = x_ND.astype(np.float64)
    for i in INDEX[:-1]:
        scores = np.exp(x_ND[i].astype(np.float64) @ gate_DE)
        best = scores.argmax()
        hidden = x_ND[i].astype(np.float64) @ up[best]
        hidden = hidden / (1 + np.exp(-hidden))
        out[i] += hidden @ down[best] * scores[best] / scores.sum()
    return out


def test_experts_of_torch():
    module = load("moe_torch")
    torch.manual_seed(0)
    layer, x = module.NullRoutedExperts(), torch.randn(B, S, module.D)
    with torch.no_grad():
        got = layer(x, torch.tensor(INDEX)).reshape(B * S, -1).numpy()
        weights = (layer.gate.weight.T.numpy(), layer.up.numpy(), layer.down.numpy())
    want = expected(x.reshape(B * S, -1).numpy(), *weights)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - x.reshape(B * S, -1).numpy()).max() > 0.1


def test_experts_of_flax():
    module = load("moe_flax")
    layer = module.NullRoutedExperts(nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(B, S, module.D)).astype(np.float32)
    got = np.asarray(layer(jnp.asarray(x), jnp.array(INDEX))).reshape(B * S, -1)
    weights = (np.asarray(layer.gate.kernel), np.asarray(layer.up), np.asarray(layer.down))
    want = expected(x.reshape(B * S, -1), *weights)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - x.reshape(B * S, -1)).max() > 0.1
