"""How noisy the gradients of selected tokens are, and what that makes them worth.

    python benchmarks/evidence/gradient_noise.py --model runs/base/model --text texts/cpp

A model is fine-tuned densely for some steps. Then, of the same batches, it has the gradient of all
tokens, and gradients of tokens that CGGR selects. Distances are measured as Adam does, every
weight's in units of the root of its mean square, which other batches tell. With the noise of a
batch's own gradient, the distance of batches' gradients from their mean, a way's distance from the
batch's gradient says which part of a batch it is worth: 1 is all of it. ``cggr.worth`` predicts it
of the tokens' error norms.

The bias, what is left of the distance in the mean over all batches, is printed as a part of the
signal, the gradient's mean, with its standard error. In the worth it counts as noise does, in
training for more: in the mean of many steps noise becomes less, and a bias does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from cggr.race import pretrained, text, tokens
from cggr.race.engine import learning_rate
from cggr.race.torch_lanes import find_device, load_folder
from cggr.spec.selection import select_tokens
from cggr.torch import CGGRLoss, CGGRModel, RoutingConfig
from cggr.torch.functional import aligned_targets, token_statistics
from cggr.worth import effective_fraction

IGNORED = RoutingConfig().ignore_index
LEAST = 1e-2  # of a tensor's mean square, added to each, as rarely used weights have none
PROGRESS = Console(stderr=True)
HIDDEN = "hidden gradient"  # of a Way, and no score of the library


class Way(NamedTuple):
    """Which tokens a gradient is of, and how it comes to the weights.

    Attributes:
        selection: Of ``RoutingConfig``.
        ratio: Part of the tokens.
        through: ``"everything"``, the loss's selection alone; or a split of ``CGGRModel``.
        scoring: Of ``RoutingConfig``; or HIDDEN, which draws by the norm of the loss's gradient to
            a token's final hidden state, through everything alone.
    """

    selection: str
    ratio: float
    through: str
    scoring: str = "error_norm"

    def config(self) -> RoutingConfig:
        """The options of its selection."""
        return RoutingConfig(
            selection=self.selection,
            scoring="error_norm" if self.scoring == HIDDEN else self.scoring,
            min_tokens_ratio=self.ratio,
            warmup_steps=0,
            dynamic_threshold=False,
        )


WAYS = (
    *(
        Way("importance", ratio, through)
        for ratio in (0.25, 0.5, 0.7)
        for through in ("everything", "backward", "token")
    ),
    *(Way("importance", ratio, "everything", HIDDEN) for ratio in (0.25, 0.5)),
    *(Way("importance", 0.5, "everything", scoring) for scoring in ("combined", "loss", "entropy")),
    *(Way(selection, 0.5, "everything") for selection in ("random", "stratified", "topk")),
)
HALF = "half of the sequences"


class Noise(NamedTuple):
    """Squared distances, in units of the weights' mean squares.

    Attributes:
        distance: From the batch's gradient, mean over batches and draws.
        bias: Of the mean distance.
        error: Standard error of the bias.
    """

    distance: float
    bias: float
    error: float


class Measured:
    """The gradients of a model's batches, and others beside them.

    Args:
        model: A causal language model.
        batches: Token ids ``(B, S)``.
        others: As many more, whose gradients are the units.
    """

    def __init__(self, model: Any, batches: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self.model = model
        self.batches = batches
        self.draw = 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Of other batches: a square that is small by chance would else make its own part large.
        square_P: Any = sum(
            self.dense(ids).square() for ids in track(others, "units", console=PROGRESS)
        )
        square_P /= len(others)
        sizes = [p.numel() for p in self.parameters]
        least_P = torch.cat([x.mean().expand(x.numel()) for x in square_P.split(sizes)])
        self.unit_P = 1 / (square_P + LEAST * least_P)
        self.dense_BP = torch.stack(
            [self.dense(ids) for ids in track(batches, "all tokens", console=PROGRESS)]
        )
        mean_P = self.dense_BP.mean(dim=0)
        n_batches = len(batches)
        self.noise = sum(self.square(g - mean_P) for g in self.dense_BP) / (n_batches - 1)
        self.signal = self.square(mean_P) - self.noise / n_batches

    def square(self, gradient_P: Tensor) -> float:
        """Squared length, every weight's part over its mean square."""
        return float((gradient_P.square() * self.unit_P).sum())

    def gradient(self, loss: Tensor) -> Tensor:
        """Of all weights."""
        parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(parts, self.parameters, strict=True)
            ]
        )

    def dense(self, ids_BS: Tensor) -> Tensor:
        """The gradient of all tokens."""
        return self.gradient(self.model(input_ids=ids_BS, labels=ids_BS).loss)

    def distances(self, name: str, gradient: Callable[[Tensor], Tensor], draws: int) -> Noise:
        """Of a way to a gradient, over all batches."""
        total = 0.0
        # Draws of a batch have its tokens in common: only those of different ones are independent.
        away_BP = torch.zeros_like(self.dense_BP)
        batches = track(self.batches, name, console=PROGRESS)
        for ids, dense_P, away_P in zip(batches, self.dense_BP, away_BP, strict=True):
            for _ in range(draws):
                one_P = gradient(ids) - dense_P
                total += self.square(one_P) / (draws * len(self.batches))
                away_P += one_P / draws
        products_BB = away_BP @ (away_BP * self.unit_P).T
        return Noise(total, *mean_of_pairs(products_BB.double().cpu().numpy()))

    def of_way(self, way: Way) -> Callable[[Tensor], Tensor]:
        """A function from token ids to the gradient of those selected."""
        if way.scoring == HIDDEN:
            return lambda ids: self.gradient(self.loss_by_hidden_gradients(way, ids))
        if way.through == "everything":
            criterion = CGGRLoss(config=way.config())
            return lambda ids: self.gradient(
                criterion(self.model(input_ids=ids).logits, targets_of(ids))
            )
        routed = CGGRModel(self.model, config=way.config(), split=way.through)
        return lambda ids: self.gradient(routed(ids, labels=ids))

    def loss_by_hidden_gradients(self, way: Way, ids_BS: Tensor) -> Tensor:
        """Of tokens drawn by exact norms, which cost another product with the head."""
        targets_BS = targets_of(ids_BS)
        output = self.model(input_ids=ids_BS, output_hidden_states=True)
        loss_BS = cross_entropy(
            output.logits.transpose(1, 2), targets_BS, ignore_index=IGNORED, reduction="none"
        )
        hidden_BSD = output.hidden_states[-1]  # behind the final norm
        (gradient_BSD,) = torch.autograd.grad(loss_BS.sum(), hidden_BSD, retain_graph=True)
        eligible_BS = targets_BS != IGNORED
        self.draw += 1
        selection = select_tokens(
            gradient_BSD.norm(dim=-1), way.config(), draw=self.draw, eligible=eligible_BS, xp=xp
        )
        loss_R = loss_BS.flatten().index_select(0, selection.indices.long())
        return (selection.weights * loss_R).sum() / eligible_BS.sum()

    def worth(self, noise: Noise) -> float:
        """Part of a batch that would be as far from what it estimates."""
        return self.noise / (self.noise + noise.distance)

    def half(self, ids_BS: Tensor) -> Tensor:
        """The gradient of half of the sequences."""
        order_B = torch.randperm(len(ids_BS), device=ids_BS.device)
        return self.dense(ids_BS[order_B[: len(ids_BS) // 2]])


def mean_of_pairs(products_BB: Any) -> tuple[float, float]:
    """Of products of different vectors, which is their mean squared, and its standard error."""
    n = len(products_BB)
    others_B = products_BB.sum(axis=1) - np.diag(products_BB)
    total = others_B.sum()
    without_B = (total - 2 * others_B) / ((n - 1) * (n - 2))  # the jackknife's
    error = np.sqrt((n - 1) * np.var(without_B))
    return float(total / (n * (n - 1))), float(error)


def targets_of(ids_BS: Tensor) -> Tensor:
    """What every position predicts."""
    return aligned_targets(ids_BS, None, shift=True, ignore_index=IGNORED)


@torch.no_grad()
def error_norms(model: Any, ids_BS: Tensor) -> Any:
    """``(B, S - 1)`` of the tokens that are predicted."""
    norm_BS = token_statistics(model(input_ids=ids_BS).logits, targets_of(ids_BS)).error_norm
    return norm_BS[:, :-1].double().cpu().numpy()


def without_dropout(model: Any) -> Any:
    """The same model, in training."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.train()


def train(model: Any, batch: tokens.BatchFunction, steps: int, peak: float) -> None:
    """Fine-tunes densely, with the optimizer of ``cggr race``."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in track(range(steps), "fine-tuned", console=PROGRESS):
        ids = torch.from_numpy(batch(step).ids).to(model.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / (2 * steps), peak)  # as if in the middle
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of dense training before")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()
    for name, least in (("batches", 3), ("draws", 1), ("batch_size", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} at least")
    device = find_device("auto")
    tokenizer, end_of_text = pretrained.load_tokenizer(options.model)
    corpus = tokens.prepare(
        text.split_documents(*text.read_documents([options.text])),
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer=tokenizer,
        end_of_text=end_of_text,
    )
    batch = tokens.batches(
        corpus.training,
        batch_size=options.batch_size,
        sequence_length=options.length,
        seed=0,
    )
    torch.manual_seed(0)
    model = without_dropout(load_folder(options.model, torch.float32).to(device))
    model.config.use_cache = False
    train(model, batch, options.steps, options.learning_rate)
    steps = range(options.steps, options.steps + 2 * options.batches)
    ids = [torch.from_numpy(batch(step).ids).to(device) for step in steps]
    batches, others = ids[: options.batches], ids[options.batches :]
    norms = np.stack([error_norms(model, ids) for ids in batches])
    measured = Measured(model, batches, others)
    show(measured, norms, options.draws)


def show(measured: Measured, norms_KBS: Any, draws: int) -> None:
    """Measures and prints; the norms are those of K batches."""
    console = Console(width=120)
    console.print(
        f"{len(measured.unit_P):,} weights, batches of {measured.batches[0].numel():,} tokens, "
        f"error norm {norms_KBS.mean():.3f} ± {norms_KBS.std():.3f}; signal "
        f"{measured.signal / (measured.signal + measured.noise):.3f} of a gradient",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    names = ("selection", "scoring", "ratio", "through", "worth", "predicted", "bias / signal")
    for name in names:
        table.add_column(name, justify="left" if name in ("selection", "scoring") else "right")
    half = measured.distances(HALF, measured.half, draws)
    table.add_row(HALF, "", "0.50", "everything", f"{measured.worth(half):.3f}", "0.500")
    for way in WAYS:
        noise = measured.distances(way.through, measured.of_way(way), draws)
        bias, error = noise.bias / measured.signal, noise.error / measured.signal
        table.add_row(
            way.selection,
            way.scoring if way.selection != "random" else "",
            f"{way.ratio:.2f}",
            way.through,
            f"{measured.worth(noise):.3f}",
            predicted(way, norms_KBS),
            f"{bias:+.3f} ± {error:.3f}",
        )
    console.print(table)


def predicted(way: Way, norms_KBS: Any) -> str:
    """What ``cggr.worth`` says; nothing of what is not unbiased, or drawn by another score."""
    if way.selection == "random":
        return f"{way.ratio:.3f}"
    if way.selection != "importance" or way.scoring != "error_norm":
        return ""
    # Each batch draws a part of its own; by the token split, each of its sequences.
    n_groups = int(np.prod(norms_KBS.shape[: 2 if way.through == "token" else 1]))
    norm_RM = norms_KBS.reshape(n_groups, -1)
    importance_RM = norm_RM + way.config().importance_floor
    worth = effective_fraction(norm_RM, way.ratio, importance=importance_RM, scope="sequence")
    return f"{worth:.3f}"


if __name__ == "__main__":
    main()
