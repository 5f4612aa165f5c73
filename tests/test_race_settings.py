"""Budgets and the options of a race."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cggr.race.settings import Budget, RaceError, RaceSettings

SECONDS = Budget(60, "seconds")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("60s", Budget(60, "seconds")),
        ("2m", Budget(120, "seconds")),
        ("1.5h", Budget(5400, "seconds")),
        (" 0.5 S ", Budget(0.5, "seconds")),
        ("1step", Budget(1, "steps")),
        ("500steps", Budget(500, "steps")),
        ("500 steps", Budget(500, "steps")),
    ],
)
def test_a_budget_is_read(text, expected):
    assert Budget.parse(text) == expected


@given(st.integers(1, 10**9), st.sampled_from(["s", "steps"]))
def test_a_whole_budget_is_read_back(amount, unit):
    budget = Budget.parse(f"{amount}{unit}")
    assert budget.amount == amount
    assert Budget.parse(f"{budget.amount:.0f}{unit}") == budget


@given(st.text())
def test_any_other_text_is_refused_in_one_line(text):
    if not re.match(r"\s*\d", text):
        with pytest.raises(RaceError, match=r"\A[^\n]*is not an amount of training[^\n]*\Z"):
            Budget.parse(text)


@pytest.mark.parametrize("text", ["", "60", "s", "-5s", "1e3s", "60 s 5", "2mm", "5step5", "٣s"])
def test_bad_syntax(text):
    with pytest.raises(RaceError) as error:
        Budget.parse(text)
    assert str(error.value) == (
        f"{text!r} is not an amount of training: write seconds, minutes, hours or steps, "
        "as in 60s, 2m, 1h or 500steps"
    )


@pytest.mark.parametrize("text", ["0s", "0steps", "0.0m"])
def test_nothing_can_be_trained_in_zero(text):
    with pytest.raises(RaceError) as error:
        Budget.parse(text)
    assert str(error.value) == (
        f"{text!r} ends before the first training step: give more than zero"
    )


def test_half_a_step():
    with pytest.raises(RaceError, match=r"^'1\.5steps' is not a whole number of steps$"):
        Budget.parse("1.5steps")


def test_a_budget_is_spent_in_its_own_unit():
    assert Budget(10, "seconds").spent(seconds=2.5, steps=999) == 0.25
    assert Budget(10, "steps").spent(seconds=999.0, steps=5) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "numpy"}, "unknown backend 'numpy'; known backends: torch, jax"),
        (
            {"lanes": ("dense", "sparse")},
            (
                "unknown lane 'sparse'; known lanes: dense, random, cggr, random-sequences, "
                "cggr-sequences"
            ),
        ),
        ({"lanes": ("dense", "dense")}, "a race needs each lane once, got 'dense,dense'"),
        ({"lanes": ()}, "a race needs each lane once, got ''"),
        (
            {"eval_every": Budget(120, "seconds")},
            (
                "--budget 60s ends before the first evaluation: give a longer budget, or an "
                "--eval-every of at most 60s"
            ),
        ),
        (
            {"eval_every": Budget(5, "steps")},
            "--eval-every 5steps and --budget 60s must both be time or both be steps",
        ),
        (
            {"hidden_size": 100},
            "--hidden-size must be a multiple of 32 (the width of an attention head), got 100",
        ),
        (
            {"layers": 2, "router_layers": 3},
            "--router-layers 3 is more than the model's 2 layers",
        ),
    ],
)
def test_options_that_cannot_race(options, message):
    with pytest.raises(RaceError) as error:
        RaceSettings(budget=SECONDS, **options)
    assert str(error.value) == message


def test_the_defaults():
    settings = RaceSettings(budget=SECONDS)
    assert settings.lanes == ("dense", "random", "cggr")
    assert (settings.scoring, settings.selection, settings.ratio) == (
        "combined",
        "importance",
        0.25,
    )
    assert settings.backend == "torch"
    assert settings.eval_interval == 0.1
    assert settings.peak_learning_rate == 6e-3


def test_both_selecting_lanes_keep_as_much_from_the_first_step_on():
    settings = RaceSettings(budget=SECONDS, scoring="loss", selection="topk", ratio=0.1)
    random, cggr = (settings.routing(lane, seed=3) for lane in ("random", "cggr"))
    assert (random.selection, cggr.selection) == ("random", "topk")
    for config in (random, cggr):
        assert (config.scoring, config.min_tokens_ratio, config.seed) == ("loss", 0.1, 3)
        assert (config.warmup_steps, config.dynamic_threshold) == (0, False)


def test_fine_tuning_starts_gently(tmp_path):
    assert RaceSettings(budget=SECONDS, model=tmp_path).peak_learning_rate == 5e-5


def test_settings_in_a_report_name_no_folder_of_the_machine(tmp_path):
    path = tmp_path / "secret" / "book.txt"
    values = RaceSettings(budget=SECONDS, text=(path,), model=path.parent).to_json()
    assert values["text"] == ["book.txt"]
    assert values["model"] == "secret"
    assert values["budget"] == "60s"
