"""Getting damaged chunks back: from another copy in the store, from another registry, from the upstream Hub.

Whatever a source sends is believed only if it has the chunk's hash. It goes into a new pack; the damaged object is
never written to, and goes when nothing is left in it. Records are in ``records``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
from blake3 import blake3

from helios.errors import HeliosError, NotFound
from helios.names import RepoId
from heliosfs.store.keys import blob_key, domain_of
from heliosfs.store.manifest import CommitRecord
from heliosfs.store.recipe import Recipe
from registry.catalog import Catalog
from registry.gc.copies import Copies, Copy, read_chunk
from registry.gc.records import Record, RecordSources
from registry.metadata import claims, content, inventory, mirror
from registry.metadata.inventory import Stored
from registry.metadata.moving import Held
from registry.pull.listing import decode_listing
from registry.pull.upstream import Upstream
from registry.transfer.peer import Peer

BATCH: Final = 16
"""Chunks that are got and put at a time: their bytes are in memory meanwhile, 4 MiB each at most."""


class Repairs(msgspec.Struct):
    """How many chunks and records came from where, how many chunks that nobody needs were forgotten, and what could not
    be repaired."""

    replicas: int = 0
    """Whose object is right in another copy, which the store keeps itself."""
    store: int = 0
    """That are in another object, too."""
    peers: int = 0
    upstream: int = 0
    metadata: int = 0
    """Records that were made again from the metadata."""
    records: int = 0
    """How many of all these were records: manifests, recipes, commit records."""
    forgotten: int = 0
    failed: int = 0
    problems: list[str] = []

    def result(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        out: dict[str, Any] = msgspec.to_builtins(self)
        return out


class Repairer:
    """Repairs what ``Verifier`` finds. ``keep_s``: see ``Copies``."""

    def __init__(
        self,
        catalog: Catalog,
        keep_s: float,
        peers: Sequence[Peer],
        upstream: Upstream | None,
        stop: threading.Event,
    ) -> None:
        self._catalog, self._copies = catalog, Copies(catalog, keep_s)
        self._peers, self._upstream, self._stop = peers, upstream, stop
        self._records = RecordSources(catalog, peers, upstream, stop)
        self.done = Repairs()

    def repair(self, stored: Stored, bad: list[Held]) -> None:
        """Give the chunks of an object another place where their bytes are right, as far as that can be done."""
        try:
            users = self._copies.users(stored.key, stored.number)
        except HeliosError as error:
            self._failed(stored.key, len(bad), error.message)
            return
        needed = set().union(*users.values())
        self._forget(stored, {chunk.id for chunk in bad} - needed)
        wanted = [chunk for chunk in bad if chunk.id in needed and not self._healed(chunk)]
        for start in range(0, len(wanted), BATCH):
            batch = [got for chunk in wanted[start : start + BATCH] if (got := self._get(stored.key, chunk, users))]
            if not batch:
                continue
            try:
                users = self._copies.users(stored.key, stored.number)
                found = [Copy(id_, len(data), data) for id_, data, _ in batch]
                self._copies.replace(stored.key, stored.number, users, found)
            except HeliosError as error:
                self._failed(stored.key, len(batch), error.message)
                continue
            for _, _, source in batch:
                setattr(self.done, source, getattr(self.done, source) + 1)

    def repair_record(self, record: Record) -> None:
        """Have a record be right again, as far as that can be done."""
        try:
            if self._records.heal(record):
                source = "replicas"
            else:
                source, data = self._records.find(record)
                self._records.put(record, data)
        except HeliosError as error:
            self._failed(record.key, 1, error.message)
            return
        self.done.records += 1
        setattr(self.done, source, getattr(self.done, source) + 1)

    def _healed(self, chunk: Held) -> bool:
        try:
            found = read_chunk(self._catalog.store.lasting, chunk)
        except HeliosError:  # missing, or short: what the store can't give, others may
            return False
        self.done.replicas += found is not None
        return found is not None

    def _failed(self, key: str, chunks: int, why: str) -> None:
        self.done.failed += chunks
        if len(self.done.problems) < 1000:
            self.done.problems.append(f"{key}: {why}")

    def _forget(self, stored: Stored, ids: set[bytes]) -> None:
        """Make sure that nothing comes to rely on damaged chunks that no blob needs."""
        if not ids:
            return
        with self._catalog.database.write() as connection:
            if claims.claimed(connection, [stored.key]):
                self._failed(stored.key, len(ids), "a push or pull under way relies on it; repair again later")
                return
            inventory.forget_chunks(connection, stored.number, ids)
        self.done.forgotten += len(ids)

    def _get(self, key: str, chunk: Held, users: dict[str, set[bytes]]) -> tuple[bytes, bytes, str] | None:
        """The chunk with its right bytes and the source that had them: a field of ``Repairs``."""
        problems = []
        blobs = [sha256 for sha256, ids in sorted(users.items()) if chunk.id in ids]
        for source, tries in (("store", self._in_store), ("peers", self._at_peers), ("upstream", self._at_upstream)):
            for fetch in tries(key, chunk, blobs):
                try:
                    data = fetch()
                except HeliosError as error:
                    problems.append(error.message)
                    continue
                if blake3(data).digest() == chunk.id:
                    return chunk.id, data, source
                problems.append(f"{source}: other bytes")
        self._failed(key, 1, f"chunk {chunk.id.hex()}: " + ("; ".join(problems) or "no source has it"))
        return None

    def _recipe(self, domain: str, blob: str) -> Recipe:
        with self._catalog.database.read() as connection:
            known = content.find_blob(connection, domain, blob)
        if known is None:
            raise NotFound(f"blob {blob} has gone")
        return self._catalog.contents.recipe(domain, known.recipe)

    def _in_store(self, key: str, chunk: Held, blobs: list[str]) -> Iterator[Callable[[], bytes]]:
        """Other blobs with this chunk that are objects by themselves: the index names one place only."""
        domain = domain_of(key)
        for blob in blobs:
            other = blob_key(domain, blob)
            if other != key:
                yield lambda blob=blob, other=other: self._read(  # type: ignore[misc]
                    other, self._span(domain, blob, chunk)[0], chunk.at.length
                )

    def _read(self, key: str, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self._catalog.store.read_into(key, offset, memoryview(data))
        return bytes(data)

    def _span(self, domain: str, blob: str, chunk: Held) -> tuple[int, int]:
        """Where a blob's bytes are those of the chunk."""
        recipe = self._recipe(domain, blob)
        start = 0
        for id_, length in recipe.chunks():
            if id_ == chunk.id:
                return start, start + length
            start += length
        raise NotFound(f"blob {blob} does not have the chunk {chunk.id.hex()}")

    def _repos(self, domain: str, blob: str) -> list[RepoId]:
        with self._catalog.database.read() as connection:
            found = inventory.holders(connection, domain, blob)
        return [RepoId.from_canonical(name) for name in found]

    def _at_peers(self, key: str, chunk: Held, blobs: list[str]) -> Iterator[Callable[[], bytes]]:
        domain = domain_of(key)
        for peer in self._peers:
            for blob in blobs:
                for repo in self._repos(domain, blob):
                    yield lambda peer=peer, blob=blob, repo=repo: self._from_peer(peer, domain, repo, blob, chunk)  # type: ignore[misc]

    def _from_peer(self, peer: Peer, domain: str, repo: RepoId, blob: str, chunk: Held) -> bytes:
        recipe = self._recipe(domain, blob)
        start, end = self._span(domain, blob, chunk)
        data = peer.read(peer.placed(repo, recipe), range(recipe.locate(start), recipe.locate(end - 1) + 1))
        return bytes(data)

    def _at_upstream(self, key: str, chunk: Held, blobs: list[str]) -> Iterator[Callable[[], bytes]]:
        if self._upstream is None:
            return
        upstream, domain = self._upstream, domain_of(key)
        for blob in blobs:
            for repo, commit, path in self._names(domain, blob):
                yield lambda blob=blob, repo=repo, commit=commit, path=path: upstream.part(  # type: ignore[misc]
                    repo, commit, path, *self._span(domain, blob, chunk), self._stop
                )

    def _names(self, domain: str, blob: str) -> Iterator[tuple[RepoId, str, str]]:
        """Files that are the blob, where the Hub may have them: one of each repository."""
        for repo in self._repos(domain, blob):
            with self._catalog.database.read() as connection:
                found = inventory.commits_of(connection, str(repo))
            for commit, manifest, record in found:
                if "upstream" not in CommitRecord.decode(record).lineage:
                    continue
                try:
                    files = self._catalog.contents.manifest_of(domain, manifest).files
                except HeliosError:  # another commit may name it, too
                    continue
                path = next((path for path, entry in files.items() if entry.sha256 == blob), None)
                if path is not None:
                    yield repo, commit, path
                    break
        with self._catalog.database.read() as connection:
            downloads = mirror.listings_of(connection, blob)
        for repo, key, commit, listing in downloads:
            path = next((file.path for file in decode_listing(listing).files if file.key == key), None)
            if path is not None and self._catalog.domain_of(repo) == domain:
                yield repo, commit, path
