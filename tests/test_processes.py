"""`benchmarks/processes.py`: a step of its own process has its own memory and its own failure."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from processes import measured

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def hold(size_mib: int) -> dict[str, int]:
    held = bytearray(b"x") * (size_mib << 20)
    time.sleep(0.2)
    return {"held_mib": len(held) >> 20}


def test_memory_and_time_are_those_of_the_step_alone():
    large, small = measured(hold, 200), measured(hold, 1)
    assert (large["held_mib"], small["held_mib"]) == (200, 1)
    for name in ("peak_mib", "peak_rss_mib"):
        assert 190 < large[name] - small[name] < 210
    assert small["seconds"] >= 0.2


def fail() -> None:
    raise ValueError("as it should")


def test_a_failure_of_the_step_is_raised_here():
    with pytest.raises(ValueError, match="as it should"):
        measured(fail)
