"""Claim: flash attention goes with every split, and the token split needs none.

The same as ``cggr bench flash``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "flash", *sys.argv[1:]])
