"""What a backward pass of sampled rows learns, step for step, whatever its speed.

    python benchmarks/evidence/sampled_backward.py --model runs/base/model --text texts/cpp

Ways to fine-tune a Llama: dense, also of fewer sequences; with a quarter of the rows of the final
hidden states' gradient, drawn uniformly or by their norms and weighted to be unbiased, and a full
backward pass from there on (the head's own gradient is that of all tokens); and with such a draw at
every layer's output, as in VCAS (arXiv 2402.17227), whose backward pass would need few rows. Rows
that are not drawn are zeros here and cost what they did: the question is what such gradients are
worth, before anybody makes them cheap.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from cggr.race import pretrained, text, tokens
from cggr.race.engine import learning_rate
from cggr.race.torch_lanes import find_device, heldout_loss, load_folder

FLOOR = 0.1  # of the mean norm, added to every norm: each row can be drawn


class Way(NamedTuple):
    """Which part of the rows is drawn.

    Attributes:
        name: As the report calls it.
        steps: Optimizer steps.
        last: Part of the final hidden states; None for all.
        layer: Part of a layer's output, from how deep it lies, 0 to 1; None for all.
        by_norm: Whether rows are drawn by the norms of their gradients, or uniformly.
        sequences: Part of the batch.
    """

    name: str
    steps: int = 636
    last: float | None = None
    layer: Callable[[float], float] | None = None
    by_norm: bool = True
    sequences: float = 1.0


# The steps of the later ones cost about what 636 dense ones do: a forward pass, and of the backward
# pass the drawn rows, but for keys and values, a sixth of a layer's weights; less 5 to 8 % for the
# drawing.
WAYS = (
    Way("dense"),
    Way("dense, half the batch", sequences=0.5),
    Way("dense, a quarter", sequences=0.25),
    Way("last 0.25, uniformly", last=0.25, by_norm=False),
    Way("last 0.25", last=0.25),
    Way("last 0.5", last=0.5),
    Way("last and layers 0.25", last=0.25, layer=lambda depth: 0.25),
    Way("last and layers 0.25", 1000, last=0.25, layer=lambda depth: 0.25),
    Way("last and layers 0.5", 840, last=0.5, layer=lambda depth: 0.5),
    Way("last 0.25, layers 0.25 to 0.5", 900, last=0.25, layer=lambda depth: 0.5 - 0.25 * depth),
)


class _DrawnRows(torch.autograd.Function):
    """`x` itself; of its gradient's rows some, by priority sampling, weighted to be unbiased."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: float, by_norm: bool) -> Tensor:
        ctx.ratio, ctx.by_norm = ratio, by_norm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        norm_BS = grad.float().norm(dim=-1)
        if not ctx.by_norm:
            norm_BS = torch.ones_like(norm_BS)
        q_BS = norm_BS + FLOOR * norm_BS.mean() + 1e-30
        priority_BS = q_BS / torch.rand_like(q_BS).clamp_(min=1e-7)
        tau = priority_BS.flatten().topk(int(ctx.ratio * q_BS.numel()) + 1).values[-1]
        weight_BS = torch.where(priority_BS > tau, (tau / q_BS).clamp(min=1.0), 0.0)
        return grad * weight_BS[..., None].to(grad.dtype), None, None


def draw(module: torch.nn.Module, ratio: float, by_norm: bool) -> None:
    """Lets only drawn rows of the gradient into a module that returns hidden states."""
    module.register_forward_hook(lambda _, __, hidden: _DrawnRows.apply(hidden, ratio, by_norm))


def train(way: Way, model: Any, batch: tokens.BatchFunction, peak: float) -> None:
    """Fine-tunes the model, in bfloat16 by autocast, with the optimizer of ``cggr race``."""
    if way.last is not None:
        draw(model.model.norm, way.last, way.by_norm)
    layers = model.model.layers
    for i, layer in enumerate(layers[:-1]):
        if way.layer is not None:
            draw(layer, way.layer(i / (len(layers) - 1)), way.by_norm)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(way.steps):
        ids = torch.from_numpy(batch(step).ids).to(model.device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / way.steps, peak)
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model.lm_head(model.model(input_ids=ids).last_hidden_state)
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Trains in every way and prints the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=float, default=1.0, help="part of the steps")
    numbers = range(1, len(WAYS) + 1)
    parser.add_argument("--ways", type=int, nargs="+", default=numbers, choices=numbers)
    options = parser.parse_args()
    device = find_device("auto")
    tokenizer, end_of_text = pretrained.load_tokenizer(options.model)
    split = text.split_documents(*text.read_documents([options.text]))
    corpus = tokens.prepare(
        split,
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer=tokenizer,
        end_of_text=end_of_text,
    )
    console = Console()
    for way in (WAYS[number - 1] for number in options.ways):
        batch = tokens.batches(
            corpus.training,
            batch_size=max(1, round(way.sequences * options.batch_size)),
            sequence_length=options.length,
            seed=0,
        )
        torch.manual_seed(0)
        model = load_folder(options.model, torch.float32).to(device).train()
        model.config.use_cache = False
        way = way._replace(steps=max(1, round(way.steps * options.steps)))
        train(way, model, batch, options.learning_rate)
        loss = heldout_loss(model.eval(), corpus.heldout, options.length)
        console.print(f"{way.name:32} {way.steps:5} steps  loss {loss:.4f}", highlight=False)


if __name__ == "__main__":
    main()
