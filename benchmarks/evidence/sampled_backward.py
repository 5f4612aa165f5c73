"""What a backward pass of sampled rows learns, step for step, whatever its speed.

    python benchmarks/evidence/sampled_backward.py --model runs/base/model --text texts/cpp

Three ways to fine-tune a Llama: dense; with a quarter of the rows of the final hidden states'
gradient, drawn by their norms and weighted to be unbiased, and a full backward pass from there on
(the head's own gradient is that of all tokens); and with such a draw at every layer's output, as in
VCAS (arXiv 2402.17227), whose backward pass would need few rows. Rows that are not drawn are zeros
here and cost what they did: the question is what such gradients are worth, before anybody makes
them cheap.
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
        last: Part of the final hidden states; None for all.
        layer: Part of a layer's output, from how deep it lies, 0 to 1; None for all.
        steps: Optimizer steps.
    """

    name: str
    last: float | None
    layer: Callable[[float], float] | None
    steps: int


# The steps of the later ones cost about what 636 dense ones do: a forward pass, and of the backward
# pass the drawn rows, but for keys and values, a sixth of a layer's weights; less 5 to 8 % for the
# drawing.
WAYS = (
    Way("dense", None, None, 636),
    Way("last 0.25", 0.25, None, 636),
    Way("last and layers 0.25", 0.25, lambda depth: 0.25, 636),
    Way("last and layers 0.25", 0.25, lambda depth: 0.25, 1000),
    Way("last and layers 0.5", 0.5, lambda depth: 0.5, 840),
    Way("last 0.25, layers 0.25 to 0.5", 0.25, lambda depth: 0.5 - 0.25 * depth, 900),
)


class _DrawnRows(torch.autograd.Function):
    """`x` itself; of its gradient's rows some, by priority sampling, weighted to be unbiased."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: float) -> Tensor:
        ctx.ratio = ratio
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        norm_BS = grad.float().norm(dim=-1)
        q_BS = norm_BS + FLOOR * norm_BS.mean() + 1e-30
        priority_BS = q_BS / torch.rand_like(q_BS).clamp_(min=1e-7)
        tau = priority_BS.flatten().topk(int(ctx.ratio * q_BS.numel()) + 1).values[-1]
        weight_BS = torch.where(priority_BS > tau, (tau / q_BS).clamp(min=1.0), 0.0)
        return grad * weight_BS[..., None].to(grad.dtype), None


def draw(module: torch.nn.Module, ratio: float) -> None:
    """Lets only drawn rows of the gradient into a module that returns hidden states."""
    module.register_forward_hook(lambda _, __, hidden: _DrawnRows.apply(hidden, ratio))


def train(way: Way, model: Any, batch: tokens.BatchFunction, peak: float) -> None:
    """Fine-tunes the model, in bfloat16 by autocast, with the optimizer of ``cggr race``."""
    if way.last is not None:
        draw(model.model.norm, way.last)
    layers = model.model.layers
    for i, layer in enumerate(layers[:-1]):
        if way.layer is not None:
            draw(layer, way.layer(i / (len(layers) - 1)))
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
    batch = tokens.batches(
        corpus.training, batch_size=options.batch_size, sequence_length=options.length, seed=0
    )
    console = Console()
    for way in WAYS:
        torch.manual_seed(0)
        model = load_folder(options.model, torch.float32).to(device).train()
        model.config.use_cache = False
        way = way._replace(steps=max(1, round(way.steps * options.steps)))
        train(way, model, batch, options.learning_rate)
        loss = heldout_loss(model.eval(), corpus.heldout, options.length)
        console.print(f"{way.name:32} {way.steps:5} steps  loss {loss:.4f}", highlight=False)


if __name__ == "__main__":
    main()
