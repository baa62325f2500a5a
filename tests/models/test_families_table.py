"""The documents' table of model families is the table that the code reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from tiny_families import MODELS

from tinyagent_fast.config import PromptFormat
from tinyagent_fast.export.settings import QUANTS
from tinyagent_fast.models.families import FAMILIES, Family

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


def table() -> dict[str, dict[str, str]]:
    """Read the table: cells by column, by family."""
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_table_says_what_the_row_of_a_family_says(family: Family) -> None:
    assert table()[family.name] == {
        "family": family.name,
        "models": family.models,
        "trains": "yes",
        "shared prefixes": "no: whole rows" if family.whole_rows else "exact",
        "prefix cache in eval": "no" if family.whole_rows else "yes",
        "prompt formats": ", ".join(get_args(PromptFormat)),
        "GGUF": f"`{family.gguf_architecture}`, all types",
        "tried with real weights": family.tried or "not tried",
    }


def test_the_table_has_no_other_families_and_every_one_is_tested_with_a_tiny_model() -> None:
    assert list(table()) == [family.name for family in FAMILIES.values()]
    assert {kind.model_type for kind in MODELS.values()} == set(FAMILIES)


def test_all_types_are_those_that_export_makes() -> None:
    (listed,) = re.findall(r"\*\*All types\*\* are ([^.]*)\.", DOCUMENT.read_text(encoding="utf-8"))
    assert set(re.split(r", | and ", listed)) == set(QUANTS)
