"""Run a worker in many processes, by torchrun, and end one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def run_processes(worker: Path, n_processes: int, **environment: str) -> dict:
    """What it prints last, as JSON."""
    if torch.cuda.device_count() < n_processes:
        # One visible GPU is enough for fully_shard's default mesh to take it, which gloo cannot.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n_processes}", str(worker)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def leave() -> None:
    """Ends this process without taking its interpreter down.

    gloo's threads outlive the process group, and one that lets go of a tensor while the interpreter
    is being taken down aborts the process (pytorch issue 190489).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
