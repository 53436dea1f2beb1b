"""``helios serve --on-demand`` on a machine without sleep: models are stopped and started within a budget of memory."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helios.config import Config
from helios.home import Home
from helios.launch import demand
from helios.launch.needs import Need
from helios.launch.pools import MAIN
from helios.launch.progress import Progress
from helios.launch.serving import Serving
from helios.launch.signals import Stopped
from tests.support.hub_site import write
from tests.support.mirror_site import Site, own_site
from tests.support.on_demand import PLACE, running, serving_on_demand
from tests.support.routing import CHAT, Response, RouterProcess, stream

NAMES = ("one", "two", "bad", "huge")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A registry with models of all ``NAMES``."""
    root = tmp_path_factory.mktemp("site")
    with own_site(root / "site", 1000) as (_, open_):
        site = open_()
        for name in NAMES:
            site.helios("push", str(write(root / name, {"config.json": name.encode()})), f"org/{name}")
        yield site


def test_a_model_is_started_by_its_first_request_and_gives_way_to_another(
    site: Site, helios_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "LEAST_S", 0.5)
    with serving_on_demand(helios_home, site.registry.url, idle_s=60.0) as (router, fakes):
        assert router.chat("org/none").status == 404
        body = {"model": "org/one", "max_tokens": 4, "stream": True, **CHAT}
        sock, answer = stream(router.address, "/v1/chat/completions", body)
        told = answer.read()
        sock.close()
        assert told.startswith(b": waking"), "it waited, and was told so"
        assert b"data: [DONE]" in told
        assert router.chat("org/one", timeout_s=60).status == 200
        assert router.chat(fakes.started[0]).status == 200, "its commit is the same worker"
        assert names(fakes.started) == ["org/one"]

        answered = router.chat("org/two", timeout_s=60)
        assert (answered.status, answered.json()["model"]) == (200, "org/two")
        assert names(fakes.started[1:]) == ["org/two"]
        assert running(helios_home) == ["fake-2"], "there is memory for one"
        assert router.chat("org/one", timeout_s=60).json()["model"] == "org/one", "and it comes again"
        assert names(fakes.started[2:]) == ["org/one"]
    assert running(helios_home) == []


def test_who_asks_does_not_wait_for_the_next_look(site: Site, helios_home: Home) -> None:
    with serving_on_demand(helios_home, site.registry.url, every_s=3600.0) as (router, _):
        assert router.chat("org/one", timeout_s=60).status == 200


def test_what_is_due_is_done_before_the_next_look(helios_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios.launch.serving.WATCH_S", 3600.0)
    due, steps = threading.Event(), list[str]()

    def step() -> None:
        steps.append("step")
        if len(steps) == 2:
            raise Stopped(signal.SIGTERM)
        threading.Timer(0.1, due.set).start()

    with Serving(helios_home, Config(), Progress(io.StringIO())) as nothing, pytest.raises(Stopped):
        nothing.watch(step, due)


def test_what_nobody_uses_is_stopped_and_what_cannot_start_is_told(
    site: Site, helios_home: Home, wait_for: Any
) -> None:
    with serving_on_demand(helios_home, site.registry.url, {MAIN: 10}, idle_s=1.0) as (router, fakes):
        fakes.refused = {"org/bad"}
        refused = router.chat("org/bad", timeout_s=60)
        assert refused.status == 503
        assert "no model for vLLM" in refused.json()["error"]["message"]
        assert "long log" not in refused.json()["error"]["message"]
        assert router.chat("org/one", timeout_s=60).status == 200
        wait_for(lambda: running(helios_home) == [], timeout_s=60)
        assert router.chat("org/one", timeout_s=60).status == 200
        assert len(fakes.started) == 2


def test_what_never_fits_is_refused_at_once_with_the_figures_and_the_rest_is_served(
    site: Site, helios_home: Home
) -> None:
    with serving_on_demand(helios_home, site.registry.url, {MAIN: 10**10}) as (router, fakes):
        fakes.needs["org/huge"] = (Need(PLACE, {MAIN: 11 * 10**9}),)
        refused = router.chat("org/huge", timeout_s=20)
        assert refused.status == 503
        message = refused.json()["error"]["message"]
        assert "it needs 11.0 GB of memory; models may take 10.0 GB of memory together" in message
        for name in ("org/one", "org/two"):
            assert router.chat(name, timeout_s=60).status == 200
        assert running(helios_home) == ["fake-1", "fake-2"], "both fit"


def test_a_stream_goes_on_while_another_model_waits_for_its_memory(
    site: Site, helios_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand, "LEAST_S", 0.2)
    monkeypatch.setattr(demand, "TURN_S", 1.0)  # so its turn comes while the stream is under way
    with serving_on_demand(helios_home, site.registry.url, token_s=0.1) as (router, _):
        assert router.chat("org/one", timeout_s=60).status == 200
        body = {"model": "org/one", "max_tokens": 60, "stream": True, **CHAT}
        sock, answer = stream(router.address, "/v1/chat/completions", body)
        with Asking(router, "org/two") as asking:
            told = answer.read()
            assert asking.answer is None, "it waits for the end of the stream"
        sock.close()
        assert told.count(b'"content"') >= 60
        assert b"data: [DONE]" in told
        assert asking.answer is not None
        assert asking.answer.json()["model"] == "org/two"


def test_who_waits_for_memory_that_is_in_use_is_told_why_after_a_while(site: Site, helios_home: Home) -> None:
    with serving_on_demand(helios_home, site.registry.url, token_s=0.1, wait_s=2.0) as (router, fakes):
        assert router.chat("org/one", timeout_s=60).status == 200
        body = {"model": "org/one", "max_tokens": 150, "stream": True, **CHAT}
        sock, answer = stream(router.address, "/v1/chat/completions", body)
        refused = router.chat("org/two", timeout_s=60)
        assert refused.status == 503
        message = refused.json()["error"]["message"]
        assert "memory for it was not free within 2 s" in message
        assert "org/one" in message
        assert refused.header("retry-after")
        assert b"data: [DONE]" in answer.read()
        sock.close()
        assert len(fakes.started) == 1


def names(pinned: list[str]) -> list[str]:
    return [one.partition("@")[0] for one in pinned]


class Asking(threading.Thread):
    """A request in a thread of its own; a context that waits for its answer."""

    def __init__(self, router: RouterProcess, model: str) -> None:
        super().__init__()
        self._router, self._model = router, model
        self.answer: Response | None = None

    def run(self) -> None:
        self.answer = self._router.chat(self._model, timeout_s=90)

    def __enter__(self) -> Asking:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join(100)


def test_a_model_is_named_or_left_to_the_clients(helios: Any) -> None:
    assert "helios serve --on-demand" in helios("serve", code=2).err
    assert "Leave org/name out" in helios("serve", "org/name", "--on-demand", code=2).err
    assert "for models that clients name" in helios("serve", "org/name", "--memory", "1GB", code=2).err
    assert "--warm is for models that go" in helios("serve", "--on-demand", "--warm", "5", code=2).err
    assert "'many' is no size" in helios("serve", "--on-demand", "--memory", "many", code=2).err
