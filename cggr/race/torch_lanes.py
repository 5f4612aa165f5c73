"""The lanes of PyTorch: one Hugging Face model, trained densely or through CGGRModel."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer

from cggr.race.decoder import EMBEDDING, HEAD, DecoderShape, initial_weights, new_decoder
from cggr.race.engine import Lane
from cggr.race.machine import Runtime, package_version
from cggr.race.pretrained import check_fit, load_tokenizer
from cggr.race.settings import LANES, LaneSettings, RaceError, RaceSettings
from cggr.race.tokens import IGNORED, Batch, Corpus, Evaluated, Losses
from cggr.reference import ReferenceLosses
from cggr.torch import CapturedStep, CGGRModel, RoutingConfig, create_truncated_router
from cggr.torch.reference import score_reference
from cggr.torch.refusal import refusal
from cggr.torch.router import room_for_graphs

DRAWS = 2**20  # of a seed, where one graph serves all seeds: more than a race has steps


class TorchLane:
    """A model, its optimizer, and its way from a batch to a loss.

    Args:
        lane: How it trains.
        model: A causal language model, which the lane trains in place.
        settings: The race.
        corpus: What it is measured on.
        seed: Seed of the selection.
    """

    def __init__(
        self,
        lane: LaneSettings,
        model: transformers.PreTrainedModel,
        settings: RaceSettings,
        corpus: Corpus,
        seed: int,
    ) -> None:
        self.name = lane.name
        self.lane = lane
        self.model = model.train()
        if lane.checkpointed:
            # Its name before transformers 5.20.
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
            enable = getattr(model, new if hasattr(model, new) else old)
            # The state of a generator cannot be asked for where a step is captured.
            enable({"use_reentrant": False, "preserve_rng_state": False})
        self.device = next(model.parameters()).device
        self.settings = settings
        self.corpus = corpus
        self.optimizer = self._new_optimizer()
        self._targets = 0
        self._trained = torch.zeros((), dtype=torch.int64, device=self.device)
        self._allocated = 0
        self._peak = 0
        self.routed = self._route(seed)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def _route(self, seed: int) -> CGGRModel | None:
        """Wraps the model for a lane that selects; None for a dense lane."""
        if self.lane.split == "dense":
            return None
        self._check_split()
        router = _router(self.model, self.lane)
        return CGGRModel(self.model, router, self.lane.routing(seed), split=self.lane.split)

    def _check_split(self) -> None:
        if self.lane.split == "sequence":
            return
        if (reason := refusal(self.model)) is not None:
            other = f"{self.name}-sequences" if self.name in LANES else "split = 'sequence'"
            raise RaceError(f"--lanes {self.name}: {reason} {other} can race")

    def train_step(self, batch: Batch, learning_rate: float) -> None:
        """One optimizer step."""
        inputs: dict[str, Any] = {"input_ids": batch.ids, "labels": batch.labels}
        if self.lane.scores_excess:
            inputs["reference_nll"] = batch.reference_nll
        self._targets = batch.targets
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        try:
            for part in range(self.lane.micro_batches):
                parts = {name: self._part(array, part) for name, array in inputs.items()}
                self._backward(parts)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
            raise RaceError(
                f"lane {self.name}: a batch of {len(batch.ids)} sequences does not fit: {reason}"
            ) from None
        except ValueError as error:
            if self.lane.max_eligible_ratio == 1:
                raise
            raise RaceError(f"lane {self.name}: {error}") from None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.routed is None:
            self._trained += self._targets
        else:
            self.routed.step()

    def _part(self, array: Any, part: int) -> torch.Tensor:
        """The sequences of a micro-batch."""
        size = len(array) // self.lane.micro_batches
        return self._tensor(array[part * size : (part + 1) * size])

    def _tensor(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _backward(self, inputs: Mapping[str, torch.Tensor]) -> None:
        if self.routed is None:
            loss = self.model(**inputs, **self._items()).loss
        else:
            loss = self.routed(**inputs, **self._items())
            self._count()
        loss.backward()

    def _count(self) -> None:
        """Adds up what was selected, on the device."""
        assert self.routed is not None
        self._trained += self.routed.scorer.latest["tokens_selected"]

    def _items(self) -> dict[str, Any]:
        """What makes the loss of a micro-batch its part of the batch's."""
        if self.lane.micro_batches == 1:
            return {}
        n_items: int | torch.Tensor = max(1, self._targets)
        if self.device.type != "cuda":  # where a step that is compiled takes a number for its own
            n_items = torch.tensor(n_items, device=self.device)
        return {"num_items_in_batch": n_items}

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

    def tokens_trained(self) -> int:
        """Tokens that losses were taken over since it was last asked; waits for the device."""
        trained = int(self._trained)
        self._trained.zero_()
        return trained

    def evaluate(self) -> float:
        """Mean held-out loss, every token but the first, or the first prompt, predicted once."""
        self.model.eval()
        length, prompt = self.settings.sequence_length, self.settings.prompt_tokens
        loss = heldout_loss(self.model, self.corpus.heldout_batches(length, prompt))
        self.model.train()
        return loss

    def save(self, folder: Path) -> None:
        """Writes the model as ``from_pretrained`` reads it."""
        self.model.save_pretrained(folder)

    def _own_memory(self) -> int:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        own = sum(tensor.nbytes for tensor in tensors if tensor.device == self.device)
        return own + self._optimizer_memory()

    def _optimizer_memory(self) -> int:
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return sum(
            value.nbytes
            for value in state
            if isinstance(value, torch.Tensor) and value.device == self.device
        )


class CompiledLane(TorchLane):
    """The same with compiled steps; on a GPU in CUDA graphs and bfloat16, weights in float32.

    It can start again, so that what was compiled serves all seeds and learning rates. The dense
    lane is a CGGRModel of all sequences, which scores nothing: it attends without the mask that
    transformers makes needlessly where steps are captured.
    """

    routed: CGGRModel

    def _route(self, seed: int) -> CGGRModel:
        self._steps: dict[Any, CapturedStep] = {}
        self._ends: deque[torch.cuda.Event] = deque()
        if self.lane.checkpointed and self.lane.split == "backward":  # which compiles its layers
            return self._routed(torch.compile(self.model, dynamic=False))
        routed = self._routed(self.model)
        # With the selection, which alone is hundreds of small operations.
        routed.compile(dynamic=False)
        return routed

    def _routed(self, inner: Any) -> CGGRModel:
        """This lane's way from a batch to a loss."""
        lane = self.lane
        if lane.split == "dense":
            every = RoutingConfig(
                selection="random", min_tokens_ratio=1.0, warmup_steps=0, dynamic_threshold=False
            )
            return CGGRModel(inner, config=every, split="sequence", capacity="static")
        self._check_split()
        return CGGRModel(
            inner,
            _router(self.model, lane),
            lane.routing(seed=0),
            split=lane.split,
            capacity="static",
        )

    def restart(self, weights: Mapping[str, torch.Tensor], seed: int) -> None:
        """Back to the first step, from these weights, with draws of this seed."""
        self.model.load_state_dict(weights)
        self.optimizer = self._new_optimizer()
        self._trained.zero_()
        self.routed.set_step(0)
        self.routed.scorer.draw_count.fill_(DRAWS * seed)

    def _tensor(self, array: Any) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _backward(self, inputs: Mapping[str, torch.Tensor]) -> None:
        if self.device.type != "cuda":
            with room_for_graphs():
                loss = self.routed(**inputs, **self._items())
            loss.backward()
            self._count()
            return
        if not self._steps:  # here, where no clock runs
            self._capture_all(inputs)
        self._captured(inputs)
        self._count()
        # Two steps ahead keep the device busy. More, and the clock, which the learning rate
        # follows, would be late.
        self._ends.append(torch.cuda.Event())
        self._ends[-1].record()
        if len(self._ends) > 2:
            self._ends.popleft().synchronize()

    def _captured(self, inputs: Mapping[str, torch.Tensor]) -> None:
        level = self.routed.scorer.level
        if level not in self._steps:
            self._steps[level] = CapturedStep(self.routed)
        with torch.autocast("cuda", torch.bfloat16):
            self._steps[level](**inputs, **self._items())

    def _capture_all(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """A graph for every capacity of the schedule, and the memory that their steps need."""
        super().begin_turn()
        for step in {int(step) for step in np.linspace(0, self.lane.warmup_steps, 100)}:
            self.routed.set_step(step)
            if self.routed.scorer.level not in self._steps:
                self._captured(inputs)
                self.optimizer.zero_grad(set_to_none=True)
        self.routed.set_step(0)
        super().end_turn()

    def begin_turn(self) -> None:
        """Nothing to note: a graph allocates nothing."""

    def end_turn(self) -> None:
        """Likewise."""

    def peak_memory(self) -> int | None:
        """What the steps needed when they were captured, and what the optimizer keeps since."""
        if self.device.type != "cuda":
            return None
        return self._peak + self._optimizer_memory()


@torch.inference_mode()
def heldout_loss(model: Any, batches: Iterable[Evaluated]) -> float:
    """Mean loss of a model in eval mode over all targets.

    Args:
        model: A causal language model.
        batches: Inputs and targets, as :func:`cggr.race.tokens.evaluation_batches` yields them.
    """
    device = next(model.parameters()).device
    total, n_targets = 0.0, 0
    for inputs, targets in batches:
        logits = model(input_ids=torch.from_numpy(inputs).to(device)).logits
        labels = torch.from_numpy(targets).to(device)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=IGNORED
        )
        total += loss.item()
        n_targets += int((targets != IGNORED).sum())
    return total / n_targets


def _router(model: transformers.PreTrainedModel, lane: LaneSettings) -> Any:
    """The first layers of the model, where they are to score."""
    if lane.router_layers is None:
        return None
    return create_truncated_router(model, lane.router_layers)


def make_lanes(
    settings: RaceSettings, corpus: Corpus, device: torch.device
) -> Callable[[str, int], Lane]:
    """Returns a function that builds the lane of a name and a seed.

    All lanes of a seed start from copies of the same weights.
    """
    if settings.memory is not None:
        limit_memory(settings.memory, device)
    models: dict[int, transformers.PreTrainedModel] = {}
    made: dict[str, CompiledLane] = {}

    def make_lane(name: str, seed: int) -> Lane:
        if seed not in models:
            models.clear()  # the seeds race one after the other
            models[seed] = build_model(settings, corpus, seed)
        if not settings.compiled:
            model = copy.deepcopy(models[seed]).to(device)
            return TorchLane(settings.lane(name), model, settings, corpus, seed)
        if name not in made:
            made.clear()
            gc.collect()  # modules and their graphs, which refer to each other
            model = copy.deepcopy(models[seed]).to(device)
            made[name] = CompiledLane(settings.lane(name), model, settings, corpus, seed)
        made[name].restart(models[seed].state_dict(), seed)
        return made[name]

    return make_lane


def limit_memory(gib: float, device: torch.device) -> None:
    """Lets this process take so many GiB of the device's memory, and no more.

    Raises:
        RaceError: It is no CUDA device, or has less.
    """
    if device.type != "cuda":
        raise RaceError(f"--memory {gib:g}: it is for CUDA devices, and this is {device}")
    total: int = torch.cuda.get_device_properties(device).total_memory
    if gib * 2**30 > total:
        raise RaceError(f"--memory {gib:g}: the device has {total / 2**30:.1f} GiB")
    # Of the current device: torch refuses a device without an index here, such as ours is.
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)


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


def load_folder(
    folder: Path, dtype: torch.dtype, option: str = "--model"
) -> transformers.PreTrainedModel:
    """Loads a causal language model from a local folder, whatever it is for."""
    transformers.utils.logging.disable_progress_bar()  # an error is to be the only line
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RaceError(f"{option} {folder}: cannot be loaded: {reason}") from None


def reference_losses(settings: RaceSettings, corpus: Corpus, device: torch.device) -> Losses:
    """The loss of every training token by the reference, at the one before it.

    Raises:
        RaceError: The reference cannot be loaded, or its tokens are others than the race's.
    """
    assert settings.reference is not None
    own, _ = load_tokenizer(settings.reference, "--reference")
    if own.get_vocab() != Tokenizer.from_str(corpus.tokenizer).get_vocab():
        raise RaceError(
            f"--reference {settings.reference}: its tokenizer is not that of --model "
            f"{settings.model}, whose tokens its losses are to be of"
        )
    model = load_folder(settings.reference, torch.float32, "--reference").to(device).eval()
    about = {"model": settings.reference.name}
    with tempfile.TemporaryDirectory() as folder:
        reference = ReferenceLosses.create(Path(folder) / "losses", corpus.training, about)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            score_reference(model, reference, context=settings.sequence_length, batch_size=32)
        return np.array(reference.losses)


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
