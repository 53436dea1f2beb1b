"""What is kept of a volume: a text record like a manifest (heliosfs/store/manifest.py); docs/format.md is normative.

No other record names its sha256, so a last line holds it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

import msgspec

from helios.errors import IntegrityError, InvalidInput
from helios.names import RepoId, check_ref, check_revision, is_commit
from heliosfs.store.manifest import canonical, check_canonical, decode_record, is_hex
from heliosfs.tiers.pins import NAMES

MAGIC: Final = b"helios-volume 1\n"
MAGIC_2: Final = b"helios-volume 2\n"
USUAL: Final = "critical"
"""The class of a volume that asks for none, which is what every volume has whose record is of version 1."""
MAX_BYTES: Final = 64 << 10
"""No record is longer."""

TAIL: Final = 66
"""Bytes of the last line and of the two line ends around it."""

MAIN: Final = "main"

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")


class _Version1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What there was before volumes had a class."""

    id: str
    repo: str
    commit: str
    revision: str
    manifest: str
    time: int
    refs: dict[str, str]
    created: int


class VolumeRecord(_Version1, frozen=True, forbid_unknown_fields=True):
    """A volume: ``commit`` of ``repo`` (canonical text), pinned when ``revision`` was asked for.

    ``manifest`` is the digest of the commit's manifest and ``time`` the commit's; ``refs`` are the names that the
    volume's Hugging Face cache shows, all of them at ``commit``. Times are in whole seconds since 1970 UTC.
    ``priority`` is the class of its blobs (heliosfs/tiers/policy.py). Where that is the usual one the record is written
    as version 1, so that a Helios of before, to which a node is taken back, finds its volumes.
    """

    priority: str = USUAL

    @property
    def repository(self) -> RepoId:
        return RepoId.from_canonical(self.repo)

    @property
    def digest(self) -> str:
        """sha256 of what is recorded, 64 hexadecimal digits: another volume of the same id has another one."""
        return _digest(self._text())

    def encode(self) -> bytes:
        """The record's bytes."""
        text = self._text()
        return text + f"\n{_digest(text)}\n".encode()

    def _text(self) -> bytes:
        content = msgspec.to_builtins(self)
        if self.priority != USUAL:
            return MAGIC_2 + canonical(content)
        del content["priority"]
        return MAGIC + canonical(content)

    @classmethod
    def decode(cls, data: bytes) -> VolumeRecord:
        """Read a record, checking names and bounds. Raises IntegrityError."""
        if len(data) > MAX_BYTES:
            raise IntegrityError(f"a volume record of more than {MAX_BYTES} bytes")
        text, digest = data[:-TAIL], data[-TAIL:]
        if text.startswith(MAGIC_2):
            record = decode_record(text, MAGIC_2, cls)
        else:
            record = cls(**msgspec.to_builtins(decode_record(text, MAGIC, _Version1)))
        if digest != f"\n{_digest(text)}\n".encode():
            raise IntegrityError(f"the record of volume {record.id} does not match its sha256")
        check_canonical(text, record._text(), "volume record")
        try:
            check_volume_id(record.id)
            RepoId.from_canonical(record.repo)
            check_revision(record.revision)
            for ref in record.refs:
                check_ref(ref)
        except InvalidInput as error:
            raise IntegrityError(f"a volume record holds a bad name: {error}") from error
        if not (
            is_commit(record.commit)
            and is_hex(record.manifest, 64)
            and set(record.refs.values()) <= {record.commit}
            and record.priority in NAMES
            and 0 <= record.time < 1 << 63
            and 0 <= record.created < 1 << 63
        ):
            raise IntegrityError(
                f"the record of volume {record.id} has a malformed commit, manifest, ref, time or class"
            )
        return record


def check_volume_id(text: str) -> str:
    """Return a valid volume id or raise InvalidInput."""
    if not _ID.match(text):
        raise InvalidInput(
            f"{text[:150]!r} is not a volume id: use letters, digits and . _ - (at most 128, no dot at the start)"
        )
    return text


def frozen_refs(revision: str, commit: str) -> dict[str, str]:
    """The refs of a volume's Hugging Face cache: the one that was asked for, and ``main``.

    ``main`` is what every client library asks for when it is told no revision: in a volume that means the volume's
    commit, whichever name it was found by. Only a ref below ``main/`` leaves no room for it: one name can't be a file
    and a directory.
    """
    refs = {} if is_commit(revision) else {revision: commit}
    return refs if revision.startswith(f"{MAIN}/") else refs | {MAIN: commit}


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
