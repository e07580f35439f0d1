"""The commands: parse, call, turn errors into one line. Heavy modules are imported inside them."""

import argparse
import contextlib
import errno
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ml_collections import ConfigDict

from capfinder import files, log, memory, settings
from capfinder.allowed import shortened, shown
from capfinder.errors import CapfinderError, InputError, SettingsError, StoppedError
from capfinder.run_record import STAGES


class _Parser(argparse.ArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        said = log.printable(message)
        self.exit(2, f"error: {said} ({self.prog} --help lists the options)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def launch(arguments: Sequence[str]) -> int:
    """What `launch.py` runs; returns the exit code."""
    return _run_command(lambda: _launch(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """What `capfinder` runs; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return _run_command(lambda: _capfinder(given))


def _run_command(command: Callable[[], None]) -> int:
    log.hide(os.environ.get("COMET_API_KEY"))  # typed into a setting, it would be shown as wrong
    try:
        with memory.collected_rarely():
            command()
        return 0
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong option
        return stop.code if isinstance(stop.code, int) else 1
    except (CapfinderError, StoppedError) as error:
        return _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt as error:
        return _fail("stopped by Ctrl-C", 130, error)
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"the disk is full{where}. Free some space"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
            text = f"{error.filename}: {error.strerror}. Give access to it"
        else:
            return _fail_unexpectedly(error)
        return _fail(f"{text}, then run the same command again.", 1, error)
    except MemoryError as error:
        return _fail("out of memory: lower shared_params.batch_size", 1, error)
    except Exception as error:
        return _fail_unexpectedly(error)
    finally:
        log.stop()


def _fail_unexpectedly(error: Exception) -> int:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return _fail(f"unexpected {text} (debug_code=true shows where)", 1, error)


def _fail(message: str, exit_code: int, error: BaseException) -> int:
    path = log.file_path()
    log.print_error(message + (f" [log: {path}]" if path else ""))
    log.file_only(logging.ERROR, message)
    if log.logger.level == logging.DEBUG:
        text = "".join(traceback.format_exception(error))
        sys.stderr.write(text)
        log.file_only(logging.ERROR, text)
    return exit_code


def _launch(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="launch.py",
        description="CSV files of cap signals in; a tuned, trained, tested classifier out.",
        epilog="Any setting is --config.<group>.<name>=<value>:\n"
        + "\n".join(settings.help_lines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="such as configs/demo.py")
    parser.add_argument(
        "--stage", default=",".join(STAGES), help=f"some of {','.join(STAGES)} (default: all)"
    )
    parser.add_argument("--output_dir", help="short for --config.shared_params.output_dir")
    parser.add_argument(
        "--dry_run", action="store_true", help="check settings and input, say what would run"
    )
    known, rest = parser.parse_known_args(list(arguments))
    overrides = dict(_overrides(rest))
    if known.output_dir is not None:
        overrides["shared_params.output_dir"] = known.output_dir
    config = _load_config(Path(known.config), overrides)
    _run_pipeline(config, stages=_stages(known.stage), dry_run=known.dry_run)


def _stages(names: str) -> tuple[str, ...]:
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in STAGES:
            raise SettingsError(
                f"--stage={shortened(names)}: no such stage as {shown(name)}"
                f"{settings.nearest(name, STAGES)} "
                f"(stages: {', '.join(STAGES)})"
            )
    if not asked:
        raise SettingsError(f"--stage={shown(names)}: names no stage (stages: {', '.join(STAGES)})")
    return tuple(stage for stage in STAGES if stage in asked)


def _overrides(arguments: Sequence[str]) -> list[tuple[str, object]]:
    """`--config.a.b=v`, `--config.a.b v`, and `--config.a.b` alone for true."""
    found: list[tuple[str, object]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not name.startswith("--config."):
            close = settings.nearest(name, ["--config", "--stage", "--output_dir", "--dry_run"])
            raise SettingsError(f"{shortened(argument) or repr(argument)}: no such option{close}")
        key = name.removeprefix("--config.")
        if not equals:
            takes_value = rest and not rest[0].startswith("--")
            value = rest.pop(0) if takes_value else "true"
        found.append(settings.parse_override(key, value))
    return found


def _load_config(path: Path, overrides: Mapping[str, object]) -> ConfigDict:
    """A JSON file, or a config file's `get_config()` (configs are the user's own code), checked
    together with the overrides."""
    if path.suffix == ".json":
        return settings.read_json_config(path, overrides)
    if not os.path.isfile(path):  # of a name that no file can have, too
        raise InputError(f"--config={path}: no such file (configs/ holds those that ship)")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config={path}: must be a .py file with get_config(), or a .json file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except CapfinderError as error:
        raise SettingsError(f"{path}: {error}") from error
    except Exception as error:
        text = " ".join(str(error).split())
        raise SettingsError(f"{path}: {type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise SettingsError(f"{path}: get_config() must return a ConfigDict")
    return settings.checked(config, overrides)


def _run_pipeline(config: ConfigDict, *, stages: tuple[str, ...], dry_run: bool) -> None:
    if dry_run:
        from capfinder import preparation

        preparation.explain(config, stages=stages)
    else:
        from capfinder import pipeline

        pipeline.run(config, stages=stages)


def _capfinder(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="capfinder", description="Train classifiers of RNA caps.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_create_train_config,
        _add_train_model,
        _add_tune_worker,
        _add_make_train_dataset,
        _add_predict,
        _add_inspect,
        _add_simulate,
        _add_report,
        _add_settings,
    ):
        add(commands)
    known = parser.parse_args(list(arguments))
    known.command_function(known)


def _command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    function: Callable[[argparse.Namespace], None],
    description: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=description, description=description, formatter_class=_Help
    )
    parser.set_defaults(command_function=function)
    return parser


def _add_create_train_config(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "create-train-config",
        _create_train_config,
        "Write a JSON file of all settings at their defaults, to be edited.",
    )
    parser.add_argument(
        "-f", "--file_path", required=True, type=Path, help="the JSON file to write"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def _create_train_config(known: argparse.Namespace) -> None:
    if known.file_path.exists() and not known.force:
        raise InputError(f"{known.file_path}: exists already; --force replaces it")
    try:
        files.write_text(known.file_path, settings.template())
    except OSError as error:
        raise InputError(f"{known.file_path}: can't be written ({error.strerror})") from None
    print(f"Wrote {known.file_path}")
    print(
        "Set etl_params.caps_data_dir and shared_params.output_dir in it, then run:\n"
        f"  capfinder train-model --config_file {known.file_path}"
    )


def _add_train_model(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands, "train-model", _train_model, "Run the whole pipeline on a JSON file of settings."
    )
    parser.add_argument("-c", "--config_file", required=True, type=Path, help="the JSON file")
    parser.add_argument("--stage", default=",".join(STAGES), help="the stages to run")
    parser.add_argument(
        "--dry_run", action="store_true", help="check settings and input, say what would run"
    )


def _train_model(known: argparse.Namespace) -> None:
    config = settings.read_json_config(known.config_file)
    _run_pipeline(config, stages=_stages(known.stage), dry_run=known.dry_run)


def _add_tune_worker(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "tune-worker",
        _tune_worker,
        "Help a run with its tuning from another process, on this machine or another.",
    )
    add = parser.add_argument
    add(
        "-r",
        "--run",
        required=True,
        type=Path,
        help="the run's output directory; its run.json has the settings",
    )
    add(
        "-s",
        "--storage",
        help="URL of the study's database, where run.json doesn't have it whole; CAPFINDER_STORAGE "
        "in the environment does the same and hides a password better",
    )
    add("-t", "--timeout_minutes", help="no new trial starts after this long; None: as in the run")
    add(
        "-w",
        "--wait_minutes",
        type=_minutes,
        default=0.0,
        help="how long to wait for a run that hasn't begun its study",
    )


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text}: must be a number of minutes, 0 or more")


def _tune_worker(known: argparse.Namespace) -> None:
    given = {"storage": known.storage, "timeout_minutes": known.timeout_minutes}
    values = {
        name: settings.parse_override(f"tune_params.{name}", text)[1]
        for name, text in given.items()
        if text is not None
    }
    from capfinder.stages import tune_worker

    tune_worker.run(known.run, wait_minutes=known.wait_minutes, **values)


def _add_make_train_dataset(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
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
    _run_pipeline(config, stages=("etl",), dry_run=False)


def _add_predict(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "predict",
        _predict,
        "Name the cap of every read in a directory of cap-signal CSV files.",
    )
    add = parser.add_argument
    add(
        "-m",
        "--model",
        required=True,
        type=Path,
        help="the output directory of a run that has trained a model",
    )
    add("-c", "--caps_data_dir", required=True, type=Path, help="directory of the CSV files")
    add(
        "-o",
        "--output_dir",
        required=True,
        type=Path,
        help="predictions.csv, rejects.csv and logs go here",
    )
    add("-b", "--batch_size", type=int, help="reads scored at once; None: chosen for the machine")


def _predict(known: argparse.Namespace) -> None:
    from capfinder.prediction import command

    command.run(
        known.model,
        caps_data_dir=known.caps_data_dir,
        output_dir=known.output_dir,
        batch_size=known.batch_size,
    )


def _add_inspect(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
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


def _add_simulate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(
        commands,
        "simulate",
        _simulate,
        "Write SIMULATED cap signals in the input format, to try the pipeline on.",
    )
    add = parser.add_argument
    add("--output_dir", required=True, type=Path, help="the CSV files go here")
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


def _add_report(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "report", _report, "Write report.html anew from what lies on disk.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="output directories of runs")


def _report(known: argparse.Namespace) -> None:
    from capfinder.evaluation import report

    for run_dir in known.run_dir:
        if not run_dir.is_dir():
            raise InputError(f"{run_dir}: no such directory")
        print(report.render(run_dir))


def _add_settings(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _command(commands, "settings", _settings, "List every setting.")
    parser.add_argument("--markdown", action="store_true", help="as the table in README.md")


def _settings(known: argparse.Namespace) -> None:
    print(settings.markdown_table() if known.markdown else "\n".join(settings.help_lines()), end="")
    if not known.markdown:
        print()
