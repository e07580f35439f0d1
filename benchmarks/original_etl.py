"""Capfinder 0.4.3's ETL and batches, timed; run by the Python of its own environment (etl.py does).

Importing it writes to ~/.capfinder, so HOME must be a scratch directory."""

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

from clock import since, usage

INTEGERS = ("target_length", "examples_per_class", "num_classes", "batch_size")
VERSIONS = ("capfinder", "tensorflow-cpu", "jax", "keras", "numpy")


def make_dataset(
    caps_data_dir: Path,
    dataset_dir: Path,
    *,
    target_length: int,
    dtype: str,
    examples_per_class: int,
    train_test_fraction: float,
    num_classes: int,
    batch_size: int,
) -> int:
    """What train_etl does from the CSV files to train_*.csv and test_*.csv, Comet left out: its
    own functions in its own order. Returns the number of examples written."""
    from capfinder import train_etl  # type: ignore[attr-defined]  # the original's
    from capfinder.ml_libs import tf

    class_files = train_etl.group_files_by_class(os.fspath(caps_data_dir))
    _, fewest = train_etl.find_class_with_least_rows(class_files)
    examples_per_class = min(examples_per_class, fewest)
    train, test = [], []
    for paths in class_files.values():
        of_train, of_test = train_etl.create_class_dataset(
            paths, target_length, dtype, examples_per_class, train_test_fraction
        )
        train.append(of_train)
        test.append(of_test)
    for name, datasets in (("train", train), ("test", test)):
        dataset = train_etl.interleave_class_datasets(datasets, num_classes=num_classes)
        dataset = dataset.batch(batch_size).prefetch(buffer_size=tf.data.AUTOTUNE)
        train_etl.write_dataset_to_csv(dataset, os.fspath(dataset_dir), name)
    return examples_per_class * num_classes


def read_batches(
    dataset_dir: Path, *, target_length: int, dtype: str, train_val_fraction: float, batch_size: int
) -> dict[str, float]:
    """One epoch of the training batches, after one that warms up."""
    from capfinder import train_etl  # type: ignore[attr-defined]  # the original's

    train = train_etl.load_train_dataset_from_csvs(
        x_file_path=os.fspath(dataset_dir / "train_x.csv"),
        y_file_path=os.fspath(dataset_dir / "train_y.csv"),
        batch_size=batch_size,
        target_length=target_length,
        dtype=dtype,
        train_val_fraction=train_val_fraction,
    )[0]
    for _ in train:
        pass
    before, examples = usage(), 0
    for signal, _cap_class in train:
        examples += int(signal.shape[0])
    return since(before) | {"examples": examples}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("caps_data_dir", "output_dir", "result"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--warm_up_dir", type=Path, help="CSV files put through first, untimed")
    for name in INTEGERS:
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("train_test_fraction", "train_val_fraction"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    given = parser.parse_args()
    settings = {name: getattr(given, name) for name in (*INTEGERS, "train_test_fraction", "dtype")}
    if given.warm_up_dir is not None:
        make_dataset(given.warm_up_dir, given.output_dir / "warm_up", **settings)
    before = usage()
    examples = make_dataset(given.caps_data_dir, given.output_dir / "dataset", **settings)
    result = {"etl": since(before), "examples": examples}
    if given.warm_up_dir is not None:
        result["batches"] = read_batches(
            given.output_dir / "dataset",
            target_length=given.target_length,
            dtype=given.dtype,
            train_val_fraction=given.train_val_fraction,
            batch_size=given.batch_size,
        )
    result["versions"] = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    given.result.write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
