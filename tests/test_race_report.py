"""What is said about a race: numbers, sentences, files."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from cggr.race import figure, report, summary
from cggr.race.engine import Evaluation, Run
from cggr.race.settings import DEFAULT_LANES as LANES
from cggr.race.settings import Budget, RaceError, RaceSettings
from cggr.race.tokens import Corpus

CORPUS = Corpus(np.zeros(5000, np.int32), np.zeros(101, np.int32), 200, 300, 0)
FINAL = {"dense": (3.0, 3.2, 3.1), "random": (3.3, 3.1, 3.5), "cggr": (2.9, 3.3, 2.8)}


def make_settings(seeds=1, **options):
    return RaceSettings(budget=Budget(40, "seconds"), seeds=seeds, **options)


def make_run(lane, seed, losses, complete=True, rate=6e-3):
    """Evaluations ten seconds apart, of which the last is `complete` at 40 seconds."""
    curve = [
        Evaluation(10.0 * i + 0.1 * seed * (i > 0), 100 * i, 1000 * i, 250 * i, loss)
        for i, loss in enumerate(losses)
    ]
    return Run(lane, seed, rate, complete=complete, peak_memory=None, curve=curve)


def make_runs(seeds=3, lanes=LANES):
    return [
        make_run(lane, seed, [8.0, 6.0 + seed, 5.0, 4.0, FINAL[lane][seed]])
        for seed in range(seeds)
        for lane in lanes
    ]


def test_means_and_spreads_are_those_of_numpy():
    found = summary.summarize(make_runs())
    assert [item.lane for item in found] == list(LANES)
    for item in found:
        assert item.loss == pytest.approx(np.mean(FINAL[item.lane]))
        assert np.array_equal(item.final("loss"), FINAL[item.lane])
        expected = np.array(
            [[8.0, 6.0 + seed, 5.0, 4.0, FINAL[item.lane][seed]] for seed in (0, 1, 2)]
        )
        assert np.array_equal(item.points("loss"), expected)
        assert np.allclose(item.points("seconds").mean(0), [0, 10.1, 20.1, 30.1, 40.1])


def test_a_seed_that_was_cut_off_does_not_count_beside_a_complete_one():
    runs = make_runs(seeds=1)
    runs += [make_run(lane, 1, [8.0, 7.0], complete=False) for lane in LANES]
    for item in summary.summarize(runs):
        assert item.final("loss").tolist() == [FINAL[item.lane][0]]


def test_a_single_seed_that_was_cut_off_is_compared_where_all_lanes_have_been():
    runs = [
        make_run("dense", 0, [8.0, 6.0, 5.0], complete=False),
        make_run("cggr", 0, [8.0, 5.5], complete=False),
    ]
    found = summary.summarize(runs)
    assert [item.loss for item in found] == [6.0, 5.5]
    assert summary.budget_in_words(found, make_settings()) == "10 of 40 s per lane, 1 seed"


def test_a_seed_with_fewer_evaluations_keeps_its_last():
    runs = [make_run("dense", 0, [8, 6, 5, 4, 3.0]), make_run("dense", 1, [8, 5, 3.5])]
    (found,) = summary.summarize(runs)
    assert found.points("loss").tolist() == [[8, 6, 3.0], [8, 5, 3.5]]


def test_a_lane_is_shown_at_its_best_learning_rate():
    runs = [
        make_run("dense", 0, [8.0, math.nan], rate=0.1),
        make_run("dense", 0, [8.0, 4.0], rate=0.2),
        make_run("dense", 1, [8.0, 4.5], rate=0.2),
        make_run("cggr", 0, [8.0, 3.0], rate=0.1),
        make_run("cggr", 0, [8.0, 3.5], rate=0.2),
        make_run("cggr", 1, [8.0, 9.0], rate=0.1),
        make_run("cggr", 1, [8.0, 1.0], rate=0.2),  # which was the best before there was 0.1
    ]
    dense, cggr = summary.summarize(runs)
    assert dense.final("loss").tolist() == [4.0, 4.5]
    assert cggr.final("loss").tolist() == [3.0, 9.0]  # the other seeds choose nothing


def test_lanes_that_raced_one_after_the_other_are_compared_by_the_seeds_of_all():
    runs = [make_run("cggr", seed, [8.0, 3.0 + seed]) for seed in range(3)]
    runs += [make_run("dense", seed, [8.0, 4.0]) for seed in range(2)]
    found = summary.summarize(runs)
    assert [len(item.curves) for item in found] == [2, 2]
    assert summary.verdict(found, make_settings(seeds=3))[1] == (
        "cggr beats dense by 0.500 (in 1 of 2 seeds)."
    )
    # A lane that was cut off in its first seed is compared where it was.
    runs[3:] = [make_run("dense", 0, [8.0], complete=False)]
    assert [(item.lane, item.loss) for item in summary.summarize(runs)] == [
        ("cggr", 8.0),
        ("dense", 8.0),
    ]


@pytest.mark.parametrize(
    ("final", "sentence"),
    [
        (
            {"dense": 3.300, "random": 3.4, "cggr": 3.412},
            "cggr loses to dense by 0.112; cggr loses to random by 0.012.",
        ),
        (
            {"dense": 3.300, "random": 3.0, "cggr": 3.2},
            "cggr beats dense by 0.100; cggr loses to random by 0.200.",
        ),
        ({"dense": 3.0, "cggr": 3.0}, "cggr ties with dense."),
        ({"dense": math.nan, "cggr": 3.0}, "cggr against dense: a loss is not finite."),
    ],
)
def test_the_verdict_is_honest(final, sentence):
    runs = [make_run(lane, 0, [8.0, 5.0, 5.0, 5.0, loss]) for lane, loss in final.items()]
    lines = summary.verdict(summary.summarize(runs), make_settings())
    assert lines[1] == sentence
    assert lines[2] == "One seed does not show how much of this is chance: --seeds 3 does."


def test_the_verdict_ranks_the_lanes_and_counts_the_seeds():
    lines = summary.verdict(summary.summarize(make_runs()), make_settings(seeds=3))
    assert lines == [
        (
            "Held-out loss at equal time (40 s per lane, 3 seeds): cggr 3.000, dense 3.100, "
            "random 3.300."
        ),
        (
            "cggr beats dense by 0.100 (in 2 of 3 seeds); cggr beats random by 0.300 "
            "(in 2 of 3 seeds)."
        ),
    ]


def test_a_lane_that_diverged_ranks_last():
    runs = [make_run("dense", 0, [8.0, math.nan]), make_run("random", 0, [8.0, 9.0])]
    lines = summary.verdict(summary.summarize(runs), make_settings())
    assert lines[0].endswith("random 9.000, dense nan.")


def write(folder, runs, settings):
    found = report.results(
        runs,
        settings,
        CORPUS,
        text={"source": "a book"},
        models={},
        environment={"git_commit": None},
    )
    output = io.StringIO()
    console = Console(file=output, width=80)
    report.write_results(folder / "results.json", found)
    report.write_report(folder, runs, settings, CORPUS, "one line", console)
    return json.loads((folder / "results.json").read_text()), output.getvalue()


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_fits_80_columns_and_is_saved_as_printed(tmp_path, seeds):
    _, printed = write(tmp_path, make_runs(seeds), make_settings(seeds))
    table = [line for line in printed.splitlines() if line.strip() and not line.endswith(".")]
    rows = {line.split()[0]: line.split() for line in table}
    assert max(map(len, table)) <= 80
    assert "…" not in printed
    spread = [f"±{np.std(FINAL['cggr'], ddof=1):.3f}"] if seeds == 3 else []
    loss = "3.000" if seeds == 3 else "2.900"
    against = "-0.100"
    bits = f"{float(loss) * 100 / (np.log(2) * 200):.3f}"
    expected = [loss, *spread, bits, against, "400", "4.0k", "1.0k"]
    assert rows["cggr"][1 : len(expected) + 1] == expected
    saved = (tmp_path / "table.txt").read_text()
    assert [line.split() for line in saved.splitlines()] == [
        line.split() for line in printed.splitlines()
    ]


def test_results_hold_the_whole_curves(tmp_path):
    runs = make_runs()
    found, _ = write(tmp_path, runs, make_settings(seeds=3))
    named = {"schema", "complete", "settings", "text", "models_sha256", "git_commit", "runs"}
    assert set(found) == named
    assert found["complete"] is True
    assert found["text"]["training_tokens"] == 5000
    assert found["text"]["heldout_tokens"] == 101
    assert len(found["runs"]) == 9
    for run, saved in zip(runs, found["runs"], strict=True):
        assert (saved["lane"], saved["seed"], saved["complete"]) == (run.lane, run.seed, True)
        assert saved["learning_rate"] == 6e-3
        assert [point["loss"] for point in saved["curve"]] == [point.loss for point in run.curve]
        assert set(saved["curve"][0]) == {
            "seconds",
            "steps",
            "tokens_seen",
            "tokens_trained",
            "loss",
            "bits_per_byte",
        }


def test_a_race_with_missing_seeds_is_not_complete(tmp_path):
    found, _ = write(tmp_path, make_runs(seeds=2), make_settings(seeds=3))
    assert found["complete"] is False


def test_a_tuned_race_is_complete_with_all_rates_and_all_seeds_at_the_best(tmp_path):
    settings = make_settings(seeds=2, lanes=("dense",), learning_rates=(0.1, 0.2))
    runs = [make_run("dense", 0, [8.0, loss], rate=rate) for rate, loss in ((0.1, 4), (0.2, 3))]
    wrong, right = (make_run("dense", 1, [8.0, 3.0], rate=rate) for rate in (0.1, 0.2))
    for found, complete in (
        (runs, False),
        ([*runs, wrong], False),
        ([*runs, right], True),
        ([runs[1], right], False),
        ([*runs, make_run("dense", 1, [8.0, 3.0], rate=0.2, complete=False)], False),
    ):
        assert write(tmp_path, found, settings)[0]["complete"] is complete
    # Gone on with without them: the seeds race at the usual rate, whatever was best before.
    settings = make_settings(seeds=2, lanes=("dense",))
    for n_seeds, complete in ((1, False), (2, True)):
        found = runs + [make_run("dense", seed, [8.0, 3.5]) for seed in range(n_seeds)]
        assert write(tmp_path, found, settings)[0]["complete"] is complete


def test_runs_of_other_seeds_do_not_make_up_for_a_lane(tmp_path):
    runs = make_runs(seeds=3, lanes=("dense",))
    assert write(tmp_path, runs, make_settings(lanes=("dense", "cggr")))[0]["complete"] is False


def test_complete_runs_are_read_back_as_they_were(tmp_path):
    settings = make_settings(seeds=2, lanes=("dense", "cggr"))
    runs = [
        dataclasses.replace(
            make_run(lane, seed, [8.0, 5.0, loss]),
            seconds=20 + 0.1 * seed,
            steps=200,
            tokens_seen=2000,
            tokens_trained=500,
            peak_memory=2**30 + seed,
        )
        for lane, seed, loss in (("dense", 0, 4.0), ("cggr", 0, math.nan), ("dense", 1, 3.0))
    ]
    cut_off = make_run("cggr", 1, [8.0, 5.0], complete=False)
    file = tmp_path / "results.json"
    here = {"machine": {"gpu": "A card"}, "versions": {"torch": "2"}}
    given = {"models": {"model": "123"}, "environment": here}
    report.write_results(
        file, report.results([*runs, cut_off], settings, CORPUS, text={"sha256": "abc"}, **given)
    )
    again = report.earlier_runs(file, settings, "abc", **given)
    assert repr(again) == repr(runs)  # NaN is not equal to itself
    for other, message in (
        ({"environment": here | {"machine": {"gpu": None}}}, "gpu 'A card', not None"),
        ({"environment": here | {"versions": {"torch": "3"}}}, "versions {'torch': '2'}, not "),
        ({"models": {"model": "4"}}, "weights of {'model': '123'}, not {'model': '4'}"),
    ):
        with pytest.raises(RaceError, match=f"of a race with {message}"):
            report.earlier_runs(file, settings, "abc", **given | other)
    for changed, message in (
        ({"lanes": ("cggr", "random")}, "lane dense has raced, whose results would be lost"),
        ({"seeds": 3}, None),
        ({"lanes": ("dense", "cggr", "random")}, None),
    ):
        wanted = dataclasses.replace(settings, **changed)
        if message is None:
            assert len(report.earlier_runs(file, wanted, "abc", **given)) == 3
        else:
            with pytest.raises(RaceError, match=message):
                report.earlier_runs(file, wanted, "abc", **given)
    assert report.earlier_runs(tmp_path / "none.json", settings, "abc", **given) == []
    for content in ("{}", "[]", '{"schema": 1}'):
        file.write_text(content)
        with pytest.raises(RaceError, match="holds no results of schema 2"):
            report.earlier_runs(file, settings, "abc", **given)


def test_a_loss_that_is_not_a_number_is_null_and_still_drawn(tmp_path):
    runs = [make_run("dense", 0, [8.0, math.nan]), make_run("cggr", 0, [8.0, 5.0])]
    found, _ = write(tmp_path, runs, make_settings())
    assert found["runs"][0]["curve"][1]["loss"] is None
    assert found["runs"][0]["curve"][1]["bits_per_byte"] is None
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_race_cut_off_before_any_training_is_reported(tmp_path):
    runs = [make_run(lane, 0, [8.0], complete=False) for lane in LANES]
    found, printed = write(tmp_path, runs, make_settings())
    assert found["complete"] is False
    assert "0 of 40 s per lane" in printed
    assert (tmp_path / "report.png").exists()


def test_the_picture_shows_every_lane_in_its_colour(tmp_path):
    for lanes in (LANES, ("dense", "cggr")):
        figure.draw(
            summary.summarize(make_runs(lanes=lanes)),
            make_settings(seeds=3),
            "one line",
            tmp_path / "report.png",
        )
        pixels = (image.imread(tmp_path / "report.png")[..., :3] * 255).round().astype(int)
        for lane, (color, _) in figure.STYLES.items():
            rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            seen = int((abs(pixels - rgb).max(-1) <= 2).sum())
            assert (seen > 500) == (lane in lanes), lane


def test_lanes_of_any_name_have_styles_of_their_own(tmp_path):
    many = ["cggr", "dense", *(f"lane {i}" for i in range(40))]
    styles = figure._styles(many)
    assert list(styles) == many
    assert len(set(styles.values())) == len(many)
    for lane in ("cggr", "dense"):  # as in every other picture
        assert styles[lane] == figure.STYLES[lane]
    # The first take what the built-in lanes leave, whose colours can be told apart.
    assert styles["lane 0"] == figure.STYLES["random"]
    assert figure._styles(["lane 0"])["lane 0"] == figure.STYLES["dense"]

    names = ("dense", "half, or [less]", "wide")
    runs = [make_run(name, 0, [8.0, 5.0, 4.0 + i]) for i, name in enumerate(names)]
    settings = make_settings(lanes=names, tables={name: {} for name in names})
    found, printed = write(tmp_path, runs, settings)
    assert [run["lane"] for run in found["runs"]] == list(names)
    assert printed.count("half, or [less]") == 2  # in the table and in the verdict
    pixels = (image.imread(tmp_path / "report.png")[..., :3] * 255).round().astype(int)
    for color, _ in figure._styles(names).values():
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(-1) <= 2).sum() > 500
