"""From a client's request at a real router to what KEDA and an autoscaler are told of it, and back to 0."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from http.client import HTTPException
from pathlib import Path
from typing import Any

import grpc

from orchestrator.scaling.signals import UNHEARD
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm
from tests.support.demand import TOKEN, start_scaled
from tests.support.routing import CHAT, StartRouter, start_router, stream
from tests.support.scaled import signals_site

__all__ = ["allowed_violations", "fake_vllm", "start_router"]

NAMES = ["sleeper"]


async def until(look: Any, wanted: Any, timeout_s: float = 20) -> None:
    found = None
    try:
        async with asyncio.timeout(timeout_s):
            while (found := await look()) != wanted:
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{found} instead of {wanted}") from None


def test_a_held_request_is_pushed_numbers_are_the_truth_and_a_killed_router_is_unknown(
    start_router: StartRouter, fake_vllm: Any, tmp_path: Path
) -> None:
    fake = fake_vllm("sleeper", token_s=0.02)
    fake.refuse()
    spec = f"sleeper={fake.url},role=both,revision={'c' * 40}"
    routers = [
        start_scaled(start_router, tmp_path, spec, wait_up=False, processes=2, scrape_interval_s=0.2) for _ in range(2)
    ]
    token = tmp_path / "token"
    token.write_text(TOKEN)
    body = {"model": "sleeper", "max_tokens": 400, "stream": True, **CHAT}
    begun: list[Any] = []

    def ask(at: int) -> threading.Thread:
        def run() -> None:
            begun.append(stream(routers[at].router.address, "/v1/chat/completions", body))

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    async def run() -> None:
        urls = [one.url for one in routers]
        quick = {"poll_s": 0.3, "timeout_s": 1.0, "stale_s": 1.5, "token_file": str(token)}
        async with signals_site(tmp_path, urls, **quick) as site:
            site.serve("chat", *NAMES)
            collector, keda = site.signals.collector, site.keda

            async def value(metric: str) -> Any:
                try:
                    return await keda.value(metric, role="both")
                except grpc.aio.AioRpcError as error:
                    return error.code().name

            async def ready() -> Any:
                load = collector.load(NAMES)
                return None if load is None else (load.ready, load.partial)

            await until(ready, (0, False))
            assert await value("helios_queued_requests") == 0
            pushes = keda.pushes(role="both")
            assert not (await pushes.read()).result
            threads = [ask(1)]
            async with asyncio.timeout(5):
                assert (await pushes.read()).result, "at once, not when somebody looks"
            threads += [ask(0), ask(1)]
            await until(lambda: value("helios_queued_requests"), 3)
            load = collector.load(NAMES)
            assert load is not None
            assert (load.held, load.asleep, load.in_flight) == (3, True, 0)
            fake.accept()
            await until(lambda: value("helios_in_flight_requests"), 3)
            await asyncio.to_thread(lambda: [thread.join(20) for thread in threads])
            await until(lambda: value("helios_queued_requests"), 0)
            assert fake.metric("vllm:num_requests_running") == 3, "as many as there really are"
            await until(lambda: value("helios_in_flight_requests"), 3)
            sampler = site.signals.sampler(NAMES, "both")
            first = sampler.sample(1, 1)
            assert (first.held, first.in_flight, first.partial) == (0, 3, False)
            routers[0].router.process.send_signal(signal.SIGKILL)
            await until(lambda: value("helios_in_flight_requests"), "UNAVAILABLE")
            second = sampler.sample(1, 1)
            assert second.partial
            assert second.in_flight == 2, "what the other one has is known"
            assert await keda.active(role="both")
            for sock, answer in begun:
                with contextlib.suppress(OSError, HTTPException):  # of the router that was killed
                    await asyncio.to_thread(answer.read)
                sock.close()
            routers[1].router.process.send_signal(signal.SIGKILL)

            async def age() -> float:
                return sampler.sample(1, 1).router_age_s

            await until(age, UNHEARD)
            assert sampler.sample(1, 1).in_flight is None

    asyncio.run(run())
