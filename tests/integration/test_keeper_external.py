"""A keeper whose workers, and whose own next life, are somebody else's doing, as in a cluster: the test is the kubelet.

Keeper and workers have process ids of their own (``NAMESPACE``), as containers have: neither sees nor can signal the
other. Somebody reads through all of it and sees no error.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helios.mounts import find_mount
from helios.native import reasons_against
from heliosfs.fuse.tables import open_files
from tests.support.keeper import MIB, NAMESPACE, Kept, ends, inner, reading
from tests.support.mounts import fails

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or bool(reasons_against("auto")), reason="needs root and Linux 6.9"),
]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path, 64 * MIB)
    yield kept
    kept.close()
    assert not kept.logged("Traceback"), kept.log.read_text()


def serving(kept: Kept, generation: int) -> None:
    """Wait until so many workers have been."""
    kept.wait(lambda: kept.board().generation == generation)


def end(kept: Kept, process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> None:
    """Signal what was started in a NAMESPACE, and wait for it."""
    os.kill(inner(process), number)
    process.wait(20)


def test_workers_come_and_go(kept: Kept) -> None:
    kept.start(spawn=False, within=NAMESPACE)
    worker = kept.start_worker("pod-1", NAMESPACE)
    with reading(kept) as rounds:
        for generation in range(1, 5):
            serving(kept, generation)
            rounds.next()
            end(kept, worker)
            worker = kept.start_worker("pod-1", NAMESPACE)
        serving(kept, 5)
        assert rounds.digests(60) == {kept.digest}
    end(kept, kept.keeper, signal.SIGINT)
    assert worker.wait(20) == 0, "the keeper told it to go"
    assert kept.left() == []


def test_a_worker_that_comes_with_another_name_replaces_the_present_one(kept: Kept) -> None:
    kept.start(spawn=False, within=NAMESPACE)
    first = kept.start_worker("pod-1", NAMESPACE)
    with reading(kept) as rounds:
        serving(kept, 1)
        rounds.next()
        second = kept.start_worker("pod-2", NAMESPACE)
        assert first.wait(20) == 0
        serving(kept, 2)
        again = kept.start_worker("pod-1", NAMESPACE)  # started again by somebody who does not know yet
        rounds.next()
        assert second.poll() is None
        end(kept, second)
        serving(kept, 3)
        assert rounds.digests(60) == {kept.digest}
    assert kept.board().crashes == 1, "a kill that nobody can tell from a crash"
    end(kept, kept.keeper, signal.SIGINT)
    assert again.wait(20) == 0


def test_a_worker_that_hangs_is_dropped_and_does_no_harm_when_it_wakes(kept: Kept) -> None:
    """It can't be killed from the keeper's namespace."""
    kept.start("--stall", "1.5", spawn=False, within=NAMESPACE)
    first = kept.start_worker("", NAMESPACE)
    serving(kept, 1)
    board = kept.board()
    with reading(kept) as rounds:
        rounds.next()
        os.kill(inner(first), signal.SIGSTOP)
        second = kept.start_worker("", NAMESPACE)
        kept.wait(lambda: kept.logged("can't be killed from here") and kept.board().generation == 3)
        rounds.next()
        os.kill(inner(first), signal.SIGCONT)
        assert first.wait(20) == 4, "it saw that the mount is another one's"
        rounds.next()
        assert rounds.digests(60) == {kept.digest}
    assert kept.board().crashes == 1
    assert [file.opens for file in open_files(kept.board())] == [], "the books are right"
    assert board.generation == 2, "its own board is not the next one's"
    end(kept, kept.keeper, signal.SIGINT)
    assert second.wait(20) == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, None])
def test_a_keeper_that_ends_leaves_the_mount_with_its_worker_until_the_next_one_comes(
    kept: Kept, how: signal.Signals | None
) -> None:
    """None: the next one comes before it ends."""
    kept.start(spawn=False, within=NAMESPACE)
    worker = kept.start_worker("pod-1", NAMESPACE)
    with reading(kept) as rounds:
        serving(kept, 1)
        rounds.next()
        first = kept.keeper
        if how is not None:
            end(kept, first, how)
        rounds.next()
        kept.start(spawn=False, within=NAMESPACE)
        if how is None:
            assert first.wait(20) == 0
        kept.wait(lambda: kept.board().generation == 1)
        assert worker.poll() is None
        end(kept, worker)
        worker = kept.start_worker("pod-1", NAMESPACE)
        serving(kept, 2)
        assert rounds.digests(60) == {kept.digest}
    end(kept, kept.keeper, signal.SIGINT)
    assert worker.wait(20) == 0


@pytest.mark.parametrize("what", ["a worker starts", "a worker goes"])
def test_a_keeper_that_is_told_to_end_leaves_the_mount_with_the_worker_that_is_about_to_serve(
    kept: Kept, what: str
) -> None:
    kept.start("--grace", "1.5", spawn=False)
    first, worker = kept.keeper, kept.start_worker("pod-1")
    with reading(kept) as rounds:
        serving(kept, 1)
        rounds.next()
        if what == "a worker starts":
            kept.fault("start-hang")
            end(kept, worker)
            worker = kept.start_worker("pod-1")
            kept.wait(lambda: kept.board().generation == 2 and "nanosleep" in doing(worker))
            (kept.faults / "start-hang").unlink()
        else:
            os.kill(worker.pid, signal.SIGSTOP)
        following = kept.start_worker("pod-2")  # the worker is told to go for it, and takes all of the grace
        kept.wait(lambda: kept.logged("the worker is replaced, pod-2 comes"))
        first.send_signal(signal.SIGTERM)
        assert worker.wait(20) == -signal.SIGKILL
        assert first.wait(20) == 0
        assert kept.logged("the mount stays with its worker")
        rounds.next()
        kept.start(spawn=False)
        rounds.next()
        assert rounds.digests(60) == {kept.digest}
    end(kept, kept.keeper, signal.SIGINT)
    assert following.wait(20) == 0
    assert kept.left() == []


def doing(process: subprocess.Popen[bytes]) -> str:
    """What of the kernel a process waits in."""
    return Path(f"/proc/{process.pid}/wchan").read_text()


def test_a_keeper_goes_for_a_successor_only_while_its_worker_lives(kept: Kept) -> None:
    kept.start(spawn=False, within=NAMESPACE)
    first, worker = kept.keeper, kept.start_worker("pod-1", NAMESPACE)
    with reading(kept) as rounds:
        serving(kept, 1)
        rounds.next()
        os.kill(inner(worker), signal.SIGSTOP)
        time.sleep(2.2)
        with ThreadPoolExecutor(1) as pool:
            listens = pool.submit(kept.start, spawn=False, within=NAMESPACE)
            time.sleep(1)
            assert first.poll() is None, "nobody would bring the mount"
            os.kill(inner(worker), signal.SIGCONT)
            assert first.wait(20) == 0
            listens.result(20)
        kept.wait(lambda: kept.board().generation == 1)
        rounds.next()
        assert rounds.digests(60) == {kept.digest}
    end(kept, kept.keeper, signal.SIGINT)
    assert worker.wait(20) == 0


@pytest.mark.parametrize("what", ["worker killed", "worker hangs", "worker late", "successor killed"])
def test_a_handover_that_fails_leaves_the_mount_with_the_keeper_that_had_it(kept: Kept, what: str) -> None:
    """The worker stops between its two keepers, and what happens then."""
    kept.start("--stall", "2" if what == "worker hangs" else "20", spawn=False)
    first, worker = kept.keeper, kept.start_worker("pod-1")
    with reading(kept) as rounds:
        serving(kept, 1)
        rounds.next()
        kept.fault("lost-stop")
        kept.start(spawn=False)
        successor = kept.keepers.pop()
        kept.wait(lambda: kept.struck("lost-stop"))
        if what == "worker killed":
            end(kept, worker)
        elif what == "successor killed":
            end(kept, successor)
        elif what == "worker hangs":
            assert worker.wait(20) == -signal.SIGKILL, "its keeper still watches it"
        assert successor.wait(20) == (-signal.SIGKILL if what == "successor killed" else 1)
        assert first.poll() is None
        if what in ("worker late", "successor killed"):
            os.kill(worker.pid, signal.SIGCONT)
        else:
            worker = kept.start_worker("pod-1")
            serving(kept, 2)
        rounds.next()
        kept.start(spawn=False)
        assert first.wait(20) == 0, "the next one gets it"
        rounds.next()
        assert rounds.digests(60) == {kept.digest}
    kept.wait(lambda: kept.logged("another keeper has the mount"))
    assert kept.logged("its worker did not bring the mount here in time") == (what != "successor killed")
    end(kept, kept.keeper, signal.SIGINT)
    assert worker.wait(20) == 0
    assert kept.left() == []


def test_a_keeper_without_worker_releases_the_mount_when_it_is_told_to_end(kept: Kept) -> None:
    kept.start(spawn=False, within=NAMESPACE)
    worker = kept.start_worker("pod-1", NAMESPACE)
    kept.read()
    end(kept, worker)
    kept.wait(lambda: kept.logged("the worker ended"))
    end(kept, kept.keeper, signal.SIGTERM)
    assert kept.left() == []


def test_a_mount_that_nobody_holds_is_made_anew(kept: Kept) -> None:
    kept.start(spawn=False, within=NAMESPACE)
    worker = kept.start_worker("pod-1", NAMESPACE)
    kept.read()
    for process in (kept.keeper, worker):
        end(kept, process)
    with fails(errno.ENOTCONN):
        os.listdir(kept.mountpoint)
    kept.start("--orphan", "0.5", spawn=False, within=NAMESPACE)
    kept.wait(lambda: kept.log.read_text().count('"mounted"') == 2)
    assert kept.logged("it is made anew")
    worker = kept.start_worker("pod-1", NAMESPACE)
    assert kept.read() == kept.digest
    end(kept, kept.keeper, signal.SIGINT)
    assert worker.wait(20) == 0
    assert find_mount(kept.mountpoint) is None


@pytest.mark.parametrize("uid", [65534, 65533])
def test_a_worker_of_another_user_is_allowed_or_refused(uid: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        kept = Kept(Path(directory), 4 * MIB)
        try:
            kept.start("--worker-uid", "65534", spawn=False)
            worker = kept.start_worker("pod-1", RAW_WORKER_UID=str(uid))
            if uid == 65534:
                assert kept.read() == kept.digest
            else:
                assert worker.wait(20) == 1
                assert kept.logged("does not want this worker")
            kept.keeper.send_signal(signal.SIGINT)
            worker.wait(20)
            ends(kept, 130)
        finally:
            kept.close()
