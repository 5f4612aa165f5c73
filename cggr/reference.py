"""Losses of a reference model, computed once and kept beside the tokens: for excess loss.

What a reference model finds hard too is noise, or not worth learning: ``scoring="excess_loss"``
ranks tokens by their loss less the reference's (Lin et al., Rho-1, NeurIPS 2024).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TOKENS, _LOSSES, _ABOUT = "tokens.npy", "losses.npy", "about.json"


class ReferenceFileError(ValueError):
    """A folder holds no reference losses, or those of something else."""


@dataclasses.dataclass(frozen=True)
class ReferenceLosses:
    """A stream of N tokens, and what a reference model thinks of them.

    Attributes:
        tokens: int32 ``(N,)``.
        losses: Nats, float32 ``(N,)``: at each position, of the token that follows; NaN where it
            has not been computed yet, and at the last position, which nothing follows.
        about: What was computed, and by which model.

    Example:
        >>> folder = getfixture("tmp_path") / "reference"
        >>> made = ReferenceLosses.create(folder, np.arange(10), {"model": "tiny"})
        >>> made.losses[:9] = 0.5
        >>> rows = ReferenceLosses.open(folder).rows(np.array([0, 4]), 5)
        >>> rows["input_ids"].tolist()
        [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
        >>> rows["reference_nll"][1].tolist()
        [0.5, 0.5, 0.5, 0.5, 0.5]
    """

    tokens: npt.NDArray[np.int32]
    losses: npt.NDArray[np.float32]
    about: dict[str, Any]

    @classmethod
    def create(cls, folder: Path, tokens: npt.ArrayLike, about: dict[str, Any]) -> ReferenceLosses:
        """Begins a folder of losses, or goes on with one.

        Args:
            folder: To hold tokens.npy, losses.npy and about.json.
            tokens: ``(N,)`` integers.
            about: What is to be computed, as JSON can hold it.

        Returns:
            The losses, in memory that is the file, NaN where there is something left to do.

        Raises:
            ReferenceFileError: The folder has losses of other tokens, or by other settings.
            ValueError: There are no tokens.
        """
        stream = np.asarray(tokens).astype(np.int32)
        if stream.ndim != 1 or not len(stream):
            raise ValueError(f"tokens must be (N,), of one or more, got shape {stream.shape}.")
        digest = hashlib.sha256(stream.tobytes()).hexdigest()
        about = {"schema": 1, **about, "n_tokens": len(stream), "tokens_sha256": digest}
        if not (folder / _ABOUT).exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / _TOKENS, stream)
            empty = np.lib.format.open_memmap(
                folder / _LOSSES, mode="w+", dtype=np.float32, shape=stream.shape
            )
            empty[:] = np.nan
            empty.flush()
            # Last, and at once: a folder without it was not begun.
            partial = folder / f"{_ABOUT}.{os.getpid()}"
            partial.write_text(json.dumps(about, indent=1) + "\n")
            partial.replace(folder / _ABOUT)
        found = cls.open(folder, mode="r+")
        for name in dict.fromkeys([*about, *found.about]):
            if about.get(name) != found.about.get(name):
                raise ReferenceFileError(
                    f"{folder} holds losses with {name} {found.about.get(name)!r}, not "
                    f"{about.get(name)!r}: give another folder, or remove this one."
                )
        if not np.array_equal(found.tokens, stream):
            raise ReferenceFileError(f"{folder} is damaged: {_TOKENS} has changed.")
        return found

    @classmethod
    def open(cls, folder: Path, *, mode: Any = "r") -> ReferenceLosses:
        """Opens a folder that :meth:`create` began, without reading it into memory.

        Raises:
            ReferenceFileError: There are no losses in it, or its files are damaged.
        """
        try:
            about = json.loads((folder / _ABOUT).read_text())
            tokens = np.load(folder / _TOKENS, mmap_mode="r")
            losses = np.load(folder / _LOSSES, mmap_mode=mode)
        except (OSError, ValueError, EOFError) as error:
            raise ReferenceFileError(f"{folder} holds no reference losses: {error}") from None
        if not isinstance(about, dict):
            raise ReferenceFileError(f"{folder} is damaged: {_ABOUT} holds no JSON object.")
        shape = (about.get("n_tokens"),)
        for name, array, dtype in ((_TOKENS, tokens, np.int32), (_LOSSES, losses, np.float32)):
            if array.shape != shape or array.dtype != dtype:
                raise ReferenceFileError(
                    f"{folder} is damaged: {name} must be {np.dtype(dtype)} {shape}, got "
                    f"{array.dtype} {array.shape}."
                )
        return cls(tokens, losses, about)

    @property
    def n_done(self) -> int:
        """Losses that have been computed, from the first on; N - 1 in the end."""
        missing = np.flatnonzero(np.isnan(self.losses))
        return int(missing[0]) if len(missing) else len(self.losses)

    def rows(self, starts: npt.ArrayLike, length: int) -> dict[str, npt.NDArray[Any]]:
        """Sequences out of the stream, as a model takes them.

        Args:
            starts: ``(B,)`` positions of their first tokens.
            length: S, their tokens.

        Returns:
            input_ids and labels, int64 ``(B, S)``, and reference_nll, float32 ``(B, S)``.

        Raises:
            ValueError: A sequence leaves the stream.
            ReferenceFileError: A loss in it has not been computed.
        """
        starts = np.asarray(starts)
        n_tokens = len(self.tokens)
        if length < 1 or starts.min(initial=0) < 0 or starts.max(initial=0) + length > n_tokens:
            raise ValueError(
                f"starts must be in [0, {n_tokens - length}] for {length} of {n_tokens} tokens, "
                f"got {starts.min(initial=0)} to {starts.max(initial=0)}."
            )
        index = starts[:, None] + np.arange(length)
        losses = np.array(self.losses[index])
        # Of a row's last position, which predicts nothing in it, nobody asks the loss.
        if np.isnan(losses[:, :-1]).any():
            raise ReferenceFileError(
                f"reference losses are computed for {self.n_done} of {n_tokens - 1} tokens only: "
                f"let cggr score go on."
            )
        ids = np.array(self.tokens[index]).astype(np.int64)
        losses[:, -1] = np.nan_to_num(losses[:, -1])
        # Two arrays, so that labels can be masked without a change of what the model reads.
        return {"input_ids": ids, "labels": ids.copy(), "reference_nll": losses}
