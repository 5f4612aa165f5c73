"""CGGRModel in DistributedDataParallel and fully_shard, in processes of their own."""

from pathlib import Path

import distributed_worker
import pytest
from processes import run_processes

WORKER = Path(distributed_worker.__file__)
WAYS = {
    "ddp": "DistributedDataParallel around it",
    "fsdp": "fully_shard of the layers and of it",
    "trainer": "fully_shard of the model, whose forward is replaced",
    "accelerate": "the same, with norm and head in a part of their own",
}


@pytest.fixture(scope="module")
def found():
    """All cases, of one start of two processes."""
    return run_processes(WORKER, 2)


@pytest.mark.parametrize(("model", "way", "split"), distributed_worker.CASES)
@pytest.mark.parametrize("labels", ["all", "padded", "empty"])
def test_gradients_are_those_of_one_process(found, model, way, split, labels):
    case = {"model": model, "way": way, "split": split, "labels": labels}
    (row,) = (row for row in found["rows"] if case.items() <= row.items())
    tolerance = 1e-5
    assert row["loss"] == pytest.approx(row["expected"], abs=tolerance)
    assert row["expected"] > 0.5
    wrong = {name: error for name, error in row["errors"].items() if not error < tolerance}
    assert not wrong


def test_a_model_that_was_sharded_by_itself_is_refused(found):
    said = found["rows"][0]["misuse"]
    assert "give fully_shard the CGGRModel in its place, after the model's layers" in said


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("split", distributed_worker.TRAINED)
def test_a_trainers_steps_are_those_of_one_process(found, split, empty, average, fsdp):
    if fsdp and found["device"] == "cpu":
        pytest.skip("fewer GPUs than processes: accelerate's FSDP2 needs them")
    case = {"trainer": split, "empty": empty, "average": average, "fsdp": fsdp}
    (row,) = (row for row in found["rows"] if case.items() <= row.items())
    assert row["moved"] > 0.01
    assert row["distance"] < 1e-5
