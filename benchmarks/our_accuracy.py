"""Our trainings with some seeds, and what they get right of the test reads (accuracy.py runs it):
our_accuracy.py TOLD.json"""

import json
import sys
from pathlib import Path

import clock
from our_setup import Setup

from capfinder.training import loop


def main() -> None:
    told, runs = json.loads(Path(sys.argv[1]).read_text("utf-8")), []
    for seed in told["seeds"]:
        before = clock.usage()
        setup = Setup(
            Path(told["version"]),
            told["model_type"],
            told["ours"],
            batch_size=told["batch_size"],
            seed=seed,
        )
        fitted = setup.fit(
            max_epochs=told["epochs"], validation_batches=setup.evaluation_batches("validation")
        )
        test = loop.evaluate(fitted.state, setup.evaluation_batches("test"), lambda: False)
        assert test is not None
        runs.append(
            {
                "seed": seed,
                "accuracy": test["accuracy"],
                "val_loss": fitted.best_val_loss,
                "best_epoch": fitted.best_epoch,
                "seconds": clock.since(before)["wall"],
            }
        )
        print(runs[-1], flush=True)
    Path(told["result"]).write_text(json.dumps({"runs": runs}), "utf-8")


if __name__ == "__main__":
    main()
