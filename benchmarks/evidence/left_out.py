"""What the excess loss leaves out of a text with noise: noise, or text?

    python benchmarks/evidence/left_out.py --model runs/noisy/model --reference runs/same/model

with the models of docs/evidence.md. Of batches of a training text with noise, as ``cggr race
--noise`` has it, a model and each reference have their losses. ``topk`` of their difference leaves
a part of the tokens out, which is to be the noise, of which nothing can be learned. Printed is
which part of the noise is left out, and which of the text; a reference that cannot tell one from
the other leaves out as much of both.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from cggr.race import pretrained, text, tokens
from cggr.race.settings import RaceError
from cggr.race.torch_lanes import find_device, load_folder
from cggr.spec import RoutingConfig, select_tokens

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


def noisy_stream(
    tokenizer: Tokenizer,
    end_of_text: int | None,
    clean: Sequence[text.Document],
    noisy: Sequence[text.Document],
    size: int,
) -> tuple[tokens.Tokens, Flags]:
    """Ids of documents with noise, as many as suffice for `size`, and whether each is noise."""
    separator = [] if end_of_text is None else [end_of_text]
    ids: list[int] = []
    flags: list[bool] = []
    pairs = list(zip(clean, noisy, strict=True))
    for before, after in sorted(pairs, key=lambda pair: hash_of(pair[0].name)):
        lines = after.text.splitlines(keepends=True)
        is_noise = np.array(lines) != np.array(before.text.splitlines(keepends=True))
        ends = np.cumsum([len(line) for line in lines])
        encoding = tokenizer.encode(after.text, add_special_tokens=False)
        # A token that begins in the white space before a line belongs to that line, where it ends.
        last = np.array([max(begin, end - 1) for begin, end in encoding.offsets], dtype=np.int64)
        ids += separator + encoding.ids
        flags += [False] * len(separator) + is_noise[
            np.searchsorted(ends, last, side="right")
        ].tolist()
        if len(ids) >= size:
            break
    return np.array(ids, dtype=np.int32), np.array(flags)


def hash_of(name: str) -> bytes:
    """Documents in the order of a hash are a sample of them all."""
    return hashlib.sha256(name.encode()).digest()


@torch.inference_mode()
def losses(model: Any, ids_BS: npt.NDArray[np.int64]) -> Floats:
    """``(B, S - 1)``: the loss of each token that follows another."""
    ids = torch.from_numpy(ids_BS).to(model.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        logits_BSV = model(input_ids=ids).logits[:, :-1]
    nll = cross_entropy(logits_BSV.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    found: Floats = nll.reshape(len(ids), -1).cpu().numpy()
    return found


def left_out(excess_BT: Floats, is_noise_BT: Flags, ratio: float) -> tuple[float, float]:
    """Parts of the noise and of the text that ``topk`` leaves out."""
    config = RoutingConfig(
        selection="topk", min_tokens_ratio=ratio, warmup_steps=0, dynamic_threshold=False
    )
    out_BT = ~select_tokens(excess_BT, config).mask
    return float(out_BT[is_noise_BT].mean()), float(out_BT[~is_noise_BT].mean())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True, action="append")
    parser.add_argument("--text", type=Path, action="append", help="texts/python if not given")
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", type=int, default=16)
    options = parser.parse_args()
    for name in ("noise", "ratio"):
        if not 0 < getattr(options, name) < 1:
            parser.error(f"--{name} must be in (0, 1), got {getattr(options, name)}")
    try:
        measure(options)
    except RaceError as error:
        parser.error(str(error))


def measure(options: argparse.Namespace) -> None:
    """The same, of options that are in their range."""
    device = find_device("auto")
    tokenizer, end_of_text = pretrained.load_tokenizer(options.model)
    for folder in options.reference:
        other, _ = pretrained.load_tokenizer(folder, "--reference")
        if other.get_vocab() != tokenizer.get_vocab():
            raise RaceError(f"--reference {folder}: its tokenizer is not that of --model")
    split = text.split_documents(*text.read_documents(options.text or [Path("texts/python")]))
    noisy = text.with_noise(split, options.noise)
    shape = {"batch_size": options.batch_size, "sequence_length": options.length}
    # Ten times what is read, so that batches are of many documents.
    size = 10 * options.batches * options.batch_size * options.length
    ids, is_noise = noisy_stream(tokenizer, end_of_text, split.training, noisy.training, size)
    place = np.arange(len(ids), dtype=np.int32)
    index = [tokens.batches(place, **shape, seed=0)(step).ids for step in range(options.batches)]
    noise_KBT = np.stack([is_noise[where][:, 1:] for where in index])

    def losses_of(folder: Path) -> Floats:
        model = load_folder(folder, torch.float32).to(device).eval()
        return np.stack([losses(model, ids[where].astype(np.int64)) for where in index])

    own_KBT = losses_of(options.model)
    table = Table("reference", "noise left out", "text left out", box=None)
    for folder in options.reference:
        excess_KBT = own_KBT - losses_of(folder)
        parts = np.mean(
            [left_out(*batch, options.ratio) for batch in zip(excess_KBT, noise_KBT, strict=True)],
            axis=0,
        )
        table.add_row(folder.parent.name, *(f"{part:.3f}" for part in parts))
    console = Console(width=120)
    console.print(
        f"{noise_KBT.size:,} tokens, {noise_KBT.mean():.3f} of them noise; loss of the model "
        f"{own_KBT[noise_KBT].mean():.3f} of noise, {own_KBT[~noise_KBT].mean():.3f} of text; "
        f"topk of {options.ratio:g}",
        highlight=False,
    )
    console.print(table)


if __name__ == "__main__":
    main()
