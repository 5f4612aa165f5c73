"""Whole races with PyTorch, small enough for a test."""

import dataclasses
import functools
import importlib
import json
import math
import shutil
import tempfile
from importlib import metadata

import numpy as np
import pytest
import races
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from matplotlib import image
from races import race, read, save_tokenizer, tiny, write_book

import cggr.torch.model
from cggr.cli import main
from cggr.race import tokens, torch_lanes
from cggr.race.settings import LANES, RaceError

SMALL = [*races.SMALL, "--threads", "1"]


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A text, and a token cache of its own."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_book(tmp_path / "book")


def test_a_race_from_the_command_line(book, tmp_path):
    result = race(*SMALL, "--budget", "6steps", "--seeds", "2")
    assert result.exit_code == 0, result.output
    found = read(tmp_path)
    assert found["complete"] is True
    assert found["schema"] == 2
    assert found["settings"] == {
        "budget": "6steps",
        "lanes": ["dense", "random", "cggr"],
        "tables": {},
        "scoring": "combined",
        "selection": "importance",
        "ratio": 0.25,
        "router_layers": 1,
        "eval_every": None,
        "seeds": 2,
        "batch_size": 8,
        "sequence_length": 32,
        "learning_rate": 1e-2,
        "learning_rates": [],
        "hidden_size": 32,
        "head_size": 32,
        "kv_heads": None,
        "layers": 2,
        "vocab_size": 300,
        "text": ["book"],
        "prompt": 0.0,
        "pairs": False,
        "noise": 0.0,
        "reference": None,
        "model": None,
        "device": "cpu",
        "backend": "torch",
        "compiled": False,
        "memory": None,
        "save": None,
    }
    assert found["versions"]["torch"] == metadata.version("torch")
    again = race(*SMALL, "--budget", "6steps")
    assert again.exit_code == 2
    assert again.stderr == (
        "cggr: Invalid value for --name: runs/test holds the results of an earlier race\n"
    )
    assert set(found["versions"]) == {"python", "cggr", "torch", "transformers", "cuda"}
    assert set(found["machine"]) == {"system", "cpu", "cores", "threads", "device", "gpu"}
    assert found["machine"]["device"] == "cpu"
    assert "git_commit" in found
    assert found["text"]["source"] == "book"
    assert found["text"]["training_files"] + len(found["text"]["heldout_files"]) == 40
    assert str(tmp_path) not in json.dumps(found)

    runs = {(run["lane"], run["seed"]): run for run in found["runs"]}
    assert len(runs) == 6
    for (lane, _), run in runs.items():
        curve = run["curve"]
        assert [point["steps"] for point in curve] == [0, 1, 2, 3, 4, 5, 6]
        assert [point["tokens_seen"] for point in curve] == [256 * step for step in range(7)]
        kept = 31 if lane == "dense" else 8  # of each of 8 sequences: ceil(31 / 4)
        assert [point["tokens_trained"] for point in curve] == [8 * kept * i for i in range(7)]
        seconds = [point["seconds"] for point in curve]
        assert sorted(seconds) == seconds
        assert curve[-1]["loss"] < curve[0]["loss"] - 0.3
        corpus_bits = found["text"]["heldout_tokens"] - 1
        for point in curve:
            bits = point["loss"] * corpus_bits / math.log(2) / found["text"]["heldout_bytes"]
            assert point["bits_per_byte"] == pytest.approx(bits)
    for seed in (0, 1):  # all lanes of a seed start from one model, another seed from another
        assert len({runs[lane, seed]["curve"][0]["loss"] for lane in ("dense", "cggr")}) == 1
    assert runs["dense", 0]["curve"][0]["loss"] != runs["dense", 1]["curve"][0]["loss"]

    height, width, _ = image.imread(tmp_path / "runs" / "test" / "report.png").shape
    assert (height, width) == (720, 1650)
    assert "Held-out loss at equal steps (6 steps per lane, 2 seeds): " in result.stdout
    assert (tmp_path / "runs" / "test" / "table.txt").read_text().count("cggr") >= 3


def test_a_race_by_time_repeats_nothing_but_its_clock(book, tmp_path):
    result = race(*SMALL, "--budget", "0.5s", "--lanes", "cggr", "--eval-every", "0.25s")
    assert result.exit_code == 0, result.output
    (run,) = read(tmp_path)["runs"]
    assert len(run["curve"]) == 3
    assert 0.5 <= run["curve"][-1]["seconds"] < 2.0
    assert run["curve"][-1]["steps"] > 2


def test_the_same_steps_give_the_same_losses(book, tmp_path):
    losses = []
    for _ in range(2):
        assert race(*SMALL, "--budget", "3steps", "--selection", "importance").exit_code == 0
        losses.append([[p["loss"] for p in run["curve"]] for run in read(tmp_path)["runs"]])
        (tmp_path / "runs" / "test" / "results.json").unlink()  # the name may be used again
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][2]


def test_ctrl_c_writes_the_report(book, tmp_path, monkeypatch):
    calls = []
    step = torch_lanes.TorchLane.train_step

    def interrupted(lane, batch, learning_rate):
        calls.append(lane.name)
        if len(calls) == 30:
            raise KeyboardInterrupt
        step(lane, batch, learning_rate)

    monkeypatch.setattr(torch_lanes.TorchLane, "train_step", interrupted)
    result = race(*SMALL, "--budget", "20steps")
    assert result.exit_code == 130
    assert "Interrupted: the report holds what was measured until then." in result.stdout
    found = read(tmp_path)
    assert found["complete"] is False
    assert [run["complete"] for run in found["runs"]] == [False] * 3
    # Three calls were warm-ups, 26 trained: eight or so per lane, in steps of two.
    assert min(len(run["curve"]) for run in found["runs"]) >= 4
    assert " of 20 steps per lane" in result.stdout
    assert (tmp_path / "runs" / "test" / "report.png").stat().st_size > 10_000


def make_lane(name, *, seed=0, **options):
    settings, corpus = tiny(**options)
    lane = torch_lanes.make_lanes(settings, corpus, torch.device("cpu"))(name, seed)
    return lane, corpus.training


def batch_of(stream):
    """Eight sequences from its beginning."""
    ids = stream[:128].astype(np.int64).reshape(8, 16)
    return tokens.Batch(ids, ids)


@pytest.fixture
def answers(book, tmp_path):
    """Pairs in files: a completion is the last digit of its prompt."""
    folder = tmp_path / "answers"
    folder.mkdir()
    for number in range(40):
        pairs = [(f"the last of {10 * i + number % 10} is", f" {number % 10}") for i in range(30)]
        lines = [json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_race_on_pairs(answers, tmp_path, monkeypatch, backend):
    config = tmp_path / "pairs.toml"
    config.write_text(
        """
text = ["answers"]
pairs = true
budget = "3steps"
eval-every = "3steps"
[lanes.dense]
split = "dense"
[lanes.prompts]
split = "dense"
learns-prompts = true
[lanes.token]
ratio = 1.0
selection = "random"
max-eligible-ratio = 0.5
[lanes.sequences]
split = "sequence"
ratio = 1.0
selection = "random"
"""
    )
    seen = {}  # every batch of a lane
    run = importlib.import_module(f"cggr.race.{backend}_lanes")
    lane_of = getattr(run, f"{backend.title()}Lane")
    step = lane_of.train_step

    def observed(lane, batch, learning_rate):
        seen.setdefault(lane.name, []).append(batch)
        step(lane, batch, learning_rate)

    monkeypatch.setattr(lane_of, "train_step", observed)
    result = CliRunner().invoke(
        main, ["race", "--config", str(config), "--name", "test", "--backend", backend, *SMALL]
    )
    seen = {name: batches[1:] for name, batches in seen.items()}  # the first one is a warm-up
    assert result.exit_code == 0, result.output
    assert "batch 8 x 32, prompts and completions, " in result.output
    found = read(tmp_path)
    assert found["settings"]["pairs"] is True
    runs = {run["lane"]: run["curve"][-1] for run in found["runs"]}
    # Whoever learns prompts too learns of every token but a sequence's first.
    assert runs["prompts"]["tokens_trained"] == 3 * 8 * 31
    learned = sum(batch.targets for batch in seen["dense"])
    assert runs["dense"]["tokens_trained"] == learned < 0.5 * 3 * 8 * 31
    assert len({batch.targets for batch in seen["dense"]}) > 1
    assert runs["token"]["tokens_trained"] == runs["dense"]["tokens_trained"]
    # From the same batches, the same steps.
    assert runs["sequences"]["loss"] == pytest.approx(runs["dense"]["loss"], rel=1e-4)
    assert runs["prompts"]["loss"] != pytest.approx(runs["dense"]["loss"], rel=1e-2)


def test_more_labels_than_a_lane_has_slots_for_are_an_error(answers, tmp_path):
    config = tmp_path / "pairs.toml"
    config.write_text(
        'text = ["answers"]\npairs = true\n[lanes.token]\nratio = 1.0\nmax-eligible-ratio = 0.05\n'
    )
    result = CliRunner().invoke(
        main, ["race", "--config", str(config), "--budget", "3steps", *SMALL]
    )
    assert result.exit_code == 2
    assert "lane token: max_eligible_ratio" in result.output


@pytest.mark.parametrize("split", ["dense", "token"])
def test_parts_of_a_batch_weigh_by_their_labels(split):
    table = {"split": split} | ({} if split == "dense" else {"ratio": 1.0, "selection": "random"})
    stream = tiny()[1].training
    ids = stream[:128].astype(np.int64).reshape(8, 16)
    labels = ids.copy()
    labels[:4, 2:] = tokens.IGNORED  # a label a sequence in the first half, and 15 in the other
    losses = []
    for parts in (1, 4):
        tables = {"mine": table | {"micro-batches": parts}}
        lane, _ = make_lane("mine", lanes=("mine",), tables=tables)
        for _ in range(3):
            lane.train_step(tokens.Batch(ids, labels), 1e-2)
        losses.append(lane.evaluate())
        assert lane.tokens_trained() == 3 * (4 + 60)
        assert lane.tokens_trained() == 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_held_out_loss_predicts_every_token_once():
    lane, stream = make_lane("dense")
    total = 0.0
    with torch.no_grad():
        for start in range(0, 99, 16):  # the last window is shorter
            window = torch.from_numpy(stream[start : min(start + 17, 100)].astype(np.int64))
            logits = lane.model(input_ids=window[None, :-1]).logits[0]
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert lane.evaluate() == pytest.approx(total / 99, rel=1e-5)
    assert lane.model.training


def test_the_dense_lane_is_plain_training():
    lane, stream = make_lane("dense")
    model = make_lane("dense")[0].model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batch = batch_of(stream)
    for _ in range(3):
        lane.train_step(batch, 1e-3)
        ids = torch.from_numpy(batch.ids)
        logits = model(input_ids=ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, plain in zip(lane.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_with_ratio_one_every_lane_trains_like_dense():
    losses = []
    for name in LANES:
        lane, stream = make_lane(name, ratio=1.0)
        for step in range(3):
            lane.train_step(batch_of(stream[128 * step :]), 1e-2)
        losses.append(lane.evaluate())
    assert losses[1:] == pytest.approx([losses[0]] * 4, rel=1e-4)


@pytest.mark.parametrize(("name", "kept"), [("cggr", 8 * 4), ("cggr-sequences", 2 * 15)])
def test_a_lane_keeps_tokens_of_every_sequence_or_whole_sequences(name, kept):
    lane, stream = make_lane(name, ratio=0.25)
    lane.train_step(batch_of(stream), 1e-2)
    assert lane.tokens_trained() == kept


def test_a_model_that_cannot_run_on_tokens_can_on_sequences():
    lane, _ = make_lane("dense")
    lane.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    settings, corpus = tiny()
    message = r"^--lanes cggr: LlamaForCausalLM has dynamic .* cggr-sequences can race$"
    with pytest.raises(RaceError, match=message):
        torch_lanes.TorchLane(settings.lane("cggr"), lane.model, settings, corpus, 0)
    way = settings.lane("cggr-sequences")
    torch_lanes.TorchLane(way, lane.model, settings, corpus, 0)


@pytest.mark.parametrize("split", ["token", "sequence"])
def test_a_lane_that_warms_up_begins_with_all_tokens(split):
    table = {"split": split, "selection": "random", "warmup_steps": 2}
    lane, stream = make_lane("slow", lanes=("slow",), tables={"slow": table})
    kept = []
    for _ in range(4):
        lane.train_step(batch_of(stream), 1e-2)
        kept.append(lane.tokens_trained())
    # Of 15 predictions in each of 8 sequences, or of the sequences: all, 5/8, and a quarter.
    per_step = {"token": [8 * 15, 8 * 10, 8 * 4, 8 * 4], "sequence": [8 * 15, 5 * 15, 30, 30]}
    assert kept == per_step[split]


@pytest.fixture
def bigrams(tmp_path):
    """A reference without attention: its loss of a token follows from the one before alone."""
    model = make_lane("dense", seed=7)[0].model
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    folder = tmp_path / "reference"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def losses_of(model, ids):
    """Loss of every token of rows but the first, at the one before it."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(ids)[:, :-1]).logits
    return -logits.log_softmax(-1).gather(-1, torch.from_numpy(ids)[:, 1:, None])[..., 0].numpy()


def referenced(folder, **options):
    """Settings and a corpus of the reference's tokenizer."""
    settings, corpus = tiny(reference=folder, **options)
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return settings, dataclasses.replace(corpus, tokenizer=tokenizer)


def test_the_references_loss_is_that_of_the_token_that_follows(bigrams):
    settings, corpus = referenced(bigrams)
    found = torch_lanes.reference_losses(settings, corpus, torch.device("cpu"))
    assert found.dtype == np.float32
    assert found.shape == corpus.training.shape
    assert np.isnan(found[-1])
    stream = corpus.training.astype(np.int64)
    model = torch_lanes.load_folder(bigrams, torch.float32)
    wanted = losses_of(model, np.stack([stream[:-1], stream[1:]], axis=1))[:, 0]
    np.testing.assert_allclose(found[:-1], wanted, rtol=1e-5, atol=1e-5)


def test_a_reference_sees_as_much_as_a_sequence_has(tmp_path):
    lane, stream = make_lane("dense", seed=7)
    lane.save(tmp_path)
    save_tokenizer(tmp_path)
    settings, corpus = referenced(tmp_path)
    found = torch_lanes.reference_losses(settings, corpus, torch.device("cpu"))
    # Windows of 16 tokens, each 8 behind the one before.
    rows = np.stack([stream[8 * i :][:17] for i in range(10)]).astype(np.int64)
    wanted = losses_of(lane.model, rows)
    np.testing.assert_allclose(found[:16], wanted[0], rtol=1e-5, atol=1e-5)
    for i in range(1, 10):
        np.testing.assert_allclose(found[8 * i + 8 :][:8], wanted[i, 8:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", ["token", "sequence"])
def test_the_references_losses_reach_the_scores(bigrams, monkeypatch, split):
    tables = {
        "excess": {"split": split, "scoring": "excess_loss"},
        "hard": {"split": split, "scoring": "loss"},
    }
    settings, corpus = referenced(bigrams, tables=tables, lanes=("excess", "hard"))
    device = torch.device("cpu")
    batch = tokens.batches(
        corpus.training,
        batch_size=8,
        sequence_length=16,
        seed=0,
        reference_nll=torch_lanes.reference_losses(settings, corpus, device),
    )(0)
    scores = []
    select = cggr.torch.model.select_at_ratio

    def spy(difficulty, *args, **kwargs):
        scores.append(difficulty.detach().numpy())
        return select(difficulty, *args, **kwargs)

    monkeypatch.setattr(cggr.torch.model, "select_at_ratio", spy)
    make = torch_lanes.make_lanes(settings, corpus, device)
    # Of each row's own tokens, with no shift between them and the reference's losses.
    own = losses_of(make("hard", 0).model, batch.ids)
    reference = torch_lanes.load_folder(bigrams, torch.float32)
    pairs = np.stack([batch.ids[:, :-1].ravel(), batch.ids[:, 1:].ravel()], axis=1)
    theirs = losses_of(reference, pairs)[:, 0].reshape(own.shape)
    for lane, wanted in (("excess", own - theirs), ("hard", own)):
        make(lane, 0).train_step(batch, 1e-2)
        found = scores.pop()
        if split == "token":
            found = found[:, :-1]  # the last position predicts nothing
        else:
            wanted = wanted.mean(axis=1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not scores


@pytest.mark.parametrize("prompt", [0.0, 0.75])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("table", [{"split": "dense"}, {"split": "token", "selection": "random"}])
def test_micro_batches_train_as_the_batch_does(table, compiled, prompt, monkeypatch):
    # At ratio 1 what is drawn does not matter.
    table = table if table["split"] == "dense" else table | {"ratio": 1.0}
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    settings, corpus = tiny(
        lanes=("whole", "parts"),
        tables={"whole": table, "parts": table | {"micro_batches": 4}},
        compiled=compiled,
        prompt=prompt,
    )
    make = torch_lanes.make_lanes(settings, corpus, torch.device("cpu"))
    found = []
    for name in settings.lanes:
        lane = make(name, 0)
        for step in range(2):
            batch = batch_of(corpus.training[128 * step :])
            labels = np.where(np.arange(16) < settings.prompt_tokens, tokens.IGNORED, batch.ids)
            lane.train_step(batch._replace(labels=labels), 1e-2)
        found.append(lane.evaluate())
        assert lane.tokens_trained() == 2 * 8 * (4 if prompt else 15)
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("split", ["dense", "token", "backward"])
def test_a_checkpointed_lane_trains_as_others_do(split):
    table = {"split": split} | ({} if split == "dense" else {"selection": "topk"})
    settings, corpus = tiny(
        lanes=("plain", "checkpointed"),
        tables={"plain": table, "checkpointed": table | {"checkpointed": True}},
    )
    make = torch_lanes.make_lanes(settings, corpus, torch.device("cpu"))
    lanes = [make(name, 0) for name in settings.lanes]
    layers = [lane.model.model.layers[0] for lane in lanes]
    assert [layer.gradient_checkpointing for layer in layers] == [False, True]
    for lane in lanes:
        lane.train_step(batch_of(corpus.training), 1e-2)
    assert lanes[0].evaluate() == pytest.approx(lanes[1].evaluate(), abs=1e-6)


def test_memory_that_does_not_suffice(monkeypatch):
    lane, stream = make_lane("dense")

    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(lane.model, "forward", full)
    message = "lane dense: a batch of 8 sequences does not fit: CUDA out of memory$"
    with pytest.raises(RaceError, match=message):
        lane.train_step(batch_of(stream), 1e-2)
    with pytest.raises(RaceError, match="--memory 2: it is for CUDA devices, and this is cpu"):
        make_lane("dense", memory=2.0)


def test_memory_is_limited_to_what_was_asked_for(monkeypatch):
    device, limits = torch.device("cuda"), []
    properties = type("Properties", (), {"total_memory": 8 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    # Which takes no device without an index.
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction: limits.append(fraction)
    )
    torch_lanes.limit_memory(2.0, device)
    assert limits == [0.25]
    with pytest.raises(RaceError, match=r"--memory 9: the device has 8\.0 GiB"):
        torch_lanes.limit_memory(9.0, device)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("dense", "inductor"), ("random", "aot_eager")])
# Dynamo looks at the .grad of every input, hidden states that a model made included, and makes an
# instance of every autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_a_compiled_lane_trains_as_others_do_and_starts_again(
    fresh_dynamo, monkeypatch, tmp_path, name, backend
):
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler (g++ or clang++) on this machine, which inductor needs")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Of the token split inductor compiles another minute's worth of C++.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    shape = {"layers": 1, "lanes": (name,)}
    settings, corpus = tiny(compiled=True, **shape)
    make = torch_lanes.make_lanes(settings, corpus, torch.device("cpu"))

    def curve(lane):
        losses = [lane.evaluate()]
        for step in range(3):
            lane.train_step(batch_of(corpus.training[128 * step :]), 1e-2)
            losses.append(lane.evaluate())
        return losses

    lane = make(name, 0)
    assert isinstance(lane, torch_lanes.CompiledLane)
    found = curve(lane)
    # Sums in another order, and what three steps of Adam make of that.
    assert found == pytest.approx(curve(make_lane(name, **shape)[0]), abs=1e-4)
    assert found[-1] < found[0] - 0.1
    assert lane.tokens_trained() == 3 * (8 * 15 if name == "dense" else 8 * 4)
    # What is scored has averages: a dense or random step that scored would be no fair control.
    assert "avg_entropy" not in lane.routed.get_metrics()
    assert make(name, 0) is lane  # what was compiled serves again, from the start
    assert curve(lane) == found
    other = curve(make(name, 1))
    assert other[0] == make_lane(name, seed=1, **shape)[0].evaluate()
    lane.restart(torch_lanes.build_model(settings, corpus, 0).state_dict(), seed=1)
    again = curve(lane)
    assert again[0] == found[0]
    assert (again == found) == (name == "dense")  # a selection has other draws


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_every_lane_is_compiled_as_one_graph_however_many_there_are(fresh_dynamo, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    settings, corpus = tiny(
        compiled=True,
        layers=1,
        lanes=("dense", "dense checkpointed", "token", "backward"),
        tables={
            "dense checkpointed": {"split": "dense", "checkpointed": True},
            "token": {"split": "token", "router_layers": 1},
            "backward": {"split": "backward", "micro_batches": 2},
        },
    )
    make = torch_lanes.make_lanes(settings, corpus, torch.device("cpu"))
    with torch._dynamo.config.patch(recompile_limit=1):
        for number, name in enumerate(settings.lanes, start=1):
            lane = make(name, 0)
            for _ in range(2):
                lane.train_step(batch_of(corpus.training), 1e-2)
            assert len(graphs) == number


def test_heads_share_their_keys_and_values():
    lane, stream = make_lane("dense", hidden_size=64, head_size=16, kv_heads=2)
    attention = lane.model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (64, 64)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (32, 64)
    before = lane.evaluate()
    lane.train_step(batch_of(stream), 1e-2)
    assert lane.evaluate() < before


def test_lanes_of_one_seed_share_their_start_and_nothing_else():
    settings_of = {name: make_lane(name)[0] for name in ("dense", "cggr")}
    dense, cggr = settings_of["dense"], settings_of["cggr"]
    for a, b in zip(dense.model.parameters(), cggr.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_building_a_model_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    make_lane("dense", seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def saved_model(tmp_path):
    """A folder as save_pretrained writes it, with a tokenizer that truncates."""
    lane, _ = make_lane("dense")
    folder = tmp_path / "pretrained"
    lane.model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_a_local_model_is_fine_tuned(book, tmp_path, saved_model):
    arguments = "--model pretrained --batch-size 4 --sequence-length 16 --budget 2steps"
    result = race(*arguments.split(), "--learning-rate", "1e-2", "--lanes", "dense,cggr")
    assert result.exit_code == 0, result.output
    found = read(tmp_path)
    assert found["settings"]["model"] == "pretrained"
    # Truncated to four tokens, forty pages would give 200.
    assert found["text"]["training_tokens"] > 10_000
    curve = found["runs"][0]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--sequence-length 17",
            "--model pretrained: --sequence-length 17 is more than its 16 positions",
        ),
        (
            "--sequence-length 16 --router-layers 3",
            "--model pretrained: --router-layers 3 is more than its 2 layers",
        ),
    ],
)
def test_a_local_model_that_does_not_fit(book, saved_model, arguments, message):
    result = race("--model", "pretrained", "--batch-size", "4", *arguments.split())
    assert result.stderr == f"cggr: {message}\n"
    assert result.exit_code == 2


def test_a_lane_whose_router_is_deeper_than_the_model(book, tmp_path, saved_model):
    (tmp_path / "config.toml").write_text("[lanes.deep]\nrouter-layers = 3\n")
    arguments = "--config config.toml --model pretrained --batch-size 4 --sequence-length 16"
    result = race(*arguments.split())
    assert result.stderr == (
        "cggr: --model pretrained: lane deep: router_layers 3 is more than its 2 layers\n"
    )
    assert result.exit_code == 2


def test_a_model_without_tokenizer(book, saved_model):
    (saved_model / "tokenizer.json").unlink()
    result = race("--model", "pretrained", "--batch-size", "4")
    assert result.stderr == (
        "cggr: --model pretrained: no tokenizer.json in it; give the folder of a Hugging Face "
        "model with its tokenizer, as save_pretrained writes it\n"
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model(book, saved_model, name):
    (saved_model / name).write_text("{")
    result = race("--model", "pretrained", "--batch-size", "4", "--sequence-length", "16")
    assert result.stderr.startswith("cggr: --model pretrained: ")
    assert result.stderr.count("\n") == 1
    assert result.exit_code == 2


def test_a_tokenizer_larger_than_the_model(book, saved_model):
    pages = [page.read_text() for page in sorted(book.iterdir())]
    tokenizer = tokens.train_tokenizer(pages, vocab_size=400)
    tokenizer.save(str(saved_model / "tokenizer.json"))
    result = race("--model", "pretrained", "--batch-size", "4", "--sequence-length", "16")
    assert result.stderr == (
        f"cggr: --model pretrained: its tokenizer's vocabulary {tokenizer.get_vocab_size()} is "
        "more than its 300 embeddings\n"
    )
    assert result.exit_code == 2


def test_a_device_is_found_or_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert torch_lanes.find_device("auto") == torch.device("mps")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert torch_lanes.find_device("auto") == torch.device("cpu")
    with pytest.raises(RaceError, match=r"^--device mps: this machine"):
        torch_lanes.find_device("mps")
