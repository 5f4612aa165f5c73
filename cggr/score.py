"""The command ``cggr score``: from a text and a model's folder to reference losses on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from cggr.race.pretrained import load_tokenizer
from cggr.race.settings import RaceError
from cggr.race.text import read_documents, source_name
from cggr.race.tokens import encode
from cggr.race.torch_lanes import find_device, load_folder
from cggr.reference import ReferenceLosses
from cggr.torch.reference import score_reference


def score_text(
    *,
    model: Path,
    text: Sequence[Path],
    output: Path,
    context: int,
    stride: int | None,
    batch_size: int,
    device: str,
    dtype: str,
    console: Console,
) -> ReferenceLosses:
    """Scores a text by the model of a folder, or goes on with it; the command's options.

    Raises:
        RaceError: There is no text, or the model cannot be loaded, is too small, or gives losses
            that are not finite.
        ReferenceFileError: The folder has losses of another text, or by other settings.
    """
    documents, notes = read_documents(text, max_bytes=None, without=output)
    for note in notes:
        console.print(note)
    tokenizer, end_of_text = load_tokenizer(model)
    tokens = encode(tokenizer, [document.text for document in documents], end_of_text)
    if len(tokens) < 2:
        raise RaceError(
            f"--text {source_name(text)}: {len(tokens)} tokens, of which none follows another"
        )
    stride = max(1, context // 2) if stride is None else stride
    loaded = load_folder(model, getattr(torch, dtype)).to(find_device(device)).eval()
    check_size(loaded, model, context, tokenizer.get_vocab_size())
    about = {
        "model": model.resolve().name,
        "weights_sha256": _digest(loaded),
        "text": source_name(text),
        "context": context,
        "stride": stride,
        "dtype": dtype,
    }
    reference = ReferenceLosses.create(output, tokens, about)
    n_targets, done = len(tokens) - 1, reference.n_done
    if 0 < done < n_targets:
        console.print(f"Going on at token {done:,} of {n_targets:,}.")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokens", total=n_targets, completed=min(done, n_targets))
        try:
            score_reference(
                loaded,
                reference,
                context=context,
                stride=stride,
                batch_size=batch_size,
                advance=lambda n_tokens: progress.advance(task, n_tokens),
            )
        except FloatingPointError as error:
            raise RaceError(f"--model {model}: {error}") from None
    mean = float(reference.losses[:n_targets].mean())
    console.print(f"{n_targets:,} losses in {output}, {mean:.4f} nats a token in the mean.")
    return reference


def check_size(model: Any, folder: Path, context: int, vocab_size: int) -> None:
    """Refuses a model that has fewer positions or embeddings than are asked of it."""
    positions = getattr(model.config, "max_position_embeddings", None) or context
    embeddings = model.get_input_embeddings().num_embeddings
    for what, wanted, had, of in (
        ("--context", context, positions, "positions"),
        ("its tokenizer's vocabulary", vocab_size, embeddings, "embeddings"),
    ):
        if wanted > had:
            raise RaceError(f"--model {folder}: {what} {wanted} is more than its {had} {of}")


def _digest(model: Any) -> str:
    """Tells models apart: a hash of some of every weight's numbers."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        some = weight.flatten()[:: max(1, weight.numel() // 1000)].float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
