"""Names at the registry in a process that relays: whose workers take a request, who waits, who is told what."""

from __future__ import annotations

import pytest

from helios.config import DiscoverySettings, WorkerSettings
from helios.errors import NotFound, Retired, Unavailable
from router.admission import at_registry
from router.admission.at_registry import BEYOND_S, AtRegistry, Found
from router.discovery.models import Name, Resolution
from router.discovery.names import standing
from router.discovery.progress import Phase, Progress
from router.errors import ApiError
from router.workers import Workers

OLD, NEW = "a" * 40, "b" * 40
WORKER = WorkerSettings("org/name", "http://h:1", revision=OLD)


class Scene:
    def __init__(self, hold: bool = True, *workers: WorkerSettings) -> None:
        self.now = 0.0
        self.resolved: list[str] = []
        self.wanted: list[str] = []
        clock = lambda: self.now  # noqa: E731
        self.workers = Workers(workers, clock, pins=True)
        settings = DiscoverySettings(resolve=True, hold=hold, resolve_timeout_s=5.0)
        self.registry = AtRegistry(settings, self.workers, self.resolved.append, self.wanted.append, clock)

    def stands_for(self, text: str, answer) -> None:
        self.registry.find(text)
        name = Name.parse(text)
        self.registry.resolved(str(name), standing(Resolution(name, answer) if isinstance(answer, str) else answer))

    def progress(self, model: str, phase: Phase, done: int = 0, total: int = 0, reason: str | None = None) -> None:
        self.registry.progressed(Progress(model, phase, done, total, reason))

    def waits(self, model: str) -> list[Found | ApiError]:
        heard: list[Found | ApiError] = []
        assert self.registry.find(model) is None
        self.leave = self.registry.wait(model, heard.append)
        return heard


def test_a_name_finds_the_workers_of_its_commit_whatever_they_call_it():
    literal = WorkerSettings(f"org/name@{NEW}", "http://h:2")
    scene = Scene(True, WORKER, literal)
    heard = scene.waits("org/name@champion")
    scene.stands_for("org/name@champion", OLD)
    assert heard == [Found(f"org/name@{OLD}", "org/name", [])]
    scene.stands_for("org/name@champion", NEW)
    assert scene.registry.find("org/name@champion") == Found(f"org/name@{NEW}", f"org/name@{NEW}", [])
    assert scene.registry.stands_for("org/name@champion") == f"org/name@{NEW}"
    assert scene.registry.find(f"org/name@{OLD}") == Found(f"org/name@{OLD}", "org/name"), "nobody is asked"
    assert scene.workers.models == ["org/name", f"org/name@{NEW}"]
    assert scene.registry.stands_for("org/name@other") == "org/name@other"
    assert scene.resolved == ["org/name@champion"]
    assert scene.wanted == []


def test_a_worker_with_another_commit_leaves_its_old_name():
    scene = Scene(True, WORKER)
    scene.workers.apply("configuration", [WorkerSettings("org/name", "http://h:1", revision=NEW)])
    assert not scene.workers.of(f"org/name@{OLD}")
    assert [one.url for one in scene.workers.of(f"org/name@{NEW}")] == ["http://h:1"]
    scene.workers.apply("configuration", [])
    assert not scene.workers.of(f"org/name@{NEW}")
    assert scene.workers.models == []


def test_the_first_of_a_new_name_wait_for_a_bounded_time():
    scene = Scene()
    heard, other = scene.waits("org/new"), scene.waits("org/new")
    scene.leave()
    scene.now = 5.0 + BEYOND_S - 0.01
    scene.registry.tick()
    assert heard == []
    assert len(scene.resolved) == 2, "asked again: who was asked may have died"
    scene.now += 0.01
    scene.registry.tick()
    (error,) = heard
    assert (error.status, error.code, error.retry_after_s) == (503, "model_not_ready", 1)
    assert other == [], "who has left hears nothing"


def test_no_more_than_so_many_wait(monkeypatch):
    monkeypatch.setattr(at_registry, "MOST", 2)
    scene = Scene()
    for number in range(2):
        scene.waits(f"org/m{number}")
    with pytest.raises(ApiError) as refused:
        scene.registry.wait("org/more", lambda found: None)
    assert refused.value.status == 503


@pytest.mark.parametrize("hold", [True, False])
def test_a_model_on_its_way_is_held_or_told(hold):
    scene = Scene(hold)
    heard = scene.waits("org/new@dev")
    scene.stands_for("org/new@dev", OLD)
    pinned = f"org/new@{OLD}"
    assert (scene.wanted, heard) == ([pinned], []), "whether it can be had is not known yet"
    assert not scene.workers.known(pinned) or hold
    scene.progress(pinned, Phase.FETCHING)
    assert heard == [], "nor by now"
    scene.progress(pinned, Phase.FETCHING, 1, 4)
    (found,) = heard
    if hold:
        assert found == Found(pinned, "org/new", [])
        assert scene.workers.known(pinned)
        assert scene.registry.missing(pinned) is None
    else:
        assert (found.status, found.code) == (503, "model_not_ready")
        assert "25%" in found.message
        assert scene.registry.missing(pinned).status == 503
    scene.progress(pinned, Phase.FAILED, reason="no GPU is free")
    assert not scene.workers.known(pinned)
    assert "no GPU is free" in scene.registry.missing(pinned).message
    assert scene.registry.find("org/new@dev").code == "model_unavailable"


def test_what_the_registry_has_not_is_asked_of_its_upstream():
    scene = Scene()
    heard = scene.waits("org/none")
    scene.stands_for("org/none", NotFound("there is none"))
    assert scene.wanted == ["org/none"]
    scene.progress("org/none", Phase.NOWHERE)
    assert (heard[0].status, heard[0].code) == (404, "model_not_found")
    heard = scene.waits("org/away")
    scene.stands_for("org/away", Unavailable("it is down"))
    scene.progress("org/away", Phase.FAILED, reason="the registry does not answer")
    assert (heard[0].status, heard[0].code) == (503, "model_unavailable"), "no 404 while nobody knows"
    heard = scene.waits("org/old")
    scene.stands_for("org/old", Retired("it is wrong"))
    assert (heard[0].status, heard[0].code) == (410, "model_retired")
    assert scene.registry.find("no/such/name") == Found("no/such/name", "no/such/name")


def test_a_revision_that_the_registry_can_not_resolve_yet_is_not_held():
    scene = Scene()
    heard = scene.waits("org/new@dev")
    scene.stands_for("org/new@dev", NotFound("not yet"))
    scene.progress("org/new@dev", Phase.FETCHING, 1, 4)
    assert heard[0].code == "model_not_ready"
