"""Which heads the attention kernels take, and where they are faster, alike in both frontends."""

MAX_WIDTH = 256
_MAX_FAST_WIDTH = 128


def is_fast(width: int, itemsize: int) -> bool:
    """Whether the kernels are faster than a mask for heads of this size and elements."""
    # float32 they multiply without tensor cores.
    return itemsize == 2 and width <= _MAX_FAST_WIDTH
