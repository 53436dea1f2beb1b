"""KEDA's scaler and the external metrics, asked by real clients: what is not known is an error, and never 0."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from kubernetes.aio.client import ApiClient, ApiException, Configuration, CustomObjectsApi

from helios.demand import Answers, Demand, Held, Line, Model, Reading, Role, Times, Waiting, encode
from helios.rpc.health import NAME, SERVING, Request, Response
from orchestrator.external import ALL
from tests.support.scaled import Certificates, Site, Told, signals_site, status

COMMIT = "a" * 40
GROUP = "external.metrics.k8s.io"


def said(
    *, held: int = 0, flying: int = 0, epoch: str = "e", complete: bool = True, ready: int = 2, read: int = 2,
    waiting: int = 1, total: int = 0,
) -> tuple[bytes, bytes]:  # fmt: skip
    who = Waiting(held, held * 10, 0.5, "worker") if held else None
    readings = tuple(Reading(f"http://w{n}", 0.1, 3, waiting, 0.5, 100, 0.02) for n in range(read))
    role = Role("decode", COMMIT, ready, ready, flying, flying * 100, 0, readings)
    answers = Answers(COMMIT, total, 0, 0, 0, Times((0.5, 1.0), (total, 0, 0), 0.0))
    document = Demand(epoch, complete, False, (Model("org/chat", total, 0.1, who, (role,), (answers,)),))
    line = Line(epoch, complete, (Held("org/chat", who),) if who else ())
    return encode(document), encode(line)


async def until(look: Callable[[], Awaitable[Any]], wanted: Any, timeout_s: float = 15) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                found = await look()
            except grpc.aio.AioRpcError as error:
                found = error.code().name
            if found == wanted:
                return
            await asyncio.sleep(0.02)


def scenario(run: Callable[..., Awaitable[None]], **settings: Any) -> Any:
    async def whole(root: Path) -> None:
        async with Told().serving() as one, Told().serving() as two:
            for told in (one, two):
                told.say(*said())
            both = [one.url, two.url]
            quick = {"poll_s": 0.3, "timeout_s": 0.5, "stale_s": 1.0, **settings}
            async with signals_site(root, both, **quick) as site:
                site.serve("chat", "org/chat", roles=("prefill", "decode"), desired={"decode": 5})
                await until(lambda: site.keda.active(), False)
                await run(site, one, two)

    def test(tmp_path: Path) -> None:
        asyncio.run(whole(tmp_path))

    test.__name__ = run.__name__
    return test


@scenario
async def test_keda_is_told_what_all_routers_have_and_nothing_while_one_is_not_heard(
    site: Site, one: Told, two: Told
) -> None:
    keda = site.keda
    for told, flying in ((one, 3), (two, 4)):
        told.say(*said(flying=flying, held=2))
    await until(lambda: keda.value("helios_in_flight_requests", role="decode"), 7)
    assert await keda.value("helios_queued_requests", role="decode") == 2 * 2 + 2, "at routers, and in engines once"
    assert await keda.value("helios_tokens_in_flight") == 700
    assert await keda.value("helios_kv_usage_percent", revision=COMMIT) == 100, "summed over two workers"
    assert await keda.value("helios_in_flight_requests", role="prefill") == 0
    assert await keda.value("helios_itl_milliseconds") == 20
    assert await keda.value("helios_desired_replicas", role="decode") == 5
    assert await keda.spec(metric="helios_in_flight_requests", target="16.5") == ("helios_in_flight_requests", 16.5)
    assert await keda.spec() == ("helios_desired_replicas", 1)
    one.document, one.line = b"no document", b"no line"
    await until(lambda: keda.value("helios_in_flight_requests"), "UNAVAILABLE")
    assert await keda.active(), "what is known to be there counts"
    two.say(*said())
    await until(lambda: keda.active(), "UNAVAILABLE")
    one.say(*said())
    await until(lambda: keda.active(), False)
    two.say(*said(complete=False))
    await until(lambda: keda.value("helios_in_flight_requests"), "UNAVAILABLE")
    two.say(*said(read=1))
    one.say(*said(read=1))
    await until(lambda: keda.value("helios_in_flight_requests"), 0)
    await until(lambda: keda.value("helios_kv_usage_percent"), "UNAVAILABLE")
    with pytest.raises(grpc.aio.AioRpcError, match="of 2 ready workers 1 have said"):
        await keda.value("helios_kv_usage_percent")


@scenario
async def test_a_request_that_is_held_is_pushed_and_the_answer_follows(site: Site, one: Told, two: Told) -> None:
    pushes = site.keda.pushes()
    assert not (await pushes.read()).result
    two.say(*said(held=1))
    async with asyncio.timeout(2):
        assert (await pushes.read()).result
    two.say(*said())
    async with asyncio.timeout(5):
        assert not (await pushes.read()).result
    site.signals.services.remove("models", "chat")
    site.signals.pulse.beat()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await pushes.read()
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@scenario
async def test_keda_hears_that_no_targets_are_pushed(site: Site, one: Told, two: Told) -> None:
    """By this status alone it asks for them instead, and does not try again."""
    targets = site.keda.channel.unary_stream("/externalscaler.ExternalScaler/StreamMetricSpec")(b"")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await targets.read()
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@scenario
async def test_a_stream_that_falls_silent_is_made_anew_and_a_router_that_starts_anew_is_followed(
    site: Site, one: Told, two: Told
) -> None:
    one.say(*said(total=5, flying=1))
    await until(lambda: site.keda.value("helios_in_flight_requests"), 1)
    names = ["org/chat"]
    before = site.signals.collector.requests(names)
    one.say(*said(total=2, epoch="another", flying=2))
    await until(lambda: site.keda.value("helios_in_flight_requests"), 2)
    assert site.signals.collector.requests(names) - before == 1, "that there was one, not how many"
    one.say(*said(total=4, epoch="another", flying=3))
    await until(lambda: site.keda.value("helios_in_flight_requests"), 3)
    assert site.signals.collector.requests(names) - before == 3
    assert site.signals.collector.outcomes(names, COMMIT).ok == 7
    one.silent = True
    async with asyncio.timeout(10):
        while site.signals.collector._replicas[one.url].line is not None:
            await asyncio.sleep(0.05)
    one.silent = False
    one.say(*said(held=1, epoch="another"))
    await until(lambda: site.keda.active(), True)


@scenario
async def test_what_a_scaled_object_gets_wrong_is_named(site: Site, one: Told, two: Told) -> None:
    for more, named in (
        ({"service": ""}, "metadata.service is ''"), ({"role": "both"}, "no workers of the role 'both'"),
        ({"role": "x"}, "known: both, prefill, decode"), ({"revision": "main"}, "40 hex digits"),
        ({"metric": "cpu", "target": "1"}, "known: helios_queued_requests"),
        ({"metric": "helios_in_flight_requests"}, "metadata.target is ''"),
        ({"metric": "helios_in_flight_requests", "target": "nan"}, "more than 0"),
        ({"sevrice": "x"}, "metadata.sevrice is unknown"), ({"namespace": "other"}, "services of its own namespace"),
        ({"in_namespace": "Not A Name"}, "no name of Kubernetes'"),
    ):  # fmt: skip
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await site.keda.spec(**more)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, more
        assert named in (refused.value.details() or ""), more
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await site.keda.active(in_namespace="other")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    check = site.keda.channel.unary_unary(
        f"/{NAME}/Check", request_serializer=Request.SerializeToString, response_deserializer=Response.FromString
    )
    assert (await check(Request())).status == SERVING


def proxied(site: Site, certificates: Certificates, pair: Any = None, **headers: str) -> ApiClient:
    """The official client as the API server's aggregator is one."""
    configuration = Configuration()
    configuration.host, configuration.ssl_ca_cert = site.external, certificates.cluster.path
    if pair is not None:
        configuration.cert_file, configuration.key_file = pair.cert, pair.key
    client = ApiClient(configuration)
    for name, value in headers.items():
        client.set_default_header(name.replace("_", "-"), value)
    return client


USER = {"x_remote_user": "system:serviceaccount:kube-system:horizontal-pod-autoscaler"}


@scenario
async def test_an_autoscaler_gets_metrics_through_the_front_proxy(site: Site, one: Told, two: Told) -> None:
    one.say(*said(flying=3, held=1))
    await until(lambda: site.keda.value("helios_in_flight_requests"), 3)
    certificates = site.certificates

    async def value(api: Any, metric: str, selector: str = "service=chat") -> Any:
        return await api.list_namespaced_custom_object(GROUP, "v1beta1", "models", metric, label_selector=selector)

    async with proxied(site, certificates, certificates.proxy, **USER) as client:
        api = CustomObjectsApi(client)
        found = await value(api, "helios_in_flight_requests", "service=chat,role in (decode)")
        assert found["kind"] == "ExternalMetricValueList"
        assert found["apiVersion"] == f"{GROUP}/v1beta1"
        (item,) = found["items"]
        assert item["timestamp"].endswith("Z")
        assert (item["metricName"], item["value"]) == ("helios_in_flight_requests", "3")
        assert item["metricLabels"] == {"service": "chat", "role": "decode"}
        group = await api.get_api_resources(GROUP, "v1beta1")
        assert {one.name for one in group.resources} >= {one.name for one in ALL}
        for metric, selector, code, reason, named in (
            ("cpu", "service=chat", 404, "NotFound", "there is no metric 'cpu'"),
            ("helios_queued_requests", "service=other", 404, "NotFound", "no InferenceService 'other'"),
            ("helios_queued_requests", "", 400, "BadRequest", "service=NAME"),
            ("helios_queued_requests", "service!=chat", 400, "BadRequest", "can't be used"),
            ("helios_queued_requests", "service=chat,zone=a", 400, "BadRequest", "known: service, role"),
            ("helios_queued_requests", "service=chat,service=x", 400, "BadRequest", "service=x"),
        ):
            with pytest.raises(ApiException) as refused:
                await value(api, metric, selector)
            found = status(refused.value.body)
            assert (refused.value.status, found["code"], found["reason"]) == (code, code, reason)
            assert named in found["message"]
        two.document, two.line = b"", b""
        await until(lambda: site.keda.value("helios_in_flight_requests"), "UNAVAILABLE")
        with pytest.raises(ApiException) as refused:
            await value(api, "helios_in_flight_requests")
        assert (refused.value.status, status(refused.value.body)["reason"]) == (503, "ServiceUnavailable")
        assert two.url in status(refused.value.body)["message"]
        assert (await value(api, "helios_desired_replicas", "service=chat,role=decode"))["items"][0]["value"] == "5"
    other = certificates.proxies.issue("somebody-else")
    for pair, headers, code in ((None, USER, 401), (other, USER, 403), (certificates.proxy, {}, 401)):
        async with proxied(site, certificates, pair, **headers) as client:
            with pytest.raises(ApiException) as refused:
                await value(CustomObjectsApi(client), "helios_in_flight_requests")
            assert (refused.value.status, status(refused.value.body)["code"]) == (code, code)
    stranger = certificates.cluster.issue("front-proxy-client")
    async with proxied(site, certificates, stranger, **USER) as client:
        with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
            await value(CustomObjectsApi(client), "helios_in_flight_requests")


@scenario
async def test_the_api_server_finds_what_it_asks_for(site: Site, one: Told, two: Told) -> None:
    certificates = site.certificates
    context = ssl.create_default_context(cafile=certificates.cluster.path)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        async with session.get(f"{site.external}/readyz") as answer:
            assert answer.status == 200, "the kubelet has no certificate"
        async with session.get(f"{site.external}/apis") as answer:
            assert answer.status == 401
    context.load_cert_chain(certificates.proxy.cert, certificates.proxy.key)
    headers = {"x-remote-user": "system:kube-aggregator"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), headers=headers) as session:
        for path, kind in (("/apis", "APIGroupList"), (f"/apis/{GROUP}", "APIGroup")):
            async with session.get(site.external + path) as answer:
                assert (await answer.json())["kind"] == kind
        async with session.get(f"{site.external}/openapi/v2") as answer:
            assert (await answer.json())["swagger"] == "2.0"
        async with session.get(f"{site.external}/openapi/v3") as answer:
            assert await answer.json() == {"paths": {}}
        async with session.post(f"{site.external}/apis") as answer:
            assert (answer.status, status(await answer.read())["reason"]) == (405, "MethodNotAllowed")


def test_renewed_certificates_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler's at the next handshake, that of the metrics when it is looked at."""
    monkeypatch.setattr("orchestrator.signals.serving.LOOK_S", 0.05)

    async def shown(url: str, authority: str) -> int:
        context = ssl.create_default_context(cafile=authority)
        host, _, port = url.removeprefix("https://").rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        certificate = writer.get_extra_info("peercert")
        writer.close()
        return int(certificate["serialNumber"], 16)

    async def run() -> None:
        async with Told().serving() as one:
            one.say(*said())
            async with signals_site(tmp_path, [one.url], tls=True) as site:
                authority = site.certificates.cluster
                servers = (site.external, site.scaler)
                before = [await shown(url, authority.path) for url in servers]
                assert before[0] == before[1]
                site.serve("chat", "org/chat", roles=("decode",))
                await until(lambda: site.keda.active(), False)
                authority.issue("operator", "127.0.0.1", "localhost")
                async with asyncio.timeout(10):
                    while any([await shown(url, authority.path) in before for url in servers]):
                        await asyncio.sleep(0.05)

    asyncio.run(run())


def test_more_streams_than_there_are_places_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.signals.scaler.MOST_STREAMS", 2)

    async def run() -> None:
        async with Told().serving() as one:
            one.say(*said())
            async with signals_site(tmp_path, [one.url]) as site:
                site.serve("chat", "org/chat")
                await until(lambda: site.keda.active(), False)
                streams = [site.keda.pushes() for _ in range(2)]
                for stream in streams:
                    await stream.read()
                with pytest.raises(grpc.aio.AioRpcError, match="2 streams already"):
                    await site.keda.pushes().read()
                streams[0].cancel()
                async with asyncio.timeout(5):
                    while True:
                        try:
                            assert not (await site.keda.pushes().read()).result
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.02)
                        else:
                            return

    asyncio.run(run())
