"""The whole operator: a new commit gets requests by steps, and goes back when routers say it is worse."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from helios.config import SignalsSettings
from helios.demand import Answers, Demand, Model, Role, Times
from tests.support.demand import TOKEN
from tests.support.registry import running_registry
from tests.support.scaled import Told
from tests.support.whole_operator import Cluster, cluster, operator, push, until

SPEC: dict[str, Any] = {
    "scaling": {"minReplicas": 1, "targets": {"inFlight": 8}},
    "rollout": {"steps": [50, 100], "stepSeconds": 1, "minRequests": 10, "maxErrorPercent": 5},
}


async def traffic(router: Told, here: Cluster, bad: set[str], slow: set[str]) -> None:
    """Requests go to commits as their weights say; those of bad commits fail, of slow ones first tokens take longer."""
    ok: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    while True:
        for commit, weight in here.weights().items():
            (failed if commit in bad else ok)[commit] += weight // 10
        answers = tuple(
            Answers(
                one,
                ok[one],
                failed[one],
                0,
                0,
                Times((1.0, 4.0), (0, ok[one], 0) if one in slow else (ok[one], 0, 0), 0.0),
            )
            for one in sorted({*ok, *failed})
        )
        roles = tuple(Role("both", one.revision, 1, 1, 0, 0, 0) for one in answers)
        total = ok.total() + failed.total()
        document = Demand("epoch", True, False, (Model("org/llama", total, 0.1, None, roles, answers),))
        router.say(msgspec.json.encode(document), b'{"epoch": "epoch", "complete": true, "held": []}')
        await asyncio.sleep(0.1)


def test_a_commit_that_fails_or_is_slow_is_taken_back_and_a_good_one_takes_over(helios: Any, tmp_path: Path) -> None:
    async def run(registry: Any, client: Any, first: str) -> None:
        bad: set[str] = set()
        slow: set[str] = set()
        token = tmp_path / "token"
        token.write_text(TOKEN)
        async with Told(TOKEN).serving() as router, cluster(tmp_path) as here:
            signals = SignalsSettings(
                routers=[router.url], poll_s=0.2, timeout_s=2.0, stale_s=5.0, token_file=str(token)
            )
            asking = asyncio.create_task(traffic(router, here, bad, slow))
            async with operator(here, registry.url, signals):
                here.model(revision={"policy": "Follow", "checkSeconds": 5})
                here.service(**SPEC)
                await until(here.ready, ("True", "Serving"))
                assert here.weights() == {first: 100}
                worse = await asyncio.to_thread(push, client, tmp_path, '{"n": 2}')
                bad.add(worse)
                await until(lambda: worse in here.weights() and here.weights()[worse] > 0)
                await until(lambda: (here.find("inferenceservices", "chat") or {})["status"].get("refused"), worse)
                await until(here.weights, {first: 100})
                assert here.ready() == ("True", "Serving")
                late = await asyncio.to_thread(push, client, tmp_path, '{"n": 4}')
                slow.add(late)
                await until(lambda: (here.find("inferenceservices", "chat") or {})["status"].get("refused"), late)
                await until(here.weights, {first: 100})
                why = (here.find("inferenceservices", "chat") or {})["status"]["refusedWhy"]
                assert "time to first token is 2500 ms, the old commit's 500 ms" in why
                better = await asyncio.to_thread(push, client, tmp_path, '{"n": 3}')
                await until(lambda: here.weights().get(better), 100)
                await until(here.weights, {better: 100})
                await until(here.replicas, {better[:10]: 1})
            asking.cancel()

    with running_registry(helios) as registry, contextlib.closing(registry.client()) as client:
        asyncio.run(run(registry, client, push(client, tmp_path, "{}")))
