"""Garbage collection against a model: whatever else happens, and wherever a collection is killed.

Files are made of short blocks, and cut there, so that blobs share chunks, and with them packs and each other's objects,
in all ways. The clock is the test's, for the database as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from blake3 import blake3
from hypothesis import Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy.engine import Connection

from helios.config import TenantSettings
from helios.errors import Conflict, NotFound, RepoNotFound, RevisionNotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.chunks import read as read_chunk
from heliosfs.store.keys import commit_key, manifest_key
from heliosfs.store.manifest import FileEntry
from heliosfs.store.placement import PlacedBlob
from heliosfs.store.recipe import Recipe
from registry import burial
from registry.domains import Domains
from registry.gc.collect import Collector, Times
from registry.gc.compress import Compressed, Compressor, Limits
from registry.gc.leases import Leases
from registry.gc.report import Report
from registry.gc.verify import Pace
from registry.ingest import staged
from registry.metadata import claims
from registry.metadata.database import Changes
from registry.metadata.gc_tables import recounts, removals
from registry.metadata.tables import blob_objects, objects
from registry.sessions import Session
from tests.support.depth import depth
from tests.support.determined import determined
from tests.support.ingest import seeded
from tests.unit.registry.conftest import Registry

KEEP, GRACE, LEASE = 1000, 100, 10
BLOCK = 1000
TIMES = Times(keep_commits_s=KEEP, grace_s=GRACE, lease_s=LEASE)
DOMAINS = Domains({"acme": TenantSettings(owns=["acme/*"], domain="acme")})
ALL_IS_COLD = Limits(unread_s=-1e12, min_gain=0.02, keep_s=GRACE + LEASE, least_bytes=1)
REPOS = st.sampled_from([RepoId.parse("org/a"), RepoId.parse("org/b"), RepoId.parse("acme/a")])
REFS = st.sampled_from(["main", "dev"])
FILE = st.lists(st.integers(0, 9), min_size=1, max_size=7).map(tuple)
CONTENT = st.lists(FILE, min_size=1, max_size=2).map(tuple)

File = tuple[int, ...]
Content = tuple[File, ...]
AnyCommit = tuple[RepoId, str]


def block(number: int) -> bytes:
    """Half of them can be compressed."""
    return seeded(BLOCK, number) if number % 2 else seeded(BLOCK // 10, number) * 10


def bytes_of(file: File) -> bytes:
    return b"".join(map(block, file))


def recipe_of(file: File) -> Recipe:
    blocks = list(map(block, file))
    blob = hashlib.sha256(b"".join(blocks)).hexdigest()
    return Recipe.build(blob, [(blake3(block).digest(), BLOCK) for block in blocks])


class Killed(BaseException):
    """The process ends here: nothing that it would do afterwards happens."""


@dataclass
class Steps:
    """Every transaction and every change of the store is a step. At one of them something happens, or all ends."""

    left: int = -1
    then: Callable[[], None] | None = None
    after: bool = False
    dead: bool = False

    def step(self, *, done: bool) -> None:
        if self.dead:
            raise Killed
        if self.after is not done or self.left < 0:
            return
        self.left -= 1
        if self.left >= 0:
            return
        if self.then is not None:
            self.then()
        else:
            self.dead = True
            raise Killed


@dataclass
class Reader:
    """Somebody who was told where a blob lies, and until when that holds."""

    placed: PlacedBlob
    data: bytes
    until: float


@dataclass
class Open:
    """A push in the middle."""

    repo: RepoId
    session: Session
    entries: dict[str, FileEntry] = field(default_factory=dict)
    files: list[File] = field(default_factory=list)


class Collecting(RuleBasedStateMachine):
    url: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.chance = self.stack.enter_context(determined())  # who is to wait for a deletion would wait for himself
        self.root = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="helios-gc-")))
        self.clock = 1_000_000.0
        self.steps = Steps()
        self._open()
        self.refs: dict[RepoId, dict[str, str]] = {}
        self.commits: dict[AnyCommit, Content] = {}
        self.touched: dict[AnyCommit, float] = {}
        self.pins: dict[tuple[str, RepoId, str], float] = {}
        self.readers: list[Reader] = []
        self.pushes: list[Open] = []
        self.begun: list[Open] = []

    def _open(self) -> None:
        self.steps = Steps()
        self.parts = parts = Registry.open(self.root, self.url, DOMAINS)
        self._set_clock(self.clock)
        catalog = parts.catalog
        catalog.lease_s = LEASE
        database, store = parts.database, parts.store
        write = database.write

        @contextlib.contextmanager
        def stepping(*args: Any, **options: Any) -> Iterator[Connection]:
            self.steps.step(done=False)
            with write(*args, **options) as connection:
                yield connection
            self.steps.step(done=True)

        database.write = stepping  # type: ignore[method-assign]
        for name in ("delete", "put_file", "put_bytes"):
            setattr(store, name, self._stepping(getattr(store, name)))
        self.collector = Collector(catalog, TIMES)
        self.compressor = Compressor(catalog, ALL_IS_COLD)
        self.leases = Leases(catalog)
        parts.sessions.recover()

    def _stepping(self, call: Callable[..., None]) -> Callable[..., None]:
        def stepping(*args: Any) -> None:
            if self.steps.dead or self.steps.then is None:  # nobody else comes in the middle of a transaction
                self.steps.step(done=False)
            call(*args)
            if self.steps.dead or self.steps.then is None:
                self.steps.step(done=True)

        return stepping

    def _set_clock(self, now: float) -> None:
        self.clock = now
        self.parts.clock[0] = now
        self.parts.database.kind.now = sa.literal(now, sa.Double)
        if self.url is not None:
            self.parts.catalog.member.renew()

    def teardown(self) -> None:
        try:
            for push in self.pushes:
                push.session.close()
            self.pushes.clear()
            self.all_is_collected_in_the_end()
        finally:
            self.parts.close()
            self.stack.close()

    # --- what people do ---

    @initialize(seed=st.integers(0, 999))
    def names_to_come(self, seed: int) -> None:
        """Names of objects are drawn by chance, and with them the order in which they are deleted."""
        self.chance.seed(seed)

    def _store(self, push: Open, file: File) -> None:
        data = bytes_of(file)
        path = f"{len(push.files)}.bin"
        found = push.session.ingest(path, len(data), io.BytesIO(data), recipe=recipe_of(file))
        push.entries[path] = found.entry
        push.files.append(file)

    def _begin(self, repo: RepoId) -> Open:
        self.begun.append(Open(repo, self.parts.sessions.open(repo)))
        return self.begun[-1]

    def _publish(self, push: Open, ref: str | None) -> None:
        repo = push.repo
        record = self.parts.catalog.publisher.publish(repo, ref, push.entries, author="", message="").record
        push.session.close()
        self.commits[repo, record.commit] = tuple(push.files)
        self._touch(repo, record.commit)
        self.refs.setdefault(repo, {})
        if ref is not None:
            self._move(repo, ref, record.commit)

    def _touch(self, repo: RepoId, commit: str) -> None:
        self.touched[repo, commit] = self.clock

    def _move(self, repo: RepoId, ref: str, commit: str | None) -> None:
        old = self.refs[repo].pop(ref, None)
        if old == commit:
            self.refs[repo][ref] = old  # type: ignore[assignment]
            return
        if old is not None:
            self._touch(repo, old)
        if commit is not None:
            self._touch(repo, commit)
            self.refs[repo][ref] = commit

    def _kept(self, key: AnyCommit) -> bool:
        repo, commit = key
        return (
            commit in self.refs[repo].values()
            or self.touched[key] > self.clock - KEEP
            or any(until > self.clock for (_, *pinned), until in self.pins.items() if tuple(pinned) == key)
        )

    def _some(self, number: int) -> AnyCommit | None:
        found = sorted(self.commits, key=str)
        return found[number % len(found)] if found else None

    @rule(repo=REPOS, ref=st.none() | REFS, content=CONTENT)
    def publish(self, repo: RepoId, ref: str | None, content: Content) -> None:
        push = self._begin(repo)
        for file in content:
            self._store(push, file)
        self._publish(push, ref)

    @rule(repo=REPOS, content=CONTENT)
    def begin_push(self, repo: RepoId, content: Content) -> None:
        push = self._begin(repo)
        for file in content:
            self._store(push, file)
        self.pushes.append(push)

    @rule(number=st.integers(0, 9), file=FILE)
    def go_on_with_push(self, number: int, file: File) -> None:
        if self.pushes:
            self._store(self.pushes[number % len(self.pushes)], file)

    @rule(number=st.integers(0, 9), reuse=st.integers(0, 9))
    def reuse_a_blob(self, number: int, reuse: int) -> None:
        """What a push does that finds out that a file is here already."""
        key = self._some(reuse)
        if self.pushes and key is not None:
            push, file = self.pushes[number % len(self.pushes)], self.commits[key][0]
            found = push.session.reuse(recipe_of(file).blob)
            if DOMAINS.of(key[0]) == push.session.domain and self._kept(key):
                assert found is not None
            if found is not None:
                push.entries[f"{len(push.files)}.bin"] = found
                push.files.append(file)

    @rule(number=st.integers(0, 9), ref=st.none() | REFS)
    def end_push(self, number: int, ref: str | None) -> None:
        if self.pushes:
            self._publish(self.pushes.pop(number % len(self.pushes)), ref)

    @rule(number=st.integers(0, 9))
    def give_push_up(self, number: int) -> None:
        if self.pushes:
            self.pushes.pop(number % len(self.pushes)).session.close()

    @rule(number=st.integers(0, 9), ref=REFS)
    def set_ref(self, number: int, ref: str) -> None:
        if (key := self._some(number)) is None:
            return
        repo, commit = key
        try:
            self.parts.catalog.set_ref(repo, ref, commit)
        except RevisionNotFound:
            assert not self._kept(key)
            self._gone(key)
        except Conflict:
            assert self._follows(repo, ref)
        else:
            self._move(repo, ref, commit)

    def _follows(self, repo: RepoId, ref: str) -> bool:
        """Whether the ref is not for people to move."""
        return False

    @rule(repo=REPOS, ref=REFS)
    def delete_ref(self, repo: RepoId, ref: str) -> None:
        if ref in self.refs.get(repo, {}):
            self.parts.catalog.delete_ref(repo, ref)
            self._move(repo, ref, None)

    @rule(repo=REPOS)
    def delete_repo(self, repo: RepoId) -> None:
        if repo in self.refs:
            self.parts.catalog.delete_repo(repo)
            del self.refs[repo]
            for key in [key for key in self.commits if key[0] == repo]:
                self._gone(key)

    def _gone(self, key: AnyCommit) -> None:
        del self.commits[key], self.touched[key]
        for pin in [pin for pin in self.pins if pin[1:] == key]:
            del self.pins[pin]

    @rule(number=st.integers(0, 9), holder=st.sampled_from(["n1", "n2"]), seconds=st.sampled_from([0, 50, 3000]))
    def pin(self, number: int, holder: str, seconds: int) -> None:
        if (key := self._some(number)) is None:
            return
        try:
            self.leases.pin(holder, *key, float(seconds))
        except RevisionNotFound:
            assert not self._kept(key)
            self._gone(key)
        else:
            self.pins[holder, *key] = self.clock + seconds

    @rule(number=st.integers(0, 9))
    def ask_where_a_file_lies(self, number: int) -> None:
        if (key := self._some(number)) is None:
            return
        repo, commit = key
        try:
            for entry in self.parts.catalog.contents.manifest(repo, commit).files.values():
                placed = self.parts.catalog.contents.placed(repo, entry.sha256)
                data = bytes_of(next(f for f in self.commits[key] if recipe_of(f).blob == entry.sha256))
                self.readers.append(Reader(placed, data, self.clock + LEASE))
        except (RevisionNotFound, NotFound):
            assert not self._kept(key)

    @rule(seconds=st.sampled_from([1, LEASE, GRACE, GRACE + LEASE + 1, KEEP, 3 * KEEP]))
    def wait(self, seconds: int) -> None:
        self._set_clock(self.clock + seconds)

    @rule()
    def clean(self) -> None:
        self.parts.sessions.work.set()
        self.parts.sessions.clean()

    # --- collections ---

    @rule()
    def collect(self) -> None:
        assert self._collect().problems == []

    def _collect(self) -> Report:
        return self.collector.run()

    @rule()
    def rehearse(self) -> None:
        before = self.parts.objects()
        self.collector.run(dry_run=True)
        assert self.parts.objects() == before

    def _action(self, what: str, repo: RepoId, ref: str, content: Content, number: int) -> Callable[[], None]:
        """What somebody does between two steps of something else."""
        call = {
            "publish": lambda: self.publish(repo, ref, content),
            "begin_push": lambda: self.begin_push(repo, content),
            "end_push": lambda: self.end_push(number, ref),
            "set_ref": lambda: self.set_ref(number, ref),
            "delete_ref": lambda: self.delete_ref(repo, ref),
            "delete_repo": lambda: self.delete_repo(repo),
            "pin": lambda: self.pin(number, "n1", 3000),
            "collect": self.collect,
            "clean": self.clean,
            "reuse": lambda: (self.begin_push(repo, content), self.reuse_a_blob(0, number), None)[-1],
        }[what]
        return lambda: self._unless_it_is_leaving(call)

    def _unless_it_is_leaving(self, call: Callable[[], None]) -> None:
        """Who would write what is being deleted gives up."""
        open_ = list(self.pushes)
        self.begun.clear()
        try:
            call()
        except Unavailable:
            for push in open_ + self.begun:
                if push not in self.pushes:
                    push.session.close()

    @rule(
        step=st.integers(0, 12),
        repo=REPOS,
        ref=REFS,
        content=CONTENT,
        number=st.integers(0, 9),
        what=st.sampled_from(
            ["publish", "begin_push", "end_push", "set_ref", "delete_ref", "delete_repo", "pin", "clean", "reuse"]
        ),
    )
    def collect_while(self, step: int, repo: RepoId, ref: str, content: Content, number: int, what: str) -> None:
        """Something comes between two steps of a collection."""
        self.steps.left, self.steps.then, self.steps.after = step, self._action(what, repo, ref, content, number), False
        try:
            assert self._collect().problems == []
        finally:
            self.steps.left, self.steps.then = -1, None

    @rule(step=st.integers(0, 6), repo=REPOS, content=CONTENT)
    def collect_in_the_middle_of_a_push(self, step: int, repo: RepoId, content: Content) -> None:
        """What was condemned is removed between the steps of storing a file that may share chunks with it."""
        self.collect()
        push = self._begin(repo)
        self.steps.left, self.steps.after = step, False

        def then() -> None:
            self._set_clock(self.clock + GRACE + 1)
            self.collect()

        self.steps.then = then
        try:
            for file in content:
                self._store(push, file)
        finally:
            self.steps.left, self.steps.then = -1, None
        self.pushes.append(push)

    @rule(step=st.integers(0, 20), after=st.booleans())
    def kill_a_collection(self, step: int, after: bool) -> None:
        """It ends at some step, before or after that has come about, and with it its process' pushes."""
        self.steps.left, self.steps.after = step, after
        try:
            self._collect()
            self.steps.left = -1
        except Killed:
            self._die()

    @rule(repo=REPOS, step=st.integers(0, 6), after=st.booleans())
    def kill_a_removal(self, repo: RepoId, step: int, after: bool) -> None:
        """The repository has gone or is whole; its rows go in the end, whenever it was."""
        if repo not in self.refs:
            return
        self.steps.left, self.steps.after = step, after
        try:
            self.parts.catalog.delete_repo(repo)
            self.steps.left = -1
        except Killed:
            self._die()
        try:
            self.parts.catalog.refs(repo)
        except RepoNotFound:
            del self.refs[repo]
            for key in [key for key in self.commits if key[0] == repo]:
                self._gone(key)

    # --- compressions ---

    def _compress(self) -> Compressed:
        return self.compressor.run(Pace(0, lambda: False))

    @rule()
    def compress(self) -> None:
        report = self._compress()
        assert report.problems == []
        assert sum(part.chunks for part in report.by_codec.values()) >= report.compressed

    @rule(
        step=st.integers(0, 12),
        repo=REPOS,
        ref=REFS,
        content=CONTENT,
        number=st.integers(0, 9),
        what=st.sampled_from(["publish", "begin_push", "end_push", "delete_ref", "delete_repo", "collect", "clean"]),
    )
    def compress_while(self, step: int, repo: RepoId, ref: str, content: Content, number: int, what: str) -> None:
        """Something comes between two steps of a compression."""
        self.steps.left, self.steps.then, self.steps.after = step, self._action(what, repo, ref, content, number), False
        try:
            assert self._compress().problems == []
        finally:
            self.steps.left, self.steps.then = -1, None

    @rule(step=st.integers(0, 20), after=st.booleans())
    def kill_a_compression(self, step: int, after: bool) -> None:
        """As a collection."""
        self.steps.left, self.steps.after = step, after
        try:
            self._compress()
            self.steps.left = -1
        except Killed:
            self._die()

    def _die(self) -> None:
        database = self.parts.database
        self.pushes.clear()
        self.steps = Steps()
        if self.url is not None:
            member = self.parts.catalog.member.id
            with database.write(changes=Changes.NOTHING) as connection:
                claims.leave(connection, member)
            self.clock += burial.HOLD_S + 1  # so long what it was deleting is left alone
        self.parts.close()
        self._open()

    # --- what must hold ---

    @invariant()
    def what_is_kept_can_be_read(self) -> None:
        catalog = self.parts.catalog
        for key, content in list(self.commits.items()):
            repo, commit = key
            try:
                manifest = catalog.contents.manifest(repo, commit)
                for file in content:
                    data = bytes_of(file)
                    assert catalog.contents.blob_reader(repo, recipe_of(file).blob).read(0, len(data)) == data
                assert len(manifest.files) == len(content)
            except (RevisionNotFound, RepoNotFound):
                assert not self._kept(key), f"{commit} is kept, but has gone"
                self._gone(key)
        for repo, refs in self.refs.items():
            assert catalog.refs(repo) == refs

    @invariant()
    def what_pushes_rely_on_is_there(self) -> None:
        for push in self.pushes:
            for file, entry in zip(push.files, push.entries.values(), strict=True):
                data = bytes_of(file)
                contents, domain = self.parts.catalog.contents, push.session.domain
                assert contents.has_blob(domain, entry.sha256) is not None
                assert contents.stored_blob(domain, entry.sha256).read(0, len(data)) == data

    @invariant()
    def readers_find_what_they_were_told(self) -> None:
        self.readers = [reader for reader in self.readers if reader.until >= self.clock]
        for reader in self.readers:
            out = bytearray()
            for index in range(len(reader.placed.recipe)):
                out += read_chunk(self.parts.store, reader.placed.locate(index), memoryview(bytearray(BLOCK)))
            assert out == reader.data

    def all_is_collected_in_the_end(self) -> None:
        self._set_clock(self.clock + 4 * KEEP)
        plan = self.collector.run(dry_run=True)
        assert plan.problems == []
        commits = blobs = 0
        for _ in range(4):  # mark, sweep, and what rewriting leaves
            done = self._collect()
            assert done.problems == []
            commits, blobs = commits + done.removed_commits, blobs + done.removed_blobs
            self._set_clock(self.clock + GRACE + LEASE + 1)
        assert (commits, blobs) == (plan.removed_commits, plan.removed_blobs)
        self.what_is_kept_can_be_read()
        catalog, parts = self.parts.catalog, self.parts
        for key in list(self.commits):
            assert self._kept(key), f"{key[1]} is garbage, but still there"
        with parts.database.read() as connection:
            for table in (removals, recounts):
                assert connection.execute(sa.select(table)).all() == []
        records = set()
        for repo, commit in self.commits:
            domain = DOMAINS.of(repo)
            records |= {commit_key(domain, repo, commit)}
            records |= {manifest_key(domain, catalog.resolve(repo, commit).manifest_digest)}
        with parts.database.read() as connection:
            rows = dict(connection.execute(sa.select(objects.c.key, objects.c.size)).all())
            needs = sa.select(blob_objects.c.domain, objects.c.domain, objects.c.key).join(objects)
            for domain, lies_in, key in connection.execute(needs):
                assert domain == lies_in == key.partition("/")[0], f"a blob of {domain} needs {key}"
        stored = {info.key: info.size for info in parts.store.list("") if "/registry/" not in info.key}
        assert {key: size for key, size in stored.items() if key not in records} == rows
        assert records <= stored.keys()
        least, most = self._needed_blobs()
        usage = catalog.contents.usage()
        held = {(DOMAINS.of(repo), file) for (repo, _), files in self.commits.items() for file in files}
        assert usage.unique == sum(len(bytes_of(file)) for _, file in held)
        with parts.database.read() as connection:
            assert least <= set(connection.scalars(sa.text("SELECT sha256 FROM blobs"))) <= most

    def _needed_blobs(self) -> tuple[set[str], set[str]]:
        """The blobs that must be there in the end, and those that may."""
        needed = {recipe_of(file).blob for content in self.commits.values() for file in content}
        return needed, set(needed)


def test_the_same_choices_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Hypothesis can't tell what failed. On a machine whose disk is full and where all takes long, as well."""

    def all_that_is_done() -> list[str]:
        all_: list[str] = []

        class Told(Collecting):
            def _open(self) -> None:
                super()._open()
                step = self.steps.step

                def told(*, done: bool) -> None:
                    all_.append(f"step {self.steps.left} {done}")
                    step(done=done)

                self.steps.step = told  # type: ignore[method-assign]

            def _stepping(self, call: Callable[..., None]) -> Callable[..., None]:
                stepping = super()._stepping(call)

                def told(key: str, *args: Any) -> None:
                    all_.append(f"{call.__name__} {key}")
                    stepping(key, *args)

                return told

        few = settings(depth(3, 25), database=None, phases=[Phase.generate])
        run_state_machine_as_test(seed(1)(Told), settings=few)
        return all_

    before = all_that_is_done()
    assert any(line.startswith("delete public/packs") for line in before)
    passed = itertools.accumulate(itertools.cycle([0.0, 0.0, 3.0]))
    monkeypatch.setattr(burial.time, "clock_gettime", lambda _clock: next(passed))
    monkeypatch.setattr(staged.os, "statvfs", lambda _path: os.statvfs_result([1] * 10))
    assert all_that_is_done() == before


def test_collections_in_any_order() -> None:
    run_state_machine_as_test(Collecting, settings=depth(12, 25))
