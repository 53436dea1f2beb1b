"""The first process of a container: a signal reaches the command, its status comes through, and no zombie stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

COMMAND = """
import ctypes, os, signal, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # as process 1 does it, orphans become its children
from helios.launch.init import as_init
as_init(1)
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # as the end of process 1 does it
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(0.2)  # an orphan by now
    os._exit(0)
print(os.getppid(), flush=True)
while True:
    time.sleep(60)
"""


@pytest.fixture
def init():
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert int(process.stdout.readline()) == process.pid, "the command is a child of it"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def children(pid):
    """States of a process' children."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        text = Path(f"/proc/{child}/stat").read_text()
        found.append(text[text.rindex(")") + 2])
    return found


def test_signals_and_the_exit_status_pass(init):
    init.send_signal(signal.SIGTERM)
    assert init.wait(20) == 7


def test_a_command_that_a_signal_ends_says_so(init):
    init.send_signal(signal.SIGINT)
    assert init.wait(20) == 130


def test_orphans_are_reaped(init, wait_for):
    time.sleep(0.3)  # it has ended
    # the command itself, and the child that it does not wait for, is its own
    wait_for(lambda: len(children(init.pid)) == 1, what="the orphan to be reaped")


def test_elsewhere_nothing_happens():
    from helios.launch.init import as_init

    before = os.getpid()
    as_init()
    assert os.getpid() == before
