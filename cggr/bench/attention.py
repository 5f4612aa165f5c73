"""Attention of selected positions: our kernels, sdpa with a mask, causal sdpa of all positions.

And causal sdpa of shorter sequences, in which queries see as many keys in all. Each is a CUDA
graph. Queries, keys and values are N(0, 1); the queries are at random positions, and see what is
before them. TFLOP/s count two products of every query and every key that it sees, forward. Errors
are the largest of the first head, of the output and of its query's gradient, relative to their
largest entry in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cggr.bench.main import Benchmark
from cggr.bench.report import TIMES, Column, number
from cggr.bench.settings import BenchSettings, Shape
from cggr.bench.timing import Call, Contestant, Progress, captured, measure, rows_of
from cggr.torch import selected_attention

OURS, MASKED, EAGER = "selected attention", "sdpa with a mask", "scores in memory"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclasses.dataclass(frozen=True)
class AttentionCase(Shape):
    """The shape of attention.

    Args:
        name: Of the model whose shape it is.
        batch: B.
        length: S.
        heads: H.
        kv_heads: K.
        width: W.
        ratio: Of the positions that are selected.
        dtype: As PyTorch names it.
    """

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    ratio: float = 0.25
    dtype: str = "bfloat16"

    @property
    def title(self) -> str:
        """The shape in words."""
        return f"{self.name}, {self.batch} x {self.length:,}, ratio {self.ratio:g}, {self.dtype}"

    @property
    def n_rows(self) -> int:
        """C."""
        return max(1, round(self.ratio * self.length))


CASES = (
    AttentionCase("SmolLM-1.7B", 8, 1024, 32, 32, 64),
    AttentionCase("SmolLM-135M", 16, 1024, 9, 3, 64),
    AttentionCase("SmolLM-1.7B", 1, 16384, 32, 32, 64),
    AttentionCase("SmolLM-1.7B", 1, 16384, 32, 32, 64, ratio=0.1),
    AttentionCase("Llama-3-8B", 1, 8192, 32, 8, 128),
)


class Inputs(NamedTuple):
    """Of attention: heads beside each other in memory, as a model has them.

    Attributes:
        every_BHSW: Queries of all positions.
        query_BHCW: Those of the selected ones.
        key_BKSW: Of all positions.
        value_BKSW: Of all positions.
        index_BC: The selected positions.
    """

    every_BHSW: Tensor
    query_BHCW: Tensor
    key_BKSW: Tensor
    value_BKSW: Tensor
    index_BC: Tensor


def make_inputs(case: AttentionCase, seed: int, device: str = "cuda") -> Inputs:
    """Random inputs, which want gradients."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (case.batch, case.length, heads, case.width)
        x = torch.randn(shape, device=device, dtype=getattr(torch, case.dtype), generator=generator)
        return x.transpose(1, 2)

    every, key, value = normal(case.heads), normal(case.kv_heads), normal(case.kv_heads)
    order = torch.rand(case.batch, case.length, device=device, generator=generator).argsort(1)
    index = order[:, : case.n_rows].sort(1).values.int()
    rows = index.long()[:, None, :, None].expand(-1, case.heads, -1, case.width)
    query = every.gather(2, rows).transpose(1, 2).contiguous().transpose(1, 2)
    for x in (every, query, key, value):
        x.requires_grad_()
    return Inputs(every, query, key, value, index)


def beginning(inputs: Inputs, share: float) -> Inputs:
    """Of the first positions alone, this share of all."""
    n_rows = round(share * inputs.every_BHSW.shape[2])
    first = (
        x.detach()[:, :, :n_rows].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for x in (inputs.every_BHSW, inputs.key_BKSW, inputs.value_BKSW)
    )
    every, key, value = first
    return Inputs(every, every, key, value, inputs.index_BC)


def _ours(index_BC: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    low_BC, high_BC = torch.zeros_like(index_BC), index_BC + 1
    scale = query.shape[3] ** -0.5
    return selected_attention.fused(query, key, value, low_BC, high_BC, index_BC, scale)


def _mask(index_BC: Tensor, key: Tensor, hidden: float) -> Tensor:
    place_S = torch.arange(key.shape[2], device=key.device)
    unseen_B1CS = (place_S > index_BC[..., None])[:, None]
    return torch.zeros(unseen_B1CS.shape, dtype=key.dtype, device=key.device).masked_fill(
        unseen_B1CS, hidden
    )


def _masked(mask_B1CS: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # As in the token split: the heads of a group are queries of the one that they share.
    batch, n_heads, n_rows, width = query.shape
    shared = query.reshape(batch, key.shape[1], -1, width)
    mixed = F.scaled_dot_product_attention(shared, key, value, attn_mask=mask_B1CS)
    return mixed.reshape(batch, n_heads, n_rows, width)


def _eager(mask_B1CS: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + mask_B1CS
    precision = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=precision).to(value.dtype) @ value


def _causal(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )


def run(case: AttentionCase, settings: BenchSettings, progress: Progress) -> list[dict[str, Any]]:
    """Measures one case."""
    inputs = make_inputs(case, settings.seed)
    mask = _mask(inputs.index_BC, inputs.key_BKSW, torch.finfo(inputs.key_BKSW.dtype).min)
    grouped_mask = mask.repeat(1, 1, case.heads // case.kv_heads, 1)
    truth = first_head_truth(inputs)
    contestants = [
        *two_of(OURS, functools.partial(_ours, inputs.index_BC), inputs, truth),
        *two_of(MASKED, functools.partial(_masked, grouped_mask), inputs, truth),
        *two_of(EAGER, functools.partial(_eager, mask), inputs, truth),
    ]
    of_all = {"all": inputs, "as many pairs": beginning(inputs, case.ratio**0.5)}
    for (what, operands), (name, backend) in itertools.product(of_all.items(), BACKENDS.items()):
        attend = functools.partial(_causal, backend)
        contestants += two_of(f"causal sdpa of {what}, {name}", attend, operands, None)
    rows = rows_of(measure(contestants, settings, progress))
    for row in rows:
        if "operations" in row and "ms" in row:
            row["flops"] = row["operations"] / (row["ms"] * 1e-3)
    return rows


def two_of(
    name: str,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: Inputs,
    truth: tuple[Tensor, Tensor] | None,
) -> list[Contestant]:
    """The forward pass, and that with the backward pass; of all positions without a truth."""
    query = inputs.every_BHSW if truth is None else inputs.query_BHCW
    operands = (query, inputs.key_BKSW, inputs.value_BKSW)
    grad = torch.ones_like(query)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*operands)

    def both() -> tuple[Tensor, ...]:
        out = attend(*operands)
        return out, *torch.autograd.grad(out, operands, grad)

    def operations(call: Call) -> dict[str, Any]:
        return {"operations": 4 * query.shape[3] * pairs_of(inputs, truth is None)}

    def errors(call: Call) -> dict[str, Any]:
        if truth is None:
            return {}
        found = zip(("output_error", "gradient_error"), call(), truth, strict=False)
        return {key: _error(x_BHCW, want_CW) for key, x_BHCW, want_CW in found}

    may_fail = name != OURS
    return [
        Contestant(f"{name}, forward", lambda: captured(forward), operations, may_fail),
        Contestant(f"{name}, with gradients", lambda: captured(both), errors, may_fail),
    ]


def pairs_of(inputs: Inputs, every: bool) -> int:
    """Queries of all heads, each with the keys that it sees."""
    batch, heads, length, _ = inputs.every_BHSW.shape
    if every:
        return batch * heads * length * (length + 1) // 2
    return heads * int((inputs.index_BC + 1).sum(dtype=torch.int64))


def first_head_truth(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and gradient of the query, for a gradient of ones, of the first head in float64."""
    query, key, value = (
        x[:1, :1].detach().double() for x in (inputs.query_BHCW, inputs.key_BKSW, inputs.value_BKSW)
    )
    mask = _mask(inputs.index_BC[:1], key, float("-inf"))
    query.requires_grad_()
    out = _eager(mask, query, key, value)
    (gradient,) = torch.autograd.grad(out.sum(), query)
    return out.detach()[0, 0], gradient[0, 0]


def _error(found_BHCW: Tensor, want_CW: Tensor) -> float:
    difference = (found_BHCW[0, 0].double() - want_CW).abs().max()
    return float(difference / want_CW.abs().max())


BENCHMARK = Benchmark(
    cases=CASES,
    measure=run,
    columns=(
        *TIMES,
        Column("TFLOP/s", number("flops", ".0f", 1e12)),
        Column("error", number("output_error", ".1e")),
        Column("of gradient", number("gradient_error", ".1e")),
    ),
)
