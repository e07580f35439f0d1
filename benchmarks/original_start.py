"""Capfinder 0.4.3's training from its start, moments noted: original_start.py RESULT TOLD.json

What its pipeline does between its dataset and the end of the first epoch, with its own functions,
in its own order; Comet is left out."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from moments import Moments


def main() -> None:
    moments = Moments(Path(sys.argv[1]))
    told = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    from capfinder import train_etl, training  # type: ignore[attr-defined]  # the original's
    from capfinder.ml_libs import HyperParameters, keras

    dataset = Path(told["dataset"])
    train, validation, steps, validation_steps = train_etl.load_train_dataset_from_csvs(
        x_file_path=os.fspath(dataset / "train_x.csv"),
        y_file_path=os.fspath(dataset / "train_y.csv"),
        batch_size=told["batch_size"],
        target_length=told["target_length"],
        dtype=told["dtype"],
        train_val_fraction=told["train_val_fraction"],
    )
    builder = training.get_model(told["model_type"])
    hyperparameters = HyperParameters()
    hyperparameters.values.update(told["theirs"])
    model = builder((told["target_length"], 1), told["num_classes"]).build(hyperparameters)

    class Noting(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            moments.note("step")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            moments.note("epoch")

    model.fit(
        train.repeat().map(lambda x, y: (x, y)),
        steps_per_epoch=steps,
        validation_data=validation.repeat().map(lambda x, y: (x, y)),
        validation_steps=validation_steps,
        epochs=1,
        batch_size=told["batch_size"],
        callbacks=[
            Noting(),
            keras.callbacks.EarlyStopping(monitor="val_loss", restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=5),
        ],
    )


if __name__ == "__main__":
    main()
