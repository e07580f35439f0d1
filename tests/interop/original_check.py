"""Capfinder 0.4.3 beside ours: models trained by our pipeline, and its own classifier, and the
caps that both name for the same CSV file.

0.4.3 feeds a model 500 samples, as float16 unless told otherwise; ours rounds a signal to the
dtype that the model was trained with. Both are given the same numbers, as float16 and as float32,
and must call every read the same. Where 0.4.3 rounds otherwise than `capfinder predict` does by
itself, it is told as well which reads that changes, and how near their two best caps lie."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import Environment
from original_caps import CLASSES, EFFECT, write_rounded, write_test_caps

from capfinder import simulate
from capfinder.errors import StageFailedError
from capfinder.models import ARCHITECTURES

HERE = Path(__file__).parent
DTYPES = ("float16", "float32")
KERAS = ("3.4.1", "newest")  # the oldest that opens our files, and today's
RELEASED, USUAL = "released", "usual"
TRAINING_SEED, TRAINING_READS = 21, 160  # reads of a class


@dataclass(frozen=True)
class Run:
    """A training. An even number of samples is cut off an input_length, so that cutting twice, in
    0.4.3 and in the model, leaves the same samples as cutting once, in ours."""

    name: str
    model_type: str
    dtype: str = "float16"
    target_length: int = 500
    input_length: int | None = None

    def settings(self, caps: Path, output_dir: Path) -> dict[str, Any]:
        return {
            "etl_params": {
                "caps_data_dir": str(caps),
                "examples_per_class": None,
                "use_remote_dataset_version": "",
            },
            "tune_params": {"max_trials": 0},
            "train_params": {"max_epochs_final_model": 8, "patience": 8},
            "shared_params": {
                "num_classes": CLASSES,
                "model_type": self.model_type,
                "dtype": self.dtype,
                "target_length": self.target_length,
                "train_test_fraction": 0.8,
                "output_dir": str(output_dir),
            },
            "tracking_params": {"mode": "off"},
            "export_params": {"formats": ["keras"], "input_length": self.input_length},
        }


RUNS = (
    *(Run(model_type, model_type) for model_type in ARCHITECTURES),
    Run("cnn_lstm-float32", "cnn_lstm", dtype="float32"),
    Run("cnn_lstm-400", "cnn_lstm", target_length=400, input_length=500),
)


@dataclass(frozen=True)
class Named:
    """A cap that ours names, and how much more probable it is than the next."""

    cap: str
    margin: float


@dataclass(frozen=True)
class Difference:
    """A read that the two call differently; margin: of ours."""

    read_id: str
    ours: str
    theirs: str
    margin: float


@dataclass(frozen=True)
class Comparison:
    """One model in 0.4.3 with one Keras, fed signals of one dtype.

    caps: how many different ones ours names; by_rounding: reads that ours calls otherwise when it
    rounds their signals to the model's own dtype, which is no fault of either."""

    run: str
    keras: str
    dtype: str
    reads: int
    caps: int
    differences: list[Difference]
    by_rounding: list[Difference]

    @property
    def faults(self) -> list[str]:
        """In words, what is wrong; empty: nothing."""
        where = f"{self.run} in Capfinder 0.4.3 with Keras {self.keras}, fed {self.dtype}"
        found = [
            f"{where}: read {d.read_id} is {d.theirs}, ours says {d.ours} by {d.margin:.1e}"
            for d in self.differences[:3]
        ]
        if self.caps < 2:
            found.append(f"{where}: only one cap is named, which shows nothing")
        return found


def train(run: Run, directory: Path) -> Path:
    """The run's output directory.

    Raises: StageFailedError with the pipeline's own error."""
    output_dir, caps = directory / run.name, directory / "training_caps"
    simulate.run(  # those that lie there are kept
        output_dir=caps,
        reads_per_class=TRAINING_READS,
        num_classes=CLASSES,
        runs_per_class=1,
        effect=EFFECT,
        seed=TRAINING_SEED,
    )
    config = directory / f"{run.name}.json"
    config.write_text(json.dumps(run.settings(caps, output_dir)))
    _capfinder("train-model", "--config_file", str(config))
    return output_dir


def classifier(output_dir: Path) -> Path:
    """The `.keras` file of a run."""
    (path,) = (output_dir / "best_model" / "classifier").glob("*.keras")
    return path


def ours(model: Path, caps_dir: Path, output_dir: Path) -> dict[str, Named]:
    """What `capfinder predict` makes of them, by read_id."""
    _capfinder(
        *("predict", "--model", str(model), "--caps_data_dir", str(caps_dir)),
        *("--output_dir", str(output_dir)),
    )
    with (output_dir / "predictions.csv").open(newline="") as stream:
        return dict(_named(row) for row in csv.DictReader(stream))


def _named(row: dict[str, str]) -> tuple[str, Named]:
    probabilities = sorted(float(row[key]) for key in row if key.startswith("p_"))
    margin = probabilities[-1] - probabilities[-2]
    return row["read_id"], Named(row["predicted_cap"], margin)


def theirs(
    environment: Environment, models: dict[str, Path], caps: Path, directory: Path
) -> dict[tuple[str, str], dict[str, str]]:
    """{(model's name, dtype): {read_id: cap}}, from 0.4.3 in a process of its own.

    Raises: StageFailedError with its last line."""
    named = [f"{name}={path}" for name, path in models.items()]
    command = [str(environment.python), "-P", str(HERE / "original_cell.py")]
    command += ["--caps", str(caps), "--models", *named, "--dtypes", *DTYPES]
    command += ["--output_dir", str(directory)]
    directory.mkdir(parents=True, exist_ok=True)
    variables = environment.variables(directory / "home")
    done = subprocess.run(command, env=variables, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise StageFailedError(f"Capfinder 0.4.3: {_last_line(done.stderr, done.returncode)}")
    return {
        (name, dtype): _their_caps(directory / f"{name}-{dtype}" / "predictions.csv")
        for name in models
        for dtype in DTYPES
    }


def _their_caps(path: Path) -> dict[str, str]:
    with path.open(newline="") as stream:
        return {row["read_id"]: row["predicted_cap"] for row in csv.DictReader(stream)}


def compare(
    fed_alike: dict[str, Named],
    usual: dict[str, Named],
    theirs: dict[str, str],
    *,
    run: str,
    keras: str,
    dtype: str,
) -> Comparison:
    """fed_alike: ours, of the numbers that theirs were fed; usual: of those in the file.

    Raises: StageFailedError when one has reads that another lacks."""
    for of_ours in (fed_alike, usual):
        if of_ours.keys() != theirs.keys():
            apart = sorted(of_ours.keys() ^ theirs.keys())
            raise StageFailedError(f"{run}: only one of the two names read {apart[0]}")
    return Comparison(
        run=run,
        keras=keras,
        dtype=dtype,
        reads=len(theirs),
        caps=len({named.cap for named in fed_alike.values()}),
        differences=_differences(fed_alike, theirs),
        by_rounding=_differences(usual, theirs),
    )


def _differences(ours: dict[str, Named], theirs: dict[str, str]) -> list[Difference]:
    return [
        Difference(read_id, named.cap, theirs[read_id], named.margin)
        for read_id, named in ours.items()
        if named.cap != theirs[read_id]
    ]


def check(
    environment_of: Callable[[str], Environment], directory: Path, say: Callable[[str], None]
) -> Iterator[Comparison]:
    """Every run, and the model in 0.4.3, on one CSV file, in 0.4.3 with every Keras of KERAS."""
    environments = {keras: environment_of(keras) for keras in KERAS}
    caps = directory / "test_caps" / "data__cap_-99.csv"
    write_test_caps(caps)
    released = _released(environments["newest"])
    models, sources = {RELEASED: released}, {RELEASED: released}
    for run in RUNS:
        say(f"Training {run.name} ...")
        sources[run.name] = train(run, directory)
        models[run.name] = classifier(sources[run.name])
    named = name_caps(models, sources, caps, directory)
    for keras, environment in environments.items():
        say(f"Capfinder 0.4.3 with Keras {keras} ...")
        work = directory / f"original-{keras}"
        found = theirs(environment, models, caps, work)
        used = json.loads((work / "versions.json").read_text())["keras"]
        for (name, dtype), their_caps in found.items():
            yield compare(
                named[name, dtype],
                named[name, USUAL],
                their_caps,
                run=name,
                keras=used,
                dtype=dtype,
            )


def name_caps(
    models: dict[str, Path], sources: dict[str, Path], caps: Path, directory: Path
) -> dict[tuple[str, str], dict[str, Named]]:
    """{(model's name, dtype): ours, fed what 0.4.3 feeds}, and for (name, USUAL) ours as it is.

    models: `.keras` files, whose signals ours takes as float32; sources: for `capfinder predict`
    as usual, a run or again the file."""
    rounded = directory / "rounded_caps" / caps.name
    write_rounded(caps, rounded)
    fed = {"float16": rounded.parent, "float32": caps.parent}
    named = {}
    for name, model in models.items():
        output_dir = directory / "ours" / name
        for dtype in DTYPES:
            named[name, dtype] = ours(model, fed[dtype], output_dir / dtype)
        named[name, USUAL] = (
            named[name, "float32"]
            if sources[name] == model
            else ours(sources[name], caps.parent, output_dir / USUAL)
        )
    return named


def _released(environment: Environment) -> Path:
    """The classifier that Capfinder 0.4.3 brings along."""
    packages = environment.python.parents[1] / "lib"
    (path,) = packages.glob("python3*/site-packages/capfinder/model/cnn_lstm-classifier.keras")
    return path


def _capfinder(*arguments: str) -> None:
    """Raises: StageFailedError with the command's error."""
    command = [sys.executable, "-m", "capfinder", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise StageFailedError(
            f"capfinder {arguments[0]}: {_last_line(done.stderr, done.returncode)}"
        )


def _last_line(text: str, code: int) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"
