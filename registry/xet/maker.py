"""Makes the layouts of blobs that have none, one at a time, in the background and at low priority.

The queue is what is published or downloaded, and has no layout (registry/metadata/xet.py): nothing is lost by a crash,
and several processes on one database take different blobs. Until a blob has its layout it is served without Xet.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from select import POLLOUT, poll
from subprocess import PIPE, Popen
from typing import Final

from helios.errors import DeadlineExceeded, HeliosError, IntegrityError
from helios.metrics import RegistryMetrics
from heliosfs.store.keys import xet_key
from registry.catalog import Catalog
from registry.metadata import content, xet
from registry.metadata.database import Changes
from registry.metadata.xet import Queued
from registry.xet.hashes import to_text
from registry.xet.layout import Layout

log = logging.getLogger("helios.registry.xet")

POLL_S: Final = 2.0
"""How often the queue is looked at, in seconds."""
CLAIM_S: Final = 10
"""How long a claim lasts, in seconds; it is renewed four times as often."""
AGAIN_S: Final = (60, 600, 3600, 86400)
"""How long after its first, second, ... failure a blob is tried again, in seconds."""
STALL_S: Final = 300.0
"""hf-xet is given up when it takes no byte, or doesn't end, for so long, in seconds."""
PIPE_BYTES: Final = 1 << 20
"""Room in the pipe to hf-xet's process."""
NICE: Final = 19


class Stopped(Exception):
    """The registry ends."""


class Maker:
    """The background task. ``scratch`` is a directory of its own, for the shards that hf-xet writes."""

    def __init__(
        self,
        catalog: Catalog,
        least: int,
        scratch: Path,
        metrics: RegistryMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog, self._least, self._scratch, self._metrics, self._clock = catalog, least, scratch, metrics, clock
        self._stop = threading.Event()

    async def run(self) -> None:
        """Make layouts until cancelled; the one under way is then given up."""
        loop = asyncio.get_running_loop()
        self._stop.clear()
        with ThreadPoolExecutor(1, thread_name_prefix="xet", initializer=_low_priority) as thread:
            try:
                while True:
                    # What a killed one left; its hf-xet may go on writing there for a moment, so not only once.
                    await loop.run_in_executor(thread, shutil.rmtree, self._scratch, True)
                    if not await loop.run_in_executor(thread, self.step):
                        await asyncio.sleep(POLL_S)
            finally:
                self._stop.set()

    def step(self) -> bool:
        """Take one blob from the queue; False when there is none. Errors are logged, not raised."""
        try:
            queued = self._claim()
        except HeliosError as error:
            log.warning("the queue of Xet layouts can't be read", extra={"error": error.message})
            return False
        if queued is None:
            return False
        where = {"domain": queued.domain, "blob": queued.sha256, "size": queued.size}
        until, failed = 0, False
        started = time.monotonic()
        try:
            file = self._store(queued, self._make(queued))
        except Stopped:
            file = None
        except (HeliosError, OSError) as error:
            until, failed = int(self._clock()) + AGAIN_S[min(queued.failures, len(AGAIN_S) - 1)], True
            file = None
            log.warning("a blob has no Xet layout; it is tried again", extra={**where, "error": str(error)})
        except Exception:
            until, failed = int(self._clock()) + AGAIN_S[-1], True
            file = None
            log.exception("laying a blob out broke", extra=where)
        if file is not None:
            self._metrics.xet_layouts.labels("made").inc()
            log.info("laid out for Xet", extra={**where, "file": file, "seconds": round(time.monotonic() - started, 2)})
            return True
        if failed:
            self._metrics.xet_layouts.labels("failed").inc()
        self._hold(queued, until, failed=failed)
        return True

    def _claim(self) -> Queued | None:
        now, domains = int(self._clock()), self._catalog.domains.names
        with self._catalog.database.read() as connection:
            waiting = {domain: xet.waiting(connection, domain, self._least) for domain in domains}
        self._metrics.xet_waiting.set(sum(waiting.values()))
        for domain in (domain for domain in domains if waiting[domain] and not self._stop.is_set()):
            with self._catalog.database.write(changes=Changes.NOTHING) as connection:
                queued = xet.claim(connection, domain, self._least, now, now + CLAIM_S)
            if queued is not None:
                return queued
        return None

    def _hold(self, queued: Queued, until: int, *, failed: bool = False) -> None:
        try:
            with self._catalog.database.write(changes=Changes.NOTHING) as connection:
                xet.hold(connection, queued.domain, queued.sha256, until, failed=failed)
        except HeliosError as error:  # the claim ends by itself
            log.warning("a claim on a Xet layout can't be changed", extra={"error": error.message})

    def _make(self, queued: Queued) -> bytes:
        """The record of the blob's layout. Raises HeliosError, OSError, or Stopped."""
        reader = self._catalog.contents.stored_blob(queued.domain, queued.sha256)
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as scratch:
            renewed = self._clock()

            def alive() -> None:
                nonlocal renewed
                if self._stop.is_set():
                    raise Stopped
                if (now := self._clock()) - renewed > CLAIM_S / 4:
                    self._hold(queued, int(now) + CLAIM_S)
                    renewed = now

            return cut(queued.sha256, queued.size, reader.iterate(0, queued.size), Path(scratch), alive)

    def _store(self, queued: Queued, record: bytes) -> str | None:
        """Keep the layout; returns the blob's hash as a file, or None when the blob has gone meanwhile."""
        layout = Layout.decode(record)
        if (layout.blob, layout.size) != (queued.sha256, queued.size):
            raise IntegrityError(f"hf-xet was asked for the layout of {queued.sha256}, and gave that of {layout.blob}")
        catalog, digest = self._catalog, hashlib.sha256(record).hexdigest()
        key, file = xet_key(queued.domain, digest), to_text(layout.file)
        with catalog.publisher.claiming({key}) as claimed:
            catalog.store.put_bytes(key, record)
            with catalog.database.write() as connection:
                content.add_objects(connection, queued.domain, [(key, len(record))])
                added = xet.add(connection, queued.domain, queued.sha256, file, digest, key)
                claimed.end(connection)
        return file if added else None


def cut(blob: str, size: int, pieces: Iterable[memoryview], scratch: Path, alive: Callable[[], None]) -> bytes:
    """The record of the layout of a blob whose bytes come in pieces, by hf-xet in a process of its own.

    ``scratch`` is an empty directory. ``alive`` is called several times a second; what it raises ends the work.
    Raises IntegrityError when hf-xet fails, DeadlineExceeded when it hangs, and what the pieces raise.
    """
    package = Path(__file__).parents[2]
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": str(package),
        "HOME": str(scratch),
        "HF_XET_CACHE": "cache",
    }
    command = [sys.executable, "-m", "registry.xet.cutter", blob, str(size)]
    with open(scratch / "layout", "xb") as out, open(scratch / "error", "xb") as error:
        process = Popen(
            command, stdin=PIPE, stdout=out, stderr=error, cwd=scratch, env=environment, start_new_session=True
        )
    try:
        assert process.stdin is not None
        with process.stdin as pipe:
            told = _feed(pipe.fileno(), pieces, alive)
        code = _wait(process, alive)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code or not told:
        message = (scratch / "error").read_text(errors="replace").strip()[-500:]
        raise IntegrityError(f"hf-xet could not lay out {blob}: {message or f'exit {code}'}")
    return (scratch / "layout").read_bytes()


def _feed(pipe: int, pieces: Iterable[memoryview], alive: Callable[[], None]) -> bool:
    """Write the pieces; False when nobody reads them any more."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(PermissionError):  # more than this user may have for all pipes
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    poller = poll()
    poller.register(pipe, POLLOUT)
    last = time.monotonic()
    for piece in pieces:
        left = piece
        while left:
            alive()
            try:
                left = left[os.write(pipe, left) :]
                last = time.monotonic()
            except BlockingIOError:
                poller.poll(200)
            except BrokenPipeError:
                return False
            if time.monotonic() - last > STALL_S:
                raise DeadlineExceeded(f"hf-xet has taken nothing for {STALL_S:.0f} s")
    return True


def _wait(process: Popen[bytes], alive: Callable[[], None]) -> int:
    end = time.monotonic() + STALL_S
    while (code := process.poll()) is None:
        alive()
        if time.monotonic() > end:
            raise DeadlineExceeded(f"hf-xet has not ended after {STALL_S:.0f} s")
        time.sleep(0.02)
    return code


def _low_priority() -> None:
    """Linux gives every thread a priority of its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
