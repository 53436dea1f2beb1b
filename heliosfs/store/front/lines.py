"""Files of lines that say something about keys, appended one by one, which survive a crash.

    <head>\\n
    <crc32 of the rest, 8 hex> <op> <key>\\n
    …

A last line that is torn was never relied on. Anything else that is wrong makes the whole file worthless.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Container, Iterable
from pathlib import Path

from helios.errors import InvalidInput
from heliosfs.store.keys import check_key
from heliosfs.store.syscalls import replace_file, write_all


class Damaged(Exception):
    """The file can't be relied on."""


def encode(op: str, key: str) -> bytes:
    rest = f"{op} {key}".encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(rest), rest)


def decode(data: bytes, head: bytes, ops: Container[str]) -> list[tuple[str, str]]:
    """The lines, as (op, key). Raises Damaged."""
    if not data.startswith(head):
        raise Damaged("it has no head")
    lines = data[len(head) :].split(b"\n")
    lines.pop()  # what follows the last line's end: nothing, or a torn line
    return [_line(line, number, ops) for number, line in enumerate(lines)]


def _line(line: bytes, number: int, ops: Container[str]) -> tuple[str, str]:
    found, _, rest = line.partition(b" ")
    try:
        if found != b"%08x" % zlib.crc32(rest):
            raise Damaged(f"line {number + 2} has another checksum")
        op, _, key = rest.decode("ascii").partition(" ")
        check_key(key)
        if op not in ops:
            raise Damaged(f"line {number + 2} says {op!r}, which nobody knows")
    except (ValueError, InvalidInput) as error:
        raise Damaged(f"line {number + 2} makes no sense: {error}") from None
    return op, key


class Lines:
    """Such a file, to be written. Not locked: the caller's affair. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self.count = self.size = 0
        """Lines, and bytes with the head, since the file was begun."""

    @property
    def begun(self) -> bool:
        """Whether lines can be appended: it was begun, and nothing has failed since."""
        return self._fd >= 0

    def begin(self, head: bytes, lines: Iterable[tuple[str, str]]) -> None:
        """Write the file anew, and go on with that. It is on the disk on return."""
        found = [encode(op, key) for op, key in lines]
        data = head + b"".join(found)
        self.close()
        replace_file(self.path, data, self.path.with_name(f"{self.path.name}.new"))
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self.count, self.size = len(found), len(data)

    def append(self, op: str, key: str, *, lasting: bool) -> None:
        """Add a line to the file that was begun; with ``lasting`` it is on the disk on return."""
        data = encode(op, key)
        try:
            write_all(self._fd, data)
            if lasting:
                os.fdatasync(self._fd)
        except OSError:
            self.close()  # what is on the disk now nobody knows: it has to be begun anew
            raise
        self.count += 1
        self.size += len(data)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
