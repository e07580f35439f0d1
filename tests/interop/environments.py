"""Virtual environments with other Kerases, and one with Capfinder 0.4.3: made once, by pip, in a
directory that can be removed whole."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from capfinder.errors import StageFailedError

BACKENDS = ("jax", "tensorflow", "torch")
KERAS = {"3.4.1": "keras==3.4.1", "3.8": "keras==3.8.*", "newest": "keras>=3.15"}
_X86 = platform.machine() in ("x86_64", "AMD64")
_TENSORFLOW = "tensorflow-cpu" if _X86 else "tensorflow"  # no tensorflow-cpu elsewhere
# What each Keras can run with: the releases of its own months.
_WITH = {
    ("3.4.1", "jax"): ("jax==0.4.31", "numpy<2"),
    ("3.8", "jax"): ("jax==0.5.0",),
    ("newest", "jax"): ("jax",),
    ("3.4.1", "tensorflow"): (f"{_TENSORFLOW}==2.17.*",),
    ("3.8", "tensorflow"): (f"{_TENSORFLOW}==2.18.*",),
    ("newest", "tensorflow"): (f"{_TENSORFLOW}>=2.21",),
}
# Capfinder 0.4.3's own ranges, of what its prediction imports: all of them together can't be
# installed any more. JAX has none there; from 0.11 on it needs a Python that 0.4.3 doesn't take.
_ORIGINAL = (
    *("keras>=3.3.2,<4", "keras-tuner>=1.4.7,<2", f"{_TENSORFLOW}>=2.16.1,<3", "jax<0.11"),
    *("comet-ml>=3.39.3,<4", "loguru>=0.7.2,<0.8", "polars>=0.20.21,<0.21", "pandas"),
    *("prefect>=2.18.3,<3", "bokeh>=3.3,<4", "mpire>=2.8,<3", "parasail>=1.3.4,<2"),
    *("pod5>=0.3.10,<0.4", "pysam>=0.22.1,<0.23", "biopython>=1.83,<2", "tqdm>=4.66.1,<5"),
    *("scikit-learn", "typer", "matplotlib"),
)
_PYTHONS = ("python3.11", "python3.12")  # NumPy 1 and TensorFlow 2.17 have no wheels for others


@dataclass(frozen=True)
class Environment:
    """overlays: directories of packages that go before the environment's own."""

    python: Path
    overlays: tuple[Path, ...] = ()

    def variables(self, home: Path) -> dict[str, str]:
        """For a process that shall find these packages, and no settings of the user's."""
        home.mkdir(parents=True, exist_ok=True)
        return {
            "HOME": str(home),
            "KERAS_HOME": str(home / "keras"),
            "PATH": f"{self.python.parent}:{os.defpath}",
            "PYTHONPATH": ":".join(map(str, self.overlays)),
            "PYTHONNOUSERSITE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }


class Environments:
    """Those in `directory`. say: is told what takes minutes, before it does.

    Raises, in all: StageFailedError in one line, with the file that has pip's own words."""

    def __init__(self, directory: Path, *, torch: str, say: Callable[[str], None]) -> None:
        self.directory, self._torch, self._say = directory, torch, say
        self._resolved: dict[str, str] = {}

    def cell(self, keras: str, backend: str) -> Environment:
        """keras: a key of KERAS; all PyTorch cells share one environment, by its size."""
        required = self._keras(keras)
        if backend == "torch":
            shared = self._made("torch", (self._torch, self._keras("newest")))
            return shared if keras == "newest" else self._with_keras(shared, keras)
        return self._made(f"{backend}-{keras}", (required, *_WITH[keras, backend]))

    def original(self, keras: str) -> Environment:
        """Capfinder 0.4.3 with this Keras."""
        made = self._made("original", _ORIGINAL, alone=("capfinder==0.4.3",))
        return self._with_keras(made, keras)

    def _with_keras(self, environment: Environment, keras: str) -> Environment:
        """The same with another Keras before its own, without what that would bring along."""
        required = self._keras(keras)
        overlay = self.directory / f"{required.replace('==', '-')}"
        if not (overlay / "complete").exists():
            shutil.rmtree(overlay, ignore_errors=True)
            self._say(f"Installing {required} ...")
            target = ["--target", str(overlay), "--no-deps", required]
            self._pip(environment.python, target, overlay.name)
            (overlay / "complete").touch()
        return Environment(environment.python, (overlay,))

    def _keras(self, keras: str) -> str:
        """'newest' -> 'keras==3.15.1': the newest there is now that fits."""
        required = KERAS[keras]
        if "*" not in required and "==" in required:
            return required
        if keras not in self._resolved:
            report = self.directory / "resolved.json"
            options = ["--dry-run", "--ignore-installed", "--no-deps", "--report", str(report)]
            self._pip(Path(sys.executable), [*options, required], "resolving")
            (found,) = json.loads(report.read_text())["install"]
            report.unlink()
            self._resolved[keras] = f"keras=={found['metadata']['version']}"
        return self._resolved[keras]

    def _made(
        self, name: str, requirements: Sequence[str], *, alone: Sequence[str] = ()
    ) -> Environment:
        """alone: requirements installed first, without theirs. One of the same name and other
        requirements is replaced."""
        digest = hashlib.sha256(json.dumps([*alone, *requirements]).encode()).hexdigest()[:8]
        directory = self.directory / f"{name}-{digest}"
        python = directory / "bin" / "python"
        if (directory / "complete").exists():
            return Environment(python)
        for old in self.directory.glob(f"{name}-????????"):
            shutil.rmtree(old)
        self._say(f"Installing {', '.join((*alone, *requirements[:3]))} ... (minutes)")
        command = [_base_python(), "-m", "venv", str(directory)]
        if subprocess.run(command, capture_output=True).returncode:
            raise StageFailedError(f"{directory}: {command[0]} can't make an environment there")
        for required in alone:
            self._pip(python, ["--no-deps", required], name)
        self._pip(python, requirements, name)
        (directory / "complete").touch()
        return Environment(python)

    def _pip(self, python: Path, arguments: Sequence[str], name: str) -> None:
        log = self.directory / f"{name}.log"
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        with log.open("w") as stream:
            code = subprocess.run(install, stdout=stream, stderr=subprocess.STDOUT).returncode
        if code:
            errors = [line for line in log.read_text().splitlines() if line.startswith("ERROR")]
            last = errors[-1] if errors else f"exit code {code}"
            raise StageFailedError(f"{log}: pip can't install {' '.join(arguments)}: {last}")


def _base_python() -> str:
    """Raises: StageFailedError when no Python fits."""
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return sys.executable
    found = [path for name in _PYTHONS if (path := shutil.which(name))]
    if not found:
        raise StageFailedError(
            "Keras 3.4.1 and Capfinder 0.4.3 need Python 3.11 or 3.12, and neither is here; "
            "install one"
        )
    return found[0]
