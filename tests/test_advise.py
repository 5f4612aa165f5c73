"""``cggr advise``: what draws are worth to a model, as it is."""

import re

import models
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from races import SMALL, race, write_book
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from cggr import advise
from cggr.cli import main
from cggr.spec import RoutingConfig
from cggr.worth import effective_fraction, operations

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
        if len(row) == 7 and row[0] != "ratio"
    }


def own_statistics(book, model):
    """Loss and error norm of the same tokens, in float64 by the definition."""
    folder = book / "runs" / model / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    size, end = advise.PIECE * 32, loaded.config.eos_token_id
    texts = [page.read_text() for page in sorted((book / "book").iterdir())]
    pieces = [(text, i) for text in texts for i in range(0, len(text), size)]
    assert len(pieces) > 2 * len(texts)
    ids = []
    for place in np.random.default_rng(0).permutation(len(pieces)):
        text, begin = pieces[place]
        start = [] if begin else [end]
        ids.append(start + tokenizer.encode(text[begin : begin + size]).ids)
    ids_RS = np.concatenate(ids)[:2048].reshape(-1, 32)
    with torch.no_grad():
        logits = loaded(torch.from_numpy(ids_RS)).logits[:, :-1].double().numpy()
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    onehot = np.eye(p.shape[-1])[ids_RS[:, 1:]]
    return -np.log((p * onehot).sum(-1)), np.linalg.norm(p - onehot, axis=-1)


def test_the_table_is_of_the_models_own_errors(book):
    done = run(book, "trained")
    assert done.exit_code == 0, done.output
    nll, norm = own_statistics(book, "trained")
    _, text, n_tokens, *numbers = LINE.search(done.output).groups()
    assert (text, n_tokens) == ("book", f"{nll.size:,}")
    expected = [nll.mean(), norm.mean(), norm.std()]
    assert [float(x) for x in numbers] == pytest.approx(expected, abs=6e-4)
    found = rows(done.output)
    assert tuple(found) == advise.RATIOS
    config = AutoModelForCausalLM.from_pretrained(book / "runs" / "trained" / "model").config
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    # Of a layer and token: queries, keys, values and outputs, and the others; a window has 32.
    attention = heads * config.head_dim * 32
    layer = 4 * width**2 + 3 * width * inner + attention
    head = config.vocab_size * width / config.num_hidden_layers
    of_all = (2 * width**2 + attention) / (layer + head)
    for ratio, columns in found.items():
        for split, scope in (("backward", "batch"), ("token", "sequence")):
            worth = effective_fraction(norm, ratio, importance=norm + 0.05, scope=scope)
            part = (
                operations(ratio, split, of_all=of_all)
                if split == "backward"
                else (1 + 3 * ratio) / 3
            )
            own, columns = columns[:3], columns[3:]
            assert own == pytest.approx([worth, part, worth / part], abs=6e-3)


def test_draws_pay_for_a_model_that_knows_most_tokens(book):
    done = run(book, "trained")
    gains = {ratio: row[2] for ratio, row in rows(done.output).items()}
    best = max(gains, key=gains.get)
    assert gains[best] > 1.2
    said = " ".join(done.output.split())
    assert f"about {gains[best]:.2f} times what dense training learns per operation" in said
    given = re.search(r"by (split='backward', .*), after the warm-up", said)[1]
    options = eval(f"dict({given})")
    split = options.pop("split")
    assert split == "backward"
    config = RoutingConfig(**options, warmup_steps=0)
    assert config.min_tokens_ratio == best
    assert config.capacity_ratio(0) == config.capacity_ratio(10**6)


def test_they_do_not_for_one_that_has_begun(book):
    said = " ".join(run(book, "begun").output.split())
    assert "Train densely" in said
    assert "Ask again when it knows more of this text." in said
    assert max(row[2] for row in rows(run(book, "begun").output).values()) < advise.LEAST_GAIN


def test_a_floor_that_spoils_it_is_named(book):
    said = " ".join(run(book, "trained", "--importance-floor", 20).output.split())
    assert "Train densely" in said
    assert "With draws by error_norm and a small floor it would be 1." in said
    said = " ".join(run(book, "trained", "--importance-floor", 0.01).output.split())
    assert "importance_floor=0.01" in said


@pytest.mark.parametrize(
    ("name", "of_keys"),
    # Heads that share keys and values have fewer of them; GPT-2 makes the queries beside them.
    [("llama", "kv"), ("gpt2", "qkv"), ("gptj", "kv"), ("gpt_neox", "qkv")],
)
def test_keys_and_values_have_a_gradient_of_all_tokens(name, of_keys):
    model = models.build(name)
    config, length = model.config, 8
    named = {
        key: weight.numel()
        for key, weight in model.named_parameters()
        if weight.dim() == 2 and re.search(r"(layers|h)\.\d", key)
    }
    names = {"kv": r"[kv]_proj", "qkv": r"c_attn|query_key_value"}[of_keys]
    keys = sum(size for key, size in named.items() if re.search(names, key))
    assert 0 < keys < sum(named.values())
    attention = config.num_hidden_layers * config.hidden_size * length
    weights = sum(named.values()) + config.vocab_size * config.hidden_size
    found = advise.part_of_all_tokens(model, length)
    assert found == pytest.approx((keys + attention) / (weights + attention))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_attention_of_a_window_is_less(name):
    model, length, window = models.build(name), 1000, 100
    config = model.config
    config.sliding_window = window
    n_layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers
    assert "sliding_attention" in types
    seen = 0.0  # keys that tokens see, in the mean, of all layers
    for kind in types:
        most = window if kind == "sliding_attention" else length
        seen += np.minimum(np.arange(1, length + 1), most).mean()
    named = {
        key: weight.numel()
        for key, weight in model.named_parameters()
        if weight.dim() == 2 and "layers." in key
    }
    keys = sum(size for key, size in named.items() if re.search("[kv]_proj", key))
    attention = 2 * config.num_attention_heads * config.head_dim * seen  # of a key and a value
    weights = sum(named.values()) + config.vocab_size * config.hidden_size
    found = advise.part_of_all_tokens(model, length)
    assert found == pytest.approx((keys + attention) / (weights + attention), rel=1e-3)


@pytest.mark.parametrize(("name", "reason"), [("mamba", "mamba"), ("opt", "OPT")])
def test_a_model_that_no_split_runs_is_named(name, reason):
    config = AutoConfig.for_model(name, num_hidden_layers=1, hidden_size=24, vocab_size=64)
    costs, refused = advise._costs(AutoModelForCausalLM.from_config(config), 8)
    assert costs == {}
    assert refused.startswith("No split by tokens runs this model: ")
    assert reason in refused
    norm = np.random.default_rng(0).random((4, 100))
    table = advise._table(advise._advice(norm, norm, costs))
    assert [next(iter(x.cells)) for x in table.columns[2:4]] == ["-", "-"]


def test_what_follows_a_prompt_alone_is_drawn(book):
    done = run(book, "trained", "--prompt", "0.5")
    assert done.exit_code == 0, done.output
    nll, norm = (values[:, 15:] for values in own_statistics(book, "trained"))
    _, _, n_tokens, *numbers = LINE.search(done.output).groups()
    assert n_tokens == f"{nll.size:,}" == "1,024"
    expected = [nll.mean(), norm.mean(), norm.std()]
    assert [float(x) for x in numbers] == pytest.approx(expected, abs=6e-4)
    found = rows(done.output)
    assert tuple(found) == (*advise.RATIOS, 1.0)
    for ratio, (_, _, _, worth, part, gain) in found.items():
        drawn = effective_fraction(norm, ratio, importance=norm + 0.05, scope="sequence")
        cost = (1 + (3 if ratio < 1 else 2) * ratio / 2) / 3  # of all, none is scored
        assert [worth, part, gain] == pytest.approx([drawn, cost, drawn / cost], abs=6e-3)
    assert found[1.0][0] == found[1.0][3] == 1.0
    assert rows(run(book, "trained").output)[0.5][1] > found[0.5][1]  # fewer rows of a batch


def test_all_that_follows_a_prompt_is_the_preset(book):
    # Of a model that errs on all tokens alike; 11 of 32 is no short number.
    done = run(book, "begun", "--prompt", str(21 / 32), "--tokens", "4096")
    said = " ".join(done.output.split())
    options = eval(f"dict({re.search(r'by (split=.*), after the warm-up', said)[1]})")
    options.pop("split")
    preset = RoutingConfig.preset("completions", max_eligible_ratio=0.3438)
    assert RoutingConfig(**options, warmup_steps=0) == preset
    assert preset.capacity(0, 1, 32) == 12  # enough for the 11


def test_of_few_errors_all_that_follows_a_prompt_is_advised():
    norm = np.full((10, 1000), 1e-3)
    norm[0, :9] = 1.0
    costs = {"token": lambda ratio: operations(ratio / 4, "token", scored=ratio < 1)}
    config = RoutingConfig(max_eligible_ratio=0.25)
    advice = advise._advice(norm, norm + 0.05, costs, (*advise.RATIOS, 1.0))
    said = advise._verdict(advice, norm, config, costs)
    assert said.startswith("Predicted: about 2.00 times")
    assert "min_tokens_ratio=1.0" in said


def test_errors_of_few_tokens_are_no_advice():
    norm = np.full((10, 1000), 1e-3)
    norm[0, :9] = 1.0
    costs = {"token": lambda ratio: operations(ratio, "token")}
    advice = advise._advice(norm, norm + 0.05, costs)
    said = advise._verdict(advice, norm, RoutingConfig(), costs)
    assert said.startswith("No advice: 9 of these tokens have nearly all of the error.")
    said = advise._verdict(advice, 0 * norm, RoutingConfig(), costs)
    assert said.startswith("No advice: 0 of")


@pytest.mark.parametrize(("of_all", "best"), [(0.0, "backward"), (0.5, "token")])
def test_the_split_is_the_one_that_gains_most(of_all, best):
    norm = np.random.default_rng(0).permutation(np.r_[np.full(9000, 1e-3), np.ones(1000)])
    norm = norm.reshape(10, 1000)
    costs = {
        "backward": lambda ratio: operations(ratio, "backward", of_all=of_all),
        "token": lambda ratio: operations(ratio, "token"),
    }
    advice = advise._advice(norm, norm + 0.001, costs)
    gains = {split: max(row.gain(split) for row in advice) for split in costs}
    assert max(gains, key=gains.get) == best
    said = advise._verdict(advice, norm, RoutingConfig(), costs)
    assert f"about {gains[best]:.2f} times" in said
    assert f"split='{best}'" in said
    only = {"token": costs["token"]}
    said = advise._verdict(advise._advice(norm, norm + 0.001, only), norm, RoutingConfig(), only)
    assert "split='token'" in said


def test_all_parts_of_one_file_are_drawn_from(book):
    text = book / "long.txt"
    pages = sorted((book / "book").iterdir())
    known = "".join(page.read_text() for page in pages)
    words = np.random.default_rng(0).choice(list(known), size=len(known))
    text.write_text(known + "".join(words))
    command = ("advise", "--model", book / "runs" / "trained" / "model", "--text", text)
    small = ("--context", 32, "--tokens", 4096, "--device", "cpu")
    done = CliRunner().invoke(main, [str(part) for part in (*command, *small)])
    half, whole = rows(done.output)[0.5], rows(run(book, "trained").output)[0.5]
    assert half[0] < whole[0] - 0.1


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
        (("--context", 33), "--context 33 is more than its 32 positions"),
        (("--tokens", 900), "tokens in windows of 32 behind prompts of 0; 1000 at least tell"),
        (("--prompt", 0.75), "512 tokens in windows of 32 behind prompts of 24; 1000 at least"),
        (("--importance-floor", "nan"), "nan is no number"),
        (("--importance-floor", 0), "Invalid value for '--importance-floor'"),
        (("--scoring", "excess_loss"), "Invalid value for '--scoring'"),
        (("--prompt", 0.99), "--prompt 0.99: nothing of 32 tokens is left to learn"),
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
