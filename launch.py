"""Train a cap classifier: python launch.py --config=configs/cnn_lstm.py --config.a.b=value"""

import sys

from capfinder.cli import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
