"""The commands about signals and datasets."""

import argparse
from pathlib import Path

from capfinder import log, settings
from capfinder.commands.parsing import Commands, command, directory
from capfinder.commands.training import run_pipeline


def add_make_train_dataset(commands: Commands) -> None:
    parser = command(
        commands, "make-train-dataset", _make_train_dataset, "Run the ETL alone: CSV to dataset."
    )
    add = parser.add_argument
    add("-c", "--caps_data_dir", required=True, help="directory of the CSV files")
    add("-o", "--output_dir", required=True, help="the dataset goes to OUTPUT_DIR/dataset")
    add("-t", "--target_length", default="500", help="samples of every signal")
    add("-d", "--dtype", default="float16", help=" | ".join(settings.DTYPES))
    add("-e", "--examples_per_class", default="1000", help="reads of each class, or null")
    add("-tt", "--train_test_fraction", default="0.95", help="share not in the test set")
    add("-tv", "--train_val_fraction", default="0.8", help="share of that for training")
    add("--num_classes", default="4", help="classes")
    add("-b", "--batch_size", default="1024", help="accepted; the dataset doesn't depend on it")
    add("--comet_project_name", default="dataset", help="Comet project")
    add("--use_remote_dataset_version", default="", help='"" | latest | X.Y.Z')
    add(
        "--use-augmentation",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="accepted; augmentation happens while training",
    )
    add("--class_map", default="{}", help='picks and renumbers classes: {"0": 0, "3": 1}')
    add("--max_reject_fraction", default="0.01", help="bad rows in a file above which it stops")
    add("--seed", default="42", help="seed of selection and splits")
    add("--group_by", default="read", help="read | parent_read | file: goes to one split whole")
    add("--test_caps_data_dir", default="null", help="its CSV files are the test set, whole")
    add(
        "--keep_all",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="use every read of every class, EXAMPLES_PER_CLASS at most",
    )


def _make_train_dataset(known: argparse.Namespace) -> None:
    options = {
        "etl_params": (
            "caps_data_dir",
            "examples_per_class",
            "class_map",
            "max_reject_fraction",
            "comet_project_name",
            "use_remote_dataset_version",
        ),
        "shared_params": (
            "output_dir",
            "target_length",
            "dtype",
            "train_test_fraction",
            "train_val_fraction",
            "num_classes",
            "batch_size",
        ),
        "split_params": ("group_by", "test_caps_data_dir"),
        "tune_params": ("seed",),
    }
    overrides = dict(
        settings.parse_override(f"{group}.{name}", getattr(known, name))
        for group, names in options.items()
        for name in names
    )
    overrides["shared_params.use_augmentation"] = known.use_augmentation
    overrides["split_params.keep_all"] = known.keep_all
    config = settings.checked(settings.default_config(), overrides)
    run_pipeline(config, stages=("etl",), dry_run=False)


def add_inspect(commands: Commands) -> None:
    parser = command(
        commands,
        "inspect",
        _inspect,
        "Say what a dataset holds and where it came from; check it; draw example signals.",
    )
    add = parser.add_argument
    add("dataset", type=Path, help="a run's output directory, or one version of a dataset")
    add(
        "-o",
        "--output",
        type=Path,
        help="also write FILE.html (tables and example signals) or FILE.png (signals alone)",
    )
    add(
        "--verify",
        action="store_true",
        help="read every byte: checksums, counts, no read twice or in two splits",
    )


def _inspect(known: argparse.Namespace) -> None:
    from capfinder.inspection import command

    log.start(None)
    command.run(known.dataset, output=known.output, verify=known.verify)


def add_simulate(commands: Commands) -> None:
    parser = command(
        commands,
        "simulate",
        _simulate,
        "Write SIMULATED cap signals in the input format, to try the pipeline on.",
    )
    add = parser.add_argument
    add("--output_dir", required=True, type=directory, help="the CSV files go here")
    add("--reads_per_class", required=True, type=int, help="reads of each class")
    add("--num_classes", type=int, default=4, help="classes")
    add("--runs_per_class", type=int, default=1, help="sequencing runs (files) of each class")
    add("--effect", type=float, help="size of the assumed cap effects (default: calibrated)")
    add("--seed", type=int, default=42, help="seed of everything drawn")


def _simulate(known: argparse.Namespace) -> None:
    from capfinder import simulate

    log.start(None)
    written = simulate.run(
        output_dir=known.output_dir,
        reads_per_class=known.reads_per_class,
        num_classes=known.num_classes,
        runs_per_class=known.runs_per_class,
        effect=simulate.DEFAULT_EFFECT if known.effect is None else known.effect,
        seed=known.seed,
    )
    for path in written:
        print(path)
