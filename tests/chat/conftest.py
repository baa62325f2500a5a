"""One server for all tests of a module, which writes the module's `PLAN`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stand_ins import ScriptedWriter, planner_with, serving

from tinyagent_fast.chat.web import PlannerServer


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest) -> Iterator[tuple[PlannerServer, ScriptedWriter]]:
    writer = ScriptedWriter(request.module.PLAN)
    with serving(planner_with(writer)) as server:
        yield server, writer


@pytest.fixture
def server(served: tuple[PlannerServer, ScriptedWriter]) -> PlannerServer:
    return served[0]


@pytest.fixture
def writer(
    request: pytest.FixtureRequest, served: tuple[PlannerServer, ScriptedWriter]
) -> ScriptedWriter:
    """Return what writes the server's plans, as new."""
    vars(served[1]).update(vars(ScriptedWriter(request.module.PLAN)))
    return served[1]
