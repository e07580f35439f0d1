"""What must be there once a killed ETL was rerun: the undisturbed run's bytes, nothing else."""

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import etl_phases

CHANGING = {"created"}  # of a manifest, from run to run
DEBRIS = re.compile(r"\.partial-|bucket|spill|scratch|\btmp|\.tmp|-earlier")
# Names that differ from run to run, and what stands for them.
VARYING = (
    (re.compile(r"^logs/[^/]+\.log$"), "logs/*.log"),
    (re.compile(r"^comet/[0-9a-f]+\.zip$"), "comet/*.zip"),
    (re.compile(r"classifier_\d{8}_\d{6}\.keras$"), "classifier_*.keras"),
    (re.compile(r"^(checkpoints/\w+/(best|latest))/\d+/.*"), r"\1/*"),
)
ORPHAN_SECONDS = 10.0


def digest(path: Path) -> str:
    """SHA-256 of a file, of a manifest without what changes from run to run."""
    content = path.read_bytes()
    if path.name == "manifest.json":
        manifest = json.loads(content)
        kept = {key: value for key, value in manifest.items() if key not in CHANGING}
        content = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def general(path: str) -> str:
    for pattern, name in VARYING:
        path = pattern.sub(name, path)
    return path


@dataclass(frozen=True)
class Expected:
    """What an undisturbed run leaves: digests of the files below output_dir/dataset, by path, and
    every path that may be below output_dir."""

    digests: dict[str, str]
    paths: frozenset[str]

    @classmethod
    def of(cls, output_dir: Path, scratch: Path) -> "Expected":
        """Raises: AssertionError when the undisturbed run itself leaves debris."""
        paths = etl_phases.paths_below(output_dir)
        assert not [path for path in paths if DEBRIS.search(path)], paths
        assert not etl_phases.paths_below(scratch), etl_phases.paths_below(scratch)
        files = [path for path in paths if path.startswith("dataset/") and path[-1] != "/"]
        digests = {path: digest(output_dir / path) for path in files}
        return cls(digests, frozenset(map(general, paths)))

    def also(self, output_dir: Path) -> "Expected":
        """The paths below `output_dir` may be there too."""
        more = map(general, etl_phases.paths_below(output_dir))
        return Expected(self.digests, self.paths.union(more))

    @property
    def versions(self) -> dict[str, str]:
        return {p: d for p, d in self.digests.items() if p.startswith("dataset/cap_data/")}


def problems_while_dead(expected: Expected, output_dir: Path) -> list[str]:
    """A version that has its name is whole, at any moment."""
    paths = etl_phases.paths_below(output_dir)
    if not any(etl_phases.WHOLE_VERSION.match(path) for path in paths):
        return []
    return [
        f"after the kill: {path} is not the undisturbed run's"
        for path, wanted in expected.versions.items()
        if path not in paths or digest(output_dir / path) != wanted
    ]


def left_by_comet(phase: str, scratch: Path) -> list[str]:
    """Comet's client keeps an unfinished archive in the system's temporary directory, where a kill
    leaves it for ever. By then the ETL's work is done."""
    names = etl_phases.paths_below(scratch) if phase == etl_phases.NAMES[-1] else []
    return [name for name in names if re.match(r"tmp[a-z0-9_]{8}/", name)]


def left_by_python(scratch: Path) -> list[str]:
    """Python tries with a small file whether the temporary directory can be written to."""
    return [
        name
        for name in etl_phases.paths_below(scratch)
        if re.fullmatch(r"[a-z0-9_]{8}", name) and (scratch / name).read_bytes() in (b"", b"blat")
    ]


def problems_after(
    expected: Expected, output_dir: Path, scratch: Path, *, but: Collection[str] = ()
) -> list[str]:
    """but: names in `scratch` that may be there, besides what Python leaves."""
    paths = etl_phases.paths_below(output_dir)
    problems = [f"missing: {path}" for path in expected.versions if path not in paths]
    problems += [
        f"other bytes: {path}"
        for path, wanted in expected.digests.items()
        if path in paths and not path.endswith(".lock") and digest(output_dir / path) != wanted
    ]
    problems += [f"debris: {path}" for path in paths if general(path) not in expected.paths]
    but = {*but, *left_by_python(scratch)}
    left = [path for path in etl_phases.paths_below(scratch) if path not in but]
    return problems + [f"debris: {path} (system temp)" for path in left]


def left_running(session: int, *, seconds: float = ORPHAN_SECONDS) -> list[int]:
    """Processes of the session `session` that outlive its first by `seconds`."""
    deadline = time.monotonic() + seconds
    while members := list(_session(session)):
        if time.monotonic() > deadline:
            return members
        time.sleep(0.05)
    return []


def _session(session: int) -> Iterable[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            yield int(stat.parent.name)
