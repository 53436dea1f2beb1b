"""What is known here of upstream repositories: SQL with a short memory in front. Blocking; threads may share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.engine import Connection

from helios.errors import Conflict, RevisionNotFound
from helios.names import RepoId
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest
from registry.cache import Cache
from registry.catalog import Catalog
from registry.metadata import content, repositories
from registry.metadata import mirror as tables
from registry.metadata.database import Changes
from registry.metadata.mirror import FollowedRef, RefList
from registry.mirror.brief import Brief
from registry.pull.known import stored_regular
from registry.pull.listing import RemoteFile, Snapshot, choose, decode_listing, encode_listing
from registry.pull.names import PREFIXES, kind_in, may_be_tag

MEMORY_S: Final = 2.0
"""How long another registry process on the same metadata may not be seen, in seconds."""
SNAPSHOTS: Final = 64
"""Listings kept decoded."""
REQUESTS: Final = PREFIXES["pullRequests"]


@dataclass(frozen=True, slots=True)
class Mirrored:
    """An upstream commit that is known and whose files are not all here: as a manifest and record of the Hub API.

    An entry's ``sha256`` is empty where it is not known yet (regular files), and so is every ``recipe``.
    """

    snapshot: Snapshot
    files: dict[str, RemoteFile]
    manifest: Manifest
    record: CommitRecord

    @property
    def card(self) -> dict[str, Any]:
        """The head of the README, as the upstream tells it."""
        return dict(self.snapshot.card)

    @property
    def digest(self) -> str:
        """Names the manifest in caches."""
        return f"mirrored {self.snapshot.repo} {self.snapshot.commit}"


class MirrorState:
    """Reads and writes. A write is seen at once by whoever asks this object."""

    def __init__(self, catalog: Catalog, now: Callable[[], float] = time.time) -> None:
        self._catalog, self._database, self.now = catalog, catalog.database, now
        self._restricted: Brief[str, tuple[bool | None]] = Brief(4096)
        self._refs: Brief[tuple[str, str], tuple[FollowedRef | None]] = Brief(4096)
        self._all: Brief[None, set[str]] = Brief(1)
        self._detached: Brief[str, set[str]] = Brief(4096)
        self._snapshots: Cache[tuple[str, str], Mirrored] = Cache(SNAPSHOTS)
        catalog.listen(self._forget)

    def restricted(self, repo: RepoId) -> bool | None:
        """Whether a followed repository is restricted; None: it is not followed."""

        def read() -> tuple[bool | None]:
            with self._database.read() as connection:
                return (tables.restricted(connection, repo),)

        return self._restricted.load(str(repo), read, MEMORY_S)[0]

    def is_own(self, repo: RepoId) -> bool:
        """Whether it is known, without asking anybody, that the repository is not followed. Does not block."""
        return self._restricted.get(str(repo)) == (None,)

    def all_restricted(self) -> set[str]:
        """The canonical names of all restricted repositories."""
        found = self._all.get(None)
        if found is None:
            with self._database.read() as connection:
                found = tables.all_restricted(connection)
            self._all.put(None, found, MEMORY_S)
        return found

    def ref(self, repo: RepoId, ref: str) -> FollowedRef | None:
        def read() -> tuple[FollowedRef | None]:
            with self._database.read() as connection:
                return (tables.find_ref(connection, repo, ref),)

        return self._refs.load((str(repo), ref), read, MEMORY_S)[0]

    def refs(self, repo: RepoId | None = None) -> list[FollowedRef]:
        with self._database.read() as connection:
            return tables.list_refs(connection, repo)

    def detached(self, repo: RepoId) -> set[str]:
        """The refs of a followed repository that are one's own."""

        def read() -> set[str]:
            with self._database.read() as connection:
                return tables.detached(connection, repo)

        return self._detached.load(str(repo), read, MEMORY_S)

    def listed(self, repo: RepoId, requests: bool) -> RefList | None:
        """The upstream's refs as it told them last; ``requests``: those of pull requests alone. None: never asked."""
        with self._database.read() as connection:
            return tables.find_ref_list(connection, repo, "requests" if requests else "refs")

    def learn_refs(self, repo: RepoId, targets: Mapping[str, str], requests: bool) -> None:
        """Keep what the upstream says of its refs, those of pull requests among them or not."""
        with self._database.write(changes=Changes.NOTHING) as connection:
            asked = {ref: commit for ref, commit in targets.items() if ref.startswith(REQUESTS)}
            rest = {ref: commit for ref, commit in targets.items() if ref not in asked}
            tables.put_ref_list(connection, repo, "refs", rest, self.now())
            if requests:
                tables.put_ref_list(connection, repo, "requests", asked, self.now())

    def kind_of(self, repo: RepoId, ref: str) -> str:
        """``tag`` for what is known as one upstream, else ``branch``."""
        with self._database.read() as connection:
            return _kind_of(connection, repo, ref)

    def has_snapshot(self, repo: RepoId, commit: str) -> bool:
        """Whether it is known what the commit holds, be it published or not."""
        with self._database.read() as connection:
            return tables.find_snapshot(connection, repo, commit) is not None

    def snapshot(self, repo: RepoId, commit: str) -> Mirrored | None:
        """What the commit holds, or None when that is not known."""
        try:
            return self._snapshots.get((str(repo), commit), lambda: self._load(repo, commit))
        except RevisionNotFound:
            return None

    def _load(self, repo: RepoId, commit: str) -> Mirrored:
        with self._database.read() as connection:
            found = tables.find_snapshot(connection, repo, commit)
        if found is None:
            raise RevisionNotFound(f"nothing is known of {repo.id}@{commit}")
        return mirrored(decode_listing(found[0]))

    def learn(self, snapshot: Snapshot, restricted: bool, ref: str | None, points_at: str, pending: str | None) -> None:
        """Keep a listing and, with ``ref``, where that points now; in one transaction."""
        repo, now = snapshot.repo, self.now()
        with self._database.write(changes=Changes.NAMES) as connection:
            tables.set_restricted(connection, repo, restricted)
            tables.add_snapshot(connection, repo, snapshot.commit, encode_listing(snapshot), int(now))
            if ref is not None:
                tables.set_ref(connection, repo, ref, commit=points_at, checked=now, pending=pending)
        self._dropped(repo, ref)

    def checked(self, known: FollowedRef, repo: RepoId) -> None:
        """The upstream has said that the ref points where it did."""
        with self._database.write(changes=Changes.NAMES) as connection:
            tables.set_ref(connection, repo, known.ref, commit=known.commit, checked=self.now(), pending=None)
        self._dropped(repo, known.ref)

    def restrict(self, repo: RepoId) -> None:
        """The upstream lets not everybody read the repository any more."""
        with self._database.write(changes=Changes.NAMES) as connection:
            tables.set_restricted(connection, repo, True)
        self._dropped(repo, None)

    def approve(self, repo: RepoId, ref: str, commit: str) -> None:
        """Let a ref move to the commit that waits. Raises RevisionNotFound, or Conflict when another one waits."""
        with self._database.write(changes=Changes.NAMES) as connection:
            known = tables.find_ref(connection, repo, ref)
            if known is None:
                raise RevisionNotFound(f"{repo.id}@{ref} is not followed here")
            if known.pending != commit:
                waits = f"{known.pending} does" if known.pending else "nothing does"
                raise Conflict(f"{commit} does not wait for approval at {repo.id}@{ref}: {waits}")
            tables.set_ref(connection, repo, ref, commit=commit, checked=self.now(), pending=None)
        self._dropped(repo, ref)

    def detach(self, repo: RepoId, ref: str) -> None:
        """Make a ref one's own. Raises RevisionNotFound for one that is not followed."""
        with self._database.write(changes=Changes.NAMES) as connection:
            if tables.find_ref(connection, repo, ref) is None:
                raise RevisionNotFound(f"{repo.id}@{ref} is not followed here")
            tables.detach(connection, repo, ref)
        self._dropped(repo, ref)

    def published(self, repo: RepoId, commit: str, pulled: str | None = None) -> None:
        """The catalog holds the commit, so the refs that follow it point there, as a pull of the ref ``pulled`` says it
        does if it is followed.

        One transaction: a commit that is published late finds that its ref has gone elsewhere, whoever has moved it.
        """
        with self._database.write(changes=Changes.NAMES) as connection:
            if pulled is not None and tables.find_ref(connection, repo, pulled) is not None:
                tables.set_ref(connection, repo, pulled, commit=commit, checked=self.now(), pending=None)
            tables.set_published(connection, repo, commit)
            repository = repositories.find(connection, repo)
            if repository is None or repositories.find_commit(connection, repository, commit) is None:
                return  # removed again since
            for ref in tables.refs_at(connection, repo, commit):
                kind, now = _kind_of(connection, repo, ref), int(self._catalog.now())
                repositories.move_ref(
                    connection, repository, ref, commit, expect=..., author="mirror", now=now, kind=kind, tags_move=True
                )
        self._dropped(repo, pulled)

    def stored(self, repo: RepoId, file: RemoteFile) -> str | None:
        """The sha256 under which the store holds the file, or None when it does not."""
        sha256 = file.sha256 or stored_regular(self._catalog, repo, [file]).get(file.key)
        if sha256 is None or self._catalog.contents.has_blob(self._catalog.domain_of(repo), sha256) is None:
            return None
        return sha256

    def missing(self, snapshot: Snapshot) -> set[str]:
        """Contents of the snapshot that the store does not hold."""
        wanted, _ = choose(snapshot.files)
        known = stored_regular(self._catalog, snapshot.repo, [file for file in wanted if not file.lfs])
        digests = {file.key: file.sha256 or known.get(file.key, "") for file in wanted}
        with self._database.read() as connection:
            held = content.find_blobs(
                connection, self._catalog.domain_of(snapshot.repo), filter(None, digests.values())
            )
        return {key for key, sha256 in digests.items() if sha256 not in held}

    def look_again(self, repo: RepoId, ref: str) -> None:
        """Believe nothing that is remembered of the repository and the ref."""
        self._dropped(repo, ref)

    def _forget(self) -> None:
        """The catalog has changed: a repository may be gone, or a ref be somebody's own now."""
        self._restricted.clear()
        self._all.clear()
        self._refs.clear()
        self._detached.clear()
        self._snapshots.clear()

    def _dropped(self, repo: RepoId, ref: str | None) -> None:
        self._restricted.drop(str(repo))
        self._detached.drop(str(repo))
        self._all.drop(None)
        if ref is not None:
            self._refs.drop((str(repo), ref))


def _kind_of(connection: Connection, repo: RepoId, ref: str) -> str:
    found = tables.find_ref_list(connection, repo, "refs") if may_be_tag(ref) else None
    return "branch" if found is None else kind_in(found.targets, ref)


def mirrored(snapshot: Snapshot) -> Mirrored:
    """The snapshot as the Hub API shows it: what a pull would hold of it."""
    wanted, _ = choose(snapshot.files)
    entries = {file.path: FileEntry(file.sha256 or "", file.size, file.git_oid, "", file.lfs) for file in wanted}
    record = CommitRecord(
        str(snapshot.repo),
        snapshot.commit,
        "",
        snapshot.author,
        snapshot.time or 0,
        f"Pulled from {snapshot.lineage.get('upstream', 'upstream').removesuffix('/' + snapshot.repo.id)}",
        None,
        dict(snapshot.lineage),
    )
    return Mirrored(snapshot, {file.path: file for file in wanted}, Manifest(entries), record)
