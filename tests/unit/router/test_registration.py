"""Leases of registered workers: what a state machine with a clock of its own says."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.errors import Conflict, HeliosError, InvalidInput, NotFound, Unavailable
from helios.metrics import RouterMetrics
from router.discovery import registration
from router.discovery.registration import Leases, Registration, RegistrationSource
from router.discovery.source import Teller


def said(url: str = "http://h:1", **more) -> Registration:
    return Registration(url=url, models=more.pop("models", ["m"]), **more)


class Against(RuleBasedStateMachine):
    """Beside a model that is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.leases = Leases(100, lambda: self.now)
        self.model: dict[str, tuple[str, float]] = {}

    @rule(who=st.sampled_from("abc"), port=st.integers(1, 3), lease_s=st.integers(1, 20))
    def put(self, who: str, port: int, lease_s: int) -> None:
        url = f"http://h:{port}"
        self.model = {k: v for k, v in self.model.items() if v[1] > self.now}
        if any(url == other and who != name for name, (other, _) in self.model.items()):
            with pytest.raises(Conflict):
                self.leases.put(who, said(url, lease_s=lease_s))
        else:
            self.leases.put(who, said(url, lease_s=lease_s))
            self.model[who] = (url, self.now + lease_s)

    @rule(who=st.sampled_from("abc"))
    def remove(self, who: str) -> None:
        if self.model.pop(who, None) is None:
            with pytest.raises(NotFound):
                self.leases.remove(who)
        else:
            self.leases.remove(who)

    @rule(seconds=st.integers(1, 30))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        ended = {who for who, (_, ends) in self.model.items() if ends <= self.now}
        assert set(self.leases.expire()) == ended
        self.model = {k: v for k, v in self.model.items() if k not in ended}

    @invariant()
    def they_agree(self) -> None:
        assert [one.url for one in self.leases.found.workers] == sorted(url for url, _ in self.model.values())
        assert self.leases.next_end == min((ends for _, ends in self.model.values()), default=None)
        for who, (url, ends) in self.model.items():
            assert self.leases.of(url) == (who, ends - self.now)
            assert self.leases.url_of(who) == url


TestLeases = Against.TestCase
TestLeases.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize(
    ("who", "wrong", "named"),
    [
        ("", said(), "id"),
        ("a/b", said(), "a/b"),
        ("x" * 129, said(), "128"),
        ("a", said(models=[]), "models"),
        ("a", said(models=["m", "m"]), "twice"),
        ("a", said("nowhere"), "nowhere"),
        ("a", said(weight=0.0), "weight"),
        ("a", said(lease_s=0.5), "lease_s"),
        ("a", said(lease_s=101.0), "lease_s"),
        ("a", said(lease_s=float("nan")), "lease_s"),
    ],
)
def test_what_no_registration_is(who, wrong, named):
    with pytest.raises(InvalidInput) as caught:
        Leases(100, lambda: 0.0).put(who, wrong)
    assert named in caught.value.message


def test_there_is_a_most(monkeypatch):
    monkeypatch.setattr(registration, "MOST", 2)
    leases = Leases(100, lambda: 0.0)
    for number in (1, 2, 1):
        leases.put(f"w{number}", said(f"http://h:{number}"))
    with pytest.raises(Unavailable):
        leases.put("w3", said("http://h:3"))


def test_a_worker_that_does_not_call_again_is_taken_out_by_itself():
    async def scenario():
        told, metrics = [], RouterMetrics()
        teller = Teller("registration", lambda _, workers: told.append([one.url for one in workers]), metrics)
        now = 0.0
        source = RegistrationSource(100, teller, clock=lambda: now)
        task = asyncio.create_task(source.run())
        await asyncio.sleep(0)
        source.put("a", said("http://h:1", lease_s=10))
        source.put("b", said("http://h:2", lease_s=10))
        source.put("b", said("http://h:2", lease_s=50))
        assert told == [[], ["http://h:1"], ["http://h:1", "http://h:2"]], "at once, and a heartbeat changes nothing"
        now = 10.0
        source.put("c", said("http://h:1", lease_s=50))
        assert told[3:] == [["http://h:2"], ["http://h:1", "http://h:2"]], "an address is free when its lease has ended"
        source.remove("c")
        source.put("c", said("http://h:1", lease_s=1))
        now = 11.0  # its timer was set by the loop's clock, and goes on
        async with asyncio.timeout(5):
            while told[-1] != ["http://h:2"]:
                await asyncio.sleep(0.01)
        del told[3:-1]
        source.remove("b")
        assert told[4:] == [[]]
        with pytest.raises(HeliosError):
            source.remove("b")
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(scenario())


def test_leases_are_taken_over_and_told_once_the_source_runs():
    """Another process has granted them; who could not call while none answered has some time to do so."""
    now, told, noted = 100.0, [], []
    teller = Teller("registration", lambda name, workers: told.append([one.url for one in workers]), RouterMetrics())

    async def scenario():
        source = RegistrationSource(60, teller, clock=lambda: now)
        source.noted = lambda who, lease: noted.append((who, lease is not None))
        lease = Leases(60, lambda: now).put("old", said("http://h:1", lease_s=30))
        source.take_over("late", registration.Lease(said("http://h:2").settings(), now - 5))
        source.take_over("old", lease)
        source.take_over("gone", registration.Lease(said("http://h:3").settings(), now + 5))
        source.take_over("gone", None)
        assert (told, source.leases.of("http://h:1")) == ([], ("old", 30))
        assert source.leases.of("http://h:2") == ("late", registration.TAKEN_OVER_S)
        running = asyncio.create_task(source.run())
        await asyncio.sleep(0)
        assert told == [["http://h:1", "http://h:2"]]
        source.take_over("late", None)
        assert (told[1:], noted) == ([["http://h:1"]], [])
        source.put("new", said("http://h:4"))
        source.remove("old")
        assert noted == [("new", True), ("old", False)]
        running.cancel()

    asyncio.run(scenario())
