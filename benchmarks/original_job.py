"""Capfinder 0.4.3's whole pipeline, as its run_training_pipeline goes through it, with its own
functions: original_job.py TOLD.json

Comet is left out, and kill_gpu_processes; of the tuner's search only the learning rate is open, so
that every trial is the same amount of work."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from original_etl import make_dataset


class Parts:
    """Seconds that each part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def ended(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._started = now - self._started, now


def main() -> None:
    told, parts = json.loads(Path(sys.argv[1]).read_text("utf-8")), Parts()
    from capfinder import train_etl, training  # type: ignore[attr-defined]  # the original's
    from capfinder.ml_libs import HyperParameters, Objective, RandomSearch, keras

    parts.ended("imports")
    shared, output = told["shared"], Path(told["output_dir"])
    make_dataset(
        Path(told["caps_data_dir"]),
        output / "dataset",
        **{name: value for name, value in shared.items() if name != "train_val_fraction"},
        examples_per_class=told["examples_per_class"],
    )
    train, validation, test, steps, validation_steps = (
        train_etl.create_train_val_test_datasets_from_train_test_csvs(
            os.fspath(output / "dataset"),
            shared["batch_size"],
            shared["target_length"],
            shared["dtype"],
            shared["train_val_fraction"],
        )
    )
    parts.ended("ETL")

    fixed = HyperParameters()
    for name, value in told["theirs"].items():
        if name != "learning_rate":
            fixed.Fixed(name, value)
    builder = training.get_model(told["model_type"])
    hyper_model = builder((shared["target_length"], 1), shared["num_classes"])
    tuner = RandomSearch(
        hypermodel=hyper_model.build,
        objective=Objective("val_sparse_categorical_accuracy", direction="max"),
        max_trials=told["trials"],
        hyperparameters=fixed,
        directory=os.fspath(output / "tuner_models"),
        seed=told["seed"],
        project_name="tune",
    )
    test_batches = training.count_batches_fast(test, "test dataset")
    train, validation = train.repeat(), validation.repeat()
    data: dict[str, Any] = {
        "steps_per_epoch": steps,
        "validation_data": validation.map(lambda x, y: (x, y)),
        "validation_steps": validation_steps,
    }
    plateau = {"monitor": "val_loss", "factor": 0.5, "patience": 5, "min_lr": 1e-6}
    tuner.search(
        train.map(lambda x, y: (x, y)),
        **data,
        epochs=told["trial_epochs"],
        callbacks=[
            keras.callbacks.EarlyStopping(patience=0, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau(**plateau),
        ],
    )
    best = tuner.get_best_hyperparameters(num_trials=1)[0]
    if len(tuner.oracle.trials) != told["trials"]:
        raise SystemExit(f"{len(tuner.oracle.trials)} trials of {told['trials']}")
    parts.ended("tuning")

    model = hyper_model.build(best)
    weights = output / "best_model" / "best_model_weights.weights.h5"
    weights.parent.mkdir(parents=True)
    model.fit(
        train.map(lambda x, y: (x, y)),
        **data,
        epochs=told["epochs"],
        batch_size=shared["batch_size"],
        callbacks=[
            keras.callbacks.EarlyStopping(patience=told["epochs"], restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau(**plateau),
            keras.callbacks.ModelCheckpoint(
                os.fspath(weights), save_weights_only=True, save_best_only=True, monitor="val_loss"
            ),
        ],
    )
    model.load_weights(os.fspath(weights))
    parts.ended("training")

    predict(model, test)
    _, accuracy = model.evaluate(test.map(lambda x, y: (x, y)))
    training.save_model(
        model, "classifier", ".keras", os.fspath(output / "best_model" / "classifier")
    )
    predict(model, train.take(steps))
    parts.ended("evaluation and export")
    result = {
        "parts": parts.seconds,
        "accuracy": accuracy,
        "train": steps * shared["batch_size"],
        "test": test_batches * shared["batch_size"],
    }
    Path(told["result"]).write_text(json.dumps(result), "utf-8")


def predict(model: Any, batches: Any) -> np.ndarray:
    """Classes for its confusion matrices, a batch at a time, as it does it."""
    return np.concatenate(
        [np.argmax(model.predict(signal, verbose=0), axis=1) for signal, _ in batches]
    )


if __name__ == "__main__":
    main()
