"""Several real registry processes on one PostgreSQL and one store, as behind a plain load balancer: one registry."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from helios.errors import Conflict, HeliosError, NotFound, Unavailable
from helios.names import RepoId
from helios.publish import publish
from helios.registry_client import RegistryClient
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import blob_key, commit_key, manifest_key, recipe_key
from heliosfs.store.manifest import Manifest
from registry.catalog import Catalog
from registry.metadata.database import Database
from registry.metadata.tables import processes
from tests.support.postgres import running
from tests.support.registry import Registries, Running

ONE = RepoId.parse("org/one")
LEASE_S = "1.5"


@dataclass
class Group:
    """Registries with homes of their own that share ``url`` and ``store``."""

    helios: Any
    root: Path
    url: str
    store: Path
    wait_for: Callable[..., None]
    registries: Registries

    def start(self, *names: str) -> list[Running]:
        """Start processes, all at the same time; on an empty database they make its tables together."""
        return self.registries.start(*(partial(self._start, name) for name in names))

    def _start(self, name: str, log: int) -> subprocess.Popen[str]:
        environ = {
            # Below the test's own home, where what is left behind is looked for.
            "HELIOS_HOME": str(self.root / name),
            "HELIOS_REGISTRY__DATABASE": self.url,
            "HELIOS_REGISTRY__PROCESS_LEASE_S": LEASE_S,
        }
        command = ("registry", "--port", "0", "--json", "--store", self.store)
        started: subprocess.Popen[str] = self.helios.start(*command, env=environ, stderr=log)
        return started

    def check_whole(self, expected: set[str]) -> None:
        """These repositories are there, every commit reads back whole, and soon no object is unaccounted for."""
        assert self._look()[0] == expected
        self.wait_for(lambda: not self._look()[1], 30, "the store holding what commits need, and nothing else")

    def processes(self) -> int:
        """How many processes are taken to be alive."""
        with contextlib.closing(Database.postgres(self.url)) as database, database.read() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(processes)) or 0

    def _look(self) -> tuple[set[str], set[str]]:
        """The repositories, all of whose commits are whole, and objects that none of them needs."""
        with contextlib.closing(Database.postgres(self.url)) as database, DirectoryStore(self.store) as store:
            catalog, needed = Catalog(database, store), set()
            for info in catalog.repos():
                for record in (r for commit in info.refs.values() for r in catalog.history(info.repo, commit)):
                    needed |= {
                        manifest_key("public", record.manifest),
                        commit_key("public", info.repo, record.commit),
                    }
                    for entry in catalog.contents.manifest(info.repo, record.commit).files.values():
                        catalog.contents.blob_reader(info.repo, entry.sha256).verify()
                        needed |= {blob_key("public", entry.sha256), recipe_key("public", entry.recipe)}
            stored = {info.key for info in store.list("public/") if "/registry/" not in info.key}
            assert stored >= needed
            return {info.repo.id for info in catalog.repos()}, stored - needed


@pytest.fixture
def group(
    helios: Any, helios_home: Any, tmp_path: Path, postgres_url: str, wait_for: Callable[..., None]
) -> Iterator[Group]:
    with Registries(helios_home.root) as registries:
        yield Group(helios, helios_home.root, postgres_url, tmp_path / "store", wait_for, registries)


def files(directory: Path, seed: int, count: int = 3, size: int = 300_000) -> Path:
    directory.mkdir(parents=True)
    rng = random.Random(seed)
    for number in range(count):
        (directory / f"{number}.txt").write_bytes(b"t" + rng.randbytes(size))
    return directory


def announced(directory: Path) -> list[dict[str, Any]]:
    return [{"path": p.name, "size": p.stat().st_size, "executable": False} for p in sorted(directory.iterdir())]


def test_a_push_wanders_and_its_commit_is_seen_everywhere(group: Group, tmp_path: Path) -> None:
    running = group.start("a", "b")
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(contextlib.closing(each.client())) for each in running)
        turns = cycle([a, b])
        first = None
        for round_ in range(6):
            model = files(tmp_path / f"m{round_}", round_)
            push = next(turns).start_push(ONE, "main", announced(model), message="", author="").push
            for file in sorted(model.iterdir()):
                next(turns).put_file(push, file.name, file, file.stat().st_size)
            assert next(turns).push_state(push).files == 3
            commit = next(turns).commit_push(push).commit
            # Both had the last commit in memory. What was acknowledged by one is what the other says at once.
            for client in (a, b, a, b):
                assert client.resolve(ONE, "main").commit == commit
                with pytest.raises(NotFound):
                    client.push_state(push)
            first = first or commit
        for target in (first, commit) * 10:
            here, there = next(turns), next(turns)
            here.set_ref(ONE, "dev", target, None if "dev" not in there.refs(ONE) else there.resolve(ONE, "dev").commit)
            assert there.resolve(ONE, "dev").commit == target
            next(turns)
        b.delete(ONE, "dev")
        assert a.refs(ONE).keys() == {"main"}
        given_up = a.start_push(ONE, "main", announced(model), message="", author="").push
        b.abort_push(given_up)
        with pytest.raises(NotFound):
            a.commit_push(given_up)
    group.check_whole({"org/one"})


def test_of_concurrent_pushes_of_one_ref_one_wins(group: Group, tmp_path: Path) -> None:
    running = group.start("a", "b")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(each.client())) for each in running]
        for round_ in range(4):
            pushes = []
            for side, client in enumerate(clients):
                model = files(tmp_path / f"m{round_}{side}", 2 * round_ + side)
                push = client.start_push(ONE, "main", announced(model), message="", author="").push
                for file in model.iterdir():
                    client.put_file(push, file.name, file, file.stat().st_size)
                pushes.append((client, push))
            together, outcomes = threading.Barrier(2), list[str | Conflict]()

            def commit(
                client: RegistryClient, push: str, together: Any = together, outcomes: list[Any] = outcomes
            ) -> None:
                together.wait(10)
                try:
                    outcomes.append(client.commit_push(push).commit)
                except Conflict as error:
                    outcomes.append(error)

            threads = [threading.Thread(target=commit, args=each) for each in pushes]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            won = [outcome for outcome in outcomes if isinstance(outcome, str)]
            assert len(won) == 1
            assert [type(outcome) for outcome in outcomes if outcome not in won] == [Conflict]
            for client, push in pushes:
                assert client.resolve(ONE, "main").commit == won[0]
                with contextlib.suppress(NotFound):  # the winner's is gone already
                    client.abort_push(push)
    group.check_whole({"org/one"})


def test_a_process_killed_in_the_middle_of_pushes_costs_nothing(
    group: Group, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    """Pushers go on at the other one; what the dead one had half done is gone after its lease."""
    a, b = group.start("a", "b")
    models = [files(tmp_path / f"m{n}", n, 6, 2_000_000) for n in range(4)]
    outcomes: dict[int, str] = {}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(each.client())) for each in (a, b)]

        def push_with(number: int) -> None:
            """One whole push: any call that fails with its process is repeated at the next one."""
            turns = cycle(clients[number % 2 :] + clients[: number % 2])

            def anywhere(call: Callable[[RegistryClient], Any]) -> Any:
                for client in [next(turns) for _ in range(6)]:
                    try:
                        return call(client)
                    except (NotFound, Conflict):
                        raise
                    except HeliosError:
                        time.sleep(0.05)
                raise AssertionError("no process took the call")

            repo, model = RepoId.parse(f"org/m{number}"), models[number]
            listed = announced(model)
            push = anywhere(lambda c: c.start_push(repo, "main", listed, message="", author="").push)
            for file in sorted(model.iterdir()):
                anywhere(lambda c, f=file: c.put_file(push, f.name, f, f.stat().st_size))
            try:
                outcomes[number] = anywhere(lambda c: c.commit_push(push).commit)
            except NotFound:  # the answer got lost with its process, the commit did not
                outcomes[number] = anywhere(lambda c: c.resolve(repo, "main").commit)

        threads = [threading.Thread(target=push_with, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        stored = group.store / "public"
        wait_for(lambda: len(list(stored.glob("blobs/*/*"))) >= 3, 30, "the pushes being under way")
        a.kill()
        for thread in threads:
            thread.join(120)
        assert sorted(outcomes) == [0, 1, 2, 3]
        (survivor,) = clients[1:]
        for number, commit in outcomes.items():
            assert survivor.resolve(RepoId.parse(f"org/m{number}"), "main").commit == commit
        # A push that a dead process took and nobody continues is given up like any other.
        left = survivor.start_push(ONE, "main", announced(models[0]), message="", author="").push
        survivor.abort_push(left)
        (a,) = group.start("a")  # comes back
        with contextlib.closing(a.client()) as client:
            again = publish(client, models[0], ONE, "main")
            assert again.new_bytes == 0
    group.check_whole({"org/one", "org/m0", "org/m1", "org/m2", "org/m3"})


def test_a_stopped_process_whose_lease_is_over_can_not_harm(
    group: Group, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    """SIGSTOP in the middle of a file, until the others have cleaned up after it; then it goes on, in vain."""
    a, b = group.start("a", "b")
    model = files(tmp_path / "m", 1, 1, 30_000_000)
    with contextlib.closing(a.client()) as at_a, contextlib.closing(b.client()) as at_b:
        push = at_a.start_push(ONE, "main", announced(model), message="", author="").push
        (file,) = model.iterdir()
        problems: list[HeliosError] = []

        def put() -> None:
            try:
                at_a.put_file(push, file.name, file, file.stat().st_size)
            except HeliosError as error:
                problems.append(error)

        thread = threading.Thread(target=put)
        thread.start()
        wait_for(lambda: any(group.store.glob(".staging/*/[0-9a-f]*")), 20, "the file arriving")
        os.kill(a.pid, signal.SIGSTOP)
        try:
            at_b.abort_push(push)
            wait_for(lambda: group.processes() == 1, 20, "its lease being over")
            commit = publish(at_b, model, ONE, "main").commit
        finally:
            os.kill(a.pid, signal.SIGCONT)
        thread.join(60)
        assert all(isinstance(problem, NotFound | Unavailable) for problem in problems)
        wait_for(lambda: group.processes() == 2, 20, "its coming back")
        assert at_a.resolve(ONE, "main").commit == commit
        assert publish(at_a, model, ONE, "main").new_bytes == 0
    group.check_whole({"org/one"})


def test_a_server_that_is_away_is_said_and_found_again(helios: Any, tmp_path: Path, postgres_server: Any) -> None:
    """Objects go on being served to those who know their keys; everything else says that it can't be told now."""
    model = files(tmp_path / "m", 1)
    with running() as server:
        env = {"HELIOS_REGISTRY__DATABASE": server.url("postgres") + "&password=geheim"}
        process = helios.start("registry", "--port", "0", "--json", env=env)
        found = Running(process, json.loads(process.stdout.readline()))
        with contextlib.closing(found.client()) as client:
            commit = publish(client, model, ONE, "main").commit
            entry = next(iter(Manifest.decode(client.manifest(ONE, commit)).files.values()))
            server.stop()
            with pytest.raises(Unavailable, match="can't be used"):
                client.resolve(ONE, "main")
            for path in ("/healthz", "/api/v1/objects/" + blob_key("public", entry.sha256)):
                with urllib.request.urlopen(found.url + path) as answer:
                    assert answer.status == 200
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(found.url + f"/{ONE.id}/resolve/main/0.txt")
            server.start()
            assert client.resolve(ONE, "main").commit == commit
            assert publish(client, files(tmp_path / "m2", 2), ONE, "main").new_bytes > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "geheim" not in process.stderr.read()
