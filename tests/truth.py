"""The reference for the tests: scoring and selection written from the equations, nothing shared.

NumPy float64, Python integers, loops and explicit sorting; imports nothing of cggr.
A configuration is a dict with the fields of RoutingConfig, merged over DEFAULTS.
"""

import math
from typing import NamedTuple

import numpy as np

ONE = 2**14
WORD = 2**32 - 1
GOLDEN = 0x9E3779B9

DEFAULTS = {
    "scoring": "combined",
    "selection": "importance",
    "scope": "batch",
    "min_tokens_ratio": 0.25,
    "max_eligible_ratio": 1.0,
    "warmup_steps": 1000,
    "dynamic_threshold": False,
    "threshold_sensitivity": 0.5,
    "num_strata": 4,
    "min_tokens_per_sequence": 1,
    "importance_floor": 0.05,
    "seed": 0,
    "ignore_index": -100,
}

SELECTIONS = (
    "topk",
    "fixed_quota",
    "stratified",
    "sequence_aware",
    "importance",
    "random",
)


class Truth(NamedTuple):
    """Selected tokens: mask (B, S), padded ascending indices and weights, count, ratio of ONE."""

    mask: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    count: int | np.ndarray
    ratio: int


def merged(cfg):
    """DEFAULTS with cfg over it; an unknown field or rule is an error of the test."""
    unknown = set(cfg) - set(DEFAULTS)
    if unknown:
        raise KeyError(f"not a RoutingConfig field: {sorted(unknown)}")
    full = {**DEFAULTS, **cfg}
    if full["scoring"] == "excess_loss" and "selection" not in cfg:
        full["selection"] = "topk"
    if full["selection"] not in SELECTIONS:
        raise ValueError(f"selection {full['selection']!r}")
    if full["scope"] not in ("batch", "sequence"):
        raise ValueError(f"scope {full['scope']!r}")
    return full


# Statistics and difficulty


def _shifted_softmax(logits):
    """z = x - max x, log Z = log sum exp z, p = exp(z - log Z), all in float64."""
    x = np.asarray(logits).astype(np.float64)
    z = x - x.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return z, log_z, np.exp(z - log_z)


def _one_hot(targets, classes):
    """onehot(y), and which targets lie in [0, V); a target outside has a row of zeros."""
    y = np.asarray(targets).astype(np.int64)
    return y[..., None] == np.arange(classes), (y >= 0) & (y < classes)


def statistics(logits, targets=None, ignore_index=-100):
    """Nll = lse(x) - x_y, entropy = lse(x) - sum(p x), p_(1), p_(1) - p_(2), ||p - onehot(y)||."""
    with np.errstate(all="ignore"):
        z, log_z, p = _shifted_softmax(logits)
        entropy = log_z[..., 0] - np.where(p == 0, 0.0, p * z).sum(axis=-1)  # 0 log 0 = 0
        descending = np.sort(p, axis=-1)[..., ::-1]
        confidence = descending[..., 0]
        second = descending[..., 1] if p.shape[-1] > 1 else np.zeros_like(confidence)
        result = {
            "nll": None,
            "entropy": entropy,
            "confidence": confidence.copy(),
            "margin": confidence - second,
            "error_norm": None,
        }
        if targets is not None:
            one_hot, in_range = _one_hot(targets, p.shape[-1])
            ignored = np.asarray(targets) == ignore_index
            nll = log_z[..., 0] - np.where(one_hot, z, 0.0).sum(axis=-1)
            error_norm = np.sqrt(((p - one_hot) ** 2).sum(axis=-1))
            for name, value in (("nll", nll), ("error_norm", error_norm)):
                value = np.where(in_range, value, np.nan)
                result[name] = np.where(ignored, 0.0, value)
    return result


def difficulty(stats, scoring, reference_nll=None):
    """Entropy, 1 - margin, nll, entropy + (1 - margin) + nll, error_norm, nll - reference_nll."""
    if scoring == "entropy":
        return stats["entropy"]
    if scoring == "margin":
        return 1.0 - stats["margin"]
    if scoring == "combined":
        score = stats["entropy"] + (1.0 - stats["margin"])
        return score if stats["nll"] is None else score + stats["nll"]
    if scoring not in ("loss", "error_norm", "excess_loss"):
        raise ValueError(f"scoring {scoring!r}")
    if stats["nll"] is None:
        raise ValueError(f"scoring {scoring!r} needs targets")
    if scoring == "loss":
        return stats["nll"]
    if scoring == "error_norm":
        return stats["error_norm"]
    if reference_nll is None:
        raise ValueError("scoring 'excess_loss' needs reference_nll")
    with np.errstate(all="ignore"):
        return stats["nll"] - np.asarray(reference_nll).astype(np.float64)


# Schedule


def _base_ratio(cfg, step):
    """Base = ONE - (ONE - target) min(step, w) // w, and target when w = 0."""
    target = max(1, round(cfg["min_tokens_ratio"] * ONE))
    step, w = int(step), int(cfg["warmup_steps"])
    if w == 0:
        return target
    while w >= 2**17:
        step >>= 1
        w >>= 1
    return ONE - (ONE - target) * min(step, w) // w


def _is_dynamic(cfg):
    """The dynamic threshold applies unless it is off or the rule is fixed_quota."""
    return bool(cfg["dynamic_threshold"]) and cfg["selection"] != "fixed_quota"


def _raised_ratio(cfg, base, mean, bits):
    """Ratio = min(ONE, base + ((((base sens) >> 14) (2^b - mean)) >> b))."""
    sens = round(cfg["threshold_sensitivity"] * ONE)
    return min(ONE, base + ((((base * sens) >> 14) * (2**bits - mean)) >> bits))


def token_ratio(cfg, step, confidence=None, eligible=None):
    """Ratio of ONE at this step, raised by mean = sum(floor(confidence 2^b)) // n_eligible."""
    cfg = merged(cfg)
    base = _base_ratio(cfg, step)
    if confidence is None or not _is_dynamic(cfg):
        return base
    with np.errstate(all="ignore"):
        c = np.asarray(confidence).astype(np.float32).ravel()
    tokens = c.size
    ceil_log2 = (tokens - 1).bit_length() if tokens > 1 else 0
    bits = min(16, 30 - ceil_log2)
    counted = [True] * tokens if eligible is None else np.asarray(eligible).ravel().tolist()
    total = n = 0
    for value, counts in zip(c.tolist(), counted, strict=True):
        if counts:
            n += 1
            value = 0.0 if value != value else min(max(value, 0.0), 1.0)
            total += int(value * 2**bits)
    return _raised_ratio(cfg, base, total // max(n, 1), bits)


def token_count(n, ratio):
    """K = ceil(n ratio / ONE), at least 1 when n >= 1, and 0 when n = 0."""
    n = int(n)
    return 0 if n == 0 else max(1, -(-n * int(ratio) // ONE))


def capacity(cfg, step, batch, length):
    """C = ceil(E level / ONE) of E = ceil(e M) that may be eligible.

    The level is the least of {1, 3/4, 1/2, final} that covers bound(step).
    """
    cfg = merged(cfg)

    def bound(at):
        base = _base_ratio(cfg, at)
        return _raised_ratio(cfg, base, 0, 16) if _is_dynamic(cfg) else base

    rows = batch if cfg["scope"] == "batch" else 1
    final = bound(cfg["warmup_steps"])
    candidates = [c for c in (ONE, 3 * ONE // 4, ONE // 2, final) if c >= final]
    level = min(c for c in candidates if c >= bound(step))
    most = math.ceil(cfg["max_eligible_ratio"] * (rows * length))
    slots = -(-most * level // ONE)
    if cfg["selection"] == "sequence_aware":
        slots = max(slots, rows * min(cfg["min_tokens_per_sequence"], length))
    return min(slots, rows * length)


# Uniform numbers


def _mix(x):
    """The lowbias32 hash: x ^= x >> 16, x *= 7FEB352D, x ^= x >> 15, x *= 846CA68B, x ^= x >> 16.

    For Python integers and for uint64 arrays, of which only the lower 32 bits are kept.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & WORD
    return x ^ (x >> 16)


def _hash_key(seed, draw, rank):
    """Key = mix(seed + G), then mix((key ^ rank) + G), then mix((key ^ draw) + G), modulo 2^32."""
    key = _mix((int(seed) + GOLDEN) & WORD)
    key = _mix(((key ^ (int(rank) & WORD)) + GOLDEN) & WORD)
    return _mix(((key ^ (int(draw) & WORD)) + GOLDEN) & WORD)


def uniform_bits(seed, draw, rank, index):
    """The lower 31 bits of mix(mix(index + key) ^ key)."""
    key = _hash_key(seed, draw, rank)
    h = _mix((int(index) + key) & WORD)
    return _mix(h ^ key) & 0x7FFFFFFF


def uniform_bits_array(seed, draw, rank, indices):
    """uniform_bits of every index, as int64; products of 32-bit words fit in uint64."""
    key = np.array([_hash_key(seed, draw, rank)], dtype=np.uint64)
    index = np.asarray(indices).astype(np.uint64)
    h = _mix((index + key) & WORD)
    return (_mix(h ^ key) & 0x7FFFFFFF).astype(np.int64).reshape(index.shape)


def inverse_uniform(bits):
    """1/u = 2^24 / (2 (bits >> 8) + 1) by long division to three base-64 digits, in float32."""
    d = 2 * (int(bits) >> 8) + 1
    whole, r = divmod(2**24, d)
    digits = 0
    for _ in range(3):
        digit, r = divmod(r * 64, d)
        digits = digits * 64 + digit
    return np.float32(whole) + np.float32(digits) * np.float32(2.0**-18)


# Selection rules: each takes one group of eligible flat indices and returns {index: weight}


def _hardest_first(group, hardness):
    """Descending difficulty, ties to the lower flat index."""
    return sorted(group, key=lambda i: (-hardness[i], i))


def _topk(group, k, hardness):
    """The k hardest."""
    return dict.fromkeys(_hardest_first(group, hardness)[:k], np.float32(1))


def _random(group, k, bits):
    """The k smallest uniform numbers, ties to the lower flat index."""
    return dict.fromkeys(sorted(group, key=lambda i: (bits[i], i))[:k], np.float32(1))


def stratum_quotas(n, k, strata):
    """(sizes, quotas): part i gets k (L - i) / W by largest remainder, overflow passed on."""
    sizes = [n // strata + (1 if i < n % strata else 0) for i in range(strata)]
    total = strata * (strata + 1) // 2
    quotas = [k * (strata - i) // total for i in range(strata)]
    remainders = [k * (strata - i) % total for i in range(strata)]
    by_remainder = sorted(range(strata), key=lambda i: (-remainders[i], i))
    for i in by_remainder[: k - sum(quotas)]:
        quotas[i] += 1
    carry = 0
    given = []
    for size, quota in zip(sizes, quotas, strict=True):
        given.append(min(quota + carry, size))
        carry += quota - given[-1]
    for i in range(strata):  # what is left goes to the hardest part with room
        extra = min(carry, sizes[i] - given[i])
        given[i] += extra
        carry -= extra
    assert carry == 0
    assert sum(given) == k
    return sizes, given


def _stratified(group, k, hardness, bits, strata):
    """From each part of the ranking, its quota of the smallest uniform numbers."""
    ranked = _hardest_first(group, hardness)
    kept = {}
    start = 0
    for size, give in zip(*stratum_quotas(len(ranked), k, strata), strict=True):
        kept.update(_random(ranked[start : start + size], give, bits))
        start += size
    return kept


def _floor_tokens(group, hardness, length, minimum):
    """The min(minimum, eligible) hardest tokens of every sequence."""
    rows = {}
    for i in group:
        rows.setdefault(i // length, []).append(i)
    floors = set()
    for row in rows.values():
        floors.update(_hardest_first(row, hardness)[:minimum])
    return floors


def _sequence_aware(group, k, hardness, floors):
    """The floor tokens first, hardest first, then the hardest of the rest, k in all."""
    ranked = sorted(group, key=lambda i: (i not in floors, -hardness[i], i))
    return dict.fromkeys(ranked[:k], np.float32(1))


def _importance(group, k, scores, bits, floor):
    """The k largest q/u with weight max(1, tau/q), q = max(difficulty, 0) + floor, in float32."""
    size = {}
    priority = {}
    for i in group:
        with np.errstate(all="ignore"):
            q = np.maximum(scores[i], np.float32(0)) + np.float32(floor)
        if np.isfinite(q):
            size[i] = min(q, np.float32(2.0**100))
            priority[i] = size[i] * inverse_uniform(bits[i])
        else:
            priority[i] = np.float32(np.inf)
    ranked = sorted(group, key=lambda i: (-priority[i], i))
    tau = np.float32(0)
    if k < len(ranked) and np.isfinite(priority[ranked[k]]):
        tau = priority[ranked[k]]
    kept = {}
    for i in ranked[:k]:
        # tau > 0 implies q > 0 here, because the priority of a kept token is at least tau.
        weighted = i in size and tau > 0
        kept[i] = max(np.float32(1), tau / size[i]) if weighted else np.float32(1)
    return kept


def select(
    difficulty,
    cfg,
    step=0,
    draw=None,
    rank=0,
    eligible=None,
    confidence=None,
    capacity=None,
):
    """k = ceil(n ratio / ONE) of the n eligible tokens, by cfg's rule, in the batch or each row."""
    cfg = merged(cfg)
    rule = cfg["selection"]
    with np.errstate(all="ignore"):
        scores = np.asarray(difficulty).astype(np.float32)
    batch, length = scores.shape
    tokens = batch * length
    if eligible is None:
        eligible = np.ones((batch, length), dtype=bool)
    allowed = np.asarray(eligible).ravel().tolist()
    ratio = token_ratio(cfg, step, confidence, eligible)

    scores = scores.ravel()
    hardness = [float("inf") if v != v else v for v in scores.tolist()]
    draw = step if draw is None else draw
    bits = uniform_bits_array(cfg["seed"], draw, rank, np.arange(tokens)).tolist()

    rows = [[i for i in range(b * length, (b + 1) * length) if allowed[i]] for b in range(batch)]
    groups = rows if cfg["scope"] == "sequence" else [[i for row in rows for i in row]]
    selected = []
    for group in groups:
        k = token_count(len(group), ratio)
        if rule == "sequence_aware":
            floors = _floor_tokens(group, hardness, length, cfg["min_tokens_per_sequence"])
            k = max(k, len(floors))
        if capacity is not None:
            k = min(k, capacity)
        if rule == "stratified":
            kept = _stratified(group, k, hardness, bits, cfg["num_strata"])
        elif rule == "sequence_aware":
            kept = _sequence_aware(group, k, hardness, floors)
        elif rule == "importance":
            kept = _importance(group, k, scores, bits, cfg["importance_floor"])
        elif rule == "random":
            kept = _random(group, k, bits)
        else:
            kept = _topk(group, k, hardness)
        assert len(kept) == k
        selected.append(kept)

    counts = [len(kept) for kept in selected]
    slots = max(counts, default=0) if capacity is None else capacity
    padding = length if cfg["scope"] == "sequence" else tokens
    mask = np.zeros(tokens, dtype=bool)
    indices = np.full((len(groups), slots), padding, dtype=np.int32)
    weights = np.zeros((len(groups), slots), dtype=np.float32)
    for g, kept in enumerate(selected):
        origin = g * length if cfg["scope"] == "sequence" else 0
        for slot, i in enumerate(sorted(kept)):
            mask[i] = True
            indices[g, slot] = i - origin
            weights[g, slot] = kept[i]
    mask = mask.reshape(batch, length)
    if cfg["scope"] == "sequence":
        return Truth(mask, indices, weights, np.array(counts, dtype=np.int32), ratio)
    return Truth(mask, indices[0], weights[0], counts[0], ratio)


# Loss


def token_weights(selection):
    """(B, S) float64: each selected token's weight, 0 elsewhere."""
    batch, length = selection.mask.shape
    dense = np.zeros(batch * length)
    indices, weights = selection.indices, selection.weights
    if indices.ndim == 1:
        indices, weights = indices[None], weights[None]
        padding = batch * length
    else:
        padding = length
    for g in range(indices.shape[0]):
        for i, w in zip(indices[g].tolist(), weights[g].tolist(), strict=True):
            if i != padding:
                dense[g * length + i] = w
    return dense.reshape(batch, length)


def _scale(targets, selection, cfg, reduction, num_items):
    """1, 1 / k or 1 / n_eligible (importance); times n_eligible / M; 0 when nothing is selected."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}")
    if reduction == "sum" and num_items is not None:
        raise ValueError("num_items is defined for reduction='mean' only")
    chosen = int(selection.mask.sum())
    eligible = int((np.asarray(targets) != cfg["ignore_index"]).sum())
    if chosen == 0 or eligible == 0:
        return 0.0
    if reduction == "sum":
        return 1.0
    mean = 1.0 / (eligible if cfg["selection"] == "importance" else chosen)
    return mean if num_items is None else mean * eligible / num_items


def loss(logits, targets, selection, cfg, reduction="mean", num_items=None):
    """sum(w nll) over the selected tokens, over k (importance: over n_eligible)."""
    cfg = merged(cfg)
    nll = statistics(logits, targets, cfg["ignore_index"])["nll"]
    weighted = token_weights(selection)[selection.mask] * nll[selection.mask]
    scale = _scale(targets, selection, cfg, reduction, num_items)
    return float(weighted.sum() * scale) if scale else 0.0


def loss_gradient(logits, targets, selection, cfg, reduction="mean", num_items=None):
    """d loss / d x_i = w_i (p_i - onehot(y_i)) / denominator for selected i, 0 elsewhere."""
    cfg = merged(cfg)
    with np.errstate(all="ignore"):
        p = _shifted_softmax(logits)[2]
    one_hot, in_range = _one_hot(targets, p.shape[-1])
    ignored = np.asarray(targets) == cfg["ignore_index"]
    factor = token_weights(selection) * _scale(targets, selection, cfg, reduction, num_items)
    trained = selection.mask & ~ignored & (factor != 0)
    difference = np.where(in_range[..., None], p - one_hot, np.nan)
    return np.where(trained[..., None], factor[..., None] * difference, 0.0)
