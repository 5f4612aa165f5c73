"""Claim: how time and memory of a step grow, as a table and a picture.

The same as ``cggr bench growth``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "growth", *sys.argv[1:]])
