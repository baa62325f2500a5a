"""Errors with an exit code, so that the command line can tell a user's mistake from a bug.

Exit codes: 1 a gate failed (`GateError`), 2 the user can fix it (`UserError` and its kinds),
3 a bug (any other exception), 130 Ctrl-C.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can repair: printed without a traceback, exit code 2."""

    exit_code = 2

    def __init__(self, what: str, why: str, fix: str) -> None:
        """Keep the three parts apart so that every message has all of them.

        Args:
            what: What was given or found.
            why: Why that does not work.
            fix: What to do about it, as a command or setting where possible.
        """
        self.what = what
        self.why = why
        self.fix = fix
        super().__init__(f"{what}\n  why: {why}\n  fix: {fix}")


class ConfigError(UserError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(UserError):
    """A data file, entry or row cannot be used as it is."""


class ModelError(UserError):
    """A model, tokenizer or backend cannot be loaded as asked."""


class TrainingError(UserError):
    """Training cannot start, resume or go on."""


class Stopped(UserError):
    """Ctrl-C ended the work at a point from which it can go on: exit code 130."""

    exit_code = 130


class GateError(Exception):
    """A check that must hold did not: exit code 1, with the figures that failed."""

    exit_code = 1
