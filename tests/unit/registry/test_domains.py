"""Domains: what is stored in one is unknown in every other, and each can be looked after and removed by itself."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from helios.config import TenantSettings
from helios.errors import Conflict, InvalidInput, NotFound, Unavailable, UsageError
from helios.names import RepoId
from heliosfs.store.keys import PUBLIC, blob_key, manifest_key
from heliosfs.store.manifest import FileEntry
from registry.access import Access
from registry.domains import Domains
from registry.gc.collect import Collector, Times
from registry.gc.domains import DomainRemover, Removal, listing
from registry.gc.repair import Repairer
from registry.gc.verify import Findings, Pace, Verifier
from registry.hub.upload.known import Known
from registry.metadata.database import Changes
from registry.metadata.tables import blobs, doomed
from registry.sessions import Session
from tests.support.damage import flip
from tests.unit.registry.conftest import Registry

ACME, OPEN, RIVAL = RepoId.parse("acme/m"), RepoId.parse("org/m"), RepoId.parse("rival/m")
TENANTS = {
    "acme": TenantSettings(owns=["acme/*"], domain="acme"),
    "rival": TenantSettings(owns=["rival/*"], domain="rival"),
    "reader": TenantSettings(sees=["org/*"]),
}
WEIGHTS = bytes(range(256)) * 400
FILES = {"w.bin": WEIGHTS, "config.json": b"{}"}
TIMES = Times(keep_commits_s=1000, grace_s=100, lease_s=10)
START = 1_000_000.0


@pytest.fixture
def registry(tmp_path: Path, engine_url: str | None) -> Iterator[Registry]:
    parts = Registry.open(tmp_path, engine_url, Domains(TENANTS))
    at(parts, START)
    yield parts
    parts.close()


def at(registry: Registry, now: float) -> None:
    registry.clock[0] = now
    registry.database.kind.now = sa.literal(now, sa.Double)


def sha256_of(registry: Registry, repo: RepoId, path: str = "w.bin") -> str:
    commit = registry.catalog.resolve(repo, "main").commit
    return registry.catalog.contents.manifest(repo, commit).files[path].sha256


def in_domain(registry: Registry, domain: str) -> set[str]:
    """The domain's objects, as names that are the same in every domain."""
    return {key.partition("/")[2] for key in registry.objects() if key.startswith(f"{domain}/")}


def without_tenants(registry: Registry) -> Registry:
    """The same registry, started again when acme is no tenant any more."""
    registry.close()
    left = {name: tenant for name, tenant in TENANTS.items() if name != "acme"}
    parts = Registry.open(registry.root, registry.url, Domains(left))
    at(parts, registry.clock[0])
    return parts


# --- the settings ---


def test_what_a_tenant_owns_lies_in_its_domain_and_all_else_in_public() -> None:
    domains = Domains({**TENANTS, "plain": TenantSettings(owns=["plain/*"])})
    assert domains.of(ACME) == "acme"
    assert domains.of(RepoId.parse("acme/data", "datasets")) == "acme"
    assert [domains.of(RepoId.parse(name)) for name in ("org/m", "gpt2", "plain/m")] == [PUBLIC] * 3
    assert domains.names == ["acme", PUBLIC, "rival"]
    assert domains.tenants_of("acme") == ["acme"]
    assert domains.tenants_of(PUBLIC) == ["plain", "reader"]


def test_tenants_can_share_a_domain() -> None:
    both = [TenantSettings(owns=[f"{name}/*", "both/*"], domain="shared") for name in ("a", "b")]
    domains = Domains(dict(zip("ab", both, strict=True)))
    assert domains.of(RepoId.parse("both/m")) == "shared"
    assert domains.tenants_of("shared") == ["a", "b"]


@pytest.mark.parametrize("domain", ["Acme", "a/b", "-a", "a" * 64, "..", " "])
def test_a_malformed_domain_is_refused(domain: str) -> None:
    with pytest.raises(UsageError, match=r"registry\.tenants\.acme\.domain"):
        Domains({"acme": TenantSettings(owns=["acme/*"], domain=domain)})


def test_a_domain_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="owns nothing"):
        Domains({"acme": TenantSettings(domain="acme")})


def test_a_repository_of_two_domains_is_refused() -> None:
    domains = Domains(
        {"a": TenantSettings(owns=["x/*"], domain="a"), "b": TenantSettings(owns=["x/m", "y/*"], domain="b")}
    )
    assert domains.of(RepoId.parse("x/other")) == "a"
    with pytest.raises(UsageError, match=r"a \(domain a\) and b \(domain b\)"):
        domains.of(RepoId.parse("x/m"))


def test_settings_that_move_a_repository_are_refused(registry: Registry) -> None:
    registry.publish("acme/m", FILES)
    registry.publish("org/m", FILES)
    registry.catalog.check_domains()
    for name, tenants in (
        ("acme/m", {}),
        ("acme/m", {"acme": TenantSettings(owns=["acme/*"], domain="other")}),
        ("org/m", {**TENANTS, "late": TenantSettings(owns=["org/*"], domain="late")}),
    ):
        registry.catalog.domains = Domains(tenants)
        with pytest.raises(UsageError, match=f"{name} \\(.* not ") as caught:
            registry.catalog.check_domains()
        assert "helios bundle export" in (caught.value.hint or "")
    # Another process with such settings can't mix domains either; and what is there can be read.
    registry.catalog.domains = Domains()
    with pytest.raises(Conflict, match="lies in the domain acme"):
        registry.publish("acme/m", {"new.bin": b"new"})
    assert registry.catalog.contents.blob_reader(ACME, sha256_of(registry, ACME)).read(0, 300) == WEIGHTS[:300]


# --- storing ---


def test_the_same_model_in_two_domains_is_stored_twice(registry: Registry) -> None:
    registry.publish("org/m", FILES)
    alone = registry.catalog.contents.usage().stored
    registry.publish("org/again", FILES)
    assert registry.catalog.contents.usage().stored == alone, "in a domain it is stored once"
    with registry.sessions.open(ACME) as session:
        found = session.ingest("w.bin", len(WEIGHTS), io.BytesIO(WEIGHTS))
        assert (found.new_bytes, found.deduplicated_bytes) == (len(WEIGHTS), 0)
    for name in ("acme/m", "rival/m"):
        registry.publish(name, FILES)
    usage = registry.catalog.contents.usage()
    size = sum(map(len, FILES.values()))
    assert (usage.logical, usage.unique, usage.stored) == (4 * size, 3 * size, 3 * alone)
    content = {name for name in in_domain(registry, PUBLIC) if not name.startswith("commits/")}
    for domain in ("acme", "rival"):
        assert content == {name for name in in_domain(registry, domain) if not name.startswith("commits/")}
    shares, unheld = registry.catalog.contents.shares()
    assert sum(share.stored for share in shares) + unheld == pytest.approx(usage.stored)
    rows = {row.domain: (row.repositories, row.unique, row.stored) for row, _ in listing(registry.catalog)}
    assert rows == {PUBLIC: (2, size, alone), "acme": (1, size, alone), "rival": (1, size, alone)}


def test_damage_in_one_domain_is_not_seen_in_another(registry: Registry) -> None:
    """Each reads its own copy, also what is in memory."""
    registry.publish("org/m", FILES)
    registry.publish("acme/m", FILES)
    sha256 = sha256_of(registry, OPEN)
    contents = registry.catalog.contents
    assert contents.placed(OPEN, sha256).placement.objects[0].key == blob_key(PUBLIC, sha256)
    assert contents.placed(ACME, sha256).placement.objects[0].key == blob_key("acme", sha256)
    (registry.store.root / blob_key(PUBLIC, sha256)).unlink()
    assert contents.blob_reader(ACME, sha256).read(0, len(WEIGHTS)) == WEIGHTS
    with pytest.raises(NotFound):
        contents.blob_reader(OPEN, sha256).read(0, len(WEIGHTS))


# --- probing ---


def test_a_session_knows_nothing_of_other_domains(registry: Registry) -> None:
    registry.publish("org/m", FILES)
    registry.publish("acme/m", {"secret.bin": b"secret" * 1000})
    mine, theirs = sha256_of(registry, ACME, "secret.bin"), sha256_of(registry, OPEN)
    for repo, known, unknown in ((ACME, mine, theirs), (OPEN, theirs, mine)):
        domain = registry.catalog.domain_of(repo)
        with registry.sessions.open(repo) as session:
            assert session.reuse(known) is not None
            assert session.reuse(unknown) is None
            recipe = registry.catalog.contents.recipe(
                "acme" if unknown == mine else PUBLIC,
                registry.catalog.contents.held(ACME if unknown == mine else OPEN, unknown).recipe,
            )
            ids = [id_ for id_, _ in recipe.chunks()]
            assert session.index.find(session.domain, ids) == [None] * len(ids)
        assert registry.catalog.contents.has_blob(domain, unknown) is None
        assert registry.catalog.contents.holders(domain, unknown) == []
        assert registry.catalog.contents.placed_blob(domain, unknown) is None
        with pytest.raises(NotFound):
            registry.catalog.contents.stored_blob(domain, unknown)


def test_a_file_of_another_domain_can_t_be_published_by_its_hash(registry: Registry) -> None:
    registry.publish("acme/m", {"secret.bin": b"secret" * 1000})
    entry = registry.catalog.contents.manifest(ACME, registry.catalog.resolve(ACME, "main").commit).files["secret.bin"]
    for name in ("org/m", "rival/m"):
        with pytest.raises(NotFound, match="does not hold"):
            registry.catalog.publisher.publish(
                RepoId.parse(name), "main", {"mine.bin": entry}, author="", message="", lineage={}
            )
    assert [str(info.repo) for info in registry.catalog.repos()] == ["models/acme/m"]


@dataclass
class NothingYet:
    """A repository's uploads, before the first."""

    session: Session

    def uploaded(self, _sha256: str) -> bool:
        return False


def test_uploads_are_asked_for_what_only_another_domain_has(registry: Registry) -> None:
    """Even where the caller may read it: what it would save is not worth telling who has what."""
    registry.publish("org/m", FILES)
    for name in ("org/other", "acme/m", "rival/m"):
        registry.publish(name, {"README.md": b"hello"})
    known, everything = Known(registry.catalog), Access()
    sha256 = sha256_of(registry, OPEN)

    def told(repo: RepoId) -> FileEntry | None:
        with registry.sessions.open(repo) as session:
            return known.entry(everything, repo, sha256, NothingYet(session))  # type: ignore[arg-type]

    assert told(RepoId.parse("org/other")) is not None
    assert told(ACME) is None
    assert told(RIVAL) is None


# --- looking after ---


def look(registry: Registry, repair: Repairer | None = None, repo: RepoId | None = None) -> Findings:
    pace = Pace(0, lambda: False)
    if repair is None:
        return Verifier(registry.catalog).run(pace, repo=repo)
    return Verifier(registry.catalog).run(pace, repo=repo, damaged=repair.repair)


def test_every_domain_is_verified(registry: Registry) -> None:
    for name in ("org/m", "acme/m", "rival/m"):
        registry.publish(name, FILES)
    sha256 = sha256_of(registry, ACME)
    stray = blob_key("rival", "0" * 64)
    registry.store.put_bytes(stray, b"stray")
    flip(registry.store.root / blob_key("acme", sha256), 7)
    manifest = manifest_key("rival", registry.catalog.resolve(RIVAL, "main").manifest_digest)
    flip(registry.store.root / manifest, 50)
    found = look(registry)
    assert {damage.object for damage in found.damage} == {blob_key("acme", sha256), manifest}
    assert found.strays == [stray]
    assert [look(registry, repo=repo).damaged for repo in (OPEN, ACME, RIVAL)] == [0, 1, 1]


def test_a_chunk_is_not_repaired_from_another_domain(registry: Registry) -> None:
    registry.publish("org/m", FILES)
    registry.publish("acme/m", FILES)
    flip(registry.store.root / blob_key("acme", sha256_of(registry, ACME)), 7)
    repair = Repairer(registry.catalog, 110, [], None, threading.Event())
    look(registry, repair)
    assert (repair.done.store, repair.done.failed) == (0, 1)


def test_what_one_domain_gives_up_stays_in_another(registry: Registry) -> None:
    registry.publish("org/m", FILES)
    registry.publish("acme/m", FILES)
    assert sum("/manifests/" in key for key in registry.objects()) == 2
    registry.catalog.delete_repo(ACME)
    collector = Collector(registry.catalog, TIMES)
    plan = collector.run(dry_run=True)
    assert (plan.removed_blobs, plan.removed_objects) == (2, 4)
    for now in (START, START + 101, START + 300):
        at(registry, now)
        collector.run()
    assert in_domain(registry, "acme") == set(), "its manifest, too, though another domain has the same"
    assert registry.catalog.contents.blob_reader(OPEN, sha256_of(registry, OPEN)).read(0, 300) == WEIGHTS[:300]
    assert look(registry).damaged == 0


def test_an_upload_given_up_goes_though_another_domain_holds_the_same(registry: Registry) -> None:
    registry.publish("org/m", FILES)
    with registry.sessions.open(ACME) as session:
        registry.put(WEIGHTS, session=session)
        assert in_domain(registry, "acme")
    registry.sessions.clean()
    assert in_domain(registry, "acme") == set()
    assert in_domain(registry, PUBLIC)


def test_what_a_killed_registry_left_in_a_domain_goes(registry: Registry) -> None:
    registry.put(WEIGHTS, session=registry.sessions.open(ACME))
    after = registry.killed()
    at(after, START)
    after.sessions.recover()
    assert in_domain(after, "acme") == set()
    after.close()


# --- removing ---


def remove(registry: Registry, domain: str = "acme") -> Removal:
    return DomainRemover(registry.catalog, TIMES).run(domain)


def test_a_domain_is_removed_when_its_tenant_and_its_models_are_gone(registry: Registry) -> None:
    registry.publish("org/m", FILES)
    registry.publish("acme/m", FILES)
    with pytest.raises(Conflict, match="tenant acme"):
        remove(registry)
    parts = without_tenants(registry)
    with pytest.raises(Conflict, match="models/acme/m"):
        remove(parts)
    parts.catalog.delete_repo(ACME)
    there = in_domain(parts, "acme")
    done = remove(parts)
    assert (done.removed_blobs, done.removed_objects, done.busy) == (2, 4, 0)
    assert in_domain(parts, "acme") == there, "readers may have been told where they lie"
    assert (done.waiting, done.until) == (len(there), START + 300), "the records' lease is the longest"
    assert [row.waiting for row, _ in listing(parts.catalog) if row.domain == "acme"] in ([], [len(there)])
    at(parts, START + 311)
    last = remove(parts)
    assert (last.deleted_objects, last.waiting, last.until) == (len(there), 0, 0)
    assert in_domain(parts, "acme") == set()
    with pytest.raises(NotFound, match="no domain acme"):
        remove(parts)
    assert parts.catalog.contents.blob_reader(OPEN, sha256_of(parts, OPEN)).read(0, 300) == WEIGHTS[:300]
    with parts.database.read() as connection:
        assert set(connection.scalars(sa.select(blobs.c.domain))) == {PUBLIC}
        assert list(connection.scalars(sa.select(doomed.c.key))) == []
    parts.close()


def test_what_nothing_names_goes_with_its_domain(registry: Registry) -> None:
    parts = without_tenants(registry)
    for number in range(3):
        parts.store.put_bytes(blob_key("acme", f"{number}" * 64), b"stray")
    done = remove(parts)
    assert (done.removed_objects, done.freed_bytes, done.waiting) == (3, 15, 3)
    at(parts, START + 111)
    assert remove(parts).deleted_objects == 3
    assert parts.objects() == set()
    parts.close()


@pytest.mark.parametrize("engine_url", ["postgres"], indirect=True)
def test_what_a_push_relies_on_stays_until_it_ends(registry: Registry, postgres_url: str) -> None:
    """One that another process took, whose settings are older."""
    registry.publish("acme/m", FILES)
    session = registry.sessions.open(ACME)
    entry = session.reuse(sha256_of(registry, ACME))
    assert entry is not None
    registry.catalog.delete_repo(ACME)
    registry.catalog.domains = Domains()
    done = remove(registry)
    assert (done.removed_blobs, done.busy) == (1, 1)
    registry.catalog.domains = Domains(TENANTS)
    registry.catalog.publisher.publish(ACME, "main", {"w.bin": entry}, author="", message="", lineage={})
    session.close()
    assert registry.catalog.contents.blob_reader(ACME, entry.sha256).read(0, 300) == WEIGHTS[:300]
    assert look(registry).damaged == 0


def test_a_removal_can_be_stopped_and_goes_on(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.gc.domains.COUNT", 2)
    registry.publish("acme/m", {f"{n}.bin": bytes([n]) * 1000 for n in range(6)})
    parts = without_tenants(registry)
    parts.catalog.delete_repo(ACME)
    asked: list[None] = []

    def stopped() -> bool:
        asked.append(None)
        return len(asked) > 2

    with pytest.raises(Unavailable):
        DomainRemover(parts.catalog, TIMES).run("acme", stopped=stopped)
    assert remove(parts).removed_blobs == 2
    parts.close()


@pytest.mark.parametrize(("domain", "error"), [(PUBLIC, InvalidInput), ("../x", InvalidInput), ("none", NotFound)])
def test_what_is_no_domain_to_remove(registry: Registry, domain: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        remove(registry, domain)


def test_nobody_publishes_into_a_domain_that_is_being_removed(registry: Registry) -> None:
    """A push that came in between finds out that its file has gone; nothing half is visible."""
    registry.publish("acme/m", FILES)
    entry = registry.catalog.contents.has_blob("acme", sha256_of(registry, ACME))
    assert entry is not None
    registry.catalog.delete_repo(ACME)
    registry.catalog.domains = Domains()
    remove(registry)
    registry.catalog.domains = Domains(TENANTS)
    publish: Callable[..., object] = registry.catalog.publisher.publish
    with pytest.raises(NotFound):
        publish(ACME, "main", {"w.bin": entry}, author="", message="", lineage={})
    with registry.database.write(changes=Changes.NOTHING) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(blobs)) == 0
