"""The pulls under way: one for each repository and revision, however many wait for it.

A pull has a thread of its own. Callers get a ``Pull`` to watch; one that goes away changes nothing. Two pulls of one
commit under different names share the work: the second watches the first and then only sets its own ref.

State shared between threads is touched under ``_lock``; nobody waits for another pull while holding it.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy.engine import Connection

from helios.errors import Conflict, HeliosError, Unavailable
from helios.metrics import RegistryMetrics
from helios.names import RepoId, check_revision, is_commit
from registry.catalog import Catalog
from registry.metadata import mirror
from registry.pull.downloads import Downloads
from registry.pull.listing import Snapshot
from registry.pull.names import kind_of
from registry.pull.progress import Progress
from registry.pull.pull import Puller
from registry.pull.turns import Turns
from registry.pull.upstream import Stopped, Token, Upstream
from registry.stopping import stop_all

log = logging.getLogger("helios.registry.pull")

AT_A_TIME: Final = 4
"""Pulls that work; others wait for their turn, those that matter most first."""
MOST: Final = 200
"""Pulls that may wait or work, each with a thread; one more is refused."""
CLOSE_S: Final = 3.0
"""Longest wait at shutdown for pulls to notice, in seconds: a thread blocked in a read is left behind. That is safe:
what it has written is kept, and it publishes nothing any more."""


@dataclass(eq=False)
class Pull:
    """A pull somebody asked for. ``commit`` or ``error`` is set once ``finished`` is."""

    repo: RepoId
    revision: str
    progress: Progress = field(default_factory=Progress)
    stop: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    commit: str | None = None
    error: HeliosError | None = None
    snapshot: Snapshot | None = None
    token: Token = None

    def result(self) -> dict[str, Any]:
        """What the last event of its stream says."""
        return {"commit": self.commit}


class Pulls:
    """The pulls of one registry. Close it at shutdown."""

    def __init__(
        self,
        catalog: Catalog,
        downloads: Downloads,
        upstream: Upstream,
        puller: Puller,
        metrics: RegistryMetrics,
    ) -> None:
        self._catalog, self._downloads = catalog, downloads
        self._upstream, self._puller, self._metrics = upstream, puller, metrics
        self._lock = threading.Lock()
        self._running: dict[tuple[RepoId, str], Pull] = {}
        self._commits: dict[tuple[RepoId, str], Pull] = {}
        self._turns = Turns(AT_A_TIME)
        self._closed = False
        self._listeners: list[Callable[[Pull], None]] = []
        downloads.expire()

    def listen(self, published: Callable[[Pull], None]) -> None:
        """Call ``published``, from a pull's thread, when its commit is held, before anybody waiting hears of it."""
        self._listeners.append(published)

    def start(self, repo: RepoId, revision: str) -> Pull:
        """The pull of this repository and revision: the one that runs, or a new one. Raises Unavailable."""
        return self._start(Pull(repo, check_revision(revision)))

    def complete(self, snapshot: Snapshot, token: Token) -> Pull:
        """Fetch what is missing of a snapshot whose listing is known already, and publish it."""
        return self._start(Pull(snapshot.repo, snapshot.commit, snapshot=snapshot, token=token))

    def _start(self, pull: Pull) -> Pull:
        with self._lock:
            if self._closed:
                raise Unavailable("the registry is stopping")
            found = self._running.get((pull.repo, pull.revision))
            if found is not None:
                return found
            if len(self._running) >= MOST:
                raise Unavailable(f"{MOST} pulls are under way already", hint="Wait for some of them to end.")
            # Started inside the lock, which the thread takes before it ends: ``close`` finds every thread that runs.
            threading.Thread(target=self._run, args=(pull,), name=f"pull {pull.repo.id}", daemon=True).start()
            self._running[pull.repo, pull.revision] = pull
            return pull

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Stop all pulls and wait for them, within bounds. What they have downloaded stays."""
        with self._lock:
            self._closed = True
            left = list(self._running.values())
        for pull in stop_all(left, timeout_s):
            log.warning("a pull did not end in time", extra={"repo": str(pull.repo), "rev": pull.revision})
            pull.error = Stopped()
            pull.finished.set()
            pull.progress.changed()

    def _run(self, pull: Pull) -> None:
        extra = {"repo": str(pull.repo), "rev": pull.revision}
        result = "failed"
        try:
            pull.commit = self._pull(pull)
            for published in self._listeners:
                published(pull)
            result = "done"
            log.info("pulled", extra={**extra, "commit": pull.commit})
        except HeliosError as error:
            pull.error = error
            log.warning("a pull failed", extra={**extra, "code": error.code, "error": error.message})
        except Exception as error:
            pull.error = HeliosError(
                f"the pull of {pull.repo.id} broke: {error!r}", hint="The registry's log says more."
            )
            log.exception("a pull broke", extra=extra)
        finally:
            self._metrics.pulls.labels(result).inc()
            self._end(pull, succeeded=result == "done")
            pull.finished.set()
            pull.progress.changed()

    def _pull(self, pull: Pull) -> str:
        repo, revision = pull.repo, pull.revision
        if is_commit(revision) and self._catalog.holds(repo, revision):
            pull.progress.log("the commit is here already")
            return revision
        with self._turns.turn(lambda: self._catalog.priorities.rank(repo, revision), pull.stop):
            snapshot = pull.snapshot
            if snapshot is None:
                pull.progress.log(f"asking {self._upstream.endpoint} for {repo.id}@{revision}")
                snapshot = self._upstream.snapshot(repo, revision, pull.stop)
            pull.progress.log(f"{revision} is commit {snapshot.commit}")
            ref = None if is_commit(revision) else revision
            kind = "branch" if ref is None else kind_of(self._upstream, repo, ref, pull.stop)
            self._bring(pull, snapshot, ref, kind)
            return snapshot.commit

    def _bring(self, pull: Pull, snapshot: Snapshot, ref: str | None, kind: str) -> None:
        key = (snapshot.repo, snapshot.commit)
        with self._lock:
            leader = self._commits.setdefault(key, pull)
        if leader is not pull:
            self._follow(pull, leader)
        else:
            try:
                if not self._catalog.holds(*key):
                    check = _wanted if pull.snapshot is None else functools.partial(_still_known, *key)
                    self._puller.bring(snapshot, ref, pull.progress, pull.stop, pull.token, kind, check)
                    return
            finally:
                with self._lock:
                    del self._commits[key]
            pull.progress.log("the commit is here already")
        if ref is not None:
            author = snapshot.author
            self._catalog.set_ref(snapshot.repo, ref, snapshot.commit, author=author, kind=kind, followed=True)

    def _follow(self, pull: Pull, leader: Pull) -> None:
        """Wait for another pull of the same commit, which has deadlines of its own; raises what it failed with."""
        end = pull.progress.mirror(leader.progress)
        try:
            while not leader.finished.wait(0.2):
                if pull.stop.is_set():
                    raise Stopped
        finally:
            end()
        if leader.error is not None:
            raise leader.error

    def _end(self, pull: Pull, *, succeeded: bool) -> None:
        """Take the pull off the list. When the last one of a repository succeeded, nobody will resume older ones."""
        with self._lock:  # held while files are unlinked, so that no new pull begins among them
            del self._running[pull.repo, pull.revision]
            if succeeded and not any(other.repo == pull.repo for other in self._running.values()):
                try:
                    self._downloads.forget(pull.repo)
                except HeliosError as error:
                    log.warning("downloads of a finished pull are left behind", extra={"error": error.message})


def _wanted(_connection: Connection) -> None:
    """Somebody asked for it, who gets it whatever was removed meanwhile."""


def _still_known(repo: RepoId, commit: str, connection: Connection) -> None:
    """Only the mirror wanted it: raise Conflict if the repository was removed meanwhile, with its listings."""
    if mirror.find_snapshot(connection, repo, commit) is None:
        raise Conflict(f"{repo.id} was removed while {commit[:8]} was fetched, which is not published therefore")
