"""Confidence-Gated Gradient Routing: spend the backward pass on the tokens worth learning from.

PyTorch users import :mod:`cggr.torch`, JAX and Flax users :mod:`cggr.jax`. This package imports no
framework.
"""

from importlib.metadata import PackageNotFoundError, version

from cggr.spec.config import RoutingConfig

try:
    __version__ = version("cggr")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"

__all__ = ["RoutingConfig", "__version__"]

_FRONTEND_NAMES = frozenset(
    {
        "CGGRLinearLoss",
        "CGGRLoss",
        "CGGRModel",
        "CGGRScorer",
        "TruncatedRouter",
        "create_truncated_router",
    }
)


def __getattr__(name: str) -> object:
    if name in _FRONTEND_NAMES:
        raise ImportError(
            f"{name} lives in a frontend: use `from cggr.torch import {name}` with PyTorch "
            f"or `from cggr.jax import {name}` with Flax."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
