"""The command ``cggr show``: a text as HTML, coloured by how hard its tokens are to predict."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from cggr.race.pretrained import load_tokenizer
from cggr.race.settings import RaceError
from cggr.race.text import read_documents
from cggr.race.torch_lanes import find_device, load_folder
from cggr.score import check_size
from cggr.spec import RoutingConfig
from cggr.torch import CGGRScorer, create_truncated_router, select_tokens
from cggr.torch.functional import aligned_targets

_DARKEST = 0.85  # of a colour that black text is still read on


@dataclasses.dataclass(frozen=True)
class ShownToken:
    """A token as the page shows it: how dark, whether underlined, and what is said of it."""

    text: str
    shade: float
    selected: bool
    title: str


def show_text(
    *,
    file: Path,
    model: Path,
    output: Path,
    scoring: str,
    selection: str,
    ratio: float,
    router_layers: int | None,
    context: int,
    max_tokens: int,
    device: str,
) -> dict[str, Any]:
    """Writes the page; the command's options.

    Returns:
        n_tokens, n_selected and the mean loss of all and of the selected tokens, in nats.

    Raises:
        RaceError: The file is no text, too short, or the model cannot be loaded, is too small, or
            scores tokens by what is no number.
    """
    (document,), _ = read_documents([file], max_bytes=None, option="FILE")
    tokenizer, _ = load_tokenizer(model)
    encoding = tokenizer.encode(document.text, add_special_tokens=False)
    ids, spans = encoding.ids[:max_tokens], encoding.offsets[:max_tokens]
    context = min(context, len(ids))
    if context < 2:
        raise RaceError(f"{file}: {len(ids)} tokens, of which none has one before it to tell it by")
    loaded = load_folder(model, torch.float32).to(find_device(device)).eval()
    check_size(loaded, model, context, tokenizer.get_vocab_size())
    layers = loaded.config.get_text_config().num_hidden_layers
    if router_layers is not None and router_layers > layers:
        raise RaceError(f"--router-layers {router_layers}: the model has {layers} layers")
    router = loaded if router_layers is None else create_truncated_router(loaded, router_layers)
    config = RoutingConfig(
        scoring=scoring,
        selection=selection,
        min_tokens_ratio=ratio,
        warmup_steps=0,
        dynamic_threshold=False,
    )
    found = _scored(CGGRScorer(router, config), ids, context, loaded.device)
    if not torch.isfinite(found["difficulty"][found["is_target"]]).all():
        raise RaceError(f"--model {model}: its scores of this text are not finite")
    page = _page(document.name, document.text, spans, context, found, config, model.resolve().name)
    output.write_text(page, encoding="utf-8")
    nll, selected = found["nll"], found["selected"]
    return {
        "n_tokens": len(ids),
        "n_selected": int(selected.sum()),
        "loss": nll[found["is_target"]].mean().item(),
        "selected_loss": nll[selected].mean().item(),
    }


def _scored(
    scorer: CGGRScorer, ids: list[int], context: int, device: torch.device
) -> dict[str, Tensor]:
    """What the scorer says, ``(N,)`` each, of tokens as targets: of the positions before them."""
    n_rows = -(-len(ids) // context)
    ids_BS = torch.zeros(n_rows * context, dtype=torch.int64)
    ids_BS[: len(ids)] = torch.tensor(ids)
    ids_BS = ids_BS.view(n_rows, context).to(device)
    labels_BS = ids_BS.clone()
    labels_BS.view(-1)[len(ids) :] = scorer.config.ignore_index
    targets_BS = aligned_targets(
        labels_BS, None, shift=True, ignore_index=scorer.config.ignore_index
    )
    scores = scorer.score(targets_BS, input_ids=ids_BS)
    mask_BS = select_tokens(
        scores.difficulty,
        scorer.config,
        eligible=scores.eligible,
        confidence=scores.statistics.confidence,
    ).mask

    def of_targets(x_BS: Tensor) -> Tensor:
        """From the positions that predict to the tokens that are predicted."""
        shifted_BS = x_BS.roll(1, dims=1)
        shifted_BS[:, 0] = 0
        return shifted_BS.reshape(-1)[: len(ids)].cpu()

    return {
        "is_target": of_targets(scores.eligible),
        "selected": of_targets(mask_BS),
        "difficulty": of_targets(scores.difficulty),
        "nll": of_targets(scores.statistics.nll),
        "entropy": of_targets(scores.statistics.entropy),
        "margin": of_targets(scores.statistics.margin),
    }


def _page(
    name: str,
    text: str,
    spans: list[tuple[int, int]],
    context: int,
    found: dict[str, Tensor],
    config: RoutingConfig,
    model: str,
) -> str:
    is_target, difficulty = found["is_target"], found["difficulty"]
    n_targets = int(is_target.sum())
    rank = torch.zeros(len(spans))
    rank[is_target] = difficulty[is_target].argsort().argsort().float() / max(n_targets - 1, 1)
    tokens, shown = [], 0
    for i, (_, end) in enumerate(spans):
        # What lies between two tokens (some tokenizers drop spaces) belongs to the first; so does a
        # character of which both have bytes.
        until = max(shown, end, spans[i + 1][0] if i + 1 < len(spans) else 0)
        title = "the first of its sequence: nothing predicts it"
        if is_target[i]:
            title = ", ".join(
                f"{key} {found[key][i]:.2f}" for key in ("difficulty", "nll", "entropy", "margin")
            )
        tokens.append(
            ShownToken(
                text=text[shown:until],
                shade=_DARKEST * float(rank[i]) if is_target[i] else 0.0,
                selected=bool(found["selected"][i]),
                title=title,
            )
        )
        shown = until
    n_selected = int(found["selected"].sum())
    loss, selected_loss = (
        found["nll"][which].mean().item() for which in (is_target, found["selected"])
    )
    facts = (
        ("model", model),
        ("scoring, selection", f"{config.scoring}, {config.selection}"),
        ("selected", f"{n_selected:,} of {n_targets:,} tokens ({n_selected / n_targets:.1%})"),
        ("mean loss", f"{loss:.3f} nats; of the selected {selected_loss:.3f}"),
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cggr", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("show.html.j2").render(
        title=f"What CGGR learns from in {name}",
        facts=facts,
        histogram=_histogram(difficulty[is_target], difficulty[found["selected"]]),
        rows=[tokens[i : i + context] for i in range(0, len(tokens), context)],
    )


def _histogram(every: Tensor, selected: Tensor) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2), layout="constrained")
    axes = figure.subplots()
    bins = torch.linspace(float(every.min()), float(every.max()) + 1e-6, 41).tolist()
    axes.hist(every.tolist(), bins, color="#e65a1455", label="all")
    axes.hist(selected.tolist(), bins, color="#1f5fbf", label="selected")
    axes.set(xlabel="difficulty", ylabel="tokens")
    axes.legend(frameon=False)
    drawn = io.StringIO()
    FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None})
    image = drawn.getvalue()
    return image[image.index("<svg") :]  # without the head of a file of its own
