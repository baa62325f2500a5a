"""The document on own tools, followed step by step up to the training data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tinyagent_fast.agent.tools import tools_of_module
from tinyagent_fast.cli import main
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.plans.grammar import parse_plan

DOCUMENT = Path(__file__).parents[2] / "docs" / "own_tools.md"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with home.py and home.yaml of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for kind, name in (("python", "home.py"), ("yaml", "home.yaml")):
        (block,) = re.findall(rf"```{kind}\n(.*?)```", text, flags=re.S)
        Path(name).write_text(block, encoding="utf-8")
    return tmp_path


def test_functions_and_catalogue_agree(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tools", "check", "home.py", "--catalogue", "home.yaml"]) == 0
    said = capsys.readouterr().out
    assert "find_lamp(room: str) -> str, only looks up" in said
    assert "volume: str = 'quiet') -> str, changes something" in said
    assert "5 tools, the same in home.yaml" in said
    assert main(["tools", "check", "home.yaml"]) == 0


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("degrees: int", "degrees: str", "set_heating"),
        ("def announce", "def announce_it", "announce_it: not in the catalogue"),
        ("degrees: int", "warmth: int", "set_heating(room: str, warmth: int)"),
        ('] = "quiet"', '] = "loud"', "announce.volume: is 'loud' by default"),
        ("message: str", "message: str | None", "announce.message: may be None"),
        ("percent: int", "percent: int = 100", "dim_lamp.percent: is 100 by default"),
        ('"quiet", "loud"', '"quiet", "deafening"', "announce.volume: must be one of"),
    ],
)
def test_what_differs_is_told(
    old: str, new: str, told: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("home.py").write_text(Path("home.py").read_text().replace(old, new))
    assert main(["tools", "check", "home.py", "--catalogue", "home.yaml"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("default: quiet", "default: loud"),
        (", default: quiet", ""),
        ("name: volume,", "name: volume, nullable: true,"),
    ],
)
def test_two_catalogues_are_held_against_each_other(
    old: str, new: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("home.yaml").read_text().replace("{message}", "{message} {volume}")
    text = text.replace("[ in a {volume} voice]", "")
    assert old in text
    Path("home.yaml").write_text(text)
    Path("other.yaml").write_text(text.replace(old, new))
    assert main(["tools", "check", "home.yaml", "--catalogue", "home.yaml"]) == 0
    for one, other in (("home.yaml", "other.yaml"), ("other.yaml", "home.yaml")):
        assert main(["tools", "check", one, "--catalogue", other]) == 2
        assert "announce.volume: " in capsys.readouterr().err


def test_defaults_none_and_what_is_given_back_are_listed(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("more.py").write_text(
        "def seek(dish: str | None = None, guests: int = 2) -> list[str] | None:\n    return []\n"
        "def go(quick: bool): ...\n"
    )
    assert main(["tools", "check", "more.py"]) == 0
    said = capsys.readouterr().out
    assert "seek(dish: str | None = None, guests: int = 2) -> list[str] | None," in said
    assert "go(quick: bool), changes" in said
    assert main(["tools", "check", "home.yaml"]) == 0
    assert "volume: str = 'quiet')" in capsys.readouterr().out


def test_kinds_of_few_words_are_named_unless_they_are_a_tool_s_choices(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def named(*more: str) -> set[str]:
        assert main(["tools", "check", *more]) == 0
        _, _, said = capsys.readouterr().out.partition("few words: ")
        return set(re.findall(r"(\w+) \(\d+\)", said))

    assert named("home.py", "--catalogue", "home.yaml") == {"room", "news"}
    assert named("home.yaml") == {"room", "news", "level"}
    assert named("home.py") == set()
    text = Path("home.yaml").read_text()
    said_only = text.replace("values:", "values:\n  mood: [kind, cold]\n  unused: [one, two]")
    said_only = said_only.replace('phrases: ["', 'phrases: ["<mood> ')
    Path("home.yaml").write_text(said_only)
    assert named("home.yaml") == {"room", "news", "level"}
    Path("home.yaml").write_text(said_only.replace("{message}", "{message:mood}"))
    assert named("home.yaml") == {"room", "news", "level", "mood"}
    many = ", ".join(f"room {n}" for n in range(100))
    Path("home.yaml").write_text(re.sub(r"room: \[.*\]", f"room: [{many}]", text))
    assert named("home.py", "--catalogue", "home.yaml") == {"news"}


def test_a_draft_is_a_catalogue_that_data_can_be_generated_from(files: Path) -> None:
    assert main(["tools", "check", "home.py", "--draft", "draft.yaml"]) == 0
    draft, tools = load_catalogue(Path("draft.yaml")), tools_of_module(Path("home.py"))
    assert [tool.name for tool in draft.tools] == list(tools)
    assert draft.words["volume"] == ("quiet", "loud")
    assert main(["tools", "check", "home.py", "--catalogue", "draft.yaml"]) == 0
    assert main(["tools", "check", "home.py", "--draft", "draft.yaml"]) == 2  # it is there now


def test_a_draft_gives_every_parameter_just_its_choices(files: Path) -> None:
    Path("modes.py").write_text(
        "from typing import Literal\n"
        'def set_mode(mode: Literal["eco", "boost"]) -> str: ...\n'
        'def dim(level: Literal["low", "high"], number: Literal["one"]) -> str: ...\n'
        'def warm(level: Literal["mild", "hot"], end: Literal["never"], all_day: str) -> str: ...\n'
        'def cool(level: Literal["low", "high"]) -> str: ...\n'
    )
    assert main(["tools", "check", "modes.py", "--draft", "new/modes.yaml"]) == 0
    draft = load_catalogue(Path("new/modes.yaml"))
    for tool in tools_of_module(Path("modes.py")).values():
        for mine, theirs in zip(
            tool.tool.parameters, draft.by_name[tool.tool.name].parameters, strict=True
        ):
            if mine.choices:
                assert draft.words[theirs.value or ""] == mine.choices
    assert main(["tools", "check", "modes.py", "--catalogue", "new/modes.yaml"]) == 0


@pytest.mark.parametrize("default", ['"costs $5"', str(2**64)])
def test_a_draft_that_could_not_be_loaded_is_not_written(
    default: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "str" if default.startswith('"') else "int"
    Path("odd.py").write_text(f"def say(what: {kind} = {default}) -> str: ...\n")
    for _ in range(2):
        assert main(["tools", "check", "odd.py", "--draft", "odd.yaml"]) == 2
        assert "say.what.default" in capsys.readouterr().err
    assert not list(files.glob("odd.yaml*"))


def test_a_draft_is_no_python_file(files: Path) -> None:
    assert main(["tools", "check", "home.py", "--draft", "draft.py"]) == 2
    assert not Path("draft.py").exists()


def test_the_catalogue_gives_requests_that_use_all_tools(files: Path) -> None:
    words = ["--catalogue", "home.yaml", "--out", "data/lamps"]
    assert main(["data", "generate", *words, "--train-entries", "60", "--test-entries", "5"]) == 0
    entries = json.loads(Path("data/lamps/training_data.json").read_text())
    plans = [parse_plan(entry["output"][0]["raw_output"]) for entry in entries.values()]
    assert {step.tool for plan in plans for step in plan.steps} == {
        *tools_of_module(Path("home.py")),
        "join",
    }


def test_one_source_is_checked(files: Path) -> None:
    assert main(["tools", "check"]) == 2
    assert main(["tools", "check", "home.py", "--mcp", "x"]) == 2
    assert main(["tools", "check", "absent.py"]) == 2
