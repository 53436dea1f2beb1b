"""What is downloaded for a snapshot that is not whole stays as long as somebody may want it, and goes in peace."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from helios.config import MirrorRule
from helios.errors import Conflict, RepoNotFound
from helios.names import RepoId
from heliosfs.store.chunks import read as read_chunk
from registry.mirror.state import Mirrored
from registry.pull.spool import KEEP_S
from tests.support.mirrored import Elsewhere, MirrorBySteps, whole
from tests.unit.registry.conftest import Registry

A, B = RepoId.parse("org/a"), RepoId.parse("org/b")
CONFIG, WEIGHTS = b"{}" * 100, b"w" * 5000
FILES = [(CONFIG, False), (WEIGHTS, True)]


@pytest.fixture
def mirror(parts: Registry, upstream: Elsewhere, tmp_path: Path) -> Iterator[MirrorBySteps]:
    rules = [MirrorRule(ttl_s=1.0)]
    made = MirrorBySteps(upstream, parts.catalog, parts.sessions, tmp_path, whole, rules=rules, keep_s=1000.0)
    yield made
    made.close()


def read(mirror: MirrorBySteps, repo: RepoId, path: str, revision: str = "main") -> Mirrored:
    mirror.ask(repo, revision)
    found = mirror.found(repo, revision)
    assert found is not None
    mirror.read(found, path)
    return found


def tidy(parts: Registry, mirror: MirrorBySteps) -> None:
    mirror.downloads.expire()
    parts.sessions.clean()


def test_a_file_that_two_repositories_have_stays_when_one_of_them_needs_it_no_more(parts, upstream, mirror):
    """Both have downloaded the same config.json, each for itself: a git oid is not believed across repositories."""
    for repo in (A, B):
        upstream.push(repo, "main", FILES)
        read(mirror, repo, "0.bin")
    upstream.push(B, "main", [(b"other", False), (WEIGHTS, True)])
    parts.clock[0] += KEEP_S + 1
    mirror.ask(B, "main")  # it has moved, and nobody will come back to what it was
    tidy(parts, mirror)
    found = mirror.found(A, "main")
    assert found is not None
    assert mirror.mirror.placed(found, "0.bin") is not None


def test_a_download_is_served_early_but_for_what_must_be_looked_at_first(parts, upstream, mirror):
    """Xet serves files of a commit that is not published yet. A pickled one waits until it was scanned with the rest,
    which its reader then waits for."""
    pickled, plain = upstream.push(A, "main", FILES), upstream.push(B, "main", FILES)
    listed = upstream.snapshots[plain]
    weights = replace(listed.files[1], path="weights.onnx")
    upstream.snapshots[plain] = replace(listed, files=(listed.files[0], weights))
    sha256 = weights.sha256
    for repo, path in ((A, "1.bin"), (B, "weights.onnx")):
        mirror.ask(repo, "main")
        mirror.mirror.bring(mirror.found(repo, "main"), path, None)
    assert mirror.mirror.listed(B, plain, sha256) is not None
    assert mirror.mirror.listed(B, pickled, sha256) is None, "nobody has listed it in that commit"
    assert mirror.mirror.listed(A, pickled, sha256) is None
    assert mirror.go_on()
    assert not mirror.go_on(), "of the plain one nothing else is wanted"
    assert parts.catalog.refs(A) == {"main": pickled}
    with pytest.raises(RepoNotFound):
        parts.catalog.refs(B)


def test_who_was_told_where_a_download_lies_can_read_it_for_as_long_as_was_said(parts, upstream, mirror):
    commit = upstream.push(A, "main", FILES)
    read(mirror, A, "0.bin")
    upstream.push(A, "main", [(b"other", False), (WEIGHTS, True)])
    parts.clock[0] += KEEP_S + 1
    old = mirror.found(A, commit)
    assert old is not None
    placed = mirror.mirror.placed(old, "0.bin")
    assert placed is not None
    mirror.ask(A, "main")
    tidy(parts, mirror)
    assert mirror.mirror.placed(old, "0.bin") is None
    out = memoryview(bytearray(len(CONFIG)))
    assert read_chunk(parts.store, placed.locate(0), out) == CONFIG


def test_a_repository_that_is_removed_while_somebody_reads_a_download(parts, upstream, mirror):
    upstream.push(A, "main", FILES)
    placed = mirror.mirror.placed(read(mirror, A, "0.bin"), "0.bin")
    assert placed is not None
    parts.catalog.delete_repo(A)
    parts.sessions.recover()
    parts.sessions.clean()
    out = memoryview(bytearray(len(CONFIG)))
    assert read_chunk(parts.store, placed.locate(0), out) == CONFIG


def test_a_repository_that_is_removed_stays_so_while_its_completion_waits(parts, upstream, mirror):
    upstream.push(A, "main", FILES)
    mirror.ask(A, "main")
    found = mirror.found(A, "main")
    assert found is not None
    mirror.mirror._completing.complete(found.snapshot, None)
    parts.catalog.delete_repo(A)
    with pytest.raises(Conflict, match="was removed while"):
        mirror.go_on()
    with pytest.raises(RepoNotFound):
        parts.catalog.refs(A)
    mirror.ask(A, "main")
    assert mirror.found(A, "main") is not None


def test_a_repository_of_which_only_a_commit_was_pulled_is_the_upstreams(parts, upstream, mirror):
    """No name says so, so its records do: what else is asked for is looked for there."""
    commit = upstream.push(A, "main", FILES)
    mirror.pull(A, commit)
    assert mirror.go_on()
    assert parts.catalog.refs(A) == {}
    mirror.ask(A, "main")
    assert mirror.mirror.commit_of(A, "main") == commit


def test_what_a_push_has_stored_and_a_mirror_serves_stays_when_the_push_is_given_up(parts, upstream, mirror):
    with parts.sessions.open(B) as session:
        session.ingest("w.bin", len(WEIGHTS), io.BytesIO(WEIGHTS), recipe=whole(WEIGHTS), lfs=True)
        upstream.push(A, "main", FILES)
        mirror.ask(A, "main")
        found = mirror.found(A, "main")
        assert found is not None
        assert not mirror.read(found, "1.bin"), "it is here already"
        placed = mirror.mirror.placed(found, "1.bin")
    tidy(parts, mirror)
    out = memoryview(bytearray(len(WEIGHTS)))
    assert read_chunk(parts.store, placed.locate(0), out) == WEIGHTS
    assert mirror.mirror.placed(found, "1.bin") is not None
