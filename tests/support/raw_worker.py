"""A worker for the keeper's tests: one file over raw FUSE (linux/fuse.h), with faults on command. One thread.

``raw_worker.py BACKING FAULTS``: serves BACKING as ``/file``. A file in the directory FAULTS is a fault: its name says
which READ (offset in bytes, or ``any``) and what happens: ``1048576-exit``, ``any-stop``, ``any-hang``, ``any-oom`` (in
the control group RAW_WORKER_CGROUP); it is removed when it strikes, so it strikes once. ``lost-stop``: it stops when it
has lost its keeper, before it offers the mount to another one. Two faults stay: ``start-exit`` ends the worker before
it attaches, with ``start-hang`` it does nothing once it is attached. RAW_WORKER_UID (environment): who it works as.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import struct
import sys
import time
from pathlib import Path

from heliosfs.fuse.attach import Attachment, Event, attach
from heliosfs.fuse.tables import keep_init, open_files

REQUEST = struct.Struct("<IIQQIIIHH")
REPLY = struct.Struct("<IiQ")
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
OPENDIR, READDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = 27, 28, 29, 36, 42
ASYNC_READ, MAX_PAGES, INIT_EXT, HAS_RESEND = 1 << 0, 1 << 22, 1 << 30, 1 << 7
HEARTBEAT_S, LIMIT_S, ORPHAN_S = 0.2, 3.0, 10.0
ROOT, FILE = 1, 2
CGROUP = Path(os.environ.get("RAW_WORKER_CGROUP", "/"))


class Worker:
    def __init__(self, attachment: Attachment, backing: Path, faults: Path) -> None:
        self.attachment, self.board, self.fuse = attachment, attachment.board, attachment.fuse_fd
        self.backing = os.open(backing, os.O_RDONLY)
        self.size = os.fstat(self.backing).st_size
        self.faults = faults
        self.buffer = bytearray(1 << 20 | 1 << 16)
        self.files = open_files(self.board)
        self.hanging = False
        self.eaten: list[bytes] = []

    def run(self) -> int:
        now = time.monotonic_ns()
        self.board.loop_ns = self.board.channel_ns = now
        self.board.limit_ns = int(LIMIT_S * 1e9)
        if self.board.init_len:
            os.write(self.fuse, REPLY.pack(16, 7, 0))  # RESEND
        else:
            self.request()
        self.attachment.ready({"pid": os.getpid(), "generation": self.attachment.generation})
        lost_at: float | None = None
        while True:
            self.board.loop_ns = self.board.channel_ns = time.monotonic_ns()
            poller = select.poll()
            poller.register(self.fuse, select.POLLIN)
            if lost_at is None:
                poller.register(self.attachment, select.POLLIN)
            ready = dict(poller.poll(HEARTBEAT_S * 1000))
            if self.attachment.dropped:
                os.write(self.fuse, REPLY.pack(16, 7, 0))  # what was taken after the next one's
                return 4
            if lost_at is not None:
                if self.attachment.reconnect():
                    lost_at = None
                elif time.monotonic() - lost_at > ORPHAN_S:
                    return 3
            elif self.attachment.fileno() in ready:
                event = self.attachment.event()
                if event is Event.STOP:
                    self.attachment.ended("stopped")
                    return 0
                if event is Event.LOST:
                    lost_at = time.monotonic()
                    if (stop := self.faults / "lost-stop").exists():
                        stop.unlink()
                        os.kill(os.getpid(), signal.SIGSTOP)
            if self.fuse in ready and not self.request():
                self.attachment.ended("unmounted")
                return 0

    def request(self) -> bool:
        try:
            length = os.readv(self.fuse, [self.buffer])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                return True
            if error.errno == errno.ENODEV:
                return False
            raise
        _, opcode, unique, node, *_ = REQUEST.unpack_from(self.buffer)
        body = bytes(self.buffer[REQUEST.size : length])
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return True
        if not self.hanging:
            self.board.oldest_ns = time.monotonic_ns()
        answer = self.answer(opcode, node, body, bytes(self.buffer[:length]))
        if answer is None:
            self.hanging = True
            return True
        code, data = (answer, b"") if type(answer) is int else (0, answer)
        with contextlib.suppress(FileNotFoundError):  # interrupted
            os.writev(self.fuse, [REPLY.pack(REPLY.size + len(data), -code, unique), data])
        if not self.hanging:
            self.board.oldest_ns = 0
        return True

    def answer(self, opcode: int, node: int, body: bytes, whole: bytes) -> int | bytes | None:
        if opcode == INIT:
            keep_init(self.board, whole)
            flags = ASYNC_READ | MAX_PAGES | INIT_EXT
            out = struct.pack(
                "<IIIIHHIIHHIIHHI", 7, 39, 1 << 20, flags, 64, 48, 1 << 20, 1, 256, 0, HAS_RESEND, 0, 0, 0, 0
            )
            return out.ljust(64, b"\0")
        if opcode == LOOKUP:
            return (
                struct.pack("<QQQQII", FILE, 0, 0, 0, 0, 0) + self.attributes(FILE)
                if body == b"file\0"
                else errno.ENOENT
            )
        if opcode == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
        if opcode in (OPEN, OPENDIR):
            if opcode == OPEN:
                file = self.files.get(node)
                self.files.put(node, 0, 1 + (file.opens if file else 0))
            return struct.pack("<QIi", 7, 0, 0)
        if opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return self.read(offset, size)
        if opcode == RELEASE:
            file = self.files.get(node)
            if file and file.opens > 1:
                self.files.put(node, 0, file.opens - 1)
            else:
                self.files.remove(node)
            return b""
        if opcode == STATFS:
            return struct.pack("<QQQQQIII", 0, 0, 0, 0, 0, 4096, 255, 4096).ljust(80, b"\0")
        return b"" if opcode in (READDIR, RELEASEDIR, FLUSH) else errno.ENOSYS

    def read(self, offset: int, size: int) -> bytes | None:
        for fault in os.listdir(self.faults):
            where, _, what = fault.partition("-")
            if where == "any" or (where.isdecimal() and offset <= int(where) < offset + size):
                (self.faults / fault).unlink()
                if what == "exit":
                    os._exit(9)
                if what == "hang":
                    return None
                if what == "oom":
                    (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
                    for _ in range(64):
                        self.eaten.append(os.urandom(1 << 20))
                os.kill(os.getpid(), signal.SIGSTOP)
        return os.pread(self.backing, size, offset)

    def attributes(self, node: int) -> bytes:
        mode, size = (0o40555, 0) if node == ROOT else (0o100444, self.size)
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


if __name__ == "__main__":
    faults = Path(sys.argv[2])
    if (faults / "start-exit").exists():
        sys.exit(3)
    os.setuid(int(os.environ.get("RAW_WORKER_UID", os.getuid())))
    attachment = attach()
    if (faults / "start-hang").exists():
        time.sleep(3600)
    sys.exit(Worker(attachment, Path(sys.argv[1]), faults).run())
