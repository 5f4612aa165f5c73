"""CGGRTrainer and TRL's SFTTrainer: the loss, the schedule, what is saved, and resuming."""

import functools
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
ROUTING = {
    "selection": "importance",
    "warmup_steps": 2,
    "dynamic_threshold": True,
    "min_tokens_ratio": 0.3,
}
SPLITS = {
    "token": {"split": "token"},
    "backward": {"split": "backward"},
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


@pytest.mark.parametrize(
    ("split", "kwargs"), [("token", None), ("backward", {"use_reentrant": False})]
)
def test_gradient_checkpointing_changes_nothing(tmp_path, split, kwargs):
    plain = trainer(tmp_path, split=split)
    plain.train()
    ran = trainer(
        tmp_path,
        split=split,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
    )
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


def without_targets(n):
    """Data whose first rows have nothing to learn from."""
    rows = texts()
    for row in rows[:n]:
        row["labels"] = torch.full_like(row["labels"], -100)
    return rows


def routed_on(folder, data, *, model=None, routing=None, kind=CGGRTrainer, **options):
    options = {"train_sampling_strategy": "sequential", "max_steps": 3} | options
    return kind(
        build("llama") if model is None else model,
        arguments(folder, **options),
        train_dataset=data,
        **{} if kind is Trainer else {"routing": ROUTING | (routing or {})},
    )


@pytest.mark.parametrize("split", ["token", "sequence"])
@pytest.mark.parametrize("selection", ["importance", "topk"])
def test_a_step_without_targets_leaves_the_weights(tmp_path, split, selection):
    routing = {"split": split, "selection": selection}
    ran = routed_on(tmp_path, without_targets(8), routing=routing, weight_decay=0.0)
    before = build("llama").state_dict()
    ran.train()
    assert losses(ran)[0] == 0
    assert losses(ran)[1] > 1
    after = ran.model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_padding_counts_as_the_trainer_counts(tmp_path):
    data = []
    for i, row in enumerate(texts()):
        n_padding = i % 4
        mask = torch.ones_like(row["labels"])
        mask[:n_padding] = 0  # on the left, and its labels are not masked
        data.append(row | {"attention_mask": mask})
    every = {"selection": "random", "min_tokens_ratio": 1.0, "split": "token"}
    ran = routed_on(tmp_path, data, routing=every, max_steps=1)
    ran.train()
    model = build("llama")
    total, count = 0.0, 0
    for row in data[:8]:
        with torch.no_grad():
            logits = model(
                row["input_ids"][None], attention_mask=row["attention_mask"][None]
            ).logits
        kept = row["attention_mask"].bool()
        targets = row["labels"][1:][kept[:-1]]
        total += torch.nn.functional.cross_entropy(
            logits[0, :-1][kept[:-1]], targets, reduction="sum"
        ).item()
        count += len(targets)
    assert losses(ran)[0] == pytest.approx(total / count, rel=1e-5)
    (entry,) = (entry for entry in ran.state.log_history if "loss" in entry)
    assert entry["tokens_total"] == count


def test_a_forward_of_the_models_own_is_kept(tmp_path):
    model = build("llama")
    own, calls = model.forward, []

    @functools.wraps(own)  # from whose signature the trainer knows which columns it takes
    def forward(*args, **inputs):
        calls.append(inputs)
        return own(*args, **inputs)

    model.forward = forward
    with pytest.raises(ValueError, match="forward was replaced on this model"):
        routed_on(tmp_path, texts(), model=model, routing={"split": "token"})
    ran = routed_on(tmp_path, texts(), model=model, routing={"split": "sequence"})
    ran.train()
    assert len(calls) >= 3 * ACCUMULATED
    assert model.forward is forward
    late = routed_on(tmp_path, texts(), routing={"split": "token"})
    late.model.forward = forward
    with pytest.raises(ValueError, match="forward was replaced on this model"):
        late.train()
    assert late.model.forward is forward


def test_an_error_in_a_step_leaves_the_model_as_it_was(tmp_path):
    ran = routed_on(tmp_path, texts())

    def fail(module, inputs):
        raise KeyboardInterrupt

    hook = ran.model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        ran.train()
    assert "forward" not in vars(ran.model)
    hook.remove()
    ran.train()
    fresh = routed_on(tmp_path, texts())
    fresh.train()
    assert losses(ran) == losses(fresh)


def test_an_unrouted_step_is_an_error(tmp_path):
    ran = routed_on(tmp_path, texts())
    other = build("llama")
    message = "LlamaForCausalLM ran a step that was not routed"
    with pytest.raises(RuntimeError, match=message), ran._routed(other):
        pass


def test_batches_without_labels_are_refused(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in texts()]
    ran = routed_on(tmp_path, data)
    with pytest.raises(ValueError, match="labels must be in every batch of a routed step, got inp"):
        ran.train()


def test_a_model_that_is_compiled_already(tmp_path):
    plain = routed_on(tmp_path, texts())
    plain.train()
    compiled = torch.compile(build("llama"), backend="eager", dynamic=False)
    ran = routed_on(tmp_path, texts(), model=compiled, remove_unused_columns=False)
    made = ran.cggr_model
    ran.train()
    assert ran.cggr_model is made
    torch.testing.assert_close(losses(ran), losses(plain), rtol=1e-5, atol=1e-5)


def test_a_second_run_counts_anew(tmp_path):
    ran = routed_on(tmp_path, texts(), logging_steps=2)
    ran.train()
    first = [entry["token_ratio"] for entry in ran.state.log_history if "loss" in entry]
    ran.train()
    again = [entry["token_ratio"] for entry in ran.state.log_history if "loss" in entry]
    assert again == pytest.approx(first, abs=0.02)


def test_no_two_forwards_have_the_same_draw(tmp_path):
    draws = []
    ran = routed_on(
        tmp_path, texts(20), gradient_accumulation_steps=3, max_steps=5, num_train_epochs=3
    )
    step = ran.cggr_model.forward

    def recorded(*args, **inputs):
        draws.append(int(ran.cggr_model.scorer.draw_count))
        return step(*args, **inputs)

    ran.cggr_model.forward = recorded
    ran.train()
    assert len(draws) > 10
    assert len(set(draws)) == len(draws)


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0\.1"):
        trainer(tmp_path, label_smoothing_factor=0.1)


def test_encoder_decoders_and_learned_prompts_are_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = build("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="must be an encoder or a decoder, got one with both"):
        routed_on(tmp_path, texts(), model=model)
    prompted = get_peft_model(
        build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="must not learn a prompt"):
        routed_on(tmp_path, texts(), model=prompted)


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
    for routing, message in (
        ({"min_tokens_ratio": 2.0}, "min_tokens_ratio"),
        ({"model": 1}, "routing must not have 'model'"),
        ({"ignore_index": 0}, "ignore_index must be -100"),
    ):
        with pytest.raises(ValueError, match=message):
            CGGRTrainer(build("llama"), arguments(tmp_path), routing=routing)
    for router in (1.5, True):
        with pytest.raises(TypeError, match=r"routing\['router'\] must be a module or a number"):
            CGGRTrainer(build("llama"), arguments(tmp_path), routing={"router": router})


def test_with_cggr():
    assert with_cggr(Trainer) is CGGRTrainer
    assert with_cggr(CGGRTrainer) is CGGRTrainer
    assert with_cggr(Seq2SeqTrainer) is with_cggr(Seq2SeqTrainer)
    assert with_cggr(Seq2SeqTrainer).__mro__[1:3] == (CGGRTrainer, Seq2SeqTrainer)
    for wrong in (torch.nn.Module, []):
        with pytest.raises(TypeError, match="trainer must be a subclass of"):
            with_cggr(wrong)


def test_a_trainer_with_a_loss_of_its_own_is_refused():
    class Mine(Trainer):
        def compute_loss(self, model, inputs, **others):
            return 0 * super().compute_loss(model, inputs, **others)

    with pytest.raises(ValueError, match="got Mine, whose loss is Mine's"):
        with_cggr(Mine)

    class Both(CGGRTrainer, Mine):
        pass

    with pytest.raises(ValueError, match="got Both, whose loss is Mine's"):
        Both(build("llama"))
