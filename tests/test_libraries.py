import os
import subprocess
import sys

import pytest

from capfinder import libraries


def test_a_module_is_loaded_when_something_of_it_is_first_used(tmp_path, monkeypatch):
    (tmp_path / "slow_library.py").write_text("import sys\nsys.loaded_slowly = True\nanswer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "loaded_slowly", False, raising=False)
    module = libraries.lazily("slow_library")
    try:
        assert not sys.loaded_slowly
        assert module.answer == 42 and sys.loaded_slowly
        assert libraries.lazily("slow_library") is module
    finally:
        del sys.modules["slow_library"]


def test_a_module_that_is_not_there_is_missed_at_once():
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        libraries.lazily("no_such_library")


def test_onnx_runtime_reports_nothing(tmp_path):
    """What it would report it keeps in the user's cache first."""
    given = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "CI")}
    given |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    code = "from capfinder import libraries; libraries.onnxruntime()"
    subprocess.run([sys.executable, "-c", code], env=given, check=True)
    assert list(tmp_path.rglob("*")) == []
