"""The command line: finds the command, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 a gate failed, 2 the user can repair it, 3 a bug, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

_FILE_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST,
    errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip
"""What a user's files, rights and disks give; other errors of the system are bugs."""

COMMANDS = {
    "train": ("train", "train an adapter: data, rows, LoRA, best checkpoint by plan success"),
    "memory": ("memory", "memory and hours of a config on a card, before renting one"),
    "eval": ("evaluate", "generate plans for the test file with a run's adapter and score them"),
    "score": ("score", "score predictions or a list of label/prediction pairs; needs no torch"),
    "export": ("export", "merged weights and GGUF files of a run, proved against its adapter"),
    "chat": ("chat", "type a request, see its plan being written and its graph drawn"),
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
_CTRL_C = 130  # as shells have it: 128 and the number of the signal
_FORMER_NAMES = {"plan": "memory"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the arguments after the program's name, and give its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from tinyagent_fast.version import __version__

        print(f"tinyagent-fast {__version__}")
        return 0
    if words[0] in _FORMER_NAMES:
        print(f"`{words[0]}` is now called `{_FORMER_NAMES[words[0]]}`", file=sys.stderr)
        words[0] = _FORMER_NAMES[words[0]]
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            from tinyagent_fast.interrupts import noting_interrupts

            with noting_interrupts():
                code = _run(name, words[length:])
            if arguments is None and code == _CTRL_C:
                # The process ends now: a further Ctrl-C would only break that off with a traceback.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return code
    if words[0] == "data" and words[1:2] in (["-h"], ["--help"]):
        print(_help())
        return 0
    print(_unknown(words), file=sys.stderr)
    return 2


def _run(name: str, arguments: list[str]) -> int:
    from tinyagent_fast.errors import GateError, UserError

    # Threads that spin for long while they wait starve each other on a shared machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        module = importlib.import_module(f"tinyagent_fast.commands.{COMMANDS[name][0]}")
        code = int(module.run(arguments))
        sys.stdout.flush()  # here, where a closed pipe is no error yet
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return _CTRL_C
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        print(leave.code, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name or error.name == "tinyagent_fast":
            return _bug()
        print(_not_installed(name, error), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            return _bug()
        print(f"error: {_file_error(name, error)}", file=sys.stderr)
        return 2
    except Exception:
        return _bug()


def _file_error(name: str, error: OSError) -> Exception:
    from tinyagent_fast.errors import UserError

    return UserError(
        str(error.filename or f"tinyagent-fast {name}"),
        error.strerror or str(error),
        "look at the rights and the free space of that place, or name another one",
    )


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
    import difflib

    asked = " ".join(words[:2]) if words[0] == "data" else words[0]
    near = difflib.get_close_matches(asked, COMMANDS, n=1)
    if words == ["data"]:
        near = [name for name in COMMANDS if name.startswith("data ")]
    hint = f"; did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
    return f"error: unknown command {asked!r}{hint}\n\n{_help()}"


if __name__ == "__main__":
    sys.exit(main())
