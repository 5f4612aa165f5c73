"""CGGRModel's training step, forward and backward, against dense steps of the same model.

Llamas of random weights in bfloat16, without an optimizer. ``peak_bytes`` is the most memory in use
during a step that begins without gradients: weights, gradients and everything between.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cggr.bench.linear import peak_memory
from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.statistics import load_050
from cggr.bench.timing import Call, Contestant, Progress, measure, rows_of
from cggr.torch import CGGRModel

RATIOS = (0.25, 0.10)
DENSE = "dense"

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
        return f"{self.name}, {self.batch} x {self.n_rows // self.batch:,} {self.dtype}"


CASES = (
    StepCase(16 * 1024, 49152, 576, "bfloat16", "SmolLM-135M", 16, 30, 9, 3, 1536),
    StepCase(8 * 1024, 49152, 2048, "bfloat16", "SmolLM-1.7B", 8, 24, 32, 32, 8192),
)


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
        max_position_embeddings=case.n_rows // case.batch,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
    return model.to(getattr(torch, case.dtype)).train()


def _plain(model: Any, ids: Tensor) -> Step:
    return lambda: model(ids, labels=ids).loss


def _liger(compiled: bool, model: Any, ids: Tensor) -> Step:
    loss_of = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    criterion = loss_of()
    base = torch.compile(model.model, dynamic=False) if compiled else model.model

    def step() -> Tensor:
        hidden = base(ids)[0][:, :-1]
        loss: Tensor = criterion(
            model.lm_head.weight, hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
        )
        return loss

    return step


def _cggr(split: str, ratio: float, compiled: bool, model: Any, ids: Tensor) -> Step:
    inner: Any = torch.compile(model, dynamic=False) if compiled else model
    wrapped = CGGRModel(
        inner,
        split=split,
        selection="stratified",
        capacity="static",
        min_tokens_ratio=ratio,
        warmup_steps=0,
        dynamic_threshold=False,
    ).to(ids.device)
    return lambda: wrapped(ids, labels=ids)


def _cggr_050(folder: Path | None, model: Any, ids: Tensor) -> Step:
    module = load_050(folder, "cggr")
    router = module.create_truncated_router(model, num_layers=2)
    wrapped = module.CGGRModel(model, router=router, min_tokens_ratio=0.25, warmup_steps=0)
    wrapped = wrapped.to(ids.device)
    return lambda: wrapped(ids, labels=ids)


def captured(step: Call, model: nn.Module) -> Call:
    """The step as one CUDA graph, which writes the gradients anew at each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # allocates and compiles what a capture must not
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def run(case: Case, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    if not isinstance(case, StepCase):
        raise TypeError(f"case must be a StepCase, got {case!r}.")
    model = make_model(case, settings.seed)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (case.batch, case.n_rows // case.batch)
    ids = torch.randint(case.n_classes, shape, generator=generator).to(model.device)

    def contestant(name: str, make: Callable[[Any, Tensor], Step], *, graph: bool = False) -> Any:
        def prepare() -> Call:
            loss_of = make(model, ids)

            def step() -> Tensor:
                model.zero_grad(set_to_none=True)
                loss = loss_of()
                loss.backward()
                return loss.detach()

            return captured(step, model) if graph else step

        def observe(step: Call) -> dict[str, Any]:
            if graph:  # its memory is its own, and not to be told from outside
                return {"loss": float(step())}
            model.zero_grad(set_to_none=True)
            peak, loss = peak_memory(step)
            return {"peak_bytes": weights + peak, "loss": float(loss)}

        return Contestant(name, prepare, observe, may_fail=not name.startswith("token"))

    torch._dynamo.reset()
    token = [functools.partial(_cggr, "token", ratio) for ratio in RATIOS]
    contestants = (
        contestant(DENSE, _plain),
        contestant("dense, Liger", functools.partial(_liger, False)),
        contestant("dense, compiled, Liger", functools.partial(_liger, True)),
        contestant("cggr 0.5.0, ratio 0.25", functools.partial(_cggr_050, settings.cggr_050)),
        contestant("sequence, ratio 0.25", functools.partial(_cggr, "sequence", 0.25, False)),
        *(
            contestant(f"token, ratio {ratio:g}", functools.partial(make, False))
            for ratio, make in zip(RATIOS, token, strict=True)
        ),
        *(
            contestant(f"token, ratio {ratio:g}, compiled", functools.partial(make, True))
            for ratio, make in zip(RATIOS, token, strict=True)
        ),
        *(
            contestant(f"token, ratio {ratio:g}, graph", functools.partial(make, False), graph=True)
            for ratio, make in zip(RATIOS, token, strict=True)
        ),
    )
    rows = rows_of(measure(contestants, settings, progress))
    model.zero_grad(set_to_none=True)
    compare(rows)
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds times and memory relative to the dense steps, of which memory to Liger's."""
    by_name = {row["contestant"]: row for row in rows if "ms" in row}
    for row in by_name.values():
        if DENSE in by_name:
            row["to_dense"] = row["ms"] / by_name[DENSE]["ms"]
        if "peak_bytes" in row and "dense, Liger" in by_name:
            row["memory_to_liger"] = row["peak_bytes"] / by_name["dense, Liger"]["peak_bytes"]


BENCHMARK = Benchmark(
    cases=CASES,
    measure=run,
    columns=(
        *TIMES,
        Column("of dense", number("to_dense", ".3f")),
        Column("peak GiB", number("peak_bytes", ".2f", 2**30)),
        Column("of Liger's", number("memory_to_liger", ".3f")),
        Column("loss", number("loss", ".3f")),
    ),
)
