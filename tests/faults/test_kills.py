"""Commands that are broken off end as if nothing had been: `make test-faults` in short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_commands_that_are_broken_off_end_as_if_nothing_had_been() -> None:
    program = [sys.executable, str(Path(__file__).with_name("kills.py"))]
    counts = ["--kills", "12", "--stops", "6", "--full-disks", "6"]
    done = subprocess.run([*program, *counts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " 0 differing" in done.stdout
