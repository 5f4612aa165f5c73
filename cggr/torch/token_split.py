"""A transformers model on all positions without gradient, then on some of them with it.

The second pass computes for every selected position what a dense forward computes: its query
attends to the keys and values of all positions, of which the selected ones are its own and the
others are recorded. Gradient flows through what the pass computes; unselected keys and values are
constants to it (as in TokenTune, arXiv 2501.18824).

Shapes: ``B`` sequences of ``S`` tokens; ``C`` slots in each; ``D`` hidden size, ``V`` classes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from cggr.torch.backward_rows import BackwardRows, backward_of, linears_of_rows
from cggr.torch.cut import Cut
from cggr.torch.dispatch import implementation
from cggr.torch.functional import in_autocast_dtype
from cggr.torch.refusal import is_flash, refusal
from cggr.torch.rotary import keep_angles
from cggr.torch.router import call_model, own_router, room_for_graphs, unwrapped
from cggr.torch.row_inputs import any_of, split_inputs, take
from cggr.torch.row_linear import RowLinear
from cggr.torch.row_masks import RowMasks, Visible
from cggr.torch.run_again import Repeated, RunAgain, has_hooks, layer_of
from cggr.torch.selected import Scored, SelectedRows
from cggr.torch.twin import Twin

# Where layers of transformers and peft keep a probability, or one for each adapter.
_DROPOUTS = ("attention_dropout", "module_dropout", "rank_dropout")

# Models whose layers add to the residual stream what no norm comes after.
_PRE_NORM = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "cohere",
    "granite",
    "gpt2",
    "gptj",
    "gpt_neox",
)

# To record states or attention, transformers adds hooks to modules, which twins share.
_PLAIN = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}


class LinearHead(NamedTuple):
    """``softcap tanh(logit_scale (hidden weight^T + bias) / softcap)``."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class Recorded(NamedTuple):
    """What the first pass leaves to the second.

    Attributes:
        hidden_BSD: Hidden states of the layers that ran, of which the head makes logits; None if
            none did.
        first: What the pass was called with.
        inputs: Of the model, those that a sequence or a position has.
        extra: Its other inputs.
        cache: Keys and values of every layer.
        positions_BS: int64 position of every token.
        visible: What tokens see of each other.
        kept: What the last layer that ran gave, where others are to follow.
    """

    hidden_BSD: Tensor | None
    first: dict[str, Any]
    inputs: dict[str, Tensor]
    extra: dict[str, Any]
    cache: Any
    positions_BS: Tensor
    visible: Visible
    kept: Any


class TokenSplit:
    """The two passes over a model.

    Args:
        model: One of transformers' language models, unmodified, or wrapped by torch.compile or
            peft.
        float8: Whether the linear layers of the first pass multiply in float8.

    Raises:
        ValueError: The model cannot be run on a part of its positions, or not in float8; the
            message says why.
    """

    def __init__(self, model: nn.Module, *, float8: bool = False) -> None:
        self.model = model
        self.float8 = float8
        self._check()
        self.router = own_router(model)
        self._compile = compiler_of(model)
        self._compiled_layers = None if self._compile is None else RunAgain(self._compile)
        self._project: Any = None
        self._masks = RowMasks(self._source, compiled=self._compile is not None)
        self._twin = self._new_twin()
        self._linears_of_rows: tuple[list[Any], str | None] | None = None
        self._root: nn.Module | None = None  # of the twin that what follows was made for
        self._compiled: dict[nn.Module, Any] = {}
        self._cuts: dict[int, Cut] = {}
        # Whether its layers look up their attention by name; it reads their source.
        self._asks = bool(self._source._can_set_attn_implementation())
        self.refresh()

    def refresh(self) -> None:
        """Takes over what has been changed in the model: its modes, its adapters, its modules."""
        from cggr.torch.row_attention import take_over, without_flash

        if self._twin.original is not self.router.base:
            self._twin = self._new_twin()
        else:
            self._twin.refresh()
        if self._twin.root is not self._root:
            self._root = self._twin.root
            keep_angles(self._root)
            self._modules = list(self._root.modules())  # to walk the tree takes long
            self._linears_of_rows = None
            self._cuts, self._compiled = {}, {}
        # Whether every module runs its own parts, and so would run others in their place.
        self.can_be_cut = not self._twin.bypassed()
        if is_flash(self._source.config._attn_implementation):
            if not self.can_be_cut:
                raise ValueError(
                    f"{type(self._source).__name__} uses flash attention, and has modules whose "
                    f"forward was replaced, which cannot be kept from it: call "
                    f"model.set_attn_implementation('sdpa')."
                )
            without_flash(self._twin.configs)
        as_asked = self._asks and self.can_be_cut
        group = take_over(self._twin.configs) if as_asked else 0
        self._masks.follow(self._twin.configs, group)
        for cut in self._cuts.values():
            cut.beginning.refresh()
            cut.rest.refresh()
        for module in self._modules:
            if isinstance(module, self._kinds):
                module.forget()  # the products of a step that failed
        self._float8_linears = (
            [linear for linear in self._row_linears(0) if linear.fits_float8()]
            if self.float8
            else []
        )
        if self.float8 and not self._float8_linears:
            raise ValueError(
                f"first_pass='float8' needs linear layers (nn.Linear) of sizes that 16 divides, of "
                f"which {type(self._source).__name__} has none."
            )

    def _new_twin(self) -> Twin:
        from transformers.pytorch_utils import Conv1D

        from cggr.torch.row_conv1d import RowConv1D

        self._kinds: Any = (RowLinear, RowConv1D)
        return Twin(self.router.base, {nn.Linear: RowLinear, Conv1D: RowConv1D})

    def follow(self) -> None:
        """Takes over what has been changed in the model since the last step.

        Raises:
            ValueError: It cannot be run on a part of its positions any more.
        """
        self._check()
        if self.float8:
            self._check_float8()
        self.refresh()

    def check_backward(self) -> None:
        """Refuses a model whose backward pass cannot be of some rows.

        Raises:
            ValueError: It is under gradient checkpointing, or a layer that adds to the residual
                stream would pass the gradient of all tokens; the message names it.
        """
        name = type(self._source).__name__
        if (reason := self._cannot_run_again()) is not None:
            raise ValueError(
                f"split='backward' takes gradient checkpointing by transformers, with "
                f"use_reentrant=False, and {name} {reason}: change that, or use split='token'."
            )
        for module in self._modules:
            if "forward" in vars(module) and "_orig_mod" not in module._modules:
                raise ValueError(
                    f"split='backward' runs the modules' own forward, which was replaced on a "
                    f"{type(module).__name__} of {name}: split='sequence' can be had."
                )
        if self._linears_of_rows is None:
            self._linears_of_rows = linears_of_rows(self._layers, self._kinds)
        _, other = self._linears_of_rows
        if other is not None:
            raise ValueError(
                f"split='backward' needs layers of class nn.Linear, or transformers' Conv1D, and "
                f"adapters of kind LoRA without DoRA, got {other} of {name}: split='token' can be "
                f"had."
            )

    def _cannot_run_again(self) -> str | None:
        """Why layers under gradient checkpointing cannot be run for some rows; None if they can."""
        if any(type(module).__name__ == "CheckpointWrapper" for module in self._modules):
            return "has a CheckpointWrapper"
        layers = [x for x in self._checkpointed(self._twin.root) if _is_layer(x)]
        if layers and self._compile is not None:
            if has_hooks(layers):
                return "is compiled, and has hooks at its layers"
            if any(module.training and _draws(module) for module in self._modules):
                return "is compiled, and has dropout"
            return None
        for layer in layers:
            keywords = getattr(layer._gradient_checkpointing_func, "keywords", {})
            if keywords.get("use_reentrant", True):
                return "has another"
            if "context_fn" in keywords:
                return "has a context_fn of its own"
        return None

    def cut(self, depth: int) -> Cut:
        """The model cut after so many layers, made once, as compilers could not make it."""
        if depth not in self._cuts:
            self._cuts[depth] = Cut(self._twin.root, self.router.layers_path, depth)
        return self._cuts[depth]

    def record(
        self,
        model_inputs: dict[str, Any],
        shape: torch.Size,
        *,
        synchronise: bool,
        depth: int | None = None,
    ) -> Recorded:
        """The first pass, over everything, without gradient, or its beginning.

        Args:
            model_inputs: Those of the model, None for what is not given.
            shape: ``(B, S)``.
            synchronise: Whether the host may ask the device if padding or packing needs a mask at
                all; without it there is one wherever there could be need of it.
            depth: Layers to run, 0 included; :meth:`finish` runs the others. All if None.

        Raises:
            ValueError: An input does not tell which part of it belongs to a position.
        """
        inputs, extra = split_inputs(model_inputs, shape)
        from cggr.torch.row_cache import RowCache

        cache = RowCache()
        visible = self._masks.visible(inputs, shape, synchronise=synchronise)
        first = self._masks.of_all(inputs, visible, synchronise=synchronise) | extra
        first["past_key_values"] = cache
        hidden_BSD, kept = (None, None) if depth == 0 else self._beginning(first, depth)
        return Recorded(
            hidden_BSD=hidden_BSD,
            first=first,
            inputs=inputs,
            extra=extra,
            cache=cache,
            positions_BS=self._positions(inputs, shape),
            visible=visible,
            kept=kept,
        )

    def finish(self, recorded: Recorded, depth: int, index_BC: Tensor) -> None:
        """The layers that :meth:`record` left, which may be all, given what is selected of them.

        Their products at these positions are those of the second pass, too.

        Args:
            recorded: By :meth:`record`.
            depth: Layers that it ran.
            index_BC: int64 positions in ``[0, S)``, each at most once in a sequence.
        """
        kept = not self.float8 and self._repeats_itself()
        linears = self._row_linears(depth) if kept else []
        for linear in linears:
            linear.index_BC, linear.length = index_BC, recorded.positions_BS.shape[1]
        cut = self.cut(depth) if depth else None
        try:
            if cut is None:
                self._first_pass(recorded.first, self._twin.root)
            else:
                cut.last.output = recorded.kept
                self._first_pass(recorded.first, cut.rest.root)
        finally:
            if cut is not None:
                cut.last.output = None
            for linear in linears:
                linear.index_BC = None

    def rows(self, recorded: Recorded, index_BC: Tensor, unused_BC: Tensor | None) -> Tensor:
        """Final hidden states ``(B, C, D)`` of some positions, with gradient.

        Args:
            recorded: By :meth:`record`; for one call, which writes into it.
            index_BC: int64 positions in ``[0, S)``, each at most once in a sequence.
            unused_BC: Slots that are to have no part in the gradient; None if all have.
        """
        inputs, cache = recorded.inputs, recorded.cache
        selected = {
            name: take(x, index_BC)
            for name, x in inputs.items()
            if name not in ("attention_mask", "position_ids")
        }
        selected["attention_mask"] = self._masks.of_rows(recorded.visible, index_BC)
        selected["position_ids"] = recorded.positions_BS.gather(1, index_BC)
        cache.select(index_BC, unused_BC)
        with self._second_pass():
            inputs = selected | recorded.extra | {"past_key_values": cache}
            return self._base(inputs, self._twin.root)

    def hidden(
        self,
        model_inputs: dict[str, Any],
        shape: torch.Size,
        *,
        synchronise: bool,
        backward_rows: BackwardRows | None = None,
    ) -> Tensor:
        """Final hidden states ``(B, S, D)`` of a dense forward, with gradient.

        Args:
            model_inputs: As of :meth:`record`.
            shape: Likewise.
            synchronise: Likewise.
            backward_rows: What the backward pass of :func:`linears_of_rows` is of, after
                :meth:`check_backward`; it has to be chosen before. None for everything.
        """
        dense = self._dense(model_inputs, shape, synchronise=synchronise)
        if backward_rows is None:
            with self._second_pass():
                return self._base(dense, self._twin.root)
        assert self._linears_of_rows is not None  # by check_backward
        per_layer, _ = self._linears_of_rows
        linears = [linear for of_layer in per_layer for linear in of_layer]
        layers: list[Any] = [x for x in self._checkpointed(self._twin.root) if _is_layer(x)]
        if layers and torch.compiler.is_compiling():
            raise ValueError(
                "split='backward' under gradient checkpointing cannot be compiled as a whole: give "
                "CGGRModel the model that torch.compile made."
            )
        with (
            backward_of(backward_rows, linears),
            _attribute(
                "_gradient_checkpointing_func", self._run_again(backward_rows, layers), layers
            ),
            self._second_pass(),
        ):
            if layers and self._compile is not None:  # which the layers are by themselves
                return call_model(self._twin.root, dense | _PLAIN)[0]
            return self._base(dense, self._twin.root)

    def _run_again(self, rows: BackwardRows, layers: Sequence[Any]) -> Callable[..., Any]:
        """What checkpoints these layers, which are to run again for these rows."""
        assert self._linears_of_rows is not None
        own = {layer: layer._gradient_checkpointing_func for layer in layers}
        linears_of = dict(zip(self._layers, self._linears_of_rows[0], strict=True))
        # What adds to the residual stream and is not normed has no say in others' gradients.
        rows = rows._replace(again=self._source.config.model_type in _PRE_NORM)

        def checkpoint(call: functools.partial[Any], *inputs: Any) -> Any:
            layer = layer_of(call)
            again = Repeated(lambda: backward_of(rows, linears_of[layer]))
            if self._compiled_layers is not None:
                with backward_of(None, linears_of[layer]):
                    return self._compiled_layers(call, *inputs, again=again)
            contexts = contextlib.nullcontext(), again
            return own[layer](call, *inputs, context_fn=lambda: contexts)

        return checkpoint

    def judged(
        self,
        model_inputs: dict[str, Any],
        shape: torch.Size,
        *,
        synchronise: bool,
        depth: int | None = None,
    ) -> Tensor:
        """The same without gradient, of which nothing is recorded, after so many layers."""
        dense = self._dense(model_inputs, shape, synchronise=synchronise)
        return self._beginning(dense, depth)[0]

    def _beginning(self, inputs: dict[str, Any], depth: int | None) -> tuple[Tensor, Any]:
        """Hidden states after so many layers, or all, and what the last of not all gave."""
        if depth is None:
            return self._first_pass(inputs, self._twin.root), None
        cut = self.cut(depth)
        try:
            return self._first_pass(inputs, cut.beginning.root), cut.last.output
        finally:
            cut.last.output = None

    def _dense(
        self, model_inputs: dict[str, Any], shape: torch.Size, *, synchronise: bool
    ) -> dict[str, Any]:
        """Inputs of a pass over everything that leaves nothing to another."""
        inputs, extra = split_inputs(model_inputs, shape)
        from cggr.torch.row_cache import RowCache

        visible = self._masks.visible(inputs, shape, synchronise=synchronise)
        dense = self._masks.of_all(inputs, visible, synchronise=synchronise) | extra
        return dense | {"past_key_values": RowCache(records=False)}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states, compiled where the model is."""
        if self._compile is None:
            return self.router.project(hidden)
        if self._project is None:
            self._project = self._compile(self.router.project)
        with room_for_graphs():
            logits: Tensor = self._project(hidden)
        return logits

    def scored_loss(
        self, hidden: Tensor, targets: Tensor, ignore_index: int, *, scores: bool
    ) -> tuple[Scored | None, Callable[[SelectedRows], Tensor]]:
        """Statistics of final hidden states ``(B, S, D)``, and :meth:`loss_sum` of rows of them.

        The head is called once, which FSDP2 asks for: it would give up the weights after each call.

        Args:
            hidden: With gradient.
            targets: ``(B, S)``.
            ignore_index: Target that has no loss.
            scores: Whether there are to be statistics.
        """
        hidden_ND, scored = hidden.reshape(-1, hidden.shape[-1]), None
        head = self._linear_head()
        if head is None:
            logits = self.router.project(hidden)
            logits_NV, operations = logits.reshape(-1, logits.shape[-1]), implementation(logits)
            if scores:
                with torch.no_grad():
                    scored = operations.token_statistics(logits.detach(), targets, ignore_index)
            return scored, lambda rows: operations.cross_entropy_sum(
                logits_NV, rows, ignore_index, scored
            )
        if scores:
            given, weight, bias = in_autocast_dtype(hidden.detach(), head.weight, head.bias)
            scale = head.logit_scale, head.softcap
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                scored = implementation(given).linear_token_statistics(
                    given, weight, bias, targets, ignore_index, *scale
                )
        return scored, lambda rows: self.loss_sum(hidden_ND, rows, ignore_index, scored)

    def loss_sum(
        self,
        hidden: Tensor,
        rows: SelectedRows,
        ignore_index: int,
        scored: Scored | None = None,
    ) -> Tensor:
        """``Σ w nll`` of final hidden states, a row each; without all logits in memory if possible.

        Where the head is not linear, the logits of these rows are.

        Args:
            hidden: ``(B, C, D)``.
            rows: Of these.
            ignore_index: Label that has no loss.
            scored: By :meth:`scored_loss`; None if they are not known.
        """
        hidden_RD = hidden.reshape(-1, hidden.shape[-1])
        head = self._linear_head()
        if head is None:
            logits_RV = self.router.project(hidden_RD)
            operations = implementation(logits_RV)
            return operations.cross_entropy_sum(logits_RV, rows, ignore_index, None)
        hidden_RD, weight, bias = in_autocast_dtype(hidden_RD, head.weight, head.bias)
        scale = head.logit_scale, head.softcap
        with torch.autocast(hidden.device.type, enabled=False):
            return implementation(hidden_RD).linear_cross_entropy_sum(
                hidden_RD, weight, bias, rows, ignore_index, *scale, scored
            )

    @property
    def _source(self) -> Any:
        return self.router.source

    def _check(self) -> None:
        if (reason := refusal(self.model)) is not None:
            raise ValueError(f"split='token' or 'backward' cannot be had, 'sequence' can: {reason}")
        if self.float8 and not hasattr(nn.functional, "scaled_mm"):
            raise ValueError(f"first_pass='float8' needs PyTorch 2.10, got {torch.__version__}.")

    def _check_float8(self) -> None:
        device = next(self.model.parameters()).device
        found: Any = device
        if device.type == "cuda" and torch.version.hip is None:
            found = torch.cuda.get_device_capability(device)
            if found >= (8, 9):
                return
        elif device.type == "cpu" and torch.__version__ >= "2.13":
            return
        raise ValueError(
            f"first_pass='float8' needs an NVIDIA GPU of compute capability (8, 9), or PyTorch "
            f"2.13 on the CPU, got {found} with PyTorch {torch.__version__}."
        )

    @property
    def n_layers(self) -> int:
        """Of the model."""
        return len(self._layers)

    @property
    def _layers(self) -> list[nn.Module]:
        return list(cast(nn.ModuleList, self._twin.root.get_submodule(self.router.layers_path)))

    def _row_linears(self, depth: int) -> list[RowLinear]:
        """Those of the layers from `depth` on, and of no other layer."""
        layers = self._layers
        others = {module for layer in layers[:depth] for module in layer.modules()}
        modules = (module for layer in layers[depth:] for module in layer.modules())
        return [m for m in modules if isinstance(m, RowLinear) and m not in others]

    def _repeats_itself(self) -> bool:
        """Whether the second pass computes what the first one did, and once only.

        Not if anything may be drawn anew, such as by a hook; checkpointed layers run again, by
        whomever they are wrapped.
        """
        return not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or (module.training and _draws(module))
            or _checkpoints(module)
            or type(module).__name__ == "CheckpointWrapper"
            for module in self._modules
        )

    def _checkpointed(self, base: nn.Module) -> list[nn.Module]:
        """Modules of the model, or of a part of it, under gradient checkpointing."""
        if not any(map(_checkpoints, self._modules)):
            return []
        return [module for module in base.modules() if _checkpoints(module)]

    def _base(self, inputs: dict[str, Any], base: nn.Module) -> Tensor:
        """Final hidden states, by a model without head."""
        if self._compile is not None:
            if base not in self._compiled:
                self._compiled[base] = self._compile(base)
            base = self._compiled[base]
        return call_model(base, inputs | _PLAIN)[0]

    def _linear_head(self) -> LinearHead | None:
        head, config = self.router.head, self._source.config
        if type(head) is not nn.Linear:  # LoRA's, or one with layers before it
            return None
        scale = getattr(config, "logit_scale", None)
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            scale = 1 / divisor
        softcap = getattr(config, "final_logit_softcapping", None)
        return LinearHead(head.weight, head.bias, 1.0 if scale is None else scale, softcap)

    def _positions(self, inputs: dict[str, Tensor], shape: torch.Size) -> Tensor:
        """Position of every token, as the model counts them."""
        if (positions := inputs.get("position_ids")) is not None:
            return positions.expand(shape).long()
        like = any_of(inputs)
        if self._source.config.model_type != "roberta":
            return torch.arange(shape[1], device=like.device).expand(shape)
        padding = self._source.config.pad_token_id  # RoBERTa counts tokens, from behind padding's
        if (input_ids := inputs.get("input_ids")) is None:
            return torch.arange(shape[1], device=like.device).expand(shape) + padding + 1
        token_BS = (input_ids != padding).long()
        return token_BS.cumsum(dim=1) * token_BS + padding

    def _first_pass(self, inputs: dict[str, Any], base: nn.Module) -> Tensor:
        """Final hidden states of everything, without gradient."""
        # Weights that autocast converts here would be found in its cache by the second pass,
        # without a gradient, in some versions of torch.
        autocast: Any = contextlib.nullcontext()
        kind = any_of(inputs).device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            autocast = torch.autocast(kind, dtype=dtype, cache_enabled=False)
        # Nothing is there to be checkpointed, and checkpointed layers would get no cache.
        checkpointed = self._checkpointed(base)
        with (
            torch.no_grad(),
            autocast,
            _attribute("gradient_checkpointing", False, checkpointed),
            _attribute("in_float8", True, self._float8_linears),
        ):
            return self._base(inputs, base)

    @contextlib.contextmanager
    def _second_pass(self) -> Iterator[None]:
        """With gradient checkpointing, leaves the layers their cache: a replay finds the same."""
        modules = self._checkpointed(self._twin.root)
        layers = [module for module in modules if _is_layer(module)]
        if modules and not layers:
            raise ValueError(
                "gradient checkpointing with split='token' needs a transformers whose checkpointed "
                "layers can keep a cache (5.17 does): upgrade it, or disable checkpointing."
            )
        # GPT-2 itself would withhold it.
        others = [module for module in modules if not _is_layer(module)]
        with (
            _attribute("_can_checkpoint_with_cache", True, layers),
            _attribute("gradient_checkpointing", False, others),
        ):
            yield


def _checkpoints(module: nn.Module) -> bool:
    # It is set on instances; getattr takes long for what a module lacks.
    return bool(vars(module).get("gradient_checkpointing"))


def _draws(module: nn.Module) -> bool:
    if "Dropout" in type(module).__name__ and getattr(module, "p", True):
        return True
    found: list[Any] = [vars(module).get(name) for name in _DROPOUTS]
    return any(any(x.values()) if isinstance(x, dict) else x for x in found)


def _is_layer(module: nn.Module) -> bool:
    return hasattr(type(module), "_can_checkpoint_with_cache")


@contextlib.contextmanager
def _attribute(name: str, value: Any, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules whose attribute has another value meanwhile."""
    before = [vars(module).get(name) for module in modules]  # None where a class has it
    try:
        for module in modules:
            setattr(module, name, value)
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            if old is None:
                delattr(module, name)
            else:
                setattr(module, name, old)


def runs_as_parts(model: nn.Module) -> bool:
    """Whether nobody can tell a dense pass over the model's parts from a call of the model.

    Not if there are hooks, or a forward or a compiler of a module's own, or flash attention; nor
    under gradient checkpointing, for which transformers adds a hook.
    """
    if refusal(model) is not None or _has_any_global_hook():
        return False
    config: Any = unwrapped(model).config
    if is_flash(config._attn_implementation):
        return False
    found, known = [model], {model}  # modules() takes ten times as long
    while found:
        module = found.pop()
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
            or _checkpoints(module)
        ):
            return False
        forward = vars(module).get("forward")
        bound = forward is None or getattr(forward, "__self__", None) is module
        if not bound and "_orig_mod" not in module._modules:  # torch.compile sets one
            return False
        children = {child for child in module._modules.values() if child is not None} - known
        known |= children
        found += children
    return True


def compiler_of(model: nn.Module) -> Callable[[Any], Any] | None:
    """What compiled the model, to compile its part without head alike."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return cast(Callable[[Any], Any], getattr(model, "dynamo_ctx", torch.compile))
    in_place = getattr(model, "_compiled_call_impl", None)  # model.compile()
    return None if in_place is None else torch.compile
