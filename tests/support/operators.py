"""Operators of tests beside the fake API server: started, killed, and compared with what should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from helios.config import OperatorSettings
from helios.metrics import OperatorMetrics
from orchestrator.operator import Operator, Work, client_of
from orchestrator.runtime.queue import Limits
from tests.fakes.kubernetes import ApiServer, Call, kubeconfig
from tests.support.sample_operator import CRD, FINALIZER, Greeter

FAST = Limits(first_s=0.02, most_s=0.2, rate=5000.0, burst=5000)
TIMES: dict[str, Any] = {
    "lease_s": 1.0,
    "renew_s": 0.6,
    "retry_s": 0.05,
    "silence_s": 2.0,
    "watch_s": 5.0,
    "call_s": 1.0,
}


class Site:
    """An API server with the sample's definition, and operators."""

    def __init__(self, root: Path, *, server: ApiServer | None = None, **options: Any) -> None:
        self.server, self.file = server or ApiServer(), root / "kubeconfig"
        self.deposed: list[str] = []
        """Writes that were performed for somebody who did not hold the lease."""
        self.options = {**TIMES, **options}
        self.running: list[tuple[Operator, asyncio.Task[None]]] = []
        self.works = ExitStack()
        self.performed: Callable[[Call], None] = lambda call: None
        """Told of each request right before it is performed."""
        self.reconciler: Any = Greeter()

    async def open(self) -> None:
        await self.server.open()
        self.server.performing = self._performing
        self.file.write_text(kubeconfig(self.server))
        self.define()

    def define(self) -> None:
        """What the cluster is to know before operators start."""
        cluster = self.server.cluster
        cluster.create(self.server.served("customresourcedefinitions"), "", CRD, manager="admin", strict=True)

    def work(self, settings: OperatorSettings, metrics: OperatorMetrics) -> Work:
        """What an operator is to do; what is to be closed at the end belongs to ``works``."""
        return Work([self.reconciler])

    async def close(self) -> None:
        for _, task in self.running:
            task.cancel()
        ended = await asyncio.gather(*(task for _, task in self.running), return_exceptions=True)
        await self.server.close()
        self.works.close()
        assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended
        assert self.server.complaints == [], self.server.complaints
        assert self.deposed == [], self.deposed

    def _performing(self, call: Call) -> None:
        self.performed(call)
        if call.write and call.user and call.kind != "Lease":
            leases = self.server.all("leases")
            holder = leases[0]["spec"].get("holderIdentity") if leases else None
            if holder != call.user:
                self.deposed.append(f"{call.verb} of {call.kind} {call.name} by {call.user}, not {holder}")

    def start(self) -> Operator:
        """One more operator, with a token of its own, which is its identity."""
        file = self.file.with_name(f"kubeconfig-{len(self.server.users)}")
        settings = OperatorSettings(kubeconfig=str(file), **self.options)
        metrics = OperatorMetrics()
        operator = Operator(
            settings, self.work(settings, metrics), lambda: client_of(settings), metrics, limits=FAST,
            backoff_s=(0.01, 0.1),
        )  # fmt: skip
        self.server.users[operator.identity] = operator.identity
        file.write_text(kubeconfig(self.server, operator.identity))
        self.running.append((operator, asyncio.create_task(self.run(operator))))
        return operator

    async def run(self, operator: Operator) -> None:
        """Until it is cancelled."""
        await operator.run()

    async def kill(self, operator: Operator) -> None:
        """End it where it is, without a word: its lease stays."""
        task = next(task for one, task in self.running if one is operator)
        self.running.remove((operator, task))
        operator.leadership._release = _nothing  # type: ignore[method-assign]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def admin(self, plural: str, verb: str, one: dict[str, Any]) -> dict[str, Any]:
        """What people do, through admission: create, or replace the whole object."""
        served, metadata = self.server.served(plural), one["metadata"]
        cluster, namespace = self.server.cluster, metadata.get("namespace", "")
        if verb == "create":
            return cluster.create(served, namespace, one, manager="kubectl", strict=True)
        return cluster.replace(served, namespace, metadata["name"], one, manager="kubectl", strict=True)

    def remove(self, plural: str, name: str, namespace: str = "ns") -> None:
        self.server.cluster.delete(self.server.served(plural), namespace, name, {})

    def wrong(self) -> list[str]:
        """What is not as the Greetings want it, found without the operator's help."""
        found, wanted = [], {one["metadata"]["name"]: one for one in self.server.all("greetings")}
        for plural in ("configmaps", "deployments"):
            there = {one["metadata"]["name"]: one for one in self.server.all(plural) if _ours(one)}
            for name, one in wanted.items():
                if one["metadata"].get("deletionTimestamp"):
                    found.append(f"{name} is still being deleted")
                elif plural == "configmaps" or one["spec"]["deploy"]:
                    found += _differs(plural, there.get(name), one)
                elif name in there:
                    found.append(f"{name} has a deployment")
            found += [f"{plural} {name} is left" for name in there if name not in wanted]
        for name, one in wanted.items():
            if (one.get("status") or {}).get("observedGeneration") != one["metadata"]["generation"]:
                found.append(f"the status of {name} is old")
            if FINALIZER not in one["metadata"].get("finalizers", ()):
                found.append(f"{name} has no finalizer")
        return found

    async def converged(self, seconds: float = 30.0) -> None:
        await self.until(lambda: not self.wrong(), seconds, self.wrong)

    async def until(
        self, ready: Callable[[], Any], seconds: float = 30.0, why: Callable[[], Any] = lambda: ""
    ) -> None:  # fmt: skip
        try:
            async with asyncio.timeout(seconds):
                while not ready():
                    for _, task in self.running:
                        assert not task.done(), task
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"not in time: {why()}") from None

    async def still(self, seconds: float) -> dict[Any, int]:
        """Wait; the writes that came meanwhile."""
        before = self.server.writes.copy()
        await asyncio.sleep(seconds)
        return {key: number - before[key] for key, number in self.server.writes.items() if number != before[key]}


async def _nothing() -> None:
    return


def _ours(one: dict[str, Any]) -> bool:
    return any(each["kind"] == "Greeting" for each in one["metadata"].get("ownerReferences", ()))


def _differs(plural: str, found: dict[str, Any] | None, wanted: dict[str, Any]) -> list[str]:
    name, spec = wanted["metadata"]["name"], wanted["spec"]
    if found is None:
        return [f"{name} has no {plural}"]
    if plural == "configmaps":
        return [] if found.get("data") == {"text": spec["text"]} else [f"{name}: {found.get('data')}"]
    (main,) = [one for one in found["spec"]["template"]["spec"]["containers"] if one["name"] == "main"]
    text, replicas = main["env"][0]["value"], found["spec"]["replicas"]
    good = (text, replicas, main["image"]) == (spec["text"], spec["replicas"], "greeter:1")
    return [] if good else [f"{name}: {text}, {replicas}, {main['image']}"]


@asynccontextmanager
async def site(root: Path, **options: Any) -> AsyncIterator[Site]:
    found = Site(root, **options)
    await found.open()
    try:
        yield found
    finally:
        await found.close()
