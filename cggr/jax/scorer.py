"""Scoring and masking without touching the training step: for routing inside a model.

Shapes: ``B`` sequences of ``S`` tokens, ``V`` classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from cggr.jax import dispatch
from cggr.jax.functional import (
    aligned_targets,
    checked_logits,
    checked_targets,
    padding_of,
    select_tokens,
    token_difficulty,
)
from cggr.jax.router import TruncatedRouter, frozen, logits_of
from cggr.jax.routing import RoutedModule, selection_metrics
from cggr.spec import RoutingConfig, TokenStatistics
from cggr.spec.schedule import ONE


class Scores(NamedTuple):
    """What a router says about a batch, each ``(B, S)``."""

    difficulty: Array
    eligible: Array
    statistics: TokenStatistics


class CGGRScorer(RoutedModule):
    """Difficulty of every token and a mask of those worth the effort, from a router.

    The mask of ``selection="importance"`` is a sample, for a loss that is weighted by
    ``info["selection"].weights``. Where none is, as of tokens that an expert is spent on,
    ``selection="topk"`` takes the hardest.

    Args:
        router: A :class:`TruncatedRouter`, or any nnx module ``(input_ids, ...) -> logits`` (an
            array, a tuple that starts with them, or an output with ``.logits``). It runs without
            gradient, without dropout, and leaves no trace in its Variables.
        config: The routing options; or give the fields of :class:`RoutingConfig` as keywords.
        shift_labels: True if position t predicts label t + 1 (causal models), False if label t
            (masked language models).
        **options: Fields of :class:`RoutingConfig`.

    Example:
        >>> router = nnx.Embed(50, 50, rngs=nnx.Rngs(0))  # any model from ids to logits
        >>> scorer = CGGRScorer(router, min_tokens_ratio=0.5, warmup_steps=0, selection="random",
        ...                     dynamic_threshold=False)
        >>> difficulty, mask, info = scorer(jnp.arange(20).reshape(2, 10))
        >>> difficulty.shape, mask.dtype, int(mask.sum())
        ((2, 10), dtype('bool'), 10)
    """

    def __init__(
        self,
        router: nnx.Module,
        config: RoutingConfig | None = None,
        *,
        shift_labels: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        self.router = checked_module("router", router)
        self.shift_labels = checked_shift(shift_labels)

    def __call__(
        self,
        input_ids: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        attention_mask: ArrayLike | None = None,
        rank: int | Array = 0,
        reference_nll: ArrayLike | None = None,
        **model_inputs: Any,
    ) -> tuple[Array, Array, dict[str, Any]]:
        """Score a batch and select from it.

        Args:
            input_ids: ``(B, S)`` integers.
            labels: ``(B, S)``, Hugging Face style; without them every position that is not
                padding is eligible and no score may need a target.
            attention_mask: ``(B, S)``, 0 on padding, which is never selected; a mask of another
                rank reaches the router and nothing else.
            rank: Number of the shard inside shard_map, ``jax.lax.axis_index("data")``.
            reference_nll: ``(B, S)``, for ``scoring="excess_loss"``: at each position, the
                reference loss of the target that the position predicts.
            **model_inputs: Passed to the router, None included (positions, cache, ...).

        Returns:
            difficulty: ``(B, S)`` float32, 0 where nothing is eligible.
            mask: ``(B, S)`` bool, True for selected tokens.
            info: confidence and entropy ``(B, S)``, current_ratio (scalar), selection
                (:class:`Selection`), all on the device.

        Raises:
            ValueError: The score needs labels and there are none, or shapes disagree.
        """
        config = self.config
        targets = None
        if labels is not None:
            targets = aligned_targets(
                labels, attention_mask, shift=self.shift_labels, ignore_index=config.ignore_index
            )
        scores = score(
            self.router,
            targets,
            config,
            input_ids,
            with_mask(model_inputs, attention_mask),
            reference_nll=reference_nll,
            shifted=self.shift_labels,
        )
        statistics = scores.statistics
        selection = select_tokens(
            scores.difficulty,
            config,
            step=self.step_count[...],
            draw=self.draw_count[...] if self.deterministic else self._next_draw(),
            rank=rank,
            eligible=scores.eligible,
            confidence=statistics.confidence,
            capacity=self._slots(scores.difficulty.shape),
        )
        metrics = selection_metrics(
            step=self.step_count[...],
            ratio=selection.ratio,
            tokens_selected=jnp.sum(selection.count, dtype=jnp.int32),
            eligible=scores.eligible,
            confidence=statistics.confidence,
            entropy=statistics.entropy,
            difficulty=scores.difficulty,
        )
        self._record(metrics)
        info = {
            "confidence": statistics.confidence,
            "entropy": statistics.entropy,
            "current_ratio": selection.ratio[0].astype(jnp.float32) / ONE,
            "selection": selection,
        }
        return scores.difficulty, selection.mask, info


def score(
    router: nnx.Module,
    targets: Array | None,
    config: RoutingConfig,
    input_ids: ArrayLike,
    model_inputs: dict[str, Any],
    *,
    reference_nll: ArrayLike | None,
    shifted: bool,
) -> Scores:
    """Difficulty, eligibility and statistics of every position, given aligned targets."""
    if isinstance(router, TruncatedRouter):
        router = router.truncation(router.source)
    logits = checked_logits(logits_of(frozen(router)(input_ids, **model_inputs)))
    if logits.ndim != 3:
        raise ValueError(f"router must return logits of shape (B, S, V), got {logits.shape}.")
    shape, n_classes = logits.shape[:2], logits.shape[2]
    if targets is None:
        padding = padding_of(model_inputs.get("attention_mask"), shape)
        eligible = jnp.ones(shape, bool) if padding is None else ~padding
    else:
        targets = checked_targets(
            targets, shape, n_classes, config.ignore_index, name="labels", shifted=shifted
        )
        eligible = targets != config.ignore_index
    statistics = dispatch.token_statistics(
        jax.lax.stop_gradient(logits), targets, config.ignore_index
    )
    difficulty = token_difficulty(statistics, config.scoring, reference_nll=reference_nll)
    return Scores(jnp.where(eligible, difficulty, 0), eligible, statistics)


def with_mask(model_inputs: dict[str, Any], attention_mask: ArrayLike | None) -> dict[str, Any]:
    """The model's inputs by name, with the mask if there is one: not every model takes it."""
    if attention_mask is None:
        return model_inputs
    return model_inputs | {"attention_mask": attention_mask}


def checked_module(name: str, module: Any) -> nnx.Module:
    """An nnx module; refused if it is something else."""
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"{name} must be a flax.nnx module, got {type(module).__name__}; other models are "
            f"trained through cggr_loss and cggr_linear_loss."
        )
    return module


def checked_shift(shift_labels: Any) -> bool:
    """Whether labels are shifted; refused if it is not a bool."""
    if not isinstance(shift_labels, bool):
        raise TypeError(f"shift_labels must be True or False, got {shift_labels!r}.")
    return shift_labels
