"""What a check says: one line, how bad it is, and the command that repairs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tinyagent_fast.errors import TrainingError

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor."""

    name: str
    status: Status
    text: str
    fix: str | None = None
    """A command or setting; every warning and failure has one."""

    def __post_init__(self) -> None:
        """Hold warnings and failures to naming a fix."""
        assert self.status == "ok" or self.fix, f"{self.name}: what is wrong needs a fix"


def ok(name: str, text: str) -> Finding:
    """Say what was found to be right.

    Args:
        name: What was looked at.
        text: What was found.

    Returns:
        The finding.
    """
    return Finding(name=name, status="ok", text=text)


def warning(name: str, text: str, fix: str) -> Finding:
    """Say what works, but worse than it could.

    Args:
        name: What was looked at.
        text: What was found.
        fix: A command or setting.

    Returns:
        The finding.
    """
    return Finding(name=name, status="warning", text=text, fix=fix)


def failure(name: str, text: str, fix: str) -> Finding:
    """Say what stops a run.

    Args:
        name: What was looked at.
        text: What was found.
        fix: A command or setting.

    Returns:
        The finding.
    """
    return Finding(name=name, status="failure", text=text, fix=fix)


def refuse_failures(findings: Sequence[Finding]) -> None:
    """Stop a command before it starts on what cannot end well.

    Args:
        findings: What the checks said.

    Raises:
        TrainingError: Names every failure and its fix; warnings are no reason to stop.
    """
    failures = [found for found in findings if found.status == "failure"]
    if failures:
        raise TrainingError(
            f"this machine is not ready: {len(failures)} check(s) failed",
            "\n       ".join(f"{found.name}: {found.text}" for found in failures),
            "\n       ".join(str(found.fix) for found in failures)
            + "\n       (tinyagent-fast doctor shows every check)",
        )
