"""Opens exported models in the Kerases that readers have, and in Capfinder 0.4.3.

python tests/interop/matrix.py [--directory D] [--cells 3.4.1-jax ...] [--architectures resnet ...]
                               [--skip_original] [--torch torch==2.13.0]

Each cell is a Keras on a backend, in an environment of its own below --directory, which a first
run fills (some gigabytes) and later ones use again; nothing of ours can be imported there. It must
open every `.keras` file without custom objects in safe mode, and take every `.weights.h5` file,
and give the Flax model's probabilities within 1e-4. Then Capfinder 0.4.3 must call every read what
ours calls it. Exit code 0: all did. The figures lie in D/interop.json."""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import model_cases
import original_check
from environments import BACKENDS, KERAS, Environment, Environments
from original_check import Comparison, Difference

from capfinder.errors import CapfinderError, StageFailedError
from capfinder.models import ARCHITECTURES
from capfinder.stages.export import LARGEST_DIFFERENCE

HERE = Path(__file__).parent
CELLS = tuple(f"{keras}-{backend}" for keras in KERAS for backend in BACKENDS)
Report = dict[str, Any]  # what keras_cell.py writes: versions, models; or why it wrote nothing


def run_cell(environment: Environment, models: Path, names: Sequence[str], work: Path) -> Report:
    """Raises: StageFailedError when the cell can't even start, with its last line."""
    work.mkdir(parents=True)
    report = work / "report.json"
    command = [str(environment.python), "-P", str(HERE / "keras_cell.py")]
    command += ["--models", str(models), "--report", str(report), "--names", *names]
    variables = environment.variables(work / "home")
    variables["KERAS_BACKEND"] = work.name.rpartition("-")[2]
    with (work / "stderr.log").open("w") as errors:
        code = subprocess.run(command, env=variables, cwd=work, stderr=errors).returncode
    if code:
        lines = (work / "stderr.log").read_text().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        raise StageFailedError(f"{work.name}: {last}")
    found: Report = json.loads(report.read_text())
    return found


def cell_faults(cell: str, report: Report) -> list[str]:
    """What is wrong, a line a model; empty: all of them opened and agree."""
    if "fault" in report:
        return [report["fault"]]
    keras, backend = cell.rsplit("-", 1)
    versions, faults = report["versions"], []
    if versions["backend"] != backend or not _is(keras, versions["keras"]):
        faults.append(f"{cell}: ran Keras {versions['keras']} on {versions['backend']}")
    for name, found in report["models"].items():
        if "fault" in found:
            faults.append(f"{cell}, {name}: {found['fault']}")
        for kind in found.keys() - {"fault"}:
            if not found[kind] <= LARGEST_DIFFERENCE:
                faults.append(f"{cell}, {name} ({kind}): probabilities {found[kind]:.1e} apart")
    return faults


def _is(keras: str, version: str) -> bool:
    return keras == "newest" or f"{version}.".startswith(f"{keras}.")


def table(reports: dict[str, Report], architectures: Sequence[str]) -> str:
    """Largest difference of a probability, an architecture a row, a cell a column."""
    width = max(map(len, architectures))
    heads = [f"{cell.replace('tensorflow', 'tf'):>13}" for cell in reports]
    lines = [f"{'max |dp|':{width}} {''.join(heads)}"]
    for architecture in architectures:
        cells = "".join(f"{_worst(report, architecture):>13}" for report in reports.values())
        lines.append(f"{architecture:{width}} {cells}")
    used = {report["versions"]["keras"] for report in reports.values() if "versions" in report}
    return "\n".join([*lines, f"with Keras {', '.join(sorted(used))}"])


def _worst(report: Report, architecture: str) -> str:
    if "fault" in report:
        return "fault"
    found = [
        values
        for name, values in report["models"].items()
        if name.rpartition("-")[0] == architecture
    ]
    if any("fault" in values for values in found):
        return "fault"
    return f"{max(max(values.values()) for values in found):.1e}"


def original_table(comparisons: Sequence[Comparison]) -> str:
    """A row a model, dtype and Keras; the reads that are called differently are told below."""
    lines = [f"{'Capfinder 0.4.3':22} {'Keras':>7} {'fed as':>8} {'reads':>6} {'same':>6}"]
    for one in comparisons:
        same = one.reads - len(one.differences)
        lines.append(f"{one.run:22} {one.keras:>7} {one.dtype:>8} {one.reads:6} {same:6}")
        lines += [f"    {_shown(d)}" for d in one.differences]
        lines += [
            f"    {_shown(d)} in the rounding that it was trained with" for d in one.by_rounding
        ]
    return "\n".join(lines)


def _shown(difference: Difference) -> str:
    d = difference
    return f"{d.read_id} {d.theirs}, ours {d.ours} by {d.margin:.6f} of probability"


def _say(text: str) -> None:
    print(text, flush=True)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Opens exported models in other Kerases and in Capfinder 0.4.3"
    )
    add = parser.add_argument
    default = Path.home() / ".cache" / "capfinder-interop"
    add("--directory", type=Path, default=default, help="for environments and files; %(default)s")
    add(
        "--cells",
        nargs="*",
        choices=CELLS,
        default=CELLS,
        metavar="CELL",
        help="none, or of " + " ".join(CELLS),
    )
    add("--architectures", nargs="+", choices=[*ARCHITECTURES], default=[*ARCHITECTURES])
    add("--skip_original", action="store_true", help="without Capfinder 0.4.3")
    add("--torch", default="torch==2.13.0", help="requirement of a CPU build; %(default)s")
    return parser.parse_args()


def _cells(given: argparse.Namespace, environments: Environments, work: Path) -> dict[str, Report]:
    models, reports = work / "models", {}
    models.mkdir()
    chosen = model_cases.cases(given.architectures) if given.cells else []
    for case in chosen:
        _say(f"Exporting {case.name} ({case.target_length} samples, fed {case.samples}) ...")
        model_cases.write(case, models)
    for cell in given.cells:
        try:
            environment = environments.cell(*cell.rsplit("-", 1))
            _say(f"Keras {cell.replace('-', ' on ')}:")
            reports[cell] = run_cell(environment, models, [c.name for c in chosen], work / cell)
        except StageFailedError as error:  # the others are still worth knowing
            reports[cell] = {"fault": str(error)}
            _say(f"    {error}")
    return reports


def run(given: argparse.Namespace) -> list[str]:
    """What is wrong, a line each; empty: everything opens and agrees.

    Raises: StageFailedError when no model can be exported."""
    directory = given.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    environments = Environments(directory, torch=given.torch, say=_say)
    work = directory / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    reports = _cells(given, environments, work)
    faults = [fault for cell, report in reports.items() for fault in cell_faults(cell, report)]
    comparisons: list[Comparison] = []
    if not given.skip_original:
        try:
            for one in original_check.check(environments.original, work / "original", _say):
                comparisons.append(one)
                faults += one.faults
        except StageFailedError as error:
            faults.append(str(error))
    figures = {
        "largest_difference_allowed": LARGEST_DIFFERENCE,
        "cells": reports,
        "original": [dataclasses.asdict(one) for one in comparisons],
        "faults": faults,
    }
    (directory / "interop.json").write_text(json.dumps(figures, indent=1))
    if reports:
        _say(f"\n{table(reports, given.architectures)}")
    if comparisons:
        _say(f"\n{original_table(comparisons)}")
    return faults


def main() -> int:
    given = _parsed()
    try:
        faults = run(given)
    except CapfinderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
