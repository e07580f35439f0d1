"""How good the trained model is: every read of the test set, baselines beside it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from capfinder import files, interrupts, log
from capfinder.data.streaming import ahead
from capfinder.data.versions import Dataset
from capfinder.evaluation import likeness, metrics, predictions
from capfinder.stages import assembly, inference
from capfinder.stages.assembly import Split, TrainedModel
from capfinder.tracking import Tracker

MAX_GAP = 0.05  # of accuracy between training and test reads, above which it's worth a word


@dataclass(frozen=True)
class EvaluateResult:
    metrics: dict[str, Any]
    metrics_path: Path
    predictions_path: Path

    def summary(self) -> str:
        test, baselines = self.metrics["test"], self.metrics["baselines"]
        low, high = test["accuracy_interval"]
        return (
            f"test accuracy {test['accuracy']:.1%} ({low:.1%} to {high:.1%}) on "
            f"{test['num_examples']:,} reads; majority {baselines['majority_accuracy']:.1%}, "
            f"nearest centroid {baselines['nearest_centroid_accuracy']:.1%}"
        )


def run(
    config: ConfigDict,
    *,
    dataset: Dataset,
    model: TrainedModel,
    history: list[dict[str, Any]],
    stopped: str,
    interrupted: Mapping[str, Mapping[str, int]],
    init_from: dict[str, Any] | None,
    class_names: Sequence[str],
    tracker: Tracker,
) -> EvaluateResult:
    """Scores train, validation and test; writes evaluation/ and returns what metrics.json holds.

    interrupted: what Ctrl-C ended early, as `interrupts.sentences` takes it. init_from: the model
    that training started from, as `Start.as_record`. metrics.json is
    written last: while it isn't there, what lies beside it may be of several trainings."""
    directory = Path(config.shared_params.output_dir) / "evaluation"
    logits, labels, splits = {}, {}, {}
    batching = inference.batching(
        config.evaluate_params.batch_size, mesh=config.runtime_params.mesh
    )
    total = sum(sum(counts.values()) for counts in dataset.manifest["counts"].values())
    with log.progress("evaluation", total=total, unit="reads") as bar:
        for name in ("train", "validation", "test"):
            splits[name] = assembly.open_split(config, dataset, name)
            logits[name] = _logits(model, splits[name], bar, batching)
            labels[name] = splits[name].cap_class
    temperature = metrics.fit_temperature(logits["validation"], labels["validation"])
    scored = {
        name: metrics.evaluate(
            logits[name], labels[name], class_names=class_names, temperature=temperature
        )
        for name in ("train", "validation", "test")
    }
    values = {
        **scored,
        "baselines": _baselines(splits, len(class_names)),
        "best_epoch": model.best_epoch,
        "num_parameters": model.num_parameters,
        "hyperparameters": dataclasses.asdict(model.hyperparameters),
        "history": history,
        "stopped": stopped,
        "interrupted": interrupted,
        "init_from": init_from,
        "model_type": model.model_type,
        "class_names": list(class_names),
        "dataset": _about_dataset(dataset),
        "signals": likeness.profile(dataset.manifest["quality"]),
    }
    values["warnings"] = [
        *interrupts.sentences(interrupted),
        *dataset.manifest["warnings"],
        *notes(values),
    ]
    (directory / "metrics.json").unlink(missing_ok=True)
    predictions_path = directory / "predictions_test.csv"
    with files.atomic_path(predictions_path) as partial:
        write_predictions(partial, splits["test"], logits["test"], class_names)
    for name in ("test", "train"):
        text = metrics.confusion_csv(scored[name]["confusion_matrix"], class_names)
        files.write_text(directory / f"confusion_matrix_{name}.csv", text)
    files.write_json(directory / "metrics.json", values)
    _show(values)
    _track(tracker, values, directory)
    return EvaluateResult(values, directory / "metrics.json", predictions_path)


def _about_dataset(dataset: Dataset) -> dict[str, Any]:
    """Where the reads came from, in what a reader of the exported model is told."""
    manifest = dataset.manifest
    return {
        "version": dataset.version,
        "fingerprint": dataset.fingerprint,
        "group_by": manifest["settings"]["group_by"],
        "counts": manifest["counts"],
        "sources": [
            {key: source[key] for key in ("file", "dataset_class", "is_test", "chosen")}
            for source in manifest["sources"]
        ],
        "warnings": manifest["warnings"],
    }


def _logits(
    model: TrainedModel, split: Split, bar: log.Bar, batching: inference.Batching
) -> np.ndarray:
    """(N, C) logits of every read, in stored order."""
    parts = ((block.signals, None) for block in ahead(split.blocks()))
    blocks = []
    for logits, _ in inference.predict(model, parts, batching):
        blocks.append(logits)
        bar.advance(len(logits))
    return np.concatenate(blocks)


def _baselines(splits: dict[str, Split], num_classes: int) -> dict[str, float]:
    train, test = splits["train"], splits["test"]
    centroids = metrics.class_centroids(_blocks(train), num_classes)
    return {
        "majority_accuracy": metrics.majority_accuracy(
            train.cap_class, test.cap_class, num_classes
        ),
        "nearest_centroid_accuracy": metrics.nearest_centroid_accuracy(_blocks(test), centroids),
    }


def _blocks(split: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for block in split.blocks():
        yield np.asarray(block.signals, np.float32), block.cap_classes


def notes(values: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know before trusting them."""
    test, train, baselines = values["test"], values["train"], values["baselines"]
    low, high = test["accuracy_interval"]
    found = []
    for what, accuracy in (
        ("always naming the commonest class", baselines["majority_accuracy"]),
        ("the nearest mean signal", baselines["nearest_centroid_accuracy"]),
    ):
        if accuracy >= low:
            how = "worse" if high < accuracy else "not clearly better"
            found.append(f"The model is {how} than {what}, which scores {accuracy:.1%}.")
    if train["accuracy"] - test["accuracy"] > MAX_GAP:
        other_runs = (
            ", or the test reads' sequencing runs differ from those it was trained on"
            if _has_test_runs(values["dataset"])
            else ""
        )
        found.append(
            f"Training reads score {train['accuracy']:.1%}, test reads {test['accuracy']:.1%}: "
            f"the model has learned some reads by heart{other_runs}. More reads, "
            "use_augmentation or more dropout may help."
        )
    if values["best_epoch"] == len(values["history"]) and values["stopped"] == "max_epochs":
        found.append(
            "The last epoch was the best: a larger train_params.max_epochs_final_model may help."
        )
    if high - low > 2 * MAX_GAP:
        found.append(
            f"The test set is small ({test['num_examples']:,} reads): the accuracy is known to "
            f"lie between {low:.1%} and {high:.1%} only."
        )
    return found


def _has_test_runs(dataset: Mapping[str, Any]) -> bool:
    """Whether the test reads may be of sequencing runs that no training read is of."""
    return dataset["group_by"] == "file" or any(source["is_test"] for source in dataset["sources"])


def write_predictions(
    path: Path, split: Split, logits: np.ndarray, class_names: Sequence[str]
) -> None:
    """A row a read: read_id, cap_class, predicted_cap_class, predicted_cap, p_0, p_1, ..."""
    probabilities, done = metrics.softmax(logits), 0
    with path.open("wb") as stream:
        stream.write(predictions.header(len(class_names)))
        for block in split.blocks():
            rows = slice(done, done + len(block.read_ids))
            stream.write(
                predictions.lines(
                    block.read_ids, block.cap_classes, probabilities[rows], class_names
                )
            )
            done = rows.stop


def _show(values: dict[str, Any]) -> None:
    names = values["class_names"]
    for split in ("train", "test"):
        columns, rows = metrics.confusion_rows(values[split]["confusion_matrix"], names)
        log.table(f"Confusion matrix, {split} reads", columns, rows)
    columns, rows = metrics.per_class_rows(values["test"]["per_class"])
    log.table("Test reads by class", columns, rows)
    for warning in values["warnings"]:
        log.logger.warning("Note: %s", warning)


def _track(tracker: Tracker, values: dict[str, Any], directory: Path) -> None:
    for split in ("test", "train"):
        scored = values[split]
        names = ("accuracy", "balanced_accuracy", "loss")
        tracker.log_metrics({name: scored[name] for name in names}, prefix=split)
        tracker.log_confusion_matrix(
            scored["confusion_matrix"], values["class_names"], name=f"confusion_matrix_{split}"
        )
    tracker.log_metrics(values["baselines"], prefix="baseline")
    for name in ("metrics.json", "predictions_test.csv", "confusion_matrix_test.csv"):
        tracker.log_file(directory / name)
