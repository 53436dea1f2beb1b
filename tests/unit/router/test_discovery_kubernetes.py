"""Discovery with the official client against an API server that lists and watches as the real one does, and fails."""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import certifi
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios import cluster
from helios.config import KubernetesSettings
from helios.errors import IntegrityError, UsageError
from helios.kube.endpoints import EndpointSlice
from helios.kube.reflector import Gone, Lines, Reflector, Refused
from helios.metrics import RouterMetrics
from router.discovery.endpoints import asleep, workers_of
from router.discovery.kubernetes import KubernetesSource
from router.discovery.objects import Pod, Service, decode
from router.discovery.source import Teller
from tests.fakes.kubernetes import ApiServer, endpoint, endpoint_slice, kubeconfig, line, pod, selector, service

SERVES = {"helios.dev/models": "org/m"}
SELECTOR = "app=vllm"


class Site:
    """An API server, the source that follows it, and what that told last."""

    def __init__(self, root: Path, **options: float | str) -> None:
        self.server, self.file = ApiServer(), root / "kubeconfig"
        self.told: tuple | None = None
        self.metrics = RouterMetrics()
        self.options = {"slices": SELECTOR, "pods": SELECTOR, "silence_s": 0.25, "watch_s": 5.0} | options
        self.task: asyncio.Task[None]

    async def start(self) -> None:
        await self.server.open()
        self.file.write_text(kubeconfig(self.server))
        teller = Teller("kubernetes", self._told, self.metrics)
        source = KubernetesSource(
            KubernetesSettings(kubeconfig=str(self.file), **self.options), teller,
            backoff_s=(0.01, 0.05), settle_s=0.005,
        )  # fmt: skip
        self.task = asyncio.create_task(source.run())

    def _told(self, name, workers) -> None:
        self.told = workers

    async def stop(self) -> None:
        self.task.cancel()
        (outcome,) = await asyncio.gather(self.task, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError), outcome
        await self.server.close()
        assert self.server.complaints == []

    def truth(self):
        """What the cluster has, found without lists or watches."""
        fits = selector(SELECTOR)
        found = {
            plural: [decode(json.dumps(one), kind) for one in self.server.all(plural, "ns") if fits(one)]
            for plural, kind in (("endpointslices", EndpointSlice), ("pods", Pod), ("services", Service))
        }
        there = workers_of(found["endpointslices"], found["pods"], "http") + asleep(found["services"])
        return there.workers

    async def converged(self) -> None:
        await self.until(lambda: self.told == self.truth())

    async def until(self, ready) -> None:
        async with asyncio.timeout(20):
            while not ready():
                assert not self.task.done(), self.task
                await asyncio.sleep(0.005)

    def failures(self, reason: str) -> float:
        labels = {"source": "kubernetes", "reason": reason}
        return self.metrics.registry.get_sample_value("helios_router_discovery_failures_total", labels) or 0


@asynccontextmanager
async def site(root: Path, **options: float | str):
    found = Site(root, **options)
    for number in (1, 2):
        found.server.put("pods", pod(f"p{number}", f"10.0.0.{number}", annotations=SERVES))
    found.server.put("endpointslices", endpoint_slice("s", [endpoint("10.0.0.1", "p1"), endpoint("10.0.0.2", "p2")]))
    await found.start()
    try:
        await found.converged()
        yield found
    finally:
        await found.stop()


def scenario(run):
    def test(tmp_path):
        asyncio.run(run(tmp_path))

    test.__name__, test.__doc__ = run.__name__, run.__doc__
    return test


@scenario
async def test_a_pod_is_cordoned_while_it_is_not_ready_and_gone_when_it_ends(tmp_path):
    async with site(tmp_path) as here:
        assert [(one.url, one.cordoned) for one in here.told] == [
            ("http://10.0.0.1:8000", False), ("http://10.0.0.2:8000", False),
        ]  # fmt: skip
        lists = here.server.lists
        unready = endpoint("10.0.0.1", "p1", ready=False, serving=False, terminating=False)
        here.server.put("endpointslices", endpoint_slice("s", [unready, endpoint("10.0.0.2", "p2")]))
        await here.until(lambda: [one.cordoned for one in here.told] == [True, False])
        ending = endpoint("10.0.0.1", "p1", ready=False, serving=True, terminating=True)
        here.server.put("endpointslices", endpoint_slice("s", [ending, endpoint("10.0.0.2", "p2")]))
        await here.until(lambda: [one.url for one in here.told] == ["http://10.0.0.2:8000"])
        here.server.put("pods", pod("p2", "10.0.0.2", annotations=SERVES, labels={"app": "other"}))
        await here.until(lambda: here.told == ())
        assert here.server.lists == lists, "watches told it"


@scenario
async def test_a_service_without_pods_names_a_model_that_sleeps(tmp_path):
    async with site(tmp_path) as here:
        there = here.told
        notes = {"helios.dev/model": "team/chat"}
        here.server.put("services", service("chat", annotations=notes, labels={"helios.dev/max-queued": "7"}))
        await here.until(lambda: len(here.told) == 3)
        (added,) = [one for one in here.told if not one.url]
        assert (added.model, added.url, added.max_queued) == ("team/chat", "", 7)
        here.server.put("services", service("chat", annotations=notes, labels={"helios.dev/max-queued": "many"}))
        await here.until(lambda: here.told == there)
        problems = here.metrics.registry.get_sample_value("helios_router_discovery_problems", {"source": "kubernetes"})
        assert problems == 1


@scenario
async def test_workers_are_found_where_services_may_not_be_looked_at(tmp_path):
    here = Site(tmp_path)
    here.server.faults.add(lambda call: call.kind == "Service", status=403, times=None)
    here.server.put("pods", pod("p1", "10.0.0.1", annotations=SERVES))
    here.server.put("endpointslices", endpoint_slice("s", [endpoint("10.0.0.1", "p1")]))
    await here.start()
    try:
        await here.until(lambda: here.told is not None and [one.url for one in here.told] == ["http://10.0.0.1:8000"])
        assert here.failures("list") > 0
    finally:
        await here.stop()


@scenario
async def test_a_long_list_comes_in_pages_and_begins_again_when_its_version_is_forgotten(tmp_path):
    here = Site(tmp_path, slices="")
    here.server.page_most = 3
    for number in range(10):
        here.server.put("pods", pod(f"p{number}", f"10.0.0.{number}", annotations=SERVES))
    first = True

    def forgets(query):
        nonlocal first
        if "continue" in query and first:
            first = False
            here.server.compact()

    here.server.before_page = forgets
    await here.start()
    await here.until(lambda: here.told is not None and len(here.told) == 10)
    assert here.server.lists == 1 + 1 + 4
    await here.stop()


@scenario
async def test_a_silent_watch_is_noticed_and_goes_on_where_it_was(tmp_path):
    async with site(tmp_path) as here:
        here.server.mute = True
        here.server.put("endpointslices", endpoint_slice("s", [endpoint("10.0.0.2", "p2")]))
        await here.until(lambda: here.failures("silent") >= 2)
        assert len(here.told) == 2, "nobody has said otherwise"
        lists, here.server.mute = here.server.lists, False
        await here.converged()
        assert len(here.told) == 1
        assert here.server.lists == lists


@scenario
async def test_bytes_without_an_end_are_no_life(tmp_path):
    async with site(tmp_path, watch_s=1.0) as here:
        here.server.drip = True
        here.server.put("endpointslices", endpoint_slice("s", []))
        await here.until(lambda: here.failures("silent") >= 3)
        assert len(here.told) == 2
        here.server.drip = False
        await here.converged()
        assert here.told == ()


@scenario
async def test_a_server_that_leaves_changes_out_is_caught_by_the_next_list(tmp_path):
    async with site(tmp_path, relist_s=0.3, watch_s=1.0) as here:
        here.server.put("endpointslices", endpoint_slice("s", []))
        here.server.cluster.store.log.clear()  # no watch will be told
        await here.converged()
        assert here.told == ()


@scenario
async def test_what_went_while_its_version_was_forgotten_is_gone_after_the_next_list(tmp_path):
    async with site(tmp_path) as here:
        here.server.delete("endpointslices", "s")
        here.server.compact()
        await here.converged()
        assert (here.told, here.failures("gone") > 0) == ((), True)


@scenario
async def test_a_server_that_is_away_changes_nothing(tmp_path):
    async with site(tmp_path) as here:
        await here.server.close()
        await here.until(lambda: here.failures("watch") > 2)
        assert len(here.told) == 2
        here.server.put("endpointslices", endpoint_slice("s", [endpoint("10.0.0.1", "p1")]))
        await here.server.open()
        await here.converged()
        assert len(here.told) == 1


@scenario
async def test_a_token_that_was_renewed_is_read_anew(tmp_path):
    async with site(tmp_path) as here:
        here.server.token = "another"
        here.server.end()
        await here.until(lambda: here.failures("connection") > 0)
        here.file.write_text(kubeconfig(here.server))
        here.server.put("endpointslices", endpoint_slice("s", []))
        await here.converged()
        assert here.told == ()


def test_in_a_pod_the_service_account_is_used(tmp_path, monkeypatch):
    from kubernetes.aio.config import incluster_config

    for name, text in (("token", "secret"), ("ca.crt", certifi.contents()), ("namespace", "models\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(cluster, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")

    async def look(**options):
        teller = Teller("kubernetes", lambda *_: None, RouterMetrics())
        source = KubernetesSource(KubernetesSettings(pods="a=b", **options), teller)
        async with source._client() as (client, namespace):
            configuration = client.configuration
            return configuration.host, await configuration.get_api_key_with_prefix("BearerToken"), namespace

    assert asyncio.run(look()) == ("https://[fd00::1]:443", "bearer secret", "models")
    assert asyncio.run(look(namespace="other"))[2] == "other"
    (tmp_path / "token").unlink()
    with pytest.raises(UsageError, match="token"):
        asyncio.run(look())


def test_something_has_to_be_selected():
    with pytest.raises(UsageError, match="slices, pods, or both"):
        KubernetesSource(KubernetesSettings(), Teller("kubernetes", lambda *_: None, RouterMetrics()))


# --- the protocol without I/O ---


def test_a_reflector_keeps_what_it_has_until_a_list_is_whole():
    known = Reflector(partial(decode, kind=Pod))
    page = {"metadata": {"resourceVersion": "5"}, "items": [pod("a", "1.1.1.1")]}
    assert known.page(json.dumps(page).encode()) is None
    known.begin()
    page = {"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [pod("b", "1.1.1.1")]}
    assert known.page(json.dumps(page).encode()) == "more"
    assert (list(known.objects), known.version) == ([("ns", "a")], "5")
    assert known.page(b'{"metadata": {"resourceVersion": "9"}, "items": null}') is None
    assert (list(known.objects), known.version) == ([("ns", "b")], "9")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (line("ERROR", {"code": 410, "reason": "Expired", "message": "m"}), Gone),
        (line("ERROR", {"code": 500, "reason": "InternalError", "message": "m"}), Refused),
        (line("CHANGED", {"metadata": {"name": "p", "resourceVersion": "1"}}), IntegrityError),
        (line("ADDED", {"metadata": {"name": "p"}}), IntegrityError),
        (line("ADDED", {"metadata": {"resourceVersion": "1"}}), IntegrityError),
        (line("BOOKMARK", {"metadata": {}}), IntegrityError),
        (line("ADDED", {}), IntegrityError),
        (b'{"type": "ADDED"}', IntegrityError),
        (b"<html>", IntegrityError),
    ],
)
def test_what_no_event_is(text, error):
    with pytest.raises(error):
        Reflector(partial(decode, kind=Pod)).event(text)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_come_in_any_pieces(size):
    data, lines = b"first\n\n  \nsecond line\nrest", Lines()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert [one for piece in pieces for one in lines.feed(piece)] == [b"first", b"second line"]


def test_a_line_without_an_end_is_given_up():
    lines = Lines()
    assert list(lines.feed(b"x" * (16 << 20))) == []
    with pytest.raises(IntegrityError, match="16 MiB"):
        list(lines.feed(b"x"))


# --- whatever happens ---


class Convergence(RuleBasedStateMachine):
    """After any faults, once the server is well again, the workers are those that the cluster has."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = tempfile.TemporaryDirectory()
        self.here = Site(Path(self.root.name))
        self.up = True

    @initialize()
    def start(self) -> None:
        for name, ip in (("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.0.3")):
            self.here.server.put("pods", pod(name, ip, annotations=SERVES))
            self.here.server.put("endpointslices", endpoint_slice(name, [endpoint(ip, name)]))
        self.runner.run(self.here.start())
        self.runner.run(self.here.converged())

    def _run(self, seconds: float = 0.01) -> None:
        self.runner.run(asyncio.sleep(seconds))

    names, ips = st.sampled_from(["a", "b", "c"]), st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"])

    @rule(name=names, ip=ips, fits=st.booleans(), ready=st.booleans(), ending=st.booleans())
    def pod(self, name: str, ip: str, fits: bool, ready: bool, ending: bool) -> None:
        labels = {} if fits else {"app": "other"}
        self.here.server.put("pods", pod(name, ip, ready=ready, ending=ending, annotations=SERVES, labels=labels))

    @rule(name=names, pods=st.lists(st.tuples(names, ips, st.booleans()), max_size=3))
    def slice(self, name: str, pods: list[tuple[str, str, bool]]) -> None:
        ends = [endpoint(ip, pod_name, ready=ready) for pod_name, ip, ready in pods]
        self.here.server.put("endpointslices", endpoint_slice(name, ends))

    @rule(name=names, models=st.sampled_from(["", "org/m", "org/m, other"]))
    def service(self, name: str, models: str) -> None:
        self.here.server.put("services", service(name, annotations={"helios.dev/models": models}))

    plurals = st.sampled_from(["pods", "endpointslices", "services"])

    @rule(name=names, plural=plurals)
    def delete(self, name: str, plural: str) -> None:
        self.here.server.delete(plural, name)

    @rule(name=names, plural=plurals)
    def delete_unseen(self, name: str, plural: str) -> None:
        """No watch will ever tell of it."""
        self.here.server.delete(plural, name)
        self.here.server.compact()

    @rule()
    def time_passes(self) -> None:
        self._run(0.02)

    @rule(how=st.sampled_from(["cut", "end", "compact"]))
    def fault(self, how: str) -> None:
        getattr(self.here.server, how)()

    @rule(codes=st.lists(st.sampled_from([403, 410, 429, 500]), max_size=3), as_status=st.booleans())
    def refuse(self, codes: list[int], as_status: bool) -> None:
        self.here.server.refuse = codes
        self.here.server.gone_as_status = as_status

    @rule(mute=st.booleans(), drip=st.booleans())
    def silence(self, mute: bool, drip: bool) -> None:
        self.here.server.mute, self.here.server.drip = mute, drip

    @rule()
    def restart(self) -> None:
        self.runner.run(self.here.server.close() if self.up else self.here.server.open())
        self.up = not self.up

    @rule()
    def heal(self) -> None:
        if not self.up:
            self.restart()
        self.here.server.refuse, self.here.server.mute, self.here.server.drip = [], False, False
        self.runner.run(self.here.converged())

    @invariant()
    def nothing_is_said_that_a_server_refuses(self) -> None:
        assert self.here.server.complaints == []

    def teardown(self) -> None:
        try:
            self.heal()
            self.runner.run(self.here.stop())
        finally:
            self.runner.close()
            self.root.cleanup()


TestConvergence = Convergence.TestCase
TestConvergence.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
