"""Bundles: what goes in comes out, whole or not at all, and only what is missing is written."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.errors import HeliosError, IntegrityError, NotFound, Quarantined, RevisionNotFound
from helios.names import RepoId
from registry.transfer import bundle
from tests.support.ingest import seeded
from tests.unit.registry.conftest import Registry

MIB = 1 << 20
REPO = RepoId.parse("org/m")
GOLDEN = Path(__file__).parents[2] / "golden"
FILES = {"config.json": b"{}", "model.bin": seeded(9 * MIB, 1), "again.bin": seeded(9 * MIB, 1), "empty": b""}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Registry]:
    """On SQLite always: where the other one is on PostgreSQL, a bundle crosses from one to the other."""
    parts = Registry.open(tmp_path / "here")
    yield parts
    parts.close()


@pytest.fixture
def there(tmp_path: Path, engine_url: str | None) -> Iterator[Registry]:
    parts = Registry.open(tmp_path / "there", engine_url)
    yield parts
    parts.close()


def exported(registry: Registry, *wanted: str, have: tuple[str, ...] = ()) -> bytes:
    def pairs(specs: tuple[str, ...]) -> list[tuple[RepoId, str]]:
        return [(RepoId.parse(name), rev) for name, _, rev in (spec.partition("@") for spec in specs)]

    return b"".join(bundle.export(registry.catalog, pairs(wanted), pairs(have)))


def load(registry: Registry, data: bytes) -> bundle.Imported:
    return bundle.load(registry.catalog, registry.sessions, io.BytesIO(data))


def content(registry: Registry, repo: RepoId, rev: str) -> dict[str, bytes]:
    commit = registry.catalog.resolve(repo, rev).commit
    files = registry.catalog.contents.manifest(repo, commit).files
    return {p: registry.catalog.contents.blob_reader(repo, e.sha256).read(0, e.size) for p, e in files.items()}


def test_a_commit_arrives_as_it_was(here: Registry, there: Registry) -> None:
    record = here.publish("org/m", FILES)
    done = load(there, exported(here, "org/m@main"))
    assert content(there, REPO, "main") == FILES
    assert there.catalog.commit_record(REPO, record.commit) == record
    assert there.catalog.resolve(REPO, "main") == here.catalog.resolve(REPO, "main")
    assert done.commits == [f"models/org/m@{record.commit}"]
    assert done.new_bytes == 9 * MIB + 2
    assert load(there, exported(here, "org/m@main")).new_bytes == 0


@pytest.mark.parametrize(("name", "kind"), [("v1/plain", "branch"), ("v2/noticed", "tag")])
def test_bundles_of_every_version_are_read(there: Registry, name: str, kind: str) -> None:
    """Version 1 did not say what is a tag, and carried no notices."""
    done = load(there, (GOLDEN / f"{name}.bundle").read_bytes())
    assert len(done.commits) == 2
    assert content(there, REPO, "v1") == {"a": b"one"}
    assert content(there, REPO, "main") == {"a": b"two", "config.json": b"{}"}
    assert there.catalog.ref_kinds(REPO).get("v1", "branch") == kind
    notice = there.catalog.resolve(REPO, "main").notice
    assert notice == ("org/m is deprecated: there is a newer one; use org/new" if kind == "tag" else None)


def test_a_bundle_of_a_later_version_is_refused(there: Registry) -> None:
    data = (GOLDEN / "v2/noticed.bundle").read_bytes().replace(b'"format":2', b'"format":3')
    with pytest.raises(IntegrityError, match="newer than this Helios"):
        load(there, data)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"v1":"tag"', b'"v1":"gat"'), (b'"deprecated"', b'"depricated"'), (b"there is", b"\\nere is")],
)
def test_kinds_and_notices_that_make_no_sense_are_refused(there: Registry, old: bytes, new: bytes) -> None:
    data = (GOLDEN / "v2/noticed.bundle").read_bytes()
    assert len(old) == len(new)
    assert data.count(old) == 1
    with pytest.raises(HeliosError):
        load(there, data.replace(old, new))
    assert there.catalog.count() == 0


def test_other_programs_read_it(here: Registry, tmp_path: Path) -> None:
    here.publish("org/m", FILES)
    (tmp_path / "b.tar").write_bytes(exported(here, "org/m@main"))
    names = subprocess.run(["tar", "tf", tmp_path / "b.tar"], check=True, capture_output=True, text=True).stdout.split()
    assert names[:3] == ["helios-bundle", "commits/0", "manifests/0"]
    assert len([name for name in names if name.startswith("blobs/")]) == 3


def test_what_the_receiver_has_is_left_out(here: Registry, there: Registry, tmp_path: Path) -> None:
    here.publish("org/m", FILES)
    load(there, exported(here, "org/m@main"))
    here.publish("org/m", {**FILES, "config.json": b'{"a": 1}'})
    old = here.catalog.history(REPO, "main")[1].commit
    small = exported(here, "org/m@main", have=(f"org/m@{old}",))
    assert len(small) < 20_000
    assert load(there, small).new_bytes == len(b'{"a": 1}')
    assert content(there, REPO, "main")["config.json"] == b'{"a": 1}'

    third = Registry.open(tmp_path / "third")
    with pytest.raises(NotFound, match="earlier bundle"):
        load(third, small)
    assert third.catalog.count() == 0
    third.close()


def test_chunks_that_are_here_already_are_not_written_again(here: Registry, there: Registry) -> None:
    base = seeded(40 * MIB, 1)
    there.publish("org/base", {"w.bin": base})
    here.publish("org/m", {"w.bin": base[: 20 * MIB] + seeded(4 * MIB, 2) + base[24 * MIB :]})
    assert load(there, exported(here, "org/m@main")).new_bytes == 4 * MIB
    assert content(there, REPO, "main") == content(here, REPO, "main")


def test_several_commits_share_their_blobs(here: Registry, there: Registry) -> None:
    here.publish("org/a", {"w.bin": FILES["model.bin"]})
    here.publish("org/b", {"w.bin": FILES["model.bin"], "x": b"1"})
    data = exported(here, "org/a@main", "org/b@main")
    assert len(data) < 10 * MIB
    assert len(load(there, data).commits) == 2
    assert content(there, RepoId.parse("org/b"), "main") == content(here, RepoId.parse("org/b"), "main")


def test_a_commit_without_its_ref(here: Registry, there: Registry) -> None:
    commit = here.publish("org/m", {"a": b"1"}).commit
    load(there, exported(here, f"org/m@{commit}"))
    assert content(there, REPO, commit) == {"a": b"1"}
    with pytest.raises(RevisionNotFound):
        there.catalog.resolve(REPO, "main")


def test_what_is_kept_back_does_not_leave(here: Registry) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    here.publish("org/m", {"a.bin": pickle.dumps(Evil())})
    with pytest.raises(Quarantined):
        exported(here, "org/m@main")


SMALL = {"config.json": b"{}", "model.bin": seeded(5000, 1), "w": seeded(700, 2)}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_bundle_changes_nothing_or_is_refused(tmp_path_factory: pytest.TempPathFactory, data: object) -> None:
    """Cut anywhere, or with any byte changed: no commit is there that is not whole and right."""
    draw = data.draw  # type: ignore[attr-defined]
    root = tmp_path_factory.mktemp("bundles")
    here, there = Registry.open(root / "here"), Registry.open(root / "there")
    try:
        here.publish("org/m", SMALL)
        good = exported(here, "org/m@main")
        bad = bytearray(good)
        if draw(st.booleans()):
            del bad[draw(st.integers(0, len(good) - 1025)) :]
        else:
            bad[draw(st.integers(0, len(good) - 1025))] ^= 1 << draw(st.integers(0, 7))
        try:
            load(there, bytes(bad))
        except HeliosError:
            assert there.catalog.count() == 0
        else:
            (repo,) = there.catalog.repos()
            for rev in {*repo.refs.values(), here.catalog.resolve(REPO, "main").commit} - {None}:
                assert content(there, repo.repo, rev) == SMALL
    finally:
        here.close()
        there.close()


@pytest.mark.parametrize("data", [b"", b"x" * 511, b"x" * 5000, b"\0" * 2048, b'{"format": 1}'])
def test_what_is_no_bundle_is_refused(there: Registry, data: bytes) -> None:
    with pytest.raises(IntegrityError, match="bundle"):
        load(there, data)
