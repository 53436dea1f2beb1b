"""Takes samples of what users read, and compares them in the background with a plain download.

``read`` and ``opened`` may be called from any thread; they decide, copy at most one READ, and never wait. What can't be
compared soon enough is dropped. A user's read never fails, nor waits, for what happens here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from io import FileIO
from typing import Final

import trio

from helios.errors import HeliosError, UsageError
from helios.metrics import MountMetrics
from heliosfs.fetch.source import BlobRef
from heliosfs.routing import Page, Route, json_page, page
from heliosfs.shadow.plain import PlainDownload
from heliosfs.shadow.samples import MAX_WAITING, Mismatch, Report, Sample, Sampler, Tally

log = logging.getLogger("heliosfs.shadow")

DOWNLOADS: Final = 2
"""Comparisons at once."""

DISK_S: Final = 10.0
"""How long reading a file that the kernel reads itself may take, in seconds: its disk may hang."""

STUCK: Final = 4
"""Threads that read such files, those that were given up included; without one left these samples are dropped."""

LOGGED: Final = 100
"""Mismatches that the log tells; further ones are only counted."""


class Shadow:
    """``percent`` of the reads are compared, over 0 to 100. Raises UsageError."""

    def __init__(
        self, percent: float, plain: PlainDownload, metrics: MountMetrics, random_: random.Random | None = None
    ) -> None:
        if not 0 < percent <= 100:
            raise UsageError(f"mount.shadow_percent is {percent:g}", hint="It is a share of the reads: 0 to 100.")
        self._sampler, self._tally = Sampler(percent, random_ or random.Random()), Tally(percent)  # noqa: S311
        self._plain, self._metrics = plain, metrics
        self._lock = threading.Lock()
        self._limiter, self._readers = trio.CapacityLimiter(DOWNLOADS), trio.CapacityLimiter(STUCK)
        self._send, self._receive = trio.open_memory_channel[Sample](MAX_WAITING)
        self._token: trio.lowlevel.TrioToken | None = None
        self._failing = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compare until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(DOWNLOADS):
                    nursery.start_soon(self._work)
                task_status.started()
        finally:
            self._token = None

    def read(self, want: BlobRef, offset: int, parts: Sequence[bytes | bytearray | memoryview], seconds: float) -> None:
        """A user's READ was answered with these bytes after so many seconds."""
        if self._sampler.one():
            count = sum(map(len, parts))
            if count and self._admitted(count):
                self._post(Sample(want, offset, count, b"".join(parts), seconds))

    def opened(self, want: BlobRef, fd: int) -> None:
        """A user opened a file that the kernel reads from this descriptor's, which stays open for this call."""
        for offset, count in self._sampler.ranges(want.size):
            if self._admitted(count, readable=self._readers.available_tokens > 0):
                try:
                    file = FileIO(os.dup(fd))
                except OSError:  # too many are open: none of ours may be the one that a user lacks
                    with self._lock:
                        self._tally.drop(count)
                    self._metrics.shadow_dropped.inc()
                    return
                self._post(Sample(want, offset, count, file=file))

    def report(self) -> Report:
        """What was found up to now. Any thread."""
        with self._lock:
            return self._tally.report()

    # --- inside ---

    def _admitted(self, count: int, *, readable: bool = True) -> bool:
        if self._token is None:
            return False
        with self._lock:
            admitted = self._tally.admit(count, readable=readable)
        if not admitted:
            self._metrics.shadow_dropped.inc()
        return admitted

    def _post(self, sample: Sample) -> None:
        if (token := self._token) is not None:
            with suppress(trio.RunFinishedError):  # the mount ends, and what was found with it
                token.run_sync_soon(self._send.send_nowait, sample)

    async def _work(self) -> None:
        async for sample in self._receive:
            try:
                ours = (sample.data, sample.seconds) if sample.file is None else await self._read(sample, sample.file)
                if ours is not None:
                    await trio.to_thread.run_sync(
                        self._compare, sample, *ours, abandon_on_cancel=True, limiter=self._limiter
                    )
            except Exception:
                log.exception("a comparison failed in an unforeseen way", extra=_names(sample))
            finally:
                with self._lock:
                    self._tally.done(sample.count)

    async def _read(self, sample: Sample, file: FileIO) -> tuple[bytes, float] | None:
        """What the file has, and how long that took; None where that can't be said."""
        if not self._readers.available_tokens:
            threading.Thread(target=file.close, name="close", daemon=True).start()  # that may hang as well
            self._error("mount", sample, "too many files hang")
            return None
        with trio.move_on_after(DISK_S):
            try:
                return await trio.to_thread.run_sync(
                    _read_and_close, file, sample.offset, sample.count, abandon_on_cancel=True, limiter=self._readers
                )
            except OSError as error:
                self._error("mount", sample, f"the file can't be read: {error.strerror}")
                return None
        self._error("mount", sample, f"its disk does not answer within {DISK_S:g} s")
        return None

    def _compare(self, sample: Sample, ours: bytes, ours_s: float) -> None:
        """In a thread."""
        want, started = sample.want, time.perf_counter()
        try:
            theirs = self._plain.fetch(want, sample.offset, sample.count)
        except HeliosError as error:
            self._error("download", sample, error.message)
            return
        theirs_s = time.perf_counter() - started
        mismatch = None if ours == theirs else _mismatch(sample, ours, theirs)
        self._metrics.shadow_compared.labels(sample.way).inc()
        self._metrics.shadow_bytes.inc(sample.count)
        for side, seconds in (("mount", ours_s), ("download", theirs_s)):
            self._metrics.shadow_seconds.labels(side).observe(seconds)
        with self._lock:
            self._tally.found(sample.count, ours_s, theirs_s, mismatch)
            recovered, self._failing = self._failing, False
            told = self._tally.mismatches
        if recovered:
            log.info("plain downloads work again")
        if mismatch is not None:
            self._metrics.shadow_mismatches.inc()
            if told <= LOGGED:
                log.error("the mount and a plain download differ", extra=asdict(mismatch) | {"blob": want.sha256})

    def _error(self, side: str, sample: Sample, reason: str) -> None:
        """One side could not be read: it says nothing about the bytes. The first of a series is told."""
        self._metrics.shadow_errors.labels(side).inc()
        with self._lock:
            self._tally.mount_errors += side == "mount"
            self._tally.download_errors += side == "download"
            news, self._failing = not self._failing, True
        if news:
            log.warning("a read can't be compared", extra=_names(sample) | {"side": side, "reason": reason})


def routes(shadow: Shadow | None) -> list[Route]:
    """Its part of the control API (docs/control-api.md); zeros where nothing is compared."""

    def show() -> Page:
        return json_page(asdict(Report() if shadow is None else shadow.report()))

    return [Route("GET", "/api/v1/shadow", page(partial(show)))]


def _read_and_close(file: FileIO, offset: int, count: int) -> tuple[bytes, float]:
    """In a thread. Raises OSError."""
    started = time.perf_counter()
    with file:
        return _whole(file.fileno(), offset, count), time.perf_counter() - started


def _whole(fd: int, offset: int, count: int) -> bytes:
    """Raises OSError; a file that is too short gives what there is, which is a mismatch."""
    data = bytearray()
    while len(data) < count:
        part = os.pread(fd, count - len(data), offset + len(data))
        if not part:
            break
        data += part
    return bytes(data)


def _mismatch(sample: Sample, ours: bytes, theirs: bytearray) -> Mismatch:
    same = min(len(ours), len(theirs))
    first = next((i for i in range(same) if ours[i] != theirs[i]), same)
    want = sample.want
    return Mismatch(
        repo=str(want.repo),
        commit=want.commit,
        path=want.path,
        way=sample.way,
        offset=sample.offset,
        count=sample.count,
        first=sample.offset + first,
        mount_sha256=hashlib.sha256(ours).hexdigest(),
        download_sha256=hashlib.sha256(theirs).hexdigest(),
        time=time.time(),
    )


def _names(sample: Sample) -> dict[str, object]:
    want = sample.want
    return {"model": f"{want.repo}@{want.commit}", "file": want.path, "offset": sample.offset, "way": sample.way}
