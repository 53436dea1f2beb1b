"""The catalog: which repositories there are and what their revisions are; what they hold is told by its ``contents``.

Every method blocks (SQL, small reads of the store); routes call them with ``asyncio.to_thread``. A write is on disk
when its method returns, and the hot caches no longer hold what it changed. Records are in the store as objects and in
SQL, objects first: a crash between the two leaves an object that nobody names, never a name without its object.
"""

from __future__ import annotations

import logging
import threading
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sqlalchemy.engine import Connection

from helios.errors import HeliosError, RepoNotFound, Retired, RevisionNotFound
from helios.names import RepoId, check_ref, check_revision
from heliosfs.store.manifest import CommitRecord
from heliosfs.store.objects import ObjectStore
from registry.admission.admission import Admission
from registry.cache import Cache
from registry.contents import Contents
from registry.domains import Domains
from registry.member import Member
from registry.metadata import content, mirror, notices, pins, quarantine, removals, repositories
from registry.metadata.content import SqlChunkIndex
from registry.metadata.database import Changes, Database
from registry.metadata.repositories import Expected
from registry.priorities import Priorities
from registry.publisher import Publisher
from registry.quotas.quotas import Quotas
from registry.removal import finish_removals

log = logging.getLogger("helios.registry.catalog")


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """One repository: its refs, the bytes of its distinct blobs, when a ref last moved (unix seconds), and which refs
    are tags or aliases."""

    repo: RepoId
    refs: dict[str, str]
    bytes: int
    updated: int
    kinds: dict[str, str]


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a revision names: a commit (40 hex) and its manifest's digest (64 hex), in the repository's domain."""

    commit: str
    manifest_digest: str
    domain: str
    notice: str | None = None
    """What whoever uses it should know: it is deprecated."""


class Catalog:
    """Names of one registry, and its other parts: ``contents`` reads what they hold, ``publisher`` adds to it."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        *,
        domains: Domains | None = None,
        lease_s: float = 300.0,
        admission: Admission | None = None,
        member: Member | None = None,
        quotas: Quotas | None = None,
        now: Callable[[], float] = clock.time,
    ) -> None:
        self.database, self.store, self.lease_s = database, store, lease_s
        self.domains = domains or Domains()
        self.index = SqlChunkIndex(database)
        self.member = member or Member(database)
        self.admission = admission or Admission()
        self.quotas, self.priorities = quotas or Quotas(database), Priorities(database)
        self.now = now
        self._listeners: list[Callable[[], None]] = []
        self._confirming = threading.Lock()
        self._generations: dict[str, int] = {}
        self._resolved: Cache[tuple[str, str], Resolved] = Cache(4096)
        self.contents = Contents(database, store, lease_s, self.admission, self.resolve)
        rules = self.admission, self.quotas
        self.publisher = Publisher(database, store, self.domain_of, self.member, *rules, self.contents, now)
        database.watch(self.forget)
        self.listen(self.priorities.forget)

    def check(self) -> None:
        """Raises Unavailable, or another error, unless the metadata answers and the store is there."""
        self.count()
        self.store.check()

    def check_domains(self) -> None:
        """Raise UsageError where a repository lies in another domain than the settings say."""
        with self.database.read() as connection:
            lies = repositories.domains_of(connection)
        self.domains.check(lies)

    def stored_domains(self) -> list[str]:
        """The domains in which something may be stored, whether or not a tenant has them still."""
        with self.database.read() as connection:
            return sorted({*self.domains.names, *content.domains(connection)})

    def domain_of(self, repo: RepoId) -> str:
        """The domain in which what is stored for a repository belongs, be there such a repository yet or not."""
        return self.domains.of(repo)

    def count(self) -> int:
        """How many repositories there are."""
        with self.database.read() as connection:
            return repositories.count(connection)

    # --- names ---

    def repos(self, kind: str | None = None) -> list[RepoInfo]:
        """All repositories, sorted by their canonical text."""
        with self.database.read() as connection:
            found = repositories.listing(connection, kind)
            sizes = repositories.sizes(connection)
        return [
            RepoInfo(RepoId.from_canonical(r.name), refs, sizes.get(r.id, 0), r.updated, kinds)
            for r, refs, kinds in found
        ]

    def refs(self, repo: RepoId) -> dict[str, str]:
        """Ref name -> commit, sorted. Raises RepoNotFound."""
        with self.database.read() as connection:
            return repositories.refs_of(connection, repositories.require(connection, repo))

    def ref_kinds(self, repo: RepoId) -> dict[str, str]:
        """Which refs are tags or aliases; the others are branches. Raises RepoNotFound."""
        with self.database.read() as connection:
            return repositories.kinds_of(connection, repositories.require(connection, repo))

    def ref_history(self, repo: RepoId, ref: str | None, limit: int) -> list[repositories.Move]:
        """Who moved which ref when, newest first; also of refs and repositories that are gone."""
        with self.database.read() as connection:
            return repositories.moves_of(connection, repo, ref, limit)

    def resolve(self, repo: RepoId, rev: str) -> Resolved:
        """The commit that a ref or a commit id names. Raises RepoNotFound or RevisionNotFound."""
        return self._resolved.get((str(repo), check_revision(rev)), lambda: self._resolve(repo, rev))

    def _resolve(self, repo: RepoId, rev: str) -> Resolved:
        with self.database.read(single=True) as connection:
            found = repositories.resolve(connection, repo, rev)
        if found is not None:
            commit, manifest, domain, noticed = found
            resolved = Resolved(commit, manifest, domain)
            return self._noticed(repo, resolved) if noticed else resolved
        with self.database.read() as connection:  # what is missing?
            repository = repositories.require(connection, repo)
            known = ", ".join(list(repositories.refs_of(connection, repository))[:20])
            raise RevisionNotFound(f"{repo.id} has no revision {rev!r}; its refs: {known or 'none'}")

    def _noticed(self, repo: RepoId, resolved: Resolved) -> Resolved:
        with self.database.read() as connection:
            told = notices.of(connection, repositories.require(connection, repo), resolved.commit)
        texts = [each.text(f"{repo.id}{'@' + each.commit if each.commit else ''}") for each in told]
        for each, text in zip(told, texts, strict=True):
            if each.state == "retired":
                raise Retired(text)
        return replace(resolved, notice="; ".join(texts) or None)

    def notice_now(self, repo: RepoId, rev: str | None) -> str | None:
        """The notice on a revision that was resolved a moment ago, for clients (``topic; message``). Never waits."""
        resolved = self.resolved_now(repo, rev or "main")
        return None if resolved is None or resolved.notice is None else f"deprecated; {resolved.notice}"

    def holds(self, repo: RepoId, rev: str) -> bool:
        """Whether the commit, or what the ref names, is here."""
        try:
            self.resolve(repo, rev)
        except (RepoNotFound, RevisionNotFound):
            return False
        return True

    def notices_on(self, repo: RepoId) -> list[notices.Notice]:
        """What is deprecated or retired of a repository."""
        with self.database.read() as connection:
            return notices.of(connection, repositories.require(connection, repo))

    def put_notice(self, repo: RepoId, notice: notices.Notice) -> None:
        """Deprecate or retire a repository or a commit; ``notice.time`` is set here."""
        with self.database.write(changes=Changes.NAMES) as connection:
            repository = repositories.require(connection, repo)
            if notice.commit:
                repositories.require_commit(connection, repository, notice.commit)
            notices.put(connection, repository, replace(notice, time=int(self.now())))
        log.warning("put a notice up", extra={"repo": str(repo), "commit": notice.commit, "state": notice.state})

    def heed(self, repo: RepoId, told: Sequence[notices.Notice], source: str, *, complete: bool) -> notices.Heeded:
        """Do as another registry's notices say, as far as they count here (``notices.heed``); of what is here."""
        for notice in told:
            notices.check(notice)

        def decide(connection: Connection, repository: repositories.Repository) -> notices.Heeded:
            held = repositories.held_of(connection, repository, (n.commit for n in told)) | {notices.WHOLE}
            here = notices.of(connection, repository)
            return notices.heed(here, [n for n in told if n.commit in held], source, complete=complete)

        with self.database.read() as connection:
            found = repositories.find(connection, repo)
            decided = notices.Heeded() if found is None else decide(connection, found)
        if not decided.changes:
            return decided
        with self.database.write(changes=Changes.NAMES) as connection:
            repository = repositories.require(connection, repo)
            decided = decide(connection, repository)
            for commit in decided.down:
                notices.remove(connection, repository, commit)
            for notice in decided.up:
                notices.put(connection, repository, notice)
        log.warning("heeded notices", extra={"repo": str(repo), "of": source, "changes": decided.changes})
        return decided

    def remove_notice(self, repo: RepoId, commit: str) -> None:
        """Take a notice down. Raises NotFound where there is none, and Conflict for one that would come back."""
        with self.database.write(changes=Changes.NAMES) as connection:
            notices.take_down(connection, repositories.require(connection, repo), commit)

    def resolved_now(self, repo: RepoId, rev: str) -> Resolved | None:
        """What a revision names if it is in memory. Does not block: for the event loop."""
        return self._resolved.peek((str(repo), rev))

    def commit_record(self, repo: RepoId, commit: str) -> CommitRecord:
        """Who published a commit, and when."""
        with self.database.read() as connection:
            repository = repositories.require(connection, repo)
            return CommitRecord.decode(repositories.require_commit(connection, repository, commit).record)

    def heads(self, repo: RepoId) -> list[CommitRecord]:
        """The records of the commits that refs point at; of all commits where there is no ref. Raises RepoNotFound."""
        with self.database.read() as connection:
            repository = repositories.require(connection, repo)
            commits = set(repositories.refs_of(connection, repository).values())
            commits = commits or {commit for commit, _ in repositories.commits_of(connection, repository)}
            found = [repositories.require_commit(connection, repository, commit) for commit in sorted(commits)]
            return [CommitRecord.decode(commit.record) for commit in found]

    def history(self, repo: RepoId, rev: str, limit: int = 50) -> list[CommitRecord]:
        """At most ``limit`` commit records from a revision back along the parents, newest first."""
        commit: str | None = self.resolve(repo, rev).commit
        out: list[CommitRecord] = []
        with self.database.read() as connection:
            repository = repositories.require(connection, repo)
            while commit is not None and len(out) < limit:
                found = repositories.find_commit(connection, repository, commit)
                if found is None:
                    break  # a parent that the Hub knows and this registry does not
                out.append(CommitRecord.decode(found.record))
                commit = found.parent
        return out

    # --- writes ---

    def set_ref(
        self,
        repo: RepoId,
        ref: str,
        commit: str,
        expect: Expected = ...,
        *,
        author: str = "",
        kind: str = "branch",
        followed: bool = False,
    ) -> bool:
        """Point a ref at a commit of the repository by compare-and-swap; returns whether it moved. See ``move_ref``.

        One that follows an upstream is moved with ``followed`` alone: because the upstream has moved it. Else Conflict.
        """
        check_ref(ref)
        with self.database.write(changes=Changes.NAMES) as connection:
            if not followed:
                mirror.refuse_followed(connection, repo, ref)
            repository = repositories.require(connection, repo)
            repositories.require_commit(connection, repository, commit)
            now = int(self.now())
            return repositories.move_ref(
                connection, repository, ref, commit, expect=expect, author=author, now=now, kind=kind,
                tags_move=followed,
            )  # fmt: skip

    def follow_ref(
        self, repo: RepoId, ref: str, commit: str, expect: Expected = ..., *, author: str, kind: str
    ) -> None:
        """As ``set_ref``, for a ref of another registry: one that is here becomes of its kind; but tags stay tags."""
        check_ref(ref)
        with self.database.write(changes=Changes.NAMES) as connection:
            mirror.refuse_followed(connection, repo, ref)
            repository = repositories.require(connection, repo)
            repositories.require_commit(connection, repository, commit)
            now = int(self.now())
            repositories.move_ref(connection, repository, ref, commit, expect=expect, author=author, now=now, kind=kind)
            repositories.set_kind(connection, repository, ref, kind)

    def delete_ref(
        self, repo: RepoId, ref: str, expect: Expected = ..., *, author: str = "", followed: bool = False
    ) -> None:
        """Remove a ref by compare-and-swap. Its commits stay, and can be asked for by their id. See ``move_ref``.

        ``followed``: one that follows an upstream, too, which is then forgotten until somebody asks for it again; else
        Conflict for such a one.
        """
        check_ref(ref)
        with self.database.write(changes=Changes.NAMES) as connection:
            if not followed:
                mirror.refuse_followed(connection, repo, ref)
            known = mirror.find_ref(connection, repo, ref)
            forgotten = mirror.forget(connection, repo, ref)
            repository = repositories.find(connection, repo)
            if forgotten and (repository is None or repositories.ref_target(connection, repository, ref) is None):
                if known is not None and expect not in (..., known.commit):
                    raise repositories.moved(str(repo), ref, known.commit, expect)
                return  # nothing of it was published yet
            repository = repositories.require(connection, repo)
            now = int(self.now())
            repositories.move_ref(connection, repository, ref, None, expect=expect, author=author, now=now)

    def delete_repo(self, repo: RepoId, *, author: str = "") -> None:
        """Remove a repository with its refs and commits. Its content stays in the store until it is collected."""
        with self.database.write() as connection:
            followed = mirror.restricted(connection, repo) is not None
            until = pins.clock(connection, self.database.kind.now) + self.lease_s
            mirror.drop_downloads(connection, repo, self.domain_of(repo), (), until)
            mirror.forget(connection, repo)
            if not followed or repositories.find(connection, repo) is not None:
                repository = repositories.require(connection, repo)
                removals.begin(connection, repository, author=author, now=int(self.now()))
        log.info("removed", extra={"repo": str(repo)})
        try:
            finish_removals(self.database, self.lease_s)
        except HeliosError as error:  # nobody sees it any more, and the rest goes later
            log.warning("rows of what was removed are left for a while", extra={"error": error.message})

    # --- quarantine ---

    def kept(self, repo: RepoId | None = None, *, released: bool = False) -> list[quarantine.Kept]:
        """Files that are kept back, in a repository or in all; with ``released`` also those that were let go."""
        with self.database.read() as connection:
            repository = None if repo is None else repositories.require(connection, repo)
            return quarantine.listing(connection, repository, released=released)

    def release(self, repo: RepoId, sha256: str, by: str) -> None:
        """Let a file go that is kept back. Raises RepoNotFound or NotFound."""
        with self.database.write() as connection:
            repository = repositories.require(connection, repo)
            quarantine.release(connection, repository, sha256, by, int(self.now()))
        log.warning("released from quarantine", extra={"repo": str(repo), "blob": sha256, "by": by})

    def signer(self, repo: RepoId, commit: str) -> str | None:
        """Who signed a commit; None where nobody did, or it was not asked for."""
        with self.database.read() as connection:
            return quarantine.signer(connection, repositories.require(connection, repo), commit)

    # --- what is in memory ---

    def forget(self, changes: Changes = Changes.ALL) -> None:
        """Drop what is in memory and may have changed. Called for every write before it is acknowledged."""
        self._resolved.clear()
        self.contents.forget(changes)
        for listener in self._listeners:
            listener()

    def listen(self, forget: Callable[[], None]) -> None:
        """Call ``forget`` whenever something in memory may have changed."""
        self._listeners.append(forget)

    def confirm(self) -> None:
        """Make sure that what is in memory is as new as the last write that was acknowledged, by any process."""
        if not self.database.kind.shared:
            return  # every write was ours, and ``forget`` has seen it
        found = self.database.generations()
        with self._confirming:
            # Answers may come in another order than questions were asked: an older one says nothing new.
            newer = {name for name, value in found.items() if value > self._generations.get(name, -1)}
            for name in newer:
                self._generations[name] = found[name]
            if newer:
                self.forget(Changes.ALL if "content" in newer else Changes.NAMES)
