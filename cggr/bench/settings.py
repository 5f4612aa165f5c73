"""What can be measured, and how thoroughly."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

BENCHMARKS = {
    "statistics": "of logits, against a loop that reads, PyTorch, cggr 0.5.0",
    "linear_loss": "CGGRLinearLoss, with gradients, against dense losses",
    "linear_statistics": "of a linear head, fused against chunked",
    "step": "CGGRModel's whole step, time and memory, against dense steps",
    "batch": "the largest whose step fits into 12 GiB",
    "jax_statistics": "of logits, from JAX against from PyTorch",
}


class BenchError(Exception):
    """A benchmark cannot run; the message is one line that says what is missing."""


@dataclasses.dataclass(frozen=True)
class Case:
    """The shape of what is measured.

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
    """

    quick: bool = False
    cggr_050: Path | None = None
    seed: int = 0

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

    def to_json(self) -> dict[str, object]:
        """The settings as plain values."""
        return {
            "quick": self.quick,
            "rounds": self.rounds,
            "seed": self.seed,
            "with_cggr_050": self.cggr_050 is not None,
            "CGGR_IMPLEMENTATION": os.environ.get("CGGR_IMPLEMENTATION"),
        }
