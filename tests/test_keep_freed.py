import gc
import subprocess
import sys

import pytest

from capfinder import cli, memory
from capfinder.commands import training

PROGRAM = """
import ctypes, resource, sys
from capfinder import memory
if sys.argv[1] == "kept":
    assert memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def use():
    block = libc.malloc(200 << 20)
    ctypes.memset(block, 1, 200 << 20)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_is_freed_and_taken_again_isnt_cleared_by_the_system_anew():
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", PROGRAM, how]))
        for how in ("kept", "as it is")
    }
    assert faults["kept"] < 100
    assert faults["as it is"] > 20 * max(1, faults["kept"])


def test_a_command_has_objects_collected_rarely_and_leaves_python_as_it_was(monkeypatch):
    before, within = gc.get_threshold(), []
    monkeypatch.setattr(training, "launch", lambda arguments: within.append(gc.get_threshold()))
    assert cli.launch([]) == 0
    assert within == [(memory.NEW_OBJECTS, *before[1:])] and within[0] > before
    assert gc.get_threshold() == before
