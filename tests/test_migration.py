"""What the README of cggr 0.5.0 shows runs with the import changed; old names lead somewhere."""

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import models
import pytest
import torch
import truth
from torch import nn

import cggr


def test_batch_splitting():
    from cggr.torch import CGGRModel, create_truncated_router

    model = models.build("llama", layers=6)
    input_ids = models.token_ids(8)
    labels = input_ids.clone()
    router = create_truncated_router(model, num_layers=4)
    cggr_model = CGGRModel(model, router=router, min_tokens_ratio=0.25)
    optimizer = torch.optim.AdamW(cggr_model.parameters(), lr=1e-2)

    first = model(input_ids=input_ids, labels=labels).loss.item()
    for _ in range(5):
        optimizer.zero_grad()
        loss = cggr_model(input_ids, labels=labels)
        loss.backward()
        optimizer.step()
        cggr_model.step()
    assert model(input_ids=input_ids, labels=labels).loss.item() < first - 0.5
    metrics = cggr_model.get_metrics()
    assert metrics["step"] == 4
    assert metrics["tokens_total"] == 72
    # 996 of the 1000 steps of the warm-up are left: nearly all tokens are asked for.
    assert 0.99 < metrics["token_ratio"] <= 1.0


def test_manual_integration():
    from cggr.torch import CGGRLoss

    criterion = CGGRLoss(
        scoring="combined",
        selection="stratified",
        min_tokens_ratio=0.25,
        warmup_steps=1000,
    )
    generator = torch.Generator().manual_seed(0)
    model = nn.Embedding.from_pretrained(torch.randn(29, 29, generator=generator), freeze=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"scoring": "combined", "selection": "stratified"}
    for step in range(3):
        input_ids = torch.randint(0, 29, (4, 16), generator=generator)
        targets = torch.randint(0, 29, (4, 16), generator=generator)
        optimizer.zero_grad()
        logits = model(input_ids)
        loss = criterion(logits, targets)
        loss.backward()
        optimizer.step()
        criterion.step()
        statistics = truth.statistics(logits.detach().numpy(), targets.numpy())
        chosen = truth.select(
            truth.difficulty(statistics, "combined"),
            options,
            step=step,
            draw=step,
            confidence=statistics["confidence"],
        )
        want = truth.loss(logits.detach().numpy(), targets.numpy(), chosen, options)
        assert loss.item() == pytest.approx(want, rel=1e-5)
        assert criterion.metrics["tokens_selected"] == chosen.count


def test_native_integration():
    from cggr.torch import CGGRScorer, create_truncated_router

    class Block(nn.Module):
        def __init__(self, router, expert):
            super().__init__()
            self.scorer = CGGRScorer(router, min_tokens_ratio=0.5, selection="topk")
            self.expert = expert

        def forward(self, input_ids, x):
            difficulty, mask, info = self.scorer(input_ids)
            return self.expert(x) * mask.unsqueeze(-1), difficulty, mask, info

    model = models.build("llama", layers=6)
    block = Block(create_truncated_router(model, num_layers=4), nn.Identity())
    block.scorer.step_count.fill_(1000)
    input_ids = models.token_ids()
    x = torch.ones(4, models.LENGTH, 3)
    expert_output, difficulty, mask, info = block(input_ids, x)
    assert torch.equal(expert_output, x.masked_fill(~mask[..., None], 0))
    assert difficulty.shape == mask.shape == (4, models.LENGTH)
    assert difficulty[mask].min() >= difficulty[~mask].max()  # the hard ones go to the expert
    assert 20 <= mask.sum() <= 30  # 0.5, raised by up to half of it while the model is unsure
    assert mask.sum().item() == -(-40 * int(info["current_ratio"] * truth.ONE) // truth.ONE)
    assert info["confidence"].shape == info["entropy"].shape == (4, models.LENGTH)


def test_every_constructor_keyword_of_0_5_0():
    from cggr.torch import CGGRLoss, CGGRModel, CGGRScorer

    shared = {
        "min_tokens_ratio": 0.25,
        "warmup_steps": 1000,
        "dynamic_threshold": True,
        "threshold_sensitivity": 0.5,
        "selection": "fixed_quota",
    }
    criterion = CGGRLoss(
        scoring="combined",
        num_strata=4,
        min_tokens_per_sequence=1,
        base_loss=nn.CrossEntropyLoss(reduction="none"),
        **shared,
    )
    assert criterion.config == cggr.RoutingConfig(selection="fixed_quota", dynamic_threshold=True)
    router = nn.Embedding(5, 5)
    assert CGGRScorer(router=router, **shared).config == criterion.config
    assert CGGRModel(model=nn.Embedding(5, 5), router=router, **shared).config == criterion.config


@pytest.mark.parametrize(
    "name", ["CGGRLoss", "CGGRModel", "CGGRScorer", "TruncatedRouter", "create_truncated_router"]
)
def test_the_old_import_says_where_to_go(name):
    message = (
        f"{name} lives in a frontend: use `from cggr.torch import {name}` with PyTorch or "
        f"`from cggr.jax import {name}` with Flax."
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        exec(f"from cggr import {name}")
    with pytest.raises(AttributeError, match=r"^module 'cggr' has no attribute 'CGGRTypo'$"):
        cggr.CGGRTypo  # noqa: B018


TABLES = (Path(__file__).resolve().parent.parent / "docs" / "migration.md").read_text()
TABLES = TABLES.partition("\n## Every name\n")[2].partition("\n## ")[0]
ROWS = [
    line.strip("| ").split(" | ")
    for line in TABLES.splitlines()
    if re.match(r"\| (?!cggr 0|---)", line)
]


def resolve(path):
    """The object of a dotted path that begins with a module."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize(("old", "new"), ROWS)
def test_where_the_table_of_names_points_there_is_something(old, new):
    targets = re.findall(r"`(cggr\.[\w.]+)(?:\((\w+)=\))?`", new)
    assert targets or re.match(r"none: |the same |`\.\w+`$", new)
    for path, keyword in targets:
        found = resolve(path)
        if keyword:
            keywords = {*inspect.signature(found).parameters}
            if "options" in keywords:
                keywords |= {field.name for field in fields(cggr.RoutingConfig)}
            assert keyword in keywords


def test_the_check_above_can_fail():
    with pytest.raises(AttributeError):
        resolve("cggr.torch.CGGRLoss.stride")


def test_the_keys_of_the_table_of_names():
    from cggr.torch import CGGRLoss, CGGRModel, CGGRScorer, get_flash_attention_info

    model = nn.Embedding(5, 5)
    input_ids = torch.arange(5).repeat(2, 1)
    criterion, cggr_model = CGGRLoss(), CGGRModel(model)
    criterion(model(input_ids), input_ids)
    cggr_model(input_ids, labels=input_ids)
    found = (
        criterion.get_metrics(),
        cggr_model.get_metrics(),
        CGGRScorer(model)(input_ids)[2],
        get_flash_attention_info(),
    )
    named = [set(re.findall(r"`(\w+)`", old)) for old, _ in ROWS if " keys `" in f" {old}"]
    assert len(named) == len(found)
    for names, info in zip(named, found, strict=True):
        assert names <= info.keys()
