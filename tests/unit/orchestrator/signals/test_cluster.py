"""Where routers are and who the front proxy is, as an API server says it that lists, watches and fails as one does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helios.cluster import cluster_client
from helios.config import OperatorSettings, SignalsSettings, TlsSettings
from helios.decoding import converted
from helios.errors import Forbidden, Unauthorized, Unavailable, UsageError
from helios.kube.endpoints import EndpointSlice
from helios.kube.following import Clients, Pace
from helios.kube.reflector import Refused
from helios.metrics import OperatorMetrics
from orchestrator.signals.cluster import OF_SERVICE, Endpoints, front_proxy, urls_of
from orchestrator.signals.front_proxy import CONFIG_MAP, NAMESPACE, FrontProxy, of_config_map
from orchestrator.signals.routers import Together
from orchestrator.signals.selectors import quantity, selected
from orchestrator.signals.serving import of_cluster
from tests.fakes.kubernetes import ApiServer, endpoint, endpoint_slice, kubeconfig
from tests.support.certificates import Authority

OURS = {OF_SERVICE: "router"}
PORTS = [{"name": "http", "port": 8480}, {"name": "admin", "port": 8481}]


def slice_of(name: str, *endpoints: Any, **more: Any) -> dict[str, Any]:
    return endpoint_slice(name, list(endpoints), labels=OURS, ports=more.pop("ports", PORTS), **more)


def urls(*slices: Any, port: str = "admin") -> list[str]:
    return urls_of([converted(one, kind=EndpointSlice) for one in slices], port)


def test_each_router_that_answers_is_asked_once() -> None:
    found = urls(
        slice_of(
            "one", endpoint("10.0.0.1", "a", ready=True), endpoint("10.0.0.2", "b", ready=False),
            endpoint("10.0.0.3", "c", ready=False, terminating=True, serving=True),
            endpoint("10.0.0.4", "d", ready=False, terminating=True, serving=False), endpoint("10.0.0.5", "e"),
        ),
        slice_of("two", endpoint("fd00::1", "a", ready=True), endpoint("fd00::9", "f", ready=True), family="IPv6"),
        slice_of("three", endpoint("10.0.0.1", "a", ready=True)),
    )  # fmt: skip
    assert found == [
        "http://10.0.0.1:8481", "http://10.0.0.3:8481", "http://10.0.0.5:8481", "http://[fd00::9]:8481",
    ]  # fmt: skip
    alone = slice_of("x", endpoint("10.0.0.1", "a"), ports=[{"port": 9}])
    assert urls(alone) == ["http://10.0.0.1:9"], "a single port counts whatever it is called"
    assert urls(slice_of("x", endpoint("10.0.0.1", "a")), port="8480") == ["http://10.0.0.1:8480"]
    assert urls(slice_of("x", endpoint("10.0.0.1", "a")), port="other") == []
    assert urls(slice_of("x")) == []


@contextlib.asynccontextmanager
async def served(root: Path) -> AsyncIterator[tuple[ApiServer, Clients]]:
    server, file = ApiServer(), root / "kubeconfig"
    await server.open()
    file.write_text(kubeconfig(server))
    try:
        yield server, partial(cluster_client, kubeconfig=str(file))
    finally:
        await server.close()


def test_routers_that_come_and_go_are_told_of(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(tmp_path) as (server, clients):
            server.put("endpointslices", slice_of("one", endpoint("10.0.0.1", "a", ready=True)))
            server.put("endpointslices", endpoint_slice("other", [endpoint("10.9.9.9", "z", ready=True)]))
            told: list[list[str]] = []

            def apply(found: Collection[str]) -> None:
                told.append(list(found))

            pace = Pace(silence_s=0.5, watch_s=5, relist_s=60, backoff_s=(0.01, 0.05))
            following = asyncio.create_task(Endpoints(clients, "router", "admin", pace).follow(apply))
            try:
                for addresses in (["10.0.0.1"], ["10.0.0.1", "10.0.0.2"], [], ["10.0.0.3"]):
                    if told:
                        ends = [endpoint(one, one, ready=True) for one in addresses]
                        server.put("endpointslices", slice_of("one", *ends))
                        server.cut()
                    async with asyncio.timeout(60):
                        while not told or told[-1] != [f"http://{one}:8481" for one in addresses]:
                            await asyncio.sleep(0.01)
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    asyncio.run(run())


def test_replicas_of_several_services_are_told_together_once_all_are_known() -> None:
    class Source:
        async def follow(self, apply: Callable[[Collection[str]], None]) -> None:
            self.apply = apply
            await asyncio.Event().wait()

    async def run() -> None:
        one, two, told = Source(), Source(), []  # type: ignore[var-annotated]
        following = asyncio.create_task(Together([one, two]).follow(lambda urls: told.append(list(urls))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        one.apply(["http://b:1", "http://a:1"])
        assert told == [], "two's may have much to do"
        two.apply(["http://c:1", "http://a:1"])
        one.apply([])
        assert told == [["http://a:1", "http://b:1", "http://c:1"], ["http://a:1", "http://c:1"]]
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(run())


def test_the_cluster_says_who_its_front_proxy_is(tmp_path: Path) -> None:
    authority = Path(Authority(tmp_path / "ca").path).read_text()
    data = {
        "requestheader-client-ca-file": authority, "requestheader-allowed-names": '["front-proxy-client"]',
        "requestheader-username-headers": '["X-Remote-User"]', "client-ca-file": "another",
    }  # fmt: skip

    async def run() -> None:
        async with served(tmp_path) as (server, clients):
            with pytest.raises(Refused):
                await front_proxy(clients)
            server.put("configmaps", {"metadata": {"name": CONFIG_MAP, "namespace": NAMESPACE}, "data": data})
            assert await front_proxy(clients) == FrontProxy(authority, ("front-proxy-client",))

    asyncio.run(run())
    with pytest.raises(UsageError, match="has no requestheader-client-ca-file"):
        of_config_map({})
    with pytest.raises(UsageError, match="no list of strings"):
        of_config_map({**data, "requestheader-allowed-names": "front-proxy"})


def test_who_may_ask_is_decided_by_the_certificate_and_what_the_front_proxy_says() -> None:
    def scope(name: str | None, **headers: str) -> dict[str, Any]:
        subject = {} if name is None else {"subject": ((("commonName", name),),)}
        extensions = {} if name is None else {"helios.certificate": subject}
        return {"extensions": extensions, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}

    one = FrontProxy("", ("proxy",))
    user = {"x-remote-user": "hpa"}
    assert one.demand(scope("proxy", **user)) == "hpa"
    assert FrontProxy("").demand(scope("any", **user)) == "hpa"
    with pytest.raises(Unauthorized, match="client certificate"):
        one.demand(scope(None, **user))
    with pytest.raises(Forbidden, match="'other' is not the front proxy's"):
        one.demand(scope("other", **user))
    with pytest.raises(Unauthorized, match="who asks"):
        one.demand(scope("proxy"))


def test_selectors_are_read_strictly_and_quantities_are_kubernetes() -> None:
    assert selected("service=chat,role in (decode)") == {"service": "chat", "role": "decode"}
    assert selected(" service == a.b-c , revision=x ") == {"service": "a.b-c", "revision": "x"}
    for wrong in (
        "", "service", "!service", "service=a,role notin (x)", "service in (a,b)", "service=a/b", "service=", "x=y",
        "service=a,,role=b", "service=a,role in (decode", "=a", "service=a" * 1000,
    ):  # fmt: skip
        with pytest.raises(Exception, match=r"label"):
            selected(wrong)
    assert [quantity(one) for one in (0, 3, 0.5, 2.0004, 1e12)] == ["0", "3", "500m", "2", "1000000000000"]


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    def made(**signals: Any) -> Any:
        return of_cluster(OperatorSettings(signals=SignalsSettings(**signals)), OperatorMetrics())

    pair = Authority(tmp_path / "ca").issue("x", "localhost")
    tls = TlsSettings(cert=pair.cert, key=pair.key)
    some = ["http://r:8481"]
    for signals, named in (
        ({"routers": ["r:8481"]}, "is no address"), ({"routers": some, "router_services": ["a/b"]}, "say both"),
        ({"router_services": ["router"]}, "NAMESPACE/NAME"), ({"routers": some, "stale_s": 1.0}, "stale_s"),
        ({"routers": some, "poll_s": 0.0}, "poll_s"), ({"scaler_listen": "x:1"}, "need"),
        ({"routers": some, "scaler_listen": "x"}, "host:port"),
        ({"routers": some, "external_listen": "127.0.0.1:0"}, "external_tls.cert"),
        ({"routers": some, "scaler_tls": TlsSettings(cert="x")}, "go together"),
        ({"routers": some, "token_file": str(tmp_path / "none")}, "none"),
        ({"routers": some, "external_listen": "h:1", "external_tls": TlsSettings(cert="a", key="b")}, "can't be used"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            made(**signals)
    assert made() is None
    signals = made(routers=some, external_listen="127.0.0.1:0", external_tls=tls)
    with pytest.raises(Unavailable, match="front proxy"):
        signals._believed()
    assert json.dumps(signals.unready)
