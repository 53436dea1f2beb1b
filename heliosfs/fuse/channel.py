"""The channel: /dev/fuse in front of pyfuse3. Passthrough for whole blobs, local READs answered on the spot.

pyfuse3 gets one end of a socket pair instead of the fuse device. One thread takes requests from the device: a RELEASE,
and a READ of bytes that are here (reads.py), are answered at once, OPEN and any other READ go to the trio loop,
everything else to pyfuse3. A second thread takes pyfuse3's replies, adds to INIT and OPENDIR what pyfuse3 can't say,
and hands them to the kernel. All that must survive this process is on the board (keeper/board.py); modes.py keeps what
the kernel saw and what the board says in step.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from helios.errors import Unavailable
from helios.metrics import MountMetrics
from heliosfs.fuse import protocol
from heliosfs.fuse.backing import Backings
from heliosfs.fuse.modes import IoModes
from heliosfs.fuse.passthrough import Passthrough
from heliosfs.fuse.reads import LocalReads
from heliosfs.fuse.sides import Board, Files
from heliosfs.fuse.trials import Trials

log = logging.getLogger("heliosfs.fuse")

SOCKET_BUFFER: Final = 4 << 20
ALIVE_MS: Final = 500
"""Both threads show that they live at least this often, in milliseconds."""

GONE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ECONNABORTED})
"""Errors of an answer that nobody waits for any more: interrupted, or unmounted."""


class Dropped(Unavailable):
    """The keeper took this process for hanging and could not end it; the mount is another one's by now."""


@dataclass(slots=True)
class Pending:
    """A request that was taken and not answered; ``since`` is CLOCK_MONOTONIC in ns."""

    opcode: int
    ino: int
    since: int


class Channel:
    """Owns the threads between /dev/fuse and pyfuse3. ``fd`` for pyfuse3 is ``session_fd``."""

    def __init__(
        self,
        device: int,
        board: Board,
        files: Files,
        metrics: MountMetrics,
        passthrough: Passthrough,
        opening: Callable[[int, int, int], None],
        read: Callable[[int, int, int, int], None],
        closed: Callable[[int], None],
        released: Callable[[int], None],
        ended: Callable[[BaseException | None], None],
        wait: Callable[[int, float], None],
    ) -> None:
        """``opening(unique, ino, flags)`` is called for an OPEN; ``opened`` or ``fail`` ends it.

        ``read(unique, fh, offset, size)`` is called for a READ that must wait; ``answer`` or ``fail`` ends it.

        ``released(fh)`` is called for a handle that the kernel let go, or did not want (it asked once more),
        ``closed(ino)`` after the last one of an inode, ``ended`` when the mount is gone (None) or a thread failed.
        ``wait(unique, seconds)`` asks for ``enough(unique)`` after that time, unless the loop is blocked. All are
        called from the channel's threads.
        """
        self._device, self._board, self._files = device, board, files
        self._opening, self._read, self._closed, self._released, self._ended = opening, read, closed, released, ended
        self._wait, self._stopping = wait, False
        self._modes, self._modes_lock = IoModes(board), threading.Lock()
        self._passthrough, self._backings = passthrough, Backings(device, self._modes, passthrough)
        self._pending: dict[int, Pending] = {}
        self._trials = Trials(board)
        self._replayed: int | None = None
        self._offer: protocol.Offer | None = None
        self._init = b""
        self._metrics = metrics
        self._latency = {opcode: metrics.requests.labels(name) for opcode, name in protocol.NAMES.items()}
        self._other_latency = metrics.requests.labels("other")
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.session_fd = theirs.detach()
        for fd in (self._ours.fileno(), self.session_fd):
            _enlarge(fd)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, ALIVE_MS * 1000))
        os.set_blocking(device, False)
        self._wake_read, self._wake_write = os.pipe()
        self._reads = LocalReads(files, metrics, self._writev, self.answer, read)
        self.look = self._reads.look
        """To be called now and then: READs that a disk that hangs does not answer are ``read`` elsewhere."""
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for name, loop in (("fuse-requests", self._requests), ("fuse-replies", self._replies))
        ]
        self._seen_ns = [time.monotonic_ns()] * 2

    # --- coming and going ---

    def start(self) -> None:
        """Begin; with an INIT from an earlier worker pyfuse3 is told of it, and unanswered requests come again."""
        if init := self._board.init:
            _, _, self._replayed, *_ = protocol.REQUEST.unpack_from(init)
            self._offer = protocol.parse_init(init)
            self._passthrough.offered = self._offer.passthrough
            self._ours.send(init)
            self._write(protocol.resend())
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Take no more requests; what is pending may still be answered until ``close``."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """End both threads. pyfuse3 must be closed before."""
        self.stop()
        self._ours.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5.0)
        self._reads.close()
        self._ours.close()
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)

    @property
    def alive_ns(self) -> int:
        """When both threads were last seen, CLOCK_MONOTONIC."""
        return min(self._seen_ns)

    @property
    def pending(self) -> int:
        """Requests that were taken and not answered."""
        return len(self._pending)

    def oldest(self) -> tuple[int, int]:
        """The number of the oldest of them, without the resend bit, and when it began, CLOCK_MONOTONIC in ns; zeros:
        none."""
        while True:
            try:
                return next(
                    ((unique & ~protocol.RESENT, request.since) for unique, request in self._pending.items()), (0, 0)
                )
            except RuntimeError:  # it changed between two steps
                continue

    def begin_trials(self) -> None:
        """What earlier workers may have died of is begun now. Any thread."""
        self._trials.begin()
        self._wake()

    def try_out(self, fd: int) -> None:
        """Find out whether the kernel reads files of an open file's filesystem itself. Any thread."""
        with self._modes_lock:
            self._backings.try_out(fd)

    def enough(self, unique: int) -> None:
        """A request that was handled alone goes on beside others. Any thread."""
        if self._trials.enough(unique):
            self._wake()

    def answer(self, unique: int, data: bytes | bytearray | memoryview) -> None:
        """The bytes of a READ that had to wait. Any thread."""
        head = protocol.REPLY.pack(protocol.REPLY.size + len(data), 0, unique)
        self._done(unique)
        self._writev([head, data])

    def fail(self, unique: int, code: int) -> None:
        """The errno of an OPEN, or of a READ that had to wait. Any thread."""
        self._done(unique)
        self._write(protocol.failure(unique, code))

    def opened(self, unique: int, ino: int, fh: int, *, keep: bool) -> None:
        """The handle for an OPEN: decide how it reads, write that down, answer. Any thread.

        ``keep``: whether pages that the kernel has of the file are still right.
        """
        plain, wanted = unique & ~protocol.RESENT, False
        with self._modes_lock:
            backing = self._modes.backing(ino)
            if backing is None:
                whole = self._files.whole(fh)
                backing = self._backings.register(whole)
                if whole >= 0 and not backing:
                    self._metrics.passthrough_refused.inc()
            if not self._modes.opened(plain, ino, backing):
                self._backings.close(backing)
                log.error("too many files are open", extra={"inodes": len(self._modes)})
                self._write(protocol.failure(unique, errno.ENFILE))
            else:
                if backing:
                    self._files.passed(fh)
                wanted = self._write(protocol.opened(unique, fh, keep=keep, backing=backing))
                if not wanted:
                    self._backings.close(self._modes.released(plain, ino))
            self._modes.settled()
        self._done(unique)
        if not wanted:
            self._released(fh)
        elif backing:
            self._metrics.passthrough_opens.inc()

    # --- requests ---

    def _requests(self) -> None:
        buffer = bytearray(protocol.MIN_BUFFER)
        view = memoryview(buffer)
        poller = select.poll()
        poller.register(self._device, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        for request in self._sent_again(view):
            self._take(request)
        while not self._stopping:
            self._seen_ns[0] = time.monotonic_ns()
            while self._trials.on and (held := self._trials.next()) is not None:
                self._begin(memoryview(held))
            try:
                length = os.readv(self._device, [view])
            except BlockingIOError:
                if any(fd == self._wake_read for fd, _ in poller.poll(ALIVE_MS)):
                    os.read(self._wake_read, 64)
                continue
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                if error.errno == errno.ENODEV:
                    self._ended(None)
                    return
                raise
            if self._board.dropped:  # we were stopped, or blocked, and somebody else serves the mount
                self._write(protocol.resend())  # that one gets what was taken just now
                self._ended(Dropped("the keeper gave up on this process"))
                return
            self._take(view[:length])

    def _sent_again(self, buffer: memoryview) -> list[memoryview]:
        """What earlier workers took and did not answer: it lies ahead of all that is new (fuse_resend). All of it is
        read before anything is done, to settle what the last worker was doing."""
        requests: list[memoryview] = []
        again: dict[int, int] = {}
        while self._board.init:
            try:
                length = os.readv(self._device, [buffer])
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                if error.errno in (errno.EAGAIN, errno.ENODEV):
                    break
                raise
            requests.append(memoryview(bytes(buffer[:length])))
            _, opcode, unique, *_ = protocol.REQUEST.unpack_from(buffer)
            if unique & protocol.RESENT:
                again[unique & ~protocol.RESENT] = opcode
            elif opcode not in protocol.UNANSWERED:
                break
        with self._modes_lock:
            for backing in self._modes.settle(set(again)):
                self._backings.close(backing)
            self._backings.find_lost()
        guilty = self._trials.judge(list(again))
        for unique in guilty:
            log.error("a request took several workers down; it is answered with EIO", extra={"opcode": again[unique]})
            self._write(protocol.failure(unique | protocol.RESENT))
        return [request for request in requests if protocol.number(request) not in guilty]

    def _take(self, request: memoryview) -> None:
        """Begin a request, or hold it back for another one."""
        _, opcode, unique, *_ = protocol.REQUEST.unpack_from(request)
        if unique & protocol.RESENT:
            self._metrics.resends.inc()
        free = opcode in protocol.UNANSWERED or not self._trials.on
        if free or self._trials.admit(unique & ~protocol.RESENT, request):
            self._begin(request)

    def _begin(self, request: memoryview) -> None:
        """Answer a request or pass it on."""
        _, opcode, unique, ino, *_ = protocol.REQUEST.unpack_from(request)
        if self._trials.on and self._trials.alone == unique & ~protocol.RESENT:
            self._wait(unique & ~protocol.RESENT, self._trials.share_s())
        if opcode == protocol.READ:
            self._take_read(unique, ino, request)
            return
        if opcode == protocol.RELEASE:
            self._take_release(unique, ino, request)
            return
        if opcode == protocol.OPEN:
            self._pending[unique] = Pending(opcode, ino, time.monotonic_ns())
            self._opening(unique, ino, protocol.parse_flags(request))
            return
        if opcode not in protocol.UNANSWERED:
            self._pending[unique] = Pending(opcode, ino, time.monotonic_ns())
        elif opcode == protocol.INTERRUPT and not self._relayed(protocol.parse_handle(request)):
            return
        if opcode in protocol.WITH_HANDLE:
            self._files.adopt(protocol.parse_handle(request), ino)
        elif opcode == protocol.INIT:
            self._offer, self._init = protocol.parse_init(request), bytes(request)
            self._passthrough.offered = self._offer.passthrough
        self._ours.send(request)

    def _take_read(self, unique: int, ino: int, request: memoryview) -> None:
        """Answer a READ of what is here; else let the disk or the loop do it."""
        since = time.monotonic_ns()
        fh, offset, size = protocol.parse_read(request)
        self._files.adopt(fh, ino)
        found = self._files.local(fh, offset, size)
        if self._reads.at_once(unique, fh, offset, size, found, since):
            self._done(unique)
            return
        self._pending[unique] = Pending(protocol.READ, ino, since)
        if found is None:
            self._read(unique, fh, offset, size)
        else:
            self._reads.later(unique, fh, offset, found, since)

    def _take_release(self, unique: int, ino: int, request: memoryview) -> None:
        """A handle goes: nobody waits for that, and pyfuse3 need not know."""
        since = time.monotonic_ns()
        with self._modes_lock:
            unused = self._modes.released(unique & ~protocol.RESENT, ino)
            self._write(protocol.failure(unique, 0))
            self._backings.close(unused)
            self._modes.settled()
            last = self._modes.backing(ino) is None
        self._done(unique)
        self._released(protocol.parse_handle(request))
        if last:
            self._closed(ino)
        self._latency[protocol.RELEASE].observe((time.monotonic_ns() - since) / 1e9)

    def _relayed(self, unique: int) -> bool:
        """Whether pyfuse3 has the request that is interrupted: not what it never sees, nor what was answered."""
        request = self._pending.get(unique)
        return request is not None and request.opcode not in (protocol.OPEN, protocol.READ)

    # --- replies ---

    def _replies(self) -> None:
        view = memoryview(bytearray(protocol.MAX_READ + 4096))
        while True:
            self._seen_ns[1] = time.monotonic_ns()
            try:
                length = self._ours.recv_into(view)
            except BlockingIOError:  # nothing came in ALIVE_MS
                continue
            if not length:
                return
            reply = view[:length]
            _, error, unique = protocol.REPLY.unpack_from(reply)
            if unique == self._replayed:
                self._replayed = None
                continue
            request = self._pending.get(unique)
            opcode = request.opcode if request else 0
            if opcode == protocol.INIT and self._offer is not None:
                self._write(protocol.agree(reply, self._offer))
                self._board.init = self._init
            elif opcode == protocol.OPENDIR and not error and self._files.lasting(protocol.parse_open(reply)[0]):
                self._write(protocol.with_listing_kept(reply))
            else:
                self._write(reply)
            self._done(unique)

    # --- inside ---

    def _done(self, unique: int) -> None:
        request = self._pending.pop(unique, None)
        if request is not None:
            latency = self._latency.get(request.opcode, self._other_latency)
            latency.observe((time.monotonic_ns() - request.since) / 1e9)
        if self._trials.done(unique & ~protocol.RESENT):
            self._wake()

    def _wake(self) -> None:
        """Have the requests' thread look at what it may begin, or end."""
        os.write(self._wake_write, b"x")

    def _write(self, reply: bytes | memoryview) -> bool:
        return self._writev([reply])

    def _writev(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        """Hand an answer to the kernel; False when nobody waits for it any more."""
        try:
            os.writev(self._device, parts)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False
        return True

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            self._ended(error)


def _enlarge(fd: int) -> None:
    """Room for the longest message; SEQPACKET refuses one that does not fit. Root may exceed the system's limit."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        for option, forced in ((socket.SO_SNDBUF, 32), (socket.SO_RCVBUF, 33)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < protocol.MAX_READ + 4096:
            raise OSError(errno.ENOBUFS, "the socket's buffer is too small for an answer (net.core.wmem_max)")
