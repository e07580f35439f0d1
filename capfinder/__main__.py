"""python -m capfinder: the same as the `capfinder` command."""

import sys

from capfinder.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
