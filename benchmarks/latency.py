"""Claim: a step on four times the sequences takes at most 1.02 of the dense step's time.

The same as ``cggr bench latency``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "latency", *sys.argv[1:]])
