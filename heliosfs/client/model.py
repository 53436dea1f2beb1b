"""One model at one commit: its files, making them local, opening them."""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import trio

from helios.errors import EntryNotFound
from helios.names import RepoId
from heliosfs.blobs import BlobRef
from heliosfs.client.file import File
from heliosfs.client.index import INDEX, find_shards, list_tensors, read_header, read_index
from heliosfs.client.tensors import Tensors
from heliosfs.client.values import FileInfo, FileStatus, Progress, TensorInfo, Warmed
from heliosfs.tree.snapshot import Snapshot
from heliosfs.warming import AT_ONCE, Note, Tally, each, in_loading_order, select, warm

if TYPE_CHECKING:
    from heliosfs.client.store import Store

TOLD_S: Final = 0.1
"""Time between two reports of progress, in seconds."""


class Model:
    """The files of one commit, which never change, whatever its ref does meanwhile. Methods belong to one trio loop."""

    def __init__(self, store: Store, snapshot: Snapshot, revision: str) -> None:
        self._store, self._snapshot = store, snapshot
        self.repo: RepoId = snapshot.repo
        self.commit: str = snapshot.commit
        self.revision = revision
        entries = [(path, snapshot.files[path]) for path in in_loading_order(snapshot.files)]
        self.files: Mapping[str, FileInfo] = MappingProxyType(
            {path: FileInfo(path, entry.size, entry.sha256, entry.executable) for path, entry in entries}
        )
        """By path, in loading order: weights come last, by name."""

    def __repr__(self) -> str:
        return f"<Model {self.repo.id}@{self.commit}>"

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(info.size for info in self.files.values())

    async def open(self, path: str, *, deadline_s: float | None = None) -> File:
        """Open a file; ``async with`` closes it. Nothing is fetched for it, but a weight file starts to be filled.

        Raises EntryNotFound; DeadlineExceeded, Unavailable, Closed.
        """
        return await self._store.open_file(self.want(path), self.info(path), deadline_s)

    async def warm(
        self,
        paths: Iterable[str] | None = None,
        *,
        progress: Progress | None = None,
        deadline_s: float | None = None,
    ) -> Warmed:
        """Make the model, or the files and patterns in ``paths``, local: whole, verified, and so for later processes.

        ``progress`` is called now and then, on the event loop. The first error ends it; what came until then stays.
        Raises EntryNotFound for a path or pattern that names nothing, what ``File.read_into`` raises, and NoSpace.
        """
        infos = self._selected(paths)
        return await self._store.call(f"warming {self.repo.id}", deadline_s, partial(self._warm, infos, progress))

    async def status(self) -> list[FileStatus]:
        """How much of each file is local."""
        return await self._store.call("the status", None, self._status)

    @asynccontextmanager
    async def tensors(
        self, paths: Iterable[str] | None = None, *, folder: str = "", deadline_s: float | None = None
    ) -> AsyncIterator[Tensors]:
        """Open the model's safetensors files and read their headers.

        Which files: ``paths``, or else those that ``model.safetensors.index.json`` names, or else every safetensors
        file; the last two of one ``folder`` (the top one by default). Their fill starts, in loading order.

        Raises EntryNotFound where there is none, InvalidInput for a file or an index that contradicts itself, and what
        ``File.read_into`` raises.
        """
        async with AsyncExitStack() as stack:
            opened = partial(self._open_tensors, stack, paths, folder)
            yield Tensors(await self._store.call("opening the tensors", deadline_s, opened))

    def info(self, path: str) -> FileInfo:
        """One file. Raises EntryNotFound."""
        found = self.files.get(path)
        if found is None:
            close = difflib.get_close_matches(path, self.files, 1)
            hint = f"Did you mean {close[0]}?" if close else "Its files are in model.files."
            raise EntryNotFound(f"{self.repo.id} at {self.commit} has no file {path!r}", hint=hint)
        return found

    def want(self, path: str) -> BlobRef:
        """A file as the blob store asks for it. Raises EntryNotFound."""
        info = self.info(path)
        return BlobRef(self.repo, self.commit, path, info.sha256, info.size, self._snapshot.files[path].recipe)

    # --- inside ---

    def _selected(self, paths: Iterable[str] | None) -> list[FileInfo]:
        if paths is None:
            return list(self.files.values())
        if isinstance(paths, str):
            raise TypeError("paths is a list of paths and patterns, not one text")
        chosen = select(self.files, paths, self.info)
        return [info for path, info in self.files.items() if path in chosen]

    async def _warm(self, infos: list[FileInfo], progress: Progress | None) -> Warmed:
        start = trio.current_time()
        held = {info.path: await self._store.held(self.want(info.path)) for info in infos}
        tally = Tally(infos)

        def announce(large: Sequence[FileInfo]) -> None:
            if self._store.cache.mountpoint is None:  # a mount sees to it itself
                missing = (info.path for info in large if not held[info.path].complete)
                self._store.cache.store.prefetch(self.want(path) for path in missing)

        async with trio.open_nursery() as teller:
            if progress is not None:
                teller.start_soon(_tell, tally, progress)
            await warm(tally, self._fetch, announce)
            teller.cancel_scope.cancel()
        if progress is not None:
            progress(tally.now())
        found = sum(status.local_bytes for status in held.values())
        return Warmed(len(infos), sum(info.size for info in infos), found, trio.current_time() - start)

    async def _fetch(self, info: FileInfo, note: Note) -> bool:
        async with await self.open(info.path) as file:
            await file.fetch(progress=note)
        return True

    async def _status(self) -> list[FileStatus]:
        return [await self._store.held(self.want(path)) for path in self.files]

    async def _open_tensors(
        self, stack: AsyncExitStack, paths: Iterable[str] | None, folder: str
    ) -> tuple[dict[str, TensorInfo], dict[str, File]]:
        wanted: dict[str, str] = {}
        if paths is not None:
            shards = [info.path for info in self._selected(paths)]
        else:
            index = f"{folder}/{INDEX}" if folder else INDEX
            if index in self.files:
                async with await self.open(index) as file:
                    wanted = read_index(bytes(await file.read()), index, self.files)
            shards = find_shards(wanted, folder, self.files, repr(self))
        files: dict[str, File] = {}
        for path in shards:
            file = await self.open(path)
            stack.push_async_exit(file)
            files[path] = file
        headers: dict[str, list[TensorInfo]] = {path: [] for path in shards}

        async def head(path: str) -> None:
            headers[path] = await read_header(files[path])

        await each(shards, AT_ONCE, head)
        return list_tensors(headers, wanted), files


async def _tell(tally: Tally[FileInfo], progress: Progress) -> None:
    while True:
        progress(tally.now())
        await trio.sleep(TOLD_S)
