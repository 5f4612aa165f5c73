"""Routers: a model's own first layers as a cheap judge of difficulty.

A router shares the model's modules and owns nothing: no parameter is registered, saved or
optimised twice.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from cggr.torch.twin import Relayered

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Layout(NamedTuple):
    """Where a family of Hugging Face models keeps its parts, as attribute paths.

    Attributes:
        base: The model without head, from the model with head.
        layers: The ``nn.ModuleList`` of layers, from the base.
        head: What turns final hidden states into logits, from the model with head.
        model_types: ``config.model_type`` of the models that follow it.
    """

    base: str
    layers: str
    head: str
    model_types: tuple[str, ...]


# fmt: off
LAYOUTS = {
    "llama": Layout("model", "layers", "lm_head", (
        "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "cohere", "granite",
    )),
    "gpt": Layout("transformer", "h", "lm_head", ("gpt2", "gptj", "falcon")),
    "gpt_neox": Layout("gpt_neox", "layers", "lm_head", ("gpt_neox",)),
    "bert": Layout("bert", "encoder.layer", "cls", ("bert",)),
    "roberta": Layout("roberta", "encoder.layer", "lm_head", ("roberta",)),
    "mamba": Layout("backbone", "layers", "lm_head", ("mamba",)),
}
# fmt: on

_MAX_GRAPHS = 64  # of one function that is compiled

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class TruncatedRouter(nn.Module):
    """The model's embeddings, first layers, final norm and head, sharing its weights.

    ``logits = head(final_norm(hidden_states[num_layers]))``, with the head's bias, scale and
    soft-cap. Parameters and state dict are empty: the modules stay the model's own, and so does
    their mode: while the model trains, its dropout is active here too.

    Args:
        model: A model with a head: Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3, Phi-3, Cohere,
            Granite, GPT-2, GPT-J, Falcon, GPT-NeoX, BERT, RoBERTa, Mamba. Any other is its own
            router (passthrough), with a warning.
        num_layers: Layers to run, at least 1.
        architecture: ``"auto"``, the name of a layout to follow whatever the model is (llama, gpt,
            gpt_neox, bert, roberta, mamba), or ``"passthrough"``.

    Raises:
        ValueError: `architecture` is unknown or the model does not follow it, or `num_layers` is
            out of range.
    """

    def __init__(self, model: nn.Module, num_layers: int = 2, architecture: str = "auto") -> None:
        super().__init__()
        known = (*LAYOUTS, "passthrough")
        if architecture not in (*known, "auto"):
            raise ValueError(
                f"architecture must be 'auto' or one of {', '.join(map(repr, known))}, "
                f"got {architecture!r}."
            )
        if architecture == "auto":
            architecture = detect_architecture(unwrapped(model))
            if architecture == "passthrough":
                _warn_passthrough(model)
        if architecture != "passthrough":
            model = unwrapped(model)
        self.architecture = architecture
        # In tuples, so that nn.Module does not register what belongs to the model.
        self._source = (model,)
        self._truncated: tuple[nn.Module]
        self.num_layers: int | None = None
        if self.passthrough:
            self._cache_switch = cache_switch(model)
            return
        layers = self._part(f"{LAYOUTS[architecture].base}.{LAYOUTS[architecture].layers}")
        self._part(LAYOUTS[architecture].head)
        if not 1 <= num_layers <= len(layers):
            raise ValueError(
                f"num_layers must be in [1, {len(layers)}] for a model of {len(layers)} layers, "
                f"got {num_layers}."
            )
        self.num_layers = num_layers
        self._cache_switch = cache_switch(self._part(LAYOUTS[architecture].base))
        self._truncate()

    @property
    def passthrough(self) -> bool:
        """Whether the whole model is the router."""
        return self.architecture == "passthrough"

    @property
    def source(self) -> nn.Module:
        """The model that the router was made from."""
        return self._source[0]

    @property
    def base(self) -> nn.Module:
        """The source without its head, with all its layers; not for passthrough."""
        return cast(nn.Module, self._part(LAYOUTS[self.architecture].base))

    @property
    def layers_path(self) -> str:
        """Where the base keeps its layers; not for passthrough."""
        return LAYOUTS[self.architecture].layers

    @property
    def head(self) -> Any:
        """What makes logits of the base's hidden states; not for passthrough."""
        return self._part(LAYOUTS[self.architecture].head)

    @property
    def n_classes(self) -> int:
        """V, the number of logits; not for passthrough."""
        find = getattr(self.source, "get_output_embeddings", None)
        head = self.head if find is None else find()
        return head.weight.shape[0]

    def hidden_states(self, **model_inputs: Any) -> Tensor:
        """Normalised hidden states after the first layers, ``(B, S, D)``; not for passthrough."""
        # Made anew each time, at the price of a few dictionaries: a module that was replaced in
        # the model, by LoRA say, is replaced here. A compiler sees the latest of them.
        if not torch.compiler.is_compiling():
            self._truncate()
        return call_model(self._truncated[0], self._cache_switch | model_inputs)[0]

    def project(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states, as the model's own forward computes them."""
        config = getattr(self.source, "config", None)
        logits = self.head(hidden)
        if (logit_scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * logit_scale
        if (logits_scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / logits_scaling
        if (softcap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = (logits / softcap).tanh() * softcap
        return logits

    def forward(self, input_ids: Tensor | None = None, **model_inputs: Any) -> Tensor:
        """Logits ``(B, S, V)`` of the first layers.

        Args:
            input_ids: ``(B, S)`` integers, or None with ``inputs_embeds`` among `model_inputs`.
            **model_inputs: Passed to the model without head (attention_mask, position_ids, ...).
        """
        model_inputs["input_ids"] = input_ids
        if self.passthrough:
            return logits_of(call_model(self.source, self._cache_switch | model_inputs))
        return self.project(self.hidden_states(**model_inputs))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is owned, so nothing is loaded: what cggr 0.5.0 saved here is the model's."""

    def _truncate(self) -> None:
        base, path = self.base, self.layers_path
        layers = list(_part_of(base, path))[: self.num_layers]
        self._truncated = (Relayered(base, path, layers).root,)

    def _part(self, path: str) -> Any:
        part = _part_of(self.source, path)
        if part is None:
            raise ValueError(
                f"architecture={self.architecture!r} needs {type(self.source).__name__}.{path},"
                f" which the model does not have; architecture='passthrough' uses the whole "
                f"model."
            )
        return part

    def extra_repr(self) -> str:
        """Architecture and depth, for ``print(router)``."""
        return f"architecture={self.architecture!r}, num_layers={self.num_layers}"


def create_truncated_router(
    model: nn.Module, num_layers: int = 2, architecture: str = "auto"
) -> TruncatedRouter:
    """A router of the model's first layers, sharing its weights: see :class:`TruncatedRouter`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32,
        ...     intermediate_size=32, num_hidden_layers=4, num_attention_heads=2))
        >>> create_truncated_router(model, num_layers=1)
        TruncatedRouter(architecture='llama', num_layers=1)
    """
    return TruncatedRouter(model, num_layers, architecture)


def own_router(model: nn.Module) -> TruncatedRouter:
    """All of the model as its own router; in chunks through the head where the layout is known."""
    architecture = detect_architecture(unwrapped(model))
    if architecture == "passthrough":
        return TruncatedRouter(model, architecture=architecture)
    layout = LAYOUTS[architecture]
    layers = unwrapped(model).get_submodule(f"{layout.base}.{layout.layers}")
    return TruncatedRouter(model, len(cast(nn.ModuleList, layers)), architecture)


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's model behind a router, torch.compile, data parallelism or peft."""
    *_, model = wrappings(module)
    return model


def tensor_parallel_group(module: nn.Module) -> ProcessGroup | None:
    """The processes that have a part each of the user's model, and the same tokens; else None.

    Of a model that transformers has loaded by a `tp_plan`.
    """
    model: Any = unwrapped(module)
    if (getattr(model, "tp_size", None) or 1) == 1:
        return None
    mesh = model._device_mesh
    return mesh.get_group("tp" if "tp" in (mesh.mesh_dim_names or ()) else None)


def wrappings(module: nn.Module) -> Iterator[nn.Module]:
    """The module, what it wraps, what that wraps, and so on to the user's model."""
    while True:
        yield module
        if isinstance(module, TruncatedRouter):
            module = module.source
        elif isinstance(module, PARALLEL):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch.compile
            module = cast(nn.Module, module._orig_mod)
        elif (base := _base_model(module)) is not None:
            module = base
        else:
            return


def _base_model(module: nn.Module) -> nn.Module | None:
    """The model inside a peft model, which changes it in place."""
    find = getattr(module, "get_base_model", None)
    base = find() if callable(find) else None
    return base if isinstance(base, nn.Module) and base is not module else None


def is_causal(model: nn.Module) -> bool:
    """Whether position t predicts token t + 1: every model but the kinds that are known not to."""
    aligned = ("ForMaskedLM", "ForPreTraining", "ForTokenClassification")
    config = getattr(model, "config", None)
    return not (
        type(model).__name__.endswith(aligned)
        or getattr(config, "model_type", None) in ("xlm", "flaubert")  # masked, by another name
        or getattr(config, "is_encoder_decoder", False)
    )


def cache_switch(model: nn.Module) -> dict[str, bool]:
    """``{"use_cache": False}`` for models that have that switch: training needs no cache."""
    parameters = inspect.signature(type(unwrapped(model)).forward).parameters
    return {"use_cache": False} if "use_cache" in parameters else {}


def call_model(model: nn.Module, model_inputs: dict[str, Any]) -> Any:
    """Call a model with the inputs that are given."""
    inputs = {name: value for name, value in model_inputs.items() if value is not None}
    # By position: a plain nn.Module may name it otherwise.
    first = (inputs.pop("input_ids"),) if "input_ids" in inputs else ()
    with room_for_graphs():
        return model(*first, **inputs)


def room_for_graphs() -> contextlib.AbstractContextManager[None]:
    """Lets what is compiled have as many graphs as there are passes, at as many capacities.

    In transformers all models share one function, to which dynamo grants 8, evaluation included.
    Whatever were left then would not be compiled.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    limit = max(_MAX_GRAPHS, dynamo_config.recompile_limit)
    room: contextlib.AbstractContextManager[None] = dynamo_config.patch(recompile_limit=limit)
    return room


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, an output with ``.logits``, or a tuple."""
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) else output
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return logits: a tensor, an output with .logits, or a tuple that "
            f"starts with them; got {type(output).__name__}."
        )
    return logits


def detect_architecture(model: nn.Module) -> str:
    """Name of the layout that the model is known to follow, else ``"passthrough"``."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        for name, layout in LAYOUTS.items():
            paths = (f"{layout.base}.{layout.layers}", layout.head)
            parts = (_part_of(model, path) for path in paths)
            if model_type in layout.model_types and all(part is not None for part in parts):
                return name
    return "passthrough"


def _part_of(model: nn.Module, path: str) -> Any:
    """What lies at an attribute path of the model, None if nothing does."""
    part: Any = model
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def _warn_passthrough(model: nn.Module) -> None:
    warnings.warn(
        f"{type(model).__name__} follows no known layout of a model with a head: the whole model "
        f"is its own router, which scores at the price of a full forward. architecture= one of "
        f"{', '.join(map(repr, LAYOUTS))} forces a layout, architecture='passthrough' silences "
        f"this.",
        UserWarning,
        stacklevel=4,
    )
