"""From files to batches: what is trained on, what is held out, and that no text is in both."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cggr.race import text, tokens
from cggr.race.settings import RaceError
from cggr.race.text import Document


def documents(sizes):
    return [Document(f"file{i}.txt", chr(97 + i % 26) * size) for i, size in enumerate(sizes)]


@settings(max_examples=200)
@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=60))
def test_a_split_loses_nothing_and_leaks_nothing(sizes):
    everything = documents(sizes)
    split = text.split_documents(everything)
    assert text.split_documents(everything) == split
    assert sum(item.size for item in split.heldout) <= max(1, 0.05 * sum(sizes))
    assert split.heldout
    parts: dict[str, str] = {}
    for part in (split.training, split.heldout):
        for document in part:
            parts[document.name] = parts.get(document.name, "") + document.text
    assert parts == {item.name: item.text for item in everything}
    shared = {item.name for item in split.training} & {item.name for item in split.heldout}
    assert shared <= {everything[-1].name}  # only a file that was cut in two
    assert bool(shared) == bool(split.notes)


def test_the_choice_of_files_depends_on_their_names_alone():
    sizes = [300] * 100
    names = [item.name for item in text.split_documents(documents(sizes)).heldout]
    assert len(names) == 5
    shuffled = documents(sizes)
    np.random.default_rng(0).shuffle(shuffled)
    assert [item.name for item in text.split_documents(shuffled).heldout] == names


def test_a_single_file_gives_its_end():
    split = text.split_documents([Document("book.txt", "a" * 950 + "b" * 50)])
    assert split.training[0].text == "a" * 950
    assert split.heldout[0].text == "b" * 50
    assert split.notes == ("The last 5.0% of book.txt are held out.",)


def test_a_file_is_cut_between_characters():
    split = text.split_documents([Document("book.txt", "ü" * 101)])
    assert split.training[0].text + split.heldout[0].text == "ü" * 101


def test_the_digest_tells_texts_and_splits_apart():
    first = text.split_documents(documents([100] * 40))
    second = text.split_documents(documents([100] * 39 + [101]))
    assert first.digest != second.digest


def test_twins_hidden_files_and_binaries_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("first")
    (tmp_path / "c.txt").write_text("second")
    (tmp_path / ".hidden").write_text("third")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "zeros.bin").write_bytes(b"\0" * 10)
    found, notes = text.read_documents([tmp_path])
    assert [item.text for item in found] == ["first", "second"]
    assert [item.name for item in found] == [f"{tmp_path.name}/a.txt", f"{tmp_path.name}/c.txt"]
    assert notes == ["2 files are not UTF-8 text and were left out."]


def test_text_beyond_the_cap_is_left_out_with_a_note(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name * 900_000)
    found, notes = text.read_documents([tmp_path], max_bytes=2_000_000)
    assert [item.text[0] for item in found] == ["a", "b"]
    assert notes == ["Only the first 2 MB of the text are used."]
    found, notes = text.read_documents([tmp_path], max_bytes=None)
    assert [item.text[0] for item in found] == ["a", "b", "c"]
    assert notes == []
    with pytest.raises(RaceError) as error:
        text.read_documents([tmp_path / "a"], max_bytes=500_000, option="FILE")
    assert str(error.value) == (
        f"FILE {tmp_path / 'a'}: 1 MB are more than the 0 MB that are read: give a part of it"
    )


def test_a_folder_of_results_within_the_text_is_no_text(tmp_path):
    (tmp_path / "part" / "out").mkdir(parents=True)
    (tmp_path / "part" / "out" / "about.json").write_text("{}")
    (tmp_path / "part" / "a.txt").write_text("first")
    found, _ = text.read_documents([tmp_path], without=tmp_path / "part" / ".." / "part" / "out")
    assert [item.text for item in found] == ["first"]
    assert len(text.read_documents([tmp_path])[0]) == 2


def test_the_standard_library_is_the_default():
    found, _ = text.read_documents()
    names = [item.name for item in found]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert "json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or "/test/" in name]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "not a file of UTF-8 text"), (b"a\0b", "not a file of UTF-8 text")],
)
def test_a_named_file_must_be_text(tmp_path, content, message):
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(RaceError) as error:
        text.read_documents([path])
    assert str(error.value) == f"--text {path}: {message}"


def test_an_empty_folder_and_a_missing_one(tmp_path):
    with pytest.raises(RaceError) as error:
        text.read_documents([tmp_path])
    assert str(error.value) == f"--text {tmp_path}: no text in it"
    with pytest.raises(RaceError) as error:
        text.read_documents([tmp_path / "nowhere"])
    assert str(error.value) == f"--text {tmp_path / 'nowhere'}: no such file or folder"


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.train_tokenizer(["def f(x):\n    return x + 1\n"] * 50, vocab_size=300)


@settings(max_examples=200)
@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, sample):
    ids = tokenizer.encode(sample).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == sample


def test_a_document_cannot_fake_the_end_of_text(tokenizer):
    end = tokenizer.token_to_id(tokens.END_OF_TEXT)
    stream = tokens.encode(tokenizer, [f"a{tokens.END_OF_TEXT}b", "c"], end)
    assert (stream == end).sum() == 2
    assert stream[0] == end


def test_a_vocabulary_is_learned_and_bounded(tokenizer):
    assert 257 < tokenizer.get_vocab_size() <= 300
    assert len(tokenizer.encode("    return x").ids) < len("    return x")


def test_the_cache_gives_back_what_was_made(tmp_path, monkeypatch):
    split = text.split_documents(documents([2_000] * 30))
    made = tokens.prepare(split, vocab_size=300, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(tokens, "train_tokenizer", None)  # calling it would fail
    found = tokens.prepare(split, vocab_size=300, cache=tmp_path)
    assert np.array_equal(found.training, made.training)
    assert np.array_equal(found.heldout, made.heldout)
    assert (found.vocab_size, found.end_of_text) == (made.vocab_size, made.end_of_text)
    assert found.heldout_bytes == sum(item.size for item in split.heldout)
    assert found.tokenizer == made.tokenizer
    reader = Tokenizer.from_str(made.tokenizer)
    wanted = "".join(item.text for item in split.heldout)
    assert reader.decode(made.heldout.tolist()) == wanted


def test_another_text_or_vocabulary_is_another_cache_entry(tmp_path):
    tokens.prepare(text.split_documents(documents([500] * 30)), vocab_size=300, cache=tmp_path)
    tokens.prepare(text.split_documents(documents([500] * 30)), vocab_size=301, cache=tmp_path)
    tokens.prepare(text.split_documents(documents([500] * 31)), vocab_size=300, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unwritable_cache_is_named(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.raises(RaceError) as error:
        tokens.prepare(text.split_documents(documents([500] * 30)), vocab_size=300, cache=folder)
    assert str(error.value).startswith(f"cannot write the token cache in {folder}: ")


def test_bits_per_byte_of_a_uniform_guess_over_bytes():
    heldout = np.zeros(101, dtype=np.int32)  # end of text and 100 one-byte tokens
    corpus = tokens.Corpus(heldout, heldout, 100, 256, 0)
    assert corpus.bits_per_byte(np.log(256)) == pytest.approx(8.0)


@settings(max_examples=200)
@given(st.integers(2, 400), st.integers(2, 40), st.sampled_from([1, 64, 4096]))
def test_an_evaluation_predicts_every_token_once(size, length, forward):
    stream = np.arange(size, dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "EVALUATION_TOKENS", forward)
        batches = list(tokens.evaluation_batches(stream, length))
    (shape,) = {array.shape for batch in batches for array in batch}
    assert shape[0] == 1 or shape[0] * length <= forward
    assert shape[1] == length
    inputs, targets = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
    predicted = targets != tokens.IGNORED
    assert np.array_equal(targets[predicted], stream[1:])
    assert np.array_equal(inputs[predicted], stream[:-1])
    assert not inputs[~predicted].any()
    # Rows without a target are as few as batches of one shape allow.
    assert (~predicted.any(axis=1)).sum() < shape[0]


@given(st.integers(2, 400), st.integers(2, 40), st.data())
def test_an_evaluation_predicts_what_follows_a_prompt_once(size, length, data):
    prompt = data.draw(st.integers(1, min(length, size) - 1))
    stream = np.arange(size, dtype=np.int32)
    batches = list(tokens.evaluation_batches(stream, length, prompt))
    inputs, targets = (np.concatenate([batch[i] for batch in batches]) for i in (0, 1))
    predicted = targets != tokens.IGNORED
    assert np.array_equal(targets[predicted], stream[prompt:])
    assert np.array_equal(inputs[predicted], stream[prompt - 1 : -1])
    assert not predicted[:, : prompt - 1].any()
    # What is predicted has the prompt before it, as in training.
    for row, target in zip(inputs, predicted, strict=True):
        if target.any():
            begin, end = row[0], np.flatnonzero(target)[-1] + 1
            assert np.array_equal(row[:end], np.arange(begin, begin + end))


def test_prompts_have_no_labels():
    stream = np.arange(1_000, dtype=np.int32)
    shape = {"batch_size": 4, "sequence_length": 16, "seed": 3}
    plain, batch = (tokens.batches(stream, **shape, prompt=prompt)(5) for prompt in (0, 12))
    assert np.array_equal(plain.ids, batch.ids)
    assert np.array_equal(plain.labels, plain.ids)
    assert (batch.labels[:, :12] == tokens.IGNORED).all()
    assert np.array_equal(batch.labels[:, 12:], batch.ids[:, 12:])


PAIRS = [("2 + 3 =", " 5"), ("", "!"), ("naïve", " é\n")]


def test_of_pairs_completions_are_learned_and_the_ends_behind_them():
    tokenizer = tokens.train_tokenizer(["".join(pair) for pair in PAIRS], 300)
    ids, labels = tokens.encode_pairs(tokenizer, PAIRS, 7)
    plain, none = tokens.encode_pairs(tokenizer, PAIRS, None)
    wanted, learned = [], []
    for pair in PAIRS:
        prompt, completion = (tokenizer.encode(text).ids for text in pair)
        wanted += [7, *prompt, *completion]
        learned += [bool(learned)] + [False] * len(prompt) + [True] * len(completion)
    assert ids.tolist() == wanted
    assert labels.tolist() == np.where(learned, wanted, tokens.IGNORED).tolist()
    kept = ids != 7
    assert plain.tolist() == ids[kept].tolist()
    assert none.tolist() == labels[kept].tolist()


def test_pairs_are_prepared_once(tmp_path, monkeypatch):
    lines = [json.dumps({"prompt": f"say {i}:", "completion": f" {i}"}) for i in range(40)]
    training = text.Document("a.jsonl", "\n\n".join(lines[:30]))
    heldout = text.Document("b.jsonl", "\n".join(lines[30:]))
    split = text.Split((training,), (heldout,), "0" * 64, ())
    first = tokens.prepare(split, vocab_size=300, pairs=True, cache=tmp_path)
    raw = tokens.prepare(split, vocab_size=300, cache=tmp_path)
    assert raw.training_labels is None
    assert len(raw.training) > len(first.training)
    monkeypatch.setattr(tokens, "encode_pairs", None)
    again = tokens.prepare(split, vocab_size=300, pairs=True, cache=tmp_path)
    assert first.heldout_bytes == sum(len(f"say {i}: {i}") for i in range(30, 40))
    assert again.heldout_bytes == first.heldout_bytes
    decode = Tokenizer.from_str(first.tokenizer).decode
    for found in (first, again):
        for ids, labels, start, stop in (
            (found.training, found.training_labels, 0, 30),
            (found.heldout, found.heldout_labels, 30, 40),
        ):
            assert ids.shape == labels.shape
            learned = labels[labels != tokens.IGNORED].tolist()
            assert decode(learned) == "".join(f" {i}" for i in range(start, stop))
            assert decode(ids.tolist()).startswith(f"say {start}: {start}say")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"prompt": "a"}',
        '{"prompt": 1, "completion": "a"}',
        '{"prompt": "a", "completion": ""}',
        '{"prompt": "\\ud800", "completion": "a"}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_pair_is_named(line):
    good = '{"prompt": "a", "completion": "b"}'
    document = text.Document("x.jsonl", f"{good}\n\n{line}\n")
    found = text.pairs_of([document])
    assert next(found) == ("a", "b")
    with pytest.raises(RaceError) as error:
        next(found)
    assert str(error.value) == (
        "--pairs: line 3 of x.jsonl must be a JSON object of two texts, "
        f'"prompt" and "completion", the latter not empty, got {line[:60]}'
    )


def test_a_file_of_pairs_is_cut_between_lines():
    line = json.dumps({"prompt": "a" * 50, "completion": "b"}) + "\n"
    document = text.Document("x.jsonl", line * 100)
    split = text.split_documents([document], pairs=True)
    (training,), (heldout,) = split.training, split.heldout
    assert training.text + heldout.text == document.text
    assert heldout.text == line * 5
    assert split.notes == ("The last 5.0% of x.jsonl are held out.",)


def test_of_few_pairs_as_much_is_held_out_as_is_said():
    lines = [json.dumps({"prompt": "a", "completion": letter * 500}) + "\n" for letter in "bc"]
    split = text.split_documents([Document("x.jsonl", "".join(lines))], pairs=True)
    assert [document.text for document in (*split.training, *split.heldout)] == lines
    assert split.notes == ("The last 50.0% of x.jsonl are held out.",)
    for one in (lines[0], f"\n\n{lines[0]}\n"):
        with pytest.raises(RaceError, match=r"^--pairs needs two pairs at least, "):
            text.split_documents([Document("x.jsonl", one)], pairs=True)


def test_the_only_line_of_which_there_are_pairs_is_trained_on_or_held_out():
    long, short = (
        json.dumps({"prompt": "a", "completion": "b" * size}) + "\n" for size in (5_000, 20)
    )
    # The cut is within the first line, or within blank ones.
    for first, second, blank in ((long, short, ""), (short, long, "\n" * 9_000)):
        split = text.split_documents([Document("x.jsonl", first + second + blank)], pairs=True)
        assert [document.text for document in (*split.training, *split.heldout)] == [first, second]


def test_labels_are_cut_as_their_tokens_are():
    stream = np.arange(1_000, dtype=np.int32)
    labels = np.where(stream % 3 == 0, stream, tokens.IGNORED).astype(np.int32)
    shape = {"batch_size": 4, "sequence_length": 16, "seed": 3}
    batch = tokens.batches(stream, labels=labels, **shape)(5)
    assert np.array_equal(batch.ids, tokens.batches(stream, **shape)(5).ids)
    assert np.array_equal(batch.labels, np.where(batch.ids % 3 == 0, batch.ids, tokens.IGNORED))
    assert batch.targets == (batch.ids[:, 1:] % 3 == 0).sum()
    corpus = tokens.Corpus(stream, stream, 1, 1_000, None, "", labels, labels)
    inputs, targets = map(np.concatenate, zip(*corpus.heldout_batches(16), strict=True))
    predicted = targets != tokens.IGNORED
    assert np.array_equal(targets[predicted], stream[3::3])
    assert np.array_equal(inputs[predicted], stream[2:-1:3])


def test_a_batch_depends_on_seed_and_step_alone():
    stream = np.arange(1_000, dtype=np.int32)
    first = tokens.batches(stream, batch_size=4, sequence_length=16, seed=3)
    again = tokens.batches(stream, batch_size=4, sequence_length=16, seed=3)
    other = tokens.batches(stream, batch_size=4, sequence_length=16, seed=4)
    in_order = [first(step) for step in range(5)]
    for step in (4, 0, 2, 1, 3):
        assert np.array_equal(again(step).ids, in_order[step].ids)
        assert not np.array_equal(other(step).ids, in_order[step].ids)
    assert not np.array_equal(in_order[0].ids, in_order[1].ids)
    assert all(found.reference_nll is None for found in in_order)


def test_a_sequence_is_a_contiguous_piece_of_the_text_and_every_piece_can_come():
    batch = tokens.batches(np.arange(20, dtype=np.int32), batch_size=4, sequence_length=4, seed=0)
    starts = set()
    for step in range(200):
        rows = batch(step).ids
        assert np.array_equal(rows, rows[:, :1] + np.arange(4))
        starts.update(rows[:, 0].tolist())
    assert starts == set(range(17))


def test_a_text_must_fill_a_batch():
    tokens.batches(np.zeros(64, dtype=np.int32), batch_size=4, sequence_length=16, seed=0)
    with pytest.raises(RaceError) as error:
        tokens.batches(np.zeros(63, dtype=np.int32), batch_size=4, sequence_length=16, seed=0)
    assert str(error.value) == (
        "the text is too short: 63 training tokens, but one batch of 4 x 16 needs 64; give more "
        "text, or a smaller --batch-size or --sequence-length"
    )


def test_a_batch_brings_the_references_losses_of_its_tokens():
    stream = np.arange(100, dtype=np.int32)
    losses = stream.astype(np.float32) / 8  # as if the token that follows token i had loss i / 8
    losses[-1] = np.nan  # nothing follows
    shape = {"batch_size": 4, "sequence_length": 16, "seed": 3}
    plain = tokens.batches(stream, **shape)
    batch = tokens.batches(stream, reference_nll=losses, **shape)
    ends = 0
    for step in range(50):
        ids, _, found = batch(step)
        assert np.array_equal(ids, plain(step).ids)
        assert found.dtype == np.float32
        ends += (ids == 99).sum()
        assert np.array_equal(found, np.where(ids == 99, 0, ids / 8))
    assert ends  # the last token came, and its loss, which nobody asks for, is a number


def pages():
    """Documents of 4,000 lines, every third with an indentation, every tenth empty."""
    random = np.random.default_rng(1)
    lines = []
    for number in range(4_000):
        words = [f"w{word}" for word in random.integers(500, size=random.integers(1, 9))]
        line = "" if number % 10 == 9 else " ".join(words)
        lines.append((" \t  " if number % 3 == 0 and line else "") + line + "\n")
    return [Document(f"page{i}", "".join(lines[100 * i :][:100])) for i in range(40)]


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_noise_is_in_a_fraction_of_the_lines_to_train_on(fraction):
    split = text.split_documents(pages())
    noisy = text.with_noise(split, fraction)
    assert noisy.heldout == split.heldout
    assert [item.name for item in noisy.training] == [item.name for item in split.training]
    words = {word for item in split.training for word in item.text.split()}
    before, after = (
        [line for item in part.training for line in item.text.splitlines(keepends=True)]
        for part in (split, noisy)
    )
    assert len(before) == len(after)
    changed, full = 0, 0
    for old, new in zip(before, after, strict=True):
        assert len(old.split()) == len(new.split())
        assert old[: len(old) - len(old.lstrip())] == new[: len(new) - len(new.lstrip())]
        assert old[len(old.rstrip()) :] == new[len(new.rstrip()) :]
        assert words.issuperset(new.split())
        full += bool(old.split())
        changed += old != new
    # Four standard errors; the chance that a line is drawn as it was is below 1 in 500.
    assert changed / full == pytest.approx(fraction, abs=4 * (fraction / full) ** 0.5)
    assert noisy.notes == (f"{fraction:.0%} of the lines to train on are random words.",)


def test_noise_is_the_same_each_time_and_known_by_its_digest():
    split = text.split_documents(pages())
    noisy = text.with_noise(split, 0.25)
    assert text.with_noise(split, 0.25) == noisy
    digests = {split.digest, noisy.digest, text.with_noise(split, 0.5).digest}
    assert len(digests) == 3


def test_noise_has_the_words_in_their_frequencies():
    common = Document("a", "often often often often rare\n" * 4_000)
    split = text.Split((common,), (), "", ())
    words = text.with_noise(split, 0.999).training[0].text.split()
    # 20,000 draws: four standard errors.
    share = words.count("rare") / len(words)
    assert share == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / len(words)) ** 0.5)
    assert words[:5000] != common.text.split()[:5000]


def test_noise_leaves_a_text_without_words_alone():
    empty = text.Split((Document("a", " \n\n\t\n"),), (Document("b", "word"),), "", ())
    assert text.with_noise(empty, 0.9).training == empty.training
