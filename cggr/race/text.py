"""Real text: which files, and which of them are held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np

from cggr.race.settings import RaceError

MAX_TEXT_BYTES = 256_000_000  # a race of minutes on one machine sees less
MAX_HELDOUT_BYTES = 80_000  # about 23,000 tokens: an evaluation costs a second on two CPU cores
MAX_HELDOUT_PAIRS_BYTES = 240_000  # of which a part is predicted
HELDOUT_FRACTION = 0.05

# The library's own tests are left out because many distributions do not install them.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One file's text, under a name that does not tell where the machine keeps it."""

    name: str
    text: str

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode())


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents to train on and documents to measure on.

    Args:
        training: Documents for training.
        heldout: Documents that no lane trains on.
        digest: SHA-256 of all of it.
        notes: What a reader of the result should know about the choice, one sentence each.
    """

    training: tuple[Document, ...]
    heldout: tuple[Document, ...]
    digest: str
    notes: tuple[str, ...]


def read_documents(
    paths: Sequence[Path] = (),
    *,
    max_bytes: int | None = MAX_TEXT_BYTES,
    without: Path | None = None,
    option: str = "--text",
) -> tuple[list[Document], list[str]]:
    """Reads files and folders, or the Python standard library's source if there are none.

    A folder gives its files of UTF-8 text, hidden ones aside. Of files with the same content the
    first counts, so that no held-out file has a twin in the training text.

    Args:
        paths: Files and folders.
        max_bytes: Of UTF-8 in all; no limit if None.
        without: A file or folder that is no part of the text wherever it lies.
        option: What the user calls the paths, for errors.

    Returns:
        The documents, in an order that depends on their names alone, and notes on what was left
        out.

    Raises:
        RaceError: A path does not exist or is no text, or there is no text at all.
    """
    found: dict[bytes, Document] = {}
    total, unreadable, notes = 0, 0, []
    for name, path, named in _files(paths, without, option):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            text = "\0"
        except OSError as error:
            raise RaceError(f"{option} {path}: {error.strerror}") from None
        # NUL is valid UTF-8 but marks a binary file, as it does for git and grep.
        if "\0" in text:
            if named:
                raise RaceError(f"{option} {path}: not a file of UTF-8 text")
            unreadable += 1
            continue
        document = Document(name, text)
        if not text.strip() or (key := hashlib.sha256(text.encode()).digest()) in found:
            continue
        if max_bytes is not None and total + document.size > max_bytes:
            if not found:
                raise RaceError(
                    f"{option} {path}: {document.size / 1e6:.0f} MB are more than the "
                    f"{max_bytes / 1e6:.0f} MB that are read: give a part of it"
                )
            notes.append(f"Only the first {max_bytes / 1e6:.0f} MB of the text are used.")
            break
        found[key] = document
        total += document.size
    if not found:
        names = " ".join(str(path) for path in paths) or "the standard library"
        raise RaceError(f"{option} {names}: no text in it")
    if unreadable:
        notes.append(f"{unreadable} files are not UTF-8 text and were left out.")
    return list(found.values()), notes


def source_name(paths: Sequence[Path]) -> str:
    """What the text is called in a report."""
    if not paths:
        return f"Python {platform.python_version()} standard library"
    return ", ".join(path.name for path in paths)


def _files(
    paths: Sequence[Path], without: Path | None, option: str
) -> Iterator[tuple[str, Path, bool]]:
    """Yields (name, path, was it named by the user) in a deterministic order."""
    without = None if without is None else without.resolve()
    if not paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if not _SKIPPED_FOLDERS.intersection(name.parts):
                yield name.as_posix(), path, False
    for root in paths:
        if root.is_file():
            yield root.name, root, True
        elif root.is_dir():
            for folder, subfolders, files in os.walk(root):
                if without is not None and Path(folder).resolve() == without:
                    subfolders.clear()
                    continue
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                for file in sorted(name for name in files if not name.startswith(".")):
                    path = Path(folder, file)
                    if path.is_file():
                        yield f"{root.name}/{path.relative_to(root).as_posix()}", path, False
        else:
            raise RaceError(f"{option} {root}: no such file or folder")


def pairs_of(documents: Sequence[Document]) -> Iterator[tuple[str, str]]:
    """Yields (prompt, completion) of documents that have a JSON object with both in every line.

    Raises:
        RaceError: A line is no such object, or its completion is empty.
    """
    for document in documents:
        for number, line in enumerate(document.text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            found = found if isinstance(found, dict) else {}
            prompt, completion = found.get("prompt"), found.get("completion")
            if not (_is_text(prompt) and _is_text(completion) and completion):
                raise RaceError(
                    f"--pairs: line {number} of {document.name} must be a JSON object of two "
                    f'texts, "prompt" and "completion", the latter not empty, got {line[:60]}'
                )
            yield prompt, completion


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is text that can be written: JSON may have half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def with_noise(split: Split, fraction: float) -> Split:
    """The split with noise in the text to train on; what is held out stays as it is.

    A line is noise with this probability: it keeps its indentation and its number of words, each
    of which is drawn from all words of the text. Nothing but their frequencies can be learned.

    Args:
        split: The documents.
        fraction: Probability, in [0, 1).
    """
    random = np.random.default_rng(0)
    words = np.array([word for item in split.training for word in item.text.split()], dtype=object)

    def line_of(line: str) -> str:
        n_words = len(line.split())
        if not n_words or random.random() >= fraction:
            return line
        indentation = line[: len(line) - len(line.lstrip())]
        end = line[len(line.rstrip()) :]
        return indentation + " ".join(words[random.integers(len(words), size=n_words)]) + end

    training = tuple(
        Document(item.name, "".join(map(line_of, item.text.splitlines(keepends=True))))
        for item in split.training
    )
    note = f"{fraction:.0%} of the lines to train on are random words."
    digest = hashlib.sha256(f"{split.digest}|{fraction}".encode()).hexdigest()
    return Split(training, split.heldout, digest, (*split.notes, note))


def split_documents(
    documents: Sequence[Document],
    notes: Sequence[str] = (),
    *,
    pairs: bool = False,
) -> Split:
    """Holds out whole files, 5 % of the text or 80 kB, whichever is less; of pairs 240 kB.

    The files are taken in the order of a hash of their names, so the choice is the same on every
    machine and independent of their content. Where every file is larger than that (a single file,
    say), the last part of the last file is held out instead.

    Args:
        documents: The documents, at least one.
        notes: Notes to pass on.
        pairs: Whether they are lines of pairs, so that a file may be cut between lines only.
    """
    max_heldout_bytes = MAX_HELDOUT_PAIRS_BYTES if pairs else MAX_HELDOUT_BYTES
    room = min(max_heldout_bytes, int(HELDOUT_FRACTION * sum(item.size for item in documents)))
    heldout: list[Document] = []
    for document in sorted(documents, key=lambda item: hashlib.sha256(item.name.encode()).digest()):
        if document.size <= room:
            heldout.append(document)
            room -= document.size
    training = [document for document in documents if document not in set(heldout)]
    notes = list(notes)
    if not heldout:
        *training, last = documents
        if pairs:  # of lines that have something in them
            lines = [line for line in last.text.split("\n") if line.strip()]
            last = Document(last.name, "".join(f"{line}\n" for line in lines))
        size = min(max_heldout_bytes, max(1, int(HELDOUT_FRACTION * last.size)))
        # Cut at a character of the file, which is where a byte offset of UTF-8 may not be.
        head = last.text.encode()[: last.size - size].decode(errors="ignore")
        if pairs:
            if len(lines) < 2 and not training:
                raise RaceError(
                    "--pairs needs two pairs at least, one to train on and one to hold out"
                )
            head = head[: head.rfind("\n") + 1] or f"{lines[0]}\n" * (len(lines) > 1)
            size = last.size - len(head.encode())
        training.append(Document(last.name, head))
        heldout.append(Document(last.name, last.text[len(head) :]))
        notes.append(f"The last {size / last.size:.1%} of {last.name} are held out.")
    digest = hashlib.sha256()
    for part in (training, heldout):
        for document in part:
            digest.update(hashlib.sha256(document.text.encode()).digest())
        digest.update(b"|")
    return Split(tuple(training), tuple(heldout), digest.hexdigest(), tuple(notes))
