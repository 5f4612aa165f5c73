"""TRL's SFTTrainer, routed by one changed line."""

import random

import pytest
import torch
from models import VOCAB, build
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cggr.torch.trainer import CGGRTrainer, with_cggr

Dataset = pytest.importorskip("datasets", reason="datasets is not installed").Dataset
trl = pytest.importorskip("trl", reason="TRL is not installed")
SFTConfig, SFTTrainer = trl.SFTConfig, trl.SFTTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.float64,  # schedulers and norms of the trainer
]
SPLITS = {"token": {"split": "token"}, "sequence": {"split": "sequence"}}
ROUTING = {"selection": "importance", "warmup_steps": 1, "min_tokens_ratio": 0.3}
WAYS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
    "bfloat16": {"bf16": True},
}


def tokenizer():
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))]
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


def texts(n=48):
    words = random.Random(0)
    rows = [[f"w{words.randrange(30)}" for _ in range(words.randrange(4, 14))] for _ in range(n)]
    return Dataset.from_dict({"text": [" ".join(row) for row in rows]})


def trainer(folder, kind, *, split="token", peft_config=None, data=None, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    routed = {"routing": ROUTING | SPLITS[split]} if issubclass(kind, CGGRTrainer) else {}
    return kind(
        build("llama"),
        SFTConfig(**defaults | options),
        train_dataset=texts() if data is None else data,
        eval_dataset=texts(8),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **routed,
    )


def losses(of):
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("way", WAYS)
def test_it_trains_and_the_first_step_is_dense(tmp_path, way, split):
    plain = trainer(tmp_path, SFTTrainer, **WAYS[way])
    plain.train()
    ran = trainer(tmp_path, with_cggr(SFTTrainer), split=split, **WAYS[way])
    ran.train()
    # At step 0 of the warm-up every token is trained on.
    tolerance = 2e-3 if way == "bfloat16" else 1e-5
    assert losses(ran)[0] == pytest.approx(losses(plain)[0], rel=tolerance)
    logged = [entry for entry in ran.state.log_history if "loss" in entry]
    assert logged[0]["token_ratio"] == 1
    assert logged[-1]["token_ratio"] < 0.5
    if split == "token" or way in ("padded", "bfloat16"):  # packing leaves one sequence, all of it
        assert logged[-1]["tokens_selected"] < 0.8 * logged[-1]["tokens_total"]
        assert losses(ran)[1:] != losses(plain)[1:]
    found = ran.evaluate()
    assert found["eval_loss"] < 4.2
    assert 0 <= found["eval_mean_token_accuracy"] <= 1


def test_evaluation_is_the_trainers_own(tmp_path):
    ran = trainer(tmp_path, with_cggr(SFTTrainer))
    plain = trainer(tmp_path, SFTTrainer)
    assert ran.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_prompts_are_not_trained_on(tmp_path):
    words = texts(16)["text"]
    prompted = Dataset.from_dict({"prompt": [f"{text} " for text in words], "completion": words})
    ran = trainer(tmp_path, with_cggr(SFTTrainer), data=prompted, max_steps=2)
    ran.train()
    batches = list(ran.get_train_dataloader())
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    total = sum(entry.get("tokens_total", 0) for entry in ran.state.log_history)
    assert total == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert total < 0.6 * n_tokens


def test_resumed(tmp_path):
    whole = trainer(tmp_path, with_cggr(SFTTrainer), save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path, with_cggr(SFTTrainer))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(losses(resumed), losses(whole), rtol=0, atol=1e-6)


def test_an_adapter(tmp_path):
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    ran = trainer(tmp_path, with_cggr(SFTTrainer), peft_config=adapter)
    before = {name: value.clone() for name, value in ran.model.named_parameters()}
    ran.train()
    changed = {
        name for name, value in ran.model.named_parameters() if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}


def test_what_is_saved_is_the_plain_model(tmp_path):
    ran = trainer(tmp_path, with_cggr(SFTTrainer))
    ran.train()
    ran.save_model(str(tmp_path / "saved"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_loss_that_would_be_replaced_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type must be 'nll', got 'dft'"):
        trainer(tmp_path, with_cggr(SFTTrainer), loss_type="dft")
