"""The page of ``cggr show``: the text, which of it is selected, and how dark it is."""

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models import build
from races import save_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from cggr.cli import main

TEXT = "".join(
    f'the double of {i} is {2 * i} & <b>not</b> "{i * i}"\n\t— {chr(28450 + i)} of the {i}\n'
    for i in range(7, 13)
)


class _Page(HTMLParser):
    """Spans of class t: their text, their classes, shade and title."""

    def __init__(self):
        super().__init__()
        self.tokens, self._inside = [], False

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self._inside = tag == "span" and "title" in given
        if self._inside:
            shade = float(given["style"].removeprefix("--d:"))
            self.tokens.append(["", "s" in given["class"].split(), shade, given["title"]])

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.tokens[-1][0] += data


@pytest.fixture
def folder(tmp_path):
    saved = tmp_path / "model"
    build("llama", vocab_size=290).save_pretrained(saved)
    save_tokenizer(saved)
    return saved


def show(tmp_path, folder, *arguments, text=TEXT):
    (tmp_path / "text.txt").write_text(text)
    command = ["show", tmp_path / "text.txt", "--model", folder, "--device", "cpu", *arguments]
    return CliRunner().invoke(main, [str(part) for part in command])


def read(path):
    page = _Page()
    page.feed(path.read_text())
    return page.tokens


@pytest.mark.parametrize("context", [1000, 20])
def test_the_page(tmp_path, folder, context):
    done = show(
        tmp_path, folder, "--scoring", "loss", "--selection", "topk", "--context", min(context, 64)
    )
    assert done.exit_code == 0, done.output
    tokens = read(tmp_path / "text.txt.html")
    assert "".join(text for text, *_ in tokens) == TEXT

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    ids = torch.tensor(tokenizer.encode(TEXT).ids)
    assert len(ids) == len(tokens)
    model = build("llama", vocab_size=290).eval()
    nll = np.full(len(ids), np.nan)
    for begin in range(0, len(ids), min(context, 64)):
        row = ids[begin : begin + min(context, 64)]
        with torch.no_grad():
            logits = model(row[None]).logits[0].numpy().astype(np.float64)
        for i in range(1, len(row)):
            nll[begin + i] = np.log(np.exp(logits[i - 1]).sum()) - logits[i - 1, row[i]]
    n_targets = np.isfinite(nll).sum()
    cut = np.sort(nll[np.isfinite(nll)])[-int(np.ceil(0.25 * n_targets))]
    for loss, (_, selected, shade, title) in zip(nll, tokens, strict=True):
        if np.isnan(loss):
            assert not selected
            assert shade == 0
            assert title.startswith("the first of its sequence")
            continue
        assert selected == (loss >= cut)
        assert float(re.search(r"nll ([\d.]+)", title)[1]) == pytest.approx(loss, abs=0.0051)
        assert shade == pytest.approx(
            0.85 * (nll < loss).sum() / (n_targets - 1), abs=0.02
        )  # by rank; equal losses share theirs only nearly
    n_selected = sum(selected for _, selected, *_ in tokens)
    assert f"{n_selected:,} of {len(ids):,} tokens selected" in done.output


def test_a_router_and_a_part_of_the_text(tmp_path, folder):
    out = tmp_path / "page.html"
    options = ("--router-layers", 1, "--max-tokens", 30, "--context", 16, "--output", out)
    done = show(tmp_path, folder, *options)
    assert done.exit_code == 0, done.output
    tokens = read(out)
    assert len(tokens) == 30
    assert sum(selected for _, selected, *_ in tokens) == 7  # ceil(0.25 x 28), ratio in 2^-14
    assert "<svg" in out.read_text()
    assert "<b" not in out.read_text().replace("<body", "")
    assert "&lt;" in out.read_text()


def test_what_cannot_be_shown_is_refused(tmp_path, folder):
    few = show(tmp_path, folder, text="t")
    assert few.exit_code == 2
    assert "1 tokens, of which none has one before it" in few.output
    assert "--context 65 is more than its 64" in show(tmp_path, folder, "--context", 65).output
    binary = show(tmp_path, folder, text="\0").output
    assert binary == f"cggr: FILE {tmp_path / 'text.txt'}: not a file of UTF-8 text\n"
    deep = show(tmp_path, folder, "--context", 64, "--router-layers", 99)
    assert deep.exit_code == 2
    assert "--router-layers 99: the model has 3 layers" in deep.output
    nowhere = show(tmp_path, folder, "--output", tmp_path / "none" / "page.html")
    assert nowhere.exit_code == 2
    assert "--output: no folder" in nowhere.output
    weights = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    save_file(weights | {name: weights[name] * math.nan}, folder / "model.safetensors")
    nan = show(tmp_path, folder, "--context", 64)
    assert nan.exit_code == 2
    assert "its scores of this text are not finite" in nan.output
