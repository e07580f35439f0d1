"""What tests/test_devices.py runs in a process of eight simulated devices; prints JSON."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from sizes import TINY
from test_cache import T as LENGTH
from test_cache import make_split
from test_loader import write_shards
from tiny_training import MODULE, run_fit

from capfinder import models, settings
from capfinder.data import loader
from capfinder.errors import SettingsError
from capfinder.stages import assembly
from capfinder.training import devices
from capfinder.training.checkpoint import Checkpoints
from capfinder.training.precision import policy
from capfinder.training.schedules import make_schedule, optimizer
from capfinder.training.step import eval_step, new_state, train_step

STEPS = 24
SCHEDULE = make_schedule(
    "reduce_lr_on_plateau",
    {"factor": 0.5, "patience": 0, "min_lr": 1e-6},
    learning_rate=1e-3,
    steps_per_epoch=1,
)
COMPILED: list[str] = []  # one a program that XLA made


def note_compilation(event: str, duration: float, **facts: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


def batches(root: Path, residency: Any, *, augment: bool, limit: int | None, size: int = 16):
    """(training batches, validation batches) of 96 reads and 21."""
    train: Any = make_split([0, 1, 2] * 32, dtype="float32")
    if residency == "stream":
        train = write_shards(root, train)

    def place(batch_size: int) -> loader.Placement:
        chosen = devices.spread(batch_size, limit=limit, every_process=False)
        return loader.ONE_DEVICE if chosen is None else chosen

    made = loader.TrainBatches(
        train, batch_size=size, seed=1, augment=augment, residency=residency, place=place
    )
    validation = make_split([0, 1, 2] * 7, dtype="float32", seed=1)
    return made, loader.EvaluationBatches(validation, batch_size=13, placement=made.placement)


@functools.cache  # also as the same optimiser is the same program
def fresh_state(module: Any) -> Any:
    init = jax.jit(functools.partial(module.init, train=False))
    variables = init(jax.random.key(0), np.zeros((1, LENGTH, 1), np.float32))
    tx = optimizer(SCHEDULE.learning_rate)
    return new_state(module.apply, variables, tx, jax.random.key(3), policy("float32", None, "cpu"))


def on(*arrays: jax.Array) -> list[int]:
    """Of each array: the devices that hold a part of it."""
    return [len({shard.device for shard in array.addressable_shards}) for array in arrays]


def train(root: Path, model: str, residency: str, *, augment: bool, limit: int | None):
    """Losses of STEPS steps, sums of an evaluation, and where things lie."""
    made, validation = batches(root, residency, augment=augment, limit=limit)
    module: Any = MODULE
    if model != "tiny":
        hyperparameters = models.parse_hyperparameters(model, TINY[model])
        module = models.architecture(model).build(hyperparameters, num_classes=3, dtype=np.float32)
    state = made.placement.replicate(fresh_state(module))

    @jax.jit
    def step(state: Any, resident: Any, piece: Any) -> Any:
        part = {name: array[0] for name, array in piece.items()}
        return train_step(state, made.materialise(resident, part))

    losses, epoch, programs = [], 0, 0
    while len(losses) < STEPS:
        for piece in made.pieces(epoch):
            before = len(COMPILED)
            state, sums = step(state, made.resident, piece)
            programs += len(COMPILED) - before
            losses.append(float(sums["loss"] / sums["count"]))
        epoch += 1
    evaluate = jax.jit(eval_step)
    totals = [jax.device_get(evaluate(state, batch)) for batch in validation]
    batch = next(iter(validation))
    leaf = jax.tree.leaves(state.params)[0]
    piece = next(made.pieces(0))
    return {
        "losses": losses[:STEPS],
        "evaluated": {name: float(sum(each[name] for each in totals)) for name in totals[0]},
        "programs": programs,
        "on": on(leaf, batch["signal"], *piece.values(), *jax.tree.leaves(made.resident)),
        "rows": [
            {int(shard.data.shape[axis]) for shard in array.addressable_shards}.pop()
            for array, axis in (
                (batch["signal"], 0),
                (piece.get("signal", piece.get("example")), 1),
            )
        ],
        "replicated": all(each.is_fully_replicated for each in jax.tree.leaves(state)),
    }


def resumed(root: Path) -> dict[str, Any]:
    """A training of 4 epochs that is stopped in its third, with 1 and 8 devices in turn."""

    def run(directory: Path | None, limit: int | None, stop_at: int | None = None):
        made, validation = batches(root, "device", augment=True, limit=limit)
        taken = []
        checkpoints = None if directory is None else Checkpoints(directory)
        fitted = run_fit(
            made.placement.replicate(fresh_state(MODULE)),
            train_batches=made,
            validation_batches=validation,
            schedule=SCHEDULE,
            checkpoints=checkpoints,
            on_step=taken.append,
            interrupted=lambda: stop_at is not None and taken[-1] >= stop_at,
            steps_per_call=3,
        )
        if checkpoints is not None:
            checkpoints.close()
        return fitted, taken

    whole, _ = run(None, 1)
    run(root / "to8", 1, stop_at=40)
    on_eight, taken = run(root / "to8", None)
    run(root / "to1", None, stop_at=40)
    on_one, _ = run(root / "to1", 1)
    leaves = [jax.tree.leaves(each.state.params) for each in (whole, on_eight, on_one)]
    return {
        "apart": [
            max(float(np.abs(a - b).max()) for a, b in zip(leaves[0], other, strict=True))
            for other in leaves[1:]
        ],
        "losses": [[row["val_loss"] for row in each.history] for each in (whole, on_eight, on_one)],
        "went_on_at": taken[0],
        "on": on(on_eight.state.step, on_one.state.step),
    }


def num_devices(batch_size: int, mesh: int | None) -> int:
    """Of a training with this setting."""
    config = settings.checked(
        settings.default_config(),
        {"shared_params.batch_size": batch_size, "runtime_params.mesh": mesh},
    )
    dataset: Any = SimpleNamespace(directory=None)
    return assembly.train_batches(config, dataset).placement.num_devices


def main(root: Path) -> dict[str, Any]:
    assert len(jax.devices()) == 8
    jax.monitoring.register_event_duration_secs_listener(note_compilation)
    result: dict[str, Any] = {"chosen": {}, "trained": {}}
    split = make_split([0, 1, 2] * 32)
    assembly._opened = lambda *place, streamed: split  # type: ignore[assignment]
    for size, mesh in ((16, None), (12, None), (7, None), (30, 4), (16, 2), (16, 1)):
        result["chosen"][f"{size} {mesh}"] = num_devices(size, mesh)
    try:
        num_devices(16, 9)
    except SettingsError as error:
        result["too_many"] = str(error)
    for model, residency, augment in (
        ("cnn_lstm", "device", False),
        ("resnet", "host", True),
        ("tiny", "stream", True),
    ):
        for limit in (1, None):
            made = train(root, model, residency, augment=augment, limit=limit)
            result["trained"][f"{model} {residency} {limit}"] = made
    result["resumed"] = resumed(root)
    return result


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
