"""Models woken by one process for several: one call, heard of by all, wanted again after either side has died."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from helios.config import WorkerSettings
from helios.errors import NotFound
from router.admission.bringing import Bringing
from router.admission.wake_owner import SILENT_S, WakeOwner
from router.admission.waking import RETRY_S, Report, WakeFailed, Waking
from router.admission.waking_elsewhere import AGAIN_S, FORGOTTEN_S, WakingElsewhere
from router.workers import Workers


class Wake:
    """A call that is under way."""

    def __init__(self, model: str, report: Report) -> None:
        self.model, self.report = model, report
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Site:
    """Processes that relay, by number, and the one that wakes models, which may be replaced."""

    def __init__(self, *members: int) -> None:
        self.now = 100.0
        self.served: set[str] = set()
        self.calls: list[Wake] = []
        self.results: list[tuple[str, str]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.members = {number: self._member(number) for number in members}
        self.begin()

    def begin(self) -> None:
        """A control process takes over, and has heard nothing yet."""
        self.waking = waking = Waking(self, lambda model: self._spawn(waking, model), lambda: self.now, 60)
        waking.ended = lambda model, result: self.results.append((model, result))
        self.owner = WakeOwner(waking, self.served.__contains__, self._tell, lambda: self.now)
        for member in self.members.values():
            member.say_again()

    def _member(self, number: int) -> WakingElsewhere:
        return WakingElsewhere(lambda models: self._said(number, models), lambda: self.now)

    def _said(self, number: int, models: list[str]) -> None:
        if hasattr(self, "owner"):
            self.owner.wanted(number, models)

    def _tell(self, model: str, progress: str, reason: str, failed_at: float | None) -> None:
        for member in self.members.values():
            member.told(model, progress, reason, failed_at)

    def _spawn(self, waking: Waking, model: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.get_running_loop().create_task(waking.call(model)))
        return self.tasks[-1]

    async def wake(self, model: str, report: Report) -> None:
        self.calls.append(Wake(model, report))
        await self.calls[-1].over

    async def turn(self, seconds: float = 0.0) -> None:
        self.now += seconds
        for _ in range(5):
            await asyncio.sleep(0)
        for member in self.members.values():
            member.tick(self.served.__contains__)
        self.owner.tick()
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def woken(self) -> list[str]:
        return [call.model for call in self.calls]


@contextmanager
def ended(site: Site) -> Iterator[None]:
    try:
        yield
    finally:
        for task in site.tasks:
            task.cancel()


def run(act: Callable[[Site], Awaitable[None]]) -> None:
    async def main() -> None:
        site = Site(1, 2)
        with ended(site):
            await act(site)

    asyncio.run(main())


def test_one_call_for_all_processes_whose_progress_all_hear_of() -> None:
    async def act(site: Site) -> None:
        one, two = site.members.values()
        assert (one.want("m"), two.want("m"), one.want("m")) == (None, None, None)
        await site.turn()
        assert site.woken == ["m"]
        site.calls[0].report("loading, 40%")
        assert (one.progress("m"), two.progress("m")) == ("loading, 40%",) * 2
        site.served.add("m")
        await site.turn()
        assert (site.results, site.waking.models()) == ([("m", "up")], [])
        assert (one.progress("m"), two.progress("m")) == ("", "")
        await site.turn(2 * AGAIN_S)
        assert site.woken == ["m"]

    run(act)


def test_it_goes_on_with_nobody_who_waits() -> None:
    async def act(site: Site) -> None:
        site.members[1].want("m")
        await site.turn(FORGOTTEN_S)
        await site.turn(SILENT_S)
        assert site.waking.models() == ["m"]
        site.served.add("m")
        await site.turn()
        assert site.results == [("m", "up")]

    run(act)


def test_a_failure_counts_in_all_processes_for_as_long() -> None:
    async def act(site: Site) -> None:
        one, two = site.members.values()
        one.want("m")
        await site.turn()
        site.calls[0].over.set_exception(WakeFailed("no GPU is free"))
        await site.turn()
        assert one.want("m") == two.want("m") == two.reason("m") == "no GPU is free"
        newcomer = site.members[3] = site._member(3)
        assert newcomer.want("m") is None, "it has not heard of it..."
        assert newcomer.want("m") == "no GPU is free", "...and is told when it asks"
        await site.turn(RETRY_S)
        assert two.want("m") is None
        await site.turn()
        assert site.woken == ["m", "m"]
        assert site.results == [("m", "failed")]

    run(act)


def test_who_takes_over_wakes_what_is_wanted_still() -> None:
    async def act(site: Site) -> None:
        one, two = site.members.values()
        one.want("m")
        two.want("n")
        await site.turn()
        site.owner.deposed()
        two.tick({"n"}.__contains__)  # that one is up
        site.begin()
        await site.turn()
        assert site.woken == ["m", "n", "m"]
        assert site.waking.models() == ["m"]

    run(act)


def test_a_process_that_knows_better_is_heard_and_a_dead_one_is_not() -> None:
    """A worker that hangs is up for all but the process that has found it out."""

    async def act(site: Site) -> None:
        site.members[1].want("m")
        site.owner._served = {"m"}.__contains__
        await site.turn()
        assert (site.woken, site.results) == (["m"], [])
        del site.members[1]
        site.owner.gone(1)
        await site.turn()
        assert site.results == [("m", "up")]

    run(act)


class Hook:
    def __init__(self) -> None:
        self.woken: list[str] = []

    async def wake(self, model: str, report: Report) -> None:
        self.woken.append(model)


class Registry:
    """An ``Availability``: brings a model some times, then says why not."""

    def __init__(self, times: int) -> None:
        self.times, self.brought = times, list[str]()

    async def bring(self, model: str, report: Report) -> None:
        report("it is being fetched")
        self.brought.append(model)
        if len(self.brought) > self.times:
            raise NotFound("it is nowhere")


def test_the_registry_brings_what_has_no_worker_and_the_hook_the_rest(monkeypatch) -> None:
    monkeypatch.setattr("router.admission.bringing.AGAIN_S", 0.0)
    workers, hook, registry = Workers([WorkerSettings("m", "http://h:1")], lambda: 0.0), Hook(), Registry(2)
    told: list[str] = []

    async def main() -> str:
        bringing = Bringing(registry, workers, hook)  # type: ignore[arg-type]
        await bringing.wake("m", told.append)
        await Bringing(None, workers, hook).wake("n", told.append)
        try:
            await bringing.wake("n", told.append)
        except WakeFailed as error:
            return str(error)
        return ""

    assert asyncio.run(main()) == "it is nowhere"
    assert (hook.woken, registry.brought, told[0]) == (["m", "n"], ["n"] * 3, "it is being fetched")
