"""Races of configured lanes: read from a file, tuned, gone on with, and the models they leave."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import races
import torch
from click.testing import CliRunner
from races import race, read, write_book

from cggr.cli import main
from cggr.race import report, tokens, torch_lanes
from cggr.race.settings import Budget, RaceSettings

TINY = [argument for argument in races.SMALL if argument not in ("--learning-rate", "1e-2")]
TINY += ["--threads", "1"]
CONFIG = """
text = ["book"]
budget = "3steps"
seeds = 2
batch-size = 8
sequence_length = 32
hidden-size = 32
layers = 2
vocab-size = 300
learning-rate = 1e-2
device = "cpu"
threads = 1
name = "test"
selection = "topk"

[lanes."half, at random"]
selection = "random"
ratio = 0.5

[lanes.plain]
split = "dense"
batch-size = 4

[lanes.hard]
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A text, and a token cache of its own."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_book(tmp_path / "book")


@pytest.fixture
def steps(monkeypatch):
    """The lanes of all steps, and when to raise what instead of making one."""
    made, stop = [], {}
    step = torch_lanes.TorchLane.train_step

    def train_step(lane, batch, learning_rate):
        if len(made) == stop.get("after"):
            raise stop["error"]
        made.append(lane.name)
        step(lane, batch, learning_rate)

    monkeypatch.setattr(torch_lanes.TorchLane, "train_step", train_step)
    return SimpleNamespace(made=made, stop=stop)


def configured(text, *arguments):
    """A race by a configuration, given as text or as bytes."""
    Path("config.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return CliRunner().invoke(main, ["race", "--config", "config.toml", *arguments])


def keys(found):
    return [(run["lane"], run["seed"], run["learning_rate"]) for run in found["runs"]]


def final_losses(found):
    return dict(zip(keys(found), (run["curve"][-1]["loss"] for run in found["runs"]), strict=True))


def check_refused(result, message):
    assert result.stderr == f"cggr: {message}\n"
    assert result.exit_code == 2


def test_a_race_by_a_configuration(book, tmp_path):
    result = configured(CONFIG)
    assert result.exit_code == 0, result.output
    found = read(tmp_path)
    lanes = ["half, at random", "plain", "hard"]
    settings = found["settings"]
    assert settings["lanes"] == lanes
    assert settings["tables"]["plain"] == {"split": "dense", "batch-size": 4}
    assert (settings["budget"], settings["seeds"], settings["selection"]) == ("3steps", 2, "topk")
    assert (settings["batch_size"], settings["text"]) == (8, ["book"])
    assert keys(found) == [(lane, seed, 1e-2) for seed in range(2) for lane in lanes]
    for run in found["runs"]:
        last = run["curve"][-1]
        # A half and a quarter, rounded up, of 31 predictions in each of eight sequences; all in
        # each of four.
        kept = {"half, at random": 8 * 16, "plain": 4 * 31, "hard": 8 * 8}[run["lane"]]
        assert last["tokens_trained"] == 3 * kept
        assert last["tokens_seen"] == 3 * 32 * (4 if run["lane"] == "plain" else 8)
    assert "half, at random" in (tmp_path / "runs" / "test" / "table.txt").read_text()


def test_the_command_line_goes_before_a_configuration(book, tmp_path):
    result = configured(
        CONFIG,
        *["--budget", "2steps", "--seeds", "1", "--lanes", "cggr,plain", "--selection", "random"],
    )
    assert result.exit_code == 0, result.output
    settings = read(tmp_path)["settings"]
    assert (settings["budget"], settings["seeds"]) == ("2steps", 1)
    assert (settings["lanes"], settings["selection"]) == (["cggr", "plain"], "random")
    assert (settings["layers"], settings["batch_size"]) == (2, 8)


def test_a_configuration_of_options_alone(book, tmp_path):
    options = CONFIG.partition("[lanes")[0].replace('["book"]', '"book"')
    options += "lanes = 'random'\nlearning_rates = '0.01,1e-5'\n"
    options = options.replace("learning-rate = 1e-2", "save = 'random'")
    assert configured(options).exit_code == 0
    found = read(tmp_path)
    assert (found["settings"]["lanes"], found["settings"]["tables"]) == (["random"], {})
    assert keys(found) == [("random", 0, 0.01), ("random", 0, 1e-5), ("random", 1, 0.01)]
    assert (tmp_path / "runs" / "test" / "model" / "config.json").exists()


def test_flags_and_lists_of_a_configuration(book):
    read_settings = {}

    class Stop(Exception):
        pass

    def stop(settings, *_, **__):
        read_settings["found"] = settings
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cggr.race.main.race", stop)
        result = configured(
            'text = ["book", "config.toml"]\ncompiled = true\nlearning-rates = [1e-3, 3e-3]\n'
            'reference = "book"\nnoise = 0.25\neval-every = "30s"\nratio = 1\n'
        )
    assert isinstance(result.exception, Stop)
    settings = read_settings["found"]
    assert [path.name for path in settings.text] == ["book", "config.toml"]
    assert settings.compiled is True
    assert settings.learning_rates == (1e-3, 3e-3)
    assert (settings.reference.name, settings.noise, settings.ratio) == ("book", 0.25, 1.0)
    assert settings.eval_every == Budget(30, "seconds")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sedes = 3", "Invalid value for '--config': config.toml: race has no option 'sedes'"),
        (
            "[lane.mine]\nratio = 1",
            "Invalid value for '--config': config.toml: race has no option 'lane'",
        ),
        (
            "config = 'other.toml'",
            "Invalid value for '--config': config.toml: race has no option 'config'",
        ),
        ("budget =", "Invalid value for '--config': config.toml: Invalid value (at "),
        (b"name = '\xff'", "Invalid value for '--config': config.toml: 'utf-8' codec can't decode"),
        (
            "lanes = 3",
            "Invalid value for '--config': config.toml: lanes must be tables [lanes.NAME]",
        ),
        ("lanes = 'dense,sparse'", "unknown lane 'sparse'; known lanes: dense, random, cggr, "),
        ("[lanes]\nmine = 3", "lane mine must be a table of options, got 3"),
        ("[lanes.mine]\nsplits = 'token'", "lane mine: unknown option 'splits'; known: batch_size"),
        (
            "[lanes.mine]\nsplit = 'all'",
            "lane mine: split must be one of dense, token, backward, ",
        ),
        ("budget = 60", "Invalid value for '--budget': '60' is not an amount of training: "),
        ("eval-every = 1.5", "Invalid value for '--eval-every': '1.5' is not an amount of "),
        (
            "[budget]\nsteps = 60",
            "Invalid value for '--config': config.toml: budget must be one value, got {'steps':",
        ),
        (
            "seeds = [1, 2]",
            "Invalid value for '--config': config.toml: seeds must be one value, got [1, 2]",
        ),
        ("seeds = 2.5", "Invalid value for '--seeds': '2.5' is not a valid integer"),
        ("seeds = true", "Invalid value for '--seeds': 'True' is not a valid integer"),
        (
            "backend = 'jax'\n[lanes.slow]\nwarmup-steps = 3",
            "lane slow: warmup_steps is for --backend torch",
        ),
        ("seeds = 0", "Invalid value for '--seeds': 0 is not in the range x>=1."),
        ("seeds = 2020-01-01", "Invalid value for '--seeds': '2020-01-01' is not a valid integer"),
        ("compiled = 'maybe'", "Invalid value for '--compiled': 'maybe' is not a valid boolean"),
        ("learning-rates = [0.1, 'a']", "Invalid value for '--learning-rates': ['0.1', 'a'] is "),
        ("learning-rates = [0.1, 0.1]", "--learning-rates must differ, got (0.1, 0.1)"),
        ("model = 'nowhere'", "Invalid value for '--model': Directory 'nowhere' does not exist."),
        ("model = 3", "Invalid value for '--model': Directory '3' does not exist."),
        ("text = ['nowhere']", "Invalid value for '--text': Path 'nowhere' does not exist."),
        ("reference = 'nowhere'", "Invalid value for '--reference': Directory 'nowhere' does not "),
        ("model = 'book'\nhidden-size = 32", "--hidden-size shapes a new model; --model brings "),
    ],
)
def test_a_configuration_that_cannot_race_is_refused_in_a_line(book, tmp_path, text, message):
    result = configured(text)
    assert result.stderr.startswith(f"cggr: {message}")
    assert result.stderr.count("\n") == 1
    assert result.exit_code == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.toml", "File 'nowhere.toml' does not exist."),
        ("book", "File 'book' is a directory."),
    ],
)
def test_a_configuration_that_is_no_file(book, path, message):
    check_refused(race("--config", path), f"Invalid value for '--config': {message}")


def test_every_lane_has_its_best_learning_rate(book, tmp_path):
    arguments = "--budget 3steps --seeds 2 --lanes dense,cggr --learning-rates 1e-7,1e-2,1e-6"
    result = race(*TINY, *arguments.split())
    assert result.exit_code == 0, result.output
    found = read(tmp_path)
    assert found["complete"] is True
    rates = [(0, 1e-7), (0, 1e-2), (0, 1e-6), (1, 1e-2)]
    assert keys(found) == [(lane, *rate) for lane in ("dense", "cggr") for rate in rates]
    losses = final_losses(found)
    best = np.mean([losses["cggr", 0, 1e-2], losses["cggr", 1, 1e-2]])
    assert "(3 steps per lane, 2 seeds): " in result.stdout
    assert f"cggr {best:.3f}" in result.stdout


def test_a_crash_leaves_what_had_ended_and_the_race_goes_on(book, tmp_path, steps):
    arguments = [*TINY, "--budget", "3steps", "--learning-rates", "1e-2", "--lanes", "dense,random"]
    steps.stop.update(after=6, error=RuntimeError("the device is lost"))  # in the second lane
    result = race(*arguments)
    assert isinstance(result.exception, RuntimeError)
    found = read(tmp_path)
    assert found["complete"] is False
    assert [run["complete"] for run in found["runs"]] == [True]
    assert [path.name for path in (tmp_path / "runs" / "test").iterdir()] == ["results.json"]

    steps.stop.clear()
    steps.made.clear()
    assert race(*arguments, "--resume").exit_code == 0
    again = read(tmp_path)
    assert again["complete"] is True
    assert again["runs"][0] == found["runs"][0]
    assert keys(again) == [("dense", 0, 1e-2), ("random", 0, 1e-2)]
    assert steps.made == ["random"] * 4  # a warm-up and three steps
    assert (tmp_path / "runs" / "test" / "report.png").exists()


def test_what_ctrl_c_cut_off_starts_anew(book, tmp_path, steps):
    arguments = [*TINY, "--budget", "3steps", "--lanes", "dense,random"]
    steps.stop.update(after=6, error=KeyboardInterrupt)  # two warm-ups and four steps
    assert race(*arguments).exit_code == 130
    assert [len(run["curve"]) for run in read(tmp_path)["runs"]] == [3, 3]
    steps.stop.clear()
    assert race(*arguments, "--resume").exit_code == 0
    found = read(tmp_path)
    assert found["complete"] is True
    assert [len(run["curve"]) for run in found["runs"]] == [4, 4]


def test_results_are_on_disk_after_every_run(book, monkeypatch):
    written = []
    write = report.write_results

    def spy(file, found):
        write(file, found)
        written.append(json.loads(file.read_text()))

    monkeypatch.setattr(report, "write_results", spy)
    arguments = "--budget 2steps --seeds 2 --lanes dense,cggr"
    assert race(*TINY, *arguments.split()).exit_code == 0
    assert [sum(run["complete"] for run in found["runs"]) for found in written] == [1, 2, 3, 4, 4]
    assert [found["complete"] for found in written] == [False] * 3 + [True] * 2
    # The other lane of a seed is in them as far as it is.
    assert [len(run["curve"]) for run in written[0]["runs"]] == [3, 2]


def test_a_race_goes_on_with_more_lanes_and_seeds(book, tmp_path, steps):
    arguments = [*TINY, "--budget", "2steps"]
    assert race(*arguments, "--lanes", "dense,cggr").exit_code == 0
    before = read(tmp_path)["runs"]
    assert race(*arguments, "--lanes", "dense,cggr").exit_code == 2  # it is there
    steps.made.clear()
    result = race(*arguments, "--resume", "--lanes", "dense,random,cggr", "--seeds", "2")
    assert result.exit_code == 0, result.output
    found = read(tmp_path)
    assert found["complete"] is True
    runs = {(run["lane"], run["seed"]): run for run in found["runs"]}
    assert len(runs) == len(found["runs"]) == 6
    assert [runs["dense", 0], runs["cggr", 0]] == before
    assert {lane: steps.made.count(lane) for lane in ("dense", "random", "cggr")} == {
        "dense": 3,
        "cggr": 3,  # of the second seed: a warm-up and two steps
        "random": 6,
    }
    assert ", 2 seeds)" in result.stdout

    steps.made.clear()
    assert race(*arguments, "--resume", "--seeds", "2").exit_code == 0
    assert steps.made == []
    assert read(tmp_path)["runs"] == found["runs"]


def test_resume_begins_what_was_not_begun(book, tmp_path):
    assert race(*TINY, "--budget", "1step", "--lanes", "dense", "--resume").exit_code == 0
    assert read(tmp_path)["complete"] is True


@pytest.fixture
def raced(book):
    """The race of a table and a built-in lane, which is gone on with."""

    def again(*arguments, table="ratio = 0.5", lanes="mine,cggr"):
        text = f"[lanes.mine]\n{table}\n[lanes.other]\n"
        arguments = ("--lanes", lanes, "--name", "test", "--text", "book", *arguments)
        return configured(text, *TINY, "--budget", "1step", *arguments)

    assert again().exit_code == 0
    return again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch-size 4", "runs/test/results.json is of a race with batch_size 8, not 4"),
        ("--budget 2steps", "runs/test/results.json is of a race with budget '1step"),
        ("--learning-rate 1", "runs/test/results.json is of a race with learning_rate 0.006, not"),
        ("--ratio 0.3", "runs/test/results.json is of a race with ratio 0.25, not 0.3"),
        ("--head-size 16", "runs/test/results.json is of a race with head_size 32, not 16"),
        ("--kv-heads 1", "runs/test/results.json is of a race with kv_heads None, not 1"),
        ("--noise 0.5", "runs/test/results.json is of a race with noise 0.0, not 0.5"),
        ("--text config.toml", "runs/test/results.json is of a race with text '"),
        ("--save mine", "lane mine has raced without --save mine"),
        ("--lanes cggr", "lane mine has raced, whose results would be lost"),
    ],
)
def test_resume_refuses_another_race(raced, tmp_path, arguments, message):
    before = (tmp_path / "runs" / "test" / "results.json").read_bytes()
    result = raced("--resume", *arguments.split())
    assert result.stderr.startswith(f"cggr: --resume: {message}")
    assert result.stderr.count("\n") == 1
    assert result.exit_code == 2
    assert (tmp_path / "runs" / "test" / "results.json").read_bytes() == before


def test_resume_takes_results_from_before_an_option_was_there(raced, tmp_path):
    file = tmp_path / "runs" / "test" / "results.json"
    found = json.loads(file.read_text())
    assert found["settings"].pop("prompt") == 0.0
    assert found["settings"].pop("learning_rates") == []
    assert found.pop("models_sha256") == {}
    file.write_text(json.dumps(found))
    assert raced("--resume").exit_code == 0
    assert raced("--resume", "--prompt", "0.5").exit_code == 2
    file.write_text(json.dumps(found))
    result = raced("--resume", "--prompt", "0.5")
    assert "is of a race with prompt 0.0, not 0.5" in result.stderr


def test_a_prompt_leaves_something_of_the_held_out_text(book):
    shape = ("--sequence-length", "4000", "--prompt", "0.99", "--batch-size", "1")
    result = race(*TINY, *shape, "--budget", "1step", "--lanes", "dense")
    assert result.exit_code == 2
    assert re.fullmatch(
        r"cggr: the text is too short: \d+ held-out tokens, of which none follows a prompt of "
        r"3960; give more text, or a smaller --prompt or --sequence-length\n",
        result.stderr,
    )


def test_resume_refuses_another_text_of_the_same_name(raced, book):
    assert raced("--resume").exit_code == 0
    with (book / "page00.txt").open("a") as file:
        file.write("One more line.\n")
    result = raced("--resume")
    assert result.stderr.startswith("cggr: --resume: runs/test/results.json is of a race with text")
    assert result.exit_code == 2


def test_resume_refuses_another_lane_of_the_same_name(raced):
    check_refused(
        raced("--resume", table="ratio = 0.25"),
        "--resume: lane mine was {'ratio': 0.5}, not {'ratio': 0.25}",
    )
    check_refused(
        raced("--resume", table="[lanes.cggr]\nsplit = 'dense'\n", lanes="cggr"),
        "--resume: lane cggr was no table, not {'split': 'dense'}",
    )
    # The table of a lane that has not raced may be another.
    assert (
        raced("--resume", table="ratio = 0.5\n[lanes.new]\n", lanes="mine,cggr,new").exit_code == 0
    )


def test_resume_needs_a_name_and_a_whole_file_of_its_schema(book, tmp_path):
    check_refused(
        CliRunner().invoke(main, ["race", "--resume"]),
        "--resume needs the --name of the race to go on with",
    )
    (tmp_path / "runs" / "test").mkdir(parents=True)
    file = tmp_path / "runs" / "test" / "results.json"
    file.write_text("{")
    result = race(*TINY, "--resume")
    assert result.stderr.startswith("cggr: --resume: runs/test/results.json is damaged: ")
    assert result.exit_code == 2
    file.write_text('{"schema": 1}')
    check_refused(
        race(*TINY, "--resume"), "--resume: runs/test/results.json holds no results of schema 2"
    )


def test_a_loss_that_was_not_finite_is_none_after_resume(raced, tmp_path):
    file = tmp_path / "runs" / "test" / "results.json"
    found = read(tmp_path)
    found["runs"][0]["curve"][-1] |= {"loss": None, "bits_per_byte": None}
    file.write_text(json.dumps(found))
    assert raced("--resume").exit_code == 0
    assert read(tmp_path)["runs"] == found["runs"]
    assert "mine nan" in (tmp_path / "runs" / "test" / "table.txt").read_text()


def final_loss(folder, corpus, **options):
    """Of a saved model, on the held-out text."""
    settings = RaceSettings(budget=Budget(1, "steps"), lanes=("dense",), **options)
    model = torch_lanes.load_folder(folder, torch.float32)
    return torch_lanes.TorchLane(settings.lane("dense"), model, settings, corpus, 0).evaluate()


def test_a_saved_model_is_the_best_of_its_lane_and_races_on(book, tmp_path, monkeypatch):
    prepared = []
    prepare = tokens.prepare
    monkeypatch.setattr(
        tokens, "prepare", lambda *a, **k: prepared.append(prepare(*a, **k)) or prepared[-1]
    )
    tuned = [
        *TINY,
        *["--budget", "3steps", "--seeds", "2", "--lanes", "cggr,dense", "--save", "dense"],
    ]
    rates = "--learning-rates"
    assert race(*tuned, rates, "1e-6,1e-2,1e-7").exit_code == 0
    losses = final_losses(read(tmp_path))
    folder = tmp_path / "runs" / "test" / "model"

    def check():
        loss = final_loss(folder, prepared[0], sequence_length=32)
        assert loss == pytest.approx(losses["dense", 0, 1e-2], rel=1e-6)

    check()
    # What a race that goes on trains less well takes its place no more.
    assert race(*tuned, rates, "1e-6,1e-2,1e-7,1e-8", "--resume").exit_code == 0
    assert ("dense", 0, 1e-8) in keys(read(tmp_path))
    check()
    check_refused(
        race(*tuned, rates, "1e-6,1e-2,1e-8", "--resume"),
        "--resume: the learning rate 1e-07 has raced and is left out now",
    )

    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == prepared[0].tokenizer
    arguments = f"--model {folder} --batch-size 4 --sequence-length 32 --budget 1step --name more"
    result = race(*arguments.split(), "--lanes", "dense,cggr", "--device", "cpu", "--save", "cggr")
    assert result.exit_code == 0, result.output
    assert np.array_equal(prepared[-1].heldout, prepared[0].heldout)
    assert prepared[-1].end_of_text == prepared[0].end_of_text
    more = json.loads((tmp_path / "runs" / "more" / "results.json").read_text())
    start = more["runs"][0]["curve"][0]["loss"]
    assert start == pytest.approx(losses["dense", 0, 1e-2], rel=1e-6)
    saved = final_loss(tmp_path / "runs" / "more" / "model", prepared[-1], sequence_length=32)
    assert saved == pytest.approx(more["runs"][1]["curve"][-1]["loss"], rel=1e-6)


def test_noise_in_the_text_of_a_race(book, tmp_path):
    arguments = [*TINY, "--budget", "1step", "--lanes", "dense", "--noise", "0.3"]
    result = race(*arguments)
    assert result.exit_code == 0, result.output
    note = "30% of the lines to train on are random words."
    noisy = read(tmp_path)
    assert noisy["text"]["notes"] == [note]
    assert note in result.stdout
    assert noisy["settings"]["noise"] == 0.3
    assert race(*TINY, "--budget", "1step", "--lanes", "dense", "--name", "plain").exit_code == 0
    plain = json.loads((tmp_path / "runs" / "plain" / "results.json").read_text())
    assert noisy["text"]["sha256"] != plain["text"]["sha256"]
    for same in ("heldout_bytes", "heldout_files", "training_files"):
        assert noisy["text"][same] == plain["text"][same]
    assert noisy["text"]["training_tokens"] != plain["text"]["training_tokens"]


def test_a_race_against_a_reference(book, tmp_path, monkeypatch):
    arguments = [*TINY, "--budget", "2steps"]
    assert race(*arguments, "--lanes", "dense", "--save", "dense").exit_code == 0
    model = "runs/test/model"
    given = []
    forward = torch_lanes.CGGRModel.forward

    def spy(routed, *args, **inputs):
        given.append((routed.config.scoring, inputs.get("reference_nll")))
        return forward(routed, *args, **inputs)

    monkeypatch.setattr(torch_lanes.CGGRModel, "forward", spy)
    text = "[lanes.excess]\nscoring = 'excess_loss'\n[lanes.hard]\n[lanes.all]\nsplit = 'dense'\n"
    book_too = ("--text", "book", "--name", "second", "--reference", model)
    result = configured(text, *arguments, *book_too)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "runs" / "second" / "results.json").read_text())
    assert found["settings"]["reference"] == "model"
    assert {scoring for scoring, _ in given} == {"excess_loss", "combined"}
    for scoring, losses in given:
        assert (losses is not None) == (scoring == "excess_loss")
        if losses is not None:
            assert losses.shape == (8, 32)
            assert (losses > 0).float().mean() > 0.9

    check_refused(
        configured(text, *arguments, *book_too[:2]),
        "lane excess: scoring excess_loss needs a --reference, the folder of a model",
    )
    # A new model takes the reference's tokenizer, whatever would be made of another text.
    smaller = ["--vocab-size", "290", "--noise", "0.5"]
    assert configured(text, *arguments, *smaller, *book_too, "--name", "third").exit_code == 0
    third = json.loads((tmp_path / "runs" / "third" / "results.json").read_text())
    assert third["text"]["vocab_size"] == found["text"]["vocab_size"] > 290
    assert third["text"]["heldout_tokens"] == found["text"]["heldout_tokens"]
    dense = ["--lanes", "dense", "--save", "dense", "--name", "fourth"]
    assert race(*arguments, *smaller, *dense).exit_code == 0
    shaped = shlex.split("--batch-size 8 --sequence-length 32 --device cpu --budget 2steps")
    check_refused(
        configured(text, *shaped, *book_too, "--model", "runs/fourth/model", "--name", "fifth"),
        f"--reference {model}: its tokenizer is not that of --model runs/fourth/model, whose "
        "tokens its losses are to be of",
    )
    (tmp_path / model / "tokenizer.json").unlink()
    result = configured(text, *arguments, *book_too, "--name", "sixth")
    assert result.stderr.startswith(f"cggr: --reference {model}: no tokenizer.json in it; ")
    assert result.exit_code == 2
