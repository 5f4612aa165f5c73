"""Counters of the nnx modules: saved, restored, resumed, and known to the host."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiny_nnx import Bigram, Decoder, token_batch

from cggr.jax import CGGRLoss, CGGRModel, create_truncated_router
from cggr.jax.routing import RoutingState

OPTIONS = {"selection": "importance", "min_tokens_ratio": 0.25, "warmup_steps": 8}


def make_training(seed=0):
    decoder = Decoder(n_layers=2, seed=seed)
    model = CGGRModel(decoder, create_truncated_router(decoder, 1), **OPTIONS)
    return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, ids):
    loss, gradient = nnx.value_and_grad(lambda model: model(ids, labels=ids))(model)
    optimizer.update(model, gradient)
    return loss


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        losses.append(float(train_step(model, optimizer, token_batch(seed=step))))
        model.step()
    return losses


@nnx.jit
def loss_of(criterion, logits, targets):
    return criterion(logits, targets)


def test_a_resumed_run_repeats_its_losses(tmp_path):
    model, optimizer = make_training()
    train(model, optimizer, range(7))
    state = nnx.state((model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    expected = train(model, optimizer, range(7, 12))

    model, optimizer = make_training(seed=1)
    blank = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state((model, optimizer)))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", blank)
    nnx.update((model, optimizer), restored)
    model.set_step()
    assert model.capacity_ratio == model.config.capacity_ratio(7)
    assert int(model.draw_count[...]) == 7
    # On a GPU, XLA adds the gradient of an embedding in any order.
    tolerance = 0 if jax.default_backend() == "cpu" else 1e-5
    assert train(model, optimizer, range(7, 12)) == pytest.approx(expected, rel=tolerance)


def test_a_pure_dictionary_holds_all_there_is():
    model, optimizer = make_training()
    train(model, optimizer, range(3))
    saved = nnx.to_pure_dict(nnx.state(model))
    other, _ = make_training(seed=1)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(other, state)
    other.set_step()
    assert other.get_metrics() == model.get_metrics()
    ids = token_batch(seed=9)
    assert float(other(ids, labels=ids)) == float(model(ids, labels=ids))
    abstract = nnx.eval_shape(lambda: make_training()[0])
    graphdef, blank = nnx.split(abstract)
    nnx.replace_by_pure_dict(blank, saved)
    assert int(nnx.merge(graphdef, blank).step_count[...]) == 3


def test_the_counters_are_variables_of_their_own_kind():
    model, _ = make_training()
    counters = nnx.state(model, RoutingState)
    assert set(counters) == {"step_count", "draw_count"}
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(counters))
    assert not jax.tree.leaves(nnx.state(model, nnx.Param).get("step_count"))


def test_the_first_step_learns_what_was_restored():
    model, _ = make_training()
    model.step_count[...] = jnp.int32(100)
    model.step()
    assert int(model.step_count[...]) == 101
    assert model.capacity_ratio == model.config.capacity_ratio(101)


def test_metrics_notice_a_count_that_was_set_back():
    model = CGGRModel(Bigram(np.eye(64)), **OPTIONS)
    model.set_step(20)
    final = model.capacity_ratio
    model.step_count[...] = jnp.int32(1)  # restored, and nobody says so
    model.step()
    assert int(model.step_count[...]) == 2
    assert model.capacity_ratio == final
    model(token_batch(), labels=token_batch())
    assert model.get_metrics()["step"] == 2
    assert model.capacity_ratio == model.config.capacity_ratio(2) > final


def test_a_stale_capacity_keeps_less_and_no_wrong_weights():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4, 64, 30)).astype(np.float32)
    targets = rng.integers(0, 30, (4, 64))
    criterion = CGGRLoss(selection="importance", warmup_steps=100, dynamic_threshold=False)
    criterion.set_step(100)  # capacity for a quarter
    criterion.step_count[...] = jnp.int32(0)  # where the ratio is 1
    values = [float(loss_of(criterion, logits, targets)) for _ in range(1500)]
    assert criterion.get_metrics()["tokens_selected"] == 64
    criterion.eval()
    dense = float(loss_of(criterion, logits, targets))
    assert abs(np.mean(values) - dense) < 4 * np.std(values) / np.sqrt(1500)


def test_steps_go_where_they_are_set():
    criterion = CGGRLoss(warmup_steps=100)
    for step in (0, 99, 100, np.int64(7)):
        criterion.set_step(step)
        assert int(criterion.step_count[...]) == step
        assert criterion.capacity_ratio == criterion.config.capacity_ratio(int(step))
    criterion.step()
    assert int(criterion.step_count[...]) == 8
    with pytest.raises(ValueError, match=r"step must be in \[0, 2\*\*31\), got -1"):
        criterion.set_step(-1)
    with pytest.raises(ValueError, match=r"step must be in \[0, 2\*\*31\), got 2147483648"):
        criterion.set_step(2**31)
    with pytest.raises(TypeError):
        criterion.set_step(1.5)
    assert int(criterion.step_count[...]) == 8


def test_step_belongs_outside_jit():
    model, _ = make_training()
    with pytest.raises(RuntimeError, match="call it outside jit, after the training step"):
        nnx.jit(lambda model: model.step())(model)
    assert int(model.step_count[...]) == 0


def test_copies_count_on_their_own():
    criterion = CGGRLoss(**OPTIONS)
    criterion.set_step(5)
    for twin in (nnx.clone(criterion), copy.deepcopy(criterion)):
        twin.step()
        assert int(twin.step_count[...]) == 6
        assert int(criterion.step_count[...]) == 5
        assert twin.capacity_ratio == criterion.config.capacity_ratio(6)


def test_metrics_say_what_the_last_training_forward_did():
    criterion = CGGRLoss(
        selection="stratified", min_tokens_ratio=0.5, warmup_steps=0, dynamic_threshold=True
    )
    assert criterion.get_metrics() == {}
    logits, targets = jnp.zeros((2, 8, 4)), jnp.zeros((2, 8), jnp.int32).at[0, 5:].set(-100)
    loss_of(criterion, logits, targets)
    metrics = criterion.metrics
    assert list(metrics) == [
        "step",
        "token_ratio",
        "tokens_selected",
        "tokens_total",
        "avg_confidence",
        "avg_entropy",
        "avg_difficulty",
        "selection",
        "scoring",
    ]
    assert metrics["step"] == 0
    assert metrics["tokens_total"] == 13
    # Half, and half of that again by threshold_sensitivity times a doubt of 3/4.
    assert metrics["token_ratio"] == pytest.approx(0.5 * (1 + 0.5 * 0.75), abs=1e-3)
    assert metrics["tokens_selected"] == int(np.ceil(13 * metrics["token_ratio"]))
    assert metrics["avg_confidence"] == pytest.approx(0.25)
    assert metrics["avg_entropy"] == pytest.approx(np.log(4))
    assert metrics["avg_difficulty"] == pytest.approx(2 * np.log(4) + 1)
    assert (metrics["selection"], metrics["scoring"]) == ("stratified", "combined")


def test_each_training_forward_draws_anew():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(64, 30)).astype(np.float32), rng.integers(0, 30, 64)
    criterion = CGGRLoss(selection="random", warmup_steps=0, dynamic_threshold=False)
    values = [float(loss_of(criterion, logits, targets)) for _ in range(4)]
    assert len(set(values)) == 4
    assert int(criterion.draw_count[...]) == 4
    again = CGGRLoss(selection="random", warmup_steps=0, dynamic_threshold=False)
    assert [float(loss_of(again, logits, targets)) for _ in range(4)] == values
