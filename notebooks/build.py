"""Makes TinyAgent_fast.ipynb from TinyAgent_fast.py, so that the notebook is reviewed as text.

`python notebooks/build.py` writes it; `--check` only says whether it is up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).with_name("TinyAgent_fast.py")
NOTEBOOK = SOURCE.with_suffix(".ipynb")
_MARK = re.compile(r"^# %%(?P<markdown> \[markdown\])?\n", flags=re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """One cell, without its mark and, if it is text, without the comment signs."""

    kind: Literal["markdown", "code"]
    text: str


def read_cells(source: str) -> list[Cell]:
    """Split a source into cells; what stands before the first mark belongs to none.

    Args:
        source: Python in the percent format.

    Returns:
        The cells in order.

    Raises:
        ValueError: A text cell has a line that is no comment, which would be lost.
    """
    marks = list(_MARK.finditer(source))
    bounds = [*(mark.start() for mark in marks), len(source)]
    cells = []
    for mark, end in zip(marks, bounds[1:], strict=True):
        text = source[mark.end() : end].strip("\n")
        if mark["markdown"]:
            cells.append(Cell("markdown", _uncommented(text)))
        else:
            cells.append(Cell("code", text))
    return cells


def _uncommented(text: str) -> str:
    lines = text.split("\n")
    for line in lines:
        if line != "#" and not line.startswith("# "):
            raise ValueError(f"a text cell has a line that is no comment: {line!r}")
    return "\n".join(line[2:] for line in lines)


def notebook_text(source: str) -> str:
    """Make the notebook; the same source always gives the same text.

    Args:
        source: Python in the percent format.

    Returns:
        JSON of notebook format 4.5, without any output.
    """
    notebook = {
        "cells": [_as_json(number, cell) for number, cell in enumerate(read_cells(source))],
        "metadata": {
            # Colab's own keys: ask for a GPU, and show no name of who made it.
            "accelerator": "GPU",
            "colab": {"gpuType": "T4", "provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _as_json(number: int, cell: Cell) -> dict[str, object]:
    content: dict[str, object] = {
        "cell_type": cell.kind,
        "id": f"cell-{number:02d}",
        "metadata": {},
        "source": cell.text.splitlines(keepends=True),
    }
    return (
        content if cell.kind == "markdown" else {**content, "execution_count": None, "outputs": []}
    )


def main(arguments: Sequence[str]) -> int:
    """Write the notebook, or with `--check` compare it with its source.

    Args:
        arguments: Nothing, or `--check`.

    Returns:
        0 when it is up to date or was written, 1 when it differs, 2 for another argument.
    """
    text = notebook_text(SOURCE.read_text(encoding="utf-8"))
    if list(arguments) == ["--check"]:
        same = NOTEBOOK.exists() and NOTEBOOK.read_text(encoding="utf-8") == text
        print("up to date" if same else f"{NOTEBOOK.name} differs: python notebooks/build.py")
        return 0 if same else 1
    if arguments:
        print("usage: python notebooks/build.py [--check]", file=sys.stderr)
        return 2
    NOTEBOOK.write_text(text, encoding="utf-8")
    print(f"written: {NOTEBOOK}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
