"""The volumes' directory: records that survive a power cut, and the manifests that they name.

    <id>.volume            a volume's record (record.py)
    manifests/<digest>     the manifest record of a volume's commit; volumes of one commit share it. It stays a while
                           after the last of them: a pod that starts anew has its volume made anew, and with the
                           manifest there that takes half as many fsyncs

A file is written under another name (``.<random>.tmp``), fsynced and renamed; the directory is fsynced after it. The
manifests are kept here because the catalog's file is a cache: it forgets, and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from helios.errors import IntegrityError, NoSpace, Unavailable
from heliosfs.store.directory import FULL
from heliosfs.store.syscalls import REFUSED, replace_file, sync_directory
from heliosfs.volumes.record import MAX_BYTES, VolumeRecord

log = logging.getLogger("heliosfs.volumes")

SUFFIX: Final = ".volume"
TEMPORARY: Final = ".tmp"
SPARE: Final = 64
"""Most manifests that are kept for volumes which may come again..."""
SPARE_BYTES: Final = 16 << 20
"""...and most bytes of them; the oldest go, and all of them at the next start."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The records by id, and of each file that is none the reason."""

    records: dict[str, VolumeRecord] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)


class VolumeFiles:
    """The directory at ``root``. Calls block; one at a time, but ``manifest``, which any thread may call.

    They raise NoSpace or Unavailable when the disk does not take it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._manifests = root / "manifests"
        self._made = False
        self._spare: OrderedDict[str, int] = OrderedDict()

    def load(self) -> Loaded:
        """Make the directory if it is missing, read every record, remove what interrupted calls left.

        On a disk that is full or read-only it is only read.
        """
        found = Loaded()
        with self._guard("read"):
            with self._tolerant():
                self._make()
                for directory in (self._root, self._manifests):
                    for path in directory.glob(f".*{TEMPORARY}"):
                        path.unlink()
            for path in sorted(self._root.glob(f"*{SUFFIX}")):
                name = path.name.removesuffix(SUFFIX)
                try:
                    found.records[name] = _read(path, name)
                except (IntegrityError, OSError) as error:
                    found.damaged[name] = str(error)
                    log.error("a volume's record is damaged", extra={"path": str(path), "reason": str(error)})
            if (
                self._made and not found.damaged
            ):  # a damaged record may be one of a newer Helios, which needs its manifest
                named = {record.manifest for record in found.records.values()}
                with self._tolerant():
                    for path in self._manifests.iterdir():
                        if path.name not in named:
                            path.unlink()
        return found

    def write(self, record: VolumeRecord, manifest: bytes) -> None:
        """Keep a volume, durably: when this returns it survives a power cut."""
        with self._guard("written"):
            if not self._made:
                self._make()
            if self.manifest(record.manifest) is None:
                _write(self._manifests / record.manifest, manifest)
            _write(self._root / f"{record.id}{SUFFIX}", record.encode())
            self._spare.pop(record.manifest, None)

    def remove(self, volume: str, manifest: str | None) -> None:
        """Remove a volume's record, durably; ``manifest`` is its manifest's digest if no other volume needs it."""
        with self._guard("removed"):
            (self._root / f"{volume}{SUFFIX}").unlink(missing_ok=True)
            sync_directory(self._root)
            if manifest is not None:
                self._set_aside(manifest)

    def _set_aside(self, manifest: str) -> None:
        """Keep a manifest that nobody needs now, within the bounds."""
        with contextlib.suppress(FileNotFoundError):
            self._spare[manifest] = (self._manifests / manifest).stat().st_size
            self._spare.move_to_end(manifest)
        while len(self._spare) > SPARE or sum(self._spare.values()) > SPARE_BYTES:
            oldest, _ = self._spare.popitem(last=False)
            (self._manifests / oldest).unlink(missing_ok=True)

    def manifest(self, digest: str) -> bytes | None:
        """A manifest record, or None where it is not here or damaged: the registry has it too."""
        path = self._manifests / digest
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("a volume's manifest can't be read", extra={"path": str(path), "reason": str(error)})
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            log.warning("a volume's manifest is damaged", extra={"path": str(path)})
            return None
        return data

    def _make(self) -> None:
        self._manifests.mkdir(parents=True, exist_ok=True)
        for directory in (self._manifests, self._root, self._root.parent):
            sync_directory(directory)
        self._made = True

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            log.warning("volumes can't be written", extra={"path": str(self._root), "reason": error.strerror})

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = NoSpace if error.errno in FULL else Unavailable
            raise kind(f"the volumes in {self._root} can't be {what}: {error.strerror}") from error


def _read(path: Path, name: str) -> VolumeRecord:
    with path.open("rb") as file:
        record = VolumeRecord.decode(file.read(MAX_BYTES + 1))
    if record.id != name:
        raise IntegrityError(f"it is the record of the volume {record.id}")
    return record


def _write(path: Path, data: bytes) -> None:
    replace_file(path, data, path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}"))
