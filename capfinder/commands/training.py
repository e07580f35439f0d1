"""launch.py, and the commands that train: settings in, a run of the pipeline."""

import argparse
import importlib.util
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from capfinder import files, settings
from capfinder.allowed import shortened, shown
from capfinder.commands.parsing import Commands, Parser, command
from capfinder.errors import CapfinderError, InputError, SettingsError
from capfinder.run_record import STAGES

# As a ConfigDict says it, when it is set and when it is asked for.
_UNKNOWN_KEY = re.compile(r"""Key "(.+?)" does not exist|^"?'(\w+)'"?$""")


def launch(arguments: Sequence[str]) -> None:
    parser = Parser(
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
    run_pipeline(config, stages=_stages(known.stage), dry_run=known.dry_run)


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
        raise SettingsError(_said_of(error, path)) from error
    if not isinstance(config, ConfigDict):
        raise SettingsError(f"{path}: get_config() must return a ConfigDict")
    return settings.checked(config, overrides)


def _said_of(error: Exception, path: Path) -> str:
    """What is wrong with a config file, where in it, and in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(path) and frame.line]
    where = f"{path}, line {own[-1].lineno} ({own[-1].line})" if own else f"{path}"
    text = " ".join(str(error).split())
    unknown = _UNKNOWN_KEY.search(text) if isinstance(error, AttributeError) else None
    if unknown:  # a ConfigDict lists all others, or none
        name = unknown[1] or unknown[2]
        words = re.findall(r"[\w.]+", own[-1].line or "") if own else []
        written = next((word for word in words if word.endswith(name)), name)
        key, known = written.removeprefix("config."), [*settings.BY_KEY, *settings.GROUPS]
        return f"{where}: no such setting as {shortened(key)}{settings.nearest(key, known)}"
    return f"{where}: {type(error).__name__}: {text}"


def run_pipeline(config: ConfigDict, *, stages: tuple[str, ...], dry_run: bool) -> None:
    if dry_run:
        from capfinder import preparation

        preparation.explain(config, stages=stages)
    else:
        from capfinder import pipeline

        pipeline.run(config, stages=stages)


def add_create_train_config(commands: Commands) -> None:
    parser = command(
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


def add_train_model(commands: Commands) -> None:
    parser = command(
        commands, "train-model", _train_model, "Run the whole pipeline on a JSON file of settings."
    )
    parser.add_argument("-c", "--config_file", required=True, type=Path, help="the JSON file")
    parser.add_argument("--stage", default=",".join(STAGES), help="the stages to run")
    parser.add_argument(
        "--dry_run", action="store_true", help="check settings and input, say what would run"
    )


def _train_model(known: argparse.Namespace) -> None:
    config = settings.read_json_config(known.config_file)
    run_pipeline(config, stages=_stages(known.stage), dry_run=known.dry_run)


def add_settings(commands: Commands) -> None:
    parser = command(commands, "settings", _settings, "List every setting.")
    parser.add_argument("--markdown", action="store_true", help="as the table in README.md")


def _settings(known: argparse.Namespace) -> None:
    print(settings.markdown_table() if known.markdown else "\n".join(settings.help_lines()), end="")
    if not known.markdown:
        print()
