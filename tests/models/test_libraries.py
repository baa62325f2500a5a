"""What libraries read once is set before they do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tinyagent_fast.models.libraries import set_environment

_NAME = "PYTORCH_ALLOC_CONF"


@pytest.fixture(autouse=True)
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_NAME, "")  # so that what is set is taken back
    monkeypatch.delenv(_NAME)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")


def test_memory_of_a_gpu_is_given_out_in_segments_that_grow() -> None:
    set_environment()
    assert os.environ[_NAME] == "expandable_segments:True"


def test_a_users_own_setting_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_NAME, "max_split_size_mb:64")
    set_environment()
    assert os.environ[_NAME] == "max_split_size_mb:64"


@pytest.mark.parametrize(
    ("where", "machine", "release"),
    [
        ("win32", "AMD64", "10"),
        ("linux", "x86_64", "5.15.153.1-microsoft-standard-WSL2"),
        ("linux", "aarch64", "5.15.136-tegra"),
    ],
)
def test_where_drivers_cannot_do_it_nothing_is_set(
    where: str, machine: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", where)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "release", lambda: release)
    set_environment()
    assert _NAME not in os.environ


def test_it_is_set_before_the_first_look_at_a_gpu() -> None:
    program = """
import os, platform, sys
sys.platform = "linux"
platform.machine, platform.release = lambda: "x86_64", lambda: "6"
import torch

torch.cuda.is_available = lambda: print(os.environ["PYTORCH_ALLOC_CONF"]) or False
from tinyagent_fast.presets import choose_preset
choose_preset()
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert done.stdout == "expandable_segments:True\n"
