"""The object store behind one interface.

Keys are relative paths of safe characters, such as ``public/blobs/ab/abcd…``; the first segment is the domain, and an
object never mixes domains. Objects are immutable: writing a key that exists is allowed only with the same content and
changes nothing. Every call blocks and is made from a worker thread; ranges and sizes are in bytes.

What an engine can do beyond that is asked of it, not of its class: ``local``, ``open_local`` and ``signed_urls`` answer
None where there is no such thing. docs/registry-stores.md describes the engines; ``opening.py`` chooses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

Good = Callable[[memoryview], bool]
"""Whether bytes are what they should be."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    key: str
    size: int


class ObjectStore(Protocol):
    """What an engine provides.

    Missing objects raise ``helios.errors.NotFound``, a full disk ``NoSpace``, a store that does not answer, or not to
    us, ``Unavailable``. No message names a credential.
    """

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

    def signed_urls(self, keys: Sequence[str], expires_s: float) -> Sequence[str | None] | None:
        """Addresses at which anybody can GET the objects, ranges of them too, for so many seconds and at most a week.

        None where the engine has none, or none for one of them. Whether the objects exist is not looked at.
        """

    def near(self, key: str) -> bool:
        """Whether the object would be read from a local file, as far as is known without a look. Never blocks."""

    def waits(self, key: str) -> bool:
        """Whether the object is acknowledged and not yet where it is to stay. Never blocks."""

    @property
    def local(self) -> Path | None:
        """The directory in which the objects are files, where there is one: nodes of this machine link them."""

    @property
    def lasting(self) -> ObjectStore:
        """The store as it is to stay, for who looks whether it is whole: itself, unless another one is in front."""

    def heal(self, key: str, offset: int, length: int, good: Good) -> bool:
        """Called when bytes of an object turned out to be wrong: whether reading them again gives good ones.

        Where there are copies, those that are wrong are read last and are repaired in the background.
        """

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix``, in key order."""

    def staging(self) -> Path:
        """A local directory from which ``put_file`` can move a file without copying it, where there is one."""

    def check(self) -> None:
        """Raises Unavailable unless the store answers."""

    def problems(self) -> Sequence[str]:
        """What is wrong with it that stops nothing, in words: copies that are missing."""

    def tidy(self) -> int:
        """Regular upkeep: give up what killed writers left under way, repair copies. Returns how much there was."""

    def close(self) -> None:
        """The store is not used any more."""

    def describe(self) -> str:
        """Where the store is, for people and logs."""
