"""llama.cpp, in which exported GGUF files run: whether its package loads on this machine."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from tinyagent_fast.doctor.findings import Finding, ok, warning

_TIMEOUT_S = 30
_NEEDED_FOR = "exports and GGUF files need it, training does not"


def check_llama_cpp(install: str) -> Finding:
    """Import llama.cpp's package in a process of its own, since a wrong build can abort.

    Args:
        install: The command that installs it.

    Returns:
        A warning where it cannot be used.
    """
    missing = [name for name in ("xllamacpp", "gguf") if find_spec(name) is None]
    if missing:
        return warning("llama.cpp", f"{', '.join(missing)} missing: {_NEEDED_FOR}", install)
    problem = _import_problem()
    if problem is None:
        text = f"xllamacpp {metadata.version('xllamacpp')}, gguf {metadata.version('gguf')}"
        if find_spec("llama_cpp") is not None:
            text += ", llama-cpp-python too"
        return ok("llama.cpp", text)
    text = f"xllamacpp cannot be loaded: {problem}; {_NEEDED_FOR}"
    if "libgomp" in problem:
        return warning("llama.cpp", text, "apt-get install libgomp1 (dnf install libgomp)")
    return warning("llama.cpp", text, install)


def _import_problem() -> str | None:
    """Say why the package cannot be imported."""
    words = [sys.executable, "-c", "import xllamacpp; xllamacpp.Server"]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            cwd=Path(__file__).parents[2],  # as the process that serves
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_TIMEOUT_S} s"
    if not done.returncode:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"its process ended with code {done.returncode}"
