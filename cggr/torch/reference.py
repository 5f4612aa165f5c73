"""Scoring a stream of tokens by a reference model, once and for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from cggr.reference import ReferenceLosses
from cggr.torch.functional import token_statistics
from cggr.torch.router import cache_switch, call_model, logits_of


@torch.no_grad()
def score_reference(
    model: nn.Module,
    reference: ReferenceLosses,
    *,
    context: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n_tokens: None,
) -> None:
    """Compute the losses that a reference has not yet, from where it ended.

    The stream is cut into windows of `context` tokens, each `stride` behind the one before; a
    token's loss is that in the first window that predicts it, so that all but the first have
    ``context - stride`` tokens before them at least.

    Args:
        model: A causal language model, ``(input_ids) -> logits``; in its mode, on its device.
        reference: What :meth:`ReferenceLosses.create` made; filled in place, a batch at a time.
        context: Tokens that the model sees at once.
        stride: New tokens in each window; half of `context` if None.
        batch_size: Windows at once.
        advance: Is told of every so many tokens that are done.

    Raises:
        FloatingPointError: The model gives a loss that is not finite.
        ValueError: `context`, `stride` or `batch_size` is out of range.

    Example:
        >>> folder = getfixture("tmp_path") / "reference"
        >>> reference = ReferenceLosses.create(folder, np.arange(40), {"model": "table"})
        >>> score_reference(nn.Embedding(40, 40), reference, context=16)
        >>> reference.n_done
        39
    """
    stride = max(1, context // 2) if stride is None else stride
    if context < 1 or batch_size < 1 or not 1 <= stride <= context:
        raise ValueError(
            f"context and batch_size must be positive and stride in [1, context], got "
            f"context={context}, stride={stride}, batch_size={batch_size}."
        )
    parameter = next(model.parameters())
    switch = cache_switch(model)
    n_targets = len(reference.tokens) - 1
    context = min(context, max(1, n_targets))
    for windows in _batches(reference.n_done, n_targets, context, stride, batch_size):
        begins = np.array([begin for begin, _ in windows])
        tokens = np.asarray(reference.tokens[begins[:, None] + np.arange(context + 1)])
        ids = torch.from_numpy(tokens.astype(np.int64)).to(parameter.device)
        logits = logits_of(call_model(model, switch | {"input_ids": ids[:, :-1]}))
        losses = token_statistics(logits, ids[:, 1:]).nll.float().cpu().numpy()
        for (begin, first), row in zip(windows, losses, strict=True):
            new = row[first - begin :]
            if len(wrong := np.flatnonzero(~np.isfinite(new))):
                raise FloatingPointError(
                    f"the model's loss at position {first + wrong[0]} is {new[wrong[0]]}, in "
                    f"{logits.dtype}: its losses must be finite."
                )
            reference.losses[first : begin + context] = new
            advance(begin + context - first)
    flush: Any = getattr(reference.losses, "flush", lambda: None)
    flush()


def _batches(
    done: int, n_targets: int, context: int, stride: int, batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Windows as (first token, first position whose loss is new), a batch at a time."""
    windows: list[tuple[int, int]] = []
    while done < n_targets:
        # The last one is moved back, so as to be as long as the others.
        begin = 0 if done == 0 else min(done + stride - context, n_targets - context)
        begin = max(begin, 0)
        windows.append((begin, done))
        done = begin + context
        if len(windows) == batch_size or done >= n_targets:
            yield windows
            windows = []
