"""Run by torchrun, for test_torch_distributed: every way in many processes against one alone.

A process drives a GPU where there are enough, with NCCL, else the CPU, with gloo. Prints all cases
as JSON.
"""

import json
import os
import tempfile

import torch
import torch.distributed as dist
from models import build
from processes import leave
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

import cggr.torch.model as cggr_model
from cggr.torch import CGGRModel, create_truncated_router
from cggr.torch.trainer import CGGRTrainer

BATCH, LENGTH = 4, 10
SPLITS = {
    "token": {"split": "token"},
    "token, static": {"split": "token", "capacity": "static"},
    "token, router": {"split": "token", "router": 1},
    "token, random": {"split": "token", "selection": "random"},
    "backward": {"split": "backward"},
    "backward, static": {"split": "backward", "capacity": "static"},
    "sequence": {"split": "sequence"},
    "sequence, static": {"split": "sequence", "capacity": "static"},
    "sequence, router": {"split": "sequence", "router": 1},
    "sequence, topk": {"split": "sequence", "selection": "topk"},
}
WAYS = ("ddp", "fsdp", "trainer", "accelerate")
MODELS = ("llama", "gpt2")  # gpt2's head is its embedding
TRAINED = ("token", "backward", "sequence")  # by the trainer
CASES = [(name, way, split) for name in MODELS for way in WAYS for split in SPLITS]


def routed(model: nn.Module, split: str) -> CGGRModel:
    options = {"selection": "importance", "warmup_steps": 0, "min_tokens_ratio": 0.3}
    options |= SPLITS[split]
    router = create_truncated_router(model, options.pop("router")) if "router" in options else None
    return CGGRModel(model, router, **options)


def wrapped(way: str, model: nn.Module, cggr: CGGRModel):
    """What a loop calls."""
    if way == "ddp":
        return DistributedDataParallel(cggr)
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    for layer in layers:
        fully_shard(layer)
    if way == "fsdp":
        return fully_shard(cggr)
    # As CGGRTrainer does: the sharded model's own forward, replaced for one call.
    if way == "accelerate":
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
        tail = [norm, embedding, head]
        if embedding.weight is not head.weight:
            fully_shard(embedding)
            tail.remove(embedding)
        fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)

    def forward(**inputs):
        del model.forward
        return {"loss": cggr(**inputs)}

    def call(ids, *, labels):
        model.forward = forward
        return model(input_ids=ids, labels=labels)["loss"]

    return call


def compare(name: str, way: str, split: str, labels_RBS: torch.Tensor, ids_RBS: torch.Tensor):
    """Loss and relative errors of gradients, against ranks run one after the other."""
    rank, world = dist.get_rank(), dist.get_world_size()
    reference = build(name).to(ids_RBS.device)
    alone = routed(reference, split)
    expected = 0.0
    process_rank = cggr_model.process_rank
    try:
        for other in range(world):
            cggr_model.process_rank = lambda *_, other=other: other
            alone.scorer.draw_count.fill_(0)
            loss = alone(ids_RBS[other], labels=labels_RBS[other]) / world
            loss.backward()
            expected += loss.item()
    finally:
        cggr_model.process_rank = process_rank
    model = build(name).to(ids_RBS.device)
    step = wrapped(way, model, routed(model, split))
    loss = step(ids_RBS[rank], labels=labels_RBS[rank])
    loss.backward()
    mean_loss = loss.detach() / world
    dist.all_reduce(mean_loss)
    errors = {}
    for (key, parameter), wanted in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        got = parameter.grad
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        scale = wanted.grad.norm().item()
        errors[key] = (got - wanted.grad).norm().item() / (scale or 1.0)
    return {"loss": mean_loss.item(), "expected": expected, "errors": errors}


def misuse(ids_RBS: torch.Tensor) -> str:
    """What is said where the model was sharded as a whole, and not what is around it."""
    model = build("llama").to(ids_RBS.device)
    cggr = routed(model, "sequence")
    wrapped("trainer", model, cggr)
    try:
        cggr(ids_RBS[0], labels=ids_RBS[0])
    except ValueError as error:
        return str(error)
    return ""


def train(split: str, *, empty: bool, average: bool, fsdp: bool) -> dict[str, float]:
    """Largest distance of a weight after CGGRTrainer's steps, from those of a plain loop."""
    device = "cpu" if not torch.cuda.is_available() else "cuda"
    steps, world, ids = 3, dist.get_world_size(), torch.arange(3, 63)
    rows = torch.stack([ids.roll(3 * i)[:LENGTH] for i in range(steps * world * BATCH)])
    labels = rows.clone()
    if empty:  # what the second process has in the first step
        labels[BATCH : 2 * BATCH] = -100
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            average_tokens_across_devices=average,
            ddp_find_unused_parameters=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            use_cpu=device == "cpu",
            fsdp=fsdp,
        )
        options = {"selection": "importance", "warmup_steps": 2, "min_tokens_ratio": 0.3}
        options["dynamic_threshold"] = True
        ran = CGGRTrainer(build("llama"), args, train_dataset=data, routing=options | SPLITS[split])
        ran.train()
    model = build("llama").to(device)
    alone = CGGRModel(model, **options | SPLITS[split])
    process_rank = cggr_model.process_rank
    for step in range(steps):
        n_items = [
            (labels[(step * world + rank) * BATCH :][:BATCH, 1:] != -100).sum()
            for rank in range(world)
        ]
        for rank in range(world):
            part = slice((step * world + rank) * BATCH, (step * world + rank + 1) * BATCH)
            cggr_model.process_rank = lambda *_, rank=rank: rank
            alone.scorer.draw_count.fill_(step)
            items = sum(n_items) if average else n_items[rank] * world
            loss = alone(
                rows[part].to(device), labels=labels[part].to(device), num_items_in_batch=items
            )
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
        alone.step()
    cggr_model.process_rank = process_rank
    trained = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in ran.model.parameters()]
    pairs = zip(trained, model.parameters(), strict=True)
    distance = max((got - wanted).abs().max().item() for got, wanted in pairs)
    moved = zip(model.parameters(), build("llama").to(device).parameters(), strict=True)
    return {"distance": distance, "moved": max((a - b).abs().max().item() for a, b in moved)}


def main() -> None:
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.device_count() >= world:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if device.type == "cpu":
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("nccl", device_id=device)
    generator = torch.Generator().manual_seed(1)
    ids_RBS = torch.randint(3, 60, (world, BATCH, LENGTH), generator=generator).to(device)
    padded_RBS = ids_RBS.clone()
    padded_RBS[:, 0, LENGTH // 2 :] = -100
    empty_RBS = ids_RBS.clone()
    empty_RBS[1] = -100  # the second process has nothing to learn from
    labels = {"all": ids_RBS, "padded": padded_RBS, "empty": empty_RBS}
    rows = [{"misuse": misuse(ids_RBS)}]
    for name, way, split in CASES:
        for kind, labels_RBS in labels.items():
            case = {"model": name, "way": way, "split": split, "labels": kind}
            rows.append(case | compare(name, way, split, labels_RBS, ids_RBS))
    # Accelerate shards on GPUs alone.
    for fsdp in (False, True) if device.type == "cuda" else (False,):
        for split in TRAINED:
            for empty in (False, True):
                for average in (False, True):
                    case = {"empty": empty, "average": average, "fsdp": fsdp}
                    rows.append({"trainer": split} | case | train(split, **case))
    if dist.get_rank() == 0:
        print(json.dumps({"world": world, "device": device.type, "rows": rows}))
    leave()


if __name__ == "__main__":
    main()
