"""A model cut in two after some of its layers, of which either part runs by itself."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from cggr.torch.twin import Relayered

# What some models ask of their layers.
_LAYER_ATTRIBUTES = ("attention_type", "layer_type")


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


class Cut:
    """A model cut in two, after some of its layers.

    Attributes:
        beginning: Those layers.
        last: The last one of them, which keeps its output.
        rest: The others, which go on from there.
    """

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
