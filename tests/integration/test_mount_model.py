"""A real mount against the filesystem that it promises to be (tests/support/promise.py), by rules in any order.

Publishing, moving and removing, reading in every way, evicting, pinning, volumes, killed and upgraded workers: after
each step what the mount shows must be something that it may show, every byte compared, and nothing may hang. The native
mount reads through a slow link, so that files are partly local for a while; the portable one stands beside its
registry.

    HELIOS_MODEL_EXAMPLES=200 pytest -o timeout=0 tests/integration/test_mount_model.py

runs as many examples of more steps, and shrinks what fails.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import random
import signal
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from helios.config import Config
from helios.embedded import attach
from helios.errors import NotFound, Unavailable
from helios.home import Home
from helios.http.client import HttpClient
from helios.mounting import upgrade
from helios.mounts import state_of
from helios.names import RepoId
from helios.publish import LocalFile, publish
from helios.registry_client import RegistryClient
from heliosfs.tree.names import ref_name
from tests.conftest import error_lines
from tests.support.mounts import MODES, Mount, mounted
from tests.support.promise import NAME_S, SLACK_S, File, Repo, World
from tests.support.reading import drop_names, getdents, pread, touch, within
from tests.support.slow_link import SlowLink
from tests.support.writes import WRITES

pytestmark = pytest.mark.fuse

T = TypeVar("T")

EXAMPLES = int(os.environ.get("HELIOS_MODEL_EXAMPLES", "0"))
STEP_S = 45.0
"""No step may take longer; a worker that was killed is back sooner."""

STALE_S = 2.5
"""How long a removed repository may be believed in; see tests/support/promise.py."""

REPLACED = 10 if EXAMPLES else 1
"""Workers that one example may kill or upgrade."""

LINK_BYTES_S = 60e6
SIZES = (0, 1, 4095, 4097, 100_000, (1 << 20) + 17, (5 << 20) + 1)
POOL = [random.Random(number).randbytes(size) for number, size in enumerate(SIZES)]
PATHS = ("weights.bin", "config.json", "a/deep.txt", "a/b/x.bin", "empty", "ünï-ö.txt")
NAMES = ("one", "two")
REFS = ("main", "v1", "refs/pr/1")

repos, refs, paths = st.sampled_from(NAMES), st.sampled_from(REFS), st.sampled_from(PATHS)
picks, offsets = st.integers(0, 7), st.integers(0, SIZES[-1] + 5000)
reads = st.lists(
    st.tuples(offsets, st.integers(0, 2 << 20), st.sampled_from(["read", "map", "fresh"])), min_size=1, max_size=6
)
trees = st.dictionaries(paths, st.integers(0, len(POOL) - 1), min_size=1, max_size=4)


@dataclass
class Scene:
    """A mount, its registry and what was done to it; examples take turns with organisations of their own."""

    mount: Mount
    registry: RegistryClient
    content: Path
    world: World = field(default_factory=World)
    orgs: Iterator[str] = field(default_factory=lambda: (f"org{number}" for number in itertools.count()))
    inodes: dict[tuple[str, bool], int] = field(default_factory=dict)
    orders: dict[tuple[str, str], list[tuple[str, int]]] = field(default_factory=dict)

    def call(self, method: str, path: str, body: object = None) -> Any:
        client = HttpClient(f"unix:{self.mount.state['socket']}", timeout_s=STEP_S)
        try:
            return client.json(method, f"/api/v1/{path}", body=body)
        finally:
            client.close()


@dataclass(frozen=True)
class Failed:
    """How a call on the mount failed."""

    code: int

    def __repr__(self) -> str:
        return errno.errorcode.get(self.code, str(self.code))


@dataclass
class Handle:
    """An open file of a repository; ``since``: when it was opened. ``may``: what it can be."""

    fd: int
    repo: str
    since: float
    may: set[File]


@dataclass
class Listing:
    """An open directory of a commit."""

    fd: int
    repo: str
    since: float
    commit: str
    directory: str


@dataclass
class Volume:
    """What a volume was made of."""

    repo: str
    commit: str
    since: float


class Machine(RuleBasedStateMachine):
    """What may be drawn never depends on what the mount answered: that is a matter of time, too."""

    scene: Scene

    def __init__(self) -> None:
        super().__init__()
        scene = self.scene
        self.world, self.mount, self.root = scene.world, scene.mount, scene.mount.path
        self.org = next(scene.orgs)
        data = [self.org.encode() + data[len(self.org) :] if len(data) > 100 else data for data in POOL]
        self.contents = [File(d, hashlib.sha256(d).hexdigest(), number % 3 == 1) for number, d in enumerate(data)]
        self.locals = [scene.content / f"{self.org}-{number}" for number in range(len(POOL))]
        for path, file in zip(self.locals, self.contents, strict=True):
            path.write_bytes(file.data)
        self.handles: list[Handle] = []
        self.listings: list[Listing] = []
        self.volumes: dict[str, Volume] = {}
        self.pins: dict[str, dict[str, str]] = {}
        self.replaced, self.native = 0, self.mount.state["mode"] == "native"

    def teardown(self) -> None:
        """In the end nothing is too fresh to be judged, and everything is looked at."""
        time.sleep(NAME_S + SLACK_S)
        for short in NAMES:
            self.list_a_repository(short)
            for ref in REFS:
                self.read_a_ref(short, ref)
            for pick in range(8):
                self.read_a_commit(short, pick, mapped=pick % 2 == 0)
        self.list_repositories(hub=True)
        for path in self.locals:
            path.unlink()
        for each in (*self.handles, *self.listings):
            within(STEP_S, lambda fd=each.fd: os.close(fd))
        for name in self.volumes:
            self.control("DELETE", f"volumes/{name}")
        for repo, revisions in self.pins.items():
            for revision in revisions:
                self.control("POST", "unpin", {"model": repo, "revision": revision})
        for repo in map(self.name, NAMES):
            if self.now(repo) is not None:
                self.change(partial(self.scene.registry.delete, RepoId.parse(repo)), self.world.removed, repo)

    # --- helpers ---

    def name(self, short: str) -> str:
        return f"{self.org}/{short}"

    def now(self, repo: str) -> Repo | None:
        return self.world.timeline(repo).now

    def commit(self, repo: str, pick: int) -> str | None:
        """One of the commits that the repository has."""
        state = self.now(repo)
        return sorted(state.commits)[pick % len(state.commits)] if state is not None and state.commits else None

    def change(self, act: Callable[[], object], tell: Callable[..., None], *args: object) -> None:
        """Do something to the registry, and tell the world when that was."""
        begin = time.monotonic()
        act()
        tell(*args, begin, time.monotonic())

    def ask(self, call: Callable[[], T]) -> tuple[T | Failed, float, float]:
        """What a call on the mount gives, and when it began and ended."""
        begin = time.monotonic()

        def tried() -> T | Failed:
            try:
                return call()
            except OSError as error:
                return Failed(errno.EIO if error.errno == errno.EFAULT else error.errno or errno.EIO)

        return within(STEP_S, tried), begin, time.monotonic()

    def missing(self, repo: str, found: object, expected: set[Any], end: float) -> bool:
        """Whether it was said that there is no such thing, which must be possible."""
        if found != Failed(errno.ENOENT):
            return False
        assert None in expected, f"missing, but it is one of {expected}"
        self.world.missed(repo, end)
        return True

    def see(self, repo: str, call: Callable[[], T], may: Callable[[float, float], set[T | None]]) -> None:
        """What a name shows must be one of what it ``may`` show; None is ENOENT."""
        found, begin, end = self.ask(call)
        expected = may(begin, end)
        assert self.missing(repo, found, expected, end) or found in expected, f"{found!r} is none of {expected}"

    def place(self, short: str, ref: str, pick: int, path: str) -> tuple[str, Path, Callable[[float, float], set[Any]]]:
        """A repository, the path of a file in it (by ref, by commit, in the hub's layout), and what that may be.

        The file is there now, in most cases; ``path`` is taken where ``pick`` is 0.
        """
        repo, hub = self.name(short), self.root / f".hub/models--{self.org}--{short}"
        commit, state = self.commit(repo, pick), self.now(repo)
        if commit is None or state is None or pick < 3:
            ref = sorted(state.refs)[pick % len(state.refs)] if state is not None and state.refs and pick else ref
            current = state.refs.get(ref) if state is not None else None
            path = self.one_of(current, path, pick)
            place = self.root / repo / ref_name(ref) / path
            return repo, place, lambda begin, end: self.files(repo, self.world.targets(repo, ref, begin, end), path)
        path = self.one_of(commit, path, pick)
        place = (hub / "snapshots" if pick % 2 else self.root / repo) / commit / path
        commits = lambda begin, end: {commit if there else None for there in self.there(repo, commit, begin, end)}  # noqa: E731
        return repo, place, lambda begin, end: self.files(repo, commits(begin, end), path)

    def one_of(self, commit: str | None, path: str, pick: int) -> str:
        """A path of the commit; another one where ``pick`` is 0."""
        there = sorted(self.world.commits[commit]) if commit is not None else []
        return there[(pick + len(path)) % len(there)] if pick and there else path

    def there(self, repo: str, commit: str, begin: float, end: float) -> set[bool]:
        return self.world.has_commit(repo, commit, begin, end)

    def files(self, repo: str, commits: set[str | None], path: str) -> set[File | None]:
        """What a path may be in one of the commits."""
        return {None if commit is None else self.world.commits[commit].get(path) for commit in commits}

    def may_fail(self, repo: str, since: float, found: object) -> bool:
        """Whether a failed read is the fate of a repository that was removed: nobody has its bytes any more."""
        return found == Failed(errno.EIO) and not self.world.stays(repo, since - STALE_S, time.monotonic())

    # --- what is done to the registry ---

    @initialize(given=st.lists(trees, min_size=3, max_size=3))
    def begin(self, given: list[dict[str, int]]) -> None:
        """Something is there."""
        for short, tree in zip((*NAMES, NAMES[0]), given, strict=True):
            self.publish(short, REFS[0], tree)

    @rule(short=repos, ref=refs, tree=trees)
    def publish(self, short: str, ref: str, tree: dict[str, int]) -> None:
        repo = self.name(short)
        files = {path: self.contents[number] for path, number in tree.items()}
        local = [LocalFile(p, self.locals[n], SIZES[n], files[p].executable) for p, n in sorted(tree.items())]
        begin = time.monotonic()
        done = publish(self.scene.registry, Path("/"), RepoId.parse(repo), ref, files=local)
        self.world.published(repo, ref, done.commit, files, begin, time.monotonic())

    @rule(short=repos, ref=refs, pick=picks)
    def move_a_ref(self, short: str, ref: str, pick: int) -> None:
        repo = self.name(short)
        commit, state = self.commit(repo, pick), self.now(repo)
        if commit is not None and state is not None:
            act = partial(self.scene.registry.set_ref, RepoId.parse(repo), ref, commit, state.refs.get(ref))
            self.change(act, self.world.moved, repo, ref, commit)

    @rule(short=repos, ref=refs)
    def remove_a_ref(self, short: str, ref: str) -> None:
        repo = self.name(short)
        state = self.now(repo)
        if state is not None and ref in state.refs:
            act = partial(self.scene.registry.delete, RepoId.parse(repo), ref)
            self.change(act, self.world.moved, repo, ref, None)

    @rule(short=repos, chance=st.integers(0, 5))
    def remove_a_repository(self, short: str, chance: int) -> None:
        repo = self.name(short)
        if self.now(repo) is not None and not chance:
            self.change(partial(self.scene.registry.delete, RepoId.parse(repo)), self.world.removed, repo)

    @rule(seconds=st.sampled_from([0.2, 1.1]))
    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    # --- names ---

    @rule(short=repos)
    def list_a_repository(self, short: str) -> None:
        repo = self.name(short)

        def may(begin: float, end: float) -> set[frozenset[str] | None]:
            out: set[frozenset[str] | None] = set()
            for state in self.world.states(repo, begin, end):
                if state is None:
                    out |= {None, frozenset()}  # it may go between the lookup and the listing
                else:
                    out.add(frozenset({*map(ref_name, state.refs), *state.refs.values()}))
            return out

        self.see(repo, lambda: frozenset(os.listdir(self.root / repo)), may)

    @rule(hub=st.booleans())
    def list_repositories(self, hub: bool) -> None:
        found, begin, end = self.ask(lambda: set(os.listdir(self.root / (".hub" if hub else self.org))))
        if found == Failed(errno.ENOENT):
            self.world.missed(f"{self.org}/", end)
            found = set()
        assert isinstance(found, set), found
        for short in NAMES:
            shown = (f"models--{self.org}--{short}" if hub else short) in found
            states = self.world.states(self.name(short), begin, end)
            assert shown in {state is not None for state in states}, f"{short} in {found}: {states}"

    @rule(short=repos, ref=refs)
    def read_a_ref(self, short: str, ref: str) -> None:
        repo = self.name(short)
        may = partial(self.world.targets, repo, ref)
        self.see(repo, lambda: os.readlink(self.root / repo / ref_name(ref)), may)
        self.see(repo, (self.root / f".hub/models--{self.org}--{short}/refs" / ref).read_text, may)

    @rule(short=repos, ref=refs, pick=picks, path=paths)
    def look(self, short: str, ref: str, pick: int, path: str) -> None:
        repo, place, may = self.place(short, ref, pick, path)
        found, begin, end = self.ask(lambda: os.stat(place))
        expected = may(begin, end)
        if self.missing(repo, found, expected, end):
            return
        assert isinstance(found, os.stat_result), f"{place}: {found!r}"
        matching = [file for file in expected if file is not None and len(file.data) == found.st_size]
        assert len(matching) == 1, f"{place} has {found.st_size} bytes"
        executable = matching[0].executable and ".hub" not in place.parts
        assert found.st_ino == self.scene.inodes.setdefault((matching[0].sha256, executable), found.st_ino)
        assert stat.S_IMODE(found.st_mode) == (0o555 if executable else 0o444)

    @rule(short=repos, ref=refs, pick=picks, path=paths)
    def attributes(self, short: str, ref: str, pick: int, path: str) -> None:
        repo, place, may = self.place(short, ref, pick, path)
        hashes = lambda begin, end: {file and file.sha256 for file in may(begin, end)}  # noqa: E731
        self.see(repo, lambda: os.getxattr(place, "user.helios.sha256").decode(), hashes)
        tiers = lambda begin, end: {None if None in may(begin, end) else "l1", "l1", "partial", "remote"}  # noqa: E731
        self.see(repo, lambda: os.getxattr(place, "user.helios.tier").decode(), tiers)

    # --- reading ---

    @rule(short=repos, ref=refs, pick=picks, path=paths, mapped=st.booleans())
    def read_whole(self, short: str, ref: str, pick: int, path: str, mapped: bool) -> None:
        repo, place, may = self.place(short, ref, pick, path)
        found, begin, end = self.ask(partial(whole, place, touch if mapped else pread))
        expected = may(begin, end)
        if self.missing(repo, found, expected, end) or self.may_fail(repo, begin, found):
            return
        assert isinstance(found, bytes), f"{place}: {found!r}"
        assert any(file is not None and file.data == found for file in expected), f"{place}: {len(found)} wrong bytes"

    @rule(short=repos, ref=refs, pick=picks, path=paths, times=st.integers(1, 3))
    def open(self, short: str, ref: str, pick: int, path: str, times: int) -> None:
        """Loaders open a file more than once."""
        if len(self.handles) >= 12:
            return
        repo, place, may = self.place(short, ref, pick, path)
        for _ in range(times):
            fd, begin, end = self.ask(lambda: os.open(place, os.O_RDONLY))
            expected = may(begin, end)
            if self.missing(repo, fd, expected, end):
                continue
            assert isinstance(fd, int), f"{place}: {fd!r}"
            size = os.fstat(fd).st_size
            known = {file for file in expected if file is not None and len(file.data) == size}
            self.handles.append(Handle(fd, repo, begin, known))
            assert known, f"{place} has {size} bytes"

    @rule(short=repos, pick=picks, mapped=st.booleans())
    def read_a_commit(self, short: str, pick: int, mapped: bool) -> None:
        for path in PATHS:
            self.read_whole(short, REFS[0], pick, path, mapped)

    @rule(pick=picks, reads=reads)
    def read_open_files(self, pick: int, reads: list[tuple[int, int, str]]) -> None:
        """Here and there, in every way, in one file after the other."""
        if not self.handles:
            return
        for number, (offset, size, how) in enumerate(reads):
            handle = self.handles[(pick + number // 2) % len(self.handles)]
            if how == "fresh":
                os.posix_fadvise(handle.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            offset %= max(len(file.data) for file in handle.may) + 100
            found, *_ = self.ask(partial(touch if how == "map" else pread, handle.fd, size, offset))
            if not self.may_fail(handle.repo, handle.since, found):
                assert isinstance(found, bytes), repr(found)
                assert any(found == file.data[offset : offset + size] for file in handle.may), f"{len(found)} bytes"

    @rule(pick=picks)
    def close(self, pick: int) -> None:
        if not self.handles:
            return
        handle = self.handles.pop(pick % len(self.handles))
        within(STEP_S, lambda: os.close(handle.fd))

    # --- directories of commits ---

    @rule(short=repos, pick=picks, directory=st.sampled_from(["", "a", "a/b"]))
    def list_a_commit(self, short: str, pick: int, directory: str) -> None:
        repo = self.name(short)
        commit = self.commit(repo, pick)
        if commit is None:
            return
        names = self.world.names(commit, directory)
        fd, begin, end = self.ask(lambda: os.open(self.root / repo / commit / directory, os.O_RDONLY | os.O_DIRECTORY))
        if not names:
            assert fd == Failed(errno.ENOENT)
            self.world.missed(repo, end)
            return
        expected = {True if there else None for there in self.there(repo, commit, begin, end)}
        if self.missing(repo, fd, expected, end):
            return
        assert isinstance(fd, int), repr(fd)
        self.listings.append(Listing(fd, repo, begin, commit, directory))

    @rule(pick=picks, size=st.sampled_from([80, 200, 4096]), start=st.integers(0, 5))
    def read_a_listing(self, pick: int, size: int, start: int) -> None:
        """In pieces, from the beginning or from somewhere on: the same order always, whoever serves it."""
        if not self.listings:
            return
        listing = self.listings[pick % len(self.listings)]
        key = (listing.commit, listing.directory)
        order = self.scene.orders.get(key)
        start = 0 if order is None else min(start, len(order))

        def read() -> list[tuple[str, int]]:
            os.lseek(listing.fd, order[start - 1][1] if order and start else 0, os.SEEK_SET)
            found: list[tuple[str, int]] = []
            while part := getdents(listing.fd, size):
                found += part
            return found

        found, _, end = self.ask(read)
        if isinstance(found, Failed):
            assert found.code in (errno.ENOENT, errno.ESTALE, errno.EIO), repr(found)
            assert not self.world.stays(listing.repo, listing.since - STALE_S, end), repr(found)
            return
        if order is None:
            assert {name for name, _ in found} == self.world.names(*key)
            assert len({name for name, _ in found}) == len(found)
            self.scene.orders[key] = found
        else:
            assert found == order[start:]

    # --- writing ---

    @rule(short=repos, pick=picks, name=st.sampled_from(sorted(WRITES)))
    def write(self, short: str, pick: int, name: str) -> None:
        repo = self.name(short)
        commit = self.commit(repo, pick)
        path = commit and next((path for path in sorted(self.world.commits[commit]) if "/" not in path), None)
        if commit is not None and path is not None:
            found, begin, end = self.ask(lambda: WRITES[name](self.root / repo / commit, path))
            gone = found == Failed(errno.ENOENT) and False in self.there(repo, commit, begin, end)
            assert gone or found == Failed(errno.EROFS), f"{name}: {found!r}"

    # --- the control API ---

    def control(self, method: str, path: str, body: object = None) -> tuple[Any, float, float]:
        """An answer of the mount's daemon, None where it knows no such model. A fresh worker may have to start."""
        begin = time.monotonic()
        while True:
            try:
                return self.scene.call(method, path, body), begin, time.monotonic()
            except NotFound:
                return None, begin, time.monotonic()
            except Unavailable:
                assert time.monotonic() < begin + STEP_S
                time.sleep(0.05)

    @rule(short=repos, ref=refs, what=st.sampled_from(["evict", "evict", "pin", "unpin"]))
    def keep(self, short: str, ref: str, what: str) -> None:
        repo = self.name(short)
        answer, begin, end = self.control("POST", what, {"model": repo, "revision": ref})
        if what == "unpin":
            assert bool(answer["unpinned"]) == (repo in self.pins and ref in self.pins[repo])
            self.pins.get(repo, {}).pop(ref, None)
            return
        targets = self.world.targets(repo, ref, begin, end)
        if answer is None:
            assert None in targets
            self.world.missed(repo, end)
            return
        assert answer["commit"] in targets
        if what == "pin":
            self.pins.setdefault(repo, {})[ref] = answer["commit"]
        else:
            pinned = {commit for refs in self.pins.values() for commit in refs.values()}
            kept = {file.sha256 for commit in pinned for file in self.world.commits[commit].values()}
            reasons = {reason for sha256, reason in answer["kept"].items() if sha256 in kept}
            assert reasons <= {"pinned", "in use"}, reasons

    @rule(number=st.integers(0, 1), short=repos, ref=refs)
    def make_or_delete_a_volume(self, number: int, short: str, ref: str) -> None:
        repo, name = self.name(short), f"{self.org}-{number}"
        if name in self.volumes:
            answer, *_ = self.control("DELETE", f"volumes/{name}")
            assert answer == {"deleted": True}
            del self.volumes[name]
            assert self.ask(lambda: os.stat(self.root / ".volumes" / name))[0] == Failed(errno.ENOENT)
            return
        answer, begin, end = self.control("PUT", f"volumes/{name}", {"model": repo, "revision": ref})
        targets = self.world.targets(repo, ref, begin, end)
        if answer is None:
            assert None in targets
            self.world.missed(repo, end)
            return
        assert answer["commit"] in targets
        self.volumes[name] = Volume(repo, answer["commit"], begin)

    @rule(number=st.integers(0, 1), path=paths, hub=st.booleans())
    def read_a_volume(self, number: int, path: str, hub: bool) -> None:
        name = f"{self.org}-{number}"
        volume = self.volumes.get(name)
        place = self.root / ".volumes" / name
        if volume is None:
            assert self.ask(lambda: os.stat(place))[0] == Failed(errno.ENOENT)
            return
        short = volume.repo.partition("/")[2]
        inside = f"hub/models--{self.org}--{short}/snapshots/{volume.commit}" if hub else "model"
        path = self.one_of(volume.commit, path, number)
        found, *_ = self.ask(partial(whole, place / inside / path, pread))
        file = self.world.commits[volume.commit].get(path)
        if file is None:
            assert found == Failed(errno.ENOENT)
        elif not self.may_fail(volume.repo, volume.since, found):
            assert isinstance(found, bytes), f"{place / inside / path}: {found!r}"
            assert found == file.data, f"{place / inside / path}: wrong bytes"

    # --- what happens to the mount ---

    @rule()
    def drop_the_kernels_names(self) -> None:
        within(STEP_S, lambda: drop_names(self.root))

    @precondition(lambda self: self.native and self.replaced < REPLACED)
    @rule(asked=st.booleans())
    def replace_the_worker(self, asked: bool) -> None:
        self.replaced += 1
        if asked:
            within(STEP_S, lambda: upgrade(self.mount.home, self.root))
            return
        state = state_of(self.mount.home, self.root)
        assert state is not None
        assert state.worker is not None
        state.worker.send(signal.SIGKILL)


def whole(path: Path, how: Callable[[int, int, int], bytes]) -> bytes:
    """The file's bytes, and that there are no more."""
    with path.open("rb", buffering=0) as file:
        return how(file.fileno(), SIZES[-1] + 1, 0)


@pytest.fixture(scope="module", params=MODES)
def scene(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Scene]:
    base = tmp_path_factory.mktemp("model")
    home = Home(base / "home")
    (base / "content").mkdir()
    environ = {**os.environ, "HELIOS_HOME": str(home.root)}
    with contextlib.ExitStack() as stack:
        attached = stack.enter_context(attach(Config(), home, environ))
        arguments: list[str] = []
        if request.param == "native":
            parts = urlsplit(attached.urls[0])
            link = stack.enter_context(SlowLink(parts.hostname or "", parts.port or 0, LINK_BYTES_S))
            arguments = ["--registry", link.url]
        mount = stack.enter_context(mounted(home, base / "mnt", *arguments, HELIOS_MOUNT__MODE=request.param))
        scene = Scene(mount, attached.client(), base / "content")
        yield scene
        end = time.monotonic() + STEP_S
        while open_handles(mount):
            assert time.monotonic() < end, "a file that was closed stays open in the mount"
            time.sleep(0.1)
        scene.registry.close()
    lines = [line for path in home.logs.glob("*.log") for line in error_lines(path)]
    # workers that are killed one after the other look like one that crashes
    assert [line for line in lines if '"status": -9' not in line] == []


def open_handles(mount: Mount) -> float:
    try:
        return mount.metric("helios_mount_open_handles")
    except Unavailable:  # a fresh worker is just starting
        return 1.0


def test_the_mount_is_what_it_promises_to_be(scene: Scene) -> None:
    class Here(Machine):
        pass

    Here.scene = scene
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Here,
        settings=settings(
            max_examples=EXAMPLES or 5,
            stateful_step_count=100 if EXAMPLES else 30,
            phases=list(Phase) if EXAMPLES else [Phase.generate],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )
