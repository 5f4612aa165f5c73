"""Which models can be run on a part of their positions."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from cggr.torch.router import (
    PARALLEL,
    detect_architecture,
    tensor_parallel_group,
    unwrapped,
    wrappings,
)

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
# In these, positions see what comes after them.
BIDIRECTIONAL = ("bert", "roberta")
# fmt: off
# Kinds of peft that compute every position by itself.
_ADAPTERS = (
    "ADALORA", "ADAPTION_PROMPT", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA",
    "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "RANDLORA",
    "ROAD", "SHIRA", "TINYLORA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
)
# fmt: on
# Where a class may have its forward from: theirs, and Liger's, which computes the same.
_KNOWN_FORWARDS = ("transformers.", "liger_kernel.", "peft.")


def refusal(model: nn.Module) -> str | None:
    """Why this model cannot be run on a part of its positions, None if it can."""
    inner: Any = unwrapped(model)
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
    if tensor_parallel_group(inner) is not None:
        return f"{name} was loaded by a tp_plan: its layers are parts, spread over processes."
    if model_type in REFUSED:
        return f"{name} is a {model_type} model: {REFUSED[model_type]}."
    if detect_architecture(inner) == "passthrough":
        return (
            f"{name} is not of a kind known to run on selected positions: transformers' causal or "
            f"masked language models of type llama, mistral, qwen2, qwen3, gemma2, gemma3_text, "
            f"phi3, cohere, granite, gpt2, gptj, falcon, gpt_neox, bert, roberta."
        )
    for wrapping in wrappings(model):
        outer = type(wrapping)
        if "_orig_mod" in wrapping._modules:  # by torch.compile, whose forward is the model's
            continue
        if "forward" in vars(wrapping):
            return (
                f"{outer.__name__}.forward was replaced on this model, and its parts are run "
                f"without it: give accelerate.prepare() the CGGRModel."
            )
        # Of the function that is called: functools.wraps copies the name of another's module.
        origin = getattr(outer.forward, "__globals__", {}).get("__name__", "")
        if not origin.startswith(_KNOWN_FORWARDS):
            return f"{outer.__name__} has a forward of its own, and its parts are run without it."
    if getattr(config, "alibi", False):
        return f"{name} has alibi=True: {_ALIBI}."
    if rope := _dynamic_rope(config):
        return (
            f"{name} has {rope} rotary positions, whose frequencies depend on the longest "
            f"position of a pass."
        )
    if model_type not in BIDIRECTIONAL and not getattr(config, "is_causal", True):
        return f"{name} has is_causal=False, whose masks are of another kind."
    if getattr(config, "use_bidirectional_attention", False):
        return f"{name} has use_bidirectional_attention=True, whose window is of another kind."
    if getattr(config, "add_cross_attention", False):
        return f"{name} has add_cross_attention=True: nothing is recorded of cross-attention."
    attention = getattr(config, "_attn_implementation", None)
    # Where layers look up their attention, they find ours.
    replaceable = is_flash(attention) and inner._can_set_attn_implementation()
    if attention not in (None, "eager", "sdpa") and not replaceable:
        return (
            f"{name} uses {attention!r} attention, which takes no mask of selected positions: "
            f"call model.set_attn_implementation('sdpa')."
        )
    return None


def is_flash(attention: str | None) -> bool:
    """Whether it is transformers' name of some version of flash attention."""
    return attention is not None and attention.startswith("flash_attention_")


def sharded_alone(model: nn.Module) -> str | None:
    """Why parts of this model cannot be run now: a forward of the whole gathers its parameters."""
    if "torch.distributed.fsdp" not in sys.modules:  # it takes long to import, for most in vain
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    def parameter_of(module: nn.Module) -> nn.Parameter | None:
        """One that is gathered with the module, and not with a part of it alone."""
        for parameter in module._parameters.values():
            if parameter is not None:
                return parameter
        for part in module.children():
            if not isinstance(part, FSDPModule) and (found := parameter_of(part)) is not None:
                return found
        return None

    for wrapping in wrappings(model):
        if isinstance(wrapping, FSDPModule) and isinstance(parameter_of(wrapping), DTensor):
            return (
                f"{type(wrapping).__name__} was given to fully_shard, and its parts are run "
                f"without it: give fully_shard the CGGRModel in its place, after the model's "
                f"layers."
            )
    return None


def _dynamic_rope(config: Any) -> str | None:
    """Kind of rotary positions that depend on what else is in a pass."""
    parameters = getattr(config, "rope_parameters", None) or {}
    of_layer_types = [value for value in parameters.values() if isinstance(value, dict)]
    for part in (parameters, *of_layer_types):
        kind = part.get("rope_type")
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            return kind
    return None
