"""Models that no worker serves: one flight for each, told step by step, and never endless."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.errors import HeliosError, InvalidInput, NotFound, RepoNotFound, Retired, Unavailable
from helios.registry_answers import Fetch, FetchError, Place
from router.discovery import availability as module
from router.discovery.availability import Availability
from router.discovery.progress import Phase, Progress, refusal

MODEL, COMMIT = "org/name", "a" * 40


def place(state: str, **more) -> Place:
    return Place("models/org/name", "main", state, **more)


def running(done: int, total: int = 100) -> Place:
    return place("partial", fetch=Fetch("running", done, total, 3, retry_after_s=2))


HERE = place("here", commit=COMMIT)


class Site:
    """A registry and a waker that do as they are told, and a clock that only sleeping moves."""

    def __init__(self, *says: Place | HeliosError, waker: bool = True, may: bool = True) -> None:
        self.says, self.now = list(says), 0.0
        self.served: set[str] = set()
        self.asked: list[str] = []
        self.woken: list[tuple[str, str]] = []
        self.refuses: HeliosError | None = None
        self.stopped = asyncio.Event()
        self.stopped.set()
        self.availability = Availability(
            lambda name: self._ask("where"), lambda name: self._ask("fetch"), lambda name: may,
            lambda model: model in self.served, self if waker else None,
            wake_s=60, clock=lambda: self.now, sleep=self.sleep,
        )  # fmt: skip

    async def _ask(self, how: str) -> Place:
        self.asked.append(how)
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, HeliosError):
            raise said
        return said

    async def wake(self, name, commit: str, report) -> None:
        self.woken.append((str(name), commit))
        if self.refuses is not None:
            raise self.refuses
        report("loading weights, 40%")

    async def sleep(self, seconds: float) -> None:
        await self.stopped.wait()
        self.now += seconds
        await asyncio.sleep(0)

    async def over(self, model: str = MODEL) -> list[Progress]:
        """Want it and hear of everything until it is over."""
        heard = [self.availability.want(model)]
        self.availability.listen(model, heard.append)
        async with asyncio.timeout(10):
            while not heard[-1].ended:
                await asyncio.sleep(0)
        return heard


def scenario(run):
    def test():
        asyncio.run(run())

    test.__name__ = run.__name__
    return test


@scenario
async def test_a_model_is_fetched_woken_and_served():
    site = Site(place("unknown", fetch=Fetch("running", 0, 0, 0, retry_after_s=1)), running(40), running(80), HERE)
    heard = [site.availability.want(MODEL)]
    site.availability.listen(MODEL, heard.append)
    while not site.woken:
        await asyncio.sleep(0)
    assert [(one.phase, one.done, one.total) for one in heard] == [
        (Phase.ASKED, 0, 0), (Phase.FETCHING, 0, 0), (Phase.FETCHING, 40, 100), (Phase.FETCHING, 80, 100),
        (Phase.WAKING, 80, 100), (Phase.WAKING, 80, 100),
    ]  # fmt: skip
    assert heard[-1].text == "a worker for it is being started (loading weights, 40%)"
    assert site.availability.want(MODEL) == heard[-1], "joined"
    assert [one["phase"] for one in site.availability.awaited] == ["waking"]
    site.served.add(MODEL)
    site.availability.look()
    while not heard[-1].ended:
        await asyncio.sleep(0)
    assert (heard[-1].phase, site.woken, site.asked) == (Phase.SERVED, [("org/name@main", COMMIT)], ["fetch"] * 4)
    await asyncio.sleep(0)
    assert site.availability.awaited == []


@scenario
async def test_a_worker_that_comes_up_by_itself_ends_it_at_any_time():
    site = Site(running(1))
    waiting = asyncio.create_task(site.availability.wait(MODEL, 10))
    while len(site.asked) < 3:
        await asyncio.sleep(0)
    site.served.add(MODEL)
    site.availability.look()
    assert (await waiting).phase is Phase.SERVED
    assert site.woken == []


@scenario
async def test_what_may_not_be_fetched_is_only_looked_for():
    site = Site(place("upstream"), may=False)
    assert (await site.over())[-1].phase is Phase.NOWHERE
    assert site.asked == ["where"]
    site = Site(HERE, may=False)
    site.served.add(MODEL)
    assert (await site.over())[-1].phase is Phase.SERVED
    assert site.woken


@pytest.mark.parametrize(
    ("says", "phase", "named"),
    [
        (place("nowhere", reason="http://10.0.0.9 has none"), Phase.NOWHERE, module.NOT_THERE),
        (RepoNotFound("none at http://10.0.0.9"), Phase.NOWHERE, module.NOT_THERE),
        (Retired("it was wrong"), Phase.RETIRED, "it was wrong"),
        (Unavailable("http://10.0.0.9 refused"), Phase.FAILED, "the registry does not answer"),
        (
            place("unknown", fetch=Fetch("failed", 0, 0, 0, FetchError("GatedRepo", "at http://10.0.0.9"), 20)),
            Phase.FAILED, "fetching it failed (GatedRepo)",
        ),
        (
            place("unknown", fetch=Fetch("failed", 0, 0, 0, FetchError("RepoNotFound", "at http://10.0.0.9"), 30)),
            Phase.NOWHERE, module.NOT_THERE,
        ),
    ],
)  # fmt: skip
def test_how_it_ends_where_it_cant_be_had(says, phase, named):
    async def scenario():
        site = Site(says)
        end = (await site.over())[-1]
        assert (end.phase, end.text) == (phase, named)
        await asyncio.sleep(0)
        for _ in range(5):
            assert site.availability.want(MODEL).phase is phase, "remembered"
        assert len(site.asked) == 1
        site.now += 1000
        assert site.availability.want(MODEL).phase is Phase.ASKED, "for a while"
        await site.availability.close()

    asyncio.run(scenario())


@scenario
async def test_a_registry_that_goes_away_meanwhile_ends_nothing():
    site = Site(running(10), Unavailable("away"), Unavailable("away"), running(50), HERE)
    heard = [site.availability.want(MODEL)]
    site.availability.listen(MODEL, heard.append)
    while not site.woken:
        await asyncio.sleep(0)
    assert "the registry does not answer" in heard[2].text
    assert [one.done for one in heard] == [0, 10, 10, 50, 50, 50]
    await site.availability.close()
    assert heard[-1].phase is Phase.FAILED, "whoever waits hears of the end, whatever it is"


@scenario
async def test_without_a_waker_nothing_is_promised():
    end = (await Site(HERE, waker=False).over())[-1]
    assert (end.phase, end.text) == (Phase.FAILED, "the registry has it, and no worker serves it")


@scenario
async def test_a_waker_that_fails_or_is_never_heard_of_again_ends_it():
    site = Site(HERE)
    site.refuses = Unavailable("there is no room")
    assert (await site.over())[-1].text == "there is no room"
    site = Site(HERE)
    assert (await site.over())[-1].text == "no worker served it within 60 s of being started"


@scenario
async def test_what_nobody_wants_any_more_is_given_up():
    site = Site(running(1))
    leave = site.availability.listen(MODEL, lambda _: None) if site.availability.want(MODEL) else None
    while site.now < 2 * module.LINGER_S:
        await asyncio.sleep(0)
    assert site.availability.awaited, "somebody listens"
    leave()
    since = site.now
    while site.availability.awaited:
        await asyncio.sleep(0)
    assert module.LINGER_S < site.now - since < module.LINGER_S + 30


@scenario
async def test_there_is_a_most():
    site = Site(running(1))
    site.stopped.clear()
    for number in range(module.MOST):
        site.availability.want(f"org/name{number}")
    refused = site.availability.want(MODEL)
    assert (refused.phase, refused.retry_after_s) == (Phase.FAILED, 5)
    with pytest.raises(InvalidInput):
        site.availability.want("no/such/name")
    await site.availability.close()
    await asyncio.sleep(0)
    assert site.availability.awaited == []


@scenario
async def test_waiting_ends_with_its_time():
    site = Site(running(30))
    site.stopped.clear()
    progress = await site.availability.wait(MODEL, 0.05)
    assert (progress.phase, progress.done) == (Phase.FETCHING, 30)
    assert all(not flight.listeners for flight in site.availability._flights.values())
    await site.availability.close()


@scenario
async def test_whoever_holds_a_request_has_it_brought():
    site, texts = Site(running(40), HERE), []
    bringing = asyncio.create_task(site.availability.bring(MODEL, texts.append))
    while not site.woken:
        await asyncio.sleep(0)
    site.served.add(MODEL)
    await bringing
    assert texts[0] == "no worker serves it; it is being looked for"
    assert texts[1].startswith("it is being fetched (")
    for says, error in ((place("nowhere"), NotFound), (Retired("r"), Retired), (Unavailable("u"), Unavailable)):
        site = Site(says)
        for _ in range(2):
            with pytest.raises(error):
                await site.availability.bring(MODEL, texts.append)
    with pytest.raises(InvalidInput):
        await site.availability.bring("no/such/name", texts.append)


def test_what_a_client_is_told():
    fetching = refusal(Progress(MODEL, Phase.FETCHING, 12_000_000, 48_000_000, retry_after_s=7))
    assert (fetching.status, fetching.code, fetching.retry_after_s) == (503, "model_not_ready", 7)
    assert fetching.message == "The model 'org/name' can't answer yet: it is being fetched (12.0 of 48.0 MB, 25%)."
    assert refusal(Progress(MODEL, Phase.WAKING)).message.endswith("a worker for it is being started.")
    nowhere = refusal(Progress(MODEL, Phase.NOWHERE, reason="nobody has it"))
    assert (nowhere.status, nowhere.code, nowhere.retry_after_s) == (404, "model_not_found", None)
    assert (refusal(Progress(MODEL, Phase.RETIRED, reason="it was wrong")).status) == 410
    assert refusal(Progress(MODEL, Phase.FAILED, reason="it is gated")).code == "model_unavailable"


SAYS = st.sampled_from(
    [
        running(1), running(99), place("unknown"), place("upstream"), place("nowhere"), HERE, Unavailable("away"),
        RepoNotFound("none"), place("unknown", fetch=Fetch("failed", 0, 0, 0, FetchError("E", "m"))),
    ]
)  # fmt: skip


@given(st.lists(SAYS, min_size=1, max_size=8), st.booleans(), st.booleans(), st.integers(0, 30))
def test_every_flight_ends_and_everybody_hears_of_it_once(says, waker, may, served_after):
    async def scenario():
        site = Site(*says, waker=waker, may=may)
        heard: list[list[Progress]] = [[], []]
        site.availability.want(MODEL)
        leaves = [site.availability.listen(MODEL, one.append) for one in heard]
        for step in range(5000):
            if not site.availability.awaited:
                break
            if step == served_after:
                site.served.add(MODEL)
                site.availability.look()
            if step == 2000:
                for leave in leaves:
                    leave()
            await asyncio.sleep(0)
        assert site.availability.awaited == []
        assert heard[0] == heard[1]
        assert [one.ended for one in heard[0]].count(True) == 1
        assert heard[0][-1].ended

    asyncio.run(scenario())
