"""Records and contents by tenant, over ``objects``; every call in one of a few threads.

    v1/files/<tenant>/<file>.json        a file's record
    v1/content/<tenant>/<file>/<part>    its content
    v1/batches/<tenant>/<batch>.json     a batch's record
    v1/open/<tenant>/<batch>             says that the batch is not over: what routers look at

A file's content is written before its record and removed after it; a batch is marked as open before its record is
there, and the mark goes when the record says that it is over. So whatever ends in between leaves at most what nobody
names, which ``sweep`` removes.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

import msgspec

from helios.errors import Conflict, NotFound
from router.batches.objects import Objects, Tag
from router.batches.records import BatchRecord, FileRecord, Part, batch_of, encode, file_of

P = ParamSpec("P")
T = TypeVar("T")

THREADS: Final = 8
TRIES: Final = 8
"""How often a change of a record is tried that others change, too."""
PART: Final = 4 << 20
"""Bytes of a part of an uploaded file."""


class Lost(Exception):
    """The record is not the one that was read any more."""


class Held(msgspec.Struct, frozen=True):
    """A batch's record as it was read, or written."""

    record: BatchRecord
    tag: Tag


class Shelf:
    """All that is stored. Every method raises Unavailable; those that write raise NoSpace, too."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="batches")

    def close(self) -> None:
        """Nothing is asked any more; what is under way ends by its own deadline."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _do(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(call, *args, **kwargs))

    # --- contents ---

    async def write_part(self, tenant: str, file: str, name: str, data: bytes) -> Part:
        """A piece of a file's content; nobody has used this name for it before."""
        key = f"v1/content/{tenant}/{file}/{name}"
        await self._do(self.objects.put, key, data)
        return Part(key, len(data))

    async def read_parts(self, parts: Sequence[Part]) -> AsyncIterator[bytes]:
        """The pieces in order. Raises NotFound where one is missing, or has another length."""
        for part in parts:
            data = (await self._do(self.objects.get, part.key)).data
            if len(data) != part.size:
                raise NotFound(f"{part.key} has {len(data)} bytes instead of {part.size}")
            yield data

    async def drop_part(self, part: Part) -> None:
        await self._do(self.objects.delete, part.key)

    async def drop_content(self, tenant: str, file: str) -> None:
        for key in await self._do(self.objects.list, f"v1/content/{tenant}/{file}"):
            await self._do(self.objects.delete, key)

    # --- files ---

    async def add_file(self, record: FileRecord) -> None:
        await self._do(self.objects.put, _file(record.tenant, record.id), encode(record))

    async def file(self, tenant: str, identity: str) -> FileRecord:
        """Raises NotFound."""
        key = _file(tenant, identity)
        return file_of((await self._do(self.objects.get, key)).data, key)

    async def drop_file(self, tenant: str, identity: str) -> None:
        """With its content; what is missing of it is no error."""
        await self._do(self.objects.delete, _file(tenant, identity))
        await self.drop_content(tenant, identity)

    async def file_ids(self, tenant: str) -> list[str]:
        """The oldest first."""
        return _ids(await self._do(self.objects.list, f"v1/files/{tenant}"))

    # --- batches ---

    async def add_batch(self, record: BatchRecord) -> None:
        await self._do(self.objects.put, _open(record.tenant, record.id), b"")
        await self._do(self.objects.put, _batch(record.tenant, record.id), encode(record))

    async def batch(self, tenant: str, identity: str) -> Held:
        """Raises NotFound."""
        key = _batch(tenant, identity)
        data, tag = await self._do(self.objects.get, key)
        return Held(batch_of(data, key), tag)

    async def batch_ids(self, tenant: str) -> list[str]:
        """The oldest first."""
        return _ids(await self._do(self.objects.list, f"v1/batches/{tenant}"))

    async def open_batches(self, tenant: str | None = None) -> list[tuple[str, str]]:
        """Tenants and ids of the batches that are not over, the oldest of each tenant first."""
        keys = await self._do(self.objects.list, "v1/open" if tenant is None else f"v1/open/{tenant}")
        return [(owner, identity) for owner, identity in (key.split("/")[-2:] for key in keys)]

    async def save(self, held: Held, record: BatchRecord) -> Held:
        """Replace the record, if it is what was held. Raises Lost."""
        key, data = _batch(record.tenant, record.id), encode(record)
        if record is held.record:
            return held
        tag = await self._do(self.objects.replace, key, data, held.tag)
        if tag is None:
            raise Lost
        if record.over:
            await self.close_batch(record.tenant, record.id)
        return Held(record, tag)

    async def change(self, tenant: str, identity: str, change: Callable[[BatchRecord], BatchRecord]) -> BatchRecord:
        """Change a record that others may be changing. Raises NotFound, what ``change`` raises, and Conflict."""
        for _ in range(TRIES):
            held = await self.batch(tenant, identity)
            try:
                return (await self.save(held, change(held.record))).record
            except Lost:
                continue
        raise Conflict(f"the batch {identity} is being changed all the time; try again")

    async def close_batch(self, tenant: str, identity: str) -> None:
        """Nobody need look at it any more."""
        await self._do(self.objects.delete, _open(tenant, identity))

    async def drop_batch(self, tenant: str, identity: str) -> None:
        await self._do(self.objects.delete, _batch(tenant, identity))

    async def keys(self, directory: str) -> list[str]:
        """All keys below a directory of the layout, such as ``v1/content``."""
        return await self._do(self.objects.list, directory)


def _file(tenant: str, identity: str) -> str:
    return f"v1/files/{tenant}/{identity}.json"


def _batch(tenant: str, identity: str) -> str:
    return f"v1/batches/{tenant}/{identity}.json"


def _open(tenant: str, identity: str) -> str:
    return f"v1/open/{tenant}/{identity}"


def _ids(keys: Sequence[str]) -> list[str]:
    return sorted(key.rpartition("/")[2].removesuffix(".json") for key in keys)
