"""Budgets, the options of a race and those of its lanes."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cggr.race.settings import Budget, LaneSettings, RaceError, RaceSettings

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
        (
            {"hidden_size": 96, "head_size": 64},
            "--hidden-size must be a multiple of 64 (the width of an attention head), got 96",
        ),
        ({"kv_heads": 4}, "--kv-heads must divide the 6 heads, got 4"),
        ({"noise": 1.0}, "--noise must be at least 0 and less than 1, got 1.0"),
        ({"noise": math.nan}, "--noise must be at least 0 and less than 1, got nan"),
        ({"save": "random-sequences"}, "--save must be one of the lanes, got 'random-sequences'"),
        ({"learning_rates": (0.1, 0.0)}, "--learning-rates must be a positive number, got 0.0"),
        (
            {"learning_rates": (math.nan,)},
            "--learning-rates must be a positive number, got nan",
        ),
        ({"learning_rates": (0.1, 0.1)}, "--learning-rates must differ, got (0.1, 0.1)"),
        (
            {"learning_rates": (0.1, 0.2), "learning_rate": 0.1},
            "give either --learning-rate or --learning-rates",
        ),
        (
            {"scoring": "excess_loss"},
            "lane random: scoring excess_loss needs a --reference, the folder of a model",
        ),
        ({"backend": "jax", "compiled": True}, "--compiled is for --backend torch"),
        ({"backend": "jax", "reference": Path("model")}, "--reference is for --backend torch"),
        ({"head_size": 3}, "--head-size must be even, got 3"),
        ({"prompt": 1.0}, "--prompt must be at least 0 and less than 1, got 1.0"),
        ({"prompt": 0.999}, "--prompt 0.999: nothing of 64 tokens is left to learn"),
        ({"backend": "jax", "save": "dense"}, "--save is for --backend torch"),
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
    random, cggr = (settings.lane(lane).routing(seed=3) for lane in ("random", "cggr"))
    assert (random.selection, cggr.selection) == ("random", "topk")
    for config in (random, cggr):
        assert (config.scoring, config.min_tokens_ratio, config.seed) == ("loss", 0.1, 3)
        assert (config.warmup_steps, config.dynamic_threshold) == (0, False)


def test_slots_are_made_for_what_prompts_leave():
    settings = RaceSettings(budget=SECONDS, sequence_length=10, prompt=0.66)
    assert settings.prompt_tokens == 7
    tables = {"mine": {"split": "backward", "ratio": 1.0}}
    settings = dataclasses.replace(settings, tables=tables, lanes=("mine", "cggr"))
    assert settings.lane("mine").routing(seed=0).capacity(0, 16, 10) == 48
    assert settings.lane("cggr").routing(seed=0).capacity(0, 16, 10) == 12
    tables = {"mine": {"max-eligible-ratio": 0.4}, "all": {"learns-prompts": True}}
    settings = dataclasses.replace(settings, tables=tables, lanes=("mine", "all"))
    assert settings.lane("mine").routing(seed=0).max_eligible_ratio == 0.4
    assert settings.lane("all").routing(seed=0).max_eligible_ratio == 1.0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"max-eligible-ratio": 0.2},
            (
                "lane mine: max_eligible_ratio must be at least 0.3, the part that has labels by "
                "--prompt, got 0.2"
            ),
        ),
        (
            {"learns-prompts": True, "max-eligible-ratio": 0.5},
            (
                "lane mine: max_eligible_ratio must be at least 1.0, the part that has labels by "
                "--prompt, got 0.5"
            ),
        ),
    ],
)
def test_labels_of_prompts_known_beforehand_have_slots(table, message):
    with pytest.raises(RaceError) as error:
        RaceSettings(
            budget=SECONDS, sequence_length=10, prompt=0.7, tables={"mine": table}, lanes=("mine",)
        )
    assert str(error.value) == message


def test_who_learns_prompts_must_have_some():
    tables = {"mine": {"learns-prompts": True}}
    with pytest.raises(RaceError, match=r"^lane mine: learns_prompts needs --prompt or --pairs"):
        RaceSettings(budget=SECONDS, tables=tables, lanes=("mine",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--pairs needs a --text of JSON lines, each a prompt and a completion"),
        ({"text": (Path("a"),), "prompt": 0.5}, "give either --pairs or --prompt"),
        ({"text": (Path("a"),), "noise": 0.5}, "give either --pairs or --noise"),
    ],
)
def test_pairs_have_prompts_of_their_own(options, message):
    with pytest.raises(RaceError) as error:
        RaceSettings(budget=SECONDS, pairs=True, **options)
    assert str(error.value) == message


def test_fine_tuning_starts_gently(tmp_path):
    assert RaceSettings(budget=SECONDS, model=tmp_path).peak_learning_rate == 5e-5


def test_settings_in_a_report_name_no_folder_of_the_machine(tmp_path):
    path = tmp_path / "secret" / "book.txt"
    values = RaceSettings(budget=SECONDS, text=(path,), model=path.parent).to_json()
    assert values["text"] == ["book.txt"]
    assert values["model"] == "secret"
    assert values["budget"] == "60s"


def with_lane(table, **options):
    return RaceSettings(budget=SECONDS, lanes=("mine",), tables={"mine": table}, **options)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("token", "lane mine must be a table of options, got 'token'"),
        (
            {"scores": "loss"},
            (
                "lane mine: unknown option 'scores'; known: batch_size, checkpointed, "
                "dynamic_threshold, importance_floor, learns_prompts, max_eligible_ratio, "
                "micro_batches, num_strata, ratio, router_layers, scoring, selection, split, "
                "warmup_steps"
            ),
        ),
        ({"name": "other"}, "lane mine: unknown option 'name'; known: batch_size, "),
        (
            {"split": "tokens"},
            "lane mine: split must be one of dense, token, backward, sequence, got 'tokens'",
        ),
        (
            {"split": "dense", "batch-size": 4, "ratio": 0.5},
            "lane mine: a dense lane selects nothing, got 'ratio'",
        ),
        ({"batch-size": 0}, "lane mine: batch_size must be 1 or more, got 0"),
        ({"batch_size": 2.5}, "lane mine: batch_size must be 1 or more, got 2.5"),
        ({"batch_size": True}, "lane mine: batch_size must be 1 or more, got True"),
        ({"micro_batches": 0}, "lane mine: micro_batches must be 1 or more, got 0"),
        (
            {"micro_batches": 3},
            "lane mine: micro_batches must divide the batch of 16 sequences, got 3",
        ),
        ({"checkpointed": 1}, "lane mine: checkpointed must be True or False, got 1"),
        (
            {"learns_prompts": "no"},
            "lane mine: learns_prompts must be True or False, got 'no'",
        ),
        ({"max_eligible_ratio": 0}, "lane mine: max_eligible_ratio must be in (0, 1], got 0."),
        ({"router_layers": "2"}, "lane mine: router_layers must be 1 or more, got '2'"),
        ({"router_layers": 5}, "lane mine: router_layers 5 is more than the model's 4 layers"),
        ({"scoring": "luck"}, "lane mine: scoring must be one of 'entropy', "),
        ({"selection": 3}, "lane mine: selection must be one of 'topk', "),
        ({"ratio": 1.5}, "lane mine: min_tokens_ratio must be in (0, 1], got 1.5."),
        ({"ratio": "all"}, "lane mine: min_tokens_ratio must be a number, got 'all'."),
        ({"num_strata": 0}, "lane mine: num_strata must be in [1, 256], got 0."),
        ({"warmup_steps": -1}, "lane mine: warmup_steps must be in [0, 2147483647], got -1."),
        ({"importance_floor": math.inf}, "lane mine: importance_floor must be in [1e-30, 1e30], "),
        ({"dynamic_threshold": 1}, "lane mine: dynamic_threshold must be True or False, got 1."),
        (
            {"scoring": "excess_loss"},
            "lane mine: scoring excess_loss needs a --reference, the folder of a model",
        ),
    ],
)
def test_tables_that_cannot_race(table, message):
    with pytest.raises(RaceError) as error:
        with_lane(table)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_lane_that_does_not_race_is_one_too():
    for table in ({"scores": "loss"}, 3):
        with pytest.raises(RaceError, match=r"^lane mine"):
            RaceSettings(budget=SECONDS, tables={"mine": table})
    # But what the race itself lacks for it, it need not have.
    RaceSettings(budget=SECONDS, tables={"mine": {"scoring": "excess_loss"}})


@pytest.mark.parametrize(
    ("table", "option"),
    [
        ({"warmup_steps": 5}, "warmup_steps"),
        ({"micro_batches": 2}, "micro_batches"),
        ({"checkpointed": True}, "checkpointed"),
    ],
)
def test_what_is_for_torch_alone(table, option):
    with_lane(table)
    with pytest.raises(RaceError) as error:
        with_lane(table, backend="jax")
    assert str(error.value) == f"lane mine: {option} is for --backend torch"


def test_what_a_table_does_not_say_the_race_does():
    race = {"scoring": "loss", "selection": "stratified", "ratio": 0.1, "router_layers": 3}
    assert with_lane({}, **race).lane("mine") == LaneSettings(
        name="mine",
        split="token",
        scoring="loss",
        selection="stratified",
        ratio=0.1,
        router_layers=None,  # of the built-in lanes of sequences alone
        warmup_steps=0,
        dynamic_threshold=False,
    )
    table = {
        "split": "sequence",
        "scoring": "margin",
        "selection": "topk",
        "ratio": 0.5,
        "router-layers": 2,
        "warmup-steps": 9,
        "dynamic-threshold": True,
        "num-strata": 7,
        "importance-floor": 0.2,
        "batch-size": 3,
    }
    settings = with_lane(table, **race)
    lane = settings.lane("mine")
    options = {name.replace("-", "_"): value for name, value in table.items()}
    assert lane == LaneSettings(name="mine", **options)
    config = lane.routing(seed=4)
    assert (config.scoring, config.selection, config.min_tokens_ratio) == ("margin", "topk", 0.5)
    assert (config.warmup_steps, config.dynamic_threshold) == (9, True)
    assert (config.num_strata, config.importance_floor, config.seed) == (7, 0.2, 4)


def test_a_table_may_have_a_built_in_name():
    settings = RaceSettings(budget=SECONDS, tables={"cggr": {"split": "sequence"}})
    assert settings.lane("cggr").split == "sequence"
    assert RaceSettings(budget=SECONDS).lane("cggr").split == "token"


def test_a_lane_has_its_own_batch_size_or_the_races():
    tables = {"small": {"batch_size": 4}, "usual": {}}
    settings = RaceSettings(budget=SECONDS, lanes=("small", "usual", "dense"), tables=tables)
    assert [settings.lane_batch_size(lane) for lane in settings.lanes] == [4, 16, 16]


def test_a_dense_lane_needs_no_reference():
    settings = with_lane({"split": "dense"}, scoring="excess_loss")
    assert not settings.lane("mine").scores_excess
    settings = with_lane({"scoring": "excess_loss"}, reference=Path("model"))
    assert settings.lane("mine").scores_excess
    assert not settings.lane("cggr").scores_excess


def test_which_races_are_one_by_one():
    assert not RaceSettings(budget=SECONDS).one_by_one
    assert RaceSettings(budget=SECONDS, compiled=True).one_by_one
    tuned = RaceSettings(budget=SECONDS, learning_rates=(0.1, 0.2))
    assert tuned.one_by_one
    assert tuned.rates == (0.1, 0.2)
    assert RaceSettings(budget=SECONDS, learning_rate=0.3).rates == (0.3,)


def test_settings_of_configured_lanes_are_plain_values(tmp_path):
    tables = {"mine": {"ratio": 0.5, "router-layers": 1}}
    settings = RaceSettings(
        budget=SECONDS,
        lanes=("mine",),
        tables=tables,
        learning_rates=(0.1, 0.2),
        reference=tmp_path / "secret" / "reference",
    )
    values = json.loads(json.dumps(settings.to_json()))
    assert values["tables"] == tables
    assert values["learning_rates"] == [0.1, 0.2]
    assert values["reference"] == "reference"
