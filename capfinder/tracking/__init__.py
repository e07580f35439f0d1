"""Comet: what a run logs (`Tracker`) and the dataset versions kept there (`ArtifactStore`).

The client is imported in `client` alone, and only when something is to be asked or sent."""

from capfinder.tracking.client import NO_KEY, CometError
from capfinder.tracking.sender import upload_command
from capfinder.tracking.store import ArtifactStore, StoredFile, StoredVersion
from capfinder.tracking.tracker import Tracker, check, start

__all__ = [
    "NO_KEY",
    "ArtifactStore",
    "CometError",
    "StoredFile",
    "StoredVersion",
    "Tracker",
    "check",
    "start",
    "upload_command",
]
