"""From the start of a process to its first training step and its first epoch, whole processes.

    python benchmarks/start_up.py --rounds 3

Ours and Capfinder 0.4.3's, without compiled programs on disk and with those of an earlier run, in
turns. Prints a table and writes it to RESULTS.md."""

import argparse
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
import original
import processes
import results
from architectures import CLASSES, LENGTH, PAIRS

HERE = Path(__file__).parent
SECTION = "From the start of a process to its first step"
PAIR = PAIRS[0]  # cnn_lstm with the released hyperparameters
PACKAGES = ("numpy", "jax", "flax")
SETTINGS = {
    "target_length": LENGTH,
    "num_classes": CLASSES,
    "dtype": "float32",
    "batch_size": PAIR.batch_size,
    "train_test_fraction": 0.8,
    "train_val_fraction": 0.8334,  # of 384 reads of a class: 320, and 64 to validate with
}
READS_PER_CLASS, STEPS = 480, 5  # of an epoch: 4 times 320 reads in batches of 256
REQUIRED = {"no cache": 2, "warm cache": 3}
MIN_COMPILE_SECONDS = "0"  # all programs are kept: as ours does


@dataclass(frozen=True)
class Bench:
    """What is run, where and with which settings."""

    workdir: Path
    python: Path  # of the original
    seed: int

    @property
    def caps(self) -> Path:
        return self.workdir / "start_caps"

    @property
    def our_output(self) -> Path:
        return self.workdir / "start_ours"

    @property
    def their_output(self) -> Path:
        return self.workdir / "start_theirs"

    def prepare(self) -> None:
        """Both datasets, and a run of either that leaves compiled programs behind."""
        for directory in (
            self.our_output,
            self.their_output,
            *map(self._cache, ("ours", "theirs")),
        ):
            shutil.rmtree(directory, ignore_errors=True)
        inputs.simulate(
            self.caps, reads_per_class=READS_PER_CLASS, num_classes=CLASSES, seed=self.seed
        )
        command: list[Any] = [
            sys.executable,
            inputs.LAUNCH,
            *self._arguments("etl", self._cache("ours")),
        ]
        processes.run(command, log_path=self._log("etl"), env=processes.environment())
        command = [self.python, HERE / "original_etl.py", "--caps_data_dir", self.caps]
        command += ["--output_dir", self.their_output, "--result", self.workdir / "start_etl.json"]
        command += ["--examples_per_class", str(READS_PER_CLASS)]
        command += [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
        self._run_theirs(command, "original_etl")
        for who in ("ours", "theirs"):
            self.start(who, "warm cache")

    def start(self, who: str, cache: str) -> dict[str, float]:
        """Seconds from the start of a process to "step" and "epoch"."""
        result = self.workdir / "start_result.json"
        result.unlink(missing_ok=True)
        run = self._start_ours if who == "ours" else self._start_theirs
        started = time.monotonic()
        run(result, is_warm=cache == "warm cache")
        moments = json.loads(result.read_text("utf-8"))
        return {name: moment - started for name, moment in moments.items()}

    def _start_ours(self, result: Path, *, is_warm: bool) -> None:
        shutil.rmtree(self.our_output / "checkpoints", ignore_errors=True)
        cache = self._cache("ours" if is_warm else "empty")
        if not is_warm:
            shutil.rmtree(cache, ignore_errors=True)
        command: list[Any] = [
            sys.executable,
            HERE / "our_start.py",
            result,
            *self._arguments("train", cache),
        ]
        processes.run(command, log_path=self._log("our_start"), env=processes.environment())

    def _start_theirs(self, result: Path, *, is_warm: bool) -> None:
        told = self.workdir / "start_told.json"
        about = SETTINGS | {
            "dataset": os.fspath(self.their_output / "dataset"),
            "model_type": PAIR.model_type,
            "theirs": PAIR.theirs,
        }
        told.write_text(json.dumps(about), "utf-8")
        command = [self.python, HERE / "original_start.py", result, told]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": os.fspath(self._cache("theirs")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": MIN_COMPILE_SECONDS,
        }
        self._run_theirs(command, "original_start", **(cache if is_warm else {}))

    def _run_theirs(self, command: list[Any], name: str, **env: str) -> None:
        env |= {"HOME": original.home(self.workdir)}
        processes.run(command, log_path=self._log(name), env=processes.environment(**env))

    def _arguments(self, stage: str, cache: Path) -> list[str]:
        shared = {f"shared_params.{name}": value for name, value in SETTINGS.items()}
        return inputs.launch_arguments(
            PAIR.model_type,
            self.our_output,
            shared
            | {
                "etl_params.caps_data_dir": os.fspath(self.caps),
                "etl_params.use_remote_dataset_version": "",
                "etl_params.examples_per_class": READS_PER_CLASS,
                "tune_params.max_trials": 0,
                "tune_params.seed": self.seed,
                "train_params.max_epochs_final_model": 1,
                "model_params": PAIR.ours,
                "tracking_params.mode": "off",
                "runtime_params.compilation_cache_dir": os.fspath(cache),
            },
            stage=stage,
        )

    def _cache(self, whose: str) -> Path:
        return self.workdir / f"start_cache_{whose}"

    def _log(self, name: str) -> Path:
        return self.workdir / f"start_{name}.log"


Found = dict[tuple[str, str], list[dict[str, float]]]


def measure(bench: Bench, rounds: int) -> Found:
    """Rounds in which ours and theirs take turns."""
    found: Found = defaultdict(list)
    for number in range(1, rounds + 1):
        for cache in REQUIRED:
            for who in ("ours", "theirs"):
                seconds = bench.start(who, cache)
                found[who, cache].append(seconds)
                print(
                    f"round {number}: {who:6}, {cache:10}: step after {seconds['step']:.1f} s, "
                    f"epoch after {seconds['epoch']:.1f} s",
                    flush=True,
                )
    return found


def table(found: Found) -> str:
    return results.comparison(
        [
            results.Measure(
                f"first {moment}, {cache}, s",
                [outcome[moment] for outcome in found["ours", cache]],
                [outcome[moment] for outcome in found["theirs", cache]],
                "{:.1f}",
                is_less_better=True,
                required=f">= {required}" if moment == "step" else "",
            )
            for moment in ("step", "epoch")
            for cache, required in REQUIRED.items()
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="rounds; one run of either comes first")
    add("--seed", type=int, default=42, help="of reads and weights")
    original.add_options(parser)
    results.add_option(parser)
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("needs a round")
    workdir, python = original.prepared(given)
    bench = Bench(workdir, python, given.seed)
    bench.prepare()
    found = measure(bench, given.rounds)
    text = "\n\n".join(
        (
            f"{results.provenance(PACKAGES)} The original: {original.versions(python)}.",
            f"Seconds from the start of a process until the first training step, and the first "
            f"epoch with its validation, are finished: {PAIR.model_type} with the released "
            f"hyperparameters, batches of {PAIR.batch_size}, {STEPS} steps an epoch, float32; "
            f"{given.rounds} rounds. Ours: `launch.py --stage=train` on a dataset that is there. "
            "Theirs: imports, load_train_dataset_from_csvs on its dataset of the same reads, "
            "builder, fit. No cache: nothing compiled before is on disk, where ours writes its "
            "programs meanwhile; warm cache: JAX's persistent cache as an earlier run left it, "
            "ours by default, theirs by JAX's environment variables. It holds every program of "
            "either, however short its compilation and however small it is. What numba compiled "
            "for the ETL is there in both, as for anyone who has a dataset.",
            table(found),
        )
    )
    results.publish(SECTION, text, trial=given.trial)


if __name__ == "__main__":
    main()
