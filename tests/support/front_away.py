"""A front store of which some things wait for the cloud, and what must become of them."""

from __future__ import annotations

from helios.errors import NotFound
from tests.support.front_store import RECORD, Front, blob, read

UPLOADED, REMOVED, WAITING = (blob(number)[0] for number in (1, 2, 0))


def put(front: Front, key: str) -> None:
    (data,) = [data for each, data in map(blob, range(6)) if each == key]
    path = front.store.staging() / "file"
    path.write_bytes(data)
    front.store.put_file(key, path)


def fill(front: Front) -> None:
    """One blob is uploaded; what waits: a removal, an upload, and a record in the place of another one."""
    put(front, UPLOADED)
    put(front, REMOVED)
    front.store.put_bytes(RECORD, b"old")
    front.settle()
    front.cloud.down = True
    front.store.delete(REMOVED)
    put(front, WAITING)
    front.store.delete(RECORD)
    front.store.put_bytes(RECORD, b"new")


def reopen(front: Front, *, down: bool = False) -> None:
    front.store.close()
    front.open(down=down)


def found(front: Front, key: str) -> bytes | None:
    """The object, which must be the same in the cloud."""
    try:
        data: bytes | None = read(front.store, key)
    except NotFound:
        data = None
    path = front.cloud_root / key
    assert (path.read_bytes() if path.exists() else None) == data
    return data


def owed(front: Front) -> list[bytes | None]:
    """What ``fill`` left to do, once it is done."""
    front.cloud.down = False
    front.settle()
    return [found(front, key) for key in (REMOVED, WAITING, RECORD)]


OWED = [None, blob(0)[1], b"new"]
