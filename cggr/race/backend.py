"""The frameworks that can race: what each of them gives, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from cggr.race.engine import Lane
from cggr.race.machine import Runtime
from cggr.race.settings import RaceSettings
from cggr.race.tokens import Corpus, Losses


class Backend(Protocol):
    """The functions of a module such as ``torch_lanes``; a device is what its framework calls one.

    The functions are called in this order.
    """

    def set_threads(self, count: int) -> None:
        """Sets the number of CPU threads."""

    def find_device(self, name: str) -> Any:
        """Resolves ``auto``, and checks that a named device exists."""

    def runtime(self, device: Any) -> Runtime:
        """What a reader needs to know of the framework and the device."""

    def count_parameters(self, settings: RaceSettings, corpus: Corpus) -> int:
        """Number of values that the race's model trains; refuses a model that cannot race."""

    def reference_losses(self, settings: RaceSettings, corpus: Corpus, device: Any) -> Losses:
        """The reference's loss of what follows every training token; where the backend can."""

    def make_lanes(
        self, settings: RaceSettings, corpus: Corpus, device: Any
    ) -> Callable[[str, int], Lane]:
        """A function that builds the lane of a name and a seed, from the seed's weights."""


def load_backend(name: str) -> Backend:
    """Imports a framework, and no other.

    Args:
        name: Out of ``BACKENDS``.

    Raises:
        ModuleNotFoundError: Something that it needs is not installed.
    """
    if name == "jax":
        from cggr.race import jax_lanes

        return jax_lanes
    from cggr.race import torch_lanes

    return torch_lanes
