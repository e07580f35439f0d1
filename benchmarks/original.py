"""Capfinder 0.4.3 in a virtual environment of its own, made once."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Its own requirements pin versions that no longer install together; these run its functions.
PACKAGES = (
    *("jax<0.11", "keras", "keras-tuner", "tensorflow-cpu", "comet-ml", "loguru", "polars"),
    *("pandas", "scikit-learn", "tqdm", "typer", "matplotlib", "prefect"),
)
CANDIDATES = ("python3.11", "python3.12")  # it takes 3.10 to 3.12, jax 3.11 or newer


def python(directory: Path) -> Path:
    """The interpreter of the environment in `directory`, which is made first when absent.

    Raises: SystemExit when there is no fitting Python or the installation fails."""
    interpreter, complete = directory / "bin" / "python", directory / "complete"
    if complete.exists():
        return interpreter
    shutil.rmtree(directory, ignore_errors=True)
    base = _base_python()
    print(f"Installing Capfinder 0.4.3 and what it needs into {directory} (some minutes) ...")
    pip = [str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    for command in (
        [base, "-m", "venv", str(directory)],
        [*pip, "--no-deps", "capfinder==0.4.3"],
        [*pip, *PACKAGES],
    ):
        if subprocess.run(command).returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
    complete.touch()
    return interpreter


def _base_python() -> str:
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return sys.executable
    found = [path for name in CANDIDATES if (path := shutil.which(name))]
    if not found:
        raise SystemExit(
            "Capfinder 0.4.3 needs Python 3.11 or 3.12, and neither is here. Install one, or give "
            "--original_python the interpreter of an environment that has it."
        )
    return found[0]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where its environment is, and everything else that a benchmark writes."""
    parser.add_argument(
        "--original_python", type=Path, help="interpreter of an environment with capfinder 0.4.3"
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path.home() / ".cache" / "capfinder-benchmarks"
    )


def prepared(given: argparse.Namespace) -> tuple[Path, Path]:
    """The working directory and the original's interpreter, both made when absent."""
    workdir = given.workdir.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir, (given.original_python or python(workdir / "original")).absolute()


def home(workdir: Path) -> str:
    """A HOME of its own: importing the original writes there."""
    directory = workdir / "home"
    directory.mkdir(exist_ok=True)
    return os.fspath(directory)


def versions(interpreter: Path) -> str:
    """Of the packages that its figures depend on, as text."""
    code = "import original_setup; print(original_setup.versions())"
    command = [str(interpreter), "-c", code]
    return subprocess.check_output(command, cwd=Path(__file__).parent, text=True).strip()
