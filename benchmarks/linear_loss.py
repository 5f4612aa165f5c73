"""Claim: CGGRLinearLoss at ratio 0.25 takes at most 0.6 of the time of the fastest dense loss.

The same as ``cggr bench linear_loss``, with its options.
"""

import sys

from cggr.cli import main

if __name__ == "__main__":
    main(["bench", "linear_loss", *sys.argv[1:]])
