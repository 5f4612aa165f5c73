"""What can be measured, and how thoroughly."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

BENCHMARKS = {
    "statistics": "of logits, against a loop that reads, PyTorch, cggr 0.5.0",
    "linear_loss": "CGGRLinearLoss, with gradients, against dense losses",
    "linear_statistics": "of a linear head, fused against chunked",
    "attention": "of selected positions, by our kernels against masked sdpa",
    "step": "CGGRModel's whole step, time and memory, against dense steps",
    "batch": "the largest whose step fits into 12 GiB",
    "latency": "of CGGRModel's step on four times the sequences",
    "flash": "attention by each backend, in whole steps",
    "growth": "of time and memory with length, batch and vocabulary",
    "jax_step": "CGGRModel's step in Flax, against a dense one",
    "jax_statistics": "of logits, from JAX against from PyTorch",
}


AnyCase = TypeVar("AnyCase", bound="Shape")


class BenchError(Exception):
    """A benchmark cannot run; the message is one line that says what is missing."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of what is measured."""

    @property
    def title(self) -> str:
        """The shape in words."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Case(Shape):
    """The shape of logits, or of a linear head.

    Args:
        n_rows: N.
        n_classes: V.
        hidden_size: D, None where there are only logits.
        dtype: Of the logits, or of the hidden states and the weight, as PyTorch names it.
    """

    n_rows: int
    n_classes: int
    hidden_size: int | None = None
    dtype: str = "bfloat16"

    @property
    def title(self) -> str:
        """The shape in words."""
        hidden = "" if self.hidden_size is None else f"D={self.hidden_size:,} "
        return f"N={self.n_rows:,} {hidden}V={self.n_classes:,} {self.dtype}"


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """How to measure.

    Args:
        quick: Few rounds, and the first shape only.
        cggr_050: Folder with the modules of cggr 0.5.0, which cannot be installed beside this one.
        seed: Of the random inputs.
        cases: Numbers of the shapes to measure, from 1; all, or the first if quick, when empty.
        only: Names of the contestants to measure, or patterns like ``token*``; all when empty.
    """

    quick: bool = False
    cggr_050: Path | None = None
    seed: int = 0
    cases: tuple[int, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cggr_050 is not None and not (self.cggr_050 / "triton_kernels.py").is_file():
            raise BenchError(
                f"--cggr-050 {self.cggr_050}: no triton_kernels.py in it; unpack the wheel of "
                "cggr 0.5.0 there"
            )

    @property
    def rounds(self) -> int:
        """Turns of every contestant; their median counts."""
        return 3 if self.quick else 20

    def wants(self, contestant: str) -> bool:
        """Whether a contestant of this name is to be measured."""
        return not self.only or any(
            fnmatch.fnmatchcase(contestant, pattern) for pattern in self.only
        )

    def chosen(self, cases: Sequence[AnyCase]) -> Sequence[AnyCase]:
        """The shapes that are to be measured.

        Raises:
            BenchError: There is no shape of a number that was asked for.
        """
        for number in self.cases:
            if number > len(cases):
                raise BenchError(f"--case {number}: there are {len(cases)} shapes")
        if self.cases:
            return [cases[number - 1] for number in self.cases]
        return cases[:1] if self.quick else cases

    def to_json(self) -> dict[str, object]:
        """The settings as plain values."""
        return {
            "quick": self.quick,
            "rounds": self.rounds,
            "seed": self.seed,
            "cases": self.cases or None,
            "only": self.only or None,
            "with_cggr_050": self.cggr_050 is not None,
            "CGGR_IMPLEMENTATION": os.environ.get("CGGR_IMPLEMENTATION"),
        }
