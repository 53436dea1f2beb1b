"""One question for all requests that wait: none is answered from before it came, however many come."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helios.errors import Unavailable
from helios.names import RepoId
from registry.fresh import Fresh
from tests.unit.registry.conftest import Registry


class Slow:
    """A catalog whose questions end when they are let; it notes what was committed when each began."""

    def __init__(self, *, shared: bool = True) -> None:
        self.database = SimpleNamespace(kind=SimpleNamespace(shared=shared))
        self.committed, self.seen = 0, list[int]()
        self.go = threading.Semaphore(0)
        self.error: Exception | None = None

    def confirm(self) -> None:
        self.seen.append(self.committed)
        assert self.go.acquire(timeout=20)
        if self.error is not None:
            error, self.error = self.error, None
            raise error


async def settled(catalog: Slow, questions: int) -> None:
    async with asyncio.timeout(10):
        while len(catalog.seen) < questions:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)


def test_who_comes_while_a_question_is_under_way_shares_the_next_one() -> None:
    async def main() -> None:
        catalog: Any = Slow()
        fresh = Fresh(catalog)
        first = asyncio.ensure_future(fresh())
        await settled(catalog, 1)
        catalog.committed = 7  # after the first question was asked
        later = [asyncio.ensure_future(fresh()) for _ in range(50)]
        await asyncio.sleep(0.01)
        assert catalog.seen == [0]
        catalog.go.release()
        await first
        await settled(catalog, 2)
        assert not any(task.done() for task in later)
        catalog.go.release()
        await asyncio.gather(*later)
        assert catalog.seen == [0, 7]
        fresh.close()

    asyncio.run(main())


def test_an_error_is_told_to_those_who_waited_and_to_nobody_else() -> None:
    async def main() -> None:
        catalog: Any = Slow()
        fresh = Fresh(catalog)
        catalog.error = Unavailable("away")
        gone, waiting = asyncio.ensure_future(fresh()), asyncio.ensure_future(fresh())
        await settled(catalog, 1)
        gone.cancel()
        catalog.go.release()
        with pytest.raises(Unavailable):
            await waiting
        catalog.go.release()
        await fresh()
        fresh.close()

    asyncio.run(main())


def test_nothing_is_asked_where_nobody_else_writes() -> None:
    catalog: Any = Slow(shared=False)
    fresh = Fresh(catalog)
    asyncio.run(fresh())
    assert catalog.seen == []
    fresh.close()


def test_many_requests_see_what_another_process_wrote(tmp_path: Path, postgres_url: str) -> None:
    one, other = Registry.open(tmp_path, postgres_url), Registry.open(tmp_path, postgres_url)
    repo = RepoId.parse("org/one")

    async def main() -> None:
        fresh = Fresh(one.catalog)
        for turn in range(5):
            record = await asyncio.to_thread(other.publish, "org/one", {"a": b"%d" % turn})

            async def ask(expected: str = record.commit) -> None:
                await fresh()
                assert one.catalog.resolve(repo, "main").commit == expected

            await asyncio.gather(*(ask() for _ in range(20)))
        fresh.close()

    asyncio.run(main())
    other.close()
    one.close()
