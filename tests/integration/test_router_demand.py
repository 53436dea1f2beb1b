"""What a running router says of the demand for its models: nobody waits unseen, nothing is counted that isn't there."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.kubernetes import ApiServer, endpoint, endpoint_slice, kubeconfig, pod, service
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.demand import start_scaled
from tests.support.routing import CHAT, StartRouter, start_router, stream

__all__ = ["allowed_violations", "fake_vllm", "start_router"]


def asked(router: Any, model: str, answers: list[Any]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(router.chat(model)))
    thread.start()
    return thread


@pytest.mark.parametrize("processes", [1, 2])
def test_who_waits_for_a_model_that_sleeps_is_told_of_at_once_and_served_when_it_is_up(
    start_router: StartRouter, fake_vllm: Any, wait_for: Any, tmp_path: Path, processes: int
) -> None:
    fake = fake_vllm("sleeper")
    fake.refuse()
    site = start_scaled(start_router, tmp_path, fake, wait_up=False, processes=processes)
    wait_for(lambda: [one.roles[0].ready for one in site.demand().models] == [0] and site.demand().complete)
    answers: list[Any] = []
    with site.watch() as lines:
        while not next(lines).complete:
            pass
        thread = asked(site.router, "sleeper", answers)
        line = next(one for one in lines if one.held)
        assert [(one.model, one.waiting.requests, one.waiting.what) for one in line.held] == [("sleeper", 1, "worker")]
        assert line.held[0].waiting.tokens > 0
        assert line.held[0].waiting.oldest_s < 1, "told at once, not when somebody looks"
        (model,) = site.demand().models
        assert model.waiting is not None
        fake.accept()
        thread.join(20)
        assert answers[0].status == 200
        assert next(one for one in lines if not one.held).complete
    wait_for(lambda: [one.ok_total for one in site.demand().models[0].answers] == [1])
    (model,) = site.demand().models
    assert (model.requests_total, model.waiting) == (1, None)
    assert model.idle_s is not None


def test_a_service_of_a_cluster_that_has_no_pods_is_held_for_and_served_by_the_first(
    start_router: StartRouter, fake_vllm: Any, tmp_path: Path
) -> None:
    fake = fake_vllm("team/chat")
    port = int(fake.url.rpartition(":")[2])

    async def run() -> None:
        cluster = ApiServer()
        await cluster.open()
        (tmp_path / "kubeconfig").write_text(kubeconfig(cluster))
        notes = {"helios.dev/model": "team/chat"}
        cluster.put("services", service("chat", annotations=notes))
        cluster.put("endpointslices", endpoint_slice("chat", None))
        where = {"kubeconfig": str(tmp_path / "kubeconfig"), "slices": "app=vllm", "pods": "app=vllm"}
        site = await asyncio.to_thread(
            start_scaled, start_router, tmp_path, wait_up=False, discovery=json.dumps({"kubernetes": where})
        )
        async with asyncio.timeout(60):
            while b"team/chat" not in (await asyncio.to_thread(site.router.request, "GET", "/v1/models")).body:
                await asyncio.sleep(0.05)
            answer = asyncio.create_task(asyncio.to_thread(site.router.chat, "team/chat"))
            while not [one for one in (await asyncio.to_thread(site.demand)).models if one.waiting]:
                await asyncio.sleep(0.05)
            cluster.put("pods", pod("p", "127.0.0.1", annotations=notes))
            ports = [{"name": "http", "port": port}]
            cluster.put("endpointslices", endpoint_slice("chat", [endpoint("127.0.0.1", "p")], ports=ports))
            assert (await answer).status == 200
        await cluster.close()
        assert cluster.complaints == []

    asyncio.run(run())


def test_what_is_under_way_and_what_became_of_it_is_counted_over_all_processes(
    start_router: StartRouter, fake_vllm: Any, wait_for: Any, tmp_path: Path
) -> None:
    fake = fake_vllm("m", token_s=0.02)
    site = start_scaled(
        start_router, tmp_path, f"m={fake.url},revision=r1", processes=2, scrape_interval_s=0.1,
        queue={"per_worker": 3},
    )  # fmt: skip
    body = {"model": "m", "max_tokens": 200, "stream": True, **CHAT}
    flying = [stream(site.router.address, "/v1/chat/completions", body) for _ in range(3)]
    waiting: list[Any] = []
    threads = [asked(site.router, "m", waiting) for _ in range(2)]

    def shown() -> tuple[Any, ...]:
        (model,) = site.demand().models
        (role,) = model.roles
        queued = model.waiting and (model.waiting.requests, model.waiting.what)
        return role.ready, role.in_flight, queued, [(one.running, one.tokens > 0) for one in role.readings]

    wait_for(lambda: shown() == (1, 3, (2, "capacity"), [(3, True)]))
    (reading,) = site.demand().models[0].roles[0].readings
    assert reading.token_s == pytest.approx(0.02, rel=0.9)
    for connection, answer in flying:
        assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()
    for thread in threads:
        thread.join(20)
    assert [one.status for one in waiting] == [200, 200]
    fake.fault("status", status=500, times=2)
    site.router.chat("m")
    wait_for(lambda: [(one.revision, one.ok_total, one.failed_total) for one in site.demand().models[0].answers] == [
        ("r1", 5, 1),
    ])  # fmt: skip
    (model,) = site.demand().models
    assert model.requests_total == 6
    assert sum(model.answers[0].first_token.counts) == 3, "of streams only"
    assert model.roles[0].in_flight == 0


def test_the_token_is_for_looking_only(start_router: StartRouter, fake_vllm: Any, tmp_path: Path) -> None:
    site = start_scaled(start_router, tmp_path, fake_vllm("m"))
    assert site.get("/demand", token="another")[0] == 401
    status, body = site.get("/state")
    assert status == 403
    assert "looks at the demand and does nothing else" in json.loads(body)["error"]["message"]
