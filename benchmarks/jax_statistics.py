"""Claim: from JAX the kernel gives the bits that it gives from PyTorch, in at most 1.1 of its time.

The same as ``cggr bench jax_statistics``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "jax_statistics", *sys.argv[1:]])
