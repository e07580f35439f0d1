"""The versions of one artifact in the user's Comet workspace: listed, read, waited for.

What the service's own documentation and the client's source say is what this relies on; a test
server on loopback stands for the service, direct transfers to its object store excepted."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfinder.tracking import client
from capfinder.tracking.client import CometError

ATTEMPTS = 3  # to download a file
RETRY_SECONDS = 2.0
POLL_SECONDS = 2.0
STALL_SECONDS = 3600.0  # an upload of which no file arrives for so long is given up
CLOSE_SECONDS = 300.0  # the same once all of them are there
BLOCK_BYTES = 2**20
NOT_FINAL = (90402, 90403)  # the server's codes for a version that is still written, or failed
FAILED = "ERROR"  # a version's state, as the client sets it
UNFINISHED = ("OPEN", "PENDING", FAILED)


@dataclass(frozen=True)
class StoredVersion:
    """`metadata`: as it was given; `is_complete`: not known to be unfinished or failed."""

    version: str
    metadata: Mapping[str, Any]
    aliases: tuple[str, ...]
    is_complete: bool


@dataclass(frozen=True)
class StoredFile:
    """A file of a version: its name in it, its size in bytes, and the server's ids."""

    name: str
    size: int
    asset_id: str
    version_id: str


class ArtifactStore:
    """What is kept under one name. Every method raises CometError alone, without the API key."""

    def __init__(self, name: str, *, key: str, workspace: str | None) -> None:
        self.name = name
        self._key, self._workspace = key, workspace
        self._rest = client.rest_client(key)

    @classmethod
    def open(cls, name: str) -> "ArtifactStore | None":
        """None without an API key; nothing is asked yet. Imports the client (some seconds)."""
        comet = client.import_client()
        key = client.api_key(comet)
        if not key:
            return None
        return cls(name, key=key, workspace=comet.get_config()["comet.workspace"])

    @property
    def workspace(self) -> str:
        """COMET_WORKSPACE, or the user's own."""
        if not self._workspace:
            with self._asking("the name of your workspace"):
                self._workspace = str(self._rest.get_account_details()["defaultWorkspaceName"])
        return self._workspace

    def label(self, version: str) -> str:
        return f"Comet artifact {self.workspace}/{self.name}:{version}"

    def check_reachable(self) -> None:
        """Raises: CometError after PROBE_SECONDS, where the client itself would try for long."""
        url = client.address(client.import_client())
        if not client.is_reachable(url):
            raise CometError(f"Comet: no answer from {url} in {client.PROBE_SECONDS:g} s")

    def versions(self) -> list[StoredVersion]:
        """All of them, in the server's order; none when there is no such artifact."""
        with self._asking(f"the versions of {self.name}"):
            try:
                found = self._rest.get_artifact_details(workspace=self.workspace, name=self.name)
            except Exception:
                if self._is_absent():
                    return []
                raise
            return [_version(value) for value in found["versions"]]

    def files(self, version: str) -> dict[str, StoredFile]:
        """By name. Raises: CometError also when one is a link to somewhere else."""
        with self._asking(f"the files of {self.name} {version}"):
            found = self._rest.get_artifact_files(
                workspace=self.workspace, name=self.name, version=version
            )
            values = [_file(value) for value in found["files"]]
        by_name = {value.name: value for value in values}
        if len(by_name) < len(values):
            raise CometError(f"{self.label(version)}: has two files of one name")
        return by_name

    def read(self, file: StoredFile, *, limit: int) -> bytes:
        """A small file. Raises: CometError when it has more than `limit` bytes."""
        if file.size > limit:
            raise CometError(f"Comet: {file.name} has {file.size:,} bytes, {limit:,} at most")
        parts: list[bytes] = []
        self._with_retries(file, parts.append, parts.clear)
        return b"".join(parts)

    def download(self, file: StoredFile, path: Path, advance: Callable[[int], None]) -> None:
        """Writes `path`; tries again where the network fails. advance: called with bytes written,
        negative when they are thrown away."""
        with path.open("wb") as out:

            def write(block: bytes) -> None:
                out.write(block)
                advance(len(block))

            def start_again() -> None:
                advance(-out.tell())
                out.seek(0)  # what is written again is no shorter

            self._with_retries(file, write, start_again)

    def wait_until_stored(
        self, version: str, sizes: Mapping[str, int], advance: Callable[[int], None]
    ) -> None:
        """Returns once the server has closed the version with all files at these sizes in bytes;
        only then may they be deleted. advance: called with the bytes that have arrived.

        Raises: CometError when the upload failed, or nothing arrives for STALL_SECONDS."""
        arrived: set[str] = set()
        last_news = time.monotonic()
        while True:
            listed: dict[str, int] = {}
            is_final, has_failed = False, False
            with suppress(CometError):  # a network that comes back
                is_final, has_failed = self._state(version)
                listed = {file.name: file.size for file in self.files(version).values()}
            if has_failed:
                raise CometError(f"{self.label(version)}: a file could not be uploaded")
            if not listed.items() <= sizes.items():
                raise CometError(f"{self.label(version)}: isn't what was sent there")
            for name in listed.keys() - arrived:
                arrived.add(name)
                advance(listed[name])
                last_news = time.monotonic()
            is_whole = len(arrived) == len(sizes)
            if is_final and is_whole:
                return
            limit = CLOSE_SECONDS if is_whole else STALL_SECONDS
            if time.monotonic() - last_news > limit:
                what = "not closed" if is_whole else "nothing arrived"
                raise CometError(f"{self.label(version)}: {what} for {limit:g} s")
            time.sleep(POLL_SECONDS)

    def _state(self, version: str) -> tuple[bool, bool]:
        """Whether the version is final, and whether it has failed."""
        with self._asking(f"the state of {self.name} {version}"):
            try:
                self._rest.get_artifact_version_details(
                    workspace=self.workspace, name=self.name, version=version
                )
                return True, False
            except Exception as error:
                if getattr(error, "sdk_error_code", None) not in NOT_FINAL:
                    raise
            details = self._rest.get_artifact_details(workspace=self.workspace, name=self.name)
            states = {value["version"]: value.get("state") for value in details["versions"]}
            return False, states.get(version) == FAILED

    def _is_absent(self) -> bool:
        with suppress(Exception):
            found = self._rest.get_artifact_list(self.workspace)["artifacts"]
            return self.name not in {
                value.get("name", value.get("artifactName")) for value in found
            }
        return False

    def _with_retries(
        self, file: StoredFile, write: Callable[[bytes], Any], start_again: Callable[[], None]
    ) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._asking(f"{file.name} of {self.name}"):
                    self._stream(file, write)
                return
            except CometError:
                if attempt == ATTEMPTS:
                    raise
                start_again()
                time.sleep(RETRY_SECONDS * attempt)

    def _stream(self, file: StoredFile, write: Callable[[bytes], Any]) -> None:
        response = self._rest.get_experiment_asset(
            asset_id=file.asset_id,
            experiment_key="",
            artifact_version_id=file.version_id,
            return_type="response",
            stream=True,
        )
        with response:
            left = file.size
            for block in response.iter_content(BLOCK_BYTES):
                left -= len(block)
                if left < 0:
                    raise ValueError(f"more than the {file.size:,} bytes it should have")
                write(block)
            if left:
                raise ValueError(f"{left:,} of {file.size:,} bytes are missing")

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Whatever the client, the network or an unknown answer raises, as one line."""
        try:
            yield
        except CometError:
            raise
        except Exception as error:
            text = client.redacted(" ".join(str(error).split()), self._key)
            raise CometError(
                f"Comet: could not get {what} ({type(error).__name__}: {text[:300]})"
            ) from None


def _version(value: Mapping[str, Any]) -> StoredVersion:
    metadata = value.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    return StoredVersion(
        version=str(value["version"]),
        metadata=metadata if isinstance(metadata, Mapping) else {},
        aliases=tuple(str(alias) for alias in value.get("alias") or ()),
        is_complete=value.get("state") not in UNFINISHED,
    )


def _file(value: Mapping[str, Any]) -> StoredFile:
    if value.get("remote") or (value.get("link") and "remote" not in value):
        raise ValueError(f"{value['fileName']} is a link")
    return StoredFile(
        name=str(value["fileName"]),
        size=int(value["fileSize"]),
        asset_id=str(value["assetId"]),
        version_id=str(value["artifactVersionId"]),
    )
