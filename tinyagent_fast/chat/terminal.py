"""Ask a planner in the terminal: plans as they are written, their graphs."""

from __future__ import annotations

from contextlib import closing, suppress

from rich.console import Console
from rich.text import Text

from tinyagent_fast.errors import UserError, did_you_mean, printable
from tinyagent_fast.inference.planner import Planner, PlanStream


def show_stream(console: Console, stream: PlanStream) -> None:
    """Print a plan as it is written, then its drawing and what it cost."""
    # Closed here, not when memory is tidied up, since a plan that was broken off holds its turn.
    shown = ""
    with console.status("reading the prompt") as status, closing(iter(stream)) as pieces:
        for piece in pieces:
            if piece:
                status.stop()
                console.out(printable(piece), end="", highlight=False)
                shown += piece
    console.out("")
    if stream.text.strip() != shown.strip():
        console.print("looked at once more, this is the plan:", style="dim")
        console.out(printable(stream.text), highlight=False)
    console.print(stream.drawing)
    if stream.result is not None:
        console.print(Text(stream.result.cost(), style="dim"))


_HELP = """what can be typed:
  a request    what should be done, in your words: its plan is written and drawn, nothing is run
  help, /help  this text
  quit, exit   end, as Ctrl-D does, also /quit and /exit
  //...        a request that begins with a slash: the first one is left out
Ctrl-C breaks a plan off."""

_COMMANDS = ("/help", "/quit", "/exit")
_NO_COMMAND = (
    "there is no command {}{}; the commands are "
    + ", ".join(_COMMANDS)
    + "; a request that begins with a slash is typed with two"
)


def converse(console: Console, planner: Planner) -> None:
    """Answer requests until the input ends, or `quit` or `exit` is typed; `help` helps."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives the prompt a history and line editing)
    console.print(
        "Type a request; Ctrl-C breaks a plan off, Ctrl-D ends, help says more.", style="dim"
    )
    while True:
        try:
            request = input("\nrequest> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D ends", style="dim")
            continue
        word = request.lower().removeprefix("/")
        if word in ("quit", "exit"):
            return
        if word == "help":
            console.print(_HELP, style="dim")
        if request == "" or word == "help":
            continue
        if request.startswith("/") and not request.startswith("//"):
            said = request.split()[0]
            near = did_you_mean(said.lower(), _COMMANDS)
            near = " with more words" if said.lower() in _COMMANDS else near
            console.print(Text(_NO_COMMAND.format(printable(said), near), style="red"))
            continue
        request = request.removeprefix("/")
        try:
            stream = planner.stream(request)
            if planner.prompts.retrieve is not None:
                console.print(Text(f"system text: {printable(stream.built.source)}", style="dim"))
            show_stream(console, stream)
        except KeyboardInterrupt:
            console.print("\nbroken off", style="dim")
        except UserError as error:
            console.print(Text(str(error), style="red"))
