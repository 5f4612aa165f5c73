"""Claim: selected attention reaches 0.7 of the rate of flash or cuDNN attention on as many pairs.

The same as ``cggr bench attention``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "attention", *sys.argv[1:]])
