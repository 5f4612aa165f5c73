"""The lanes of PyTorch: one Hugging Face model, trained densely or through CGGRModel."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer

from cggr.race.engine import Batch, Lane
from cggr.race.settings import RaceError, RaceSettings
from cggr.race.tokens import Corpus, Tokens
from cggr.torch import CGGRModel, RoutingConfig, create_truncated_router

EVALUATION_TOKENS = 4096  # per forward; twice as many were slower on two CPU cores


class TorchLane:
    """A model, its optimizer, and its way from a batch to a loss.

    Args:
        name: ``dense``, ``random`` or ``cggr``.
        model: A causal language model, which the lane trains in place.
        settings: The race.
        heldout: Held-out token ids.
        seed: Seed of the selection.
    """

    def __init__(
        self,
        name: str,
        model: transformers.PreTrainedModel,
        settings: RaceSettings,
        heldout: Tokens,
        seed: int,
    ) -> None:
        self.name = name
        self.model = model.train()
        self.routed = _route(name, model, settings, seed)
        self.device = next(model.parameters()).device
        self.sequence_length = settings.sequence_length
        self.heldout = heldout
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self._tokens = 0
        self._allocated = 0
        self._peak = 0

    def train_step(self, batch: Batch, learning_rate: float) -> None:
        """One optimizer step on a batch of token ids."""
        ids = torch.from_numpy(batch).to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.routed is None:
            loss = self.model(input_ids=ids, labels=ids).loss
            self._tokens = ids[:, 1:].numel()
        else:
            loss = self.routed(ids, labels=ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.routed is not None:
            self.routed.step()

    def synchronize(self) -> None:
        """Waits for the device."""
        synchronize(self.device)

    def begin_turn(self) -> None:
        """Notes how much memory is in use, that of the other lanes included."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._allocated = torch.cuda.memory_allocated(self.device) - self._own_memory()

    def end_turn(self) -> None:
        """Notes the most memory that this lane has needed."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - self._allocated
            self._peak = max(self._peak, peak)

    def peak_memory(self) -> int | None:
        """Weights, optimizer state, gradients and activations at their most, on CUDA."""
        return self._peak if self.device.type == "cuda" else None

    def tokens_per_step(self) -> int:
        """Tokens that the latest step's loss was taken over."""
        if self.routed is not None:
            return int(self.routed.get_metrics()["tokens_selected"])
        return self._tokens

    def evaluate(self) -> float:
        """Mean held-out loss, every token but the stream's first predicted exactly once."""
        self.model.eval()
        length = self.sequence_length
        rows = -(-(len(self.heldout) - 1) // length)
        padded = np.full(rows * length + 1, -100, dtype=np.int64)
        padded[: len(self.heldout)] = self.heldout
        inputs = torch.from_numpy(padded[:-1].reshape(rows, length)).clamp(min=0)
        targets = torch.from_numpy(padded[1:].reshape(rows, length))
        total = 0.0
        step = max(1, EVALUATION_TOKENS // length)
        with torch.inference_mode():
            for start in range(0, rows, step):
                logits = self.model(input_ids=inputs[start : start + step].to(self.device)).logits
                labels = targets[start : start + step].to(self.device)
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
                )
                total += loss.item()
        self.model.train()
        return total / (len(self.heldout) - 1)

    def _own_memory(self) -> int:
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        return sum(
            tensor.nbytes
            for tensor in tensors
            if isinstance(tensor, torch.Tensor) and tensor.device == self.device
        )


def _route(
    name: str, model: transformers.PreTrainedModel, settings: RaceSettings, seed: int
) -> CGGRModel | None:
    """Wraps the model for a lane that selects; None for the dense lane."""
    if name == "dense":
        return None
    random = name == "random"
    config = RoutingConfig(
        scoring=settings.scoring,
        selection="random" if random else settings.selection,
        min_tokens_ratio=settings.ratio,
        warmup_steps=0,
        dynamic_threshold=False,
        seed=seed,
    )
    # Random selection scores nothing, so the control pays for no router.
    router = None if random else create_truncated_router(model, settings.router_layers)
    return CGGRModel(model, router, config, split="sequence")


def make_lanes(
    settings: RaceSettings, corpus: Corpus, device: torch.device
) -> Callable[[str, int], Lane]:
    """Returns a function that builds the lane of a name and a seed.

    All lanes of a seed start from copies of the same weights.
    """
    models: dict[int, transformers.PreTrainedModel] = {}

    def make_lane(name: str, seed: int) -> Lane:
        if seed not in models:
            models.clear()  # the seeds race one after the other
            models[seed] = build_model(settings, corpus, seed)
        model = copy.deepcopy(models[seed]).to(device)
        return TorchLane(name, model, settings, corpus.heldout, seed)

    return make_lane


def build_model(settings: RaceSettings, corpus: Corpus, seed: int) -> transformers.PreTrainedModel:
    """Builds the small Llama of the settings, or loads the model that they name."""
    if settings.model is not None:
        return load_model(settings.model, settings, corpus)
    config = transformers.LlamaConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=64 * round(settings.hidden_size * 8 / 3 / 64),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // 32,
        num_key_value_heads=settings.hidden_size // 32,
        max_position_embeddings=settings.sequence_length,
        tie_word_embeddings=True,
        bos_token_id=corpus.end_of_text,
        eos_token_id=corpus.end_of_text,
        # As wide as the fan-in asks for; at 0.02 this small a model learns much more slowly.
        initializer_range=settings.hidden_size**-0.5,
        use_cache=False,  # keys and values are for generation; no lane should pay for them
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def load_model(
    folder: Path, settings: RaceSettings, corpus: Corpus
) -> transformers.PreTrainedModel:
    """Loads a causal language model from a local folder, in float32."""
    transformers.utils.logging.disable_progress_bar()  # an error is to be the only line
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RaceError(f"--model {folder}: cannot be loaded: {reason}") from None
    model.config.use_cache = False
    # Not every family of models has the last two numbers.
    embeddings = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config, "max_position_embeddings", settings.sequence_length)
    layers = getattr(model.config, "num_hidden_layers", settings.router_layers)
    for what, wanted, had, of in (
        ("its tokenizer's vocabulary", corpus.vocab_size, embeddings, "embeddings"),
        ("--sequence-length", settings.sequence_length, positions, "positions"),
        ("--router-layers", settings.router_layers, layers, "layers"),
    ):
        if wanted > had:
            raise RaceError(f"--model {folder}: {what} {wanted} is more than its {had} {of}")
    return model


def load_tokenizer(folder: Path) -> tuple[Tokenizer, int | None]:
    """Loads the tokenizer of a local model folder and its end-of-text token."""
    contents = {}
    for name in ("config.json", "tokenizer.json"):
        try:
            contents[name] = json.loads((folder / name).read_text())
        except FileNotFoundError:
            raise RaceError(
                f"--model {folder}: no {name} in it; give the folder of a Hugging Face model "
                "with its tokenizer, as save_pretrained writes it"
            ) from None
        except ValueError as error:
            raise RaceError(f"--model {folder}: {name} is damaged: {error}") from None
    if (
        not isinstance(contents["tokenizer.json"], dict)
        or "model" not in contents["tokenizer.json"]
    ):
        raise RaceError(f"--model {folder}: its tokenizer.json describes no tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = contents["config.json"].get("eos_token_id")
    return tokenizer, end[0] if isinstance(end, list) else end


def find_device(name: str) -> torch.device:
    """Resolves ``auto`` to the fastest device there is, and checks that a named one exists."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    elif not available[name]:
        raise RaceError(f"--device {name}: this machine or this build of torch has none")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
