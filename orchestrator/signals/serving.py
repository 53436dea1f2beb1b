"""Everything about signals put together: what is asked, what is known, and the two servers.

``Signals`` owns its tasks: ``run`` until it is cancelled. The reconcilers tell it which services there are
(``services``), and have samples and outcomes of it (``sampler``, ``collector``); ``pulse`` beats when they should look.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from helios.cluster import cluster_client
from helios.config import OperatorSettings, SignalsSettings
from helios.errors import Unavailable, UsageError
from helios.http.hosts import split_listen
from helios.http.server import Server, listen_tcp, make_config, url_of
from helios.http.tls import LOOK_S, Certificate
from helios.kube.following import Clients, Pace, Waits, why
from helios.metrics import OperatorMetrics, SignalsMetrics
from helios.pulse import Pulse
from helios.tokens import TokenFile
from orchestrator.signals.cluster import FAILURES, Endpoints, front_proxy
from orchestrator.signals.collector import Collector
from orchestrator.signals.external_api import ExternalApi
from orchestrator.signals.front_proxy import FrontProxy
from orchestrator.signals.routers import Listed, Replicas, Routers, Together
from orchestrator.signals.sampler import Sampler
from orchestrator.signals.served import Services
from orchestrator.signals.values import Values

log = logging.getLogger("helios.operator")

TRUST_S: Final = (1.0, 60.0)
"""First wait after the cluster could not say who its front proxy is, and how often it is asked, in seconds."""
CONNECTIONS: Final = 256
"""Connections of the API server at a time; requests of more are answered 503."""


class Signals:
    """What is known of the load, for reconcilers and for whoever scales. Raises UsageError for wrong settings."""

    def __init__(
        self, settings: SignalsSettings, metrics: SignalsMetrics, *, replicas: Replicas | None = None,
        front_proxy: Callable[[], Awaitable[FrontProxy]] | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``replicas``: knows which routers there are; None: the settings say. ``front_proxy``: asks who may have
        external metrics, where the settings don't say."""
        check(settings)
        self._settings, self._metrics, self._clock = settings, metrics, clock
        self.pulse = Pulse()
        self.collector = Collector(clock, stale_s=settings.stale_s, window_s=settings.window_s)
        self.collector.noted = self.pulse.beat
        self.services = Services()
        self.values = Values(self.collector, self.services)
        token = TokenFile(Path(settings.token_file)) if settings.token_file else str
        self._routers = Routers(
            replicas or Listed(settings.routers), self.collector, token, metrics, poll_s=settings.poll_s,
            timeout_s=settings.timeout_s,
        )  # fmt: skip
        self._certificate: Certificate | None = None
        self._front_proxy: FrontProxy | None = None
        self._ask_front_proxy = front_proxy
        if settings.external_listen:
            self._certificate = Certificate(
                settings.external_tls.cert, settings.external_tls.key, "operator.signals.external_tls"
            )
            if settings.external_tls.client_ca or front_proxy is None:
                self._trust(_of_files(settings))
                self._ask_front_proxy = None

    def _trust(self, front_proxy: FrontProxy) -> None:
        """Believe this front proxy from now on. An authority that was believed before is until the operator ends: only
        its names are not. Raises UsageError."""
        if self._certificate is not None and front_proxy != self._front_proxy:
            front_proxy.trusted(self._certificate.context)
        self._front_proxy = front_proxy

    def sampler(self, names: Collection[str], role: str = "") -> Sampler:
        """Samples of a model's role, for the policy."""
        return Sampler(self.collector, names, role)

    # --- health ---

    @property
    def unlive(self) -> str:
        return ""

    @property
    def unready(self) -> str:
        """Whether any router was heard; where there is none, nothing can be said of any model."""
        return "" if self.collector.load(()) is not None else "no router has been heard yet"

    async def changed(self, timeout_s: float) -> None:
        """Wait until something may be another thing, or for so long, in seconds."""
        await self.pulse.after(self.pulse.version, timeout_s)

    # --- running ---

    async def run(self, ready: Callable[[str, str], None] = lambda scaler, external: None) -> None:
        """Ask and answer until cancelled; ``ready`` is told the addresses of the scaler and of the metrics, "" for one
        that is not served. Raises Unavailable where an address can't be used."""
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as servers:
            tasks.create_task(self._routers.run())
            tasks.create_task(self._grow_old())
            scaler = external = ""
            if self._settings.scaler_listen:
                scaler = await servers.enter_async_context(self.serve_scaler())
            if self._settings.external_listen:
                external = await servers.enter_async_context(self.serve_external_metrics(tasks))
            ready(scaler, external)
            await asyncio.Event().wait()

    def serve_scaler(self) -> contextlib.AbstractAsyncContextManager[str]:
        """KEDA's external scaler, while the context lasts."""
        from orchestrator.signals.scaler import Scaler, serving_scaler

        scaler = Scaler(self.values, self.pulse, self._metrics)
        return serving_scaler(scaler, self, self._settings.scaler_listen, self._settings.scaler_tls)

    @asynccontextmanager
    async def serve_external_metrics(self, tasks: asyncio.TaskGroup) -> AsyncIterator[str]:
        """The cluster's external metrics, while the context lasts; its value is their URL."""
        certificate = self._certificate
        assert certificate is not None
        api = ExternalApi(self.values, self._believed, self, self._metrics)
        host, port = split_listen(self._settings.external_listen, "operator.signals.external_listen")
        config = make_config(api.app, grace_s=1, tls=certificate.context)
        config.limit_concurrency = CONNECTIONS
        server = _Quiet(config)
        with contextlib.closing(listen_tcp(host, port, "operator.signals.external_listen")) as sock:
            serving = tasks.create_task(server.serve(sockets=[sock]))
            renewing = [tasks.create_task(_renew(certificate)), tasks.create_task(self._keep_trusting())]
            url = url_of(sock, host, "https")
            log.info("serving external metrics", extra={"url": url})
            try:
                yield url
            finally:
                for task in renewing:
                    task.cancel()
                server.stop()
                await serving

    def _believed(self) -> FrontProxy:
        """Raises Unavailable while it is not known."""
        if self._front_proxy is None:
            raise Unavailable("the cluster has not said yet who its front proxy is")
        return self._front_proxy

    async def _keep_trusting(self) -> None:
        """Whom the cluster names, now and whenever that is another one."""
        ask, waits = self._ask_front_proxy, Waits(*TRUST_S)
        while ask is not None:
            try:
                self._trust(await ask())
            except FAILURES as error:
                log.warning("the front proxy is not known", extra={"reason": why(error)})
                await waits.wait()
            else:
                waits.reset()
                await asyncio.sleep(TRUST_S[1])

    async def _grow_old(self) -> None:
        """What is known changes by itself, too: it gets old."""
        while True:
            await asyncio.sleep(self._settings.stale_s / 3)
            self.pulse.beat()


class _Quiet(Server):
    """Signals are the operator's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _renew(certificate: Certificate) -> None:
    """Show a new certificate when its files change."""
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            if await asyncio.to_thread(certificate.refresh):
                log.info("the certificate of the external metrics was renewed")
        except UsageError as error:
            log.error("the new certificate can't be used; the old one stays", extra={"reason": error.message})


def of_cluster(settings: OperatorSettings, metrics: OperatorMetrics) -> Signals | None:
    """The operator's, as its settings say; None: they name no router. Raises UsageError."""
    ours = settings.signals
    if not (ours.routers or ours.router_services):
        check(ours)
        return None

    def client(namespace: str) -> Clients:
        return lambda: cluster_client(
            kubeconfig=settings.kubeconfig, context=settings.context, namespace=namespace
        )  # fmt: skip

    replicas = None
    if ours.router_services:
        pace, found = Pace(settings.silence_s, settings.watch_s, settings.relist_s), []
        for service in ours.router_services:
            namespace, _, name = service.rpartition("/")
            if not namespace or not name:
                raise UsageError(f"operator.signals.router_services has {service!r}: write NAMESPACE/NAME")
            found.append(Endpoints(client(namespace), name, ours.router_port, pace))
        replicas = Together(found)
    return Signals(
        ours, SignalsMetrics(metrics.registry), replicas=replicas, front_proxy=lambda: front_proxy(client(""))
    )


def check(settings: SignalsSettings) -> None:
    """Raise UsageError for settings that can't work."""
    where = "operator.signals"
    for name in ("poll_s", "timeout_s", "stale_s", "window_s"):
        if getattr(settings, name) <= 0:
            raise UsageError(f"{where}.{name} must be more than 0, not {getattr(settings, name)}")
    if settings.stale_s < settings.poll_s + settings.timeout_s:
        raise UsageError(f"{where}.stale_s must not be less than poll_s and timeout_s together")
    if settings.routers and settings.router_services:
        raise UsageError(f"{where}.routers and {where}.router_services say both where routers are", hint="Give one.")
    for name, tls in (("scaler_tls", settings.scaler_tls), ("external_tls", settings.external_tls)):
        if bool(tls.cert) != bool(tls.key):
            raise UsageError(f"{where}.{name}.cert and {where}.{name}.key go together")
    if settings.external_listen and not settings.external_tls.cert:
        raise UsageError(f"{where}.external_listen needs {where}.external_tls.cert", hint="The API server speaks TLS.")
    if (settings.scaler_listen or settings.external_listen) and not (settings.routers or settings.router_services):
        raise UsageError(f"{where}.scaler_listen and external_listen need {where}.routers or router_services")
    if settings.scaler_listen:
        split_listen(settings.scaler_listen, f"{where}.scaler_listen")


def _of_files(settings: SignalsSettings) -> FrontProxy:
    path = settings.external_tls.client_ca
    if not path:
        raise UsageError(
            "operator.signals.external_tls.client_ca is empty, and nobody has said what the cluster's front proxy is"
        )
    try:
        return FrontProxy(Path(path).read_text(), tuple(settings.external_names))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"operator.signals.external_tls.client_ca={path} can't be read: {error}") from None
