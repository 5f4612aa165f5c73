"""Claim: a step on a quarter of the tokens needs at most 0.35 of the memory of a dense one's.

The same as ``cggr bench step``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "step", *sys.argv[1:]])
