"""cggr.jax on a mesh of eight devices: under jit with automatic axes, and inside shard_map."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_nnx import Decoder, token_batch

import cggr.jax.chunks
from cggr.jax import (
    CGGRModel,
    RoutingConfig,
    cggr_linear_loss,
    cggr_loss,
    create_truncated_router,
)
from cggr.race.decoder import DecoderShape
from cggr.race.jax_decoder import Decoder as TokenDecoder

pytestmark = pytest.mark.skipif(
    len(jax.devices("cpu")) < 8, reason="JAX was started with fewer than 8 CPU devices"
)
B, S, D, V = 16, 32, 8, 40
SELECTIONS = ("topk", "stratified", "sequence_aware", "importance", "random")
FIXED = {"warmup_steps": 0, "dynamic_threshold": False, "min_tokens_ratio": 0.25}


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,), devices=jax.devices("cpu")[:8])


def spread(tree, spec, on):
    return jax.device_put(tree, NamedSharding(on, spec))


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, S, D)).astype(np.float32)
    weight = rng.normal(size=(V, D)).astype(np.float32)
    targets = np.where(rng.random((B, S)) < 0.2, -100, rng.integers(0, V, (B, S)))
    return hidden, weight, targets.astype(np.int32)


def assert_close(result, expected):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def logits_loss(hidden, weight, targets, config, **named):
    logits = jnp.einsum("bsd,vd->bsv", hidden, weight)
    return cggr_loss(logits, targets, config, **named)


LOSSES = pytest.mark.parametrize("loss", [logits_loss, cggr_linear_loss])


@LOSSES
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_sharded_batch_gives_the_same_under_jit(selection, scope, loss, monkeypatch):
    monkeypatch.setattr(cggr.jax.chunks, "MAX_LOGITS", B * S * V // 8)
    config = RoutingConfig(selection=selection, scope=scope, **FIXED)
    capacity = config.capacity(0, B, S)

    @jax.jit
    def run(hidden, weight, targets):
        def mean(hidden, weight):
            return loss(hidden, weight, targets, config, step=jnp.int32(0), capacity=capacity)

        return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(hidden, weight)

    hidden, weight, targets = arrays()
    expected = run(hidden, weight, targets)
    on = mesh()
    inputs = spread((hidden, targets), P("data"), on)
    result = run(inputs[0], spread(weight, P(), on), inputs[1])
    assert_close(result, expected)
    assert int(result[0][1]["tokens_selected"]) == int(expected[0][1]["tokens_selected"])


@pytest.mark.parametrize("loss", [cggr_linear_loss])
def test_scope_sequence_moves_no_tokens_between_devices(loss, monkeypatch):
    monkeypatch.setattr(cggr.jax.chunks, "MAX_LOGITS", B * S * V // 8)
    on, (hidden, weight, targets) = mesh(), arrays()
    inputs = spread((hidden, targets), P("data"), on)

    def gathers(scope):
        config = RoutingConfig(selection="importance", scope=scope, **FIXED)
        capacity = config.capacity(0, B, S)

        def mean(hidden, weight, targets):
            return loss(hidden, weight, targets, config, step=0, capacity=capacity)[0]

        step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        compiled = step.lower(inputs[0], spread(weight, P(), on), inputs[1]).compile()
        return compiled.as_text().count(" all-gather(")

    assert gathers("sequence") == 0
    assert gathers("batch") > 0  # the count can see one


@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("selection", ["importance", "topk"])
def test_classes_and_batch_on_a_mesh_of_two_dimensions(selection, ratio, monkeypatch):
    """The head's weight by its classes over one dimension, the batch over the other."""
    monkeypatch.setattr(cggr.jax.chunks, "MAX_LOGITS", B * S * V // 8)
    config = RoutingConfig(selection=selection, **FIXED | {"min_tokens_ratio": ratio})
    capacity = config.capacity(0, B, S)

    @jax.jit
    def run(hidden, weight, targets):
        def mean(hidden, weight):
            return cggr_linear_loss(hidden, weight, targets, config, step=0, capacity=capacity)

        return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(hidden, weight)

    inputs = arrays()
    expected = run(*inputs)
    axes, automatic = ("data", "classes"), (AxisType.Auto,) * 2
    on = jax.make_mesh((2, 4), axes, axis_types=automatic, devices=jax.devices("cpu")[:8])
    hidden, targets = spread((inputs[0], inputs[2]), P("data"), on)
    weight = spread(inputs[1], P("classes"), on)
    result = run(hidden, weight, targets)
    assert_close(result, expected)
    assert result[1][1].sharding.spec == P("classes")
    text = run.lower(hidden, weight, targets).compile().as_text()
    gathered = re.findall(r"= f32\[(\d+),(\d+)\]\S* all-gather\(", text)
    assert (str(V), str(D)) not in gathered  # the weight stays where it is


@LOSSES
@pytest.mark.parametrize("selection", SELECTIONS)
def test_local_selection_inside_shard_map(selection, loss, monkeypatch):
    monkeypatch.setattr(cggr.jax.chunks, "MAX_LOGITS", 100)
    config = RoutingConfig(selection=selection, **FIXED)

    def mean(hidden, weight, targets, rank, add):
        total, metrics = loss(hidden, weight, targets, config, step=0, rank=rank, reduction="sum")
        return add(total) / add(metrics["denominator"])

    def local(hidden, weight, targets):
        rank = jax.lax.axis_index("data")
        return jax.value_and_grad(
            lambda hidden, weight: mean(
                hidden, weight, targets, rank, lambda x: jax.lax.psum(x, "data")
            ),
            argnums=(0, 1),
        )(hidden, weight)

    def single(hidden, weight, targets):
        parts = [
            loss(
                hidden[2 * rank : 2 * rank + 2],
                weight,
                targets[2 * rank : 2 * rank + 2],
                config,
                step=0,
                rank=rank,
                reduction="sum",
            )
            for rank in range(8)
        ]
        return sum(total for total, _ in parts) / sum(m["denominator"] for _, m in parts)

    specs = (P("data"), P(), P("data"))
    sharded = jax.jit(
        jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=(P(), (P("data"), P())))
    )
    inputs = arrays()
    assert_close(sharded(*inputs), jax.jit(jax.value_and_grad(single, argnums=(0, 1)))(*inputs))


def test_shards_of_one_batch_draw_independently():
    config = RoutingConfig(selection="random", **FIXED)

    def local(hidden, weight, targets, use_rank):
        rank = jax.lax.axis_index("data") if use_rank else 0
        _, metrics = cggr_linear_loss(hidden, weight, targets, config, step=0, rank=rank)
        return metrics["loss_sum"][None]

    hidden, weight, targets = arrays()
    same = np.tile(hidden[:2], (8, 1, 1)), weight, np.tile(targets[:2], (8, 1))
    distinct = {}
    for use_rank in (False, True):
        run = jax.shard_map(
            lambda *inputs, use_rank=use_rank: local(*inputs, use_rank),
            mesh=mesh(),
            in_specs=(P("data"), P(), P("data")),
            out_specs=P("data"),
        )
        distinct[use_rank] = len(set(np.asarray(jax.jit(run)(*same)).tolist()))
    assert distinct == {False: 1, True: 8}


def test_a_sharded_batch_outside_jit():
    on, (hidden, weight, targets) = mesh(), arrays()
    config = RoutingConfig(selection="importance", **FIXED)
    expected = logits_loss(hidden, weight, targets, config, step=0)
    hidden, targets = spread((hidden, targets), P("data"), on)
    result = logits_loss(hidden, spread(weight, P(), on), targets, config, step=0)
    assert_close(result, expected)


def test_explicit_axes_by_auto_axes():
    on, (hidden, weight, targets) = mesh(AxisType.Explicit), arrays()
    config = RoutingConfig(selection="importance", **FIXED)

    def mean(hidden, weight, targets):
        return cggr_linear_loss(hidden, weight, targets, config, step=0)[0]

    expected = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(hidden, weight, targets)
    with jax.set_mesh(on):
        inputs = spread((hidden, targets), P("data"), on)
        auto = jax.sharding.auto_axes(mean, out_sharding=P())
        step = jax.jit(jax.value_and_grad(auto, argnums=(0, 1)))
        result = step(inputs[0], spread(weight, P(), on), inputs[1])
    assert_close(result, expected)
    assert result[1][0].sharding.spec[0] == "data"


def make_model(selection, sharding=None):
    decoder = Decoder(n_layers=2)
    router = create_truncated_router(decoder, 1)
    return CGGRModel(decoder, router, selection=selection, sharding=sharding, **FIXED)


@nnx.jit
def gradient_of(model, ids):
    return nnx.value_and_grad(lambda model: model(ids, labels=ids))(model)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_model_on_a_sharded_batch(selection, placed):
    on, ids = mesh(), token_batch(batch=32)
    expected = gradient_of(make_model(selection), ids)
    sharding = NamedSharding(on, P("data")) if placed else None
    model = make_model(selection, sharding)
    nnx.update(model, spread(nnx.state(model), P(), on))
    result = gradient_of(model, spread(ids, P("data"), on))
    assert_close(result, expected)


def fully_sharded(state, on):
    """Every parameter over the devices, by its first dimension that they divide."""

    def place(x):
        whole = next((i for i, size in enumerate(x.shape) if size and size % on.size == 0), None)
        spec = P() if whole is None else P(*[None] * whole, "data")
        return jax.device_put(x, NamedSharding(on, spec))

    return jax.tree.map(place, state)


def unlike_batch():
    """Without tokens that are hard alike, of which rounding would select one or the other."""
    ids = token_batch(batch=32)
    return ids.at[:, 0].set(np.arange(len(ids)))


def token_split_model(selection, split="token"):
    shape = DecoderShape(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        layers=2,
        heads=2,
        kv_heads=2,
        head_size=8,
        positions=16,
    )
    decoder = TokenDecoder(shape, rngs=nnx.Rngs(0))
    return CGGRModel(decoder, split=split, selection=selection, **FIXED)


def backward_split_model(selection):
    return token_split_model(selection, split="backward")


@pytest.mark.parametrize("place", [spread, fully_sharded], ids=["replicated", "fully sharded"])
@pytest.mark.parametrize("make", [make_model, token_split_model, backward_split_model])
@pytest.mark.parametrize("selection", ["importance", "topk"])
def test_parameters_on_every_device_or_spread_over_them(selection, make, place):
    on, ids = mesh(), unlike_batch()
    expected = gradient_of(make(selection), ids)
    model = make(selection)
    state = nnx.state(model)
    nnx.update(model, spread(state, P(), on) if place is spread else fully_sharded(state, on))
    result = gradient_of(model, spread(ids, P("data"), on))
    assert_close(result, expected)
    spreads = {len(x.sharding.device_set) for x in jax.tree.leaves(result)}
    assert spreads == {8}


def test_inputs_of_one_dimension_are_spread_too():
    class Shifted(Decoder):
        def __call__(self, input_ids, shift):
            return super().__call__(input_ids) + shift[:, None, None]

    on, ids = mesh(), token_batch(batch=32)
    shift = spread(jnp.zeros(32), P("data"), on)
    sharding = NamedSharding(on, P("data", None))
    model = CGGRModel(Shifted(), selection="random", sharding=sharding, **FIXED)
    nnx.update(model, spread(nnx.state(model), P(), on))
    run = nnx.jit(lambda model, ids, shift: model(ids, labels=ids, shift=shift))
    loss = run(model, spread(ids, P("data"), on), shift)
    plain = nnx.jit(lambda model, ids: model(ids, labels=ids))
    expected = plain(CGGRModel(Decoder(), selection="random", **FIXED), ids)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_capacity_that_the_devices_do_not_divide():
    on, ids = mesh(), token_batch(batch=40)  # a quarter are 10 sequences, spread over 8 devices
    model = make_model("importance", NamedSharding(on, P("data")))
    nnx.update(model, spread(nnx.state(model), P(), on))
    result = gradient_of(model, spread(ids, P("data"), on))
    assert_close(result, gradient_of(make_model("importance"), ids))


def test_the_selected_sequences_are_spread_over_the_devices_if_asked():
    on, ids = mesh(), token_batch(batch=32)

    def operations(sharding):
        graphdef, state = nnx.split(make_model("importance", sharding))

        def step(state, ids):
            return gradient_of.__wrapped__(nnx.merge(graphdef, state), ids)

        inputs = spread(state, P(), on), spread(ids, P("data"), on)
        return jax.jit(step).lower(*inputs).compile().cost_analysis()["flops"]

    assert operations(NamedSharding(on, P("data"))) < operations(None) / 2


def check_inside_shard_map(on, make, selection):
    """Every device selects of its own: the mean is that of one device, part by part."""
    graphdef, parameters, rest = nnx.split(make(selection), nnx.Param, ...)
    ids = token_batch(batch=32)  # nothing ignored: every shard weighs the same

    def loss(parameters, ids, rank):
        model = nnx.merge(graphdef, parameters, rest, copy=True)
        return model(ids, labels=ids, rank=rank)

    def local(parameters, ids):
        def mean(parameters):
            return jax.lax.pmean(loss(parameters, ids, jax.lax.axis_index("data")), "data")

        return jax.value_and_grad(mean)(parameters)

    single = jax.jit(jax.value_and_grad(loss))
    parts = [single(parameters, part, rank) for rank, part in enumerate(np.split(ids, on.size))]
    expected = jax.tree.map(lambda *shards: sum(shards) / on.size, *parts)
    sharded = jax.jit(jax.shard_map(local, mesh=on, in_specs=(P(), P("data")), out_specs=P()))
    assert_close(sharded(parameters, spread(ids, P("data"), on)), expected)


@pytest.mark.parametrize("make", [make_model, backward_split_model])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_model_inside_shard_map(selection, make):
    check_inside_shard_map(mesh(), make, selection)


def test_two_processes_train_as_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    worker = Path(__file__).with_name("jax_processes_worker.py")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def start(n_processes, process):
        command = [sys.executable, str(worker), str(n_processes), str(process), port]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def printed(process):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        return json.loads(output.splitlines()[-1])

    alone = printed(start(1, 0))
    together = [printed(process) for process in [start(2, 0), start(2, 1)]]
    assert alone[-1][2]["tokens_selected"] < alone[0][2]["tokens_selected"]
    for steps in together:
        for (*numbers, metrics), (*expected, of_one) in zip(steps, alone, strict=True):
            np.testing.assert_allclose(numbers, expected, rtol=1e-5)
            assert metrics.keys() == of_one.keys()
            for name, value in of_one.items():
                near = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
                assert metrics[name] == near, name
