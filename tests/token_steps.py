"""Training steps of CGGRModel's token split, and the dense ones that they are held against."""

import functools
import re

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from cggr.torch import CGGRModel as RoutedModel

OFF = {"warmup_steps": 0, "dynamic_threshold": False}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels; all else is on the CPU
NAMES = [name for name in models.ARCHITECTURES if name != "mamba"]
CGGRModel = functools.partial(RoutedModel, split="token")
of_peft = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def attention_of(name):
    """The attention implementations that this model can be given."""
    model = models.build(name)
    if not model._can_set_attn_implementation():
        return [model.config._attn_implementation]
    return ["eager"] if name == "gemma2" else ["eager", "sdpa"]


CASES = [(name, attention) for name in NAMES for attention in attention_of(name)]


def build(name, attention=None, **options):
    model = models.build(name, **options)
    if attention is not None and attention != model.config._attn_implementation:
        model.set_attn_implementation(attention)
    return model


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def exactly(message):
    return f"^{re.escape(message)}$"


def shifted(name, labels, mask=None):
    """Targets, written out: the next label of causal models, the label itself of masked ones."""
    targets = torch.full_like(labels, -100)
    for b, t in np.ndindex(*labels.shape):
        source = t if name in models.MASKED else t + 1
        if source < labels.shape[1] and (mask is None or (mask[b, t] and mask[b, source])):
            targets[b, t] = labels[b, source]
    return targets


def token_losses(model, targets, **inputs):
    """Loss of every token of a dense forward ``(B, S)``, 0 where there is no target."""
    logits = model(**inputs).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
        targets
    )


def gradients(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_same_gradients(actual, expected, tolerance=1e-5):
    """Relative to the largest gradient of the parameter, or of any if that one has none."""
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, want in expected.items():
        scale = max(want.abs().max(), 1e-3 * largest)
        error = (actual[name] - want).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.2e}"


class Detaching(CacheLayerMixin):
    """Keys and values of a dense forward, of which those of unselected tokens are constants."""

    is_sliding = False

    def __init__(self, mask):
        super().__init__()
        self.mask = mask[:, None, :, None]

    def update(self, keys, values, *args, **kwargs):
        return tuple(torch.where(self.mask, x, x.detach()) for x in (keys, values))

    def lazy_initialization(self, *args):
        pass

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_seq_length(self):
        return 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length


def reference(model, mask, weight, targets, **inputs):
    """Loss and gradients of a dense forward with constant keys and values of unselected tokens.

    ``Σ weight nll`` over the mask.
    """
    cache = Cache(layer_class_to_replicate=functools.partial(Detaching, mask))
    model.zero_grad()
    nll = token_losses(model, targets, past_key_values=cache, **inputs)
    loss = (torch.where(mask, weight, 0) * nll).sum()
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.detach(), found


def weights_of(selection, config, n_eligible):
    """Weight of every token in the loss ``(B, S)``."""
    mask, index = selection.mask, selection.indices.long()
    if config.selection != "importance":
        return mask / mask.sum().clamp(min=1)
    groups = 1 if index.dim() == 1 else mask.shape[0]  # of the batch, or of each sequence
    weight = torch.zeros(groups, mask.numel() // groups + 1, device=mask.device)
    weight.scatter_(1, index.view(groups, -1), selection.weights.view(groups, -1))
    return weight[:, :-1].reshape(mask.shape) / n_eligible


def check_step(
    wrapped, model, name, selections, labels, tolerance=1e-5, against=reference, **inputs
):
    """A training step's loss and gradients against a reference; returns the selection."""
    selections.clear()
    model.zero_grad()
    loss = wrapped(labels=labels, **inputs)
    loss.backward()
    actual = gradients(model)
    (selection,) = selections
    mask2d = inputs.get("attention_mask")
    targets = shifted(name, labels, mask2d)
    n_eligible = (targets != -100).sum()
    weight = weights_of(selection, wrapped.config, n_eligible)
    expected_loss, expected = against(model, selection.mask, weight, targets, **inputs)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    assert_same_gradients(actual, expected, tolerance)
    return selection


def enable_checkpointing(model, reentrant):
    # Its name before transformers 5.20.
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": reentrant})


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.0, **options))
