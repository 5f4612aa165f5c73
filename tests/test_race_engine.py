"""Clocks and turns, with lanes that train nothing and a clock that does not tick by itself."""

import itertools
import math

import numpy as np
import pytest

from cggr.race import engine
from cggr.race.settings import Budget, RaceError, RaceSettings
from cggr.race.tokens import Batch

SPEED = {"dense": 0.25, "random": 0.05, "cggr": 0.125}  # seconds per step
SIZES = {"dense": 2, "random": 4, "cggr": 8}  # sequences of a batch, where they differ
EVALUATION = 1000.0


def batch_of(ids):
    return Batch(ids, ids)


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeLane:
    """Takes fixed times; its loss is 8 minus the steps it has made, or what it is given."""

    def __init__(self, name, clock, journal, stop_after=None, loss_of=None):
        self.name = name
        self.clock = clock
        self.journal = journal
        self.stop_after = stop_after
        self.loss_of = loss_of
        self.steps = self.asked = 0
        self.peak = 0.0
        self.pending = 0.0

    def train_step(self, batch, learning_rate):
        if self.steps == self.stop_after:
            raise KeyboardInterrupt
        self.steps += 1
        self.peak = max(self.peak, learning_rate)
        self.journal.append((self.name, batch.ids, learning_rate))
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

    def tokens_trained(self):
        trained, self.asked = 7 * (self.steps - self.asked), self.steps
        return trained

    def peak_memory(self):
        return 1000 + self.steps

    def evaluate(self):
        if self.stop_after == -1:
            raise KeyboardInterrupt
        self.clock.now += EVALUATION
        if self.loss_of is not None and self.steps:
            return self.loss_of[self.name, round(self.peak, 6)]
        return 8.0 - self.steps


class Race:
    def __init__(
        self, budget, *, stop=None, stop_after=None, loss_of=None, done=(), finished=None, **options
    ):
        self.clock = FakeClock()
        self.journal = []
        self.made = []
        self.settings = RaceSettings(budget=Budget.parse(budget), **options)

        def make_lane(name, seed):
            racing = self.made.count((name, seed)) % 2 == 1  # the first of two only warms up
            self.made.append((name, seed))
            journal = self.journal if racing else []
            after = stop_after if racing and (name, seed) == stop else None
            return FakeLane(name, self.clock, journal, after, loss_of)

        self.runs = engine.run_race(
            self.settings,
            make_lane=make_lane,
            make_batches=lambda seed, lane: (
                lambda step: batch_of(np.full((2, 3), 100 * seed + step))
            ),
            clock=self.clock,
            done=done,
            **({} if finished is None else {"finished": finished}),
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


RATES = (0.4, 0.1, 0.2)
TUNED = {
    ("dense", 0.4): math.nan,
    ("dense", 0.1): 3.0,
    ("dense", 0.2): 4.0,
    ("cggr", 0.4): 2.0,
    ("cggr", 0.1): math.inf,
    ("cggr", 0.2): 5.0,
}


def keys(runs):
    return [(run.lane, run.seed, run.learning_rate) for run in runs]


def tuned(**options):
    return Race("20steps", lanes=("dense", "cggr"), learning_rates=RATES, loss_of=TUNED, **options)


def test_the_first_seed_finds_a_lanes_learning_rate_for_the_others():
    race = tuned(seeds=3)
    wanted = [("dense", 0, rate) for rate in RATES]
    wanted += [("dense", 1, 0.1), ("dense", 2, 0.1)]
    wanted += [("cggr", 0, rate) for rate in RATES]
    wanted += [("cggr", 1, 0.4), ("cggr", 2, 0.4)]
    assert keys(race.runs) == wanted
    assert all(run.complete and run.steps == 20 for run in race.runs)
    # What a step is given follows the run's own rate, and its seed's batches.
    for index, (lane, seed, rate) in enumerate(wanted):
        steps = race.journal[20 * index :][:20]
        assert {name for name, *_ in steps} == {lane}
        assert max(given for *_, given in steps) == pytest.approx(rate)
        assert [ids[0, 0] for _, ids, _ in steps] == list(range(100 * seed, 100 * seed + 20))


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({0.1: 3.0, 0.2: 2.0, 0.4: 4.0}, 0.2),
        ({0.4: 3.0, 0.2: 3.0}, 0.2),
        ({0.1: math.nan, 0.2: 9.0}, 0.2),
        ({0.2: 9.0, 0.1: math.nan}, 0.2),
        ({0.1: math.inf, 0.2: 9.0}, 0.2),
        ({0.4: float("nan"), 0.1: float("nan"), 0.2: float("nan")}, 0.1),
        # results.json has null for both: what is best must not change with --resume.
        ({0.4: math.inf, 0.1: math.nan}, 0.1),
    ],
)
def test_the_best_learning_rate(losses, best):
    def run(rate, loss):
        run = engine.Run("dense", 0, rate)
        run.curve = [run.now(1.0), run.now(loss)]
        return run

    assert engine.best_rate([run(rate, loss) for rate, loss in losses.items()]) == best


def test_compiled_lanes_race_one_after_the_other():
    for compiled in (False, True):
        race = Race("60s", seeds=2, compiled=compiled)
        order = [name for name, _ in itertools.groupby(race.journal, key=lambda entry: entry[0])]
        assert (order == list(SPEED)) == compiled
        if compiled:
            wanted = [(lane, seed, 6e-3) for lane in SPEED for seed in range(2)]
            assert keys(race.runs) == wanted
            assert race.made == [key[:2] for key in wanted for _ in range(2)]


def test_ctrl_c_between_lanes_that_race_one_after_the_other():
    race = tuned(seeds=2, stop=("cggr", 1), stop_after=5)
    assert keys(race.runs)[-2:] == [("cggr", 0, 0.2), ("cggr", 1, 0.4)]
    assert [run.complete for run in race.runs] == [True] * 7 + [False]


def test_what_is_done_is_not_run_again():
    before = tuned(seeds=2).runs
    again = tuned(seeds=2, done=before)
    assert again.made == []
    assert again.runs == before
    # More seeds have the rates that were found; what was cut off starts anew.
    before[-1].complete = False
    more = tuned(seeds=3, done=before)
    assert keys(more.runs) == [
        *keys(before[:-1]),
        ("dense", 2, 0.1),
        ("cggr", 1, 0.4),
        ("cggr", 2, 0.4),
    ]
    assert more.runs[:-3] == before[:-1]
    assert more.made == [key for key in (("dense", 2), ("cggr", 1), ("cggr", 2)) for _ in range(2)]


def test_a_lane_more_races_alone():
    before = Race("20steps", lanes=("dense", "cggr"), seeds=2)
    more = Race("20steps", seeds=2, done=before.runs)
    assert keys(more.runs) == [*keys(before.runs), ("random", 0, 6e-3), ("random", 1, 6e-3)]
    assert {name for name, *_ in more.journal} == {"random"}


@pytest.mark.parametrize("options", [{}, {"learning_rates": (0.1, 0.2)}])
def test_a_run_is_told_of_when_it_has_ended(options):
    told = []

    def finished(run, lane, runs):
        assert run in runs
        assert run.complete
        assert run.curve[-1].steps == lane.steps == 20
        told.append((lane.name, run.seed, run.learning_rate))
        # A run that has not ended yet has the points that were measured.
        assert sum(run.complete for run in runs) == len(told)
        assert all(run.curve for run in runs)

    race = Race("20steps", seeds=2, finished=finished, **options)
    assert sorted(told) == sorted(keys(race.runs))
    assert len(told) == (6 if not options else 9)


def test_a_lane_gets_the_batches_that_are_made_for_it():
    made = []

    def make_batches(seed, lane):
        made.append((seed, lane))
        return lambda step: batch_of(np.full((SIZES[lane], 3), step))

    clock = FakeClock()
    runs = engine.run_race(
        RaceSettings(budget=Budget.parse("10steps"), seeds=2),
        make_lane=lambda name, seed: FakeLane(name, clock, []),
        make_batches=make_batches,
        clock=clock,
    )
    assert made == [(seed, lane) for seed in range(2) for lane in SPEED]
    for run in runs:
        assert run.tokens_seen == 10 * 3 * SIZES[run.lane]
