"""A vocabulary that is spread over processes, in processes of their own."""

from pathlib import Path

import pytest
import torch
import vocabulary_worker
from processes import run_processes

WORKER = Path(vocabulary_worker.__file__)
CASES = [
    *(("linear", case) for case in vocabulary_worker.PARALLEL),
    *(
        ("logits", case)
        for case, options in vocabulary_worker.PARALLEL.items()
        if not options.keys() & vocabulary_worker.OF_A_HEAD
    ),
    *((way, case) for way in ("fsdp", "both") for case in vocabulary_worker.SHARDED),
]


# Four, but on a machine with two or three GPUs, where two can have one each.
N_PROCESSES = 2 if torch.cuda.device_count() in (2, 3) else 4
# NumPy warns of what the kernels compute and then leave out.
INTERPRETED = {
    "TRITON_INTERPRET": "1",
    "PYTHONWARNINGS": "ignore::RuntimeWarning:triton.runtime.interpreter",
}
ON_CPU = INTERPRETED if torch.cuda.device_count() < 2 else {}


@pytest.fixture(scope="module")
def found():
    """All cases, of one start of the processes."""
    return run_processes(WORKER, N_PROCESSES)


@pytest.fixture(scope="module")
def by_kernels():
    """The Triton kernels in two processes."""
    return run_processes(WORKER, 2, CGGR_IMPLEMENTATION="triton", **ON_CPU)


def check(row):
    # An ulp of bfloat16 is 4e-3, of float16 5e-4.
    tolerance = {"low precision": 1e-2, "half precision": 1e-3}.get(row["case"], 1e-5)
    assert row["loss"] == pytest.approx(row["expected"], rel=1e-5)
    assert row["expected"] > 0.5 or row["case"] == "nothing"
    wrong = {name: error for name, error in row["errors"].items() if not error < tolerance}
    assert not wrong
    assert row["same"]


@pytest.mark.parametrize(("way", "case"), CASES)
def test_loss_and_gradients_are_those_of_one_process(found, way, case):
    (row,) = (row for row in found["rows"] if (row["way"], row["case"]) == (way, case))
    check(row)


def test_whole_sequences_of_a_model_that_transformers_has_spread(found):
    rows = [row for row in found["rows"] if row["way"] == "tp_plan"]
    if not rows:
        pytest.skip("fewer GPUs than processes")
    check(rows[0])
    assert "was loaded by a tp_plan: its layers are parts, spread over" in rows[0]["refused"]


def test_the_kernels_loss_and_gradients_are_those_of_one_process(by_kernels):
    cases = [case for way, case in CASES if way in vocabulary_worker.KINDS]
    assert len(by_kernels["rows"]) == sum(case in vocabulary_worker.OF_KERNELS for case in cases)
    for row in by_kernels["rows"]:
        check(row)
    assert max(by_kernels["statistics"]) < 1e-5


def test_statistics_are_those_of_one_process(found):
    assert max(found["statistics"]) < 1e-5


def test_what_cannot_be_is_refused(found):
    said = found["misuse"]
    assert said["plain"].startswith(
        "ValueError: vocab_parallel='vocabulary' needs a weight that is a DTensor"
    )
    assert said["dimension"].startswith(
        "ValueError: vocab_parallel must be a dimension of weight's mesh, one of 'vocabulary', 0"
    )
    assert "weight must be sharded over its classes, Shard(0)" in said["columns"]
    assert said["bias"] == "TypeError: bias must be a DTensor, as weight is; got a plain tensor."
    assert said["few"].startswith("ValueError: 1 classes in parts of 1 leave none for the last of")
    assert "logits that are a DTensor must be sharded over their classes" in said["tokens"]
    assert said["base_loss"].startswith("ValueError: base_loss needs logits of all classes")
