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

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from cggr.jax import dispatch
from cggr.jax.attention import at_positions, missing_for_rows, record_pass, row_pass
from cggr.jax.backward_rows import (
    BackwardRows,
    linears_of_rows,
    loss_of_chosen,
    set_backward_rows,
)
from cggr.jax.functional import (
    aligned_targets,
    checked_logits,
    checked_targets,
    select_at_ratio,
    selection_options,
    token_ratio,
)
from cggr.jax.router import TruncatedRouter, logits_of
from cggr.jax.routing import RoutedModule, selection_metrics
from cggr.jax.scorer import Scores, checked_module, checked_shift, score, with_mask
from cggr.jax.selected import SelectedRows, every_row, reduce_loss, selected_rows
from cggr.spec import RoutingConfig, Selection
from cggr.spec.config import rule_of_sequences
from cggr.spec.inputs import follows_sequences, map_parts
from cggr.spec.schedule import ONE

logger = logging.getLogger(__name__)

SPLITS = ("auto", "token", "backward", "sequence")


class CGGRModel(RoutedModule):
    """Train a model on the part of every batch that is worth it.

    ``split="token"``: a first pass over everything, without gradient and dropout, keeps every
    layer's keys and values; the configured rule selects tokens inside each sequence; a second pass
    runs those alone, forward and backward, and attends to all. A selected token's loss is its dense
    loss; what unselected tokens offer to attention is constant in the gradient. The model must
    attend through :class:`~cggr.jax.RowAttention`, one for each layer, and take ``positions``.

    ``split="backward"``: one forward pass, as a dense step makes it; the rule selects tokens; the
    model's ``nnx.Linear`` and ``nnx.LinearGeneral`` multiply in the backward pass the selected rows
    alone. Those of keys and values are the exception: what a selected token read from others goes
    to their keys and values, and from there down their residual streams. A selected token's loss is
    its dense loss, a step costs ``(1 + 2 ratio) / 3`` of a dense one's products, and those of keys,
    values and attention, and its memory is a dense step's.

    ``split="sequence"``: a router scores every token without gradient, the configured rule selects
    ``ceil(B ratio)`` sequences by their mean difficulty, and forward and backward run on those;
    ``"sequence_aware"`` is ``"topk"`` here, where sequences are kept whole.

    With ``selection="importance"`` the loss is an unbiased estimate of the dense loss.

    ``selection="topk"``, the default of cggr 0.5.0, trains on another gradient than the dense
    loss's, and lost to random selection by the default score.

    Args:
        model: An nnx module ``(input_ids, ...) -> logits`` (an array, a tuple that starts with
            them, or an output with ``.logits``).
        router: What scores, such as ``create_truncated_router(model)``; the model itself when
            None, which the token split runs anyway, and the sequence split at the price of a full
            forward. It scores without gradient and dropout. One with
            parameters of its own is no business of the optimizer, whose weight decay would shrink
            them: ``wrt=nnx.All(nnx.Param, nnx.PathContains("model"))``.
        config: The routing options; or give the fields of :class:`RoutingConfig` as keywords. The
            scope is ``"sequence"`` with the token split, whatever a config says.
        split: ``"token"``, ``"backward"``, ``"sequence"``, or ``"auto"``: token where the model
            supports it, else sequence.
        shift_labels: True if position t predicts label t + 1 (causal models), False if label t
            (masked language models).
        sharding: Sharding of the selected sequences ``(C, S)`` under jit on a mesh of several
            devices, such as that of the batch. The sequence split gathers from all of them; without
            this the compiler may compute the selected sequences on each. The token split moves
            nothing between devices and needs none.
        **options: Fields of :class:`RoutingConfig`.

    Raises:
        TypeError: The model or the router is no nnx module.
        ValueError: An option is out of range, or the split cannot be had; it says why.

    Example:
        >>> model = nnx.Embed(50, 50, rngs=nnx.Rngs(0))  # any model from ids to logits
        >>> cggr_model = CGGRModel(model, selection="stratified", warmup_steps=0)
        >>> input_ids = jnp.arange(40).reshape(8, 5)
        >>> def loss_fn(cggr_model):
        ...     return cggr_model(input_ids, labels=input_ids)
        >>> loss, gradient = nnx.value_and_grad(loss_fn)(cggr_model)
        >>> cggr_model.step()  # after optimizer.update(), outside jit
        >>> cggr_model.get_metrics()["tokens_total"]
        32
    """

    def __init__(
        self,
        model: nnx.Module,
        router: nnx.Module | None = None,
        config: RoutingConfig | None = None,
        *,
        split: str = "auto",
        shift_labels: bool = True,
        sharding: jax.sharding.Sharding | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}.")
        self.model = checked_module("model", model)
        self.split = _possible_split(split, model, options)
        if self.split == "token":
            self.config = dataclasses.replace(self.config, scope="sequence")
        self.shift_labels = checked_shift(shift_labels)
        self.sharding = sharding
        # A router cut from the model is kept as the way to cut it, so that the model is here once.
        self.truncation = None
        if isinstance(router, TruncatedRouter) and router.source is model:
            self.truncation, router = router.truncation, None
        self.router = None if router is None else _checked_router(model, router)
        rule = rule_of_sequences(self.config) if self.split == "sequence" else self.config
        self._rule = selection_options(rule)

    def _scores(self) -> bool:
        """Whether anything is scored: the random control needs no score and pays for none."""
        return self.config.selection != "random" or self.config.adaptive

    def __call__(
        self,
        input_ids: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        attention_mask: ArrayLike | None = None,
        rank: int | Array = 0,
        reference_nll: ArrayLike | None = None,
        num_items_in_batch: int | Array | None = None,
        **model_inputs: Any,
    ) -> Any:
        """The routed loss of a batch, its dense loss after ``eval()``.

        Args:
            input_ids: ``(B, S)`` integers.
            labels: ``(B, S)``, Hugging Face style: unshifted for causal models, with
                `ignore_index` where there is nothing to learn. Without labels the model's own
                output is returned.
            attention_mask: ``(B, S)``, 0 on padding, which is neither scored nor trained on; a
                mask of another rank reaches the model and nothing else.
            rank: Number of the shard inside shard_map, ``jax.lax.axis_index("data")``.
            reference_nll: ``(B, S)``, for ``scoring="excess_loss"``: at each position, the
                reference loss of the target that the position predicts.
            num_items_in_batch: Eligible tokens M of all micro-batches of this optimizer step: the
                loss becomes ``mean n_eligible / M``.
            **model_inputs: Passed to router and model, None included (positions, cache, ...).
                Sequence split: arrays whose first dimension is B, alone or in a dict, list or
                tuple, are taken to belong to the sequences and follow the selection; raw PRNG keys
                are not. Token split: ``(B, S, ...)`` and ``(1, S, ...)`` follow the selected
                positions, masks ``(B, 1, S, S)`` twice; `positions` are 0, 1, ... where none are
                given.

        Returns:
            Scalar loss, float32 (float64 for float64 logits); 0 when nothing is eligible. Without
            labels, the model's output.

        Raises:
            TypeError: Labels are not integers, or the model returned no logits.
            ValueError: Shapes disagree, or, on the CPU outside jit, a label is out of range
                (elsewhere such a label makes the loss NaN); with the token split, an input may or
                may not belong to the positions.
        """
        model_inputs = with_mask(model_inputs, attention_mask)
        if labels is None:
            return self.model(input_ids, **model_inputs)
        targets = aligned_targets(
            labels, attention_mask, shift=self.shift_labels, ignore_index=self.config.ignore_index
        )
        eligible = targets != self.config.ignore_index
        n_eligible = jnp.sum(eligible, dtype=jnp.int32)
        inputs = model_inputs | {"input_ids": jnp.asarray(input_ids)}
        if self.deterministic:
            if self.split == "token":
                inputs = _with_positions(inputs, targets.shape)
            total, rows = self._loss_sum(inputs, targets, None, "labels")
        elif self.split != "sequence":
            if self.config.selects_all:  # one dense pass does
                total, rows = self._every_token_sum(inputs, targets, eligible, reference_nll)
            else:
                loss_sum = (
                    self._token_loss_sum if self.split == "token" else self._backward_loss_sum
                )
                total, rows = loss_sum(inputs, targets, eligible, rank, reference_nll)
        else:
            inputs, targets, weight_C = self._select(inputs, targets, eligible, rank, reference_nll)
            total, rows = self._loss_sum(
                inputs, targets, weight_C, "labels of the selected sequences"
            )
        return reduce_loss(total, rows, n_eligible, "mean", num_items_in_batch)[0]

    def _select(
        self,
        inputs: dict[str, Any],
        targets: Array,
        eligible: Array,
        rank: int | Array,
        reference_nll: ArrayLike | None,
    ) -> tuple[dict[str, Any], Array, Array | None]:
        """Inputs, targets and weights of the sequences to train on."""
        config, shape = self.config, targets.shape
        scores = self._score(inputs, targets, reference_nll) if self._scores() else None
        mean_difficulty_B = jnp.zeros_like(targets, shape=shape[:1], dtype=jnp.float32)
        if scores is not None:
            length_B = jnp.maximum(jnp.sum(eligible, axis=1), 1)
            mean_difficulty_B = jnp.sum(scores.difficulty, axis=1) / length_B
        scored = _scored(scores)
        step = self.step_count[...].reshape(1)
        ratio = token_ratio(self._rule, step, scored.get("confidence"), eligible)
        selection = select_at_ratio(
            mean_difficulty_B,
            self._rule,
            ratio,
            draw=self._next_draw(),
            rank=rank,
            eligible=jnp.any(eligible, axis=1),
            capacity=self._sequences(*shape),
        )
        # Unused slots repeat the last sequence, with nothing in it to learn.
        index_C, weight_C = selection.indices, selection.weights

        def take(name: str, x: Any) -> Any:
            return self._take(x, index_C) if _follows(name, x, shape) else x

        inputs = {
            name: map_parts(functools.partial(take, name), value) for name, value in inputs.items()
        }
        targets = self._take(targets, index_C)
        targets = jnp.where(index_C[:, None] < shape[0], targets, config.ignore_index)
        self._record(
            selection_metrics(
                step=step,
                ratio=ratio,
                tokens_selected=jnp.sum(targets != config.ignore_index, dtype=jnp.int32),
                eligible=eligible,
                **scored,
            )
        )
        return inputs, targets, weight_C if config.selection == "importance" else None

    def _sequences(self, batch: int, length: int) -> int:
        """Capacity in sequences; with a sharding, a multiple of its shards."""
        capacity = self._slots((batch,), self._rule)
        if self.sharding is None:
            return capacity
        shards = batch // self.sharding.shard_shape((batch, length))[0]
        return min(-(-capacity // shards) * shards, batch)

    def _score(
        self, inputs: dict[str, Any], targets: Array, reference_nll: ArrayLike | None
    ) -> Scores:
        """What the router says of every token; the model, where there is none."""
        router = self.model if self.router is None else self.router
        if self.truncation is not None:
            router = self.truncation(self.model)
        return self._score_by(router, inputs, targets, reference_nll)

    def _score_by(
        self,
        router: nnx.Module,
        inputs: dict[str, Any],
        targets: Array,
        reference_nll: ArrayLike | None,
    ) -> Scores:
        inputs = dict(inputs)
        return score(
            router,
            targets,
            self.config,
            inputs.pop("input_ids"),
            inputs,
            reference_nll=reference_nll,
            shifted=self.shift_labels,
        )

    def _has_router(self) -> bool:
        return self.router is not None or self.truncation is not None

    def _scores_of(
        self,
        logits: Array,
        inputs: dict[str, Any],
        targets: Array,
        reference_nll: ArrayLike | None,
    ) -> Scores | None:
        """Of tokens that have their logits already; None if nothing is scored."""
        if not self._scores():
            return None
        if self._has_router():
            return self._score(inputs, targets, reference_nll)
        answer = _Answer(jax.lax.stop_gradient(logits))
        return self._score_by(answer, inputs, targets, reference_nll)

    def _select_tokens(
        self, scores: Scores | None, eligible: Array, *, step: Array, draw: Array, rank: int | Array
    ) -> tuple[Selection, dict[str, Array]]:
        """The tokens to train on, and what there is to say of them."""
        scored = _scored(scores)
        ratio = token_ratio(self._rule, step, scored.get("confidence"), eligible)
        selection = select_at_ratio(
            jnp.zeros_like(eligible, dtype=jnp.float32) if scores is None else scores.difficulty,
            self._rule,
            ratio,
            draw=draw,
            rank=rank,
            eligible=eligible,
            capacity=self._slots(eligible.shape, self._rule),
        )
        n_selected = jnp.sum(selection.count, dtype=jnp.int32)
        return selection, selection_metrics(
            step=step, ratio=ratio, tokens_selected=n_selected, eligible=eligible, **scored
        )

    def _checked_labels(self, targets: Array, logits: Array, name: str = "labels") -> Array:
        return checked_targets(
            targets,
            logits.shape[:-1],
            logits.shape[-1],
            self.config.ignore_index,
            name=name,
            shifted=self.shift_labels,
        )

    def _every_token_sum(
        self,
        inputs: dict[str, Any],
        targets: Array,
        eligible: Array,
        reference_nll: ArrayLike | None,
    ) -> tuple[Array, SelectedRows]:
        """``Σ nll`` over all tokens, in a training step."""
        located = dict(inputs)
        if self.split == "token":
            located = _with_positions(inputs, targets.shape)
        logits = checked_logits(logits_of(self.model(located.pop("input_ids"), **located)))
        scores = self._scores_of(logits, inputs, targets, reference_nll)
        targets = self._checked_labels(targets, logits)
        rows = every_row(targets, self.config.ignore_index)
        self._next_draw()
        self._record(
            selection_metrics(
                step=self.step_count[...].reshape(1),
                ratio=jnp.full((1,), ONE, jnp.int32),
                tokens_selected=rows.n_selected,
                eligible=eligible,
                **_scored(scores),
            )
        )
        logits_RV = rows.take(logits)
        return dispatch.weighted_nll_sum(logits_RV, rows.label_R, rows.weight_R), rows

    def _token_loss_sum(
        self,
        inputs: dict[str, Any],
        targets: Array,
        eligible: Array,
        rank: int | Array,
        reference_nll: ArrayLike | None,
    ) -> tuple[Array, SelectedRows]:
        """``Σ w nll`` of the selected tokens, by the two passes of the token split."""
        config, length = self.config, targets.shape[1]
        located = _with_positions(inputs, targets.shape)
        ids = located.pop("input_ids")
        output, records = record_pass(self.model, ids, **located)
        logits = checked_logits(logits_of(output))
        if logits.ndim != 3:
            raise ValueError(f"model must return logits of shape (B, S, V), got {logits.shape}.")
        n_classes = logits.shape[2]
        targets = self._checked_labels(targets, logits)
        selection, metrics = self._select_tokens(
            self._scores_of(logits, inputs, targets, reference_nll),
            eligible,
            step=self.step_count[...].reshape(1),
            draw=self._next_draw(),
            rank=rank,
        )
        index_BC = selection.indices
        self._record(metrics)

        def take(name: str, x: Any) -> Any:
            return at_positions(name, x, index_BC, length)

        ids, located = (
            take("input_ids", ids),
            {
                name: map_parts(functools.partial(take, name), value)
                for name, value in located.items()
            },
        )
        with row_pass(self.model, records, index_BC):
            logits = checked_logits(logits_of(self.model(ids, **located)))
        if logits.shape != (*index_BC.shape, n_classes):
            raise ValueError(
                f"model must return logits of shape (B, C, V) for input_ids (B, C), got "
                f"{logits.shape} for {index_BC.shape}."
            )
        target_BC = jnp.take_along_axis(targets, index_BC, axis=1, mode="clip")
        target_BC = jnp.where(index_BC < length, target_BC, config.ignore_index)
        rows = SelectedRows(
            None,
            target_BC.reshape(-1),
            selection.weights.reshape(-1),
            metrics["tokens_selected"],
            weighted=config.selection == "importance",
        )
        logits_RV = rows.take(logits)
        return dispatch.weighted_nll_sum(logits_RV, rows.label_R, rows.weight_R), rows

    def _backward_loss_sum(
        self,
        inputs: dict[str, Any],
        targets: Array,
        eligible: Array,
        rank: int | Array,
        reference_nll: ArrayLike | None,
    ) -> tuple[Array, SelectedRows]:
        """``Σ w nll`` of the selected tokens, whose rows the backward pass is of."""
        config, shape = self.config, targets.shape
        definition, state = nnx.split(self.model)
        arrays, with_arrays = _arrays_of(inputs)
        scores = None
        if self._scores() and self._has_router():  # outside, as the router is no argument of it
            scores = self._score(inputs, targets, reference_nll)
        size = shape[1] if config.scope == "sequence" else targets.size
        capacity = self._slots(shape, self._rule)

        def run(state: Any, arrays: Any, rows: BackwardRows) -> tuple[Array, Any]:
            model = nnx.merge(definition, state, copy=True)
            has_rows = set_backward_rows(model, rows, (shape[0], shape[1]))
            located = with_arrays(arrays)
            logits = checked_logits(logits_of(model(located.pop("input_ids"), **located)))
            if not has_rows():
                raise ValueError(
                    f"split='backward' cannot be had: no linear layer of the model is given the "
                    f"batch's rows, ({shape[0]}, {shape[1]}, ...) or ({targets.size}, ...)."
                )
            return logits, nnx.state(model, nnx.Not(nnx.Param))

        def choose(arrays: Any, given: Any, logits: Array) -> tuple[BackwardRows, Any, Any]:
            targets, eligible, scores, reference_nll, step, draw, rank = given
            targets = self._checked_labels(targets, logits)
            if scores is None:
                scores = self._scores_of(logits, with_arrays(arrays), targets, reference_nll)
            selection, metrics = self._select_tokens(
                scores, eligible, step=step, draw=draw, rank=rank
            )
            rows = selected_rows(selection, targets, config)

            def loss_sum(logits: Array) -> Array:
                return dispatch.weighted_nll_sum(rows.take(logits), rows.label_R, rows.weight_R)

            return BackwardRows.chosen(selection.indices, size), loss_sum, (rows, metrics)

        step = self.step_count[...].reshape(1)
        given = (targets, eligible, scores, reference_nll, step, self._next_draw(), rank)
        total, others, (rows, metrics) = loss_of_chosen(
            run, choose, state, arrays, given, (targets.size // size, capacity)
        )
        nnx.update(self.model, others)
        self._record(metrics)
        # A flag of the host's, which a derivative of one's own turns into an array.
        return total, rows._replace(weighted=config.selection == "importance")

    def _take(self, x: Array, index_C: Array) -> Array:
        taken = jnp.take(x, index_C, axis=0, mode="clip")
        sharding = self.sharding
        if sharding is None:
            return taken
        if isinstance(sharding, NamedSharding):
            spec = PartitionSpec(*sharding.spec[: taken.ndim])
            sharding = NamedSharding(sharding.mesh, spec)
        return jax.lax.with_sharding_constraint(taken, sharding)

    def _loss_sum(
        self, inputs: dict[str, Any], targets: Array, weight_C: Array | None, name: str
    ) -> tuple[Array, SelectedRows]:
        """``Σ w nll`` of the model on these sequences."""
        inputs = dict(inputs)
        logits = checked_logits(logits_of(self.model(inputs.pop("input_ids"), **inputs)))
        targets = self._checked_labels(targets, logits, name)
        rows = every_row(targets, self.config.ignore_index)
        if weight_C is not None:
            weight_R = rows.weight_R * jnp.repeat(weight_C, targets.shape[1])
            rows = rows._replace(weight_R=weight_R, weighted=True)
        logits_RV = rows.take(logits)
        return dispatch.weighted_nll_sum(logits_RV, rows.label_R, rows.weight_R), rows


def _arrays_of(inputs: dict[str, Any]) -> tuple[list[Any], Callable[[list[Any]], dict[str, Any]]]:
    """The arrays among the inputs, and what puts such into their places."""
    for name, value in inputs.items():
        if any(isinstance(x, nnx.Variable | nnx.Rngs) for _, x in nnx.iter_graph(value)):
            raise ValueError(
                f"split='backward' takes arrays as inputs, and {name} holds an nnx.Variable, which "
                f"a forward pass may change: give it to the layers that use it when they are made."
            )
    leaves, tree = jax.tree.flatten(inputs)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Array | np.ndarray)]

    def with_arrays(arrays: list[Any]) -> dict[str, Any]:
        placed = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            placed[i] = x
        found: dict[str, Any] = jax.tree.unflatten(tree, placed)
        return found

    return [leaves[i] for i in places], with_arrays


class _Answer(nnx.Module):
    """A router that has answered already."""

    def __init__(self, logits: Array) -> None:
        self.logits = nnx.Variable(logits)

    def __call__(self, input_ids: Array, **model_inputs: Any) -> Array:
        return self.logits[...]


def _possible_split(split: str, model: nnx.Module, options: dict[str, Any]) -> str:
    """The split that the model and the options allow; refused if another was asked for."""
    if split == "sequence":
        return split
    if split == "backward":
        _, missing = linears_of_rows(model)
        if missing is not None:
            raise ValueError(f"split='backward' cannot be had: {missing}.")
        return split
    missing = missing_for_rows(model)
    if options.get("scope") == "batch":
        missing = "scope='batch' ranks over the whole batch; it must be 'sequence', or left out"
    if missing is None:
        if split == "auto":
            logger.info("split='auto': training on selected tokens (split='token').")
        return "token"
    if split == "token":
        raise ValueError(f"split='token' cannot be had: {missing}.")
    logger.info("split='auto': training on whole sequences (split='sequence'), since %s.", missing)
    return "sequence"


def _with_positions(inputs: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The inputs with positions in all passes: what a model takes for none may differ."""
    if inputs.get("positions") is not None:
        return dict(inputs)
    position_BS = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return inputs | {"positions": position_BS}


def _scored(scores: Scores | None) -> dict[str, Array]:
    """What there are averages of, each ``(B, S)``."""
    if scores is None:
        return {}
    return {
        "confidence": scores.statistics.confidence,
        "entropy": scores.statistics.entropy,
        "difficulty": scores.difficulty,
    }


def _checked_router(model: nnx.Module, router: Any) -> nnx.Module:
    checked_module("router", router)
    owned = _parameters(model)
    shared = [variable in owned for variable in _parameters(router)]
    if any(shared) and not all(shared):
        raise ValueError(
            f"router must share all of its parameters with the model or none, got "
            f"{type(router).__name__}, which shares {sum(shared)} of {len(shared)}: the others "
            f"would get a gradient of 0, and the optimizer's weight decay."
        )
    return router


def _parameters(module: nnx.Module) -> set[int]:
    return {id(x) for _, x in nnx.iter_graph(module) if isinstance(x, nnx.Param)}


def _follows(name: str, x: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array among the model's inputs belongs to the sequences of the batch."""
    if not isinstance(x, (Array, np.ndarray)):
        return False
    if x.ndim == 1 and x.dtype == jnp.uint32:  # a raw PRNG key
        return False
    return follows_sequences(name, x.shape, *shape)
