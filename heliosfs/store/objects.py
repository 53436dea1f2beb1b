"""The object store behind one interface.

Keys are relative paths of safe characters, such as ``public/blobs/ab/abcd…``; the first segment is the domain, and an
object never mixes domains. Objects are immutable: writing a key that exists is allowed only with the same content and
changes nothing. Every call blocks and is made from a worker thread; ranges and sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    key: str
    size: int


class ObjectStore(Protocol):
    """What an engine provides. Missing objects raise ``helios.errors.NotFound``, a full disk ``NoSpace``."""

    def put_file(self, key: str, path: Path) -> None:
        """Store a finished local file, durably; the file may be moved away. Visible whole or not at all."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store a small object, durably."""

    def info(self, key: str) -> ObjectInfo:
        """Size of an object."""

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the object's bytes from ``offset``; a short object raises IntegrityError."""

    def open_local(self, key: str) -> BinaryIO | None:
        """The object as an open local file for sendfile, or None where the engine has no local files."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix``, in key order."""

    def staging(self) -> Path:
        """A local directory from which ``put_file`` can move a file without copying it, where there is one."""

    def describe(self) -> str:
        """Where the store is, for people."""
