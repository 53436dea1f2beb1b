"""Very large LFS objects in parts, the Hub's transfer ``multipart``: a connection that breaks costs a part.

The batch call's answer has an address for each part and one for when they are all there (``_upload_multi_part`` in
huggingface_hub's lfs.py). Parts wait in a spool, each a file that is there whole or not at all; then the object is
ingested from them like one that comes in one piece, and they go.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.responses import JSONResponse, Response

from helios.errors import Forbidden, IntegrityError, InvalidInput
from helios.names import RepoId
from registry.hub.answers import absolute
from registry.hub.asked import Asked
from registry.hub.upload.grants import LIFE_S, PartGrant, WholeGrant
from registry.hub.upload.pending import Pending, Uploading
from registry.hub.upload.spools import Spool, Spools, receive_file
from registry.processes import Processes
from registry.quotas.quotas import Quotas
from registry.receiver import Receiver
from registry.xet.tokens import Grant

PART: Final = 256 << 20
"""Bytes of a part, but of the last; more where there would be too many."""
MOST: Final = 1000
"""Most parts of an object: each has an address in the answer of the batch call."""
FROM: Final = 4 << 30
"""From this size on objects are sent in parts, in bytes: parts are written twice, so smaller ones come in one piece."""

_KIND: Final = re.compile(r"(part|whole)\.(.+)\Z")


class Whole(msgspec.Struct):
    """What a client says when it has sent all parts."""

    oid: str


class FilesSource:
    """Files one behind the other, as a source of an ingest. Each is opened when its turn comes."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = iter(paths)
        self._file: Any = None

    def readinto(self, buffer: memoryview, /) -> int:
        while True:
            if self._file is None:
                path = next(self._paths, None)
                if path is None:
                    return 0
                self._file = path.open("rb", buffering=0)
            if count := self._file.readinto(buffer):
                return int(count)
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Parts:
    """Makes the addresses for an object's parts, and takes what is sent there."""

    def __init__(
        self,
        pending: Pending,
        receiver: Receiver,
        spools: Spools,
        processes: Processes,
        quotas: Quotas,
        *,
        least: int = FROM,
        part: int = PART,
    ) -> None:
        self._pending, self._receiver, self._spools = pending, receiver, spools
        self._processes, self._signer = processes, processes.signer
        self._quotas, self._least, self._part = quotas, least, part

    def wanted(self, size: int, transfers: list[str]) -> bool:
        """Whether an object of this size should come in parts from a client that knows these transfers."""
        return size >= self._least and "multipart" in transfers

    def upload(self, asked: Asked, base: str, sha256: str, size: int) -> dict[str, Any]:
        """The action ``upload`` of an object; ``base`` is the path below which its addresses are."""
        repo, ends = str(asked.repo), int(self._signer.clock()) + LIFE_S
        spool = self._spools.of(asked.repo, asked.access.tenant).name
        part = max(self._part, -(-size // MOST))
        header = {"chunk_size": str(part)}
        for number, start in enumerate(range(0, size, part)):
            grant = PartGrant(repo, ends, spool, sha256, number, min(part, size - start))
            header[str(number + 1)] = self._address(asked, base, "part", grant)
        whole = WholeGrant(repo, ends, spool, sha256, size, part)
        return {"href": self._address(asked, base, "whole", whole), "header": header}

    def _address(self, asked: Asked, base: str, kind: str, grant: Grant) -> str:
        return absolute(asked.request.scope, f"{base}/{kind}.{self._signer.sign(grant)}")

    async def put(self, asked: Asked, text: str) -> Response:
        """A part's bytes."""
        grant = self._signer.check(text, PartGrant)
        _check(grant, asked.repo)
        if (process := self._processes.elsewhere(grant.spool)) is not None:
            return await self._processes.hand_on(asked.request, process, self._receiver)
        with self._spools.using(grant.spool) as spool:
            store = partial(receive_file, _path(spool, grant.sha256, grant.number), grant.length)
            where = f"part {grant.number + 1} of LFS object {grant.sha256}"
            await self._receiver.receive(grant.length, where, asked.request.stream(), store)
        return Response(headers={"etag": f'"{grant.number + 1}"'})

    async def complete(self, asked: Asked) -> Response:
        """All parts are there: make the object of them."""
        grant = self._signer.check(kind_of(asked.call.path)[1], WholeGrant)
        _check(grant, asked.repo)
        if (process := self._processes.elsewhere(grant.spool)) is not None:
            return await self._processes.hand_on(asked.request, process, self._receiver)
        if (await asked.json(Whole)).oid != grant.sha256:
            raise InvalidInput("this address is for another LFS object")
        with self._spools.using(grant.spool) as spool:
            paths = [_path(spool, grant.sha256, number) for number in range(-(-grant.size // grant.part))]
            async with self._pending.of(asked.repo) as uploading:
                await uploading.reserve(self._quotas, {grant.sha256: grant.size})
                await self._receiver.run(partial(_ingest, uploading, grant, paths))
        return JSONResponse({})


def kind_of(path: str) -> tuple[str, str]:
    """``part`` or ``whole``, or "" for an object in one piece, and the grant in the last segment of an address."""
    match = _KIND.match(path)
    return (match[1], match[2]) if match else ("", path)


def _check(grant: Grant, repo: RepoId) -> None:
    if grant.repo != str(repo):
        raise Forbidden("this address for an upload is another repository's")


def _path(spool: Spool, sha256: str, number: int) -> Path:
    return spool.directory / f"{sha256}.part{number}"


def _ingest(uploading: Uploading, grant: WholeGrant, paths: list[Path]) -> None:
    if uploading.uploaded(grant.sha256):
        return  # the answer to an earlier call got lost
    for number, path in enumerate(paths):
        if not path.exists():
            raise InvalidInput(f"part {number + 1} of LFS object {grant.sha256} was not sent")
    source = FilesSource(paths)
    try:
        name = f"LFS object {grant.sha256}"
        uploading.session.ingest(name, grant.size, source, lfs=True, expect_sha256=grant.sha256)
        uploading.add(grant.sha256)
    except IntegrityError as error:  # not our store's fault, but that of who sent it
        raise InvalidInput(error.message) from None
    finally:
        source.close()
        for path in paths:  # wrong ones are of no use either
            path.unlink(missing_ok=True)
