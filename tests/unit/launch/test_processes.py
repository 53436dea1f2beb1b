"""Children under a guard: nothing of a tree survives its owner, whatever ends first."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from helios.launch.processes import Children, records, repair
from helios.process import ProcessId

TREE = """
import os, signal, subprocess, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
# a grandchild that is deaf to SIGTERM and, with "detached", in a session of its own
code = "import os, signal, time; signal.signal(15, signal.SIG_IGN)"
code += "; open(%r, 'w').write(str(os.getpid())); time.sleep(99)"
subprocess.Popen([sys.executable, "-c", code % sys.argv[1]], start_new_session="detached" in sys.argv)
print("up", flush=True)
time.sleep(99)
"""


@pytest.fixture
def tree(tmp_path, wait_for):
    """Command of a process tree, and a function that waits for its grandchild."""
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    mark = tmp_path / "grandchild"

    def grandchild() -> ProcessId:
        wait_for(lambda: mark.exists() and mark.read_text(), what="the grandchild's start")
        identity = ProcessId.of(int(mark.read_text()))
        assert identity is not None
        return identity

    return [sys.executable, str(script), str(mark)], grandchild


@pytest.mark.parametrize("manner", ["", "deaf", "detached"])
def test_leaving_the_context_ends_the_whole_tree(helios_home, tree, manner):
    command, grandchild = tree
    with Children(helios_home) as children:
        child = children.start("tree", [*command, manner], grace_s=0.3)
        lives = grandchild()
        (_, record), *others = records(helios_home)
        assert (record.name, others) == ("tree", [])
        assert record.process.alive()
        assert record.owner == ProcessId.current()
        assert child.poll() is None
    assert not lives.alive()
    assert not record.process.alive()
    assert list(records(helios_home)) == []
    assert child.tail() == "up"


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_exit_status_comes_through(helios_home, wait_for, code, status):
    with Children(helios_home) as children:
        child = children.start("brief", [sys.executable, "-c", f"print('last words', flush=True)\n{code}"])
        wait_for(lambda: child.poll() is not None, what="the end")
        assert child.poll() == status
        assert child.tail() == "last words"
    assert list(records(helios_home)) == []


OWNER = """
    import sys, time
    from helios.home import Home
    from helios.launch.processes import Children
    from pathlib import Path
    with Children(Home(Path(sys.argv[1]))) as children:
        children.start("tree", sys.argv[2:], grace_s=0.3)
        time.sleep(99)
"""


@pytest.fixture
def owner(helios_home, tree):
    """A process that owns a tree, and the tree's grandchild."""
    command, grandchild = tree
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(OWNER), str(helios_home.root), *command])
    yield process, grandchild()
    process.kill()
    process.wait()


def test_a_killed_owner_leaves_nothing(helios_home, owner):
    process, grandchild = owner
    (_, record), *_ = records(helios_home)
    process.kill()
    process.wait()
    assert grandchild.wait(5)
    assert record.guard.wait(5)
    assert list(records(helios_home)) == []


def test_the_next_run_repairs_after_owner_and_guard_were_killed(helios_home, owner):
    process, grandchild = owner
    (path, record), *_ = records(helios_home)
    os.kill(record.guard.pid, signal.SIGSTOP)  # so that it can't clean up
    process.kill()
    process.wait()
    os.kill(record.guard.pid, signal.SIGKILL)
    assert record.guard.wait(5)
    assert path.exists()
    assert record.process.wait(5)  # the kernel told it of the guard's death
    assert grandchild.alive()
    assert repair(helios_home) == ["tree"]
    assert not grandchild.alive()
    assert not path.exists()


def test_repair_leaves_the_processes_of_a_living_owner_alone(helios_home, owner):
    _, grandchild = owner
    assert repair(helios_home) == []
    assert grandchild.alive()


def test_two_runs_do_not_share_a_log(helios_home, owner):
    with Children(helios_home) as children:
        child = children.start("tree", [sys.executable, "-c", "print('mine')"])
        assert child.log.name == f"tree-{os.getpid()}.log"
    assert {record.log for _, record in records(helios_home)} == {str(helios_home.logs / "tree.log")}
    assert (helios_home.logs / "tree.log").read_text() == "up\n"


def test_a_damaged_record_is_removed(helios_home, tmp_path):
    directory = helios_home.ensure_run() / "processes"
    directory.mkdir()
    (directory / "x.json").write_text(json.dumps({"name": "x"}))
    assert repair(helios_home) == []
    assert list(Path(directory).iterdir()) == []


@pytest.mark.parametrize("manner", ["deaf", "detached"])
def test_a_kill_does_not_wait_for_the_grace(helios_home, tree, wait_for, manner):
    command, grandchild = tree
    with Children(helios_home) as children:
        child = children.start("tree", [*command, manner], grace_s=60.0)
        lives = grandchild()
        children.kill()
        wait_for(lambda: child.poll() is not None, what="the end")
        assert child.poll() == 128 + signal.SIGKILL
        assert not lives.alive()
