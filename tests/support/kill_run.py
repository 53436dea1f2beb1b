"""Kills of a registry under mixed load: ``python -m tests.support.kill_run --engine sqlite --kills 100 --seed 1``.

Real registry processes serve clients of every kind (kill_work.py) and are killed, by SIGKILL at a random moment or at a
random one of their own steps (dying.py), also while they start. Each time what the refs show is compared with what the
clients were told (kill_journal.py). At the end everything is read, collected, verified and counted.

    sqlite      one process, SQLite and a directory
    postgres    two processes on one PostgreSQL and one directory; one of them, or both, are killed
    s3          one process, SQLite and a bucket of moto's
    front       the same with a front store that acknowledges before the cloud has it (kill_front.py)
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from helios.config import RegistrySettings
from helios.errors import HeliosError, Unavailable
from helios.home import Home
from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import commit_key, manifest_key, recipe_key
from heliosfs.store.opening import open_objects
from registry.catalog import Catalog
from registry.metadata import claims, mirror, repositories
from registry.metadata.database import Database
from registry.metadata.sharing_tables import uploads
from registry.metadata.tables import pushes
from tests.support.cloud_proxy import CloudProxy
from tests.support.cloud_servers import credentials, moto
from tests.support.kill_front import FrontSite, read_all
from tests.support.kill_journal import Journal, Tree
from tests.support.kill_member import Member
from tests.support.kill_work import KINDS, Mirroring, Moving, Work, client, tree_of
from tests.support.postgres import running as running_postgres
from tests.support.upstream import Upstream

SETTINGS: Final = {
    "KEEP_HISTORY": "false",
    "KEEP_COMMITS_S": "1",
    "GC_GRACE_S": "0.5",
    "GC_EVERY_S": "0",
    "LEASE_S": "2",
    "PROCESS_LEASE_S": "2",
    "MIRROR": "on",
    "MIRROR_RULES": '[{"ttl_s": 0.5}, {"repo": "org/*", "policy": "local"}]',
    "PULL_STALL_S": "10",
    "REDIRECT": "never",
    "VERIFY_MB_S": "0",
}
"""Everything goes as soon as it may."""
OURS: Final = tuple(f"models/{org}/" for org in ("org", "held", "box"))
GONE_S: Final = 5.0
"""A connection that broke shows before the process is gone: so long before, at most, in seconds."""
WORK_S: Final = 12.0
"""Longest wait until clients were told something again, in seconds: a machine may be busy."""
PATIENCE_S: Final = 90.0
"""Longest wait for the clients' calls to end when nothing is killed, in seconds."""


class Run:
    """One run. ``problems`` is what it found."""

    def __init__(
        self,
        root: Path,
        seed: int,
        members: list[Member],
        hub: Upstream,
        open_catalog: Callable[[], Any],
        front: FrontSite | None = None,
    ) -> None:
        """``open_catalog`` looks at what lasts: the database and, where there is a front, the cloud without it."""
        self.front, self.waited = front, list[int]()
        """Objects that waited for the cloud at each kill."""
        self.root, self.rng, self.members, self.hub = root, random.Random(seed), members, hub
        self.open_catalog = open_catalog
        self.journal, self.problems = Journal(), list[str]()
        self.read_again = 0
        self.killed: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._going, self._over = threading.Event(), threading.Event()
        self._busy = 0
        self._changed = threading.Condition()
        self._moves: list[tuple[str | None, str, str, str]] = []
        self.works: list[Work] = []

    # --- clients ---

    def _start_work(self) -> list[threading.Thread]:
        for number, kind in enumerate(KINDS):
            directory = self.root / f"client-{number}"
            directory.mkdir()
            work = kind(list(self.members), self.journal, random.Random(self.rng.random()), directory, number)
            if isinstance(work, Mirroring):
                work.hub = self.hub
            if isinstance(work, Moving):
                work.shared = self._moves
            self.works.append(work)
        threads = [threading.Thread(target=self._work, args=(work,), daemon=True) for work in self.works]
        for thread in threads:
            thread.start()
        return threads

    def _work(self, work: Work) -> None:
        while not self._over.is_set():
            if not self._going.wait(0.2) or not any(m.serving and m.alive for m in self.members):
                time.sleep(0.05)
                continue
            with self._changed:
                if not self._going.is_set():
                    continue
                self._busy += 1
            lives = [member.lives if member.serving else -1 for member in self.members]
            try:
                work.step()
            except (HeliosError, OSError, http.client.HTTPException) as error:
                self._judge(work, error, lives)
            except BaseException as error:
                self._found(f"{type(work).__name__}: {error!r}\n{traceback.format_exc()}")
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()
            time.sleep(0.01)

    def _judge(self, work: Work, error: Exception, lives: list[int]) -> None:
        """A request may fail because of a kill, and for no other reason."""
        end = time.monotonic() + GONE_S
        while not (killed := self._somebody_died(lives)) and time.monotonic() < end:
            time.sleep(0.05)
        name = f"{type(work).__name__}: {getattr(error, 'code', type(error).__name__)}"
        self.errors[name] += 1
        if not killed:
            self._found(f"nobody was killed, but {type(work).__name__} failed: {error!r}\n{traceback.format_exc()}")

    def _somebody_died(self, lives: list[int]) -> bool:
        return not all(m.alive and m.serving for m in self.members) or lives != [m.lives for m in self.members]

    def _found(self, problem: str) -> None:
        self.problems.append(problem)
        print(f"PROBLEM {problem}", flush=True)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Nobody asks for anything, and all that was asked for has ended."""
        self._going.clear()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._busy, PATIENCE_S):
                raise AssertionError("calls did not end")
        yield
        self._going.set()

    # --- kills ---

    def kill_often(self, kills: int) -> None:
        """Run the load and kill ``kills`` times."""
        self._prepare()
        threads = self._start_work()
        try:
            if self.front is not None:
                self.front.unsettle()
            self._going.set()
            told = 0
            plans = {id(member): 0 for member in self.members}
            while sum(self.killed.values()) < kills and len(self.problems) < 5:
                self._let_work()
                victims = [self.rng.choice(self.members)]
                if len(self.members) > 1 and self.rng.random() < 0.2:
                    victims = list(self.members)
                for victim in victims:
                    self._kill(victim, by_itself=plans[id(victim)] > 0)
                if self.front is not None:
                    waiting, problems = self.front.look()
                    self.waited.append(waiting)
                    for problem in problems:
                        self._found(problem)
                for victim in victims:
                    plans[id(victim)] = self._start(victim)
                with self._quiet():
                    self.problems += self._look()
                if (total := sum(self.killed.values())) // 10 > told:
                    told = total // 10
                    print(f"{sum(self.killed.values())} kills: {self.summary()}", flush=True)
        finally:
            self._over.set()
            self._going.set()
            for thread in threads:
                thread.join(PATIENCE_S)
            if any(thread.is_alive() for thread in threads):
                self._found("a client hangs")

    def _let_work(self) -> None:
        """For a moment; with a front until something waits or may wait there, unless that takes too long."""
        wanted = self.journal.acknowledged + self.rng.randrange(3)
        end = time.monotonic() + (WORK_S if self.front is not None else 0.0)
        while self.journal.acknowledged < wanted and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.3 + 1.5 * self.rng.random())

    def _kill(self, victim: Member, *, by_itself: bool) -> None:
        end = time.monotonic() + 4.0
        while by_itself and victim.alive and time.monotonic() < end:
            time.sleep(0.02)
        if victim.alive:
            victim.kill()
            self.killed["at a moment"] += 1
            return
        assert victim.process is not None
        if victim.process.returncode != -signal.SIGKILL:
            self._found(f"a registry ended by itself: exit {victim.process.returncode}")
        self.killed["at a step"] += 1

    def _start(self, victim: Member) -> int:
        """Start it again; returns the step at which it is going to end, 0 for none."""
        while True:
            step = int(10 ** self.rng.uniform(0.5, 3.4)) if self.rng.random() < 0.6 else 0
            if victim.start(step):
                return step
            self.killed["while starting"] += 1

    # --- looks ---

    def _prepare(self) -> None:
        """Commits for a ref to be moved between."""
        for member in self.members:
            member.start()
        work = Work(list(self.members), self.journal, random.Random(self.rng.random()), self.root, 99)
        for number in range(4):
            files, tree = work.files()
            work.push(Moving.REPO, f"v{number}", files, tree)
        with client(self.members[0]) as registry:
            registry.set_ref(Moving.REPO, "main", registry.refs(Moving.REPO)["v0"], None, author="start")

    def _look(self) -> list[str]:
        """Compare the refs that a process shows with the journal, and read a file of some commits."""
        found: dict[str, dict[str, Tree]] = {}
        problems = []
        member = self.rng.choice(self.members)
        try:
            with client(member) as registry:
                for info in registry.repos():
                    found[info.repo] = {ref: tree_of(registry, info.id, commit) for ref, commit in info.refs.items()}
        except Unavailable:
            assert member.process is not None
            member.process.wait(GONE_S)
            return []  # its step has come; there will be another look
        found.get(str(Moving.REPO), {}).pop("main", None)
        problems += self.journal.check(found, ours=OURS)
        for problem in problems:
            print(f"PROBLEM after a kill: {problem}", flush=True)
        return problems

    def check_all(self) -> None:
        """The end: all is read, collected, verified, counted, and nothing is left that nobody needs."""
        for member in self.members:
            if member.alive:
                member.stop()
        self._let_time_pass()
        for member in self.members:
            member.start()
        first = self.members[0]
        if self.front is not None:
            self.problems += self.front.drain(first)
        self.problems += self._look()
        self._check_moves()
        for member in self.members:
            self._pull_all(member)
        with client(first) as registry:
            report: dict[str, Any] = {}
            end = time.monotonic() + 60
            while time.monotonic() < end:
                report = list(registry.collect(dry_run=False, timeout_s=60))[-1]
                if not (report["waiting_objects"] or report["condemned_commits"] or report["condemned_blobs"]):
                    break
                time.sleep(0.5)
            if report["waiting_objects"] or report["condemned_commits"] or report["condemned_blobs"]:
                self._found(f"collections do not come to an end: {report}")
            if self.front is not None:
                self.problems += self.front.drain(first)
            found = list(registry.verify(None, 1.0, repair=False, timeout_s=120))[-1]
            if found["damaged"] or found["stray_objects"]:
                self._found(f"a verification found {found}")
            self.verified = found
            usages = registry.usages()
            counted = sum(row["stored"] for row in usages["repos"]) + usages["unheld"]
            if abs(counted - usages["total"]["stored"]) > len(usages["repos"]) + 2:
                self._found(f"the parts of what is stored add up to {counted}: {usages}")
        for member in self.members:
            member.stop()
        self._check_store(usages["total"]["stored"])
        self._check_leftovers()
        if self.front is not None:
            self.problems += self.front.check()
            self._check_without(self.front)
        for member in self.members:
            self.problems += [f"logged: {line}" for line in member.errors()]

    def _check_without(self, front: FrontSite) -> None:
        """The front's disk is lost after the cloud has caught up: nothing else is."""
        front.wipe()
        (first,) = self.members
        first.start()
        self.problems += self._look()
        self.read_again, problems = read_all(first)
        self.problems += problems
        first.stop()

    def _let_time_pass(self) -> None:
        """Pushes and uploads that their clients gave up stay for an hour, for others to go on with: it is over."""
        with self.open_catalog() as (catalog, _), catalog.database.write() as connection:
            for table in (pushes, uploads):
                connection.execute(table.update().values(used=table.c.used - 3601))

    def _pull_all(self, member: Member) -> None:
        """Bring what the upstream has, so that nothing of a download is left to go on with."""
        for name in self.hub.repos:
            with client(member) as registry:
                for _ in registry.pull(RepoId.from_canonical(name), "main", timeout_s=60):
                    pass

    def _check_moves(self) -> None:
        """The audit of the ref that many move is one chain, and has all that was acknowledged, and nothing refused."""
        with client(self.members[0]) as registry:
            moves = list(reversed(registry.ref_history(Moving.REPO, "main", limit=1000)))
            now = registry.resolve(Moving.REPO, "main").commit
        broken = [(a, b) for a, b in itertools.pairwise(moves) if a.new != b.old]
        if broken or moves[-1].new != now:
            self._found(f"the history of {Moving.REPO} is no chain: {broken[:3]}")
        if len(moves) >= 1000:
            self._found("too many moves to look at")
        done = Counter(move.author for move in moves)
        for old, new, outcome, author in self._moves:
            if (outcome == "done" and done[author] != 1) or (outcome == "refused" and done[author]):
                self._found(f"a move {old} -> {new} was {outcome}, and is {done[author]} times in the history")

    def _check_store(self, counted: int) -> None:
        """Read every commit there is past the registry, and compare objects with what commits need."""
        with self.open_catalog() as (catalog, store):
            needed, blobs = set(), set()
            with catalog.database.read() as connection:
                commits = list(repositories.all_commits(connection))
                kept = mirror.downloaded(connection)
            for _, repo, commit, digest in commits:
                needed |= {manifest_key("public", digest), commit_key("public", repo, commit)}
                files = catalog.contents.manifest(repo, commit).files
                tree = frozenset((path, entry.sha256) for path, entry in files.items())
                if problem := self.journal.check_tried(str(repo), tree):
                    self._found(problem)
                for entry in files.values():
                    if entry.sha256 not in blobs:
                        blobs.add(entry.sha256)
                        digest_found = hashlib.sha256()
                        for data in catalog.contents.stored_blob("public", entry.sha256).iterate(0, entry.size):
                            digest_found.update(data)
                        if digest_found.hexdigest() != entry.sha256:
                            self._found(f"{repo}@{commit} holds wrong bytes of {entry.sha256}")
                    needed |= {recipe_key("public", entry.recipe)}
            stored = {i.key: i.size for i in store.list("public/") if "/registry/" not in i.key}
            with catalog.database.read() as connection:
                named = claims.named(connection, stored.keys() - needed)
                claimed = claims.claimed(connection, stored.keys() - needed)
            # Objects of chunks go by rows, which say what blobs need; a recipe in the rows is of a blob that is there.
            rest = {key for key in stored.keys() - needed if not key.startswith(("public/blobs/", "public/packs/"))}
            if rest and not kept:
                held = f"{len(rest & named)} named, {len(rest & claimed)} claimed"
                self._found(f"objects that nothing needs: {sorted(rest)[:5]} ({len(rest)}: {held})")
            if lost := needed - stored.keys():
                self._found(f"objects that are missing: {sorted(lost)[:5]} ({len(lost)})")
            whole = sum(size for key, size in stored.items() if key.startswith(("public/blobs/", "public/packs/")))
            recipes = sum(size for key, size in stored.items() if key.startswith("public/recipes/"))
            if not whole <= counted <= whole + recipes:
                self._found(f"{whole} + {recipes} bytes lie in the store, {counted} are counted")
            self.stored = whole, len(commits), len(blobs)

    def _check_leftovers(self) -> None:
        """No temporary file of any process is left, and no download."""
        for member in self.members:
            registry = member.home / "registry"
            for directory in (registry / "pulls", registry / "uploads", registry / "staging", registry / "xet"):
                left = [p for p in directory.rglob("*") if p.is_file() and p.name != ".lock"]
                if left:
                    self._found(f"left behind: {left[:5]} ({len(left)})")
        staging = [p for p in self.root.glob("store/.staging/**/*") if p.is_file() and p.stat().st_size]
        if staging:
            self._found(f"left behind: {staging[:5]} ({len(staging)})")

    def summary(self) -> str:
        turns: Counter[str] = Counter()
        for work in self.works:
            turns.update(work.turns)
        told = self.journal
        return (
            f"killed {dict(self.killed)}; {told.acknowledged} changes acknowledged, {told.in_doubt} in doubt, "
            f"{told.refused} refused; {dict(sorted(turns.items()))}"
        )


@contextlib.contextmanager
def site(engine: str, root: Path, seed: int) -> Iterator[Run]:
    """A run's processes, upstream and servers."""
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(Upstream())
        settings = {**SETTINGS, "UPSTREAM": hub.url}
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("HELIOS_", "HF_"))}
        store = root / "store"
        made: RegistrySettings | None = None
        front: FrontSite | None = None
        if engine in ("s3", "front"):
            server = stack.enter_context(moto(root))
            stack.enter_context(credentials(server))
            proxy = stack.enter_context(CloudProxy(server.url)) if engine == "front" else None
            endpoint = proxy.url if proxy is not None else ""
            found: Any = server.settings(endpoint=endpoint, prefix="kills/store", redirect="never")
            made = found
            if proxy is not None:
                front = FrontSite(
                    root / "front", root / "a", proxy, seed, lambda: open_objects(found, store, root / "looking")
                )
                settings |= front.settings()
            settings |= {"STORE": found.store, "STORE_OPTIONS": msgspec.json.encode(found.store_options).decode()}
            environ |= server.environ
        else:
            settings["STORE"] = str(store)
        url = ""
        if engine == "postgres":
            url = stack.enter_context(stack.enter_context(running_postgres()).database())
            settings["DATABASE"] = url
        environ |= {f"HELIOS_REGISTRY__{name}": value for name, value in settings.items()}
        members = [
            Member(root / name, {**environ, "HELIOS_HOME": str(root / name)}, root / f"{name}.log")
            for name in (("a", "b") if engine == "postgres" else ("a",))
        ]

        @contextlib.contextmanager
        def open_catalog() -> Iterator[tuple[Catalog, Any]]:
            home = Home(members[0].home)
            with contextlib.ExitStack() as inner:
                database = Database.postgres(url) if url else Database.sqlite(home.registry / "metadata.db")
                inner.callback(database.close)
                if made is None:
                    objects: Any = DirectoryStore(store)
                else:
                    objects = open_objects(made, store, root / "looking")
                inner.callback(objects.close)
                yield Catalog(database, objects), objects

        try:
            yield Run(root, seed, members, hub, open_catalog, front)
        finally:
            for member in members:
                if member.alive:
                    member.kill()
                member.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["sqlite", "postgres", "s3", "front"], default="sqlite")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, help="work here, and leave it")
    arguments = parser.parse_args()
    print(f"{arguments.engine}: {arguments.kills} kills, seed {arguments.seed}", flush=True)
    with contextlib.ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="helios-kills-", ignore_cleanup_errors=True)
        root = Path(arguments.keep or stack.enter_context(made)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        run = stack.enter_context(site(arguments.engine, root, arguments.seed))
        started = time.monotonic()
        run.kill_often(arguments.kills)
        run.check_all()
        print(f"{arguments.engine}, seed {arguments.seed}, {time.monotonic() - started:.0f} s: {run.summary()}")
        print(f"errors that clients saw: {dict(sorted(run.errors.items()))}")
        if hasattr(run, "stored"):
            print(
                "at the end: {0} bytes of {2} files in {1} commits, all read; verified: {3}".format(
                    *run.stored, json.dumps({k: v for k, v in run.verified.items() if not isinstance(v, list)})
                )
            )
        if run.waited:
            print(f"objects that waited for the cloud at each kill: {run.waited}")
            print(f"read again without the front: {run.read_again} files")
        print(f"problems: {len(run.problems)}")
        if run.problems:
            for member in run.members:
                print(member.log.read_text()[-2000:])
    return 1 if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())
