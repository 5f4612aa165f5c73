"""Scoring and masking without touching the training step: for routing inside a model.

Shapes: ``B`` sequences of ``S`` tokens, ``V`` classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cggr.spec import RoutingConfig, TokenStatistics
from cggr.spec.schedule import ONE
from cggr.torch.dispatch import implementation
from cggr.torch.functional import (
    aligned_targets,
    check_logits,
    checked_targets,
    padding_of,
    select_tokens,
    token_difficulty,
)
from cggr.torch.router import (
    TruncatedRouter,
    cache_switch,
    call_model,
    is_causal,
    logits_of,
    tensor_parallel_group,
    unwrapped,
)
from cggr.torch.routing import RoutedModule, process_rank
from cggr.torch.selected import Scored


class Scores(NamedTuple):
    """What a router says about a batch, each ``(B, S)``."""

    difficulty: Tensor
    eligible: Tensor
    statistics: TokenStatistics


class CGGRScorer(RoutedModule):
    """Difficulty of every token and a mask of those worth the effort, from a router.

    The mask of ``selection="importance"`` is a sample, for a loss that is weighted by
    ``info["selection"].weights``. Where none is, as of tokens that an expert is spent on,
    ``selection="topk"`` takes the hardest.

    Args:
        router: A :class:`TruncatedRouter`, or any model ``(input_ids, ...) -> logits`` (a tensor,
            or an output with ``.logits``). Runs without gradient.
        config: The routing options; or give the fields of :class:`RoutingConfig` as keywords.
        capacity: ``"exact"`` or ``"static"``; see :class:`~cggr.torch.routing.RoutedModule`.
        shift_labels: True if position t predicts label t + 1 (causal models), False if label t
            (masked language models), ``"auto"`` to tell by the router's class.
        **options: Fields of :class:`RoutingConfig`.

    Example:
        >>> router = nn.Embedding(50, 50)  # any model from ids to logits
        >>> scorer = CGGRScorer(router, min_tokens_ratio=0.5, warmup_steps=0, selection="random",
        ...                     dynamic_threshold=False)
        >>> difficulty, mask, info = scorer(torch.arange(20).reshape(2, 10))
        >>> tuple(difficulty.shape), mask.dtype, int(mask.sum())
        ((2, 10), torch.bool, 10)
    """

    def __init__(
        self,
        router: nn.Module,
        config: RoutingConfig | None = None,
        *,
        capacity: str = "exact",
        shift_labels: bool | str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(config, capacity, **options)
        if shift_labels not in (True, False, "auto"):
            raise ValueError(f"shift_labels must be True, False or 'auto', got {shift_labels!r}.")
        self.router = router
        self.shift_labels = shift_labels
        self._cache_switch = {} if isinstance(router, TruncatedRouter) else cache_switch(router)

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        reference_nll: Tensor | None = None,
        **model_inputs: Any,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Score a batch and select from it.

        Args:
            input_ids: ``(B, S)`` integers, or None with ``inputs_embeds`` among `model_inputs`.
            labels: ``(B, S)``, Hugging Face style; without them every position that is not
                padding is eligible and no score may need a target.
            attention_mask: ``(B, S)``, 0 on padding, which is never selected.
            reference_nll: ``(B, S)``, for ``scoring="excess_loss"``: at each position, the
                reference loss of the target that the position predicts.
            **model_inputs: Passed to the router (position_ids, token_type_ids, inputs_embeds...).

        Returns:
            difficulty: ``(B, S)`` float32, 0 where nothing is eligible.
            mask: ``(B, S)`` bool, True for selected tokens.
            info: confidence and entropy ``(B, S)``, current_ratio (scalar), selection
                (:class:`Selection`), all on the device.

        Raises:
            ValueError: The score needs labels and there are none, or shapes disagree.
        """
        targets = None
        if labels is not None:
            targets = aligned_targets(
                labels,
                attention_mask,
                shift=self.shifts_labels(),
                ignore_index=self.config.ignore_index,
            )
        scores = self.score(
            targets,
            reference_nll=reference_nll,
            input_ids=input_ids,
            attention_mask=attention_mask,
            **model_inputs,
        )
        self.follow(scores.difficulty.device)
        batch, length = scores.difficulty.shape
        selection = select_tokens(
            scores.difficulty,
            self.config,
            step=self.step_count,
            draw=self.next_draw() if self.training else self.draw_count,
            rank=process_rank(tensor_parallel_group(self.router)),
            eligible=scores.eligible,
            confidence=scores.statistics.confidence,
            capacity=self.slots(batch, length),
        )
        self.record(
            ratio=selection.ratio,
            tokens_selected=selection.count.sum(dtype=torch.int32),
            eligible=scores.eligible,
            confidence=scores.statistics.confidence,
            entropy=scores.statistics.entropy,
            difficulty=scores.difficulty,
        )
        info = {
            "confidence": scores.statistics.confidence,
            "entropy": scores.statistics.entropy,
            "current_ratio": selection.ratio[0].to(torch.float32) / ONE,
            "selection": selection,
        }
        return scores.difficulty, selection.mask, info

    @torch.no_grad()
    def score(
        self, targets: Tensor | None, *, reference_nll: Tensor | None = None, **model_inputs: Any
    ) -> Scores:
        """Difficulty, eligibility and statistics of every position, given aligned targets."""
        router = self.router
        if isinstance(router, TruncatedRouter) and not router.passthrough:
            rows = router.hidden_states(**model_inputs)
            return self.score_hidden(router, rows, targets, reference_nll, model_inputs)
        logits = logits_of(call_model(router, self._cache_switch | model_inputs))
        check_logits(logits)
        targets, eligible = self._checked(logits, logits.shape[-1], targets, model_inputs)
        scored = implementation(logits).token_statistics(logits, targets, self.config.ignore_index)
        return self.scores_of(scored, eligible, reference_nll)

    @torch.no_grad()
    def score_hidden(
        self,
        router: TruncatedRouter,
        hidden: Tensor,
        targets: Tensor | None,
        reference_nll: Tensor | None,
        model_inputs: dict[str, Any],
    ) -> Scores:
        """:meth:`score` of final hidden states ``(B, S, D)`` of this router, a chunk at a time."""
        n_classes = router.n_classes
        targets, eligible = self._checked(hidden, n_classes, targets, model_inputs)
        scored = implementation(hidden).chunked_statistics(
            hidden, router.project, n_classes, targets, self.config.ignore_index
        )
        return self.scores_of(scored, eligible, reference_nll)

    def _checked(
        self, rows: Tensor, n_classes: int, targets: Tensor | None, model_inputs: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor]:
        """Targets, if there are any, and which positions are eligible."""
        if rows.dim() != 3:
            raise ValueError(
                f"router must return logits of shape (B, S, V), got {tuple(rows.shape)}."
            )
        if targets is not None:
            targets = checked_targets(
                targets,
                rows.shape[:2],
                n_classes,
                self.config.ignore_index,
                name="labels",
                shifted=self.shifts_labels(),
            )
            return targets, targets != self.config.ignore_index
        padding = padding_of(model_inputs.get("attention_mask"), rows.shape[:2])
        if padding is None:
            return None, torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        return None, ~padding

    def scores_of(self, scored: Scored, eligible: Tensor, reference_nll: Tensor | None) -> Scores:
        """:meth:`score` of statistics that are there already."""
        statistics = scored.statistics
        difficulty = token_difficulty(statistics, self.config.scoring, reference_nll=reference_nll)
        return Scores(torch.where(eligible, difficulty, 0), eligible, statistics)

    def shifts_labels(self) -> bool:
        """Whether position t predicts label t + 1."""
        if self.shift_labels == "auto":
            return is_causal(unwrapped(self.router))
        return bool(self.shift_labels)
