"""The command line: finds the command, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 a gate failed, 2 the user can repair it, 3 a bug, 130 stopped by Ctrl-C,
143 stopped by SIGTERM.
"""

from __future__ import annotations

import codecs
import errno
import importlib
import io
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise

_RIGHTS = "look at the rights of that place, or name another one"
_SPACE = "free some space, or name another place; the same command goes on"
_NAME = "take a shorter or simpler name"
_MEDIUM = "look at that disk or network drive, or name another place"
_FILE_ERRORS = {
    errno.EACCES: _RIGHTS, errno.EPERM: _RIGHTS, errno.EROFS: _RIGHTS,
    errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EFBIG: _SPACE,
    errno.ENAMETOOLONG: _NAME, errno.EILSEQ: _NAME, errno.ELOOP: _NAME,
    errno.EIO: _MEDIUM, errno.ESTALE: _MEDIUM, errno.EOPNOTSUPP: _MEDIUM, errno.ENOLCK: _MEDIUM,
    errno.EEXIST: "move it away", errno.ENOTEMPTY: "move it away",
    errno.ENOTDIR: "a file stands where a folder is wanted: move it away, or name another place",
    errno.EISDIR: "a folder stands where a file is wanted: move it away, or name another place",
    errno.EMFILE: "close other programs, or raise the limit (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the limit (ulimit -n)",
    errno.ENOMEM: "close other programs",
}  # fmt: skip
"""What a user's files, rights and disks give, and what to do; other errors are bugs."""

COMMANDS = {
    "train": ("train", "train an adapter: data, rows, LoRA, best checkpoint by plan success"),
    "memory": ("memory", "memory and hours of a config on a card, before renting one"),
    "eval": ("evaluate", "generate plans for the test file with a run's adapter and score them"),
    "score": ("score", "score predictions or a list of label/prediction pairs; needs no torch"),
    "export": ("export", "merged weights and GGUF files of a run, proved against its adapter"),
    "chat": ("chat", "type a request, see its plan being written and its graph drawn"),
    "agent": (
        "agent",
        "plan a request, carry it out, judge it: in a sandbox, or with your tools",
    ),
    "agent-eval": ("agent_eval", "task success: a run's plans are carried out in a sandbox"),
    "tools check": (
        "tools_check",
        "check tools of your own: functions, a catalogue, or both",
    ),
    "serve": ("serve", "the same as a small web page on this machine"),
    "report": ("report", "a run as one HTML page and as Markdown"),
    "compare": ("compare", "two runs on the same queries: difference, interval, what flipped"),
    "doctor": ("doctor", "what this machine has and lacks for a config, with the fix"),
    "preview": ("preview", "show rows with their supervised tokens in colour"),
    "data check": ("data_check", "report on a data file: counts, lengths, leaks, faults"),
    "data roundtrip": ("data_roundtrip", "take system prompts apart and put them together again"),
    "data retrieval": ("data_retrieval", "train a tool retriever, and say how well it finds tools"),
    "data generate": ("data_generate", "write a generated dataset in the published schema"),
    "data download": ("data_download", "download the published dataset"),
}
"""Command to its module in `tinyagent_fast.commands` and its one-line help."""
_GOES_ON = {
    "eval": "the same command goes on; plans that were written are kept",
    "export": "the same command goes on; files that are whole are kept",
    "data download": "the same command goes on where the transfer stopped",
    "train": "no step was made, so there is no new run; generated data, encoded rows and a base "
    "are kept where they were finished; start again with: {command}",
}
"""What to do after a stop, by command; once there is a run, `train` says it itself."""


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Write characters that a console has not as JSON does, so that JSON stays JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    units = (int.from_bytes(text[at : at + 2], "big") for at in range(0, len(text), 2))
    return "".join(f"\\u{unit:04x}" for unit in units), error.end


def _print_everything() -> None:
    """Let no character that a console has not end a command."""
    codecs.register_error("escaped", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="escaped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the arguments after the program's name, and give its exit code."""
    if arguments is None:
        _print_everything()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from tinyagent_fast.version import __version__

        print(f"tinyagent-fast {__version__}")
        return 0
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            from tinyagent_fast.interrupts import STOP_SIGNALS, exit_code, noting_interrupts

            with noting_interrupts():
                code = _run(name, words[length:])
            if arguments is None:
                # The process ends now, and a Ctrl-C would only break that off with a traceback:
                # after a stop it changes nothing more, after other ends it is quicker.
                stopped = code in map(exit_code, STOP_SIGNALS)
                for number in STOP_SIGNALS:
                    signal.signal(number, signal.SIG_IGN if stopped else signal.SIG_DFL)
            return code
    if words[0] in ("data", "tools") and words[1:2] in (["-h"], ["--help"]):
        print(_help())
        return 0
    print(_unknown(words), file=sys.stderr)
    return 2


def _run(name: str, arguments: list[str]) -> int:
    from tinyagent_fast.errors import GateError, UserError, printable
    from tinyagent_fast.interrupts import unwrapping_interrupts

    try:
        with unwrapping_interrupts():
            _refuse_empty(name, arguments)
            from tinyagent_fast.models.libraries import quieten, set_environment

            quieten()  # before the first import that reaches bitsandbytes
            set_environment()
            module = importlib.import_module(f"tinyagent_fast.commands.{COMMANDS[name][0]}")
            code = int(module.run(arguments))
            sys.stdout.flush()  # here, where a closed pipe is no error yet
            return code
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return _read_enough()
    except KeyboardInterrupt as stop:
        return _stopped(name, arguments, stop)
    except SystemExit as leave:
        if isinstance(leave.__context__, BrokenPipeError):  # rich makes it an exit with code 1
            return _read_enough()
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        print(leave.code, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name or error.name == "tinyagent_fast":
            return _bug()
        print(_not_installed(name, error), file=sys.stderr)
        return 2
    except Exception as error:
        if (told := _explained(name, error)) is None:
            return _bug()
        print(f"error: {told}", file=sys.stderr)
        return 2
    except BaseException:  # a panic in Rust code is none of Exception
        return _bug()


def _refuse_empty(name: str, arguments: list[str]) -> None:
    """Refuse a value without a character, such as that of a variable which is not set.

    Words are looked at, as a parsed path of no character is the folder here. `compare` itself says
    which of its two names is empty, and no more.
    """
    from tinyagent_fast.errors import UserError

    for before, word in pairwise([name, *arguments]):
        named = word == "" and name == "compare" and not before.startswith("--")
        if (word == "" and not named) or (
            word.startswith("--") and word.find("=") == len(word) - 1
        ):
            what = word or f"{before} ''"
            raise UserError(what, "the value is empty", "give one, or leave it out")


def _read_enough() -> int:
    """End quietly where the reader of the output, such as `head`, has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _stopped(name: str, arguments: Sequence[str], stop: KeyboardInterrupt) -> int:
    """Say what stopped a command and how it goes on; give the exit code."""
    from tinyagent_fast.interrupts import NAMES, Terminated, exit_code

    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    command = shlex.join(["tinyagent-fast", *name.split(), *arguments])
    goes_on = f"; {_GOES_ON[name].format(command=command)}" if name in _GOES_ON else ""
    print(f"stopped by {NAMES[number]}{goes_on}", file=sys.stderr)
    return exit_code(number)


def _explained(name: str, error: Exception) -> Exception | None:
    """Turn what the machine of a user refuses into message, cause and fix; None for a bug."""
    from tinyagent_fast.errors import UserError, is_full_disk

    number, place = getattr(error, "errno", None), getattr(error, "filename", None)
    what, why = str(place or f"tinyagent-fast {name}"), getattr(error, "strerror", None)
    if isinstance(error, MemoryError):
        return UserError(what, "the memory is full", "close other programs, or take smaller values")
    if isinstance(error, OSError) and number in _FILE_ERRORS:
        return UserError(what, why or str(error), _FILE_ERRORS[number])
    if is_full_disk(error):
        return UserError(what, "the disk is full", _SPACE)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        why = f"a name or text has bytes that are no characters: {ascii(error.object)[:80]}"
        return UserError(what, why, _NAME)
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return UserError(what, "a name has a character of value 0 in it", _NAME)
    return None


def _bug() -> int:
    traceback.print_exc()
    print("this is a bug: please report it with the lines above", file=sys.stderr)
    return 3


def _not_installed(command: str, error: ModuleNotFoundError) -> str:
    from tinyagent_fast.errors import UserError

    why = f"it needs the package {error.name!r}, which is not installed here"
    fix = "install the project with its `train` extra (make setup does)"
    return f"error: {UserError(f'tinyagent-fast {command}', why, fix)}"


def _help() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = ["usage: tinyagent-fast COMMAND [flags]", "", "commands:"]
    lines += [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "tinyagent-fast COMMAND --help lists a command's flags."]
    return "\n".join(lines)


def _unknown(words: list[str]) -> str:
    from tinyagent_fast.errors import did_you_mean

    asked = " ".join(words[:2]) if words[0] in ("data", "tools") else words[0]
    hint = did_you_mean(asked, COMMANDS)
    if words in (["data"], ["tools"]):
        meant = [repr(name) for name in COMMANDS if name.startswith(f"{words[0]} ")]
        hint = f"; did you mean {' or '.join(meant)}?"
    return f"error: unknown command {asked!r}{hint}\n\n{_help()}"


if __name__ == "__main__":
    sys.exit(main())
