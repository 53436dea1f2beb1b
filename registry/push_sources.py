"""The files of a push that lie on this machine: the registry reads them itself."""

from __future__ import annotations

import os
from pathlib import Path

from helios.errors import InvalidInput
from registry.ingest import IngestedBlob
from registry.ingest.reader import FileSource
from registry.push_log import Announced
from registry.receiver import OwnSource
from registry.sessions import Session


def ingest_local(session: Session, file: Announced, local: str, source: OwnSource) -> IngestedBlob:
    """Store a local file. Raises InvalidInput for one that is none, has another size, or changes meanwhile."""
    if not os.path.isabs(local) or "\0" in local:
        raise InvalidInput(f"local={local!r} is not an absolute path")
    with FileSource(Path(local)) as inner:
        source.inner = inner
        if inner.size != file.size:
            raise InvalidInput(f"{file.path}: it has {inner.size} bytes, {file.size} were announced")
        before = _stamp(local)
        blob = session.ingest(file.path, file.size, source, executable=file.executable)
        if _stamp(local) != before:
            raise InvalidInput(f"{file.path}: changed while it was published; publish again when nobody writes it")
        return blob


def _stamp(local: str) -> tuple[int, int, int]:
    """What differs after a file was written or replaced."""
    try:
        status = os.stat(local)
    except OSError as error:
        raise InvalidInput(f"{local}: can't be read: {error.strerror}") from None
    return status.st_ino, status.st_size, status.st_mtime_ns
