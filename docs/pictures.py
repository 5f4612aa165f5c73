"""Draws the pictures of docs/concepts.md and docs/evidence.md: ``python docs/pictures.py``.

What those of concepts show is computed by the code they explain: `cggr.spec` on NumPy. That of the
evidence shows final losses of races, whose results are in benchmarks/results/evidence.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cggr.spec import RoutingConfig, Selection, select_tokens
from cggr.spec.schedule import ONE, token_ratio

FOLDER = Path(__file__).parent / "assets"
HARD, CHOSEN, UNUSED = "#e65a14", "#1f5fbf", "#c8c8c8"  # as `cggr show` has them
RESULTS = (
    ("summaries", "summaries of functions"),
    ("summaries_adapted", "the same, prompts first"),
    ("completions completions-prompts", "last quarters of code"),
    ("memory", "the same, in 12 GiB"),
    ("noise", "30 % noise"),
    ("noise_apart", "the same, a reference of other packages"),
    ("clients_wide", "a known text"),
    ("scratch", "from scratch"),
    ("original", "the race of cggr 0.5.0"),
    ("original-tokens", "the same, of tokens"),
)
RULES = ("topk", "stratified", "sequence_aware", "importance", "random")


def toy_difficulty(n_sequences: int, length: int) -> np.ndarray:
    """Difficulties as of a language model, many small, few large; the last sequence is easy."""
    random = np.random.default_rng(4)
    scale = np.linspace(1.2, 0.2, n_sequences)[:, None]
    return (scale * random.gamma(1.2, 1.0, (n_sequences, length))).astype(np.float32)


def select(difficulty: np.ndarray, selection: str, **options: object) -> Selection:
    """A quarter of the tokens."""
    config = RoutingConfig(
        selection=selection,
        min_tokens_ratio=0.25,
        warmup_steps=0,
        dynamic_threshold=False,
        **options,  # type: ignore[arg-type]
    )
    return select_tokens(difficulty, config)


def step() -> Figure:
    """One step of the token split: all tokens are scored, few have a backward pass."""
    difficulty = toy_difficulty(1, 20)
    chosen = select(difficulty, "importance").mask
    everything = np.ones_like(chosen)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    rows = (
        ("score: forward, no gradient", difficulty, everything),
        ("select a quarter", difficulty, chosen),
        ("learn: forward", None, chosen),
        ("learn: backward", None, chosen),
    )
    for axes, (title, shade, which) in zip(figure.subplots(len(rows)), rows, strict=True):
        _cells(axes, shade, which, (1, 20))
        axes.set_ylabel(title, rotation=0, ha="right", va="center")
    return figure


def schedule() -> Figure:
    """The ratio over a run, at three confidences, and the slots that hold a selection."""
    config = RoutingConfig(min_tokens_ratio=0.25, warmup_steps=1000, dynamic_threshold=True)
    steps = np.arange(0, 1501, 10)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    for confidence, color in ((0.0, "#e65a14"), (0.5, "#9467bd"), (1.0, "#1f5fbf")):
        top_probability = np.full((1, 64), confidence, dtype=np.float32)
        ratios = [
            token_ratio(
                config,
                np.array([step], dtype=np.int32),
                top_probability,
                np.ones((1, 64), dtype=bool),
                xp=np,
            )[0]
            / ONE
            for step in steps
        ]
        axes.plot(steps, ratios, color=color, label=f"ratio at mean confidence {confidence:g}")
    levels = [config.capacity_ratio(int(step)) / ONE for step in steps]
    axes.step(steps, levels, color="#808080", ls="--", where="post", label="static capacity")
    axes.set(xlabel="optimizer step", ylabel="part of the tokens", ylim=(0, 1.05))
    axes.legend(frameon=False)
    return figure


def selections() -> Figure:
    """The five rules on the same 4 sequences of 10 tokens."""
    difficulty = toy_difficulty(4, 10)
    figure = Figure(figsize=(9, 8), layout="constrained")
    for axes, rule in zip(figure.subplots(len(RULES), sharex=True), RULES, strict=True):
        found = select(difficulty, rule)
        mask = found.mask.reshape(-1)
        axes.bar(range(40), difficulty.reshape(-1), color=np.where(mask, CHOSEN, UNUSED))
        axes.set_ylim(0, 1.25 * difficulty.max())
        axes.set_title(f'selection="{rule}"', loc="left", family="monospace", fontsize=10)
        axes.set_ylabel("difficulty")
        for border in (9.5, 19.5, 29.5):
            axes.axvline(border, color="#808080", lw=0.6, ls=":")
        if rule == "importance":
            for index, weight in zip(found.indices, found.weights, strict=True):
                height = difficulty.reshape(-1)[index]
                axes.text(index, height, f"{weight:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("token, in 4 sequences of 10")
    return figure


def splits() -> Figure:
    """What is trained on of one batch in either split."""
    difficulty = toy_difficulty(4, 20)
    tokens = select(difficulty, "stratified", scope="sequence").mask
    rows = select(difficulty.mean(axis=1, keepdims=True), "stratified").mask
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    shown = (('split="token"', tokens), ('split="sequence"', np.broadcast_to(rows, (4, 20))))
    for axes, (title, mask) in zip(figure.subplots(1, 2), shown, strict=True):
        _cells(axes, difficulty, mask, difficulty.shape)
        axes.set_title(title, loc="left", family="monospace", fontsize=10)
        axes.set_ylabel("sequences")
        axes.set_xlabel("tokens")
    return figure


def evidence() -> Figure:
    """Final held-out losses of lanes and seeds, each lane at its best learning rate."""
    tables = _tables()
    figure = Figure(figsize=(9, 10), layout="constrained")
    for axes, (names, title) in zip(figure.subplots(5, 2).flat, RESULTS, strict=True):
        races = [tables.lanes_of(tables.results_of(name)) for name in names.split()]
        best = {lane: found.best for raced in races for lane, found in raced.items()}
        order = sorted(best, key=lambda lane: -best[lane].loss)
        for place, lane in enumerate(order):
            color = HARD if lane.startswith("dense") else CHOSEN
            color = "#808080" if "random" in lane else color
            losses = best[lane].final("loss")
            axes.plot(losses, [place] * len(losses), "o", color=color, alpha=0.5)
            axes.plot(best[lane].loss, place, "|", color=color, ms=16, mew=2)
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.set_ylim(-0.5, len(order) - 0.5)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "held-out loss at equal time, a dot for each seed, a line at their mean; "
        "orange: dense, blue: CGGR, grey: random selection",
        fontsize=9,
    )
    return figure


def _tables() -> ModuleType:
    """The script that prints the same results."""
    path = Path(__file__).parents[1] / "benchmarks" / "evidence" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cells(axes: Axes, shade: np.ndarray | None, which: np.ndarray, shape: tuple[int, int]) -> None:
    """Tokens as cells: darker where harder, with a blue frame where selected."""
    rank = np.zeros(shape) if shade is None else shade.argsort(None).argsort().reshape(shape)
    for (row, column), chosen in np.ndenumerate(which):
        color: object = "none"
        if shade is not None:
            color = (HARD, 0.85 * rank[row, column] / (rank.size - 1))
        elif chosen:
            color = CHOSEN
        axes.add_patch(Rectangle((column, row), 1, 1, fc=color, ec=UNUSED, lw=0.6))
    if shade is not None and not which.all():
        for row, column in np.argwhere(which):
            place = (column + 0.08, row + 0.08)
            axes.add_patch(Rectangle(place, 0.84, 0.84, fc="none", ec=CHOSEN, lw=2.2))
    axes.set(xlim=(-0.1, shape[1] + 0.1), ylim=(shape[0] + 0.1, -0.1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw(folder: Path) -> None:
    """Writes all pictures, the same bytes with the same matplotlib."""
    # Text as outlines: no reader needs the font.
    with matplotlib.rc_context({"svg.hashsalt": "cggr", "svg.fonttype": "path"}):
        for picture in (step, schedule, selections, splits, evidence):
            canvas = FigureCanvasSVG(picture())
            canvas.print_svg(folder / f"{picture.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
