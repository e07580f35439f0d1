"""The way in: runs a command and turns its errors into one line."""

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from capfinder import commands, log, memory
from capfinder.allowed import shown
from capfinder.commands import training
from capfinder.errors import CapfinderError, StoppedError


def launch(arguments: Sequence[str]) -> int:
    """What `launch.py` runs; returns the exit code."""
    return _run_command(lambda: training.launch(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """What `capfinder` runs; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return _run_command(lambda: commands.run(given))


def _run_command(command: Callable[[], None]) -> int:
    log.hide(os.environ.get("COMET_API_KEY"))  # typed into a setting, it would be shown as wrong
    try:
        with memory.collected_rarely():
            command()
        return 0
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong option
        if isinstance(stop.__context__, BrokenPipeError):  # the console's way to end
            return _end_without_output(stop)
        return stop.code if isinstance(stop.code, int) else 1
    except (CapfinderError, StoppedError) as error:
        return _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt as error:
        return _fail("stopped by Ctrl-C", 130, error)
    except BrokenPipeError as error:
        return _end_without_output(error)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _fail(f"{shown(str(error.filename))}: too long a name for a file", 2, error)
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"the disk is full{where}. Free some space"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
            text = f"{error.filename}: {error.strerror}. Give access to it"
        else:
            return _fail_unexpectedly(error)
        return _fail(f"{text}, then run the same command again.", 1, error)
    except MemoryError as error:
        return _fail("out of memory: lower shared_params.batch_size", 1, error)
    except Exception as error:
        return _fail_unexpectedly(error)
    finally:
        log.stop()


def _end_without_output(error: BaseException) -> int:
    """What reads the output has ended, as `head` does. Of a list it has what it wanted; a run,
    which has a log, is said to be unfinished."""
    if log.file_path() is None:
        return 1
    return _fail("the output was closed; the same command goes on from here", 1, error)


def _fail_unexpectedly(error: Exception) -> int:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return _fail(f"unexpected {text} (debug_code=true shows where)", 1, error)


def _fail(message: str, exit_code: int, error: BaseException) -> int:
    path = log.file_path()
    log.file_only(logging.ERROR, message)
    with contextlib.suppress(BrokenPipeError):  # closed like the output, after 2>&1
        log.print_error(message + (f" [log: {path}]" if path else ""))
    if log.logger.level == logging.DEBUG:
        text = "".join(traceback.format_exception(error))
        sys.stderr.writelines(f"{log.printable(line)}\n" for line in text.splitlines())
        log.file_only(logging.ERROR, text)
    return exit_code
