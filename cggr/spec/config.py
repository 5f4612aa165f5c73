"""Every option of CGGR, its range and its error message, once."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

from cggr.spec import schedule

SCORINGS = ("entropy", "margin", "loss", "combined", "error_norm", "excess_loss")
SELECTIONS = ("topk", "stratified", "sequence_aware", "importance", "random", "fixed_quota")
SCOPES = ("batch", "sequence")
MAX_STRATA = 256
_FIXED: dict[str, Any] = {"warmup_steps": 0, "dynamic_threshold": False}
PRESETS: dict[str, dict[str, Any]] = {
    "completions": {"selection": "random", "min_tokens_ratio": 1.0, **_FIXED},
    "noisy": {
        "scoring": "excess_loss",
        "selection": "topk",
        "min_tokens_ratio": 0.7,
        **_FIXED,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Which tokens to learn from; immutable and hashable, so it can be a static argument of jit.

    Names and defaults are those of cggr 0.5.0 where it had them, but for two. `selection` was
    ``"topk"``, which trains on another gradient than the dense loss's, and lost to random selection
    by the default score. `dynamic_threshold` was on, and lost at equal time.

    Args:
        scoring: How hard a token is: ``"entropy"``, ``"margin"``, ``"loss"``, ``"combined"``,
            ``"error_norm"``, ``"excess_loss"``, or a callable ``TokenStatistics -> scores``
            written in the array API. See :func:`cggr.spec.scoring.token_difficulty`.
        selection: Which tokens are kept: ``"importance"``, ``"stratified"``,
            ``"sequence_aware"``, ``"topk"``, ``"random"``, or ``"fixed_quota"`` (topk without the
            dynamic threshold). See :func:`cggr.spec.selection.select_tokens`. None is
            ``"importance"``, but ``"topk"`` of ``"excess_loss"``, whose noise has no part in the
            loss then; a weighted sample would estimate the mean over all tokens, noise included.
        min_tokens_ratio: Fraction of the eligible tokens to keep after the warm-up, in (0, 1].
        max_eligible_ratio: Fraction of a batch's tokens that are eligible at most, in (0, 1]; of
            any sequence's, with ``scope="sequence"`` and so with ``split="token"``. Where only
            completions have labels, and prompts none, the longest completion's part: static shapes
            are made for so many. Of more, a static capacity keeps as many as fit, by the same rule;
            of the rules only ``"importance"`` makes up for the others by its weights. An exact
            capacity refuses more. Whole sequences are selected without it.
        warmup_steps: Optimizer steps over which the ratio falls linearly from 1 to
            `min_tokens_ratio`.
        dynamic_threshold: Keep more tokens while the model is unsure.
        threshold_sensitivity: By how much, in [0, 1]: ``ratio (1 + sensitivity (1 - confidence))``.
        num_strata: Number of parts of equal size into which ``"stratified"`` ranks the tokens,
            1 to 256.
        min_tokens_per_sequence: How many tokens of every sequence ``"sequence_aware"`` keeps at
            least.
        importance_floor: Added to every difficulty by ``"importance"``, to which a negative one is
            0, so that each token can be drawn; in [1e-30, 1e30], in the unit of the score.
        scope: ``"batch"`` ranks over the whole batch, ``"sequence"`` inside every sequence.
        seed: Seed of the sampling selections, in [0, 2**32).
        ignore_index: Target that is never scored, selected or counted.

    Raises:
        ValueError: An option is out of its range; the message names it, its value and the range.
        TypeError: An option has the wrong type.

    Example:
        >>> config = RoutingConfig(selection="stratified", min_tokens_ratio=0.1)
        >>> config.scoring, config.num_strata
        ('combined', 4)
        >>> RoutingConfig(min_tokens_ratio=0.0)
        Traceback (most recent call last):
        ...
        ValueError: min_tokens_ratio must be in (0, 1], got 0.0.
    """

    scoring: str | Callable[..., Any] = "combined"
    selection: str | None = None
    min_tokens_ratio: float = 0.25
    max_eligible_ratio: float = 1.0
    warmup_steps: int = 1000
    dynamic_threshold: bool = False
    threshold_sensitivity: float = 0.5
    num_strata: int = 4
    min_tokens_per_sequence: int = 1
    importance_floor: float = 0.05
    scope: str = "batch"
    seed: int = 0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not callable(self.scoring):
            _check_choice("scoring", self.scoring, SCORINGS, " or a callable")
        if self.selection is None:
            self._set("selection", "topk" if self.scoring == "excess_loss" else "importance")
        _check_choice("selection", self.selection, SELECTIONS)
        _check_choice("scope", self.scope, SCOPES)
        for name in ("min_tokens_ratio", "max_eligible_ratio"):
            self._set(name, _number(name, getattr(self, name)))
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}.")
        self._set(
            "threshold_sensitivity", _number("threshold_sensitivity", self.threshold_sensitivity)
        )
        if not 0 <= self.threshold_sensitivity <= 1:
            raise ValueError(
                f"threshold_sensitivity must be in [0, 1], got {self.threshold_sensitivity}."
            )
        self._set("importance_floor", _number("importance_floor", self.importance_floor))
        if not 1e-30 <= self.importance_floor <= 1e30:  # float32, and room for its inverse
            raise ValueError(
                f"importance_floor must be in [1e-30, 1e30], got {self.importance_floor}."
            )
        if not isinstance(self.dynamic_threshold, bool):
            raise TypeError(
                f"dynamic_threshold must be True or False, got {self.dynamic_threshold!r}."
            )
        for name, low, high in (
            ("warmup_steps", 0, 2**31 - 1),
            ("num_strata", 1, MAX_STRATA),
            ("min_tokens_per_sequence", 0, 2**31 - 1),
            ("seed", 0, 2**32 - 1),
            ("ignore_index", -(2**31), 2**31 - 1),
        ):
            value = _integer(name, getattr(self, name))
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {value}.")
            self._set(name, value)

    @classmethod
    def preset(cls, name: str, **options: Any) -> RoutingConfig:
        """Options that were ahead of dense training at equal time, for what they are for.

        - ``"completions"``: all tokens that have labels, where prompts have none. Nothing is
          scored. Was ahead of dense training on the same tokens of code, and level or a little
          ahead with ``"backward"`` of summaries; dense training on prompts too, where they can
          teach, was ahead of that. Needs `max_eligible_ratio`: with ``split="token"`` the longest
          completion's part of its sequence, with ``"backward"`` the completions' part of any batch.
          What has no label costs no backward pass there; ``split="sequence"`` trains on everything.
        - ``"noisy"``: the 0.7 of the tokens whose loss is most in excess of a reference model's,
          where about 0.3 of a text cannot be learned. Needs `reference_nll` with every batch, of a
          reference that knows such text: by one that had read another, dense training was ahead.
          Was raced by ``split="backward"``.

        There is none for training from scratch, where dense training was ahead of all that was
        raced.

        Args:
            name: ``"completions"`` or ``"noisy"``.
            **options: Fields that differ from it.

        Raises:
            ValueError: There is no preset of this name, an option is out of its range, or
                ``"completions"`` is not given `max_eligible_ratio`.
            TypeError: An option is unknown or has the wrong type.

        Example:
            >>> config = RoutingConfig.preset("completions", max_eligible_ratio=0.25)
            >>> config.min_tokens_ratio, config.capacity(0, batch=4, length=100)
            (1.0, 100)
            >>> RoutingConfig.preset("noisy", min_tokens_ratio=0.5).scoring
            'excess_loss'

        References:
            The races, and where each lost: ``docs/evidence.md``.
        """
        _check_choice("name", name, tuple(PRESETS))
        if name == "completions" and "max_eligible_ratio" not in options:
            raise ValueError(
                "max_eligible_ratio must be given with the preset 'completions': the largest part "
                "of a sequence's tokens that have labels, such as 0.25."
            )
        return given_config(None, PRESETS[name] | options)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def adaptive(self) -> bool:
        """Whether the ratio follows the batch's confidence."""
        return self.dynamic_threshold and self.selection != "fixed_quota"

    def capacity_ratio(self, step: int) -> int:
        """Upper bound on the ratio from `step` on, in units of 2**-14; at most four values a run.

        The values are 1, 3/4, 1/2 and the bound after the warm-up, so that a compiled training
        step exists in at most four variants. It never increases with the step.

        Args:
            step: Optimizer step, a Python int on the host.

        Returns:
            An int in [1, 2**14].

        Example:
            >>> config = RoutingConfig(min_tokens_ratio=0.25, warmup_steps=100)
            >>> [config.capacity_ratio(step) / schedule.ONE for step in (0, 50, 70, 90, 100)]
            [1.0, 0.75, 0.5, 0.5, 0.25]
        """
        step = _integer("step", step)
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}.")
        bound = schedule.ratio_bound(self, step)
        final = schedule.ratio_bound(self, self.warmup_steps)
        levels = (schedule.ONE, 3 * schedule.ONE // 4, schedule.ONE // 2, final)
        return min(level for level in levels if level >= max(bound, final))

    def capacity(self, step: int, batch: int, length: int) -> int:
        """Number of slots that hold the selection of any batch of this shape at `step`.

        Computed on the host from the step alone, never from a device value: pass it to
        :func:`~cggr.spec.selection.select_tokens` as a static argument.

        Args:
            step: Optimizer step, a Python int.
            batch: Number of sequences B.
            length: Tokens per sequence S.

        Returns:
            Slots for the batch, or per sequence with ``scope="sequence"``.

        Example:
            >>> RoutingConfig(warmup_steps=0).capacity(0, batch=4, length=100)
            100
            >>> completions = {"min_tokens_ratio": 1.0, "max_eligible_ratio": 0.25}
            >>> RoutingConfig(**completions).capacity(0, batch=4, length=100)
            100
        """
        return self.capacity_at(self.capacity_ratio(step), batch, length)

    @property
    def selects_all(self) -> bool:
        """Whether every token may be eligible, and all that are are selected, at any step."""
        return self.selects_all_at(2**31 - 1)

    def selects_all_at(self, step: int) -> bool:
        """:attr:`selects_all` at a step, whose loss is the dense loss then."""
        return self.max_eligible_ratio == 1 and schedule.base_ratio(self, step) == schedule.ONE

    def most_eligible(self, size: int) -> int:
        """How many of `size` tokens may be eligible."""
        if self.max_eligible_ratio == 1:
            return size  # which may be a compiler's symbol, and has no ceiling
        return math.ceil(self.max_eligible_ratio * size)

    def capacity_at(self, capacity_ratio: int, batch: int, length: int) -> int:
        """:meth:`capacity` for a given :meth:`capacity_ratio`."""
        sequences = batch if self.scope == "batch" else 1
        size = sequences * length
        slots = schedule.ceil_share(self.most_eligible(size), capacity_ratio)
        if self.selection == "sequence_aware":
            slots = max(slots, sequences * min(self.min_tokens_per_sequence, length))
        return min(slots, size)


def rule_of_sequences(config: RoutingConfig) -> RoutingConfig:
    """The options of a selection among sequences, which are kept whole.

    There is no floor of tokens in each of them, and all may have something to learn.
    """
    selection = "topk" if config.selection == "sequence_aware" else config.selection
    return dataclasses.replace(config, selection=selection, max_eligible_ratio=1.0)


def check_head(logit_scale: Any, softcap: Any) -> None:
    """Refuse a scale that is no finite Python number, and a soft-cap that is none above 0."""
    if not isinstance(logit_scale, numbers.Real) or not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be a finite Python number, got {logit_scale}.")
    if softcap is None:
        return
    if not isinstance(softcap, numbers.Real) or not 0 < float(softcap) < math.inf:
        raise ValueError(f"softcap must be positive and finite or None, got {softcap}.")


def given_config(config: RoutingConfig | None, options: dict[str, Any]) -> RoutingConfig:
    """The options of a routed module, which were given as one config or as keywords.

    Raises:
        TypeError: Both were given, an option is unknown, or `config` is something else.
    """
    known = {field.name for field in dataclasses.fields(RoutingConfig)}
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join(sorted(known))}.")
    if config is None:
        return RoutingConfig(**options)
    check_config(config)
    if options:
        raise TypeError(
            f"give either config or options as keywords, got config and {', '.join(options)}."
        )
    return config


def check_config(config: Any) -> None:
    """Refuse what is no RoutingConfig."""
    if not isinstance(config, RoutingConfig):
        raise TypeError(
            f"config must be a RoutingConfig, got {config!r}; options are given by keyword."
        )


def scoring_name(config: RoutingConfig) -> str:
    """Name of the score, for metrics."""
    if isinstance(config.scoring, str):
        return config.scoring
    return getattr(config.scoring, "__name__", type(config.scoring).__name__)


def _check_choice(name: str, value: object, choices: tuple[str, ...], more: str = "") -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}{more}, got {value!r}.")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
