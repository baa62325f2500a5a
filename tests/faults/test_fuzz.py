"""Readers take hostile inputs: the short form of `make test-fuzz`."""

from __future__ import annotations

import pytest
from fuzz import READERS, Reader, explode, fuzz


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_hostile_inputs_are_refused_or_read_right(reader: Reader) -> None:
    given, taken = fuzz(reader, 120)
    assert given >= 120
    assert taken > 0, "next to nothing gets past the first look"


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_time_grows_with_the_size_of_an_input_and_no_faster(reader: Reader) -> None:
    assert all(large < 5 for _, _, large in explode(reader, 1 << 14))
