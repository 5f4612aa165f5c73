"""Folders of pretrained models, as Hugging Face's ``save_pretrained`` writes them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from cggr.race.decoder import HEAD, DecoderShape, Weights, check_weights
from cggr.race.settings import RaceError, RaceSettings
from cggr.race.tokens import Corpus


def load_tokenizer(folder: Path, option: str = "--model") -> tuple[Tokenizer, int | None]:
    """Loads the tokenizer of a local model folder and its end-of-text token.

    Args:
        folder: The folder.
        option: What the user calls it, for errors.

    Raises:
        RaceError: The folder holds none, or a damaged one.
    """
    config = _read_json(folder, "config.json", option)
    model = _read_json(folder, "tokenizer.json", option).get("model")
    if not (isinstance(model, dict) and "vocab" in model):
        raise RaceError(f"{option} {folder}: its tokenizer.json describes no tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = config.get("eos_token_id")
    if isinstance(end, list):
        end = end[0] if end else None
    return tokenizer, end


def digest(folder: Path) -> str:
    """Tells models apart, whatever their folders are called: a hash of their files."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin"):
            with file.open("rb") as content:
                hashed = hashlib.file_digest(content, "sha256")
            found.update(f"{file.name} {hashed.hexdigest()}\n".encode())
    return found.hexdigest()


def check_fit(
    settings: RaceSettings, corpus: Corpus, *, embeddings: int, positions: int, layers: int
) -> None:
    """Refuses a race for which the pretrained model is too small.

    Args:
        settings: The race.
        corpus: Its tokens.
        embeddings: Size of the model's vocabulary.
        positions: Its longest sequence.
        layers: Its depth.

    Raises:
        RaceError: The vocabulary, the sequences or the router do not fit.
    """
    routers = [(name, settings.lane(name).router_layers or 0) for name in settings.lanes]
    for what, wanted, had, of in (
        ("its tokenizer's vocabulary", corpus.vocab_size, embeddings, "embeddings"),
        ("--sequence-length", settings.sequence_length, positions, "positions"),
        ("--router-layers", settings.router_layers, layers, "layers"),
        *((f"lane {name}: router_layers", wanted, layers, "layers") for name, wanted in routers),
    ):
        if wanted > had:
            raise RaceError(
                f"--model {settings.model}: {what} {wanted} is more than its {had} {of}"
            )


def load_llama(folder: Path) -> tuple[DecoderShape, Weights]:
    """Loads a Llama without any framework, in float32.

    Args:
        folder: With config.json and model.safetensors, or the parts that
            model.safetensors.index.json lists.

    Raises:
        RaceError: The model is of another kind, or the folder is damaged or incomplete.
    """
    shape = _llama_shape(folder, _read_json(folder, "config.json"))
    try:
        weights = _read_weights(folder)
        if shape.tied:
            weights.pop(HEAD, None)  # a copy that some files hold beside the embedding
        check_weights(shape, weights)
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RaceError(f"--model {folder}: cannot be loaded: {reason}") from None
    return shape, weights


def _read_json(folder: Path, name: str, option: str = "--model") -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise RaceError(
            f"{option} {folder}: no {name} in it; give the folder of a Hugging Face model "
            "with its tokenizer, as save_pretrained writes it"
        ) from None
    except ValueError as error:
        raise RaceError(f"{option} {folder}: {name} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise RaceError(f"{option} {folder}: {name} is damaged: it holds no JSON object")
    return content


def _llama_shape(folder: Path, config: dict[str, Any]) -> DecoderShape:
    # transformers 5 writes rope_parameters; older versions, rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise RaceError(
            f"--model {folder}: rope_parameters in config.json must be an object, got {rope!r}"
        )
    for name, value, supported in (
        ("model_type", config.get("model_type"), "llama"),
        ("hidden_act", config.get("hidden_act") or "silu", "silu"),
        ("attention_bias", config.get("attention_bias") or False, False),
        ("mlp_bias", config.get("mlp_bias") or False, False),
        ("attention_dropout", config.get("attention_dropout") or 0.0, 0.0),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0, 1.0),
        ("partial_rotary_factor", rope.get("partial_rotary_factor") or 1.0, 1.0),
        ("rope_parameters by layer", any(isinstance(x, dict) for x in rope.values()), False),
        ("quantization_config", config.get("quantization_config") or None, None),
    ):
        if value != supported:
            raise RaceError(
                f"--model {folder}: --backend jax supports Llama models with {name} "
                f"{supported!r}, and this one has {value!r}; --backend torch loads any model"
            )

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name) or default
        if not isinstance(value, int) or value < 1:
            raise RaceError(
                f"--model {folder}: {name} in config.json must be a positive integer, got {value!r}"
            )
        return value

    def number(name: str, value: Any, default: float) -> float:
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise RaceError(
                f"--model {folder}: {name} in config.json must be a positive number, got {value!r}"
            )
        return float(value)

    heads, hidden_size = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise RaceError(
            f"--model {folder}: num_key_value_heads in config.json must divide "
            f"num_attention_heads {heads}, got {kv_heads}"
        )
    theta = rope.get("rope_theta")
    theta = config.get("rope_theta") if theta is None else theta
    return DecoderShape(
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size("head_dim", hidden_size // heads),
        positions=size("max_position_embeddings"),
        rope_theta=number("rope_theta", theta, 10000.0),
        norm_epsilon=number("rms_norm_eps", config.get("rms_norm_eps"), 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _read_weights(folder: Path) -> Weights:
    import ml_dtypes  # noqa: F401  # JAX brings it; NumPy learns bfloat16 from its import

    files = {"model.safetensors"}
    if (folder / "model.safetensors.index.json").is_file():
        index = _read_json(folder, "model.safetensors.index.json")
        parts = index.get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(x, str) for x in parts.values()):
            raise ValueError("model.safetensors.index.json has no weight_map")
        files = set(parts.values())
    weights: Weights = {}
    for file in sorted(files):
        with safe_open(folder / file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                if not name.endswith("rotary_emb.inv_freq"):  # old files hold it; it is computed
                    weights[name] = tensors.get_tensor(name).astype(np.float32)
    return weights
