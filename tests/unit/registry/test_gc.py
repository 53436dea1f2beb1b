"""Collections, leases, verification and repair, one behaviour at a time."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from helios.errors import Conflict, EntryNotFound, InvalidInput, RevisionNotFound, Unavailable
from helios.names import RepoId
from heliosfs.store import cloud
from heliosfs.store.keys import blob_key, xet_key
from heliosfs.store.placement import ChunkLocation
from registry import burial
from registry.burial import bury, withdraw
from registry.gc.collect import Collector, Times
from registry.gc.leases import MAX_S, Leases
from registry.gc.repair import Repairer
from registry.gc.report import Report
from registry.gc.verify import Findings, Pace, Verifier
from registry.metadata import claims, content, postgres, xet
from registry.metadata.database import Changes
from registry.metadata.gc_tables import turns
from registry.metadata.mirror_tables import mirror_refs
from registry.metadata.tables import processes
from tests.support.damage import flip
from tests.unit.registry.conftest import Registry
from tests.unit.registry.test_gc_model import BLOCK, File, bytes_of, recipe_of

REPO = RepoId.parse("org/m")
TIMES = Times(keep_commits_s=1000, grace_s=100, lease_s=10)


@pytest.fixture
def at(registry: Registry) -> Callable[[float], None]:
    """Sets the clock: of the registry and of its database."""

    def set_clock(now: float) -> None:
        registry.clock[0] = now
        registry.database.kind.now = sa.literal(now, sa.Double)

    set_clock(1_000_000.0)
    return set_clock


def publish(registry: Registry, name: str, *files: File, ref: str = "main") -> str:
    with registry.sessions.open(REPO) as session:
        entries = {}
        for number, file in enumerate(files):
            data = bytes_of(file)
            found = session.ingest(f"{number}.bin", len(data), io.BytesIO(data), recipe=recipe_of(file))
            entries[f"{number}.bin"] = found.entry
        return registry.catalog.publisher.publish(RepoId.parse(name), ref, entries, author="", message="").record.commit


def read(registry: Registry, name: str, file: File) -> bytes:
    return registry.catalog.contents.blob_reader(RepoId.parse(name), recipe_of(file).blob).read(0, 1 << 20)


def test_a_history_stays_where_it_is_to_be_kept_and_what_left_it_goes(
    registry: Registry, at: Callable[[float], None]
) -> None:
    first = publish(registry, "org/m", (1, 2, 3))
    second = publish(registry, "org/m", (4, 5, 6))
    aside = publish(registry, "org/m", (7, 8, 9), ref="aside")
    publish(registry, "org/m", (1, 5, 9))
    registry.catalog.delete_ref(REPO, "aside")
    collector = Collector(registry.catalog, Times(1000, 100, 10, keep_history=True))
    for now in (1_001_001.0, 1_001_102.0):
        at(now)
        report = collector.run()
    assert (report.kept_refs, report.kept_history, report.removed_commits) == (1, 2, 1)
    assert [registry.catalog.resolve(REPO, commit).commit for commit in (first, second)] == [first, second]
    assert read(registry, "org/m", (1, 2, 3)) == bytes_of((1, 2, 3))
    with pytest.raises(RevisionNotFound):
        registry.catalog.resolve(REPO, aside)


def test_a_commit_that_a_ref_left_goes_after_its_time_and_the_grace(
    registry: Registry, at: Callable[[float], None]
) -> None:
    old = publish(registry, "org/m", (1, 2, 3))
    publish(registry, "org/m", (4, 5, 6))
    collector = Collector(registry.catalog, TIMES)
    assert collector.run().kept_recent == 1
    at(1_001_001.0)
    first = collector.run()
    assert (first.kept_refs, first.condemned_commits, first.removed_commits) == (1, 1, 0)
    assert read(registry, "org/m", (1, 2, 3)) == bytes_of((1, 2, 3))
    at(1_001_101.0)
    second = collector.run()
    assert (second.removed_commits, second.removed_blobs, second.removed_objects) == (1, 1, 2)  # the blob, its recipe
    assert second.freed_bytes > 3 * BLOCK
    with pytest.raises(RevisionNotFound):
        registry.catalog.resolve(REPO, old)
    with pytest.raises(EntryNotFound):
        read(registry, "org/m", (1, 2, 3))
    key = blob_key("public", recipe_of((1, 2, 3)).blob)
    assert key in registry.objects()  # a reader may have been told of it just before
    at(1_001_211.0)
    third = collector.run()
    assert third.deleted_objects >= 2
    assert key not in registry.objects()
    assert read(registry, "org/m", (4, 5, 6)) == bytes_of((4, 5, 6))


def test_a_dry_run_says_what_comes_and_changes_nothing(registry: Registry, at: Callable[[float], None]) -> None:
    publish(registry, "org/m", (1, 2, 3))
    publish(registry, "org/m", (4, 5, 6))
    publish(registry, "org/other", (1, 2, 3), (7,))
    registry.catalog.delete_ref(RepoId.parse("org/other"), "main")
    at(1_002_000.0)
    before = registry.objects()
    plan = Collector(registry.catalog, TIMES).run(dry_run=True)
    assert (plan.dry_run, plan.commits, plan.kept_refs, plan.removed_commits) == (True, 3, 1, 2)
    assert (plan.removed_blobs, plan.removed_objects) == (2, 4)
    assert registry.objects() == before
    collector = Collector(registry.catalog, TIMES)
    assert collector.run().removed_commits == 0
    at(1_002_101.0)
    done = collector.run()
    assert (done.removed_blobs, done.freed_bytes) == (plan.removed_blobs, plan.freed_bytes)


def test_a_lease_keeps_a_commit_and_its_end_lets_it_go(registry: Registry, at: Callable[[float], None]) -> None:
    old = publish(registry, "org/m", (1,))
    publish(registry, "org/m", (2,))
    leases, collector = Leases(registry.catalog), Collector(registry.catalog, TIMES)
    assert leases.pin("node-1", REPO, old, 5000) == 1_005_000.0
    at(1_004_000.0)
    leases.pin("node-1", REPO, old, 5000)
    at(1_008_000.0)
    assert collector.run().kept_pinned == 1
    assert [(pin.holder, pin.commit) for pin in leases.all()] == [("node-1", old)]
    leases.pin("node-1", REPO, old, 0)
    assert leases.all() == []
    assert collector.run().condemned_commits == 1
    leases.pin("node-2", REPO, old, 500)  # it comes back in time
    at(1_008_200.0)
    assert collector.run().removed_commits == 0
    at(1_009_000.0)
    collector.run()
    at(1_009_101.0)
    assert collector.run().removed_commits == 1
    with pytest.raises(RevisionNotFound):
        leases.pin("node-1", REPO, old, 10)


@pytest.mark.parametrize(
    ("holder", "seconds"), [("", 1.0), ("x" * 201, 1.0), ("a\n", 1.0), ("a", -1.0), ("a", MAX_S * 2)]
)
def test_a_lease_that_makes_no_sense_is_refused(registry: Registry, holder: str, seconds: float) -> None:
    commit = publish(registry, "org/m", (1,))
    with pytest.raises(InvalidInput):
        Leases(registry.catalog).pin(holder, REPO, commit, seconds)


def test_a_pack_that_is_mostly_garbage_is_rewritten_and_old_placements_still_work(
    registry: Registry, at: Callable[[float], None]
) -> None:
    publish(registry, "org/base", (1,))
    publish(registry, "org/big", (1, 2, 3, 4, 5, 6))  # what is new goes into a pack
    publish(registry, "org/small", (1, 2))  # shares a chunk of it
    before = registry.catalog.contents.placed(RepoId.parse("org/small"), recipe_of((1, 2)).blob)
    registry.catalog.delete_repo(RepoId.parse("org/big"))
    collector = Collector(registry.catalog, TIMES)
    collector.run()
    at(1_000_101.0)
    report = collector.run()
    assert (report.removed_blobs, report.rewritten_objects) == (1, 1)
    assert report.rewritten_bytes >= 4 * BLOCK
    after = registry.catalog.contents.placed(RepoId.parse("org/small"), recipe_of((1, 2)).blob)
    assert after.placement.version == before.placement.version + 1
    old = {placed.key for placed in before.placement.objects} - {placed.key for placed in after.placement.objects}
    assert len(old) == 1
    assert old <= registry.objects()
    assert read(registry, "org/small", (1, 2)) == bytes_of((1, 2))
    at(1_000_212.0)
    collector.run()
    assert not old & registry.objects()
    assert read(registry, "org/small", (1, 2)) == bytes_of((1, 2))
    assert look(registry).damaged == 0


def test_a_pack_that_a_push_relies_on_is_left_alone(registry: Registry, at: Callable[[float], None]) -> None:
    publish(registry, "org/base", (1,))
    publish(registry, "org/big", (1, 2, 3, 4, 5, 6))
    publish(registry, "org/small", (1, 2))
    registry.catalog.delete_repo(RepoId.parse("org/big"))
    collector = Collector(registry.catalog, TIMES)
    collector.run()
    at(1_000_101.0)
    with registry.sessions.open(REPO) as session:
        file = (3, 4, 9)
        data = bytes_of(file)
        entry = session.ingest("a.bin", len(data), io.BytesIO(data), recipe=recipe_of(file)).entry
        report = collector.run()
        assert (report.busy_blobs, report.removed_blobs, report.rewritten_objects) == (1, 0, 0)
        registry.catalog.publisher.publish(REPO, "main", {"a.bin": entry}, author="", message="")
    assert collector.run().removed_blobs == 1
    assert read(registry, "org/m", file) == data


def test_a_commit_that_comes_while_others_are_removed_keeps_its_files(
    registry: Registry, at: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, "org/m", (1, 2, 3))
    publish(registry, "org/m", (4,))
    at(1_002_000.0)
    collector = Collector(registry.catalog, TIMES)
    collector.run()
    at(1_002_101.0)
    holds, came = collector._holds, []

    def reading(domain: str, digest: str, all_: set[str], report: Report) -> set[str]:
        if not came:  # another commit with the same file, after the list of manifests was made
            came.append(publish(registry, "org/m", (1, 2, 3), (5,)))
        return holds(domain, digest, all_, report)

    monkeypatch.setattr(collector, "_holds", reading)
    assert collector.run().removed_commits == 1
    assert came
    assert read(registry, "org/m", (1, 2, 3)) == bytes_of((1, 2, 3))


def test_a_push_that_finds_a_chunk_while_its_pack_is_rewritten_keeps_it(
    registry: Registry, at: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, "org/base", (1,))
    publish(registry, "org/big", (1, 2, 3, 4, 5, 6))
    publish(registry, "org/small", (1, 2))
    registry.catalog.delete_repo(RepoId.parse("org/big"))
    collector = Collector(registry.catalog, TIMES)
    collector.run()
    at(1_000_101.0)
    read_into, session = registry.store.read_into, registry.sessions.open(REPO)
    found: list[ChunkLocation | None] = []

    def reading(key: str, offset: int, buffer: memoryview) -> None:
        if "/packs/" in key and not found:
            found.extend(session.index.find("public", [recipe_of((3,)).id(0)]))
        read_into(key, offset, buffer)

    monkeypatch.setattr(registry.store, "read_into", reading)
    assert collector.run().rewritten_objects == 0
    assert found[0] is not None
    assert session.index.find("public", [recipe_of((3,)).id(0)]) == found
    session.close()
    assert collector.run().rewritten_objects == 1
    assert look(registry).damaged == 0


def test_what_a_push_takes_back_stays_while_readers_may_know_of_it(
    registry: Registry, at: Callable[[float], None]
) -> None:
    key = blob_key("public", "1" * 64)
    registry.store.put_bytes(key, b"of a blob that was removed")
    with registry.database.write() as connection:
        claims.doom(connection, [key], 1_000_050.0)
        claims.doom(connection, [key])  # an earlier time changes nothing
    with registry.sessions.open(REPO) as session:
        with registry.database.write() as connection:
            claims.claim(connection, session.name, [key])
        withdraw(registry.database, registry.store, session.name, [key])
    assert bury(registry.database, registry.store) == 0
    assert key in registry.objects()
    at(1_000_051.0)
    assert bury(registry.database, registry.store) == 1
    assert key not in registry.objects()


def test_nobody_waits_for_a_store_that_is_away(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removals happen while writers wait, so a store is looked at before."""
    key = blob_key("public", "1" * 64)
    registry.store.put_bytes(key, b"of a blob that was removed")
    with registry.database.write() as connection:
        claims.doom(connection, [key])

    def away(*_args: object) -> None:
        raise Unavailable("the store is away")

    waiting = []
    with monkeypatch.context() as patched:
        patched.setattr(registry.store, "check", away)
        patched.setattr(registry.store, "delete", lambda key: waiting.append(key))
        with pytest.raises(Unavailable, match="the store is away"):
            bury(registry.database, registry.store)
    assert waiting == []
    assert bury(registry.database, registry.store) == 1
    assert key not in registry.objects()


def test_a_turn_of_removals_ends_long_before_its_process_is_taken_for_dead() -> None:
    assert burial.TURN_S + cloud.REMOVE_S + cloud.REMOVE_RETRIES_S < postgres.ABANDONED_S / 2


def test_what_waits_for_approval_stays(registry: Registry, at: Callable[[float], None]) -> None:
    waiting = publish(registry, "org/m", (1,))
    shown = publish(registry, "org/m", (2,))
    with registry.database.write() as connection:
        values = {"repository": str(REPO), "ref": "main", "commit": shown, "checked": 0.0, "pending": waiting}
        connection.execute(mirror_refs.insert().values(values))
    at(1_002_000.0)
    report = Collector(registry.catalog, TIMES).run()
    assert (report.kept_refs, report.condemned_commits) == (2, 0)


def test_the_layout_for_xet_goes_with_its_blob(registry: Registry, at: Callable[[float], None]) -> None:
    publish(registry, "org/m", (1, 2))
    blob, key = recipe_of((1, 2)).blob, xet_key("public", "7" * 64)
    registry.store.put_bytes(key, b"a layout")
    with registry.database.write() as connection:
        content.add_objects(connection, "public", [(key, 8)])
        connection.execute(
            xet.xet_layouts.insert().values(
                domain="public", sha256=blob, until=0, failures=0, file=None, record=None, object=None
            )
        )
        assert xet.add(connection, "public", blob, "f" * 64, "7" * 64, key)
    registry.catalog.delete_repo(REPO)
    collector = Collector(registry.catalog, TIMES)
    for now in (1_000_001.0, 1_000_102.0, 1_000_400.0):
        at(now)
        collector.run()
    assert registry.objects() == set()


@pytest.mark.parametrize("engine_url", ["postgres"], indirect=True)
def test_only_one_process_collects_until_it_is_dead(registry: Registry, at: Callable[[float], None]) -> None:
    with registry.database.write(changes=Changes.NOTHING) as connection:
        connection.execute(processes.insert().values(id="other", name="other", expires=1_000_050.0))
        connection.execute(turns.insert().values(name="gc", holder="other"))
    collector = Collector(registry.catalog, TIMES)
    with pytest.raises(Conflict):
        collector.run()
    at(1_000_051.0)
    collector.run()


# --- verification and repair ---


def look(registry: Registry, repair: Repairer | None = None, **options: object) -> Findings:
    pace = Pace(0, lambda: False)
    if repair is not None:
        options["damaged"] = repair.repair
    return Verifier(registry.catalog).run(pace, **options)  # type: ignore[arg-type]


def repairer(registry: Registry) -> Repairer:
    return Repairer(registry.catalog, 110, [], None, threading.Event())


def path_of(registry: Registry, key: str) -> Path:
    return registry.store.root / key


def test_damage_is_found_and_named(registry: Registry) -> None:
    publish(registry, "org/m", (1, 2, 3), (4,))
    publish(registry, "org/other", (5, 6))
    sound = look(registry)
    assert (sound.damaged, sound.stray_objects, sound.chunks) == (0, 0, 6)
    key = blob_key("public", recipe_of((1, 2, 3)).blob)
    flip(path_of(registry, key), BLOCK + 7)
    path_of(registry, blob_key("public", recipe_of((5, 6)).blob)).unlink()
    registry.store.put_bytes(blob_key("public", "0" * 64), b"stray")
    found = look(registry)
    assert {(d.object, d.kind, d.chunk) for d in found.damage} == {
        (key, "bytes", recipe_of((1, 2, 3)).id(1).hex()),
        (blob_key("public", recipe_of((5, 6)).blob), "missing", None),
    }
    assert found.damage[0].blobs == [recipe_of((1, 2, 3)).blob]
    assert found.strays == [blob_key("public", "0" * 64)]
    assert look(registry, repo=REPO).damaged == 1


def test_a_sample_reads_its_share_of_the_chunks_and_looks_at_every_object(registry: Registry) -> None:
    publish(registry, "org/m", tuple(range(1, 61)))
    publish(registry, "org/other", (90, 91))
    whole = look(registry)
    assert whole.chunks == 62
    path_of(registry, blob_key("public", recipe_of((90, 91)).blob)).unlink()
    flip(path_of(registry, blob_key("public", recipe_of(tuple(range(1, 61))).blob)), 7)
    none = look(registry, sample=0.0)
    assert (none.objects, none.chunks, none.bytes) == (whole.objects, 0, 0)
    assert [d.kind for d in none.damage] == ["missing"], "that an object is gone shows without reading anything"
    looks = [look(registry, sample=0.25) for _ in range(60)]
    assert 700 < sum(found.chunks for found in looks) < 1100, "a quarter of 60, sixty times: 900, give or take 26"
    assert {len(found.damage) for found in looks} == {1, 2}, "some saw the chunk that is wrong, and some did not"


def test_a_damaged_record_is_found(registry: Registry) -> None:
    publish(registry, "org/m", (1, 2, 3))
    keys = [key for key in registry.objects() if "/recipes/" in key or "/manifests/" in key]
    for key in keys:
        flip(path_of(registry, key), 50)
    assert {d.object for d in look(registry).damage} == set(keys)


def test_a_push_under_way_is_no_damage_and_no_stray(registry: Registry) -> None:
    with registry.sessions.open(REPO) as session:
        registry.put(b"half of a push", session=session)
        found = look(registry)
        assert (found.damaged, found.stray_objects) == (0, 0)


def test_a_damaged_chunk_comes_back_from_another_copy(registry: Registry) -> None:
    many = (*range(10, 90), 1)  # one chunk of so many is known: the blob stays an object by itself
    publish(registry, "org/a", (1, 2))
    publish(registry, "org/b", many)
    key = blob_key("public", recipe_of((1, 2)).blob)
    assert blob_key("public", recipe_of(many).blob) in registry.objects()
    flip(path_of(registry, key), 3)
    repair = repairer(registry)
    look(registry, repair)
    assert (repair.done.store, repair.done.failed) == (1, 0)
    assert look(registry).damaged == 0
    assert read(registry, "org/a", (1, 2)) == bytes_of((1, 2))
    assert read(registry, "org/b", many) == bytes_of(many)


def test_what_no_source_has_is_said_and_stays(registry: Registry) -> None:
    publish(registry, "org/m", (1, 2, 3))
    key = blob_key("public", recipe_of((1, 2, 3)).blob)
    flip(path_of(registry, key), 3)
    repair = repairer(registry)
    look(registry, repair)
    assert repair.done.failed == 1
    assert "no source" in repair.done.problems[0]
    assert look(registry).damaged == 1
    assert registry.catalog.contents.blob_reader(REPO, recipe_of((1, 2, 3)).blob).read(BLOCK, BLOCK) == bytes_of((2,))


def test_a_damaged_chunk_that_nobody_needs_is_not_used_again(registry: Registry, at: Callable[[float], None]) -> None:
    publish(registry, "org/big", (1, 2, 3))
    publish(registry, "org/small", (1, 2, 4))
    registry.catalog.delete_repo(RepoId.parse("org/big"))
    collector = Collector(registry.catalog, TIMES)
    collector.run()
    at(1_000_101.0)
    collector.run()
    key = blob_key("public", recipe_of((1, 2, 3)).blob)
    flip(path_of(registry, key), 2 * BLOCK + 3)
    repair = repairer(registry)
    look(registry, repair)
    assert (repair.done.forgotten, repair.done.failed) == (1, 0)
    publish(registry, "org/m", (3,))
    assert read(registry, "org/m", (3,)) == bytes_of((3,))


# --- reports ---


def test_shares_add_up_to_what_is_stored(registry: Registry) -> None:
    publish(registry, "org/a", (1, 2, 3))
    publish(registry, "org/a", (1, 2, 3), (4, 5), ref="dev")
    publish(registry, "org/b", (1, 2, 3))
    publish(registry, "org/c", (1, 9))
    registry.put(b"of a push that was given up")
    shares, unheld = registry.catalog.contents.shares()
    by_name = {share.repo: share for share in shares}
    a, b = by_name["models/org/a"], by_name["models/org/b"]
    assert (a.logical, a.unique) == (8 * BLOCK, 5 * BLOCK)
    assert (b.logical, b.unique) == (3 * BLOCK, 3 * BLOCK)
    assert a.stored > b.stored > 0
    total = registry.catalog.contents.usage()
    assert sum(share.stored for share in shares) + unheld == pytest.approx(total.stored)
