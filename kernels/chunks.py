"""How a head's products are divided, alike in both frontends: it decides the bits that come out."""

# Logits in memory at a time where a head's products are made by cuBLAS: 128 MiB in bfloat16. Fewer
# cost time, in the reading of the weight (rows) or in the shape of the products (classes).
MAX_LOGITS = 1 << 26
PRODUCT_TILE = 256  # rows or classes; a chunk is a multiple of it
# Above it, cuBLAS's better products outweigh the logits' way through memory (see README.md).
MAX_FUSED_HIDDEN = 1024


def chunk_size(length: int, width: int, limit: int | None = None) -> int:
    """Size of equal chunks of `length`, of at most `limit` logits with `width`, in whole tiles."""
    tiles = -(-length // PRODUCT_TILE)
    chunks = max(1, -(-length * width // (limit or MAX_LOGITS)))
    return max(1, -(-tiles // chunks)) * PRODUCT_TILE


def fuses(hidden_size: int, itemsize: int, capability: int) -> bool:
    """Whether the fused kernel is the faster way, and runs on a device of this major capability."""
    # Its tiles want the shared memory of a Hopper or of a data-centre Blackwell.
    return itemsize == 2 and hidden_size <= MAX_FUSED_HIDDEN and capability in (9, 10)
