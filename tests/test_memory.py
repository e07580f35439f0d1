import ctypes
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_architecture

from capfinder import models, settings
from capfinder.log import format_bytes
from capfinder.stages import assembly, memory
from capfinder.training import schedules
from capfinder.training.accumulate import MIN_MICROBATCH
from capfinder.training.step import train_step

GIB = 2**30


# What there is


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal: {2**26} kB\nMemFree: 1 kB\nMemAvailable: {2**24} kB\n"}


def group(path: str, limit: str, usage: int, names: tuple[str, str], prefix: str = "") -> dict:
    stat = f"{prefix}active_file {GIB}\n{prefix}inactive_file {GIB}\n{prefix}anon 5\n"
    if prefix:
        stat += "active_file 7\n"  # of the group alone, without those in it
    return {
        f"{path}/{names[0]}": limit,
        f"{path}/{names[1]}": str(usage),
        f"{path}/memory.stat": stat,
    }


SECOND = ("memory.max", "memory.current")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16 * GIB),
        (
            {"proc/self/cgroup": "0::/job\n"}
            | group("sys/fs/cgroup/job", str(8 * GIB), 5 * GIB, SECOND),
            5 * GIB,  # 3 and what caches files
        ),
        (  # the group around it has the limit
            {"proc/self/cgroup": "0::/slice/job\n"}
            | group("sys/fs/cgroup/slice/job", "max", 5 * GIB, SECOND)
            | group("sys/fs/cgroup/slice", str(8 * GIB), 7 * GIB, SECOND),
            3 * GIB,
        ),
        (  # a container sees its own group as the top
            {"proc/self/cgroup": "0::/outside/the/container\n"}
            | group("sys/fs/cgroup", str(4 * GIB), 4 * GIB, SECOND),
            2 * GIB,
        ),
        (
            {"proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/job\n0::/\n"}
            | group("sys/fs/cgroup/memory/job", str(6 * GIB), 5 * GIB, FIRST, "total_")
            | group("sys/fs/cgroup/memory", str(2**63 - 4096), 5 * GIB, FIRST, "total_"),
            3 * GIB,
        ),
        (  # more than the machine has
            {"proc/self/cgroup": "0::/job\n"}
            | group("sys/fs/cgroup/job", str(80 * GIB), 5 * GIB, SECOND),
            16 * GIB,
        ),
    ],
    ids=["machine", "v2", "parent", "container", "v1", "larger"],
)
def test_the_host_s_memory_ends_at_the_machine_s_and_every_group_s_limit(
    tmp_path, files, expected, monkeypatch
):
    monkeypatch.setattr(memory, "_freed_bytes", lambda: 0)
    root = write(tmp_path, MACHINE | files)
    assert memory.host_bytes(root) == expected
    monkeypatch.setattr(memory, "_freed_bytes", lambda: 3)
    assert memory.host_bytes(root) == expected + 3


def test_what_the_c_library_holds_for_the_next_allocations_counts_as_free():
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        assert memory._freed_bytes() == 0
        pytest.skip("only glibc from 2.33 on tells")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    size, count = 2**16, 256  # below what glibc maps, and gives back, on its own
    blocks = [library.malloc(size) for _ in range(count)]
    last = library.malloc(size)  # else the heap would end before the blocks
    before = memory._freed_bytes()
    for block in blocks:
        library.free(block)
    assert memory._freed_bytes() - before > 0.9 * count * size
    library.free(last)


def test_where_nothing_tells_nothing_is_known(tmp_path):
    assert memory.host_bytes(tmp_path) is None


def test_the_memory_of_this_machine_is_known():
    assert 2**20 < memory.available_bytes() < 2**50


# What a step needs


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "cnn_lstm", "tiny_architecture")


HYPERPARAMETERS = tiny_architecture.Hyperparameters(units=(64, 64, 64))


def configured(**changes):
    values = {"shared_params.target_length": 32, "shared_params.num_classes": 3}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return settings.checked(settings.default_config(), values | changes)


def test_growth_foretells_what_the_compiler_plans_for_a_large_batch():
    config, rows = configured(), 2048
    growth = memory.step_growth(config, HYPERPARAMETERS)
    state = assembly.initial_state(config, HYPERPARAMETERS, schedules.optimizer(1e-3), seed=0)
    batch = {"signal": np.ones((rows, 32, 1), np.float32), "cap_class": np.ones(rows, np.int32)}
    compiled = jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()
    planned = compiled.memory_analysis()
    whole = planned.temp_size_in_bytes + batch["signal"].nbytes + batch["cap_class"].nbytes
    assert growth.bytes(rows) == pytest.approx(whole, rel=0.15)
    assert growth.rows(growth.bytes(rows)) == pytest.approx(rows, abs=1)


@pytest.mark.parametrize(
    ("rows", "expected"), [(937, 896), (100, 96), (64, 64), (9, 8), (7, 7), (1, 1), (0, 0)]
)
def test_sizes_are_rounded_down_to_three_binary_digits(rows, expected):
    assert memory.rounded_down(rows) == expected


# What is said


def exhausted() -> BaseException:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jnp.zeros((2**46,), jnp.float32).block_until_ready()
    return caught.value


def test_both_kinds_of_failed_allocation_get_a_size_that_fits(monkeypatch):
    config = configured(shared_params__batch_size=4096)
    growth = memory.step_growth(config, HYPERPARAMETERS)
    whole_batch = memory.BATCH_COPIES * 4096 * 32 * 4
    available = int((growth.bytes(700) + whole_batch) / memory.USABLE) + 10
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    for error in (exhausted(), MemoryError("a step needs 3 bytes")):
        text = memory.reason(error, config, HYPERPARAMETERS)
        assert "out of memory: a step of 4,096 reads needs about" in text
        part, whole = (int(size) for size in re.findall(r"--config\.\w+\.\w+=(\d+)", text))
        assert part == 640  # 700, rounded down
        assert part < whole and growth.bytes(whole) <= memory.USABLE * available < 2 * growth.bytes(
            whole
        )
        assert f"--config.runtime_params.microbatch={part}" in text
        assert f"--config.shared_params.batch_size={whole}" in text
        assert "\n" not in text


def test_a_microbatch_is_not_advised_where_the_batch_itself_is_too_large(monkeypatch):
    config = configured(shared_params__batch_size=10**9)
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB)
    text = memory.reason(MemoryError(), config, HYPERPARAMETERS)
    assert "microbatch" not in text and "--config.shared_params.batch_size=" in text


def test_where_the_estimate_says_it_fits_half_of_what_failed_is_to_be_tried(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB)
    config = configured(shared_params__batch_size=4096, runtime_params__microbatch=64)
    text = memory.reason(MemoryError(), config, HYPERPARAMETERS)
    assert "more was needed than foretold (a step of 64 reads needs about" in text
    assert "would fit" not in text and "Try half: --config.runtime_params.microbatch=32 " in text


def test_a_microbatch_that_the_settings_refuse_is_not_advised(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB)

    def advised(microbatch: int) -> list[str]:
        config = configured(shared_params__batch_size=4096, runtime_params__microbatch=microbatch)
        return re.findall(r"--config\S+", memory.reason(MemoryError(), config, HYPERPARAMETERS))

    least = MIN_MICROBATCH
    assert f"--config.runtime_params.microbatch={least}" in advised(2 * least)
    assert advised(2 * least - 1) == [f"--config.shared_params.batch_size={least - 1}"]


def test_a_batch_that_devices_share_is_foretold_and_divided_for_each():
    growth = memory.Growth(fixed=1000, per_read=1000, signal_bytes=100)
    # 80 reads and, three times, all of the device's 512; or 233 reads: rounded down, 224
    available = int((1000 + 80 * 1000 + 3 * 512 * 100) / memory.USABLE) + 10
    text = memory._advice(growth, available, 4096, None, 8)
    assert f"needs about {format_bytes(513_000)} on each of 8 devices" in text
    assert f"microbatch={8 * 80} " in text and text.endswith(f"batch_size={8 * 224}")
    assert "more was needed than foretold" in memory._advice(growth, 514_000, 4096, None, 8)
    assert "more was needed" not in memory._advice(growth, 514_000, 4096, None, 1)


def test_a_model_too_large_for_one_read_is_named_as_the_trouble(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    text = memory.reason(MemoryError(), configured(), HYPERPARAMETERS)
    assert "choose a smaller model" in text


def test_without_any_figure_the_settings_to_lower_are_named(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    text = memory.reason(MemoryError(), configured(), HYPERPARAMETERS)
    assert "shared_params.batch_size (32 now)" in text


@pytest.mark.parametrize("error", [ValueError("memory"), jax.errors.JaxRuntimeError("INTERNAL")])
def test_other_errors_are_not_taken_for_it(error):
    assert memory.reason(error, configured(), HYPERPARAMETERS) is None


LIMITED = """
import resource, sys
import jax, numpy as np
import tiny_architecture
from tiny_training import CONSTANT, ADAM, validation
from capfinder import models, settings
from capfinder.memory import keep_freed
from capfinder.stages import assembly, memory
from capfinder.training import loop

models.ARCHITECTURES["cnn_lstm"] = "tiny_architecture"
changes = {"shared_params.target_length": 32, "shared_params.num_classes": 3,
           "shared_params.batch_size": 2**18}
config = settings.checked(settings.default_config(), changes)
hyperparameters = tiny_architecture.Hyperparameters(units=(256, 256))
keep_freed()  # as every command does


class Batches:
    steps_per_epoch, resident = 1, ()

    def __init__(self, size):
        self.size = size

    @staticmethod
    def materialise(resident, piece):
        return piece

    def pieces(self, epoch, start_step=0, *, size=1):
        rows = np.ones((1, self.size, 32, 1), np.float32)
        yield {"signal": rows, "cap_class": np.ones((1, self.size), np.int32)}


def train(size, microbatch=None, available_bytes=memory.available_bytes):
    checked = [{"signal": np.ones((8, 32, 1), np.float32), "cap_class": np.ones(8, np.int32),
                "weight": np.ones(8, np.float32)}]
    state = assembly.initial_state(config, hyperparameters, ADAM, seed=0)
    result = loop.fit(state, train_batches=Batches(size), validation_batches=checked,
                      schedule=CONSTANT, max_epochs=1, patience=9, checkpoints=None,
                      interrupted=bool, on_step=bool, on_epoch=bool, microbatch=microbatch,
                      available_bytes=available_bytes)
    return int(result.state.step)


def failure(**arguments):
    try:
        train(config.shared_params.batch_size, **arguments)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        return error


print(train(8))
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 3 * 2**29, -1))
if sys.argv[1:]:
    size, microbatch = (int(argument) for argument in sys.argv[1:])
    print(train(size, microbatch or None))
else:
    foreseen, met = failure(), failure(available_bytes=None)
    print(type(foreseen).__name__, type(met).__name__)
    print(memory.reason(met, config, hyperparameters))
"""


def limited(*arguments: int) -> list[str]:
    """A real limit of the address space, as batch systems set it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_under_a_limit_the_step_is_refused_before_it_fails_and_the_advice_is_good():
    first, kinds, text = limited()
    assert (first, kinds) == ("1", "MemoryError JaxRuntimeError")
    assert "out of memory: a step of 262,144 reads needs about" in text
    _, size = re.findall(r"--config\.\w+\.\w+=(\d+)", text)
    assert limited(int(size), 0) == ["1", "1"]
