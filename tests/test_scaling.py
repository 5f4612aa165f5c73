"""The scripts that measure weak scaling, on toys."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FORCED = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("script", "option", "wrappers"),
    [
        ("scaling", "--processes", ("ddp", "fsdp", "fsdp, kept")),
        ("jax_scaling", "--devices", ("sharded", "per device")),
    ],
)
def test_speed_of_each_way_is_set_against_one_process(script, option, wrappers, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), option, "1", "2", "--rounds=1"]
    command += ["--wrappers", *wrappers]
    environment = os.environ | FORCED | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--out={tmp_path}"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / f"{script}-1.json").read_text())["contestants"]
    speeds = {row["contestant"]: row["tokens_per_s"] for row in rows}
    names = [
        f"{way}, {wrapper}"
        for wrapper in wrappers
        for way in ("dense", "token, ratio 0.25", "sequence, ratio 0.25")
    ]
    assert sorted(speeds) == sorted(f"{name}, {n}" for name in names for n in (1, 2))
    for row in rows:
        name = row["contestant"].rpartition(",")[0]
        assert row["scaling"] == pytest.approx(row["tokens_per_s"] / speeds[f"{name}, 1"])
        assert row["tokens_per_s"] == pytest.approx(4 * 64 / row["seconds"][0])


def test_more_devices_than_there_are(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "jax_scaling.py"), "--devices", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | FORCED)
    assert done.returncode == 2
    assert "--devices 3: JAX sees 2" in done.stderr
