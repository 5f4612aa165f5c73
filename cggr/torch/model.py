"""A model wrapper whose training step runs the backward pass on what is worth learning from.

Shapes: ``B`` sequences of ``S`` tokens, ``V`` classes; ``C`` sequences kept, or slots of each
sequence for the tokens kept.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn

from cggr.spec import RoutingConfig, Selection
from cggr.spec.config import rule_of_sequences
from cggr.spec.inputs import follows_sequences, map_parts
from cggr.spec.schedule import token_ratio
from cggr.spec.selection import check_eligible, select_at_ratio
from cggr.torch.backward_rows import BackwardRows
from cggr.torch.dispatch import implementation
from cggr.torch.functional import aligned_targets, checked_targets
from cggr.torch.refusal import refusal, sharded_alone
from cggr.torch.router import (
    TruncatedRouter,
    cache_switch,
    call_model,
    is_causal,
    logits_of,
    own_router,
    tensor_parallel_group,
    unwrapped,
)
from cggr.torch.routing import process_rank
from cggr.torch.row_inputs import complaint
from cggr.torch.scorer import CGGRScorer, Scores
from cggr.torch.selected import SelectedRows, every_row, fill_unused, reduce_loss, selected_rows
from cggr.torch.token_split import TokenSplit, compiler_of, runs_as_parts

logger = logging.getLogger(__name__)

SPLITS = ("token", "backward", "sequence")


class CGGRModel(nn.Module):
    """Train a model on the part of every batch that is worth it.

    ``split="token"``: a first pass over everything, without gradient, records every layer's keys
    and values; the configured rule selects tokens inside each sequence, by the model's own loss or
    a router's; a second pass runs those alone, forward and backward, and attends to all. A selected
    token's loss is its dense loss; what unselected tokens offer to attention is constant in the
    gradient. Dropout, where a model has it, is drawn anew in each pass. For transformers' language
    models: :mod:`cggr.torch.token_split`. With a router of the model's own first layers, the first
    pass scores after those, and keeps of the others what the second would compute again: the
    products of the selected tokens are made once. So it does for ``selection="random"``.

    ``split="backward"``: one forward pass of everything, by whose loss, or a router's, tokens are
    selected; the backward pass begins at those, and its linear layers, but for those of keys and
    values, multiply their rows only. What selected tokens send to the keys and values of others
    goes on to the layers below along those tokens' residual streams, and not through their own
    layers. A gradient closer to the dense one than the token split's, whose forward pass runs
    twice; for the memory of a dense step. Under gradient checkpointing by transformers, with
    ``use_reentrant=False``, layers run again for the selected tokens alone (in Gemma, BERT and
    RoBERTa for all); if the model is compiled, its gradients are then to be had by ``backward()``
    of all parameters, and not by ``torch.autograd.grad``. For the same models but Falcon.

    ``split="sequence"``: a router scores every token without gradient, the configured rule selects
    ``ceil(B ratio)`` sequences by their mean difficulty, and forward and backward run on those;
    ``"sequence_aware"`` is ``"topk"`` here, where sequences are kept whole. For any model. Those
    that the token split knows are run by their parts if they are compiled or `capacity` is
    ``"static"``, and there is no hook to be called: the same loss, but without a mask that
    transformers makes needlessly.

    A model that is run by its parts stays as it was, under ``torch.compile(cggr_model)``, at the
    last call outside of it, or of ``train()``: its adapters, its modules, their modes and hooks.

    With ``selection="importance"`` the loss is an unbiased estimate of the dense loss.

    ``selection="topk"``, the default of cggr 0.5.0, trains on another gradient than the dense
    loss's, and lost to random selection by the default score.

    Args:
        model: ``(input_ids, ...) -> logits`` (a tensor, or an output with ``.logits``).
        router: What scores, such as ``create_truncated_router(model)``; the model itself when
            None, which the token split runs anyway, and the sequence split at the price of a full
            forward. In the token split, a router of the model's own layers costs nothing.
        config: The routing options; or give the fields of :class:`RoutingConfig` as keywords. The
            scope is ``"sequence"`` with the token split, whatever a config says.
        split: ``"token"``, ``"backward"``, ``"sequence"``, or ``"auto"``: token where the model
            supports it, else sequence.
        capacity: ``"exact"`` or ``"static"``; see :class:`~cggr.torch.routing.RoutedModule`.
        first_pass: Of the token split: ``"exact"``, or ``"float8"``, in which the model's layers of
            class ``nn.Linear``, of sizes that 16 divides, multiply float8 numbers, rounded to 3
            bits of mantissa: faster where the model is compiled and the GPU has them (Hopper on).
            Scores, and the keys and values of unselected tokens, are then approximate, and so are
            the losses of selected tokens.
        shift_labels: True if position t predicts label t + 1 (causal models), False if label t
            (masked language models), ``"auto"`` to tell by the model's class.
        **options: Fields of :class:`RoutingConfig`.

    Raises:
        ValueError: An option is out of range, or the split cannot be had.

    Example:
        >>> model = nn.Embedding(50, 50)  # any model from ids to logits
        >>> cggr_model = CGGRModel(model, selection="stratified", warmup_steps=0)
        >>> input_ids = torch.arange(40).reshape(8, 5)
        >>> loss = cggr_model(input_ids, labels=input_ids)
        >>> loss.backward()
        >>> cggr_model.step()  # after optimizer.step()
        >>> cggr_model.get_metrics()["tokens_total"]
        32
    """

    def __init__(
        self,
        model: nn.Module,
        router: nn.Module | None = None,
        config: RoutingConfig | None = None,
        *,
        split: str = "auto",
        capacity: str = "exact",
        first_pass: str = "exact",
        shift_labels: bool | str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        if split not in ("auto", *SPLITS):
            known = ", ".join(map(repr, ("auto", *SPLITS)))
            raise ValueError(f"split must be one of {known}, got {split!r}.")
        if split == "token" and options.get("scope") == "batch":
            raise ValueError(
                "scope must be 'sequence' with split='token', which gives every sequence as many "
                "slots; got 'batch'."
            )
        if split == "auto":
            split = _best_split(model, options)
        self.split = split
        if first_pass not in ("exact", "float8"):
            raise ValueError(f"first_pass must be 'exact' or 'float8', got {first_pass!r}.")
        if first_pass == "float8" and split != "token":
            raise ValueError(f"first_pass must be 'exact' with split={split!r}, got 'float8'.")
        self.first_pass = first_pass
        self.model = model
        self._token_split: TokenSplit | None = None
        self._follow_model(capacity)
        self._cache_switch = cache_switch(model)
        self._scores_itself = router is None
        if shift_labels == "auto":  # the model knows; its router may be of another kind
            shift_labels = is_causal(unwrapped(model))
        self.scorer = CGGRScorer(
            _without_parameters_of(model, router),
            config,
            capacity=capacity,
            shift_labels=shift_labels,
            **options,
        )
        placed = next(model.parameters(), None)
        if placed is not None and not placed.is_meta:
            # Now, not at the first forward: DistributedDataParallel sends buffers around by NCCL,
            # which knows GPUs alone.
            self.scorer.follow(placed.device)

        config = self.scorer.config
        if split == "token":
            self._rule = dataclasses.replace(config, scope="sequence")
        elif split == "sequence":
            self._rule = rule_of_sequences(config)
        else:
            self._rule = config
        if self._token_split is not None:
            self._prepare(self._token_split)

    @property
    def config(self) -> RoutingConfig:
        """The routing options."""
        return self.scorer.config

    def train(self, mode: bool = True) -> CGGRModel:
        """Training mode, or eval mode; the token split's copies of the modules follow."""
        super().train(mode)
        if self.split == "sequence":
            self._follow_model(self.scorer.capacity)
        elif self._token_split is not None:
            self._token_split.refresh()
        if self._token_split is not None:
            self._prepare(self._token_split)
        return self

    def _prepare(self, split: TokenSplit) -> None:
        if depth := self._scoring_depth(split):
            split.cut(depth)
        if self.split == "backward" and self.training:
            split.check_backward()

    def step(self) -> None:
        """Advance the schedule; call it after every ``optimizer.step()``."""
        self.scorer.step()

    def set_step(self, step: int) -> None:
        """Go to a step of the schedule: :meth:`RoutedModule.set_step`."""
        self.scorer.set_step(step)

    @property
    def metrics(self) -> dict[str, Any]:
        """Same as :meth:`get_metrics`."""
        return self.scorer.get_metrics()

    def get_metrics(self) -> dict[str, Any]:
        """Numbers of the last training forward: :meth:`RoutedModule.get_metrics`."""
        return self.scorer.get_metrics()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        reference_nll: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **model_inputs: Any,
    ) -> Any:
        """The routed loss of a batch in training mode, its dense loss in eval mode.

        Args:
            input_ids: ``(B, S)`` integers; or `inputs_embeds`.
            labels: ``(B, S)``, Hugging Face style: unshifted for causal models, with
                `ignore_index` where there is nothing to learn. Without labels the model's own
                output is returned.
            attention_mask: ``(B, S)``, 0 on padding, which is neither scored nor trained on; a
                mask of another rank reaches the model and nothing else.
            position_ids: ``(B, S)``, ``(1, S)``, or ``(3, B, S)`` for models that take it so.
            token_type_ids: ``(B, S)``.
            inputs_embeds: ``(B, S, D)``, in place of `input_ids`.
            reference_nll: ``(B, S)``, for ``scoring="excess_loss"``: at each position, the
                reference loss of the target that the position predicts.
            num_items_in_batch: Eligible tokens M of all micro-batches of this optimizer step: the
                loss becomes ``mean n_eligible / M``.
            **model_inputs: Passed to router and model. Sequence split: tensors whose first
                dimension is B, alone or in a dict, list or tuple, are taken to belong to the
                sequences and follow the selection. Token split: no other tensors are taken.

        Returns:
            Scalar loss, float32 (float64 for float64 logits); a zero connected to the graph when
            nothing is eligible. Without labels, the model's output.

        Raises:
            TypeError: Labels are not integers, or the model returned no logits.
            ValueError: Shapes disagree, or, on the CPU in eager mode, a label is out of range
                (elsewhere such a label makes the loss NaN).
        """
        model_inputs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
        }
        if labels is None:
            return call_model(self.model, model_inputs)
        targets = aligned_targets(
            labels,
            attention_mask,
            shift=self.scorer.shifts_labels(),
            ignore_index=self.config.ignore_index,
        )
        eligible = targets != self.config.ignore_index
        split = self._current_split(model_inputs, targets.shape)
        if self.split != "sequence":
            assert split is not None
            if not self.training:
                total, rows = self._every_token_sum(split, model_inputs, targets)
            else:
                if self._synchronises:  # before anything has run or been drawn
                    check_eligible(eligible, self._rule, xp=xp)
                select = self._token_sum if self.split == "token" else self._backward_sum
                total, rows = select(split, model_inputs, targets, eligible, reference_nll)
        elif not self.training:
            total, rows = self._sequence_sum(split, model_inputs, targets, None)
        else:
            kept_inputs, kept_targets, weight_C = self._select_sequences(
                split, model_inputs, targets, eligible, reference_nll
            )
            total, rows = self._sequence_sum(split, kept_inputs, kept_targets, weight_C)
        return reduce_loss(total, rows, eligible.sum(), "mean", num_items_in_batch)

    def _follow_model(self, capacity: str) -> None:
        """Takes over what has been changed in the model, or that it is another one.

        For whole sequences, the token split's dense pass is a cheaper call of the model in compiled
        and captured steps, in which transformers gives attention a mask that costs time.
        """
        split = self._token_split
        if self.split == "sequence":
            is_fast = capacity == "static" or compiler_of(self.model) is not None
            if not (is_fast and runs_as_parts(self.model)):
                self._token_split = None
                return
        if split is None or split.model is not self.model:
            self._token_split = TokenSplit(self.model, float8=self.first_pass == "float8")
        elif self.split == "sequence":
            split.refresh()

    def _current_split(self, model_inputs: dict[str, Any], shape: torch.Size) -> TokenSplit | None:
        """What runs the model on these inputs by its parts; None if the model itself does."""
        if not torch.compiler.is_compiling():
            self._follow_model(self.scorer.capacity)
            runs_parts = self.training or self._token_split is not None
            if runs_parts and (reason := sharded_alone(self.model)) is not None:
                raise ValueError(reason)
        split = self._token_split
        if split is None:
            return None
        if self.split != "sequence":
            if not torch.compiler.is_compiling():
                split.follow()
                if self.split == "backward" and self.training:
                    split.check_backward()
            return split
        fits = split.model is self.model and complaint(model_inputs, shape) is None
        return split if fits else None

    @property
    def _synchronises(self) -> bool:
        return self.scorer.capacity == "exact"

    def _scoring_depth(self, split: TokenSplit) -> int | None:
        """After how many of the model's layers everything is scored; None after all."""
        if self.split == "backward":  # which runs all of them anyway
            return None
        if self._needs_no_score:
            return 0
        router = self.scorer.router
        if self._scores_itself or not isinstance(router, TruncatedRouter) or router.passthrough:
            return None
        own = router.source is unwrapped(self.model) and split.can_be_cut
        if self.split == "sequence":  # which that router can score whatever became of the model
            own = own and (router.num_layers or 0) <= split.n_layers
        return router.num_layers if own else None

    @property
    def _needs_no_score(self) -> bool:
        # The control needs no score, so it does not pay for one.
        return self.config.selection == "random" and not self.config.adaptive

    def _checked(self, split: TokenSplit, targets: Tensor) -> Tensor:
        return checked_targets(
            targets,
            targets.shape,
            split.router.n_classes,
            self.config.ignore_index,
            name="labels",
            shifted=self.scorer.shifts_labels(),
        )

    def _every_token_sum(
        self, split: TokenSplit, model_inputs: dict[str, Any], targets: Tensor
    ) -> tuple[Tensor, SelectedRows]:
        """``Σ nll`` over all tokens."""
        hidden = split.hidden(model_inputs, targets.shape, synchronise=self._synchronises)
        return self._sum_of_all(split, hidden, self._checked(split, targets))

    def _sum_of_all(
        self, split: TokenSplit, hidden: Tensor, targets: Tensor
    ) -> tuple[Tensor, SelectedRows]:
        ignore_index = self.config.ignore_index
        rows = every_row(targets, split.router.n_classes, ignore_index)
        return split.loss_sum(hidden, rows, ignore_index), rows

    def _token_sum(
        self,
        split: TokenSplit,
        model_inputs: dict[str, Any],
        targets: Tensor,
        eligible: Tensor,
        reference_nll: Tensor | None,
    ) -> tuple[Tensor, SelectedRows]:
        """``Σ w nll`` over the tokens to train on."""
        scorer, config = self.scorer, self.config
        recorded, hidden, synchronise = None, None, self._synchronises
        depth = self._scoring_depth(split)
        if config.selects_all:  # one dense pass does
            hidden = split.hidden(model_inputs, targets.shape, synchronise=synchronise)
        else:
            recorded = split.record(
                model_inputs, targets.shape, synchronise=synchronise, depth=depth
            )
        targets = self._checked(split, targets)
        if recorded is None:
            ran = hidden if self._scores_itself else None
        else:
            ran = recorded.hidden_BSD if self._scores_itself or depth is not None else None
        difficulty, scored = self._score(targets, reference_nll, model_inputs, ran)
        ratio, select = self._next_selection(scored, eligible)
        if recorded is None:
            assert hidden is not None
            total, rows = self._sum_of_all(split, hidden, targets)
        else:
            capacity = scorer.slots(targets.shape[0], targets.shape[1], self._rule)
            selection, index_BC = _filled(select(difficulty, eligible, capacity), targets.shape[1])
            rows = selected_rows(
                selection,
                targets,
                split.router.n_classes,
                config.ignore_index,
                weighted=config.selection == "importance",
                padded=False,
            )._replace(index_R=None)
            if depth is not None:
                split.finish(recorded, depth, index_BC)
            hidden = split.rows(recorded, index_BC, selection.indices == targets.shape[1])
            total = split.loss_sum(hidden, rows, config.ignore_index)
        scorer.record(ratio=ratio, tokens_selected=rows.n_selected, eligible=eligible, **scored)
        return total, rows

    def _backward_sum(
        self,
        split: TokenSplit,
        model_inputs: dict[str, Any],
        targets: Tensor,
        eligible: Tensor,
        reference_nll: Tensor | None,
    ) -> tuple[Tensor, SelectedRows]:
        """``Σ w nll`` over the tokens to train on, of a forward pass of all."""
        scorer, config, (batch, length) = self.scorer, self.config, targets.shape
        chosen, capacity = None, scorer.most_slots(batch, length)
        if not scorer.selects_all:
            groups = 1 if config.scope == "batch" else batch
            chosen = BackwardRows.of_size(groups * capacity, batch * length, targets.device)
        hidden = split.hidden(
            model_inputs,
            targets.shape,
            synchronise=self._synchronises,
            backward_rows=chosen,
        )
        targets = self._checked(split, targets)
        statistics, loss_sum = split.scored_loss(
            hidden,
            targets,
            config.ignore_index,
            scores=self._scores_itself and not self._needs_no_score,
        )
        if statistics is not None:
            difficulty, scored = _parts(scorer.scores_of(statistics, eligible, reference_nll))
        else:
            difficulty, scored = self._score(targets, reference_nll, model_inputs)
        ratio, select = self._next_selection(scored, eligible)
        if chosen is None:
            rows = every_row(targets, split.router.n_classes, config.ignore_index)
        else:
            selection = select(difficulty, eligible, capacity)
            chosen.choose(selection.mask.flatten())
            rows = selected_rows(
                selection,
                targets,
                split.router.n_classes,
                config.ignore_index,
                weighted=config.selection == "importance",
                padded=True,
            )
        scorer.record(ratio=ratio, tokens_selected=rows.n_selected, eligible=eligible, **scored)
        return loss_sum(rows), rows

    def _select_sequences(
        self,
        split: TokenSplit | None,
        model_inputs: dict[str, Any],
        targets: Tensor,
        eligible: Tensor,
        reference_nll: Tensor | None,
    ) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """Inputs, targets and weights of the sequences to train on."""
        hidden = None
        if split is not None and not self._needs_no_score:
            depth = self._scoring_depth(split)
            if self._scores_itself or depth is not None:
                hidden = split.judged(
                    model_inputs, targets.shape, synchronise=self._synchronises, depth=depth
                )
        difficulty, scored = self._score(targets, reference_nll, model_inputs, hidden)
        mean_difficulty_B = difficulty.sum(dim=1) / eligible.sum(dim=1).clamp(min=1)
        config, scorer, batch = self.config, self.scorer, targets.shape[0]
        ratio, select = self._next_selection(scored, eligible)
        weight_C = None
        if not scorer.selects_all:
            capacity = scorer.slots(1, batch, self._rule)
            selection = select(mean_difficulty_B, eligible.any(dim=1), capacity)
            index_C, selected_weight_C = selection.indices.long(), selection.weights
            if index_C.shape[0] == 0:  # nothing eligible: one unused slot keeps the graph connected
                index_C = index_C.new_full((1,), batch)
                selected_weight_C = selected_weight_C.new_zeros(1)
            unused_C = index_C == batch
            index_C = fill_unused(index_C, unused_C, batch)
            model_inputs = _take_sequences(model_inputs, index_C, targets.shape)
            targets = targets.index_select(0, index_C)
            targets = targets.masked_fill(unused_C[:, None], config.ignore_index)
            if config.selection == "importance":
                weight_C = selected_weight_C
        count = (targets != config.ignore_index).sum(dtype=torch.int32)
        scorer.record(ratio=ratio, tokens_selected=count, eligible=eligible, **scored)
        return model_inputs, targets, weight_C

    def _next_selection(
        self, scored: dict[str, Tensor], eligible: Tensor
    ) -> tuple[Tensor, Callable[[Tensor, Tensor, int | None], Selection]]:
        """The ratio of this forward, and what selects at it.

        That takes difficulties, which of them are eligible, and a capacity.
        """
        scorer = self.scorer
        scorer.follow(eligible.device)
        draw, step = scorer.next_draw(), scorer.step_count.reshape(1)
        ratio = token_ratio(self.config, step, scored.get("confidence"), eligible, xp=xp)
        rank = process_rank(tensor_parallel_group(self.model))

        def select(difficulty: Tensor, eligible: Tensor, capacity: int | None) -> Selection:
            with torch.no_grad():
                return select_at_ratio(
                    difficulty,
                    self._rule,
                    ratio,
                    draw=draw,
                    rank=rank,
                    eligible=eligible,
                    capacity=capacity,
                    xp=xp,
                )

        return ratio, select

    def _score(
        self,
        targets: Tensor,
        reference_nll: Tensor | None,
        model_inputs: dict[str, Any],
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Difficulty of every token, and the ``(B, S)`` scores for the metrics.

        `hidden` are the router's final hidden states, where it has been run already.
        """
        if self._needs_no_score:
            return torch.zeros(targets.shape, device=targets.device), {}
        router = self.scorer.router
        if self._scores_itself and self._token_split is not None:
            router = self._token_split.router  # of the model as it is now
        elif self._scores_itself and unwrapped(router) is not unwrapped(self.model):
            self.scorer.router = router = own_router(self.model)  # it was replaced
        if hidden is not None and isinstance(router, TruncatedRouter):
            scores = self.scorer.score_hidden(
                router, hidden.detach(), targets, reference_nll, model_inputs
            )
        else:
            scores = self.scorer.score(targets, reference_nll=reference_nll, **model_inputs)
        return _parts(scores)

    def _sequence_sum(
        self,
        split: TokenSplit | None,
        model_inputs: dict[str, Any],
        targets: Tensor,
        weight_C: Tensor | None,
    ) -> tuple[Tensor, SelectedRows]:
        """``Σ w nll`` of the model on these sequences."""
        if split is None:
            logits = logits_of(call_model(self.model, self._cache_switch | model_inputs))
        else:
            hidden = split.hidden(model_inputs, targets.shape, synchronise=self._synchronises)
            logits = split.logits(hidden)
        n_classes, ignore_index = logits.shape[-1], self.config.ignore_index
        targets = checked_targets(
            targets,
            logits.shape[:-1],
            n_classes,
            ignore_index,
            name="labels of the selected sequences" if self.training else "labels",
            shifted=self.scorer.shifts_labels(),
        )
        rows = every_row(targets, n_classes, ignore_index)
        if weight_C is not None:
            rows = rows._replace(weight_R=weight_C.repeat_interleave(targets.shape[1]))
        logits_NV = logits.reshape(-1, n_classes)
        total = implementation(logits).cross_entropy_sum(logits_NV, rows, ignore_index, None)
        return total, rows


def _parts(scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
    """Difficulty of every token, and the ``(B, S)`` scores for the metrics."""
    return scores.difficulty, {
        "confidence": scores.statistics.confidence,
        "entropy": scores.statistics.entropy,
        "difficulty": scores.difficulty,
    }


def _best_split(model: nn.Module, options: dict[str, Any]) -> str:
    """``"token"`` where it can be had; the log says which it is and why."""
    reason = refusal(model)
    if reason is None and options.get("scope") == "batch":
        reason = "scope='batch' ranks tokens of different sequences against each other."
    if reason is None:
        logger.info("split='auto': training on tokens (split='token').")
        return "token"
    logger.info("split='auto': training on whole sequences (split='sequence'): %s", reason)
    return "sequence"


def _filled(selection: Selection, length: int) -> tuple[Selection, Tensor]:
    """A selection in each sequence, and the positions ``(B, C)`` to run, no two alike in a row.

    An unused slot takes a position that is not selected, so that what it writes is what is there.
    One slot at least, which keeps the graph connected where nothing is eligible.
    """
    if selection.indices.shape[1] == 0:
        empty_B1 = selection.indices.new_full((selection.indices.shape[0], 1), length)
        selection = selection._replace(indices=empty_B1, weights=empty_B1.float() * 0)
    # In the order of the selection's own slots, then the others.
    order_BS = (~selection.mask).to(torch.int32).argsort(dim=1, stable=True)
    return selection, order_BS[:, : selection.indices.shape[1]]


def _without_parameters_of(model: nn.Module, router: nn.Module | None) -> nn.Module:
    """The router, hidden from the module tree if it shares parameters with the model.

    Registered twice, they would be saved and optimised twice.
    """
    if router is None:
        return own_router(model)
    owned = {id(parameter) for parameter in model.parameters()}
    shared = [id(parameter) in owned for parameter in router.parameters()]
    if not any(shared):
        return router
    if not all(shared):
        raise ValueError(
            f"router must share all of its parameters with the model or none, got "
            f"{type(router).__name__}, which shares {sum(shared)} of {len(shared)}: those of its "
            f"own would be neither saved nor moved."
        )
    return TruncatedRouter(router, architecture="passthrough")


def _take_sequences(inputs: dict[str, Any], index: Tensor, shape: Any) -> dict[str, Any]:
    """The inputs of the selected sequences of a ``(B, S)`` batch."""

    def take(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name == "cache_position":
            return value
        if name == "position_ids" and value.dim() == 3:
            return value.index_select(1, index)
        follows = follows_sequences(name, tuple(value.shape), *shape)
        return value.index_select(0, index) if follows else value

    return {name: map_parts(functools.partial(take, name), value) for name, value in inputs.items()}
