"""LFS objects: the batch call, and what is sent to the addresses in its answer (git-lfs, docs/api/batch.md)."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Any, Final

import msgspec
from starlette.responses import JSONResponse, Response

from helios.errors import Conflict, EntryNotFound, Forbidden, IntegrityError, InvalidInput
from helios.names import RepoId
from heliosfs.store.recipe import MAX_BLOB
from registry.access import Access
from registry.catalog import Catalog
from registry.hub.answers import absolute
from registry.hub.asked import Asked, Handlers
from registry.hub.upload.grants import LIFE_S, LfsGrant
from registry.hub.upload.known import Known
from registry.hub.upload.parts import Parts, kind_of
from registry.hub.upload.pending import Pending, Uploading
from registry.ingest import Source
from registry.receiver import Receiver
from registry.xet.tokens import Signer

MAX_OBJECTS: Final = 1000
MEDIA: Final = "application/vnd.git-lfs+json"

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class Object(msgspec.Struct):
    oid: str
    size: int


class Batch(msgspec.Struct):
    """What git-lfs and huggingface_hub ask; ``transfers`` that are not named are git-lfs' basic."""

    operation: str
    objects: list[Object]
    transfers: list[str] = []
    hash_algo: str = "sha256"


class Lfs:
    """Handlers of ``{id}.git/info/lfs/objects/…``."""

    def __init__(self, catalog: Catalog, pending: Pending, receiver: Receiver, signer: Signer, parts: Parts) -> None:
        self._parts = parts
        self._known, self._quotas = Known(catalog), catalog.quotas
        self._pending, self._receiver, self._signer = pending, receiver, signer

    def handlers(self) -> Handlers:
        return {"lfs": {"POST": self.post}, "lfs-object": {"PUT": self.put, "POST": self._parts.complete}}

    async def post(self, asked: Asked) -> Response:
        return await (self._batch(asked) if asked.call.path == "batch" else self._verify(asked))

    async def _batch(self, asked: Asked) -> Response:
        repo, wanted = asked.repo, await asked.json(Batch)
        asked.access.check_writable(repo)
        if wanted.operation != "upload" or wanted.hash_algo != "sha256":
            raise InvalidInput("LFS is only for uploads with sha256; files are read at …/resolve/…")
        if wanted.transfers and "basic" not in wanted.transfers:
            raise InvalidInput(f"of {', '.join(wanted.transfers)[:100]} none is served; there is basic")
        if len(wanted.objects) > MAX_OBJECTS:
            raise InvalidInput(f"batch takes {MAX_OBJECTS} objects at a time, not {len(wanted.objects)}")
        await asyncio.to_thread(self._known.check_repo, repo)
        async with self._pending.of(repo) as uploading:
            transfers = wanted.transfers
            objects = [await self._object(asked, repo, each, transfers, uploading) for each in wanted.objects]
            sent = {each["oid"]: each["size"] for each in objects if "actions" in each}
            await uploading.reserve(self._quotas, sent)
        chosen = "multipart" if any(self._parts.wanted(each.size, transfers) for each in wanted.objects) else "basic"
        return JSONResponse({"transfer": chosen, "objects": objects, "hash_algo": "sha256"}, media_type=MEDIA)

    async def _object(
        self, asked: Asked, repo: RepoId, wanted: Object, transfers: list[str], uploading: Uploading
    ) -> dict[str, Any]:
        """What to do with one object: nothing, when a commit may name it as it is."""
        out: dict[str, Any] = {"oid": wanted.oid, "size": wanted.size}
        if not _SHA256.match(wanted.oid) or not 0 <= wanted.size <= MAX_BLOB:
            return out | {"error": {"code": 422, "message": "the oid is not a sha256, or the size can't be"}}
        size = await asyncio.to_thread(self._size, asked.access, repo, wanted.oid, uploading)
        if size is not None and size != wanted.size:
            message = f"{wanted.oid} has {size} bytes, not {wanted.size}"
            return out | {"error": {"code": 422, "message": message}}
        if size is not None:
            return out
        prefix = "" if repo.kind == "models" else f"/{repo.kind}"
        base = f"{prefix}/{repo.id}.git/info/lfs/objects"
        if self._parts.wanted(wanted.size, transfers):
            upload = self._parts.upload(asked, base, wanted.oid, wanted.size)
        else:
            ends = int(self._signer.clock()) + LIFE_S
            grant = self._signer.sign(LfsGrant(str(repo), ends, wanted.oid, wanted.size))
            upload = {"href": absolute(asked.request.scope, f"{base}/{grant}"), "header": {}}
        actions = {
            "upload": upload,
            "verify": {"href": absolute(asked.request.scope, f"{base}/verify"), "header": {}},
        }
        return out | {"authenticated": True, "actions": actions}

    def _size(self, access: Access, repo: RepoId, sha256: str, uploading: Uploading) -> int | None:
        entry = self._known.entry(access, repo, sha256, uploading)
        return None if entry is None else entry.size

    async def put(self, asked: Asked) -> Response:
        """The bytes of an object, sent to the address that the batch call gave: the grant in it is what allows it."""
        repo = asked.repo
        kind, text = kind_of(asked.call.path)
        if kind == "part":
            return await self._parts.put(asked, text)
        grant = self._signer.check(text, LfsGrant)
        if grant.repo != str(repo):
            raise Forbidden("this address for an upload is another repository's")
        async with self._pending.of(repo) as uploading:
            await uploading.reserve(self._quotas, {grant.sha256: grant.size})  # another process may have had the batch
            store = partial(self._store, uploading, grant)
            where = f"LFS object {grant.sha256}"
            await self._receiver.receive(grant.size, where, asked.request.stream(), store)
        return Response(headers={"etag": f'"{grant.sha256}"'})

    def _store(self, uploading: Uploading, grant: LfsGrant, source: Source) -> None:
        name = f"LFS object {grant.sha256}"
        try:
            uploading.session.ingest(name, grant.size, source, lfs=True, expect_sha256=grant.sha256)
            uploading.add(grant.sha256)
        except IntegrityError as error:  # not our store's fault, but that of who sent it
            raise InvalidInput(error.message) from None

    async def _verify(self, asked: Asked) -> Response:
        repo, wanted = asked.repo, await asked.json(Object)
        asked.access.check_writable(repo)
        async with self._pending.of(repo) as uploading:
            size = await asyncio.to_thread(self._size, asked.access, repo, wanted.oid, uploading)
        if size is None:
            raise EntryNotFound(f"LFS object {wanted.oid[:64]} was not uploaded to {repo.id}")
        if size != wanted.size:
            raise Conflict(f"LFS object {wanted.oid} has {size} bytes, not {wanted.size}")
        return JSONResponse({}, media_type=MEDIA)
