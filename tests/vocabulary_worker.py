"""Run by torchrun, for test_torch_vocabulary: classes spread over processes, against one process.

A process drives a GPU where there are enough, with NCCL, else the CPU, with gloo. Prints all cases
as JSON.
"""

import contextlib
import json
import math
import os
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import build
from processes import leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import cggr.torch.loss
import cggr.torch.model
from cggr.torch import (
    CGGRLinearLoss,
    CGGRLoss,
    CGGRModel,
    linear_token_statistics,
    token_statistics,
)

B, S, D, V = 3, 8, 16, 41  # of which four processes have 11, 11, 11 and 8
BASE = {"selection": "importance", "warmup_steps": 0, "min_tokens_ratio": 0.3}
# Of one batch, that every process has.
PARALLEL = {
    "importance": {},
    "random": {"selection": "random"},
    "stratified": {"selection": "stratified"},
    "top-k": {"selection": "topk"},
    "static": {"capacity": "static"},
    "sequence": {"scope": "sequence", "capacity": "static"},
    "sum": {"reduction": "sum"},
    "everything": {"min_tokens_ratio": 1.0},
    "scaled": {"logit_scale": 0.5},
    "capped": {"logit_scale": 2.0, "softcap": 3.0},
    "biased": {"bias": True},
    "evaluated": {"eval": True},
    "nothing": {"nothing": True},
    "a class ignored": {"ignore_index": 12},
    "items": {"items": 7},
    "compiled": {"capacity": "static", "compiled": True},
    "low precision": {"dtype": "bfloat16"},
    "half precision": {"dtype": "float16"},
}
# Of a batch for each process.
SHARDED = {
    "importance": {},
    "top-k": {"selection": "topk"},
    "static": {"capacity": "static"},
    "biased": {"bias": True},
    "low precision": {"dtype": "bfloat16"},
}
KINDS = ("linear", "logits")
OF_A_HEAD = {"logit_scale", "dtype"}
QUICK = os.environ.get("CGGR_IMPLEMENTATION") == "triton"  # in the interpreter
OF_KERNELS = ("importance", "capped", "biased", "a class ignored", "half precision")


def problem(case, device, batches=1):
    """Hidden states of each batch, the head's weight and bias, targets of each batch."""
    generator = torch.Generator().manual_seed(5)
    dtype = getattr(torch, case.pop("dtype", "float32"))
    hidden = torch.randn(batches, B, S, D, generator=generator).to(device, dtype)
    weight = torch.randn(V, D, generator=generator).to(device)
    bias = torch.randn(V, generator=generator).to(device) if case.pop("bias", False) else None
    targets = torch.randint(0, V, (batches, B, S), generator=generator)
    ignore_index = case.get("ignore_index", -100)
    targets[:, 0, S // 2 :] = ignore_index
    if case.pop("nothing", False):
        targets[:] = ignore_index
    return hidden, weight, bias, targets.to(device)


def error(got, wanted):
    got = got.full_tensor() if isinstance(got, DTensor) else got
    scale = wanted.float().norm().item()
    return (got.float() - wanted.float()).norm().item() / (scale or 1.0)


@contextlib.contextmanager
def as_rank(rank, module=cggr.torch.loss):
    """Draws as that process does."""
    own = module.process_rank
    module.process_rank = lambda *_: rank
    try:
        yield
    finally:
        module.process_rank = own


def compiled(criterion):
    return torch.compile(criterion, fullgraph=True, backend="aot_eager")


def alike(metrics, expected):
    """Whether they have the same tokens, and averages up to rounding."""
    numbers = {name for name, value in expected.items() if isinstance(value, float)}
    exact = expected.keys() - numbers
    return metrics.keys() == expected.keys() and (
        all(metrics[name] == expected[name] for name in exact)
        and all(math.isclose(metrics[name], expected[name], rel_tol=1e-5) for name in numbers)
    )


def parallel(kind, name, mesh):
    """One batch, whose classes the processes share."""
    case = BASE | PARALLEL[name]
    is_compiled, in_training = case.pop("compiled", False), not case.pop("eval", False)
    (hidden,), weight, bias, (targets,) = problem(case, mesh.device_type)
    items = {"num_items_in_batch": case.pop("items")} if "items" in case else {}
    head = {key: case.pop(key) for key in ("logit_scale", "softcap") if key in case}
    spread = distribute_tensor(weight, mesh, [Shard(0)]).to(hidden.dtype)
    spread_bias = None
    if bias is not None:
        spread_bias = distribute_tensor(bias, mesh, [Shard(0)]).to(hidden.dtype).requires_grad_()
        bias = bias.to(hidden.dtype).requires_grad_()
    spread.requires_grad_()
    weight = weight.to(hidden.dtype).requires_grad_()
    own, alone = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    if kind == "linear":
        criterion = CGGRLinearLoss(**case, **head, vocab_parallel="vocabulary").train(in_training)
        call = compiled(criterion) if is_compiled else criterion
        loss = call(own, spread, targets, bias=spread_bias, **items)
        reference = CGGRLinearLoss(**case, **head).train(in_training)
        with as_rank(0):
            expected = reference(alone, weight, targets, bias=bias, **items)
    else:
        criterion = CGGRLoss(**case).train(in_training)
        call = compiled(criterion) if is_compiled else criterion
        shared = DTensor.from_local(own, mesh, [Replicate()])
        logits = F.linear(shared, spread, spread_bias)
        assert logits.placements == (Shard(2),)
        loss = call(logits, targets, **items)
        reference = CGGRLoss(**case).train(in_training)
        with as_rank(0):
            expected = reference(F.linear(alone, weight, bias), targets, **items)
    loss.backward()
    expected.backward()
    errors = {"hidden": error(own.grad, alone.grad), "weight": error(spread.grad, weight.grad)}
    if bias is not None:
        errors["bias"] = error(spread_bias.grad, bias.grad)
    metrics = alike(criterion.get_metrics(), reference.get_metrics()) if in_training else True
    return {"loss": loss.item(), "expected": expected.item(), "errors": errors, "same": metrics}


class Head(nn.Module):
    """A head that a loop reads the weight of."""

    def __init__(self, weight, bias):
        super().__init__()
        self.linear = nn.Linear(D, V, bias=bias is not None)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            if bias is not None:
                self.linear.bias.copy_(bias)


def sharded(name, mesh, vocab_parallel=None):
    """A batch for each process, or for each row of a mesh of two dimensions."""
    case = BASE | SHARDED[name]
    n_batches = mesh.size(0)
    batch = mesh.get_local_rank(0)
    hidden, weight, bias, targets = problem(case, mesh.device_type, n_batches)
    head = Head(weight, bias).to(mesh.device_type)
    if vocab_parallel is not None:
        parallelize_module(head, mesh["vocabulary"], {"linear": ColwiseParallel()})
        fully_shard(head, mesh=mesh["data"])
    else:
        fully_shard(head, mesh=mesh)
    own = hidden[batch].clone().requires_grad_()
    criterion = CGGRLinearLoss(**case, vocab_parallel=vocab_parallel)
    linear = head.linear
    loss = criterion(own, linear.weight, targets[batch], bias=linear.bias)
    loss.backward()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    alone = hidden.clone().requires_grad_()
    weight.requires_grad_()
    expected, first = 0.0, mesh.mesh[:, 0] if mesh.ndim == 2 else mesh.mesh
    for other in range(n_batches):
        one = weight.to(hidden.dtype), None if bias is None else bias.requires_grad_()
        with as_rank(int(first[other])):
            reference = CGGRLinearLoss(**case)
            part = reference(alone[other], one[0], targets[other], bias=one[1]) / n_batches
        part.backward()
        expected += part.item()
    errors = {
        "hidden": error(own.grad, alone.grad[batch] * n_batches),
        "weight": error(linear.weight.grad, weight.grad),
    }
    if bias is not None:
        errors["bias"] = error(linear.bias.grad, bias.grad)
    return {"loss": mean.item(), "expected": expected, "errors": errors, "same": True}


def statistics(mesh, with_targets):
    """Largest distance of a statistic, by logits and by a head."""
    hidden, weight, _, targets = problem({}, mesh.device_type)
    hidden, targets = hidden[0], targets[0] if with_targets else None
    weight[7] = weight[30]  # a tie over two processes
    spread = distribute_tensor(weight, mesh, [Shard(0)])
    logits = F.linear(hidden, weight)
    wanted = token_statistics(logits, targets)
    results = (
        token_statistics(distribute_tensor(logits, mesh, [Shard(2)]), targets),
        token_statistics(distribute_tensor(logits, mesh, [Replicate()]), targets),
        linear_token_statistics(hidden, spread, targets, vocab_parallel=0),
        linear_token_statistics(
            distribute_tensor(hidden, mesh, [Shard(1)]), spread, targets, vocab_parallel=0
        ),
        linear_token_statistics(hidden, spread, targets),
    )
    return max(
        (a - b).abs().max().item()
        for found in results
        for a, b in zip(found, wanted, strict=True)
        if b is not None
    )


def tensor_parallel(device):
    """Whole sequences of a model that transformers has spread, against the model itself."""
    alone = build("llama", num_key_value_heads=4, vocab_size=68).to(device)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        if dist.get_rank() == 0:
            alone.save_pretrained(folder)
        dist.barrier()
        spread = AutoModelForCausalLM.from_pretrained(
            shared[0], distributed_config=DistributedConfig(tp_plan="auto")
        )
        dist.barrier()
    ids = torch.randint(3, 60, (8, 10), generator=torch.Generator().manual_seed(2)).to(device)
    model, reference = CGGRModel(spread, **BASE), CGGRModel(alone, split="sequence", **BASE)
    loss = model(ids, labels=ids)
    loss.backward()
    with as_rank(0, cggr.torch.model):
        expected = reference(ids, labels=ids)
    expected.backward()
    pairs = zip(spread.named_parameters(), alone.parameters(), strict=True)
    errors = {name: error(got.grad, wanted.grad) for (name, got), wanted in pairs}
    same = model.split == "sequence"
    refused = said(lambda: CGGRModel(spread, split="token", **BASE))
    found = {"loss": loss.item(), "expected": expected.item(), "errors": errors, "same": same}
    return found | {"refused": refused}


def said(call):
    try:
        call()
    except (TypeError, ValueError) as refused:
        return f"{type(refused).__name__}: {refused}"
    return ""


def misuse(mesh):
    """What is said of what cannot be."""
    hidden, weight, bias, targets = problem({"bias": True}, mesh.device_type)
    hidden, targets = hidden[0], targets[0]
    rows = distribute_tensor(weight, mesh, [Shard(0)])
    columns = distribute_tensor(weight, mesh, [Shard(1)])
    few = distribute_tensor(weight[:1], mesh, [Shard(0)])
    logits = distribute_tensor(F.linear(hidden, weight), mesh, [Shard(1)])
    parts = distribute_tensor(F.linear(hidden, weight), mesh, [Shard(2)])

    def linear(weight, dimension, **options):
        return lambda: linear_token_statistics(
            hidden, weight, targets, vocab_parallel=dimension, **options
        )

    return {
        "plain": said(linear(weight, "vocabulary")),
        "dimension": said(linear(rows, "data")),
        "columns": said(linear(columns, "vocabulary")),
        "bias": said(linear(rows, "vocabulary", bias=bias)),
        "few": said(linear(few, "vocabulary")),
        "tokens": said(lambda: token_statistics(logits, targets)),
        "base_loss": said(
            lambda: CGGRLoss(base_loss=nn.CrossEntropyLoss(reduction="none"))(parts, targets)
        ),
    }


def main() -> None:
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    device = "cpu"
    if torch.cuda.device_count() >= world:
        device = "cuda"
        torch.cuda.set_device(local)
    if device == "cpu":
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("nccl", device_id=torch.device(device, local))
    line = init_device_mesh(device, (world,), mesh_dim_names=("vocabulary",))
    rows = []
    for kind in KINDS:
        for name, case in PARALLEL.items():
            if kind == "logits" and OF_A_HEAD & case.keys():
                continue
            if QUICK and name not in OF_KERNELS:
                continue
            rows.append({"way": kind, "case": name} | parallel(kind, name, line))
    if not QUICK:
        square = init_device_mesh(device, (2, world // 2), mesh_dim_names=("data", "vocabulary"))
        data = init_device_mesh(device, (world,), mesh_dim_names=("data",))
        for name in SHARDED:
            rows.append({"way": "fsdp", "case": name} | sharded(name, data))
            rows.append({"way": "both", "case": name} | sharded(name, square, "vocabulary"))
        if device == "cuda" or not torch.cuda.is_available():  # which transformers would take
            rows.append({"way": "tp_plan", "case": "sequence"} | tensor_parallel(device))
    distances = [statistics(line, with_targets) for with_targets in (True, False)]
    found = {"rows": rows, "statistics": distances, "misuse": misuse(line)}
    if dist.get_rank() == 0:
        print(json.dumps({"world": world, "device": device} | found))
    leave()


if __name__ == "__main__":
    main()
