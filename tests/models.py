"""Tiny transformers models of every architecture that the router knows, with random weights."""

import torch
import transformers
from torch import nn

VOCAB = 67
LENGTH = 10
LAYERS = 3

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

# name: (configuration class, model class, options). Dropout is off: two passes then agree.
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        # Soft-caps below the size of logits and scores, so that leaving them out shows.
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": 4,
            "final_logit_softcapping": 0.5,
            "attn_logit_softcapping": 0.3,
            "attn_implementation": "eager",  # sdpa, transformers' 5.17 choice, has no soft-cap
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GROUPED, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 0.5},
    ),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {**_GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_GROUPED, "logit_scale": 3.0}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**_GROUPED, "logits_scaling": 0.2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_SMALL, "hidden_dropout": 0.0, "attention_dropout": 0.0, "alibi": False},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_SMALL, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**_SMALL, **_NO_DROPOUT}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_SMALL, **_NO_DROPOUT}),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "state_size": 4,
            "num_hidden_layers": LAYERS,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}
MASKED = ("bert", "roberta")


def build(name, *, layers=LAYERS, seed=0, **options):
    """A model of this architecture in training mode; biases and norms are random, not 0 and 1."""
    config_class, model_class, defaults = ARCHITECTURES[name]
    options = {**defaults, **options}
    options["n_layer" if "n_layer" in options else "num_hidden_layers"] = layers
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = getattr(transformers, config_class)(**options)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            # Fresh weights make every logit nearly 0; larger ones tell tokens apart.
            for parameter_name, parameter in model.named_parameters():
                if not (
                    name == "mamba" and parameter_name.endswith(("A_log", "D", "dt_proj.bias"))
                ):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def no_cache(name):
    """Inputs of a dense pass that is to have the bits of ours, which has no cache.

    A cache lays keys out anew, and some processors round products of another layout otherwise.
    """
    return {} if name in (*MASKED, "mamba") else {"use_cache": False}


def base_of(model):
    """The model without its head."""
    return model.base_model


def final_norm(model):
    """The norm between the last layer and the head; the identity where layers end in one."""
    base = base_of(model)
    for name in ("norm", "ln_f", "final_layer_norm", "norm_f"):
        if hasattr(base, name):
            return getattr(base, name)
    return nn.Identity()


def head(model, hidden):
    """Logits of normalised hidden states, written out from each model's own forward."""
    kind = model.config.model_type
    if kind == "bert":
        return model.cls(hidden)
    logits = model.lm_head(hidden)
    if kind == "cohere":
        logits = logits * model.config.logit_scale
    if kind == "granite":
        logits = logits / model.config.logits_scaling
    if kind in ("gemma2", "gemma3_text"):
        cap = model.config.final_logit_softcapping
        logits = torch.tanh(logits / cap) * cap
    return logits


def token_ids(batch=4, length=LENGTH, seed=0):
    """Random ids without the padding id 0, which RoBERTa's positions depend on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def labels_for(model_name, input_ids):
    """Labels of the kind that the architecture trains on: all, or a third for masked models."""
    if model_name not in MASKED:
        return input_ids.clone()
    place = torch.arange(input_ids.numel(), device=input_ids.device)
    keep = (place.reshape(input_ids.shape) * 7) % 3 == 0
    return input_ids.masked_fill(~keep, -100)
