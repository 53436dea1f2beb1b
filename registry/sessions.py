"""Sessions: what a push or a pull stores before anything of it is visible, and cleaning up when it never becomes so.

A session *claims* every object that it writes or relies on, in SQL, before it does (registry/metadata/claims.py says
why nothing that is needed is ever deleted then). When it ends without a commit, blobs that no commit holds and no other
session claims are forgotten, and the objects nobody needs then are deleted. A publish checks in its own transaction
that every blob's row is there, so a commit never names a missing blob.

Several processes may share the database and the store. What a killed one left is cleaned up by the others when its
lease is over (registry/member.py), or by the next start where only one process uses the database.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from helios.errors import HeliosError, IntegrityError
from helios.names import RepoId
from heliosfs.store.batch import Chunk
from heliosfs.store.keys import KINDS, PUBLIC, commit_key, manifest_key
from heliosfs.store.manifest import FileEntry
from heliosfs.store.objects import ObjectStore
from heliosfs.store.recipe import Recipe
from registry.burial import bury
from registry.catalog import Catalog
from registry.claiming import ClaimingIndex, ClaimingStore, Claims
from registry.ingest import IngestedBlob, Source
from registry.ingest.chunks import store_chunks
from registry.ingest.ingest import Ingest
from registry.metadata import claims, content, pins, pushes, repositories, sharing
from registry.metadata.database import Changes
from registry.metadata.tables import settings
from registry.removal import forget_leftovers

log = logging.getLogger("helios.registry.sessions")

OWNER: Final = f"{PUBLIC}/registry/owner"
"""Says which registry a store belongs to, whatever domains it has."""


class Session:
    """One push or pull: ingests files and claims what they need until it is closed. Threads may share it.

    It stores into one domain and knows of nothing in others.
    """

    def __init__(self, sessions: Sessions, name: str, domain: str) -> None:
        self.name, self.domain = name, domain
        self.database = sessions.catalog.database
        self._sessions = sessions
        made = Claims(sessions.catalog.database, name)
        self.index = ClaimingIndex(sessions.catalog.database, made)
        self._store = ClaimingStore(sessions.store, made)
        self._ingest = sessions.ingest.on(self._store, self.index, domain)

    def ingest(
        self,
        path: str,
        size: int,
        source: Source,
        *,
        executable: bool = False,
        lfs: bool | None = None,
        expect_sha256: str | None = None,
        expect_git_oid: str | None = None,
        recipe: Recipe | None = None,
        stored: bool = False,
        rescue: bool = False,
    ) -> IngestedBlob:
        """Store a file's bytes; see ``Ingest.ingest``. Nothing is visible until a publish names the blob.

        Raises Unavailable when the session was ended meanwhile.
        """
        with self._sessions.catalog.database.read() as connection:
            claims.require(connection, self.name)
        return self._ingest.ingest(
            path,
            size,
            source,
            executable=executable,
            lfs=lfs,
            expect_sha256=expect_sha256,
            expect_git_oid=expect_git_oid,
            recipe=recipe,
            stored=stored,
            rescue=self.index if rescue else None,
        )

    def store_chunks(self, where: str, chunks: Sequence[Chunk], source: Source, *, noted: bool) -> int:
        """Store chunks of a file that will come; they stay while the session does. See ``store_chunks``.

        With ``noted`` the session remembers that its owner has them all (registry/possession.py).
        """
        with self._sessions.catalog.database.read() as connection:
            claims.require(connection, self.name)
        new = store_chunks(self._store, self.index, self.domain, self._ingest.pool, chunks, source, where)
        if noted:
            with self._sessions.catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
                claims.claim(connection, self.name, (claims.of_chunk(self.domain, id_) for id_, _ in chunks))
        return new

    def reuse(self, sha256: str) -> FileEntry | None:
        """The manifest line of a blob that the domain has, claimed from here on; None when it has not."""
        known = self.index.blob(self.domain, sha256)
        return None if known is None else known.entry()

    def close(self) -> None:
        """End the session, after its publish or instead of it. Claims are released; calling it again does nothing."""
        self._sessions.end([self.name])

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Sessions:
    """Opens sessions and cleans up after them."""

    def __init__(
        self,
        catalog: Catalog,
        store: ObjectStore,
        ingest: Ingest,
        keep: Callable[[], set[tuple[str, str]]] = set,
        *,
        grace_s: float = 0.0,
    ) -> None:
        """``keep`` names blobs, by domain and sha256, that stay although no commit holds them: those of pulls that will
        be resumed.

        This process claims them, in a session of its own, when the session ends that stored them, and at its start.
        Such a blob may have been served: when it is kept no more, what it lies in stays for ``grace_s`` seconds after
        the lease of whoever was told where that is.
        """
        self.catalog, self.store, self.ingest, self._keep = catalog, store, ingest, keep
        self._grace_s = grace_s
        self._began = False
        self._keeping = f"kept-{catalog.member.id}"
        self.work = threading.Event()
        """Set when ``clean`` has something to do."""

    def open(self, repo: RepoId, *, uploads: bool = False) -> Session:
        """Start a session to store for a repository, which this process holds; it must be closed.

        One of uploads is noted as such and goes on without the process: any of the others may end it.
        """
        name, member, database = secrets.token_hex(16), self.catalog.member, self.catalog.database
        with database.write(lazy=True, changes=Changes.NOTHING) as connection:
            if not uploads:
                member.begin(connection, name)
            else:
                member.present(connection)
                claims.begin(connection, name, None)
                now = pins.clock(connection, database.kind.now)
                sharing.begin_upload(connection, name, str(repo), member.id, now)
        return self.attach(name, repo)

    def attach(self, name: str, repo: RepoId) -> Session:
        """A session that somebody started for a repository, also another process."""
        return Session(self, name, self.catalog.domain_of(repo))

    def end(self, names: list[str]) -> None:
        """End sessions. One whose end can't be recorded ends with its process' lease."""
        self.end_those(lambda _connection: names)

    def end_those(self, choose: Callable[[Connection], list[str]]) -> None:
        """End the sessions that ``choose`` names in the transaction in which they end."""
        try:
            with self.catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
                self._claim_kept(connection)
                held = claims.end(connection, choose(connection))
                unneeded = content.any_unneeded(connection, held)
                if unneeded or claims.some_doomed(connection, self.catalog.database.kind.now, 1):
                    self.work.set()
        except HeliosError as error:  # a full disk, say: whoever ends a session has its result already
            log.warning("a session's end could not be recorded; it is cleaned up later", extra={"error": str(error)})
            self.work.set()

    def clean(self) -> int:
        """Delete what ended sessions left; returns how many objects went. Nobody waits for it."""
        if not self.work.is_set():
            return 0
        self.work.clear()
        try:
            return self._clean()
        except BaseException:
            self.work.set()
            raise

    def release(self, blobs: set[tuple[str, str]]) -> None:
        """Say that somebody need not have these blobs, by domain and sha256, kept any more; others may still."""
        if blobs:
            self.keep_needed()

    def keep_needed(self) -> None:
        """Keep what pulls need now, and no more: that of a repository that was removed goes."""
        with self.catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
            self._claim_kept(connection)

    def _claim_kept(self, connection: Connection) -> None:
        """Claim what is kept now, and nothing else."""
        kept = {claims.of_blob(domain, sha256) for domain, sha256 in self._keep()}
        given_up = claims.claims_of(connection, self._keeping) - kept
        if given_up:
            now = pins.clock(connection, self.catalog.database.kind.now)
            content.outlast(connection, given_up, now + self.catalog.lease_s + self._grace_s)
            claims.release(connection, self._keeping, given_up)
            if content.any_unneeded(connection, given_up):
                self.work.set()
        if kept:
            if not claims.is_under_way(connection, self._keeping):
                self.catalog.member.begin(connection, self._keeping)
            claims.claim(connection, self._keeping, kept)

    def recover(self) -> int:
        """Clean up after processes that died; returns how many objects went.

        Called at start and from time to time. Where processes don't share the database, nobody else is at work, and
        pushes end with the process that took them.
        """
        database = self.catalog.database
        kept = {claims.of_blob(domain, sha256) for domain, sha256 in self._keep()}
        with database.read() as connection:
            claimed = claims.claims_of(connection, self._keeping)
        if kept != claimed:  # other processes, too, store what is to be kept, and say that something need not be
            with database.write(lazy=True, changes=Changes.NOTHING) as connection:
                self._claim_kept(connection)
        if not self._began and not database.kind.shared:  # nobody is deleting anything: who was has been killed
            with database.write(lazy=True, changes=Changes.NOTHING) as connection:
                claims.forget_removers(connection)
        self._began = True
        ended = self.catalog.member.bury_dead()
        with database.read() as connection:
            left = claims.unheld(connection)
            if not database.kind.shared:
                left += pushes.sessions(connection) + sharing.upload_sessions(connection)
            waiting = bool(claims.some_doomed(connection, database.kind.now, 1))
        count = 0
        if left:
            with database.write(changes=Changes.NOTHING) as connection:
                unheld = claims.unheld(connection)
                claims.end(connection, left)
            if unheld:  # their registry noted no claims, so only a look at everything tells what it left
                count += self._sweep()
        if ended or left or waiting:
            count += self._clean()
        if ended or left:
            log.warning(
                "cleaned up after a registry that was killed", extra={"sessions": ended + len(left), "objects": count}
            )
        return count

    def _clean(self) -> int:
        database = self.catalog.database
        with database.read() as connection:
            unneeded = content.any_unneeded(connection)
        if unneeded:
            forget_leftovers(database)
        return bury(database, self.store)

    def _sweep(self) -> int:
        """Doom objects that no row names; returns how many there are."""
        database = self.catalog.database
        stored = [
            info.key
            for domain in self.catalog.stored_domains()
            for kind in KINDS
            for info in self.store.list(f"{domain}/{kind}/")
        ]
        with database.write(changes=Changes.NOTHING) as connection:
            named = content.object_keys(connection)
            for domain, name, commit, manifest in repositories.all_commits(connection):
                named |= {commit_key(domain, name, commit), manifest_key(domain, manifest)}
            claims.doom(connection, set(stored) - named)
        return bury(database, self.store)


def own_store(catalog: Catalog, home: str) -> None:
    """Make the store this registry's, or raise IntegrityError when it is another one's.

    A registry is its metadata: processes that share it share the store. Two registries on one store would delete each
    other's unfinished objects.
    """
    with catalog.database.write(changes=Changes.NOTHING) as connection:
        owner = connection.scalar(sa.select(settings.c.value).where(settings.c.name == "owner"))
        if owner is None:
            owner = json.dumps({"registry": secrets.token_hex(16), "home": home})
            connection.execute(settings.insert().values(name="owner", value=owner))
    try:
        catalog.store.put_bytes(OWNER, owner.encode())
    except IntegrityError:
        raise IntegrityError(
            f"the object store ({catalog.store.describe()}) belongs to another registry",
            hint="Give each registry a store of its own (registry.store), or use the metadata that it was made with "
            "(registry.database, HELIOS_HOME).",
        ) from None
