import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import Batches, assert_same, tiny_state

from capfinder.errors import InputError, StageFailedError
from capfinder.training import checkpoint
from capfinder.training.checkpoint import Checkpoints
from capfinder.training.packing import pack
from capfinder.training.run import on_host
from capfinder.training.step import train_step


def trained_state(rng=None):
    state = tiny_state(rng=rng)
    step = jax.jit(train_step)
    for batch in Batches(2).epoch(0):
        state, _ = step(state, batch)
    return state


def save_latest(checkpoints, step, state, **meta):
    checkpoints.save_latest(step, state, meta, best_epoch=0)


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, byte, bit):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("rng", [jax.random.key, jax.random.PRNGKey])
def test_latest_comes_back_bit_for_bit_with_optimiser_and_key(tmp_path, rng):
    state = trained_state(rng(3))
    with Checkpoints(tmp_path) as checkpoints:
        save_latest(checkpoints, 2, state, note="x", value=0.1)
    restored, meta = Checkpoints(tmp_path).restore_latest(tiny_state(rng=rng(0)))
    assert_same(restored, state)
    assert (meta["note"], meta["value"], meta["best_epoch"]) == ("x", 0.1, 0)
    (batch,) = Batches(1).epoch(0)
    step = jax.jit(train_step)
    assert_same(step(restored, batch)[0], step(state, batch)[0])


def test_what_lies_on_the_host_is_saved_from_there(tmp_path):
    state = trained_state()
    kept = on_host(state)
    with Checkpoints(tmp_path) as checkpoints:
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            packed, _ = pack(kept)
        save_latest(checkpoints, 2, (state, kept))
    restored, _ = Checkpoints(tmp_path).restore_latest((tiny_state(), tiny_state()))
    assert_same(restored, (state, state))
    assert not any(np.shares_memory(part, kept.step) for part in packed.values())


def test_numbers_of_every_type_come_back_bit_for_bit(tmp_path):
    tree = {
        "bfloat16": jnp.array([1.5, -0.0, jnp.inf], jnp.bfloat16),
        "float16": jnp.array([[6e-8, 65504.0]], jnp.float16),
        "float32": jnp.array(np.nan, jnp.float32),
        "int32": jnp.int32(-(2**31)),
        "uint32": jnp.uint32(2**32 - 1),
        "bool": jnp.array([True, False]),
        "none": None,
        "empty": {},
        "no rows": jnp.zeros((0, 3)),
    }
    with Checkpoints(tmp_path) as checkpoints:
        save_latest(checkpoints, 1, tree)
    restored, _ = Checkpoints(tmp_path).restore_latest(jax.tree.map(jnp.zeros_like, tree))
    assert_same(restored, tree)


def test_the_best_epoch_opens_without_model_or_optimiser(tmp_path):
    state = trained_state()
    history = [{"epoch": 1, "val_loss": 1 / 3}]
    with Checkpoints(tmp_path, about={"hyperparameters": {"filters": [32, 64]}}) as checkpoints:
        checkpoints.save_best(1, state.variables, {"history": history, "best_val_loss": 1 / 3})
    reader = Checkpoints(tmp_path)
    assert_same(reader.restore_variables(), state.variables)
    assert reader.read_meta() == {
        "about": {"hyperparameters": {"filters": [32, 64]}},
        "best_epoch": 1,
        "best_val_loss": 1 / 3,
        "history": history,
    }


def test_a_model_without_batch_norm_has_empty_batch_stats(tmp_path):
    variables = {"params": {"kernel": jnp.ones(3)}, "batch_stats": {}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(1, variables, {})
    assert_same(Checkpoints(tmp_path).restore_variables(), variables)


def test_what_was_saved_may_change_hands_at_once(tmp_path):
    """Steps donate their state: its memory is written over while Orbax still works."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = {"a": jnp.arange(500_000.0)}
    with Checkpoints(tmp_path) as checkpoints:
        save_latest(checkpoints, 1, tree)
        jax.block_until_ready(overwrite(tree))
    restored, _ = Checkpoints(tmp_path).restore_latest({"a": jnp.zeros(500_000)})
    np.testing.assert_array_equal(restored["a"], np.arange(500_000.0, dtype=np.float32))


def test_nothing_saved_reads_as_nothing_and_makes_no_directory(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.read_meta() is None
    assert checkpoints.restore_latest({"a": jnp.zeros(1)}) is None
    with pytest.raises(InputError, match="no trained model"):
        checkpoints.restore_variables()
    assert not (tmp_path / "none").exists()


def test_two_of_each_are_kept_and_a_number_that_comes_again_replaces_what_followed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2, 3, 4):
            save_latest(checkpoints, number, {"a": jnp.float32(number)})
        save_latest(checkpoints, 3, {"a": jnp.float32(30)})
    assert sorted(p.name for p in (tmp_path / "latest").iterdir()) == ["3"]
    restored, _ = Checkpoints(tmp_path).restore_latest({"a": jnp.float32(0)})
    assert float(restored["a"]) == 30
    with Checkpoints(tmp_path) as checkpoints:
        save_latest(checkpoints, 5, {"a": jnp.float32(5)})
        save_latest(checkpoints, 6, {"a": jnp.float32(6)})
    assert sorted(p.name for p in (tmp_path / "latest").iterdir()) == ["5", "6"]


def test_what_a_writer_was_killed_before_removing_is_removed_by_the_next(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2, 3):
            save_latest(checkpoints, number, {"a": jnp.float32(number)})
    shutil.copytree(tmp_path / "latest" / "2", tmp_path / "latest" / "1")
    restored, _ = Checkpoints(tmp_path).restore_latest({"a": jnp.float32(0)})
    assert float(restored["a"]) == 3
    assert sorted(p.name for p in (tmp_path / "latest").iterdir()) == ["2", "3"]


def noise(count, seed):
    """Numbers that a file can't be made smaller of: their bits are everywhere in it."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=count), jnp.float32)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_does_no_harm(tmp_path):
    """Some bits of each of its files, Orbax's own ones included, one at a time."""
    best = {"params": {"kernel": noise((9, 5), 1), "bias": noise(5, 2)}, "batch_stats": {}}
    state = {"weights": noise(40, 3), "step": jnp.int32(7)}
    history = [{"epoch": 1, "val_loss": 1 / 3}]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(1, best, {"history": history})
        checkpoints.save_latest(5, state, {"history": history}, best_epoch=1)
    whole_meta = Checkpoints(tmp_path).read_meta()
    rng = np.random.default_rng(0)
    noticed, tried = dict.fromkeys(("best", "latest"), 0), 0
    files = [p for p in sorted(tmp_path.rglob("*")) if p.is_file() and p.stat().st_size]
    assert {p.relative_to(tmp_path).parts[2] for p in files} >= {"meta", "variables", "state"}
    for path in files:
        size = path.stat().st_size
        for byte in {0, size // 2, size - 1, *rng.integers(size, size=5).tolist()}:
            bit = int(rng.integers(8))
            flip(path, byte, bit)
            tried += 1
            if "best" in path.parts:
                try:
                    assert_same(Checkpoints(tmp_path).restore_variables(), best)
                    assert Checkpoints(tmp_path).read_meta() == whole_meta
                    assert Checkpoints(tmp_path).has_best(1)
                except InputError as error:
                    assert str(path.relative_to(tmp_path).parent.parts[1]) in str(error)
                    assert not Checkpoints(tmp_path).has_best(1)
                    noticed["best"] += 1
            else:
                try:
                    restored, meta = Checkpoints(tmp_path).restore_latest(state)
                    assert_same(restored, state)
                    assert meta["history"] == history
                except StageFailedError as error:
                    assert "none of its checkpoints can be read" in str(error)
                    noticed["latest"] += 1
            flip(path, byte, bit)
    assert min(noticed.values()) > tried // 8, (noticed, tried)
    assert_same(Checkpoints(tmp_path).restore_variables(), best)


def test_a_checkpoint_without_checksums_is_not_used(tmp_path):
    """As one that has lost them: nothing says that it is what was written."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(1, {"params": {"a": jnp.ones(3)}}, {})
        save_latest(checkpoints, 1, {"a": jnp.ones(3)})
    for path in tmp_path.rglob("meta/metadata"):
        meta = json.loads(path.read_text())
        del meta["sha256"]
        path.write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"there is no checksum.*Run the train stage again"):
        Checkpoints(tmp_path).restore_variables()
    with pytest.raises(StageFailedError, match=r"there is no checksum.*Remove"):
        Checkpoints(tmp_path).restore_latest({"a": jnp.zeros(3)})


def test_a_best_epoch_that_is_damaged_is_written_again_and_a_whole_one_is_left(tmp_path):
    best = {"params": {"a": noise(500, 4)}, "batch_stats": {}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(3, best, {})
    data = largest_file(tmp_path / "best" / "3" / "variables")
    before = data.stat()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.mend_best(3, best, {})
    assert data.stat() == before
    flip(data, before.st_size // 2, 0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.mend_best(3, best, {})
    assert_same(Checkpoints(tmp_path).restore_variables(3), best)


def test_a_best_epoch_whose_writer_was_killed_is_no_damage(tmp_path, monkeypatch):
    """The latest state, begun after it, may be whole before it."""
    said = []
    for kind in ("info", "warning"):
        monkeypatch.setattr(checkpoint.logger, kind, lambda *words, kind=kind: said.append(kind))
    best = {"params": {"a": noise(500, 4)}, "batch_stats": {}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.mend_best(3, best, {})
    assert_same(Checkpoints(tmp_path).restore_variables(3), best)
    flip(largest_file(tmp_path / "best" / "3" / "variables"), 100, 0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.mend_best(3, best, {})
    assert said == ["info", "warning"]


@pytest.mark.parametrize("damage", ["cut", "no meta"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2):
            save_latest(checkpoints, number, {"a": jnp.arange(3000.0) + number})
    newest = tmp_path / "latest" / "2"
    data = largest_file(newest / "state")
    if damage == "cut":
        os.truncate(data, data.stat().st_size // 2)
    else:
        shutil.rmtree(newest / "meta")
    restored, _ = Checkpoints(tmp_path).restore_latest({"a": jnp.zeros(3000)})
    np.testing.assert_array_equal(restored["a"], np.arange(3000) + 1)


def test_when_none_can_be_read_the_error_says_what_to_do(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save_latest(checkpoints, 1, {"a": jnp.arange(3000.0)})
        checkpoints.save_best(1, {"params": {"a": jnp.arange(3000.0)}}, {})
    for kind in ("latest/1/state", "best/1/variables"):
        os.truncate(largest_file(tmp_path / kind), 10)
    with pytest.raises(StageFailedError, match=r"none of its checkpoints can be read .*Remove"):
        Checkpoints(tmp_path).restore_latest({"a": jnp.zeros(3000)})
    with pytest.raises(InputError, match=r"can't be read .*Run the train stage"):
        Checkpoints(tmp_path).restore_variables()


@pytest.mark.parametrize(
    "template", [{"a": jnp.zeros(4)}, {"b": jnp.zeros(3)}, {"a": jnp.zeros(3, jnp.int32)}]
)
def test_another_model_s_checkpoint_is_refused_rather_than_bent_to_fit(tmp_path, template):
    with Checkpoints(tmp_path) as checkpoints:
        save_latest(checkpoints, 1, {"a": jnp.ones(3)})
    with pytest.raises(StageFailedError, match="different model or precision"):
        Checkpoints(tmp_path).restore_latest(template)


def test_resuming_drops_best_epochs_that_the_restored_state_has_not_reached(tmp_path):
    variables = {"params": {"a": jnp.ones(2)}, "batch_stats": {}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(3, variables, {})
        checkpoints.save_latest(30, {"a": jnp.ones(2)}, {}, best_epoch=3)
        checkpoints.save_best(4, variables, {})  # and killed before the latest of epoch 4
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore_latest({"a": jnp.zeros(2)})
    assert checkpoints.read_meta()["best_epoch"] == 3


def test_is_due_counts_from_the_last_save(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("capfinder.training.checkpoint.time.monotonic", lambda: now[0])
    with Checkpoints(tmp_path, minutes=2) as checkpoints:
        now[0] += 119
        assert not checkpoints.is_due()
        now[0] += 1
        assert checkpoints.is_due()
        save_latest(checkpoints, 1, {"a": jnp.ones(1)})
        assert not checkpoints.is_due()
    assert not Checkpoints(tmp_path, minutes=None).is_due()
    assert Checkpoints(tmp_path, minutes=0).is_due()


def test_a_clock_that_jumps_ends_no_write(tmp_path, monkeypatch):
    """Days forward and back at every look, as when a machine wakes up or its clock is set."""
    real, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + 30 * 86400 * (next(looks) % 3))
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save_best(number, {"params": {"a": jnp.arange(9.0) + number}}, {})
            save_latest(checkpoints, number, {"a": jnp.arange(3000.0) + number})
    assert next(looks) > 10
    best = Checkpoints(tmp_path).restore_variables()
    np.testing.assert_array_equal(best["params"]["a"], np.arange(9) + 3)
    restored, _ = Checkpoints(tmp_path).restore_latest({"a": jnp.zeros(3000)})
    np.testing.assert_array_equal(restored["a"], np.arange(3000) + 3)


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file stands where the directory should be")
    with (
        pytest.raises(StageFailedError, match=r"can't be written .*Free or give access"),
        Checkpoints(tmp_path / "checkpoints") as checkpoints,
    ):
        save_latest(checkpoints, 1, {"a": jnp.ones(1)})


def test_a_full_disk_is_a_clear_error_and_leaves_the_checkpoint_before_it(tmp_path):
    """Stood in for by a limit on the size of a file."""
    template = {"a": jnp.zeros(1_000_000)}
    noise = jax.random.normal(jax.random.key(0), (1_000_000,))  # can't be compressed away
    with Checkpoints(tmp_path) as checkpoints:
        save_latest(checkpoints, 1, template)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        checkpoints = Checkpoints(tmp_path)
        with pytest.raises(StageFailedError, match="can't be written"):
            save_latest(checkpoints, 2, {"a": noise})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    restored, _ = Checkpoints(tmp_path).restore_latest(template)
    assert_same(restored, template)
    with Checkpoints(tmp_path) as checkpoints:
        save_latest(checkpoints, 2, {"a": noise})
    assert_same(Checkpoints(tmp_path).restore_latest(template)[0], {"a": noise})


def test_a_writer_killed_at_any_moment_leaves_a_checkpoint_that_opens(tmp_path):
    """kill -9 while saves follow each other; what it left half-done is cleared away."""
    program = textwrap.dedent(
        f"""
        import itertools, pathlib
        import jax.numpy as jnp
        from capfinder.training.checkpoint import Checkpoints
        checkpoints = Checkpoints(pathlib.Path({str(tmp_path)!r}))
        for n in itertools.count(1):
            state = {{"a": jnp.full(200_000, n, jnp.float32), "n": jnp.int32(n)}}
            checkpoints.save_latest(n, state, {{"n": n}}, best_epoch=0)
            print(n, flush=True)
        """
    )
    template = {"a": jnp.zeros(200_000), "n": jnp.int32(0)}
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with writer:
        for line in writer.stdout:
            if int(line) == 4:
                writer.kill()
    checkpoints = Checkpoints(tmp_path)
    state, meta = checkpoints.restore_latest(template)
    n = meta["n"]
    assert n >= 2 and int(state["n"]) == n and (np.asarray(state["a"]) == n).all()
    assert all(p.name.isdigit() for p in (tmp_path / "latest").iterdir())
    assert json.loads((tmp_path / "latest" / str(n) / "meta" / "metadata").read_text())["n"] == n
