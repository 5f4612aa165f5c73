"""What is raced: the budget, the lanes and the shape of the model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cggr.spec import RoutingConfig
from cggr.spec import config as spec_config

SCORINGS = spec_config.SCORINGS
SELECTIONS = tuple(name for name in spec_config.SELECTIONS if name != "fixed_quota")
# The backward pass of all tokens, of the tokens that a lane selects, or of whole sequences.
LANES = ("dense", "random", "cggr", "random-sequences", "cggr-sequences")
SPLITS = ("dense", "token", "backward", "sequence")
DEFAULT_LANES = LANES[:3]
BACKENDS = ("torch", "jax")

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


def prompt_tokens(prompt: float, length: int) -> int:
    """How many of a sequence's tokens are a prompt, which is this part of them.

    Raises:
        RaceError: All are.
    """
    n_prompt = round(prompt * length)
    if n_prompt == length:
        raise RaceError(f"--prompt {prompt}: nothing of {length} tokens is left to learn")
    return n_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneSettings:
    """One way of training, as a table ``[lanes.NAME]`` of a configuration has it.

    Args:
        name: What the report calls it.
        split: ``dense``, or as of CGGRModel.
        scoring: As of RoutingConfig, like all but the next and the last five.
        ratio: Fraction of each batch that is trained on; of its tokens with labels.
        selection: Selection rule.
        importance_floor: In the unit of the score.
        num_strata: Of ``stratified``.
        warmup_steps: Steps over which the ratio falls to `ratio`.
        dynamic_threshold: More tokens while the model is unsure.
        max_eligible_ratio: Fraction of a batch's tokens, or with ``token`` a sequence's, that have
            labels at most. That of the race's prompts if not given; of pairs, 1.
        router_layers: Layers of the truncated router that scores; the whole model if None.
        batch_size: Sequences per batch; the race's if None.
        micro_batches: Parts of a batch that run one after the other, their gradients added.
        checkpointed: Whether layers run again in the backward pass, to save memory.
        learns_prompts: Whether it trains on prompts too, which are not measured.

    Raises:
        RaceError: An option is out of its range.
    """

    name: str
    split: str = "token"
    scoring: str = "combined"
    ratio: float = 0.25
    selection: str = "importance"
    importance_floor: float = 0.05
    num_strata: int = 4
    warmup_steps: int = 0
    dynamic_threshold: bool = False
    max_eligible_ratio: float = 1.0
    router_layers: int | None = None
    batch_size: int | None = None
    micro_batches: int = 1
    checkpointed: bool = False
    learns_prompts: bool = False

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise RaceError(
                f"lane {self.name}: split must be one of {', '.join(SPLITS)}, got {self.split!r}"
            )
        for option in ("router_layers", "batch_size", "micro_batches"):
            value = getattr(self, option)
            if value is not None and (type(value) is not int or value < 1):
                raise RaceError(f"lane {self.name}: {option} must be 1 or more, got {value!r}")
        for option in ("checkpointed", "learns_prompts"):
            value = getattr(self, option)
            if type(value) is not bool:
                raise RaceError(f"lane {self.name}: {option} must be True or False, got {value!r}")
        try:
            self.routing(seed=0)
        except (TypeError, ValueError) as error:
            raise RaceError(f"lane {self.name}: {error}") from None

    @classmethod
    def of_table(cls, name: str, table: Any, race: RaceSettings) -> LaneSettings:
        """A lane of a configuration; what its table does not say, the race's options do.

        Raises:
            RaceError: It is no table, or one of unknown options.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"name"}
        if not isinstance(table, dict):
            raise RaceError(f"lane {name} must be a table of options, got {table!r}")
        options = {key.replace("-", "_"): value for key, value in table.items()}
        if unknown := sorted(options.keys() - known):
            raise RaceError(
                f"lane {name}: unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        selecting = sorted(
            options.keys()
            - {"split", "batch_size", "micro_batches", "checkpointed", "learns_prompts"}
        )
        if options.get("split") == "dense" and selecting:
            raise RaceError(f"lane {name}: a dense lane selects nothing, got {selecting[0]!r}")
        inherited = ("scoring", "selection", "ratio", "max_eligible_ratio")
        common = {key: getattr(race, key) for key in inherited}
        if options.get("learns_prompts"):
            common["max_eligible_ratio"] = 1.0
        lane = cls(name=name, **common | options)
        batch = lane.batch_size or race.batch_size
        if batch % lane.micro_batches:
            raise RaceError(
                f"lane {name}: micro_batches must divide the batch of {batch} sequences, got "
                f"{lane.micro_batches}"
            )
        return lane

    def check_jax(self) -> None:
        """Refuses what JAX's lanes have not."""
        has = {
            "warmup_steps": self.warmup_steps > 0,
            "micro_batches": self.micro_batches > 1,
            "checkpointed": self.checkpointed,
        }
        for option, is_there in has.items():
            if is_there:
                raise RaceError(f"lane {self.name}: {option} is for --backend torch")

    @property
    def scores_excess(self) -> bool:
        """Whether it needs the losses of a reference."""
        return self.scoring == "excess_loss" and self.split != "dense"

    def routing(self, seed: int) -> RoutingConfig:
        """The options of its selection."""
        return RoutingConfig(
            scoring=self.scoring,
            selection=self.selection,
            min_tokens_ratio=self.ratio,
            max_eligible_ratio=self.max_eligible_ratio,
            warmup_steps=self.warmup_steps,
            dynamic_threshold=self.dynamic_threshold,
            importance_floor=self.importance_floor,
            num_strata=self.num_strata,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """Every option of a race.

    Args:
        lanes: Names out of ``LANES`` and of `tables`.
        tables: Lanes of a configuration: the options of :class:`LaneSettings`, by name.
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
        learning_rates: Peaks of which each lane has its best, by its first seed; none if empty.
        hidden_size: Width of the new model.
        head_size: Width of its attention heads, which divides `hidden_size`.
        kv_heads: Heads of keys and values, which divide those of queries; as many if None.
        layers: Depth of the new model.
        vocab_size: Vocabulary of the new model and its tokenizer, at least 257.
        text: Files and folders; the Python standard library's source if empty.
        prompt: Part of every sequence that is a prompt: its tokens have no labels.
        pairs: Whether the text is of prompts and completions, of which the latter have labels.
        noise: Part of the training text's lines whose words are random.
        reference: Folder of the model whose losses ``excess_loss`` is in excess of.
        model: Folder of a Hugging Face causal language model to fine-tune instead of a new one.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        backend: ``torch`` or ``jax``.
        compiled: Whether steps are compiled and captured in a CUDA graph, in bfloat16; lanes then
            race one after the other. PyTorch alone: JAX always compiles.
        memory: GiB of GPU memory that a lane may take, PyTorch alone; all if None.
        save: Lane whose model of the first seed is left beside the report.

    Raises:
        RaceError: Options that contradict each other.
    """

    budget: Budget
    lanes: tuple[str, ...] = DEFAULT_LANES
    tables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scoring: str = "combined"
    selection: str = "importance"
    ratio: float = 0.25
    router_layers: int = 1
    eval_every: Budget | None = None
    seeds: int = 1
    batch_size: int = 16
    sequence_length: int = 64
    learning_rate: float | None = None
    learning_rates: tuple[float, ...] = ()
    hidden_size: int = 192
    head_size: int = 32
    kv_heads: int | None = None
    layers: int = 4
    vocab_size: int = 4096
    text: tuple[Path, ...] = ()
    prompt: float = 0.0
    pairs: bool = False
    noise: float = 0.0
    reference: Path | None = None
    model: Path | None = None
    device: str = "auto"
    backend: str = "torch"
    compiled: bool = False
    memory: float | None = None
    save: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise RaceError(
                f"unknown backend {self.backend!r}; known backends: {', '.join(BACKENDS)}"
            )
        known = (*self.tables, *(name for name in LANES if name not in self.tables))
        for lane in self.lanes:
            if lane not in known:
                raise RaceError(f"unknown lane {lane!r}; known lanes: {', '.join(known)}")
        if not self.lanes or len(set(self.lanes)) < len(self.lanes):
            raise RaceError(f"a race needs each lane once, got {','.join(self.lanes)!r}")
        for option in ("noise", "prompt"):
            if not 0 <= getattr(self, option) < 1:
                raise RaceError(
                    f"--{option} must be at least 0 and less than 1, got {getattr(self, option)}"
                )
        prompt_tokens(self.prompt, self.sequence_length)
        if self.pairs and not self.text:
            raise RaceError("--pairs needs a --text of JSON lines, each a prompt and a completion")
        for option in ("noise", "prompt"):
            if self.pairs and getattr(self, option):
                raise RaceError(f"give either --pairs or --{option}")
        if self.save is not None and self.save not in self.lanes:
            raise RaceError(f"--save must be one of the lanes, got {self.save!r}")
        for option in ("compiled", "reference", "memory", "save"):
            if getattr(self, option) and self.backend != "torch":
                raise RaceError(f"--{option} is for --backend torch")
        rates = [("learning-rates", rate) for rate in self.learning_rates]
        for option, value in (
            ("ratio", self.ratio),
            ("learning-rate", self.learning_rate),
            ("memory", self.memory),
            *rates,
        ):
            if value is not None and not 0 < value < math.inf:
                raise RaceError(f"--{option} must be a positive number, got {value}")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise RaceError(f"--learning-rates must differ, got {self.learning_rates}")
        if self.learning_rates and self.learning_rate is not None:
            raise RaceError("give either --learning-rate or --learning-rates")
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
        if self.head_size % 2:
            raise RaceError(f"--head-size must be even, got {self.head_size}")
        if self.hidden_size % self.head_size:
            raise RaceError(
                f"--hidden-size must be a multiple of {self.head_size} (the width of an attention "
                f"head), got {self.hidden_size}"
            )
        heads = self.hidden_size // self.head_size
        if self.kv_heads is not None and heads % self.kv_heads:
            raise RaceError(f"--kv-heads must divide the {heads} heads, got {self.kv_heads}")
        if self.model is None and self.router_layers > self.layers:
            raise RaceError(
                f"--router-layers {self.router_layers} is more than the model's {self.layers} "
                "layers"
            )
        for name in self.tables:  # a mistake in a lane that does not race is one too
            self.lane(name)
        ways = [self.lane(name) for name in self.lanes]
        for way in ways:
            layers = way.router_layers or 0
            if self.model is None and layers > self.layers:
                raise RaceError(
                    f"lane {way.name}: router_layers {layers} is more than the model's "
                    f"{self.layers} layers"
                )
            if way.learns_prompts and not (self.pairs or self.prompt_tokens):
                raise RaceError(
                    f"lane {way.name}: learns_prompts needs --prompt or --pairs, without which "
                    "there are no prompts"
                )
            eligible = 1.0 if way.learns_prompts else self.max_eligible_ratio
            if not self.pairs and way.max_eligible_ratio < eligible:
                raise RaceError(
                    f"lane {way.name}: max_eligible_ratio must be at least {eligible}, the part "
                    f"that has labels by --prompt, got {way.max_eligible_ratio}"
                )
            if way.scores_excess and self.reference is None:
                raise RaceError(
                    f"lane {way.name}: scoring excess_loss needs a --reference, the folder of a "
                    "model"
                )
            if self.backend == "jax":
                way.check_jax()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of every sequence without labels."""
        return prompt_tokens(self.prompt, self.sequence_length)

    @property
    def max_eligible_ratio(self) -> float:
        """Part of a sequence's tokens that have labels; of pairs, at most."""
        return (self.sequence_length - self.prompt_tokens) / self.sequence_length

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

    def lane(self, name: str) -> LaneSettings:
        """How a lane trains."""
        if name in self.tables:
            return LaneSettings.of_table(name, self.tables[name], self)
        split = "sequence" if name.endswith("-sequences") else "token"
        is_random = name.startswith("random")
        return LaneSettings(
            name=name,
            split="dense" if name == "dense" else split,
            scoring=self.scoring,
            ratio=self.ratio,
            selection="random" if is_random else self.selection,
            max_eligible_ratio=self.max_eligible_ratio,
            # The token split scores with the pass that it makes anyway.
            router_layers=self.router_layers if split == "sequence" and not is_random else None,
        )

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the first seed."""
        return self.learning_rates or (self.peak_learning_rate,)

    @property
    def one_by_one(self) -> bool:
        """Whether a lane races when the one before has ended: each may need the whole device."""
        return self.compiled or bool(self.learning_rates)

    def lane_batch_size(self, name: str) -> int:
        """Sequences per batch of a lane."""
        return self.lane(name).batch_size or self.batch_size

    def to_json(self) -> dict[str, object]:
        """The settings as plain values, paths by their last part: a report can be shared."""
        values = dataclasses.asdict(self)
        values["budget"] = str(self.budget)
        values["eval_every"] = None if self.eval_every is None else str(self.eval_every)
        values["learning_rate"] = self.peak_learning_rate
        values["lanes"] = list(self.lanes)
        values["text"] = [path.name for path in self.text]
        values["model"] = None if self.model is None else self.model.name
        values["reference"] = None if self.reference is None else self.reference.name
        values["learning_rates"] = list(self.learning_rates)
        return values
