"""Which attention a model of transformers runs: flash attention where it can be had.

The token split's own passes, and those of compiled or static sequence splits, attend by sdpa or by
kernels of ours, whatever is set here: they take positions, of which flash attention knows nothing.
In the sequence split's other passes, in evaluation and in generation it is what is set here.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any, NamedTuple

import torch
from torch import nn

from cggr.torch.model import CGGRModel
from cggr.torch.router import unwrapped


class _Flash(NamedTuple):
    """A version of flash attention.

    Attributes:
        version: Its number.
        capability: The least compute capability of a GPU that runs it.
        install: How it is installed.
    """

    version: int
    capability: tuple[int, int]
    install: str


_SOURCE = "https://github.com/Dao-AILab/flash-attention"
_FLASH = {
    "flash_attention_4": _Flash(4, (9, 0), "pip install flash-attn-4"),
    "flash_attention_3": _Flash(3, (9, 0), f"python setup.py install, in hopper/ of {_SOURCE}"),
    "flash_attention_2": _Flash(2, (8, 0), "pip install flash-attn --no-build-isolation"),
}
# From the first that "auto" takes if it can.
BACKENDS = (*_FLASH, "sdpa", "eager")


def get_flash_attention_info() -> dict[str, Any]:
    """What this machine has.

    Returns:
        cuda_available, sdpa_available, flash_attn_available (any version that a GPU here can run),
        flash_attn_version (of the package flash-attn, None without it), backends (names that
        :func:`enable_flash_attention` takes on this machine), recommended_backend (what ``"auto"``
        takes for a model in bfloat16 that supports everything).

    Example:
        >>> "sdpa" in get_flash_attention_info()["backends"]
        True
    """
    usable = tuple(name for name in _FLASH if _why_not_here(name) is None)
    return {
        "cuda_available": torch.cuda.is_available(),
        "sdpa_available": True,
        "flash_attn_available": bool(usable),
        "flash_attn_version": _installed_version(),
        "backends": (*usable, "sdpa", "eager"),
        "recommended_backend": (*usable, "sdpa")[0],
    }


def enable_flash_attention(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Set the attention of a model of transformers.

    ``"auto"`` takes the newest flash attention that is installed, that the model supports and that
    its GPU and dtype (float16 or bfloat16) can use; else sdpa, where the model supports it and does
    not cap its attention scores, which sdpa cannot; else eager attention. A backend that is asked
    for by name is set, or there is an error. Flash attention by name takes float32 weights, since
    autocast may give it what it needs.

    Args:
        model: One of transformers', or a :class:`CGGRModel`, a peft model, or what torch.compile
            made, around one.
        backend: ``"auto"``, ``"flash_attention_2"``, ``"flash_attention_3"``,
            ``"flash_attention_4"``, ``"sdpa"`` or ``"eager"``.

    Returns:
        `model`.

    Raises:
        ImportError: The package is not installed; the message has the command.
        TypeError: `model` is not one of transformers'.
        ValueError: `backend` is unknown, or the model or the GPU cannot use it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2))
        >>> enable_flash_attention(model, "eager").config._attn_implementation
        'eager'
    """
    _check_name(backend)
    inner: Any = unwrapped(model.model if isinstance(model, CGGRModel) else model)
    if not hasattr(inner, "set_attn_implementation"):
        raise TypeError(f"model must be one of transformers', got {type(inner).__name__}.")
    if backend == "auto":
        suiting = [name for name in BACKENDS if _suits(inner, name)]
        if not suiting:
            raise ValueError(
                f"backend must not be 'auto' for {type(inner).__name__}, which keeps its "
                f"{inner.config._attn_implementation!r} and has none of {', '.join(BACKENDS)}."
            )
        backend = suiting[0]
    elif (reason := _why_not(inner, backend)) is not None:
        raise reason
    if inner.config._attn_implementation != backend:
        inner.set_attn_implementation(backend)
    if (found := inner.config._attn_implementation) != backend:
        raise ValueError(
            f"{type(inner).__name__} takes its attention when it is made, and keeps {found!r}: "
            f"load it with attn_implementation={backend!r}."
        )
    return model


def load_model_with_flash_attention(
    model_name_or_path: str,
    backend: str = "auto",
    torch_dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = "auto",
    *,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> nn.Module:
    """Load a causal language model and set its attention.

    Args:
        model_name_or_path: As ``AutoModelForCausalLM.from_pretrained`` takes it.
        backend: As :func:`enable_flash_attention` takes it.
        torch_dtype: Of the weights; bfloat16 by default where the GPU multiplies it, else the
            checkpoint's.
        device_map: Where the weights go; needs accelerate, unless None.
        dtype: Another name of `torch_dtype`, as ``from_pretrained`` has it.
        **options: Of ``from_pretrained``.

    Returns:
        The model.

    Raises:
        ImportError: The package is not installed; the message has the command.
        TypeError: `dtype` comes twice, or the attention by a name that is not `backend`.
        ValueError: `backend` is unknown, or the model or the GPU cannot use it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> folder = getfixture("tmp_path")
        >>> LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2)).save_pretrained(folder)
        >>> model = load_model_with_flash_attention(folder, "sdpa", device_map=None)
        >>> model.config._attn_implementation
        'sdpa'
    """
    from transformers import AutoModelForCausalLM

    _check_name(backend)
    # Before what may be many gigabytes are loaded.
    if backend in _FLASH and (reason := _why_not_here(backend)) is not None:
        raise reason
    if "attn_implementation" in options:
        raise TypeError(
            f"attn_implementation must be given as backend, got {options['attn_implementation']!r}."
        )
    if dtype is not None and torch_dtype is not None:
        raise TypeError(f"dtype must come once, got {dtype} and torch_dtype={torch_dtype}.")
    dtype = torch_dtype if dtype is None else dtype
    if dtype is None:
        halves = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        dtype = torch.bfloat16 if halves else "auto"
    asked = {} if backend == "auto" else {"attn_implementation": backend}
    model = AutoModelForCausalLM.from_pretrained(
        model_name_or_path, dtype=dtype, device_map=device_map, **asked, **options
    )
    return enable_flash_attention(model, backend)


def _check_name(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}."
        )


def _suits(model: Any, backend: str) -> bool:
    """Whether ``"auto"`` may take it."""
    if backend in _FLASH and next(model.parameters()).dtype not in (torch.float16, torch.bfloat16):
        return False
    is_set = model.config._attn_implementation == backend
    return (is_set or bool(model._can_set_attn_implementation())) and _why_not(
        model, backend
    ) is None


def _why_not(model: Any, backend: str) -> Exception | None:
    """Why this model cannot attend by it, None if it can."""
    name = type(model).__name__
    if backend in _FLASH:
        if not getattr(model, "_supports_flash_attn", False):
            return ValueError(f"backend must not be {backend!r} for {name}, which has none of it.")
        return _why_not_here(backend, _device_of(model))
    if backend == "sdpa" and not getattr(model, "_supports_sdpa", False):
        return ValueError(f"backend must not be 'sdpa' for {name}, which has none of it.")
    if backend == "sdpa" and getattr(model.config, "attn_logit_softcapping", None) is not None:
        return ValueError(
            f"backend must not be 'sdpa' for {name}, which caps its attention scores, and sdpa "
            f"would not: 'eager' does."
        )
    return None


def _why_not_here(backend: str, device: torch.device | None = None) -> Exception | None:
    """Why no model on this device, or on any of the machine, can attend by it."""
    flash = _FLASH[backend]
    if not _is_installed(backend):
        return ImportError(f"backend {backend!r} needs its package: {flash.install}")
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return ValueError(f"backend {backend!r} needs an NVIDIA GPU, which this machine has not.")
    if device is not None and device.type != "cuda":
        return ValueError(f"backend {backend!r} needs the model on a GPU, got one on {device}.")
    if (found := torch.cuda.get_device_capability(device)) < flash.capability:
        return ValueError(
            f"backend {backend!r} needs a GPU of compute capability {flash.capability}, got "
            f"{found}."
        )
    return None


def _device_of(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _is_installed(backend: str) -> bool:
    from transformers.utils import import_utils

    # Older versions of transformers know fewer; without a GPU theirs say no of any package.
    known = getattr(import_utils, f"is_flash_attn_{_FLASH[backend].version}_available", None)
    return known is not None and bool(known())


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return None
