"""A mirror whose upstream is a table and whose threads are the test's: what it does is a sequence of steps.

The registry's own code asks, downloads, completes, publishes and tidies up. Only what would make the order of steps a
matter of chance is replaced: a download is there at once, and pulls wait in a queue until they are let go on.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from blake3 import blake3

from helios.config import MirrorRule, RegistrySettings
from helios.errors import Conflict
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from heliosfs.store.manifest import FileEntry, git_blob_oid, lfs_pointer
from heliosfs.store.recipe import Recipe
from registry.catalog import Catalog
from registry.ingest import Source
from registry.mirror.asking import Caller
from registry.mirror.mirror import Mirror
from registry.mirror.policy import Step
from registry.mirror.state import Mirrored
from registry.pull.downloads import Downloads
from registry.pull.flights import Flights
from registry.pull.listing import RemoteFile, Snapshot
from registry.pull.pull import Puller
from registry.pull.pulls import Pull, Pulls
from registry.pull.setup import Pulling
from registry.pull.spool import Spool
from registry.sessions import Sessions
from registry.threads import Threads

T = TypeVar("T")
NOBODY = Caller(None)


def whole(data: bytes) -> Recipe:
    """The recipe of content that is one chunk."""
    return Recipe.build(hashlib.sha256(data).hexdigest(), [(blake3(data).digest(), len(data))])


@dataclass
class Elsewhere:
    """The upstream: where refs point, what commits hold."""

    endpoint: str = "http://upstream.test"
    offline: bool = False
    has_token: bool = False
    refs: dict[tuple[RepoId, str], str] = field(default_factory=dict)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    bytes: dict[str, bytes] = field(default_factory=dict)
    """By ``RemoteFile.key``."""

    def push(self, repo: RepoId, ref: str, files: Sequence[tuple[bytes, bool]]) -> str:
        """Point a ref at a commit with these files, each with whether it is one of the Large File Storage."""
        listed = []
        for number, (data, lfs) in enumerate(files):
            sha256 = hashlib.sha256(data).hexdigest() if lfs else None
            oid = git_blob_oid(data if sha256 is None else lfs_pointer(sha256, len(data)))
            listed.append(RemoteFile(f"{number}.bin", len(data), oid, sha256))
            self.bytes[listed[-1].key] = data
        name = " ".join([str(repo), *(file.key for file in listed)])
        commit = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        self.snapshots[commit] = Snapshot(repo, commit, tuple(listed), "them", 1, {"upstream": self.lineage(repo)})
        self.refs[repo, ref] = commit
        return commit

    def lineage(self, repo: RepoId) -> str:
        return f"{self.endpoint}/{repo.id}"

    def snapshot(self, repo: RepoId, revision: str, *_: object, **__: object) -> Snapshot:
        return self.snapshots[self.refs.get((repo, revision), revision)]

    def commit_of(self, repo: RepoId, revision: str, *_: object, **__: object) -> tuple[str, bool]:
        return self.refs[repo, revision], False

    def ask(self, repo: RepoId, call: str, kind: type[T], *_: object, **__: object) -> tuple[T, None]:
        """The refs, all of them branches."""
        assert call.startswith("/refs")
        listed = [
            {"ref": f"refs/heads/{ref}", "targetCommit": at} for (its, ref), at in self.refs.items() if its == repo
        ]
        return msgspec.convert({"branches": listed}, kind), None


@dataclass
class _Flight:
    """One whose bytes are here already."""

    repo: RepoId
    file: RemoteFile
    data: bytes
    entry: FileEntry | None = None
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Nothing ends it."""

    def run(self, ingest: Callable[[Source], FileEntry], stored: Callable[[FileEntry], None]) -> None:
        entry = ingest(io.BytesIO(self.data))
        stored(entry)
        self.entry = entry

    def wait(self, _stop: threading.Event, _advance: Callable[[int, int], None]) -> FileEntry:
        assert self.entry is not None
        return self.entry


class _FlightsAtOnce(Flights):
    """Downloads in the caller's thread, cut where the test says."""

    def __init__(self, upstream: Any, sessions: Sessions, spool: Spool, recipe: Callable[[bytes], Recipe]) -> None:
        super().__init__(
            upstream, sessions.catalog.database, sessions, spool, connections=1, finish=True, free_bytes=dict
        )
        self._upstream, self._recipe = upstream, recipe

    def join(self, repo: RepoId, commit: str, file: RemoteFile, *_: Any) -> Any:
        flight = _Flight(repo, file, self._upstream.bytes[file.key])
        flight.entry = self._held(repo, file)
        if flight.entry is None:
            self._flights[file.key] = flight  # type: ignore[assignment]
            self._bring(file.key, flight, None, None)  # type: ignore[arg-type]
        return flight

    def _ingest(self, flight: Any, source: Source) -> FileEntry:
        file, recipe = flight.file, self._recipe(flight.data)
        expected = {"expect_sha256": file.sha256, "expect_git_oid": file.git_oid}
        stored = self._shared(flight.repo).ingest(file.path, file.size, source, lfs=file.lfs, recipe=recipe, **expected)
        return stored.entry


class _PullsInTurn(Pulls):
    """Pulls that wait until ``go_on`` runs them in the caller's thread."""

    def _start(self, pull: Pull) -> Pull:
        return self._running.setdefault((pull.repo, pull.revision), pull)

    def go_on(self) -> Pull | None:
        """Run the oldest one to its end."""
        for pull in self._running.values():
            self._run(pull)
            return pull
        return None


class MirrorBySteps:
    """The parts of a mirror on a catalog, as the daemon joins them."""

    def __init__(
        self,
        upstream: Elsewhere,
        catalog: Catalog,
        sessions: Sessions,
        root: Path,
        recipe: Callable[[bytes], Recipe],
        *,
        rules: Sequence[MirrorRule],
        keep_s: float,
    ) -> None:
        client: Any = upstream
        spool = Spool(root / "pulls")
        self._catalog = catalog
        self.flights = _FlightsAtOnce(client, sessions, spool, recipe)
        self.downloads = Downloads(catalog.database, sessions, spool, self.flights, keep_s=keep_s)
        puller = Puller(catalog, sessions, spool, self.flights, upstream.endpoint, files=1)
        self.pulls = _PullsInTurn(catalog, self.downloads, client, puller, RegistryMetrics())
        settings = RegistrySettings(mirror="on", mirror_rules=list(rules), upstream=upstream.endpoint)
        self._long = Threads("long", 1)
        pulling = Pulling(client, self.flights, self.pulls, self.downloads)
        self.mirror = Mirror(settings, catalog, pulling, self._long)
        self.mirror.state.now = catalog.now
        self.orphans: set[Pull] = set()
        """Pulls whose repository was removed while they waited or went on."""

    def close(self) -> None:
        self.mirror.close()
        self._long.close()

    def ask(self, repo: RepoId, revision: str) -> None:
        """What happens before a request of the Hub API is looked up."""
        plan = self.mirror._plan_one(repo, revision)
        if plan.step is Step.LEARN:
            self.mirror._asking.learn(repo, revision, NOBODY)
        elif plan.step is Step.RENEW:
            self.mirror._asking.renew(repo, revision, NOBODY)

    def found(self, repo: RepoId, revision: str) -> Mirrored | None:
        """The snapshot that a revision is served as."""
        commit = self.mirror.commit_of(repo, revision) or revision
        return self.mirror.snapshot(repo, commit)

    def read(self, found: Mirrored, path: str) -> bool:
        """What a GET of a file does; returns whether it had to be downloaded."""
        if self.mirror.placed(found, path) is not None:
            return False
        before = self.mirror.state.stored(found.snapshot.repo, found.files[path])
        self.mirror._fetch(found, path, None)
        return before is None

    def pull(self, repo: RepoId, revision: str) -> Pull:
        """``helios pull``."""
        return self.pulls.start(repo, revision)

    def go_on(self) -> bool:
        """Run the next pull or completion; returns whether there was one. Raises what it fails with, unless that is
        the removal of its repository."""
        pull = self.pulls.go_on()
        if pull is None:
            return False
        removed = isinstance(pull.error, Conflict) and pull.snapshot is not None and pull in self.orphans
        if pull.error is not None and not removed:
            raise pull.error
        return True

    def meanwhile(self, act: Callable[[], object]) -> None:
        """Do it once, when the next pull has published its commit and before the mirror hears of that."""

        acts = [act]

        def once(_pull: Pull) -> None:
            while acts:
                acts.pop()()

        self.pulls._listeners.insert(0, once)

    def removed(self, repo: RepoId) -> None:
        """A repository was removed."""
        self.orphans |= {pull for pull in self.pulls._running.values() if pull.repo == repo}
