"""What the channel needs of both its sides: the files that are open, and what outlives this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from heliosfs.fuse.modes import Records


class Files(Protocol):
    """What the channel asks about open files. Called from its threads; plain functions that never wait."""

    def local(self, fh: int, offset: int, size: int) -> tuple[int, int] | None:
        """A descriptor that holds these bytes, verified, and how many there are; None when some are not here.

        The descriptor stays open as long as the handle.
        """

    def tier(self, fh: int) -> str:
        """Which local tier ``local`` reads from."""

    def held(self, fh: int, offset: int, size: int) -> list[memoryview] | None:
        """These bytes from memory, verified, in pieces; None when some are not there."""

    def whole(self, fh: int) -> int:
        """A descriptor of the whole verified file on a plain filesystem, else -1."""

    def lasting(self, fh: int) -> bool:
        """Whether the entries of an open directory never change."""

    def answered(self, fh: int, offset: int, parts: Sequence[bytes | memoryview], seconds: float) -> None:
        """A READ was answered with these bytes, so many seconds after it came."""

    def passed(self, fh: int) -> None:
        """The kernel is about to be told to read this handle's file itself."""

    def adopt(self, fh: int, ino: int) -> None:
        """A request with this handle of this inode comes: one that an earlier worker opened is opened again."""


class Board(Records, Protocol):
    """What outlives this process."""

    @property
    def init(self) -> bytes:
        """The kernel's INIT request, empty before it was answered."""

    @init.setter
    def init(self, request: bytes) -> None: ...

    def strike(self, unique: int) -> int:
        """Count a crash that this request survived, if the last worker did crash; returns how many it survived."""

    def forgive(self, unique: int) -> None:
        """The request was answered."""

    @property
    def dropped(self) -> bool:
        """Whether the mount is another process's by now."""
