"""Plans and verdicts of a planner's model, for one agent as it writes or for many at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from tinyagent_fast.agent.loop import Execution, Pieces, Verdict, scratchpad
from tinyagent_fast.data.generation.prompts import joiner_prompt
from tinyagent_fast.inference.engine import Completion, Prompt
from tinyagent_fast.inference.planner import Planner, PlanStream
from tinyagent_fast.plans.grammar import END_OF_PLAN, END_OF_RESPONSE, parse_joiner
from tinyagent_fast.prompts.builder import BuiltPrompt

if TYPE_CHECKING:
    from tinyagent_fast.data.schema import Example

Complete = Callable[[Prompt, str], Awaitable[Completion]]
"""Completes a prompt up to a stop string."""


class _Left(Exception):
    """Nobody waits any more for what a model writes."""


async def _completed(planner: Planner, prompts: Sequence[Prompt], stop: str) -> list[Completion]:
    """Complete prompts in a thread, which a cancel ends with the next token that is written."""
    left = threading.Event()

    def watch(_index: int, _text: str) -> None:
        if left.is_set():
            raise _Left

    try:
        return await asyncio.to_thread(planner.complete, prompts, stop, watch)
    finally:
        left.set()


@dataclass(frozen=True)
class StreamingModel:
    """A planner that writes for one agent; its plans can be run while they are written."""

    planner: Planner
    """It stays the caller's to close."""

    async def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
        """Write a plan piece by piece; leaving early breaks the model off."""
        # Its calls run while it is written, so nothing that was shown may be taken back.
        built = BuiltPrompt(prompt, "an agent")
        stream = PlanStream(self.planner, prompt.user, built, second_look=False)
        loop, left = asyncio.get_running_loop(), threading.Event()
        arrived: asyncio.Queue[str | None] = asyncio.Queue()

        def write() -> None:
            """Take the whole stream in one thread, as a generator is used by one at a time."""
            try:
                with closing(iter(stream)) as pieces:
                    for piece in pieces:
                        loop.call_soon_threadsafe(arrived.put_nowait, piece)
                        if left.is_set():
                            return
            finally:
                loop.call_soon_threadsafe(arrived.put_nowait, None)

        writing = asyncio.ensure_future(asyncio.to_thread(write))
        try:
            while (piece := await arrived.get()) is not None:
                yield piece
        finally:
            left.set()
            await asyncio.wait({writing})
        writing.result()
        if stream.result is not None:
            done(stream.result.completion)

    async def complete(self, prompt: Prompt, stop: str) -> Completion:
        """Complete a prompt, such as a joiner's."""
        (done,) = await _completed(self.planner, [prompt], stop)
        return done


@dataclass(eq=False)
class BatchedModel:
    """A planner that writes for many agents: what they ask while it is busy is its next batch.

    A prompt that comes again is answered from memory, as greedy decoding would answer it the same.
    """

    planner: Planner
    """Its `batch` is the size of batches; it stays the caller's to close."""
    on_progress: Callable[[int, int], None] = lambda _done, _asked: None
    """Told how many prompts are answered and how many were asked."""
    _asked: dict[tuple[Prompt, str], asyncio.Future[Completion]] = field(default_factory=dict)
    _waiting: list[tuple[Prompt, str]] = field(default_factory=list)
    _working: asyncio.Task[None] | None = None

    async def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
        """Write a plan, and give it in one piece."""
        completion = await self.complete(prompt, END_OF_PLAN)
        done(completion)
        yield completion.text

    async def complete(self, prompt: Prompt, stop: str) -> Completion:
        """Complete a prompt in the next batch."""
        key = (prompt, stop)
        if key not in self._asked:
            self._asked[key] = asyncio.get_running_loop().create_future()
            self._waiting.append(key)
            if self._working is None:
                self._working = asyncio.create_task(self._work())
        return await asyncio.shield(self._asked[key])

    async def _work(self) -> None:
        batch: list[tuple[Prompt, str]] = []
        try:
            while self._waiting:
                stop = self._waiting[0][1]
                batch = [key for key in self._waiting if key[1] == stop][: self.planner.batch]
                prompts = [prompt for prompt, _ in batch]
                done = await _completed(self.planner, prompts, stop)
                for key, completion in zip(batch, done, strict=True):
                    self._waiting.remove(key)
                    self._asked[key].set_result(completion)
                self.on_progress(len(self._asked) - len(self._waiting), len(self._asked))
        except BaseException as error:
            for asked in map(self._asked.__getitem__, self._waiting):
                if isinstance(error, Exception):
                    asked.set_exception(error)
                else:
                    asked.cancel()
            self._waiting.clear()
            if not isinstance(error, Exception):
                raise
        finally:
            self._working = None


@dataclass(frozen=True, kw_only=True)
class JoinerText:
    """What stands around request and observations in a joiner's prompt."""

    system: str | None
    before: str

    def prompt(self, request: str, executions: Sequence[Execution]) -> Prompt:
        """Make the prompt that asks for a verdict."""
        seen = scratchpad(executions)
        return Prompt(system=self.system, user=f"{self.before}Question: {request}\n\n{seen}\n")


OWN_JOINER_TEXT = JoinerText(system=None, before=joiner_prompt("", "").partition("Question:")[0])
"""That of generated data."""


def joiner_text_of(example: Example) -> JoinerText:
    """Take the text out of a join point of any data: all that stands before its question."""
    before, found, _ = example.user.rpartition(f"Question: {example.query}\n")
    return JoinerText(system=example.system, before=before) if found else OWN_JOINER_TEXT


@dataclass(frozen=True)
class ModelJoiner:
    """Asks the model for a verdict on the observations."""

    complete: Complete
    """That of one of the models here."""
    text: JoinerText = OWN_JOINER_TEXT
    """As in the data that the model was trained on."""
    name: ClassVar = "model"

    async def judge(self, request: str, executions: Sequence[Execution], *, last: bool) -> Verdict:
        """Ask; an answer without an action is a Finish, as it is for the app."""
        done = await self.complete(self.text.prompt(request, executions), END_OF_RESPONSE)
        answer = parse_joiner(done.text)
        if answer.action is None:
            answer = replace(answer, action="Finish")
        return Verdict(answer=answer, completion=done)
