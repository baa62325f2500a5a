"""The page in a real browser: what is typed becomes a graph, on a desk and on a phone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import show_as
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from stand_ins import ScriptedWriter, planner_with, serving, wait_until

from tinyagent_fast.agent.session import AgentSpec
from tinyagent_fast.chat.web import PlannerServer
from tinyagent_fast.errors import ModelError

PLAN = [
    '1. get_phone_number("Sid <b>x</b>")\n',
    '2. get_zoom_meeting_link("Review", "2026-11-24 10:00:00", 60, [])\n',
    '3. send_sms(["$1"], "Meet at $2 </script><img src=x onerror=alert(1)>")\n',
    '4. create_note("$3", "$1", "")\n',
    "5. fly()\n",
    "6. join()",
]
NODES = "return [...document.querySelectorAll('#graph .step')].map((n) => n.dataset.step)"
OVERLAPS = """
const nodes = [...document.querySelectorAll('#graph .step rect')];
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

LETTERS = """
const texts = [...document.querySelectorAll('#graph text')];
return Math.min(...texts.map((text) => text.getBoundingClientRect().height));
"""


@pytest.fixture
def page(browser: Chrome, server: PlannerServer, writer: ScriptedWriter) -> Iterator[Chrome]:
    """Return the browser with the page open at the size of a desk."""
    show_as(browser, width=1280, height=900)
    browser.get(server.url)
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    yield browser
    assert browser.get_log("browser") == []  # no script failed, and the policy refused nothing


def click(page: Chrome, selector: str) -> None:
    page.find_element(By.CSS_SELECTOR, selector).click()


def write(page: Chrome, selector: str, text: str) -> None:
    page.find_element(By.CSS_SELECTOR, selector).send_keys(text)


def text_of(page: Chrome, name: str) -> str:
    text: str = page.execute_script(
        "return document.getElementById(arguments[0]).textContent", name
    )
    return text


def wait_for_end(page: Chrome) -> None:
    wait_until(lambda: "tokens in" in text_of(page, "cost"), "the end of the plan")


def test_a_typed_request_becomes_a_plan_and_its_graph(page: Chrome, writer: ScriptedWriter) -> None:
    write(page, "#request", "text Sid")
    click(page, "#send")
    wait_for_end(page)
    assert writer.asked == [("tools", "Q: text Sid")]
    assert text_of(page, "plan") == "".join(PLAN)
    assert sorted(page.execute_script(NODES)) == ["1", "2", "3", "4", "5"]
    edges = page.execute_script(
        "return [...document.querySelectorAll('#graph .edge')].map((e) => e.dataset.edge)"
    )
    assert edges == ["0-2", "0-3", "1-2", "2-3"]
    assert "there is no tool fly" in text_of(page, "problems")
    assert "is not in the request" in text_of(page, "problems")
    assert page.execute_script("return document.querySelectorAll('#graph .faulty').length") == 2


def test_the_enter_key_sends(page: Chrome, writer: ScriptedWriter) -> None:
    write(page, "#request", "text Sid" + Keys.ENTER)
    wait_for_end(page)
    assert writer.asked == [("tools", "Q: text Sid")]


def test_the_graph_grows_while_the_plan_is_written(page: Chrome, writer: ScriptedWriter) -> None:
    writer.gate = threading.Semaphore(0)
    write(page, "#request", "text Sid")
    click(page, "#send")
    for count in range(1, 4):
        writer.gate.release()
        steps = [str(number + 1) for number in range(count)]
        wait_until(
            lambda steps=steps: page.execute_script(NODES) == steps, f"{count} calls in the graph"
        )
    assert text_of(page, "cost") == "system text: a test"
    for _ in PLAN:
        writer.gate.release()
    wait_for_end(page)


def test_markup_in_plans_and_requests_stays_text(page: Chrome) -> None:
    write(page, "#request", "<img src=x><b>bold</b>")
    click(page, "#send")
    wait_for_end(page)
    assert page.execute_script("return document.querySelectorAll('main img, main b').length") == 0
    assert "<b>x</b>" in text_of(page, "graph")
    assert "<b>bold</b>" in text_of(page, "history")


INJECTIONS = [
    "<script>pwned()</script>",
    "</script><script>pwned()</script>",
    "<img src=x onerror=pwned()>",
    "<svg onload=pwned()>",
    "</text></svg><svg><script>pwned()</script></svg>",
    "<svg><animate onbegin=pwned() attributeName=x dur=1s>",
    "<iframe srcdoc='<script>parent.pwned()</script>'></iframe>",
    "<a href=javascript:pwned()>x</a>",
    "]]><script>pwned()</script><![CDATA[",
    "<!--<script>--><script>pwned()</script>",
    "<math><mtext><style><img src=x onerror=pwned()></style></mtext></math>",
    "{{constructor.constructor('pwned()')()}}",
    "${pwned()}",
    "javascript:pwned()",
    "\u2028event: done\\ndata: {}",
    "&lt;script&gt;pwned()&lt;/script&gt;",
    "'\"><script>pwned()</script>",
    "\u202e<b>pwned()</b>",
]
FOREIGN = """
const tags = 'script, img, iframe, a, b, style, animate, math, foreignObject';
const leads = /^(href|src|xlink:href|action|formaction|data)$/;
const bad = (at) => at.name.startsWith('on') || (leads.test(at.name) && !at.value.startsWith('#'));
return [...document.querySelectorAll('main *')]
  .filter((one) => one.matches(tags) || [...one.attributes].some(bad)).map((one) => one.outerHTML);
"""
WATCH = "window.pwned = () => { document.title = 'pwned'; };"


@pytest.mark.parametrize("text", INJECTIONS)
def test_no_text_runs_as_a_script_wherever_it_comes_from(text: str, browser: Chrome) -> None:
    quoted = json.dumps(text)
    writer = ScriptedWriter(
        [
            f'1. open_note({quoted}, "")\n',
            f"2. {text}({quoted})\n",
            f"{text}\n",
            f'3. send_sms(["$1"], {quoted})\n',
            "4. join()",
        ]
    )
    with serving(planner_with(writer, facts={"model": text, text: text})) as server:
        browser.get(server.url)
        browser.execute_script(WATCH)
        before = browser.title
        click(browser, "#ask summary")
        for field in ("system", "request"):
            fill = "document.getElementById(arguments[0]).value = arguments[1]"
            browser.execute_script(fill, field, text)
        click(browser, "#send")
        wait_for_end(browser)
        assert text_of(browser, "plan") == "".join(writer.answers)
        assert len(browser.execute_script(NODES)) >= 2
        writer.error = ModelError(text, text, text)
        click(browser, "#send")
        wait_until(lambda: text_of(browser, "status").count(text) >= 3, "the message")
        browser.refresh()  # with what the page has kept
        browser.execute_script(WATCH)
        wait_until(lambda: text in text_of(browser, "facts"), "the facts")
        click(browser, "#history li button")
        assert browser.execute_script(FOREIGN) == []
        assert browser.title == before
    assert browser.get_log("browser") == []  # no script failed, and the policy refused nothing


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (320, "light"), (1280, "dark")])
def test_calls_never_overlap_and_nothing_is_cut_at_any_width(
    browser: Chrome, server: PlannerServer, width: int, scheme: str
) -> None:
    show_as(browser, width=width, height=844, scheme=scheme)
    browser.get(server.url)
    write(browser, "#request", "text Sid, and a long request that a phone has to break into lines")
    click(browser, "#send")
    wait_for_end(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return innerWidth") == width
    assert not browser.execute_script(OVERLAPS)
    assert not browser.execute_script(OUTSIDE)
    assert browser.execute_script(LETTERS) >= 9
    assert browser.execute_script("return document.getElementById('graph').clientWidth") < width


def test_dark_and_light_differ_and_both_can_be_read(page: Chrome) -> None:
    found: list[list[str]] = []
    for scheme in ("light", "dark"):
        show_as(page, width=1280, height=900, scheme=scheme)
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        found.append(page.execute_script(style))
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
    page: Chrome, server: PlannerServer, writer: ScriptedWriter
) -> None:
    for request in ("first", "second"):
        page.execute_script("document.getElementById('request').value = ''")
        write(page, "#request", request)
        click(page, "#send")
        wait_until(lambda request=request: request in text_of(page, "history"), request)
        writer.answers = PLAN[:2] + PLAN[-1:]
    page.get(server.url)
    assert page.execute_script(NODES) == []
    click(page, "#history li:nth-child(2) button")
    assert page.execute_script("return document.getElementById('request').value") == "first"
    assert len(page.execute_script(NODES)) == 5
    click(page, "#clear")
    page.get(server.url)
    assert page.execute_script("return document.getElementById('past').hidden")


def test_copy_takes_the_plan_to_the_clipboard(page: Chrome) -> None:
    page.execute_script(
        "window.taken = []; navigator.clipboard.writeText = async (text) => taken.push(text);"
    )
    write(page, "#request", "text Sid")
    click(page, "#send")
    wait_for_end(page)
    click(page, "#copy")
    assert wait_until(lambda: page.execute_script("return taken"), "the clipboard") == [
        "".join(PLAN)
    ]
    wait_until(lambda: text_of(page, "copy") == "Copied", "a word of it")


def test_a_plan_can_be_stopped_and_the_next_is_written(
    page: Chrome, writer: ScriptedWriter
) -> None:
    writer.gate = threading.Semaphore(1)
    write(page, "#request", "text Sid")
    click(page, "#send")
    wait_until(lambda: page.execute_script(NODES) == ["1"], "the first call")
    click(page, "#stop")
    wait_until(lambda: text_of(page, "status") == "stopped", "a word of it")
    writer.gate.release(1000)
    wait_until(lambda: writer.closed == 1, "the end of the plan")
    click(page, "#send")
    wait_for_end(page)


def test_a_failure_of_the_model_is_shown(page: Chrome, writer: ScriptedWriter) -> None:
    writer.error = ModelError("a long prompt", "there is no room", "shorten it")
    write(page, "#request", "text Sid")
    click(page, "#send")
    wait_until(lambda: "shorten it" in text_of(page, "status"), "the message")
    assert not page.execute_script("return document.getElementById('send').disabled")


def test_an_empty_request_is_not_sent(page: Chrome, writer: ScriptedWriter) -> None:
    click(page, "#send")
    assert text_of(page, "status") == "type a request first"
    assert writer.asked == []


def test_a_system_text_can_be_given(page: Chrome, writer: ScriptedWriter) -> None:
    click(page, "#ask summary")
    write(page, "#system", "only open_note")
    write(page, "#request", "text Sid")
    click(page, "#send")
    wait_for_end(page)
    assert writer.asked == [("only open_note", "Q: text Sid")]


def test_what_a_call_gives_and_takes_stands_out_under_the_pointer(page: Chrome) -> None:
    write(page, "#request", "text Sid")
    click(page, "#send")
    wait_for_end(page)
    loud = page.execute_script(
        "document.querySelector('#graph [data-step=\"2\"]').dispatchEvent(new Event('focus'));"
        "const edges = [...document.querySelectorAll('#graph .edge:not(.quiet)')];"
        "return edges.map((edge) => edge.dataset.edge);"
    )
    assert loud == ["1-2"]


HOME = """
from pathlib import Path
from tinyagent_fast.agent.tools import tool

@tool(changes=False)
def find_lamp(room: str) -> str:
    return f"lamp <b>{room}</b>"

def dim(lamp: str, percent: int) -> str:
    Path(__file__).with_name(f"done-{percent}").touch()
    return "dimmed"
"""
HOME_PLAN = [
    '1. find_lamp("hall")\n',
    '2. dim("$1", 40)\n',
    '3. dim("$1", 60)\n',
    "4. join()",
]
STATUSES = "return [...document.querySelectorAll('#graph .step')].map((n) => n.dataset.status)"


def test_a_plan_is_carried_out_before_the_user_s_eyes_and_asks_before_it_changes_anything(
    browser: Chrome, tmp_path: Path
) -> None:
    (tmp_path / "page_home.py").write_text(HOME)
    writer = ScriptedWriter(HOME_PLAN)
    writer.gate = threading.Semaphore(1)
    spec = AgentSpec(tools=tmp_path / "page_home.py")
    with serving(planner_with(writer), agent=spec) as server:
        show_as(browser, width=390, height=844, scheme="dark")
        browser.get(server.url)
        wait_until(lambda: browser.find_element(By.ID, "act").is_displayed(), "the button")
        write(browser, "#request", "dim the hall")
        click(browser, "#act")
        wait_until(lambda: browser.execute_script(STATUSES) == ["done"], "the first call")
        assert "lamp <b>hall</b>" in text_of(browser, "calls")  # while the plan is still written
        writer.gate.release(len(HOME_PLAN))
        wait_until(lambda: "one more" in text_of(browser, "more"), "two questions")
        assert 'dim("lamp <b>hall</b>", 40)' in text_of(browser, "asked")
        assert list(tmp_path.glob("done-*")) == []
        click(browser, "#allow")
        wait_until(lambda: "60" in text_of(browser, "asked"), "the second question")
        click(browser, "#refuse")
        wait_until(lambda: text_of(browser, "answer"), "the answer")
        assert browser.execute_script(STATUSES) == ["done", "done", "refused"]
        assert [path.name for path in tmp_path.glob("done-*")] == ["done-40"]
        assert "not allowed" in text_of(browser, "calls")
        assert not browser.find_element(By.ID, "question").is_displayed()
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert not browser.execute_script(OVERLAPS)
        assert not browser.execute_script(OUTSIDE)
    assert browser.get_log("browser") == []


def test_one_word_allows_all_calls_of_a_plan(browser: Chrome, tmp_path: Path) -> None:
    (tmp_path / "page_home.py").write_text(HOME)
    spec = AgentSpec(tools=tmp_path / "page_home.py")
    with serving(planner_with(ScriptedWriter(HOME_PLAN)), agent=spec) as server:
        browser.get(server.url)
        wait_until(lambda: browser.find_element(By.ID, "act").is_displayed(), "the button")
        for _ in range(2):  # the second request is asked about again
            write(browser, "#request", "dim the hall")
            click(browser, "#act")
            wait_until(lambda: "40" in text_of(browser, "asked"), "a question")
            assert list(tmp_path.glob("done-*")) == []
            click(browser, "#allow-all")
            wait_until(lambda: text_of(browser, "answer"), "the answer")
            assert browser.execute_script(STATUSES) == ["done", "done", "done"]
            assert not browser.find_element(By.ID, "question").is_displayed()
            for done in tmp_path.glob("done-*"):
                done.unlink()
    assert browser.get_log("browser") == []
