"""`capfinder` in a process that believes in a given number of cores: with_cores.py N ARGUMENTS...

So that the memory of many workers can be measured on a small machine."""

import os
import sys

from capfinder import cli

if __name__ == "__main__":
    cores = int(sys.argv[1])
    os.cpu_count = lambda: cores
    os.sched_getaffinity = lambda _pid: set(range(cores))
    sys.exit(cli.main(sys.argv[2:]))
