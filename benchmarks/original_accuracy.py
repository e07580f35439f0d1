"""Capfinder 0.4.3's models trained with some seeds, and what they get right of the test reads, on
the arrays that ours are trained on (accuracy.py runs it): original_accuracy.py TOLD.json"""

import json
import sys
from pathlib import Path

import clock
import inputs
import original_setup


def main() -> None:
    told, runs = json.loads(Path(sys.argv[1]).read_text("utf-8")), []
    from capfinder.ml_libs import keras

    data = {split: inputs.load_arrays(Path(told["arrays"]), split) for split in inputs.SPLITS}
    signal, cap_class = data["train"]
    for seed in told["seeds"]:
        before = clock.usage()
        keras.utils.set_random_seed(seed)
        model = original_setup.build(
            told["model_type"],
            told["theirs"],
            target_length=signal.shape[1],
            num_classes=told["num_classes"],
        )
        history = model.fit(
            signal,
            cap_class,
            batch_size=told["batch_size"],
            epochs=told["epochs"],
            validation_data=data["validation"],
            verbose=0,
            callbacks=[
                keras.callbacks.EarlyStopping(
                    monitor="val_loss", patience=told["epochs"], restore_best_weights=True
                )
            ],
        ).history
        _, accuracy = model.evaluate(*data["test"], batch_size=told["batch_size"], verbose=0)
        losses = history["val_loss"]
        runs.append(
            {
                "seed": seed,
                "accuracy": float(accuracy),
                "val_loss": float(min(losses)),
                "best_epoch": losses.index(min(losses)) + 1,
                "seconds": clock.since(before)["wall"],
            }
        )
        print(runs[-1], flush=True)
    result = {"runs": runs, "versions": original_setup.versions()}
    Path(told["result"]).write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
