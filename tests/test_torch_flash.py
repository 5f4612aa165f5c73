"""Which attention a model gets, and what the splits make of a model with flash attention."""

import pytest
import torch
from models import ARCHITECTURES, build, labels_for, token_ids
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import import_utils

from cggr.torch import (
    CGGRModel,
    enable_flash_attention,
    flash,
    get_flash_attention_info,
    load_model_with_flash_attention,
)
from cggr.torch.refusal import is_flash

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
GPU = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0), "flash_attention_4": (9, 0)}


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with these packages, and a GPU that every model is on."""

    if torch.cuda.is_available():
        torch.cuda.init()  # which asks for what is replaced below

    def make(installed=(), capability=None):
        for version in (2, 3, 4):
            found = f"flash_attention_{version}" in installed
            monkeypatch.setattr(
                import_utils, f"is_flash_attn_{version}_available", lambda found=found: found
            )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        if capability is not None:
            monkeypatch.setattr(flash, "_device_of", lambda model: torch.device("cuda:0"))

    return make


@pytest.fixture
def settable(monkeypatch):
    """Lets transformers set flash attention, which is not installed here."""
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def set_it(self, attention, *args, **kwargs):
        return attention if is_flash(attention) else check(self, attention, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", set_it)


def attention_of(model):
    return model.config._attn_implementation


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "expected"),
    [
        ((), None, torch.float32, "sdpa"),
        (tuple(GPU), None, torch.bfloat16, "sdpa"),
        (("flash_attention_2",), (8, 0), torch.bfloat16, "flash_attention_2"),
        (("flash_attention_2",), (8, 0), torch.float16, "flash_attention_2"),
        (("flash_attention_2",), (8, 0), torch.float32, "sdpa"),
        (("flash_attention_2",), (7, 5), torch.float16, "sdpa"),
        (("flash_attention_2", "flash_attention_3"), (8, 6), torch.float16, "flash_attention_2"),
        (("flash_attention_2", "flash_attention_3"), (9, 0), torch.float16, "flash_attention_3"),
        (tuple(GPU), (10, 0), torch.bfloat16, "flash_attention_4"),
    ],
)
def test_auto(machine, settable, installed, capability, dtype, expected):
    machine(installed, capability)
    model = build("llama").to(dtype)
    assert enable_flash_attention(model) is model
    assert attention_of(model) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("gemma2", "eager"), ("gptj", "eager"), ("bert", "sdpa")]
)
def test_auto_of_models_that_cannot_have_every_attention(machine, name, expected):
    machine()
    assert attention_of(enable_flash_attention(build(name))) == expected


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("wrap", ["plain", "routed", "compiled", "peft"])
def test_by_name_in_what_is_around_the_model(wrap, backend):
    model = build("llama")
    outer = model
    if wrap == "routed":
        outer = CGGRModel(model)
    elif wrap == "compiled":
        outer = torch.compile(model, backend="eager")
    elif wrap == "peft":
        from peft import LoraConfig, get_peft_model

        outer = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert enable_flash_attention(outer, backend) is outer
    assert attention_of(model) == backend


@pytest.mark.parametrize("backend", GPU)
def test_what_is_not_installed_is_named_with_its_command(machine, backend):
    machine((), (9, 0))
    with pytest.raises(ImportError, match=f"{backend}' needs its package: (pip|python)"):
        enable_flash_attention(build("llama"), backend)
    with pytest.raises(ImportError, match="needs its package"):
        load_model_with_flash_attention("no/such/model", backend)


def test_what_a_machine_or_a_model_cannot_have_is_refused(machine, settable):
    machine(tuple(GPU), (8, 0))
    with pytest.raises(ValueError, match=r"capability \(9, 0\), got \(8, 0\)"):
        enable_flash_attention(build("llama"), "flash_attention_3")
    machine(tuple(GPU))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, which this machine has not"):
        enable_flash_attention(build("llama"), "flash_attention_2")
    with pytest.raises(ValueError, match="'sdpa' for Gemma2ForCausalLM, which"):
        enable_flash_attention(build("gemma2"), "sdpa")
    with pytest.raises(ValueError, match="GPTJForCausalLM, which has none of it"):
        enable_flash_attention(build("gptj"), "sdpa")
    with pytest.raises(ValueError, match="FalconForCausalLM takes its attention when it is made"):
        enable_flash_attention(build("falcon", attn_implementation="eager"), "sdpa")


def test_a_model_on_the_cpu_is_refused(machine, monkeypatch):
    machine(tuple(GPU), (9, 0))
    monkeypatch.setattr(flash, "_device_of", lambda model: torch.device("cpu"))
    with pytest.raises(ValueError, match="needs the model on a GPU, got one on cpu"):
        enable_flash_attention(build("llama"), "flash_attention_2")


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*, got 'flash'\."):
        enable_flash_attention(build("llama"), "flash")
    with pytest.raises(TypeError, match=r"model must be one of transformers', got Linear\."):
        enable_flash_attention(nn.Linear(2, 2))


def test_what_this_machine_has(machine):
    machine()
    found = get_flash_attention_info()
    assert found["backends"] == ("sdpa", "eager")
    assert found["recommended_backend"] == "sdpa"
    assert not found["flash_attn_available"]
    machine(("flash_attention_2",), (8, 9))
    found = get_flash_attention_info()
    assert found["backends"] == ("flash_attention_2", "sdpa", "eager")
    assert found["recommended_backend"] == "flash_attention_2"
    assert found["flash_attn_available"]


def test_a_saved_model_is_loaded_with_its_attention(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = load_model_with_flash_attention(str(tmp_path), "eager", device_map=None)
    assert attention_of(model) == "eager"
    assert model.dtype == torch.float32 or torch.cuda.is_available()
    half = load_model_with_flash_attention(
        str(tmp_path), torch_dtype=torch.bfloat16, device_map=None
    )
    assert attention_of(half) == "sdpa"
    assert half.dtype == torch.bfloat16
    same = load_model_with_flash_attention(str(tmp_path), dtype=torch.bfloat16, device_map=None)
    assert same.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="dtype must come once"):
        load_model_with_flash_attention(
            str(tmp_path), dtype=torch.bfloat16, torch_dtype=torch.float16
        )
    with pytest.raises(TypeError, match="attn_implementation must be given as backend, got 'sdpa'"):
        load_model_with_flash_attention(str(tmp_path), attn_implementation="sdpa")


def test_auto_of_a_model_that_keeps_another_attention(machine, monkeypatch):
    machine()
    model = build("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="keeps its 'flex_attention' and has none of"):
        enable_flash_attention(model)


@pytest.fixture
def fake(monkeypatch, settable):
    """A flash attention by sdpa, which counts its calls and takes no mask."""
    calls = []

    def attend(module, query, key, value, attention_mask, **arguments):
        assert attention_mask is None or attention_mask.dim() == 2
        calls.append(query.shape)
        return AttentionInterface()["sdpa"](module, query, key, value, None, **arguments)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping,
        "flash_attention_2",
        AttentionMaskInterface()["flash_attention_2"],
    )
    return calls


def with_flash(name):
    model = build(name)
    model.set_attn_implementation("flash_attention_2")
    assert attention_of(model) == "flash_attention_2"
    return model


ROUTED = {"selection": "importance", "warmup_steps": 0, "min_tokens_ratio": 0.4}


@pytest.mark.parametrize("capacity", ["exact", "static"])
@pytest.mark.parametrize("ratio", [0.4, 1.0])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "bert"])
def test_the_token_split_does_without_flash(fake, name, ratio, capacity):
    ids = token_ids()
    labels = labels_for(name, ids)
    found = []
    for make in (with_flash, build):
        model = make(name)
        routed = CGGRModel(
            model, split="token", capacity=capacity, **ROUTED | {"min_tokens_ratio": ratio}
        )
        loss = routed(ids, labels=labels)
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    assert not fake
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("capacity", ["exact", "static"])
def test_the_sequence_split_keeps_flash(fake, capacity):
    model = with_flash("llama")
    routed = CGGRModel(
        model, split="sequence", capacity=capacity, dynamic_threshold=False, **ROUTED
    )
    routed(token_ids(), labels=token_ids()).backward()
    batches = {shape[0] for shape in fake}
    assert batches == {4, 2}  # all scored, and ceil(4 x 0.4) trained on


def test_evaluation_of_the_model_keeps_flash(fake):
    model = with_flash("llama")
    routed = CGGRModel(model, split="token", **ROUTED)
    routed(token_ids(), labels=token_ids())
    assert attention_of(model) == "flash_attention_2"
    model.eval()(token_ids())
    assert len(fake) == 3


def test_models_whose_layers_do_not_look_up_their_attention(fake):
    assert "falcon" in ARCHITECTURES
    model = build("falcon", attn_implementation="sdpa")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' attention, which takes no mask"):
        CGGRModel(model, split="token")


def test_a_module_whose_forward_was_replaced(fake):
    model = with_flash("llama")
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **inputs: forward(*args, **inputs)
    with pytest.raises(ValueError, match="uses flash attention, and has modules whose forward"):
        CGGRModel(model, split="token")
