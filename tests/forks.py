"""Processes that needn't load their libraries, which takes ten seconds: forks of one that has.

python forks.py SOCKET MODULE: has MODULE's `load` run, then forks for each connection to SOCKET:
asked with JSON and the three standard streams, it answers with the fork's number, and with its exit
code when it is dead. The fork runs MODULE's `run` in a session of its own. No thread runs and no
device is in use before, so that it finds all as in a process of its own but for the imports. It all
ends with the server's standard input."""

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

TESTS = Path(__file__).parent
LONGEST = 2**20  # bytes of a request


class Fork:
    """As a subprocess.Popen; stdin, stdout: our ends of its pipes, where it has any."""

    stdin: IO[bytes] | None = None
    stdout: IO[bytes] | None = None

    def __init__(self, server: Path, argument: Any, streams: Sequence[int]) -> None:
        self._answers = socket.socket(socket.AF_UNIX)
        self._answers.connect(str(server))
        request = {"argument": argument, "cwd": os.getcwd()}
        socket.send_fds(self._answers, [json.dumps(request).encode()], list(streams))
        self._answers.shutdown(socket.SHUT_WR)
        self._lines = self._answers.makefile("rb", buffering=0)
        self.pid = self._answer(None)
        self._code: int | None = None

    def _answer(self, timeout: float | None) -> int:
        """Raises: subprocess.TimeoutExpired."""
        if not select.select([self._answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("fork", timeout or 0.0)
        line = self._lines.readline()
        if not line:
            raise SystemExit("the process that others are forked from has died")
        return int(line)

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = self._answer(timeout)
            self._lines.close()
            self._answers.close()
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The process to fork from; `module` lies on the path of tests."""

    def __init__(self, module: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="forks-")
        self.address = Path(self._directory.name) / "socket"
        paths = [str(TESTS.parent), str(TESTS), str(TESTS / "faults")]
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self.address), module],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # TensorFlow greets there
        )
        assert self._server.stdout is not None
        if not self._server.stdout.readline():
            raise SystemExit(f"{module} can't be loaded")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.kill()
        self._server.communicate()
        self._directory.cleanup()


def become(environment: Mapping[str, str]) -> None:
    """In the fork: another environment than the server's."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR is another


def _fork(module: Any, connection: socket.socket) -> None:
    """In a process between the server and the fork, which tells how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
    process = os.fork()
    if not process:
        connection.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        values = json.loads(request)
        os.chdir(values["cwd"])
        sys.exit(module.run(values["argument"]))
    os.closerange(0, 3)  # whose readers would wait for this process, too
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{process}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with suppress(BrokenPipeError):  # nobody waits for it
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def main(address: str, name: str) -> None:
    module = importlib.import_module(name)
    module.load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                _fork(module, connection)
            connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
