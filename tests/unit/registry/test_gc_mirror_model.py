"""The model of garbage collection with a mirror: what readers of the Hub API bring here a file at a time, completions,
refs that follow an upstream and move with it, pulls, and the housekeeping of downloads that no commit holds.

Beside what must hold anyway: a file that was downloaded for a snapshot stays while a ref follows the upstream to that
(or the move there waits for approval, or it was learnt not long ago), whether or not the others ever come.
"""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from helios.config import MirrorRule
from helios.errors import RepoNotFound
from helios.names import RepoId
from registry.gc.report import Report
from registry.mirror.state import Mirrored
from registry.pull.spool import KEEP_S
from tests.support.depth import depth
from tests.support.mirrored import Elsewhere, MirrorBySteps
from tests.support.postgres import Server
from tests.unit.registry.test_gc_model import (
    CONTENT,
    DOMAINS,
    KEEP,
    LEASE,
    REFS,
    Collecting,
    Content,
    File,
    Killed,
    Reader,
    bytes_of,
    recipe_of,
)

TTL = 50
FOLLOWED = [RepoId.parse("up/a"), RepoId.parse("up/b"), RepoId.parse("acme/up")]
THEIRS = st.sampled_from(FOLLOWED)
RULES = [MirrorRule(ref="dev", policy="approve", ttl_s=TTL), MirrorRule(ttl_s=TTL)]


def is_large(file: File) -> bool:
    """Whether the upstream has the file in its Large File Storage; the others are told apart by repository."""
    return file[0] > 3


class Mirroring(Collecting):
    def __init__(self) -> None:
        self.upstream = Elsewhere()
        self.theirs: dict[str, tuple[RepoId, Content]] = {}
        self.files: dict[bytes, File] = {}
        self.learnt: dict[str, float] = {}
        self.following: dict[RepoId, set[str]] = {}
        self.fetched: set[tuple[RepoId, str]] = set()
        super().__init__()

    def _open(self) -> None:
        super()._open()
        parts = self.parts
        self.mirror = MirrorBySteps(
            self.upstream,
            parts.catalog,
            parts.sessions,
            self.root,
            lambda data: recipe_of(self.files[data]),
            rules=RULES,
            keep_s=KEEP,
        )

    def _die(self) -> None:
        self.mirror.close()
        super()._die()
        self._look()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.mirror.close()

    # --- what is known ---

    def _look(self) -> None:
        """See what a step of the mirror has published, and where refs point now. What is promised of it is the test's
        to say; what a collection takes away shows, for nobody looks after one."""
        catalog = self.parts.catalog
        for repo in FOLLOWED:
            known = self.mirror.mirror.state.refs(repo)
            self.following[repo] = {commit for ref in known for commit in (ref.commit, ref.pending) if commit}
            for commit, (where, content) in self.theirs.items():
                if where == repo and (repo, commit) not in self.commits and catalog.holds(repo, commit):
                    self.commits[repo, commit] = content
                    self._touch(repo, commit)
            try:
                refs = catalog.refs(repo)
                self.refs.setdefault(repo, {})
            except RepoNotFound:
                refs = {}
            if repo in self.refs:
                before = dict(self.refs[repo])
                for ref in before.keys() | refs.keys():
                    self._move(repo, ref, refs.get(ref))
        self._forget_promises()

    def _follows(self, repo: RepoId, ref: str) -> bool:
        return self.mirror.mirror.state.ref(repo, ref) is not None

    def _kept(self, key: Any) -> bool:
        return super()._kept(key) or key[1] in self.following.get(key[0], ())

    def _open_snapshots(self, repo: RepoId) -> list[str]:
        """Upstream commits of which files may be here and more may be wanted."""
        young = {commit for commit, since in self.learnt.items() if since + KEEP > self.clock}
        wanted = self.following.get(repo, set()) | young
        return [c for c in wanted if self.theirs[c][0] == repo and (repo, c) not in self.commits]

    def _listed(self, repo: RepoId) -> dict[str, File]:
        """Content -> file of all open snapshots."""
        out = {}
        for commit in self._open_snapshots(repo):
            for remote, file in zip(self.upstream.snapshots[commit].files, self.theirs[commit][1], strict=True):
                out[remote.key] = file
        return out

    def _forget_promises(self) -> None:
        """What no open snapshot lists may go with the next pull or after a week, and nobody was promised it."""
        listed = {repo: self._listed(repo) for repo in FOLLOWED}
        self.fetched = {(repo, key) for repo, key in self.fetched if key in listed[repo]}

    # --- what the upstream, readers and people do ---

    @initialize(contents=st.lists(CONTENT, min_size=len(FOLLOWED), max_size=len(FOLLOWED)))
    def upstream_begins(self, contents: list[Content]) -> None:
        for repo, content in zip(FOLLOWED, contents, strict=True):
            for ref in ("main", "dev"):
                self.upstream_moves(repo, ref, content)

    @rule(repo=THEIRS, ref=REFS, content=CONTENT)
    def upstream_moves(self, repo: RepoId, ref: str, content: Content) -> None:
        self.files |= {bytes_of(file): file for file in content}
        commit = self.upstream.push(repo, ref, [(bytes_of(file), is_large(file)) for file in content])
        self.theirs[commit] = repo, content

    def _ask(self, repo: RepoId, ref: str) -> Mirrored | None:
        """What the mirror knows of the snapshot; of one that somebody's pull has brought it may know nothing."""
        self.mirror.ask(repo, ref)
        found = self.mirror.found(repo, ref)
        for known in self.mirror.mirror.state.refs(repo):
            for commit in filter(None, (known.commit, known.pending)):
                self.learnt.setdefault(commit, self.clock)
        self._look()
        here = self.mirror.mirror.commit_of(repo, ref) or self.refs.get(repo, {}).get(ref)  # or somebody's own
        assert found is not None or (repo, here) in self.commits
        return found

    @rule(repo=THEIRS, ref=REFS, number=st.integers(0, 9))
    def read_a_file(self, repo: RepoId, ref: str, number: int) -> None:
        found = self._ask(repo, ref)
        if found is None or (repo, found.snapshot.commit) in self.commits:
            return
        path = sorted(found.files)[number % len(found.files)]
        fetched = self.mirror.read(found, path)
        if fetched:
            self.fetched.add((repo, found.files[path].key))
        placed = self.mirror.mirror.placed(found, path)
        assert placed is not None
        data = self.upstream.bytes[found.files[path].key]
        self.readers.append(Reader(placed, data, self.clock + LEASE))
        self._look()

    @rule(repo=THEIRS)
    def approve(self, repo: RepoId) -> None:
        for known in self.mirror.mirror.state.refs(repo):
            if known.pending:
                self.mirror.mirror.approve(repo, known.ref, known.pending)
        self._look()

    @rule(repo=THEIRS, ref=REFS)
    def complete(self, repo: RepoId, ref: str) -> None:
        if (found := self._ask(repo, ref)) is not None:
            self.mirror.mirror._completing.complete(found.snapshot, None)

    @rule(repo=THEIRS, ref=REFS)
    def pull(self, repo: RepoId, ref: str) -> None:
        self.mirror.pull(repo, ref)

    @rule()
    def a_pull_goes_on(self) -> None:
        self.mirror.go_on()
        self._look()

    @rule(step=st.integers(0, 15), what=st.sampled_from(["collect", "clean", "expire", "delete"]), repo=THEIRS)
    def a_pull_goes_on_while(self, step: int, what: str, repo: RepoId) -> None:
        """Something comes between two steps of it."""
        then = {
            "collect": self.collect,
            "clean": self.clean,
            "expire": self.expire,
            "delete": lambda: self._delete(repo),
        }[what]
        self.steps.left, self.steps.then, self.steps.after = step, then, False
        try:
            self.mirror.go_on()
        finally:
            self.steps.left, self.steps.then = -1, None
        self._look()

    @rule(step=st.integers(0, 25), after=st.booleans())
    def kill_a_pull(self, step: int, after: bool) -> None:
        self.steps.left, self.steps.after = step, after
        try:
            self.mirror.go_on()
            self.steps.left = -1
            self._look()
        except Killed:
            self._die()

    @rule(step=st.integers(0, 12), repo=THEIRS, ref=REFS, number=st.integers(0, 9))
    def collect_while_a_file_is_read(self, step: int, repo: RepoId, ref: str, number: int) -> None:
        self.steps.left, self.steps.after = step, False
        self.steps.then = lambda: self.read_a_file(repo, ref, number)
        try:
            assert self._collect().problems == []
        finally:
            self.steps.left, self.steps.then = -1, None

    def _delete(self, repo: RepoId) -> None:
        """A completion of it that waits or goes on publishes nothing; a pull that somebody asked for brings it back."""
        if self.mirror.mirror.state.restricted(repo) is not None or repo in self.refs:
            self.parts.catalog.delete_repo(repo)
            self.mirror.removed(repo)
            self.refs.pop(repo, None)
            self.following.pop(repo, None)
            self.fetched = {each for each in self.fetched if each[0] != repo}
            for commit in [commit for commit in self.learnt if self.theirs[commit][0] == repo]:
                del self.learnt[commit]
            for key in [key for key in self.commits if key[0] == repo]:
                self._gone(key)

    @rule(repo=THEIRS)
    def delete_followed(self, repo: RepoId) -> None:
        self._delete(repo)

    @rule(repo=THEIRS, ref=REFS)
    def stop_following(self, repo: RepoId, ref: str) -> None:
        if ref in self.refs.get(repo, {}):
            self.parts.catalog.delete_ref(repo, ref, followed=True)
            self._look()

    @rule()
    def expire(self) -> None:
        self.mirror.downloads.expire()

    @rule(seconds=st.sampled_from([TTL + 1, KEEP_S + 1]))
    def wait_for_the_mirror(self, seconds: float) -> None:
        self._set_clock(self.clock + seconds)

    def _collect(self) -> Report:
        self.mirror.downloads.expire()  # as the job does
        return super()._collect()

    # --- what must hold ---

    @invariant()
    def downloads_stay(self) -> None:
        self._forget_promises()
        contents = self.parts.catalog.contents
        for repo, key in sorted(self.fetched, key=str):
            data = self.upstream.bytes[key]
            blob = recipe_of(self.files[data]).blob
            domain = DOMAINS.of(repo)
            assert contents.has_blob(domain, blob) is not None, f"{key} of {repo} is gone"
            assert contents.stored_blob(domain, blob).read(0, len(data)) == data

    def all_is_collected_in_the_end(self) -> None:
        while self.mirror.go_on():
            pass
        self._look()
        self._set_clock(self.clock + KEEP_S + 1)
        super().all_is_collected_in_the_end()

    def _needed_blobs(self) -> tuple[set[str], set[str]]:
        least, most = super()._needed_blobs()
        self._forget_promises()
        for repo in FOLLOWED:
            for key, file in self._listed(repo).items():
                most.add(recipe_of(file).blob)
                if (repo, key) in self.fetched:
                    least.add(recipe_of(file).blob)
        return least, most


def test_collections_beside_a_mirror() -> None:
    run_state_machine_as_test(Mirroring, settings=depth(12, 30))


def test_collections_on_postgres(postgres_server: Server) -> None:
    class Machine(Mirroring):
        def __init__(self) -> None:
            self.url = postgres_server.fresh()
            super().__init__()

    run_state_machine_as_test(Machine, settings=depth(10, 20))


def _read_and_removed(machine: Mirroring) -> None:
    """Somebody was told where a file lies that no commit holds, and then its repository is removed."""
    machine.upstream_begins([((1, 2), (3,))] * len(FOLLOWED))
    machine.read_a_file(FOLLOWED[0], "main", 0)
    assert machine.readers
    machine.delete_followed(FOLLOWED[0])


def test_a_kill_right_after_a_removal_takes_nothing_from_readers() -> None:
    with contextlib.closing(Closing()) as machine:
        _read_and_removed(machine)
        machine._die()
        machine.readers_find_what_they_were_told()


def test_downloads_that_go_on_after_a_removal_take_nothing_from_readers() -> None:
    """The removed repository's file was stored in a session that other downloads share."""
    with contextlib.closing(Closing()) as machine:
        flights = machine.mirror.flights
        other: Any = object()
        flights._flights["other"] = other
        _read_and_removed(machine)
        del flights._flights["other"]
        for session in flights._open.values():
            session.close()
        machine.clean()
        machine.readers_find_what_they_were_told()


class Closing(Mirroring):
    close = Mirroring.teardown
