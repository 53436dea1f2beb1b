"""One batch in its owner's hands, with a store and a data plane that do as the test says."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios.config import BatchSettings, RouterSettings
from helios.errors import Unavailable
from helios.metrics import RouterMetrics
from router.batches import machine
from router.batches.asking import Answer, NoAnswer
from router.batches.ledger import Ledger, NotOurs
from router.batches.objects import DirectoryObjects, Tag
from router.batches.records import BatchRecord, FileRecord, Who
from router.batches.run import Run, Tools
from router.batches.shelf import Shelf
from router.batches.slots import Slots
from router.errors import ApiError, bad_credentials
from router.routes import InferenceRoute
from tests.unit.router.batches.test_machine import new

LEASE_S = 0.6
COUNT = 12


class Store(DirectoryObjects):
    """``away``: nothing can be written."""

    away = False

    def put(self, key: str, data: bytes) -> None:
        self._look()
        super().put(key, data)

    def replace(self, key: str, data: bytes, tag: Tag) -> Tag | None:
        self._look()
        return super().replace(key, data, tag)

    def _look(self) -> None:
        if self.away:
            raise Unavailable("the store is away")


class Scene:
    def __init__(self, path: Path, most: int = 4) -> None:
        self.objects = Store(path)
        self.shelf = Shelf(self.objects)
        self.asked: Counter[int] = Counter()
        self.under_way = asyncio.Event()
        """Something is being asked."""
        self.go = asyncio.Event()
        """What is asked is answered."""
        self.fails: Callable[[int], Exception | None] = lambda number: None
        settings = RouterSettings(batches=BatchSettings(lease_s=LEASE_S))
        self.tools = Tools(
            self.shelf, Slots(most, lambda model: True), self.ask, settings, RouterMetrics(), now=lambda: 50.0
        )  # fmt: skip

    async def ask(self, who: Who, route: InferenceRoute, body: bytes, request_id: str) -> Answer:
        number = json.loads(body)["n"]
        self.asked[number] += 1
        self.under_way.set()
        await self.go.wait()
        if (error := self.fails(number)) is not None:
            raise error
        return Answer(200, b'{"usage": {"prompt_tokens": 1}}', request_id)

    async def input(self, *pieces: bytes) -> None:
        record = new()
        parts = [
            await self.shelf.write_part("acme", record.input_file_id, str(n), piece) for n, piece in enumerate(pieces)
        ]
        file = FileRecord(
            id=record.input_file_id, tenant="acme", filename="f", purpose="batch", created_at=1, parts=parts
        )  # fmt: skip
        await self.shelf.add_file(file)
        await self.shelf.add_batch(record)

    async def take(self) -> Run:
        held = await self.shelf.batch("acme", new().id)
        held = await self.shelf.save(held, machine.claimed(held.record, "me"))
        return Run(self.tools, Ledger(self.shelf, held, self.tools.clock))

    @property
    async def record(self) -> BatchRecord:
        return (await self.shelf.batch("acme", new().id)).record

    async def ids(self, good: bool) -> list[str]:
        record = await self.record
        text = b"".join([piece async for piece in self.shelf.read_parts(record.output if good else record.error)])
        return sorted(json.loads(one)["custom_id"] for one in text.splitlines())


def lines(first: int, last: int) -> bytes:
    return b"".join(
        b'{"custom_id": "%02d", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "n": %d}}\n'
        % (number, number)
        for number in range(first, last)
    )


def names(*numbers: int) -> list[str]:
    return [f"{number:02d}" for number in numbers]


def play(path: Path, scene: Callable[[Scene], Any], **given: Any) -> None:
    async def played() -> None:
        made = Scene(path, **given)
        async with asyncio.timeout(30):
            await scene(made)
        made.shelf.close()

    asyncio.run(played())


def test_who_leaves_lets_others_go_on_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    async def scene(s: Scene) -> None:
        await s.input(lines(0, COUNT))
        run = await s.take()
        running = asyncio.create_task(run.run())
        await s.under_way.wait()
        run.leave()
        s.go.set()
        await running
        record = await s.record
        assert (record.status, record.owner) == ("in_progress", "")
        assert 0 < record.completed == s.asked.total() < COUNT
        await (await s.take()).run()
        assert (await s.record).status == "completed"
        assert await s.ids(True) == names(*range(COUNT))
        assert set(s.asked.values()) == {1}
        assert (await s.record).usage.input == COUNT

    play(tmp_path, scene)


def test_an_input_that_goes_away_leaves_what_was_answered(tmp_path: Path) -> None:
    async def scene(s: Scene) -> None:
        await s.input(lines(0, 2), lines(2, 4))
        held = await s.shelf.batch("acme", new().id)
        await s.shelf.save(held, machine.validated(held.record, 4, None, 1.0))
        await s.shelf.drop_part((await s.shelf.file("acme", new().input_file_id)).parts[1])
        s.go.set()
        await (await s.take()).run()
        record = await s.record
        assert (record.status, [error.code for error in record.errors]) == ("failed", ["input_file_not_found"])
        assert await s.ids(True) == names(0, 1)
        assert (await s.shelf.file("acme", record.output_file_id)).size
        assert await s.shelf.open_batches() == []

    play(tmp_path, scene)


def test_a_store_that_is_away_for_a_while_costs_nothing(tmp_path: Path) -> None:
    async def scene(s: Scene) -> None:
        await s.input(lines(0, COUNT))
        running = asyncio.create_task((await s.take()).run())
        await s.under_way.wait()
        s.objects.away = True
        asyncio.get_running_loop().call_later(LEASE_S / 2, setattr, s.objects, "away", False)
        await asyncio.sleep(LEASE_S / 3)  # the beat finds it away
        s.under_way.clear()
        while s.objects.away:
            await asyncio.sleep(0.01)
        s.go.set()
        await running
        assert (await s.record).status == "completed"
        assert set(s.asked.values()) == {1}

    play(tmp_path, scene)


def test_who_can_t_renew_for_a_lease_stops_asking(tmp_path: Path) -> None:
    async def scene(s: Scene) -> None:
        await s.input(lines(0, COUNT))
        running = asyncio.create_task((await s.take()).run())
        await s.under_way.wait()
        s.objects.away = True
        with pytest.raises(ExceptionGroup) as failed:
            await running
        assert failed.group_contains(Unavailable)
        assert s.tools.slots.used == 0
        s.objects.away = False
        s.go.set()
        await (await s.take()).run()
        assert await s.ids(True) == names(*range(COUNT))

    play(tmp_path, scene)


def test_who_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    async def scene(s: Scene) -> None:
        await s.input(lines(0, COUNT))
        first = asyncio.create_task((await s.take()).run())
        await s.under_way.wait()
        second = await s.take()
        s.go.set()
        with pytest.raises(ExceptionGroup) as failed:
            await first
        assert failed.group_contains(NotOurs)
        assert not (await s.record).over
        await second.run()
        assert await s.ids(True) == names(*range(COUNT))

    play(tmp_path, scene)


def test_a_cancellation_ends_what_is_under_way(tmp_path: Path) -> None:
    async def scene(s: Scene) -> None:
        await s.input(lines(0, COUNT))
        running = asyncio.create_task((await s.take()).run())
        await s.under_way.wait()
        await s.shelf.change("acme", new().id, lambda record: machine.cancelling(record, 1.0))
        await running  # nobody was answered
        record = await s.record
        assert (record.status, record.completed, record.failed) == ("cancelled", 0, COUNT)
        assert await s.ids(False) == names(*range(COUNT))

    play(tmp_path, scene)


def test_what_has_no_answer(tmp_path: Path) -> None:
    """A key that is not good any more, and an answer that broke off."""

    async def scene(s: Scene) -> None:
        await s.input(lines(0, 3))
        wrong: dict[int, ApiError | NoAnswer] = {0: bad_credentials("it is revoked"), 1: NoAnswer("it broke off")}
        s.fails = wrong.get
        s.go.set()
        await (await s.take()).run()
        text = b"".join([piece async for piece in s.shelf.read_parts((await s.record).error)])
        found = {json.loads(one)["custom_id"]: json.loads(one)["error"]["code"] for one in text.splitlines()}
        assert found == {"00": "invalid_api_key", "01": "invalid_answer"}
        assert await s.ids(True) == names(2)

    play(tmp_path, scene, most=1)
