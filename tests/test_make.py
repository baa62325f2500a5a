"""What `make` hands on arrives as it was given, whatever stands in it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
STAND_IN = "#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
NAMES = ("RUN", "MODEL", "ENGINE", "PRESET", "A", "B")
RECIPES = re.findall(r"^([\w-]+):[^\n]*##[^\n]*\n((?:\t[^\n]*\n)+)", MAKEFILE, re.MULTILINE)
CASES = [
    (target, name)
    for target, recipe in RECIPES
    for name in NAMES
    if f"$({name})" in recipe or f",$({name})" in recipe
]


def test_the_targets_that_take_names_were_found() -> None:
    assert {
        ("eval", "RUN"),
        ("agent-eval", "RUN"),
        ("compare", "B"),
        ("chat", "MODEL"),
        ("preview", "PRESET"),
    } <= {*CASES}
    assert len(CASES) > 15


@pytest.mark.parametrize(("target", "name"), CASES)
@pytest.mark.parametrize("value", ["my run", "it's", 'a "b"; exit 9 &', "über*?[x]", "-- x"])
def test_a_name_is_one_word_for_every_target(
    target: str, name: str, value: str, tmp_path: Path
) -> None:
    program = tmp_path / "venv" / "bin" / "tinyagent-fast"
    program.parent.mkdir(parents=True)
    program.write_text(
        "#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    words = ["make", "-s", target, f"VENV={tmp_path}/venv", f"{name}={value}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    handed = json.loads(done.stdout.splitlines()[-1])
    assert (f"runs/{value}" if target == "score" else value) in handed
