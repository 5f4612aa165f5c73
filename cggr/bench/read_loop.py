"""The ceiling of everything that reads logits once: a loop that does nothing but read."""

import triton
import triton.language as tl

ROW = 32768  # elements that a program reads
BLOCKS = (4096, 8192)  # elements at a time; the better one counts
WARPS = 8


@triton.jit
def read_loop_kernel(x_ptr, out_ptr, ROW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of each `ROW` of elements, in float32."""
    row = tl.program_id(0).to(tl.int64)
    block_ptr = x_ptr + row * ROW + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, ROW, BLOCK):
        sums += tl.load(block_ptr + start).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(sums, axis=0))
