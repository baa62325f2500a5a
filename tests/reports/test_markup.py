"""No text becomes markup, whatever it holds, and pages stay whole."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.reports.html import page
from tinyagent_fast.reports.markup import element, printable, table, text

TEXTS = st.text(st.characters(), max_size=40) | st.sampled_from(
    [
        "</script><b>x",
        "</title><script>alert(1)</script>",
        "<!--",
        "]]>",
        '" onload="x',
        "&lt;b&gt;",
    ]
)


class Seen(HTMLParser):
    """Collects tags, attributes and text as a browser would find them."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data}")


@given(TEXTS)
def test_a_text_in_an_element_is_shown_as_it_is(value: str) -> None:
    seen = Seen(element("p", text(value)))
    assert seen.tags == ["p"]
    assert "".join(seen.words) == printable(value)


@given(TEXTS)
def test_an_attribute_keeps_its_value_and_adds_none(value: str) -> None:
    seen = Seen(element("p", title=value))
    assert seen.tags == ["p"]
    assert seen.attributes == [("title", printable(value))]


@given(st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=4))
def test_a_table_has_the_cells_given(rows: list[list[str]]) -> None:
    seen = Seen(table(["a", "b"], [[text(c) for c in row] for row in rows], marked=1))
    assert seen.tags.count("td") == 2 * len(rows)
    assert "".join(seen.words) == "ab" + "".join(printable(c) for row in rows for c in row)


@given(TEXTS)
def test_the_title_of_a_page_stays_in_its_title(value: str) -> None:
    seen = Seen(page(value, element("h1", text(value))))
    assert seen.tags.count("title") == seen.tags.count("h1") == 1
    assert "script" not in seen.tags
    assert "b" not in seen.tags


@given(TEXTS)
def test_what_is_printable_can_be_written_and_hides_nothing(value: str) -> None:
    shown = printable(value)
    shown.encode("utf-8")
    assert len(shown) == len(value)
    assert not any(ord(c) < 32 and c not in "\t\n" for c in shown)


def test_direction_overrides_and_lone_surrogates_are_replaced() -> None:
    assert printable("a\u202eb\ud800c\x00") == "a\ufffdb\ufffdc\ufffd"


def test_a_name_that_is_no_tag_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        element("p onload=x")


def test_numbers_in_attributes_are_short() -> None:
    assert element("rect", x=1.0, y=0.123456, rx=None) == '<rect x="1" y="0.12"></rect>'
