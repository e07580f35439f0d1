"""The commands about trained models."""

import argparse
from pathlib import Path

from capfinder.commands.parsing import Commands, command, directory
from capfinder.errors import InputError

MODEL = "the output directory of a run that has trained a model, an import, or a .keras file"


def add_predict(commands: Commands) -> None:
    parser = command(
        commands,
        "predict",
        _predict,
        "Name the cap of every read in a directory of cap-signal CSV files.",
    )
    _add_input(parser, "predictions.csv, composition.json, rejects.csv and logs go here")


def _add_input(parser: argparse.ArgumentParser, output: str) -> None:
    add = parser.add_argument
    add("-m", "--model", required=True, type=Path, help=MODEL)
    add("-c", "--caps_data_dir", required=True, type=Path, help="directory of the CSV files")
    add("-o", "--output_dir", required=True, type=directory, help=output)
    add("-b", "--batch_size", type=int, help="reads scored at once; None: chosen for the machine")


def _predict(known: argparse.Namespace) -> None:
    from capfinder.prediction import command as prediction

    prediction.run(
        known.model,
        caps_data_dir=known.caps_data_dir,
        output_dir=known.output_dir,
        batch_size=known.batch_size,
    )


def add_evaluate(commands: Commands) -> None:
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "Say how good a model is on a directory of labelled cap-signal CSV files.",
    )
    _add_input(parser, "metrics.json, confusion_matrix.csv, what predict writes, and logs go here")
    parser.add_argument(
        "--class_map",
        help='from the classes in the files to the model\'s, such as {"0": 0, "3": 1}; '
        "None: as the model was trained",
    )


def _evaluate(known: argparse.Namespace) -> None:
    from capfinder.prediction import command as prediction
    from capfinder.prediction import labels

    class_map = None if known.class_map is None else labels.from_text(known.class_map)
    prediction.evaluate(
        known.model,
        caps_data_dir=known.caps_data_dir,
        output_dir=known.output_dir,
        batch_size=known.batch_size,
        class_map=class_map,
    )


def add_import_model(commands: Commands) -> None:
    parser = command(
        commands,
        "import-model",
        _import_model,
        "Turn a .keras classifier, such as Capfinder's own, into one to fine-tune and export.",
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, help="the .keras file")
    add("-k", "--keras_file", type=Path, help="the same")
    add("-o", "--output_dir", required=True, type=directory, help="the import goes here")


def _import_model(known: argparse.Namespace) -> None:
    from capfinder import import_model, log

    given = [path for path in (known.model, known.keras_file) if path is not None]
    if len(given) != 1:
        raise InputError("import-model: name one .keras file")
    log.start(None)
    import_model.run(given[0], output_dir=known.output_dir)


def add_export(commands: Commands) -> None:
    parser = command(
        commands,
        "export",
        _export,
        "Write a trained or imported model in other formats, or for other readers.",
    )
    add = parser.add_argument
    add("-r", "--run", required=True, type=Path, help=MODEL)
    add("-f", "--formats", help="some of keras,h5,saved_model,onnx; None: as export_params.formats")
    add("--input_length", help="samples of the signals that the files take; None: the model's own")
    add("-o", "--output_dir", type=directory, help="where to; None: into the model's own directory")


def _export(known: argparse.Namespace) -> None:
    from capfinder import export_model, settings

    given = {"formats": known.formats, "input_length": known.input_length}
    values = dict(
        settings.parse_override(f"export_params.{name}", text)
        for name, text in given.items()
        if text is not None
    )
    export_model.run(known.run, overrides=values, output_dir=known.output_dir)


def add_report(commands: Commands) -> None:
    parser = command(commands, "report", _report, "Write report.html anew from what lies on disk.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="output directories of runs")


def _report(known: argparse.Namespace) -> None:
    from capfinder.evaluation import report

    for run_dir in known.run_dir:
        if not run_dir.is_dir():
            raise InputError(f"{run_dir}: no such directory")
        print(report.render(run_dir))
