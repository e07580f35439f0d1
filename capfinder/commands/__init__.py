"""The commands of `capfinder` and of launch.py: what they are called, take and print.

One module per group; `ALL` lists them in the order of `capfinder --help`. What a command does is
elsewhere, imported when it is run: `--help` answers at once."""

from collections.abc import Sequence

from capfinder.commands import caps, data, models, training, tuning
from capfinder.commands.parsing import Parser

ALL = (
    training.add_create_train_config,
    training.add_train_model,
    tuning.add_tune_worker,
    data.add_make_train_dataset,
    models.add_predict,
    models.add_evaluate,
    models.add_import_model,
    models.add_export,
    models.add_report,
    data.add_inspect,
    data.add_simulate,
    caps.add_capmap,
    training.add_settings,
)


def run(arguments: Sequence[str]) -> None:
    """What `capfinder` does with its arguments."""
    parser = Parser(prog="capfinder", description="Train classifiers of RNA caps, and use them.")
    listed = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in ALL:
        add(listed)
    known = parser.parse_args(list(arguments))
    known.command_function(known)
