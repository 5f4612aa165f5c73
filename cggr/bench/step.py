"""CGGRModel's training step, forward and backward, against dense steps of the same model.

Llamas of random weights in bfloat16, without an optimizer. ``peak_bytes`` is the most memory in use
during a step that begins without gradients: weights, gradients and everything between; of a CUDA
graph, during the same step before it is captured.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cggr.bench.linear import peak_memory
from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.statistics import load_050
from cggr.bench.timing import Call, Contestant, Progress, add_ratio, captured, measure, rows_of
from cggr.torch import CGGRModel, create_truncated_router
from cggr.torch.router import room_for_graphs
from cggr.torch.twin import Twin

RATIOS = (0.25, 0.10, 0.50)
ROUTER_LAYERS = 2  # as in cggr 0.5.0
MODES = ("eager", "compiled", "graph", "compiled graph")
DENSE, LIGER = "dense", "dense, Liger"
UNMASKED = "dense, no mask"
# Liger's loss cannot be captured, and without a graph a small model's step waits for the host.
FASTEST = ("dense, Liger, compiled, no mask", f"{UNMASKED}, compiled graph")

Step = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class StepCase(Case):
    """The shape of a model and of its batch.

    Args:
        name: Of the model whose shape it is.
        batch: Sequences.
        layers: Of the model.
        heads: Of attention.
        kv_heads: Heads of keys and values.
        intermediate_size: Of the feed-forward layers.
    """

    name: str = ""
    batch: int = 1
    layers: int = 1
    heads: int = 1
    kv_heads: int = 1
    intermediate_size: int = 1

    @property
    def title(self) -> str:
        """The shape in words."""
        return f"{self.name}, {self.batch} x {self.length:,} {self.dtype}"

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.n_rows // self.batch

    @property
    def operations(self) -> int:
        """Of a forward pass: two for every weight and token, and every query, key and value."""
        width = self.hidden_size or 0
        attention = 2 * width * (width + width * self.kv_heads // self.heads)
        weights = self.layers * (attention + 3 * width * self.intermediate_size)
        pairs = self.n_rows * (self.length + 1) // 2
        head = self.n_classes * width
        return 2 * self.n_rows * (weights + head) + 4 * self.layers * width * pairs

    def of_batch(self, batch: int) -> StepCase:
        """The same with another number of sequences."""
        return dataclasses.replace(self, batch=batch, n_rows=batch * self.length)


# fmt: off
CASES = (
    StepCase(16 * 1024, 49152, 576, "bfloat16", "SmolLM-135M", 16, 30, 9, 3, 1536),
    StepCase(8 * 1024, 49152, 2048, "bfloat16", "SmolLM-1.7B", 8, 24, 32, 32, 8192),
    StepCase(16 * 1024, 49152, 960, "bfloat16", "SmolLM-360M", 16, 32, 15, 5, 2560),
    StepCase(8 * 1024, 49152, 2048, "bfloat16", "SmolLM-1.7B", 2, 24, 32, 32, 8192),
    StepCase(16 * 1024, 49152, 2048, "bfloat16", "SmolLM-1.7B", 1, 24, 32, 32, 8192),
    StepCase(8 * 1024, 32000, 4096, "bfloat16", "8 layers of Llama-2-7B", 2, 8, 32, 32, 11008),
)
# fmt: on


def make_model(case: StepCase, seed: int, device: str = "cuda") -> Any:
    """A Llama of this shape, in training mode."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=case.n_classes,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=case.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    drawn_on = [] if device == "cpu" else [torch.device(device)]
    with torch.random.fork_rng(drawn_on), torch.device(device):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    return model.to(getattr(torch, case.dtype)).train()


def _plain(compiled: bool, model: Any, ids: Tensor, *, masked: bool = True) -> Step:
    """The step of transformers' own loss."""
    run, others = (model, dict) if masked else _without_mask(model)
    if compiled:
        run = torch.compile(run, dynamic=False)
    return lambda: run(ids, labels=ids, **others()).loss


def _liger(compiled: bool, model: Any, ids: Tensor, *, masked: bool = True) -> Step:
    loss_of = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    criterion = loss_of()

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = criterion(
            weight, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        )
        return result

    return _headed(loss, compiled, model, ids, masked=masked)


def _cut_cross_entropy(model: Any, ids: Tensor) -> Step:
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return _headed(loss, True, model, ids)


def _headed(
    loss: Callable[..., Tensor], compiled: bool, model: Any, ids: Tensor, *, masked: bool = True
) -> Step:
    """The step of a loss of hidden states, the head's weight and targets."""
    base, others = (model.model, dict) if masked else _without_mask(model.model)
    if compiled:
        base = torch.compile(base, dynamic=False)
    return lambda: loss(base(ids, **others())[0][:, :-1], model.lm_head.weight, ids[:, 1:])


def _without_mask(model: Any) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """The model, and what else to call it with, for attention as fast as in our first pass.

    In compiled and captured steps transformers gives attention a mask where being causal would do.
    """
    from cggr.torch.row_attention import take_over
    from cggr.torch.row_cache import RowCache

    twin = Twin(model)
    take_over(twin.configs)
    # With a cache, the model does not look for packed sequences, of which a mask would tell.
    return twin.root, lambda: {"past_key_values": RowCache(records=False)}


def _cggr(
    split: str,
    ratio: float,
    compiled: bool,
    model: Any,
    ids: Tensor,
    *,
    rule: str = "stratified",
    routed: bool = False,
    first_pass: str = "exact",
    whole: bool = False,
) -> Step:
    inner: Any = torch.compile(model, dynamic=False) if compiled and not whole else model
    wrapped = CGGRModel(
        inner,
        create_truncated_router(model, ROUTER_LAYERS) if routed else None,
        split=split,
        selection=rule,
        capacity="static",
        first_pass=first_pass,
        min_tokens_ratio=ratio,
        warmup_steps=0,
        dynamic_threshold=False,
    ).to(ids.device)
    if whole:
        wrapped.compile(dynamic=False)
    return lambda: wrapped(ids, labels=ids)


def _cggr_050(folder: Path | None, model: Any, ids: Tensor) -> Step:
    module = load_050(folder, "cggr")
    router = module.create_truncated_router(model, num_layers=ROUTER_LAYERS)
    wrapped = module.CGGRModel(model, router=router, min_tokens_ratio=0.25, warmup_steps=0)
    wrapped = wrapped.to(ids.device)
    return lambda: wrapped(ids, labels=ids)


class Way(NamedTuple):
    """A way to make a training step.

    Attributes:
        name: As the report calls it.
        make: From a model and its inputs to a function that computes the loss.
        mode: Which executes it: eager, compiled, graph (one CUDA graph), compiled graph, or
            compiled whole graph, where scores and selection are compiled with the model.
        forwards: Its operations in those of a forward pass over everything, given the layers that
            score, as a part of all; a backward pass has those of two.
        may_fail: Whether the others go on without it.
    """

    name: str
    make: Callable[[Any, Tensor], Step]
    mode: str = "eager"
    forwards: Callable[[float], float] = lambda scoring: 3.0
    may_fail: bool = True


def ways(settings: BenchSettings) -> tuple[Way, ...]:
    """All that are compared, the dense step first."""
    found = [
        Way(DENSE, functools.partial(_plain, False)),
        Way("dense, graph", functools.partial(_plain, False), "graph"),
        Way(LIGER, functools.partial(_liger, False)),
        Way("dense, Liger, compiled", functools.partial(_liger, True), "compiled"),
        Way(FASTEST[0], functools.partial(_liger, True, masked=False), "compiled"),
        Way("dense, cut-cross-entropy, compiled", _cut_cross_entropy, "compiled"),
        # Neither of the losses above can be captured: they ask the device.
        Way("dense, compiled graph", functools.partial(_plain, True), "compiled graph"),
        *(
            Way(f"{UNMASKED}, {mode}", functools.partial(_plain, compiled, masked=False), mode)
            for compiled, mode in ((False, "graph"), (True, "compiled graph"))
        ),
        Way(
            "cggr 0.5.0, ratio 0.25",
            functools.partial(_cggr_050, settings.cggr_050),
            forwards=lambda scoring: scoring + 0.75,
        ),
    ]

    def add(name: str, split: str, ratio: float, mode: str, **options: Any) -> None:
        make = functools.partial(_cggr, split, ratio, "compiled" in mode, **options)
        routed = options.get("routed", False)

        def forwards(scoring: float) -> float:
            if split == "sequence":
                return 3 * ratio + (scoring if routed else 0.0)
            if split == "backward":
                return 1 + 2 * ratio
            return 1 + 2 * ratio + ratio * (scoring if routed else 1.0)

        # Not every device has float8.
        may_fail = split != "token" or options.get("first_pass") == "float8"
        name = name if mode == "eager" else f"{name}, {mode}"
        found.append(Way(name, make, mode, forwards, may_fail))

    for mode in MODES:
        add("random sequences, ratio 0.25", "sequence", 0.25, mode, rule="random")
        add("sequence, ratio 0.25", "sequence", 0.25, mode, routed=True)
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("", {}),
        (f"{ROUTER_LAYERS} layers score, ", {"routed": True}),
        ("float8 first, ", {"first_pass": "float8"}),
    )
    for ratio, mode, (kind, options) in itertools.product(RATIOS, MODES, kinds):
        add(f"token, {kind}ratio {ratio:g}", "token", ratio, mode, **options)
    for ratio, mode in itertools.product((0.25, 0.5), MODES):
        add(f"backward, ratio {ratio:g}", "backward", ratio, mode)
    for ratio, split in itertools.product((0.25, 0.5), ("token", "backward")):
        add(f"{split}, ratio {ratio:g}", split, ratio, "compiled whole graph", whole=True)
    return tuple(found)


def make_ids(case: StepCase, seed: int, device: torch.device) -> Tensor:
    """Random tokens ``(B, S)``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(case.n_classes, (case.batch, case.length), generator=generator)
    return ids.to(device)


def contestant_of(
    way: Way, model: Any, ids: Tensor, pool: Any, name: str | None = None
) -> Contestant:
    """One way to train this model on these inputs; `name` is the way's if None.

    All graphs of a model share the memory `pool`: each alone needs gigabytes.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    needs: dict[str, int] = {}

    def prepare() -> Call:
        loss_of = way.make(model, ids)

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            return loss.detach()

        step()  # compiles
        model.zero_grad(set_to_none=True)
        peak, _ = peak_memory(step)  # a graph's memory is its own, and not to be told apart
        needs["peak_bytes"] = weights + peak
        return captured(step, pool) if way.mode.endswith("graph") else step

    def observe(step: Call) -> dict[str, Any]:
        return {"loss": float(step()), **needs}

    return Contestant(way.name if name is None else name, prepare, observe, way.may_fail)


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    if not isinstance(case, StepCase):
        raise TypeError(f"case must be a StepCase, got {case!r}.")
    return run_ways(case, settings, progress, ways(settings))


def run_ways(
    case: StepCase, settings: BenchSettings, progress: Progress, found: Sequence[Way]
) -> list[dict[str, Any]]:
    """Measures these ways in one case."""
    model = make_model(case, settings.seed)
    ids = make_ids(case, settings.seed, model.device)
    torch._dynamo.reset()
    pool = torch.cuda.graph_pool_handle()
    contestants = [contestant_of(way, model, ids, pool) for way in found]
    # All models of transformers share one function; the ninth way would not be compiled.
    with room_for_graphs():
        rows = rows_of(measure(contestants, settings, progress))
    model.zero_grad(set_to_none=True)
    forwards = {way.name: way.forwards(ROUTER_LAYERS / case.layers) for way in found}
    for row in rows:
        if "ms" in row:
            seconds = row["ms"] * 1e-3
            row["tokens_per_s"] = case.n_rows / seconds
            row["flops"] = forwards[row["contestant"]] * case.operations / seconds
    compare(rows)
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds times relative to the eager and the fastest dense step, and memory to Liger's."""
    add_ratio(rows, "to_dense", "ms", DENSE)
    add_ratio(rows, "memory_to_liger", "peak_bytes", LIGER)
    compiled = [row for row in rows if row["contestant"] in FASTEST and "ms" in row]
    if compiled:
        fastest = min(compiled, key=lambda row: row["ms"])
        add_ratio(rows, "to_compiled", "ms", fastest["contestant"])


BENCHMARK = Benchmark(
    cases=CASES,
    measure=run,
    columns=(
        *TIMES,
        Column("of dense", number("to_dense", ".3f")),
        Column("of fastest", number("to_compiled", ".3f")),
        Column("k tokens/s", number("tokens_per_s", ".0f", 1e3)),
        Column("TFLOP/s", number("flops", ".0f", 1e12)),
        Column("peak GiB", number("peak_bytes", ".2f", 2**30)),
        Column("of Liger's", number("memory_to_liger", ".3f")),
        Column("loss", number("loss", ".3f")),
    ),
)
