"""Claim: the statistics of a linear head are computed by the faster of two ways.

The same as ``cggr bench linear_statistics``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "linear_statistics", *sys.argv[1:]])
