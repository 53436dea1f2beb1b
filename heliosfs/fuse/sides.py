"""What the channel needs of both its sides: the files that are open, and what outlives this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from heliosfs.fuse import trials
from heliosfs.fuse.modes import Records
from heliosfs.tiers.silence import Asked


class Disk(Protocol):
    """What open files lie on."""

    @property
    def name(self) -> str:
        """The tier."""

    @property
    def asked(self) -> Asked:
        """Calls to it under way: each READ is one."""

    @property
    def silent(self) -> bool:
        """Whether it hangs and was given up."""


class Here(Protocol):
    """Verified bytes in a local file: its descriptor, how many they are, and what it lies on."""

    @property
    def fd(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def places(self) -> Disk: ...


class Files(Protocol):
    """What the channel asks about open files. Called from its threads; plain functions that never wait."""

    def local(self, fh: int, offset: int, size: int) -> Here | None:
        """Where these bytes are, verified; None when some are not here.

        The descriptor stays open as long as the handle.
        """

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


class Board(Records, trials.Records, Protocol):
    """What outlives this process."""

    @property
    def init(self) -> bytes:
        """The kernel's INIT request, empty before it was answered."""

    @init.setter
    def init(self, request: bytes) -> None: ...

    @property
    def dropped(self) -> bool:
        """Whether the mount is another process's by now."""
