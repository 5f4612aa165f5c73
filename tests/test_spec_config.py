"""Options: defaults, ranges, error texts, capacities."""

import dataclasses
import pickle
import tomllib
from pathlib import Path

import numpy as np
import pytest
import truth
from hypothesis import example, given
from hypothesis import strategies as st

from cggr import RoutingConfig
from cggr.spec.schedule import ONE, ceil_share, token_count


def test_defaults_are_those_of_cggr_0_5_0_but_for_two():
    assert dataclasses.asdict(RoutingConfig()) == truth.DEFAULTS


def test_an_excess_loss_is_a_rank_unless_another_selection_is_named():
    assert RoutingConfig(scoring="excess_loss").selection == "topk"
    assert RoutingConfig(scoring="excess_loss", selection="importance").selection == "importance"
    assert RoutingConfig(scoring="loss").selection == "importance"
    assert RoutingConfig(scoring=lambda statistics: statistics.nll).selection == "importance"


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("min_tokens_ratio", 0.0, ValueError, "min_tokens_ratio must be in (0, 1], got 0.0."),
        ("min_tokens_ratio", 1.5, ValueError, "min_tokens_ratio must be in (0, 1], got 1.5."),
        (
            "min_tokens_ratio",
            float("nan"),
            ValueError,
            "min_tokens_ratio must be in (0, 1], got nan.",
        ),
        ("min_tokens_ratio", "0.5", TypeError, "min_tokens_ratio must be a number, got '0.5'."),
        ("min_tokens_ratio", True, TypeError, "min_tokens_ratio must be a number, got True."),
        ("max_eligible_ratio", 0, ValueError, "max_eligible_ratio must be in (0, 1], got 0.0."),
        ("max_eligible_ratio", "1", TypeError, "max_eligible_ratio must be a number, got '1'."),
        ("warmup_steps", -1, ValueError, "warmup_steps must be in [0, 2147483647], got -1."),
        ("warmup_steps", 10.0, TypeError, "warmup_steps must be an integer, got 10.0."),
        (
            "threshold_sensitivity",
            1.1,
            ValueError,
            "threshold_sensitivity must be in [0, 1], got 1.1.",
        ),
        ("num_strata", 0, ValueError, "num_strata must be in [1, 256], got 0."),
        ("num_strata", 257, ValueError, "num_strata must be in [1, 256], got 257."),
        (
            "min_tokens_per_sequence",
            -1,
            ValueError,
            "min_tokens_per_sequence must be in [0, 2147483647], got -1.",
        ),
        (
            "importance_floor",
            0.0,
            ValueError,
            "importance_floor must be in [1e-30, 1e30], got 0.0.",
        ),
        ("seed", 2**32, ValueError, "seed must be in [0, 4294967295], got 4294967296."),
        ("seed", True, TypeError, "seed must be an integer, got True."),
        ("dynamic_threshold", 1, TypeError, "dynamic_threshold must be True or False, got 1."),
        ("scope", "row", ValueError, "scope must be one of 'batch', 'sequence', got 'row'."),
        (
            "selection",
            "hardest",
            ValueError,
            (
                "selection must be one of 'topk', 'stratified', 'sequence_aware', 'importance', "
                "'random', 'fixed_quota', got 'hardest'."
            ),
        ),
        (
            "scoring",
            "nonsense",
            ValueError,
            (
                "scoring must be one of 'entropy', 'margin', 'loss', 'combined', 'error_norm', "
                "'excess_loss' or a callable, got 'nonsense'."
            ),
        ),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value(option, value, error, message):
    with pytest.raises(error) as raised:
        RoutingConfig(**{option: value})
    assert str(raised.value) == message


def test_numpy_numbers_are_numbers():
    config = RoutingConfig(min_tokens_ratio=np.float32(0.5), num_strata=np.int64(3))
    assert (config.min_tokens_ratio, config.num_strata) == (0.5, 3)
    assert type(config.num_strata) is int


def test_equal_options_are_equal_keys():
    one, two = RoutingConfig(min_tokens_ratio=0.5), RoutingConfig(min_tokens_ratio=0.5)
    assert {one: 1}[two] == 1
    assert one != RoutingConfig(min_tokens_ratio=0.25)
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 1


def test_presets_are_what_was_raced():
    evidence = Path(__file__).parents[1] / "benchmarks" / "evidence"
    for name, setting, lane in (
        ("completions", "completions", "backward completions"),
        ("noisy", "noise", "backward excess top-k 0.70"),
    ):
        race = tomllib.loads((evidence / f"{setting}.toml").read_text())
        of_lane = race["lanes"][lane]
        options = {}
        if race.get("prompt"):
            options["max_eligible_ratio"] = 1 - race["prompt"]
        config = RoutingConfig.preset(name, **options)
        assert (config.selection, config.min_tokens_ratio) == (
            of_lane["selection"],
            of_lane["ratio"],
        )
        assert config.scoring == race["scoring"] or config.selection == "random"
        assert (config.warmup_steps, config.dynamic_threshold) == (0, False)  # as all lanes
    changed = RoutingConfig.preset("noisy", min_tokens_ratio=0.5, seed=3)
    assert (changed.min_tokens_ratio, changed.seed, changed.selection) == (0.5, 3, "topk")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "pretrain",
            {},
            ValueError,
            "name must be one of 'completions', 'noisy', got 'pretrain'.",
        ),
        (
            "completions",
            {},
            ValueError,
            "max_eligible_ratio must be given with the preset 'completions': the largest ",
        ),
        ("noisy", {"ratio": 1}, TypeError, "unknown option 'ratio'; the options are "),
        (
            "noisy",
            {"min_tokens_ratio": 2},
            ValueError,
            "min_tokens_ratio must be in (0, 1], got 2.0.",
        ),
    ],
)
def test_a_preset_that_cannot_be_had(name, options, error, message):
    with pytest.raises(error) as found:
        RoutingConfig.preset(name, **options)
    assert str(found.value).startswith(message)


CONFIGS = st.fixed_dictionaries(
    {
        "selection": st.sampled_from(truth.SELECTIONS),
        "scope": st.sampled_from(("batch", "sequence")),
        "min_tokens_ratio": st.floats(1e-6, 1.0),
        "max_eligible_ratio": st.just(1.0) | st.floats(1e-6, 1.0),
        "warmup_steps": st.integers(0, 2_000) | st.integers(0, 2**31 - 1),
        "dynamic_threshold": st.booleans(),
        "threshold_sensitivity": st.floats(0, 1),
        "min_tokens_per_sequence": st.integers(0, 20),
    }
)


@example(
    options={
        "selection": "sequence_aware",
        "scope": "sequence",
        "min_tokens_ratio": 0.5,
        "max_eligible_ratio": 1.0,
        "warmup_steps": 0,
        "dynamic_threshold": False,
        "min_tokens_per_sequence": 2,
    },
    step=0,
    batch=0,
    length=2,
)
@given(
    options=CONFIGS,
    step=st.integers(0, 2**31 - 1),
    batch=st.integers(0, 70),
    length=st.integers(0, 300),
)
def test_capacity_is_that_of_the_truth(options, step, batch, length):
    config = RoutingConfig(**options)
    assert config.capacity(step, batch, length) == truth.capacity(options, step, batch, length)


@given(
    eligible_ratio=st.floats(1e-6, 1.0),
    ratio=st.floats(1e-6, 1.0),
    batch=st.integers(1, 70),
    length=st.integers(1, 300),
    scope=st.sampled_from(("batch", "sequence")),
)
def test_all_that_is_selected_of_the_most_that_may_be_eligible_fits(
    eligible_ratio, ratio, batch, length, scope
):
    options = {"warmup_steps": 0, "dynamic_threshold": False, "scope": scope}
    config = RoutingConfig(max_eligible_ratio=eligible_ratio, min_tokens_ratio=ratio, **options)
    size = batch * length if scope == "batch" else length
    n_eligible = int(eligible_ratio * size)
    selected = truth.token_count(n_eligible, max(1, round(ratio * ONE)))
    assert selected <= config.capacity(0, batch, length) <= size


def test_everything_is_selected_where_all_may_be_eligible_alone():
    assert RoutingConfig(min_tokens_ratio=1.0).selects_all
    assert not RoutingConfig(min_tokens_ratio=1.0, max_eligible_ratio=0.5).selects_all
    warm = RoutingConfig(warmup_steps=9)
    assert warm.selects_all_at(0)
    assert not warm.selects_all_at(1)
    assert not warm.selects_all


@given(CONFIGS)
def test_capacity_takes_at_most_four_values_and_never_grows(options):
    config = RoutingConfig(**options)
    steps = sorted({*range(100), *(config.warmup_steps * i // 100 for i in range(102))})
    ratios = [config.capacity_ratio(step) for step in steps]
    assert len(set(ratios)) <= 4
    assert ratios == sorted(ratios, reverse=True)


def test_capacity_refuses_a_negative_step():
    with pytest.raises(ValueError, match=r"step must not be negative, got -1\."):
        RoutingConfig().capacity(-1, 1, 1)


@given(st.integers(0, 2**29), st.integers(1, ONE))
def test_token_count_is_the_ceiling_of_the_share(n, ratio):
    expected = truth.token_count(n, ratio)
    k = token_count(np.array([n], dtype=np.int32), np.array([ratio], dtype=np.int32), xp=np)
    assert k.dtype == np.int32
    assert k.tolist() == [expected]
    assert max(ceil_share(n, ratio), min(n, 1)) == expected
