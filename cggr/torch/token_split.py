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

from cggr.torch import selected_attention
from cggr.torch.dispatch import implementation
from cggr.torch.functional import autocast_dtype, in_autocast_dtype
from cggr.torch.rotary import keep_angles
from cggr.torch.router import (
    PARALLEL,
    call_model,
    detect_architecture,
    own_router,
    unwrapped,
    wrappings,
)
from cggr.torch.row_linear import RowLinear
from cggr.torch.selected import SelectedRows
from cggr.torch.twin import Relayered, Twin

_SCAN = "its layers scan the whole sequence, of which a part is not defined"
_ALIBI = "ALiBi derives its biases from the mask of the whole sequence"
_HYBRID = "its linear-attention layers scan the whole sequence, of which a part is not defined"
REFUSED = {
    "mamba": _SCAN,
    "mamba2": _SCAN,
    "falcon_mamba": _SCAN,
    "rwkv": _SCAN,
    "bloom": _ALIBI,
    "mpt": _ALIBI,
    "jamba": _HYBRID,
    "bamba": _HYBRID,
    "zamba2": _HYBRID,
    "qwen3_next": _HYBRID,
}
# Their sliding layers take a mask of their own.
_MASK_PER_LAYER_TYPE = ("gemma2", "gemma3_text", "qwen2", "qwen3")
_WINDOW_IN_EVERY_LAYER = ("mistral", "phi3")
_BIDIRECTIONAL = ("bert", "roberta")
# In transformers, packed sequences see each other in these.
_NEVER_PACKED = ("falcon", *_BIDIRECTIONAL)
# fmt: off
# Kinds of peft that compute every position by itself.
_ADAPTERS = (
    "ADALORA", "ADAPTION_PROMPT", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA",
    "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "RANDLORA",
    "ROAD", "SHIRA", "TINYLORA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
)
# fmt: on
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RowLinear}
# What some models ask of their layers.
_LAYER_ATTRIBUTES = ("attention_type", "layer_type")
# Where layers of transformers and peft keep a probability, or one for each adapter.
_DROPOUTS = ("attention_dropout", "module_dropout", "rank_dropout")
# Where a class may have its forward from: theirs, and Liger's, which computes the same.
_KNOWN_FORWARDS = ("transformers.models.", "liger_kernel.")
_SHAPES = {
    "input_ids": "(B, S)",
    "inputs_embeds": "(B, S, D)",
    "attention_mask": "(B, S), or four dimensions (B or 1, H or 1, S, S)",
    "position_ids": "(B, S) or (1, S)",
    "token_type_ids": "(B, S) or (1, S)",
}


def refusal(model: nn.Module) -> str | None:
    """Why this model cannot be run on a part of its positions, None if it can."""
    inner = unwrapped(model)
    config, name = getattr(inner, "config", None), type(inner).__name__
    model_type = getattr(config, "model_type", None)
    for wrapping in wrappings(model):
        if isinstance(wrapping, PARALLEL):
            return (
                f"{type(wrapping).__name__} would not see the passes of the model inside it: wrap "
                f"the CGGRModel itself."
            )
        for adapter in getattr(wrapping, "peft_config", {}).values():
            kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
            if getattr(adapter, "is_prompt_learning", False):
                return f"{type(wrapping).__name__} puts learned positions before the sequence."
            if getattr(adapter, "alora_invocation_tokens", None) is not None:
                return (
                    f"{type(wrapping).__name__} looks for invocation tokens in a whole sequence "
                    f"(alora_invocation_tokens)."
                )
            if kind not in _ADAPTERS:
                return (
                    f"{type(wrapping).__name__} has an adapter of kind {kind}, which is not known "
                    f"to compute every position by itself."
                )
    if model_type in REFUSED:
        return f"{name} is a {model_type} model: {REFUSED[model_type]}."
    if detect_architecture(inner) == "passthrough":
        return (
            f"{name} is not of a kind known to run on selected positions: transformers' causal or "
            f"masked language models of type llama, mistral, qwen2, qwen3, gemma2, gemma3_text, "
            f"phi3, cohere, granite, gpt2, gptj, falcon, gpt_neox, bert, roberta."
        )
    if "forward" in vars(inner):
        return (
            f"{name}.forward was replaced on this model, and its parts are run without it: give "
            f"accelerate.prepare() the CGGRModel."
        )
    if not type(inner).forward.__module__.startswith(_KNOWN_FORWARDS):
        return f"{name} has a forward of its own, and its parts are run without it."
    if getattr(config, "alibi", False):
        return f"{name} has alibi=True: {_ALIBI}."
    if rope := _dynamic_rope(config):
        return (
            f"{name} has {rope} rotary positions, whose frequencies depend on the longest "
            f"position of a pass."
        )
    if model_type not in _BIDIRECTIONAL and not getattr(config, "is_causal", True):
        return f"{name} has is_causal=False, whose masks are of another kind."
    if getattr(config, "use_bidirectional_attention", False):
        return f"{name} has use_bidirectional_attention=True, whose window is of another kind."
    if getattr(config, "add_cross_attention", False):
        return f"{name} has add_cross_attention=True: nothing is recorded of cross-attention."
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        return (
            f"{name} uses {attention!r} attention, which takes no mask of selected positions: "
            f"call model.set_attn_implementation('sdpa')."
        )
    return None


class LinearHead(NamedTuple):
    """``softcap tanh(logit_scale (hidden weight^T + bias) / softcap)``."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class _Kept(nn.Module):
    """A layer whose output is kept."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.output: Any = None
        _look_like(self, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.layer(*args, **kwargs)
        return self.output


class _Resumed(nn.Module):
    """Stands for the layers up to one whose output was kept."""

    def __init__(self, kept: _Kept, layer: nn.Module) -> None:
        super().__init__()
        self._kept = (kept,)  # not as a part of this module
        _look_like(self, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._kept[0].output


class _Cut:
    """A model cut in two, after some of its layers."""

    def __init__(self, base: nn.Module, path: str, depth: int) -> None:
        layers = list(cast(nn.ModuleList, base.get_submodule(path)))
        if depth > len(layers):
            raise ValueError(
                f"the router has {depth} of the model's layers, which are {len(layers)}: make it "
                f"anew by create_truncated_router."
            )
        self.last = _Kept(layers[depth - 1])
        resumed: list[nn.Module] = [_Resumed(self.last, layer) for layer in layers[:depth]]
        self.beginning = Relayered(base, path, [*layers[: depth - 1], self.last])
        self.rest = Relayered(base, path, [*resumed, *layers[depth:]])


def _look_like(module: nn.Module, layer: nn.Module) -> None:
    for name in _LAYER_ATTRIBUTES:
        if hasattr(layer, name):
            setattr(module, name, getattr(layer, name))


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
        key_BS: Which tokens can be attended to; None if all can.
        segment_BS: Number of the packed sequence that a token belongs to; None if there is one.
        kept: What the last layer that ran gave, where others are to follow.
        in_intervals: Whether every query sees one interval of the keys, less padding.
    """

    hidden_BSD: Tensor | None
    first: dict[str, Any]
    inputs: dict[str, Tensor]
    extra: dict[str, Any]
    cache: Any
    positions_BS: Tensor
    key_BS: Tensor | None
    segment_BS: Tensor | None
    kept: Any
    in_intervals: bool


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
        self._compile = _compiler_of(model)
        self._twin = Twin(self.router.base, _CLASSES)
        self._root: nn.Module | None = None  # of the twin that what follows was made for
        self._compiled: dict[nn.Module, Any] = {}
        self._cuts: dict[int, _Cut] = {}
        # Whether its layers look up their attention by name; it reads their source.
        self._asks = bool(self._source._can_set_attn_implementation())
        self.refresh()

    def refresh(self) -> None:
        """Takes over what has been changed in the model: its modes, its adapters, its modules."""
        from cggr.torch.row_attention import take_over

        if self._twin.original is not self.router.base:
            self._twin = Twin(self.router.base, _CLASSES)
        else:
            self._twin.refresh()
        if self._twin.root is not self._root:
            self._root = self._twin.root
            keep_angles(self._root)
            self._cuts, self._compiled = {}, {}
        # Whether every module runs its own parts, and so would run others in their place.
        self.can_be_cut = not self._twin.bypassed()
        as_asked = self._asks and self.can_be_cut
        self._group = take_over(self._twin.configs) if as_asked else 0
        for cut in self._cuts.values():
            cut.beginning.refresh()
            cut.rest.refresh()
        for module in self._twin.root.modules():
            if isinstance(module, RowLinear):
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

    def cut(self, depth: int) -> _Cut:
        """The model cut after so many layers, made once, as compilers could not make it."""
        if depth not in self._cuts:
            self._cuts[depth] = _Cut(self._twin.root, self.router.layers_path, depth)
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
        inputs, extra = self._checked_inputs(model_inputs, shape)
        key_BS, segment_BS = self._visible(inputs, shape, synchronise)
        from cggr.torch.row_cache import RowCache

        cache = RowCache()
        in_intervals = self._in_intervals(inputs, segment_BS)
        first = self._masked(inputs, shape, key_BS, segment_BS, synchronise, in_intervals) | extra
        first["past_key_values"] = cache
        hidden_BSD, kept = None, None
        if depth is None:
            hidden_BSD = self._first_pass(first, self._twin.root)
        elif depth:
            cut = self.cut(depth)
            hidden_BSD = self._first_pass(first, cut.beginning.root)
            kept, cut.last.output = cut.last.output, None
        return Recorded(
            hidden_BSD=hidden_BSD,
            first=first,
            inputs=inputs,
            extra=extra,
            cache=cache,
            positions_BS=self._positions(inputs, shape),
            key_BS=key_BS,
            segment_BS=segment_BS,
            kept=kept,
            in_intervals=in_intervals,
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
            name: _take(x, index_BC)
            for name, x in inputs.items()
            if name not in ("attention_mask", "position_ids")
        }
        selected["attention_mask"] = self._masks_of_rows(recorded, index_BC)
        selected["position_ids"] = recorded.positions_BS.gather(1, index_BC)
        cache.select(index_BC, unused_BC)
        with self._second_pass():
            inputs = selected | recorded.extra | {"past_key_values": cache}
            return self._base(inputs, self._twin.root)

    def hidden(
        self, model_inputs: dict[str, Any], shape: torch.Size, *, synchronise: bool
    ) -> Tensor:
        """Final hidden states ``(B, S, D)`` of a dense forward, with gradient.

        The arguments are those of :meth:`record`.
        """
        inputs, extra = self._checked_inputs(model_inputs, shape)
        visible = self._visible(inputs, shape, synchronise)
        from cggr.torch.row_cache import RowCache

        in_intervals = self._in_intervals(inputs, visible[1])
        dense = self._masked(inputs, shape, *visible, synchronise, in_intervals) | extra
        with self._second_pass():
            inputs = dense | {"past_key_values": RowCache(records=False)}
            return self._base(inputs, self._twin.root)

    def loss_sum(self, hidden: Tensor, rows: SelectedRows, ignore_index: int) -> Tensor:
        """``Σ w nll`` of final hidden states, a row each; without all logits in memory if possible.

        Where the head is not linear, the logits of these rows are.
        """
        hidden_RD = hidden.reshape(-1, hidden.shape[-1])
        head = self._linear_head()
        if head is None:
            logits_RV = self.router.project(hidden_RD)
            operations = implementation(logits_RV)
            return operations.cross_entropy_sum(logits_RV, rows, ignore_index, None)
        hidden_RD, weight, bias = in_autocast_dtype(hidden_RD, head.weight, head.bias)
        with torch.autocast(hidden.device.type, enabled=False):
            return implementation(hidden_RD).linear_cross_entropy_sum(
                hidden_RD, weight, bias, rows, ignore_index, head.logit_scale, head.softcap, None
            )

    @property
    def _source(self) -> Any:
        return self.router.source

    @property
    def _causal(self) -> bool:
        config = self._source.config
        return config.model_type not in _BIDIRECTIONAL or bool(getattr(config, "is_decoder", False))

    def _checked_inputs(
        self, model_inputs: dict[str, Any], shape: torch.Size
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not torch.compiler.is_compiling():
            self._check()
            if self.float8:
                self._check_float8()
            self.refresh()
        return _split_inputs(model_inputs, shape)

    def _visible(
        self, inputs: dict[str, Tensor], shape: torch.Size, synchronise: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which keys are no padding, and which packed sequence they belong to, where it matters."""
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None:
            return (mask.bool() if mask.dim() == 2 else None), None
        if positions is None or self._source.config.model_type in _NEVER_PACKED:
            return None, None
        segment_BS = _segments(positions.expand(shape))
        if synchronise and not segment_BS[:, -1].any():
            return None, None
        return None, segment_BS

    def _masked(
        self,
        inputs: dict[str, Tensor],
        shape: torch.Size,
        key_BS: Tensor | None,
        segment_BS: Tensor | None,
        synchronise: bool,
        in_intervals: bool,
    ) -> dict[str, Any]:
        """Inputs of a pass over everything, with a mask that the model need not look into.

        With a mask our kernels are faster than sdpa, which is the fastest without.
        """
        needs_none = segment_BS is None and (
            synchronise or (key_BS is None and not self._needs_mask)
        )
        own = inputs.get("attention_mask")
        if own is not None and own.dim() == 4:
            return inputs
        if needs_none and not (in_intervals and self._is_capped):
            return inputs
        every_BS = torch.arange(shape[1], device=_any_of(inputs).device).expand(shape)
        masks = (
            self._intervals(every_BS, shape[1], key_BS, segment_BS)
            if in_intervals
            else self._masks(every_BS, key_BS, segment_BS, inputs)
        )
        return inputs | {"attention_mask": masks}

    @property
    def _is_capped(self) -> bool:
        """Whether attention has a soft-cap, without which sdpa is the fastest in a dense pass."""
        from cggr.torch.row_attention import CAPPED

        return any(config._attn_implementation == CAPPED for config in self._twin.configs)

    @property
    def _needs_mask(self) -> bool:
        """Whether attention takes its causality from a mask, which transformers fills by hand."""
        return self._source.config._attn_implementation != "sdpa"

    def _check(self) -> None:
        if (reason := refusal(self.model)) is not None:
            raise ValueError(f"split='token' cannot be had, 'sequence' can: {reason}")
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
            for module in self._twin.root.modules()
        )

    def _base(self, inputs: dict[str, Any], base: nn.Module) -> Tensor:
        """Final hidden states, by a model without head."""
        if self._compile is not None:
            if base not in self._compiled:
                self._compiled[base] = self._compile(base)
            base = self._compiled[base]
        return call_model(base, inputs | {"use_cache": False})[0]

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
        like = _any_of(inputs)
        if self._source.config.model_type != "roberta":
            return torch.arange(shape[1], device=like.device).expand(shape)
        padding = self._source.config.pad_token_id  # RoBERTa counts tokens, from behind padding's
        if (input_ids := inputs.get("input_ids")) is None:
            return torch.arange(shape[1], device=like.device).expand(shape) + padding + 1
        token_BS = (input_ids != padding).long()
        return token_BS.cumsum(dim=1) * token_BS + padding

    def _masks_of_rows(self, recorded: Recorded, index_BC: Tensor) -> Any:
        """What the layers get as masks in the second pass."""
        from cggr.torch.row_attention import for_groups

        inputs = recorded.inputs
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            rows_BHCS = mask.expand(index_BC.shape[0], *mask.shape[1:])
            index_BHCS = index_BC[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            masks: Any = rows_BHCS.gather(2, index_BHCS)
        elif recorded.in_intervals:
            length = recorded.positions_BS.shape[1]
            return self._intervals(index_BC, length, recorded.key_BS, recorded.segment_BS)
        else:
            masks = self._masks(index_BC, recorded.key_BS, recorded.segment_BS, inputs)
        return for_groups(masks, self._group) if self._group > 1 else masks

    def _intervals(
        self, index_BC: Tensor, length: int, key_BS: Tensor | None, segment_BS: Tensor | None
    ) -> Any:
        """What the kernels take in place of masks, for every layer."""
        from cggr.torch.row_attention import as_mask

        make = functools.partial(
            _interval, index_BC, length, key_BS, segment_BS, causal=self._causal
        )
        return self._for_layers(lambda window: as_mask(*make(window=window), index_BC, key_BS))

    def _in_intervals(self, inputs: dict[str, Tensor], segment_BS: Tensor | None) -> bool:
        """Whether attention is by our kernels: every query must see an interval, less padding."""
        config = self._source.config
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        if not self._group:
            return False
        like = _any_of(inputs)
        least = selected_attention.least_length(
            self._dtype(inputs),
            width,
            on_nvidia=like.is_cuda and torch.version.hip is None,
            compiled=self._compile is not None or torch.compiler.is_compiling(),
        )
        # Where it is 0, a compiler is not to look at the length, which may be a symbol.
        if least is None or (least and like.shape[1] < least):
            return False
        if (mask := inputs.get("attention_mask")) is not None and mask.dim() == 4:
            return False
        return segment_BS is None or self._causal

    def _for_layers(self, make: Callable[[int | None], Any]) -> Any:
        """What this makes for a window, or for none: for every layer, or one for each type."""
        config = self._source.config
        window = getattr(config, "sliding_window", None)
        if config.model_type in _MASK_PER_LAYER_TYPE:
            return {
                kind: make(window if kind == "sliding_attention" else None)
                for kind in sorted(set(config.layer_types))
            }
        return make(window if config.model_type in _WINDOW_IN_EVERY_LAYER else None)

    def _masks(
        self,
        index_BC: Tensor,
        key_BS: Tensor | None,
        segment_BS: Tensor | None,
        inputs: dict[str, Tensor],
    ) -> Any:
        """Masks ``(B, 1, C, S)`` of these positions, to be added to the scores, for every layer."""
        make = functools.partial(
            _mask,
            index_BC,
            _any_of(inputs).shape[1],
            key_BS,
            segment_BS,
            causal=self._causal,
            dtype=self._dtype(inputs),
        )
        return self._for_layers(lambda window: make(window=window))

    def _dtype(self, inputs: dict[str, Tensor]) -> torch.dtype:
        """Precision of queries and keys, so that nobody converts the mask again in every layer."""
        embeddings = inputs.get("inputs_embeds", self._source.get_input_embeddings().weight)
        return autocast_dtype(embeddings) or embeddings.dtype

    def _first_pass(self, inputs: dict[str, Any], base: nn.Module) -> Tensor:
        """Final hidden states of everything, without gradient."""
        # Weights that autocast converts here would be found in its cache by the second pass,
        # without a gradient, in some versions of torch.
        autocast: Any = contextlib.nullcontext()
        kind = _any_of(inputs).device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            autocast = torch.autocast(kind, dtype=dtype, cache_enabled=False)
        # Nothing is there to be checkpointed, and checkpointed layers would get no cache.
        checkpointed = _checkpointed(base)
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
        modules = _checkpointed(self._twin.root)
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


def _checkpointed(base: nn.Module) -> list[nn.Module]:
    return [module for module in base.modules() if _checkpoints(module)]


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


def _interval(
    index_BC: Tensor,
    length: int,
    key_BS: Tensor | None,
    segment_BS: Tensor | None,
    *,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The first key that a position attends to, and the first one behind: see :func:`_mask`."""
    low_BC = torch.zeros_like(index_BC)
    high_BC = index_BC + 1 if causal else torch.full_like(index_BC, length)
    if window is not None:
        low_BC = (index_BC + 1 - window).clamp(min=0)
    place_S = torch.arange(length, device=index_BC.device)
    if segment_BS is not None:
        begins_BS = segment_BS != nn.functional.pad(segment_BS[:, :-1], (1, 0), value=-1)
        first_BS = torch.where(begins_BS, place_S, 0).cummax(dim=1).values
        low_BC = torch.maximum(low_BC, first_BS.gather(1, index_BC))
    if key_BS is not None:
        low_BC = torch.maximum(low_BC, torch.where(key_BS, place_S, length).amin(1)[:, None])
        high_BC = torch.minimum(high_BC, torch.where(key_BS, place_S + 1, 0).amax(1)[:, None])
    return low_BC, high_BC


def _mask(
    index_BC: Tensor,
    length: int,
    key_BS: Tensor | None,
    segment_BS: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """0 where a position attends, the lowest number elsewhere: what both attentions take."""
    query_BC1 = index_BC[:, :, None]
    key_S = torch.arange(length, device=index_BC.device)
    seen_BCS = key_S <= query_BC1 if causal else torch.ones_like(key_S <= query_BC1)
    if window is not None:
        seen_BCS = seen_BCS & (key_S > query_BC1 - window)
    if segment_BS is not None:
        seen_BCS = seen_BCS & (segment_BS.gather(1, index_BC)[:, :, None] == segment_BS[:, None])
    if key_BS is not None:
        # Padding attends to itself: a row without any key would be NaN.
        seen_BCS = (seen_BCS & key_BS[:, None]) | (key_S == query_BC1)
    hidden_BCS = torch.zeros(seen_BCS.shape, dtype=dtype, device=index_BC.device)
    return hidden_BCS.masked_fill_(~seen_BCS, torch.finfo(dtype).min)[:, None]


def _segments(positions_BS: Tensor) -> Tensor:
    """Packed sequences, as transformers finds them: one begins where positions do not go on."""
    new_BS = positions_BS.diff(dim=1, prepend=positions_BS[:, :1] - 1) != 1
    return new_BS.cumsum(dim=1)


def _split_inputs(
    model_inputs: dict[str, Any], shape: torch.Size
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs that follow the positions, and settings."""
    given = {name: value for name, value in model_inputs.items() if value is not None}
    for name in ("past_key_values", "logits_to_keep", "adapter_names", "is_causal"):
        if name in given:
            raise ValueError(
                f"{name} cannot be given with split='token'; split='sequence' takes it."
            )
    if not given.keys() & {"input_ids", "inputs_embeds"}:
        raise ValueError("input_ids or inputs_embeds must be given, got neither.")
    inputs = {name: given.pop(name) for name in _SHAPES if name in given}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(
                f"split='token' cannot tell which part of {name} {tuple(value.shape)} belongs to a "
                f"position: it takes {', '.join(_SHAPES)}; split='sequence' takes it."
            )
    batch, length = shape
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} must be a tensor with split='token', got {type(value).__name__}; "
                f"split='sequence' takes it."
            )
        n_dims = 3 if name == "inputs_embeds" else 2
        if name == "attention_mask" and value.dim() == 4:  # the model's own, already made
            fits = value.shape[0] in (1, batch) and value.shape[2:] == (length, length)
        elif name in ("position_ids", "token_type_ids"):
            fits = value.shape in ((batch, length), (1, length))
        else:
            fits = value.dim() == n_dims and value.shape[:2] == shape
        if not fits:
            raise ValueError(
                f"{name} must have shape {_SHAPES[name]} with split='token', where the labels make "
                f"B = {batch} and S = {length}, got {tuple(value.shape)}."
            )
    return inputs, given


def _any_of(inputs: dict[str, Tensor]) -> Tensor:
    """Input of shape ``(B, S, ...)``."""
    return inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]


def _take(x: Tensor, index_BC: Tensor) -> Tensor:
    x = x.expand(index_BC.shape[0], *x.shape[1:])
    if x.dim() == 2:
        return x.gather(1, index_BC)
    return x.gather(1, index_BC[:, :, None].expand(-1, -1, x.shape[2]))


def _dynamic_rope(config: Any) -> str | None:
    """Kind of rotary positions that depend on what else is in a pass."""
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layer_types = [value for value in parameters.values() if isinstance(value, dict)]
    for part in (parameters, *of_layer_types):
        kind = part.get("rope_type")
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            return kind
    return None


def _compiler_of(model: nn.Module) -> Callable[[nn.Module], Any] | None:
    """What compiled the model, to compile its part without head alike."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return cast(Callable[[nn.Module], Any], getattr(model, "dynamo_ctx", torch.compile))
    in_place = getattr(model, "_compiled_call_impl", None)  # model.compile()
    return None if in_place is None else torch.compile
