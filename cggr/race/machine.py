"""What a machine can use, and what a result was measured on."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

MISSING = "not installed"


def package_version(name: str) -> str:
    """Version of an installed distribution, or ``not installed``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def cpu_name() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Number of processors that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_commit() -> str | None:
    """Commit of the working directory, with ``+changes`` if it differs; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What runs a race.

    Args:
        versions: Of the framework and what it stands on, None for what it does not use.
        device: The device, as the framework names it.
        gpu: The card's name, None on a CPU.
        threads: CPU threads of the framework.
    """

    versions: dict[str, str | None]
    device: str
    gpu: str | None
    threads: int


def environment(runtime: Runtime) -> dict[str, object]:
    """What a reader needs to know of the machine and the versions to judge a measurement."""
    return {
        "versions": {
            "python": platform.python_version(),
            "cggr": package_version("cggr"),
            **runtime.versions,
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cores": cpu_count(),
            "threads": runtime.threads,
            "device": runtime.device,
            "gpu": runtime.gpu,
        },
        "git_commit": git_commit(),
    }


def share_memory() -> None:
    """Keeps JAX, when it starts, from taking most of the card's memory at once, as is its habit."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def capabilities() -> list[tuple[str, str]]:
    """Everything that CGGR could use here, as rows of name and finding."""
    rows = [
        ("cggr", package_version("cggr")),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("CPU", f"{cpu_name()}, {cpu_count()} cores"),
        ("torch", package_version("torch")),
    ]
    if rows[-1][1] != MISSING:
        rows += _torch_devices()
    for name in ("triton", "transformers", "flash-attn", "jax"):
        rows.append((name, package_version(name)))
    if rows[-1][1] != MISSING:
        rows.append(("  devices", _jax_devices()))
    rows += [(name, package_version(name)) for name in ("flax", "jax-triton")]
    return rows


def _torch_devices() -> list[tuple[str, str]]:
    import torch

    rows = [("  CPU", f"{torch.get_num_threads()} threads")]
    # A build for ROCm answers through the same functions.
    platform_name = "ROCm" if torch.version.hip else "CUDA"
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for index, card in enumerate(cards):
        size = f"{card.total_memory / 2**30:.0f} GiB"
        capability = f"capability {card.major}.{card.minor}"
        rows.append((f"  {platform_name} {index}", f"{card.name}, {size}, {capability}"))
    if not cards:
        rows.append((f"  {platform_name}", "no device"))
    rows.append(("  MPS", "available" if torch.backends.mps.is_available() else "no device"))
    return rows


def _jax_devices() -> str:
    share_memory()
    try:
        jax = importlib.import_module("jax")
        return ", ".join(f"{device.device_kind} ({device})" for device in jax.devices())
    except (ImportError, RuntimeError) as error:  # jaxlib missing; no backend could start
        return f"cannot be used: {str(error).splitlines()[0]}"
