"""Stop signals end a command, whatever it is at."""

import subprocess
import sys

# Most of its time goes to the loop itself, where a raised exception loses the task in hand.
STOPPED_AT_RANDOM = """
import asyncio, os, random, signal
from tinyagent_fast.interrupts import noting_interrupts, run_async

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))

async def turns():
    while True:
        await asyncio.sleep(0)

async def busy():
    await asyncio.gather(*[turns() for _ in range(4)])

stopped = 0
chance = random.Random(0)
for _ in range(150):
    try:
        with noting_interrupts():
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.02))
            run_async(busy())
    except KeyboardInterrupt:
        stopped += 1
print(stopped)
"""


def _printed(text: str, timeout_s: int) -> str:
    words = [sys.executable, "-c", text]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stop_signal_ends_an_event_loop_at_any_instant() -> None:
    assert _printed(STOPPED_AT_RANDOM, timeout_s=120) == "150\n"


def test_ctrl_c_from_python_code_is_raised_though_the_work_went_on() -> None:
    text = """
import asyncio, os, signal
from tinyagent_fast.interrupts import run_async

async def goes_on():
    os.kill(os.getpid(), signal.SIGINT)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return 2

signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(2):
    try:
        print(run_async(goes_on()))
    except KeyboardInterrupt:
        print("stopped", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    assert _printed(text, timeout_s=60) == "stopped True\nstopped True\n"


def test_a_stop_signal_is_raised_though_the_work_ended() -> None:
    text = """
import asyncio, os, signal
from tinyagent_fast.interrupts import Terminated, noting_interrupts, run_async

async def ends():
    os.kill(os.getpid(), signal.SIGTERM)
    return 1

async def swallows():
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return 2

for work in (ends, swallows):
    with noting_interrupts():
        try:
            print(run_async(work()))
        except Terminated:
            print("terminated")
"""
    assert _printed(text, timeout_s=60) == "terminated\nterminated\n"
