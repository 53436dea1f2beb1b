"""Whether an object is what its key says, as far as it can be told from the object alone.

Blobs, recipes and manifests are named by the sha256 of their content; a pack has an index with a hash of every chunk,
an encrypted object a sum of itself. Other kinds name nothing of their content.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

from blake3 import blake3

from helios.errors import IntegrityError
from heliosfs.store import codec, pack
from heliosfs.store.keys import KINDS, SEALED
from heliosfs.store.sealed import check_end

NAMED: Final = ("blobs", "recipes", "manifests")
BLOCK: Final = 1 << 20


def check_content(key: str, path: Path) -> None:
    """Read the file that is (a copy of) the object ``key``; raises IntegrityError for other content, OSError."""
    kind, name = key.split("/")[1], key.rpartition("/")[2]
    with path.open("rb", buffering=0) as file:
        if kind in NAMED:
            digest = hashlib.sha256()
            buffer = memoryview(bytearray(BLOCK))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
            if digest.hexdigest() != name:
                raise IntegrityError(f"the object {key} has the sha256 {digest.hexdigest()}")
        elif kind == SEALED and key.split("/")[2] in KINDS:
            check_end(key, file)
        elif kind == "packs":
            size = os.fstat(file.fileno()).st_size
            trailer = os.pread(file.fileno(), pack.TRAILER_SIZE, max(0, size - pack.TRAILER_SIZE))
            offset, length = pack.index_span(trailer, size)
            index = os.pread(file.fileno(), length, offset)
            for entry in pack.parse(os.pread(file.fileno(), pack.HEAD_SIZE, 0), index, trailer, size):
                data = memoryview(os.pread(file.fileno(), entry.encoded_length, entry.offset))
                if blake3(codec.decode(entry.codec, data, entry.length)).digest() != entry.id:
                    raise IntegrityError(f"the pack {key} has a damaged chunk at byte {entry.offset}")
