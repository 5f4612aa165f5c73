"""How a head's products are divided, alike in both frontends: it decides the bits that come out."""

# Logits in memory at a time where a head's products are made by cuBLAS: 128 MiB in bfloat16. Fewer
# cost time, in the reading of the weight (rows) or in the shape of the products (classes).
MAX_LOGITS = 1 << 26
PRODUCT_TILE = 256  # rows or classes; a chunk is a multiple of it
# Above it, cuBLAS's better products outweigh the logits' way through memory (see README.md).
MAX_FUSED_HIDDEN = 1024


def row_chunk(n_rows: int, n_classes: int) -> int:
    """Rows of each of equal chunks of all: whole tiles, one at least, within MAX_LOGITS."""
    tiles, most = -(-n_rows // PRODUCT_TILE), _most_tiles(n_classes, MAX_LOGITS)
    chunks = max(1, -(-tiles // most))
    return max(1, -(-tiles // chunks)) * PRODUCT_TILE


def class_chunk(n_rows: int, limit: int | None = None) -> int:
    """Classes of a chunk for so many rows, whose number may change from step to step.

    A power of two of tiles: the kernel that follows is compiled for it, and should not be often.
    """
    most = _most_tiles(n_rows, limit or MAX_LOGITS)
    return (1 << (most.bit_length() - 1)) * PRODUCT_TILE


def _most_tiles(width: int, limit: int) -> int:
    return max(1, limit // (max(width, 1) * PRODUCT_TILE))


def fuses(hidden_size: int, itemsize: int, capability: int) -> bool:
    """Whether the fused kernel is the faster way, and runs on a device of this major capability."""
    # Its tiles want the shared memory of a Hopper or of a data-centre Blackwell.
    return itemsize == 2 and hidden_size <= MAX_FUSED_HIDDEN and capability in (9, 10)
