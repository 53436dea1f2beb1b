"""What the channel reads and changes of the FUSE protocol: headers, INIT, OPEN, READ. No I/O in here.

Source: linux/fuse.h (protocol 7.x, little endian as on every machine we run on). Requests and replies are the kernel's
and libfuse's own bytes; only the fields below are looked at, and only INIT and OPEN replies are changed.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import Final

REQUEST: Final = struct.Struct("<IIQQIIIHH")
"""length, opcode, unique, node id, uid, gid, pid, length of extensions in 8 bytes, padding"""

REPLY: Final = struct.Struct("<IiQ")
"""length, negative errno, unique"""

FORGET: Final = 2
OPEN: Final = 14
READ: Final = 15
RELEASE: Final = 18
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
INTERRUPT: Final = 36
BATCH_FORGET: Final = 42
READDIRPLUS: Final = 44

NAMES: Final = {
    1: "lookup",
    3: "getattr",
    4: "setattr",
    5: "readlink",
    6: "symlink",
    8: "mknod",
    9: "mkdir",
    10: "unlink",
    11: "rmdir",
    12: "rename",
    13: "link",
    14: "open",
    15: "read",
    16: "write",
    17: "statfs",
    18: "release",
    20: "fsync",
    21: "setxattr",
    22: "getxattr",
    23: "listxattr",
    24: "removexattr",
    25: "flush",
    27: "opendir",
    28: "readdir",
    29: "releasedir",
    30: "fsyncdir",
    34: "access",
    35: "create",
    43: "fallocate",
    44: "readdir",
}
"""What operations are called in metrics, by opcode; others are ``other``."""

UNANSWERED: Final = frozenset({FORGET, INTERRUPT, BATCH_FORGET})
"""Requests that get no reply (an INTERRUPT gets one only when it is refused, which nobody here does)."""

WITH_HANDLE: Final = frozenset({READDIR, READDIRPLUS})
"""Requests, beside READ, that need the handle with which their body begins."""

RESENT: Final = 1 << 63
"""Set in the unique number of a request that the kernel sends again (FUSE_UNIQUE_RESEND); echoed in the reply."""

NOTIFY_RESEND: Final = 7

FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PASSTHROUGH: Final = 1 << 7

FUSE_INIT_EXT: Final = 1 << 30
FUSE_PASSTHROUGH: Final = 1 << 5  # in flags2: bit 37 of both
FUSE_HAS_RESEND: Final = 1 << 7  # bit 39

INIT_OUT_LEN: Final = 64
MAX_READ: Final = 1 << 20
"""Largest READ in bytes: 256 pages."""

MAX_BACKGROUND: Final = 64
"""Requests that the kernel may have under way for read-ahead, at most."""

MAX_WRITE: Final = 4096
"""The least that the kernel takes: nobody writes here, and every buffer for requests must have room for a WRITE."""

MIN_BUFFER: Final = 128 << 10
"""Bytes that any request of a read-only mount fits into."""

_INIT_IN = struct.Struct("<IIIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH")
_OPEN_OUT = struct.Struct("<QIi")
_READ_IN = struct.Struct("<QQI")
_HANDLE = struct.Struct("<Q")
_FLAGS = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Offer:
    """What the kernel's INIT request offers: protocol version, read-ahead in bytes, flags (low and high word)."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int

    @property
    def passthrough(self) -> bool:
        """Whether passthrough can be agreed on."""
        return bool(self.flags & FUSE_INIT_EXT and self.flags2 & FUSE_PASSTHROUGH)


def parse_init(request: bytes | memoryview) -> Offer:
    """Read an INIT request; one of an old kernel, without the second flags word, has none of those flags."""
    body = bytes(request[REQUEST.size : REQUEST.size + _INIT_IN.size]).ljust(_INIT_IN.size, b"\0")
    return Offer(*_INIT_IN.unpack(body))


def agree(reply: bytes | memoryview, offer: Offer) -> bytes:
    """The INIT reply of libfuse with what it does not know added, where it is offered: passthrough and resending.

    The stack depth of 1 is what passthrough needs: backing files lie on a plain filesystem.
    """
    length, error, unique = REPLY.unpack_from(reply)
    if error or length < REPLY.size + _INIT_OUT.size:
        return bytes(reply[:length])
    fields = list(_INIT_OUT.unpack_from(reply, REPLY.size))
    fields[3] |= offer.flags & FUSE_INIT_EXT
    fields[4], fields[5] = MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4
    fields[6] = MAX_WRITE
    fields[10] |= offer.flags2 & (FUSE_PASSTHROUGH | FUSE_HAS_RESEND)
    fields[11] = 1
    out = bytearray(REPLY.size + INIT_OUT_LEN)
    out[:length] = reply[:length][: len(out)]
    REPLY.pack_into(out, 0, len(out), 0, unique)
    _INIT_OUT.pack_into(out, REPLY.size, *fields)
    return bytes(out)


def number(request: bytes | bytearray | memoryview) -> int:
    """The unique number of a request, without the bit that says that it was sent again."""
    unique: int = REQUEST.unpack_from(request)[2]
    return unique & ~RESENT


def parse_read(request: bytes | bytearray | memoryview) -> tuple[int, int, int]:
    """Handle, offset and size in bytes of a READ request."""
    fh, offset, size = _READ_IN.unpack_from(request, REQUEST.size)
    return fh, offset, size


def parse_handle(request: bytes | bytearray | memoryview) -> int:
    """The handle of a READ, READDIR or READDIRPLUS; of an INTERRUPT, the unique number of the request it is about."""
    (fh,) = _HANDLE.unpack_from(request, REQUEST.size)
    return int(fh)


def parse_open(reply: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Handle and flags of an OPEN reply without error."""
    fh, flags, _ = _OPEN_OUT.unpack_from(reply, REPLY.size)
    return fh, flags


def parse_flags(request: bytes | bytearray | memoryview) -> int:
    """The flags of open(2) in an OPEN request."""
    flags: int = _FLAGS.unpack_from(request, REQUEST.size)[0]
    return flags


def opened(unique: int, fh: int, *, keep: bool, backing: int) -> bytes:
    """The answer to an OPEN: passthrough to a registered backing file, or (0) through the page cache.

    Nothing is ever written, so there is nothing to flush when it is closed. The kernel refuses passthrough beside
    KEEP_CACHE (FOPEN_PASSTHROUGH_MASK in fs/fuse/iomode.c).
    """
    flags = FOPEN_NOFLUSH | (FOPEN_PASSTHROUGH if backing else FOPEN_KEEP_CACHE if keep else 0)
    return REPLY.pack(REPLY.size + _OPEN_OUT.size, 0, unique) + _OPEN_OUT.pack(fh, flags, backing)


def with_listing_kept(reply: bytes | bytearray | memoryview) -> bytes:
    """The OPENDIR reply made one of a directory whose listing the kernel keeps and does not ask for again."""
    length, error, unique = REPLY.unpack_from(reply)
    fh, flags, _ = _OPEN_OUT.unpack_from(reply, REPLY.size)
    return REPLY.pack(length, error, unique) + _OPEN_OUT.pack(fh, flags | FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR, 0)


def failure(unique: int, code: int = errno.EIO) -> bytes:
    """A reply that is an error."""
    return REPLY.pack(REPLY.size, -code, unique)


def resend() -> bytes:
    """The notification that makes the kernel queue again every request that was taken and not answered."""
    return REPLY.pack(REPLY.size, NOTIFY_RESEND, 0)
