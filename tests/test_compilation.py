"""What is compiled, and how often: counted by JAX itself in real, tiny trainings."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_architecture
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from tiny_training import Batches, run_fit, tiny_state

from capfinder import models, settings
from capfinder.stages import assembly
from capfinder.training.schedules import learning_rate_of, optimizer

COMPILED = "/jax/core/compile/backend_compile_duration"
STEPS = ("jit(chunk)", "jit(_evaluate_and_add)")


@pytest.fixture
def compiled() -> Iterator[Counter[str]]:
    """How often each function was compiled (or fetched from the disk) since the test began."""
    counts: Counter[str] = Counter()

    def note(event: str, seconds: float, **about: Any) -> None:
        if event == COMPILED:
            counts[str(about["fun_name"])] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    yield counts
    jax.monitoring.unregister_event_duration_listener(note)


def of_steps(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in STEPS}


def test_steps_are_compiled_once_and_nothing_is_compiled_after_the_first_epochs(compiled):
    after_epoch = []
    run_fit(
        train_batches=Batches(3),
        max_epochs=4,
        on_epoch=lambda row: after_epoch.append(compiled.total()),
    )
    assert of_steps(compiled) == dict.fromkeys(STEPS, 1)
    assert after_epoch[1] == after_epoch[2] == after_epoch[3]


def test_another_learning_rate_is_another_start_of_the_same_programs(compiled):
    run_fit(tiny_state(tx=optimizer(0.1)), max_epochs=1)
    before = compiled.total()
    fitted = run_fit(tiny_state(tx=optimizer(0.01)), max_epochs=1)
    assert of_steps(compiled) == dict.fromkeys(STEPS, 1)
    assert compiled.total() == before
    assert fitted.history[0]["learning_rate"] == pytest.approx(0.01)


def test_trials_of_one_shape_share_module_and_program(compiled, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "cnn_lstm", "tiny_architecture")
    config = settings.checked(
        settings.default_config(),
        {"shared_params.target_length": 16, "shared_params.dtype": "float32"},
    )
    assembly._creator.cache_clear()
    states = [
        assembly.initial_state(
            config, tiny_architecture.Hyperparameters(learning_rate=rate), optimizer(rate), seed=3
        )
        for rate in (1e-2, 1e-3)
    ]
    assert compiled["jit(create)"] == 1
    assert [float(learning_rate_of(state.opt_state)) for state in states] == pytest.approx(
        [1e-2, 1e-3]
    )
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    wider = tiny_architecture.Hyperparameters(units=(9,))
    assembly.initial_state(config, wider, optimizer(1e-2), seed=3)
    assert compiled["jit(create)"] == 2


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[ConfigDict]:
    """Settings with a directory of their own for compiled programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield settings.checked(
        settings.default_config(), {"runtime_params.compilation_cache_dir": str(tmp_path)}
    )
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_whose_writer_was_killed_are_compiled_and_kept_anew(own_cache, tmp_path):
    """JAX would warn, which is an error here, and compile them in every run from then on."""

    def compile_with(number: float) -> set[Path]:
        assembly.configure_jax(own_cache)
        compilation_cache.reset_cache()
        jax.clear_caches()
        jax.jit(lambda x: x * number + 1)(np.ones(3, np.float32)).block_until_ready()
        return set(tmp_path.glob("*-cache"))

    first = compile_with(1.5)
    for entry in first:
        entry.write_bytes(entry.read_bytes()[:50])
        entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    assert compile_with(2.5) and first <= compile_with(1.5)
    assert all(entry.stat().st_size > 50 for entry in first)
