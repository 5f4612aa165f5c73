"""The command line: what it says, on which stream, with which exit code."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import cggr
from cggr.cli import main


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(line):
    return CliRunner().invoke(main, shlex.split(line))


def check_refused(result, message):
    """One line on stderr, nothing on stdout, exit code 2."""
    assert result.stderr == f"cggr: {message}\n"
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "race --lanes dense,sparse",
            (
                "unknown lane 'sparse'; known lanes: dense, random, cggr, random-sequences, "
                "cggr-sequences"
            ),
        ),
        ("race --lanes dense,dense", "a race needs each lane once, got 'dense,dense'"),
        ("race --text nowhere", "Invalid value for '--text': Path 'nowhere' does not exist."),
        ("race --text empty.txt", "--text empty.txt: no text in it"),
        ("race --text empty", "--text empty: no text in it"),
        ("race --text binary", "--text binary: not a file of UTF-8 text"),
        (
            "race --budget 10x",
            (
                "Invalid value for '--budget': '10x' is not an amount of training: write seconds, "
                "minutes, hours or steps, as in 60s, 2m, 1h or 500steps"
            ),
        ),
        (
            "race --budget 0s",
            (
                "Invalid value for '--budget': '0s' ends before the first training step: give more "
                "than zero"
            ),
        ),
        (
            "race --budget 0steps",
            (
                "Invalid value for '--budget': '0steps' ends before the first training step: give "
                "more than zero"
            ),
        ),
        (
            "race --budget 10steps --eval-every 11steps",
            (
                "--budget 10steps ends before the first evaluation: give a longer budget, or an "
                "--eval-every of at most 10steps"
            ),
        ),
        (
            "race --budget 10steps --eval-every 5s",
            "--eval-every 5s and --budget 10steps must both be time or both be steps",
        ),
        (
            "race --ratio 0",
            "Invalid value for '--ratio': 0.0 is not in the range 0<x<=1.",
        ),
        (
            "race --scoring luck",
            (
                "Invalid value for '--scoring': 'luck' is not one of 'entropy', 'margin', 'loss', "
                "'combined', 'error_norm', 'excess_loss'."
            ),
        ),
        (
            "race --selection best",
            (
                "Invalid value for '--selection': 'best' is not one of 'topk', 'stratified', "
                "'sequence_aware', 'importance', 'random'."
            ),
        ),
        (
            "race --model nowhere",
            "Invalid value for '--model': Directory 'nowhere' does not exist.",
        ),
        (
            "race --text short.txt --model empty",
            (
                "--model empty: no config.json in it; give the folder of a Hugging Face model with "
                "its tokenizer, as save_pretrained writes it"
            ),
        ),
        (
            "race --model empty --layers 3",
            "--layers shapes a new model; --model brings its own",
        ),
        (
            "race --backend numpy",
            "Invalid value for '--backend': 'numpy' is not one of 'torch', 'jax'.",
        ),
        ("race --name a/b", "Invalid value for --name: 'a/b' is not a plain name"),
        ("race --name ..", "Invalid value for --name: '..' is not a plain name"),
        ("race --name=", "Invalid value for --name: '' is not a plain name"),
        ("race --ratio nan", "--ratio must be a positive number, got nan"),
        ("race --learning-rate inf", "--learning-rate must be a positive number, got inf"),
        (
            "race --learning-rates 0.1,fast",
            (
                "Invalid value for '--learning-rates': '0.1,fast' is not a list of numbers, such "
                "as 1e-3,3e-3"
            ),
        ),
        ("race --learning-rates 0.1,-1", "--learning-rates must be a positive number, got -1.0"),
        ("race --learning-rates 0.1,0.10", "--learning-rates must differ, got (0.1, 0.1)"),
        (
            "race --learning-rates 0.1,0.2 --learning-rate 0.1",
            "give either --learning-rate or --learning-rates",
        ),
        ("race --noise 1", "Invalid value for '--noise': 1.0 is not in the range 0<=x<1."),
        ("race --noise nan", "--noise must be at least 0 and less than 1, got nan"),
        ("race --save cggr-sequences", "--save must be one of the lanes, got 'cggr-sequences'"),
        (
            "race --reference nowhere",
            "Invalid value for '--reference': Directory 'nowhere' does not exist.",
        ),
        (
            "race --scoring excess_loss",
            "lane random: scoring excess_loss needs a --reference, the folder of a model",
        ),
        (
            "race --config nowhere",
            "Invalid value for '--config': File 'nowhere' does not exist.",
        ),
        ("race --resume", "--resume needs the --name of the race to go on with"),
        (
            "race --model empty --head-size 8",
            "--head-size shapes a new model; --model brings its own",
        ),
        ("race --backend jax --compiled", "--compiled is for --backend torch"),
        ("race --backend jax --save dense", "--save is for --backend torch"),
        ("race --backend jax --reference empty", "--reference is for --backend torch"),
        ("race --speed 3", "No such option '--speed'."),
        ("rice", "No such command 'rice'."),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("A short text.")
    (tmp_path / "binary").write_bytes(b"\x00\xff")
    result = run(arguments)
    # click has worded these two in several ways and adds guesses at what was meant
    if message.startswith("No such"):
        assert result.stderr.startswith(f"cggr: {message[:15]}")
        assert result.stderr.count("\n") == 1
        assert result.exit_code == 2
    else:
        check_refused(result, message)
    assert not (tmp_path / "runs").exists()


def test_a_text_too_short_for_a_batch(tmp_path):
    (tmp_path / "short.txt").write_text("ab" * 50)
    result = run("race --text short.txt --batch-size 8 --vocab-size 257")
    check_refused(
        result,
        "the text is too short: 96 training tokens, but one batch of 8 x 64 needs 512; give "
        "more text, or a smaller --batch-size or --sequence-length",
    )


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_refused(
        run("race --device cuda"),
        "--device cuda: this machine or this build of torch has none",
    )


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "text.txt").write_text("some words of text " * 500)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "taken").write_text("")
    result = run(
        "race --text text.txt --vocab-size 257 --batch-size 2 --hidden-size 32 --name taken"
    )
    assert result.stderr == "cggr: cannot make the folder runs/taken: File exists\n"
    assert result.exit_code == 2


def test_help_and_version():
    for line in ("", "--help", "-h"):
        result = run(line)
        assert result.exit_code == 0
        assert "race" in result.stdout
        assert "info" in result.stdout
    assert run("--version").stdout.startswith("cggr, version ")
    assert "--eval-every" in run("race --help").stdout


def test_info_names_what_is_here_and_what_is_not(monkeypatch):
    import torch

    from cggr.race import machine

    real = machine.package_version
    monkeypatch.setattr(
        machine, "package_version", lambda name: "not installed" if name == "jax" else real(name)
    )
    result = run("info")
    assert result.exit_code == 0
    rows = {
        line.split()[0]: line.split(maxsplit=1)[1].strip()
        for line in result.stdout.splitlines()
        if line.strip()
    }
    assert rows["torch"] == real("torch")
    assert rows["jax"] == "not installed"
    assert f"{torch.get_num_threads()} threads" in result.stdout
    assert {"Python", "CUDA", "MPS", "triton", "transformers", "flash-attn"} <= set(rows)


def test_help_imports_no_framework():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from cggr.cli import main\n"
        "assert CliRunner().invoke(main, ['race', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'jax', 'transformers', 'matplotlib', 'tokenizers')"
        " if name in sys.modules])\n"
    )
    root = Path(cggr.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_ctrl_c_before_the_race(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cggr.race.text.read_documents", interrupt)
    result = run("race")
    assert result.exit_code == 130
    assert result.stderr.strip() == "cggr: interrupted"
