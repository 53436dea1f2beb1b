"""Looking at what is stored: chunks against their hashes, records against their digests, objects against rows.

Work goes on meanwhile, so whatever seems wrong is looked at again before it is said to be: an object may have come or
gone between the listing and the rows, a chunk may have moved.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Final

import msgspec
from blake3 import blake3

from helios.errors import IntegrityError, NotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.chunks import read
from heliosfs.store.keys import KINDS, commit_key, manifest_key
from registry.catalog import Catalog
from registry.gc.records import Record
from registry.metadata import claims, gc, inventory, moving, repositories
from registry.metadata.inventory import Stored
from registry.metadata.moving import Held

PAGE: Final = 200
BATCH: Final = 5000
MAX_SAID: Final = 1000
"""Most problems of each sort that a result lists; all are counted."""


_CHUNKS: Final = ("packs", "blobs")
_RECORDS: Final = tuple(kind for kind in KINDS if kind not in _CHUNKS)


def _kind(stored: Stored) -> str:
    return stored.key.split("/")[1]


class Damage(msgspec.Struct, frozen=True):
    """An object that is ``missing``, has another ``size``, or holds ``bytes`` that are wrong: of one chunk, or of the
    whole record. ``blobs`` need it."""

    object: str
    kind: str
    blobs: list[str]
    chunk: str | None = None


class Findings(msgspec.Struct):
    """What was looked at and what was found. ``strays`` are stored objects that nothing names."""

    objects: int = 0
    chunks: int = 0
    bytes: int = 0
    damaged: int = 0
    damage: list[Damage] = []
    stray_objects: int = 0
    strays: list[str] = []

    def found(self, damage: Damage) -> None:
        self.damaged += 1
        if len(self.damage) < MAX_SAID:
            self.damage.append(damage)

    def result(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        out: dict[str, Any] = msgspec.to_builtins(self)
        return out


class Pace:
    """Keeps reading below a rate in bytes a second (0: any); raises Unavailable once ``stopped`` says so."""

    def __init__(self, rate: float, stopped: Callable[[], bool]) -> None:
        self._rate, self._stopped = rate, stopped
        self._start, self._read = time.monotonic(), 0

    def read(self, count: int) -> None:
        """So many bytes were read."""
        self._read += count
        while True:
            if self._stopped():
                raise Unavailable("it was stopped", hint="Start it again: what was done stays done.")
            early = self._read / self._rate - (time.monotonic() - self._start) if self._rate else 0.0
            if early <= 0:
                return
            time.sleep(min(early, 0.5))


class Verifier:
    """Of one registry."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog, self._store = catalog, catalog.store.lasting

    def run(
        self,
        pace: Pace,
        *,
        repo: RepoId | None = None,
        sample: float = 1.0,
        say: Callable[[str], None] = lambda _line: None,
        damaged: Callable[[Stored, list[Held]], None] = lambda _object, _chunks: None,
        damaged_record: Callable[[Record], None] = lambda _record: None,
    ) -> Findings:
        """Look at everything, or at what a repository needs; of chunks and records at about the share ``sample``.

        ``damaged`` hears of each object with chunks that are wrong or missing, when it was found, ``damaged_record`` of
        each record, so that recipes are right again before chunks are looked for by them.
        """
        found, chance = Findings(), random.Random()  # noqa: S311 - what a sample holds is no secret
        wanted: set[int] | None = None
        number: int | None = None
        domains = self._catalog.stored_domains()
        with self._catalog.database.read() as connection:
            if repo is not None:
                repository = repositories.require(connection, repo)
                number = repository.id
                wanted = inventory.numbers_of(connection, repository.domain, gc.shown_by(connection, repository))
                domains = [repository.domain]
            records = inventory.records(connection, number)
        if repo is None:
            say("comparing the listing with the metadata")
            self._strays(domains, found)
        for kinds in (_RECORDS, _CHUNKS):  # by recipes chunks are repaired
            for stored in self._objects(domains, wanted):
                if _kind(stored) not in kinds:
                    continue
                if found.objects % 1000 == 0:
                    say(f"{found.objects} objects, {found.bytes >> 20} MiB read, {found.damaged} problems")
                found.objects += 1
                self._object(stored, found, pace, lambda: chance.random() < sample, damaged, damaged_record)
        for domain, name, commit, manifest in records:
            of_manifest = Record(manifest_key(domain, manifest), "manifests", manifest)
            of_commit = Record(commit_key(domain, RepoId.from_canonical(name), commit), "commits", commit, name)
            for record in (of_manifest, of_commit):
                if chance.random() < sample:
                    self._record(record, found, pace, damaged_record)
                elif not self._is_there(record.key):
                    self._bad_record(record, "missing", found, damaged_record)
        return found

    def look(self, stored: Stored, pace: Pace, damaged: Callable[[Stored, list[Held]], None]) -> Findings:
        """Look at one object; ``damaged`` as for ``run``."""
        found = Findings()
        self._object(stored, found, pace, lambda: True, damaged, lambda _record: None)
        return found

    def _objects(self, domains: list[str], wanted: set[int] | None) -> Iterator[Stored]:
        for domain in domains:
            after = 0
            while True:
                with self._catalog.database.read() as connection:
                    page = inventory.objects_after(connection, domain, after, PAGE)
                if not page:
                    break
                after = page[-1].number
                yield from (stored for stored in page if wanted is None or stored.number in wanted)

    def _object(
        self,
        stored: Stored,
        found: Findings,
        pace: Pace,
        chosen: Callable[[], bool],
        damaged: Callable[[Stored, list[Held]], None],
        damaged_record: Callable[[Record], None],
    ) -> None:
        if _kind(stored) in _RECORDS:
            with self._catalog.database.read() as connection:
                users = tuple(sorted(moving.users_of(connection, stored.number)))
            record = Record(stored.key, _kind(stored), stored.key.rsplit("/", 1)[1], blobs=users)
            if chosen():
                self._record(record, found, pace, damaged_record)
            elif not self._is_there(stored.key):
                self._bad_record(record, "missing", found, damaged_record)
            return
        with self._catalog.database.read() as connection:
            held = moving.chunks_in(connection, stored.number)
        try:
            size = self._store.info(stored.key).size
        except NotFound:
            self._wrong(stored, "missing", held, found, damaged)
            return
        if size != stored.size:
            self._wrong(stored, "size", held, found, damaged)
            return
        bad = []
        for chunk in held:
            if not chosen():
                continue
            pace.read(chunk.at.encoded_length)
            found.chunks += 1
            found.bytes += chunk.at.encoded_length
            if not self._is_right(chunk):
                bad.append(chunk)
        if bad:
            self._wrong(stored, "bytes", bad, found, damaged)

    def _is_right(self, chunk: Held) -> bool:
        try:
            data = read(self._store, chunk.at, memoryview(bytearray(chunk.at.encoded_length)))
        except (NotFound, IntegrityError):
            return False
        return blake3(data).digest() == chunk.id

    def _wrong(
        self,
        stored: Stored,
        kind: str,
        bad: list[Held],
        found: Findings,
        damaged: Callable[[Stored, list[Held]], None],
    ) -> None:
        """Note what is wrong with an object, unless its row, or the chunks', have gone meanwhile."""
        with self._catalog.database.read() as connection:
            if moving.size_of(connection, stored.number) is None:
                return
            left = inventory.lies_in(connection, stored.number, {chunk.id for chunk in bad})
            users = sorted(moving.users_of(connection, stored.number))
        bad = [chunk for chunk in bad if chunk.id in left]
        if kind != "bytes":
            found.found(Damage(stored.key, kind, users))
        else:
            for chunk in bad:
                found.found(Damage(stored.key, kind, users, chunk.id.hex()))
        if bad:
            damaged(stored, bad)

    def _record(self, record: Record, found: Findings, pace: Pace, damaged_record: Callable[[Record], None]) -> None:
        try:
            buffer = bytearray(self._store.info(record.key).size)
            self._store.read_into(record.key, 0, memoryview(buffer))
        except NotFound:
            self._bad_record(record, "missing", found, damaged_record)
            return
        except IntegrityError:  # it is damaged where it is encrypted
            self._bad_record(record, "bytes", found, damaged_record)
            return
        pace.read(len(buffer))
        found.bytes += len(buffer)
        if not self._is_right_record(record, buffer):
            self._bad_record(record, "bytes", found, damaged_record)

    def _is_right_record(self, record: Record, data: bytearray) -> bool:
        if record.kind != "commits":
            return hashlib.sha256(data).hexdigest() == record.name
        with self._catalog.database.read() as connection:
            repository = repositories.find(connection, RepoId.from_canonical(record.repo))
            held = None if repository is None else repositories.find_commit(connection, repository, record.name)
        return held is None or held.record == data  # what has gone meanwhile is nobody's

    def _bad_record(self, record: Record, kind: str, found: Findings, damaged_record: Callable[[Record], None]) -> None:
        """Note what is wrong with a record, unless nothing names it any more."""
        if self._still_named(record.key):
            found.found(Damage(record.key, kind, list(record.blobs)))
            damaged_record(record)

    def _is_there(self, key: str) -> bool:
        try:
            self._store.info(key)
        except NotFound:
            return False
        return True

    def _still_named(self, key: str) -> bool:
        with self._catalog.database.read() as connection:
            return bool(claims.named(connection, [key]))

    def _strays(self, domains: list[str], found: Findings) -> None:
        batch: list[str] = []
        for domain, kind in product(domains, KINDS):
            for info in self._store.list(f"{domain}/{kind}/"):
                batch.append(info.key)
                if len(batch) == BATCH:
                    self._look(batch, found)
                    batch = []
        self._look(batch, found)

    def _look(self, keys: list[str], found: Findings) -> None:
        with self._catalog.database.read() as connection:
            strays = sorted(inventory.strays(connection, keys))
        strays = [key for key in strays if self._is_there(key)]  # it may have gone between the two
        found.stray_objects += len(strays)
        found.strays += strays[: MAX_SAID - len(found.strays)]
