"""Claim: in Flax, a step on a quarter of the tokens takes at most 0.6 of a dense one's time.

The same as ``cggr bench jax_step``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "jax_step", *sys.argv[1:]])
