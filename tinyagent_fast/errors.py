"""Errors with an exit code, so that the command line can tell a user's mistake from a bug.

Exit codes: 1 a gate failed (`GateError`), 2 the user can fix it (`UserError` and its kinds),
3 a bug (any other exception), 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_SHOWN_CHARACTERS = 600
_SHOWN_VALUE = 200
_CONTROLS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069"
)
_UNPRINTABLE = re.compile(f"[{_CONTROLS}]")
_NOT_IN_A_LINE = re.compile(f"[{_CONTROLS}\t\n\u2028\u2029]")

_FULL_GPU = ("out of memory", "alloc_failed", "memoryallocation")
_FULL_DISK = (
    "No space left on device",  # of safetensors, tokenizers, llama.cpp
    "Disk quota exceeded",
    "PytorchStreamWriter failed",  # of torch.save, as the next two
    "iostream error",
    "unexpected pos ",
    "requested and 0 written",  # of numpy
)


class UserError(Exception):
    """A mistake that the user can repair: printed without a traceback, exit code 2."""

    exit_code = 2

    def __init__(self, what: str, why: str, fix: str) -> None:
        """Keep apart what was found, why that does not work, and the command that mends it."""
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
    """Ctrl-C or SIGTERM ended the work at a point from which it can go on: exit code 130 or 143."""

    def __init__(self, what: str, why: str, fix: str, *, exit_code: int = 130) -> None:
        """Keep the parts of a message, and the code of the signal."""
        super().__init__(what, why, fix)
        self.exit_code = exit_code


class GateError(Exception):
    """A check that must hold did not: exit code 1, with the figures that failed."""

    exit_code = 1


@contextmanager
def reading(what: str, fix: str) -> Iterator[None]:
    """Turn what a library raises for a model's files that it cannot use into one error.

    Damaged files bring out errors of every kind, plain `Exception` among them, so all are taken; a
    missing package is none of the files' faults.

    Raises:
        ModelError: Anything went wrong within.
    """
    try:
        yield
    except (UserError, ImportError):
        raise
    except Exception as error:
        said = str(error).strip()
        if type(error).__name__ == "OutOfMemoryError":
            why = f"the GPU's memory is full: {said.splitlines()[0]}"
            fix = "free it (nvidia-smi shows who holds it), or take --model.weights nf4"
        else:
            more = " ..." * (len(said) > _SHOWN_CHARACTERS)
            why = f"it cannot be loaded: {type(error).__name__}: {said[:_SHOWN_CHARACTERS]}{more}"
        raise ModelError(what, why, fix) from error


def count_of(number: float, noun: str) -> str:
    """Write a number with its noun, such as `1 call` and `2 calls`."""
    return f"{number:,.10g} {noun}{'s' * (number != 1)}"


def plainly(error: Exception) -> str:
    """Give what an error says; one of the system without its number and the file's name."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return str(getattr(error, "strerror", None) or error)


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Go on in a message with the known word that is nearest; nothing where none is near."""
    near = get_close_matches(str(given), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """Write a value for a message; of a long one only the beginning."""
    text = repr(value)
    return text if len(text) <= _SHOWN_VALUE else f"{text[:_SHOWN_VALUE]} ..."


def wrong_type(what: str, given: object, wanted: str) -> ConfigError:
    """Say that Python code has given a value of another type than is wanted."""
    why = f"its type is {type(given).__name__}"
    return ConfigError(f"{what} {shown(given)}", why, f"give {wanted}")


def printable(value: object, *, one_line: bool = False) -> str:
    r"""Write characters that steer a terminal, turn text round or fit in no file as escapes.

    Control characters become `\x1b` and the like, line breaks and tabs where it must be one line.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match.group())
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return (_NOT_IN_A_LINE if one_line else _UNPRINTABLE).sub(escape, str(value))


def is_full_disk(error: BaseException) -> bool:
    """Say whether an error comes of a full disk, in the words of the library that met it."""
    return any(
        (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(one) for words in _FULL_DISK)
        for one in _chain(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error comes of a full GPU; cuBLAS tells that in an ordinary RuntimeError."""
    return any(
        type(one).__name__ == "OutOfMemoryError"
        or any(words in str(one).lower() for words in _FULL_GPU)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
