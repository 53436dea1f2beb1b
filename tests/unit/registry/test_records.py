"""Records that are damaged or lost come back from the metadata, a copy, a peer or the upstream; never a wrong one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios.errors import NotFound, Unavailable
from helios.names import RepoId
from heliosfs.store.keys import blob_key, commit_key, manifest_key, recipe_key
from heliosfs.store.manifest import CommitRecord, Manifest
from heliosfs.store.recipe import Recipe
from heliosfs.store.replicated import ReplicatedStore
from registry.catalog import Catalog
from registry.gc.repair import Repairer, Repairs
from registry.gc.verify import Findings, Pace, Verifier
from registry.ingest.ingest import Ingest
from registry.metadata import mirror
from registry.pull.listing import RemoteFile, Snapshot, encode_listing
from registry.sessions import Sessions
from tests.support.damage import flip
from tests.unit.registry.conftest import Registry
from tests.unit.registry.test_gc_model import File, bytes_of, recipe_of

pytestmark = pytest.mark.parametrize("engine_url", ["sqlite"], indirect=True)

REPO = RepoId.parse("org/m")
HUB = "7" * 40
UPSTREAM = {"upstream": "https://hub.test/org/m"}
FILES = {"config.json": b"{}", "a/model.bin": b"weights"}


class Peer:
    """Another registry that has one commit, and one recipe."""

    def __init__(self, manifest: Manifest, recipe: Recipe | None = None) -> None:
        self.manifest, self.kept = manifest, recipe

    def manifest_of(self, repo: RepoId, commit: str, digest: str) -> Manifest:
        return Manifest.decode(self.manifest.encode(), digest)

    def recipe(self, repo: RepoId, blob: str, digest: str, size: int) -> Recipe:
        if self.kept is None or self.kept.blob != blob:
            raise NotFound("the peer has no such recipe")
        return Recipe.decode(self.kept.encode(), digest)


class Hub:
    """An upstream that lists one commit."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def snapshot(self, repo: RepoId, revision: str, stop: threading.Event) -> Snapshot:
        if (repo, revision) != (self._snapshot.repo, self._snapshot.commit):
            raise NotFound("the upstream has no such commit")
        return self._snapshot


def listed(manifest: Manifest) -> Snapshot:
    """What the upstream lists of a commit with these files."""
    files = [
        RemoteFile(path, entry.size, entry.git_oid, entry.sha256 if entry.lfs else None)
        for path, entry in manifest.files.items()
    ]
    return Snapshot(REPO, HUB, tuple(files), "org", 1, UPSTREAM)


def verify(catalog: Catalog, peers: list[Any] | None = None, upstream: Any = None) -> tuple[Findings, Repairs]:
    """Verify and repair."""
    repairer = Repairer(catalog, 110, peers or [], upstream, threading.Event())
    found = Verifier(catalog).run(
        Pace(0, lambda: False), damaged=repairer.repair, damaged_record=repairer.repair_record
    )
    return found, repairer.done


def damaged(registry: Registry, key: str, how: str) -> bytes:
    """Damage an object; returns what it was."""
    path = registry.store.root / key
    data = path.read_bytes()
    if how == "lost":
        path.unlink()
    else:
        flip(path, len(data) // 2)
    return data


def whole(catalog: Catalog) -> bool:
    return verify(catalog)[0].damaged == 0


@pytest.mark.parametrize("how", ["lost", "flipped"])
def test_a_commit_record_comes_back_from_the_metadata(registry: Registry, how: str) -> None:
    record = registry.publish("org/m", FILES)
    key = commit_key("public", REPO, record.commit)
    was = damaged(registry, key, how)
    found, done = verify(registry.catalog)
    assert [(d.object, d.kind) for d in found.damage] == [(key, "missing" if how == "lost" else "bytes")]
    assert (done.metadata, done.records, done.failed) == (1, 1, 0)
    assert (registry.store.root / key).read_bytes() == was
    assert CommitRecord.decode(was) == record
    assert whole(registry.catalog)


@pytest.mark.parametrize("how", ["lost", "flipped"])
def test_a_manifest_comes_back_from_what_the_upstream_had_listed(registry: Registry, how: str) -> None:
    record = registry.publish("org/m", FILES, commit=HUB, lineage=UPSTREAM)
    manifest = registry.catalog.contents.manifest(REPO, HUB)
    with registry.database.write() as connection:
        mirror.add_snapshot(connection, REPO, HUB, encode_listing(listed(manifest)), 0)
    key = manifest_key("public", record.manifest)
    was = damaged(registry, key, how)
    _, done = verify(registry.catalog)
    assert (done.metadata, done.records, done.failed) == (1, 1, 0)
    assert (registry.store.root / key).read_bytes() == was
    assert whole(registry.catalog)


def test_a_manifest_comes_back_from_a_peer_or_the_upstream_and_no_other_is_taken(registry: Registry) -> None:
    registry.publish("org/m", {**FILES, "more.txt": b"more"}, ref="other")
    record = registry.publish("org/m", FILES, commit=HUB, lineage=UPSTREAM)
    contents = registry.catalog.contents
    manifest, other = (contents.manifest(REPO, contents._resolve(REPO, ref).commit) for ref in ("main", "other"))
    key = manifest_key("public", record.manifest)
    sources: list[tuple[str, list[Any], Any]] = [
        ("peers", [Peer(other), Peer(manifest)], Hub(listed(manifest))),
        ("upstream", [Peer(other)], Hub(listed(manifest))),
    ]
    for source, peers, upstream in sources:
        was = damaged(registry, key, "flipped")
        _, done = verify(registry.catalog, peers, upstream)
        assert (getattr(done, source), done.records, done.failed) == (1, 1, 0)
        assert (registry.store.root / key).read_bytes() == was
    broken = damaged(registry, key, "lost")
    _, done = verify(registry.catalog, [Peer(other)], Hub(listed(other)))
    assert (done.records, done.failed) == (0, 1)
    assert key in done.problems[0]
    assert key not in registry.objects()
    registry.store.put_bytes(key, broken)
    assert whole(registry.catalog)


def store(registry: Registry, file: File) -> str:
    """Publish one file in blocks; returns the key of its recipe."""
    data = bytes_of(file)
    with registry.sessions.open(REPO) as session:
        entry = session.ingest("a.bin", len(data), io.BytesIO(data), recipe=recipe_of(file)).entry
        registry.catalog.publisher.publish(REPO, "main", {"a.bin": entry}, author="", message="")
    return recipe_key("public", entry.recipe)


def test_a_recipe_comes_back_from_the_rows_of_its_blob(registry: Registry) -> None:
    key = store(registry, (1, 2, 3))
    was = damaged(registry, key, "flipped")
    flip(registry.store.root / blob_key("public", recipe_of((1, 2, 3)).blob), 5)  # which it is needed to repair
    found, done = verify(registry.catalog)
    assert found.damaged == 2
    assert (done.metadata, done.records, done.failed) == (1, 1, 1)  # nobody has the chunk
    assert "no source" in done.problems[0]
    assert (registry.store.root / key).read_bytes() == was


def test_a_recipe_that_the_rows_do_not_tell_comes_back_from_a_peer(registry: Registry) -> None:
    file = (1, 2, 1)  # a chunk that comes twice has one row
    key = store(registry, file)
    was = damaged(registry, key, "lost")
    assert verify(registry.catalog)[1].failed == 1
    manifest = registry.catalog.contents.manifest(REPO, registry.catalog.resolve(REPO, "main").commit)
    _, done = verify(registry.catalog, [Peer(manifest, recipe_of((4, 5))), Peer(manifest, recipe_of(file))])
    assert (done.peers, done.records, done.failed) == (1, 1, 0)
    assert (registry.store.root / key).read_bytes() == was


def test_a_record_that_a_replica_has_is_put_right_by_the_store(
    registry: Registry, tmp_path: Path, wait_for: Callable[..., None], expected_log_errors: Callable[[str], None]
) -> None:
    expected_log_errors("a copy is damaged")
    roots = [tmp_path / "one", tmp_path / "two"]
    with contextlib.closing(ReplicatedStore(roots)) as replicas:
        catalog = Catalog(registry.database, replicas)
        sessions = Sessions(catalog, replicas, Ingest(replicas, catalog.index))
        with sessions.open(REPO) as session:
            entry = session.ingest("a.bin", 3, io.BytesIO(b"abc")).entry
            record = catalog.publisher.publish(REPO, "main", {"a.bin": entry}, author="", message="").record
        key = manifest_key("public", record.manifest)
        flip(roots[0] / key, 40)
        _, done = verify(catalog)
        if done.records == 0:  # the other directory is read first
            flip(roots[0] / key, 40)
            flip(roots[1] / key, 40)
            _, done = verify(catalog)
        assert (done.replicas, done.records, done.failed) == (1, 1, 0)
        for root in roots:
            wait_for(
                lambda root=root: hashlib.sha256((root / key).read_bytes()).hexdigest() == record.manifest,  # type: ignore[misc]
                20,
                "its copy",
            )


def test_nothing_is_written_for_what_has_gone_meanwhile(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    record = registry.publish("org/m", FILES)
    key = commit_key("public", REPO, record.commit)
    damaged(registry, key, "lost")
    repairer = Repairer(registry.catalog, 110, [], None, threading.Event())
    find = repairer._records.find

    def and_gone(wanted: Any) -> Any:
        found = find(wanted)
        registry.catalog.delete_repo(REPO)
        return found

    monkeypatch.setattr(repairer._records, "find", and_gone)
    Verifier(registry.catalog).run(Pace(0, lambda: False), damaged_record=repairer.repair_record)
    assert repairer.done.records == 0
    assert key not in registry.objects()


def test_a_source_that_is_away_is_said(registry: Registry) -> None:
    class Away(Peer):
        def manifest_of(self, repo: RepoId, commit: str, digest: str) -> Manifest:
            raise Unavailable("the peer is away")

    record = registry.publish("org/m", FILES)
    manifest = registry.catalog.contents.manifest(REPO, record.commit)
    damaged(registry, manifest_key("public", record.manifest), "lost")
    _, done = verify(registry.catalog, [Away(manifest)])
    assert done.failed == 1
    assert "the peer is away" in done.problems[0]
