"""Asking a doubted worker for a token: which question, what the answers mean, and who is never asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios.config import HangSettings, RouterSettings
from helios.metrics import RouterMetrics
from router.resilience.guard import Attempt, Guard
from router.resilience.tokens import TokenChecks
from router.worker_keys import WorkerKeys
from router.workers import Worker, Workers, parse_worker
from tests.fakes.vllm.client import Control
from tests.fakes.vllm.fixtures import allowed_violations, fake_vllm

__all__ = ["allowed_violations", "fake_vllm"]
Start = Callable[..., Control]
SETTINGS = HangSettings(quiet_s=0.001, timeout_s=0.3, every_s=0.02)


def checked(url: str, *, doubted: bool = True, key_file: str = "") -> tuple[str, Worker, list[Worker]]:
    """What came of the first check of the worker at ``url``, the worker, and those reported as hung."""

    async def main() -> tuple[str, Worker, list[Worker]]:
        metrics, found = RouterMetrics(), []
        workers = Workers([parse_worker(f"tiny={url}")], time.monotonic, guard=make)
        (worker,) = workers.all
        if doubted:
            Attempt(worker.guard, time.monotonic(), engine=True)
        checks = asyncio.create_task(TokenChecks(workers, SETTINGS, WorkerKeys(key_file), metrics, found.append).run())
        result = ""
        for _ in range(1000 if doubted else 20):
            await asyncio.sleep(0.01)
            results = [s for m in metrics.token_checks.collect() for s in m.samples if s.name.endswith("_total")]
            if results:
                result = results[0].labels["result"]
                break
        checks.cancel()
        await asyncio.wait([checks])
        return result, worker, found

    def make(name: str) -> Guard:
        return Guard(name, RouterSettings(hang=SETTINGS))

    return asyncio.run(main())


def test_a_worker_that_owes_nothing_is_not_asked(fake_vllm: Start) -> None:
    fake = fake_vllm("tiny")
    assert checked(fake.url, doubted=False)[0] == ""
    assert fake.journal() == []


@pytest.mark.parametrize(
    ("runner", "asked"), [("generate", ["/v1/completions"]), ("pooling", ["/v1/completions", "/v1/embeddings"])]
)
def test_the_question_is_one_the_model_can_answer(
    fake_vllm: Start, runner: str, asked: list[str], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("k")
    fake = fake_vllm("tiny", runner=runner, api_key="k")
    result, worker, found = checked(fake.url, key_file=str(tmp_path / "key"))
    assert (result, worker.guard.hung, found) == ("ok", False, [])
    journal = fake.journal()
    assert [record["target"] for record in journal][: len(asked)] == asked
    assert dict(journal[0]["headers"])["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("fault", "result"),
    [
        ({"kind": "hang"}, "failed"),
        ({"kind": "status", "status": 500}, "failed"),
        ({"kind": "reset"}, "busy"),  # its counters say that the engine made it
        ({"kind": "status", "status": 401}, "unable"),
        ({"kind": "status", "status": 404}, "unable"),
        ({"kind": "status", "status": 429}, "busy"),
    ],
)
def test_what_the_answers_mean(fake_vllm: Start, fault: dict[str, Any], result: str) -> None:
    fake = fake_vllm("tiny")
    fake.fault(**fault, times=None)
    got, worker, found = checked(fake.url)
    assert got == result
    assert worker.guard.hung == (result == "failed")
    assert found == ([worker] if result == "failed" else [])


def test_nobody_there_is_a_hang_too_until_somebody_is(fake_vllm: Start) -> None:
    fake = fake_vllm("tiny")
    fake.refuse()
    result, worker, _ = checked(fake.url)
    assert (result, worker.guard.hung) == ("failed", True)
