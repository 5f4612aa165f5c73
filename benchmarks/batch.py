"""Claim: the largest batch that fits into 12 GiB is at least 3.8 times a dense step's.

The same as ``cggr bench batch``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "batch", *sys.argv[1:]])
