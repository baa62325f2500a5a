"""Nothing is sent: no command opens a socket unless a name of the hub was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyagent_fast.config import Config, dump_config

# Audit hooks see what native and threaded users of Python's sockets do too. The child of llama.cpp
# is asked on the loopback address.
WATCH = """
import sys

seen = []

def watch(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", "::1"):
        seen.append(f"{event} {arguments[0]}")
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[-1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            seen.append(f"{event} {address}")
            raise OSError(101, "the network is off in this test")

sys.addaudithook(watch)
"""
COMMANDS = """
import json

from tinyagent_fast.cli import main

codes = [main(command) for command in json.loads(sys.argv[1])]
print(json.dumps({"codes": codes, "seen": seen}))
"""


def watched(code: str, *arguments: str) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCH + code, *arguments],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_train_eval_export_and_chat_open_no_socket(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config(
        name="one", train={"max_steps": 2, "evaluations": 1}, eval={"max_new_tokens": 4}
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    of_run = ["--run", "one"]
    commands = [
        ["train", "--config", str(path)],
        ["eval", *of_run],
        ["export", *of_run, "--quant", "f16", "--gates", "off"],
        ["eval", *of_run, "--engine", "gguf"],
        ["chat", *of_run, "--once", "open the note", "--json"],
        ["report", *of_run],
    ]
    told = json.loads(watched(COMMANDS, json.dumps(commands)))
    assert told == {"codes": [0] * len(commands), "seen": []}


def test_the_watch_sees_a_socket() -> None:
    code = """
import json, socket
try:
    socket.create_connection(("192.0.2.1", 9), timeout=1)
except OSError:
    pass
print(json.dumps(seen))
"""
    assert json.loads(watched(code)) != []


@pytest.mark.parametrize("first", ["huggingface_hub", "tinyagent_fast"])
def test_reports_are_off_in_whatever_order_libraries_come(first: str) -> None:
    code = f"""
import {first}
import tinyagent_fast
from huggingface_hub.utils import _telemetry, send_telemetry
import os
send_telemetry(topic="test")
print(_telemetry._TELEMETRY_THREAD is None and os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1")
"""
    assert watched(code) == "True"
