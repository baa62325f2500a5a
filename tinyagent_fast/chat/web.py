"""A small web page for one person on one machine: requests in, plans streamed out as events.

`GET /` is the page, `GET /planner` says what plans, and `POST /plan` answers with server-sent
events. So does `POST /agent`, which also carries the plan out; what it asks for is answered by
`POST /allow`. Other sites must not get at it through the user's browser: names that lead here by
DNS rebinding are refused, and so are posts from other origins.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import socket
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyagent_fast.agent.loop import Outcome
from tinyagent_fast.agent.session import OpenAgent, PlanUnderWay
from tinyagent_fast.agent.tools import RunnableTool
from tinyagent_fast.errors import ConfigError, UserError, plainly
from tinyagent_fast.inference.planner import Planner, PlanStream
from tinyagent_fast.plans.drawing import PlanDrawing
from tinyagent_fast.plans.grammar import render_call

MAX_REQUEST_CHARS = 20_000
MAX_WAITING = 16
"""Requests that may wait for the one that is being answered."""
_MAX_BODY_BYTES = 1_000_000
_MAX_CONNECTIONS = 64
_LOOK_ROUND_S = 0.5
"""How often a request under way looks whether the server closes."""
_ARRIVAL_S = 20.0
"""For a request to arrive whole."""
_READER_S = 20.0
"""For a reader to take what is sent, before another's turn."""
_CLOSING_S = 5
"""After Ctrl-C, for requests that are still being sent or read."""
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before the model is loaded, which can take long; port 0 is a free one.

    Raises:
        ConfigError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host {host} --port {port}",
            f"nothing can listen there: {plainly(error)}",
            "take another --port (0 finds a free one), or --host 127.0.0.1",
        ) from error


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address, as far as its name tells."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allows_host(header: str | None, host: str) -> bool:
    """Say whether a Host header is one that a user may have typed.

    A page whose name is made to point here would send that name. Behind a wildcard address any
    literal address is fine, since rebinding needs a name. The port may differ, as it does through
    an SSH tunnel. (Starlette's TrustedHostMiddleware knows lists of names only.)
    """
    try:
        parts = urlsplit(f"//{header or ''}")
        name = parts.hostname if parts.port is None or parts.port > 0 else None
        if name in ("localhost", host.lower()):
            return True
        address = ipaddress.ip_address(name or "")
    except ValueError:
        return False
    return address.is_loopback or not is_loopback(host)


_Answer = Callable[[asyncio.Event, Send], Awaitable[None]]
"""Sends all events of an answer; the first is set when a request has left the queue."""


class _Impatient(H11Protocol):
    """Lets nobody hold a connection, or the model, by sending or reading nothing; uvicorn would."""

    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the first request its time."""
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        """Give the next request its time."""
        super().on_response_complete()
        self._expect_request()

    def _expect_request(self) -> None:
        former = self.cycle

        def look() -> None:
            if self.cycle is former or self.cycle.more_body:
                self.transport.abort()

        self.loop.call_later(_ARRIVAL_S, look)

    def pause_writing(self) -> None:
        """Give the reader time, once much is on the way."""
        super().pause_writing()
        self._reading = self.loop.call_later(_READER_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on, as the reader does."""
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()


@dataclass(frozen=True)
class _OwnNamesOnly:
    """Answers requests that name this server, and refuses all others before anything is read."""

    app: ASGIApp
    host: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = Headers(scope=scope).get("Host")
        if allows_host(name, self.host):
            await self.app(scope, receive, send)
            return
        reason = f"this server does not answer to the name {name!r}"
        await _refusal(HTTPStatus.MISDIRECTED_REQUEST, reason)(scope, receive, send)


class PlannerServer:
    """The addresses, and the queue before the model, which writes one plan at a time."""

    def __init__(
        self,
        planner: Planner,
        listener: socket.socket,
        host: str,
        agent: AbstractAsyncContextManager[OpenAgent],
        *,
        ask: bool = True,
    ) -> None:
        """Prepare to serve.

        Args:
            planner: Writes the plans.
            listener: Where requests arrive; closed when the serving ends.
            host: Address or name by which it was asked for.
            agent: Carries plans out; it is opened where the serving begins.
            ask: Ask before each call that changes something real; else all are allowed.
        """
        self.port = int(listener.getsockname()[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        self._planner = planner
        self._listener = listener
        self._page = (files("tinyagent_fast.chat") / "page.html").read_text(encoding="utf-8")
        self._queue: list[asyncio.Event] = []
        """One for each request, in the order of arrival; set when a request has left."""
        self._opened = agent
        self._agent: OpenAgent
        self._ask = ask
        self._questions: dict[str, asyncio.Future[bool]] = {}
        """Calls that wait for a word of the user, by random names."""
        app = Starlette(
            routes=[
                Route("/", self._give_page),
                Route("/planner", self._give_facts),
                Route("/plan", self._plan, methods=["POST"]),
                Route("/agent", self._carry_out, methods=["POST"]),
                Route("/allow", self._allow, methods=["POST"]),
            ],
            middleware=[Middleware(_OwnNamesOnly, host=host)],
            exception_handlers={HTTPException: _refuse, UserError: _refuse},
        )
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            http=_Impatient,
            log_level="error",
            access_log=False,  # requests are private
            server_header=False,
            proxy_headers=False,
            headers=list(_HEADERS.items()),
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_CLOSING_S,
        )
        self._uvicorn = uvicorn.Server(config)

    def serve(self) -> None:
        """Answer requests until `stop`, or until Ctrl-C, which raises KeyboardInterrupt."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        async with self._opened as self._agent:
            self._planner.prompts = self._agent.prompts  # what is only planned knows the tools too
            await self._uvicorn.serve(sockets=[self._listener])

    def stop(self) -> None:
        """Let `serve` return, from another thread; a plan under way ends with its next piece."""
        self._uvicorn.should_exit = True

    async def _give_page(self, _: Request) -> Response:
        # A nonce: scripts and styles run only with this random word.
        nonce = secrets.token_urlsafe(16)
        policy = {"Content-Security-Policy": _POLICY.format(nonce=nonce)}
        return HTMLResponse(self._page.replace("@NONCE@", nonce), headers=policy)

    async def _give_facts(self, _: Request) -> Response:
        carried_out = "; ".join([*self._agent.notes, f"tools: {', '.join(self._agent.tools)}"])
        return _json({"facts": {**self._planner.facts, "carried out": carried_out}})

    async def _plan(self, request: Request) -> ASGIApp:
        def begin(text: str, system: str | None) -> _Answer:
            return partial(self._answer, self._planner.stream(text, system))

        return partial(self._in_turn, request, begin)

    async def _carry_out(self, request: Request) -> ASGIApp:
        def begin(text: str, system: str | None) -> _Answer:
            return partial(self._answer_by_agent, text, system)

        return partial(self._in_turn, request, begin)

    async def _allow(self, request: Request) -> Response:
        _check_origin(request.headers)
        try:
            value = json.loads(await _read_body(request))
            name, allowed = value["question"], value["allow"]
            question = self._questions.pop(name)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise HTTPException(HTTPStatus.NOT_FOUND, "nothing waits for that answer") from None
        question.set_result(allowed is True)
        return _json({})

    async def _in_turn(
        self,
        request: Request,
        begin: Callable[[str, str | None], _Answer],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Give a request a place in the queue, if there is one, until it is answered.

        A full queue is told before the body is read. The place is taken afterwards: a sender who
        is slow must not hold up those behind.
        """
        _check_origin(request.headers)
        self._refuse_if_full()
        text, system = _read_request(await _read_body(request))
        self._refuse_if_full()
        answer, place = begin(text, system), asyncio.Event()
        self._queue.append(place)
        try:
            await _send_events(partial(answer, place), receive, send)
        finally:
            self._queue.remove(place)
            for other in self._queue:
                other.set()

    def _refuse_if_full(self) -> None:
        if len(self._queue) > MAX_WAITING:
            raise HTTPException(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many requests wait; try again later"
            )

    async def _answer_by_agent(
        self, text: str, system: str | None, _: asyncio.Event, send: Send
    ) -> None:
        """Tell what an agent does until it has ended; it ends too when the reader leaves."""
        agent = self._agent
        events: asyncio.Queue[tuple[str, Mapping[str, Any]] | None] = asyncio.Queue()
        plan, ask = PlanUnderWay(agent.plain_tools), self._ask and agent.real
        story = _Story(plan, ask, self._questions, events.put_nowait)
        # A task of its own, as what it tidies up when it is cancelled takes moments of its own.
        work = asyncio.create_task(
            agent.answer(text, system, allow=story.allow, on_event=story.on_event)
        )
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await self._next_event(events)) is not None:
                await _tell(send, *event)
            if not work.done():
                await _tell(send, "failed", {"message": "the server is closing"})
                return
            await _tell(send, *_ending(work))
        finally:
            work.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({work})

    async def _next_event(self, events: asyncio.Queue[Any]) -> Any:
        """Wait for an event; None also when the server closes."""
        while not self._uvicorn.should_exit:
            with anyio.move_on_after(_LOOK_ROUND_S):
                return await events.get()
        return None

    async def _answer(self, stream: PlanStream, place: asyncio.Event, send: Send) -> None:
        while ahead := self._queue.index(place):
            await _tell(send, "waiting", {"ahead": ahead})
            await place.wait()
            place.clear()
        await anyio.to_thread.run_sync(self._write, stream, send)

    def _write(self, stream: PlanStream, send: Send) -> None:
        def say(name: str, value: Mapping[str, Any]) -> None:
            anyio.from_thread.run(_tell, send, name, value)

        say("begun", {"system_text": stream.built.source})
        try:
            # Closed here when the reader leaves, since a plan that was broken off holds its turn.
            with closing(iter(stream)) as pieces:
                for piece in pieces:
                    anyio.from_thread.check_cancelled()  # also while the prompt is being read
                    if self._uvicorn.should_exit:
                        break
                    say("piece", {"text": piece})
                    if "\n" in piece:
                        say("drawing", _shown(stream.drawing))
        except UserError as error:
            say("failed", {"message": str(error)})
            return
        except Exception:
            anyio.from_thread.check_cancelled()  # a reader who leaves is no bug
            traceback.print_exc()
            say("failed", {"message": "this is a bug; the terminal has the details"})
            return
        if stream.result is None:
            say("failed", {"message": "the server is closing"})
            return
        say("drawing", _shown(stream.drawing))
        say("done", {**stream.result.to_json(), "sentence": stream.result.cost()})


@dataclass(frozen=True)
class _Story:
    """Turns what an agent tells into events for the page, and asks the page for permission."""

    plan: PlanUnderWay
    ask: bool
    questions: dict[str, asyncio.Future[bool]]
    say: Callable[[tuple[str, Mapping[str, Any]]], None]

    def on_event(self, kind: str, content: Mapping[str, Any]) -> None:
        """Tell the page what the agent does."""
        changed = self.plan.on_event(kind, content)
        if kind == "plan":
            self.say(("plan", {"number": content["number"]}))
        elif kind == "text":
            self.say(("piece", {"text": content["piece"]}))
        elif kind in ("observation", "problem", "join"):
            self.say((kind, content))
        if changed and kind != "plan":
            self.say(("drawing", _shown(self.plan.drawing)))

    async def allow(self, tool: RunnableTool, arguments: Sequence[object]) -> bool:
        """Ask the page whether a call may be made, and wait for the answer."""
        if not self.ask:
            return True
        name = secrets.token_urlsafe(16)
        self.questions[name] = asyncio.get_running_loop().create_future()
        self.say(("ask", {"question": name, "call": render_call(tool.name, arguments)}))
        try:
            return await self.questions[name]
        finally:
            self.questions.pop(name, None)


def _ending(work: asyncio.Task[Outcome]) -> tuple[str, Mapping[str, Any]]:
    """Give the last event of an agent that has ended in whatever way."""
    error = work.exception()
    if error is None:
        outcome = work.result()
        return "end", {
            "message": outcome.message,
            "failed": outcome.failed,
            "sentence": outcome.cost_sentence(),
        }
    if isinstance(error, UserError):
        return "failed", {"message": str(error)}
    traceback.print_exception(error)
    return "failed", {"message": "this is a bug; the terminal has the details"}


async def _send_events(
    answer: Callable[[Send], Awaitable[None]], receive: Receive, send: Send
) -> None:
    """Send an answer as server-sent events, broken off when the reader leaves.

    Starlette's StreamingResponse would take each piece in another thread, and leave a plan open
    whose reader has gone.
    """
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": headers})
    async with anyio.create_task_group() as tasks:

        async def until_reader_leaves() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(until_reader_leaves)
        await answer(send)
        await send({"type": "http.response.body", "body": b""})
        tasks.cancel_scope.cancel()


def _shown(drawing: PlanDrawing) -> dict[str, Any]:
    return {"svg": drawing.to_svg("Graph of the plan"), "problems": drawing.all_problems}


async def _tell(send: Send, name: str, value: Mapping[str, Any]) -> None:
    body = f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _json(value: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
    # Not JSONResponse, which fails on a path that is no UTF-8.
    return Response(json.dumps(value), status, media_type="application/json")


def _refusal(status: int, reason: str) -> Response:
    return _json({"error": reason}, status)


def _refuse(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _refusal(error.status_code, error.detail)
    return _refusal(HTTPStatus.BAD_REQUEST, str(error))


def _check_origin(headers: Headers) -> None:
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
    own = origin is None or origin == f"http://{headers.get('Host')}"
    if not own or site not in (None, "same-origin", "none"):
        raise HTTPException(HTTPStatus.FORBIDDEN, "requests from other sites are not answered")
    # A form of another site cannot send this type without asking first.
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")


async def _read_body(request: Request) -> bytes:
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY_BYTES:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too long")
    except ClientDisconnect:  # nobody reads the answer
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the request broke off") from None
    return body


def _read_request(body: bytes) -> tuple[str, str | None]:
    """Read `{"request": ..., "system": ...}`; the system text may be left out."""

    def refuse(reason: str) -> HTTPException:
        return HTTPException(HTTPStatus.BAD_REQUEST, reason)

    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise refuse("send a JSON object")
    request, system = value.get("request"), value.get("system")
    if not isinstance(request, str) or not request.strip():
        raise refuse("the request is empty")
    if len(request) > MAX_REQUEST_CHARS:
        raise refuse(f"the request has more than {MAX_REQUEST_CHARS:,} characters")
    if system is not None and not isinstance(system, str):
        raise refuse("the system text is no text")
    return request.strip(), system
