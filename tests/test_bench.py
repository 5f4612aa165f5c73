"""The benchmarks, as far as they go without a CUDA device: their command, arithmetic and report."""

import dataclasses
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import truth
from click.testing import CliRunner
from rich.console import Console

from cggr.bench import report, settings
from cggr.bench.attention import AttentionCase
from cggr.bench.settings import BENCHMARKS, BenchSettings, Case
from cggr.cli import main

pytest.importorskip("triton", reason="Triton is not installed: it has no wheels for this machine")

from cggr.bench import attention as bench_attention
from cggr.bench import (
    batch,
    growth,
    jax_statistics,
    linear,
    linear_loss,
    linear_statistics,
    statistics,
    timing,
)
from cggr.bench import main as bench
from cggr.bench.step import StepCase
from cggr.bench.timing import Contestant, Failure, Timing, measure, rows_of

ROOT = Path(__file__).resolve().parent.parent
QUICK = BenchSettings(quick=True)


def run(line):
    return CliRunner().invoke(main, shlex.split(line))


def silent(text):
    pass


# The command


def test_the_list_has_every_benchmark_and_needs_no_device():
    result = run("bench --list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(BENCHMARKS)
    for name, claim in BENCHMARKS.items():
        assert f"{name} " in result.stdout
        assert claim in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench", f"cggr bench needs a CUDA device: torch {torch.__version__} sees none"),
        (
            "bench linear",
            (
                "Invalid value for '[NAME]...': 'linear' is not one of 'statistics', "
                "'linear_loss', 'linear_statistics', 'attention', 'step', 'batch', 'latency', "
                "'flash', 'growth', 'jax_step', 'jax_statistics'."
            ),
        ),
        (
            "bench --cggr-050 empty",
            ("--cggr-050 empty: no triton_kernels.py in it; unpack the wheel of cggr 0.5.0 there"),
        ),
    ],
)
def test_what_cannot_run_is_one_line_and_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = run(arguments)
    assert result.stderr == f"cggr: {message}\n"
    assert result.stdout == ""
    assert result.exit_code == 2
    assert not (tmp_path / "benchmarks").exists()


def test_a_torch_for_rocm_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert run("bench").stderr == (
        f"cggr: cggr bench needs a CUDA device: torch {torch.__version__} is for ROCm\n"
    )


def test_a_missing_package_is_named(monkeypatch):
    real = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name == "triton" else real(name)
    )
    result = run("bench statistics")
    assert result.stderr == "cggr: cggr bench needs triton: pip install 'cggr[benchmark]'\n"
    assert result.exit_code == 2


def test_every_name_has_a_benchmark_and_a_script(monkeypatch):
    scripts = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    for name in BENCHMARKS:
        module = bench.importlib.import_module(f"cggr.bench.{name}")
        assert isinstance(module.BENCHMARK, bench.Benchmark)
        assert sum(f'main(["bench", "{name}", *sys.argv[1:]])' in text for text in scripts.values())


# Taking turns


class FakeClock:
    """Tells prepared times, and notes who was asked for."""

    def __init__(self, name, times, log):
        self.name, self.times, self.log = name, iter(times), log

    def __call__(self, call, calls):
        self.log.append((self.name, calls))
        call()
        time = next(self.times)
        if isinstance(time, Exception):
            raise time
        return time


def test_the_contestants_take_turns_in_rounds():
    log = []
    contestants = [
        Contestant("a", lambda: lambda: None, clock=FakeClock("a", [10.0, 1.0, 2.0, 3.0], log)),
        Contestant("b", lambda: lambda: None, clock=FakeClock("b", [90.0, 4.0, 9.0, 5.0], log)),
        Contestant(
            "c", lambda: lambda: None, clock=FakeClock("c", [0.1, 7.0, 7.0, 8.0], log), calls=20
        ),
    ]
    outcomes = measure(contestants, QUICK, silent)
    # The first time of each is the estimate from which the calls of a turn of 25 ms follow.
    a, b, c = ("a", 3), ("b", 1), ("c", 20)
    assert log == [("a", 1), ("b", 1), c, a, b, c, b, c, a, c, a, b]
    assert {name: outcome.rounds for name, outcome in outcomes.items()} == {
        "a": (1.0, 2.0, 3.0),
        "b": (4.0, 9.0, 5.0),
        "c": (7.0, 7.0, 8.0),
    }
    rows = rows_of(outcomes)
    assert [(row["contestant"], row["ms"]) for row in rows] == [("a", 2.0), ("b", 5.0), ("c", 7.0)]
    assert (rows[1]["ms_min"], rows[1]["ms_max"], rows[1]["ms_rounds"]) == (4.0, 9.0, [4, 9, 5])


def absent():
    raise ModuleNotFoundError("No module named 'peer'")


def contestant(name, times, prepare=lambda: lambda: None, **options):
    return Contestant(name, prepare, clock=FakeClock(name, times, []), **options)


def test_a_peer_that_fails_is_reported_and_the_others_go_on():
    fault = RuntimeError("out of something\n  and more" + "!" * 300)
    outcomes = measure(
        [
            contestant("absent", [], absent, may_fail=True),
            contestant("late", [9.0, 9.0, fault], may_fail=True),
            contestant("ours", [9.0, 1.0, 2.0, 3.0], observe=lambda call: {"loss": 4.0}),
        ],
        QUICK,
        silent,
    )
    assert outcomes == {
        "absent": Failure("ModuleNotFoundError: No module named 'peer'"),
        "late": Failure(f"RuntimeError: out of something and more{'!' * 300}"[:300]),
        "ours": Timing((1.0, 2.0, 3.0), {"loss": 4.0}),
    }
    assert rows_of(outcomes)[:2] == [
        {"contestant": "absent", "error": "ModuleNotFoundError: No module named 'peer'"},
        {"contestant": "late", "error": outcomes["late"].error},
    ]


def test_only_some_are_measured():
    contestants = [contestant(name, [1.0] * 4) for name in ("dense", "token, graph", "token")]
    outcomes = measure(contestants, BenchSettings(quick=True, only=("*graph*", "den*")), silent)
    assert list(outcomes) == ["dense", "token, graph"]


def test_what_must_work_fails_loudly():
    with pytest.raises(ModuleNotFoundError, match="peer"):
        measure([contestant("ours", [], absent)], QUICK, silent)


def test_the_hosts_clock_waits_before_and_after(monkeypatch):
    log, ticks = [], itertools.count(0, 3)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: log.append("tick") or next(ticks))
    clock = timing.wall_clock(lambda result: log.append(f"wait for {result}"))
    assert clock(lambda: log.append("call") or "it", 3) == 1000.0  # 3 s for 3 calls
    once = ["call", "wait for it"]
    assert log == [*once, "tick", "call", "call", *once, "tick"]


# What follows from the times


def test_shares_and_speedups_of_the_statistics():
    n_bytes = 4_000_000
    rows = [
        {"contestant": "read loop, 4096", "ms": 2.0, "bytes": n_bytes},
        {"contestant": "read loop, 8192", "ms": 1.0, "bytes": n_bytes},
        {"contestant": "cggr", "ms": 1.25, "bytes": n_bytes, "errors": {"nll": 1e-6}},
        {"contestant": "torch.compile", "error": "RuntimeError"},
        {"contestant": "cggr 0.5.0", "ms": 5.0, "bytes": n_bytes, "errors": {"entropy": 0.06}},
    ]
    statistics.compare(rows)
    assert [row.get("gb_per_s") for row in rows] == [2.0, 4.0, 3.2, None, 0.8]
    assert [row.get("share_of_ceiling") for row in rows] == [0.5, 1.0, 0.8, None, 0.2]
    assert [row.get("speedup_over_050") for row in rows] == [None, None, 4.0, None, 1.0]
    del rows[-1]
    statistics.compare(rows)
    assert rows[2]["speedup_over_050"] is None


def test_ratios_to_the_fastest_dense_loss():
    rows = [
        {"contestant": "cggr, ratio 0.25", "ms": 6.0, "ratio": 0.25},
        {"contestant": "Liger", "ms": 15.0, "ratio": None},
        {"contestant": "cut-cross-entropy", "ms": 12.0, "ratio": None},
        {"contestant": "torch, chunked", "error": "ImportError"},
    ]
    linear_loss.compare(rows)
    assert [row.get("to_fastest_dense") for row in rows] == [0.5, 1.25, 1.0, None]
    rows = rows[:1]
    linear_loss.compare(rows)
    assert rows[0]["to_fastest_dense"] is None


def test_ratios_to_the_faster_way_and_to_torch():
    case = Case(1000, 500_000, hidden_size=1000)
    rows = [
        {"contestant": "cggr", "ms": 5.0},
        {"contestant": "fused", "ms": 4.0},
        {"contestant": "chunked", "ms": 8.0},
    ]
    linear_statistics.compare(case, rows)
    assert [row["tflop_per_s"] for row in rows] == [200.0, 250.0, 125.0]
    assert [row["to_faster_way"] for row in rows] == [1.25, 1.0, 2.0]

    rows = [{"contestant": "torch", "ms": 2.0}, {"contestant": "jax", "ms": 2.5}]
    jax_statistics.compare(Case(1000, 4000, dtype="float32"), rows)
    assert [row["gb_per_s"] for row in rows] == [8.0, 6.4]
    assert [row["to_torch"] for row in rows] == [1.0, 1.25]


# The report


def test_a_table_shows_what_was_measured_and_why_the_rest_was_not(capsys):
    rows = [
        {
            "contestant": "cggr",
            "ms": 1.5,
            "ms_min": 1.25,
            "ms_max": 2.0,
            "peak_bytes": 3 << 20,
            "to_fastest_dense": None,
            "loss": float("nan"),
        },
        {"contestant": "peer", "error": "ImportError: [red] is no colour here"},
    ]
    console = Console(width=100)
    report.print_case(console, "a title", rows, linear_loss.BENCHMARK.columns)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "a title"
    assert lines[1].split() == ["ms", "min", "-", "max", "of", "dense", "peak", "MiB", "loss"]
    assert lines[3].split() == ["cggr", "1.500", "1.250", "-", "2.000", "-", "3", "nan"]
    assert lines[4] == "peer: not measured: ImportError: [red] is no colour here"
    assert len(lines) == 5


def fake_benchmark(seen):
    def measure_case(case, settings, progress):
        progress("at work")
        seen.append((case, settings))
        if case.n_rows == 3:
            raise KeyboardInterrupt
        return [
            {"contestant": "cggr", "ms": 1.0, "ms_min": 1.0, "ms_max": 1.0, "loss": float("inf")}
        ]

    cases = (Case(1, 10), Case(2, 10, hidden_size=4), Case(3, 10))
    return bench.Benchmark(cases, measure_case, report.TIMES)


def measured(folder):
    return json.loads((folder / "linear_loss.json").read_text())


def test_results_are_kept_with_machine_and_settings_after_every_case(tmp_path, monkeypatch):
    monkeypatch.setenv("CGGR_IMPLEMENTATION", "eager")
    seen, here = [], bench.machine.Runtime({"torch": "2.13.0"}, "cuda", "H200", 4)
    path, console = tmp_path / "new" / "linear_loss.json", Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        bench.run_benchmark(
            "linear_loss", fake_benchmark(seen), BenchSettings(), path, here, console
        )
    found = measured(tmp_path / "new")
    assert found["complete"] is False
    assert [entry["case"] for entry in found["cases"]] == [
        {"n_rows": 1, "n_classes": 10, "hidden_size": None, "dtype": "bfloat16"},
        {"n_rows": 2, "n_classes": 10, "hidden_size": 4, "dtype": "bfloat16"},
    ]
    assert found["cases"][0]["contestants"] == [
        {"contestant": "cggr", "ms": 1.0, "ms_min": 1.0, "ms_max": 1.0, "loss": None}
    ]
    assert found["versions"]["torch"] == "2.13.0"
    assert found["machine"]["gpu"] == "H200"
    assert found["claim"] == BENCHMARKS["linear_loss"]
    assert found["settings"] == {
        "quick": False,
        "rounds": 20,
        "seed": 0,
        "cases": None,
        "only": None,
        "with_cggr_050": False,
        "CGGR_IMPLEMENTATION": "eager",
    }

    second = BenchSettings(cases=(2,), only=("cggr",))
    bench.run_benchmark("linear_loss", fake_benchmark(seen), second, path, here, console)
    assert [entry["case"]["n_rows"] for entry in measured(tmp_path / "new")["cases"]] == [2]
    with pytest.raises(settings.BenchError, match="--case 4: there are 3 shapes"):
        BenchSettings(cases=(4,)).chosen(fake_benchmark(seen).cases)
    bench.run_benchmark("linear_loss", fake_benchmark(seen), QUICK, path, here, console)
    found = measured(tmp_path / "new")
    assert found["complete"] is True
    assert len(found["cases"]) == 1
    assert found["settings"]["rounds"] == 3


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(settings.BenchError, match=r"cannot make the folder .*taken: File exists"):
        report.write(tmp_path / "taken" / "statistics.json", {})


def test_what_is_missing_skips_unless_it_was_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "check_machine", lambda: None)
    here = bench.machine.Runtime(dict.fromkeys(("torch", "triton", "cuda"), "1"), "cuda", "H200", 4)
    monkeypatch.setattr(bench, "runtime", lambda: here)
    for name in BENCHMARKS:
        lacking = (lambda: "no jax here") if name == "jax_statistics" else (lambda: None)
        benchmark = bench.Benchmark((Case(1, 2),), lambda *_: [], (), lacking)
        monkeypatch.setattr(f"cggr.bench.{name}.BENCHMARK", benchmark)
    result = run(f"bench --out {tmp_path}")
    assert result.exit_code == 0
    assert "jax_statistics: skipped: no jax here\n" in result.stdout
    assert {path.stem for path in tmp_path.iterdir()} == set(BENCHMARKS) - {"jax_statistics"}

    result = run(f"bench jax_statistics --out {tmp_path}")
    assert (result.exit_code, result.stderr) == (
        2,
        "cggr: cggr bench jax_statistics: no jax here\n",
    )


# What is measured


def test_the_plain_statistics_are_those_of_the_truth():
    logits = np.random.default_rng(0).normal(0, 3, (50, 400))
    targets = np.random.default_rng(1).integers(0, 400, 50)
    expected = truth.statistics(logits, targets)
    result = statistics.plain_statistics(torch.from_numpy(logits), torch.from_numpy(targets))
    for name, value in result._asdict().items():
        # Two float64 computations of values up to 10.
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=0, atol=1e-13, err_msg=name)


def test_an_error_is_the_largest_of_the_checked_rows():
    exact = {"nll": torch.tensor([1.0, 2.0], dtype=torch.float64), "margin": None}
    values = {"nll": torch.tensor([1.25, 1.5, 9.0]), "margin": None}
    assert statistics.largest_errors(values, exact) == {"nll": 0.5}


def test_targets_are_drawn_from_the_heads_softmax():
    case = Case(20_000, 6, hidden_size=2, dtype="float32")
    hidden, weight, targets = linear.make_head(case, seed=0, device="cpu")
    p = torch.softmax(hidden @ weight.T, dim=-1)
    drawn = torch.nn.functional.one_hot(targets, 6).float()
    # Standard errors of the sums, class by class: five are chance once in a million.
    deviation = (drawn - p).sum(0) / (p * (1 - p)).sum(0).sqrt()
    assert deviation.abs().max() < 5
    # And in the part of the rows whose targets are the surest.
    sure = p.amax(-1) > 0.9
    assert sure.sum() > 1000
    agreement = (targets == p.argmax(-1))[sure].float()
    expected = p.amax(-1)[sure]
    spread = (expected * (1 - expected)).sum().sqrt() / len(expected)
    assert (agreement.mean() - expected.mean()).abs() < 5 * spread


def test_the_kernels_of_050_come_from_their_folder(tmp_path):
    (tmp_path / "triton_kernels.py").write_text("def _triton_difficulty_score(x, y): return x + y")
    assert statistics.load_050(tmp_path)._triton_difficulty_score(1, 2) == 3
    assert "cggr_050" not in sys.modules
    with pytest.raises(ImportError, match="--cggr-050"):
        statistics.load_050(None)


ON_CPU = """
import functools, importlib, json, sys, types
import torch
from rich.console import Console
from cggr.bench import attention, batch, linear, report, statistics, step, timing
from cggr.bench.settings import BenchSettings, Case
from cggr.bench.attention import AttentionCase
from cggr.bench.step import StepCase

timing.cuda_clock, timing.WARM_UP_CALLS = lambda call, calls: 1.0, 1
torch.cuda.synchronize = lambda: None
sys.modules["liger_kernel"] = sys.modules["cut_cross_entropy"] = None  # not on the CPU
torch.nn.Module.cuda = lambda module: module
statistics.make_logits = functools.partial(statistics.make_logits, device="cpu")
attention.make_inputs = functools.partial(attention.make_inputs, device="cpu")
linear.make_head = functools.partial(linear.make_head, device="cpu")
linear.peak_memory = step.peak_memory = lambda call: (1 << 20, call())
step.make_model = functools.partial(step.make_model, device="cpu")
step.captured = attention.captured = lambda call, pool=None: call
torch.cuda.graph_pool_handle = object
batch.in_own_process = lambda function, *args: function(*args)
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(total_memory=24 << 30)
torch.cuda.set_per_process_memory_fraction = {0.5: None}.__getitem__
batch.make_model, fits = step.make_model, batch.step_fits
batch.step_fits = lambda make, model, ids: len(ids) <= 5 and fits(make, model, ids)
module = importlib.import_module(f"cggr.bench.{sys.argv[1]}")
if sys.argv[1] == "jax_step":
    module.make_decoder = functools.partial(module.make_decoder, attention=None)
settings = BenchSettings(quick=True, only=tuple(sys.argv[3:]))
rows = module.run(eval(sys.argv[2]), settings, lambda text: None)
report.print_case(Console(file=sys.stderr), "a title", rows, module.BENCHMARK.columns)
json.dump(rows, sys.stdout)
"""


TRITON = {"CGGR_IMPLEMENTATION": "triton"}


def measured_on_cpu(name, case, only=(), **implementation):
    """Rows by name: in the interpreter, nothing compiled, and with no true times or peaks."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        **implementation,
    }
    command = [sys.executable, "-c", ON_CPU, name, repr(case), *only]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {row["contestant"]: row for row in json.loads(done.stdout)}


def test_the_statistics_are_measured_against_their_error():
    rows = measured_on_cpu("statistics", Case(16, 2080), **TRITON)
    assert {name for name, row in rows.items() if "error" in row} == {"cggr 0.5.0"}
    for name in ("cggr", "cggr, eager", "torch.compile"):
        errors = rows[name]["errors"]
        assert set(errors) == {"nll", "entropy", "confidence", "margin", "error_norm"}
        assert 0 < max(errors.values()) < 5e-5  # float32, of logits up to 13
    # The interpreter and PyTorch do not sum in the same order: it was the kernel that ran.
    assert rows["cggr"]["errors"] != rows["cggr, eager"]["errors"]
    assert rows["read loop, 4096"]["bytes"] == 32768 * 2  # the whole rows in 16 x 2080 bfloat16


# Runtime bounds of a loop are more than the interpreter of triton 3.6 takes with NumPy 2.4.
interprets_loops = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="the kernels are compiled for the CUDA device here: cggr bench",
)


@interprets_loops
def test_all_losses_take_the_same_step():
    rows = measured_on_cpu("linear_loss", Case(40, 300, hidden_size=32, dtype="float16"), **TRITON)
    assert rows["Liger"]["error"].startswith("ModuleNotFoundError: ")
    assert rows["cut-cross-entropy"]["error"].startswith("ModuleNotFoundError: ")
    dense = rows["torch.compile"]["loss"]
    # Logits that are rounded to float16 in one and not in the other: by 2^-12 of up to 13.
    for name, row in rows.items():
        if "error" not in row and row["ratio"] in (None, 1.0):
            assert row["loss"] == pytest.approx(dense, abs=13 * 2**-12), name
    # The hardest tokens have the larger losses.
    assert rows["cggr, ratio 0.1"]["loss"] > rows["cggr, ratio 0.25"]["loss"] > dense + 0.5
    assert rows["cggr, ratio 1"]["peak_bytes"] == 2**20 - 2 * (40 + 300) * 32  # float16 gradients
    assert rows["cggr, ratio 1"]["to_fastest_dense"] == 1.0


@interprets_loops
def test_both_ways_of_a_linear_heads_statistics_are_forced():
    rows = measured_on_cpu(
        "linear_statistics", Case(70, 300, hidden_size=32, dtype="float16"), **TRITON
    )
    assert list(rows) == ["cggr", "fused", "chunked"]
    for row in rows.values():
        assert set(row["errors"]) == {"nll", "entropy", "confidence", "margin", "error_norm"}
    # Either way rounds logits to float16: by 2^-9 at most, of up to 13.
    for row in rows.values():
        assert 5e-5 < max(row["errors"].values()) < 1e-2


@interprets_loops
def test_attention_is_measured_against_float64():
    case = AttentionCase("tiny", 2, 40, 4, 2, 16, dtype="float32")
    assert case.title == "tiny, 2 x 40, ratio 0.25, float32"
    rows = measured_on_cpu("attention", case)
    ours = rows["selected attention, forward"]
    assert ours["flops"] == ours["operations"] * 1e3  # a call took 1 ms
    for name in ("selected attention", "sdpa with a mask", "scores in memory"):
        assert rows[f"{name}, forward"]["operations"] == ours["operations"]
        both = rows[f"{name}, with gradients"]
        assert 0 < both["output_error"] < 1e-5
        assert 0 < both["gradient_error"] < 1e-5
    every = rows["causal sdpa of all, flash, forward"]["operations"]
    assert every == 4 * 16 * 2 * 4 * 40 * 41 // 2
    as_many = rows["causal sdpa of as many pairs, flash, forward"]["operations"]
    assert as_many == 4 * 16 * 2 * 4 * 20 * 21 // 2  # of half the length, for a quarter
    inputs = bench_attention.make_inputs(case, 0, "cpu")._replace(
        index_BC=torch.tensor([[0, 9], [5, 39]], dtype=torch.int32)
    )
    assert bench_attention.pairs_of(inputs, every=False) == 4 * (1 + 10 + 6 + 40)


def test_all_steps_are_of_one_model():
    case = StepCase(24, 96, 32, "float32", "tiny", 2, 2, 4, 2, 48)
    assert case.title == "tiny, 2 x 12 float32"
    rows = measured_on_cpu("step", case)
    for name in ("dense, Liger", "dense, Liger, compiled", "dense, cut-cross-entropy, compiled"):
        assert rows[name]["error"].startswith("ModuleNotFoundError: ")
    assert rows["cggr 0.5.0, ratio 0.25"]["error"].startswith("ImportError: give the folder")
    dense = rows["dense"]["loss"]
    for name, row in rows.items():
        if "error" not in row:
            assert row["loss"] == pytest.approx(dense, rel=0.05), name  # of random weights
            assert row["to_dense"] == 1.0
            weights = 4 * (96 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 64) + 32)
            assert row["peak_bytes"] == weights + 2**20
            assert row["tokens_per_s"] == 24e3  # a step took 1 ms
    products = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 96 * 32
    scores = 2 * 2 * 4 * 8 * 12 * 13 // 2  # of 2 layers, 2 sequences, 4 heads
    forward = 2 * 24 * products + 4 * scores
    of_forward = {name: row["flops"] / (forward * 1e3) for name, row in rows.items() if "ms" in row}
    for name, expected in (
        ("dense", 3.0),
        ("random sequences, ratio 0.25", 0.75),
        ("sequence, ratio 0.25", 0.75 + 1),  # a router of both layers
        ("token, ratio 0.25", 1.75),
        ("token, 2 layers score, ratio 0.25", 1.75),
        ("token, ratio 0.1, graph", 1.3),
        ("backward, ratio 0.25", 1.5),
    ):
        assert of_forward[name] == pytest.approx(expected), name


def test_all_steps_in_flax_are_of_one_model():
    pytest.importorskip("flax", reason="Flax is not installed")
    from cggr.bench.jax_step import make_decoder

    case = StepCase(24, 96, 32, "float32", "tiny", 2, 2, 4, 2, 48)
    rows = measured_on_cpu("jax_step", case, ("dense", "sequence*", "token, ratio 0.5"))
    assert list(rows) == ["dense", "sequence, ratio 0.25", "token, ratio 0.5"]
    weights = 4 * (96 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 64) + 32)
    for name, row in rows.items():
        assert row["loss"] == pytest.approx(rows["dense"]["loss"], rel=0.2), name
        assert row["peak_bytes"] > 2 * weights, name  # the gradients, too
        assert row["memory_to_dense"] == row["peak_bytes"] / rows["dense"]["peak_bytes"]
    half = make_decoder(dataclasses.replace(case, dtype="bfloat16"), 0, attention=None)
    assert half(np.zeros((1, 12), np.int32)).dtype == "bfloat16"


def test_a_ratio_is_to_the_contestant_that_is_named():
    rows = [{"contestant": "a", "ms": 2.0}, {"contestant": "b", "ms": 3.0}, {"contestant": "c"}]
    timing.add_ratio(rows, "to_b", "ms", "b")
    assert [row.get("to_b") for row in rows] == [2 / 3, 1.0, None]
    for absent in ("c", "d"):  # without a time; not measured
        timing.add_ratio(rows, "to_none", "ms", absent)
    assert not any("to_none" in row for row in rows)


def test_latency_is_that_of_four_times_the_batch():
    rows = measured_on_cpu("latency", StepCase(12, 96, 32, "float32", "tiny", 1, 2, 4, 2, 48))
    assert list(rows)[:2] == ["dense", "dense, 4 times the batch"]
    assert "token, ratio 0.25, graph, 4 times the batch" in rows
    assert len(rows) == 15
    losses = {name: row["loss"] for name, row in rows.items()}
    for name in ("dense, no mask, graph", "dense, no mask, compiled graph"):
        assert losses[name] == pytest.approx(losses["dense"], rel=1e-6)
    assert losses["dense"] != losses["dense, 4 times the batch"]
    assert all(row["to_dense"] == 1.0 for row in rows.values())


def test_growth_is_measured_and_drawn(tmp_path):
    case = StepCase(24, 96, 32, "float32", "tiny", 2, 2, 4, 2, 48)
    rows = measured_on_cpu("growth", case, ("dense*", "token, ratio 0.1*"))
    assert list(rows) == ["dense, no mask, graph", "token, ratio 0.1, graph"]
    assert all(row["ms"] == row["to_dense"] == 1.0 for row in rows.values())
    assert all(row["peak_bytes"] > 2**20 for row in rows.values())
    shapes = growth.cases()
    assert [shape.length for shape in shapes[:6]] == list(growth.LENGTHS)
    assert {shape.batch for shape in shapes} == set(growth.BATCHES)
    assert {shape.n_classes for shape in shapes} == set(growth.VOCABULARIES)
    drawn = []
    for factor in (1.0, 3.0):  # of the time of some
        entries = [
            {
                "case": dataclasses.asdict(shape),
                "contestants": [
                    {"contestant": name, "ms": factor**i, "peak_bytes": 2**30}
                    for i, name in enumerate(growth.LINES)
                ],
            }
            for shape in shapes
        ]
        growth.draw(entries, tmp_path / "growth.png")
        drawn.append((tmp_path / "growth.png").read_bytes())
    assert drawn[0] != drawn[1]


def test_batches_are_those_of_every_eager_step():
    case = StepCase(24, 96, 32, "float32", "tiny", 2, 2, 4, 2, 48)
    rows = measured_on_cpu("batch", case)
    measured = {name: row["batch"] for name, row in rows.items() if "error" not in row}
    assert {"dense", "sequence, ratio 0.25", "token, 2 layers score, ratio 0.1"} <= set(measured)
    assert set(measured.values()) == {5}
    assert rows["token, ratio 0.1"]["to_dense"] == 1.0
    assert rows["dense, Liger"]["error"].startswith("ModuleNotFoundError: ")


@pytest.mark.parametrize("answer", [0, 1, 5, 8])
def test_the_largest_number_that_fits(answer):
    assert batch.largest(lambda number: number <= answer, 8) == answer


def test_a_process_of_its_own_says_what_went_wrong():
    assert batch.in_own_process(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        batch.in_own_process(divmod, 1, 0)


def test_a_step_without_memory_does_not_fit_and_leaves_nothing():
    model = torch.nn.Linear(2, 1)

    def make(model, ids):
        def step():
            model(ids).sum().backward()
            if len(ids) > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return model(ids).sum()

        return step

    assert batch.step_fits(make, model, torch.ones(1, 2))
    assert model.weight.grad is None
    assert not batch.step_fits(make, model, torch.ones(2, 2))
    assert model.weight.grad is None


def test_values_differ_if_their_bits_do():
    x, y = torch.tensor([1.0, 0.0, 2.0, torch.nan]), torch.tensor([1.0, -0.0, 3.0, torch.nan])
    assert jax_statistics.differing(x, y) == 2


def test_statistics_of_jax_and_torch_are_compared():
    pytest.importorskip("jax", reason="JAX is not installed")
    rows = measured_on_cpu("jax_statistics", Case(64, 520, dtype="float32"))
    assert list(rows) == ["torch", "jax"]
    # XLA and PyTorch do not sum in the same order, and yet some values agree.
    assert 0 < rows["jax"]["values_that_differ"] < 5 * 64
    assert rows["jax"]["to_torch"] == pytest.approx(rows["jax"]["ms"] / rows["torch"]["ms"])


READ = """
import torch
from cggr.bench.read_loop import BLOCKS, ROW, read_loop_kernel

x, out = torch.randn(2, ROW), torch.empty(2)
for block in BLOCKS:
    read_loop_kernel[(2,)](x, out.fill_(0), ROW=ROW, BLOCK=block, num_warps=8)
    # Float32 sums of 4 to 8 numbers in each lane, then of the lanes: a few ulps of 180 and more.
    torch.testing.assert_close(out.double(), x.double().sum(1), rtol=0, atol=1e-3)
"""


def test_the_read_loop_reads_everything_once():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
