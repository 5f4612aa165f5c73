"""The command ``cggr advise``: what drawing the tokens of a text would be worth to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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
from cggr.race.settings import RaceError
from cggr.race.text import Document, read_documents, source_name
from cggr.race.tokens import encode
from cggr.race.torch_lanes import find_device, load_folder
from cggr.score import check_size
from cggr.spec import RoutingConfig
from cggr.torch import CGGRScorer
from cggr.torch.functional import aligned_targets
from cggr.worth import Split, effective_fraction, operations

RATIOS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SPLITS: tuple[Split, ...] = ("backward", "token")
# Less is not worth it: the best ratio is found on the same tokens, and no step is operations alone.
LEAST_GAIN = 1.05


@dataclasses.dataclass(frozen=True)
class Advice:
    """What tokens drawn at a ratio are worth, and what they cost by each split.

    Attributes:
        ratio: Part of the tokens.
        worth: :func:`~cggr.worth.effective_fraction` of them.
    """

    ratio: float
    worth: float

    def gain(self, split: Split) -> float:
        """How much more is learned per operation than densely, at the most."""
        return self.worth / operations(self.ratio, split)


def advise_text(
    *,
    model: Path,
    text: Sequence[Path],
    scoring: str,
    importance_floor: float,
    n_tokens: int,
    context: int,
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
    ids_RS = _windows(documents, tokenizer, end_of_text, n_tokens, context)
    loaded = load_folder(model, torch.float32).to(find_device(device)).eval()
    check_size(loaded, model, context, tokenizer.get_vocab_size())
    config = RoutingConfig(scoring=scoring, importance_floor=importance_floor)
    found = _statistics(CGGRScorer(loaded, config), ids_RS, batch_size, loaded.device, console)
    if not all(np.isfinite(values).all() for values in found.values()):
        raise RaceError(f"--model {model}: its scores of this text are not finite")
    norm_N = found["error_norm"]
    importance_N = np.maximum(found["difficulty"], 0) + importance_floor
    advice = [
        Advice(ratio, effective_fraction(norm_N, ratio, importance=importance_N))
        for ratio in RATIOS
    ]
    console.print(
        f"{model.resolve().name} on {source_name(text)}: {norm_N.size:,} tokens of loss "
        f"{found['nll'].mean():.3f}, error norm {norm_N.mean():.3f} ± {norm_N.std():.3f}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_table(advice))
    console.print(_verdict(advice, scoring), highlight=False, soft_wrap=True)
    return advice


def _windows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    end_of_text: int | None,
    n_tokens: int,
    context: int,
) -> npt.NDArray[np.int64]:
    """Token ids ``(R, S)`` of documents in an order of chance, the same each time."""
    n_rows = max(1, n_tokens // context)
    parts, size = [], 0
    for place in np.random.default_rng(0).permutation(len(documents)):
        parts.append(encode(tokenizer, [documents[place].text], end_of_text))
        size += len(parts[-1])
        if size >= n_rows * context:
            break
    n_rows = min(n_rows, size // context)
    if not n_rows:
        raise RaceError(f"--context {context}: the text has {size} tokens")
    ids = np.concatenate(parts)[: n_rows * context]
    return ids.reshape(n_rows, context).astype(np.int64)


def _statistics(
    scorer: CGGRScorer,
    ids_RS: npt.NDArray[np.int64],
    batch_size: int,
    device: torch.device,
    console: Console,
) -> dict[str, npt.NDArray[np.float64]]:
    """``difficulty``, ``nll``, ``error_norm`` ``(N,)`` of all tokens but each row's first."""
    ignore_index = scorer.config.ignore_index
    found: dict[str, list[Any]] = {"difficulty": [], "nll": [], "error_norm": []}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("scored", total=len(ids_RS))
        for rows in _batches(ids_RS, batch_size):
            ids_BS = torch.from_numpy(rows).to(device)
            targets_BS = aligned_targets(ids_BS, None, shift=True, ignore_index=ignore_index)
            scores = scorer.score(targets_BS, input_ids=ids_BS)
            values = {"difficulty": scores.difficulty, **scores.statistics._asdict()}
            for name, parts in found.items():
                parts.append(values[name][scores.eligible].double().cpu().numpy())
            progress.advance(task, len(rows))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _batches(ids_RS: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    for begin in range(0, len(ids_RS), size):
        yield ids_RS[begin : begin + size]


def _table(advice: Sequence[Advice]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False)
    for name in (
        "\nratio",
        "\nworth",
        *(f"{split}\n{x}" for split in SPLITS for x in ("operations", "gain")),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    best = max(advice, key=lambda row: row.gain("backward"))
    for row in advice:
        cells = [f"{row.ratio:.2f}", f"{row.worth:.2f}"]
        for split in SPLITS:
            cells += [f"{operations(row.ratio, split):.2f}", f"{row.gain(split):.2f}"]
        table.add_row(*cells, style="bold" if row is best else "")
    return table


def _verdict(advice: Sequence[Advice], scoring: str) -> str:
    best = max(advice, key=lambda row: row.gain("backward"))
    gain = best.gain("backward")
    if gain < LEAST_GAIN:
        return (
            "Train densely: the model, as it is, has so much to learn of most tokens that leaving "
            "any out costs what it saves. Ask again when it knows more of this text."
        )
    return (
        f"At most {gain:.2f} times what dense training learns per operation: split='backward', "
        f"selection='importance', scoring={scoring!r}, min_tokens_ratio={best.ratio:g}."
    )
