"""The operator's questions to a real registry: what a revision names, that it moved, and that nobody answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helios.names import RepoId
from helios.publish import publish
from helios.registry_client import RegistryClient
from orchestrator.reconcile.observed import Answer
from orchestrator.registry import Answers
from tests.support.registry import running_registry

REPO = RepoId.parse("org/m")


def test_what_a_revision_names_is_followed_and_a_registry_that_goes_is_said(helios: Any, tmp_path: Path):
    with running_registry(helios) as registry:
        asyncio.run(_follow(registry, tmp_path))


async def _follow(registry: Any, tmp_path: Path) -> None:
    changed: list[str] = []
    with contextlib.closing(registry.client()) as client:
        answers = Answers([client], changed.append, tick_s=0.05)
        running = asyncio.create_task(answers.run())
        try:
            await _until(lambda: _problem(answers) != "")
            first = await asyncio.to_thread(_push, client, tmp_path, "one")
            await _until(lambda: _answer(answers).commit == first)
            assert changed[-1] == "org/m"
            second = await asyncio.to_thread(_push, client, tmp_path, "two, longer")
            await _until(lambda: _answer(answers).commit == second)
            await _until(lambda: answers.facts("org/m", second) is not None)
            facts = answers.facts("org/m", second)
            assert facts is not None
            assert facts.size_bytes == len("two, longer")
            assert facts.signer is None
            registry.kill()
            await _until(lambda: _problem(answers) == "RegistryUnreachable")
            assert _answer(answers).since
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def _answer(answers: Answers) -> Answer:
    return answers.answer("org/m", "main", False, 0.1) or Answer()


def _problem(answers: Answers) -> str:
    return _answer(answers).problem


def _push(client: RegistryClient, tmp_path: Path, text: str) -> str:
    directory = tmp_path / "m"
    directory.mkdir(exist_ok=True)
    (directory / "readme.txt").write_text(text)
    return publish(client, directory, REPO, "main").commit


async def _until(ready: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not ready():
            await asyncio.sleep(0.02)
