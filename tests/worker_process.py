"""The commands on the tiny architecture, for the processes that tests/test_workers.py starts.

An epoch takes a while, so that a trial can be caught in its middle; looks and heartbeats don't."""

import sys
import time

from capfinder import cli, models
from capfinder.stages import heartbeat, tune_worker
from capfinder.stages.running_trial import Trial

EPOCH_SECONDS = 0.25


def slowly(report):
    def report_after_a_while(self, epoch, value):
        time.sleep(EPOCH_SECONDS)
        return report(self, epoch, value)

    return report_after_a_while


if __name__ == "__main__":
    models.ARCHITECTURES["cnn_lstm"] = "tiny_architecture"
    Trial.report = slowly(Trial.report)
    heartbeat.BEAT_SECONDS, tune_worker.LOOK_SECONDS = 0.5, 0.2
    command = {"launch": cli.launch, "capfinder": cli.main}[sys.argv[1]]
    sys.exit(command(sys.argv[2:]))
