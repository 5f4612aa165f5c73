"""The inputs of a model that belong to positions, and the part of them that some positions have.

Shapes: ``B`` sequences of ``S`` tokens; ``C`` slots in each; ``D`` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SPLITS = "split='token' or 'backward'"
_SHAPES = {
    "input_ids": "(B, S)",
    "inputs_embeds": "(B, S, D)",
    "attention_mask": "(B, S), or four dimensions (B or 1, H or 1, S, S)",
    "position_ids": "(B, S) or (1, S)",
    "token_type_ids": "(B, S) or (1, S)",
}
# What some layers are told of packed sequences, which positions say too.
_SAID_BY_POSITIONS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def split_inputs(
    model_inputs: dict[str, Any], shape: torch.Size
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs that follow the positions, and settings.

    Raises:
        ValueError: There is a :func:`complaint` of them.
    """
    if (reason := complaint(model_inputs, shape)) is not None:
        raise ValueError(reason)
    given = _given(model_inputs)
    inputs = {name: given.pop(name) for name in _SHAPES if name in given}
    return inputs, given


def complaint(model_inputs: dict[str, Any], shape: torch.Size) -> str | None:
    """Why these inputs cannot be told apart by positions, None if they can."""
    given = _given(model_inputs)
    for name in ("past_key_values", "logits_to_keep", "adapter_names", "is_causal"):
        if name in given:
            return f"{name} cannot be given with {_SPLITS}; split='sequence' takes it."
    if not given.keys() & {"input_ids", "inputs_embeds"}:
        return "input_ids or inputs_embeds must be given, got neither."
    inputs = {name: given.pop(name) for name in _SHAPES if name in given}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dim():
            return (
                f"{_SPLITS} cannot tell which part of {name} {tuple(value.shape)} belongs to a "
                f"position: it takes {', '.join(_SHAPES)}; split='sequence' takes it."
            )
    batch, length = shape
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            return (
                f"{name} must be a tensor with {_SPLITS}, got {type(value).__name__}; "
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
            return (
                f"{name} must have shape {_SHAPES[name]} with {_SPLITS}, where the labels make "
                f"B = {batch} and S = {length}, got {tuple(value.shape)}."
            )
    mask = inputs.get("attention_mask")
    if (
        mask is not None
        and mask.dim() == 4
        and not (mask.dtype == torch.bool or mask.is_floating_point())
    ):
        return (
            f"attention_mask of four dimensions must be bool, or floating where it is added to the "
            f"scores, got {mask.dtype}."
        )
    return None


def _given(model_inputs: dict[str, Any]) -> dict[str, Any]:
    packed = model_inputs.get("position_ids") is not None
    return {
        name: value
        for name, value in model_inputs.items()
        if value is not None and not (packed and name in _SAID_BY_POSITIONS)
    }


def any_of(inputs: dict[str, Tensor]) -> Tensor:
    """Input of shape ``(B, S, ...)``."""
    return inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]


def take(x: Tensor, index_BC: Tensor) -> Tensor:
    """What the positions `index_BC` have of ``(B or 1, S, ...)``."""
    x = x.expand(index_BC.shape[0], *x.shape[1:])
    if x.dim() == 2:
        return x.gather(1, index_BC)
    return x.gather(1, index_BC[:, :, None].expand(-1, -1, x.shape[2]))
