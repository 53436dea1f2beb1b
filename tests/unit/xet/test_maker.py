"""Layouts are made in the background: every published large blob gets one, once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios.config import TenantSettings
from helios.errors import EntryNotFound, IntegrityError, RepoNotFound
from helios.metrics import RegistryMetrics
from helios.names import RepoId
from heliosfs.store.keys import PUBLIC, xet_key
from heliosfs.store.placement import PlacedBlob
from registry.burial import bury
from registry.domains import Domains
from registry.metadata import claims, content, mirror, xet
from registry.removal import forget_leftovers
from registry.xet import maker as module
from registry.xet.hashes import to_text
from registry.xet.layouts import Layouts
from registry.xet.maker import Maker
from tests.support.damage import flip
from tests.unit.registry.conftest import Registry

REPO = RepoId.parse("org/m")
HEAD = "c" * 40
"""A commit that nobody lists anything of."""
BLOB = random.Random(1).randbytes(600_000)


def maker(registry: Registry, least: int = 1) -> Maker:
    return Maker(registry.catalog, least, registry.root / "scratch", RegistryMetrics(), lambda: registry.clock[0])


def count(made: Maker, result: str) -> float:
    return made._metrics.registry.get_sample_value("helios_registry_xet_layouts_total", {"result": result}) or 0.0


def layouts(registry: Registry, **options: Any) -> Layouts:
    return Layouts(registry.catalog, **{"on": True, "least": 1, **options})


def entry(registry: Registry, path: str = "w.onnx", repo: RepoId = REPO) -> Any:
    commit = registry.catalog.resolve(repo, "main").commit
    return registry.catalog.contents.manifest(repo, commit).files[path]


def test_a_published_blob_gets_its_layout(registry: Registry) -> None:
    registry.publish("org/m", {"w.onnx": BLOB, "config.json": b"{}"})
    found = layouts(registry)
    w, config = entry(registry), entry(registry, "config.json")
    assert found.announced(REPO, [w, config]) == {}
    made = maker(registry)
    assert made.step()
    assert not made.step(), "a regular file of git has none, as on the Hub"
    announced = found.announced(REPO, [w, config, w])
    layout = found.of(PUBLIC, w.sha256)
    assert announced == {w.sha256: to_text(layout.file)}
    assert found.find(REPO, HEAD, announced[w.sha256]) is layout
    assert (layout.blob, layout.size) == (w.sha256, len(BLOB))
    assert list((registry.root / "scratch").iterdir()) == []
    stored = {key: registry.store.info(key).size for key in registry.objects()}
    (record,) = [size for key, size in stored.items() if "/xet/" in key]
    assert record < 0.01 * len(BLOB)
    assert registry.catalog.contents.usage().stored == sum(
        size for key, size in stored.items() if "/manifests/" not in key and "/commits/" not in key
    )


def test_it_is_announced_from_a_size_on_and_never_taken_back(registry: Registry) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    w = entry(registry)
    assert not maker(registry, least=len(BLOB) + 1).step()
    assert maker(registry, least=len(BLOB)).step()
    file = layouts(registry).announced(REPO, [w])[w.sha256]
    for quiet in (layouts(registry, on=False), layouts(registry, least=len(BLOB) + 1)):
        assert quiet.announced(REPO, [w]) == {}
        assert quiet.find(REPO, HEAD, file).blob == w.sha256  # a client may have a listing from before


def test_the_largest_come_first(registry: Registry) -> None:
    registry.publish("org/m", {f"{size}.onnx": bytes(size) for size in (70_000, 90_000, 80_000)})
    made, order = maker(registry), []
    while (queued := made._claim()) is not None:
        order.append(queued.size)
    assert order == [90_000, 80_000, 70_000]


def test_a_blob_of_nobody_waits(registry: Registry) -> None:
    """Neither what was stored and not published, nor what only a removed repository held."""
    with registry.sessions.open(REPO) as session:
        registry.put(BLOB, "w.onnx", session)
        assert not maker(registry).step()
    registry.publish("org/m", {"w.onnx": BLOB})
    registry.catalog.delete_repo(REPO)
    assert not maker(registry).step()


def test_a_download_waits_for_no_publish(registry: Registry) -> None:
    """A large file is laid out while others of its commit are still coming; where it is listed, it may be read."""
    with registry.sessions.open(REPO) as session:
        blob = registry.put(BLOB, "w.onnx", session).sha256
        with registry.catalog.database.write() as connection:
            mirror.add_download(connection, REPO, f"sha256:{blob}", blob, 0)
        assert maker(registry).step()
        listing = {(REPO, HEAD, blob)}

        def listed(repo: RepoId, commit: str, sha256: str) -> PlacedBlob | None:
            return registry.catalog.contents.placed_blob(PUBLIC, sha256) if (repo, commit, sha256) in listing else None

        found = layouts(registry, listed=listed)
        file = to_text(found.of(PUBLIC, blob).file)
        assert found.find(REPO, HEAD, file).blob == blob
        for repo, commit in [(REPO, "d" * 40), (RepoId.parse("org/other"), HEAD)]:
            with pytest.raises(RepoNotFound):
                found.find(repo, commit, file)


def test_only_a_repository_that_holds_it_gives_it(registry: Registry) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    registry.publish("org/other", {"x.onnx": b"x"})
    maker(registry).step()
    found = layouts(registry)
    file = to_text(found.of(PUBLIC, entry(registry).sha256).file)
    with pytest.raises(EntryNotFound):
        found.find(RepoId.parse("org/other"), HEAD, file)
    with pytest.raises(EntryNotFound):
        found.find(REPO, HEAD, "0" * 64)
    registry.publish("org/other", {"w.onnx": BLOB})
    assert found.find(RepoId.parse("org/other"), HEAD, file).size == len(BLOB)


def test_two_do_not_make_the_same_and_a_killed_ones_claim_ends(registry: Registry) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    first, second = maker(registry), maker(registry)
    assert first._claim() is not None
    assert second._claim() is None
    registry.clock[0] += module.CLAIM_S
    assert second.step()
    assert count(second, "made") == 1


def test_a_claim_is_kept_while_work_goes_on(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    first, second = maker(registry), maker(registry)
    others = []

    def cut(*arguments: Any) -> bytes:
        registry.clock[0] += 7
        arguments[-1]()
        registry.clock[0] += 7
        others.append(second._claim())
        raise IntegrityError("no")

    monkeypatch.setattr(module, "cut", cut)
    first.step()
    assert others == [None]


def test_damage_is_tried_again_later(registry: Registry) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    w = entry(registry)
    (path,) = [p for p in (registry.root / "store/public/blobs").rglob("*") if p.is_file()]
    flip(path, 1234)
    made = maker(registry)
    assert made.step()
    assert count(made, "failed") == 1
    assert not made.step()
    flip(path, 1234)
    registry.clock[0] += module.AGAIN_S[0] - 1
    assert not made.step()
    registry.clock[0] += 1
    assert made.step()
    assert layouts(registry).of(PUBLIC, w.sha256).size == len(BLOB)
    assert (count(made, "made"), count(made, "failed")) == (1, 1)


def test_a_bug_ends_neither_the_registry_nor_the_queue(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, expected_log_errors: Any
) -> None:
    expected_log_errors("laying a blob out broke")
    registry.publish("org/m", {"w.onnx": BLOB, "x.onnx": BLOB[:300_000]})
    made = maker(registry)
    with monkeypatch.context() as patch:
        patch.setattr(module, "cut", lambda *_: 1 / 0)
        assert made.step()
    assert made.step()
    assert layouts(registry).announced(REPO, [entry(registry, "x.onnx")])


def test_a_record_that_is_damaged_is_not_used(registry: Registry) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    maker(registry).step()
    w = entry(registry)
    with registry.database.read() as connection:
        digest = xet.record_of(connection, "public", w.sha256)
    assert digest is not None
    flip(registry.store.root / xet_key("public", digest), 140)
    with pytest.raises(IntegrityError, match="does not match its digest"):
        layouts(registry).of(PUBLIC, w.sha256)


def test_a_layout_goes_with_its_blob_and_stays_with_it(registry: Registry) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    maker(registry).step()
    w = entry(registry)
    with registry.database.write() as connection:  # as a registry that noted no claims left it
        claims.begin(connection, "killed", None)
    registry.store.put_bytes("public/xet/aa/" + "a" * 64, b"a record that got no row")
    registry.sessions.recover()
    assert len([key for key in registry.objects() if "/xet/" in key]) == 1
    assert layouts(registry).of(PUBLIC, w.sha256).size == len(BLOB)
    with registry.database.write() as connection:  # as whoever collects garbage does
        connection.execute(content.blob_objects.delete())
        connection.execute(content.blobs.delete())
    forget_leftovers(registry.database)
    assert bury(registry.database, registry.store) > 0
    assert not any("/xet/" in key for key in registry.objects())
    with pytest.raises(EntryNotFound):
        layouts(registry).of(PUBLIC, w.sha256)


def test_a_blob_that_goes_meanwhile_gets_none(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    made, cut = maker(registry), module.cut

    def and_gone(*arguments: Any) -> bytes:
        record = cut(*arguments)
        with registry.database.write() as connection:
            connection.execute(content.blob_objects.delete())
            connection.execute(content.blobs.delete())
        return record

    monkeypatch.setattr(module, "cut", and_gone)
    made.step()
    assert any("/xet/" in key for key in registry.objects())
    forget_leftovers(registry.database)
    bury(registry.database, registry.store)
    assert not any("/xet/" in key for key in registry.objects())


def test_it_ends_in_the_middle_and_leaves_the_blob_to_the_next(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish("org/m", {"w.onnx": BLOB})
    begun = threading.Event()
    cut: Callable[..., bytes] = module.cut

    def slow(blob: str, size: int, pieces: Any, scratch: Path, alive: Callable[[], None]) -> bytes:
        def drip() -> Any:
            yield next(iter(pieces))[:1000]
            begun.set()
            while True:
                time.sleep(0.01)
                yield memoryview(b"")
                alive()

        return cut(blob, size, drip(), scratch, alive)

    monkeypatch.setattr(module, "cut", slow)

    async def main() -> None:
        task = asyncio.create_task(maker(registry).run())
        assert await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        assert task.cancelled()

    asyncio.run(main())
    monkeypatch.setattr(module, "cut", cut)
    assert list((registry.root / "scratch").iterdir()) == []
    assert maker(registry).step(), "its claim was given back"
    assert layouts(registry).of(PUBLIC, entry(registry).sha256).size == len(BLOB)


def test_each_domain_lays_out_its_own(tmp_path: Path, engine_url: str | None) -> None:
    domains = Domains({"acme": TenantSettings(owns=["acme/*"], domain="acme")})
    registry, mine = Registry.open(tmp_path, engine_url, domains), RepoId.parse("acme/m")
    registry.publish("org/m", {"w.onnx": BLOB})
    registry.publish("acme/m", {"w.onnx": BLOB})
    made, found = maker(registry), layouts(registry)
    assert made.step()
    assert sorted(map(len, (found.announced(repo, [entry(registry)]) for repo in (REPO, mine)))) == [0, 1]
    assert made.step()
    assert not made.step()
    file = found.announced(mine, [entry(registry)])[entry(registry).sha256]
    assert {found.find(repo, HEAD, file).blob for repo in (REPO, mine)} == {entry(registry).sha256}
    assert sorted(key.partition("/")[0] for key in registry.objects() if "/xet/" in key) == ["acme", "public"]
    registry.catalog.delete_repo(mine)
    with pytest.raises(RepoNotFound):
        layouts(registry).find(mine, HEAD, file)
    registry.close()
