"""What every routed module shares: options, step and draw counters, capacity, metrics."""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cggr.spec import RoutingConfig
from cggr.spec.config import given_config, scoring_name
from cggr.spec.schedule import ONE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RoutedModule(nn.Module):
    """Holds the routing options and the state of the schedule.

    The step counts optimizer steps, the draw counts training forwards; both are buffers, so they
    are saved, restored and moved with the module, and a resumed run repeats its masks. The host
    keeps its own copy of the step, from which it knows the static capacity without asking the
    device.

    Args:
        config: The routing options; or give them as keywords.
        capacity: ``"exact"`` sizes every selection to what is selected, with one host
            synchronisation a forward; ``"static"`` takes at most four sizes over a run and never
            synchronises: use it under torch.compile and CUDA graphs.
        **options: Fields of :class:`RoutingConfig`, by keyword.

    Attributes:
        selects_all: The ratio is 1 at this step, whatever the batch, of which every token may be
            eligible: the loss is the dense loss, to the last bit.
        latest: Metrics of the last training forward, which :meth:`get_metrics` reads.
    """

    step_count: Tensor
    draw_count: Tensor

    def __init__(
        self, config: RoutingConfig | None = None, capacity: str = "exact", **options: Any
    ) -> None:
        super().__init__()
        if capacity not in ("exact", "static"):
            raise ValueError(f"capacity must be 'exact' or 'static', got {capacity!r}.")
        self.config = given_config(config, options)
        self.capacity = capacity
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int32))
        self.register_buffer("draw_count", torch.zeros((), dtype=torch.int32))
        self._set_host_step(0)
        self.latest: dict[str, Any] = {}

    @property
    def level(self) -> tuple[bool, int]:
        """All that a forward of static capacity takes from the schedule on the host."""
        return self.selects_all, self._capacity_ratio

    def step(self) -> None:
        """Advance the schedule; call it after every ``optimizer.step()``."""
        self.set_step(self._host_step + 1)

    def set_step(self, step: int) -> None:
        """Go to a step of the schedule, on the device and on the host.

        Args:
            step: Optimizer step, not negative.

        Raises:
            TypeError: `step` is not an integer.
            ValueError: `step` is not in [0, 2**31).
        """
        step = operator.index(step)
        if not 0 <= step < 2**31:
            raise ValueError(f"step must be in [0, 2**31), got {step}.")
        self._set_host_step(step)
        self.step_count.fill_(step)

    @property
    def metrics(self) -> dict[str, Any]:
        """Same as :meth:`get_metrics`."""
        return self.get_metrics()

    def get_metrics(self) -> dict[str, Any]:
        """Numbers of the last training forward; reading them synchronises with the device.

        Returns:
            step, token_ratio (asked for), tokens_selected, tokens_total (eligible tokens),
            avg_confidence, avg_entropy, avg_difficulty (means over eligible tokens), selection and
            scoring. Empty before the first training forward. Averages are absent when nothing was
            scored.
        """
        return {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in self.latest.items()
        }

    def follow(self, device: torch.device) -> None:
        """Bring the counters to where the data is, once: nobody need move a loss by hand."""
        if self.step_count.device != device:
            with torch.inference_mode(False):  # they outlive a forward in inference mode
                self.step_count = self.step_count.to(device)
                self.draw_count = self.draw_count.to(device)

    def slots(self, batch: int, length: int, config: RoutingConfig | None = None) -> int | None:
        """Capacity for a selection over this shape; None if it is to be exact."""
        if self.capacity == "exact":
            return None
        return self.most_slots(batch, length, config)

    def most_slots(self, batch: int, length: int, config: RoutingConfig | None = None) -> int:
        """The static capacity for a selection over this shape."""
        return (config or self.config).capacity_at(self._capacity_ratio, batch, length)

    def next_draw(self) -> Tensor:
        """Number of this training forward; the counter moves on."""
        draw = self.draw_count.clone()
        self.draw_count += 1
        return draw

    def record(
        self,
        *,
        ratio: Tensor,
        tokens_selected: Tensor,
        eligible: Tensor,
        **scored: Tensor,
    ) -> None:
        """Keep the metrics on the device until somebody asks; `scored` are ``(B, S)`` or none."""
        total = eligible.sum(dtype=torch.int32)
        averages = {
            f"avg_{name}": torch.where(eligible, value, 0).sum() / total.clamp(min=1)
            for name, value in scored.items()
        }
        self.latest = {
            "step": self.step_count.clone(),
            "token_ratio": ratio[0].to(torch.float32) / ONE,
            "tokens_selected": tokens_selected,
            "tokens_total": total,
            **averages,
            "selection": self.config.selection,
            "scoring": scoring_name(self.config),
        }

    def _set_host_step(self, step: int) -> None:
        self._host_step = step
        # Kept ready, so that a compiled forward depends on a few values and not on every step.
        self._capacity_ratio = self.config.capacity_ratio(step)
        self.selects_all = self.config.selects_all_at(step)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = (f"{prefix}step_count", f"{prefix}draw_count")
        if names[0] in state_dict:
            # cggr 0.5.0 saved no draws, and int64; copies, since loading may assign them.
            for name in names:
                value = state_dict.get(name, state_dict[names[0]])
                state_dict[name] = value.to(torch.int32, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.step_count.is_meta:
            self._set_host_step(int(self.step_count))

    def extra_repr(self) -> str:
        """The options that differ from the defaults, for ``print(module)``."""
        default = RoutingConfig()
        changed = [
            f"{field.name}={getattr(self.config, field.name)!r}"
            for field in dataclasses.fields(self.config)
            if getattr(self.config, field.name) != getattr(default, field.name)
        ]
        return ", ".join(changed)


def process_rank(same_tokens: ProcessGroup | None = None) -> int:
    """What tells this process's tokens from those of others: ranks draw independent samples.

    The rank in the default process group, 0 without one. Of processes that have the same tokens, it
    is the first's: they have to select the same.
    """
    if same_tokens is not None:
        return min(torch.distributed.get_process_group_ranks(same_tokens))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0
