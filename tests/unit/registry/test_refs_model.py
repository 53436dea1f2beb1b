"""Any sequence of publishes, swaps and removals against a dictionary that does the same."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from types import EllipsisType

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from helios.errors import Conflict, RepoNotFound, RevisionNotFound
from helios.names import RepoId
from tests.support.depth import depth
from tests.support.determined import determined
from tests.support.postgres import Server
from tests.unit.registry.conftest import Registry

REPOS = st.sampled_from([RepoId.parse("org/a"), RepoId.parse("b"), RepoId.parse("org/a", "datasets")])
REFS = st.sampled_from(["main", "dev", "refs/pr/1"])
CONTENT = st.integers(0, 3)


class RefsMachine(RuleBasedStateMachine):
    server: Server | None = None
    """Where the metadata is; None: SQLite."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.root = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="helios-refs-")))
        url = None if self.server is None else self.server.fresh()
        self.stack.enter_context(determined())
        self.registry = Registry.open(self.root, url)
        self.refs: dict[RepoId, dict[str, str]] = {}
        self.commits: dict[RepoId, dict[int, str]] = {}

    def teardown(self) -> None:
        self.registry.close()
        self.stack.close()

    @rule(repo=REPOS, ref=REFS, content=CONTENT)
    def publish(self, repo: RepoId, ref: str, content: int) -> None:
        record = self.registry.catalog.publisher.publish(
            repo, ref, {"f": self.registry.put(b"%d" % content)}, author="", message=""
        ).record
        known = self.commits.setdefault(repo, {})
        assert known.setdefault(content, record.commit) == record.commit
        self.refs.setdefault(repo, {})[ref] = record.commit

    @rule(repo=REPOS, ref=REFS, content=CONTENT, expected=st.one_of(st.none(), CONTENT))
    def publish_expecting(self, repo: RepoId, ref: str, content: int, expected: int | None) -> None:
        expect = None if expected is None else self.commits.get(repo, {}).get(expected, "f" * 40)
        files = {"f": self.registry.put(b"%d" % content)}
        if self.refs.get(repo, {}).get(ref) != expect:
            with pytest.raises(Conflict):
                self.registry.catalog.publisher.publish(repo, ref, files, author="", message="", expect=expect)
            return
        record = self.registry.catalog.publisher.publish(repo, ref, files, author="", message="", expect=expect).record
        self.commits.setdefault(repo, {})[content] = record.commit
        self.refs.setdefault(repo, {})[ref] = record.commit

    @rule(repo=REPOS, ref=REFS, to=CONTENT, expected=st.one_of(st.none(), CONTENT))
    def swap(self, repo: RepoId, ref: str, to: int, expected: int | None) -> None:
        known = self.commits.get(repo, {})
        commit = known.get(to, "e" * 40)
        expect = None if expected is None else known.get(expected, "f" * 40)
        move = self.registry.catalog.set_ref
        if repo not in self.refs:
            with pytest.raises(RepoNotFound):
                move(repo, ref, commit, expect)
        elif to not in known:
            with pytest.raises(RevisionNotFound):
                move(repo, ref, commit, expect)
        elif self.refs[repo].get(ref) != expect:
            with pytest.raises(Conflict):
                move(repo, ref, commit, expect)
        else:
            assert move(repo, ref, commit, expect) is (expect != commit)
            self.refs[repo][ref] = commit

    @rule(repo=REPOS, ref=REFS, expected=st.one_of(st.just(...), CONTENT))
    def remove_ref(self, repo: RepoId, ref: str, expected: int | EllipsisType) -> None:
        expect = ... if isinstance(expected, EllipsisType) else self.commits.get(repo, {}).get(expected, "f" * 40)
        remove = self.registry.catalog.delete_ref
        if repo not in self.refs:
            with pytest.raises(RepoNotFound):
                remove(repo, ref, expect)
        elif expect is not ... and self.refs[repo].get(ref) != expect:
            with pytest.raises(Conflict):
                remove(repo, ref, expect)
        elif ref not in self.refs[repo]:
            with pytest.raises(RevisionNotFound):
                remove(repo, ref, expect)
        else:
            remove(repo, ref, expect)
            del self.refs[repo][ref]

    @precondition(lambda self: self.refs)
    @rule(repo=REPOS)
    def remove(self, repo: RepoId) -> None:
        if repo not in self.refs:
            with pytest.raises(RepoNotFound):
                self.registry.catalog.delete_repo(repo)
        else:
            self.registry.catalog.delete_repo(repo)
            del self.refs[repo]
            del self.commits[repo]

    @rule()
    def restart(self) -> None:
        self.registry = self.registry.reopen()
        self.registry.sessions.recover()

    @invariant()
    def names_agree(self) -> None:
        catalog = self.registry.catalog
        assert {info.repo: info.refs for info in catalog.repos()} == self.refs
        for repo, refs in self.refs.items():
            for ref, commit in refs.items():
                assert catalog.resolve(repo, ref).commit == commit

    @invariant()
    def contents_agree(self) -> None:
        for repo, known in self.commits.items():
            for content, commit in known.items():
                entry = self.registry.catalog.contents.manifest(repo, commit).files["f"]
                assert self.registry.catalog.contents.blob_reader(repo, entry.sha256).read(0, 10) == b"%d" % content


CASES = depth(6, 20)


def test_on_sqlite() -> None:
    run_state_machine_as_test(RefsMachine, settings=CASES)


def test_on_postgres(postgres_server: Server) -> None:
    class OnPostgres(RefsMachine):
        server = postgres_server

    run_state_machine_as_test(OnPostgres, settings=CASES)
