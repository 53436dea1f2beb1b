"""Where blobs go whose bytes turned out to be wrong: kept for whoever looks into it, a few of them, never served.

    quarantine/<sha256>.<number>   the file as it was found

The oldest go first. A file that is a link to the object store's is not ours to keep: only the link is dropped.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAX_FILES: Final = 16
MAX_BYTES: Final = 4 << 30


@dataclass(frozen=True, slots=True)
class Taken:
    """A file that was taken away: what it was, by how many bytes the quarantine changed, and where it is, if kept."""

    inode: int
    grown: int
    path: Path | None
    linked: bool


class Quarantine:
    """The directory below a tier's ``root``; at most ``MAX_FILES`` files and ``max_bytes``. Calls block."""

    def __init__(self, root: Path, max_bytes: int = MAX_BYTES) -> None:
        self.directory, self.max_bytes = root / "quarantine", max_bytes

    def bound(self, max_bytes: int) -> None:
        """Keep no more than this, from the next file on."""
        self.max_bytes = min(max_bytes, MAX_BYTES)

    def usage(self) -> tuple[int, int]:
        """Files, and the disk bytes that they take. Raises OSError."""
        found = self._files()
        return len(found), sum(blocks for _, _, blocks in found)

    def take(self, path: str, sha256: str, inode: int) -> Taken | None:
        """Take the file with this inode number away from ``path``; None when it is not there any more. Raises OSError.

        It is kept here when it is no link and small enough; older ones go for it.
        """
        try:
            status = os.lstat(path)
            if status.st_ino != inode:
                return None
            linked, blocks = status.st_nlink > 1, status.st_blocks * 512
            if linked or blocks > self.max_bytes:
                os.unlink(path)
                return Taken(inode, 0, None, linked)
            self.directory.mkdir(exist_ok=True)
            found = self._files()
            number = max((number for number, _, _ in found), default=0) + 1
            place = self.directory / f"{sha256}.{number}"
            os.rename(path, place)
        except FileNotFoundError:
            return None
        return Taken(inode, blocks - self._trim(found, blocks), place, linked)

    def _trim(self, found: list[tuple[int, Path, int]], more: int) -> int:
        """Remove the oldest until there is room for one of ``more`` bytes; returns the bytes that went."""
        freed, total = 0, sum(blocks for _, _, blocks in found) + more
        for done, (_, path, blocks) in enumerate(sorted(found)):
            if total - freed <= self.max_bytes and len(found) - done < MAX_FILES:
                break
            path.unlink(missing_ok=True)
            freed += blocks
        return freed

    def _files(self) -> list[tuple[int, Path, int]]:
        """Number, path and disk bytes of what is here."""
        out = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                number = entry.name.rpartition(".")[2]
                if number.isdecimal():
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        out.append((int(number), Path(entry.path), status.st_blocks * 512))
        return out
