"""Uploading over Xet, which huggingface_hub 1.x and 2.x insist on where hf-xet is installed (it comes with them).

The write token sends a client to a spool. It uploads xorbs there, then shards, which say how files are made of them. A
file is ingested as soon as its shard is there, from the decoded chunks, and checked against its sha256: from there on
it is an uploaded blob like one that came over LFS, and the commit names it in the same way.
"""

from __future__ import annotations

import asyncio
import shutil
from functools import partial
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helios.errors import HeliosError, IntegrityError, InvalidInput, QuotaExceeded
from helios.names import check_revision
from registry.body import collect
from registry.catalog import Catalog
from registry.hub.answers import absolute, error_answer
from registry.hub.asked import Asked, Handlers
from registry.hub.upload.grants import LIFE_S, XetGrant
from registry.hub.upload.pending import Pending, Uploading
from registry.hub.upload.spools import Spool, Spools, receive_file
from registry.hub.upload.xorbs import MAX_XORB, Part, Place, XorbSource, scan
from registry.ingest import Source
from registry.metadata.quotas import Amount
from registry.processes import Processes
from registry.receiver import Receiver
from registry.threads import Threads
from registry.xet.hashes import from_text, to_text
from registry.xet.shard import Shards, Term

CAS: Final = "/xet-upload"
MAX_SHARD: Final = 80 << 20
"""Longest shard, in bytes; hf-xet makes them up to 64 MiB."""
MAX_CHUNKS: Final = 16 << 20
"""Most chunks in the files of a shard, of 64 KiB in the mean: a terabyte. A short one can name a few very often."""


class XetUploads:
    """The write token's handler, and the routes of the service that it names."""

    def __init__(
        self, catalog: Catalog, pending: Pending, receiver: Receiver, spools: Spools, processes: Processes
    ) -> None:
        self._catalog, self._pending, self._receiver = catalog, pending, receiver
        self._spools, self._processes, self._signer = spools, processes, processes.signer

    def handlers(self) -> Handlers:
        return {"xet-write-token": {"GET": self.token}}

    def routes(self) -> list[Route]:
        """The service; they bring the access token."""
        return [
            Route(CAS + "/{spool}/v1/xorbs/default/{xorb}", self._xorb, methods=["POST"]),
            Route(CAS + "/{spool}/v1/shards", self._shard, methods=["POST"]),
        ]

    async def token(self, asked: Asked) -> Response:
        """Where to upload to, and the access token for it."""
        repo = asked.repo
        asked.access.check_writable(repo)
        check_revision(asked.call.revision or "")
        await asyncio.to_thread(self._catalog.refs, repo)
        # What hf-xet is told later, people don't see: this is the last answer that they read.
        await asyncio.to_thread(self._catalog.quotas.check, repo, Amount(0, 1))
        spool = self._spools.of(repo, asked.access.tenant)
        ends = int(self._signer.clock()) + LIFE_S
        url = absolute(asked.request.scope, f"{CAS}/{spool.name}")
        text = self._signer.sign(XetGrant(str(repo), ends, spool.name))
        headers = {
            "x-xet-cas-url": url,
            "x-xet-access-token": text,
            "x-xet-token-expiration": str(ends),
            "cache-control": "no-store",
        }
        return JSONResponse({"casUrl": url, "accessToken": text, "exp": ends}, headers=headers)

    async def _xorb(self, request: Request) -> Response:
        name = request.path_params["xorb"]
        try:
            from_text(name)
            granted = self._granted(request)
            if (process := self._processes.elsewhere(granted)) is not None:
                return await self._processes.hand_on(request, process, self._receiver)
            with self._spools.using(granted) as spool:
                length = request.headers.get("content-length", "")
                if not length.isdecimal() or not 0 < int(length) <= MAX_XORB:
                    raise InvalidInput(f"a xorb has a Content-Length from 1 to {MAX_XORB} bytes")
                await self._reserve(spool, int(length))
                store = partial(_store, spool, name, int(length))
                await self._receiver.receive(int(length), f"xorb {name}", request.stream(), store)
        except HeliosError as error:
            return _refusal(error)
        return JSONResponse({"was_inserted": True})

    async def _shard(self, request: Request) -> Response:
        try:
            granted = self._granted(request)
            if (process := self._processes.elsewhere(granted)) is not None:
                return await self._processes.hand_on(request, process, self._receiver)
            with self._spools.using(granted) as spool:
                data = await collect(request.stream(), MAX_SHARD)
                async with self._pending.of(spool.repo) as uploading:
                    files = await asyncio.to_thread(_files, spool, data)
                    spool.reserved = 0  # what is made of the xorbs takes their room
                    sizes = {_key(spool): 0} | {sha256: source.size for sha256, source in files}
                    await uploading.reserve(self._catalog.quotas, sizes)
                    for sha256, source in files:
                        await self._receiver.run(partial(_ingest, uploading, sha256, source))
        except HeliosError as error:
            return _refusal(error)
        return JSONResponse({"result": 1})

    async def _reserve(self, spool: Spool, length: int) -> None:
        """Have room for one more xorb."""
        if self._catalog.quotas.concerning(spool.repo):
            async with self._pending.of(spool.repo) as uploading:
                spool.reserved += length
                try:
                    await uploading.reserve(self._catalog.quotas, {_key(spool): spool.reserved})
                except HeliosError:
                    spool.reserved -= length
                    raise

    def _granted(self, request: Request) -> str:
        """The spool of the request's address, which its token must be for."""
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        grant = self._signer.check(text.strip() if scheme.lower() == "bearer" else None, XetGrant)
        if grant.spool != request.path_params["spool"]:
            raise InvalidInput("the access token is for another upload")
        return grant.spool

    async def drop_idle(self, upkeep: Threads) -> None:
        """Remove the spools that nobody used for long."""
        for directory in self._spools.drop_idle():
            await upkeep(shutil.rmtree, directory, ignore_errors=True)


def _refusal(error: HeliosError) -> Response:
    """hf-xet tries whatever is 5xx again for a minute; a quota that is full then stays so, and it shows the status."""
    if isinstance(error, QuotaExceeded):
        error.status = 413
    return error_answer(error)


def _key(spool: Spool) -> str:
    """What stands for a spool's xorbs among reservations."""
    return f"spool:{spool.name}"


def _store(spool: Spool, name: str, size: int, source: Source) -> None:
    """Put a xorb into the spool; one that is malformed is not kept."""
    arrived = spool.directory / f"{name}.{id(source):x}"
    try:
        receive_file(arrived, size, source)
        scan(arrived)
        arrived.replace(spool.path(name))
    finally:
        arrived.unlink(missing_ok=True)


def _files(spool: Spool, data: bytes) -> list[tuple[str, XorbSource]]:
    """The files of a shard: their sha256, and where their bytes come from. Raises InvalidInput."""
    shards = Shards()
    try:
        shards.add(data)
    except IntegrityError as error:
        raise InvalidInput(error.message) from None
    known: dict[bytes, list[Place]] = {}
    out, chunks = [], 0
    for name, terms in shards.files.items():
        if name not in shards.sha256:
            raise InvalidInput(f"the shard does not say the sha256 of file {to_text(name)}")
        parts = []
        for term in terms:
            parts.append(_part(spool, term, known))
            chunks += len(parts[-1][1])
            if chunks > MAX_CHUNKS:
                raise InvalidInput(f"the files of the shard have more than {MAX_CHUNKS} chunks")
        out.append((shards.sha256[name], XorbSource(parts)))
    return out


def _part(spool: Spool, term: Term, known: dict[bytes, list[Place]]) -> Part:
    digest, first, stop = term
    path = spool.path(to_text(digest))
    if digest not in known:
        if not path.exists():
            raise InvalidInput(f"the shard names xorb {to_text(digest)}, which was not uploaded here")
        known[digest] = scan(path)
    places = known[digest]
    if not 0 <= first < stop <= len(places):
        raise InvalidInput(
            f"the shard names chunks {first} to {stop} of xorb {to_text(digest)}, which has {len(places)}"
        )
    return path, places[first:stop]


def _ingest(uploading: Uploading, sha256: str, source: XorbSource) -> None:
    try:
        uploading.session.ingest(f"Xet file {sha256}", source.size, source, lfs=True, expect_sha256=sha256)
        uploading.add(sha256)
    except IntegrityError as error:  # not our store's fault, but that of who sent it
        raise InvalidInput(error.message) from None
