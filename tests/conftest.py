"""Shared by all tests: which backend Keras has, how hard XLA tries, and what reloads exports."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm_reload
from forks import Forks
from hypothesis import settings

from capfinder import compiled

# Files of few tests that take minutes: begun last, one worker would be left alone with them.
LONG = (
    "test_command_line.py",
    "test_pipeline_kills.py",
    "test_disk_faults.py",
    "test_tune.py",
    "test_interrupts.py",
    "test_workers.py",
    "test_hosts.py",
    "test_etl_remote.py",
)

settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")

# Commands that tests run with a home of their own needn't compile the kernels again.
os.environ.setdefault("NUMBA_CACHE_DIR", str(compiled.cache_directory()))
os.environ.setdefault("KERAS_BACKEND", "jax")  # whatever the machine's keras.json says
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for tests that load it as users do
# Tests compile much and compute little: without LLVM's optimisations and XLA's newer emitters of
# fused loops that takes a quarter of the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *os.environ.get("XLA_FLAGS", "").split(),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def warm_reloads() -> Iterator[None]:
    """Exported files are reloaded in forks of one process, which is started with the first."""
    with contextlib.ExitStack() as opened:

        @functools.cache
        def address() -> Path:
            return opened.enter_context(Forks("warm_reload")).address

        with warm_reload.used(address):
            yield


@pytest.fixture
def cold_reloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are reloaded in processes that start anew, as for users."""
    monkeypatch.setattr(warm_reload.fresh_process, "_start", warm_reload.COLD)
