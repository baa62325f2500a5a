"""What the documents tell people to type, to look for and to follow is there."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tyro

import tinyagent_fast
from tinyagent_fast import cli
from tinyagent_fast.config import Config, check_config
from tinyagent_fast.data.generation.catalogue import BUILT_IN_CATALOGUE
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.scoring import FAILURE_CODES, Prediction
from tinyagent_fast.presets import preset_config
from tinyagent_fast.runs import create_run

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")),
    *DOCS,
]
PLAN = '1. get_email_address("Sid")\n2. join()'
GPU_PRESETS = ("t4", "l4", "a100", "paper", "seed")
CHEAP = ("data generate", "data check", "memory", "score", "compare", "report")
"""Commands that are also run as written, on files made for the test."""
OF_OTHERS = {"--jinja", "--check", "--quick", "--rounds", "--durations"}
"""Flags in the text that belong to other programs."""


@dataclass(frozen=True)
class Line:
    """One command line of a document, joined where it is continued."""

    document: str
    text: str

    @property
    def needs(self) -> str:
        found = re.search(r"#.*?\bneeds (.+)", self.text)
        return found[1] if found else ""

    @property
    def steps(self) -> list[list[str]]:
        """Give the words of every command in the line."""
        steps: list[list[str]] = [[]]
        for word in shlex.split(self.text, comments=True):
            if word == "&&":
                steps.append([])
            elif word == ">":  # what follows is the shell's
                break
            else:
                steps[-1].append(word)
        return steps


def lines_of(path: Path) -> Iterator[Line]:
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S):
        for text in block.replace("\\\n", " ").splitlines():
            if text.strip() and not text.strip().startswith("#"):
                yield Line(path.relative_to(ROOT).as_posix(), text.strip())


LINES = [line for path in DOCUMENTS for line in lines_of(path)]


def of_the_project(words: list[str]) -> list[str] | None:
    """Give the words after the program's name, also where a launcher starts it."""
    if words[:1] == ["tinyagent-fast"]:
        return words[1:]
    if "tinyagent_fast" in words and words[words.index("tinyagent_fast") - 1] == "-m":
        return words[words.index("tinyagent_fast") + 1 :]
    return None


def split_command(words: list[str]) -> tuple[str, list[str]]:
    for length in (2, 1):
        if " ".join(words[:length]) in cli.COMMANDS:
            return " ".join(words[:length]), words[length:]
    raise AssertionError(f"no command: {words}")


OURS = [
    (line, ours)
    for line in LINES
    for step in line.steps
    if (ours := of_the_project(step)) is not None
]
MAKE = [(line, step) for line in LINES for step in line.steps if step[0] == "make"]


def name_of(value: object) -> str:
    return value.text if isinstance(value, Line) else ""


def is_preparation(words: list[str]) -> bool:
    if words[:2] == ["pip", "install"] and "-r" in words:
        return (ROOT / words[words.index("-r") + 1]).is_file()
    if words[0] == "python" and words[1].endswith(".py"):
        return (ROOT / words[1]).is_file()
    return (
        words[:3] == ["python", "-m", "venv"]
        or words == ["pip", "install", "--no-deps", "-e", "."]
        or words == [".", ".venv/bin/activate"]
        or words[0] == "cd"
    )


def test_the_documents_have_commands() -> None:
    assert len(DOCS) > 8
    assert len(OURS) > 25
    assert len(MAKE) > 12


@pytest.mark.parametrize("line", LINES, ids=name_of)
def test_every_line_is_a_command_that_is_checked_or_says_what_it_needs(line: Line) -> None:
    for step in line.steps:
        known = of_the_project(step) is not None or step[0] == "make" or is_preparation(step)
        assert known or line.needs, f"{line.document}: add `# needs ...`: {line.text}"


@pytest.mark.parametrize("line", [line for line in LINES if "docs/" in line.document], ids=name_of)
def test_what_trains_a_large_model_says_that_it_needs_a_gpu(line: Line) -> None:
    words = [word for step in line.steps for word in step]
    trains = "train" in words and any(
        f"PRESET={preset}" in words or ("--preset" in words and preset in words)
        for preset in GPU_PRESETS
    )
    assert not trains or line.needs.startswith("a GPU"), line.text


class Parsed(Exception):
    """Ends a command once its flags are read."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that reads a command's flags as the command itself does, and no more."""
    read_flags = tyro.cli

    def read_and_stop(*arguments: Any, **options: Any) -> Any:
        found = read_flags(*arguments, **options)
        if options.get("return_unknown_args"):
            flags, unknown = found
            if unknown or isinstance(flags, Config):  # it is read once more
                return found
            found = flags
        raise Parsed(found)

    train = importlib.import_module("tinyagent_fast.commands.train")
    run = SimpleNamespace(config=lambda: preset_config("cpu"))
    monkeypatch.setattr(tyro, "cli", read_and_stop)
    monkeypatch.setattr(train, "find_run", lambda *_: run)
    monkeypatch.setattr(train, "choose_preset", lambda: ("cpu", "of a test"))
    monkeypatch.chdir(tmp_path)

    def parse(words: list[str]) -> None:
        name, rest = split_command(words)
        module = importlib.import_module(f"tinyagent_fast.commands.{cli.COMMANDS[name][0]}")
        with pytest.raises(Parsed) as stopped:
            module.run(rest)
        (flags,) = stopped.value.args
        if isinstance(flags, Config):
            check_config(flags)

    return parse


@pytest.mark.parametrize(("line", "words"), OURS, ids=name_of)
def test_every_command_line_is_one_that_the_program_reads(
    line: Line, words: list[str], parse: Any
) -> None:
    parse(words)


def test_a_flag_that_does_not_exist_is_found_out(parse: Any) -> None:
    for line in ("train --train.epoch 2", "eval --runn x", "memory --card", "chat --runn x"):
        with pytest.raises(SystemExit):
            parse(line.split())


@pytest.mark.parametrize(("line", "words"), MAKE, ids=name_of)
def test_every_make_line_runs_a_command_that_the_program_reads(
    line: Line, words: list[str], parse: Any
) -> None:
    done = subprocess.run(
        [*words, "--dry-run", "VENV=/nonexistent"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    program = "/nonexistent/bin/tinyagent-fast "
    for command in done.stdout.splitlines():
        if command.startswith(program):
            parse(shlex.split(command)[1:])


def cheap_lines() -> list[tuple[Line, list[str]]]:
    return [(n, w) for n, w in OURS if not n.needs and split_command(w)[0] in CHEAP]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the runs and files that the documents speak of, and work in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    for name, texts in (("other-run", [PLAN, "1. join()"]), ("my-run", [PLAN, PLAN])):
        run = create_run(preset_config("cpu").__class__(preset="cpu", name=name))
        file = PredictionFile(run.path / "eval")
        file.start({"test_sha256": "t"})
        file.append(
            Prediction(
                key=f"k{at}",
                query="Sid?",
                label=PLAN,
                prediction=text,
                stop_reason="stop",
                new_tokens=9,
            )
            for at, text in enumerate(texts)
        )
    (tmp_path / "pairs.json").write_text(json.dumps([{"label": PLAN, "prediction": PLAN}]))
    (tmp_path / "answers.jsonl").write_text(json.dumps({"label": PLAN, "plan": PLAN}) + "\n")
    shutil.copy(BUILT_IN_CATALOGUE, tmp_path / "my-tools.yaml")
    return tmp_path


@pytest.mark.parametrize(("line", "words"), cheap_lines(), ids=name_of)
def test_every_cheap_command_line_works_as_written(
    line: Line, words: list[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, rest = split_command(words)
    if name == "data generate":
        words = [*words, *(["--train-entries", "40"] if "--train-entries" not in rest else [])]
    if name == "data check":
        folder = Path(next(word for word in rest if word.endswith(".json"))).parent
        generate_dataset(GenerationSpec(train_entries=40, test_entries=5), folder)
    assert cli.main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def python_of(path: Path) -> str:
    """Give the Python blocks of a document as one program."""
    text = path.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))


PROGRAMS = [path for path in DOCUMENTS if python_of(path)]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_the_python_of_a_document_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", python_of(path)],
        cwd=tmp_path,
        env={**os.environ, "TINYAGENT_FAST_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_readme_and_the_document_of_the_api_have_programs() -> None:
    assert {"README.md", "python.md"} <= {path.name for path in PROGRAMS}
    offered = set(tinyagent_fast.__all__) - {"__version__"}
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert {name for name in offered if f"`{name}`" not in text} == set()


def test_every_link_leads_to_a_file_and_heading_that_are_there() -> None:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            found = (path.parent / file) if file else path
            assert found.exists(), f"{path.name}: {target}"
            if anchor:
                assert anchor in anchors_of(found), f"{path.name}: {target}"


def anchors_of(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Return every flag of every command, as its help names it."""
    import contextlib
    import io

    known: set[str] = set()
    for name in cli.COMMANDS:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            cli.main([*name.split(), "--help"])
        known |= set(re.findall(r"--[a-z][\w.-]*[\w]", said.getvalue()))
    assert {"--train.batch", "--engine", "--card", "--once", "--quant"} <= known
    return known | {"--help", "--version", "--preset", "--config", "--resume", "--rows"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_in_the_text_exists(path: Path, known_flags: set[str]) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for code in re.findall(r"`([^`]+)`", text):
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code))
        assert flags <= known_flags | OF_OTHERS, f"`{code}`"


def sentences_of_the_program() -> list[str]:
    """List all texts in the sources; what is filled in stands as a NUL."""
    texts = []
    for path in (ROOT / "tinyagent_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values]
                texts.append("".join(parts))
    return texts


def quoted_messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.splitlines()]


def pieces_of(message: str) -> list[str]:
    """Cut a message where `<...>` stands for something; words of a few letters prove nothing."""
    pieces = (piece.strip() for piece in re.split(r"<[^>]*>", message))
    return [piece for piece in pieces if len(piece) > 5]


def test_every_message_in_troubleshooting_is_one_that_the_program_says() -> None:
    messages, sources = quoted_messages(), sentences_of_the_program()
    assert len(messages) > 20
    for message in messages:
        assert pieces_of(message), message
        for piece in pieces_of(message):
            assert any(piece in source for source in sources), piece


def test_the_metric_document_names_every_cause_of_failure() -> None:
    text = (ROOT / "docs" / "metric.md").read_text(encoding="utf-8")
    causes = re.findall(r"^\| `(\w+)` \|", text, flags=re.M)
    assert causes == list(FAILURE_CODES)


def test_the_export_document_names_the_gates_that_there_are() -> None:
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    table = text.split("| gate | rule |")[1].split("\n\n")[0]
    names = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert len(names) == 9
    sources = sentences_of_the_program()
    for name in names:
        wanted = "success of " if name.startswith("success of") else name
        assert any(wanted in source for source in sources), name


@pytest.mark.parametrize(("column", "card"), enumerate(("t4", "l4", "a100"), start=2))
def test_the_predicted_figures_of_the_presets_are_those_that_plan_gives(
    column: int, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["memory", "--card", card, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    text = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = {
        cells[1].strip(): cells[column].strip()
        for line in text.splitlines()
        if line.startswith("|") and len(cells := line.split("|")) == 6
    }
    config = preset_config(card)
    predicted = answer["preset"]["total_gib"]
    found, hours = answer["recommendation"], answer["hours_per_epoch"]
    assert float(rows["memory that can be used, GiB"]) == pytest.approx(
        answer["usable_gib"], abs=0.06
    )
    weights = {"nf4": "NF4", "bf16": "bf16"}[config.model.weights]
    preset = f"{config.train.batch} x {config.train.accumulation}, {weights}, "
    assert rows["preset as it is: rows, weights, checkpointing"].startswith(preset)
    assert float(rows["predicted GiB of the preset"]) == pytest.approx(predicted, abs=0.06)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| `{card}` |"))
    batches = f"{config.train.batch} x {config.train.accumulation}"
    assert row.endswith(f"| {weights} | {batches} | {config.train.epochs:g} |")
    assert rows["`memory` recommends"].startswith(f"{found['batch']} x {found['accumulation']}, ")
    assert float(rows["predicted GiB of that"]) == pytest.approx(found["total_gib"], abs=0.06)
    for name, key in (("no checkpointing", "off"), ("checkpointing", "unsloth")):
        low, high = map(float, rows[f"predicted hours of an epoch, {name}"].split(" - "))
        assert (low, high) == pytest.approx(tuple(hours[key]), abs=0.06)
