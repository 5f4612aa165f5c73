"""Claim: routing scales over processes as a dense step does (weak scaling, tokens/s per GPU).

    python benchmarks/scaling.py --processes 1 2 4

Every process has a GPU and a batch of its own, of the same size whatever their number. Steps of
DistributedDataParallel and FSDP2, which gathers a layer's weights for every pass, or keeps them
until its backward pass: forward, backward, AdamW. A round's time is that of the slowest
process, by the host's clock around steps that end with the device's last work. Without GPUs it is a
toy model's, with gloo: whether it runs, not how fast.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cggr.bench import report
from cggr.bench.report import Column, number
from cggr.bench.step import CASES, StepCase, make_model
from cggr.race import machine
from cggr.torch import CGGRModel

TOY = StepCase(4 * 64, 256, 32, "float32", "a toy", 4, 2, 2, 1, 64)
ROUTED = {"token, ratio 0.25": "token", "sequence, ratio 0.25": "sequence"}
WAYS = ("dense", *ROUTED)
WRAPPERS = ("ddp", "fsdp", "fsdp, kept")
WARM_UP_STEPS, STEPS = 5, 5


def make_step(wrapper: str, way: str, case: StepCase, device: torch.device) -> Callable[[], Tensor]:
    """A training step of this process."""
    model = make_model(case, seed=0, device=str(device))
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    shape = (case.batch, case.length)
    ids = torch.randint(case.n_classes, shape, device=device, generator=generator)
    step = model
    if way in ROUTED:
        step = CGGRModel(
            model,
            split=ROUTED[way],
            capacity="static",
            min_tokens_ratio=0.25,
            warmup_steps=0,
            dynamic_threshold=False,
        )
    if wrapper == "ddp":
        step = DistributedDataParallel(step)
    else:
        keep = {"reshard_after_forward": False} if wrapper == "fsdp, kept" else {}
        for layer in model.model.layers:
            fully_shard(layer, **keep)
        step = fully_shard(step, **keep)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def train() -> Tensor:
        optimizer.zero_grad()
        out = step(ids, labels=ids)
        loss: Tensor = out if way in ROUTED else out.loss
        loss.backward()
        optimizer.step()
        return loss

    return train


def seconds(train: Callable[[], Tensor], rounds: int, device: torch.device) -> list[float]:
    """Of a step in each round, by the slowest process."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    for _ in range(WARM_UP_STEPS):
        train()
    found = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            train()
        wait()
        slowest = torch.tensor((time.perf_counter() - start) / STEPS, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(slowest.item())
    return found


def work(case: StepCase, wrappers: Sequence[str], rounds: int) -> None:
    """In one of the processes; the first prints the rows as JSON."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    rows = []
    for wrapper in wrappers:
        for way in WAYS:
            times = seconds(make_step(wrapper, way, case, device), rounds, device)
            rows.append(
                {
                    "contestant": f"{way}, {wrapper}, {dist.get_world_size()}",
                    "processes": dist.get_world_size(),
                    "seconds": times,
                    "tokens_per_s": case.n_rows / statistics.median(times),
                }
            )
    if dist.get_rank() == 0:
        print(json.dumps(rows))
    dist.destroy_process_group()
    # An interpreter that is taken down while a thread of gloo's still holds a tensor aborts
    # (pytorch issue 190489).
    sys.stdout.flush()
    os._exit(0)


def launch(processes: int, arguments: list[str]) -> list[dict[str, Any]]:
    """The rows of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", __file__, "--worker", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main() -> None:
    """Measures by every number of processes, and shows a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--case", type=int, default=1, choices=range(1, len(CASES) + 1))
    parser.add_argument("--wrappers", nargs="+", default=WRAPPERS, choices=WRAPPERS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    case = CASES[options.case - 1] if torch.cuda.is_available() else TOY
    if options.worker:
        work(case, options.wrappers, options.rounds)
        return
    gpus = torch.cuda.device_count()
    if gpus and max(options.processes) > gpus:
        parser.error(f"--processes {max(options.processes)}: this machine has {gpus} GPUs")
    rows: list[dict[str, Any]] = []
    for processes in options.processes:
        passed = [f"--case={options.case}", f"--rounds={options.rounds}"]
        passed += ["--wrappers", *options.wrappers]
        rows += launch(processes, passed)
    first = {row["contestant"].rpartition(",")[0]: row for row in reversed(rows)}
    for row in rows:
        alone = first[row["contestant"].rpartition(",")[0]]
        row["scaling"] = row["tokens_per_s"] / alone["tokens_per_s"]
    here = machine.Runtime(
        versions={"torch": torch.__version__, "cuda": torch.version.cuda},
        device="cuda" if gpus else "cpu",
        gpu=torch.cuda.get_device_name() if gpus else None,
        threads=torch.get_num_threads(),
    )
    title = f"{case.title} in each of {', '.join(map(str, options.processes))} processes"
    columns = (
        Column("tokens/s per process", number("tokens_per_s", ",.0f")),
        Column("of the fewest's", number("scaling", ".3f")),
    )
    report.print_case(Console(), title, rows, columns)
    content = {"benchmark": "scaling", "case": case.title, **machine.environment(here)}
    report.write(options.out / f"scaling-{options.case}.json", {**content, "contestants": rows})


if __name__ == "__main__":
    main()
