"""What a backward pass of drawn tokens learns, step for step, whatever its speed.

    python benchmarks/evidence/sampled_backward.py --model runs/base/model --text texts/cpp

Ways to fine-tune a Llama: dense, also of fewer sequences; with a part of the rows of a gradient,
drawn uniformly or by their norms and weighted to be unbiased. They are those of the final hidden
states, where the head's own gradient is that of all tokens, or of the logits, whose norms are what
``scoring="error_norm"`` is. The backward pass of them goes on

- through everything;
- through the drawn tokens' own layers, and from their attention down the residual streams of the
  others (``split="backward"``);
- through the drawn tokens alone, keys and values of others being constants (``split="token"``);
- or through rows that are drawn anew at every layer's output, as in VCAS (arXiv 2402.17227).

Rows that are left out are zeros here and cost what they did: the question is what such gradients
are worth, before anybody makes them cheap.
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
    """Which part of the rows is drawn, and what of the others has a gradient.

    Attributes:
        name: As the report calls it.
        last: Part of the final hidden states; None for all.
        goes_through: ``"everything"``, ``"residuals"`` of the others, or ``"drawn"`` tokens alone.
        layer: Part of a layer's output that is drawn anew; None for all.
        by_norm: Whether rows are drawn by the norms of their gradients, or uniformly.
        of_logits: Whether those are of the logits, and not of the final hidden states.
        power: Of the weights: 1 makes the gradient unbiased, less makes it less noisy.
        sequences: Part of the batch.
    """

    name: str
    last: float | None = None
    goes_through: str = "everything"
    layer: float | None = None
    by_norm: bool = True
    of_logits: bool = False
    power: float = 1.0
    sequences: float = 1.0


WAYS = (
    Way("dense"),
    Way("dense, half the batch", sequences=0.5),
    Way("dense, a quarter", sequences=0.25),
    *(
        Way(f"{ratio} of the tokens, through {way}", last=ratio, goes_through=way)
        for ratio in (0.5, 0.25)
        for way in ("everything", "residuals", "drawn")
    ),
    Way("0.5, of the logits", last=0.5, goes_through="residuals", of_logits=True),
    Way("0.25, of the logits", last=0.25, goes_through="residuals", of_logits=True),
    Way("0.5, of the logits, power 0.5", 0.5, "residuals", of_logits=True, power=0.5),
    Way("0.25, of the logits, power 0.5", 0.25, "residuals", of_logits=True, power=0.5),
    Way("0.5, of the logits, power 0", 0.5, "residuals", of_logits=True, power=0.0),
    Way("0.25 of the tokens, uniformly", last=0.25, by_norm=False),
    Way("0.25 of the tokens, and of each layer", last=0.25, layer=0.25),
)


class Draw:
    """Rows that a backward pass draws, and begins with."""

    def __init__(self, ratio: float, *, by_norm: bool = True, power: float = 1.0) -> None:
        self.ratio, self.by_norm, self.power = ratio, by_norm, power
        self.weight_BS1: Tensor

    def __call__(self, grad: Tensor) -> Tensor:
        """The gradient's rows by priority sampling, weighted to be unbiased."""
        norm_BS = grad.float().norm(dim=-1)
        if not self.by_norm:
            norm_BS = torch.ones_like(norm_BS)
        q_BS = norm_BS + FLOOR * norm_BS.mean() + 1e-30
        priority_BS = q_BS / torch.rand_like(q_BS).clamp_(min=1e-7)
        tau = priority_BS.flatten().topk(int(self.ratio * q_BS.numel()) + 1).values[-1]
        weight_BS = torch.where(priority_BS > tau, (tau / q_BS).clamp(min=1.0), 0.0)
        if self.power != 1.0:  # as much in all as unbiased ones are
            powers_BS = torch.where(weight_BS > 0, weight_BS**self.power, 0.0)
            weight_BS = powers_BS * weight_BS.sum() / powers_BS.sum()
        self.weight_BS1 = weight_BS[..., None]
        return grad * self.weight_BS1.to(grad.dtype)

    def drawn(self, grad: Tensor) -> Tensor:
        """The gradient of the rows that were drawn."""
        return torch.where(self.weight_BS1 > 0, grad, 0)


class _Gradient(torch.autograd.Function):
    """`x` itself, whose gradient is changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def change_gradient(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the gradient that comes to a module's output."""
    module.register_forward_hook(lambda _, __, output: _Gradient.apply(output, change))


def restrict(model: Any, way: Way) -> None:
    """Changes the backward pass of a Llama."""
    if way.last is None:
        return
    last = Draw(way.last, by_norm=way.by_norm, power=way.power)
    change_gradient(model.lm_head if way.of_logits else model.model.norm, last)
    layers = model.model.layers
    for layer in layers[:-1] if way.layer is not None else ():
        change_gradient(layer, Draw(way.layer))
    if way.goes_through == "everything":
        return
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        modules = [attention.o_proj, mlp.down_proj]
        if way.goes_through == "drawn":
            modules += [attention.k_proj, attention.v_proj]
        for module in modules:
            change_gradient(module, last.drawn)


def train(model: Any, batch: tokens.BatchFunction, steps: int, peak: float) -> None:
    """Fine-tunes the model, in bfloat16 by autocast, with the optimizer of ``cggr race``."""
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for step in range(steps):
        ids = torch.from_numpy(batch(step).ids).to(model.device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, peak)
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
    parser.add_argument("--steps", type=int, default=636)
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
        restrict(model, way)
        train(model, batch, options.steps, options.learning_rate)
        loss = heldout_loss(model.eval(), corpus.heldout_batches(options.length))
        console.print(f"{way.name:40} {options.steps} steps  loss {loss:.4f}", highlight=False)


if __name__ == "__main__":
    main()
