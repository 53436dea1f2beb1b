"""What the client returns: plain values, in bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helios.errors import Unavailable
from heliosfs.warming import WarmProgress


class Closed(Unavailable):
    """The store or the file was closed, here or by another thread."""

    code = "Closed"


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a commit; ``size`` in bytes, ``sha256`` of its content in 64 hexadecimal digits."""

    path: str
    size: int
    sha256: str
    executable: bool


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``nbytes`` bytes from ``offset`` of the file at ``file``, row by row, little endian.

    ``dtype`` is as safetensors writes it: ``F32``, ``BF16``, ``F8_E4M3``...
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int


Progress = Callable[[WarmProgress], None]


@dataclass(frozen=True, slots=True)
class Warmed:
    """What ``warm`` did: ``bytes`` are local now, of which ``found_bytes`` were before it."""

    files: int
    bytes: int
    found_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FileStatus:
    """How much of a file is local."""

    path: str
    size: int
    local_bytes: int
    complete: bool


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What the store holds and does.

    ``own_cache`` says whether ``cache`` is the home's own; else another process owns that, and this one reads the
    whole files in ``shared``, and through ``mountpoint`` what the mount there has in part. ``in_flight`` chunks are on
    their way; ``memory`` bytes of chunks are held for want of a disk that takes them.
    """

    cache: Path
    own_cache: bool
    shared: Path | None
    mountpoint: Path | None
    registry: tuple[str, ...]
    registry_answers: bool
    blobs: int
    blob_bytes: int
    partials: int
    partial_bytes: int
    disk_free: int
    disk_total: int
    filling: int
    queued: int
    in_flight: int
    memory: int
    open_files: int
