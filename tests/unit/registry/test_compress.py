"""Compression of what is cold: what is taken, what comes of it, and that nobody reads anything else than before."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa

from helios.errors import Conflict, HeliosError, IntegrityError, InvalidInput, NoSpace, Unavailable
from helios.names import RepoId
from heliosfs.store.codec import NONE, encode
from heliosfs.store.keys import blob_key
from heliosfs.store.placement import PlacedBlob
from heliosfs.store.selfcheck import check_content
from registry.burial import bury
from registry.gc import compress, gain, jobs
from registry.gc.collect import Collector, Times
from registry.gc.compress import Compressed, Compressor, Limits
from registry.gc.copies import Copies, Copy
from registry.gc.repack import Repacker
from registry.gc.repair import Repairer
from registry.gc.verify import Pace, Verifier
from registry.ingest import staged
from registry.last_reads import LastReads
from registry.metadata import coldness, moving
from registry.metadata.database import Changes
from registry.metadata.tables import blobs, chunks, objects
from registry.threads import Threads
from registry.transfer.compose import Composed, locate
from tests.support.damage import flip
from tests.support.ingest import seeded
from tests.support.weights import model, numbers
from tests.unit.registry.conftest import Registry

REPO = RepoId.parse("org/m")
NOW = Limits(unread_s=-1e12, min_gain=0.1, keep_s=110, least_bytes=1)
"""Everything is cold."""
WEIGHTS = model({"a": ("BF16", numbers("BF16", 1 << 20, 1)), "b": ("F32", numbers("F32", 1 << 19, 2))})
NOISE = seeded(200_000, 1)


def run(registry: Registry, limits: Limits = NOW, **options: object) -> Compressed:
    return Compressor(registry.catalog, limits).run(Pace(0, lambda: False), **options)  # type: ignore[arg-type]


def content(registry: Registry, name: str = "org/m") -> dict[str, bytes]:
    repo = RepoId.parse(name)
    contents = registry.catalog.contents
    files = contents.manifest(repo, registry.catalog.resolve(repo, "main").commit).files
    return {path: contents.blob_reader(repo, entry.sha256).read(0, entry.size) for path, entry in files.items()}


def placed(registry: Registry, path: str = "w", name: str = "org/m") -> PlacedBlob:
    repo = RepoId.parse(name)
    files = registry.catalog.contents.manifest(repo, registry.catalog.resolve(repo, "main").commit).files
    return registry.catalog.contents.placed(repo, files[path].sha256)


def codecs(registry: Registry, path: str = "w", name: str = "org/m") -> set[str]:
    where = placed(registry, path, name)
    return {where.locate(index).codec for index in range(len(where.recipe))}


def kinds(registry: Registry) -> set[str]:
    return {key.split("/")[1] for key in registry.objects()}


def set_clock(registry: Registry, now: float) -> None:
    registry.clock[0] = now
    registry.database.kind.now = sa.literal(now, sa.Double)


def test_weights_take_less_room_and_read_the_same(registry: Registry) -> None:
    registry.publish("org/m", {"w": WEIGHTS, "n": NOISE})
    before = placed(registry)
    usage = registry.catalog.contents.usage(REPO)
    report = run(registry)
    assert (report.objects, report.compressed, report.poor, report.problems) == (2, 1, 1, [])
    assert report.before == len(WEIGHTS)
    assert report.by_type["BF16"].after < 0.7 * report.by_type["BF16"].before
    assert report.by_type["F32"].after < 0.9 * report.by_type["F32"].before
    assert report.by_codec["planes2-zstd"].before == report.by_type["BF16"].before
    assert content(registry) == {"w": WEIGHTS, "n": NOISE}
    after = placed(registry)
    assert after.placement.version > before.placement.version
    assert {"planes2-zstd", "planes4-zstd"} <= codecs(registry)
    now = registry.catalog.contents.usage(REPO)
    assert (now.logical, now.unique) == (usage.logical, usage.unique)
    assert now.stored == usage.stored - report.before + sum(part.after for part in report.by_codec.values())
    found = Verifier(registry.catalog).run(Pace(0, lambda: False))
    assert (found.damaged, found.stray_objects) == (0, 0)
    for key in registry.objects():
        if "/packs/" in key:
            check_content(key, registry.store.root / key)
    again = run(registry)
    assert (again.objects, again.compressed) == (0, 0), "what is done is not looked at again, nor what is poor"


def test_the_old_object_goes_when_nobody_can_know_of_it(registry: Registry) -> None:
    set_clock(registry, 1_000_000.0)
    registry.publish("org/m", {"w": WEIGHTS})
    run(registry)
    key = blob_key("public", placed(registry).recipe.blob)
    collector = Collector(registry.catalog, Times(1000, 100, 10))
    set_clock(registry, 1_000_109.0)
    collector.run()
    assert key in registry.objects()
    set_clock(registry, 1_000_111.0)
    collector.run()
    assert key not in registry.objects()
    assert content(registry)["w"] == WEIGHTS
    with registry.database.read() as connection:
        rows = dict(connection.execute(sa.select(objects.c.key, objects.c.size)).all())
    stored = {info.key: info.size for info in registry.store.list("public/packs/")}
    assert {key: size for key, size in rows.items() if "/packs/" in key} == stored
    assert sum(stored.values()) < 0.8 * len(WEIGHTS)


def test_a_rehearsal_says_what_comes_and_changes_nothing(registry: Registry) -> None:
    registry.publish("org/m", {"w": WEIGHTS, "n": NOISE})
    before = registry.objects()
    plan = run(registry, dry_run=True)
    assert registry.objects() == before
    assert codecs(registry) == {NONE}
    done = run(registry)
    assert (plan.compressed, plan.poor, plan.before) == (done.compressed, done.poor, done.before)
    assert abs(plan.after - done.after) < 0.05 * done.before


def test_only_what_nobody_reads_is_taken(registry: Registry) -> None:
    """By what the metadata says of stores and reads; pushes under way are left alone, too."""
    registry.publish("org/m", {"w": WEIGHTS})
    limits = Limits(unread_s=10_000, min_gain=0.1, keep_s=110, least_bytes=1)
    reads = registry.catalog.contents.reads = LastReads(registry.database, lambda: registry.clock[0])

    def at(now: float, stored: int, read: int) -> int:
        set_clock(registry, now)
        with registry.database.write(changes=Changes.NOTHING) as connection:
            connection.execute(objects.update().values(created=stored))
            connection.execute(blobs.update().values(last_read=read))
        return run(registry, limits, dry_run=True).objects

    assert at(1_000_000, 990_001, 0) == 0, "it has just come"
    assert at(1_000_000, 900_000, 990_001) == 0, "somebody has read it"
    assert at(1_000_000, 900_000, 989_999) == 1
    content(registry)
    assert run(registry, limits, dry_run=True).objects == 0, "somebody has just read it"
    reads.write()
    assert at(1_000_000 + 20_000, 900_000, 900_000) == 1
    with registry.sessions.open(REPO) as session:
        session.ingest("w", len(WEIGHTS), io.BytesIO(WEIGHTS))
        assert run(registry, limits, dry_run=True).objects == 0, "a push relies on it"
    assert run(registry, limits, dry_run=True).objects == 1
    assert run(registry, limits, dry_run=True, repo=REPO).objects == 1
    registry.publish("org/other", {"c": b"{}"})
    assert run(registry, limits, dry_run=True, repo=RepoId.parse("org/other")).objects == 0
    small = Limits(10_000, 0.1, 110, least_bytes=len(WEIGHTS) + 1)
    assert run(registry, small, dry_run=True).objects == 0


def test_a_file_that_a_cache_of_this_machine_has_linked_is_left_alone(registry: Registry, tmp_path: Path) -> None:
    registry.publish("org/m", {"w": WEIGHTS})
    os.link(registry.store.root / blob_key("public", placed(registry).recipe.blob), tmp_path / "cached")
    report = run(registry)
    assert (report.linked, report.compressed) == (1, 0)
    os.unlink(tmp_path / "cached")
    assert run(registry).compressed == 1


def test_what_is_pushed_shares_chunks_that_are_encoded(registry: Registry) -> None:
    registry.publish("org/m", {"w": WEIGHTS})
    run(registry)
    tuned = model({"a": ("BF16", numbers("BF16", 1 << 20, 1)), "b": ("F32", numbers("F32", 1 << 19, 3))})
    with registry.sessions.open(REPO) as session:
        found = session.ingest("w", len(tuned), io.BytesIO(tuned))
        assert found.new_bytes < len(tuned) - (2 << 20) + 4096
        registry.catalog.publisher.publish(RepoId.parse("org/t"), "main", {"w": found.entry}, author="", message="")
    assert content(registry, "org/t")["w"] == tuned
    assert "planes2-zstd" in codecs(registry, name="org/t")
    registry.publish("org/copy", {"w": WEIGHTS})
    assert content(registry, "org/copy") == content(registry)


def test_a_blob_is_put_together_from_encoded_chunks(registry: Registry) -> None:
    """As replication and bundles do it; whoever reads takes pieces of any size."""
    registry.publish("org/m", {"w": WEIGHTS})
    run(registry)
    recipe = placed(registry).recipe
    places = locate(registry.catalog.index, "public", recipe)
    source = Composed(registry.store, recipe, places, io.BytesIO())
    out = bytearray()
    buffer = memoryview(bytearray(777_777))
    while count := source.readinto(buffer):
        out += buffer[:count]
    assert out == WEIGHTS
    assert source.travelled == 0


def test_what_is_mostly_garbage_is_rewritten_as_it_is_encoded(registry: Registry) -> None:
    set_clock(registry, 1_000_000.0)
    parts = {name: model({name: ("BF16", numbers("BF16", 1 << 19, seed))}) for seed, name in enumerate("abcd")}
    whole = model({name: ("BF16", numbers("BF16", 1 << 19, seed)) for seed, name in enumerate("abcd")})
    registry.publish("org/m", {"w": whole})
    run(registry)
    registry.publish("org/a", {"w": parts["b"]})
    registry.catalog.delete_repo(REPO)
    collector = Collector(registry.catalog, Times(0, 100, 10, keep_history=False))
    for now in (1_000_001.0, 1_000_102.0):
        set_clock(registry, now)
        report = collector.run()
    assert report.rewritten_objects == 1
    assert "planes2-zstd" in codecs(registry, name="org/a")
    assert content(registry, "org/a")["w"] == parts["b"]
    set_clock(registry, 1_000_300.0)
    collector.run()
    assert Repacker(registry.catalog, 110).candidates("public") == []
    assert content(registry, "org/a")["w"] == parts["b"]


def test_damage_is_no_reason_to_lose_more(registry: Registry) -> None:
    """A chunk that is damaged before stays where it is; one that gets damaged afterwards is found, and repaired."""
    registry.publish("org/m", {"w": WEIGHTS})
    path = registry.store.root / blob_key("public", placed(registry).recipe.blob)
    flip(path, len(WEIGHTS) - 5)
    report = run(registry)
    assert "verify --repair" in report.problems[0] or "is damaged" in report.problems[0]
    assert (report.compressed, codecs(registry)) == (0, {NONE})
    flip(path, len(WEIGHTS) - 5)
    run(registry)
    at = placed(registry).locate(1)
    assert at.codec != NONE
    flip(registry.store.root / at.object_key, at.offset + at.encoded_length // 2)
    with pytest.raises(IntegrityError, match="chunk 1 of blob"):
        content(registry)
    repairer = Repairer(registry.catalog, 110, [], None, threading.Event())
    found = Verifier(registry.catalog).run(Pace(0, lambda: False), damaged=repairer.repair)
    assert (found.damaged, found.damage[0].object) == (1, at.object_key)
    assert repairer.done.store == 1, "the raw object is still there, and has it"
    assert content(registry)["w"] == WEIGHTS


@pytest.mark.parametrize("wrong", [encode("zstd", b"other" * 1000), b"no frame", b""])
def test_what_does_not_decode_to_the_chunk_never_takes_its_place(registry: Registry, wrong: bytes) -> None:
    registry.publish("org/m", {"w": WEIGHTS})
    before = registry.objects()
    copies = Copies(registry.catalog, 110)
    [found] = Compressor(registry.catalog, NOW)._candidates(None)
    with registry.database.read() as connection:
        chunk = moving.chunks_in(connection, found.number)[1]
    users = copies.users(found.key, found.number)
    with pytest.raises(IntegrityError):
        copies.replace(found.key, found.number, users, [Copy(chunk.id, chunk.at.length, wrong, "zstd")], encoded=True)
    assert registry.objects() == before
    assert codecs(registry) == {NONE}
    assert content(registry)["w"] == WEIGHTS


def test_it_goes_on_where_it_was_stopped(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the object has moved; what lies there in vain counts as gain, so that the rest follows."""
    monkeypatch.setattr(compress, "STEP", 1 << 20)
    registry.publish("org/m", {"w": WEIGHTS})
    left = [7]  # samples, and two of three chunks

    def stopped() -> bool:
        left[0] -= 1
        return left[0] < 0

    with pytest.raises(Unavailable, match="stopped"):
        Compressor(registry.catalog, NOW).run(Pace(0, stopped))
    assert NONE in codecs(registry)
    assert len(codecs(registry)) > 1
    assert content(registry)["w"] == WEIGHTS
    report = run(registry)
    assert report.compressed == 1
    with registry.database.read() as connection:
        kept = connection.scalars(sa.select(objects.c.key).where(objects.c.key.like("public/blobs/%"))).all()
    assert list(kept) == []
    assert content(registry)["w"] == WEIGHTS


def test_an_object_that_somebody_comes_to_need_is_left_for_the_next_run(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish("org/m", {"w": WEIGHTS})
    encoded = gain.encode
    session = registry.sessions.open(REPO)

    def encoding(chunk: bytes) -> tuple[str, bytes]:
        session.ingest("w", len(WEIGHTS), io.BytesIO(WEIGHTS))
        return encoded(chunk)

    monkeypatch.setattr(compress, "encode", encoding)
    with session:
        report = run(registry)
    assert (report.busy, report.compressed, report.problems) == (1, 0, [])
    monkeypatch.undo()
    assert content(registry)["w"] == WEIGHTS
    bury(registry.database, registry.store)
    assert {key for key in registry.objects() if "/packs/" in key} == set(), "what was written in vain is gone"
    assert run(registry).compressed == 1


@pytest.mark.parametrize("engine_url", ["postgres"], indirect=True)
def test_only_one_process_compresses(registry: Registry) -> None:
    from registry.metadata.gc_tables import turns
    from registry.metadata.tables import processes

    with registry.database.write(changes=Changes.NOTHING) as connection:
        connection.execute(processes.insert().values(id="other", name="other", expires=1e12))
        connection.execute(turns.insert().values(name="compress", holder="other"))
    with pytest.raises(Conflict, match="another process of this registry is compressing"):
        run(registry)
    assert run(registry, dry_run=True).objects == 0


def test_a_full_disk_changes_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.publish("org/m", {"w": WEIGHTS})
    before = registry.objects()

    def full(directory: Path, size: int) -> None:
        raise NoSpace(f"no room in {directory}")

    monkeypatch.setattr(staged, "check_space", full)
    with pytest.raises(NoSpace):
        run(registry)
    monkeypatch.undo()
    assert registry.objects() == before
    assert content(registry)["w"] == WEIGHTS
    assert run(registry).compressed == 1


def test_the_registry_does_it_by_itself(registry: Registry, monkeypatch: pytest.MonkeyPatch, upkeep: Threads) -> None:
    monkeypatch.setattr(jobs, "LOOK_S", 0.01)
    monkeypatch.setattr(jobs, "COMPRESS_S", 0.0)
    monkeypatch.setattr(jobs, "NOTE_S", 0.0)
    weights = model({name: ("BF16", numbers("BF16", 1 << 20, seed)) for seed, name in enumerate("abc", 10)})
    registry.publish("org/m", {"w": weights})
    registry.publish("org/read", {"w": WEIGHTS})
    with registry.database.write(changes=Changes.NOTHING) as connection:
        connection.execute(objects.update().values(created=1))
    settings = jobs.Settings(
        0.0, Times(1000, 100, 10), 0.0, compress_after_s=86400.0, compress_gain=0.1, compress_mb_s=0
    )
    placed(registry, name="org/read")
    registry.catalog.contents.reads.write()

    def encoded() -> bool:
        with registry.database.read() as connection:
            return connection.scalar(sa.select(chunks.c.id).where(chunks.c.codec != NONE).limit(1)) is not None

    with closing(jobs.Jobs(registry.catalog, settings, [], None)) as made:

        async def until_done() -> None:
            task = asyncio.create_task(made.keep_clean(upkeep))
            async with asyncio.timeout(30):
                while not encoded():
                    await asyncio.sleep(0.02)
            task.cancel()

        asyncio.run(until_done())
    assert codecs(registry, name="org/read") == {NONE}
    assert "planes2-zstd" in codecs(registry)
    assert content(registry)["w"] == weights
    with closing(jobs.Jobs(registry.catalog, settings, [], None)) as made:
        for wrong in (-1.0, float("nan"), float("inf"), 1e19):
            with pytest.raises(InvalidInput):
                made.compress(None, wrong, dry_run=True)


# --- choosing ---


@pytest.mark.parametrize(
    ("dtype", "codec", "most"),
    [
        ("BF16", "planes2-zstd", 0.70),
        ("F16", "planes2-zstd", 0.90),
        ("F32", "planes4-zstd", 0.87),
        ("F8_E4M3", "zstd", 0.90),
        ("I8", NONE, 1.0),
    ],
)
def test_each_type_of_weights_gets_its_codec(dtype: str, codec: str, most: float) -> None:
    data = numbers(dtype, 1 << 18, 5)
    name, stored = gain.encode(data)
    assert len(stored) <= most * len(data)
    family = {"planes2-zstd", "planes4-zstd"} if dtype == "F16" else {codec}
    assert name in family or (dtype == "F8_E4M3" and name != NONE)


def test_a_sample_says_about_what_the_whole_gives() -> None:
    chunks = [numbers(dtype, 1 << 17, seed) for seed, dtype in enumerate(["BF16", "F32", "I8", "F16"] * 3)]
    about = gain.estimate(list(map(len, chunks)), lambda n, part: chunks[n][part.start : part.stop], 12)
    exact = sum(len(gain.encode(chunk)[1]) for chunk in chunks)
    assert abs(about - exact) < 0.02 * sum(map(len, chunks))
    assert gain.estimate([], lambda _n, _part: b"", 12) == 0


@pytest.mark.parametrize("length", [1, 7, 8, gain.SAMPLE, gain.SAMPLE + 1, 100_003, 4 << 20])
def test_a_sample_lies_inside_its_chunk(length: int) -> None:
    parts = gain.sampled(length)
    assert all(0 <= part.start < part.stop <= length and part.start % gain.ALIGN == 0 for part in parts)
    assert sum(map(len, parts)) == min(length, gain.SAMPLE)
    assert all(one.stop <= two.start for one, two in pairwise(parts))


# --- reads ---


def test_reads_are_noted_once_an_hour(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.publish("org/m", {"w": b"abc"})
    sha256 = placed(registry).recipe.blob
    now = [7200.0 * 1000]
    reads = LastReads(registry.database, lambda: now[0])
    written: list[int] = []
    note = coldness.note_reads

    def noting(connection: sa.Connection, domain: str, digests: set[str], when: int) -> None:
        written.append(when)
        note(connection, domain, digests, when)

    monkeypatch.setattr(coldness, "note_reads", noting)

    def known() -> int:
        with registry.database.read() as connection:
            return connection.scalar(sa.select(blobs.c.last_read).where(blobs.c.sha256 == sha256)) or 0

    for _ in range(3):
        reads.note("public", sha256)
        reads.write()
    assert written == [7_200_000]
    assert known() == 7_200_000
    now[0] += 3599
    reads.note("public", sha256)
    reads.write()
    assert len(written) == 1
    now[0] += 1
    reads.note("public", sha256)
    reads.write()
    assert known() == 7_203_600
    now[0] -= 7200  # a clock that was set back
    reads.note("public", sha256)
    reads.write()
    assert known() == 7_203_600


def test_reads_that_cannot_be_written_are_kept_within_bounds(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, expected_log_errors: Callable[[str], None]
) -> None:
    monkeypatch.setattr("registry.last_reads.MOST", 4)
    registry.publish("org/m", {"w": b"abc"})
    sha256 = placed(registry).recipe.blob
    reads = LastReads(registry.database, lambda: 7_200_000.0)
    fails = [True]
    write = registry.database.write

    def failing(**options: object) -> object:
        if fails[0]:
            raise HeliosError("no")
        return write(**options)  # type: ignore[arg-type]

    monkeypatch.setattr(registry.database, "write", failing)
    reads.note("public", sha256)
    reads.write()
    for number in range(20):
        reads.note("public", f"{number:064x}")
        assert len(reads._noted) <= 4
    fails[0] = False
    reads.note("public", sha256)
    reads.write()
    with registry.database.read() as connection:
        assert connection.scalar(sa.select(blobs.c.last_read).where(blobs.c.sha256 == sha256)) == 7_200_000
