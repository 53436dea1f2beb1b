import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from helios.process import ProcessId


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_living_process_is_recognised(child):
    identity = ProcessId.of(child.pid)
    assert identity is not None
    assert identity.alive()
    assert ProcessId.current().alive()
    assert ProcessId.current() != identity


def test_a_reused_pid_is_not_the_process(child):
    impostor = replace(ProcessId.of(child.pid), start="another-boot:1")
    assert not impostor.alive()
    assert not impostor.send(signal.SIGKILL)
    assert impostor.wait(0)
    assert child.poll() is None


def test_a_zombie_does_not_live(child):
    identity = ProcessId.of(child.pid)
    child.kill()
    assert identity.wait(5)
    assert not identity.alive()
    assert not identity.send(signal.SIGTERM)
    assert ProcessId.of(child.pid) is None


def test_ending_escalates():
    deaf = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    deaf.stdout.readline()
    identity = ProcessId.of(deaf.pid)
    assert not identity.wait(0.05)
    assert identity.end(0.2)
    assert deaf.wait() == -signal.SIGKILL
    deaf.stdout.close()


def test_ending_what_ended_is_fine():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    identity = ProcessId.of(gone.pid)
    gone.wait()
    assert identity is None or identity.end(0.1)
