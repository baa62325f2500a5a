"""The local server under many requests, wrong requests, and connections that do nothing."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Iterator

import pytest
from stand_ins import ScriptedWriter, planner_with, serving, wait_until

from tinyagent_fast.chat import web
from tinyagent_fast.chat.web import PlannerServer

PLAN = ['1. open_note("a", "", "")\n', "2. join()"]
COUNTS = [150, pytest.param(1000, marks=pytest.mark.slow)]
HEAD = "POST /plan HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def message(body: bytes, head: str = HEAD) -> bytes:
    return f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def request_for(text: str) -> bytes:
    return message(json.dumps({"request": text}).encode())


async def exchange(port: int, sent: bytes) -> bytes:
    """Send something, and give all that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        return await reader.read()
    except ConnectionError:  # what the server did not want to read to its end
        return b""
    finally:
        writer.close()


async def together(port: int, all_sent: list[bytes], at_once: int) -> list[bytes]:
    turns = asyncio.Semaphore(at_once)

    async def one(sent: bytes) -> bytes:
        async with turns:
            return await asyncio.wait_for(exchange(port, sent), timeout=60)

    return await asyncio.gather(*map(one, all_sent))


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.parametrize("count", COUNTS)
def test_all_of_many_requests_at_once_are_answered_each_with_its_own_plan(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"r{number}" for number in range(count)]
    writer = ScriptedWriter(
        {f"Q: {name}": [f'1. open_note("{name}", "", "")\n', "2. join()"] for name in names}
    )
    refused = 0

    async def until_done(port: int, name: str) -> str:
        nonlocal refused
        while True:
            answer = await asyncio.wait_for(exchange(port, request_for(name)), timeout=120)
            if status_of(answer) == 503:
                refused += 1
                await asyncio.sleep((0.3 + 1.5 * random.random()) * count / 150)
                continue
            assert status_of(answer) == 200, answer[:200]
            assert answer.count(b"event: done") == 1, answer[-200:]
            done = answer.split(b"event: done\ndata: ", 1)[1]
            plan: str = json.loads(done.split(b"\n", 1)[0])["plan"]
            return plan

    async def everybody(port: int) -> list[str]:
        return await asyncio.gather(*(until_done(port, name) for name in names))

    with serving(planner_with(writer)) as server:
        plans = asyncio.run(everybody(server.port))
    assert plans == [f'1. open_note("{name}", "", "")\n2. join()' for name in names]
    assert sorted(user for _, user in writer.asked) == sorted(f"Q: {name}" for name in names)
    assert refused > 0  # more than may wait: these were told to come again
    assert capsys.readouterr().err == ""


def wrong(chance: random.Random) -> Iterator[bytes]:
    """Give requests that are wrong in one way or another, without end."""
    good = request_for("go")
    bodies = [b"", b"{", b"[]", b"null", b"1e999", b'{"request": 1}', b'{"request": "\\ud800"}']
    bodies += [b"[" * 5000, b"\xff\xfe", b'{"request": "a", "system": {}}', b'{"request": "\t"}']
    heads = [
        HEAD.replace("127.0.0.1", "evil.example"),
        HEAD.replace("application/json", "text/plain"),
        HEAD + "Origin: http://evil.example\r\n",
        HEAD + "Sec-Fetch-Site: cross-site\r\n",
        HEAD.replace("POST /plan", "DELETE /plan"),
        HEAD.replace("POST /plan", "POST /../../etc/passwd"),
        HEAD.replace("POST /plan", "POST /%00%2e%2e/plan"),
    ]
    lengths = ["Content-Length: -1", f"Content-Length: {'9' * 40}", "Content-Length: x"]
    lengths += ["Content-Length: 5\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked"]
    while True:
        yield chance.choice(
            [
                message(chance.choice(bodies)),
                message(b'{"request": "go"}', chance.choice(heads)),
                message(json.dumps({"request": "x" * 25_000}).encode()),
                chance.randbytes(chance.randrange(1, 400)),
                good.replace(b"HTTP/1.1", chance.choice([b"HTTP/x", b"\x00"])),
                good.replace(b"\r\n", chance.choice([b"\r", b"\0"])),
                f"{HEAD}X-Long: {'x' * 100_000}\r\n\r\n".encode(),
                f"{HEAD}{chance.choice(lengths)}\r\n\r\nfffffffffffffffffffff\r\n".encode(),
            ]
        )


@pytest.mark.parametrize("count", COUNTS)
def test_wrong_requests_are_refused_and_the_right_ones_between_them_are_answered(
    count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(web, "_ARRIVAL_S", 5.0)  # some never say where they end
    writer, source = ScriptedWriter(PLAN), wrong(random.Random(7))
    bad = [next(source) for _ in range(count)]
    good = [request_for(f"good{number}") for number in range(10)]
    mixed = list(bad)
    for number, one in enumerate(good):
        mixed.insert(number * len(bad) // len(good), one)
    with serving(planner_with(writer)) as server:
        answers = asyncio.run(together(server.port, mixed, at_once=30))
    by_request = dict(zip(mixed, map(status_of, answers), strict=True))
    assert {status for sent, status in by_request.items() if sent not in good} <= {
        *(0, 400, 403, 404, 405, 413, 415, 421, 431)
    }
    assert [by_request[one] for one in good] == [200] * len(good)
    assert sorted(user for _, user in writer.asked) == [f"Q: good{n}" for n in range(10)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /plan HTTP/1.1\r\nHo", f"{HEAD}Content-Length: 100\r\n\r\n".encode() + b'{"a'],
    ids=["nothing", "half a head", "half a body"],
)
def test_connections_that_send_nothing_are_closed_and_free_their_places(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later_s = 0.0  # turned by hand, so that no pause of a busy machine counts
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda _: time.monotonic() + later_s)
    with serving(planner_with(ScriptedWriter(PLAN))) as server:
        # One more would be refused, and each request that is refused gives its place back.
        idle = [
            socket.create_connection(("127.0.0.1", server.port))
            for _ in range(web._MAX_CONNECTIONS - 1)
        ]
        for one in idle:
            one.sendall(sent)
        assert status_of(asyncio.run(exchange(server.port, request_for("go")))) == 503
        later_s = web._ARRIVAL_S + 1
        wait_until(
            lambda: status_of(asyncio.run(exchange(server.port, request_for("go")))) == 200,
            "a place for a request",
        )
        for one in idle:
            one.close()
    assert capsys.readouterr().err == ""


def test_a_reader_who_reads_nothing_loses_the_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(web, "_READER_S", 0.5)
    writer = ScriptedWriter(["x" * 100_000] * 200)
    with serving(planner_with(writer)) as server:
        deaf = socket.create_connection(("127.0.0.1", server.port))
        deaf.sendall(request_for("go"))
        wait_until(lambda: writer.closed, "the end of the plan that nobody reads")
        writer.answers = PLAN
        assert status_of(asyncio.run(exchange(server.port, request_for("go")))) == 200
        deaf.close()
    assert capsys.readouterr().err == ""


def test_a_client_who_leaves_in_the_middle_of_its_request_is_no_error(
    server: PlannerServer, writer: ScriptedWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(f"{HEAD}Content-Length: 100\r\n\r\n".encode() + b'{"req')
    assert status_of(asyncio.run(exchange(server.port, request_for("go")))) == 200
    assert [user for _, user in writer.asked] == ["Q: go"]
    assert capsys.readouterr().err == ""
