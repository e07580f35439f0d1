"""Checkpoints of one training run: the best epoch's weights, and the latest state to resume from.

    directory/best/<epoch>/    variables (params, batch_stats), meta: all that evaluation needs
    directory/latest/<step>/   state (everything, packed), meta

Orbax writes in the background and gives a checkpoint its final name when it is whole. A failed
write is an error at the next save or at `wait`, at the latest when training ends. Of several
processes the main one alone writes, and says which checkpoint all of them resume from."""

import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from capfinder.errors import InputError, StageFailedError
from capfinder.log import logger
from capfinder.training import hosts
from capfinder.training.packing import layout, pack, unpack

KEPT = 2  # of each kind: one more than needed, in case the newest turns out damaged


class Checkpoints:
    """The checkpoints of one run in `directory`; one writer at a time, any number of readers.

    minutes: `is_due` is true once this long after the last save of the latest state; None: never.
    about: JSON-able facts kept in every checkpoint's meta (hyperparameters, model type, ...)."""

    def __init__(
        self,
        directory: Path,
        minutes: float | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self._best_dir = self.directory / "best"
        self._latest_dir = self.directory / "latest"
        self._minutes = minutes
        self._about = dict(about or {})
        self._managers: dict[Path, ocp.CheckpointManager] = {}
        self._saved_at = time.monotonic()
        logging.getLogger("absl").addFilter(_is_not_orbax_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Reading the best epoch: needs no model, writes nothing, safe beside a running training.

    def read_meta(self) -> dict[str, Any] | None:
        """The best epoch's meta, or None when none was saved: best_epoch, best_val_loss, about,
        and the history up to it.

        Raises: InputError when it can't be read."""
        epochs = _numbers(self._best_dir)
        if not epochs:
            return None
        path = self._best_dir / str(epochs[0])
        try:
            return _read_json(path / "meta")
        except Exception as error:  # Orbax raises many kinds for a damaged file
            raise self._read_error(path, error) from error

    def restore_variables(self, epoch: int | None = None) -> dict[str, Any]:
        """{"params", "batch_stats"} of the best epoch (or of an earlier best, while it is kept).

        Raises: InputError when there is no such checkpoint or it can't be read."""
        epochs = _numbers(self._best_dir) if epoch is None else [epoch]
        if not epochs or not (self._best_dir / str(epochs[0])).is_dir():
            raise InputError(
                f"{self._best_dir}: no trained model there. Run the train stage first."
            )
        path = self._best_dir / str(epochs[0])
        try:
            variables = {"params": {}, "batch_stats": {}} | _read_arrays(path / "variables")
            return jax.tree.map(jnp.asarray, variables)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            raise self._read_error(path, error) from error

    # Writing, and resuming.

    def is_due(self) -> bool:
        """The latest state was last saved `minutes` ago or more."""
        if self._minutes is None or not hosts.is_main():
            return False
        return time.monotonic() - self._saved_at >= 60 * self._minutes

    def save_best(self, epoch: int, variables: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts to write the best variables so far, which must not be donated after that."""
        if hosts.is_main():
            # Arrays of several devices or processes would have Orbax write shards of them.
            arrays = jax.device_get(dict(variables))
            self._save(self._best_dir, epoch, {"variables": arrays}, {**meta, "best_epoch": epoch})

    def save_latest(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        *,
        best_epoch: int,
        holds_best: bool,
    ) -> None:
        """Starts to write `state`, a PyTree of arrays; it may be donated after that.

        best_epoch: the best when it was saved, 0 for none; holds_best: the state's own variables
        are the best. If they aren't, the best has to be on disk before this checkpoint is."""
        if not hosts.is_main():
            return
        if not holds_best:
            self._wait(self._best_dir)
        packed, state_layout = pack(state)
        self._save(
            self._latest_dir,
            step,
            {"state": packed},
            {**meta, "best_epoch": best_epoch, "layout": state_layout},
        )
        self._saved_at = time.monotonic()

    def restore_latest(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest state that can be read, shaped like `template`, and its meta; None: none yet.

        For the writer alone, who takes up the run from there: clears away what killed writers
        left, and best epochs that the restored state has not come to yet.

        Raises: StageFailedError when checkpoints exist but none fits the template or none can be
        read."""
        if not hosts.is_main():
            return self._restore_told(template)
        found = self._restore_newest(template)
        hosts.tell("resume", None if found is None else found[0])
        return None if found is None else found[1:]

    def _restore_told(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
        """What the main process has restored."""
        _, step = hosts.hear("resume")
        if step is None:
            return None
        path = self._latest_dir / str(step)
        meta = _read_json(path / "meta")
        del meta["layout"]
        return unpack(template, _read_arrays(path / "state")), meta

    def _restore_newest(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
        self.close()  # Orbax's managers don't look again at what is on disk
        for directory in (self._best_dir, self._latest_dir):
            for partial in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(partial, ignore_errors=True)
        steps = _numbers(self._latest_dir)
        for step in steps:
            path = self._latest_dir / str(step)
            try:
                meta = _read_json(path / "meta")
                if meta.pop("layout") != layout(template):
                    raise StageFailedError(
                        f"{path}: saved by a different model or precision. Remove "
                        f"{self.directory}, or choose another shared_params.output_dir."
                    )
                state = unpack(template, _read_arrays(path / "state"))
            except StageFailedError:
                raise
            except Exception as error:
                logger.warning(
                    "%s: the checkpoint can't be read (%s); trying an older one",
                    path,
                    _first_line(error),
                )
                continue
            for epoch in _numbers(self._best_dir):
                if epoch > meta["best_epoch"]:
                    shutil.rmtree(self._best_dir / str(epoch))
            return step, state, meta
        if steps:
            raise StageFailedError(
                f"{self._latest_dir}: none of its checkpoints can be read. Remove "
                f"{self.directory} to train from the beginning."
            )
        return None

    def wait(self) -> None:
        """Until all that was saved is on disk. Raises: StageFailedError when a write failed."""
        for directory in list(self._managers):
            self._wait(directory)

    def close(self) -> None:
        """Waits, and ends Orbax's threads; the object can be used again afterwards."""
        try:
            self.wait()
        finally:
            for manager in self._managers.values():
                manager.close()
            self._managers.clear()

    def _save(
        self, directory: Path, number: int, items: dict[str, Any], meta: Mapping[str, Any]
    ) -> None:
        try:
            manager = self._manager(directory)
            # A run that went on from an older checkpoint comes by these numbers again.
            if stale := [kept for kept in manager.all_steps() if kept >= number]:
                manager.wait_until_finished()  # one of them may still be on its way
                for kept in stale:
                    manager.delete(kept)
            arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            saved = manager.save(
                number,
                args=ocp.args.Composite(
                    **arrays, meta=ocp.args.JsonSave({**meta, "about": self._about})
                ),
            )
            assert saved, f"Orbax declined to save {number} in {directory}"
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(directory, error) from error

    def _wait(self, directory: Path) -> None:
        if directory not in self._managers:
            return
        try:
            self._managers[directory].wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(directory, error) from error

    def _manager(self, directory: Path) -> ocp.CheckpointManager:
        if directory not in self._managers:
            directory.mkdir(parents=True, exist_ok=True)
            # Else Orbax waits for the other processes.
            alone = ocp.options.MultiprocessingOptions(
                active_processes={0}, barrier_sync_key_prefix=directory.name
            )
            self._managers[directory] = ocp.CheckpointManager(
                directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT, create=False, multiprocessing_options=alone
                ),
            )
        return self._managers[directory]

    def _read_error(self, path: Path, error: Exception) -> InputError:
        return InputError(
            f"{path}: the checkpoint can't be read ({_first_line(error)}). Remove "
            f"{self.directory} and train again."
        )

    def _write_error(self, directory: Path, error: Exception) -> StageFailedError:
        return StageFailedError(
            f"{directory}: a checkpoint can't be written ({_first_line(error)}). Free or give "
            "access to the disk and run the same command again: training goes on from the last "
            "whole checkpoint."
        )


def _is_not_orbax_s(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of every failure that it also raises, and that we report."""
    return "orbax" not in record.pathname


def _numbers(directory: Path) -> list[int]:
    """Epochs or steps of the whole checkpoints in a directory, newest first."""
    names = (path.name for path in directory.glob("*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _read_json(path: Path) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(path)


def _read_arrays(path: Path) -> Any:
    """A tree of NumPy arrays, whatever device they were saved from."""
    reader = ocp.StandardCheckpointHandler()
    saved = reader.metadata(path)
    template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), dict(saved))
    return reader.restore(path, args=ocp.args.StandardRestore(template))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
