"""What CGGR computes, written once against the array API standard.

NumPy arrays, torch tensors and JAX arrays run the same lines: eagerly, under ``jax.jit`` and under
``torch.compile(fullgraph=True)``. Nothing here imports a framework.
"""

from cggr.spec.config import RoutingConfig
from cggr.spec.scoring import token_difficulty
from cggr.spec.selection import Selection, select_tokens
from cggr.spec.statistics import TokenStatistics, token_statistics

__all__ = [
    "RoutingConfig",
    "Selection",
    "TokenStatistics",
    "select_tokens",
    "token_difficulty",
    "token_statistics",
]
