"""As a program: `capfinder` with small blocks, which notes several times a second where it is."""

import sys

from capfinder import cli
from capfinder.prediction import reads, scoring

if __name__ == "__main__":
    reads.BLOCK_BYTES = 1 << 12
    scoring.SAVE_SECONDS = 0.05
    sys.exit(cli.main(sys.argv[1:]))
