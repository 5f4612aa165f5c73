"""The command ``cggr advise``: what drawing the tokens of a text would be worth to a model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

from cggr.race.pretrained import load_tokenizer
from cggr.race.settings import RaceError, prompt_tokens
from cggr.race.text import Document, read_documents, source_name
from cggr.race.tokens import encode
from cggr.race.torch_lanes import find_device, load_folder
from cggr.score import check_size
from cggr.spec import RoutingConfig
from cggr.torch import CGGRModel, CGGRScorer
from cggr.torch.backward_rows import linears_of_rows
from cggr.torch.functional import aligned_targets
from cggr.torch.router import LAYOUTS, detect_architecture, unwrapped
from cggr.worth import effective_fraction, operations

RATIOS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SPLITS = {"backward": "batch", "token": "sequence"}  # and of what they draw a part
# Less is not worth it: the best ratio is found on the same tokens, and no step is operations alone.
LEAST_GAIN = 1.05
LEAST_TOKENS, LEAST_WRONG = 1000, 100  # that tell something
PIECE = 8  # characters for each token of a window: a document is cut into pieces of some windows


@dataclasses.dataclass(frozen=True)
class Advice:
    """What is predicted of tokens drawn at a ratio, by each split.

    Attributes:
        ratio: Part of the tokens.
        worth: :func:`~cggr.worth.effective_fraction` of them, by split.
        operations: :func:`~cggr.worth.operations` of a step, by each split that runs the model.
    """

    ratio: float
    worth: dict[str, float]
    operations: dict[str, float]

    def gain(self, split: str) -> float:
        """How much is learned per operation, over what dense training learns."""
        return self.worth[split] / self.operations[split]


def advise_text(
    *,
    model: Path,
    text: Sequence[Path],
    scoring: str,
    importance_floor: float,
    n_tokens: int,
    context: int,
    prompt: float,
    batch_size: int,
    device: str,
    console: Console,
) -> list[Advice]:
    """Prints what draws are worth at every ratio; the command's options.

    Raises:
        RaceError: The text is too short, or the model cannot be loaded, is too small, or gives
            scores that are not finite.
    """
    documents, notes = read_documents(text)
    for note in notes:
        console.print(note)
    tokenizer, end_of_text = load_tokenizer(model)
    loaded = load_folder(model, torch.float32).to(find_device(device)).eval()
    check_size(loaded, model, context, max(tokenizer.get_vocab_size(), (end_of_text or 0) + 1))
    n_prompt = prompt_tokens(prompt, context)
    ids_RS = _windows(documents, tokenizer, end_of_text, n_tokens, context)
    n_left = len(ids_RS) * (context - n_prompt)
    if n_left < LEAST_TOKENS:
        raise RaceError(
            f"--text: {n_left} tokens in windows of {context} behind prompts of {n_prompt}; "
            f"{LEAST_TOKENS} at least tell something"
        )
    labelled = (context - n_prompt) / context
    config = RoutingConfig(
        scoring=scoring, importance_floor=importance_floor, max_eligible_ratio=labelled
    )
    scorer = CGGRScorer(loaded, config)
    found = _statistics(scorer, ids_RS, max(1, n_prompt), batch_size, loaded.device, console)
    if not all(np.isfinite(values).all() for values in found.values()):
        raise RaceError(f"--model {model}: its scores of this text are not finite")
    norm_RM = found["error_norm"]
    importance_RM = np.maximum(found["difficulty"], 0) + importance_floor
    costs, refused = _costs(loaded, context, labelled)
    ratios = (*RATIOS, 1.0) if n_prompt else RATIOS
    advice = _advice(norm_RM, importance_RM, costs, ratios)
    console.print(
        f"{model.resolve().name} on {source_name(text)}: {norm_RM.size:,} tokens of loss "
        f"{found['nll'].mean():.3f}, error norm {norm_RM.mean():.3f} ± {norm_RM.std():.3f}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(advice))
    said = _verdict(advice, norm_RM, config, costs) if costs else refused
    console.print(said, highlight=False, soft_wrap=True)
    return advice


def _costs(
    model: Any, length: int, labelled: float = 1.0
) -> tuple[dict[str, Callable[[float], float]], str]:
    """Operations of a step by its ratio, of each split that runs the model; or why none does.

    A ratio is a part of the tokens that have labels, which are themselves a part of all.
    """
    costs: dict[str, Callable[[float], float]] = {}
    refused = ""
    for split in SPLITS:
        try:
            CGGRModel(model, split=split)
        except ValueError as error:
            refused = f"No split by tokens runs this model: {error}"
            continue
        of_all = part_of_all_tokens(model, length) if split == "backward" else 0.0
        costs[split] = functools.partial(_cost, split, of_all, labelled)
    return costs, refused


def _cost(split: str, of_all: float, labelled: float, ratio: float) -> float:
    # Of all that have labels, nothing is to be scored.
    return operations(ratio * labelled, split, of_all=of_all, scored=ratio < 1)


def part_of_all_tokens(model: Any, length: int) -> float:
    """Part of a forward pass whose backward pass is of all tokens by ``split="backward"``.

    Of its operations: two for every weight and token, and in attention for every entry of a key
    or a value that a token sees.

    Args:
        model: Of transformers, such as that split runs.
        length: Tokens of a sequence, each of which attends to those before it.

    Returns:
        The part.
    """
    from transformers.pytorch_utils import Conv1D

    model = unwrapped(model)
    config, layout = model.config, LAYOUTS[detect_architecture(model)]
    layers = model.get_submodule(f"{layout.base}.{layout.layers}")
    kinds = (torch.nn.Linear, Conv1D)
    rows, _ = linears_of_rows(layers, kinds)
    of_rows = sum(linear.weight.numel() for linears in rows for linear in linears)
    of_layers = sum(x.weight.numel() for x in layers.modules() if isinstance(x, kinds))
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Twice what a token sees in the mean.
    seen = sum(window * (2 - window / length) for window in _windows_of(config, len(rows), length))
    weights = of_layers + model.get_output_embeddings().weight.numel()
    attention = heads * head_size * seen
    return float((of_layers - of_rows + attention) / (weights + attention))


def _windows_of(config: Any, n_layers: int, length: int) -> list[int]:
    """How many tokens each layer's attention spans."""
    window = min(getattr(config, "sliding_window", None) or length, length)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers
    return [window if kind == "sliding_attention" else length for kind in types]


def _advice(
    norm_RM: npt.ArrayLike,
    importance_RM: npt.ArrayLike,
    costs: Mapping[str, Callable[[float], float]],
    ratios: Sequence[float] = RATIOS,
) -> list[Advice]:
    return [
        Advice(
            ratio,
            {
                split: effective_fraction(norm_RM, ratio, importance=importance_RM, scope=scope)
                for split, scope in SPLITS.items()
            },
            {split: cost(ratio) for split, cost in costs.items()},
        )
        for ratio in ratios
    ]


def _windows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    end_of_text: int | None,
    n_tokens: int,
    context: int,
) -> npt.NDArray[np.int64]:
    """Token ids ``(R, S)`` of pieces of the text, drawn from all of it, the same each time."""
    size = PIECE * context
    pieces = [
        (document.text, begin)
        for document in documents
        for begin in range(0, len(document.text), size)
    ]
    wanted, n_encoded = n_tokens // context * context, 0
    parts = [np.zeros(0, np.int32)]
    for place in np.random.default_rng(0).permutation(len(pieces)):
        text, begin = pieces[place]
        parts.append(
            encode(tokenizer, [text[begin : begin + size]], None if begin else end_of_text)
        )
        n_encoded += len(parts[-1])
        if n_encoded >= wanted:
            break
    ids = np.concatenate(parts)[:wanted]
    ids = ids[: len(ids) // context * context]
    return ids.reshape(-1, context).astype(np.int64)


def _statistics(
    scorer: CGGRScorer,
    ids_RS: npt.NDArray[np.int64],
    first: int,
    batch_size: int,
    device: torch.device,
    console: Console,
) -> dict[str, npt.NDArray[np.float64]]:
    """``difficulty``, ``nll``, ``error_norm`` ``(R, S - first)``, of tokens from `first` on."""
    ignore_index = scorer.config.ignore_index
    found: dict[str, list[Any]] = {"difficulty": [], "nll": [], "error_norm": []}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("scored", total=len(ids_RS))
        for begin in range(0, len(ids_RS), batch_size):
            ids_BS = torch.from_numpy(ids_RS[begin : begin + batch_size]).to(device)
            targets_BS = aligned_targets(ids_BS, None, shift=True, ignore_index=ignore_index)
            scores = scorer.score(targets_BS, input_ids=ids_BS)
            values = {"difficulty": scores.difficulty, **scores.statistics._asdict()}
            for name, parts in found.items():
                # Where a token is predicted, one before it.
                parts.append(values[name][:, first - 1 : -1].double().cpu().numpy())
            progress.advance(task, len(ids_BS))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _table(advice: Sequence[Advice]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("\nratio", justify="right", no_wrap=True)
    for split in SPLITS:
        for name in ("worth", "operations", "gain"):
            table.add_column(f"{split}\n{name}", justify="right", no_wrap=True)
    best = _best(advice)[0] if advice[0].operations else None
    for row in advice:
        cells = [f"{row.ratio:.2f}"]
        for split in SPLITS:
            cells.append(f"{row.worth[split]:.2f}")
            runs = split in row.operations
            cells += [f"{row.operations[split]:.2f}", f"{row.gain(split):.2f}"] if runs else "--"
        table.add_row(*cells, style="bold" if row is best else "")
    return table


def _best(advice: Sequence[Advice]) -> tuple[Advice, str]:
    """At which ratio, and by which split, most is gained."""
    ways = [(row, split) for row in advice for split in row.operations]
    return max(ways, key=lambda way: way[0].gain(way[1]))


def _verdict(
    advice: Sequence[Advice],
    norm_RM: npt.NDArray[np.float64],
    config: RoutingConfig,
    costs: Mapping[str, Callable[[float], float]],
) -> str:
    square_RM = norm_RM**2
    # As many equal ones would be drawn as unevenly.
    n_wrong = square_RM.sum() ** 2 / max((square_RM**2).sum(), 1e-300)
    if n_wrong < LEAST_WRONG and config.max_eligible_ratio < 1:
        advice = advice[-1:]  # all that have labels, which is worth the same whatever the errors
    elif n_wrong < LEAST_WRONG:
        return (
            f"No advice: {n_wrong:,.0f} of these tokens have nearly all of the error. Ask for more "
            f"--tokens; and see whether what is left can be learned at all."
        )
    best, split = _best(advice)
    gain = best.gain(split)
    if gain < LEAST_GAIN:
        other, other_split = _best(_advice(norm_RM, norm_RM, costs))
        without = other.gain(other_split)
        hint = (
            f" With draws by error_norm and a small floor it would be {without:.2f}."
            if without >= LEAST_GAIN
            else " Ask again when it knows more of this text."
        )
        return (
            f"Train densely: of the model as it is, draws at no ratio are predicted to gain "
            f"{LEAST_GAIN - 1:.0%}; the best, {best.ratio:g} by split={split!r}, would learn "
            f"{gain:.2f} times as much per operation.{hint}"
        )
    floor = config.importance_floor
    options: dict[str, Any] = {"split": split, "min_tokens_ratio": best.ratio}
    if best.ratio < 1:
        options |= {"selection": "importance", "scoring": config.scoring}
        if floor != RoutingConfig().importance_floor:
            options["importance_floor"] = floor
    else:
        options["selection"] = "random"  # of which all is selected, and nothing scored
    options["dynamic_threshold"] = False
    if config.max_eligible_ratio < 1:
        options["max_eligible_ratio"] = math.ceil(1e4 * config.max_eligible_ratio) / 1e4
    said = (
        f"Predicted: about {gain:.2f} times what dense training learns per operation, by "
        + ", ".join(f"{name}={value!r}" for name, value in options.items())
        + ", after the warm-up. "
    )
    if best.ratio == 1:
        return said + (
            "Steps are not operations alone, and lack what prompts' own layers would learn: expect "
            "less. Of completions of many lengths, max_eligible_ratio is the longest one's part. A "
            "race tells the time."
        )
    return said + (
        "Tokens that nobody can learn would be drawn, too: if the text is noisy, see excess_loss. "
        "A race tells the time."
    )
