"""Which directories belong to one replicated store, and which of them lag behind: a record in each.

    ROOT/.replicas     JSON: {"set": 32 hex digits, "members": [roots], "behind": [roots]}

``members`` have been filled once; ``behind`` have missed a write or a removal since. That a directory lags is written
down in the others, before the write that it missed is acknowledged: it may not be able to take a word itself.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError, Unavailable
from heliosfs.store.syscalls import sync_directory

NAME: Final = ".replicas"


class Membership(msgspec.Struct, forbid_unknown_fields=True):
    set: str
    members: list[str] = []
    behind: list[str] = []


def read(root: Path) -> Membership | None:
    """The record in a directory; None where there is none or it can't be read. Raises IntegrityError for nonsense."""
    try:
        return _read(root)
    except OSError:
        return None


def _read(root: Path) -> Membership:
    try:
        return from_json((root / NAME).read_bytes(), Membership)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"{root / NAME} does not decode: {error}") from None


def write(root: Path, membership: Membership) -> None:
    """Durably; raises OSError."""
    temporary = root / f"{NAME}.{secrets.token_hex(4)}"
    try:
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(membership))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(root / NAME)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(root)


def gather(roots: Sequence[Path]) -> Membership:
    """What the directories know together; of a new store, the first one that has objects is the first member.

    Raises IntegrityError where they contradict each other, so that nothing is removed from a directory that was named
    by mistake; OSError where a new store can't be made.
    """
    records = {root: read(root) for root in roots}
    known = [record for record in records.values() if record is not None]
    filled = [root for root in roots if records[root] is None and _has_objects(root)]
    if len({record.set for record in known}) > 1 or (known and filled) or len(filled) > 1:
        raise IntegrityError(
            f"the directories {', '.join(map(str, roots))} hold different stores",
            hint="Name a store and empty directories, or directories that were filled from it.",
        )
    if not known:
        first = (filled or list(roots))[0]
        first.mkdir(parents=True, exist_ok=True)
        known = [Membership(secrets.token_hex(16), [str(first)])]
        write(first, known[0])
    together = Membership(known[0].set)
    for record in known:
        together.members += [root for root in record.members if root not in together.members]
        together.behind += [root for root in record.behind if root not in together.behind]
    return together


def check_member(root: Path, together: Membership) -> None:
    """Raises Unavailable for a member that is not there, or is not what it was: the mount point of a missing disk."""
    try:
        record = _read(root)
    except OSError as error:
        raise Unavailable(
            f"{root} is not the directory it was ({error.strerror}): is its disk mounted?",
            hint=f"If the disk is a new one, take {root} out of {NAME} in the others.",
        ) from error
    if record.set != together.set:
        raise IntegrityError(f"the directory {root} belongs to another store by now")


def _has_objects(root: Path) -> bool:
    try:
        with os.scandir(root) as entries:
            return any(entry.is_dir() and not entry.name.startswith((".", "lost+found")) for entry in entries)
    except OSError:
        return False
