"""Races that are small enough for a test."""

import json
import shlex
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from cggr.cli import main
from cggr.race import tokens
from cggr.race.settings import Budget, RaceSettings

SMALL = shlex.split(
    "--hidden-size 32 --layers 2 --vocab-size 300 --batch-size 8 --sequence-length 32 "
    "--learning-rate 1e-2 --device cpu"
)


def write_book(folder):
    """A folder with a text of some rules."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for page in range(40):
        numbers = random.integers(100, size=60)
        lines = [f"the double of {number} is {2 * number}\n" for number in numbers]
        (folder / f"page{page:02}.txt").write_text("".join(lines))
    return folder


def race(*arguments):
    """The command, in a folder that holds the book."""
    return CliRunner().invoke(main, ["race", "--name", "test", "--text", "book", *arguments])


def read(folder):
    return json.loads((folder / "runs" / "test" / "results.json").read_text())


def tiny(**options):
    """Settings and tokens for lanes without a race around them."""
    shape = {"hidden_size": 32, "layers": 2, "batch_size": 8, "sequence_length": 16}
    settings = RaceSettings(budget=Budget(1, "steps"), **shape | options)
    stream = np.random.default_rng(0).integers(300, size=1001).astype(np.int32)
    return settings, tokens.Corpus(stream, stream[:100], 300, 300, 0)


def save_tokenizer(folder):
    """A tokenizer that truncates, as a pretrained model may bring."""
    tokenizer = tokens.train_tokenizer(["the double of 12 is 24\n"] * 50, vocab_size=290)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
