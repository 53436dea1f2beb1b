"""Preupload and commits: what a branch becomes when operations are applied to it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from starlette.responses import JSONResponse, Response

from helios.errors import Conflict, EntryNotFound, InvalidInput, RevisionNotFound
from helios.names import RepoId, is_commit
from heliosfs.store.cutting import extension
from heliosfs.store.manifest import FileEntry, git_blob_oid, lfs_pointer
from heliosfs.store.safetensors import header_length, parse_header
from registry.body import steady
from registry.catalog import Catalog
from registry.hub.answers import page
from registry.hub.asked import Asked, Handlers, flag
from registry.hub.gate import Gate
from registry.hub.upload.apply import Change
from registry.hub.upload.known import Known
from registry.hub.upload.ndjson import CommitBody, Content, Copy, Delete, Header, Operation, Stored
from registry.hub.upload.pending import Pending, Uploading
from registry.hub.upload.preupload import MAX_IGNORE, Preupload, answer
from registry.metadata.quotas import Amount
from registry.publisher import Published
from registry.receiver import Receiver

COMMITS: Final = 4
"""Most commits whose bodies are read at a time: each holds a line of it in memory."""
IGNORE: Final = ".gitignore"


class PreconditionFailed(Conflict):
    """The branch is not where the caller said that it is."""

    code = "PreconditionFailed"
    status = 412


class BytesSource:
    """Bytes in memory as a source of an ingest."""

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def as_lfs(entry: FileEntry) -> FileEntry:
    """The blob as an LFS file, whatever it was where it was published first."""
    oid = git_blob_oid(lfs_pointer(entry.sha256, entry.size))
    return FileEntry(entry.sha256, entry.size, oid, entry.recipe, True, entry.executable)


class Commits:
    """Handlers of ``preupload`` and ``commit``."""

    def __init__(
        self,
        catalog: Catalog,
        pending: Pending,
        receiver: Receiver,
        committed: Callable[[RepoId], None],
        gate: Gate,
    ) -> None:
        """``committed`` is told of every commit; ``gate`` knows which branches follow an upstream."""
        self._committed, self._gate = committed, gate
        self._catalog, self._pending, self._receiver = catalog, pending, receiver
        self._slots = asyncio.Semaphore(COMMITS)

    def handlers(self) -> Handlers:
        return {"preupload": {"POST": self.preupload}, "commit": {"POST": self.commit}}

    async def preupload(self, asked: Asked) -> Response:
        repo, wanted = asked.repo, await asked.json(Preupload)
        asked.access.check_writable(repo)
        await self._gate.check_own(asked, repo, asked.call.revision or "")
        return JSONResponse(await asyncio.to_thread(self._preupload, repo, asked.call.revision or "", wanted))

    def _preupload(self, repo: RepoId, revision: str, wanted: Preupload) -> dict[str, object]:
        _, held = self._base(repo, revision)
        ignore = held.get(IGNORE)
        hosted = ""
        if wanted.gitIgnore is None and ignore is not None and ignore.size <= MAX_IGNORE:
            data = self._catalog.contents.blob_reader(repo, ignore.sha256).read(0, ignore.size)
            hosted = data.decode("utf-8", "replace")
        sizes = {path: entry.size for path, entry in held.items()} | {file.path: file.size for file in wanted.files}
        self._catalog.quotas.check(repo, Amount(sum(sizes.values())))
        return answer(wanted, held, hosted)

    async def commit(self, asked: Asked) -> Response:
        repo, branch = asked.repo, asked.call.revision or ""
        asked.access.check_writable(repo)
        if flag(asked.query.get("create_pr")):
            raise InvalidInput("there are no pull requests here: commit to a branch")
        await self._gate.check_own(asked, repo, branch)
        async with self._slots:
            base, files = await asyncio.to_thread(self._base, repo, branch)
            async with self._pending.of(repo) as uploading:
                making = _Making(self._catalog, self._receiver, asked, branch, base, files, uploading)
                published = await making.run()
                self._committed(repo)
                uploading.committed({entry.sha256 for entry in making.change.files.values()})
        url = f"{page(asked.request.scope, repo)}/commit/{published.record.commit}"
        return JSONResponse({"success": True, "commitOid": published.record.commit, "commitUrl": url, "hookOutput": ""})

    def _base(self, repo: RepoId, branch: str) -> tuple[str, Mapping[str, FileEntry]]:
        """Where a branch points, and the files there. Raises RepoNotFound, RevisionNotFound."""
        refs = self._catalog.refs(repo)
        if is_commit(branch):
            raise InvalidInput(f"{branch} is a commit, which never changes: name a branch")
        if branch not in refs:
            raise RevisionNotFound(f"{repo.id} has no branch {branch[:80]!r}; make it first")
        return refs[branch], self._catalog.contents.manifest(repo, refs[branch]).files


class _Making:
    """One commit in the making."""

    def __init__(
        self,
        catalog: Catalog,
        receiver: Receiver,
        asked: Asked,
        branch: str,
        base: str,
        files: Mapping[str, FileEntry],
        uploading: Uploading,
    ) -> None:
        self._catalog, self._known, self._receiver = catalog, Known(catalog), receiver
        self._asked, self._repo, self._branch, self._base = asked, asked.repo, branch, base
        self._uploading = uploading
        self.change = Change(files)

    async def run(self) -> Published:
        body = CommitBody()
        async for data in steady(self._asked.request.stream()):
            if lines := list(body.lines(data)):
                await self._receiver.run(partial(self._take, body, lines))
        await self._receiver.run(partial(self._take, body, [body.rest()]))
        return await self._receiver.publish(partial(self._publish, body.end()))

    def _take(self, body: CommitBody, lines: list[bytes]) -> None:
        for line in lines:
            operation = body.read(line)
            if body.header is not None and body.header.parent not in (None, self._base):
                raise self._moved(f"it is at {self._base}, not at {body.header.parent}")
            if operation is not None:
                self._apply(operation)

    def _moved(self, how: str) -> PreconditionFailed:
        # The Hub's words, by which clients and people know what happened.
        return PreconditionFailed(
            f"A commit has happened since. Please refresh and try again. {self._repo.id}@{self._branch}: {how}"
        )

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Content(path, data):
                self._reserve(data)
                source = BytesSource(data)
                blob = self._uploading.session.ingest(path, len(data), source, lfs=False)
                self.change.put(path, blob.entry)
            case Stored(path, sha256, size):
                self.change.put(path, self._stored(path, sha256, size))
            case Delete(path, folder):
                (self.change.delete_folder if folder else self.change.delete_file)(path)
            case Copy(path, source, revision):
                origin = None
                if revision is not None:
                    commit = self._catalog.resolve(self._repo, revision).commit
                    origin = self._catalog.contents.manifest(self._repo, commit).files
                self.change.copy(path, source, origin)

    def _reserve(self, data: bytes) -> None:
        quotas = self._catalog.quotas
        if quotas.concerning(self._repo):
            digest = hashlib.sha256(data).hexdigest()
            quotas.reserve(self._uploading.session.name, self._repo, {digest: Amount(0, len(data))})

    def _stored(self, path: str, sha256: str, size: int | None) -> FileEntry:
        entry = self._known.entry(self._asked.access, self._repo, sha256, self._uploading)
        if entry is None:
            raise EntryNotFound(f"{path}: LFS object {sha256} was not uploaded to {self._repo.id}, or too long ago")
        if size not in (None, entry.size):
            raise InvalidInput(f"{path}: LFS object {sha256} has {entry.size} bytes, not {size}")
        if extension(path) == "safetensors":
            self._check_safetensors(path, entry)
        return as_lfs(entry)

    def _check_safetensors(self, path: str, entry: FileEntry) -> None:
        """What is called safetensors is one, as with ``helios push``; an object comes without its name."""
        reader = self._catalog.contents.stored_blob(self._uploading.session.domain, entry.sha256)
        length = header_length(reader.read(0, min(8, entry.size)), entry.size, path)
        parse_header(reader.read(8, length), entry.size, path)

    def _publish(self, header: Header) -> Published:
        self.change.check()
        access = self._asked.access
        author = access.label or access.tenant or ""
        taken = {entry.sha256 for entry in self.change.files.values()}
        try:
            return self._catalog.publisher.publish(
                self._repo, self._branch, self.change.files, author=author, message=header.message,
                parent=self._base, expect=self._base, payer=self._uploading.session.name,
                also=partial(self._uploading.take, taken),
            )  # fmt: skip
        except Conflict as error:
            raise self._moved(error.message) from None
