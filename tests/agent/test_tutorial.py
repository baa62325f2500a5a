"""The document on own tools, followed to its end: a planner is trained, measured and used.

The training takes minutes, so these tests are marked slow; `.ci/run` runs them.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.data.generation.catalogue import plan_tools
from tinyagent_fast.evaluation.scoring import score_pair
from tinyagent_fast.evaluation.statistics import mcnemar_exact_p

pytestmark = pytest.mark.slow

DOCUMENT = (Path(__file__).parents[2] / "docs" / "own_tools.md").read_text(encoding="utf-8")
FILES = {"python": "home.py", "yaml": "home.yaml", "json": "requests.json"}
LINES = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.S)
    for line in block.splitlines()
    if line.startswith("tinyagent-fast ")
]


def run(folder: Path, words: list[str]) -> str:
    """Run a command where the document's files are, and give what it says, also into a file."""
    at = words.index(">") if ">" in words else len(words)
    words, file = words[:at], words[at + 1 :]
    done = subprocess.run(
        [sys.executable, "-m", "tinyagent_fast", *words],
        cwd=folder,
        input="y\n" * 5,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    if file:
        (folder / file[0]).write_text(done.stdout, encoding="utf-8")
    return done.stdout


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the folder in which the document was followed, and what each command said."""
    folder = tmp_path_factory.mktemp("home")
    for kind, name in FILES.items():
        (block,) = re.findall(rf"```{kind}\n(.*?)```", DOCUMENT, flags=re.S)
        (folder / name).write_text(block, encoding="utf-8")
    return folder, [run(folder, words) for words in LINES]


def figures(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/home" / part / "metrics.json").read_text())
    return found


def test_at_least_four_in_five_unseen_requests_get_the_right_plan(
    followed: tuple[Path, list[str]],
) -> None:
    success = figures(followed[0], "eval")["success"]
    assert success["total"] == 200
    assert success["share"] >= 0.8


def test_the_arguments_of_most_plans_are_right_too(followed: tuple[Path, list[str]]) -> None:
    tasks = figures(followed[0], "agent")
    assert tasks["n"] == 200
    assert tasks["task_success"]["share"] >= 0.7


def test_the_agent_calls_the_functions_of_the_document(followed: tuple[Path, list[str]]) -> None:
    (said,) = (said for words, said in zip(LINES, followed[1], strict=True) if words[0] == "agent")
    assert "lamp-hall is at 30 percent" in said


def test_requests_of_ones_own_are_answered_and_scored(followed: tuple[Path, list[str]]) -> None:
    folder, said = followed
    asked = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
    answers = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["request"] for line in answers] == [one["request"] for one in asked]
    assert f"n = {len(asked)}" in said[-1]


def test_plan_success_does_not_fall_when_joins_are_added(followed: tuple[Path, list[str]]) -> None:
    """The same plan rows, with joins and replans among them, on the same unseen requests."""
    folder = followed[0]
    (train,) = (words for words in LINES if words[0] == "train")
    words = ["with-joins" if word == "home" else word for word in train]
    run(folder, [*words, "--data.points", "all", "--data.joins-per-plan", "0.3"])
    run(folder, ["eval", "--run", "with-joins"])
    alone, added = (right(folder, name) for name in ("home", "with-joins"))
    assert alone.keys() == added.keys()
    assert len(alone) == 200
    lost = sum(alone[query] and not added[query] for query in alone)
    won = sum(added[query] and not alone[query] for query in alone)
    print(f"plans only: {sum(alone.values())}, joins added: {sum(added.values())} of {len(alone)}")
    assert lost - won <= 6, f"{lost} plans lost, {won} won"  # three points
    assert lost <= won or mcnemar_exact_p(lost, won) > 0.05


def right(folder: Path, name: str) -> dict[str, bool]:
    """Tell by query whether a run's plan is right."""
    lines = (folder / "runs" / name / "eval/predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    tools = plan_tools(folder / "home.yaml")
    return {
        row["query"]: score_pair(row["label"], row["prediction"], tools).success for row in rows
    }
