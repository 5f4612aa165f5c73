"""Training by the token split in every combination: it learns, and nothing stays.

On a CUDA device, if there is one, 200 steps of every model in every way. Otherwise half as many of
one model in every way, and of every model in one.
"""

import functools
import gc

import models
import pytest
import torch
from token_steps import enable_checkpointing, lora, of_peft

from cggr.torch import CGGRModel

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAMES = ["llama", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gptj", "falcon", "bert"]
STEPS, BATCH, LENGTH = 200 if CUDA else 100, 4, 24
BACKEND = "inductor" if CUDA else "aot_eager"  # whose C++ takes a minute to compile


def adapted(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return lora(model, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM)


def checkpointed(reentrant, model):
    enable_checkpointing(model, reentrant)
    return model


def left_padded(ids):
    first_B1 = torch.arange(len(ids))[:, None]
    return {"attention_mask": (torch.arange(ids.shape[1]) >= first_B1).long()}


def right_padded(ids):
    return {"attention_mask": left_padded(ids)["attention_mask"].flip(1)}


def packed(ids):
    return {"position_ids": (torch.arange(ids.shape[1]) % 9).expand(ids.shape).contiguous()}


# What differs from: the model itself, in float32, on inputs without padding, one batch a step.
WAYS = {
    "plain": {},
    "eager attention": {"attention": "eager"},
    "left padding": {"inputs": left_padded},
    "right padding": {"inputs": right_padded},
    "packed": {"inputs": packed},
    "LoRA": {"change": adapted, "falls_to": 0.9},
    "checkpointing": {"change": functools.partial(checkpointed, False)},
    "reentrant": {"change": functools.partial(checkpointed, True)},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "checkpointing in bfloat16": {
        "change": functools.partial(checkpointed, False),
        "dtype": torch.bfloat16,
    },
    "accumulated": {"micro_batches": 2},
    "exact capacity": {"capacity": "exact"},
    "stratified": {"selection": "stratified"},
    "compiled": {"change": functools.partial(torch.compile, dynamic=False, backend=BACKEND)},
}
IMPOSSIBLE = {
    ("bert", "LoRA"),  # peft calls its task by another name
    ("bert", "packed"),  # its sequences see each other
    ("falcon", "packed"),
}
COMBINATIONS = [
    (name, way)
    for name in NAMES
    for way in WAYS
    if (CUDA or name == "llama" or way == "plain") and (name, way) not in IMPOSSIBLE
]


def bytes_in_use():
    gc.collect()
    if CUDA:
        return torch.cuda.memory_allocated()
    tensors = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))
    storages = (x.untyped_storage() for x in tensors if not x.is_meta)
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


@pytest.fixture
def nothing_from_before():
    """Hides the tensors that other tests left in this process from the collector."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_from_before")
@pytest.mark.float64  # of the scaler, and where it is compiled
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # are not wanted here
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft sets it
@of_peft
@pytest.mark.parametrize(("name", "way"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
def test_it_learns_and_leaves_nothing(name, way):
    options = dict(WAYS[way])
    change, falls_to = options.pop("change", lambda model: model), options.pop("falls_to", 0.5)
    dtype, micro_batches = options.pop("dtype", None), options.pop("micro_batches", 1)
    inputs_of, attention = options.pop("inputs", lambda ids: {}), options.pop("attention", None)
    options = {"selection": "importance", "capacity": "static"} | options
    cap = {"final_logit_softcapping": 30.0} if name.startswith("gemma") else {}
    torch._dynamo.reset()
    model = models.build(name, **cap)
    if attention is not None:
        model.set_attn_implementation(attention)
    wrapped = CGGRModel(change(model), split="token", warmup_steps=20, **options).to(DEVICE)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2 if way == "LoRA" else 3e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype is torch.float16)
    ids = models.token_ids(BATCH, LENGTH)
    batch = {"input_ids": ids, "labels": models.labels_for(name, ids), **inputs_of(ids)}
    parts = [
        {key: x[i::micro_batches].to(DEVICE) for key, x in batch.items()}
        for i in range(micro_batches)
    ]

    def dense_loss():
        wrapped.eval()
        with torch.no_grad():
            loss = sum(wrapped(**part).item() for part in parts) / micro_batches
        wrapped.train()
        return loss

    before, in_use = dense_loss(), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in parts:
            with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
                loss = wrapped(**part) / micro_batches
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        wrapped.step()
        del loss
        if step in (STEPS // 2, STEPS - 1):
            in_use.append(bytes_in_use())
    assert in_use[1] <= in_use[0]
    assert dense_loss() < falls_to * before
    torch._dynamo.reset()
