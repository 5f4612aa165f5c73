"""From text to token ids: a byte-level BPE trained on the text, and batches of its tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import platformdirs
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cggr.race.settings import RaceError
from cggr.race.text import Split, pairs_of

Tokens = npt.NDArray[np.int32]
Losses = npt.NDArray[np.float32]

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte and END_OF_TEXT
TRAINING_BYTES = 8_000_000  # more does not change the merges of a small vocabulary much
EVALUATION_TOKENS = 4096  # per forward; twice as many were slower on two CPU cores
IGNORED = -100  # a target that is not predicted


class Batch(NamedTuple):
    """What a training step is given.

    Attributes:
        ids: Token ids ``(B, S)``.
        labels: The same, `IGNORED` in prompts.
        reference_nll: ``(B, S)``: the reference's loss of the token that follows; None without one.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    reference_nll: Losses | None = None

    @property
    def targets(self) -> int:
        """Tokens that are predicted: those with labels, but for a sequence's first."""
        return int(np.count_nonzero(self.labels[:, 1:] != IGNORED))


BatchFunction = Callable[[int], Batch]
Evaluated = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # inputs and targets


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of the training and of the held-out text.

    Args:
        training: All training documents, or pairs, each preceded by the end-of-text token.
        heldout: All held-out documents, likewise.
        heldout_bytes: Size of the held-out documents in UTF-8.
        vocab_size: Number of tokens of the vocabulary.
        end_of_text: Id of the end-of-text token, None if the tokenizer has none.
        tokenizer: The tokenizer, as tokenizer.json has it.
        training_labels: Of pairs, `training` with prompts `IGNORED`; None where all is learned.
        heldout_labels: Likewise.
    """

    training: Tokens
    heldout: Tokens
    heldout_bytes: int
    vocab_size: int
    end_of_text: int | None
    tokenizer: str = ""
    training_labels: Tokens | None = None
    heldout_labels: Tokens | None = None

    def heldout_batches(self, sequence_length: int, prompt: int = 0) -> Iterator[Evaluated]:
        """Inputs and targets of the held-out text, as :func:`evaluation_batches` cuts them."""
        return evaluation_batches(self.heldout, sequence_length, prompt, self.heldout_labels)

    def bits_per_byte(self, loss: float) -> float:
        """Converts nats per held-out token to bits per held-out byte, as if all had this loss."""
        return loss * (len(self.heldout) - 1) / (np.log(2) * self.heldout_bytes)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, which can encode any text and decode it back unchanged.

    Args:
        texts: Training texts; documents spread over all of them are used, 8 MB at most.
        vocab_size: Largest vocabulary, `MIN_VOCAB_SIZE` or more.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # A text that happens to contain "<|endoftext|>" does not end there.
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stride = max(1, -(-sum(map(len, texts)) // TRAINING_BYTES))
    sample = [text[:TRAINING_BYTES] for text in texts[::stride]]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], end_of_text: int | None) -> Tokens:
    """Encodes texts into one stream, each preceded by the end-of-text token if there is one."""
    separator = [] if end_of_text is None else [end_of_text]
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    parts = [np.array(separator + encoding.ids, dtype=np.int32) for encoding in encodings]
    return np.concatenate(parts)


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], end_of_text: int | None
) -> tuple[Tokens, Tokens]:
    """Encodes pairs of prompt and completion into one stream of ids, and one of labels.

    Labels are the ids of completions and of the end-of-text tokens that follow them.
    """
    separator = [] if end_of_text is None else [end_of_text]
    ids: list[int] = []
    labels: list[int] = []
    texts = [text for pair in pairs for text in pair]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for prompt, completion in zip(encodings[::2], encodings[1::2], strict=True):
        ids += separator + prompt.ids + completion.ids
        labels += (separator if labels else [IGNORED] * len(separator)) + [IGNORED] * len(prompt)
        labels += completion.ids
    return np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)


def prepare(
    split: Split,
    *,
    vocab_size: int,
    pairs: bool = False,
    tokenizer: Tokenizer | None = None,
    end_of_text: int | None = None,
    cache: Path | None = None,
) -> Corpus:
    """Tokenizes a split, or finds it tokenized in the cache.

    Args:
        split: The documents.
        vocab_size: Vocabulary of the tokenizer to train.
        pairs: Whether documents are JSON lines of prompts and completions.
        tokenizer: A model's own tokenizer, to use instead of training one.
        end_of_text: Its end-of-text token.
        cache: Folder of the cache; the user's cache folder if None.

    Raises:
        RaceError: The cache cannot be written, or a line is no pair.
    """
    recipe = f"{vocab_size}" if tokenizer is None else f"{tokenizer.to_str()}{end_of_text}"
    recipe += "|pairs" if pairs else ""
    key = hashlib.sha256(f"2|{tokenizers.__version__}|{split.digest}|{recipe}".encode())
    folder = cache or Path(platformdirs.user_cache_dir("cggr", appauthor=False))
    path = folder / f"tokens-{key.hexdigest()[:32]}.npz"
    if pairs:
        heldout_bytes = sum(len("".join(pair).encode()) for pair in pairs_of(split.heldout))
    else:
        heldout_bytes = sum(document.size for document in split.heldout)
    if path.is_file():
        with np.load(path) as arrays:
            size, end = (int(value) for value in arrays["vocabulary"])
            others = ("vocabulary", "tokenizer")
            streams = {name: arrays[name] for name in arrays if name not in others}
            described = str(arrays["tokenizer"])
        return Corpus(
            **streams,
            heldout_bytes=heldout_bytes,
            vocab_size=size,
            end_of_text=None if end < 0 else end,
            tokenizer=described,
        )

    parts = {"training": split.training, "heldout": split.heldout}
    texts = {name: [document.text for document in found] for name, found in parts.items()}
    if pairs:
        lines = {name: list(pairs_of(found)) for name, found in parts.items()}
        texts = {name: ["".join(pair) for pair in found] for name, found in lines.items()}
    if tokenizer is None:
        tokenizer = train_tokenizer(texts["training"], vocab_size)
        end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    streams = {}
    for name in parts:
        if pairs:
            streams[name], streams[f"{name}_labels"] = encode_pairs(
                tokenizer, lines[name], end_of_text
            )
        else:
            streams[name] = encode(tokenizer, texts[name], end_of_text)
    corpus = Corpus(
        **streams,
        heldout_bytes=heldout_bytes,
        vocab_size=tokenizer.get_vocab_size(),
        end_of_text=end_of_text,
        tokenizer=tokenizer.to_str(),
    )
    vocabulary = np.array([corpus.vocab_size, -1 if end_of_text is None else end_of_text])
    # Written under another name first, so that a run that is cut off leaves no half file.
    partial = path.with_suffix(f".{os.getpid()}.npz")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            partial,
            **streams,
            vocabulary=vocabulary,
            tokenizer=np.array(corpus.tokenizer),
        )
        partial.replace(path)
    except OSError as error:
        raise RaceError(
            f"cannot write the token cache in {folder}: {error.strerror}; XDG_CACHE_HOME moves it"
        ) from None
    return corpus


def batches(
    tokens: Tokens,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    labels: Tokens | None = None,
    prompt: int = 0,
    reference_nll: Losses | None = None,
) -> BatchFunction:
    """Returns a function from the step to its batch, a pure one, so that every lane gets the same.

    Args:
        tokens: The stream to cut sequences from, at positions that are uniform at random.
        batch_size: Sequences per batch.
        sequence_length: Tokens per sequence.
        seed: Seed of the positions.
        labels: ``(N,)``: what is learned of the stream; all of it if None.
        prompt: So many tokens of each sequence are a prompt.
        reference_nll: ``(N,)``: at each token, the reference's loss of the one that follows.

    Raises:
        RaceError: The stream is shorter than one batch.
    """
    if len(tokens) < batch_size * sequence_length:
        raise RaceError(
            f"the text is too short: {len(tokens)} training tokens, but one batch of "
            f"{batch_size} x {sequence_length} needs {batch_size * sequence_length}; give more "
            "text, or a smaller --batch-size or --sequence-length"
        )
    span = np.arange(sequence_length)

    def batch(step: int) -> Batch:
        random = np.random.default_rng((seed, step))
        index = random.integers(len(tokens) - sequence_length + 1, size=(batch_size, 1)) + span
        known = None if reference_nll is None else np.nan_to_num(reference_nll[index])
        ids = tokens[index].astype(np.int64)
        learned = ids if labels is None else labels[index].astype(np.int64)
        return Batch(ids, np.where(span < prompt, IGNORED, learned), known)

    return batch


def evaluation_batches(
    tokens: Tokens, sequence_length: int, prompt: int = 0, labels: Tokens | None = None
) -> Iterator[Evaluated]:
    """Cuts a stream into inputs and targets, every label but the first being a target once.

    After a prompt, so are all but its tokens and the first: prompts repeat what was a target of the
    row before.

    Args:
        tokens: The stream, of two tokens or more behind a prompt.
        sequence_length: Tokens per row.
        prompt: So many tokens of a training sequence are a prompt.
        labels: ``(N,)``: the stream, `IGNORED` where nothing is to be predicted; all of it if None.

    Yields:
        Batches of one shape; behind the stream's end, inputs are 0 and targets `IGNORED`.
    """
    # A prompt's last token has a target, in training as here: the first of what follows it.
    context = max(0, prompt - 1)
    stride = sequence_length - context
    rows = -(-(len(tokens) - 1 - context) // stride)
    batch_size = min(rows, max(1, EVALUATION_TOKENS // sequence_length))
    count = -(-rows // batch_size)
    shape = (count, batch_size, sequence_length)
    index = np.arange(count * batch_size)[:, None] * stride + np.arange(sequence_length)
    is_there = index < len(tokens) - 1
    index = np.where(is_there, index, 0)
    inputs = np.where(is_there, tokens[index], 0).astype(np.int64)
    is_target = is_there & (np.arange(sequence_length) >= context)
    wanted = (tokens if labels is None else labels)[index + 1]
    targets = np.where(is_target, wanted, IGNORED).astype(np.int64)
    yield from zip(inputs.reshape(shape), targets.reshape(shape), strict=True)
