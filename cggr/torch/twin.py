"""A second tree of a model's modules over the same parameters, which may be run in another way."""

from __future__ import annotations

import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Twin:
    """Copies of modules that share parameters, buffers and hooks with the originals.

    What is set on a copy, or on the configuration that the copies have in place of the model's,
    nobody else sees: no other forward of the model, in a thread or a hook, and no saved file.

    Args:
        root: The module to copy with all below it.
        classes: Subclasses that copies of modules of exactly these classes have.
    """

    def __init__(
        self, root: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]] | None = None
    ) -> None:
        self.original, self._classes = root, dict(classes or {})
        self._build()

    def _build(self) -> None:
        self._pairs: dict[nn.Module, nn.Module] = {}
        self._configs: dict[int, tuple[Any, Any]] = {}
        self._known: dict[int, tuple[Any, Any]] = {}
        self.root = self._copy(self.original)
        self._children = [(original, _children_of(original)) for original in self._pairs]

    def refresh(self) -> None:
        """Takes over what has been changed in the originals: attributes, modes, modules."""
        if any(_children_of(original) != children for original, children in self._children):
            self._build()
            return
        self._known, self._configs = self._configs, {}
        for config, ours in self._known.values():
            ours.__dict__.update(vars(config))
        for original, twin in self._pairs.items():
            if "_orig_mod" not in twin._modules:
                self._update(original, twin)

    @property
    def configs(self) -> list[Any]:
        """The configurations of the copies, as they were before anything was set on them."""
        return [ours for _, ours in self._configs.values()]

    def bypassed(self) -> bool:
        """Whether a module has a forward of its own that may run the original in its place."""
        return any(
            "forward" in vars(twin) and getattr(vars(twin)["forward"], "__self__", None) is not twin
            for twin in self._pairs.values()
            if "_orig_mod" not in twin._modules
        )

    def _copy(self, original: nn.Module) -> nn.Module:
        if (twin := self._pairs.get(original)) is not None:
            return twin
        if isinstance(original, torch.jit.ScriptModule):  # it has no parts to be run otherwise
            return original
        compiled = original._modules.get("_orig_mod")
        if compiled is not None:  # by torch.compile: it would run the original
            compiler: Any = getattr(original, "dynamo_ctx", torch.compile)
            self._pairs[original] = twin = compiler(self._copy(compiled))
            return twin
        kind = self._classes.get(type(original), type(original))
        # Not the class's own way, which may want what its constructor does.
        self._pairs[original] = twin = object.__new__(kind)
        self._update(original, twin)
        twin._modules = {
            name: None if child is None else self._copy(child)
            for name, child in original._modules.items()
        }
        return twin

    def _update(self, original: nn.Module, twin: nn.Module) -> None:
        attributes = vars(original) | {"_modules": twin.__dict__.get("_modules")}
        config = attributes.get("config")
        if hasattr(config, "_attn_implementation"):  # of transformers
            if id(config) not in self._configs:
                known = self._known.get(id(config))
                self._configs[id(config)] = known or (config, copy.copy(config))
            attributes["config"] = self._configs[id(config)][1]
        if attributes.pop("_compiled_call_impl", None) is not None:  # module.compile()
            ours = twin.__dict__.get("_compiled_call_impl") or torch.compile(twin._call_impl)
            attributes["_compiled_call_impl"] = ours
        if "forward" in attributes:  # set on the instance
            attributes["forward"] = _bound_to(twin, original, attributes["forward"])
        twin.__dict__.clear()  # of what the original has no more
        twin.__dict__.update(attributes)


def _children_of(module: nn.Module) -> tuple[Any, ...]:
    return type(module), *module._modules, *map(id, module._modules.values())


def _bound_to(twin: nn.Module, original: nn.Module, forward: Any) -> Any:
    """A method of the original as one of its twin; what is no method stays as it is."""
    if isinstance(forward, types.MethodType) and forward.__self__ is original:
        return types.MethodType(forward.__func__, twin)
    return forward


class Relayered:
    """A module with other layers in one list of modules, and all else shared.

    Args:
        root: The module.
        path: Of the list in it.
        layers: That are to run instead.
    """

    def __init__(self, root: nn.Module, path: str, layers: list[nn.Module]) -> None:
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        self.root = self._copy(root, path, layers)
        self.refresh()

    def refresh(self) -> None:
        """Takes over what has been changed in the attributes of the originals."""
        for original, twin in self._pairs:
            modules = twin._modules
            twin.__dict__.clear()
            twin.__dict__.update(vars(original))
            twin._modules = modules
            # One that was set on the instance, and is none of its methods, would run the original
            # with all its layers.
            forward = _bound_to(twin, original, twin.__dict__.pop("forward", None))
            if getattr(forward, "__self__", None) is twin:
                twin.__dict__["forward"] = forward

    def _copy(self, original: nn.Module, path: str, layers: list[nn.Module]) -> nn.Module:
        name, _, rest = path.partition(".")
        child = getattr(original, name)
        twin = object.__new__(type(original))
        self._pairs.append((original, twin))
        layered = self._copy(child, rest, layers) if rest else nn.ModuleList(layers)
        twin.__dict__["_modules"] = original._modules | {name: layered}
        return twin
