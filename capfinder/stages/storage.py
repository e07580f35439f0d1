"""Where studies are kept: a journal file, or a database that workers on other hosts reach too."""

import re
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from capfinder import log
from capfinder.errors import InputError, SettingsError
from capfinder.log import logger
from capfinder.settings import without_password
from capfinder.stages import locks

JOURNAL = "journal.log"
WAIT_SECONDS = 1.0
RECONNECT_SECONDS = 300.0  # a database that restarts is waited for
LOCKED_SECONDS = 60.0  # SQLite: for others to end their writing
OPENINGS = 3  # two that make the tables of a new database at once get into each other's way
RIVAL = re.compile("already exists|duplicate key|unique constraint", re.IGNORECASE)


def open_storage(directory: Path, url: str | None) -> Any:
    """Optuna's storage in the database of a URL; None: in the journal file in `directory`.

    Raises: SettingsError, without the password, when it can't be used."""
    if url is not None:
        return _open_database(url)
    journal, lock = directory / JOURNAL, directory / "locks" / "journal.lock"
    backend = JournalFileBackend(str(journal), lock_obj=locks.KernelLock(lock, journal))  # type: ignore[arg-type]
    try:
        return optuna.storages.JournalStorage(backend)
    except OSError:
        raise
    except Exception as error:  # Optuna raises many kinds for lines that it hasn't written
        raise InputError(
            f"{journal}: is damaged{locks.first_damaged_line(journal)}. Copy it there again, or "
            "move it elsewhere: a new study then begins."
        ) from error


def studies(directory: Path, url: str | None) -> dict[str, dict[str, Any]]:
    """The names of the studies there, with what is noted of their settings; makes nothing.

    Raises: SettingsError as `open_storage`."""
    file = directory / JOURNAL if url is None else _sqlite_file(url)
    if file is not None and not file.exists():
        return {}
    opened = open_storage(directory, url)
    try:
        summaries = optuna.get_all_study_summaries(opened, include_best_trial=False)
    finally:
        if url is not None:  # asked again and again, else connections would pile up
            opened._backend.engine.dispose()
    return {found.study_name: found.user_attrs.get("settings", {}) for found in summaries}


def what_it_said(error: BaseException) -> str:
    """The database's own words, in a line, where Optuna has wrapped them."""
    said = str(error.__cause__ or error).strip()
    return said.splitlines()[0] if said else type(error).__name__


def _sqlite_file(url: str) -> Path | None:
    found = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", url)
    return None if found is None else Path(found[1])


def _open_database(url: str) -> optuna.storages.BaseStorage:
    from sqlalchemy import make_url  # needed for databases alone

    for opening in range(1, OPENINGS + 1):
        try:
            log.hide(make_url(url).password)
            storage = optuna.storages.RDBStorage(url, engine_kwargs=_engine_options(url))
            break
        except Exception as error:
            if RIVAL.search(str(error)) and opening < OPENINGS:
                time.sleep(WAIT_SECONDS)
                continue
            shown = without_password(url)
            reason = str(error).strip().splitlines()[0].replace(url, shown)
            raise SettingsError(
                f"tune_params.storage={shown!r}: can't be opened ({reason})"
            ) from None
    _connect_patiently(storage.engine)
    return optuna.storages.get_storage(storage)


def _engine_options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"pool_pre_ping": True}  # servers end what was idle for hours
    if _sqlite_file(url) is not None:
        options["connect_args"] = {"timeout": LOCKED_SECONDS}
    return options


def _connect_patiently(engine: Any) -> None:
    """From now on a database that can't be reached is asked again for RECONNECT_SECONDS."""
    from sqlalchemy import event

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, named: Any) -> Any:
        deadline, has_said = time.monotonic() + RECONNECT_SECONDS, False
        while True:
            try:
                return dialect.connect(*arguments, **named)
            except dialect.loaded_dbapi.Error as error:
                if time.monotonic() >= deadline:
                    raise
                if not has_said:
                    reason = str(error).strip().splitlines()[0]
                    logger.warning("The study's database can't be reached (%s); waiting", reason)
                has_said = True
                time.sleep(WAIT_SECONDS)
