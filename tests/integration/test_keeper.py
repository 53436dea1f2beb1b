"""The keeper with a real mount: what readers see when workers, and keepers, come and go."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from helios.mounts import detach
from heliosfs.fuse.tables import open_files
from heliosfs.keeper import wire
from tests.support.keeper import MIB, Kept, alive, ends, reading

KERNEL = tuple(int(part) for part in platform.release().split(".")[:2])

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="mount(2) needs root"),
    pytest.mark.skipif(KERNEL < (6, 9), reason=f"FUSE_NOTIFY_RESEND needs Linux 6.9, this is {platform.release()}"),
]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path, 64 * MIB)
    yield kept
    kept.close()
    assert not kept.logged("Traceback"), kept.log.read_text()


def test_a_reader_sees_no_error_while_workers_are_killed(kept):
    kept.start()
    generations = [kept.board().generation]
    with reading(kept) as digest:
        for _ in range(10):
            time.sleep(0.1)
            last = kept.worker()
            os.kill(last, signal.SIGKILL)
            kept.next_worker(last)
            kept.wait(lambda: kept.board().generation > generations[-1])
            generations.append(kept.board().generation)
        assert digest.digests(60) == {kept.digest}
    assert generations == list(range(1, 12))
    assert kept.board().crashes == 0, "nobody's fault"
    assert kept.board().init_len


def test_a_request_that_takes_its_worker_along_counts_as_a_crash_and_is_answered_by_the_next(kept):
    kept.start()
    kept.fault(f"{3 * MIB}-exit")
    assert kept.read() == kept.digest
    assert kept.struck(f"{3 * MIB}-exit")
    assert kept.board().crashes == 1


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group whose processes get 32 MiB."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"helios-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            (group / limit).write_text(str(32 * MIB))
            break
    else:
        pytest.skip("no control group for memory can be made here")
    yield group
    Kept.wait(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_request_that_takes_all_memory_counts_as_a_crash_and_a_kill_does_not(
    kept: Kept, small_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAW_WORKER_CGROUP", str(small_memory))
    kept.start()
    last = kept.worker()
    os.kill(last, signal.SIGKILL)
    last = kept.next_worker(last)
    kept.fault(f"{5 * MIB}-oom")
    assert kept.read() == kept.digest
    assert kept.struck(f"{5 * MIB}-oom")
    assert kept.next_worker(last) != last
    assert kept.board().crashes == 1
    assert kept.logged('"status": -9, "how": "CRASH"')


@pytest.mark.parametrize("fault", ["stop", "hang"])
def test_a_worker_that_hangs_is_replaced(kept, fault):
    """Stopped: no signs of life. Hanging: it lives, but one request gets no answer within the worker's limit."""
    kept.start("--stall", "2")
    first = kept.worker()
    kept.fault(f"{2 * MIB}-{fault}")
    assert kept.read() == kept.digest
    assert kept.next_worker(first) != first
    assert not alive(first)
    assert kept.board().crashes == 1
    assert kept.logged("no sign of life" if fault == "stop" else "a request has waited")


def test_an_upgrade_disturbs_no_reader(kept):
    kept.start()
    with reading(kept) as digest:
        for _ in range(3):
            last = kept.worker()
            kept.keeper.send_signal(signal.SIGHUP)
            kept.next_worker(last)
            kept.wait(lambda: not alive(last))  # noqa: B023
            time.sleep(0.2)
        assert digest.digests(60) == {kept.digest}
    assert kept.board().crashes == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_everything(kept, number, status):
    kept.start()
    kept.read()
    kept.worker()
    kept.keeper.send_signal(number)
    ends(kept, status)


def test_a_signal_ends_everything_also_with_open_files_and_a_worker_that_hangs(kept):
    kept.start("--grace", "0.5")
    kept.fault(f"{40 * MIB}-stop")
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(kept.read)
        kept.wait(lambda: kept.struck(f"{40 * MIB}-stop"))
        kept.keeper.send_signal(signal.SIGTERM)
        ends(kept, 0)
        with pytest.raises(OSError):  # noqa: PT011
            reader.result(5)


def test_a_mount_that_is_unmounted_by_somebody_ends_its_keeper(kept):
    kept.start()
    kept.read()
    detach(kept.mountpoint)
    ends(kept, 0)


def test_a_worker_that_ends_at_start_leaves_no_mount(kept):
    kept.fault("start-exit")
    assert kept.start() == {}, "it could not say why; the log has the rest"
    assert kept.logged('"status": 3')
    ends(kept, 1)


def test_a_command_that_is_not_there_leaves_no_mount_and_a_reason(kept):
    kept.worker_argv = [str(kept.backing.parent / "missing")]
    assert "No such file" in kept.start()["error"]["message"]
    ends(kept, 1)


def test_a_place_that_cannot_be_mounted_is_a_reason(kept):
    kept.mountpoint.rmdir()
    assert "No such file" in kept.start()["error"]["message"]
    kept.mountpoint.mkdir()
    ends(kept, 1)


def asked(kept: Kept, fd: int, pool: ThreadPoolExecutor) -> list[Future[object]]:
    """Requests of several kinds and callers, for all of which the worker is needed."""
    reads: list[Future[object]] = [pool.submit(os.pread, fd, 4096, number * MIB) for number in (20, 30, 40)]
    reads.append(pool.submit(os.stat, kept.mountpoint / "missing"))
    return [*reads, pool.submit(os.open, kept.file, os.O_RDONLY), pool.submit(os.listdir, kept.mountpoint)]


def all_are_eio(requests: list[Future[object]]) -> None:
    for request in requests:
        with pytest.raises(OSError, match="Input/output error"):
            request.result(60)


def test_without_a_worker_requests_fail_after_a_while_and_the_next_worker_serves_again(kept):
    """All that wait, whoever had them. The worker is somebody else's, as in a pod."""
    kept.start("--patience", "1", spawn=False)
    first = kept.start_worker()
    fd = os.open(kept.file, os.O_RDONLY)
    assert os.pread(fd, 4096, 0) == kept.backing.read_bytes()[:4096]
    assert [file.opens for file in open_files(kept.board())] == [1]
    kept.fault(f"{20 * MIB}-hang")  # it has taken that one, and will take no more
    kept.fault("any-stop")
    with ThreadPoolExecutor(8) as pool:
        waiting = asked(kept, fd, pool)
        kept.wait(lambda: kept.struck(f"{20 * MIB}-hang") or kept.struck("any-stop"))
        first.kill()
        all_are_eio(waiting)
        assert first.wait(5) == -signal.SIGKILL
        all_are_eio(asked(kept, fd, pool))  # at once: it has been too long already
    os.close(fd)
    kept.wait(lambda: not len(open_files(kept.board())))  # the RELEASE was heard
    for fault in kept.faults.iterdir():
        fault.unlink()
    second = kept.start_worker()
    kept.wait(lambda: kept.board().generation == 2)
    assert kept.read() == kept.digest
    kept.keeper.send_signal(signal.SIGINT)
    assert second.wait(10) == 0
    ends(kept, 130)


def test_requests_fail_as_soon_when_workers_come_and_are_never_ready(kept):
    kept.start("--patience", "2")
    fd = os.open(kept.file, os.O_RDONLY)
    assert os.pread(fd, 4096, 0) == kept.backing.read_bytes()[:4096]
    last = kept.worker()
    kept.fault("start-hang")
    os.kill(last, signal.SIGKILL)
    last = kept.next_worker(last)
    with ThreadPoolExecutor(8) as pool:
        all_are_eio(asked(kept, fd, pool))
        assert kept.logged("it was not ready in time")
        last = kept.next_worker(last)
        all_are_eio(asked(kept, fd, pool))  # that one has no longer than the first had
    (kept.faults / "start-hang").unlink()
    os.close(fd)
    kept.wait(lambda: kept.board().loop_ns)  # one that serves has come
    assert kept.read() == kept.digest


def test_a_second_worker_waits_until_the_first_is_gone(kept):
    kept.start(spawn=False)
    first = kept.start_worker()
    kept.wait(kept.pid_file.exists)
    second = kept.start_worker()
    kept.read()
    assert kept.worker() == first.pid
    with reading(kept) as digest:
        first.kill()
        first.wait()
        assert kept.next_worker(first.pid) == second.pid
        assert digest.digests(60) == {kept.digest}
    kept.keeper.send_signal(signal.SIGINT)
    assert second.wait(10) == 0
    ends(kept, 130)


def test_a_stranger_gets_nothing(kept):
    kept.start()
    stranger = kept.start_worker()
    assert stranger.wait(10) == 1
    assert kept.logged("does not want this worker")
    kept.log.write_text(kept.log.read_text().replace("Traceback", "The stranger's end"))
    assert kept.read() == kept.digest


def test_a_successor_takes_over_under_a_reader(kept):
    kept.start()
    worker = kept.worker()
    with reading(kept) as digest:
        time.sleep(0.1)
        old = kept.keeper
        answer = kept.start("--take-over")
        assert answer["state"] == {"pid": worker, "generation": 1}
        assert old.wait(5) == 0
        assert kept.worker() == worker
        os.kill(worker, signal.SIGKILL)
        kept.next_worker(worker)
        assert digest.digests(60) == {kept.digest}
    assert kept.board().generation == 2
    kept.worker()
    kept.keeper.terminate()
    ends(kept, 0)


def test_after_a_killed_keeper_its_worker_gives_the_mount_to_the_next(kept):
    kept.start()
    worker = kept.worker()
    with reading(kept) as digest:
        kept.keeper.kill()
        kept.keeper.wait()
        kept.start("--take-over")
        assert kept.worker() == worker
        kept.keeper.send_signal(signal.SIGHUP)
        kept.next_worker(worker)
        assert digest.digests(60) == {kept.digest}
    kept.worker()
    kept.keeper.terminate()
    ends(kept, 0)


def test_a_successor_that_nobody_needs_any_more_ends_without_a_complaint(kept):
    """Its worker died meanwhile, and somebody else unmounted, or mounted anew."""
    kept.start()
    worker = kept.worker()
    kept.keeper.kill()
    kept.keeper.wait()
    os.kill(worker, signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(kept.start, "--take-over")
        kept.wait(kept.listens)
        detach(kept.mountpoint)
        assert answer.result(10) == {}
    assert kept.keeper.wait(10) == 0
    assert kept.logged("is not taken over")
    assert not kept.logged('"level": "error"')


def test_a_successor_ends_with_the_worker_that_asked_for_it(kept):
    kept.start()
    worker = kept.worker()
    os.kill(worker, signal.SIGSTOP)  # it can't come
    kept.keeper.kill()
    kept.keeper.wait()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(kept.start, "--take-over", "--asker", str(worker))
        kept.wait(kept.listens)
        os.kill(worker, signal.SIGKILL)
        assert answer.result(10) == {}
    assert kept.keeper.wait(10) == 0
    assert not kept.logged('"level": "error"')
    detach(kept.mountpoint)


def test_a_keeper_is_small_and_imports_nothing_but_the_standard_library(kept, record_property):
    kept.start()
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{kept.keeper.pid}/status").read_text().splitlines() if ":" in line
    )
    record_property("keeper_rss", status["VmRSS"].strip())
    assert int(status["RssAnon"].split()[0]) < 16 << 10, "KiB"
    script = "import sys, heliosfs.keeper.__main__; print(*sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(Path(wire.__file__).parents[2])}
    loaded = subprocess.run(
        [sys.executable, "-P", "-S", "-c", script], env=environ, capture_output=True, text=True, check=True
    )
    names = set(loaded.stdout.split())
    assert {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names} <= {
        "__main__",
        "heliosfs",
        *(name for name in names if f"{name}.".startswith("heliosfs.keeper.")),
    }
