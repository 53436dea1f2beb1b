"""Kills and full disks: nothing half-published is ever visible, nothing is left behind, the rest is still served."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from helios.errors import HeliosError, NoSpace
from helios.home import Home
from helios.names import RepoId
from helios.publish import publish
from helios.registry_client import RegistryClient
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.manifest import Manifest
from registry.catalog import Catalog
from registry.metadata import claims
from registry.metadata.database import Changes, Database
from tests.support.disks import fill_up
from tests.support.postgres import Databases, metadata_of
from tests.support.registry import Running, running_registry

pytestmark = pytest.mark.both_databases

BASE = RepoId.parse("org/base")
VICTIM = RepoId.parse("org/victim")


def make_model(directory: Path, seed: int, files: int, size: int) -> Path:
    directory.mkdir(parents=True)
    rng = random.Random(seed)
    for number in range(files):
        (directory / f"part{number:02}.bin").write_bytes(rng.randbytes(size))
    return directory


def check_whole(home: Home, settings: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Every commit of the home's store reads back whole and no object is unaccounted for; returns the refs."""
    with contextlib.closing(metadata_of(home, settings)) as database, DirectoryStore(home.store) as store:
        catalog = Catalog(database, store)
        needed = set()
        for info in catalog.repos():
            for commit in info.refs.values():
                record = catalog.commit_record(info.repo, commit)
                needed |= {f"manifests/{record.manifest}", f"commits/{commit}"}
                for entry in catalog.contents.manifest(info.repo, commit).files.values():
                    reader = catalog.contents.blob_reader(info.repo, entry.sha256)
                    reader.verify()
                    assert reader.size == entry.size
                    needed |= {f"recipes/{entry.recipe}", f"blobs/{entry.sha256}"}
        kinds = {"blobs", "recipes", "manifests", "commits"}
        keys = [info.key.split("/") for info in store.list("public/")]
        stored = {f"{key[1]}/{key[-1]}" for key in keys if key[1] in kinds}
        assert stored == needed
        return {str(info.repo): info.refs for info in catalog.repos()}


@pytest.mark.one_database
@pytest.mark.parametrize("seed", range(3))
def test_a_registry_killed_during_a_push_shows_nothing_of_it(
    helios: Any, helios_home: Home, tmp_path: Path, seed: int
) -> None:
    """On PostgreSQL: test_registry_kills.py, and by chunks test_push_chunks.py."""
    base = make_model(tmp_path / "base", 1, 2, 100_000)
    victim = make_model(tmp_path / "victim", 2 + seed, 12, 3_000_000)
    with running_registry(helios) as registry:
        with contextlib.closing(registry.client(registry.socket)) as client:
            kept = publish(client, base, BASE, "main").commit
            seen: list[object] = []

            def push() -> None:
                try:
                    seen.append(publish(client, victim, VICTIM, "main").commit)
                except HeliosError as error:
                    seen.append(error)

            pusher = threading.Thread(target=push)
            pusher.start()
            time.sleep(random.Random(seed).uniform(0.01, 0.25))
            registry.kill()
            pusher.join(60)
    with running_registry(helios) as registry, contextlib.closing(registry.client(registry.socket)) as client:
        refs = {r.repo: r.refs for r in client.repos()}
        acknowledged = [commit for commit in seen if isinstance(commit, str)]
        assert refs["models/org/base"] == {"main": kept}
        if acknowledged:
            assert refs["models/org/victim"] == {"main": acknowledged[0]}
    assert check_whole(helios_home, helios.environ).keys() == refs.keys()
    with running_registry(helios) as registry, contextlib.closing(registry.client(registry.socket)) as client:
        commit = publish(client, victim, VICTIM, "main").commit
        at = client.resolve(VICTIM, "main")
        assert at.commit == commit
        assert len(Manifest.decode(client.manifest(VICTIM, commit), at.manifest).files) == 12
    check_whole(helios_home, helios.environ)


@pytest.mark.one_database
def test_a_pusher_killed_in_the_middle_leaves_nothing(
    helios: Any, helios_home: Home, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    """Where processes share a database a push outlives the one that began it, until it was idle for too long."""
    victim = make_model(tmp_path / "victim", 9, 10, 4_000_000)
    with running_registry(helios) as registry:
        process = helios.start("push", victim, "org/victim", "--registry", registry.url, stderr=subprocess.DEVNULL)
        with contextlib.closing(registry.client()) as client:
            wait_for(lambda: any((helios_home.store / "public").glob("blobs/*/*")), what="the first file being stored")
            process.kill()
            process.wait(10)
            assert client.repos() == []
    # The registry's end gives the unfinished push up.
    assert check_whole(helios_home, helios.environ) == {}


def test_an_interrupted_push_is_given_up_at_once(
    helios: Any, helios_home: Home, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    import signal

    victim = make_model(tmp_path / "victim", 9, 10, 4_000_000)
    with running_registry(helios) as registry:
        process = helios.start("push", victim, "org/victim", stderr=subprocess.DEVNULL)
        wait_for(lambda: any((helios_home.store / "public").glob("blobs/*/*")), what="the first file being stored")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        wait_for(lambda: not any((helios_home.store / "public").glob("blobs/*/*")), what="its files being removed")
        assert registry.process.poll() is None


@pytest.fixture
def small_disk(tmp_path: Path, helios: Any, wait_for: Callable[..., None]) -> Iterator[Path]:
    """A filesystem of 20 MB, unmounted before the home is looked over."""
    if os.getuid() != 0:
        pytest.skip("mounting a small filesystem needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], check=True)
    yield disk
    wait_for(
        lambda: subprocess.run(["umount", str(disk)], check=False).returncode == 0, 15, "the disk's last user going"
    )


def fill(client: RegistryClient, tmp_path: Path) -> tuple[str, Path]:
    """Publish 6 MB, then fail to publish 24 MB; returns the first commit and the directory that did not fit."""
    commit = publish(client, make_model(tmp_path / "fits", 1, 2, 3_000_000), BASE, "main").commit
    large = make_model(tmp_path / "large", 2, 8, 3_000_000)
    with pytest.raises(NoSpace, match=r"no room|is full"):
        publish(client, large, VICTIM, "main")
    return commit, large


def check_still_served(
    registry: Running, client: RegistryClient, commit: str, free: Callable[[], bool], wait_for: Callable[..., None]
) -> None:
    assert {r.repo: r.refs for r in client.repos()} == {"models/org/base": {"main": commit}}
    at = client.resolve(BASE, "main")
    for entry in Manifest.decode(client.manifest(BASE, commit), at.manifest).files.values():
        assert client.recipe(BASE, entry.sha256)
        assert client.placement(BASE, entry.sha256)
    wait_for(free, what="the space of the failed push coming back")
    assert registry.process.poll() is None


def free_bytes(disk: Path) -> int:
    space = os.statvfs(disk)
    return space.f_bavail * space.f_frsize


def test_a_full_store(helios: Any, tmp_path: Path, small_disk: Path, wait_for: Callable[..., None]) -> None:
    with running_registry(helios, "--store", str(small_disk / "store")) as registry:
        with contextlib.closing(registry.client(registry.socket)) as client:
            commit, large = fill(client, tmp_path)
            check_still_served(registry, client, commit, lambda: free_bytes(small_disk) > 13_000_000, wait_for)
            result = helios("push", large, "org/victim", code=1)
            assert "no room" in result.err
            assert "Traceback" not in result.err
            assert result.out == ""
            small = make_model(tmp_path / "small", 3, 1, 1_000_000)
            publish(client, small, VICTIM, "main")


@pytest.mark.one_database
def test_a_full_home(helios: Any, tmp_path: Path, small_disk: Path, wait_for: Callable[..., None]) -> None:
    """Metadata and store on one disk, through the command line and the embedded registry."""
    env = {"HELIOS_HOME": str(small_disk / "home")}
    fits = make_model(tmp_path / "fits", 1, 2, 3_000_000)
    large = make_model(tmp_path / "large", 2, 8, 3_000_000)
    commit = helios("push", fits, "org/base", env=env).out.strip()
    result = helios("push", large, "org/victim", env=env, code=1)
    assert "Traceback" not in result.err
    assert [r["repo"] for r in helios("ls", "--json", env=env).json()] == ["org/base"]
    assert helios("show", "org/base", "--json", env=env).json()["commit"] == commit
    wait_for(lambda: free_bytes(small_disk) > 12_000_000, what="the space of the failed push coming back")
    home = Home(small_disk / "home")
    wait_for(lambda: not (home.run / "registry.json").exists(), 15, "the registry's end")
    assert check_whole(home, helios.environ).keys() == {"models/org/base"}


@pytest.mark.one_database
def test_a_disk_that_is_full_already(helios: Any, tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(free_bytes(small_disk)))
    result = helios("ls", env={"HELIOS_HOME": str(small_disk / "home")}, code=1)
    assert "Traceback" not in result.err
    assert "No space left" in result.err or "full" in result.err


IMPATIENT = """
import errno, os, sys
from pathlib import Path
from registry import threads, upkeep
from registry.gc import jobs
from registry.burial import bury
jobs.BURY_S = upkeep.AGAIN_S = 0.2
begin = Path(os.environ["BEGIN"])
jobs.bury = lambda database, store: bury(database, store) if begin.exists() else 0
if len(sys.argv) > 1 and sys.argv[1] == "breaking":
    del sys.argv[1]
    broken, whole = set(), threads.Threads.__call__
    async def call(self, call, /, *args, **kwargs):
        if self._executor._thread_name_prefix == "upkeep" and call.__qualname__ not in broken:
            broken.add(call.__qualname__)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return await whole(self, call, *args, **kwargs)
    threads.Threads.__call__ = call
from helios.cli.main import main
sys.exit(main())
"""
"""The registry, with upkeep that is due all the time; ``breaking``: each thing it does breaks the first time."""


@contextlib.contextmanager
def impatient(home: Path, log: Path, *args: str, **settings: str) -> Iterator[Running]:
    command = [sys.executable, "-c", IMPATIENT, *args, "registry", "--port", "0", "--json"]
    environ = {
        **os.environ,
        "HELIOS_HOME": str(home),
        "HELIOS_LOG__FORMAT": "json",
        "BEGIN": str(log.with_name("begin")),
        **settings,
    }
    with log.open("w") as stderr, subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            yield Running(process, json.loads(process.stdout.readline()))
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def told(log: Path, message: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, log.read_text().splitlines()) if line["message"] == message]


@pytest.mark.one_database
def test_a_disk_that_fills_up_is_no_reason_to_end(
    tmp_path: Path, small_disk: Path, wait_for: Callable[..., None]
) -> None:
    """What was given up can't be noted as deleted then; what is held is served, and room makes all well."""
    home, log = Home(small_disk / "home"), tmp_path / "log"
    with impatient(home.root, log) as registry, contextlib.closing(registry.client()) as client:
        publish(client, make_model(tmp_path / "fits", 1, 2, 1_000_000), BASE, "main")
        with contextlib.closing(Database.sqlite(home.registry / "metadata.db")) as database:
            # Each is a row to be crossed off, and that needs room.
            with database.write(changes=Changes.NOTHING) as connection:
                claims.doom(connection, [f"public/blobs/{number:02x}/{number:064x}" for number in range(64)])
            others = fill_up(small_disk)
            log.with_name("begin").touch()
            wait_for(lambda: len(told(log, "could not clean up; trying again later")) >= 3, 30, what="failing, thrice")
            assert "is full" in told(log, "could not clean up; trying again later")[0]["error"]
            assert registry.process.poll() is None
            assert client.manifest(BASE, client.resolve(BASE, "main").commit)
            others.unlink()

            def buried() -> bool:
                with database.read() as connection:
                    return not claims.some_doomed(connection, database.kind.now, 1)

            wait_for(buried, 30, what="their being crossed off")
        publish(client, make_model(tmp_path / "more", 2, 1, 1_000_000), VICTIM, "main")


def test_upkeep_that_breaks_is_begun_again_and_ends_nothing(
    helios_home: Home, tmp_path: Path, wait_for: Callable[..., None], databases: Databases
) -> None:
    log = tmp_path / "log"
    with (
        impatient(helios_home.root, log, "breaking", **databases()) as registry,
        contextlib.closing(registry.client()) as client,
    ):
        upkeep = {"pushes", "store", "uploads", "jobs", "usage"}
        again = "upkeep broke; trying again later"
        wait_for(lambda: {line["what"] for line in told(log, again)} >= upkeep, 30, what="all of it breaking")
        publish(client, make_model(tmp_path / "fits", 1, 2, 1_000), BASE, "main")
        assert registry.process.poll() is None


@pytest.mark.one_database
def test_memory_stays_bounded(helios: Any, tmp_path: Path) -> None:
    """200 MB in and out in parallel: RssAnon + RssShmem stay below 150 MB (the promise is 300 for any size)."""
    directory = tmp_path / "model"
    directory.mkdir()
    for number in range(4):
        with open(directory / f"{number}.bin", "wb") as file:
            for _ in range(50):
                file.write(os.urandom(1_000_000))
    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        publish(client, directory, BASE, "main")
        script = "import sys, urllib.request as u\nwhile u.urlopen(sys.argv[1]).read(1 << 20): break\n"
        at = client.resolve(BASE, "main")
        entries = Manifest.decode(client.manifest(BASE, at.commit), at.manifest).files.values()
        url = (
            registry.url + f"/api/v1/objects/public/blobs/{next(iter(entries)).sha256[:2]}/{next(iter(entries)).sha256}"
        )
        subprocess.run([sys.executable, "-c", script, url], check=True)
        rss = 0
        for line in Path(f"/proc/{registry.pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                rss += int(line.split()[1]) * 1024
    assert rss < 150_000_000
