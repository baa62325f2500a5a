"""A small web page for one person on one machine: requests in, plans streamed out as events.

Plain `http.server`: three addresses need no framework. `GET /` is the page, `GET /planner` says
what plans, and `POST /plan` answers with server-sent events. Other sites must not get at it
through the user's browser: names that lead here by DNS rebinding are refused, and so are posts
from other origins.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from typing import Any, cast
from urllib.parse import urlsplit

from tinyagent_fast.chat.planners import Planner, PlanStream
from tinyagent_fast.chat.queueing import Queue, QueueFull
from tinyagent_fast.errors import ConfigError, UserError

MAX_REQUEST_CHARS = 20_000
_MAX_BODY_BYTES = 1_000_000
_POLL_S = 1.0
_SOCKET_S = 60.0
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Refused(Exception):
    """A request that is not answered, with its status and a reason for the reader."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class PlannerServer(ThreadingHTTPServer):
    """Serves one planner; the address is taken before the model is loaded, which can take long."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        """Take an address.

        Args:
            host: Address or name to listen on.
            port: 0 takes a free one.

        Raises:
            ConfigError: The address cannot be had.
        """
        self.queue = Queue()
        self.host = host
        self.page = (files("tinyagent_fast.chat") / "page.html").read_text(encoding="utf-8")
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--host {host} --port {port}",
                f"nothing can listen there: {error}",
                "take another --port (0 finds a free one), or --host 127.0.0.1",
            ) from error

    def server_bind(self) -> None:
        """Bind without asking the network for this machine's name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, int(self.server_address[1])

    def serve(self, planner: Planner) -> None:
        """Answer requests until `shutdown` or Ctrl-C.

        Args:
            planner: Writes the plans.
        """
        self.planner = planner
        self.serve_forever()

    @property
    def url(self) -> str:
        """The address of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"

    def allows_host(self, header: str | None) -> bool:
        """Say whether a Host header is one that a user may have typed.

        A page whose name is made to point here would send that name. Behind a wildcard address any
        literal address is fine, since rebinding needs a name. The port may differ, as it does
        through an SSH tunnel.

        Args:
            header: The header's value.

        Returns:
            True if the request is answered.
        """
        name = _host_name(header)
        if name is None:
            return False
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address.

    Args:
        host: Address or name to listen on.

    Returns:
        False for names other than localhost.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_name(header: str | None) -> str | None:
    """Read the name or address out of a Host header; None if it is none."""
    try:
        parts = urlsplit(f"//{header or ''}")
        return parts.hostname if parts.port is None or parts.port > 0 else None
    except ValueError:
        return None


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; each has a thread of its own."""

    timeout = _SOCKET_S
    server_version = "tinyagent-fast"
    sys_version = ""

    @property
    def _server(self) -> PlannerServer:
        return cast(PlannerServer, self.server)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: requests are private."""

    def do_GET(self) -> None:
        """Give the page, or what plans."""
        try:
            self._check_host()
            if self.path == "/":
                self._give_page()
            elif self.path == "/planner":
                facts = {"facts": dict(self._server.planner.facts)}
                self._give("application/json", json.dumps(facts).encode())
            else:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        except _Refused as refused:
            self._refuse(refused)

    def do_POST(self) -> None:
        """Write a plan."""
        try:
            self._check_host()
            self._check_origin()
            if self.path != "/plan":
                raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing at this address")
            request, system = _read_request(self._body())
            self._answer(self._server.planner.stream(request, system))
        except _Refused as refused:
            self._refuse(refused)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the reader has gone, and with it the plan

    def _check_host(self) -> None:
        if not self._server.allows_host(self.headers["Host"]):
            reason = f"this server does not answer to the name {self.headers['Host']!r}"
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, reason)

    def _check_origin(self) -> None:
        origin, site = self.headers["Origin"], self.headers["Sec-Fetch-Site"]
        own = origin is None or origin == f"http://{self.headers['Host']}"
        if not own or site not in (None, "same-origin", "none"):
            raise _Refused(HTTPStatus.FORBIDDEN, "requests from other sites are not answered")
        # A form of another site cannot send this type without asking first.
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")

    def _body(self) -> bytes:
        length = self.headers["Content-Length"] or ""
        if not (length.isascii() and length.isdigit()):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if int(length[:12]) > _MAX_BODY_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too long")
        return self.rfile.read(int(length))

    def _answer(self, stream: PlanStream) -> None:
        queue = self._server.queue
        try:
            with queue.place() as ticket:
                self._begin("text/event-stream")
                ahead = queue.ahead(ticket)
                while ahead:
                    # Told again and again, so that a reader who has left is noticed.
                    self._event("waiting", {"ahead": ahead})
                    ahead = queue.ahead(ticket, wait_s=_POLL_S)
                self._event("begun", {"system_text": stream.prompt.source})
                self._write(stream)
        except QueueFull:
            raise _Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many requests wait; try again later"
            ) from None

    def _write(self, stream: PlanStream) -> None:
        shown = stream.view()
        with closing(iter(stream)) as pieces:
            try:
                for piece in pieces:
                    self._event("piece", {"text": piece})
                    if "\n" in piece and (view := stream.view()) != shown:
                        shown = view
                        self._event("view", view.to_json())
            except UserError as error:
                self._event("failed", {"message": str(error)})
                return
            except (ConnectionError, TimeoutError):
                raise
            except Exception:
                self._event("failed", {"message": "this is a bug; the terminal has the details"})
                raise
        if stream.ending is None:
            self._event("failed", {"message": "the server is closing"})
            return
        self._event("view", stream.view().to_json())
        ending = {**asdict(stream.ending), "sentence": stream.ending.sentence()}
        self._event("done", {"plan": stream.text, **ending})

    def _event(self, name: str, value: Mapping[str, Any]) -> None:
        self.wfile.write(f"event: {name}\ndata: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _give_page(self) -> None:
        # Scripts and styles run only with this word, which nobody can know beforehand.
        nonce = secrets.token_urlsafe(16)
        page = self._server.page.replace("@NONCE@", nonce)
        self._give(
            "text/html; charset=utf-8",
            page.encode(),
            {"Content-Security-Policy": _POLICY.format(nonce=nonce)},
        )

    def _give(
        self,
        kind: str,
        content: bytes,
        headers: Mapping[str, str] | None = None,
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        self._begin(kind, {"Content-Length": str(len(content)), **(headers or {})}, status)
        self.wfile.write(content)

    def _begin(
        self,
        kind: str,
        headers: Mapping[str, str] | None = None,
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        self.send_response(status)
        always = {
            "Content-Type": kind,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        for name, value in {**always, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, refused: _Refused) -> None:
        content = json.dumps({"error": refused.reason}).encode()
        self._give("application/json", content, status=refused.status)


def _read_request(body: bytes) -> tuple[str, str | None]:
    """Read `{"request": ..., "system": ...}`; the system text may be left out."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _Refused(HTTPStatus.BAD_REQUEST, "send a JSON object")
    request, system = value.get("request"), value.get("system")
    if not isinstance(request, str) or not request.strip():
        raise _Refused(HTTPStatus.BAD_REQUEST, "the request is empty")
    if len(request) > MAX_REQUEST_CHARS:
        reason = f"the request has more than {MAX_REQUEST_CHARS:,} characters"
        raise _Refused(HTTPStatus.BAD_REQUEST, reason)
    if system is not None and not isinstance(system, str):
        raise _Refused(HTTPStatus.BAD_REQUEST, "the system text is no text")
    if any("\ud800" <= char <= "\udfff" for char in request + (system or "")):
        raise _Refused(HTTPStatus.BAD_REQUEST, "the text holds half a character")
    return request.strip(), system
