"""cggr.jax on a mesh of all GPUs of the machine, against one of them."""

import jax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_jax_sharding import (
    SELECTIONS,
    assert_close,
    backward_split_model,
    check_inside_shard_map,
    fully_sharded,
    gradient_of,
    make_model,
    spread,
    token_split_model,
    unlike_batch,
)
from tiny_nnx import token_batch

GPUS = jax.devices() if jax.default_backend() == "gpu" else []

pytestmark = pytest.mark.skipif(len(GPUS) < 2, reason="JAX has fewer than two GPUs")


@pytest.fixture
def on():
    return jax.make_mesh((len(GPUS),), ("data",), axis_types=(AxisType.Auto,), devices=GPUS)


@pytest.mark.parametrize("place", ["replicated", "fully sharded"])
@pytest.mark.parametrize("make", [make_model, token_split_model, backward_split_model])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients_are_those_of_one_gpu(on, selection, make, place):
    ids = unlike_batch()
    expected = gradient_of(make(selection), ids)
    assert all(x.devices() == {GPUS[0]} for x in jax.tree.leaves(expected))
    model = make(selection)
    state = nnx.state(model)
    nnx.update(model, spread(state, P(), on) if place == "replicated" else fully_sharded(state, on))
    result = gradient_of(model, spread(ids, P("data"), on))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(result)} == {len(GPUS)}
    assert_close(result, expected)


def test_the_selected_sequences_are_spread_over_the_gpus(on):
    ids = token_batch(batch=32)
    model = make_model("importance", NamedSharding(on, P("data")))
    nnx.update(model, spread(nnx.state(model), P(), on))
    assert_close(
        gradient_of(model, spread(ids, P("data"), on)), gradient_of(make_model("importance"), ids)
    )


@pytest.mark.parametrize("make", [make_model, token_split_model, backward_split_model])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_inside_shard_map_every_gpu_selects_of_its_own(on, selection, make):
    check_inside_shard_map(on, make, selection)
