"""``cggr advise``: what draws are worth to a model, as it is."""

import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from races import SMALL, race, write_book
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from cggr import advise
from cggr.cli import main
from cggr.worth import effective_fraction

LINE = re.compile(
    r"(\S+) on (\S+): ([\d,]+) tokens of loss ([\d.]+), error norm ([\d.]+) ± ([\d.]+)"
)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A folder with a text, a model that has just begun with it, and one that knows it."""
    folder = tmp_path_factory.mktemp("advise")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_book(folder / "book")
        for name, steps in (("begun", 2), ("trained", 150)):
            options = ("--lanes=dense", "--save=dense", f"--name={name}", f"--budget={steps}steps")
            done = race(*SMALL, *options)
            assert done.exit_code == 0, done.output
    return folder


def run(book, model, *options):
    command = ("advise", "--model", book / "runs" / model / "model", "--text", book / "book")
    small = ("--context", 32, "--tokens", 2048, "--device", "cpu")
    return CliRunner().invoke(main, [str(part) for part in (*command, *small, *options)])


def rows(output):
    """The table's numbers, by ratio."""
    found = (line.split() for line in output.splitlines())
    return {
        float(row[0]): [float(x) for x in row[1:]]
        for row in found
        if len(row) == 6 and row[0] != "ratio"
    }


def own_statistics(book, model):
    """Loss and error norm of the same tokens, in float64 by the definition."""
    folder = book / "runs" / model / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    pages = sorted((book / "book").iterdir())
    order = np.random.default_rng(0).permutation(len(pages))
    end = loaded.config.eos_token_id
    ids = [[end, *tokenizer.encode(pages[place].read_text()).ids] for place in order]
    ids_RS = np.concatenate(ids)[:2048].reshape(-1, 32)
    with torch.no_grad():
        logits = loaded(torch.from_numpy(ids_RS)).logits[:, :-1].double().numpy()
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    onehot = np.eye(p.shape[-1])[ids_RS[:, 1:]]
    return -np.log((p * onehot).sum(-1)).ravel(), np.linalg.norm(p - onehot, axis=-1).ravel()


def test_the_table_is_of_the_models_own_errors(book):
    done = run(book, "trained")
    assert done.exit_code == 0, done.output
    nll, norm = own_statistics(book, "trained")
    _, text, n_tokens, *numbers = LINE.search(done.output).groups()
    assert (text, n_tokens) == ("book", f"{len(nll):,}")
    expected = [nll.mean(), norm.mean(), norm.std()]
    assert [float(x) for x in numbers] == pytest.approx(expected, abs=6e-4)
    found = rows(done.output)
    assert tuple(found) == advise.RATIOS
    for ratio, (worth, backward, backward_gain, token, token_gain) in found.items():
        exact = effective_fraction(norm, ratio, importance=norm + 0.05)
        assert worth == pytest.approx(exact, abs=6e-3)
        assert backward == pytest.approx((1 + 2 * ratio) / 3, abs=6e-3)
        assert token == pytest.approx((1 + 3 * ratio) / 3, abs=6e-3)
        assert backward_gain == pytest.approx(exact / ((1 + 2 * ratio) / 3), abs=6e-3)
        assert token_gain == pytest.approx(exact / ((1 + 3 * ratio) / 3), abs=6e-3)


def test_draws_pay_for_a_model_that_knows_most_tokens(book):
    done = run(book, "trained")
    gains = {ratio: row[2] for ratio, row in rows(done.output).items()}
    best = max(gains, key=gains.get)
    assert gains[best] > 1.2
    said = " ".join(done.output.split())
    assert f"At most {gains[best]:.2f} times what dense training learns per operation" in said
    assert f"scoring='error_norm', min_tokens_ratio={best:g}." in said


def test_they_do_not_for_one_that_has_begun(book):
    done = run(book, "begun")
    assert "Train densely" in done.output
    assert max(row[2] for row in rows(done.output).values()) < advise.LEAST_GAIN


def test_other_scores_draw_and_the_error_norm_tells_their_worth(book):
    done = run(book, "trained", "--scoring", "entropy", "--importance-floor", "0.5")
    found, best = rows(done.output), rows(run(book, "trained").output)
    assert all(found[ratio][0] <= best[ratio][0] for ratio in found)
    assert found[0.25][0] < best[0.25][0] - 0.02


def test_a_floor_above_all_scores_is_a_uniform_draw(book):
    found = rows(run(book, "trained", "--importance-floor", "1e6").output)
    assert {ratio: row[0] for ratio, row in found.items()} == pytest.approx(
        {ratio: ratio for ratio in found}, abs=6e-3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", 100_000), "--context 100000: the text has "),
        (("--importance-floor", 0), "Invalid value for '--importance-floor'"),
        (("--scoring", "excess_loss"), "Invalid value for '--scoring'"),
    ],
)
def test_bad_input_is_one_line(book, options, message):
    done = run(book, "trained", *options)
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.splitlines()) == 1


def test_scores_that_are_not_finite_are_refused(book, monkeypatch):
    load = advise.load_folder

    def broken(*arguments):
        model = load(*arguments)
        model.lm_head.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(advise, "load_folder", broken)
    done = run(book, "begun")
    assert done.exit_code == 2
    assert "its scores of this text are not finite" in done.output
