"""What every routed nnx module shares: options, step and draw counters, capacity, metrics."""

from __future__ import annotations

import operator
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from cggr.spec import RoutingConfig
from cggr.spec.config import given_config, scoring_name
from cggr.spec.schedule import ONE


class RoutingState(nnx.Variable):
    """A counter of the schedule; saved and restored with the module."""


class RoutingMetrics(nnx.Variable):
    """A number of the last training forward."""


_METRICS = {
    "step": jnp.int32,
    "token_ratio": jnp.float32,
    "tokens_selected": jnp.int32,
    "tokens_total": jnp.int32,
    "avg_confidence": jnp.float32,
    "avg_entropy": jnp.float32,
    "avg_difficulty": jnp.float32,
}

# What the host knows of the modules' steps. Beside the modules, not in them: nnx compiles anew for
# every value of a module's plain attributes.
_host_steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class RoutedModule(nnx.Module):
    """Holds the routing options and the state of the schedule.

    The step counts optimizer steps, the draw counts training forwards; both are nnx Variables, so
    they are saved and restored with the module, and a resumed run repeats its masks. The host
    keeps its own count of the steps, from which it knows the static capacity without asking the
    device: over a run it takes at most four values, so ``nnx.jit`` compiles a training step at
    most four times. A capacity that is out of date never biases a result: the selection is
    smaller than the schedule asks for.

    Args:
        config: The routing options; or give them as keywords.
        **options: Fields of :class:`RoutingConfig`, by keyword.

    Attributes:
        deterministic: No selection, the dense loss; set by nnx's ``eval()`` and ``train()``.
        capacity_ratio: Static bound on the ratio, in units of ``2**-14``.
    """

    def __init__(self, config: RoutingConfig | None = None, **options: Any) -> None:
        self.config = given_config(config, options)
        self.deterministic = False
        self.capacity_ratio = self.config.capacity_ratio(0)
        self.step_count = RoutingState(jnp.zeros((), jnp.int32))
        self.draw_count = RoutingState(jnp.zeros((), jnp.int32))
        # Of the form that a forward leaves, since nnx compiles anew for another. No forward yet.
        self.last_metrics = nnx.Dict(
            {name: RoutingMetrics(jnp.full((), -1, dtype)) for name, dtype in _METRICS.items()}
        )

    def step(self) -> None:
        """Advance the schedule; call it after every optimizer update, outside jit.

        The first call waits for the device to learn its step; later ones do not wait. After
        restoring a checkpoint into a module that has stepped before, call ``set_step()``.

        Raises:
            RuntimeError: Called inside jit, where the host cannot choose the next capacity.
        """
        count = self.step_count[...]
        if isinstance(count, jax.core.Tracer):
            raise RuntimeError(
                "step() chooses the capacity of the next compiled step on the host: call it "
                "outside jit, after the training step."
            )
        count = _plus_one(count)
        self.step_count.set_value(count)
        known = _host_steps.get(self)
        self._set_host_step(_on_host(count) if known is None else known + 1)

    def set_step(self, step: int | None = None) -> None:
        """Go to a step of the schedule; or say that `step_count` was restored.

        Args:
            step: Optimizer step, not negative. None takes what `step_count` holds, which waits
                for the device.

        Raises:
            TypeError: `step` is not an integer.
            ValueError: `step` is not in [0, 2**31).
        """
        count = self.step_count[...]
        if step is None:
            self._set_host_step(_on_host(count))
            return
        step = operator.index(step)
        if not 0 <= step < 2**31:
            raise ValueError(f"step must be in [0, 2**31), got {step}.")
        self.step_count.set_value(jax.device_put(np.int32(step), count.sharding))
        self._set_host_step(step)

    @property
    def metrics(self) -> dict[str, Any]:
        """Same as :meth:`get_metrics`."""
        return self.get_metrics()

    def get_metrics(self) -> dict[str, Any]:
        """Numbers of the last training forward; reading them waits for the device.

        Returns:
            step, token_ratio (asked for), tokens_selected, tokens_total (eligible tokens),
            avg_confidence, avg_entropy, avg_difficulty (means over eligible tokens), selection and
            scoring. Empty before the first training forward. Averages are absent when nothing was
            scored.
        """
        values = jax.device_get({name: self.last_metrics[name][...] for name in _METRICS})
        if values["step"] < 0:
            return {}
        if _host_steps.get(self) not in (None, values["step"], values["step"] + 1):
            self.set_step()  # a restored count that nobody told us of
        numbers = {
            name: values[name].item()
            for name in _METRICS
            if self._scores() or not name.startswith("avg_")
        }
        names = {"selection": self.config.selection, "scoring": scoring_name(self.config)}
        return numbers | names

    def _slots(self, shape: tuple[int, ...], config: RoutingConfig | None = None) -> int:
        """Capacity for a selection over ``(B, S)`` or ``(N,)`` tokens."""
        batch, length = shape if len(shape) == 2 else (1, *shape)
        return (config or self.config).capacity_at(self.capacity_ratio, batch, length)

    def _next_draw(self) -> Array:
        """Number of this training forward; the counter moves on."""
        draw = self.draw_count[...]
        self.draw_count[...] = draw + 1
        return draw

    def _record(self, metrics: dict[str, Array]) -> None:
        """Keep the metrics on the device until somebody asks; averages may be absent."""
        for name, dtype in _METRICS.items():
            if name in metrics:
                self.last_metrics[name][...] = metrics[name].astype(dtype)

    # Private, since nnx.tabulate calls what is public with tracers.
    def _scores(self) -> bool:
        """Whether anything is scored, of which there are averages."""
        return True

    def _set_host_step(self, step: int) -> None:
        _host_steps[self] = step
        self.capacity_ratio = self.config.capacity_ratio(step)


def selection_metrics(
    *, step: int | Array, ratio: Array, tokens_selected: Array, eligible: Array, **scored: Array
) -> dict[str, Array]:
    """Metrics on the device; `scored` are ``(B, S)`` or none."""
    total = jnp.sum(eligible, dtype=jnp.int32)
    averages = {
        f"avg_{name}": jnp.sum(jnp.where(eligible, value, 0)) / jnp.maximum(total, 1)
        for name, value in scored.items()
    }
    return {
        "step": jnp.asarray(step, jnp.int32).reshape(()),
        "token_ratio": ratio[0].astype(jnp.float32) / ONE,
        "tokens_selected": tokens_selected,
        "tokens_total": total,
        **averages,
    }


@jax.jit
def _plus_one(count: Array) -> Array:
    return count + 1  # compiled, so that the 1 is not sent to the device in every call


def _on_host(count: Array) -> int:
    return int(jax.device_get(count))
