"""Counters, ranks, wrapped models: what surrounds a routed module in somebody's training loop."""

import models
import numpy as np
import pytest
import torch
import truth
from torch import nn

from cggr.torch import (
    CGGRLinearLoss,
    CGGRLoss,
    CGGRModel,
    CGGRScorer,
    create_truncated_router,
    loss,
    model,
    scorer,
)
from cggr.torch.router import is_causal, unwrapped

OFF = {"warmup_steps": 0, "dynamic_threshold": False}


def ids(batch=4, length=10):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(0))


def test_each_rank_of_a_loss_draws_its_own_sample(monkeypatch):
    monkeypatch.setattr(loss, "process_rank", lambda *_: 5)
    options = {"selection": "random", "min_tokens_ratio": 0.3, **OFF}
    logits = torch.randn(4, 10, 7, requires_grad=True)
    CGGRLoss(**options)(logits, torch.zeros(4, 10, dtype=torch.long)).backward()
    expected = truth.select(np.zeros((4, 10)), options, rank=5).mask
    np.testing.assert_array_equal((logits.grad != 0).any(-1).numpy(), expected)


def test_each_rank_of_a_model_and_a_scorer_draws_its_own_sample(monkeypatch):
    for module in (model, scorer):
        monkeypatch.setattr(module, "process_rank", lambda *_: 5)
    options = {"selection": "random", "min_tokens_ratio": 0.3, **OFF}
    embedding = nn.Embedding(50, 50)
    seen = []
    embedding.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    CGGRModel(embedding, **options)(ids(8), labels=ids(8))
    expected = truth.select(np.zeros((1, 8)), options, rank=5).mask[0]
    assert torch.equal(seen[-1], ids(8)[torch.from_numpy(expected)])
    _, mask, _ = CGGRScorer(embedding, **options)(ids())
    np.testing.assert_array_equal(
        mask.numpy(), truth.select(np.zeros((4, 10)), options, rank=5).mask
    )


def test_set_step_moves_device_and_host():
    criterion = CGGRLoss(warmup_steps=10, dynamic_threshold=False)
    criterion.set_step(10)
    criterion(torch.randn(10, 10, 7), torch.zeros(10, 10, dtype=torch.long))
    assert criterion.get_metrics()["step"] == 10
    assert criterion.get_metrics()["tokens_selected"] == 25
    for wrong, error in ((-1, ValueError), (2**31, ValueError), (2.5, TypeError)):
        with pytest.raises(error):
            criterion.set_step(wrong)
    assert int(criterion.step_count) == 10


def test_a_state_of_cggr_0_5_0_loads():
    criterion = CGGRLoss()
    criterion.load_state_dict({"step_count": torch.tensor(5)})
    assert (int(criterion.step_count), int(criterion.draw_count)) == (5, 5)


def test_assigned_counters_are_two_and_int32():
    criterion = CGGRLoss()
    criterion.load_state_dict({"step_count": torch.tensor(5)}, assign=True)
    criterion.next_draw()
    assert (int(criterion.step_count), int(criterion.draw_count)) == (5, 6)
    assert criterion.step_count.dtype == criterion.draw_count.dtype == torch.int32


def test_the_second_copy_of_the_model_in_a_state_of_cggr_0_5_0_is_passed_over():
    routed = CGGRModel(nn.Embedding(5, 5))
    state = {"model.weight": torch.eye(5), "scorer.step_count": torch.tensor(3)}
    routed.load_state_dict({**state, "scorer.router.weight": torch.zeros(5, 5)})
    assert torch.equal(routed.model.weight, torch.eye(5))
    assert routed.scorer.config.capacity_ratio(3) == routed.scorer._capacity_ratio


def test_an_ignored_row_that_overflows_leaves_the_dense_gradient_alone():
    hidden = torch.randn(2, 4, 8)
    hidden[0, 0] *= 1e38
    hidden.requires_grad_()
    weight = (torch.randn(16, 8) * 10).requires_grad_()
    targets = torch.zeros(2, 4, dtype=torch.long)
    targets[0, 0] = -100
    CGGRLinearLoss(warmup_steps=10)(hidden, weight, targets).backward()
    assert weight.grad.isfinite().all()
    assert not hidden.grad[0, 0].any()
    assert hidden.grad[0, 1].any()


def test_counters_that_moved_inside_inference_mode_can_still_count():
    criterion = CGGRLoss()
    with torch.inference_mode():
        criterion.follow(torch.device("meta"))
    criterion.step()
    criterion.next_draw()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_kind_of_a_wrapped_model_is_that_of_the_model(name):
    bare = models.build(name)

    class Adapted(nn.Module):  # as peft wraps: another class, the model inside
        def __init__(self):
            super().__init__()
            self.inner = bare

        def get_base_model(self):
            return self.inner

    for wrapped in (nn.DataParallel(bare), torch.compile(bare, backend="eager"), Adapted()):
        assert unwrapped(wrapped) is bare
        assert is_causal(unwrapped(wrapped)) == (name == "llama")
        router = create_truncated_router(wrapped, num_layers=1)
        assert router.architecture == name
        assert router.source is bare


def test_xlm_is_a_masked_language_model():
    import transformers

    config = transformers.XLMConfig(vocab_size=50, emb_dim=8, n_layers=1, n_heads=2)
    assert not is_causal(transformers.XLMWithLMHeadModel(config))
    assert is_causal(type("MyGPTWithLMHeadModel", (nn.Module,), {})())


def test_a_model_of_a_known_name_without_the_parts_is_its_own_router():
    class LlamaForCausalLM(nn.Module):
        config = models.build("llama").config

        def forward(self, input_ids):
            return nn.functional.one_hot(input_ids, 50).float()

    with pytest.warns(UserWarning, match="follows no known layout"):
        assert create_truncated_router(LlamaForCausalLM()).passthrough
    assert CGGRModel(LlamaForCausalLM(), **OFF)(ids(), labels=ids()) > 0


def test_a_router_that_shares_only_a_part_is_refused():
    embedding = nn.Embedding(50, 50)
    router = nn.Sequential(embedding, nn.Linear(50, 50))
    with pytest.raises(
        ValueError, match=r"router must share all of its parameters .* shares 1 of 3"
    ):
        CGGRModel(embedding, router)


def test_sequences_are_kept_whole_so_a_floor_of_tokens_keeps_none():
    routed = CGGRModel(
        nn.Embedding(50, 50),
        selection="sequence_aware",
        min_tokens_per_sequence=8,
        min_tokens_ratio=0.25,
        capacity="static",
        **OFF,
    )
    routed(ids(8), labels=ids(8)).backward()
    assert routed.get_metrics()["tokens_selected"] == 2 * 9


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([[1, 2]], TypeError, r"labels must be a tensor, got list\."),
        (torch.zeros(3).long(), ValueError, r"labels must have shape \(B, S\) .*, got \(3,\)\."),
        (torch.zeros(0, 3).long(), ValueError, r"labels must have .* B >= 1, got \(0, 3\)\."),
        (
            torch.full((4, 10), 50),
            ValueError,
            r"labels must be in \[0, 50\) or ignore_index=-100, got 50 at position \(0, 1\)\.",
        ),
    ],
)
def test_labels_that_make_no_sense_are_named(labels, error, message):
    for module in (CGGRModel(nn.Embedding(50, 50)), CGGRScorer(nn.Embedding(50, 50))):
        with pytest.raises(error, match=message):
            module(ids(), labels=labels)


def test_options_by_position_are_pointed_to_keywords():
    with pytest.raises(TypeError, match=r"config must be a RoutingConfig, got 0\.5; options are"):
        CGGRScorer(nn.Embedding(5, 5), 0.5)


def test_weight_of_another_dtype_is_named():
    from cggr.torch import linear_token_statistics

    with pytest.raises(TypeError, match=r"weight must have hidden's dtype torch.float32, got"):
        linear_token_statistics(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.bfloat16))
