"""A small Comet on loopback: what the real client asks when it logs a run or an artifact.

Paths, parameters and answers are those in the client's source (comet_ml 3.58: connection_api,
artifact_logger, logged_artifact) and its documentation. Not here, as the client talks to it only
where the service offers it: direct transfer of parts to an object store, and throttling."""

import json
import threading
import uuid
from dataclasses import dataclass, field
from email import message_from_bytes
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WORKSPACE = "lab"
REST = "/api/rest/v2/"


@dataclass
class Version:
    """One version of an artifact; `files`: name -> (asset id, bytes)."""

    version: str
    metadata: Any
    state: str = "OPEN"
    aliases: list[str] = field(default_factory=list)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Refused(Exception):
    """Answered with `status` and the client's form of an error."""

    def __init__(self, status: int, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Server:
    """`requests`: (path with query, body); `artifacts`: name -> its versions, oldest first.

    status: of every answer but the first contact; fail: called with each path, may raise
    Refused or sleep; tamper: called with file name and bytes of a download, returns what to send.
    """

    def __init__(self, *, status: int = 200) -> None:
        self.requests: list[tuple[str, bytes]] = []
        self.artifacts: dict[str, list[Version]] = {}
        self.status = status
        self.fail: Any = lambda path: None
        self.tamper: Any = lambda name, data: data
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with server._lock:
                    server.requests.append((self.path, body))
                kind = "application/json"
                status = 200 if self.path.endswith("clientlib/") else server.status
                try:
                    server.fail(self.path)
                    url = urlsplit(self.path)
                    query = {name: values[0] for name, values in parse_qs(url.query).items()}
                    reply = server.reply(url.path, query, self.headers, body)
                except Refused as error:
                    status = error.status
                    reply = {"msg": error.message, "sdk_error_code": error.code}
                announced = None
                if isinstance(reply, tuple):
                    kind = "application/octet-stream"
                    reply, announced = reply
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(announced or len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.root = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"{self.root}/clientlib/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def saw(self, part: str) -> bool:
        return any(part in path for path, _ in self.requests)

    def add(self, name: str, version: Version, files: dict[str, bytes]) -> Version:
        version.files = {file: (uuid.uuid4().hex, data) for file, data in files.items()}
        self.artifacts.setdefault(name, []).append(version)
        return version

    def reply(self, path: str, query: dict[str, str], headers: Any, body: bytes) -> Any:
        if path.startswith(REST):
            handler = getattr(
                self, "_" + path.removeprefix(REST).replace("/", "_").replace("-", "_"), None
            )
            if handler is not None:
                return handler(json.loads(body) if body else query)
        if "artifactVersionId" in query:
            return self._upload(query, headers, body)
        return {
            "msg": "ok",
            "version": "4.40.0",
            "runId": "run",
            "project_id": "project",
            "workspaceName": WORKSPACE,
            "focusUrl": "http://comet.invalid/",
            "is_alive_beat_duration_millis": 10_000,
            "gpu_monitor_interval_millis": 60_000,
        }

    def _find(self, **wanted: str | None) -> tuple[str, Version]:
        """By id, or by name and version."""
        with self._lock:
            for name, versions in self.artifacts.items():
                for each in versions:
                    if each.id == wanted.get("id") or (name, each.version) == (
                        wanted.get("name"),
                        wanted.get("version"),
                    ):
                        return name, each
        raise Refused(400, "no such artifact version", 624523)

    def _account_details(self, query: dict[str, str]) -> Any:
        return {"userName": "ada", "defaultWorkspaceName": WORKSPACE}

    def _artifacts_get_all(self, query: dict[str, str]) -> Any:
        there = self.artifacts if query["workspace"] == WORKSPACE else {}
        return {"artifacts": [{"artifactId": name, "name": name} for name in there]}

    def _artifacts_get(self, query: dict[str, str]) -> Any:
        name = unquote(query["artifactName"])
        if name not in self.artifacts or query["workspace"] != WORKSPACE:
            raise Refused(400, "artifact not found", 624523)
        versions = [
            {
                "artifactVersionId": each.id,
                "version": each.version,
                "owner": "ada",
                "metadata": each.metadata,
                "state": each.state,
                "added": 1621948911721,
                "alias": each.aliases,
                "tags": [],
                "sizeInBytes": sum(len(data) for _, data in each.files.values()),
            }
            for each in self.artifacts[name]
        ]
        return {"artifactId": name, "name": name, "type": "dataset", "versions": versions}

    def _artifacts_version(self, query: dict[str, str]) -> Any:
        name, found = self._find(
            id=query.get("versionId"),
            name=unquote(query.get("artifactName", "")),
            version=query.get("version"),
        )
        if "versionId" not in query and found.state != "CLOSED":
            raise Refused(400, "artifact version isn't final", 90402)
        return {
            "artifact": {
                "artifactId": name,
                "artifactName": name,
                "artifactType": "dataset",
                "tags": [],
                "workspaceName": WORKSPACE,
            },
            "artifactVersionId": found.id,
            "artifactVersion": found.version,
            "metadata": found.metadata,
            "alias": found.aliases,
            "tags": [],
            "sizeInBytes": 0,
            "experimentKey": "run",
        }

    def _artifacts_version_files(self, query: dict[str, str]) -> Any:
        _, found = self._find(name=unquote(query["artifactName"]), version=query["version"])
        return {
            "files": [
                {
                    "artifactId": "a",
                    "artifactVersionId": found.id,
                    "assetId": asset_id,
                    "fileName": name,
                    "fileSize": len(data),
                    "link": None,
                    "remote": False,
                    "metadata": None,
                    "type": "asset",
                }
                for name, (asset_id, data) in found.files.items()
            ]
        }

    def _write_artifacts_upsert(self, sent: dict[str, Any]) -> Any:
        with self._lock:
            versions = self.artifacts.setdefault(sent["artifactName"], [])
            if any(each.version == sent["version"] for each in versions):
                raise Refused(400, f"version {sent['version']} exists already", 90401)
            new = Version(sent["version"], sent["versionMetadata"], aliases=sent["alias"])
            previous = versions[-1].version if versions else None
            versions.append(new)
        return {
            "artifactId": sent["artifactName"],
            "artifactVersionId": new.id,
            "currentVersion": new.version,
            "previousVersion": previous,
        }

    def _write_artifacts_state(self, sent: dict[str, Any]) -> Any:
        self._find(id=sent["artifactVersionId"])[1].state = sent["state"]
        return {"msg": "ok"}

    def _experiment_asset_get_asset(self, query: dict[str, str]) -> Any:
        _, found = self._find(id=query["artifactVersionId"])
        for name, (asset_id, data) in found.files.items():
            if asset_id == query["assetId"]:
                return self.tamper(name, data), len(data)
        raise Refused(404, "no such asset")

    def _upload(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        """A file of an artifact, as multipart/form-data."""
        head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
        parts = message_from_bytes(head + body, policy=HTTP).iter_parts()
        (data,) = (
            part.get_payload(decode=True)
            for part in parts
            if part.get_param("name", header="content-disposition") == "file"
        )
        _, found = self._find(id=query["artifactVersionId"])
        with self._lock:
            found.files[query["fileName"]] = (query.get("assetId", uuid.uuid4().hex), data)
        return {"msg": "ok"}
