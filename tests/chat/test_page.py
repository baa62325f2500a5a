"""The page in a real browser: what is typed becomes a graph, on a desk and on a phone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from headless import Browser
from stand_ins import ScriptedWriter, planner_with, serving, wait_until

from tinyagent_fast.chat.web import PlannerServer

PLAN = [
    '1. get_phone_number("Sid <b>x</b>")\n',
    '2. get_zoom_meeting_link("Review", "2026-11-24 10:00:00", 60, [])\n',
    '3. send_sms(["$1"], "Meet at $2 </script><img src=x onerror=alert(1)>")\n',
    '4. create_note("$3", "$1", "")\n',
    "5. fly()\n",
    "6. join()",
]
NODES = "return [...document.querySelectorAll('#graph .node')].map((n) => n.dataset.step)"
OVERLAPS = """
const nodes = [...document.querySelectorAll('#graph .node rect')];
const boxes = nodes.map((node) => node.getBoundingClientRect());
return boxes.some((a, i) => boxes.some((b, j) => i < j
  && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom));
"""
OUTSIDE = """
const page = document.querySelector('#graph svg').getBoundingClientRect();
return [...document.querySelectorAll('#graph rect, #graph path')].some((n) => {
  const box = n.getBoundingClientRect();
  return box.left < page.left - 1 || box.right > page.right + 1 || box.bottom > page.bottom + 1;
});
"""


@pytest.fixture
def writer() -> ScriptedWriter:
    return ScriptedWriter(PLAN)


@pytest.fixture
def server(writer: ScriptedWriter) -> Iterator[PlannerServer]:
    with serving(planner_with(writer)) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: PlannerServer) -> Iterator[Browser]:
    """Return the browser with the page open at the size of a desk."""
    browser.emulate(width=1280, height=900)
    browser.open(server.url)
    yield browser
    assert browser.console() == []  # no script failed, and the policy refused nothing


def text_of(page: Browser, name: str) -> str:
    text: str = page.run("return document.getElementById(arguments[0]).textContent", name)
    return text


def wait_for_end(page: Browser) -> None:
    wait_until(lambda: "tokens in" in text_of(page, "cost"), "the end of the plan")


def test_a_typed_request_becomes_a_plan_and_its_graph(
    page: Browser, writer: ScriptedWriter
) -> None:
    page.type("#request", "text Sid")
    page.click("#send")
    wait_for_end(page)
    assert writer.asked == [("tools", "Q: text Sid")]
    assert text_of(page, "plan") == "".join(PLAN)
    assert sorted(page.run(NODES)) == ["1", "2", "3", "4", "5"]
    edges = page.run(
        "return [...document.querySelectorAll('#graph .edge')].map((e) => e.dataset.edge)"
    )
    assert edges == ["0-2", "0-3", "1-2", "2-3"]
    assert "join()" in text_of(page, "graph")
    assert "there is no tool fly" in text_of(page, "problems")
    assert page.run("return document.querySelectorAll('#graph .faulty').length") == 1


def test_the_enter_key_sends(page: Browser, writer: ScriptedWriter) -> None:
    page.type("#request", "text Sid\ue007")
    wait_for_end(page)
    assert writer.asked == [("tools", "Q: text Sid")]


def test_the_graph_grows_while_the_plan_is_written(page: Browser, writer: ScriptedWriter) -> None:
    writer.gate = threading.Semaphore(0)
    page.type("#request", "text Sid")
    page.click("#send")
    for count in range(1, 4):
        writer.gate.release()
        steps = [str(number + 1) for number in range(count)]
        wait_until(lambda steps=steps: page.run(NODES) == steps, f"{count} calls in the graph")
    assert text_of(page, "cost") == "system text: a test"
    for _ in PLAN:
        writer.gate.release()
    wait_for_end(page)


def test_markup_in_plans_and_requests_stays_text(page: Browser) -> None:
    page.type("#request", "<img src=x><b>bold</b>")
    page.click("#send")
    wait_for_end(page)
    assert page.run("return document.querySelectorAll('main img, main b').length") == 0
    assert "<b>x</b>" in text_of(page, "graph")
    assert "<b>bold</b>" in text_of(page, "history")


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (320, "light"), (1280, "dark")])
def test_calls_never_overlap_and_nothing_is_cut_at_any_width(
    browser: Browser, server: PlannerServer, width: int, scheme: str
) -> None:
    browser.emulate(width=width, height=844, scheme=scheme)
    browser.open(server.url)
    browser.type("#request", "text Sid, and a long request that a phone has to break into lines")
    browser.click("#send")
    wait_for_end(browser)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("return innerWidth") == width
    assert not browser.run(OVERLAPS)
    assert not browser.run(OUTSIDE)
    assert browser.run("return document.querySelector('#graph svg').clientWidth") < width


def test_dark_and_light_differ_and_both_can_be_read(page: Browser) -> None:
    found: list[list[str]] = []
    for scheme in ("light", "dark"):
        page.emulate(width=1280, height=900, scheme=scheme)
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        found.append(page.run(style))
    assert found[0][0] != found[1][0]
    for back, ink in found:
        assert contrast(back, ink) > 7


def contrast(*colours: str) -> float:
    """Compare two colours as the W3C guidelines for accessible content do."""
    lights = []
    for colour in colours:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").strip(")").split(",")]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_earlier_requests_can_be_shown_again_also_after_a_reload_and_forgotten(
    page: Browser, server: PlannerServer, writer: ScriptedWriter
) -> None:
    for request in ("first", "second"):
        page.run("document.getElementById('request').value = ''")
        page.type("#request", request)
        page.click("#send")
        wait_until(lambda request=request: request in text_of(page, "history"), request)
        writer.answers = PLAN[:2] + PLAN[-1:]
    page.open(server.url)
    assert page.run(NODES) == []
    page.click("#history li:nth-child(2) button")
    assert page.run("return document.getElementById('request').value") == "first"
    assert len(page.run(NODES)) == 5
    page.click("#clear")
    page.open(server.url)
    assert page.run("return document.getElementById('past').hidden")


def test_copy_takes_the_plan_to_the_clipboard(page: Browser) -> None:
    page.run("window.taken = []; navigator.clipboard.writeText = async (text) => taken.push(text);")
    page.type("#request", "text Sid")
    page.click("#send")
    wait_for_end(page)
    page.click("#copy")
    assert wait_until(lambda: page.run("return taken"), "the clipboard") == ["".join(PLAN)]
    wait_until(lambda: text_of(page, "copy") == "Copied", "a word of it")


def test_a_plan_can_be_stopped_and_the_next_is_written(
    page: Browser, writer: ScriptedWriter
) -> None:
    writer.gate = threading.Semaphore(1)
    page.type("#request", "text Sid")
    page.click("#send")
    wait_until(lambda: page.run(NODES) == ["1"], "the first call")
    page.click("#stop")
    wait_until(lambda: text_of(page, "status") == "stopped", "a word of it")
    writer.gate.release(1000)
    wait_until(lambda: writer.closed == 1, "the end of the plan")
    page.click("#send")
    wait_for_end(page)


def test_a_failure_of_the_model_is_shown(page: Browser, writer: ScriptedWriter) -> None:
    from tinyagent_fast.errors import ModelError

    writer.error = ModelError("a long prompt", "there is no room", "shorten it")
    page.type("#request", "text Sid")
    page.click("#send")
    wait_until(lambda: "shorten it" in text_of(page, "status"), "the message")
    assert not page.run("return document.getElementById('send').disabled")


def test_an_empty_request_is_not_sent(page: Browser, writer: ScriptedWriter) -> None:
    page.click("#send")
    assert text_of(page, "status") == "type a request first"
    assert writer.asked == []


def test_a_system_text_can_be_given(page: Browser, writer: ScriptedWriter) -> None:
    page.click("#ask summary")
    page.type("#system", "only open_note")
    page.type("#request", "text Sid")
    page.click("#send")
    wait_for_end(page)
    assert writer.asked == [("only open_note", "Q: text Sid")]


def test_what_a_call_gives_and_takes_stands_out_under_the_pointer(page: Browser) -> None:
    page.type("#request", "text Sid")
    page.click("#send")
    wait_for_end(page)
    loud = page.run(
        "document.querySelector('#graph [data-step=\"2\"]').dispatchEvent(new Event('focus'));"
        "const edges = [...document.querySelectorAll('#graph .edge:not(.quiet)')];"
        "return edges.map((edge) => edge.dataset.edge);"
    )
    assert loud == ["1-2"]
