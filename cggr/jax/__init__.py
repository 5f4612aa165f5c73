"""CGGR for JAX and Flax: scoring, selection, losses and nnx model wrappers.

The functions are pure and work with any JAX code; the modules are for ``flax.nnx``. Labels of
:class:`CGGRModel` and :class:`CGGRScorer` are Hugging Face style, those of the losses are aligned
with the logits.
"""

from cggr.jax.attention import RowAttention
from cggr.jax.functional import (
    linear_token_statistics,
    select_tokens,
    token_difficulty,
    token_statistics,
)
from cggr.jax.loss import CGGRLinearLoss, CGGRLoss, cggr_linear_loss, cggr_loss
from cggr.jax.model import CGGRModel
from cggr.jax.router import TruncatedRouter, create_truncated_router
from cggr.jax.scorer import CGGRScorer
from cggr.spec import RoutingConfig, Selection, TokenStatistics

__all__ = [
    "CGGRLinearLoss",
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "RoutingConfig",
    "RowAttention",
    "Selection",
    "TokenStatistics",
    "TruncatedRouter",
    "cggr_linear_loss",
    "cggr_loss",
    "create_truncated_router",
    "linear_token_statistics",
    "select_tokens",
    "token_difficulty",
    "token_statistics",
]
