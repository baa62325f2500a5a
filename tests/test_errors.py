"""What messages are made of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.errors import printable


@given(st.text())
def test_printable_text_has_no_control_characters_and_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]
    assert printable(shown) == shown
    shown.encode("utf-8")
    line = printable(text, one_line=True)
    assert line.splitlines() in ([], [line])
    assert printable(line, one_line=True) == line
