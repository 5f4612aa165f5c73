"""The texts of the training study: sources of open-source libraries.

    python benchmarks/evidence/texts.py FOLDER

makes FOLDER/python, FOLDER/cpp, FOLDER/clients and FOLDER/summaries, byte for byte the same
everywhere. FOLDER/clients has clients of web services in Python, written by generators for the most
part, of which a model soon knows most tokens. FOLDER/summaries has pairs of a Python function and
what its docstring says of it, the code summarization of CodeSearchNet (arXiv 1909.09436) and
CodeXGLUE (arXiv 2102.04664), as lines of JSON with a "prompt" and a "completion".

The sources come out of the wheels pinned in texts_*.txt (420 MB to download with pip). Wheels are
only unzipped: nothing in them is built, installed or run. A folder that is already there is
checked.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Set
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import track

MAX_FILE_BYTES = 500_000  # larger ones are tables, most of them written by a machine
CONSOLE = Console(stderr=True)

# One machine stands for all, so that everybody gets the same wheels.
TARGET = ["--implementation=cp", "--python-version=3.12", "--abi=cp312", "--abi=abi3", "--abi=none"]
TARGET += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 26, 17)]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What one folder holds.

    Args:
        name: Of the folder and of its list of wheels.
        suffixes: Of the files that count.
        project_bytes: At most from one project, so that no large one outweighs the others.
        digest: What `measure` must give.
        pairs: Whether a file's text is what `summaries` makes of it.
    """

    name: str
    suffixes: Set[str]
    project_bytes: int
    digest: str
    pairs: bool = False


CORPORA = (
    Corpus(
        "python",
        {".py"},
        5_000_000,
        "bc88dcae62a9820e1bbe1fd99382a19f6be5385a1e162145ae875ecb288a00df",
    ),
    Corpus(
        "cpp",
        {".h", ".hpp", ".cuh", ".cpp", ".cc", ".c", ".cu"},
        8_000_000,
        "a3b769c84258721b95d1450cf9b4c01dc33da6204c2477504c1c4dcb1f2e0ece",
    ),
    Corpus(
        "clients",
        {".py"},
        5_000_000,
        "225b33a97825ee6dac69c188ea982df15f322661599d354579aac90e72fde812",
    ),
    Corpus(
        "summaries",
        {".py"},
        5_000_000,
        "7cf889b4a10e1932e6e823b8671a57138e0c7f8f25e7c456fcd56f0327cde575",
        pairs=True,
    ),
)


def hash_of(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def measure(folder: Path) -> tuple[int, int, str]:
    """Files, bytes, and the SHA-256 of what sha256sum prints for the files in order of path."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files, size, digest = 0, 0, hashlib.sha256()
    for name in sorted(names):
        content = (folder / name).read_bytes()
        digest.update(f"{hash_of(content)}  {name}\n".encode())
        files, size = files + 1, size + len(content)
    return files, size, digest.hexdigest()


def download(corpus: Corpus, folder: Path) -> list[Path]:
    """Fetches the pinned wheels with pip, which checks their hashes."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    # Without --only-binary pip would run the setup code of source distributions.
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", *TARGET]
    pins = Path(__file__).with_name(f"texts_{corpus.name}.txt")
    command += ["--dest", str(folder), "--requirement", str(pins)]
    with CONSOLE.status(f"{corpus.name}: downloading the wheels of {pins.name}"):
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{corpus.name}: pip could not download the wheels\n{result.stderr}")
    return sorted(folder.glob("*.whl"), key=lambda wheel: wheel.name)


def sources(wheel: Path, corpus: Corpus, seen: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (path, content) of a wheel's files of UTF-8 text that no earlier file equals."""
    room = corpus.project_bytes
    with zipfile.ZipFile(wheel) as archive:
        # In the order of a hash, what fits is a sample of the whole project.
        for name in sorted(archive.namelist(), key=lambda name: hash_of(name.encode())):
            path, size = PurePosixPath(name), archive.getinfo(name).file_size
            # An absolute path, or one with "..", would lead out of the folder.
            hidden = path.is_absolute() or any(part.startswith(".") for part in path.parts)
            if hidden or path.suffix not in corpus.suffixes or size > min(room, MAX_FILE_BYTES):
                continue
            content = archive.read(name)
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            # NUL is valid UTF-8 but marks a binary file, as in cggr.race.text.
            if hash_of(content) not in seen and text.strip() and "\0" not in text:
                seen.add(hash_of(content))
                room -= size
                yield name, content


def summary(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, str]:
    """Returns a function's code without its docstring, and the docstring's first paragraph.

    Both are empty where there is no docstring with code after it, on lines of its own.
    """
    statement, *code = node.body
    docstring = (ast.get_docstring(node, clean=False) or "").strip()
    if not docstring or not code or code[0].lineno <= (statement.end_lineno or 0):
        return "", ""
    if lines[statement.lineno - 1][: statement.col_offset].strip():
        return "", ""
    first = min(part.lineno for part in (node, *node.decorator_list)) - 1
    kept = lines[first : statement.lineno - 1] + lines[statement.end_lineno : node.end_lineno]
    # Not textwrap.dedent, which a string of many lines may keep from finding the indentation.
    indentation = lines[first][: node.col_offset]
    prompt = "".join(line.removeprefix(indentation) + "\n" for line in kept)
    return prompt, " ".join(re.split(r"\n\s*\n", docstring)[0].split())


def summaries(source: str, seen: set[str]) -> str:
    """Pairs of functions and their summaries, in lines of JSON; none of a prompt seen before.

    What is left out is much as in CodeSearchNet: short functions, tests, special methods, summaries
    of few words. So are long ones, summaries that are not ASCII, and functions within another that
    makes a pair. A source that does not parse has none; all in the pinned wheels do in Python 3.11.
    """
    source = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that are none
            tree = ast.parse(source)
    except SyntaxError:
        return ""
    lines, pairs, end = source.split("\n"), [], 0
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(functions, key=lambda node: node.lineno):
        special = node.name.startswith("__") and node.name.endswith("__")
        if node.lineno <= end or special or "test" in node.name.lower():
            continue
        prompt, completion = summary(lines, node)
        short = sum(bool(line.strip()) for line in prompt.split("\n")) < 3
        words = len(completion.split())
        if short or not (60 <= len(prompt) <= 2000 and 3 <= words <= 60 and completion.isascii()):
            continue
        end = node.end_lineno or 0
        if hash_of(prompt.encode()) not in seen:
            seen.add(hash_of(prompt.encode()))
            # The quotes tell where code ends.
            pair = {"prompt": f'{prompt}"""', "completion": completion}
            pairs.append(json.dumps(pair) + "\n")
    return "".join(pairs)


def make(corpus: Corpus, folder: Path) -> None:
    """Makes `folder`, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{corpus.name}-", dir=folder.parent) as name:
        wheels, made = Path(name, "wheels"), Path(name, "made")
        seen: set[str] = set()
        for wheel in track(download(corpus, wheels), f"{corpus.name}: unzipping", console=CONSOLE):
            project = made / wheel.name.partition("-")[0].lower().replace("_", "-")
            for path, content in sources(wheel, corpus, seen):
                target = project / path
                if corpus.pairs:
                    content = summaries(content.decode(), seen).encode()
                    target = target.with_suffix(".jsonl")
                    if not content:
                        continue
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        if (digest := measure(made)[2]) != corpus.digest:
            raise SystemExit(f"{corpus.name}: the text has digest {digest}, not {corpus.digest}")
        made.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the texts go")
    root: Path = parser.parse_args().folder
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"FOLDER {root}: {error.strerror}")
    for corpus in CORPORA:
        folder = root / corpus.name
        if not folder.exists():
            make(corpus, folder)
        files, size, digest = measure(folder)
        print(f"{corpus.name}: {files} files, {size / 1e6:.1f} MB, sha256 {digest}")
        if digest != corpus.digest:
            raise SystemExit(f"{folder}: not the text of digest {corpus.digest}: remove it first")


if __name__ == "__main__":
    main()
