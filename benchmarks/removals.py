"""How long another writer of the registry's metadata waits while things are removed.

    python -m benchmarks.removals [--commits 5000] [--files 100000] [--delete-s 0.5]

One thread writes a row every few milliseconds, as a push or a lease does, and notes how long each write takes.
Meanwhile, in one SQLite database,

- ``repository``: a repository with so many commits and files is removed (``helios rm``);
- ``files``: a collection removes the files;
- ``commits``: a collection removes most commits of another repository, and the files that nothing else there holds;
- ``push``: a push of as many files is given up, and cleaned up after;
- ``store``: objects are deleted from a store that takes ``--delete-s`` seconds for each, as a cloud store may.

For each the longest and the 99th percentile of the waits and how long the removal took, in seconds. The yardstick is
the same writer with nothing beside it (``alone``).
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from benchmarks.common import save
from helios.names import RepoId
from heliosfs.store.directory import DirectoryStore
from heliosfs.store.keys import blob_key, manifest_key, recipe_key
from heliosfs.store.manifest import FileEntry, Manifest
from registry.burial import bury
from registry.catalog import Catalog
from registry.gc.collect import Collector, Times
from registry.ingest.ingest import Ingest
from registry.metadata import claims
from registry.metadata.database import Changes, Database
from registry.metadata.tables import blob_objects, blobs, chunks, commits, objects, repositories, repository_blobs
from registry.sessions import Sessions

TARGET_S = 1.0
OBJECTS = 8
"""Objects that are deleted from the slow store."""


class Writer:
    """Writes all the time until the block ends; ``waits`` are the seconds that each write took."""

    def __init__(self, database: Database) -> None:
        self._database, self._stop = database, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.waits: list[float] = []

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            began = time.perf_counter()
            with self._database.write(lazy=True, changes=Changes.NOTHING) as connection:
                claims.lease(connection, "writer", "writer", "", self._database.kind.now, 60.0)
            self.waits.append(time.perf_counter() - began)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()


class SlowStore(DirectoryStore):
    """A directory that takes its time to delete."""

    delete_s = 0.0

    def delete(self, key: str) -> None:
        time.sleep(self.delete_s)
        super().delete(key)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fill(
    database: Database, store: DirectoryStore, name: str, count: int, files: int, *, pending: bool = False
) -> None:
    """Rows of a repository whose commits share ``files`` files; with ``pending`` of files that no commit holds.

    Its last commit holds but the first ten of them, so that the others stand in older ones alone.
    """
    digests = [digest(f"{name}/{number}") for number in range(files)]
    with database.write() as connection:
        first = connection.scalar(sa.select(sa.func.coalesce(sa.func.max(objects.c.id), 0))) or 0
        rows = [
            {"id": first + n + 1, "domain": "public", "key": blob_key("public", sha256), "size": 1, "created": 0}
            for n, sha256 in enumerate(digests)
        ]
        connection.execute(objects.insert(), rows)
        common = {"domain": "public", "size": 1, "git_oid": "0" * 40, "lfs": True, "version": 1, "pending": pending}
        connection.execute(blobs.insert(), [{**common, "sha256": d, "recipe": digest(d)} for d in digests])
        needs = [{"domain": "public", "sha256": d, "object": first + n + 1} for n, d in enumerate(digests)]
        connection.execute(blob_objects.insert(), needs)
        places = {"domain": "public", "offset": 0, "length": 1, "encoded": 1, "codec": "none"}
        connection.execute(
            chunks.insert(),
            [{**places, "id": bytes.fromhex(d), "object": first + n + 1} for n, d in enumerate(digests)],
        )
        if pending:
            return
        manifest = Manifest(
            {f"{n}.bin": FileEntry(d, 1, "0" * 40, digest(d), True, False) for n, d in enumerate(digests[:10])}
        )
        values = {"name": f"models/{name}", "kind": "models", "domain": "public", "created": 0, "updated": 0}
        number = connection.execute(repositories.insert().values(values)).inserted_primary_key[0]
        ids = [hashlib.sha1(f"{name}@{n}".encode()).hexdigest() for n in range(count)]
        listed = {"repository": number, "manifest": manifest.digest, "time": 0, "size": files, "record": b"{}" * 300}
        connection.execute(commits.insert(), [{**listed, "commit": id_, "touched": 0} for id_ in ids])
        newest = commits.update().where(commits.c.repository == number, commits.c.commit == ids[0])
        connection.execute(newest.values(touched=int(time.time())))
        held = [{"repository": number, "sha256": d} for d in digests]
        connection.execute(repository_blobs.insert(), held)
    store.put_bytes(manifest_key("public", manifest.digest), manifest.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="How long writers wait for removals.")
    parser.add_argument("--commits", type=int, default=5000, help="commits of a repository")
    parser.add_argument("--files", type=int, default=100_000, help="files of a repository")
    parser.add_argument("--delete-s", type=float, default=0.5, help="seconds that the slow store takes for a removal")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    parser.add_argument("--json", type=Path, help="where the result goes; default benchmarks/results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="helios-removals-", dir=arguments.directory) as root:
        result = measure(Path(root), arguments.commits, arguments.files, arguments.delete_s)
    print(f"{'':12} {'longest':>9} {'p99':>9} {'took':>9}  (seconds; longest: at most {TARGET_S})")
    for what, row in result["median"].items():
        print(f"{what:12} {row['longest_s']:9.3f} {row['p99_s']:9.3f} {row['took_s']:9.3f}")
    print(save(result, arguments.json))


def measure(root: Path, count: int, files: int, delete_s: float) -> dict[str, object]:
    store = SlowStore(root / "store")
    with closing(Database.sqlite(root / "metadata.db")) as database, closing(store):
        catalog = Catalog(database, store)
        sessions = Sessions(catalog, store, Ingest(store, catalog.index))
        out: dict[str, dict[str, float]] = {}

        def timed(what: str, call: Callable[[], object]) -> None:
            with Writer(database) as writer:
                time.sleep(0.2)
                began = time.perf_counter()
                call()
                took = time.perf_counter() - began
                time.sleep(0.1)
            waits = sorted(writer.waits)
            out[what] = {"longest_s": waits[-1], "p99_s": waits[int(len(waits) * 0.99)], "took_s": took}

        collector = Collector(catalog, Times(keep_commits_s=3600.0, grace_s=0.0, lease_s=0.0))
        timed("alone", lambda: time.sleep(1.0))
        fill(database, store, "org/one", count, files)
        timed("repository", lambda: catalog.delete_repo(RepoId.parse("org/one")))
        timed("files", collector.run)
        fill(database, store, "org/two", count, files)
        timed("commits", collector.run)
        fill(database, store, "org/given-up", 0, files, pending=True)
        sessions.work.set()
        timed("push", sessions.clean)
        store.delete_s = delete_s
        keys = [recipe_key("public", digest(f"doomed {n}")) for n in range(OBJECTS)]
        for key in keys:
            store.put_bytes(key, b"x")
        with database.write() as connection:
            claims.doom(connection, keys)
        timed("store", lambda: bury(database, store))
    return {
        "benchmark": "removals",
        "time": int(time.time()),
        "commits": count,
        "files": files,
        "delete_s": delete_s,
        "median": out,
    }


if __name__ == "__main__":
    main()
