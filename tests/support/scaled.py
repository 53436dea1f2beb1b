"""The operator's signals for tests: routers that are told what to say, and clients such as KEDA and autoscalers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from prometheus_client import CollectorRegistry

from helios.config import SignalsSettings, TlsSettings
from helios.metrics import SignalsMetrics
from orchestrator.signals import externalscaler_pb2 as messages
from orchestrator.signals.front_proxy import FrontProxy
from orchestrator.signals.served import Served
from orchestrator.signals.serving import Signals
from tests.support.certificates import Authority

SERVICE = messages.DESCRIPTOR.services_by_name["ExternalScaler"]
FRONT_PROXY = "front-proxy-client"


class Keda:
    """A client of the scaler: ``await keda.IsActive(…)``, and ``keda.pushes(…)``."""

    def __init__(self, address: str, authority: str = "") -> None:
        options = [("grpc.enable_http_proxy", 0)]
        if authority:
            credentials = grpc.ssl_channel_credentials(Path(authority).read_bytes())
            self.channel = grpc.aio.secure_channel(address, credentials, options)
        else:
            self.channel = grpc.aio.insecure_channel(address, options)

    def ref(self, *, in_namespace: str = "models", **metadata: str) -> Any:
        said = {"scalerAddress": "x:8496", "service": "chat", **metadata}
        return messages.ScaledObjectRef(name="chat", namespace=in_namespace, scalerMetadata=said)

    async def active(self, **metadata: str) -> bool:
        answer = await self._call("IsActive")(self.ref(**metadata), timeout=10)
        return bool(answer.result)

    async def spec(self, **metadata: str) -> tuple[str, float]:
        (one,) = (await self._call("GetMetricSpec")(self.ref(**metadata), timeout=10)).metricSpecs
        return one.metricName, one.targetSizeFloat

    async def value(self, metric: str, **metadata: str) -> float:
        request = messages.GetMetricsRequest(
            scaledObjectRef=self.ref(metric=metric, target="1", **metadata), metricName=f"s0-{metric}"
        )
        (one,) = (await self._call("GetMetrics")(request, timeout=10)).metricValues
        assert one.metricName == f"s0-{metric}"
        return float(one.metricValueFloat)

    def pushes(self, **metadata: str) -> Any:
        return self._call("StreamIsActive")(self.ref(**metadata))

    def _call(self, name: str) -> Any:
        method = SERVICE.methods_by_name[name]
        make = self.channel.unary_stream if name == "StreamIsActive" else self.channel.unary_unary
        return make(
            f"/{SERVICE.full_name}/{name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )


@dataclass
class Certificates:
    """Those of a cluster: the API server's front proxy, and ours."""

    root: Path
    cluster: Authority = field(init=False)
    proxies: Authority = field(init=False)

    def __post_init__(self) -> None:
        self.cluster, self.proxies = Authority(self.root / "cluster"), Authority(self.root / "proxies", "proxies")
        self.ours = self.cluster.issue("operator", "127.0.0.1", "localhost")
        self.proxy = self.proxies.issue(FRONT_PROXY)

    @property
    def front_proxy(self) -> FrontProxy:
        return FrontProxy(Path(self.proxies.path).read_text(), (FRONT_PROXY,))


@dataclass
class Site:
    signals: Signals
    keda: Keda
    scaler: str
    external: str
    certificates: Certificates

    def serve(self, service: str, *names: str, namespace: str = "models", **more: Any) -> None:
        self.signals.services.put(namespace, service, Served(names=names, **more))


@asynccontextmanager
async def signals_site(root: Path, routers: list[str], *, tls: bool = False, **settings: Any) -> AsyncIterator[Site]:
    """Signals of these routers, with both servers."""
    certificates = Certificates(root)
    pair = TlsSettings(cert=certificates.ours.cert, key=certificates.ours.key)
    made = SignalsSettings(
        routers=routers, scaler_listen="127.0.0.1:0", scaler_tls=pair if tls else TlsSettings(),
        external_listen="127.0.0.1:0", external_tls=pair, **settings,
    )  # fmt: skip

    async def front_proxy() -> FrontProxy:
        return certificates.front_proxy

    signals = Signals(made, SignalsMetrics(CollectorRegistry()), front_proxy=front_proxy)
    addresses: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(signals.run(lambda *both: addresses.set_result(both)))
    try:
        await asyncio.wait([running, addresses], return_when=asyncio.FIRST_COMPLETED, timeout=20)
        if running.done():
            running.result()
        scaler, external = addresses.result()
        keda = Keda(scaler, certificates.cluster.path if tls else "")
        try:
            yield Site(signals, keda, scaler, external, certificates)
        finally:
            await keda.channel.close()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Told:
    """A router's administration that says what it is told to say; a line of its stream goes out whenever it changes."""

    def __init__(self, token: str = "") -> None:
        self.document: bytes = b"{}"
        self.line: bytes = b"{}"
        self.silent = False
        self.looks = 0
        self._token = token
        self._changed = asyncio.Event()
        self._ends = False
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.url = ""

    def say(self, document: bytes, line: bytes) -> None:
        self.document, self.line = document, line
        self._changed.set()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[Told]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ends = False
        try:
            yield self
        finally:
            server.close()
            self._ends = True
            self._changed.set()
            for writer in self._open.values():
                writer.close()
            await asyncio.gather(*self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                path = head.split(b" ")[1]
                assert not self._token or f"authorization: bearer {self._token}".encode() in head.lower()
                if path == b"/demand":
                    self.looks += 1
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(self.document) + self.document)
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
                    while not self._ends:
                        changed = self._changed
                        if not self.silent:
                            writer.write(self.line + b"\n")
                        try:
                            async with asyncio.timeout(1.0):
                                await changed.wait()
                        except TimeoutError:
                            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            del self._open[task]
            writer.close()


def status(body: bytes) -> dict[str, Any]:
    """A ``Status`` of Kubernetes'."""
    found: dict[str, Any] = json.loads(body)
    assert found["kind"] == "Status"
    assert found["apiVersion"] == "v1"
    return found
