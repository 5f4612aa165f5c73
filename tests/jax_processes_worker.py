"""Run in several processes, for test_jax_sharding: a training step over all their devices.

Prints loss, norm of the gradient and metrics as JSON. Arguments: number of processes, this one's
number, port of the first.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_nnx import Decoder, token_batch

from cggr.jax import CGGRModel, create_truncated_router


def main() -> None:
    n_processes, process, port = map(int, sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4 // n_processes)
    if n_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", n_processes, process)

    on = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = NamedSharding(on, P()), NamedSharding(on, P("data"))

    def everywhere(x, sharding):
        """Each process gives what its devices have of it."""
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = everywhere(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    decoder = Decoder()
    router = create_truncated_router(decoder, 1)
    options = {
        "selection": "importance",
        "warmup_steps": 2,
        "dynamic_threshold": True,
        "min_tokens_ratio": 0.25,
    }
    model = CGGRModel(decoder, router, sharding=rows, **options)
    nnx.update(model, jax.tree.map(lambda x: everywhere(x, whole), nnx.state(model)))

    @nnx.jit
    def step(model, ids):
        loss, gradient = nnx.value_and_grad(lambda model: model(ids, labels=ids))(model)
        norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient)))
        return loss, norm

    found = []
    for seed in range(4):
        loss, norm = step(model, everywhere(token_batch(batch=16, seed=seed), rows))
        model.step()
        found.append([float(loss), float(norm), model.get_metrics()])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
