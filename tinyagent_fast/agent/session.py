"""An agent as a user asks for it: whose tools, who judges, what it shows, and where traces go."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shlex
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any, Literal

from tinyagent_fast.agent.loop import (
    Agent,
    AgentSettings,
    Allow,
    Joiner,
    OnEvent,
    Outcome,
    RuleJoiner,
    allow_all,
)
from tinyagent_fast.agent.models import (
    OWN_JOINER_TEXT,
    JoinerText,
    ModelJoiner,
    StreamingModel,
    joiner_text_of,
)
from tinyagent_fast.agent.sandbox import sandbox_for
from tinyagent_fast.agent.tools import RunnableTool, mcp_tools, plain_tools, tools_of_module
from tinyagent_fast.data.cache import load_examples
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ConfigError, plainly
from tinyagent_fast.inference.planner import Planner
from tinyagent_fast.inference.second_look import known_tools
from tinyagent_fast.plans.drawing import PlanDrawing, draw_plan
from tinyagent_fast.plans.tools import TINYAGENT, Tool, signature_differences, with_choices
from tinyagent_fast.prompts.builder import PromptBuilder
from tinyagent_fast.runs import Run

_log = logging.getLogger(__name__)

JoinerName = Literal["auto", "model", "rule"]


@dataclass(frozen=True, kw_only=True)
class AgentSpec:
    """What an agent is made of beside its planner."""

    tools: Path | None = None
    """A Python file whose typed functions are the tools. Without it and `--mcp`, TinyAgent's 16
    tools work in a sandbox, where contacts and files are made up and nothing real is touched."""
    mcp: str | None = None
    """Command line of an MCP server, whose tools are used; it is started on stdio."""
    sandbox: Path | None = None
    """Keep the sandbox's database in this new file, to look into."""
    joiner: JoinerName = "auto"
    """Who judges the observations: the model, or a rule; `auto` is the model where it was trained
    on join points, else the rule."""
    max_replans: int = AgentSettings.max_replans
    """How often another plan is made at most."""
    call_timeout_s: float = AgentSettings.call_timeout_s
    """Longest time for one call; a tool may have its own."""
    trace: Path | None = None
    """File that gets a line of JSON for each request; by default agent/traces.jsonl in the run's
    folder."""

    @cached_property
    def own_tools(self) -> Mapping[str, RunnableTool] | None:
        """The tools of the Python file, which is run when they are first asked for."""
        return tools_of_module(self.tools) if self.tools else None

    def check(self) -> None:
        """Refuse what makes no sense, before a model is loaded.

        Raises:
            ConfigError: Tools come from two places, a file is there already, or a limit is odd.
        """
        if self.tools and self.mcp:
            raise ConfigError("--tools with --mcp", "tools come from one place", "leave one out")
        if self.mcp is not None:
            _refuse_no_program(self.mcp)
        if self.sandbox and (self.tools or self.mcp or self.sandbox.exists()):
            why, fix = "own tools need no sandbox", "leave it out"
            if self.sandbox.exists():
                why, fix = "the file exists", "name a new file, or leave it out"
            raise ConfigError(f"--sandbox {self.sandbox}", why, fix)
        if self.max_replans < 0 or not 0 < self.call_timeout_s < math.inf:
            raise ConfigError(
                f"--max-replans {self.max_replans} --call-timeout-s {self.call_timeout_s}",
                "the first cannot be negative, and the second must be above 0 and finite",
                "give other numbers",
            )


def _refuse_no_program(command: str) -> None:
    fix = "give the command line that starts the server"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--mcp {command}", f"it is no command line: {error}", fix) from error
    if not words:
        raise ConfigError("--mcp", "it is empty", fix)
    if shutil.which(words[0]) is None:
        raise ConfigError(
            f"--mcp {command}", f"there is no program {words[0]} that can be started", fix
        )


@dataclass(frozen=True, kw_only=True)
class OpenAgent:
    """A planner with tools that can be run; it answers requests, also several at once."""

    planner: Planner
    prompts: PromptBuilder
    """Makes prompts as the planner's does; a grammar of them knows the tools' choices."""
    joiner: Joiner
    tools: Mapping[str, RunnableTool]
    real: bool
    """Whether calls may change something outside a sandbox."""
    settings: AgentSettings
    trace: Path | None
    """File that gets a line of JSON for each request."""

    @property
    def plain_tools(self) -> dict[str, Tool]:
        """The tools as plans know them."""
        return plain_tools(self.tools)

    @property
    def notes(self) -> list[str]:
        """What a user should know before anything is run."""
        if not self.real:
            return ["in a sandbox: nothing real is touched"]
        known = self.planner.tools or TINYAGENT
        missing = [name for name in known if name not in self.tools]
        more = [name for name in self.tools if name not in known]
        told = {
            "the model may call what is not among the tools": missing,
            "the model does not know these tools, so no plan should call them": more,
        }
        return [f"note: {what}: {', '.join(names)}" for what, names in told.items() if names]

    async def answer(
        self,
        request: str,
        system: str | None = None,
        *,
        allow: Allow = allow_all,
        on_event: OnEvent = lambda _kind, _content: None,
    ) -> Outcome:
        """Plan, carry out, judge, and write the trace; a system text for it alone may be given.

        Raises:
            ConfigError: The trace cannot be written; nothing has been carried out then.
        """
        model = StreamingModel(self.planner)
        agent = Agent(model, self.joiner, self.tools, self.settings, allow=allow, on_event=on_event)
        prompt = self.prompts.build(request, system).prompt
        with _trace_file(self.trace) if self.trace is not None else nullcontext() as stream:
            outcome = await agent.run(request, prompt)
            if stream is not None:
                _write_trace(stream, outcome)
        return outcome


def _trace_file(path: Path) -> RawIOBase:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)  # so that closing it has nothing left to write
    except OSError as error:
        why, fix = f"it cannot be written: {plainly(error)}", "name another file with --trace"
        raise ConfigError(f"trace {path}", why, fix) from error


def _write_trace(stream: RawIOBase, outcome: Outcome) -> None:
    """Add a line; calls have been carried out, so a full disk must not keep their outcome back."""
    line = json.dumps(outcome.to_json(), ensure_ascii=False) + "\n"
    data = line.encode(errors="backslashreplace")
    try:
        if (written := stream.write(data) or 0) < len(data):
            # Half a line would spoil the next one too.
            stream.truncate(stream.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        _log.warning("the trace lacks this request: %s", plainly(error))


@asynccontextmanager
async def open_agent(
    planner: Planner, spec: AgentSpec, own_tools: Mapping[str, RunnableTool] | None = None
) -> AsyncIterator[OpenAgent]:
    """Open the tools that are meant, and give an agent that plans with them.

    The planner stays the caller's to close. `own_tools` are those of a program, instead of the
    ones that the spec names.

    Raises:
        ConfigError: An MCP server does not answer, or the planner can call none of the tools, or
            knows them with other parameters.
        DataError: A Python file gives no tools, or the run's test file is faulty.
    """
    run = planner.run
    text = joiner_of_run(run, spec.joiner, None)
    joiner = RuleJoiner() if text is None else ModelJoiner(StreamingModel(planner).complete, text)
    async with AsyncExitStack() as stack:
        own = spec.own_tools if own_tools is None else own_tools
        if own is not None:
            tools = own
        elif spec.mcp:
            tools = await stack.enter_async_context(mcp_tools(spec.mcp))
        else:
            box = sandbox_for(None, planner.tools, path=spec.sandbox, time_scale=1.0)
            stack.callback(box.close)
            tools = box.tools
        prompts = planner.prompts
        if own is not None or spec.mcp:
            refuse_unplanned(planner.tools, tools, grammar=prompts.grammar)
            known = with_choices(known_tools(planner.tools), plain_tools(tools))
            prompts = replace(prompts, tools=known)
        yield OpenAgent(
            planner=planner,
            prompts=prompts,
            joiner=joiner,
            tools=tools,
            real=own is not None or bool(spec.mcp),
            settings=AgentSettings(
                max_replans=spec.max_replans, call_timeout_s=spec.call_timeout_s
            ),
            trace=spec.trace or (run.path / "agent" / "traces.jsonl" if run else None),
        )


def refuse_unplanned(
    planned: Mapping[str, Tool] | None, tools: Mapping[str, RunnableTool], *, grammar: bool
) -> None:
    """Refuse tools that the model cannot call rightly, as it plans with `planned`.

    Raises:
        ConfigError: One of them takes other parameters than the model knows; or, where a grammar
            lets it call what it knows alone, none of them is known.
    """
    known = TINYAGENT if planned is None else planned
    if found := signature_differences(plain_tools(tools), known):
        raise ConfigError(
            "tools that the model knows with other parameters",
            "\n       ".join(found),
            "give functions and catalogue the same parameters (`tools check FILE --catalogue "
            "FILE`), and name a run that was trained on them with --run",
        )
    if grammar and not set(known) & set(tools):
        raise ConfigError(
            f"tools {', '.join(tools)}",
            f"the model plans with none of them, but with {', '.join(known)}",
            "train on a catalogue of your tools (docs/own_tools.md), and name that run with --run",
        )


def joiner_of_run(run: Run | None, wanted: JoinerName, test: Path | None) -> JoinerText | None:
    """Choose who judges: give the text that asks the model to, or None for the rule.

    The text is found in the join points of `test`, a file in the published schema, or of the run's
    test file.

    Raises:
        DataError: The file is faulty.
    """
    trained = run is not None and run.config().data.points in ("join", "all")
    if wanted == "rule" or (wanted == "auto" and not trained):
        return None
    joins = join_points(run, test)
    return joiner_text_of(joins[0]) if len(joins) else OWN_JOINER_TEXT


def join_points(run: Run | None, test: Path | None) -> Sequence[Example]:
    """Read the join points of a test file, or of the run's; none where it is not here."""
    path = test or (run.test_file() if run else None)
    if path is None or not path.exists():
        return ()
    return load_examples(path, on_bad_entry="skip", points="join")


@dataclass(eq=False)
class PlanUnderWay:
    """The plan that an agent is at, as a graph that fills in; it takes the agent's events."""

    tools: Mapping[str, Tool]
    """Those that plans may call."""
    text: str = ""
    _ended: bool = False
    _outcomes: dict[int, tuple[str, str]] = field(default_factory=dict)

    def on_event(self, kind: str, content: Mapping[str, Any]) -> bool:
        """Take an event of the agent, and say whether the drawing has changed."""
        if kind == "plan":
            self.text, self._ended, self._outcomes = "", False, {}
        elif kind == "text":
            self.text += content["piece"]
            return "\n" in content["piece"]
        elif kind == "start":
            self._outcomes[content["number"]] = ("running", "")
        elif kind == "observation":
            self._outcomes[content["number"]] = (content["status"], content["observation"])
        elif kind == "join":
            self._ended = True
        return kind in ("plan", "start", "observation", "join")

    @property
    def drawing(self) -> PlanDrawing:
        """The plan as far as it is written, with what became of its calls."""
        drawing = draw_plan(self.text, self.tools, finished=self._ended)
        return drawing.with_outcomes(self._outcomes)
