"""Whole operators beside one API server with its controllers: started, killed, paused, and what is so after them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from helios.config import Config, OperatorSettings, RegistrySettings, SignalsSettings
from helios.demand import Demand, Held, Line, Model, Role, Waiting
from helios.metrics import OperatorMetrics
from orchestrator.assembly import whole
from orchestrator.operator import Operator, Work
from tests.support.operators import Site
from tests.support.scaled import Told
from tests.support.whole_operator import MADE, Cluster, Manifest

PEOPLE = ("models", "inferenceservices")
VARYING = frozenset({
    "uid", "resourceVersion", "managedFields", "creationTimestamp", "generation", "observedGeneration", "scaling",
    "helios.dev/applied", "helios.dev/owner-uid", "lastTransitionTime", "message", "checkedAt", "reason", "since",
    "forecast", "startedAt", "steppedAt", "deletionTimestamp",
})  # fmt: skip
"""Fields whose values are another run's in another run, or say how it went so far."""


class WholeSite(Site):
    """See above. Each operator has a token of its own, so that each write is somebody's."""

    def __init__(
        self, root: Path, registry: str, signals: SignalsSettings | None = None, **options: Any
    ) -> None:  # fmt: skip
        self.cluster = Cluster(root)
        super().__init__(root, server=self.cluster.server, look_s=0.2, workers=4, **options)
        self._registry, self._signals = registry, signals or SignalsSettings()
        self._threads: dict[str, asyncio.AbstractEventLoop] = {}
        self._shape: tuple[int, list[Any]] = (0, [])
        self.apart = False
        """Operators have threads of their own, so that one of them can stand still."""

    def define(self) -> None:
        self.cluster.define()

    async def open(self) -> None:
        await super().open()
        self._controllers = asyncio.create_task(self.cluster.controllers.run())

    async def close(self) -> None:
        self._controllers.cancel()
        (ended,) = await asyncio.gather(self._controllers, return_exceptions=True)
        await super().close()
        assert isinstance(ended, asyncio.CancelledError), ended

    def work(self, settings: OperatorSettings, metrics: OperatorMetrics) -> Work:
        with_signals = msgspec.structs.replace(settings, signals=self._signals)
        config = Config(operator=with_signals, registry=RegistrySettings(urls=[self._registry]))
        return self.works.enter_context(whole(config, metrics))

    async def run(self, operator: Operator) -> None:
        if not self.apart:
            await operator.run()
            return
        ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
        ours, begun = asyncio.get_running_loop(), threading.Event()
        tasks: list[asyncio.Task[None]] = []

        async def running() -> None:
            self._threads[operator.identity] = asyncio.get_running_loop()
            tasks.append(asyncio.create_task(operator.run()))
            begun.set()
            (found,) = await asyncio.gather(*tasks, return_exceptions=True)
            ours.call_soon_threadsafe(ended.set_result, found)

        thread = threading.Thread(target=asyncio.run, args=[running()])
        thread.start()
        await asyncio.to_thread(begun.wait)
        try:
            await asyncio.shield(ended)
        finally:
            self._threads[operator.identity].call_soon_threadsafe(tasks[0].cancel)
            found = await ended
            await asyncio.to_thread(thread.join)
            assert isinstance(found, asyncio.CancelledError), found

    def pause(self, operator: Operator, seconds: float) -> None:
        """Nothing of this operator goes on for so long, as when its process or machine stands still."""
        self._threads[operator.identity].call_soon_threadsafe(time.sleep, seconds)

    def restore(self, objects: dict[Any, Any]) -> None:
        """The cluster is as it was, but for its leases: who leads is nobody."""
        store = self.server.cluster.store
        store.objects = {place: one for place, one in objects.items() if not place[0].startswith("leases")}
        store.compact()

    def leaders(self) -> list[Operator]:
        return [one for one, _ in self.running if one.leadership.remaining_s() > 0]

    def wrong(self) -> list[str]:
        """What is not as Models and InferenceServices want it, found without the operator's help."""
        models, services = ({one["metadata"]["name"]: one for one in self.server.all(plural)} for plural in PEOPLE)
        used = {one["spec"]["model"]["name"] for one in services.values()}
        found = [f"{name} is to be gone" for name, one in models.items() if _ending(one) and name not in used]
        for name, one in (models | services).items():
            old = (one.get("status") or {}).get("observedGeneration") != one["metadata"]["generation"]
            found += [f"the status of {name} is old"] if old else []
        ready = {name: one for name, one in models.items() if not _ending(one)}
        for name in ready:
            if self.cluster.condition("models", name) != ("True", "Ready"):
                found.append(f"Model {name} is not ready")
        for name, one in services.items():
            model = one["spec"]["model"]["name"]
            if model in ready:
                found += self._serving(name, one, ready[model])
            elif model not in models:
                said = self.cluster.condition("inferenceservices", name, "ModelReady")
                found += [] if said == ("False", "ModelNotFound") else [f"{name} has no Model, and says {said}"]
        for plural in MADE:
            for one in self.server.all(plural):
                instance = one["metadata"]["labels"]["app.kubernetes.io/instance"]
                found += [] if instance in (models | services) else [f"{plural} {one['metadata']['name']} is left"]
        return found

    def _serving(self, name: str, service: Manifest, model: Manifest) -> list[str]:
        commit, found = (model.get("status") or {}).get("commit", ""), []
        if self.cluster.ready(name) != ("True", "Serving"):
            found.append(f"{name} does not serve: {self.cluster.ready(name)}")
        if self.cluster.replicas(name) != {commit[:10]: 1}:
            found.append(f"{name} has {self.cluster.replicas(name)} instead of one of {commit[:10]}")
        there = {plural: {one["metadata"]["name"]: one for one in self.server.all(plural)} for plural in MADE}
        worker = f"{name}-both-{commit[:10]}"
        for plural, each in (
            ("services", name), ("services", worker), ("poddisruptionbudgets", f"{name}-both"),
            ("networkpolicies", name),
        ):  # fmt: skip
            found += [] if each in there[plural] else [f"{name} has no {plural} {each}"]
        template = str(there["deployments"].get(worker, {}).get("spec"))
        found += [] if str(service["spec"]["engine"]["args"])[1:-1] in template else [f"{name} is started otherwise"]
        return [*found, f"{name} has drifted"] if "drifted" in template else found

    def brief(self) -> list[str]:
        """What there is, for people."""
        conditions = [
            f"{one['metadata']['name']}: {each['type']} {each['status']} {each.get('reason')} {each.get('message')}"
            for plural in PEOPLE for one in self.server.all(plural)
            for each in (one.get("status") or {}).get("conditions") or ()
        ]  # fmt: skip
        return [*self.cluster.left(), *conditions]

    def shape(self) -> list[Any]:
        """All that people and operators have made, without what is another thing in each run."""
        version = self.server.cluster.store.version
        if self._shape[0] != version:
            self._shape = version, [_plain(one) for plural in (*PEOPLE, *MADE) for one in self.server.all(plural)]
        return self._shape[1]


def _ending(one: Manifest) -> bool:
    return bool(one["metadata"].get("deletionTimestamp"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if name not in VARYING}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value


@asynccontextmanager
async def whole_site(
    root: Path, registry: str, signals: SignalsSettings | None = None, **options: Any
) -> AsyncIterator[WholeSite]:
    found = WholeSite(root, registry, signals, **options)
    await found.open()
    try:
        yield found
    finally:
        await found.close()


def say(router: Told, *, held: int = 0, in_flight: int = 0, revision: str = "", model: str = "org/llama") -> None:
    """What the router says of a model: requests that wait for a worker, or are at one of this commit."""
    waiting = Waiting(held, held * 100, 1.0, "worker") if held else None
    roles = (Role("both", revision, 1, 1, in_flight, 0, 0),) if revision else ()
    demand = Demand("epoch", True, False, (Model(model, held + in_flight, 0.1, waiting, roles, ()),))
    line = Line("epoch", True, (Held(model, waiting),) if waiting is not None else ())
    router.say(msgspec.json.encode(demand), msgspec.json.encode(line))
