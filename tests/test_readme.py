"""What the README tells people to type exists and works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split("  #")[0].split("   #")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.strip()
]


def test_the_readme_has_commands_and_no_open_place() -> None:
    assert len(COMMANDS) > 8
    assert "@@" not in README


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_every_make_command_names_a_target(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "--dry-run", "VENV=/nonexistent"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("tinyagent-fast ")])
def test_every_command_and_its_flags_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    done = _run([*words, "--help"], ROOT)
    assert done.returncode == 0, done.stderr
    for flag in (word for word in words if word.startswith("--")):
        assert flag in done.stdout or flag.replace("-", "_") in done.stdout, flag


def test_every_file_that_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_generate_preview_and_score_work_as_written(tmp_path: Path) -> None:
    flags = ["--train-entries", "300", "--test-entries", "10"]
    assert _run(["data", "generate", "--out", "data/mine", *flags], tmp_path).returncode == 0
    checked = _run(["data", "check", "data/mine/training_data.json"], tmp_path)
    assert checked.returncode == 0, checked.stderr
    plan = '1. get_email_address("Sid")\n2. join()'
    (tmp_path / "pairs.json").write_text(json.dumps([{"label": plan, "prediction": plan}]))
    scored = _run(["score", "--pairs", "pairs.json", "--json"], tmp_path)
    assert json.loads(scored.stdout)["success"] == 1.0


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinyagent_fast", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
