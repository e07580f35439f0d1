"""Checkpoints of one training run: the best epoch's weights, and the latest state to resume from.

    directory/best/<epoch>/    variables (params, batch_stats), meta: all that evaluation needs
    directory/latest/<step>/   state (everything, packed), meta

Orbax writes in the background and gives a checkpoint its final name when it is whole. A failed
write is an error at the next save or at `wait`, at the latest when training ends. The meta has
checksums of the arrays and of itself, and nothing is used that doesn't agree with them; a
checkpoint without any, from before there were checksums, can't be told from a damaged one. Of
several processes the main one alone writes, and says which checkpoint all of them resume from."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp

from capfinder import libraries
from capfinder.errors import InputError, StageFailedError
from capfinder.log import logger
from capfinder.training import hosts, reading
from capfinder.training.packing import layout, pack, unpack

ocp = libraries.lazily("orbax.checkpoint")  # which no training needs before its first step

# Orbax goes by the clock on the wall: one that is put forward, or a machine that wakes up, would
# end a write that is well on its way.
WRITE_SECONDS = 10 * 365 * 86400
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
        self._managers: dict[Path, Any] = {}
        self._saved_at = time.monotonic()
        reading.hush_orbax()

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
            return reading.read_meta(path)
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
            variables = {"params": {}, "batch_stats": {}} | reading.read(path, "variables")[1]
            return jax.tree.map(jnp.asarray, variables)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            raise self._read_error(path, error) from error

    def has_best(self, epoch: int) -> bool:
        """Whether the best epoch is on the disk, whole."""
        return self._fault_of_best(epoch) is None

    def _fault_of_best(self, epoch: int) -> str | None:
        try:
            reading.read(self._best_dir / str(epoch), "variables")
        except Exception as error:  # as above
            return _first_line(error)
        return None

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
            self._save(self._best_dir, epoch, "variables", arrays, {**meta, "best_epoch": epoch})

    def mend_best(self, epoch: int, variables: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """As `save_best`, unless it is there: its writer may have been killed before it was whole,
        or it was damaged since."""
        if hosts.is_main() and (fault := self._fault_of_best(epoch)):
            path = self._best_dir / str(epoch)
            if path.exists():
                logger.warning(
                    "%s: the checkpoint can't be read (%s); writing it again", path, fault
                )
            else:
                logger.info("%s: wasn't whole yet when the run was stopped; writing it", path)
            self.save_best(epoch, variables, meta)

    def save_latest(
        self, step: int, state: Any, meta: Mapping[str, Any], *, best_epoch: int
    ) -> None:
        """Starts to write `state`, a PyTree of arrays; it may be donated after that.

        best_epoch: the best when it was saved, 0 for none."""
        if not hosts.is_main():
            return
        packed, state_layout = pack(state)
        self._save(
            self._latest_dir,
            step,
            "state",
            packed,
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
        meta, packed = reading.read(self._latest_dir / str(step), "state")
        del meta["layout"]
        return unpack(template, packed), meta

    def _restore_newest(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
        self.close()  # Orbax's managers don't look again at what is on disk
        for directory in filter(Path.exists, (self._best_dir, self._latest_dir)):
            for partial in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(partial, ignore_errors=True)
            for number in _numbers(directory)[KEPT:]:  # its writer was killed before it did so
                shutil.rmtree(directory / str(number), ignore_errors=True)
        problem = None
        for step in _numbers(self._latest_dir):
            path = self._latest_dir / str(step)
            try:
                meta, packed = reading.read(path, "state")
            except Exception as error:  # as above
                problem = _first_line(error)
                logger.warning(
                    "%s: the checkpoint can't be read (%s); trying an older one", path, problem
                )
                continue
            if meta.pop("layout") != layout(template):
                raise StageFailedError(
                    f"{path}: saved by a different model or precision. Remove {self.directory}, or "
                    "choose another shared_params.output_dir."
                )
            for epoch in _numbers(self._best_dir):
                if epoch > meta["best_epoch"]:
                    shutil.rmtree(self._best_dir / str(epoch))
            return step, unpack(template, packed), meta
        if problem is not None:
            raise StageFailedError(
                f"{self._latest_dir}: none of its checkpoints can be read ({problem}). Remove "
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
        self, directory: Path, number: int, item: str, arrays: Any, meta: Mapping[str, Any]
    ) -> None:
        try:
            manager = self._manager(directory)
            # A run that went on from an older checkpoint comes by these numbers again.
            if stale := [kept for kept in manager.all_steps() if kept >= number]:
                manager.wait_until_finished()  # one of them may still be on its way
                for kept in stale:
                    manager.delete(kept)
            whole = reading.with_checksums({**meta, "about": self._about}, arrays)
            saved = manager.save(
                number,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(whole), **{item: ocp.args.StandardSave(arrays)}
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

    def _manager(self, directory: Path) -> Any:
        if directory not in self._managers:
            directory.mkdir(parents=True, exist_ok=True)
            # Else Orbax waits for the other processes.
            alone = ocp.options.MultiprocessingOptions(
                active_processes={0}, barrier_sync_key_prefix=directory.name
            )
            # Directories made in the background would be waited for by that clock, too.
            patient = ocp.options.AsyncOptions(
                timeout_secs=WRITE_SECONDS, create_directories_asynchronously=False
            )
            self._managers[directory] = ocp.CheckpointManager(
                directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT,
                    create=False,
                    multiprocessing_options=alone,
                    async_options=patient,
                    lightweight_initialize=True,  # what it would read may be damaged
                ),
            )
        return self._managers[directory]

    def _read_error(self, path: Path, error: Exception) -> InputError:
        return InputError(
            f"{path}: the checkpoint can't be read ({_first_line(error)}). Run the train stage "
            "again, which writes it anew where it can."
        )

    def _write_error(self, directory: Path, error: Exception) -> StageFailedError:
        return StageFailedError(
            f"{directory}: a checkpoint can't be written ({_first_line(error)}). Free or give "
            "access to the disk and run the same command again: training goes on from the last "
            "whole checkpoint."
        )


def _numbers(directory: Path) -> list[int]:
    """Epochs or steps of the whole checkpoints in a directory, newest first."""
    names = (path.name for path in directory.glob("*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    says_it_all = text and isinstance(error, ValueError | OSError | RuntimeError)
    return text if says_it_all else f"{type(error).__name__} {text}".strip()
