"""Routed training in Hugging Face's Trainer, and in trainers derived from it, such as TRL's.

The trainer keeps the plain model: what it saves, evaluates, generates with, wraps for many devices
and compiles is that, and only the forward of a training step is routed. The schedule follows the
trainer's own count of steps, so that a resumed run has the same masks with nothing more to save.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from cggr.spec import RoutingConfig
from cggr.torch.functional import aligned_targets
from cggr.torch.model import CGGRModel
from cggr.torch.router import create_truncated_router, wrappings

REFERENCE = "reference_nll"  # a column of the data set, for scoring="excess_loss"
_IGNORED = -100  # of labels, in all of transformers
# What the progress bar has room for.
_ON_THE_BAR = {"token_ratio": "ratio", "avg_confidence": "confidence", "avg_entropy": "entropy"}


class CGGRTrainer(Trainer):
    """:class:`transformers.Trainer`, whose training steps learn from what is worth it.

    In training mode the loss is that of :class:`~cggr.torch.CGGRModel` around the trainer's model;
    all else is the trainer's. Its logs have, besides its own entries, the means since the last log
    of the metrics of :meth:`CGGRModel.get_metrics`, over this process's batches (``token_ratio``,
    ``tokens_selected`` and ``tokens_total`` of an optimizer step, ``avg_confidence``,
    ``avg_entropy``, ``avg_difficulty``), and ``step_seconds``.

    Trainers derived from Trainer, such as TRL's SFTTrainer: :func:`with_cggr`.

    Args:
        *args: Of the trainer.
        routing: :class:`RoutingConfig`, or a mapping of the keywords of
            :class:`~cggr.torch.CGGRModel`, of which ``router`` may also be how many of the model's
            first layers score. ``capacity`` is ``"static"`` by default where the trainer compiles
            the model.
        **kwargs: Of the trainer.

    Attributes:
        cggr_model: The :class:`~cggr.torch.CGGRModel`.

    Raises:
        TypeError: `routing` is neither.
        ValueError: An option is out of range, the split cannot be had, or the trainer is asked for
            what a routed step cannot do.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2))
        >>> data = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))}
        ...         for i in range(16)]
        >>> args = TrainingArguments(output_dir=getfixture("tmp_path"), max_steps=3, report_to=[],
        ...                          disable_tqdm=True, use_cpu=True, logging_strategy="no")
        >>> trainer = CGGRTrainer(model, args, train_dataset=data,
        ...                       routing={"selection": "importance", "split": "token"})
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {...
        3
        >>> trainer.cggr_model.get_metrics()["step"]
        2
    """

    cggr_model: CGGRModel
    # Of the steps since the last log: sums of metrics, forwards, steps, seconds.
    _totals: Tensor | None
    _n_forwards: int
    _n_steps: int
    _seconds: float

    def __init__(
        self,
        *args: Any,
        routing: RoutingConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if routing is None:
            routing = {}
        elif isinstance(routing, RoutingConfig):
            routing = {"config": routing}
        elif not isinstance(routing, Mapping):
            raise TypeError(
                f"routing must be a RoutingConfig or a mapping of CGGRModel's keywords, got "
                f"{type(routing).__name__}."
            )
        self._routing = dict(routing)
        router = self._routing.get("router")
        if isinstance(router, bool) or not isinstance(router, (int, nn.Module, type(None))):
            raise TypeError(
                f"routing['router'] must be a module or a number of layers, got {router!r}."
            )
        mro = type(self).__mro__
        _check_loss(mro[mro.index(CGGRTrainer) + 1 :], type(self))
        if "model" in self._routing:
            raise ValueError("routing must not have 'model', which is the trainer's.")
        super().__init__(*args, **kwargs)
        if complaint := _complaint(self, router):
            raise ValueError(complaint)
        if isinstance(router, nn.Module):
            router.to(self.args.device)
        self._follow_model()
        if (ignored := self.cggr_model.config.ignore_index) != _IGNORED:
            raise ValueError(f"ignore_index must be {_IGNORED}, as the trainer's, got {ignored}.")
        self._forget_metrics()
        self.add_callback(_Schedule(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss in eval mode, the routed loss in training mode."""
        if not model.training:
            inputs = {name: value for name, value in inputs.items() if name != REFERENCE}
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._follow_model()
        # What torch.compile made would trace the routed step; it has compiled parts instead.
        model = _uncompiled(model)
        called = model.module if isinstance(model, DistributedDataParallel) else model
        with self._routed(called), self.accelerator.autocast():
            # Not the next class's, which may want logits for metrics of its own.
            found = Trainer.compute_loss(
                self,
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        self._count()
        return found

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Tensor | int | None]:
        """The trainer's, of labels without those that no step is trained on, so that it counts so.

        A routed step leaves out what is predicted at padding, or is padding, whatever its label.
        """
        return super().get_batch_samples(map(self._counted, epoch_iterator), *args, **kwargs)

    def _counted(self, batch: Any) -> Any:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not (isinstance(mask, Tensor) and mask.dim() == 2 and "labels" in batch):
            return batch
        shift = self.cggr_model.scorer.shifts_labels()
        targets = aligned_targets(batch["labels"], mask, shift=shift, ignore_index=_IGNORED)
        if shift:
            targets = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=_IGNORED)
        return {**batch, "labels": targets}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if REFERENCE not in self._signature_columns:
            self._signature_columns.append(REFERENCE)  # which the routed model takes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with the routing's metrics since the last one."""
        if "loss" in logs:
            logs = logs | self._metrics_since_last()
        super().log(logs, *args, **kwargs)

    def _follow_model(self) -> None:
        """A routed model of the trainer's model as it is now: model_init may make another."""
        model = self.model
        known = getattr(getattr(self, "cggr_model", None), "model", None)
        if known is not None and _uncompiled(known) is _uncompiled(model):
            return
        options = dict(self._routing)
        if isinstance(options.get("router"), int):
            options["router"] = create_truncated_router(model, num_layers=options["router"])
        dynamo = self.accelerator.state.dynamo_plugin
        if dynamo.backend != DynamoBackend.NO:
            options.setdefault("capacity", "static")
            if _uncompiled(model) is model:
                model = torch.compile(model, **dynamo.to_kwargs() | {"dynamic": False})
        with _own_forward(self.model):
            self.cggr_model = CGGRModel(model, **options)

    @contextlib.contextmanager
    def _routed(self, called: nn.Module) -> Iterator[None]:
        """The next forward of this module, within whatever it is wrapped in, is the routed one."""
        routed, entered = self.cggr_model, False
        with _own_forward(called):
            own = vars(called).get("forward")

            def put_back() -> None:
                if own is not None:
                    called.forward = own
                else:
                    called.__dict__.pop("forward", None)

            def forward(*args: Any, **inputs: Any) -> dict[str, Any]:
                nonlocal entered
                entered = True
                put_back()  # the routed model calls it
                if inputs.get("labels") is None:
                    raise ValueError(
                        f"labels must be in every batch of a routed step, got "
                        f"{', '.join(name for name, x in inputs.items() if x is not None)}."
                    )
                return {"loss": routed(*args, **inputs)}

            called.forward = forward
            try:
                yield
            finally:
                put_back()
        if not entered:
            raise RuntimeError(f"{type(called).__name__} ran a step that was not routed.")

    def _count(self) -> None:
        values = [
            value.detach().float()
            for value in self.cggr_model.scorer.latest.values()
            if isinstance(value, Tensor)
        ]
        total = torch.stack(values)
        self._totals = total if self._totals is None else self._totals + total
        self._n_forwards += 1

    def _metrics_since_last(self) -> dict[str, float]:
        if self._totals is None or not self._n_steps:
            return {}
        latest = self.cggr_model.scorer.latest
        names = [name for name, value in latest.items() if isinstance(value, Tensor)]
        metrics = {}
        for name, total in zip(names, self._totals.tolist(), strict=True):
            of_a_step = name in ("tokens_selected", "tokens_total")
            metrics[name] = total / (self._n_steps if of_a_step else self._n_forwards)
        metrics.pop("step")  # the trainer's, which it logs itself
        metrics["step_seconds"] = self._seconds / self._n_steps
        self._forget_metrics()
        return metrics

    def _forget_metrics(self) -> None:
        self._totals = None
        self._n_forwards, self._n_steps, self._seconds = 0, 0, 0.0


class _Schedule(TrainerCallback):
    """Keeps the schedule at the trainer's step, times steps, and writes to the progress bar."""

    def __init__(self, trainer: CGGRTrainer) -> None:
        self._trainer, self._begun = trainer, 0.0
        self._step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = None
        self._trainer._forget_metrics()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer._follow_model()
        scorer = trainer.cggr_model.scorer
        if state.global_step != self._step:  # an epoch may end before its last step does
            self._step = state.global_step
            scorer.set_step(state.global_step)
            # No forward of the run has another's draw, and a resumed one has that of before.
            scorer.draw_count.fill_(state.global_step * args.gradient_accumulation_steps)
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._seconds += time.perf_counter() - self._begun
        self._trainer._n_steps += 1
        self._trainer.cggr_model.set_step(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logged = logs or {}
        shown = {
            label: f"{logged[name]:.3g}" for name, label in _ON_THE_BAR.items() if name in logged
        }
        for callback in self._trainer.callback_handler.callbacks if shown else ():
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix(shown)


def with_cggr(trainer: type[Trainer]) -> type[Trainer]:
    """A routed subclass of a trainer: ``with_cggr(SFTTrainer)(model, routing={...}, ...)``.

    Args:
        trainer: :class:`transformers.Trainer`, TRL's SFTTrainer, or a class derived from one of
            them whose loss is theirs.

    Returns:
        A subclass of it and of :class:`CGGRTrainer`.

    Raises:
        TypeError: `trainer` is no such class.
        ValueError: It computes another loss.

    Example:
        >>> class Mine(Trainer):
        ...     pass
        >>> with_cggr(Mine).__name__
        'CGGRMine'
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise TypeError(f"trainer must be a subclass of transformers.Trainer, got {trainer}.")
    if issubclass(trainer, CGGRTrainer):
        return trainer
    _check_loss(trainer.__mro__, trainer)
    return _subclass(trainer)  # type: ignore[arg-type]


def _check_loss(classes: Sequence[type], trainer: type) -> None:
    """Refuses a loss that the routed one would silently take the place of."""
    owner = next(kind for kind in classes if "compute_loss" in vars(kind))
    is_sft = owner.__name__ == "SFTTrainer" and owner.__module__.startswith("trl.")
    if not (owner is Trainer or is_sft):
        raise ValueError(
            f"trainer must have the loss of Trainer or of TRL's SFTTrainer, which the routed loss "
            f"takes the place of, got {trainer.__name__}, whose loss is {owner.__name__}'s."
        )


@functools.cache
def _subclass(trainer: type[Trainer]) -> type[Trainer]:
    if trainer is Trainer:
        return CGGRTrainer
    return type(f"CGGR{trainer.__name__}", (CGGRTrainer, trainer), {"__doc__": trainer.__doc__})


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _complaint(trainer: Any, router: Any) -> str | None:
    """Why a routed step cannot do what the trainer is asked for, None if it can."""
    args, parallelism = trainer.args, getattr(trainer.accelerator, "parallelism_config", None)
    if args.n_gpu > 1:
        return (
            f"one process must drive one device, got {args.n_gpu} in nn.DataParallel: start one "
            f"for each with torchrun or accelerate launch."
        )
    if trainer.is_deepspeed_enabled:
        return "deepspeed must not be set: a routed step has not been tried in its engine."
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        return "fsdp_config must have version 2, got 1, which sees no parts of the model run."
    if trainer.compute_loss_func is not None:
        return "compute_loss_func must be None: the routed loss takes its place."
    if trainer.label_smoother is not None:
        return (
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: a routed loss "
            f"is of the labels themselves."
        )
    if getattr(args, "loss_type", "nll") == "dft":
        return "loss_type must be 'nll', got 'dft': the routed loss takes its place."
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        return "parallelism_config must not split sequences: tokens are selected in whole ones."
    if trainer.accelerator.state.dynamo_plugin.use_regional_compilation:
        return "use_regional_compilation must be off: a routed step compiles the whole model."
    if trainer.model_init is not None and isinstance(router, nn.Module):
        return "routing['router'] must be a number of layers with model_init, got a module."
    config = getattr(trainer.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "model must be an encoder or a decoder, got one with both."
    for adapter in getattr(trainer.model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            return "model must not learn a prompt, which has positions without tokens."
    get_text_config = getattr(config, "get_text_config", lambda: config)
    if getattr(get_text_config(), "output_router_logits", False):
        return (
            "output_router_logits must be False: a routed loss has no part that balances experts "
            "(in TRL: router_aux_loss_coef=0)."
        )
    return None


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Takes away the forwards that accelerate and TRL put on a model, and puts them back.

    Accelerate's enters mixed precision, as the routed step does; TRL's offers a fused loss.
    """
    taken: list[tuple[nn.Module, Any]] = []
    for module in wrappings(model):
        forward = vars(module).get("forward")
        if forward is not None and (
            "_original_forward" in vars(module) or _origin(forward).startswith("trl.")
        ):
            taken.append((module, forward))
            del module.forward
    try:
        yield
    finally:
        for module, forward in taken:
            module.forward = forward


def _origin(forward: Any) -> str:
    """Module in which the function that is called was written, whatever it says itself."""
    function = getattr(forward, "__func__", forward)
    return getattr(function, "__globals__", {}).get("__name__", "")
