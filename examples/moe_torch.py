"""Mixture of experts with null routing: what a cheap exit finds easy, no expert sees.

A CGGRScorer judges every token by the embeddings and the head alone, before any layer has run. Its
mask goes to the mixture-of-experts layers, in which tokens outside it take the null route: the
residual stream passes them by, and no expert spends a forward or a backward on them. Nothing of the
batch is left out of the loss. The score is the entropy, which knows no label: routing by the loss
would tell the layers what they are to predict.

    python examples/moe_torch.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cggr.torch import CGGRScorer

# B sequences of S tokens, N = B S; D hidden size, E experts, V classes; C slots for tokens.
V, D, E, LAYERS = 64, 64, 4, 2


class NullRoutedExperts(nn.Module):
    """One expert for each selected token, by a learned gate; nothing for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, D, 4 * D) * D**-0.5)
        self.down = nn.Parameter(torch.randn(E, 4 * D, D) * (4 * D) ** -0.5)

    def forward(self, x_BSD: Tensor, index_C: Tensor) -> Tensor:
        x_ND = x_BSD.reshape(-1, D)
        # A slot without a token has index N, a row of zeros at the end.
        chosen_CD = F.pad(x_ND, (0, 0, 0, 1))[index_C]
        weight_C, expert_C = self.gate(chosen_CD).softmax(dim=1).max(dim=1)
        out_CD = torch.zeros_like(chosen_CD)
        for expert in range(E):
            mine_C = (expert_C == expert)[:, None]
            hidden = F.silu(torch.where(mine_C, chosen_CD, 0) @ self.up[expert])
            out_CD = torch.where(mine_C, hidden @ self.down[expert], out_CD)
        update_ND = F.pad(torch.zeros_like(x_ND), (0, 0, 0, 1))
        update_ND = update_ND.index_add(0, index_C, out_CD * weight_C[:, None])[:-1]
        return x_BSD + update_ND.view_as(x_BSD)


class Decoder(nn.Module):
    """Causal attention and experts, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.exit = nn.Sequential(nn.Embedding(V, D), nn.LayerNorm(D), nn.Linear(D, V))
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(D, 4, batch_first=True) for _ in range(LAYERS)
        )
        self.experts = nn.ModuleList(NullRoutedExperts() for _ in range(LAYERS))

    def forward(self, ids_BS: Tensor, index_C: Tensor) -> Tensor:
        embed, norm, head = self.exit
        x_BSD = embed(ids_BS)
        causal_SS = nn.Transformer.generate_square_subsequent_mask(ids_BS.shape[1])
        for attention, experts in zip(self.attention, self.experts, strict=True):
            y_BSD = F.layer_norm(x_BSD, (D,))
            x_BSD = x_BSD + attention(y_BSD, y_BSD, y_BSD, attn_mask=causal_SS, is_causal=True)[0]
            x_BSD = experts(x_BSD, index_C)
        return head(norm(x_BSD))


def text(n: int, length: int, generator: torch.Generator) -> Tensor:
    """Sequences in which every second token follows from the one before, and the others do not."""
    free_NS = torch.randint(0, V, (n, length), generator=generator)
    ids_NS = free_NS.clone()
    ids_NS[:, 1::2] = (5 * free_NS[:, 0:-1:2] + 3) % V
    return ids_NS


def train(steps: int = 300, *, ratio: float = 0.5, seed: int = 0) -> list[float]:
    """Losses of a run, in nats a token; half of the tokens nobody can predict: 2.0 is the least."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Decoder()
    scorer = CGGRScorer(
        model.exit, scoring="entropy", selection="topk", min_tokens_ratio=ratio, warmup_steps=0,
        dynamic_threshold=False, capacity="static",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        ids_BS = text(16, 32, generator)
        _, _, info = scorer(ids_BS)
        logits_BSV = model(ids_BS, info["selection"].indices.long())
        exit_BSV = model.exit(ids_BS)  # the exit learns too, or its scores would mean nothing
        targets = ids_BS[:, 1:].flatten()
        loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), targets)
        judge = F.cross_entropy(exit_BSV[:, :-1].flatten(0, 1), targets)
        (loss + 0.1 * judge).backward()
        optimizer.step()
        optimizer.zero_grad()
        scorer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            seen = scorer.get_metrics()["tokens_selected"] / ids_BS.numel()
            print(f"step {step:4}  loss {losses[-1]:.3f}  tokens through experts {seen:.0%}")
    return losses


if __name__ == "__main__":
    train()
