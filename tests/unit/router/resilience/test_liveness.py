"""A worker that owes an answer and is silent is doubted, asked, and down until it makes a token."""

from __future__ import annotations

from helios.config import HangSettings, RouterSettings
from router.resilience.guard import Attempt, Guard, admitted
from router.resilience.liveness import Life
from router.resilience.outcome import Outcome

SETTINGS = HangSettings(quiet_s=10, factor=4, every_s=5)


class Scene:
    def __init__(self, settings: HangSettings = SETTINGS) -> None:
        self.now = 0.0
        self.guard = Guard("a", RouterSettings(hang=settings), lambda: self.now, lambda: 0.0)

    def request(self, engine: bool = True) -> Attempt:
        return Attempt(self.guard, self.now, engine)

    def looked(self) -> bool:
        found = self.guard.life.look()
        self.guard.refresh()
        return found


def test_silence_is_doubted_when_something_is_owed() -> None:
    scene = Scene()
    scene.now = 100
    assert not scene.looked()  # nobody asked
    attempt = scene.request()
    scene.now += 10
    assert not scene.looked()
    scene.now += 0.1
    assert scene.guard.clear
    assert scene.looked()
    assert scene.guard.life.state is Life.DOUBTED
    assert not scene.guard.admits()
    assert not scene.looked()  # it is being asked
    assert not scene.guard.life.answered()
    scene.guard.refresh()
    assert scene.guard.clear
    attempt.heard(scene.now, 200)  # after 10 s: that is what it takes
    scene.now += 40
    assert not scene.looked()
    scene.now += 10
    assert scene.looked()


def test_a_busy_worker_is_not_doubted() -> None:
    scene = Scene()
    waiting, streaming = scene.request(), scene.request()
    for _ in range(100):
        scene.now += 1
        streaming.heard(scene.now, 200)
        assert not scene.looked()
    waiting.end()
    streaming.end()
    scene.now += 1000
    assert not scene.looked()


def test_a_worker_that_is_slow_as_usual_is_not_doubted() -> None:
    scene = Scene()
    for _ in range(30):
        attempt = scene.request()
        scene.now += 8
        attempt.heard(scene.now, 200)
        attempt.outcome = Outcome.OK
        attempt.end()
    scene.request()
    scene.now += 31
    assert not scene.looked()
    scene.now += 10
    assert scene.looked()


def test_clients_that_give_up_one_after_the_other_do_not_hide_it() -> None:
    scene = Scene()
    for _ in range(4):
        attempt = scene.request()
        scene.now += 2.6
        attempt.outcome = Outcome.OWED
        attempt.end()
    assert scene.guard.life.waiting == 0
    assert scene.looked()


def test_what_needs_no_engine_says_nothing_of_it() -> None:
    scene = Scene()
    scene.request()
    scene.now += 10.5
    tokenized, wrong = scene.request(engine=False), scene.request()
    tokenized.heard(scene.now, 200)
    wrong.heard(scene.now, 400)
    assert scene.looked()


def test_down_until_it_makes_a_token() -> None:
    scene = Scene()
    scene.request()
    scene.now += 11
    assert scene.looked()
    assert scene.guard.life.silent("it answers, but gave no token")
    assert scene.guard.hung
    assert admitted([Holder(scene.guard)]) == []  # it is not even the least bad
    for _ in range(3):
        scene.now += 4
        assert not scene.looked()
        scene.now += 1
        assert scene.looked()
        assert not scene.guard.life.silent("still")
    scene.now += 5
    assert scene.looked()
    assert scene.guard.life.answered()
    scene.guard.refresh()
    assert scene.guard.clear


def test_disabled_it_doubts_nobody() -> None:
    scene = Scene(HangSettings(enabled=False))
    scene.request()
    scene.now += 10_000
    assert not scene.looked()


class Holder:
    def __init__(self, guard: Guard) -> None:
        self.guard = guard


def test_of_workers_that_should_get_nothing_the_least_bad_are_used() -> None:
    ejected, broken, doubted, fine = (Holder(Scene().guard) for _ in range(4))
    ejected.guard.eject("slow")
    for _ in range(5):
        attempt = Attempt(broken.guard, 0.0, engine=True)
        attempt.outcome = Outcome.FAILED
        attempt.end()
    doubted.guard.life.state = Life.DOUBTED
    doubted.guard.refresh()
    all_of_them = [ejected, broken, doubted, fine]
    assert admitted(all_of_them) == [fine]
    assert admitted(all_of_them[:3]) == [ejected]
    assert admitted([broken, doubted]) == [doubted]
    assert admitted([broken]) == [broken]
    assert Attempt(broken.guard, 0.0, engine=True).forced
    for usable in (fine, doubted, ejected):
        assert not Attempt(usable.guard, 0.0, engine=True).forced
    assert admitted([]) == []
