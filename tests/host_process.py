"""launch.py on the tiny architecture, for the processes that tests/test_hosts.py starts."""

import sys

from capfinder import cli, log, models

if __name__ == "__main__":
    models.ARCHITECTURES["cnn_lstm"] = "tiny_architecture"
    log.PLAIN_LINE_SECONDS = 0.0  # each step of a bar is a line
    sys.exit(cli.launch(sys.argv[1:]))
