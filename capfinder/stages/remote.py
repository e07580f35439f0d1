"""Dataset versions kept as the Comet artifact `cap_data`: found, fetched whole or not at all, sent.

A version asked for by name must be had, or it's an error. Wherever Comet is only a shortcut, a
lost network is one warning and the run goes on with what is on disk."""

import contextlib
import shutil
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from capfinder import files, log
from capfinder.data import artifact_index, artifacts, versions
from capfinder.data.artifact_index import INDEX, Entry
from capfinder.data.records import DATASET_NAME
from capfinder.data.versions import Dataset
from capfinder.errors import CapfinderError, InputError, SettingsError
from capfinder.log import logger
from capfinder.tracking import NO_KEY, ArtifactStore, CometError, StoredVersion, Tracker

TASK = "RNA caps classification"
SETTING = "etl_params.use_remote_dataset_version"


class Remote:
    """What `connect` gives; `root` is the local directory of versions, and its lock is held by
    the caller wherever something is fetched."""

    def __init__(self, store: ArtifactStore, root: Path) -> None:
        self._store, self._root = store, root
        self._listed: list[StoredVersion] | None = None
        self._is_lost = False

    def versions(self) -> list[StoredVersion]:
        """The versions X.Y.Z, oldest first, unfinished and failed uploads included.

        Raises: CometError."""
        if self._listed is None:
            self._store.check_reachable()
            self._listed = sorted(
                (each for each in self._store.versions() if _is_number(each.version)),
                key=lambda each: versions.version_key(each.version),
            )
        return self._listed

    def label(self, version: str) -> str:
        """What a version is called there, for messages. Raises: CometError."""
        return self._store.label(version)

    def numbers(self) -> list[str]:
        """For the number of the next version: all that are taken, none when Comet is lost."""
        return [each.version for each in self._versions_or_none()]

    def fetch_same(self, fingerprint: str) -> Dataset | None:
        """The newest version with this fingerprint; None when there is none, or it can't be had."""
        for each in reversed(self._versions_or_none()):
            if each.is_complete and each.metadata.get("fingerprint") == fingerprint:
                try:
                    return self.fetch(each.version, fingerprint=fingerprint)
                except CapfinderError as error:
                    self._warn(error)
        return None

    def fetch_latest(self) -> Dataset | None:
        """The newest version; None when there is none, or Comet is lost.

        Raises: InputError when it isn't a dataset, or isn't whole."""
        complete = [each for each in self._versions_or_none() if each.is_complete]
        ours = [each for each in complete if "fingerprint" in each.metadata]
        if not complete:
            return None
        newest = (ours or complete)[-1]  # of another program's alone: an error says what they are
        passed = [each.version for each in complete[complete.index(newest) + 1 :]]
        if passed:
            logger.warning(
                "%s %s: passed over, as they weren't written by this program",
                self._store.name,
                ", ".join(passed),
            )
        local = versions.list_versions(self._root)
        if local and versions.version_key(local[-1]) > versions.version_key(newest.version):
            logger.warning(
                "The local version %s is newer than the newest in Comet, which is used: %s",
                local[-1],
                newest.version,
            )
        try:
            return self.fetch(newest.version)
        except CometError as error:
            self._warn(error)
            return None

    def fetch_named(self, wanted: str) -> Dataset:
        """The version of this number, or of this alias.

        Raises: InputError when there is none or it isn't whole; CometError."""
        for each in self.versions():
            if wanted == each.version or wanted in each.aliases:
                if not each.is_complete:
                    raise InputError(
                        f"{SETTING}={wanted}: the upload of {self._store.label(each.version)} was "
                        "never finished. Name another version."
                    )
                return self.fetch(each.version)
        there = ", ".join(each.version for each in self.versions()) or "none"
        here = ", ".join(versions.list_versions(self._root)) or "none"
        raise InputError(
            f"{SETTING}={wanted}: no such version in {self._root} (there: {here}), nor in Comet "
            f"workspace {self._store.workspace} (there: {there})"
        )

    def fetch(self, version: str, *, fingerprint: str | None = None) -> Dataset:
        """Version X.Y.Z into root/X.Y.Z, or the one that is there already, if it is the same.

        fingerprint: what it must have, where the caller knows.

        Raises: InputError when a different one is there, or anything in the artifact isn't what
        its index and manifest say; CometError."""
        where = self._store.label(version)
        stored = self._store.files(version)
        artifact_index.check_format(stored, where)
        data = self._store.read(stored[INDEX], limit=artifact_index.MAX_INDEX_BYTES)
        index = artifact_index.parse_index(data, where)
        index.check_names(stored, where)
        if index.version != version:
            raise InputError(f"{where}: holds version {index.version}. Name another version.")
        if fingerprint not in (None, index.fingerprint):
            raise InputError(f"{where}: holds another dataset than its metadata says")
        there = versions.named(self._root, version)
        if there is not None:
            if there.fingerprint != index.fingerprint:
                raise InputError(
                    f"{there.directory} has fingerprint {there.fingerprint}, {where} has "
                    f"{index.fingerprint}: two datasets of one number. Rename or remove the "
                    f"local one, or set {SETTING}="
                )
            return there
        self._root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=files.PARTIAL, dir=self._root) as scratch,
            log.progress_bytes(f"Fetching {version}", total=index.chunk_bytes) as bar,
        ):
            path = Path(scratch) / "chunk"

            def download(chunk: Entry) -> Path:
                if stored[chunk.name].size != chunk.size:
                    raise InputError(f"{where}: {chunk.name} is damaged (its size differs)")
                self._store.download(stored[chunk.name], path, bar.advance)
                return path

            return artifacts.unpack(index, download, self._root, where)

    def upload(self, dataset: Dataset, tracker: Tracker) -> str | None:
        """Sends the version as part of the tracker's run and waits until it is whole there.

        Returns what it's called there; with a warning "" when its number is taken for good, None
        when it could not be sent this time. The local version is what counts."""
        try:
            self._listed = None
            taken = {each.version: each for each in self.versions()}.get(dataset.version)
            label = self._store.label(dataset.version)
            if taken is not None:
                problem = ""
                if not taken.is_complete:
                    problem = "an upload that was never finished has this number"
                elif taken.metadata.get("fingerprint") != dataset.fingerprint:
                    problem = "is there already, with another content"
                if problem:
                    logger.warning("%s: %s. The dataset stays local.", label, problem)
                    return ""
                return label
            with _upload_lock(self._root):
                return self._send(dataset, tracker)
        except (CapfinderError, OSError) as error:
            logger.warning("%s. The dataset was not uploaded; it stays local.", _plain(error))
            return None

    def _send(self, dataset: Dataset, tracker: Tracker) -> str | None:
        scratch = _scratch(self._root)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            paths = artifacts.pack(dataset, scratch, chunk_bytes=artifacts.CHUNK_BYTES)
            if not tracker.log_artifact(
                self._store.name,
                kind="dataset",
                version=dataset.version,
                metadata=_metadata(dataset),
                paths=paths,
            ):
                raise CometError("Comet: the run isn't online")
            sizes = {path.name: path.stat().st_size for path in paths}
            total = sum(sizes.values())
            with log.progress_bytes(f"Uploading {dataset.version}", total=total) as bar:
                self._store.wait_until_stored(dataset.version, sizes, bar.advance)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        label = self._store.label(dataset.version)
        logger.info("%s: uploaded", label)
        return label

    def _versions_or_none(self) -> list[StoredVersion]:
        if not self._is_lost:
            try:
                return self.versions()
            except CometError as error:
                self._warn(error)
                self._is_lost = True
        return []

    def _warn(self, error: CapfinderError) -> None:
        logger.warning("%s. The run goes on with what is local.", _plain(error))


def connect(config: ConfigDict, root: Path) -> Remote | None:
    """None when the settings or the lack of an API key rule Comet out; asks nothing yet.

    Imports Comet's client, which takes some seconds: only when the local versions won't do."""
    if config.tracking_params.mode in ("off", "offline") or not _wanted(config):
        return None
    store = ArtifactStore.open(DATASET_NAME)
    return None if store is None else Remote(store, root)


def required(config: ConfigDict, root: Path) -> Remote:
    """For a version that must be fetched. Raises: SettingsError that says how to set the key."""
    remote = connect(config, root)
    if remote is not None:
        return remote
    mode = config.tracking_params.mode
    local = ", ".join(versions.list_versions(root)) or "none"
    reason = (
        f"tracking_params.mode={mode} never asks Comet. Use mode=auto"
        if mode in ("off", "offline")
        else NO_KEY
    )
    raise SettingsError(
        f"{SETTING}={_wanted(config)}: no such version in {root} (there: {local}), and {reason}, "
        "or name a local version."
    )


def clear_upload(root: Path) -> None:
    """Removes what a killed upload left, unless one is running."""
    if _scratch(root).exists():
        with contextlib.suppress(InputError), _upload_lock(root):
            shutil.rmtree(_scratch(root), ignore_errors=True)


def _scratch(root: Path) -> Path:
    """Not in `root`, which a run that fetches or builds clears of what dead writers left."""
    return root.parent / "upload"


def _upload_lock(root: Path) -> contextlib.AbstractContextManager[None]:
    return files.exclusive_lock(root.parent / ".upload.lock", holder="another upload")


def _metadata(dataset: Dataset) -> dict[str, object]:
    manifest = dataset.manifest
    kept = ("num_classes", "target_length", "dtype", "code_version")
    return {"task": TASK, "fingerprint": dataset.fingerprint} | {
        key: manifest[key] for key in kept if key in manifest
    }


def _wanted(config: ConfigDict) -> str:
    return str(config.etl_params.use_remote_dataset_version)


def _is_number(version: str) -> bool:
    try:
        versions.version_key(version)
    except ValueError:
        return False
    return True


def _plain(error: Exception) -> str:
    return str(error).rstrip(".")
