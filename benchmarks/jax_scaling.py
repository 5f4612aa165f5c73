"""Claim: routing scales over a mesh of devices as a dense step does (weak scaling, JAX).

    python benchmarks/jax_scaling.py --devices 1 2 4

Every device has a batch of its own, of the same size whatever their number; forward and backward in
one jitted call. The parameters are replicated, or sharded over the mesh by their first axis, and
XLA divides the work; or, per device, jax.shard_map does, inside which the kernels run on many
devices as they do on one. On a CPU it is a toy model's: whether it runs, not how fast (XLA_FLAGS
forces more devices of it).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from scaling import ROUTED, TOY, WARM_UP_STEPS, WAYS

from cggr.bench import report
from cggr.bench.jax_step import compiled_step, dense_loss, make_decoder, routed_loss
from cggr.bench.report import Column, number
from cggr.bench.step import CASES, StepCase
from cggr.jax import CGGRModel
from cggr.race import machine

STEPS = 5
WRAPPERS = ("replicated", "sharded", "per device")


def make_step(wrapper: str, way: str, case: StepCase, devices: int) -> Callable[[], Any]:
    """A step over so many devices."""
    from flax import nnx

    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    batch = NamedSharding(mesh, P("data"))
    attention = "cudnn" if jax.default_backend() == "gpu" else None
    model: Any = make_decoder(case, seed=0, attention=attention)
    if way in ROUTED:
        model = CGGRModel(
            model,
            split=ROUTED[way],
            min_tokens_ratio=0.25,
            warmup_steps=0,
            dynamic_threshold=False,
            sharding=None if wrapper == "per device" else batch,
        )

    def place(array: Any) -> Any:
        divides = wrapper == "sharded" and array.ndim > 1 and array.shape[0] % devices == 0
        return jax.device_put(array, NamedSharding(mesh, P("data") if divides else P()))

    nnx.update(model, jax.tree.map(place, nnx.state(model)))
    shape = (devices * case.batch, case.length)
    rng = np.random.default_rng(0)
    ids = jax.device_put(rng.integers(0, case.n_classes, shape, dtype=np.int32), batch)
    if wrapper == "per device":
        return step_per_device(routed_shard if way in ROUTED else dense_loss, model, ids, mesh)
    loss = routed_loss if way in ROUTED else dense_loss
    step: Callable[[], Any] = compiled_step(loss, model, ids)[1]
    return step


def routed_shard(model: Any, ids: Any) -> Any:
    """Of a CGGRModel, whose draws are this device's own."""
    return model(ids, labels=ids, rank=jax.lax.axis_index("data"))


def step_per_device(
    loss: Callable[[Any, Any], Any], model: Any, ids: Any, mesh: jax.sharding.Mesh
) -> Callable[[], Any]:
    """Every device its own part of the batch, and the mean of their gradients."""
    from flax import nnx

    definition, parameters, rest = nnx.split(model, nnx.Param, ...)

    def local(parameters: Any, rest: Any, ids: Any) -> Any:
        def mean(parameters: Any) -> Any:
            model = nnx.merge(definition, parameters, rest, copy=True)
            return jax.lax.pmean(loss(model, ids), "data")

        return jax.value_and_grad(mean)(parameters)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())
    compiled = jax.jit(sharded).lower(parameters, rest, ids).compile()
    return functools.partial(compiled, parameters, rest, ids)


def seconds(step: Callable[[], Any], rounds: int) -> list[float]:
    """Of a step in each round."""
    for _ in range(WARM_UP_STEPS):
        jax.block_until_ready(step())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(STEPS - 1):
            step()
        jax.block_until_ready(step())
        found.append((time.perf_counter() - start) / STEPS)
    return found


def main() -> None:
    """Measures by every number of devices, and shows a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--case", type=int, default=1, choices=range(1, len(CASES) + 1))
    parser.add_argument("--wrappers", nargs="+", default=WRAPPERS, choices=WRAPPERS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if max(options.devices) > jax.device_count():
        parser.error(f"--devices {max(options.devices)}: JAX sees {jax.device_count()}")
    gpu = jax.default_backend() == "gpu"
    case = CASES[options.case - 1] if gpu else TOY
    rows: list[dict[str, Any]] = []
    for wrapper in options.wrappers:
        for way in WAYS:
            alone: float | None = None
            for devices in options.devices:
                times = seconds(make_step(wrapper, way, case, devices), options.rounds)
                speed = case.n_rows / statistics.median(times)
                alone = alone or speed
                rows.append(
                    {
                        "contestant": f"{way}, {wrapper}, {devices}",
                        "devices": devices,
                        "seconds": times,
                        "tokens_per_s": speed,
                        "scaling": speed / alone,
                    }
                )
    here = machine.Runtime(
        versions={name: machine.package_version(name) for name in ("jax", "flax", "jax-triton")},
        device=jax.default_backend(),
        gpu=jax.devices()[0].device_kind if gpu else None,
        threads=machine.cpu_count(),
    )
    title = f"{case.title} on each of {', '.join(map(str, options.devices))} devices"
    columns = (
        Column("tokens/s per device", number("tokens_per_s", ",.0f")),
        Column("of the fewest's", number("scaling", ".3f")),
    )
    report.print_case(Console(), title, rows, columns)
    content = {"benchmark": "jax_scaling", "case": case.title, **machine.environment(here)}
    report.write(options.out / f"jax_scaling-{options.case}.json", {**content, "contestants": rows})


if __name__ == "__main__":
    main()
