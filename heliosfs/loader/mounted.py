"""A directory of a mount of our home: whole files where the mount keeps them, others through the mount.

What is whole is mapped where it lies, without a request to the mount. What is not is waited for, if that is worth it
(``filling``), or read through the mount, past the page cache: the pages would be read once and never again, because
what maps the whole file has those of the mount's own. What the mount can't give heliosfs.client fetches by itself.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from helios.errors import Unavailable
from heliosfs.client.buffers import Descriptor
from heliosfs.client.caches import whole_file
from heliosfs.loader.filling import Filling
from heliosfs.loader.sources import WHOLE, DiskFile, DiskFolder, Folder, Source

log = logging.getLogger("vllm.helios")

LOOK_S: Final = 0.02
"""How often it is looked whether a file is whole, in seconds."""
SMALL: Final = 1 << 20
"""Headers and the like are read at once."""


class SharedFilling:
    """What several threads see of a model that is being fetched."""

    def __init__(self) -> None:
        self._lock, self._filling = threading.Lock(), Filling()

    def look(self, now: float, file: str, local: float, size: int) -> bool:
        """See ``Filling.worth_waiting``."""
        with self._lock:
            return self._filling.worth_waiting(now, file, local, size)


class MountFile:
    """A file of such a directory."""

    def __init__(
        self, path: Path, name: str, tiers: Sequence[Path], filling: SharedFilling, instead: Callable[[str], Source]
    ) -> None:
        self._path, self.path, self._tiers, self._instead = path, name, tiers, instead
        try:
            self.size, self._sha256 = path.stat().st_size, os.getxattr(path, "user.helios.sha256").decode()
        except OSError as error:
            raise Unavailable(f"{path} can't be opened: {error.strerror}") from error
        self._through: DiskFile | None = None
        self._lock = threading.Lock()
        self._own: Source | None = None
        self._whole: Descriptor | None = None
        self._filling, self._asking = filling, threading.Lock()
        self._asked_at, self._worth = -1.0, True

    def fileno(self) -> int | None:
        whole = self._look()
        return None if whole is None else whole.fileno()

    def read_into(self, view: memoryview, offset: int) -> None:
        whole = self._look() if len(view) <= SMALL else self._soon()
        if whole is not None:
            whole.read_into(view, offset)
            return
        if self._own is None:
            try:
                self._opened().read_into(view, offset)
                return
            except Unavailable as error:
                log.warning("the mount can't give a file, so the client fetches it: %s", error)
            with self._lock:
                if self._own is None:
                    self._own = self._instead(self.path)
        self._own.read_into(view, offset)

    def close(self) -> None:
        for each in (self._through, self._whole, self._own):
            if each is not None:
                each.close()

    def _look(self) -> Descriptor | None:
        """The whole file, if it has become that."""
        with self._lock:
            if self._whole is None and self.size and self._own is None:
                found = (whole_file(tier, self._sha256, self.size, self.path) for tier in self._tiers)
                self._whole = next((each for each in found if each is not None), None)
            return self._whole

    def _opened(self) -> DiskFile:
        """The file in the mount; of one that the mount has whole that is not even opened. Raises Unavailable."""
        with self._lock:
            if self._through is None:
                try:
                    tier = os.getxattr(self._path, "user.helios.tier").decode()
                except OSError as error:
                    raise Unavailable(f"{self._path} can't be opened: {error.strerror}") from error
                # A whole file that we may not read where it lies is the kernel's to read, and may have to be aligned.
                self._through = DiskFile(self._path, self.path, 0 if tier in WHOLE else os.O_DIRECT)
            return self._through

    def awaited(self) -> int | None:
        whole = self._soon()
        return None if whole is None else whole.fileno()

    def _soon(self) -> Descriptor | None:
        """The whole file, if it is one or will be shortly."""
        while (whole := self._look()) is None and self._own is None and self._comes():
            time.sleep(LOOK_S)
        return whole

    def _comes(self) -> bool:
        """Whether it will be whole shortly, by what the mount says of it."""
        with self._asking:  # one thread asks for all
            now = time.monotonic()
            if now - self._asked_at >= LOOK_S:
                self._asked_at = now
                try:
                    share = float(os.getxattr(self._path, "user.helios.progress"))
                    self._worth = self._filling.look(now, self.path, share * self.size, self.size)
                except (OSError, ValueError):
                    self._worth = False  # then reading it will tell what is wrong
            return self._worth


class MountFolder:
    """A directory of a mount of ours, which keeps whole files in ``tiers``. What it can't give comes by the client,
    which ``by_client`` connects when it is needed."""

    way = "the mount"

    def __init__(self, directory: Path, tiers: Sequence[Path], by_client: Callable[[], Folder]) -> None:
        self._plain, self._tiers, self._by_client = DiskFolder(directory), tiers, by_client
        self._directory, self.name, self.files = directory, self._plain.name, self._plain.files
        self._filling = SharedFilling()
        self._lock = threading.Lock()
        self._client: Folder | None = None

    def read(self, path: str) -> bytes:
        try:
            return self._plain.read(path)
        except Unavailable as error:
            log.warning("the mount can't give a file, so the client fetches it: %s", error)
            return self._connected().read(path)

    def open(self, path: str) -> Source:
        return MountFile(
            self._directory / path, path, self._tiers, self._filling, lambda name: self._connected().open(name)
        )

    def fetch(self) -> None:
        self._connected().fetch()

    def _by_itself(self, path: str) -> Source:
        return self._connected().open(path)

    def _connected(self) -> Folder:
        with self._lock:
            if self._client is None:
                try:
                    self._client = self._by_client()
                except (OSError, ValueError) as error:
                    raise Unavailable(f"the client can't be used for {self.name} either: {error}") from error
            return self._client
