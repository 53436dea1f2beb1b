"""Quotas against a model: two processes on one PostgreSQL, or one on SQLite, with kills.

Whatever is done, exactly what fits gets in, reservations are those of the sessions that are left, and a count is what
the report of all that is stored says.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from helios.errors import QuotaExceeded, RepoNotFound
from helios.names import RepoId
from registry.gc.collect import Collector, Times
from registry.metadata.database import Changes
from registry.metadata.quotas import Amount
from registry.metadata.tables import processes
from registry.sessions import Session
from tests.support.depth import depth
from tests.support.determined import determined
from tests.support.postgres import Server
from tests.unit.registry.conftest import Registry
from tests.unit.registry.test_quotas import quota, with_quota

REPOS = [RepoId.parse(name) for name in ("org/a", "org/b", "else/c")]
KEYS = ["11" * 32, "22" * 32, "own:"]
QUOTAS = (quota(stored=9_000, logical=14_000), quota(repo="*", stored=15_000))
AT, REPO, KEY = st.integers(0, 1), st.sampled_from(REPOS), st.sampled_from(KEYS)

Promises = dict[tuple[str, str], Amount]
"""By quota and key."""


class QuotaMachine(RuleBasedStateMachine):
    server: ClassVar[Server | None]

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.root = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.url = None if self.server is None else self.server.fresh()
        self.stack.enter_context(determined())
        self.parts = [self._start() for _ in range(1 if self.server is None else 2)]
        self.sessions: list[tuple[int, Session, Promises]] = []
        self.seed = 0

    def _start(self) -> Registry:
        parts = Registry.open(self.root, self.url)
        with_quota(parts, *QUOTAS)
        parts.catalog.member.renew()
        parts.sessions.recover()
        return parts

    def teardown(self) -> None:
        self.a_count_is_what_the_report_says()
        for parts in self.parts:
            parts.close()
        self.stack.close()

    def _at(self, number: int) -> int:
        return number % len(self.parts)

    def _promised(self, label: str, sessions: list[Promises]) -> Amount:
        """What is reserved under a quota: content once, what is a session's own for each."""
        logical, stored, content = 0, 0, dict.fromkeys(KEYS, 0)
        for promises in sessions:
            for (quota_label, key), amount in promises.items():
                if quota_label == label:
                    logical += amount.logical
                    if ":" in key:
                        stored += amount.stored
                    else:
                        content[key] = max(content[key], amount.stored)
        return Amount(logical, stored + sum(content.values()))

    # --- what people do ---

    @rule(at=AT)
    def begin(self, at: int) -> None:
        self.sessions.append((self._at(at), self.parts[self._at(at)].sessions.open(REPOS[0]), {}))

    @rule(number=st.integers(0, 5), repo=REPO, key=KEY, logical=st.integers(0, 6), stored=st.integers(0, 6))
    def reserve(self, number: int, repo: RepoId, key: str, logical: int, stored: int) -> None:
        if not self.sessions:
            return
        at, session, promises = self.sessions[number % len(self.sessions)]
        quotas, want = self.parts[at].catalog.quotas, Amount(logical * 1000, stored * 1000)
        used = {state.quota: state.used for state in quotas.states()}
        after = promises | {(each.label, key): want for each in quotas.concerning(repo)}
        others = [each for _, _, each in self.sessions if each is not promises]
        fits = True
        for each in quotas.concerning(repo):
            before, now = (self._promised(each.label, [*others, mine]) for mine in (promises, after))
            for name in ("logical", "stored"):
                limit, more = getattr(each.limit, name), getattr(now, name) - getattr(before, name)
                fits &= not limit or more <= 0 or getattr(used[each.label], name) + getattr(now, name) <= limit
        if fits:
            quotas.reserve(session.name, repo, {key: want})
            promises |= after
        else:
            with pytest.raises(QuotaExceeded):
                quotas.reserve(session.name, repo, {key: want})

    @rule(number=st.integers(0, 5))
    def end(self, number: int) -> None:
        if self.sessions:
            self.sessions.pop(number % len(self.sessions))[1].close()

    @rule(number=st.integers(0, 5), repo=REPO, size=st.integers(1, 4), again=st.booleans())
    def publish(self, number: int, repo: RepoId, size: int, again: bool) -> None:
        """A commit that a session pays for: what is its own is charged, the rest stays."""
        if not self.sessions:
            return
        at, session, promises = self.sessions[number % len(self.sessions)]
        self.seed += not again
        content = b"%06d" % self.seed * (size * 1000 // 6)
        entry = session.ingest("a", len(content), io.BytesIO(content)).entry
        publisher = self.parts[at].catalog.publisher
        with contextlib.suppress(QuotaExceeded):
            publisher.publish(repo, "main", {"a": entry}, author="", message="", payer=session.name)
            for label, key in list(promises):
                if ":" in key:
                    del promises[label, key]

    @rule(at=AT, key=st.sampled_from(KEYS[:2]))
    def land(self, at: int, key: str) -> None:
        """A content that somebody waits for is stored: nobody waits for it any more."""
        parts = self.parts[self._at(at)]
        with parts.database.write(changes=Changes.NOTHING) as connection:
            parts.catalog.quotas.landed(connection, REPOS[0], key)
        for _, _, promises in self.sessions:
            for label, promised in list(promises):
                if promised == key:
                    del promises[label, promised]

    @rule(at=AT, repo=REPO)
    def remove(self, at: int, repo: RepoId) -> None:
        catalog = self.parts[self._at(at)].catalog
        with contextlib.suppress(RepoNotFound):
            catalog.delete_repo(repo)
        Collector(catalog, Times(0.0, 0.0, 0.0)).run()

    @rule(at=AT)
    def kill(self, at: int) -> None:
        """A process dies without a word; the others, or its next start, end what it held."""
        at = self._at(at)
        old = self.parts[at]
        with old.database.write(changes=Changes.NOTHING) as connection:
            connection.execute(processes.update().where(processes.c.id == old.catalog.member.id).values(expires=0.0))
        old.close()
        self.parts[at] = self._start()
        self.sessions = [each for each in self.sessions if each[0] != at]

    # --- what is always so ---

    @invariant()
    def reserved_is_what_sessions_promise(self) -> None:
        for parts in self.parts:
            for state in parts.catalog.quotas.known():
                assert state.reserved == self._promised(state.quota, [each for _, _, each in self.sessions])

    @rule()
    def a_count_is_what_the_report_says(self) -> None:
        parts = self.parts[0]
        shares, _ = parts.catalog.contents.shares()
        org = [share for share in shares if share.repo.startswith("models/org/")]
        for parts in self.parts:
            for state, mine in zip(parts.catalog.quotas.states(), (org, shares), strict=True):
                assert state.used.logical == sum(share.logical for share in mine)
                assert state.used.stored == pytest.approx(sum(share.stored for share in mine), abs=1)
                limit = state.limit.logical
                assert not limit or state.used.logical + state.reserved.logical <= limit


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
def test_exactly_what_fits_gets_in(engine: str, request: pytest.FixtureRequest) -> None:
    class Machine(QuotaMachine):
        server = request.getfixturevalue("postgres_server") if engine == "postgres" else None

    examples = 8 if engine == "sqlite" else 4
    run_state_machine_as_test(Machine, settings=depth(examples, 25))
