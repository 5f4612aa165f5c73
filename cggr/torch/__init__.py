"""CGGR for PyTorch: scoring, selection, losses and model wrappers.

Labels of :class:`CGGRModel` and :class:`CGGRScorer` are Hugging Face style, those of
:class:`CGGRLoss` and :class:`CGGRLinearLoss` are aligned with the logits.
"""

from cggr.spec import RoutingConfig, Selection, TokenStatistics
from cggr.torch.captured import CapturedStep
from cggr.torch.flash import (
    enable_flash_attention,
    get_flash_attention_info,
    load_model_with_flash_attention,
)
from cggr.torch.functional import (
    linear_token_statistics,
    select_tokens,
    token_difficulty,
    token_statistics,
)
from cggr.torch.loss import CGGRLinearLoss, CGGRLoss
from cggr.torch.model import CGGRModel
from cggr.torch.router import TruncatedRouter, create_truncated_router
from cggr.torch.scorer import CGGRScorer

__all__ = [
    "CGGRLinearLoss",
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "CapturedStep",
    "RoutingConfig",
    "Selection",
    "TokenStatistics",
    "TruncatedRouter",
    "create_truncated_router",
    "enable_flash_attention",
    "get_flash_attention_info",
    "linear_token_statistics",
    "load_model_with_flash_attention",
    "select_tokens",
    "token_difficulty",
    "token_statistics",
]
