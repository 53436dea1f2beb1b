"""The job that stores cold chunks again, compressed (docs/registry-compression.md).

It takes one object after another whose blobs nobody has read for a while, tries samples of its chunks, and where that
promises enough it writes all that blobs need of the object into new packs, each chunk in the codec that is best for it,
a bounded step at a time. Every step is one transaction of ``Copies``: encoded bytes are decoded and compared with the
chunk's hash before the rows follow, and the old object is deleted like others when no reader can know of it any more.
So a run may be killed anywhere: what was moved is moved, and an object of which a part is left is taken up again,
because what lies in it uselessly counts as gain.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from helios.errors import Conflict, HeliosError, IntegrityError, NotFound
from helios.names import RepoId
from heliosfs.store import pack
from heliosfs.store.keys import domain_of
from heliosfs.store.placement import NO_CODEC
from registry.catalog import Catalog
from registry.gc.copies import Copies, Copy, read_chunk
from registry.gc.gain import encode, estimate
from registry.gc.labels import OTHER, labels_of
from registry.gc.turns import turn
from registry.gc.verify import Pace
from registry.metadata import coldness, gc, inventory, moving, pins, repositories
from registry.metadata.database import Changes
from registry.metadata.inventory import Stored
from registry.metadata.moving import Held

log = logging.getLogger("helios.registry.gc")

PAGE: Final = 200
SAMPLES: Final = 16
"""Chunks of an object that are tried, at most."""
STEP: Final = 256 << 20
"""Bytes of chunks that one transaction moves: so many are read again after a kill."""
LEAST_BYTES: Final = 1 << 20
"""Smaller objects are left alone: they would save little, and are what is read most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``unread_s``: how long nobody has read what is taken, in seconds. ``min_gain``: which share of an object must be
    saved. ``keep_s``: how long an object stays that nobody needs, in seconds. ``least_bytes``: of an object."""

    unread_s: float
    min_gain: float
    keep_s: float
    least_bytes: int = LEAST_BYTES


class Part(msgspec.Struct):
    """Chunks, and their bytes before and after."""

    chunks: int = 0
    before: int = 0
    after: int = 0

    def add(self, before: int, after: int) -> None:
        self.chunks += 1
        self.before += before
        self.after += after


class Compressed(msgspec.Struct):
    """What a run did, or, as a dry run, would do; bytes are those of objects in the store."""

    dry_run: bool
    objects: int = 0
    """Cold objects that were looked at."""
    compressed: int = 0
    before: int = 0
    """Bytes of those that were compressed."""
    after: int = 0
    """What took their place; in a dry run, an estimate from samples."""
    poor: int = 0
    """Objects that would save too little. They are not looked at again."""
    linked: int = 0
    """Objects whose files have other names besides, in caches of mounts of this machine: nothing would be saved."""
    busy: int = 0
    """Objects that a push or a pull came to need meanwhile."""
    by_type: dict[str, Part] = {}
    """Of the chunks that were written: by what they hold."""
    by_codec: dict[str, Part] = {}
    problems: list[str] = []

    def result(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        out: dict[str, Any] = msgspec.to_builtins(self)
        return out


_Written = list[tuple[str, str, int, int]]
"""Chunks on their way: what they hold, codec, bytes before and after; counted once their rows have changed."""


class Compressor:
    """Of one registry."""

    def __init__(self, catalog: Catalog, limits: Limits) -> None:
        self._catalog, self._limits = catalog, limits
        self._copies = Copies(catalog, limits.keep_s)

    def run(
        self,
        pace: Pace,
        *,
        repo: RepoId | None = None,
        dry_run: bool = False,
        say: Callable[[str], None] = lambda _line: None,
    ) -> Compressed:
        """Look at every cold object, or at those that a repository needs. Raises Conflict while another process does,
        Unavailable when it is stopped."""
        report = Compressed(dry_run)
        self._catalog.contents.reads.write()
        with nullcontext() if dry_run else turn(self._catalog, "compress", "compressing"):
            for found in self._candidates(repo):
                report.objects += 1
                self._look(found, report, pace, say)
        log.info("compressed", extra={name: getattr(report, name) for name in ("objects", "before", "after", "poor")})
        return report

    def _candidates(self, repo: RepoId | None) -> Iterator[Stored]:
        database, limits = self._catalog.database, self._limits
        domains = self._catalog.stored_domains()
        wanted: set[int] | None = None
        with database.read() as connection:
            before = pins.clock(connection, database.kind.now) - limits.unread_s
            last = coldness.last_object(connection)  # what this run writes comes after it
            if repo is not None:
                repository = repositories.require(connection, repo)
                domains = [repository.domain]
                wanted = inventory.numbers_of(connection, repository.domain, gc.shown_by(connection, repository))
        for domain in domains:
            after = 0
            while True:
                numbers = range(after + 1, last + 1)
                with database.read() as connection:
                    page = coldness.cold_objects(
                        connection, domain, before, limits.least_bytes, limits.min_gain, numbers, PAGE
                    )
                if not page:
                    break
                after = page[-1].number
                yield from (found for found in page if wanted is None or found.number in wanted)

    def _look(self, found: Stored, report: Compressed, pace: Pace, say: Callable[[str], None]) -> None:
        try:
            if self._linked(found.key):
                report.linked += 1
                return
            live = self._live(found)
            after = self._estimate(live, pace)
            gain = 1 - after / found.size
            if gain < self._limits.min_gain:
                report.poor += 1
                if not report.dry_run:
                    with self._catalog.database.write(lazy=True, changes=Changes.NOTHING) as connection:
                        coldness.note_gain(connection, found.number, gain)
                return
            if not report.dry_run:
                say(f"{found.key}: {found.size >> 20} MiB, about {gain:.0%} to be saved")
                after = self._compress(found, live, report, pace)
        except Conflict:  # somebody needs the object after all; the next run looks again
            report.busy += 1
            return
        except (NotFound, IntegrityError) as error:
            report.problems.append(f"{found.key} can't be compressed: {error.message}")
            return
        report.compressed += 1
        report.before += found.size
        report.after += round(after)

    def _linked(self, key: str) -> bool:
        file = self._catalog.store.open_local(key)
        if file is None:
            return False
        with closing(file):
            return os.fstat(file.fileno()).st_nlink > 1

    def _live(self, found: Stored) -> list[Held]:
        """The chunks of an object that blobs need."""
        users = self._copies.users(found.key, found.number)
        wanted: set[bytes] = set().union(*users.values())
        with self._catalog.database.read() as connection:
            return [chunk for chunk in moving.chunks_in(connection, found.number) if chunk.id in wanted]

    def _estimate(self, live: Sequence[Held], pace: Pace) -> float:
        """About how many bytes the chunks would take: those that are encoded already do so."""
        raw = [chunk.at for chunk in live if chunk.at.codec == NO_CODEC]

        def read(number: int, part: range) -> bytes:
            at = raw[number]
            buffer = bytearray(len(part))
            pace.read(len(buffer))
            self._catalog.store.read_into(at.object_key, at.offset + part.start, memoryview(buffer))
            return bytes(buffer)

        encoded = sum(chunk.at.encoded_length for chunk in live if chunk.at.codec != NO_CODEC)
        around = pack.HEAD_SIZE + pack.TRAILER_SIZE + pack.ENTRY_SIZE * len(live)
        return around + encoded + estimate([at.length for at in raw], read, SAMPLES)

    def _compress(self, found: Stored, live: list[Held], report: Compressed, pace: Pace) -> int:
        """Move the chunks step by step; returns the bytes that they take now."""
        label, after = self._labels(found, live), 0
        for step in _steps(live):
            users = self._copies.users(found.key, found.number)
            written: _Written = []
            copies = self._encoded(step, label, written, pace)
            after += self._copies.replace(found.key, found.number, users, copies, encoded=True)
            for type_, codec, before, length in written:
                report.by_type.setdefault(type_, Part()).add(before, length)
                report.by_codec.setdefault(codec, Part()).add(before, length)
        return after

    def _encoded(
        self, chunks: Sequence[Held], label: Callable[[bytes], str], written: _Written, pace: Pace
    ) -> Iterator[Copy]:
        for chunk in chunks:
            pace.read(chunk.at.encoded_length)
            data = read_chunk(self._catalog.store, chunk)
            if data is None:
                raise IntegrityError(f"chunk {chunk.id.hex()} is damaged", hint="Run: helios store verify --repair")
            codec = chunk.at.codec
            if codec == NO_CODEC:
                codec, data = encode(data)
            written.append((label(chunk.id), codec, chunk.at.length, len(data)))
            yield Copy(chunk.id, chunk.at.length, data, codec)

    def _labels(self, found: Stored, live: Sequence[Held]) -> Callable[[bytes], str]:
        """What the chunks hold, as far as the blobs that need the object say: the largest of them."""
        ids = {chunk.id for chunk in live}
        types: dict[bytes, str] = {}
        with self._catalog.database.read() as connection:
            users = moving.users_of(connection, found.number)
        for sha256, digest in users.items():
            if ids <= types.keys():
                break
            try:
                domain = domain_of(found.key)
                recipe = self._catalog.contents.recipe(domain, digest)
                label = labels_of(self._catalog.contents.stored_blob(domain, sha256))
            except HeliosError as error:  # it is only for the report
                log.info("a blob's head can't be read", extra={"blob": sha256, "reason": error.message})
                continue
            start = 0
            for id_, length in recipe.chunks():
                if id_ in ids:
                    types.setdefault(id_, label(start))
                start += length
        return lambda id_: types.get(id_, OTHER)


def _steps(chunks: Sequence[Held]) -> Iterator[list[Held]]:
    """The chunks in order, as many at a time as ``STEP`` bytes hold."""
    step: list[Held] = []
    size = 0
    for chunk in chunks:
        if step and size + chunk.at.encoded_length > STEP:
            yield step
            step, size = [], 0
        step.append(chunk)
        size += chunk.at.encoded_length
    if step:
        yield step
