"""What must be there once a killed run of the pipeline was rerun: the undisturbed run's results,
bit for bit where it computes, and nothing else."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import etl_check
import jax
import numpy as np
import optuna
from etl_phases import paths_below
from kills import Place
from optuna.storages.journal import JournalFileBackend

from capfinder import files
from capfinder.training import reading

Facts = dict[str, str]  # what a result is called -> it, or its digest
PASSING = {  # differ from run to run
    *("seconds", "examples_per_second", "idle_share"),
    *("worker", "home", "starts", "left", "beat"),  # of a trial: who ran it
}
COMPLAINT = re.compile(r"^.*(?:Traceback|\w+Warning:|can.t be read).*$", re.MULTILINE)
NAMED_LAST = ("evaluation", "best_model")  # files there have their names once they are right


def _lasting(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: _lasting(part) for key, part in value.items() if key not in PASSING}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    return json.dumps(_lasting(value), sort_keys=True)


def _records(output_dir: Path) -> Facts:
    record = json.loads((output_dir / "run.json").read_text())
    exports = [{**row, "path": etl_check.general(row["path"])} for row in record["exports"]]
    facts = {
        "run.json: exports": _text(exports),
        "run.json: stages": _text({name: row["key"] for name, row in record["stages"].items()}),
    }
    for name in ("results_key", "seed", "class_names", "tuning"):
        facts[f"run.json: {name}"] = _text(record[name])
    for path in output_dir.glob("tuner_models/*/best_hyperparameters.json"):
        facts[path.name] = _text(json.loads(path.read_text()))
    for path in output_dir.glob("checkpoints/*/outcome.json"):
        facts[path.name] = _text(files.unsealed(json.loads(path.read_text())))
    return facts


def _study(output_dir: Path) -> Facts:
    (journal,) = output_dir.glob("tuner_models/*/journal.log")
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    (name,) = optuna.get_all_study_names(storage)
    return {
        f"study: trial {trial.number}": _text(
            {
                "state": trial.state.name,
                "values": trial.values,
                "epochs": trial.intermediate_values,
                "params": trial.params,
                "notes": trial.user_attrs,
                "system": trial.system_attrs,
            }
        )
        for trial in optuna.load_study(study_name=name, storage=storage).get_trials()
    }


def _checkpoints(output_dir: Path) -> Facts:
    """The kept best weights, and the newest state: weights, optimiser, random key."""
    (directory,) = (output_dir / "checkpoints").iterdir()
    facts: Facts = {}
    for path in (directory / "best").iterdir():
        facts |= _arrays(f"best weights, epoch {path.name}", path / "variables")
    kept = list((directory / "latest").iterdir())
    facts["latest states kept"] = str(len(kept))
    newest = max(kept, key=lambda path: int(path.name))
    return facts | _arrays(f"latest state, step {newest.name}", newest / "state")


def _arrays(what: str, directory: Path) -> Facts:
    tree = jax.tree_util.tree_flatten_with_path(reading.read_arrays(directory))[0]
    facts = {}
    for path, leaf in tree:
        array = np.asarray(leaf)
        content = f"{array.dtype} {array.shape} ".encode() + array.tobytes()
        facts[f"{what}: {jax.tree_util.keystr(path)}"] = hashlib.sha256(content).hexdigest()
    return facts


def _named_last(output_dir: Path) -> Facts:
    facts = {}
    for directory in NAMED_LAST:
        for path in sorted((output_dir / directory).rglob("*")):
            if path.is_dir() or ".partial-" in str(path):
                continue
            name = etl_check.general(str(path.relative_to(output_dir)))
            if path.name == "metrics.json":
                facts[name] = _text(json.loads(path.read_text()))
            elif path.name == "model_card.md":  # which names the dated file beside it
                facts[name] = re.sub(r"classifier_\d{8}_\d{6}", "classifier_*", path.read_text())
            else:
                again = " once more" if name in facts else ""
                facts[name + again] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts


READERS: tuple[Callable[[Path], Facts], ...] = (_records, _study, _checkpoints, _named_last)


def _facts(output_dir: Path) -> tuple[Facts, list[str]]:
    """And what can't be read."""
    facts: Facts = {}
    problems = []
    for read in READERS:
        try:
            facts |= read(output_dir)
        except Exception as error:  # damaged files raise whatever their library does
            text = " ".join(str(error).split())[:300]
            problems.append(f"can't be read:{read.__name__} ({type(error).__name__}: {text})")
    return facts, problems


@dataclass(frozen=True)
class Expected:
    """What an undisturbed run leaves: the dataset, with the paths that may be there, the paths that
    must be, and the facts of the rest."""

    dataset: etl_check.Expected
    required: frozenset[str]
    facts: Facts

    @classmethod
    def of(cls, place: Place) -> "Expected":
        """Raises: AssertionError when the undisturbed run leaves debris, or what can't be read."""
        facts, problems = _facts(place.output_dir)
        assert not problems, problems
        dataset = etl_check.Expected.of(place.output_dir, place.scratch)
        return cls(dataset, dataset.paths, facts)

    def also(self, place: Place) -> "Expected":
        """The paths there may be there too."""
        return Expected(self.dataset.also(place.output_dir), self.required, self.facts)


def problems_while_dead(expected: Expected, place: Place) -> list[str]:
    """What has its name is whole, at any moment."""
    found = _named_last(place.output_dir)
    return etl_check.problems_while_dead(expected.dataset, place.output_dir) + [
        f"after the kill: {name} is not the undisturbed run's"
        for name, fact in found.items()
        if fact != expected.facts.get(name)
    ]


def left_by_keras(scratch: Path) -> list[str]:
    """While it writes or reads a file, Keras keeps a directory in the system's temporary one for
    what a model has besides weights, which is nothing here; a kill leaves it."""
    return [
        name for name in paths_below(scratch) if re.fullmatch(r"tmp[a-z0-9_]{8}/(assets/)?", name)
    ]


def problems_after(expected: Expected, place: Place) -> list[str]:
    facts, problems = _facts(place.output_dir)
    problems += etl_check.problems_after(
        expected.dataset, place.output_dir, place.scratch, but=left_by_keras(place.scratch)
    )
    there = set(map(etl_check.general, paths_below(place.output_dir)))
    problems += [f"missing: {path}" for path in sorted(expected.required - there)]
    problems += [f"missing: {name}" for name in expected.facts if name not in facts]
    for name, fact in facts.items():
        if name not in expected.facts:
            problems.append(f"one too many: {name}")
        elif fact != expected.facts[name]:
            problems.append(f"differs: {name}{_difference(expected.facts[name], fact)}")
    shown = place.output.read_text(errors="replace") if place.output.exists() else ""
    return problems + [f"the rerun shows: {line.strip()}" for line in COMPLAINT.findall(shown)]


def _difference(wanted: str, found: str) -> str:
    """Of two texts, from a little before the first difference; nothing for digests."""
    if " " not in wanted + found:
        return ""
    at = next(
        (n for n, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
        min(len(wanted), len(found)),
    )
    part = slice(max(0, at - 60), at + 60)
    return f" (... {wanted[part]} ..., now ... {found[part]} ...)"
