"""One download run to its end in the caller's thread, with an ingest that only hashes."""

from __future__ import annotations

import hashlib
import threading

from helios.errors import IntegrityError
from heliosfs.store.manifest import FileEntry
from registry.pull.flight import Flight
from registry.pull.turns import Turns


def hashing(file, into: bytearray):
    """An ingest: takes the bytes and checks them against what is listed."""

    def ingest(source) -> FileEntry:
        del into[:]
        buffer = memoryview(bytearray(1 << 20))
        while count := source.readinto(buffer):
            into.extend(buffer[:count])
        oid = hashlib.sha1(b"blob %d\0" % len(into) + into).hexdigest()
        sha256 = hashlib.sha256(into).hexdigest()
        if (file.sha256 or file.git_oid) not in (sha256, oid) or len(into) != file.size:
            raise IntegrityError("its hash is another one")
        return FileEntry(sha256, file.size, file.git_oid, "", file.lfs)

    return ingest


def fly(client, snapshot, file, spool, *, advance=None, stop=None, token=None, finish=True) -> bytes:
    """The file's bytes, fetched through the spool; raises what the download fails with."""
    flight = Flight(
        client,
        snapshot.repo,
        snapshot.commit,
        file,
        spool.partial(snapshot.repo, file),
        Turns(16),
        finish=finish,
    )
    flight.add_token(token)
    data = bytearray()
    thread = threading.Thread(target=flight.run, args=(hashing(file, data), lambda entry: None))
    thread.start()
    try:
        flight.wait(stop or threading.Event(), advance or (lambda here, attempt: None))
    finally:
        flight.stop()
        thread.join()
        flight.let_go()
    return bytes(data)
