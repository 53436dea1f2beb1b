"""Two small files beside the blobs: what is pinned, and how often blobs were used (docs/format.md).

Both are text: a magic line, canonical JSON, the sha256 of these in hexadecimal. They are written under another name,
fsynced and renamed. Losing ``uses`` costs knowledge of what is worth keeping; ``pins`` are what somebody asked for, so
a damaged file is set aside, not overwritten. Calls block.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from helios.decoding import from_json
from helios.errors import IntegrityError, NoSpace, Unavailable
from heliosfs.store.directory import FULL
from heliosfs.store.manifest import canonical
from heliosfs.store.syscalls import replace_file
from heliosfs.tiers.history import Use

log = logging.getLogger("heliosfs.tiers")

PINS_MAGIC: Final = b"helios-pins 1\n"
USES_MAGIC: Final = b"helios-uses 1\n"
MAX_BYTES: Final = 64 << 20

T = TypeVar("T")


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Blobs that somebody gave a class: ``commit`` of ``repo`` (canonical text), asked for as ``revision``.

    ``priority`` is the name of a class in lower case, ``blobs`` are sha256 digests.
    """

    repo: str
    revision: str
    commit: str
    priority: str
    blobs: list[str]


class Uses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``clock``: seconds that the tier has been in use; of each blob: weight, uses, last and counted (policy.py)."""

    clock: float = 0.0
    blobs: dict[str, tuple[float, int, float, float]] = {}

    def taken(self) -> dict[str, Use]:
        return {key: Use(*fields) for key, fields in self.blobs.items()}


class _Pins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pins: list[Pin] = []


class KeepingFiles:
    """The files ``pins`` and ``uses`` in the tier's directory."""

    def __init__(self, root: Path) -> None:
        self._pins, self._uses = root / "pins", root / "uses"

    def load_pins(self) -> list[Pin]:
        """What is pinned. Raises Unavailable when the disk can't be read."""
        try:
            return read_record(self._pins, PINS_MAGIC, _Pins()).pins
        except OSError as error:
            raise Unavailable(f"{self._pins} can't be read: {error.strerror}") from error
        except IntegrityError as error:
            aside = self._pins.with_name("pins.damaged")
            log.error("what is pinned is not known any more", extra={"reason": str(error), "kept as": str(aside)})
            with contextlib.suppress(OSError):
                self._pins.rename(aside)
            return []

    def save_pins(self, pins: list[Pin]) -> None:
        """Durable when it returns. Raises NoSpace or Unavailable."""
        try:
            write_record(self._pins, PINS_MAGIC, _Pins(pins))
        except OSError as error:
            kind = NoSpace if error.errno in FULL else Unavailable
            raise kind(f"what is pinned can't be written to {self._pins}: {error.strerror}") from error

    def load_uses(self) -> Uses:
        """What is known; nothing, when it can't be read or is damaged."""
        try:
            return read_record(self._uses, USES_MAGIC, Uses())
        except (OSError, IntegrityError) as error:
            log.warning("how often blobs were used is not known any more", extra={"reason": str(error)})
            return Uses()

    def save_uses(self, uses: Uses) -> None:
        """Raises OSError."""
        write_record(self._uses, USES_MAGIC, uses)


def read_record(path: Path, magic: bytes, empty: T) -> T:
    """The record in the file, ``empty`` where there is no file. Raises OSError, IntegrityError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return empty
    text, digest = data[:-66], data[-66:]
    if len(data) > MAX_BYTES or digest != _tail(text) or not text.startswith(magic):
        raise IntegrityError(f"{path} is damaged")
    try:
        return from_json(text[len(magic) :], type(empty))
    except msgspec.DecodeError as error:
        raise IntegrityError(f"{path} does not decode: {error}") from error


def write_record(path: Path, magic: bytes, record: Any) -> None:
    text = magic + canonical(msgspec.to_builtins(record))
    replace_file(path, text + _tail(text), path.with_name(f".{path.name}.tmp"))


def _tail(text: bytes) -> bytes:
    return f"\n{hashlib.sha256(text).hexdigest()}\n".encode()
