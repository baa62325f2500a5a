"""A file of requests, answered one after another through the planner's own path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.errors import DataError, UserError
from tinyagent_fast.prompts.builder import check_text
from tinyagent_fast.runs import read_list

if TYPE_CHECKING:
    from tinyagent_fast.display import Display
    from tinyagent_fast.inference.planner import PlannedRequest, Planner

_FIX = "write a JSON list of requests: texts, or objects with `request` and perhaps `label`"


@dataclass(frozen=True)
class FiledRequest:
    """One entry of a file."""

    request: str
    label: str | None = None
    """The plan that it should get."""


def read_requests(path: Path) -> list[FiledRequest]:
    """Read a JSON list whose entries are texts, or objects with `request` and perhaps `label`.

    Objects may also stand one in a line.

    Raises:
        DataError: The file or an entry is something else; nothing is skipped.
    """
    name = f"requests file {path}"
    entries = read_list(name, path, _FIX)
    if not entries:
        raise DataError(name, "the list is empty", _FIX)
    found = []
    for number, entry in enumerate(entries, start=1):
        values = entry if isinstance(entry, dict) else {"request": entry}
        request, label = values.get("request"), values.get("label")
        if not isinstance(request, str) or not request.strip():
            raise DataError(f"{name}, entry {number}", "it has no text of a request", _FIX)
        if not isinstance(label, str | None):
            raise DataError(f"{name}, entry {number}", "its label is no text", _FIX)
        try:
            check_text("request", request)
        except UserError as error:
            raise DataError(f"{name}, entry {number}", error.why, error.fix) from error
        found.append(FiledRequest(request, label))
    return found


def answer_all(
    planner: Planner, requests: Sequence[FiledRequest], display: Display
) -> Iterator[tuple[FiledRequest, PlannedRequest]]:
    """Answer requests several at a time, and give each in its order as soon as it is there."""
    early: dict[int, PlannedRequest] = {}
    given = 0
    with display.bar("requests", "plans") as update:
        answers = planner.plan_each([entry.request for entry in requests])
        for done, (index, planned) in enumerate(answers, start=1):
            early[index] = planned
            update(done, len(requests))
            while given in early:
                yield requests[given], early.pop(given)
                given += 1
