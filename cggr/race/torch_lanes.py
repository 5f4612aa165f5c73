"""The lanes of PyTorch: one Hugging Face model, trained densely or through CGGRModel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError

from cggr.race.decoder import EMBEDDING, HEAD, DecoderShape, initial_weights, new_decoder
from cggr.race.engine import Batch, Lane
from cggr.race.machine import Runtime, package_version
from cggr.race.pretrained import check_fit
from cggr.race.settings import RaceError, RaceSettings
from cggr.race.tokens import IGNORED, Corpus, Tokens, evaluation_batches
from cggr.torch import CGGRModel, create_truncated_router
from cggr.torch.refusal import refusal


class TorchLane:
    """A model, its optimizer, and its way from a batch to a loss.

    Args:
        name: Out of ``LANES``.
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
        total = 0.0
        with torch.inference_mode():
            for inputs, targets in evaluation_batches(self.heldout, self.sequence_length):
                logits = self.model(input_ids=torch.from_numpy(inputs).to(self.device)).logits
                labels = torch.from_numpy(targets).to(self.device)
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(),
                    labels.flatten(),
                    reduction="sum",
                    ignore_index=IGNORED,
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
    split = settings.split(name)
    if split == "token" and (reason := refusal(model)) is not None:
        raise RaceError(f"--lanes {name}: {reason} {name}-sequences can race")
    # The token split scores with the pass that it makes anyway, and random selection nothing.
    scores = split == "sequence" and not name.startswith("random")
    router = create_truncated_router(model, settings.router_layers) if scores else None
    return CGGRModel(model, router, settings.routing(name, seed), split=split)


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
    shape = new_decoder(settings, corpus.vocab_size)
    with torch.random.fork_rng([]):  # transformers draws weights, which are replaced at once
        model = transformers.LlamaForCausalLM(llama_config(shape, corpus.end_of_text))
    weights = {
        name: torch.from_numpy(weight) for name, weight in initial_weights(shape, seed).items()
    }
    if shape.tied:
        weights[HEAD] = weights[EMBEDDING]
    model.load_state_dict(weights)
    return model


def llama_config(shape: DecoderShape, end_of_text: int | None) -> transformers.LlamaConfig:
    """A decoder's shape as transformers writes it."""
    return transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=shape.tied,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,  # keys and values are for generation; no lane should pay for them
    )


def load_model(
    folder: Path, settings: RaceSettings, corpus: Corpus
) -> transformers.PreTrainedModel:
    """Loads a causal language model from a local folder, in float32."""
    model = load_folder(folder, torch.float32)
    model.config.use_cache = False
    # Not every family of models has the last two numbers.
    check_fit(
        settings,
        corpus,
        embeddings=model.get_input_embeddings().num_embeddings,
        positions=getattr(model.config, "max_position_embeddings", settings.sequence_length),
        layers=getattr(model.config, "num_hidden_layers", settings.router_layers),
    )
    return model


def load_folder(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Loads a causal language model from a local folder, whatever it is for."""
    transformers.utils.logging.disable_progress_bar()  # an error is to be the only line
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RaceError(f"--model {folder}: cannot be loaded: {reason}") from None


def count_parameters(settings: RaceSettings, corpus: Corpus) -> int:
    """Number of values that the race's model trains; refuses a model that cannot race."""
    model = build_model(settings, corpus, seed=0)
    return sum(parameter.numel() for parameter in model.parameters())


def set_threads(count: int) -> None:
    """Sets the number of CPU threads."""
    torch.set_num_threads(count)


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


def runtime(device: torch.device) -> Runtime:
    """What a reader needs to know of torch and its device."""
    return Runtime(
        versions={
            **{name: package_version(name) for name in ("torch", "transformers")},
            "cuda": torch.version.cuda,
        },
        device=str(device),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        threads=torch.get_num_threads(),
    )


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
