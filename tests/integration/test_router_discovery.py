"""Models that the router resolves, looks for and has fetched, at a real registry in front of a simulated Hub."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from helios.config import DiscoverySettings, RegistrySettings
from helios.errors import NotFound, Retired, Unavailable, UsageError
from helios.metrics import RouterMetrics
from router.discovery.assembly import Discovery
from router.discovery.models import Name
from router.discovery.progress import Phase
from tests.support.hub_site import write
from tests.support.mirror_site import MB, Site, own_site, shared_site
from tests.support.registry import running_registry


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with shared_site(tmp_path_factory.mktemp("discovery")) as found:
        yield found


class Fleet:
    def __init__(self) -> None:
        self.serves: set[str] = set()
        self.woken: list[tuple[str, str]] = []

    async def wake(self, name: Name, commit: str, report) -> None:
        self.woken.append((name.repo.id, commit))


@asynccontextmanager
async def discovering(*urls: str, fleet: Fleet | None = None, token_file: str = "", **settings):
    fleet = fleet or Fleet()
    options = {"resolve": True, "resolve_ttl_s": 0.05, "fetch": ["org/*"], "resolve_timeout_s": 10.0} | settings
    discovery = Discovery(
        DiscoverySettings(**options), RegistrySettings(urls=list(urls), token_file=token_file), lambda *_: None,
        lambda model: model in fleet.serves, RouterMetrics(), waker=fleet, environ={},
    )  # fmt: skip
    async with discovery.running():
        yield discovery


async def until(ready):
    async with asyncio.timeout(20):
        while not (found := await ready()):
            await asyncio.sleep(0.02)
    return found


def push(site: Site, root: Path, repo: str, text: str) -> str:
    site.helios("push", str(write(root / text, {"config.json": f'{{"text": "{text}"}}'.encode()})), repo)
    return resolved(site, repo)


def resolved(site: Site, repo: str, rev: str = "main") -> str:
    client = site.registry.client()
    try:
        return client.resolve(Name.parse(repo).repo, rev).commit
    finally:
        client.close()


def test_an_alias_is_resolved_followed_and_known_while_the_registry_is_away(tmp_path):
    with own_site(tmp_path, 1000) as (_, open_):
        site = open_()
        first = push(site, tmp_path, "org/name", "one")
        site.helios("ref", "set", "org/name", "champion", "--alias")
        port = str(urlsplit(site.registry.url).port)
        name = Name.parse("org/name@champion")

        async def follow():
            # The first address answers nobody: the second does.
            async with discovering("http://127.0.0.1:9", site.registry.url) as discovery:
                models = discovery.models
                assert (await models.resolve(name)).commit == first
                second = await asyncio.to_thread(push, site, tmp_path, "org/name", "two")
                await asyncio.to_thread(site.helios, "ref", "set", f"org/name@{second}", "champion")
                await until(lambda: _is(models, name, second))
                await asyncio.to_thread(site.registry.kill)
                for _ in range(5):
                    await asyncio.sleep(0.06)
                    assert (await models.resolve(name)).commit == second
                with pytest.raises(Unavailable):
                    await models.resolve(Name.parse("org/name@main"))
                starting = running_registry(site.helios, "--port", port)
                await asyncio.to_thread(starting.__enter__)
                try:
                    answer = await models.resolve(Name.parse(f"org/name@{first}"))
                    assert answer.pinned == f"org/name@{first}"
                finally:
                    await asyncio.to_thread(starting.__exit__, None, None, None)

        asyncio.run(follow())


async def _is(models, name: Name, commit: str) -> bool:
    return (await models.resolve(name)).commit == commit


def test_notices_are_warnings_and_then_errors(site: Site, tmp_path):
    push(site, tmp_path, "org/noticed", "one")
    name = Name.parse("org/noticed")

    async def look():
        async with discovering(site.registry.url) as discovery:
            models = discovery.models
            assert (await models.resolve(name)).headers == []
            why = ["deprecate", "org/noticed", "-m", "it is wrong", "--use", "org/better"]
            await asyncio.to_thread(site.helios, *why)
            await until(lambda: _warned(models, name))
            assert (await models.resolve(name)).headers == [
                ("x-helios-warning", "org/noticed is deprecated: it is wrong Use org/better.")
            ]
            await asyncio.to_thread(site.helios, *why, "--retire")
            with pytest.raises(Retired, match="it is wrong"):
                await until(lambda: _warned(models, name, "never"))
            with pytest.raises(NotFound):
                await models.resolve(Name.parse("org/none"))

    asyncio.run(look())


async def _warned(models, name: Name, text: str = "it is wrong") -> bool:
    return text in ((await models.resolve(name)).warning or "")


def test_a_model_that_only_the_upstream_has_is_fetched_and_woken(site: Site):
    weights = {"config.json": b"{}", "model.bin": bytes(3 * MB)}
    commit = site.hub.commit("org/large", weights)
    site.hub.commit("others/large", weights)
    fleet = Fleet()

    async def ask():
        async with discovering(site.registry.url, fleet=fleet) as discovery:
            site.hub.bytes_per_s = MB
            first = discovery.missing("org/large")
            assert (first.status, first.code, first.retry_after_s) == (503, "model_not_ready", 1)
            progress = await until(lambda: _fetching(discovery))
            assert 0 < progress.done < progress.total
            told = discovery.missing("org/large")
            assert told.status == 503
            assert "MB, " in told.message
            site.hub.bytes_per_s = None
            await until(lambda: _woken(fleet))
            fleet.serves.add("org/large")
            assert (await discovery.availability.wait("org/large", 10)).phase is Phase.SERVED
            assert fleet.woken == [("org/large", commit)]

            end = await discovery.availability.wait("others/large", 10)
            assert (end.phase, end.text) == (Phase.NOWHERE, "the registry may not fetch it for clients")
            refused = discovery.missing("others/large")
            assert (refused.status, refused.code) == (404, "model_not_found")
            end = await discovery.availability.wait("org/nobody-has-it", 10)
            assert end.phase is Phase.NOWHERE
            assert discovery.missing("not a/repository/at all") is None

    asyncio.run(ask())
    site.hub.bytes_per_s = None


async def _fetching(discovery: Discovery):
    progress = discovery.availability.want("org/large")
    return progress if progress.phase is Phase.FETCHING and progress.done else None


async def _woken(fleet: Fleet) -> bool:
    return bool(fleet.woken)


def test_without_a_registry_there_is_nothing_to_ask():
    with pytest.raises(UsageError, match="needs a registry"):
        Discovery(
            DiscoverySettings(resolve=True), RegistrySettings(), lambda *_: None, lambda _: False, RouterMetrics(),
            environ={},
        )  # fmt: skip


def test_sources_of_several_kinds_are_looked_at_together(tmp_path):
    file, told = tmp_path / "workers.toml", {}
    file.write_text('[[workers]]\nmodel = "m"\nurl = "http://h:1"\n')

    async def look():
        discovery = Discovery(
            DiscoverySettings(file=str(file), file_poll_s=0.02), RegistrySettings(),
            lambda source, workers: told.update({source: [one.url for one in workers]}), lambda _: False,
            RouterMetrics(), environ={},
        )  # fmt: skip
        async with discovery.running():
            await until(lambda: _same(told, {"registration": [], "file": ["http://h:1"]}))

    asyncio.run(look())


async def _same(one, other) -> bool:
    return one == other
