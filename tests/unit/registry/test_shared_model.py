"""Two processes on one PostgreSQL and one store, against a model that knows of one registry only.

Whatever is done at one of them, pushes that wander between them and kills included, is seen at both, and at the end the
store holds exactly what the commits need.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from helios.errors import Conflict, InvalidInput, NotFound, RepoNotFound, RevisionNotFound
from helios.names import RepoId
from heliosfs.store.keys import blob_key, commit_key, manifest_key, recipe_key
from registry.metadata.database import Changes
from registry.metadata.tables import processes
from registry.push_log import Announced
from registry.pushes import Pushes
from tests.support.depth import depth
from tests.support.determined import determined
from tests.support.postgres import Server
from tests.unit.registry.conftest import ANY, Registry

REPOS = st.sampled_from([RepoId.parse("org/a"), RepoId.parse("b")])
REFS = st.sampled_from(["main", "dev"])
CONTENT = st.integers(0, 3)
AT = st.integers(0, 1)


def content_of(number: int) -> dict[str, bytes]:
    """Two files; the first is the same in all."""
    return {"common": b"common to all", "own": b"%d" % number * 7}


@dataclass
class Expected:
    """What the model knows of a push."""

    id: str
    repo: RepoId
    ref: str
    content: int
    base: str | None
    stored: set[str] = field(default_factory=set)


class SharedMachine(RuleBasedStateMachine):
    server: Server
    pushes = Bundle("pushes")

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.root = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="helios-shared-")))
        self.url = self.server.fresh()
        self.stack.enter_context(determined())
        self.loop = self.stack.enter_context(asyncio.Runner())
        self.parts = [Registry.open(self.root, self.url) for _ in range(2)]
        self.front = [Pushes(parts.catalog, parts.sessions) for parts in self.parts]
        self.refs: dict[RepoId, dict[str, str]] = {}
        self.commits: dict[RepoId, dict[str, int]] = {}
        self.open: dict[str, Expected] = {}

    @initialize()
    def begin(self) -> None:
        for parts in self.parts:
            parts.catalog.member.renew()

    def teardown(self) -> None:
        for push in self.open.values():
            self.loop.run(self.front[0].abort(push.id))
        for at in (0, 1):
            self.clean(at)
        self.contents_agree()
        catalog, needed = self.parts[0].catalog, set()
        for repo, commits in self.commits.items():
            for commit in commits:
                manifest = catalog.contents.manifest(repo, commit)
                needed |= {manifest_key("public", manifest.digest), commit_key("public", repo, commit)}
                for entry in manifest.files.values():
                    needed |= {blob_key("public", entry.sha256), recipe_key("public", entry.recipe)}
        kept = self.parts[0].objects()
        assert needed <= kept
        if not self.removed:  # what a removed repository held stays until it is collected
            assert kept == needed
        for parts in self.parts:
            parts.close()
        self.stack.close()

    removed = False

    # --- names ---

    @rule(at=AT, repo=REPOS, ref=REFS, number=CONTENT)
    def publish(self, at: int, repo: RepoId, ref: str, number: int) -> None:
        record = self.parts[at].publish(repo.id, content_of(number), ref)
        self._published(repo, ref, record.commit, number)

    @rule(at=AT, repo=REPOS, ref=REFS, to=CONTENT, stale=st.booleans())
    def swap(self, at: int, repo: RepoId, ref: str, to: int, stale: bool) -> None:
        catalog = self.parts[at].catalog
        commit = next((c for c, number in self.commits.get(repo, {}).items() if number == to), "e" * 40)
        now = self.refs.get(repo, {}).get(ref)
        expect = "f" * 40 if stale else now
        wrong = (
            RepoNotFound
            if repo not in self.commits
            else RevisionNotFound
            if commit not in self.commits[repo]
            else Conflict
        )
        if repo not in self.commits or commit not in self.commits[repo] or stale:
            with pytest.raises(wrong):
                catalog.set_ref(repo, ref, commit, expect)
        else:
            assert catalog.set_ref(repo, ref, commit, expect) is (commit != now)
            self.refs[repo][ref] = commit

    @rule(at=AT, repo=REPOS)
    def remove(self, at: int, repo: RepoId) -> None:
        if repo not in self.refs:
            with pytest.raises(RepoNotFound):
                self.parts[at].catalog.delete_repo(repo)
            return
        self.parts[at].catalog.delete_repo(repo)
        del self.refs[repo], self.commits[repo]
        self.removed = True

    # --- pushes ---

    @rule(target=pushes, at=AT, repo=REPOS, ref=REFS, number=CONTENT)
    def start(self, at: int, repo: RepoId, ref: str, number: int) -> Expected:
        files = [Announced(path, len(data), False) for path, data in content_of(number).items()]
        id_ = self.loop.run(self.front[at].start(repo, ref, "", "", files))
        push = self.open[id_] = Expected(id_, repo, ref, number, self.refs.get(repo, {}).get(ref))
        return push

    @rule(at=AT, push=pushes, path=st.sampled_from(["common", "own"]))
    def put(self, at: int, push: Expected, path: str) -> None:
        data = content_of(push.content)[path]

        async def body() -> AsyncIterator[bytes]:
            yield data

        if push.id not in self.open:
            with pytest.raises(NotFound):
                self.loop.run(self.front[at].put_body(push.id, path, body()))
            return
        assert self.loop.run(self.front[at].put_body(push.id, path, body())).size == len(data)
        push.stored.add(path)

    @rule(at=AT, push=pushes)
    def ask(self, at: int, push: Expected) -> None:
        if push.id not in self.open:
            with pytest.raises(NotFound):
                self.loop.run(self.front[at].state(push.id))
            return
        sizes = {path: len(data) for path, data in content_of(push.content).items()}
        state = self.loop.run(self.front[at].state(push.id))
        assert (state.files, state.bytes) == (len(push.stored), sum(sizes[path] for path in push.stored))

    @rule(at=AT, push=pushes)
    def commit(self, at: int, push: Expected) -> None:
        commit = self.front[at].commit(push.id)
        if push.id not in self.open:
            with pytest.raises(NotFound):
                self.loop.run(commit)
        elif len(push.stored) < 2:
            with pytest.raises(InvalidInput):
                self.loop.run(commit)
        elif self.refs.get(push.repo, {}).get(push.ref) != push.base:
            with pytest.raises(Conflict):
                self.loop.run(commit)
        else:
            outcome = self.loop.run(commit)
            del self.open[push.id]
            self._published(push.repo, push.ref, outcome.commit, push.content)

    @rule(at=AT, push=consumes(pushes))
    def give_up(self, at: int, push: Expected) -> None:
        if self.open.pop(push.id, None) is None:
            with pytest.raises(NotFound):
                self.loop.run(self.front[at].abort(push.id))
        else:
            self.loop.run(self.front[at].abort(push.id))

    # --- accidents ---

    @rule(at=AT, number=CONTENT)
    def kill(self, at: int, number: int) -> None:
        """One dies in the middle of something, and another takes its place; the other one cleans up after it."""
        victim = self.parts[at]
        victim.put(b"half done %d" % number, session=victim.sessions.open(ANY))
        with victim.database.write(changes=Changes.NOTHING) as connection:
            connection.execute(processes.update().where(processes.c.id == victim.catalog.member.id).values(expires=0))
        self.parts[1 - at].sessions.recover()
        victim.close()
        self.parts[at] = parts = Registry.open(self.root, self.url)
        parts.catalog.member.renew()
        self.front[at] = Pushes(parts.catalog, parts.sessions)

    @rule(at=AT)
    def clean(self, at: int) -> None:
        self.parts[at].sessions.work.set()
        self.parts[at].sessions.clean()

    # --- what is seen at both ---

    @invariant()
    def names_agree(self) -> None:
        for parts in self.parts:
            parts.catalog.confirm()  # a request begins
            assert {info.repo: info.refs for info in parts.catalog.repos()} == self.refs
            for repo, refs in self.refs.items():
                for ref, commit in refs.items():
                    assert parts.catalog.resolve(repo, ref).commit == commit
            for repo in {RepoId.parse("org/a"), RepoId.parse("b")} - self.refs.keys():
                with pytest.raises(RepoNotFound):
                    parts.catalog.resolve(repo, "main")

    @invariant()
    def contents_agree(self) -> None:
        for parts in self.parts:
            for repo, commits in self.commits.items():
                for commit, number in commits.items():
                    for path, data in content_of(number).items():
                        entry = parts.catalog.contents.manifest(repo, commit).files[path]
                        assert parts.catalog.contents.blob_reader(repo, entry.sha256).read(0, 100) == data

    def _published(self, repo: RepoId, ref: str, commit: str, number: int) -> None:
        self.commits.setdefault(repo, {})[commit] = number
        self.refs.setdefault(repo, {})[ref] = commit


def test_two_processes_are_one_registry(postgres_server: Server) -> None:
    class Machine(SharedMachine):
        server = postgres_server

    run_state_machine_as_test(Machine, settings=depth(5, 20))
