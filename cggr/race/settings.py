"""What is raced: the budget, the lanes and the shape of the model."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal

from cggr.spec import RoutingConfig
from cggr.spec import config as spec_config

# Excess loss needs a reference model; "fixed_quota" is topk here, where no threshold is dynamic.
SCORINGS = tuple(name for name in spec_config.SCORINGS if name != "excess_loss")
SELECTIONS = tuple(name for name in spec_config.SELECTIONS if name != "fixed_quota")
# The backward pass of all tokens, of the tokens that a lane selects, or of whole sequences.
LANES = ("dense", "random", "cggr", "random-sequences", "cggr-sequences")
DEFAULT_LANES = LANES[:3]
BACKENDS = ("torch", "jax")
HEAD_SIZE = 32  # of the new model's attention

_UNITS: dict[str, tuple[float, Literal["seconds", "steps"]]] = {
    "s": (1, "seconds"),
    "m": (60, "seconds"),
    "h": (3600, "seconds"),
    "step": (1, "steps"),
    "steps": (1, "steps"),
}


class RaceError(Exception):
    """The race cannot run as asked; the message is one line that says what would be right."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """An amount of training: seconds of wall-clock or optimizer steps.

    Example:
        >>> Budget.parse("2m"), str(Budget.parse("500steps"))
        (Budget(amount=120.0, unit='seconds'), '500steps')
    """

    amount: float
    unit: Literal["seconds", "steps"]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``60s``, ``2m``, ``1.5h`` or ``500steps``.

        Raises:
            RaceError: The text is none of these, or nothing can be trained in that amount.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|steps?)", text.strip().lower(), re.ASCII)
        if match is None:
            raise RaceError(
                f"{text!r} is not an amount of training: write seconds, minutes, hours or steps, "
                "as in 60s, 2m, 1h or 500steps"
            )
        scale, unit = _UNITS[match[2]]
        amount = float(match[1]) * scale
        if unit == "steps" and not amount.is_integer():
            raise RaceError(f"{text!r} is not a whole number of steps")
        if amount == 0:
            raise RaceError(f"{text!r} ends before the first training step: give more than zero")
        if math.isinf(amount):
            raise RaceError(f"{text!r} never ends: give a finite amount")
        return cls(amount, unit)

    @property
    def words(self) -> str:
        """For a reader, such as ``40 s`` or ``500 steps``."""
        return f"{self.amount:g} s" if self.unit == "seconds" else f"{self.amount:,.0f} steps"

    def spent(self, seconds: float, steps: int) -> float:
        """The fraction of the budget that has been used up, 1 or more at its end."""
        return (seconds if self.unit == "seconds" else steps) / self.amount

    def __str__(self) -> str:
        return f"{self.amount:g}s" if self.unit == "seconds" else f"{self.amount:.0f}steps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """Every option of a race.

    Args:
        lanes: Names out of ``LANES``.
        scoring: Score of the cggr lanes.
        selection: Selection rule of the cggr lanes.
        ratio: Fraction of each batch that the random and cggr lanes train on.
        router_layers: Layers of the truncated router that scores whole sequences.
        budget: Training per lane and seed, scoring included, evaluation not.
        eval_every: Training between two evaluations; a tenth of the budget if None.
        seeds: Number of repetitions, with seeds 0, 1, ...
        batch_size: Sequences per batch.
        sequence_length: Tokens per sequence.
        learning_rate: Peak of the schedule; 6e-3 for a new model and 5e-5 for `model` if None.
        hidden_size: Width of the new model, a multiple of 32.
        layers: Depth of the new model.
        vocab_size: Vocabulary of the new model and its tokenizer, at least 257.
        text: Files and folders; the Python standard library's source if empty.
        model: Folder of a Hugging Face causal language model to fine-tune instead of a new one.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        backend: ``torch`` or ``jax``.

    Raises:
        RaceError: Options that contradict each other.
    """

    budget: Budget
    lanes: tuple[str, ...] = DEFAULT_LANES
    scoring: str = "combined"
    selection: str = "importance"
    ratio: float = 0.25
    router_layers: int = 1
    eval_every: Budget | None = None
    seeds: int = 1
    batch_size: int = 16
    sequence_length: int = 64
    learning_rate: float | None = None
    hidden_size: int = 192
    layers: int = 4
    vocab_size: int = 4096
    text: tuple[Path, ...] = ()
    model: Path | None = None
    device: str = "auto"
    backend: str = "torch"

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise RaceError(
                f"unknown backend {self.backend!r}; known backends: {', '.join(BACKENDS)}"
            )
        for lane in self.lanes:
            if lane not in LANES:
                raise RaceError(f"unknown lane {lane!r}; known lanes: {', '.join(LANES)}")
        if not self.lanes or len(set(self.lanes)) < len(self.lanes):
            raise RaceError(f"a race needs each lane once, got {','.join(self.lanes)!r}")
        for option, value in (("ratio", self.ratio), ("learning-rate", self.learning_rate)):
            if value is not None and not 0 < value < math.inf:
                raise RaceError(f"--{option} must be a positive number, got {value}")
        if self.eval_every is not None:
            if self.eval_every.unit != self.budget.unit:
                raise RaceError(
                    f"--eval-every {self.eval_every} and --budget {self.budget} must both be time "
                    "or both be steps"
                )
            if self.eval_every.amount > self.budget.amount:
                raise RaceError(
                    f"--budget {self.budget} ends before the first evaluation: give a longer "
                    f"budget, or an --eval-every of at most {self.budget}"
                )
        if self.hidden_size % HEAD_SIZE:
            raise RaceError(
                f"--hidden-size must be a multiple of {HEAD_SIZE} (the width of an attention "
                f"head), got {self.hidden_size}"
            )
        if self.model is None and self.router_layers > self.layers:
            raise RaceError(
                f"--router-layers {self.router_layers} is more than the model's {self.layers} "
                "layers"
            )

    @property
    def eval_interval(self) -> float:
        """Fraction of the budget between two evaluations."""
        if self.eval_every is not None:
            return self.eval_every.amount / self.budget.amount
        return 0.1

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 6e-3 if self.model is None else 5e-5

    @staticmethod
    def split(lane: str) -> Literal["token", "sequence"]:
        """What a lane that selects keeps of a batch."""
        return "sequence" if lane.endswith("-sequences") else "token"

    def routing(self, lane: str, seed: int) -> RoutingConfig:
        """The options of a lane that selects."""
        return RoutingConfig(
            scoring=self.scoring,
            selection="random" if lane.startswith("random") else self.selection,
            min_tokens_ratio=self.ratio,
            warmup_steps=0,
            dynamic_threshold=False,
            seed=seed,
        )

    def to_json(self) -> dict[str, object]:
        """The settings as plain values, paths by their last part: a report can be shared."""
        values = dataclasses.asdict(self)
        values["budget"] = str(self.budget)
        values["eval_every"] = None if self.eval_every is None else str(self.eval_every)
        values["learning_rate"] = self.peak_learning_rate
        values["lanes"] = list(self.lanes)
        values["text"] = [path.name for path in self.text]
        values["model"] = None if self.model is None else self.model.name
        return values
