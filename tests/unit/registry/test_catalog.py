"""Catalog: names, content and reachability, on real SQLite and a real store."""

from __future__ import annotations

import hashlib
import random
import threading

import msgspec
import pytest

from helios.errors import (
    Conflict,
    EntryNotFound,
    IntegrityError,
    InvalidInput,
    NotFound,
    RepoNotFound,
    RevisionNotFound,
)
from helios.names import RepoId
from heliosfs.store.keys import commit_key, recipe_key
from heliosfs.store.manifest import CommitRecord, FileEntry, Manifest, local_commit
from heliosfs.store.recipe import Recipe
from registry.metadata import mirror, repositories
from tests.unit.registry.conftest import Registry

ONE = RepoId.parse("org/one")
TWO = RepoId.parse("org/two")
UNKNOWN = "0" * 40


def test_a_published_snapshot_is_found_by_every_name(registry: Registry) -> None:
    record = registry.publish("org/one", {"config.json": b"{}", "sub/w.bin": b"x" * 5_000_000})
    catalog = registry.catalog
    manifest = catalog.contents.manifest(ONE, record.commit)
    assert record.commit == local_commit(ONE, manifest.digest)
    assert catalog.refs(ONE) == {"main": record.commit}
    for revision in ("main", record.commit):
        found = catalog.resolve(ONE, revision)
        assert (found.commit, found.manifest_digest) == (record.commit, manifest.digest)
    assert hashlib.sha256(catalog.contents.manifest_bytes(ONE, record.commit)).hexdigest() == manifest.digest
    assert catalog.commit_record(ONE, record.commit) == record
    assert [(r.repo, r.refs, r.bytes) for r in catalog.repos()] == [(ONE, {"main": record.commit}, 5_000_002)]
    assert catalog.repos("datasets") == []


def test_the_bytes_come_back(registry: Registry) -> None:
    content = random.Random(1).randbytes(10_240_000)
    record = registry.publish("org/one", {"w.bin": content})
    entry = registry.catalog.contents.manifest(ONE, record.commit).files["w.bin"]
    recipe = Recipe.decode(registry.catalog.contents.recipe_bytes(ONE, entry.sha256), entry.recipe)
    assert recipe.size == len(content)
    reader = registry.catalog.contents.blob_reader(ONE, entry.sha256)
    assert reader.read(0, len(content)) == content
    assert reader.read(4_194_300, 10) == content[4_194_300:4_194_310]
    placement = registry.catalog.contents.placement(ONE, entry.sha256)
    assert sum(run.count for run in placement.runs) == len(recipe)
    assert all(o.url == f"/api/v1/objects/{o.key}" for o in placement.objects)


def test_what_a_commit_needs_is_told_within_bounds(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest blobs first, each once; a damaged one is left out and hides no other."""
    files = {f"{n}.bin": bytes([n]) * (1000 * n) for n in range(6)} | {"copy.bin": b"\5" * 5000}
    record = registry.publish("org/one", files)
    sha = [hashlib.sha256(bytes([n]) * (1000 * n)).hexdigest() for n in range(6)]

    def told() -> list[str]:
        return [each.placement.blob for each in registry.catalog.contents.commit_content(ONE, record.commit).blobs]

    assert told() == [sha[n] for n in (5, 4, 3, 2, 1)]
    monkeypatch.setattr("registry.contents.MAX_BLOBS", 2)
    assert told() == [sha[5], sha[4]]
    monkeypatch.setattr("registry.contents.MAX_BLOBS", 100)
    monkeypatch.setattr("registry.contents.MAX_BYTES", 100)
    assert told() == [sha[5], sha[4]], "two recipes are more than that"
    monkeypatch.setattr("registry.contents.MAX_BYTES", 1000)
    registry.catalog.forget()
    entry = registry.catalog.contents.manifest(ONE, record.commit).files["4.bin"]
    (registry.root / "store" / recipe_key("public", entry.recipe)).unlink()
    assert told() == [sha[n] for n in (5, 3, 2, 1)]
    with pytest.raises(RevisionNotFound):
        registry.catalog.contents.commit_content(ONE, UNKNOWN)
    with pytest.raises(RepoNotFound):
        registry.catalog.contents.commit_content(TWO, record.commit)


def test_records_are_objects_of_the_store_too(registry: Registry) -> None:
    record = registry.publish("org/one", {"a": b"1"})
    key = commit_key("public", ONE, record.commit)
    data = bytearray(registry.store.info(key).size)
    registry.store.read_into(key, 0, memoryview(data))
    assert CommitRecord.decode(bytes(data)) == record
    assert f"public/manifests/{record.manifest[:2]}/{record.manifest}" in registry.objects()


def test_publishing_the_same_again_changes_nothing(registry: Registry) -> None:
    first = registry.publish("org/one", {"a": b"1"})
    registry.clock[0] += 60
    assert registry.publish("org/one", {"a": b"1"}) == first
    with registry.database.read() as connection:
        assert len(repositories.moves_of(connection, ONE)) == 1


def test_history_follows_the_parents(registry: Registry) -> None:
    commits = [registry.publish("org/one", {"a": str(i).encode()}).commit for i in range(4)]
    history = registry.catalog.history(ONE, "main")
    assert [record.commit for record in history] == commits[::-1]
    assert [record.commit for record in registry.catalog.history(ONE, commits[1], 1)] == [commits[1]]


def test_the_hubs_commit_keeps_its_id_and_its_content(registry: Registry) -> None:
    hub = "ab" * 20
    record = registry.publish("org/one", {"a": b"1"}, commit=hub, lineage={"upstream": "https://huggingface.co"})
    assert record.commit == hub
    assert registry.catalog.commit_record(ONE, hub).lineage == {"upstream": "https://huggingface.co"}
    with pytest.raises(Conflict, match="other content"):
        registry.publish("org/one", {"a": b"2"}, commit=hub)
    assert registry.catalog.refs(ONE) == {"main": hub}


def test_a_blob_is_served_only_through_a_repository_that_holds_it(registry: Registry) -> None:
    record = registry.publish("org/one", {"secret": b"s" * 100})
    registry.publish("org/two", {"other": b"o"})
    blob = registry.catalog.contents.manifest(ONE, record.commit).files["secret"].sha256
    assert registry.catalog.contents.placement(ONE, blob).blob == blob
    for call in (
        registry.catalog.contents.placement,
        registry.catalog.contents.recipe_bytes,
        registry.catalog.contents.blob_reader,
    ):
        with pytest.raises(EntryNotFound):
            call(TWO, blob)
    pending = registry.put(b"not published")
    with pytest.raises(EntryNotFound):
        registry.catalog.contents.recipe_bytes(ONE, pending.sha256)


def test_unknown_names(registry: Registry) -> None:
    registry.publish("org/one", {"a": b"1"})
    catalog = registry.catalog
    with pytest.raises(RepoNotFound, match="org/two"):
        catalog.resolve(TWO, "main")
    with pytest.raises(RevisionNotFound, match="its refs: main"):
        catalog.resolve(ONE, "dev")
    with pytest.raises(RevisionNotFound):
        catalog.resolve(ONE, UNKNOWN)
    with pytest.raises(InvalidInput):
        catalog.resolve(ONE, "../main")
    with pytest.raises(RevisionNotFound):
        catalog.set_ref(ONE, "x", UNKNOWN)
    with pytest.raises(RevisionNotFound):
        catalog.delete_ref(ONE, "dev")


def test_a_followed_ref_is_removed_from_where_it_was_seen(registry: Registry) -> None:
    """Of its commit nothing is published yet; where it moved meanwhile it stays."""
    with registry.catalog.database.write() as connection:
        mirror.set_restricted(connection, ONE, False)
        mirror.set_ref(connection, ONE, "main", commit="a" * 40, checked=0.0, pending=None)
    with pytest.raises(Conflict, match=f"has moved: it is {'a' * 40}"):
        registry.catalog.delete_ref(ONE, "main", "b" * 40, followed=True)
    registry.catalog.delete_ref(ONE, "main", "a" * 40, followed=True)
    with registry.catalog.database.read() as connection:
        assert mirror.find_ref(connection, ONE, "main") is None


def test_a_manifest_never_names_a_blob_that_is_not_stored(registry: Registry) -> None:
    ghost = FileEntry("0" * 64, 5, "0" * 40, "0" * 64)
    with pytest.raises(NotFound, match=r"model\.bin"):
        registry.catalog.publisher.publish(ONE, "main", {"model.bin": ghost}, author="", message="")
    entry = registry.put(b"12345")
    wrong = msgspec.structs.replace(entry, size=6)
    with pytest.raises(IntegrityError, match="has 5 bytes, not 6"):
        registry.catalog.publisher.publish(ONE, "main", {"model.bin": wrong}, author="", message="")
    for files in ({}, {"../up": entry}, {"a": entry, "a/b": entry}):
        with pytest.raises(InvalidInput):
            registry.catalog.publisher.publish(ONE, "main", files, author="", message="")
    assert registry.catalog.repos() == []


def test_the_same_bytes_under_two_names_have_one_recipe(registry: Registry) -> None:
    import json
    import struct

    header = json.dumps({"w": {"dtype": "U8", "shape": [2_000_000], "data_offsets": [0, 2_000_000]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(2_000_000)
    plain = registry.publish("org/one", {"w.bin": content})
    cut = registry.publish("org/two", {"w.safetensors": content})
    a = registry.catalog.contents.manifest(ONE, plain.commit).files["w.bin"]
    b = registry.catalog.contents.manifest(TWO, cut.commit).files["w.safetensors"]
    assert a.recipe == b.recipe
    for repo, entry in ((ONE, a), (TWO, b)):
        Recipe.decode(registry.catalog.contents.recipe_bytes(repo, entry.sha256), entry.recipe)
        assert registry.catalog.contents.blob_reader(repo, entry.sha256).read(0, len(content)) == content


def test_compare_and_swap(registry: Registry) -> None:
    a = registry.publish("org/one", {"a": b"a"}).commit
    b = registry.publish("org/one", {"a": b"b"}).commit
    catalog = registry.catalog
    with pytest.raises(Conflict, match="has moved"):
        catalog.set_ref(ONE, "main", a, expect=a)
    with pytest.raises(Conflict):
        catalog.set_ref(ONE, "main", a, expect=None)
    assert catalog.set_ref(ONE, "main", a, expect=b) is True
    assert catalog.set_ref(ONE, "main", a, expect=a) is False
    assert catalog.set_ref(ONE, "champion", b, expect=None) is True
    assert catalog.refs(ONE) == {"champion": b, "main": a}


def test_of_racing_swaps_one_wins(registry: Registry) -> None:
    base = registry.publish("org/one", {"a": b"base"}).commit
    commits = [registry.publish("org/one", {"a": str(i).encode()}, ref=f"r{i}").commit for i in range(8)]
    barrier, won = threading.Barrier(8), []

    def swap(commit: str) -> None:
        barrier.wait()
        try:
            registry.catalog.set_ref(ONE, "main", commit, expect=base)
        except Conflict:
            return
        won.append(commit)

    threads = [threading.Thread(target=swap, args=(commit,)) for commit in commits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert registry.catalog.refs(ONE)["main"] == won[0]


def test_every_move_is_audited_even_after_the_repository_is_gone(registry: Registry) -> None:
    a = registry.publish("org/one", {"a": b"a"}).commit
    b = registry.publish("org/one", {"a": b"b"}).commit
    registry.catalog.delete_repo(ONE, author="admin")
    with registry.database.read() as connection:
        moves = repositories.moves_of(connection, ONE)
    assert [(m.ref, m.old, m.new, m.author) for m in moves] == [
        ("main", b, None, "admin"),
        ("main", a, b, "me"),
        ("main", None, a, "me"),
    ]


def test_a_removed_repository_is_gone_and_can_come_back(registry: Registry) -> None:
    first = registry.publish("org/one", {"a": b"a"})
    registry.publish("org/two", {"a": b"a"})
    registry.catalog.contents.manifest(ONE, first.commit)
    registry.catalog.delete_repo(ONE)
    with pytest.raises(RepoNotFound):
        registry.catalog.resolve(ONE, "main")
    with pytest.raises(RepoNotFound):
        registry.catalog.contents.manifest(ONE, first.commit)
    assert registry.catalog.contents.manifest(TWO, registry.catalog.resolve(TWO, "main").commit).files
    registry.clock[0] += 100
    again = registry.publish("org/one", {"a": b"a"})
    assert again.commit == first.commit
    assert again.time == first.time + 100


def test_usage(registry: Registry) -> None:
    shared, extra = random.Random(1).randbytes(6_000_000), random.Random(2).randbytes(1_000_000)
    registry.publish("org/one", {"w.bin": shared})
    registry.publish("org/one", {"w.bin": shared, "x.bin": extra})
    registry.publish("org/two", {"w.bin": shared})
    one = registry.catalog.contents.usage(ONE)
    assert (one.logical, one.unique) == (13_000_000, 7_000_000)
    assert one.stored == 7_000_000
    everything = registry.catalog.contents.usage()
    assert (everything.logical, everything.unique) == (19_000_000, 7_000_000)
    assert everything.stored == sum(
        i.size for k in ("blobs", "packs", "recipes") for i in registry.store.list(f"public/{k}/")
    )


def test_everything_is_there_after_a_restart(registry: Registry) -> None:
    record = registry.publish("org/one", {"a": b"a"})
    again = registry.reopen()
    try:
        assert again.catalog.resolve(ONE, "main").commit == record.commit
        assert again.catalog.contents.blob_reader(ONE, hashlib.sha256(b"a").hexdigest()).read(0, 1) == b"a"
    finally:
        again.close()


def test_manifests_are_checked_when_they_are_read(registry: Registry) -> None:
    record = registry.publish("org/one", {"a": b"a"})
    path = registry.root / "store" / f"public/manifests/{record.manifest[:2]}/{record.manifest}"
    path.chmod(0o644)
    path.write_bytes(Manifest({}).encode())
    fresh = Registry.open(registry.root, registry.url)
    try:
        with pytest.raises(IntegrityError, match="does not match its digest"):
            fresh.catalog.contents.manifest(ONE, record.commit)
    finally:
        fresh.close()


def test_a_card_says_where_a_model_comes_from(registry: Registry) -> None:
    card = b"---\nbase_model:\n- org/base\n- org/other\nbase_model_relation: finetune\n---\n# Mine\n"
    record = registry.publish("org/one", {"README.md": card, "a": b"1"})
    assert record.lineage == {"base_model": "org/base,org/other", "base_model_relation": "finetune"}
    told = registry.publish("org/one", {"README.md": card, "a": b"2"}, lineage={"upstream": "x"})
    assert told.lineage == {"upstream": "x"}
    for odd in (b"", b"---\nbase_model: [1, {}]\n---\n", b"---\nbase_model: {a: b}\n---\n", b"---\n\xff", b"no card"):
        assert registry.publish("org/two", {"README.md": odd, "b": odd or b"x"}).lineage == {}


def test_a_tag_does_not_move_and_an_alias_does(registry: Registry) -> None:
    catalog = registry.catalog
    first = registry.publish("org/one", {"a": b"1"}).commit
    second = registry.publish("org/one", {"a": b"2"}).commit
    catalog.set_ref(ONE, "v1", first, None, author="ada", kind="tag")
    catalog.set_ref(ONE, "champion", first, None, author="ada", kind="alias")
    assert catalog.ref_kinds(ONE) == {"champion": "alias", "v1": "tag"}
    for expect in (first, ...):
        with pytest.raises(Conflict, match="tags don't move"):
            catalog.set_ref(ONE, "v1", second, expect)
    with pytest.raises(Conflict, match="tags don't move"):
        registry.publish("org/one", {"a": b"3"}, ref="v1")
    assert not catalog.set_ref(ONE, "v1", first, first)
    assert catalog.set_ref(ONE, "champion", second, first, author="bob")
    assert catalog.ref_kinds(ONE)["champion"] == "alias"
    moves = [(m.old, m.new, m.author) for m in catalog.ref_history(ONE, "champion", 10)]
    assert moves == [(first, second, "bob"), (None, first, "ada")]
    catalog.delete_ref(ONE, "v1")
    catalog.set_ref(ONE, "v1", second, None, kind="tag")
    assert catalog.resolve(ONE, "v1").commit == second
    catalog.delete_repo(ONE)
    assert catalog.ref_history(ONE, None, 1)[0].new is None
