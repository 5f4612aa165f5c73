"""cggr.torch and cggr.jax select the same tokens: from the same difficulties to the last bit, and
from the same logits but for tokens at a cut, each of which is named.

Run with ``-s`` for the number of batches and mismatches. ``CGGR_PARITY_CASES`` sets the batches of
every compiled program; CI runs the default.

Shapes: ``B`` sequences of ``S`` tokens, ``N = B S``, ``V`` classes.
"""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import truth
from test_spec_selection import FLAVOURS, assert_identical, confidences, difficulties

import cggr.jax as cj
import cggr.torch as ct
from cggr.spec import RoutingConfig, Selection
from cggr.spec.selection import select_at_ratio

RULES = truth.SELECTIONS
SCOPES = ("batch", "sequence")
SCORINGS = ("entropy", "margin", "loss", "combined", "error_norm", "excess_loss")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CASES = int(os.environ.get("CGGR_PARITY_CASES", "14"))

# From the same difficulties


def same_difficulty_options(rule, scope, shape):
    """Options of a program; the other shape has the other half of them."""
    first = shape == (4, 33)
    return {
        "selection": rule,
        "scope": scope,
        "min_tokens_ratio": 0.3 if first else 0.07,
        "warmup_steps": 100 if first else 100_000_000,
        "dynamic_threshold": first,
        "num_strata": 4 if first else 7,
        "min_tokens_per_sequence": 3 if first else 1,
        "importance_floor": 0.05 if first else 1e-30,
        "seed": 11 if first else 2**32 - 1,
    }


def selections_of_both(program, config, arrays, state, capacity):
    """JAX, torch with static capacity, torch with exact capacity."""
    by_jax = program(*arrays, *(np.array([x], np.int32) for x in state.values()))
    tensors = [torch.from_numpy(np.asarray(x)) for x in arrays]
    by_torch = [
        ct.select_tokens(
            tensors[0], config, eligible=tensors[1], confidence=tensors[2], capacity=c, **state
        )
        for c in (capacity, None)
    ]
    return by_jax, *by_torch


def one_ratio(selection):
    """As assert_identical wants the second of the two: with a number for a ratio."""
    return selection._replace(ratio=np.asarray(selection.ratio)[0])


@pytest.mark.parametrize("shape", [(4, 33), (3, 150)])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_difficulties_give_the_same_selection_to_the_last_bit(rule, scope, shape):
    config = RoutingConfig(**same_difficulty_options(rule, scope, shape))
    capacity = config.capacity(0, *shape)

    @jax.jit
    def program(difficulty, eligible, confidence, step, draw, rank):
        return cj.select_tokens(
            difficulty,
            config,
            step=step,
            draw=draw,
            rank=rank,
            eligible=eligible,
            confidence=confidence,
            capacity=capacity,
        )

    rng = np.random.default_rng(RULES.index(rule) + 10 * SCOPES.index(scope) + shape[0])
    n_batches = 8 * CASES
    masks = set()
    for i in range(n_batches):
        difficulty = difficulties(rng, shape, FLAVOURS[i % len(FLAVOURS)])
        eligible = rng.random(shape) >= rng.choice([0.0, 0.3, 0.99, 1.0])
        state = {
            "step": int(rng.choice([0, 37, 99, 2**28])),
            "draw": int(rng.integers(0, 2**31)),
            "rank": int(rng.integers(0, 64)),
        }
        arrays = (difficulty, eligible, confidences(rng, shape))
        by_jax, static, exact = selections_of_both(program, config, arrays, state, capacity)
        what = f"{rule} {scope} {shape} batch {i}"
        assert_identical(by_jax, one_ratio(static), what)
        # Exact capacity: the same but for unused slots.
        slots = exact.indices.shape[-1]
        used = by_jax._replace(
            indices=by_jax.indices[..., :slots], weights=by_jax.weights[..., :slots]
        )
        assert_identical(used, one_ratio(exact), what)
        assert not np.asarray(by_jax.weights[..., slots:]).any()
        masks.add(np.asarray(by_jax.mask).tobytes())
    assert len(masks) > n_batches // 3  # the batches are not all alike
    print(f"\nsame difficulties, {rule}, {scope}, {shape}: {n_batches} batches, 0 mismatches")


# From the same logits

# Shape of the batches, and options with every part of the spec in play. The step is behind the
# warm-up, so that a cut exists; the ratio follows the confidence.
SHAPE, CLASSES = (4, 25), 37
OPTIONS = {
    "dynamic_threshold": True,
    "min_tokens_ratio": 0.3,
    "warmup_steps": 0,
    "min_tokens_per_sequence": 2,
    "seed": 5,
}
CONTENTS = ("normal", "ties", "repeated", "impossible", "certain", "offset", "permuted")

# Error of a score against float64, in units of the last place (ulps) of float32 of the largest
# term that enters it: exp and log differ by an ulp or two from library to library, and a sum over
# V rounds again. The test measures it for both frontends (3.2 is the most seen) and asserts it.
SCORE_ULPS = 4
# A score that rounds up here and down there, at a cut that moves as much: a token kept by one
# frontend only is within twice the bound of the score at rank k, whatever else the batch holds.
BAND_ULPS = 2 * SCORE_ULPS


class Batch(NamedTuple):
    """What both frontends are given."""

    logits: np.ndarray  # (B, S, V) in the low precision
    targets: np.ndarray  # (B, S) int32
    reference_nll: np.ndarray  # (B, S) float32
    draw: int


def logits_of(rng, content):
    x = rng.normal(0, 2, (*SHAPE, CLASSES)).astype(np.float32)
    if content == "ties":
        x = np.round(x)
    elif content == "repeated":  # every row three times or more
        rows = x.reshape(-1, CLASSES)
        x = rows[rng.integers(0, len(rows) // 4, len(rows))].reshape(x.shape)
    elif content == "impossible":
        x = np.where(rng.random(x.shape) < 0.4, -np.inf, x)
        alone = rng.random(SHAPE) < 0.2  # a single class that can be
        keep = rng.integers(0, CLASSES, SHAPE)[..., None] == np.arange(CLASSES)
        x = np.where(alone[..., None] & ~keep, -np.inf, x)
        x = np.where(keep & ~np.isfinite(x), 1.0, x).astype(np.float32)
    elif content == "certain":  # half of the tokens or most, at every distance from certainty
        top = rng.integers(0, CLASSES, SHAPE)[..., None] == np.arange(CLASSES)
        certain = rng.random(SHAPE) < rng.choice([0.5, 0.9])
        lift = rng.uniform(8, 40, SHAPE)[..., None] * certain[..., None]
        x = np.where(top, x + lift, x).astype(np.float32)
    elif content == "permuted":  # the same score but for the order of the sums: many near-ties
        rows = x.reshape(-1, CLASSES)[rng.integers(0, 3, SHAPE)]
        x = rng.permuted(rows, axis=-1)
        if rng.random() < 0.5:  # and a step or two apart, where the precision has such steps
            x = x + rng.integers(-2, 3, SHAPE)[..., None] * np.spacing(x)
    elif content == "offset":
        x = x + rng.choice([-300.0, 0.0, 100.0], SHAPE)[..., None].astype(np.float32)
    return x


def batch_of(seed, number, dtype):
    """Batch `number` of a program: contents and amounts of ignored labels in turn."""
    rng = np.random.default_rng([seed, number])
    content = CONTENTS[number % len(CONTENTS)]
    logits = logits_of(rng, content).astype(DTYPES[dtype])
    targets = rng.integers(0, CLASSES, SHAPE).astype(np.int32)
    if content in ("certain", "repeated", "permuted"):
        right = rng.random(SHAPE) < 0.8  # so that the nll is near 0 too
        targets = np.where(right, logits.astype(np.float32).argmax(-1), targets).astype(np.int32)
    if number % 3 == 1:  # padding at the end of every sequence
        lengths = rng.integers(1, SHAPE[1], SHAPE[0])
        targets[np.arange(SHAPE[1]) >= lengths[:, None]] = -100
    if number % 3 == 2:
        targets[rng.random(SHAPE) < 0.3] = -100
    if number % 12 == 7:
        targets[:] = -100
    reference = rng.gamma(2.0, 1.5, SHAPE).astype(np.float32)
    return Batch(logits, targets, reference, int(rng.integers(0, 2**31)))


def tensor(x):
    """The same bits in torch; NumPy's bfloat16 is none of its own."""
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def compiled(rule, scope):
    """Logits to selections for every score, one compiled program; the scores share its sorts."""
    config = RoutingConfig(**OPTIONS, selection=rule, scope=scope)
    capacity = config.capacity(0, *SHAPE)

    @jax.jit
    def program(logits, targets, reference_nll, draw):
        statistics = cj.token_statistics(logits, targets)
        scores = jnp.stack(
            [
                cj.token_difficulty(statistics, name, reference_nll=reference_nll)
                for name in SCORINGS
            ]
        )
        select = functools.partial(
            cj.select_tokens,
            config=config,
            step=0,
            draw=draw,
            eligible=targets != -100,
            confidence=statistics.confidence,
            capacity=capacity,
        )
        return statistics.confidence, scores, jax.vmap(lambda score: select(score))(scores)

    return config, capacity, program


def by_torch(batch, config, capacity):
    statistics = ct.token_statistics(tensor(batch.logits), tensor(batch.targets))
    reference = tensor(batch.reference_nll)
    scores, selections = [], []
    for name in SCORINGS:
        score = ct.token_difficulty(statistics, name, reference_nll=reference)
        selection = ct.select_tokens(
            score,
            config,
            draw=batch.draw,
            eligible=tensor(batch.targets) != -100,
            confidence=statistics.confidence,
            capacity=capacity,
        )
        scores.append(score.numpy())
        selections.append(Selection(*(x.numpy() for x in selection)))
    return statistics.confidence.numpy(), scores, selections


def precise_statistics(logits, targets):
    """truth.statistics with log1p and without 1 - p: float64 digits near certainty too."""
    x = logits.astype(np.float64)
    z = x - x.max(axis=-1, keepdims=True)
    top = np.arange(CLASSES) == z.argmax(axis=-1)[..., None]
    label = np.arange(CLASSES) == np.maximum(targets, 0)[..., None]
    exp = np.exp(z)
    rest = np.where(top, 0, exp).sum(axis=-1)
    p = exp / (1 + rest)[..., None]
    log_z = np.log1p(rest)
    entropy = log_z - np.where(p > 0, p * np.maximum(z, -1e4), 0).sum(axis=-1)
    others = np.where(label, 0, p)
    error_norm = np.sqrt((others**2).sum(axis=-1) + others.sum(axis=-1) ** 2)
    nll = log_z - np.where(label, z, 0).sum(axis=-1, where=label)
    ignored = targets == -100
    result = truth.statistics(logits, targets)
    precise = {
        "nll": np.where(ignored, 0, nll),
        "entropy": entropy,
        "error_norm": np.where(ignored, 0, error_norm),
    }
    for name, value in precise.items():
        np.testing.assert_allclose(value, result[name], rtol=1e-12, atol=1e-13, err_msg=name)
    return result | precise


def true_scores(batch):
    """For every score its values in float64, and the ulp of float32 at its largest term."""
    statistics = precise_statistics(batch.logits, batch.targets)
    # exp(x - max) has the rounding of x - max: as many ulps as the distance has units.
    below = np.sort(batch.logits.astype(np.float64), axis=-1)
    below = (below - below[..., -1:])[..., :-1]
    away = np.where(np.isfinite(below), -below, 0.0)
    result = {}
    for scoring in SCORINGS:
        score = truth.difficulty(statistics, scoring, batch.reference_nll)
        terms = [score]
        if scoring in ("margin", "combined"):
            terms.append(np.ones_like(score))  # of 1 - margin
        if scoring == "excess_loss":
            terms += [statistics["nll"], batch.reference_nll]
        largest = np.max([np.where(np.isfinite(x), np.abs(x), 0) for x in terms], axis=0)
        ulp = np.spacing(largest.astype(np.float32)).astype(np.float64)
        part = np.exp(below) * (np.maximum(away, 1) if scoring == "entropy" else 1)
        ulp = np.maximum(ulp, 2.0**-24 * (part * away).sum(axis=-1))
        if scoring == "error_norm":
            ulp = np.maximum(ulp, 2.0**-63)  # the squares underflow
        result[scoring] = (score, ulp)
    return result


def ulps_off(score, expected, ulp):
    """Largest error in ulps; an infinity or NaN must be the same one."""
    both = np.isfinite(expected)
    np.testing.assert_array_equal(score[~both], expected[~both].astype(np.float32))
    return np.max(np.abs(score[both] - expected[both]) / ulp[both], initial=0.0)


# Why a token may be kept by one frontend and not by the other


class Unexplained(AssertionError):
    """A difference that no cut is near enough to explain."""


class Ranking(NamedTuple):
    """What a token is ranked by in float64, and the ulp of float32 there; flat over the batch."""

    value: np.ndarray
    ulp: np.ndarray


def ranking(score, ulp, config, draw):
    score = np.where(np.isnan(score), np.inf, score).ravel()
    ulp = ulp.ravel()
    if config.selection != "importance":
        return Ranking(score, ulp)
    # The cut is in the priority q / u, and so is the rounding of q, of the sum and the product.
    bits = truth.uniform_bits_array(config.seed, draw, 0, np.arange(score.size))
    inverse = np.array([truth.inverse_uniform(b) for b in bits.tolist()], np.float64)
    q = np.maximum(score, 0) + config.importance_floor
    priority = q * inverse
    finite = np.where(np.isfinite(priority), priority, 0)
    ulp = np.maximum(ulp * inverse, np.spacing(finite.astype(np.float32)))
    return Ranking(priority, ulp)


def groups_of(eligible, config):
    rows = [list(np.flatnonzero(row) + b * row.size) for b, row in enumerate(eligible)]
    return rows if config.scope == "sequence" else [[i for row in rows for i in row]]


def hardest(group, value):
    return sorted(group, key=lambda i: (-value[i], i))


def distance(token, at, ranked):
    """Ulps between a token and the token at a cut."""
    if ranked.value[token] == ranked.value[at]:
        return 0.0
    gap = abs(ranked.value[token] - ranked.value[at])
    return float(gap / max(ranked.ulp[token], ranked.ulp[at]))


def cuts_of(group, k, ranked, config, length):
    """For every token, the tokens at rank k of the rankings that decide about it."""
    order = hardest(group, ranked.value)
    if config.selection != "sequence_aware":
        return {i: [order[k - 1]] for i in group}
    cuts = {i: [] for i in group}
    floor = []
    for b in {i // length for i in group}:
        row = hardest([i for i in group if i // length == b], ranked.value)
        kept = row[: config.min_tokens_per_sequence]
        floor += kept
        for i in row:
            cuts[i].append(kept[-1])
    rest = [i for i in order if i not in floor]
    if k > len(floor):
        for i in group:
            cuts[i].append(rest[k - len(floor) - 1])
    return cuts


def strata_of(group, score, config):
    """Stratum of every token, and of every border the token on its harder side."""
    score = np.where(np.isnan(score), np.inf, score).ravel()
    order = hardest(group, score)
    sizes, _ = truth.stratum_quotas(len(order), 0, config.num_strata)
    stratum, borders, start = {}, [], 0
    for number, size in enumerate(sizes):
        stratum |= dict.fromkeys(order[start : start + size], number)
        start += size
        borders.append(order[start - 1])
    return stratum, borders


def explain(config, batch, scoring, first, second, scores):
    """Ulps from its cut of every token that one selection has and the other has not.

    `first` and `second` are at the same ratio; `scores` are what the two were made from. Raises
    Unexplained if any lies beyond the band.
    """
    if np.array_equal(first.mask, second.mask):
        return {}
    ranked = ranking(*true_scores(batch)[scoring], config, batch.draw)
    eligible = batch.targets != -100
    differ = set(np.flatnonzero(np.asarray(first.mask) != np.asarray(second.mask)).tolist())
    if differ and config.selection == "random":
        raise Unexplained(f"random selection looks at no score, yet tokens {differ} differ")
    distances = {}
    for number, group in enumerate(groups_of(eligible, config)):
        here = differ & set(group)
        if not here:
            continue
        count = int(np.atleast_1d(first.count)[number])
        if count != int(np.atleast_1d(second.count)[number]):
            raise Unexplained(f"group {number} keeps another number of tokens")
        if config.selection == "stratified":
            distances |= explain_strata(config, group, here, ranked, scores)
            continue
        cuts = cuts_of(group, count, ranked, config, SHAPE[1])
        for i in here:
            distances[i] = min(distance(i, at, ranked) for at in cuts[i])
    if differ - set(distances):
        raise Unexplained(f"tokens {differ - set(distances)} are in no group")
    far = {i: ulps for i, ulps in distances.items() if not ulps <= BAND_ULPS}
    if far:
        raise Unexplained(f"{config.selection}, {scoring}: tokens beyond the band, in ulps: {far}")
    return distances


def explain_strata(config, group, here, ranked, scores):
    """Tokens that changed their stratum are near its border; others differ in such strata only.

    A token that leaves a stratum leaves its place in the sample to another one, which may lie
    anywhere in that stratum.
    """
    (before, borders), (after, _) = (strata_of(group, x, config) for x in scores)
    true, true_borders = strata_of(group, ranked.value, config)
    moved = [i for i in group if before[i] != after[i]]
    changed = {stratum[i] for i in moved for stratum in (before, after)}
    distances = {i: min(distance(i, at, ranked) for at in (*borders, *true_borders)) for i in moved}
    for i in here - set(moved):
        if before[i] not in changed:
            raise Unexplained(f"token {i} differs, but its stratum {true[i]} lost nobody")
        distances[i] = 0.0  # its place in the sample was freed or taken by one that moved
    return distances


def explain_ratio(config, batch, confidences_, ratios):
    """Ratios differ by a unit at most, and each is what its frontend's confidences give."""
    eligible = batch.targets != -100
    options = OPTIONS | {"selection": config.selection, "scope": config.scope}
    for confidence, ratio in zip(confidences_, ratios, strict=True):
        if truth.token_ratio(options, 0, confidence, eligible) != ratio:
            raise Unexplained(f"ratio {ratio} is not that of its confidences")
    if abs(int(ratios[0]) - int(ratios[1])) > 1:
        raise Unexplained(f"ratios {ratios}")


def at_ratio(selection, score, config, batch, ratio, capacity):
    """The selection that the first frontend's scores give at the other's ratio."""
    if selection.ratio[0] == ratio[0]:
        return selection
    return select_at_ratio(
        score,
        config,
        np.asarray(ratio),
        draw=batch.draw,
        eligible=batch.targets != -100,
        capacity=capacity,
    )


def assert_weights_agree(config, batch, score, ulp, first, second):
    """max(1, τ / q) from scores that differ by ulps, τ being one more such score."""
    for name in ("indices", "count"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    if config.selection != "importance":
        np.testing.assert_array_equal(first.weights, second.weights)
        return 0.0
    eligible = batch.targets != -100
    q = np.maximum(score, 0) + config.importance_floor
    usual = eligible & np.isfinite(q)
    # τ is the priority of a token whose relative error is at most the largest of the batch.
    unit = 2.0**-23
    relative = 2 * SCORE_ULPS * np.max((ulp / q)[usual], initial=unit) * 2 + 4 * unit
    off = np.abs(first.weights.astype(np.float64) / np.maximum(second.weights, 1e-30) - 1)
    off = np.where((first.weights == 0) & (second.weights == 0), 0, off)
    assert off.max(initial=0) <= relative
    return float(off.max(initial=0) / unit)


@pytest.fixture(scope="module")
def tally():
    """Counts over all programs, printed at the end."""
    counts = dict.fromkeys(
        ("batches", "ratios", "masks", "tokens", "selected", "score", "weight", "distance"), 0
    )
    yield counts
    print(
        f"\nfrom the same logits: {counts['batches']} batches, {counts['selected']} tokens "
        f"selected; {counts['ratios']} ratios differ by a unit, {counts['masks']} masks differ in "
        f"{counts['tokens']} tokens, at most {counts['distance']:.2f} ulps from a cut "
        f"(band {BAND_ULPS}); scores are off by at most {counts['score']:.2f} ulps (bound "
        f"{SCORE_ULPS}), weights differ by at most {counts['weight']:.1f} x 2**-23"
    )


def compare(rule, scope, dtype, tally):
    config, capacity, program = compiled(rule, scope)
    lines, before = [], dict(tally)
    seed = RULES.index(rule) + 10 * SCOPES.index(scope) + 100 * list(DTYPES).index(dtype)
    for number in range(CASES):
        batch = batch_of(seed, number, dtype)
        draw = np.array([batch.draw], np.int32)
        confidence, scores, selections = jax.device_get(program(*batch[:3], draw))
        torch_confidence, torch_scores, torch_selections = by_torch(batch, config, capacity)
        for i, (scoring, (expected, ulp)) in enumerate(true_scores(batch).items()):
            for score in (scores[i], torch_scores[i]):
                off = ulps_off(score, expected, ulp)
                assert off <= SCORE_ULPS, f"{scoring} {dtype} batch {number}: {off} ulps"
                tally["score"] = max(tally["score"], off)
            mine = Selection(*(x[i] for x in selections))
            theirs = torch_selections[i]
            ratios = (mine.ratio[0], theirs.ratio[0])
            tally["batches"] += 1
            tally["selected"] += int(theirs.mask.sum())
            if ratios[0] != ratios[1]:
                explain_ratio(config, batch, (confidence, torch_confidence), ratios)
                tally["ratios"] += 1
                mine = at_ratio(mine, scores[i], config, batch, theirs.ratio, capacity)
            distances = explain(config, batch, scoring, mine, theirs, (scores[i], torch_scores[i]))
            if not distances:
                off = assert_weights_agree(config, batch, expected, ulp, mine, theirs)
                tally["weight"] = max(tally["weight"], off)
                continue
            tally["masks"] += 1
            tally["tokens"] += len(distances)
            tally["distance"] = max(tally["distance"], *distances.values())
            named = ", ".join(f"{t}: {ulps:.2f}" for t, ulps in sorted(distances.items()))
            lines.append(f"  {scoring}, batch {number}: ulps from the cut of token {named}")
    batches, masks = (tally[x] - before[x] for x in ("batches", "masks"))
    print(f"\n{rule}, {scope}, {dtype}: {batches} batches, {masks} masks differ", *lines, sep="\n")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_logits_give_the_same_selection_but_at_a_cut(rule, scope, dtype, tally):
    compare(rule, scope, dtype, tally)


def test_all_programs_together_are_enough_batches(tally):
    programs = len(RULES) * len(SCOPES) * len(DTYPES)
    total = programs * CASES * len(SCORINGS)
    assert total >= 2000
    if tally["batches"] == total:  # all programs ran in this process
        assert tally["masks"] > 50  # near-ties at the cut were among them
        assert tally["masks"] < total / 5


@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_that_share_a_program_are_those_of_their_own(scoring):
    # What the programs above select in one vmap over scores is what a user's jit selects.
    rule = RULES[SCORINGS.index(scoring)]
    config, capacity, program = compiled(rule, "sequence")

    @jax.jit
    def alone(logits, targets, reference_nll, draw):
        statistics = cj.token_statistics(logits, targets)
        score = cj.token_difficulty(statistics, scoring, reference_nll=reference_nll)
        return cj.select_tokens(
            score,
            config,
            draw=draw,
            eligible=targets != -100,
            confidence=statistics.confidence,
            capacity=capacity,
        )

    for number in range(len(CONTENTS)):
        batch = batch_of(1000, number, "float32")
        arguments = (*batch[:3], np.array([batch.draw], np.int32))
        together = jax.tree.map(lambda x: x[SCORINGS.index(scoring)], program(*arguments)[2])
        for got, want in zip(alone(*arguments), together, strict=True):
            np.testing.assert_array_equal(got, want)


def test_low_precision_logits_reach_both_frontends_as_the_same_bits():
    for dtype in DTYPES:
        batch = batch_of(0, 3, dtype)
        exact = batch.logits.astype(np.float32)
        assert np.isneginf(exact).any()
        np.testing.assert_array_equal(tensor(batch.logits).float().numpy(), exact)
        np.testing.assert_array_equal(jnp.asarray(batch.logits).astype(jnp.float32), exact)
        assert str(tensor(batch.logits).dtype) == f"torch.{jnp.asarray(batch.logits).dtype}"
    assert str(batch.logits.dtype) == "float16"


# The explanation itself must be able to say no


def selected(rule, scope, scoring, number=0):
    batch = batch_of(2000, number, "float32")
    config = RoutingConfig(**OPTIONS, selection=rule, scope=scope)
    _, scores, selections = by_torch(batch, config, config.capacity(0, *SHAPE))
    i = SCORINGS.index(scoring)
    return config, batch, scores[i], selections[i]


def swapped(selection, inside, outside):
    mask = selection.mask.copy().reshape(-1)
    assert mask[inside]
    assert not mask[outside]
    mask[[inside, outside]] = False, True
    return selection._replace(mask=mask.reshape(SHAPE))


def extremes(config, batch, scoring, selection):
    """The kept token that is farthest above the cut, and the eligible one farthest below."""
    ranked = ranking(*true_scores(batch)[scoring], config, batch.draw)
    group = groups_of(batch.targets != -100, config)[0]
    order = hardest(group, ranked.value)
    mask = selection.mask.ravel()
    return next(i for i in order if mask[i]), next(i for i in order[::-1] if not mask[i])


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_token_far_from_the_cut_is_not_explained_away(rule, scope, scoring):
    config, batch, score, selection = selected(rule, scope, scoring)
    assert explain(config, batch, scoring, selection, selection, (score, score)) == {}
    hard, easy = extremes(config, batch, scoring, selection)
    wrong = swapped(selection, hard, easy)
    with pytest.raises(Unexplained):
        explain(config, batch, scoring, selection, wrong, (score, score))
    # Nor if the scores differ as much: a score is not off by more than the band.
    moved = score.copy().ravel()
    moved[[hard, easy]] = moved[[easy, hard]]
    with pytest.raises(Unexplained):
        explain(config, batch, scoring, selection, wrong, (score, moved.reshape(SHAPE)))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
def test_a_token_too_many_is_not_explained_away(rule, scope):
    config, batch, score, selection = selected(rule, scope, "combined")
    group = groups_of(batch.targets != -100, config)[0]
    outside = next(i for i in group if not selection.mask.ravel()[i])
    mask = selection.mask.copy().reshape(-1)
    mask[outside] = True
    count = np.atleast_1d(selection.count).copy()
    count[0] += 1
    more = selection._replace(mask=mask.reshape(SHAPE), count=count)
    with pytest.raises(Unexplained):
        explain(config, batch, "combined", selection, more, (score, score))


@pytest.mark.parametrize("number", [4, 6])
def test_tokens_next_to_the_cut_are_explained(number):
    # Batch 6 is permutations of three rows: ranks k and k + 1 tie but for rounding.
    config, batch, score, selection = selected("topk", "batch", "entropy", number=number)
    ranked = ranking(*true_scores(batch)["entropy"], config, batch.draw)
    order = hardest(np.flatnonzero(batch.targets.ravel() != -100).tolist(), ranked.value)
    k = int(selection.count)
    inside = next(i for i in reversed(order) if selection.mask.ravel()[i])
    outside = next(i for i in order if not selection.mask.ravel()[i])
    near = distance(outside, order[k - 1], ranked) <= BAND_ULPS
    assert near == (number == 6)
    wrong = swapped(selection, inside, outside)
    if near:
        distances = explain(config, batch, "entropy", selection, wrong, (score, score))
        assert set(distances) == {inside, outside}
        return
    with pytest.raises(Unexplained, match=f"{outside}: "):
        explain(config, batch, "entropy", selection, wrong, (score, score))


def test_another_ratio_is_explained_by_the_confidences_alone():
    config, batch, _, selection = selected("topk", "batch", "combined")
    statistics = ct.token_statistics(tensor(batch.logits), tensor(batch.targets))
    confidence = statistics.confidence.numpy()
    ratio = int(selection.ratio[0])
    explain_ratio(config, batch, (confidence, confidence), (ratio, ratio))
    with pytest.raises(Unexplained, match="is not that of its confidences"):
        explain_ratio(config, batch, (confidence, confidence), (ratio, ratio + 1))
    lower = confidence * np.float32(0.99)
    other = truth.token_ratio(OPTIONS, 0, lower, batch.targets != -100)
    assert other > ratio + 1
    with pytest.raises(Unexplained, match="ratios"):
        explain_ratio(config, batch, (confidence, lower), (ratio, other))
