"""Quotas: what is used is what ``helios usage`` says, and no two who don't fit together get in together."""

from __future__ import annotations

import asyncio
import io
import random
import threading
from collections.abc import AsyncIterator, Mapping

import pytest

from helios.config import QuotaRule, RegistrySettings, TenantSettings
from helios.errors import QuotaExceeded, Unavailable, UsageError
from helios.names import RepoId
from registry.catalog import Catalog
from registry.gc.collect import Collector, Times
from registry.ingest.ingest import Ingest
from registry.metadata import quotas as tables
from registry.metadata.database import Changes
from registry.metadata.quotas import Amount
from registry.push_log import Announced
from registry.pushes import Pushes
from registry.quotas.quotas import Quota, Quotas, make_quotas
from registry.sessions import Sessions
from tests.unit.registry.conftest import Registry

ONE, TWO, OTHER = (RepoId.parse(name) for name in ("org/one", "org/two", "else/where"))
MIB = 1 << 20


def with_quota(registry: Registry, *quotas: Quota) -> Quotas:
    """The registry's catalog and sessions, made anew with these quotas."""
    made = Quotas(registry.database, quotas)
    registry.catalog = Catalog(registry.database, registry.store, quotas=made)
    ingest = Ingest(registry.store, registry.catalog.index)
    registry.sessions = Sessions(registry.catalog, registry.store, ingest)
    return made


def quota(*, logical: int = 0, stored: int = 0, repo: str = "org/*") -> Quota:
    return Quota(repo, (repo,), Amount(logical, stored))


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def publish(registry: Registry, repo: RepoId, files: Mapping[str, bytes]) -> str:
    """As an upload does it that reserves what it brings."""
    quotas = registry.catalog.quotas
    with registry.sessions.open(ONE) as session:
        stored = sum(len(content) for content in files.values())
        quotas.reserve(session.name, repo, {"test:": Amount(sum(map(len, files.values())), stored)})
        entries = {
            path: session.ingest(path, len(content), io.BytesIO(content)).entry for path, content in files.items()
        }
        published = registry.catalog.publisher.publish(repo, "main", entries, author="", message="", payer=session.name)
        return published.record.commit


async def body(content: bytes) -> AsyncIterator[bytes]:
    yield content


# --- the configuration ---


def test_quotas_are_for_patterns_or_for_what_a_tenant_owns() -> None:
    settings = RegistrySettings(
        quotas=[QuotaRule(repo="org/*", logical_gib=1), QuotaRule(tenant="acme", stored_gib=0.5)],
        tenants={"acme": TenantSettings(owns=["acme/*", "shared/x"])},
    )
    one, two = make_quotas(settings)
    assert one.limit == Amount(1 << 30, 0)
    assert one.concerns(ONE)
    assert not one.concerns(OTHER)
    assert two.limit == Amount(0, 1 << 29)
    assert two.concerns(RepoId.parse("shared/x"))
    datasets = quota(repo="datasets/org/*")
    assert datasets.concerns(RepoId.from_canonical("datasets/org/one"))
    assert not datasets.concerns(ONE)


@pytest.mark.parametrize(
    "rules",
    [
        [QuotaRule()],
        [QuotaRule(repo="a/*", tenant="acme")],
        [QuotaRule(tenant="nobody")],
        [QuotaRule(repo="a/*", stored_gib=-1)],
        [QuotaRule(repo="a/*", stored_gib=1), QuotaRule(repo="a/*", logical_gib=1)],
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(rules: list[QuotaRule]) -> None:
    with pytest.raises(UsageError, match=r"registry\.quotas"):
        make_quotas(RegistrySettings(quotas=rules, tenants={"acme": TenantSettings()}))


# --- what is used ---


def test_what_is_used_is_what_usage_says(registry: Registry) -> None:
    quotas = with_quota(registry, quota(), quota(repo="else/*"), quota(repo="*"))
    shared = noise(1, MIB)
    publish(registry, ONE, {"a": shared, "b": noise(2, 300_000)})
    publish(registry, ONE, {"a": shared, "b": noise(3, 300_000)})
    publish(registry, TWO, {"a": shared})
    publish(registry, OTHER, {"x": shared, "y": b"small"})
    shares, unheld = registry.catalog.contents.shares()
    assert unheld == pytest.approx(0, abs=1)
    org, other, all_ = (state.used for state in quotas.states())
    mine = [share for share in shares if share.repo.startswith("models/org/")]
    assert org.logical == sum(share.logical for share in mine) == 3 * MIB + 600_000
    assert org.stored == pytest.approx(sum(share.stored for share in mine), abs=1)
    assert other.stored == pytest.approx(sum(s.stored for s in shares if s not in mine), abs=1)
    assert all_.logical == registry.catalog.contents.usage().logical
    assert all_.stored == pytest.approx(registry.catalog.contents.usage().stored, abs=2)


def test_charges_are_never_less_than_what_a_count_finds(registry: Registry) -> None:
    quotas = with_quota(registry, quota())
    quotas.states()
    for seed in range(3):
        publish(registry, ONE, {"a": noise(1, MIB), "b": noise(seed, 200_000)})
    (charged,) = quotas.known()
    (counted,) = quotas.states()
    assert charged.used.logical == counted.used.logical
    # Sent three times, stored once; and a recipe is a few bytes more than its file.
    assert charged.used.stored >= counted.used.stored - 10_000
    assert counted.reserved == charged.reserved == Amount()


def test_a_charge_beside_a_count_is_lost_in_neither(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    quotas = with_quota(registry, quota())
    publish(registry, ONE, {"a": noise(1, 1000)})
    original = tables.set_count

    def later(*args: object) -> None:
        tables.charge(args[0], args[1], Amount(7, 9))  # type: ignore[arg-type]
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "set_count", later)
    quotas.count(quotas.rules[0])
    (state,) = quotas.known()
    assert state.used.logical == 1007


# --- refusing ---


def test_a_publish_over_the_logical_limit_is_refused_and_leaves_nothing(registry: Registry) -> None:
    with_quota(registry, quota(logical=1500))
    publish(registry, ONE, {"a": noise(1, 1000)})
    before = registry.objects()
    with pytest.raises(QuotaExceeded, match=r"org/two: the quota of org/\* has no room") as caught:
        publish(registry, TWO, {"a": noise(2, 501)})
    assert "1500 bytes are allowed" in caught.value.message
    assert "1000 bytes used" in caught.value.message
    assert "501 bytes more needed" in caught.value.message
    registry.sessions.clean()
    assert registry.objects() == before
    publish(registry, TWO, {"a": noise(2, 500)})
    publish(registry, OTHER, {"a": noise(3, 9000)})


def test_without_any_reservation_the_publish_itself_is_refused(registry: Registry) -> None:
    with_quota(registry, quota(logical=1500))
    registry.publish("org/one", {"a": noise(1, 1000)})
    with pytest.raises(QuotaExceeded):
        registry.publish("org/one", {"a": noise(2, 1000)})
    with registry.database.read() as connection:
        assert tables.reserved(connection, "org/*: org/*") == Amount()
    assert registry.publish("org/one", {"a": noise(1, 1000)}), "the same commit again takes nothing"


def test_what_was_removed_makes_room_at_once_after_it_was_collected(registry: Registry) -> None:
    with_quota(registry, quota(logical=1500))
    publish(registry, ONE, {"a": noise(1, 1000)})
    registry.catalog.delete_repo(ONE)
    publish(registry, TWO, {"a": noise(2, 1000)})  # counted anew before it would be refused
    collector = Collector(registry.catalog, Times(0.0, 0.0, 0.0))
    collector.run()
    (state,) = registry.catalog.quotas.states()
    assert state.used.logical == 1000


def test_content_that_several_wait_for_is_reserved_once(registry: Registry) -> None:
    quotas = with_quota(registry, quota(stored=1500))
    content = "ab" * 32
    with registry.sessions.open(ONE) as one, registry.sessions.open(ONE) as two:
        quotas.reserve(one.name, ONE, {content: Amount(0, 1000)})
        quotas.reserve(two.name, TWO, {content: Amount(0, 1000)})
        assert quotas.known()[0].reserved == Amount(0, 1000)
        with pytest.raises(QuotaExceeded):
            quotas.reserve(two.name, TWO, {"cd" * 32: Amount(0, 501)})
        with registry.database.write(changes=Changes.NOTHING) as connection:
            quotas.landed(connection, ONE, content)
        assert quotas.known()[0] == quotas.known()[0].__class__(
            "org/*", ("org/*",), Amount(0, 1500), Amount(0, 1000), Amount()
        )


def test_the_same_content_in_two_domains_is_reserved_twice(registry: Registry) -> None:
    domains = {ONE: "public", TWO: "acme"}
    quotas = Quotas(registry.database, [quota(stored=2500)], domain_of=domains.__getitem__)
    content = "ab" * 32
    with registry.sessions.open(ONE) as one, registry.sessions.open(TWO) as two:
        quotas.reserve(one.name, ONE, {content: Amount(0, 1000)})
        quotas.reserve(two.name, TWO, {content: Amount(0, 1000)})
        assert quotas.known()[0].reserved.stored == 2000
        with registry.database.write(changes=Changes.NOTHING) as connection:
            quotas.landed(connection, TWO, content)
        assert quotas.known()[0].reserved.stored == 1000
        quotas.release(one.name, ONE, [content])
        assert quotas.known()[0].reserved.stored == 0


def test_what_is_a_sessions_own_counts_for_each(registry: Registry) -> None:
    quotas = with_quota(registry, quota(stored=1500))
    with registry.sessions.open(ONE) as one, registry.sessions.open(ONE) as two:
        quotas.reserve(one.name, ONE, {"push:": Amount(0, 1000)})
        with pytest.raises(QuotaExceeded):
            quotas.reserve(two.name, ONE, {"push:": Amount(0, 1000)})


def test_all_quotas_that_fit_count(registry: Registry) -> None:
    quotas = with_quota(registry, quota(stored=1 << 40), quota(repo="*", stored=100))
    with registry.sessions.open(ONE) as session, pytest.raises(QuotaExceeded, match=r"the quota of \*"):
        quotas.reserve(session.name, ONE, {"push:": Amount(0, 101)})


def test_a_reservation_ends_with_its_session(registry: Registry) -> None:
    quotas = with_quota(registry, quota(stored=1000))
    with registry.sessions.open(ONE) as session:
        quotas.reserve(session.name, ONE, {"push:": Amount(0, 1000)})
    assert quotas.known()[0].reserved == Amount()
    with pytest.raises(Unavailable):
        quotas.reserve(session.name, ONE, {"push:": Amount(0, 1000)})


def test_a_reservation_ends_with_its_process(registry: Registry) -> None:
    quotas = with_quota(registry, quota(stored=1000))
    quotas.reserve(registry.sessions.open(ONE).name, ONE, {"push:": Amount(0, 1000)})
    after = registry.killed()
    try:
        quotas = with_quota(after, quota(stored=1000))
        after.sessions.recover()
        assert quotas.known()[0].reserved == Amount()
    finally:
        after.close()


def test_of_many_at_once_as_many_get_in_as_fit(registry: Registry) -> None:
    quotas = with_quota(registry, quota(stored=1000))
    results: list[bool] = []

    def one() -> None:
        session = registry.sessions.open(ONE)
        try:
            quotas.reserve(session.name, ONE, {"push:": Amount(0, 300)})
            results.append(True)
        except QuotaExceeded:
            results.append(False)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 5 + [True] * 3
    assert quotas.known()[0].reserved.stored == 900


# --- pushes ---


def test_of_two_pushes_that_fit_alone_one_is_refused_before_it_sends_a_byte(registry: Registry) -> None:
    quotas = with_quota(registry, quota(stored=1500))

    async def main() -> None:
        pushes = Pushes(registry.catalog, registry.sessions)
        files = [Announced("a", 1000, False)]
        first = await pushes.start(ONE, "main", "", "", files)
        with pytest.raises(QuotaExceeded):
            await pushes.start(TWO, "main", "", "", files)
        await pushes.abort(first)
        second = await pushes.start(TWO, "main", "", "", files)
        await pushes.put_body(second, "a", body(noise(1, 1000)))
        assert quotas.known()[0].reserved.stored == 1000
        await pushes.commit(second)
        (state,) = quotas.known()
        assert (state.used, state.reserved) == (Amount(1000, 1000), Amount())
        await pushes.aclose()

    asyncio.run(main())


def test_what_a_push_brings_again_takes_no_room(registry: Registry) -> None:
    quotas = with_quota(registry, quota(stored=2500))

    async def push(pushes: Pushes, repo: RepoId, files: dict[str, bytes]) -> None:
        announced = [Announced(path, len(content), False) for path, content in files.items()]
        id_ = await pushes.start(repo, "main", "", "", announced)
        for path, content in files.items():
            await pushes.put_body(id_, path, body(content))
        await pushes.commit(id_)

    async def main() -> None:
        pushes = Pushes(registry.catalog, registry.sessions)
        weights = noise(1, 2000)
        await push(pushes, ONE, {"weights": weights, "card": b"old"})
        await push(pushes, ONE, {"weights": weights, "card": b"new and longer"})
        with pytest.raises(QuotaExceeded):  # of the same size, but another one: found out when it was sent
            await push(pushes, ONE, {"weights": noise(2, 2000), "card": b"x"})
        await pushes.aclose()

    asyncio.run(main())
    (state,) = quotas.states()
    assert state.used.logical == 4000 + 3 + 14
