"""The local server: streams to its own page, and to no other site."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from stand_ins import WAIT_S, ScriptedWriter, planner_with, serving, wait_until

from tinyagent_fast.agent.session import AgentSpec, open_agent
from tinyagent_fast.chat import web
from tinyagent_fast.chat.web import (
    MAX_REQUEST_CHARS,
    PlannerServer,
    allows_host,
    is_loopback,
    listen,
)
from tinyagent_fast.errors import ConfigError, ModelError
from tinyagent_fast.inference.planner import Planner

PLAN = ['1. open_note("a', '", "")\n', '2. open_note("$1", "")\n', "3. join()"]
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def planner() -> Planner:
    """Return a planner for a server of the test's own."""
    return planner_with(ScriptedWriter(PLAN))


def ask(
    server: PlannerServer, method: str, path: str, body: Any = None, **headers: str
) -> HTTPResponse:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, content, {**(JSON if body is not None else {}), **sent})
    return connection.getresponse()


def events(response: HTTPResponse) -> list[tuple[str, Any]]:
    found = []
    for block in response.read().decode().split("\n\n")[:-1]:
        first, second = block.split("\n")
        found.append((first.removeprefix("event: "), json.loads(second.removeprefix("data: "))))
    return found


def of_kind(found: list[tuple[str, Any]], kind: str) -> list[Any]:
    return [value for name, value in found if name == kind]


def test_a_request_is_answered_piece_by_piece_with_its_graph_and_its_cost(
    server: PlannerServer, writer: ScriptedWriter
) -> None:
    found = events(ask(server, "POST", "/plan", {"request": " go "}))
    assert writer.asked == [("tools", "Q: go")]
    assert [piece["text"] for piece in of_kind(found, "piece")] == PLAN
    drawings = [drawing["svg"] for drawing in of_kind(found, "drawing")]
    assert [svg.count("data-step=") for svg in drawings] == [1, 2, 2]
    assert 'data-edge="0-1"' in drawings[-1]
    (done,) = of_kind(found, "done")
    assert done["plan"] == "".join(PLAN)
    assert done["new_tokens"] == 4
    assert [name for name, _ in found][:2] == ["begun", "piece"]
    assert found[-1][0] == "done"


def test_a_system_text_of_the_request_is_used(
    server: PlannerServer, writer: ScriptedWriter
) -> None:
    events(ask(server, "POST", "/plan", {"request": "go", "system": "mine"}))
    assert writer.asked == [("mine", "Q: go")]


def test_a_failing_model_is_reported_and_the_next_request_is_answered(
    server: PlannerServer, writer: ScriptedWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, said in (
        (ModelError("a long prompt", "no room", "shorten it"), "shorten it"),
        (ZeroDivisionError("secret"), "bug"),
    ):
        writer.error = error
        found = events(ask(server, "POST", "/plan", {"request": "go"}))
        assert found[-1][0] == "failed"
        assert said in found[-1][1]["message"]
        assert "secret" not in found[-1][1]["message"]
    writer.error = None
    assert events(ask(server, "POST", "/plan", {"request": "go"}))[-1][0] == "done"
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}", "127.0.0.1:9"]
)
def test_the_names_that_a_user_types_are_answered(server: PlannerServer, host: str) -> None:
    assert ask(server, "GET", "/", Host=host.format(port=server.port)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "a@localhost@evil.example",
        "192.168.0.9",
        "0.0.0.0",
        "127.0.0.1:x",
        "[::1",
        "",
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/planner"), ("POST", "/plan")])
def test_a_name_that_was_made_to_point_here_is_refused(
    server: PlannerServer, writer: ScriptedWriter, host: str, method: str, path: str
) -> None:
    body = {"request": "go"} if method == "POST" else None
    response = ask(server, method, path, body, Host=host.format(port=server.port))
    assert response.status == 421
    assert b"<html" not in response.read()
    assert writer.asked == []


def test_behind_a_wildcard_addresses_are_answered_and_names_are_not(planner: Planner) -> None:
    with serving(planner, "0.0.0.0") as server:
        assert ask(server, "GET", "/", Host="192.168.0.9:80").status == 200
        assert ask(server, "GET", "/", Host="evil.example").status == 421


def test_a_name_that_was_given_as_the_host_is_answered() -> None:
    assert allows_host("localhost:1", "localhost")
    assert allows_host("my-box:8000", "My-Box")
    assert not allows_host("other-box:8000", "My-Box")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_posts_of_other_sites_are_refused(
    server: PlannerServer, writer: ScriptedWriter, headers: dict[str, str], status: int
) -> None:
    sent = {name: value.format(port=server.port) for name, value in headers.items()}
    response = ask(server, "POST", "/plan", {"request": "go"}, **sent)
    response.read()
    assert response.status == status
    assert len(writer.asked) == (status == 200)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b"{}",
        b'{"request": 3}',
        b'{"request": " "}',
        b'{"request": "a", "system": 1}',
        b'{"request": "\\ud800"}',
        json.dumps({"request": "x" * (MAX_REQUEST_CHARS + 1)}).encode(),
    ],
)
def test_what_is_no_request_is_refused_with_a_reason(
    server: PlannerServer, writer: ScriptedWriter, body: bytes
) -> None:
    response = ask(server, "POST", "/plan", body)
    assert response.status == 400
    assert json.loads(response.read())["error"]
    assert writer.asked == []


def test_a_body_of_unknown_or_absurd_length_is_not_read(server: PlannerServer) -> None:
    assert ask(server, "POST", "/plan", b"{" * 1_000_001).status == 413
    assert ask(server, "POST", "/plan", b"{}", Content_Length="9" * 30).status == 400
    assert ask(server, "POST", "/plan", b"{}", Content_Length="-1").status == 400


@pytest.mark.parametrize("path", ["/x", "/plan/x", "/../pyproject.toml", "//evil.example/"])
def test_there_is_nothing_else_to_get(server: PlannerServer, path: str) -> None:
    assert ask(server, "GET", path).status == 404


def test_the_page_runs_only_its_own_script_and_asks_nobody_else(server: PlannerServer) -> None:
    responses = [ask(server, "GET", "/") for _ in range(2)]
    pages = [response.read().decode() for response in responses]
    policies = [response.headers["Content-Security-Policy"] for response in responses]
    assert policies[0] != policies[1]
    assert "default-src 'none'" in policies[0]
    assert "unsafe" not in policies[0]
    nonce = policies[0].split("'nonce-")[1].split("'")[0]
    assert pages[0].count(f'nonce="{nonce}"') == 2 == pages[0].count("nonce=")
    assert "@NONCE@" not in pages[0]
    without_names = pages[0].replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in without_names
    assert "https://" not in without_names


def test_the_page_is_told_what_plans(server: PlannerServer) -> None:
    response = ask(server, "GET", "/planner")
    facts = json.loads(response.read())["facts"]
    assert facts.keys() == {"model", "carried out"} and facts["model"] == "scripted"
    assert "sandbox" in facts["carried out"] and "send_sms" in facts["carried out"]


def test_requests_wait_for_one_another_and_are_told_so(
    server: PlannerServer, writer: ScriptedWriter
) -> None:
    writer.gate = threading.Semaphore(0)
    first = ask(server, "POST", "/plan", {"request": "a"})
    wait_until(lambda: writer.asked, "the first request at the model")
    second = ask(server, "POST", "/plan", {"request": "b"})
    assert second.readline() == b"event: waiting\n"
    assert second.readline() == b'data: {"ahead": 1}\n'
    assert writer.asked == [("tools", "Q: a")]
    writer.gate.release(2 * len(PLAN))
    found = events(first)
    assert found[-1][0] == "done"
    assert of_kind(found, "waiting") == []
    assert b"event: done" in second.read()
    assert [user for _, user in writer.asked] == ["Q: a", "Q: b"]


def test_a_reader_who_leaves_frees_the_model(
    server: PlannerServer, writer: ScriptedWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    writer.answers = ["1. "] * 100_000
    connection = socket.create_connection(("127.0.0.1", server.port))
    body = b'{"request": "go"}'
    head = "POST /plan HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    while b"event: piece" not in connection.recv(1000):
        pass
    connection.close()
    wait_until(lambda: writer.closed, "the end of the plan that nobody reads")
    assert capsys.readouterr().err == ""
    writer.answers = PLAN
    assert events(ask(server, "POST", "/plan", {"request": "go"}))[-1][0] == "done"


def test_a_closing_server_breaks_a_plan_off_and_says_so(planner: Planner) -> None:
    writer = planner.engine
    assert isinstance(writer, ScriptedWriter)
    writer.gate = threading.Semaphore(0)
    with serving(planner) as server:
        response = ask(server, "POST", "/plan", {"request": "go"})
        wait_until(lambda: writer.asked, "the request at the model")
        server.stop()
        writer.gate.release(len(PLAN))
        assert events(response)[-1] == ("failed", {"message": "the server is closing"})
    assert writer.closed == 1


def test_requests_are_answered_in_the_order_of_arrival_and_too_many_are_told_to_come_later(
    server: PlannerServer, writer: ScriptedWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_WAITING", 2)
    writer.gate = threading.Semaphore(0)
    asked = []
    for at, name in enumerate("abc"):
        asked.append(ask(server, "POST", "/plan", {"request": name}))
        assert asked[-1].readline() == (b"event: waiting\n" if at else b"event: begun\n")
    assert asked[-1].readline() == b'data: {"ahead": 2}\n'
    late = ask(server, "POST", "/plan", {"request": "d"})
    assert late.status == 503
    assert "try again" in json.loads(late.read())["error"]
    writer.gate.release(3 * len(PLAN))
    assert [b"event: done" in response.read() for response in asked] == [True] * 3
    assert [user for _, user in writer.asked] == ["Q: a", "Q: b", "Q: c"]
    writer.gate.release(len(PLAN))
    assert events(ask(server, "POST", "/plan", {"request": "e"}))[-1][0] == "done"


def test_a_full_queue_is_told_before_a_body_is_read_and_bodies_that_come_late_do_not_fill_it(
    server: PlannerServer, writer: ScriptedWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_WAITING", 1)
    writer.gate = threading.Semaphore(0)
    body = b'{"request": "go"}'
    head = (
        "POST /plan HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()

    def begun() -> socket.socket:
        one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        one.sendall(head + body[:5])
        return one

    late = [begun() for _ in range(4)]
    time.sleep(0.3)  # all four heads are read while there is room
    for one in late:
        one.sendall(body[5:])
    answers = [HTTPResponse(one) for one in late]
    for one in answers:
        one.begin()
    assert sorted(one.status for one in answers) == [200, 200, 503, 503]
    assert begun().recv(13)[9:12] == b"503"
    writer.gate.release(2 * len(PLAN))
    assert sum(b"event: done" in one.read() for one in answers) == 2


def test_a_reader_who_leaves_the_queue_frees_the_place(
    server: PlannerServer, writer: ScriptedWriter
) -> None:
    writer.gate = threading.Semaphore(0)
    first, second, third = (ask(server, "POST", "/plan", {"request": name}) for name in "abc")
    assert [third.readline() for _ in range(2)][1] == b'data: {"ahead": 2}\n'
    second.close()
    assert [third.readline() for _ in range(3)][2] == b'data: {"ahead": 1}\n'
    writer.gate.release(2 * len(PLAN))
    assert b"event: done" in first.read()
    assert b"event: done" in third.read()
    assert [user for _, user in writer.asked] == ["Q: a", "Q: c"]


def test_a_port_that_is_taken_is_a_message_with_a_way_out(server: PlannerServer) -> None:
    for host, port, said in (
        ("127.0.0.1", server.port, "--port"),
        ("127.0.0.1", 70_000, "--port"),
        ("no such host", 0, "--host"),
    ):
        with pytest.raises(ConfigError, match=said):
            listen(host, port)


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("192.168.0.9", False),
        ("my-box", False),
    ],
)
def test_an_address_that_others_can_reach_is_known(host: str, inside: bool) -> None:
    assert is_loopback(host) == inside


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_address_of_the_page_can_be_opened(planner: Planner, host: str) -> None:
    with serving(planner, host) as server:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(server.url, timeout=WAIT_S) as response:
            assert response.status == 200


def test_an_ipv6_address_is_shown_as_a_browser_reads_it(planner: Planner) -> None:
    with listen("127.0.0.1", 0) as listener:
        url = PlannerServer(planner, listener, "::1", open_agent(planner, AgentSpec())).url
    assert url.startswith("http://[::1]:")


# --- plans that are carried out

HOME = '''
import asyncio
from pathlib import Path
from tinyagent_fast.agent.tools import ToolError, tool

BUSY = Path(__file__).with_name("busy")
DONE = Path(__file__).with_name("done")
ENDED = Path(__file__).with_name("ended")

@tool(changes=False)
def find_lamp(room: str) -> str:
    """Gives the id of a lamp."""
    if BUSY.exists():
        BUSY.unlink()
        raise ToolError("the lamps are busy, try again")
    return f"lamp-{room}"

def dim(lamp: str, percent: int) -> str:
    """Dims a lamp."""
    DONE.write_text(f"{lamp} {percent}")
    return "dimmed"

@tool(changes=False)
async def wait() -> str:
    """Waits."""
    try:
        await asyncio.sleep(60)
    finally:
        ENDED.touch()
'''
HOME_PLAN = ['1. find_lamp("hall")\n', '2. dim("$1", 40)\n', "3. join()"]


@pytest.fixture
def home(tmp_path: Path) -> AgentSpec:
    (tmp_path / "web_home.py").write_text(HOME)
    return AgentSpec(tools=tmp_path / "web_home.py", trace=tmp_path / "traces.jsonl")


def next_event(response: HTTPResponse) -> tuple[str, Any]:
    name = response.readline().decode().removeprefix("event: ").strip()
    value = json.loads(response.readline().decode().removeprefix("data: "))
    assert response.readline() == b"\n"
    return name, value


def until(response: HTTPResponse, kind: str) -> list[tuple[str, Any]]:
    found = [next_event(response)]
    while found[-1][0] != kind:
        found.append(next_event(response))
    return found


@pytest.mark.parametrize("allowed", [True, False])
def test_an_agent_s_changes_are_asked_for_and_its_graph_fills_in(
    home: AgentSpec, tmp_path: Path, allowed: bool
) -> None:
    (tmp_path / "busy").touch()
    with serving(planner_with(ScriptedWriter(HOME_PLAN)), agent=home) as server:
        response = ask(server, "POST", "/agent", {"request": "dim the hall"})
        found = until(response, "ask")
        assert found[-1][1]["call"] == 'dim("lamp-hall", 40)'
        assert [v["number"] for v in of_kind(found, "plan")] == [0, 1]  # it was busy, and mended
        assert [v["status"] for v in of_kind(found, "observation")] == ["failed", "skipped", "done"]
        assert not (tmp_path / "done").exists()
        answer = {"question": found[-1][1]["question"], "allow": allowed}
        assert ask(server, "POST", "/allow", answer, Origin="http://evil.example").status == 403
        assert ask(server, "POST", "/allow", answer).status == 200
        assert ask(server, "POST", "/allow", answer).status == 404
        rest = events(response)
    assert (tmp_path / "done").exists() == allowed
    status = "done" if allowed else "refused"
    assert of_kind(rest, "observation")[-1]["status"] == status
    assert f'data-status="{status}"' in of_kind(rest, "drawing")[-1]["svg"]
    assert rest[-1][0] == "end" and rest[-1][1]["failed"] is not allowed
    (trace,) = map(json.loads, (tmp_path / "traces.jsonl").read_text().splitlines())
    assert trace["request"] == "dim the hall" and len(trace["rounds"]) == 2


@pytest.mark.parametrize("end", ["reader", "server"])
def test_a_reader_who_leaves_or_a_server_that_closes_leaves_no_call_running(
    home: AgentSpec, tmp_path: Path, end: str
) -> None:
    writer = ScriptedWriter(["1. wait()\n", "2. join()"])
    with serving(planner_with(writer), agent=home) as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", "/agent", json.dumps({"request": "wait"}).encode(), JSON)
        response = connection.getresponse()
        while "running" not in next_event(response)[1].get("svg", ""):
            pass
        if end == "server":
            server.stop()
            assert events(response)[-1] == ("failed", {"message": "the server is closing"})
        else:
            response.close()
            connection.close()
        wait_until((tmp_path / "ended").exists, "the end of the call")
        if end == "reader":
            assert events(ask(server, "POST", "/plan", {"request": "go"}))[-1][0] == "done"


def test_in_the_sandbox_nothing_is_asked_for() -> None:
    plan = ['1. get_phone_number("Anna")\n', '2. send_sms(["$1"], "late")\n', "3. join()"]
    with serving(planner_with(ScriptedWriter(plan)), agent=AgentSpec()) as server:
        assert "nothing real is touched" in ask(server, "GET", "/planner").read().decode()
        found = events(ask(server, "POST", "/agent", {"request": "text Anna"}))
    assert of_kind(found, "ask") == []
    assert found[-1][0] == "end" and not found[-1][1]["failed"]


def test_an_answer_that_nothing_waits_for_and_a_failing_model_say_so(
    server: PlannerServer, home: AgentSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(server, "POST", "/allow", {"question": "x", "allow": True}).status == 404
    for body in (b"", b"[]", b"{}", b'{"question": [1]}'):
        assert ask(server, "POST", "/allow", body).status == 404
    writer = ScriptedWriter([])
    with serving(planner_with(writer), agent=home) as other:
        for error, said in (
            (ModelError("a", "b", "shorten it"), "shorten it"),
            (KeyError(), "bug"),
        ):
            writer.error = error
            found = events(ask(other, "POST", "/agent", {"request": "go"}))
            assert found[-1][0] == "failed" and said in found[-1][1]["message"]
    assert "KeyError" in capsys.readouterr().err
