"""CGGRModel's training step in Flax, forward and backward in one jitted call, against dense steps.

Llamas of random weights in bfloat16, without an optimizer, whose attention is cuDNN's.
``peak_bytes`` is what XLA says that a call needs: weights, gradients and all between.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cggr.bench.jax_statistics import missing
from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings
from cggr.bench.step import CASES, DENSE, RATIOS, ROUTER_LAYERS, StepCase
from cggr.bench.timing import Call, Contestant, Progress, add_ratio, measure, rows_of, wall_clock

if TYPE_CHECKING:
    from jax import Array

    from cggr.race.jax_decoder import Decoder

CALLS = 3


def make_decoder(case: StepCase, seed: int, attention: str | None = "cudnn") -> Decoder:
    """A Llama of this shape, in the precision of the case."""
    import jax
    from flax import nnx

    from cggr.jax import RowAttention
    from cggr.race.decoder import DecoderShape
    from cggr.race.jax_decoder import Decoder

    shape = DecoderShape(
        vocab_size=case.n_classes,
        hidden_size=case.hidden_size or 0,
        intermediate_size=case.intermediate_size,
        layers=case.layers,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_size=(case.hidden_size or 0) // case.heads,
        positions=case.length,
    )

    @nnx.jit
    def make() -> Decoder:
        decoder = Decoder(shape, nnx.Rngs(seed))
        nnx.update(
            decoder, jax.tree.map(lambda x: x.astype(case.dtype), nnx.state(decoder, nnx.Param))
        )
        return decoder

    decoder = make()
    # What it gives, which it took from the weights that it was made with.
    decoder.embed_tokens.dtype = case.dtype
    attend = functools.partial(jax.nn.dot_product_attention, implementation=attention)
    for layer in decoder.layers:
        layer.self_attn.attend = RowAttention(attend)
    return decoder


def dense_loss(model: Any, ids: Array) -> Array:
    """Mean loss of the next token."""
    import jax.numpy as jnp
    import optax

    logits = model(ids)[:, :-1].astype(jnp.float32)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return jnp.mean(losses)


def routed_loss(model: Any, ids: Array) -> Array:
    """Of a CGGRModel."""
    loss: Array = model(ids, labels=ids)
    return loss


def compiled_step(loss: Callable[[Any, Array], Array], model: Any, ids: Array) -> Any:
    """From the model's state to loss, gradients and the state of all that is no parameter.

    Gradients come out as the parameters lie, which is how an optimizer wants them: else every
    device would have to have all of those of parameters that are spread over devices.
    """
    import jax
    from flax import nnx

    definition, state = nnx.split(model)
    of_parameters = jax.tree.map(lambda x: x.sharding, nnx.state(model, nnx.Param))

    def step(state: Any, ids: Array) -> Any:
        model = nnx.merge(definition, state)
        differentiated = nnx.DiffState(0, nnx.Param)
        value, gradients = nnx.value_and_grad(loss, argnums=differentiated)(model, ids)
        return value, gradients, nnx.state(model, nnx.Not(nnx.Param))

    placed = (None, of_parameters, None)
    compiled = jax.jit(step, out_shardings=placed).lower(state, ids).compile()
    return compiled, functools.partial(compiled, state, ids)


def run(case: StepCase, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    import jax
    import numpy as np

    from cggr.jax import CGGRModel, create_truncated_router

    decoder = make_decoder(case, settings.seed)
    rng = np.random.default_rng(settings.seed)
    shape = (case.batch, case.length)
    ids = jax.numpy.asarray(rng.integers(0, case.n_classes, shape, dtype=np.int32))

    def contestant(name: str, loss: Any, make: Callable[[], Any]) -> Contestant:
        needs: dict[str, int] = {}

        def prepare() -> Call:
            compiled, call = compiled_step(loss, make(), ids)
            memory = compiled.memory_analysis()
            needs["peak_bytes"] = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                + memory.temp_size_in_bytes
            )
            return call

        def observe(call: Call) -> dict[str, Any]:
            return {"loss": float(call()[0]), **needs}

        clock = wall_clock(jax.block_until_ready)
        return Contestant(name, prepare, observe, clock=clock, calls=CALLS)

    def routed(split: str, ratio: float, router: Any = None) -> Any:
        return CGGRModel(
            decoder,
            router,
            split=split,
            selection="stratified",
            min_tokens_ratio=ratio,
            warmup_steps=0,
            dynamic_threshold=False,
        )

    contestants = [contestant(DENSE, dense_loss, lambda: decoder)]
    router = create_truncated_router(decoder, ROUTER_LAYERS)
    make = functools.partial(routed, "sequence", 0.25, router)
    contestants.append(contestant("sequence, ratio 0.25", routed_loss, make))
    for split, ratio in itertools.product(("token", "backward"), RATIOS):
        make = functools.partial(routed, split, ratio)
        contestants.append(contestant(f"{split}, ratio {ratio:g}", routed_loss, make))
    rows = rows_of(measure(contestants, settings, progress))
    add_ratio(rows, "to_dense", "ms", DENSE)
    add_ratio(rows, "memory_to_dense", "peak_bytes", DENSE)
    return rows


BENCHMARK = Benchmark(
    cases=CASES,
    measure=run,
    missing=missing,
    columns=(
        *TIMES,
        Column("of dense", number("to_dense", ".3f")),
        Column("peak GiB", number("peak_bytes", ".2f", 2**30)),
        Column("of dense's", number("memory_to_dense", ".3f")),
        Column("loss", number("loss", ".3f")),
    ),
)
