"""Races with JAX: the same model, the same lanes and the same numbers as with PyTorch."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import races
from races import race, read, save_tokenizer, tiny, write_book

pytest.importorskip("flax", reason="flax is not installed")

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
import transformers
from flax import nnx

import cggr
from cggr.race import engine, jax_lanes, pretrained, torch_lanes
from cggr.race.decoder import EMBEDDING, HEAD, DecoderShape, check_weights, initial_weights
from cggr.race.jax_decoder import huggingface_name, load_decoder
from cggr.race.settings import LANES, RaceError
from cggr.race.tokens import Batch

CPU = jax.devices("cpu")[0]
MINE = {"split": "sequence", "selection": "topk", "ratio": 0.75, "batch_size": 12}
FINE_TUNING = shlex.split("--model pretrained --batch-size 4 --sequence-length 16")
SHAPES = {
    "as raced": DecoderShape(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=192,
        layers=3,
        heads=2,
        kv_heads=2,
        head_size=32,
        positions=64,
    ),
    "shared keys": DecoderShape(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        layers=2,
        heads=6,
        kv_heads=2,
        head_size=16,  # 6 x 16 is not the hidden size
        positions=64,
        rope_theta=5e5,
        norm_epsilon=1e-5,
    ),
    "untied": DecoderShape(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        layers=1,
        heads=4,
        kv_heads=1,
        head_size=8,
        positions=64,
        tied=False,
    ),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A text, and a token cache of its own."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_book(tmp_path / "book")


def llama(shape, weights):
    model = transformers.LlamaForCausalLM(torch_lanes.llama_config(shape, end_of_text=0))
    state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    model.load_state_dict(state | ({HEAD: state[EMBEDDING]} if shape.tied else {}))
    return model


def batch_of(shape, length=24):
    return np.random.default_rng(1).integers(shape.vocab_size, size=(4, length))


@nnx.jit
def logits(decoder, ids, positions=None):
    return decoder(ids, positions=positions)


def by_name(state):
    """Parameters of a decoder, as Hugging Face has them."""
    return {
        huggingface_name(path): np.asarray(value[...]).T
        if path[-1] == "kernel"
        else np.asarray(value[...])
        for path, value in nnx.to_flat_state(state)
    }


def batches_of(settings, corpus, name="dense"):
    rows, length = settings.lane_batch_size(name), settings.sequence_length

    def batch(step):
        starts = np.random.default_rng(step).integers(len(corpus.training) - length, size=(rows, 1))
        ids = corpus.training[starts + np.arange(length)].astype(np.int64)
        return Batch(ids, np.where(np.arange(length) < settings.prompt_tokens, -100, ids))

    return batch


def lanes_of(name, *, seed=0, **options):
    """A lane of each backend, and batches for them."""
    settings, corpus = tiny(**options)
    batch = batches_of(settings, corpus, name)
    return (
        torch_lanes.make_lanes(settings, corpus, torch.device("cpu"))(name, seed),
        jax_lanes.make_lanes(settings, corpus, CPU)(name, seed),
        batch,
    )


# Logits of this size, 5 at most, carry a rounding error of 1e-6 from each framework.
@pytest.mark.parametrize("placed", [False, True], ids=["in a row", "anywhere"])
def test_the_decoder_computes_what_llama_does(shape, placed):
    weights, ids = initial_weights(shape, seed=3), batch_of(shape)
    positions, arguments = None, {}
    if placed:
        steps = np.random.default_rng(2).integers(1, 3, size=ids.shape)
        positions = steps.cumsum(axis=1)
        # transformers takes gaps between positions for the start of another text, without a mask.
        arguments = {
            "position_ids": torch.from_numpy(positions),
            "attention_mask": torch.ones(ids.shape, dtype=torch.int64),
        }
    with torch.no_grad():
        wanted = llama(shape, weights)(input_ids=torch.from_numpy(ids), **arguments).logits.numpy()
    decoder = load_decoder(shape, weights, CPU)
    found = logits(decoder, ids, positions)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    if placed:
        assert not np.allclose(logits(decoder, ids), wanted, atol=1e-2)


def test_the_decoder_has_llamas_gradients(shape):
    weights, ids = initial_weights(shape, seed=4), batch_of(shape)
    model = llama(shape, weights)
    tensor = torch.from_numpy(ids)
    model(input_ids=tensor, labels=tensor).loss.backward()
    wanted = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    gradient = nnx.jit(nnx.grad(jax_lanes._loss))(load_decoder(shape, weights, CPU), ids, ids)
    found = by_name(gradient)
    assert found.keys() == wanted.keys() == shape.parameters().keys()
    for name in wanted:
        error = abs(found[name] - wanted[name]).max()
        assert error <= 1e-4 * abs(wanted[name]).max(), name


def test_the_first_weights_are_drawn_to_measure():
    shape = SHAPES["untied"]
    weights = initial_weights(shape, seed=0)
    assert {name: weight.shape for name, weight in weights.items()} == shape.parameters()
    for name, weight in weights.items():
        assert weight.dtype == np.float32
        if "norm" in name:
            assert (weight == 1).all()
        else:  # five standard errors
            deviation = shape.hidden_size**-0.5
            assert weight.std() == pytest.approx(deviation, rel=5 * (2 * weight.size) ** -0.5)
            assert abs(weight.mean()) < 5 * deviation * weight.size**-0.5
    again, other = initial_weights(shape, seed=0), initial_weights(shape, seed=1)
    assert np.array_equal(weights[EMBEDDING], again[EMBEDDING])
    assert not np.array_equal(weights[EMBEDDING], other[EMBEDDING])
    assert shape.size == sum(weight.size for weight in weights.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("model.norm.weight"),
            "the weights lack model.norm.weight",
        ),
        (
            lambda weights: [weights.pop(name) for name in list(weights) if "self_attn" in name],
            "the weights lack model.layers.0.self_attn.k_proj.weight and 3 more",
        ),
        (
            lambda weights: weights.update(extra=weights["model.norm.weight"]),
            "the weights hold extra, which no Llama has",
        ),
        (
            lambda weights: weights.update({HEAD: weights[HEAD].T}),
            "lm_head.weight must have the shape (101, 32), got (32, 101)",
        ),
    ],
)
def test_weights_of_something_else_are_refused(change, message):
    shape = SHAPES["untied"]
    weights = initial_weights(shape, seed=0)
    check_weights(shape, weights)
    change(weights)
    with pytest.raises(ValueError, match="weight") as error:
        load_decoder(shape, weights, CPU)
    assert str(error.value) == message


def test_both_backends_make_the_same_step():
    torch_lane, jax_lane, batch = lanes_of("dense")
    before = by_name(jax_lane.parameters)
    for lane in (torch_lane, jax_lane):
        lane.train_step(batch(0), 1e-3)
    after = by_name(jax_lane.parameters)
    averages = by_name(jax_lane.moments[0].mu)  # a tenth of the gradients
    for name, parameter in torch_lane.model.named_parameters():
        error = abs(after[name] - parameter.detach().numpy())
        # The first step of Adam is g / (|g| + 1e-8). Where g is small it magnifies rounding errors,
        # to at most a hundredth of the step here; elsewhere those of the weights are left.
        clear = abs(averages[name]) > 1e-7
        assert clear.mean() > 0.99, name
        assert error[clear].max() < 2e-7, name
        assert error.max() < 1e-5, name
        assert abs(after[name] - before[name]).max() > 9e-4, name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {}),
        ("random", {}),
        ("cggr", {"selection": "importance"}),
        ("cggr", {"selection": "topk", "scoring": "entropy", "router_layers": 2}),
        ("cggr", {"selection": "stratified", "scoring": "loss", "ratio": 0.5}),
        ("mine", {"lanes": ("mine",), "tables": {"mine": MINE}}),
        ("mine", {"lanes": ("mine",), "tables": {"mine": MINE | {"split": "backward"}}}),
    ],
)
def test_both_backends_race_alike(name, options):
    torch_lane, jax_lane, batch = lanes_of(name, seed=3, **options)
    start = torch_lane.evaluate()
    for step in range(5):
        for lane in (torch_lane, jax_lane):
            lane.train_step(batch(step), 1e-2)
        assert jax_lane.evaluate() == pytest.approx(torch_lane.evaluate(), abs=1e-4)
        assert jax_lane.tokens_trained() == torch_lane.tokens_trained()
    assert jax_lane.evaluate() < start - 0.1


def test_the_test_above_can_tell_selections_apart():
    settings, corpus = tiny()
    model = load_decoder(*jax_lanes.build_model(settings, corpus, seed=0), CPU)
    losses = []
    for seed in (3, 4):
        way = settings.lane("random")
        lane = jax_lanes.JaxLane(way, model, settings, corpus, seed, CPU)
        lane.train_step(batches_of(settings, corpus)(0), 1e-2)
        losses.append(lane.evaluate())
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_routed_lane_counts_its_steps():
    _, lane, batch = lanes_of("cggr")
    for step in range(3):
        lane.train_step(batch(step), 1e-2)
    assert lane.module.get_metrics()["step"] == 2  # of the last forward
    assert int(lane.module.step_count[...]) == 3


def test_with_ratio_one_every_lane_trains_like_dense():
    losses = []
    for name in LANES:
        _, lane, batch = lanes_of(name, ratio=1.0)
        for step in range(3):
            lane.train_step(batch(step), 1e-2)
        losses.append(lane.evaluate())
    assert losses[1:] == pytest.approx([losses[0]] * 4, rel=1e-4)


def test_lanes_of_one_seed_share_their_start_and_nothing_else():
    settings, corpus = tiny()
    make = jax_lanes.make_lanes(settings, corpus, CPU)
    first, second = make("dense", 0), make("cggr", 0)
    start = first.evaluate()
    assert second.evaluate() == start
    first.train_step(batches_of(settings, corpus)(0), 1e-2)
    assert first.evaluate() < start
    assert second.evaluate() == start
    assert make("random", 0).evaluate() == start
    assert make("random", 1).evaluate() != start


def test_the_held_out_loss_predicts_every_token_once():
    _, lane, _ = lanes_of("dense")
    stream = lane.corpus.heldout.astype(np.int64)
    total = 0.0
    for start in range(0, 99, 16):  # the last window is shorter
        window = stream[start : min(start + 17, 100)]
        found = torch.from_numpy(np.array(logits(lane.module, window[None, :-1])[0]))
        total += F.cross_entropy(found, torch.from_numpy(window[1:]), reduction="sum").item()
    assert lane.evaluate() == pytest.approx(total / 99, rel=1e-5)


@pytest.mark.parametrize(("name", "n_trained"), [("dense", 8 * 4), ("cggr", 8)])
def test_prompts_are_not_learned(name, n_trained):
    ours, theirs, batch = lanes_of(name, prompt=0.75)
    plain, _, _ = lanes_of(name)
    stream = ours.corpus.heldout.astype(np.int64)
    total = 0.0
    for start in range(0, 88, 5):  # 11 tokens of context, then as many as are predicted
        window = stream[start : min(start + 17, 100)]
        found = torch.from_numpy(np.array(logits(_decoder_of(theirs), window[None, :-1])[0]))
        target = torch.from_numpy(window[1:])
        total += F.cross_entropy(found[11:], target[11:], reduction="sum").item()
    assert theirs.evaluate() == pytest.approx(total / 88, rel=1e-5)
    for step in range(3):
        for lane in (ours, theirs):
            lane.train_step(batch(step), 1e-2)
        plain.train_step(batch(step)._replace(labels=batch(step).ids), 1e-2)
    assert ours.tokens_trained() == theirs.tokens_trained() == 3 * n_trained
    assert ours.evaluate() == pytest.approx(theirs.evaluate(), rel=1e-4)
    assert ours.evaluate() != pytest.approx(plain.evaluate(), rel=1e-4)


def _decoder_of(lane):
    return getattr(lane.module, "model", lane.module)


def test_a_step_waits_for_the_one_before():
    _, lane, batch = lanes_of("dense")
    waited = []
    lane._loss = SimpleNamespace(block_until_ready=lambda: waited.append(True))
    lane.train_step(batch(0), 1e-3)
    assert waited == [True]
    lane.synchronize()


@pytest.mark.parametrize("name", ["dense", "cggr"])
def test_nothing_is_multiplied_in_less_than_float32(name):
    _, lane, batch = lanes_of(name)
    state, ids = (lane.parameters, lane.moments, lane.counters), batch(0).ids
    with jax.default_matmul_precision("default"):
        program = jax_lanes._train_step.lower(lane._definition, *state, ids, ids, 1e-3).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 30
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_memory_is_what_the_compiled_step_needs():
    _, lane, _ = lanes_of("dense")
    assert lane.peak_memory() is None  # the CPU's memory is not the lane's alone
    lane.device = SimpleNamespace(platform="gpu")
    size = 4 * sum(value.size for value in jax.tree.leaves(lane.parameters))
    temporary = lane._step.memory_analysis().temp_size_in_bytes
    assert temporary > 8 * 16 * 300 * 4  # logits
    # Weights and two moments, which a step overwrites; next to them the batch and the loss.
    assert 3 * size + temporary < lane.peak_memory() < 3.05 * size + temporary


@pytest.fixture
def programs():
    """Collects the names of the functions that JAX compiles for the rest of the test."""
    found = []

    def listen(event, duration, **attributes):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(attributes.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_while_the_clock_runs(programs, monkeypatch):
    settings, corpus = tiny(batch_size=6)  # a shape that no other test has compiled
    turns = []

    def begin(lane):
        turns.append((lane.name, len(programs)))

    def end(lane):
        name, before = turns[-1]
        turns[-1] = (name, len(programs) - before)

    monkeypatch.setattr(jax_lanes.JaxLane, "begin_turn", begin)
    monkeypatch.setattr(jax_lanes.JaxLane, "end_turn", end)
    engine.run_race(
        settings,
        make_lane=jax_lanes.make_lanes(settings, corpus, CPU),
        make_batches=lambda seed, lane: batches_of(settings, corpus),
    )
    assert turns == [("dense", 0), ("random", 0), ("cggr", 0)]
    # Three lanes that were thrown away and three that raced: three programs.
    assert sum("_train_step" in str(name) for name in programs) == 3


def test_a_race_from_the_command_line(book, tmp_path):
    result = race(*races.SMALL, "--budget", "6steps", "--seeds", "2", "--backend", "jax")
    assert result.exit_code == 0, result.output
    found = read(tmp_path)
    assert found["complete"] is True
    assert found["settings"]["backend"] == "jax"
    assert found["versions"]["jax"] == jax.__version__
    assert set(found["versions"]) == {
        *("python", "cggr", "jax", "jaxlib", "flax", "optax"),
        "cuda",
    }
    assert set(found["machine"]) == {"system", "cpu", "cores", "threads", "device", "gpu"}
    assert (found["machine"]["device"], found["machine"]["gpu"]) == ("cpu", None)
    assert " parameters with jax, batch 8 x 32, " in result.stdout

    runs = {(run["lane"], run["seed"]): run for run in found["runs"]}
    assert len(runs) == 6
    for (lane, _), run in runs.items():
        curve = run["curve"]
        assert [point["steps"] for point in curve] == [0, 1, 2, 3, 4, 5, 6]
        kept = 31 if lane == "dense" else 8  # of each of 8 sequences: ceil(31 / 4)
        assert [point["tokens_trained"] for point in curve] == [8 * kept * i for i in range(7)]
        assert curve[-1]["loss"] < curve[0]["loss"] - 0.3
        assert run["peak_memory"] is None
    assert runs["dense", 0]["curve"][0]["loss"] != runs["dense", 1]["curve"][0]["loss"]

    assert (
        race(*races.SMALL, "--budget", "6steps", "--seeds", "2", "--name", "torch").exit_code == 0
    )
    theirs = json.loads((tmp_path / "runs" / "torch" / "results.json").read_text())
    for run in theirs["runs"]:
        ours = [point["loss"] for point in runs[run["lane"], run["seed"]]["curve"]]
        assert ours == pytest.approx([point["loss"] for point in run["curve"]], abs=2e-4)


def save(folder, *, dtype=torch.float32, shard="5GB", shape="shared keys", **options):
    """A model as save_pretrained writes it, with its tokenizer."""
    shape = SHAPES[shape]
    config = torch_lanes.llama_config(shape, end_of_text=0)
    config.update({"vocab_size": 300, "max_position_embeddings": 32} | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return model.float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shape": "untied"},
        {"shard": "20KB"},
        {"dtype": torch.bfloat16},
    ],
    ids=["tied", "untied", "in parts", "bfloat16"],
)
def test_a_saved_model_is_loaded(tmp_path, options):
    model = save(tmp_path, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in options)
    decoder = load_decoder(*pretrained.load_llama(tmp_path), CPU)
    ids = np.random.default_rng(0).integers(300, size=(2, 16))
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits(decoder, ids), wanted, rtol=1e-5, atol=1e-5)


def rewrite(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


def test_a_model_of_an_older_transformers_is_loaded(tmp_path):
    save(tmp_path)
    shape, _ = pretrained.load_llama(tmp_path)
    assert shape.rope_theta == 5e5
    rewrite(tmp_path, rope_parameters="gone", rope_theta=5e5, rope_scaling=None, head_dim=16)
    assert pretrained.load_llama(tmp_path)[0] == shape


def test_a_local_model_is_fine_tuned(book, tmp_path):
    save(tmp_path / "pretrained")
    losses = {}
    for backend in ("jax", "torch"):
        result = race(
            *FINE_TUNING,
            *("--budget", "2steps", "--learning-rate", "1e-2", "--lanes", "dense,cggr"),
            *("--device", "cpu", "--backend", backend, "--name", backend),
        )
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "runs" / backend / "results.json").read_text())
        losses[backend] = [[point["loss"] for point in run["curve"]] for run in found["runs"]]
    np.testing.assert_allclose(losses["jax"], losses["torch"], rtol=1e-5)
    assert losses["jax"][0][-1] < losses["jax"][0][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "qwen3"},
            (
                "--backend jax supports Llama models with model_type 'llama', and this one has "
                "'qwen3'; --backend torch loads any model"
            ),
        ),
        (
            {"attention_bias": True},
            (
                "--backend jax supports Llama models with attention_bias False, and this one has "
                "True; --backend torch loads any model"
            ),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}},
            (
                "--backend jax supports Llama models with rope_type 'default', and this one has "
                "'llama3'; --backend torch loads any model"
            ),
        ),
        (
            {"rope_parameters": "gone", "rope_scaling": {"type": "linear", "factor": 2.0}},
            (
                "--backend jax supports Llama models with rope_type 'default', and this one has "
                "'linear'; --backend torch loads any model"
            ),
        ),
        (
            {"hidden_act": "gelu"},
            (
                "--backend jax supports Llama models with hidden_act 'silu', and this one has "
                "'gelu'; --backend torch loads any model"
            ),
        ),
        (
            {"rope_parameters": [1]},
            "rope_parameters in config.json must be an object, got [1]",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}},
            "rope_theta in config.json must be a positive number, got 'big'",
        ),
        (
            {"rms_norm_eps": -1},
            "rms_norm_eps in config.json must be a positive number, got -1",
        ),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2},
            "num_key_value_heads in config.json must divide num_attention_heads 3, got 2",
        ),
        (
            {"quantization_config": {"bits": 4}},
            (
                "--backend jax supports Llama models with quantization_config None, and this one "
                "has {'bits': 4}; --backend torch loads any model"
            ),
        ),
        (
            {"hidden_size": "gone"},
            "hidden_size in config.json must be a positive integer, got None",
        ),
        (
            {"num_hidden_layers": 3},
            "cannot be loaded: the weights lack model.layers.2.input_layernorm.weight and 8 more",
        ),
        (
            {"intermediate_size": 81},
            (
                "cannot be loaded: model.layers.0.mlp.gate_proj.weight must have the shape "
                "(81, 48), got (80, 48)"
            ),
        ),
        (
            {"max_position_embeddings": 15},
            "--sequence-length 16 is more than its 15 positions",
        ),
    ],
)
def test_a_model_that_cannot_race(book, tmp_path, changes, message):
    save(tmp_path / "pretrained")
    rewrite(tmp_path / "pretrained", **changes)
    result = race(*FINE_TUNING, "--backend", "jax")
    assert result.stderr == f"cggr: --model pretrained: {message}\n"
    assert result.exit_code == 2


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"]
)
def test_a_damaged_model(book, tmp_path, name):
    save(tmp_path / "pretrained")
    (tmp_path / "pretrained" / name).write_text("{")
    result = race(*FINE_TUNING, "--backend", "jax")
    assert result.stderr.startswith("cggr: --model pretrained: ")
    assert result.stderr.count("\n") == 1
    assert result.exit_code == 2


def test_a_model_without_weights(book, tmp_path):
    save(tmp_path / "pretrained")
    (tmp_path / "pretrained" / "model.safetensors").unlink()
    result = race(*FINE_TUNING, "--backend", "jax")
    assert result.stderr == (
        "cggr: --model pretrained: cannot be loaded: No such file or directory: "
        "pretrained/model.safetensors\n"
    )


def test_a_device_is_found_or_named():
    assert jax_lanes.find_device("cpu").platform == "cpu"
    assert jax_lanes.find_device("auto") == jax.devices()[0]
    with pytest.raises(RaceError) as error:
        jax_lanes.find_device("mps")
    assert str(error.value) == "--device mps: JAX has no such device; give auto, cpu or cuda"
    if jax.default_backend() == "cpu":
        with pytest.raises(RaceError, match=r"^--device cuda: JAX finds none here: [^\n]+$"):
            jax_lanes.find_device("cuda")


def test_jax_leaves_memory_to_others_unless_told_otherwise(monkeypatch):
    for told, found in ((None, "false"), ("true", "true")):
        monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
        if told is not None:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", told)
        jax_lanes.find_device("cpu")
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == found


def python(code, tmp_path):
    """Runs code in a fresh interpreter."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("XLA_FLAGS", None)  # the suite asks JAX for more CPUs than one
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(cggr.__file__).parents[1],
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("backend", "used", "unused"),
    [
        ("jax", ["jax", "flax"], ["torch", "transformers"]),
        ("torch", ["torch", "transformers"], ["jax", "flax", "optax"]),
    ],
)
def test_a_race_imports_its_own_framework_alone(tmp_path, backend, used, unused):
    write_book(tmp_path / "book")
    arguments = [
        *("race", "--text", str(tmp_path / "book"), "--output", str(tmp_path / "runs")),
        *("--name", "test", "--backend", backend, "--budget", "1step", *races.SMALL),
        *("--threads", "1"),
    ]
    code = (
        "import os, sys\n"
        "from click.testing import CliRunner\n"
        "from cggr.cli import main\n"
        f"result = CliRunner().invoke(main, {arguments!r})\n"
        "assert result.exit_code == 0, result.output\n"
        f"print([name for name in {[*used, *unused]!r} if name in sys.modules])\n"
        "tasks = [open(f'/proc/self/task/{task}/comm').read().strip()"
        " for task in os.listdir('/proc/self/task')] if os.path.isdir('/proc/self/task') else []\n"
        "print(tasks.count('tf_XLAEigen'))\n"
    )
    out, error = python(code, tmp_path)
    assert error == ""
    imported, workers = out.splitlines()
    assert imported == str(used)
    assert read(tmp_path)["machine"]["threads"] == 1
    if backend == "jax" and sys.platform == "linux":
        assert workers == "1"


@pytest.mark.parametrize(
    ("backend", "package", "extra"),
    [("jax", "optax", "race-jax"), ("torch", "transformers", "race")],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, backend, package, extra):
    code = (
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"
        "from cggr.cli import main\n"
        f"main(['race', '--backend', {backend!r}])\n"
    )
    assert python(code, tmp_path) == (
        "",
        f"cggr: cggr race --backend {backend} needs {package}: pip install 'cggr[{extra}]'\n",
    )
