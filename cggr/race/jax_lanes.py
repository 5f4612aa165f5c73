"""The lanes of JAX: one Llama in Flax, trained densely or through CGGRModel."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from cggr.jax import CGGRModel, create_truncated_router
from cggr.race.decoder import DecoderShape, Weights, initial_weights, new_decoder
from cggr.race.engine import Lane
from cggr.race.jax_decoder import Decoder, load_decoder
from cggr.race.machine import Runtime, cpu_count, package_version, share_memory
from cggr.race.pretrained import check_fit, load_llama
from cggr.race.settings import LaneSettings, RaceError, RaceSettings
from cggr.race.tokens import IGNORED, Batch, Corpus, Losses

# torch.optim.AdamW but for its learning rate, which every step of the race is given.
ADAMW = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8), optax.add_decayed_weights(0.1))
# As torch multiplies: on an H100 the default is TF32.
PRECISION = "float32"


class JaxLane:
    """A model, its optimizer, and its way from a batch to a loss.

    Between steps the model is what nnx takes it apart into: walking through modules in every step,
    as ``nnx.jit`` does, takes milliseconds of a step's time.

    Args:
        lane: How it trains.
        model: The model, which is left as it is.
        settings: The race.
        corpus: What it is measured on.
        seed: Seed of the selection.
        device: Where to train.
    """

    def __init__(
        self,
        lane: LaneSettings,
        model: Decoder,
        settings: RaceSettings,
        corpus: Corpus,
        seed: int,
        device: jax.Device,
    ) -> None:
        self.name = lane.name
        self.is_dense = lane.split == "dense"
        self.device = device
        self.corpus = corpus
        self.settings = settings
        self._decoder = nnx.graphdef(model)
        routed = _route(lane, model, seed)
        self._definition = nnx.graphdef(routed)
        # Copies, since a step gives away the memory of what it is called with.
        parameters = jax.tree.map(jnp.copy, nnx.state(routed, nnx.Param))
        counters = nnx.state(routed, nnx.Not(nnx.Param))
        self.parameters, self.moments, self.counters = jax.device_put(
            (parameters, ADAMW.init(parameters), counters), device
        )
        shape = (settings.lane_batch_size(lane.name), settings.sequence_length)
        self._trained: Array = jnp.zeros((), jnp.int32)
        # Here, where no clock runs. JAX remembers: the second lane of a kind compiles nothing.
        self._step = _train_step.lower(
            self._definition,
            self.parameters,
            self.moments,
            self.counters,
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
            np.float32(0),
        ).compile()
        self._loss: Array = jnp.zeros(())

    @property
    def module(self) -> Decoder | CGGRModel:
        """The model, or the CGGRModel around it, as it is now."""
        return nnx.merge(self._definition, self.parameters, self.counters)

    def train_step(self, batch: Batch, learning_rate: float) -> None:
        """One optimizer step on a batch of token ids; waits for the step before it."""
        before = self._loss
        self.parameters, self.moments, self.counters, self._loss, trained = self._step(
            self.parameters,
            self.moments,
            self.counters,
            batch.ids.astype(np.int32),
            batch.labels.astype(np.int32),
            np.float32(learning_rate),
        )
        self._trained = self._trained + trained
        # One step ahead keeps the device busy. JAX would queue dozens: the clock and the learning
        # rate, which follows it, would be seconds late.
        before.block_until_ready()

    def synchronize(self) -> None:
        """Waits for the device."""
        jax.block_until_ready((self.parameters, self.moments, self._loss))

    def begin_turn(self) -> None:
        """Nothing to note."""

    def end_turn(self) -> None:
        """Nothing to note."""

    def peak_memory(self) -> int | None:
        """Weights, optimizer state, gradients and activations, as the compiler plans them."""
        if self.device.platform == "cpu" or (plan := self._step.memory_analysis()) is None:
            return None
        return (
            plan.argument_size_in_bytes
            + plan.output_size_in_bytes
            + plan.temp_size_in_bytes
            - plan.alias_size_in_bytes
        )

    def tokens_trained(self) -> int:
        """Tokens that losses were taken over since it was last asked; waits for the device."""
        trained, self._trained = int(self._trained), jnp.zeros((), jnp.int32)
        return trained

    def save(self, folder: Path) -> None:
        """Settings refuse it."""
        raise NotImplementedError

    def evaluate(self) -> float:
        """Mean held-out loss, every token but the first, or the first prompt, predicted once."""
        parameters = self.parameters if self.is_dense else self.parameters["model"]
        total, n_targets = 0.0, 0
        length, prompt = self.settings.sequence_length, self.settings.prompt_tokens
        for inputs, targets in self.corpus.heldout_batches(length, prompt):
            loss = _loss_sum(
                self._decoder, parameters, inputs.astype(np.int32), targets.astype(np.int32)
            )
            total += loss.item()
            n_targets += int((targets != IGNORED).sum())
        return total / n_targets


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
@jax.default_matmul_precision(PRECISION)
def _train_step(
    definition: nnx.GraphDef,
    parameters: nnx.State,
    moments: optax.OptState,
    counters: nnx.State,
    ids: Array,
    labels: Array,
    learning_rate: Array,
) -> tuple[nnx.State, optax.OptState, nnx.State, Array, Array]:
    """Everything that a step changes, its loss, and over how many tokens that was taken."""
    module = nnx.merge(definition, parameters, counters)
    loss, gradients = nnx.value_and_grad(_loss)(module, ids, labels)
    # As torch.nn.utils.clip_grad_norm_ does.
    norm = jnp.sqrt(sum(jnp.vdot(gradient, gradient) for gradient in jax.tree.leaves(gradients)))
    scale = jnp.minimum(1.0, 1.0 / (norm + 1e-6))
    gradients = jax.tree.map(lambda gradient: gradient * scale, gradients)
    updates, moments = ADAMW.update(gradients, moments, parameters)
    parameters = jax.tree.map(lambda p, update: p - learning_rate * update, parameters, updates)
    if isinstance(module, CGGRModel):
        # What step() does on the host, but for the capacity: it changes in a warm-up only.
        module.step_count[...] += 1
        trained = module.last_metrics["tokens_selected"][...]
    else:
        trained = jnp.sum(labels[:, 1:] != IGNORED, dtype=jnp.int32)
    return parameters, moments, nnx.state(module, nnx.Not(nnx.Param)), loss, trained


def _loss(module: Decoder | CGGRModel, ids: Array, labels: Array) -> Array:
    if isinstance(module, CGGRModel):
        return module(ids, labels=labels)
    # The last token of a row predicts nothing. Its loss is dropped and not its logits, of which all
    # the others would be copied.
    targets = jnp.roll(labels, -1, axis=1)
    nll = _nll(module(ids), jnp.maximum(targets, 0))
    return jnp.mean(nll[:, :-1], where=targets[:, :-1] != IGNORED)


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision(PRECISION)
def _loss_sum(
    definition: nnx.GraphDef, parameters: nnx.State, inputs: Array, targets: Array
) -> Array:
    nll = _nll(nnx.merge(definition, parameters)(inputs), jnp.maximum(targets, 0))
    return jnp.sum(nll, where=targets != IGNORED)


_nll = optax.losses.softmax_cross_entropy_with_integer_labels


def _route(lane: LaneSettings, model: Decoder, seed: int) -> Decoder | CGGRModel:
    """Wraps the model for a lane that selects; a dense lane trains it as it is."""
    if lane.split == "dense":
        return model
    layers = lane.router_layers
    router = None if layers is None else create_truncated_router(model, layers)
    return CGGRModel(model, router, lane.routing(seed), split=lane.split)


def make_lanes(
    settings: RaceSettings, corpus: Corpus, device: jax.Device
) -> Callable[[str, int], Lane]:
    """Returns a function that builds the lane of a name and a seed.

    All lanes of a seed start from copies of the same weights.
    """
    models: dict[int, Decoder] = {}

    def make_lane(name: str, seed: int) -> Lane:
        if seed not in models:
            models.clear()  # the seeds race one after the other
            models[seed] = load_decoder(*build_model(settings, corpus, seed), device)
        lane = settings.lane(name)
        return JaxLane(lane, models[seed], settings, corpus, seed, device)

    return make_lane


def build_model(settings: RaceSettings, corpus: Corpus, seed: int) -> tuple[DecoderShape, Weights]:
    """Shape and weights of the settings' small Llama, or of the model that they name."""
    if settings.model is None:
        shape = new_decoder(settings, corpus.vocab_size)
        return shape, initial_weights(shape, seed)
    shape, weights = load_llama(settings.model)
    check_fit(
        settings,
        corpus,
        embeddings=shape.vocab_size,
        positions=shape.positions,
        layers=shape.layers,
    )
    return shape, weights


def reference_losses(settings: RaceSettings, corpus: Corpus, device: jax.Device) -> Losses:
    """Settings refuse it."""
    raise NotImplementedError


def count_parameters(settings: RaceSettings, corpus: Corpus) -> int:
    """Number of values that the race's model trains; refuses a model that cannot race."""
    shape, _ = build_model(settings, corpus, seed=0)
    return shape.size


def set_threads(count: int) -> None:
    """Sets the number of CPU threads, which XLA reads once, when JAX looks for its devices."""
    os.environ["PJRT_NPROC"] = str(count)


def find_device(name: str) -> jax.Device:
    """Resolves ``auto`` to the fastest device there is, and checks that a named one exists."""
    if name == "mps":
        raise RaceError("--device mps: JAX has no such device; give auto, cpu or cuda")
    share_memory()
    try:
        return jax.devices(None if name == "auto" else name)[0]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RaceError(f"--device {name}: JAX finds none here: {reason}") from None


def runtime(device: jax.Device) -> Runtime:
    """What a reader needs to know of JAX and its device."""
    on_cpu = device.platform == "cpu"
    return Runtime(
        versions={
            **{name: package_version(name) for name in ("jax", "jaxlib", "flax", "optax")},
            "cuda": None if on_cpu else device.client.platform_version,
        },
        device=device.platform,
        gpu=None if on_cpu else device.device_kind,
        threads=int(os.environ.get("PJRT_NPROC", cpu_count())),
    )
