"""The whole operator: what becomes of a Model and an InferenceService, with a real registry and a real router."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from helios.config import SignalsSettings
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.controllers import NO_IMAGE, UNSCHEDULABLE
from tests.support.demand import TOKEN, start_scaled
from tests.support.registry import running_registry
from tests.support.routing import StartRouter, start_router
from tests.support.whole_operator import Cluster, cluster, operator, push, until

__all__ = ["allowed_violations", "fake_vllm", "start_router"]

QUICK = {"minReplicas": 0, "idleSeconds": 10, "warmSeconds": 0, "downWindowSeconds": 0, "targets": {"inFlight": 8}}


def test_a_held_request_wakes_a_service_that_is_answered_and_sleeps_again_and_goes_with_all_it_had(
    helios: Any, start_router: StartRouter, fake_vllm: Any, tmp_path: Path
) -> None:
    fake = fake_vllm("sleeper")
    fake.refuse()
    token = tmp_path / "token"
    token.write_text(TOKEN)
    events: list[str] = []

    async def run(registry: Any, commit: str) -> None:
        spec = f"sleeper={fake.url},role=both,revision={commit}"
        router = start_scaled(start_router, tmp_path, spec, wait_up=False, scrape_interval_s=0.2)
        signals = SignalsSettings(routers=[router.url], token_file=str(token), poll_s=0.3, timeout_s=2.0, stale_s=5.0)
        async with cluster(tmp_path) as here, operator(here, registry.url, signals):

            def pods(name: str, number: int) -> None:
                """The worker is the fake: it is up while there is a pod of it."""
                events.append(f"{number} pods")
                fake.accept() if number else fake.refuse()

            here.controllers.changed = pods
            here.model(revision={"policy": "Follow", "checkSeconds": 5})
            here.service(servedName="sleeper", scaling=QUICK)
            await until(lambda: here.condition("models", "llama"), ("True", "Ready"))
            await until(here.ready, ("True", "Asleep"))
            assert not any(here.replicas().values())
            for _ in range(2):
                events.clear()
                answer = asyncio.create_task(asyncio.to_thread(router.router.chat, "sleeper"))
                answer.add_done_callback(lambda _: events.append("answered"))
                assert (await answer).status == 200
                assert events == ["1 pods", "answered"]
                await until(here.ready, ("True", "Serving"))
                await until(here.ready, ("True", "Asleep"))
                await until(lambda: here.replicas(), {commit[:10]: 0})
            status = (here.find("inferenceservices", "chat") or {})["status"]
            assert len(status["scaling"]) < 8192
            here.delete("inferenceservices", "chat")
            here.delete("models", "llama")
            await until(here.left, [])

    with running_registry(helios) as registry:
        with contextlib.closing(registry.client()) as client:
            commit = push(client, tmp_path, "{}")
        asyncio.run(run(registry, commit))


def test_what_cannot_be_is_said_within_moments_and_mended_when_it_can(helios: Any, tmp_path: Path) -> None:
    async def run(registry: Any) -> None:
        async with cluster(tmp_path) as here, operator(here, registry.url):
            await _troubles(here)
            registry.kill()
            here.model("late", repo="org/late")
            await until(lambda: here.condition("models", "late"), ("False", "RegistryUnreachable"))
            assert here.ready() == ("True", "Serving"), "what serves goes on"

    async def _troubles(here: Cluster) -> None:
        here.service("orphan", model="nobody")
        await until(lambda: here.ready("orphan"), ("False", "ModelNotFound"))
        here.model("unknown", repo="org/unknown", **{"source": {"repo": "org/unknown", "pull": "Never"}})
        await until(lambda: here.condition("models", "unknown")[0], "False")
        here.model("unsigned", revision={"requireVerified": True})
        await until(lambda: here.condition("models", "unsigned"), ("False", "NotVerified"))
        here.model()
        here.controllers.statuses["chat"] = UNSCHEDULABLE
        here.service()
        await until(here.ready, ("False", "Unschedulable"))
        here.controllers.statuses["chat"] = NO_IMAGE
        await until(here.ready, ("False", "ImageMissing"))
        del here.controllers.statuses["chat"]
        await until(here.ready, ("True", "Serving"))
        here.server.cluster.quotas["models", "pods"] = 1
        here.service("second")
        await until(lambda: here.ready("second"), ("False", "QuotaExceeded"))
        del here.server.cluster.quotas["models", "pods"]
        await until(lambda: here.ready("second"), ("True", "Serving"))
        assert here.condition("inferenceservices", "chat", "ScalingActive") == ("False", "NoSignals")

    with running_registry(helios) as registry:
        with contextlib.closing(registry.client()) as client:
            push(client, tmp_path, "{}")
        asyncio.run(run(registry))
