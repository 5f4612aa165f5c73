"""A training step as CUDA graphs: the host starts one thing in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cggr.torch.model import CGGRModel
from cggr.torch.router import room_for_graphs


class CapturedStep:
    """Forward and backward pass of a :class:`CGGRModel` in a CUDA graph, which is replayed.

    Scoring, selection, both passes, the loss and the gradients are in it; the optimizer is not.
    Call it in place of the model and of ``loss.backward()``. As ever, gradients add up over calls
    until they are set to None.

    The first call captures the graph, after some eager steps on its batch, which leave no trace.
    So does the first call that adds to gradients, and, with new graphs in place of the former ones,
    the first at another capacity of the schedule (four at most over a run) or under another
    autocast. What a graph reads and writes stays where it is: the gradients are the same tensors
    after every call. What is changed in the model later, other than the values of its parameters
    and buffers, a graph does not see. While one is captured, no loss of the same parameters may be
    alive that an eager step computed.

    Args:
        model: In training mode, on a CUDA device, with ``capacity="static"``. What it wraps may be
            compiled, which makes the graph faster still; or all of it, by ``model.compile()``.
        backward: Called with the loss, to compute the gradients: with a GradScaler,
            ``lambda loss: scaler.scale(loss).backward()``.
        warm_up: Eager steps before a capture, for what is allocated, compiled or tuned only once.

    Raises:
        TypeError: `model` is no CGGRModel.
        ValueError: Its capacity is not static, its parameters are not on one CUDA device, one of
            them has a hook that is called when its gradient is there, or `warm_up` is less than 1.

    Example:
        >>> def train(cggr_model, optimizer, batches):
        ...     step = CapturedStep(cggr_model)
        ...     for batch in batches:
        ...         loss = step(**batch)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         cggr_model.step()
    """

    def __init__(
        self,
        model: CGGRModel,
        *,
        backward: Callable[[Tensor], object] = Tensor.backward,
        warm_up: int = 3,
    ) -> None:
        if not isinstance(model, CGGRModel):
            raise TypeError(f"model must be a CGGRModel, got {type(model).__name__}.")
        if model.scorer.capacity != "static":
            raise ValueError(
                f"the capacity of model must be 'static' for its step to be captured, got "
                f"{model.scorer.capacity!r}."
            )
        if warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {warm_up}.")
        for name, p in model.named_parameters():
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"{name} has a hook after its gradient is accumulated, which would run in the "
                    f"warm-up and never again: remove it before the step is captured."
                )
        self.model = model
        self.device = _cuda_device(model)
        model.scorer.follow(self.device)
        self.warm_up = warm_up
        self._backward = backward
        self._stream = _stream(self.device)
        self._inputs: dict[str, Any] = {}
        self._was_captured = False
        self._state: Any = None
        self._graphs: dict[bool, _Graph] = {}  # by whether gradients are there to be added to

    def __call__(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """The loss of a batch, whose gradients are computed.

        Args:
            input_ids: As of :meth:`CGGRModel.forward`, on any device; memory that is pinned is
                copied without a wait.
            labels: Likewise.
            **inputs: Likewise: tensors, which get no gradient, and ``num_items_in_batch``;
                anything else must be the same in all calls.

        Returns:
            Scalar loss, without a graph to go back through.

        Raises:
            TypeError: An input is a container of tensors, or no tensor where there was one.
            ValueError: The model is in eval mode; there are no labels; an input wants a gradient;
                or the inputs are not those of the first call, other than in their values.
        """
        if not self.model.training:
            raise ValueError("model is in eval mode, whose loss has no step: call the model.")
        if labels is None:
            raise ValueError("labels is None: without labels there is no loss.")
        inputs |= {"input_ids": input_ids, "labels": labels}
        state = (self.model.scorer.level, _autocast())
        if state != self._state:
            self._graphs, self._state = {}, state
        self._take({name: x for name, x in inputs.items() if x is not None})
        if (first := self._graphs.get(False)) is None:
            no_gradients = [None for _ in self.model.parameters()]
            first = self._graphs[False] = self._captured(no_gradients, None)
            self._was_captured = True
        adds = any(p.grad is not None for p, _ in first.gradients)
        if adds:
            for p, gradient in first.gradients:
                _become(gradient, p.grad)
                p.grad = gradient
            if True not in self._graphs:
                gradients = [p.grad for p in self.model.parameters()]
                self._graphs[True] = self._captured(gradients, first.graph.pool())
        graph = self._graphs[adds]
        graph.graph.replay()
        for p, gradient in first.gradients:
            p.grad = gradient
        self.model.scorer.latest = graph.metrics
        return graph.loss.clone()

    def _take(self, given: dict[str, Any]) -> None:
        """Writes the inputs to where the graph reads them."""
        if not self._was_captured:
            self._inputs = {name: _place_for(name, x, self.device) for name, x in given.items()}
        if self._inputs.keys() != given.keys():
            raise ValueError(
                f"inputs must be those of the first call, {sorted(self._inputs)}, got "
                f"{sorted(given)}."
            )
        for name, place in self._inputs.items():
            _check(name, place, given[name])
        with torch.no_grad():
            for name, place in self._inputs.items():
                if isinstance(given[name], Tensor):
                    place.copy_(given[name], non_blocking=True)
                elif isinstance(place, Tensor):
                    place.fill_(given[name])

    def _captured(self, gradients: Sequence[Tensor | None], pool: Any) -> _Graph:
        """A graph of the step, which begins with these gradients; it leaves all as it is."""
        scorer, parameters = self.model.scorer, list(self.model.parameters())
        before, metrics = [p.grad for p in parameters], scorer.latest
        values = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            try:
                _warm_up(self._first_step, self.warm_up, self._stream)
            finally:
                for buffer, value in values:
                    buffer.copy_(value)
            self._set_gradients(gradients)
            graph, loss = _record(self._run, pool, self._stream)
            found = [(p, p.grad) for p in parameters if p.grad is not None]
            return _Graph(graph, loss, scorer.latest, found)
        finally:
            torch.clear_autocast_cache()  # of weights that only this graph may read
            self._set_gradients(before)
            scorer.latest = metrics

    def _first_step(self) -> None:
        self._set_gradients([None for _ in self.model.parameters()])
        self._run()

    def _run(self) -> Tensor:
        # What autocast converted before is not to be found: the graph would never convert it again.
        torch.clear_autocast_cache()
        with room_for_graphs():  # a compiled model has one for every capacity
            loss: Tensor = self.model(**self._inputs)
        with torch.autocast("cuda", enabled=False):
            self._backward(loss)
        return loss.detach()

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self.model.parameters(), gradients, strict=True):
            p.grad = gradient


class _Graph(NamedTuple):
    """A captured step, and where it leaves what it computes."""

    graph: torch.cuda.CUDAGraph
    loss: Tensor
    metrics: dict[str, Any]
    gradients: list[tuple[nn.Parameter, Tensor]]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _warm_up(step: Callable[[], object], times: int, stream: torch.cuda.Stream) -> None:
    """Runs a step as a capture wants it: on a stream of its own, and drawing nothing."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.random.fork_rng([stream.device]), torch.cuda.stream(stream):
        for _ in range(times):
            step()
    here.wait_stream(stream)


def _record(
    step: Callable[[], Tensor], pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a step, and what it returns, whose memory the graph keeps."""
    with torch.cuda.device(stream.device):
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins memory, are none of its business.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            result = step()
    return graph, result


def _cuda_device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or (device := next(iter(devices))).type != "cuda":
        raise ValueError(
            f"the parameters of model must be on one CUDA device for its step to be captured, got "
            f"{', '.join(sorted(map(str, devices)))}."
        )
    return device


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _place_for(name: str, x: Any, device: torch.device) -> Any:
    """Memory for the values of an input; the input itself if it has none."""
    if isinstance(x, Tensor):
        return torch.empty_like(x, device=device, requires_grad=False)
    if name == "num_items_in_batch":
        if isinstance(x, bool) or not isinstance(x, int):
            raise TypeError(f"{name} must be an integer or a tensor, got {x!r}.")
        return torch.empty((), dtype=torch.int64, device=device)
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(x)):
        raise TypeError(f"{name} must be a tensor or a constant, got a {type(x).__name__} of them.")
    return x


def _check(name: str, place: Any, x: Any) -> None:
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which it would not get: detach it.")
    if not isinstance(place, Tensor):
        if place is not x and place != x:
            raise ValueError(f"{name} must be {place!r} as in the first call, got {x!r}.")
    elif isinstance(x, Tensor):
        if (x.shape, x.dtype) != (place.shape, place.dtype):
            raise ValueError(
                f"{name} must be {place.dtype} of shape {tuple(place.shape)} as in the first call, "
                f"got {x.dtype} of shape {tuple(x.shape)}."
            )
    elif isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name} must be a tensor as in the first call, got {x!r}.")


def _become(gradient: Tensor, other: Tensor | None) -> None:
    """Gives a gradient the values of another, zeros for None."""
    if other is None:
        gradient.zero_()
    elif other is not gradient:
        gradient.copy_(other)
