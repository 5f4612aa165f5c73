"""What the study of benchmarks/evidence is made by: its configurations, texts and draws."""

import importlib.util
import itertools
import json
import re
import signal
import sys
import threading
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from cggr.cli import main
from cggr.race.summary import LaneSummary
from cggr.race.text import Document
from cggr.race.tokens import train_tokenizer
from cggr.torch import CGGRModel

EVIDENCE = Path(__file__).parents[1] / "benchmarks" / "evidence"
CONFIGURATIONS = sorted(EVIDENCE.glob("*.toml"))


def load(name):
    """A script of the study as a module."""
    spec = importlib.util.spec_from_file_location(name, EVIDENCE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def texts():
    yield load("texts")
    del sys.modules["texts"]


@pytest.fixture
def study():
    yield load("study")
    del sys.modules["study"]


@pytest.fixture
def sampled():
    yield load("sampled_backward")
    del sys.modules["sampled_backward"]


@pytest.fixture
def noise():
    yield load("gradient_noise")
    del sys.modules["gradient_noise"]


def test_there_are_configurations():
    assert {path.stem for path in CONFIGURATIONS} > {"scratch", "finetune", "noise", "original"}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_a_configuration_is_a_race(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = tomllib.loads(path.read_text())
    models = [options[key] for key in ("model", "reference") if key in options]
    assert all((EVIDENCE / f"{Path(model).parent.name}.toml").exists() for model in models)
    for folder in (*options["text"], *models):
        (tmp_path / folder).mkdir(parents=True)
    started = []
    monkeypatch.setattr(
        "cggr.race.main.race", lambda settings, *_, **__: started.append(settings) or True
    )
    result = CliRunner().invoke(main, ["race", "--config", str(path), "--name", "test"])
    assert result.exit_code == 0, result.output
    (settings,) = started
    # At equal time all has to be as fast as it goes, and at its best rate; not at equal steps.
    timed = settings.budget.unit == "seconds"
    assert settings.compiled or not timed
    dense = [name for name in settings.lanes if settings.lane(name).split == "dense"]
    selecting = [settings.lane(name) for name in settings.lanes if name not in dense]
    assert dense
    if settings.save is None:  # else it makes a model for the others
        assert settings.seeds == 3
        assert len(settings.learning_rates) > 1 or not timed
        # Every claim needs the control.
        controls = {(x.split, x.ratio) for x in selecting if x.selection == "random"}
        assert controls >= {(lane.split, lane.ratio) for lane in selecting}


@pytest.fixture
def tables():
    yield load("tables")
    del sys.modules["tables"]


@pytest.mark.parametrize(
    "name",
    [
        "summaries",
        "summaries_adapted",
        "completions",
        "completions-prompts",
        "memory",
        "noise",
        "noise_apart",
        "scratch",
        "original",
        "original-tokens",
        "clients_wide",
        "schedule",
    ],
)
def test_tables_of_the_documentation_are_those_of_the_results(tables, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", name])
    tables.main()
    printed = capsys.readouterr().out.partition("\n\n")[2].strip()
    documents = EVIDENCE.parents[1] / "docs"
    assert printed in (documents / "evidence.md").read_text()


def test_the_summary_in_the_readme_is_that_of_the_results(tables, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--summary"])
    tables.main()
    readme = (EVIDENCE.parents[1] / "README.md").read_text()
    shown = readme.partition("[start:evidence] -->")[2].partition("<!--")[0]
    assert shown.strip() == capsys.readouterr().out.strip()
    assert 3 <= shown.strip().count("\n") <= 11  # ten rows at most


@pytest.mark.parametrize("budget", [20, 16, 12])
def test_shorter_races_are_as_the_results_have_them(tables, budget):
    suffix = "" if budget == 20 else f"-{budget}s"
    document = (EVIDENCE.parents[1] / "docs" / "evidence.md").read_text()
    best = {
        name: {
            lane: raced.best
            for lane, raced in tables.lanes_of(tables.results_of(f"{name}{suffix}")).items()
        }
        for name in ("completions", "summaries")
    }
    lane = best["completions"]["backward completions"]
    seeds = " ".join(f"{loss:.3f}" for loss in lane.final("loss"))
    dense = f"{best['completions']['dense'].loss:.3f} " if budget == 20 else ""
    assert f"| {budget} s | {lane.loss:.3f} | {seeds} | {dense}|" in document
    lanes = [best["summaries"][f"{split} completions"].loss for split in ("backward", "token")]
    dense = f"{best['summaries']['dense'].loss:.3f} " if budget == 20 else ""
    assert f"| {budget} s | {lanes[0]:.3f} | {lanes[1]:.3f} | {dense}|" in document


BESIDE = {  # races that are compared with lanes of others
    "completions": ("completions-prompts",),
    "completions-16s": ("completions",),
    "completions-12s": ("completions",),
    "memory": ("completions", "completions-prompts"),
    "noise": ("noise-window",),
    "summaries_adapted": ("summaries",),
    "summaries-16s": ("summaries",),
    "summaries-12s": ("summaries",),
}


def test_the_table_of_every_selection_is_that_of_the_results(tables, capsys, monkeypatch):
    names = [f"selections-{ratio}" for ratio in (10, 25, 50)]
    monkeypatch.setattr(sys, "argv", ["tables.py", *names, "--beside", "token random"])
    tables.main()
    printed = capsys.readouterr().out.strip()
    assert len(printed.splitlines()) == 2 + 16
    assert printed in (EVIDENCE.parents[1] / "docs" / "evidence.md").read_text()


def test_differences_in_the_documentation_are_those_of_the_results(tables):
    documents = EVIDENCE.parents[1] / "docs"
    races = (documents / "evidence.md").read_text().partition("## What a draw is worth")[0]
    n_said = 0
    for section in races.split("\n## "):
        prose = re.sub(r"^\|.*$", "", section, flags=re.MULTILINE)  # tables have their own test
        said = re.findall(r"(\d\.\d+)\s+±\s+(\d\.\d+)", prose)
        n_said += len(said)
        # Of lanes of the section's own races, and of those that they are compared with.
        found = set()
        for name in re.findall(r"--name (\S+)", section):
            if not (tables.FOLDER / f"{name}.json").exists():
                continue  # a model that others begin with
            own, *others = (
                [raced.best for raced in tables.lanes_of(tables.results_of(race)).values()]
                for race in (name, *BESIDE.get(name, ()))
            )
            if name.startswith("selections"):  # of so many lanes some pair has any difference
                others.append([lane for lane in own if lane.lane in ("dense", "sequence random")])
                own = [lane for lane in own if lane.lane.startswith("sequence")]
            else:
                others.append(own)
            for lane, other in itertools.product(own, itertools.chain(*others)):
                if len(lane.curves) == len(other.curves) == 3:
                    mean, error = tables.difference(lane, other)
                    found |= {(f"{abs(mean):.{n}f}", f"{error:.{n}f}") for n in (2, 3)}
        assert set(said) <= found, section.partition("\n")[0]
    assert n_said > 25


def test_differences_are_of_seeds(tables, capsys, monkeypatch):
    def race(name):
        losses = {"dense": [3.0, 2.0, 1.0], "ours": [2.5, 2.0, 0.0], "one": [0.1]}
        if name == "other":
            losses = {"dense": [3.0, 2.0, 1.0], "ours": [4.0, 3.0, 2.0], "new": [2.0, 1.0, 0.0]}
        runs = [
            {
                "lane": lane,
                "seed": seed,
                "learning_rate": 0.1,
                "complete": True,
                "peak_memory": 1,
                "curve": [
                    {
                        "seconds": 2.0,
                        "steps": 100,
                        "tokens_seen": 1,
                        "tokens_trained": 1,
                        "loss": loss + (name == "short"),
                    }
                ],
            }
            for lane, seeds in losses.items()
            for seed, loss in enumerate(seeds)
        ]
        return {"runs": runs, "complete": name != "other"}

    monkeypatch.setattr(tables, "results_of", race)

    def printed(*arguments):
        monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
        tables.main()
        return capsys.readouterr().out.splitlines()

    # Of 0.5, 0 and 1: deviations of half, and half over the root of three.
    assert printed("long", "--against", "dense")[2:5] == [
        "| lane | ahead of dense by | of each seed |",
        "| --- | --- | --- |",
        "| ours | 0.500 ± 0.289 | 0.500 0.000 1.000 |",
    ]
    assert printed("short", "--against", "long:dense")[4:6] == [
        "| ours | -0.500 ± 0.289 | -0.500 -1.000 0.000 |",
        "| dense | -1.000 ± 0.000 | -1.000 -1.000 -1.000 |",
    ]
    assert printed("long", "other", "--beside", "dense") == [
        "| ahead of dense by | long | other (not complete) |",
        "| --- | --- | --- |",
        "| ours | 0.500 ± 0.289 | -1.000 ± 0.000 |",
        "| one |  |  |",
        "| new |  | 1.000 ± 0.000 |",
    ]
    for option in ("--against", "--beside"):
        with pytest.raises(SystemExit):
            printed("long", option, "nobody")
        assert f"{option}: long has no lane 'nobody', but" in capsys.readouterr().err


def test_there_are_no_differences_from_what_is_not_there(tables, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "memory", "--against", "nothing:dense"])
    with pytest.raises(SystemExit):
        tables.main()
    assert "there are no results " in capsys.readouterr().err


def test_the_summary_is_bold_where_every_seed_is_ahead(tables, monkeypatch):
    losses = {"a": [1.0, 2.0], "b": [1.1, 1.9], "c": [0.9, 1.8]}

    def best(way):
        curves = tuple((SimpleNamespace(loss=loss),) for loss in losses[way.lane])
        return LaneSummary(way.lane, curves, 3 * 2**29)

    monkeypatch.setattr(tables, "_best", best)
    a, b, c = (tables.Way("race", lane) for lane in "abc")
    assert tables._summary_row(tables.Setting("x", a, b)) == (
        "| x | 1.500 (1.00 to 2.00) | 1.500 (1.10 to 1.90) |  |"
    )
    assert tables._summary_row(tables.Setting("x", a, c, b)) == (
        "| x | 1.500 (1.00 to 2.00) | **1.350** (0.90 to 1.80) | 1.500 (1.10 to 1.90) |"
    )
    assert tables._summary_row(tables.Setting("x", c, a)).startswith("| x | **1.350** (")
    sized = tables.Way("race", "a", "in {gib:.1f} GiB")
    assert "(1.00 to 2.00) in 1.5 GiB |" in tables._summary_row(tables.Setting("x", sized, b))


def test_there_are_no_tables_of_what_is_not_there(tables, capsys, monkeypatch):
    for arguments, message in (
        (["nothing"], "there are no results "),
        ([], "name results, or --summary"),
        (["noise", "--summary"], "name results, or --summary"),
        (["--beside", "dense"], "name results, or --summary"),
        (["noise", "--beside", "dense", "--against", "dense"], "not allowed with argument"),
    ):
        monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
        with pytest.raises(SystemExit):
            tables.main()
        assert message in capsys.readouterr().err


def test_a_table_has_each_lane_at_its_best_rate(tables):
    def run(lane, seed, rate, loss, complete=True):
        point = {"seconds": 2.0, "steps": 100, "tokens_seen": 1, "tokens_trained": 1, "loss": loss}
        return {
            "lane": lane,
            "seed": seed,
            "learning_rate": rate,
            "complete": complete,
            "peak_memory": 2**30,
            "curve": [point | {"loss": 9.0, "steps": 0, "seconds": 0.0}, point],
        }

    runs = [
        run("slow", 0, 0.1, 3.0),
        run("slow", 0, 0.2, 4.0),
        run("slow", 1, 0.1, 5.0),
        run("fast", 0, 0.2, 2.0),
        run("fast", 1, 0.2, 1.0, complete=False),
        run("fast", 0, 0.4, None),  # it diverged
        run("begun", 0, 0.1, 1.0, complete=False),
        run("begun", 1, 0.1, 1.0),
    ]
    lines = tables.table(tables.lanes_of({"runs": runs}))
    assert lines[2:] == [
        "| fast | 20.0 | 100 | 1.0 | 0.2 | 2.000 | 2.000 | 0.4: nan |",
        "| slow | 20.0 | 100 | 1.0 | 0.1 | 4.000 | 3.000 5.000 | 0.2: 4.000 |",
    ]


def test_sources_are_texts_of_their_kind_once(texts, tmp_path):
    wheel = tmp_path / "project-1.0-py3-none-any.whl"
    files = {
        "project/a.py": b"a = 1\n",
        "project/copy.py": b"a = 1\n",
        "project/b.py": b"b = 2\n",
        "project/.hidden/c.py": b"c = 3\n",
        "/elsewhere/d.py": b"d = 4\n",
        "project/../../e.py": b"e = 5\n",
        "project/data.txt": b"text\n",
        "project/binary.py": b"\0",
        "project/latin.py": "\xe9".encode("latin-1"),
        "project/blank.py": b" \n",
        "project/large.py": b"#" * (texts.MAX_FILE_BYTES + 1),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    corpus = texts.Corpus("python", {".py"}, 5_000_000, "")
    found = dict(texts.sources(wheel, corpus, set()))
    assert sorted(found.values()) == [b"a = 1\n", b"b = 2\n"]
    small = texts.Corpus("python", {".py"}, 6, "")
    assert len(dict(texts.sources(wheel, small, set()))) == 1
    assert dict(texts.sources(wheel, corpus, {texts.hash_of(b"a = 1\n")})).keys() == {
        "project/b.py"
    }


def test_summaries_are_pairs_of_code_and_first_paragraph(texts):
    source = (
        "class A:\r\n"
        "    @staticmethod\r\n"
        "    def mean(values):\r\n"
        '        """The mean\r\n'
        "        of values.\r\n"
        "\r\n"
        '        All of them."""\r\n'
        "        def inner(x):\r\n"
        '            """Twice what is given."""\r\n'
        "            y = x + x\r\n"
        "            return y\r\n"
        "        return inner(sum(values)) / '\\d'\r\n"
    )
    seen = set()
    assert [json.loads(line) for line in texts.summaries(source, seen).splitlines()] == [
        {
            "prompt": "@staticmethod\n"
            "def mean(values):\n"
            "    def inner(x):\n"
            '        """Twice what is given."""\n'
            "        y = x + x\n"
            "        return y\n"
            "    return inner(sum(values)) / '\\d'\n"
            '"""',
            "completion": "The mean of values.",
        }
    ]
    assert texts.summaries(source, seen) == ""


@pytest.mark.parametrize(
    ("name", "docstring", "taken"),
    [
        ("mean", '"The mean of values."', True),
        ("mean", '"The mean of values."; values = list(values)', False),
        ("test_mean", '"The mean of values."', False),
        ("__call__", '"The mean of values."', False),
        ("mean", '"The mean."', False),
        ("mean", '"The mean \u03bc of values."', False),
        ("mean", '"The mean of values."\n    ' + "#" * 2000, False),
        ("mean", "pass", False),
        ("1", '"The mean of values."', False),
    ],
)
def test_summaries_leave_out_what_has_none_or_is_no_such_pair(texts, name, docstring, taken):
    code = "    total = sum(values)\n    return total / len(values)\n"
    source = f"def {name}(values):\n    {docstring}\n{code}"
    assert bool(texts.summaries(source, set())) == taken


def test_another_text_is_refused(texts, tmp_path, monkeypatch):
    for name in ("python", "cpp", "clients", "summaries"):
        (tmp_path / name).mkdir()
    (tmp_path / "python" / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(sys, "argv", ["texts.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="not the text of digest"):
        texts.main()
    files, size, before = texts.measure(tmp_path / "python")
    assert (files, size) == (1, 6)
    (tmp_path / "python" / "a.py").rename(tmp_path / "python" / "b.py")
    assert texts.measure(tmp_path / "python")[2] != before


def test_every_wheel_is_pinned_with_its_licence():
    for name in ("python", "cpp", "clients", "summaries"):
        lines = (EVIDENCE / f"texts_{name}.txt").read_text().splitlines()
        pins = [line for line in lines if not line.startswith("#")]
        assert len(pins) > 10
        for pin in pins:
            requirement, _, licence = pin.partition("  # ")
            assert "==" in requirement
            assert " --hash=sha256:" in requirement
            assert licence


@pytest.mark.parametrize(("by_norm", "bound"), [(True, 0.05), (False, 0.1)])
def test_drawn_rows_are_unbiased_and_as_many_as_asked_for(sampled, by_norm, bound):
    torch.manual_seed(0)
    x = torch.zeros(1, 40, 3, requires_grad=True)
    grad = torch.randn(1, 40, 3) * torch.rand(1, 40, 1) ** 3
    total, rounds = torch.zeros_like(grad), 4000
    draw = sampled.Draw(0.25, by_norm=by_norm)
    for _ in range(rounds):
        (found,) = torch.autograd.grad(sampled._Gradient.apply(x, draw), x, grad)
        assert int((found != 0).any(-1).sum()) == 10
        total += found
    error = (total / rounds - grad).norm(dim=-1).max() / grad.norm(dim=-1).max()
    assert error < bound  # by norm 0.02 with this seed, 0.05 uniformly; without weights 0.21


def test_a_power_of_the_weights_keeps_their_sum(sampled):
    grad = torch.randn(2, 40, 3) * torch.rand(2, 40, 1) ** 3
    found = []
    for power in (1.0, 0.5, 0.0):
        torch.manual_seed(0)
        draw = sampled.Draw(0.25, power=power)
        draw(grad)
        found.append(draw.weight_BS1)
    for weights in found[1:]:
        assert torch.equal(weights > 0, found[0] > 0)
        torch.testing.assert_close(weights.sum(), found[0].sum())
    spread = [weights[weights > 0].std() for weights in found]
    assert spread[0] > spread[1] > spread[2] == 0


@pytest.mark.parametrize(("split", "way"), [("backward", "residuals"), ("token", "drawn")])
def test_a_restricted_backward_pass_is_that_of_a_split(
    sampled, selections, split, way, monkeypatch
):
    ids = models.token_ids(3, 9)
    routed, plain = models.build("llama"), models.build("llama")
    wrapped = CGGRModel(
        routed, split=split, selection="random", min_tokens_ratio=0.4, warmup_steps=0
    )
    wrapped(ids, labels=ids).backward()
    (selection,) = selections
    mask_BS1 = selection.mask[..., None]

    def draw(self, grad):
        self.weight_BS1 = mask_BS1.float()
        return grad * mask_BS1

    monkeypatch.setattr(sampled.Draw, "__call__", draw)
    sampled.restrict(plain, sampled.Way("", last=0.4, goes_through=way))
    targets = ids.roll(-1, 1).masked_fill(~selection.mask, -100)
    logits = plain(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for (name, p), other in zip(plain.named_parameters(), routed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


RECORDER = """
import json, os, pathlib, sys
name = " ".join(sys.argv).replace("--name=", "--name ").partition("--name ")[2].split()[0]
if name in ("base", "reference"):
    (pathlib.Path("runs") / name / "model").mkdir(parents=True)
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([name, os.environ["CUDA_VISIBLE_DEVICES"], sys.argv[1:]]) + chr(10))
"""


def recorded(study_of, settings, tmp_path, monkeypatch, *, minutes=9.0, gpus=2, **options):
    """Names, GPUs and arguments of the races that a study starts, in their order."""
    monkeypatch.chdir(tmp_path)
    for text in ("cpp", "python"):
        for name, size in (("small", 10), ("large", 900_000), ("fitting", 400_000)):
            (tmp_path / "texts" / text / name).mkdir(parents=True)
            (tmp_path / "texts" / text / name / "a.txt").write_text("x" * size)
    monkeypatch.setattr(study_of, "COMMAND", (sys.executable, "-c", RECORDER))
    (tmp_path / "log").mkdir()
    (tmp_path / "calls.jsonl").touch()
    deadline = time.monotonic() + 60 * minutes
    with (tmp_path / "said.txt").open("w") as file:
        study = study_of.Study(Console(file=file), tmp_path / "log", deadline, **options)
        study.run(settings, gpus)
    return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


def test_a_study_trains_then_compiles_then_races(study, tmp_path, monkeypatch):
    calls = recorded(study, ["finetune", "noise"], tmp_path, monkeypatch, extra=["--seeds", "1"])
    names = [name for name, _, _ in calls]
    assert sorted(names[:2]) == ["base", "reference"]
    for setting, model in (("finetune", "base"), ("noise", "reference")):
        lanes = list(study.options_of(setting)["lanes"])
        compiled = [f"{setting}-compiled-{number}" for number in range(len(lanes))]
        first = names.index(setting)
        assert names.index(model) < min(map(names.index, compiled))
        assert sorted(compiled) == sorted(name for name in names[:first] if name in compiled)
        _, gpu, arguments = calls[first]
        assert {call[1] for call in calls if call[0] in compiled} == {gpu}
        assert arguments[-6:-3] == ["--name", setting, "--resume"]
        assert arguments[-3:] == [f"--lanes={','.join(lanes)}", "--seeds", "1"]
        arguments = calls[names.index(f"{setting}-compiled-1")][2]
        assert f"--lanes={lanes[1]}" in arguments
        assert any(x.startswith("--text=texts") and x.endswith("fitting") for x in arguments)
    assert {gpu for _, gpu, _ in calls} == {"0", "1"}
    # What is there is not trained again.
    study.Study(Console(quiet=True), tmp_path / "log", time.monotonic() + 99).train(0, "base")
    assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == len(calls)


def test_a_model_that_begins_with_a_model_waits_for_it(study, tmp_path, monkeypatch):
    def train(self, gpu, setting):
        time.sleep(0.2 * (setting == "base_wide"))
        done.append(setting)

    done = []
    assert study.needed(["summaries_adapted"]) == ["base_wide", "adapted"]
    monkeypatch.setattr(study.Study, "train", train)
    monkeypatch.setattr(study.Study, "race", lambda self, gpu, setting: done.append(setting))
    recorded(study, ["summaries_adapted", "scratch"], tmp_path, monkeypatch)
    assert [name for name in done if name != "scratch"] == [
        "base_wide",
        "adapted",
        "summaries_adapted",
    ]


def test_a_gpu_that_is_free_does_what_needs_no_model(study, tmp_path, monkeypatch):
    begun = threading.Event()

    def train(self, gpu, setting):
        assert begun.wait(60)  # for a race on the other GPU

    def race(self, gpu, setting):
        raced.append((setting, gpu))
        begun.set()

    raced = []
    monkeypatch.setattr(study.Study, "train", train)
    monkeypatch.setattr(study.Study, "race", race)
    recorded(study, ["finetune", "scratch", "original"], tmp_path, monkeypatch)
    assert sorted(name for name, _ in raced) == ["finetune", "original", "scratch"]
    assert raced[0][0] == "scratch"


def test_the_first_lanes_of_a_setting(study, tmp_path, monkeypatch):
    calls = recorded(study, ["scratch"], tmp_path, monkeypatch, first=2, gpus=1)
    assert [name for name, _, _ in sorted(calls)] == [
        "scratch",
        "scratch-compiled-0",
        "scratch-compiled-1",
    ]
    lanes = list(study.options_of("scratch")["lanes"])[:2]
    assert f"--lanes={','.join(lanes)}" in calls[-1][2]


def test_a_study_ends_in_time(study, tmp_path, monkeypatch):
    assert recorded(study, ["finetune"], tmp_path, monkeypatch, minutes=0.0) == []
    said = (tmp_path / "said.txt").read_text()
    assert "base: not trained" in said
    assert "finetune: not raced, there is no runs/base/model" in said


@pytest.mark.parametrize("done", [True, False])
def test_the_exit_status_says_whether_all_is_raced(study, tmp_path, monkeypatch, done, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts" / "python").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["study.py", "scratch"])
    monkeypatch.setattr(study.Study, "compile", lambda *_: None)
    monkeypatch.setattr(study.Study, "call", lambda *_: done)
    if done:
        study.main()
    else:
        with pytest.raises(SystemExit, match=r"not complete: scratch; .*log has why"):
            study.main()
    assert f"scratch: {'raced' if done else 'stopped'}" in capsys.readouterr().out


@pytest.fixture
def sigint():
    """As in a foreground process: shells make those in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_ends_a_study(study, tmp_path, monkeypatch):
    def race(self, gpu, setting):
        raced.append(setting)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        end = time.monotonic() + 60
        while self.deadline > 0:
            assert time.monotonic() < end
            time.sleep(0.01)

    raced = []
    monkeypatch.setattr(study.Study, "race", race)
    monkeypatch.setattr(study.Study, "train", lambda *_: raced.append("a model"))
    with pytest.raises(KeyboardInterrupt):
        recorded(study, ["scratch", "finetune"], tmp_path, monkeypatch, gpus=1)
    assert raced == ["scratch"]


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_setting_that_fails_leaves_the_others(study, tmp_path, monkeypatch, gpus):
    def race(self, gpu, setting):
        raced.append(setting)
        if setting == "scratch":
            raise FileNotFoundError("texts")

    raced, settings = [], ["scratch", "finetune", "original"]
    monkeypatch.setattr(study.Study, "race", race)
    monkeypatch.setattr(study.Study, "train", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="texts"):
        recorded(study, settings, tmp_path, monkeypatch, gpus=gpus)
    assert sorted(raced) == ["finetune", "original", "scratch"]
    assert "scratch: texts" in (tmp_path / "said.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--first", "0"], "--first must be 1 or more, got 0"),
        (["tuning"], "there is no setting 'tuning', only capped, clients, "),
        (["finetune"], "finetune needs texts/cpp: python benchmarks/evidence/texts.py texts"),
    ],
)
def test_a_study_that_cannot_begin(study, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    with pytest.raises(SystemExit):
        study.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_lane_that_cannot_be_compiled_is_named(study, tmp_path, monkeypatch, compiled):
    options = {"text": ["texts/cpp"], "lanes": {"mine": {}}, "compiled": compiled}
    monkeypatch.setattr(study, "options_of", lambda _: options)
    monkeypatch.setattr(study.Study, "call", lambda *_: False)
    recorded(study, ["finetune"], tmp_path, monkeypatch)
    said = (tmp_path / "said.txt").read_text()
    assert ("finetune: mine was not compiled" in said) == compiled
    assert "finetune: stopped" in said


@pytest.fixture
def measured(noise):
    """Gradients of a tiny model's batches."""
    torch.manual_seed(0)
    ids = [torch.randint(3, 60, (8, 6)) for _ in range(24)]
    return noise.Measured(models.build("llama").eval(), ids[:8], ids[8:])


def test_distances_are_in_units_of_the_weights_and_their_mean_is_the_bias(measured):
    away_P = torch.linspace(-1, 1, len(measured.unit_P)) * measured.unit_P.rsqrt()
    found = measured.distances("shifted", lambda ids: measured.dense(ids) + away_P, draws=2)
    square = torch.linspace(-1, 1, len(away_P)).square().sum().item()
    assert found.distance == pytest.approx(square, rel=1e-4)
    assert found.bias == pytest.approx(square, rel=1e-4)
    found = measured.distances("dense", measured.dense, draws=1)
    assert measured.worth(found) == pytest.approx(1.0)


def test_half_of_the_sequences_are_worth_half(measured):
    assert measured.worth(measured.distances("half", measured.half, draws=3)) == pytest.approx(
        0.5, abs=0.07
    )


@pytest.mark.parametrize("through", ["everything", "backward", "token", "hidden"])
def test_all_tokens_by_any_way_are_worth_all(noise, measured, through):
    way = noise.Way("importance", 1.0, through)
    if through == "hidden":
        way = noise.Way("importance", 1.0, "everything", noise.HIDDEN)
    found = measured.distances(through, measured.of_way(way), draws=1)
    assert measured.worth(found) == pytest.approx(1.0, abs=1e-4)


def test_tokens_are_drawn_by_their_hidden_gradients(noise, measured, monkeypatch):
    scores = []

    def spy(difficulty, *args, **kwargs):
        scores.append(difficulty)
        return select(difficulty, *args, **kwargs)

    select = noise.select_tokens
    monkeypatch.setattr(noise, "select_tokens", spy)
    (ids, *_), model = measured.batches, measured.model
    measured.of_way(noise.Way("importance", 0.5, "everything", noise.HIDDEN))(ids)
    with torch.no_grad():
        error_BSV = model(input_ids=ids).logits.softmax(dim=-1)[:, :-1]
        error_BSV -= torch.nn.functional.one_hot(ids[:, 1:], error_BSV.shape[-1])
        norm_BS = (error_BSV @ model.get_output_embeddings().weight).norm(dim=-1)
    torch.testing.assert_close(scores[0][:, :-1], norm_BS, rtol=1e-4, atol=1e-6)
    assert not scores[0][:, -1].any()  # which predicts nothing


def test_uniform_draws_are_worth_their_ratio_less_the_layers_that_are_left_out(noise, measured):
    worth = {}
    for through in ("everything", "backward", "token"):
        way = noise.Way("random", 0.5, through)
        worth[through] = measured.worth(measured.distances(through, measured.of_way(way), draws=4))
    assert worth["everything"] == pytest.approx(0.5, abs=0.07)
    assert noise.predicted(noise.Way("random", 0.5, "everything"), []) == "0.500"
    assert all(0.25 < x < 0.65 for x in worth.values())


@pytest.fixture
def left_out():
    yield load("left_out")
    del sys.modules["left_out"]


def test_which_tokens_are_noise(left_out):
    clean = [Document(f"{i}.py", f"first line {i}\n    second line\n\nlast") for i in range(8)]
    noisy = [
        Document(item.name, item.text.replace("second line", "zebra fox")) for item in clean[:4]
    ] + clean[4:]
    tokenizer = train_tokenizer([item.text for item in (*clean, *noisy)], 300)
    ids, is_noise = left_out.noisy_stream(tokenizer, 5, clean, noisy, 10_000)
    assert (ids == 5).sum() == 8
    words = [tokenizer.decode([token]) for token in ids[is_noise].tolist()]
    # The line's own end is part of it; the white space before it is, where its token ends in it.
    assert "".join(words).split() == ["zebra", "fox"] * 4
    assert "zebra" not in tokenizer.decode(ids[~is_noise].tolist())
    few, _ = left_out.noisy_stream(tokenizer, None, clean, noisy, 1)
    assert 0 < len(few) < len(ids) / 4


def test_what_is_left_out_is_what_is_least_in_excess(left_out):
    excess = np.arange(10, dtype=np.float32).reshape(2, 5)
    is_noise = np.array([[True, True, False, False, True], [False] * 5])
    # 0, 1 and 2 are left out: two of the three of noise, and one of the seven others.
    assert left_out.left_out(excess, is_noise, 0.625) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 7),
    )


def test_a_reference_of_other_tokens_is_refused(left_out, tmp_path, monkeypatch, capsys):
    for name in ("model", "reference"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        tokenizer = train_tokenizer([f"some words of a {name}"] * 9, 300)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    arguments = ["--model", str(tmp_path / "model"), "--reference", str(tmp_path / "reference")]
    for more, message in (
        ([], "its tokenizer is not that of --model"),
        (["--noise", "0"], "--noise must be in (0, 1), got 0.0"),
    ):
        monkeypatch.setattr(sys, "argv", ["left_out.py", *arguments, *more])
        with pytest.raises(SystemExit):
            left_out.main()
        assert message in capsys.readouterr().err
