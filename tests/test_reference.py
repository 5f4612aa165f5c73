"""Reference losses: against a window at a time in float64, resumed, and trained with."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from models import VOCAB, build
from races import save_tokenizer, write_book
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from cggr.cli import main
from cggr.jax import cggr_loss
from cggr.reference import ReferenceFileError, ReferenceLosses
from cggr.spec import RoutingConfig
from cggr.torch import CGGRModel
from cggr.torch.reference import score_reference

TOKENS = np.random.default_rng(0).integers(3, VOCAB, 101)
ABOUT = {"model": "tiny"}


def truth(model, tokens, context, stride):
    """The loss of each token in the first window that predicts it, one window at a time."""
    n_targets = len(tokens) - 1
    context = min(context, n_targets)
    found = np.full(n_targets, np.nan)
    begin = 0
    while np.isnan(found).any():
        window = torch.tensor(tokens[begin : begin + context + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].numpy().astype(np.float64)
        chosen = logits[np.arange(context), window[1:].numpy()]
        losses = np.log(np.exp(logits).sum(axis=1)) - chosen
        for i, loss in enumerate(losses):
            if math.isnan(found[begin + i]):
                found[begin + i] = loss
        begin = min(begin + stride, n_targets - context)
    return found


@pytest.fixture(scope="module")
def model():
    return build("llama").eval()


@pytest.mark.parametrize(
    ("context", "stride", "batch_size"),
    [(16, 8, 3), (16, 16, 2), (16, 1, 8), (13, 5, 1), (16, None, 3), (64, None, 8), (4, 3, 100)],
)
def test_losses_are_those_of_a_window_at_a_time(tmp_path, model, context, stride, batch_size):
    reference = ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    told = []
    score_reference(
        model,
        reference,
        context=context,
        stride=stride,
        batch_size=batch_size,
        advance=told.append,
    )
    expected = truth(model, TOKENS, context, stride or context // 2)
    found = ReferenceLosses.open(tmp_path / "r")
    np.testing.assert_allclose(found.losses[:-1], expected, rtol=2e-6, atol=2e-6)
    assert math.isnan(found.losses[-1])
    assert found.n_done == sum(told) == len(TOKENS) - 1
    np.testing.assert_array_equal(found.tokens, TOKENS)


@pytest.mark.parametrize("n_tokens", [1, 2, 9, 17])
def test_short_streams(tmp_path, model, n_tokens):
    tokens = TOKENS[:n_tokens]
    reference = ReferenceLosses.create(tmp_path / "r", tokens, ABOUT)
    score_reference(model, reference, context=16, stride=8)
    expected = truth(model, tokens, 16, 8) if n_tokens > 1 else []
    np.testing.assert_allclose(reference.losses[:-1], expected, rtol=2e-6, atol=2e-6)


def test_what_was_interrupted_goes_on_where_it_was(tmp_path, model):
    whole = ReferenceLosses.create(tmp_path / "whole", TOKENS, ABOUT)
    score_reference(model, whole, context=16, batch_size=2)

    def stop(n_tokens):
        stopped.append(n_tokens)
        if len(stopped) == 4:
            raise KeyboardInterrupt

    stopped = []
    reference = ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    with pytest.raises(KeyboardInterrupt):
        score_reference(model, reference, context=16, batch_size=2, advance=stop)
    reference = ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    assert reference.n_done == sum(stopped) == 16 + 3 * 8
    told = []
    score_reference(model, reference, context=16, batch_size=2, advance=told.append)
    assert sum(told) == len(TOKENS) - 1 - sum(stopped)
    np.testing.assert_allclose(reference.losses, whole.losses, rtol=1e-6)


def test_a_folder_of_something_else_is_kept(tmp_path):
    ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    with pytest.raises(ReferenceFileError, match="with model 'tiny', not 'other'"):
        ReferenceLosses.create(tmp_path / "r", TOKENS, {"model": "other"})
    with pytest.raises(ReferenceFileError, match="with n_tokens 101, not 100"):
        ReferenceLosses.create(tmp_path / "r", TOKENS[1:], ABOUT)
    with pytest.raises(ReferenceFileError, match="with tokens_sha256"):
        ReferenceLosses.create(tmp_path / "r", TOKENS + 1, ABOUT)
    with pytest.raises(ReferenceFileError, match="holds no reference losses"):
        ReferenceLosses.open(tmp_path / "none")


def test_rows_that_cannot_be_had_are_refused(tmp_path, model):
    reference = ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    with pytest.raises(ReferenceFileError, match="for 0 of 100 tokens only"):
        reference.rows(np.array([0]), 4)
    with pytest.raises(ValueError, match=r"starts must be in \[0, 97\] .* got 0 to 98"):
        reference.rows(np.array([0, 98]), 4)
    with pytest.raises(ValueError, match="starts must be in"):
        reference.rows(np.array([-1]), 4)
    score_reference(model, reference, context=16)
    last = reference.rows(np.array([97]), 4)
    assert np.isfinite(last["reference_nll"]).all()
    np.testing.assert_array_equal(last["reference_nll"][0, :3], reference.losses[97:100])


def test_labels_are_not_the_tokens_themselves(rows):
    rows["labels"][:] = -100
    assert rows["input_ids"].min() >= 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("about.json", b"[]", "about.json holds no JSON object"),
        ("about.json", b"{", "holds no reference losses"),
        ("about.json", b"\xff", "holds no reference losses"),
        ("tokens.npy", b"", "holds no reference losses"),
        ("losses.npy", b"junk", "holds no reference losses"),
        ("losses.npy", np.zeros(100, np.float32), r"losses.npy must be float32 \(101,\), got"),
        ("losses.npy", np.zeros(101), r"losses.npy must be float32 \(101,\), got float64"),
        ("tokens.npy", TOKENS, r"tokens.npy must be int32 \(101,\), got int64"),
    ],
)
def test_damaged_files_are_refused(tmp_path, file, content, message):
    folder = tmp_path / "r"
    ReferenceLosses.create(folder, TOKENS, ABOUT)
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        np.save(folder / file, content)
    with pytest.raises(ReferenceFileError, match=message):
        ReferenceLosses.open(folder)
    with pytest.raises(ReferenceFileError, match=message):
        ReferenceLosses.create(folder, TOKENS, ABOUT)


def test_changed_tokens_are_noticed_and_none_refused(tmp_path):
    ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    np.save(tmp_path / "r" / "tokens.npy", TOKENS.astype(np.int32)[::-1])
    with pytest.raises(ReferenceFileError, match=r"damaged: tokens\.npy has changed"):
        ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    for wrong in ([], [[1, 2]]):
        with pytest.raises(ValueError, match=r"tokens must be \(N,\), of one or more"):
            ReferenceLosses.create(tmp_path / "none", wrong, ABOUT)
    assert not (tmp_path / "none").exists()


def test_losses_that_are_not_finite_are_refused_where_they_are(tmp_path):
    reference = ReferenceLosses.create(tmp_path / "r", np.arange(40), ABOUT)
    table = torch.nn.Embedding(40, 40)
    with torch.no_grad():
        table.weight[21, 3] = math.nan
    with pytest.raises(FloatingPointError, match=r"at position 21 is nan, in torch.float32"):
        score_reference(table, reference, context=8, batch_size=1)
    # What came before its window is kept.
    assert 8 <= reference.n_done <= 21


@pytest.mark.parametrize(
    "options", [{"context": 0}, {"batch_size": 0}, {"context": 8, "stride": 9}, {"stride": 0}]
)
def test_windows_that_cannot_be_are_refused(tmp_path, model, options):
    reference = ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    with pytest.raises(ValueError, match="must be positive and stride in"):
        score_reference(model, reference, **options)


EXCESS = RoutingConfig(
    scoring="excess_loss",
    selection="topk",
    min_tokens_ratio=0.5,
    warmup_steps=0,
    dynamic_threshold=False,
    scope="sequence",
)


@pytest.fixture
def rows(tmp_path, model):
    reference = ReferenceLosses.create(tmp_path / "r", TOKENS, ABOUT)
    score_reference(model, reference, context=16)
    return reference.rows(np.array([0, 20, 40, 60]), 17)


def test_both_frontends_train_on_the_same_excess(rows, model):
    other = build("llama", seed=1)
    with torch.no_grad():
        logits = other(torch.from_numpy(rows["input_ids"])).logits[:, :-1].numpy()
    targets = rows["labels"][:, 1:]
    exact = logits.astype(np.float64)
    nll = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    excess = nll - rows["reference_nll"][:, :-1]
    kept = np.sort(np.argsort(-excess, axis=1)[:, :8], axis=1)
    expected = np.take_along_axis(nll, kept, 1).mean()

    loss = CGGRModel(other, split="token", config=EXCESS)(
        **{name: torch.from_numpy(value) for name, value in rows.items()}
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    jax_loss, _ = cggr_loss(
        jnp.asarray(logits),
        jnp.asarray(targets),
        EXCESS,
        step=0,
        draw=0,
        capacity=8,
        reference_nll=jnp.asarray(rows["reference_nll"][:, :-1]),
    )
    assert float(jax_loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
def test_a_trainer_takes_them_as_a_column(rows, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from cggr.torch.trainer import CGGRTrainer

    data = datasets.Dataset.from_dict(
        {name: list(value) for name, value in rows.items()} | {"other": [0] * 4}
    )
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    other = build("llama", seed=1)
    expected = CGGRModel(build("llama", seed=1), split="token", config=EXCESS)(
        **{name: torch.from_numpy(value) for name, value in rows.items()}
    )
    trainer = CGGRTrainer(
        other,
        args,
        train_dataset=data.with_format("torch"),
        eval_dataset=data.with_format("torch"),
        routing={"split": "token", "config": EXCESS},
    )
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.fixture
def folder(tmp_path):
    """A tiny model with its tokenizer, as save_pretrained writes them."""
    saved = tmp_path / "model"
    build("llama", vocab_size=290).save_pretrained(saved)
    save_tokenizer(saved)
    return saved


def run(*arguments):
    return CliRunner().invoke(main, ["score", *map(str, arguments)])


def test_the_command(tmp_path, folder, monkeypatch):
    book = write_book(tmp_path / "book")
    options = ("--model", folder, "--text", book, "--context", 32, "--device", "cpu")
    done = run(*options, "--output", tmp_path / "whole")
    assert done.exit_code == 0, done.output
    whole = ReferenceLosses.open(tmp_path / "whole")
    assert whole.n_done == len(whole.tokens) - 1
    assert f"{whole.n_done:,} losses" in done.output
    assert json.loads((tmp_path / "whole" / "about.json").read_text())["stride"] == 16

    calls = []
    score = torch.nn.Module.__call__

    def interrupted(module, *args, **kwargs):
        if type(module).__name__ == "LlamaForCausalLM":
            calls.append(module)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return score(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", interrupted)
    stopped = run(*options, "--output", tmp_path / "r", "--batch-size", 2)
    assert stopped.exit_code == 130, stopped.output
    again = run(*options, "--output", tmp_path / "r", "--batch-size", 2)
    assert again.exit_code == 0, again.output
    assert "Going on at token 48 of" in again.output
    found = ReferenceLosses.open(tmp_path / "r")
    np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-4, atol=1e-5)

    other = run(*options[:4], "--context", 16, "--device", "cpu", "--output", tmp_path / "r")
    assert other.exit_code == 2
    assert "holds losses with context 32, not 16" in other.output


def test_the_command_refuses_what_cannot_be(tmp_path, folder):
    book = write_book(tmp_path / "book")
    options = ("--model", folder, "--text", book, "--output", tmp_path / "r")
    assert "--context 128 is more than its 64 positions" in run(*options, "--context", 128).output
    assert "more than --context" in run(*options, "--context", 8, "--stride", 9).output
    assert "no config.json in it" in run(*options[2:], "--model", tmp_path).output
    (tmp_path / "one.txt").write_text("e")
    bare = shutil.copytree(folder, tmp_path / "bare")
    named = json.loads((bare / "config.json").read_text())
    named["eos_token_id"] = None  # no end of text before each text
    (bare / "config.json").write_text(json.dumps(named))
    few = run("--model", bare, "--text", tmp_path / "one.txt", *options[4:], "--context", 8)
    assert few.exit_code == 2
    assert "1 tokens, of which none follows another" in few.output
    (tmp_path / "file").write_text("")
    blocked = run(*options[:4], "--output", tmp_path / "file" / "r", "--context", 8)
    assert blocked.exit_code == 2
    assert "Traceback" not in blocked.output
    weights = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    save_file(weights | {name: weights[name] * math.nan}, folder / "model.safetensors")
    nan = run(*options, "--context", 8, "--device", "cpu")
    assert nan.exit_code == 2
    assert "the model's loss at position 0 is nan, in torch.float32" in " ".join(nan.output.split())
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in run(*options, "--context", 8).output
    described = json.loads((folder / "tokenizer.json").read_text())
    del described["model"]["vocab"]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    assert "tokenizer.json describes no tokenizer" in run(*options, "--context", 8).output


def test_the_output_within_the_text_is_no_part_of_it(tmp_path, folder):
    book = write_book(tmp_path / "book")
    options = ("--model", folder, "--text", book, "--context", 32, "--device", "cpu")
    for _ in range(2):
        done = run(*options, "--output", book / "reference")
        assert done.exit_code == 0, done.output
