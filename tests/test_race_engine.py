"""Clocks and turns, with lanes that train nothing and a clock that does not tick by itself."""

import numpy as np
import pytest

from cggr.race import engine
from cggr.race.settings import Budget, RaceError, RaceSettings

SPEED = {"dense": 0.25, "random": 0.05, "cggr": 0.125}  # seconds per step
EVALUATION = 1000.0


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeLane:
    """Takes fixed times; its loss is 8 minus the steps it has made."""

    def __init__(self, name, clock, journal, stop_after=None):
        self.name = name
        self.clock = clock
        self.journal = journal
        self.stop_after = stop_after
        self.steps = 0
        self.pending = 0.0

    def train_step(self, batch, learning_rate):
        if self.steps == self.stop_after:
            raise KeyboardInterrupt
        self.steps += 1
        self.journal.append((self.name, batch, learning_rate))
        # Half of the step is done at once, half is left to the device.
        self.clock.now += SPEED[self.name] / 2
        self.pending += SPEED[self.name] / 2

    def synchronize(self):
        self.clock.now += self.pending
        self.pending = 0.0

    def begin_turn(self):
        pass

    def end_turn(self):
        pass

    def tokens_per_step(self):
        return 7

    def peak_memory(self):
        return 1000 + self.steps

    def evaluate(self):
        if self.stop_after == -1:
            raise KeyboardInterrupt
        self.clock.now += EVALUATION
        return 8.0 - self.steps


class Race:
    def __init__(self, budget, *, stop=None, stop_after=None, **options):
        self.clock = FakeClock()
        self.journal = []
        self.made = []
        self.settings = RaceSettings(budget=Budget.parse(budget), **options)

        def make_lane(name, seed):
            racing = self.made.count((name, seed)) == 1  # the first one only warms up
            self.made.append((name, seed))
            journal = self.journal if racing else []
            after = stop_after if racing and (name, seed) == stop else None
            return FakeLane(name, self.clock, journal, after)

        self.runs = engine.run_race(
            self.settings,
            make_lane=make_lane,
            make_batches=lambda seed: lambda step: np.full((2, 3), 100 * seed + step),
            clock=self.clock,
        )

    def run(self, lane, seed=0):
        return next(run for run in self.runs if (run.lane, run.seed) == (lane, seed))

    def of(self, lane):
        return [entry[1:] for entry in self.journal if entry[0] == lane]


def test_only_training_is_charged():
    race = Race("20steps")
    for lane, seconds in SPEED.items():
        run = race.run(lane)
        assert run.complete
        assert run.steps == 20
        # Ten evaluations of 1,000 seconds have gone by, and none of the others' steps count.
        assert run.seconds == pytest.approx(20 * seconds)
        assert [point.steps for point in run.curve] == list(range(0, 21, 2))
        assert [point.loss for point in run.curve] == [8.0 - step for step in range(0, 21, 2)]
        assert run.curve[-1].tokens_seen == 20 * 6
        assert run.curve[-1].tokens_trained == 20 * 7
        assert run.curve[-1].tokens_per_second == pytest.approx(6 / seconds)
        assert run.peak_memory == 1020


def test_a_time_budget_gives_each_lane_its_time():
    race = Race("40s")
    for lane, seconds in SPEED.items():
        run = race.run(lane)
        # The device may still be busy when a turn ends by the host's clock.
        assert run.seconds == pytest.approx(40, abs=1.1)
        assert run.steps * seconds == pytest.approx(run.seconds)
        assert len(run.curve) == 11


def test_work_that_is_left_to_the_device_is_charged_to_the_lane_that_left_it():
    race = Race("8steps", lanes=("dense", "cggr"))
    assert race.run("dense").seconds == pytest.approx(8 * SPEED["dense"])
    assert race.run("cggr").seconds == pytest.approx(8 * SPEED["cggr"])


def test_every_lane_gets_the_same_batches_in_the_same_order():
    race = Race("30steps", seeds=2)
    expected = [np.full((2, 3), 100 * seed + step) for seed in range(2) for step in range(30)]
    for lane in SPEED:
        assert np.array_equal([batch for batch, _ in race.of(lane)], expected)


def test_lanes_take_turns():
    race = Race("60s", lanes=("dense", "random"))
    spent = {"dense": 0.0, "random": 0.0}
    for lane, *_ in race.journal:
        spent[lane] += SPEED[lane]
        assert abs(spent["dense"] - spent["random"]) < 4 * engine.TURN_SECONDS
    changes = sum(a[0] != b[0] for a, b in zip(race.journal, race.journal[1:], strict=False))
    assert changes > 20


def test_lanes_warm_up_on_copies_that_are_thrown_away():
    race = Race("4steps", seeds=2)
    assert race.made[:6] == [(lane, 0) for lane in SPEED] * 2
    assert len(race.of("dense")) == 8  # two seeds of four steps, the warm-up aside


def test_the_learning_rate_decays_over_the_budget():
    for budget in ("200steps", "30s"):
        rates = [rate for _, rate in Race(budget, learning_rate=0.5).of("cggr")]
        assert rates[0] == pytest.approx(0.05)
        assert max(rates) == pytest.approx(0.5, rel=0.03)
        peak = rates.index(max(rates))
        assert 0 < peak <= 0.07 * len(rates)
        assert sorted(rates[:peak]) == rates[:peak]
        assert sorted(rates[peak:], reverse=True) == rates[peak:]
        assert 0 <= rates[-1] < 0.02


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.2), (0.025, 1.1), (0.05, 2.0), (0.525, 1.0), (1.0, 0.0), (1.5, 0.0)],
)
def test_schedule_endpoints(progress, expected):
    assert engine.learning_rate(progress, 2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("budget", "every", "expected"),
    [
        ("1step", None, [0, 1]),
        ("6steps", None, [0, 1, 2, 3, 4, 5, 6]),
        ("12steps", None, [0, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]),
        ("100steps", "30steps", [0, 30, 60, 100]),
        ("100steps", "40steps", [0, 40, 80, 100]),
        ("100steps", "100steps", [0, 100]),
    ],
)
def test_when_evaluations_happen(budget, every, expected):
    every = None if every is None else Budget.parse(every)
    race = Race(budget, lanes=("random",), eval_every=every)
    assert [point.steps for point in race.run("random").curve] == expected


@pytest.mark.parametrize("steps", range(1, 64))
def test_the_last_evaluation_is_at_the_end(steps):
    curve = Race(f"{steps}steps", lanes=("random",)).run("random").curve
    assert curve[-1].steps == steps
    assert len(curve) == min(steps, 10) + 1


def test_ctrl_c_keeps_what_was_measured():
    race = Race("40s", stop=("cggr", 0), stop_after=100)
    assert [run.complete for run in race.runs] == [False, False, False]
    for run in race.runs:
        # 100 steps are 12.5 of 40 seconds: three evaluations and the first.
        assert len(run.curve) == 4
        assert run.curve[-1].seconds == pytest.approx(12, abs=1)


def test_ctrl_c_in_the_second_seed_keeps_the_first():
    race = Race("20steps", seeds=3, stop=("dense", 1), stop_after=0)
    assert [(run.seed, run.complete) for run in race.runs] == [(0, True)] * 3 + [(1, False)] * 3


@pytest.mark.parametrize("seed", [0, 1])
def test_ctrl_c_in_the_evaluation_before_a_seed_leaves_no_run_without_a_point(seed):
    race = Race("20steps", seeds=3, stop=("dense", seed), stop_after=-1)
    assert [(run.seed, run.complete) for run in race.runs] == [(0, True)] * 3 * seed
    assert all(run.curve for run in race.runs)


def test_a_budget_shorter_than_a_step():
    with pytest.raises(RaceError) as error:
        Race("0.2s")
    assert str(error.value) == (
        "--budget 0.2s ends before the first evaluation: one training step of lane dense takes "
        "0.25 seconds"
    )
