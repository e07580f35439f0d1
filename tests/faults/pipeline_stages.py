"""Where a run of the pipeline stands, told from outside by what it shows and what lies on disk."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from kills import Place, Run
from stop_at_step import STAGE_LINE

POLL_SECONDS = 0.001
START = "start-up"
STAGES = ("etl", "tune", "train", "evaluate", "export")
MARKS = {  # of what a stage has left, for the table of kills
    "dataset": "dataset/cap_data/[0-9]*",
    "best trial": "tuner_models/*/best_hyperparameters.json",
    "outcome": "checkpoints/*/outcome.json",
    "metrics": "evaluation/metrics.json",
    "keras": "best_model/classifier/classifier_*.keras",
    "h5": "best_model/*.weights.h5",
    "report": "report.html",
}


def stage_of(output: Path) -> str:
    """The last that a run has begun, by its words so far."""
    begun = STAGE_LINE.findall(output.read_text(errors="replace"))
    return begun[-1] if begun else START


def wait_for(run: Run, wanted: str, output: Path) -> bool:
    """Waits for the beginning of a stage; False when the run ended before."""
    while wanted != START and f"== {wanted} ==\n" not in output.read_text(errors="replace"):
        if run.poll() is not None:
            return False
        time.sleep(POLL_SECONDS)
    return True


def follow(run: Run, output: Path, begins: Callable[[str], None]) -> None:
    """Follows a run to its end, and holds it still at the beginning of each stage for `begins`."""
    for stage in STAGES:
        if wait_for(run, stage, output):
            os.kill(run.pid, signal.SIGSTOP)
            begins(stage)
            os.kill(run.pid, signal.SIGCONT)


def copy(earlier: Path, place: Place) -> None:
    """Begins a place with an output directory as another run had it."""
    shutil.copytree(earlier, place.output_dir, symlinks=True)


def on_disk(output_dir: Path) -> str:
    """What there is, in a few words."""
    found = []
    for kind in ("best", "latest"):
        names = [path.name for path in output_dir.glob(f"checkpoints/*/{kind}/*")]
        if whole := sorted(int(name) for name in names if name.isdigit()):
            found.append(f"{kind} {whole[-1]}")
    marks = [mark for mark, pattern in MARKS.items() if any(output_dir.glob(pattern))]
    if partial := len([*output_dir.rglob(".partial-*"), *output_dir.rglob("*checkpoint-tmp*")]):
        marks.append(f"{partial} partial")
    return ", ".join([*marks[:2], *found, *marks[2:]]) or "nothing"
