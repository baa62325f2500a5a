"""Killed commands go on and end as if nothing had been: the short form of `make test-faults`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_commands_end_as_if_nothing_had_been() -> None:
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " 0 differing" in done.stdout
