"""CGGRTrainer and TRL's SFTTrainer: the loss, the schedule, what is saved, and resuming."""

import json

import pytest
import torch
from models import VOCAB, build
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from cggr.torch import CGGRModel, RoutingConfig, create_truncated_router
from cggr.torch.trainer import CGGRTrainer, with_cggr

# As warnings would end the test: of transformers, about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.float64,  # schedulers and norms of the trainer
]
STEPS, ACCUMULATED = 6, 2
ROUTING = {"selection": "importance", "warmup_steps": 2, "min_tokens_ratio": 0.3}
SPLITS = {
    "token": {"split": "token"},
    "sequence": {"split": "sequence"},
    "token, 1 layer scores": {"split": "token", "router": 1},
}


def texts(n=48, length=12):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, VOCAB, (n, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": ACCUMULATED,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return TrainingArguments(**defaults | options)


def trainer(folder, *, model=None, kind=CGGRTrainer, split="token", **options):
    return kind(
        build("llama") if model is None else model,
        arguments(folder, **options),
        train_dataset=texts(),
        eval_dataset=texts(8),
        routing=ROUTING | SPLITS[split],
    )


def losses(of):
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


def by_hand(split):
    """Losses of the same training in a plain loop."""
    torch.manual_seed(42)
    model = build("llama")
    options = ROUTING | SPLITS[split]
    router = create_truncated_router(model, options.pop("router")) if "router" in options else None
    routed = CGGRModel(model, router, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    found = []
    rows = torch.stack([row["input_ids"] for row in texts()])
    for step in range(STEPS):
        batches = rows[step * 8 : step * 8 + 8].split(4)
        items = sum(batch[:, 1:].numel() for batch in batches)
        total = 0.0
        for batch in batches:
            loss = routed(batch, labels=batch, num_items_in_batch=items)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        routed.step()
        found.append(total)
    return found, model


@pytest.mark.parametrize("split", SPLITS)
def test_a_run_is_that_of_a_plain_loop(tmp_path, split):
    ran = trainer(
        tmp_path,
        split=split,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    ran.train()
    expected, model = by_hand(split)
    torch.testing.assert_close(losses(ran), expected, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(ran.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_log_and_the_bar_have_the_metrics(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("tqdm.std.tqdm.set_postfix", lambda bar, values: shown.append(values))
    ran = trainer(tmp_path, logging_steps=2, disable_tqdm=False)
    ran.train()
    logged = [entry for entry in ran.state.log_history if "loss" in entry]
    assert len(logged) == STEPS // 2
    first, last = logged[0], logged[-1]
    # Ratios of steps 0 and 1: 1, and half way to 0.3, with what an unsure model is given on top.
    config = RoutingConfig(**ROUTING)
    assert config.capacity_ratio(0) / 2**14 == 1
    assert 0.65 < first["token_ratio"] <= 1
    assert 0.3 <= last["token_ratio"] < 0.5
    assert last["tokens_total"] == ACCUMULATED * 4 * 11
    assert 0.3 * last["tokens_total"] <= last["tokens_selected"] < 0.55 * last["tokens_total"]
    assert 0 < last["avg_confidence"] < 1
    assert 0 < last["avg_entropy"] < 4.3
    assert last["step_seconds"] > 0
    assert len(shown) == STEPS // 2
    assert shown[-1]["ratio"] == f"{last['token_ratio']:.3g}"
    assert any(isinstance(one, ProgressCallback) for one in ran.callback_handler.callbacks)


def test_metrics_are_means_since_the_last_log(tmp_path):
    every = trainer(tmp_path)
    every.train()
    rarely = trainer(tmp_path, logging_steps=STEPS)
    rarely.train()
    (means,) = (entry for entry in rarely.state.log_history if "loss" in entry)
    steps = [entry for entry in every.state.log_history if "loss" in entry]
    for name in ("token_ratio", "tokens_selected", "avg_entropy", "avg_difficulty"):
        expected = sum(entry[name] for entry in steps) / STEPS
        assert means[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("split", SPLITS)
def test_a_resumed_run_goes_on_as_if_it_had_not_ended(tmp_path, split):
    whole = trainer(tmp_path, split=split, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path, split=split)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(losses(resumed), losses(whole), rtol=0, atol=1e-6)
    assert resumed.cggr_model.get_metrics()["step"] == STEPS - 1
    for got, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_what_is_saved_is_the_plain_model(tmp_path):
    plain = build("llama")
    keys = list(plain.state_dict())
    ran = trainer(tmp_path, model=plain)
    ran.train()
    assert list(ran.model.state_dict()) == keys
    ran.save_model(str(tmp_path / "saved"))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = texts(2)[0]["input_ids"][None]
    torch.testing.assert_close(loaded(ids).logits, ran.model.eval()(ids).logits)


def test_evaluation_and_generation_are_the_plain_models(tmp_path):
    ran = trainer(tmp_path)
    ran.train()
    plain = Trainer(ran.model, arguments(tmp_path), eval_dataset=texts(8))
    assert ran.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert "forward" not in vars(ran.model)
    ids = texts(1)[0]["input_ids"][None]
    assert ran.model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_mixed_precision_is_entered_around_the_routed_step(tmp_path):
    ran = trainer(tmp_path, bf16=True)
    seen = []
    layer = ran.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    ran.train()
    assert set(seen) == {torch.bfloat16}
    exact = trainer(tmp_path)
    exact.train()
    assert losses(ran) != losses(exact)
    torch.testing.assert_close(losses(ran)[:2], losses(exact)[:2], rtol=0.02, atol=0)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = trainer(tmp_path)
    plain.train()
    ran = trainer(tmp_path, gradient_checkpointing=True)
    ran.train()
    torch.testing.assert_close(losses(ran), losses(plain), rtol=1e-5, atol=1e-5)


def test_a_compiled_trainer_compiles_the_parts(tmp_path):
    plain = trainer(tmp_path, max_steps=2)
    plain.train()
    ran = trainer(tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="eager")
    ran.train()
    assert ran.cggr_model.scorer.capacity == "static"
    assert ran.cggr_model.model._orig_mod is ran.model
    torch.testing.assert_close(losses(ran), losses(plain), rtol=1e-5, atol=1e-5)


def test_another_model_for_every_run(tmp_path):
    made = []

    def model_init():
        made.append(build("llama"))
        return made[-1]

    ran = CGGRTrainer(
        model_init=model_init,
        args=arguments(tmp_path),
        train_dataset=texts(),
        routing=ROUTING | SPLITS["token, 1 layer scores"],
    )
    ran.train()
    assert ran.cggr_model.model is made[-1]
    assert ran.cggr_model.scorer.router.source is made[-1]


def test_a_lora_adapter_is_trained_and_saved(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", r=2))
    ran = trainer(tmp_path, model=model)
    ran.train()
    assert losses(ran)[-1] < losses(ran)[0]
    ran.save_model(str(tmp_path / "saved"))
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["r"] == 2


def test_options_may_be_a_config(tmp_path):
    ran = CGGRTrainer(
        build("llama"),
        arguments(tmp_path),
        train_dataset=texts(),
        routing=RoutingConfig(selection="random", min_tokens_ratio=0.5),
    )
    assert ran.cggr_model.config.selection == "random"
    assert ran.cggr_model.split == "token"


REFUSED = {
    "label_smoothing_factor must be 0, got 0.1": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_routed_step_cannot_do_is_refused(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **REFUSED[message])


def test_a_loss_of_ones_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        CGGRTrainer(build("llama"), arguments(tmp_path), compute_loss_func=lambda *_: None)


def test_many_devices_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process must drive one device, got 2"):
        CGGRTrainer(build("llama"), args)


def test_experts_that_would_not_be_balanced_are_refused(tmp_path):
    model = build("llama")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits must be False"):
        CGGRTrainer(model, arguments(tmp_path))


def test_options_that_are_wrong_are_refused(tmp_path):
    with pytest.raises(TypeError, match="routing must be a RoutingConfig or a mapping"):
        CGGRTrainer(build("llama"), arguments(tmp_path), routing=0.25)
    with pytest.raises(ValueError, match="min_tokens_ratio"):
        CGGRTrainer(build("llama"), arguments(tmp_path), routing={"min_tokens_ratio": 2.0})


def test_with_cggr():
    assert with_cggr(Trainer) is CGGRTrainer
    assert with_cggr(CGGRTrainer) is CGGRTrainer
    assert with_cggr(Seq2SeqTrainer) is with_cggr(Seq2SeqTrainer)
    assert with_cggr(Seq2SeqTrainer).__mro__[1:3] == (CGGRTrainer, Seq2SeqTrainer)
    with pytest.raises(TypeError, match="trainer must be a subclass of"):
        with_cggr(torch.nn.Module)
