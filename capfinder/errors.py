"""The errors a user can meet; each is one readable line that says where, what and what to do."""


class CapfinderError(Exception):
    """Something the user can mend; the command ends with `exit_code` and the message alone."""

    exit_code = 1


class SettingsError(CapfinderError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class InputError(CapfinderError):
    """Data or a file given to the command can't be used."""

    exit_code = 2


class StageFailedError(CapfinderError):
    """A stage ran and could not give a result."""

    exit_code = 1


class StoppedError(KeyboardInterrupt):
    """A signal ended the run; what was finished is kept and a rerun goes on from there.

    Not an `Exception`, so that no handler of failures (of a trial, say) takes it for one."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
